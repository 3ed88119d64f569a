"""Pivotal tuning: the vectors of the subject's rare word are learned together with the adapter, in one run.

That is textual inversion (Gal et al. 2022, arXiv:2208.01618) together with LoRA: in the first part of the run both are
trained, and from the pivot on the adapter alone. Source: cloneofsimo's lora (lora_pti);
examples/advanced_diffusion_training of diffusers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..adapters.embeddings import bundled_embeddings, words_of
from ..adapters.kohya import Adapter
from ..core.errors import AdapterError, SettingsError, suggest
from ..core.prompts import PromptWords
from ..models.families.base import DiffusionModel, LearnedWord, token_ids_key
from ..settings.train import TrainSettings
from .adapter import TrainableAdapter
from .optimizers import WORDS
from .runs.checkpoint import Saved


class TrainedWords:
    """Words with vectors that are parameters, float32; of every text encoder of the model.

    Attributes:
        words: Each with its parameters as vectors.
    """

    def __init__(
        self, model: DiffusionModel, settings: TrainSettings, words: Sequence[PromptWords], start: Adapter | None
    ) -> None:
        """Take the initial vectors from the embeddings of other words, and let the model learn the words.

        Args:
            model: A built model with its text encoders.
            settings: How many vectors a word gets, and from what they start.
            words: Rare word and class noun of each subject.
            start: An adapter to go on from; its embeddings of these words are where they start.

        Raises:
            SettingsError: A word can't be learned.
            AdapterError: The embedding in `start` has another number of vectors, or is another family's.
        """
        self._family = model.family
        started = {word.word: word for word in words_of(start.embeddings, model.family)} if start else {}
        self.words: list[LearnedWord] = []
        known = {word.word.lower() for word in model.words}
        for word, text in _initial_texts(words, settings).items():
            if word.lower() in known:
                raise SettingsError(
                    f"The base model already has an embedding for '{word}', from an adapter that was applied to it.",
                    f"Choose another {suggest('token')}, or set {suggest('token_vectors', 0)} to keep its vectors.",
                )
            vectors = _vectors_of(started[word], settings) if word in started else _initial(model, settings, text)
            parameters = {encoder: nn.Parameter(rows.to(torch.float32, copy=True)) for encoder, rows in vectors.items()}
            self.words.append(LearnedWord(word, parameters))
        model.learn([*model.words, *self.words])

    def parameters(self) -> list[nn.Parameter]:
        """The vectors, always in the same order."""
        return [
            vectors for word in self.words for vectors in word.vectors.values() if isinstance(vectors, nn.Parameter)
        ]

    def to_device(self, device: torch.device) -> None:
        """Move the vectors to where the run trains."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    def embeddings(self) -> dict[str, torch.Tensor]:
        """Copies of the vectors, as bundled in an adapter file."""
        return {key: tensor.clone() for key, tensor in bundled_embeddings(self.words, self._family).items()}

    @torch.no_grad()
    def load(self, embeddings: Mapping[str, torch.Tensor]) -> None:
        """Set the vectors to a saved state of the same run.

        Raises:
            AdapterError: It is another run's.
        """
        saved = {word.word: word.vectors for word in words_of(embeddings, self._family)}
        for word in self.words:
            for encoder, vectors in word.vectors.items():
                loaded = saved.get(word.word, {}).get(encoder)
                if loaded is None or loaded.shape != vectors.shape:
                    raise AdapterError(
                        f"The checkpoint's embedding of '{word.word}' differs from the one that this run trains.",
                        f"Start again with {suggest('resume', 'never')} or another {suggest('name')}.",
                    )
                vectors.copy_(loaded)

    def require_captioned(self, model: DiffusionModel, captions: Sequence[str]) -> None:
        """Check that every word is in a caption, where a text encoder sees it.

        Args:
            model: The model that has learned the words.
            captions: Of the subject's pictures.

        Raises:
            SettingsError: One is not.
        """
        first = token_ids_key(self._family.text_encoders[0].name)
        before = model.words
        try:
            for word in self.words:
                model.learn([word])
                if not bool((model.tokenize(captions)[first] < 0).any()):
                    raise SettingsError(
                        f"{suggest('token_vectors')} learns the word '{word.word}', but no caption contains it; one is "
                        f"'{captions[0][:80]}'.",
                        f"Put the word, or {{token}}, into the captions; or set {suggest('token')} to a word in them.",
                    )
        finally:
            model.learn(before)


