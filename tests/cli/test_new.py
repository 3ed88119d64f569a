"""A settings file to begin with: what stands in it, and that `train` takes it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pack.trainer.__main__ import FIRST_RUN, parse
from pack.trainer.cli.flags import settings_from
from pack.trainer.core.toml import read_toml
from pack.trainer.models.families import FAMILIES
from pack.trainer.settings.train import TrainCommand
from pack.trainer.training.presets import load_preset, preset_subjects
from shell import Shell

SD1 = FAMILIES[0]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content() -> str:
    return Path("dog.toml").read_text(encoding="utf-8")


def fill_in() -> None:
    """What a reader of the file does."""
    text = content()
    for name, value in {"base": "x.safetensors", "images": "photos"}.items():
        assert text.count(f"\n{name} = ''\n") == 1
        text = text.replace(f"\n{name} = ''\n", f"\n{name} = '{value}'\n")
    Path("dog.toml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("preset", ["none", *preset_subjects()])
def test_train_takes_the_file_once_base_and_images_are_set(run: Shell, preset: str) -> None:
    assert run("new", "dog.toml", "--preset", preset) == 0, run.errors
    assert run.lines == ["dog.toml"]
    assert run.errors == "Edit it, then run: python -m trainer train dog.toml\n"
    fill_in()
    settings = settings_from(parse(["train", "dog.toml"]), TrainCommand)
    assert (settings.base, settings.images) == (Path("x.safetensors"), Path("photos"))
    assert (settings.name, settings.preset) == ("dog", preset)
    assert settings.without_effect() == {}
    assert all(subject.instance_prompt for subject in settings.subjects)


def test_what_is_missing_is_named_in_turn(run: Shell) -> None:
    assert run("new", "dog.toml") == 0
    assert run("train", "dog.toml") == 1
    assert "--base" in run.errors
    assert "--images" in run.errors


@pytest.mark.parametrize("preset", preset_subjects())
def test_what_a_preset_sets_is_left_to_it_and_shown(run: Shell, preset: str) -> None:
    assert run("new", "dog.toml", "--preset", preset) == 0
    given = read_toml(Path("dog.toml"))
    for family in FAMILIES:
        assert not set(load_preset(preset, family).settings) & set(given)
    table = re.findall(r"^#   (.*)$", content(), re.MULTILINE)
    families = table[0].split()
    assert sorted(families) == sorted(family.name for family in FAMILIES)
    shown = {row.split()[0]: dict(zip(families, row.split()[1:], strict=True)) for row in table[1:]}
    for family in FAMILIES:
        values = load_preset(preset, family).settings
        assert {name for name, row in shown.items() if row[family.name] != "-"} == set(values)
        for name, value in values.items():
            if isinstance(value, bool):
                assert shown[name][family.name] == ("on" if value else "off")
            elif isinstance(value, str):
                assert shown[name][family.name] == value
            else:
                assert float(shown[name][family.name]) == value


def test_every_setting_of_a_first_run_has_a_comment(run: Shell) -> None:
    assert run("new", "dog.toml") == 0
    assert list(read_toml(Path("dog.toml"))) == list(FIRST_RUN)
    lines = content().splitlines()
    for name in FIRST_RUN:
        [index] = [number for number, line in enumerate(lines) if line.startswith(f"{name} = ")]
        assert lines[index - 1].startswith("# ")
    assert "docs/settings.md" in content()
    assert max(map(len, lines)) <= 100


def test_the_family_of_a_given_base_decides_what_is_shown(run: Shell, tiny_checkpoint: Path) -> None:
    words = ["--preset", "animal", "--base", tiny_checkpoint, "--images", "photos", "--steps", "300"]
    assert run("new", "dog.toml", *words) == 0, run.errors
    table = dict(row.split() for row in re.findall(r"^#   (\S+ .*)$", content(), re.MULTILINE))
    expected = load_preset("animal", SD1).settings
    assert set(table) == set(expected)
    assert table["resolution"] == str(expected["resolution"])
    assert f"\n# resolution = {expected['resolution']}\n" in content()
    assert "\nsteps = 300\n" in content()
    settings = settings_from(parse(["train", "dog.toml"]), TrainCommand)
    assert (settings.base, settings.steps) == (tiny_checkpoint, 300)


def test_an_existing_file_is_kept(run: Shell) -> None:
    Path("dog.toml").write_text("mine", encoding="utf-8")
    assert run("new", "dog.toml") == 1
    assert "dog.toml exists already" in run.errors
    assert content() == "mine"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["dog.txt"], "Call it dog.txt.toml."),
        (["dog.toml", "--preset", "animl"], "Did you mean --preset animal?"),
        (["dog.toml", "--steps", "0"], "--steps"),
        (["dog.toml", "--images", "nowhere"], "Check --images for a typing error."),
        (["dog.toml", "--base", "nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_what_can_not_be_is_refused_before_anything_is_written(run: Shell, words: list[str], told: str) -> None:
    assert run("new", *words) == 1
    assert told in run.errors
    assert not list(Path().glob("*.t*"))


@pytest.mark.parametrize(
    "text",
    ["C:\\models\\new dog", "it's", 'a "quoted" one', "plain", "犬 Hündin", "both ' and \\", "tab\tand \x7f"],
)
def test_texts_come_out_as_they_went_in(run: Shell, text: str) -> None:
    values: dict[str, Any] = {"instance_prompt": f"a photo of {text}", "output_dir": text}
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert run("new", "dog.toml", *words) == 0, run.errors
    read = read_toml(Path("dog.toml"))
    assert {name: read[name] for name in values} == values, json.dumps(read)


def test_a_name_that_no_adapter_can_have_is_not_taken_from_the_file(run: Shell) -> None:
    assert run("new", "con.toml") == 0, run.errors
    assert read_toml(Path("con.toml"))["name"] == "my-subject"


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_file_trains(run: Shell, tiny_checkpoint: Path, picture_folder: Callable[..., Path], here: Path) -> None:
    small = ["--resolution", "64", "--rank", "2", "--steps", "2", "--output-dir", "out"]
    assert (
        run("new", "dog.toml", "--preset", "animal", "--base", tiny_checkpoint, "--images", picture_folder(), *small)
        == 0
    )
    assert run("train", "dog.toml", "--device", "cpu") == 0, run.errors
    assert run.lines == [str(Path("out") / "dog.safetensors")]
    assert (here / "out" / "dog.safetensors").is_file()
