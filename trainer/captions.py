"""What the denoiser is told of each caption: encoded once by frozen text encoders, in every step by trained ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cache import encode_in_batches
from .devices import place
from .families.base import Conditioning, DiffusionModel


class Captions:
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
            encoded: The cache's text: tokens, and the encodings of the text encoders that are not trained.
            trained: Component names of those that are.
            device: Where training runs.
            dtype: Type of the encodings.
            autocast: Precision in which the trained encoders compute.
        """
        self._model, self._dtype, self._autocast = model, dtype, autocast
        self._trained = list(trained)
        self._rows = {
            name: rows.to(device, dtype if rows.is_floating_point() else rows.dtype) for name, rows in encoded.items()
        }

    @property
    def trained(self) -> list[str]:
        """The text encoders that are still trained."""
        return list(self._trained)

    def conditioning(self, rows: Tensor) -> Conditioning:
        """The captions of these rows, (batch,) int64, one row each; gradients reach the trained encoders."""
        found = {name: encoded[rows] for name, encoded in self._rows.items()}
        with self._autocast():
            for encoder in self._trained:
                found |= self._model.encode_tokens(encoder, found[_ids(encoder)])
        return found

    def freeze(self) -> None:
        """Encode all captions one last time; the text encoders leave."""
        for encoder in self._trained:
            self._model.text_encoders[encoder].eval()
            with self._autocast():
                encoded = encode_in_batches(self._model, encoder, self._rows[_ids(encoder)])
            self._rows |= {name: rows.to(self._dtype) for name, rows in encoded.items()}
        self._trained = []
        for network in self._model.text_encoders.values():
            place(network, torch.device("cpu"), next(network.parameters()).dtype)  # until it is saved
        self._model.text_encoders.clear()


def _ids(encoder: str) -> str:
    return f"ids{encoder.removeprefix('text_encoder')}"