class WithWords:
    """An adapter and words that are trained together; see `Trainable`."""

    def __init__(self, adapter: TrainableAdapter, words: TrainedWords) -> None:
        """Hold both; they are trained in the same networks."""
        self._adapter = adapter
        self._words = words

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Those of the adapter, and after them the words'."""
        return {**self._adapter.groups(), WORDS: self._words.parameters()}

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [*self._adapter.parameters(), *self._words.parameters()]

    def starting_at_zero(self) -> list[nn.Parameter]:
        """Those of the adapter."""
        return self._adapter.starting_at_zero()

    def saved(self, metadata: Mapping[str, str]) -> Saved:
        """A copy of the current state, as an adapter that bundles the words."""
        saved = self._adapter.saved(metadata)
        assert saved.adapter is not None
        return replace(saved, adapter=replace(saved.adapter, embeddings=self._words.embeddings()))

    def restore(self, saved: Saved) -> None:
        """Set the parameters to a saved state of the same run.

        Raises:
            AdapterError: It is another run's.
        """
        self._adapter.restore(saved)
        self._words.load(saved.adapter.embeddings if saved.adapter else {})

    def is_finite(self) -> bool:
        """Whether every trained number is finite."""
        own = all(bool(torch.isfinite(vectors.detach()).all()) for vectors in self._words.parameters())
        return own and self._adapter.is_finite()

    def after_update(self, trained: Collection[str]) -> None:
        """Enforce the adapter's constraints."""
        self._adapter.after_update(trained)

    def squared_change(self, trained: Collection[str]) -> torch.Tensor:
        """That of the adapter."""
        return self._adapter.squared_change(trained)

    def untrained(self) -> contextlib.AbstractContextManager[None]:
        """The adapter is turned off; the denoiser holds no words."""
        return self._adapter.untrained()


def _initial_texts(words: Sequence[PromptWords], settings: TrainSettings) -> dict[str, str]:
    """Word → the text whose embeddings its vectors start from.

    Raises:
        SettingsError: A word is missing, can't be the name of an embedding, or has two nouns to start from.
    """
    texts: dict[str, str] = {}
    for subject in words:
        word = " ".join((subject.token or "").split())
        if not word:
            raise SettingsError(
                f"{suggest('token_vectors')} learns the rare word, but {suggest('token')} is empty.",
                f"Set {suggest('token', 'sks')}, for example, and put {{token}} into the captions.",
            )
        if "." in word:
            raise SettingsError(
                f"The rare word '{word}' contains a dot, so its embedding can't be saved.",
                f"Choose a {suggest('token')} without dots.",
            )
        text = settings.token_start.strip() or (subject.class_noun or "").strip() or word
        first = texts.setdefault(word, text)
        if first != text:
            raise SettingsError(
                f"Two subjects share the rare word '{word}', but one is a {first} and the other a {text}.",
                f"Give each its own word, or set {suggest('token_start')} to initialise the shared one.",
            )
    return texts


def _initial(model: DiffusionModel, settings: TrainSettings, text: str) -> dict[str, torch.Tensor]:
    """Each text encoder's embeddings of a text's tokens, repeated or cut to the number of vectors."""
    vectors = {}
    for spec in model.family.text_encoders:
        rows = model.token_embeddings(spec.name, text)
        vectors[spec.name] = rows[[index % len(rows) for index in range(settings.token_vectors)]]
    return vectors


def _vectors_of(word: LearnedWord, settings: TrainSettings) -> Mapping[str, torch.Tensor]:
    """The vectors of a word that is trained on.

    Raises:
        AdapterError: It has another number of them.
    """
    for vectors in word.vectors.values():
        if len(vectors) != settings.token_vectors:
            raise AdapterError(
                f"The embedding of '{word.word}' in the adapter to start from has {len(vectors)} vectors, but "
                f"{suggest('token_vectors')} is {settings.token_vectors}.",
                f"Set {suggest('token_vectors', len(vectors))}.",
            )
    return word.vectors
