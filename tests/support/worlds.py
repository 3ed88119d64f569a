"""Where runs of a few steps take place: a tiny base model, pictures, and the ways to look at what came out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import sdxl_checkpoint
from helpers import DEMO, Recorder
from pack.trainer.core.errors import CancelledError
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.dreambooth import DreamBooth, Session, TrainResult, train
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import StartingPoint, TrainableAdapter
from pack.trainer.training.runs.folder import RunPaths
from pack.trainer.training.validation import validation_loss
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

PROMPT = "a photo of sks dog"
SHAPES = [(64, 64), (128, 64), (64, 128), (100, 80), (90, 65), (64, 200)]  # for buckets at a resolution of 64
TOKENIZER = DEMO / "base" / "tokenizer"
COMMON: dict[str, Any] = {
    "name": "dog",
    "steps": 4,
    "rank": 2,
    "targets": "attention",
    "resolution": 64,
    "learning_rate": 1e-2,
    "save_precision": "fp32",
    "keep_checkpoints": 100,
    "checkpoint_every": 0,
}
# Every kind of adapter, with ranks and alphas that differ wherever a mistake in the scale would show.
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"alpha": 1.0},
    "LoCon": {"targets": "all", "rank": 4, "conv_rank": 2, "conv_alpha": 1.0},
    "rsLoRA": {"rank_stabilized": True, "rank": 4, "alpha": 3.0},
    "T-LoRA": {"rank_schedule": "timestep", "targets": "all", "rank": 4, "conv_rank": 3, "min_rank": 1, "alpha": 3.0},
    "Ortho-LoRA": {"lora_init": "orthogonal", "targets": "all", "rank": 4, "conv_rank": 3, "alpha": 3.0},
    "DoRA": {"adapter": "dora", "targets": "all", "alpha": 1.0},
    "LoHa": {"adapter": "loha", "targets": "all", "alpha": 1.0},
    "LoKr": {"adapter": "lokr", "targets": "all"},
    "LoKr of 4": {"adapter": "lokr", "targets": "all", "lokr_factor": 4},
    "OFT": {"adapter": "oft", "targets": "all", "rank": 4, "conv_rank": 8},
    "BOFT": {"adapter": "boft", "targets": "all", "rank": 4, "conv_rank": 8},
}
TEXT = {"text_encoder_lr": 1e-2}
BOTH_TEXTS = {"text_encoder_lr": 1e-2, "text_encoder_2_lr": 1e-2}


def paths_in(folder: Path) -> RunPaths:
    """Where a run writes that has its files below `folder`."""
    return RunPaths(folder / "loras", folder / "runs", folder / "checkpoints")


class KeptRecipe(DreamBooth):
    """A recipe whose model can still be looked at after the run, which gives it away before it writes its files."""

    _kept: Session | None = None

    @property
    def session(self) -> Session:
        """What `prepare` built."""
        session = self._session or self._kept
        assert session is not None
        return session

    def clean_up(self) -> None:
        """Keep the session, which the run gives away."""
        self._kept = self._session or self._kept
        super().clean_up()


@dataclass(frozen=True)
class World:
    """A base model and pictures; runs start from here."""

    base: BaseWeights
    subject: Sequence[Picture]
    priors: Sequence[Picture] = ()

    def recipe(
        self, folder: Path, listener: Any = None, *, starting_point: StartingPoint | None = None, **changes: Any
    ) -> DreamBooth:
        """A run that has not begun, with its files below `folder`."""
        return KeptRecipe(
            self.base,
            self.subject,
            self.priors,
            TrainSettings(**{**COMMON, **changes}),
            paths_in(folder),
            torch.device("cpu"),
            listener or Recorder(),
            starting_point,
        )

    def prepared(self, folder: Path, listener: Any = None, **changes: Any) -> DreamBooth:
        """A run whose pictures and captions are encoded and whose networks are there, before its first step."""
        recipe = self.recipe(folder, listener, **changes)
        recipe.open_run()
        recipe.prepare()
        return recipe

    def train(
        self, folder: Path, listener: Any = None, *, starting_point: StartingPoint | None = None, **changes: Any
    ) -> TrainResult:
        """A whole run, with its files below `folder`."""
        return train(
            self.base,
            self.subject,
            self.priors,
            TrainSettings(**{**COMMON, **changes}),
            paths_in(folder),
            "cpu",
            listener or Recorder(),
            starting_point=starting_point,
        )

    def stop_after(self, step: int, folder: Path, **changes: Any) -> None:
        """Begin a run, or go on with it, and stop it after that step."""
        [done] = [newest_step(run) for run in runs_in(folder)] or [None]
        asked_before = len(self.subject) + len(self.priors) if done is None else -done
        with pytest.raises(CancelledError) as stopped:
            self.train(folder, Recorder(stop_after=asked_before + step), **changes)
        assert stopped.value.step == step

    def with_priors(self, folder: Path) -> World:
        """The same with class pictures."""
        return replace(self, priors=load_pictures(noisy_pictures(folder, 2, 50), "a photo of a dog", Recorder()))


@dataclass(frozen=True)
class Finished:
    """A run that has ended, with a checkpoint of every step. Many tests look at it or copy it; none changes it."""

    folder: Path
    result: TrainResult
    listener: Recorder

    def copy(self, folder: Path) -> Path:
        """Put the run, without the files that it exported, below `folder`; returns the run's own folder."""
        return Path(shutil.copytree(self.result.run, folder / "runs" / self.result.run.name))

    def begun(self, folder: Path, step: int) -> Path:
        """The same as it lay there after that step, as a process leaves it that is killed during the next one."""
        run = self.copy(folder)
        for later in range(step + 1, self.result.step + 1):
            shutil.rmtree(run / f"step-{later:08d}")
        return run


