"""Every warning about one picture names it in `Note.picture`, also where other names begin with it or it with them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import mostly_slow
from helpers import Recorder
from pack.trainer.core.events import Note
from pack.trainer.data import captioning
from pack.trainer.data.captioning import caption_folder
from pack.trainer.data.folder import AnnotationOptions
from pack.trainer.data.image_check import check_pictures
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.data.latent_cache import build_cache
from pack.trainer.models.open import open_base
from pack.trainer.settings.caption import CaptionCommand
from pack.trainer.settings.train import TrainSettings
from PIL import Image, ImageFilter

STEMS = ("1", "1.png", "1.png copy", "1.png.png", "11")  # each is the beginning of another, or begins with one
ODD_SIZE = (56, 40)  # of the bad picture, where only its pixels tell it from the others


def photo(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def grey(value: int, size: tuple[int, int] = (48, 40)) -> bytes:
    return encoded(Image.new("L", size, value))


def half_grey(size: tuple[int, int]) -> bytes:
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return encoded(mask)


def warnings_of(recorder: Recorder) -> list[Note]:
    return [event for event in recorder.events if isinstance(event, Note) and event.warning]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# Stem of the bad picture → files that make it bad, beside or in place of `{stem}.png`
BAD_FILES: dict[str, Callable[[str], dict[str, bytes]]] = {
    "no picture": lambda stem: {f"{stem}.png": b"no picture"},
    "empty file": lambda stem: {f"{stem}.png": b""},
    "truncated": lambda stem: {f"{stem}.png": encoded(photo(9))[:80]},
    "too small": lambda stem: {f"{stem}.png": encoded(photo(9, (20, 20)))},
    "caption is empty": lambda stem: {f"{stem}.txt": b" \n"},
    "mask is stretched": lambda stem: {f"{stem}_mask.png": half_grey((80, 40))},
    "mask is black": lambda stem: {f"{stem}_mask.png": grey(0)},
}


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named(kind: str, stem: str, tmp_path: Path) -> None:
    files = {f"{name}.png": encoded(photo(seed)) for seed, name in enumerate(STEMS)}
    recorder = Recorder()
    load_pictures(write(tmp_path / "pictures", files | BAD_FILES[kind](stem)), "a prompt", recorder)
    [note] = warnings_of(recorder)
    assert note.picture == f"{stem}.png"


@pytest.mark.parametrize("stem", STEMS)
def test_a_foreign_format_is_named(stem: str, tmp_path: Path) -> None:
    files = {f"{name}.png": encoded(photo(seed)) for seed, name in enumerate(STEMS)} | {f"{stem}.heic": b"x"}
    recorder = Recorder()
    load_pictures(write(tmp_path / "pictures", files), "", recorder)
    [note] = warnings_of(recorder)
    assert note.picture == f"{stem}.heic"


@pytest.mark.parametrize("stem", STEMS)
def test_a_file_that_cannot_be_read_is_named(stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "pictures", {f"{name}.png": encoded(photo(seed)) for seed, name in enumerate(STEMS)})
    read_bytes = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == f"{stem}.png":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    recorder = Recorder()
    load_pictures(folder, "", recorder)
    [note] = warnings_of(recorder)
    assert note.picture == f"{stem}.png"


@pytest.mark.parametrize("stem", STEMS)
def test_a_mask_without_a_picture_is_named(stem: str, tmp_path: Path) -> None:
    others = [name for name in STEMS if name != stem]
    files = {f"{name}.png": encoded(photo(seed)) for seed, name in enumerate(others)}
    recorder = Recorder()
    load_pictures(write(tmp_path / "pictures", files | {f"{stem}-masklabel.png": grey(255)}), "", recorder)
    [note] = warnings_of(recorder)
    assert note.picture == f"{stem}-masklabel.png"


@pytest.mark.parametrize(("first", "second"), [("1", "1.png"), ("1", "11"), ("1.png", "1.png copy")])
def test_of_two_that_are_the_same_the_second_is_named(first: str, second: str, tmp_path: Path) -> None:
    files = {f"{name}.png": encoded(photo(seed)) for seed, name in enumerate(STEMS)}
    files[f"{second}.png"] = files[f"{first}.png"]
    recorder = Recorder()
    pictures = load_pictures(write(tmp_path / "pictures", files), "", recorder)
    [note] = warnings_of(recorder)
    copies = [picture.name for picture in pictures if picture.name in (f"{first}.png", f"{second}.png")]
    assert note.picture == copies[1]


@pytest.mark.parametrize("stem", STEMS)
def test_pictures_of_kohyas_folders_are_named_with_these(stem: str, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    files = {f"{name}.png": encoded(photo(seed)) for seed, name in enumerate(STEMS)} | {f"{stem}.txt": b""}
    write(tmp_path / "pictures" / "10_sks dog", files)
    recorder = Recorder()
    pictures = load_pictures(tmp_path / "pictures", "", recorder)
    [note] = warnings_of(recorder)
    assert note.picture == f"10_sks dog/{stem}.png"
    assert note.picture in [picture.name for picture in pictures]


def test_a_warning_about_several_or_none_names_none(tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": f"{number}.png", "text": "x"}) for number in (3, 4)]
    files = {"1.png": encoded(photo(0)), "metadata.jsonl": "\n".join(lines).encode()}
    recorder = Recorder()
    folder = write(tmp_path / "pictures", files)
    write(folder / "10_sks dog", {"1.png": encoded(photo(1))})
    load_pictures(folder, "", recorder)
    texts = [note.text for note in warnings_of(recorder)]
    assert len(texts) == 3, texts  # the subfolder, the names in the metadata, too few pictures
    assert {note.picture for note in warnings_of(recorder)} == {""}


def test_connected_images_are_named() -> None:
    tensors = [torch.rand(40, 48, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(11)]
    tensors[10] = tensors[0]
    masks = [torch.ones(40, 48) for _ in tensors]
    masks[0] = torch.zeros(40, 48)
    recorder = Recorder()
    load_pictures(tensors, "", recorder, AnnotationOptions(), masks=masks)
    assert [note.picture for note in warnings_of(recorder)] == ["connected image 1", "connected image 11"]


def scene(seed: int) -> Image.Image:
    """Sharp, bright, and unlike every other."""
    blocks = np.random.default_rng(seed).integers(60, 256, (7, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((320, 280), Image.Resampling.NEAREST)


def as_picture(name: str, image: Image.Image) -> Picture:
    return Picture(name, caption="", digest=name, open=lambda: image)


NAMES = ("a", "a.png", "aa", "b", "1.png", "1.png.png")  # `Picture.name` may be anything
BAD_IMAGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "too small": lambda image: image.resize((40, 35), Image.Resampling.NEAREST),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(8)),
    "dark": lambda image: image.point([value // 8 for value in range(256)] * 3),
    "empty": lambda image: Image.new("RGB", image.size, "green"),
}


FAULTS = [(kind, name) for kind in BAD_IMAGES for name in NAMES]


@pytest.mark.parametrize(("kind", "name"), mostly_slow(FAULTS, *FAULTS[:: len(NAMES) + 1], ("dark", "1.png.png")))
def test_a_picture_with_a_fault_is_named(kind: str, name: str) -> None:
    pictures = [as_picture(other, scene(seed)) for seed, other in enumerate(NAMES)]
    recorder = Recorder()
    check_pictures(pictures, TrainSettings(resolution=64), recorder)
    assert warnings_of(recorder) == []
    index = NAMES.index(name)
    pictures[index] = as_picture(name, BAD_IMAGES[kind](scene(index)))
    check_pictures(pictures, TrainSettings(resolution=64), recorder)
    [note] = warnings_of(recorder)
    assert note.picture == name


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_advice_about_several_pictures_names_none_of_them(kind: str) -> None:
    pictures = [as_picture(name, scene(seed)) for seed, name in enumerate(NAMES)]
    pictures[:2] = [as_picture(name, BAD_IMAGES[kind](scene(seed))) for seed, name in enumerate(NAMES[:2])]
    recorder = Recorder()
    check_pictures(pictures, TrainSettings(resolution=64), recorder)
    assert {note.picture for note in warnings_of(recorder)} == {""}
    assert warnings_of(recorder)


@pytest.mark.parametrize("name", mostly_slow(NAMES, "a", "1.png"))
def test_pictures_that_are_encoded_are_named(name: str, tiny_checkpoint: Path) -> None:
    """One mask lies beside the crop, and one caption is too long."""
    mask = Image.new("L", (128, 64), 0)
    mask.paste(255, (0, 0, 16, 64))
    pictures = [
        replace(as_picture(other, photo(seed, (128, 64))), caption="a photo of sks dog")
        for seed, other in enumerate(NAMES)
    ]
    index = NAMES.index(name)
    pictures[index] = replace(pictures[index], caption="dog " * 200, mask=partial(Image.Image.copy, mask))
    base = open_base(tiny_checkpoint)
    settings = TrainSettings(name="x", resolution=64, steps=1)
    recorder = Recorder()
    build_cache(base.family.build(base), {"instance": pictures}, settings, torch.device("cpu"), recorder)
    assert [note.picture for note in warnings_of(recorder)] == [name, name]


def test_a_long_caption_of_several_pictures_names_none_of_them(tiny_checkpoint: Path) -> None:
    pictures = [replace(as_picture(name, photo(seed)), caption="dog " * 200) for seed, name in enumerate(NAMES)]
    base = open_base(tiny_checkpoint)
    settings = TrainSettings(name="x", resolution=64, steps=1)
    recorder = Recorder()
    build_cache(base.family.build(base), {"instance": pictures}, settings, torch.device("cpu"), recorder)
    assert [note.picture for note in warnings_of(recorder)] == [""]


class SilentCaptioner:
    """Has no words for pictures of `ODD_SIZE`."""

    def describe(self, images: Sequence[Image.Image], text: str, **options: Any) -> list[str]:
        return ["" if image.size == ODD_SIZE else "a dog" for image in images]


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("kind", ["no picture", "no words", "same caption file"])
def test_a_picture_without_a_caption_is_named(
    kind: str, stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioning, "open_captioner", lambda *arguments, **options: SilentCaptioner())
    files = {f"{name}.png": encoded(photo(seed)) for seed, name in enumerate(STEMS)}
    bad_files = {
        "no picture": {f"{stem}.png": b"no picture"},
        "no words": {f"{stem}.png": encoded(photo(9, ODD_SIZE))},
        "same caption file": {f"{stem}.webp": encoded(photo(9))},
    }
    folder = write(tmp_path / "pictures", files | bad_files[kind])
    recorder = Recorder()
    caption_folder(CaptionCommand.checked({"images": folder, "model": "any", "device": "cpu"}), recorder)
    [note] = warnings_of(recorder)
    assert note.picture == (f"{stem}.webp" if kind == "same caption file" else f"{stem}.png")
