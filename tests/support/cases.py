"""Which of a test's parameters an everyday run tries: of a product every pair, of what is alike a few."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from allpairspy import AllPairs


def product_of(**axes: Sequence[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test by every combination of the axes; those that no pair of values needs are marked slow.

    `@product_of(kind=KINDS, dtype=[torch.float32, torch.bfloat16], strength=[1.0, -0.5])` passes the arguments `kind`,
    `dtype` and `strength`. Of a mapping the keys name the cases and the values are passed. Among the everyday
    combinations, each value of an axis meets each value of every other axis (pairwise testing, allpairspy).
    """
    labels = [[label for label, _ in _labelled(axis)] for axis in axes.values()]
    positions = [range(len(axis)) for axis in labels]
    everyday = {tuple(row) for row in AllPairs([list(axis) for axis in positions])} if len(axes) > 1 else None
    values = [[value for _, value in _labelled(axis)] for axis in axes.values()]
    cases = []
    for row in itertools.product(*positions):
        marks = [] if everyday is None or row in everyday else [pytest.mark.slow]
        name = "-".join(labels[axis][position] for axis, position in enumerate(row))
        cases.append(pytest.param(*(values[axis][position] for axis, position in enumerate(row)), id=name, marks=marks))
    return pytest.mark.parametrize(",".join(axes), cases)


def mostly_slow(cases: Iterable[Any], *everyday: Any) -> list[Any]:
    """Cases for `parametrize`, of which all but the everyday ones are marked slow; a tuple gives several arguments.

    `@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "sdxl"))`
    """
    every = list(cases)
    assert all(case in every for case in everyday), "an everyday case is not among the cases"
    arguments = [case if isinstance(case, tuple) else (case,) for case in every]
    marks = [[] if case in everyday else [pytest.mark.slow] for case in every]
    return [pytest.param(*values, marks=mark) for values, mark in zip(arguments, marks, strict=True)]


def _labelled(axis: Sequence[Any] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(axis, Mapping):
        return list(axis.items())
    return [(getattr(value, "__name__", None) or str(value).removeprefix("torch."), value) for value in axis]
