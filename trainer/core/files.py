"""Files and folders that appear whole or not at all: temporary name, fsync, atomic rename."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import os
import platform
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import StorageError, TrainerError

_TEMPORARY = ".tmp-"
_TEMPORARY_NAME = re.compile(
    rf"{re.escape(_TEMPORARY)}(?P<host>[0-9a-f]{{8}})-(?P<process>\d+)-[0-9a-f]{{12}}", re.ASCII
)
_ABANDONED_AFTER = 86_400.0  # seconds
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds
_SHOWN_NAME = 60  # characters of an overlong name that a message shows
_IS_WINDOWS = os.name == "nt"
_NOT_ON_WINDOWS = re.compile(r'[<>:"|?*\x00-\x1f]|[ .]$')
_WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems say that have none
_being_written: set[str] = set()  # temporary names of this process


@contextlib.contextmanager
def explained_os_errors(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn operating-system errors about `path` into `StorageError`s with a remedy.

    Args:
        path: Named in the error.
        needed_bytes: Named in the error if the disk is full; 0: unknown.

    Raises:
        StorageError: The disk is full, the folder is read-only, a part of the path is not a folder, the name is too
            long or not allowed, the file is open in another program, or any other `OSError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            size = f" (about {needed_bytes / 1e6:.0f} MB are needed)" if needed_bytes else ""
            raise StorageError(
                f"No space left on the disk that holds {path}{size}.",
                "Free some space or choose another output folder; everything already written is intact.",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"{path} can't be written: {error.strerror}.",
                "Choose another output folder, make this one writable, or close the program that has the file open.",
            ) from error
        if error.errno == errno.EFBIG:
            raise StorageError(
                f"{path} is too large for the disk's file system.", "Choose an output folder on another disk."
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            longest = max(path.parts, key=len)
            shown = str(path) if len(longest) <= _SHOWN_NAME else f"{longest[:_SHOWN_NAME]}…"
            sizes = f"{len(os.fsencode(longest))} bytes, in a path of {len(os.fsencode(path))}"
            raise StorageError(
                f"The name {shown} is too long for this system ({sizes}).", "Choose a shorter name."
            ) from error
        raise StorageError(
            f"{path} can't be used: {error.strerror or error}.", "Check the path and that its folders exist."
        ) from error


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle of a folder that can be flushed
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A name beside `path` for what is not whole yet; whatever bears it is removed after the block.

    The name tells which process writes, so that `remove_leftovers` knows what a killed one left. It is hidden and has
    no extension, so that no program lists it as a model or a picture.
    """
    temporary = path.with_name(f"{_TEMPORARY}{_host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}")
    _being_written.add(temporary.name)
    try:
        yield temporary
    finally:
        _being_written.discard(temporary.name)  # first: what an interrupt leaves of the other is a leftover
        _delete(temporary)


