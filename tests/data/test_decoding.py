"""Pixels as viewers show them: colour profiles, numbers of 12 to 32 bits; and metadata that costs no picture."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pack.trainer.data import colour
from pack.trainer.data.decoding import decode, decode_alpha, decode_mask
from picture_trees import THREE, load, photo, put
from PIL import Image, ImageCms, PngImagePlugin

SIZE = (64, 48)
SRGB = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]  # xy of the primaries
ADOBE = [(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)]
DISPLAY_P3 = [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)]
D50 = np.array([0.9642, 1.0, 0.8249])


def picture(seed: int = 0) -> Image.Image:
    """Soft colours, so that no conversion leaves what sRGB can show."""
    pixels = np.random.default_rng(seed).integers(60, 190, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC)


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def rgb_profile(primaries: Sequence[tuple[float, float]], gamma: float) -> bytes:
    """An ICC matrix profile (ICC.1:2010) with these primaries, D65 and this gamma."""

    def xyz(x: float, y: float) -> NDArray[np.float64]:
        return np.array([x / y, 1, (1 - x - y) / y])

    primary = np.stack([xyz(*one) for one in primaries], axis=1)
    white = xyz(0.3127, 0.3290)
    matrix = primary * np.linalg.solve(primary, white)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapted = np.linalg.inv(bradford) @ np.diag((bradford @ D50) / (bradford @ white)) @ bradford @ matrix
    tags = [(name, xyz_tag(adapted[:, index])) for index, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))]
    return profile(b"RGB ", [*tags, *((name, curve_tag(gamma)) for name in (b"rTRC", b"gTRC", b"bTRC"))])


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", [(b"kTRC", curve_tag(gamma))])


def xyz_tag(values: NDArray[np.float64]) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def curve_tag(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def profile(space: bytes, tags: Sequence[tuple[bytes, bytes]]) -> bytes:
    words = b"mluc" + bytes(4) + struct.pack(">II", 1, 12) + b"enUS" + struct.pack(">II", 2, 28) + b"\0x"
    tags = [(b"desc", words), (b"cprt", words), (b"wtpt", xyz_tag(D50)), *tags]
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags:
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I", start + len(body)) + bytes(4) + struct.pack(">I", 0x04300000) + b"mntr" + space
    head += b"XYZ " + bytes(12) + b"acsp" + bytes(28) + b"".join(struct.pack(">i", round(v * 65536)) for v in D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def converted(image: Image.Image, target: bytes, mode: str) -> Image.Image:
    """An sRGB picture in the colours of a profile, as a camera or program would have stored it."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(target))
    result = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), opened, outputMode=mode)
    assert result is not None
    return result


def assert_alike(image: Image.Image, expected: Image.Image, tolerance: float = 1.5) -> None:
    difference = np.abs(np.asarray(image, float) - np.asarray(expected, float))
    assert difference.mean() < tolerance
    assert difference.max() < 8 * tolerance


