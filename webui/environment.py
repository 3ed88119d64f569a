"""Which Python runs the engine: the host's own, or that of the pack's own environment, which `install.py` makes."""

from __future__ import annotations

import sys
from pathlib import Path

from .. import install
from ..trainer.core.errors import SettingsError


def python() -> Path:
    """The interpreter that jobs run in.

    Raises:
        SettingsError: Neither the host's packages will do, nor is there an environment of the pack's own.
    """
    requirements = (install.ROOT / "requirements.txt").read_text(encoding="utf-8")
    missing = install.missing_requirements(requirements)
    if not missing:
        return Path(sys.executable)
    if install.is_ready(requirements):
        return install.environment_python()
    raise SettingsError(
        f"Required packages are missing: {'; '.join(missing)}.",
        "Restart the web UI, which installs them for this extension only. If they are still missing, see its console "
        "for the reason.",
    )
