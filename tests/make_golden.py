"""Makes `golden/kohya_sd15_keys.json` again: what kohya's own network module adapts in Stable Diffusion 1.5.

    python tests/make_golden.py PATH-OF-A-KOHYA-CHECKOUT

The checkout is a clone of https://github.com/kohya-ss/sd-scripts. Its `networks/lora.py` builds a LoRA of rank 4
around its own UNet (`library/original_unet.py`) and transformers' CLIP-L, all on the meta device, so nothing is
downloaded and no weights are needed. Stub modules stand in for what the two files import but do not use here.

The file holds names and shapes alone: {kohya name: [shape of lora_down, shape of lora_up]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

GOLDEN = Path(__file__).resolve().parent / "golden" / "kohya_sd15_keys.json"
RANK = 4
CLIP_L = CLIPTextConfig(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    projection_dim=768,
)


def stub(name: str, **content: Any) -> None:
    """Puts a module that holds `content` alone under that name."""
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def clip_l() -> nn.Module:
    """CLIP-L's text encoder; its modules lie below `text_model`, as in the library that kohya's scripts pin."""
    encoder = CLIPTextModel(CLIP_L)
    if hasattr(encoder, "text_model"):
        return encoder
    outer = nn.Module()
    outer.text_model = encoder
    return outer


def kohya_layers(checkout: Path) -> dict[str, list[list[int]]]:
    """Names and shapes of all modules that kohya adapts by default."""
    stub("einops", rearrange=None)
    sys.path.insert(0, str(checkout))
    import library

    library.__path__ = [str(checkout / "library")]
    stub("library.utils", setup_logging=lambda: None)
    stub("library.sdxl_original_unet", SdxlUNet2DConditionModel=type("SdxlUNet2DConditionModel", (), {}))
    from library.original_unet import UNet2DConditionModel
    from networks.lora import create_network

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=768)
        network = create_network(1.0, RANK, RANK, None, clip_l(), unet)
    return {
        layer.lora_name: [list(layer.lora_down.weight.shape), list(layer.lora_up.weight.shape)]
        for layer in network.text_encoder_loras + network.unet_loras
    }


def main() -> None:
    """Write the file."""
    layers = kohya_layers(Path(sys.argv[1]).expanduser().resolve())
    lines = (f"{json.dumps(name)}: {json.dumps(shapes)}" for name, shapes in sorted(layers.items()))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    sys.stderr.write(f"{len(layers)} modules written to {GOLDEN}\n")


if __name__ == "__main__":
    main()
