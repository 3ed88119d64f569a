"""Every objective does what its paper says: against formulas, diffusers and kohya's trainer."""

from __future__ import annotations

import math
import traceback
from bisect import bisect_right
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from checkpoints_folders import diffusers_folder
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from helpers import Recorder
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.core.errors import SettingsError, WeightsError
from pack.trainer.core.seeding import draw_sample, generator
from pack.trainer.data.batches import Batch, draw_batches
from pack.trainer.dreambooth import DreamBooth
from pack.trainer.models.objective import (
    DiffusionObjective,
    make_objective,
    perturbed_noise,
    pyramid_noise,
    shaped_noise,
    timestep_at,
)
from pack.trainer.models.open import open_base
from pack.trainer.settings.objective import ObjectiveSettings
from pack.trainer.settings.train import TrainSettings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import World, assert_same_end, losses, make_world

pytestmark = pytest.mark.usefixtures("quick")

ALL = torch.arange(1000)
THEIRS = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
# What kohya's trainer computes (sd-scripts at 48d368fa, library/custom_train_functions.py: apply_snr_weight and
# apply_debiased_estimation; library/train_util.py: conditional_loss with get_huber_threshold_if_needed, in float64).
PLACES = [0, 10, 100, 300, 500, 700, 900, 999]
KOHYAS_WEIGHTS: dict[tuple[str, str, float], list[float]] = {
    ("min-snr", "epsilon", 1.0): [0.0008507448, 0.009661135, 0.1182891, 0.6934777, 1.0, 1.0, 1.0, 1.0],
    ("min-snr", "epsilon", 5.0): [0.004253724, 0.04830568, 0.5914455, 1.0, 1.0, 1.0, 1.0, 1.0],
    ("min-snr", "v_prediction", 1.0): [
        *(0.0008500217, 0.009568691, 0.1057769, 0.4094992),
        *(0.2763325, 0.08252081, 0.01415113, 0.004660094),
    ],
    ("min-snr", "v_prediction", 5.0): [
        *(0.004250109, 0.04784346, 0.5288843, 0.5905008),
        *(0.2763325, 0.08252081, 0.01415113, 0.004660094),
    ],
    ("debiased", "epsilon", 5.0): [
        *(0.03162278, 0.09829108, 0.3439318, 0.8327531),
        *(1.61828, 3.33439, 8.3466, 14.61465),
    ],
    ("debiased", "v_prediction", 5.0): [
        *(0.000999001, 0.009568691, 0.1057769, 0.4094992),
        *(0.7236676, 0.9174792, 0.9858489, 0.9953399),
    ],
}
ERRORS = [0.001, 0.1, 1.0, 3.0]
KOHYAS_HUBER: dict[tuple[str, float, int], list[float]] = {
    ("huber", 0.1, 10): [9.999751e-07, 0.008284271, 0.1809975, 0.5803332],
    ("huber", 0.1, 999): [9.999751e-07, 0.008284271, 0.1809975, 0.5803332],
    ("huber", 0.5, 500): [9.999991e-07, 0.009901952, 0.618034, 2.541381],
    ("huber-snr", 0.1, 10): [9.999997e-07, 0.009965322, 0.7848788, 3.842931],
    ("huber-snr", 0.1, 500): [9.999954e-07, 0.009571808, 0.3677936, 1.284835],
    ("huber-snr", 0.1, 999): [9.999768e-07, 0.00837076, 0.1869907, 0.6010155],
    ("huber-snr", 0.5, 500): [9.999993e-07, 0.009924978, 0.6641055, 2.84323],
}


def shaped(kind: str = "epsilon", **settings: Any) -> DiffusionObjective:
    return make_objective(kind).with_settings(ObjectiveSettings(**settings))


def loss_of(objective: DiffusionObjective, error: Tensor, timesteps: Tensor) -> Tensor:
    """The loss of a prediction that is wrong by `error`, (batch, channels, height, width)."""
    zeros = torch.zeros_like(error)  # so that the target is zero, too, and the error keeps its digits
    return objective.loss(error, zeros, zeros, timesteps)


def exact(values: list[float]) -> Any:
    return pytest.approx(values, rel=2e-5)


