"""What the commands train, priors and generate do."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from ..adapters.apply import apply_to_base, merge_into
from ..adapters.embeddings import learn, read_embedding
from ..adapters.kohya import Adapter, read_adapter
from ..core.devices import explained_memory_errors, pick_device, pick_precision
from ..core.distributed import ProcessGroup
from ..core.errors import PicturesError, SettingsError, suggest
from ..core.events import Listener, Phase
from ..core.files import require_writable_file, write_file
from ..core.prompts import PromptWords
from ..data.class_images import by_prompt, class_images_folders, generate_class_images
from ..data.folder import AnnotationOptions
from ..data.image_check import check_pictures
from ..data.images import Picture, load_pictures, split_validation
from ..dreambooth import TrainResult, train
from ..models.families.base import BaseWeights
from ..models.nf4 import require_quantizable
from ..models.open import open_base
from ..models.sampling import GenerationConfig, build_on_device, generate
from ..settings.data import SubjectTable
from ..settings.model import BaseModelSettings
from ..settings.train import GenerateCommand, PriorsCommand, PriorSettings, TrainCommand
from ..training.adapter import StartingPoint
from ..training.preflight import report_settings_without_effect, require_trainable
from ..training.presets import apply_preset
from ..training.runs.folder import RunPaths


def run_train(settings: TrainCommand, listener: Listener) -> TrainResult:
    """Check everything, generate the class pictures, train."""
    device = pick_device(settings.device)
    require_quantizable(settings.base_quantization, device)
    pictures = _subject_pictures(settings, listener)
    class_pictures = _given_class_pictures(settings, listener)
    split_validation(pictures, settings.validation_pictures, settings.seed)  # fails before class pictures are generated
    start = read_adapter(settings.start_from) if settings.start_from else None
    stacked = read_adapters(settings.base_lora)
    base = apply_to_base(open_base_model(settings), stacked)
    settings = apply_preset(settings, base.family, listener).with_filled_previews()
    paths = RunPaths(output=settings.output_dir, runs=settings.output_dir / "runs")
    starting_point = StartingPoint(start, stacked)
    words = [PromptWords(subject.token, subject.class_noun) for subject in settings.subjects]
    captions = [caption for picture in pictures for caption in picture.captions]
    require_trainable(base, settings, paths, starting_point, words=words, captions=captions)
    check_pictures(pictures, settings, listener)
    report_settings_without_effect(
        settings,
        pictures,
        [subject.class_prompt for subject in settings.subjects],
        has_class_pictures=bool(class_pictures) or any(subject.prior_count for subject in settings.subjects),
        starts_from_adapter=start is not None,
        listener=listener,
    )
    with ProcessGroup.current(cpu=device.type == "cpu").main_process_first():
        for priors in by_prompt([_prior_settings(settings, subject) for subject in settings.subjects]):
            class_pictures += _generated_class_pictures(base, priors, settings, listener)
    return train(
        base,
        subject=pictures,
        priors=class_pictures,
        settings=settings,
        paths=paths,
        device=settings.device,
        listener=listener,
        starting_point=starting_point,
        words=words,
    )


def _subject_pictures(settings: TrainCommand, listener: Listener) -> list[Picture]:
    """The pictures of all subjects."""
    pictures = []
    for subject in settings.subjects:
        options = AnnotationOptions(
            captions=subject.captions,
            masks=subject.masks,
            repeats=subject.repeats,
            token=subject.token,
            class_noun=subject.class_noun,
            class_prompt=subject.class_prompt,
        )
        pictures += load_pictures(subject.images, subject.instance_prompt, listener, options)
    return pictures


def _given_class_pictures(settings: TrainCommand, listener: Listener) -> list[Picture]:
    """The user's own class pictures of all subjects.

    Raises:
        PicturesError: They can't be used, or have no caption.
    """
    pictures = []
    for subject in settings.subjects:
        if subject.class_images is None or not settings.trains_class_pictures:
            continue
        options = AnnotationOptions(token=subject.token, class_noun=subject.class_noun)
        of_subject = load_pictures(subject.class_images, subject.class_prompt, listener, options)
        if not all(picture.caption for picture in of_subject):
            raise PicturesError(
                f"The class pictures in {subject.class_images} have no captions.",
                f"Give {suggest('class_prompt', 'a photo of a dog')}, for example.",
            )
        pictures += of_subject
    return pictures


def _prior_settings(settings: TrainCommand, subject: SubjectTable) -> PriorSettings:
    """How the class pictures of one subject are generated; what was not given stays so."""
    values = settings.model_dump(include=set(PriorSettings.model_fields), exclude_unset=True)
    return PriorSettings(**values | {"class_prompt": subject.class_prompt, "prior_count": subject.prior_count})


def run_priors(settings: PriorsCommand, listener: Listener) -> list[Path]:
    """Generate class pictures; returns their folders, one for each prompt."""
    base = apply_to_base(open_base_model(settings), read_adapters(settings.base_lora))
    _generated_class_pictures(base, settings, settings, listener)
    root = _class_pictures_root(settings)
    precision = pick_precision(settings.precision, pick_device(settings.device))
    return class_images_folders(root, base, settings, settings.resolution, precision)


def _generated_class_pictures(
    base: BaseWeights, priors: PriorSettings, settings: TrainCommand | PriorsCommand, listener: Listener
) -> Sequence[Picture]:
    """The class pictures that the base model generates, or has generated before.

    Args:
        base: The base model.
        priors: Which class pictures.
        settings: Where and at which resolution and precision they are generated.
        listener: Gets the progress.
    """
    if not priors.prior_count:
        return []
    device = pick_device(settings.device)
    return generate_class_images(
        base,
        priors,
        resolution=settings.resolution,
        root=_class_pictures_root(settings),
        device=device,
        precision=pick_precision(settings.precision, device),
        listener=listener,
    )


def _class_pictures_root(settings: TrainCommand | PriorsCommand) -> Path:
    return settings.output_dir / "class-pictures"


def run_generate(settings: GenerateCommand, listener: Listener) -> list[Path]:
    """Generate pictures with a base model and adapters; returns the files."""
    adapters = read_adapters(settings.lora)
    _require_picture_path(settings.output)
    device = pick_device(settings.device)
    base = open_base_model(settings)
    embeddings = [read_embedding(Path(path), base.family) for path in settings.embedding]
    model = build_on_device(base, device, pick_precision(settings.precision, device))
    for adapter, strength in adapters:
        merge_into(model, adapter, strength)
    for word in embeddings:
        learn(model, word)
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
    wanted = [
        (prompt, settings.seed + number) for prompt in settings.prompts or [""] for number in range(settings.count)
    ]
    for index, (prompt, seed) in enumerate(wanted):
        listener.report(Phase("pictures", index, len(wanted)))
        with explained_memory_errors(suggest("size")):
            [image] = generate(model, prompt, [seed], config, listener)
        path = settings.output
        if len(wanted) > 1:
            path = path.with_name(f"{path.stem}-{index:03d}{path.suffix}")
        write_file(path, partial(image.save, format=Image.registered_extensions()[path.suffix.lower()]))
        paths.append(path)
    listener.report(Phase("pictures", len(wanted), len(wanted)))
    return paths


def _require_picture_path(path: Path) -> None:
    """Check, before anything is generated, that a picture can be written there.

    Raises:
        SettingsError: The extension is not of a picture format, or the path is a folder.
        StorageError: Its folder can't be written.
    """
    if os.path.isdir(path):
        raise SettingsError(
            f"{path} is a folder.",
            f"Give the name of a picture file in it, such as {suggest('output', path / 'picture.png')}.",
        )
    writable = {extension for extension, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix.lower() not in writable:
        raise SettingsError(f"{path} is not the name of a picture file.", "Give a name ending in .png or .jpg.")
    require_writable_file(path, 1_000_000)


def parse_strength(text: str) -> tuple[Path, float]:
    """Split FILE[:STRENGTH]; a Windows drive letter is no file with a strength.

    Raises:
        SettingsError: What follows the last colon is not a number, and there is no file of the whole name.
    """
    whole = Path(text).expanduser()
    head, colon, tail = text.rpartition(":")
    if os.path.exists(whole) or not colon or len(head) < 2:
        return whole, 1.0
    with contextlib.suppress(ValueError):
        strength = float(tail)
        if math.isfinite(strength):
            return Path(head).expanduser(), strength
    raise SettingsError(f"{text} is neither a file nor FILE:STRENGTH.", "Write FILE, or FILE:0.8 for another strength.")


def read_adapters(texts: Sequence[str]) -> list[tuple[Adapter, float]]:
    """Adapters with their strengths, from FILE[:STRENGTH]."""
    files = [parse_strength(text) for text in texts]  # a typing error is reported before any file is read
    return [(read_adapter(path), strength) for path, strength in files]


def open_base_model(settings: BaseModelSettings) -> BaseWeights:
    """Open the base model that the settings name."""
    return open_base(
        settings.base,
        settings.tokenizer,
        vae=settings.vae,
        text_encoder=settings.text_encoder,
        prediction_type=settings.prediction_type,
        clip_skip=settings.clip_skip,
    )
