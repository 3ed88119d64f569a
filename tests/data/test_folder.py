"""What lies beside pictures, in a folder or a zip file: captions, masks, repeats; and what of it is refused or told."""

from __future__ import annotations

import io
import json
import unicodedata
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Recorder
from pack.trainer.core.errors import PicturesError
from pack.trainer.data.folder import AnnotationOptions, picture_names
from pack.trainer.data.images import Picture, load_pictures
from PIL import Image

PROMPT = "a photo of sks dog"
KINDS = pytest.mark.parametrize("kind", ["folder", "zip"])
WHITE, BLACK = 255, 0


def photo(seed: int = 0, size: tuple[int, int] = (48, 40), format: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), format, **options)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def left_half(size: tuple[int, int] = (48, 40), mode: str = "L") -> bytes:
    """A mask: white on the left, black on the right."""
    mask = Image.new("L", size, BLACK)
    mask.paste(WHITE, (0, 0, size[0] // 2, size[1]))
    return encoded(mask.convert(mode))


def place(tmp_path: Path, files: dict[str, bytes], kind: str = "folder", name: str = "dög pictures") -> Path:
    """The files as a folder or as a zip file, under a name with an umlaut and a blank."""
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for inside, content in files.items():
                archive.writestr(inside, content)
        return tmp_path / f"{name}.zip"
    for inside, content in files.items():
        path = tmp_path / name / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / name


def load(source: Path, prompt: str = PROMPT, **reading: Any) -> tuple[list[Picture], Recorder]:
    listener = Recorder()
    return load_pictures(source, prompt, listener, AnnotationOptions(**reading)), listener


def captions(pictures: Sequence[Picture]) -> dict[str, str]:
    return {picture.name: picture.caption for picture in pictures}


def described(*entries: dict[str, Any]) -> bytes:
    return "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries).encode()


THREE = {f"{name}.png": photo(number) for number, name in enumerate("abc")}


@KINDS
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"b.txt": b"text"}, "text"),
        ({"b.TXT": b"text"}, "text"),
        ({"b.caption": b"told"}, "told"),
        ({"b.txt": b"text", "b.caption": b"told"}, "text"),
        ({"metadata.jsonl": described({"file_name": "b.png", "text": "line"})}, "line"),
        ({"metadata.jsonl": described({"file_name": "b.png", "caption": "line"})}, "line"),
        ({"metadata.jsonl": described({"file_name": "b.png", "prompt": "line"})}, "line"),
        ({"metadata.jsonl": described({"file_name": "b.png", "text": " ", "caption": "line"})}, "line"),
        ({"metadata.jsonl": described({"file_name": "./b.png", "text": " two \t blanks "})}, "two blanks"),
        ({"metadata.jsonl": described({"file_name": "b.png", "text": "line"}), "b.caption": b"told"}, "told"),
        ({"metadata.jsonl": described({"file_name": "b.png"})}, PROMPT),
        ({"metadata.jsonl": described({"file_name": "b.png", "text": 7})}, PROMPT),
        ({"metadata.jsonl": b"\xef\xbb\xbf\r\n" + described({"file_name": "b.png", "text": "line"}) + b"\r\n"}, "line"),
        ({"metadata.jsonl": described({"file_name": "b.png", "text": "a\u2028b\x85c"})}, "a b c"),
        ({"notes.md": b"no caption", "captions.csv": b"b.png,x"}, PROMPT),
    ],
)
def test_the_caption_that_is_nearest_counts(files: dict[str, bytes], expected: str, kind: str, tmp_path: Path) -> None:
    pictures, listener = load(place(tmp_path, THREE | files, kind))
    assert captions(pictures) == {"a.png": PROMPT, "b.png": expected, "c.png": PROMPT}
    assert not listener.notes
    assert all(picture.more_captions == () for picture in pictures)


