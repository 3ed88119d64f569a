"""Flow-matching models, lent by ComfyUI: latents, prompts and predictions are those of ComfyUI's own code.

With small random weights, plain and in eight or four bits; the tokenizer and the sizes of the autoencoders are real.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anima_checkpoints
import flux2_checkpoints
import krea2_checkpoints
import pytest
import torch
import zimage_checkpoints
from anima_checkpoints import anima_weights
from comfy_host import find_comfyui, find_python
from flux2_checkpoints import flux2_weights, in_float8
from helpers import HANGS, ROOT
from krea2_checkpoints import krea2_weights
from safetensors.torch import load_file, save_file
from zimage_checkpoints import zimage_weights

pytestmark = pytest.mark.comfy
PROMPTS = ["a photo of sks dog", "", "ein Hündchen (rot:1.3), 狗", "long " * 600]
CASES = {"square": ((1, 8, 8), 250.0), "wide": ((1, 4, 12), 999.0), "two": ((2, 6, 3), 41.5)}
WITHIN = 1e-4  # float32 and other orders of the same sums


@dataclass(frozen=True)
class Lent:
    """What ComfyUI lends.

    Attributes:
        weights: makes the tensors of the networks.
        channels: of the latents.
        pixels: side of the square that is one latent pixel.
        text_width: numbers of each token of a prompt.
        pads: whether short prompts are padded to 512 tokens.
        text_within: by how much a prompt may differ: where layers of the transformer's file read it, of which float8
            weights are dequantised in another order.
        views: how many of the network's tensors are further views of tensors of which it has one already.
    """

    weights: Callable[[], Any]
    channels: int
    pixels: int
    text_width: int
    pads: bool
    views: int = 0
    text_within: float = 0.0


FAMILIES = {
    "flux2": Lent(lambda: flux2_weights(flux2_checkpoints.COMFY_SHAPE), 128, 16, 96, pads=True),
    "zimage": Lent(lambda: zimage_weights(zimage_checkpoints.COMFY_SHAPE), 16, 8, 32, pads=False, views=2 * 6),
    "krea2": Lent(lambda: krea2_weights(krea2_checkpoints.COMFY_SHAPE), 16, 8, 12 * 40, pads=False),
    "anima": Lent(lambda: anima_weights(anima_checkpoints.COMFY_SHAPE), 16, 8, 32, pads=True, text_within=1e-6),
}


@dataclass(frozen=True)
class Found:
    """What each program gave."""

    family: Lent
    tensors: dict[str, torch.Tensor]


@pytest.fixture(
    scope="module",
    params=[(family, stored) for family in FAMILIES for stored in ("float32", "float8")]
    + [("krea2", stored) for stored in ("int8", "nvfp4", "mxfp8")]
    + [("anima", "int8")]
    + [("zimage", "int8 rotated")],
    ids=lambda param: " ".join(param),
)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI")
    name, stored = request.param
    family = FAMILIES[name]
    folder = tmp_path_factory.mktemp(f"{name} ü")
    weights = family.weights()
    denoiser = in_float8(weights.denoiser) if stored == "float8" else dict(weights.denoiser)
    save_file(denoiser, folder / "transformer.safetensors")
    save_file(dict(weights.vae), folder / "vae.safetensors")
    save_file(dict(weights.text), folder / "text.safetensors")
    generator = torch.Generator().manual_seed(1)
    inputs = {"pixels": torch.rand((1, 3, 64, 96), generator=generator) * 2 - 1}
    for case, ((batch, height, width), timestep) in CASES.items():
        inputs[f"noisy {case}"] = torch.randn((batch, family.channels, height, width), generator=generator)
        inputs[f"timesteps {case}"] = torch.full((batch,), timestep)
    save_file(inputs, folder / "inputs.safetensors")
    script = ROOT / "tests" / "support" / "comfy_flow.py"
    given = [str(comfyui), name, stored, str(folder), str(folder / "found")]
    subprocess.run([str(find_python(comfyui)), str(script), *given, *PROMPTS], check=True, timeout=HANGS)
    return Found(family, load_file(folder / "found"))


@pytest.mark.parametrize("case", CASES)
def test_it_predicts_as_comfyui_does(found: Found, case: str) -> None:
    theirs = found.tensors[f"prediction {case}"]
    assert theirs.std() > 0.1
    torch.testing.assert_close(found.tensors[f"ours prediction {case}"], theirs, rtol=0, atol=WITHIN)


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_prompts_are_those_that_comfyui_feeds(found: Found, number: int) -> None:
    """All but the last, of which the model reads the beginning."""
    ours, theirs = found.tensors[f"ours text {number}"], found.tensors[f"text {number}"]
    is_whole = found.family.pads or len(PROMPTS[number]) > 512
    assert (len(ours) == 512) is is_whole
    assert ours.shape[1] == found.family.text_width
    torch.testing.assert_close(ours, theirs, rtol=0, atol=found.family.text_within)


def test_latents_are_comfyuis(found: Found) -> None:
    height, width = 64 // found.family.pixels, 96 // found.family.pixels
    assert found.tensors["latents"].shape == (1, found.family.channels, height, width)
    torch.testing.assert_close(found.tensors["ours latents"], found.tensors["latents"], rtol=0, atol=WITHIN)


def test_every_tensor_of_the_transformer_is_borrowed(found: Found) -> None:
    borrowed, copied = found.tensors["borrowed"].tolist()
    assert copied == 0
    assert borrowed == len(found.family.weights().denoiser) + found.family.views
