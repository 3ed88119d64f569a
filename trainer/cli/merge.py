"""What the commands that merge and change adapters do, over the engine."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.diffusers_format import with_own_names, write_diffusers
from ..adapters.kohya import Adapter, read_adapter, write_adapter
from ..adapters.metadata import derived_metadata
from ..adapters.names import named_weights
from ..core.devices import DTYPES, pick_device
from ..core.errors import SettingsError
from ..core.events import Listener
from ..core.files import free_path, require_writable, write_atomic
from ..merging.extract import extract_between
from ..merging.fuse import fuse
from ..merging.merge import Merged, WeightedAdapter, merge, resize
from ..merging.ziplora import learned_merge
from ..models.families.base import BaseWeights
from ..models.open import open_base, open_tensors
from ..models.state_dicts import read_single_file
from ..settings.merge import (
    ConvertCommand,
    ExtractCommand,
    FuseCommand,
    LearnedMergeCommand,
    MergeCommand,
    ResizeCommand,
    SavePrecision,
    read_block_weights,
)
from .train import open_settings, parse_strength, read_adapters


def run_merge(settings: MergeCommand, listener: Listener) -> tuple[Path, str]:
    """Merge adapter files; the file written, and the report."""
    _require_places(settings.output, settings.report)
    parts = _parts(settings.loras, settings.block_weights)
    merged = merge(parts, settings, _weights(settings.base), _device(settings.device), listener)
    return _write(merged, settings.output, settings.save_precision, settings.report)


def run_learned_merge(settings: LearnedMergeCommand, listener: Listener) -> tuple[Path, str]:
    """Merge two adapter files with learned coefficients; the file written, and the report."""
    _require_places(settings.output, settings.report)
    subject, style = _parts(settings.loras, ())
    merged = learned_merge(open_settings(settings), subject, style, settings, pick_device(settings.device), listener)
    return _write(merged, settings.output, settings.save_precision, settings.report)


def run_resize(settings: ResizeCommand, listener: Listener) -> tuple[Path, str]:
    """Bring an adapter file to another size; the file written, and the report."""
    _require_places(settings.output, settings.report)
    [part] = _parts([str(settings.lora)], ())
    merged = resize(part, settings, _weights(settings.base), _device(settings.device), listener)
    return _write(merged, settings.output, settings.save_precision, settings.report)


def run_extract(settings: ExtractCommand, listener: Listener) -> tuple[Path, str]:
    """Extract a LoRA from two models; the file written, and the report."""
    _require_places(settings.output, settings.report)
    base, tuned = open_weights(settings.base), open_weights(settings.tuned)
    if base.family.title != tuned.family.title:
        raise SettingsError(
            f"{settings.tuned.name} is a {tuned.family.title} model, {settings.base.name} a {base.family.title} one.",
            "Give a model and the base that it was tuned from.",
        )
    before, after = (named_weights(one.family.build(one), biases=settings.biases) for one in (base, tuned))
    found = extract_between(before, after, settings, _device(settings.device), listener)
    stated = {
        "ss_base_model_version": base.family.base_version(base.prediction),
        "ss_sd_model_name": base.title,
        "modelspec.architecture": f"{base.family.architecture(base.prediction)}/lora",
    }
    metadata = derived_metadata([Adapter({}, stated)], [tuned.title], found.adapter.layers)
    named = Merged(Adapter(found.adapter.layers, metadata, found.adapter.vectors), found.report)
    return _write(named, settings.output, settings.save_precision, settings.report)


def run_convert(settings: ConvertCommand, listener: Listener) -> tuple[Path, str]:
    """Write an adapter file under other names or in another precision; the file written, and what it holds."""
    _require_places(settings.output, None)
    adapter = with_own_names(read_adapter(settings.lora))
    path, dtype = free_path(settings.output), DTYPES[settings.save_precision]
    if settings.format == "diffusers":
        write_diffusers(path, adapter, dtype)
    else:
        write_adapter(path, adapter, dtype)
    return path, f"{len(adapter.layers)} modules, {adapter.kind}, named as by {settings.format}"


def run_fuse(settings: FuseCommand, listener: Listener) -> tuple[Path, str]:
    """Write a model with adapters added to it; the file or folder written, and what was added."""
    if not settings.base.is_dir() and settings.output.suffix.lower() != ".safetensors":
        raise SettingsError(f"{settings.output} does not end in .safetensors.", "Give a name that does.")
    adapters = read_adapters(settings.lora)
    require_writable(settings.output.absolute().parent, 1_000_000)
    path = free_path(settings.output)
    fuse(settings.base, adapters, path)
    return path, f"{len(adapters)} adapters added to {settings.base.name}"


def open_weights(path: Path) -> BaseWeights:
    """Open a model for its weights alone, which takes no tokenizer.

    Raises:
        WeightsError: It can't be read.
    """
    if path.is_file():
        return open_tensors(read_single_file(path), path)
    return open_base(path)


def _weights(base: Path | None) -> Mapping[str, Tensor] | None:
    if base is None:
        return None
    opened = open_weights(base)
    return named_weights(opened.family.build(opened))


def _device(name: str) -> torch.device:
    """The device to compute on; singular values are not to be had on MPS."""
    device = pick_device(name)
    return torch.device("cpu") if device.type == "mps" else device


def _parts(texts: Sequence[str], block_weights: Sequence[str]) -> list[WeightedAdapter]:
    """Adapters from FILE[:UNET[:TEXT]], with titles that differ."""
    places = [_strengths(text) for text in texts]
    blocks = [read_block_weights(text) for text in block_weights]
    parts: list[WeightedAdapter] = []
    for number, (path, unet, text) in enumerate(places):
        taken = {part.title for part in parts} | {one.stem for one, _, _ in places} - {path.stem}
        choices = [path.stem, *(f"{path.stem}#{copy}" for copy in range(2, 2 * len(places) + 2))]
        title = next(one for one in choices if one not in taken)
        parts.append(
            WeightedAdapter(read_adapter(path), title, unet, text, blocks[number] if number < len(blocks) else ())
        )
    return parts


def _strengths(text: str) -> tuple[Path, float, float]:
    """Split FILE[:UNET[:TEXT]]."""
    head, _, last = text.rpartition(":")
    file, colon, middle = head.rpartition(":")
    is_file = any(os.path.exists(Path(one).expanduser()) for one in (text, head) if one)
    if colon and len(file) > 1 and _is_number(middle) and not is_file:
        path, unet = parse_strength(head)
        return path, unet, parse_strength(f"{file}:{last}")[1]
    path, strength = parse_strength(text)
    return path, strength, strength


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _require_places(output: Path, report: Path | None) -> None:
    """Check, before any work, that the files can be written."""
    for path in (output, report):
        if path is not None:
            require_writable(path.absolute().parent, 1_000_000)


def _write(merged: Merged, output: Path, precision: SavePrecision, report: Path | None) -> tuple[Path, str]:
    path = free_path(output)
    write_adapter(path, merged.adapter, DTYPES[precision])
    if report is not None:
        content = (json.dumps(merged.report.as_json(), indent=1) + "\n").encode()
        if report.suffix.lower() == ".png":
            stream = io.BytesIO()
            merged.report.heat_map().save(stream, "PNG")
            content = stream.getvalue()
        write_atomic(report, content)
    return path, merged.report.as_text()
