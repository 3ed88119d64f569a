"""Class priors: pictures of the class made by the base model itself (Ruiz et al. 2023, section 3.3).

They lie as PNGs in a folder whose name is a digest of everything that made them; picture i depends on
`prior_seed + i` alone, so a folder with too few is topped up and a folder that matches is used again.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..core.devices import explained_memory_errors, release
from ..core.events import Listener, Note, Phase, stop_if_asked
from ..models.families.base import BaseWeights
from ..models.sampling import GenerationConfig, generate, ready_model
from ..settings.train import PriorSettings
from .image_cache import ImageCache
from .images import Picture


def class_images_folder(root: Path, base: BaseWeights, settings: PriorSettings, resolution: int, precision: str) -> Path:
    """The folder that belongs to these settings, below `root`."""
    return _gallery(root, base, settings, resolution, precision).folder


def _gallery(root: Path, base: BaseWeights, settings: PriorSettings, resolution: int, precision: str) -> ImageCache:
    what = {
        "base": base.fingerprint,
        "base_title": base.title,
        "prompt": settings.class_prompt,
        "scheduler": settings.prior_scheduler,
        "steps": settings.prior_steps,
        "guidance": settings.prior_guidance,
        "seed": settings.prior_seed,
        "resolution": resolution,
        "precision": precision,
    }
    return ImageCache(root, what)


def generate_class_images(
    base: BaseWeights,
    settings: PriorSettings,
    resolution: int,
    root: Path,
    device: torch.device,
    precision: str,
    listener: Listener,
) -> list[Picture]:
    """Make the class pictures that are missing; all are kept on disk.

    Args:
        base: The base model, without the subject.
        settings: How many, of what, made how.
        resolution: Side in pixels.
        root: Folder for all class pictures.
        device: Where to run.
        precision: "fp32", "bf16" or "fp16".
        listener: Told of the progress; may stop the work, the finished pictures remain.

    Returns:
        `prior_count` pictures whose caption is the class prompt.

    Raises:
        StorageError: The folder can't be written.
        CancelledError: The listener asked to stop.
        OutOfMemoryError: The batch does not fit.
    """
    gallery = _gallery(root, base, settings, resolution, precision)
    names = [f"{number:05d}.png" for number in range(settings.prior_count)]
    missing = [number for number, name in enumerate(names) if not gallery.has(name)]
    if missing:
        gallery.begin(len(missing), resolution * resolution)
        with explained_memory_errors("prior_batch_size or resolution"):
            _make(base, settings, resolution, gallery, names, missing, device, precision, listener)
        release(device)
    else:
        listener.report(Note(f"{len(names)} class pictures are there already: {gallery.folder}"))
    return [gallery.picture(name, settings.class_prompt) for name in names]


def _make(
    base: BaseWeights,
    settings: PriorSettings,
    resolution: int,
    gallery: ImageCache,
    names: list[str],
    missing: list[int],
    device: torch.device,
    precision: str,
    listener: Listener,
) -> None:
    model = ready_model(base, device, precision)
    config = GenerationConfig(
        width=resolution,
        height=resolution,
        scheduler=settings.prior_scheduler,
        steps=settings.prior_steps,
        guidance=settings.prior_guidance,
    )
    total, done = len(names), len(names) - len(missing)
    for start in range(0, len(missing), settings.prior_batch_size):
        listener.report(Phase("class pictures", done, total))
        stop_if_asked(listener)
        numbers = missing[start : start + settings.prior_batch_size]
        images = generate(
            model,
            settings.class_prompt,
            [settings.prior_seed + number for number in numbers],
            config,
            listener,
        )
        for number, image in zip(numbers, images, strict=True):
            gallery.put(names[number], image)
        done += len(numbers)
    listener.report(Phase("class pictures", done, total))
