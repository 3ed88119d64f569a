"""Nothing is lost and nothing is done twice: a run that was stopped in any way ends bit for bit as one that was not.

Each part that changes while a run trains is shown to come back whole in tests/training/test_state_parts; the runs below
show that a run puts all of its parts together again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import pytest
import torch
from cases import mostly_slow
from checkpoints import sd15_checkpoint
from helpers import HANGS, ROOT, TINY, Recorder
from pack.trainer.adapters.apply import apply_to_base
from pack.trainer.adapters.kohya import Adapter, LoraLayer
from pack.trainer.core.errors import StorageError
from pack.trainer.core.events import Validation
from pack.trainer.data.images import load_pictures
from pack.trainer.dreambooth import train
from pack.trainer.settings.preview import PreviewSettings
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import StartingPoint
from pack.trainer.training.runs.folder import RunPaths, run_fingerprint
from pack.trainer.training.runs.index import RunIndex
from run_trees import contents_below
from safetensors.torch import load_file, save_file
from shell import flags_of
from worlds import (
    BOTH_TEXTS,
    COMMON,
    PROMPT,
    SHAPES,
    TEXT,
    Finished,
    World,
    assert_same_end,
    differing,
    make_world,
    newest_step,
    noisy_pictures,
    paths_in,
    pictures_of,
    runs_in,
    steps_in,
)

pytestmark = pytest.mark.usefixtures("quick")

FULL: dict[str, Any] = {"adapter": "full", "learning_rate": 1e-3}
HALF: dict[str, Any] = {"text_encoder_until": 0.5}
# Everything that is drawn at random, and everything that changes what a sample is or what its loss counts.
DATA: dict[str, Any] = {
    "aspect_buckets": True,
    "bucket_step": 16,
    "flip": True,
    "batch_size": 2,
    "caption_dropout": 0.3,
    "shuffle_tags": True,
    "mask_background": 0.25,
    "noise_offset": 0.05,
    "multires_noise_iterations": 2,
    "input_perturbation": 0.1,
    "loss": "huber-snr",
    "loss_weighting": "min-snr",
    "timestep_bias": 0.5,
    "validation_pictures": 1,
}


@pytest.fixture(scope="module")
def taught(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """With class pictures."""
    return world.with_priors(tmp_path_factory.mktemp("taught") / "class")


# Six runs in which each stateful part of a run, and each kind of network, occurs at least once.


def plain(world: World, xl: World, folder: Path) -> tuple[World, dict[str, Any]]:
    return world, {}


def class_pictures(world: World, xl: World, folder: Path) -> tuple[World, dict[str, Any]]:
    changes = {"lr_schedule": "cosine", "lr_warmup_steps": 2, "gradient_accumulation": 2, "flip": True, **TEXT}
    return world.with_priors(folder / "class"), {**changes, "optimizer": "lion"}


def dora_of_ranks(world: World, xl: World, folder: Path) -> tuple[World, dict[str, Any]]:
    layers = {"targets": "all", "exclude": "up_blocks", "block_ranks": "mid_block=1 self_attn=3:1.5"}
    limits = {"dropout": 0.25, "max_norm": 0.5, "ema_decay": 0.7}
    teacher = {"prior": "model", "prior_every": 3, "prior_empty": 0.5}
    shown = [replace(picture, class_captions=("a photo of a dog",)) for picture in world.subject]
    return replace(world, subject=shown), {"adapter": "dora", **layers, **limits, **TEXT, **HALF, **teacher}


def all_weights_of_a_half_precision_base(world: World, xl: World, folder: Path) -> tuple[World, dict[str, Any]]:
    """Its private copies are laid out for convolutions, the files are not."""
    half = sd15_checkpoint(folder / "half.safetensors", size=TINY, dtype=torch.float16)
    changes = {**FULL, "text_encoder_lr": 1e-3, **HALF, "optimizer": "adamw-schedule-free"}
    return make_world(half, folder / "subject").with_priors(folder / "class"), changes


def sdxl_on_top_of_adapters(world: World, xl: World, folder: Path) -> tuple[World, dict[str, Any]]:
    """Going on from one adapter on top of another, combined, with every setting of the data and of the loss."""
    below, start = (xl.train(folder / str(seed), steps=1, rank=4, seed=seed, **BOTH_TEXTS).adapter for seed in (1, 2))
    stacked = [(below, 0.7)]
    pictures = pictures_of(folder / "shapes", SHAPES, "sks, dog, in the snow, at noon", masked=True)
    repeated = [replace(picture, repeats=1 + number % 3) for number, picture in enumerate(pictures)]
    upper = replace(xl, base=apply_to_base(xl.base, stacked), subject=repeated).with_priors(folder / "class")
    changes = {**DATA, **BOTH_TEXTS, **HALF, "ema_decay": 0.7, "combine": True, "dropout": 0.1}
    return upper, {**changes, "starting_point": StartingPoint(start, stacked)}


def in_four_and_eight_bits(world: World, xl: World, folder: Path) -> tuple[World, dict[str, Any]]:
    optimizer = {"optimizer": "adamw-8bit", "optimizer_options": "min_8bit_size=1", "lora_plus_ratio": 8.0}
    memory = {"base_quantization": "nf4", "precision": "bf16", "gradient_checkpointing": True}
    bounds = {"dco_beta": 100.0, "weight_penalty": 0.01}
    return world, {"adapter": "lokr", "lokr_factor": 4, "targets": "all", **optimizer, **memory, **TEXT, **bounds}


def limited_rotations(world: World, xl: World, folder: Path) -> tuple[World, dict[str, Any]]:
    layers = {"adapter": "boft", "targets": "all", "block_ranks": "mid_block=8", "max_norm": 0.05}
    return world, {**layers, "ema_decay": 0.7, "optimizer": "prodigy", "learning_rate": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        plain,
        limited_rotations,
        class_pictures,
        dora_of_ranks,
        all_weights_of_a_half_precision_base,
        sdxl_on_top_of_adapters,
        in_four_and_eight_bits,
    ],
)
def test_stops_leave_no_trace(
    make: Callable[[World, World, Path], tuple[World, dict[str, Any]]], world: World, xl: World, tmp_path: Path
) -> None:
    """Stopped after the first step, in the middle, in the step after it, and before the last one."""
    where, changes = make(world, xl, tmp_path)
    straight = where.train(tmp_path / "straight", told := Recorder(), **changes, steps=8)
    for step in (1, 4, 5, 7):
        where.stop_after(step, tmp_path / "stopped", **changes, steps=8)
        [run] = runs_in(tmp_path / "stopped")
        assert newest_step(run) == step
        assert not list((tmp_path / "stopped").glob("*/*.safetensors"))
    resumed = where.train(tmp_path / "stopped", last := Recorder(), **changes, steps=8)
    assert resumed.started_from == 7
    assert [event for event in told.events if isinstance(event, Validation)][-1:] == [
        event for event in last.events if isinstance(event, Validation)
    ][-1:]
    assert_same_end(resumed, straight)


def test_a_stop_leaves_no_trace(taught: World, tmp_path: Path) -> None:
    """With what a run takes along from step to step: averages, rates, a text encoder that leaves."""
    changes: dict[str, Any] = {"lr_schedule": "cosine", "gradient_accumulation": 2, "dropout": 0.2, "ema_decay": 0.7}
    changes |= {**TEXT, **HALF}
    straight = taught.train(tmp_path / "straight", told := Recorder(), **changes)
    taught.stop_after(3, tmp_path / "stopped", **changes)
    resumed = taught.train(tmp_path / "stopped", last := Recorder(), **changes)
    assert resumed.started_from == 3
    assert last.losses == told.losses[3:]
    assert_same_end(resumed, straight)


@pytest.mark.slow
def test_checkpoints_do_not_disturb(taught: World, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"lr_schedule": "cosine", "gradient_accumulation": 2, "flip": True, "dropout": 0.2}
    straight = taught.train(tmp_path / "straight", told := Recorder(), **changes)
    result = taught.train(tmp_path / "saved", told_too := Recorder(), **changes, checkpoint_every=3)
    assert_same_end(result, straight)
    assert told.losses == told_too.losses
    assert steps_in(result.run) == [3, 4]


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_goes_on_from_any_checkpoint(step: int, finished: Finished, world: World, tmp_path: Path) -> None:
    finished.begun(tmp_path, step)
    result = world.train(tmp_path, listener := Recorder())
    assert result.started_from == step
    assert listener.losses == finished.listener.losses[step:]
    assert_same_end(result, finished.result)


@pytest.mark.slow
def test_kill_leaves_no_trace(tiny_checkpoint: Path, world: World, tmp_path: Path) -> None:
    """The command line, killed without warning once it has a checkpoint; three runs side by side."""
    schedule = {"lr_schedule": "constant_with_warmup", "lr_warmup_steps": 2, "gradient_accumulation": 2, "flip": True}
    kinds: dict[str, dict[str, Any]] = {
        "LoRA": {**schedule, "class_prompt": "a photo of a dog"},
        "LoHa": {"adapter": "loha", **TEXT, "prior": "none"},
        "full": {**FULL, **TEXT},
    }
    images, priors = noisy_pictures(tmp_path / "images", 3, 0), noisy_pictures(tmp_path / "class", 2, 50)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    for kind, changes in kinds.items():
        values = {**COMMON, **changes, "steps": 1_000_000, "checkpoint_every": 2}  # none ends before it is killed
        values |= {"base": tiny_checkpoint, "images": images, "instance_prompt": PROMPT, "device": "cpu"}
        values |= {"output_dir": tmp_path / kind} | ({"class_images": priors} if "class_prompt" in changes else {})
        threads = {"OMP_NUM_THREADS": "1"}  # as here, since sums depend on their number
        with (tmp_path / f"{kind}.txt").open("w") as log:
            command = [sys.executable, "-m", "trainer", "train", *flags_of(values)]
            processes[kind] = subprocess.Popen(command, cwd=ROOT, stderr=log, env={**os.environ, **threads})
    running, deadline = dict(processes), time.monotonic() + HANGS
    while running and time.monotonic() < deadline:
        for kind, process in list(running.items()):
            if process.poll() is not None or list((tmp_path / kind / "runs").glob("*/step-*")):
                process.kill()
                del running[kind]
        time.sleep(0.002)
    for process in processes.values():
        process.kill()
        process.wait()

    for kind, changes in kinds.items():
        killed, log = tmp_path / kind, (tmp_path / f"{kind}.txt").read_text()
        [run] = runs_in(killed)
        kept = newest_step(run)
        assert kept >= 2, log
        assert not list(killed.glob("*.safetensors")), log
        (run / "progress.txt").write_text("kept")
        subject = load_pictures(images, PROMPT, Recorder())
        classes = load_pictures(priors, changes["class_prompt"], Recorder()) if "class_prompt" in changes else []
        chosen = {name: value for name, value in changes.items() if name != "class_prompt"}
        settings = TrainSettings(**{**COMMON, **chosen, "steps": kept + 3})
        listener = Recorder()
        resumed, straight = (
            train(world.base, subject, classes, settings, paths, "cpu", told)
            for paths, told in (
                (RunPaths(killed, killed / "runs", killed / "checkpoints"), listener),
                (paths_in(tmp_path / f"{kind} straight"), Recorder()),
            )
        )
        assert resumed.run == run
        assert (run / "progress.txt").exists()
        assert (resumed.started_from, len(listener.losses)) == (kept, 3)
        assert_same_end(resumed, straight)


def shown_beside(name: str) -> set[str]:
    """The files that galleries show for an adapter."""
    return {f"{name}.preview.png", f"{name}.json", f"{name}.metadata.json"}


def test_a_finished_run_is_not_trained_again(finished: Finished, world: World, tmp_path: Path) -> None:
    run = finished.copy(tmp_path)
    first = world.train(tmp_path, listener := Recorder())
    content = first.path.read_bytes()
    again = world.train(tmp_path, listener)
    assert (again.path, again.run, again.started_from) == (first.path, run, 4)
    assert again.path.read_bytes() == content
    assert {path.name for path in first.path.parent.iterdir()} == {first.path.name, *shown_beside("dog")}

    first.path.unlink()
    exported = world.train(tmp_path, listener)
    assert listener.losses == []
    assert exported.path == first.path
    assert differing(exported.path, run / "step-00000004" / "adapter.safetensors") == []
    assert exported.adapter.metadata["sshs_model_hash"] == first.adapter.metadata["sshs_model_hash"]


@pytest.mark.parametrize(
    "end", [{"state": "failed", "problem": "No space left.", "remedy": "Free some."}, {"state": "stopped"}, {}], ids=str
)
def test_a_finished_run_is_done_once_its_adapter_is_written(
    end: dict[str, str], finished: Finished, world: World, tmp_path: Path
) -> None:
    """The disk was full after the last step, or the run was stopped or killed then."""
    metrics = finished.copy(tmp_path) / "metrics.jsonl"
    *lines, _ = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines, json.dumps({"step": 4, **end}), ""] if end else [*lines, '{"step": 4, "sta']))
    run = world.train(tmp_path).run
    base = lines.index(next(line for line in lines if line.startswith('{"step": 0,')))  # written after the first steps
    in_order = [lines[base], *lines[:base], *lines[base + 1 :]]
    assert metrics.read_text().splitlines() == [*in_order, '{"step": 4, "state": "done"}']
    summary = RunIndex(run.parent).summary(run.name)
    assert (summary["state"], summary["step"], "problem" in summary) == ("done", 4, False)


def test_a_finished_run_needs_its_state_no_more(finished: Finished, world: World, tmp_path: Path) -> None:
    """Its adapter is whole; what is damaged is only wanted to go on."""
    state = finished.copy(tmp_path) / "step-00000004" / "state.json"
    state.write_text(state.read_text()[:20])
    again = world.train(tmp_path, listener := Recorder())
    assert (again.started_from, listener.losses) == (4, [])
    with pytest.raises(StorageError, match=r"step-00000004 is damaged"):
        world.train(tmp_path, steps=5)


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
    changes: dict[str, Any], file: str, finished: Finished, world: World, tmp_path: Path
) -> None:
    finished.copy(tmp_path)
    for _ in range(2):
        result = world.train(tmp_path, listener := Recorder(), **changes)
        assert listener.losses == []
        assert result.path == tmp_path / file
        assert differing(result.path, finished.result.path) == []
    assert result.adapter.metadata["ss_output_name"] == changes.get("name", "dog")
    name = result.path.stem
    assert {path.name for path in result.path.parent.iterdir()} == {result.path.name, *shown_beside(name)}


def test_another_output_folder_gets_the_file_without_training(finished: Finished, world: World, tmp_path: Path) -> None:
    finished.copy(tmp_path)
    paths = RunPaths(tmp_path / "elsewhere", tmp_path / "runs")
    again = train(world.base, world.subject, [], TrainSettings(**COMMON), paths, "cpu", listener := Recorder())
    assert listener.losses == []
    assert again.path == tmp_path / "elsewhere" / "dog.safetensors"
    assert differing(again.path, finished.result.path) == []


def test_the_file_has_the_precision_that_was_asked_for(finished: Finished, world: World, tmp_path: Path) -> None:
    """Also when the run was finished before and its file lies there in another precision."""
    finished.copy(tmp_path)
    for precision, dtype in (("fp16", torch.float16), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        result = world.train(tmp_path, save_precision=precision)
        matrices = {t.dtype for n, t in load_file(result.path).items() if not n.endswith(".alpha")}
        assert matrices == {dtype}


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_shorter_one(world: World, tmp_path: Path) -> None:
    straight = world.train(tmp_path / "straight", steps=9)
    short = world.train(tmp_path / "two", steps=6)
    content = short.path.read_bytes()
    long = world.train(tmp_path / "two", listener := Recorder(), steps=9)
    assert long.run == short.run
    assert long.started_from == 6
    assert len(listener.losses) == 3
    assert_same_end(long, straight)
    assert short.path.read_bytes() == content
    assert long.path != short.path
    assert [result.adapter.metadata["ss_steps"] for result in (short, long)] == ["6", "9"]
    shorter = world.train(tmp_path / "two", listener := Recorder(), steps=6)
    assert listener.losses == []
    assert shorter.path == short.path


@pytest.mark.parametrize(
    "schedule", mostly_slow(get_args(TrainSettings.model_fields["lr_schedule"].annotation), "polynomial")
)
def test_every_schedule_takes_the_smallest_rates(schedule: str, world: World, tmp_path: Path) -> None:
    world.train(tmp_path, listener := Recorder(), steps=1, lr_schedule=schedule, learning_rate=1e-8)
    assert len(listener.losses) == 1


def test_a_run_whose_rate_depends_on_its_length_is_not_extended(world: World, tmp_path: Path) -> None:
    short = world.train(tmp_path, steps=1, lr_schedule="linear")
    long = world.train(tmp_path, listener := Recorder(), steps=2, lr_schedule="linear")
    assert long.run != short.run
    assert len(listener.losses) == 2


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
def test_other_inputs_make_another_run(change: Callable[[World], World], taught: World) -> None:
    settings = TrainSettings()
    assert fingerprint_of(taught, settings) == fingerprint_of(taught, settings)
    assert fingerprint_of(change(taught), settings) != fingerprint_of(taught, settings)


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
    "token_vectors": 2,
    "token_lr": 1e-3,
    "token_until": 0.25,
    "token_start": "cat",
    "resolution": 256,
    "seed": 1,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "prior_weight": 0.5,
    "flip": True,
    "lr_schedule": "linear",
    "lr_warmup_steps": 5,
    "lr_cycles": 5,
    "lr_power": 3.0,
    "prior": "model",
    "prior_every": 3,
    "prior_prompts": "a cat",
    "prior_empty": 0.1,
    "dco_beta": 1000.0,
    "weight_penalty": 0.01,
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
    "rank_schedule": "timestep",
    "min_rank": 2,
    "rank_power": 0.5,
    "lora_init": "orthogonal",
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
    "timestep_sampling": "uniform",
    "timestep_shift": 2.0,
    "preset": "animal",
    "log_with": "tensorboard",
    "gradient_checkpointing_interval": 3,
    "swap_blocks": 4,
    "compile": "blocks",
    "fused_backward_pass": True,
    "gallery_files": False,
    "thumbnail": False,
    "base_preview": "off",
}
WITHOUT_EFFECT = {
    "preset",  # its values have
    "log_with",
    "name",
    "gradient_checkpointing",
    "gradient_checkpointing_interval",
    "swap_blocks",
    "compile",
    "fused_backward_pass",
    "gallery_files",
    "thumbnail",
    "base_preview",
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
    **{name: {"token_vectors": 1} for name in ("token_lr", "token_until", "token_start")},
    "score_clip": {"preview_every": 100},
    "score_dino": {"preview_every": 100},
    "early_stop": {"preview_every": 100, "score_clip": "clip"},
    "lr_cycles": {"lr_schedule": "cosine_with_restarts"},
    "lr_power": {"lr_schedule": "polynomial"},
    "min_rank": {"rank_schedule": "timestep"},
    "rank_power": {"rank_schedule": "timestep"},
    "prior_every": {"prior": "model"},
    "prior_prompts": {"prior": "model"},
    "prior_empty": {"prior": "model"},
    "huber_c": {"loss": "huber"},
    "min_snr_gamma": {"loss_weighting": "min-snr"},
    "multires_noise_discount": {"multires_noise_iterations": 6},
    "bucket_step": {"aspect_buckets": True},
    "keep_tags": {"shuffle_tags": True},
    "fused_backward_pass": {"max_grad_norm": 0.0},
}


def test_every_setting_is_tried() -> None:
    assert set(OTHER_VALUES) == set(TrainSettings.model_fields)


@pytest.mark.parametrize("setting", OTHER_VALUES)
@pytest.mark.parametrize("schedule", ["constant_with_warmup", "cosine"])
def test_other_settings_make_another_run(setting: str, schedule: str, taught: World) -> None:
    values = {"lr_schedule": schedule, "steps": 800, **COMPANY.get(setting, {})}
    changed = TrainSettings(**{**values, setting: OTHER_VALUES[setting]})
    precision = "bf16" if setting == "precision" else "fp32"
    differs = fingerprint_of(taught, changed, precision) != fingerprint_of(taught, TrainSettings(**values))
    without_effect = WITHOUT_EFFECT | ({"steps"} if schedule == "constant_with_warmup" else set())
    assert differs == (setting not in without_effect)


def test_never_resume_starts_anew_and_loses_nothing(finished: Finished, world: World, tmp_path: Path) -> None:
    old = finished.begun(tmp_path, 3)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    result = world.train(tmp_path, listener := Recorder(), resume="never")
    assert result.started_from == 0
    assert listener.losses == finished.listener.losses
    assert result.run != old
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    assert_same_end(result, finished.result)
    third = world.train(tmp_path, resume="never", steps=1)
    assert len(runs_in(tmp_path)) == 3
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
    error: BaseException, finished: Finished, world: World, tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        world.train(tmp_path, Faulty(2, error))
    [run] = runs_in(tmp_path)
    kept = newest_step(run)
    assert kept >= 2
    result = world.train(tmp_path)
    assert result.started_from == kept
    assert_same_end(result, finished.result)


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
    function: str, event: str, occurrence: int, finished: Finished, world: World, tmp_path: Path
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
    assert_same_end(world.train(tmp_path), finished.result)


def test_leftovers_of_a_killed_write_are_ignored(finished: Finished, world: World, tmp_path: Path) -> None:
    run = finished.begun(tmp_path, 3)
    half = run / ".tmp-0123abcd-step-00000004"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    (run / ".tmp-4567cdef-cache.safetensors").write_bytes(b"half")
    result = world.train(tmp_path)
    assert result.started_from == 3
    assert_same_end(result, finished.result)
    assert not list(run.glob(".tmp-*"))


@pytest.mark.parametrize("keep", mostly_slow([1, 3], 3))
def test_the_last_checkpoints_are_kept(keep: int, world: World, tmp_path: Path) -> None:
    result = world.train(tmp_path, checkpoint_every=1, keep_checkpoints=keep)
    assert steps_in(result.run) == list(range(5 - keep, 5))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def halved(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def no_object(path: Path) -> None:
    path.write_text("[1, 2]")


def lacking(path: Path) -> None:
    path.write_text('{"step": 3}')


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(
            (file, damage)
            for file in ("adapter.safetensors", "optimizer.safetensors")
            for damage in (truncated, emptied)
        ),
        *(("state.json", damage) for damage in (halved, emptied, no_object, lacking, Path.unlink)),
    ],
)
def test_a_damaged_checkpoint_is_named_and_can_be_done_without(
    file: str, damage: Callable[[Path], None], finished: Finished, world: World, tmp_path: Path
) -> None:
    """The run would go on from the checkpoint before it, as every run does from its newest."""
    run = finished.begun(tmp_path, 3)
    damage(run / "step-00000003" / file)
    before = contents_below(run)
    with pytest.raises(StorageError) as caught:
        world.train(tmp_path)
    assert str(run / "step-00000003") in caught.value.problem
    assert "Delete that folder" in caught.value.remedy
    assert contents_below(run) == before
    shutil.rmtree(run / "step-00000003")
    recipe = world.recipe(tmp_path)
    assert recipe.open_run() == 2


def replaced(path: Path) -> None:
    save_file({"text.text": torch.zeros(1)}, path)


@pytest.mark.parametrize("damage", mostly_slow([truncated, halved, emptied, replaced, Path.unlink], halved, replaced))
def test_a_damaged_cache_is_made_again(
    damage: Callable[[Path], None], finished: Finished, world: World, tmp_path: Path
) -> None:
    cache = finished.begun(tmp_path, 3) / "cache.safetensors"
    whole = cache.read_bytes()
    damage(cache)
    result = world.train(tmp_path)
    assert result.started_from == 3
    assert_same_end(result, finished.result)
    assert cache.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dog", "dog[1]"])
def test_adapters_of_one_name_never_overwrite_each_other(name: str, world: World, tmp_path: Path) -> None:
    foreign = tmp_path / "loras" / f"{name}.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(b"somebody's file, which is not even an adapter")
    contents: dict[Path, bytes] = {foreign: foreign.read_bytes()}
    for seed in (0, 1, 2):
        result = world.train(tmp_path, name=name, steps=1, seed=seed)
        assert result.path not in contents
        contents[result.path] = result.path.read_bytes()
    cards = {card for path in contents if path != foreign for card in shown_beside(path.stem)}
    files = {path.name for path in contents} | {card for card in cards if card.endswith(".json")}  # without previews
    assert {path: path.read_bytes() for path in foreign.parent.iterdir() if path in contents} == contents
    assert {path.name for path in foreign.parent.iterdir()} == files
    for seed in (0, 1, 2):
        result = world.train(tmp_path, listener := Recorder(), name=name, steps=1, seed=seed)
        assert listener.losses == []
        assert result.path == list(contents)[seed + 1]
    assert {path.name for path in foreign.parent.iterdir()} == files


def test_a_file_of_that_name_stays(finished: Finished, world: World, tmp_path: Path) -> None:
    finished.copy(tmp_path)
    foreign = tmp_path / "loras" / "dog.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(b"somebody's file, which is not even an adapter")
    for _ in range(2):
        result = world.train(tmp_path)
        assert result.path == tmp_path / "loras" / "dog-2.safetensors"
        assert differing(result.path, finished.result.path) == []
    assert foreign.read_bytes() == b"somebody's file, which is not even an adapter"
