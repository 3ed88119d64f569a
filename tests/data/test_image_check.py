"""The check of pictures before training: what is alike, what is blurred, and messages that name the files."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import DEMO, Recorder
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.cli.train import run_train
from pack.trainer.core.errors import CancelledError, PicturesError, suggest
from pack.trainer.data.image_check import (
    MAX_BLUR,
    MAX_HASH_DISTANCE,
    PictureMeasurements,
    blur,
    check_pictures,
    detail,
    image_advice,
    measure_picture,
    near_duplicates,
    perceptual_hash,
    steepness,
)
from pack.trainer.data.images import Picture, decode, load_pictures
from pack.trainer.settings.train import TrainCommand, TrainSettings
from PIL import Image, ImageDraw, ImageFilter, ImageOps

Change = Callable[[Image.Image], Image.Image]
SIDE = 320


def scene(seed: int, width: int = SIDE, height: int = 280) -> Image.Image:
    """Like a photograph: soft light, things with sharp edges in all sizes, a little noise."""
    draw = np.random.default_rng(seed)
    light = Image.fromarray(draw.integers(40, 220, (4, 4, 3), dtype=np.uint8)).resize((width, height), 3)
    pen = ImageDraw.Draw(light)
    for size in (90, 60, 40, 25, 15, 15, 8, 8):
        x, y = draw.integers(0, width - size), draw.integers(0, height - size)
        shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
        shape((x, y, x + size, y + size), fill=tuple(int(value) for value in draw.integers(0, 256, 3)))
    pixels = np.asarray(light, dtype=np.float64) + draw.normal(0, 2, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def as_picture(name: str, image: Image.Image) -> Picture:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return Picture(name, "", name, lambda: decode(stream.getvalue()))


def look(name: str, image: Image.Image) -> PictureMeasurements:
    return measure_picture(as_picture(name, image))


def advice_on(resolution: int = 64, **images: Image.Image) -> list[str]:
    return texts([look(name, image) for name, image in images.items()], resolution)


def texts(measured: Sequence[PictureMeasurements], resolution: int) -> list[str]:
    """What `image_advice` says of pictures."""
    return [note.text for note in image_advice(measured, resolution)]


def softened(radius: float) -> Change:
    return lambda image: image.filter(ImageFilter.GaussianBlur(radius))


def compressed(image: Image.Image, quality: int = 30) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def trimmed(image: Image.Image) -> Image.Image:
    """2.5 % off every side."""
    width, height = image.size
    return image.crop((width // 40, height // 40, width - width // 40, height - height // 40))


COPIES: dict[str, Change] = {
    "itself": lambda image: image,
    "half": lambda image: image.resize((image.width // 2, image.height // 2)),
    "twice": lambda image: image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC),
    "jpeg": compressed,
    "trimmed": trimmed,
    "brighter": lambda image: image.point([min(255, round(value * 1.2)) for value in range(256)] * 3),
    "grey": lambda image: image.convert("L"),
    "slightly blurred": softened(1),
}


def apart(one: Image.Image, other: Image.Image) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(other)).bit_count()


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_looks_the_same(name: str) -> None:
    for seed in range(12):
        image = scene(seed)
        assert apart(image, COPIES[name](image)) <= (0 if name in ("itself", "grey") else MAX_HASH_DISTANCE)


def test_other_pictures_and_mirrored_ones_do_not() -> None:
    images = [scene(seed) for seed in range(12)]
    assert min(apart(*pair) for pair in itertools.combinations(images, 2)) > MAX_HASH_DISTANCE
    assert min(apart(image, ImageOps.mirror(image)) for image in images) > MAX_HASH_DISTANCE


def test_the_demos_pictures_are_all_different_and_sharp() -> None:
    """Drawings with large flat areas: what a check made for photographs errs on first."""
    for folder in ("subject", "style"):
        recorder = Recorder()
        check_pictures(load_pictures(DEMO / folder, "", recorder), TrainSettings(resolution=64), recorder)
        assert recorder.warnings == []


@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=12),
    st.lists(st.integers(0, 63), max_size=MAX_HASH_DISTANCE, unique=True),
)
def test_groups_are_the_connected_ones(hashes: list[int], flipped: list[int]) -> None:
    """Every near pair is in one group, every member has a near one in it, none is in two; equal ones are grouped."""
    if hashes:
        hashes = [*hashes, hashes[0] ^ sum(1 << bit for bit in flipped)]
    groups = near_duplicates(hashes)
    place = {at: number for number, group in enumerate(groups) for at in group}
    assert len(place) == sum(map(len, groups))
    assert all(len(group) > 1 and group == sorted(group) for group in groups)
    near = {pair for pair in itertools.combinations(range(len(hashes)), 2) if _near(hashes, *pair)}
    assert all(place.get(one, -1) == place.get(other, -2) for one, other in near)
    assert {at for pair in near for at in pair} == set(place)
    assert not hashes or {0, len(hashes) - 1} <= set(place)


def _near(hashes: list[int], one: int, other: int) -> bool:
    return (hashes[one] ^ hashes[other]).bit_count() <= MAX_HASH_DISTANCE


def test_a_chain_is_one_group() -> None:
    """a is like b, b like c, a not like c: one message, not two."""
    assert near_duplicates([0, 2**8 - 1, 2**16 - 1, 2**40 - 1]) == [[0, 1, 2]]
    assert near_duplicates([0, 2**16 - 1, 2**8 - 1]) == [[0, 1, 2]]
    assert near_duplicates([0, 2**11 - 1]) == []


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), dtype=np.float32)


def test_blur_lowers_steepness_and_raises_the_blur_effect() -> None:
    for seed in range(6):
        rows = [grey(softened(radius)(scene(seed))) for radius in (0, 1, 2, 4)]
        for measure, order in ((steepness, -1), (blur, 1)):
            values = [measure(row) for row in rows]
            assert values == sorted(values, key=lambda value: value * order)
            assert abs(values[-1] - values[0]) > 0.2


def test_measures_of_known_pictures() -> None:
    hard = np.zeros((100, 100), dtype=np.float32)
    hard[:, 50:] = 200
    ramp = np.tile(np.linspace(0, 240, 100, dtype=np.float32), (100, 1))
    assert steepness(hard) == pytest.approx(1.0)
    assert steepness(ramp) == pytest.approx(240 / 99 / (240 * 0.98), rel=1e-3)
    # 9 pixels' mean turns the one step of 200 into nine of 200 / 9: eight ninths of the change are lost
    assert blur(hard) == pytest.approx(1.0)  # along the rows nothing changes
    assert blur(hard + hard.T) == pytest.approx(1 / 9, abs=1e-6)
    assert blur(np.full((40, 40), 7, dtype=np.float32)) == 1.0
    assert blur(ramp) > 0.9 > MAX_BLUR
    white = np.full((100, 100, 3), 255, dtype=np.float32)
    white[:10, :10, 1] = 0
    assert detail(white) == pytest.approx(0.01)


@given(st.floats(0.3, 1.0), st.integers(0, 5))
def test_contrast_makes_no_picture_blurred(contrast: float, seed: int) -> None:
    one = grey(scene(seed))
    assert steepness(one * np.float32(contrast)) == pytest.approx(steepness(one), rel=1e-3)


def test_a_blurred_picture_is_named_and_the_sharp_ones_are_not() -> None:
    sharp = [look(f"{seed}.png", scene(seed)) for seed in range(5)]
    assert texts(sharp, 64) == []
    for at in range(5):
        looks = [*sharp[:at], look(f"{at}.png", softened(4)(scene(at))), *sharp[at + 1 :]]
        assert texts(looks, 64) == [f"{at}.png is blurred: use a sharper one."]


def test_a_picture_softer_than_the_others_is_found_that_alone_is_not() -> None:
    images = {f"{seed}.png": scene(seed) for seed in range(5)}
    soft = softened(1.6)(images["0.png"])
    assert advice_on(**{"0.png": soft}) == []
    assert advice_on(**images | {"0.png": soft}) == ["0.png is blurred: use a sharper one."]


def test_a_soft_style_is_one_sentence() -> None:
    [text] = advice_on(**{f"{seed}.png": softened(5)(scene(seed)) for seed in range(8)})
    assert text.startswith("0.png, 1.png, 2.png, 3.png, 4.png, 5.png and 2 more have no sharp edges")
    assert "Unless you want that style" in text


def test_a_sharp_subject_before_a_blurred_background_is_sharp() -> None:
    for seed in range(6):
        image = scene(seed)
        back = softened(6)(image)
        box = (image.width // 3, image.height // 3, image.width * 2 // 3, image.height * 2 // 3)
        back.paste(scene(seed + 50).crop(box), box[:2])
        assert advice_on(**{"portrait.png": back}) == []


def drawings() -> dict[str, Image.Image]:
    """Pictures with few edges and large flat areas, all of them sharp."""
    found = {}
    for name, back in (("white", "white"), ("blue", (40, 70, 200))):
        flat = Image.new("RGB", (400, 300), back)
        pen = ImageDraw.Draw(flat)
        pen.ellipse((120, 60, 280, 220), fill=(200, 60, 40) if name == "white" else (160, 190, 240))
        found[f"disc on {name}"] = flat
    lines = Image.new("RGB", (400, 300), "white")
    ImageDraw.Draw(lines).line([(20, 30), (300, 200), (370, 40), (60, 270)], fill="black", width=3)
    found["lines"] = lines
    sprite = Image.fromarray(np.random.default_rng(3).integers(0, 4, (16, 16), dtype=np.uint8) * 70)
    found["pixel art"] = sprite.resize((512, 512), Image.Resampling.NEAREST)
    found["small pixel art"] = sprite.resize((64, 64), Image.Resampling.NEAREST)
    sky = np.linspace(200, 90, 300)[:, None, None] * np.array([0.5, 0.8, 1.2])
    sky = np.broadcast_to(sky.clip(0, 255), (300, 400, 3)).astype(np.uint8)
    evening = Image.fromarray(sky.copy())
    ImageDraw.Draw(evening).polygon([(0, 300), (130, 180), (260, 300)], fill=(40, 60, 50))
    found["smooth sky"] = evening
    return found


@pytest.mark.parametrize("name", drawings())
def test_a_sharp_drawing_is_not_called_blurred_and_a_blurred_one_is(name: str) -> None:
    image = drawings()[name]
    assert advice_on(resolution=32, **{name: image}) == []
    large = image.resize((512, 384), Image.Resampling.NEAREST)
    assert advice_on(resolution=32, **{name: softened(7)(large)}) == [f"{name} is blurred: use a sharper one."]


@pytest.mark.parametrize("colour", ["white", "black", (90, 140, 20)], ids=str)
def test_an_empty_picture_gets_one_message(colour: str | tuple[int, int, int]) -> None:
    empty = Image.new("RGB", (200, 150), colour)
    ImageDraw.Draw(empty).rectangle((20, 20, 30, 30), fill=(200, 10, 10))
    others = {"a.png": scene(0), "b.png": scene(1)}
    [text] = advice_on(**others, **{"c.png": empty})
    assert text == "c.png is almost a single colour: leave it out."
    [text] = advice_on(**others, **{"c.png": empty, "d.png": empty})
    assert text == "c.png and d.png are almost a single colour: leave them out."


def test_a_dark_picture_is_named_and_a_lamp_in_the_dark_is_not() -> None:
    dark = scene(1).point([value // 8 for value in range(256)] * 3)
    night = Image.new("RGB", (320, 280), (6, 6, 12))
    night.paste(scene(2).resize((110, 100)), (100, 80))
    night.paste(scene(3).resize((60, 50)), (20, 20))
    found = advice_on(**{"a.png": scene(0), "dark.png": dark, "night.png": night})
    assert found == ["dark.png is very dark: brighten it, or leave it out."]


def test_small_pictures_say_how_much_they_are_scaled_up() -> None:
    images = {"a.png": scene(0, 512, 600), "b.png": scene(1, 256, 380), "c.png": scene(2, 500, 480)}
    looks = [look(name, image) for name, image in images.items()]
    assert texts(looks, 512) == [
        "b.png (256×380) is smaller than the training resolution 512 and will be upscaled 2.0 times, which blurs it: "
        "use a larger one, or lower the resolution."
    ]
    [text] = texts(looks, 1024)
    assert text.startswith("a.png (512×600), b.png (256×380) and c.png (500×480) are smaller")
    assert "up to 4.0 times" in text
    assert "use larger ones" in text
    assert texts(looks, 256) == []


def test_look_alikes_are_one_message_a_group_and_exact_copies_are_left_to_others(tmp_path: Path) -> None:
    first, second = scene(0), scene(1)
    first.save(tmp_path / "a.png")
    first.save(tmp_path / "a copy.png")
    trimmed(first).save(tmp_path / "b.jpg", quality=90)
    first.resize((160, 140)).save(tmp_path / "c.png")
    second.save(tmp_path / "d.png")
    ImageOps.mirror(second).save(tmp_path / "e.png")
    recorder = Recorder()
    pictures = load_pictures(tmp_path, "", recorder)
    before = len(recorder.warnings)
    check_pictures(pictures, TrainSettings(resolution=128), recorder)
    assert len([text for text in recorder.warnings[:before] if "same picture" in text]) == 1
    assert recorder.warnings[before:] == [
        "a copy.png, b.jpg and c.png look almost the same: keep only the best one, or the model will overfit to it."
    ]


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(33, 32), (32, 999), (701, 45)], ids=str)
def test_every_mode_and_shape_is_measured(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    image = scene(4, 320, 320).resize(size)
    path = tmp_path / f"x.{'tif' if mode in ('CMYK', 'I;16') else 'png'}"
    if mode == "I;16":
        Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257).save(path)
    else:
        image.convert(mode).save(path)
    recorder = Recorder()
    [picture] = load_pictures(tmp_path, "", recorder)
    found = measure_picture(picture)
    assert found.size == size
    assert 0 <= found.steepness <= 2
    assert 0 <= found.blur <= 1
    assert found.detail > 0.1
    check_pictures([picture], TrainSettings(resolution=32), recorder)
    assert not any("empty" in text for text in recorder.warnings)


def test_transparency_is_measured_on_white() -> None:
    hole = scene(0).convert("RGBA")
    hole.putalpha(0)
    assert look("x", hole).detail == 0.0


@pytest.mark.parametrize("content", [None, b"no picture", b""], ids=["gone", "no picture", "empty"])
def test_a_picture_that_is_not_the_same_any_more_is_an_error(content: bytes | None, tmp_path: Path) -> None:
    for seed in range(4):
        scene(seed).save(tmp_path / f"{seed}.png")
    recorder = Recorder()
    pictures = load_pictures(tmp_path, "", recorder)
    (tmp_path / "2.png").unlink()
    if content is not None:
        (tmp_path / "2.png").write_bytes(content)
    with pytest.raises(PicturesError) as caught:
        check_pictures(pictures, TrainSettings(resolution=64), recorder)
    assert str(tmp_path / "2.png") in caught.value.problem
    assert ("does not exist" if content is None else "has changed") in caught.value.problem
    assert "tart again" in caught.value.remedy


def test_of_no_pictures_there_is_nothing_to_say() -> None:
    assert texts([], 64) == []


@pytest.mark.parametrize(
    ("size", "cut"),
    [((300, 200), 0), ((200, 300), 0), ((400, 300), 0), ((320, 210), 0), ((320, 180), 44), ((1200, 100), 92)],
    ids=str,
)
def test_what_is_cut_away_is_told_if_it_is_much(size: tuple[int, int], cut: int) -> None:
    """A third, as of 3:2, is what everybody expects; nothing is said of it."""
    recorder = Recorder()
    pictures = [as_picture("wide.png", scene(0, 320, 320).resize(size)), as_picture("b.png", scene(1, 320, 320))]
    check_pictures(pictures, TrainSettings(resolution=64), recorder)
    told = [text for text in recorder.warnings if "Cropping to" in text]
    assert len(told) == bool(cut)
    if cut:
        assert f"wide.png ({cut} %)" in told[0]
        assert suggest("aspect_buckets", True) in told[0]
        assert "crop it around the subject" in told[0]


def test_with_buckets_only_panoramas_are_cut() -> None:
    recorder = Recorder()
    pictures = [as_picture(f"{width}.png", scene(0, 320, 320).resize((width, 100))) for width in (200, 390, 1200)]
    check_pictures(pictures, TrainSettings(resolution=512, aspect_buckets=True), recorder)
    [told] = [text for text in recorder.warnings if "Cropping to" in text]
    assert told.startswith("Cropping to an aspect ratio of at most 4:1 removes much of 1200.png (67 %)")
    assert "aspect_buckets" not in told


def test_many_pictures_are_counted_and_can_be_stopped() -> None:
    image = scene(0).resize((64, 64))
    pictures = [Picture(f"{number}.png", "", str(number), lambda: image) for number in range(40)]
    recorder = Recorder()
    check_pictures(pictures, TrainSettings(resolution=64), recorder)
    assert [event.done for event in recorder.events if hasattr(event, "done")] == [32]
    assert recorder.warnings == [
        "0.png, 1.png, 2.png, 3.png, 4.png, 5.png and 34 more look almost the same: keep only the best one, or the "
        "model will overfit to it."
    ]
    with pytest.raises(CancelledError):
        check_pictures(pictures, TrainSettings(resolution=64), Recorder(stop_after=1))


@pytest.mark.slow
def test_the_command_gives_the_advice_before_it_trains(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(3):
        scene(seed).save(folder / f"{seed}.png")
    softened(5)(scene(3)).save(folder / "soft.png")
    values = {"base": tiny_checkpoint, "images": folder, "name": "dog", "resolution": 64, "steps": 1, "rank": 2}
    values |= {"instance_prompt": "a photo of sks dog", "output_dir": tmp_path / "out", "device": "cpu"}
    recorder = Recorder()
    run_train(TrainCommand.checked(values), recorder)
    assert recorder.warnings == ["soft.png is blurred: use a sharper one."]
    kinds = ["Step" if hasattr(event, "loss") else getattr(event, "text", "") for event in recorder.events]
    assert kinds.index("soft.png is blurred: use a sharper one.") < kinds.index("Step")
