"""Quick garbage collections: they search what a run makes, not the libraries that it uses.

A run collects garbage whenever networks leave it, so that their memory is free at once. A collection looks at every
object of the process, and torch, diffusers and transformers alone make half a million: that takes longer than several
steps of a small model. The interpreter also collects when it ends, which takes a second or more with all of them.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_FROZEN_BY_ITSELF = 10_000
"""Python 3.12 leaves the objects of its own start alone: some hundreds."""

_active = False


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Let collections inside leave alone what was there before; afterwards they search it again.

    For programs that run inside of another one. Where its owner has frozen objects, or inside of another such block,
    nothing changes.
    """
    if _active or gc.get_freeze_count() > _FROZEN_BY_ITSELF:
        yield
        return
    gc.collect()
    gc.freeze()
    with _libraries_left_alone():
        try:
            yield
        finally:
            gc.unfreeze()


@contextlib.contextmanager
def own_process() -> Iterator[None]:
    """Let collections leave alone what `importing_libraries` imports, and the interpreter's end everything.

    For whole programs: around all they do.
    """
    with _libraries_left_alone():
        try:
            yield
        finally:
            gc.freeze()


@contextlib.contextmanager
def importing_libraries() -> Iterator[None]:
    """Import inside without the hundreds of collections that this takes else, since what is imported stays."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if _active:
            gc.freeze()


@contextlib.contextmanager
def _libraries_left_alone() -> Iterator[None]:
    global _active
    before = _active
    _active = True
    try:
        yield
    finally:
        _active = before
