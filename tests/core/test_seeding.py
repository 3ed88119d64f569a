"""Every draw is a pure function of (run seed, kind, step, slot)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Recorder
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.core.seeding import Draw, derived_seed, draw_sample
from pack.trainer.data.images import load_pictures
from pack.trainer.dreambooth import train
from pack.trainer.models.open import open_base
from pack.trainer.models.sampling import GenerationConfig, generate
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.runs.folder import RunPaths

LARGEST = 2**64 - 1
SHAPE = (4, 8, 8)


def drawn(seed: int = 0, kind: str = "instance", step: int = 0, slot: int = 0, slots: int = 1, **more: Any) -> Draw:
    return draw_sample(seed, kind, step, slot, slots, [SHAPE] * more.pop("count", 5), **more)


def same(first: Draw, second: Draw) -> bool:
    return (
        (first.item, first.flip, first.timestep) == (second.item, second.flip, second.timestep)
        and (first.timestep_fraction, first.caption, first.drop)
        == (second.timestep_fraction, second.caption, second.drop)
        and torch.equal(first.noise, second.noise)
        and torch.equal(first.posterior_noise, second.posterior_noise)
    )


@given(seed=st.integers(0, LARGEST), step=st.integers(0, 10**6), slot=st.integers(0, 63), count=st.integers(1, 40))
def test_a_draw_depends_on_its_numbers_alone(seed: int, step: int, slot: int, count: int) -> None:
    first = drawn(seed, step=step, slot=slot, slots=64, count=count, flip=True)
    torch.randn(3)  # the global generator goes on meanwhile
    drawn(seed, step=step + 1, slots=64, count=count)
    assert same(first, drawn(seed, step=step, slot=slot, slots=64, count=count, flip=True))
    assert 0 <= first.item < count
    assert 0 <= first.timestep < 1000
    assert first.noise.shape == first.posterior_noise.shape == SHAPE
    assert first.noise.dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"seed": LARGEST},
        {"seed": 2**63},
        {"seed": 2**32},
        {"kind": "class"},
        {"step": 1},
        {"slot": 1, "slots": 2},
    ],
    ids=str,
)
def test_other_numbers_give_other_draws(change: dict[str, Any]) -> None:
    first, second = drawn(), drawn(**change)
    assert not torch.equal(first.noise, second.noise)
    assert not torch.equal(first.posterior_noise, second.posterior_noise)


def test_step_and_slot_are_not_exchangeable() -> None:
    assert not torch.equal(drawn(step=1, slot=2, slots=4).noise, drawn(step=2, slot=1, slots=4).noise)


def test_the_two_noises_of_a_draw_are_independent() -> None:
    pairs = [drawn(step=step) for step in range(200)]
    noise = torch.stack([d.noise for d in pairs]).flatten()
    posterior = torch.stack([d.posterior_noise for d in pairs]).flatten()
    assert abs(float((noise * posterior).mean())) < 0.02
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


def test_kinds_are_independent() -> None:
    """The subject's order and timesteps say nothing of the class pictures'."""
    pairs = [(drawn(step=step, count=10), drawn(kind="class", step=step, count=10)) for step in range(300)]
    assert 10 < sum(a.item == b.item for a, b in pairs) < 60
    assert sum(a.timestep == b.timestep for a, b in pairs) < 5


@pytest.mark.parametrize(("count", "slots"), [(1, 1), (5, 1), (5, 2), (7, 3), (4, 4), (3, 8)])
def test_every_epoch_shows_every_picture_once(count: int, slots: int) -> None:
    order = [
        drawn(9, step=step, slot=slot, slots=slots, count=count).item for step in range(21) for slot in range(slots)
    ]
    epochs = [order[start : start + count] for start in range(0, len(order) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 3:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_samples_do_not_depend_on_how_a_step_is_divided() -> None:
    """Slots count over passes and processes, so four at once are two and two."""
    at_once = [drawn(3, step=6, slot=slot, slots=4) for slot in range(4)]
    divided = [drawn(3, step=6, slot=2 * part + place, slots=4) for part in range(2) for place in range(2)]
    assert all(same(a, b) for a, b in zip(at_once, divided, strict=True))


def test_flips_and_timesteps_are_even() -> None:
    draws = [drawn(step=step, flip=True) for step in range(2000)]
    assert 900 < sum(d.flip for d in draws) < 1100
    tenths = Counter(d.timestep // 100 for d in draws)
    assert set(tenths) == set(range(10))
    assert all(130 < number < 280 for number in tenths.values())
    assert max(drawn(step=step, timesteps=10).timestep for step in range(200)) == 9


def test_flipping_changes_nothing_else() -> None:
    for step in range(20):
        plain, flipped = drawn(step=step), drawn(step=step, flip=True)
        assert not plain.flip
        assert plain.timestep == flipped.timestep
        assert torch.equal(plain.noise, flipped.noise)


def test_derived_seeds_tell_their_parts_apart() -> None:
    parts = [
        (1, 23),
        (12, 3),
        ("1", 23),
        (1, "23"),
        (1, 2, 3),
        ("a", "b"),
        ("ab",),
        (0,),
        (LARGEST,),
        (LARGEST + 1,),
        (),
    ]
    seeds = [derived_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed <= LARGEST for seed in seeds)


def test_draws_are_fixed() -> None:
    """A change here would make every unfinished run go on with other draws."""
    assert derived_seed(0, "instance", 0, 0) == 15154511240165758001
    first = drawn(42, step=3, slot=1, slots=2, flip=True)
    assert (first.item, first.flip, first.timestep) == (3, True, 471)
    assert first.noise.flatten()[:2].tolist() == pytest.approx([0.835192, -0.245728], abs=1e-6)
    further = [first.timestep_fraction, first.caption, first.drop]
    assert further == pytest.approx([0.33870163373846085, 0.6594724571593182, 0.9946430744572202], abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.5},
    ],
    ids=["plain", "dropout"],
)
def test_a_whole_run_leaves_the_global_generators_alone(
    changes: dict[str, Any], tiny_checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = open_base(tiny_checkpoint)
    pictures = load_pictures(picture_folder(), "a photo of sks dog", Recorder())
    class_pictures = load_pictures(picture_folder(count=2, name="class"), "a dog", Recorder())
    losses = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        random.seed(global_seed)
        before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
        settings = TrainSettings(steps=2, rank=4, resolution=64, seed=LARGEST, flip=True, **changes)
        folder, listener = tmp_path / str(global_seed), Recorder()
        train(base, pictures, class_pictures, settings, RunPaths(folder, folder / "runs"), "cpu", listener)
        generate(base.family.build(base), "a dog", [LARGEST], GenerationConfig(width=64, height=64, steps=1))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert random.getstate() == before[2]
        losses.append(listener.losses)
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
