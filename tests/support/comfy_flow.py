"""Run by ComfyUI's Python: a flow-matching model's networks by ComfyUI's own code, and lent to this pack.

    python comfy_flow.py COMFYUI FAMILY FORMAT FOLDER OUTPUTS.safetensors PROMPT...

FOLDER holds transformer.safetensors, vae.safetensors, text.safetensors and inputs.safetensors: "pixels", and pairs of
"noisy N" and "timesteps N". A FORMAT of `QUANTIZED` is that in which ComfyUI stores the blocks' weights. OUTPUTS gets
"text N" of each prompt, "latents" and "prediction N" by ComfyUI, and the same by this pack with "ours " before the
name; and the number of tensors of the transformer that are borrowed, and of those that are not.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

comfyui, family, stored_as, given, outputs, *prompts = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, comfyui)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy_small_models import let_small_models_in, load_small_clip  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

FOLDER = Path(given)
QUANTIZED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # layout, how it is made, what a file says of it
    "int8": ("TensorWiseINT8Layout", {}, {"format": "int8_tensorwise"}),
    "int8 rotated": (
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
    ),
    "nvfp4": ("TensorCoreNVFP4Layout", {"scale": "recalculate"}, {"format": "nvfp4"}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {"format": "mxfp8"}),
}
_IN_BLOCK = re.compile(r"^(blocks|layers|double_blocks|single_blocks)\..*\.weight$")


def pack(module: str) -> Any:
    """A module of the pack, imported as ComfyUI does."""
    if "pack" not in sys.modules:
        root = Path(__file__).resolve().parents[2]
        spec = importlib.util.spec_from_file_location(
            "pack", root / "__init__.py", submodule_search_locations=[str(root)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules["pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["pack"])
    return importlib.import_module(f"pack.{module}")


def quantize(file: Path) -> None:
    """Store the weights in blocks as ComfyUI does, to be computed in full precision."""
    from comfy.quant_ops import QuantizedTensor

    layout, options, description = QUANTIZED[stored_as]
    tensors = load_file(file)
    plain = dict(tensors)
    for name in [name for name, tensor in tensors.items() if _IN_BLOCK.match(name) and tensor.ndim == 2]:
        packed = QuantizedTensor.from_float(tensors.pop(name), layout, **options)
        plain[name] = packed.dequantize()
        tensors |= packed.state_dict(name)
        stated = json.dumps({**description, "full_precision_matrix_mult": True}).encode()
        tensors[f"{name.removesuffix('weight')}comfy_quant"] = torch.tensor(list(stated), dtype=torch.uint8)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, file.with_name("dequantized.safetensors"))


def storage(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins, or that of which it is a view."""
    return tensor.untyped_storage().data_ptr()


def beginning(model: Any, encoded: dict[str, Any]) -> torch.Tensor:
    """What a model reads of a prompt, (1, tokens, width), of its first 512 tokens."""
    text = encoded["cond"][:, :512]
    if "t5xxl_ids" not in encoded:
        return text
    ids, weights = encoded["t5xxl_ids"][:512], encoded["t5xxl_weights"][:512]
    conditions = model.extra_conds(cross_attn=text, t5xxl_ids=ids, t5xxl_weights=weights, device=torch.device("cpu"))
    return conditions["c_crossattn"].cond


def main() -> None:
    """Write what each gives."""
    inputs = load_file(FOLDER / "inputs.safetensors")
    cases = [name.removeprefix("noisy ") for name in inputs if name.startswith("noisy ")]
    found: dict[str, torch.Tensor] = {}
    let_small_models_in()
    if stored_as in QUANTIZED:
        quantize(FOLDER / "transformer.safetensors")
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(FOLDER / "transformer.safetensors"), {"dtype": torch.float32})
        clip = load_small_clip(FOLDER / "text.safetensors", family)
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(FOLDER / "vae.safetensors")), dtype=torch.float32)
        encoded = [clip.encode_from_tokens(clip.tokenize(prompt), return_dict=True) for prompt in prompts]
        texts = [beginning(model.model, of_prompt) for of_prompt in encoded]
        found |= {f"text {number}": text[0].clone() for number, text in enumerate(texts)}
        latents = vae.encode(inputs["pixels"].movedim(1, -1) / 2 + 0.5)
        latents = model.model.process_latent_in(latents)
        found["latents"] = (latents[:, :, 0] if latents.ndim == 5 else latents).clone()  # some are of videos
        theirs = model
        if stored_as.startswith("int8"):  # of which ComfyUI also rounds the inputs
            theirs = comfy.sd.load_diffusion_model(str(FOLDER / "dequantized.safetensors"), {"dtype": torch.float32})
        comfy.model_management.load_models_gpu([theirs], force_full_load=True)
        for case in cases:
            timesteps = inputs[f"timesteps {case}"] / 1000  # ComfyUI's sampling of flow models: σ is the timestep
            conditions = theirs.model.extra_conds(cross_attn=texts[0], device=torch.device("cpu"))
            context = conditions["c_crossattn"].cond.expand(len(timesteps), -1, -1)
            others = {"num_tokens": conditions["num_tokens"].cond} if "num_tokens" in conditions else {}
            is_of_videos = hasattr(theirs.model.diffusion_model, "patch_temporal")
            noisy = inputs[f"noisy {case}"]
            noisy = noisy[:, :, None] if is_of_videos else noisy
            output = theirs.model.diffusion_model(noisy, timesteps, context=context, **others).float()
            found[f"prediction {case}"] = (output[:, :, 0] if is_of_videos else output).clone()
    with pack("nodes.host").training_mode(), torch.no_grad():
        base = pack("nodes.host").borrow_base(model, clip, vae)
        lent = {storage(tensor) for tensor in model.model.diffusion_model.state_dict().values()}
        ours = base.family.build(base)
        layers = [module for module in ours.denoiser.modules() if hasattr(module, "unpacked")]
        numbers = [next(layer.buffers()) for layer in layers]
        own = [storage(tensor) in lent for tensor in (*ours.denoiser.parameters(), *numbers)]
        found["borrowed"] = torch.tensor([sum(own), len(own) - sum(own)])
        conditioning = ours.encode_prompts(prompts)
        lengths = conditioning.get("lengths", torch.full((len(prompts),), conditioning["text"].shape[1])).tolist()
        for number, (text, length) in enumerate(zip(conditioning["text"], lengths, strict=True)):
            found[f"ours text {number}"] = text[:length]
        found["ours latents"], _ = base.family.latents.encode(ours.vae, inputs["pixels"])
        for case in cases:
            timesteps = inputs[f"timesteps {case}"]
            rows = {name: row[:1].expand(len(timesteps), *row.shape[1:]) for name, row in conditioning.items()}
            found[f"ours prediction {case}"] = ours.predict(inputs[f"noisy {case}"], timesteps, rows)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, outputs)


if __name__ == "__main__":
    main()
