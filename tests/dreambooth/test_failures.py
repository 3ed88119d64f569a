"""A run that fails in the middle: it says what failed and at which step, and what was trained before is kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from helpers import Recorder
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.core.errors import DivergedError, StorageError
from pack.trainer.core.events import Step
from pack.trainer.core.seeding import draw_sample
from pack.trainer.settings.train import TrainSettings
from run_trees import contents_below, file_size_limit
from safetensors.torch import load_file, save_file
from worlds import Finished, World, assert_same_end, newest_step, steps_in

pytestmark = pytest.mark.usefixtures("quick")


def assert_good(run: Path, step: int) -> None:
    """The checkpoint is there, loads, and is finite."""
    adapter = read_adapter(run / f"step-{step:08d}" / "adapter.safetensors")
    assert adapter.metadata["ss_steps"] == str(step)
    for layer in adapter.layers.values():
        assert torch.isfinite(layer.up).all()
        assert torch.isfinite(layer.down).all()


def poison(run: Path, picture: int) -> None:
    """Make the encoding of one picture NaN, as a text or picture encoder does that overflows."""
    path = run / "cache.safetensors"
    tensors = load_file(path)
    tensors[f"instance.mean.{picture}"][..., 0, 0] = torch.nan
    save_file(tensors, path)


@pytest.mark.parametrize("checkpoint_every", mostly_slow([1, 4, 0], 0))
def test_nan_stops_the_run_and_names_the_step(
    checkpoint_every: int, finished: Finished, world: World, tmp_path: Path
) -> None:
    run = finished.begun(tmp_path, 2)
    items = [draw_sample(TrainSettings().seed, "instance", step, 0, 1, [(4, 8, 8)] * 3).item for step in range(8)]
    poison(run, items[4])
    wrong = items.index(items[4], 2) + 1
    assert wrong == 5  # two good steps before it
    earlier, listener = contents_below(tmp_path), Recorder()
    with pytest.raises(DivergedError) as caught:
        world.train(tmp_path, listener, steps=9, checkpoint_every=checkpoint_every)
    assert f"step {wrong};" in caught.value.problem
    assert "nan" in caught.value.problem
    assert "learning_rate" in caught.value.remedy
    kept = newest_step(run)
    assert 2 <= kept < wrong
    assert f"step {kept} was saved in {run}" in caught.value.remedy
    for step in steps_in(run):
        assert_good(run, step)
    assert contents_below(tmp_path).items() >= earlier.items()
    assert not list((tmp_path / "loras").iterdir())
    assert [event.step for event in listener.events if isinstance(event, Step)] == list(range(3, wrong))


def test_weights_that_are_not_finite_are_never_saved(finished: Finished, world: World, tmp_path: Path) -> None:
    """The optimiser's state overflows, so that a good loss is followed by weights that are NaN."""
    run = finished.begun(tmp_path, 2)
    path = run / "step-00000002" / "optimizer.safetensors"
    save_file(
        {name: tensor * (torch.nan if "exp_avg" in name else 1) for name, tensor in load_file(path).items()}, path
    )
    with pytest.raises(DivergedError) as caught:
        world.train(tmp_path, checkpoint_every=1)
    assert "step 3" in caught.value.problem
    assert "learning_rate" in caught.value.remedy
    assert steps_in(run) == [1, 2]
    assert_good(run, 2)
    assert not list((tmp_path / "loras").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["adapter.safetensors", "optimizer.safetensors"])
def test_full_disk_in_the_middle_of_a_checkpoint(part: str, finished: Finished, world: World, tmp_path: Path) -> None:
    run = finished.begun(tmp_path, 2)
    sizes = {path.name: path.stat().st_size for path in (run / "step-00000002").iterdir()}
    assert sizes["adapter.safetensors"] < sizes["optimizer.safetensors"] - 100
    before = contents_below(tmp_path)
    with file_size_limit(sizes[part] - 100), pytest.raises(StorageError) as caught:
        world.train(tmp_path)
    assert str(run) in caught.value.problem
    assert caught.value.remedy
    assert contents_below(tmp_path) == before
    assert_good(run, 2)
    result = world.train(tmp_path)
    assert result.started_from == 2
    assert_same_end(result, finished.result)


def test_full_disk_that_says_so_in_the_middle_of_a_checkpoint(
    finished: Finished, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FillsTheDisk(Recorder):
        def report(self, event: Any) -> None:
            super().report(event)
            if isinstance(event, Step) and event.step == 3:
                monkeypatch.setattr(os, "fsync", full)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = finished.begun(tmp_path, 2)
    before = contents_below(tmp_path)
    with pytest.raises(StorageError) as caught:
        world.train(tmp_path, FillsTheDisk(), checkpoint_every=1)
    monkeypatch.undo()
    assert "No space left" in caught.value.problem
    assert str(run) in caught.value.problem
    assert "Free some space" in caught.value.remedy
    assert contents_below(tmp_path) == before
    result = world.train(tmp_path)
    assert result.started_from == 2
    assert_same_end(result, finished.result)