# ---- colours
WIDE = {
    "Adobe RGB": rgb_profile(ADOBE, 2.2),
    "Display P3": rgb_profile(DISPLAY_P3, 2.2),
    "linear": rgb_profile(SRGB, 1.0),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_a_picture_in_a_wide_space_is_shown_as_it_was(format: str, name: str) -> None:
    stored = converted(picture(), WIDE[name], "RGB")
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    notes: list[str] = []
    shown = decode(saved(stored, format, icc_profile=WIDE[name], **options), notes)
    assert shown.mode == "RGB"
    assert_alike(shown, picture(), 3 if name == "linear" else 1.5)
    assert np.abs(np.asarray(stored, float) - np.asarray(picture(), float)).mean() > 3, "the profile changes nothing"
    assert notes == []


def test_a_primary_of_a_wide_space_is_the_nearest_that_srgb_has() -> None:
    """The numbers of the standards: half red in Adobe RGB is redder than in sRGB."""
    stored = Image.new("RGB", SIZE, (128, 64, 64))
    shown = decode(saved(stored, icc_profile=rgb_profile(ADOBE, 2.19921875)))
    red, green, blue = shown.getpixel((0, 0))  # type: ignore[misc]
    assert red == pytest.approx(146, abs=3)
    assert green == pytest.approx(63, abs=3)
    assert blue == pytest.approx(63, abs=3)


@pytest.mark.parametrize("gamma", [1.0, 1.8])
def test_grey_pictures_have_profiles_too(gamma: float) -> None:
    icc = grey_profile(gamma)
    grey = picture().convert("L")
    stored = np.asarray(grey) / 255
    linear = np.where(stored <= 0.04045, stored / 12.92, ((stored + 0.055) / 1.055) ** 2.4)
    stored_grey = Image.fromarray((linear ** (1 / gamma) * 255).round().astype(np.uint8))
    assert_alike(decode(saved(stored_grey, icc_profile=icc)), grey.convert("RGB"), 2)


def test_a_grey_picture_with_a_profile_for_colours_is_converted_as_grey_colours() -> None:
    icc = rgb_profile(SRGB, 1.0)
    shown = decode(saved(Image.new("L", SIZE, 55), icc_profile=icc))
    assert shown.getpixel((0, 0)) == pytest.approx((128, 128, 128), abs=2)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P"])
def test_a_picture_in_srgb_stays_to_the_bit(mode: str) -> None:
    """What cameras embed changes no latents that a run has cached."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = picture().convert(mode)
    notes: list[str] = []
    assert decode(saved(image, icc_profile=icc), notes).tobytes() == decode(saved(image)).tobytes()
    assert notes == []


def test_transparency_is_kept_beside_a_profile() -> None:
    icc = WIDE["Adobe RGB"]
    stored = converted(picture(), icc, "RGB")
    stored.putalpha(Image.new("L", SIZE, 255))
    assert_alike(decode(saved(stored, icc_profile=icc)), picture())
    stored.putalpha(0)
    assert decode(saved(stored, icc_profile=icc)).getextrema() == ((255, 255),) * 3
    assert decode_alpha(saved(stored, icc_profile=icc)).getextrema() == (0, 0)


def test_a_profile_counts_for_turned_pictures() -> None:
    icc = WIDE["Display P3"]
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = converted(picture(), icc, "RGB").transpose(Image.Transpose.ROTATE_90)
    assert_alike(decode(saved(stored, icc_profile=icc, exif=exif)), picture())


def test_lab_pictures_are_shown() -> None:
    lab = converted(picture(), ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), "LAB")
    assert_alike(decode(saved(lab, "TIFF")), picture(), 2)


def test_a_mask_has_no_colours() -> None:
    grey = Image.new("L", SIZE, 100)
    assert decode_mask(saved(grey, icc_profile=grey_profile(1.0))).getextrema() == (100, 100)


@pytest.mark.parametrize(
    ("icc", "words"),
    [
        (b"no profile", "is damaged and was ignored"),
        (rgb_profile(ADOBE, 2.2)[:200], "is damaged and was ignored"),
        (profile(b"RGB ", []), "is damaged and was ignored"),
        (profile(b"CMYK", []), "is for CMYK pictures and was ignored"),
    ],
    ids=["no profile", "cut", "empty", "of another space"],
)
def test_a_profile_that_cannot_be_used_is_told(icc: bytes, words: str, tmp_path: Path) -> None:
    folder = put(tmp_path / "tree", THREE | {"d.png": saved(picture(), icc_profile=icc)})
    pictures, recorder = load(folder)
    assert pictures[3].open().tobytes() == picture().tobytes()
    assert recorder.warnings == [f"d.png: its colour profile {words}."]
    (folder / "e.png").write_bytes(saved(picture(1), icc_profile=icc))
    assert load(folder)[1].warnings == [f"d.png and e.png: its colour profile {words}."]


def test_without_littlecms_profiles_are_ignored_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise ImportError("no _imagingcms")

    monkeypatch.setattr(colour.ImageCms, "ImageCmsProfile", missing)
    notes: list[str] = []
    stored = picture(3)
    assert decode(saved(stored, icc_profile=WIDE["Adobe RGB"]), notes).tobytes() == stored.tobytes()
    assert notes == ["its colour profile was ignored: this Pillow was built without littleCMS"]
    with pytest.raises(ValueError, match="it is in the Lab colour space"):
        decode(saved(Image.new("LAB", SIZE), "TIFF"))


# ---- numbers
def tiff(values: NDArray[np.generic], bits: int, sample_format: int = 1, photometric: int = 1) -> bytes:
    """A TIFF file (6.0) by hand, of one strip of grey numbers."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    entries = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 3, height), (279, 4, len(data)), (339, 3, sample_format)]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(4)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory


def flat(value: float, dtype: type[np.generic]) -> NDArray[np.generic]:
    values = np.zeros((SIZE[1], SIZE[0]), dtype)
    values[:, 32:] = value
    return values


WHITE_NUMBERS = {
    "16 bits": tiff(flat(65535, np.uint16), 16),
    "32 bits": tiff(flat(2**32 - 1, np.uint32), 32),
    "signed 32 bits": tiff(flat(2**31 - 1, np.int32), 32, 2),
    "signed 16 bits": tiff(flat(2**15 - 1, np.int16), 16, 2),
    "real, white is 1": tiff(flat(1.0, np.float32), 32, 3),
    "real, white is 255": tiff(flat(255.0, np.float32), 32, 3),
    "real, white is 65535": tiff(flat(65535.0, np.float32), 32, 3),
}


@pytest.mark.parametrize("name", WHITE_NUMBERS)
def test_white_stays_white_and_black_black(name: str) -> None:
    shown = np.asarray(decode(WHITE_NUMBERS[name]))
    assert (shown[:, :32] == 0).all()
    assert (shown[:, 32:] >= 254).all()


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint16, 16), (np.uint32, 32)])
def test_integers_are_scaled_not_clipped(dtype: type[np.generic], bits: int) -> None:
    ramp = np.broadcast_to(np.linspace(0, 2**bits - 1, 64).round().astype(dtype), (48, 64))
    row = np.asarray(decode(tiff(np.ascontiguousarray(ramp), bits)))[0, :, 0].astype(int)
    np.testing.assert_allclose(row, np.linspace(0, 255, 64), atol=1)


