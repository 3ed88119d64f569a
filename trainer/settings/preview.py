"""The settings of previews: pictures that are generated, and scored, while a run is training."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from ..core.errors import suggest
from ..core.prompts import PromptWords
from .base import MAX_SEED, Needs, Settings, filled_prompts, setting

_GROUP = "Previews"


class PreviewSettings(Settings):
    """What is generated at which steps, and how it is scored. None of it changes what is learned."""

    preview_every: int = setting(
        0,
        "Steps between previews: pictures generated with the weights of that step. Each also saves a checkpoint. 0: "
        "no previews.",
        unit="steps",
        group=_GROUP,
        ge=0,
        affects_result=False,
    )
    preview_prompts: str = setting(
        "",
        "Prompts for the previews, separated by '|'; {token} and {class} stand for the subject's words. Empty: the "
        "caption of the first picture.",
        group=_GROUP,
        advanced=True,
        affects_result=False,
        needs=Needs("preview_every"),
    )
    preview_count: int = setting(
        1,
        "Pictures per preview prompt. Use 4 or more for stable scores.",
        unit="pictures",
        group=_GROUP,
        ge=1,
        le=64,
        advanced=True,
        affects_result=False,
        needs=Needs("preview_every"),
    )
    preview_steps: int = setting(
        20,
        "Denoising steps per preview picture.",
        unit="steps",
        group=_GROUP,
        ge=1,
        le=200,
        advanced=True,
        affects_result=False,
        needs=Needs("preview_every"),
    )
    preview_guidance: float = setting(
        7.5,
        "Classifier-free guidance scale for the previews. 7.5 is typical; 1: no guidance.",
        group=_GROUP,
        ge=0.0,
        le=100.0,
        advanced=True,
        affects_result=False,
        needs=Needs("preview_every"),
    )
    preview_seed: int = setting(
        0,
        "Seed of each prompt's first preview picture, the same at every step.",
        group=_GROUP,
        ge=0,
        le=MAX_SEED,
        advanced=True,
        affects_result=False,
        needs=Needs("preview_every"),
    )
    base_preview: Literal["after-first-steps", "before-first-step", "off"] = setting(
        "after-first-steps",
        "When the base model's own previews, those of step 0, are generated. after-first-steps: once three steps have "
        "run, with the weights as they were before the first one (full fine-tuning: before it). off: not at all, "
        "unless previews are scored, which is done against them.",
        group=_GROUP,
        advanced=True,
        affects_result=False,
        needs=Needs("preview_every"),
    )
    token: str = setting(
        "sks",
        "Rare word (trigger word) of the subject. Scores leave it out of the prompts, since CLIP doesn't know it; "
        "drift is measured on what remains, such as 'a photo of a dog'.",
        group=_GROUP,
        advanced=True,
        affects_result=False,
    )
    score_clip: str = setting(
        "",
        "CLIP model that scores the previews (CLIP-T, CLIP-I, drift): a folder or a Hugging Face model ID such as "
        "openai/clip-vit-base-patch32. It runs on the CPU and takes no GPU memory. Empty: no CLIP scores.",
        group=_GROUP,
        advanced=True,
        affects_result=False,
        path=True,
    )
    score_dino: str = setting(
        "",
        "DINO or DINOv2 model that scores the previews, such as facebook/dino-vits16. Empty: no DINO scores.",
        group=_GROUP,
        advanced=True,
        affects_result=False,
        path=True,
    )
    early_stop: int = setting(
        0,
        "Stop after this many previews in a row in which the subject gets no better while the class keeps drifting, "
        "and keep the best checkpoint. 0: train all steps.",
        unit="previews",
        group=_GROUP,
        ge=0,
        le=100,
        advanced=True,
        affects_result=False,
    )

    @field_validator("preview_prompts")
    @classmethod
    def _templates_are_known(cls, prompts: str) -> str:
        filled_prompts("preview_prompts", prompts, PromptWords("sks", "dog"))  # whose words they are, a command knows
        return prompts

    @model_validator(mode="after")
    def _scores_need_previews(self) -> Self:
        if (self.score_clip or self.score_dino or self.early_stop) and not self.preview_every:
            raise ValueError(
                f"scores and {suggest('early_stop')} need previews: set {suggest('preview_every', 100)}, for example"
            )
        if self.early_stop and not (self.score_clip or self.score_dino):
            raise ValueError(
                f"{suggest('early_stop')} needs scores: choose a model for {suggest('score_clip')} or "
                f"{suggest('score_dino')}"
            )
        return self
