"""Checks the directions of imports by import-linter's contracts in pyproject.toml: `python tools/lint_imports.py`.

The pack's folder may have any name, also one that no module can have; for import-linter it is called `pack`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("__init__.py", "install.py", "nodes", "pages", "trainer", "webui")


def main() -> int:
    """Run import-linter on the pack under that name; returns its exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        pack = Path(scratch) / "pack"
        pack.mkdir()
        for name in CODE:
            (pack / name).symlink_to(ROOT / name)
        command = [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            str(ROOT / "pyproject.toml"),
            "--no-cache",
        ]
        return subprocess.run(command, cwd=scratch, env={**os.environ, "PYTHONPATH": scratch}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
