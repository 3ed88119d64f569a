"""Optimisers whose package is there but does not work."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from pack.trainer.core.errors import SettingsError
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.optimizers import require_optimizer


def test_a_package_that_can_not_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes with a CUDA library that the system lacks."""
    load = importlib.import_module

    def broken(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "bitsandbytes":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return load(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(SettingsError) as refused:
        require_optimizer(TrainSettings(optimizer="adamw-8bit"))
    assert "libcudart.so.12" in refused.value.problem
    assert "optimizer = adamw" in refused.value.remedy
