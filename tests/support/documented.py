"""The commands that documents tell people to type: in the pages, and in the first words of the programs themselves."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from helpers import ROOT

# Not the changelog: what it names was so when it was written.
PAGES = (
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"),
    *("docs/*.md", "docs/tutorials/*.md", "web/docs/*.md", "demo/*.md", "tests/**/*.md"),
)
PROGRAMS = ("tools/*.py", "benchmarks/*.py", "demo/*.py")
_START = re.compile(
    r"(\w+=\S+ )*(make|python3?|accelerate|torchrun|pip|node|npm|npx|coverage|ruff|mypy|pytest|\.ci/run) "
)
_PROGRAM = re.compile(r"(tools|benchmarks|demo)/\w+\.py\b")
_FENCE = re.compile(r"(?ms)^```[^\n]*\n(.*?)^```$")
_INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_CONTINUED = re.compile(r"\\\n\s*")


@dataclass(frozen=True)
class Command:
    """A command as a document words it, with single spaces.

    Attributes:
        text: May hold placeholders: FOLDER, `…`, `[--out FILE]`.
        where: The document; of what make would run, the command for make.
    """

    text: str
    where: str

    def __str__(self) -> str:
        return self.text

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def flags(self) -> set[str]:
        return flags_in(self.text)

    def begins_with(self, words: str) -> bool:
        return f"{self.text} ".startswith(f"{words} ")


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@cache
def documented_commands() -> tuple[Command, ...]:
    """Every command of the documents, and what make runs for those that are for make; each once."""
    named: dict[str, str] = {}
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            for text in _of_page(path.read_text(encoding="utf-8")):
                named.setdefault(text, str(path.relative_to(ROOT)))
    for pattern in PROGRAMS:
        for path in sorted(ROOT.glob(pattern)):
            for text in _of_docstring(
                ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
            ):
                named.setdefault(text, str(path.relative_to(ROOT)))
    for text in [text for text in named if text.startswith("make ") and shutil.which("make")]:
        for line in run_by_make(text):
            named.setdefault(line, text)
    return tuple(Command(text, where) for text, where in sorted(named.items()))


def surroundings() -> dict[str, str]:
    """The environment without what the tests' own make, pytest and coverage put there, or a user for them."""
    own = ("COVERAGE_", "PYTEST_", "MAKE", "MFLAGS")
    variables = {"ARGS", "BENCH", "VENV", "PYTHON"}
    return {name: text for name, text in os.environ.items() if not name.startswith(own) and name not in variables}


def run_by_make(command: str) -> tuple[str, ...]:
    """What make would run, without the folder of the virtual environment; the command with make's error if it can't."""
    words = ["make", "--no-print-directory", "--dry-run", "VENV=venv", "--old-file=venv/.ready"]
    words += shlex.split(command)[1:]
    done = subprocess.run(words, cwd=ROOT, env=surroundings(), capture_output=True, text=True)
    if done.returncode:
        return (f"{command}: {done.stderr}",)
    lines = (_spaced(line.replace("venv/bin/", "")) for line in done.stdout.splitlines())
    return tuple(line for line in lines if _START.match(line))


def _of_page(text: str) -> Iterator[str]:
    for block in _FENCE.findall(text):
        for line in _CONTINUED.sub(" ", block).splitlines():
            command, *comments = re.split(r"\s+#\s*", line)
            yield from _commands_in(command)
            for part in re.split(r"; ", " ".join(comments)):
                yield from _commands_in(part)
                if part.startswith("ARGS="):  # which is how else to use the line's own command
                    arguments = re.match(r'ARGS="[^"]*"', part)
                    assert arguments, f"{part} holds no arguments in quotes"
                    yield from _commands_in(f"{command} {arguments[0]}")
    for inline in _INLINE.findall(_FENCE.sub("", text)):
        yield from _commands_in(inline)


def _of_docstring(text: str) -> Iterator[str]:
    before = ""
    for line in _CONTINUED.sub(" ", text).splitlines():
        usage = re.match(r"\s*((?:python|--)\S* ?.*)", line)
        if not usage:
            before = ""
            continue
        command = re.split(r"\s{3,}|\s+#", usage[1])[0]
        if command.startswith("python"):
            before = command
        elif before:  # further flags of the line above
            command = f"{before} {command}"
        yield from _commands_in(command)
    for inline in _INLINE.findall(text):
        yield from _commands_in(inline)


def _commands_in(text: str) -> Iterator[str]:
    text = _spaced(text)
    if _PROGRAM.match(text):
        text = f"python {text}"
    if _START.match(f"{text} "):
        yield text


def _spaced(text: str) -> str:
    return " ".join(text.split())
