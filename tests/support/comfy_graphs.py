"""Graphs of the pack's nodes in ComfyUI's API format, and what the tests of nodes look at."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_host import CHECKPOINT, ComfyServer
from helpers import ROOT
from pack.trainer.adapters.kohya import write_adapter
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import TrainableAdapter
from PIL import Image
from workflows import as_prompt

Prompt = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def seed_of_test() -> int:
    """A seed that no other test has, so that none finds the run of another."""
    name, _, _ = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")
    return zlib.crc32(name.encode()) >> 1


def graph(**changes: Any) -> Prompt:
    """Load Checkpoint → Subject → Train LoRA, two small steps; `changes` go to Train LoRA."""
    train = {"name": "dog", "steps": 2, "learning_rate": 1e-3, "rank": 4, "targets": "attention", "resolution": 64}
    train |= {"adapter": "lora", "text_encoder_lr": 0.0, "base_lora_strength": 1.0}
    return {
        "base": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "subject": node("DreamBoothSubject", folder="dog", token="sks", class_noun="dog", caption="a {token} {class}"),
        "train": node(
            "DreamBoothTrainLora",
            model=["base", 0],
            clip=["base", 1],
            vae=["base", 2],
            subject=["subject", 0],
            **{**train, "seed": seed_of_test(), **changes},
        ),
    }


def drawing(
    prefix: str, model: list[Any], clip: list[Any], *, side: int = 64, text: str = "sks dog", **sampling: Any
) -> Prompt:
    """Nodes that draw a picture with `model` and `clip` and save it as node `<prefix>save`; `sampling`: of KSampler."""
    sampling = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"} | sampling
    texts = {
        f"{prefix}{sign}": node("CLIPTextEncode", text=words, clip=clip) for sign, words in (("+", text), ("-", ""))
    }
    return texts | {
        f"{prefix}latent": node("EmptyLatentImage", width=side, height=side, batch_size=1),
        f"{prefix}sample": node(
            "KSampler",
            model=model,
            positive=[f"{prefix}+", 0],
            negative=[f"{prefix}-", 0],
            latent_image=[f"{prefix}latent", 0],
            denoise=1.0,
            **sampling,
        ),
        f"{prefix}decode": node("VAEDecode", samples=[f"{prefix}sample", 0], vae=["base", 2]),
        f"{prefix}save": node("SaveImage", images=[f"{prefix}decode", 0], filename_prefix=prefix or "picture"),
    }


def picture(server: ComfyServer, entry: dict[str, Any], node_id: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.view(entry["outputs"][node_id]["images"][0]))))


def run_template(
    name: str, server: ComfyServer, replaced: Mapping[str, dict[str, Any]] | None = None
) -> tuple[dict[str, Any], Prompt]:
    """Run a template, smaller, so that it takes seconds; its history and the prompt.

    Args:
        name: Of its file.
        server: Where it runs.
        replaced: Type of a node → what stands in its place.
    """
    workflow = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    prompt = as_prompt(workflow, server.object_info())
    small = {"resolution": 64, "width": 64, "height": 64, "count": 2, "rank": 4, "steps": 2, "preview_every": 0}
    small |= {"seed": seed_of_test()}
    for node_id, entry in prompt.items():
        entry["inputs"].update({name: value for name, value in small.items() if name in entry["inputs"]})
        prompt[node_id] = (replaced or {}).get(entry["class_type"], entry)
    return server.wait(server.queue(prompt)), prompt


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "locon": {"targets": "all", "conv_rank": 2, "conv_alpha": 1.0},
    "rslora": {"rank_stabilized": True, "alpha": 2.0},
    "ortho": {"lora_init": "orthogonal", "targets": "all", "alpha": 2.0},
    "dora": {"adapter": "dora", "targets": "all"},
    "loha": {"adapter": "loha", "targets": "all"},
    "lokr": {"adapter": "lokr", "targets": "all"},
    "lokr-factor": {"adapter": "lokr", "lokr_factor": 4, "block_ranks": "mid_block=128"},
    "oft": {"adapter": "oft", "targets": "all", "conv_rank": 8},
    "boft": {"adapter": "boft", "targets": "all", "rank": 16},
}


def trained_file(base: BaseWeights, kind: str, folder: Path) -> Path:
    """An adapter whose every part has moved from its start, as long training would move it."""
    settings = TrainSettings(**{"rank": 4, "targets": "attention-mlp", **KINDS[kind]})
    trained = TrainableAdapter(base.family.build(base), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in trained.layers.values():
            for part, parameter in layer.parameters.items():
                noise = torch.randn(parameter.shape, generator=generator)
                if part == "dora_scale":
                    parameter.mul_(1 + 0.1 * noise)
                else:
                    parameter.add_(noise * (0.3 / parameter[0].numel() ** 0.5))
    path = folder / f"{kind}.safetensors"
    write_adapter(path, trained.adapter(), torch.float32)
    return path
