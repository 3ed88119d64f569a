"""The base class of all settings: one definition per field, validated values, errors that name the setting."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from typing_extensions import Self

from ..core.errors import SettingsError, suggest
from ..core.prompts import PromptError, PromptWords, parse_prompts

MAX_SEED = 2**64 - 1
_LONGEST_SHOWN = 200  # characters of a wrong value in an error
_PLAIN_WORDS = {  # of pydantic's messages
    "Input should be greater than or equal to": "must be at least",
    "Input should be less than or equal to": "must be at most",
    "Input should be a valid integer, got a number with a fractional part": "must be a whole number",
    "Input should be a valid number": "must be a number",
    "Input should be": "must be",
}
_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}|%(\w+)%")


@dataclass(frozen=True)
class Needs:
    """What another setting must be for a setting to have an effect.

    Attributes:
        setting: The other one.
        values: Its values with which there is an effect; empty: any that is on, not empty, and above `above`.
        above: See `values`.
        other_than: The only value with which there is none; takes the place of all the others.
    """

    setting: str
    values: tuple[Any, ...] = ()
    above: float = 0
    other_than: Any = None

    def met_by(self, value: Any) -> bool:
        """Whether a value of the other setting is one of those."""
        if self.other_than is not None:
            return bool(value != self.other_than)
        if self.values:
            return value in self.values
        if isinstance(value, int | float):
            return value > self.above
        return bool(value.strip() if isinstance(value, str) else value)

    def described(self, owner: type[Settings]) -> str:
        """The other setting as it should be, such as "loss_weighting = min-snr", worded by each face.

        Args:
            owner: Settings with the other one.
        """
        if self.other_than is not None:
            return f"a {suggest(self.setting)} other than {self.other_than}"
        if self.values:
            return " or ".join(suggest(self.setting, value) for value in self.values)
        if owner.model_fields[self.setting].annotation is bool:
            return suggest(self.setting, True)
        return suggest(self.setting) + (f" above {self.above:g}" if self.above else "")


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
    needs: Needs | tuple[Needs, ...] = (),
    neutral: tuple[Any, ...] | None = None,
    **constraints: Any,
) -> Any:
    """Define a setting.

    Args:
        default: Its default; `...` if it is required.
        help: For users, in one to three short sentences: what it does, when to change it, typical values.
        unit: Of its value.
        group: Heading under which it is listed.
        advanced: Whether a node hides it among its advanced inputs.
        affects_result: Whether what is learned depends on it; if not, it stays out of the run's fingerprint.
        path: Whether its value is or may be a path: a file, a folder, FILE:STRENGTH, or a folder in place of a hub
            name. In a tuple, each entry. Tables mark their own fields.
        step: By how much a real number changes on a slider or with an arrow key.
        needs: Without what other setting it has no effect; of several, one suffices.
        neutral: Of a setting that version 0.4 did not have: the values with which a run is the one without it. With
            these, or without effect, it stays out of the fingerprint, so that older runs are found.
        constraints: pydantic's, such as `ge` and `le`.
    """
    extra: Any = {
        "unit": unit,
        "group": group,
        "advanced": advanced,
        "affects_result": affects_result,
        "path": path,
        "step": step,
        "needs": (needs,) if isinstance(needs, Needs) else needs,
        "neutral": neutral,
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

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_its_type(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would convert or cast doubt on: `true` is no number, and a text is no list."""
        name = str(info.field_name)
        _require_type(name, cls.model_fields[name].annotation, value)
        return _without_variables(value) if field_extra(cls, name)["path"] else value

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values of the settings' types; text is no number and no switch (`cli.flags` converts it).

        Raises:
            SettingsError: Names every setting that is unknown, missing or out of range, and what to change.
        """
        unknown = sorted(name for name in values if name not in cls.model_fields)
        if unknown:
            meant = [_did_you_mean(name, cls.model_fields) for name in unknown]
            advice = " ".join(question for question in meant if question)
            raise SettingsError(
                f"Unknown setting: {', '.join(unknown)}.", advice or "docs/settings.md lists all settings."
            )
        try:
            return cls(**values)
        except ValidationError as error:
            raise _settings_error(cls, error) from None

    def changed(self) -> set[str]:
        """The settings whose value is not their default; numbers that went through a widget may differ a little."""
        fields = type(self).model_fields
        return {name for name, field in fields.items() if not _equal(getattr(self, name), field.default)}

    def without_effect(self) -> dict[str, tuple[Needs, ...]]:
        """The settings that are not their default and change nothing, with what they would need."""
        return {
            name: tuple(each for each in field_extra(type(self), name)["needs"] if hasattr(self, each.setting))
            for name in sorted(self.changed())
            if not self.has_effect(name)
        }

    def has_effect(self, name: str) -> bool:
        """Whether what a setting needs is there; it may be at its default."""
        needs = [each for each in field_extra(type(self), name)["needs"] if hasattr(self, each.setting)]
        return not needs or any(each.met_by(getattr(self, each.setting)) for each in needs)

    def effect_notes(self) -> list[str]:
        """A sentence on each setting that changes nothing, for the user, before anything is done."""
        return [
            f"{suggest(name)} has no effect without {' or '.join(each.described(type(self)) for each in needs)}."
            for name, needs in self.without_effect().items()
        ]


def _equal(value: Any, default: Any) -> bool:
    if isinstance(value, float) and isinstance(default, int | float):
        return math.isclose(value, default)
    return bool(value == default)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the most similar of the known names; "" if none is."""
    suffixes = [candidate for candidate in known if name.endswith(f"_{candidate}")]
    similar = suffixes or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"Did you mean '{similar[0]}'?" if similar else ""


