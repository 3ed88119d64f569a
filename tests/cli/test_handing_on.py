"""What commands hand on: each setting reaches what it is for, without a training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Recorder
from pack.trainer.adapters.kohya import Adapter, write_adapter
from pack.trainer.adapters.layers import FullLayer
from pack.trainer.adapters.names import named_weights
from pack.trainer.cli import train
from pack.trainer.cli.plan import _planned_memory, _planned_precision, _Row, _table, _verdict
from pack.trainer.cli.terminal import Terminal
from pack.trainer.cli.train import (
    _given_class_pictures,
    _prior_settings,
    _subject_pictures,
    open_base_model,
    run_generate,
    run_priors,
)
from pack.trainer.core.devices import pick_device
from pack.trainer.core.errors import TrainerError
from pack.trainer.core.events import Note, Phase, Step, Validation
from pack.trainer.data.class_images import by_prompt
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import GenerateCommand, PlanCommand, PriorsCommand, TrainCommand
from pack.trainer.training.memory.plan import MemoryNeed
from PIL import Image

CPU = pick_device("cpu")


def folder_of(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


@pytest.fixture
def subjects(tmp_path: Path) -> dict[str, Any]:
    """A dog with masks, file names and repeats, and a cat with class pictures of its own."""
    dog = folder_of(tmp_path / "dog", "sks in snow.png", "sks in grass.png")
    half = np.arange(64)[:, None].repeat(64, axis=1) * 4
    Image.fromarray(half.astype(np.uint8)).save(dog / "sks in snow_mask.png")
    (dog / "sks in grass.txt").write_text("another caption")
    cat = folder_of(tmp_path / "cat", "0.png")
    (cat / "0.txt").write_text("a {token} {class} asleep")
    own = folder_of(tmp_path / "cats", "1.png", "2.png")
    (own / "1.txt").write_text("a {class} awake")
    return {
        "base": "model.safetensors",
        "prior_count": 8,
        "prior_seed": 3,
        "prior_guidance": 2.5,
        "subject": [
            {
                "images": str(dog),
                "instance_prompt": "a {token} dog",
                "class_prompt": "a dog",
                "captions": "file-names",
                "repeats": 3,
                "prior_count": 4,
            },
            {
                "images": str(cat),
                "instance_prompt": "a {token} {class}",
                "token": "rraj",
                "class_noun": "cat",
                "class_prompt": "a {class}",
                "class_images": str(own),
                "masks": "off",
            },
        ],
    }


def test_every_subject_has_its_own_captions_masks_and_repeats(subjects: dict[str, Any]) -> None:
    pictures = _subject_pictures(TrainCommand.checked(subjects), Recorder())
    told = {picture.name: (picture.caption, picture.repeats, picture.mask is not None) for picture in pictures}
    assert told == {
        "sks in snow.png": ("sks in snow", 3, True),
        "sks in grass.png": ("sks in grass", 3, False),
        "0.png": ("a rraj cat asleep", 1, False),
    }
    subjects["subject"][0] |= {"captions": "prompt", "masks": "off"}
    pictures = _subject_pictures(TrainCommand.checked(subjects), Recorder())
    assert {picture.caption for picture in pictures} == {"a sks dog", "a rraj cat asleep"}
    assert not any(picture.mask for picture in pictures)


def test_own_class_pictures_have_the_subjects_words(subjects: dict[str, Any]) -> None:
    pictures = _given_class_pictures(TrainCommand.checked(subjects), Recorder())
    assert [(picture.name, picture.caption) for picture in pictures] == [("1.png", "a cat awake"), ("2.png", "a cat")]


def test_every_subject_has_class_pictures_of_its_own_number(subjects: dict[str, Any]) -> None:
    settings = TrainCommand.checked(subjects)
    dog, cat = (_prior_settings(settings, subject) for subject in settings.subjects)
    assert (dog.class_prompt, dog.prior_count, dog.prior_seed, dog.prior_guidance) == ("a dog", 4, 3, 2.5)
    assert (cat.class_prompt, cat.prior_count) == ("a cat", 0)
    assert [(one.class_prompt, one.prior_count) for one in by_prompt([dog])] == [("a dog", 4)]
    [of_prompt] = by_prompt([dog])
    given = {"class_prompt", "prior_count", "prior_seed", "prior_guidance"}
    assert of_prompt.model_fields_set == given  # the rest may be what an earlier version generated


def test_a_base_is_opened_as_the_settings_say(tiny_checkpoint: Path) -> None:
    given = {"base": tiny_checkpoint, "prompt": "a dog"}
    plain = open_base_model(GenerateCommand.checked(given))
    assert (plain.prediction.type, plain.clip_skip) == ("epsilon", 0)
    other = open_base_model(GenerateCommand.checked({**given, "prediction_type": "v_prediction", "clip_skip": 2}))
    assert (other.prediction.type, other.clip_skip) == ("v_prediction", 2)
    for setting in ("vae", "tokenizer"):
        with pytest.raises(TrainerError, match=f"no {setting} here"):
            open_base_model(GenerateCommand.checked({**given, setting: f"no {setting} here.safetensors"}))


def test_pictures_come_prompt_by_prompt_as_the_settings_say(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Sequence[int]]] = []
    configs = set()

    def generate(model: object, prompt: str, seeds: Sequence[int], config: Any, listener: object) -> list[Image.Image]:
        asked.append((prompt, seeds))
        configs.add(config)
        return [Image.new("RGB", (8, 8), (len(asked), 0, 0))]

    monkeypatch.setattr(train, "generate", generate)
    given = {"base": tiny_checkpoint, "prompt": "a dog|a cat", "negative_prompt": "blurred", "count": 2, "seed": 5}
    given |= {"size": "64x96", "steps": 3, "guidance": 2.5, "scheduler": "pndm", "device": "cpu"}
    listener = Recorder()
    files = run_generate(GenerateCommand.checked({**given, "output": tmp_path / "out.png"}), listener)
    assert asked == [("a dog", [5]), ("a dog", [6]), ("a cat", [5]), ("a cat", [6])]
    [config] = configs
    assert (config.width, config.height, config.negative_prompt) == (64, 96, "blurred")
    assert (config.scheduler, config.steps, config.guidance) == ("pndm", 3, 2.5)
    assert [file.name for file in files] == [f"out-00{number}.png" for number in range(4)]
    for number, file in enumerate(files, 1):
        with Image.open(file) as image:
            assert image.getpixel((0, 0)) == (number, 0, 0)
    told = [(event.done, event.total) for event in listener.events if isinstance(event, Phase)]
    assert told == [(done, 4) for done in range(5)]


def test_class_pictures_are_of_the_base_with_what_lies_below(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[BaseWeights, dict[str, Any]]] = []
    monkeypatch.setattr(train, "generate_class_images", lambda base, priors, **options: made.append((base, options)))
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    base = open_base(tiny_checkpoint)
    weight = named_weights(base.family.build(base))[name]
    adapter = Adapter({name: FullLayer(torch.ones_like(weight))})
    file = write_adapter(tmp_path / "below.safetensors", adapter, torch.float32)
    given = {"base": tiny_checkpoint, "class_prompt": "a dog", "prior_count": 2, "resolution": 64, "device": "cpu"}
    given |= {"output_dir": tmp_path, "precision": "bf16"}
    [plain] = run_priors(PriorsCommand.checked(given), Recorder())
    [half] = run_priors(PriorsCommand.checked({**given, "base_lora": (f"{file}:0.5",)}), Recorder())
    assert plain != half
    assert {folder.parent for folder in (plain, half)} == {tmp_path / "class-pictures"}
    assert len({base.fingerprint for base, _ in made}) == 2
    for _, options in made:
        assert (options["resolution"], options["root"]) == (64, tmp_path / "class-pictures")
        assert (options["device"], options["precision"]) == (CPU, "bf16")


# Planning

GB = 2**30
NEED = MemoryNeed(base=2 * GB, trained=GB, activations=3 * GB, encoding=0, previews=0)


def planned(**values: Any) -> PlanCommand:
    return PlanCommand.checked({"base": "model.safetensors", **values})


def test_a_card_has_less_than_it_says(tiny_world: Any) -> None:
    assert _planned_memory(planned(memory=8), tiny_world.base, "fp32", CPU) == 7.5 * GB


@pytest.mark.parametrize(("asked", "expected"), [("auto", "bf16"), ("fp32", "fp32"), ("fp16", "fp16")])
def test_a_plan_without_a_gpu_is_for_a_recent_one(asked: str, expected: str) -> None:
    assert _planned_precision(planned(precision=asked), CPU) == expected


def test_the_first_row_that_fits_is_picked() -> None:
    rows = [
        _Row(title, replace(NEED, activations=size * GB)) for title, size in (("as set", 9), ("less", 3), ("least", 1))
    ]
    for memory, said in (
        (rows[1].need.total, "less"),
        (rows[1].need.total - 1, "least"),
        (rows[0].need.total, "as set"),
    ):
        assert _verdict(rows, planned(), memory) == f"Chosen for {memory / GB:.1f} GB: {said}."
    assert _verdict(rows, planned(), GB).startswith("None of these fits in 1.0 GB. Lower ")


def test_columns_are_those_of_the_head() -> None:
    head, row = _table([_Row("as set", NEED)], [])
    assert head.split() == ["base", "trained", "activations", "encoding", "previews", "total"]
    assert row.split() == ["as", "set", "2.00", "1.00", "3.00", "-", "-", f"{NEED.total / GB:.2f}"]
    assert _table([_Row("as set", NEED)], [_Row("as set, nf4", NEED)])[2].startswith("with settings that change")


# The terminal


def test_a_step_is_shown_with_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.report(Note("careful", warning=True))
    terminal.report(Step(7, 20, loss=0.125, learning_rate=2.5e-5, rate=1.0, seconds_left=13.0, memory=3 * 2**29))
    terminal.report(Validation(7, 0.25))
    terminal.report(Phase("class pictures", 2, 5))
    terminal.__exit__()
    shown = capsys.readouterr().err
    assert "warning: careful\n" in shown
    assert "Validation loss after step 7: 0.2500\n" in shown
    for text in ("training:", "7/20", "loss 0.1250, lr 2.5e-05, 1.5 GB", "class pictures:", "2/5"):
        assert text in shown


@pytest.mark.parametrize(
    ("environment", "is_quiet"),
    [
        ({}, False),
        ({"RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, False),
        ({"RANK": "1", "LOCAL_RANK": "0"}, True),
    ],
    ids=str,
)
def test_one_of_several_processes_speaks(
    environment: dict[str, str],
    is_quiet: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setitem(os.environ, name, value)
    Terminal().report(Note("hello"))
    assert (capsys.readouterr().err == "") == is_quiet
