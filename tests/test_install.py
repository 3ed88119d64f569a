"""install.py: what does not fit the host's packages is noticed, and mended without touching them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

ASK = """
import install, json
text = open(install.__file__.replace("install.py", "requirements.txt"), encoding="utf-8").read()
names = install.incompatible_packages()
print(json.dumps([names, install.pip_arguments(names, text)]))
"""


def asked(folder: Path, wanted: str) -> tuple[list[str], list[str]]:
    """What install.py says where diffusers wants that huggingface-hub, and 0.36.2 is there."""
    for name, number, lines in (
        ("diffusers", "0.99.0", [f"Requires-Dist: {wanted}"]),
        ("huggingface_hub", "0.36.2", []),
    ):
        place = folder / f"{name}-{number}.dist-info"
        place.mkdir()
        head = ["Metadata-Version: 2.1", f"Name: {name.replace('_', '-')}", f"Version: {number}"]
        (place / "METADATA").write_text("\n".join([*head, *lines]) + "\n")
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", ASK], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    names, arguments = json.loads(done.stdout)
    return names, arguments


@pytest.mark.parametrize(
    "wanted", ["huggingface-hub<3.0,>=1.32.0", "huggingface-hub>=1; python_version > '3'", "huggingface-hub (<0.30)"]
)
def test_a_misfit_is_replaced_and_the_host_is_held(wanted: str, tmp_path: Path) -> None:
    names, arguments = asked(tmp_path, wanted)
    assert "diffusers" in names
    assert arguments[:2] == ["install", "diffusers>=0.31.0"]
    assert "huggingface-hub==0.36.2" in arguments
    assert any(one.startswith("torch==") for one in arguments)
    assert not any(one.startswith("torch>") for one in arguments)


@pytest.mark.parametrize(
    "wanted",
    ["huggingface-hub>=0.34.0", "huggingface-hub>=1; python_version < '3'", "huggingface-hub>=1; extra == 'x'"],
)
def test_what_fits_is_left(wanted: str, tmp_path: Path) -> None:
    assert "diffusers" not in asked(tmp_path, wanted)[0]
