"""The forward passes of a run: the loss of a step's samples, and that of pictures which are held out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..core.devices import to_device
from ..core.seeding import generator, seeded
from ..data.batches import SINGLE_PROCESS, Batch, draw_batches
from ..data.latent_cache import LatentCache, LatentDataset, encode_tokens_in_batches
from ..models.families.base import Conditioning, DiffusionModel
from ..models.objective import Objective
from ..settings.train import TrainSettings

_PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the timesteps at which held-out pictures are looked at


class LossComputer:
    """What a model says of samples, and how far that is from what it should."""

    def __init__(
        self,
        model: DiffusionModel,
        objective: Objective,
        cache: LatentCache,
        captions: TextConditioning,
        settings: TrainSettings,
        dtype: torch.dtype,
        share: tuple[int, int] = SINGLE_PROCESS,
    ) -> None:
        """Take the parts.

        Args:
            model: Its denoiser is on the device of the objective.
            objective: Noise schedule, target and loss.
            cache: Encoded pictures.
            captions: What the denoiser is told of each caption.
            settings: Of the run.
            dtype: Type of the denoiser's input.
            share: Which of how many processes this is.
        """
        self._model, self._objective, self._cache, self._captions = model, objective, cache, captions
        self._settings, self._dtype, self._share = settings, dtype, share
        self._device = objective.alphas_cumprod.device

    def losses(self, step: int, micro: int) -> Iterator[Tensor]:
        """The loss of a micro-batch in parts, 0-D, one for each shape of its pictures: instance + λ · prior in all.

        Args:
            step: Optimiser step, from 0.
            micro: Micro-batch of the step, from 0.
        """
        settings = self._settings
        timesteps = self._objective.timesteps
        for batch in draw_batches(self._cache, settings, step, micro, timesteps, self._device, self._share):
            with self._reproducible(step, micro):
                losses = self._losses(batch)
            yield (losses * batch.weights).sum()

    def _losses(self, batch: Batch) -> Tensor:
        """The loss of each sample, (batch,)."""
        noisy = self._objective.add_noise(batch.latents, batch.added, batch.timesteps).to(self._dtype)
        conditioning = self._captions.conditioning(batch.captions) | {"size": batch.sizes}
        prediction = self._model.predict(noisy, batch.timesteps, conditioning)
        return self._objective.loss(prediction, batch.latents, batch.noise, batch.timesteps, batch.masks)

    def _reproducible(self, step: int, micro: int) -> contextlib.AbstractContextManager[None]:
        """Let dropout depend on seed and step alone, if there is any."""
        if not self._settings.dropout:
            return contextlib.nullcontext()
        return seeded(self._device, self._settings.seed, "dropout", step, micro, *filter(None, self._share[:1]))

    @torch.no_grad()
    def validation_loss(self, held_out: LatentDataset) -> float:
        """Mean squared error on held-out pictures, always at the same timesteps with the same noise.

        The networks are left in evaluation mode.
        """
        for network in (self._model.unet, *self._model.text_encoders.values()):
            network.eval()
        plain = self._objective.as_type(self._objective.prediction_type)  # whatever the run's loss is
        found = [
            float(self._held_out(plain, held_out, picture, number, to_device))
            for picture in range(len(held_out))
            for number, to_device in enumerate(_PLACES)
        ]
        return sum(found) / len(found)

    def _held_out(self, plain: Objective, latents: LatentDataset, picture: int, number: int, to_device: float) -> Tensor:
        clean = latents.mean[picture][:1].to(self._device)
        noise = torch.randn(clean.shape, generator=generator("validation", picture, number)).to(self._device)
        timesteps = torch.tensor([int(to_device * plain.timesteps)], device=self._device)
        noisy = plain.add_noise(clean, noise, timesteps).to(self._dtype)
        told = self._captions.conditioning(latents.captions[picture][:1].to(self._device))
        size = {"size": latents.size[picture][None].to(self._device)}
        return plain.loss(self._model.predict(noisy, timesteps, told | size), clean, noise, timesteps)


class TextConditioning:
    """The distinct captions of a run, by row."""

    def __init__(
        self,
        model: DiffusionModel,
        encoded: Conditioning,
        trained: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        autocast: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Bring the encodings to the device.

        Args:
            model: Its trained text encoders are on `device`.
            encoded: The cache's text: tokens, and the encodings of the text encoders that are not trained.
            trained: Component names of those that are.
            device: Where training runs.
            dtype: Type of the encodings.
            autocast: Precision in which the trained encoders compute.
        """
        self._model, self._dtype, self._autocast = model, dtype, autocast
        self._trained = list(trained)
        self._rows = {
            name: rows.to(device, dtype if rows.is_floating_point() else rows.dtype) for name, rows in encoded.items()
        }

    @property
    def trained(self) -> list[str]:
        """The text encoders that are still trained."""
        return list(self._trained)

    def conditioning(self, rows: Tensor) -> Conditioning:
        """The captions of these rows, (batch,) int64, one row each; gradients reach the trained encoders."""
        found = {name: encoded[rows] for name, encoded in self._rows.items()}
        with self._autocast():
            for encoder in self._trained:
                found |= self._model.encode_tokens(encoder, found[_ids(encoder)])
        return found

    def freeze(self) -> None:
        """Encode all captions one last time; the text encoders leave."""
        for encoder in self._trained:
            self._model.text_encoders[encoder].eval()
            with self._autocast():
                encoded = encode_tokens_in_batches(self._model, encoder, self._rows[_ids(encoder)])
            self._rows |= {name: rows.to(self._dtype) for name, rows in encoded.items()}
        self._trained = []
        for network in self._model.text_encoders.values():
            to_device(network, torch.device("cpu"), next(network.parameters()).dtype)  # until it is saved
        self._model.text_encoders.clear()


def _ids(encoder: str) -> str:
    return f"ids{encoder.removeprefix('text_encoder')}"
