"""Tries broken files and requests on all that reads them: `python tools/fuzz.py --seconds 600 [TARGET ...]`.

The targets take turns until the time is up. An input that ends in anything but an error of our own is made as small as
Hypothesis can make it and put into tests/corpus/TARGET/, where a test reads it from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import conftest  # noqa: E402, F401
import hypothesis  # noqa: E402
from hostile_targets import TARGETS, Target  # noqa: E402
from hypothesis import HealthCheck, Phase  # noqa: E402

CORPUS = ROOT / "tests" / "corpus"
EVERY_CHECK = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def attack(target: Target, examples: int, seed: int, deadline: float) -> tuple[int, bytes | None, BaseException | None]:
    """Try inputs on a target.

    Args:
        target: What reads them.
        examples: How many inputs at most.
        seed: Of their choice.
        deadline: `time.monotonic()` after which no further input is tried.

    Returns:
        How many were tried; and the smallest input that was found to go wrong, with what it raised, or None twice.
    """
    tried = 0
    failing: bytes | None = None

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=EVERY_CHECK,
    )
    @hypothesis.given(target.contents())
    def run(content: bytes) -> None:
        nonlocal tried, failing
        if time.monotonic() > deadline and failing is None:
            return
        tried += 1
        try:
            target.check(content)
        except Exception:
            failing = content
            raise

    try:
        run()
    except Exception as error:  # whatever it is, it is the finding
        return tried, failing, error
    return tried, None, None


def main() -> int:
    """Run the command; returns 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} [default: all]")
    parser.add_argument("--seconds", type=float, default=60.0, help="time budget [default: 60]")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs [default: another one every time]")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="where findings go [default: tests/corpus]")
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target: {', '.join(sorted(unknown))}")
    logging.disable(logging.CRITICAL)  # what the libraries and the engine say of broken files is no finding
    names = arguments.targets or list(TARGETS)
    seeds = random.Random(arguments.seed)
    tried: Counter[str] = Counter()
    found: Counter[str] = Counter()
    start = time.monotonic()
    deadline = start + arguments.seconds
    finished = False
    while not finished:
        for name in names:
            finished = time.monotonic() > deadline
            if finished:
                break
            count, content, error = attack(TARGETS[name], 50, seeds.getrandbits(32), deadline)
            tried[name] += count
            if error is not None and content is not None:
                found[name] += 1
                path = arguments.corpus / name / hashlib.sha256(content).hexdigest()[:12]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                location = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(location.filename).name}:{location.lineno}"
                print(f"{name}: {type(error).__name__}: {str(error)[:200]} ({where}) -> {path.name}", flush=True)
    print(f"\n{sum(tried.values())} inputs in {time.monotonic() - start:.0f} s")
    for name in names:
        print(f"  {name:<16} {tried[name]:>7} inputs  {found[name]:>3} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
