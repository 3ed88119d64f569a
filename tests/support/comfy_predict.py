"""Run by ComfyUI's Python: what ComfyUI's own UNet predicts with adapters that its own loader applied.

    python comfy_predict.py COMFYUI CHECKPOINT INPUTS.safetensors OUTPUTS.safetensors ADAPTER...

INPUTS holds latents, timesteps and text (float32); OUTPUTS gets "base" and one prediction for every adapter by its
stem. With "ours:" before an adapter's path, this pack's Apply LoRA puts it on instead of ComfyUI's loader.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

comfyui, checkpoint, inputs, outputs, *adapters = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, comfyui)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def pack_host() -> Any:
    """The pack's bridge to ComfyUI, imported as ComfyUI does."""
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("pack", root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pack"])
    return importlib.import_module("pack.nodes.host")


@torch.inference_mode()
def prediction(model: Any) -> torch.Tensor:
    """The UNet's output for the given inputs, with the model's patches."""
    given = load_file(inputs)
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    unet = model.model.diffusion_model
    return unet(given["latents"], given["timesteps"].float(), context=given["text"]).float().clone()


def main() -> None:
    """Write the predictions."""
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(checkpoint)
    found = {"base": prediction(model)}
    for entry in adapters:
        path = Path(entry.removeprefix("ours:"))
        tensors = comfy.utils.load_torch_file(str(path))
        if entry.startswith("ours:"):
            patched, _ = pack_host().apply_adapter(model, clip, tensors, 1.0, 1.0)
            found[f"ours-{path.stem}"] = prediction(patched)
        else:
            patched, _ = comfy.sd.load_lora_for_models(model, clip, tensors, 1.0, 1.0)
            found[path.stem] = prediction(patched)
    save_file(found, outputs)


if __name__ == "__main__":
    main()
