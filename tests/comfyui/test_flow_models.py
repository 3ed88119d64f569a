"""Flow-matching models in a real ComfyUI over HTTP: loaded by ComfyUI's own loaders, trained, and drawn with."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import anima_checkpoints
import flux2_checkpoints
import krea2_checkpoints
import numpy as np
import pytest
import zimage_checkpoints
from anima_checkpoints import anima_weights
from comfy_graphs import drawing, graph, node, picture, run_template
from comfy_host import CHECKPOINT, ComfyServer, PromptFailed
from flux2_checkpoints import flux2_weights, in_float8
from krea2_checkpoints import krea2_weights
from safetensors.torch import load_file, save_file
from workflow_recipes import ANIMA, KLEIN, KREA_2, KREA_2_TURBO, Z_IMAGE
from zimage_checkpoints import zimage_weights

pytestmark = pytest.mark.comfy
PARTS = {"diffusion_models": "denoiser", "vae": "vae", "text_encoders": "text"}


@dataclass(frozen=True)
class Small:
    """A small model of a family.

    Attributes:
        name: of the family.
        weights: makes its tensors.
        files: of its template's loaders.
        template: its name.
        latents: node of its empty latents.
        modules: pattern of the modules in its adapters' keys, and how many there are.
        log: what the log says of its preset.
        drawn_with: name of the distilled model with which its template draws; "": its own.
    """

    name: str
    weights: Callable[[], Any]
    files: Mapping[str, str]
    template: str
    latents: str
    modules: tuple[str, int]
    log: str
    drawn_with: str = ""

    @property
    def clip(self) -> dict[str, Any]:
        """Loads its text encoder, which ComfyUI's own loader knows by its real size alone."""
        return node("LoadSmallQwen3", name=self.files["text_encoders"], family=self.name)


MODELS = {
    small.name: small
    for small in (
        Small(
            "flux2",
            lambda: flux2_weights(flux2_checkpoints.COMFY_SHAPE),
            KLEIN,
            "flux2_klein",
            "EmptyFlux2LatentImage",
            (r"lora_unet_(double|single)_blocks_\d+_\w+", 8 * 2 + 2 * 3),
            "preset animal for flux.2 klein",
        ),
        Small(
            "zimage",
            lambda: zimage_weights(zimage_checkpoints.COMFY_SHAPE),
            Z_IMAGE,
            "z_image",
            "EmptySD3LatentImage",
            (r"diffusion_model\.layers\.\d+\.(attention|feed_forward)\.[\w.]+", 7 * 2),
            "preset animal for z-image",
        ),
        Small(
            "krea2",
            lambda: krea2_weights(krea2_checkpoints.COMFY_SHAPE),
            KREA_2,
            "krea_2",
            "EmptyLatentImage",
            (r"lora_unet_blocks_\d+_(attn|mlp)_\w+", 8 * 2),
            "preset animal for krea 2",
            drawn_with=KREA_2_TURBO,
        ),
        Small(
            "anima",
            lambda: anima_weights(anima_checkpoints.COMFY_SHAPE),
            ANIMA,
            "anima",
            "EmptySD3LatentImage",
            (r"lora_unet_blocks_\d+_(self_attn|cross_attn|mlp)_\w+", 10 * 2),
            "preset animal for anima",
        ),
    )
}


@pytest.fixture(params=MODELS)
def small(request: pytest.FixtureRequest, server: ComfyServer) -> Iterator[Small]:
    """A model, whose small files ComfyUI has under the names of its template, and no longer after the test."""
    model = MODELS[request.param]
    weights = model.weights()
    files = {server.base_dir / "models" / folder / model.files[folder]: part for folder, part in PARTS.items()}
    if model.drawn_with:
        files[server.base_dir / "models" / "diffusion_models" / model.drawn_with] = "denoiser"
    for file, part in files.items():
        file.parent.mkdir(exist_ok=True)
        save_file(dict(getattr(weights, part)), file)
    yield model
    server.free()
    for file in files:
        file.unlink()


