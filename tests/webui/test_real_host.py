"""The tab in a real Automatic1111 or Forge, or their kin: what is trained there is drawn with there, and in ComfyUI."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from browser import find_browser
from comfy_graphs import drawing, node, picture
from comfy_host import ComfyServer
from helpers import DEMO
from PIL import Image
from safetensors.torch import load_file
from webui_host import text_of
from webui_page import PANEL, fill, opened, press, shot, show, wait_for, wait_for_text
from webui_real import DRAWN, SIDE, RealWebUI, find_python, find_webui, make_real_folder

LONG = 1_000_000  # steps that no test waits for
QUICK = {"steps": 10, "resolution": 64, "rank": 4, "learning_rate": 1e-2, "preview_every": 0}
pytestmark = [
    pytest.mark.webui,
    pytest.mark.skipif(find_webui() is None, reason="no web UI: set WEBUI_PATH to the folder of one"),
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
        running.post("/job/stop")  # a training that a failed test left would outlive the host


@pytest.fixture(scope="module")
def subject(real: RealWebUI) -> Path:
    """A LoRA of a dog, in the UNet and the text encoder, trained in the tab."""
    return real.train(name="rex", class_noun="dog", folder=str(DEMO / "subject"), text_encoder_lr=1e-3, **QUICK)


@pytest.fixture(scope="module")
def style(real: RealWebUI, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of pixel art."""
    folder = tmp_path_factory.mktemp("pixel art")
    for path in sorted((DEMO / "subject").glob("*.png")):
        small = Image.open(path).convert("RGB").resize((16, 16)).quantize(8).convert("RGB")
        small.resize((64, 64), Image.Resampling.NEAREST).save(folder / path.name)
    return real.train(name="pixels", token="pxl", folder=str(folder), **QUICK)


