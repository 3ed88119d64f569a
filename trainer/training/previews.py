"""Previews of a run: pictures drawn with the weights that are being trained, scored, and when to stop by them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ..core.devices import explained_memory_errors, release, to_device
from ..core.events import Listener, Phase, Preview, stop_if_asked
from ..core.files import write_atomic
from ..core.prompts import split_prompts
from ..data.image_cache import ImageCache, as_png, generated_picture
from ..data.images import Picture
from ..data.latent_cache import encode_captions
from ..evaluation.evaluator import Evaluation, peak, stalled
from ..evaluation.feature_extractors import FeatureExtractors
from ..models.families.base import BaseWeights, Conditioning, DiffusionModel
from ..models.sampling import GenerationConfig, decode_latents, generate, generate_latents
from ..settings.train import TrainSettings
from .runs.checkpoint import RunFolder
from .runs.metrics import preview_scores


class Previews:
    """What is drawn every `preview_every` steps, before the first and after the last one."""

    def __init__(
        self,
        base: BaseWeights,
        subject: Sequence[Picture],
        settings: TrainSettings,
        run: RunFolder,
        device: torch.device,
    ) -> None:
        """Take what is drawn and where; no model is opened yet."""
        self._base, self._subject, self._settings, self._run, self._device = base, subject, settings, run, device
        self._prompts = split_prompts(settings.preview_prompts) or [subject[0].caption]
        self._texts = ["", *self._prompts]
        self._config = GenerationConfig(
            width=settings.resolution,
            height=settings.resolution,
            steps=settings.preview_steps,
            guidance=settings.preview_guidance,
        )
        self._evaluation: Evaluation | None = None
        self._encoded: Conditioning = {}
        self._first = 0  # row of the first of them among the run's captions

    def encode(self, model: DiffusionModel, trained: Collection[str], listener: Listener) -> None:
        """Encode the prompts by those text encoders that are not trained, while they are there; open the judges.

        Raises:
            WeightsError: A model that judges can't be opened.
            SettingsError: A prompt does not hold the rare word, so that its class can't be named.
        """
        settings = self._settings
        if not settings.preview_every:
            return
        if settings.score_clip or settings.score_dino:
            judges = FeatureExtractors.open(settings.score_clip, settings.score_dino, torch.device("cpu"))
            self._evaluation = Evaluation(judges, self._subject, self._prompts, settings.token, listener)
            self._texts += self._evaluation.class_prompts
        self._encoded = encode_captions(model, self._texts, self._device, trained)

    def joined(self, text: Conditioning) -> Conditioning:
        """The run's captions, and after them the prompts of the previews; a row each."""
        self._first = len(next(iter(text.values())))
        return {name: torch.cat([rows, self._encoded[name]]) for name, rows in text.items()} if self._encoded else text

    def wanted(self, step: int) -> bool:
        """Whether previews of this step are wanted; the same in all processes, whatever the first has drawn by now."""
        every = self._settings.preview_every
        return bool(every) and (step % every == 0 or step == self._settings.steps)

    def due(self, step: int) -> bool:
        """Whether previews of this step are wanted and not there yet."""
        return self.wanted(step) and step not in preview_scores(self._run.metrics_path)

    def make(
        self, step: int, model: DiffusionModel, said: Callable[[Tensor], Conditioning], listener: Listener
    ) -> None:
        """Draw, score and tell.

        Args:
            step: Steps completed.
            model: Its denoiser and text encoders as they are trained; they are left in evaluation mode.
            said: Rows of `joined` → conditioning, one row each.
            listener: Told of the progress and of the previews; may stop the work.

        Raises:
            CancelledError: The listener asked to stop.
            OutOfMemoryError: The memory does not suffice.
        """
        for network in (model.unet, *model.text_encoders.values()):
            network.eval()
        with explained_memory_errors("the resolution, or set preview_every to 0"):
            decoder = self._base.family.build(self._base)
            decoder.objective = model.objective  # the run's schedule, which may be rescaled
            to_device(decoder.vae, self._device, torch.float32)
            drawn = []
            for row in range(1, len(self._texts)):
                listener.report(Phase("preview", row - 1, len(self._texts) - 1))
                stop_if_asked(listener, step, self._settings.steps)
                drawn.append(self._draw(step, row, model, decoder, said, listener))
            pictures = [one for row in drawn[: len(self._prompts)] for one in row]
            plain = [one for row in drawn[len(self._prompts) :] for one in row]
            before = self._before(step, plain, decoder, next(model.unet.parameters()).dtype, listener)
            del decoder
        release(self._device)
        listener.report(Phase("preview", len(drawn), len(drawn)))
        scores = self._evaluation.mark(pictures, before, plain) if self._evaluation else {}
        folder = self._run.preview_path(step)
        listener.report(Preview(step, [(folder / one.name, one.caption) for one in pictures], scores))

    def _draw(
        self,
        step: int,
        row: int,
        model: DiffusionModel,
        decoder: DiffusionModel,
        said: Callable[[Tensor], Conditioning],
        listener: Listener,
    ) -> list[Picture]:
        """The pictures of one prompt, one at a time to save memory; written beside the checkpoints."""
        settings, found = self._settings, []
        kind = "subject" if row <= len(self._prompts) else "class"
        number = (row - 1) % len(self._prompts)
        for index in range(settings.preview_count):
            with torch.no_grad():
                latents = generate_latents(
                    model,
                    decoder.vae,
                    said(torch.tensor([self._first + row], device=self._device)),
                    said(torch.tensor([self._first], device=self._device)),
                    [settings.preview_seed + index],
                    self._config,
                    listener,
                )
                [image] = decode_latents(decoder.vae, latents)
            name = f"{kind}-{number:02d}-{index:02d}.png"
            write_atomic(self._run.preview_path(step) / name, as_png(image))
            found.append(generated_picture(name, self._texts[row], image))
        return found

    def _before(
        self, step: int, plain: Sequence[Picture], base: DiffusionModel, dtype: torch.dtype, listener: Listener
    ) -> list[Picture]:
        """The class pictures of the base itself: those of step 0; drawn now if previews were others then, or none."""
        settings, found = self._settings, []
        how = settings.model_dump(include={"resolution", "preview_steps", "preview_guidance", "preview_seed"})
        for number, one in enumerate(plain):
            index = number % settings.preview_count
            gallery, name = (
                ImageCache(self._run.path / "previews" / "base", how | {"prompt": one.caption}),
                f"{index}.png",
            )
            if step == 0:
                gallery.put(name, one.open())
            elif not gallery.has(name):
                to_device(base.unet, self._device, dtype)
                for encoder in base.text_encoders.values():
                    to_device(encoder, self._device, torch.float32)
                [image] = generate(
                    base,
                    one.caption,
                    [settings.preview_seed + index],
                    self._config,
                    listener,
                )
                gallery.put(name, image)
            found.append(gallery.picture(name, one.caption))
        return found

    def finished_at(self) -> int | None:
        """Step whose weights the run gives, if no step and no preview is left to be made; else None."""
        best, steps = self.stopped_at(), self._settings.steps
        return steps if best is None and steps in self._run.steps() and not self.due(steps) else best

    def stopped_at(self) -> int | None:
        """Step of the best preview if, by the scores so far, the run should stop; else None."""
        patience = self._settings.early_stop
        best = stalled(self._scores(), patience) if patience else None
        return best if best is None or self._run.has(best) else None

    def best(self) -> int:
        """Step of the preview that shows the subject best so far; 0 if the run can't stop early."""
        return peak(self._scores()) if self._settings.early_stop else 0

    def _scores(self) -> dict[int, dict[str, float]]:
        scores = preview_scores(self._run.metrics_path)
        return {step: found for step, found in scores.items() if found and step <= self._settings.steps}
