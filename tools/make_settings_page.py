"""Writes docs/settings.md, the reference of all settings of all commands, from their definitions.

    python tools/make_settings_page.py [--out FILE]

Run it when a setting or its text has changed, and after tools/make_locales.py, from whose English file it reads which
nodes have a setting. Needs no ComfyUI.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
if "pack" not in sys.modules:  # as tests/conftest.py loads it
    _spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["pack"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["pack"])

from pack.trainer.__main__ import COMMANDS as CLI_COMMANDS  # noqa: E402
from pack.trainer.__main__ import _parser  # noqa: E402
from pack.trainer.cli.flags import flag, group_index, is_table  # noqa: E402
from pack.trainer.core.errors import worded  # noqa: E402
from pack.trainer.settings.base import MAX_SEED, Needs, Settings, field_extra  # noqa: E402
from pack.trainer.settings.data import SubjectTable  # noqa: E402
from pack.trainer.settings.train import PriorSettings, TrainSettings  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"
COMMANDS: dict[str, type[Settings]] = {command.name: command.settings for command in CLI_COMMANDS}
OTHERS = ("new", "inspect", "info", "demo", "completion")  # commands without settings
NODES: Mapping[str, Sequence[str]] = {  # nodes that do the same as a command
    "train": (
        "DreamBoothTrainLora",
        "DreamBoothTrainingSettings",
        "DreamBoothFineTune",
        "DreamBoothClassPriors",
        "DreamBoothSubject",
    ),
    "caption": ("DreamBoothCaptionImages",),
    "priors": ("DreamBoothClassPriors",),
    "merge": ("DreamBoothMergeLoras", "DreamBoothScaleLora"),
    "learned-merge": ("DreamBoothLearnedMerge",),
    "resize": ("DreamBoothResizeLora",),
    "extract": ("DreamBoothExtractLora",),
    "score": ("DreamBoothClipScore", "DreamBoothSubjectScore", "DreamBoothScoreTable"),
    "compare": ("DreamBoothPickBest",),
}
_PRIORS = "DreamBoothClassPriors"
_SUBJECT = "DreamBoothSubject"
_SUBJECT_INPUTS = {  # input of the node → setting
    "captions": "",
    "captions_from": "captions",
    "masks_from": "masks",
    "caption": "instance_prompt",
    "folder": "images",
}
_TYPE_NAMES = {int: "whole number", float: "number", bool: "on or off", str: "text", Path: "path"}
_HEAD = """# Settings

Every setting of every command. `tools/make_settings_page.py` writes this page from the definitions in `trainer/`:
change them there.

A setting has the same name everywhere. It is a key in a TOML file (`python -m trainer train run.toml`) and a flag on
the command line; in both, dashes and underscores mean the same. Giving a key in both spellings is an error. Flags
override the file, and if a flag is given twice, the last one counts. On or off is `true` or `false` in TOML, and
`--flip` or `--no-flip` as a flag. A list is a TOML list, or a flag given several times. In TOML, texts need quotes;
numbers and `true` must have none.

Relative paths start from the folder in which the command runs, also those in a settings file. `~` is your home
folder. Variables such as `$HOME` or `%USERPROFILE%` are expanded by shells, not here: a path that contains one is an
error.

A setting that has no effect (**What it is** says what it needs) is reported before the run and does not start a new
run.

**Result** says whether a setting changes what is learned. If so, another value starts another run; if not, the same
run continues, or is found again, whatever the value. The length of the run counts only if the learning rate depends
on it. A preset counts through the values that it sets.

**Nodes** lists the ComfyUI nodes that have the setting as an input.
"""


def page() -> str:
    """The whole page."""
    shown: dict[tuple[Any, ...], str] = {}
    parts = [_HEAD, " · ".join(f"[{command}](#{command})" for command in COMMANDS) + "\n"]
    commands = subparsers()
    for command, kind in COMMANDS.items():
        parts.append(_section(command, kind, commands[command], shown))
    return "\n".join(parts)


def subparsers() -> dict[str, argparse.ArgumentParser]:
    """The parsers of the command line's commands."""
    [subparsers_action] = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(subparsers_action.choices)


def _section(
    command: str, kind: type[Settings], parser: argparse.ArgumentParser, shown: dict[tuple[Any, ...], str]
) -> str:
    """One command: its settings by group; those that an earlier command has with the same definition are only named.

    Args:
        command: Its name.
        kind: Its settings.
        parser: Its parser.
        shown: Definition → the command under which it is described; the command's own are added.
    """
    positionals = [action.dest for action in parser._actions if not action.option_strings and action.dest != "config"]
    first_argument = f"{positionals[0].upper()} …" if positionals else "[RUN.toml]"
    lines = [
        f"## {command}\n",
        f"{parser.description}\n",
        f"`python -m trainer {command} {first_argument} [--setting value …]`\n",
    ]
    groups: dict[str, list[str]] = {}
    described_before: dict[str, list[str]] = {}
    for name, field in kind.model_fields.items():
        if earlier := shown.get(_definition(kind, name, field)):
            described_before.setdefault(earlier, []).append(name)
        else:
            shown[_definition(kind, name, field)] = command
            groups.setdefault(field_extra(kind, name)["group"], []).append(name)
    learns = issubclass(kind, TrainSettings | PriorSettings)
    nodes = _node_inputs(NODES.get(command, ()))
    head = ["Setting", "Value", "Default", "What it is", *["Result"] * learns, *["Nodes"] * bool(nodes)]
    for group, names in sorted(groups.items(), key=lambda entry: group_index(entry[0])):
        lines.append(f"### {group}\n" if command == "train" else f"**{group}**\n")
        lines += [_row(head), "|---" * len(head) + "|"]
        lines += [_row(_cells(kind, name, name in positionals, learns, nodes)) for name in names]
        lines.append("")
    if command == "train":
        lines += _tables()
    for earlier, names in described_before.items():
        lines.append(f"As for [{earlier}](#{earlier}): {', '.join(f'`{name}`' for name in names)}.\n")
    return "\n".join(lines)


