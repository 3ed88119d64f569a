"""For a test's ComfyUI: a loader of small Qwen 3 text encoders, whose sizes ComfyUI's own takes as given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES = {"num_attention_heads": 1, "num_key_value_heads": 1}


def load_small_clip(path: Path) -> Any:
    """ComfyUI's CLIP of FLUX.2 klein 4B around a file of a small Qwen 3."""
    import comfy.sd
    import comfy.supported_models_base
    import comfy.text_encoders.flux
    import comfy.utils

    tensors = comfy.utils.load_torch_file(str(path))
    vocabulary, width = tensors["model.embed_tokens.weight"].shape
    sizes = {
        **SIZES,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")}),
    }
    flux = comfy.text_encoders.flux
    target = comfy.supported_models_base.ClipTarget(flux.KleinTokenizer, flux.klein_te())
    return comfy.sd.CLIP(target, model_options={"qwen3_4b_model_config": sizes}, state_dict=[tensors])


class LoadSmallQwen3:
    """Load CLIP for a file in models/text_encoders with a small Qwen 3."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The file's name."""
        return {"required": {"name": ("STRING", {})}}

    def load(self, name: str) -> tuple[Any]:
        """Load it."""
        import folder_paths

        return (load_small_clip(Path(folder_paths.get_full_path("text_encoders", name))),)


NODE_CLASS_MAPPINGS = {"LoadSmallQwen3": LoadSmallQwen3}
