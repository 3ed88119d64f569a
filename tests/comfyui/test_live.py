"""What the nodes are doing now: kept for pages, and asked before a run is deleted."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import pytest
from helpers import ROOT
from pack.trainer.core.errors import SettingsError


@pytest.fixture
def live() -> Any:
    """The module alone: the package around it needs ComfyUI."""
    spec = importlib.util.spec_from_file_location("pack.nodes.live", ROOT / "nodes" / "live.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_a_node_does_is_kept(live: Any) -> None:
    told = live.update("1:2", state="starting", name="dog")
    told["name"] = "changed"
    assert live.update("1:2", state="training", run="dog-1", step=3).items() >= {"name": "dog", "step": 3}.items()
    live.update("3", state="done", run="cat-1")
    kept = live.snapshot()
    kept["3"]["run"] = "changed"
    assert {node: facts["run"] for node, facts in live.snapshot().items()} == {"1:2": "dog-1", "3": "cat-1"}
    assert all(facts["node"] == node and facts["at"] <= time.time() for node, facts in kept.items())
    assert kept["3"]["at"] > kept["1:2"]["at"]
    live.forget("1:2")
    live.forget("4")
    assert list(live.snapshot()) == ["3"]


@pytest.mark.parametrize("clock", [1.7e9, 0.0, -5.0], ids=["stands", "was set back", "is odd"])
def test_facts_can_be_put_in_order_whatever_the_clock_does(
    clock: float, live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.update("1", state="starting")
    monkeypatch.setattr(live.time, "time", lambda: clock)
    times = [live.update("1", step=step)["at"] for step in range(50)]
    assert times == sorted(set(times))


def test_the_nodes_that_did_something_last_are_kept(live: Any) -> None:
    for number in [*range(300), 250, 150]:
        live.update(str(number), state="done")
    assert [int(node) for node in live.snapshot()] == [*range(100, 150), *range(151, 250), *range(251, 300), 250, 150]


@pytest.mark.parametrize(
    ("states", "running"),
    [
        ([], False),
        (["starting"], True),
        (["encoding pictures"], True),
        (["training"], True),
        (["done"], False),
        (["stopped"], False),
        (["failed"], False),
        (["failed", "starting"], True),
        (["training", "done"], False),
    ],
    ids=str,
)
def test_a_run_is_running_while_a_node_works_on_it(states: list[str], running: bool, live: Any) -> None:
    live.update("other", state="done", run="dog-1")
    live.update("another", state="training", run="cat-1")
    for state in states:
        live.update("1", state=state, run="dog-1")
    assert live.is_training("dog-1") == running
    if not running:
        live.require_idle("dog-1")
        return
    with pytest.raises(SettingsError, match="'dog-1' is training"):
        live.require_idle("dog-1")
