"""Settings as a TOML file has them; Python reads TOML and does not write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def toml_text(values: Mapping[str, Any]) -> str:
    """One `key = value` per line.

    Args:
        values: Texts, numbers, switches and lists of them; what is None is left out.
    """
    lines = [f"{name} = {_value(value)}" for name, value in values.items() if value is not None]
    return "".join(line + "\n" for line in lines)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    # TOML's basic strings are JSON's, but for DEL and for surrogates
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
