"""Makes the lists in `golden/` again: what kohya's own network module adapts, in every supported family at real size.

    python tools/make_golden.py PATH-OF-A-KOHYA-CHECKOUT PATH-OF-A-MUSUBI-CHECKOUT

The first checkout is a clone of https://github.com/kohya-ss/sd-scripts, also for Anima, the second, for FLUX.2 klein
4B, Z-Image and Krea 2, of https://github.com/kohya-ss/musubi-tuner, by the same author. `networks/lora.py` of the first
builds LoRAs of rank 4, and of rank 2 for 3×3 convolutions where these are asked for, around its own UNets
(`library/original_unet.py`, `library/sdxl_original_unet.py`) and transformers' text encoders, all on the meta device,
so nothing is downloaded and no weights are needed. Stub modules stand in for what the files import but do not use here.

A file holds names and shapes alone: {kohya name: [shape of lora_down, shape of lora_up]}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
RANK = 4
CONV_RANK = 2
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
# Without the last of its 24 layers, whose output SD 2 does not read.
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}

Layers = dict[str, list[list[int]]]


def stub(name: str, **content: Any) -> None:
    """Puts a module that holds `content` alone under that name."""
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def text_encoder(sizes: dict[str, int], kind: type[nn.Module] = CLIPTextModel) -> nn.Module:
    """A text encoder; its modules lie below `text_model`, as in the library that kohya's scripts pin."""
    config = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, projection_dim=sizes["hidden_size"], **sizes)
    encoder = kind(config)
    if hasattr(encoder, "text_model"):
        return encoder
    outer = nn.Module()
    outer.text_model = encoder
    return outer


def use_checkout(checkout: Path) -> None:
    """Makes kohya's modules importable."""
    stub("einops", rearrange=None)
    sys.path.insert(0, str(checkout))
    import library

    library.__path__ = [str(checkout / "library")]
    stub("library.utils", setup_logging=lambda: None)


def sd1() -> tuple[nn.Module, nn.Module]:
    """Text encoder and UNet of SD 1.x."""
    from library.original_unet import UNet2DConditionModel

    return text_encoder(CLIP_L), UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=768)


def sd2() -> tuple[nn.Module, nn.Module]:
    """Text encoder and UNet of SD 2.x; from a single file, kohya's transformers begin and end with convolutions."""
    from library.original_unet import UNet2DConditionModel

    unet = UNet2DConditionModel(sample_size=64, attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024)
    return text_encoder(CLIP_H), unet


def sdxl() -> tuple[list[nn.Module], nn.Module]:
    """Text encoders and UNet of SDXL."""
    from library.sdxl_original_unet import SdxlUNet2DConditionModel

    return [text_encoder(CLIP_L), text_encoder(CLIP_G, CLIPTextModelWithProjection)], SdxlUNet2DConditionModel()


def kohya_layers(build: Callable[[], tuple[Any, nn.Module]], **options: Any) -> Layers:
    """Names and shapes of all modules that kohya adapts with these options."""
    from networks.lora import LoRANetwork, create_network

    replaced = list(LoRANetwork.UNET_TARGET_REPLACE_MODULE)
    with torch.device("meta"):
        text_encoders, unet = build()
        network = create_network(1.0, RANK, RANK, None, text_encoders, unet, **options)
    LoRANetwork.UNET_TARGET_REPLACE_MODULE = replaced  # a network with convolutions adds to it for all that follow
    return {
        layer.lora_name: [list(layer.lora_down.weight.shape), list(layer.lora_up.weight.shape)]
        for layer in network.text_encoder_loras + network.unet_loras
    }


def klein_layers(checkout: Path) -> Layers:
    """Names and shapes of all modules of FLUX.2 klein 4B that kohya's musubi-tuner adapts by default."""
    sys.path.insert(0, str(checkout / "src"))
    from musubi_tuner.flux_2.flux2_models import Flux2, Klein4BParams
    from musubi_tuner.networks.lora_flux_2 import create_arch_network

    with torch.device("meta"):
        network = create_arch_network(1.0, RANK, RANK, None, [], Flux2(Klein4BParams()))
    return denoiser_layers(network)


