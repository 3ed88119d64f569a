"""Random-weight checkpoints in the shape of Stable Diffusion 1.x, 2.x, XL and its relatives, for tests.

A checkpoint is a single ``.safetensors`` file with the original (LDM) names: ``model.diffusion_model.`` for the UNet,
``first_stage_model.`` for the VAE, and the text encoders below

- ``cond_stage_model.transformer.`` in SD 1.x (CLIP-L; at full size the file has the 1131 keys of the pruned v1-5);
- ``cond_stage_model.model.`` in SD 2.x (OpenCLIP-H in its own layout);
- ``conditioner.embedders.0.transformer.`` (CLIP-L) and ``conditioner.embedders.1.model.`` (OpenCLIP-G) in SDXL.

Every name and shape follows from an `SD1Shape`, `SD2Shape` or `SDXLShape`; no model class is needed to make one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from checkpoints_networks import Entry, clip_entries, unet_entries, vae_entries
from checkpoints_shapes import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    SD2_SHAPES,
    SDXL_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    SDXL_SHAPES,
    SHAPES,
    SD1Shape,
    SD2Shape,
    SDXLShape,
    Shape,
)
from safetensors.torch import save_file

__all__ = [
    "CLIP_PREFIX",
    "OPEN_CLIP_PREFIX",
    "SD2_SHAPES",
    "SDXL_CLIP_PREFIX",
    "SDXL_OPEN_CLIP_PREFIX",
    "SDXL_SHAPES",
    "SHAPES",
    "UNET_PREFIX",
    "VAE_PREFIX",
    "Entry",
    "SD1Shape",
    "SD2Shape",
    "SDXLShape",
    "Shape",
    "clip_shapes",
    "parameter_shapes",
    "sd2_checkpoint",
    "sd2_state_dict",
    "sd15_checkpoint",
    "sd15_state_dict",
    "sdxl_checkpoint",
    "sdxl_state_dict",
    "unet_shapes",
    "vae_shapes",
]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

Size = Literal["tiny", "slim", "full"]

EMBEDDING_STD = 0.02
RAW_EMBEDDING_STD = 0.5  # SDXL reads the text encoders' hidden states without a normalisation
LATENT_STD = 5.0  # about 1 / scaling factor, as of a trained model's latents
SDXL_LATENT_STD = 7.5
LATENT_LOGVAR = -10.0
LOGIT_SCALE = math.log(100)
VELOCITY_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
VELOCITY_STD = 0.12


def sd15_checkpoint(
    path: Path, *, size: Size | SD1Shape = "slim", seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Writes a random-weight SD 1.x checkpoint.

    Args:
        path: the file to write; its folder is made if need be.
        size: one of `SHAPES`, or sizes of one's own.
        seed: the same seed gives the same weights, up to the rounding of `dtype`.
        dtype: type of all weights.

    Returns:
        `path`.
    """
    return _write(path, sd15_state_dict(size, seed=seed, dtype=dtype))


