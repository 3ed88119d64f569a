"""Whatever format, mode or place a picture comes from, its pixels, caption, digest and order are right."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Recorder
from numpy.typing import NDArray
from pack.trainer.core.errors import PicturesError
from pack.trainer.data.images import Picture, crop, decode, load_pictures, to_pixels
from PIL import Image

Pixels = NDArray[np.uint8]
PROMPT = "a photo of sks dog"
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
SIZE = (64, 48)  # width, height


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png(rows: NDArray[np.generic], colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file by hand, for what Pillow does not write: 16 bits a channel in every colour type."""
    height, width = rows.shape[:2]
    depth = 8 * rows.dtype.itemsize
    lines = rows.astype(rows.dtype.newbyteorder(">")).reshape(height, -1)
    body = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(body, 1)), (b"IEND", b"")]
    chunked = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunked)


def quadrants() -> Pixels:
    """64×48: red, green, blue and white quadrants, so that every turn and mirror image differs."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[:24, :32], pixels[:24, 32:], pixels[24:, :32], pixels[24:, 32:] = RED, GREEN, BLUE, WHITE
    return pixels


def noise(seed: int = 0, height: int = 48, width: int = 64) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def middle(image: Image.Image) -> tuple[int, ...]:
    pixel = image.getpixel((image.width // 2, image.height // 2))
    assert isinstance(pixel, tuple)
    return pixel


# How the upright picture is stored, by EXIF tag 0x0112: which visual side its row 0 and its column 0 are
# (EXIF 2.32, section 4.6.4).
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda p: p,  # top, left
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: lambda p: p.transpose(1, 0, 2),  # left, top
    6: lambda p: p[:, ::-1].transpose(1, 0, 2),  # right, top
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: lambda p: p[::-1].transpose(1, 0, 2),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](quadrants())))
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    image = decode(encoded(stored, format, exif=exif, **options))
    assert image.mode == "RGB"
    assert image.size == SIZE
    np.testing.assert_allclose(np.array(image).astype(int), quadrants().astype(int), atol=3)


def tiff_entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


@pytest.mark.parametrize(
    "entry",
    [
        tiff_entry(0x0100, 2, 4, b"abc\0"),  # a width that is text
        tiff_entry(0x0100, 11, 1, struct.pack("<f", 1.5)),  # a width that is no whole number
        tiff_entry(0x011A, 5, 1, struct.pack("<I", 99999)),  # a resolution that lies beyond the end
        tiff_entry(0x0103, 3, 900, b""),  # a count that is too high
        tiff_entry(0x8769, 4, 1, struct.pack("<I", 99999)),  # a block that lies beyond the end
    ],
    ids=["text for a number", "fraction", "value beyond the end", "too many values", "block beyond the end"],
)
def test_photo_with_a_damaged_exif_block_is_used(entry: bytes) -> None:
    entries = sorted([entry, tiff_entry(0x0112, 3, 1, struct.pack("<H", 6))])
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](quadrants())))
    content = encoded(stored, "JPEG", exif=block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's own word about the block
        assert decode(content).size == SIZE


def flat(mode: str, value: float | tuple[int, ...]) -> Image.Image:
    return Image.new(mode, SIZE, value)


def grey16(value: int) -> Image.Image:
    return Image.fromarray(np.full((SIZE[1], SIZE[0]), value, np.uint16))


def palette(transparent: bool) -> bytes:
    """A palette picture whose left half has entry 0 (blue, perhaps transparent) and whose middle has entry 1 (red)."""
    image = Image.new("P", SIZE, 1)
    image.putpalette([*BLUE, *RED])
    image.paste(0, (0, 0, 16, SIZE[1]))
    return encoded(image, "PNG", transparency=1) if transparent else encoded(image, "PNG")


def channels16(*values: int) -> NDArray[np.uint16]:
    return np.broadcast_to(np.array(values, np.uint16), (SIZE[1], SIZE[0], len(values)))


MODES: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "RGB": (encoded(flat("RGB", (10, 20, 30)), "PNG"), (10, 20, 30)),
    "RGBA, half transparent": (encoded(flat("RGBA", (255, 0, 0, 128)), "PNG"), (255, 127, 127)),
    "RGBA, transparent": (encoded(flat("RGBA", (1, 2, 3, 0)), "PNG"), WHITE),
    "RGBA, opaque": (encoded(flat("RGBA", (1, 2, 3, 255)), "PNG"), (1, 2, 3)),
    "RGBA in WebP": (encoded(flat("RGBA", (255, 0, 0, 128)), "WEBP", lossless=True), (255, 127, 127)),
    "RGBA in TIFF": (encoded(flat("RGBA", (255, 0, 0, 128)), "TIFF"), (255, 127, 127)),
    "RGB with a transparent colour": (encoded(flat("RGB", (1, 2, 3)), "PNG", transparency=(1, 2, 3)), WHITE),
    "grey": (encoded(flat("L", 77), "PNG"), (77, 77, 77)),
    "grey JPEG": (encoded(flat("L", 77), "JPEG"), (77, 77, 77)),
    "grey with alpha": (encoded(flat("LA", (0, 64)), "PNG"), (191, 191, 191)),
    "grey with a transparent shade": (encoded(flat("L", 5), "PNG", transparency=5), WHITE),
    "1 bit, white": (encoded(flat("1", 1), "PNG"), WHITE),
    "1 bit, black": (encoded(flat("1", 0), "PNG"), BLACK),
    "palette": (palette(transparent=False), RED),
    "palette with transparency": (palette(transparent=True), WHITE),
    "CMYK TIFF": (encoded(flat("CMYK", (0, 255, 255, 0)), "TIFF"), RED),
    "CMYK JPEG": (encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), RED),
    "16-bit grey PNG, white": (encoded(grey16(65535), "PNG"), WHITE),
    "16-bit grey PNG, dark": (encoded(grey16(20 * 257), "PNG"), (20, 20, 20)),
    "16-bit grey PNG, below 8 bit": (encoded(grey16(255), "PNG"), BLACK),
    "16-bit grey TIFF": (encoded(grey16(200 * 257), "TIFF"), (200, 200, 200)),
    "16-bit RGB PNG": (png(channels16(10 * 257, 20 * 257, 30 * 257), 2), (10, 20, 30)),
    "16-bit RGBA PNG": (png(channels16(65535, 0, 0, 128 * 257), 6), (255, 127, 127)),
    "16-bit grey PNG with alpha": (png(channels16(0, 64 * 257), 4), (191, 191, 191)),
    "float TIFF in [0, 1]": (encoded(flat("F", 0.5), "TIFF"), (127, 127, 127)),
    "BMP": (encoded(flat("RGB", (10, 20, 30)), "BMP"), (10, 20, 30)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb_on_white(name: str) -> None:
    content, expected = MODES[name]
    image = decode(content)
    assert image.mode == "RGB"
    assert image.size == SIZE
    np.testing.assert_allclose(middle(image), expected, atol=2)


def test_16_bit_gradient_is_scaled_not_clipped() -> None:
    ramp = np.broadcast_to(np.linspace(0, 65535, 256).round().astype(np.uint16), (32, 256))
    row = np.array(decode(encoded(Image.fromarray(np.ascontiguousarray(ramp)), "PNG")))[0, :, 0]
    np.testing.assert_allclose(row.astype(int), np.arange(256), atol=1)


@pytest.mark.parametrize(
    ("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})], ids=lambda v: str(v)
)
def test_first_frame_of_an_animation(format: str, options: dict[str, object]) -> None:
    content = encoded(flat("RGB", RED), format, save_all=True, append_images=[flat("RGB", BLUE)], **options)
    np.testing.assert_allclose(middle(decode(content)), RED, atol=2)


@pytest.mark.parametrize("shape", [(48, 64, 1), (48, 64, 3), (48, 64, 4)], ids=["grey", "RGB", "RGBA"])
def test_tensors_become_pictures(shape: tuple[int, ...]) -> None:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if shape[2] == 4:
        values[..., 3] = 1.0
    [picture] = load_pictures([values], PROMPT, Recorder())
    expected = (values[..., :3].expand(48, 64, 3) * 255).round().to(torch.uint8).numpy()
    np.testing.assert_array_equal(np.array(picture.open()), expected)
    assert picture.caption == PROMPT


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((float("nan"), 0.0, 1.0), (0, 0, 255)),
        ((float("inf"), float("-inf"), 0.0), (255, 0, 0)),
        ((2.0, -1.0, 0.5), (255, 0, 128)),
        ((1.0, 0.0, 0.0, 0.5), (255, 127, 127)),
        ((1.0, 0.0, 0.0, 0.0), WHITE),
    ],
    ids=["NaN", "infinite", "out of range", "half transparent", "transparent"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_odd_tensor_values(value: tuple[float, ...], expected: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.tensor(value).expand(40, 40, -1).to(dtype)
    [picture] = load_pictures([tensor], PROMPT, Recorder())
    np.testing.assert_allclose(middle(picture.open()), expected, atol=1)


@pytest.mark.parametrize("shape", [(3, 64, 64), (64, 64), (1, 64, 64, 3), (64, 64, 2)], ids=str)
def test_tensors_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PicturesError) as caught:
        load_pictures([torch.zeros(48, 48, 3), torch.zeros(shape)], PROMPT, Recorder())
    assert "connected image 2" in caught.value.problem
    assert str(shape) in caught.value.problem


@pytest.mark.parametrize(
    ("size", "side"), [((200, 64), 64), ((64, 200), 64), ((400, 128), 64), ((128, 400), 64), ((100, 40), 128)]
)
def test_crop_keeps_the_centre(size: tuple[int, int], side: int) -> None:
    """Outside the centred square all is red, inside the left half is green and the right half is blue."""
    width, height = size
    square = min(size)
    left, top = (width - square) // 2, (height - square) // 2
    pixels = np.full((height, width, 3), RED, np.uint8)
    pixels[top : top + square, left : left + square // 2] = GREEN
    pixels[top : top + square, left + square // 2 : left + square] = BLUE
    cut = np.array(crop(Image.fromarray(pixels), side, side)).astype(int)
    assert cut.shape == (side, side, 3)
    edge = side // 8  # Lanczos mixes the pixels at a border
    halves = {GREEN: cut[edge:-edge, edge : side // 2 - edge], BLUE: cut[edge:-edge, side // 2 + edge : -edge]}
    for colour, half in halves.items():
        assert np.abs(half - np.array(colour)).max() <= 3


@pytest.mark.parametrize("size", [(200, 64), (64, 200)], ids=["wide", "tall"])
def test_crop_is_centred_to_the_pixel(size: tuple[int, int]) -> None:
    pixels = noise(0, size[1], size[0])
    cut, turned = (
        np.array(crop(Image.fromarray(p), 64, 64)) for p in (pixels, np.ascontiguousarray(pixels[::-1, ::-1]))
    )
    assert np.abs(cut[::-1, ::-1].astype(int) - turned).max() <= 1


def test_crop_of_the_right_size_changes_nothing() -> None:
    image = Image.fromarray(noise())
    assert crop(image, *SIZE).tobytes() == image.tobytes()


def test_crop_takes_width_before_height() -> None:
    assert crop(Image.fromarray(noise()), 96, 40).size == (96, 40)


def test_pixels_of_the_autoencoder() -> None:
    pixels = to_pixels(Image.fromarray(noise()))
    assert pixels.shape == (3, 48, 64)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose((pixels.permute(1, 2, 0).numpy() + 1) * 127.5, noise(), atol=1e-3)
    ends = to_pixels(Image.fromarray(np.array([[BLACK, WHITE, RED]], np.uint8)))
    torch.testing.assert_close(ends[:, 0, :].T, torch.tensor([[-1.0, -1, -1], [1, 1, 1], [1, -1, -1]]))


def folder_of(tmp_path: Path, files: dict[str, bytes], kind: str) -> Path:
    """The same files as a folder or as a zip file."""
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "dog.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return tmp_path / "dog.zip"
    for name, content in files.items():
        path = tmp_path / "dog" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "dog"


def photo(seed: int = 0) -> bytes:
    return encoded(Image.fromarray(noise(seed)), "PNG")


def load(source: Path) -> tuple[list[Picture], Recorder]:
    listener = Recorder()
    return load_pictures(source, PROMPT, listener), listener


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("text", "caption", "warned"),
    [
        (None, PROMPT, ""),
        (b"a photo of sks dog in the snow", "a photo of sks dog in the snow", ""),
        ("ein Foto von sks Hündin, 犬".encode(), "ein Foto von sks Hündin, 犬", ""),
        ("sks Hündin".encode("utf-8-sig"), "sks Hündin", ""),
        (b"  sks dog, on \t the\tbeach \r\n\r\n", "sks dog, on the beach", ""),
        (b"", PROMPT, "empty"),
        (b" \n\t ", PROMPT, "empty"),
    ],
    ids=["none", "ascii", "UTF-8", "byte order mark", "blanks", "empty", "blank"],
)
def test_captions(tmp_path: Path, kind: str, text: bytes | None, caption: str, warned: str) -> None:
    files = {f"{name}.png": photo(number) for number, name in enumerate(("a", "b", "c"))}
    if text is not None:
        files["b.txt"] = text
    pictures, listener = load(folder_of(tmp_path, files, kind))
    assert [picture.caption for picture in pictures] == [PROMPT, caption, PROMPT]
    assert len(listener.warnings) == bool(warned)
    assert all(warned in text and "b.txt" in text for text in listener.warnings)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_order_is_by_name_and_other_files_are_left_alone(tmp_path: Path, kind: str) -> None:
    names = ["c.PNG", "a.png", "b.jpg", "d.webp"]
    files = {name: photo(number) for number, name in enumerate(names)}
    files |= {"notes.md": b"#", "Thumbs.db": b"x", "e": photo(9), "captions.csv": b"a,b"}
    pictures, listener = load(folder_of(tmp_path, files, kind))
    assert [picture.name for picture in pictures] == sorted(names)
    assert not listener.notes
    for picture in pictures:
        np.testing.assert_array_equal(np.array(picture.open()), noise(names.index(picture.name)))


def test_zip_with_folders(tmp_path: Path) -> None:
    files = {
        "dogs/2.png": photo(2),
        "dogs/1.png": photo(1),
        "dogs/1.txt": b"sks dog sleeping",
        "__MACOSX/dogs/._1.png": b"\0\5\x16\7 no picture",
        "__MACOSX/._dogs": b"\0\5\x16\7",
        "dogs/.DS_Store": b"x",
        "dogs/3.png": photo(3),
    }
    pictures, listener = load(folder_of(tmp_path, files, "zip"))
    assert [(picture.name, picture.caption) for picture in pictures] == [
        ("dogs/1.png", "sks dog sleeping"),
        ("dogs/2.png", PROMPT),
        ("dogs/3.png", PROMPT),
    ]
    assert not listener.notes


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_digest_is_of_the_content_alone(tmp_path: Path, kind: str) -> None:
    pictures, _ = load(folder_of(tmp_path, {"a.png": photo(0), "b.png": photo(1), "c.png": photo(2)}, kind))
    assert [picture.digest for picture in pictures] == [hashlib.sha256(photo(seed)).hexdigest() for seed in range(3)]


def test_digest_of_tensors() -> None:
    values = torch.rand(40, 48, 3, generator=torch.Generator().manual_seed(0))
    changed = values.clone()
    changed[7, 7, 1] = 1 - changed[7, 7, 1]
    turned = values.reshape(48, 40, 3)
    [one, same, other, shape] = load_pictures([values, values.clone(), changed, turned], PROMPT, Recorder())
    assert one.digest == same.digest
    assert len({one.digest, other.digest, shape.digest}) == 3


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_duplicates_are_pointed_out(tmp_path: Path, kind: str) -> None:
    files = {"a.png": photo(0), "b.png": photo(1), "c.png": photo(0), "d.png": photo(2)}
    pictures, listener = load(folder_of(tmp_path, files, kind))
    assert len(pictures) == 4
    [warning] = listener.warnings
    assert "a.png" in warning
    assert "c.png" in warning
