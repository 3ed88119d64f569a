"""What the nodes are doing now: kept for pages that are opened later, and sent to those that are open."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from ..trainer.core.errors import SettingsError

_MOST_NODES = 200
_nodes: dict[str, dict[str, Any]] = {}
_lock = threading.Lock()


def note(node: str, **facts: Any) -> dict[str, Any]:
    """Keep facts about a node, on top of what is known of it; returns all of them.

    Args:
        node: Its execution id, composite inside of subgraphs.
        facts: "state" ("starting", a phase's name, "training", "stopped", "done" or "failed"), "run", "step" …
    """
    with _lock:
        known = _nodes.pop(node, {}) | facts | {"node": node, "at": time.time()}
        _nodes[node] = known
        while len(_nodes) > _MOST_NODES:
            del _nodes[next(iter(_nodes))]
        return dict(known)


def begin(node: str) -> None:
    """Forget what a node did before."""
    with _lock:
        _nodes.pop(node, None)


def snapshot() -> dict[str, dict[str, Any]]:
    """Node → what is known of it."""
    with _lock:
        return {node: dict(facts) for node, facts in _nodes.items()}


def with_state(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A run's summary, with the state "running" if a node works on it."""
    return dict(summary) | ({"state": "running"} if _works_on(str(summary["id"])) else {})


def require_idle(run: str) -> None:
    """Refuse if a node works on that run.

    Raises:
        SettingsError: One does.
    """
    if _works_on(run):
        raise SettingsError(f"The run '{run}' is training.", "Cancel it first.")


def _works_on(run: str) -> bool:
    ended = ("done", "stopped", "failed")
    return any(facts.get("run") == run and facts.get("state") not in ended for facts in snapshot().values())
