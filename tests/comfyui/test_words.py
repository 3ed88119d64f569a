"""Learned words in a real ComfyUI: its own loaders read from the files of a run what the run has learned."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import sdxl_checkpoint
from comfy_graphs import drawing, graph, node, picture
from comfy_host import CHECKPOINT, ENVIRONMENT, ComfyServer, find_comfyui, find_python
from helpers import ROOT
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.models.open import open_base
from pack.trainer.models.sampling import build_on_device
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy
VECTORS = {"sd1": {"emb_params": (2, 768)}, "sdxl": {"clip_l": (2, 768), "clip_g": (2, 1280)}}


@dataclass(frozen=True)
class Learned:
    """A run in ComfyUI that has learned a word, and what came of it."""

    kind: str
    checkpoint: Path
    prompt: dict[str, Any]
    adapter: Path
    embedding: Path


@pytest.fixture(params=["sd1", "sdxl"])
def learned(request: pytest.FixtureRequest, server: ComfyServer) -> Iterator[Learned]:
    kind = request.param
    models = server.base_dir / "models"
    checkpoint = models / "checkpoints" / CHECKPOINT
    if kind == "sdxl":
        checkpoint = sdxl_checkpoint(checkpoint.with_name("word-xl.safetensors"), dtype=torch.float16)
    name = f"word-{kind}"
    settings = node("DreamBoothTrainingSettings", token_vectors=2, token_lr=0.1, save_precision="fp32")
    prompt = graph(name=name, settings=["settings", 0], learning_rate=1e-2) | {"settings": settings}
    prompt |= {"base": node("CheckpointLoaderSimple", ckpt_name=checkpoint.name)}
    server.wait(server.queue(prompt))
    embedding = models / "embeddings" / f"{name}-sks.safetensors"
    yield Learned(kind, checkpoint, prompt, models / "loras" / f"{name}.safetensors", embedding)
    server.free()
    if kind == "sdxl":
        checkpoint.unlink()


def test_a_word_is_what_the_run_has_learned(learned: Learned, server: ComfyServer, tmp_path: Path) -> None:
    """Drawn by Train LoRA's outputs, by our loader, and by ComfyUI's own from the files; and encoded as here."""
    tensors = load_file(learned.embedding)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == VECTORS[learned.kind]
    by_comfyui = node(
        "LoraLoader",
        model=["base", 0],
        clip=["base", 1],
        lora_name=learned.adapter.name,
        strength_model=1.0,
        strength_clip=1.0,
    )
    by_us = node(
        "DreamBoothApplyLora",
        model=["base", 0],
        clip=["base", 1],
        lora=["file", 0],
        strength_model=1.0,
        strength_clip=1.0,
    )
    prompt = learned.prompt | {
        "theirs": by_comfyui,
        "file": node("DreamBoothLoadLora", file=learned.adapter.name),
        "ours": by_us,
    }
    words = {
        "trained": ("train", "embedding:sks dog"),
        "loaded": ("theirs", f"embedding:{learned.embedding.stem} dog"),
        "applied": ("ours", "embedding:sks dog"),
        "unread": ("train", "sks dog"),
    }
    for prefix, (source, text) in words.items():
        prompt |= drawing(prefix, [source, 0], [source, 1], text=text)
    entry = server.wait(server.queue(prompt))
    drawn = {name: picture(server, entry, f"{name}save") for name in words}
    np.testing.assert_array_equal(drawn["trained"], drawn["loaded"])
    np.testing.assert_array_equal(drawn["trained"], drawn["applied"])
    assert (drawn["trained"] != drawn["unread"]).any()
    assert "does not exist" not in server.log()

    texts = ["a photo of {} dog", "{}", "the {}, by night"]
    comfyui = find_comfyui()
    assert comfyui is not None
    script = ROOT / "tests" / "support" / "comfy_encode.py"
    command = [find_python(comfyui), script, comfyui, learned.checkpoint, learned.adapter, learned.embedding.parent]
    command += [
        tmp_path / "encoded.safetensors",
        *(text.format(f"embedding:{learned.embedding.stem}") for text in texts),
    ]
    done = subprocess.run([str(word) for word in command], env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "encoded.safetensors")
    model = build_on_device(
        open_base(learned.checkpoint, comfyui / "comfy" / "sd1_tokenizer"), torch.device("cpu"), "fp32"
    )
    merge_into(model, read_adapter(learned.adapter), 1.0)
    with torch.no_grad():
        encoded = model.encode_prompts([text.format("sks") for text in texts])
        model.learn([])
        without = model.encode_prompts([text.format("sks") for text in texts])
    ours = torch.cat([encoded[name] for name in ("text", "text_2") if name in encoded], dim=-1)
    # both round otherwise, by 2e-3 of numbers up to 10; another token at one place is a hundred times farther away
    torch.testing.assert_close(theirs["text"], ours, rtol=0, atol=1e-2)
    assert (encoded["text"] - without["text"]).abs().max() > 0.1
    if learned.kind == "sdxl":
        torch.testing.assert_close(theirs["pooled"], encoded["pooled_2"], rtol=0, atol=1e-2)
