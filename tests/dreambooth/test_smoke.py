"""The thinnest slice through every floor: pictures in, adapter out, picture drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from helpers import Recorder
from pack.trainer.adapters.apply import merge_into
from pack.trainer.data.images import load_pictures
from pack.trainer.dreambooth import train
from pack.trainer.models.open import open_base
from pack.trainer.models.sampling import GenerationConfig, generate
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.runs.folder import RunPaths


def test_pictures_in_adapter_out(tiny_checkpoint: Path, picture_folder, tmp_path: Path) -> None:
    listener = Recorder()
    base = open_base(tiny_checkpoint)
    pictures = load_pictures(picture_folder(), "a photo of sks dog", listener)
    settings = TrainSettings(name="dog", steps=3, rank=4, resolution=64, learning_rate=1e-2)
    result = train(base, pictures, [], settings, RunPaths(tmp_path / "loras", tmp_path / "runs"), "cpu", listener)
    assert result.path == tmp_path / "loras" / "dog.safetensors"
    assert len(listener.losses) == 3
    before, after = base.family.build(base), base.family.build(base)
    merge_into(after, result.adapter, 1.0)
    config = GenerationConfig(width=64, height=64, steps=2)
    plain, changed = (generate(model, "a dog", [1], config)[0] for model in (before, after))
    assert plain.size == (64, 64)
    assert plain.tobytes() != changed.tobytes()


def test_accelerates_state_is_given_back(
    tiny_checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Another program in the process may hold an accelerator of its own."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    other = Accelerator(cpu=True, mixed_precision="no")
    pictures = load_pictures(picture_folder(), "a photo of sks dog", Recorder())
    settings = TrainSettings(name="dog", steps=1, rank=2, resolution=64, precision="bf16")
    train(open_base(tiny_checkpoint), pictures, [], settings, RunPaths(tmp_path, tmp_path / "runs"), "cpu")
    assert other.mixed_precision == "no"
    assert Accelerator(cpu=True).mixed_precision == "no"
