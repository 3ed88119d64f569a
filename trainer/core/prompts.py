"""Prompts and captions: what a text of them means, without the rare word, with tags shuffled.

Every prompt is read by `parse_prompts`, wherever it comes from: a setting, a widget, a caption file, the name of a file
or folder. So `|`, `{token}` and `{class}` mean the same everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import suggest

if TYPE_CHECKING:
    import torch

_BRACES = re.compile(r"(\{+)([^{}]*)(\}+)")
_WORDS_ALONE = re.compile(r"[\w\s-]*")
_UNCLOSED = re.compile(r"\{\s*(?:token|class)\b")
_BEFORE_NOUN = re.compile(
    "about|above|across|and|around|as|at|before|behind|below|beside|between|by|for|from|in|inside|into|like|near|of|on"
    "|onto|or|over|showing|than|through|to|toward|towards|under|upon|wearing|with|without",
    re.IGNORECASE,
)
_PUNCTUATION = ",.;:!?"


@dataclass(frozen=True)
class PromptWords:
    """What the templates in prompts stand for.

    Attributes:
        token: {token}, the rare word. None: it has no value, where there is no such setting.
        class_noun: {class}, the class of the subject; None likewise.
    """

    token: str | None = None
    class_noun: str | None = None


def common_words(subjects: Sequence[PromptWords]) -> PromptWords:
    """What the templates stand for in a prompt about several subjects: no value where these differ."""
    tokens = {words.token for words in subjects}
    nouns = {words.class_noun for words in subjects}
    return PromptWords(
        token=tokens.pop() if len(tokens) == 1 else None, class_noun=nouns.pop() if len(nouns) == 1 else None
    )


class PromptError(ValueError):
    """A prompt that can't be read.

    Attributes:
        problem: What is wrong, as the end of a sentence whose subject is the prompt.
        remedy: What to do about it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}. {remedy}")
        self.problem = problem
        self.remedy = remedy


def parse_prompts(text: str, words: PromptWords) -> list[str]:
    """The prompts of a text, with the rare word for {token} and the class noun for {class}.

    Args:
        text: Prompts, separated by "|" or by line breaks.
        words: What the templates stand for.

    Returns:
        The prompts that are not blank, without blanks around them.

    Raises:
        PromptError: A template is unknown, or has no value. Braces around anything but words are text.
    """
    for match in _BRACES.finditer(text):
        _require_known(*match.groups(), words=words)
    if unclosed := _UNCLOSED.search(_BRACES.sub("", text)):
        raise PromptError(f"contains {unclosed[0]} without a closing brace", "Write {token} and {class}.")
    values = {"token": (words.token or "").strip(), "class": (words.class_noun or "").strip()}
    return [_BRACES.sub(lambda match: values.get(match[2], match[0]), prompt).strip() for prompt in split_prompts(text)]


def _require_known(opening: str, name: str, closing: str, *, words: PromptWords) -> None:
    """Check what stands in braces.

    Raises:
        PromptError: It looks like a template, or like alternatives, and is none that is known.
    """
    braced = f"{opening}{name}{closing}"
    if "|" in name or "\n" in name.strip():
        raise PromptError(
            f"contains {' '.join(braced.split())}, but braces can't list alternatives",
            "Write complete prompts, separated by '|': a red dog | a blue dog.",
        )
    settings = {"token": ("token", words.token, "sks"), "class": ("class_noun", words.class_noun, "dog")}
    if len(braced) != len(name) + 2 or name not in settings:
        if _WORDS_ALONE.fullmatch(name):
            raise PromptError(
                f"contains the unknown placeholder {braced}",
                "Use {token} for the rare word and {class} for the class noun, and no braces around other words.",
            )
        return
    setting, value, example = settings[name]
    if value is None:
        raise PromptError(f"contains {braced}, which has no value here", "Write out the words themselves.")
    if not value.strip():
        raise PromptError(
            f"contains {braced}, but {suggest(setting)} is empty",
            f"Set {suggest(setting, example)}, for example, or write the word itself instead of {braced}.",
        )


def split_prompts(text: str) -> list[str]:
    """The prompts of a text, separated by "|" or by line breaks."""
    return [prompt.strip() for prompt in re.split(r"[|\n]", text) if prompt.strip()]


def without_token(prompt: str, token: str) -> str:
    """A prompt of the subject as one of its class: "a photo of sks dog" → "a photo of a dog".

    Args:
        prompt: Of the subject.
        token: Its rare word; may be several words. A prompt that does not contain it is returned unchanged.
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
    """A caption with its comma-separated parts shuffled.

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


def article(noun: str) -> str:
    """The indefinite article of a noun, by its first letter."""
    return "an" if noun[:1].lower() in tuple("aeiou") else "a"
