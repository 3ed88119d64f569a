"""What a run computes once: the posteriors of the pictures' latents, and the encodings of their captions.

Pictures are cached as mean and standard deviation of the autoencoder's posterior, not as one sample of it, so that
every training step still takes its own sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..core.devices import release, to_device
from ..core.errors import WeightsError
from ..core.events import Listener, Note, Phase, stop_if_asked
from ..core.files import write_atomic
from ..core.prompts import shuffled_tags, split_prompts
from ..core.seeding import Draw, generator
from ..core.tensor_files import read_tensors
from ..models.families.base import Conditioning, DiffusionModel, token_ids_key
from ..settings.train import TrainSettings
from .buckets import nearest_shape, training_shapes
from .images import Picture, crop, mask_weights, size_conditioning, to_pixels

_KINDS = ("instance", "prior", "validation")
_SHUFFLED_ORDERS = 16  # of a caption's tags, that are encoded


@dataclass(frozen=True)
class LatentDataset:
    """The pictures of one kind, ready for training.

    Attributes:
        mean: Posterior mean of each picture, (versions, channels, height, width), float32, as the denoiser reads
            it. Version 1, if there is one, is the mirrored picture.
        std: Posterior standard deviation, likewise.
        captions: Rows of each picture's captions in `LatentCache.text`, (captions,), int64.
        size: Original height and width, top and left of the crop, target height and width: (pictures, 6), float32.
        order: Indices of an epoch's pictures, with repeats.
        masks: The share of each latent pixel that belongs to the subject, (1, height, width) in [0, 1]; None: no mask.
    """

    mean: Sequence[Tensor]
    std: Sequence[Tensor]
    captions: Sequence[Tensor]
    size: Tensor
    order: Sequence[int]
    masks: Sequence[Tensor | None]

    def __len__(self) -> int:
        return len(self.mean)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of the latents, (channels, height, width), of each picture of an epoch."""
        return [tuple(self.mean[index].shape[1:]) for index in self.order]

    def sample(self, index: int, draw: Draw) -> Tensor:
        """A sample of a picture's posterior: (channels, height, width)."""
        version = int(draw.flip)
        return self.mean[index][version] + self.std[index][version] * draw.posterior_noise

    def loss_mask(self, index: int, draw: Draw, background: float) -> Tensor | None:
        """Weight of the loss at each latent pixel of a picture's sample: (1, 1, height, width).

        Args:
            index: Of the picture.
            draw: Whether it is mirrored.
            background: Weight outside the mask, in [0, 1].

        Returns:
            None if all pixels have the same weight.
        """
        mask = self.masks[index]
        if mask is None or background == 1:
            return None
        if draw.flip:
            mask = mask.flip(-1)
        return background + (1 - background) * mask[None]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in the file."""
        tensors = {"size": self.size, "order": torch.tensor(self.order)}
        for name in ("mean", "std", "captions", "masks"):
            for index, tensor in enumerate(getattr(self, name)):
                if tensor is not None:
                    tensors[f"{name}.{index}"] = tensor.contiguous()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LatentDataset:
        """The inverse of `tensors`.

        Raises:
            KeyError: A tensor is missing.
        """
        indices = range(len(tensors["size"]))
        return cls(
            mean=[tensors[f"mean.{index}"] for index in indices],
            std=[tensors[f"std.{index}"] for index in indices],
            captions=[tensors[f"captions.{index}"] for index in indices],
            size=tensors["size"],
            order=tensors["order"].tolist(),
            masks=[tensors.get(f"masks.{index}") for index in indices],
        )


@dataclass(frozen=True)
class LatentCache:
    """Everything that a run's steps read.

    Attributes:
        instance: The subject's pictures.
        prior: The class pictures; None without.
        validation: Pictures of the subject that are held out; None without.
        text: Tokens of the distinct captions, and encodings of those text encoders that don't run in every step; one
            row each.
        empty: Row of the empty caption; None if it is not needed.
        preserved: For each of the subject's pictures, the rows of the prompts for which the base model's prediction is
            preserved, (prompts,), int64; empty if there is no such preservation.
        base_text: Encodings of all captions by the text encoders that are trained, as they are before that; empty if
            they are not needed.
    """

    instance: LatentDataset
    prior: LatentDataset | None
    validation: LatentDataset | None
    text: Conditioning
    empty: int | None
    preserved: Sequence[Tensor] = ()
    base_text: Conditioning = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write to a safetensors file, atomically.

        Raises:
            StorageError: It can't be written.
        """
        from safetensors.torch import save

        tensors = {f"text.{name}": rows.contiguous() for name, rows in self.text.items()}
        tensors |= {f"base_text.{name}": rows.contiguous() for name, rows in self.base_text.items()}
        tensors |= {f"preserved.{index}": rows for index, rows in enumerate(self.preserved)}
        for kind in _KINDS:
            latents: LatentDataset | None = getattr(self, kind)
            if latents is not None:
                tensors |= {f"{kind}.{name}": tensor for name, tensor in latents.tensors().items()}
        if self.empty is not None:
            tensors["empty"] = torch.tensor(self.empty)
        write_atomic(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> LatentCache | None:
        """Read a saved cache; None if there is none, or it is damaged or of an older version."""
        try:
            tensors = read_tensors(path)
            datasets: dict[str, LatentDataset | None] = {
                kind: LatentDataset.from_tensors(_with_prefix(tensors, kind)) if f"{kind}.size" in tensors else None
                for kind in _KINDS
            }
        except (OSError, ValueError, KeyError):
            return None
        text = _with_prefix(tensors, "text")
        instance = datasets["instance"]
        if instance is None or not text:
            return None
        preserved = _with_prefix(tensors, "preserved")
        return cls(
            instance=instance,
            preserved=[preserved[str(index)] for index in range(len(preserved))],
            base_text=_with_prefix(tensors, "base_text"),
            prior=datasets["prior"],
            validation=datasets["validation"],
            text=text,
            empty=int(tensors["empty"]) if "empty" in tensors else None,
        )


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix and a dot, without these."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def build_cache(
    model: DiffusionModel,
    sets: Mapping[str, Sequence[Picture]],
    settings: TrainSettings,
    device: torch.device,
    listener: Listener,
) -> LatentCache:
    """Encode all pictures and captions.

    Args:
        model: Its autoencoder and text encoders compute in float32 on `device`, whatever their weights' type: SDXL's
            autoencoder overflows in half precision. The text encoders that don't run in every step are dropped.
        sets: "instance", "prior" and "validation" → pictures; all but the first may be missing or empty.
        settings: Resolution, buckets, flip, shuffling and dropout of captions, and which text encoders run in every
            step: these don't encode here, since their outputs change.
        device: Where to compute.
        listener: Gets the progress; may stop the work.

    Returns:
        The cache, on the CPU.

    Raises:
        WeightsError: The autoencoder gives NaN or infinite values.
        CancelledError: The listener asked to stop.
    """
    captions = {
        kind: [_training_captions(picture, settings if kind == "instance" else None) for picture in pictures]
        for kind, pictures in sets.items()
    }
    distinct = dict.fromkeys(caption for of_set in captions.values() for of_picture in of_set for caption in of_picture)
    rows = {caption: row for row, caption in enumerate(distinct)}
    if settings.caption_dropout or settings.prior_empty:
        rows.setdefault("", len(rows))
    preserved = _preserved_prompts(sets["instance"], settings) if settings.prior == "model" else []
    for prompt in itertools.chain(*preserved):
        rows.setdefault(prompt, len(rows))
    _warn_of_long_captions(model, [picture for pictures in sets.values() for picture in pictures], listener)
    in_steps = settings.text_encoders_in_steps(model.text_encoders)
    text = encode_captions(model, list(rows), device, in_steps)
    base_text: Conditioning = {}
    if settings.needs_base_predictions and in_steps:
        everything = encode_captions(model, list(rows), device)
        base_text = {name: encoded for name, encoded in everything.items() if name not in text}
    drop_frozen_text_encoders(model, in_steps)  # before the autoencoder comes
    release(device)
    datasets: dict[str, LatentDataset | None] = {}
    with torch.no_grad():
        to_device(model.vae, device, torch.float32)
        total = sum(map(len, sets.values()))
        done = 0
        for kind, pictures in sets.items():
            flip = settings.flip and kind == "instance"
            encoded = []
            for picture in pictures:
                listener.report(Phase("encoding pictures", done, total))
                stop_if_asked(listener)
                latents = _encode_picture(model, picture, settings, flip, device)
                if picture.mask and latents.mask is None:
                    message = f"The masked part of {picture.name} is cropped away; the mask is ignored."
                    listener.report(Note(message, warning=True, picture=picture.name))
                encoded.append(latents)
                done += 1
            caption_rows = [torch.tensor([rows[caption] for caption in of_picture]) for of_picture in captions[kind]]
            datasets[kind] = _as_dataset(pictures, encoded, caption_rows) if encoded else None
        listener.report(Phase("encoding pictures", total, total))
    release(device)
    instance = datasets["instance"]
    assert instance is not None
    return LatentCache(
        instance=instance,
        prior=datasets.get("prior"),
        validation=datasets.get("validation"),
        text=text,
        empty=rows.get(""),
        preserved=[torch.tensor([rows[prompt] for prompt in of_picture]) for of_picture in preserved],
        base_text=base_text,
    )


