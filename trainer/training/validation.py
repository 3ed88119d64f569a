"""The loss on pictures that are held out of the training, always at the same timesteps with the same noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.seeding import generator
from ..data.latent_cache import LatentDataset
from ..models.families.base import DiffusionModel
from ..models.objective import Objective
from ..settings.objective import ObjectiveSettings
from .text_conditioning import TextConditioning
from .trainable import evaluating

_TIMESTEP_FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def validation_loss(
    model: DiffusionModel,
    objective: Objective,
    text: TextConditioning,
    held_out: LatentDataset,
    dtype: torch.dtype,
) -> float:
    """Mean squared error of the prediction on held-out pictures, whatever the training loss is.

    Args:
        model: Its denoiser is on the device of the objective.
        objective: Of the run; its noise schedule and prediction type count.
        text: Conditioning on the captions.
        held_out: The encoded pictures; at least one.
        dtype: Type of the denoiser's input.
    """
    plain = objective.plain()
    losses: list[float] = []
    with evaluating(model):
        for picture in range(len(held_out)):
            for number, fraction in enumerate(_TIMESTEP_FRACTIONS):
                noise_source = generator("validation", picture, number)
                loss = _loss_at(model, plain, text, held_out, picture, fraction, noise_source, dtype)
                losses.append(float(loss))
    return sum(losses) / len(losses)


def _loss_at(
    model: DiffusionModel,
    objective: Objective,
    text: TextConditioning,
    held_out: LatentDataset,
    picture: int,
    timestep_fraction: float,
    noise_source: torch.Generator,
    dtype: torch.dtype,
) -> Tensor:
    """The loss of one picture at one timestep, (1,)."""
    device = objective.device
    latents = held_out.mean[picture][:1].to(device)
    noise = torch.randn(latents.shape, generator=noise_source).to(device)
    timestep = objective.timestep_at(timestep_fraction, ObjectiveSettings(), latents.shape[1:])
    timesteps = torch.tensor([timestep], device=device)
    noisy = objective.add_noise(latents, noise, timesteps).to(dtype)
    conditioning = text.rows(held_out.captions[picture][:1])
    conditioning["size"] = held_out.size[picture][None].to(device)
    prediction = model.predict(noisy, timesteps, conditioning)
    return objective.loss(prediction, latents, noise, timesteps)
