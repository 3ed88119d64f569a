"""Settings from flags and TOML files: one flag and one key for every field. And settings in errors as flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic.fields import FieldInfo

from ..core.errors import Wording, plain
from ..core.files import read_toml
from ..settings.base import Settings, field_extra

_CONFIG_HELP = "settings file with the same names; flags win over it"
_LIST_METAVARS = {"block_weights": "PATTERN=FACTOR"}
_TYPE_METAVARS = {int: "N", float: "X", Path: "PATH"}
SettingsT = TypeVar("SettingsT", bound=Settings)


def add_flags(parser: argparse.ArgumentParser, settings: type[Settings], positional: str = "") -> None:
    """Add a flag for every field of `settings`, grouped.

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
    groups: dict[str, Any] = {}
    for name, field in _flags(settings, positional).items():
        title = field_extra(settings, name)["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(settings, name, field), "dest": name}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.annotation) is tuple:
            options["action"] = "append"
            options["metavar"] = _LIST_METAVARS.get(name, "FILE[:STRENGTH]")
        else:
            options["metavar"] = _metavar(field)
        groups[title].add_argument(flag(name), **options)


def settings_from(arguments: argparse.Namespace, settings: type[SettingsT]) -> SettingsT:
    """Settings from the settings file, if any, and the flags.

    Raises:
        SettingsError: Something is unknown, missing or out of range.
    """
    values: dict[str, Any] = read_toml(arguments.config) if arguments.config else {}
    flags = {name: value for name, value in vars(arguments).items() if name in settings.model_fields}
    return settings.checked(values | flags)


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
