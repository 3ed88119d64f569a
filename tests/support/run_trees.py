"""Folders of runs, what lies in them, and a disk on which nothing more has room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SHOWN: dict[str, Any] = {
    "steps": 3,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "keep_adapters": True,
    "preview_every": 2,
    "preview_steps": 1,
    "preview_count": 2,
}


def tree(folder: Path) -> dict[str, bytes | str]:
    """All that lies below a folder: files with their content, links with where they lead."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def contents_below(folder: Path) -> dict[Path, bytes]:
    """All files but metrics, which grow whatever happens."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "metrics.jsonl")
    return {path: path.read_bytes() for path in files}


@contextmanager
def file_size_limit(number_of_bytes: int) -> Iterator[None]:
    """The system refuses to write further into any file than this: a disk that is full, for real."""
    resource = pytest.importorskip("resource")  # Windows has no limit on file sizes
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number_of_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
