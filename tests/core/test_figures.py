"""A contact sheet shows every picture whole in its own cell, whatever is written around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from pack.trainer.core.figures import SheetRow, contact_sheet, figure_as_picture
from PIL import Image

LONG = "a photo of a dog on top of a purple rug in a forest with sunflowers around it"
COLOURS = [(200 - 40 * row, 30, 60 * column) for row in range(2) for column in range(3)]


def sheet(
    cell: int = 96, size: tuple[int, int] = (32, 32), label: str = "base", title: str = "a dog", note: str = ""
) -> Image.Image:
    """Two rows of three plain pictures; the second row's label, title and note are given."""
    pictures = [Image.new("RGB", size, colour) for colour in COLOURS]
    rows = [
        SheetRow("base", tuple(pictures[:3]), ("",) * 3 if note else ()),
        SheetRow(label, tuple(pictures[3:]), ("", note, "") if note else ()),
    ]
    return contact_sheet("what is shown", ["a dog", title, "a cat"], rows, cell)


def boxes(image: Image.Image, colours: Sequence[tuple[int, int, int]] = COLOURS) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of everything of each colour, which is all of that colour."""
    found = []
    for colour in colours:
        rows, columns = np.nonzero((np.asarray(image) == colour).all(-1))
        left, top = int(columns.min()), int(rows.min())
        width, height = int(columns.max()) + 1 - left, int(rows.max()) + 1 - top
        assert len(rows) == width * height
        found.append((left, top, width, height))
    return found


@pytest.mark.parametrize("cell", [32, 96, 150])
@pytest.mark.parametrize(
    "words",
    [{}, {"title": LONG}, {"label": LONG}, {"note": "CLIP-T 0.3\nDINO 0.6"}, {"title": LONG, "label": LONG}],
    ids=str,
)
def test_pictures_stand_in_a_grid(cell: int, words: dict[str, str]) -> None:
    image = sheet(cell, **words)
    found = boxes(image)
    assert {box[2:] for box in found} == {(cell, cell)}
    lefts, tops = [box[0] for box in found], [box[1] for box in found]
    assert lefts[:3] == lefts[3:] == sorted(set(lefts))
    assert tops == [tops[0]] * 3 + [tops[3]] * 3
    assert lefts[1] - lefts[0] >= cell
    assert tops[3] - tops[0] >= cell
    assert image.width >= lefts[2] + cell
    assert image.height >= tops[3] + cell


def test_long_titles_labels_and_notes_get_room() -> None:
    plain = boxes(sheet())
    below_title, beside_label, between = boxes(sheet(title=LONG)), boxes(sheet(label=LONG)), boxes(sheet(note="a\nb"))
    assert below_title[0][1] > plain[0][1]
    assert below_title[0][0] == plain[0][0]
    assert beside_label[0][0] > plain[0][0]
    assert beside_label[0][1] == plain[0][1]
    assert between[3][1] - between[0][1] - (plain[3][1] - plain[0][1]) == 2 * 17
    assert sheet(note="a\nb").height == sheet().height + 2 * 2 * 17


def test_a_note_is_written_under_its_picture() -> None:
    """And nowhere else: without it the sheet is the same but for the place under that picture."""
    written, blank = (np.asarray(sheet(note=note)) for note in ("CLIP-T 0.305", " "))
    rows, columns = np.nonzero((written != blank).any(-1))
    left, top, width, height = boxes(sheet(note=" "))[4]
    assert left <= columns.min() < columns.max() < left + width
    assert top + height <= rows.min() < rows.max() < top + height + 17


def test_small_pictures_are_enlarged_without_smoothing_and_large_ones_shrunk() -> None:
    """The colours of a chequered one stay its own; of fine lines only their mean is left."""
    checks = np.indices((4, 4)).sum(0) % 2 * 255
    small = Image.fromarray(np.stack([checks] * 3, -1).astype(np.uint8))
    shown = contact_sheet("", ["a"], [SheetRow("b", (small,))], 64).crop((100, 48, 164, 112))
    np.testing.assert_array_equal(np.asarray(shown)[..., 0], np.kron(checks, np.ones((16, 16))))
    fine = Image.fromarray(np.stack([np.indices((256, 256)).sum(0) % 2 * 255] * 3, -1).astype(np.uint8))
    shown = contact_sheet("", ["a"], [SheetRow("b", (fine,))], 64).crop((104, 52, 160, 108))
    np.testing.assert_allclose(np.asarray(shown), 127.5, atol=8)


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (400, 200), (96, 95)])
def test_proportions_are_kept_in_the_middle_of_a_white_square(size: tuple[int, int]) -> None:
    square = boxes(sheet())
    for whole, (left, top, width, height) in zip(square, boxes(sheet(size=size)), strict=True):
        assert max(width, height) == 96
        assert width / height == pytest.approx(size[0] / size[1], rel=0.02)
        assert abs(2 * (left - whole[0]) + width - 96) <= 1
        assert abs(2 * (top - whole[1]) + height - 96) <= 1


def test_a_long_caption_widens_the_sheet() -> None:
    """Nothing of it is cut off: white is left at its end."""
    rows = [SheetRow("a", (Image.new("RGB", (32, 32)),))]
    image = contact_sheet(LONG * 2, ["a"], rows, 32)
    line = np.asarray(image.convert("L"))[:25]
    assert (line[:, -6:] == 255).all()
    assert (line[:, 32 + 150 :] < 128).any()


def test_a_figure_has_its_size_in_pixels() -> None:
    from matplotlib.figure import Figure

    assert figure_as_picture(Figure(figsize=(3, 2), dpi=50)).size == (150, 100)
