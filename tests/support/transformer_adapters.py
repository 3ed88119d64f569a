"""Adapters of the transformers of flow-matching models: random ones for every layer, and names of several programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from pack.trainer.adapters.apply import apply_to_base
from pack.trainer.adapters.kohya import Adapter, parse_adapter, read_adapter
from pack.trainer.adapters.names import named_weights
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from torch import Tensor, nn

KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


def linears(model: DiffusionModel) -> dict[str, nn.Linear]:
    """Path in the denoiser → Linear."""
    return {path: module for path, module in model.denoiser.named_modules() if isinstance(module, nn.Linear)}


def lora(outputs: int, inputs: int, seed: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    """The two factors of a LoRA, the inner one first."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn((rank, inputs), generator=source), torch.randn((outputs, rank), generator=source)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def underscored(prefix: str) -> Callable[[str], str]:
    """Names of modules as kohya makes them of paths."""
    return lambda path: prefix + path.replace(".", "_")


def dotted(prefix: str) -> Callable[[str], str]:
    """Names of modules that are paths behind a prefix."""
    return lambda path: prefix + path


def random_adapter(model: DiffusionModel, kind: str = "LoRA") -> Adapter:
    """For all modules of the denoiser; alpha is no rank, and what it adds is a tenth of the weights."""
    tensors: dict[str, Tensor] = {}
    for number, (name, weight) in enumerate(named_weights(model).items()):
        if name.startswith("lora_unet_"):
            down, up = lora(*weight.shape, number)
            up *= 0.1 * float(weight.std())
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
            if kind == "DoRA":
                tensors[f"{name}.dora_scale"] = 1.1 * weight.norm(dim=1, keepdim=True)
    return parse_adapter(tensors)


def with_file(base: BaseWeights, path: Path) -> DiffusionModel:
    """The model with an adapter file."""
    applied = apply_to_base(base, [(read_adapter(path), 1.0)])
    return applied.family.build(applied)
