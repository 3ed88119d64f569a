"""What runs in a web UI whose `modules` are in this process."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pack.trainer.training.runs.layout import RunLayout, preview_name
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture
def queue(bare_webui: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, as a host that just started has it."""
    module = importlib.import_module("pack.webui.queue")
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 0.01)
    return module


@pytest.fixture
def made(bare_webui: Path) -> Path:
    """What a training made: its file, and its run with a sample."""
    path = bare_webui / "dreambooth" / "dög.safetensors"
    path.parent.mkdir()
    metadata = {"modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.trigger_phrase": "a photo of sks dog"}
    save_file({"weight": torch.ones(2)}, path, metadata)
    run = RunLayout(bare_webui / "dreambooth" / "runs" / "dög-1")
    sample = run.preview_path(2) / preview_name("subject", 0, 0)
    sample.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(sample)
    settings = {"instance_prompt": "a photo of {token} {class}", "token": "sks", "class_noun": "dog"}
    (run.path / "run.json").write_text(json.dumps({"fingerprint": "5e", "name": "dög", "settings": settings}))
    return path
