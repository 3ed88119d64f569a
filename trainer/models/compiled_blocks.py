"""The blocks of a network compiled (`torch.compile`), once per class; falls back to eager if that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core.devices import is_out_of_memory
from .blocks import blocks_of, innermost

logger = logging.getLogger("dreambooth_lora")

_RECOMPILATIONS = 64  # of one class: for its sizes, for what is trained in it, for shapes of pictures


def compilable_blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a diffusers network: identical, so they are compiled once for all.

    The residual blocks of a UNet differ in their sizes, and their convolutions gain little.
    """
    return [block for block in blocks_of(network) if type(block).__name__ != "ResnetBlock2D"]


def can_compile(device: torch.device) -> bool:
    """Whether compiling is possible: it needs Triton on CUDA, a C++ compiler on the CPU."""
    try:
        if device.type == "cuda":
            from torch.utils._triton import has_triton

            return bool(has_triton())
        if device.type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            return bool(get_cpp_compiler())
    except (ImportError, RuntimeError, OSError):  # an older PyTorch, or no compiler
        return False
    return False


class CompiledBlocks:
    """A network's blocks, compiled when they first compute; a failure never ends the run.

    Attributes:
        trouble: Why they are not compiled; "" while they are.
    """

    def __init__(self, network: nn.Module) -> None:
        """Have the blocks compiled, inside of what makes activations again or swaps them.

        Args:
            network: Of diffusers, with what is trained in it.
        """
        import torch._dynamo

        self.trouble = ""
        config: Any = torch._dynamo.config
        self._limit_name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
        self._limit = getattr(config, self._limit_name)
        setattr(config, self._limit_name, max(self._limit, _RECOMPILATIONS))
        self._blocks = compilable_blocks(network)
        for block in self._blocks:
            forward, replace = innermost(block)
            replace(_Compiled(self, forward))

    def give_up(self, error: Exception) -> None:
        """Go back to eager computation; raises the error again if it is of another kind."""
        if self.trouble or is_out_of_memory(error):
            raise error
        first_paragraph = " ".join(str(error).partition("\n\n")[0].split())
        self.trouble = f"{type(error).__name__}: {first_paragraph}"
        logger.warning("Compilation failed; training continues without it. %s", self.trouble)

    @property
    def graphs(self) -> int:
        """The number of graphs that PyTorch has compiled in this process."""
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def close(self) -> None:
        """Release the blocks, so that PyTorch drops what was compiled."""
        import torch._dynamo

        setattr(torch._dynamo.config, self._limit_name, self._limit)
        for block in self._blocks:
            forward, replace = innermost(block)
            if isinstance(forward, _Compiled):
                replace(forward.plain)
        self._blocks = []


class _Compiled:
    """A block's forward pass, compiled."""

    def __init__(self, blocks: CompiledBlocks, forward: Callable[..., Any]) -> None:
        """Take the block's own forward pass."""
        from torch._dynamo.exc import TorchDynamoException

        self.plain = forward
        self._blocks = blocks
        self._failure = TorchDynamoException  # also of its backends; errors of other kinds pass through by intention
        self._compiled = torch.compile(forward)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Compute."""
        if self._blocks.trouble:
            return self.plain(*args, **keywords)
        try:
            return self._compiled(*args, **keywords)
        except self._failure as error:
            self._blocks.give_up(error)
            return self.plain(*args, **keywords)
