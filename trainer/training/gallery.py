"""Files next to an adapter for programs that show models: a preview, and cards with trigger words and strength.

    rex.preview.png      a generated picture, shown by ComfyUI, Automatic1111, Forge and ComfyUI-Lora-Manager
    rex.json             the card of Automatic1111 and Forge (their `user_metadata`)
    rex.metadata.json    the card of ComfyUI-Lora-Manager (its `LoraMetadata`)

Each contains a digest of its content. A file whose digest is missing or doesn't match was written or edited by someone
else, and is left alone. Hosts write these in their own process, whatever they have installed, so this module needs only
Python, Pillow and safetensors.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from safetensors import SafetensorError, safe_open

from ..core.errors import StorageError
from ..core.files import explained_os_errors, write_atomic
from .runs.layout import RunLayout, preview_name, step_of

PREVIEW, CARD, MANAGER_CARD = ".preview.png", ".json", ".metadata.json"
"""Extensions, after the name of the adapter file."""
OWN_KEY = "dreambooth.digest"
STRENGTHS_FILE = "strengths.json"
AS_TRAINED = 1.0
CONFIG_KEY = "dreambooth.config"  # of settings.sharing, which needs pydantic
THUMBNAIL_KEY, HINT_KEY = "modelspec.thumbnail", "modelspec.usage_hint"
_PHRASE_KEY = "modelspec.trigger_phrase"
_THUMBNAIL_SIDE = 256  # pixels; what the ModelSpec standard recommends
_THUMBNAIL_BYTES = 10_000
_THUMBNAIL_QUALITIES = (85, 70, 50, 30)
_LONGEST_PHRASE = 100  # characters
_A1111_VERSIONS = {"stable-diffusion-v1": "SD1", "stable-diffusion-v2": "SD2", "stable-diffusion-xl": "SDXL"}
_MANAGER_VERSIONS = {
    "stable-diffusion-v1": "SD 1.5",
    "stable-diffusion-v2": "SD 2.1",
    "stable-diffusion-xl": "SDXL 1.0",
    "Flux.2-klein": "Flux.2 Klein",
    "Z-Image": "ZImageBase",
    "Krea-2": "Krea 2",
    "anima": "Anima",
}
"""Beginning of a file's architecture → what a program calls it."""


def write_gallery(path: Path, run: RunLayout | None = None, words: str = "") -> None:
    """Write preview and cards next to an adapter file; files of other programs are left alone.

    Args:
        path: The adapter file; its metadata contains step and family.
        run: The run that it comes from, with previews and measured strengths; None: no picture is written.
        words: The trigger words; "": those in the settings of the run, or else in the metadata.

    Raises:
        StorageError: They can't be written, or the file is damaged.
    """
    metadata = file_metadata(path)
    step = _step(metadata)
    words = words or words_for(metadata, run)
    strength = preferred_strength(run, step)
    architecture = metadata.get("modelspec.architecture", "")
    notes = _notes(metadata, measured=strength is not None)
    _write_sample(path.with_suffix(PREVIEW), run, step)
    card = {
        "description": metadata.get("modelspec.title", ""),
        "sd version": _called(architecture, _A1111_VERSIONS),
        "activation text": words,
        "preferred weight": strength or AS_TRAINED,
        "negative text": "",
        "notes": notes,
    }
    _write_card(path.with_suffix(CARD), card)
    has_sample = path.with_suffix(PREVIEW).is_file()
    with explained_os_errors(path):
        status = path.stat()
    manager_card = {
        "file_name": path.stem,
        "model_name": metadata.get("modelspec.title") or path.stem,
        "file_path": path.name,  # without its folder, which is private; the manager completes it
        "size": status.st_size,
        "modified": status.st_mtime,
        "sha256": _sha256(path),
        "base_model": _called(architecture, _MANAGER_VERSIONS),
        "preview_url": path.with_suffix(PREVIEW).name if has_sample else "",
        "notes": notes,
        "from_civitai": False,
        "civitai": {"trainedWords": [word.strip() for word in words.split(",") if word.strip()]},
        "usage_tips": json.dumps({"strength": strength or AS_TRAINED}),
    }
    _write_card(path.with_suffix(MANAGER_CARD), manager_card)


def is_wanted(run: RunLayout) -> bool:
    """Whether the settings of a run, which may be an older version's, want such files."""
    settings = run.record.get("settings", {})
    return settings.get("gallery_files", True) is not False


def shown_metadata(
    run: RunLayout, step: int, metadata: Mapping[str, str], *, hint: bool, thumbnail: bool
) -> dict[str, str]:
    """An adapter file's metadata with what galleries read there, after the ModelSpec standard.

    Args:
        run: The run, with previews and measured strengths.
        step: Step of the weights in the file.
        metadata: The file's, with its trigger words.
        hint: Whether to add `modelspec.usage_hint`.
        thumbnail: Whether to add `modelspec.thumbnail`, a preview of at most 256 pixels a side, if there is one.
    """
    shown = dict(metadata)
    words = words_for(metadata, run)
    if hint:
        prompt = f"Put '{words}' into the prompt. " if words else ""
        shown[HINT_KEY] = f"{prompt}Recommended strength: {preferred_strength(run, step) or AS_TRAINED:g}."
    picture = _sample_of(run, step) if thumbnail else None
    encoded = _as_data_url(picture) if picture else ""
    if encoded:
        shown[THUMBNAIL_KEY] = encoded
    return shown


def file_metadata(path: Path) -> dict[str, str]:
    """An adapter file's metadata.

    Raises:
        StorageError: It can't be read, or is damaged.
    """
    try:
        with explained_os_errors(path), safe_open(str(path), "np") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise StorageError(
            f"{path} is not a complete LoRA file: {error}.", "Delete it, and use another checkpoint of its run."
        ) from error


