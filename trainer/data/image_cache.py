"""Generated pictures, kept as PNG files, so that nothing is generated twice."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.errors import StorageError
from ..core.files import explained_os_errors, remove_leftovers, require_writable, write_atomic
from ..core.locks import FolderLock
from .decoding import decode
from .images import Picture


class ImageCache:
    """A folder of pictures whose name is a digest of everything that they depend on.

    Attributes:
        folder: The folder, which may not exist yet.
    """

    def __init__(self, root: Path, key: Mapping[str, Any]) -> None:
        """Name the folder; nothing is written yet.

        Args:
            root: Folder for all such folders.
            key: What the pictures depend on; JSON values.
        """
        self._key = json.dumps(key, indent=1, sort_keys=True)
        self.folder = root / hashlib.sha256(self._key.encode()).hexdigest()[:16]

    @property
    def lock(self) -> FolderLock:
        """The lock of the folder, which is not taken yet."""
        return FolderLock(self.folder)

    def prepare(self, count: int, pixels: int) -> None:
        """Make the folder for `count` more pictures of `pixels` each.

        Raises:
            StorageError: It can't be written or has no room.
        """
        require_writable(self.folder, count * pixels * 2)
        remove_leftovers(self.folder)
        write_atomic(self.folder / "settings.json", self._key.encode())

    def has(self, name: str) -> bool:
        """Whether the folder holds the picture, undamaged."""
        try:
            decode((self.folder / name).read_bytes())
        except (OSError, ValueError):
            return False
        return True

    def save(self, name: str, image: Image.Image) -> None:
        """Write a picture.

        Raises:
            StorageError: It can't be written.
        """
        write_atomic(self.folder / name, as_png(image))

    def load(self, name: str, caption: str) -> Picture:
        """A picture of the folder.

        Raises:
            StorageError: It can't be read.
        """
        path = self.folder / name
        with explained_os_errors(path):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return Picture(name, caption, digest, partial(_reopened, path, digest))


def _reopened(path: Path, digest: str) -> Image.Image:
    """A picture that was found good before.

    Raises:
        StorageError: It is gone, can't be read, or is another.
    """
    remedy = "Start again, which regenerates it, and don't change the folder until training ends."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} can no longer be read: {error.strerror or error}.", remedy) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise StorageError(f"{path} has changed since it was generated.", remedy)
    return decode(content)


def as_png(image: Image.Image) -> bytes:
    """An image as the content of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def generated_picture(name: str, caption: str, image: Image.Image) -> Picture:
    """A picture that was just generated and is held in memory."""
    content = as_png(image)
    return Picture(name, caption, hashlib.sha256(content).hexdigest(), partial(decode, content))
