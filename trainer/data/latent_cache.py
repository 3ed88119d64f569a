"""What a run computes once: the latents' posteriors and the captions' encodings.

A set of pictures is kept as mean and standard deviation of the autoencoder's posterior, not as one sample of
it, so that every training step still draws its own sample.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.devices import release, to_device
from ..core.errors import WeightsError
from ..core.events import Listener, Note, Phase, stop_if_asked
from ..core.files import write_atomic
from ..core.prompts import shuffled_tags
from ..core.seeding import Draw, generator
from ..models.families.base import Conditioning, DiffusionModel
from ..settings.train import TrainSettings
from .buckets import bucket_shapes, nearest_shape
from .images import Picture, crop, mask_weights, size_conditioning, to_pixels

_KINDS = ("instance", "prior", "validation")
_SHUFFLED = 16  # orders of a caption's parts that are encoded, at the most


@dataclass(frozen=True)
class LatentDataset:
    """The pictures of one kind, ready for training.

    Attributes:
        mean: Posterior mean of each picture, (versions, channels, height, width), float32, already multiplied by the
            autoencoder's scaling factor. Version 1, if any, is the mirrored picture.
        std: Posterior standard deviation, likewise.
        captions: Rows of each picture's captions in the encodings, int64.
        size: Original height and width, top and left of the crop, target height and width: (pictures, 6), float32.
        order: The pictures of an epoch, one as often as it is repeated.
        masks: How much of each place belongs to the subject, (1, height, width) in [0, 1]; None: no mask.
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
        return [tuple(self.mean[picture].shape[1:]) for picture in self.order]

    def sample(self, picture: int, drawn: Draw) -> Tensor:
        """A sample of a picture's posterior: (channels, height, width)."""
        version = int(drawn.flip)
        return self.mean[picture][version] + self.std[picture][version] * drawn.posterior_noise

    def mask_of(self, picture: int, drawn: Draw, background: float) -> Tensor | None:
        """Weight of each place of a picture's sample, (1, 1, height, width); None: all alike."""
        mask = self.masks[picture]
        if mask is None or background == 1:
            return None
        return background + (1 - background) * (mask.flip(-1) if drawn.flip else mask)[None]

    def tensors(self) -> dict[str, Tensor]:
        """Everything under names for a file."""
        found = {"size": self.size, "order": torch.tensor(self.order)}
        for name in ("mean", "std", "captions", "masks"):
            parts = enumerate(getattr(self, name))
            found |= {f"{name}.{number}": part.contiguous() for number, part in parts if part is not None}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LatentDataset:
        """What `tensors` gave.

        Raises:
            KeyError: Something is missing.
        """
        numbers = range(len(tensors["size"]))
        mean, std, captions = (
            [tensors[f"{name}.{number}"] for number in numbers] for name in ("mean", "std", "captions")
        )
        masks = [tensors.get(f"masks.{number}") for number in numbers]
        return cls(mean, std, captions, tensors["size"], tensors["order"].tolist(), masks)


