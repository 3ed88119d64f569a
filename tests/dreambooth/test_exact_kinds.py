"""Whatever is trained, a run that was stopped or killed ends bit for bit as one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import sd15_checkpoint
from helpers import ROOT, TINY, Recorder
from pack.trainer.data.images import load_pictures
from pack.trainer.dreambooth import TrainResult, train
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.runs.folder import RunPaths
from worlds import (
    BOTH_TEXTS,
    COMMON,
    KINDS,
    PROMPT,
    TEXT,
    World,
    assert_same_end,
    differing,
    make_world,
    make_xl_world,
    newest_step,
    noisy_pictures,
    runs_in,
)

pytestmark = pytest.mark.usefixtures("quick")

FULL: dict[str, Any] = {"adapter": "full", "learning_rate": 1e-3}
RICH: dict[str, Any] = {"gradient_accumulation": 2, "lr_schedule": "cosine", "lr_warmup_steps": 1, "flip": True}


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_checkpoint, tmp_path_factory.mktemp("world") / "subject")


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_xl_world(tmp_path_factory.mktemp("xl"))


def assert_stops_leave_no_trace(world: World, folder: Path, stops: list[int], **changes: Any) -> None:
    """One run without a stop, and one that is stopped after each of these steps."""
    straight = world.train(folder / "straight", **changes)
    for step in stops:
        world.stop_after(step, folder / "stopped", **changes)
        [run] = runs_in(folder / "stopped")
        assert newest_step(run) == step
        assert not list((folder / "stopped").glob("*/*.safetensors"))
    resumed = world.train(folder / "stopped", **changes)
    assert resumed.started_from == stops[-1]
    assert_same_end(resumed, straight)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rsLoRA", "LoCon", "DoRA", "LoHa", "LoKr"])  # and below LoRA, LoKr of 4
def test_every_kind_with_a_text_encoder(kind: str, world: World, tmp_path: Path) -> None:
    assert_stops_leave_no_trace(world, tmp_path, [2], **{**KINDS[kind], **TEXT})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoCon", "DoRA"])
def test_sdxl_with_both_text_encoders(kind: str, xl: World, tmp_path: Path) -> None:
    assert_stops_leave_no_trace(xl, tmp_path, [1], steps=2, **{**KINDS[kind], **BOTH_TEXTS})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"adapter": "lokr", "max_norm": 0.1}, {**RICH, "adapter": "dora", "dropout": 0.2}, FULL],
    ids=["LoRA", "LoKr, limit", "DoRA, dropout, accumulation", "full"],
)
def test_text_encoders_that_leave_half_way(changes: dict[str, Any], world: World, tmp_path: Path) -> None:
    """Stopped before, at and after the step from which they stay as they are."""
    assert_stops_leave_no_trace(world, tmp_path, [1, 2, 3], **{**TEXT, "text_encoder_until": 0.5, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("trained", [TEXT, BOTH_TEXTS], ids=["one", "both"])
def test_sdxls_text_encoders_leave_half_way(trained: dict[str, Any], xl: World, tmp_path: Path) -> None:
    assert_stops_leave_no_trace(xl, tmp_path, [2, 3], **trained, text_encoder_until=0.5)


@pytest.mark.slow
def test_a_text_encoder_that_left_is_trained_no_more(world: World, tmp_path: Path) -> None:
    """What was learned of the text by the last step is what was learned by the step at which it stayed."""
    changes: dict[str, Any] = {**TEXT, "text_encoder_until": 0.5, "checkpoint_every": 1}
    listener = Recorder()
    result = world.train(tmp_path, listener, **changes)
    half, end = (result.run / f"step-{step:08d}" / "adapter.safetensors" for step in (2, 4))
    moved = differing(half, end)
    assert moved
    assert not [name for name in moved if name.startswith("lora_te_")]
    assert [
        name for name in differing(result.run / "step-00000001" / "adapter.safetensors", half) if "lora_te_" in name
    ]
    assert any("after step 2" in note for note in listener.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "dora", "alpha": 1.0, **TEXT, **RICH, "dropout": 0.3, "max_norm": 0.2},
        {**TEXT, "block_ranks": "down_blocks=3:1 self_attn=4", "dropout": 0.3, "gradient_checkpointing": True},
        {**KINDS["LoKr of 4"], **TEXT, "precision": "bf16"},
        {**FULL, **TEXT, **RICH},
    ],
    ids=["DoRA, dropout, limit", "ranks, dropout, checkpointing", "LoKr, bf16", "full"],
)
def test_class_pictures_and_all_the_rest(changes: dict[str, Any], world: World, tmp_path: Path) -> None:
    assert_stops_leave_no_trace(world.with_priors(tmp_path / "class"), tmp_path, [2], **changes)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {**TEXT, "precision": "bf16"}], ids=["UNet", "with text encoder, bf16"])
def test_full_fine_tuning(changes: dict[str, Any], world: World, tmp_path: Path) -> None:
    assert_stops_leave_no_trace(world, tmp_path, [1, 3], **FULL, **changes)


@pytest.mark.slow
def test_full_fine_tuning_of_half_precision_weights(world: World, tmp_path: Path) -> None:
    """The private copies are laid out for convolutions, the files are not."""
    half = sd15_checkpoint(tmp_path / "half.safetensors", size=TINY, dtype=torch.float16)
    assert_stops_leave_no_trace(make_world(half, tmp_path / "subject"), tmp_path, [2], **FULL, **TEXT)


def test_gradient_checkpointing_does_not_change_dropout(world: World, tmp_path: Path) -> None:
    """What is computed again is dropped again."""
    changes: dict[str, Any] = {"dropout": 0.3, **TEXT}
    plain = world.train(tmp_path / "plain", **changes)
    again = world.train(tmp_path / "again", gradient_checkpointing=True, **changes)
    assert differing(plain.path, again.path) == []


@pytest.mark.slow
def test_kill_leaves_no_trace(tiny_checkpoint: Path, world: World, tmp_path: Path) -> None:
    """The command line, killed without warning after its first checkpoint; two runs side by side."""
    images, length = noisy_pictures(tmp_path / "images", 3, 0), {"steps": 24, "checkpoint_every": 2}
    changes: dict[str, dict[str, Any]] = {"LoHa": {"adapter": "loha", **TEXT}, "full": {**FULL, **TEXT}}
    runs = {kind: {**COMMON, **values, **length} for kind, values in changes.items()}
    processes, deadline = {}, time.monotonic() + 180
    for kind, values in runs.items():
        places = {"base": tiny_checkpoint, "images": images, "instance_prompt": PROMPT, "output_dir": tmp_path / kind}
        flags = [
            text
            for name, value in {**values, **places, "device": "cpu"}.items()
            for text in ("--" + name.replace("_", "-"), str(value))
        ]
        threads = {"OMP_NUM_THREADS": "1"}  # as here, since sums depend on their number
        with (tmp_path / f"{kind}.txt").open("w") as log:
            command = [sys.executable, "-m", "trainer", "train", *flags]
            processes[kind] = subprocess.Popen(command, cwd=ROOT, stderr=log, env={**os.environ, **threads})
    running = dict(processes)
    while running and time.monotonic() < deadline:
        for kind, process in list(running.items()):
            if process.poll() is not None or list((tmp_path / kind / "runs").glob("*/step-*")):
                process.kill()
                del running[kind]
        time.sleep(0.002)
    for process in processes.values():
        process.kill()
        process.wait()

    for kind, values in runs.items():
        killed, settings = tmp_path / kind, TrainSettings(**values)
        [run] = runs_in(killed)
        assert 2 <= newest_step(run) < 24, (tmp_path / f"{kind}.txt").read_text()
        assert not list(killed.glob("*.safetensors"))
        resumed, straight = (finished(world, images, settings, folder) for folder in (killed, tmp_path / f"{kind} too"))
        assert resumed.run == run
        assert 2 <= resumed.started_from < 24
        assert_same_end(resumed, straight)


def finished(world: World, images: Path, settings: TrainSettings, folder: Path) -> TrainResult:
    """The run that the command line began in this folder, or one from the start."""
    pictures = load_pictures(images, PROMPT, Recorder())
    paths = RunPaths(folder, folder / "runs", folder / "checkpoints")
    return train(world.base, pictures, [], settings, paths, "cpu", Recorder())
