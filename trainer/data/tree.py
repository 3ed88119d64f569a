"""The files of a folder or a zip file, with all their folders: one view of both.

Hidden files and those that operating systems leave behind are skipped. Files that are ambiguous or can't be read are
reported.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..core.errors import PicturesError

MAX_FILE_BYTES = 512 * 1024 * 1024
_MAX_FILES_BELOW = 200_000  # in the folders of a folder; more are there where somebody gave a whole disk
_SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
_UNSHOWABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


class UnreadableFileError(Exception):
    """A file can't be read; the text is a reason, as in "it can't be read (Permission denied)"."""


@dataclass(frozen=True)
class TreeFile:
    """A file in a folder or zip file.

    Attributes:
        name: Its name, relative to the folder or zip file, with slashes; bytes that are not text are escaped.
        raw_name: The same as the system gives it; differs where it has bytes that are not text.
        path: Where it is; None in a zip file.
        read: Reads its content; raises UnreadableFileError.
    """

    name: str
    raw_name: str
    path: Path | None
    read: Callable[[], bytes]


@dataclass(frozen=True)
class FileTree:
    """The files of a folder or zip file.

    Attributes:
        title: Name of the folder, or of the zip file without its ending.
        raw_title: The same, as the system gives it.
        location: The folder or zip file with its path, to begin a sentence: "The folder /photos/rex".
        files: Name → file, ordered by name.
        is_archive: Whether it is a zip file, which is closed after it has been looked at.
        left_out: Sentences about files that are not among `files`.
    """

    title: str
    raw_title: str
    location: str
    files: Mapping[str, TreeFile]
    is_archive: bool
    left_out: tuple[str, ...]


def find_path(typed: Path) -> Path:
    """The path that somebody typed: as it is if it exists, else without blanks and quotes around it."""
    if os.path.lexists(typed):
        return typed
    path = Path(str(typed).strip().strip("\"'"))
    if not os.path.lexists(path) and "\\" in str(path):
        path = Path(str(path).replace("\\", "/"))
    return path


@contextlib.contextmanager
def opened_tree(typed: Path) -> Iterator[FileTree]:
    """The files of a folder or zip file; those of a zip file can be read as long as the block lasts.

    Args:
        typed: Path of the folder or zip file, as it was typed.

    Raises:
        PicturesError: It does not exist, is neither, or can't be read.
    """
    path = find_path(typed)
    title = Path(os.path.abspath(path)).name
    shown = shown_name(str(path))
    if os.path.isdir(path):
        with _explained(path):
            tree = _folder_tree(path, title, location=f"The folder {shown}")
        yield tree
        return
    if not os.path.isfile(path):
        raise PicturesError(
            f"The picture folder {shown} does not exist.",
            "Check the path for typos." + _about_variables(path),
        )
    with _explained(path):
        if not zipfile.is_zipfile(path) and path.suffix.lower() != ".zip":
            raise PicturesError(
                f"{shown} is neither a folder nor a zip file.",
                "Use the folder or zip file that contains the pictures.",
            )
        archive = zipfile.ZipFile(path)
    with archive:
        yield _zip_tree(archive, Path(title).stem, location=f"The zip file {shown}")


def shown_name(name: str) -> str:
    """A name that can be displayed and written: bytes that are not text are escaped."""
    return _UNSHOWABLE.sub(lambda match: _escaped(ord(match[0])), name)


