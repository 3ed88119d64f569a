"""The recipe: DreamBooth with LoRA (Ruiz et al. 2023; Hu et al. 2022), from pictures to an adapter file.

Read `DreamBooth.run` first; the methods that it calls follow in that order.
"""

from __future__ import annotations

import contextlib
import logging
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters.kohya import Adapter
from .adapters.metadata import RunFacts, training_metadata
from .adapters.names import networks
from .adapters.prefixes import UNET
from .core.devices import (
    DTYPES,
    NumberOnItsWay,
    explained_memory_errors,
    pick_device,
    pick_precision,
    release,
    reset_peak_memory,
)
from .core.distributed import ProcessGroup, accelerate_state_kept, make_accelerator
from .core.errors import CancelledError, DivergedError, StorageError, suggest
from .core.events import Listener, Note, RunOpened, SilentListener, Validation
from .core.prompts import PromptWords
from .core.seeding import seeded
from .core.throughput import Investment, Throughput
from .data.batches import Batch, draw_batches
from .data.images import Picture, split_validation
from .data.latent_cache import LatentCache, build_cache, drop_frozen_text_encoders
from .models.blocks import enable_gradient_checkpointing
from .models.compiled_blocks import CompiledBlocks, can_compile
from .models.families.base import BaseWeights, Conditioning, DiffusionModel
from .models.nf4 import require_quantizable
from .models.objective import Objective, consistency_loss
from .settings.train import TrainSettings
from .training.adapter import StartingPoint
from .training.averaging import WeightAveraging
from .training.beginning import Beginning
from .training.export import export
from .training.fused_backward import FusedBackward
from .training.gallery import preferred_strength, shown_metadata, write_gallery
from .training.memory.fit import MemoryBudget
from .training.optimizers import (
    WORDS,
    learning_rate_factor,
    make_optimizer,
    set_learning_rates,
)
from .training.preflight import (
    require_fused_backward,
    require_prediction_type,
    require_preservable,
    require_trainable,
)
from .training.preservation import BaseTeacher, TaughtBatch, chosen_prior, unpreserved_note
from .training.previews import Previews
from .training.runs.checkpoint import Measurements
from .training.runs.folder import RunFolder, RunPaths, run_fingerprint
from .training.runs.metrics import record_done
from .training.runs.trackers import logging_listener
from .training.state import TrainingState
from .training.text_conditioning import TextConditioning
from .training.trainable import Trainable, make_trainable
from .training.validation import validation_loss
from .training.words import TrainedWords

logger = logging.getLogger("dreambooth_lora")

_COMPILING = Investment(seconds=120.0, saves=0.2)
"""What compiling costs and gives, by others' figures: a minute or two, and 25 to 35 % of a transformer's time."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        adapter: The trained adapter as saved in the file; in full fine-tuning, the extracted one.
        path: The adapter file.
        run: The run's folder, with its checkpoints.
        step: Step whose weights the files hold: the last, unless the run stopped early.
        started_from: Step from which this call resumed; equal to `step` if the run was finished.
        checkpoint: The checkpoint file of full fine-tuning; None otherwise.
        embeddings: Word whose vectors were learned → its embedding file.
    """

    adapter: Adapter
    path: Path
    run: Path
    step: int
    started_from: int
    checkpoint: Path | None
    embeddings: Mapping[str, Path] = field(default_factory=dict)


def train(
    base: BaseWeights,
    subject: Sequence[Picture],
    priors: Sequence[Picture],
    settings: TrainSettings,
    paths: RunPaths,
    device: str = "auto",
    listener: Listener | None = None,
    *,
    starting_point: StartingPoint | None = None,
    words: Sequence[PromptWords] = (),
) -> TrainResult:
    """Train an adapter on a subject, resume an interrupted run, or return the result of a finished one.

    Args:
        base: The opened base model. Its tensors are borrowed and never written to.
        subject: The subject's pictures.
        priors: Class pictures for prior preservation; empty for none.
        settings: What and how to learn.
        paths: Where the run writes.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        listener: Gets every event; may stop the run after any step.
        starting_point: What the run builds on in addition to the base.
        words: Rare word and class noun of each subject, for `token_vectors`; empty: the settings' `token`.

    Raises:
        BusyError: Another process is training this run.
        CancelledError: The listener stopped the run; a checkpoint was written.
        DivergedError: The loss became NaN or infinite; the last good checkpoint is kept.
        OutOfMemoryError: The device ran out of memory; names what to lower.
        SettingsError: The settings don't fit the model or the device.
        StorageError: The folders can't be written or have no room.
    """
    torch_device = pick_device(device)
    processes = ProcessGroup.current(cpu=torch_device.type == "cpu")
    budget = MemoryBudget(settings, torch_device, processes)
    listener = listener or SilentListener()

    def make_recipe() -> DreamBooth:
        return DreamBooth(
            base=base,
            subject=subject,
            priors=priors,
            settings=settings,
            paths=paths,
            device=torch_device,
            listener=listener,
            starting_point=starting_point,
            budget=budget,
            words=words,
        )

    with accelerate_state_kept():
        return budget.attempt(make_recipe, listener)  # make_recipe().run(), and once more with less if memory runs out


