"""Garbage collections that search what a run makes. Each test has a process of its own: what is frozen is all of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import DEMO, ROOT

PREPARED = f"""
import gc, sys, weakref
sys.path.insert(0, {str(ROOT)!r})
from trainer.core.garbage import importing_libraries, own_process, quick_collections

class Node:
    pass

def in_a_circle():
    first, second = Node(), Node()
    first.other, second.other = second, first
    return weakref.ref(first)

def is_collected(reference):
    gc.collect()
    return reference() is None

gc.disable()
assert gc.get_freeze_count() < 10_000
many = [[] for _ in range(20_000)]
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", PREPARED + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_inside_only_what_is_new_is_searched_and_afterwards_all() -> None:
    run("""
kept = Node()
kept.itself = kept
with quick_collections():
    assert gc.get_freeze_count() > 20_000
    old = weakref.ref(kept)
    del kept
    assert is_collected(in_a_circle())
    assert not is_collected(old)
    with quick_collections():
        pass
    assert not is_collected(old), "a block inside changes nothing"
assert gc.get_freeze_count() == 0
assert is_collected(old)
""")


def test_what_was_garbage_before_is_collected_first() -> None:
    run("""
garbage = in_a_circle()
with quick_collections():
    assert garbage() is None
""")


def test_all_is_searched_again_after_an_error() -> None:
    run("""
try:
    with quick_collections():
        raise ValueError
except ValueError:
    assert gc.get_freeze_count() == 0
""")


def test_what_another_has_frozen_stays_frozen() -> None:
    run("""
gc.freeze()
count = gc.get_freeze_count()
with quick_collections():
    assert gc.get_freeze_count() == count
assert gc.get_freeze_count() == count
""")


def test_libraries_are_imported_without_collections_and_then_left_alone() -> None:
    run("""
gc.enable()
collected = []
gc.callbacks.append(lambda *_: collected.append(1))
with own_process():
    with importing_libraries():
        more = [[] for _ in range(20_000)]
    assert not collected and gc.isenabled()
    assert gc.get_freeze_count() > 40_000
    assert is_collected(in_a_circle())
    later = [[] for _ in range(20_000)]
assert gc.get_freeze_count() > 60_000, "the interpreter's end searches nothing"
gc.unfreeze()
with importing_libraries():
    pass
assert gc.get_freeze_count() == 0, "outside of a block they are searched as ever"
gc.disable()
with importing_libraries():
    pass
assert not gc.isenabled()
""")


@pytest.mark.slow
def test_a_base_model_that_is_opened_has_imported_what_is_left_alone() -> None:
    run(f"""
from pathlib import Path
from trainer.models.open import open_base
with own_process():
    base = open_base(Path({str(DEMO / "base")!r}))
    assert "diffusers" in sys.modules
    assert gc.get_freeze_count() > 200_000
    model = base.family.build(base)
    model.itself = model
    reference = weakref.ref(model)
    count = gc.get_freeze_count()
    open_base(Path({str(DEMO / "base")!r}))
    assert gc.get_freeze_count() == count, "networks that are there by then are never frozen"
    del model
    assert is_collected(reference)
""")