def _escaped(code: int) -> str:
    """The number of a byte that is not UTF-8, which Python keeps as a surrogate, or of a control character."""
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _about_variables(path: Path) -> str:
    """A sentence about environment variables, which the shell fills in and nobody else."""
    return (
        " Environment variables are not expanded: write out the full path."
        if re.search(r"\$\w|\$\{|%\w+%", str(path))
        else ""
    )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of a folder or zip file as a whole into such with a remedy."""
    shown = shown_name(str(path))
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, struct.error) as error:
        raise PicturesError(f"The zip file {shown} is damaged: {error}.", "Create the zip file again.") from error
    except OSError as error:
        reason = error.strerror or error
        raise PicturesError(f"{shown} can't be read: {reason}.", "Check the path and its permissions.") from error


def _is_system_file(name: str) -> bool:
    """Whether a file or folder is hidden, such as macOS's `._rex.jpg`, or one of an operating system."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def _folder_tree(folder: Path, title: str, location: str) -> FileTree:
    """The files of a folder and of all its folders.

    Raises:
        OSError: The folder itself can't be listed.
        PicturesError: There are too many files.
    """
    files: dict[str, TreeFile] = {}
    left_out: list[str] = []
    below = 0
    seen = {os.path.realpath(folder)}
    waiting = deque([(folder, "")])
    while waiting:
        current, prefix = waiting.popleft()
        try:
            with os.scandir(current) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if not prefix:
                raise
            left_out.append(f"The folder {shown_name(prefix)[:-1]} can't be read ({error.strerror}); it is skipped.")
            continue
        below += len(entries) if prefix else 0
        if below > _MAX_FILES_BELOW:
            raise PicturesError(
                f"The subfolders of {shown_name(title)} contain more than {_MAX_FILES_BELOW} files.",
                "Use the folder that contains the pictures themselves.",
            )
        for entry in entries:
            name = prefix + entry.name
            if _is_system_file(entry.name):
                continue
            if entry.is_dir():
                inner = os.path.realpath(entry.path)
                if inner not in seen:  # a link may lead back
                    seen.add(inner)
                    waiting.append((Path(entry.path), f"{name}/"))
            else:
                shown = shown_name(name)
                path = Path(entry.path)
                files[shown] = TreeFile(shown, name, path, read=partial(_read_file, path))
    return FileTree(
        shown_name(title), title, location, dict(sorted(files.items())), is_archive=False, left_out=tuple(left_out)
    )


def _read_file(path: Path) -> bytes:
    """The content of a file.

    Raises:
        UnreadableFileError: It can't be read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFileError("it is not a regular file")
        _require_size(status.st_size)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UnreadableFileError("it does not exist") from error
    except OSError as error:
        raise UnreadableFileError(f"it can't be read ({error.strerror or error})") from error


def _require_size(size: int) -> None:
    """Check that a file can be held in memory.

    Raises:
        UnreadableFileError: It can't.
    """
    if size > MAX_FILE_BYTES:
        raise UnreadableFileError(f"it is {size / 1e6:.0f} MB; the limit is {MAX_FILE_BYTES / 1e6:.0f} MB")


def _zip_tree(archive: zipfile.ZipFile, title: str, location: str) -> FileTree:
    """The files of a zip file. None is unpacked to the disk, so a name may be anything."""
    files: dict[str, TreeFile] = {}
    left_out: list[str] = []
    for entry in archive.infolist():
        name = _entry_name(entry)
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        if name.endswith("/") or not parts or any(map(_is_system_file, parts)):
            continue
        name = "/".join(parts)
        shown = shown_name(name)
        if shown in files:
            left_out.append(f"The zip file contains {shown} twice; the later one is used.")
        files[shown] = TreeFile(shown, name, None, read=partial(_read_entry, archive, entry))
    return FileTree(
        shown_name(title), title, location, dict(sorted(files.items())), is_archive=True, left_out=tuple(left_out)
    )


def _entry_name(entry: zipfile.ZipInfo) -> str:
    """The name of an entry, with slashes and without a drive.

    macOS writes UTF-8 without saying so, old Windows programs write backslashes.
    """
    name = entry.filename
    if not entry.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return re.sub("^[A-Za-z]:", "", name.replace("\\", "/"))


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The content of an entry.

    Raises:
        UnreadableFileError: It is encrypted, damaged, too large, or a link.
    """
    if entry.flag_bits & 0x1:
        raise UnreadableFileError("it is encrypted; create the zip file without a password")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise UnreadableFileError("it is a symbolic link")
    _require_size(entry.file_size)
    try:
        return archive.read(entry)
    except NotImplementedError as error:
        raise UnreadableFileError("its compression method is not supported; create the zip file again") from error
    except Exception as error:  # each way of compressing has errors of its own
        raise UnreadableFileError("it is damaged in the zip file; create the zip file again") from error