def sd2_checkpoint(
    path: Path,
    *,
    size: str | SD2Shape = "slim",
    velocity: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a random-weight SD 2.x checkpoint.

    Args:
        path: the file to write; its folder is made if need be.
        size: one of `SD2_SHAPES`, or sizes of one's own.
        velocity: whether it carries the mark of models that predict v (see `sd2_state_dict`).
        seed: the same seed gives the same weights, up to the rounding of `dtype`.
        dtype: type of all weights.

    Returns:
        `path`.
    """
    return _write(path, sd2_state_dict(size, velocity=velocity, seed=seed, dtype=dtype))


def sdxl_checkpoint(
    path: Path,
    *,
    size: str | SDXLShape = "slim",
    v_pred: bool = False,
    ztsnr: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a random-weight checkpoint of SDXL or one of its relatives.

    Args:
        path: the file to write; its folder is made if need be.
        size: one of `SDXL_SHAPES`, or sizes of one's own.
        v_pred: whether it carries the key that marks models that predict v.
        ztsnr: whether it carries the key that marks models trained with zero terminal signal-to-noise ratio.
        seed: the same seed gives the same weights, up to the rounding of `dtype`.
        dtype: type of all weights.

    Returns:
        `path`.
    """
    return _write(path, sdxl_state_dict(size, v_pred=v_pred, ztsnr=ztsnr, seed=seed, dtype=dtype))


def sd15_state_dict(
    size: Size | SD1Shape = "slim", *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Returns what `sd15_checkpoint` writes, by its prefixed name.

    Norms start as the identity and biases at zero; other weights are normal with variance 1 / fan_in, so that
    activations neither vanish nor overflow in half precision, and no output is constant. Two exceptions keep the
    random model's statistics like a trained one's: the text encoder's residual branches are as small as its embeddings
    (each token stays itself), and the VAE's posterior is narrow (latents follow the picture instead of the noise).
    """
    shape = SHAPES[size] if isinstance(size, str) else size
    return _weights(shape, seed, dtype) | _position_ids(CLIP_PREFIX, shape.max_tokens)


def sd2_state_dict(
    size: str | SD2Shape = "slim", *, velocity: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Returns what `sd2_checkpoint` writes, by its prefixed name; weights are drawn as by `sd15_state_dict`.

    Checkpoints of SD 2 do not say what they predict. Hosts tell velocity by the spread of one bias, which exists in
    UNets with twelve blocks on the way up; `velocity` gives it that spread, and does nothing in smaller UNets.
    """
    shape = SD2_SHAPES[size] if isinstance(size, str) else size
    weights = _weights(shape, seed, dtype)
    bias = weights.get(UNET_PREFIX + VELOCITY_BIAS)
    if velocity and bias is not None:
        drawn = torch.randn(bias.shape, generator=torch.Generator().manual_seed(seed))
        bias.copy_(drawn * (VELOCITY_STD / drawn.std()))
    return weights


def sdxl_state_dict(
    size: str | SDXLShape = "slim",
    *,
    v_pred: bool = False,
    ztsnr: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Returns what `sdxl_checkpoint` writes, by its prefixed name; weights are drawn as by `sd15_state_dict`.

    The text encoders' embeddings and residual branches are larger, since nothing normalises what the UNet reads.
    """
    shape = SDXL_SHAPES[size] if isinstance(size, str) else size
    weights = _weights(shape, seed, dtype, RAW_EMBEDDING_STD, SDXL_LATENT_STD)
    weights |= _position_ids(SDXL_CLIP_PREFIX, shape.max_tokens)
    marks = {"v_pred": v_pred, "ztsnr": ztsnr}
    return weights | {name: torch.tensor([]) for name, wanted in marks.items() if wanted}


def parameter_shapes(shape: Shape) -> Iterator[Entry]:
    """Yields the prefixed name and the dimensions of every trainable tensor."""
    parts = {UNET_PREFIX: unet_shapes(shape), VAE_PREFIX: vae_shapes(shape), **shape.text_encoders()}
    for prefix, entries in parts.items():
        for name, dims in entries:
            yield prefix + name, dims


def unet_shapes(shape: Shape) -> Iterator[Entry]:
    """Yields the name and dimensions of every UNet weight, in the order of the forward pass."""
    return unet_entries(shape.unet())


def vae_shapes(shape: Shape) -> Iterator[Entry]:
    """Yields the name and dimensions of every VAE weight: encoder, decoder, and the 1×1 convolutions between them."""
    widths = tuple(mult * shape.vae_channels for mult in shape.vae_channel_mult)
    return vae_entries(widths, shape.vae_res_blocks, shape.latent_channels)


def clip_shapes(shape: SD1Shape) -> Iterator[Entry]:
    """Yields the name and dimensions of every weight of an SD 1.x text encoder."""
    return clip_entries(shape.text_encoder())


def _write(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"format": "pt"})
    return path


def _weights(
    shape: Shape,
    seed: int,
    dtype: torch.dtype,
    embedding_std: float = EMBEDDING_STD,
    latent_std: float = LATENT_STD,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: _init(name, dims, generator, embedding_std).to(dtype) for name, dims in parameter_shapes(shape)}
    moments = weights[f"{VAE_PREFIX}quant_conv.weight"]
    moments[: shape.latent_channels] *= latent_std
    moments[shape.latent_channels :] *= 0.1
    weights[f"{VAE_PREFIX}quant_conv.bias"][shape.latent_channels :] = LATENT_LOGVAR
    return weights


def _position_ids(prefix: str, max_tokens: int) -> dict[str, torch.Tensor]:
    return {f"{prefix}text_model.embeddings.position_ids": torch.arange(max_tokens).unsqueeze(0)}


def _init(name: str, dims: tuple[int, ...], generator: torch.Generator, embedding_std: float) -> torch.Tensor:
    if not dims:
        return torch.tensor(LOGIT_SCALE)
    if len(dims) == 1:
        return torch.ones(dims) if name.endswith(".weight") else torch.zeros(dims)
    std = 1 / math.sqrt(math.prod(dims[1:]))
    if "embedding" in name:
        std = embedding_std
    elif name.endswith(("attn.out_proj.weight", ".mlp.fc2.weight", ".mlp.c_proj.weight")):
        std *= embedding_std
    return torch.empty(dims).normal_(0, std, generator=generator)
