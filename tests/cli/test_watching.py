"""A command that another program runs: its event file, and the file that stops it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import HANGS, ROOT
from pack.trainer.cli.watching import Watched
from pack.trainer.core.errors import CancelledError, SettingsError, StorageError, suggest
from pack.trainer.core.events import Note, Phase, Preview, RunOpened, Step, Validation
from pack.trainer.training.runs.folder import RunFolder
from shell import Shell


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines without their times."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    times = [line.pop("at") for line in lines]
    assert times == sorted(times)
    return lines


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def words(tiny_checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path) -> list[str]:
    settings = {"base": tiny_checkpoint, "images": picture_folder(), "resolution": 64, "rank": 2, "name": "dog"}
    settings |= {"targets": "attention", "device": "cpu", "output-dir": tmp_path / "out", "steps": 2}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return ["train", *flags, "--events", str(tmp_path / "näher" / "events.jsonl")]


# The file


def test_each_event_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    run = tmp_path / "hünd"
    with Watched(path) as watched:
        watched.report(RunOpened(run, 3, 5))
        watched.report(Phase("class pictures", 0, 2))
        watched.report(Note(f"Give {suggest('rank', 4)}.", warning=True, picture="a.png"))
        watched.report(Step(5, 5, 0.25, 1e-4, 2.0, 7.5, 1024))
        watched.report(Preview(5, [(run / "p.png", "sks dog")], {"clip_t": 0.5}))
        watched.report(Validation(5, 0.125))
        assert len(lines_of(path)) == 6, "each is there at once"
    assert lines_of(path) == [
        {"event": "run", "path": str(run), "step": 3, "steps": 5},
        {"event": "phase", "name": "class pictures", "done": 0, "total": 2},
        {"event": "note", "text": "Give ⟦rank=4⟧.", "warning": True, "picture": "a.png"},
        {
            "event": "step",
            "step": 5,
            "steps": 5,
            "loss": 0.25,
            "learning_rate": 1e-4,
            "rate": 2.0,
            "seconds_left": 7.5,
            "memory": 1024,
        },
        {
            "event": "preview",
            "step": 5,
            "pictures": [{"file": str(run / "p.png"), "prompt": "sks dog"}],
            "scores": {"clip_t": 0.5},
        },
        {"event": "validation", "step": 5, "loss": 0.125},
        {"event": "end", "state": "done"},
    ]


def test_progress_that_comes_fast_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line each quarter of a second is enough; the first and the last of a phase, and the last step, always come."""
    clock = iter([100.0, 100.1, 100.3, 200.0, 200.1, 200.4])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    path = tmp_path / "events.jsonl"
    with Watched(path) as watched:
        for done in range(5):
            watched.report(Phase("encoding", done, 4))
        for step in range(1, 5):
            watched.report(Step(step, 4, 0.5, 1e-4, 0.0, 0.0, 0))
    shown = [(line["event"], line.get("done", line.get("step"))) for line in lines_of(path)]
    phases = [("phase", done) for done in (0, 1, 3, 4)]
    assert shown == [*phases, ("step", 1), ("step", 3), ("step", 4), ("end", None)]


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (CancelledError(1, 2), {"state": "stopped"}),
        (KeyboardInterrupt(), {"state": "stopped"}),
        (
            SettingsError("rank is 0.", f"Give {suggest('rank', 4)}."),
            {"state": "failed", "problem": "rank is 0.", "remedy": "Give ⟦rank=4⟧."},
        ),
        (ValueError("odd"), {"state": "failed", "problem": "ValueError: odd", "remedy": ""}),
    ],
)
def test_the_end_says_why(error: BaseException, end: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with pytest.raises(type(error)), Watched(path):
        raise error
    assert lines_of(path) == [{"event": "end"} | end]


def test_a_file_that_can_not_be_written_is_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        Watched(tmp_path / "file" / "events.jsonl")


def test_of_several_processes_the_first_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("the first one's")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    with Watched(path) as watched:
        watched.report(Note("hello"))
    assert path.read_text() == "the first one's"


# The commands


def test_a_setting_that_is_refused_is_an_end(run: Shell, words: list[str], tmp_path: Path) -> None:
    assert run(*words, "--steps", "-1") == 1
    [end] = lines_of(tmp_path / "näher" / "events.jsonl")
    assert end["state"] == "failed"
    assert "steps" in end["problem"]


@pytest.mark.slow
def test_a_training_is_followed_stopped_and_resumed(run: Shell, words: list[str], tmp_path: Path) -> None:
    events = tmp_path / "näher" / "events.jsonl"
    stop = tmp_path / "stop"
    command = [sys.executable, "-m", "trainer", *words, "--steps", "1000000", "--stop-file", str(stop)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + HANGS
        while not (events.exists() and '"event": "step"' in events.read_text(encoding="utf-8")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        stop.touch()
        _, errors = process.communicate(timeout=HANGS)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    *_, end = lines = lines_of(events)
    assert end == {"event": "end", "state": "stopped"}
    [opened] = [line for line in lines if line["event"] == "run"]
    saved = max(RunFolder(Path(opened["path"])).steps())
    stop.unlink()
    assert run(*words, "--steps", str(saved + 2), "--stop-file", str(stop)) == 0
    *_, end = lines = lines_of(events)
    assert end == {"event": "end", "state": "done"}
    [resumed] = [line for line in lines if line["event"] == "run"]
    assert (resumed["path"], resumed["step"], resumed["steps"]) == (opened["path"], saved, saved + 2)
