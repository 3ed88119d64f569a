"""The unit tests of the pages in tests/web, run by Node.js's own test runner; and what package-lock.json may hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import npm
import pytest
from filelock import FileLock  # torch brings it
from helpers import ROOT

FILES = sorted((ROOT / "tests" / "web").glob("*.test.js"))


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Node.js, with what package-lock.json names: npm installs it the first time, for one process at a time."""
    program = npm.node_program()
    if program is None:
        pytest.skip("no Node.js: pip install -r requirements-dev.txt brings it")
    with FileLock(tmp_path_factory.getbasetemp().parent / "npm.lock"):
        try:
            npm.install()
        except (SystemExit, subprocess.CalledProcessError) as error:
            pytest.skip(f"npm can't install what package-lock.json names: {getattr(error, 'stderr', error)}")
    return program


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_pages(file: Path, node: str) -> None:
    environment = {**os.environ, "NODE_COMPILE_CACHE": str(ROOT / "node_modules" / ".compiled")}
    done = subprocess.run([node, str(file)], env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_of_the_pages_is_checked_for_types() -> None:
    modules = sorted((ROOT / "web").rglob("*.js"))
    assert len(modules) > 8
    assert [path.name for path in modules if not path.read_text(encoding="utf-8").startswith("// @ts-check\n")] == []


def test_every_phase_of_a_training_has_a_text() -> None:
    """Which panels show instead of the engine's own name."""
    texts = json.loads((ROOT / "locales" / "en" / "main.json").read_text(encoding="utf-8"))["dreambooth"]["phase"]
    files = [*(ROOT / "trainer" / "training").rglob("*.py"), *(ROOT / "trainer" / "data").glob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in files if path.name != "captioning.py")
    scoring = (ROOT / "trainer" / "evaluation" / "feature_extractors.py").read_text(encoding="utf-8")
    reported = {*re.findall(r'Phase\("([^"]+)"', code), *re.findall(r'title: str = "([^"]+)"', scoring)}
    assert len(reported) > 3
    assert set(texts) == reported


def test_the_lock_file_names_no_registry() -> None:
    """Each machine takes the packages from its own; the hashes say that they are the same."""
    packages = json.loads((ROOT / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    named = {path: package for path, package in packages.items() if path}
    assert len(named) > 2
    assert [path for path, package in named.items() if "resolved" in package] == []
    assert all(package["integrity"].startswith("sha512-") for package in named.values())
