"""Aspect buckets: nothing is distorted, little is cut away, every picture counts alike, and a run stays exact."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Recorder
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.data.batches import Batch, draw_batches
from pack.trainer.data.buckets import bucket_shapes, kept_share, nearest_shape
from pack.trainer.data.images import crop, size_conditioning
from pack.trainer.data.latent_cache import LatentCache, LatentDataset
from pack.trainer.dreambooth import DreamBooth
from pack.trainer.models.objective import make_objective
from pack.trainer.settings.train import TrainSettings
from PIL import Image, ImageDraw
from torch import Tensor
from worlds import SHAPES, World, assert_same_end, losses, pictures_of, runs_in

pytestmark = pytest.mark.usefixtures("quick")
CPU = torch.device("cpu")
BUCKETS: dict[str, Any] = {"aspect_buckets": True, "bucket_step": 16}
sides = st.integers(32, 6000)
grids = st.sampled_from([(64, 8), (64, 16), (64, 32), (512, 64), (512, 8), (768, 64), (1024, 64), (520, 64)])


@pytest.mark.parametrize("step", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("resolution", [256, 512, 520, 768, 1024])
def test_shapes(resolution: int, step: int) -> None:
    square, *shapes = bucket_shapes(resolution, step)
    assert square == (resolution, resolution)
    assert len(set(shapes)) == len(shapes) > 2
    for width, height in shapes:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert (height, width) in shapes
        assert 1 / 4 <= width / height <= 4
        assert width != height
    # none could be a step longer on both sides, or a step longer on its longer side
    assert all(max(shape) * (min(shape) + step) > resolution**2 for shape in shapes)


def test_shapes_of_sdxl() -> None:
    """Those of appendix I of its paper (Podell et al. 2023) up to 1:4, whose areas are no larger than the square's."""
    published = [(512, 1984), (576, 1792), (640, 1600), (704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088)]
    published += [(512, 2048), (576, 1728), (640, 1536), (704, 1472), (768, 1280), (832, 1152), (896, 1088)]
    fitting = [shape for shape in published if math.prod(shape) <= 1024**2]
    ours = bucket_shapes(1024, 64)
    largest = {side: max(other for one, other in fitting if one == side) for side, _ in fitting}
    for shape in largest.items():
        assert shape in ours
        assert shape[::-1] in ours


def worst_share(shapes: Sequence[tuple[int, int]]) -> float:
    """What is left of a picture half-way, by logarithm, between the two neighbouring shapes that differ most."""
    ratios = sorted(width / height for width, height in shapes)
    return min(math.sqrt(low / high) for low, high in itertools.pairwise(ratios))


@given(width=sides, height=sides, grid=grids)
def test_little_is_cut_away(width: int, height: int, grid: tuple[int, int]) -> None:
    shapes = bucket_shapes(*grid)
    narrowest, widest = min(w / h for w, h in shapes), max(w / h for w, h in shapes)
    shape = nearest_shape((width, height), shapes)
    share = kept_share((width, height), shape)
    assert shape in shapes
    assert 0 < share <= 1
    beyond = min(1.0, width / height / narrowest, widest / (width / height))  # of pictures beyond the last shapes
    assert share >= min(worst_share(shapes), beyond) - 1e-9
    assert all(share >= kept_share((width, height), other) for other in shapes)
    if (width, height) in shapes or width == height:
        assert share == 1


def test_of_shapes_that_keep_as_much_the_largest_is_taken() -> None:
    assert nearest_shape((100, 100), [(64, 64), (128, 128), (96, 96)]) == (128, 128)
    for shapes in ([(210, 105), (100, 200)], [(100, 200), (210, 105)]):  # half of a square each
        assert nearest_shape((100, 100), shapes) == (210, 105)


def test_how_much_is_cut_away_at_the_most() -> None:
    assert 1 - worst_share(bucket_shapes(512, 64)) < 0.15
    assert 1 - worst_share(bucket_shapes(1024, 64)) < 0.08
    assert 1 - worst_share(bucket_shapes(512, 8)) < 0.02


