"""A host with a finished run and pictures, for tests of the pack's routes, and what lies where no route may lead."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from helpers import Recorder
from pack.trainer.core.events import Preview, Step
from pack.trainer.training.runs.folder import RunFolder
from pack.trainer.training.runs.index import RunIndex
from pack.trainer.training.runs.layout import preview_name, step_name
from pack.trainer.training.runs.metrics import RecordedListener
from PIL import Image
from raw_http import Reply, ask
from safetensors.torch import save_file

OWN = {"X-DreamBooth": "1", "Content-Type": "application/json"}  # what the pack's pages send
SECRET = "no-route-leads-here"
_KEPT = ("input", "output", "dreambooth", "models", "secret")  # where nothing may change unasked
_INPUT = ("dog ü", "empty", "cat.zip", "evil.zip", "linked")
_COPY = "copy of the run"
_RED = (255, 0, 0)


@dataclass(frozen=True)
class Asked:
    """What pages ask a server, and the runs that it answers from."""

    url: str
    shelf: RunIndex

    def ask(self, target: str, method: str = "GET", body: bytes = b"", **headers: str) -> Reply:
        """Send a request as it stands: nothing of the target is quoted or put in order."""
        return ask(self.url, target, method, body, **headers)

    def get(self, target: str) -> Any:
        reply = self.ask(f"/dreambooth{target}")
        assert reply.status == 200, reply.content
        return reply.json


@dataclass(frozen=True)
class Site(Asked):
    """A running host, bare or ComfyUI, with a finished run, and pictures."""

    base_dir: Path
    run: str

    @property
    def folder(self) -> Path:
        return self.shelf.root / self.run

    @property
    def loras(self) -> Path:
        return self.base_dir / "models" / "loras"

    def use(self, body: bytes, **headers: str) -> Reply:
        return self.ask(f"/dreambooth/runs/{quote(self.run)}/use", "POST", body, **OWN | headers)

    def file_url(self, relative: str) -> str:
        return f"/dreambooth/runs/{quote(self.run)}/files/{quote(relative)}"

    def kept(self) -> dict[str, tuple[int, int, int]]:
        """Every file and link, with what changes when it is written or replaced."""
        paths = [path for name in _KEPT for path in (self.base_dir / name).rglob("*")]
        statuses = {str(path): path.lstat() for path in paths if path.is_symlink() or path.is_file()}
        return {path: (status.st_ino, status.st_size, status.st_mtime_ns) for path, status in statuses.items()}

    def put_back(self) -> None:
        """Bring the run back."""
        shutil.copytree(self.base_dir / _COPY, self.folder)

    def is_secret(self, picture: bytes) -> bool:
        """Whether a picture is one that lies outside."""
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=int)
        return bool(np.abs(pixels - _RED).max() < 30)

    def remove(self) -> None:
        """Take away what was made for this site."""
        paths = [self.base_dir / "secret", self.base_dir / _COPY, self.folder, self.folder.parent / "linked"]
        paths += [self.base_dir / "input" / name for name in _INPUT]
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def noisy(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@dataclass(frozen=True)
class WebUISite(Site):
    """A running web UI, with a finished run whose adapters are real files."""

    @property
    def loras(self) -> Path:
        return self.base_dir / "models" / "Lora"


def make_webui_site(base_dir: Path, url: str) -> WebUISite:
    """Fill a web UI's folders."""
    runs = base_dir / "dreambooth" / "runs"
    made = make_site(base_dir, runs)
    for path in [*made.folder.rglob("*.safetensors"), *(base_dir / _COPY).rglob("*.safetensors")]:
        save_file({"weight": torch.zeros(2)}, path, {"modelspec.architecture": "stable-diffusion-v1/lora"})
    return WebUISite(url, made.shelf, base_dir, made.run)


def make_site(base_dir: Path, runs: Path | None = None) -> Site:
    """Fill a host's folders; the site has no URL yet."""
    runs = runs or base_dir / "output" / "dreambooth" / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    run = _finished_run(runs)
    shutil.copytree(run, base_dir / _COPY)
    _fill_secret(base_dir / "secret", run)
    (runs / "linked").symlink_to(base_dir / "secret", target_is_directory=True)
    _fill_input(base_dir / "input", base_dir / "secret")
    return Site("", RunIndex(runs), base_dir, run.name)


def _finished_run(runs: Path) -> Path:
    """The folder of a run as training leaves it, with other bytes in the files that no route reads."""
    run = RunFolder.open(runs, "my dog ü", "5e" * 32, {"steps": 3, "base": "tiny", "rank": 2})
    with RecordedListener(Recorder(), run.metrics_path, 0) as listener:
        for step in range(4):
            if step:
                listener.report(Step(step, 3, 1 / step, 1e-4, 2.0, 1.0, 10**9))
            if step != 1:
                listener.report(_preview(run, step))
    for name in ("optimizer.safetensors", "state.json"):
        _write(run.checkpoint_path(3) / name, f"{name} 3")
    for step, path in ((1, run.kept_adapters_path), (2, run.kept_adapters_path), (3, run.checkpoint_path(3))):
        path.mkdir(exist_ok=True)
        file = path / ("adapter.safetensors" if step == 3 else f"{step_name(step)}.safetensors")
        save_file({"weight": torch.ones(1)}, file, {"ss_steps": str(step)})
    _write(run.cache_path, "cache")
    _write(run.workflow_path, '{"nodes": []}')
    run.subject_path.mkdir()
    noisy((64, 64), 0).save(run.subject_path / "00.jpg")
    return run.path


def _preview(run: RunFolder, step: int) -> Preview:
    paths = [run.preview_path(step) / preview_name("subject", 0, index) for index in range(2)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        noisy((64, 64), 10 * step + number).save(path)
    return Preview(step, [(path, "a dog") for path in paths], {"CLIP-I": 0.5})


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def _fill_secret(secret: Path, run: Path) -> None:
    """A run that is none of the host's; its files hold nothing but a word."""
    shutil.copytree(run, secret)
    for path in secret.rglob("*"):
        if path.is_file():
            path.write_text(
                json.dumps({"name": SECRET, "fingerprint": SECRET, "step": 1, "settings": {"base": SECRET}})
            )
    (secret / f"{SECRET}.txt").write_text(SECRET)
    (secret / "pictures").mkdir()
    Image.new("RGB", (64, 64), _RED).save(secret / "pictures" / "0.png")
    shutil.copy(secret / "pictures" / "0.png", secret / "pictures" / f"{SECRET}.png")


def _fill_input(folder: Path, secret: Path) -> None:
    dog = folder / "dog ü"
    dog.mkdir(parents=True)
    for number, size in enumerate(((640, 320), (100, 400), (50, 40))):
        noisy(size, number).save(dog / f"{number}.png")
    (dog / "0.txt").write_text("a sks dog", encoding="utf-8")
    shutil.copy(dog / "1.png", dog / "twice.png")
    (dog / "damaged.jpg").write_bytes(b"no picture")
    (dog / "inside").mkdir()
    (folder / "empty").mkdir()
    with zipfile.ZipFile(folder / "cat.zip", "w") as archive:
        archive.write(dog / "2.png", "2.png")
    with zipfile.ZipFile(folder / "evil.zip", "w") as archive:
        archive.write(dog / "2.png", "../../models/loras/2.png")
    (folder / "linked").symlink_to(secret / "pictures", target_is_directory=True)
