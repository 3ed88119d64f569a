"""The two ends of a run: what it builds upon beside the base model, and what it gives."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..adapters.kohya import Adapter, read_adapter, read_header, write_adapter
from ..adapters.layers import Layer, LoraLayer
from ..adapters.metadata import FINGERPRINT_KEY, FORM_KEY
from ..adapters.names import own_names
from ..adapters.targets import choose_targets
from ..core.devices import DTYPES
from ..core.errors import SettingsError
from ..core.files import free_path
from ..merging.deltas import to_delta, to_layer, total
from ..merging.extract import extract_lora
from ..models.families.base import BaseWeights
from ..models.single_file import original_state_dict, write_checkpoint
from ..settings.train import TrainSettings
from .runs.checkpoint import Saved

_SAME = (FINGERPRINT_KEY, FORM_KEY, "ss_steps")


@dataclass(frozen=True)
class Exported:
    """The files of a finished run.

    Attributes:
        adapter: The adapter as it stands in its file.
        path: The adapter file.
        checkpoint: The checkpoint file of full fine-tuning; None otherwise.
    """

    adapter: Adapter
    path: Path
    checkpoint: Path | None


def export(
    base: BaseWeights,
    saved: Saved,
    stacked: Sequence[tuple[Adapter, float]],
    settings: TrainSettings,
    metadata: Mapping[str, str],
    output_dir: Path,
    checkpoints_dir: Path,
) -> Exported:
    """Write what was trained; nothing is ever written over, and files of this very run are used again.

    Args:
        base: The base model that was trained upon.
        saved: What was trained.
        stacked: The adapters that were applied to the base, for `combine`.
        settings: Name, precision, rank.
        metadata: Of the files.
        output_dir: Folder of the adapter file.
        checkpoints_dir: Folder of a checkpoint file.

    Raises:
        StorageError: A file can't be written.
    """
    dtype = DTYPES[settings.save_precision]
    checkpoint = None
    if saved.weights is not None:
        form = {FORM_KEY: f"{settings.save_precision}, checkpoint"}  # the adapter may lie beside it
        architecture = {"modelspec.architecture": base.family.architecture(base.prediction)}
        tensors = original_state_dict(base, saved.weights)
        path = checkpoints_dir / f"{settings.name}.safetensors"
        whole = {**metadata, **architecture, **form}
        checkpoint = _written(path, whole, lambda to: write_checkpoint(to, tensors, whole, dtype))
        targets = choose_targets(base.family.build(base), settings)
        adapter = extract_lora(base, saved.weights, targets, metadata)
    else:
        assert saved.adapter is not None
        adapter = saved.adapter
    if settings.combine:
        own = own_names(base.family.build(base))
        adapter = combined([(_with_names(one, own), strength) for one, strength in [*stacked, (adapter, 1.0)]])
        rank = max(layer.rank for layer in adapter.layers.values())
        metadata = {**metadata, "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    adapter = replace(adapter, metadata=metadata)
    beside = checkpoint is not None and output_dir == checkpoints_dir
    wanted = output_dir / f"{settings.name}{'-lora' if beside else ''}.safetensors"
    path = _written(wanted, metadata, lambda to: write_adapter(to, adapter, dtype))
    return Exported(read_adapter(path), path, checkpoint)


def require_combinable(adapter: Adapter) -> None:
    """Check that an adapter can be added up with others.

    Raises:
        SettingsError: It is no plain LoRA.
    """
    for name, layer in adapter.layers.items():
        if not isinstance(layer, LoraLayer) or layer.mid is not None or layer.dora_scale is not None:
            raise SettingsError(
                f"combine adds adapters up, which is exact for LoRA only; {name} is of the kind {layer.kind}.",
                "Turn combine off and use both files, or apply a LoRA.",
            )


def _with_names(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """The adapter under other names of its modules; those that have none keep theirs."""
    return replace(adapter, layers={names.get(name, name): layer for name, layer in adapter.layers.items()})


def combined(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The sum of LoRAs, each times its strength, as one LoRA: exact, since ranks add up.

    Raises:
        SettingsError: One is no plain LoRA.
    """
    parts: dict[str, list[tuple[LoraLayer, float]]] = {}
    for adapter, strength in adapters:
        require_combinable(adapter)
        for name, layer in adapter.layers.items():
            assert isinstance(layer, LoraLayer)
            parts.setdefault(name, []).append((layer, strength))
    return Adapter({name: _sum(layers) for name, layers in parts.items()})


def _sum(layers: Sequence[tuple[LoraLayer, float]]) -> Layer:
    shape = max((layer.shape for layer, _ in layers), key=len)  # a 1×1 kernel may be left out in a file
    return to_layer(total([to_delta(layer, shape).times(strength) for layer, strength in layers]))


def _written(wanted: Path, metadata: Mapping[str, str], write: Callable[[Path], None]) -> Path:
    """The file of this run, length and precision if it exists, else the first free name, written."""
    for path in [wanted, *sorted(wanted.parent.glob(f"{glob.escape(wanted.stem)}-*{wanted.suffix}"))]:
        if path.is_file() and _is_same(path, metadata):
            return path
    path = free_path(wanted)
    write(path)
    return path


def _is_same(path: Path, metadata: Mapping[str, str]) -> bool:
    try:
        _, found = read_header(path)
    except (OSError, ValueError):
        return False
    return all(found.get(key) == metadata.get(key) for key in _SAME)
