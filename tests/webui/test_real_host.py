"""The tab in a real Forge, or one of its kin: what is trained there is drawn with there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from webui_host import text_of
from webui_real import RealWebUI, find_python, find_webui, make_real_folder

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
    """And stopped, resumed, and taken up again by a host that was killed."""
    before = packages()
    settings = {"class_noun": "dog", "resolution": 64, "rank": 4, "learning_rate": 1e-2, "checkpoint_every": 4}
    settings |= {"name": "dög", "steps": 40, "preview_every": 20, "preview_steps": 1, "preview_count": 1}
    [message] = real.call("start", images=real.upload(*sorted(picture_folder(3).iterdir())), **settings)
    assert text_of(message).startswith("Begun.")
    real.wait_for_job("training", "preview", step=1)
    real.kill()
    real.start()
    assert real.job()["state"] in ("training", "preview")
    real.post("/job/stop")
    stopped = real.wait_for_job("stopped")
    assert stopped["step"] < 40
    real.post("/runs/" + stopped["run"].replace("ö", "%C3%B6") + "/resume")
    done = real.wait_for_job("done")
    assert (done["step"], done["card"]) == (40, "dög.safetensors")
    assert (real.loras / "dög.preview.png").read_bytes()[:4] == b"\x89PNG"
    card = json.loads((real.loras / "dög.json").read_text(encoding="utf-8"))
    assert (card["sd version"], card["activation text"], card["preferred weight"]) == ("SD1", "sks dog", 0.9)
    loras = {one["name"]: one for one in real.get("/sdapi/v1/loras")}
    assert Path(loras["dög"]["path"]).samefile(real.loras / "dög.safetensors")

    plain = real.draw("sks dog")
    assert np.array_equal(plain, real.draw("sks dog")), "the same prompt and seed, the same picture"
    assert np.array_equal(plain, real.draw("sks dog <lora:dög:0>"))
    drawn = real.draw("sks dog <lora:dög:1>")
    assert np.abs(drawn - plain).mean() > 1

    made = real.loras / "dög.safetensors"
    used = real.ask(
        "/dreambooth/runs/" + stopped["run"].replace("ö", "%C3%B6") + "/use",
        "POST",
        b'{"step": 4}',
        **{"X-DreamBooth": "1", "Content-Type": "application/json"},
    )
    assert used.status == 200, used.content
    early = (real.loras / used.json["file"]).read_bytes()
    assert early != made.read_bytes()
    made.write_bytes(early)
    assert real.post("/runs/" + stopped["run"].replace("ö", "%C3%B6") + "/use", {"step": 4})
    assert np.abs(real.draw("sks dog <lora:dög:1>") - drawn).mean() > 0, "weights are read anew"
    assert packages() == before, "not one package of the host's changed"
