"""Merging in a real ComfyUI over HTTP: the example graph, and every tool drawn beside what it must equal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from comfy_graphs import CHECKPOINT, Prompt, drawing, node, picture, trained_file
from comfy_host import ComfyServer, PromptFailed, PromptInterrupted
from comfy_page import Page
from helpers import DEMO, ROOT
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from workflows import as_prompt

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("files")]
SIZE = {"method.conv_rank": 0, "method.ratio": 0.0}
FILES = {"dog": "locon", "pixel-art": "lokr", "magnitudes": "dora"}


@pytest.fixture(scope="module")
def files(comfy: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An adapter of each of three kinds."""
    loras = comfy.base_dir / "models" / "loras"
    opened: BaseWeights = open_base(comfy.base_dir / "models" / "checkpoints" / CHECKPOINT, DEMO / "base" / "tokenizer")
    for name, kind in FILES.items():
        trained_file(opened, kind, tmp_path_factory.mktemp("files")).replace(loras / f"{name}.safetensors")
    yield
    for name in FILES:
        (loras / f"{name}.safetensors").unlink()


BASE: Prompt = {"base": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)} | {
    name: node("DreamBoothLoadLora", file=f"{name}.safetensors") for name in FILES
}


def applied(lora: list[Any], model: list[Any], strength: float = 1.0) -> dict[str, Any]:
    """Apply LoRA to a model alone."""
    return node("DreamBoothApplyLora", model=model, lora=lora, strength_model=strength, strength_clip=1.0)


def merged(first: str, second: str, method: Mapping[str, Any], **inputs: Any) -> dict[str, Any]:
    """Merge LoRAs of two files."""
    loras = {"loras.lora_0": [first, 0], "loras.lora_1": [second, 0]}
    dynamic = {"method" if name == "method" else f"method.{name}": value for name, value in method.items()}
    return node("DreamBoothMergeLoras", **loras, strengths="1.0, 0.7", **dynamic, **inputs)


def drawn(server: ComfyServer, prompt: Prompt, *models: str) -> dict[str, np.ndarray]:
    """A picture with each of these nodes' MODEL."""
    for model in models:
        prompt = prompt | drawing(model, [model, 0], ["base", 1])
    entry = server.wait(server.queue(prompt))
    return {model: picture(server, entry, f"{model}save").astype(int) for model in models}


def off(pictures: Mapping[str, np.ndarray], one: str, other: str) -> float:
    """How far two pictures are apart, relative to how far the first is from the base's."""
    change = np.abs(pictures[one] - pictures["base"]).mean()
    assert change > 1
    return float(np.abs(pictures[one] - pictures[other]).mean() / change)


def test_the_example_runs(server: ComfyServer) -> None:
    path = ROOT / "example_workflows" / "merge_subject_and_style.json"
    prompt = as_prompt(json.loads(path.read_text(encoding="utf-8")), server.object_info())
    small = {"width": 64, "height": 64}
    for entry in prompt.values():
        entry["inputs"].update({name: value for name, value in small.items() if name in entry["inputs"]})
        if entry["class_type"] == "KSampler":
            entry["inputs"]["steps"] = 2
    history = server.wait(server.queue(prompt))
    nodes = {entry["class_type"]: key for key, entry in prompt.items()}
    assert picture(server, history, nodes["SaveImage"]).std() > 0
    assert min(picture(server, history, nodes["PreviewImage"]).shape[:2]) > 100
    assert "kept: 1: dog" in history["outputs"][nodes["DreamBoothMergeLoras"]]["text"][0]
    adapter = read_adapter(server.base_dir / "models" / "loras" / "dog-pixel-art.safetensors")
    assert adapter.kind == "LoRA"
    assert json.loads(adapter.metadata["dreambooth.merge"])["method"] == "orthogonal"
    assert "not loaded" not in server.log().lower()


def test_a_sum_draws_as_the_two_do_one_after_the_other(server: ComfyServer) -> None:
    """A LoCon and a LoKr; and a DoRA beside them, whose change needs the model's weights."""
    prompt = BASE | {
        "sum": merged("dog", "pixel-art", {"method": "sum"}),
        "svd": merged("dog", "pixel-art", {"method": "svd", "rank": 0, "energy": 1.0, "conv_rank": 0, "ratio": 0.0}),
        "summed": applied(["sum", 0], ["base", 0]),
        "reduced": applied(["svd", 0], ["base", 0]),
        "first": applied(["dog", 0], ["base", 0]),
        "both": applied(["pixel-art", 0], ["first", 0], 0.7),
        "dora": merged("dog", "magnitudes", {"method": "sum"}, model=["base", 0], clip=["base", 1]),
        "decomposed": applied(["dora", 0], ["base", 0]),
        "alone": applied(["magnitudes", 0], ["base", 0]),
        "above": applied(["dog", 0], ["alone", 0]),
        "scaled": node(
            "DreamBoothScaleLora", lora=["dora", 0], strength_model=0.0, strength_clip=1.0, block_weights="unet=1"
        ),
        "off": applied(["scaled", 0], ["base", 0]),
    }
    pictures = drawn(server, prompt, "base", "summed", "reduced", "both", "off")
    assert off(pictures, "both", "summed") < 0.02
    assert off(pictures, "both", "reduced") < 0.02
    np.testing.assert_array_equal(pictures["off"], pictures["base"])


