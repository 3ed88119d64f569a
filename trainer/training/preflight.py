"""What is checked before anything is made, or before the first step, so that a mistake is told early."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..adapters.kohya import Adapter
from ..core.errors import DivergedError, SettingsError, WeightsError
from ..core.events import Listener, Note
from ..core.files import require_writable
from ..core.seeding import generator
from ..data.latent_cache import LatentDataset
from ..models.families.base import CHOSEN, BaseWeights, DiffusionModel, Prediction
from ..models.families.clip import HEAD
from ..settings.train import TrainSettings
from .adapter import planned_targets
from .export import require_combinable
from .loss import TextConditioning
from .optimizers import require_optimizer
from .runs.checkpoint import RunFolder
from .runs.trackers import require_tracker

_ROOM = 50_000_000  # bytes that an adapter and its checkpoints take at the least
_WRITTEN = 4  # bytes of a trained number in a checkpoint file, at the most
_PLACES = ((0.9, "epsilon"), (0.9, "epsilon"), (0.3, "v_prediction"), (0.5, "v_prediction"))  # of the timesteps
_SURELY_NOISE, _NOT_NOISE, _VELOCITY = 0.8, 0.5, 0.4  # cosines


def require_trainable(
    base: BaseWeights,
    settings: TrainSettings,
    start: Adapter | None,
    output_dir: Path,
    runs_dir: Path,
    stacked: Sequence[tuple[Adapter, float]] = (),
    checkpoints_dir: Path | None = None,
    device: torch.device | None = None,
) -> None:
    """Check what can be checked at once, so that a mistake is told before class pictures are made, not after.

    Raises:
        SettingsError: A setting does not fit the model, or the optimiser can't be used.
        AdapterError: The adapter to start from does not.
        StorageError: A folder can't be written, or its disk is full.
    """
    if settings.zero_terminal_snr and base.prediction.type != "v_prediction":
        raise SettingsError(
            "zero_terminal_snr is for models that predict the velocity: from pure noise, its noise says nothing. This "
            f"one predicts {base.prediction.type}.",
            "Turn zero_terminal_snr off.",
        )
    require_tracker(settings.log_with)
    require_optimizer(settings, device)
    if settings.combine:
        for adapter in [*(one for one, _ in stacked), *([start] if start else [])]:
            require_combinable(adapter)
    planned_targets(base.family.build(base), settings, start)
    require_writable(output_dir, _ROOM)
    if settings.adapter != "full":
        require_writable(runs_dir, _ROOM)
        return
    _require_usual_heads(base)
    parts = [base.unet, *base.text_encoders]
    numbers = sum(tensor.numel() for part in parts for tensor in part.tensors.values())
    made = settings.steps // settings.checkpoint_every + 1 if settings.checkpoint_every else 1
    state = _WRITTEN * (2 if settings.averages else 1) + settings.optimizer_class.bytes_per_number
    require_writable(runs_dir, int(state * numbers) * min(made, settings.keep_checkpoints + 1))
    require_writable(checkpoints_dir or output_dir, _WRITTEN * numbers)


def _require_usual_heads(base: BaseWeights) -> None:
    """Refuse numbers of attention heads that a single checkpoint file can't tell, so that it would compute otherwise.

    Raises:
        SettingsError: The UNet or a text encoder has another number than every model of the family.
    """
    usual = base.family.complete(base.unet.config)["attention_head_dim"]
    wrong = base.unet.config.get("attention_head_dim") != usual or any(
        part.config["num_attention_heads"] != max(1, part.config["hidden_size"] // HEAD) for part in base.text_encoders
    )
    if wrong:
        raise SettingsError(
            f"The base model has another number of attention heads than {base.family.title}; a checkpoint file "
            "can't tell it, so the tuned model would compute otherwise.",
            "Train an adapter (lora) instead of adapter 'full'.",
        )


@torch.no_grad()
def require_prediction_type(
    model: DiffusionModel,
    latents: LatentDataset,
    captions: TextConditioning,
    prediction: Prediction,
    device: torch.device,
    dtype: torch.dtype,
    listener: Listener,
) -> None:
    """Ask the base model itself what it predicts.

    A model trained as what it is not learns noise, without an error. So its output for noisy pictures of the subject
    is compared with the noise, late in the schedule, and with the velocity, early. At 0.9 of the timesteps the output
    of an epsilon model has a cosine of 0.99 with the noise, that of a velocity model below 0.4; at 0.3 to 0.5 the
    output of a velocity model has one of 0.65 or more with the velocity, that of random weights below 0.2. Between
    lies doubt, which lets the run begin.

    Raises:
        WeightsError: The model predicts the other type, and the user did not choose this one.
    """
    for network in (model.unet, *model.text_encoders.values()):
        network.eval()  # no dropout
    velocity = model.objective.as_type("v_prediction").to(device)
    likeness: dict[str, list[float]] = {"epsilon": [], "v_prediction": []}
    for number, (place, kind) in enumerate(_PLACES):
        picture = number % len(latents)
        clean = latents.mean[picture][:1].to(device)
        noise = torch.randn(clean.shape, generator=generator("prediction type", number)).to(device)
        timesteps = torch.tensor([int(place * velocity.timesteps)], device=device)
        noisy = velocity.add_noise(clean, noise, timesteps)
        told = captions.conditioning(latents.captions[picture][:1].to(device))
        conditioning = told | {"size": latents.size[picture][None].to(device)}
        output = model.predict(noisy.to(dtype), timesteps, conditioning).float()
        wanted = velocity.target(velocity.alphas_cumprod, clean, noise, timesteps) if kind == "v_prediction" else noise
        likeness[kind].append(float(torch.cosine_similarity(output.flatten(), wanted.flatten(), dim=0)))
    noise_like, velocity_like = (sum(found) / len(found) for found in likeness.values())
    if prediction.type == "v_prediction":
        other, wrong = "epsilon", noise_like > _SURELY_NOISE
    else:
        other, wrong = "v_prediction", noise_like < _NOT_NOISE and velocity_like > _VELOCITY
    if not wrong:
        return
    found = (
        f"The base model would be trained as {prediction.type} (so says {prediction.source}), but it predicts {other}: "
        f"its output is like the noise by {noise_like:.2f} and like the velocity by {velocity_like:.2f}."
    )
    if prediction.source == CHOSEN:
        listener.report(Note(found, warning=True))
        return
    raise WeightsError(
        found,
        f"Set --prediction-type {other}; in ComfyUI put a ModelSamplingDiscrete node before the training "
        f"({'eps' if other == 'epsilon' else other}).",
    )


def diverged(loss: float, step: int, rate: float, precision: str, run: RunFolder) -> DivergedError:
    """What to say of a loss that is no finite number.

    Args:
        loss: The loss.
        step: At which it came.
        rate: Peak learning rate.
        precision: Of the run.
        run: Its folder.
    """
    if step == 1:
        return DivergedError(
            f"The base model itself gives a loss of {loss} before anything was learned.",
            "Choose another precision (fp32 or bf16), another VAE or another checkpoint.",
        )
    safer = " or choose precision bf16 or fp32" if precision == "fp16" else ""
    kept = [one for one in run.steps() if one < step]
    rest = f"The adapter of step {kept[-1]} is kept in {run.path}." if kept else "Nothing was saved yet."
    return DivergedError(
        f"The loss became {loss} at step {step}; the run was stopped.",
        f"Lower learning_rate (it was {rate:g}){safer}. {rest}",
    )
