"""All randomness of a run: a pure function of (run seed, step, sample slot).

No random state is carried from step to step, so a resumed run gets the same random numbers as an uninterrupted one,
and a run on several processes uses the same samples.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


def derived_seed(*parts: int | str) -> int:
    """A 64-bit seed that depends on every part, in order.

    Args:
        parts: Integers of any size, and strings.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derived_seed(*parts)`, so that its numbers do not depend on the device."""
    return torch.Generator().manual_seed(derived_seed(*parts))


@contextlib.contextmanager
def seeded(device: torch.device, *parts: int | str) -> Iterator[None]:
    """Random numbers used inside the block, e.g. by dropout, depend on `parts` alone; global state is restored."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(*parts))
        yield


@dataclass(frozen=True)
class Draw:
    """What one sample slot of one step uses.

    Attributes:
        item: Index of the picture in the list of an epoch.
        flip: Whether its mirrored version is used.
        timestep: Diffusion timestep, in [0, timesteps).
        posterior_noise: Standard normal, shape of the latents: determines the sample of the posterior.
        noise: Standard normal, shape of the latents: the noise to be added.
        timestep_fraction: Uniform in (0, 1): the position between this timestep and the next.
        caption: Uniform in (0, 1): selects one of the picture's captions.
        drop: Uniform in (0, 1): the caption is dropped if this is below the run's caption_dropout.
        source: Generator for whatever else the sample needs.
    """

    item: int
    flip: bool
    timestep: int
    posterior_noise: torch.Tensor
    noise: torch.Tensor
    timestep_fraction: float
    caption: float
    drop: float
    source: torch.Generator


def _item(seed: int, kind: str, number: int, count: int) -> int:
    """The picture of the `number`-th sample of a run: every epoch is a permutation of its own."""
    epoch, position = divmod(number, count)
    return int(_order(seed, kind, epoch, count)[position])


@functools.lru_cache(maxsize=8)  # every sample needs it, and repeats can make an epoch long
def _order(seed: int, kind: str, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=generator(seed, kind, "epoch", epoch))


def draw_sample(
    seed: int,
    kind: str,
    step: int,
    slot: int,
    slots: int,
    latent_shapes: Sequence[tuple[int, ...]],
    timesteps: int = 1000,
    flip: bool = False,
) -> Draw:
    """Draw one sample.

    Args:
        seed: The run's seed.
        kind: Which set of pictures, "instance" or "class"; the sets are independent.
        step: Optimiser step, from 0.
        slot: Index of the sample within the step, in [0, slots); counts over micro-batches and processes.
        slots: Samples of this kind per step.
        latent_shapes: Shape of the latents of each picture of an epoch, (channels, height, width).
        timesteps: Number of diffusion timesteps.
        flip: Whether half of the samples are mirrored.
    """
    source = generator(seed, kind, step, slot)
    further = generator(seed, kind, step, slot, "further")
    uniform = torch.rand(3, generator=further, dtype=torch.float64) * (1 - 2e-9) + 1e-9
    timestep_fraction, caption, drop = uniform.tolist()
    item = _item(seed, kind, step * slots + slot, len(latent_shapes))
    return Draw(
        item=item,
        flip=bool(torch.randint(2, (), generator=source)) and flip,
        timestep=int(torch.randint(timesteps, (), generator=source)),
        posterior_noise=torch.randn(latent_shapes[item], generator=source),
        noise=torch.randn(latent_shapes[item], generator=source),
        timestep_fraction=timestep_fraction,
        caption=caption,
        drop=drop,
        source=further,
    )
