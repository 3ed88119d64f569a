"""Widgets for settings: type, choices, default and text as the setting defines them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..trainer.core.errors import SettingsError
from .wording import title

_SETTINGS = Path(__file__).with_name("settings.json")


@functools.cache
def settings_of(command: str) -> Mapping[str, dict[str, Any]]:
    """Every setting of a command by name, as `tools/make_webui_settings.py` describes it."""
    described = json.loads(_SETTINGS.read_text(encoding="utf-8"))[command]
    return {setting["name"]: setting for setting in described}


def element_id(name: str) -> str:
    """The id of a widget's element in the page."""
    return f"dreambooth_{name}"


def widget(setting: Mapping[str, Any], *, with_help: bool = True, prefix: str = "", **changes: Any) -> Any:
    """The widget of one setting.

    Args:
        setting: As `settings_of` describes it.
        with_help: Whether its text is shown below its name.
        prefix: Of its element's id, where two commands have a setting of one name.
        changes: Options that differ, such as `value`.
    """
    name, kind, default = setting["name"], setting["kind"], setting["default"]
    options: dict[str, Any] = {"label": title(name), "elem_id": element_id(prefix + name)}
    if with_help:
        options["info"] = setting["help"]
    if kind == "choice":
        return gr.Dropdown(**{"choices": setting["choices"], "value": default} | options | changes)
    if kind == "switch":
        return gr.Checkbox(**{"value": default} | options | changes)
    if kind in ("whole", "number") and not setting["optional"]:
        return gr.Number(**{"value": default, "precision": 0 if kind == "whole" else None} | options | changes)
    text = "\n".join(default) if kind == "list" else default or ""
    return gr.Textbox(**{"value": text, "lines": 1, "max_lines": 20 if kind == "list" else 1} | options | changes)


def given(command: str, names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """The settings that the user changed, as a settings file has them; a preset fills in only the others.

    Raises:
        SettingsError: A number is not one.
    """
    changed = {}
    for name, value in zip(names, values):
        setting = settings_of(command)[name]
        kind = setting["kind"]
        if isinstance(value, str) and kind not in ("choice", "switch"):
            value = value.strip()
        if value in (None, ""):
            continue
        if kind in ("whole", "number"):
            value = _number(name, value, is_whole=kind == "whole")
        elif kind == "list":
            value = [line.strip() for line in value.splitlines() if line.strip()]
        if value != setting["default"]:
            changed[name] = value
    return changed


def _number(name: str, value: Any, *, is_whole: bool) -> int | float:
    """What a widget for numbers holds.

    Raises:
        SettingsError: It is none.
    """
    try:
        return int(value) if is_whole else float(value)
    except (ValueError, OverflowError):
        kind, example = ("whole number", "8") if is_whole else ("number", "0.5")
        raise SettingsError(f"{title(name)}: '{value}' is not a {kind}.", f"Enter one such as {example}.") from None
