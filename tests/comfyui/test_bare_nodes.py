"""What nodes make of their inputs and hand to the engine, every day and without ComfyUI: the host lends a tiny model.

That ComfyUI takes them for nodes, and what comes out at the end, is shown in a real one (`test_nodes.py`).
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bare_nodes import BASE, CLIP_OF_BASE, UNET_OF_BASE, Host, adapter_of, names, wire_of
from helpers import Recorder
from pack.trainer.core.errors import TrainerError
from pack.trainer.core.events import RunOpened
from pack.trainer.core.prompts import PromptWords
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.training.presets import preset_values
from pack.trainer.training.runs.folder import RunPaths
from safetensors.torch import load_file
from sites import noisy

# Subject


def test_subjects_are_chained(host: Host) -> None:
    dog = host.subject()
    both = host.subject("cat", token="rraj", class_noun="cat", caption="{token} {class} | x", repeats=3, subject=dog)
    assert names(both.pictures) == ["0.png", "1.png", "2.png", "0.png", "1.png", "2.png", "3.png"]
    assert [one.caption for one in both.pictures] == ["a photo of sks dog"] * 3 + ["rraj cat"] * 4
    assert [one.repeats for one in both.pictures] == [1] * 3 + [3] * 4
    assert both.class_prompts == ("a photo of a dog", "a cat")
    assert both.words == (PromptWords("sks", "dog"), PromptWords("rraj", "cat"))
    assert (both.instance_prompt, both.class_prompt, both.token) == ("rraj cat", "a cat", "rraj")


def test_a_subject_takes_captions_and_masks_from_where_it_is_told(host: Host) -> None:
    folder = host.folder / "input" / "dog"
    (folder / "0.txt").write_text("{token} asleep")
    noisy((64, 64), 5).convert("L").save(folder / "1_mask.png")
    plain = host.subject()
    assert [one.caption for one in plain.pictures] == ["sks asleep", "a photo of sks dog", "a photo of sks dog"]
    assert [one.mask is None for one in plain.pictures] == [True, False, True]
    other = host.subject(captions_from="prompt", masks_from="off")
    assert {one.caption for one in other.pictures} == {"a photo of sks dog"}
    assert all(one.mask is None for one in other.pictures)


def test_connected_pictures_have_their_captions_and_masks(host: Host) -> None:
    bridge = importlib.import_module("pack.nodes.host")
    images = torch.rand((3, 64, 64, 3), generator=torch.Generator().manual_seed(0))
    masks = torch.stack([torch.full((64, 64), (number + 1) / 4) for number in range(3)])
    given = host.subject(bridge.NO_FOLDER, images=images, captions="one\n\ntwo\nthree", mask=masks)
    assert [one.caption for one in given.pictures] == ["one", "two", "three"]
    assert [one.mask().getextrema()[1] for one in given.pictures if one.mask] == [64, 128, 191]
    with pytest.raises(Exception, match="No pictures were chosen"):
        host.subject(bridge.NO_FOLDER)
    with pytest.raises(Exception, match="come from a folder"):
        host.subject(captions="one")


# Class Priors


def test_class_priors_of_chained_subjects(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int, int]] = []

    def generate(
        base: Any, settings: Any, *, resolution: int, root: Path, device: Any, precision: str, **_: Any
    ) -> list[Picture]:
        assert (device, precision) == (torch.device("cpu"), "bf16")
        assert (settings.prior_scheduler, settings.prior_steps, settings.prior_guidance) == ("ddim", 3, 1.5)
        assert settings.prior_batch_size == 2
        assert base is host.base
        assert root == host.folder / "output" / "dreambooth" / "class-pictures"
        asked.append((settings.class_prompt, settings.prior_count, settings.prior_seed, resolution))
        return load_pictures(host.folder / "input" / "cat", settings.class_prompt, Recorder())[:2]

    monkeypatch.setattr("pack.trainer.data.class_images.generate_class_images", generate)
    values = {"count": 5, "scheduler": "ddim", "steps": 3, "guidance": 1.5, "seed": 9, "batch_size": 2}
    values |= {"resolution": 64, "precision": "bf16", **BASE}
    both = host.subject("cat", token="rraj", class_noun="cat", subject=host.subject())
    priors, shown = host.run("priors", "ClassPriors", prompt="", subject=both, **values).args
    assert asked == [("a photo of a dog", 5, 9, 64), ("a photo of a cat", 5, 9, 64)]
    assert [one.caption for one in priors.pictures] == ["a photo of a dog"] * 2 + ["a photo of a cat"] * 2
    assert shown.shape == (4, 64, 64, 3)
    assert 0 <= shown.min() < shown.max() <= 1
    asked.clear()
    host.run("priors", "ClassPriors", prompt="a {class} | a tree", subject=host.subject(), **values)
    assert [prompt for prompt, *_ in asked] == ["a dog", "a tree"]
    assert host.borrowed == [("model", "clip", "vae")] * 2


def test_graphs_of_earlier_versions_leave_the_interval_of_guidance_open(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lack its widgets, which the page fills with their defaults: class pictures that are there are found."""
    intervals: list[dict[str, float]] = []

    def generate(base: Any, settings: Any, **_: Any) -> list[Picture]:
        names = ("prior_guidance_start", "prior_guidance_end")
        intervals.append({name: getattr(settings, name) for name in names if name in settings.model_fields_set})
        return load_pictures(host.folder / "input" / "cat", settings.class_prompt, Recorder())[:1]

    monkeypatch.setattr("pack.trainer.data.class_images.generate_class_images", generate)
    values = {"prompt": "a dog", "count": 1, "scheduler": "ddim", "steps": 30, "guidance": 7.5, "seed": 0}
    values |= {"batch_size": 1, "resolution": 64, "precision": "fp32", **BASE}
    widgets: dict[str, float]
    for widgets in ({}, {"guidance_start": 0.2, "guidance_end": 0.8}, {"guidance_start": 0.0, "guidance_end": 0.8}):
        host.run("priors", "ClassPriors", **values, **widgets)
    assert intervals == [{}, {}, {"prior_guidance_start": 0.0}]


