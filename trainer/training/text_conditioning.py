"""The text conditioning of a run: captions encoded once by frozen text encoders, in every step by trained ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.devices import to_device
from ..data.latent_cache import encode_tokens_in_batches
from ..models.families.base import Conditioning, DiffusionModel, token_ids_key


class TextConditioning:
    """The distinct captions of a run, by row."""

    def __init__(
        self,
        model: DiffusionModel,
        encoded: Conditioning,
        trained: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        autocast: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Bring the encodings to the device.

        Args:
            model: Its trained text encoders are on `device`.
            encoded: The cache's text: token ids, and the embeddings by the text encoders that are not trained.
            trained: Component names of those that are.
            device: Where training runs.
            dtype: Type of the embeddings.
            autocast: Precision in which the trained encoders compute.
        """
        self._model = model
        self._dtype = dtype
        self._autocast = autocast
        self._trained = list(trained)
        self._rows = {
            name: rows.to(device, dtype if rows.is_floating_point() else rows.dtype) for name, rows in encoded.items()
        }

    @property
    def trained(self) -> list[str]:
        """The text encoders that are still trained."""
        return list(self._trained)

    def rows(self, rows: Tensor) -> Conditioning:
        """The conditioning on the captions of these rows, (batch,) int64; gradients reach the trained encoders."""
        conditioning = {name: encoded[rows] for name, encoded in self._rows.items()}
        with self._autocast():
            for encoder in self._trained:
                conditioning |= self._model.encode_tokens(encoder, conditioning[token_ids_key(encoder)])
        return conditioning

    def freeze(self) -> None:
        """Encode all captions one last time; the text encoders leave the device and the model."""
        for encoder in self._trained:
            self._model.text_encoders[encoder].eval()
            with self._autocast():
                embeddings = encode_tokens_in_batches(self._model, encoder, self._rows[token_ids_key(encoder)])
            self._rows |= {name: rows.to(self._dtype) for name, rows in embeddings.items()}
        self._trained = []
        for network in self._model.text_encoders.values():
            to_device(network, torch.device("cpu"), next(network.parameters()).dtype)  # until it is saved
        self._model.text_encoders.clear()
