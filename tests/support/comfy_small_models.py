"""For a test's ComfyUI: small text encoders (Qwen 3, Krea 2's Qwen 3 VL) and Z-Images; all else is its own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEAD = 128
TEXT_SIZES = {"num_attention_heads": 1, "num_key_value_heads": 1}


def load_small_clip(path: Path, family: str) -> Any:
    """ComfyUI's CLIP of a family around a file of a small Qwen 3."""
    import comfy.sd
    import comfy.supported_models_base
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
    }
    # what looks at pictures, which no file of a test holds
    comfy.text_encoders.qwen3vl.QWEN3VL_VISION["qwen3vl_4b"] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "depth": 1,
        "deepstack_visual_indexes": [0],
    }
    target = comfy.supported_models_base.ClipTarget(*targets[family])
    options = {"qwen3_4b_model_config": sizes, "qwen3vl_4b_model_config": sizes}
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
    let_small_zimages_in()
NODE_CLASS_MAPPINGS = {"LoadSmallQwen3": LoadSmallQwen3}
