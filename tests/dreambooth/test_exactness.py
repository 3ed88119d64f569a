"""Nothing is lost and nothing is done twice: a run that was stopped in any way ends bit for bit as one that was not."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from cases import mostly_slow
from helpers import ROOT, Recorder
from pack.trainer.adapters.kohya import Adapter, LoraLayer
from pack.trainer.cli.train import run_train
from pack.trainer.core.errors import CancelledError, StorageError
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.dreambooth import TrainResult, train
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from pack.trainer.settings.preview import PreviewSettings
from pack.trainer.settings.train import TrainCommand, TrainSettings
from pack.trainer.training.runs.folder import RunPaths, run_fingerprint
from PIL import Image
from safetensors.torch import load_file, save_file

COMMON: dict[str, Any] = {
    "name": "dog",
    "steps": 12,
    "rank": 2,
    "targets": "attention",
    "resolution": 64,
    "learning_rate": 1e-2,
    "save_precision": "fp32",
    "keep_checkpoints": 100,
    "checkpoint_every": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class pictures, cosine, accumulation, flip": {
        "lr_schedule": "cosine",
        "lr_warmup_steps": 2,
        "gradient_accumulation": 2,
        "flip": True,
    },
    "DoRA of layers of their own, text encoder for six steps, dropout, limited norm": {
        "adapter": "dora",
        "targets": "all",
        "exclude": "up_blocks",
        "block_ranks": "mid_block=1 self_attn=3:1.5",
        "text_encoder_lr": 5e-3,
        "text_encoder_until": 0.5,
        "dropout": 0.25,
        "max_norm": 0.5,
    },
    "all weights, text encoder": {"adapter": "full", "learning_rate": 1e-4, "text_encoder_lr": 1e-5},
}
PLAIN, RICH, NEW, FULL = VARIANTS


@dataclass(frozen=True)
class World:
    """A base model and pictures; runs start from here."""

    base: BaseWeights
    subject: list[Picture]
    priors: list[Picture]

    def train(
        self, folder: Path, listener: Any = None, *, variant: str = PLAIN, **changes: Any
    ) -> tuple[TrainResult, Recorder]:
        """Run the recipe with its outputs below `folder`."""
        settings = TrainSettings(**{**COMMON, **VARIANTS[variant], **changes})
        listener = listener or Recorder()
        priors = self.priors if variant == RICH else []
        paths = RunPaths(folder / "loras", folder / "runs", folder / "models")
        result = train(self.base, self.subject, priors, settings, paths, "cpu", listener)
        return result, listener

    def stop_after(self, step: int, folder: Path, *, variant: str = PLAIN, **changes: Any) -> None:
        """Begin a run, or go on with it, and stop it after that step."""
        begun = run_folders(folder)
        pictures = len(self.subject) + (len(self.priors) if variant == RICH else 0)
        asked_before = -newest_step(begun[0]) if begun else pictures
        with pytest.raises(CancelledError) as stopped:
            self.train(folder, Recorder(stop_after=asked_before + step), variant=variant, **changes)
        assert stopped.value.step == step


def run_folders(folder: Path) -> list[Path]:
    return sorted((folder / "runs").glob("*-*"))


def steps_in(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))


def newest_step(run: Path) -> int:
    return max(steps_in(run), default=0)


def differing(ours: Path, theirs: Path) -> list[str]:
    """Names of the tensors that are not equal bit for bit in two safetensors files."""
    first, second = load_file(ours), load_file(theirs)
    assert set(first) == set(second)
    return [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


def assert_same_end(ours: TrainResult, theirs: TrainResult, step: int = 12) -> None:
    """The adapter files, and the checkpoints of the last step with all of the optimiser, are equal bit for bit."""
    assert differing(ours.path, theirs.path) == []
    trained = "adapter.safetensors"
    if ours.checkpoint is not None and theirs.checkpoint is not None:
        assert differing(ours.checkpoint, theirs.checkpoint) == []
        trained = "weights.safetensors"
    for file in (trained, "optimizer.safetensors"):
        assert differing(*(result.run / f"step-{step:08d}" / file for result in (ours, theirs))) == []


def noisy_pictures(folder: Path, count: int, first_seed: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(first_seed + number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("pictures")
    base = open_base(tiny_checkpoint)
    subject = load_pictures(noisy_pictures(folder / "subject", 3, 0), "a photo of sks dog", Recorder())
    priors = load_pictures(noisy_pictures(folder / "class", 2, 50), "a photo of a dog", Recorder())
    return World(base, subject, priors)


class StraightRuns(dict[str, tuple[TrainResult, Recorder]]):
    """Twelve steps without a stop, by variant; each is trained when it is first asked for."""

    def __init__(self, world: World, folder: Path) -> None:
        super().__init__()
        self._world = world
        self._folder = folder

    def __missing__(self, variant: str) -> tuple[TrainResult, Recorder]:
        self[variant] = self._world.train(self._folder / str(len(self)), variant=variant)
        return self[variant]


@pytest.fixture(scope="module")
def straight(world: World, tmp_path_factory: pytest.TempPathFactory) -> StraightRuns:
    gc.collect()
    gc.freeze()  # the recipe collects garbage several times a run; what was imported by now need not be searched
    return StraightRuns(world, tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def stopped(world: World, straight: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 2, 4 and 5, where it was stopped. To be copied."""
    folder = tmp_path_factory.mktemp("stopped")
    world.stop_after(5, folder, checkpoint_every=2)
    assert steps_in(run_folders(folder)[0]) == [2, 4, 5]
    return folder


