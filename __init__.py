"""DreamBooth LoRA: teach a diffusion model your subject inside the ComfyUI graph.

Nothing but names is defined at import; ComfyUI calls `comfy_entrypoint` when it loads the pack.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Give ComfyUI the extension."""
    import logging

    try:
        from .nodes import extension

        return extension()
    except Exception:
        logging.getLogger("dreambooth_lora").exception("DreamBooth LoRA could not be loaded")
        raise
