"""The current state of each node: kept for pages that are opened later, and sent to those that are open."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

from ..trainer.core.errors import SettingsError

_MOST_NODES = 200
_ENDED = ("done", "stopped", "failed")
_nodes: dict[str, dict[str, Any]] = {}
_lock = threading.Lock()
_newest = 0.0  # Unix time of the newest facts


def update(node: str, **facts: Any) -> dict[str, Any]:
    """Keep facts about a node, on top of what is known of it; returns all of them.

    Among them are "node" and "at", a Unix time that is later than that of all facts before.

    Args:
        node: Its execution id, composite inside of subgraphs.
        facts: "state" ("starting", a phase's name, "training", "stopped", "done" or "failed"), "run", "step" …
    """
    global _newest
    with _lock:
        _newest = max(time.time(), math.nextafter(_newest, math.inf))
        known = _nodes.pop(node, {}) | facts | {"node": node, "at": _newest}
        _nodes[node] = known
        while len(_nodes) > _MOST_NODES:
            del _nodes[next(iter(_nodes))]
        return dict(known)


def forget(node: str) -> None:
    """Drop all facts about a node."""
    with _lock:
        _nodes.pop(node, None)


def snapshot() -> dict[str, dict[str, Any]]:
    """Node → facts about it."""
    with _lock:
        return {node: dict(facts) for node, facts in _nodes.items()}


def require_idle(run: str) -> None:
    """Refuse if a node is training that run.

    Raises:
        SettingsError: One is.
    """
    if is_training(run):
        raise SettingsError(f"The run '{run}' is training.", "Cancel it first.")


def is_training(run: str) -> bool:
    """Whether a node is training that run."""
    return any(facts.get("run") == run and facts.get("state") not in _ENDED for facts in snapshot().values())
