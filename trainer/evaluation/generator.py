"""Generates pictures with a base model and adapters, and keeps them, so that interrupted work continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..adapters.apply import merge_into
from ..adapters.kohya import Adapter, file_hashes
from ..core.devices import explained_memory_errors, release
from ..core.errors import suggest
from ..core.events import Listener, Phase, stop_if_asked
from ..data.image_cache import ImageCache
from ..data.images import Picture
from ..models.families.base import BaseWeights, DiffusionModel
from ..models.sampling import GenerationConfig, build_on_device, generate
from ..settings.evaluate import CompareSettings

Adapters = Sequence[tuple[Adapter, float]]
"""Adapters with their strengths."""
AdapterIdentity = list[list[object]]
"""Hash and strength of each adapter, as JSON values."""


@dataclass(frozen=True)
class SampleConfig(GenerationConfig):
    """The number of pictures per prompt, their noise, and how they are generated.

    Attributes:
        width: Pixels; a multiple of 8.
        height: Pixels; a multiple of 8.
        count: Pictures of each prompt; picture i of every prompt starts from the noise of `seed + i`.
        seed: Of the first.
        batch_size: Pictures generated at once; they don't depend on it, except for rounding.
    """

    width: int = 512
    height: int = 512
    count: int = 4
    seed: int = 0
    batch_size: int = 4

    @property
    def seeds(self) -> range:
        """The seed of each picture of a prompt."""
        return range(self.seed, self.seed + self.count)

    @property
    def key(self) -> dict[str, object]:
        """What a picture depends on besides its model and prompt, as JSON values for its folder's name."""
        values = {name: value for name, value in asdict(self).items() if name not in ("count", "batch_size")}
        if not self.negative_prompt:
            del values["negative_prompt"]
        return values


def sample_configs(settings: CompareSettings) -> list[SampleConfig]:
    """A config for every scheduler and number of steps that the settings ask for."""
    width, height = settings.width_height
    return [
        SampleConfig(
            width=width,
            height=height,
            scheduler=scheduler,
            steps=steps,
            guidance=settings.guidance,
            count=settings.count,
            seed=settings.picture_seed,
            batch_size=settings.picture_batch_size,
        )
        for scheduler, steps in settings.grid
    ]


@dataclass(frozen=True)
class _MissingPictures:
    """Pictures of a prompt that are not in its cache yet, by number."""

    prompt: str
    cache: ImageCache
    numbers: Sequence[int]


class CachedGenerator:
    """A base model, a device, and a folder for the generated pictures.

    Attributes:
        base: The opened base model; never written to.
        listener: Gets the progress; may stop the work.
    """

    def __init__(self, base: BaseWeights, root: Path, device: torch.device, precision: str, listener: Listener) -> None:
        """Take the base; nothing is built yet.

        Args:
            base: The opened base model; never written to.
            root: Folder in which the pictures are kept.
            device: Where to compute.
            precision: Of the UNet: "fp32", "bf16" or "fp16".
            listener: Gets the progress; may stop the work.
        """
        self.base = base
        self.listener = listener
        self._root = root
        self._device = device
        self._precision = precision
        self._model: DiffusionModel | None = None
        self._model_identity: AdapterIdentity = []

    def generate(self, adapters: Adapters, prompts: Sequence[str], config: SampleConfig, title: str) -> list[Picture]:
        """Pictures of prompts, `config.count` of each, prompt by prompt; captioned with their prompts.

        Args:
            adapters: Applied to the base, with their strengths.
            prompts: What the pictures show.
            config: How many, and how they are generated.
            title: What the progress is called.

        Raises:
            AdapterError: An adapter does not fit the base.
            StorageError: The folder can't be written.
            OutOfMemoryError: The device ran out of memory.
            CancelledError: The listener asked to stop; finished pictures are kept.
        """
        identity: AdapterIdentity = [
            [file_hashes(adapter.state_dict(), {})[0], strength] for adapter, strength in adapters
        ]
        caches: dict[str, ImageCache] = {}
        missing: list[_MissingPictures] = []
        for prompt in dict.fromkeys(prompts):
            cache = ImageCache(self._root, self._key(identity, prompt) | config.key)
            numbers = [number for number in range(config.count) if not cache.has(_file_name(number))]
            if numbers:
                cache.prepare(len(numbers), config.width * config.height)
                missing.append(_MissingPictures(prompt, cache, numbers))
            caches[prompt] = cache
        total = len(caches) * config.count
        done = total - sum(len(of_prompt.numbers) for of_prompt in missing)
        with explained_memory_errors(f"the pictures' size or {suggest('picture_batch_size')}"):
            for of_prompt in missing:
                model = self._model_with(adapters, identity)
                for start in range(0, len(of_prompt.numbers), config.batch_size):
                    self.listener.report(Phase(title, done, total))
                    stop_if_asked(self.listener)
                    batch = of_prompt.numbers[start : start + config.batch_size]
                    seeds = [config.seeds[number] for number in batch]
                    images = generate(model, of_prompt.prompt, seeds, config, self.listener)
                    for number, image in zip(batch, images, strict=True):
                        of_prompt.cache.save(_file_name(number), image)
                    done += len(batch)
        self.listener.report(Phase(title, total, total))
        return [caches[prompt].load(_file_name(number), prompt) for prompt in prompts for number in range(config.count)]

    def close(self) -> None:
        """Drop the model and free its memory."""
        self._model = None
        release(self._device)

    def _key(self, identity: AdapterIdentity, prompt: str) -> dict[str, object]:
        return {
            "base": self.base.fingerprint,
            "adapters": identity,
            "prompt": prompt,
            "precision": self._precision,
        }

    def _model_with(self, adapters: Adapters, identity: AdapterIdentity) -> DiffusionModel:
        """The model with these adapters; the last one is kept."""
        if self._model is None or self._model_identity != identity:
            self.close()
            model = build_on_device(self.base, self._device, self._precision)
            for adapter, strength in adapters:
                merge_into(model, adapter, strength)
            self._model = model
            self._model_identity = identity
        return self._model


def _file_name(number: int) -> str:
    return f"{number:05d}.png"
