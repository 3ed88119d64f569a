"""Pictures and processors that the tests of feature extractors share."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


SIZES = [(64, 64), (37, 91), (200, 50), (33, 32)]


def processor(size: int) -> dict[str, Any]:
    """A preprocessor_config.json as CLIP and DINOv2 have them."""
    return {
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
    }


def picture(size: tuple[int, int], seed: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)
