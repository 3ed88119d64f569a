"""The settings of an earlier training as the tab's widgets hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..trainer.core.errors import SettingsError
from ..trainer.training.runs.index import RunIndex
from . import host, queue
from .jobs import TRAIN
from .widgets import settings_of
from .wording import title

GIVEN_OTHERWISE = ("images", "output_dir", "instance_prompt", "class_prompt", "device", "resume")
"""Settings without a widget of their name: the tab gives them by itself."""
PREVIEW_EVERY = 100  # steps; whoever watches wants to see samples


@dataclass(frozen=True)
class Refill:
    """What goes into the widgets.

    Attributes:
        values: Name of a setting → what its widget holds.
        folder: Of the pictures.
        notes: What could not be taken over, as sentences.
    """

    values: dict[str, Any]
    folder: str
    notes: list[str]


def prompts_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """The prompts that the tab makes of word and class; those of samples or class pictures only if there are some."""
    subject = "a photo of {token} {class}" if settings.get("class_noun") else "a photo of {token}"
    prompts = {"instance_prompt": subject}
    if settings.get("preview_every"):
        prompts["preview_prompts"] = subject
    if settings.get("prior_count") or settings.get("class_images"):
        prompts["class_prompt"] = "a photo of {class}"  # the engine says so if there is no class
    return prompts


def refill(run: str) -> Refill:
    """The settings of a run: what was changed in the tab for it or, of a run that something else began, all it records.

    Raises:
        SettingsError: There is no such run, its settings are damaged, or the tab can't train what it trained.
    """
    layout = RunIndex(host.data_folder() / "runs").run(run)
    job = queue.job_of(run)
    settings = dict(layout.record.get("settings", {})) if job is None else job.settings()
    if job is None:
        settings["preset"] = None  # its values are among the settings
    if settings.get("subject"):
        raise SettingsError(
            f"'{layout.name}' has several subjects, which this tab does not support.",
            "Train it from the command line with its settings file.",
        )
    values, notes = {}, []
    for name, setting in settings_of(TRAIN).items():
        if name in GIVEN_OTHERWISE or name == "base":
            continue
        value = settings.get(name)
        if setting["kind"] == "choice" and value is not None and value not in setting["choices"]:
            notes.append(f"{title(name)}: '{value}' is no longer available.")
            value = None
        values[name] = _shown(setting, _default(name, setting) if value is None else value)
    values |= _left_to_the_tab(settings)
    base = _title_of(settings.get("base"))
    if base is None:
        notes.append(f"The base model {settings.get('base')} is not in this web UI's list: choose another.")
    else:
        values["base"] = base
    notes += _other_prompts(settings)
    return Refill(values | {"name": layout.name}, str(settings.get("images") or ""), notes)


def _default(name: str, setting: Mapping[str, Any]) -> Any:
    return PREVIEW_EVERY if name == "preview_every" else setting["default"]


def _shown(setting: Mapping[str, Any], value: Any) -> Any:
    """A setting's value as its widget has it (`widgets.widget`)."""
    kind = setting["kind"]
    if kind == "list":
        return "\n".join(map(str, value))
    if kind in ("choice", "switch") or (kind in ("whole", "number") and not setting["optional"]):
        return value
    return "" if value is None else str(value)


def _left_to_the_tab(settings: Mapping[str, Any]) -> dict[str, str]:
    """Widgets that stay empty, since the tab would give what they hold by itself."""
    tokenizer = host.tokenizer()
    given = prompts_of({**settings, "preview_every": PREVIEW_EVERY}) | {
        "tokenizer": str(tokenizer) if tokenizer else None
    }
    return {name: "" for name in ("preview_prompts", "tokenizer") if settings.get(name) == given[name]}


def _title_of(file: Any) -> str | None:
    """The title by which the host lists a checkpoint; None if it does not."""
    for listed in host.bases():
        if file and host.base_file(listed) == Path(str(file)):
            return listed
    return None


def _other_prompts(settings: Mapping[str, Any]) -> Iterator[str]:
    """What is said of prompts that the tab would make otherwise."""
    for name, made in ({"instance_prompt": "", "class_prompt": ""} | prompts_of(settings)).items():
        given = settings.get(name)
        if name != "preview_prompts" and given and given != made:
            here = f"Here it is '{made}', built from Word and Class." if made else "Here it is empty."
            yield f"{title(name)} was '{given}'. {here}"
