"""LoRA out of changed weights: the nearest change of a given rank, module by module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .changes import nearest_lora
from .families.base import BaseWeights
from .kohya import Adapter
from .modules import adaptable_modules
from .selection import Target


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