def test_metadata_in_folders_of_a_zip_is_of_these_folders(tmp_path: Path) -> None:
    lines = {name: described({"file_name": "1.png", "text": f"{name} one"}) for name in ("x", "y")}
    files = {f"{name}/metadata.jsonl": line for name, line in lines.items()}
    files |= {"metadata.jsonl": described({"file_name": "z\\1.png", "text": "z one"})}
    files |= {f"{name}/{number}.png": photo(number) for name in "xyz" for number in (1, 2)}
    pictures, listener = load(place(tmp_path, files, "zip"))
    assert captions(pictures) == {
        "x/1.png": "x one",
        "x/2.png": PROMPT,
        "y/1.png": "y one",
        "y/2.png": PROMPT,
        "z/1.png": "z one",
        "z/2.png": PROMPT,
    }
    assert [text for text in listener.notes if "same picture" not in text] == [
        "The pictures in x, y and z are all used as pictures of one subject."
    ]


@KINDS
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"file_name": "b.png", "text": "x"', "not valid JSON"),
        (b"b.png: a dog", "not valid JSON"),
        (b'["b.png", "a dog"]', "names no picture"),
        (b'{"text": "a dog"}', "names no picture"),
        (b'{"file_name": 3, "text": "a dog"}', "names no picture"),
    ],
)
def test_a_damaged_line_of_metadata_is_named(line: bytes, words: str, kind: str, tmp_path: Path) -> None:
    good = described({"file_name": "a.png", "text": "x"})
    source = place(tmp_path, THREE | {"metadata.jsonl": good + b"\n\n" + line}, kind)
    with pytest.raises(PicturesError) as caught:
        load(source)
    assert "line 3 of metadata.jsonl" in caught.value.problem
    assert words in caught.value.problem
    assert "file_name" in caught.value.remedy
    for reading in ("file-names", "prompt"):  # nobody asks the file
        assert len(load(source, captions=reading)[0]) == 3


@KINDS
def test_metadata_of_pictures_that_are_not_there_is_told(kind: str, tmp_path: Path) -> None:
    entries = [{"file_name": f"{number}.png", "text": "x"} for number in range(5)]
    pictures, listener = load(place(tmp_path, THREE | {"metadata.jsonl": described(*entries)}, kind))
    assert set(captions(pictures).values()) == {PROMPT}
    [warning] = listener.warnings
    for words in ("metadata.jsonl", "0.png, 1.png, 2.png", "2 more"):
        assert words in warning


@KINDS
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_metadata_finds_names_with_umlauts_however_they_are_stored(kind: str, stored: Any, tmp_path: Path) -> None:
    name = unicodedata.normalize(stored, "müde Hündin.png")
    for form in ("NFC", "NFD"):
        line = described({"file_name": unicodedata.normalize(form, name), "text": "sks Hündin"})
        source = place(tmp_path, {**THREE, name: photo(5), "metadata.jsonl": line}, kind, name=f"{form} {stored}")
        pictures, listener = load(source)
        assert captions(pictures)[name] == "sks Hündin"
        assert not listener.notes


@KINDS
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a_red dog (3).jpg", "a red dog"),
        ("a_red dog_12.png", "a red dog"),
        ("a-red-dog-12.webp", "a-red-dog"),
        ("a red dog - 2.png", "a red dog"),
        ("a red dog01.png", "a red dog"),
        ("a red dog 007.png", "a red dog"),
        ("Boeing 747.png", "Boeing 747"),
        ("Boeing 747 (2).png", "Boeing 747"),
        ("Boeing 747_2.png", "Boeing 747"),
        ("R2D2.png", "R2D2"),
        ("20240501_123456.png", PROMPT),
        ("{token}, asleep.png", "sks, asleep"),
        ("a__red_dog_.png", "a red dog"),
        ("two 2 dogs.png", "two 2 dogs"),
        ("müde Hündin, im Schnee.png", "müde Hündin, im Schnee"),
        ("v1.5 dog.png", "v1.5 dog"),
        ("{token} {class}_1.png", "sks dog"),
        ("0017.png", PROMPT),
        ("(4).png", PROMPT),
    ],
)
def test_file_names_are_captions(name: str, expected: str, kind: str, tmp_path: Path) -> None:
    content = photo(0, format="JPEG" if name.endswith("jpg") else "WEBP" if name.endswith("webp") else "PNG")
    files = {name: content, f"{Path(name).stem}.txt": b"never read"}
    pictures, _ = load(place(tmp_path, files, kind), captions="file-names", token="sks", class_noun="dog")
    assert captions(pictures) == {name: expected}


