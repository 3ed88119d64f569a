"""Models that say what is in a picture: CLIP, DINO, DINOv2. One contract: pictures in, normalised features out.

Preprocessing is each model's own, by transformers' processors that work on Pillow pictures, without torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .devices import place
from .errors import WeightsError
from .feature_files import are_files, network_class, open_feature_files
from .pretrained import explained_opening, model_type, pillow_processor, title_of

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
        place(files.network, device, torch.float32)
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
    place(network, device, torch.float32)
    return FeatureModel(title_of(name), kind, network.eval(), processor, own_tokenizer)
