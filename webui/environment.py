"""Which Python runs the engine: the host's own, or an environment of the pack's own over the host's packages."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..trainer.core.errors import SettingsError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "venv"
STAMP = FOLDER / "dreambooth_lora.json"


def own_python(folder: Path = FOLDER) -> Path:
    """The interpreter of an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def python() -> Path:
    """The interpreter that jobs run in.

    Raises:
        SettingsError: Neither the host's packages will do, nor is there an environment of the pack's own.
    """
    if STAMP.is_file() and own_python().exists():
        return own_python()
    from ..install import missing_requirements

    missing = missing_requirements((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    if missing:
        raise SettingsError(
            f"Packages are missing: {'; '.join(missing)}.",
            "Restart the web UI: they are installed when it starts. If they are not, its console says why.",
        )
    return Path(sys.executable)
