"""Presets: good values by what is learned and the model's family, as data with their sources.

`presets/<subject>-<family>.toml` holds `title`, `why`, `sources`, a table `settings` (of `TrainSettings`), and a table
`priors` (of `PriorSettings`). The face that was asked to train fills in what its user left alone; the recipe itself
takes settings as they are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from ..core.errors import SettingsError
from ..core.events import Listener, Note
from ..core.files import read_toml
from ..models.families.base import Family
from ..settings.base import Settings
from ..settings.train import PriorSettings, TrainSettings

FOLDER = Path(__file__).parent / "presets"
NONE = "none"
_KEYS = {"title", "why", "sources", "settings", "priors"}
SettingsT = TypeVar("SettingsT", bound=TrainSettings)


@dataclass(frozen=True)
class Preset:
    """What a file says.

    Attributes:
        title: Subject and family, for people.
        why: Two sentences.
        sources: Where the values come from.
        settings: Of `TrainSettings`.
        priors: Of `PriorSettings`; for faces that make class pictures.
    """

    title: str
    why: str
    sources: tuple[str, ...]
    settings: Mapping[str, Any]
    priors: Mapping[str, Any]


def names() -> tuple[str, ...]:
    """What there are presets for, such as "animal"."""
    return tuple(name for name in get_args(TrainSettings.model_fields["preset"].annotation) if name != NONE)


def load(subject: str, family: Family) -> Preset:
    """Read the preset for a subject and a family.

    Raises:
        SettingsError: There is none, or its file has an unknown key or a value out of range.
    """
    path = FOLDER / f"{subject}-{family.name}.toml"
    if not path.is_file():
        raise SettingsError(
            f"There is no preset '{subject}' for {family.title}.",
            f"Set preset to {NONE} and choose steps, learning_rate, rank and resolution yourself.",
        )
    found = read_toml(path)
    if set(found) != _KEYS:
        wrong = ", ".join(sorted(_KEYS ^ set(found)))
        raise SettingsError(f"{path} has too many or too few keys: {wrong}.", "Reinstall this pack.")
    settings, priors = _checked(TrainSettings, found["settings"]), _checked(PriorSettings, found["priors"])
    return Preset(found["title"], found["why"], tuple(found["sources"]), settings, priors)


def _checked(kind: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the settings' own types have them."""
    company = {"class_prompt": "a photo of a dog"} if kind is PriorSettings else {}
    checked = kind.checked({**company, **values})
    return {name: getattr(checked, name) for name in values}


def apply(subject: str, family: Family, given: Collection[str], *, priors: bool = False) -> dict[str, Any]:
    """The values that a preset gives, by setting: all of its own but those that are given.

    Args:
        subject: One of `names()`.
        family: Of the base model.
        given: Settings that the user has set.
        priors: Whether class pictures are wanted, so that their number is given, too.

    Raises:
        SettingsError: There is no such preset.
    """
    preset = load(subject, family)
    values = {**preset.settings, **(preset.priors if priors else {})}
    return {name: value for name, value in values.items() if name not in given}


def changed(settings: Settings) -> set[str]:
    """Settings with another value than their default: what was set where every value is always given, on a node."""

    def same(value: Any, default: Any) -> bool:
        return math.isclose(value, default) if isinstance(value, float) and default is not None else value == default

    fields = type(settings).model_fields
    return {name for name, field in fields.items() if not same(getattr(settings, name), field.default)}


def apply_preset(
    settings: SettingsT, family: Family, listener: Listener, given: Collection[str] | None = None
) -> SettingsT:
    """The settings with the values of their preset, if they name one; the listener is told which.

    The number of class pictures is given if the settings hold a `class_prompt`.

    Args:
        settings: Any with those of training.
        family: Of the base model.
        listener: Told which values were taken.
        given: Settings that the user has set; None: those that `settings` were made with.

    Raises:
        SettingsError: There is no such preset, or what was given contradicts it.
    """
    if settings.preset == NONE:
        return settings
    given = settings.model_fields_set if given is None else given
    prompts = [getattr(one, "class_prompt", "") for one in (settings, *getattr(settings, "subject", ()))]
    priors = any(prompt.strip() for prompt in prompts)
    taken = apply(settings.preset, family, given, priors=priors)
    wanted = apply(settings.preset, family, (), priors=priors)
    listener.report(Note(_told(settings.preset, family, taken, [name for name in wanted if name not in taken])))
    own = {name: getattr(settings, name) for name in settings.model_fields_set}
    return type(settings).checked(own | taken)


def _told(subject: str, family: Family, taken: Mapping[str, Any], kept: Collection[str]) -> str:
    """Such as "Preset animal for Stable Diffusion 1.x: steps 800, rank 16; as you set them: resolution."."""
    words = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in taken.items()]
    own = f"; as you set them: {', '.join(kept)}" if kept else ""
    return f"Preset {subject} for {family.title}: {', '.join(words).lower() or 'nothing'}{own}."