@dataclass
class Session:
    """Everything that a run builds and that takes memory; dropped as a whole when the run ends.

    Attributes:
        model: The denoiser, and the text encoders that are trained; no autoencoder.
        objective: Noise schedule, target and loss.
        cache: Encoded pictures and captions.
        trainable: The parameters that are trained.
        optimizer: Wrapped by accelerate.
        learning_rate_factor: Step → factor of the peak learning rates.
        averaging: The evaluation weights, where they are an average of those that are updated.
        accelerator: accelerate's, for precision, gradient accumulation and clipping.
        text: Conditioning on the captions and on the previews' prompts.
        teacher: Gives the samples whose targets are the base model's predictions.
        dtype: Type of the frozen weights and of the denoiser's input.
        fused_backward: Updates the weights in the backward pass, if the settings say so.
        compiled: The denoiser's blocks, if they are compiled.
        ended: Parts whose training has ended.
        beginning: What is trained as it was before the first step, until the base's previews are generated.
    """

    model: DiffusionModel
    objective: Objective
    cache: LatentCache
    trainable: Trainable
    optimizer: Any
    learning_rate_factor: Callable[[int], float]
    averaging: WeightAveraging
    accelerator: Any
    text: TextConditioning
    teacher: BaseTeacher
    dtype: torch.dtype
    fused_backward: FusedBackward | None = None
    compiled: CompiledBlocks | None = None
    ended: set[str] = field(default_factory=set)
    beginning: Beginning | None = None

    @property
    def state(self) -> TrainingState:
        """What a checkpoint saves of it."""
        return TrainingState(self.trainable, self.optimizer, self.averaging, self.accelerator.scaler)


