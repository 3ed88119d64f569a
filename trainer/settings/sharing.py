"""What of the settings may stand in a file that people share, or go to a server: numbers, choices and prompts.

It is a list of what is allowed: a setting that holds text stays out until its name is added here. Paths tell the names
of users, folders and files, so they never go out, nor does a part of them.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from ..core.json_data import OBJECT, parse_json
from .base import Settings, field_extra
from .data import SubjectTable
from .train import TrainCommand

CONFIG_KEY = "dreambooth.config"  # of an adapter's metadata

SHARED_TEXT = frozenset(
    {
        "block_ranks",
        "class_noun",
        "class_prompt",
        "exclude",
        "include",
        "instance_prompt",
        "name",
        "optimizer_options",
        "preview_prompts",
        "prior_prompts",
        "style_prompt",
        "subject_prompt",
        "token",
        "token_start",
    }
)
_PLAIN = (bool, int, float, type(None))


def shareable(settings: Settings) -> dict[str, Any]:
    """The settings that may be shared, as JSON values; tables of settings likewise, each as a dict."""
    kept: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if field_extra(type(settings), name)["path"]:
            continue
        if _is_closed(field.annotation) or (name in SHARED_TEXT and isinstance(value, str)):
            kept[name] = value
        elif isinstance(value, list | tuple) and value and all(isinstance(entry, Settings) for entry in value):
            kept[name] = [shareable(entry) for entry in value]
    return kept


def shareable_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata whose configuration holds no path; up to version 0.4 it did, and such files are resized and saved again.

    Args:
        metadata: Of an adapter; a configuration that is no JSON object is left out.
    """
    kept = dict(metadata)
    if CONFIG_KEY in kept:
        try:
            configuration = parse_json(kept[CONFIG_KEY], OBJECT)
        except ValueError:
            del kept[CONFIG_KEY]
        else:
            kept[CONFIG_KEY] = json.dumps(_without_paths(configuration), sort_keys=True)
    return kept


def _without_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, and the tables in it, without the settings that hold paths."""
    kept = {}
    for name, value in values.items():
        if any(
            name in owner.model_fields and field_extra(owner, name)["path"] for owner in (TrainCommand, SubjectTable)
        ):
            continue
        if isinstance(value, list):
            value = [_without_paths(entry) if isinstance(entry, dict) else entry for entry in value]
        kept[name] = value
    return kept


def _is_closed(annotation: Any) -> bool:
    """Whether a type has no free text: numbers, switches, choices, and any of them."""
    if annotation in _PLAIN or get_origin(annotation) is Literal:
        return True
    if get_origin(annotation) in (Union, types.UnionType):
        return all(_is_closed(option) for option in get_args(annotation))
    return False
