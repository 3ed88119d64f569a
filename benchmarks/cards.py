"""Every family on a card: how fast a step is, what it takes, and how long the first one is waited for; one table.

    python benchmarks/cards.py --plan                       the memory alone, as it also does without a GPU
    python benchmarks/cards.py                              SD 1.5, SDXL measured; the others planned
    python benchmarks/cards.py --families sdxl --card 8     the allocator refuses more than a card of 8 GB has
    python benchmarks/cards.py --diffusers PATH/train_dreambooth_lora.py    that script and the bare network beside it

Each way of saving memory or time, of random weights of real size in bf16, with rank 16 and batch 1, in a process of its
own. Reported, planned | measured:
    GB            in all, with the plan's margin | what the allocator reserved
    s/step        median of the steps after the third
    first step    seconds from opening the base to the end of the first step; pictures and captions are encoded in it
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(Path(__file__).parent)]
sys.dont_write_bytecode = True

import fit  # noqa: E402

FAMILIES = {"sd15": (512,), "sdxl": (1024,), **dict.fromkeys(fit.WITHOUT_MEMORY, (512, 1024))}
"""Size → resolutions."""

EVERY_BLOCK = {"gradient_checkpointing": True}
NF4 = {"base_quantization": "nf4"}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"compile": "blocks"},
    "every fourth block recomputed": {**EVERY_BLOCK, "gradient_checkpointing_interval": 4},
    "every second block recomputed": {**EVERY_BLOCK, "gradient_checkpointing_interval": 2},
    "every block recomputed": EVERY_BLOCK,
    "every block recomputed, compiled": {**EVERY_BLOCK, "compile": "blocks"},
    "half of the blocks swapped": {**EVERY_BLOCK, "swap_blocks": 0.5},
    "all blocks swapped": {**EVERY_BLOCK, "swap_blocks": 1.0},
    "NF4, every block recomputed": {**EVERY_BLOCK, **NF4},
    "NF4, all blocks swapped": {**EVERY_BLOCK, **NF4, "swap_blocks": 1.0},
}
"""Way → settings; of `swap_blocks` the share of all blocks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--resolution", type=int, help="this one alone")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--card", type=float, help="limit the memory to that of a card with so many GB")
    parser.add_argument("--plan", action="store_true", help="only plan")
    parser.add_argument("--diffusers", type=Path, help="diffusers' examples/dreambooth/train_dreambooth_lora.py")
    parser.add_argument("--out", type=Path, help="file for the figures, such as benchmarks/results/cards-4060.json")
    arguments = parser.parse_args()
    import torch

    if not arguments.plan and not torch.cuda.is_available():
        print("There is no CUDA GPU: nothing is measured, what follows is the plan alone.\n")
        arguments.plan = True
    device = "planned" if arguments.plan else torch.cuda.get_device_name()
    figures: dict[str, Any] = {"device": device, "families": {}}
    print(f"{device}; bf16, rank 16, batch 1")
    print(f"{'':56}{'GB':>16}{'s/step':>9}{'first step':>12}")
    for family in arguments.families:
        for resolution in [arguments.resolution] if arguments.resolution else FAMILIES[family]:
            figures["families"][f"{family} {resolution}"] = of_family(family, resolution, arguments)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.diffusers and not arguments.plan:
        beside_peers(arguments)


def of_family(family: str, resolution: int, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Plan every way, measure it if there is a GPU and weights of the family can be made, and print it."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        of_fit = argparse.Namespace(
            size=family,
            resolution=resolution,
            rank=16,
            batch_size=1,
            card=arguments.card,
            scratch=Path(scratch),
            changes=None,
        )
        is_measured = not arguments.plan and family not in fit.WITHOUT_MEMORY
        write_base(of_fit, is_measured=is_measured)
        for addition, planner in fit.planners(of_fit).items():
            for way in arguments.ways:
                settings = in_numbers(WAYS[way], planner.blocks)
                is_for_speed = "compile" in settings or (addition and "base_quantization" in settings)
                if is_for_speed and not is_measured:
                    continue
                planned = fit.planned(planner, saving_of(settings), settings)["in all"] / fit.GB
                of_fit.changes = settings
                measured = fit.run_variant(way, of_fit) if is_measured else {}
                title = f"{family} {resolution}², {way}{addition}"
                found[way + addition] = {"planned": planned, **measured}
                print(title.ljust(56) + line(planned, measured), flush=True)
    return found


def write_base(of_fit: argparse.Namespace, *, is_measured: bool) -> None:
    """The family's random weights, or a file of their shapes."""
    base = of_fit.scratch / "random.safetensors"
    if of_fit.size in fit.WITHOUT_MEMORY:
        return
    if not is_measured:
        fit.write_zeros(base, of_fit.size)
        return
    import checkpoints
    import torch

    getattr(checkpoints, f"{of_fit.size}_checkpoint")(base, size="full", dtype=torch.float16)
    fit.write_pictures(of_fit.scratch / "pictures")


def in_numbers(settings: dict[str, Any], blocks: int) -> dict[str, Any]:
    """The settings of a way, with the number of blocks in place of their share."""
    if "swap_blocks" not in settings:
        return settings
    return {**settings, "swap_blocks": math.ceil(blocks * settings["swap_blocks"])}


def saving_of(settings: dict[str, Any]) -> Any:
    """The plan's name for what settings save."""
    from trainer.training.memory.plan import MemorySaving

    interval = settings.get("gradient_checkpointing_interval", 1) if settings.get("gradient_checkpointing") else 0
    return MemorySaving(interval, swap=settings.get("swap_blocks", 0))


def line(planned: float, measured: dict[str, Any]) -> str:
    """The figures of a way."""
    if not measured:
        return f"{planned:16.2f}"
    memory = "out of memory" if measured.get("failed") else f"{planned:.2f} | {measured['in all'] / fit.GB:.2f}"
    step = f"{1 / measured['rate']:9.3f}" if "rate" in measured else f"{'':9}"
    first = f"{measured['first step']:12.1f}" if "first step" in measured else ""
    return f"{memory:>16}{step}{first}"


def beside_peers(arguments: argparse.Namespace) -> None:
    """The recipe beside the bare network and diffusers' script, by `bench.py`."""
    print()
    for family in ("sd15", "sdxl"):
        if family in arguments.families:
            command = [sys.executable, str(Path(__file__).with_name("bench.py")), "--size", family]
            command += ["--resolution", str(FAMILIES[family][0]), "--rank", "16", "--targets", "attention-mlp"]
            subprocess.run([*command, "--diffusers", str(arguments.diffusers)], check=True)


if __name__ == "__main__":
    main()
