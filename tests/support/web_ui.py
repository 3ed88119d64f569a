"""A stand-in for what `webui/host.py` asks of Automatic1111 and Forge, in this process."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass
class WebUi:
    """The host.

    Attributes:
        root: Its folder, with `models/Lora` and its data.
        asked: What was asked of it, in order.
        checkpoints: Title → file.
    """

    root: Path
    asked: list[str] = field(default_factory=list)
    checkpoints: dict[str, Path] = field(default_factory=dict)
    queue_lock: Any = field(default_factory=threading.Lock)
    model: Any = None

    @property
    def loras(self) -> Path:
        return self.root / "models" / "Lora"

    @property
    def data(self) -> Path:
        return self.root / "dreambooth"

    def modules(self) -> dict[str, ModuleType]:
        """The host's modules by name."""
        state = SimpleNamespace(textinfo=None, begin=self._begin, end=lambda: self.asked.append("state ends"))
        parts: dict[str, dict[str, Any]] = {
            "paths": {"data_path": str(self.root), "script_path": str(self.root)},
            "shared": {
                "cmd_opts": SimpleNamespace(lora_dir=str(self.loras)),
                "opts": SimpleNamespace(sd_model_checkpoint=next(iter(self.checkpoints), None)),
                "state": state,
            },
            "call_queue": {"queue_lock": self.queue_lock},
            "devices": {"torch_gc": lambda: self.asked.append("cache freed")},
            "sd_models": {
                "checkpoint_tiles": lambda: list(self.checkpoints),
                "get_closet_checkpoint_match": self._match,
                "list_models": lambda: self.asked.append("models listed"),
                "unload_model_weights": lambda: self.asked.append("model unloaded"),
                "model_data": SimpleNamespace(sd_model=self.model),
            },
        }
        root = ModuleType("modules")
        made = {"modules": root}
        for name, members in parts.items():
            module = ModuleType(f"modules.{name}")
            module.__dict__.update(members)
            setattr(root, name, module)
            made[f"modules.{name}"] = module
        networks = ModuleType("networks")
        networks.list_available_networks = lambda: self.asked.append("networks listed")  # type: ignore[attr-defined]
        return made | {"networks": networks}

    def _begin(self, job: str) -> None:
        self.asked.append(f"state begins: {job}")

    def _match(self, title: str) -> Any:
        file = self.checkpoints.get(title)
        return SimpleNamespace(filename=str(file), title=title, name=title) if file else None


@pytest.fixture
def web_ui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WebUi:
    """A web UI without a checkpoint."""
    host = WebUi(tmp_path / "web ui ü")
    host.loras.mkdir(parents=True)
    for name, module in host.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return host
