"""Writes webui/settings.json: the settings of commands as the web UI's tab shows them, from their definitions.

    python tools/make_webui_settings.py [--out FILE]

Run it when a setting or its text has changed. The tab reads the file, since a host may have a pydantic in which the
definitions themselves don't load.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
if "pack" not in sys.modules:  # as tests/conftest.py loads it
    _spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["pack"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["pack"])

from pack.trainer.cli.flags import is_table  # noqa: E402
from pack.trainer.settings.base import Settings, field_extra  # noqa: E402
from pack.trainer.settings.evaluate import CompareCommand  # noqa: E402
from pack.trainer.settings.merge import ExtractCommand, FuseCommand, LearnedMergeCommand, MergeCommand, ResizeCommand  # noqa: E402
from pack.trainer.settings.train import TrainCommand  # noqa: E402

FILE = ROOT / "webui" / "settings.json"
COMMANDS = {
    "train": TrainCommand,
    "merge": MergeCommand,
    "learned-merge": LearnedMergeCommand,
    "resize": ResizeCommand,
    "extract": ExtractCommand,
    "fuse": FuseCommand,
    "compare": CompareCommand,
}


def settings_of(kind: type[Settings]) -> list[dict[str, Any]]:
    """Each setting that a page can show: "name", "group", "help", "unit", "kind", "default", "advanced" and "optional".

    "kind" is "choice" (with "choices"), "switch", "whole" or "number" (with "min" and "max", None: no limit), "list",
    "path" or "text". "optional": whether nothing may be given, which is its default.
    """
    return [_described(kind, name) for name, field in kind.model_fields.items() if not is_table(field)]


def _described(kind: type[Settings], name: str) -> dict[str, Any]:
    field = kind.model_fields[name]
    extra = field_extra(kind, name)
    facts = {"name": name, "group": extra["group"], "help": field.description, "unit": extra["unit"]}
    optional = field.default is None or field.is_required()
    default = None if optional else field.default
    facts |= {"advanced": extra["advanced"], "optional": optional}
    types = {field.annotation, *get_args(field.annotation)}
    if get_origin(field.annotation) is Literal:
        return (
            facts
            | {"kind": "choice", "choices": [str(choice) for choice in get_args(field.annotation)]}
            | {"default": default}
        )
    if bool in types:
        return facts | {"kind": "switch", "default": default}
    if int in types or float in types:
        limits = {"min": _limit(field.metadata, "ge", "gt"), "max": _limit(field.metadata, "le", "lt")}
        return facts | {"kind": "number" if float in types else "whole", "default": default} | limits
    if get_origin(field.annotation) is tuple:
        return facts | {"kind": "list", "default": list(default or ())}
    default = None if default is None else str(default)
    return facts | {"kind": "path" if extra["path"] else "text", "default": default}


def _limit(metadata: list[Any], *rules: str) -> float | None:
    found = [getattr(limit, rule) for limit in metadata for rule in rules if getattr(limit, rule, None) is not None]
    return found[0] if found else None


def content() -> str:
    """The whole file: command → its settings."""
    settings = {command: settings_of(kind) for command, kind in COMMANDS.items()}
    return json.dumps(settings, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE)
    out = parser.parse_args().out
    out.write_text(content(), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
