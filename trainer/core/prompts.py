"""Prompts: several in one text, and the same without the subject's rare word."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BEFORE_NOUN = re.compile(
    "about|above|across|and|around|as|at|before|behind|below|beside|between|by|for|from|in|inside|into|like|near|of|on"
    "|onto|or|over|showing|than|through|to|toward|towards|under|upon|wearing|with|without",
    re.IGNORECASE,
)
_MARKS = ",.;:!?"


def split_prompts(text: str) -> list[str]:
    """The prompts of a text that separates them by "|" or by lines."""
    return [prompt.strip() for prompt in re.split(r"[|\n]", text) if prompt.strip()]


def without_token(prompt: str, token: str) -> str:
    """A prompt of the subject as one of its class: "a photo of sks dog" → "a photo of a dog".

    Args:
        prompt: Of the subject.
        token: Its rare word, one or more words. If it is blank or nowhere in the prompt, that stays as it is.
    """
    rare, words, found = token.split(), prompt.split(), []
    at, seen = 0, False
    while at < len(words):
        if not rare or [word.strip(_MARKS) for word in words[at : at + len(rare)]] != rare:
            found.append(words[at])
            at += 1
            continue
        at, seen = at + len(rare), True
        mark = words[at - 1][len(words[at - 1].rstrip(_MARKS)) :]
        if mark and found:
            found[-1] = found[-1].rstrip(_MARKS) + mark
            continue
        if at == len(words) or not found or _BEFORE_NOUN.fullmatch(words[at]):
            continue
        if _BEFORE_NOUN.fullmatch(found[-1]):
            found.append(article(words[at]))
        elif found[-1].lower() in ("a", "an"):
            found[-1] = article(words[at])
    return " ".join(found) if seen else prompt


def shuffled_tags(caption: str, keep: int, source: torch.Generator) -> str:
    """A caption whose parts between commas are in another order.

    Args:
        caption: Of any number of parts.
        keep: How many at the beginning stay where they are.
        source: Draws the order.
    """
    import torch

    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    first, rest = tags[:keep], tags[keep:]
    return ", ".join(first + [rest[place] for place in torch.randperm(len(rest), generator=source).tolist()])


def fill_placeholders(template: str, token: str, noun: str) -> str:
    """A template with the rare word in the place of {token} and the class in that of {class}."""
    return template.replace("{token}", token.strip()).replace("{class}", noun.strip())


def article(noun: str) -> str:
    """The indefinite article that a noun wants, by its first letter."""
    return "an" if noun[:1].lower() in tuple("aeiou") else "a"
