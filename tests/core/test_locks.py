"""One process at a time works in a folder, the next is told who does, and nothing that is killed keeps a lock."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import ROOT, Recorder
from pack.trainer.core.errors import BusyError, CancelledError, StorageError
from pack.trainer.core.locks import FolderLock

HOLDER = (
    "import sys; from pathlib import Path; from trainer.core.locks import FolderLock\n"
    "lock = FolderLock(Path(sys.argv[1])); print(lock.acquire(), flush=True); sys.stdin.read()\n"
)


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_one_at_a_time(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert not first.is_held
    assert first.acquire()
    assert first.is_held
    assert first.acquire(), "it has it"
    assert not second.acquire()
    assert not second.is_held
    second.release()
    assert not second.acquire()
    first.release()
    first.release()
    assert second.acquire()
    assert not first.acquire()
    second.release()


def test_another_folder_is_another_lock(tmp_path: Path) -> None:
    locks = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        locks.append(FolderLock(tmp_path / name))
    assert all(lock.acquire() for lock in locks)
    for lock in locks:
        lock.release()


def test_threads_of_a_process_share_nothing(tmp_path: Path) -> None:
    """As two prompts of one host would."""
    taken: list[bool] = []
    lock = FolderLock(tmp_path)
    assert lock.acquire()
    thread = threading.Thread(target=lambda: taken.append(FolderLock(tmp_path).acquire()))
    thread.start()
    thread.join()
    assert taken == [False]
    lock.release()


def test_the_owner_is_named_and_forgotten(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    before = time.time()
    assert lock.acquire()
    error = FolderLock(tmp_path).refusal("The run is being trained", "Wait.")
    assert isinstance(error, BusyError)
    assert isinstance(error, StorageError)
    assert f"this process, {os.getpid()} (since {time.strftime('%Y-', time.localtime(before))}" in error.problem
    assert error.remedy == "Wait."
    lock.release()
    assert lock.owner is None
    assert "by another program" in lock.refusal("It is used", "").problem


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"process": 1}', '{"process": 1, "host": "h", "since": 0, "x": 1}']
)
def test_a_damaged_owner_is_nobody(content: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(content)
    assert FolderLock(tmp_path).owner is None


def test_an_owner_elsewhere_is_named_with_its_machine(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"process": 7, "host": "render-2", "since": 0.0}))
    assert "by process 7 on render-2 (since 19" in FolderLock(tmp_path).refusal("It is used", "").problem


def test_who_is_dead_is_not_named(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    facts = {"process": process.pid, "host": platform.node(), "since": 0.0}
    (tmp_path / ".lock").write_text(json.dumps(facts))
    assert FolderLock(tmp_path).owner is None


def test_a_folder_that_is_gone_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        with pytest.raises(StorageError) as caught:
            FolderLock(tmp_path / name).acquire()
        assert name in caught.value.problem


@pytest.mark.skipif(os.name == "nt", reason="simulates what flock says")
def test_a_disk_without_locks_locks_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As some network drives are."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    lock = FolderLock(tmp_path)
    assert lock.acquire()
    assert "does not support file locks" in caplog.text
    assert str(tmp_path) in caplog.text
    lock.release()
    assert not lock.is_held


def test_a_lock_leaves_no_file(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    assert lock.acquire()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_moved_keeps_its_lock(tmp_path: Path) -> None:
    """And whatever takes its place is left alone when that is given back."""
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder)
    assert lock.acquire()
    folder.rename(tmp_path / "moved")
    assert not FolderLock(tmp_path / "moved").acquire()
    folder.mkdir()
    other = FolderLock(folder)
    assert other.acquire()
    lock.release()
    assert not FolderLock(folder).acquire()
    assert FolderLock(tmp_path / "moved").acquire()
    other.release()


def test_never_two_at_once(tmp_path: Path) -> None:
    """Threads that take and give back all the time, with a file that comes and goes."""
    inside: list[int] = []
    most = 0
    taken = 0
    counting = threading.Lock()

    def work() -> None:
        nonlocal most, taken
        for _ in range(200):
            lock = FolderLock(tmp_path)
            if lock.acquire():
                with counting:
                    inside.append(1)
                    taken += 1
                    most = max(most, len(inside))
                with counting:
                    inside.pop()
                lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert taken
    assert not list(tmp_path.iterdir())


def after_report(action: Callable[[], None]) -> Recorder:
    """A listener that does something once it is told to wait."""

    class Told(Recorder):
        def report(self, event: object) -> None:
            super().report(event)
            action()

    return Told()


def test_waiting_is_said_once_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pack.trainer.core.locks._PAUSE", 0.001)
    first = FolderLock(tmp_path)
    assert first.acquire()
    listener = after_report(lambda: threading.Timer(0.05, first.release).start())
    lock = FolderLock(tmp_path)
    with lock.waited_for(listener, "These pictures are being generated"):
        assert lock.is_held
        assert not first.is_held
    assert not lock.is_held
    [note] = listener.notes
    assert note.startswith(f"These pictures are being generated by this process, {os.getpid()} (since")
    assert note.endswith("; waiting for it to finish.")


def test_waiting_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pack.trainer.core.locks._PAUSE", 0.001)
    first = FolderLock(tmp_path)
    assert first.acquire()
    with pytest.raises(CancelledError), FolderLock(tmp_path).waited_for(Recorder(stop_after=3), "It is being used"):
        pass
    first.release()


def test_an_error_inside_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), FolderLock(tmp_path).waited_for(Recorder(), "It is used"):
        raise KeyError
    assert FolderLock(tmp_path).acquire()


@pytest.mark.slow  # processes
def test_a_killed_process_keeps_no_lock(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with held_by_another_process(tmp_path) as process:
        assert not lock.acquire()
        assert f"by process {process.pid} (since" in lock.refusal("It is used", "").problem
        process.kill()
        process.wait()
        assert lock.owner is None
        assert lock.acquire()
        lock.release()