@pytest.mark.parametrize(("bits", "value", "dtype"), [(16, 65535, np.uint16), (32, 1.0, np.float32)])
def test_where_white_is_zero_it_stays_so(bits: int, value: float, dtype: type[np.generic]) -> None:
    shown = np.asarray(decode(tiff(flat(value, dtype), bits, 3 if dtype is np.float32 else 1, photometric=0)))
    assert (shown[:, :32] == 255).all()
    assert (shown[:, 32:] <= 1).all()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tiff(flat(60_000, np.uint32), 32), "its brightest pixel is 60000 of 4294967295, so it is black"),
        (tiff(flat(-5, np.int32), 32, 2), "negative values"),
        (tiff(flat(-5, np.int16), 16, 2), "negative values"),
        (tiff(flat(3.2, np.float32), 32, 3), "range from 0 to 3.2, so its white level is unknown"),
        (tiff(flat(1e6, np.float32), 32, 3), "white level is unknown"),
        (tiff(flat(float("nan"), np.float32), 32, 3), "NaN or infinite"),
        (
            tiff(flat(-0.5, np.float32), 32, 3),
            "white level is unknown",
        ),
    ],
    ids=["dark 32 bits", "negative 32", "negative 16", "between", "beyond", "nan", "negative reals"],
)
def test_numbers_whose_white_is_not_known_are_left_out_with_a_remedy(
    content: bytes, words: str, tmp_path: Path
) -> None:
    pictures, recorder = load(put(tmp_path / "tree", THREE | {"d.tif": content}))
    assert [one.name for one in pictures] == sorted(THREE)
    [warning] = recorder.warnings
    assert words in warning
    assert "save it with 8 or 16 bits per channel" in warning


def test_black_is_no_error() -> None:
    for content in (tiff(flat(0, np.uint32), 32), tiff(flat(0, np.float32), 32, 3)):
        assert decode(content).getextrema() == ((0, 0),) * 3


# ---- metadata
def chunk(name: bytes, data: bytes, *, is_whole: bool = True) -> bytes:
    checksum = zlib.crc32(name + data) ^ (0 if is_whole else 1)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def png_with(*chunks: bytes, last: bool = False) -> bytes:
    """A PNG file with further chunks behind its header, or before its end."""
    content = saved(picture())
    place = len(content) - 12 if last else 33
    return content[:place] + b"".join(chunks) + content[place:]


