"""Class preservation: what the setting `prior` means in a run, and the base model's predictions as targets.

The base model is the teacher along its own sampling trajectories, from noise to pictures of the class. A trajectory
needs the base's predictions, which are the targets anyway, so it costs nothing extra; and it preserves what the base
generates, not what it predicts for the subject's pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core.devices import sent
from ..core.errors import suggest
from ..core.seeding import Draw
from ..data.batches import SINGLE_PROCESS, draw_slots
from ..data.images import Picture
from ..data.latent_cache import LatentCache
from ..models.objective import Objective
from ..settings.objective import ObjectiveSettings
from ..settings.train import TrainSettings

TRAJECTORY_LENGTH = 8
"""Steps of sampling from noise to a picture."""
_WEIGHT = 2.0
"""How much more a sample counts than a class picture does for the same λ: class and others drift less, and the subject
is learned as well (docs/learning.md)."""


def chosen_prior(settings: TrainSettings, pictures: Sequence[Picture], *, has_class_pictures: bool) -> str:
    """The value of the setting `prior` in a run; "auto" is the first option that the pictures allow.

    Class pictures are used if they were given. Without any, the base model is the teacher if each picture's caption is
    known without the rare word; but not where all weights are trained, since it would take additional memory.

    Args:
        settings: Of the run.
        pictures: The subject's.
        has_class_pictures: Whether there are class pictures.
    """
    if settings.prior != "auto":
        return settings.prior
    if has_class_pictures:
        return "class-pictures"
    is_known = all(picture.class_captions for picture in pictures)
    return "model" if is_known and settings.adapter != "full" else "none"


def unpreserved_note(settings: TrainSettings) -> str:
    """Why nothing preserves the class in a run where `prior` is "auto", and what would."""
    ways = [suggest("class_images"), suggest("prior_count", 100)]
    if settings.adapter == "full":
        reason = "there are no class pictures"
        ways.append(suggest("prior", "model"))
    else:
        reason = "there are no class pictures, and not every caption contains the rare word"
        ways += [suggest("token"), suggest("class_prompt", "a photo of a dog")]
    meant = f"or set {suggest('prior', 'none')} if this is intended."
    return f"Nothing preserves the class: {reason}. Set {', '.join(ways[:-1])} or {ways[-1]}, {meant}"


class Prediction(Protocol):
    """What the base model predicts."""

    def __call__(self, noisy: Tensor, timesteps: Tensor, captions: Tensor, sizes: Tensor) -> Tensor:
        """The prediction, as `noisy`, float32, without gradients.

        Args:
            noisy: (batch, channels, height, width), float32.
            timesteps: (batch,).
            captions: Row of each sample's prompt, (batch,), int64, on the CPU.
            sizes: Size and crop of each sample's picture, (batch, 6), float32.
        """


@dataclass(frozen=True)
class TaughtBatch:
    """Samples of one shape whose target is the base model's prediction, on the device; see `Prediction`.

    Attributes:
        noisy: Noisy latents.
        timesteps: Of each sample.
        captions: Rows of the prompts.
        sizes: Size and crop.
        target: As `noisy`: what the base predicts.
        weight: Of each sample's loss in the micro-batch's loss.
    """

    noisy: Tensor
    timesteps: Tensor
    captions: Tensor
    sizes: Tensor
    target: Tensor
    weight: float


class _Trajectories:
    """Some ways of the base model from noise to pictures of one shape, all at the same step.

    Attributes:
        position: Steps taken.
    """

    def __init__(
        self, noise: Tensor, timesteps: Sequence[Tensor], captions: Tensor, sizes: Tensor, objective: Objective
    ) -> None:
        """Begin at noise.

        Args:
            noise: (batch, channels, height, width).
            timesteps: Of each step, (batch,).
            captions: See `Prediction`.
            sizes: See `Prediction`.
            objective: Of the model.
        """
        self.position = 0
        self._noisy = noise
        self._timesteps = timesteps
        self._captions = captions
        self._sizes = sizes
        self._objective = objective
        self._prediction: Tensor | None = None

    def taught(self, predict: Prediction, weight: float) -> TaughtBatch:
        """The samples here."""
        timesteps = self._timesteps[self.position]
        if self._prediction is None:
            self._prediction = predict(self._noisy, timesteps, self._captions, self._sizes)
        return TaughtBatch(self._noisy, timesteps, self._captions, self._sizes, self._prediction, weight)

    def advance(self, predict: Prediction) -> None:
        """Go one step."""
        here = self.taught(predict, 0.0)
        following = self._timesteps[self.position + 1]
        self._noisy = self._objective.advance(here.noisy, here.target, here.timesteps, following)
        self._prediction = None
        self.position += 1


class BaseTeacher:
    """The samples whose targets are the base model's predictions.

    Each slot of a micro-batch follows a sampling trajectory from its own noise to a picture, with a prompt of the
    class; after its last step, another one begins. A trajectory is a function of seed and step: a run that is resumed
    in the middle of one repeats it from its beginning, and predicts what the uninterrupted run would have. The
    trajectories of a step's micro-batches start at different steps.
    """

    def __init__(
        self,
        cache: LatentCache,
        settings: TrainSettings,
        objective: Objective,
        predict: Prediction,
        device: torch.device,
        share: tuple[int, int] = SINGLE_PROCESS,
    ) -> None:
        """Take what the samples depend on.

        Args:
            cache: Prompts to preserve, and shapes and sizes of the subject's pictures.
            settings: Seed, batch size, how often and with which weight; the range of timesteps in which the subject is
                learned does not matter, since all of them are preserved.
            objective: Of the model.
            predict: By the base model.
            device: Where the samples go.
            share: Index of this process and number of processes.
        """
        self._cache = cache
        self._settings = settings
        self._objective = objective
        self._predict = predict
        self._device = device
        self._share = share
        self._begun: dict[int, tuple[int, list[_Trajectories]]] = {}  # micro-batch → number of its ways, these by shape

    def batches(self, step: int, micro_batch: int) -> list[TaughtBatch]:
        """The samples of a micro-batch, one batch per shape; none in most steps.

        They have separate batches, so a step takes no more memory than without them.

        Args:
            step: Optimiser step, from 0.
            micro_batch: Of the step, from 0.
        """
        settings = self._settings
        turn, rest = divmod(step, settings.prior_every)
        if rest or not self._cache.preserved:
            return []
        offset = micro_batch * TRAJECTORY_LENGTH // settings.gradient_accumulation
        number, position = divmod(turn + offset, TRAJECTORY_LENGTH)
        begun, trajectories = self._begun.get(micro_batch, (None, []))
        if begun != number or trajectories[0].position > position:
            trajectories = self._begin(number, micro_batch)
            self._begun[micro_batch] = number, trajectories
        for of_shape in trajectories:
            while of_shape.position < position:
                of_shape.advance(self._predict)
        weight = _WEIGHT * settings.prior_weight * settings.prior_every / settings.batch_size
        return [of_shape.taught(self._predict, weight) for of_shape in trajectories]

    def _begin(self, number: int, micro_batch: int) -> list[_Trajectories]:
        cache = self._cache
        drawn = draw_slots(
            "preserved", cache.instance, self._settings, number, micro_batch, self._objective, self._share
        )
        by_shape: dict[tuple[int, ...], list[Draw]] = {}
        for draw in drawn:
            by_shape.setdefault(tuple(draw.noise.shape), []).append(draw)
        device = self._device
        trajectories = []
        for shape, draws in by_shape.items():
            pictures = [cache.instance.order[draw.item] for draw in draws]
            prompts = [self._prompt(picture, draw) for picture, draw in zip(pictures, draws, strict=True)]
            timesteps = [
                sent(torch.tensor([self._timestep(position, draw, shape) for draw in draws]), device)
                for position in range(TRAJECTORY_LENGTH)
            ]
            trajectories.append(
                _Trajectories(
                    sent(torch.stack([draw.noise for draw in draws]), device),
                    timesteps,
                    torch.tensor(prompts),
                    sent(torch.stack([cache.instance.size[picture] for picture in pictures]), device),
                    self._objective,
                )
            )
        return trajectories

    def _prompt(self, picture: int, draw: Draw) -> int:
        """The row of a prompt that is preserved beside a picture."""
        if self._cache.empty is not None and draw.drop < self._settings.prior_empty:
            return self._cache.empty
        prompts = self._cache.preserved[picture]
        return int(prompts[int(draw.caption * len(prompts))])

    def _timestep(self, position: int, draw: Draw, shape: Sequence[int]) -> float:
        """Evenly spaced from noise to none, moved by less than a step."""
        quantile = (TRAJECTORY_LENGTH - 1 - position + draw.timestep_fraction) / TRAJECTORY_LENGTH
        return self._objective.timestep_at(quantile, ObjectiveSettings(), shape)
