"""Generation against diffusers' own pipeline, and the promise that a seed is a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import mostly_slow
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from helpers import DEMO, Recorder
from pack.trainer.core.errors import CancelledError
from pack.trainer.models.families.base import DiffusionModel
from pack.trainer.models.open import open_base
from pack.trainer.models.sampling import (
    GenerationConfig,
    decode_latents,
    denoise,
    generate,
    starting_noise,
)
from pack.trainer.settings.train import GenerateCommand, SchedulerName
from torch import Tensor, nn

PROMPT, NEGATIVE = "a photo of a red dog in the snow", "a blue cat"
SCHEDULERS: dict[SchedulerName, Any] = {
    "ddim": lambda config: DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False),
    "pndm": lambda config: PNDMScheduler.from_config(config, skip_prk_steps=True, set_alpha_to_one=False),
    "euler": EulerDiscreteScheduler.from_config,
    "dpm++": DPMSolverMultistepScheduler.from_config,
}


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    base = open_base(DEMO / "base")
    built = base.family.build(base)
    for network in (built.denoiser, built.vae, *built.text_encoders.values()):
        nn.Module.float(network)
    return built


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "base", local_files_only=True).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(
    model: DiffusionModel,
    seeds: list[int],
    scheduler: SchedulerName = "ddim",
    *,
    steps: int = 6,
    guidance: float = 4.0,
    negative: str = "",
    interval: tuple[float, float] = (0.0, 1.0),
    listener: Any = None,
) -> Tensor:
    with torch.no_grad():
        rows = model.encode_prompts([PROMPT, negative])["text"]
    prompt, without = ({"text": row.expand(len(seeds), -1, -1)} for row in rows)
    noise = starting_noise(seeds, (4, 16, 16))
    start, end = interval
    config = GenerationConfig(
        width=128,
        height=128,
        scheduler=scheduler,
        steps=steps,
        guidance=guidance,
        guidance_start=start,
        guidance_end=end,
    )
    return denoise(model, noise, prompt, without, config, listener)


CASES = [
    pytest.param("ddim", 4.0, "", 6, id="ddim", marks=pytest.mark.slow),
    pytest.param("ddim", 7.5, NEGATIVE, 6, id="ddim, negative prompt"),
    pytest.param("ddim", 1.0, "", 6, id="ddim, no guidance", marks=pytest.mark.slow),
    pytest.param("pndm", 4.0, "", 7, id="pndm"),
    pytest.param("euler", 4.0, NEGATIVE, 6, id="euler, negative prompt"),
    pytest.param("dpm++", 4.0, "", 6, id="dpm++"),
    pytest.param("dpm++", 1.0, "", 15, id="dpm++, no guidance, 15 steps", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "guidance", "negative", "steps"), CASES)
def test_latents_equal_the_pipelines(
    name: SchedulerName, guidance: float, negative: str, steps: int, model: DiffusionModel, pipe: Any
) -> None:
    pipe.scheduler = SCHEDULERS[name](pipe.scheduler.config)
    expected = pipe(
        PROMPT,
        negative_prompt=negative,
        guidance_scale=guidance,
        num_inference_steps=steps,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
    ).images
    ours = latents_of(model, [11], name, steps=steps, guidance=guidance, negative=negative)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("width", "height"), mostly_slow([(64, 64), (64, 48)], (64, 48)))
def test_pictures_equal_the_pipelines(width: int, height: int, model: DiffusionModel, pipe: Any) -> None:
    pipe.scheduler = SCHEDULERS["ddim"](pipe.scheduler.config)
    [expected] = pipe(
        PROMPT,
        guidance_scale=4.0,
        num_inference_steps=3,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(5),
    ).images
    [ours] = generate(model, PROMPT, [5], GenerationConfig(width=width, height=height, steps=3, guidance=4.0))
    assert ours.size == expected.size == (width, height)
    difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1  # rounding


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_schedule_is_the_models(name: SchedulerName, model: DiffusionModel, pipe: Any) -> None:
    theirs = SCHEDULERS[name](pipe.scheduler.config)
    for steps in (1, 2, 30, 50):
        ours = model.objective.make_scheduler(name, steps, (4, 8, 8), torch.device("cpu"))
        torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)
        theirs.set_timesteps(steps)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("name", mostly_slow(SCHEDULERS, "ddim"))
def test_a_seed_is_a_picture(name: SchedulerName, model: DiffusionModel) -> None:
    """The same alone, again, and beside others in a batch; another seed is another picture."""
    together = latents_of(model, [3, 4, 2**64 - 1], name, steps=3)
    for row, seed in enumerate((3, 4, 2**64 - 1)):
        alone = latents_of(model, [seed], name, steps=3)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-4)
    assert torch.equal(alone, latents_of(model, [2**64 - 1], name, steps=3))
    assert (together[0] - together[1]).abs().max() > 0.1
    assert (together[1] - together[2]).abs().max() > 0.1


def test_generate_gives_one_picture_a_seed(model: DiffusionModel) -> None:
    config = GenerationConfig(width=64, height=64, steps=2)
    first, second = generate(model, PROMPT, [8, 9], config)
    [again] = generate(model, PROMPT, [8], config)
    difference = np.abs(np.asarray(first, dtype=int) - np.asarray(again, dtype=int))
    assert difference.max() <= 1
    assert first.mode == "RGB"
    assert first.tobytes() != second.tobytes()


@pytest.fixture
def batches(model: DiffusionModel) -> Iterator[list[int]]:
    """Sizes of the batches that run through the UNet."""
    seen: list[int] = []
    handle = model.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    yield seen
    handle.remove()


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (4.0, 4), (0.0, 4)])
def test_guidance_one_needs_one_pass(guidance: float, rows: int, model: DiffusionModel, batches: list[int]) -> None:
    latents_of(model, [1, 2], steps=3, guidance=guidance)
    assert batches == [rows] * 3


def plain_loop(
    model: DiffusionModel, scheduler: SchedulerName, steps: int, guidance: float, guided: Callable[[float], bool]
) -> Tensor:
    """Seed 5 as Kynkäänniemi et al. (2024) write it: two predictions where `guided` says so of a noise level, else one.

    The noise level is the standard deviation of the noise beside a signal of size 1, as in their equation 5.
    """
    with torch.no_grad():
        rows = model.encode_prompts([PROMPT, ""])["text"]
        sampler = model.objective.make_scheduler(scheduler, steps, (4, 16, 16), torch.device("cpu"))
        latents = starting_noise([5], (4, 16, 16)) * sampler.init_noise_sigma
        for timestep in sampler.timesteps:
            signal = model.objective.alphas_cumprod[int(timestep)]
            scaled = sampler.scale_model_input(latents, timestep)
            if guided(float(((1 - signal) / signal).sqrt())):
                both = {"text": torch.cat([rows[1:], rows[:1]])}
                without, having = model.predict(torch.cat([scaled] * 2), timestep.expand(2), both).chunk(2)
                prediction = without + guidance * (having - without)
            else:
                prediction = model.predict(scaled, timestep.expand(1), {"text": rows[:1]})
            latents = sampler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("name", mostly_slow(SCHEDULERS, "dpm++"))
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75)])
def test_guidance_in_an_interval_is_the_papers(
    name: SchedulerName, interval: tuple[float, float], model: DiffusionModel
) -> None:
    """Bit for bit; the whole interval is guidance in every step."""
    start, end = interval
    alphas = model.objective.alphas_cumprod
    sigmas = ((1 - alphas) / alphas).sqrt()
    last, first = (len(sigmas) - 1 - round(part * len(sigmas)) for part in (start, end))

    def guided(sigma: float) -> bool:
        return bool((first < 0 or sigma > sigmas[first]) and sigma <= sigmas[last])

    ours = latents_of(model, [5], name, steps=7, interval=interval)
    assert torch.equal(ours, plain_loop(model, name, 7, 4.0, guided))
    assert torch.equal(ours, latents_of(model, [5], name, steps=7)) == (interval == (0.0, 1.0))


@pytest.mark.parametrize(
    ("interval", "rows"),
    [
        ((0.0, 1.0), [4, 4, 4, 4, 4]),
        ((0.3, 1.0), [2, 4, 4, 4, 4]),  # timesteps 831, 665, 499, 333 and 167
        ((0.0, 0.6), [4, 4, 4, 2, 2]),
        ((0.3, 0.6), [2, 4, 4, 2, 2]),
        ((0.0, 0.1), [2, 2, 2, 2, 2]),
    ],
)
def test_outside_of_the_interval_there_is_one_pass(
    interval: tuple[float, float], rows: list[int], model: DiffusionModel, batches: list[int]
) -> None:
    latents_of(model, [1, 2], "dpm++", steps=5, interval=interval)
    assert batches == rows


def test_the_whole_interval_holds_every_timestep() -> None:
    whole = GenerationConfig(width=64, height=64)
    assert all(whole.guides(timestep, 1000) for timestep in (0, 1, 999, 1000))
    empty = GenerationConfig(width=64, height=64, guidance_start=1.0)
    assert not any(empty.guides(timestep, 1000) for timestep in (0, 1, 999, 1000))


def test_guidance_steers(model: DiffusionModel) -> None:
    """Zero follows the negative prompt alone, one the prompt alone, and more goes further the same way."""
    one, zero, half = (latents_of(model, [1], steps=1, guidance=g, negative=NEGATIVE) for g in (1.0, 0.0, 0.5))
    assert (one - zero).abs().max() > 1e-3
    torch.testing.assert_close(half, (one + zero) / 2, rtol=0, atol=1e-4)


MOST_STEPS = next(limit.le for limit in GenerateCommand.model_fields["steps"].metadata if hasattr(limit, "le"))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, MOST_STEPS])
def test_any_allowed_number_of_steps_works(
    name: SchedulerName, steps: int, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if steps > 3:  # so many passes take too long
        monkeypatch.setattr(model, "predict", lambda latents, timesteps, conditioning: 0.1 * latents)
    assert torch.isfinite(latents_of(model, [1], name, steps=steps, guidance=1.0)).all()


def test_decoded_pictures_are_the_autoencoders(model: DiffusionModel) -> None:
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = model.vae.decode(latents / model.vae.config.scaling_factor).sample
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for picture, values in zip(decode_latents(model, latents), expected, strict=True):
        assert np.abs(np.asarray(picture, dtype=int) - values).max() <= 1


def test_drawing_can_be_stopped(model: DiffusionModel, batches: list[int]) -> None:
    with pytest.raises(CancelledError):
        latents_of(model, [1], steps=6, listener=Recorder(stop_after=3))
    assert len(batches) == 2


def test_drawing_leaves_the_global_generator_alone(model: DiffusionModel) -> None:
    torch.manual_seed(77)
    before = torch.get_rng_state()
    for name in SCHEDULERS:
        latents_of(model, [1], name, steps=2)
    assert torch.equal(torch.get_rng_state(), before)
