"""The models that judge pictures, with a memory: each looks at a picture once, however often it is compared."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import PicturesError, SettingsError
from .events import Listener, Phase, stop_if_asked
from .feature_models import BATCH, FeatureModel, open_feature_model
from .pictures import Picture

CLIP, DINO = "CLIP", "DINO"


class Judges:
    """A CLIP model, a DINO model, or both."""

    def __init__(self, clip: FeatureModel | None = None, dino: FeatureModel | None = None) -> None:
        """Take opened models.

        Args:
            clip: For CLIP-T and CLIP-I.
            dino: DINO or DINOv2.
        """
        self.models = {name: model for name, model in ((CLIP, clip), (DINO, dino)) if model is not None}
        self._seen: dict[str, dict[str, Tensor]] = {name: {} for name in self.models}
        self._read: dict[str, Tensor] = {}

    @classmethod
    def open(
        cls, clip: str, dino: str, device: torch.device, *, download: bool = False, tokenizer: Path | None = None
    ) -> Judges:
        """Open models by folder, file or hub name; blank: none. See `open_feature_model`.

        Raises:
            WeightsError: One can't be opened.
            SettingsError: Both are blank.
        """
        if not (clip.strip() or dino.strip()):
            raise SettingsError(
                "There is no model to score by.", "Name a CLIP or a DINO model, such as openai/clip-vit-base-patch32."
            )
        sources = (clip.strip(), dino.strip())
        more: dict[str, Any] = {"download": download, "tokenizer": tokenizer}
        opened = [open_feature_model(one, device, **more) if one else None for one in sources]
        return cls(*opened)

    @property
    def reads_text(self) -> bool:
        """Whether there is a CLIP model with a text tower."""
        return CLIP in self.models and self.models[CLIP].tokenizer is not None

    def look(self, pictures: Sequence[Picture], listener: Listener, title: str = "scoring") -> dict[str, Tensor]:
        """Features of pictures, "CLIP" and "DINO": (pictures, width) each, normalised, float32, on the CPU.

        While the models look at some pictures, the next are opened and preprocessed.

        Args:
            pictures: One at least.
            listener: Told of the progress; may stop the work.
            title: What the progress is called.

        Raises:
            PicturesError: A model gives numbers that are not finite.
            CancelledError: The listener asked to stop.
        """
        unseen = {one.digest: one for one in pictures if any(one.digest not in seen for seen in self._seen.values())}
        self._look_at(list(unseen.values()), listener, title)
        return {name: torch.stack([seen[one.digest] for one in pictures]) for name, seen in self._seen.items()}

    def _look_at(self, pictures: Sequence[Picture], listener: Listener, title: str) -> None:
        def prepared(start: int) -> dict[str, Tensor]:
            opened = [one.open() for one in pictures[start : start + BATCH]]
            return {name: model.pixels(opened) for name, model in self.models.items()}

        if not pictures:
            return
        with ThreadPoolExecutor(max_workers=1) as pool:
            coming = pool.submit(prepared, 0)
            for start in range(0, len(pictures), BATCH):
                listener.tell(Phase(title, start, len(pictures)))
                stop_if_asked(listener)
                pixels = coming.result()
                if start + BATCH < len(pictures):
                    coming = pool.submit(prepared, start + BATCH)
                for name, model in self.models.items():
                    rows = model.features_of(pixels[name])
                    if not torch.isfinite(rows).all():
                        raise PicturesError(
                            f"{model.name} gives numbers that are not finite.", "Choose another model file."
                        )
                    self._seen[name] |= {
                        one.digest: row for one, row in zip(pictures[start : start + BATCH], rows, strict=True)
                    }
        listener.tell(Phase(title, len(pictures), len(pictures)))

    def read(self, prompts: Sequence[str]) -> Tensor:
        """CLIP's features of prompts, (prompts, width), normalised, float32, on the CPU.

        Raises:
            WeightsError: The CLIP model has no text tower.
        """
        unread = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._read]
        if unread:
            self._read |= dict(zip(unread, self.models[CLIP].text_features(unread), strict=True))
        return torch.stack([self._read[prompt] for prompt in prompts])
