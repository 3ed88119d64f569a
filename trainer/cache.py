"""What a run computes once: the latents' posteriors and the captions' encodings.

A set of pictures is kept as mean and standard deviation of the autoencoder's posterior, not as one sample of
it, so that every training step still draws its own sample.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .devices import place, release
from .errors import WeightsError
from .events import Listener, Note, Phase, stop_if_asked
from .families.base import Conditioning, DiffusionModel
from .files import write_atomic
from .pictures import Picture, crop, crop_place, to_pixels
from .randomness import Draw

_PARTS = ("mean", "std", "caption", "size")


@dataclass(frozen=True)
class LatentSet:
    """The pictures of one kind, ready for training.

    Attributes:
        mean: Posterior mean, (pictures, versions, channels, height, width), float32, already multiplied by the
            autoencoder's scaling factor. Version 1, if any, is the mirrored picture.
        std: Posterior standard deviation, likewise.
        caption: Row of each picture's caption in the encodings, (pictures,), int64.
        size: Original height and width, top and left of the crop, target height and width: (pictures, 6), float32.
    """

    mean: Tensor
    std: Tensor
    caption: Tensor
    size: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one picture's latents, (channels, height, width)."""
        return tuple(self.mean.shape[2:])

    def sample(self, draws: Sequence[Draw]) -> Tensor:
        """A sample of the posterior for each draw: (draws, channels, height, width)."""
        rows = [
            self.mean[d.item, int(d.flip)] + self.std[d.item, int(d.flip)] * d.posterior_noise.to(self.mean.device)
            for d in draws
        ]
        return torch.stack(rows)


@dataclass(frozen=True)
class Cache:
    """Everything that a run's steps read.

    Attributes:
        instance: The subject's pictures.
        prior: The class pictures; None without.
        text: Tokens of the distinct captions, and encodings of those text encoders that are not trained; one row each.
    """

    instance: LatentSet
    prior: LatentSet | None
    text: Conditioning

    def save(self, path: Path) -> None:
        """Write to a safetensors file, atomically."""
        from safetensors.torch import save

        tensors = {f"text.{name}": rows.contiguous() for name, rows in self.text.items()}
        for kind, latents in (("instance", self.instance), ("prior", self.prior)):
            if latents is not None:
                tensors |= {f"{kind}.{name}": getattr(latents, name).contiguous() for name in _PARTS}
        write_atomic(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> Cache | None:
        """Read a saved cache; None if there is none or it is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(path.read_bytes())
        except (OSError, SafetensorError, ValueError):
            return None
        if "instance.size" not in tensors or not any(name.startswith("text.") for name in tensors):
            return None
        sets = {
            kind: LatentSet(*(tensors[f"{kind}.{name}"] for name in _PARTS))
            for kind in ("instance", "prior")
            if f"{kind}.mean" in tensors
        }
        text = {name.removeprefix("text."): rows for name, rows in tensors.items() if name.startswith("text.")}
        return cls(sets["instance"], sets.get("prior"), text)


def build_cache(
    model: DiffusionModel,
    sets: Mapping[str, Sequence[Picture]],
    resolution: int,
    flip: bool,
    device: torch.device,
    listener: Listener,
    trained: Collection[str] = (),
) -> Cache:
    """Encode all pictures and captions.

    Args:
        model: Its autoencoder and text encoders compute in float32 on `device`, whatever their weights' type: SDXL's
            autoencoder overflows in half precision.
        sets: "instance" → pictures, and "prior" → pictures (may be empty).
        resolution: Side in pixels.
        flip: Whether mirrored versions of the subject's pictures are needed.
        device: Where to compute.
        listener: Told of the progress; may stop the work.
        trained: Text encoders that are trained, whose encodings would not last.

    Returns:
        The cache, on the CPU.
    """
    captions = list(dict.fromkeys(picture.caption for pictures in sets.values() for picture in pictures))
    for caption in captions:
        if model.overlong(caption):
            listener.tell(Note(f"This caption is longer than the text encoder reads and is cut: {caption[:80]}…", True))
    text = encode_captions(model, captions, device, trained)
    with torch.no_grad():
        place(model.vae, device, torch.float32)
        total, done = sum(map(len, sets.values())), 0
        latents: dict[str, LatentSet | None] = {}
        for kind, pictures in sets.items():
            rows, sizes = [], []
            for picture in pictures:
                listener.tell(Phase("encoding pictures", done, total))
                stop_if_asked(listener)
                image = picture.open()
                sizes.append(crop_place(image.size, resolution, resolution))
                pixels = to_pixels(crop(image, resolution, resolution))
                rows.append(_posterior(model.vae, picture.name, pixels, flip and kind == "instance", device))
                done += 1
            latents[kind] = _stack(rows, [captions.index(picture.caption) for picture in pictures], sizes)
        listener.tell(Phase("encoding pictures", total, total))
    release(device)
    instance = latents["instance"]
    assert instance is not None
    return Cache(instance, latents.get("prior"), text)


def encode_captions(
    model: DiffusionModel, captions: Sequence[str], device: torch.device, trained: Collection[str] = ()
) -> Conditioning:
    """Tokens of captions, and their encodings by those text encoders that are not trained: a row each, on the CPU."""
    text = model.tokenize(captions)
    for name, network in model.text_encoders.items():
        if name not in trained:
            place(network, device, torch.float32)
            encoded = encode_in_batches(model, name, text[f"ids{name.removeprefix('text_encoder')}"])
            text |= {part: rows.cpu() for part, rows in encoded.items()}
    return text


def encode_in_batches(model: DiffusionModel, encoder: str, ids: Tensor) -> Conditioning:
    """What one text encoder says of tokens (prompts, tokens), sixteen prompts at a time; carries no gradient."""
    with torch.no_grad():
        batches = [model.encode_tokens(encoder, part) for part in torch.split(ids, 16)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _stack(
    rows: list[tuple[Tensor, Tensor]], captions: list[int], sizes: list[tuple[int, int, int, int, int, int]]
) -> LatentSet | None:
    if not rows:
        return None
    means, stds = zip(*rows, strict=True)
    return LatentSet(
        torch.stack(means), torch.stack(stds), torch.tensor(captions), torch.tensor(sizes, dtype=torch.float32)
    )


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
