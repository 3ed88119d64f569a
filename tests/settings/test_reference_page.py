"""docs/settings.md: what the definitions say, all of it, and nothing else."""

from __future__ import annotations

import re

import pytest
from make_settings_page import COMMANDS, NODES, OTHERS, PAGE, page, subparsers, value_of
from pack.trainer.settings.train import TrainCommand


def section(command: str) -> str:
    [found] = re.findall(rf"(?ms)^## {command}$(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"))
    return found


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tools/make_settings_page.py"


def test_every_command_is_there() -> None:
    assert set(subparsers()) == {*COMMANDS, *OTHERS}
    assert set(NODES) <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_stands_there_once(command: str) -> None:
    text = section(command)
    described = re.findall(r"(?m)^\| `(\w+)`<br>", text)
    named = [name for line in re.findall(r"(?m)^As for .*$", text) for name in re.findall(r"`(\w+)`", line)]
    assert sorted(described + named) == sorted(COMMANDS[command].model_fields)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_named_is_described_under_the_command_that_is_told(command: str) -> None:
    for earlier, names in re.findall(r"(?m)^As for \[(\S+)\]\(#\S+\): (.*)\.$", section(command)):
        described = re.findall(r"(?m)^\| `(\w+)`<br>", section(earlier))
        assert set(re.findall(r"`(\w+)`", names)) <= set(described)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_one_of_the_command(command: str) -> None:
    flags = {option for action in subparsers()[command]._actions for option in action.option_strings}
    assert set(re.findall(r"<br>`(--[\w-]+)`", section(command))) <= flags


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("steps", "whole number of steps, ≥ 1, ≤ 1 000 000"),
        ("learning_rate", "number, > 0, ≤ 1"),
        ("resolution", "whole number of pixels, a multiple of 8, ≥ 32, ≤ 4 096"),
        ("seed", "whole number, ≥ 0, ≤ 2⁶⁴ − 1"),
        ("flip", "on or off"),
        ("alpha", "number, > 0"),
        ("start_from", "path"),
        ("base_lora", "list of texts"),
        ("resume", "`auto`, `never`"),
    ],
)
def test_values_are_said_for_people(name: str, said: str) -> None:
    field = TrainCommand.model_fields[name]
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    assert value_of(field, str(extra["unit"])) == said


def test_every_table_is_one() -> None:
    """Each row has as many cells as its head, so that nothing is cut off."""
    for block in re.findall(r"(?m)(?:^\|.*\n)+", PAGE.read_text(encoding="utf-8")):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