def _require_type(name: str, annotation: Any, value: Any) -> None:
    """Check that a value is of the kind that a setting holds; ranges and choices are pydantic's to check.

    Raises:
        ValueError: It is not; says how it is written.
    """
    kinds = _kinds(annotation)
    if value is None:
        return
    if tuple in kinds:
        _require_list(name, annotation, value)
    elif bool in kinds:
        if not isinstance(value, bool):
            raise ValueError("must be on or off (true or false, without quotes)")
    elif int in kinds or float in kinds:
        if isinstance(value, str) and _is_number(value):
            raise ValueError(f"must be a number without quotes: {name} = {value.strip()}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("must be a number")
    elif not isinstance(value, str | Path):
        raise ValueError("must be text in quotes")
    elif str in kinds:
        _require_unicode(str(value))


def _require_list(name: str, annotation: Any, value: Any) -> None:
    """Check that a value is a list, of tables or of texts.

    Raises:
        ValueError: It is not; says how it is written.
    """
    entry = get_args(annotation)[0]
    if isinstance(entry, type) and issubclass(entry, Settings):
        if isinstance(value, Mapping):
            raise ValueError(f"is a single table: write [[{name}]] instead of [{name}]")
        if not isinstance(value, list | tuple) or not all(isinstance(each, Mapping | Settings) for each in value):
            raise ValueError(f"must be tables, written as [[{name}]]")
        return
    if isinstance(value, str | Path):
        raise ValueError(f"must be a list: {name} = [{json.dumps(str(value), ensure_ascii=False)}]")
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise ValueError(f'must be a list of quoted strings: {name} = ["…", "…"]')
    for each in value:
        _require_unicode(each)


def _require_unicode(text: str) -> None:
    """Check that a text is one: words of a command line may hold bytes that the terminal's encoding does not know.

    Raises:
        ValueError: It is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "contains bytes that are not valid text; rename the file, or use a UTF-8 locale such as LC_ALL=C.UTF-8"
        ) from None


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation such as `float | None` or `tuple[str, ...]` is made of."""
    origin = get_origin(annotation)
    if origin is tuple:
        return {tuple}
    if origin is None:
        return {annotation}
    return {kind for part in get_args(annotation) for kind in _kinds(part)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _settings_error(settings: type[Settings], error: ValidationError) -> SettingsError:
    """The error with every problem that pydantic found, in which each face words the settings' names."""
    problems = []
    for details in error.errors():
        location = details["loc"]
        name = ".".join(str(part + 1 if isinstance(part, int) else part) for part in location)
        label = suggest(name) if len(location) == 1 else name  # keys of a table have the same name in every face
        message = details["msg"].removeprefix("Value error, ")
        if details["type"] == "string_pattern_mismatch" and name == "device":
            message = "must be auto, cpu, cuda, cuda:N or mps"
        if details["type"] == "extra_forbidden":  # of a table; those of the settings themselves are found before
            table = get_args(settings.model_fields[str(location[0])].annotation)[0]
            question = _did_you_mean(str(location[-1]), table.model_fields)
            problems.append(f"{name} is not a setting of this table. {question}".rstrip(" ?."))
        elif details["type"] == "missing":
            problems.append(f"{label} is required but was not given")
        elif name:
            message = _in_plain_words(message)
            separator = " " if message.startswith("must ") else ": "
            problems.append(f"{label}{separator}{message} (given: {_shown(details['input'])})")
        else:
            problems.append(message)
    return SettingsError("; ".join(problems) + ".", _remedy(settings, error))


def _remedy(settings: type[Settings], error: ValidationError) -> str:
    """What to do about values; of a single one with a range or a choice, its default as an example."""
    mistakes = error.errors()
    if all(details["type"] == "missing" for details in mistakes):
        return "Add what is missing and start again."
    [details, *others] = mistakes
    if others or len(details["loc"]) != 1 or details["type"] == "value_error":  # which says itself what to do
        return "Change this and start again."
    name = str(details["loc"][0])
    default = settings.model_fields[name].default
    if not isinstance(default, str | int | float) or default == "":
        return "Change this and start again."
    return f"Change this and start again, for example with {suggest(name, default)}."


def _in_plain_words(message: str) -> str:
    """A message of pydantic's about a value, as it goes on after the setting's name; others as they are."""
    for technical, plain in _PLAIN_WORDS.items():
        message = message.replace(technical, plain)
    return message


def _shown(value: Any) -> str:
    """A wrong value as it stands in an error."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


def _without_variables(value: Any) -> Any:
    """A path, or a list of them, with `~` replaced by the home folder.

    Raises:
        ValueError: It has a variable in it, which only a shell replaces; a folder of that name would be made.
    """
    if isinstance(value, list | tuple):
        return type(value)(_without_variables(entry) for entry in value)
    if not isinstance(value, str):
        return value
    for match in _VARIABLE.finditer(value):
        name = next(group for group in match.groups() if group)
        if name in os.environ and not os.path.lexists(value):
            whole = value.replace(match[0], os.environ[name])
            raise ValueError(f"contains {match[0]}, but environment variables are not expanded; write {whole}")
    return os.path.expanduser(value) if value.startswith("~") else value


def _tidy_path(value: Any) -> Any:
    """Clean up a path that a person typed, unless it exists: spaces and quotes around it, `~`."""
    if not isinstance(value, str | Path):
        return value
    if os.path.lexists(value):  # whatever it is called
        return Path(value)
    text = str(value).strip().strip("\"'")
    if not text:
        raise ValueError("is empty; enter a path")
    if "\0" in text:
        raise ValueError("contains a NUL character; type the path again")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("names a home folder that does not exist; write the full path") from None


TidyPath = Annotated[Path, BeforeValidator(_tidy_path)]


def filled_prompts(setting: str, text: str, words: PromptWords) -> str:
    """The prompts of a setting with their templates filled, separated by " | ".

    Args:
        setting: Its name.
        text: Its value; see `parse_prompts`.
        words: What the templates stand for.

    Raises:
        SettingsError: A template is unknown, or stands for nothing.
    """
    try:
        return " | ".join(parse_prompts(text, words))
    except PromptError as error:
        raise SettingsError(f"{suggest(setting)} {error.problem}.", error.remedy) from error


def field_extra(settings: type[Settings], name: str) -> dict[str, Any]:
    """Unit, group, advanced, affects_result, path and step of a field, as `setting` defines them."""
    extra = settings.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return dict(extra)
