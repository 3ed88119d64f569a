"""Run by ComfyUI's Python: what ComfyUI's own text encoders read in prompts that call embeddings.

    python comfy_encode.py COMFYUI CHECKPOINT ADAPTER.safetensors EMBEDDINGS OUTPUTS.safetensors PROMPT...

ComfyUI's own loader applies ADAPTER, and looks for embeddings in EMBEDDINGS. OUTPUTS gets "text" and "pooled",
a row for each prompt.
"""

from __future__ import annotations

import sys

comfyui, checkpoint, adapter, embeddings, outputs, *prompts = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, comfyui)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


@torch.inference_mode()
def main() -> None:
    """Write the encodings."""
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(checkpoint, embedding_directory=[embeddings])
    _, clip = comfy.sd.load_lora_for_models(model, clip, comfy.utils.load_torch_file(adapter), 1.0, 1.0)
    found = [clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True) for prompt in prompts]
    text, pooled = (torch.cat(rows).float().clone() for rows in zip(*found, strict=True))
    save_file({"text": text, "pooled": pooled}, outputs)


if __name__ == "__main__":
    main()
