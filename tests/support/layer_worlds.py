"""Random adapter layers and how near two tensors must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def assert_close(actual: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal but for a share of the largest number."""
    expected = torch.as_tensor(expected).double()
    assert actual.dtype == torch.float32
    error = (actual.double().reshape(expected.shape) - expected).abs().max()
    assert error <= tolerance * expected.abs().max()


def randomise(network: nn.Module) -> None:
    """Give every parameter of an adapter random numbers; magnitudes stay near the weights' lengths."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * noise)
            elif any(part in name for part in ("lora_", "hada_", "lokr_")):
                parameter.copy_(0.3 * noise)


def leaves_out_the_scale(network: nn.Module) -> bool:
    """Whether this PEFT is one of those that multiply LoKr's factors without alpha / rank."""
    module = next(module for module in network.modules() if hasattr(module, "lokr_w1"))
    before = module.get_delta_weight("default")
    scaling = dict(module.scaling)
    module.scaling["default"] *= 2
    after = module.get_delta_weight("default")
    module.scaling.update(scaling)
    return torch.equal(before, after)
