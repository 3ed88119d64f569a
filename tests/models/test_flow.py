"""Flow matching: noise, targets, noise levels and steps of the sampler are those of diffusers and of the papers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", minversion="0.37")  # what it is compared with came with that version

from diffusers import FlowMatchEulerDiscreteScheduler
from pack.trainer.core.errors import SettingsError
from pack.trainer.models.flow import FlowObjective, LinearMu, flux2_sampling_mu, shifted
from pack.trainer.models.objective import Objective
from pack.trainer.settings.objective import ObjectiveSettings

CPU = torch.device("cpu")
PLAIN = ObjectiveSettings()
KLEIN = {  # the scheduler's configuration of FLUX.2 klein
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}


def flow(mu: float = 0.0) -> FlowObjective:
    """With the same shift for all sizes."""
    return FlowObjective(training_mu=lambda tokens: mu, sampling_mu=lambda tokens, steps: mu)


def flux2() -> FlowObjective:
    return FlowObjective(training_mu=LinearMu(), sampling_mu=flux2_sampling_mu)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighting", ["none", "logit_normal"])
def test_noise_and_target_are_those_of_diffusers_training_example(weighting: str) -> None:
    """The example's own lines, at timesteps that its helper draws."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    scheduler = FlowMatchEulerDiscreteScheduler(**KLEIN)
    torch.manual_seed(0)
    uniform = compute_density_for_timestep_sampling(weighting, batch_size=16, logit_mean=0.0, logit_std=1.0)
    indices = (uniform * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[indices]
    sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1)
    latents, noise = normal(16, 8, 4, 4, seed=1), normal(16, 8, 4, 4, seed=2)
    noisy = (1.0 - sigmas) * latents + sigmas * noise

    objective: Objective = flux2()
    torch.testing.assert_close(objective.add_noise(latents, noise, timesteps), noisy, rtol=0, atol=1e-6)
    assert torch.equal(objective.target(latents, noise, timesteps), noise - latents)
    prediction = normal(16, 8, 4, 4, seed=3)
    theirs = ((prediction - (noise - latents)) ** 2).reshape(16, -1).mean(1)
    torch.testing.assert_close(objective.loss(prediction, latents, noise, timesteps), theirs)


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("side", [16, 32, 64, 96])
def test_sampler_takes_the_steps_of_diffusers(steps: int, side: int) -> None:
    """At 256² to 1536², with the shift as the FLUX.2 pipeline computes it, along the same predictions."""
    pipeline = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2", reason="needs diffusers 0.37")
    theirs: Any = FlowMatchEulerDiscreteScheduler(**KLEIN)
    mu = pipeline.compute_empirical_mu(image_seq_len=side * side, num_steps=steps)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = flux2().make_scheduler("euler", steps, (128, side, side), CPU)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-3)

    one = other = normal(1, 4, 2, 2) * ours.init_noise_sigma
    for our_timestep, their_timestep in zip(ours.timesteps, theirs.timesteps, strict=True):
        prediction = torch.sin(one + float(our_timestep) / 300)
        scaled = ours.scale_model_input(one, our_timestep)
        assert torch.equal(scaled, one)
        one = ours.step(prediction, our_timestep, one, return_dict=False)[0]
        other = theirs.step(prediction, their_timestep, other, return_dict=False)[0]
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_exact_predictions_lead_back_to_the_latents() -> None:
    latents, noise = normal(2, 4, 2, 2, seed=1), normal(2, 4, 2, 2, seed=2)
    for steps in (1, 3, 20):
        scheduler = flux2().make_scheduler("ddim", steps, (128, 32, 32), CPU)
        found = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            expected = flow().add_noise(latents, noise, timestep.expand(2))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            found = scheduler.step(noise - latents, timestep, found, return_dict=False)[0]
        torch.testing.assert_close(found, latents, rtol=0, atol=1e-5)


def test_another_sampler_is_refused() -> None:
    with pytest.raises(SettingsError, match="can't be used"):
        flow().make_scheduler("pndm", 4, (4, 8, 8), CPU)


@pytest.mark.parametrize("mu", [0.0, 1.15])
def test_dpm_solver_goes_straight_to_the_latents(mu: float) -> None:
    """On lines of one direction each step of any order is exact, but diffusers begins at σ = 0.999 instead of 1."""
    objective = flow(mu)
    noise, latents = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    scheduler = objective.make_scheduler("dpm++", 6, (4, 8, 8), CPU)
    assert scheduler.timesteps[0] == pytest.approx(1000 * shifted(1 - 1 / 1000, mu), abs=2)
    sample = noise
    for timestep in scheduler.timesteps:
        sample = scheduler.step(noise - latents, timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, latents, rtol=0, atol=5e-3)