def zimage_layers(checkout: Path) -> Layers:
    """Names and shapes of all modules of Z-Image that kohya's musubi-tuner adapts by default."""
    sys.path.insert(0, str(checkout / "src"))
    from musubi_tuner.networks.lora_zimage import create_arch_network
    from musubi_tuner.zimage.zimage_model import ZImageTransformer2DModel

    with torch.device("meta"):
        network = create_arch_network(1.0, RANK, RANK, None, [], ZImageTransformer2DModel())
    return denoiser_layers(network)


def krea2_layers(checkout: Path) -> Layers:
    """Names and shapes of all modules of Krea 2 that kohya's musubi-tuner adapts by default."""
    sys.path.insert(0, str(checkout / "src"))
    from musubi_tuner.krea2.krea2_mmdit import SingleStreamDiT
    from musubi_tuner.krea2.krea2_utils import single_mmdit_large_wide
    from musubi_tuner.networks.lora_krea2 import create_arch_network

    with torch.device("meta"):
        network = create_arch_network(1.0, RANK, RANK, None, [], SingleStreamDiT(single_mmdit_large_wide))
    return denoiser_layers(network)


def anima_layers() -> Layers:
    """Names and shapes of all modules of Anima that kohya adapts, those of its conditioner included."""
    stub("einops", rearrange=None, repeat=None)
    stub("einops.layers")
    stub("einops.layers.torch", Rearrange=lambda *_, **__: nn.Identity())
    from library.anima_models import Anima
    from networks.lora_anima import create_network

    published = {  # as `load_anima_model` of library/anima_utils.py has it
        **dict.fromkeys(("max_img_h", "max_img_w"), 512),
        "max_frames": 128,
        **dict.fromkeys(("in_channels", "out_channels"), 16),
        "patch_spatial": 2,
        "patch_temporal": 1,
        "model_channels": 2048,
        "crossattn_emb_channels": 1024,
        "pos_emb_cls": "rope3d",
        "use_adaln_lora": True,
        "num_blocks": 28,
        "num_heads": 16,
        "use_llm_adapter": True,
    }
    with torch.device("meta"):
        network = create_network(1.0, RANK, RANK, None, [], Anima(**published), train_llm_adapter="true")
    return denoiser_layers(network)


def denoiser_layers(network: Any) -> Layers:
    """Names and shapes of the layers of a network's denoiser."""
    return {
        layer.lora_name: [list(layer.lora_down.weight.shape), list(layer.lora_up.weight.shape)]
        for layer in network.unet_loras
    }


def write(name: str, layers: Layers) -> None:
    """Write one list."""
    lines = (f"{json.dumps(layer)}: {json.dumps(shapes)}" for layer, shapes in sorted(layers.items()))
    (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    unet = sum(layer.startswith("lora_unet_") for layer in layers)
    sys.stderr.write(f"{name}: {unet} modules of the UNet, {len(layers) - unet} of text encoders\n")


def main() -> None:
    """Write the files."""
    use_checkout(Path(sys.argv[1]).expanduser().resolve())
    GOLDEN.mkdir(exist_ok=True)
    for family, build in (("sd15", sd1), ("sd2", sd2), ("sdxl", sdxl)):
        write(f"kohya_{family}_keys", kohya_layers(build))
        write(f"kohya_{family}_conv_keys", kohya_layers(build, conv_dim=CONV_RANK, conv_alpha=CONV_RANK))
    write("kohya_anima_keys", anima_layers())
    musubi = Path(sys.argv[2]).expanduser().resolve()
    write("musubi_flux2_keys", klein_layers(musubi))
    write("musubi_zimage_keys", zimage_layers(musubi))
    write("musubi_krea2_keys", krea2_layers(musubi))


if __name__ == "__main__":
    main()
