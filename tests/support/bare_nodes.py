"""A host without ComfyUI that lends a tiny model and runs nodes."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web
from bare_host import host_modules
from pack.trainer.adapters.kohya import Adapter
from pack.trainer.adapters.layers import LoraLayer
from pack.trainer.models.open import BaseWeights, open_base
from sites import noisy

BASE = {"model": "model", "clip": "clip", "vae": "vae"}
CLIP_OF_BASE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
UNET_OF_BASE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@dataclass(frozen=True)
class Host:
    """A host without ComfyUI: its folders, the model that it lends, and what nodes ask of it."""

    folder: Path
    base: BaseWeights
    applied: list[tuple[Any, ...]]
    borrowed: list[tuple[Any, ...]]

    def run(self, module: str, node: str, **inputs: Any) -> Any:
        """What a node gives, as ComfyUI runs it: a clone of its class, with what is hidden."""
        hidden = SimpleNamespace(unique_id="7", extra_pnginfo={"workflow": {"nodes": []}})
        made = getattr(importlib.import_module(f"pack.nodes.{module}"), node)
        return type(node, (made,), {"hidden": hidden}).execute(**inputs)

    def subject(self, folder: str = "dog", **inputs: Any) -> Any:
        words = {"token": "sks", "class_noun": "dog", "caption": "a photo of {token} {class}"}
        return self.run("subject", "Subject", **{"folder": folder, **words, **inputs}).args[0]


@pytest.fixture
def host(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    base = open_base(tiny_checkpoint)
    applied: list[tuple[Any, ...]] = []
    borrowed: list[tuple[Any, ...]] = []

    def apply_adapter(*asked: Any) -> tuple[str, str]:
        applied.append(asked)
        return f"{asked[0]} + {len(applied)}", f"{asked[1]} + {len(applied)}"

    with host_modules(tmp_path, web.RouteTableDef()):
        for kind, count in (("dog", 3), ("cat", 4)):
            (tmp_path / "input" / kind).mkdir()
            for number in range(count):
                noisy((64, 64), len(kind) + 10 * count + number).save(tmp_path / "input" / kind / f"{number}.png")
        management = SimpleNamespace(processing_interrupted=lambda: False)
        monkeypatch.setitem(sys.modules, "comfy", SimpleNamespace(model_management=management))
        monkeypatch.setitem(sys.modules, "comfy.model_management", management)
        bridge = importlib.import_module("pack.nodes.host")
        monkeypatch.setattr(bridge, "training_mode", contextlib.nullcontext)
        monkeypatch.setattr(bridge, "interruptible", contextlib.nullcontext)
        monkeypatch.setattr(bridge, "borrow_base", lambda *parts: borrowed.append(parts) or base)
        monkeypatch.setattr(bridge, "lent_weights", lambda model, clip: None)
        monkeypatch.setattr(bridge, "device_name", lambda: "cpu")
        monkeypatch.setattr(bridge, "algebra_device", lambda: "cpu")
        monkeypatch.setattr(bridge, "apply_adapter", apply_adapter)
        yield Host(tmp_path, base, applied, borrowed)


def adapter_of(number: float, *modules: str) -> Adapter:
    """An adapter whose numbers are all the same."""
    layers = {
        name: LoraLayer(up=torch.full((4, 2), number), down=torch.ones(2, 4), alpha=2.0)
        for name in modules or (UNET_OF_BASE, CLIP_OF_BASE)
    }
    return Adapter(layers, {"ss_output_name": f"number {number:g}"})


def wire_of(adapter: Adapter) -> Any:
    return importlib.import_module("pack.nodes.lora").as_wire(adapter)


def names(pictures: Any) -> list[str]:
    return [picture.name for picture in pictures]
