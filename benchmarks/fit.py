"""GPU memory that a training uses, beside what was planned: random weights of real size.

    python benchmarks/fit.py                         SDXL's size, 1024², rank 16, batch 1, bf16
    python benchmarks/fit.py --size sd15 --resolution 512
    python benchmarks/fit.py --card 8                the allocator refuses more than a card of 8 GB has
    python benchmarks/fit.py --plan                  the plan alone, as it also does without a GPU
    python benchmarks/fit.py --plan --size flux2     FLUX.2 klein 4B; only planned, also on a base in fp8
    python benchmarks/fit.py --plan --size zimage    Z-Image, likewise
    python benchmarks/fit.py --plan --size krea2     Krea 2, likewise
    python benchmarks/fit.py --plan --size anima     Anima, likewise

Every variant runs in its own process: as it is, with gradient checkpointing, and with that and 8-bit Adam, NF4, or
both.

Reported in GB, planned and measured:
    encoding    peak of the tensors while pictures and captions are encoded
    steps       peak of the tensors while steps are made
    in all      planned: with the plan's margin; measured: what the allocator reserved
    steps/s     median of the steps after the third
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
sys.dont_write_bytecode = True

WITHOUT_MEMORY = {"flux2": "FLUX.2 klein base 4B", "zimage": "Z-Image", "krea2": "Krea 2", "anima": "Anima"}
"""Sizes that are only planned, with their names for people."""

UNREAD_TOKENS = 34  # of Krea 2's template, as diffusers' Krea2Pipeline counts them
TOKENIZER = ROOT / "demo" / "base" / "tokenizer"
CHECKPOINTING = {"gradient_checkpointing": True}
EIGHT_BIT_ADAM = {"optimizer": "adamw-8bit"}
NF4 = {"base_quantization": "nf4"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": CHECKPOINTING,
    "checkpointing, 8-bit Adam": {**CHECKPOINTING, **EIGHT_BIT_ADAM},
    "checkpointing, NF4": {**CHECKPOINTING, **NF4},
    "checkpointing, 8-bit Adam, NF4": {**CHECKPOINTING, **EIGHT_BIT_ADAM, **NF4},
}
STEPS = 12
WARM_UP_STEPS = 3
GB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", default="sdxl", choices=("sd15", "sd2", "sdxl", *WITHOUT_MEMORY), help="size of the random weights"
    )
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--card", type=float, help="limit the memory to that of a card with so many GB")
    parser.add_argument("--plan", action="store_true", help="only plan")
    parser.add_argument("--only", choices=VARIANTS, help="only this way of saving memory")
    parser.add_argument("--out", type=Path, help="file for the figures, such as benchmarks/results/fit-4060.json")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--changes", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments)))
        return
    import torch

    if arguments.size in WITHOUT_MEMORY and not arguments.plan:
        parser.error(f"{arguments.size} is only planned: add --plan")
    if not arguments.plan and not torch.cuda.is_available():
        print("There is no CUDA GPU: nothing is measured, what follows is the plan alone.\n")
        arguments.plan = True
    with tempfile.TemporaryDirectory() as scratch:
        arguments.scratch = Path(scratch)
        report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Plan every variant, and measure it if there is a GPU; print the figures."""
    base = arguments.scratch / "random.safetensors"
    if arguments.size in WITHOUT_MEMORY:
        pass  # without files
    elif arguments.plan:
        write_zeros(base, arguments.size)
    else:
        import checkpoints
        import torch

        getattr(checkpoints, f"{arguments.size}_checkpoint")(base, size="full", dtype=torch.float16)
        write_pictures(arguments.scratch / "pictures")
    began = time.perf_counter()
    plans = plan_all(arguments)
    seconds = time.perf_counter() - began
    print(
        f"{arguments.size}, bf16, {arguments.resolution}², batch {arguments.batch_size}, rank {arguments.rank}; "
        f"planned in {seconds:.1f} s"
    )
    print(f"{'':43}{'encoding':>16}{'steps':>16}{'in all':>16}{'steps/s':>9}")
    figures: dict[str, Any] = {}
    for variant, planned in plans.items():
        measured = {} if arguments.plan else run_variant(variant, arguments)
        figures[variant] = {"planned": planned, "measured": measured}
        parts = ("encoding", "steps", "in all")
        cells = "".join(f"{_planned_and_measured(planned[part], measured.get(part)):>16}" for part in parts)
        speed = f"{measured['rate']:9.2f}" if "rate" in measured else ""
        failure = "   out of memory" if measured.get("failed") else ""
        print(f"{variant:43}{cells}{speed}{failure}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        names = ("size", "resolution", "rank", "batch_size", "card")
        facts = {name: getattr(arguments, name) for name in names} | {"ways": figures}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _planned_and_measured(planned: float, measured: float | None) -> str:
    return f"{planned / GB:.2f}" + ("" if measured is None else f" | {measured / GB:.2f}")


def settings_for(variant: str, arguments: argparse.Namespace) -> Any:
    """Settings of a variant."""
    from trainer.settings.train import TrainSettings

    return TrainSettings(
        name="fit",
        steps=STEPS,
        rank=arguments.rank,
        resolution=arguments.resolution,
        batch_size=arguments.batch_size,
        precision="bf16",
        checkpoint_every=0,
        resume="never",
        fit="off",
        **(VARIANTS[variant] if arguments.changes is None else arguments.changes),
    )


def plan_all(arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Variant → planned bytes."""
    from trainer.training.memory.plan import MemorySaving

    plans = {}
    for addition, planner in planners(arguments).items():
        for variant, changes in VARIANTS.items():
            if arguments.only in (None, variant):
                saving = MemorySaving(int(bool(changes.get("gradient_checkpointing"))))
                plans[variant + addition] = planned(planner, saving, changes)
    return plans


def planners(arguments: argparse.Namespace) -> dict[str, Any]:
    """What plans a training on each base of the size: as it is and, where that is usual, in fp8."""
    from trainer.models.open import open_base
    from trainer.settings.train import TrainSettings
    from trainer.training.memory.plan import Planner

    if arguments.size in WITHOUT_MEMORY:
        bases = {"": without_memory(arguments.size), ", fp8 base": without_memory(arguments.size, fp8=True)}
    else:
        bases = {"": open_base(arguments.scratch / "random.safetensors", TOKENIZER)}
    settings = TrainSettings(
        rank=arguments.rank, resolution=arguments.resolution, batch_size=arguments.batch_size, precision="bf16"
    )
    return {
        addition: Planner(base, settings, precision="bf16", start=None, priors=False)
        for addition, base in bases.items()
    }


def planned(planner: Any, saving: Any, changes: dict[str, Any]) -> dict[str, int]:
    """What a way needs, in bytes."""
    need = planner.need(saving, quantization=changes.get("base_quantization"), optimizer=changes.get("optimizer"))
    return {"encoding": need.encoding, "steps": need.base + need.trained + need.activations, "in all": need.total}


def without_memory(size: str, *, fp8: bool = False) -> Any:
    """A base model, of which only shapes and types are there; with `fp8` its blocks' projections in eight bits."""
    from anima_checkpoints import ANIMA, anima_on_meta
    from flux2_checkpoints import KLEIN_4B, flux2_on_meta
    from krea2_checkpoints import KREA_2, krea2_on_meta
    from zimage_checkpoints import Z_IMAGE, zimage_on_meta

    from trainer.models.families import FAMILIES
    from trainer.models.families.base import BaseWeights

    family = next(family for family in FAMILIES if family.name == size)
    weights = {
        "flux2": lambda: flux2_on_meta(KLEIN_4B, fp8=fp8),
        "zimage": lambda: zimage_on_meta(Z_IMAGE, fp8=fp8),
        "krea2": lambda: krea2_on_meta(KREA_2, fp8=fp8),
        "anima": lambda: anima_on_meta(ANIMA, fp8=fp8),
    }[size]()
    layout = family.layout
    config = family.complete(layout.denoiser_config(weights.denoiser))
    return BaseWeights(
        family=family,
        denoiser=layout.denoiser(weights.denoiser, config),
        vae=layout.vae(weights.vae, family.scaling_factor),
        text_encoders=[layout.text_encoder(weights.text, family.text_encoders[0])],
        tokenizers=[lambda text, **_: SimpleNamespace(input_ids=[0] * UNREAD_TOKENS)],
        scheduler={},
        prediction=family.detect(weights.denoiser),
        clip_skip=0,
        title=WITHOUT_MEMORY[size],
        fingerprint="",
    )


def run_variant(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one variant in a fresh process; its last line of output is JSON."""
    command = [sys.executable, __file__, "--variant", variant, "--scratch", str(arguments.scratch)]
    for name in ("resolution", "rank", "batch_size", "card"):
        if getattr(arguments, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    if arguments.changes is not None:
        command += ["--changes", json.dumps(arguments.changes)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps on the GPU."""
    import torch

    from trainer.core.errors import OutOfMemoryError
    from trainer.core.events import Phase
    from trainer.data.images import load_pictures
    from trainer.dreambooth import train
    from trainer.models.open import open_base
    from trainer.training.runs.folder import RunPaths

    if arguments.card:
        total_memory = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (arguments.card - 0.5) * GB / total_memory))
    figures: dict[str, Any] = {}
    times: list[float] = []
    began = time.perf_counter()

    class Clock:
        """The recipe asks whether to stop right after every step."""

        def report(self, event: object) -> None:
            if isinstance(event, Phase) and event.name == "encoding pictures" and event.done == event.total:
                figures["encoding"] = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()

        def should_stop(self) -> bool:
            if "encoding" in figures:
                torch.cuda.synchronize()
                times.append(time.perf_counter())
            return False

    clock = Clock()
    pictures = load_pictures(arguments.scratch / "pictures", "a photo of sks dog", clock)
    settings = settings_for(arguments.variant, arguments)
    out = arguments.scratch / arguments.variant.replace(",", "").replace(" ", "-")
    paths = RunPaths(output=out, runs=out / "runs")
    try:
        base = open_base(arguments.scratch / "random.safetensors", TOKENIZER)
        train(base, pictures, [], settings, paths, "cuda", clock)
    except OutOfMemoryError:
        figures["failed"] = True
    figures["steps"] = torch.cuda.max_memory_allocated()
    figures["in all"] = torch.cuda.max_memory_reserved()
    seconds = [after - before for before, after in itertools.pairwise(times)][WARM_UP_STEPS:]
    if seconds:
        figures["rate"] = 1 / statistics.median(seconds)
    if times:
        figures["first step"] = times[0] - began
    return figures


def write_pictures(folder: Path) -> None:
    """Three noisy pictures."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((1024, 1024)).save(folder / f"{number}.jpg")


def write_zeros(path: Path, size: str) -> None:
    """A checkpoint of zeros of real size, as a sparse file that takes no room on most disks: shapes are enough."""
    import checkpoints

    shapes = {"sd15": checkpoints.SHAPES, "sd2": checkpoints.SD2_SHAPES, "sdxl": checkpoints.SDXL_SHAPES}
    header: dict[str, Any] = {}
    end = 0
    for name, dims in checkpoints.parameter_shapes(shapes[size]["full"]):
        begin, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "F16", "shape": list(dims), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


if __name__ == "__main__":
    main()
