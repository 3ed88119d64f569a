"""Errors name settings by `suggest`; the command line words them as flags, which exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from helpers import ROOT
from pack.trainer.__main__ import COMMANDS
from pack.trainer.cli.flags import flag, flag_wording
from pack.trainer.cli.terminal import Terminal
from pack.trainer.core.errors import SettingsError, suggest, worded
from pack.trainer.core.events import Note
from pack.trainer.settings.data import SubjectTable
from pack.trainer.settings.evaluate import ScoreCommand
from pack.trainer.settings.merge import MergeCommand
from pack.trainer.settings.train import TrainCommand
from pydantic.fields import FieldInfo
from shell import Shell

KINDS = [*(command.settings for command in COMMANDS), SubjectTable]
ENGINE = sorted((ROOT / "trainer").rglob("*.py"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("rank", None, "--rank"),
        ("resume", "never", "--resume never"),
        ("prior_count", 100, "--prior-count 100"),
        ("gradient_checkpointing", True, "--gradient-checkpointing"),
        ("combine", False, "--no-combine"),
        ("class_prompt", "a photo of a dog", '--class-prompt "a photo of a dog"'),
        ("lora", "FILE:0.8", "--lora FILE:0.8"),
    ],
)
def test_a_setting_is_worded_as_its_flag(setting: str, value: object, expected: str) -> None:
    assert worded(suggest(setting, value), flag) == expected


def test_what_is_no_flag_of_the_command_has_its_plain_name() -> None:
    """The setting that is given without a flag, tables of a settings file, and settings of other commands."""
    assert flag_wording(MergeCommand, "loras")("loras", None) == "loras"
    assert flag_wording(TrainCommand)("subject", None) == "subject"
    assert flag_wording(ScoreCommand, "pictures")("subject", None) == "--subject"
    assert flag_wording(ScoreCommand, "pictures")("resume", "never") == "resume = never"


def suggestions() -> Iterator[tuple[str, str, Any]]:
    """Where, which setting, and which value (None if it is not in the source) any error of the engine suggests."""
    for path in ENGINE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_suggestion = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "suggest"
            if is_suggestion and isinstance(node.args[0], ast.Constant):
                constants = [argument.value for argument in node.args[1:] if isinstance(argument, ast.Constant)]
                where = f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"
                yield where, node.args[0].value, constants[0] if constants else None


SUGGESTIONS = list(suggestions())


def takes(field: FieldInfo, value: Any) -> bool:
    if isinstance(value, bool) or field.annotation is bool:
        return isinstance(value, bool) and field.annotation is bool
    if get_origin(field.annotation) is Literal:
        return value in get_args(field.annotation)
    return True


def test_suggestions_are_found() -> None:
    assert ("device", "auto") in [(name, value) for _, name, value in SUGGESTIONS]
    assert ("prior_count", 100) in [(name, value) for _, name, value in SUGGESTIONS]
    assert len(SUGGESTIONS) > 50


def test_every_suggested_setting_exists_and_takes_the_value() -> None:
    for where, name, value in SUGGESTIONS:
        fields = [kind.model_fields[name] for kind in KINDS if name in kind.model_fields]
        assert fields, f"{where}: there is no setting {name}"
        assert value is None or any(takes(field, value) for field in fields), f"{where}: {name} can't be {value!r}"


def test_every_flag_is_one_of_the_command_line() -> None:
    from make_settings_page import subparsers

    flags = {
        option for parser in subparsers().values() for action in parser._actions for option in action.option_strings
    }
    for where, name, value in SUGGESTIONS:
        words = worded(suggest(name, value), flag).split()
        assert words[0] in flags or name in {command.positional for command in COMMANDS}, where


def test_the_engine_speaks_of_no_flag() -> None:
    for path in ENGINE:
        if path.parent.name == "cli" or path.name == "__main__.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                assert not re.search(r"(^|[\s(`'\"])--[a-z]", node.value), f"{path.relative_to(ROOT)}:{node.lineno}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--base", "x", "--images", "y", "--device", "cuda:99"], "\nfix: Use --device auto, or "),
        (["train", "--base", "x", "--images", "y", "--combine"], "--combine is on"),
        (["train", "--base", "x", "--images", "y", "--steps", "0"], "error: --steps must be at least 1 (given: 0)."),
        (["train", "--base", "x"], "error: --images is required"),
        (["train", "--base", "x", "--images", "y", "--prior-count", "5"], 'set --class-prompt "a photo of a dog"'),
        (["fuse", "--base", "x", "--output", "y"], "set --lora FILE:STRENGTH"),
        (["merge", "--output", "x.safetensors"], "error: loras is required"),
        (["plan", "--base", "x", "--device", "cpu"], "\nfix: Give a graphics card's memory in GB: --memory 8."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_messages_on_the_command_line_show_flags(run: Shell, words: list[str], expected: str) -> None:
    assert run(*words) == 1
    assert expected in run.errors
    assert "⟦" not in run.errors


def test_the_same_messages_are_plain_in_code() -> None:
    with pytest.raises(SettingsError) as caught:
        TrainCommand.checked({"base": "x", "images": "y", "prior_count": 5})
    assert "set class_prompt = a photo of a dog" in caught.value.problem
    assert "⟦" not in str(caught.value)


def test_notes_show_flags(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(flag_wording(TrainCommand))
    terminal.report(Note(f"Lower {suggest('resolution')}.", warning=True))
    assert capsys.readouterr().err == "warning: Lower --resolution.\n"
