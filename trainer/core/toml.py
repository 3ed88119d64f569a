"""Settings files: TOML in any encoding that editors and shells write, with errors that name the line."""

from __future__ import annotations

import codecs
import re
import sys
from pathlib import Path
from typing import Any

from .errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_POSITION = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings from a TOML file with one key per setting; dashes in keys count as underscores.

    The file is UTF-8, or UTF-16 or UTF-32 with a byte order mark, as PowerShell's `>` writes it.

    Raises:
        SettingsError: The file is missing, is not valid TOML, or sets a key twice.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise SettingsError(f"The settings file {path} does not exist.", "Check the path for typos.") from error
    except OSError as error:
        raise SettingsError(
            f"{path} can't be read: {error.strerror}.", "Check the path of the settings file."
        ) from error
    encoding = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise SettingsError(f"{path} is not UTF-8 (line {line}).", "Save the file as UTF-8 in your editor.") from error
    try:
        table = tomllib.loads(text)
    except RecursionError as error:
        raise SettingsError(
            f"{path} contains lists that are nested too deeply.", "Write a single list for each setting."
        ) from error
    except ValueError as error:  # tomllib's own, and Python's for a number of more than 4300 digits
        raise _syntax_error(path, text, str(error)) from error
    return _with_underscores(path, table)


def _syntax_error(path: Path, text: str, message: str) -> SettingsError:
    """The error with the line in question and what is usually meant."""
    position = _POSITION.search(message)
    where = str(path)
    line = ""
    if position:
        lines = text.rstrip().split("\n")
        number = int(position[1]) if position[1] else len(lines)
        line = lines[min(number, len(lines)) - 1].strip()
        where = f"{path}, line {number}"
        message = message[: position.start()]
    problem = f"{where} is not valid TOML: {message[:200]}"
    remedy = "Write one `key = value` per line, with text in quotes."
    if "\0" in text:
        remedy = "Save the file as UTF-8 in your editor."
    elif "\\" in line:
        remedy = "Put Windows paths in single quotes: base = 'C:\\models\\x.safetensors'."
    elif re.match(r"(?i)[\w-]+\s*=\s*(true|false|none|null|yes|no|on|off)\b", line):
        remedy = "Write true or false for switches, and leave out settings that are not set."
    elif re.match(r"[\w-]+\s*=\s*[^\s\"'\[{\d+-]", line):
        remedy = f'Put the text in quotes: {line.partition("=")[0].strip()} = "…".'
    return SettingsError(f"{problem}: {line[:200]}" if line else f"{problem}.", remedy)


def _with_underscores(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    """A table, and the tables in its lists, with underscores for dashes in keys.

    Raises:
        SettingsError: A key is given in both spellings.
    """
    renamed: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, list):
            value = [_with_underscores(path, entry) if isinstance(entry, dict) else entry for entry in value]
        name = key.replace("-", "_")
        if name in renamed:
            raise SettingsError(
                f"{path} sets {name} twice: with a dash and with an underscore.", "Remove one of the two."
            )
        renamed[name] = value
    return renamed