def test_a_dora_is_merged_with_its_model_alone(server: ComfyServer) -> None:
    """At strength 0.7 its change is 0.7 of what it adds to the base; without the model it is refused."""
    method = {"method": "svd", "rank": 0, "energy": 1.0, "conv_rank": 0, "ratio": 0.0}
    whole = merged("magnitudes", "dog", method, model=["base", 0], clip=["base", 1])
    whole["inputs"]["strengths"] = "1.0, 0"
    prompt = BASE | {
        "merge": whole,
        "merged": applied(["merge", 0], ["base", 0]),
        "alone": applied(["magnitudes", 0], ["base", 0]),
    }
    pictures = drawn(server, prompt, "base", "merged", "alone")
    assert off(pictures, "alone", "merged") < 0.02
    with pytest.raises(PromptFailed) as failure:
        drawn(
            server,
            BASE | {"merge": merged("magnitudes", "dog", {"method": "sum"}), "merged": prompt["merged"]},
            "merged",
        )
    assert "DoRA" in failure.value.exception_message
    assert "model" in failure.value.exception_message


def test_what_a_lora_did_to_a_model_is_extracted_again(server: ComfyServer) -> None:
    extract = node(
        "DreamBoothExtractLora", model=["tuned", 0], base_model=["base", 0], rank=0, energy=1.0, conv_rank=0, ratio=0.0
    )
    prompt = BASE | {
        "tuned": applied(["dog", 0], ["base", 0]),
        "extract": extract,
        "extracted": applied(["extract", 0], ["base", 0]),
        "resize": node("DreamBoothResizeLora", lora=["extract", 0], rank=4, energy=1.0, conv_rank=2, ratio=0.0),
        "resized": applied(["resize", 0], ["base", 0]),
        "inspect": node("DreamBoothInspectLora", lora=["resize", 0], other=["dog", 0]),
        "show": node("PreviewImage", images=["inspect", 1]),
    }
    for name in ("base", "tuned", "extracted", "resized"):
        prompt |= drawing(name, [name, 0], ["base", 1])
    entry = server.wait(server.queue(prompt))
    names = ("base", "tuned", "extracted", "resized")
    pictures = {name: picture(server, entry, f"{name}save").astype(int) for name in names}
    assert off(pictures, "tuned", "extracted") < 0.02
    assert off(pictures, "tuned", "resized") < 0.02
    text = entry["outputs"]["inspect"]["text"][0]
    assert "LoCon" in text
    assert "overlap" in text
    assert "mid " in text
    assert "1.000" in text
    assert picture(server, entry, "show").std() > 10


def learned(**changes: Any) -> dict[str, Any]:
    """Learned Merge, a few small steps."""
    values: dict[str, Any] = {
        "subject_prompt": "a photo of sks dog",
        "style_prompt": "pixel art, a house | pixel art, a car",
        "steps": 2,
        "learning_rate": 0.01,
        "resolution": 64,
        "seed": 0,
        "overlap_weight": 0.01,
        "split": 0.5,
        "pictures": 2,
        "sampling_steps": 2,
        "guidance": 5.0,
        "precision": "fp32",
        "gradient_checkpointing": True,
        "subject_strength": 1.0,
        "style_strength": 0.7,
    }
    wires = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2], "subject_lora": ["dog", 0]}
    return node("DreamBoothLearnedMerge", **wires, style_lora=["pixel-art", 0], **{**values, **changes})


def test_a_learned_merge_starts_at_the_sum_and_moves(server: ComfyServer) -> None:
    prompt = BASE | {
        "sum": merged("dog", "pixel-art", {"method": "sum"}),
        "summed": applied(["sum", 0], ["base", 0]),
        "still": learned(learning_rate=1e-9, steps=1),
        "moved": learned(learning_rate=0.3),
        "start": applied(["still", 0], ["base", 0]),
        "end": applied(["moved", 0], ["base", 0]),
    }
    pictures = drawn(server, prompt, "base", "summed", "start", "end")
    assert off(pictures, "summed", "start") < 0.02
    assert off(pictures, "summed", "end") > 0.02


def test_a_learned_merge_can_be_cancelled(server: ComfyServer) -> None:
    with Page(server, "merge") as page:
        job = server.queue(BASE | {"merge": learned(steps=100_000), "save": save("merge cancelled")}, client_id="merge")
        page.wait_for_progress("merge")
        server.interrupt()
        with pytest.raises(PromptInterrupted):
            server.wait(job)
    assert not (server.base_dir / "models" / "loras" / "merge cancelled.safetensors").exists()


def save(name: str) -> dict[str, Any]:
    return node("DreamBoothSaveLora", lora=["merge", 0], name=name, precision="fp16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strengths": "1.0, much"}, ("strengths", "much")),
        ({"strengths": "1, 2, 3"}, ("strengths", "3", "2")),
        (
            {"method": "svd", "method.rank": 4, "method.energy": 0.5, "method.conv_rank": 0, "method.ratio": 0.5},
            ("ratio",),
        ),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], words: tuple[str, ...], server: ComfyServer) -> None:
    merge = merged("dog", "pixel-art", {"method": "sum"})
    merge["inputs"] |= changes
    with pytest.raises(PromptFailed) as failure:
        server.wait(server.queue(BASE | {"merge": merge, "save": save("never")}))
    for word in words:
        assert word in failure.value.exception_message
