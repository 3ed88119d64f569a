"""What only a CUDA device can show: half precision with a gradient scaler, and memory that is given back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Recorder
from pack.trainer.core.errors import CancelledError
from pack.trainer.data.images import load_pictures
from pack.trainer.dreambooth import TrainResult, train
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.runs.folder import RunPaths

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def run(checkpoint: Path, folder: Path, home: Path, listener: Recorder, **changes: object) -> TrainResult:
    values = {"name": "dog", "steps": 6, "rank": 4, "resolution": 64, "learning_rate": 1e-3, "save_precision": "fp32"}
    settings = TrainSettings.checked(values | changes)
    pictures = load_pictures(folder, "a photo of sks dog", listener)
    return train(
        open_base(checkpoint), pictures, [], settings, RunPaths(home / "loras", home / "runs"), "cuda", listener
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns_and_frees(
    tiny_checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    before = torch.cuda.memory_allocated()
    listener = Recorder()
    result = run(tiny_checkpoint, picture_folder(), tmp_path, listener, precision=precision)
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
    ],
    ids=["dora", "loha", "lokr", "text encoder", "dropout, norm", "full"],
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_everything_trains_in_half_precision(
    tiny_checkpoint: Path,
    picture_folder: Callable[..., Path],
    tmp_path: Path,
    changes: dict[str, object],
    precision: str,
) -> None:
    listener = Recorder()
    result = run(tiny_checkpoint, picture_folder(), tmp_path, listener, precision=precision, **changes)
    assert len(listener.losses) == 6
    assert all(
        torch.isfinite(part).all() for layer in result.adapter.layers.values() for part in layer.tensors().values()
    )


def test_fp16_resumes_with_its_gradient_scaler(
    tiny_checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Stopped after 3 steps and resumed equals straight; kernels of a GPU may differ in the last bits."""
    folder = picture_folder()
    straight = run(tiny_checkpoint, folder, tmp_path / "straight", Recorder(), precision="fp16")
    with pytest.raises(CancelledError):
        run(tiny_checkpoint, folder, tmp_path / "resumed", Recorder(stop_after=9), precision="fp16")
    resumed = run(tiny_checkpoint, folder, tmp_path / "resumed", Recorder(), precision="fp16")
    assert 0 < resumed.started_from < 6
    for name, layer in straight.adapter.layers.items():
        torch.testing.assert_close(resumed.adapter.layers[name].up, layer.up, rtol=1e-3, atol=1e-5)
