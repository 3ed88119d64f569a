"""The closed vocabularies of the transformers here: which modules each has, whatever program named them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from . import anima_names, flux2_names, krea2_names, zimage_names


class Vocabulary(Protocol):
    """A module that knows the names of one transformer's modules.

    Attributes:
        BLOCKS: Prefix of paths of modules in blocks → a display name.
        UNDERSCORED_WORDS: The parts of paths that contain underscores.
    """

    @property
    def BLOCKS(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def UNDERSCORED_WORDS(self) -> frozenset[str]: ...  # noqa: D102

    def is_module(self, path: str) -> bool:
        """Whether a dotted path, in the network, diffusers or the original code, is that of one of its modules."""

    def network_path(self, original: str) -> str | None:
        """A module's dotted path in the network from its name in the original code; None if there is none."""

    def fits(self, path: str, outputs: int, inputs: int) -> bool:
        """Whether a module of that path may have a weight with that many rows and columns."""


VOCABULARIES: tuple[Vocabulary, ...] = (flux2_names, zimage_names, krea2_names, anima_names)
BLOCKS = {path: word for vocabulary in VOCABULARIES for path, word in vocabulary.BLOCKS.items()}
UNDERSCORED_WORDS = frozenset(word for vocabulary in VOCABULARIES for word in vocabulary.UNDERSCORED_WORDS)


def vocabulary_of(path: str) -> Vocabulary | None:
    """The vocabulary with a module of that path, in any program's naming; None if there is none."""
    return next((vocabulary for vocabulary in VOCABULARIES if vocabulary.is_module(path)), None)


def is_transformer_module(path: str) -> bool:
    """Whether a dotted path, in the network, diffusers or the original code, is that of a module of a transformer."""
    return vocabulary_of(path) is not None


def network_path(original: str) -> str | None:
    """A module's dotted path in the network from its name in the original code; None if there is none."""
    paths = (vocabulary.network_path(original) for vocabulary in VOCABULARIES)
    return next((path for path in paths if path), None)
