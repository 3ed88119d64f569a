"""Errors and warnings on a terminal with colours, on one without, and in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import HANGS, ROOT
from pack.trainer.cli.console import labelled, printable
from pack.trainer.cli.terminal import Terminal
from pack.trainer.core.events import Note

ERROR = "\x1b[1;31merror:\x1b[0m "
FIX = "\x1b[1;32mfix:\x1b[0m "
WORDS = {"as argparse finds it": ["train", "--stepss", "3"], "as the engine finds it": ["new", "x"]}
STATUS = {"as argparse finds it": 2, "as the engine finds it": 1}


def surroundings(**variables: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    return {**kept, "TERM": "xterm-256color", **variables}


def on_a_terminal(words: list[str], **variables: str) -> tuple[int, str]:
    """Exit status, and what a command shows on a terminal as its standard error."""
    import pty

    main_end, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *words],
        cwd=ROOT,
        env=surroundings(**variables),
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(main_end, 4096):
            shown += chunk
    except OSError:  # how Linux reports that the other end was closed
        pass
    finally:
        os.close(main_end)
    status = process.wait(timeout=HANGS)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.read() == b""
    return status, shown.decode().replace("\r\n", "\n")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no pty")
@pytest.mark.parametrize("case", WORDS)
@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    ],
    ids=str,
)
def test_a_terminal_shows_colours_unless_it_has_none(case: str, variables: dict[str, str], coloured: bool) -> None:
    status, shown = on_a_terminal(WORDS[case], **variables)
    assert status == STATUS[case]
    first, second = shown.splitlines()
    assert first.startswith(ERROR if coloured else "error: ")
    assert second.startswith(FIX if coloured else "fix: ")
    assert ("\x1b" in shown) == coloured


@pytest.mark.slow
@pytest.mark.parametrize("case", WORDS)
@pytest.mark.parametrize("forced", [False, True])
def test_what_is_no_terminal_is_plain_unless_it_is_forced(case: str, forced: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *WORDS[case]],
        cwd=ROOT,
        env=surroundings(**({"FORCE_COLOR": "1"} if forced else {})),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=HANGS,
    )
    assert done.returncode == STATUS[case]
    assert done.stderr.startswith(ERROR if forced else "error: ")
    assert f"\n{FIX if forced else 'fix: '}" in done.stderr
    assert ("\x1b" in done.stderr) == forced


def test_warnings_have_a_colour_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    Terminal().report(Note("The picture is small.", warning=True))
    Terminal().report(Note("A preset was taken."))
    assert capsys.readouterr().err == "\x1b[1;33mwarning:\x1b[0m The picture is small.\nA preset was taken.\n"


def test_a_stream_that_is_closed_has_no_colours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    stream = open(tmp_path / "closed", "w", encoding="utf-8")  # noqa: SIM115 - closed at once
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    assert labelled("error", "x") == "error: x"


def test_what_a_strangers_file_holds_moves_no_cursor() -> None:
    assert printable("a\x1b[31mb\x07") == "a\\x1b[31mb\\x07"
    assert printable("犬 Hündin 😀 caf\udce9") == "犬 Hündin 😀 caf\udce9"
