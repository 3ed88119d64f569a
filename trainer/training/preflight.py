"""Checks before anything is generated, or before the first step, so that mistakes are reported early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..core.devices import DTYPES, pick_precision
from ..core.errors import SettingsError, UnsupportedModelError, WeightsError, suggest
from ..core.events import Listener, Note
from ..core.files import require_writable
from ..core.prompts import PromptWords, split_prompts
from ..core.seeding import generator
from ..core.tensor_files import cast_finite
from ..data.images import Picture
from ..data.latent_cache import LatentDataset
from ..models.families.base import CHOSEN, BaseWeights, DiffusionModel, Prediction
from ..models.families.clip import HEAD
from ..models.objective import DiffusionObjective
from ..settings.train import TrainSettings
from .adapter import StartingPoint, planned_targets
from .export import require_combinable
from .optimizers import require_optimizer
from .preservation import chosen_prior
from .runs.folder import RunPaths
from .runs.trackers import require_tracker
from .text_conditioning import TextConditioning
from .trainable import evaluating
from .words import TrainedWords

_KEPT_OF_START = (  # settings that an adapter to start from replaces by its own
    "adapter",
    "alpha",
    "block_ranks",
    "conv_alpha",
    "conv_rank",
    "exclude",
    "include",
    "lora_init",
    "rank",
    "rank_stabilized",
    "targets",
)
_ADAPTER_BYTES = 50_000_000  # that an adapter and its checkpoints take at the least
_EMBEDDING_BYTES = 1_000_000
_BYTES_PER_WEIGHT = 4  # of a trained number in a checkpoint file, at the most
# Of the timesteps, at which a model's output is compared with what each type predicts.
_FRACTIONS = {"epsilon": (0.9, 0.9), "v_prediction": (0.3, 0.5)}
_UNCLEAR = {"epsilon": (0.3, 0.8), "v_prediction": (0.2, 0.65)}  # cosines between which a second probe is asked
_IS_NOISE, _IS_NOT_NOISE, _IS_VELOCITY = 0.8, 0.5, 0.4  # cosines above or below which it counts as such


def require_fused_backward(settings: TrainSettings, device: torch.device, processes: int = 1) -> None:
    """Check that nothing needs the gradients of a step together, if weights are updated in the backward pass.

    Args:
        settings: Of the run.
        device: Where it trains.
        processes: That train together.

    Raises:
        SettingsError: Gradients are averaged over several processes, or scaled.
    """
    if not settings.fused_backward_pass:
        return
    option = suggest("fused_backward_pass", True)
    if processes > 1:
        raise SettingsError(
            f"{option} updates the weights before several processes could average their gradients.",
            f"Set {suggest('fused_backward_pass', False)}, or train with one process.",
        )
    if device.type == "cuda" and pick_precision(settings.precision, device) == "fp16":
        raise SettingsError(
            f"{option} does not work in fp16, where a step is taken only if all of its gradients are finite.",
            f"Set {suggest('precision', 'bf16')} (or fp32, where the GPU has no bf16), or "
            f"{suggest('fused_backward_pass', False)}.",
        )


def require_trainable(
    base: BaseWeights,
    settings: TrainSettings,
    paths: RunPaths,
    starting_point: StartingPoint,
    device: torch.device | None = None,
    *,
    words: Sequence[PromptWords] = (),
    captions: Sequence[str] = (),
) -> None:
    """Check what can be checked immediately, to report mistakes before class pictures are generated.

    Args:
        base: The base model.
        settings: Of the run.
        paths: Where it writes.
        starting_point: What it builds on.
        device: Where it trains; None: not known yet.
        words: Rare word and class noun of each subject.
        captions: Of the subjects' pictures.

    Raises:
        UnsupportedModelError: The base is a distilled model.
        SettingsError: A setting does not fit the model, the optimiser can't be used, or a rare word can't be learned.
        AdapterError: The adapter to start from does not.
        StorageError: A folder can't be written, or its disk is full.
    """
    _require_undistilled(base)
    _require_whole_tokens(base, settings)
    if settings.zero_terminal_snr and base.prediction.type != "v_prediction":
        raise SettingsError(
            "zero_terminal_snr is for v-prediction models, since predicting the noise from pure noise teaches nothing; "
            f"this model predicts {base.prediction.type}.",
            f"Set {suggest('zero_terminal_snr', False)}.",
        )
    require_tracker(settings.log_with)
    require_optimizer(settings, device)
    if settings.combine:
        for adapter, _ in starting_point.stacked:
            require_combinable(adapter)
        if starting_point.start:
            require_combinable(starting_point.start)
    if settings.token_vectors and not base.family.text_targets:
        raise SettingsError(
            f"{suggest('token_vectors')} needs a text encoder with trainable word embeddings, but "
            f"{base.family.title}'s is a language model.",
            f"Set {suggest('token_vectors', 0)}.",
        )
    if device is not None:
        require_fused_backward(settings, device)
    model = base.family.build(base)
    model.objective.with_settings(settings)  # raises if they are for another objective
    if settings.token_vectors:
        TrainedWords(model, settings, words, starting_point.start).require_captioned(model, captions)
    planned_targets(model, settings, starting_point.start)
    require_writable(paths.output, _ADAPTER_BYTES)
    if settings.token_vectors:
        require_writable(paths.embedding_output, _EMBEDDING_BYTES)
    if settings.adapter == "full":
        _require_room_for_full_finetuning(base, settings, paths)
    else:
        require_writable(paths.runs, _ADAPTER_BYTES)


def _require_whole_tokens(base: BaseWeights, settings: TrainSettings) -> None:
    """Refuse sizes that the model's latents can't have.

    Raises:
        SettingsError: A side is no multiple of what one of its latents' numbers covers.
    """
    step = base.family.latents.granularity(base.vae.config)
    sides = {"resolution": settings.resolution}
    if settings.aspect_buckets:
        sides["bucket_step"] = settings.bucket_step
    for name, side in sides.items():
        if side % step:
            raise SettingsError(
                f"{suggest(name, side)} is not a multiple of {step}, which {base.family.title} requires.",
                f"Set {suggest(name, max(1, round(side / step)) * step)}.",
            )


def _require_undistilled(base: BaseWeights) -> None:
    """Refuse a model that was distilled to generate in a few steps, which training would undo.

    Raises:
        UnsupportedModelError: It says so, or says nothing and is called like one.
    """
    original = base.family.base_of_distilled(base.title)
    if base.is_distilled:
        raise UnsupportedModelError(
            f"{base.title} is distilled for few-step sampling, which training would undo.",
            f"Train on {original or 'the base model that it was distilled from'}; the adapter also works with the "
            "distilled model.",
        )
    if base.is_distilled is None and original is not None:
        raise UnsupportedModelError(
            f"By its name, {base.title} is a model distilled for few-step sampling, which training would undo.",
            f"Train on {original}; the adapter also works with the distilled model. If this is not a distilled model, "
            "add 'base' to its file name.",
        )


def require_preservable(
    settings: TrainSettings, pictures: Sequence[Picture], class_pictures: Sequence[Picture]
) -> None:
    """Check that there is what the setting `prior` needs.

    Args:
        settings: Of the run.
        pictures: The subject's.
        class_pictures: Those of the class.

    Raises:
        SettingsError: There are no class pictures, or a caption can't be turned into one for the class.
    """
    if settings.prior == "class-pictures" and not class_pictures:
        raise SettingsError(
            f"{suggest('prior', 'class-pictures')} is set, but there are no class pictures.",
            f"Set {suggest('prior_count', 100)} or {suggest('class_images')}, or choose {suggest('prior', 'model')}, "
            "which needs none.",
        )
    if settings.prior != "model":
        return
    for picture in pictures:
        if not picture.class_captions:
            raise SettingsError(
                f"The caption of {picture.name}, '{picture.caption[:80]}', does not contain the rare word, so it "
                "can't be turned into a caption for the class.",
                f"Put {suggest('token')} into every caption, set {suggest('class_prompt', 'a photo of a dog')}, or "
                f"choose {suggest('prior', 'none')}.",
            )


def _require_room_for_full_finetuning(base: BaseWeights, settings: TrainSettings, paths: RunPaths) -> None:
    """Check the room for checkpoints of all weights, and that a checkpoint file can hold and describe the model.

    Raises:
        SettingsError: A checkpoint file can't tell how the model computes.
        NotFiniteError: It can't hold the base's weights.
        StorageError: A folder can't be written, or its disk is full.
    """
    _require_usual_heads(base)
    _require_holdable(base, DTYPES[settings.save_precision])
    weights = sum(tensor.numel() for part in (base.denoiser, *base.text_encoders) for tensor in part.tensors.values())
    checkpoints = settings.steps // settings.checkpoint_every + 1 if settings.checkpoint_every else 1
    copies = 2 if settings.averages else 1
    bytes_per_weight = _BYTES_PER_WEIGHT * copies + settings.optimizer_class.bytes_per_number
    require_writable(paths.runs, int(bytes_per_weight * weights) * min(checkpoints, settings.keep_checkpoints + 1))
    require_writable(paths.checkpoint_output, _BYTES_PER_WEIGHT * weights)


def _require_usual_heads(base: BaseWeights) -> None:
    """Refuse numbers of attention heads that a single checkpoint file can't tell, so that it would compute otherwise.

    Raises:
        SettingsError: The UNet or a text encoder has another number than every model of the family.
    """
    levels = len(base.denoiser.config["block_out_channels"])
    usual = base.family.complete(base.denoiser.config)["attention_head_dim"]
    is_unet_unusual = _by_level(base.denoiser.config.get("attention_head_dim"), levels) != _by_level(usual, levels)
    is_encoder_unusual = any(
        encoder.config["num_attention_heads"] != max(1, encoder.config["hidden_size"] // HEAD)
        for encoder in base.text_encoders
    )
    if is_unet_unusual or is_encoder_unusual:
        raise SettingsError(
            f"The base model has a different number of attention heads from {base.family.title}; a checkpoint file "
            "can't store that, so the fine-tuned model would give different results.",
            f"Train an adapter instead: {suggest('adapter', 'lora')}.",
        )


def report_settings_without_effect(
    settings: TrainSettings,
    pictures: Sequence[Picture],
    class_prompts: Sequence[str],
    *,
    has_class_pictures: bool,
    starts_from_adapter: bool,
    listener: Listener,
) -> None:
    """Warn of each setting that was given but has no effect in this run with these pictures.

    Args:
        settings: Of the run, with the values of its preset.
        pictures: The subject's.
        class_prompts: Prompts of the class pictures.
        has_class_pictures: Whether the run has class pictures.
        starts_from_adapter: Whether it starts from an adapter.
        listener: Gets the warnings.
    """
    notes = settings.effect_notes()
    given = settings.changed()
    idle = settings.without_effect().keys()
    if has_class_pictures and not settings.trains_class_pictures and not idle & {"class_images", "prior_count"}:
        notes.append(f"Class pictures have no effect without {suggest('prior', 'auto')}.")
    preserves = chosen_prior(settings, pictures, has_class_pictures=has_class_pictures) != "none"
    if "prior_weight" in given and not preserves:
        model = suggest("prior", "model")
        notes.append(f"{suggest('prior_weight')} has no effect without class pictures or {model}.")
    if "mask_background" in given - idle and not any(picture.mask for picture in pictures):
        notes.append(f"{suggest('mask_background')} has no effect: no picture has a mask.")
    if settings.shuffle_tags and not any(
        caption.count(",") > settings.keep_tags for picture in pictures for caption in picture.captions
    ):
        notes.append(
            f"{suggest('shuffle_tags')} has no effect: no caption has two or more comma-separated parts after the "
            f"first {settings.keep_tags}."
        )
    if starts_from_adapter:
        replaced = [suggest(name) for name in _KEPT_OF_START if name in given]
        if replaced:
            names = " and ".join(replaced)
            notes.append(f"{names}: no effect, since {suggest('start_from')} determines the type, layers and ranks.")
    notes += _unused_words(settings, pictures, class_prompts)
    for note in notes:
        listener.report(Note(note, warning=True))


def _unused_words(settings: TrainSettings, pictures: Sequence[Picture], class_prompts: Sequence[str]) -> Iterator[str]:
    """A note on a rare word and on a class noun that were given and that no caption or prompt holds."""
    texts = [caption for picture in pictures for caption in picture.captions]
    texts += [*class_prompts, *split_prompts(settings.preview_prompts)]
    for owner in (settings, *getattr(settings, "subject", ())):
        for name, placeholder in (("token", "{token}"), ("class_noun", "{class}")):
            word = " ".join(getattr(owner, name, "").split())
            is_used = any(each in text for text in texts for each in (word, placeholder))
            if name in owner.changed() and word and not is_used:
                label = suggest(name) if owner is settings else name
                yield f"{label} '{word}' has no effect: no caption or prompt contains {placeholder} or the word itself."


def _by_level(heads: object, levels: int) -> tuple[object, ...]:
    """Heads of each level, which a configuration gives as a list, or as one number for all."""
    return tuple(heads) if isinstance(heads, list | tuple) else (heads,) * levels


def _require_holdable(base: BaseWeights, dtype: torch.dtype) -> None:
    """Check that a checkpoint file of that type can hold the base's weights, which training changes by little.

    Raises:
        NotFiniteError: A number is not finite, or too large; names the tensor.
    """
    for part in (base.denoiser, base.vae, *base.text_encoders):
        for name, tensor in part.tensors.items():
            numbers = part.packed[name].weight(torch.float32) if name in part.packed else tensor
            if numbers.is_floating_point():
                cast_finite(part.file_names.get(name, name), numbers, dtype)


@torch.no_grad()
def require_prediction_type(
    model: DiffusionModel,
    latents: LatentDataset,
    text: TextConditioning,
    prediction: Prediction,
    dtype: torch.dtype,
    listener: Listener,
) -> None:
    """Test what the base model actually predicts.

    A model trained with the wrong prediction type learns noise, without an error. So its output for noisy pictures of
    the subject is compared with the noise, late in the schedule, and with the velocity, early. At 0.9 of the timesteps
    the output of an epsilon model has a cosine of 0.99 with the noise, that of a velocity model below 0.4; at 0.3 to
    0.5 the output of a velocity model has one of 0.65 or more with the velocity, that of random weights below 0.2. In
    between, the run starts.

    Args:
        model: The base, on the device where it trains.
        latents: The subject's.
        text: Conditioning on the captions.
        prediction: What the model is about to be trained for.
        dtype: Type of the denoiser's input.
        listener: Gets a warning where the user chose the type.

    Raises:
        WeightsError: The model predicts the other type, and the user did not choose this one.
    """
    if not isinstance(model.objective, DiffusionObjective):
        return  # the others have one prediction type
    velocity = model.objective.with_prediction_type("v_prediction")
    with evaluating(model):  # no dropout
        noise_like = _likeness(model, velocity, latents, text, dtype, "epsilon")
        expects_noise = prediction.type != "v_prediction"
        if (noise_like >= _IS_NOT_NOISE) if expects_noise else (noise_like <= _IS_NOISE):
            return
        velocity_like = _likeness(model, velocity, latents, text, dtype, "v_prediction")
    if expects_noise and velocity_like <= _IS_VELOCITY:
        return
    other = "v_prediction" if expects_noise else "epsilon"
    problem = (
        f"The base model would be trained as {prediction.type} (according to {prediction.source}), but it predicts "
        f"{other}: the cosine similarity of its output is {noise_like:.2f} with the noise and {velocity_like:.2f} with "
        "the velocity."
    )
    if prediction.source == CHOSEN:
        listener.report(Note(problem, warning=True))
        return
    raise WeightsError(problem, f"Set {suggest('prediction_type', other)}.")


def _likeness(
    model: DiffusionModel,
    velocity: DiffusionObjective,
    latents: LatentDataset,
    text: TextConditioning,
    dtype: torch.dtype,
    prediction_type: str,
) -> float:
    """The cosine of the model's output with what that prediction type would be, a mean over probes, or a clear one."""
    cosines: list[float] = []
    for number, fraction in enumerate(_FRACTIONS[prediction_type]):
        cosines.append(_cosine(model, velocity, latents, text, dtype, number, prediction_type, fraction))
        low, high = _UNCLEAR[prediction_type]
        if not low < cosines[0] < high:
            break
    return sum(cosines) / len(cosines)


def _cosine(
    model: DiffusionModel,
    velocity: DiffusionObjective,
    latents: LatentDataset,
    text: TextConditioning,
    dtype: torch.dtype,
    number: int,
    prediction_type: str,
    timestep_fraction: float,
) -> float:
    """Cosine of the model's output, at a fraction of the timesteps, with what that prediction type would be."""
    device = velocity.device
    picture = number % len(latents)
    clean = latents.mean[picture][:1].to(device)
    noise = torch.randn(clean.shape, generator=generator("prediction type", number)).to(device)
    timesteps = torch.tensor([int(timestep_fraction * velocity.timesteps)], device=device)
    noisy = velocity.add_noise(clean, noise, timesteps)
    conditioning = text.rows(latents.captions[picture][:1])
    conditioning["size"] = latents.size[picture][None].to(device)
    output = model.predict(noisy.to(dtype), timesteps, conditioning).float()
    target = noise
    if prediction_type == "v_prediction":
        target = velocity.target(clean, noise, timesteps)
    return float(torch.cosine_similarity(output.flatten(), target.flatten(), dim=0))
