"""The settings of the base model: where it is and where it runs; names of precisions."""

from __future__ import annotations

from typing import Literal

from .base import Settings, TidyPath, setting

PredictionType = Literal["auto", "epsilon", "v_prediction"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
SavePrecision = Literal["fp16", "bf16", "fp32"]


class BaseModelSettings(Settings):
    """Where the base model is and where it runs."""

    base: TidyPath = setting(
        ...,
        "Base model: a single-file checkpoint (.safetensors or .ckpt) or a diffusers folder.",
        group="Base model",
        path=True,
    )
    tokenizer: TidyPath | None = setting(
        None,
        "Tokenizer folder (vocab.json, merges.txt): CLIP's, or that of text_encoder. Needed only for single files "
        "outside a ComfyUI installation; otherwise found automatically.",
        group="Base model",
        advanced=True,
        affects_result=False,
        path=True,
    )
    vae: TidyPath | None = setting(
        None,
        "VAE to use instead of the base model's own: a file or a diffusers folder. It runs in fp32, so SDXL's "
        "original VAE works too.",
        group="Base model",
        advanced=True,
        path=True,
    )
    text_encoder: TidyPath | None = setting(
        None,
        "Text encoder for a base model whose file holds only the transformer, such as FLUX.2 klein, Z-Image, Anima "
        "(Qwen 3) or Krea 2 (Qwen 3 VL): a file, or a transformers folder. Such a model also needs vae.",
        group="Base model",
        advanced=True,
        path=True,
    )
    prediction_type: PredictionType = setting(
        "auto",
        "What the base model predicts. auto: read from the checkpoint or folder; for Stable Diffusion 2.x detected "
        "from the weights.",
        group="Base model",
        advanced=True,
    )
    clip_skip: int = setting(
        0,
        "Text encoder layer whose output is used, counted from the end (2: the second to last). 0: the model "
        "family's default.",
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
