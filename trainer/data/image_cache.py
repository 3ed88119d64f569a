"""Pictures that a model drew, kept as PNGs: what lies there whole is not drawn again."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.files import explained_os_errors, remove_leftovers, require_writable, write_atomic
from .images import Picture, decode


class ImageCache:
    """A folder of pictures whose name is a digest of everything that makes them."""

    def __init__(self, root: Path, key: Mapping[str, Any]) -> None:
        """Name the folder; nothing is made yet.

        Args:
            root: Folder for all such folders.
            key: What the pictures depend on; JSON values.
        """
        self._key = json.dumps(key, indent=1, sort_keys=True)
        self.folder = root / hashlib.sha256(self._key.encode()).hexdigest()[:16]

    def begin(self, count: int, pixels: int) -> None:
        """Make the folder for `count` further pictures of `pixels` each.

        Raises:
            StorageError: It can't be written or has no room.
        """
        require_writable(self.folder, count * pixels * 2)
        remove_leftovers(self.folder)
        write_atomic(self.folder / "settings.json", self._key.encode())

    def has(self, name: str) -> bool:
        """Whether the picture lies there, whole."""
        try:
            decode((self.folder / name).read_bytes())
        except (OSError, ValueError):
            return False
        return True

    def put(self, name: str, image: Image.Image) -> None:
        """Write a picture.

        Raises:
            StorageError: It can't be written.
        """
        write_atomic(self.folder / name, as_png(image))

    def picture(self, name: str, caption: str) -> Picture:
        """A picture that lies there.

        Raises:
            StorageError: It can't be read.
        """
        return stored_picture(self.folder / name, caption)


def as_png(image: Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def stored_picture(path: Path, caption: str) -> Picture:
    """A picture file.

    Raises:
        StorageError: It can't be read.
    """
    with explained_os_errors(path):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Picture(path.name, caption, digest, lambda: decode(path.read_bytes()))


def generated_picture(name: str, caption: str, image: Image.Image) -> Picture:
    """A picture that was just drawn and lies nowhere."""
    content = as_png(image)
    return Picture(name, caption, hashlib.sha256(content).hexdigest(), partial(decode, content))
