"""Files are written whole or not at all, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack.trainer.core import files
from pack.trainer.core.errors import StorageError
from pack.trainer.core.files import (
    delete_at_once,
    explained_os_errors,
    is_temporary,
    link_or_copy,
    remove_leftovers,
    require_writable,
    require_writable_file,
    write_atomic,
    write_file,
    write_folder,
)

OLD, NEW = b"the old content", b"the new content, which is longer"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raising(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture(params=["disk full while writing", "device lost while flushing", "place denied while renaming"])
def failing_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param.startswith("disk full"):
        monkeypatch.setattr(os, "fsync", raising(errno.ENOSPC))
    elif request.param.startswith("device lost"):
        monkeypatch.setattr(os, "fsync", raising(errno.EIO))
    else:
        for name in ("replace", "rename", "link"):
            monkeypatch.setattr(os, name, raising(errno.EACCES))


def test_write_atomic_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomic(path, OLD)
    write_atomic(path, NEW)
    assert contents(tmp_path) == {os.path.join("a", "b", "file.bin"): NEW}


@pytest.mark.usefixtures("failing_disk")
def test_failed_write_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(OLD)
    with pytest.raises(StorageError) as caught:
        write_atomic(path, NEW)
    assert str(path) in caught.value.problem
    assert caught.value.remedy
    assert contents(tmp_path) == {"file.bin": OLD}


def two_files(content: bytes) -> Callable[[Path], None]:
    """Fills a folder."""

    def write(folder: Path) -> None:
        (folder / "one.bin").write_bytes(content)
        (folder / "inner").mkdir()
        (folder / "inner" / "two.bin").write_bytes(content)

    return write


WRITERS: dict[str, Callable[[Path, bytes], Path]] = {
    "write_atomic": lambda path, content: write_atomic(path, content, replace=False),
    "write_file": lambda path, content: write_file(path, lambda place: place.write_bytes(content), replace=False),
    "write_folder": lambda path, content: write_folder(path, two_files(content)),
}


@pytest.mark.usefixtures("failing_disk")
@pytest.mark.parametrize("writer", WRITERS)
def test_failed_writing_leaves_no_trace(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with pytest.raises(StorageError) as caught:
        WRITERS[writer](path, NEW)
    assert str(path) in caught.value.problem
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes")
def test_write_beyond_the_systems_limit_leaves_no_trace(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "file.bin"
    path.write_bytes(OLD)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError):
            write_atomic(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(tmp_path) == {"file.bin": OLD}


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("write", [write_file, write_folder])
def test_interrupted_writing_leaves_the_old_one(write: Any, tmp_path: Path, error: BaseException) -> None:
    path = write_atomic(tmp_path / "file.bin", OLD)

    def fail(place: Path) -> None:
        (place / "inner" if place.is_dir() else place).write_bytes(NEW)
        raise error

    with pytest.raises(type(error)):
        write(path, fail)
    assert contents(tmp_path) == {"file.bin": OLD}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_appears_whole(replace: bool, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"

    def write(place: Path) -> None:
        assert not path.exists() or path.read_bytes() == OLD
        place.write_bytes(NEW[:5])
        (place.parent / ".tmpAbCdEf").write_bytes(NEW)  # as safetensors does while it writes
        place.write_bytes(NEW)

    assert write_file(path, write, replace=replace) == path
    assert contents(tmp_path) == {os.path.join("deep", "file.bin"): NEW}
    path.write_bytes(OLD)
    second = write_file(path, write, replace=replace)
    assert second == (path if replace else path.with_name("file-2.bin"))
    assert second.read_bytes() == NEW
    assert replace or path.read_bytes() == OLD
    assert len(list(path.parent.iterdir())) == 1 + (not replace)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    assert write_folder(path, two_files(OLD)) == path
    assert contents(path) == {"one.bin": OLD, os.path.join("inner", "two.bin"): OLD}
    assert [entry.name for entry in path.parent.iterdir()] == ["folder"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_any_bytes_come_back(tmp_path: Path, content: bytes) -> None:
    write_atomic(tmp_path / "file.bin", content)
    assert contents(tmp_path) == {"file.bin": content}


def test_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    versions = [bytes([number]) * (200_000 + 50_000 * number) for number in range(3)]
    write_atomic(path, versions[0])
    done = threading.Event()

    def write() -> None:
        for number in range(40):
            write_atomic(path, versions[number % 3])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = {path.read_bytes()}
    while not done.is_set():
        seen.add(path.read_bytes())
    writer.join()
    assert seen <= set(versions)


@pytest.mark.skipif(os.name == "nt", reason="needs kill -9")
def test_killed_writer_leaves_a_whole_file_and_removable_rest(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    code = (
        "import sys; from pathlib import Path; from trainer.core.files import write_atomic\n"
        "path = Path(sys.argv[1])\n"
        "for number in range(10**6):\n"
        "    write_atomic(path, bytes([number % 7]) * 3_000_000); print(flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    content = path.read_bytes()
    assert len(content) == 3_000_000
    assert len(set(content)) == 1
    remove_leftovers(tmp_path)
    assert contents(tmp_path) == {"file.bin": content}


def test_what_an_interrupt_leaves_is_removed_by_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C, while the first one's temporary folder is being removed."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state").write_bytes(NEW)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            delete_at_once(tmp_path / "run")
    assert list(tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 250 + ".bin", "犬" * 80 + ".bin"], ids=["ascii", "three bytes a letter"])
def test_longest_names_that_a_file_system_takes(tmp_path: Path, name: str) -> None:
    assert len(os.fsencode(name)) <= 255
    write_atomic(tmp_path / name, NEW)
    assert contents(tmp_path) == {name: NEW}


def aged(path: Path, hours: float) -> Path:
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))
    return path


def leftover(folder: Path, process: int | None = None, host: str | None = None, *, inner: str | None = None) -> Path:
    """A temporary file, or a folder with a file, as another process leaves it when it is killed."""
    parts: list[str] = []

    def write(place: Path) -> None:
        parts.extend(place.parent.name.removeprefix(".tmp-").split("-"))
        place.touch()

    write_file(folder / "x", write)
    (folder / "x").unlink()
    path = folder / f".tmp-{host or parts[0]}-{process or parts[1]}-{os.urandom(6).hex()}"
    if inner is None:
        path.write_bytes(NEW)
    else:
        path.mkdir()
        (path / inner).write_bytes(NEW)
    return path


@pytest.fixture(scope="module")
def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead_are_removed_and_nothing_else(dead_process: int, tmp_path: Path) -> None:
    kept = [
        leftover(tmp_path, os.getppid()),  # it lives
        leftover(tmp_path, dead_process, host="0123abcd"),  # it may live on another machine
        tmp_path / "tmp-notes.txt",
        tmp_path / ".tmpAbCdEf",  # another program's
        tmp_path / ".tmp-0123abcd-file.bin",  # an older version's, which may still run
    ]
    for path in kept[2:]:
        path.write_bytes(OLD)
    gone = [
        leftover(tmp_path, dead_process),
        leftover(tmp_path, dead_process, inner="content"),
        leftover(tmp_path),  # of a process that had this one's number
        aged(leftover(tmp_path, os.getppid()), 25),  # that number is another process's by now
        aged(leftover(tmp_path, dead_process, host="0123abcd", inner="content"), 25),
        aged(shutil.copy(kept[-1], tmp_path / ".tmp-4567abcd-file.bin"), 25),
    ]
    remove_leftovers(tmp_path)
    assert [path.name for path in gone if path.exists()] == []
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in kept}
    remove_leftovers(tmp_path / "missing")


def test_whoever_has_the_lock_removes_all_leftovers(dead_process: int, tmp_path: Path) -> None:
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    left = [
        leftover(tmp_path / "deep", os.getppid()),
        leftover(tmp_path / "deep" / "deeper", dead_process, host="0123abcd", inner="content"),
    ]
    remove_leftovers(tmp_path, recursive=True)
    assert all(path.exists() for path in left)
    remove_leftovers(tmp_path, sole_writer=True)
    assert all(path.exists() for path in left)
    remove_leftovers(tmp_path, recursive=True, sole_writer=True)
    assert not any(path.exists() for path in left)


def test_what_this_process_writes_is_no_leftover(tmp_path: Path) -> None:
    def write(place: Path) -> None:
        remove_leftovers(tmp_path)
        remove_leftovers(tmp_path, recursive=True, sole_writer=True)
        write_atomic(tmp_path / "other.bin", OLD)
        require_writable(tmp_path, 1)
        place.write_bytes(NEW)

    write_file(tmp_path / "file.bin", write)
    assert contents(tmp_path) == {"file.bin": NEW, "other.bin": OLD}


@pytest.mark.parametrize(
    "clean_up", [lambda folder: require_writable(folder, 1), lambda folder: write_atomic_file(folder)]
)
def test_leftovers_leave_with_the_next_work(
    clean_up: Callable[[Path], None], dead_process: int, tmp_path: Path
) -> None:
    """Of a checkpoint they are gigabytes, among the models of a program."""
    path = leftover(tmp_path, dead_process, inner="content")
    assert is_temporary(path)
    assert not is_temporary(tmp_path / "tmp")
    clean_up(tmp_path)
    assert not path.exists()


def write_atomic_file(folder: Path) -> None:
    write_file(folder / "file.bin", lambda place: place.write_bytes(NEW))


@pytest.mark.parametrize("writer", WRITERS)
def test_leftovers_are_what_the_writers_leave(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies before renaming leaves names that `remove_leftovers` knows and no program lists."""
    for name in ("replace", "rename", "link"):
        monkeypatch.setattr(os, name, raising(errno.EIO))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(StorageError):
        WRITERS[writer](tmp_path / "file.bin", NEW)
    [left] = tmp_path.iterdir()
    assert is_temporary(left)
    assert left.suffix == ""
    assert not list(left.glob("*.safetensors"))
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


