"""Settings from flags and TOML files: one flag and one key for every field. And settings in errors as flags."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic.fields import FieldInfo

from ..core.errors import SettingsError, Wording, plain, suggest
from ..core.toml import read_toml
from ..settings.base import Settings, field_extra
from .parser import nearest

_CONFIG_HELP = "settings file with the same names; flags override it"
_WRITTEN = ("output", "output_dir", "report")  # paths of what need not exist yet
_STRENGTHS = re.compile(r"(:-?[\d.]+){1,2}$")
GROUP_ORDER = (
    "Base model",
    "Subject",
    "Class pictures",
    "Training",
    "Adapter",
    "Text encoders",
    "Pivotal tuning",
    "Previews",
    "Saving",
)
"""The groups of settings that come first, in this order; the others follow in the order of their definition."""
_LIST_METAVARS = {"block_weights": "PATTERN=FACTOR"}
_TYPE_METAVARS = {int: "N", float: "X", Path: "PATH"}
SettingsT = TypeVar("SettingsT", bound=Settings)


def add_flags(parser: argparse.ArgumentParser, settings: type[Settings], positional: str = "") -> None:
    """Add a flag for every field of `settings`, grouped, and the settings file.

    Args:
        parser: The parser of a command.
        settings: The command's settings.
        positional: The field that is given without a flag; "": the settings file is.
    """
    if positional:
        field = settings.model_fields[positional]
        is_list = get_origin(field.annotation) is tuple
        parser.add_argument(
            positional,
            nargs="*" if is_list else "?",
            default=argparse.SUPPRESS,
            metavar="FILE[:STRENGTH]" if is_list else "FILE",
            help=_help(settings, positional, field),
        )
        parser.add_argument("--config", type=Path, metavar="RUN.toml", help=_CONFIG_HELP)
    else:
        parser.add_argument("config", nargs="?", type=Path, metavar="RUN.toml", help=_CONFIG_HELP)
    groups: dict[str, list[str]] = {}
    for name in _flags(settings, positional):
        groups.setdefault(field_extra(settings, name)["group"], []).append(name)
    for title in sorted(groups, key=group_index):
        group = parser.add_argument_group(title)
        for name in groups[title]:
            add_flag(group, settings, name)


def group_index(title: str) -> int:
    """Where a group of settings stands; those that are not in `GROUP_ORDER` come last."""
    return GROUP_ORDER.index(title) if title in GROUP_ORDER else len(GROUP_ORDER)


def add_flag(group: argparse._ActionsContainer, settings: type[Settings], name: str) -> argparse.Action:
    """Add the flag of one field, and return it.

    Args:
        group: A parser, or a group of its flags.
        settings: The settings that have the field.
        name: The field.
    """
    field = settings.model_fields[name]
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(settings, name, field), "dest": name}
    if field.annotation is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(field.annotation) is tuple:
        options["action"] = "append"
        options["metavar"] = _LIST_METAVARS.get(name, "FILE[:STRENGTH]")
    else:
        options["metavar"] = _metavar(field)
    return group.add_argument(flag(name), **options)


def given_flags(arguments: argparse.Namespace, settings: type[Settings]) -> dict[str, Any]:
    """The values of the flags that were given, by setting."""
    fields = settings.model_fields
    return {name: _converted(fields[name], value) for name, value in vars(arguments).items() if name in fields}


def settings_from(arguments: argparse.Namespace, settings: type[SettingsT]) -> SettingsT:
    """Settings from the settings file, if any, and the flags.

    Raises:
        SettingsError: Something is unknown, missing or out of range.
    """
    values: dict[str, Any] = read_toml(arguments.config) if arguments.config else {}
    flags = given_flags(arguments, settings)
    if arguments.config:
        of_file = {name: value for name, value in values.items() if name not in flags}
        _require_paths_from_here(arguments.config, settings, of_file)
    return checked_settings(settings, values | flags)


def checked_settings(settings: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    """Settings from values of a file and of flags.

    Raises:
        SettingsError: Something is unknown, missing or out of range; of a mistyped choice it names the nearest.
    """
    for name, value in values.items():
        choices = [str(choice) for choice in choices_of(settings, name)]
        if isinstance(value, str) and choices and value not in choices and (meant := nearest(value, choices)):
            raise SettingsError(
                f"{suggest(name)} can't be '{value}'; the choices are {', '.join(choices)}.",
                f"Did you mean {suggest(name, meant)}?",
            )
    return settings.checked(values)


def choices_of(settings: type[Settings], name: str) -> tuple[Any, ...]:
    """The values that a setting can have if it is a choice; else none."""
    field = settings.model_fields.get(name)
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _converted(field: FieldInfo, value: Any) -> Any:
    """A flag's text as the number that its setting holds; what is no number stays text, which the settings refuse."""
    kinds = {field.annotation, *get_args(field.annotation)}
    if isinstance(value, str):
        for kind in (int, float):
            if kind in kinds or (kind is float and int in kinds):  # 1e3 is a whole number, too
                with contextlib.suppress(ValueError):
                    return kind(value)
    return value


