"""The recipe: DreamBooth with LoRA (Ruiz et al. 2023; Hu et al. 2022), from pictures to an adapter file.

Read `DreamBooth.run` first, then its methods in order: open_run, prepare, resume, loop, export.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .adapters.kohya import Adapter
from .adapters.metadata import RunFacts, training_metadata
from .core.devices import DTYPES, explained_memory_errors, pick_device, pick_precision, release, reset_peak_memory
from .core.distributed import ProcessGroup, accelerate_state_kept, make_accelerator
from .core.errors import CancelledError, DivergedError
from .core.events import Listener, Note, Opened, SilentListener, Validation
from .core.throughput import Throughput
from .data.images import Picture, split_validation
from .data.latent_cache import LatentCache, build_cache, drop_frozen_text_encoders
from .models.families.base import BaseWeights, DiffusionModel
from .models.nf4 import require_quantizable
from .settings.train import TrainSettings
from .training.adapter import StartingPoint
from .training.averaging import Averaging
from .training.export import export
from .training.loss import LossComputer, TextConditioning
from .training.memory.fit import MemoryBudget
from .training.optimizers import (
    learning_rate_factor,
    make_optimizer,
    recompute_activations,
    restore_optimizer,
    set_learning_rates,
)
from .training.preflight import diverged, require_prediction_type, require_trainable
from .training.previews import Previews
from .training.runs.checkpoint import Checkpoint, RunFolder, Saved, run_fingerprint
from .training.runs.metrics import is_validated
from .training.runs.trackers import watched
from .training.trainable import Trainable, make_trainable

_LOWER = "resolution or batch_size, turn gradient_checkpointing on, or set base_quantization; the run then resumes"
_BUILT = ("model", "trainee", "averaging", "optimizer", "accelerator", "cache", "captions", "passes", "previews")


@dataclass(frozen=True)
class TrainResult:
    """What a run gives.

    Attributes:
        adapter: The trained adapter as it stands in the file; of full fine-tuning the extracted one.
        path: The adapter file.
        run: The run's folder, with its checkpoints.
        step: Step whose weights the files hold: the last, unless the run stopped early.
        started_from: Step from which this call went on; equal to the number of steps if the run was finished.
        checkpoint: The checkpoint file of full fine-tuning; None otherwise.
    """

    adapter: Adapter
    path: Path
    run: Path
    step: int
    started_from: int
    checkpoint: Path | None


def train(
    base: BaseWeights,
    subject: Sequence[Picture],
    priors: Sequence[Picture],
    settings: TrainSettings,
    output_dir: Path,
    runs_dir: Path,
    device: str = "auto",
    listener: Listener | None = None,
    *,
    stage: StartingPoint | None = None,
    checkpoints_dir: Path | None = None,
) -> TrainResult:
    """Train an adapter on a subject, or go on with a run that was interrupted, or return one that is finished.

    Args:
        base: The opened base model. Its tensors are borrowed and never written to.
        subject: The subject's pictures.
        priors: Class pictures for prior preservation; empty for none.
        settings: What and how to learn.
        output_dir: Folder of the adapter file.
        runs_dir: Folder of all runs' state.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        listener: Told what happens; may stop the run after any step.
        stage: What is built upon beside the base.
        checkpoints_dir: Folder of the checkpoint file of full fine-tuning; the adapter's if None.

    Raises:
        CancelledError: The listener stopped the run; a checkpoint was written.
        DivergedError: The loss became NaN or infinite; the last good checkpoint is kept.
        OutOfMemoryError: The memory does not suffice; says what to lower.
        SettingsError: The settings don't fit the model or the device.
        StorageError: The folders can't be written or have no room.
    """
    place = pick_device(device)
    fit = MemoryBudget(settings, place, ProcessGroup.here(cpu=place.type == "cpu"))
    places = (base, subject, priors, settings, output_dir, runs_dir, fit.device, listener, stage, checkpoints_dir)
    with accelerate_state_kept():
        return fit.attempt(lambda: DreamBooth(*places, fit), listener or SilentListener())


class DreamBooth:
    """One run of the recipe.

    Features: prior preservation, an adapter of any kind in float32 on a borrowed base in fp32/bf16/fp16 or the weights
    themselves, trained text encoders, posterior sampling from cached latents, gradient accumulation, clipping and
    checkpointing, exact resume, cancel within one step.
    """

    def __init__(
        self,
        base: BaseWeights,
        subject: Sequence[Picture],
        priors: Sequence[Picture],
        settings: TrainSettings,
        output_dir: Path,
        runs_dir: Path,
        device: torch.device,
        listener: Listener | None = None,
        stage: StartingPoint | None = None,
        checkpoints_dir: Path | None = None,
        fit: MemoryBudget | None = None,
    ) -> None:
        """Take the inputs; nothing is built yet."""
        self.base, self.subject, self.priors, self.given = base, list(subject), list(priors), settings
        self.settings, self.fit = settings, fit or MemoryBudget(settings, device)
        self.taught, self.held_out = split_validation(self.subject, settings.validation_pictures, settings.seed)
        self.output_dir, self.runs_dir, self.device = output_dir, runs_dir, device
        self.stage, self.checkpoints_dir = stage or StartingPoint(), checkpoints_dir or output_dir
        self.listener: Listener = listener or SilentListener()
        self.precision = pick_precision(settings.precision, device)
        self.team = self.fit.team
        self.fingerprint = run_fingerprint(
            base, subject, priors, settings, self.precision, self.stage.start, self.team.count
        )
        self.step = 0
        self.model: DiffusionModel
        self._consistent = True

    def run(self) -> TrainResult:
        """Open the run's folder; build, cache, adapt; resume; loop; export."""
        self.open_run()
        last, newest = self.previews.finished_at(), self.run_folder.newest(self.settings.steps)
        self.team.wait()
        if last is not None:
            self.listener.report(Note(f"This run is finished already: {self.run_folder.path}"))
            return self._export(self.run_folder.trained(last), last, last)
        alone = contextlib.nullcontext(self.listener)
        watching = (
            watched(self.listener, self.run_folder, self.settings, newest) if self.team.is_main_process else alone
        )
        with watching as self.listener, explained_memory_errors(_LOWER):
            self.prepare()
            self._resume(newest)
            best = self._loop()
            self.fit.tell_peak(self.listener)
            return self._export(self.run_folder.trained(best), best, newest)

    def clean_up(self) -> None:
        """Drop every network and give the device's memory back."""
        if hasattr(self, "accelerator"):
            self.accelerator.free_memory()
        for name in _BUILT:
            if hasattr(self, name):
                delattr(self, name)
        release(self.device)

    def open_run(self) -> None:
        """Check the folders; find this run's folder by its fingerprint, or begin one."""
        settings, stage = self.settings, self.stage
        require_quantizable(settings.base_quantization, self.device)
        require_trainable(
            *(self.base, settings, stage.start, self.output_dir, self.runs_dir, stage.stacked),
            *(self.checkpoints_dir, self.device),
        )
        shown = {"base": self.base.title} | settings.model_dump(mode="json")
        which, anew = (self.runs_dir, settings.name, self.fingerprint, shown), settings.resume == "never"
        self.run_folder = self.fit.folder = self.fit.folder or self.team.broadcast_from_main(
            lambda: RunFolder.open(*which, anew=anew)
        )
        self.listener.report(Opened(self.run_folder.path, self.run_folder.newest(settings.steps), settings.steps))
        self.previews = Previews(self.base, self.subject, settings, self.run_folder, self.device)

    def prepare(self) -> None:
        """Build the model around the borrowed weights, encode once, put in what is trained."""
        self.settings = self.fit.settings(self.base, self.stage.start, bool(self.priors), self.precision, self.listener)
        reset_peak_memory(self.device)
        self.model = self.base.family.build(self.base)
        self.objective = self.model.objective.shaped(self.settings).to(self.device)
        self.model.objective = self.objective.as_type(self.objective.prediction_type)  # which previews are drawn with
        with self.team.main_process_first():
            self.cache = self._encode()
        self._begin_training()

    def _encode(self) -> LatentCache:
        """Encode pictures and captions, or read what this run encoded before; what is not trained leaves."""
        trained = self.settings.text_rates
        if self.team.is_main_process:
            self.previews.encode(self.model, trained, self.listener)
        cache = LatentCache.load(self.run_folder.cache_path)
        if cache is None:
            sets = {"instance": self.taught, "prior": self.priors, "validation": self.held_out}
            cache = build_cache(self.model, sets, self.settings, self.device, self.listener)
            cache.save(self.run_folder.cache_path)
        drop_frozen_text_encoders(self.model, trained)
        del self.model.vae
        release(self.device)
        return cache

    def _begin_training(self) -> None:
        """Bring the networks to device and precision, make them trainable, set up optimiser and accelerator."""
        settings, dtype = self.settings, DTYPES[self.precision]
        self.trainee: Trainable = make_trainable(self.model, settings, self.device, dtype, self.stage.start)
        if settings.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
            for encoder in self.model.text_encoders.values():
                recompute_activations(encoder)
        optimizer = make_optimizer(self.trainee.groups(), settings, self.trainee.starting_at_zero())
        self.averaging = Averaging(self.trainee.parameters(), optimizer, settings)
        self.learning_rate_factor = learning_rate_factor(optimizer, settings)
        self.accelerator = make_accelerator(self.device, self.precision, settings.gradient_accumulation)
        self.model.unet = self.accelerator.prepare_model(self.model.unet, evaluation_mode=True)  # we reduce ourselves
        self.optimizer = self.accelerator.prepare(optimizer)
        autocast = self.accelerator.autocast
        text = self.previews.joined(self.cache.text)
        self.captions = TextConditioning(self.model, text, list(settings.text_rates), self.device, dtype, autocast)
        self.passes = LossComputer(
            self.model, self.objective, self.cache, self.captions, settings, dtype, self.team.share
        )

    def _resume(self, step: int) -> None:
        """Load the checkpoint of that step; 0: the run is new, and first looks whether the model fits."""
        if not step:
            latents, dtype, prediction = self.cache.instance, DTYPES[self.precision], self.base.prediction
            require_prediction_type(self.model, latents, self.captions, prediction, self.device, dtype, self.listener)
            return
        checkpoint = self.run_folder.load(step)
        self.trainee.restore(checkpoint.trained)
        self.averaging.restore(checkpoint.live, step)
        restore_optimizer(self.optimizer, checkpoint.optimizer)
        if self.accelerator.scaler is not None and checkpoint.extra.get("scaler"):
            self.accelerator.scaler.load_state_dict(checkpoint.extra["scaler"])
        self.step = step
        self.listener.report(Note(f"Going on after step {self.step}: {self.run_folder.path}"))

    def _loop(self) -> int:
        """Train to the last step, or until it gets no better; leave a checkpoint however it ends. The best step."""
        settings, pace = self.settings, Throughput(self.settings.steps, self.step, self.device)
        previous: tuple[int, float, Tensor] | None = None
        try:
            best = self._preview()  # of the base itself, or of a step at which the run was stopped
            while self.step < settings.steps and best is None:
                if self.captions.trained and self.step >= settings.text_encoder_steps:
                    self._freeze_text_encoders()
                factor = self.learning_rate_factor(self.step)
                loss = self.train_step(factor)
                self.step += 1
                self._consistent = True
                if previous is not None:  # one step late, so that the device is never waited for
                    self._report(pace, *previous)
                previous = (self.step, settings.learning_rate * factor, loss)
                due = settings.checkpoint_every and self.step % settings.checkpoint_every == 0
                stop = self.team.anyone(self.listener.should_stop(), self.device)
                if stop or due or self.step == settings.steps or self.previews.wanted(self.step):
                    self._report(pace, *previous)
                    previous = None
                    if stop:
                        raise CancelledError(self.step, settings.steps)
                    self._save()
                    best = self._preview()
        except BaseException as error:
            if not isinstance(error, DivergedError):
                self._save_interrupted()
            if isinstance(error, CancelledError):
                self.team.wait()  # a process that left now would let the launcher end the leader while it saves
            raise
        if best is not None:
            self.listener.report(
                Note(f"Stopped early: step {best} shows the subject best; since then the class drifts.")
            )
        return best or self.step

    def _preview(self) -> int | None:
        """Draw and score what this step can do, if it is due; the best step if the run should stop here."""
        if self.team.is_main_process:
            with self.averaging.shown():
                if self.previews.due(self.step):
                    self.previews.make(self.step, self.model, self.captions.conditioning, self.listener)
                self._validate()
        self.team.wait()
        for network in (self.model.unet, *self.model.text_encoders.values()):
            network.train()
        return self.previews.stopped_at()

    def _validate(self) -> None:
        """Tell the loss on the held-out pictures, if there are any and it was not told before."""
        if self.cache.validation is not None and not is_validated(self.run_folder.metrics_path, self.step):
            self.listener.report(Validation(self.step, self.passes.validation_loss(self.cache.validation)))

    def _freeze_text_encoders(self) -> None:
        """Leave the text encoders as they are: their captions are encoded one last time, and they leave."""
        groups = self.trainee.groups()
        self._consistent = False
        self.averaging.settle(one for name in self.captions.trained for one in groups.get(name, ()))
        self._consistent = True
        self.captions.freeze()
        release(self.device)
        self.listener.report(Note(f"The text encoders stay as they are after step {self.step}."))

    def train_step(self, factor: float) -> Tensor:
        """One optimiser step: gradient_accumulation passes, clip, update. Returns the mean loss, on the device.

        Args:
            factor: Of every component's peak learning rate.
        """
        settings = self.settings
        set_learning_rates(self.optimizer, factor)
        total = torch.zeros((), device=self.device)
        for micro in range(settings.gradient_accumulation):
            with self.accelerator.accumulate(self.model.unet):
                for loss in self.passes.losses(self.step, micro):
                    self.accelerator.backward(loss)
                    total = total + loss.detach() / settings.gradient_accumulation
                if self.accelerator.sync_gradients:
                    total = self.team.average(self.trainee.parameters(), total)
                    if settings.max_grad_norm:
                        self.accelerator.clip_grad_norm_(self.trainee.parameters(), settings.max_grad_norm)
                    self._consistent = False  # until the step is counted
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
                    self.trainee.after_update(("unet", *self.captions.trained))
                    self.averaging.update()
        return total

    def _report(self, pace: Throughput, step: int, rate: float, loss: Tensor) -> None:
        """Tell the listener of a step, and stop the run if its loss is not a finite number."""
        value = float(loss)
        if not math.isfinite(value):
            raise diverged(value, step, self.settings.learning_rate, self.precision, self.run_folder)
        self.listener.report(pace.event(step, value, rate))

    def _save(self) -> None:
        """Write a checkpoint of the current step."""
        if not self.trainee.is_finite():
            raise DivergedError(
                f"The adapter's weights are no longer finite at step {self.step}; the run was stopped.",
                "Lower learning_rate; the last good checkpoint is kept and the run resumes from it.",
            )
        scaler = self.accelerator.scaler
        extra = {"scaler": scaler.state_dict() if scaler is not None else None}
        with self.averaging.shown():
            trained = self.trainee.saved(self._metadata(self.step))
        keep, best = self.settings.keep_checkpoints, self.previews.best()
        state = Checkpoint(self.step, trained, self.optimizer.state_dict(), extra, self.averaging.raw())
        if self.team.is_main_process:
            self.run_folder.save(state, keep, best=best, keep_adapters=self.settings.keep_adapters)

    def _save_interrupted(self) -> None:
        """Keep what is done when the loop ends early, unless it is saved already or mid-update."""
        saved = self.step in self.run_folder.steps()
        if self.step and not saved and self._consistent and self.trainee.is_finite():
            self._save()
            self.listener.report(
                Note(f"Stopped; step {self.step} is saved and the run can go on: {self.run_folder.path}")
            )

    def _metadata(self, step: int) -> dict[str, str]:
        facts = RunFacts(
            family=self.base.family,
            base_title=self.base.title,
            base_fingerprint=self.base.fingerprint,
            run_fingerprint=self.fingerprint,
            captions=[picture.caption for picture in self.subject],
            repeats=[picture.repeats for picture in self.subject],
            class_pictures=Counter(picture.caption for picture in self.priors),
            precision=self.precision,
            started_at=self.run_folder.started_at,
            prediction=self.base.prediction,
            clip_skip=self.base.clip_skip,
            start=self.stage.start,
            processes=self.team.count,
        )
        return training_metadata(self.given, facts, step)

    def _export(self, saved: Saved, step: int, started_from: int) -> TrainResult:
        """Write the files."""
        metadata, stacked = self._metadata(step), self.stage.stacked
        if saved.weights is not None:
            self.listener.report(Note("Writing the checkpoint and extracting the LoRA; this takes a minute or two."))
        with self.team.main_process_first():  # the others find what it wrote
            files = export(self.base, saved, stacked, self.settings, metadata, self.output_dir, self.checkpoints_dir)
        for path in (files.checkpoint, files.path):
            if path is not None:
                self.listener.report(Note(f"{'Checkpoint' if path == files.checkpoint else 'Adapter'}: {path}"))
        return TrainResult(files.adapter, files.path, self.run_folder.path, step, started_from, files.checkpoint)
