"""What the command demo does: train a small model on one subject, and show on a contact sheet what it learned."""

from __future__ import annotations

from pathlib import Path

from ..adapters.apply import merge_into
from ..adapters.kohya import read_adapter
from ..core.devices import pick_device, pick_precision
from ..core.errors import StorageError
from ..core.events import Listener, Phase
from ..core.figures import SheetRow, contact_sheet
from ..core.toml import read_toml
from ..models.open import open_base
from ..models.sampling import GenerationConfig, build_on_device, generate
from ..settings.train import TrainCommand
from .train import run_train

_DEMO = Path(__file__).resolve().parents[2] / "demo"
_SCENES = ("in the snow", "on the beach", "in the water", "on the grass")  # training pictures show only the last one
_SEEDS = (7, 8)


def run_demo(output_dir: Path, listener: Listener) -> list[Path]:
    """Generate class pictures, train the subject, generate before | after | prior; returns adapter and contact sheet.

    Raises:
        StorageError: The demo's data are not there.
    """
    if not (_DEMO / "demo.toml").is_file():
        raise StorageError(
            f"{_DEMO} holds no demo data.", "Clone the whole repository; the Manager's package leaves the demo out."
        )
    values = read_toml(_DEMO / "demo.toml")
    settings = TrainCommand.checked(
        values | {"base": _DEMO / "base", "images": _DEMO / "subject", "output_dir": output_dir}
    )
    result = run_train(settings, listener)
    device = pick_device(settings.device)
    precision = pick_precision("auto", device)
    base = open_base(settings.base)
    before = build_on_device(base, device, precision)
    after = build_on_device(base, device, precision)
    merge_into(after, read_adapter(result.path), 1.0)
    columns = ((before, settings.instance_prompt), (after, settings.instance_prompt), (after, settings.class_prompt))
    config = GenerationConfig(  # as the class pictures are
        width=settings.resolution,
        height=settings.resolution,
        scheduler=settings.prior_scheduler,
        steps=settings.prior_steps,
        guidance=settings.prior_guidance,
        guidance_start=settings.prior_guidance_start,
        guidance_end=settings.prior_guidance_end,
    )
    rows = []
    for index, scene in enumerate(_SCENES):
        listener.report(Phase("contact sheet", index, len(_SCENES)))
        by_column = [generate(model, f"{prompt} {scene}", _SEEDS, config) for model, prompt in columns]
        by_seed = zip(*by_column, strict=True)
        rows.append(SheetRow(scene, tuple(picture for pictures in by_seed for picture in pictures)))
    listener.report(Phase("contact sheet", len(_SCENES), len(_SCENES)))
    titles = tuple(f"{column}, seed {seed}" for seed in _SEEDS for column in ("before", "after", "prior"))
    caption = f"before | after: {settings.instance_prompt} …     prior: {settings.class_prompt} …, after training"
    sheet = output_dir / "contact-sheet.png"
    contact_sheet(caption, titles, rows).save(sheet)
    return [result.path, sheet]
