"""A CUDA device that a computer without one pretends to have: its tensors compute on the CPU, and say "cuda:0".

What a GPU refuses is refused here: an operation on tensors of two devices. What makes the program wait for a GPU is
counted: reading a number, and copies that are not asynchronous. So the recipe's device code runs in every test run.

PyTorch's engine has no device "cuda" where it was built without it. To the engine the tensors are on the device "meta",
which it always has; to Python, where the pack and the libraries ask, they are on "cuda:0".
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # which a dispatch mode imports, and which looks at all of torch.cuda
from pack.trainer.training.memory import meter
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda:0")
GB = 2**30
aten = torch.ops.aten
_READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default)
_INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
_MATH_ATTENTION = 0  # torch's number of the backend that is made of ordinary operations


class OnDevice(Tensor):
    """A tensor of the emulated device, around one of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        """Say the device, and all else as it is."""
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        """The emulated one."""
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        """As its device says."""
        return True

    @property
    def is_meta(self) -> bool:
        """It has numbers."""
        return False

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """With its numbers."""
        return f"OnDevice({self.inner!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Reached outside of the mode alone."""
        raise AssertionError(f"{func} outside of the emulation")


class EmulatedCuda(TorchDispatchMode):
    """Computes what is on the emulated device.

    Attributes:
        waits: Where the program waited for the device: the operation and the line of the pack.
        is_meta_meant: Whether the device "meta" is that one, and not the engine's name for the emulated one.
    """

    def __init__(self) -> None:
        """Nothing was done yet."""
        super().__init__()
        self.waits: list[str] = []
        self.is_meta_meant = False
        self._pinned: set[int] = set()  # storages in page-locked memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation where its tensors are."""
        keywords = dict(kwargs or {})
        if func in (aten._pin_memory.default, aten.is_pinned.default):
            return self._pin(func, args[0])
        if func is aten._to_copy.default:
            return self._copied(args[0], keywords)
        if func is aten.copy_.default:
            return self._overwritten(*args, **keywords)
        leaves = [leaf for leaf in tree_leaves((args, keywords)) if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, OnDevice) for leaf in leaves):
            return _MATH_ATTENTION if func is aten._fused_sdp_choice.default else self._computed(func, args, keywords)
        if self._is_ours(keywords.get("device")):
            return OnDevice(func(*args, **{**keywords, "device": "cpu"}))
        return func(*args, **keywords)

    def _is_ours(self, device: Any) -> bool:
        kind = None if device is None else torch.device(device).type
        return kind == "cuda" or (kind == "meta" and not self.is_meta_meant)

    def _computed(self, func: Any, args: Any, keywords: Mapping[str, Any]) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, keywords)) if isinstance(leaf, Tensor)]
        strangers = [leaf for leaf in leaves if not isinstance(leaf, OnDevice) and leaf.ndim]  # numbers may come along
        if strangers and func not in _INDEXING:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")
        if func in _READS or strangers:  # an index from the host is copied
            self._wait(func)
        if self._is_ours(keywords.get("device")):
            keywords = {**keywords, "device": "cpu"}
        owners = {id(leaf.inner): leaf for leaf in leaves if isinstance(leaf, OnDevice)}
        result = func(*tree_map(_inner, args), **tree_map(_inner, dict(keywords)))
        return tree_map(lambda leaf: owners[id(leaf)] if id(leaf) in owners else _wrapped(leaf), result)

    def _pin(self, func: Any, tensor: Tensor) -> Any:
        if func is aten.is_pinned.default:
            return tensor.untyped_storage()._cdata in self._pinned
        pinned = tensor.clone()
        self._pinned.add(pinned.untyped_storage()._cdata)
        return pinned

    def _copied(self, source: Tensor, keywords: dict[str, Any]) -> Tensor:
        """A copy, perhaps on the other device."""
        device = keywords.pop("device", None)
        non_blocking = keywords.pop("non_blocking", False)
        keywords.pop("pin_memory", None)
        target = (
            source.device.type if device is None else "cuda" if self._is_ours(device) else torch.device(device).type
        )
        self._count_copy(source, target, non_blocking=non_blocking)
        if target == "meta":
            keywords["device"] = "meta"
        copy = aten._to_copy.default(_inner(source), **keywords)
        return OnDevice(copy) if target == "cuda" else copy

    def _overwritten(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        self._count_copy(source, target.device.type, non_blocking=non_blocking)
        _inner(target).copy_(_inner(source))
        return target

    def _count_copy(self, source: Tensor, target: str, *, non_blocking: bool) -> None:
        if source.device.type == target:
            return
        is_pageable = target == "cuda" and source.untyped_storage()._cdata not in self._pinned
        if is_pageable or not non_blocking:
            self._wait(f"copy to {target}")

    def _wait(self, what: Any) -> None:
        lines = [
            f"{frame.filename.rpartition('trainer')[2]}:{frame.lineno} {frame.line}"
            for frame in traceback.extract_stack()
            if "/trainer/" in frame.filename.replace("\\", "/")
        ]
        self.waits.append(f"{what} in {lines[-1] if lines else 'a test'}")


class _AsPythonSees(TorchFunctionMode):
    """Sees to what the engine would do by the device that it knows, and to what is no operation."""

    def __init__(self, mode: EmulatedCuda) -> None:
        """Take what computes."""
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function."""
        keywords = dict(kwargs or {})
        if func == Tensor.data.__get__ and isinstance(args[0], OnDevice):  # type: ignore[attr-defined]
            return args[0].detach()
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            if isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
                return torch.utils.swap_tensors(args[0], torch.nn.Parameter(args[1], args[0].requires_grad))
            if isinstance(args[0], OnDevice):
                args[0].inner = args[1].inner
        if func is Tensor.backward:  # which no mode accompanies, into what is computed again
            with self:
                return _backward(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and _is(keywords.get("device"), "cuda"):  # fills it out of reach
            return func(*args, **{**keywords, "device": "cpu"}).to(DEVICE)
        if (
            func is Tensor.to and isinstance(args[0], OnDevice) and len(args) > 1
        ):  # the engine thinks that it is on another device
            return self._moved(*args, **keywords)
        if torch.is_autocast_enabled("cuda"):
            args, keywords = _autocast(func, tuple(args), keywords)
        if not any(_is(each, "meta") for each in (*args, *keywords.values())):
            return func(*args, **keywords)
        before = self._mode.is_meta_meant
        self._mode.is_meta_meant = True
        try:
            return func(*args, **keywords)
        finally:
            self._mode.is_meta_meant = before

    def _moved(self, tensor: Tensor, *args: Any, **keywords: Any) -> Tensor:
        """`Tensor.to`, which gives the tensor itself if it is there already."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        if args and isinstance(args[0], torch.dtype):
            args = (None, *args)
        names = ("device", "dtype", "non_blocking", "copy")
        asked = {**dict(zip(names, args, strict=False)), **keywords}
        if _is(asked.get("device"), "cuda"):
            del asked["device"]
        return tensor.to(**{name: value for name, value in asked.items() if value is not None})


def _backward(loss: Tensor, gradient: Tensor | None = None, **_: Any) -> None:
    engine: Any = torch.autograd.Variable._execution_engine
    gradients = (torch.ones_like(loss) if gradient is None else gradient,)
    engine.run_backward((loss,), gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _autocast(func: Any, args: Any, keywords: dict[str, Any]) -> Any:
    """What autocast gives a function; by the lists that the memory plan has, too."""
    if func in meter._AUTOCAST_TO_LOWER or func is torch.nn.functional.scaled_dot_product_attention:
        dtype = torch.get_autocast_dtype("cuda")
    elif func in meter._AUTOCAST_TO_FLOAT32:
        dtype = torch.float32
    else:
        return args, keywords

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, OnDevice) and leaf.is_floating_point() else leaf

    return tree_map(cast, args), tree_map(cast, keywords)


def _is(value: Any, kind: str) -> bool:
    """Whether a value is a device of that kind."""
    if isinstance(value, str):
        return value.partition(":")[0] == kind
    return isinstance(value, torch.device) and value.type == kind


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, OnDevice) else leaf


