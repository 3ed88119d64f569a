"""The peak memory of a computation, measured without using it: by counting the live tensors on the meta device.

A network on the meta device runs forward and backward with shapes alone. `LiveBytes` counts the storages that are
alive; `CudaEmulation` makes the computation the one that a CUDA device does, with autocast and a fused kernel for
attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# torch's lists of operations under CUDA's autocast, as far as networks here use them:
# https://pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float16
_AUTOCAST_TO_LOWER = {
    F.linear,
    torch.conv1d,
    torch.conv2d,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    Tensor.mm,
    torch.bmm,
    Tensor.bmm,
    torch.baddbmm,
    torch.addmm,
    torch.einsum,
}
_AUTOCAST_TO_FLOAT32 = {
    F.layer_norm,
    F.group_norm,
    F.softmax,
    torch.softmax,
    Tensor.softmax,
    F.mse_loss,
    torch.pow,
    Tensor.pow,
    Tensor.__pow__,
    torch.exp,
    Tensor.exp,
    torch.norm,
    Tensor.norm,
}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations inside the `with` block allocate, while they are alive.

    Attributes:
        current: Bytes that are alive now.
        peak: The most that were alive at once.
    """

    def __init__(
        self,
        device: str = "meta",
        exclude: Iterable[Tensor] = (),
        block_size: int = 1,
        result_cache: dict[Hashable, Any] | None = None,
    ) -> None:
        """Start at zero.

        Args:
            device: Type of the device whose tensors count.
            exclude: Tensors that are counted elsewhere, such as weights.
            block_size: Every storage is rounded up to a multiple of this, in bytes; CUDA's allocator has 512.
            result_cache: The shapes of operations' results on the meta device, by the shapes of their arguments; to be
                kept from one measurement to the next, since networks repeat themselves, and computing a shape takes
                long.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._device = device
        self._block_size = block_size
        self._result_cache: dict[Hashable, Any] = {} if result_cache is None else result_cache
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._excluded = [tensor.untyped_storage() for tensor in exclude]  # kept alive, so that no id is used again
        self._excluded_ids = {storage._cdata for storage in self._excluded}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it allocated."""
        result = self._result(func, tuple(args), dict(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device:
                self._count(leaf.untyped_storage())
        return result

    def _result(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's result; from the cache, if it is on meta and consists of new tensors only."""
        key = _cache_key(func, args, kwargs) if self._device == "meta" and _makes_new_tensors(func) else None
        if key in self._result_cache:
            return tree_map(_empty_from_layout, self._result_cache[key])
        result = func(*args, **kwargs)
        if key is not None and _is_new(result, [*args, *kwargs.values()]):
            self._result_cache[key] = tree_map(_layout_of, result)
        return result

    def _count(self, storage: Any) -> None:
        """Count a storage until it is freed, unless it is counted already or excluded."""
        storage_id = storage._cdata
        if storage_id in self._alive or storage_id in self._excluded_ids:
            return
        blocks = -(-storage.nbytes() // self._block_size)
        size = blocks * self._block_size

        def on_freed(_: object) -> None:
            if self._alive.pop(storage_id, None) is not None:
                self.current -= size

        self._alive[storage_id] = weakref.ref(storage, on_freed)
        self.current += size
        self.peak = max(self.peak, self.current)


class CudaEmulation(TorchFunctionMode):
    """Makes operations inside the `with` block save the tensors that they would save on a CUDA device."""

    def __init__(self, autocast: torch.dtype | None) -> None:
        """Emulate a device.

        Args:
            autocast: The type to which autocast would convert; None without autocast.
        """
        super().__init__()
        self._autocast = autocast

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation on what autocast would give it; attention as a fused kernel."""
        keywords = dict(kwargs or {})
        is_attention = func is F.scaled_dot_product_attention
        if self._autocast is not None and (is_attention or func in _AUTOCAST_TO_LOWER):
            args, keywords = _cast((tuple(args), keywords), self._autocast)
        elif self._autocast is not None and func in _AUTOCAST_TO_FLOAT32:
            args, keywords = _cast((tuple(args), keywords), torch.float32)
        if is_attention:
            inputs = dict(zip(("query", "key", "value"), args, strict=False)) | keywords
            return _FusedAttention.apply(inputs["query"], inputs["key"], inputs["value"])  # type: ignore[no-untyped-call]
        return func(*args, **keywords)

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()` as on CUDA, also in what gradient checkpointing recomputes.

        Torch leaves every mode on the way into `Tensor.backward`, so its engine is called directly.
        """
        engine: Any = torch.autograd.Variable._execution_engine
        with self:
            engine.run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )


@dataclass(frozen=True)
class _Layout:
    """All that is known of a tensor on the meta device."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _layout_of(tensor: Tensor | None) -> _Layout | None:
    return None if tensor is None else _Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _empty_from_layout(layout: _Layout | None) -> Tensor | None:
    if layout is None:
        return None
    return torch.empty_strided(layout.size, layout.stride, dtype=layout.dtype, device="meta")


def _is_new(result: object, arguments: list[Any]) -> bool:
    """Whether a result consists of meta tensors that share no storage with the arguments; some views don't tell."""
    argument_ids = {leaf.untyped_storage()._cdata for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
    leaves = [leaf for leaf in tree_leaves(result) if leaf is not None]
    return all(
        isinstance(leaf, Tensor) and leaf.is_meta and leaf.untyped_storage()._cdata not in argument_ids
        for leaf in leaves
    )


def _makes_new_tensors(func: Any) -> bool:
    """Whether an operation changes none of its arguments and returns no view of them."""
    return all(value.alias_info is None for value in [*func._schema.arguments, *func._schema.returns])


def _cache_key(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """The operation with its arguments' layouts; None if one is a tensor on another device or can't be compared."""
    key: list[Hashable] = [func]
    for argument in [*args, *kwargs.items()]:
        parts = argument if isinstance(argument, list | tuple) else [argument]
        for part in parts:
            if isinstance(part, Tensor):
                if not part.is_meta:
                    return None
                key.append(_layout_of(part))
            elif isinstance(part, Hashable):
                key.append((type(part), part))
            else:
                return None
        key.append(len(parts))
    return tuple(key)


def _cast(arguments: Any, dtype: torch.dtype) -> Any:
    """The arguments with every floating-point tensor converted."""

    def cast(argument: Any) -> Any:
        is_float = isinstance(argument, Tensor) and argument.is_floating_point()
        return argument.to(dtype) if is_float else argument

    return tree_map(cast, arguments)


class _FusedAttention(torch.autograd.Function):
    """The memory of flash attention (Dao 2023, algorithms 1 and 2); the values are empty.

    Kept for the backward pass are query, key, value, output and the logarithm of each row's sum; the backward pass
    accumulates the query's gradient in float32. The attention matrix is never allocated.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, values)."""
        output = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        logsumexp = query.new_zeros(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""
        query, key, value, _, logsumexp = ctx.saved_tensors
        query_accumulator = torch.zeros_like(query, dtype=torch.float32)
        row_sums = torch.zeros_like(logsumexp)
        query_gradient = torch.zeros_like(query)
        key_gradient = torch.zeros_like(key)
        value_gradient = torch.zeros_like(value)
        del query_accumulator, row_sums
        return query_gradient, key_gradient, value_gradient
