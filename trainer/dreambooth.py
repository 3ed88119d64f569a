"""The recipe: DreamBooth with LoRA (Ruiz et al. 2023; Hu et al. 2022), from pictures to an adapter file.

Read `DreamBooth.run` first, then its methods in order: open_run, prepare, resume, loop, export.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .adapters import TrainedLora, require_rank_fits
from .cache import Cache, LatentSet, build_cache
from .checkpoint import Checkpoint, RunFolder
from .config import TrainSettings
from .devices import DTYPES, explained_memory_errors, pick_device, pick_precision, place, release, reset_peak_memory
from .errors import AdapterError, CancelledError, DivergedError
from .events import Listener, Note, SilentListener
from .families.base import BaseWeights, DiffusionModel
from .files import free_path, require_writable
from .kohya import Adapter, read_adapter, write_adapter
from .metadata import FINGERPRINT_KEY, RunFacts, training_metadata
from .optimization import accelerate_state_kept, learning_rate_factor, make_accelerator, make_optimizer
from .pace import Pace
from .pictures import Picture
from .randomness import Draw, draw

_ROOM = 50_000_000  # bytes that an adapter and its checkpoints take at the least
_LOWER = "resolution or batch_size, turn gradient_checkpointing on, or choose bf16 or fp16; the run then resumes"


@dataclass(frozen=True)
class TrainResult:
    """What a run gives.

    Attributes:
        adapter: The trained adapter as it stands in the file.
        path: The adapter file.
        run: The run's folder, with its checkpoints.
        started_from: Step from which this call went on; equal to the number of steps if the run was finished.
    """

    adapter: Adapter
    path: Path
    run: Path
    started_from: int


def train(
    base: BaseWeights,
    subject: Sequence[Picture],
    priors: Sequence[Picture],
    settings: TrainSettings,
    output_dir: Path,
    runs_dir: Path,
    device: str = "auto",
    listener: Listener | None = None,
) -> TrainResult:
    """Train a LoRA on a subject, or go on with a run that was interrupted, or return one that is finished.

    Args:
        base: The opened base model. Its tensors are borrowed and never written to.
        subject: The subject's pictures.
        priors: Class pictures for prior preservation; empty for none.
        settings: What and how to learn.
        output_dir: Folder of the adapter file.
        runs_dir: Folder of all runs' state.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        listener: Told what happens; may stop the run after any step.

    Raises:
        CancelledError: The listener stopped the run; a checkpoint was written.
        DivergedError: The loss became NaN or infinite; the last good checkpoint is kept.
        OutOfMemoryError: The memory does not suffice; says what to lower.
        SettingsError: The settings don't fit the model or the device.
        StorageError: The folders can't be written or have no room.
    """
    recipe = DreamBooth(base, subject, priors, settings, output_dir, runs_dir, pick_device(device), listener)
    with accelerate_state_kept():
        try:
            with explained_memory_errors(_LOWER):
                return recipe.run()
        finally:
            recipe.clean_up()


def require_trainable(base: BaseWeights, settings: TrainSettings, output_dir: Path, runs_dir: Path) -> None:
    """Check what can be checked at once, so that a mistake is told before class pictures are made, not after.

    Raises:
        SettingsError: The rank does not fit the model.
        StorageError: A folder can't be written, or its disk is full.
    """
    require_rank_fits(base, settings)
    require_writable(output_dir, _ROOM)
    require_writable(runs_dir, _ROOM)


def run_fingerprint(
    base: BaseWeights, subject: Sequence[Picture], priors: Sequence[Picture], settings: TrainSettings, precision: str
) -> str:
    """Digest of everything on which the trained weights depend."""
    what = {
        "recipe": 1,
        "base": base.fingerprint,
        "subject": [[picture.digest, picture.caption] for picture in subject],
        "priors": [[picture.digest, picture.caption] for picture in priors],
        "settings": settings.result_settings() | {"precision": precision},
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


class DreamBooth:
    """One run of the recipe.

    Features: prior preservation, LoRA in float32 on a borrowed base in fp32/bf16/fp16, posterior sampling from
    cached latents, gradient accumulation, clipping and checkpointing, exact resume, cancel within one step.
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
    ) -> None:
        """Take the inputs; nothing is built yet."""
        self.base, self.subject, self.priors, self.settings = base, list(subject), list(priors), settings
        self.output_dir, self.runs_dir, self.device = output_dir, runs_dir, device
        self.listener: Listener = listener or SilentListener()
        self.precision = pick_precision(settings.precision, device)
        self.fingerprint = run_fingerprint(base, subject, priors, settings, self.precision)
        self.step = 0
        self.model: DiffusionModel
        self._consistent = True

    def run(self) -> TrainResult:
        """Open the run's folder; build, cache, adapt; resume; loop; export."""
        self.open_run()
        if self.settings.steps in self.run_folder.steps():
            self.listener.tell(Note(f"This run is finished already: {self.run_folder.path}"))
            return self._export(self.run_folder.load(self.settings.steps).adapter, self.settings.steps)
        self.prepare()
        started_from = self._resume()
        self._loop()
        return self._export(self.lora.adapter(), started_from)

    def clean_up(self) -> None:
        """Drop every network and give the device's memory back."""
        if hasattr(self, "accelerator"):
            self.accelerator.free_memory()
        for name in ("model", "lora", "optimizer", "accelerator", "cache"):
            if hasattr(self, name):
                delattr(self, name)
        release(self.device)

    def open_run(self) -> None:
        """Check the folders; find this run's folder by its fingerprint, or begin one."""
        settings = self.settings
        require_trainable(self.base, settings, self.output_dir, self.runs_dir)
        shown = settings.model_dump(mode="json") | {"base": self.base.title}
        self.run_folder = RunFolder.open(
            self.runs_dir, settings.name, self.fingerprint, shown, anew=settings.resume == "never"
        )

    def prepare(self) -> None:
        """Build the model around the borrowed weights, encode once, put the adapter in."""
        reset_peak_memory(self.device)
        self.model = self.base.family.build(self.base)
        self.objective = self.model.objective.to(self.device)
        self.cache = self._encode().to(self.device, DTYPES[self.precision])
        self._adapt()

    def _encode(self) -> Cache:
        """Encode pictures and captions, or read what this run encoded before; autoencoder and text encoders go."""
        cache = Cache.load(self.run_folder.cache_path)
        if cache is None:
            sets = {"instance": self.subject, "prior": self.priors}
            cache = build_cache(
                self.model, sets, self.settings.resolution, self.settings.flip, self.device, self.listener
            )
            cache.save(self.run_folder.cache_path)
        self.model.text_encoders.clear()
        del self.model.vae
        release(self.device)
        return cache

    def _adapt(self) -> None:
        """Bring the UNet to device and precision, inject the adapter, set up optimiser and accelerator."""
        settings = self.settings
        place(self.model.unet, self.device, DTYPES[self.precision])
        self.lora = TrainedLora(self.model, settings)
        if settings.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        optimizer = make_optimizer(self.lora.parameters(), settings)
        self.learning_rate_factor = learning_rate_factor(optimizer, settings)
        self.accelerator = make_accelerator(self.device, self.precision, settings.gradient_accumulation)
        self.model.unet, self.optimizer = self.accelerator.prepare(self.model.unet, optimizer)
        self.model.unet.train()

    def _resume(self) -> int:
        """Load the newest checkpoint of this run, if any; its step."""
        done = [step for step in self.run_folder.steps() if step <= self.settings.steps]
        if not done:
            return 0
        checkpoint = self.run_folder.load(done[-1])
        self.lora.load(checkpoint.adapter)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if self.accelerator.scaler is not None and checkpoint.extra.get("scaler"):
            self.accelerator.scaler.load_state_dict(checkpoint.extra["scaler"])
        self.step = checkpoint.step
        self.listener.tell(Note(f"Going on after step {self.step}: {self.run_folder.path}"))
        return self.step

    def _loop(self) -> None:
        """Train to the last step; leave a checkpoint however the loop ends."""
        settings, pace = self.settings, Pace(self.settings.steps, self.step, self.device)
        previous: tuple[int, float, Tensor] | None = None
        try:
            while self.step < settings.steps:
                rate = settings.learning_rate * self.learning_rate_factor(self.step)
                loss = self.train_step(rate)
                self.step += 1
                self._consistent = True
                if previous is not None:  # one step late, so that the device is never waited for
                    self._report(pace, *previous)
                previous = (self.step, rate, loss)
                due = settings.checkpoint_every and self.step % settings.checkpoint_every == 0
                if self.listener.should_stop():
                    raise CancelledError(self.step, settings.steps)
                if due or self.step == settings.steps:
                    self._report(pace, *previous)
                    previous = None
                    self._save()
        except DivergedError:
            raise
        except BaseException:
            self._save_interrupted()
            raise

    def train_step(self, rate: float) -> Tensor:
        """One optimiser step: gradient_accumulation passes, clip, update. Returns the mean loss, on the device."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = []
        for micro in range(settings.gradient_accumulation):
            with self.accelerator.accumulate(self.model.unet):
                loss = self._loss(micro)
                self.accelerator.backward(loss)
                losses.append(loss.detach())
                if self.accelerator.sync_gradients:
                    if settings.max_grad_norm:
                        self.accelerator.clip_grad_norm_(self.lora.parameters(), settings.max_grad_norm)
                    self._consistent = False  # until the step is counted
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()

    def _loss(self, micro: int) -> Tensor:
        """Instance loss + prior_weight · prior loss of one micro-batch, from one forward pass."""
        count = self.settings.batch_size
        sets = [("instance", self.cache.instance, 1.0)]
        if self.cache.prior is not None:
            sets.append(("class", self.cache.prior, self.settings.prior_weight))
        batches = [_batch(latents, self._draws(kind, latents, micro), self.device) for kind, latents, _ in sets]
        latents, noise, timesteps, rows = (torch.cat(parts) for parts in zip(*batches, strict=True))
        noisy = self.objective.add_noise(latents, noise, timesteps)
        conditioning = {name: encoded[rows] for name, encoded in self.cache.text.items()}
        prediction = self.model.predict(noisy.to(DTYPES[self.precision]), timesteps, conditioning)
        losses = self.objective.loss(prediction, latents, noise, timesteps)
        weighted = [weight * part.mean() for part, (_, _, weight) in zip(losses.view(-1, count), sets, strict=True)]
        return torch.stack(weighted).sum()

    def _draws(self, kind: str, latents: LatentSet, micro: int) -> list[Draw]:
        settings = self.settings
        slots = settings.batch_size * settings.gradient_accumulation
        first = micro * settings.batch_size
        flip = settings.flip and kind == "instance"
        return [
            draw(
                settings.seed,
                kind,
                self.step,
                slot,
                slots,
                len(latents),
                latents.latent_shape,
                self.objective.timesteps,
                flip,
            )
            for slot in range(first, first + settings.batch_size)
        ]

    def _report(self, pace: Pace, step: int, rate: float, loss: Tensor) -> None:
        """Tell the listener of a step, and stop the run if its loss is not a finite number."""
        value = float(loss)
        if not torch.isfinite(loss) and step == 1:
            raise DivergedError(
                f"The base model itself gives a loss of {value} before anything was learned.",
                "Choose another precision (fp32 or bf16), another VAE or another checkpoint.",
            )
        if not torch.isfinite(loss):
            kept = self.run_folder.steps()
            safer = " or choose precision bf16 or fp32" if self.precision == "fp16" else ""
            rest = (
                f"The adapter of step {kept[-1]} is kept in {self.run_folder.path}."
                if kept
                else "Nothing was saved yet."
            )
            raise DivergedError(
                f"The loss became {value} at step {step}; the run was stopped.",
                f"Lower learning_rate (it was {self.settings.learning_rate:g}){safer}. {rest}",
            )
        self.listener.tell(pace.event(step, value, rate))

    def _save(self) -> None:
        """Write a checkpoint of the current step."""
        if not self.lora.is_finite():
            raise DivergedError(
                f"The adapter's weights are no longer finite at step {self.step}; the run was stopped.",
                "Lower learning_rate; the last good checkpoint is kept and the run resumes from it.",
            )
        scaler = self.accelerator.scaler
        extra = {"scaler": scaler.state_dict() if scaler is not None else None}
        adapter = self.lora.adapter(self._metadata(self.step))
        state = Checkpoint(self.step, adapter, self.optimizer.state_dict(), extra)
        self.run_folder.save(state, self.settings.keep_checkpoints)

    def _save_interrupted(self) -> None:
        """Keep what is done when the loop ends early, unless it is saved already or mid-update."""
        done = self.run_folder.steps()
        if self.step and self.step not in done and self._consistent and self.lora.is_finite():
            self._save()
            self.listener.tell(
                Note(f"Stopped; step {self.step} is saved and the run can go on: {self.run_folder.path}")
            )

    def _metadata(self, step: int) -> dict[str, str]:
        facts = RunFacts(
            family=self.base.family,
            base_title=self.base.title,
            base_fingerprint=self.base.fingerprint,
            run_fingerprint=self.fingerprint,
            captions=[picture.caption for picture in self.subject],
            class_prompt=self.priors[0].caption if self.priors else "",
            class_pictures=len(self.priors),
            precision=self.precision,
            started_at=self.run_folder.started_at,
            prediction_type=self.base.prediction_type,
        )
        return training_metadata(self.settings, facts, step)

    def _export(self, adapter: Adapter, started_from: int) -> TrainResult:
        """Write the adapter file, never over another adapter; a file of this very run is used again."""
        metadata = self._metadata(self.settings.steps)
        dtype = DTYPES[self.settings.save_precision]
        path = _output_path(self.output_dir / f"{self.settings.name}.safetensors", metadata, dtype)
        if not path.exists():
            write_adapter(path, replace(adapter, metadata=metadata), dtype)
        self.listener.tell(Note(f"Adapter: {path}"))
        return TrainResult(read_adapter(path), path, self.run_folder.path, started_from)


def _output_path(wanted: Path, metadata: dict[str, str], dtype: torch.dtype) -> Path:
    """The file of this run, length and precision if it exists, else the first free name."""
    same = (FINGERPRINT_KEY, "ss_steps")
    for path in [wanted, *sorted(wanted.parent.glob(f"{glob.escape(wanted.stem)}-*{wanted.suffix}"))]:
        if not path.is_file():
            continue
        try:
            found = read_adapter(path)
        except AdapterError:
            continue
        precise = all(layer.down.dtype == dtype for layer in found.layers.values())
        if precise and all(found.metadata.get(key) == metadata[key] for key in same):
            return path
    return free_path(wanted)


def _batch(latents: LatentSet, draws: Sequence[Draw], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise (both (batch, channels, height, width)), timesteps and caption rows (both (batch,))."""
    items = torch.tensor([d.item for d in draws])
    noise = torch.stack([d.noise for d in draws])
    timesteps = torch.tensor([d.timestep for d in draws])
    parts = (latents.sample(draws), noise, timesteps, latents.caption[items])
    latent, noise, timesteps, rows = (part.to(device) for part in parts)
    return latent, noise, timesteps, rows
