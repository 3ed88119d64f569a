"""A checkpoint: everything that exact resuming needs, in its own folder. No pickle.

adapter.safetensors    a complete adapter file in float32, which every program loads; or, in full fine-tuning,
weights.safetensors    the trained weights in float32, "<component>.<parameter>"
factors.safetensors    of a LoRA with orthogonal initialisation, "<module>.<suffix>": what its adapter file lacks
live.safetensors       the weights that are updated, "<parameter>", if those above are an average of them
optimizer.safetensors  the optimiser's tensors, "<parameter>.<name>" and "group <number>.<name>"
state.json             step, scores so far, and what of the optimiser is not a tensor
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters.kohya import Adapter, read_adapter, write_adapter
from ...core.errors import AdapterError, StorageError
from ...core.files import write_atomic
from ...core.tensor_files import map_tensors, read_tensors, save_tensors
from .layout import ADAPTER_FILE

WEIGHTS_FILE = "weights.safetensors"
FACTORS_FILE = "factors.safetensors"
LIVE_FILE = "live.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Saved:
    """What was trained, float32, on the CPU: an adapter, or the weights themselves.

    Attributes:
        adapter: The adapter, if one was trained.
        weights: "<component>.<parameter>" → tensor, if the weights were trained.
        metadata: Metadata of a file of the weights; an adapter has its own.
        factors: Tensors of an adapter's training that its file lacks; only a checkpoint has them.
    """

    adapter: Adapter | None = None
    weights: Mapping[str, Tensor] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Measurements:
    """What a run has measured so far, which decides how it continues.

    Attributes:
        scores: Step → metric → value, for every step with previews; without a scoring model they have no metrics.
        validated: Steps whose loss on the held-out pictures was reported.
        scored_as: Step → digest of how its previews were generated and scored (`Previews.conditions`); there is
            none up to version 0.4.
    """

    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    validated: list[int] = field(default_factory=list)
    scored_as: dict[int, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Measurements:
        """The inverse of `as_json`."""
        scores = {int(step): dict(metrics) for step, metrics in values["scores"].items()}
        scored_as = {int(step): str(digest) for step, digest in values.get("scored_as", {}).items()}
        return cls(scores, list(values["validated"]), scored_as)

    def as_json(self) -> dict[str, Any]:
        """Plain values; JSON's keys are strings."""
        scores = {str(step): metrics for step, metrics in self.scores.items()}
        scored_as = {str(step): digest for step, digest in self.scored_as.items()}
        return {"scores": scores, "validated": self.validated, "scored_as": scored_as}

    def comparable_scores(self, steps: int) -> dict[int, dict[str, float]]:
        """The scores up to a step that were measured like the newest of them; those of version 0.4 match any."""
        scores = {step: metrics for step, metrics in self.scores.items() if metrics and step <= steps}
        newest = self.scored_as.get(max(scores, default=0))
        return {step: metrics for step, metrics in scores.items() if self.scored_as.get(step, newest) == newest}


@dataclass(frozen=True)
class Checkpoint:
    """A saved state.

    Attributes:
        step: Steps completed.
        trained: What was trained; the evaluation weights, where they are an average.
        optimizer: The optimiser's `state_dict()`.
        extra: Whatever else the recipe saved; JSON values.
        live: "<parameter>" → the raw weights, which are updated, where `trained` holds an average of them.
        measurements: What was measured up to this step; None in a checkpoint of version 0.4 or older.
    """

    step: int
    trained: Saved
    optimizer: dict[str, Any]
    extra: dict[str, Any]
    live: Mapping[str, Tensor] = field(default_factory=dict)
    measurements: Measurements | None = None


