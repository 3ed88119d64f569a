"""Runs another project's training script as it is, in that project's interpreter, and counts what it computes.

Its arguments are a file for the report, the configuration of the base's UNet, the script, and the script's own ones.
Nothing of this pack is imported. Three things are done around the script: passes of the UNet are counted; torchvision
is made to import where its compiled operators don't fit this PyTorch, since the scripts only resize and crop with it;
and kohya's constants of the UNet of Stable Diffusion 1.x are set to those of the base, which is smaller.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch


def import_torchvision() -> None:
    """Import torchvision, with operators that do nothing where its own can't be loaded."""
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, OSError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


class PassCounter:
    """Counts passes of the UNet: a forward of one latent is one, with its backward three.

    Attributes:
        passes: So far.
    """

    def __init__(self) -> None:
        self.passes = 0

    def watch(self, unet_class: Any) -> None:
        """Count the forward passes of a class of networks from now on."""
        forward = unet_class.forward

        def counted(network: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.passes += len(sample) * (3 if torch.is_grad_enabled() else 1)
            return forward(network, sample, *args, **kwargs)

        unet_class.forward = counted


def fit_kohya(config: dict[str, Any]) -> Any:
    """Set the constants of kohya's UNet to a base's; returns its class."""
    module = importlib.import_module("library.original_unet")
    channels = tuple(config["block_out_channels"])
    module.BLOCK_OUT_CHANNELS = channels
    module.TIMESTEP_INPUT_DIM = channels[0]
    module.TIME_EMBED_DIM = 4 * channels[0]
    module.LAYERS_PER_BLOCK = config["layers_per_block"]
    module.LAYERS_PER_BLOCK_UP = config["layers_per_block"] + 1
    module.DOWN_BLOCK_TYPES = config["down_block_types"]
    module.UP_BLOCK_TYPES = config["up_block_types"]
    return module.UNet2DConditionModel


def main() -> None:
    report, config, script = map(Path, sys.argv[1:4])
    sys.argv = [str(script), *sys.argv[4:]]
    sys.path[0] = str(script.parent)
    torch.set_num_threads(1)
    import_torchvision()
    import diffusers
    import transformers  # noqa: F401

    counter = PassCounter()
    counter.watch(diffusers.UNet2DConditionModel)
    if (script.parent / "library" / "original_unet.py").is_file():
        counter.watch(fit_kohya(json.loads(config.read_text(encoding="utf-8"))))
    began, used = time.perf_counter(), time.process_time()
    runpy.run_path(str(script), run_name="__main__")
    facts = {
        "passes": counter.passes,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
    }
    report.write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
