"""What is reported for an issue: versions and devices, also where libraries are missing or broken; nothing private."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import HANGS, ROOT
from pack.trainer.cli import info
from pack.trainer.cli.info import LIBRARIES, _described, as_text, collect, folder_kind

HOME = str(Path.home())
BROKEN_TORCH = f"raise OSError('libtorch_cuda.so: cannot open {HOME}/secret place/libtorch.so, at line 3')"
OLD_PYDANTIC = "VERSION = '1.10.26'\nclass BaseModel: pass\n"


def run(tmp_path: Path, *words: str, **packages: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, in which some packages are others."""
    for name, code in packages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "trainer", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=HANGS,
    )


def assert_nothing_private(text: str, *places: Path) -> None:
    for place in (HOME, str(ROOT), os.getcwd(), sys.prefix, *map(str, places)):
        assert place not in text
    for word in text.replace(",", " ").split():
        assert word not in (getpass.getuser(), platform.node())


@pytest.mark.slow
def test_versions_devices_and_disk_are_reported(tmp_path: Path) -> None:
    done = run(tmp_path, "info")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("pack: 0.")
    assert lines[1].startswith(f"python: {platform.python_version()}, ")
    for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes"):
        assert any(line.startswith(f"  {name}: ") for line in lines), name
    assert any(line.startswith("  cpu, ") and "precisions fp32/bf16" in line for line in lines)
    assert_nothing_private(done.stdout, tmp_path)
    done = run(tmp_path, "info", "--json")
    assert json.loads(done.stdout)["devices"][0]["auto"] == "fp32"


@pytest.mark.slow
@pytest.mark.parametrize("words", [["info"], ["info", "--json"]], ids=str)
def test_a_broken_library_is_reported_as_such(tmp_path: Path, words: list[str]) -> None:
    done = run(tmp_path, *words, torch=BROKEN_TORCH, peft="raise SystemExit(3)")
    assert done.returncode == 0, done.stderr
    assert "can't be imported (OSError: libtorch_cuda.so: cannot open PATH, at line 3)" in done.stdout
    assert "can't be imported (SystemExit: 3)" in done.stdout
    assert_nothing_private(done.stdout, tmp_path)
    assert "secret" not in done.stdout
    assert json.loads(done.stdout) if "--json" in words else "devices: unknown without PyTorch" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "pydantic", [OLD_PYDANTIC, "raise ModuleNotFoundError(name='pydantic')"], ids=["old", "missing"]
)
def test_it_works_without_what_the_settings_need(tmp_path: Path, pydantic: str) -> None:
    """As with the pydantic of a host, which may be too old; every other command says what is missing."""
    broken = dict.fromkeys(("torch", "diffusers", "transformers", "peft", "accelerate"), "raise ImportError('broken')")
    done = run(tmp_path, "info", pydantic=pydantic, **broken)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pack: ")
    assert "Traceback" not in done.stderr
    done = run(tmp_path, "train", "--help")
    assert done.returncode == 1
    assert done.stderr.startswith("error: A library that the commands need can't be used: ")
    assert "\nfix: Install what the pack needs: " in done.stderr


@pytest.mark.slow
def test_a_library_that_is_not_installed_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    done = run(tmp_path, "inspect", "x", torch="raise ModuleNotFoundError('No module named torch', name='torch')")
    assert done.returncode == 1
    assert done.stderr.startswith("error: The library torch is not installed.\nfix: Install what the pack needs: ")


def test_a_gpu_is_reported_with_its_memory_and_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 2060", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * 2**30, 6 * 2**30))
    [_, gpu] = info._devices()
    assert info._line(gpu) == (
        "cuda:0, NVIDIA GeForce RTX 2060, precisions fp32/bf16/fp16, auto fp16, 6.0 GB memory, 5.0 GB free memory, "
        "compute capability 7.5"
    )


@pytest.mark.parametrize(
    ("folders", "kind"),
    [
        (["ComfyUI", "custom_nodes", "pack"], "custom_nodes of a ComfyUI"),
        (["webui", "extensions", "pack", ".git"], "extensions of a web UI, a clone"),
        (["src", "pack", ".git"], "a clone"),
        (["src", "pack"], "a folder without git"),
    ],
    ids=lambda value: "/".join(value) if isinstance(value, list) else "",
)
def test_kinds_of_folders(folders: list[str], kind: str, tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*folders)
    folder.mkdir(parents=True)
    pack = folder.parent if folders[-1] == ".git" else folder
    assert folder_kind(pack) == kind


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (f"cannot open {HOME}/x.so", "OSError: cannot open PATH"),
        ("C:\\Users\\Ann Lee\\a.dll and C:\\b.dll, both", "OSError: PATH, both"),
        (
            'Error loading "C:\\Users\\Ann Lee\\torch\\lib\\shm.dll" or a dependency',
            "OSError: Error loading PATH or a dependency",
        ),
        ("no kernel image is available", "OSError: no kernel image is available"),
        ("two\nlines", "OSError: two lines"),
        ("", "OSError"),
        (f"user {getpass.getuser()} is not allowed", "OSError"),
    ],
)
def test_errors_are_shown_without_paths_and_names(message: str, shown: str) -> None:
    assert _described(OSError(message)) == shown


def test_a_library_that_is_too_old_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"pydantic": "1.10.26", "numpy": "1.24", "safetensors": "0.10.0rc1"}
    monkeypatch.setattr(info.importlib.metadata, "version", versions.__getitem__)
    assert info._library("pydantic", "") == "1.10.26, older than 2.0, which the pack needs"
    assert info._library("numpy", "") == "1.24"
    assert info._library("safetensors", "") == "0.10.0rc1"


def test_nothing_that_fails_ends_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such thing")

    for name in ("_pack", "_python", "_system", "_pytorch", "_disk", "_device"):
        monkeypatch.setattr(info, name, fail)
    monkeypatch.setattr(info, "_library", lambda *_: "1.0")
    facts = collect()
    assert facts["disk"] == {"problem": "RuntimeError: no such thing"}
    assert "pack: problem RuntimeError: no such thing" in as_text(facts)


def test_the_libraries_are_those_that_are_required() -> None:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    required = {line.partition(">=")[0].lower() for line in text.splitlines() if ">=" in line}
    assert required | {"torch"} == {{"PIL": "pillow"}.get(name, name) for name in LIBRARIES}
