"""How PEFT holds each kind of adapter: its configuration, and its parameters under the names of the file.

A kind is one entry of `PEFT_METHODS`; nothing else in the engine knows them apart while training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PEFT_NAME = "subject"
DORA_SCALE = "dora_scale"


@dataclass(frozen=True)
class AdapterConfig:
    """What a configuration of PEFT is made from.

    Attributes:
        targets: Regular expression that matches the modules' whole paths.
        rank: Rank of all of them.
        dropout: Share of the inputs that is dropped; LoRA and DoRA only.
        factor: LoKr's smaller factor; -1: as even as possible.
    """

    targets: str
    rank: int
    dropout: float = 0.0
    factor: int = -1


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        title: Its name in `Layer.kind`.
        config: PEFT's configuration.
        parts: A module that PEFT made → parameters under the names that follow the module's in a file.
        starts_at_zero: The parts that start at zero, so that the model predicts at first as without an adapter.
        norm: Parts → Frobenius norm of the unscaled change, 0-D.
    """

    title: str
    config: Callable[[AdapterConfig], Any]
    parts: Callable[[Any], dict[str, nn.Parameter]]
    starts_at_zero: frozenset[str]
    norm: Callable[[Mapping[str, Tensor]], Tensor]


def _lora_config(shape: AdapterConfig, *, dora: bool = False) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=shape.rank, lora_alpha=shape.rank, target_modules=shape.targets, lora_dropout=shape.dropout, use_dora=dora
    )


def _lora_parts(module: Any) -> dict[str, nn.Parameter]:
    down, up = module.lora_A[PEFT_NAME].weight, module.lora_B[PEFT_NAME].weight
    parts = {"lora_down.weight": down, "lora_up.weight": up}
    if PEFT_NAME in module.lora_magnitude_vector:
        parts[DORA_SCALE] = module.lora_magnitude_vector[PEFT_NAME].weight
    return parts


def _lora_norm(parts: Mapping[str, Tensor]) -> Tensor:
    """‖up · down‖ from the two Gram matrices, without the product."""
    down, up = parts["lora_down.weight"].flatten(1), parts["lora_up.weight"].flatten(1)
    squared: Tensor = ((up.T @ up) * (down @ down.T)).sum()
    return squared.clamp(min=0).sqrt()


def _loha_config(shape: AdapterConfig) -> Any:
    from peft import LoHaConfig

    return LoHaConfig(r=shape.rank, alpha=shape.rank, target_modules=shape.targets)


def _lokr_config(shape: AdapterConfig) -> Any:
    from peft import LoKrConfig

    return LoKrConfig(r=shape.rank, alpha=shape.rank, target_modules=shape.targets, decompose_factor=shape.factor)


def _lycoris_parts(module: Any) -> dict[str, nn.Parameter]:
    """PEFT's names are LyCORIS's."""
    held = {name: getattr(module, name) for name in module.adapter_layer_names}
    return {name: entries[PEFT_NAME] for name, entries in held.items() if PEFT_NAME in entries}


def _loha_norm(parts: Mapping[str, Tensor]) -> Tensor:
    change = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    norm: Tensor = torch.linalg.vector_norm(change)
    return norm


def _lokr_norm(parts: Mapping[str, Tensor]) -> Tensor:
    """A Kronecker product's norm is the product of the norms."""
    norms: list[Tensor] = [
        torch.linalg.vector_norm(parts[side] if side in parts else parts[f"{side}_a"] @ parts[f"{side}_b"])
        for side in ("lokr_w1", "lokr_w2")
    ]
    return norms[0] * norms[1]


_UP = frozenset({"lora_up.weight"})
PEFT_METHODS: Mapping[str, Kind] = {
    "lora": Kind("LoRA", _lora_config, _lora_parts, _UP, _lora_norm),
    "dora": Kind("DoRA", lambda shape: _lora_config(shape, dora=True), _lora_parts, _UP, _lora_norm),
    "loha": Kind("LoHa", _loha_config, _lycoris_parts, frozenset({"hada_w2_b"}), _loha_norm),
    "lokr": Kind("LoKr", _lokr_config, _lycoris_parts, frozenset({"lokr_w1", "lokr_w1_a"}), _lokr_norm),
}


def start_of(kind: Kind, part: str, shape: torch.Size, module: nn.Module, generator: torch.Generator) -> Tensor:
    """Where a part's training begins, float32 on the CPU.

    Zero, or uniform within ±1/√fan_in as PEFT does (Kaiming with a = √5), or for DoRA's magnitudes the lengths of the
    rows of the module's weight.
    """
    if part == DORA_SCALE:
        weight: Any = module.weight
        lengths: Tensor = torch.linalg.vector_norm(weight.detach().float().flatten(1), dim=1)
        return lengths.cpu().reshape(shape)
    if part in kind.starts_at_zero:
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1:].numel())
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
