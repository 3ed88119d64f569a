"""Presets: good values for a kind of subject and a model family, as data with their sources.

`<subject>-<family>.toml` in this folder holds `title`, `why`, `sources`, a table `settings` (of `TrainSettings`), and a
table `priors` (of `PriorSettings`). The user interface fills in what its user did not set; the recipe
itself uses settings as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from ...core.errors import SettingsError, suggest
from ...core.events import Listener, Note
from ...core.toml import read_toml
from ...models.families.base import Family
from ...settings.base import Settings
from ...settings.train import PriorSettings, TrainSettings

FOLDER = Path(__file__).parent
NONE = "none"
_KEYS = {"title", "why", "sources", "settings", "priors"}
SettingsT = TypeVar("SettingsT", bound=TrainSettings)


@dataclass(frozen=True)
class Preset:
    """The content of a preset's file.

    Attributes:
        title: Subject and family, in words.
        why: Two sentences.
        sources: Where the values come from.
        settings: Values of `TrainSettings`.
        priors: Values of `PriorSettings`, for interfaces that generate class pictures.
    """

    title: str
    why: str
    sources: tuple[str, ...]
    settings: Mapping[str, Any]
    priors: Mapping[str, Any]


def preset_subjects() -> tuple[str, ...]:
    """The subjects with presets, such as "animal"."""
    choices = get_args(TrainSettings.model_fields["preset"].annotation)
    return tuple(choice for choice in choices if choice != NONE)


def load_preset(subject: str, family: Family) -> Preset:
    """Read the preset for a subject and a family.

    Raises:
        SettingsError: There is none, or its file has an unknown key or a value out of range.
    """
    path = FOLDER / f"{subject}-{family.name}.toml"
    if not path.is_file():
        raise SettingsError(
            f"There is no preset '{subject}' for {family.title}.",
            f"Use no preset ({suggest('preset', NONE)}) and choose {suggest('steps')}, "
            f"{suggest('learning_rate')}, {suggest('rank')} and {suggest('resolution')} yourself.",
        )
    content = read_toml(path)
    if set(content) != _KEYS:
        wrong_keys = ", ".join(sorted(_KEYS ^ set(content)))
        raise SettingsError(f"{path} has unexpected or missing keys: {wrong_keys}.", "Reinstall this pack.")
    return Preset(
        title=content["title"],
        why=content["why"],
        sources=tuple(content["sources"]),
        settings=_validated(TrainSettings, content["settings"]),
        priors=_validated(PriorSettings, content["priors"]),
    )


def _validated(settings_class: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, converted to the types that the settings have."""
    required = {"class_prompt": "a photo of a dog"} if settings_class is PriorSettings else {}
    settings = settings_class.checked({**required, **values})
    return {name: getattr(settings, name) for name in values}


def preset_values(subject: str, family: Family, given: Collection[str], *, priors: bool = False) -> dict[str, Any]:
    """The values of a preset, by setting, without the settings in `given`.

    Args:
        subject: One of `preset_subjects()`.
        family: Of the base model.
        given: Settings that the user has set.
        priors: Whether class pictures are used, so that their number is included.

    Raises:
        SettingsError: There is no such preset.
    """
    preset = load_preset(subject, family)
    values = dict(preset.settings)
    if priors:
        values |= preset.priors
    return {name: value for name, value in values.items() if name not in given}


def apply_preset(
    settings: SettingsT, family: Family, listener: Listener, given: Collection[str] | None = None
) -> SettingsT:
    """The settings with the values of their preset, if they have one; a note lists these values.

    The number of class pictures is set if the settings have a `class_prompt`.

    Args:
        settings: Any with those of training.
        family: Of the base model.
        listener: Gets a note of the values that were used.
        given: Settings that the user has set; None: those that `settings` were made with.

    Raises:
        SettingsError: There is no such preset, or what was given contradicts it.
    """
    if settings.preset == NONE:
        return settings
    given = settings.model_fields_set if given is None else given
    subjects = (settings, *getattr(settings, "subject", ()))
    prompts = [getattr(subject, "class_prompt", "").strip() for subject in subjects]
    priors = any(prompts) and settings.trains_class_pictures
    all_values = preset_values(settings.preset, family, (), priors=priors)
    taken = preset_values(settings.preset, family, given, priors=priors)
    kept = [name for name in all_values if name not in taken]
    listener.report(Note(_summary(settings.preset, family, taken, kept)))
    set_by_user = {name: getattr(settings, name) for name in settings.model_fields_set}
    return type(settings).checked(set_by_user | taken)


def _summary(subject: str, family: Family, taken: Mapping[str, Any], kept: Collection[str]) -> str:
    """Such as "Preset animal for Stable Diffusion 1.x: steps 800, rank 16; as you set them: resolution."."""
    values = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in taken.items()]
    text = ", ".join(values).lower() or "nothing"
    kept_text = f"; kept as you set them: {', '.join(kept)}" if kept else ""
    return f"Preset {subject} for {family.title}: {text}{kept_text}."