def on(small: Small, prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with that model in place of the checkpoint, and its empty latents."""
    loaders = {
        "base": node("UNETLoader", unet_name=small.files["diffusion_models"], weight_dtype="default"),
        "clip": small.clip,
        "vae": node("VAELoader", vae_name=small.files["vae"]),
    }
    moved = {("base", 1): ["clip", 0], ("base", 2): ["vae", 0]}
    for entry in prompt.values():
        for name, value in entry["inputs"].items():
            if isinstance(value, list):
                entry["inputs"][name] = moved.get((value[0], value[1]), value)
        if entry["class_type"] == "EmptyLatentImage":
            entry["class_type"] = small.latents
    return prompt | loaders


def test_it_is_trained_and_draws_as_comfyuis_loader_does(small: Small, server: ComfyServer) -> None:
    """One run with the base as the teacher: Train LoRA's output, ComfyUI's Load LoRA of its file, and the base, drawn
    side by side; the base draws what it drew before.
    """
    before = server.wait(server.queue(on(small, drawing("before", ["base", 0], ["base", 1]))))
    changes = {"targets": "attention-mlp", "learning_rate": 1e-2, "steps": 3, "settings": ["settings", 0]}
    name = f"{small.name} trained"
    prompt = graph(name=name, **changes) | {"settings": node("DreamBoothTrainingSettings", prior="model")}
    server.wait(server.queue(on(small, prompt)))
    file = server.base_dir / "models" / "loras" / f"{name}.safetensors"
    modules = {re.sub(r"\.(lora_\w+\.weight|alpha)$", "", key) for key in load_file(file)}
    pattern, count = small.modules
    assert all(re.fullmatch(pattern, module) for module in modules)
    assert len(modules) == count
    loader = node("LoraLoaderModelOnly", model=["base", 0], lora_name=file.name, strength_model=1.0)
    prompt |= {"loader": loader}
    prompt |= drawing("base", ["base", 0], ["base", 1])
    prompt |= drawing("trained", ["train", 0], ["train", 1])
    prompt |= drawing("loaded", ["loader", 0], ["base", 1])
    entry = server.wait(server.queue(on(small, prompt)))
    drawn = {name: picture(server, entry, f"{name}save") for name in ("base", "trained", "loaded")}
    np.testing.assert_array_equal(drawn["trained"], drawn["loaded"])
    np.testing.assert_array_equal(drawn["base"], picture(server, before, "beforesave"))
    assert (drawn["trained"] != drawn["base"]).any()
    assert "not loaded" not in server.log().lower()


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_other_kinds_draw_as_this_packs_own_node_does(kind: str, small: Small, server: ComfyServer) -> None:
    """Train LoRA's output is what Apply LoRA makes of its file; of a LoKr, ComfyUI's Load LoRA makes it, too."""
    name = f"{small.name} {kind}"
    changes = {"targets": "attention-mlp", "learning_rate": 1e-2, "adapter": kind, "rank": 4}
    prompt = graph(name=name, **changes)
    server.wait(server.queue(on(small, prompt)))
    file = f"{name}.safetensors"
    loaded = {
        "file": node("DreamBoothLoadLora", file=file),
        "apply": node(
            "DreamBoothApplyLora", model=["base", 0], lora=["file", 0], strength_model=1.0, strength_clip=0.0
        ),
        "loader": node("LoraLoaderModelOnly", model=["base", 0], lora_name=file, strength_model=1.0),
    }
    prompt |= loaded | drawing("trained", ["train", 0], ["base", 1]) | drawing("applied", ["apply", 0], ["base", 1])
    prompt |= drawing("loaded", ["loader", 0], ["base", 1]) | drawing("base", ["base", 0], ["base", 1])
    entry = server.wait(server.queue(on(small, prompt)))
    drawn = {name: picture(server, entry, f"{name}save") for name in ("base", "trained", "applied", "loaded")}
    np.testing.assert_array_equal(drawn["trained"], drawn["applied"])
    if kind != "dora":  # ComfyUI divides it by other norms
        np.testing.assert_array_equal(drawn["applied"], drawn["loaded"])
    assert (drawn["trained"] != drawn["base"]).any()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("small", ["zimage"], indirect=True)  # the other's transformer is too small to show
def test_a_training_takes_no_second_transformer(small: Small, server: ComfyServer) -> None:
    """Beside what drawing takes; afterwards nothing is left of it."""
    transformer = sum(tensor.nbytes for tensor in small.weights().denoiser.values())
    assert transformer > 4e8
    server.wait(server.queue(on(small, drawing("first", ["base", 0], ["base", 1]))))
    settings = {"settings": node("DreamBoothTrainingSettings", precision="fp32")}
    growth = []
    for name in ("memory of the first", "memory of the second"):
        server.reset_peak_rss()
        before = server.rss()
        server.wait(server.queue(on(small, graph(name=name, settings=["settings", 0]) | settings)))
        growth.append((server.peak_rss() - before, server.rss() - before))
    assert growth[0][0] < transformer
    assert growth[1][1] < transformer / 4  # allocators keep a little


@pytest.mark.parametrize("stored", ["float32", "float8"])
def test_the_template_runs(stored: str, small: Small, server: ComfyServer) -> None:
    """With its own loaders but that of the text encoder, whose real one knows Qwen 3 by its size."""
    if stored == "float8":
        file = server.base_dir / "models" / "diffusion_models" / small.files["diffusion_models"]
        save_file(in_float8(small.weights().denoiser), file)
    history, run = run_template(small.template, server, {"CLIPLoader": small.clip})
    saved = next(key for key, entry in run.items() if entry["class_type"] == "SaveImage")
    drawn = picture(server, history, saved)
    assert drawn.shape == (64, 64, 3)
    assert drawn.std() > 0
    assert small.log in server.log().lower()


@pytest.mark.parametrize("clip", ["Stable Diffusion's", "another family's"])
def test_the_clip_of_another_model_is_named(clip: str, small: Small, server: ComfyServer) -> None:
    """The other family's is the same Qwen 3, loaded as another type."""
    prompt = on(small, graph(name=f"{small.name} with another clip"))
    if clip == "another family's":
        clips = [
            {"clip": node("LoadSmallQwen3", name=small.files["text_encoders"], family=other)}
            for other in sorted(MODELS.keys() - {small.name})
        ]
    else:
        clips = [{"sd": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)}]
        prompt["train"]["inputs"]["clip"] = ["sd", 1]
    for loader in clips:
        with pytest.raises(PromptFailed, match="CLIP does not match the model"):
            server.wait(server.queue(prompt | loader))
