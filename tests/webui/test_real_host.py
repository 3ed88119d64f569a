"""The tab in a real Forge, or one of its kin: what is trained there is drawn with there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from webui_host import text_of
from webui_real import RealWebUI, find_python, find_webui, make_real_folder

LONG = 1_000_000  # steps that no test waits for
pytestmark = [
    pytest.mark.webui,
    pytest.mark.skipif(find_webui() is None, reason="no web UI: set WEBUI_PATH to the folder of a Forge"),
]


def packages() -> str:
    """What is installed in the host's environment."""
    webui = find_webui()
    assert webui is not None
    freeze = [str(find_python(webui)), "-m", "pip", "list", "--format", "freeze", "--disable-pip-version-check"]
    return subprocess.run(freeze, cwd=webui, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealWebUI]:
    webui = find_webui()
    assert webui is not None
    with RealWebUI("a real one", make_real_folder(tmp_path_factory.mktemp("real ü"), webui)) as running:
        running.kind = "gradio3" if running.configuration["version"].startswith("3.") else "gradio4"
        yield running


def test_what_is_trained_is_drawn(real: RealWebUI, picture_folder: Callable[..., Path]) -> None:
    """Though it was stopped, resumed, and taken up again by a host after the first one was killed."""
    before = packages()
    settings = {"class_noun": "dog", "resolution": 64, "rank": 4, "learning_rate": 1e-2, "checkpoint_every": 5}
    settings |= {"name": "dög", "steps": LONG, "preview_every": 20, "preview_steps": 1, "preview_count": 1}
    [message] = real.call("start", images=real.upload(*sorted(picture_folder(3).iterdir())), **settings)
    assert text_of(message).startswith("Begun.")
    real.wait_for_job("training", "preview", step=1)
    real.kill()
    real.start()
    assert real.job()["state"] in ("training", "preview")
    real.post("/job/stop")
    stopped = real.wait_for_job("stopped")
    steps = stopped["step"] + 20
    real.shorten("dög", steps)
    run = "/runs/" + quote(stopped["run"])
    real.resume(run)
    done = real.wait_for_job("done")
    assert (done["step"], done["card"]) == (steps, "dög.safetensors")
    assert (real.loras / "dög.preview.png").read_bytes()[:4] == b"\x89PNG"
    card = json.loads((real.loras / "dög.json").read_text(encoding="utf-8"))
    assert (card["sd version"], card["activation text"], card["preferred weight"]) == ("SD1", "sks dog", 0.9)
    made = real.loras / "dög.safetensors"
    [path] = [one["path"] for one in real.get("/sdapi/v1/loras") if one["name"] == "dög"]
    assert Path(path).samefile(made)

    plain = real.draw("sks dog")
    assert np.array_equal(plain, real.draw("sks dog")), "the same prompt and seed, the same picture"
    assert np.array_equal(plain, real.draw("sks dog <lora:dög:0>"))
    drawn = real.draw("sks dog <lora:dög:1>")
    assert np.abs(drawn - plain).mean() > 1

    step = real.get(f"/dreambooth{run}")["adapters"][0]["step"]
    early = real.loras / real.post(f"{run}/use", {"step": step})["file"]
    weights, others = load_file(made), load_file(early)
    assert any(not torch.equal(weights[name], others[name]) for name in weights)
    made.write_bytes(early.read_bytes())
    real.post(f"{run}/use", {"step": step})
    assert not np.array_equal(real.draw("sks dog <lora:dög:1>"), drawn), "its weights are read anew"
    assert packages() == before, "not one package of the host's changed"
