"""Models of other families are named by the keys of their files, bare or with a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from pack.trainer.core.errors import UnsupportedModelError
from pack.trainer.models.families import refuse_foreign_keys

SMALL = {"num_layers": 1, "num_attention_heads": 2}
FLUX = SMALL | {"num_single_layers": 1, "attention_head_dim": 16, "joint_attention_dim": 32}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "FluxTransformer2DModel": ("Flux", FLUX | {"pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}),
    "ChromaTransformer2DModel": ("Chroma", FLUX),
    "SD3Transformer2DModel": (
        "Stable Diffusion 3",
        SMALL | {"attention_head_dim": 8, "joint_attention_dim": 32, "caption_projection_dim": 16},
    ),
    "QwenImageTransformer2DModel": (
        "Qwen-Image",
        SMALL | {"attention_head_dim": 16, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)},
    ),
    "Lumina2Transformer2DModel": (
        "Lumina",
        SMALL | {"hidden_size": 32, "num_kv_heads": 1, "axes_dim_rope": (4, 4, 8), "cap_feat_dim": 32},
    ),
    "WanTransformer3DModel": ("Wan", SMALL | {"attention_head_dim": 12, "text_dim": 32, "ffn_dim": 32}),
    "HunyuanVideoTransformer3DModel": (
        "HunyuanVideo",
        SMALL | {"num_single_layers": 1, "attention_head_dim": 16, "rope_axes_dim": (4, 4, 8)},
    ),
}


def named(*keys: str) -> str:
    """What a file with these keys is said to be."""
    with pytest.raises(UnsupportedModelError) as caught:
        refuse_foreign_keys(dict.fromkeys(keys, torch.zeros(1)))
    problem, remedy = caught.value.unworded
    assert "Stable Diffusion XL" in remedy
    return problem.removeprefix("The base model is ").removesuffix(", which is not supported.")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("keys", "title"),
    [
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.norms.0.scale"], "Chroma"),
        (
            ["double_blocks.0.img_mod.linear.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight"],
            "HunyuanVideo",
        ),
        (["transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_q.weight"], "Flux"),
        (["transformer_blocks.0.attn.to_q.weight"], "a diffusion transformer (Flux, SD 3 or Qwen-Image)"),
        (["transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.img_mod.1.weight"], "Qwen-Image"),
        (
            ["transformer_blocks.0.attn.to_q.weight", "pos_embed.pos_embed", "pos_embed.proj.weight"],
            "Stable Diffusion 3",
        ),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["noise_refiner.0.attention.qkv.weight"], "Lumina"),
        (["cap_embedder.0.weight"], "Lumina"),
        (["blocks.0.cross_attn.norm_k.weight"], "Wan"),
        (["condition_embedder.time_proj.weight"], "Wan"),
    ],
)
def test_a_family_is_named_by_its_keys(keys: list[str], title: str, prefix: str) -> None:
    assert named(*(prefix + key for key in keys)) == title


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_a_network_of_diffusers_is_named(name: str) -> None:
    """Which it is by all its keys, not by those that somebody chose."""
    title, configuration = CLASSES[name]
    network = getattr(diffusers, name, None)
    if network is None:
        pytest.skip(f"this diffusers has no {name}")
    with torch.device("meta"):
        keys: Mapping[str, Any] = network(**configuration).state_dict()
    assert named(*keys) == title
