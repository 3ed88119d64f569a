"""Models that say what is in a picture: CLIP, DINO, DINOv2. One contract: pictures in, normalised features out.

Preprocessing is each model's own, by transformers' processors that work on Pillow pictures, without torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core.devices import to_device
from ..core.errors import PicturesError, SettingsError, WeightsError
from ..core.events import Listener, Phase, stop_if_asked
from ..data.images import Picture
from ..models.hub import explained_opening, model_type, pillow_processor, title_of
from .feature_files import are_files, network_class, open_feature_files

_PROCESSORS = {"clip": "CLIPImageProcessor", "clip_vision_model": "CLIPImageProcessor", "dinov2": "BitImageProcessor"}
_PROCESSORS |= {"vit": "ViTImageProcessor"}
BATCH = 16  # pictures per forward pass


@dataclass(frozen=True)
class FeatureModel:
    """A model of pictures, and of prompts if it is a CLIP with a text tower.

    Attributes:
        name: For results: folder, file or hub name.
        kind: transformers' `model_type`: "clip", "clip_vision_model", "dinov2" or "vit".
        network: The transformers model, in float32.
        processor: Pictures → pixels, the model's own.
        tokenizer: Prompts → tokens; None without a text tower.
    """

    name: str
    kind: str
    network: Any
    processor: Any
    tokenizer: Any = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device  # type: ignore[no-any-return]

    def image_features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Normalised features (pictures, width), float32, on the CPU; of pictures of any size and mode."""
        starts = range(0, len(pictures), BATCH)
        return torch.cat([self.features_of(self.pixels(pictures[start : start + BATCH])) for start in starts])

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The model's own preprocessing, (pictures, 3, height, width), on the CPU."""
        found: Tensor = self.processor([one.convert("RGB") for one in pictures], return_tensors="pt")["pixel_values"]
        return found

    @torch.no_grad()
    def features_of(self, pixels: Tensor) -> Tensor:
        """Normalised features (pictures, width), float32, on the CPU, of preprocessed pictures."""
        return torch.nn.functional.normalize(self._pooled(pixels.to(self.device)).float(), dim=-1).cpu()

    def _pooled(self, pixels: Tensor) -> Tensor:
        """CLIP's projected class token; of the others the class token after the last norm, as their papers compare."""
        if self.kind == "clip":
            pooled = self.network.vision_model(pixel_values=pixels).pooler_output
            return self.network.visual_projection(pooled)  # type: ignore[no-any-return]
        if self.kind == "clip_vision_model":
            return self.network(pixel_values=pixels).image_embeds  # type: ignore[no-any-return]
        return self.network(pixel_values=pixels).last_hidden_state[:, 0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Normalised features (prompts, width), float32, on the CPU; prompts are cut to what the model reads.

        Raises:
            WeightsError: The model has no text tower.
        """
        if self.tokenizer is None:
            raise WeightsError(
                f"{self.name} reads no text, so it can't compare pictures with prompts.",
                "Give a whole CLIP model, such as openai/clip-vit-base-patch32.",
            )
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        pooled = self.network.text_model(**tokens).pooler_output
        features: Tensor = self.network.text_projection(pooled)
        return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def open_feature_model(
    source: str | Path, device: torch.device, *, download: bool = False, tokenizer: Path | None = None
) -> FeatureModel:
    """Open a feature model.

    Args:
        source: A folder as transformers writes it, a hub name such as "facebook/dino-vits16", a weight file, or the
            files of a CLIP's towers as "vision file + text file" (see `feature_files`).
        device: Where it computes.
        download: Whether a hub name may be fetched; otherwise only what the hub's cache holds is used.
        tokenizer: Folder of the CLIP tokenizer for a weight file that none lies beside.

    Raises:
        WeightsError: It is not there, or of no known kind; says which files to get and where to put them.
    """
    import transformers

    if are_files(source):
        files = open_feature_files(source, tokenizer)
        to_device(files.network, device, torch.float32)
        processor = pillow_processor(_PROCESSORS[files.kind]).from_dict(dict(files.preprocessing))
        return FeatureModel(files.name, files.kind, files.network.eval(), processor, files.tokenizer)
    local, name = not download, str(source)
    files_wanted = "config.json, model.safetensors and preprocessor_config.json (and a CLIP's tokenizer)"
    with explained_opening("feature model", name, files_wanted, "models/feature_models"):
        kind = model_type(name, _PROCESSORS, download=download)
        network = network_class(kind).from_pretrained(name, local_files_only=local)
        processor = pillow_processor(_PROCESSORS[kind]).from_pretrained(name, local_files_only=local)
        own_tokenizer = None
        if kind == "clip":
            own_tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
    to_device(network, device, torch.float32)
    return FeatureModel(title_of(name), kind, network.eval(), processor, own_tokenizer)


CLIP, DINO = "CLIP", "DINO"


class FeatureExtractors:
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
    ) -> FeatureExtractors:
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
                listener.report(Phase(title, start, len(pictures)))
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
        listener.report(Phase(title, len(pictures), len(pictures)))

    def read(self, prompts: Sequence[str]) -> Tensor:
        """CLIP's features of prompts, (prompts, width), normalised, float32, on the CPU.

        Raises:
            WeightsError: The CLIP model has no text tower.
        """
        unread = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._read]
        if unread:
            self._read |= dict(zip(unread, self.models[CLIP].text_features(unread), strict=True))
        return torch.stack([self._read[prompt] for prompt in prompts])
