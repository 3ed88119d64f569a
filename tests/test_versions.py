"""What every past version left on a user's disk is found, read and gone on with by this one.

The files below golden/versions were made by tools/make_version_golden.py with the version that their folder is called
after, in one thread, on the demo's base and pictures. Each version adds its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DEMO, ROOT, Recorder
from make_version_golden import COMMON, HALF_TRAINED, VERSIONS, flags, tensors_hash
from pack.trainer.__main__ import parse
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.cli.flags import settings_from
from pack.trainer.cli.train import run_train
from pack.trainer.core.events import RunOpened
from pack.trainer.dreambooth import TrainResult
from pack.trainer.merging.merge import WeightedAdapter, merge
from pack.trainer.settings.merge import MergeSettings
from pack.trainer.settings.train import TrainCommand
from pack.trainer.training.runs.folder import RunFolder
from pack.trainer.training.runs.index import RunIndex
from PIL import Image
from safetensors.torch import load_file

FOLDERS = sorted(path for path in VERSIONS.iterdir() if path.is_dir())
ADAPTERS = [path for folder in FOLDERS for path in sorted(folder.glob("*.safetensors"))]
pytestmark = pytest.mark.usefixtures("quick")


def test_the_newest_version_is_there() -> None:
    """From 0.4.0 on each version has its folder; see CONTRIBUTING."""
    assert "0.4.0" in {folder.name for folder in FOLDERS}


def half_trained(folder: Path, work: Path, listener: Recorder) -> TrainResult:
    """Go on in `work` with a copy of the run that a version left half-trained."""
    shutil.copytree(folder / "runs", work / "runs")
    shutil.copytree(folder / "class-pictures", work / "class-pictures")
    return train_in(work, listener)


def train_in(work: Path, listener: Recorder) -> TrainResult:
    given = {**COMMON, **HALF_TRAINED, "base": str(DEMO / "base"), "images": str(DEMO / "subject")}
    given |= {"output_dir": str(work), "steps": "8"}
    return run_train(settings_from(parse(["train", *flags(given)]), TrainCommand), listener)


class Found(Exception):
    """A run was opened; no more of it is wanted."""


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_half_trained_run_is_found(folder: Path, tmp_path: Path) -> None:
    """By its fingerprint, before anything is computed."""

    class Opened(Recorder):
        def report(self, event: Any) -> None:
            super().report(event)
            if isinstance(event, RunOpened):
                raise Found

    listener = Opened()
    with pytest.raises(Found):
        half_trained(folder, tmp_path, listener)
    assert listener.events[-1].step == 4
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [path.name for path in (folder / "runs").iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_half_trained_run_is_found_and_goes_on(folder: Path, tmp_path: Path) -> None:
    """It ends as that version ended: to the bit where this machine computes its first half to the bit, too."""
    result = half_trained(folder, tmp_path, listener := Recorder())
    [opened] = [event for event in listener.events if isinstance(event, RunOpened)]
    assert (opened.step, result.started_from, result.step) == (4, 4, 8)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [path.name for path in (folder / "runs").iterdir()]
    expected, found = load_file(folder / "finished.safetensors"), load_file(result.path)
    assert set(found) == set(expected)

    shutil.copytree(folder / "class-pictures", tmp_path / "straight" / "class-pictures")
    straight = train_in(tmp_path / "straight", Recorder())
    [run] = (folder / "runs").iterdir()
    first_half = load_file(run / "step-00000004" / "live.safetensors")
    again = load_file(straight.run / "step-00000004" / "live.safetensors")
    same_arithmetic = all(torch.equal(first_half[name], again[name]) for name in first_half)
    for name, tensor in expected.items():
        if same_arithmetic:
            assert torch.equal(found[name], tensor), name
        else:  # sums in another order: Adam divides by small numbers, so a bit grows to about 1e-5 in eight steps
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_run_is_listed_with_its_curve(folder: Path) -> None:
    index = RunIndex(folder / "runs")
    [name] = index.names()
    summary = index.summary(name)
    assert (summary["name"], summary["steps"]) == ("half-trained", 8)
    assert index.curve(name)["steps"][:4] == [1, 2, 3, 4]
    run = RunFolder.existing(folder / "runs" / name)
    assert run.steps() == [4]
    assert run.measurements(4).validated == [0, 4]


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_adapters_are_read_with_the_same_tensors(path: Path) -> None:
    adapter = read_adapter(path)
    hashes = json.loads((path.parent / "hashes.json").read_text(encoding="utf-8"))
    assert tensors_hash(path) == hashes[path.name]
    stored = load_file(path)
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(tensor.float(), stored[name].float()), name
    assert set(adapter.state_dict()) == set(stored)
    assert adapter.metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_merging_gives_what_it_gave(folder: Path) -> None:
    pair = [
        WeightedAdapter(read_adapter(folder / "lora.safetensors"), "lora", 1.0),
        WeightedAdapter(read_adapter(folder / "loha.safetensors"), "loha", 0.7),
    ]
    for method, options in {"sum": {}, "svd": {"rank": 2}, "ties": {"rank": 2}, "orthogonal": {}}.items():
        merged = merge(pair, MergeSettings.checked({"method": method, **options})).adapter.state_dict()
        expected = load_file(folder / f"merged-{method}.safetensors")
        assert set(merged) == set(expected)
        for name in (name for name in expected if name.endswith("lora_up.weight")):
            found = product(merged, name)
            wanted = product(expected, name)
            distance = torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted)
            assert float(distance) < 1e-3, (method, name)  # written in half precision; singular vectors may turn


def product(tensors: dict[str, torch.Tensor], up: str) -> torch.Tensor:
    down = tensors[up.replace("lora_up", "lora_down")].float()
    scale = float(tensors[up.replace("lora_up.weight", "alpha")]) / len(down)
    return tensors[up].float().flatten(1) @ down.flatten(1) * scale


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_pictures_are_what_they_were(folder: Path, tmp_path: Path) -> None:
    """From the same adapter, prompt and seed; rounding on another machine moves a pixel by a step or two."""
    picture = tmp_path / "picture.png"
    settings: dict[str, str | None] = {
        "base": "demo/base",
        "lora": str(folder / "merged-sum.safetensors"),
        "prompt": "a photo of sks dog in the snow",
        "output": str(picture),
        "size": "64",
        "steps": "6",
        "seed": "1",
        "device": "cpu",
        "precision": "fp32",
    }
    subprocess.run([sys.executable, "-m", "trainer", "generate", *flags(settings)], cwd=ROOT, check=True)
    found, expected = (np.asarray(Image.open(path), np.int16) for path in (picture, folder / "picture.png"))
    assert np.abs(found - expected).max() <= 4
    assert (
        hashlib.sha256((folder / "picture.png").read_bytes()).hexdigest()
        == json.loads((folder / "hashes.json").read_text(encoding="utf-8"))["picture.png"]
    )
