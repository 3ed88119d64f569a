"""Class priors: pictures of the class made by the base model itself (Ruiz et al. 2023, section 3.3).

They lie as PNGs in a folder whose name is a digest of everything that made them; picture i depends on
`prior_seed + i` alone, so a folder with too few is topped up and a folder that matches is used again.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import torch

from .config import PriorSettings
from .devices import DTYPES, explained_memory_errors, place, release
from .events import Listener, Note, Phase, stop_if_asked
from .families.base import BaseWeights
from .files import explained_os_errors, remove_leftovers, require_writable, write_atomic
from .pictures import Picture, decode
from .sample import generate


def priors_folder(root: Path, base: BaseWeights, settings: PriorSettings, resolution: int, precision: str) -> Path:
    """The folder that belongs to these settings, below `root`."""
    return root / hashlib.sha256(_key(base, settings, resolution, precision).encode()).hexdigest()[:16]


def _key(base: BaseWeights, settings: PriorSettings, resolution: int, precision: str) -> str:
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
    return json.dumps(what, indent=1, sort_keys=True)


def make_class_pictures(
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
    folder = priors_folder(root, base, settings, resolution, precision)
    paths = [folder / f"{number:05d}.png" for number in range(settings.prior_count)]
    missing = [number for number, path in enumerate(paths) if not _is_whole(path)]
    if missing:
        require_writable(folder, len(missing) * resolution * resolution * 2)
        remove_leftovers(folder)
        write_atomic(folder / "settings.json", _key(base, settings, resolution, precision).encode())
        with explained_memory_errors("prior_batch_size or resolution"):
            _make(base, settings, resolution, paths, missing, device, precision, listener)
        release(device)
    else:
        listener.tell(Note(f"{len(paths)} class pictures are there already: {folder}"))
    return [_class_picture(path, settings.class_prompt) for path in paths]


def _make(
    base: BaseWeights,
    settings: PriorSettings,
    resolution: int,
    paths: list[Path],
    missing: list[int],
    device: torch.device,
    precision: str,
    listener: Listener,
) -> None:
    model = base.family.build(base)
    place(model.unet, device, DTYPES[precision])
    for network in (model.vae, *model.text_encoders.values()):
        place(network, device, torch.float32)
    total, done = len(paths), len(paths) - len(missing)
    for start in range(0, len(missing), settings.prior_batch_size):
        listener.tell(Phase("class pictures", done, total))
        stop_if_asked(listener)
        numbers = missing[start : start + settings.prior_batch_size]
        images = generate(
            model,
            settings.class_prompt,
            [settings.prior_seed + number for number in numbers],
            width=resolution,
            height=resolution,
            scheduler=settings.prior_scheduler,
            steps=settings.prior_steps,
            guidance=settings.prior_guidance,
            listener=listener,
        )
        for number, image in zip(numbers, images, strict=True):
            stream = io.BytesIO()
            image.save(stream, "PNG")
            write_atomic(paths[number], stream.getvalue())
        done += len(numbers)
    listener.tell(Phase("class pictures", done, total))


def _is_whole(path: Path) -> bool:
    try:
        decode(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _class_picture(path: Path, caption: str) -> Picture:
    with explained_os_errors(path):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Picture(path.name, caption, digest, lambda: decode(path.read_bytes()))