def test_training_shift_is_that_of_the_references() -> None:
    """At 512² and 1024², which are 1024 and 4096 tokens of FLUX.2; a quarter of them is a known mistake."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for pixels, mu in ((256, 0.5), (512, 0.63), (1024, 1.15)):
        tokens = (pixels // 16) ** 2
        assert LinearMu()(tokens) == pytest.approx(mu, abs=1e-9)
        assert LinearMu()(tokens) == pytest.approx(calculate_shift(tokens), abs=1e-9)
        middle = flux2().timestep_at(0.5, PLAIN, (128, pixels // 16, pixels // 16))
        assert middle == pytest.approx(1000 * shifted(0.5, mu))
        packed = FlowObjective(LinearMu(), flux2_sampling_mu, patch=2)  # FLUX.1: eight pixels a latent
        assert packed.timestep_at(0.5, PLAIN, (16, pixels // 8, pixels // 8)) == pytest.approx(middle)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_noise_levels_are_drawn_as_the_settings_say(sampling: str, shift: float) -> None:
    """Quantiles beside those of many levels that diffusers draws, shifted as its scheduler does."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    settings = ObjectiveSettings(timestep_sampling=sampling, timestep_shift=shift)
    weighting = "none" if sampling == "uniform" else "logit_normal"
    generator = torch.Generator().manual_seed(0)
    drawn = compute_density_for_timestep_sampling(
        weighting, batch_size=200_000, logit_mean=0.0, logit_std=1.0, generator=generator
    )
    theirs = FlowMatchEulerDiscreteScheduler().time_shift(math.log(shift or 2.0), 1.0, drawn)
    quantiles = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    ours = [flow(math.log(2.0)).timestep_at(float(quantile), settings, (4, 8, 8)) for quantile in quantiles]
    # 200 000 drawn levels tell a quantile to a few thousandths
    torch.testing.assert_close(torch.tensor(ours) / 1000, torch.quantile(theirs, quantiles), rtol=0, atol=5e-3)


def test_bias_and_range_hold_for_uniform_levels_too() -> None:
    settings = ObjectiveSettings(
        timestep_sampling="uniform", timestep_shift=1.0, timestep_bias=1.0, min_timestep=200, max_timestep=600
    )
    assert flow().timestep_at(0.25, settings, (4, 8, 8)) == pytest.approx(200 + 400 * 0.5)
    assert flow().timestep_at(0.0, settings, (4, 8, 8)) == 200


def test_shift_is_that_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**KLEIN)
    for mu in (-0.5, 0.0, 0.63, 1.15, 2.02):
        for sigma in (0.001, 0.3, 0.5, 0.999, 1.0):
            assert shifted(sigma, mu) == pytest.approx(
                float(scheduler.time_shift(mu, 1.0, torch.tensor(sigma))), rel=1e-5
            )
    assert shifted(0.5, math.log(3.0)) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))  # a static shift of 3


def test_noise_levels_are_logit_normal() -> None:
    """Quantiles at evenly spaced fractions are a sample of the distribution: its logits are standard normal."""
    fractions = [(index + 0.5) / 4000 for index in range(4000)]
    sigmas = torch.tensor([flow().timestep_at(fraction, PLAIN, (4, 8, 8)) / 1000 for fraction in fractions])
    logits = torch.logit(sigmas.double())
    assert float(logits.mean()) == pytest.approx(0, abs=1e-3)
    assert float(logits.std()) == pytest.approx(1, abs=1e-2)
    assert float((logits**4).mean()) == pytest.approx(3, abs=0.1)
    torch.manual_seed(0)
    from diffusers.training_utils import compute_density_for_timestep_sampling

    theirs = compute_density_for_timestep_sampling("logit_normal", 4000, logit_mean=0.0, logit_std=1.0).sort().values
    assert float((theirs - sigmas.sort().values).abs().max()) < 0.05  # the largest distance of two samples of 4000
    moved = torch.tensor([flow(1.15).timestep_at(fraction, PLAIN, (4, 8, 8)) / 1000 for fraction in fractions])
    assert float(torch.logit(moved.double()).mean()) == pytest.approx(1.15, abs=1e-3)  # a shift moves the logits


def test_range_and_bias_of_timesteps() -> None:
    narrow = ObjectiveSettings(min_timestep=200, max_timestep=600)
    found = [flow().timestep_at(fraction, narrow, (4, 8, 8)) for fraction in (0.0, 0.25, 0.5, 0.75, 1 - 1e-12)]
    assert found == sorted(found)
    assert 200 < found[0] < 210
    assert found[2] == pytest.approx(400)
    assert 590 < found[-1] < 600
    noisier = ObjectiveSettings(timestep_bias=1.0)  # the share below x is the square
    assert flow().timestep_at(0.25, noisier, (4, 8, 8)) == pytest.approx(500)


def test_with_a_right_prediction_the_line_is_followed() -> None:
    latents, noise = torch.randn((2, 2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    here, following = torch.tensor([900.0, 500.0]), torch.tensor([750.0, 0.0])
    noisy = flow().add_noise(latents, noise, here)
    advanced = flow().advance(noisy, flow().target(latents, noise, here), here, following)
    torch.testing.assert_close(advanced, flow().add_noise(latents, noise, following))


def test_settings_of_discrete_schedules_are_refused() -> None:
    for values in ({"loss_weighting": "min-snr"}, {"zero_terminal_snr": True}):
        [name] = values
        with pytest.raises(SettingsError, match=name):
            flow().with_settings(ObjectiveSettings(**values))


def test_losses_and_masks_are_those_of_every_objective() -> None:
    objective = flow().with_settings(ObjectiveSettings(loss="huber", huber_c=0.1))
    error = torch.full((1, 2, 2, 2), 10.0)
    zeros = torch.zeros_like(error)
    at = torch.tensor([500.0])
    assert objective.loss(error, zeros, zeros, at).item() == pytest.approx(
        2 * 0.1 * (math.hypot(10, 0.1) - 0.1), rel=1e-5
    )
    assert objective.plain().loss(error, zeros, zeros, at).item() == pytest.approx(100)
    error[..., 1] = 0
    mask = torch.tensor([1.0, 0.0]).expand(1, 1, 2, 2)
    assert flow().loss(error, zeros, zeros, at, mask).item() == pytest.approx(100)
    assert flow().loss(error, zeros, zeros, at).item() == pytest.approx(50)
