"""Measures the recipe against the bare network, side by side in one run; prints ratios.

    python benchmarks/bench.py                                     a random SD 1.5-sized model, bf16, 256²
    python benchmarks/bench.py --base model.safetensors            a model of yours
    python benchmarks/bench.py --diffusers train_dreambooth_lora.py    diffusers' example script beside it
    python benchmarks/bench.py --size sdxl --resolution 1024 --rank 16 --targets attention-mlp    on a GPU: SDXL's size,
        and once more with --gradient-checkpointing; with --precision fp16 and --size sd15 through a GradScaler
    python benchmarks/bench.py --smoke --pairs 1 --resolution 64    only tries it out

Reported:
    step ratio          one step of the recipe / one bare forward + backward of the same UNet with the same
                        adapters on tensors made before, at the same precision; medians of pairs taken in turn
    to the first step   seconds from the start of a fresh process until its first training step is done
    peak memory         of that process (resident size; on CUDA the device's peak)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
sys.dont_write_bytecode = True

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

PICTURES = 5
PROMPT = "a photo of sks dog"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="base model; default: random weights")
    parser.add_argument("--size", default="sd15", choices=("sd15", "sd2", "sdxl"), help="size of the random weights")
    parser.add_argument("--smoke", action="store_true", help="only try it out: few random weights")
    parser.add_argument("--targets", default="attention", choices=("attention", "attention-mlp", "all"))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the figures, such as benchmarks/results/sdxl-h200.json")
    parser.add_argument("--tokenizer", type=Path, help="CLIP tokenizer folder, if the base is a single file")
    parser.add_argument("--diffusers", type=Path, help="diffusers' examples/dreambooth/train_dreambooth_lora.py")
    parser.add_argument("--diffusers-python", default=sys.executable, help="Python to run that script with")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=12, help="pairs of steps that are timed")
    parser.add_argument("--part", choices=("all", "ratio", "start"), default="all", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "ratio":
        print(json.dumps(step_ratio(arguments)))
    elif arguments.part == "start":
        print(json.dumps(start_and_memory(arguments)))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            arguments.scratch = Path(scratch)
            report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Make what is missing, run each part in its own process, print the figures."""
    pictures = arguments.scratch / "pictures"
    pictures.mkdir()
    for number in range(PICTURES):
        noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(pictures / f"{number}.jpg")
    if arguments.base is None:
        import checkpoints
        import torch

        write = getattr(checkpoints, f"{arguments.size}_checkpoint")
        size = "tiny" if arguments.smoke else "full"
        arguments.base = write(arguments.scratch / "random.safetensors", size=size, dtype=torch.float16)
    arguments.tokenizer = arguments.tokenizer or tokenizer_folder(arguments)
    ratio = run_part("ratio", arguments)
    start = run_part("start", arguments)
    checkpointing = ", gradient checkpointing" if arguments.gradient_checkpointing else ""
    print(
        f"{arguments.size}, {arguments.precision}, {arguments.resolution}², batch 1, rank {arguments.rank}, "
        f"{arguments.targets}{checkpointing}, {ratio['device']}"
    )
    print(f"step of the recipe   {ratio['recipe']:.3f} s   bare {ratio['bare']:.3f} s   ratio {ratio['ratio']:.3f}")
    print(f"to the first step    {start['first_step']:.1f} s")
    print(f"peak memory          {start['peak'] / 2**30:.2f} GiB")
    if arguments.out:
        names = ("size", "precision", "resolution", "rank", "targets", "gradient_checkpointing")
        facts = {name: getattr(arguments, name) for name in names} | ratio | start
        facts["steps_per_second"] = 1 / ratio["recipe"]
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if arguments.diffusers:
        diffusers = run_diffusers(arguments)
        seconds_ratio = diffusers["step"] / ratio["recipe"]
        start_ratio = diffusers["first_step"] / start["first_step"]
        peak_ratio = diffusers["peak"] / start["peak"]
        print(f"diffusers' script    {diffusers['step']:.3f} s/step   ratio to the recipe {seconds_ratio:.2f}")
        print(f"to the first step    {diffusers['first_step']:.1f} s   ratio {start_ratio:.2f}")
        print(f"peak memory          {diffusers['peak'] / 2**30:.2f} GiB   ratio {peak_ratio:.2f}")


def tokenizer_folder(arguments: argparse.Namespace) -> Path | None:
    """None for a base with its own tokenizer; for random weights one of a few words, which don't matter here."""
    if arguments.base.is_dir() or arguments.base.parent != arguments.scratch:
        return None
    return ROOT / "demo" / "base" / "tokenizer"