@KINDS
def test_the_prompt_alone_is_asked(kind: str, tmp_path: Path) -> None:
    files = {f"10_cat/{name}": content for name, content in THREE.items()}
    files |= {"10_cat/a.txt": b"", "10_cat/metadata.jsonl": b"damaged"}
    pictures, listener = load(place(tmp_path, files, kind), captions="prompt")
    assert {(one.caption, one.repeats) for one in pictures} == {(PROMPT, 10)}
    assert not listener.notes


@KINDS
def test_templates_and_several_prompts(kind: str, tmp_path: Path) -> None:
    files = THREE | {"b.txt": b"{token} the {class}|asleep"}
    prompt = "a photo of {token} {class} | {token}|\n a {class}, close-up "
    pictures, _ = load(place(tmp_path, files, kind), prompt, token=" sks ", class_noun="dog")
    assert [one.captions for one in pictures] == [
        ("a photo of sks dog", "sks", "a dog, close-up"),
        ("sks the dog", "asleep"),
        ("a photo of sks dog", "sks", "a dog, close-up"),
    ]


@KINDS
def test_kohyas_folders(kind: str, tmp_path: Path) -> None:
    files = {f"10_sks dög/{name}": content for name, content in THREE.items()}
    files |= {"2_{token} cat/d.png": photo(7), "0_x/e.png": photo(8), "10_sks dög/b.txt": b"own", "notes.txt": b"x"}
    files |= {"metadata.jsonl": described({"file_name": "10_sks dög/c.png", "text": "line"})}
    pictures, listener = load(place(tmp_path, files, kind), repeats=3, token="rraj")
    assert [(one.name, one.caption, one.repeats) for one in pictures] == [
        ("10_sks dög/a.png", "sks dög", 30),
        ("10_sks dög/b.png", "own", 30),
        ("10_sks dög/c.png", "line", 30),
        ("2_{token} cat/d.png", "rraj cat", 6),
    ]
    assert listener.notes == [
        "The pictures in 0_x (1) are ignored; only those in 10_sks dög and 2_{token} cat are used."
    ]


@KINDS
def test_pictures_beside_kohyas_folders_are_told(kind: str, tmp_path: Path) -> None:
    files = THREE | {"10_sks dog/d.png": photo(7), "5_empty/notes.md": b"#", "old/e.png": photo(8)}
    pictures, listener = load(place(tmp_path, files, kind))
    assert [(one.name, one.repeats) for one in pictures] == [(name, 1) for name in sorted(THREE)]
    assert listener.notes == [
        "The pictures in 10_sks dog (1) and old (1) are ignored; only those in dög pictures itself are used."
    ]


@KINDS
@pytest.mark.parametrize("name", ["20240501_holiday", "2024_holiday", "10_", "10 sks dog", "x_10_dog"])
def test_other_folders_are_none_of_kohyas(name: str, kind: str, tmp_path: Path) -> None:
    files = {f"{name}/{picture}": content for picture, content in THREE.items()}
    pictures, listener = load(place(tmp_path, files, kind))
    assert {(one.caption, one.repeats) for one in pictures} == {(PROMPT, 1)}
    assert not listener.notes


