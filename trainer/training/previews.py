"""Previews of a run: pictures generated with the weights that are being trained, their scores, and early stopping."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ..core.devices import explained_memory_errors, release, to_device
from ..core.errors import suggest
from ..core.events import Listener, Phase, Preview, stop_if_asked
from ..core.files import write_atomic
from ..core.prompts import split_prompts
from ..data.image_cache import ImageCache, as_png, generated_picture
from ..data.images import Picture
from ..data.latent_cache import encode_captions
from ..evaluation.evaluator import Evaluator, best_step, early_stop_step
from ..evaluation.feature_extractors import FeatureExtractors
from ..evaluation.generator import SampleConfig
from ..models.families.base import BaseWeights, Conditioning, DiffusionModel, joined_rows
from ..models.hub import source_title
from ..models.sampling import GenerationConfig, decode_latents, generate, generate_latents
from ..settings.train import TrainSettings
from .runs.checkpoint import Measurements
from .runs.folder import RunFolder
from .runs.layout import preview_name
from .strength import StrengthMeasurement
from .trainable import evaluating

_FIRST_STEPS = 3  # that are seen to run before the base's previews take their time
_MEMORY_REMEDY = f"{suggest('resolution')}, which starts a new run, or set {suggest('preview_every', 0)}"


class Previews:
    """What is generated every `preview_every` steps and after the last one, and with the weights before the first."""

    def __init__(
        self,
        base: BaseWeights,
        subject: Sequence[Picture],
        settings: TrainSettings,
        run: RunFolder,
        device: torch.device,
        *,
        starts_as_base: bool = True,
    ) -> None:
        """Take what is generated and where it goes; no model is opened yet.

        Args:
            base: The base model.
            subject: The subject's pictures.
            settings: Of the run.
            run: Its folder, where the pictures go.
            device: Where they are generated.
            starts_as_base: Whether before the first step the model is the base itself, and goes on from no adapter.
        """
        self._base = base
        self._starts_as_base = starts_as_base
        self._subject = subject
        self._settings = settings
        self._run = run
        self._device = device
        self._prompts = split_prompts(settings.preview_prompts) or [subject[0].caption]
        self._class_prompts: list[str] = []
        self._config = GenerationConfig(
            width=settings.resolution,
            height=settings.resolution,
            steps=settings.preview_steps,
            guidance=settings.preview_guidance,
        )
        self._evaluation: Evaluator | None = None
        self._encoded: Conditioning = {}
        self._first_row = 0  # of the previews' prompts among the run's captions; it is the empty prompt

    def encode(self, model: DiffusionModel, in_steps: Collection[str], listener: Listener) -> None:
        """Encode the prompts with the text encoders that don't run in every step; open the scoring models.

        Raises:
            WeightsError: A scoring model can't be opened.
            SettingsError: A prompt does not contain the rare word, so it can't be turned into one for the class.
        """
        settings = self._settings
        if not settings.preview_every:
            return
        if self._is_scored:
            self._class_prompts = list(self._evaluator(listener).class_prompts)
        texts = ["", *self._prompts, *self._class_prompts]
        self._encoded = encode_captions(model, texts, self._device, in_steps)

    @property
    def _is_scored(self) -> bool:
        return bool(self._settings.score_clip or self._settings.score_dino)

    def _evaluator(self, listener: Listener) -> Evaluator:
        """What scores, opened once."""
        settings = self._settings
        if self._evaluation is None:
            extractors = FeatureExtractors.open(settings.score_clip, settings.score_dino, torch.device("cpu"))
            self._evaluation = Evaluator(extractors, self._subject, self._prompts, settings.token, listener)
        return self._evaluation

    def strength_measurement(self, precision: str, listener: Listener) -> StrengthMeasurement:
        """How the finished adapter is measured at several strengths: by what scores the previews, and as many pictures.

        Args:
            precision: Of the base model.
            listener: Gets the progress; may stop the work.
        """
        settings = self._settings
        config = SampleConfig(
            width=settings.resolution,
            height=settings.resolution,
            steps=settings.preview_steps,
            guidance=settings.preview_guidance,
            count=settings.preview_count,
            seed=settings.preview_seed,
            batch_size=1,
        )
        return StrengthMeasurement(
            base=self._base,
            evaluator=lambda: self._evaluator(listener),
            config=config,
            device=self._device,
            precision=precision,
            listener=listener,
        )

    def joined(self, text: Conditioning) -> Conditioning:
        """The run's captions, followed by the previews' prompts; one row each."""
        self._first_row = len(next(iter(text.values())))
        if not self._encoded:
            return text
        return joined_rows([text, {name: self._encoded[name] for name in text}])

    @property
    def rows(self) -> list[int]:
        """Of the previews' prompts, and of the empty one, among the rows of `joined`."""
        return list(range(self._first_row, self._first_row + 1 + len(self._prompts) + len(self._class_prompts)))

    @property
    def conditions(self) -> str:
        """Digest of what the scores depend on besides the weights and the subject: only equal ones can be compared."""
        settings = self._settings
        generated = {"resolution", "preview_count", "preview_steps", "preview_guidance", "preview_seed", "token"}
        models = [source_title(name) if name else "" for name in (settings.score_clip, settings.score_dino)]
        values = settings.model_dump(include=generated) | {"prompts": self._prompts, "models": models}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def base_step(self) -> int | None:
        """After which step the previews of step 0 are generated, if they are; the same in all processes."""
        settings = self._settings
        when = settings.base_preview
        if not settings.preview_every or (when == "off" and not self._is_scored):
            return None
        if when == "before-first-step" or settings.adapter == "full":  # of all weights there is no second copy
            return 0
        return min(_FIRST_STEPS, settings.preview_every, settings.steps)

    def wanted(self, step: int) -> bool:
        """Whether the settings ask for previews of this step, which was trained; the same in all processes."""
        every = self._settings.preview_every
        return bool(every) and step > 0 and (step % every == 0 or step == self._settings.steps)

    def due(self, step: int, measurements: Measurements) -> bool:
        """Whether previews of this step are wanted and were not generated before."""
        return self.wanted(step) and step not in measurements.scores

    def base_due(self, step: int, measurements: Measurements) -> bool:
        """Whether after this step the previews of step 0 are to be generated, and were not before."""
        return step == self.base_step and 0 not in measurements.scores

    def generate(
        self, step: int, model: DiffusionModel, conditioning: Callable[[Tensor], Conditioning], listener: Listener
    ) -> dict[str, float]:
        """Generate the previews of a step, score and report them.

        Args:
            step: Steps completed.
            model: Its denoiser and text encoders as they are trained.
            conditioning: Rows of `joined` → conditioning, one row each.
            listener: Gets the progress and the previews; may stop the work.

        Returns:
            Metric → value; empty without scoring models.

        Raises:
            CancelledError: The listener asked to stop.
            OutOfMemoryError: The device ran out of memory.
        """
        total = len(self._prompts) + len(self._class_prompts)
        pictures: list[Picture] = []
        class_pictures: list[Picture] = []
        with explained_memory_errors(_MEMORY_REMEDY), evaluating(model):
            base = self._base.family.build(self._base)
            base.objective = model.objective  # the run's schedule, which may be rescaled
            to_device(base.vae, self._device, torch.float32)
            for number in range(total):
                listener.report(Phase("preview", number, total))
                stop_if_asked(listener, step, self._settings.steps)
                of_subject = number < len(self._prompts)
                generated = self._generate_prompt(step, number, model, base, conditioning, listener)
                (pictures if of_subject else class_pictures).extend(generated)
            dtype = next(model.denoiser.parameters()).dtype
            base_class_pictures = self._class_pictures_of_base(step, class_pictures, base, dtype, listener)
            del base
        release(self._device)
        listener.report(Phase("preview", total, total))
        scores: dict[str, float] = {}
        if self._evaluation:
            scores = self._evaluation.compute_metrics(pictures, base_class_pictures, class_pictures)
        folder = self._run.preview_path(step)
        listener.report(Preview(step, [(folder / picture.name, picture.caption) for picture in pictures], scores))
        return scores

    def _generate_prompt(
        self,
        step: int,
        number: int,
        model: DiffusionModel,
        base: DiffusionModel,
        conditioning: Callable[[Tensor], Conditioning],
        listener: Listener,
    ) -> list[Picture]:
        """The pictures of one prompt, one at a time to save memory; written beside the checkpoints.

        Args:
            step: Steps completed.
            number: Of the prompt, from 0: first those of the subject, then those of its class.
            model: What is trained.
            base: Its autoencoder decodes.
            conditioning: Rows of `joined` → conditioning.
            listener: May stop the work.
        """
        of_subject = number < len(self._prompts)
        kind = "subject" if of_subject else "class"
        number_of_kind = number if of_subject else number - len(self._prompts)
        prompt = [*self._prompts, *self._class_prompts][number]
        prompt_row = torch.tensor([self._first_row + 1 + number])
        empty_row = torch.tensor([self._first_row])
        pictures = []
        for index in range(self._settings.preview_count):
            with torch.no_grad():
                latents = generate_latents(
                    model,
                    base.vae,
                    prompt=conditioning(prompt_row),
                    negative=conditioning(empty_row),
                    seeds=[self._settings.preview_seed + index],
                    config=self._config,
                    listener=listener,
                )
                [image] = decode_latents(base, latents)
            name = preview_name(kind, number_of_kind, index)
            write_atomic(self._run.preview_path(step) / name, as_png(image))
            pictures.append(generated_picture(name, prompt, image))
        return pictures

    def _class_pictures_of_base(
        self,
        step: int,
        class_pictures: Sequence[Picture],
        base: DiffusionModel,
        dtype: torch.dtype,
        listener: Listener,
    ) -> list[Picture]:
        """The base's own class pictures from the same noise: those of step 0, or generated now if these were others."""
        settings = self._settings
        key = settings.model_dump(include={"resolution", "preview_steps", "preview_guidance", "preview_seed"})
        if not self._starts_as_base:
            key["without_adapter"] = True  # up to version 0.4 it was with the one that the run goes on from
        pictures = []
        for number, picture in enumerate(class_pictures):
            index = number % settings.preview_count
            name = f"{index}.png"
            cache = ImageCache(self._run.base_preview_path, key | {"prompt": picture.caption})
            if step == 0 and self._starts_as_base:
                cache.save(name, picture.open())
            elif not cache.has(name):
                to_device(base.denoiser, self._device, dtype)
                for encoder in base.text_encoders.values():
                    to_device(encoder, self._device, base.text_dtype)
                [image] = generate(
                    base,
                    prompt=picture.caption,
                    seeds=[settings.preview_seed + index],
                    config=self._config,
                    listener=listener,
                )
                cache.save(name, image)
            pictures.append(cache.load(name, picture.caption))
        return pictures

    def finished_at(self, measurements: Measurements) -> int | None:
        """Step whose weights are the result, if no steps and no previews are left; else None."""
        steps = self._settings.steps
        stopped_at = self.stopped_at(measurements)
        if stopped_at is None and steps in self._run.steps() and not self.due(steps, measurements):
            return steps
        return stopped_at

    def stopped_at(self, measurements: Measurements) -> int | None:
        """Step of the best preview if, by the scores so far, the run should stop; else None."""
        patience = self._settings.early_stop
        if not patience:
            return None
        best = early_stop_step(self._scores(measurements), patience)
        return best if best is not None and self._run.has(best) else None

    def differ_from(self, measurements: Measurements) -> bool:
        """Whether early stop can't compare new scores with those so far."""
        former = set(measurements.scored_as.values())
        return bool(self._settings.early_stop and former) and self.conditions not in former

    def best(self, measurements: Measurements) -> int:
        """Step of the preview with the best subject fidelity so far; 0 if the run can't stop early."""
        return best_step(self._scores(measurements)) if self._settings.early_stop else 0

    def _scores(self, measurements: Measurements) -> dict[int, dict[str, float]]:
        """The scored previews up to the run's length, which may be shorter than what was trained before."""
        return measurements.comparable_scores(self._settings.steps)
