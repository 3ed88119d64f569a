"""The samples of a step: which pictures, which captions, which noise, which timesteps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..core.devices import sent
from ..core.seeding import Draw, draw_sample
from ..models.objective import Objective, perturbed_noise, shaped_noise
from ..settings.train import TrainSettings
from .latent_cache import LatentCache, LatentDataset

SINGLE_PROCESS = (0, 1)


@dataclass(frozen=True)
class Batch:
    """Samples of one shape for one forward pass, on the device but for `captions`.

    Attributes:
        latents: (batch, channels, height, width), float32.
        noise: As `latents`: the noise that the loss compares with.
        added_noise: As `latents`: the noise that is added; differs from `noise` if that is perturbed.
        timesteps: (batch,); int64 of a discrete schedule, float32 of a continuous one.
        captions: Row of each sample's caption, (batch,), int64, on the CPU.
        sizes: Size and crop of each sample's picture, (batch, 6), float32.
        weights: Weight of each sample's loss in the micro-batch's loss, (batch,), float32.
        masks: Weight of each latent pixel, (batch, 1, height, width), float32; None: all the same.
        subject: The number of samples that are the subject's; these come first.
    """

    latents: Tensor
    noise: Tensor
    added_noise: Tensor
    timesteps: Tensor
    captions: Tensor
    sizes: Tensor
    weights: Tensor
    masks: Tensor | None
    subject: int = 0

    def to(self, device: torch.device) -> Batch:
        """The same on a device; see `sent`."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            travels = isinstance(value, Tensor) and field.name != "captions"
            moved[field.name] = sent(value, device) if travels else value
        return Batch(**moved)


def draw_batches(
    cache: LatentCache,
    settings: TrainSettings,
    step: int,
    micro_batch: int,
    objective: Objective,
    device: torch.device,
    share: tuple[int, int] = SINGLE_PROCESS,
) -> Iterator[Batch]:
    """The samples of one micro-batch: `batch_size` of the subject and as many of the class, one batch per shape.

    Args:
        cache: Encoded pictures.
        settings: Seed, batch size, flip, noise, captions, weight of the class pictures.
        step: Optimiser step, from 0.
        micro_batch: Of the step, from 0.
        objective: Which timesteps there are, and how they are distributed.
        device: Where the samples go.
        share: Index of this process and number of processes; together they take batch_size times as many samples.
    """
    datasets = [("instance", cache.instance, 1.0)]
    if cache.prior is not None:
        datasets.append(("class", cache.prior, settings.prior_weight))
    by_shape: dict[tuple[int, ...], list[Batch]] = {}
    for kind, dataset, weight in datasets:
        empty_caption = cache.empty if kind == "instance" else None
        for draw in draw_slots(kind, dataset, settings, step, micro_batch, objective, share):
            sample = _sample(dataset, draw, settings, objective, empty_caption, weight / settings.batch_size)
            sample = replace(sample, subject=int(kind == "instance"))
            by_shape.setdefault(tuple(sample.latents.shape[1:]), []).append(sample)
    for samples in by_shape.values():
        yield collate(samples).to(device)


def draw_slots(
    kind: str,
    dataset: LatentDataset,
    settings: TrainSettings,
    step: int,
    micro_batch: int,
    objective: Objective,
    share: tuple[int, int],
) -> list[Draw]:
    """The draws of this process's sample slots in one micro-batch; see `draw_batches`.

    Args:
        kind: Which set of pictures, "instance", "class" or "preserved"; the sets are independent.
        dataset: The pictures.
        settings: See `draw_batches`.
        step: Optimiser step, or another number that counts up.
        micro_batch: See `draw_batches`.
        objective: See `draw_batches`.
        share: See `draw_batches`.
    """
    process, processes = share
    slots = settings.batch_size * settings.gradient_accumulation * processes
    first = (micro_batch * processes + process) * settings.batch_size
    flip = settings.flip and kind != "class"
    return [
        draw_sample(settings.seed, kind, step, slot, slots, dataset.shapes, objective.timesteps, flip)
        for slot in range(first, first + settings.batch_size)
    ]


def _sample(
    dataset: LatentDataset,
    draw: Draw,
    settings: TrainSettings,
    objective: Objective,
    empty_caption: int | None,
    weight: float,
) -> Batch:
    """One sample, as a batch on the CPU."""
    picture = dataset.order[draw.item]
    noise = shaped_noise(draw.noise, settings, draw.source)
    added_noise = perturbed_noise(noise, settings, draw.source)
    fraction = (draw.timestep + draw.timestep_fraction) / objective.timesteps
    timestep = objective.timestep_at(fraction, settings, dataset.shapes[draw.item])
    rows = dataset.captions[picture]
    caption = int(rows[int(draw.caption * len(rows))])
    if empty_caption is not None and draw.drop < settings.caption_dropout:
        caption = empty_caption
    return Batch(
        latents=dataset.sample(picture, draw)[None],
        noise=noise[None],
        added_noise=added_noise[None],
        timesteps=torch.tensor([timestep]),
        captions=torch.tensor([caption]),
        sizes=dataset.size[picture][None],
        weights=torch.tensor([weight], dtype=torch.float32),
        masks=dataset.loss_mask(picture, draw, settings.mask_background),
    )


def collate(samples: Sequence[Batch]) -> Batch:
    """Samples of one shape in one batch; those without a mask get one of ones if others have one."""
    mask = next((sample.masks for sample in samples if sample.masks is not None), None)
    masks = None
    if mask is not None:
        ones = torch.ones_like(mask)
        masks = torch.cat([ones if sample.masks is None else sample.masks for sample in samples])
    names = [field.name for field in fields(Batch) if field.name not in ("masks", "subject")]
    tensors: dict[str, Any] = {name: torch.cat([getattr(sample, name) for sample in samples]) for name in names}
    return Batch(**tensors, masks=masks, subject=sum(sample.subject for sample in samples))
