"""Runs whose network is two matrices: all that the recipe does with files is the real thing, in milliseconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from helpers import Recorder
from pack.trainer.adapters.kohya import Adapter, LoraLayer
from pack.trainer.core.distributed import accelerate_state_kept, make_accelerator
from pack.trainer.core.events import Preview, Validation
from pack.trainer.core.files import write_atomic
from pack.trainer.dreambooth import DreamBooth, Session, TrainResult
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.averaging import WeightAveraging
from pack.trainer.training.optimizers import learning_rate_factor, make_optimizer
from pack.trainer.training.runs.checkpoint import Saved
from pack.trainer.training.runs.layout import preview_name
from torch import Tensor, nn
from worlds import COMMON, World, paths_in

MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CREATION, REPORT = "create", "report"
CHANGES: dict[str, Any] = {
    "lr_schedule": "constant_with_warmup",
    "lr_warmup_steps": 2,
    "ema_decay": 0.5,
    "preview_every": 2,
    "validation_pictures": 1,
}


def scores_of(step: int) -> dict[str, float]:
    """What the previews of a step are scored."""
    return {"CLIP-I": 1 / (2 + step)}


def validation_loss_of(step: int) -> float:
    """The loss on the held-out pictures after a step."""
    return 1 / (3 + step)


class OneLayer:
    """A LoRA of one linear layer."""

    def __init__(self) -> None:
        self._down = nn.Parameter(_random((2, 4), 0))
        self._up = nn.Parameter(torch.zeros(3, 2))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"unet": self.parameters()}

    def parameters(self) -> list[nn.Parameter]:
        return [self._down, self._up]

    def starting_at_zero(self) -> list[nn.Parameter]:
        return [self._up]

    def saved(self, metadata: Mapping[str, str]) -> Saved:
        down, up = (parameter.detach().clone() for parameter in self.parameters())
        return Saved(Adapter({MODULE: LoraLayer(down, up, 2.0)}, metadata=dict(metadata)))

    def restore(self, saved: Saved) -> None:
        assert saved.adapter is not None
        layer = saved.adapter.layers[MODULE]
        assert isinstance(layer, LoraLayer)
        with torch.no_grad():
            self._down.copy_(layer.down)
            self._up.copy_(layer.up)

    def is_finite(self) -> bool:
        return True

    def after_update(self, trained: Collection[str]) -> None:
        pass


class SmallRecipe(DreamBooth):
    """The recipe without a diffusion model; losses, scores and pictures are functions of step and weights."""

    def prepare(self) -> None:
        trainable = OneLayer()
        optimizer = make_optimizer(trainable.groups(), self.settings, trainable.starting_at_zero())
        accelerator = make_accelerator(self.device, self.precision, self.settings.gradient_accumulation)
        parts: dict[str, Any] = {
            "model": SimpleNamespace(denoiser=nn.Identity(), text_encoders={}),
            "objective": None,
            "cache": SimpleNamespace(validation=self.held_out),
            "text": SimpleNamespace(trained=[], rows=None),
            "teacher": SimpleNamespace(batches=lambda step, micro_batch: []),
        }
        self._session = Session(
            **parts,
            trainable=trainable,
            optimizer=accelerator.prepare(optimizer),
            learning_rate_factor=learning_rate_factor(optimizer, self.settings),
            averaging=WeightAveraging(trainable.parameters(), optimizer, self.settings),
            accelerator=accelerator,
            dtype=torch.float32,
        )

    def check_prediction_type(self) -> None:
        pass

    def batches(self, micro_step: int) -> Iterator[Any]:
        yield _random((3, 4), 1 + self.step)

    def batch_loss(self, batch: Any, micro_step: int) -> Tensor:
        down, up = self.session.trainable.parameters()
        return (up @ down - batch).square().mean()

    def _generate_previews(self, step: int, conditioning: Any) -> None:
        path = self.run_folder.preview_path(step) / preview_name("subject", 0, 0)
        write_atomic(path, b"a picture")
        scores = scores_of(step)
        self.listener.report(Preview(step, [(path, "a prompt")], scores))
        self.measurements.scores[step] = scores

    def _validate(self) -> None:
        self.listener.report(Validation(self.step, validation_loss_of(self.step)))
        self.measurements.validated.append(self.step)


class BuiltOnce:
    """A model's family that builds its networks once: nobody here changes them."""

    def __init__(self, base: BaseWeights) -> None:
        self._base = base

    @cached_property
    def _model(self) -> DiffusionModel:
        return self._base.family.build(self._base)

    def build(self, base: BaseWeights) -> DiffusionModel:
        assert base.denoiser is self._base.denoiser
        return self._model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base.family, name)


class SmallWorld:
    """Where small runs start from."""

    def __init__(self, world: World) -> None:
        family: Any = BuiltOnce(world.base)
        self._world = replace(world, base=replace(world.base, family=family))

    def train(self, folder: Path, listener: Any = None, **changes: Any) -> TrainResult:
        """A run, with its files below `folder`."""
        with accelerate_state_kept():
            world, settings = self._world, TrainSettings(**{**COMMON, **CHANGES, **changes})
            recipe = SmallRecipe(
                world.base, world.subject, [], settings, paths_in(folder), torch.device("cpu"), listener or Recorder()
            )
            try:
                return recipe.run()
            finally:
                recipe.clean_up()


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class _Watch:
    """Counts what is done to the files below a folder; something happens before the n-th time."""

    def __init__(self, root: Path, number: int, happen: Callable[[str], None], *, forever: bool) -> None:
        self.left = number
        self._root = str(root)
        self._happen = happen
        self._forever = forever
        self._is_busy = False

    def see(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._is_busy and self._concerns(event, args):
            self.count(CREATION if event == "open" and args[2] & os.O_CREAT else event)

    def count(self, operation: str) -> None:
        self.left -= 1
        if self.left == -1 or (self.left < 0 and self._forever):
            self._is_busy = True
            try:
                self._happen(operation)
            finally:
                self._is_busy = False

    def _concerns(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
            return bool(writes) and self._is_below(path)
        if event in ("os.remove", "os.rmdir"):
            path, directory = args
            return directory != -1 or self._is_below(path)  # `shutil.rmtree` goes by open folders
        return event in ("os.mkdir", "os.rename", "os.link") and self._is_below(args[0])

    def _is_below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._root)


_watches: list[_Watch] = []


def _see(event: str, args: tuple[Any, ...]) -> None:
    if _watches and (event == "open" or event.startswith("os.")):
        _watches[-1].see(event, args)


@contextmanager
def before_operation(
    number: int, root: Path, happen: Callable[[str], None], *, forever: bool = False
) -> Iterator[Recorder]:
    """Inside the block something happens before the n-th time that a file below a folder is changed.

    Python tells so itself, by its audit events, so nothing is replaced. Events that are reported to the listener which
    the block gets count, too, since lines are written between them.

    Args:
        number: How many times go well.
        root: The folder.
        happen: Gets the name of the event, `CREATION` for a file that is opened and need not exist, or `REPORT`; what
            it raises is raised by the operation, which does not take place.
        forever: Whether it happens each time from then on.
    """
    if not _is_watching:
        _is_watching.append(True)
        sys.addaudithook(_see)
    watch = _Watch(root, number, happen, forever=forever)

    class Counted(Recorder):
        def report(self, event: Any) -> None:
            super().report(event)
            watch.count(REPORT)

    _watches.append(watch)
    try:
        yield Counted()
    finally:
        _watches.remove(watch)


_is_watching: list[bool] = []
