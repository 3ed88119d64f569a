"""The command that puts faults into the core (`make mutants`)."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import ROOT

pytest.importorskip("mutmut")


def test_faults_are_put_where_tests_can_see_them() -> None:
    from mutate import mutants_of

    source = '''"""A module."""
def share(part: float, *, whole: float = 2.0) -> float:
    """Between 0 and 1."""
    if part > whole:
        raise ValueError("more than the whole")
    return part / whole
'''
    found = {(mutant.line, mutant.now) for mutant in mutants_of(source)}
    assert found == {
        (2, "def share(part: float, *, whole: float = 3.0) -> float:"),
        (4, "if not (part > whole):"),
        (4, "if part >= whole:"),
        (6, "return part * whole"),
    }


@pytest.mark.slow
def test_most_faults_are_seen() -> None:
    words = ["data/buckets", "--sample", "3"]
    done = subprocess.run([sys.executable, "tools/mutate.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert "3 run" in done.stdout, done.stderr
    assert done.returncode == 0, done.stdout
