"""Settings that hold a path are marked, whatever their type."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from make_settings_page import COMMANDS
from pack.trainer.settings.base import Settings, field_extra
from pack.trainer.settings.data import SubjectTable

KINDS: dict[str, type[Settings]] = {**COMMANDS, "subject": SubjectTable}
FIELDS = [(command, name) for command, kind in KINDS.items() for name in kind.model_fields]
TEXTS = {
    "base_lora",
    "clip",
    "dino",
    "lora",
    "loras",
    "model",
    "runs",
    "score_clip",
    "score_dino",
}
"""Texts that may be a path: FILE:STRENGTH, or a folder in place of a hub name."""


def parts_of(annotation: Any) -> set[Any]:
    return {annotation}.union(*(parts_of(part) for part in get_args(annotation)))


@pytest.mark.parametrize(("command", "name"), FIELDS)
def test_every_path_is_marked(command: str, name: str) -> None:
    is_path = Path in parts_of(KINDS[command].model_fields[name].annotation)
    assert field_extra(KINDS[command], name)["path"] == (is_path or name in TEXTS)