def _wrapped(leaf: Any) -> Any:
    return OnDevice(leaf) if isinstance(leaf, Tensor) else leaf


class Event:
    """`torch.cuda.Event`; all work is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing to keep."""

    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        """All work is done."""
        return True


class Stream:
    """`torch.cuda.Stream`; all work is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing to keep."""

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Event:
        """An event that has happened."""
        return event or Event()


@contextlib.contextmanager
def emulated_cuda(monkeypatch: pytest.MonkeyPatch, gigabytes: float = 24.0) -> Iterator[EmulatedCuda]:
    """Inside the block `torch.cuda` says that there is a card of that memory, and "cuda:0" works."""
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    none_used: Callable[..., int] = lambda *_, **__: 0  # noqa: E731
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=int(gigabytes * GB), major=9, minor=0),
        "is_bf16_supported": lambda *_: True,
        "mem_get_info": lambda *_: (int(gigabytes * GB), int(gigabytes * GB)),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "device": lambda *_: contextlib.nullcontext(),
        "stream": lambda *_: contextlib.nullcontext(),
        "current_stream": lambda *_: Stream(),
        "Event": Event,
        "Stream": Stream,
        **dict.fromkeys(("set_device", "reset_peak_memory_stats", "empty_cache", "synchronize", "_lazy_init"), nothing),
        **dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated"), none_used),
    }
    mode = EmulatedCuda()
    with monkeypatch.context() as patched:
        # whether a parameter that moves stays the same object
        patched.setattr(torch, "_has_compatible_shallow_copy_type", lambda one, other: one.device == other.device)
        for name, answer in answers.items():
            patched.setattr(torch.cuda, name, answer)
        with _AsPythonSees(mode), mode, sdpa_kernel(SDPBackend.MATH):
            yield mode
