"""What is checked before a run begins, so that a mistake is told at once and not after an hour."""

from __future__ import annotations

from pathlib import Path

import torch

from .adapters import planned_targets
from .cache import LatentSet
from .captions import Captions
from .config import TrainSettings
from .errors import WeightsError
from .events import Listener, Note
from .families.base import CHOSEN, BaseWeights, DiffusionModel, Prediction
from .files import require_writable
from .kohya import Adapter
from .randomness import generator

_ROOM = 50_000_000  # bytes that an adapter and its checkpoints take at the least
_FULL_ROOM = 16  # bytes for every trained number: weights, two moments of AdamW, and the checkpoint file
_PICTURES = 4
_PLACES = (0.3, 0.5, 0.7, 0.9)  # of the timesteps
_CLEARLY = 2.0


def require_trainable(
    base: BaseWeights, settings: TrainSettings, start: Adapter | None, output_dir: Path, runs_dir: Path
) -> None:
    """Check what can be checked at once, so that a mistake is told before class pictures are made, not after.

    Raises:
        SettingsError: A setting does not fit the model.
        AdapterError: The adapter to start from does not.
        StorageError: A folder can't be written, or its disk is full.
    """
    planned_targets(base.family.build(base), settings, start)
    trained = sum(tensor.numel() for tensor in base.unet.tensors.values()) if settings.adapter == "full" else 0
    require_writable(output_dir, _ROOM)
    require_writable(runs_dir, max(_ROOM, _FULL_ROOM * trained))


@torch.no_grad()
def require_prediction_type(
    model: DiffusionModel,
    latents: LatentSet,
    captions: Captions,
    prediction: Prediction,
    device: torch.device,
    dtype: torch.dtype,
    listener: Listener,
) -> None:
    """Ask the base model itself what it predicts: its own loss is small for the right answer alone.

    A model trained as what it is not learns noise, without an error. The loss of four samples at four timesteps is
    compared under both prediction types; only a clear contradiction counts.

    Raises:
        WeightsError: The model predicts the other type, and the user did not choose this one.
    """
    names = ("epsilon", "v_prediction")
    objectives = [model.objective.as_type(name).to(device) for name in names]
    losses = torch.zeros(2)
    for number, place in enumerate(_PLACES):
        item = torch.tensor([number % min(len(latents), _PICTURES)])
        clean = latents.mean[item, 0].to(device)
        noise = torch.randn(clean.shape, generator=generator("prediction type", number)).to(device)
        timesteps = torch.tensor([int(place * model.objective.timesteps)], device=device)
        noisy = objectives[0].add_noise(clean, noise, timesteps)
        conditioning = captions.conditioning(latents.caption[item].to(device)) | {"size": latents.size[item].to(device)}
        output = model.predict(noisy.to(dtype), timesteps, conditioning)
        losses += torch.stack([one.loss(output, clean, noise, timesteps)[0].cpu() for one in objectives])
    chosen = names.index(prediction.type)
    if not losses[chosen] > _CLEARLY * losses[1 - chosen]:
        return
    other = names[1 - chosen]
    found = (
        f"The base model would be trained as {prediction.type} (so says {prediction.source}), but it predicts {other}: "
        f"its own loss is {losses[1 - chosen] / len(_PLACES):.2f} as {other} and "
        f"{losses[chosen] / len(_PLACES):.2f} as {prediction.type}."
    )
    if prediction.source == CHOSEN:
        listener.tell(Note(found, warning=True))
        return
    raise WeightsError(
        found,
        f"Set --prediction-type {other}; in ComfyUI put a ModelSamplingDiscrete node before the training "
        f"({'eps' if other == 'epsilon' else other}).",
    )
