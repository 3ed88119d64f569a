"""The demonstration: a small world, its base model, one subject, and a contact sheet that shows what was learned."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..adapters.apply import merge_into
from ..adapters.kohya import read_adapter
from ..core.devices import pick_device, pick_precision
from ..core.errors import StorageError
from ..core.events import Listener, Phase
from ..core.figures import SheetRow, contact_sheet
from ..core.files import read_toml
from ..models.families.base import DiffusionModel
from ..models.open import open_base
from ..models.sampling import GenerationConfig, generate, ready_model
from ..settings.train import GenerateSettings, TrainCommand
from .train import run_train

_HOME = Path(__file__).resolve().parents[2] / "demo"
_PLACES = ("in the snow", "on the beach", "in the water", "on the grass")  # the subject was seen only in the last
_SEEDS = (7, 8)


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
    base, precision = open_base(settings.base), pick_precision(drawing.precision, device)
    before, after = ready_model(base, device, precision), ready_model(base, device, precision)
    merge_into(after, read_adapter(result.path), 1.0)
    columns = ((before, settings.instance_prompt), (after, settings.instance_prompt), (after, settings.class_prompt))
    rows = []
    for done, place in enumerate(_PLACES):
        listener.report(Phase("contact sheet", done, len(_PLACES)))
        drawn = [_draw(model, f"{prompt} {place}", drawing) for model, prompt in columns]
        rows.append(SheetRow(place, tuple(picture for same_seed in zip(*drawn, strict=True) for picture in same_seed)))
    listener.report(Phase("contact sheet", len(_PLACES), len(_PLACES)))
    sheet = output_dir / "contact-sheet.png"
    titles = tuple(f"{when}, seed {seed}" for seed in _SEEDS for when in ("before", "after", "prior"))
    caption = f"before | after: {settings.instance_prompt} …     prior: {settings.class_prompt} …, after training"
    contact_sheet(caption, titles, rows).save(sheet)
    return [result.path, sheet]


def _draw(model: DiffusionModel, prompt: str, settings: GenerateSettings) -> list[Image.Image]:
    width, height = settings.width_height
    config = GenerationConfig(
        width=width,
        height=height,
        scheduler=settings.scheduler,
        steps=settings.steps,
        guidance=settings.guidance,
    )
    return generate(model, prompt, _SEEDS, config)
