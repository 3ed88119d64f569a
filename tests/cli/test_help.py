"""Help in two lengths, and what is said of a word that no command knows."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest
from pack.trainer.__main__ import COMMANDS, FIRST_RUN, Command, _parser, parse
from pack.trainer.cli.flags import settings_from
from pack.trainer.cli.parser import CommandParser, first_sentence, nearest
from pack.trainer.settings.train import TrainCommand
from shell import Shell

LONG = [command for command in COMMANDS if command.first_flags]
SHORT = [command for command in COMMANDS if not command.first_flags]
PARSERS = _parser().commands()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("NO_COLOR", "1")
    return Shell(capsys)


def flags_shown(text: str) -> list[str]:
    return re.findall(r"^  (?:-\w(?: \S+)?, )?(--[a-z0-9-]+)", text, re.MULTILINE)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_the_first_run_has_a_dozen_settings_or_so() -> None:
    wanted = {"base", "images", "instance_prompt", "class_noun", "preset", "name", "steps", "resolution"}
    assert wanted | {"output_dir", "fit", "resume"} <= set(FIRST_RUN)
    assert len(FIRST_RUN) <= 15


@pytest.mark.parametrize("command", LONG, ids=lambda command: command.name)
def test_help_is_short_and_says_how_to_see_the_rest(run: Shell, command: Command) -> None:
    assert run(command.name, "--help") == 0
    assert flags_shown(run.output) == [flag_of(name) for name in command.first_flags if name != command.positional]
    assert "Example:\n" in run.output
    assert f"python -m trainer {command.name} --help all\n" in run.output
    assert len(run.lines) < 80
    assert not run.errors


@pytest.mark.parametrize("command", LONG, ids=lambda command: command.name)
def test_all_flags_are_those_of_the_groups(run: Shell, command: Command) -> None:
    assert run(command.name, "--help", "all") == 0
    everything = set(flags_shown(run.output)) - {"--help"}
    assert run(command.name, "--help") == 0
    short = set(flags_shown(run.output))
    more = re.search(r"^(\d+) more flags", run.output, re.MULTILINE)
    assert more
    assert int(more[1]) + len(short) == len(everything)
    in_groups: set[str] = set() if not command.positional else {"--config"}
    for group in PARSERS[command.name].flag_groups():
        assert run(command.name, "--help", group) == 0
        shown = set(flags_shown(run.output))
        assert shown
        assert not shown & in_groups
        in_groups |= shown
    assert in_groups == everything


@pytest.mark.parametrize("command", SHORT, ids=lambda command: command.name)
def test_help_of_a_command_with_few_flags_shows_all(run: Shell, command: Command) -> None:
    assert run(command.name, "--help") == 0
    fields = [name for name in command.settings.model_fields if name != command.positional]
    assert {flag_of(name) for name in fields} <= set(flags_shown(run.output))
    assert len(fields) <= 13, "give it first_flags"


@pytest.mark.parametrize("command", LONG, ids=lambda command: command.name)
def test_the_example_is_one_that_the_command_takes(command: Command) -> None:
    """All of its settings have an effect, and it begins with those that the help shows."""
    name, *words = shlex.split(command.example)
    assert name == command.name
    settings = settings_from(parse([name, *words]), command.settings)
    assert settings.without_effect() == {}
    given = {word for word in words if word.startswith("--")}
    assert given <= {flag_of(name) for name in command.first_flags}


def test_groups_come_in_the_order_of_a_first_reading(run: Shell) -> None:
    assert list(PARSERS["train"].flag_groups())[:3] == ["base-model", "subject", "class-pictures"]
    assert run("train", "--help", "Class_Pictures") == 0
    assert run.lines[0] == "Class pictures:"


@pytest.mark.parametrize(
    ("words", "problem", "remedy"),
    [
        (["trian"], "There is no command 'trian'.", "Did you mean python -m trainer train?"),
        (["Merge"], "There is no command 'Merge'.", "Did you mean python -m trainer merge?"),
        (["zzz"], "There is no command 'zzz'.", "python -m trainer --help lists the commands."),
        ([], "COMMAND is missing.", "Type python -m trainer COMMAND; python -m trainer --help explains it."),
        (["inspect"], "FILE is missing.", "Type python -m trainer inspect FILE; python -m trainer inspect --help"),
        (["train", "--steps"], "--steps has no value.", "Write it after the flag: --steps N."),
        (["demo", "--family", "flux"], "--family can't be 'flux'.", "Did you mean flux2?"),
        (["demo", "--family", "zzz"], "--family can't be 'zzz'.", "Choose one of: sd1, flux2."),
        (["completion", "bsh"], "SHELL can't be 'bsh'.", "Did you mean bash?"),
        (
            ["train", "--help", "memry"],
            "There is no help on 'memry'.",
            "Did you mean python -m trainer train --help memo",
        ),
        (
            ["train", "--help", "mem"],
            "There is no help on 'mem'.",
            "Did you mean python -m trainer train --help memory?",
        ),
        (["train", "--help", "zzz"], "There is no help on 'zzz'.", "Choose one of: all, base-model, subject, "),
        (
            ["train", "--flip=yes"],
            "Argument --flip/--no-flip: ",
            "python -m trainer train --help shows how it is used.",
        ),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_mistakes_are_named_with_what_was_meant(run: Shell, words: list[str], problem: str, remedy: str) -> None:
    assert run(*words) == 2
    first, second = run.errors.splitlines()
    assert first.startswith(f"error: {problem}")
    assert second.startswith(f"fix: {remedy}")
    assert not run.output


@pytest.mark.parametrize("from_file", [False, True], ids=["flag", "file"])
def test_a_mistyped_choice_is_named_with_the_nearest(
    run: Shell, from_file: bool, tmp_path: pytest.TempPathFactory
) -> None:
    words = ["train", "--base", "x", "--images", "y"]
    if from_file:
        path = tmp_path / "run.toml"  # type: ignore[operator]
        path.write_text('optimizer = "AdamW8bit"\n', encoding="utf-8")
        words.append(str(path))
    else:
        words += ["--optimizer", "AdamW8bit"]
    assert run(*words) == 1
    assert "error: --optimizer can't be 'AdamW8bit'; the choices are adamw, " in run.errors
    assert "\nfix: Did you mean --optimizer adamw-8bit?\n" in run.errors


def test_a_choice_that_resembles_none_lists_them(run: Shell) -> None:
    assert run("train", "--base", "x", "--images", "y", "--preset", "zzz") == 1
    assert "'object'" in run.errors
    assert "Did you mean" not in run.errors


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Peak learning rate.", "Peak learning rate."),
        ("Size, e.g. 512x768. Larger ones take longer.", "Size, e.g. 512x768."),
        ("As in Kynkäänniemi et al. 2024. More.", "As in Kynkäänniemi et al. 2024."),
        ("settings file", "settings file."),
    ],
)
def test_the_first_sentence(text: str, sentence: str) -> None:
    assert first_sentence(text) == sentence


def test_nearest_is_case_insensitive_and_may_be_none() -> None:
    assert nearest("EULER", ["ddim", "euler"]) == "euler"
    assert nearest("zzz", ["ddim", "euler"]) == ""


def test_every_first_flag_is_a_setting_of_the_command() -> None:
    for command in LONG:
        assert set(command.first_flags) <= set(command.settings.model_fields), command.name
    assert set(FIRST_RUN) <= set(TrainCommand.model_fields)


def test_subparsers_are_of_the_same_kind() -> None:
    assert all(isinstance(parser, CommandParser) for parser in PARSERS.values())
    assert all(isinstance(parser, argparse.ArgumentParser) for parser in PARSERS.values())
