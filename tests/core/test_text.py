"""Text files in the encodings that people's programs write; the rest refused, never guessed."""

from __future__ import annotations

import codecs
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.core.text import decode_text, listed

TEXTS = ["a", "a photo of sks dog on grass\r\n", "ein müder Hund – 犬", "犬\n", "", " "]
MARKED = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", MARKED)
def test_marked_encodings(encoding: str, text: str) -> None:
    assert decode_text(MARKED[encoding] + text.encode(encoding)) == text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_encodings_without_a_mark(encoding: str, text: str) -> None:
    assert decode_text(text.encode(encoding)) == text


def test_what_dos_puts_at_the_end_is_no_text() -> None:
    assert decode_text(b"a dog\r\n\x1a") == "a dog\r\n"


@pytest.mark.parametrize(
    "content",
    [
        "Hündin".encode("latin-1"),
        "müde – Hündin".encode("cp1252"),
        "柴犬の写真".encode("shift-jis"),
        "柴犬の写真".encode("euc-jp"),
        "собака".encode("koi8-r"),
        "柴犬".encode("utf-16-le"),  # without a mark or a letter that would tell
        "柴犬の写真".encode("iso2022_jp"),
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\xff\xfea",
        b"\xef\xbb\xbf\xff",
        bytes(8),
    ],
    ids=["latin-1", "cp1252", "shift-jis", "euc-jp", "koi8", "utf-16", "iso-2022", "png", "odd", "marked", "nul"],
)
def test_other_encodings_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="UTF-8"):
        decode_text(content)


@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"], exclude_characters="\x7f\ufeff\ufffe\uffff")))
def test_every_text_is_read_back(text: str) -> None:
    for encoding, mark in MARKED.items():
        assert decode_text(mark + text.encode(encoding)) == text
    assert decode_text(text.encode()) == text


@given(st.binary())
def test_every_content_is_a_text_or_refused(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert "\0" not in decode_text(content)


def test_lists_of_names() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b"]) == "a and b"
    assert listed(list("abcdef")) == "a, b, c, d, e and 1 more"
    assert listed(list("abc"), 3) == "a, b and c"
