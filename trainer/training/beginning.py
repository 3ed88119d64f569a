"""What is trained, as it was before the first step: the base's previews come once the first steps have run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..models.families.base import Conditioning, DiffusionModel
from .text_conditioning import TextConditioning
from .trainable import evaluating


class Beginning:
    """Copies of the trained parameters, on the CPU, and of what trained text encoders made of the previews' prompts."""

    def __init__(
        self, model: DiffusionModel, parameters: Sequence[nn.Parameter], text: TextConditioning, rows: Sequence[int]
    ) -> None:
        """Copy everything, before the first step or before a checkpoint is loaded.

        Args:
            model: Whose text encoders are trained.
            parameters: All trained parameters.
            text: The run's text.
            rows: Of the previews' prompts in it.
        """
        self._parameters = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters]
        self._held: list[Tensor] | None = None  # what the parameters held, while they hold the copies
        self._text = text
        self._encoded: dict[int, Conditioning] = {}
        if text.trained:
            with torch.no_grad(), evaluating(model):
                self._encoded = {row: text.rows(torch.tensor([row])) for row in rows}

    def rows(self, rows: Tensor) -> Conditioning:
        """The conditioning on one of the previews' prompts as it was; see `TextConditioning.rows`."""
        [row] = rows.tolist()
        return self._encoded[row] if self._encoded else self._text.rows(rows)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The parameters hold the copies inside the block, and afterwards what they held, bit for bit."""
        self._held = [parameter.detach().clone() for parameter, _ in self._parameters]
        try:
            with torch.no_grad():
                for parameter, copy in self._parameters:
                    parameter.copy_(copy)
            yield
        finally:
            self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the parameters what they held before `restored`, also where an interrupt came while that was done."""
        if self._held is None:
            return
        for (parameter, _), values in zip(self._parameters, self._held, strict=True):
            parameter.copy_(values)
        self._held = None
