"""What the nodes that measure, caption and change adapters hand to the engine and give, every day, in a bare host."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bare_nodes import BASE, CLIP_OF_BASE, UNET_OF_BASE, Host, adapter_of, names, wire_of
from pack.trainer.adapters.kohya import Adapter, write_adapter
from pack.trainer.adapters.layers import LoraLayer
from pack.trainer.evaluation.metrics import CLIP_I, CLIP_SCORE, CLIP_T, DINO_I
from pack.trainer.evaluation.score_table import ScoreGrid, ScoreTable
from PIL import Image

IMAGES = torch.rand((4, 32, 48, 3), generator=torch.Generator().manual_seed(0))
TABLE = ScoreTable(
    [{"picture": "1", "prompt": "a", CLIP_T: 0.25}],
    {CLIP_T: 0.25, CLIP_SCORE: 26.0, CLIP_I: 0.5, DINO_I: 0.75},
    {CLIP_T: "c"},
    ["a note"],
)


@pytest.fixture
def opened(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The feature models that were asked for: CLIP, DINO, device, download, tokenizer."""
    asked: list[tuple[Any, ...]] = []

    def open_models(clip: str, dino: str, device: Any, *, download: bool, tokenizer: Path) -> str:
        asked.append((clip, dino, device.type, download, tokenizer))
        return "extractors"

    monkeypatch.setattr("pack.trainer.evaluation.feature_extractors.FeatureExtractors.open", open_models)
    models = importlib.import_module("pack.nodes.host_models")
    monkeypatch.setattr(models, "clip_tokenizer", lambda: Path("tokenizer"))
    monkeypatch.setattr(models, "feature_model", lambda name: f"path of {name}")
    return asked


