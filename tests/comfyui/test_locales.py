"""The texts in locales/: the same nodes in every language, nothing that no node has, English as the nodes say it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_host import ComfyServer
from helpers import ROOT
from make_locales import LOCALES, SYNTAX, as_file, english, missing
from make_translated_texts import FILE, digest, explanations

LANGUAGES = ("de", "en", "ja", "zh")
OTHERS = ("de", "ja", "zh")


def path_of(language: str) -> Path:
    return LOCALES / language / "nodeDefs.json"


def texts_of(language: str) -> dict[str, Any]:
    return json.loads(path_of(language).read_text(encoding="utf-8"))


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that stands there twice is an error."""
    keys = [key for key, _ in pairs]
    assert len(keys) == len(set(keys)), f"twice: {sorted({key for key in keys if keys.count(key) > 1})}"
    return dict(pairs)


def all_texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for one in value.values():
            yield from all_texts(one)
    else:
        yield value


def test_every_language_is_here() -> None:
    assert tuple(sorted(path.name for path in LOCALES.iterdir())) == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_file_is_utf8_json_with_every_key_once_and_no_empty_text(language: str) -> None:
    content = path_of(language).read_bytes().decode("utf-8")
    texts = json.loads(content, object_pairs_hook=once)
    assert content == as_file(texts)
    assert all(text.strip() == text != "" for text in all_texts(texts))


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_holds_syntax_of_the_frontends_translator(language: str) -> None:
    assert [text for text in all_texts(texts_of(language)) if SYNTAX & set(text)] == []


@pytest.mark.parametrize("language", OTHERS)
def test_a_language_has_every_node_and_nothing_that_english_lacks(language: str) -> None:
    texts, originals = texts_of(language), texts_of("en")
    assert list(texts) == list(originals)
    assert missing(texts, originals) == []
    assert all(set(texts[node]) == set(originals[node]) for node in texts)
    for node, original in originals.items():
        for name, output in texts[node]["outputs"].items():
            assert set(output) <= set(original["outputs"][name]), (node, name)


@pytest.mark.parametrize("language", OTHERS)
def test_names_and_descriptions_are_translated(language: str) -> None:
    texts = texts_of(language)
    for node, original in texts_of("en").items():
        assert texts[node]["display_name"].endswith(" (DreamBooth)")
        assert texts[node]["display_name"] != original["display_name"]
        assert texts[node]["description"] != original["description"]
    names = [text["display_name"] for text in texts.values()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("language", OTHERS)
def test_every_tooltip_is_translated(language: str) -> None:
    """Also those that English leaves to the nodes, for their characters; a translation does without these."""
    texts = texts_of(language)
    for node, original in texts_of("en").items():
        for part in ("inputs", "outputs"):
            for key, english_texts in original[part].items():
                tooltip = texts[node][part][key].get("tooltip")
                assert tooltip, (node, part, key)
                assert tooltip != english_texts.get("tooltip"), (node, part, key)


def test_no_translation_is_left_behind_by_a_change_of_the_english() -> None:
    """After a change: translate the text anew in every language, then run tools/make_translated_texts.py."""
    translated = set(json.loads(FILE.read_text(encoding="utf-8")))
    texts = dict(explanations(texts_of("en")))
    assert {place: text for place, text in texts.items() if digest(text) not in translated} == {}
    assert translated == {digest(text) for text in texts.values()}


def test_locales_are_published() -> None:
    patterns = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    assert not any(pattern.strip("/").startswith(("locales", "*")) for pattern in patterns)


@pytest.mark.comfy
def test_english_is_current_and_comfyui_serves_every_language(server: ComfyServer) -> None:
    current, served = english(server.object_info()), json.loads(server._request("/i18n"))
    assert texts_of("en") == current, "run python tools/make_locales.py"
    assert {language: texts["nodeDefs"] for language, texts in served.items()} == {
        language: texts_of(language) for language in LANGUAGES
    }
