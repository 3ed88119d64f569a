"""Score pictures: how well they follow their prompts, and how much they show the subject."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from . import host, host_models
from .base import Node
from .host_progress import NodeListener
from .subject import SubjectValue
from .widgets import CATEGORY, SUBJECT

_MODEL = (
    "A folder in models/feature_models (config.json, model.safetensors, preprocessor_config.json{more}), a file in "
    "models/clip_vision{join}, a path, or a hub name. {paper}"
)
_DOWNLOAD = "Fetch a model that is given by its hub name and is not there yet."


def clip_input() -> io.Input:
    """Which CLIP model judges."""
    paper = "The papers' is openai/clip-vit-base-patch32."
    join = " (for prompts a whole CLIP, or vision file + text file)"
    tooltip = _MODEL.format(more=" and the tokenizer's files", join=join, paper=paper)
    return io.String.Input("clip_model", default="openai/clip-vit-base-patch32", tooltip=tooltip)


def dino_input(default: str = "facebook/dino-vits16") -> io.Input:
    """Which DINO model judges."""
    paper = "The DreamBooth paper's is facebook/dino-vits16. Empty: not measured."
    return io.String.Input("dino_model", default=default, tooltip=_MODEL.format(more="", join="", paper=paper))


def download_input() -> io.Input:
    """Whether the models may be fetched."""
    return io.Boolean.Input("download", default=False, tooltip=_DOWNLOAD)


def open_judges(clip: str, dino: str, download: bool) -> Any:
    """The engine's `FeatureExtractors` of models named as ComfyUI's folders have them; blank: none."""
    import torch

    from ..trainer.evaluation.feature_extractors import FeatureExtractors

    names = [host_models.feature_model(name.strip()) if name.strip() else "" for name in (clip, dino)]
    device = torch.device(host.device_name())
    return FeatureExtractors.open(*names, device, download=download, tokenizer=host_models.clip_tokenizer())


def _score(
    node_id: str, images: Any, prompts: Sequence[str], references: Sequence[Any], clip: str, dino: str, download: bool
) -> Any:
    """The engine's `ScoreTable` of an IMAGE batch."""
    from ..trainer.data.images import load_pictures
    from ..trainer.evaluation.score_table import score_pictures

    listener = NodeListener(node_id)
    pictures = load_pictures(list(images), "", listener)
    with host.interruptible():
        return score_pictures(pictures, prompts, references, open_judges(clip, dino, download), listener)


class ClipScore(Node):
    """Scores pictures against their prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothClipScore",
            display_name="CLIP Score (DreamBooth)",
            category=CATEGORY,
            description="How well pictures follow their prompts: CLIP-T.",
            search_aliases=["clip-t", "clip score", "prompt following", "evaluate"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures."),
                io.String.Input(
                    "prompts", multiline=True, default="", tooltip="One prompt for all, or a line for each picture."
                ),
                clip_input(),
                download_input(),
            ],
            outputs=[
                io.Float.Output(display_name="clip_t", tooltip="Mean cosine of picture and prompt."),
                io.Float.Output(display_name="clip_score", tooltip="Mean of 100 · max(cosine, 0)."),
                io.String.Output(display_name="table", tooltip="A line for each picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Any, prompts: str, clip_model: str, download: bool) -> io.NodeOutput:
        """Score."""
        from ..trainer.core.errors import PicturesError

        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise PicturesError("There is no prompt to score by.", "Write what the pictures should show.")
        table = _score(cls.hidden.unique_id, images, lines, [], clip_model, "", download)
        text = table.as_text()
        return io.NodeOutput(table.means["CLIP-T"], table.means["CLIPScore"], text, ui={"text": [text]})


class SubjectScore(Node):
    """Scores pictures against real pictures of the subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothSubjectScore",
            display_name="Subject Score (DreamBooth)",
            category=CATEGORY,
            description="How much pictures show your subject: CLIP-I and DINO, the mean cosine to its real pictures.",
            search_aliases=["clip-i", "dino", "subject fidelity", "evaluate", "likeness"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures."),
                SUBJECT.Input("subject", tooltip="The real pictures."),
                clip_input(),
                dino_input(),
                download_input(),
            ],
            outputs=[
                io.Float.Output(display_name="clip_i", tooltip="Mean over the pictures; NaN without a CLIP model."),
                io.Float.Output(display_name="dino", tooltip="Mean over the pictures; NaN without a DINO model."),
                io.String.Output(display_name="table", tooltip="A line for each picture."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, images: Any, subject: SubjectValue, clip_model: str, dino_model: str, download: bool
    ) -> io.NodeOutput:
        """Score."""
        table = _score(cls.hidden.unique_id, images, [], subject.pictures, clip_model, dino_model, download)
        means = [table.means.get(name, math.nan) for name in ("CLIP-I", "DINO")]
        text = table.as_text()
        return io.NodeOutput(*means, text, ui={"text": [text]})