@given(width=st.integers(32, 400), height=st.integers(32, 400), step=st.sampled_from([8, 16, 32]))
def test_what_is_cut_is_what_is_said(width: int, height: int, step: int) -> None:
    """Each pixel holds its own column or row, so the cut tells where it comes from."""
    shape = nearest_shape((width, height), bucket_shapes(64, step))
    original_height, original_width, top, left, cut_height, cut_width = size_conditioning((width, height), *shape)
    assert (original_width, original_height, cut_width, cut_height) == (width, height, *shape)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    scales = []
    for axis, values, offset, length in ((1, columns, left, width), (0, rows, top, height)):
        cut = np.array(crop(Image.fromarray(values), *shape)).mean(axis=1 - axis)
        places = np.arange(len(cut))[4:-4]  # Lanczos reaches over the edges
        slope, first = np.polyfit(places, cut[4:-4], 1)
        scales.append(1 / slope)
        assert (first + 0.5) / slope - 0.5 == pytest.approx(offset, abs=0.6)
        assert len(cut) / scales[-1] <= length * 1.01
    assert scales[0] == pytest.approx(scales[1], rel=0.02)
    assert scales[0] == pytest.approx(max(shape[0] / width, shape[1] / height), rel=0.02)
    assert shape[0] * shape[1] / scales[0] ** 2 / (width * height) == pytest.approx(
        kept_share((width, height), shape), rel=0.04
    )


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (500, 200), (333, 222), (256, 256), (1000, 120)], ids=str)
def test_a_circle_stays_a_circle(size: tuple[int, int]) -> None:
    image, radius = Image.new("L", size), 0.4 * min(size)
    middle = size[0] / 2, size[1] / 2
    box = (middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius)
    ImageDraw.Draw(image).ellipse(box, fill=255)
    shape = nearest_shape(size, bucket_shapes(128, 16))
    lit = np.array(crop(image, *shape)) > 127
    width, height = lit.any(axis=0).sum(), lit.any(axis=1).sum()
    assert abs(int(width) - int(height)) <= 2
    expected = 2 * radius * max(shape[0] / size[0], shape[1] / size[1])
    assert abs(width - expected) <= 2


def latents_of(sizes: Sequence[tuple[int, int]], repeats: Sequence[int], versions: int = 1) -> LatentDataset:
    """Latents of these sizes; a picture's number stands in its size, so that samples can be told apart."""
    count = len(sizes)
    tensors = [torch.full((versions, 4, *size), float(number)) for number, size in enumerate(sizes)]
    order = [number for number in range(count) for _ in range(repeats[number])]
    size = torch.arange(count).float()[:, None].repeat(1, 6)
    captions = [torch.tensor([number]) for number in range(count)]
    return LatentDataset(tensors, [torch.zeros_like(one) for one in tensors], captions, size, order, [None] * count)


def cache_of(instance: LatentDataset, prior: LatentDataset | None = None) -> LatentCache:
    return LatentCache(instance, prior, None, {"ids": torch.zeros(len(instance), 4)}, None)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes"), [(1, 1, 1), (3, 1, 1), (2, 3, 1), (4, 1, 3)], ids=str
)
def test_every_picture_of_every_shape_is_used_equally_often(batch_size: int, accumulation: int, processes: int) -> None:
    sizes, repeats = [(8, 8), (8, 16), (16, 8), (8, 16), (8, 8), (4, 24)], [1, 2, 1, 3, 1, 4]
    cache = cache_of(latents_of(sizes, repeats))
    settings = TrainSettings(batch_size=batch_size, gradient_accumulation=accumulation, seed=3)
    seen: Counter[int] = Counter()
    steps = sum(repeats)  # so many steps are a whole number of epochs
    for step, micro, index in itertools.product(range(steps), range(accumulation), range(processes)):
        batches = list(draw_batches(cache, settings, step, micro, make_objective(), CPU, (index, processes)))
        shapes = [tuple(batch.latents.shape[1:]) for batch in batches]
        assert len(set(shapes)) == len(shapes)
        assert sum(len(batch.latents) for batch in batches) == batch_size
        for batch in batches:
            assert batch.latents.shape == batch.noise.shape == batch.added_noise.shape
            for row, (size, caption) in enumerate(zip(batch.sizes, batch.captions, strict=True)):
                picture = int(size[0])
                assert int(caption) == picture
                assert tuple(batch.latents.shape[2:]) == sizes[picture]
                assert batch.latents[row].eq(picture).all()
                seen[picture] += 1
    slots = batch_size * accumulation * processes
    assert seen == {number: times * slots for number, times in enumerate(repeats)}