# Names


@pytest.mark.parametrize(
    ("taken", "wanted", "given"),
    [
        ([], "dog.safetensors", "dog.safetensors"),
        (["dog.safetensors"], "dog.safetensors", "dog-2.safetensors"),
        (["dog.safetensors", "dog-2.safetensors"], "dog.safetensors", "dog-3.safetensors"),
        (["dog.safetensors", "dog-3.safetensors"], "dog.safetensors", "dog-2.safetensors"),
        (["dog.v1.safetensors"], "dog.v1.safetensors", "dog.v1-2.safetensors"),
        (["dog [1].safetensors"], "dog [1].safetensors", "dog [1]-2.safetensors"),
    ],
)
@pytest.mark.parametrize("as_folder", [False, True], ids=["by a file", "by a folder"])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_first_free_name_is_taken(
    writer: str, as_folder: bool, tmp_path: Path, taken: list[str], wanted: str, given: str
) -> None:
    for name in taken:
        (tmp_path / name).mkdir() if as_folder else (tmp_path / name).write_bytes(OLD)
    assert WRITERS[writer](tmp_path / wanted, NEW) == tmp_path / given
    assert {path.name for path in tmp_path.iterdir()} == {*taken, given}
    assert all(not (tmp_path / name).is_file() or (tmp_path / name).read_bytes() == OLD for name in taken)


