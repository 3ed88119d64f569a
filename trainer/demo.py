"""The demonstration: a small world, its base model, one subject, and a contact sheet that shows what was learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .applying import merge_into
from .commands import ready_model, run_train
from .config import GenerateSettings, TrainCommand
from .devices import pick_device
from .errors import StorageError
from .events import Listener, Phase
from .families.base import DiffusionModel
from .flags import read_toml
from .kohya import read_adapter
from .sample import generate
from .weights import open_base

_HOME = Path(__file__).resolve().parent.parent / "demo"
_PLACES = ("in the snow", "on the beach", "in the water", "on the grass")  # the subject was seen only in the last
_SEEDS = (7, 8)


@dataclass(frozen=True)
class Row:
    """One row of a contact sheet: a label and one picture for each column."""

    label: str
    pictures: tuple[Image.Image, ...]


def run_demo(output_dir: Path, listener: Listener) -> list[Path]:
    """Make class pictures, train the subject, draw before | after | prior; returns adapter and contact sheet.

    Raises:
        StorageError: The demo's data are not there.
    """
    if not (_HOME / "demo.toml").is_file():
        raise StorageError(
            f"{_HOME} holds no demo data.", "Clone the whole repository; the Manager's package leaves the demo out."
        )
    values = read_toml(_HOME / "demo.toml")
    settings = TrainCommand.checked(
        values | {"base": _HOME / "base", "images": _HOME / "subject", "output_dir": output_dir}
    )
    result = run_train(settings, listener)
    device = pick_device(settings.device)
    drawing = GenerateSettings(
        base=settings.base, prompt=settings.instance_prompt, size=str(settings.resolution), guidance=4.0
    )
    base = open_base(settings.base)
    before, after = ready_model(base, device, drawing), ready_model(base, device, drawing)
    merge_into(after, read_adapter(result.path), 1.0)
    columns = ((before, settings.instance_prompt), (after, settings.instance_prompt), (after, settings.class_prompt))
    rows = []
    for done, place in enumerate(_PLACES):
        listener.tell(Phase("contact sheet", done, len(_PLACES)))
        drawn = [_draw(model, f"{prompt} {place}", drawing) for model, prompt in columns]
        rows.append(Row(place, tuple(picture for same_seed in zip(*drawn, strict=True) for picture in same_seed)))
    listener.tell(Phase("contact sheet", len(_PLACES), len(_PLACES)))
    sheet = output_dir / "contact-sheet.png"
    titles = tuple(f"{when}, seed {seed}" for seed in _SEEDS for when in ("before", "after", "prior"))
    caption = f"before | after: {settings.instance_prompt} …     prior: {settings.class_prompt} …, after training"
    contact_sheet(caption, titles, rows).save(sheet)
    return [result.path, sheet]


def _draw(model: DiffusionModel, prompt: str, settings: GenerateSettings) -> list[Image.Image]:
    width, height = settings.width_height
    return generate(
        model,
        prompt,
        _SEEDS,
        width=width,
        height=height,
        scheduler=settings.scheduler,
        steps=settings.steps,
        guidance=settings.guidance,
    )


def contact_sheet(caption: str, titles: tuple[str, ...], rows: list[Row], cell: int = 128) -> Image.Image:
    """Pictures in a labelled grid, `cell` pixels a side, enlarged without smoothing.

    Args:
        caption: Line above the grid.
        titles: One for each column.
        rows: Each with a picture for every column.
        cell: Side of a picture in the grid.
    """
    margin, head, gap = 100, 48, 4
    sheet = Image.new("RGB", (margin + len(titles) * (cell + gap), head + len(rows) * (cell + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    pen.text((6, 6), caption, fill="black", font=font)
    for column, title in enumerate(titles):
        pen.text((margin + column * (cell + gap), 28), title, fill="black", font=font)
    for line, row in enumerate(rows):
        top = head + line * (cell + gap)
        pen.text((6, top + cell // 2 - 8), row.label, fill="black", font=font)
        for column, picture in enumerate(row.pictures):
            sheet.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (margin + column * (cell + gap), top))
    return sheet
