"""Locks between processes: one works in a folder, and the others wait or get an error.

The locks are the operating system's, so a lock is released when its process ends, however that happens. Its file names
the owner, for other processes, and is deleted when the lock is released (filelock would leave it in the user's folder).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import BusyError
from .events import Listener, Note, stop_if_asked
from .files import explained_os_errors

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger("dreambooth_lora")
LOCK_FILE = ".lock"
_LOCKED_BYTE = 2**30  # far behind what the file holds: Windows lets nobody read a byte that is locked
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_PAUSE = 0.5  # seconds between two looks at a lock that another process has


@dataclass(frozen=True)
class Owner:
    """Who has a lock.

    Attributes:
        process: Its number (pid).
        host: Name of its machine.
        since: Unix time at which it took the lock.
    """

    process: int
    host: str
    since: float

    @classmethod
    def this_process(cls) -> Owner:
        """This process, from now on."""
        return cls(os.getpid(), platform.node(), time.time())

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        if self.host != platform.node():
            return f"process {self.process} on {self.host} (since {since})"
        if self.process == os.getpid():
            return f"this process, {self.process} (since {since})"
        return f"process {self.process} (since {since})"


class FolderLock:
    """The right to write into a folder, which one process has at a time; one thread of it.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        """Take nothing yet."""
        self.folder = folder
        self._handle: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object has the lock."""
        return self._handle is not None

    def acquire(self) -> bool:
        """Take the lock, unless another process has it, or another object of this one.

        On a file system without locks nothing is locked; a warning is logged.

        Returns:
            Whether this object has it now.

        Raises:
            StorageError: The folder is missing or can't be written.
        """
        if self.is_held:
            return True
        path = self.folder / LOCK_FILE
        with explained_os_errors(self.folder):
            while self._handle is None:
                handle = os.open(path, os.O_RDWR | os.O_CREAT)
                try:
                    if not self._lock(handle):
                        return False
                    if _is_file(path, handle):  # whoever had the lock may have removed its file
                        owner = json.dumps(asdict(Owner.this_process()))
                        os.ftruncate(handle, 0)
                        os.write(handle, owner.encode())
                        self._handle = handle
                finally:
                    if self._handle is None:
                        os.close(handle)
        return True

    def _lock(self, handle: int) -> bool:
        try:
            if sys.platform == "win32":
                os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
                os.lseek(handle, 0, os.SEEK_SET)
            else:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            if error.errno not in _WITHOUT_LOCKS:
                raise
            logger.warning(
                "The file system of %s does not support file locks (%s); use the folder from one program at a time.",
                self.folder,
                error,
            )
        return True

    def release(self) -> None:
        """Give the lock back, if this object has it."""
        handle = self._handle
        if handle is None:
            return
        self._handle = None
        path = self.folder / LOCK_FILE
        is_windows = os.name == "nt"  # which removes no file that is open; so nor that of a process which has it now
        if not is_windows and _is_file(path, handle):
            path.unlink(missing_ok=True)
        os.close(handle)
        if is_windows:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Give the lock back if the block fails: nobody who gets the error has the object that holds it."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    @property
    def owner(self) -> Owner | None:
        """Who has the lock, as far as that is known; a process that was killed may have left its name."""
        import psutil

        try:
            owner = Owner(**json.loads((self.folder / LOCK_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        is_gone = owner.host == platform.node() and not psutil.pid_exists(owner.process)
        return None if is_gone else owner

    def refusal(self, what: str, remedy: str) -> BusyError:
        """The error for a process that can't have the lock.

        Args:
            what: What can't be done, such as "The run … is in use".
            remedy: What to do.
        """
        owner = self.owner
        return BusyError(f"{what} by {owner or 'another program'}.", remedy)

    @contextlib.contextmanager
    def waited_for(self, listener: Listener, what: str) -> Iterator[None]:
        """Hold the lock inside the block; if another process has it, report that once and wait.

        Args:
            listener: Gets the message, and may stop the waiting.
            what: What the other does, such as "The class pictures are being generated".

        Raises:
            CancelledError: The listener asked to stop.
            StorageError: The folder is missing or can't be written.
        """
        is_reported = False
        while not self.acquire():
            if not is_reported:
                listener.report(Note(f"{what} by {self.owner or 'another program'}; waiting for it to finish."))
                is_reported = True
            stop_if_asked(listener)
            time.sleep(_PAUSE)
        try:
            yield
        finally:
            self.release()


def _is_file(path: Path, handle: int) -> bool:
    """Whether a path leads to the file that is open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except OSError:
        return False
