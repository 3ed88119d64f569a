"""Presets: every file is good, names its sources, and gives the same run as its values typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import DEMO, Recorder
from pack.trainer.__main__ import _parser
from pack.trainer.cli.flags import settings_from
from pack.trainer.cli.train import run_train
from pack.trainer.core.errors import SettingsError
from pack.trainer.core.toml import read_toml
from pack.trainer.models.families import FAMILIES
from pack.trainer.models.families.base import Family
from pack.trainer.settings.train import PriorSettings, TrainCommand, TrainSettings
from pack.trainer.training import presets
from pack.trainer.training.presets import (
    FOLDER,
    apply_preset,
    load_preset,
    preset_subjects,
    preset_values,
)
from pack.trainer.training.runs.folder import RunFolder, run_fingerprint
from worlds import COMMON, World, make_world, noisy_pictures

CASES = [(subject, family) for subject in preset_subjects() for family in FAMILIES]
IDS = [f"{subject}-{family.name}" for subject, family in CASES]
SD1, SD2, SDXL, *_ = FAMILIES


def parsed(words: list[str]) -> TrainCommand:
    """What the command line makes of flags."""
    return settings_from(_parser().parse_args(["train", "--base=x", "--images=y", *words]), TrainCommand)


def test_there_is_a_file_for_every_subject_and_family_and_no_other() -> None:
    assert preset_subjects() == ("object", "animal", "person", "style")
    assert sorted(path.name for path in FOLDER.glob("*.toml")) == sorted(f"{name}.toml" for name in IDS)


def test_families_have_names_of_their_own() -> None:
    assert [family.name for family in FAMILIES] == ["sd1", "sd2", "sdxl", "flux2", "zimage", "krea2", "anima"]


@pytest.mark.parametrize(("subject", "family"), CASES, ids=IDS)
def test_a_file_is_whole(subject: str, family: Family) -> None:
    preset = load_preset(subject, family)
    assert family.title in preset.title
    assert preset.why.count(". ") == 1
    assert preset.why.endswith(".")
    assert len(preset.sources) >= 3
    assert all("https://" in source for source in preset.sources)
    assert len(set(preset.sources)) == len(preset.sources)
    written = read_toml(FOLDER / f"{subject}-{family.name}.toml")
    assert preset.settings == written["settings"]
    assert preset.priors == written["priors"]
    assert set(preset.settings) >= {"steps", "learning_rate", "text_encoder_lr", "rank", "resolution", "lr_schedule"}
    assert set(preset.settings) <= set(TrainSettings.model_fields)
    assert set(preset.priors) == {"prior_count"}


@pytest.mark.parametrize(("subject", "family"), CASES, ids=IDS)
def test_values_are_possible_for_the_family(subject: str, family: Family) -> None:
    """A run could begin with them: the encoders exist, and the values go with every kind of adapter."""
    settings = load_preset(subject, family).settings
    existing = {f"{kind.name}_lr" for kind in family.text_encoders}
    assert {name for name in settings if name.startswith("text_encoder")} <= existing
    for adapter in ("lora", "dora", "loha", "lokr", "oft", "boft"):
        assert TrainSettings.checked({**settings, "adapter": adapter, "preset": subject})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_only_what_may_be_mirrored_is_mirrored(family: Family) -> None:
    assert not any(load_preset(subject, family).settings["flip"] for subject in ("object", "animal", "person"))
    assert load_preset("person", family).settings["steps"] > load_preset("object", family).settings["steps"]
    trains_text = load_preset("person", family).settings["text_encoder_lr"] > 0
    assert trains_text == bool(family.text_targets)


WRONG = {
    "unknown setting": ("[settings]\nstepps = 3\n[priors]\n", "stepps"),
    "out of range": ("[settings]\nrank = 0\n[priors]\n", "rank"),
    "no setting of priors": ("[settings]\n[priors]\nsteps = 3\n", "steps"),
    "unknown table": ("[settings]\n[priors]\n[more]\n", "more"),
    "no settings": ("[priors]\n", "settings"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_wrong_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, named = WRONG[case]
    (tmp_path / "object-sd1.toml").write_text(f"title = ''\nwhy = ''\nsources = []\n{content}", encoding="utf-8")
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    with pytest.raises(SettingsError, match=named):
        load_preset("object", SD1)


def test_a_family_without_a_file_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    with pytest.raises(SettingsError, match=r"'style' for Stable Diffusion XL") as caught:
        load_preset("style", SDXL)
    assert "none" in caught.value.remedy


def test_what_is_given_wins() -> None:
    whole = preset_values("person", SDXL, ())
    assert whole == load_preset("person", SDXL).settings
    rest = preset_values("person", SDXL, {"steps", "flip", "seed"})
    assert rest == {name: value for name, value in whole.items() if name not in ("steps", "flip")}
    assert preset_values("person", SDXL, (), priors=True) == {**whole, "prior_count": 200}
    assert preset_values("person", SDXL, {"prior_count"}, priors=True) == whole


@pytest.mark.parametrize(("subject", "family"), CASES, ids=IDS)
def test_the_command_line_fills_in_what_neither_flag_nor_file_gives(
    subject: str, family: Family, tmp_path: Path
) -> None:
    """A flag that repeats a default is given as well, and a run has the same settings as one typed by hand."""
    path = tmp_path / "run.toml"
    path.write_text(f'preset = "{subject}"\nrank = 5\n', encoding="utf-8")
    listener = Recorder()
    chosen = apply_preset(parsed([str(path), "--steps", "800", "--no-flip", "--name", "x"]), family, listener)
    by_hand = load_preset(subject, family).settings | {"rank": 5, "steps": 800, "flip": False, "name": "x"}
    words = []
    for name, value in by_hand.items():
        flag = name.replace("_", "-")
        words.append(f"--{'no-' * (value is False)}{flag}" if isinstance(value, bool) else f"--{flag}={value}")
    typed = parsed(words)
    assert chosen == typed.model_copy(update={"preset": subject})
    assert chosen.result_settings() == typed.result_settings()
    [note] = listener.notes
    rate = {"krea2": "0.0003", "anima": "5e-05"}.get(family.name, "0.0001")
    assert note.startswith(f"Preset {subject} for {family.title}: learning_rate {rate}, ")
    assert "rank 16" not in note
    assert note.endswith("; kept as you set them: steps, rank, flip.")


def test_without_a_preset_nothing_changes() -> None:
    settings, listener = TrainSettings(), Recorder()
    assert apply_preset(settings, SD1, listener) is settings
    assert listener.events == []


def test_filling_twice_gives_nothing_more() -> None:
    once = apply_preset(TrainSettings(preset="style"), SD2, Recorder())
    listener = Recorder()
    assert apply_preset(once, SD2, listener) == once
    assert listener.notes[0].startswith("Preset style for Stable Diffusion 2.x: nothing; kept as you set them: steps,")


def test_class_pictures_are_given_where_a_prompt_for_them_is() -> None:
    prompt = "--class-prompt=a photo of a dog"
    assert apply_preset(parsed(["--preset=animal", prompt]), SD1, Recorder()).prior_count == 200
    assert apply_preset(parsed(["--preset=animal"]), SD1, Recorder()).prior_count == 0
    assert apply_preset(parsed(["--preset=animal", prompt, "--prior-count=0"]), SD1, Recorder()).prior_count == 0
    assert apply_preset(parsed(["--preset=style", prompt]), SD1, Recorder()).prior_count == 0


def test_what_was_given_may_contradict_the_preset() -> None:
    with pytest.raises(SettingsError, match="lr_warmup_steps"):
        apply_preset(TrainSettings(preset="object", lr_warmup_steps=700, lr_schedule="linear"), SD1, Recorder())
    with pytest.raises(SettingsError, match="preset is for adapters"):
        TrainSettings.checked({"preset": "object", "adapter": "full"})


def test_on_a_node_what_was_changed_wins() -> None:
    """There every widget gives a value; one that still has its default leaves the choice to the preset."""
    widgets: dict[str, Any] = {name: field.default for name, field in TrainSettings.model_fields.items()}
    widgets |= {"preset": "style", "rank": 8, "learning_rate": 1e-4 * (1 + 1e-15), "alpha": 4.0, "name": "watercolour"}
    settings = TrainSettings.checked(widgets)
    assert TrainSettings().changed() == set()
    assert settings.changed() == {"preset", "rank", "alpha", "name"}
    chosen = apply_preset(settings, SD1, Recorder(), settings.changed())
    expected = load_preset("style", SD1).settings | {"rank": 8, "alpha": 4.0, "name": "watercolour", "preset": "style"}
    assert chosen == TrainSettings.checked(expected)


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_checkpoint, tmp_path_factory.mktemp("subject") / "pictures")


def test_the_fingerprint_is_that_of_the_values(world: World) -> None:
    def fingerprint(settings: TrainSettings) -> str:
        return run_fingerprint(world.base, world.subject, (), settings, "fp32")

    by_preset = apply_preset(TrainSettings(preset="style", steps=90), world.base.family, Recorder())
    by_hand = TrainSettings.checked(load_preset("style", SD1).settings | {"steps": 90})
    assert by_hand.preset == "none"
    assert fingerprint(by_preset) == fingerprint(by_hand) != fingerprint(TrainSettings(steps=90))


def test_train_takes_the_preset_of_the_base_models_family(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The whole way: a run that was begun by hand is found again by the preset, and not trained twice."""
    own = {name: value for name, value in COMMON.items() if name != "learning_rate"}
    values = {**own, "steps": 1, "base": tiny_checkpoint, "images": noisy_pictures(tmp_path / "dog", 2, 0)}
    values |= {"device": "cpu", "output_dir": tmp_path / "out", "tokenizer": DEMO / "base" / "tokenizer"}
    listener = Recorder()
    first = run_train(TrainCommand.checked(values | {"preset": "style"}), listener)
    recorded = RunFolder(first.run).record["settings"]
    assert {name: recorded[name] for name in ("lr_schedule", "flip", "rank")} == {
        "lr_schedule": "linear",
        "flip": True,
        "rank": COMMON["rank"],
    }
    assert any(note.startswith("Preset style for Stable Diffusion 1.x: ") for note in listener.notes)
    again = run_train(TrainCommand.checked({**load_preset("style", SD1).settings, **values}), Recorder())
    assert (again.run, again.started_from) == (first.run, 1)


def test_advice_on_class_pictures_is_a_setting_of_theirs() -> None:
    assert all(set(load_preset(*case).priors) <= set(PriorSettings.model_fields) for case in CASES)
