"""A run is found by what it learns from, belongs to one process at a time, and leaves nothing half done."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Recorder
from pack.trainer.core.errors import BusyError, SettingsError, StorageError
from pack.trainer.core.events import Step
from pack.trainer.core.locks import FolderLock
from pack.trainer.training.runs.checkpoint import Checkpoint, Measurements, Saved
from pack.trainer.training.runs.folder import RunFolder
from pack.trainer.training.runs.index import RunIndex
from pack.trainer.training.runs.metrics import RecordedListener, read_metrics

ONE, OTHER = "1" * 64, "1" * 12 + "2" * 52  # whose first digits are the same


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """Opens runs below the test's folder; they are given back at its end."""
    runs: list[RunFolder] = []

    def open_run(fingerprint: str = ONE, name: str = "dog", **options: Any) -> RunFolder:
        runs.append(RunFolder.open(tmp_path, name, fingerprint, {"steps": 9}, **options))
        return runs[-1]

    yield open_run
    for run in runs:
        run.lock.release()


def checkpoint(step: int, measurements: Measurements | None = None) -> Checkpoint:
    """The state after a step, which is a function of that step."""
    optimizer = {"state": {0: {"moment": torch.full((2,), float(step))}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    weights = {"unet.weight": torch.full((3,), float(step))}
    return Checkpoint(step, Saved(weights=weights), optimizer, {}, measurements=measurements)


def step_event(step: int) -> Step:
    return Step(step, 99, loss=1 / step, learning_rate=1e-4, rate=1.0, seconds_left=0.0, memory=0)


# Which run


def test_the_same_run_is_found_again(opened: Any) -> None:
    first = opened()
    first.lock.release()
    again = opened(name="hound")
    assert again.path == first.path
    assert again.name == "dog"
    assert first.path.name == "dog-111111111111"


def test_a_fingerprint_counts_to_its_last_digit(opened: Any) -> None:
    assert opened(ONE).path.name == "dog-111111111111"
    assert opened(OTHER).path.name == "dog-111111111111-2"


def test_a_renamed_folder_is_found(opened: Any, tmp_path: Path) -> None:
    run = opened()
    run.lock.release()
    run.path.rename(tmp_path / "my best")
    again = opened()
    assert again.path == tmp_path / "my best"
    assert [path.name for path in tmp_path.iterdir()] == ["my best"]


def test_of_several_the_last_that_was_begun_goes_on(opened: Any) -> None:
    """Which is what is said when a run is stopped that `never` began."""
    first = opened()
    first.save(checkpoint(9), keep=9)
    second = opened(new=True)
    second.save(checkpoint(2), keep=9)
    for run in (first, second):
        run.lock.release()
    assert opened().path == second.path != first.path
    assert first.steps() == [9]


def test_of_copies_the_one_that_went_further_goes_on(opened: Any, tmp_path: Path) -> None:
    run = opened()
    run.save(checkpoint(1), keep=9)
    run.lock.release()
    shutil.copytree(run.path, tmp_path / "backup")
    again = opened()
    assert again.path == run.path, "a backup stays one"
    again.lock.release()
    further = RunFolder(tmp_path / "backup")
    further.save(checkpoint(2), keep=9)
    assert opened().path == further.path


@pytest.mark.parametrize("new", [False, True])
def test_an_empty_folder_of_a_killed_process_is_used(new: bool, opened: Any, tmp_path: Path) -> None:
    (tmp_path / "dog-111111111111").mkdir()
    (tmp_path / "dog-111111111111" / ".lock").touch()
    assert opened(new=new).path.name == "dog-111111111111"
    assert [path.name for path in tmp_path.iterdir()] == ["dog-111111111111"]


@pytest.mark.parametrize("content", ["notes.txt", "run.json", "step-00000001"])
def test_a_folder_that_holds_something_else_is_left_alone(content: str, opened: Any, tmp_path: Path) -> None:
    (tmp_path / "dog-111111111111" / content).mkdir(parents=True)
    assert opened().path.name == "dog-111111111111-2"


# Whose run


def test_a_run_is_one_process_s_at_a_time(opened: Any) -> None:
    run = opened()
    for name in ("dog", "hound"):
        with pytest.raises(BusyError) as caught:
            opened(name=name)
        assert str(run.path) in caught.value.problem
        assert "is being trained by this process" in caught.value.problem
        assert "resume = never" in caught.value.remedy
    beside = opened(new=True)
    assert beside.path.name == "dog-111111111111-2"
    run.lock.release()
    beside.lock.release()
    assert opened().path == beside.path


def test_a_run_that_could_not_be_made_is_nobody_s(opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk was full; this process lives on, and tries again once there is room."""

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StorageError, match="No space left"):
            opened()
    assert not list(tmp_path.glob("*/*"))
    assert opened().path.name == "dog-111111111111"


def test_a_run_that_another_process_is_making_now_is_its(opened: Any, tmp_path: Path) -> None:
    folder = tmp_path / "dog-111111111111"
    folder.mkdir()
    lock = FolderLock(folder)
    assert lock.acquire()
    with pytest.raises(BusyError):
        opened()
    assert opened(new=True).path.name == "dog-111111111111-2"
    assert not (folder / "run.json").exists()
    lock.release()


def test_two_that_want_a_new_run_get_one_each(opened: Any) -> None:
    assert len({opened(new=True).path for _ in range(3)}) == 3


def test_another_process_of_the_same_run_gets_its_folder_alone(opened: Any) -> None:
    """As the main process passes it on to the others."""
    run = opened()
    copy = pickle.loads(pickle.dumps(run))
    assert copy.path == run.path
    assert not copy.lock.is_held
    assert run.lock.is_held


def test_a_run_that_is_trained_can_not_be_deleted(opened: Any, tmp_path: Path) -> None:
    run = opened()
    run.save(checkpoint(1), keep=9)
    index = RunIndex(tmp_path)
    with pytest.raises(BusyError) as caught:
        index.delete(run.path.name)
    assert f"The run {run.path.name} is being trained by this process" in caught.value.problem
    assert caught.value.remedy == "Stop it first."
    assert run.steps() == [1]
    run.lock.release()
    index.delete(run.path.name)
    assert not list(tmp_path.iterdir())


def test_half_a_deletion_is_finished_and_not_listed(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened()
    run.lock.release()
    index = RunIndex(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if it were killed now
        index.delete(run.path.name)
    [left] = tmp_path.iterdir()
    assert (left / "run.json").is_file()
    assert index.names() == []
    with pytest.raises(SettingsError):
        index.run(run.path.name)
    new = opened()
    assert list(tmp_path.iterdir()) == [new.path]
    assert new.steps() == []


def test_leftovers_of_any_process_leave_a_run_with_its_lock(opened: Any) -> None:
    run = opened()
    run.save(checkpoint(1), keep=9)
    run.lock.release()
    places = [run.path, run.checkpoint_path(1), run.preview_path(1), run.path / "adapters"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / ".tmp-0123abcd-77-0123456789ab").mkdir()
        (place / ".tmp-0123abcd-old").write_bytes(b"half")
    again = opened()
    assert not list(again.path.rglob(".tmp-*"))
    assert again.load(1).step == 1


# Its checkpoints


def test_a_checkpoint_that_is_there_is_not_written_again(opened: Any) -> None:
    run = opened()
    path = run.save(checkpoint(2), keep=9)
    inode = (path / "weights.safetensors").stat().st_ino
    run.save(checkpoint(2, Measurements({2: {"CLIP-I": 0.5}})), keep=9)
    assert (path / "weights.safetensors").stat().st_ino == inode
    assert run.measurements(2).scores == {2: {"CLIP-I": 0.5}}


def test_the_newest_checkpoint_up_to_a_step_may_be_that_of_the_step(opened: Any) -> None:
    run = opened()
    for step in (2, 5):
        run.save(checkpoint(step), keep=9)
    assert [run.newest(limit) for limit in (1, 2, 4, 5, 9)] == [0, 2, 2, 5, 5]


# Its metrics


def losses(run: RunFolder) -> list[int]:
    return [line["step"] for line in read_metrics(run.metrics_path) if "loss" in line]


def train(run: RunFolder, after: int, to: int) -> None:
    reached = max(run.steps(), default=0)
    with RecordedListener(Recorder(), run.metrics_path, after, reached) as recorded:
        for step in range(after + 1, to + 1):
            recorded.report(step_event(step))


def test_a_shorter_run_in_between_cuts_no_metrics(opened: Any) -> None:
    run = opened()
    train(run, 0, 8)
    for step in (4, 8):
        run.save(checkpoint(step), keep=9)
    before = read_metrics(run.metrics_path)[:-1]
    train(run, 4, 6)
    assert read_metrics(run.metrics_path) == [*before, {"step": 6, "state": "done"}]
    assert RunIndex(run.path.parent).summary(run.path.name)["step"] == 8
    assert RunIndex(run.path.parent).summary(run.path.name)["loss"] == 0.125


def test_steps_of_which_nothing_was_saved_are_written_again(opened: Any) -> None:
    run = opened()
    train(run, 0, 8)
    run.save(checkpoint(4), keep=9)
    train(run, 4, 6)
    assert losses(run) == [1, 2, 3, 4, 5, 6]


def test_a_shorter_run_from_the_start_keeps_the_longer_one(opened: Any) -> None:
    """Its own checkpoints are deleted by now."""
    run = opened()
    train(run, 0, 8)
    run.save(checkpoint(8), keep=1)
    train(run, 0, 3)
    assert losses(run) == list(range(1, 9))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_checkpoint_is_never_deleted_for_later_ones(keep: int, opened: Any) -> None:
    """A run that goes on for fewer steps than it was trained saves among its checkpoints; those before may go."""
    run = opened()
    for step in (2, 6, 8):
        run.save(checkpoint(step), keep=9)
    assert run.save(checkpoint(4), keep=keep, best=2).is_dir()
    assert run.steps() == [2, 4, 6, 8]
    run.save(checkpoint(5), keep=keep)
    assert run.steps() == [*([4] if keep == 2 else []), 5, 6, 8]


def test_measured_again_counts_the_last_time(opened: Any) -> None:
    run = opened()
    lines: list[dict[str, Any]] = [{"step": 2, "scores": {"CLIP-I": 0.1}}, {"step": 1, "validation_loss": 3.0}]
    lines += [
        {"step": 2, "scores": {"CLIP-I": 0.2}},
        {"step": 1, "loss": 1.0, "learning_rate": 0.1},
        {"step": 2, "validation_loss": 4.0},
    ]
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(run.metrics_path) == [lines[1], lines[3], lines[2], lines[4]]
