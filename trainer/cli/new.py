"""What the command new does: a commented settings file to begin with."""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import SettingsError, suggest
from ..core.files import write_atomic
from ..core.toml import read_toml
from ..settings.base import field_extra
from ..settings.train import TrainCommand, TrainSettings
from .flags import checked_settings, choices_of
from .parser import PROGRAM, first_sentence

_PRESETS = Path(__file__).resolve().parents[1] / "training" / "presets"
_WIDTH = 100
_REQUIRED = ("base", "images")
_PROMPTS: dict[str, dict[str, Any]] = {  # of a preset: values to begin with in place of the defaults
    "object": {"instance_prompt": "a photo of sks {class}", "class_noun": "toy"},
    "animal": {"instance_prompt": "a photo of sks {class}", "class_noun": "dog"},
    "person": {"instance_prompt": "a photo of sks {class}", "class_noun": "person"},
    "style": {"instance_prompt": "a picture in sks style"},
}


def write_settings_file(path: Path, given: Mapping[str, Any], names: Sequence[str]) -> Path:
    """Write a settings file for `train`; an existing file is never overwritten.

    Args:
        path: The file.
        given: The values that are known already, by setting.
        names: The settings that stand in the file, in order.

    Returns:
        The path of the file.

    Raises:
        SettingsError: The name does not end in .toml, there is a file of that name, or a value is not possible.
        WeightsError: The base model is given and can't be read.
        StorageError: The file can't be written.
    """
    if path.suffix.lower() != ".toml":
        raise SettingsError(f"{path} does not end in .toml.", f"Call it {path.name}.toml.")
    if os.path.lexists(path):
        raise SettingsError(f"{path} exists already.", "Choose another name, or remove that file first.")
    preset = str(given.get("preset", "none"))
    values = {"name": _name_for(path), **_PROMPTS.get(preset, {}), **given}
    checked_settings(TrainCommand, {**dict.fromkeys(_REQUIRED, "x"), **values})
    images = values.get("images")
    if images and not os.path.exists(Path(images).expanduser()):
        raise SettingsError(f"{images} does not exist.", f"Check {suggest('images')} for a typing error.")
    text = "\n".join(_lines(path, values, names, _Presets.of(preset, values.get("base"))))
    return write_atomic(path, text.encode(), replace=False)


def _name_for(path: Path) -> str:
    """The file's name as that of the adapter, if it can be one."""
    with contextlib.suppress(SettingsError):
        return TrainSettings.checked({"name": path.stem}).name
    return str(TrainSettings.model_fields["name"].default)


class _Presets:
    """What a preset sets, for one family or for each.

    Attributes:
        values: Name of a family → setting → value; empty without a preset.
    """

    def __init__(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        self.values = values

    @classmethod
    def of(cls, preset: str, base: Any) -> _Presets:
        """The values of a preset for the family of a base model; for every family if none is given."""
        if base:
            from .inspect import family_of

            family = family_of(Path(base).expanduser()).name  # fails for a wrong path before the file is written
        if preset == "none":
            return cls({})
        families = [family] if base else [file.stem.partition("-")[2] for file in sorted(_PRESETS.glob("animal-*"))]
        return cls({family: read_toml(_PRESETS / f"{preset}-{family}.toml")["settings"] for family in families})

    def settings(self) -> set[str]:
        """The settings that it sets for any family."""
        return {name for values in self.values.values() for name in values}

    def lines(self) -> Iterator[str]:
        """A table of them, as comments."""
        if not self.values:
            return
        names = list(dict.fromkeys(name for values in self.values.values() for name in values))
        rows = [["", *self.values]]
        rows += [
            [name, *(_plain(values[name]) if name in values else "-" for values in self.values.values())]
            for name in names
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        yield "# It sets these, by the family of the base model; what you set in this file overrides them:"
        for row in rows:
            cells = [
                cell.ljust(width) if index == 0 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            yield "#   " + "  ".join(cells).rstrip()


def _lines(path: Path, values: Mapping[str, Any], names: Sequence[str], presets: _Presets) -> Iterator[str]:
    yield f"# Settings of a training. To start it: {PROGRAM} train {path.name}"
    yield "# Each is also a flag (--steps 400), which overrides this file. All the others, with their ranges:"
    yield f"# docs/settings.md, or {PROGRAM} train --help all"
    yield "# Paths are in single quotes, in which a backslash is written once."
    of_preset = presets.settings()
    for name in names:
        field = TrainCommand.model_fields[name]
        value = values.get(name, "" if name in _REQUIRED else field.default)
        if value and field_extra(TrainCommand, name)["path"]:
            value = Path(value)
        yield ""
        is_left_to_preset = name in of_preset and name not in values
        yield from _comment(name, field.description or "", is_left_to_preset)
        if is_left_to_preset:
            only = [each[name] for each in presets.values.values() if name in each]
            yield f"# {name} = {_toml(only[0] if len(presets.values) == 1 else value)}"
        else:
            yield f"{name} = {_toml(value)}"
        if name == "preset":
            yield from presets.lines()
    yield ""


def _comment(name: str, description: str, is_left_to_preset: bool) -> Iterator[str]:
    """What a setting is, as lines of a comment."""
    choices = [str(choice) for choice in choices_of(TrainCommand, name)]
    explains_choices = any(description.startswith(f"{choice}:") for choice in choices)
    text = description if explains_choices else first_sentence(description)
    if choices and not explains_choices:
        text += f" One of: {', '.join(choices)}."
    if name in _REQUIRED:
        text += " Required."
    if is_left_to_preset:
        text += " Left to the preset; uncomment it to set it yourself."
    return (f"# {line}" for line in textwrap.wrap(text, _WIDTH - 2, break_on_hyphens=False))


def _plain(value: Any) -> str:
    """A value in the table of a preset."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _toml(value: Any) -> str:
    """A value as TOML; a path in single quotes, in which a backslash is one."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    prefers_single_quotes = isinstance(value, Path) or "\\" in text or not text
    if prefers_single_quotes and "'" not in text and text.isprintable():
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
