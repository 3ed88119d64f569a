"""What each command of the command line does, over the engine."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..adapters.apply import apply_to_base, merge_into
from ..adapters.kohya import Adapter, read_adapter
from ..core.devices import explained_memory_errors, pick_device, pick_precision
from ..core.distributed import ProcessGroup
from ..core.errors import PicturesError, SettingsError
from ..core.events import Listener, Phase
from ..core.files import explained_os_errors, require_writable
from ..data.class_images import class_images_folder, generate_class_images
from ..data.folder import AnnotationOptions
from ..data.image_check import check_pictures
from ..data.images import Picture, load_pictures, split_validation
from ..dreambooth import TrainResult, train
from ..models.families.base import BaseWeights
from ..models.nf4 import require_quantizable
from ..models.open import open_base
from ..models.sampling import GenerationConfig, generate, ready_model
from ..settings.data import SubjectTable
from ..settings.model import BaseSettings
from ..settings.train import GenerateSettings, PriorsCommand, PriorSettings, TrainCommand
from ..training.adapter import StartingPoint
from ..training.preflight import require_trainable
from ..training.presets import apply_preset


def run_train(settings: TrainCommand, listener: Listener) -> TrainResult:
    """Check everything, make the class pictures, train."""
    require_quantizable(settings.base_quantization, pick_device(settings.device))
    pictures = [
        picture
        for one in settings.subjects
        for picture in load_pictures(one.images, one.instance_prompt, listener, _reading(one))
    ]
    own = [
        picture
        for one in settings.subjects
        if one.class_images
        for picture in _class_images(one.class_images, one, listener)
    ]
    split_validation(pictures, settings.validation_pictures, settings.seed)  # its error comes before the class pictures
    start = read_adapter(settings.start_from) if settings.start_from else None
    stacked = read_adapters(settings.base_lora)
    base = apply_to_base(open_settings(settings), stacked)
    settings = apply_preset(settings, base.family, listener)
    runs = settings.output_dir / "runs"
    require_trainable(base, settings, start, settings.output_dir, runs, stacked)
    check_pictures(pictures, settings.resolution, listener)
    team = ProcessGroup.here(cpu=pick_device(settings.device).type == "cpu")
    with team.main_process_first():
        made = [
            picture
            for one in settings.subjects
            for picture in _class_pictures(base, _priors_of(settings, one), settings.resolution, settings, listener)
        ]
    stage, priors = StartingPoint(start, stacked), [*own, *made]
    return train(base, pictures, priors, settings, settings.output_dir, runs, settings.device, listener, stage=stage)


def _reading(subject: SubjectTable) -> AnnotationOptions:
    return AnnotationOptions(subject.captions, subject.masks, subject.repeats, subject.token, subject.class_noun)


def _class_images(path: Path, subject: SubjectTable, listener: Listener) -> list[Picture]:
    """Class pictures of the user's own.

    Raises:
        PicturesError: They can't be used, or have no caption.
    """
    reading = AnnotationOptions(token=subject.token, noun=subject.class_noun)
    pictures = load_pictures(path, subject.class_prompt, listener, reading)
    if not all(picture.caption for picture in pictures):
        raise PicturesError(f"The class pictures in {path} have no captions.", "Give class_prompt: 'a photo of a dog'.")
    return pictures


def _priors_of(settings: TrainCommand, subject: SubjectTable) -> PriorSettings:
    """How the class pictures of one subject are made."""
    how = settings.model_dump(include=set(PriorSettings.model_fields))
    return PriorSettings(**how | {"class_prompt": subject.class_prompt, "prior_count": subject.prior_count})


def run_priors(settings: PriorsCommand, listener: Listener) -> Path:
    """Make class pictures; returns their folder."""
    base = apply_to_base(open_settings(settings), read_adapters(settings.base_lora))
    _class_pictures(base, settings, settings.resolution, settings, listener)
    precision = pick_precision(settings.precision, pick_device(settings.device))
    return class_images_folder(_priors_root(settings.output_dir), base, settings, settings.resolution, precision)


def run_generate(settings: GenerateSettings, listener: Listener) -> list[Path]:
    """Draw pictures with a base model and adapters; returns the files."""
    loaded = read_adapters(settings.lora)
    _require_picture_path(settings.output)
    device = pick_device(settings.device)
    model = ready_model(open_settings(settings), device, pick_precision(settings.precision, device))
    for adapter, strength in loaded:
        merge_into(model, adapter, strength)
    width, height = settings.width_height
    config = GenerationConfig(
        width=width,
        height=height,
        negative_prompt=settings.negative_prompt,
        scheduler=settings.scheduler,
        steps=settings.steps,
        guidance=settings.guidance,
    )
    paths = []
    for number in range(settings.count):
        listener.report(Phase("pictures", number, settings.count))
        with explained_memory_errors("--size"):
            [image] = generate(
                model,
                settings.prompt,
                [settings.seed + number],
                config,
                listener,
            )
        path = settings.output
        if settings.count > 1:
            path = path.with_name(f"{path.stem}-{number:03d}{path.suffix}")
        with explained_os_errors(path):
            image.save(path)
        paths.append(path)
    listener.report(Phase("pictures", settings.count, settings.count))
    return paths


def _require_picture_path(path: Path) -> None:
    """Check, before anything is drawn, that a picture can be written there.

    Raises:
        SettingsError: The ending is none of a picture format, or the path is a folder.
        StorageError: Its folder can't be written.
    """
    if path.is_dir():
        raise SettingsError(f"{path} is a folder.", "Give the name of a picture file in it: --output picture.png.")
    writable = {ending for ending, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix.lower() not in writable:
        raise SettingsError(f"{path} does not end like a picture file.", "Give a name ending in .png or .jpg.")
    require_writable(path.absolute().parent, 1_000_000)


def parse_strength(text: str) -> tuple[Path, float]:
    """Split FILE[:STRENGTH]; a Windows drive letter is no strength.

    Raises:
        SettingsError: What follows the last colon is no number although the whole is no file.
    """
    whole = Path(text).expanduser()
    head, colon, tail = text.rpartition(":")
    if os.path.exists(whole) or not colon or len(head) < 2:
        return whole, 1.0
    with contextlib.suppress(ValueError):
        if math.isfinite(strength := float(tail)):
            return Path(head).expanduser(), strength
    raise SettingsError(f"{text} is neither a file nor FILE:STRENGTH.", "Write --lora FILE or --lora FILE:0.8.")


def read_adapters(texts: Sequence[str]) -> list[tuple[Adapter, float]]:
    """Adapters with their strengths, from FILE[:STRENGTH]."""
    places = [parse_strength(text) for text in texts]
    return [(read_adapter(path), strength) for path, strength in places]


def open_settings(settings: BaseSettings) -> BaseWeights:
    """Open the base model that the settings name."""
    return open_base(
        settings.base,
        settings.tokenizer,
        vae=settings.vae,
        prediction_type=settings.prediction_type,
        clip_skip=settings.clip_skip,
    )


def _priors_root(output_dir: Path) -> Path:
    return output_dir / "class-pictures"


def _class_pictures(
    base: BaseWeights,
    priors: PriorSettings,
    resolution: int,
    where: TrainCommand | PriorsCommand,
    listener: Listener,
) -> Sequence[Picture]:
    if not priors.prior_count:
        return []
    device = pick_device(where.device)
    precision = pick_precision(where.precision, device)
    root = _priors_root(where.output_dir)
    return generate_class_images(base, priors, resolution, root, device, precision, listener)