# Training


@pytest.fixture
def trained(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What the engine was told to train, each time."""
    calls: list[SimpleNamespace] = []

    def train(base: Any, pictures: Any, class_pictures: Any, settings: Any, **more: Any) -> SimpleNamespace:
        calls.append(SimpleNamespace(base=base, pictures=pictures, others=class_pictures, settings=settings, **more))
        return SimpleNamespace(
            adapter=adapter_of(1.0), path=Path("dog.safetensors"), run=Path("run"), checkpoint=Path("all.safetensors")
        )

    monkeypatch.setattr("pack.trainer.dreambooth.train", train)
    return calls


def test_training_gets_what_is_connected(host: Host, trained: list[SimpleNamespace]) -> None:
    subject = host.subject()
    priors = importlib.import_module("pack.nodes.priors").PriorsValue(host.subject("cat").pictures)
    own = torch.rand((2, 64, 64, 3), generator=torch.Generator().manual_seed(0))
    values = {"name": "rex", "steps": 7, "seed": 3, "preview_prompts": "{token} on grass", "score_dino": ""}
    output = host.run("train", "TrainLora", subject=subject, priors=priors, class_images=own, **BASE, **values)
    [call] = trained
    assert call.base is host.base
    assert host.borrowed == [("model", "clip", "vae")]
    assert names(call.pictures) == names(subject.pictures)
    assert names(call.others)[:4] == names(priors.pictures)
    assert [one.caption for one in call.others[4:]] == ["a photo of a dog"] * 2
    assert (call.settings.name, call.settings.steps, call.settings.seed) == ("rex", 7, 3)
    assert call.settings.preview_prompts == "sks on grass"
    assert call.device == "cpu"
    assert call.paths == RunPaths(
        host.folder / "models" / "loras",
        host.folder / "output" / "dreambooth" / "runs",
        host.folder / "models" / "checkpoints",
        host.folder / "models" / "embeddings",
    )
    assert [(each.token, each.class_noun) for each in call.words] == [("sks", "dog")]
    assert (call.starting_point.start, call.starting_point.stacked) == (None, [])
    assert host.applied == [("model", "clip", output.args[2], 1.0, 1.0)]
    assert output.args[:2] == ("model + 1", "clip + 1")
    assert output.args[3:] == ("dog.safetensors", "run")


def test_a_preset_sets_what_no_widget_sets(host: Host, trained: list[SimpleNamespace]) -> None:
    """All widgets have values; those that are not the defaults are the user's."""
    expected = preset_values("style", host.base.family, (), priors=False)
    defaults = importlib.import_module("pack.nodes.train").TrainSettings()
    own = {name: getattr(defaults, name) for name in expected} | {"rank": 3}
    assert any(own[name] != value for name, value in expected.items() if name != "rank")
    host.run("train", "TrainLora", subject=host.subject(), preset="style", **own, **BASE)
    [call] = trained
    assert call.settings.rank == 3
    for name in expected.keys() - {"rank"}:
        assert getattr(call.settings, name) == expected[name], name


def test_training_begins_where_it_is_told(host: Host, trained: list[SimpleNamespace]) -> None:
    start, below = wire_of(adapter_of(2.0)), wire_of(adapter_of(3.0))
    values = {"start_from": start, "base_lora": below, "base_lora_strength": 0.5}
    output = host.run("train", "TrainLora", subject=host.subject(), **values, **BASE)
    point = trained[0].starting_point
    assert point.start.layers[UNET_OF_BASE].up[0, 0] == 2
    [(stacked, strength)] = point.stacked
    assert (float(stacked.layers[UNET_OF_BASE].up[0, 0]), strength) == (3, 0.5)
    assert host.applied[0] == ("model", "clip", below, 0.5, 0.5)
    assert host.borrowed == [("model + 1", "clip + 1", "vae")]
    assert host.applied[1] == ("model + 1", "clip + 1", output.args[2], 1.0, 1.0), "on top of the one below"
    host.run("train", "TrainLora", subject=host.subject(), settings={"combine": True}, **values, **BASE)
    assert host.applied[3][:2] == ("model", "clip"), "a combined file holds the one below"
    with pytest.raises(Exception, match="Connect base_lora"):
        host.run("train", "TrainLora", subject=host.subject(), settings={"combine": True}, **BASE)


def test_training_reads_the_words_that_the_adapter_below_bundles(host: Host, trained: list[SimpleNamespace]) -> None:
    vectors = torch.ones(2, 64)
    below = wire_of(replace(adapter_of(3.0), embeddings={"bundle_emb.sks.string_to_param.*": vectors}))
    host.run("train", "TrainLora", subject=host.subject(), base_lora=below, **BASE)
    [word] = trained[0].base.words
    assert word.word == "sks"
    assert torch.equal(word.vectors["text_encoder"], vectors)
    assert trained[0].base.fingerprint != host.base.fingerprint


def test_training_is_told_what_has_no_effect_and_which_models_score(
    host: Host, trained: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = importlib.import_module("pack.nodes.host_models")
    monkeypatch.setattr(models, "feature_model", lambda name: f"path of {name}")
    told: list[Any] = []
    report = "pack.trainer.training.preflight.report_settings_without_effect"
    monkeypatch.setattr(report, lambda *asked, **more: told.append((asked, more)))
    subject = host.subject()
    priors = importlib.import_module("pack.nodes.priors").PriorsValue(subject.pictures)
    for start in (None, wire_of(adapter_of(2.0))):
        values = {"score_clip": " c ", "score_dino": " ", "preview_every": 1, "start_from": start}
        values |= {"priors": None if start else priors}
        host.run("train", "TrainLora", subject=subject, **values, **BASE)
    assert [(call.settings.score_clip, call.settings.score_dino.strip()) for call in trained] == [("path of c", "")] * 2
    assert [asked[1:] for asked, _ in told] == [(subject.pictures, ("a photo of a dog",))] * 2
    connected = [(more["has_class_pictures"], more["starts_from_adapter"]) for _, more in told]
    assert connected == [(True, False), (False, True)]


def test_widgets_of_the_node_win_over_training_settings(host: Host, trained: list[SimpleNamespace]) -> None:
    settings = {"steps": 5, "batch_size": 2}
    host.run("train", "TrainLora", subject=host.subject(), settings=settings, steps=9, **BASE)
    assert (trained[0].settings.steps, trained[0].settings.batch_size) == (9, 2)


def test_fine_tuning_trains_all_and_loads_the_checkpoint(
    host: Host, trained: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = importlib.import_module("pack.nodes.host")
    monkeypatch.setattr(bridge, "load_checkpoint", lambda path: (f"model of {path}", "clip", "vae"))
    output = host.run("train", "FineTuneCheckpoint", subject=host.subject(), settings={"adapter": "lokr"}, **BASE)
    assert trained[0].settings.adapter == "full"
    assert output.args[:3] == ("model of all.safetensors", "clip", "vae")
    assert output.args[4] == "all.safetensors"
    assert host.borrowed == [("model", "clip", "vae")]


@pytest.mark.parametrize("node", ["TrainLora", "FineTuneCheckpoint"])
def test_training_checks_the_pictures_and_keeps_the_graph(
    node: str, host: Host, trained: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []
    monkeypatch.setattr("pack.trainer.data.image_check.check_pictures", lambda *asked: checked.append(asked[:2]))
    monkeypatch.setattr(importlib.import_module("pack.nodes.host"), "load_checkpoint", lambda path: ("m", "c", "v"))
    subject = host.subject()
    host.run("train", node, subject=subject, resolution=64, name="rex", **BASE)
    [(pictures, settings)] = checked
    assert (names(pictures), settings.resolution) == (names(subject.pictures), 64)
    run = host.folder / "rex-1"
    trained[0].listener.report(RunOpened(run, 0, 9))
    assert json.loads((run / "workflow.json").read_text()) == {"nodes": []}
    assert len(list((run / "subject").iterdir())) == 3
    facts = importlib.import_module("pack.nodes.live").snapshot()["7"]
    assert (facts["name"], facts["run"], facts["step"], facts["steps"]) == ("rex", "rex-1", 0, 9)


def test_a_node_s_error_begins_with_what_to_do(host: Host, trained: list[SimpleNamespace]) -> None:
    with pytest.raises(importlib.import_module("pack.nodes.base").NodeError) as caught:
        host.run("train", "TrainLora", subject=host.subject(), rank=0, **BASE)
    cause = caught.value.__cause__
    assert isinstance(cause, TrainerError)
    assert str(caught.value).split("\n\n") == [cause.remedy, cause.problem]
    assert not trained


# Merging


def up_of(output: Any, module: str) -> float:
    """What a merged adapter adds to each weight of a module."""
    layer = importlib.import_module("pack.nodes.lora").as_adapter(output.args[0]).layers[module]
    return float((layer.up.float() @ layer.down.float())[0, 0]) * layer.alpha / layer.rank


def test_adapters_are_merged_with_their_strengths(host: Host) -> None:
    loras = {"lora_0": wire_of(adapter_of(1.0)), "lora_1": None, "lora_2": wire_of(adapter_of(10.0))}
    merged = host.run("merge", "MergeLoras", loras=loras, strengths="1.0, 0.5:0.25", method={"method": "sum"})
    assert up_of(merged, UNET_OF_BASE) == pytest.approx(2 * (1 + 5), rel=1e-3)
    assert up_of(merged, CLIP_OF_BASE) == pytest.approx(2 * (1 + 2.5), rel=1e-3)
    assert "1: number 1" in merged.args[1]
    assert "2: number 10" in merged.args[1]


def test_an_adapter_is_scaled_by_network_and_block(host: Host) -> None:
    inputs = {"lora": wire_of(adapter_of(1.0)), "strength_model": 2.0, "strength_clip": -1.0}
    scaled = host.run("merge", "ScaleLora", block_weights="down_blocks=0.5", **inputs)
    assert up_of(scaled, UNET_OF_BASE) == pytest.approx(2 * 2 * 0.5, rel=1e-3)
    assert up_of(scaled, CLIP_OF_BASE) == pytest.approx(-2, rel=1e-3)


def test_a_learned_merge_knows_subject_and_style(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    merge = importlib.import_module("pack.trainer.merging.merge")

    def learned_merge(base: Any, subject: Any, style: Any, settings: Any, *_: Any) -> Any:
        strengths = [(one.strength, one.text_strength) for one in (subject, style)]
        asked.append((base, [subject.title, style.title], strengths, settings.steps))
        return merge.merge([subject, style], merge.MergeSettings(), None)

    monkeypatch.setattr("pack.trainer.merging.ziplora.learned_merge", learned_merge)
    inputs = {"subject_lora": wire_of(adapter_of(1.0)), "style_lora": wire_of(adapter_of(10.0)), **BASE}
    inputs |= {"subject_strength": 0.5, "style_strength": 2.0, "steps": 12}
    inputs |= {"subject_prompt": "a photo of sks dog", "style_prompt": "a tree in pixel-art style"}
    output = host.run("merge", "LearnedMerge", **inputs)
    assert asked == [(host.base, ["1: number 1", "2: number 10"], [(0.5, 0.5), (2.0, 2.0)], 12)]
    assert host.borrowed == [("model", "clip", "vae")]
    assert up_of(output, UNET_OF_BASE) == pytest.approx(2 * (0.5 + 20), rel=1e-3)


def test_an_adapter_is_applied_with_both_strengths(host: Host) -> None:
    lora = wire_of(adapter_of(1.0))
    inputs = {"model": "model", "clip": "clip", "lora": lora, "strength_model": 0.5, "strength_clip": 0.25}
    host.run("lora", "ApplyLora", **inputs)
    assert host.applied == [("model", "clip", lora, 0.5, 0.25)]


def test_an_adapter_is_saved_beside_another_of_its_name(host: Host) -> None:
    inputs = {"lora": wire_of(adapter_of(1.0)), "name": "rex", "precision": "fp32"}
    paths = [Path(host.run("lora", "SaveLora", **inputs).args[0]) for _ in range(2)]
    assert [path.name for path in paths] == ["rex.safetensors", "rex-2.safetensors"]
    assert all(path.parent == host.folder / "models" / "loras" for path in paths)
    up = f"{UNET_OF_BASE}.lora_up.weight"
    assert load_file(paths[0])[up].dtype == torch.float32
    half = host.run("lora", "SaveLora", **inputs | {"precision": "fp16"}).args[0]
    assert load_file(half)[up].dtype == torch.float16


def files_of(path: str) -> set[str]:
    """The extensions of what lies beside an adapter file, and its own."""
    return {file.name.removeprefix(Path(path).stem) for file in Path(path).parent.glob(f"{Path(path).stem}.*")}


IN_A_GALLERY = {".safetensors", ".preview.png", ".json", ".metadata.json"}


@pytest.mark.usefixtures("quick")
def test_what_is_trained_and_saved_lies_in_a_gallery(host: Host) -> None:
    """A file that Save LoRA writes of a run has what the run's own has; one of no run, or of one that is gone, none."""
    values = {"name": "rex", "steps": 2, "rank": 2, "targets": "attention", "resolution": 64, "adapter": "lora"}
    more = {"preview_every": 2, "preview_steps": 1, "preview_guidance": 1.0, "precision": "fp32", "prior": "none"}
    trained = host.run("train", "TrainLora", subject=host.subject(), settings=more, **values, **BASE)
    _, _, lora, path, run = trained.args
    assert files_of(path) == IN_A_GALLERY
    card = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))
    assert (card["activation text"], card["preferred weight"]) == ("sks dog", 1.0)
    saved = host.run("lora", "SaveLora", lora=lora, name="copy", precision="fp16").args[0]
    assert files_of(saved) == IN_A_GALLERY
    assert json.loads(Path(saved).with_suffix(".json").read_text(encoding="utf-8")) == card
    record = Path(run) / "run.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps(content | {"settings": content["settings"] | {"gallery_files": False}}))
    unwanted = host.run("lora", "SaveLora", lora=lora, name="unwanted", precision="fp16").args[0]
    record.unlink()
    gone = host.run("lora", "SaveLora", lora=lora, name="gone", precision="fp16").args[0]
    other = host.run("lora", "SaveLora", lora=wire_of(adapter_of(1.0)), name="other", precision="fp16").args[0]
    assert [files_of(file) for file in (unwanted, gone, other)] == [{".safetensors"}] * 3
