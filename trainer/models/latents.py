"""Conversion between an autoencoder's output and a denoiser's latents: scaling, patches, statistics.

`Family.latents` is the one of a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class LatentFormat(Protocol):
    """Conversion of an autoencoder's output to a family's latents, and back.

    The autoencoder is diffusers' network, on any device; pixels are in [-1, 1].
    """

    def shape(self, vae: Any, height: int, width: int) -> tuple[int, int, int]:
        """Shape of the latents, (channels, height, width), of a picture of that many pixels."""

    def granularity(self, vae_config: Mapping[str, Any]) -> int:
        """Number of pixels that the sides of a picture must be multiples of."""

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of pictures (batch, 3, height, width), as latents."""

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, height, width) of latents (batch, channels, height, width)."""


def pixels_per_number(vae_config: Mapping[str, Any]) -> int:
    """Side of the square of pixels for one position of an autoencoder's output."""
    return int(2 ** (len(vae_config["block_out_channels"]) - 1))


class ScaledLatents:
    """Latents with a single scale and shift: Stable Diffusion's, with a shift of 0, and FLUX.1's.

    The shift is subtracted before the latents are scaled, as in diffusers.
    """

    def shape(self, vae: Any, height: int, width: int) -> tuple[int, int, int]:
        """See `LatentFormat.shape`."""
        factor = pixels_per_number(vae.config)
        return int(vae.config.latent_channels), height // factor, width // factor

    def granularity(self, vae_config: Mapping[str, Any]) -> int:
        """See `LatentFormat.granularity`."""
        return pixels_per_number(vae_config)

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `LatentFormat.encode`."""
        posterior = vae.encode(pixels).latent_dist
        scale = vae.config.scaling_factor
        return (posterior.mean - self._shift(vae)) * scale, posterior.std * scale

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """See `LatentFormat.decode`."""
        pixels: Tensor = vae.decode(latents / vae.config.scaling_factor + self._shift(vae), return_dict=False)[0]
        return pixels

    def _shift(self, vae: Any) -> float:
        return float(vae.config.get("shift_factor") or 0.0)


class NormalizedLatents:
    """Wan's and Qwen-Image's: each channel has a mean and a standard deviation, and a picture is a video of one frame.

    Source: diffusers' `AutoencoderKLQwenImage` and QwenImagePipeline.
    """

    def shape(self, vae: Any, height: int, width: int) -> tuple[int, int, int]:
        """See `LatentFormat.shape`."""
        factor = self.granularity(vae.config)
        return int(vae.config.z_dim), height // factor, width // factor

    def granularity(self, vae_config: Mapping[str, Any]) -> int:
        """See `LatentFormat.granularity`."""
        return int(2 ** len(vae_config["temperal_downsample"]))

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `LatentFormat.encode`."""
        posterior = vae.encode(pixels[:, :, None]).latent_dist
        mean, deviation = self._statistics(vae, pixels)
        return (posterior.mean[:, :, 0] - mean) / deviation, posterior.std[:, :, 0] / deviation

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """See `LatentFormat.decode`."""
        mean, deviation = self._statistics(vae, latents)
        frames: Tensor = vae.decode((latents * deviation + mean)[:, :, None], return_dict=False)[0]
        return frames[:, :, 0]

    def _statistics(self, vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (1, channels, 1, 1)."""
        mean, deviation = (
            torch.tensor(vae.config[name], dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return mean, deviation


class PatchedLatents:
    """FLUX.2's: patches of 2×2 become channels, which are normalised by the autoencoder's batch statistics.

    Source: black-forest-labs/flux2, autoencoder.py; diffusers' `AutoencoderKLFlux2` and Flux2Pipeline.
    """

    patch = 2

    def shape(self, vae: Any, height: int, width: int) -> tuple[int, int, int]:
        """See `LatentFormat.shape`."""
        factor = pixels_per_number(vae.config) * self.patch
        return int(vae.config.latent_channels) * self.patch**2, height // factor, width // factor

    def granularity(self, vae_config: Mapping[str, Any]) -> int:
        """See `LatentFormat.granularity`."""
        return pixels_per_number(vae_config) * self.patch

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `LatentFormat.encode`."""
        posterior = vae.encode(pixels).latent_dist
        mean, deviation = self._statistics(vae)
        return (self._patched(posterior.mean) - mean) / deviation, self._patched(posterior.std) / deviation

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """See `LatentFormat.decode`."""
        mean, deviation = self._statistics(vae)
        numbers = torch.nn.functional.pixel_shuffle(latents * deviation + mean, self.patch)
        pixels: Tensor = vae.decode(numbers, return_dict=False)[0]
        return pixels

    def _patched(self, numbers: Tensor) -> Tensor:
        """(batch, channels, height, width) → (batch, 4·channels, height / 2, width / 2): by row, then by column."""
        return torch.nn.functional.pixel_unshuffle(numbers, self.patch)

    def _statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (1, 4·channels, 1, 1)."""
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        return mean, torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
