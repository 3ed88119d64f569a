"""A setting that changes nothing, since another one is missing, is reported before the run and begins no new one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from helpers import Recorder
from pack.trainer.core.errors import plain, worded
from pack.trainer.data.images import load_pictures
from pack.trainer.settings.base import Needs, Settings, field_extra
from pack.trainer.settings.caption import CaptionSettings
from pack.trainer.settings.train import TrainCommand, TrainSettings
from pack.trainer.training.preflight import report_settings_without_effect
from pack.trainer.training.runs.folder import RunFolder
from setting_values import KINDS, REQUIRED
from shell import Shell
from worlds import World, make_world, noisy_pictures

OTHERS: dict[str, Any] = {  # a value other than the default, where the type does not show one
    "class_prompt": "a photo of a dog",
    "preview_prompts": "sks dog in the snow",
    "negative_prompt": "blurry",
    "prompt": "a dog",
    "class_noun": "cat",
    "token_start": "red dog",
    "class_images": "x",
    "prior_prompts": "a cat",
    "prior_empty": 0.5,
    "thumbnail": False,
}


REFUSED = {("dreambench", "preview_prompts")}  # in any case


def known_needs(command: str, name: str) -> list[Needs]:
    return [each for each in field_extra(KINDS[command], name)["needs"] if each.setting in KINDS[command].model_fields]


def pairs() -> Iterator[tuple[str, str]]:
    for command, kind in KINDS.items():
        for name in kind.model_fields:
            if known_needs(command, name) and (command, name) not in REFUSED:
                yield command, name


PAIRS = list(pairs())


def other_value(kind: type[Settings], name: str) -> Any:
    field = kind.model_fields[name]
    if name in OTHERS:
        return OTHERS[name]
    if get_origin(field.annotation) is Literal:
        return next(choice for choice in get_args(field.annotation) if choice != field.default)
    if name == "bucket_step":
        return 32
    return type(field.default)(field.default + 1) if isinstance(field.default, int) else field.default / 2


def met(needs: Needs) -> Any:
    """A value with which the other setting has an effect."""
    if needs.values:
        return needs.values[0]
    if needs.setting in ("aspect_buckets", "gradient_checkpointing", "shuffle_tags"):
        return True
    return "x" if needs.setting in ("class_images", "clip", "token") else 7


def unmet(kind: type[Settings], needs: Needs) -> Any:
    if needs.other_than is not None:
        return needs.other_than
    if needs.setting == "masks":
        return "off"
    if needs.setting == "prior":
        return "none"
    return kind.model_fields[needs.setting].default


def alone(command: str, name: str) -> dict[str, Any]:
    """A setting given without any that it needs."""
    kind = KINDS[command]
    needs = {each.setting: unmet(kind, each) for each in known_needs(command, name)}
    method = {"method": "svd"} if command == "merge" else {}
    company = (
        {"class_prompt": "a photo of a dog"} if name == "prior_count" and "class_prompt" in kind.model_fields else {}
    )
    return {**REQUIRED[command], **needs, **method, **company, name: other_value(kind, name)}


def notes(settings: Settings) -> list[str]:
    return [worded(text, plain) for text in settings.effect_notes()]


def test_the_pairs_are_found() -> None:
    of_train = {name for command, name in PAIRS if command == "train"}
    assert of_train >= {"min_snr_gamma", "huber_c", "lr_cycles", "keep_tags", "prior_steps", "class_prompt"}
    assert {("generate", "negative_prompt"), ("merge", "seed"), ("score", "prompt"), ("caption", "class_noun")} <= set(
        PAIRS
    )


@pytest.mark.parametrize(("command", "name"), [pair for pair in PAIRS if pair[0] != "priors"])
def test_without_what_it_needs_a_setting_is_reported(command: str, name: str) -> None:
    """Once, with what it needs; `priors` without a number of pictures is refused."""
    kind = KINDS[command]
    settings = kind.checked(alone(command, name))
    [note] = notes(settings)
    assert note.startswith(f"{name} has no effect without ")
    assert all(needs.setting in note for needs in known_needs(command, name))


@pytest.mark.parametrize(("command", "name"), PAIRS)
def test_with_what_it_needs_nothing_is_reported(command: str, name: str) -> None:
    kind = KINDS[command]
    for needs in known_needs(command, name):
        values = {**REQUIRED[command], name: other_value(kind, name)}
        if needs.other_than is None:
            values[needs.setting] = met(needs)
        if "prior_count" in (needs.setting, name) and "class_prompt" in kind.model_fields:
            values["class_prompt"] = "a photo of a dog"
        assert notes(kind.checked(values)) == [], values


@pytest.mark.parametrize("name", [name for name in TrainSettings.model_fields if ("train", name) in PAIRS])
def test_it_begins_no_new_run(name: str) -> None:
    if not field_extra(TrainSettings, name)["affects_result"]:
        return
    settings = TrainCommand.checked(alone("train", name))
    plain_settings = TrainCommand.checked({**alone("train", name), name: TrainSettings.model_fields[name].default})
    assert settings.result_settings() == plain_settings.result_settings()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lr_schedule": "constant_with_warmup"}, "lr_schedule = constant_with_warmup has no effect without lr_warmup"),
        ({"multires_noise_iterations": 1, "multires_noise_discount": 0.5}, "without multires_noise_iterations above 1"),
        ({"prior_count": 2, "class_prompt": "a dog", "class_images": "x"}, "prior_count has no effect: class_images"),
        ({"subject": [{"images": "a", "class_prompt": "a dog"}]}, "class_prompt has no effect in a table [[subject]]"),
        (
            {"subject": [{"images": "a", "prior_count": 2, "class_images": "b"}]},
            "prior_count has no effect in a table [[subject]] with class_images",
        ),
    ],
    ids=str,
)
def test_further_settings_without_effect(values: dict[str, Any], expected: str) -> None:
    base = {"base": "x"} if "subject" in values else {"base": "x", "images": "y"}
    [note] = notes(TrainCommand.checked({**base, **values}))
    assert expected in note


@pytest.mark.parametrize(
    "values",
    [
        {"subject": [{"images": "a", "class_prompt": "a dog", "prior_count": 2}], "prior_steps": 5},
        {"subject": [{"images": "a", "class_prompt": "a dog"}], "prior_count": 2, "prior_steps": 5},
        {"subject": [{"images": "a", "masks": "files"}], "mask_background": 0.5},
        {"images": "a", "class_prompt": "a dog", "class_images": "b"},
        {"images": "a", "lr_schedule": "constant_with_warmup", "lr_warmup_steps": 1},
    ],
    ids=str,
)
def test_what_has_an_effect_is_not_reported(values: dict[str, Any]) -> None:
    assert notes(TrainCommand.checked({"base": "x", **values})) == []


def test_a_template_takes_the_class_noun_without_a_rare_word() -> None:
    assert notes(CaptionSettings(class_noun="dog", template="{caption} of a {class}")) == []


class TestWithPictures:
    """Of some settings only the pictures and captions tell whether they have an effect."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return noisy_pictures(tmp_path_factory.mktemp("pictures") / "dog", 3, 0)

    def reported(
        self, folder: Path, prompt: str = "a photo of sks dog", start: bool = False, **values: Any
    ) -> list[str]:
        settings = TrainCommand.checked({"base": "x", "images": str(folder), **values})
        listener = Recorder()
        report_settings_without_effect(
            settings,
            load_pictures(folder, prompt, Recorder()),
            [settings.class_prompt],
            has_class_pictures=bool(settings.prior_count),
            starts_from_adapter=start,
            listener=listener,
        )
        assert all(event.warning for event in listener.events)
        return [worded(text, plain) for text in listener.notes]

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (
                {"token": "ohwx"},
                "token 'ohwx' has no effect: no caption or prompt contains {token} or the word itself.",
            ),
            (
                {"class_noun": "cat"},
                "class_noun 'cat' has no effect: no caption or prompt contains {class} or the word",
            ),
            ({"prior_weight": 0.5}, "prior_weight has no effect without class pictures or prior = model."),
            ({"mask_background": 0.5}, "mask_background has no effect: no picture has a mask."),
            (
                {"shuffle_tags": True},
                "shuffle_tags has no effect: no caption has two or more comma-separated parts after the first",
            ),
        ],
        ids=str,
    )
    def test_they_are_reported(self, folder: Path, values: dict[str, Any], expected: str) -> None:
        [note] = self.reported(folder, **values)
        assert note.startswith(expected)

    @pytest.mark.parametrize(
        ("prompt", "values"),
        [
            ("a photo of ohwx dog", {"token": "ohwx"}),
            ("a photo of sks dog", {"token": "ohwx", "preview_prompts": "{token} in the snow", "preview_every": 5}),
            ("a photo of sks cat", {"class_noun": "cat"}),
            ("a photo of sks dog", {"class_noun": "cat", "class_prompt": "a {class}", "prior_count": 1}),
            ("sks dog, grass, sun", {"shuffle_tags": True}),
            ("sks dog, grass", {"shuffle_tags": True, "keep_tags": 0}),
            ("a photo of sks dog", {"prior_weight": 0.5, "class_prompt": "a dog", "prior_count": 1}),
        ],
        ids=str,
    )
    def test_what_has_an_effect_is_not(self, folder: Path, prompt: str, values: dict[str, Any]) -> None:
        assert self.reported(folder, prompt, **values) == []

    def test_an_adapter_to_start_from_has_its_own_kind_and_ranks(self, folder: Path) -> None:
        [note] = self.reported(folder, start=True, rank=4, adapter="dora", learning_rate=1e-5)
        assert note == "adapter and rank: no effect, since start_from determines the type, layers and ranks."


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_checkpoint, tmp_path_factory.mktemp("world") / "subject")


