"""What the tests of merging, converting, extracting and fusing share: tiny models and random adapters that fit them."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from adapter_maths import adapter_of
from checkpoints import SDXL_SHAPES, SDXLShape, sd2_state_dict, sd15_state_dict, sdxl_state_dict
from helpers import DEMO, TINY, remembered
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import Adapter, write_adapter
from pack.trainer.adapters.names import named_weights
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.models.open import open_base
from safetensors.torch import save_file
from torch import Tensor
from worlds import TOKENIZER, conditioned

FAMILIES = ("sd15", "sd2", "sdxl")
# As SDXL is built: three levels, two residual blocks in each, attention in the last two.
XL: SDXLShape = replace(SDXL_SHAPES["tiny"], channel_mult=(1, 2, 2), depths=(0, 1, 1), num_res_blocks=2)
STATED = {
    "sd15": {"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"},
    "sd2": {"ss_base_model_version": "sd_v2", "modelspec.architecture": "stable-diffusion-v2-512/lora"},
    "sdxl": {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
}
LINEAR = r"_(to_[qkv]|to_out_0|proj_in|proj_out|ff_net_0_proj|ff_net_2|[qkv]_proj|out_proj|fc[12])$"
ATTENTION = r"attn[12]_to_[qkv]$"
UNET_LINEAR = rf"^lora_unet_.*{LINEAR}"
UNET_ALL = r"^lora_unet_(?!.*(time_embed|label_emb|add_embedding))"
TEXT = r"^lora_te.*(attn_.*_proj|mlp_fc[12])$"


def state_dict(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a tiny single-file checkpoint; biases and norms are random, too, so that nothing hides there."""
    makers: dict[str, Any] = {"sd15": sd15_state_dict, "sd2": sd2_state_dict, "sdxl": sdxl_state_dict}
    size = {"sd15": TINY, "sd2": "tiny", "sdxl": XL}[family]
    tensors: dict[str, Tensor] = makers[family](size, seed=seed)
    source = torch.Generator().manual_seed(seed + 1)
    for name, tensor in tensors.items():
        if tensor.ndim == 1 and tensor.is_floating_point() and not name.startswith("first_stage_model."):
            tensor += 0.1 * torch.randn(tensor.shape, generator=source)
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def checkpoint(folder: Path, family: str, **values: Any) -> Path:
    """A tiny single-file checkpoint with a tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        shutil.copytree(TOKENIZER, folder / "tokenizer")
    path = folder / f"{family}.safetensors"
    save_file(state_dict(family, **values), path, {"format": "pt"})
    return path


def demo_base() -> BaseWeights:
    """The demo's trained model, of the family SD 1."""
    return open_base(DEMO / "base")


@remembered
def _weights_of(base: BaseWeights) -> dict[str, Tensor]:
    return named_weights(base.family.build(base))


def weights_of(base: BaseWeights, pattern: str = "") -> dict[str, Tensor]:
    """The weights that adapters change, by kohya's names; only those that the pattern is found in."""
    return {name: weight for name, weight in _weights_of(base).items() if re.search(pattern, name)}


def random_parts(kind: str, weight: Tensor, source: torch.Generator, rank: int, alpha: float) -> dict[str, Tensor]:
    """One module's tensors; what they add is about a tenth of the weight."""
    out, inside, *kernel = weight.shape
    ones = [1] * len(kernel)
    size = 0.1 * float(weight.float().std()) + 1e-4

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    match kind:
        case "LoRA" | "DoRA":
            up = randn(out, rank, *ones) * (size * rank / alpha / math.sqrt(rank))
            parts = {"lora_down.weight": randn(rank, inside, *kernel), "lora_up.weight": up}
            if kind == "DoRA":
                length = weight.float().flatten(1).norm(dim=1) * (1 + 0.1 * randn(out)).abs()
                parts["dora_scale"] = length.reshape(out, 1, *ones)
        case "Tucker":
            up = randn(out, rank, *ones) * (size / alpha)
            core = randn(rank, rank, *kernel)
            parts = {"lora_down.weight": randn(rank, inside, *ones), "lora_up.weight": up, "lora_mid.weight": core}
        case "LoHa":
            width = inside * math.prod(kernel)
            parts = {f"hada_w{n}_a": randn(out, rank) for n in (1, 2)}
            parts |= {f"hada_w{n}_b": randn(rank, width) for n in (1, 2)}
            parts["hada_w1_a"] *= size / alpha
        case "LoKr":
            parts = {"lokr_w1": randn(2, 2), "lokr_w2": randn(out // 2, inside // 2, *kernel) * size}
        case "OFT":
            return {"oft_blocks": 0.05 * randn(out // 4, 4, 4), "alpha": torch.tensor(0.0)}
        case "full difference":
            return {"diff": randn(*weight.shape) * size}
        case _:
            raise AssertionError(kind)
    return parts | {"alpha": torch.tensor(alpha)}


def random_adapter(
    base: BaseWeights,
    kind: str = "LoRA",
    pattern: str = UNET_LINEAR,
    *,
    seed: int = 1,
    rank: int = 3,
    alpha: float = 2.0,
    conv_rank: int = 2,
    metadata: Mapping[str, str] | None = None,
) -> Adapter:
    """An adapter for the modules whose names match; ranks of 3×3 convolutions are their own, alpha is no rank."""
    source = torch.Generator().manual_seed(seed)
    modules = {}
    for name, weight in weights_of(base, pattern).items():
        large = weight.ndim == 4 and weight.shape[-1] > 1
        modules[name] = random_parts(kind, weight, source, conv_rank if large else rank, alpha)
    assert modules
    return adapter_of(modules, metadata)


def both(*adapters: Adapter) -> Adapter:
    """Adapters of different modules as one."""
    layers = {name: layer for adapter in adapters for name, layer in adapter.layers.items()}
    assert len(layers) == sum(len(adapter.layers) for adapter in adapters)
    vectors = {key: vector for adapter in adapters for key, vector in adapter.vectors.items()}
    return Adapter(layers, adapters[0].metadata, vectors)


def saved(adapter: Adapter, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(path, adapter, dtype)
    return path


def merged_model(base: BaseWeights, *adapters: tuple[Adapter, float]) -> DiffusionModel:
    """A model with adapters added."""
    model = base.family.build(base)
    for adapter, strength in adapters:
        merge_into(model, adapter, strength)
    return model


def deltas(adapter: Adapter, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter adds to each weight, in the weight's shape."""
    return {
        name: layer.delta(weights[name]).reshape(weights[name].shape).float() for name, layer in adapter.layers.items()
    }


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest relative distance of tensors of the same names."""
    assert set(ours) == set(theirs)
    with torch.no_grad():
        return max(
            float((ours[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-12))
            for name, tensor in theirs.items()
        )


def predicts(model: DiffusionModel) -> Tensor:
    """What a model predicts from some noise with the embeddings of its own text encoders."""
    for network in (model.denoiser, *model.text_encoders.values()):
        network.float().eval()
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.predict(noise, torch.tensor([300]), conditioned(model))


def parameters(model: DiffusionModel) -> dict[str, Tensor]:
    """All tensors of the UNet and the text encoders."""
    networks = {"unet": model.denoiser, **model.text_encoders}
    return {
        f"{title}.{name}": tensor.detach()
        for title, network in networks.items()
        for name, tensor in network.named_parameters()
    }