def _require_paths_from_here(config: Path, settings: type[Settings], values: Mapping[str, Any]) -> None:
    """Refuse a path that leads nowhere from the current folder, but somewhere from the settings file's.

    Args:
        config: The settings file.
        settings: Whose values it gives.
        values: What it gives.

    Raises:
        SettingsError: Names the path that was meant.
    """
    for name, text in _input_paths(settings, values):
        meant = os.path.join(config.absolute().parent, text)
        if text and not os.path.exists(text) and os.path.exists(meant):
            raise SettingsError(
                f"{name} in {config}: '{text}' is not in {Path.cwd()}, where the command runs; paths in a settings "
                "file are relative to that folder, as those in flags are.",
                f"Write the whole path, '{meant}', or run the command in {config.absolute().parent}.",
            )


def _input_paths(settings: type[Settings], values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and texts of the values, and of those in tables, that are paths of what is read, without strengths."""
    for name, value in values.items():
        if name not in settings.model_fields:
            continue
        field = settings.model_fields[name]
        entries = value if isinstance(value, list) else [value]
        if is_table(field):
            for table in entries:
                if isinstance(table, dict):
                    yield from _input_paths(get_args(field.annotation)[0], table)
        elif field_extra(settings, name)["path"] and name not in _WRITTEN:
            yield from ((name, _STRENGTHS.sub("", text).strip()) for text in entries if isinstance(text, str))


def with_dashes(word: str) -> str:
    """A word of a command line; if it is a flag, with dashes for underscores: `--max_norm=1` is `--max-norm=1`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def flag(setting: str, value: str | None = None) -> str:
    """A setting as the command line writes it.

    Args:
        setting: Its name.
        value: Its value; None: the flag alone.

    Returns:
        Such as `--rank`, `--resume never`, `--class-prompt "a photo of a dog"`, `--combine` for True, `--no-combine`
        for False.
    """
    name = setting.replace("_", "-")
    if value == "False":
        return f"--no-{name}"
    if value is None or value == "True":
        return f"--{name}"
    return f'--{name} "{value}"' if " " in value else f"--{name} {value}"


def flag_wording(settings: type[Settings], positional: str = "") -> Wording:
    """How a command words the settings in errors: as its flags, and what is none of them by its plain name.

    Args:
        settings: The command's settings.
        positional: The field that is given without a flag.
    """
    flags = _flags(settings, positional)

    def word(setting: str, value: str | None) -> str:
        return flag(setting, value) if setting in flags else plain(setting, value)

    return word


def is_table(field: FieldInfo) -> bool:
    """Whether a field holds tables, which only a settings file can have."""
    return any(isinstance(part, type) and issubclass(part, Settings) for part in get_args(field.annotation))


def _flags(settings: type[Settings], positional: str) -> dict[str, FieldInfo]:
    """The fields that have a flag."""
    return {name: field for name, field in settings.model_fields.items() if name != positional and not is_table(field)}


def _metavar(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(field.annotation))
    types = [field.annotation]
    for part in get_args(field.annotation):
        types.append(get_args(part)[0] if get_origin(part) is Annotated else part)
    return next((_TYPE_METAVARS[kind] for kind in types if kind in _TYPE_METAVARS), "TEXT")


def _help(settings: type[Settings], name: str, field: FieldInfo) -> str:
    unit = field_extra(settings, name)["unit"]
    if field.is_required():
        default = "required"
    elif field.default in (None, "", ()):
        default = "default: none"
    else:
        default = f"default: {field.default}"
    text = f"{field.description} [{unit + '; ' if unit else ''}{default}]"
    return text.replace("%", "%%")
