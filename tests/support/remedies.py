"""What a complaint advises, how advice is taken, and which calls of `suggest` it came from."""

from __future__ import annotations

import ast
import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from helpers import ROOT
from pack.trainer.core.errors import TrainerError, suggest
from pack.trainer.settings.base import Settings
from pydantic import TypeAdapter
from worlds import World

Values = dict[str, Any]
ABSENT: Any = object()
"""As the value of a setting: it is not given."""
_MARK = re.compile("⟦([a-z0-9_]+)(?:=([^⟧]*))?⟧")
_GENERAL = ("Change this and start again.", "Add what is missing and start again.")


@dataclass(frozen=True)
class Bench:
    """What a complaint may be provoked with."""

    world: World
    folder: Path
    monkeypatch: pytest.MonkeyPatch


Check = Callable[[Bench, Values], "list[str] | None"]


@dataclass(frozen=True)
class Case:
    """A complaint and the ways out of it.

    Attributes:
        kind: Settings of a face that it is shown for.
        check: Raises the error, or returns notes; neither if nothing is wrong.
        values: The settings that provoke it.
        tries: Ways out that are given in words, without a value, or together; any other value is tried by itself.
        then: What another complaint may say once this one is gone, if it is one of several.
        elsewhere: Settings in the advice that are another command's.
    """

    kind: type[Settings]
    check: Check
    values: Values
    tries: tuple[Values, ...] = ()
    then: str = ""
    elsewhere: frozenset[str] = field(default_factory=frozenset)

    def complaint(self, bench: Bench, changes: Mapping[str, Any] | None = None) -> str:
        """What is complained of with the values, and those that replace some of them; "" if nothing is."""
        changed = {**self.values, **(changes or {})}
        values = {name: value for name, value in changed.items() if value is not ABSENT}
        try:
            return "\n".join(self.check(bench, values) or [])
        except TrainerError as error:
            return "\n→ ".join(error.unworded)

    def ways_out(self, complaint: str) -> Iterator[Values]:
        """The changes to try, each by itself."""
        yield from self.tries
        for name, text in suggested(complaint):
            if text is None:
                assert any(name in changes for changes in self.tries), f"the case does not say how to change {name}"
            elif name in self.kind.model_fields:
                value = as_value(self.kind, name, text)
                if not any(changes.get(name) == value for changes in self.tries):
                    yield {name: value}


def suggested(complaint: str) -> list[tuple[str, str | None]]:
    """The settings in the part of a complaint that says what to do, each with the value that would help, if any."""
    problem, arrow, remedy = complaint.partition("\n→ ")
    advice = remedy if arrow and remedy not in _GENERAL else re.split(": | without | must be ", problem)[-1]
    return [(match[1], match[2]) for match in _MARK.finditer(advice)]


def as_value(kind: type[Settings], name: str, text: str) -> Any:
    """The value of a setting that a text stands for; refused if it is none."""
    annotation = kind.model_fields[name].annotation
    entries = "tuple" in str(annotation)
    return TypeAdapter(annotation).validate_python([text] if entries else text)


@dataclass(frozen=True)
class Site:
    """A call of `suggest` in the engine; what is no literal is None.

    Attributes:
        file: Below the pack's folder.
        line: Of the call.
        function: Around it; "" at the top of the module.
        setting: Its first argument.
        value: Its second one, as text.
    """

    file: str
    line: int
    function: str
    setting: str | None
    value: str | None

    def made(self, call: Call) -> bool:
        """Whether a call that ran is this one."""
        return (
            (call.file, call.line) == (self.file, self.line)
            and self.setting in (None, call.setting)
            and self.value in (None, call.value)
        )

    def stands_in(self, text: str) -> bool:
        """Whether a text holds what it gives, if both its arguments are literals."""
        assert self.setting is not None
        return suggest(self.setting, self.value) in text

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function or 'the module'}: {self.setting or '…'}"


@dataclass(frozen=True)
class Call:
    """A call of `suggest` that ran."""

    file: str
    line: int
    setting: str
    value: str


def sites() -> list[Site]:
    """Every call of `suggest` in the engine."""
    found = []
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        visitor = _Visitor(path.relative_to(ROOT).as_posix())
        visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
        found += visitor.found
    return found


class _Visitor(ast.NodeVisitor):
    def __init__(self, file: str) -> None:
        self._file = file
        self._function = ""
        self.found: list[Site] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before, self._function = self._function, node.name
        self.generic_visit(node)
        self._function = before

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "suggest":
            literals = [str(each.value) if isinstance(each, ast.Constant) else None for each in node.args]
            value = literals[1] if len(literals) > 1 else "None"
            self.found.append(Site(self._file, node.lineno, self._function, literals[0], value))


@contextlib.contextmanager
def recorded_calls() -> Iterator[set[Call]]:
    """The calls of `suggest` inside the block."""
    calls: set[Call] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is suggest.__code__:
            caller = frame.f_back
            assert caller is not None
            path = Path(caller.f_code.co_filename)
            if path.is_relative_to(ROOT):
                given = frame.f_locals
                file = path.relative_to(ROOT).as_posix()
                calls.add(Call(file, caller.f_lineno, given["setting"], str(given["value"])))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(before)
