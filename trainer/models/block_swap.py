"""Block swapping: frozen weights of blocks are kept in system memory and copied to the device when needed.

So a GPU can train a model that is larger than its memory. Weights are copied in one direction only, since they do not
change: into one of three slots on the device, two blocks ahead of the one that computes, in both passes.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import blocks_of
from .nf4 import Nf4Linear
from .stored_weights import StoredLinear

logger = logging.getLogger("dreambooth_lora")

PLACES = 3
"""Blocks that are on the device at once: the one that computes, and two that are on their way."""
_ALIGNMENT = 256  # bytes, at which kernels like a tensor to begin


@dataclass(frozen=True)
class _Tensors:
    """Frozen tensors of a block that are exchanged together.

    Attributes:
        read: What they are now.
        replace: Puts others in their places.
    """

    read: Callable[[], Sequence[Tensor]]
    replace: Callable[[Sequence[Tensor]], None]


def swapped_blocks(network: nn.Module, count: int) -> list[nn.Module]:
    """That many of a network's blocks, evenly spaced, so that a block can be copied while others compute."""
    blocks = blocks_of(network) if count else []
    count = min(count, len(blocks))
    return [blocks[number * len(blocks) // count] for number in range(count)]


@contextlib.contextmanager
def set_aside(network: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Remove these blocks from the network inside the context, so that it can be moved without them."""
    aside = {id(block) for block in blocks}
    places = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if id(child) in aside
    ]
    for parent, name, _ in places:
        setattr(parent, name, nn.Identity())
    try:
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def swapped_bytes(blocks: Sequence[nn.Module]) -> int:
    """The device memory, in bytes, that swapping these blocks saves."""
    sizes = [
        sum(_rounded(tensor.nbytes) for each in _frozen_tensors(block) for tensor in each.read()) for block in blocks
    ]
    return max(0, sum(sizes) - PLACES * max(sizes, default=0))


def _frozen_tensors(block: nn.Module) -> list[_Tensors]:
    """All of a block's frozen weights, where each is kept."""

    def of_parameter(parameter: nn.Parameter) -> _Tensors:
        def replace(tensors: Sequence[Tensor]) -> None:
            parameter.data = tensors[0]

        return _Tensors(lambda: [parameter.data], replace)

    found = [of_parameter(parameter) for parameter in block.parameters() if not parameter.requires_grad]
    layers = [module for module in block.modules() if isinstance(module, StoredLinear | Nf4Linear)]
    return found + [_Tensors(layer.held, layer.hold) for layer in layers]


@dataclass(eq=False)
class _Visitor:
    """A block that comes and goes.

    Attributes:
        tensors: Its frozen tensors.
        home: All of them, one behind the other, in page-locked memory where there is some: (bytes,), uint8.
        at_home: Views of `home`, for each entry of `tensors`.
        place: Index of the place on the device where it is or will be; None: it is at home.
        away: Index of a place → the same views of its memory; made once, since that takes longer than using them.
    """

    tensors: Sequence[_Tensors]
    home: Tensor
    at_home: Sequence[Sequence[Tensor]]
    place: int | None = None
    away: dict[int, Sequence[Sequence[Tensor]]] = field(default_factory=dict)

    def show(self, place: int, flat: Tensor) -> None:
        """Let the block's layers find their weights in the memory `flat` of a place, laid out as `home`."""
        if place not in self.away:
            self.away[place] = [[_view(flat, view) for view in views] for views in self.at_home]
        self._read(self.away[place])

    def leave(self) -> None:
        """Let the block's layers find their weights at home again."""
        self.place = None
        self._read(self.at_home)

    def _read(self, views: Sequence[Sequence[Tensor]]) -> None:
        for tensors, replacements in zip(self.tensors, views, strict=True):
            tensors.replace(replacements)


@dataclass
class _Place:
    """Memory of the device for one block.

    Attributes:
        memory: (bytes,), uint8.
        arrived: Happens when the block is there.
        left: Happens when what computed with the block before has ended.
        visitor: Whose block it is.
    """

    memory: Tensor
    arrived: Any = None
    left: Any = None
    visitor: _Visitor | None = field(default=None, repr=False)


class BlockSwap:
    """Swaps blocks between system memory and a device; see `BlockSwap.fetch`.

    Blocks must recompute their activations in the backward pass, or autograd would keep the weights. A block's weights
    stay at least until the next one computes: autograd runs the operations of a backward pass in the reverse order of
    the forward pass, so all of a block's are done when the block before it recomputes.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Take the blocks' frozen weights to the computer's memory.

        Args:
            blocks: Of a network whose other tensors, and what is trained in these, are on the device.
            device: Where they compute.
        """
        self._device = device
        self._visitors = {id(block): _packed(block) for block in blocks}
        size = max(visitor.home.numel() for visitor in self._visitors.values())
        self._places = [_Place(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(PLACES)]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._order: list[_Visitor] = []  # in which they compute, as the first forward pass shows
        self._current: _Visitor | None = None
        for block in blocks:
            for module in block.modules():
                if isinstance(module, Nf4Linear):
                    module.move_scales(device)
                elif not isinstance(module, StoredLinear):
                    for name, buffer in module.named_buffers(recurse=False):
                        setattr(module, name, buffer.to(device))
            block.forward = _Visiting(self, self._visitors[id(block)], block.forward)

    def fetch(self, visitor: _Visitor) -> None:
        """Copy a block to the device before it computes, and start copying the next two."""
        computing = torch.cuda.current_stream(self._device)
        before, self._current = self._current, visitor
        if before is not None and before is not visitor and before.place is not None:
            self._places[before.place].left = computing.record_event()
        wanted = [visitor, *self._following(visitor, before)]
        for each in wanted:
            if each.place is None:
                self._bring(each, kept=wanted)
        assert visitor.place is not None
        place = self._places[visitor.place]
        computing.wait_event(place.arrived)
        visitor.show(visitor.place, place.memory)

    def _following(self, visitor: _Visitor, before: _Visitor | None) -> list[_Visitor]:
        """The two blocks that probably compute after this one.

        In a forward pass these are the next of the order. A backward pass begins with the block with which the forward
        pass ended, and goes the other way.
        """
        if visitor not in self._order:
            self._order.append(visitor)
            return []
        at = self._order.index(visitor)
        if at == 0 or before is None or at > self._order.index(before):
            return self._order[at + 1 : at + PLACES]
        return self._order[max(0, at - PLACES + 1) : at][::-1]

    def _bring(self, visitor: _Visitor, kept: Sequence[_Visitor]) -> None:
        index = next(
            number for number, place in enumerate(self._places) if place.visitor is None or place.visitor not in kept
        )
        place = self._places[index]
        if place.visitor is not None:
            place.visitor.leave()
        place.visitor = visitor
        visitor.place = index
        with torch.cuda.stream(self._stream):
            if place.left is not None:
                self._stream.wait_event(place.left)
            place.memory[: visitor.home.numel()].copy_(visitor.home, non_blocking=True)
            place.arrived = self._stream.record_event()


class _Visiting:
    """The forward pass of a block that is fetched first."""

    def __init__(self, swap: BlockSwap, visitor: _Visitor, forward: Callable[..., Any]) -> None:
        """Take the block's own forward pass."""
        self._swap = swap
        self._visitor = visitor
        self.forward = forward

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Fetch and compute."""
        self._swap.fetch(self._visitor)
        return self.forward(*args, **keywords)


def _packed(block: nn.Module) -> _Visitor:
    """A block whose frozen tensors are copied into one piece of memory."""
    tensors = _frozen_tensors(block)
    now = [list(each.read()) for each in tensors]
    size = sum(_rounded(tensor.nbytes) for each in now for tensor in each)
    home = _page_locked(size)
    views: list[list[Tensor]] = []
    offset = 0
    for each in now:
        views.append([])
        for tensor in each:
            view = _placed(home, offset, tensor)
            view.copy_(tensor)
            views[-1].append(view)
            offset += _rounded(tensor.nbytes)
    visitor = _Visitor(tensors, home, views)
    visitor.leave()
    return visitor


def _page_locked(size: int) -> Tensor:
    """Memory of the computer of so many bytes, from which a GPU copies while the program goes on."""
    memory = torch.empty(size, dtype=torch.uint8)
    try:
        return memory.pin_memory()
    except RuntimeError as error:  # the system allows no more of it
        logger.warning(
            "Can't allocate pinned memory, so blocks are swapped from pageable memory, which is slower: %s", error
        )
        return memory


def _rounded(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _placed(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """Room in `flat` for a tensor, laid out as `to_device` lays out a copy."""
    part = flat[offset : offset + like.nbytes].view(like.dtype)
    layout = torch.channels_last if like.ndim == 4 else torch.contiguous_format
    return part.as_strided(like.shape, torch.empty(like.shape, device="meta", memory_format=layout).stride())


def _view(flat: Tensor, at_home: Tensor) -> Tensor:
    """The same part of another memory."""
    start = at_home.storage_offset() * at_home.element_size()
    return flat[start : start + at_home.nbytes].view(at_home.dtype).as_strided(at_home.shape, at_home.stride())
