"""The command line, run inside the process of a test."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from pack.trainer.__main__ import main


class Shell:
    """Runs commands in this process: exit status, and what they wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.output = self.errors = ""

    def __call__(self, *words: object) -> int:
        self._capsys.readouterr()
        try:
            return main([str(word) for word in words])
        except SystemExit as leaving:
            return int(leaving.code or 0)
        finally:
            self.output, self.errors = self._capsys.readouterr()

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


def flags_of(values: Mapping[str, object]) -> list[str]:
    """Settings as flags; a setting that is True has no value."""
    pairs = [("--" + name.replace("_", "-"), value) for name, value in values.items()]
    return [str(word) for flag, value in pairs for word in ((flag,) if value is True else (flag, value))]
