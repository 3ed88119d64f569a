"""All randomness of a run: a pure function of (run seed, step, sample slot).

Nothing is drawn from a stream, so a resumed run draws what the uninterrupted run would have drawn,
and a run split over several processes sees the same samples.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


def derived_seed(*parts: int | str) -> int:
    """A 64-bit seed that depends on every part, in order.

    Args:
        parts: Whole numbers of any size, and strings.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derived_seed(*parts)`, so that draws are the same on every device."""
    return torch.Generator().manual_seed(derived_seed(*parts))


@contextlib.contextmanager
def seeded(device: torch.device, *parts: int | str) -> Iterator[None]:
    """What layers draw themselves inside, such as dropout, depends on `parts` alone; global generators come back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(*parts))
        yield


@dataclass(frozen=True)
class Draw:
    """What one sample slot of one step uses.

    Attributes:
        item: Index of the picture in its set.
        flip: Whether its mirrored version is used.
        timestep: Diffusion timestep, in [0, timesteps).
        posterior_noise: Standard normal, shape of the latents: picks a sample of the posterior.
        noise: Standard normal, shape of the latents: the noise to be added.
    """

    item: int
    flip: bool
    timestep: int
    posterior_noise: torch.Tensor
    noise: torch.Tensor


def _item(seed: int, kind: str, number: int, count: int) -> int:
    """The picture of the `number`-th sample of a run: every epoch is a permutation of its own."""
    epoch, place = divmod(number, count)
    return int(torch.randperm(count, generator=generator(seed, kind, "epoch", epoch))[place])


def draw(
    seed: int,
    kind: str,
    step: int,
    slot: int,
    slots: int,
    count: int,
    latent_shape: tuple[int, ...],
    timesteps: int = 1000,
    flip: bool = False,
) -> Draw:
    """Draw one sample.

    Args:
        seed: The run's seed.
        kind: Which set of pictures, "instance" or "class"; sets draw independently.
        step: Optimiser step, from 0.
        slot: Place of the sample within the step, in [0, slots); counts over micro-batches and processes.
        slots: Samples of this kind per step.
        count: Pictures in the set.
        latent_shape: Shape of one picture's latents, (channels, height, width).
        timesteps: Number of diffusion timesteps.
        flip: Whether half of the samples are mirrored.
    """
    source = generator(seed, kind, step, slot)
    return Draw(
        item=_item(seed, kind, step * slots + slot, count),
        flip=bool(torch.randint(2, (), generator=source)) and flip,
        timestep=int(torch.randint(timesteps, (), generator=source)),
        posterior_noise=torch.randn(latent_shape, generator=source),
        noise=torch.randn(latent_shape, generator=source),
    )