def write_checkpoint_files(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint's files into a folder.

    Raises:
        StorageError: A file can't be written.
    """
    trained = checkpoint.trained
    if trained.adapter:
        write_adapter(folder / ADAPTER_FILE, trained.adapter, torch.float32)
    tensors, rest = _split_optimizer(checkpoint.optimizer)
    try:
        if trained.weights:
            save_tensors(folder / WEIGHTS_FILE, trained.weights, trained.metadata)
        save_tensors(folder / OPTIMIZER_FILE, tensors, {}, copied=tensors)  # as it is, whatever that is
        if trained.factors:
            save_tensors(folder / FACTORS_FILE, trained.factors, {})
        if checkpoint.live:
            save_tensors(folder / LIVE_FILE, checkpoint.live, {})
    except (OSError, StorageError) as error:
        reason = error.problem if isinstance(error, StorageError) else error
        raise StorageError(
            f"The checkpoint at step {checkpoint.step} can't be written to {folder.parent}: {reason}",
            "Free some space on the disk and start again; the run will resume.",
        ) from error
    state: dict[str, Any] = {"step": checkpoint.step, "optimizer": rest, "extra": checkpoint.extra}
    if checkpoint.live:
        state["live"] = True
    if trained.factors:
        state["factors"] = True
    if checkpoint.measurements is not None:
        state["measurements"] = checkpoint.measurements.as_json()
    (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")


def read_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Read the checkpoint of a step from its folder.

    Raises:
        StorageError: It is damaged.
    """
    with explained_damage(folder):
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        tensors = read_tensors(folder / OPTIMIZER_FILE)
        factors = read_tensors(folder / FACTORS_FILE) if state.get("factors") else {}
        return Checkpoint(
            step=step,
            trained=replace(read_trained(folder), factors=factors),
            optimizer=_join_optimizer(tensors, state["optimizer"]),
            extra=state["extra"],
            live=read_tensors(folder / LIVE_FILE) if state.get("live") else {},
            measurements=_measurements_of(state),
        )


def read_trained(path: Path) -> Saved:
    """What was trained, from a checkpoint's folder or from an adapter file that was kept from one.

    Raises:
        StorageError: It is damaged.
    """
    with explained_damage(path):
        if path.is_file():
            return Saved(adapter=read_adapter(path))
        if (path / WEIGHTS_FILE).is_file():
            return Saved(weights=map_tensors(path / WEIGHTS_FILE))
        return Saved(adapter=read_adapter(path / ADAPTER_FILE))


def read_measurements(folder: Path) -> Measurements | None:
    """What was measured up to a checkpoint; None for a checkpoint of version 0.4 or older.

    Raises:
        StorageError: It is damaged.
    """
    with explained_damage(folder):
        return _measurements_of(json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))


def write_measurements(folder: Path, measurements: Measurements) -> None:
    """Add what was measured since a checkpoint was written to its state.

    Raises:
        StorageError: The file can't be written, or the checkpoint is damaged.
    """
    path = folder / STATE_FILE
    with explained_damage(folder):
        state = json.loads(path.read_text(encoding="utf-8"))
    state["measurements"] = measurements.as_json()
    write_atomic(path, json.dumps(state).encode())


def _measurements_of(state: Mapping[str, Any]) -> Measurements | None:
    return Measurements.from_json(state["measurements"]) if "measurements" in state else None


@contextlib.contextmanager
def explained_damage(path: Path) -> Iterator[None]:
    """Turn any error while `path` is read into a `StorageError` that names what to delete."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AdapterError) as error:
        raise StorageError(
            f"The checkpoint {path} is damaged: {error}.",
            f"Delete that {'file' if path.suffix else 'folder'}; the run will resume from the previous checkpoint.",
        ) from error


def _split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state dict as tensors for safetensors and a rest for JSON."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    addresses: set[int] = set()

    def keep(key: str, tensor: Tensor) -> None:
        copy = tensor.detach().cpu().contiguous()
        if copy.data_ptr() in addresses:  # safetensors refuses memory that is shared, as bitsandbytes' tables are
            copy = copy.clone()
        addresses.add(copy.data_ptr())
        tensors[key] = copy

    for index, entry in state["state"].items():
        for name, value in _flat(entry):
            if isinstance(value, Tensor):
                keep(f"{index}.{name}", value)
            else:
                values.setdefault(str(index), {})[name] = value
    groups = []
    for number, group in enumerate(state["param_groups"]):
        groups.append({name: value for name, value in group.items() if not isinstance(value, Tensor)})
        for name in set(group) - set(groups[-1]):  # of Prodigy
            keep(f"group {number}.{name}", group[name])
    return tensors, {"values": values, "param_groups": groups}


def _flat(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A parameter's state without the mapping in which newer versions of bitsandbytes keep what is quantised."""
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from value.items()
        else:
            yield name, value


def _join_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in rest["values"].items()}
    groups = [dict(group) for group in rest["param_groups"]]
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        if index.startswith("group "):
            groups[int(index.removeprefix("group "))][name] = tensor
        else:
            state.setdefault(int(index), {})[name] = tensor
    return {"state": state, "param_groups": groups}
