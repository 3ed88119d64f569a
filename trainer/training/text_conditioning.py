"""The text conditioning of a run: captions encoded once by the frozen text encoders, and in every step by the others.

Those are trained themselves, or read the vectors of a word that is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ..core.devices import sent, to_device
from ..data.latent_cache import encode_tokens_in_batches
from ..models.families.base import Conditioning, DiffusionModel, token_ids_key

_FOR_THE_PROGRAM = ("lengths",)  # numbers that decide about shapes; on the CPU, where reading them takes no waiting


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
        base: Conditioning | None = None,
    ) -> None:
        """Bring the encodings to the device.

        Args:
            model: Its text encoders that run in every step are on `device`.
            encoded: The cache's text: token ids, and the embeddings by the other text encoders.
            trained: Component names of those that run in every step.
            device: Where training runs.
            dtype: Type of the embeddings.
            autocast: Precision in which these compute.
            base: The embeddings by these as they were before the training; None: those are not needed.
        """
        self._model = model
        self._device = device
        self._dtype = dtype
        self._autocast = autocast
        self._trained = list(trained)
        self._rows = {
            name: rows if name in _FOR_THE_PROGRAM else rows.to(device, dtype if rows.is_floating_point() else None)
            for name, rows in encoded.items()
        }
        self._base_rows = {name: rows.to(device, dtype) for name, rows in (base or {}).items()}

    @property
    def trained(self) -> list[str]:
        """The text encoders that still run in every step."""
        return list(self._trained)

    def rows(self, rows: Tensor) -> Conditioning:
        """The conditioning on the captions of these rows; gradients reach the trained encoders.

        Args:
            rows: (batch,), int64, on the CPU.
        """
        conditioning = self._chosen(self._rows, rows)
        with self._autocast():
            for encoder in self._trained:
                conditioning |= self._model.encode_tokens(encoder, conditioning[token_ids_key(encoder)])
        return conditioning

    def base_rows(self, rows: Tensor) -> Conditioning:
        """The conditioning on the captions of these rows by the text encoders as they were before training."""
        return self._chosen(self._rows | self._base_rows, rows)

    def _chosen(self, encoded: Conditioning, rows: Tensor) -> Conditioning:
        sent_rows = sent(rows, self._device)
        return {name: tensor[rows if name in _FOR_THE_PROGRAM else sent_rows] for name, tensor in encoded.items()}

    def freeze(self, encoders: Collection[str] | None = None) -> None:
        """Encode all captions one last time with these text encoders, all by default, and remove them."""
        leaving = [encoder for encoder in self._trained if encoders is None or encoder in encoders]
        for encoder in leaving:
            network = self._model.text_encoders[encoder]
            network.eval()
            with self._autocast():
                ids = self._rows[token_ids_key(encoder)]
                embeddings = encode_tokens_in_batches(self._model, encoder, ids, ids.device)
            self._rows |= {name: rows.to(self._dtype) for name, rows in embeddings.items()}
            to_device(network, torch.device("cpu"), next(network.parameters()).dtype)  # until it is saved
            del self._model.text_encoders[encoder]
            self._trained.remove(encoder)
