"""Make the golden files of a version: what a user of that version has on disk, for later versions to read.

    python tools/make_version_golden.py 0.4.0

writes tests/golden/versions/0.4.0/: a run that was killed half-way (`runs/`), adapters of every kind, merged adapters,
and `hashes.json` with a SHA-256 of each file's tensors. All of it is trained by the command line on the demo's base and
pictures, in a few steps. `--pack FOLDER` makes them with another checkout, `--output FOLDER` elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ROOT / "tests" / "golden" / "versions"
HALF_TRAINED = {
    "name": "half-trained",
    "steps": "8",
    "checkpoint_every": "4",
    "lr_schedule": "cosine",  # the length is part of the run's fingerprint
    "rank": "2",
    "text_encoder_lr": "1e-4",
    "text_encoder_until": "0.75",
    "ema_decay": "0.9",
    "dropout": "0.1",
    "flip": None,
    "validation_pictures": "1",
    "prior_count": "4",
    "prior_steps": "4",
}
KINDS = {
    "lora": {},
    "lora-all-layers": {"targets": "all"},
    "rslora": {"rank": "2", "rank_stabilized": None},
    "dora": {"adapter": "dora"},
    "loha": {"adapter": "loha"},
    "lokr": {"adapter": "lokr"},
    "text-encoder": {"targets": "attention", "text_encoder_lr": "1e-4"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": "1.0"},
}
MERGES = {"sum": [], "svd": ["--rank", "2"], "ties": ["--rank", "2"], "orthogonal": []}
COMMON = {
    "base": "demo/base",
    "images": "demo/subject",
    "instance_prompt": "a photo of sks dog",
    "class_prompt": "a photo of a dog",
    "resolution": "64",
    "rank": "1",
    "device": "cpu",
    "precision": "fp32",
    "save_precision": "fp32",
    "seed": "7",
}


# Reads commands, a line of JSON each, and answers each with its exit status alone on standard output. Trainings collect
# garbage several times; what was imported need not be searched.
RUN_COMMANDS = """
import gc, json, os, sys
import diffusers, peft
from trainer.__main__ import main
gc.freeze()
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for line in sys.stdin:
    print(main(json.loads(line)), file=answers, flush=True)
"""


class Trainer:
    """Runs commands of a pack, all in one process that imports it once; a context manager."""

    def __init__(self, pack: Path) -> None:
        """Start the process in the pack's folder, with one thread, so that the sums have one order."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-c", RUN_COMMANDS]
        self._process = subprocess.Popen(
            command,
            cwd=pack,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # which closes its input and waits
            pass

    def run(self, *arguments: str | Path) -> None:
        """Run `python -m trainer` with these arguments; it must end well."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(argument) for argument in arguments]), file=self._process.stdin, flush=True)
        status = self._process.stdout.readline().strip()
        if status != "0":
            sys.exit(f"python -m trainer {' '.join(map(str, arguments))} failed: {status or 'the process ended'}")

    def train(self, output: Path, settings: dict[str, str | None]) -> Path:
        """Train with these settings; returns the adapter file."""
        self.run("train", *flags({**COMMON, **settings}), "--output-dir", output)
        return output / f"{settings['name']}.safetensors"


def flags(settings: dict[str, str | None]) -> list[str]:
    """Settings as the command line takes them; None is a switch that is turned on."""
    given: list[str] = []
    for name, value in settings.items():
        given.append("--" + name.replace("_", "-"))
        if value is not None:
            given.append(value)
    return given


def tensors_hash(path: Path) -> str:
    """SHA-256 of the names and bytes of all tensors of a file, in the order of their names; metadata don't count."""
    digest = hashlib.sha256()
    with safe_open(path, "np") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode())
            digest.update(file.get_tensor(name).tobytes())
    return digest.hexdigest()


def make(pack: Path, folder: Path) -> None:
    """Make the golden files of the checkout `pack`."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch, Trainer(pack) as trainer:
        work = Path(scratch)
        finished = trainer.train(work / "half", HALF_TRAINED)
        shutil.copy(finished, folder / "finished.safetensors")
        [run] = (work / "half" / "runs").iterdir()
        shutil.rmtree(run / "step-00000008")  # as if the run had been killed before it was written
        shutil.copytree(run, folder / "runs" / run.name)
        record = folder / "runs" / run.name / "run.json"
        record.write_text(record.read_text(encoding="utf-8").replace(str(work), "output"), encoding="utf-8")
        shutil.copytree(work / "half" / "class-pictures", folder / "class-pictures")
        for name, settings in KINDS.items():
            shutil.copy(trainer.train(work / name, {"name": name, "steps": "2", **settings}), folder)
        for method, options in MERGES.items():
            pair = [folder / "lora.safetensors", f"{folder / 'loha.safetensors'}:0.7"]
            output = folder / f"merged-{method}.safetensors"
            trainer.run("merge", *pair, "--method", method, *options, "--output", output)
        picture = work / "picture.png"
        prompt = "a photo of sks dog in the snow"
        options = ["--size", "64", "--steps", "6", "--seed", "1", "--device", "cpu", "--precision", "fp32"]
        lora = folder / "merged-sum.safetensors"
        subject = ["--base", "demo/base", "--lora", lora, "--prompt", prompt]
        trainer.run("generate", *subject, "--output", picture, *options)
        shutil.copy(picture, folder / "picture.png")
    hashes = {path.name: tensors_hash(path) for path in sorted(folder.glob("*.safetensors"))}
    hashes["picture.png"] = hashlib.sha256((folder / "picture.png").read_bytes()).hexdigest()
    (folder / "hashes.json").write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Make the golden files that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="name of the folder")
    parser.add_argument("--pack", type=Path, default=ROOT, help="checkout that makes them")
    parser.add_argument("--output", type=Path, default=VERSIONS, help="folder of the versions' folders")
    arguments = parser.parse_args()
    make(arguments.pack.absolute(), arguments.output.absolute() / arguments.version)


if __name__ == "__main__":
    main()