def finish(world: World, folder: Path, **changes: Any) -> Finished:
    """Train with a checkpoint of every step, and keep what was reported."""
    listener = Recorder()
    result = world.train(folder, listener, **{"checkpoint_every": 1, **changes})
    return Finished(folder, result, listener)


def make_world(checkpoint: Path, folder: Path) -> World:
    """A checkpoint that goes with the demo's tokenizer, and three pictures in `folder`."""
    pictures = load_pictures(noisy_pictures(folder, 3, 0), PROMPT, Recorder())
    return World(open_base(checkpoint, TOKENIZER), pictures)


def make_xl_world(folder: Path) -> World:
    """The smallest SDXL."""
    return make_world(sdxl_checkpoint(folder / "tiny-xl.safetensors", size="tiny"), folder / "subject")


def noisy_pictures(folder: Path, count: int, first_seed: int) -> Path:
    """Squares of 64 pixels in a new folder, each as its seed has it."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(first_seed + number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def pictures_of(folder: Path, sizes: Sequence[tuple[int, int]], prompt: str, *, masked: bool = False) -> list[Picture]:
    """Noisy pictures of these widths and heights in a new folder; every second one with its left half as a mask."""
    folder.mkdir(parents=True)
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        if masked and number % 2:
            mask = Image.new("L", (width, height))
            mask.paste(255, (0, 0, width // 2, height))
            mask.save(folder / f"{number}_mask.png")
    return load_pictures(folder, prompt, Recorder())


def runs_in(folder: Path) -> list[Path]:
    return sorted((folder / "runs").glob("*-*"))


def steps_in(run: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))


def newest_step(run: Path) -> int:
    return max(steps_in(run), default=0)


def differing(ours: Path, theirs: Path) -> list[str]:
    """Names of the tensors that are not equal bit for bit in two safetensors files."""
    first, second = load_file(ours), load_file(theirs)
    assert set(first) == set(second)
    return [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


def assert_same_end(ours: TrainResult, theirs: TrainResult) -> None:
    """The files, and the last checkpoints with all of the optimiser, are equal bit for bit."""
    assert differing(ours.path, theirs.path) == []
    assert (ours.checkpoint is None) == (theirs.checkpoint is None)
    if ours.checkpoint and theirs.checkpoint:
        assert differing(ours.checkpoint, theirs.checkpoint) == []
    step = f"step-{newest_step(theirs.run):08d}"
    files = {path.name for path in (theirs.run / step).glob("*.safetensors")}
    trained = "weights.safetensors" if theirs.checkpoint else "adapter.safetensors"
    assert files - {"live.safetensors", "factors.safetensors"} == {"optimizer.safetensors", trained}
    assert {path.name for path in (ours.run / step).glob("*.safetensors")} == files
    for file in files:
        assert differing(ours.run / step / file, theirs.run / step / file) == []


def conditioned(model: DiffusionModel) -> dict[str, Tensor]:
    """What a model's text encoders say of the prompt."""
    with torch.no_grad():
        return model.encode_prompts([PROMPT]) | {"size": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}


def predicted(model: DiffusionModel, conditioning: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What a model's networks say: of the prompt, by their own text encoders if it is not given, and of some noise."""
    said = dict(conditioning or conditioned(model))
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return said | {"prediction": model.predict(noise, torch.tensor([300]), said)}


def distances(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative distance of everything that two models predicted and that is no fact."""
    assert set(ours) == set(theirs)
    return {
        name: float(torch.linalg.vector_norm(ours[name] - value) / torch.linalg.vector_norm(value))
        for name, value in theirs.items()
        if name != "size"
    }


def perturb(adapter: TrainableAdapter, by: float = 0.05) -> None:
    """Random numbers on all parameters, as training would leave them."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=source))


def lent_tensors(base: BaseWeights) -> dict[str, Tensor]:
    """Every tensor of a base model."""
    parts = {"unet": base.denoiser, "vae": base.vae, "text": base.text_encoders[0], "text_2": base.text_encoders[-1]}
    return {f"{part}.{name}": tensor for part, one in parts.items() for name, tensor in one.tensors.items()}


def losses(recipe: DreamBooth, step: int) -> list[Tensor]:
    """The losses of the batches of a step's first micro-batch, 0-D, of a recipe that is prepared."""
    recipe.step = step
    return [recipe.batch_loss(batch, 0) for batch in recipe.batches(0)]


def held_out_loss(recipe: DreamBooth) -> float:
    """The loss on the held-out pictures, of a recipe that is prepared."""
    session = recipe.session
    assert session.cache.validation is not None
    return validation_loss(session.model, session.objective, session.text, session.cache.validation, session.dtype)