HUGE_XMP = zlib.compress(b"edit history " * 200_000)
METADATA = {
    "huge XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + HUGE_XMP),
    "huge zTXt": chunk(b"zTXt", b"parameters\0\0" + HUGE_XMP),
    "damaged zTXt": chunk(b"zTXt", b"parameters\0\0" + b"no zlib"),
    "zTXt of another kind": chunk(b"zTXt", b"parameters\0\7x"),
    "wrong checksum of a text": chunk(b"tEXt", b"a\0b", is_whole=False),
    "wrong checksum of a profile": chunk(b"iCCP", b"x\0\0" + zlib.compress(b"x"), is_whole=False),
    "empty profile": chunk(b"iCCP", b""),
    "damaged profile": chunk(b"iCCP", b"x\0\0no zlib"),
    "short physical size": chunk(b"pHYs", b"\0"),
    "short gamma": chunk(b"gAMA", b""),
    "damaged EXIF": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "short EXIF": chunk(b"eXIf", b"M"),
}


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", METADATA)
def test_metadata_of_a_png_costs_no_picture(name: str, last: bool) -> None:
    assert decode(png_with(METADATA[name], last=last)).tobytes() == picture().tobytes()


def test_metadata_that_was_ignored_is_told(tmp_path: Path) -> None:
    pictures, recorder = load(put(tmp_path / "tree", THREE | {"d.png": png_with(METADATA["huge XMP"])}))
    assert len(pictures) == 4
    assert recorder.warnings == ["d.png: its metadata is damaged or too large and was ignored."]


@pytest.mark.parametrize("is_compressed", [False, True])
def test_the_orientation_in_huge_xmp_counts(is_compressed: bool) -> None:
    xmp = b'<x tiff:Orientation="6"/>' + b"edit history " * 200_000
    head = b"XML:com.adobe.xmp\0" + (b"\1\0\0\0" if is_compressed else b"\0\0\0\0")
    content = png_with(chunk(b"iTXt", head + (zlib.compress(xmp) if is_compressed else xmp)), METADATA["huge zTXt"])
    assert decode(content).tobytes() == picture().transpose(Image.Transpose.ROTATE_270).tobytes()


def test_a_colour_profile_beside_huge_metadata_counts() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "edit history " * 200_000, zip=True)
    icc = WIDE["Adobe RGB"]
    content = saved(converted(picture(), icc, "RGB"), pnginfo=info, icc_profile=icc)
    assert_alike(decode(content), picture())


@pytest.mark.parametrize("damage", ["cut", "pixels", "header"])
def test_damaged_pixels_are_an_error_whatever_the_metadata(damage: str) -> None:
    content = bytearray(png_with(METADATA["huge XMP"]))
    if damage == "cut":
        del content[len(content) - 200 :]
    elif damage == "pixels":
        content[content.index(b"IDAT") + 4] ^= 0xFF  # the head of the compressed stream
    else:
        content[20] ^= 0xFF
    with pytest.raises(ValueError, match=r"decoded|supported format|too large"):
        decode(bytes(content))


SEGMENTS = {
    "damaged EXIF": b"\xff\xe1\0\x10Exif\0\0MM\0*\xff\xff\xff\xff",
    "short EXIF": b"\xff\xe1\0\x08Exif\0\0",
    "several pictures": b"\xff\xe2\0\x0eMPF\0II*\0\x08\0\0\0",
    "damaged Photoshop block": b"\xff\xed\0\x1aPhotoshop 3.0\0" + b"8BIM\xff\xff\xff\xff\xff\xff",
    "short Adobe block": b"\xff\xee\0\x07Adobe",
    "short JFIF block": b"\xff\xe0\0\x07JFIF\0",
    "part of a profile": b"\xff\xe2\0\x12ICC_PROFILE\0\x02\x05ab",
    "comment": b"\xff\xfe\0\x04\xff\xff",
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_metadata_of_a_jpeg_costs_no_picture(name: str) -> None:
    content = saved(picture(), "JPEG", quality=95)
    broken = content[:20] + SEGMENTS[name] + content[20:]
    assert decode(broken).tobytes() == decode(content).tobytes()


def test_other_pictures_are_as_they_were() -> None:
    """Fingerprints and cached latents of plain pictures don't change: pixels are Pillow's own."""
    assert decode(photo()).tobytes() == Image.open(io.BytesIO(photo())).tobytes()
    jpeg = saved(picture(), "JPEG")
    assert decode(jpeg).tobytes() == Image.open(io.BytesIO(jpeg)).tobytes()