def test_a_weight_of_class_pictures_begins_no_new_run_without_any(world: World, tmp_path: Path) -> None:
    plain_run, weighted = (world.recipe(tmp_path, prior_weight=weight).fingerprint for weight in (1.0, 0.5))
    assert plain_run == weighted
    with_priors = world.with_priors(tmp_path / "class")
    plain_run, weighted = (with_priors.recipe(tmp_path, prior_weight=weight).fingerprint for weight in (1.0, 0.5))
    assert plain_run != weighted


def test_a_run_of_version_0_4_with_such_a_setting_is_found(world: World, tmp_path: Path) -> None:
    """Its fingerprint counted every setting."""
    recipe = world.recipe(tmp_path, min_snr_gamma=1.0)
    of_old = recipe._fingerprint(as_given=True)
    assert of_old != recipe.fingerprint == world.recipe(tmp_path).fingerprint
    old = RunFolder.open(tmp_path / "runs", "dog", of_old, {})
    old.lock.release()
    recipe.open_run()
    assert recipe.run_folder.path == old.path
    assert recipe.fingerprint == of_old
    recipe.run_folder.lock.release()
    plain_run = world.recipe(tmp_path)
    plain_run.open_run()
    assert plain_run.run_folder.path != old.path


@pytest.mark.slow  # trains
def test_the_command_line_says_it_once_and_finds_the_same_run(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    run = Shell(capsys)
    words = ["train", "--device", "cpu", "--resolution", "64", "--rank", "2", "--steps", "1", "--base", tiny_checkpoint]
    words += ["--images", noisy_pictures(tmp_path / "dog", 3, 0), "--output-dir", tmp_path / "out", "--prior", "none"]
    given = {
        "class_prompt": ["--class-prompt", "a photo of a dog"],
        "token": ["--token", "ohwx"],
        "class_noun": ["--class-noun", "cat"],
        "min_snr_gamma": ["--min-snr-gamma", "1"],
    }
    assert run(*words) == 0, run.errors
    assert "no effect" not in run.errors
    for name, more in given.items():
        assert run(*words, *more) == 0, run.errors
        flag = "--" + name.replace("_", "-")
        [line] = [line for line in run.errors.splitlines() if "no effect" in line]
        assert line.startswith(f"warning: {flag} ")
        assert "already finished" in run.errors
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