def test_a_zip_with_backslashes_is_as_one_with_slashes(tmp_path: Path) -> None:
    """As old programs for Windows write them."""
    files = {"5_sks dog/a.png": photo(0), "5_sks dog/a.txt": b"own", "5_sks dog/b.png": photo(1)}
    files |= {"5_sks dog/c.png": photo(2), "5_sks dog/c_mask.png": left_half()}
    with zipfile.ZipFile(tmp_path / "back.zip", "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo("x")
            entry.filename = name.replace("/", "\\")
            archive.writestr(entry, content)
    straight, crooked = load(place(tmp_path, files, "zip"))[0], load(tmp_path / "back.zip")[0]
    assert [one.name for one in crooked] == ["5_sks dog/a.png", "5_sks dog/b.png", "5_sks dog/c.png"]
    assert [one.fingerprint_values for one in crooked] == [one.fingerprint_values for one in straight]


MASK_NAMES = ["b-masklabel.png", "b_mask.png", "b.mask.png", "masks/b.png", "b_mask.jpg", "masks/b.webp"]


@KINDS
@pytest.mark.parametrize("name", MASK_NAMES)
@pytest.mark.parametrize("folder", ["", "10_sks dog/"])
def test_masks_beside_pictures(name: str, folder: str, kind: str, tmp_path: Path) -> None:
    files = {f"{folder}{one}": content for one, content in THREE.items()} | {f"{folder}{name}": left_half()}
    pictures, listener = load(place(tmp_path, files, kind))
    assert [one.name for one in pictures] == [f"{folder}{one}" for one in sorted(THREE)]
    assert not listener.notes
    plain, masked, _ = pictures
    assert (plain.mask, plain.mask_digest) == (None, "")
    assert masked.mask is not None
    assert masked.mask_digest
    mask = masked.mask()
    assert mask.mode == "L"
    np.testing.assert_array_equal(np.array(mask), np.array(Image.open(io.BytesIO(left_half()))))
    off, listener = load(place(tmp_path, files, kind), masks="off")
    assert [(one.name, one.mask) for one in off] == [(f"{folder}{one}", None) for one in sorted(THREE)]
    assert not listener.notes


@KINDS
@pytest.mark.parametrize("masks", ["files", "alpha", "off"])
def test_nothing_that_is_named_like_a_mask_is_trained_on(masks: str, kind: str, tmp_path: Path) -> None:
    """Also where the picture is gone, can't be read, or has another mask."""
    lost = {"masks/gone.png": left_half(), "gone-masklabel.png": left_half()}
    doubled = {"a_mask.png": left_half(), "a_mask.bmp": encoded(Image.new("L", (48, 40), 9), "BMP")}
    files = {**THREE, **lost, **doubled, "bad.png": b"no picture", "bad_mask.png": left_half()}
    pictures, listener = load(place(tmp_path, files, kind), masks=masks)
    assert [one.name for one in pictures] == sorted(THREE)
    assert kind == "zip" or picture_names(tmp_path / "dög pictures") == sorted([*THREE, "bad.png"])
    told = " ".join(listener.warnings)
    for name in (*lost, "a_mask.bmp", "bad.png"):
        assert name in told
    assert len(listener.warnings) == 2


@KINDS
def test_a_subject_may_be_a_mask(kind: str, tmp_path: Path) -> None:
    """Carnival masks, in files and a folder of that name, without pictures beside them."""
    names = ["masks/1.png", "masks/lion_mask.png"] if kind == "zip" else ["1.png", "lion_mask.png"]
    files = {name: photo(number) for number, name in enumerate(names)}
    pictures, _ = load(place(tmp_path, files, kind, name="masks"))
    assert [one.name for one in pictures] == names


@KINDS
def test_masks_that_say_nothing(kind: str, tmp_path: Path) -> None:
    files = THREE | {
        "a_mask.png": encoded(Image.new("L", (48, 40), BLACK)),
        "b_mask.png": encoded(Image.new("L", (48, 40), WHITE)),
    }
    pictures, listener = load(place(tmp_path, files, kind))
    bare, _ = load(place(tmp_path, THREE, kind, name="bare"))
    assert [one.mask for one in pictures] == [None] * 3
    assert [one.fingerprint_values for one in pictures] == [one.fingerprint_values for one in bare]
    [warning] = listener.warnings
    assert "a.png" in warning
    assert "black" in warning


@KINDS
@pytest.mark.parametrize("content", [b"", b"no picture", left_half()[:60], left_half((16, 16))], ids=len)
def test_a_broken_mask_is_an_error_that_names_the_picture(content: bytes, kind: str, tmp_path: Path) -> None:
    source = place(tmp_path, THREE | {"b_mask.png": content}, kind)
    with pytest.raises(PicturesError) as caught:
        load(source)
    assert "b.png" in caught.value.problem
    assert "mask" in caught.value.problem
    assert len(load(source, masks="off")[0]) == 3


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "LA", "RGBA"])
def test_masks_of_every_mode(mode: str, tmp_path: Path) -> None:
    [picture], _ = load(place(tmp_path, {"a.png": photo(), "a_mask.png": left_half(mode=mode)}))
    assert picture.mask is not None
    np.testing.assert_array_equal(np.array(picture.mask()), np.array(Image.open(io.BytesIO(left_half()))))


