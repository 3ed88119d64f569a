"""Numbers in what is sent to pages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def finite(content: Any) -> Any:
    """The same with None for numbers that are not finite: JSON has none, and a browser reads nothing beside one."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content
