"""The base class of all settings: one definition per field, validated values, errors that name the setting."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import Self

from ..core.errors import SettingsError, suggest

MAX_SEED = 2**64 - 1


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    group: str = "Training",
    advanced: bool = False,
    affects_result: bool = True,
    path: bool = False,
    step: float = 0.1,
    **constraints: Any,
) -> Any:
    """Define a setting.

    Args:
        default: Its default; `...` if it is required.
        help: One or two sentences for users.
        unit: Of its value.
        group: Heading under which it is listed.
        advanced: Whether a node hides it among its advanced inputs.
        affects_result: Whether what is learned depends on it; if not, it stays out of the run's fingerprint.
        path: Whether its value is or may be a path: a file, a folder, FILE:STRENGTH, or a folder in place of a hub
            name. In a tuple, each entry. Tables mark their own fields.
        step: By how much a real number changes on a slider or with an arrow key.
        constraints: pydantic's, such as `ge` and `le`.
    """
    extra: Any = {
        "unit": unit,
        "group": group,
        "advanced": advanced,
        "affects_result": affects_result,
        "path": path,
        "step": step,
    }
    return Field(default, description=help, json_schema_extra=extra, **constraints)


def same_setting(settings: type[Settings], name: str) -> Any:
    """The definition of a setting that another class has already, to define it there once more."""
    return settings.model_fields[name]


class Settings(BaseModel):
    """A set of settings; unknown names are refused, values are validated, and instances are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        defer_build=True,  # a host that only shows settings starts sooner
    )

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values.

        Raises:
            SettingsError: Names every setting that is unknown, missing or out of range, and what to change.
        """
        unknown = [name for name in values if name not in cls.model_fields]
        if unknown:
            suffixes = [name for name in cls.model_fields if unknown[0].endswith(f"_{name}")]
            similar = suffixes or difflib.get_close_matches(unknown[0], cls.model_fields, n=1, cutoff=0.4)
            raise SettingsError(
                f"Unknown setting: {', '.join(sorted(unknown))}.",
                f"Did you mean '{similar[0]}'?" if similar else "docs/settings.md lists all settings.",
            )
        try:
            return cls(**values)
        except ValidationError as error:
            raise _settings_error(error) from None


def _settings_error(error: ValidationError) -> SettingsError:
    """The error with every problem that pydantic found, in which each face words the settings' names."""
    problems = []
    for details in error.errors():
        location = details["loc"]
        name = ".".join(str(part + 1 if isinstance(part, int) else part) for part in location)
        label = suggest(name) if len(location) == 1 else name  # keys of a table have the same name in every face
        message = details["msg"].removeprefix("Value error, ")
        if details["type"] == "string_pattern_mismatch" and name == "device":
            message = "must be auto, cpu, cuda, cuda:N or mps"
        if details["type"] == "extra_forbidden":
            message = "is not a setting of this table"
        if details["type"] == "tuple_type":
            message = f"must be a list; tables are written [[{name}]]"
        if details["type"] == "missing":
            problems.append(f"{label} is required and was not given")
        elif name:
            problems.append(f"{label}: {message} (given: {details['input']!r})")
        else:
            problems.append(message)
    return SettingsError("; ".join(problems) + ".", "Change these settings and start again.")


def _tidy_path(value: Any) -> Any:
    """Clean up a path that a person typed: spaces and quotes around it, `~`."""
    if not isinstance(value, str | Path):
        return value
    text = str(value).strip().strip("\"'")
    if not text:
        raise ValueError("is empty; give a path")
    if "\0" in text:
        raise ValueError("contains a NUL character; type the path again")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("names a home folder that does not exist; write the full path") from None


TidyPath = Annotated[Path, BeforeValidator(_tidy_path)]


def field_extra(settings: type[Settings], name: str) -> dict[str, Any]:
    """Unit, group, advanced, affects_result, path and step of a field, as `setting` defines them."""
    extra = settings.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return dict(extra)