# Weights of timesteps


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
def test_min_snr_is_the_papers(kind: str, gamma: float) -> None:
    snr = compute_snr(THEIRS, ALL)
    wanted = torch.minimum(snr, torch.full_like(snr, gamma)) / (snr + 1 if kind == "v_prediction" else snr)
    weights = shaped(kind, loss_weighting="min-snr", min_snr_gamma=gamma).timestep_weights
    assert weights is not None
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=0)
    assert 0 < (weights < weights.max()).sum() < 1000


@pytest.mark.parametrize(("weighting", "kind", "gamma"), KOHYAS_WEIGHTS)
def test_weights_are_kohyas(weighting: str, kind: str, gamma: float) -> None:
    """In the loss itself: the error is one everywhere, so the loss is the weight."""
    objective = shaped(kind, loss_weighting=weighting, min_snr_gamma=gamma)
    losses = loss_of(objective, torch.ones(len(PLACES), 1, 2, 2), torch.tensor(PLACES))
    assert losses.tolist() == exact(KOHYAS_WEIGHTS[weighting, kind, gamma])


def test_without_a_limit_min_snr_weighs_all_alike() -> None:
    """1000 is the largest γ and above all but the first timestep's ratio."""
    weights = shaped(loss_weighting="min-snr", min_snr_gamma=1000.0).timestep_weights
    assert weights is not None
    assert (weights[2:] == 1).all()
    assert weights[0] < 1
    assert shaped().timestep_weights is None
    error = torch.randn((1000, 1, 2, 2), generator=torch.Generator().manual_seed(1))
    plain, weighed = (loss_of(one, error, ALL) for one in (shaped(), replaced_weights(weights)))
    assert torch.equal(plain[2:], weighed[2:])


def replaced_weights(weights: Tensor) -> DiffusionObjective:
    plain = make_objective()
    return DiffusionObjective(plain.prediction_type, plain.alphas_cumprod, weights)


