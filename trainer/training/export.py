"""The files that a run produces: an adapter and, in full fine-tuning, a checkpoint."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.embeddings import file_stem, words_of, write_embedding
from ..adapters.kohya import Adapter, read_adapter, read_header, write_adapter
from ..adapters.layers import Layer, LoraLayer
from ..adapters.metadata import FINGERPRINT_KEY, FORM_KEY, WORD_KEY
from ..adapters.names import canonical_names
from ..adapters.targets import choose_targets
from ..core.devices import DTYPES
from ..core.errors import SettingsError, suggest
from ..merging.deltas import sum_deltas, to_delta, to_layer
from ..merging.extract import extract_lora
from ..merging.merge import merged_embeddings
from ..models.families.base import BaseWeights
from ..models.single_file import original_state_dict, write_single_file
from ..settings.train import TrainSettings
from .runs.checkpoint import Saved
from .runs.folder import RunPaths

_IDENTIFYING = (FINGERPRINT_KEY, FORM_KEY, "ss_steps")


@dataclass(frozen=True)
class Exported:
    """The files of a finished run.

    Attributes:
        adapter: The adapter as saved in its file.
        path: The adapter file.
        checkpoint: The checkpoint file of full fine-tuning; None otherwise.
        embeddings: Word whose vectors were learned → its embedding file.
    """

    adapter: Adapter
    path: Path
    checkpoint: Path | None
    embeddings: Mapping[str, Path]


def export(
    base: BaseWeights,
    saved: Saved,
    stacked: Sequence[tuple[Adapter, float]],
    settings: TrainSettings,
    metadata: Mapping[str, str],
    paths: RunPaths,
) -> Exported:
    """Write what was trained; nothing is ever overwritten, and files of the same run are reused.

    Args:
        base: The base model of the run.
        saved: What was trained.
        stacked: The adapters that were applied to the base, for `combine`.
        settings: Name, precision, rank.
        metadata: Of the files.
        paths: Where they go.

    Raises:
        StorageError: A file can't be written.
    """
    dtype = DTYPES[settings.save_precision]
    checkpoint = None
    if saved.weights is not None:
        checkpoint = _export_checkpoint(base, saved.weights, settings, metadata, paths, dtype)
        targets = choose_targets(base.family.build(base), settings)
        adapter = extract_lora(base, saved.weights, targets, metadata)
    else:
        assert saved.adapter is not None
        adapter = saved.adapter
    if settings.combine:
        names = canonical_names(base.family.build(base))
        adapters = [*stacked, (adapter, 1.0)]
        adapter = combined([(_with_names(adapter, names), strength) for adapter, strength in adapters])
        rank = max(layer.rank for layer in adapter.layers.values())
        metadata = {**metadata, "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    adapter = replace(adapter, metadata=metadata)
    is_beside_checkpoint = checkpoint is not None and paths.output == paths.checkpoint_output
    suffix = "-lora" if is_beside_checkpoint else ""
    wanted = paths.output / f"{settings.name}{suffix}.safetensors"
    path = _written(wanted, metadata, lambda: write_adapter(wanted, adapter, dtype, replace=False))
    embeddings = _export_embeddings(base, adapter, path.stem, paths) if settings.token_vectors else {}
    return Exported(read_adapter(path), path, checkpoint, embeddings)


def _export_embeddings(base: BaseWeights, adapter: Adapter, stem: str, paths: RunPaths) -> dict[str, Path]:
    """Write each word that an adapter bundles as a file of its own, for programs that don't look into adapters."""
    files = {}
    for word in words_of(adapter.embeddings, base.family):
        facts = {key: adapter.metadata[key] for key in _IDENTIFYING if key in adapter.metadata}
        metadata = {**facts, WORD_KEY: word.word}
        wanted = paths.embedding_output / f"{file_stem(stem, word.word)}.safetensors"
        files[word.word] = _written(
            wanted, metadata, partial(write_embedding, wanted, word, base.family, metadata), (*_IDENTIFYING, WORD_KEY)
        )
    return files


def _export_checkpoint(
    base: BaseWeights,
    weights: Mapping[str, Tensor],
    settings: TrainSettings,
    metadata: Mapping[str, str],
    paths: RunPaths,
    dtype: torch.dtype,
) -> Path:
    """Write all weights as a single checkpoint file in the original layout."""
    form = {FORM_KEY: f"{settings.save_precision}, checkpoint"}  # the adapter may lie beside it
    architecture = {"modelspec.architecture": base.family.architecture(base.prediction)}
    all_metadata = {**metadata, **architecture, **form}
    tensors = original_state_dict(base, weights)
    wanted = paths.checkpoint_output / f"{settings.name}.safetensors"
    return _written(
        wanted, all_metadata, lambda: write_single_file(wanted, tensors, all_metadata, dtype, replace=False)
    )


def require_combinable(adapter: Adapter) -> None:
    """Check that an adapter can be added up with others.

    Raises:
        SettingsError: It is not a plain LoRA.
    """
    if adapter.vectors:
        raise SettingsError(
            f"combine can only add up LoRAs, but an adapter also changes biases or norms ({min(adapter.vectors)}).",
            f"Set {suggest('combine', False)} and use both files, or apply a LoRA.",
        )
    for name, layer in adapter.layers.items():
        if not isinstance(layer, LoraLayer) or layer.mid is not None or layer.dora_scale is not None:
            raise SettingsError(
                f"combine adds up adapters, which is only exact for LoRA, but {name} is of type {layer.kind}.",
                f"Set {suggest('combine', False)} and use both files, or apply a LoRA.",
            )


def _with_names(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """The adapter under other names of its modules; those that have none keep theirs."""
    return replace(adapter, layers={names.get(name, name): layer for name, layer in adapter.layers.items()})


def combined(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The sum of LoRAs, each times its strength, as one LoRA: exact, since the ranks add up.

    Raises:
        SettingsError: One is not a plain LoRA.
        AdapterError: Two contain different embeddings with the same name.
    """
    parts: dict[str, list[tuple[LoraLayer, float]]] = {}
    for adapter, strength in adapters:
        require_combinable(adapter)
        for name, layer in adapter.layers.items():
            assert isinstance(layer, LoraLayer)
            parts.setdefault(name, []).append((layer, strength))
    embeddings = merged_embeddings(adapter for adapter, _ in adapters)
    return Adapter({name: _sum(layers) for name, layers in parts.items()}, embeddings=embeddings)


def _sum(layers: Sequence[tuple[LoraLayer, float]]) -> Layer:
    shape = max((layer.shape for layer, _ in layers), key=len)  # a 1×1 kernel may be left out in a file
    return to_layer(sum_deltas([to_delta(layer, shape).times(strength) for layer, strength in layers]))


def _written(
    wanted: Path, metadata: Mapping[str, str], write: Callable[[], Path], identifying: Sequence[str] = _IDENTIFYING
) -> Path:
    """The file of this run, length and precision if it exists, else the first free name, written."""
    for path in [wanted, *sorted(wanted.parent.glob(f"{glob.escape(wanted.stem)}-*{wanted.suffix}"))]:
        if path.is_file() and _is_same(path, metadata, identifying):
            return path
    return write()


def _is_same(path: Path, metadata: Mapping[str, str], identifying: Sequence[str]) -> bool:
    try:
        _, existing = read_header(path)
    except (OSError, ValueError):
        return False
    return all(existing.get(key) == metadata.get(key) for key in identifying)
