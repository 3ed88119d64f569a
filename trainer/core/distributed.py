"""The processes of a run: one, or several that `accelerate launch` started, which share every step's samples."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import SettingsError

Made = TypeVar("Made")
_PATIENCE = timedelta(days=2)  # of processes that wait until the first has made the class pictures
_AT_ONCE = 2**26  # numbers in one message: all of an adapter, while a whole model is never there twice


class ProcessGroup:
    """The processes of a run, which take the same steps; the first of them, the leader, writes all files.

    Attributes:
        index: Which process this is, from 0.
        count: How many there are.
    """

    def __init__(self, index: int = 0, count: int = 1) -> None:
        """A team whose processes are connected already, or a single process."""
        self.index, self.count = index, count

    @classmethod
    def here(cls, *, cpu: bool) -> ProcessGroup:
        """The processes that a launcher started with this one (RANK and WORLD_SIZE say so), connected.

        Clusters set these two for a program that nobody launched several times, but not LOCAL_RANK.

        Args:
            cpu: Whether they compute on the CPU.
        """
        if "LOCAL_RANK" not in os.environ:
            return cls()
        index, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1 and not torch.distributed.is_initialized():
            from accelerate.state import PartialState

            PartialState(cpu=cpu, timeout=_PATIENCE)
        return cls(index, count)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    @property
    def share(self) -> tuple[int, int]:
        """Which of how many shares of a step's samples this process takes."""
        return self.index, self.count

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            torch.distributed.barrier()

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The leader does the block first, then the others, who find what it made; then all go on."""
        if not self.is_main_process:
            self.wait()
        yield
        if self.is_main_process:
            self.wait()
        self.wait()

    def broadcast_from_main(self, make: Callable[[], Made]) -> Made:
        """What the leader makes, a value that can be pickled; the others get a copy and make nothing."""
        if self.count == 1:
            return make()
        made: list[Made | None] = [make() if self.is_main_process else None]
        torch.distributed.broadcast_object_list(made)
        assert made[0] is not None
        return made[0]

    def anyone(self, wish: bool, device: torch.device) -> bool:
        """Whether any process wishes something; all get the same answer."""
        return bool(self.largest(int(wish), device))

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        numbers = torch.tensor([number], device=device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        return int(numbers.item())

    def average(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Bring the mean of all processes' gradients into the parameters; returns the mean of their losses, 0-D.

        A parameter without a gradient has one in no process: all compute the same graph.
        """
        if self.count == 1:
            return loss
        mean = loss.detach().float().clone()
        for group in groups_of([mean, *(one.grad for one in parameters if one.grad is not None)], _AT_ONCE):
            whole = torch.cat([one.flatten().float() for one in group])
            torch.distributed.all_reduce(whole)
            whole /= self.count
            parts = torch.split(whole, [one.numel() for one in group])
            for tensor, part in zip(group, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        return mean


def groups_of(tensors: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Tensors in their order, in groups of at most so many numbers, or of one tensor that has more."""
    group: list[Tensor] = []
    for one in tensors:
        if group and sum(map(Tensor.numel, group)) + one.numel() > most:
            yield group
            group = []
        group.append(one)
    yield group


def make_accelerator(device: torch.device, precision: str, accumulation: int) -> Any:
    """An accelerator for this run; a former run in the same process may have used another precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    mixed = "no" if precision == "fp32" else precision
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    try:
        return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed, gradient_accumulation_steps=accumulation)
    except (ValueError, NotImplementedError) as error:
        raise SettingsError(f"{precision} does not work on {device}: {error}.", "Choose precision fp32.") from error


@contextlib.contextmanager
def accelerate_state_kept() -> Iterator[None]:
    """Give accelerate's process-wide state back as it was: other programs in this process may use it, too."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [state._shared_state for state in (AcceleratorState, PartialState, GradientState)]
    saved = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, former in zip(states, saved, strict=True):
            state.clear()
            state.update(former)
