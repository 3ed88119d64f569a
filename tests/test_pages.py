"""The unit tests of the pages in tests/web, run by Node.js's own test runner; and what package-lock.json may hold."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT
from npm import node_program

FILES = sorted((ROOT / "tests" / "web").glob("*.test.js"))


@pytest.mark.skipif(node_program() is None, reason="no Node.js: pip install -r requirements-dev.txt brings it")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_pages(file: Path) -> None:
    done = subprocess.run([str(node_program()), str(file)], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_of_the_pages_is_checked_for_types() -> None:
    modules = sorted((ROOT / "web").rglob("*.js"))
    assert len(modules) > 8
    assert [path.name for path in modules if not path.read_text(encoding="utf-8").startswith("// @ts-check\n")] == []


def test_the_lock_file_names_no_registry() -> None:
    """Each machine takes the packages from its own; the hashes say that they are the same."""
    packages = json.loads((ROOT / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    named = {path: package for path, package in packages.items() if path}
    assert len(named) > 2
    assert [path for path, package in named.items() if "resolved" in package] == []
    assert all(package["integrity"].startswith("sha512-") for package in named.values())
