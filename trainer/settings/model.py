"""The settings of the base model: where it comes from and where it runs."""

from __future__ import annotations

from typing import Literal

from .base import Settings, TidyPath, setting

PredictionType = Literal["auto", "epsilon", "v_prediction"]


class BaseSettings(Settings):
    """Where the base model comes from and where it runs."""

    base: TidyPath = setting(
        ...,
        "Base model: a single-file checkpoint (.safetensors or .ckpt) or a folder in diffusers' layout.",
        group="Base model",
        path=True,
    )
    tokenizer: TidyPath | None = setting(
        None,
        "Folder with the CLIP tokenizer (vocab.json, merges.txt). Needed only for a single-file checkpoint that "
        "lies outside a ComfyUI installation; found by itself otherwise.",
        group="Base model",
        advanced=True,
        affects_result=False,
        path=True,
    )
    vae: TidyPath | None = setting(
        None,
        "Another autoencoder: a file, or a folder of diffusers. It computes in fp32, so SDXL's own works, too.",
        group="Base model",
        advanced=True,
        path=True,
    )
    prediction_type: PredictionType = setting(
        "auto",
        "What the base model predicts. auto: as the checkpoint or folder says, and for Stable Diffusion 2.x as its "
        "weights show.",
        group="Base model",
        advanced=True,
    )
    clip_skip: int = setting(
        0,
        "Layer of the text encoders that is read, counted from the end (2: the one before the last); 0: the family's.",
        unit="layers",
        group="Base model",
        advanced=True,
        ge=0,
        le=32,
    )
    device: str = setting(
        "auto",
        "Device to run on: auto, cpu, cuda, cuda:N or mps.",
        group="Base model",
        advanced=True,
        affects_result=False,
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
    )