def words_for(metadata: Mapping[str, str], run: RunLayout | None = None) -> str:
    """The trigger words of a file, such as "sks dog"; "" if they are unknown.

    Those of the run's settings, or else of the file's; or its trigger phrase, unless that is a whole caption.

    Args:
        metadata: Of the file.
        run: The run that it comes from, if it is known.
    """
    try:
        settings = json.loads(metadata.get(CONFIG_KEY, ""))
    except (ValueError, RecursionError):
        settings = None
    phrase = metadata.get(_PHRASE_KEY, "").strip()
    in_run = _words_in(run.record.get("settings")) if run else ""
    return in_run or _words_in(settings) or (phrase if len(phrase) <= _LONGEST_PHRASE else "")


def preferred_strength(run: RunLayout | None, step: int) -> float | None:
    """The strength that was measured to be best for the adapter of a run's step; None if none was."""
    entry = measured_strengths(run).get(str(step)) if run else None
    strength = entry.get("strength") if isinstance(entry, dict) else None
    return float(strength) if isinstance(strength, int | float) and not isinstance(strength, bool) else None


def recommended_strength(path: Path, run: RunLayout | None) -> float:
    """The strength that was measured to be best for an adapter file of a run, or else 1.

    Raises:
        StorageError: The file can't be read, or is damaged.
    """
    return preferred_strength(run, _step(file_metadata(path))) or AS_TRAINED


def measured_strengths(run: RunLayout) -> dict[str, Any]:
    """What was measured of a run's adapters: step → "strength", and "scores" by strength; nothing if it is damaged."""
    content = _json_of(run.path / STRENGTHS_FILE)
    return content if isinstance(content, dict) else {}


def _words_in(settings: Any) -> str:
    """The trigger words of a run; "" if its prompt does not hold the words of its settings.

    Of several subjects, the words of each.
    """
    if not isinstance(settings, dict):
        return ""
    tables = settings.get("subject")
    if isinstance(tables, list) and tables:
        return ", ".join(dict.fromkeys(filter(None, map(_words_in, tables))))
    prompt, noun = (str(settings.get(name, "")) for name in ("instance_prompt", "class_noun"))
    words = f"{settings.get('token', '')} {noun}".strip()
    return words if "{token}" in prompt or (noun and words in prompt) else ""


def _step(metadata: Mapping[str, str]) -> int:
    """The step whose weights a file holds; 0 if that is unknown."""
    text = metadata.get("ss_steps", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0


def _called(architecture: str, names: Mapping[str, str]) -> str:
    return next((name for start, name in names.items() if architecture.startswith(start)), "Unknown")


def _notes(metadata: Mapping[str, str], *, measured: bool) -> str:
    """A line or two on where an adapter comes from."""
    steps, base = _step(metadata), metadata.get("ss_sd_model_name", "")
    notes = []
    if steps:
        notes.append(f"Trained for {steps} steps{f' on {base}' if base else ''}.")
    if measured:
        notes.append("The strength was chosen by measured fidelity and drift.")
    return " ".join(notes)


def _sample_of(run: RunLayout, step: int) -> Path | None:
    """The picture that an adapter of a step generated, or else the newest before it; None if there is none.

    Never one of the base model, which is that of step 0.

    Args:
        run: Has the pictures.
        step: Of the adapter; 0: unknown.
    """
    steps = {found: path for path in run.previews_path.glob("*") if (found := step_of(path))}
    for found in sorted(steps, reverse=True):
        picture = steps[found] / preview_name("subject", 0, 0)
        if (not step or found <= step) and picture.is_file():
            return picture
    return None


def _write_sample(path: Path, run: RunLayout | None, step: int) -> None:
    """Write a sample beside an adapter, unless there is none, or another program's picture lies there."""
    picture = _sample_of(run, step) if run else None
    if picture is None or (path.exists() and not _is_own_picture(path)):
        return
    image = _opened(picture)
    if image is None:  # a preview that a full disk cut short
        return
    text = PngImagePlugin.PngInfo()
    text.add_text(OWN_KEY, _digest_of(image))
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=text)
    _write(path, stream.getvalue())


def _is_own_picture(path: Path) -> bool:
    """Whether a picture was written here, and not edited since."""
    image = _opened(path)
    return image is not None and image.info.get(OWN_KEY) == _digest_of(image)


def _opened(path: Path) -> Image.Image | None:
    """A picture, decoded; None if it can't be read."""
    try:
        with Image.open(path) as image:
            image.load()
            opened: Image.Image = image
            return opened
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _digest_of(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def _as_data_url(path: Path) -> str:
    """A picture as the data URL of a small JPEG; "" if it can't be read."""
    image = _opened(path)
    if image is None:
        return ""
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    for quality in _THUMBNAIL_QUALITIES:
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=quality)
        if stream.tell() <= _THUMBNAIL_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Write a card with its digest, unless another program's lies there, or one that was edited."""
    if path.exists() and not _is_own_card(_json_of(path)):
        return
    _write(path, json.dumps({**card, OWN_KEY: _digest(card)}, indent=4, ensure_ascii=False).encode())


def _is_own_card(card: Any) -> bool:
    """Whether a card was written here and not edited since; programs that edit it may keep unknown keys."""
    if not isinstance(card, dict):
        return False
    return card.get(OWN_KEY) == _digest({key: value for key, value in card.items() if key != OWN_KEY})


def _digest(card: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()


def _json_of(path: Path) -> Any:
    """What a JSON file holds; None if there is none, or it can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _write(path: Path, content: bytes) -> None:
    """Write a file, unless it holds just that."""
    with explained_os_errors(path):
        if path.is_file() and path.read_bytes() == content:
            return
    write_atomic(path, content)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with explained_os_errors(path), open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
