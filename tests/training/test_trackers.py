"""Trackers: the log holds what the metrics file holds, goes on with its run, and never costs one."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import HANGS, ROOT, Recorder
from pack.trainer.core.distributed import accelerate_state_kept
from pack.trainer.core.errors import CancelledError, SettingsError
from pack.trainer.core.events import Preview, Step
from pack.trainer.dreambooth import TrainResult
from pack.trainer.settings.data import SubjectTable
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.preflight import require_trainable
from pack.trainer.training.runs import trackers
from pack.trainer.training.runs.folder import RunFolder
from pack.trainer.training.runs.metrics import read_metrics
from pack.trainer.training.runs.trackers import TrackedListener, logging_listener, require_tracker
from PIL import Image
from worlds import Finished, World, assert_same_end

pytestmark = pytest.mark.usefixtures("quick")
LOGGED = {"loss": "loss", "learning_rate": "learning_rate", "steps_per_second": "rate", "memory_bytes": "memory"}
PROMPT = "sks dog, snow / ice"
PREVIEWS = {"preview_every": 2, "preview_steps": 1, "preview_count": 2, "preview_prompts": PROMPT}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no server."""
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    import wandb

    wandb.teardown()


def tensorboard_log(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "logs"), size_guidance={"scalars": 0, "images": 0}).Reload()


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def assert_the_log_is_that_of_the_metrics(result: TrainResult) -> None:
    log = tensorboard_log(result.run)
    lines = [line for line in read_metrics(result.run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, result.step + 1))
    for tag, name in LOGGED.items():
        points = log.Scalars(tag)
        assert [point.step for point in points] == [line["step"] for line in lines]
        assert [point.value for point in points] == [float(np.float32(line[name])) for line in lines]


@pytest.mark.slow
def test_tensorboard_holds_losses_and_pictures(world: World, tmp_path: Path) -> None:
    plain = world.train(tmp_path / "plain", **PREVIEWS)
    assert not (plain.run / "logs").exists()
    result = world.train(tmp_path / "logged ü", log_with="tensorboard", **PREVIEWS)
    assert_same_end(result, plain)
    assert_the_log_is_that_of_the_metrics(result)
    log = tensorboard_log(result.run)
    assert log.Tags()["images"] == [f"previews/{PROMPT}"]
    images = log.Images(f"previews/{PROMPT}")
    assert [image.step for image in images] == [0, 2, 4]
    drawn = [result.run / "previews" / "step-00000004" / f"subject-00-{number:02d}.png" for number in range(2)]
    row = np.concatenate([pixels(Image.open(path)) for path in drawn], axis=1)
    assert np.array_equal(pixels(Image.open(io.BytesIO(images[2].encoded_image_string))), row)


def test_tensorboard_holds_losses_and_the_configuration(world: World, tmp_path: Path) -> None:
    import yaml

    result = world.train(tmp_path, steps=2, log_with="tensorboard")
    assert_the_log_is_that_of_the_metrics(result)
    [path] = (result.run / "logs").glob("*/hparams.yml")
    stored = yaml.safe_load(path.read_text())
    paths = {"start_from", "score_clip", "score_dino"}  # which are nobody else's business
    assert set(stored) == {"base", *TrainSettings.model_fields} - paths
    assert (stored["rank"], stored["name"], stored["alpha"]) == (2, "dog", "")


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_log(world: World, tmp_path: Path) -> None:
    """Steps after the checkpoint from which it goes on were logged, too, and count no more."""
    world.stop_after(3, tmp_path, log_with="tensorboard", checkpoint_every=2, steps=6)
    [run] = (tmp_path / "runs").iterdir()
    newest = run / "step-00000003"
    assert [point.step for point in tensorboard_log(run).Scalars("loss")] == [1, 2, 3]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    result = world.train(tmp_path, log_with="tensorboard", checkpoint_every=2, steps=6)
    assert (result.run, result.started_from) == (run, 2)
    assert_the_log_is_that_of_the_metrics(result)
    assert len(list((run / "logs").glob("*/hparams.yml"))) == 1
    assert_same_end(result, world.train(tmp_path / "straight", steps=6))


