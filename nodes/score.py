"""Score pictures: how well they follow their prompts, and how much they show the subject."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import host, host_models
from .api import io
from .base import Node
from .host_progress import NodeListener
from .subject import SubjectValue
from .widgets import CATEGORY, SUBJECT, as_setting

_CLIP_TOOLTIP = (
    "CLIP model: a folder in models/feature_models (config.json, model.safetensors, preprocessor_config.json and the "
    "tokenizer's files), a file in models/clip_vision (for prompts a whole CLIP, or vision file + text file), a "
    "path, or a Hugging Face model ID. The papers use openai/clip-vit-base-patch32."
)
_DINO_TOOLTIP = (
    "DINO or DINOv2 model: a folder in models/feature_models (config.json, model.safetensors, "
    "preprocessor_config.json), a file in models/clip_vision, a path, or a Hugging Face model ID. The DreamBooth "
    "paper uses facebook/dino-vits16. Empty: no DINO scores."
)


def clip_input() -> io.Input:
    """The CLIP model to measure with."""
    default = "openai/clip-vit-base-patch32"
    return as_setting("clip", io.String.Input("clip_model", default=default, tooltip=_CLIP_TOOLTIP))


def dino_input(default: str = "facebook/dino-vits16") -> io.Input:
    """The DINO model to measure with."""
    return as_setting("dino", io.String.Input("dino_model", default=default, tooltip=_DINO_TOOLTIP))


def download_input() -> io.Input:
    """Whether the models may be fetched."""
    tooltip = "Download models from Hugging Face if they aren't there yet."
    return io.Boolean.Input("download", default=False, tooltip=tooltip)


def open_feature_extractors(clip: str, dino: str, *, download: bool) -> Any:
    """The engine's `FeatureExtractors` of models named as in ComfyUI's folders; blank: none."""
    import torch

    from ..trainer.evaluation.feature_extractors import FeatureExtractors

    clip_path, dino_path = (host_models.feature_model(name.strip()) if name.strip() else "" for name in (clip, dino))
    device = torch.device(host.device_name())
    return FeatureExtractors.open(
        clip_path, dino_path, device, download=download, tokenizer=host_models.clip_tokenizer()
    )


def prompt_lines(text: str) -> list[str]:
    """The prompts of a text, one on each line.

    Raises:
        PicturesError: A line holds several prompts, or templates.
    """
    from ..trainer.core.errors import PicturesError
    from ..trainer.data.folder import AnnotationOptions

    lines = []
    for line in text.splitlines():
        prompts = AnnotationOptions().prompts(line, f"The prompt '{line.strip()}'")
        if len(prompts) > 1:
            raise PicturesError(f"'{line.strip()}' contains {len(prompts)} prompts.", "Write one per line.")
        lines += prompts
    return lines


def _score(
    node: type[io.ComfyNode],
    images: Any,
    *,
    prompts: Sequence[str] = (),
    references: Sequence[Any] = (),
    clip: str,
    dino: str = "",
    download: bool,
) -> Any:
    """The engine's `ScoreTable` of an IMAGE batch."""
    from ..trainer.data.images import load_pictures
    from ..trainer.evaluation.score_table import score_pictures

    listener = NodeListener(node)
    pictures = load_pictures(list(images), "", listener)
    with host.interruptible():
        feature_extractors = open_feature_extractors(clip, dino, download=download)
        return score_pictures(pictures, prompts, references, feature_extractors, listener)


class ClipScore(Node):
    """Scores pictures against their prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothClipScore",
            display_name="CLIP Score (DreamBooth)",
            category=CATEGORY,
            description="Measures how well pictures follow their prompts (CLIP-T).",
            search_aliases=["clip-t", "clip score", "prompt following", "evaluate"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures to score."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt for all pictures, or one line per picture.",
                ),
                clip_input(),
                download_input(),
            ],
            outputs=[
                io.Float.Output(display_name="clip_t", tooltip="Mean cosine similarity between picture and prompt."),
                io.Float.Output(display_name="clip_score", tooltip="Mean of 100 · max(cosine, 0)."),
                io.String.Output(display_name="table", tooltip="One line per picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Any, prompts: str, clip_model: str, download: bool) -> io.NodeOutput:
        """Score."""
        from ..trainer.core.errors import PicturesError
        from ..trainer.evaluation.metrics import CLIP_SCORE, CLIP_T

        lines = prompt_lines(prompts)
        if not lines:
            raise PicturesError("There are no prompts to score against.", "Write what the pictures should show.")
        table = _score(cls, images, prompts=lines, clip=clip_model, download=download)
        text = table.as_text()
        return io.NodeOutput(table.means[CLIP_T], table.means[CLIP_SCORE], text, ui={"text": [text]})


class SubjectScore(Node):
    """Scores pictures against real pictures of the subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothSubjectScore",
            display_name="Subject Score (DreamBooth)",
            category=CATEGORY,
            description="Measures how closely pictures match your subject: mean cosine similarity to its real "
            "pictures by CLIP (CLIP-I) and DINO.",
            search_aliases=["clip-i", "dino", "subject fidelity", "evaluate", "likeness"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures to score."),
                SUBJECT.Input("subject", tooltip="Real pictures of the subject, to compare with."),
                clip_input(),
                dino_input(),
                download_input(),
            ],
            outputs=[
                io.Float.Output(
                    display_name="clip_i", tooltip="Mean CLIP-I of the pictures; NaN without a CLIP model."
                ),
                io.Float.Output(
                    display_name="dino", tooltip="Mean DINO score of the pictures; NaN without a DINO model."
                ),
                io.String.Output(display_name="table", tooltip="One line per picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, images: Any, subject: SubjectValue, clip_model: str, dino_model: str, download: bool
    ) -> io.NodeOutput:
        """Score."""
        from ..trainer.evaluation.metrics import CLIP_I, DINO_I

        table = _score(cls, images, references=subject.pictures, clip=clip_model, dino=dino_model, download=download)
        clip_i = table.means.get(CLIP_I, math.nan)
        dino = table.means.get(DINO_I, math.nan)
        text = table.as_text()
        return io.NodeOutput(clip_i, dino, text, ui={"text": [text]})
