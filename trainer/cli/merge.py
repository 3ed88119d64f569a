"""What the commands merge, learned-merge, resize, extract, convert and fuse do."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.diffusers_format import to_kohya_format, write_diffusers
from ..adapters.kohya import Adapter, read_adapter, write_adapter
from ..adapters.metadata import derived_metadata
from ..adapters.names import named_weights
from ..core.devices import DTYPES, pick_device
from ..core.errors import SettingsError
from ..core.events import Listener
from ..core.files import require_writable, require_writable_file, write_atomic
from ..merging.extract import extract_between
from ..merging.fuse import fuse
from ..merging.merge import MergeResult, WeightedAdapter, merge, resize
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
    parse_block_weights,
)
from ..settings.model import SavePrecision
from .train import open_base_model, parse_strength, read_adapters


def run_merge(settings: MergeCommand, listener: Listener) -> tuple[Path, str]:
    """Merge adapter files; returns the file written, and the report."""
    _require_writable_outputs(settings.output, settings.report)
    adapters = _weighted_adapters(settings.loras, settings.block_weights)
    weights = _base_weights(settings.base)
    result = merge(adapters, settings, weights, _svd_device(settings.device), listener)
    return _write(result, settings.output, settings.save_precision, settings.report)


def run_learned_merge(settings: LearnedMergeCommand, listener: Listener) -> tuple[Path, str]:
    """Merge two adapter files with learned coefficients; returns the file written, and the report."""
    _require_writable_outputs(settings.output, settings.report)
    subject, style = _weighted_adapters(settings.loras, ())
    result = learned_merge(
        open_base_model(settings),
        subject=subject,
        style=style,
        settings=settings,
        device=pick_device(settings.device),
        listener=listener,
    )
    return _write(result, settings.output, settings.save_precision, settings.report)


def run_resize(settings: ResizeCommand, listener: Listener) -> tuple[Path, str]:
    """Resize an adapter file; returns the file written, and the report."""
    _require_writable_outputs(settings.output, settings.report)
    [adapter] = _weighted_adapters([str(settings.lora)], ())
    weights = _base_weights(settings.base)
    result = resize(adapter, settings, weights, _svd_device(settings.device), listener)
    return _write(result, settings.output, settings.save_precision, settings.report)


def run_extract(settings: ExtractCommand, listener: Listener) -> tuple[Path, str]:
    """Extract a LoRA from two models; returns the file written, and the report."""
    _require_writable_outputs(settings.output, settings.report)
    base = open_weights(settings.base)
    tuned = open_weights(settings.tuned)
    if base.family.title != tuned.family.title:
        raise SettingsError(
            f"{settings.tuned.name} is a {tuned.family.title} model, {settings.base.name} a {base.family.title} one.",
            "Give a model and the base model that it was fine-tuned from.",
        )
    result = extract_between(
        named_weights(base.family.build(base), biases=settings.biases),
        named_weights(tuned.family.build(tuned), biases=settings.biases),
        settings,
        _svd_device(settings.device),
        listener,
    )
    of_base = {
        "ss_base_model_version": base.family.base_version(base.prediction),
        "ss_sd_model_name": base.title,
        "modelspec.architecture": f"{base.family.architecture(base.prediction)}/lora",
    }
    extracted = result.adapter
    metadata = derived_metadata([Adapter({}, of_base)], [tuned.title], extracted.layers)
    result = MergeResult(Adapter(extracted.layers, metadata, extracted.vectors), result.report)
    return _write(result, settings.output, settings.save_precision, settings.report)


def run_convert(settings: ConvertCommand, listener: Listener) -> tuple[Path, str]:
    """Save an adapter with other layer names or in another precision; returns the file written, and what it holds."""
    _require_writable_outputs(settings.output, None)
    adapter = to_kohya_format(read_adapter(settings.lora))
    write = write_diffusers if settings.format == "diffusers" else write_adapter
    path = write(settings.output, adapter, DTYPES[settings.save_precision], replace=False)
    return path, f"{len(adapter.layers)} modules, {adapter.kind}, in the {settings.format} naming"


def run_fuse(settings: FuseCommand, listener: Listener) -> tuple[Path, str]:
    """Save a model with adapters added to it; returns the file or folder written, and what was added."""
    is_folder = os.path.isdir(settings.base)
    if not is_folder and settings.output.suffix.lower() != ".safetensors":
        raise SettingsError(f"{settings.output} does not end in .safetensors.", "Give a name that does.")
    adapters = read_adapters(settings.lora)
    if is_folder:
        require_writable(settings.output.absolute().parent, _bytes_of(settings.base))
    else:
        require_writable_file(settings.output, _bytes_of(settings.base))
    path = fuse(settings.base, adapters, settings.output)
    return path, f"{len(adapters)} adapters added to {settings.base.name}"


def _bytes_of(path: Path) -> int:
    """Size of a file, or of all files in a folder; 0 if it does not exist."""
    files = path.rglob("*") if os.path.isdir(path) else [path]
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


def open_weights(path: Path) -> BaseWeights:
    """Open a model for its weights alone, which needs no tokenizer.

    Raises:
        WeightsError: It can't be read.
    """
    if os.path.isfile(path):
        return open_tensors(read_single_file(path), path)
    return open_base(path)


def _base_weights(path: Path | None) -> Mapping[str, Tensor] | None:
    """Weights of the base model by the names of adapter files; None if none is given."""
    if path is None:
        return None
    base = open_weights(path)
    return named_weights(base.family.build(base))


def _svd_device(name: str) -> torch.device:
    """The device to compute on; MPS has no singular value decomposition."""
    device = pick_device(name)
    return torch.device("cpu") if device.type == "mps" else device


def _weighted_adapters(texts: Sequence[str], block_weights: Sequence[str]) -> list[WeightedAdapter]:
    """Adapters from FILE[:UNET[:TEXT]], with unique titles.

    Args:
        texts: The adapters.
        block_weights: Of the first adapter, the second …; may be fewer.
    """
    files = [_parse_strengths(text) for text in texts]
    blocks = [parse_block_weights(text) for text in block_weights]
    stems = [path.stem for path, _, _ in files]
    adapters: list[WeightedAdapter] = []
    for index, (path, strength, text_strength) in enumerate(files):
        taken = {adapter.title for adapter in adapters} | set(stems) - {path.stem}
        adapters.append(
            WeightedAdapter(
                adapter=read_adapter(path),
                title=_unique_title(path.stem, taken),
                strength=strength,
                text_strength=text_strength,
                blocks=blocks[index] if index < len(blocks) else (),
            )
        )
    return adapters


def _unique_title(stem: str, taken: Set[str]) -> str:
    """The stem, or the first of `stem#2`, `stem#3` … that is not taken."""
    title = stem
    number = 2
    while title in taken:
        title = f"{stem}#{number}"
        number += 1
    return title


def _parse_strengths(text: str) -> tuple[Path, float, float]:
    """Split FILE[:UNET[:TEXT]] into the file and its strengths for the UNet and the text encoders."""
    head, _, last = text.rpartition(":")
    file, colon, middle = head.rpartition(":")
    is_file = any(os.path.exists(Path(name).expanduser()) for name in (text, head) if name)
    if colon and len(file) > 1 and _is_number(middle) and not is_file:
        path, strength = parse_strength(head)
        _, text_strength = parse_strength(f"{file}:{last}")
        return path, strength, text_strength
    path, strength = parse_strength(text)
    return path, strength, strength


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _require_writable_outputs(output: Path, report: Path | None) -> None:
    """Check, before any work, that the files can be written."""
    for path in (output, report):
        if path is not None:
            require_writable_file(path, 1_000_000)


def _write(result: MergeResult, output: Path, precision: SavePrecision, report: Path | None) -> tuple[Path, str]:
    """Write the adapter, and the report if a file is given; returns the adapter's file and the report as text."""
    path = write_adapter(output, result.adapter, DTYPES[precision], replace=False)
    if report is not None:
        if report.suffix.lower() == ".png":
            stream = io.BytesIO()
            result.report.heat_map().save(stream, "PNG")
            write_atomic(report, stream.getvalue())
        else:
            write_atomic(report, (json.dumps(result.report.as_json(), indent=1) + "\n").encode())
    return path, result.report.as_text()
