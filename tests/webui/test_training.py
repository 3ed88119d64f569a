"""Whole trainings through the tab, in the real gradio of Automatic1111 and of Forge; also when the host dies."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import DEMO, HANGS, ROOT
from pack.trainer.core.toml import read_toml
from pack.trainer.training.gallery import OWN_KEY
from pack.webui.toml_text import toml_text
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from webui_host import OWN, WebUI, make_folder, text_of

pytestmark = pytest.mark.slow

LONG = 1_000_000  # steps that no test waits for
SETTINGS: dict[str, Any] = {
    "class_noun": "dog",
    "resolution": 64,
    "rank": 2,
    "targets": "attention",
    "learning_rate": 1e-2,
    "save_precision": "fp32",
    "preview_every": 50,
    "preview_steps": 1,
    "checkpoint_every": 10,
}


@pytest.fixture(autouse=True)
def _tidy(webui: WebUI) -> Iterator[None]:
    yield
    webui.tidy()


@pytest.fixture
def own_webui(webui: WebUI, tmp_path: Path, tiny_checkpoint: Path) -> Iterator[WebUI]:
    """A web UI that may be ended."""
    with WebUI(webui.kind, make_folder(tmp_path / "web ü", webui.kind, tiny_checkpoint)) as running:
        yield running


def begin(webui: WebUI, folder: Path, **settings: Any) -> Path:
    """Press Train; the folder of the job."""
    [message] = webui.call("start", images=webui.upload(*sorted(folder.iterdir())), **SETTINGS | settings)
    assert text_of(message) == "Training started. It keeps running if you close this page."
    return webui.data / "jobs" / settings["name"]


def straight(job: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """What the same settings give in one go, from a command line."""
    settings = read_toml(job / "job.toml") | {"output_dir": str(tmp_path / "straight")}
    (tmp_path / "straight.toml").write_text(toml_text(settings), encoding="utf-8")
    command = [sys.executable, "-m", "trainer", "train", str(tmp_path / "straight.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=HANGS, check=True)
    return load_file(done.stdout.splitlines()[-1])


def assert_same(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    tensors = load_file(path)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "up" in name), "something was learned"


def test_train_stop_resume_card(webui: WebUI, picture_folder: Callable[..., Path], tmp_path: Path) -> None:
    calls = webui.facts()["calls"]
    job = begin(webui, picture_folder(3), name="whole dög", steps=LONG)
    facts = webui.wait_for_job("training", "preview", step=2)
    assert (facts["name"], facts["steps"], facts["words"], facts["card"]) == ("whole dög", LONG, "sks dog", "")
    run = f"/dreambooth/runs/{facts['run'].replace('ö', '%C3%B6').replace(' ', '%20')}"
    assert webui.get(run)["state"] == "running"
    refused = webui.ask(run, "DELETE", b"{}", **OWN)
    assert (refused.status, "train" in refused.json["problem"]) == (409, True)
    [message] = webui.call("start", folder=str(tmp_path / "dog"), **SETTINGS, name="second", steps=2)
    assert text_of(message).startswith("'whole dög' is still running.")

    webui.post("/job/stop")
    stopped = webui.wait_for_job("stopped")
    webui.wait_for_idle()
    assert 2 <= stopped["step"] < LONG
    steps = stopped["step"] + 60
    webui.shorten("whole dög", steps)
    assert not [*webui.loras.iterdir()]
    details = webui.get(run)
    assert (details["state"], details["resumable"]) == ("stopped", True)

    webui.post(run.removeprefix("/dreambooth") + "/resume")
    done = webui.wait_for_job("done")  # which is said once the file is where the host looks for it
    assert (done["step"], done["card"], done["warnings"]) == (steps, "whole dög.safetensors", [])
    assert done["points"]["steps"] == sorted({*done["points"]["steps"]})
    assert done["points"]["steps"][-1] == steps
    made = webui.loras / done["card"]
    card = json.loads(made.with_suffix(".json").read_text(encoding="utf-8"))
    assert card.pop("description")
    assert card.pop(OWN_KEY)
    assert card.pop("notes").startswith(f"Trained for {steps} steps on ")
    assert card == {
        "sd version": "SD1",
        "activation text": "sks dog",
        "preferred weight": 1.0,
        "negative text": "",
    }
    preview = io.BytesIO(webui.ask(webui.get(run)["preview"]).content)
    with Image.open(preview) as newest, Image.open(made.with_suffix(".preview.png")) as shown:
        assert newest.tobytes() == shown.tobytes()
    with safe_open(str(made), "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v1/lora"
    webui.wait_for_idle()
    inside = webui.facts()
    assert inside["calls"][len(calls) :] == ["unload", "load"] * 2
    assert "whole dög" in inside["networks"]
    assert any(text.startswith("DreamBooth: training 'whole dög', step ") for text in inside["texts"])
    assert inside["job"] == ""
    assert_same(made, straight(job, tmp_path))


def test_a_training_outlives_the_host(own_webui: WebUI, picture_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The restarted host takes the job up: stopped, resumed and delivered, it gives the straight run's adapter."""
    job = begin(own_webui, picture_folder(3), name="dog", steps=LONG)
    own_webui.wait_for_job("training", "preview", step=2)
    own_webui.kill()
    own_webui.start()
    assert own_webui.facts()["followed"], "it is taken up"
    assert own_webui.job()["state"] in ("training", "preview")
    before = own_webui.job()["step"]
    own_webui.wait_for_job("training", "preview", step=before + 1)
    assert own_webui.facts()["job"] == "dreambooth", "the host's own pictures wait"
    own_webui.post("/job/stop")
    stopped = own_webui.wait_for_job("stopped")
    assert stopped["step"] < LONG
    own_webui.wait_for_idle()
    own_webui.shorten("dog", stopped["step"] + 100)
    own_webui.post(f"/runs/{stopped['run']}/resume")
    own_webui.wait_for_job("starting", "training", "preview", "encoding pictures", "encoding captions", "done")
    own_webui.kill()
    wait_for_the_end(json.loads((job / "job.json").read_text())["pid"])
    for is_last in (False, True):  # delivered by the first host that comes, and by it alone
        own_webui.start()
        own_webui.wait_for_idle()
        assert own_webui.job()["card"] == "dog.safetensors"
        names = sorted(path.name for path in own_webui.loras.iterdir())
        assert names == ["dog.json", "dog.metadata.json", "dog.preview.png", "dog.safetensors"]
        if not is_last:
            own_webui.kill()
    assert_same(own_webui.loras / "dog.safetensors", straight(job, tmp_path))


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("Flux", ["model.diffusion_model.double_blocks.0.img_mod.lin.weight", "vae.decoder.conv_in.weight"]),
        ("Stable Diffusion 3", ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"]),
    ],
)
def test_a_base_that_can_not_be_trained(
    title: str, names: list[str], webui: WebUI, picture_folder: Callable[..., Path]
) -> None:
    """The panel names its family, and what can be; another training may begin at once."""
    path = webui.folder / "models" / "Stable-diffusion" / "foreign.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    try:
        webui.call("refresh")
        begin(webui, picture_folder(3), name=f"foreign {title}", base=path.name, steps=2)
        failed = webui.wait_for_job("failed")
    finally:
        path.unlink()
        webui.wait_for_idle()
        webui.call("refresh")
    assert failed["problem"] == f"The base model is {title}, which is not supported."
    titles = "Stable Diffusion 1.x, Stable Diffusion 2.x, Stable Diffusion XL, FLUX.2 klein, Z-Image, Krea 2, Anima"
    assert failed["remedy"] == f"Use one of these base models: {titles}."
    assert not [*webui.loras.iterdir()]


