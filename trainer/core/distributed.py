"""The processes of a run: one, or several that `accelerate launch` started, which share every step's samples."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import SettingsError, suggest

T = TypeVar("T")
_TIMEOUT = timedelta(days=2)  # of processes that wait until the main process has made the class pictures
_MAX_NUMBERS_PER_REDUCTION = 2**26  # all of an adapter at once, while a whole model is never copied at once


class ProcessGroup:
    """The processes of a run, which take the same steps; the main process, the first of them, writes all files.

    Attributes:
        index: Which process this is (its rank), from 0.
        count: How many there are (the world size).
    """

    def __init__(self, index: int = 0, count: int = 1) -> None:
        """A group whose processes are connected already, or a single process."""
        self.index = index
        self.count = count

    @classmethod
    def current(cls, *, cpu: bool) -> ProcessGroup:
        """Connect to the processes that a launcher started with this one (by RANK and WORLD_SIZE).

        Clusters set these two for a program that nobody launched several times, but not LOCAL_RANK.

        Args:
            cpu: Whether they compute on the CPU.
        """
        if "LOCAL_RANK" not in os.environ:
            return cls()
        index = int(os.environ.get("RANK", "0"))
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1 and not torch.distributed.is_initialized():
            from accelerate.state import PartialState

            PartialState(cpu=cpu, timeout=_TIMEOUT)
        return cls(index, count)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    @property
    def share(self) -> tuple[int, int]:
        """Which share of a step's samples this process takes, and of how many: (index, count)."""
        return self.index, self.count

    def wait_for_everyone(self) -> None:
        """Block until every process has come this far."""
        if self.count > 1:
            torch.distributed.barrier()

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block in the main process first, then in the others, which find its results; then all continue."""
        if not self.is_main_process:
            self.wait_for_everyone()
        yield
        if self.is_main_process:
            self.wait_for_everyone()
        self.wait_for_everyone()

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns in the main process, a value that can be pickled; the others get a copy of it.

        `make` is not called in the others, and must not return None.
        """
        if self.count == 1:
            return make()
        values: list[T | None] = [make() if self.is_main_process else None]
        torch.distributed.broadcast_object_list(values)
        value = values[0]
        assert value is not None
        return value

    def any_process(self, condition: bool, device: torch.device) -> bool:
        """Whether the condition holds in any process; all get the same answer."""
        return bool(self.largest(int(condition), device))

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of the processes' numbers; all get the same."""
        if self.count == 1:
            return number
        numbers = torch.tensor([number], device=device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        return int(numbers.item())

    def average_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace the parameters' gradients by their means over all processes; returns the mean loss, 0-D.

        A parameter without a gradient has none in any process: all compute the same graph.
        """
        if self.count == 1:
            return loss
        mean_loss = loss.detach().float().clone()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for group in tensor_groups([mean_loss, *gradients], _MAX_NUMBERS_PER_REDUCTION):
            flat = torch.cat([tensor.flatten().float() for tensor in group])
            torch.distributed.all_reduce(flat)
            flat /= self.count
            means = torch.split(flat, [tensor.numel() for tensor in group])
            for tensor, mean in zip(group, means, strict=True):
                tensor.copy_(mean.view_as(tensor))
        return mean_loss


def tensor_groups(tensors: Sequence[Tensor], max_numbers: int) -> Iterator[list[Tensor]]:
    """The tensors in their order, in groups of at most `max_numbers` numbers, or of one tensor that has more."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.numel() > max_numbers:
            yield group
            group = []
            size = 0
        group.append(tensor)
        size += tensor.numel()
    yield group


def make_accelerator(device: torch.device, precision: str, accumulation: int) -> Any:
    """An accelerator for this run; a former run in the same process may have used another precision.

    Args:
        device: Where it computes.
        precision: "fp32", "bf16" or "fp16".
        accumulation: Micro-batches of a step.

    Raises:
        SettingsError: The precision does not work on the device.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    mixed_precision = "no" if precision == "fp32" else precision
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    try:
        return Accelerator(
            cpu=device.type == "cpu", mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation
        )
    except (ValueError, NotImplementedError) as error:
        raise SettingsError(
            f"{precision} does not work on {device}: {error}.", f"Choose {suggest('precision', 'fp32')}."
        ) from error


@contextlib.contextmanager
def accelerate_state_kept() -> Iterator[None]:
    """Restore accelerate's process-wide state after the block: other programs in this process may use it, too."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [state._shared_state for state in (AcceleratorState, PartialState, GradientState)]
    saved = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, former in zip(states, saved, strict=True):
            state.clear()
            state.update(former)
