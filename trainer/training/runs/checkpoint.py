"""Run state on disk: written whole or not at all, found by fingerprint, exact to the bit. No pickle.

A run's folder `<name>-<first digits of its fingerprint>` holds `run.json` (the fingerprint and the settings),
`cache.safetensors` and checkpoints `step-00000100/` with
    adapter.safetensors    a complete adapter file in float32, which every program loads; or, in full fine-tuning,
    weights.safetensors    the trained weights in float32, "<component>.<parameter>"
    live.safetensors       the weights that are updated, "<parameter>", if those above are an average of them
    optimizer.safetensors  the optimiser's tensors, "<parameter>.<name>" and "group <number>.<name>"
    state.json             step, losses, and what of the optimiser is not a tensor
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters.kohya import Adapter, file_hashes, read_adapter, write_adapter
from ...core.errors import AdapterError, StorageError
from ...core.files import explained_os_errors, folder_written_atomically, remove_leftovers, write_atomic
from ...data.images import Picture
from ...models.families.base import BaseWeights
from ...settings.train import TrainSettings

_DIGITS = 12
_ADAPTER = "adapter.safetensors"
_WEIGHTS = "weights.safetensors"
_LIVE = "live.safetensors"


@dataclass(frozen=True)
class Saved:
    """What was trained, float32, on the CPU: an adapter, or the weights themselves.

    Attributes:
        adapter: The adapter, if one was trained.
        weights: "<component>.<parameter>" → tensor, if the weights were trained.
        metadata: What a file of the weights says of itself; an adapter has its own.
    """

    adapter: Adapter | None = None
    weights: Mapping[str, Tensor] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A saved state.

    Attributes:
        step: Steps completed.
        trained: What was trained; the weights that are shown.
        optimizer: The optimiser's `state_dict()`.
        extra: Whatever else the recipe saved; JSON values.
        live: "<parameter>" → the weights that are updated, where they are not the shown ones.
    """

    step: int
    trained: Saved
    optimizer: dict[str, Any]
    extra: dict[str, Any]
    live: Mapping[str, Tensor] = field(default_factory=dict)


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        """Look at `path`, which exists."""
        self.path = path

    @classmethod
    def open(
        cls, root: Path, name: str, fingerprint: str, settings: Mapping[str, Any], *, anew: bool = False
    ) -> RunFolder:
        """Find the run with this fingerprint below `root`, or begin a folder for it.

        Args:
            root: Folder of all runs.
            name: The run's name, part of a new folder's name.
            fingerprint: Digest of all that the result depends on.
            settings: Written into a new folder for people to read.
            anew: Begin a new folder even if there is one.

        Raises:
            StorageError: The folder can't be made.
        """
        found = (
            [] if anew else [path for path in root.glob(f"*-{fingerprint[:_DIGITS]}*") if _belongs(path, fingerprint)]
        )
        if found:
            run = cls(max(found, key=lambda path: (max(cls(path).steps(), default=0), path.stat().st_mtime)))
            remove_leftovers(run.path)
            return run
        path, number = root / f"{name}-{fingerprint[:_DIGITS]}", 2
        while path.exists():
            path, number = root / f"{name}-{fingerprint[:_DIGITS]}-{number}", number + 1
        record = {"fingerprint": fingerprint, "name": name, "started_at": time.time(), "settings": dict(settings)}
        write_atomic(path / "run.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
        return cls(path)

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The run in that folder.

        Raises:
            StorageError: It is not the folder of a run.
        """
        if not _read_json(path / "run.json").get("fingerprint"):
            raise StorageError(
                f"{path} is not the folder of a run.", "Give a folder below runs/, with a run.json in it."
            )
        return cls(path)

    @property
    def record(self) -> dict[str, Any]:
        """What was written when the run began: "fingerprint", "name", "started_at" and "settings"."""
        return _read_json(self.path / "run.json")

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.record.get("name", self.path.name))

    @property
    def started_at(self) -> float:
        """Unix time at which the run began."""
        return float(self.record.get("started_at", 0.0))

    @property
    def workflow_path(self) -> Path:
        """Where the graph that the run belongs to lies, if it was kept."""
        return self.path / "workflow.json"

    @property
    def subject_path(self) -> Path:
        """Folder of small pictures of the subject, if they were kept."""
        return self.path / "subject"

    @property
    def cache_path(self) -> Path:
        """Where the run's encoded pictures and captions lie."""
        return self.path / "cache.safetensors"

    @property
    def metrics_path(self) -> Path:
        """Where the run's metrics lie (`metrics`)."""
        return self.path / "metrics.jsonl"

    def preview_path(self, step: int) -> Path:
        """Folder of the previews of that step."""
        return self.path / "previews" / f"step-{step:08d}"

    def checkpoint_path(self, step: int) -> Path:
        """Folder of the checkpoint of that step."""
        return self.path / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return sorted(int(path.name[5:]) for path in self.path.glob("step-*") if path.name[5:].isdecimal())

    def newest(self, limit: int) -> int:
        """Step of the newest whole checkpoint up to a step; 0 if there is none."""
        return max((step for step in self.steps() if step <= limit), default=0)

    def adapters(self) -> dict[int, Path]:
        """Step → adapter file, ascending: of the checkpoints, and those that were kept of older ones."""
        kept = {int(path.stem[5:]): path for path in self._kept.glob("step-*.safetensors") if path.stem[5:].isdecimal()}
        whole = {step: self.checkpoint_path(step) / _ADAPTER for step in self.steps()}
        found = kept | {step: path for step, path in whole.items() if path.is_file()}
        return dict(sorted(found.items()))

    @property
    def _kept(self) -> Path:
        return self.path / "adapters"

    def save(self, checkpoint: Checkpoint, keep: int, *, best: int = 0, keep_adapters: bool = False) -> Path:
        """Write a checkpoint, then delete the oldest of those up to its step.

        Args:
            checkpoint: What to write.
            keep: How many checkpoints stay.
            best: Step of one that stays in any case.
            keep_adapters: Whether the adapters of the others stay.

        Raises:
            StorageError: It can't be written; what was there before is untouched.
        """
        from safetensors.torch import save_file

        path = self.checkpoint_path(checkpoint.step)
        tensors, rest = _split_optimizer(checkpoint.optimizer)
        with folder_written_atomically(path) as folder:
            if checkpoint.trained.adapter:
                write_adapter(folder / _ADAPTER, checkpoint.trained.adapter, torch.float32)
            try:
                if checkpoint.trained.weights:
                    save_file(dict(checkpoint.trained.weights), folder / _WEIGHTS, dict(checkpoint.trained.metadata))
                save_file(tensors, folder / "optimizer.safetensors")
                if checkpoint.live:
                    save_file(dict(checkpoint.live), folder / _LIVE)
            except Exception as error:  # safetensors reports a full disk as an error of its own
                raise StorageError(
                    f"{path} can't be written: {error}.",
                    "Free some space on the disk and start again: the run resumes.",
                ) from error
            names = {"live": True} if checkpoint.live else {}
            state = {"step": checkpoint.step, "optimizer": rest, "extra": checkpoint.extra, **names}
            (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
        old = [step for step in self.steps() if step <= checkpoint.step]
        for step in old[:-keep]:
            if step != best:
                with contextlib.suppress(OSError):
                    self._remove(step, keep_adapters)
        return path

    def _remove(self, step: int, keep_adapter: bool) -> None:
        adapter = self.checkpoint_path(step) / _ADAPTER
        if keep_adapter and adapter.is_file():
            self._kept.mkdir(exist_ok=True)
            adapter.replace(self._kept / f"step-{step:08d}.safetensors")
        shutil.rmtree(self.checkpoint_path(step))

    def load(self, step: int) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            StorageError: It is damaged.
        """
        from safetensors.torch import load

        path = self.checkpoint_path(step)
        with _explained_damage(path):
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            tensors = load((path / "optimizer.safetensors").read_bytes())
            optimizer = _join_optimizer(tensors, state["optimizer"])
            live = load((path / _LIVE).read_bytes()) if state.get("live") else {}
            return Checkpoint(step, _read_trained(path), optimizer, state["extra"], live)

    def trained(self, step: int) -> Saved:
        """Read what was trained from a checkpoint, without the optimiser, or from the adapter that was kept of it.

        Raises:
            StorageError: It is damaged.
        """
        path = self.checkpoint_path(step)
        if not path.is_dir():
            path = self.adapters().get(step, path)
        with _explained_damage(path):
            return _read_trained(path)

    def has(self, step: int) -> bool:
        """Whether what was trained up to that step is kept."""
        return step in self.steps() or step in self.adapters()


@contextlib.contextmanager
def _explained_damage(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, AdapterError) as error:
        raise StorageError(
            f"The checkpoint {path} is damaged: {error}.",
            f"Delete that {'file' if path.suffix else 'folder'}: the run goes on from the checkpoint before it.",
        ) from error


def _read_trained(path: Path) -> Saved:
    from safetensors.torch import load_file

    if (path / _WEIGHTS).is_file():
        return Saved(weights=load_file(path / _WEIGHTS))
    return Saved(adapter=read_adapter(path if path.is_file() else path / _ADAPTER))


def run_fingerprint(
    base: BaseWeights,
    subject: Sequence[Picture],
    priors: Sequence[Picture],
    settings: TrainSettings,
    precision: str,
    start: Adapter | None = None,
    processes: int = 1,
) -> str:
    """Digest of everything on which the trained weights depend."""
    several = {"processes": processes} if processes > 1 else {}
    what = {
        "recipe": 3,
        "start": file_hashes(start.state_dict(), {})[0] if start else "",
        "base": base.fingerprint,
        "subject": [picture.facts for picture in subject],
        "priors": [picture.facts for picture in priors],
        "settings": settings.result_settings() | {"precision": precision} | several,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _belongs(path: Path, fingerprint: str) -> bool:
    return _read_json(path / "run.json").get("fingerprint") == fingerprint


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with explained_os_errors(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (StorageError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state dict as tensors for safetensors and a rest for JSON."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    places: set[int] = set()

    def keep(key: str, tensor: Tensor) -> None:
        copy = tensor.detach().cpu().contiguous()
        if copy.data_ptr() in places:  # safetensors refuses memory that is shared, as bitsandbytes' tables are
            copy = copy.clone()
        places.add(copy.data_ptr())
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
