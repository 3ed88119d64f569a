"""Text: files in UTF-8 or UTF-16, as programs write them; and lists of names in a sentence."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

_BYTE_ORDER_MARKS = (  # UTF-32's before UTF-16's, which it begins with
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1a\x7f]|\x1b[$(]|\ufffe|\uffff")  # and what ISO-2022-JP begins with
_END_OF_FILE = "\x1a"  # with which DOS programs end a text


def decode_text(content: bytes) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    Without a mark, UTF-16 is recognised by the NUL bytes of letters and spaces. No other encoding can be recognised
    with certainty, so none is guessed.

    Raises:
        ValueError: It is none of these; the text completes a sentence: "a.txt …".
    """
    mark, encoding = next(
        ((mark, encoding) for mark, encoding in _BYTE_ORDER_MARKS if content.startswith(mark)),
        (b"", _unmarked(content)),
    )
    try:
        text = content[len(mark) :].decode(encoding).rstrip(_END_OF_FILE)
    except UnicodeDecodeError:
        raise ValueError("is neither UTF-8 nor UTF-16") from None
    if _NO_TEXT.search(text):
        raise ValueError("is not UTF-8 or UTF-16 text: it contains control characters")
    return text


def _unmarked(content: bytes) -> str:
    """The encoding of a text without a byte-order mark, by where it has NUL bytes."""
    nuls_at_even = content[::2].count(0)
    nuls_at_odd = content[1::2].count(0)
    if not (nuls_at_even or nuls_at_odd):
        return "utf-8"
    return "utf-16-le" if nuls_at_odd > nuls_at_even else "utf-16-be"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are: "a.png, b.png and 3 more"."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
