"""Folders and zip files of pictures with what lies beside them, made from a mapping of names to contents."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from helpers import Recorder
from pack.trainer.data.folder import AnnotationOptions
from pack.trainer.data.images import Picture, load_pictures
from PIL import Image

PROMPT = "a photo of sks dog"


def photo(seed: int = 0, size: tuple[int, int] = (48, 40)) -> bytes:
    """A small PNG file that is like no other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def photos(*names: str) -> dict[str, bytes]:
    """A different picture under each name."""
    return {name: photo(sum(name.encode())) for name in names}


THREE = photos("a.png", "b.png", "c.png")


def put(place: Path, files: Mapping[str, bytes]) -> Path:
    """The files in a folder."""
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return place


def zipped(path: Path, files: Mapping[str, bytes], **entry: Any) -> Path:
    """The files in a zip file; `entry`: what its entries say of themselves."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo("x")
            info.filename = name
            for key, value in entry.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return path


def put_as(kind: str, place: Path, files: Mapping[str, bytes]) -> Path:
    """The files in a folder, or in a zip file of its name."""
    place.parent.mkdir(parents=True, exist_ok=True)
    return put(place, files) if kind == "folder" else zipped(place.with_name(f"{place.name}.zip"), files)


def load(source: Path, prompt: str = PROMPT, **options: Any) -> tuple[list[Picture], Recorder]:
    """What a run would read, and what it would tell."""
    recorder = Recorder()
    return load_pictures(source, prompt, recorder, AnnotationOptions(**options)), recorder


def captions(pictures: list[Picture]) -> dict[str, tuple[str, ...]]:
    """Name → captions."""
    return {picture.name: picture.captions for picture in pictures}
