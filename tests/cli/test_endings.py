"""However a training ends, what was done is kept and what is said then is true; and two at once are told of each other.

Real processes of the command line, on the smallest real model.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import HANGS, ROOT
from pack.trainer.cli.terminal import Terminal
from pack.trainer.training.runs.folder import RunFolder
from pack.trainer.training.runs.metrics import read_metrics
from shell import Shell

LONG = 1_000_000  # steps that no test waits for
MADE = ("dog.json", "dog.metadata.json", "dog.safetensors")  # the adapter, and what galleries read of it
pytestmark = pytest.mark.usefixtures("heard_signals")
needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to one process")


class Training:
    """A training in a process of its own."""

    def __init__(self, folder: Path, words: list[str], **options: Any) -> None:
        command = [sys.executable, "-m", "trainer", "train", *words, "--output-dir", str(folder)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        self.folder = folder
        self.process = subprocess.Popen(command, cwd=ROOT, **options)

    @property
    def run(self) -> Path:
        [run] = (self.folder / "runs").iterdir()
        return run

    @property
    def steps(self) -> list[int]:
        """Those that are written down."""
        metrics = list(self.folder.glob("runs/*/metrics.jsonl"))
        return [line["step"] for path in metrics for line in read_metrics(path) if "loss" in line]

    def wait_for_steps(self, count: int) -> None:
        deadline = time.monotonic() + HANGS
        while len(self.steps) < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Exit status, and what was said last."""
        _, errors = self.process.communicate(timeout=HANGS)
        return self.process.returncode, (errors or b"").decode()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def words(tiny_checkpoint: Path, picture_folder: Callable[..., Path]) -> list[str]:
    images = picture_folder()
    settings = {"base": tiny_checkpoint, "images": images, "resolution": 64, "rank": 2, "targets": "attention"}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [*flags, "--device", "cpu", "--name", "dog", "--checkpoint-every", "0"]


@pytest.fixture
def start(words: list[str], tmp_path: Path) -> Iterator[Callable[..., Training]]:
    begun: list[Training] = []

    def begin(*more: object, folder: str = "out", **options: Any) -> Training:
        begun.append(Training(tmp_path / folder, [*words, *map(str, more)], **options))
        return begun[-1]

    yield begin
    for training in begun:
        training.process.kill()
        training.process.communicate()


def assert_everything_is_kept(training: Training) -> int:
    """The newest state is that of the last step that was done; returns that."""
    run = RunFolder(training.run)
    step = max(run.steps())
    assert training.steps == list(range(1, step + 1))
    assert run.load(step).step == step
    assert read_metrics(run.metrics_path)[-1] == {"step": step, "state": "stopped"}
    return step


# Signals


@needs_signals
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_training_with_its_state(name: str, start: Callable[..., Training]) -> None:
    training = start("--steps", LONG)
    training.wait_for_steps(3)
    training.process.send_signal(getattr(signal, name))
    status, errors = training.end()
    assert status == 130, errors
    step = assert_everything_is_kept(training)
    assert f"step {step} is saved" in errors
    assert errors.splitlines()[-1] == "Stopped. Run the same command again to continue."


@needs_signals
@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_a_training_with_its_state(start: Callable[..., Training]) -> None:
    """The system sends SIGHUP, and nothing can be written to the terminal any more."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    training = start("--steps", LONG, **terminal, start_new_session=True, preexec_fn=take_terminal)
    os.close(theirs)
    close = threading.Event()
    window = threading.Thread(target=_show_until, args=(close, ours))
    window.start()
    training.wait_for_steps(3)
    close.set()
    window.join()
    status, _ = training.end()
    assert_everything_is_kept(training)
    assert status == 130


def _show_until(closed: threading.Event, terminal: int) -> None:
    """What a terminal's window does: it reads what is written, until it is closed."""
    while not closed.is_set():
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)


