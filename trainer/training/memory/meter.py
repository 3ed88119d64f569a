"""What a computation holds in memory at its peak, found without memory: tensors on the meta device, counted alive.

A network on the meta device runs forward and backward with shapes alone. `LiveBytes` counts the storages that are
alive; `AsOnCuda` makes the computation the one that a CUDA device does, with autocast and a fused kernel for attention.
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
_LOWER = {
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
_FULL = {
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
    """Counts the bytes of all storages that operations inside the `with` block make, while they are alive.

    Attributes:
        now: Bytes that are alive.
        peak: The most that were alive at once.
    """

    def __init__(
        self,
        device: str = "meta",
        known: Iterable[Tensor] = (),
        granule: int = 1,
        seen: dict[Hashable, Any] | None = None,
    ) -> None:
        """Begin at zero.

        Args:
            device: Type of the device whose tensors count.
            known: Tensors that are counted elsewhere, such as weights.
            granule: Every storage is rounded up to a multiple of this, in bytes; 512 is CUDA's.
            seen: What operations on the meta device made of which shapes, to be kept from one measurement to the next:
                networks repeat themselves, and finding out a shape takes long.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._device, self._granule = device, granule
        self._seen: dict[Hashable, Any] = {} if seen is None else seen
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._known = [tensor.untyped_storage() for tensor in known]  # kept, so that no number is used again
        self._known_ids = {storage._cdata for storage in self._known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and take note of what it made."""
        result = self._result(func, tuple(args), dict(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.device.type == self._device:
                self._note(one.untyped_storage())
        return result

    def _result(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's result, from what was made of the same shapes before, if it is on meta and all new."""
        key = _key(func, args, kwargs) if self._device == "meta" and _makes_new_tensors(func) else None
        if key in self._seen:
            return tree_map(lambda one: one.made() if isinstance(one, _Shape) else one, self._seen[key])
        result = func(*args, **kwargs)
        if key is not None and _is_new(result, [*args, *kwargs.values()]):
            self._seen[key] = tree_map(lambda one: None if one is None else _Shape.of(one), result)
        return result

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._alive or key in self._known_ids:
            return
        size = -(-storage.nbytes() // self._granule) * self._granule

        def gone(_: object) -> None:
            if self._alive.pop(key, None) is not None:
                self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class AsOnCuda(TorchFunctionMode):
    """Lets operations inside the `with` block keep what they would keep on a CUDA device."""

    def __init__(self, autocast: torch.dtype | None) -> None:
        """Take autocast's type; None: there is no autocast."""
        super().__init__()
        self._autocast = autocast

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation on what autocast would give it; attention as a fused kernel."""
        named = dict(kwargs or {})
        attention = func is F.scaled_dot_product_attention
        if self._autocast is not None and (attention or func in _LOWER):
            args, named = _cast((tuple(args), named), self._autocast)
        elif self._autocast is not None and func in _FULL:
            args, named = _cast((tuple(args), named), torch.float32)
        if attention:
            query, key, value = (*args, *(named[name] for name in ("query", "key", "value") if name in named))[:3]
            return _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
        return func(*args, **named)

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()` as on CUDA, also in what gradient checkpointing computes again.

        Torch leaves every mode on the way into `Tensor.backward`, so its engine is asked directly.
        """
        engine: Any = torch.autograd.Variable._execution_engine
        with self:
            engine.run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )


@dataclass(frozen=True)
class _Shape:
    """What there is to know of a tensor on the meta device."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def made(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


def _is_new(result: object, arguments: list[Any]) -> bool:
    """Whether a result is made of tensors on meta that share nothing with the arguments (some views don't say so)."""
    old = {one.untyped_storage()._cdata for one in tree_leaves(arguments) if isinstance(one, Tensor)}
    made = [one for one in tree_leaves(result) if one is not None]
    return all(isinstance(one, Tensor) and one.is_meta and one.untyped_storage()._cdata not in old for one in made)


def _makes_new_tensors(func: Any) -> bool:
    """Whether an operation changes none of its arguments and gives no view of them."""
    return all(one.alias_info is None for one in [*func._schema.arguments, *func._schema.returns])


def _key(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """The operation with its arguments' shapes; None if one of them is a tensor elsewhere or can't be compared."""
    found: list[Hashable] = [func]
    for one in [*args, *kwargs.items()]:
        parts = one if isinstance(one, list | tuple) else [one]
        for part in parts:
            if isinstance(part, Tensor):
                if not part.is_meta:
                    return None
                found.append(_Shape.of(part))
            elif isinstance(part, Hashable):
                found.append((type(part), part))
            else:
                return None
        found.append(len(parts))
    return tuple(found)


def _cast(arguments: Any, dtype: torch.dtype) -> Any:
    def cast(one: Any) -> Any:
        return one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one

    return tree_map(cast, arguments)


class _FusedAttention(torch.autograd.Function):
    """The memory of flash attention (Dao 2023, algorithms 1 and 2); the values are empty.

    Kept for the backward pass are query, key, value, output and the logarithm of each row's sum; the backward pass
    gathers the query's gradient in float32. The attention matrix is never there.
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
        gathered = torch.zeros_like(query, dtype=torch.float32)
        rows = torch.zeros_like(logsumexp)
        found = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        del gathered, rows
        return found
