"""Each stateful part of a run by itself: saved after any step, restored into fresh parts, it goes on bit for bit.

That resuming is exact rests on two facts: the samples of a step depend on the step alone (tests/core/test_seeding), and
each part that changes while a run trains comes back whole. The second is shown here without a run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from pack.trainer.settings.optimizer import OptimizerName
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.averaging import WeightAveraging
from pack.trainer.training.optimizers import learning_rate_factor, make_optimizer, set_learning_rates
from pack.trainer.training.runs.checkpoint import (
    Checkpoint,
    Measurements,
    Saved,
    _split_optimizer,
    read_checkpoint,
    read_measurements,
    read_trained,
    write_checkpoint_files,
    write_measurements,
)
from pack.trainer.training.state import TrainingState
from pack.trainer.training.text_conditioning import TextConditioning
from pack.trainer.training.trainable import Trainable, make_trainable
from torch import Tensor, nn
from worlds import KINDS

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.filterwarnings("ignore:Paged optimizers")]

STEPS = 4
OPTIMIZERS = get_args(OptimizerName)
FREE = "adamw-schedule-free"  # averages the weights itself
SCHEDULES = get_args(TrainSettings.model_fields["lr_schedule"].annotation)
METADATA = {"ss_output_name": "dog"}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TwoNetworks:
    """What a run trains, as small as it gets: two matrices and a vector, of a UNet and a text encoder."""

    def __init__(self) -> None:
        self._groups = {
            "text_encoder": [nn.Parameter(random(6, 4, seed=1))],
            "unet": [nn.Parameter(random(16, 8, seed=2)), nn.Parameter(torch.zeros(5))],
        }

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return self._groups

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._groups.values() for parameter in group]

    def starting_at_zero(self) -> list[nn.Parameter]:
        return self._groups["unet"][1:]

    def saved(self, metadata: Mapping[str, str]) -> Saved:
        weights = {str(number): parameter.detach().clone() for number, parameter in enumerate(self.parameters())}
        return Saved(weights=weights, metadata=metadata)

    def restore(self, saved: Saved) -> None:
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_((saved.weights or {})[str(number)])

    def is_finite(self) -> bool:
        return True

    def after_update(self, trained: Any) -> None:
        pass


class Course:
    """Steps of what is trained, as the recipe takes them, along gradients that depend on step and weights."""

    def __init__(
        self, settings: TrainSettings, trainable: Trainable, *, scaler: Any = None, infinite_step: int | None = None
    ) -> None:
        self.trainable = trainable
        self.parameters = trainable.parameters()
        self.optimizer = make_optimizer(trainable.groups(), settings, trainable.starting_at_zero())
        averaging = WeightAveraging(self.parameters, self.optimizer, settings)
        self.state = TrainingState(trainable, self.optimizer, averaging, scaler)
        self.factor = learning_rate_factor(self.optimizer, settings)
        self.step = 0
        self.frozen: list[nn.Parameter] = []
        self._infinite_step = infinite_step

    def go(self, to: int) -> None:
        while self.step < to:
            self._take_step()

    def _take_step(self) -> None:
        set_learning_rates(self.optimizer, self.factor(self.step))
        scaler = self.state.scaler
        frozen = {id(parameter) for parameter in self.frozen}
        for number, parameter in enumerate(self.parameters):
            gradient = random(*parameter.shape, seed=100 * self.step + number) + 0.1 * parameter.detach()
            if scaler is not None:
                gradient *= scaler.scale(torch.ones(()))
                if self.step == self._infinite_step:
                    gradient.fill_(math.inf)
            parameter.grad = None if id(parameter) in frozen else gradient
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.trainable.after_update(self.trainable.groups())
        self.state.averaging.update()
        self.step += 1

    def freeze_text_encoder(self) -> None:
        self.frozen = self.trainable.groups()["text_encoder"]
        self.state.averaging.freeze(self.frozen)

    def checkpoint(self) -> Checkpoint:
        return self.state.checkpoint(self.step, METADATA, Measurements())

    def restore(self, checkpoint: Checkpoint) -> None:
        self.state.restore(checkpoint)
        self.step = checkpoint.step


def assert_goes_on_exactly(make: Callable[[], Course], folder: Path, *, freeze_at: int | None = None) -> Course:
    """A run is saved after each step, and fresh parts that are restored from these files end as it does.

    Args:
        make: Makes the parts, as a process does that has just begun.
        folder: For the files.
        freeze_at: Step after which the text encoder is trained no further.

    Returns:
        The course that was never restored.
    """
    straight = make()
    for step in range(1, STEPS):
        straight.go(step)
        (folder / str(step)).mkdir(parents=True)
        write_checkpoint_files(folder / str(step), straight.checkpoint())
        if step == freeze_at:
            straight.freeze_text_encoder()
    straight.go(STEPS)
    expected = everything(straight)
    for step in range(1, STEPS):
        resumed = make()
        resumed.restore(read_checkpoint(folder / str(step), step))
        if freeze_at is not None and step < freeze_at:
            resumed.go(freeze_at)
        if freeze_at is not None:
            resumed.freeze_text_encoder()
        resumed.go(STEPS)
        assert everything(resumed) == expected, f"after step {step}"
    return straight


def everything(course: Course) -> dict[str, Any]:
    """All that a checkpoint would hold, as comparable values: bit for bit, what is not a number counts, too."""
    checkpoint = course.checkpoint()
    tensors, rest = _split_optimizer(checkpoint.optimizer)
    groups = {
        "trained": _tensors_of(checkpoint.trained),
        "raw": checkpoint.live,
        "parameters": {str(number): parameter.detach() for number, parameter in enumerate(course.parameters)},
        "optimizer": tensors,
    }
    bits = {
        f"{group}.{name}": (tensor.dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes())
        for group, named in groups.items()
        for name, tensor in named.items()
    }
    return bits | {"others": json.dumps([rest, checkpoint.extra], sort_keys=True)}


def _tensors_of(saved: Saved) -> Mapping[str, Tensor]:
    return saved.weights if saved.weights is not None else saved.adapter.state_dict()  # type: ignore[union-attr]


def settings_of(optimizer: str, **values: Any) -> TrainSettings:
    rate = 1.0 if optimizer == "prodigy" else 1e-2
    options = "min_8bit_size=1" if "8bit" in optimizer else ""
    return TrainSettings(
        **{"steps": STEPS, "learning_rate": rate, "text_encoder_lr": rate, "optimizer_options": options, **values},
        optimizer=optimizer,
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer(optimizer: str, tmp_path: Path) -> None:
    assert_goes_on_exactly(lambda: Course(settings_of(optimizer), TwoNetworks()), tmp_path)


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "prodigy"])
def test_optimizer_with_lora_plus(optimizer: str, tmp_path: Path) -> None:
    settings = settings_of(optimizer, lora_plus_ratio=4.0)
    assert_goes_on_exactly(lambda: Course(settings, TwoNetworks()), tmp_path)


OPTIONS = {
    "adamw": "amsgrad=True",
    "adafactor": "beta1=0.9",
    "prodigy": "d_coef=2 safeguard_warmup=True",
    "adamw-schedule-free": "r=0.5",
}


@pytest.mark.parametrize("optimizer", OPTIONS)
def test_optimizer_whose_options_add_state(optimizer: str, tmp_path: Path) -> None:
    settings = settings_of(optimizer, optimizer_options=OPTIONS[optimizer])
    assert_goes_on_exactly(lambda: Course(settings, TwoNetworks()), tmp_path)


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != FREE])
def test_moving_average(optimizer: str, tmp_path: Path) -> None:
    settings = settings_of(optimizer, ema_decay=0.7)
    course = assert_goes_on_exactly(lambda: Course(settings, TwoNetworks()), tmp_path)
    checkpoint = course.checkpoint()
    assert set(checkpoint.live) == set(checkpoint.trained.weights or {}) == {"0", "1", "2"}
    assert not any(torch.equal(checkpoint.live[name], _tensors_of(checkpoint.trained)[name]) for name in "012")


@pytest.mark.parametrize("freeze_at", [1, 2])
@pytest.mark.parametrize(
    ("optimizer", "averaged"),
    [(name, averaged) for name in OPTIMIZERS for averaged in (False, True) if (name, averaged) != (FREE, True)],
)
def test_text_encoder_that_is_frozen(optimizer: str, averaged: bool, freeze_at: int, tmp_path: Path) -> None:
    """Restored before, at and after the step from which it stays as it is."""
    settings = settings_of(optimizer, ema_decay=0.7 if averaged else 0.0)
    course = assert_goes_on_exactly(lambda: Course(settings, TwoNetworks()), tmp_path, freeze_at=freeze_at)
    frozen = read_trained(tmp_path / str(freeze_at))
    assert torch.equal(_tensors_of(course.checkpoint().trained)["0"], _tensors_of(frozen)["0"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(schedule: str, tmp_path: Path) -> None:
    """The rate of each step is the schedule's, also where the steps before it were another process's."""
    warmup = 0 if schedule == "constant" else 2
    settings = settings_of("adamw", lr_schedule=schedule, lr_warmup_steps=warmup)
    assert_goes_on_exactly(lambda: Course(settings, TwoNetworks()), tmp_path)


@pytest.mark.parametrize("infinite_step", [None, 0, 2])
def test_gradient_scaler(infinite_step: int | None, tmp_path: Path) -> None:
    """It doubles its factor after two good steps, and halves it after one that overflowed, which changes no weight."""

    def make() -> Course:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return Course(settings_of("adamw"), TwoNetworks(), scaler=scaler, infinite_step=infinite_step)

    course = assert_goes_on_exactly(make, tmp_path)
    scales = [read_checkpoint(tmp_path / str(step), step).extra["scaler"]["scale"] for step in range(1, STEPS)]
    expected = {None: [8, 16, 16, 32], 0: [4, 4, 8, 8], 2: [8, 16, 8, 8]}[infinite_step]
    assert [*scales, course.state.scaler.get_scale()] == expected


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_state_of_each_optimizer_matters(optimizer: str) -> None:
    """Weights alone don't bring a run back: else the tests above would show nothing."""
    course = Course(settings_of(optimizer), TwoNetworks())
    course.go(2)
    checkpoint = course.checkpoint()
    course.go(STEPS)
    fresh = Course(settings_of(optimizer), TwoNetworks())
    fresh.trainable.restore(checkpoint.trained)
    fresh.step = 2
    fresh.go(STEPS)
    assert everything(fresh) != everything(course)
    same = all(torch.equal(ours, theirs) for ours, theirs in zip(fresh.parameters, course.parameters, strict=True))
    assert not same