@pytest.fixture
def stopped_copy(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_stops_leave_no_trace(
    variant: str, world: World, straight: dict[str, tuple[TrainResult, Recorder]], tmp_path: Path
) -> None:
    for step in (1, 4, 5, 11):
        world.stop_after(step, tmp_path, variant=variant)
        [run] = run_folders(tmp_path)
        assert newest_step(run) == step
        assert not list((tmp_path / "loras").glob("*.safetensors"))
    result, _ = world.train(tmp_path, variant=variant)
    assert result.started_from == 11
    assert_same_end(result, straight[variant][0])


@pytest.mark.slow
def test_checkpoints_do_not_disturb(
    world: World, straight: dict[str, tuple[TrainResult, Recorder]], tmp_path: Path
) -> None:
    result, listener = world.train(tmp_path, variant=RICH, checkpoint_every=5)
    expected, expected_listener = straight[RICH]
    assert_same_end(result, expected)
    assert listener.losses == expected_listener.losses
    assert steps_in(result.run) == [5, 10, 12]


@pytest.mark.slow
def test_a_resumed_run_sees_the_same_losses(
    stopped_copy: Path, world: World, straight: dict[str, tuple[TrainResult, Recorder]]
) -> None:
    result, listener = world.train(stopped_copy)
    assert result.started_from == 5
    assert listener.losses == straight[PLAIN][1].losses[5:]
    assert_same_end(result, straight[PLAIN][0])


@pytest.mark.slow
def test_kill_leaves_no_trace(tiny_checkpoint: Path, world: World, tmp_path: Path) -> None:
    """The command line, killed without warning after its first checkpoint, and run again."""
    images = noisy_pictures(tmp_path / "images", 3, 0)
    values: dict[str, Any] = {
        **COMMON,
        **VARIANTS[RICH],
        "steps": 16,
        "checkpoint_every": 3,
        "base": tiny_checkpoint,
        "images": images,
        "class_prompt": "a photo of a dog",
        "prior_count": 2,
        "prior_steps": 2,
        "device": "cpu",
        "output_dir": tmp_path / "killed",
    }
    flags = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    log = tmp_path / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-m", "trainer", "train", *flags], cwd=ROOT, stderr=stream)
        deadline = time.monotonic() + 120
        while process.poll() is None and not list((tmp_path / "killed" / "runs").glob("*/step-*")):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.002)
        process.kill()
        process.wait()
    [run] = run_folders(tmp_path / "killed")
    assert not (tmp_path / "killed" / "dog.safetensors").exists(), log.read_text()
    assert 3 <= newest_step(run) < 16
    (run / "progress.txt").write_text("kept")

    listener = Recorder()
    result = run_train(TrainCommand.checked(values), listener)
    expected = run_train(TrainCommand.checked(values | {"output_dir": tmp_path / "straight"}), Recorder())
    assert result.run == run
    assert (run / "progress.txt").exists()
    assert 0 < len(listener.losses) == 16 - result.started_from < 16
    assert_same_end(result, expected, step=16)


