"""A base model that draws with adapters. Every picture is kept, so that what was interrupted goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..adapters.apply import merge_into
from ..adapters.kohya import Adapter, file_hashes
from ..core.devices import explained_memory_errors, release
from ..core.events import Listener, Phase, stop_if_asked
from ..data.image_cache import ImageCache
from ..data.images import Picture
from ..models.families.base import BaseWeights, DiffusionModel
from ..models.sampling import GenerationConfig, generate, ready_model
from ..settings.evaluate import CompareSettings
from ..settings.train import SchedulerName

Adapters = Sequence[tuple[Adapter, float]]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Attributes:
        count: Pictures of each prompt; picture i of every prompt begins with the noise of `seed + i`.
        seed: Of the first.
        width: Pixels; a multiple of 8.
        height: Pixels; a multiple of 8.
        scheduler: See `sampling.make_scheduler`.
        steps: Denoising steps.
        guidance: Classifier-free guidance.
        batch: Pictures at once; what is drawn does not depend on it, but for rounding.
    """

    count: int = 4
    seed: int = 0
    width: int = 512
    height: int = 512
    scheduler: SchedulerName = "ddim"
    steps: int = 30
    guidance: float = 7.5
    batch: int = 4

    @property
    def seeds(self) -> range:
        """One for each picture of a prompt."""
        return range(self.seed, self.seed + self.count)


class CachedGenerator:
    """A base model, a device, and a folder for pictures."""

    def __init__(self, base: BaseWeights, root: Path, device: torch.device, precision: str, listener: Listener) -> None:
        """Take the base; nothing is built yet.

        Args:
            base: The opened base model; never written to.
            root: Folder in which the pictures are kept.
            device: Where to draw.
            precision: Of the UNet.
            listener: Told of the progress; may stop the work.
        """
        self.base, self.listener = base, listener
        self._root, self._device, self._precision = root, device, precision
        self._built: tuple[list[list[object]], DiffusionModel] | None = None

    def draw(self, adapters: Adapters, prompts: Sequence[str], drawing: Drawing, title: str) -> list[Picture]:
        """Pictures of prompts, `drawing.count` of each, prompt by prompt; captioned with their prompts.

        Args:
            adapters: Applied to the base, with their strengths.
            prompts: What to draw.
            drawing: How.
            title: What the progress is called.

        Raises:
            AdapterError: An adapter does not fit the base.
            StorageError: The folder can't be written.
            OutOfMemoryError: The memory does not suffice.
            CancelledError: The listener asked to stop; what is drawn is kept.
        """
        identity = [[file_hashes(adapter.state_dict(), {})[0], strength] for adapter, strength in adapters]
        how = {name: value for name, value in asdict(drawing).items() if name not in ("count", "batch")}
        names, galleries, missing = [f"{number:05d}.png" for number in range(drawing.count)], {}, []
        for prompt in dict.fromkeys(prompts):
            what = {"base": self.base.fingerprint, "adapters": identity, "prompt": prompt, "precision": self._precision}
            gallery = galleries[prompt] = ImageCache(self._root, what | how)
            lacking = [number for number, name in enumerate(names) if not gallery.has(name)]
            if lacking:
                gallery.begin(len(lacking), drawing.width * drawing.height)
                missing.append((gallery, prompt, lacking))
        total = len(galleries) * drawing.count
        done = total - sum(len(lacking) for _, _, lacking in missing)
        with explained_memory_errors("the pictures' size or how many are drawn at once"):
            for gallery, prompt, lacking in missing:
                model = self._model(adapters, identity)
                for start in range(0, len(lacking), drawing.batch):
                    self.listener.report(Phase(title, done, total))
                    stop_if_asked(self.listener)
                    numbers = lacking[start : start + drawing.batch]
                    images = generate(
                        model,
                        prompt,
                        [drawing.seeds[number] for number in numbers],
                        GenerationConfig(
                            width=drawing.width,
                            height=drawing.height,
                            scheduler=drawing.scheduler,
                            steps=drawing.steps,
                            guidance=drawing.guidance,
                        ),
                        self.listener,
                    )
                    for number, image in zip(numbers, images, strict=True):
                        gallery.put(f"{number:05d}.png", image)
                    done += len(numbers)
        self.listener.report(Phase(title, total, total))
        return [galleries[prompt].picture(name, prompt) for prompt in prompts for name in names]

    def close(self) -> None:
        """Drop the model and give its memory back."""
        self._built = None
        release(self._device)

    def _model(self, adapters: Adapters, identity: list[list[object]]) -> DiffusionModel:
        """The model with these adapters; the last one is kept."""
        if self._built is None or self._built[0] != identity:
            self.close()
            model = ready_model(self.base, self._device, self._precision)
            for adapter, strength in adapters:
                merge_into(model, adapter, strength)
            self._built = (identity, model)
        return self._built[1]


def drawings(settings: CompareSettings) -> list[Drawing]:
    """Every way to draw that the settings ask for."""
    width, height = settings.width_height
    common = (settings.count, settings.picture_seed, width, height)
    return [
        Drawing(*common, scheduler, steps, settings.guidance, settings.picture_batch_size)
        for scheduler, steps in settings.grid
    ]
