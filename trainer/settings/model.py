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
        "Folder with the tokenizer (vocab.json, merges.txt): CLIP's, or that of text_encoder. Needed only for single "
        "files outside a ComfyUI installation; found automatically otherwise.",
        group="Base model",
        advanced=True,
        affects_result=False,
        path=True,
    )
    vae: TidyPath | None = setting(
        None,
        "Another autoencoder: a file or a diffusers folder. It runs in fp32, so SDXL's own works, too.",
        group="Base model",
        advanced=True,
        path=True,
    )
    text_encoder: TidyPath | None = setting(
        None,
        "Text encoder of a base model whose file holds the transformer alone, such as FLUX.2 klein, Z-Image, Anima "
        "(Qwen 3) or Krea 2 (Qwen 3 VL): a file, or a folder of transformers. Such a model also needs vae.",
        group="Base model",
        advanced=True,
        path=True,
    )
    prediction_type: PredictionType = setting(
        "auto",
        "What the base model predicts. auto: taken from the checkpoint or folder; for Stable Diffusion 2.x detected "
        "from the weights.",
        group="Base model",
        advanced=True,
    )
    clip_skip: int = setting(
        0,
        "Layer of the text encoders whose output is used, counted from the end (2: the last but one); 0: the family's "
        "default.",
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