def run_part(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a fresh process; its last line of output is JSON."""
    command = [sys.executable, __file__, "--part", part]
    command += ["--base", str(arguments.base), "--scratch", str(arguments.scratch)]
    command += ["--precision", arguments.precision, "--resolution", str(arguments.resolution)]
    command += ["--rank", str(arguments.rank), "--pairs", str(arguments.pairs), "--targets", arguments.targets]
    if arguments.gradient_checkpointing:
        command.append("--gradient-checkpointing")
    if arguments.tokenizer:
        command += ["--tokenizer", str(arguments.tokenizer)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def settings_for(arguments: argparse.Namespace, steps: int) -> Any:
    from trainer.settings.train import TrainSettings

    return TrainSettings(
        name="bench",
        steps=steps,
        rank=arguments.rank,
        targets=arguments.targets,
        resolution=arguments.resolution,
        precision=arguments.precision,
        gradient_checkpointing=arguments.gradient_checkpointing,
        checkpoint_every=0,
        resume="never",
    )


def step_ratio(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time a step of the recipe and a bare forward + backward in turn, in one process."""
    import torch

    from trainer.core.devices import DTYPES, pick_device
    from trainer.core.events import SilentListener
    from trainer.data.images import load_pictures
    from trainer.dreambooth import DreamBooth
    from trainer.models.open import open_base
    from trainer.training.runs.folder import RunPaths

    pictures = load_pictures(arguments.scratch / "pictures", PROMPT, SilentListener())
    base = open_base(arguments.base, arguments.tokenizer)
    device = pick_device("auto")
    out = arguments.scratch / "ratio"
    paths = RunPaths(output=out, runs=out / "runs")
    recipe = DreamBooth(base, pictures, [], settings_for(arguments, steps=1000), paths, device)
    recipe.open_run()
    recipe.prepare()
    session = recipe.session
    latent_shape = session.cache.instance.shapes[0]
    noisy = torch.randn(1, *latent_shape, device=device, dtype=DTYPES[arguments.precision])
    target = torch.randn(1, *latent_shape, device=device)
    timestep = torch.tensor([500], device=device)
    conditioning = {name: row.detach() for name, row in session.text.rows(torch.tensor([0])).items()}
    conditioning["size"] = session.cache.instance.size[:1].to(device)

    def bare_pass() -> None:
        prediction = session.model.predict(noisy, timestep, conditioning)
        torch.nn.functional.mse_loss(prediction.float(), target).backward()

    def recipe_step() -> None:
        recipe.train_step(1.0)

    def seconds_of(work: Callable[[], None]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def drop_gradients() -> None:
        for parameter in session.trainable.parameters():
            parameter.grad = None

    bare_pass()  # both warm up
    recipe_step()
    drop_gradients()
    pairs = []
    for number in range(arguments.pairs):
        order = (bare_pass, recipe_step) if number % 2 else (recipe_step, bare_pass)
        seconds = {work: seconds_of(work) for work in order}
        drop_gradients()
        pairs.append((seconds[recipe_step], seconds[bare_pass]))
    return {
        "recipe": statistics.median(recipe_seconds for recipe_seconds, _ in pairs),
        "bare": statistics.median(bare_seconds for _, bare_seconds in pairs),
        "ratio": statistics.median(recipe_seconds / bare_seconds for recipe_seconds, bare_seconds in pairs),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def start_and_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the start of this process to the end of its first step, and its peak memory after a few steps."""
    import psutil

    began = psutil.Process().create_time()
    from trainer.core.events import Phase
    from trainer.data.images import load_pictures
    from trainer.dreambooth import train
    from trainer.models.open import open_base
    from trainer.training.runs.folder import RunPaths

    class Clock:
        """The recipe asks whether to stop right after every step; a step's event comes later."""

        def __init__(self) -> None:
            self.encoded = False
            self.first_step: float | None = None

        def report(self, event: object) -> None:
            if isinstance(event, Phase):
                self.encoded = event.done == event.total

        def should_stop(self) -> bool:
            if self.encoded and self.first_step is None:
                self.first_step = time.time() - began
            return False

    clock = Clock()
    pictures = load_pictures(arguments.scratch / "pictures", PROMPT, clock)
    out = arguments.scratch / "start"
    base = open_base(arguments.base, arguments.tokenizer)
    paths = RunPaths(output=out, runs=out / "runs")
    train(base, pictures, [], settings_for(arguments, steps=3), paths, "auto", clock)
    import torch

    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()
    return {"first_step": clock.first_step, "peak": peak}


def peak_resident() -> int:
    """Peak resident size of this process in bytes (Linux and macOS)."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_diffusers(arguments: argparse.Namespace) -> dict[str, float]:
    """Run diffusers' example script on the same model and pictures; its figures come from its own progress bar."""
    folder = arguments.base if arguments.base.is_dir() else as_diffusers_folder(arguments)
    steps = 12
    command = [arguments.diffusers_python, str(arguments.diffusers), "--pretrained_model_name_or_path", str(folder)]
    command += ["--instance_data_dir", str(arguments.scratch / "pictures"), "--instance_prompt", PROMPT]
    command += ["--resolution", str(arguments.resolution), "--train_batch_size", "1", "--rank", str(arguments.rank)]
    command += ["--max_train_steps", str(steps), "--output_dir", str(arguments.scratch / "diffusers")]
    command += ["--mixed_precision", "no" if arguments.precision == "fp32" else arguments.precision]
    began = time.time()
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert process.stderr is not None
    finished: dict[int, float] = {}  # step → when it was done
    output = b""
    while chunk := os.read(process.stderr.fileno(), 4096):
        output = (output + chunk)[-2000:]
        for match in re.finditer(rb"Steps:[^\r]*?(\d+)/%d" % steps, output):
            finished.setdefault(int(match[1]), time.time())
    _, status, usage = os.wait4(process.pid, 0)
    if status or steps not in finished:
        raise SystemExit(f"diffusers' script failed:\n{output.decode(errors='replace')}")
    return {
        "first_step": finished[1] - began,
        "step": (finished[steps] - finished[2]) / (steps - 2),
        "peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def as_diffusers_folder(arguments: argparse.Namespace) -> Path:
    """The base as a folder in diffusers' layout, which the script wants."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    from trainer.models.open import open_base

    base = open_base(arguments.base, arguments.tokenizer)
    model = base.family.build(base)
    schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoders["text_encoder"],
        tokenizer=base.tokenizers[0],
        unet=model.denoiser,
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.tokenizer.model_max_length = model.text_encoders["text_encoder"].config.max_position_embeddings
    folder = arguments.scratch / "folder"
    pipeline.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