# What is trained


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> BaseWeights:
    return open_base(tiny_checkpoint)


TRAINED: dict[str, dict[str, Any]] = {
    **KINDS,
    "LoRA of several ranks": {"block_ranks": "self_attn=3:1.5"},
    "LoRA, dropout, limited norm": {"dropout": 0.25, "max_norm": 0.5},
    "full": {"adapter": "full"},
}


@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_trained(kind: str, base: BaseWeights, tmp_path: Path) -> None:
    """Adapters of every kind in the smallest real networks, and these networks themselves."""
    few_layers = {} if kind == "full" else {"targets": "attention", "exclude": "down_blocks up_blocks"}
    settings = settings_of("adamw", **{"rank": 2, **few_layers, **TRAINED[kind]})

    def make() -> Course:
        model = base.family.build(base)
        return Course(settings, make_trainable(model, settings, torch.device("cpu"), torch.float32, None))

    straight = make()
    straight.go(1)
    write_checkpoint_files(tmp_path, straight.checkpoint())
    straight.go(2)
    resumed = make()
    assert everything(resumed) != everything(straight)
    resumed.restore(read_checkpoint(tmp_path, 1))
    resumed.go(2)
    assert everything(resumed) == everything(straight)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_captions_of_a_text_encoder_that_was_frozen(adapter: str, base: BaseWeights) -> None:
    """Restored after the step from which it stays, it encodes them as it did at that step, to the last bit."""
    settings = settings_of("adamw", rank=2, targets="attention", adapter=adapter, ema_decay=0.5)

    def make() -> tuple[Course, TextConditioning]:
        model = base.family.build(base)
        trainable = make_trainable(model, settings, torch.device("cpu"), torch.float32, None)
        text = TextConditioning(
            model,
            encoded=model.tokenize(["a photo of sks dog", "a photo of a dog"]),
            trained=["text_encoder"],
            device=torch.device("cpu"),
            dtype=torch.float32,
            autocast=contextlib.nullcontext,
        )
        return Course(settings, trainable), text

    def encoded(text: TextConditioning) -> dict[str, bytes]:
        return {name: rows.detach().numpy().tobytes() for name, rows in text.rows(torch.tensor([1, 0])).items()}

    course, text = make()
    course.go(2)
    course.freeze_text_encoder()
    text.freeze()
    course.go(3)
    resumed, resumed_text = make()
    before = encoded(resumed_text)
    resumed.restore(course.checkpoint())
    resumed.freeze_text_encoder()
    resumed_text.freeze()
    assert encoded(resumed_text) == encoded(text)
    assert encoded(resumed_text) != before


