"""What ComfyUI's registry and GitHub show of the pack, and which files the registry's package has."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from comfy_host import find_comfyui, find_python
from helpers import HANGS, ROOT
from make_registry_pictures import BANNER, ICON, banner, icon
from pack.trainer.core.toml import read_toml
from PIL import Image

RAW = "https://raw.githubusercontent.com/dreambooth-lora/dreambooth-lora/main/"
ASK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import comfyui_version
from comfy_config.config_parser import extract_node_configuration
found = extract_node_configuration(sys.argv[2])
print(json.dumps([comfyui_version.__version__, found.project.model_dump(), found.tool_comfy.model_dump()]))
"""


def project() -> dict[str, Any]:
    return dict(read_toml(ROOT / "pyproject.toml"))


def package() -> set[str]:
    """The repository's files that .comfyignore lets into the package; its patterns are those of .gitignore."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git repository: the pack was copied without it")

    def listed(*arguments: str) -> set[str]:
        command = ["git", "-C", str(ROOT), "ls-files", "-z", *arguments]
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")) - {""}

    files = ("--cached", "--others")
    return listed(*files, "--exclude-standard") - listed(*files, "--ignored", "--exclude-from=.comfyignore")


def is_the_same(path: Path, made: Image.Image) -> bool:
    """Whether a committed picture is what the tool makes, but for how versions of Pillow scale and quantise."""
    kept = np.asarray(Image.open(path).convert("RGBA"), dtype=int)
    new = np.asarray(made.convert("RGBA"), dtype=int)
    return kept.shape == new.shape and bool(np.abs(kept - new).mean() < 2)


def test_pictures_are_those_of_the_tool_in_the_registrys_sizes() -> None:
    assert is_the_same(ROOT / "docs" / "icon.png", icon())
    assert is_the_same(ROOT / "docs" / "banner.png", banner().quantize(256))
    assert ICON <= 400
    assert BANNER[0] / BANNER[1] == pytest.approx(21 / 9)
    shown = project()["tool"]["comfy"]
    for key in ("Icon", "Banner"):
        assert (ROOT / shown[key].removeprefix(RAW)).is_file(), shown[key]


def test_the_package_has_what_hosts_load_and_nothing_else() -> None:
    files = package()
    for needed in (
        "__init__.py",
        "install.py",
        "requirements.txt",
        "README.md",
        "LICENSE",
        "SECURITY.md",
        "locales/en/nodeDefs.json",
        "web/dreambooth.js",
        "web/docs/DreamBoothTrainLora.md",
        "web/docs/pictures/DreamBoothTrainLora.png",
        "example_workflows/train_then_generate.json",
        "docs/training.md",
        "scripts/dreambooth_lora_tab.py",
        "webui/settings.json",
    ):
        assert needed in files
    python = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trainer").rglob("*.py")}
    assert python <= files
    assert {name.split("/")[0] for name in files}.isdisjoint({"tests", "demo", "benchmarks", "tools", ".github"})
    assert sum((ROOT / name).stat().st_size for name in files) < 6_000_000, "bytes, before they are compressed"


def test_the_citation_has_the_version_and_the_forms_are_yaml() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project()["project"]["version"]
    forms = sorted((ROOT / ".github").rglob("*.yml"))
    assert len(forms) >= 6
    for path in forms:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path
    bug = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    assert "`python -m trainer info`" in bug


@pytest.mark.comfy
def test_comfyui_reads_the_same_and_is_new_enough() -> None:
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH to its folder")
    command = [str(find_python(comfyui)), "-c", ASK, str(comfyui), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANGS)
    version, found, shown = json.loads(done.stdout)
    assert found["supported_os"] == ["OS Independent"]
    assert found["supported_accelerators"] == ["GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Apple Metal"]
    assert found["urls"]["repository"]
    assert shown["icon"].endswith("/docs/icon.png")
    assert (shown["publisher_id"], shown["display_name"]) == ("dreambooth-lora", "DreamBooth LoRA")
    bound = found["supported_comfyui_version"].removeprefix(">=")
    assert numbers(version) >= numbers(bound)


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
