"""LoRA out of changed weights: the nearest change of a given rank, module by module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .families.base import BaseWeights
from .kohya import Adapter
from .layers import LoraLayer
from .modules import adaptable_modules
from .randomness import seeded
from .selection import Target

_EXACT = 768  # up to this size of a matrix's smaller side its whole decomposition is computed
_EXTRA, _ITERATIONS = 16, 6


def nearest_lora(change: Tensor, rank: int) -> LoraLayer:
    """The LoRA of at most that rank whose product is nearest to a change of a weight (Eckart & Young 1936).

    Large matrices are decomposed by a randomised algorithm (Halko et al. 2011), always with the same random numbers.

    Args:
        change: (out, in) or (out, in, k, k).
        rank: Highest rank.

    Returns:
        Both factors float32, the singular values shared evenly; alpha equal to the rank.
    """
    matrix = change.float().flatten(1)
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= _EXACT or rank + _EXTRA >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with seeded(matrix.device, "nearest lora"):
            left, values, turned = torch.svd_lowrank(matrix, q=rank + _EXTRA, niter=_ITERATIONS)
        right = turned.T
    root = values[:rank].sqrt()
    down = (root[:, None] * right[:rank]).reshape(rank, *change.shape[1:])
    up = (left[:, :rank] * root).reshape(change.shape[0], rank, *[1] * (change.ndim - 2))
    return LoraLayer(down.contiguous(), up.contiguous(), float(rank))


def extract_lora(
    base: BaseWeights, changed: Mapping[str, Tensor], targets: list[Target], metadata: Mapping[str, str]
) -> Adapter:
    """What fine-tuning changed in the weights of Linear layers and convolutions, as a LoRA.

    Args:
        base: The base model.
        changed: "<component>.<parameter>" → tuned tensor.
        targets: The modules to extract, with their ranks.
        metadata: Of the adapter.
    """
    modules = adaptable_modules(base.family.build(base))
    tuned = {name.replace(".text_model.", "."): tensor for name, tensor in changed.items()}
    layers = {}
    for target in targets:
        name = f"{target.component}.{target.path}.weight".replace(".text_model.", ".")
        weight = modules[target.component][target.path].weight
        layers[target.name] = nearest_lora(tuned[name].float() - weight.float().cpu(), target.rank)
    return Adapter(layers, metadata)