def test_a_finished_run_is_not_trained_again(world: World, tmp_path: Path) -> None:
    first, _ = world.train(tmp_path, steps=3)
    content = first.path.read_bytes()
    again, listener = world.train(tmp_path, steps=3)
    assert listener.losses == []
    assert (again.path, again.run, again.started_from) == (first.path, first.run, 3)
    assert again.path.read_bytes() == content
    assert list(first.path.parent.iterdir()) == [first.path]

    first.path.unlink()
    exported, listener = world.train(tmp_path, steps=3)
    assert listener.losses == []
    assert exported.path == first.path
    assert differing(exported.path, first.run / "step-00000003" / "adapter.safetensors") == []
    assert exported.adapter.metadata["sshs_model_hash"] == first.adapter.metadata["sshs_model_hash"]


def test_a_finished_run_needs_its_state_no_more(world: World, tmp_path: Path) -> None:
    """Its adapter is whole; what is damaged is only wanted to go on."""
    finished, _ = world.train(tmp_path, steps=2)
    state = finished.run / "step-00000002" / "state.json"
    state.write_text(state.read_text()[:20])
    again, listener = world.train(tmp_path, steps=2)
    assert (again.path, listener.losses) == (finished.path, [])
    with pytest.raises(StorageError, match=r"step-00000002 is damaged"):
        world.train(tmp_path, steps=3)


@pytest.mark.parametrize(
    ("changes", "file"),
    [
        ({"name": "hound"}, "loras/hound.safetensors"),
        ({"name": "dog[1]"}, "loras/dog[1].safetensors"),
        ({"checkpoint_every": 2}, "loras/dog.safetensors"),
        ({"keep_checkpoints": 1}, "loras/dog.safetensors"),
        ({"gradient_checkpointing": True}, "loras/dog.safetensors"),
        ({"precision": "fp32"}, "loras/dog.safetensors"),
        ({"alpha": 2.0}, "loras/dog.safetensors"),
    ],
    ids=str,
)
def test_what_the_result_does_not_depend_on_starts_no_new_run(
    changes: dict[str, Any], file: str, straight: dict[str, tuple[TrainResult, Recorder]], world: World, tmp_path: Path
) -> None:
    done = straight[PLAIN][0]
    shutil.copytree(done.run.parent, tmp_path / "runs")
    for _ in range(2):
        result, listener = world.train(tmp_path, **changes)
        assert listener.losses == []
        assert result.path == tmp_path / file
        assert differing(result.path, done.path) == []
    assert result.adapter.metadata["ss_output_name"] == changes.get("name", "dog")
    assert len(list((tmp_path / "loras").iterdir())) == 1


def test_another_output_folder_gets_the_file_without_training(world: World, tmp_path: Path) -> None:
    first, _ = world.train(tmp_path, steps=2)
    settings = TrainSettings(**{**COMMON, "steps": 2})
    listener = Recorder()
    again = train(
        world.base, world.subject, [], settings, RunPaths(tmp_path / "elsewhere", tmp_path / "runs"), "cpu", listener
    )
    assert listener.losses == []
    assert again.path == tmp_path / "elsewhere" / "dog.safetensors"
    assert differing(again.path, first.path) == []


