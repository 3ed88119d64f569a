"""The repeated blocks of a network, and gradient checkpointing: whether each keeps or recomputes its activations.

Almost all of a denoiser's computation and memory is in identical blocks. These choices do not change what they
compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Classes of diffusers and transformers name those that must not be split over devices; these are always among them.
_ALWAYS = frozenset({"ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer"})


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The smallest repeated blocks of a network of diffusers or transformers, in the order of its definition.

    Those of a UNet are its residual blocks and the transformer blocks of its attention, those of a transformer its
    layers.
    """
    names = _ALWAYS | {
        name for module in network.modules() for name in getattr(module, "_no_split_modules", None) or ()
    }
    found = [
        child
        for module in network.modules()
        if isinstance(module, nn.ModuleList)
        for child in module
        if type(child).__name__ in names
    ]
    kept = {id(block) for block in found}
    return [block for block in found if not any(id(inner) in kept for inner in block.modules() if inner is not block)]


def innermost(block: nn.Module) -> tuple[Callable[..., Any], Callable[[Callable[..., Any]], None]]:
    """A block's own forward pass, inside of all that was put around it, and what replaces it there.

    A wrapper of a forward pass has it as its attribute `forward`.
    """
    owner: Any = block
    while hasattr(owner.forward, "forward"):
        owner = owner.forward
    return owner.forward, lambda forward: setattr(owner, "forward", forward)


class _Recomputed:
    """A block's forward pass whose activations are not kept, but made again in the backward pass (Chen et al. 2016)."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        """Take the block's own forward pass."""
        self.forward = forward

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Compute; keep nothing of it for gradients."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **keywords)
        return checkpoint(self.forward, *args, use_reentrant=False, **keywords)


def enable_gradient_checkpointing(network: nn.Module, interval: int = 1) -> None:
    """Make every `interval`-th block of a network recompute its activations instead of keeping them.

    The libraries' own switches are all-or-nothing, and differ between versions.

    Args:
        network: Of diffusers or of transformers.
        interval: 1: every block; 2: every second one, which takes more memory and less time.
    """
    disable_gradient_checkpointing(network)
    for block in blocks_of(network)[::interval]:
        block.forward = _Recomputed(block.forward)


def disable_gradient_checkpointing(network: nn.Module) -> None:
    """Make every block of a network keep its activations for the backward pass."""
    for block in network.modules():
        own = vars(block).get("forward")
        if isinstance(own, _Recomputed):
            block.forward = own.forward