class DreamBooth:
    """One run of the recipe.

    Features: prior preservation; an adapter of any kind in float32 on a borrowed base in fp32, bf16, fp16 or NF4, or
    the weights themselves; trained text encoders; posterior sampling from cached latents; gradient accumulation,
    clipping and checkpointing; averaged weights; several processes; previews, scores and early stop; exact resume, and
    cancel within one step.

    Attributes:
        requested: The settings as the user gave them, for the fingerprint and the files.
        settings: The settings in effect, which may take less memory for the same result.
        step: Optimiser steps completed.
        session: What `prepare` built.
    """

    def __init__(
        self,
        base: BaseWeights,
        subject: Sequence[Picture],
        priors: Sequence[Picture],
        settings: TrainSettings,
        paths: RunPaths,
        device: torch.device,
        listener: Listener | None = None,
        starting_point: StartingPoint | None = None,
        budget: MemoryBudget | None = None,
        words: Sequence[PromptWords] = (),
    ) -> None:
        """Take the inputs, with the fingerprint of what the result depends on; nothing is built yet.

        Args:
            base: See `train`.
            subject: See `train`.
            priors: See `train`.
            settings: See `train`.
            paths: See `train`.
            device: Where to train.
            listener: See `train`.
            starting_point: See `train`.
            budget: How the run is computed so that it fits, and its processes; None: one process, as requested.
            words: See `train`.

        Raises:
            SettingsError: The device can't train at that precision.
            PicturesError: More pictures would be held out than there are.
        """
        self.base = base
        self.subject = list(subject)
        self.priors = list(priors) if settings.trains_class_pictures else []
        prior = chosen_prior(settings, self.subject, has_class_pictures=bool(priors))
        self._prior_was_open = prior != settings.prior
        settings = settings.model_copy(update={"prior": prior})
        self.requested = settings
        self.settings = settings
        self.paths = paths
        self.device = device
        self.listener: Listener = listener or SilentListener()
        self.starting_point = starting_point or StartingPoint()
        self._given_words = list(words)
        self.words = list(words) or [PromptWords(settings.token)]
        self.budget = budget or MemoryBudget(settings, device)
        self.processes = self.budget.processes
        self.precision = pick_precision(settings.precision, device)
        require_fused_backward(settings, device, self.processes.count)
        self.training_pictures, self.held_out = split_validation(
            self.subject, settings.validation_pictures, settings.seed
        )
        self.fingerprint = self._fingerprint()
        self.step = 0
        self.measurements = Measurements()
        self._session: Session | None = None
        self._throughput = Throughput(settings.steps, 0, device)
        # step, learning rate and loss that are not reported yet
        self._pending: tuple[int, float, NumberOnItsWay] | None = None
        self._mid_update = False  # whether weights, optimiser and step don't belong together at the moment

    def _fingerprint(self, settings: TrainSettings | None = None, *, as_given: bool = False) -> str:
        return run_fingerprint(
            self.base,
            self.subject,
            self.priors,
            settings or self.requested,
            precision=self.precision,
            start=self.starting_point.start,
            processes=self.processes.count,
            words=self.words,
            as_given=as_given,
        )

    @property
    def session(self) -> Session:
        """What `prepare` built."""
        assert self._session is not None
        return self._session

    def run(self) -> TrainResult:
        """Find or make the run's folder; build, encode, inject; check or resume; train; export."""
        with self._locked_run() as newest_step:
            finished_at = self.previews.finished_at(self.run_folder.measurements())
            self.processes.wait_for_everyone()  # before the main process writes into the folder that all looked at
            if finished_at is not None:
                self.listener.report(Note(f"This run is already finished: {self.run_folder.path}"))
                result = self.write_files(finished_at, started_from=finished_at)
                if self.processes.is_main_process:
                    record_done(self.run_folder.metrics_path, finished_at)
                return result
            with self._logged(after=newest_step), self._explained_memory_errors():
                self.prepare()
                if newest_step:
                    self.resume(newest_step)
                else:
                    self.check_prediction_type()
                step_to_export = self.train_loop()
                self.budget.report_peak(self.listener)
                self.clean_up()  # writing the files takes memory, too
                return self.write_files(step_to_export, started_from=newest_step)

    @contextlib.contextmanager
    def _locked_run(self) -> Iterator[int]:
        """`open_run`; no other process may take the run until the block ends."""
        try:
            yield self.open_run()
        finally:
            if self.budget.folder is not None:
                self.budget.folder.lock.release()

    def open_run(self) -> int:
        """Check the folders; find this run's folder by its fingerprint, or make one. Returns its newest step, or 0."""
        settings = self.settings
        require_quantizable(settings.base_quantization, self.device)
        require_preservable(settings, self.subject, self.priors)
        require_trainable(
            self.base,
            settings,
            self.paths,
            self.starting_point,
            self.device,
            words=self.words,
            captions=[caption for picture in self.subject for caption in picture.captions],
        )
        if self.budget.folder is None:
            record = {"base": self.base.title} | settings.model_dump(mode="json")
            self.budget.folder = self.processes.broadcast_from_main(
                lambda: RunFolder.open(
                    self.paths.runs,
                    name=settings.name,
                    fingerprint=self.fingerprint,
                    settings=record,
                    new=settings.resume == "never",
                    earlier={self._fingerprint(as_given=True), *self._unpreserved()},
                )
            )
        elif self.processes.is_main_process:
            self.budget.folder.reserve()
        self.run_folder = self.budget.folder
        if self.run_folder.record.get("fingerprint") in self._unpreserved():
            self._go_on_without_preservation()
            settings = self.settings
        self.fingerprint = self.run_folder.record.get("fingerprint", self.fingerprint)
        newest_step = self.run_folder.newest(settings.steps)
        self.listener.report(RunOpened(self.run_folder.path, newest_step, settings.steps))
        if self._prior_was_open and settings.prior == "none" and not newest_step:
            self.listener.report(Note(unpreserved_note(settings)))
        self.measurements = self.run_folder.measurements(newest_step)
        self.previews = Previews(
            self.base,
            self.subject,
            settings,
            self.run_folder,
            self.device,
            starts_as_base=self.starting_point.start is None,
        )
        return newest_step

    def _unpreserved(self) -> set[str]:
        """The fingerprints of the same run without preservation, as earlier versions began it if it was left open."""
        if not self._prior_was_open or self.settings.prior != "model":
            return set()
        without = self.requested.model_copy(update={"prior": "none"})
        return {self._fingerprint(without), self._fingerprint(without, as_given=True)}

    def _go_on_without_preservation(self) -> None:
        self.requested = self.requested.model_copy(update={"prior": "none"})
        self.settings = self.requested
        new = f"To start a new run that preserves it, set {suggest('prior', 'model')}."
        note = f"This run was started without class preservation and continues without it. {new}"
        self.listener.report(Note(note))

    @contextlib.contextmanager
    def _logged(self, after: int) -> Iterator[None]:
        """Write down what happens inside the block, in the main process: the metrics file, and a tracker if chosen."""
        if not self.processes.is_main_process:
            yield
            return
        listener = self.listener
        with logging_listener(listener, self.run_folder, self.requested, self.base.title, after) as self.listener:
            yield

    def _explained_memory_errors(self) -> contextlib.AbstractContextManager[None]:
        """Running out of memory inside the block becomes an error that names what to lower."""
        settings = self.settings
        ways = [suggest("resolution")]
        if settings.batch_size > 1:
            ways.append(suggest("batch_size"))
        if settings.base_quantization == "none" and settings.adapter != "full":
            ways.append(f"set {suggest('base_quantization', 'nf4')}")
        remedy = f"{' or '.join(ways)}, which starts a new run"
        if not settings.checkpointing_interval:
            remedy += f"; or set {suggest('gradient_checkpointing', True)}, which resumes this run"
        return explained_memory_errors(remedy)

    def prepare(self) -> None:
        """Build the session: the model around the borrowed weights, the encoded data, and what is trained."""
        self.settings = self.budget.effective_settings(
            self.settings,
            self.base,
            self.starting_point.start,
            priors=bool(self.priors),
            precision=self.precision,
            listener=self.listener,
        )
        settings = self.settings
        reset_peak_memory(self.device)
        model = self.base.family.build(self.base)
        training_objective = model.objective.with_settings(settings).to(self.device)
        # for sampling: the same schedule, without the weights of the loss
        model.objective = training_objective.plain()
        words = None
        if settings.token_vectors:
            words = TrainedWords(model, settings, self.words, self.starting_point.start)
        with self.processes.main_process_first():
            cache = self._encode(model)

        dtype = DTYPES[self.precision]
        trainable = make_trainable(model, settings, self.device, dtype, self.starting_point.start, words)
        if settings.checkpointing_interval:
            for network in networks(model).values():
                enable_gradient_checkpointing(network, settings.checkpointing_interval)
        if settings.swap_blocks and self.device.type != "cuda":
            self.listener.report(Note(f"{suggest('swap_blocks')} needs CUDA and has no effect on {self.device.type}."))
        optimizer = make_optimizer(trainable.groups(), settings, trainable.starting_at_zero())
        averaging = WeightAveraging(trainable.parameters(), optimizer, settings)
        fused_backward = FusedBackward(optimizer) if settings.fused_backward_pass else None
        factor = learning_rate_factor(optimizer, settings)
        accelerator = make_accelerator(self.device, self.precision, settings.gradient_accumulation)
        # autocast, but no DistributedDataParallel: train_step averages the gradients itself
        model.denoiser = accelerator.prepare_model(model.denoiser, device_placement=False, evaluation_mode=True)
        text = TextConditioning(
            model,
            encoded=self.previews.joined(cache.text),
            trained=list(model.text_encoders),
            device=self.device,
            dtype=dtype,
            autocast=accelerator.autocast,
            base=cache.base_text,
        )
        self._session = Session(
            model=model,
            objective=training_objective,
            cache=cache,
            trainable=trainable,
            optimizer=accelerator.prepare(optimizer),
            learning_rate_factor=factor,
            averaging=averaging,
            accelerator=accelerator,
            text=text,
            teacher=BaseTeacher(
                cache, settings, training_objective, self.base_prediction, self.device, self.processes.share
            ),
            dtype=dtype,
            fused_backward=fused_backward,
        )
        if self._shows_base_later():
            self._session.beginning = Beginning(model, trainable.parameters(), text, self.previews.rows)

    def _shows_base_later(self) -> bool:
        """Whether this process will generate the base's previews once steps have run."""
        step = self.previews.base_step
        is_to_come = step and 0 not in self.measurements.scores and self.run_folder.newest(self.settings.steps) <= step
        return bool(is_to_come) and self.processes.is_main_process

    def _encode(self, model: DiffusionModel) -> LatentCache:
        """Encode pictures and captions, or read what this run encoded before; drop the networks that are done."""
        in_steps = self.settings.text_encoders_in_steps(model.text_encoders)
        if self.processes.is_main_process:  # before the encoders leave
            self.previews.encode(model, in_steps, self.listener)
        cache = LatentCache.load(self.run_folder.cache_path)
        if cache is None:
            pictures = {"instance": self.training_pictures, "prior": self.priors, "validation": self.held_out}
            cache = build_cache(model, pictures, self.settings, self.device, self.listener)
            cache.save(self.run_folder.cache_path)
        drop_frozen_text_encoders(model, in_steps)
        del model.vae
        release(self.device)
        return cache

    def check_prediction_type(self) -> None:
        """Test, before the first step, that the base model predicts what it will be trained for."""
        session = self.session
        require_prediction_type(
            session.model,
            latents=session.cache.instance,
            text=session.text,
            prediction=self.base.prediction,
            dtype=session.dtype,
            listener=self.listener,
        )

    def resume(self, step: int) -> None:
        """Load the checkpoint of that step."""
        self.session.state.restore(self.run_folder.load(step))
        self.step = step
        self.listener.report(Note(f"Resuming from step {self.step}: {self.run_folder.path}"))
        if self.previews.differ_from(self.measurements):
            note = (
                "The previews so far were generated or scored with different settings, so early stop only compares new "
                "ones."
            )
            self.listener.report(Note(note))

    def train_loop(self) -> int:
        """Train to the last step, or until the subject gets no better. Returns the step to export."""
        settings = self.settings
        session = self.session
        self._throughput = Throughput(settings.steps, self.step, self.device)
        for network in networks(session.model).values():
            network.train()

        with self._saved_on_exit():
            stop_at = self.evaluate()  # of the step at which the run was interrupted
            while self.step < settings.steps and stop_at is None:
                if session.text.trained:
                    self.freeze_text()
                self._compile_if_due()
                factor = session.learning_rate_factor(self.step)
                loss = self._compiled_step(factor) if session.compiled else self.train_step(factor)
                self._report_pending()  # one step late, so that one process alone never waits for its device
                self._pending = (self.step, settings.learning_rate * factor, NumberOnItsWay(loss))

                stop = self.processes.any_process(self.listener.should_stop(), self.device)
                # early stop may export the step of any preview, so each has a checkpoint
                if stop or self._checkpoint_due() or self.previews.wanted(self.step):
                    self._report_pending()
                    if stop:
                        raise CancelledError(self.step, settings.steps)
                    self.save_checkpoint()
                    self.processes.wait_for_everyone()  # until the main process has written it
                    stop_at = self.evaluate()
                elif self.previews.base_due(self.step, self.measurements):
                    self._report_pending()
                    self._preview_base_if_due()

        if stop_at is None:
            return self.step
        note = f"Stopped early: subject fidelity peaked at step {stop_at}, and the class has drifted since then."
        self.listener.report(Note(note))
        return stop_at

    def _compile_if_due(self) -> None:
        """Have the denoiser's blocks compiled from this step on, if the settings say so."""
        session = self.session
        choice = self.settings.compile
        if session.compiled or choice == "off" or (choice == "auto" and not self._throughput.pays_for(_COMPILING)):
            return
        self.settings = self.settings.model_copy(update={"compile": "off"})  # it is decided
        if not can_compile(self.device):
            missing = "Triton" if self.device.type == "cuda" else "a compiler for this device"
            self.listener.report(Note(f"Compilation is skipped: {missing} is missing."))
            return
        self.listener.report(Note("Compiling the base model's blocks; the next steps take longer."))
        session.compiled = CompiledBlocks(session.model.denoiser)

    def _compiled_step(self, learning_rate_factor: float) -> Tensor:
        """`train_step`, and once more without compiled blocks if they fail; compiling is no part of the rate."""
        session = self.session
        assert session.compiled is not None
        graphs = session.compiled.graphs
        try:
            loss = self.train_step(learning_rate_factor)
        except Exception as error:  # of the backward pass, which is compiled when it first runs
            if self._mid_update:
                raise
            session.compiled.give_up(error)
            session.optimizer.zero_grad(set_to_none=True)
            session.accelerator.step = 0
            loss = self.train_step(learning_rate_factor)
        if session.compiled.graphs != graphs:
            self._throughput.pause()
        if session.compiled.trouble:
            self.listener.report(Note(f"Compilation failed; training continues without it. {session.compiled.trouble}"))
            session.compiled.close()
            session.compiled = None
        return loss

    def train_step(self, learning_rate_factor: float) -> Tensor:
        """One optimiser step over all its micro-batches. Returns the mean loss, 0-D, on the device.

        Args:
            learning_rate_factor: Of every component's peak learning rate.
        """
        settings = self.settings
        session = self.session
        accelerator = session.accelerator
        set_learning_rates(session.optimizer, learning_rate_factor)
        step_loss = torch.zeros((), device=self.device)

        for micro_step in range(settings.gradient_accumulation):
            with accelerator.accumulate(session.model.denoiser):
                losses = self.losses(micro_step)
                for number, part_of_loss in enumerate(losses, 1):
                    loss = part_of_loss()
                    is_last = accelerator.sync_gradients and number == len(losses)
                    with self._updates_in_backward() if is_last else contextlib.nullcontext():
                        accelerator.backward(loss)  # divides by gradient_accumulation
                    step_loss = step_loss + loss.detach() / settings.gradient_accumulation
                if accelerator.sync_gradients:  # after the last micro-batch
                    parameters = session.trainable.parameters()
                    step_loss = self.processes.average_gradients(parameters, step_loss)
                    if settings.max_grad_norm:
                        accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
                    self._mid_update = True
                    session.optimizer.step()
                    session.optimizer.zero_grad(set_to_none=True)
                    session.trainable.after_update({UNET, *session.text.trained} - session.ended)
                    session.averaging.update()

        self.step += 1
        self._mid_update = False
        return step_loss

    @contextlib.contextmanager
    def _updates_in_backward(self) -> Iterator[None]:
        """Around the last backward pass of a step: weights are updated in it, if the settings say so."""
        fused_backward = self.session.fused_backward
        if fused_backward is None:
            yield
            return
        self._mid_update = True
        with fused_backward.last_pass():
            yield

    def losses(self, micro_step: int) -> list[Callable[[], Tensor]]:
        """Functions for the terms of a micro-batch's loss, 0-D each: one per batch, and the weight penalty.

        Computed one after the other, each before its own backward pass, they take the memory of one.
        """
        session = self.session
        batches = [partial(self.batch_loss, batch, micro_step) for batch in self.batches(micro_step)]
        taught = session.teacher.batches(self.step, micro_step)
        preserved = [partial(self.preservation_loss, batch, micro_step) for batch in taught]
        penalties = [self.penalty_loss] if self.settings.weight_penalty else []
        return [*batches, *preserved, *penalties]

    def penalty_loss(self) -> Tensor:
        """The part of a micro-batch's loss that keeps the weights near those of the base, 0-D."""
        session = self.session
        trained = [part for part in (UNET, *session.text.trained) if part not in session.ended]
        return self.settings.weight_penalty * session.trainable.squared_change(trained)

    def batches(self, micro_step: int) -> Iterator[Batch]:
        """The samples of a micro-batch of this step, one batch per shape of latents."""
        session = self.session
        return draw_batches(
            session.cache,
            self.settings,
            step=self.step,
            micro_batch=micro_step,
            objective=session.objective,
            device=self.device,
            share=self.processes.share,
        )

    def batch_loss(self, batch: Batch, micro_step: int) -> Tensor:
        """The part of a micro-batch's loss that comes from one of its batches, 0-D.

        `batch.weights` hold 1 / batch_size for the subject's samples and λ / batch_size for those of the class, so that
        the parts add up to instance + λ · prior.
        """
        session = self.session
        objective = session.objective
        noisy = objective.add_noise(batch.latents, batch.added_noise, batch.timesteps).to(session.dtype)
        target = objective.target(batch.latents, batch.noise, batch.timesteps)
        compared = slice(batch.subject if self.settings.dco_beta else 0)
        base_prediction = None
        if compared.stop:
            base_prediction = self.base_prediction(
                noisy[compared], batch.timesteps[compared], batch.captions[compared], batch.sizes[compared]
            )
        with self._reproducible_dropout(micro_step):
            conditioning = session.text.rows(batch.captions) | {"size": batch.sizes}
            prediction = session.model.predict(noisy, batch.timesteps, conditioning)
            losses = objective.loss_against(target, prediction, batch.timesteps, batch.masks)
        if base_prediction is not None:
            masks = None if batch.masks is None else batch.masks[compared]
            base_losses = objective.loss_against(target[compared], base_prediction, batch.timesteps[compared], masks)
            consistent = consistency_loss(losses[compared], base_losses, self.settings.dco_beta)
            losses = torch.cat([consistent, losses[compared.stop :]])
        return (losses * batch.weights).sum()

    def preservation_loss(self, batch: TaughtBatch, micro_step: int) -> Tensor:
        """The part of a micro-batch's loss with the base model as teacher, 0-D."""
        session = self.session
        with self._reproducible_dropout(micro_step):
            conditioning = session.text.rows(batch.captions) | {"size": batch.sizes}
            prediction = session.model.predict(batch.noisy.to(session.dtype), batch.timesteps, conditioning)
        return batch.weight * session.objective.loss_against(batch.target, prediction, batch.timesteps).sum()

    def base_prediction(self, noisy: Tensor, timesteps: Tensor, captions: Tensor, sizes: Tensor) -> Tensor:
        """What the base model predicts; see `preservation.Prediction`."""
        session = self.session
        conditioning = session.text.base_rows(captions) | {"size": sizes}
        with session.trainable.untrained():
            return session.model.predict(noisy.to(session.dtype), timesteps, conditioning).float()

    def _reproducible_dropout(self, micro_step: int) -> contextlib.AbstractContextManager[None]:
        """Let dropout depend on seed, step, micro-step and process alone, so that resuming stays exact."""
        if not self.settings.dropout:
            return contextlib.nullcontext()
        process, _ = self.processes.share
        key: list[str | int] = ["dropout", self.step, micro_step]
        if process:
            key.append(process)
        return seeded(self.device, self.settings.seed, *key)

    def freeze_text(self) -> None:
        """Freeze text encoders and rare words whose training has ended.

        A text encoder in which nothing is trained any more encodes the captions one last time and is removed.
        """
        session = self.session
        settings = self.settings
        groups = session.trainable.groups()
        ends = {**dict.fromkeys(settings.text_encoder_rates, settings.text_encoder_steps), WORDS: settings.token_steps}
        trained = (ends.keys() & groups.keys()) - session.ended
        ended = {part for part in trained if self.step >= ends[part]}
        if not ended:
            return
        parameters = [parameter for part in ends if part in ended for parameter in groups[part]]
        self._mid_update = True
        session.averaging.freeze(parameters)
        self._mid_update = False
        for parameter in parameters:
            parameter.requires_grad_(False)
        session.ended |= ended
        if WORDS not in trained - ended:
            session.text.freeze([name for name in session.text.trained if name not in trained - ended])
            release(self.device)
        if ended - {WORDS}:
            self.listener.report(Note(f"The text encoders are frozen after step {self.step}."))
        if WORDS in ended:
            self.listener.report(Note(f"The rare word's vectors are frozen after step {self.step}."))

    def evaluate(self) -> int | None:
        """Generate and score previews and compute the loss on held-out pictures, if they are due at this step.

        Returns:
            The best step, if the scores say that the run should stop here; else None.
        """
        session = self.session
        self._preview_base_if_due()
        previews_due = self.previews.due(self.step, self.measurements)
        validation_due = session.cache.validation is not None and self.step not in self.measurements.validated
        if previews_due or validation_due:
            with self._measuring():
                if self.processes.is_main_process:
                    with session.averaging.evaluation_weights():
                        if previews_due:
                            self._generate_previews(self.step, session.text.rows)
                        if validation_due:
                            self._validate()
        return self.previews.stopped_at(self.measurements)

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """What the main process measures inside the block is known to all processes after it, and so is a stop."""
        stopped = False
        try:
            yield
        except CancelledError:
            stopped = True
        finally:  # what is generated and reported is not generated again
            if self.processes.is_main_process:
                self.run_folder.save_measurements(self.step, self.measurements)
        outcome = (self.measurements, stopped)
        self.measurements, stopped = self.processes.broadcast_from_main(lambda: outcome)
        if stopped:  # by all processes together: one alone would leave the others waiting for it
            raise CancelledError(self.step, self.settings.steps)

    def _preview_base_if_due(self) -> None:
        """Generate the previews of step 0 after the step that they are due at, whatever was trained until then."""
        if not self.previews.base_due(self.step, self.measurements):
            return
        session = self.session
        with self._measuring():
            if self.processes.is_main_process:
                if session.beginning is None:  # nothing was trained yet
                    with session.averaging.evaluation_weights():
                        self._generate_previews(0, session.text.rows)
                else:
                    with session.beginning.restored():
                        self._generate_previews(0, session.beginning.rows)
        session.beginning = None
        self._throughput.pause()

    def _generate_previews(self, step: int, conditioning: Callable[[Tensor], Conditioning]) -> None:
        scores = self.previews.generate(step, self.session.model, conditioning, self.listener)
        self.measurements.scores[step] = scores
        if scores:
            self.measurements.scored_as[step] = self.previews.conditions

    def _validate(self) -> None:
        session = self.session
        assert session.cache.validation is not None
        loss = validation_loss(session.model, session.objective, session.text, session.cache.validation, session.dtype)
        self.listener.report(Validation(self.step, loss))
        self.measurements.validated.append(self.step)

    def _report_pending(self) -> None:
        """Report the step that was not reported yet, if there is one.

        Raises:
            DivergedError: Its loss is not a finite number.
        """
        if self._pending is None:
            return
        step, learning_rate, loss = self._pending
        self._pending = None
        value = float(loss)
        if not math.isfinite(value):
            raise DivergedError.of_loss(
                value,
                step,
                learning_rate=self.settings.learning_rate,
                precision=self.precision,
                kept_step=self.run_folder.newest(step - 1),
                run=str(self.run_folder.path),
            )
        self.listener.report(self._throughput.event(step, value, learning_rate))

    def _checkpoint_due(self) -> bool:
        every = self.settings.checkpoint_every
        return self.step == self.settings.steps or bool(every and self.step % every == 0)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the current step.

        Raises:
            DivergedError: The trained weights have NaN or infinite values.
            StorageError: It can't be written.
        """
        session = self.session
        settings = self.settings
        if not session.trainable.is_finite():
            raise DivergedError(
                f"The trained weights are no longer finite at step {self.step}; the run was stopped.",
                f"Lower {suggest('learning_rate')}, which starts a new run; the last good checkpoint is kept.",
            )
        if not self.processes.is_main_process:
            return
        self.run_folder.save(
            session.state.checkpoint(self.step, self._metadata(self.step), self.measurements),
            keep=settings.keep_checkpoints,
            best=self.previews.best(self.measurements),
            keep_adapters=settings.keep_adapters,
        )

    @contextlib.contextmanager
    def _saved_on_exit(self) -> Iterator[None]:
        """However the loop ends, what is done is kept: unless it is saved already, is half an update or diverged."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError | MemoryError):
                traceback.clear_frames(
                    error.__traceback__
                )  # which hold the activations of a step that ran out of memory
                release(self.device)
            if not isinstance(error, DivergedError):
                self._save_interrupted()
            if isinstance(error, CancelledError):
                # a process that left now would let the launcher end the main one while it saves
                self.processes.wait_for_everyone()
            raise

    def _save_interrupted(self) -> None:
        try:
            self._report_pending()
        except DivergedError:
            return
        except Exception:  # the error that ended the run is the one to raise, and the state matters more
            logger.exception("Step %d could not be reported", self.step)
        if self.session.beginning is not None:
            self.session.beginning.put_back()
        is_saved = self.step in self.run_folder.steps()
        if not self.step or is_saved or self._mid_update or not self.session.trainable.is_finite():
            return
        self.save_checkpoint()
        if self.processes.is_main_process:
            never = f", with {suggest('resume', 'auto')}" if self.settings.resume == "never" else ""
            note = f"Stopped; step {self.step} is saved and the run can be resumed{never}: {self.run_folder.path}"
            self.listener.report(Note(note))

    def write_files(self, step: int, started_from: int) -> TrainResult:
        """Write the run's result files, from the checkpoint of a step."""
        settings = self.settings
        self._measure_strength(step)
        with self.processes.main_process_first():  # the others find what it wrote
            saved = self.run_folder.trained(step)
            if saved.weights is not None:
                note = "Writing the checkpoint and extracting the LoRA; this takes a minute or two."
                self.listener.report(Note(note))
            metadata = shown_metadata(
                self.run_folder,
                step,
                self._metadata(step),
                hint=settings.gallery_files,
                thumbnail=settings.thumbnail,
            )
            files = export(
                self.base,
                saved,
                stacked=self.starting_point.stacked,
                settings=settings,
                metadata=metadata,
                paths=self.paths,
            )
            if settings.gallery_files and self.processes.is_main_process:
                self._write_gallery(files.path)
        if files.checkpoint is not None:
            self.listener.report(Note(f"Checkpoint: {files.checkpoint}"))
        self.listener.report(Note(f"Adapter: {files.path}"))
        for word, path in files.embeddings.items():
            self.listener.report(Note(f"Embedding of '{word}' (embedding:{path.stem} in ComfyUI): {path}"))
        return TrainResult(
            adapter=files.adapter,
            path=files.path,
            run=self.run_folder.path,
            step=step,
            started_from=started_from,
            checkpoint=files.checkpoint,
            embeddings=files.embeddings,
        )

    def _measure_strength(self, step: int) -> None:
        """Measure at which strength the adapter of a step is best, if there is a model that scores, once for a run."""
        settings = self.settings
        is_scored = settings.gallery_files and bool(settings.score_clip or settings.score_dino)
        has_no_room = settings.base_quantization != "none" or settings.swap_blocks > 0  # for the base as it is
        if not is_scored or settings.combine or has_no_room:
            return
        if self.processes.broadcast_from_main(lambda: preferred_strength(self.run_folder, step) is not None):
            return
        stopped = False
        if self.processes.is_main_process:
            adapter = self.run_folder.trained(step).adapter
            try:
                if adapter is not None:
                    measurement = self.previews.strength_measurement(self.precision, self.listener)
                    measurement.record(self.run_folder, step, adapter)
            except CancelledError:
                stopped = True
        if self.processes.broadcast_from_main(lambda: stopped):
            raise CancelledError(step, settings.steps)

    def _write_gallery(self, path: Path) -> None:
        """Write the gallery files; if that fails, there is a warning, and the adapter is kept."""
        try:
            write_gallery(path, self.run_folder)
        except StorageError as error:
            note = f"The gallery files could not be written next to the adapter: {error.problem}"
            self.listener.report(Note(note, warning=True))

    def _metadata(self, step: int) -> dict[str, str]:
        """Metadata of the files of that step."""
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
            start=self.starting_point.start,
            processes=self.processes.count,
            words=self._given_words,
        )
        return training_metadata(self.requested, facts, step)

    def clean_up(self) -> None:
        """Drop everything that was built and free the device's memory."""
        if self._session is not None:
            if self._session.compiled is not None:
                self._session.compiled.close()
            self._session.accelerator.free_memory()
        self._session = None
        release(self.device)
