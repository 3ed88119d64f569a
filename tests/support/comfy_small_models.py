"""For a test's ComfyUI: small text encoders (Qwen 3, Krea 2's Qwen 3 VL), Z-Images and Animas; all else is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEAD = 128
TEXT_SIZES = {"num_attention_heads": 1, "num_key_value_heads": 1}


def load_small_clip(path: Path, family: str) -> Any:
    """ComfyUI's CLIP of a family around a file of a small Qwen 3."""
    import comfy.sd
    import comfy.supported_models_base
    import comfy.text_encoders.anima
    import comfy.text_encoders.flux
    import comfy.text_encoders.krea2
    import comfy.text_encoders.qwen3vl
    import comfy.text_encoders.z_image
    import comfy.utils

    tensors = comfy.utils.load_torch_file(str(path))
    vocabulary, width = tensors["model.embed_tokens.weight"].shape
    sizes = {
        **TEXT_SIZES,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")}),
    }
    flux, zimage, krea2 = comfy.text_encoders.flux, comfy.text_encoders.z_image, comfy.text_encoders.krea2
    targets = {
        "flux2": (flux.KleinTokenizer, flux.klein_te()),
        "zimage": (zimage.ZImageTokenizer, zimage.te()),
        "krea2": (krea2.Krea2Tokenizer, krea2.te()),
        "anima": (comfy.text_encoders.anima.AnimaTokenizer, comfy.text_encoders.anima.te()),
    }
    # what looks at pictures, which no file of a test holds
    comfy.text_encoders.qwen3vl.QWEN3VL_VISION["qwen3vl_4b"] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "depth": 1,
        "deepstack_visual_indexes": [0],
    }
    target = comfy.supported_models_base.ClipTarget(*targets[family])
    options = {f"{name}_model_config": sizes for name in ("qwen3_4b", "qwen3vl_4b", "qwen3_06b")}
    return comfy.sd.CLIP(target, model_options=options, state_dict=[tensors])


def let_small_zimages_in() -> None:
    """Have ComfyUI recognise a Z-Image of another width than the published one's; all else is its own code."""
    import comfy.model_detection
    import comfy.supported_models

    detect = comfy.model_detection.detect_unet_config

    def detect_small(state_dict: Any, key_prefix: str, *args: Any, **options: Any) -> Any:
        config = detect(state_dict, key_prefix, *args, **options)
        if config and config.get("image_model") == "lumina2" and f"{key_prefix}cap_pad_token" in state_dict:
            heads = config["dim"] // HEAD
            config |= {
                "n_heads": heads,
                "n_kv_heads": heads,
                "axes_dims": [32, 48, 48],
                "axes_lens": [1536, 512, 512],
                "rope_theta": 256.0,
                "ffn_dim_multiplier": 8 / 3,
                "z_image_modulation": True,
                "time_scale": 1000.0,
                "pad_tokens_multiple": 32,
            }
        return config

    class SmallZImage(comfy.supported_models.ZImage):  # type: ignore[misc, name-defined]
        unet_config = {"image_model": "lumina2", "z_image_modulation": True}  # noqa: RUF012

    comfy.model_detection.detect_unet_config = detect_small
    comfy.supported_models.models.insert(0, SmallZImage)


def let_small_animas_in() -> None:
    """Have ComfyUI recognise an Anima of other sizes than the published one's; all else is its own code."""
    import comfy.ldm.anima.model as anima
    import comfy.model_detection

    detect = comfy.model_detection.detect_unet_config
    conditioner_class = anima.LLMAdapter
    sizes: dict[str, int] = {}

    class SmallConditioner(conditioner_class):  # type: ignore[misc, valid-type]
        def __init__(self, **options: Any) -> None:
            super().__init__(**sizes, **options)

    def detect_small(state_dict: Any, key_prefix: str, *args: Any, **options: Any) -> Any:
        config = detect(state_dict, key_prefix, *args, **options)
        if not config or config.get("image_model") != "anima":
            return config
        conditioner = f"{key_prefix}llm_adapter.blocks"
        block = f"{key_prefix}blocks.0"
        width = state_dict[f"{conditioner}.0.cross_attn.q_proj.weight"].shape[0]
        found = {
            "source_dim": state_dict[f"{conditioner}.0.cross_attn.k_proj.weight"].shape[1],
            "target_dim": width,
            "model_dim": width,
            "num_layers": _blocks(state_dict, f"{conditioner}."),
            "num_heads": width // state_dict[f"{conditioner}.0.cross_attn.q_norm.weight"].shape[0],
        }
        sizes.update(found)
        return config | {
            "num_blocks": _blocks(state_dict, f"{key_prefix}blocks."),
            "num_heads": config["model_channels"] // HEAD,
            "crossattn_emb_channels": width,
            "adaln_lora_dim": state_dict[f"{block}.adaln_modulation_mlp.1.weight"].shape[0],
        }

    anima.LLMAdapter = SmallConditioner
    comfy.model_detection.detect_unet_config = detect_small


def _blocks(tensors: Any, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def let_small_models_in() -> None:
    """Have ComfyUI recognise what has sizes here that it takes for given."""
    let_small_zimages_in()
    let_small_animas_in()


class LoadSmallQwen3:
    """Load CLIP for a file in models/text_encoders with a small Qwen 3."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The file's name, and whose text encoder it is."""
        return {"required": {"name": ("STRING", {}), "family": ("STRING", {"default": "flux2"})}}

    def load(self, name: str, family: str) -> tuple[Any]:
        """Load it."""
        import folder_paths

        return (load_small_clip(Path(folder_paths.get_full_path("text_encoders", name)), family),)


if __name__ not in ("__main__", "comfy_small_models"):  # loaded by ComfyUI, as nodes of its own
    let_small_models_in()
NODE_CLASS_MAPPINGS = {"LoadSmallQwen3": LoadSmallQwen3}
