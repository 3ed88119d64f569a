"""The samples of a step: which pictures, which captions, which noise, which timesteps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..core.seeding import Draw, draw
from ..models.objective import perturbed_noise, shaped_noise, timestep_at
from ..settings.train import TrainSettings
from .latent_cache import LatentCache, LatentDataset

SINGLE_PROCESS = (0, 1)


@dataclass(frozen=True)
class Batch:
    """Samples of one shape for one forward pass, on the device.

    Attributes:
        latents: (batch, channels, height, width), float32.
        noise: As `latents`: what the loss asks for.
        added: As `latents`: the noise that is added.
        timesteps: (batch,), int64.
        captions: Row of each sample's caption, (batch,), int64.
        sizes: Size and crop of each sample's picture, (batch, 6), float32.
        weights: Weight of each sample's loss in the loss of the micro-batch, (batch,), float32.
        masks: Weight of each place, (batch, 1, height, width), float32; None: all alike.
    """

    latents: Tensor
    noise: Tensor
    added: Tensor
    timesteps: Tensor
    captions: Tensor
    sizes: Tensor
    weights: Tensor
    masks: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        parts = [(part.name, getattr(self, part.name)) for part in fields(self)]
        moved: dict[str, Any] = {name: None if one is None else one.to(device) for name, one in parts}
        return Batch(**moved)


def draw_batches(
    cache: LatentCache,
    settings: TrainSettings,
    step: int,
    micro: int,
    timesteps: int,
    device: torch.device,
    share: tuple[int, int] = SINGLE_PROCESS,
) -> Iterator[Batch]:
    """The samples of one micro-batch: `batch_size` of the subject and as many of the class, a batch for each shape.

    Args:
        cache: Encoded pictures.
        settings: Seed, batch size, flip, noise, captions, weight of the class pictures.
        step: Optimiser step, from 0.
        micro: Micro-batch of the step, from 0.
        timesteps: Number of diffusion timesteps.
        device: Where the samples go.
        share: Which of how many processes this is; together they take batch_size times as many samples.
    """
    sets = [("instance", cache.instance, 1.0)]
    if cache.prior is not None:
        sets.append(("class", cache.prior, settings.prior_weight))
    found: dict[tuple[int, ...], list[Batch]] = {}
    for kind, latents, weight in sets:
        empty = cache.empty if kind == "instance" else None
        for one in _draws(kind, latents, settings, step, micro, timesteps, share):
            sample = _sample(latents, one, settings, timesteps, empty, weight / settings.batch_size)
            found.setdefault(tuple(sample.latents.shape[1:]), []).append(sample)
    for samples in found.values():
        yield collate(samples).to(device)


def _draws(
    kind: str,
    latents: LatentDataset,
    settings: TrainSettings,
    step: int,
    micro: int,
    timesteps: int,
    share: tuple[int, int],
) -> list[Draw]:
    index, processes = share
    slots = settings.batch_size * settings.gradient_accumulation * processes
    first = (micro * processes + index) * settings.batch_size
    flip = settings.flip and kind == "instance"
    return [
        draw(settings.seed, kind, step, slot, slots, latents.shapes, timesteps, flip)
        for slot in range(first, first + settings.batch_size)
    ]


def _sample(
    latents: LatentDataset, drawn: Draw, settings: TrainSettings, timesteps: int, empty: int | None, weight: float
) -> Batch:
    """One sample, as a batch on the CPU."""
    picture = latents.order[drawn.item]
    noise = shaped_noise(drawn.noise, settings, drawn.source)
    timestep = timestep_at((drawn.timestep + drawn.fraction) / timesteps, timesteps, settings)
    rows = latents.captions[picture]
    dropped = empty is not None and drawn.drop < settings.caption_dropout
    caption = empty if dropped else int(rows[int(drawn.caption * len(rows))])
    return Batch(
        latents.sample(picture, drawn)[None],
        noise[None],
        perturbed_noise(noise, settings, drawn.source)[None],
        torch.tensor([timestep]),
        torch.tensor([caption]),
        latents.size[picture][None],
        torch.tensor([weight], dtype=torch.float32),
        latents.mask_of(picture, drawn, settings.mask_background),
    )


def collate(samples: Sequence[Batch]) -> Batch:
    """Samples of one shape in one batch; those without a mask get one of ones if others have one."""
    masked = [one.masks for one in samples if one.masks is not None]
    masks = None
    if masked:
        plain = torch.ones_like(masked[0])
        masks = torch.cat([plain if one.masks is None else one.masks for one in samples])
    names = [part.name for part in fields(Batch) if part.name != "masks"]
    return Batch(**{name: torch.cat([getattr(one, name) for one in samples]) for name in names}, masks=masks)