def test_the_file_has_the_precision_that_was_asked_for(world: World, tmp_path: Path) -> None:
    """Also when the run was finished before and its file lies there in another precision."""
    for precision, dtype in (("fp16", torch.float16), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        result, _ = world.train(tmp_path, steps=2, save_precision=precision)
        matrices = {t.dtype for n, t in load_file(result.path).items() if not n.endswith(".alpha")}
        assert matrices == {dtype}


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_shorter_one(world: World, tmp_path: Path) -> None:
    straight, _ = world.train(tmp_path / "straight", steps=9)
    short, _ = world.train(tmp_path / "two", steps=6)
    content = short.path.read_bytes()
    long, listener = world.train(tmp_path / "two", steps=9)
    assert long.run == short.run
    assert long.started_from == 6
    assert len(listener.losses) == 3
    assert_same_end(long, straight, step=9)
    assert short.path.read_bytes() == content
    assert long.path != short.path
    assert [result.adapter.metadata["ss_steps"] for result in (short, long)] == ["6", "9"]
    shorter, listener = world.train(tmp_path / "two", steps=6)
    assert listener.losses == []
    assert shorter.path == short.path


@pytest.mark.parametrize("schedule", get_args(TrainSettings.model_fields["lr_schedule"].annotation))
def test_every_schedule_takes_the_smallest_rates(schedule: str, world: World, tmp_path: Path) -> None:
    _, listener = world.train(tmp_path, steps=1, lr_schedule=schedule, learning_rate=1e-8)
    assert len(listener.losses) == 1


def test_a_run_whose_rate_depends_on_its_length_is_not_extended(world: World, tmp_path: Path) -> None:
    short, _ = world.train(tmp_path, steps=3, lr_schedule="linear")
    long, listener = world.train(tmp_path, steps=4, lr_schedule="linear")
    assert long.run != short.run
    assert len(listener.losses) == 4


def other_caption(world: World) -> World:
    return replace(world, subject=[replace(world.subject[0], caption="another"), *world.subject[1:]])


def other_picture(world: World) -> World:
    return replace(world, subject=[replace(world.subject[0], digest="0" * 64), *world.subject[1:]])


def fewer_pictures(world: World) -> World:
    return replace(world, subject=world.subject[:-1])


def no_class_pictures(world: World) -> World:
    return replace(world, priors=[])


def other_class_caption(world: World) -> World:
    return replace(world, priors=[replace(picture, caption="a dog") for picture in world.priors])


def other_base(world: World) -> World:
    return replace(world, base=replace(world.base, fingerprint="0" * 64))


def swapped_kinds(world: World) -> World:
    return replace(world, subject=world.priors, priors=world.subject)


def fingerprint_of(world: World, settings: TrainSettings, precision: str = "fp32", start: Adapter | None = None) -> str:
    return run_fingerprint(world.base, world.subject, world.priors, settings, precision, start)


def test_another_adapter_to_start_from_makes_another_run(world: World) -> None:
    """What it says of itself does not count."""
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    starts = [
        None,
        Adapter({"lora_unet_x": LoraLayer(down, up, 2.0)}),
        Adapter({"lora_unet_x": LoraLayer(down, up, 1.0)}),
        Adapter({"lora_unet_x": LoraLayer(down, 2 * up, 2.0)}),
    ]
    assert len({fingerprint_of(world, TrainSettings(), start=start) for start in starts}) == len(starts)
    renamed = replace(starts[1], metadata={"ss_output_name": "cat"}) if starts[1] else None
    assert fingerprint_of(world, TrainSettings(), start=renamed) == fingerprint_of(
        world, TrainSettings(), start=starts[1]
    )


@pytest.mark.parametrize(
    "change",
    [
        other_caption,
        other_picture,
        fewer_pictures,
        no_class_pictures,
        other_class_caption,
        other_base,
        swapped_kinds,
    ],
)
def test_other_inputs_make_another_run(change: Callable[[World], World], world: World) -> None:
    settings = TrainSettings()
    assert fingerprint_of(world, settings) == fingerprint_of(world, settings)
    assert fingerprint_of(change(world), settings) != fingerprint_of(world, settings)


OTHER_VALUES: dict[str, Any] = {
    "name": "another",
    "steps": 801,
    "learning_rate": 2e-4,
    "rank": 8,
    "alpha": 3.0,
    "adapter": "dora",
    "rank_stabilized": True,
    "targets": "attention",
    "conv_rank": 2,
    "conv_alpha": 1.0,
    "include": "conv_in",
    "exclude": "mid_block",
    "block_ranks": "mid_block=2",
    "lokr_factor": 4,
    "dropout": 0.1,
    "max_norm": 1.0,
    "start_from": "dog.safetensors",
    "combine": True,
    "text_encoder_lr": 1e-5,
    "text_encoder_2_lr": 1e-5,
    "text_encoder_until": 0.5,
    "resolution": 256,
    "seed": 1,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "prior_weight": 0.5,
    "flip": True,
    "lr_schedule": "linear",
    "lr_warmup_steps": 5,
    "max_grad_norm": 0.5,
    "weight_decay": 0.1,
    "optimizer": "adamw-8bit",
    "optimizer_options": "betas=(0.9,0.99)",
    "lora_plus_ratio": 16.0,
    "ema_decay": 0.999,
    "precision": "bf16",
    "gradient_checkpointing": True,
    "fit": "off",
    "base_quantization": "nf4",
    "checkpoint_every": 7,
    "keep_checkpoints": 7,
    "resume": "never",
    "save_precision": "bf16",
    "keep_adapters": False,
    "preview_every": 100,
    "preview_prompts": "sks dog in the snow",
    "preview_count": 2,
    "preview_steps": 5,
    "preview_guidance": 3.0,
    "preview_seed": 1,
    "token": "rraj",
    "score_clip": "clip",
    "score_dino": "dino",
    "early_stop": 2,
    "aspect_buckets": True,
    "bucket_step": 32,
    "mask_background": 0.5,
    "caption_dropout": 0.25,
    "shuffle_tags": True,
    "keep_tags": 2,
    "validation_pictures": 2,
    "loss": "huber",
    "huber_c": 0.25,
    "loss_weighting": "min-snr",
    "min_snr_gamma": 3.0,
    "noise_offset": 0.0625,
    "multires_noise_iterations": 6,
    "multires_noise_discount": 0.5,
    "input_perturbation": 0.125,
    "zero_terminal_snr": True,
    "min_timestep": 10,
    "max_timestep": 900,
    "timestep_bias": 0.5,
    "preset": "animal",
    "log_with": "tensorboard",
}
WITHOUT_EFFECT = {
    "preset",  # its values have
    "log_with",
    "name",
    "gradient_checkpointing",
    "fit",
    "checkpoint_every",
    "keep_checkpoints",
    "resume",
    "save_precision",
    "combine",
    "start_from",  # its content counts, wherever it lies
    "keep_adapters",
    *PreviewSettings.model_fields,
}
COMPANY: dict[str, dict[str, Any]] = {
    "conv_rank": {"targets": "all"},
    "conv_alpha": {"targets": "all"},
    "lokr_factor": {"adapter": "lokr"},
    "text_encoder_until": {"text_encoder_lr": 1e-5},
    "score_clip": {"preview_every": 100},
    "score_dino": {"preview_every": 100},
    "early_stop": {"preview_every": 100, "score_clip": "clip"},
}


def test_every_setting_is_tried() -> None:
    assert set(OTHER_VALUES) == set(TrainSettings.model_fields)


@pytest.mark.parametrize("setting", OTHER_VALUES)
@pytest.mark.parametrize("schedule", ["constant_with_warmup", "cosine"])
def test_other_settings_make_another_run(setting: str, schedule: str, world: World) -> None:
    values = {"lr_schedule": schedule, "steps": 800, **COMPANY.get(setting, {})}
    changed = TrainSettings(**{**values, setting: OTHER_VALUES[setting]})
    precision = "bf16" if setting == "precision" else "fp32"
    differs = fingerprint_of(world, changed, precision) != fingerprint_of(world, TrainSettings(**values))
    without_effect = WITHOUT_EFFECT | ({"steps"} if schedule == "constant_with_warmup" else set())
    assert differs == (setting not in without_effect)


def test_never_resume_starts_anew_and_loses_nothing(
    stopped_copy: Path, world: World, straight: dict[str, tuple[TrainResult, Recorder]]
) -> None:
    [old] = run_folders(stopped_copy)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    result, listener = world.train(stopped_copy, resume="never")
    assert result.started_from == 0
    assert len(listener.losses) == 12
    assert result.run != old
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    assert_same_end(result, straight[PLAIN][0])
    third, listener = world.train(stopped_copy, resume="never", steps=1)
    assert len(run_folders(stopped_copy)) == 3
    assert third.run not in (old, result.run)


class HostInterrupt(BaseException):
    """Like a host's interrupt, which `except Exception` does not catch."""


class Faulty(Recorder):
    """A listener that breaks when it is told of a step."""

    def __init__(self, step: int, error: BaseException) -> None:
        super().__init__()
        self.step, self.error = step, error

    def report(self, event: Any) -> None:
        super().report(event)
        if getattr(event, "step", 0) == self.step:
            raise self.error


@pytest.mark.slow
@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), HostInterrupt()], ids=repr)
def test_an_exception_in_the_listener_loses_nothing(
    error: BaseException, world: World, straight: dict[str, tuple[TrainResult, Recorder]], tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        world.train(tmp_path, Faulty(4, error))
    [run] = run_folders(tmp_path)
    kept = newest_step(run)
    assert kept >= 4
    result, _ = world.train(tmp_path)
    assert result.started_from == kept
    assert_same_end(result, straight[PLAIN][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "event", "occurrence"),
    [
        ("batches", "call", 3),  # the third step has begun
        ("step", "return", 3),  # the third update is done
        ("train_step", "return", 3),
    ],
)
def test_an_interrupt_at_any_moment_loses_nothing(
    function: str,
    event: str,
    occurrence: int,
    world: World,
    straight: dict[str, tuple[TrainResult, Recorder]],
    tmp_path: Path,
) -> None:
    """A second Ctrl-C raises KeyboardInterrupt wherever the program is; also right after an update."""
    files = (str(ROOT / "trainer" / "dreambooth.py"), torch.optim.Adam.step.__code__.co_filename)
    seen = 0

    def watch(frame: FrameType, happened: str, _: Any) -> Any:
        nonlocal seen
        code = frame.f_code
        relevant = code.co_name == function and (code.co_filename in files or "accelerate" in code.co_filename)
        if relevant and happened == event:
            seen += 1
            if seen == occurrence:
                raise KeyboardInterrupt
        return watch if relevant else None

    former = sys.gettrace()
    sys.settrace(watch)
    try:
        with pytest.raises(KeyboardInterrupt):
            world.train(tmp_path)
    finally:
        sys.settrace(former)
    assert seen == occurrence
    result, _ = world.train(tmp_path)
    assert_same_end(result, straight[PLAIN][0])


def test_leftovers_of_a_killed_write_are_ignored(
    stopped_copy: Path, world: World, straight: dict[str, tuple[TrainResult, Recorder]]
) -> None:
    [run] = run_folders(stopped_copy)
    half = run / ".tmp-0123abcd-step-00000007"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    (run / ".tmp-4567cdef-cache.safetensors").write_bytes(b"half")
    result, _ = world.train(stopped_copy)
    assert result.started_from == 5
    assert_same_end(result, straight[PLAIN][0])
    assert not list(run.glob(".tmp-*"))


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(keep: int, world: World, straight: Any, tmp_path: Path) -> None:
    result, _ = world.train(tmp_path, steps=5, checkpoint_every=1, keep_checkpoints=keep)
    assert steps_in(result.run) == list(range(6 - keep, 6))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def no_object(path: Path) -> None:
    path.write_text("[1, 2]")


def lacking(path: Path) -> None:
    path.write_text('{"step": 5}')


@pytest.mark.parametrize(
    ("file", "damage"),
    mostly_slow(
        [
            ("adapter.safetensors", truncated),
            ("adapter.safetensors", Path.unlink),
            ("optimizer.safetensors", truncated),
            ("optimizer.safetensors", emptied),
            ("state.json", emptied),
            ("state.json", no_object),
            ("state.json", lacking),
        ],
        ("optimizer.safetensors", truncated),
    ),
)
def test_a_damaged_checkpoint_is_named_and_can_be_done_without(
    file: str,
    damage: Callable[[Path], None],
    stopped_copy: Path,
    world: World,
    straight: dict[str, tuple[TrainResult, Recorder]],
) -> None:
    [run] = run_folders(stopped_copy)
    damage(run / "step-00000005" / file)
    with pytest.raises(StorageError) as caught:
        world.train(stopped_copy)
    assert str(run / "step-00000005") in caught.value.problem
    assert "elete" in caught.value.remedy
    shutil.rmtree(run / "step-00000005")
    result, _ = world.train(stopped_copy)
    assert result.started_from == 4
    assert_same_end(result, straight[PLAIN][0])


def replaced(path: Path) -> None:
    save_file({"text.text": torch.zeros(1)}, path)


@pytest.mark.parametrize("damage", mostly_slow([truncated, emptied, replaced, Path.unlink], replaced))
def test_a_damaged_cache_is_made_again(
    damage: Callable[[Path], None],
    stopped_copy: Path,
    world: World,
    straight: dict[str, tuple[TrainResult, Recorder]],
) -> None:
    [run] = run_folders(stopped_copy)
    damage(run / "cache.safetensors")
    result, _ = world.train(stopped_copy)
    assert result.started_from == 5
    assert_same_end(result, straight[PLAIN][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dog", "dog[1]"])
def test_adapters_of_one_name_never_overwrite_each_other(name: str, world: World, tmp_path: Path) -> None:
    foreign = tmp_path / "loras" / f"{name}.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(b"somebody's file, which is not even an adapter")
    contents: dict[Path, bytes] = {foreign: foreign.read_bytes()}
    for seed in (0, 1, 2):
        result, _ = world.train(tmp_path, name=name, steps=1, seed=seed)
        assert result.path not in contents
        contents[result.path] = result.path.read_bytes()
    assert {path: path.read_bytes() for path in foreign.parent.iterdir()} == contents
    for seed in (0, 1, 2):
        result, listener = world.train(tmp_path, name=name, steps=1, seed=seed)
        assert listener.losses == []
        assert result.path == list(contents)[seed + 1]
    assert len(list(foreign.parent.iterdir())) == 4