class StopAfterTwo(Recorder):
    """A user who stops the run after its second step."""

    def should_stop(self) -> bool:
        return len(self.losses) >= 2


@pytest.mark.slow
def test_wandb_offline_keeps_one_run_in_the_runs_folder(
    world: World, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(trackers, "_FINISH_TIMEOUT", HANGS)
    with pytest.raises(CancelledError):
        world.train(tmp_path, StopAfterTwo(), log_with="wandb", steps=4, **PREVIEWS)
    listener = Recorder()
    result = world.train(tmp_path, listener, log_with="wandb", steps=4, **PREVIEWS)
    assert listener.warnings == []
    assert_same_end(result, world.train(tmp_path / "straight", **PREVIEWS))
    folders = sorted((result.run / "logs" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1, "one id"
    losses: dict[int, float] = {}
    for folder in folders:
        for line in wandb_lines(folder):
            if "loss" in line:
                losses[line["_step"]] = line["loss"]
    expected = {line["step"]: line["loss"] for line in read_metrics(result.run / "metrics.jsonl") if "loss" in line}
    assert losses == expected
    pictures = list((result.run / "logs").rglob("media/images/**/*.png"))
    assert len(pictures) == 6, "of the steps 0, 2 and 4"


def wandb_lines(folder: Path) -> list[dict[str, Any]]:
    """The history of an offline run."""
    from wandb.proto import wandb_internal_pb2

    [path] = folder.glob("run-*.wandb")
    lines = []
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after W&B's own seven bytes: blocks of 32 KiB, in them pieces."""
    block, head, at, whole = 32768, 7, 7, b""
    while at + head <= len(data):
        if block - at % block < head:
            at += block - at % block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + head : at + head + size]
        at += head + size
        if kind in (1, 4):  # the whole record, or its last piece
            yield whole
            whole = b""


SECRET = "janes-folder"
PATHS = {
    "base": f"/home/{SECRET}/model.safetensors",
    "base_lora": [f"/home/{SECRET}/style.safetensors:0.8", f"C:\\Users\\{SECRET}\\other.safetensors"],
    "clip": f"/home/{SECRET}/clip",
    "class_images": f"/home/{SECRET}/class",
    "data": f"/home/{SECRET}/dreambooth",
    "images": f"/home/{SECRET}/pictures",
    "output_dir": f"/home/{SECRET}/output",
    "score_clip": f"/home/{SECRET}/clip",
    "score_dino": f"C:/Users/{SECRET}/dino",
    "start_from": f"/home/{SECRET}/start.safetensors",
    "tokenizer": f"/home/{SECRET}/tokenizer",
    "vae": f"/home/{SECRET}/vae.safetensors",
}
TABLE = {"images": PATHS["images"], "class_images": PATHS["class_images"], "instance_prompt": "a photo of sks dog"}
TABLE["class_prompt"] = "a photo of a dog"


def settings_classes(of: type[TrainSettings] = TrainSettings) -> list[type[TrainSettings]]:
    """Every class of settings that a face passes to the recipe; the nodes pass the first."""
    import pack.trainer.settings.evaluate  # noqa: F401

    return [of, *(inner for subclass in of.__subclasses__() for inner in settings_classes(subclass))]


def built(settings_class: type[TrainSettings], log_with: str, **values: Any) -> TrainSettings:
    """Settings with as many paths as the class knows."""
    values = {**PATHS, "class_prompt": "a photo of a dog", "preview_every": 1, "log_with": log_with, **values}
    known = {name: value for name, value in values.items() if name in settings_class.model_fields}
    if "subject" in values:
        known = {name: value for name, value in known.items() if name not in SubjectTable.model_fields}
    return settings_class.checked(known)


@pytest.mark.parametrize("tables", [False, True], ids=["one subject", "tables"])
@pytest.mark.parametrize("settings_class", settings_classes(), ids=lambda found: found.__name__)
def test_no_face_s_settings_tell_a_path(settings_class: type[TrainSettings], tables: bool) -> None:
    """Plain values, which every tracker takes; the base by its title alone."""
    values: dict[str, Any] = {}
    if tables and "subject" in settings_class.model_fields:
        values = {"subject": [TABLE]}
    configuration = trackers._configuration(built(settings_class, "wandb", **values), "model")
    assert SECRET not in repr(configuration)
    assert configuration["base"] == "model"
    assert configuration["log_with"] == "wandb"
    assert {type(value) for value in configuration.values()} <= {str, int, float, bool}


@pytest.mark.parametrize("settings_class", settings_classes(), ids=lambda found: found.__name__)
def test_tensorboard_starts_from_every_face(settings_class: type[TrainSettings], tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path, "dog", "0" * 64, {})
    listener = Recorder()
    with (
        accelerate_state_kept(),
        logging_listener(listener, run, built(settings_class, "tensorboard"), "model", 0) as log,
    ):
        log.report(Step(1, 2, 0.5, 1e-4, 1.0, 1.0, 0))
    assert listener.warnings == []
    assert [point.value for point in tensorboard_log(run.path).Scalars("loss")] == [0.5]
    logged = b"".join(path.read_bytes() for path in (run.path / "logs").rglob("*") if path.is_file())
    assert b"learning_rate" in logged
    assert SECRET.encode() not in logged


@pytest.mark.slow  # wandb starts a process of its own
@pytest.mark.parametrize("settings_class", settings_classes(), ids=lambda found: found.__name__)
def test_wandb_starts_from_every_face_and_tells_nothing_private(
    settings_class: type[TrainSettings], tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be sent holds neither folders, nor the command line with its paths, nor this machine's name."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(sys, "argv", [f"/home/{SECRET}/trainer", "--images", f"/home/{SECRET}/pictures"])
    monkeypatch.setattr("platform.node", lambda: "janes-machine")
    monkeypatch.setattr("socket.gethostname", lambda: "janes-machine")
    run = RunFolder.open(tmp_path / SECRET, "dog", "0" * 64, {})
    listener = Recorder()
    with accelerate_state_kept(), logging_listener(listener, run, built(settings_class, "wandb"), "model", 0) as log:
        log.report(Step(1, 2, 0.5, 1e-4, 1.0, 1.0, 0))
    assert listener.warnings == []
    wandb.teardown()  # the file is written a moment after the log is finished
    [folder] = (run.path / "logs" / "wandb").glob("offline-run-*")
    assert [line["loss"] for line in wandb_lines(folder)] == [0.5]
    [sent] = folder.glob("run-*.wandb")
    files = {path.name for path in (folder / "files").rglob("*") if path.is_file()}
    assert files <= {"requirements.txt", "config.yaml", "wandb-summary.json"}
    assert b"learning_rate" in sent.read_bytes()
    for private in (SECRET, "janes-machine", str(ROOT), sys.executable):
        assert private.encode() not in sent.read_bytes()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_any_work(
    name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *rest: None if wanted == name else find(wanted))
    with pytest.raises(SettingsError, match="not installed") as caught:
        require_trainable(world.base, TrainSettings(log_with=name), None, tmp_path / "loras", tmp_path / "runs")
    assert f'"{sys.executable}" -m pip install {name}' in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_an_account_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would ask for a key on a terminal that nobody may be looking at."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    wandb.teardown()
    with pytest.raises(SettingsError, match="has no API key") as caught:
        require_tracker("wandb")
    assert "WANDB_MODE=offline" in caught.value.remedy
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_tracker("wandb")
    wandb.teardown()


class Unreachable(ConnectionError):
    """As of a network that went away."""


class Tracker:
    """Logs some steps, and fails from then on."""

    name = "of our own"

    def __init__(self, steps: int) -> None:
        self.left, self.logged, self.finished = steps, [], False  # type: ignore[var-annotated]

    def log(self, values: dict[str, Any], step: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise Unreachable("no route to host")
        self.logged.append(step)

    def log_images(self, values: dict[str, Any], step: int, **layout: str) -> None:
        self.log(values, step)

    def finish(self) -> None:
        self.finished = True
        if self.left < 0:
            raise Unreachable("no route to host")


def step(number: int) -> Step:
    return Step(number, 9, 0.5, 1e-4, 1.0, 1.0, 1)


def test_a_tracker_that_fails_is_left_out_with_one_warning() -> None:
    listener, tracker = Recorder(), Tracker(2)
    with TrackedListener(listener, "Ours", lambda: tracker) as told:
        for number in range(1, 6):
            told.report(step(number))
    assert tracker.logged == [1, 2]
    assert listener.losses == [0.5] * 5
    [warning] = listener.warnings
    assert "Ours failed" in warning
    assert "Unreachable: no route to host" in warning


def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_FINISH_TIMEOUT", 0.05)
    listener, tracker, answered = Recorder(), Tracker(9), threading.Event()
    tracker.finish = answered.wait  # type: ignore[method-assign]
    with TrackedListener(listener, "Ours", lambda: tracker) as told:
        told.report(step(1))
    [warning] = listener.warnings
    assert "Ours has not finished uploading" in warning
    answered.set()


@pytest.mark.parametrize(("name", "logged"), [("wandb", [1, 2, 3, 3, 4]), ("tensorboard", [1, 2, 3, 0, 4])])
def test_late_previews_of_the_base_are_logged_where_the_tracker_takes_them(name: str, logged: list[int]) -> None:
    """Weights & Biases drops what is of a step before the newest."""
    tracker = Tracker(99)
    tracker.name = name
    with TrackedListener(Recorder(), "Ours", lambda: tracker) as told:
        for number in (1, 2, 3):
            told.report(step(number))
        told.report(Preview(0, [], {"DINO": 0.5}))
        told.report(step(4))
    assert tracker.logged[:4] + tracker.logged[-1:] == logged


class Interrupted(Recorder):
    """A listener during which the user presses Ctrl-C."""

    def report(self, event: Any) -> None:
        raise KeyboardInterrupt


def test_a_log_is_finished_however_the_run_ends(tmp_path: Path) -> None:
    tracker, gone = Tracker(9), (tmp_path / "gone.png", "a dog")
    with pytest.raises(KeyboardInterrupt), TrackedListener(Interrupted(), "Ours", lambda: tracker) as told:
        told.report(Preview(2, [gone], {}))
    assert tracker.logged == []
    assert tracker.finished


def test_a_picture_that_is_gone_costs_the_log_alone(tmp_path: Path) -> None:
    listener = Recorder()
    with TrackedListener(listener, "Ours", lambda: Tracker(9)) as told:
        told.report(Preview(2, [(tmp_path / "gone.png", "a dog")], {"DINO": 0.5}))
    assert len(listener.warnings) == 1


def test_a_tracker_that_can_not_begin_is_an_error(finished: Finished, world: World, tmp_path: Path) -> None:
    """Here a file stands where the log's folder would be."""
    run = finished.begun(tmp_path, 3)
    (run / "logs").write_text("in the way")
    with pytest.raises(SettingsError, match="TensorBoard can't start") as caught:
        world.train(tmp_path, log_with="tensorboard")
    assert "log_with" in caught.value.remedy
    assert not (run / "step-00000004").exists()
    assert read_metrics(run / "metrics.jsonl")[-1]["state"] == "failed"
    assert world.train(tmp_path).started_from == 3
