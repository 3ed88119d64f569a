"""The layers that OFT and BOFT are trained as, against the weights that their files make."""

from __future__ import annotations

import pytest
import torch
from pack.trainer.adapters.layers import make_layer
from pack.trainer.adapters.peft_oft import OftModule, inject_oft
from torch import Tensor, nn

MODULES = {
    "linear": (lambda: nn.Linear(6, 16), (2, 5, 6)),
    "without a bias": (lambda: nn.Linear(6, 16, bias=False), (3, 6)),
    "convolution": (lambda: nn.Conv2d(3, 16, 3, stride=2, padding=1), (2, 3, 7, 5)),
}


def injected(kind: str, *, butterfly: bool) -> tuple[nn.Module, OftModule, Tensor]:
    """A module of random numbers, the layer around it, and inputs for them."""
    torch.manual_seed(0)
    make, inputs = MODULES[kind]
    plain = make()
    parent = nn.ModuleDict({"chosen": plain, "other": nn.Linear(4, 4)})
    inject_oft(parent, "subject", "chosen", 4, butterfly=butterfly)
    assert isinstance(parent["other"], nn.Linear)
    return plain, parent["chosen"], torch.randn(inputs)


@pytest.mark.parametrize("butterfly", [False, True], ids=["OFT", "BOFT"])
@pytest.mark.parametrize("kind", MODULES)
def test_it_computes_what_the_turned_weight_computes(kind: str, butterfly: bool) -> None:
    """The bias stays where it is; at first nothing changes, to the bit, and neither while the adapter is off."""
    plain, layer, x = injected(kind, butterfly=butterfly)
    before = plain(x).detach()
    assert torch.equal(layer(x), before)
    blocks = layer.oft_blocks["subject"]
    assert blocks.shape == ((3, 4, 4, 4) if butterfly else (4, 4, 4))
    nn.init.normal_(blocks)
    after = layer(x).detach()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), before)
    layer.enable_adapters(True)
    assert torch.equal(layer(x), after)
    with torch.no_grad():
        plain.weight += make_layer("m", {"oft_blocks": blocks.detach()}, 0.0).delta(plain.weight)
    torch.testing.assert_close(after, plain(x).detach())
    assert (after - before).norm() > 0.5 * before.norm()


@pytest.mark.parametrize("butterfly", [False, True], ids=["OFT", "BOFT"])
def test_it_learns_in_float32_beside_outputs_of_half_precision(butterfly: bool) -> None:
    plain, layer, x = injected("linear", butterfly=butterfly)
    plain.to(torch.bfloat16)
    result = layer(x.to(torch.bfloat16))
    assert result.dtype == torch.bfloat16
    result.float().square().sum().backward()
    gradient = layer.oft_blocks["subject"].grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