@dataclass(frozen=True)
class LatentCache:
    """Everything that a run's steps read.

    Attributes:
        instance: The subject's pictures.
        prior: The class pictures; None without.
        validation: Pictures of the subject that are held out; None without.
        text: Tokens of the distinct captions, and encodings of those text encoders that are not trained; one row each.
        empty: Row of the empty caption; None if it is not needed.
    """

    instance: LatentDataset
    prior: LatentDataset | None
    validation: LatentDataset | None
    text: Conditioning
    empty: int | None

    def save(self, path: Path) -> None:
        """Write to a safetensors file, atomically."""
        from safetensors.torch import save

        tensors = {f"text.{name}": rows.contiguous() for name, rows in self.text.items()}
        for kind in _KINDS:
            latents: LatentDataset | None = getattr(self, kind)
            if latents is not None:
                tensors |= {f"{kind}.{name}": part for name, part in latents.tensors().items()}
        if self.empty is not None:
            tensors["empty"] = torch.tensor(self.empty)
        write_atomic(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> LatentCache | None:
        """Read a saved cache; None if there is none, or it is damaged or of an older version."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(path.read_bytes())
            sets: dict[str, LatentDataset | None] = {
                kind: LatentDataset.from_tensors(_below(tensors, kind)) if f"{kind}.size" in tensors else None
                for kind in _KINDS
            }
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        text, instance = _below(tensors, "text"), sets["instance"]
        if instance is None or not text:
            return None
        empty = int(tensors["empty"]) if "empty" in tensors else None
        return cls(instance, sets["prior"], sets["validation"], text, empty)


def _below(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): one for name, one in tensors.items() if name.startswith(f"{kind}.")}


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
            autoencoder overflows in half precision. The text encoders that are not trained leave it.
        sets: "instance", "prior" and "validation" → pictures (may be empty, but for the first).
        settings: Resolution, shapes, flip, what becomes of captions, which text encoders are trained: their encodings
            would not last.
        device: Where to compute.
        listener: Told of the progress; may stop the work.

    Returns:
        The cache, on the CPU.
    """
    texts = {
        kind: [_captions(picture, settings if kind == "instance" else None) for picture in pictures]
        for kind, pictures in sets.items()
    }
    rows = {one: row for row, one in enumerate(dict.fromkeys(t for set_ in texts.values() for ts in set_ for t in ts))}
    if settings.caption_dropout:
        rows.setdefault("", len(rows))
    for caption in dict.fromkeys(one for pictures in sets.values() for picture in pictures for one in picture.captions):
        if model.overlong(caption):
            listener.report(
                Note(f"This caption is longer than the text encoder reads and is cut: {caption[:80]}…", True)
            )
    text = encode_captions(model, list(rows), device, settings.text_rates)
    drop_frozen_text_encoders(model, settings.text_rates)  # before the autoencoder comes
    release(device)
    latents = {}
    with torch.no_grad():
        to_device(model.vae, device, torch.float32)
        total, done = sum(map(len, sets.values())), 0
        for kind, pictures in sets.items():
            found = []
            for picture in pictures:
                listener.report(Phase("encoding pictures", done, total))
                stop_if_asked(listener)
                found.append(_encoded(model.vae, picture, settings, settings.flip and kind == "instance", device))
                if picture.mask and found[-1][3] is None:
                    listener.report(Note(f"The mask of {picture.name} is cut away with the picture's edges.", True))
                done += 1
            captions = [torch.tensor([rows[text] for text in own]) for own in texts[kind]]
            latents[kind] = _set(pictures, found, captions) if found else None
        listener.report(Phase("encoding pictures", total, total))
    release(device)
    instance = latents["instance"]
    assert instance is not None
    return LatentCache(instance, latents.get("prior"), latents.get("validation"), text, rows.get(""))


def _captions(picture: Picture, settings: TrainSettings | None) -> list[str]:
    """A picture's captions, one of which each sample takes; with `settings` that shuffle, in several orders."""
    if settings is None or not settings.shuffle_tags:
        return list(picture.captions)
    return [
        shuffled_tags(caption, settings.keep_tags, generator(settings.seed, "shuffle", caption, number))
        for caption in picture.captions
        for number in range(_SHUFFLED)
    ]


def _set(
    pictures: Sequence[Picture], encoded: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]], captions: list[Tensor]
) -> LatentDataset:
    mean, std, sizes, masks = zip(*encoded, strict=True)
    order = [number for number, picture in enumerate(pictures) for _ in range(picture.repeats)]
    return LatentDataset(mean, std, captions, torch.stack(sizes), order, masks)


def drop_frozen_text_encoders(model: DiffusionModel, trained: Collection[str]) -> None:
    """Drop the text encoders that are not trained; what they say is encoded."""
    for name in [name for name in model.text_encoders if name not in trained]:
        del model.text_encoders[name]


def encode_captions(
    model: DiffusionModel, captions: Sequence[str], device: torch.device, trained: Collection[str] = ()
) -> Conditioning:
    """Tokens of captions, and their encodings by those text encoders that are not trained: a row each, on the CPU."""
    text = model.tokenize(captions)
    for name, network in model.text_encoders.items():
        if name not in trained:
            to_device(network, device, torch.float32)
            encoded = encode_tokens_in_batches(model, name, text[f"ids{name.removeprefix('text_encoder')}"])
            text |= {part: rows.cpu() for part, rows in encoded.items()}
    return text


def encode_tokens_in_batches(model: DiffusionModel, encoder: str, ids: Tensor) -> Conditioning:
    """What one text encoder says of tokens (prompts, tokens), sixteen prompts at a time; carries no gradient."""
    with torch.no_grad():
        batches = [model.encode_tokens(encoder, part) for part in torch.split(ids, 16)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _encoded(
    vae: Any, picture: Picture, settings: TrainSettings, flip: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Mean and standard deviation of a picture's latents, its size and crop, and its mask at the latents' size."""
    image, side = picture.open(), settings.resolution
    shape = (side, side)
    if settings.aspect_buckets:
        shape = nearest_shape(image.size, bucket_shapes(side, settings.bucket_step))
    mean, std = _posterior(vae, picture.name, to_pixels(crop(image, *shape)), flip, device)
    size = torch.tensor(size_conditioning(image.size, *shape), dtype=torch.float32)
    if picture.mask is None:
        return mean, std, size, None
    mask = crop(picture.mask().resize(image.size), *shape)
    return mean, std, size, mask_weights(mask, mean.shape[-1], mean.shape[-2])


def _posterior(vae: Any, name: str, pixels: Tensor, flip: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scaled mean and standard deviation of one picture: (versions, channels, height, width) each, on the CPU."""
    means, stds = [], []
    for version in [pixels, pixels.flip(-1)] if flip else [pixels]:
        posterior = vae.encode(version[None].to(device)).latent_dist
        if not torch.isfinite(posterior.mean).all():
            raise WeightsError(
                f"The VAE turns {name} into numbers that are not finite.", "Choose another VAE or checkpoint."
            )
        means.append(posterior.mean[0] * vae.config.scaling_factor)
        stds.append(posterior.std[0] * vae.config.scaling_factor)
    return torch.stack(means).cpu(), torch.stack(stds).cpu()
