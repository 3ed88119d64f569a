"""Files and folders that appear whole or not at all: temporary name, fsync, atomic rename. And TOML files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import SettingsError, StorageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TEMPORARY = ".tmp-"
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds
_SHOWN_NAME = 60  # characters of an overlong name that a message shows
_IS_WINDOWS = os.name == "nt"
_NOT_ON_WINDOWS = re.compile(r'[<>:"|?*\x00-\x1f]|[ .]$')


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
                "Free some space or choose another output folder; everything written before is intact.",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"{path} can't be written: {error.strerror}.",
                "Choose another output folder, give yourself permission to write there, "
                "or close the program that has the file open.",
            ) from error
        if error.errno == errno.EFBIG:
            raise StorageError(
                f"{path} is larger than the disk's format allows.", "Choose an output folder on another disk."
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


def _replace(source: Path, target: Path) -> None:
    """`os.replace`; on Windows it waits for programs, such as virus scanners, that open a new file for a moment."""
    for pause in _PAUSES if os.name == "nt" else ():
        with contextlib.suppress(PermissionError):
            os.replace(source, target)
            return
        time.sleep(pause)
    os.replace(source, target)


def _temporary_beside(path: Path) -> Path:
    return path.with_name(_TEMPORARY + uuid.uuid4().hex[:12])


@contextlib.contextmanager
def file_written_atomically(path: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield the name of a temporary file that becomes `path` when the block ends without an error.

    Raises:
        StorageError: The file can't be written.
    """
    with explained_os_errors(path, needed_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_beside(path)
        try:
            yield temporary
            _sync(temporary)
            _replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that readers, even after a crash, see the old file or the new one, never a part.

    Raises:
        StorageError: The file can't be written.
    """
    with file_written_atomically(path, len(content)) as temporary, open(temporary, "xb") as file:
        file.write(content)


@contextlib.contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    An existing folder of that name is replaced.

    Raises:
        StorageError: Something can't be written.
    """
    temporary = _temporary_beside(path)
    aside = _temporary_beside(path)
    try:
        with explained_os_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            if path.exists():
                _replace(path, aside)
            try:
                _replace(temporary, path)
            except OSError:
                if aside.exists():
                    _replace(aside, path)
                raise
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)


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
        probe = folder / f"{_TEMPORARY}{uuid.uuid4().hex[:8]}"
        probe.write_bytes(b"")
        probe.unlink()
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
        raise StorageError(f"Windows allows no file of the name {path.name}.", "Choose letters, digits, '-' and '_'.")
    with explained_os_errors(path):
        try:
            return stat.S_ISDIR(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files and folders that a killed process left in `folder`."""
    if not folder.is_dir():
        return
    for entry in folder.glob(f"{_TEMPORARY}*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def free_path(path: Path) -> Path:
    """`path`, or if it exists the first of `name-2`, `name-3` … beside it that does not.

    Raises:
        StorageError: The system can't have a file of that name.
    """
    _names_a_folder(path)
    candidate = path
    number = 2
    with explained_os_errors(path):
        while candidate.exists():
            candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
            number += 1
    return candidate


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings from a TOML file with one key per setting; dashes in keys count as underscores.

    Raises:
        SettingsError: The file is missing or is no TOML.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(
            f"{path} can't be read: {error.strerror}.", "Check the path of the settings file."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path} is not valid TOML: {error}.",
            "Write one `key = value` per line; put text in quotes, and Windows paths in single quotes: "
            "base = 'C:\\models\\x.safetensors'.",
        ) from error
    return _with_underscores(content)


def _with_underscores(table: dict[str, Any]) -> dict[str, Any]:
    """A table, and the tables in its lists, with underscores for dashes in keys."""
    renamed = {}
    for key, value in table.items():
        if isinstance(value, list):
            value = [_with_underscores(entry) if isinstance(entry, dict) else entry for entry in value]
        renamed[key.replace("-", "_")] = value
    return renamed
