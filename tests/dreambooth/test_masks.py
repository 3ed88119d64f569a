"""Masks of the loss: what lies outside does not count, a mask moves with its picture, ones all over change nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Recorder
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.data.batches import collate, draw_batches
from pack.trainer.data.buckets import bucket_shapes, nearest_shape
from pack.trainer.data.images import Picture, crop, load_pictures, mask_weights
from pack.trainer.data.latent_cache import LatentDataset
from pack.trainer.models.objective import make_objective
from pack.trainer.settings.objective import ObjectiveSettings
from PIL import Image, ImageOps
from torch import Tensor
from worlds import World, assert_same_end

pytestmark = pytest.mark.usefixtures("quick")
CPU = torch.device("cpu")
SHAPE = (2, 4, 6, 8)
OBJECTIVES = [
    (prediction, {"loss": loss, "loss_weighting": weighting})
    for prediction in ("epsilon", "v_prediction")
    for loss, weighting in (("mse", "constant"), ("huber", "min-snr"), ("huber-snr", "debiased"))
]
EVERY_OBJECTIVE = pytest.mark.parametrize(("prediction_type", "shaped"), OBJECTIVES, ids=str)


def normal(seed: int, shape: Sequence[int] = SHAPE) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def losses(prediction_type: str, shaped: dict[str, Any], mask: Tensor | None, *parts: Tensor) -> Tensor:
    """Of a prediction, latents and noise, at two timesteps."""
    objective = make_objective(prediction_type).with_settings(ObjectiveSettings(**shaped))
    return objective.loss(*parts, torch.tensor([100, 700]), mask)


def left(shape: Sequence[int] = SHAPE) -> Tensor:
    mask = torch.zeros(shape[0], 1, *shape[2:])
    mask[..., : shape[3] // 2] = 1
    return mask


@EVERY_OBJECTIVE
def test_ones_are_as_no_mask(prediction_type: str, shaped: dict[str, Any]) -> None:
    parts = [normal(seed) for seed in range(3)]
    plain = losses(prediction_type, shaped, None, *parts)
    torch.testing.assert_close(losses(prediction_type, shaped, torch.ones(2, 1, 6, 8), *parts), plain)


@EVERY_OBJECTIVE
@given(factor=st.floats(1e-3, 1.0), seed=st.integers(0, 1000))
def test_only_the_shares_of_a_mask_count(prediction_type: str, shaped: Any, factor: float, seed: int) -> None:
    """So that a subject that fills a tenth of its picture teaches as much as one that fills it."""
    parts = [normal(seed + number) for number in range(3)]
    mask = torch.rand(2, 1, 6, 8, generator=torch.Generator().manual_seed(seed)) + 1e-3
    whole = losses(prediction_type, shaped, mask, *parts)
    torch.testing.assert_close(losses(prediction_type, shaped, factor * mask, *parts), whole)
    counted = [part[..., : SHAPE[3] // 2] for part in parts]
    torch.testing.assert_close(
        losses(prediction_type, shaped, left(), *parts), losses(prediction_type, shaped, None, *counted)
    )


def test_a_known_value() -> None:
    """Errors of 1 on the left and 3 on the right, a tenth of the weight on the right: (1 + 0.1 · 9) / 1.1."""
    prediction, noise = torch.ones(SHAPE), torch.zeros(SHAPE)
    prediction[..., 4:] = 3
    mask = 0.1 + 0.9 * left()
    found = losses("epsilon", {}, mask, prediction, normal(0), noise)
    torch.testing.assert_close(found, torch.full((2,), 1.9 / 1.1))


@EVERY_OBJECTIVE
def test_what_lies_outside_does_not_count(prediction_type: str, shaped: dict[str, Any]) -> None:
    """With mask_background 0 another background, other noise there and another prediction of it change nothing."""
    parts = [normal(seed) for seed in range(3)]
    others = [torch.where(left().bool(), part, 50 * normal(9 + number)) for number, part in enumerate(parts)]
    values, gradients = [], []
    for prediction, latents, noise in (parts, others):
        predicted = prediction.clone().requires_grad_()
        found = losses(prediction_type, shaped, left(), predicted, latents, noise)
        found.sum().backward()
        assert predicted.grad is not None
        values.append(found.detach())
        gradients.append(predicted.grad)
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    assert gradients[0][..., 4:].eq(0).all()
    assert gradients[0][..., :4].ne(0).all()
    assert not torch.equal(
        losses(prediction_type, shaped, 0.1 + left(), *parts), losses(prediction_type, shaped, 0.1 + left(), *others)
    )


def test_samples_without_a_mask_keep_their_loss_in_the_company_of_others() -> None:
    parts = [normal(seed) for seed in range(3)]
    mixed = torch.cat([torch.ones(1, 1, 6, 8), left()[1:]])
    found = losses("epsilon", {}, mixed, *parts)
    torch.testing.assert_close(found[0], losses("epsilon", {}, None, *parts)[0])
    torch.testing.assert_close(found[1], losses("epsilon", {}, left(), *parts)[1])


def half_mask(size: tuple[int, int], white: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, white)
    return mask


def test_weights_are_shares_of_places() -> None:
    mask = half_mask((64, 32), (0, 0, 20, 32))  # two and a half columns of eight pixels
    weights = mask_weights(mask, 8, 4)
    assert weights is not None
    assert weights.shape == (1, 4, 8)
    torch.testing.assert_close(weights[0, 0], torch.tensor([1, 1, 0.5, 0, 0, 0, 0, 0]), atol=1 / 255, rtol=0)
    assert weights.eq(weights[:, :1]).all()


@pytest.mark.parametrize(
    "mask",
    [
        Image.new("L", (64, 64)),
        half_mask((64, 64), (5, 5, 6, 6)).point(lambda value: value // 255),  # so little that it rounds to nothing
    ],
    ids=["black", "a dark pixel"],
)
def test_a_mask_of_nothing_is_none(mask: Image.Image) -> None:
    assert mask_weights(mask, 8, 8) is None


SIZES = [(64, 64), (128, 64), (64, 128), (100, 80)]


def subject_of(folder: Path, sizes: Sequence[tuple[int, int]], *, mirrored: bool = False) -> list[Picture]:
    """Noisy pictures with noisy masks in blocks; or all of it mirrored."""
    folder.mkdir(parents=True)
    for number, (width, height) in enumerate(sizes):
        source = np.random.default_rng(number)
        image = Image.fromarray(source.integers(0, 256, (height, width, 3), dtype=np.uint8))
        blocks = Image.fromarray(source.integers(0, 256, (4, 4), dtype=np.uint8))
        mask = blocks.resize((width, height), Image.Resampling.NEAREST)
        if mirrored:
            image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
        image.save(folder / f"{number}.png")
        mask.save(folder / f"{number}_mask.png")
    return load_pictures(folder, "a photo of sks dog", Recorder())


@pytest.fixture(scope="module")
def world(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    return replace(tiny_world, subject=subject_of(tmp_path_factory.mktemp("masks") / "masked", SIZES))


def encoded(world: World, folder: Path, **changes: Any) -> LatentDataset:
    return world.prepared(folder, **changes).session.cache.instance


@pytest.mark.parametrize("shapes", [{}, {"aspect_buckets": True, "bucket_step": 16}], ids=["square", "buckets"])
def test_masks_are_cut_and_mirrored_as_their_pictures(shapes: dict[str, Any], world: World, tmp_path: Path) -> None:
    latents = encoded(world, tmp_path, flip=True, **shapes)
    mirrored_world = replace(world, subject=subject_of(tmp_path / "mirrored", SIZES, mirrored=True))
    mirrored = encoded(mirrored_world, tmp_path / "m", flip=True, **shapes)
    for number, (picture, size) in enumerate(zip(world.subject, SIZES, strict=True)):
        shape = nearest_shape(size, bucket_shapes(64, 16)) if shapes else (64, 64)
        mask = latents.masks[number]
        assert mask is not None
        assert picture.mask is not None
        assert mask.shape == (1, shape[1] // 8, shape[0] // 8) == (1, *latents.mean[number].shape[2:])
        boxes = np.array(crop(picture.mask(), *shape)).reshape(shape[1] // 8, 8, shape[0] // 8, 8).mean(axis=(1, 3))
        np.testing.assert_allclose(mask[0].numpy(), boxes / 255, atol=1 / 255)
        other = mirrored.masks[number]
        assert other is not None
        torch.testing.assert_close(mask.flip(-1), other, atol=2 / 255, rtol=0)
        torch.testing.assert_close(latents.mean[number][1], mirrored.mean[number][0], atol=0.05, rtol=0)


def test_a_mask_of_another_size_is_scaled_to_its_picture(world: World, tmp_path: Path) -> None:
    """Eight by four blocks: however large the mask is, and whatever its shape, the same places are white."""
    subject = []
    for number, size in enumerate([(64, 32), (128, 64), (320, 160), (256, 256), (64, 512)]):
        blocks = Image.fromarray(np.random.default_rng(1).integers(0, 2, (4, 8), dtype=np.uint8) * 255)
        mask = blocks.resize(size, Image.Resampling.NEAREST)
        subject.append(replace(world.subject[0], mask=partial(Image.Image.copy, mask), mask_digest=str(number)))
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8))
    subject = [replace(picture, open=partial(Image.Image.copy, wide)) for picture in subject]
    latents = encoded(replace(world, subject=subject), tmp_path)
    first, *others = latents.masks
    assert first is not None
    assert first.shape == (1, 8, 8)
    inner = first[0, 1:-1:2]
    assert inner.max() - inner.min() > 0.9
    for mask in others:
        assert mask is not None
        torch.testing.assert_close(mask, first, atol=0.15, rtol=0)


def test_a_sample_gets_its_mask(world: World, tmp_path: Path) -> None:
    """With the background's weight, mirrored if the sample is, and ones where a picture has none."""
    subject = [replace(world.subject[0], mask=None, mask_digest=""), *world.subject[1:]]
    recipe = replace(world, subject=subject).prepared(tmp_path, flip=True, batch_size=4, mask_background=0.25)
    latents, seen = recipe.session.cache.instance, set()
    rows = [tuple(size.tolist()) for size in latents.size]
    for step in range(12):
        [batch] = draw_batches(recipe.session.cache, recipe.settings, step, 0, make_objective(), CPU)
        for row in range(4 if batch.masks is not None else 0):
            assert batch.masks is not None
            number = rows.index(tuple(batch.sizes[row].tolist()))
            mask = latents.masks[number]
            if mask is None:
                assert batch.masks[row].eq(1).all()
                continue
            wanted = [0.25 + 0.75 * one for one in (mask, mask.flip(-1))]
            is_nearer = [float((batch.latents[row] - latents.mean[number][version]).abs().mean()) for version in (0, 1)]
            version = is_nearer.index(min(is_nearer))
            torch.testing.assert_close(batch.masks[row], wanted[version])
            seen.add((number, version))
    assert len(seen) == 6  # each masked picture, both ways