def test_what_is_transparent_in_a_mask_is_background(tmp_path: Path) -> None:
    """As a layer that was exported alone: white where the subject is, and nothing elsewhere."""
    layer = Image.new("RGBA", (48, 40), (0, 0, 0, 0))
    layer.paste((255, 255, 255, 255), (0, 0, 24, 40))
    [picture], listener = load(place(tmp_path, {"a.png": photo(), "a_mask.png": encoded(layer)}))
    assert picture.mask is not None
    np.testing.assert_array_equal(np.array(picture.mask()), np.array(Image.open(io.BytesIO(left_half()))))
    assert len(listener.warnings) == 1  # of a picture that is alone


@pytest.mark.parametrize(
    ("size", "told"), [((96, 80), False), ((480, 400), False), ((49, 41), False), ((40, 48), True), ((80, 40), True)]
)
def test_masks_of_another_size_are_taken_and_of_another_shape_told(
    size: tuple[int, int], told: bool, tmp_path: Path
) -> None:
    pictures, listener = load(place(tmp_path, THREE | {"b_mask.png": left_half(size)}))
    assert pictures[1].mask is not None
    assert pictures[1].mask().size == size
    assert bool(listener.warnings) == told
    assert all("b.png" in text and f"{size[0]}×{size[1]}" in text for text in listener.warnings)


