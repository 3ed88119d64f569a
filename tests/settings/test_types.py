"""A value of another type is refused, not converted; what the command line gives as text is converted once."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.__main__ import parse
from pack.trainer.cli.flags import is_table, settings_from
from pack.trainer.core.errors import SettingsError
from pack.trainer.settings.base import Settings
from pack.trainer.settings.train import TrainCommand
from setting_values import KINDS, REQUIRED

NEEDED = {"base": "model.safetensors", "images": "dog"}
FIELDS = [(command, name) for command, kind in KINDS.items() for name in kind.model_fields]
VALUES: dict[str, list[Any]] = {
    "switch": [True, False],
    "number": [0, 1, 3, 0.5],
    "text": ["7", "true", "x"],
    "list": [["x"], []],
    "table": [{"x": 1}],
    "tables": [[{"images": "x"}]],
    "date": [datetime.date(2024, 1, 2)],
}


def kind_of(name: str, settings: type[Settings]) -> str:
    """Which of `VALUES` a setting takes."""
    field = settings.model_fields[name]
    parts = {field.annotation, *get_args(field.annotation)}
    if is_table(field):
        return "tables"
    if get_origin(field.annotation) is tuple:
        return "list"
    if bool in parts:
        return "switch"
    return "number" if parts & {int, float} else "text"


def refusal(settings: type[Settings], name: str, value: Any) -> str:
    """What is said about one setting with that value; "" if nothing is."""
    try:
        settings.checked({name: value})
    except SettingsError as error:
        return next((text for text in error.problem.split("; ") if text.startswith((f"{name}: ", f"{name} must "))), "")
    return ""


@pytest.mark.parametrize(("command", "name"), FIELDS)
def test_a_value_of_another_type_is_refused(command: str, name: str) -> None:
    for kind, values in VALUES.items():
        if kind == kind_of(name, KINDS[command]):
            continue
        for value in values:
            if value == [] and kind_of(name, KINDS[command]) == "tables":
                continue  # no tables
            said = refusal(KINDS[command], name, value)
            assert f"(given: {value!r})" in said, (kind, value)
            assert " must be " in said or " is a single table: " in said, said


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"learning_rate": True}, "learning_rate must be a number (given: True)"),
        ({"text_encoder_lr": True}, "text_encoder_lr must be a number (given: True)"),
        ({"steps": "800"}, "steps must be a number without quotes: steps = 800 (given: '800')"),
        ({"steps": "many"}, "steps must be a number (given: 'many')"),
        ({"flip": 1}, "flip must be on or off (true or false, without quotes) (given: 1)"),
        ({"flip": "true"}, "flip must be on or off (true or false, without quotes) (given: 'true')"),
        ({"name": 5}, "name must be text in quotes (given: 5)"),
        ({"base_lora": "x.safetensors"}, 'base_lora must be a list: base_lora = ["x.safetensors"]'),
        ({"base_lora": [{"file": "x"}]}, 'base_lora must be a list of quoted strings: base_lora = ["…", "…"]'),
        ({"subject": {"images": "x"}}, "subject: is a single table: write [[subject]] instead of [subject]"),
        ({"subject": ["x"]}, "subject must be tables, written as [[subject]]"),
        ({"subject": [{"imagse": "x"}]}, "subject.1.imagse is not a setting of this table. Did you mean 'images'"),
        ({"steps": 8.5}, "steps must be a whole number (given: 8.5)"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number"),
        ({"max_grad_norm": -math.inf}, "max_grad_norm must be"),
        ({"learning_rate": 10**400}, "learning_rate must be a number"),
        ({"seed": 10**5000}, "seed must be at most"),
        ({"name": "caf\udce9"}, "name: contains bytes that are not valid text"),
        ({"base_lora": ["caf\udce9"]}, "base_lora: contains bytes that are not valid text; rename the file"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named_with_what_is_right(value: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        TrainCommand.checked({**NEEDED, **value})
    assert told in caught.value.problem
    assert len(caught.value.problem) < 500


def test_whole_numbers_may_be_written_as_others() -> None:
    chosen = TrainCommand.checked({**NEEDED, "steps": 8e2, "learning_rate": 1})
    assert (chosen.steps, chosen.learning_rate) == (800, 1.0)


def typed(command: str, *words: str) -> Settings:
    return settings_from(parse([command, *words]), KINDS[command])


@pytest.mark.parametrize(
    ("word", "value"),
    [("800", 800), ("8e2", 800), ("800.0", 800), ("1_000", 1000), (" 7 ", 7)],
)
def test_text_of_a_flag_becomes_a_number(word: str, value: int) -> None:
    assert typed("train", "--base=x", "--images=y", f"--steps={word}").steps == value  # type: ignore[attr-defined]


@pytest.mark.parametrize("word", ["", "many", "8.5", "true", "nan", "inf", "1e999", "9" * 5000, "0x10", "1,5"])
def test_text_of_a_flag_that_is_no_number_is_refused(word: str) -> None:
    with pytest.raises(SettingsError, match=r"^steps must ") as caught:
        typed("train", "--base=x", "--images=y", f"--steps={word}")
    assert len(caught.value.problem) < 500


@pytest.mark.parametrize("name", ["base_lora", "subject"])
def test_nothing_is_no_list(name: str) -> None:
    assert refusal(TrainCommand, name, None)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(name=st.sampled_from([name for _, name in FIELDS]), value=PLAIN)
def test_whatever_a_file_gives_is_taken_or_refused(name: str, value: Any) -> None:
    """There is no other error, and what is taken is of the setting's own type."""
    for command, kind in KINDS.items():
        if name not in kind.model_fields:
            continue
        try:
            chosen = getattr(kind.checked({**REQUIRED[command], name: value}), name)
        except SettingsError:
            continue
        if isinstance(value, bool):
            assert chosen is value
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert chosen == value
        if isinstance(value, str) and not isinstance(chosen, Path):
            assert chosen == value or name == "model"  # which is stripped


@pytest.mark.parametrize("command", KINDS)
def test_what_is_required_suffices(command: str) -> None:
    assert KINDS[command].checked(REQUIRED[command])


def test_choices_are_texts() -> None:
    """So that no number or switch can stand for one."""
    for kind in KINDS.values():
        for field in kind.model_fields.values():
            if get_origin(field.annotation) is Literal:
                assert all(isinstance(choice, str) for choice in get_args(field.annotation))