def test_a_disk_that_is_full(webui: WebUI, picture_folder: Callable[..., Path]) -> None:
    """The panel says which; once there is room, the same settings train."""
    runs = webui.data / "runs"
    runs.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(runs)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only a system's administrator may mount a small disk")
    try:
        begin(webui, picture_folder(3), name="full", steps=2)
        failed = webui.wait_for_job("failed")
        webui.wait_for_idle()
    finally:
        subprocess.run(["umount", str(runs)], check=True)
    assert failed["problem"].startswith(f"No space left on the disk that holds {runs}")
    assert failed["remedy"].startswith("Free some space or choose another output folder")
    begin(webui, picture_folder(3), name="full", steps=2)
    assert webui.wait_for_job("done")["card"] == "full.safetensors"


def test_the_best_checkpoint_is_picked(webui: WebUI, picture_folder: Callable[..., Path]) -> None:
    """It is named, marked in the plot, and can be used from the run's checkpoints."""
    begin(webui, picture_folder(3), name="picked", steps=4, checkpoint_every=2, preview_every=0)
    run = webui.wait_for_job("done")["run"]
    webui.wait_for_idle()
    calls = webui.facts()["calls"]
    [update] = webui.call("compare_run_refresh")
    assert [choice if isinstance(choice, str) else choice[1] for choice in update["choices"]] == [run]
    scorer = {"compare_clip": str(DEMO / "scorer"), "compare_prompts": "a photo of sks dog", "compare_count": 1}
    result, plot = webui.call("compare_start", compare_run=run, compare_steps=1, **scorer)
    [best] = re.findall(r"Best: .*?step (\d+)", text_of(result))
    assert best in ("2", "4")
    assert plot, "the plot"
    assert webui.facts()["calls"][len(calls) :] == ["unload", "load"], "the card was the comparison's meanwhile"
    assert [path.name for path in (webui.data / "jobs").rglob("best.png")] == ["best.png"]
    used = webui.post(f"/runs/{run}/use", {"step": int(best)})["file"]
    assert (webui.loras / used).is_file()


def wait_for_the_end(pid: int) -> None:
    """Wait until a process ends that is none of this one's children."""
    deadline = time.monotonic() + HANGS
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
