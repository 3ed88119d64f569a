"""The libraries that every base model needs."""

from __future__ import annotations

import functools

from ..core.garbage import importing_libraries
from .nf4 import load_bitsandbytes_if_installed


@functools.cache
def import_libraries() -> None:
    """Import them at once, which takes half as long as when they are needed, one by one."""
    with importing_libraries():
        load_bitsandbytes_if_installed()  # else diffusers does
        import peft  # noqa: F401
        from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401
