"""Prompts and captions: several in one text, without the rare word, with placeholders filled, with tags shuffled."""

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
_PUNCTUATION = ",.;:!?"


def split_prompts(text: str) -> list[str]:
    """The prompts of a text, which are separated by "|" or stand on lines of their own."""
    return [prompt.strip() for prompt in re.split(r"[|\n]", text) if prompt.strip()]


def without_token(prompt: str, token: str) -> str:
    """A prompt of the subject as one of its class: "a photo of sks dog" → "a photo of a dog".

    Args:
        prompt: Of the subject.
        token: Its rare word; may be several words. A prompt that doesn't hold it is returned as it is.
    """
    rare_words = token.split()
    words = prompt.split()
    kept: list[str] = []
    contains_token = False
    index = 0
    while index < len(words):
        if (
            not rare_words
            or [word.strip(_PUNCTUATION) for word in words[index : index + len(rare_words)]] != rare_words
        ):
            kept.append(words[index])
            index += 1
            continue
        contains_token = True
        index += len(rare_words)
        last_word = words[index - 1]
        punctuation = last_word[len(last_word.rstrip(_PUNCTUATION)) :]
        if punctuation and kept:
            kept[-1] = kept[-1].rstrip(_PUNCTUATION) + punctuation
            continue
        if index == len(words) or not kept or _BEFORE_NOUN.fullmatch(words[index]):
            continue
        if _BEFORE_NOUN.fullmatch(kept[-1]):
            kept.append(article(words[index]))
        elif kept[-1].lower() in ("a", "an"):
            kept[-1] = article(words[index])
    return " ".join(kept) if contains_token else prompt


def shuffled_tags(caption: str, keep: int, source: torch.Generator) -> str:
    """A caption whose parts between commas are shuffled.

    Args:
        caption: Any number of parts.
        keep: How many parts at the beginning stay where they are.
        source: Generator of the order.
    """
    import torch

    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    first = tags[:keep]
    rest = tags[keep:]
    order = torch.randperm(len(rest), generator=source).tolist()
    return ", ".join(first + [rest[index] for index in order])


def fill_placeholders(template: str, token: str, noun: str) -> str:
    """A template with the rare word for {token} and the class noun for {class}."""
    return template.replace("{token}", token.strip()).replace("{class}", noun.strip())


def article(noun: str) -> str:
    """The indefinite article of a noun, by its first letter."""
    return "an" if noun[:1].lower() in tuple("aeiou") else "a"
