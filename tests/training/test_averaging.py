"""What is shown, previewed, saved and exported are the averaged weights; what is trained on are the raw ones."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from helpers import Recorder
from pack.trainer.core.distributed import accelerate_state_kept
from pack.trainer.core.errors import StorageError
from pack.trainer.core.events import Phase
from pack.trainer.dreambooth import DreamBooth
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.averaging import WeightAveraging
from pack.trainer.training.optimizers import make_optimizer, set_learning_rates
from safetensors.torch import load_file
from torch import Tensor, nn
from worlds import TEXT, Finished, World, assert_same_end, differing

pytestmark = pytest.mark.usefixtures("quick")

FREE: dict[str, Any] = {"optimizer": "adamw-schedule-free"}
EMA: dict[str, Any] = {"ema_decay": 0.7}
FULL: dict[str, Any] = {"adapter": "full", "learning_rate": 1e-3}
WAYS = {"EMA": EMA, "schedule-free": FREE}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Small:
    """Two parameters, an optimiser and an averaging."""

    def __init__(self, **values: Any) -> None:
        settings = TrainSettings(**{"learning_rate": 1e-2, **values})
        self.parameters = [nn.Parameter(random(5, 3, seed=0)), nn.Parameter(random(4, seed=1))]
        self.optimizer = make_optimizer({"unet": self.parameters}, settings)
        self.averaging = WeightAveraging(self.parameters, self.optimizer, settings)

    def go(self, step: int) -> list[Tensor]:
        """One step; the raw weights after it."""
        for number, parameter in enumerate(self.parameters):
            parameter.grad = random(*parameter.shape, seed=10 * step + number)
        self.optimizer.step()
        self.averaging.update()
        return self.raw()

    def raw(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def shown(self) -> list[Tensor]:
        with self.averaging.evaluation_weights():
            return self.raw()


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def close(ours: list[Tensor], theirs: list[Tensor], within: float) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.allclose(one.double(), other.double(), rtol=0, atol=within) for one, other in pairs)


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_ema_by_its_formula(decay: float) -> None:
    small = Small(ema_decay=decay)
    average = [one.double() for one in small.raw()]
    assert equal(small.shown(), small.raw())
    for step in range(1, 21):
        now = 0.0 if step == 1 else min(decay, step / (step + 9))
        average = [now * old + (1 - now) * new.double() for old, new in zip(average, small.go(step), strict=True)]
        assert close(small.shown(), average, 1e-6)
    assert not close(small.shown(), small.raw(), 1e-4)


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_ema_like_that_of_diffusers(decay: float) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    small = Small(ema_decay=decay)
    reference = training_utils.EMAModel(small.parameters, decay=decay)
    for step in range(1, 21):
        small.go(step)
        reference.step(small.parameters)
        assert close(small.shown(), reference.shadow_params, 1e-6)


def test_ema_without_memory_is_what_is_trained() -> None:
    small = Small(ema_decay=1e-12)
    for step in range(1, 6):
        raw = small.go(step)
        assert close(small.shown(), raw, 1e-7)


@pytest.mark.parametrize("options", ["", "betas=(0.95,0.99) r=0.5"])
def test_schedule_free_by_its_paper(options: str) -> None:
    """Defazio et al. 2024, algorithm 1, with the bias correction inside the root as its authors' code has it."""
    small = Small(**FREE, optimizer_options=options, weight_decay=0.1)
    first, second, power = (0.95, 0.99, 0.5) if options else (0.9, 0.999, 0.0)
    y = [one.double() for one in small.raw()]
    x, z = [one.clone() for one in y], [one.clone() for one in y]
    moment = [torch.zeros_like(one) for one in y]
    highest = total = 0.0
    for step in range(1, 16):
        factor = min(1.0, step / 5)  # a warm-up
        rate = 1e-2 * factor
        set_learning_rates(small.optimizer, factor)
        highest = max(highest, rate)
        weight = step**power * highest**2
        total += weight
        share = weight / total
        for number in range(2):
            gradient = random(*y[number].shape, seed=10 * step + number).double()
            moment[number] = second * moment[number] + (1 - second) * gradient**2
            direction = gradient / ((moment[number] / (1 - second**step)).sqrt() + 1e-8) + 0.1 * y[number]
            z[number] = z[number] - rate * direction
            x[number] = (1 - share) * x[number] + share * z[number]
            y[number] = (1 - first) * z[number] + first * x[number]
        assert close(small.go(step), y, 2e-6)
        assert close(small.shown(), x, 2e-6)
    assert not close(small.shown(), small.raw(), 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_looking_changes_nothing(way: str) -> None:
    """Not one bit, however often, and whatever breaks while one looks."""
    watched, alone = Small(**WAYS[way]), Small(**WAYS[way])
    for step in range(1, 6):
        expected = alone.go(step)
        assert equal(watched.go(step), expected)
        once, twice = watched.shown(), watched.shown()
        assert equal(once, twice)
        with pytest.raises(KeyboardInterrupt), watched.averaging.evaluation_weights():
            raise KeyboardInterrupt
        assert equal(watched.raw(), expected)


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_between_the_two_is_made_good(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it came while the raw weights were put back: what is saved then holds the right ones."""
    small = Small(**WAYS[way])
    for step in range(1, 4):
        raw = small.go(step)
    shown = small.shown()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), small.averaging.evaluation_weights():
        patch.setattr(small.averaging, "_restore_raw", interrupted)
    assert equal(small.raw(), shown)
    assert equal(small.shown(), shown)
    assert equal(small.raw(), raw)
    assert equal(list(small.averaging.raw_weights().values()), raw)


def test_nothing_to_average_costs_nothing() -> None:
    small = Small()
    raw = small.go(1)
    assert equal(small.shown(), raw)
    assert small.averaging.raw_weights() == {}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_settled_keeps_what_was_shown(way: str) -> None:
    small = Small(**WAYS[way])
    for step in range(1, 4):
        small.go(step)
    shown, raw = small.shown(), small.raw()
    small.averaging.freeze([small.parameters[1]])
    assert equal(small.raw(), [raw[0], shown[1]])
    small.averaging.freeze([small.parameters[1]])  # again, as a run does that goes on
    assert equal(small.raw(), [raw[0], shown[1]])
    assert equal(small.shown(), shown)
    assert list(small.averaging.raw_weights()) == ["0"]
    small.parameters[1].grad = None
    small.parameters[0].grad = torch.ones(5, 3)
    small.optimizer.step()
    small.averaging.update()
    assert torch.equal(small.shown()[1], shown[1])
    assert torch.equal(small.raw()[1], shown[1])


class Watcher(Recorder):
    """Keeps the weights with which previews are drawn, and those that are trained, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.recipe: DreamBooth
        self.previewed: dict[int, dict[str, Tensor]] = {}
        self.trained: dict[int, dict[str, Tensor]] = {}

    def weights(self) -> dict[str, Tensor]:
        saved = self.recipe.session.trainable.saved({})
        if saved.adapter is None:
            return dict(saved.weights or {})
        found = saved.adapter.layers.items()
        return {f"{name}.{part}": tensor for name, layer in found for part, tensor in layer.tensors().items()}

    def report(self, event: Any) -> None:
        super().report(event)
        if isinstance(event, Phase) and event.name == "preview" and event.done == 0:
            self.previewed[self.recipe.step] = self.weights()
        if hasattr(event, "loss"):
            self.trained[event.step] = self.weights()


def watched(world: World, folder: Path, **changes: Any) -> tuple[Any, Watcher]:
    listener = Watcher()
    listener.recipe = world.recipe(folder, listener, **changes)
    with accelerate_state_kept():
        try:
            return listener.recipe.run(), listener
        finally:
            listener.recipe.clean_up()


def without_alpha(path: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in load_file(path).items() if not name.endswith(".alpha")}


@pytest.mark.parametrize(
    "changes",
    [EMA, FREE, pytest.param({**FULL, **EMA}, marks=pytest.mark.slow)],
    ids=["EMA", "schedule-free", "full, EMA"],
)
def test_what_is_previewed_is_what_is_saved_and_exported(changes: dict[str, Any], world: World, tmp_path: Path) -> None:
    previews = {"preview_every": 2, "preview_steps": 1, "checkpoint_every": 1, "base_preview": "before-first-step"}
    result, listener = watched(world, tmp_path, **changes, **previews)
    file = "weights.safetensors" if "adapter" in changes else "adapter.safetensors"
    assert set(listener.previewed) == {0, 2, 4}
    for step in (2, 4):
        folder = result.run / f"step-{step:08d}"
        saved, drawn, trained = without_alpha(folder / file), listener.previewed[step], listener.trained[step]
        assert set(saved) == set(drawn)
        assert all(torch.equal(saved[name], tensor) for name, tensor in drawn.items())
        live = load_file(folder / "live.safetensors")
        assert sum(tensor.numel() for tensor in live.values()) == sum(tensor.numel() for tensor in trained.values())
        assert sum(tensor.double().sum() for tensor in live.values()) == pytest.approx(
            float(sum(tensor.double().sum() for tensor in trained.values()))
        )
        assert any(not torch.equal(saved[name], tensor) for name, tensor in trained.items())
    if "adapter" not in changes:
        exported = without_alpha(result.path)
        assert all(torch.equal(exported[name], tensor) for name, tensor in listener.previewed[4].items())


@pytest.mark.slow
def test_ema_does_not_touch_what_is_learned(world: World, tmp_path: Path) -> None:
    _, plain = watched(world, tmp_path / "plain", checkpoint_every=1)
    _, averaged = watched(world, tmp_path / "averaged", **EMA, preview_every=1, preview_steps=1)
    assert plain.losses == averaged.losses
    for step, weights in plain.trained.items():
        assert all(torch.equal(averaged.trained[step][name], tensor) for name, tensor in weights.items())


@pytest.mark.slow
def test_previews_do_not_touch_what_is_learned_schedule_free(world: World, tmp_path: Path) -> None:
    plain = world.train(tmp_path / "plain", **FREE)
    watching = world.train(tmp_path / "watching", **FREE, preview_every=1, preview_steps=1)
    assert_same_end(watching, plain)


HALF: dict[str, Any] = {**TEXT, "text_encoder_until": 0.5}


@pytest.mark.parametrize("way", mostly_slow(WAYS, "EMA"))
def test_a_text_encoder_that_leaves_says_what_the_file_says(way: str, world: World, tmp_path: Path) -> None:
    """From the step at which it stays, its part of the file no longer changes, and has no raw weights of its own."""
    result = world.train(tmp_path, **HALF, **WAYS[way], checkpoint_every=1)
    folders = [result.run / f"step-{step:08d}" for step in (2, 3, 4)]
    for earlier, later in pairwise(folders):
        moved = differing(earlier / "adapter.safetensors", later / "adapter.safetensors")
        assert moved
        assert not [name for name in moved if name.startswith("lora_te_")]
    before, after = (load_file(folder / "live.safetensors") for folder in folders[:2])
    assert set(after) < set(before)


def test_without_an_average_there_is_no_further_file(finished: Finished) -> None:
    assert {path.name for path in (finished.result.run / "step-00000001").iterdir()} == {
        "adapter.safetensors",
        "optimizer.safetensors",
        "state.json",
    }


def test_lost_raw_weights_are_named(world: World, tmp_path: Path) -> None:
    run = world.train(tmp_path, **EMA, steps=1).run
    (run / "step-00000001" / "live.safetensors").unlink()
    with pytest.raises(StorageError) as caught:
        world.train(tmp_path, **EMA)
    assert str(run / "step-00000001") in caught.value.problem
    assert "elete" in caught.value.remedy