@pytest.fixture
def scored(opened: Any, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    calls: list[SimpleNamespace] = []

    def score(pictures: Any, prompts: Any, references: Any, extractors: Any, listener: Any) -> ScoreTable:
        calls.append(SimpleNamespace(pictures=pictures, prompts=prompts, references=references, extractors=extractors))
        return TABLE

    monkeypatch.setattr("pack.trainer.evaluation.score_table.score_pictures", score)
    return calls


# Scores


def test_pictures_are_scored_by_their_prompts(host: Host, opened: Any, scored: list[SimpleNamespace]) -> None:
    output = host.run("score", "ClipScore", images=IMAGES, prompts="a\n\n b c \nd\ne", clip_model=" c ", download=True)
    [call] = scored
    assert [one.open().size for one in call.pictures] == [(48, 32)] * 4
    assert (call.prompts, call.references, call.extractors) == (["a", "b c", "d", "e"], (), "extractors")
    assert opened == [("path of c", "", "cpu", True, Path("tokenizer"))]
    assert output.args == (0.25, 26.0, TABLE.as_text())
    assert output.ui == {"text": [TABLE.as_text()]}
    host.run("score", "ClipScore", images=IMAGES, prompts="a", clip_model="c", download=False)
    assert opened[1][3] is False
    with pytest.raises(Exception, match="no prompts to score against"):
        host.run("score", "ClipScore", images=IMAGES, prompts=" \n", clip_model="c", download=False)
    with pytest.raises(Exception, match=r"'a \| b' contains 2 prompts"):
        host.run("score", "ClipScore", images=IMAGES, prompts="a | b", clip_model="c", download=False)


def test_pictures_are_scored_by_their_subject(host: Host, opened: Any, scored: list[SimpleNamespace]) -> None:
    values = {"images": IMAGES, "subject": host.subject(), "clip_model": "c", "dino_model": "d", "download": False}
    output = host.run("score", "SubjectScore", **values)
    [call] = scored
    assert (len(call.pictures), names(call.references), list(call.prompts)) == (4, ["0.png", "1.png", "2.png"], [])
    assert opened == [("path of c", "path of d", "cpu", False, Path("tokenizer"))]
    assert output.args == (0.5, 0.75, TABLE.as_text())
    assert output.ui == {"text": [TABLE.as_text()]}


def test_a_score_that_was_not_measured_is_no_number(host: Host, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = replace(TABLE, means={CLIP_I: 0.5})
    monkeypatch.setattr("pack.trainer.evaluation.score_table.score_pictures", lambda *asked: table)
    values = {"images": IMAGES, "subject": host.subject(), "clip_model": "c", "dino_model": " ", "download": False}
    clip_i, dino, _ = host.run("score", "SubjectScore", **values).args
    assert clip_i == 0.5
    assert dino != dino
    assert opened[0][1] == "", "blank: none"


def test_settings_are_scored_side_by_side(host: Host, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def score_grid(settings: Any, prompts: Any, references: Any, extractors: Any, listener: Any) -> ScoreGrid:
        asked.append(({title: len(pictures) for title, pictures in settings.items()}, prompts, names(references)))
        assert extractors == "extractors"
        return ScoreGrid(prompts, settings, dict.fromkeys(settings, TABLE))

    monkeypatch.setattr("pack.trainer.evaluation.score_table.score_grid", score_grid)
    settings = {"images_0": IMAGES[:1], "images_1": None, "images_2": IMAGES[:1], "images_3": IMAGES[:1]}
    values = {"settings": settings, "clip_model": "c", "dino_model": "d", "download": True, "name": "both"}
    values |= {"titles": "base\n\n base ", "prompts": "a tree"}
    output = host.run("score_table", "ScoreTable", subject=host.subject(), **values)
    titles = {"base": 1, "base (2)": 1, "setting 3": 1}
    assert asked == [(titles, ["a tree"], ["0.png", "1.png", "2.png"])]
    assert opened == [("path of c", "path of d", "cpu", True, Path("tokenizer"))]
    image, csv, facts = output.args
    assert image.shape[0] == 1
    assert 0 <= image.min() < image.max() <= 1
    folder = host.folder / "output" / "dreambooth" / "scores"
    assert (folder / "both.csv").read_text() == csv
    assert (folder / "both.json").read_text() == facts
    assert Image.open(folder / "both.png").size == (image.shape[2], image.shape[1])
    assert "base (2)" in facts
    assert torch.equal(output.ui["images"], image)
    assert "base (2)" in output.ui["text"][0]
    host.run("score_table", "ScoreTable", **values)
    assert asked[1][2] == []
    assert opened[1][1] == "", "DINO needs a subject"
    assert (folder / "both-2.csv").is_file()


# Pick Best Checkpoint


def run_of(host: Host, *steps: int, **record: Any) -> Path:
    """A run's folder with an adapter of each step, whose numbers are the step."""
    run = host.folder / "output" / "dreambooth" / "runs" / "rex-1"
    for step in steps:
        write_adapter(run / "adapters" / f"step-{step:06d}.safetensors", adapter_of(float(step)), torch.float32)
    (run / "run.json").write_text(json.dumps({"fingerprint": "f", "name": "rex"} | record))
    return run


@pytest.mark.parametrize("known", [True, False])
def test_the_best_checkpoint_is_picked(known: bool, host: Host, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(host, 2, 4, 6)
    calls: list[Any] = []
    best = SimpleNamespace(candidate=None)

    def compare(generator: Any, evaluator: Any, candidates: Any, configs: Any) -> Any:
        calls.append((generator, evaluator, candidates, configs))
        best.candidate = candidates[2]
        return SimpleNamespace(best=best if known else None)

    package = "pack.trainer.evaluation"
    written: list[Any] = []
    monkeypatch.setattr(f"{package}.comparison.compare_candidates", compare)
    monkeypatch.setattr(f"{package}.evaluator.Evaluator", lambda *asked: asked)
    monkeypatch.setattr(f"{package}.generator.CachedGenerator", lambda *asked: asked)
    monkeypatch.setattr(f"{package}.comparison_report.as_plot", lambda _: Image.new("RGB", (3, 2), "white"))
    monkeypatch.setattr(f"{package}.comparison_report.as_contact_sheet", lambda _: Image.new("RGB", (5, 4), "black"))
    monkeypatch.setattr(f"{package}.comparison_report.as_markdown", lambda _: "table")
    monkeypatch.setattr(f"{package}.comparison_report.write_report", lambda _, folder: written.append(folder))
    values = {"prompts": "{subject} in snow\n{token} asleep", "schedulers": "ddim", "steps": "3", "count": 2}
    values |= {"guidance": 2.0, "size": "64", "picture_seed": 5, "picture_batch_size": 3, "precision": "bf16"}
    values |= {"run": " rex-1 ", "clip_model": "c", "dino_model": "d", "download": True}
    output = host.run("pick", "PickBestCheckpoint", subject=host.subject(token="rraj"), **BASE, **values)
    [(generator, evaluator, candidates, configs)] = calls
    assert generator[0] is host.base
    assert host.borrowed == [("model", "clip", "vae")]
    assert generator[1:4] == (host.folder / "output" / "dreambooth" / "pictures", torch.device("cpu"), "bf16")
    assert evaluator[0] == "extractors"
    assert names(evaluator[1]) == ["0.png", "1.png", "2.png"]
    assert evaluator[2:4] == (["a photo of rraj dog in snow", "rraj asleep"], "rraj")
    assert [one.title for one in candidates] == ["base", "rex, step 2", "rex, step 4", "rex, step 6"]
    [config] = configs
    assert (config.width, config.height, config.scheduler, config.steps) == (64, 64, "ddim", 3)
    assert (config.guidance, config.count, config.seed, config.batch_size) == (2.0, 2, 5, 3)
    assert opened == [("path of c", "path of d", "cpu", True, Path("tokenizer"))]
    assert written == [host.folder / "output" / "dreambooth" / "scores" / "rex-1"]
    lora, step, plot, sheet, table = output.args
    assert step == (4 if known else 6), "without a best one the last"
    assert float(lora[f"{UNET_OF_BASE}.lora_up.weight"][0, 0]) == step
    assert (plot.shape, float(plot.min())) == ((1, 2, 3, 3), 1.0)
    assert (sheet.shape, float(sheet.max())) == ((1, 4, 5, 3), 0.0)
    assert table == "table"
    assert output.ui["text"] == ["table"]
    assert torch.equal(output.ui["images"], plot)


def test_a_run_s_checkpoints_are_its_fingerprint(host: Host) -> None:
    run_of(host, 2)
    node = importlib.import_module("pack.nodes.pick").PickBestCheckpoint
    assert node.fingerprint_inputs(run="rex-1", prompts="a") == "[2]"
    run_of(host, 4)
    assert node.fingerprint_inputs(run="rex-1") == "[2, 4]"
    assert [node.fingerprint_inputs(run=run) for run in ("", " ", None)] == ["", "", ""]
    with pytest.raises(Exception, match="is not a run folder"):
        host.run(
            "pick", "PickBestCheckpoint", subject=host.subject(), run="other", clip_model="c", dino_model="",
            download=False, precision="fp32", prompts="{subject}", **BASE,
        )  # fmt: skip


# Caption Images


def test_pictures_are_captioned(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def describe(images: Any, text: str, *, beams: int, max_tokens: int) -> list[str]:
        asked.append(([image.size for image in images], text, beams))
        return [f"{text} dog {number}" for number in range(len(images))]

    def open_captioner(source: str, device: Any, *, download: bool) -> Any:
        asked.append((source, device.type, download))
        return SimpleNamespace(describe=describe)

    monkeypatch.setattr("pack.trainer.data.captioning.open_captioner", open_captioner)
    models = importlib.import_module("pack.nodes.host_models")
    monkeypatch.setattr(models, "caption_model", lambda name: f"path of {name}")
    values = {"token": "sks", "class_noun": "dog", "text": "a", "template": "{caption}, {class}", "beams": 2}
    output = host.run("caption", "CaptionImages", images=IMAGES, model=" blip ", download=True, **values)
    assert asked == [("path of blip", "cpu", True), ([(48, 32)] * 4, "a", 2)]
    text = "\n".join(f"a sks dog {number}, dog" for number in range(4))
    assert output.args == (text,)
    assert output.ui == {"text": [text]}


# Files of adapters


def test_a_file_is_loaded_with_its_name(host: Host) -> None:
    node = importlib.import_module("pack.nodes.lora").LoadLoraFile
    path = host.folder / "models" / "loras" / "rex.safetensors"
    bare = Adapter(adapter_of(3.0).layers, {})
    write_adapter(path, bare, torch.float32)
    assert node.define_schema().inputs[0].options["options"] == ["rex.safetensors"]
    [lora] = host.run("lora", "LoadLoraFile", file="rex.safetensors").args
    assert float(lora[f"{UNET_OF_BASE}.lora_up.weight"][0, 0]) == 3
    assert lora.metadata["ss_output_name"] == "rex"
    before = node.fingerprint_inputs(file="rex.safetensors")
    assert node.fingerprint_inputs(file="rex.safetensors") == before
    os.utime(path, ns=(1, 1))
    assert node.fingerprint_inputs(file="rex.safetensors") == f"{path.stat().st_size} 1" != before
    write_adapter(path, adapter_of(4.0), torch.float32, replace=True)
    [named] = host.run("lora", "LoadLoraFile", file="rex.safetensors").args
    assert named.metadata["ss_output_name"] == "number 4", "its own name counts"


def test_a_subject_s_files_are_its_fingerprint(host: Host) -> None:
    node = importlib.import_module("pack.nodes.subject").Subject
    before = node.fingerprint_inputs(folder="dog", token="sks")
    assert before == node.fingerprint_inputs(folder="dog") != node.fingerprint_inputs(folder="cat")
    (host.folder / "input" / "dog" / "0.txt").write_text("a")
    assert node.fingerprint_inputs(folder="dog") != before
    assert node.fingerprint_inputs(folder="(connected images)") == node.fingerprint_inputs() == ""


def test_training_settings_are_passed_on(host: Host) -> None:
    [settings] = host.run("train", "TrainingSettings", steps=3, alpha=0.0, conv_alpha=2.0, weight_decay=0.0).args
    assert dict(settings) == {"steps": 3, "alpha": None, "conv_alpha": 2.0, "weight_decay": 0.0}
    [other] = host.run("train", "TrainingSettings", alpha=4.0, conv_alpha=0.0).args
    assert dict(other) == {"alpha": 4.0, "conv_alpha": None}


# Resize, extract, inspect


def two_ranks(large: float, small: float) -> Adapter:
    """An adapter of rank 2 with these singular values."""
    layers = {
        name: LoraLayer(up=torch.eye(4, 2) * torch.tensor([large, small]), down=torch.eye(2, 4), alpha=2.0)
        for name in (UNET_OF_BASE, CLIP_OF_BASE)
    }
    return Adapter(layers, {"ss_output_name": "two"})


def ranks(output: Any) -> set[int]:
    adapter = importlib.import_module("pack.nodes.lora").as_adapter(output.args[0])
    return {layer.rank for layer in adapter.layers.values()}


def test_an_adapter_is_resized(host: Host) -> None:
    wire = wire_of(two_ranks(3.0, 1.0))
    sizes = {"rank": 0, "conv_rank": 0, "energy": 1.0, "ratio": 0.0}
    for changes, rank in (({}, 2), ({"rank": 1}, 1), ({"energy": 0.85}, 1), ({"energy": 0.95}, 2), ({"ratio": 2.0}, 1)):
        assert ranks(host.run("lora_tools", "ResizeLora", lora=wire, **{**sizes, **changes})) == {rank}, changes
    output = host.run("lora_tools", "ResizeLora", lora=wire, **{**sizes, "rank": 1})
    assert "the adapter" in output.args[1]
    assert output.ui == {"text": [output.args[1]]}
    assert output.args[2].shape[0] == 1


def test_a_lora_is_what_the_tuned_model_has_more(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {
        ("tuned", "tuned clip"): {UNET_OF_BASE: 3 * torch.eye(4), CLIP_OF_BASE: torch.eye(4)},
        ("base", "base clip"): {UNET_OF_BASE: torch.eye(4), CLIP_OF_BASE: 5 * torch.eye(4)},
        ("tuned", None): {UNET_OF_BASE: 3 * torch.eye(4)},
        ("base", None): {UNET_OF_BASE: torch.eye(4)},
    }
    bridge = importlib.import_module("pack.nodes.host")
    monkeypatch.setattr(bridge, "lent_weights", lambda model, clip: weights[model, clip])
    sizes = {"rank": 0, "conv_rank": 0, "energy": 1.0, "ratio": 0.0}
    inputs = {"model": "tuned", "base_model": "base", "clip": "tuned clip", "base_clip": "base clip"}
    output = host.run("lora_tools", "ExtractLora", **inputs, **sizes)
    layers = importlib.import_module("pack.nodes.lora").as_adapter(output.args[0]).layers
    assert layers[UNET_OF_BASE].delta() == pytest.approx(2 * torch.eye(4), abs=1e-3)
    assert layers[CLIP_OF_BASE].delta() == pytest.approx(-4 * torch.eye(4), abs=1e-3)
    assert ranks(host.run("lora_tools", "ExtractLora", model="tuned", base_model="base", **{**sizes, "rank": 3})) == {3}
    for one in ("clip", "base_clip"):
        with pytest.raises(Exception, match="Only one of clip and base_clip"):
            host.run("lora_tools", "ExtractLora", model="tuned", base_model="base", **{one: "a clip"}, **sizes)


def test_adapters_are_lent_the_connected_base(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(importlib.import_module("pack.nodes.host"), "lent_weights", lambda *parts: asked.append(parts))
    inputs = {"lora": wire_of(two_ranks(3.0, 1.0)), "model": "a model", "clip": "a clip"}
    host.run("lora_tools", "ResizeLora", rank=1, **inputs)
    host.run("lora_tools", "InspectLora", **inputs)
    host.run("merge", "ScaleLora", strength_model=1.0, strength_clip=1.0, block_weights="", **inputs)
    loras = {"lora_0": inputs.pop("lora")}
    host.run("merge", "MergeLoras", loras=loras, strengths="1", method={"method": "sum"}, **inputs)
    assert asked == [("a model", "a clip")] * 4


def test_an_adapter_is_inspected(host: Host) -> None:
    wire = wire_of(two_ranks(3.0, 1.0))
    output = host.run("lora_tools", "InspectLora", lora=wire)
    text, image, facts = output.args
    assert output.ui == {"text": [text]}
    assert image.shape[0] == 1
    assert image.shape[3] == 3
    alone = json.loads(facts)
    both = json.loads(host.run("lora_tools", "InspectLora", lora=wire, other=wire_of(two_ranks(1.0, 3.0))).args[2])
    assert len(alone["blocks"]) == len(both["blocks"]) == 2
    assert alone["blocks"] != both["blocks"], "the overlap"
    assert alone["kind"] == both["kind"]
    turned = json.loads(host.run("lora_tools", "InspectLora", lora=wire_of(two_ranks(1.0, 9.0)), other=wire).args[2])
    assert turned["blocks"] != both["blocks"], "the energy is the first one's"