def _preserved_prompts(pictures: Sequence[Picture], settings: TrainSettings) -> list[list[str]]:
    """For each picture, the prompts for which the base model's prediction is preserved."""
    further = split_prompts(settings.prior_prompts)
    return [[*picture.class_captions, *further] for picture in pictures]


def _training_captions(picture: Picture, settings: TrainSettings | None) -> list[str]:
    """A picture's captions, one of which each sample takes; with `settings` that shuffle, in several orders."""
    if settings is None or not settings.shuffle_tags:
        return list(picture.captions)
    return [
        shuffled_tags(caption, settings.keep_tags, generator(settings.seed, "shuffle", caption, number))
        for caption in picture.captions
        for number in range(_SHUFFLED_ORDERS)
    ]


def _warn_of_long_captions(model: DiffusionModel, pictures: Sequence[Picture], listener: Listener) -> None:
    """Warn of captions that the text encoder truncates; of one that several pictures share, once for all of them."""
    owners: dict[str, list[Picture]] = {}
    for picture in pictures:
        for caption in picture.captions:
            owners.setdefault(caption, []).append(picture)
    for caption, captioned in owners.items():
        if model.overlong(caption):
            text = f"This caption is too long for the text encoder and is truncated: {caption[:80]}…"
            listener.report(Note(text, warning=True, picture=captioned[0].name if len(captioned) == 1 else ""))