@pytest.fixture
def base(real: RealWebUI, server: ComfyServer) -> dict[str, Any]:
    """The web UI's checkpoint in ComfyUI: the node that loads it."""
    [checkpoint] = (real.folder / "models" / "Stable-diffusion").glob("*.safetensors")
    there = server.base_dir / "models" / "checkpoints" / checkpoint.name
    if not there.exists():
        there.symlink_to(checkpoint)
    return node("CheckpointLoaderSimple", ckpt_name=checkpoint.name)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Of two pictures: the mean over all values, of 255."""
    return float(np.abs(one - other).mean())


def test_what_is_trained_is_drawn(real: RealWebUI, picture_folder: Callable[..., Path]) -> None:
    """Though it was stopped, resumed, and taken up again by a host after the first one was killed."""
    before = packages()
    settings = {"class_noun": "dog", "resolution": 64, "rank": 4, "learning_rate": 1e-2, "checkpoint_every": 5}
    settings |= {"name": "dög", "steps": LONG, "preview_every": 20, "preview_steps": 1, "preview_count": 1}
    [message] = real.call("start", images=real.upload(*sorted(picture_folder(3).iterdir())), **settings)
    assert text_of(message).startswith("Training started.")
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
    assert (card["sd version"], card["activation text"], card["preferred weight"]) == ("SD1", "sks dog", 1.0)
    made = real.loras / "dög.safetensors"
    [path] = [one["path"] for one in real.get("/sdapi/v1/loras") if one["name"] == "dög"]
    assert Path(path).samefile(made)

    plain = real.draw("sks dog")
    assert np.array_equal(plain, real.draw("sks dog")), "the same prompt and seed, the same picture"
    assert np.array_equal(plain, real.draw("sks dog <lora:dög:0>"))
    drawn = real.draw("sks dog <lora:dög:1>")
    assert difference(drawn, plain) > 1

    step = real.get(f"/dreambooth{run}")["adapters"][0]["step"]
    early = real.loras / real.post(f"{run}/use", {"step": step})["file"]
    weights, others = load_file(made), load_file(early)
    assert any(not torch.equal(weights[name], others[name]) for name in weights)
    made.write_bytes(early.read_bytes())
    real.post(f"{run}/use", {"step": step})
    assert not np.array_equal(real.draw("sks dog <lora:dög:1>"), drawn), "its weights are read anew"
    assert packages() == before, "not one package of the host's changed"


@pytest.mark.comfy
def test_its_effect_is_that_in_comfyui(
    real: RealWebUI, subject: Path, server: ComfyServer, base: dict[str, Any]
) -> None:
    """With the same base, seed, steps and CFG, of Euler. Both draw noise on the CPU, where it is the same; apart from
    that, each has a sampler and kernels of its own, so a value may be rounded to its neighbour."""
    shutil.copy(subject, server.base_dir / "models" / "loras")
    strengths = {"strength_model": 1.0, "strength_clip": 1.0}
    lora = node("LoraLoader", model=["base", 0], clip=["base", 1], lora_name=subject.name, **strengths)
    prompt = {"base": base, "lora": lora}
    for prefix, source in (("plain", "base"), ("drawn", "lora")):
        prompt |= drawing(prefix, [source, 0], [source, 1], side=SIDE, **DRAWN)
    entry = server.wait(server.queue(prompt))
    theirs = {prefix: picture(server, entry, f"{prefix}save").astype(int) for prefix in ("plain", "drawn")}
    ours = {"plain": real.draw("sks dog"), "drawn": real.draw(f"sks dog <lora:{subject.stem}:1>")}
    assert difference(ours["plain"], theirs["plain"]) < 0.5
    assert difference(ours["drawn"], theirs["drawn"]) < 0.5
    effect, other = ((of["drawn"] - of["plain"]).ravel().astype(float) for of in (ours, theirs))
    assert np.abs(effect).mean() > 5, "there is something to compare"
    assert effect @ other / np.linalg.norm(effect) / np.linalg.norm(other) > 0.999


@pytest.mark.comfy
def test_a_learned_word_is_that_in_comfyui(real: RealWebUI, server: ComfyServer, base: dict[str, Any]) -> None:
    """Pivotal tuning: the card calls the embedding, which lies among the host's; ComfyUI draws alike with the files."""
    real.draw("word-sks dog")  # so that the model is loaded before there is such an embedding
    learned = {"token_vectors": 2, "token_lr": 0.5, "text_encoder_lr": 1e-3}
    made = real.train(name="word", class_noun="dog", folder=str(DEMO / "subject"), **learned, **QUICK)
    card = json.loads(made.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["activation text"] == "word-sks dog"
    (server.base_dir / "models" / "embeddings").mkdir(exist_ok=True)
    shutil.copy(made, server.base_dir / "models" / "loras")
    folders = [real.folder / "embeddings", real.folder / "models" / "embeddings"]  # of Forge, of Forge Classic
    [embedding] = [path for folder in folders for path in folder.glob("word-sks.safetensors")]
    shutil.copy(embedding, server.base_dir / "models" / "embeddings")
    strengths = {"strength_model": 1.0, "strength_clip": 1.0}
    lora = node("LoraLoader", model=["base", 0], clip=["base", 1], lora_name=made.name, **strengths)
    prompt = {"base": base, "lora": lora}
    words = {"learned": "embedding:word-sks dog", "other": "sks dog"}
    for prefix, text in words.items():
        prompt |= drawing(prefix, ["lora", 0], ["lora", 1], side=SIDE, text=text, **DRAWN)
    entry = server.wait(server.queue(prompt))
    theirs = {prefix: picture(server, entry, f"{prefix}save").astype(int) for prefix in words}
    ours = {"learned": real.draw("word-sks dog <lora:word:1>"), "other": real.draw("sks dog <lora:word:1>")}
    assert difference(theirs["learned"], theirs["other"]) > 2, "there is something to compare"
    assert difference(ours["learned"], theirs["learned"]) < 0.5
    if difference(ours["other"], theirs["other"]) > 0.5:  # the first web UI reads what the LoRA file bundles
        assert np.array_equal(ours["other"], ours["learned"])


def test_a_subject_is_merged_with_a_style(real: RealWebUI, subject: Path, style: Path) -> None:
    real.call("merge_loras_refresh")
    chosen = [subject.stem, style.stem]
    result, picture = real.call(
        "merge_start", merge_loras=chosen, merge_strengths="1, 0.8", merge_name="rex in pixels", merge_method="sum"
    )
    assert "rex in pixels.safetensors" in text_of(result)
    assert picture, "the picture of the report"
    assert "rex in pixels" in [one["name"] for one in real.get("/sdapi/v1/loras")], "without a restart"
    merged = real.draw("sks dog <lora:rex in pixels:1>")
    alone = real.draw(f"sks dog <lora:{subject.stem}:1>")
    both = real.draw(f"sks dog <lora:{subject.stem}:1> <lora:{style.stem}:0.8>")
    assert difference(merged, real.draw("sks dog")) > 2
    assert difference(merged, alone) > 2
    assert difference(merged, both) < 0.5, "it does what both do together"


_EDITOR = """
() => {
  const editor = document.getElementById("txt2img_lora_edit_user_metadata");
  const fields = [...editor.querySelectorAll("textarea, input:not([type=radio]), input:checked")];
  return editor.querySelector("img.preview")?.naturalWidth > 0 && fields.map((one) => one.value);
}
"""


def read_card(page: Any, card: Any, kind: str) -> tuple[list[str], str]:
    """What the host's own dialogs for a LoRA show: the fields of its card, and the metadata of its file."""
    card.hover()
    card.locator(".edit-button").click()
    page.locator("#txt2img_lora_edit_user_metadata").get_by_label("Activation text").wait_for()
    shown = page.wait_for_function(_EDITOR).json_value()
    shot(page, f"{kind}-card-edit")
    page.keyboard.press("Escape")
    card.hover()
    card.locator(".metadata-button").click()
    metadata = page.locator(".global-popup-inner", has_text="trigger_phrase")
    metadata.wait_for()
    text = metadata.text_content()  # Forge folds it
    shot(page, f"{kind}-card-metadata")
    page.keyboard.press("Escape")
    return shown, text


def begin(page: Any, button: str) -> None:
    """Press a button until the host has let go of the job before."""
    is_refused = "document.getElementById('dreambooth_train').textContent.includes('still running')"
    has_answer = f"() => {is_refused} || ({PANEL})().buttons.includes('Stop')"
    while True:
        page.locator(button).first.click()
        page.wait_for_function(has_answer)
        if "Stop" in page.evaluate(PANEL)["buttons"]:
            return


@pytest.mark.browser
@pytest.mark.skipif(find_browser() is None, reason="no browser: install Chromium and playwright")
def test_from_pictures_to_a_prompt_in_a_browser(real: RealWebUI, picture_folder: Callable[..., Path]) -> None:
    with opened(real) as page:
        page.locator("#dreambooth_images input[type=file]").first.set_input_files([*picture_folder(3).iterdir()])
        wait_for_text(page, "#dreambooth_report", "3 pictures")
        fill(page, class_noun="dog", name="seen", steps=LONG, resolution=64)
        page.locator(".label-wrap:visible", has_text="Previews").click()
        fill(page, preview_every=5, preview_steps=1, preview_count=1)
        shot(page, f"{real.kind}-filled")
        begin(page, "button#dreambooth_start:visible")
        begun = wait_for(page, "panel.state === 'training' && panel.samples > 0")
        assert begun["buttons"] == ["Stop"]
        grown = wait_for(page, f"panel.steps > {begun['steps']} && panel.legend.startsWith('step ')")
        shot(page, f"{real.kind}-training")

        page.reload()
        show(page)
        as_before = f"panel.steps >= {grown['steps']} && panel.samples > 0"
        wait_for(page, f"{as_before} && panel.legend.startsWith('step ')")  # the curve is drawn in a frame of its own
        shot(page, f"{real.kind}-reloaded")
        press(page, "Stop")
        stopped = wait_for(page, "panel.state === 'stopped' && panel.buttons.includes('Resume')")
        assert stopped["buttons"] == ["Resume"]
        shot(page, f"{real.kind}-stopped")
        real.shorten("seen", real.job()["step"] + 10)
        begin(page, "#dreambooth-training-panel button:visible:text('Resume')")
        done = wait_for(page, "panel.state === 'done' && panel.buttons.length")
        assert (done["buttons"], done["trouble"]) == (["Send to txt2img"], [])
        shot(page, f"{real.kind}-done")

        press(page, "Send to txt2img")
        prompt = page.locator("#txt2img_prompt textarea")
        prompt.wait_for()
        assert prompt.input_value() == "sks dog <lora:seen:1>"
        page.locator("#txt2img_extra_tabs > .tab-nav > button", has_text="Lora").click()
        card = page.locator("#txt2img_lora_cards .card", has_text="seen")
        card.wait_for()
        card.locator("img.preview").evaluate("image => image.decode()")
        shot(page, f"{real.kind}-card")
        shown, metadata = read_card(page, card, real.kind)
        assert {"SD1", "sks dog", "1"} <= set(shown), "its version, words and weight, to be edited"
        assert "a photo of sks dog" in metadata
        prompt.fill("")
        card.click()
        page.wait_for_function("() => document.querySelector('#txt2img_prompt textarea').value")
        assert sorted(prompt.input_value().split()) == ["<lora:seen:1>", "dog", "sks"], "its words and weight"
