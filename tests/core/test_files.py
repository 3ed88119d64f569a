"""Files are written whole or not at all, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
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
    explained_os_errors,
    folder_written_atomically,
    free_path,
    remove_leftovers,
    require_writable,
    require_writable_file,
    write_atomic,
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
        monkeypatch.setattr(os, "replace", raising(errno.EACCES))


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


@pytest.mark.usefixtures("failing_disk")
def test_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "step-00000007"
    path.mkdir()
    (path / "one.bin").write_bytes(OLD)
    (path / "two.bin").write_bytes(OLD)
    with pytest.raises(StorageError) as caught, folder_written_atomically(path) as folder:  # noqa: PT012
        (folder / "one.bin").write_bytes(NEW)
        (folder / "two.bin").write_bytes(NEW)
    assert str(path) in caught.value.problem
    assert contents(tmp_path) == {os.path.join(path.name, name): OLD for name in ("one.bin", "two.bin")}


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
def test_interrupted_folder_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "folder"
    with folder_written_atomically(path) as folder:
        (folder / "file.bin").write_bytes(OLD)
    with pytest.raises(type(error)), folder_written_atomically(path) as folder:  # noqa: PT012
        (folder / "file.bin").write_bytes(NEW)
        raise error
    assert contents(tmp_path) == {os.path.join("folder", "file.bin"): OLD}


def test_folder_appears_whole_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    for content in (OLD, NEW):
        with folder_written_atomically(path) as folder:
            (folder / "file.bin").write_bytes(content)
            assert not path.exists() or contents(path) == {"file.bin": OLD}
        assert contents(tmp_path) == {os.path.join("deep", "folder", "file.bin"): content}


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@pytest.mark.parametrize("name", ["x" * 250 + ".bin", "犬" * 80 + ".bin"], ids=["ascii", "three bytes a letter"])
def test_longest_names_that_a_file_system_takes(tmp_path: Path, name: str) -> None:
    assert len(os.fsencode(name)) <= 255
    write_atomic(tmp_path / name, NEW)
    assert contents(tmp_path) == {name: NEW}


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(OLD)
    (tmp_path / "tmp-notes.txt").write_bytes(OLD)
    (tmp_path / ".tmp-0123abcd-file.bin").write_bytes(NEW)
    (tmp_path / ".tmp-0123abcd-folder" / "inner").mkdir(parents=True)
    (tmp_path / ".tmp-0123abcd-folder" / "inner" / "file.bin").write_bytes(NEW)
    remove_leftovers(tmp_path)
    assert contents(tmp_path) == {"file.bin": OLD, "tmp-notes.txt": OLD}
    assert not list(tmp_path.glob(".tmp-*"))
    remove_leftovers(tmp_path / "missing")


def test_leftovers_are_what_the_writers_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies before renaming leaves names that `remove_leftovers` knows and no program lists."""
    monkeypatch.setattr(os, "replace", raising(errno.EIO))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(StorageError):
        write_atomic(tmp_path / "file.bin", NEW)
    with pytest.raises(StorageError), folder_written_atomically(tmp_path / "folder"):
        pass
    assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.glob("*.bin"))
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


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
def test_free_path(tmp_path: Path, taken: list[str], wanted: str, given: str) -> None:
    for name in taken:
        (tmp_path / name).touch()
    assert free_path(tmp_path / wanted) == tmp_path / given


def test_free_names_are_found_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    assert free_path(tmp_path / "a.safetensors").name == "a-2.safetensors"
    longest = tmp_path / ("n" * 243 + ".safetensors")  # 255 bytes, the most that usual disks take
    longest.touch()
    calls: list[Callable[[], object]] = [
        lambda: free_path(longest),
        lambda: require_writable_file(tmp_path / ("n" * 300), 1),
        lambda: free_path(tmp_path / ("n" * 300)),
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
    with pytest.raises(StorageError, match="Windows allows no file"):
        require_writable_file(tmp_path / name, 1)
    with pytest.raises(StorageError, match="Windows allows no file"):
        free_path(tmp_path / name)
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
