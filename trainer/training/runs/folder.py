"""The folder of a run (`layout`): found by the run's fingerprint, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapters.kohya import Adapter, file_hashes
from ...core.errors import StorageError, suggest
from ...core.files import (
    delete_at_once,
    explained_os_errors,
    is_temporary,
    link_or_copy,
    numbered,
    remove_leftovers,
    write_atomic,
    write_file,
    write_folder,
)
from ...core.locks import LOCK_FILE
from ...core.prompts import PromptWords
from ...data.images import Picture
from ...models.families.base import BaseWeights
from ...settings.train import TrainSettings
from .checkpoint import (
    Checkpoint,
    Measurements,
    Saved,
    read_checkpoint,
    read_measurements,
    read_trained,
    write_checkpoint_files,
    write_measurements,
)
from .layout import ADAPTER_FILE, RECORD_FILE, RunLayout, read_record, step_name
from .metrics import preview_scores, validated_steps

_DIGITS = 12


@dataclass(frozen=True)
class RunPaths:
    """Where a run writes.

    Attributes:
        output: Folder of the adapter file.
        runs: Folder of all runs' state.
        checkpoints: Folder of the checkpoint file of full fine-tuning; None: the adapter's.
        embeddings: Folder of the embedding files of pivotal tuning; None: embeddings/ in the adapter's.
    """

    output: Path
    runs: Path
    checkpoints: Path | None = None
    embeddings: Path | None = None

    @property
    def checkpoint_output(self) -> Path:
        """Folder of the checkpoint file of full fine-tuning."""
        return self.checkpoints or self.output

    @property
    def embedding_output(self) -> Path:
        """Folder of the embedding files of pivotal tuning."""
        return self.embeddings or self.output / "embeddings"


class RunFolder(RunLayout):
    """The folder of one run, with its checkpoints."""

    @classmethod
    def open(
        cls,
        root: Path,
        name: str,
        fingerprint: str,
        settings: Mapping[str, Any],
        *,
        new: bool = False,
        earlier: Collection[str] = (),
    ) -> RunFolder:
        """Find the run with this fingerprint in `root`, or create a folder for it; locks it for this process.

        Of several, which `new` creates, it is the one that was started last, and of copies the one with more steps. Its
        folder may have been renamed. The run stays locked until `lock` is released, or this process ends.

        Args:
            root: Folder of all runs.
            name: The run's name, part of a new folder's name.
            fingerprint: Digest of everything on which the result depends.
            settings: Written into a new folder, for people to read.
            new: Create a new folder even if there is one.
            earlier: The same run's fingerprints in earlier versions.

        Raises:
            BusyError: Another process is training the run.
            StorageError: The folder can't be created.
        """
        with explained_os_errors(root):
            root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)  # of runs that were being deleted
        known = {fingerprint, *earlier}
        while True:
            runs = [] if new else [cls(path) for path in _paths_with(root, known)]
            if runs:
                run = max(runs, key=lambda run: (run.started_at, max(run.steps(), default=0), run.bears(known)))
                try:
                    run.reserve()
                except StorageError:
                    if run.path.exists():
                        raise
                    continue  # it was deleted a moment ago
            else:
                run = cls._made(root, name, fingerprint, settings, new=new)
            if _belongs(run.path, known):
                break
            run.lock.release()  # another process made it, or deleted it, a moment ago
        remove_leftovers(run.path, recursive=True, sole_writer=True)
        return run

    @classmethod
    def _made(cls, root: Path, name: str, fingerprint: str, settings: Mapping[str, Any], *, new: bool) -> RunFolder:
        """A new run's folder, locked; or one that another process has made meanwhile, which is not this run's."""
        for path in numbered(root / f"{name}-{fingerprint[:_DIGITS]}"):
            if os.path.lexists(path) and not _is_unused(path):
                continue
            with explained_os_errors(path):
                path.mkdir(exist_ok=True)
            run = cls(path)
            if run.lock.acquire() or not new:
                break
        run.reserve()
        if _is_unused(path):
            record = {"fingerprint": fingerprint, "name": name, "started_at": time.time(), "settings": dict(settings)}
            content = json.dumps(record, indent=1, ensure_ascii=False).encode(errors="backslashreplace")
            with run.lock.released_on_error():
                write_atomic(path / RECORD_FILE, content)
        return run

    def bears(self, fingerprints: Collection[str]) -> bool:
        """Whether the folder still has its original name, and is not a copy under another."""
        return any(fingerprint[:_DIGITS] in self.path.name for fingerprint in fingerprints)

    def reserve(self) -> None:
        """Take the run's lock.

        Raises:
            BusyError: Another process has it.
        """
        if not self.lock.acquire():
            raise self.lock.refusal(
                f"The run {self.path} is being trained",
                "Wait until it is done, or stop it; then start again, and it resumes where it ended. For a separate "
                f"run, set {suggest('resume', 'never')}.",
            )

    def __reduce__(self) -> tuple[type[RunFolder], tuple[Path]]:
        """In another process the same folder, without the lock."""
        return RunFolder, (self.path,)

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The run in that folder.

        Raises:
            StorageError: It is not the folder of a run.
        """
        if not read_record(path).get("fingerprint"):
            raise StorageError(f"{path} is not a run folder.", "Use a folder in runs/ that contains a run.json.")
        return cls(path)

    def save(self, checkpoint: Checkpoint, keep: int, *, best: int = 0, keep_adapters: bool = False) -> Path:
        """Write a checkpoint, then delete the oldest of those up to its step.

        Args:
            checkpoint: What to write. If that step has one, which is the same, only its measurements are updated.
            keep: Number of checkpoints to keep.
            best: Step of one to keep in any case.
            keep_adapters: Whether to keep the adapters of the others.

        Raises:
            StorageError: It can't be written; what was there before is untouched.
        """
        path = self.checkpoint_path(checkpoint.step)
        if not path.exists():
            write_folder(path, lambda folder: write_checkpoint_files(folder, checkpoint))
        elif checkpoint.measurements is not None:
            write_measurements(path, checkpoint.measurements)
        finished = [step for step in self.steps() if step <= checkpoint.step]
        for step in finished[:-keep]:
            if step != best:
                with contextlib.suppress(OSError, StorageError):
                    self._remove(step, keep_adapters)
        return path

    def _remove(self, step: int, keep_adapter: bool) -> None:
        """Delete a checkpoint so that a kill leaves it whole or its adapter in its place."""
        adapter = self.checkpoint_path(step) / ADAPTER_FILE
        kept = self.kept_adapters_path / f"{step_name(step)}.safetensors"
        if keep_adapter and adapter.is_file() and not kept.exists():
            write_file(kept, lambda temporary: link_or_copy(adapter, temporary))
        delete_at_once(self.checkpoint_path(step))

    def load(self, step: int) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            StorageError: It is damaged.
        """
        return read_checkpoint(self.checkpoint_path(step), step)

    def measurements(self, step: int | None = None) -> Measurements:
        """What was measured up to the checkpoint of a step, by default the newest; nothing at step 0.

        Up to version 0.4 only the metrics file had it, which is read where a checkpoint does not have it.
        """
        if step is None:
            step = max(self.steps(), default=0)
        if not step:
            return Measurements()
        with contextlib.suppress(StorageError):  # who goes on from a damaged checkpoint is told when it is loaded
            measurements = read_measurements(self.checkpoint_path(step))
            if measurements is not None:
                return measurements
        scores = {scored: metrics for scored, metrics in preview_scores(self.metrics_path).items() if scored <= step}
        return Measurements(
            scores, [validated for validated in validated_steps(self.metrics_path) if validated <= step]
        )

    def save_measurements(self, step: int, measurements: Measurements) -> None:
        """Add later measurements to the checkpoint of a step, if there is one.

        Raises:
            StorageError: It can't be written.
        """
        if step in self.steps():
            write_measurements(self.checkpoint_path(step), measurements)

    def trained(self, step: int) -> Saved:
        """Read what was trained from a checkpoint, without the optimiser, or from the adapter that was kept from it.

        Raises:
            StorageError: It is damaged.
        """
        path = self.checkpoint_path(step)
        if not path.is_dir():
            path = self.adapters().get(step, path)
        return read_trained(path)


def run_fingerprint(
    base: BaseWeights,
    subject: Sequence[Picture],
    priors: Sequence[Picture],
    settings: TrainSettings,
    precision: str,
    start: Adapter | None = None,
    processes: int = 1,
    words: Sequence[PromptWords] = (),
    *,
    as_given: bool = False,
) -> str:
    """Digest of everything on which the trained weights depend.

    Args:
        base: The base model.
        subject: The subject's pictures.
        priors: Class pictures.
        settings: Of the run.
        precision: In which it computes.
        start: An adapter that it starts from.
        processes: Number of processes that share its samples.
        words: Rare word and class noun of each subject; they count if vectors are learned for them.
        as_given: Whether settings without effect count, as they did up to version 0.4.
    """
    several = {"processes": processes} if processes > 1 else {}
    values = settings.result_settings(as_given=as_given)
    if not priors and settings.prior != "model" and not as_given:
        values["prior_weight"] = TrainSettings.model_fields["prior_weight"].default
    facts: dict[str, Any] = {
        "recipe": 3,
        "start": file_hashes(start.state_dict(), {})[0] if start else "",
        "base": base.fingerprint,
        "subject": [_subject_values(picture, settings) for picture in subject],
        "priors": [picture.fingerprint_values for picture in priors],
        "settings": values | {"precision": precision} | several,
    }
    if settings.token_vectors:
        facts["words"] = [[subject.token, subject.class_noun] for subject in words]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _subject_values(picture: Picture, settings: TrainSettings) -> list[Any]:
    """Everything of a picture of the subject that training depends on."""
    if settings.prior != "model":
        return picture.fingerprint_values
    return [*picture.fingerprint_values, {"class": picture.class_captions}]


def _is_unused(path: Path) -> bool:
    """Whether a folder was made for a run and holds nothing yet, since it is new or its process was killed."""
    try:
        return {entry.name for entry in path.iterdir()} <= {LOCK_FILE}
    except OSError:
        return False


def _paths_with(root: Path, fingerprints: Collection[str]) -> list[Path]:
    """The folders of the runs with one of those fingerprints, whatever people have called them."""
    return [path for path in root.iterdir() if not is_temporary(path) and _belongs(path, fingerprints)]


def _belongs(path: Path, fingerprints: Collection[str]) -> bool:
    return str(read_record(path).get("fingerprint")) in fingerprints
