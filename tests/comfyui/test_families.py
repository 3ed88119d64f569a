"""Stable Diffusion 2 and XL in a real ComfyUI over HTTP: trained with their text encoders, no key lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import sd2_checkpoint, sdxl_checkpoint
from comfy_graphs import drawing, graph, node, picture, run_template
from comfy_host import ComfyServer, PromptFailed
from helpers import HALF
from safetensors.torch import load_file
from workflow_recipes import XL_CHECKPOINT

pytestmark = pytest.mark.comfy
WRITERS: dict[str, Any] = {
    "sd2": lambda path: sd2_checkpoint(path, dtype=torch.float16),
    "sd2-v": lambda path: sd2_checkpoint(path, velocity=True, dtype=torch.float16),
    "sdxl": lambda path: sdxl_checkpoint(path, dtype=torch.float16),
    "sdxl-v": lambda path: sdxl_checkpoint(path, v_pred=True, ztsnr=True, dtype=torch.float16),
}
TEXT_MODULES = {"sd2": {"lora_te_": 138}, "sdxl": {"lora_te1_": 72, "lora_te2_": 192}}


def on(checkpoint: Path, prompt: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The prompt with that checkpoint."""
    return prompt | {"base": node("CheckpointLoaderSimple", ckpt_name=checkpoint.name)}


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_training_with_text_encoders_and_generating(kind: str, server: ComfyServer) -> None:
    """One run over HTTP, with the base as the teacher: Train LoRA's output, ComfyUI's Load LoRA of its file, and the
    base, drawn side by side.
    """
    checkpoint = WRITERS[kind](server.base_dir / "models" / "checkpoints" / f"{kind}-test.safetensors")
    second_rate = 1e-2 if kind == "sdxl" else 0.0
    settings = node("DreamBoothTrainingSettings", text_encoder_2_lr=second_rate, precision=HALF, prior="model")
    changes = {"name": f"{kind} trained", "text_encoder_lr": 1e-2, "targets": "all", "learning_rate": 1e-2}
    prompt = on(checkpoint, graph(settings=["settings", 0], **changes)) | {"settings": settings}
    server.wait(server.queue(prompt))
    file = server.base_dir / "models" / "loras" / f"{kind} trained.safetensors"
    names = {key.split(".")[0] for key in load_file(file)}
    for prefix, count in TEXT_MODULES[kind].items():
        assert sum(name.startswith(prefix) for name in names) == count
    loader = node(
        "LoraLoader", model=["base", 0], clip=["base", 1], lora_name=file.name, strength_model=1.0, strength_clip=1.0
    )
    prompt |= {"loader": loader}
    for prefix, source in (("base", "base"), ("trained", "train"), ("loaded", "loader")):
        prompt |= drawing(prefix, [source, 0], [source, 1])
    entry = server.wait(server.queue(prompt))
    drawn = {name: picture(server, entry, f"{name}save") for name in ("base", "trained", "loaded")}
    np.testing.assert_array_equal(drawn["trained"], drawn["loaded"])
    assert (drawn["trained"] != drawn["base"]).any()
    assert "not loaded" not in server.log().lower()
    if kind == "sdxl":
        checkpoint.rename(checkpoint.with_name(XL_CHECKPOINT))
        history, run = run_template("sdxl_on_a_small_card", server)
        saved = next(key for key, entry in run.items() if entry["class_type"] == "SaveImage")
        assert picture(server, history, saved).std() > 0
        checkpoint = checkpoint.with_name(XL_CHECKPOINT)
    server.free()
    checkpoint.unlink()


def test_the_graphs_prediction_type_is_taken_over(server: ComfyServer) -> None:
    """A velocity model is trained as ComfyUI samples it; the file says so. CLIP Set Last Layer counts, too."""
    checkpoint = WRITERS["sd2-v"](server.base_dir / "models" / "checkpoints" / "sd2-velocity.safetensors")
    found = {}
    for name, sampling in (("detected", None), ("overridden", "eps")):
        prompt = on(checkpoint, graph(name=name))
        if sampling:
            prompt["sampling"] = node("ModelSamplingDiscrete", model=["base", 0], sampling=sampling, zsnr=False)
            prompt["skip"] = node("CLIPSetLastLayer", clip=["base", 1], stop_at_clip_layer=-3)
            prompt["train"]["inputs"] |= {"model": ["sampling", 0], "clip": ["skip", 0]}
        server.wait(server.queue(prompt))
        found[name] = metadata(server.base_dir / "models" / "loras" / f"{name}.safetensors")
    assert found["detected"]["modelspec.prediction_type"] == "v"
    assert found["detected"]["ss_base_model_version"] == "sd_v2_v"
    assert found["detected"]["ss_clip_skip"] == "None"
    assert found["overridden"]["modelspec.prediction_type"] == "epsilon"
    assert found["overridden"]["ss_clip_skip"] == "3"
    prompt = on(checkpoint, graph(name="lcm"))
    prompt["sampling"] = node("ModelSamplingDiscrete", model=["base", 0], sampling="lcm", zsnr=False)
    prompt["train"]["inputs"] |= {"model": ["sampling", 0]}
    with pytest.raises(PromptFailed) as failure:
        server.wait(server.queue(prompt))
    assert "LCM" in failure.value.exception_message
    server.free()
    checkpoint.unlink()


def metadata(path: Path) -> dict[str, str]:
    from pack.trainer.adapters.kohya import read_header

    return read_header(path)[1]