@pytest.mark.parametrize("without_links", [False, True])
def test_a_name_that_is_taken_meanwhile_is_left_alone(
    without_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another program, between the look and the move; also on a file system that knows no hard links."""
    if without_links:
        monkeypatch.setattr(os, "link", raising(errno.EPERM))
    look = os.path.lexists

    def look_and_take(path: Any) -> bool:
        is_there = look(path)
        if not is_there and str(path).endswith(("dog.bin", "dog-2.bin")):
            Path(path).write_bytes(OLD)
        return is_there

    monkeypatch.setattr(os.path, "lexists", look_and_take)
    assert write_file(tmp_path / "dog.bin", lambda place: place.write_bytes(NEW), replace=False).name == "dog-3.bin"
    assert contents(tmp_path) == {"dog.bin": OLD, "dog-2.bin": OLD, "dog-3.bin": NEW}
    assert len(list(tmp_path.iterdir())) == 3


def test_many_at_once_get_a_name_each(tmp_path: Path) -> None:
    def write(number: int) -> Path:
        return write_atomic(tmp_path / "dog.bin", bytes([number]), replace=False)

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(write, range(24)))
    assert sorted(path.read_bytes()[0] for path in set(paths)) == list(range(24))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}


def test_a_second_name_or_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(NEW)
    link_or_copy(tmp_path / "file", tmp_path / "linked")
    monkeypatch.setattr(os, "link", raising(errno.EPERM))
    link_or_copy(tmp_path / "file", tmp_path / "copied")
    (tmp_path / "file").unlink()
    assert contents(tmp_path) == {"linked": NEW, "copied": NEW}


def test_a_folder_is_deleted_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "folder", two_files(OLD))
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", raising(errno.EACCES))
        with pytest.raises(PermissionError):
            delete_at_once(folder)
    assert len(contents(folder)) == 2
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if it were killed now
        delete_at_once(folder)
    assert not folder.exists()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", WRITERS)
def test_a_name_that_is_too_long_is_named(writer: str, tmp_path: Path) -> None:
    longest = tmp_path / ("n" * 243 + ".safetensors")  # 255 bytes, the most that usual disks take
    longest.touch()
    calls: list[Callable[[], object]] = [
        lambda: WRITERS[writer](longest, NEW),  # -2 has no room
        lambda: require_writable_file(tmp_path / ("n" * 300), 1),
        lambda: WRITERS[writer](tmp_path / ("n" * 300), NEW),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="too long"):
            call()


@pytest.mark.parametrize("name", ["a:b.png", "a?.png", "a|b", "x<y", 'say "hi"', "tab\t", "ends with a dot.", "space "])
def test_names_that_windows_cant_have_are_refused_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NTFS a colon would write into a hidden stream of another file."""
    require_writable_file(tmp_path / name, 1)
    monkeypatch.setattr(files, "_IS_WINDOWS", True)
    with pytest.raises(StorageError, match="Windows does not allow a file"):
        require_writable_file(tmp_path / name, 1)
    with pytest.raises(StorageError, match="Windows does not allow a file"):
        write_file(tmp_path / name, Path.touch, replace=False)
    require_writable_file(tmp_path / "größe 犬 (1).safetensors", 1)


def test_require_writable_makes_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    require_writable(folder, 1)
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_require_writable_finds_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, used=10**12 - 99, free=99))
    with pytest.raises(StorageError, match="No space left") as caught:
        require_writable(tmp_path, 200_000_000)
    assert str(tmp_path) in caught.value.problem
    assert "200 MB" in caught.value.problem
    assert "Free some space" in caught.value.remedy


@pytest.mark.parametrize("inner", ["", "deeper/still"], ids=["the folder is a file", "a parent is a file"])
def test_require_writable_finds_a_file_in_the_way(tmp_path: Path, inner: str) -> None:
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(StorageError) as caught:
        require_writable(tmp_path / "file" / inner, 1)
    assert str(tmp_path / "file") in caught.value.problem
    assert any(words in caught.value.problem.lower() for words in ("not a folder", "not a directory", "is a file"))
    assert (tmp_path / "file").read_bytes() == OLD


@pytest.mark.parametrize(
    ("number", "problem", "remedy"),
    [
        (errno.ENOSPC, "No space left", "Free some space"),
        (errno.EDQUOT, "No space left", "Free some space"),
        (errno.EACCES, "can't be written", "another output folder"),
        (errno.EPERM, "can't be written", "another output folder"),
        (errno.EROFS, "can't be written", "another output folder"),
        (errno.ENAMETOOLONG, "too long", "shorter name"),
        (errno.ENOENT, "can't be used", "path"),
        (errno.EIO, "can't be used", "path"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_os_errors_are_explained(tmp_path: Path, number: int, problem: str, remedy: str) -> None:
    with pytest.raises(StorageError) as caught, explained_os_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in caught.value.problem
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy
