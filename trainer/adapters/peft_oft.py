"""OFT and BOFT as PEFT layers that train the same tensors as in LyCORIS's files.

PEFT's own OFT and BOFT rotate a weight's inputs, W R. LyCORIS, kohya and ComfyUI rotate its outputs, R W. No rotation
of the outputs is equivalent, so what PEFT trains can't be saved in a file that they read.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: TID253  # imported when such an adapter is injected
from torch import Tensor, nn

from .layers.oft import butterfly_factors, rotation_delta, rotations_less_identity


class OftModule(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer or convolution whose outputs, without the bias, are rotated.

    That is the layer with the rows of its weight rotated, in whatever form it stores the weight.
    """

    adapter_layer_names = ("oft_blocks",)

    def __init__(self, base_layer: Any, adapter_name: str, shape: tuple[int, ...]) -> None:
        """Wrap a module; at first nothing is rotated.

        Args:
            base_layer: An `nn.Linear` or `nn.Conv2d`.
            adapter_name: PEFT's name of the adapter.
            shape: Of the blocks: (blocks, size, size), or of BOFT (factors, blocks, size, size).
        """
        super().__init__()
        device = base_layer.weight.device
        self.base_layer = base_layer
        self.oft_blocks = nn.ParameterDict({adapter_name: nn.Parameter(torch.zeros(shape, device=device))})
        self.scaling = {adapter_name: 1.0}
        self._active_adapter = adapter_name
        self._name = adapter_name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the wrapped module's outputs, rotated."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        axis = 1 if isinstance(self.base_layer, nn.Conv2d) else -1
        rows = result.movedim(axis, 0)
        if self.base_layer.bias is not None:
            rows = rows - self.base_layer.bias.reshape(-1, *[1] * (rows.ndim - 1))
        rotations = self.scaling[self._name] * rotations_less_identity(self.oft_blocks[self._name])
        delta = rotation_delta(rotations.to(rows.dtype), rows)
        return result + delta.movedim(0, axis)


def inject_oft(network: nn.Module, adapter_name: str, targets: str, size: int, *, butterfly: bool) -> None:
    """Put a layer around every module that a regular expression matches.

    Args:
        network: The network with the modules.
        adapter_name: PEFT's name of the adapter.
        targets: Matches the modules' whole paths.
        size: Of a block; divides the modules' outputs.
        butterfly: Whether it is a BOFT.
    """
    matching = [path for path, _ in network.named_modules() if re.fullmatch(targets, path)]
    for path in matching:
        parent_path, _, name = path.rpartition(".")
        module: Any = network.get_submodule(path)
        outputs = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
        shape: tuple[int, ...] = (outputs // size, size, size)
        if butterfly:
            shape = (butterfly_factors(outputs, size), *shape)
        setattr(network.get_submodule(parent_path), name, OftModule(module, adapter_name, shape))
