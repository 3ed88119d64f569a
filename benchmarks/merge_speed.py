"""Compares merging two SDXL LoRAs with kohya's scripts, side by side in one run; prints ratios.

    python benchmarks/merge_speed.py                              ours alone
    python benchmarks/merge_speed.py --kohya sd-scripts           and a checkout of https://github.com/kohya-ss/sd-scripts
        --kohya-python env/bin/python    with its requirements: torch as here, transformers 4, diffusers
        --modules 60     60 of the 986 modules, evenly spaced: two minutes instead of half an hour
        --limit 45       stop a script of theirs after so many minutes; its figures are then lower bounds

The pair is random and of real size: rank 32, alpha 16, all modules of UNet and both text encoders, fp16, singular
values that fall as a trained LoRA's do; merged at strengths 1.0 and 0.7 on the CPU, written as fp32. Compared are
`--method sum` with sdxl_merge_lora.py --concat, and `--method svd --rank 32` with svd_merge_lora.py --new_rank 32.
Reported, of whole processes, medians over the rounds (their svd runs once), and theirs / ours:
    seconds, CPU seconds, peak   start to end; of all cores; resident size in GiB
    error    of 40 modules, evenly spaced, and the largest, the median and the worst. sum: ‖M − S‖ / ‖S‖ of the
             result M and the exact sum S in float64. svd: ‖M − S‖ / (its smallest value at that rank) − 1, where the
             smallest value is Eckart and Young's. 0 is the optimum; the ratio is that of the errors ‖M − S‖

Their concat multiplies both factors by the ratio and keeps the first file's alpha for twice the rank, so that ratios
a and b give (a²ΔA + b²ΔB) / 2. Line "ratios corrected": √(2a) and √(2b), which a user would have to find out.
Packages that their scripts import but do not use here, such as torchvision, are stubbed where they are missing: that
is in their favour.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import math
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

# The process that starts the others imports nothing large: on Linux a child's peak begins with its parent's size.
ROOT = Path(__file__).resolve().parents[1]
sys.dont_write_bytecode = True

NAMES = ROOT / "tests" / "golden" / "kohya_sdxl_keys.json"
RANK, ALPHA, STRENGTHS = 32, 16.0, (1.0, 0.7)
SAMPLE = 40
UNUSED = ("bitsandbytes", "cv2", "einops", "ftfy", "imagesize", "toml", "torchvision", "voluptuous")


@dataclass
class Tool:
    """One program that merges the pair.

    Attributes:
        job: "sum" or "svd".
        label: Who does it.
        command: Its command line.
        output: File that it writes.
        folder: Where it is started.
        seconds, cpu, peaks: One of each round; GiB.
        stopped: Whether it was stopped at the limit.
    """

    job: str
    label: str
    command: list[str]
    output: Path
    folder: Path
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def is_ours(self) -> bool:
        return self.label == "ours"

    def run(self, limit: float | None) -> None:
        """Run it once in a fresh process and keep its figures; `limit` in seconds."""
        self.output.unlink(missing_ok=True)
        log = self.output.with_suffix(".log")
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        with open(log, "w", encoding="utf-8") as stream:
            began = time.perf_counter()
            process = subprocess.Popen(self.command, cwd=self.folder, stdout=stream, stderr=stream, env=environment)
            timer = threading.Timer(limit or threading.TIMEOUT_MAX, self._stop, [process])
            timer.daemon = True
            timer.start()
            _, status, usage = os.wait4(process.pid, 0)
            self.seconds.append(time.perf_counter() - began)
            process.returncode = os.waitstatus_to_exitcode(status)
            timer.cancel()
        if process.returncode and not self.stopped:
            raise SystemExit(f"{self.label}, {self.job}, failed ({process.returncode}):\n{log.read_text()[-3000:]}")
        self.cpu.append(usage.ru_utime + usage.ru_stime)
        self.peaks.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        self.stopped = True
        process.kill()

    def figures(self) -> dict[str, Any]:
        return {
            "seconds": statistics.median(self.seconds),
            "cpu_seconds": statistics.median(self.cpu),
            "peak_gib": statistics.median(self.peaks),
            "rounds": [
                {"seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak}
                for seconds, cpu, peak in zip(self.seconds, self.cpu, self.peaks, strict=True)
            ],
            "stopped": self.stopped,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kohya", type=Path, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--kohya-python", default=sys.executable, help="Python to run its scripts with")
    parser.add_argument("--modules", type=int, default=0, help="how many modules the pair has; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="how often all but their svd are run, in turn")
    parser.add_argument("--limit", type=float, help="minutes after which a script of theirs is stopped")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "merge-speed.json")
    parser.add_argument("--part", choices=("pair", "errors"), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "pair":
        write_pair(arguments.scratch, arguments.modules)
    elif arguments.part == "errors":
        print(json.dumps(errors(arguments.scratch)))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            arguments.scratch = Path(scratch)
            report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Make the pair, run every program in turn, measure the errors, print and write the figures."""
    code = arguments.scratch / "code"
    shutil.copytree(ROOT / "trainer", code / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(code.rglob("*.py")))).hexdigest()[:12]
    run_part("pair", arguments)
    tools = our_tools(arguments.scratch, code)
    if arguments.kohya:
        tools += their_tools(arguments)
    for number in range(arguments.rounds):
        for tool in tools:
            if tool.stopped or (number and tool.job == "svd" and not tool.is_ours):
                continue
            tool.run(None if tool.is_ours or not arguments.limit else arguments.limit * 60)
            stopped = ", stopped" if tool.stopped else ""
            figures = f"{tool.seconds[-1]:.1f} s, {tool.cpu[-1]:.1f} CPU s, {tool.peaks[-1]:.2f} GiB{stopped}"
            print(f"{tool.job}, {tool.label}: {figures}", file=sys.stderr, flush=True)
    errors_by_file = json.loads(run_part("errors", arguments).splitlines()[-1])
    facts = errors_by_file.pop("facts")
    rows = {name_of(tool): tool.figures() | errors_by_file.get(tool.output.stem, {}) for tool in tools}
    print(as_text(tools, rows, facts))
    results = facts | {
        "code": digest,
        "runs": rows,
        "ratios": {job: ratios(job, tools, rows) for job in ("sum", "svd")},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def our_tools(scratch: Path, code: Path) -> list[Tool]:
    """Our merge, as a user starts it; from a copy, so that all rounds measure the same code."""
    files = [f"{scratch / name}.safetensors:{weight}" for name, weight in zip("AB", STRENGTHS, strict=True)]
    tools = []
    for job, options in (("sum", []), ("svd", ["--rank", str(RANK)])):
        output = scratch / f"{job}-ours.safetensors"
        command = [sys.executable, "-m", "trainer", "merge", *files, "--method", job, *options]
        command += ["--device", "cpu", "--save-precision", "fp32", "--output", str(output)]
        tools.append(Tool(job, "ours", command, output, code))
    return tools


def their_tools(arguments: argparse.Namespace) -> list[Tool]:
    """Kohya's scripts, started by way of `run_script`."""
    networks = arguments.kohya.expanduser().resolve() / "networks"
    corrected = [math.sqrt(2 * weight) for weight in STRENGTHS]
    svd = ["--new_rank", str(RANK), "--new_conv_rank", str(RANK)]
    rows: tuple[tuple[str, str, str, Sequence[float], list[str]], ...] = (
        ("sum", "kohya concat", "sdxl_merge_lora.py", STRENGTHS, ["--concat"]),
        ("sum", "kohya, ratios corrected", "sdxl_merge_lora.py", corrected, ["--concat"]),
        ("svd", "kohya svd", "svd_merge_lora.py", STRENGTHS, svd),
    )
    tools = []
    for number, (job, label, script, weights, options) in enumerate(rows):
        output = arguments.scratch / f"{job}-kohya-{number}.safetensors"
        command = [arguments.kohya_python, str(Path(__file__).resolve()), "--script", str(networks / script)]
        command += ["--models", *(str(arguments.scratch / f"{name}.safetensors") for name in "AB")]
        command += ["--ratios", *map(str, weights), "--save_to", str(output), *options]
        tools.append(Tool(job, label, [*command, "--precision", "float", "--save_precision", "float"], output, ROOT))
    return tools


def name_of(tool: Tool) -> str:
    return f"{tool.job}, {tool.label}"


def ratios(job: str, tools: Sequence[Tool], rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Label → figure → theirs / ours; of the errors of svd (1 + theirs) / (1 + ours)."""
    by_label = {}
    ours = rows[f"{job}, ours"]
    for tool in tools:
        if tool.job != job or tool.is_ours:
            continue
        theirs = rows[name_of(tool)]
        by_label[tool.label] = {}
        for name in ours:
            if name in theirs and name not in ("rounds", "stopped"):
                above = int(job == "svd" and name.startswith("error"))
                by_label[tool.label][name] = (theirs[name] + above) / (ours[name] + above)
    return by_label


def as_text(tools: Sequence[Tool], rows: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """The table for people."""
    columns = ("seconds", "cpu_seconds", "peak_gib", "error_median", "error_worst")
    lines = [
        f"{facts['modules']} modules, rank {facts['rank']}, {facts['cores']} cores, torch {facts['torch']}",
        " " * 34 + "".join(f"{name.replace('_', ' '):>14}" for name in columns),
    ]
    for job in ("sum", "svd"):
        compared = ratios(job, tools, rows)
        for tool in tools:
            if tool.job == job:
                values = rows[name_of(tool)]
                bound = ", stopped" if tool.stopped else ""
                lines.append(f"{name_of(tool) + bound:<34}" + "".join(cell(values.get(name)) for name in columns))
        for label, values in compared.items():
            lines.append(f"{f'  {label} / ours':<34}" + "".join(cell(values.get(name)) for name in columns))
    return "\n".join(lines)


def cell(value: float | None) -> str:
    """A number in 14 places."""
    if value is None:
        return f"{'–':>14}"
    return f"{value:>14.2f}" if 0.01 <= abs(value) < 1e6 else f"{value:>14.1e}"


def run_part(part: str, arguments: argparse.Namespace) -> str:
    """Run one part in a fresh process; what it prints."""
    command = [sys.executable, __file__, "--part", part, "--scratch", str(arguments.scratch)]
    command += ["--modules", str(arguments.modules)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def evenly(names: Sequence[str], count: int) -> list[str]:
    """That many of them, evenly spaced."""
    if not 0 < count < len(names):
        return list(names)
    return [names[index * len(names) // count] for index in range(count)]


def write_pair(scratch: Path, modules: int) -> None:
    """Write the two adapters, A.safetensors and B.safetensors."""
    import torch

    sys.path.insert(0, str(ROOT))
    from trainer.adapters.kohya import Adapter, write_adapter
    from trainer.adapters.layers import LoraLayer

    known: dict[str, list[list[int]]] = json.loads(NAMES.read_text(encoding="utf-8"))
    names = evenly(sorted(known), modules)
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora"}
    fall = torch.arange(1, RANK + 1) ** -0.75
    for number, title in enumerate("AB"):
        rng = torch.Generator().manual_seed(number)
        layers = {}
        for name in names:
            (_, *inside), (out, _, *kernel) = known[name]
            down = torch.randn(RANK, *inside, generator=rng) / math.sqrt(math.prod(inside))
            up = 0.02 * torch.randn(out, RANK, generator=rng) * fall
            layers[name] = LoraLayer(down.half(), up.reshape(out, RANK, *kernel).half(), ALPHA)
        write_adapter(scratch / f"{title}.safetensors", Adapter(layers, metadata), torch.float16)


def errors(scratch: Path) -> dict[str, dict[str, Any]]:
    """File name of each result, without ending → its errors; and the facts of the comparison."""
    import torch
    from safetensors import safe_open
    from torch import Tensor

    def factors(file: Any, name: str) -> tuple[Tensor, Tensor]:
        """(out, rank) and (rank, in·k·k) of what a file adds to a module, float64."""
        up, down = (file.get_tensor(f"{name}.lora_{side}.weight").double().flatten(1) for side in ("up", "down"))
        return up * (float(file.get_tensor(f"{name}.alpha")) / len(down)), down

    pair: list[Any] = [safe_open(scratch / f"{title}.safetensors", "pt") for title in "AB"]
    results = {path.stem: safe_open(path, "pt") for path in sorted(scratch.glob("s*.safetensors"))}
    names = sorted(key.removesuffix(".alpha") for key in pair[0].keys() if key.endswith(".alpha"))  # noqa: SIM118
    sizes = {name: math.prod(pair[0].get_slice(f"{name}.lora_up.weight").get_shape()) for name in names}
    sizes = {name: size * pair[0].get_slice(f"{name}.lora_down.weight").get_shape()[1] for name, size in sizes.items()}
    sample = sorted({*evenly(names, SAMPLE), max(names, key=lambda name: sizes[name])})
    errors_of: dict[str, list[float]] = {stem: [] for stem in results}
    for name in sample:
        parts = [factors(file, name) for file in pair]
        up = torch.cat([up * weight for (up, _), weight in zip(parts, STRENGTHS, strict=True)], dim=1)
        down = torch.cat([down for _, down in parts])
        core = torch.linalg.qr(up)[1] @ torch.linalg.qr(down.T)[1].T
        singular_values = torch.linalg.svdvals(core)
        smallest_error = float(singular_values[RANK:].norm())
        norm = float(singular_values.norm())
        exact_sum = up @ down
        for stem, file in results.items():
            merged_up, merged_down = factors(file, name)
            error = float((exact_sum - merged_up @ merged_down).norm())
            errors_of[stem].append(error / smallest_error - 1 if stem.startswith("svd") else error / norm)
    facts = {
        "modules": len(names),
        "rank": RANK,
        "alpha": ALPHA,
        "strengths": STRENGTHS,
        "sampled": len(sample),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    rows = {
        stem: {
            "error_median": statistics.median(values),
            "error_worst": max(values),
            "file_bytes": (scratch / f"{stem}.safetensors").stat().st_size,
        }
        for stem, values in errors_of.items()
    }
    return rows | {"facts": facts}


class Anything:
    """Whatever a stubbed package is asked for."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> Anything:
        return self

    def __getattr__(self, name: str) -> Anything:
        return self

    def __mro_entries__(self, bases: object) -> tuple[type, ...]:
        return (object,)


class Stub(ModuleType):
    """A package of anything."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives stubs for packages that are missing."""

    def __init__(self, names: Sequence[str]) -> None:
        self._missing = {name for name in names if importlib.util.find_spec(name) is None}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        missing = name.split(".")[0] in self._missing
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if missing else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Stub:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def run_script(script: Path, words: list[str]) -> None:
    """Run one of kohya's scripts in this process, with stubs for packages that it does not use."""
    import diffusers  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    sys.meta_path.append(Stubs(UNUSED))
    sys.path[:1] = [str(script.parent), str(script.parents[1])]
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--script"]:
        run_script(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
