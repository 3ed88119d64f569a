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


def test_lines_are_named_one_by_one_or_from_to() -> None:
    from mutate import lines_of

    assert lines_of("3") == {3}
    assert lines_of("12,40-42") == {12, 40, 41, 42}


SOURCE = (ROOT / "trainer" / "data" / "buckets.py").read_text("utf-8").splitlines()
CONSTANT = 1 + next(number for number, line in enumerate(SOURCE) if line.startswith("_MAX_ASPECT_RATIO"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "counts"),
    [(["--sample", "3"], "3 run"), (["--lines", str(CONSTANT)], "1 run, 1 seen")],
    ids=["a sample", "a constant, which is read when the module is imported"],
)
def test_most_faults_are_seen(words: list[str], counts: str) -> None:
    command = [sys.executable, "tools/mutate.py", "data/buckets", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert counts in done.stdout, done.stderr
    assert done.returncode == 0, done.stdout
