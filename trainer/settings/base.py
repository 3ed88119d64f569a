"""What every set of settings has: one definition per field, checked values, errors that name the setting."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import Self

from ..core.errors import SettingsError


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    group: str = "Training",
    advanced: bool = False,
    affects_result: bool = True,
    path: bool = False,
    **constraints: Any,
) -> Any:
    """Define a setting.

    Args:
        default: Its default; `...` if it must be given.
        help: One or two sentences for users.
        unit: Of its value.
        group: Heading under which it is listed.
        advanced: Whether a node folds it away.
        affects_result: Whether what is learned depends on it; if not, it stays out of the run's fingerprint.
        path: Whether its value is or may be a path: a file, a folder, FILE:STRENGTH, or a folder in place of a hub
            name. In a tuple, each entry. Tables mark their own fields.
        constraints: pydantic's, such as `ge` and `le`.
    """
    extra: Any = {
        "unit": unit,
        "group": group,
        "advanced": advanced,
        "affects_result": affects_result,
        "path": path,
    }
    return Field(default, description=help, json_schema_extra=extra, **constraints)


class Settings(BaseModel):
    """A set of settings; unknown names are refused, values are checked, nothing can be changed afterwards."""

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
            SettingsError: Names every setting that is unknown or out of range, and what to change.
        """
        unknown = [name for name in values if name not in cls.model_fields]
        if unknown:
            inside = [name for name in cls.model_fields if unknown[0].endswith(f"_{name}")]
            near = inside or difflib.get_close_matches(unknown[0], cls.model_fields, n=1, cutoff=0.4)
            raise SettingsError(
                f"Unknown setting: {', '.join(sorted(unknown))}.",
                f"Did you mean '{near[0]}'?" if near else "See --help for the settings that exist.",
            )
        try:
            return cls(**values)
        except ValidationError as error:
            raise _explained(error) from None


def _explained(error: ValidationError) -> SettingsError:
    problems = []
    for item in error.errors():
        name = ".".join(str(part + 1 if isinstance(part, int) else part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "string_pattern_mismatch" and name == "device":
            message = "must be auto, cpu, cuda, cuda:N or mps"
        if item["type"] == "extra_forbidden":
            message = "is no setting of this table"
        if item["type"] == "tuple_type":
            message = f"must be a list; tables are written [[{name}]]"
        if item["type"] == "missing":
            problems.append(f"{name} is required and was not given")
        else:
            problems.append(f"{name}: {message} (given: {item['input']!r})" if name else message)
    return SettingsError("; ".join(problems) + ".", "Change these settings and start again.")


def _tidy_path(value: Any) -> Any:
    """Tidy a path a person typed: blanks and quotes around it, `~`."""
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
        raise ValueError("names a home folder that does not exist; write the whole path") from None


TidyPath = Annotated[Path, BeforeValidator(_tidy_path)]


def field_extra(settings: type[Settings], name: str) -> dict[str, Any]:
    """Unit, group, advanced, affects_result and path of a field."""
    extra = settings.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return dict(extra)