@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_a_turned_picture_and_its_mask_are_both_upright(orientation: int, tmp_path: Path) -> None:
    """The mask is stored as the picture is, with the same tag; or upright already, without."""
    turns = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180}
    turns |= {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # to store; to show, the other way
    exif = Image.Exif()
    exif[0x0112] = orientation

    def stored(content: bytes) -> bytes:
        image = Image.open(io.BytesIO(content))
        return encoded(image.transpose(turns[orientation]) if orientation in turns else image, exif=exif)

    for number, mask in enumerate((stored(left_half()), left_half())):
        source = place(tmp_path, {"a.png": stored(photo()), "a_mask.png": mask}, name=str(number))
        [picture], _ = load(source)
        assert picture.open().tobytes() == Image.open(io.BytesIO(photo())).tobytes()
        assert picture.mask is not None
        np.testing.assert_array_equal(np.array(picture.mask()), np.array(Image.open(io.BytesIO(left_half()))))


def test_alpha_is_a_mask_if_asked_for(tmp_path: Path) -> None:
    cut_out = Image.open(io.BytesIO(photo())).convert("RGBA")
    cut_out.putalpha(Image.open(io.BytesIO(left_half())))
    opaque = Image.open(io.BytesIO(photo(1))).convert("RGBA")
    gif = Image.new("P", (48, 40), 1)
    gif.putpalette([0, 0, 0, 255, 0, 0])
    gif.paste(0, (24, 0, 48, 40))
    grey = Image.fromarray(np.full((40, 48), 20_000, np.uint16))
    files = {
        "a.png": encoded(cut_out),
        "b.png": encoded(opaque),
        "c.gif": encoded(gif, "GIF", transparency=0),
        "d.png": encoded(grey),
        "e.jpg": photo(3, format="JPEG"),
        "f.png": encoded(cut_out),
        "f_mask.png": encoded(Image.new("L", (48, 40), 128)),
    }
    pictures, _ = load(place(tmp_path, files), masks="alpha")
    by_name = {one.name: one for one in pictures}
    assert {name for name, one in by_name.items() if one.mask} == {"a.png", "c.gif", "f.png"}
    for name in ("a.png", "c.gif"):
        mask = by_name[name].mask
        assert mask is not None
        np.testing.assert_array_equal(np.array(mask()), np.array(Image.open(io.BytesIO(left_half()))))
    file_mask = by_name["f.png"].mask
    assert file_mask is not None
    assert file_mask().getextrema() == (128, 128)  # a file comes first
    assert {one.mask for one in load(place(tmp_path, {"a.png": encoded(cut_out)}, name="plain"))[0]} == {None}


@KINDS
def test_names_with_umlauts_and_blanks(kind: str, tmp_path: Path) -> None:
    files = {"Hündin im  Schnee 犬.png": photo(0), "Hündin im  Schnee 犬.txt": "sks Hündin".encode()}
    files |= {"Hündin im  Schnee 犬_mask.png": left_half(), "é.v2.png": photo(1), "é.v2.caption": b"x"}
    pictures, _ = load(place(tmp_path, files, kind))
    assert captions(pictures) == {"Hündin im  Schnee 犬.png": "sks Hündin", "é.v2.png": "x"}
    assert [one.mask is not None for one in pictures] == [True, False]


@KINDS
def test_unreadable_pictures_are_told_and_left_out(kind: str, tmp_path: Path) -> None:
    files = THREE | {"d.png": b"", "e.jpg": b"no picture", "f.heic": b"x", "g.png": photo()[:80]}
    pictures, listener = load(place(tmp_path, files, kind))
    assert [one.name for one in pictures] == sorted(THREE)
    assert len(listener.warnings) == 4
    for name, warning in zip(("d.png", "e.jpg", "f.heic", "g.png"), listener.warnings, strict=True):
        assert name in warning
    with pytest.raises(PicturesError) as caught:
        load(place(tmp_path, {"d.png": b""}, kind, name="bad"))
    assert "d.png" in caught.value.problem


def test_a_folder_and_its_zip_make_the_same_run(tmp_path: Path) -> None:
    files = {f"3_sks dog/{name}": content for name, content in THREE.items()}
    files |= {"3_sks dog/a.txt": b"own", "3_sks dog/masks/b.png": left_half(), "12_b/z.png": photo(9)}
    files |= {"3_sks dog/metadata.jsonl": described({"file_name": "c.png", "text": "line"})}
    both = [load(place(tmp_path, files, kind), "x|y", repeats=2)[0] for kind in ("folder", "zip")]
    assert [one.fingerprint_values for one in both[0]] == [one.fingerprint_values for one in both[1]]
    assert [one.name for one in both[0]] == [one.name for one in both[1]]
    shuffled = dict(sorted(files.items(), key=lambda item: item[0][::-1]))
    again, _ = load(place(tmp_path, shuffled, "zip", name="again"), "x|y", repeats=2)
    assert [one.fingerprint_values for one in again] == [one.fingerprint_values for one in both[0]]
    assert picture_names(tmp_path / "dög pictures") == [one.name for one in both[0]]


def images(count: int) -> list[torch.Tensor]:
    return [torch.rand(40, 48, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_captions_and_masks_of_tensors() -> None:
    half = torch.zeros(40, 48)
    half[:, :24] = 1
    pictures = load_pictures(
        images(3),
        "{token} dog|{token}",
        Recorder(),
        AnnotationOptions(token="sks", repeats=4),
        captions=["{token} asleep", " ", "{token} awake"],
        masks=[half, torch.ones(40, 48), torch.zeros(40, 48)],
    )
    assert [one.captions for one in pictures] == [("sks asleep",), ("sks dog", "sks"), ("sks awake",)]
    assert [one.repeats for one in pictures] == [4, 4, 4]
    assert [one.mask is not None for one in pictures] == [True, False, False]
    assert pictures[0].mask is not None
    np.testing.assert_array_equal(np.array(pictures[0].mask()), (half * 255).numpy().astype(np.uint8))
    off = load_pictures(images(3), PROMPT, Recorder(), AnnotationOptions(masks="off"), masks=[half] * 3)
    assert [one.mask for one in off] == [None] * 3


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", ["captions", "masks"])
def test_wrong_numbers_of_captions_and_masks(kind: str, count: int) -> None:
    values: dict[str, Any] = {kind: ["x"] * count if kind == "captions" else [torch.ones(40, 48)] * count}
    with pytest.raises(PicturesError) as caught:
        load_pictures(images(3), PROMPT, Recorder(), **values)
    assert f"3 connected images, but {count} {kind}" in caught.value.problem


def test_a_mask_tensor_of_another_shape_is_named() -> None:
    with pytest.raises(PicturesError) as caught:
        load_pictures(images(2), PROMPT, Recorder(), masks=[torch.ones(40, 48), torch.ones(1, 40, 48)])
    assert "connected image 2" in caught.value.problem
    assert "(1, 40, 48)" in caught.value.problem


def test_transparency_of_tensors() -> None:
    half = torch.ones(40, 48, 1)
    half[:, 24:] = 0
    tensors = [torch.cat([images(1)[0], half], dim=2), *images(2)[1:]]
    with_alpha = load_pictures(tensors, PROMPT, Recorder(), AnnotationOptions(masks="alpha"))
    assert [one.mask is not None for one in with_alpha] == [True, False]
    assert [one.mask for one in load_pictures(tensors, PROMPT, Recorder())] == [None, None]
