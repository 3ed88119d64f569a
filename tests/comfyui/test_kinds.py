"""Every kind of adapter, loaded by ComfyUI's own loader, changes its UNet's prediction as it changes ours."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

import pytest
import torch
from checkpoints import sd15_checkpoint
from comfy_graphs import KINDS, trained_file
from comfy_host import ENVIRONMENT, find_comfyui, find_python
from helpers import DEMO, ROOT
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.models.open import open_base
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI: set COMFYUI_PATH, or install it in ~/comfy/ComfyUI"),
]


@dataclass(frozen=True)
class Predictions:
    """Predictions by adapter: ComfyUI's with its own loader, ComfyUI's with our Apply LoRA ("ours-…"), the engine's."""

    theirs: dict[str, Tensor]
    engines: dict[str, Tensor]

    def deviation(self, name: str, kind: str) -> float:
        """How far ComfyUI's change is from ours, relative to ours."""
        ours = self.engines[kind] - self.engines["base"]
        return float((self.theirs[name] - self.theirs["base"] - ours).norm() / ours.norm())


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> Predictions:
    folder = tmp_path_factory.mktemp("kinds ü")
    comfyui = find_comfyui()
    assert comfyui is not None
    checkpoint = sd15_checkpoint(folder / "slim.safetensors")
    base = open_base(checkpoint, DEMO / "base" / "tokenizer")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "latents": torch.randn((1, 4, 8, 8), generator=generator),
        "timesteps": torch.tensor([400]),
        "text": torch.randn((1, 77, 768), generator=generator),
    }
    save_file(inputs, folder / "inputs.safetensors")
    files = {kind: trained_file(base, kind, folder) for kind in KINDS}
    command = [find_python(comfyui), ROOT / "tests" / "support" / "comfy_predict.py", comfyui, checkpoint]
    command += [folder / "inputs.safetensors", folder / "outputs.safetensors", *files.values()]
    words = [str(word) for word in command] + [f"ours:{files[kind]}" for kind in ("lora", "dora")]
    done = subprocess.run(words, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not loaded" not in (done.stdout + done.stderr).lower()
    engines = {}
    for kind, path in {"base": None, **files}.items():
        model = base.family.build(base)
        if path is not None:
            merge_into(model, read_adapter(path), 1.0)
        with torch.no_grad():
            engines[kind] = model.predict(inputs["latents"], inputs["timesteps"], {"text": inputs["text"]})
    checkpoint.unlink()
    return Predictions(load_file(folder / "outputs.safetensors"), engines)


def test_the_plain_unets_agree(predictions: Predictions) -> None:
    ours = predictions.engines["base"]
    assert float((predictions.theirs["base"] - ours).norm() / ours.norm()) < 1e-4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])
def test_a_kind_changes_the_prediction_alike(kind: str, predictions: Predictions) -> None:
    change = predictions.engines[kind] - predictions.engines["base"]
    assert float(change.norm() / predictions.engines["base"].norm()) > 0.005
    assert predictions.deviation(kind, kind) < 1e-3


def test_dora_is_exact_through_our_node_alone(predictions: Predictions) -> None:
    """ComfyUI 0.28 divides by the rows' lengths before the change; our Apply LoRA gives it scales that make up for it.

    Should this fail because ComfyUI mended it, remove `_corrected_dora_scales` from nodes/host.py.
    """

    assert predictions.deviation("ours-dora", "dora") < 1e-3
    assert predictions.deviation("ours-lora", "lora") < 1e-3
    assert 0.05 < predictions.deviation("dora", "dora") < 1.0
