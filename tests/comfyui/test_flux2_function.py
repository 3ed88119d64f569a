"""FLUX.2 klein, lent by ComfyUI: its latents, prompts and predictions are those of ComfyUI's own code.

With small random weights, plain ones and ones in eight bits; the tokenizer and the sizes of the autoencoder are real.
"""

from __future__ import annotations

import subprocess

import pytest
import torch
from comfy_host import find_comfyui, find_python
from flux2_checkpoints import COMFY_SHAPE, flux2_weights, in_float8
from helpers import HANGS, ROOT
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy
PROMPTS = ["a photo of sks dog", "", "ein Hündchen (rot:1.3), 狗", "long " * 600]
CASES = {"square": ((1, 8, 8), 250.0), "wide": ((1, 4, 12), 999.0), "two": ((2, 6, 3), 41.5)}
WITHIN = 1e-4  # float32 and other orders of the same sums


@pytest.fixture(scope="module", params=["float32", "float8"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI")
    folder = tmp_path_factory.mktemp("flux2 ü")
    weights = flux2_weights(COMFY_SHAPE)
    denoiser = in_float8(weights.denoiser) if request.param == "float8" else dict(weights.denoiser)
    save_file(denoiser, folder / "transformer.safetensors")
    save_file(dict(weights.vae), folder / "vae.safetensors")
    save_file(dict(weights.text), folder / "text.safetensors")
    generator = torch.Generator().manual_seed(1)
    inputs = {"pixels": torch.rand((1, 3, 64, 96), generator=generator) * 2 - 1}
    for case, ((batch, height, width), timestep) in CASES.items():
        inputs[f"noisy {case}"] = torch.randn((batch, 128, height, width), generator=generator)
        inputs[f"timesteps {case}"] = torch.full((batch,), timestep)
    save_file(inputs, folder / "inputs.safetensors")
    script = ROOT / "tests" / "support" / "comfy_flux2.py"
    command = [str(find_python(comfyui)), str(script), str(comfyui), str(folder), str(folder / "found"), *PROMPTS]
    subprocess.run(command, check=True, timeout=HANGS)
    return load_file(folder / "found")


@pytest.mark.parametrize("case", CASES)
def test_it_predicts_as_comfyui_does(found: dict[str, torch.Tensor], case: str) -> None:
    theirs = found[f"prediction {case}"]
    assert theirs.std() > 0.1
    torch.testing.assert_close(found[f"ours prediction {case}"], theirs, rtol=0, atol=WITHIN)


def test_prompts_are_those_that_comfyui_feeds(found: dict[str, torch.Tensor]) -> None:
    """All but the last, of which the model reads the beginning."""
    assert found["ours text"].shape == (len(PROMPTS), 512, 3 * COMFY_SHAPE.text_width)
    torch.testing.assert_close(found["ours text"], found["text"], rtol=0, atol=0)


def test_latents_are_comfyuis(found: dict[str, torch.Tensor]) -> None:
    assert found["latents"].shape == (1, 128, 4, 6)
    torch.testing.assert_close(found["ours latents"], found["latents"], rtol=0, atol=WITHIN)


def test_every_tensor_of_the_transformer_is_borrowed(found: dict[str, torch.Tensor]) -> None:
    borrowed, copied = found["borrowed"].tolist()
    assert copied == 0
    assert borrowed == len(flux2_weights(COMFY_SHAPE).denoiser)
