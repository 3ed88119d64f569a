"""A weight delta as it is, without a factorisation: "full" in LyCORIS, `diff` in ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import LayerTensors

SUFFIXES = ("diff",)


@dataclass(frozen=True)
class FullLayer:
    """The delta itself.

    Attributes:
        diff: (out, in) or (out, in, k, k).
        alpha: 1; not written to files.
    """

    diff: Tensor
    alpha: float = 1.0

    @property
    def rank(self) -> int:
        """Highest rank that a matrix of this size has."""
        return min(self.diff.shape[0], self.diff[0].numel())

    @property
    def kind(self) -> str:
        """Its name."""
        return "full difference"

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return tuple(self.diff.shape)

    @property
    def needs_weight(self) -> bool:
        """Never."""
        return False

    def tensors(self) -> dict[str, Tensor]:
        """The tensor under LyCORIS's name."""
        return {"diff": self.diff}

    def factors(self) -> None:
        """See `Layer.factors`; nothing is known of its rank."""

    @torch.no_grad()
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """See `Layer.delta`."""
        return self.diff.float()


def make_full(tensors: LayerTensors, alpha: float | None) -> FullLayer:
    """A full difference; see `make_layer`. It has no alpha."""
    return FullLayer(tensors.require("diff"))
