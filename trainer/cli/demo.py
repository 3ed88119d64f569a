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
BASES = {"sd1": ("base", "demo.toml"), "flux2": ("flux2", "demo-flux2.toml")}
"""Family → folder of the small base model, and file of the settings."""
_SCENES = ("in the snow", "on the beach", "in the water", "on the grass")  # training pictures show only the last one
_SEEDS = (7, 8)


def run_demo(output_dir: Path, listener: Listener, family: str = "sd1") -> list[Path]:
    """Generate class pictures, train the subject, generate before | after | prior; returns adapter and contact sheet.

    Args:
        output_dir: Folder of all that is made.
        listener: Gets every event.
        family: Of the small base model: a key of `BASES`.

    Raises:
        StorageError: The demo's data are not there.
    """
    base_folder, settings_file = BASES[family]
    if not (_DEMO / settings_file).is_file() or not (_DEMO / base_folder).is_dir():
        raise StorageError(
            f"{_DEMO} contains no demo data.", "Clone the whole repository; the Manager's package leaves the demo out."
        )
    values = read_toml(_DEMO / settings_file)
    settings = TrainCommand.checked(
        values | {"base": _DEMO / base_folder, "images": _DEMO / "subject", "output_dir": output_dir}
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
