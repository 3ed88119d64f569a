"""Settings from flags and TOML files: one flag and one key for every field, in the field's own words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic.fields import FieldInfo

from ..core.files import read_toml
from ..settings.base import Settings, field_extra

_CONFIG = "settings file with the same names; flags win over it"
_LISTS = {"block_weights": "PATTERN=FACTOR"}
SettingsT = TypeVar("SettingsT", bound=Settings)


def add_flags(parser: argparse.ArgumentParser, settings: type[Settings], positional: str = "") -> None:
    """Add a flag for every field of `settings`, grouped.

    Args:
        parser: Of one command.
        settings: Its settings.
        positional: The field that is given without a flag; none: the settings file is.
    """
    if positional:
        field = settings.model_fields[positional]
        several = get_origin(field.annotation) is tuple
        parser.add_argument(
            positional,
            nargs="*" if several else "?",
            default=argparse.SUPPRESS,
            metavar="FILE[:STRENGTH]" if several else "FILE",
            help=_help(settings, positional, field),
        )
        parser.add_argument("--config", type=Path, metavar="RUN.toml", help=_CONFIG)
    else:
        parser.add_argument("config", nargs="?", type=Path, metavar="RUN.toml", help=_CONFIG)
    groups: dict[str, Any] = {}
    for name, field in settings.model_fields.items():
        if name == positional or is_table(field):
            continue
        title = field_extra(settings, name)["group"]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        flag = "--" + name.replace("_", "-")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(settings, name, field), "dest": name}
        if field.annotation is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif get_origin(field.annotation) is tuple:
            group.add_argument(flag, action="append", metavar=_LISTS.get(name, "FILE[:STRENGTH]"), **options)
        else:
            group.add_argument(flag, metavar=_metavar(field), **options)


def settings_from(arguments: argparse.Namespace, settings: type[SettingsT]) -> SettingsT:
    """Settings from the settings file, if any, and the flags.

    Raises:
        SettingsError: Something is unknown, missing or out of range.
    """
    values: dict[str, Any] = read_toml(arguments.config) if arguments.config else {}
    flags = {name: value for name, value in vars(arguments).items() if name in settings.model_fields}
    return settings.checked(values | flags)


def is_table(field: FieldInfo) -> bool:
    """Whether a field holds tables of a settings file."""
    return any(isinstance(part, type) and issubclass(part, Settings) for part in get_args(field.annotation))


def _choices(field: FieldInfo) -> Sequence[str]:
    return [str(choice) for choice in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []


def _metavar(field: FieldInfo) -> str:
    choices = _choices(field)
    if choices:
        return "|".join(choices)
    kinds = {int: "N", float: "X", Path: "PATH"}
    parts = [get_args(part)[0] if get_origin(part) is Annotated else part for part in get_args(field.annotation)]
    kind = next((part for part in (field.annotation, *parts) if part in kinds), None)
    return kinds[kind] if kind is not None else "TEXT"


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
