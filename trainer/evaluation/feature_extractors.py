"""Feature extractors: CLIP, DINO and DINOv2. One interface: pictures or prompts in, normalised features out.

Preprocessing is each model's own, by transformers' processors that work on Pillow images, without torchvision.
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
from torch.nn.functional import normalize

from ..core.devices import to_device
from ..core.errors import PicturesError, SettingsError, WeightsError
from ..core.events import Listener, Phase, stop_if_asked
from ..data.images import Picture
from ..models.hub import explained_opening, model_type, pillow_processor, source_title
from .feature_files import are_files, network_class, open_feature_files

CLIP = "CLIP"
DINO = "DINO"
BATCH = 16  # pictures per forward pass
_PROCESSORS = {
    "clip": "CLIPImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "dinov2": "BitImageProcessor",
    "vit": "ViTImageProcessor",
}


@dataclass(frozen=True)
class FeatureModel:
    """A model that encodes images, and prompts if it is a CLIP with a text tower.

    Attributes:
        name: For results: folder, file or hub name.
        kind: transformers' `model_type`: "clip", "clip_vision_model", "dinov2" or "vit".
        network: The transformers model, in float32.
        processor: Images → pixels, the model's own.
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

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalised features (images, width), float32, on the CPU; of images of any size and mode."""
        starts = range(0, len(images), BATCH)
        return torch.cat([self.pixel_features(self.pixels(images[start : start + BATCH])) for start in starts])

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """The model's own preprocessing, (images, 3, height, width), on the CPU."""
        rgb = [image.convert("RGB") for image in images]
        pixels: Tensor = self.processor(rgb, return_tensors="pt")["pixel_values"]
        return pixels

    @torch.no_grad()
    def pixel_features(self, pixels: Tensor) -> Tensor:
        """Normalised features (images, width), float32, on the CPU, of preprocessed images."""
        return normalize(self._pooled(pixels.to(self.device)).float(), dim=-1).cpu()

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
        """Normalised features (prompts, width), float32, on the CPU; longer prompts are truncated.

        Raises:
            WeightsError: The model has no text tower.
        """
        if self.tokenizer is None:
            raise WeightsError(
                f"{self.name} has no text encoder, so it can't compare pictures with prompts.",
                "Use a whole CLIP model, such as openai/clip-vit-base-patch32.",
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
        return normalize(features.float(), dim=-1).cpu()


def open_feature_model(
    source: str | Path, device: torch.device, *, download: bool = False, tokenizer: Path | None = None
) -> FeatureModel:
    """Open a feature model.

    Args:
        source: A folder as transformers writes it, a hub name such as "facebook/dino-vits16", a weight file, or the
            files of a CLIP's towers as "vision file + text file" (see `feature_files`).
        device: Where it computes.
        download: Whether a hub name may be fetched; otherwise only what the hub's cache holds is used.
        tokenizer: Folder of the CLIP tokenizer, for a weight file without one in its folder.

    Raises:
        WeightsError: It does not exist, or is of an unknown type; the remedy names the files to get and where to put
            them.
    """
    if are_files(source):
        files = open_feature_files(source, tokenizer)
        to_device(files.network, device, torch.float32)
        processor = pillow_processor(_PROCESSORS[files.kind]).from_dict(dict(files.preprocessing))
        return FeatureModel(files.name, files.kind, files.network.eval(), processor, files.tokenizer)
    return _open_from_hub(str(source), device, download=download)


def _open_from_hub(name: str, device: torch.device, *, download: bool) -> FeatureModel:
    """Open what transformers wrote, from a folder or by hub name."""
    import transformers

    local_files_only = not download
    wanted_files = "config.json, model.safetensors and preprocessor_config.json (and a CLIP's tokenizer)"
    with explained_opening("feature model", name, wanted_files, "models/feature_models"):
        kind = model_type(name, _PROCESSORS, download=download)
        network = network_class(kind).from_pretrained(name, local_files_only=local_files_only)
        processor = pillow_processor(_PROCESSORS[kind]).from_pretrained(name, local_files_only=local_files_only)
        tokenizer = None
        if kind == "clip":
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
    to_device(network, device, torch.float32)
    return FeatureModel(source_title(name), kind, network.eval(), processor, tokenizer)


class FeatureExtractors:
    """A CLIP model, a DINO model, or both, which encode each picture and each prompt once.

    Attributes:
        models: "CLIP", "DINO" → model, for those that exist.
    """

    def __init__(self, clip: FeatureModel | None = None, dino: FeatureModel | None = None) -> None:
        """Take opened models.

        Args:
            clip: For CLIP-T and CLIP-I.
            dino: DINO or DINOv2.
        """
        self.models = {name: model for name, model in ((CLIP, clip), (DINO, dino)) if model is not None}
        self._image_features: dict[str, dict[str, Tensor]] = {name: {} for name in self.models}  # by digest
        self._text_features: dict[str, Tensor] = {}  # by prompt

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
                "There is no model to score with.",
                "Choose a CLIP or a DINO model, such as openai/clip-vit-base-patch32.",
            )

        def opened(source: str) -> FeatureModel | None:
            if not source.strip():
                return None
            return open_feature_model(source.strip(), device, download=download, tokenizer=tokenizer)

        return cls(clip=opened(clip), dino=opened(dino))

    @property
    def reads_text(self) -> bool:
        """Whether there is a CLIP model with a text tower."""
        return CLIP in self.models and self.models[CLIP].tokenizer is not None

    def image_features(
        self, pictures: Sequence[Picture], listener: Listener, title: str = "scoring"
    ) -> dict[str, Tensor]:
        """Features of pictures, "CLIP" and "DINO": (pictures, width) each, normalised, float32, on the CPU.

        While the models encode some pictures, the next are opened and preprocessed.

        Args:
            pictures: At least one.
            listener: Gets the progress; may stop the work.
            title: What the progress is called.

        Raises:
            PicturesError: A model gives NaN or infinite values.
            CancelledError: The listener asked to stop.
        """
        new = {
            picture.digest: picture
            for picture in pictures
            if any(picture.digest not in known for known in self._image_features.values())
        }
        if new:
            self._encode(list(new.values()), listener, title)
        return {
            name: torch.stack([features[picture.digest] for picture in pictures])
            for name, features in self._image_features.items()
        }

    def _encode(self, pictures: Sequence[Picture], listener: Listener, title: str) -> None:
        """Compute and keep features of pictures."""

        def preprocessed(start: int) -> dict[str, Tensor]:
            images = [picture.open() for picture in pictures[start : start + BATCH]]
            return {name: model.pixels(images) for name, model in self.models.items()}

        with ThreadPoolExecutor(max_workers=1) as pool:
            next_batch = pool.submit(preprocessed, 0)
            for start in range(0, len(pictures), BATCH):
                listener.report(Phase(title, start, len(pictures)))
                stop_if_asked(listener)
                pixels = next_batch.result()
                if start + BATCH < len(pictures):
                    next_batch = pool.submit(preprocessed, start + BATCH)
                for name, model in self.models.items():
                    features = model.pixel_features(pixels[name])
                    if not torch.isfinite(features).all():
                        raise PicturesError(
                            f"{model.name} computes NaN or infinite features.", "Use another model file."
                        )
                    for picture, row in zip(pictures[start : start + BATCH], features, strict=True):
                        self._image_features[name][picture.digest] = row
        listener.report(Phase(title, len(pictures), len(pictures)))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """CLIP's features of prompts, (prompts, width), normalised, float32, on the CPU.

        Raises:
            WeightsError: The CLIP model has no text tower.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_features]
        if new:
            self._text_features |= dict(zip(new, self.models[CLIP].text_features(new), strict=True))
        return torch.stack([self._text_features[prompt] for prompt in prompts])