def test_a_batch_without_masks_has_none(world: World, tmp_path: Path) -> None:
    recipe = world.prepared(tmp_path, mask_background=1.0, batch_size=2)
    [batch] = draw_batches(recipe.session.cache, recipe.settings, 0, 0, make_objective(), CPU)
    assert batch.masks is None
    assert collate([batch, batch]).masks is None


@pytest.mark.slow
def test_masks_that_are_ignored_change_nothing(world: World, tmp_path: Path) -> None:
    bare = replace(world, subject=[replace(one, mask=None, mask_digest="") for one in world.subject])
    without = bare.train(tmp_path / "bare", first := Recorder())
    ignored = world.train(tmp_path / "ignored", second := Recorder(), mask_background=1.0)
    counted = world.train(tmp_path / "counted", third := Recorder())
    assert first.losses == second.losses != third.losses
    assert_same_end(ignored, without)
    assert len({one.run.name for one in (without, ignored, counted)}) == 3


@pytest.mark.slow
def test_ones_all_over_train_as_no_mask(world: World, tmp_path: Path) -> None:
    """Up to the order in which a mean is summed."""
    bare = replace(world, subject=[replace(one, mask=None, mask_digest="") for one in world.subject])
    ones = [replace(one, mask=lambda: Image.new("L", (64, 64), 255), mask_digest="1") for one in world.subject]
    bare.train(tmp_path / "bare", first := Recorder(), steps=2)
    replace(world, subject=ones).train(tmp_path / "ones", second := Recorder(), mask_background=0.0, steps=2)
    assert second.losses == pytest.approx(first.losses, rel=1e-3)


@pytest.mark.parametrize(
    "white", [(60, 60, 61, 61), (0, 0, 3, 64)], ids=["so small that it is less than a place", "cut away"]
)
def test_a_mask_with_next_to_nothing_in_it_is_told_and_gives_no_nan(
    white: tuple[int, int, int, int], world: World, tmp_path: Path
) -> None:
    size = (200, 64)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 200, 3), dtype=np.uint8))
    mask = half_mask(size, white).point(lambda value: value // 255)
    picture = replace(
        world.subject[0],
        open=partial(Image.Image.copy, image),
        mask=partial(Image.Image.copy, mask),
        mask_digest="1",
    )
    listener = Recorder()
    replace(world, subject=[picture]).train(tmp_path, listener, mask_background=0.0, steps=2)
    assert all(map(math.isfinite, listener.losses))
    assert len(listener.losses) == 2
    assert [text for text in listener.warnings if picture.name in text and "mask" in text]