def _tables() -> list[str]:
    """The keys of a table [[subject]]."""
    head = ["Key", "Value", "Default", "What it is"]
    rows = [_row(_cells(SubjectTable, name, False, False, {})) for name in SubjectTable.model_fields]
    keys = [row.replace(f"<br>`{flag(name)}`", "") for row, name in zip(rows, SubjectTable.model_fields)]
    return ["### Tables `[[subject]]`\n", _row(head), "|---" * len(head) + "|", *keys, ""]


def _definition(kind: type[Settings], name: str, field: FieldInfo) -> tuple[Any, ...]:
    """What must be equal for two commands' settings to be the same one."""
    return name, field.description, repr(field.default), repr(field.annotation), repr(field.metadata)


def _cells(
    kind: type[Settings], name: str, positional: bool, learns: bool, nodes: Mapping[str, Iterable[str]]
) -> list[str]:
    field, extra = kind.model_fields[name], field_extra(kind, name)
    given_by = "given without a flag" if positional else f"`{flag(name)}`"
    if is_table(field):
        given_by = "only in a settings file"
    description = " ".join([field.description or "", *_needs(kind, extra["needs"])])
    cells = [f"`{name}`<br>{given_by}", value_of(field, extra["unit"]), _default(field), description]
    if learns:
        cells.append("yes" if extra["affects_result"] else "–")
    if nodes:
        cells.append(", ".join(title for title, inputs in nodes.items() if name in inputs) or "–")
    return cells


def _needs(kind: type[Settings], needs: Sequence[Needs]) -> list[str]:
    """A sentence on what a setting needs to have an effect, if anything."""
    others = [worded(each.described(kind), _as_code) for each in needs if each.setting in kind.model_fields]
    return [f"No effect without {' or '.join(others)}."] if others else []


def _as_code(name: str, value: str | None) -> str:
    return f"`{name} = {value.lower()}`" if value else f"`{name}`"


def _node_inputs(nodes: Iterable[str]) -> dict[str, set[str]]:
    """Title of a node → the settings that it has as inputs, whose names may have lost or gained a word there."""
    texts = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    settings_of = {}
    for node in nodes:
        names = set(texts[node]["inputs"])
        if node == _PRIORS:
            unprefixed = {"resolution", "precision"} & names
            prefixed = {f"{prefix}_{name}" for name in names - unprefixed for prefix in ("prior", "class")}
            names = unprefixed | prefixed
        if node == _SUBJECT:
            names = {_SUBJECT_INPUTS.get(name, name) for name in names}
        names |= {name.removeprefix("method_") for name in names} | {name.removesuffix("_model") for name in names}
        title = texts[node]["display_name"].removesuffix(" (DreamBooth)")
        settings_of[title] = names
    return settings_of


def value_of(field: FieldInfo, unit: str = "") -> str:
    """Type or choices, range and unit of a setting, for people."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    if is_table(field):
        return "[tables](#tables-subject)"
    if get_origin(field.annotation) is tuple:
        return "list of texts"
    parts = [field.annotation, *get_args(field.annotation)]
    parts += [get_args(part)[0] for part in parts if get_origin(part) is Annotated]
    type_name = next(_TYPE_NAMES[part] for part in parts if part in _TYPE_NAMES)
    bounds = {
        rule: getattr(limit, rule)
        for limit in field.metadata
        for rule in ("ge", "gt", "le", "lt", "multiple_of")
        if getattr(limit, rule, None) is not None
    }
    low = [f"{sign} {_number(bounds[rule])}" for rule, sign in (("ge", "≥"), ("gt", ">")) if rule in bounds]
    high = [f"{sign} {_number(bounds[rule])}" for rule, sign in (("le", "≤"), ("lt", "<")) if rule in bounds]
    multiple = [f"a multiple of {bounds['multiple_of']}"] if "multiple_of" in bounds else []
    quantity = f"{type_name} of {unit}" if unit and type_name != "text" else type_name
    return ", ".join([quantity, *multiple, *low, *high])


def _number(value: float) -> str:
    if value == MAX_SEED:
        return "2⁶⁴ − 1"
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:g}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default in (None, "", ()):
        return "none"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if isinstance(field.default, Path):
        return f"`{field.default.as_posix()}`"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE", help="default: docs/settings.md")
    parser.parse_args().out.write_text(page(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
