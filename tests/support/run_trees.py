"""Folders of runs that the tests of the run index and of its routes share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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