def test_captions_of_a_text_encoder_that_leaves_are_encoded_without_dropout(base: BaseWeights) -> None:
    model = base.family.build(base)
    encoder = model.text_encoders["text_encoder"]
    encoder.register_forward_pre_hook(lambda network, _: modes.append(network.training))
    encoder.train()
    text = TextConditioning(
        model,
        encoded=model.tokenize(["a photo of sks dog"]),
        trained=["text_encoder"],
        device=torch.device("cpu"),
        dtype=torch.float32,
        autocast=contextlib.nullcontext,
    )
    modes: list[bool] = []
    text.rows(torch.tensor([0]))
    text.freeze()
    assert modes == [True, False]


# What was measured


def test_scores_and_validated_steps(tmp_path: Path) -> None:
    """Early stop goes by them: to the last digit, also what is not a number."""
    measurements = Measurements(
        scores={0: {"CLIP-I": 0.1 + 0.2, "drift (CLIP)": 1e-300}, 200: {"CLIP-I": math.pi}, 300: {}},
        validated=[0, 200],
        scored_as={0: "0" * 16, 200: "1" * 16},
    )
    course = Course(settings_of("adamw"), TwoNetworks())
    write_checkpoint_files(tmp_path, course.state.checkpoint(1, METADATA, measurements))
    assert read_measurements(tmp_path) == read_checkpoint(tmp_path, 1).measurements == measurements
    later = Measurements(scores={**measurements.scores, 400: {"CLIP-I": math.nan}}, validated=[0, 200, 400])
    write_measurements(tmp_path, later)
    assert repr(read_checkpoint(tmp_path, 1).measurements) == repr(later)


def test_measurements_are_brought_in_whole_or_not_at_all(tmp_path: Path) -> None:
    """A second name of the state keeps what it held: the file is replaced, not written over."""
    course = Course(settings_of("adamw"), TwoNetworks())
    write_checkpoint_files(tmp_path, course.state.checkpoint(1, METADATA, Measurements()))
    former = tmp_path / "former"
    os.link(tmp_path / "state.json", former)
    before = former.read_bytes()
    write_measurements(tmp_path, Measurements(validated=[0]))
    assert former.read_bytes() == before != (tmp_path / "state.json").read_bytes()
