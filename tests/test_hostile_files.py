"""What strangers send is read, or refused in our own words: broken copies of valid files, and all that went wrong once.

`make fuzz` tries more of the same for as long as one likes; what it finds goes into tests/corpus/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hostile_targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
FOUND = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("name", TARGETS)
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_broken_content_is_read_or_refused(name: str, data: Any) -> None:
    target = TARGETS[name]
    target.check(data.draw(target.contents()))


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_stays_right(path: Path) -> None:
    TARGETS[path.parent.name].check(path.read_bytes())


def test_the_corpus_names_targets() -> None:
    assert {path.parent.name for path in FOUND} <= set(TARGETS)