def drop_frozen_text_encoders(model: DiffusionModel, in_steps: Collection[str]) -> None:
    """Remove the text encoders that don't run in every step from the model; their outputs are cached."""
    for name in [name for name in model.text_encoders if name not in in_steps]:
        del model.text_encoders[name]


def encode_captions(
    model: DiffusionModel, captions: Sequence[str], device: torch.device, in_steps: Collection[str] = ()
) -> Conditioning:
    """Tokens of captions, and their encodings by the text encoders but those in every step: a row each, on the CPU.

    Without tokens where a host encodes.
    """
    text = model.tokenize(captions)
    if not text:
        return model.encode_prompts(captions)
    for name, text_encoder in model.text_encoders.items():
        if name not in in_steps:
            to_device(text_encoder, device, model.text_dtype)
            text |= encode_tokens_in_batches(model, name, text[token_ids_key(name)], torch.device("cpu"))
    return text


def encode_tokens_in_batches(model: DiffusionModel, encoder: str, ids: Tensor, device: torch.device) -> Conditioning:
    """One text encoder's encodings of tokens (prompts, tokens), sixteen prompts at a time, without gradients.

    Args:
        model: With the text encoder.
        encoder: Its component's name.
        ids: The tokens.
        device: Of the encodings; they leave the encoder's with each batch.
    """
    with torch.no_grad():
        batches = [
            {name: rows.to(device) for name, rows in model.encode_tokens(encoder, part).items()}
            for part in torch.split(ids, 16)
        ]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@dataclass(frozen=True)
class _EncodedPicture:
    """A picture's latents; see `LatentDataset`."""

    mean: Tensor
    std: Tensor
    size: Tensor
    mask: Tensor | None


def _encode_picture(
    model: DiffusionModel, picture: Picture, settings: TrainSettings, flip: bool, device: torch.device
) -> _EncodedPicture:
    image = picture.open()
    shape = nearest_shape(image.size, training_shapes(settings, settings.resolution))
    mean, std = _encode_pixels(model, picture.name, to_pixels(crop(image, *shape)), flip, device)
    mask = None
    if picture.mask is not None:
        cropped = crop(picture.mask().resize(image.size), *shape)
        mask = mask_weights(cropped, width=mean.shape[-1], height=mean.shape[-2])
    size = torch.tensor(size_conditioning(image.size, *shape), dtype=torch.float32)
    return _EncodedPicture(mean, std, size, mask)


def _encode_pixels(
    model: DiffusionModel, name: str, pixels: Tensor, flip: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scaled mean and standard deviation of one picture: (versions, channels, height, width) each, on the CPU.

    Raises:
        WeightsError: They are not finite.
    """
    means = []
    stds = []
    for version in [pixels, pixels.flip(-1)] if flip else [pixels]:
        mean, std = model.family.latents.encode(model.vae, version[None].to(device))
        if not torch.isfinite(mean).all():
            raise WeightsError(f"The VAE encodes {name} to NaN or infinite values.", "Use another VAE or checkpoint.")
        means.append(mean[0])
        stds.append(std[0])
    return torch.stack(means).cpu(), torch.stack(stds).cpu()


def _as_dataset(
    pictures: Sequence[Picture], encoded: Sequence[_EncodedPicture], captions: Sequence[Tensor]
) -> LatentDataset:
    return LatentDataset(
        mean=[latents.mean for latents in encoded],
        std=[latents.std for latents in encoded],
        captions=captions,
        size=torch.stack([latents.size for latents in encoded]),
        order=[index for index, picture in enumerate(pictures) for _ in range(picture.repeats)],
        masks=[latents.mask for latents in encoded],
    )
