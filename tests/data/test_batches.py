"""A step's samples: each has the caption, the size, the mask and the weight of the picture that it shows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pack.trainer.data.batches import Batch, draw_batches
from pack.trainer.data.latent_cache import LatentCache, LatentDataset
from pack.trainer.models.objective import make_objective
from pack.trainer.settings.train import TrainSettings

CPU = torch.device("cpu")
EMPTY = 99
SUBJECT = range(1, 5)  # numbers by which pictures are known again in their latents, sizes and captions
CLASS = range(11, 15)
MIRRORED = 100


def dataset(numbers: range, *, mirrored: bool) -> LatentDataset:
    """Pictures whose latents are their number, and that plus `MIRRORED` where mirrored; the left half is the mask."""
    versions = (0, MIRRORED) if mirrored else (0,)
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 4, 4)
    return LatentDataset(
        mean=[torch.stack([torch.full((4, 4, 4), float(number + more)) for more in versions]) for number in numbers],
        std=[torch.zeros(len(versions), 4, 4, 4) for _ in numbers],
        captions=[torch.tensor([number]) for number in numbers],
        size=torch.stack([torch.full((6,), float(number)) for number in numbers]),
        order=range(len(numbers)),
        masks=[mask if mirrored else None for _ in numbers],
    )


def drawn(step: int = 0, share: tuple[int, int] = (0, 1), **values: Any) -> Batch:
    """All samples of a step's micro-batches, in one."""
    settings = TrainSettings(**{"batch_size": 2, "gradient_accumulation": 2, "flip": True} | values)
    cache = LatentCache(dataset(SUBJECT, mirrored=True), dataset(CLASS, mirrored=False), None, {}, EMPTY)
    batches = [
        batch
        for micro_batch in range(settings.gradient_accumulation)
        for batch in draw_batches(cache, settings, step, micro_batch, make_objective(), CPU, share)
    ]
    names = ("latents", "noise", "added_noise", "timesteps", "captions", "sizes", "weights")
    tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    masks = [batch.masks for batch in batches if batch.masks is not None]
    return Batch(**tensors, masks=torch.cat(masks) if masks else None)


def numbers_of(batch: Batch) -> list[int]:
    """Of the pictures that the latents show."""
    return [int(value) % MIRRORED for value in batch.latents[:, 0, 0, 0]]


def test_a_step_takes_every_picture_once_where_they_are_as_many_as_its_samples() -> None:
    for step in range(3):
        assert Counter(numbers_of(drawn(step))) == Counter([*SUBJECT, *CLASS])


def test_processes_share_the_samples_of_a_step() -> None:
    parts = [numbers_of(drawn(share=(process, 2), batch_size=1)) for process in range(2)]
    assert Counter(parts[0] + parts[1]) == Counter([*SUBJECT, *CLASS])


def test_captions_sizes_and_weights_are_those_of_the_picture() -> None:
    batch = drawn(prior_weight=0.3)
    numbers = numbers_of(batch)
    assert batch.captions.tolist() == numbers
    assert batch.sizes.tolist() == [[float(number)] * 6 for number in numbers]
    expected = [0.5 if number in SUBJECT else 0.15 for number in numbers]
    assert batch.weights.tolist() == pytest.approx(expected)


def test_only_captions_of_the_subject_are_dropped() -> None:
    batch = drawn(caption_dropout=1.0)
    assert batch.captions.tolist() == [EMPTY if number in SUBJECT else number for number in numbers_of(batch)]


def test_the_mask_is_mirrored_with_its_picture_and_the_class_has_none() -> None:
    seen = set()
    for step in range(4):
        batch = drawn(step, mask_background=0.25)
        assert batch.masks is not None
        for number, value, mask in zip(numbers_of(batch), batch.latents[:, 0, 0, 0], batch.masks, strict=True):
            is_mirrored = bool(value > MIRRORED)
            left = [1.0, 1.0, 0.25, 0.25]
            row = [1.0] * 4 if number in CLASS else left[::-1] if is_mirrored else left
            assert mask[0].tolist() == [row] * 4
            seen.add((number in CLASS, is_mirrored))
    assert seen == {(True, False), (False, True), (False, False)}


def test_noise_is_added_with_a_perturbation_and_compared_without() -> None:
    plain, perturbed = drawn(), drawn(input_perturbation=0.1)
    assert torch.equal(plain.added_noise, plain.noise)
    assert torch.equal(perturbed.noise, plain.noise)
    assert 0.08 < float((perturbed.added_noise - perturbed.noise).std()) < 0.12