@needs_signals
@pytest.mark.slow
def test_what_nohup_ignores_stays_ignored(start: Callable[..., Training]) -> None:
    training = start("--steps", LONG, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    training.wait_for_steps(2)
    training.process.send_signal(signal.SIGHUP)
    training.wait_for_steps(len(training.steps) + 3)
    training.process.send_signal(signal.SIGTERM)
    assert training.end()[0] == 130
    assert_everything_is_kept(training)


@needs_signals
@pytest.mark.slow
def test_a_second_signal_loses_no_saved_state(start: Callable[..., Training]) -> None:
    training = start("--steps", LONG, "--checkpoint-every", 1)
    training.wait_for_steps(3)
    training.process.send_signal(signal.SIGINT)
    training.process.send_signal(signal.SIGTERM)
    assert training.end()[0] in (130, -signal.SIGINT, -signal.SIGTERM)
    run = RunFolder(training.run)
    step = max(run.steps())
    assert step >= 2
    assert run.load(step).step == step


@needs_signals
@pytest.mark.slow
def test_after_resume_never_what_is_said_is_true(start: Callable[..., Training], run: Shell, words: list[str]) -> None:
    """The same command would begin anew; the one that is named goes on, with the run that was stopped last."""
    stopped = []
    for number in (1, 2):
        training = start("--steps", LONG, "--resume", "never")
        deadline = time.monotonic() + HANGS
        while len(list(training.folder.glob("runs/*/metrics.jsonl"))) < number or _last_run_steps(training.folder) < 2:
            assert training.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        training.process.send_signal(signal.SIGINT)
        status, errors = training.end()
        assert status == 130
        assert "the run can be resumed, with --resume auto: " in errors
        expected = "Stopped. To continue, run the same command with --resume auto; with --resume never it starts over."
        assert errors.splitlines()[-1] == expected
        stopped.append(_last_run(training.folder))
    assert len({path.name for path in stopped}) == 2
    newest = max(RunFolder(stopped[-1]).steps())
    output = str(stopped[-1].parent.parent)
    assert run("train", *words, "--output-dir", output, "--steps", newest + 1, "--resume", "auto") == 0
    assert f"Resuming from step {newest}: {stopped[-1]}" in run.errors


def _last_run(folder: Path) -> Path:
    return max((folder / "runs").iterdir(), key=lambda path: RunFolder(path).started_at)


def _last_run_steps(folder: Path) -> int:
    return sum("loss" in line for line in read_metrics(_last_run(folder) / "metrics.jsonl"))


# Two at once


@pytest.mark.slow
def test_the_second_of_two_is_told_at_once(start: Callable[..., Training], run: Shell, words: list[str]) -> None:
    """By whom, and what to do; both remedies work."""
    first = start("--steps", LONG, "--checkpoint-every", 1)
    first.wait_for_steps(2)
    again = ["train", *words, "--output-dir", str(first.folder)]
    for steps in (LONG, 1):
        assert run(*again, "--steps", steps) == 1
        assert f"is being trained by process {first.process.pid} (since 2" in run.errors
        assert str(first.run) in run.errors
        assert "--resume never" in run.errors
        assert "loss" not in run.errors, "before any work"
    assert run(*again, "--steps", 1, "--resume", "never") == 0
    first.process.kill()
    first.process.wait()
    [killed] = [path for path in (first.folder / "runs").iterdir() if max(RunFolder(path).steps(), default=0) > 1]
    assert sorted(path.name for path in first.folder.iterdir()) == [*MADE, "runs"]
    newest = max(RunFolder(killed).steps())
    record = json.loads((killed / "run.json").read_text())
    record["started_at"] = time.time()  # the newest run goes on, which is that of --resume never
    (killed / "run.json").write_text(json.dumps(record))
    assert run(*again, "--steps", newest + 1) == 0
    assert f"Resuming from step {newest}" in run.errors
    lines = read_metrics(killed / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, newest + 2))
    assert not list(killed.rglob(".tmp-*"))
    assert not (killed / ".lock").exists()


@pytest.mark.slow
def test_two_that_start_together_are_one_run(start: Callable[..., Training]) -> None:
    both = [start("--steps", 12, "--checkpoint-every", 1) for _ in range(2)]
    ends = [training.end() for training in both]
    statuses = sorted(status for status, _ in ends)
    assert statuses in ([0, 1], [0, 0]), ends  # the second may begin when the first is done
    for status, errors in ends:
        assert "Traceback" not in errors
        assert status == 0 or "is being trained by" in errors
    assert both[0].steps == list(range(1, 13))
    assert read_metrics(both[0].run / "metrics.jsonl")[-1]["state"] == "done"
    assert [path.name for path in both[0].folder.glob("*.safetensors")] == ["dog.safetensors"]


# Leftovers

KILLED_WHILE_EXPORTING = """
import os, pathlib, signal, sys
import trainer.core.files as files
place = files._put_in_place
def die(temporary, path, replace):
    if path.parent == pathlib.Path(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return place(temporary, path, replace)
files._put_in_place = die
from trainer.__main__ import main
main(sys.argv[2:])
"""


@needs_signals
@pytest.mark.slow
def test_a_killed_export_leaves_nothing_for_good(words: list[str], run: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = ["train", *words, "--steps", "1", "--output-dir", str(folder)]
    code = [sys.executable, "-c", KILLED_WHILE_EXPORTING, str(folder), *command]
    assert subprocess.run(code, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    [left] = [path for path in folder.iterdir() if path.name != "runs"]
    assert left.name.startswith(".tmp-")
    assert not list(left.rglob("*.safetensors")), "no program lists it as a model"
    assert run(*command) == 0
    assert "already finished" in run.errors
    assert sorted(path.name for path in folder.iterdir()) == [*MADE, "runs"]


# The terminal itself


@needs_signals
@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_one_signal_asks_and_a_second_ends(first: str) -> None:
    """A terminal that is closed may send its signal twice."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
    with Terminal() as terminal:
        assert not terminal.should_stop()
        signal.raise_signal(getattr(signal, first))
        assert terminal.should_stop()
        signal.raise_signal(signal.SIGHUP)
        for second in (signal.SIGINT, signal.SIGTERM):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(second)
    assert {name: signal.getsignal(getattr(signal, name)) for name in before} == before


@needs_signals
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_is_ignored_stays_ignored(name: str) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Terminal() as terminal:
            signal.raise_signal(number)
            assert not terminal.should_stop()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("event", [2, 5, 6])
def test_windows_waits_until_the_work_is_saved(event: int) -> None:
    """What Windows calls when a console is closed, in a thread of its own; the program ends when that returns."""
    returned: list[int] = []
    with Terminal() as terminal:
        assert terminal._on_console_event(0) == 0  # Ctrl-C, which Python handles
        assert not terminal.should_stop()
        thread = threading.Thread(target=lambda: returned.append(terminal._on_console_event(event)))
        thread.start()
        deadline = time.monotonic() + HANGS
        while not terminal.should_stop():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert not returned
    thread.join(HANGS)
    assert returned == [1]


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        ("train", [], "Stopped. Run the same command again to continue."),
        ("train", ["--resume", "never"], "with --resume auto; with --resume never it starts over."),
        ("generate", ["--prompt", "a dog"], "Stopped."),
    ],
)
def test_what_is_said_after_a_stop(
    command: str, more: list[str], said: str, run: Shell, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pack.trainer.cli.train.open_base_model", stop)
    base = words[:2] if command == "generate" else words
    assert run(command, *base, *more) == 130
    assert run.errors.splitlines()[-1].endswith(said)
