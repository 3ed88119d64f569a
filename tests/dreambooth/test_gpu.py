"""What only a CUDA device can show: half precision with a gradient scaler, and memory that is given back."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Recorder
from pack.trainer.core.errors import CancelledError
from pack.trainer.dreambooth import TrainResult, train
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import TrainSettings
from worlds import TOKENIZER, World, paths_in

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def world(tiny_checkpoint: Path, tiny_world: World) -> World:
    """With tensors that no other test holds."""
    return replace(tiny_world, base=open_base(tiny_checkpoint, TOKENIZER))


def run(world: World, folder: Path, listener: Recorder, **changes: Any) -> TrainResult:
    values = {"name": "dog", "steps": 6, "rank": 4, "resolution": 64, "learning_rate": 1e-3, "save_precision": "fp32"}
    settings = TrainSettings.checked({**values, **changes})
    return train(world.base, world.subject, [], settings, paths_in(folder), "cuda", listener)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns_and_frees(world: World, tmp_path: Path, precision: str) -> None:
    before = torch.cuda.memory_allocated()
    listener = Recorder()
    result = run(world, tmp_path, listener, precision=precision)
    assert len(listener.losses) == 6
    assert all(torch.isfinite(layer.up).all() and layer.up.any() for layer in result.adapter.layers.values())
    del result
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "dora", "targets": "all"},
        {"adapter": "loha", "targets": "all"},
        {"adapter": "lokr", "targets": "all"},
        {"text_encoder_lr": 1e-4, "text_encoder_until": 0.5, "gradient_checkpointing": True},
        {"dropout": 0.2, "max_norm": 1.0},
        {"adapter": "full", "learning_rate": 1e-5, "text_encoder_lr": 1e-5},
        {"gradient_checkpointing": True, "gradient_checkpointing_interval": 2},
        {"swap_blocks": 5},
        {"swap_blocks": 1000, "base_quantization": "nf4"},
        {"compile": "blocks"},
    ],
    ids=["dora", "loha", "lokr", "text encoder", "dropout, norm", "full", "interval", "swap", "swap, nf4", "compile"],
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_everything_trains_in_half_precision(
    world: World, tmp_path: Path, changes: dict[str, object], precision: str
) -> None:
    listener = Recorder()
    result = run(world, tmp_path, listener, precision=precision, **changes)
    assert len(listener.losses) == 6
    assert all(
        torch.isfinite(part).all() for layer in result.adapter.layers.values() for part in layer.tensors().values()
    )


def test_swapped_blocks_change_nothing(world: World, tmp_path: Path) -> None:
    """Kernels of a GPU may differ in the last bits."""
    plain, swapped = Recorder(), Recorder()
    run(world, tmp_path / "plain", plain, precision="bf16", gradient_checkpointing=True)
    run(world, tmp_path / "swapped", swapped, precision="bf16", swap_blocks=1000)
    assert swapped.losses == pytest.approx(plain.losses, rel=1e-2)


def test_fp16_resumes_with_its_gradient_scaler(world: World, tmp_path: Path) -> None:
    """Stopped after 3 steps and resumed equals straight; kernels of a GPU may differ in the last bits."""
    straight = run(world, tmp_path / "straight", Recorder(), precision="fp16")
    with pytest.raises(CancelledError):
        run(world, tmp_path / "resumed", Recorder(stop_after=len(world.subject) + 3), precision="fp16")
    resumed = run(world, tmp_path / "resumed", Recorder(), precision="fp16")
    assert resumed.started_from == 3
    for name, layer in straight.adapter.layers.items():
        torch.testing.assert_close(resumed.adapter.layers[name].up, layer.up, rtol=1e-3, atol=1e-5)
