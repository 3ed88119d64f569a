"""Makes the environments in which tests run the web UI's tab: the gradio of Automatic1111 and that of Forge.

    python tools/make_webui_hosts.py [--folder FOLDER]

Each has what `requirements-webui3.txt` or `requirements-webui4.txt` pins, as those hosts do; PyTorch and the rest are
those of the environment that runs this. They are made once, and again when their requirements or that environment's
Python change. Where they can't be made (without a network, or for a Python that the pins have no wheels for), one line
says so, and the tests of the tab are skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LENDER = Path(sys.prefix).resolve()  # worktrees may share one by a link
FOLDER = _LENDER / "webui"
_STAMP = "made_for.json"
GRADIOS = {"gradio3": "requirements-webui3.txt", "gradio4": "requirements-webui4.txt"}
"""Environment → the file of what is installed into it."""


def host_python(name: str, folder: Path = FOLDER) -> Path:
    """The interpreter of an environment, such as "gradio3"; it exists if the environment was made."""
    return folder / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_made(name: str, folder: Path = FOLDER) -> bool:
    """Whether an environment is there, and made of what its requirements are now."""
    try:
        stamp = json.loads((folder / name / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == _stamp(name)) and host_python(name, folder).exists()


def make(name: str, folder: Path = FOLDER) -> str:
    """Make an environment; returns "", or why that can't be done."""
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    failure = _failure(sys.executable, "-m", "venv", str(target))
    if failure:
        return failure
    python = str(host_python(name, folder))
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1")
    failure = _failure(*pip, "--only-binary", ":all:", "-r", str(ROOT / GRADIOS[name]))
    if failure:
        return failure
    purelib = sysconfig.get_path("purelib", "nt" if os.name == "nt" else "posix_prefix", {"base": str(target)})
    lent = dict.fromkeys(str(Path(sysconfig.get_path(kind)).resolve()) for kind in ("purelib", "platlib"))
    (Path(purelib) / "lent_packages.pth").write_text("\n".join(lent) + "\n", encoding="utf-8")
    (target / _STAMP).write_text(json.dumps(_stamp(name)), encoding="utf-8")
    return ""


def _stamp(name: str) -> dict[str, str]:
    digest = hashlib.sha256((ROOT / GRADIOS[name]).read_bytes()).hexdigest()
    return {"requirements": digest, "python": platform.python_version(), "lender": str(_LENDER)}


def _failure(*command: str) -> str:
    result = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if not result.returncode:
        return ""
    return ((result.stdout + result.stderr).strip().splitlines() or ["no reason was given"])[-1].strip()


def main() -> None:
    """Make those that are not there; never fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    for name in GRADIOS:
        if is_made(name, folder):
            continue
        print(f"Making an environment with {name} in {folder / name}, once.", flush=True)
        failure = make(name, folder)
        if failure:
            print(f"It can't be made, so the tests of the web UI's tab there are skipped: {failure}")


if __name__ == "__main__":
    main()
