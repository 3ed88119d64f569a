"""The loss on held-out pictures: they are never learned from, and watching them changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from helpers import Recorder
from pack.trainer.cli.train import run_train
from pack.trainer.core.errors import CancelledError, PicturesError
from pack.trainer.core.events import Step, Validation
from pack.trainer.core.seeding import generator
from pack.trainer.data.images import load_pictures, split_validation
from pack.trainer.dreambooth import DreamBooth
from pack.trainer.settings.train import TrainCommand
from pack.trainer.training.runs.index import RunIndex
from pack.trainer.training.runs.metrics import read_metrics, validated_steps
from worlds import (
    PROMPT,
    Finished,
    World,
    assert_same_end,
    differing,
    held_out_loss,
    noisy_pictures,
    perturb,
)

pytestmark = pytest.mark.usefixtures("quick")

HELD: dict[str, Any] = {"validation_pictures": 2, "checkpoint_every": 2, "steps": 5}
# All that validation could disturb: random numbers of layers, and networks that are trained besides the denoiser.
TOUCHY: dict[str, Any] = {**HELD, "dropout": 0.3, "text_encoder_lr": 1e-2, "flip": True, "noise_offset": 0.1}

# Of the loss that the run is taught by, which is another one than it is measured by.
OTHERWISE: dict[str, Any] = {"loss": "huber", "loss_weighting": "min-snr", "noise_offset": 0.5, "min_timestep": 900}


@pytest.fixture(scope="module")
def world(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = noisy_pictures(tmp_path_factory.mktemp("validation") / "subject", 5, 0)
    return replace(tiny_world, subject=load_pictures(folder, PROMPT, Recorder()))


def told(listener: Recorder) -> dict[int, float]:
    found = [event for event in listener.events if isinstance(event, Validation)]
    assert len({one.step for one in found}) == len(found)
    return {one.step: one.loss for one in found}


def prepared(world: World, folder: Path, **changes: Any) -> DreamBooth:
    return world.prepared(folder, **{**HELD, **changes})


def test_some_pictures_are_held_out(world: World) -> None:
    for seed in range(20):
        taught, held = split_validation(world.subject, 2, seed)
        assert (len(taught), len(held)) == (3, 2)
        assert sorted(one.digest for one in [*taught, *held]) == sorted(one.digest for one in world.subject)
    assert len({tuple(one.digest for one in split_validation(world.subject, 2, seed)[1]) for seed in range(20)}) > 3


@pytest.mark.slow
def test_held_out_pictures_are_not_among_those_that_teach(world: World, tmp_path: Path) -> None:
    recipe = prepared(world, tmp_path)
    assert recipe.session.cache.validation is not None
    taught, held = split_validation(world.subject, 2, 0)
    alone = [prepared(replace(world, subject=[one]), tmp_path, validation_pictures=0) for one in [*taught, *held]]
    latents = [one.session.cache.instance.mean[0] for one in alone]
    for found, wanted in zip(
        [*recipe.session.cache.instance.mean, *recipe.session.cache.validation.mean], latents, strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.slow
def test_a_run_learns_only_from_the_others(world: World, tmp_path: Path) -> None:
    """Bit for bit what a run without the held-out pictures learns, with dropout and a trained text encoder, too."""
    taught, _ = split_validation(world.subject, 2, 0)
    watched = world.train(tmp_path / "watched", **TOUCHY)
    fewer = replace(world, subject=taught)
    plain = fewer.train(tmp_path / "plain", **{**TOUCHY, "validation_pictures": 0})
    assert_same_end(watched, plain)
    assert watched.run.name != plain.run.name


@pytest.mark.parametrize("changes", [{}, OTHERWISE], ids=["plain", "taught otherwise"])
def test_the_loss_is_that_of_a_plain_loop(changes: dict[str, Any], world: World, tmp_path: Path) -> None:
    """The base's own, written out with diffusers' schedule, whatever the run is taught by."""
    recipe = prepared(world, tmp_path, **changes)
    assert (len(recipe.session.cache.instance), len(recipe.session.cache.validation or ())) == (3, 2)
    assert held_out_loss(recipe) == pytest.approx(plain_loss(recipe), rel=1e-4)  # a batch is summed in another order


def plain_loss(recipe: DreamBooth) -> float:
    latents = recipe.session.cache.validation
    assert latents is not None
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    losses = []
    recipe.session.model.denoiser.eval()
    for picture in range(2):
        clean = latents.mean[picture][:1]
        for number, timestep in enumerate((100, 300, 500, 700, 900)):
            noise = torch.randn(clean.shape, generator=generator("validation", picture, number))
            at = torch.tensor([timestep])
            said = recipe.session.text.rows(latents.captions[picture][:1]) | {"size": latents.size[picture][None]}
            with torch.no_grad():
                found = recipe.session.model.predict(schedule.add_noise(clean, noise, at), at, said)
            losses.append(float(F.mse_loss(found, noise)))
    return sum(losses) / len(losses)


@pytest.mark.slow
def test_the_loss_is_the_same_whatever_a_run_is_taught_by(world: World, tmp_path: Path) -> None:
    wanted = plain_loss(prepared(world, tmp_path / "prepared"))
    for folder, changes in (("plain", {}), ("other", {**OTHERWISE, "dropout": 0.5})):
        listener = Recorder()
        world.train(tmp_path / folder, listener, **{**HELD, "steps": 1, **changes})
        assert told(listener)[0] == pytest.approx(wanted, rel=1e-4)


def test_the_same_weights_have_the_same_loss_whenever_it_is_asked(world: World, tmp_path: Path) -> None:
    recipe = prepared(world, tmp_path, dropout=0.5, text_encoder_lr=1e-2)
    latents = recipe.session.cache.validation
    assert latents is not None
    before = held_out_loss(recipe)
    state = torch.random.get_rng_state()
    assert [held_out_loss(recipe) for _ in range(3)] == [before] * 3
    assert torch.equal(torch.random.get_rng_state(), state)
    for network in (recipe.session.model.denoiser, *recipe.session.model.text_encoders.values()):
        network.train()
    torch.manual_seed(1)
    assert held_out_loss(recipe) == before
    assert all(parameter.grad is None for parameter in recipe.session.trainable.parameters())
    perturb(recipe.session.trainable)  # type: ignore[arg-type]
    assert held_out_loss(recipe) != before


def test_training_goes_on_in_training_mode(world: World, tmp_path: Path) -> None:
    """Else dropout would end with the first look at held-out pictures."""

    class Watching(Recorder):
        def report(self, event: Any) -> None:
            super().report(event)
            if isinstance(event, Step):
                modes.append(
                    [
                        one.training
                        for one in (recipe.session.model.denoiser, *recipe.session.model.text_encoders.values())
                    ]
                )

    modes: list[list[bool]] = []
    recipe = world.recipe(tmp_path, Watching(), **{**TOUCHY, "checkpoint_every": 1, "steps": 2})
    recipe.run()
    assert modes == [[True, True]] * 2


def test_every_checkpoint_is_told_once_and_recorded(world: World, tmp_path: Path) -> None:
    listener = Recorder()
    result = world.train(tmp_path, listener, **HELD)
    found = told(listener)
    assert list(found) == [0, 2, 4, 5]
    assert len(set(found.values())) == 4
    lines = read_metrics(result.run / "metrics.jsonl")
    assert {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line} == found
    assert validated_steps(result.run / "metrics.jsonl") == sorted(found)
    scores = RunIndex(result.run.parent).curve(result.run.name)["scores"]
    assert {one["step"]: one["scores"]["validation_loss"] for one in scores} == pytest.approx(found, rel=1e-5)
    assert [one["step"] for one in RunIndex(result.run.parent).curve(result.run.name, after=2)["scores"]] == [4, 5]
    again = Recorder()
    world.train(tmp_path, again, **HELD)
    assert told(again) == {}


@pytest.mark.slow
def test_a_resumed_run_tells_what_the_straight_one_told(world: World, tmp_path: Path) -> None:
    """Stopped before, at and after a step with a checkpoint, after each of which the loss is computed."""
    straight = Recorder()
    expected = world.train(tmp_path / "straight", straight, **TOUCHY)
    for stop in (1, 2, 3):
        first, second = Recorder(stop_after=5 + stop), Recorder()
        with pytest.raises(CancelledError) as stopped:
            world.train(tmp_path / str(stop), first, **TOUCHY)
        assert stopped.value.step == stop
        result = world.train(tmp_path / str(stop), second, **TOUCHY)
        assert result.started_from == stop
        assert_same_end(result, expected)
        assert not set(told(first)) & set(told(second))
        together = told(first) | told(second)
        assert {step: loss for step, loss in together.items() if step != stop or stop == 2} == told(straight)
        lines = [line["step"] for line in read_metrics(result.run / "metrics.jsonl") if "validation_loss" in line]
        assert lines == sorted(together)


def test_a_run_without_held_out_pictures_tells_nothing(finished: Finished) -> None:
    assert told(finished.listener) == {}
    assert all("validation_loss" not in line for line in read_metrics(finished.result.run / "metrics.jsonl"))


@pytest.mark.parametrize("count", [5, 6])
def test_too_many_held_out_pictures_are_told_before_any_work(count: int, world: World, tmp_path: Path) -> None:
    listener = Recorder()
    with pytest.raises(PicturesError, match=f"validation_pictures is {count}, but there are only 5") as refused:
        world.train(tmp_path, listener, validation_pictures=count)
    assert "Lower validation_pictures" in refused.value.remedy
    assert not listener.events
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_before_class_pictures_are_made(tiny_checkpoint: Path, tmp_path: Path) -> None:
    values = {
        "base": tiny_checkpoint,
        "images": noisy_pictures(tmp_path / "dog", 2, 0),
        "instance_prompt": PROMPT,
        "class_prompt": "a photo of a dog",
        "prior_count": 2,
        "validation_pictures": 2,
        "resolution": 64,
        "output_dir": tmp_path / "output",
        "device": "cpu",
    }
    with pytest.raises(PicturesError, match="validation_pictures is 2"):
        run_train(TrainCommand.checked(values), Recorder())
    assert not (tmp_path / "output" / "class-pictures").exists()
    assert not (tmp_path / "output" / "runs").exists()


@pytest.mark.slow
def test_longer_runs_keep_the_same_pictures_apart(world: World, tmp_path: Path) -> None:
    """A run that goes on for more steps has no picture held out that it learned from, and tells nothing twice."""
    first, second = Recorder(), Recorder()
    short = world.train(tmp_path, first, **HELD)
    long = world.train(tmp_path, second, **{**HELD, "steps": 7})
    assert long.started_from == 5
    assert (list(told(first)), list(told(second))) == ([0, 2, 4, 5], [6, 7])
    straight = world.train(tmp_path / "straight", **{**HELD, "steps": 7})
    assert short.run == long.run
    assert differing(long.path, straight.path) == []
