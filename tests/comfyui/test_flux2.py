"""FLUX.2 klein in a real ComfyUI over HTTP: loaded by ComfyUI's own loaders, trained, and drawn with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from comfy_graphs import drawing, graph, node, picture, run_template
from comfy_host import CHECKPOINT, ComfyServer, PromptFailed
from flux2_checkpoints import COMFY_SHAPE, flux2_weights, in_float8
from safetensors.torch import load_file, save_file
from workflow_recipes import KLEIN

pytestmark = pytest.mark.comfy
SMALL_CLIP = node("LoadSmallQwen3", name=KLEIN["text_encoders"])
PARTS = {"diffusion_models": "denoiser", "vae": "vae", "text_encoders": "text"}


@pytest.fixture
def klein(server: ComfyServer) -> Iterator[ComfyServer]:
    """ComfyUI with small files of the model under the names of the template, which are gone after the test."""
    weights = flux2_weights(COMFY_SHAPE)
    files = [server.base_dir / "models" / folder / KLEIN[folder] for folder in PARTS]
    for file, part in zip(files, PARTS.values(), strict=True):
        file.parent.mkdir(exist_ok=True)
        save_file(dict(getattr(weights, part)), file)
    yield server
    server.free()
    for file in files:
        file.unlink()


def on_klein(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with that model in place of the checkpoint, and its empty latents."""
    loaders = {
        "base": node("UNETLoader", unet_name=KLEIN["diffusion_models"], weight_dtype="default"),
        "clip": SMALL_CLIP,
        "vae": node("VAELoader", vae_name=KLEIN["vae"]),
    }
    moved = {("base", 1): ["clip", 0], ("base", 2): ["vae", 0]}
    for entry in prompt.values():
        for name, value in entry["inputs"].items():
            if isinstance(value, list):
                entry["inputs"][name] = moved.get((value[0], value[1]), value)
        if entry["class_type"] == "EmptyLatentImage":
            entry["class_type"] = "EmptyFlux2LatentImage"
    return prompt | loaders


def test_it_is_trained_and_draws_as_comfyuis_loader_does(klein: ComfyServer) -> None:
    """One run with the base as the teacher: Train LoRA's output, ComfyUI's Load LoRA of its file, and the base, drawn
    side by side; the base draws what it drew before.
    """
    before = klein.wait(klein.queue(on_klein(drawing("before", ["base", 0], ["base", 1]))))
    changes = {"targets": "attention-mlp", "learning_rate": 1e-2, "steps": 3, "settings": ["settings", 0]}
    prompt = graph(name="klein trained", **changes) | {"settings": node("DreamBoothTrainingSettings", prior="model")}
    klein.wait(klein.queue(on_klein(prompt)))
    file = klein.base_dir / "models" / "loras" / "klein trained.safetensors"
    names = {key.split(".")[0] for key in load_file(file)}
    assert {name.split("_")[2] for name in names} == {"double", "single"}
    assert len(names) == 8 * COMFY_SHAPE.double + 2 * COMFY_SHAPE.single
    loader = node("LoraLoaderModelOnly", model=["base", 0], lora_name=file.name, strength_model=1.0)
    prompt |= {"loader": loader}
    prompt |= drawing("base", ["base", 0], ["base", 1])
    prompt |= drawing("trained", ["train", 0], ["train", 1])
    prompt |= drawing("loaded", ["loader", 0], ["base", 1])
    entry = klein.wait(klein.queue(on_klein(prompt)))
    drawn = {name: picture(klein, entry, f"{name}save") for name in ("base", "trained", "loaded")}
    np.testing.assert_array_equal(drawn["trained"], drawn["loaded"])
    np.testing.assert_array_equal(drawn["base"], picture(klein, before, "beforesave"))
    assert (drawn["trained"] != drawn["base"]).any()
    assert "not loaded" not in klein.log().lower()


@pytest.mark.parametrize("stored", ["float32", "float8"])
def test_the_template_runs(stored: str, klein: ComfyServer) -> None:
    """With its own loaders but that of the text encoder, whose real one knows Qwen 3 by its size."""
    if stored == "float8":
        file = klein.base_dir / "models" / "diffusion_models" / KLEIN["diffusion_models"]
        save_file(in_float8(flux2_weights(COMFY_SHAPE).denoiser), file)
    history, run = run_template("flux2_klein", klein, {"CLIPLoader": SMALL_CLIP})
    saved = next(key for key, entry in run.items() if entry["class_type"] == "SaveImage")
    drawn = picture(klein, history, saved)
    assert drawn.shape == (64, 64, 3)
    assert drawn.std() > 0
    assert "preset animal for flux.2 klein" in klein.log().lower()


def test_the_clip_of_another_model_is_named(klein: ComfyServer) -> None:
    """Stable Diffusion's, before anything is encoded."""
    prompt = on_klein(graph(name="klein with another clip"))
    prompt |= {"sd": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)}
    prompt["train"]["inputs"]["clip"] = ["sd", 1]
    with pytest.raises(PromptFailed, match="CLIP is not the model's"):
        klein.wait(klein.queue(prompt))