def test_a_velocitys_weights_are_those_of_its_epsilon() -> None:
    """The error of the noise is √ᾱ times that of the velocity, so that its square weighs ᾱ = snr/(snr + 1) as much."""
    for weighting in ("min-snr", "debiased"):
        epsilon, velocity = (
            shaped(kind, loss_weighting=weighting).timestep_weights for kind in ("epsilon", "v_prediction")
        )
        assert epsilon is not None
        assert velocity is not None
        ratio = (velocity / epsilon)[1:]
        alphas = make_objective().alphas_cumprod[1:]
        snr = alphas / (1 - alphas)
        wanted = alphas if weighting == "min-snr" else snr.sqrt() / (snr + 1)
        torch.testing.assert_close(ratio, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("weighting", ["min-snr", "debiased"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("loss", ["mse", "huber", "huber-snr"])
def test_pure_noise_gives_a_finite_loss_and_gradient(kind: str, weighting: str, loss: str) -> None:
    rescaled = make_objective(kind, zero_terminal_snr=True)
    assert rescaled.snr[-1] == 0
    objective = rescaled.with_settings(ObjectiveSettings(loss_weighting=weighting, loss=loss))
    prediction = torch.randn((1, 4, 2, 2), generator=torch.Generator().manual_seed(1), requires_grad=True)
    latents = torch.ones(1, 4, 2, 2)
    value = objective.loss(prediction, latents, -latents, torch.tensor([999])).sum()
    value.backward()
    assert prediction.grad is not None
    assert torch.isfinite(value)
    assert torch.isfinite(prediction.grad).all()


# What an error counts


@pytest.mark.parametrize(("loss", "c", "place"), KOHYAS_HUBER)
def test_huber_is_kohyas(loss: str, c: float, place: int) -> None:
    error = torch.tensor(ERRORS).view(-1, 1, 1, 1)
    losses = loss_of(shaped(loss=loss, huber_c=c), error, torch.full((len(ERRORS),), place))
    assert losses.tolist() == exact(KOHYAS_HUBER[loss, c, place])


def test_huber_is_squared_for_small_errors_and_linear_for_large() -> None:
    signs, at = torch.tensor([-1.0, 1.0]).view(-1, 1, 1, 1), torch.tensor([500, 500])
    objective = shaped(loss="huber", huber_c=0.1)
    assert loss_of(objective, 1e-3 * signs, at).tolist() == pytest.approx([1e-6, 1e-6], rel=1e-3)
    once, twice = (loss_of(objective, large * signs, at) for large in (1000.0, 2000.0))
    assert (twice - once).tolist() == pytest.approx([200.0, 200.0], rel=1e-3)  # 2c for each


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 3.0])
def test_a_huber_beyond_all_errors_is_squared(size: float) -> None:
    """In float32, as it is trained."""
    error = size * torch.randn((8, 4, 8, 8), generator=torch.Generator().manual_seed(2))
    zeros, at = torch.zeros_like(error), torch.arange(8)
    plain, wide = (
        one.loss(error, zeros, zeros, at) for one in (shaped(loss="mse"), shaped(loss="huber", huber_c=100.0))
    )
    torch.testing.assert_close(wide, plain, rtol=2e-3, atol=0)


def test_huber_snr_goes_from_one_to_c() -> None:
    """Its tangent at large errors is 2c: nearly 2 without noise, nearly 2c with much of it, falling between."""
    objective = shaped(loss="huber-snr", huber_c=0.1)
    ends = [loss_of(objective, torch.full((1000, 1, 1, 1), large), ALL) for large in (1e4, 2e4)]
    slopes = (ends[1] - ends[0]) / 1e4
    assert (slopes.diff() < 0).all()
    sigma = ((1 - THEIRS.alphas_cumprod) / THEIRS.alphas_cumprod).sqrt()
    torch.testing.assert_close(slopes.float(), 2 * (0.9 / (1 + sigma) ** 2 + 0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", ["mse", "huber", "huber-snr"])
def test_a_mask_weighs_places_whatever_the_loss(loss: str) -> None:
    objective = shaped(loss=loss, loss_weighting="min-snr")
    error = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(3))
    zeros, at = torch.zeros_like(error), torch.tensor([100, 900])
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    half = [part[..., :2] for part in (error, zeros, zeros)]
    torch.testing.assert_close(objective.loss(error, zeros, zeros, at, mask), objective.loss(*half, at))
    ones = torch.full_like(mask, 0.25)
    torch.testing.assert_close(objective.loss(error, zeros, zeros, at, ones), objective.loss(error, zeros, zeros, at))


# The schedule


def test_a_rescaled_schedule_is_diffusers() -> None:
    once = shaped("v_prediction", zero_terminal_snr=True)
    wanted = torch.cumprod(1 - rescale_zero_terminal_snr(THEIRS.betas), dim=0)
    torch.testing.assert_close(once.alphas_cumprod, wanted, rtol=0, atol=2e-6)
    assert once.alphas_cumprod[-1] == 0
    assert once.alphas_cumprod[0] == pytest.approx(float(THEIRS.alphas_cumprod[0]), rel=1e-6)
    twice = once.with_settings(ObjectiveSettings(zero_terminal_snr=True))
    torch.testing.assert_close(twice.alphas_cumprod, once.alphas_cumprod, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weighting", ["min-snr", "debiased"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_rescaled_schedule_is_weighed_by_its_own_noise(kind: str, weighting: str) -> None:
    """The weights belong to the noise that is added, not to that of the schedule before it was rescaled."""
    together = make_objective(kind).with_settings(ObjectiveSettings(zero_terminal_snr=True, loss_weighting=weighting))
    after = shaped(kind, zero_terminal_snr=True).with_settings(ObjectiveSettings(loss_weighting=weighting))
    assert together.timestep_weights is not None
    assert after.timestep_weights is not None
    torch.testing.assert_close(together.timestep_weights, after.timestep_weights, rtol=0, atol=0)
    before = shaped(kind, loss_weighting=weighting).timestep_weights
    assert before is not None
    assert not torch.allclose(together.timestep_weights, before)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_right_prediction_leads_from_noise_to_less(zero_terminal_snr: bool) -> None:
    """For both prediction types, from pure noise as well: only the velocity tells what noise alone hides."""
    latents, noise = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    following = torch.tensor([700, 300, 0])
    for kind in ("epsilon", "v_prediction"):
        objective = make_objective(kind, zero_terminal_snr=zero_terminal_snr)
        here = torch.tensor([999 if kind == "v_prediction" else 900, 500, 120])
        noisy = objective.add_noise(latents, noise, here)
        advanced = objective.advance(noisy, objective.target(latents, noise, here), here, following)
        torch.testing.assert_close(advanced, objective.add_noise(latents, noise, following), rtol=1e-4, atol=1e-4)


def test_the_other_settings_leave_the_schedule() -> None:
    other = ObjectiveSettings(loss="huber", loss_weighting="debiased", noise_offset=0.1, timestep_bias=1.0)
    assert torch.equal(make_objective().with_settings(other).alphas_cumprod, make_objective().alphas_cumprod)


@pytest.mark.parametrize("betas", [[0.0, 0.5], [0.1, 1.0]], ids=["no noise at first", "pure noise at last"])
def test_a_schedule_may_reach_both_ends(betas: list[float]) -> None:
    found = make_objective(scheduler={"trained_betas": betas, "num_train_timesteps": 2}).alphas_cumprod
    assert found.tolist() == pytest.approx([1 - betas[0], (1 - betas[0]) * (1 - betas[1])])


@pytest.mark.parametrize("betas", [[-0.5, 0.9], [0.5, 1.5], [-0.5, 1.5]], ids=["above one", "below zero", "both"])
def test_what_gives_no_schedule_is_refused(betas: list[float]) -> None:
    with pytest.raises(WeightsError, match="valid noise schedule"):
        make_objective(scheduler={"trained_betas": betas, "num_train_timesteps": 2})


def test_a_configuration_is_rescaled_where_the_model_is() -> None:
    """Not where it says so for a model whose prediction was chosen otherwise."""
    config = {name: value for name, value in THEIRS.config.items() if not name.startswith("_")}  # as a file has it
    config |= {"rescale_betas_zero_snr": True}
    assert DDPMScheduler.from_config(config).alphas_cumprod[-1] < THEIRS.alphas_cumprod[-1] / 2
    assert torch.equal(make_objective(scheduler=config).alphas_cumprod, THEIRS.alphas_cumprod)
    assert make_objective("v_prediction", config, zero_terminal_snr=True).alphas_cumprod[-1] == 0


def test_the_schedule_and_the_weights_go_to_the_device() -> None:
    there = shaped(loss_weighting="min-snr").to(torch.device("meta"))
    assert there.alphas_cumprod.is_meta
    assert there.timestep_weights is not None
    assert there.timestep_weights.is_meta


# Noise


# Numbers of a wide and of a tall noise: shaped, and with the perturbation.
FIXED_NOISE = {
    (2, 4, 24): (
        [-0.7371917, -0.7610708, 0.1521656, 0.8361484, -1.8705176, -0.2428780],
        [-0.2297819, -0.2272273, 0.1341671, 0.9462900, -1.7670897, -0.5396057],
    ),
    (2, 24, 4): (
        [-0.7612046, 1.0558293, 0.6748810, 0.8631327, -3.0562875, -0.3294912],
        [-0.2537948, 1.4014938, 0.6117866, 0.9732744, -2.8414733, -0.0563207],
    ),
}


@pytest.mark.parametrize("shape", FIXED_NOISE, ids=str)
def test_what_is_added_to_noise_is_fixed(shape: tuple[int, ...]) -> None:
    """A change here would make every unfinished run go on with other noise."""
    settings = ObjectiveSettings(
        noise_offset=0.5, multires_noise_iterations=6, multires_noise_discount=0.8, input_perturbation=0.3
    )
    source = generator(5)
    noise = shaped_noise(torch.randn(shape, generator=torch.Generator().manual_seed(0)), settings, source)
    for one, expected in zip((noise, perturbed_noise(noise, settings, source)), FIXED_NOISE[shape], strict=True):
        numbers = one[:, 0, :3] if shape[2] > shape[1] else one[:, :3, 0]
        assert numbers.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def white(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_plain_noise_is_left_as_it_is() -> None:
    noise, plain = white(4, 8, 8), ObjectiveSettings(multires_noise_discount=0.9)
    assert shaped_noise(noise, plain, generator(0)) is noise
    assert perturbed_noise(noise, plain, generator(0)) is noise


def test_an_offset_is_the_same_over_a_channel() -> None:
    noise, offset = white(10_000, 4, 4), 0.25
    found = shaped_noise(noise, ObjectiveSettings(noise_offset=offset), generator(1))
    added = found - noise
    torch.testing.assert_close(added, added.mean(dim=(1, 2), keepdim=True).expand_as(added), rtol=0, atol=1e-6)
    assert float(added.mean(dim=(1, 2)).var()) == pytest.approx(offset**2, rel=0.05)
    assert float(found.mean(dim=(1, 2)).var()) == pytest.approx(1 / 16 + offset**2, rel=0.05)
    neighbours = torch.corrcoef(torch.stack([added[:-1, 0, 0], added[1:, 0, 0]]))[0, 1]
    assert abs(float(neighbours)) < 0.05  # each channel has its own


def band_powers(noises: list[Tensor]) -> list[float]:
    """Mean power of square noises by distance from the spectrum's middle, in six rings; 1 for white noise."""
    spectra = torch.fft.fft2(torch.stack(noises)).abs().pow(2).mean((0, 1)) / noises[0][0].numel()
    places = torch.fft.fftfreq(len(spectra)) * len(spectra)
    radius = (places[:, None] ** 2 + places[None] ** 2).sqrt()
    edges = [0, 2, 4, 8, 16, 24, 46]
    return [float(spectra[(radius > low) & (radius <= high)].mean()) for low, high in pairwise(edges)]


# What kohya's pyramid_noise_like gives on (1, 4, 64, 64), the mean of 600 noises.
KOHYAS_SPECTRA = {
    (6, 0.3): [1.686, 1.4317, 1.2115, 1.0247, 0.9806, 0.9775],
    (10, 0.8): [20.2003, 6.1051, 2.3022, 0.9937, 0.7456, 0.7295],
    (1, 0.3): [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize(("iterations", "discount"), KOHYAS_SPECTRA)
def test_pyramid_noise_has_kohyas_spectrum(iterations: int, discount: float) -> None:
    source = generator("pyramid")
    noises = [
        pyramid_noise(torch.randn((4, 64, 64), generator=source), iterations, discount, source) for _ in range(150)
    ]
    assert all(float(one.std()) == pytest.approx(1, abs=1e-5) for one in noises)
    found = band_powers(noises)
    assert found == pytest.approx(KOHYAS_SPECTRA[iterations, discount], rel=0.15)
    if iterations > 1:
        assert found == sorted(found, reverse=True)


def test_pyramid_noise_is_for_any_shape() -> None:
    for shape in ((4, 4, 4), (4, 8, 24), (4, 1, 1)):
        found = pyramid_noise(white(*shape), 20, 1.0, generator(3))
        assert found.shape == shape
        assert torch.isfinite(found).all()


def test_perturbation_widens_what_is_added() -> None:
    noise, gamma = white(4, 128, 128), 0.5
    added = perturbed_noise(noise, ObjectiveSettings(input_perturbation=gamma), generator(2))
    assert float(added.var()) == pytest.approx(1 + gamma**2, rel=0.03)
    assert float((added - noise).var()) == pytest.approx(gamma**2, rel=0.03)
    together = torch.corrcoef(torch.stack([noise.flatten(), (added - noise).flatten()]))[0, 1]
    assert abs(float(together)) < 0.02


# Timesteps


@given(st.integers(0, 999), st.floats(1e-9, 1 - 1e-9))
def test_by_default_a_timestep_is_the_one_that_was_drawn(timestep: int, fraction: float) -> None:
    assert timestep_at((timestep + fraction) / 1000, 1000, ObjectiveSettings()) == timestep


@given(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([1, 10, 100, 999, 1000]),
    st.integers(0, 999),
    st.integers(1, 1000),
    st.floats(-4, 4),
)
def test_the_range_is_never_left(place: float, timesteps: int, first: int, end: int, bias: float) -> None:
    first, end = min(first, end - 1), max(end, first + 1)
    settings = ObjectiveSettings(min_timestep=first, max_timestep=end, timestep_bias=bias)
    found = timestep_at(place, timesteps, settings)
    assert 0 <= found < timesteps
    if timesteps == 1000:
        assert first <= found < end


def test_the_last_place_is_the_last_timestep() -> None:
    """Also where its power rounds to one, and where the range ends between two timesteps."""
    last = 1 - 2.0**-53
    assert timestep_at(last, 1000, ObjectiveSettings(timestep_bias=4.0)) == 999
    assert timestep_at(last, 500, ObjectiveSettings(max_timestep=999)) == 498


@cache
def drawn_places() -> list[float]:
    """Where on the line from 0 to 1 the timesteps of 2000 steps are drawn."""
    draws = [draw_sample(7, "instance", step, 0, 1, [(1, 1, 1)]) for step in range(2000)]
    return [(one.timestep + one.timestep_fraction) / 1000 for one in draws]


@pytest.mark.parametrize("bias", [-2.0, -0.5, 0.0, 0.5, 2.0])
@pytest.mark.parametrize(("first", "end"), [(0, 1000), (200, 700)])
def test_the_share_of_timesteps_below_x_is_a_power_of_x(bias: float, first: int, end: int) -> None:
    settings = ObjectiveSettings(min_timestep=first, max_timestep=end, timestep_bias=bias)
    places, count = drawn_places(), 2000
    found = sorted(timestep_at(place, 1000, settings) for place in places)
    wanted = [((one + 1 - first) / (end - first)) ** 2**bias for one in found]  # share up to and with it
    upper = [bisect_right(found, one) / count for one in found]
    distance = max(abs(ours - theirs) for ours, theirs in zip(upper, wanted, strict=True))
    assert distance < 1.63 / math.sqrt(count)  # Kolmogorov and Smirnov's at 1 %


# In a run


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("objectives")
    return make_world(tiny_checkpoint, folder / "subject").with_priors(folder / "class")


@pytest.fixture(scope="module")
def velocity(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = diffusers_folder(tmp_path_factory.mktemp("velocity") / "model", "sd2", velocity=True)
    return World(open_base(folder), world.subject, world.priors)


def prepared(world: World, folder: Path, **changes: Any) -> DreamBooth:
    recipe = world.recipe(folder, **changes)
    recipe.open_run()
    recipe.prepare()
    return recipe


def batches_of(recipe: DreamBooth, step: int = 0) -> list[Batch]:
    return list(draw_batches(recipe.session.cache, recipe.settings, step, 0, make_objective(), recipe.device))


SETTINGS: dict[str, dict[str, Any]] = {
    "huber": {"loss": "huber", "huber_c": 0.2},
    "huber-snr": {"loss": "huber-snr"},
    "min-snr": {"loss_weighting": "min-snr", "min_snr_gamma": 1.0},
    "debiased": {"loss_weighting": "debiased"},
    "offset": {"noise_offset": 0.1},
    "pyramid": {"multires_noise_iterations": 4, "multires_noise_discount": 0.5},
    "perturbation": {"input_perturbation": 0.2},
    "timesteps": {"min_timestep": 300, "max_timestep": 600, "timestep_bias": 1.0},
    "all": {
        "loss": "huber-snr",
        "loss_weighting": "min-snr",
        "noise_offset": 0.1,
        "multires_noise_iterations": 4,
        "input_perturbation": 0.2,
        "min_timestep": 300,
        "timestep_bias": -1.0,
        "batch_size": 2,
        "gradient_accumulation": 2,
    },
}


def test_by_default_a_step_sees_what_was_drawn(world: World, tmp_path: Path) -> None:
    recipe = prepared(world, tmp_path)
    for step in range(5):
        [batch] = batches_of(recipe, step)
        shapes = {"instance": 3, "class": 2}
        draws = [draw_sample(0, kind, step, 0, 1, [(4, 8, 8)] * count) for kind, count in shapes.items()]
        assert batch.timesteps.tolist() == [one.timestep for one in draws]
        assert torch.equal(batch.noise, torch.stack([one.noise for one in draws]))
        assert torch.equal(batch.added_noise, batch.noise)


@pytest.fixture(scope="module")
def plain(world: World, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """The first batch of a run with the usual noise."""
    return batches_of(prepared(world, tmp_path_factory.mktemp("plain")))[0]


@pytest.mark.parametrize("name", ["offset", "pyramid", "perturbation", "timesteps"])
def test_noise_and_timesteps_change_nothing_else_of_a_sample(
    name: str, plain: Batch, world: World, tmp_path: Path
) -> None:
    other = batches_of(prepared(world, tmp_path / "other", **SETTINGS[name]))[0]
    assert torch.equal(plain.latents, other.latents)
    assert torch.equal(plain.captions, other.captions)
    assert torch.equal(plain.timesteps, other.timesteps) == (name != "timesteps")
    assert torch.equal(plain.noise, other.noise) == (name not in ("offset", "pyramid"))
    assert torch.equal(other.added_noise, other.noise) == (name != "perturbation")


FORMULAS = [(name, kind) for kind in ("epsilon", "velocity") for name in SETTINGS]
EVERYDAY = [("huber", "epsilon"), ("huber-snr", "velocity"), ("all", "epsilon"), ("perturbation", "epsilon")]
EVERYDAY += [(name, kind) for kind in ("epsilon", "velocity") for name in ("min-snr", "debiased")]


@pytest.mark.parametrize(("name", "kind"), mostly_slow(FORMULAS, *EVERYDAY))
def test_a_step_has_the_loss_of_the_formulas(
    name: str, kind: str, request: pytest.FixtureRequest, world: World, tmp_path: Path
) -> None:
    """From the batch on, written out once more, with diffusers' schedule."""
    values = {**SETTINGS[name], "prior_weight": 0.7}
    recipe = prepared(world if kind == "epsilon" else request.getfixturevalue(kind), tmp_path, **values)
    settings, total = recipe.settings, torch.zeros(())
    with torch.no_grad():
        found = sum(losses(recipe, 0))
        for batch in batches_of(recipe):
            at, size = batch.timesteps, settings.batch_size
            noisy = THEIRS.add_noise(batch.latents, batch.added_noise, at)
            conditioning = recipe.session.text.rows(batch.captions) | {"size": batch.sizes}
            prediction = recipe.session.model.predict(noisy, at, conditioning)
            target = batch.noise if kind == "epsilon" else THEIRS.get_velocity(batch.latents, batch.noise, at)
            error, snr = (prediction - target).double(), compute_snr(THEIRS, at).double().view(-1, 1, 1, 1)
            c = {"mse": 0, "huber": settings.huber_c}.get(settings.loss, 0.9 / (1 + snr**-0.5) ** 2 + 0.1)
            counted = error**2 if settings.loss == "mse" else 2 * c * ((error**2 + c**2).sqrt() - c)
            divisor = snr + 1 if kind == "velocity" else snr
            debiased = 1 / divisor if kind == "velocity" else snr**-0.5
            weights = {"min-snr": snr.clamp(max=settings.min_snr_gamma) / divisor, "debiased": debiased}
            counted = counted * weights.get(settings.loss_weighting, torch.ones_like(snr))
            each = counted.mean(dim=(1, 2, 3))
            assert len(each) == 2 * size  # the subject's and the class's
            total = total + each[:size].mean() + 0.7 * each[size:].mean()
    assert float(found) == pytest.approx(float(total), rel=1e-4)


class Waits(TorchDispatchMode):
    """Notes which files ask for a tensor's value, which waits for a device that is still computing it."""

    def __init__(self) -> None:
        super().__init__()
        self.files: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "aten.equal")):
            places = [Path(frame.filename) for frame in traceback.extract_stack()]
            self.files.add([path for path in places if "torch" not in path.parts][-2].name)  # the last is this one
        return function(*args, **(kwargs or {}))


FURTHER = {"dropout": 0.2, "text_encoder_lr": 1e-3, "max_norm": 1.0, "flip": True}


@pytest.mark.parametrize("further", mostly_slow([{}, FURTHER], FURTHER))
def test_a_step_waits_for_no_device(further: dict[str, Any], world: World, tmp_path: Path) -> None:
    """What is asked for its value lies on the CPU on every device: what is drawn, and AdamW's count of steps."""
    recipe = prepared(world, tmp_path, **SETTINGS["all"], **further)
    recipe.train_step(1.0)
    with Waits() as waits:
        recipe.train_step(1.0)
    assert waits.files == {"seeding.py", "objective.py", "batches.py", "optimizer.py"}
    with Waits() as waits:
        recipe._pending = (1, 1e-2, torch.ones(()))
        recipe._report_pending()
    assert waits.files == {"dreambooth.py"}  # as it is found where it is meant to be


@pytest.mark.slow
def test_a_run_with_every_objective_resumes_exactly(world: World, tmp_path: Path) -> None:
    """Objectives and noises keep no state: what a step draws depends on its number alone."""
    values = SETTINGS["all"]
    straight = world.train(tmp_path / "straight", **values)
    world.stop_after(2, tmp_path / "two", **values)
    resumed = world.train(tmp_path / "two", **values)
    assert resumed.started_from == 2
    assert_same_end(resumed, straight)


@pytest.mark.slow
def test_every_objective_learns_something_else(world: World, tmp_path: Path) -> None:
    """Each has a fingerprint of its own and adapters of its own."""
    runs = [
        world.train(tmp_path, name=f"run-{number}", steps=2, **values)
        for number, values in enumerate([{}, *SETTINGS.values()])
    ]
    assert len({one.run for one in runs}) == len(runs)
    assert len({one.adapter.metadata["sshs_model_hash"] for one in runs}) == len(runs)


# Zero terminal signal-to-noise ratio


def test_an_epsilon_model_is_not_taught_pure_noise(world: World, tmp_path: Path) -> None:
    listener = Recorder()
    with pytest.raises(SettingsError, match=r"v-prediction models.*this model predicts epsilon") as refused:
        world.train(tmp_path, listener, zero_terminal_snr=True)
    assert "zero_terminal_snr = off" in refused.value.remedy
    assert not listener.events
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_velocity_model_learns_pure_noise_and_resumes(velocity: World, tmp_path: Path) -> None:
    values = {"zero_terminal_snr": True, "min_timestep": 999, "loss_weighting": "debiased", "loss": "huber-snr"}
    listener = Recorder()
    straight = velocity.train(tmp_path / "straight", listener, **values)
    velocity.stop_after(2, tmp_path / "two", **values)
    assert_same_end(velocity.train(tmp_path / "two", **values), straight)
    assert all(math.isfinite(one) and one > 0 for one in listener.losses)


def test_pure_noise_asks_for_the_picture(velocity: World, tmp_path: Path) -> None:
    """At the last timestep nothing of the picture is seen, and the velocity is the picture's negative."""
    recipe = prepared(velocity, tmp_path, zero_terminal_snr=True, min_timestep=999)
    [batch] = batches_of(recipe)
    assert batch.timesteps.tolist() == [999, 999]
    objective = recipe.session.objective
    assert torch.equal(objective.add_noise(batch.latents, batch.added_noise, batch.timesteps), batch.added_noise)
    target = objective.target(batch.latents, batch.noise, batch.timesteps)
    assert torch.equal(target, -batch.latents)


def test_previews_are_drawn_with_the_rescaled_schedule(velocity: World, tmp_path: Path) -> None:
    """As the help of zero_terminal_snr says they must; everything else is as in a run without."""
    schedules = [
        prepared(velocity, tmp_path / str(on), zero_terminal_snr=on).session.model.objective for on in (False, True)
    ]
    assert [float(one.alphas_cumprod[-1]) == 0 for one in schedules] == [False, True]
    assert torch.equal(schedules[0].alphas_cumprod, velocity.base.family.build(velocity.base).objective.alphas_cumprod)


def test_defaults_are_the_plain_objective() -> None:
    """The settings of a run that asks for nothing of all this."""
    shaped, plain = make_objective().with_settings(TrainSettings()), make_objective()
    assert torch.equal(shaped.alphas_cumprod, plain.alphas_cumprod)
    assert (shaped.prediction_type, shaped.elementwise_loss, shaped.timestep_weights) == (
        plain.prediction_type,
        plain.elementwise_loss,
        None,
    )
