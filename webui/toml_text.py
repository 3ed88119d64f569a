"""Settings as a TOML file has them; Python reads TOML and does not write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..trainer.core.errors import SettingsError
from .wording import title


def toml_text(values: Mapping[str, Any]) -> str:
    """One `key = value` per line.

    Args:
        values: Texts, numbers, switches and lists of them; what is None is left out.

    Raises:
        SettingsError: A text has bytes of a file's name that are no UTF-8.
    """
    lines = []
    for name, value in values.items():
        if value is None:
            continue
        line = f"{name} = {_value(value)}\n"
        try:
            line.encode()
        except UnicodeEncodeError:
            shown = str(value).encode(errors="backslashreplace").decode()
            raise SettingsError(
                f"{title(name)}: '{shown}' is not valid UTF-8, so it can't be saved in a settings file.",
                "Rename the file or folder, or type the text again.",
            ) from None
        lines.append(line)
    return "".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    # TOML's basic strings are JSON's, but for DEL and for surrogates
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