def test_an_epoch_is_listed_once() -> None:
    """Not for every sample: with many repeats that would take longer than the step."""
    latents = latents_of([(8, 8), (8, 16)], [10_000, 10_000])
    assert latents.shapes is latents.shapes
    assert Counter(latents.shapes) == {(4, 8, 8): 10_000, (4, 8, 16): 10_000}


def test_a_set_of_several_shapes_comes_back_from_its_file(tmp_path: Path) -> None:
    instance = latents_of([(8, 8), (8, 16)], [1, 3])
    masks = [None, torch.rand(1, 8, 16)]
    cache = replace(cache_of(replace(instance, masks=masks)), empty=1)
    cache.save(tmp_path / "cache.safetensors")
    loaded = LatentCache.load(tmp_path / "cache.safetensors")
    assert loaded is not None
    assert (loaded.empty, loaded.prior, loaded.validation) == (1, None, None)
    assert loaded.instance.order == instance.order
    assert loaded.instance.shapes == instance.shapes
    assert loaded.instance.masks[0] is None
    for name in ("mean", "std", "captions"):
        assert all(map(torch.equal, getattr(loaded.instance, name), getattr(instance, name)))
    assert torch.equal(loaded.instance.masks[1], masks[1])


@pytest.fixture(scope="module")
def world(tiny_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Pictures of several shapes."""
    folder = tmp_path_factory.mktemp("shapes") / "subject"
    return replace(tiny_world, subject=pictures_of(folder, SHAPES, "sks, dog, in the snow, at noon", masked=True))


@pytest.mark.slow
def test_square_pictures_train_as_without_buckets(tiny_world: World, tmp_path: Path) -> None:
    world = tiny_world.with_priors(tmp_path / "class")
    changes: dict[str, Any] = {"flip": True, "batch_size": 2, "steps": 2}
    plain, plainly = world.train(tmp_path / "plain", listener := Recorder(), **changes), listener
    ours, told = world.train(tmp_path / "buckets", listener := Recorder(), **changes, **BUCKETS), listener
    assert ours.run.name != plain.run.name
    assert told.losses == plainly.losses
    assert_same_end(ours, plain)


def test_latents_have_the_nearest_shape(world: World, tmp_path: Path) -> None:
    recipe = world.prepared(tmp_path, flip=True, **BUCKETS)
    shapes = bucket_shapes(64, 16)
    for number, size in enumerate(SHAPES):
        width, height = nearest_shape(size, shapes)
        mean, mask = recipe.session.cache.instance.mean[number], recipe.session.cache.instance.masks[number]
        assert mean.shape == (2, 4, height // 8, width // 8)
        assert (mask is not None) == bool(number % 2)
        assert mask is None or mask.shape == (1, height // 8, width // 8)
        assert recipe.session.cache.instance.size[number].tolist() == list(size_conditioning(size, width, height))
    assert len({one.shape for one in recipe.session.cache.instance.mean}) >= 4


def alone(recipe: DreamBooth, batch: Batch, row: int) -> Tensor:
    """The loss of one sample, by itself."""
    one = slice(row, row + 1)
    latents, noise, timesteps = batch.latents[one], batch.noise[one], batch.timesteps[one]
    noisy = recipe.session.objective.add_noise(latents, batch.added_noise[one], timesteps)
    told = recipe.session.text.rows(batch.captions[one]) | {"size": batch.sizes[one]}
    mask = None if batch.masks is None else batch.masks[one]
    return recipe.session.objective.loss(
        recipe.session.model.predict(noisy, timesteps, told), latents, noise, timesteps, mask
    )[0]


def test_the_loss_of_a_mixed_batch_is_that_of_its_samples(world: World, tmp_path: Path) -> None:
    world = world.with_priors(tmp_path / "class")
    recipe = world.prepared(tmp_path, batch_size=5, prior_weight=0.25, **BUCKETS)
    settings, kinds = recipe.settings, Counter[float]()
    with torch.no_grad():
        for step in range(3):
            batches = list(draw_batches(recipe.session.cache, settings, step, 0, make_objective(), CPU))
            assert len(batches) > 2
            together = torch.stack(losses(recipe, step))
            assert len(together) == len(batches)
            expected = torch.zeros(())
            for batch in batches:
                for row, weight in enumerate(batch.weights.tolist()):
                    expected = expected + weight * alone(recipe, batch, row)
                    kinds[round(weight, 6)] += 1
            torch.testing.assert_close(together.sum(), expected, rtol=1e-4, atol=1e-6)
    assert kinds == {0.2: 15, 0.05: 15}  # one over five, and a quarter of it


def test_sdxl_is_told_the_size_of_the_bucket(world: World, xl: World, tmp_path: Path) -> None:
    world = replace(xl, subject=world.subject)
    recipe = world.prepared(tmp_path, batch_size=3, **BUCKETS)
    told: list[tuple[tuple[int, ...], Tensor]] = []

    def watch(_: Any, inputs: Any, named: dict[str, Any]) -> None:
        sample = inputs[0] if inputs else named["sample"]
        told.append((tuple(sample.shape), named["added_cond_kwargs"]["time_ids"]))

    handle = recipe.session.model.denoiser.register_forward_pre_hook(watch, with_kwargs=True)
    expected = {size: size_conditioning(size, *nearest_shape(size, bucket_shapes(64, 16))) for size in SHAPES}
    seen = set()
    with torch.no_grad():
        for step in range(4):
            losses(recipe, step)
    handle.remove()
    for shape, ids in told:
        for row in ids.tolist():
            size = (int(row[1]), int(row[0]))  # the original's height comes first
            assert row == list(expected[size])
            assert row[4:] == [8 * shape[2], 8 * shape[3]]
            seen.add(size)
    assert seen == set(SHAPES)


@pytest.mark.slow
def test_the_course_does_not_depend_on_the_cache_file(world: World, tmp_path: Path) -> None:
    """A run that was stopped reads what it encoded; without the file it encodes anew, to the same bits."""
    changes = {**BUCKETS, "shuffle_tags": True, "caption_dropout": 0.3}
    straight = world.train(tmp_path / "straight", **changes)
    world.stop_after(2, tmp_path / "stopped", **changes)
    [run] = runs_in(tmp_path / "stopped")
    (run / "cache.safetensors").unlink()
    assert_same_end(world.train(tmp_path / "stopped", **changes), straight)


def test_pictures_of_one_shape_alone_and_in_the_company_of_others(world: World, tmp_path: Path) -> None:
    """Buckets change the shape of a picture, and nothing else of it: alone it is encoded to the same latents."""
    changes = {**BUCKETS, "flip": True}
    together = world.prepared(tmp_path / "together", **changes).session.cache.instance
    for number in (1, 4):
        alone = replace(world, subject=[world.subject[number]]).prepared(tmp_path / str(number), **changes)
        assert torch.equal(alone.session.cache.instance.mean[0], together.mean[number])