def write_file(path: Path, write: Callable[[Path], object], needed_bytes: int = 0, *, replace: bool = True) -> Path:
    """Let a function write a file under a temporary name, and rename it once it is complete.

    Args:
        path: The file.
        write: Writes the file at the path that it is given. It may write others next to it, as safetensors does.
        needed_bytes: Named in the error if the disk is full; 0: unknown.
        replace: Whether a file of that name is replaced; if not, the first free name of `name-2`, `name-3` … is taken,
            whatever other programs write meanwhile.

    Returns:
        The path of the file.

    Raises:
        StorageError: The file can't be written, or the system can't have a file of that name.
        TrainerError: What `write` raises, about this file.
    """
    _names_a_folder(path)
    with explained_os_errors(path, needed_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        with _temporary_beside(path) as folder:
            folder.mkdir()
            temporary = folder / "content"
            try:
                write(temporary)
            except TrainerError as error:
                raise error.about(str(path)) from error
            return _put_in_place(temporary, path, replace)


def write_atomic(path: Path, content: bytes, *, replace: bool = True) -> Path:
    """Write `content` to `path` so that readers, even after a crash, see the old file or the new one, never a part.

    Args:
        path: The file.
        content: All of it.
        replace: See `write_file`.

    Returns:
        The path of the file.

    Raises:
        StorageError: The file can't be written.
    """
    with explained_os_errors(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_beside(path) as temporary:
            with open(temporary, "xb") as file:
                file.write(content)
            return _put_in_place(temporary, path, replace)


def write_folder(path: Path, write: Callable[[Path], object]) -> Path:
    """Let a function fill a folder under a temporary name, and rename it once it is complete.

    Args:
        path: The folder. Nothing is replaced: if there is one, or a file, the first free name of `name-2`, `name-3` …
            is taken, whatever other programs write meanwhile.
        write: Fills the empty folder at the path that it is given.

    Returns:
        The path of the folder.

    Raises:
        StorageError: Something can't be written.
    """
    with explained_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_beside(path) as temporary:
            temporary.mkdir()
            write(temporary)
            for folder, _, files in os.walk(temporary):
                for file in files:
                    _sync(Path(folder, file))
                _sync(Path(folder))
            return _put_in_place(temporary, path, replace=False)


def _put_in_place(temporary: Path, path: Path, replace: bool) -> Path:
    """Move what is whole to its name, or to the first free one; returns that."""
    if not temporary.is_dir():
        _sync(temporary)
    if replace:
        _retried(lambda: os.replace(temporary, path))
    else:
        for candidate in numbered(path):
            with contextlib.suppress(FileExistsError):
                _move_unless_taken(temporary, candidate)
                path = candidate
                break
    _sync(path.parent)
    return path


def numbered(path: Path) -> Iterator[Path]:
    """`path`, then `name-2`, `name-3` … in the same folder."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _move_unless_taken(source: Path, target: Path) -> None:
    """Give a file or folder a name that nothing has, in one step: between a look and a move others may take it.

    Raises:
        FileExistsError: The name is taken.
    """
    if os.path.lexists(target):  # an empty folder, too, which a rename would replace
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if os.name == "nt":
        _retried(lambda: os.rename(source, target))  # which replaces nothing there
    elif source.is_dir():
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, error.strerror, str(target)) from error
            raise
    else:
        try:
            os.link(source, target)  # the other name leaves with the temporary one
        except OSError as error:
            if error.errno not in _WITHOUT_LINKS:
                raise
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.replace(source, target)


def _retried(move: Callable[[], None]) -> None:
    """On Windows a move waits for programs, such as virus scanners, that open a new file for a moment."""
    for pause in _PAUSES if os.name == "nt" else ():
        with contextlib.suppress(PermissionError):
            move()
            return
        time.sleep(pause)
    move()


def require_writable(folder: Path, needed_bytes: int) -> None:
    """Create `folder` and check, before any long work, that it can be written and has room.

    Args:
        folder: The folder to write to; created if missing.
        needed_bytes: Bytes that will be written at least.

    Raises:
        StorageError: It can't be created or written, or the disk has less room than needed.
    """
    for part in (folder, *folder.parents):
        if os.path.exists(part) and not os.path.isdir(part):
            raise StorageError(f"{part} is a file, not a folder.", "Choose another output folder, or move that file.")
    with explained_os_errors(folder, needed_bytes):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with _temporary_beside(folder / "probe") as probe:
            probe.write_bytes(b"")
        if shutil.disk_usage(folder).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def require_writable_file(path: Path, needed_bytes: int) -> None:
    """Check, before any long work, that a file can be written; its folder is created.

    Args:
        path: The file, which may exist.
        needed_bytes: Bytes that will be written at least.

    Raises:
        StorageError: See `require_writable`; or the name is too long, is not allowed on this system, or is a folder's.
    """
    path = path.absolute()
    if _names_a_folder(path):
        raise StorageError(f"{path} is a folder, not a file.", "Choose another name, or move that folder.")
    require_writable(path.parent, needed_bytes)


def _names_a_folder(path: Path) -> bool:
    """Whether there is a folder of that name.

    Raises:
        StorageError: The system can't have that name.
    """
    if _IS_WINDOWS and _NOT_ON_WINDOWS.search(path.name):
        raise StorageError(f"Windows does not allow a file named {path.name}.", "Use letters, digits, '-' and '_'.")
    with explained_os_errors(path):
        try:
            return stat.S_ISDIR(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False


def remove_leftovers(folder: Path, *, recursive: bool = False, sole_writer: bool = False) -> None:
    """Delete temporary files and folders that killed processes left in `folder`, but none that is being written.

    Those of a process that lives, and those that another machine wrote within a day, are left alone.

    Args:
        folder: Need not exist.
        recursive: Look into its folders, too.
        sole_writer: Whether nobody else can be writing there, since this process has the lock.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith(_TEMPORARY):
            if entry.name not in _being_written and (sole_writer or _is_abandoned(path)):
                _delete(path)
        elif recursive and entry.is_dir(follow_symlinks=False):
            remove_leftovers(path, recursive=True, sole_writer=sole_writer)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system knows no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def delete_at_once(path: Path) -> None:
    """Delete a folder so that it is gone at once or not at all; what a kill leaves of it is a leftover.

    Raises:
        OSError: It can't be moved, for instance because another program on Windows has a file of it open.
    """
    with _temporary_beside(path) as temporary:
        _retried(lambda: os.rename(path, temporary))
        _sync(path.parent)


def is_temporary(path: Path) -> bool:
    """Whether a file or folder has the name of what is being written, or deleted."""
    return path.name.startswith(_TEMPORARY)


def _is_abandoned(path: Path) -> bool:
    """Whether nobody writes what bears this temporary name."""
    import psutil

    match = _TEMPORARY_NAME.fullmatch(path.name)
    if match and match["host"] == _host():
        process = int(match["process"])
        if process == os.getpid():  # of a container which died, and has begun again with the same numbers
            return True
        if not psutil.pid_exists(process):
            return True
    with contextlib.suppress(OSError):
        return time.time() - path.lstat().st_mtime > _ABANDONED_AFTER
    return False  # it is gone


@functools.cache
def _host() -> str:
    """Eight digits for the machine, or the container, in which this process has its number."""
    name = platform.node()
    with contextlib.suppress(OSError):
        name += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _delete(path: Path) -> None:
    """Delete a file or folder, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
