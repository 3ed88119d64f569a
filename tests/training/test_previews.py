"""Previews show what a step's weights draw, score it, stop a run by it, and change nothing of what is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import mostly_slow
from helpers import DEMO, MadeOnce, Recorder
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.core.errors import CancelledError, SettingsError, StorageError, TrainerError, WeightsError
from pack.trainer.core.events import Phase, Preview, Step
from pack.trainer.data.images import Picture, decode
from pack.trainer.data.latent_cache import encode_captions
from pack.trainer.dreambooth import TrainResult
from pack.trainer.evaluation.evaluator import Evaluator, fidelity_and_drift
from pack.trainer.evaluation.feature_extractors import FeatureExtractors
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from pack.trainer.models.sampling import GenerationConfig, build_on_device, generate
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import StartingPoint
from pack.trainer.training.previews import Previews
from pack.trainer.training.runs.checkpoint import Measurements
from pack.trainer.training.runs.folder import RunFolder
from pack.trainer.training.runs.metrics import RecordedListener, read_metrics
from PIL import Image
from run_trees import file_size_limit
from safetensors.torch import load_file
from worlds import TOKENIZER, World, assert_same_end, differing, newest_step, runs_in

pytestmark = pytest.mark.usefixtures("quick")

SCORER = str(DEMO / "scorer")
PROMPTS = ["a photo of sks dog", "the sks dog on the grass"]
CLASS_PROMPTS = ["a photo of a dog", "the dog on the grass"]
SHOWN: dict[str, Any] = {
    "steps": 5,
    "checkpoint_every": 1,
    "preview_every": 2,
    "preview_prompts": " | ".join(PROMPTS),
    "preview_count": 2,
    "preview_steps": 2,
    "preview_guidance": 3.0,
    "preview_seed": 7,
    "score_clip": SCORER,
}
# Fidelity is highest at step 2 and falls far afterwards, while the class drifts.
FALLING: dict[str, Any] = {
    "steps": 10,
    "learning_rate": 0.03,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "keep_adapters": False,
    "preview_prompts": PROMPTS[0],
    "preview_count": 1,
    "preview_guidance": 1.0,
    "preview_seed": 0,
}
# Previews leave no trace in any of these.
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA, dropout, text encoder for three steps": {
        "adapter": "dora",
        "dropout": 0.25,
        "text_encoder_lr": 1e-2,
        "text_encoder_until": 0.6,
        "preview_count": 1,
    },
    "all weights, text encoder": {
        "adapter": "full",
        "learning_rate": 1e-3,
        "text_encoder_lr": 1e-3,
        "preview_count": 1,
        "score_clip": "",
    },
}
PLAIN, TEXT, FULL = VARIANTS


@pytest.fixture(scope="module")
def shown(world: World, tmp_path_factory: pytest.TempPathFactory) -> MadeOnce[TrainResult]:
    """Five steps with previews of 0, 2, 4 and 5 and a checkpoint of every step, by variant."""
    return MadeOnce(lambda name: world.train(tmp_path_factory.mktemp("shown"), **SHOWN | VARIANTS[name]))


@pytest.fixture(scope="module")
def falling(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped early, after step 6. To be copied."""
    folder = tmp_path_factory.mktemp("falling")
    result = world.train(folder, **SHOWN | FALLING, early_stop=2)
    assert (result.step, result.started_from) == (2, 0)
    return folder


class StopAt(Recorder):
    """Asks to stop from when, after a step was told of, such an event is the newest."""

    def __init__(self, step: int, matches: Callable[[Any], bool]) -> None:
        super().__init__()
        self.step, self.matches = step, matches

    def should_stop(self) -> bool:
        told = max((event.step for event in self.events if isinstance(event, Step)), default=0)
        return told >= self.step and self.matches(self.events[-1])


def drawing(event: Any) -> bool:
    """The second prompt is being drawn."""
    return bool(event == Phase("preview", 1, 4))


def scoring(event: Any) -> bool:
    return isinstance(event, Phase) and event.name == "scoring"


def shown_already(event: Any) -> bool:
    return isinstance(event, Preview)


def previews_in(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted((run / "previews").rglob("*.png"))}


def metrics_in(run: Path) -> list[dict[str, Any]]:
    """Without what another course of time changes. Lines that are not whole are no lines."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("rate", "memory")} for line in lines]


def assert_same_metrics(ours: Path, theirs: Path) -> None:
    """Line by line; scores but for rounding, since a judge looks at other pictures at once after a stop."""
    mine, others = (sorted(metrics_in(run), key=lambda line: line["step"]) for run in (ours, theirs))
    for one, other in zip(mine, others, strict=True):  # those of step 0 come later, unless the file was gone on with
        assert one | {"scores": {}} == other | {"scores": {}}
        assert one.get("scores") == (pytest.approx(other["scores"], abs=1e-4) if "scores" in other else None)


def scores_in(run: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line["scores"] for line in metrics_in(run) if "scores" in line}


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path), dtype=int)


def preview(run: Path, step: int, name: str) -> Path:
    return run / "previews" / f"step-{step:08d}" / name


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_previews_change_nothing_of_what_is_trained(
    variant: str, shown: MadeOnce[TrainResult], world: World, tmp_path: Path
) -> None:
    result = world.train(tmp_path, steps=SHOWN["steps"], **VARIANTS[variant])
    assert result.run.name == shown[variant].run.name  # the same fingerprint
    assert_same_end(result, shown[variant])
    assert not (result.run / "previews").exists()
    *lines, end = metrics_in(result.run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert end == {"step": 5, "state": "done"}


def drawn_by(base: BaseWeights, run: Path, step: int) -> dict[str, np.ndarray[Any, Any]]:
    """File → what the base draws with the adapter of that step's checkpoint."""
    model = build_on_device(base, torch.device("cpu"), "fp32")
    adapter = run / f"step-{step:08d}" / "adapter.safetensors"
    if adapter.is_file():
        merge_into(model, read_adapter(adapter), 1.0)
    found, config = {}, GenerationConfig(width=64, height=64, steps=2, guidance=3.0)
    for kind, prompts in (("subject", PROMPTS), ("class", CLASS_PROMPTS)):
        for number, prompt in enumerate(prompts):
            for index, seed in enumerate((7, 8)):
                [image] = generate(model, prompt, [seed], config)
                found[f"{kind}-{number:02d}-{index:02d}.png"] = np.asarray(image, dtype=int)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("variant", [PLAIN, TEXT])
def test_previews_are_drawn_with_the_weights_of_their_step(
    variant: str, shown: MadeOnce[TrainResult], world: World
) -> None:
    """And at every step from the same noise, so that nothing but the weights changes them."""
    run = shown[variant].run
    assert {path.name for path in (run / "previews").glob("step-*")} == {f"step-{step:08d}" for step in (0, 2, 4, 5)}
    before: dict[str, np.ndarray[Any, Any]] = {}
    for step in (0, 2, 4, 5):
        expected = drawn_by(world.base, run, step)
        found = {path.name: pixels(path) for path in preview(run, step, "").iterdir()}
        count = 2 if variant == PLAIN else 1
        assert set(found) == {name for name in expected if int(name[-6:-4]) < count}
        for name, image in found.items():
            np.testing.assert_allclose(image, expected[name], atol=1)
            assert name not in before or np.abs(image - before[name]).max() > 3, f"{name} of {step} shows no change"
        before = found


@pytest.mark.slow
def test_previews_of_all_weights_are_drawn_with_those_of_the_checkpoint(shown: MadeOnce[TrainResult]) -> None:
    result = shown[FULL]
    assert result.checkpoint is not None
    expected = drawn_by(open_base(result.checkpoint, TOKENIZER), result.run, 5)
    found = {path.name: pixels(path) for path in preview(result.run, 5, "").iterdir()}
    assert set(found) == {"subject-00-00.png", "subject-01-00.png"}
    for name, image in found.items():
        np.testing.assert_allclose(image, expected[name], atol=1)
        assert np.abs(image - pixels(preview(result.run, 4, name))).max() > 3


def test_scores_are_those_of_the_files(shown: MadeOnce[TrainResult], world: World) -> None:
    """Lines of steps and previews in their order; drift is measured against the base, which has none."""
    run = shown[PLAIN].run
    *lines, _ = metrics_in(run)  # the last tells the end
    assert [(line["step"], "scores" in line) for line in lines] == [
        (1, False), (2, False), (0, True), (2, True), (3, False), (4, False), (4, True), (5, False), (5, True)
    ]  # fmt: skip
    judged = Evaluator(
        FeatureExtractors.open(SCORER, "", torch.device("cpu")), world.subject, PROMPTS, "sks", Recorder()
    )
    assert judged.class_prompts == CLASS_PROMPTS
    for step, scores in scores_in(run).items():

        def kept(kind: str, step: int) -> list[Picture]:
            paths = sorted(preview(run, step, "").glob(f"{kind}-*.png"))
            return [Picture(path.name, "", str(path), lambda path=path: decode(path.read_bytes())) for path in paths]

        assert scores == pytest.approx(
            judged.compute_metrics(kept("subject", step), kept("class", 0), kept("class", step)), abs=1e-4
        )
        assert len(scores) == 6
        drift = scores["drift (CLIP)"]
        assert drift > 1e-4 if step else drift == pytest.approx(0, abs=1e-6)


def test_listeners_are_told_of_previews(world: World, tmp_path: Path) -> None:
    """Without a model that judges, nothing is drawn of the class; without prompts, the first picture's caption is."""
    changes = {"score_clip": "", "preview_prompts": "", "preview_count": 1, "steps": 2}
    listener = Recorder()
    result = world.train(tmp_path, listener, **SHOWN | changes)
    told = [event for event in listener.events if isinstance(event, Preview)]
    assert [(event.step, event.scores) for event in told] == [(0, {}), (2, {})]
    for event in told:
        assert event.pictures == [(preview(result.run, event.step, "subject-00-00.png"), PROMPTS[0])]
        assert event.pictures[0][0].is_file()
    assert len(previews_in(result.run)) == 2
    lines = [line for line in metrics_in(result.run) if "scores" in line]
    pictures = [["subject-00-00.png", PROMPTS[0]]]
    assert lines == [{"step": step, "scores": {}, "pictures": pictures} for step in (0, 2)]


@pytest.mark.slow
def test_stops_leave_no_trace(shown: MadeOnce[TrainResult], world: World, tmp_path: Path) -> None:
    """In the previews of the base, of a step and of the last one, while scoring, and between previews."""
    changes = SHOWN | VARIANTS[TEXT] | {"checkpoint_every": 0, "base_preview": "before-first-step"}
    for stop, step in (
        (StopAt(0, drawing), 0),
        (StopAt(1, drawing), 2),
        (StopAt(0, shown_already), 3),  # the previews of 2 are made, then comes a step
        (StopAt(4, scoring), 4),
        (StopAt(5, drawing), 5),
    ):
        with pytest.raises(CancelledError):
            world.train(tmp_path, stop, **changes)
        [run] = runs_in(tmp_path)
        assert newest_step(run) == step
        assert not list((tmp_path / "loras").glob("*.safetensors"))
    listener = Recorder()
    result = world.train(tmp_path, listener, **changes)
    assert listener.losses == []  # the last preview alone was left
    assert_same_end(result, shown[TEXT])
    assert previews_in(result.run) == previews_in(shown[TEXT].run)
    assert_same_metrics(result.run, shown[TEXT].run)
    again = Recorder()
    assert world.train(tmp_path, again, **changes).started_from == 5
    assert not [event for event in again.events if isinstance(event, Phase | Preview | Step)]


def test_a_stop_takes_effect_within_a_denoising_step(world: World, tmp_path: Path) -> None:
    class CountsAsks(Recorder):
        def should_stop(self) -> bool:
            self.steps_seen += self.events[-1] == Phase("preview", 0, 4)
            return self.steps_seen >= 5

    with pytest.raises(CancelledError):
        world.train(tmp_path, CountsAsks(), **SHOWN | {"preview_steps": 200, "preview_guidance": 1.0})
    assert not previews_in(runs_in(tmp_path)[0])


@pytest.mark.slow
def test_metrics_hold_each_step_once_after_a_crash(shown: MadeOnce[TrainResult], world: World, tmp_path: Path) -> None:
    """A run that was killed two steps after its last checkpoint, within a line."""
    run = shown[PLAIN].run
    copy = shutil.copytree(run, tmp_path / "runs" / run.name)
    for step in (3, 4, 5):
        shutil.rmtree(copy / f"step-{step:08d}")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:7])[:-30])
    result = world.train(tmp_path, **SHOWN)
    assert result.started_from == 2
    assert_same_metrics(copy, run)
    assert_same_end(result, shown[PLAIN])


# What is trained has a beginning of its own wherever another kind of it would show.
BEGINNINGS: dict[str, dict[str, Any]] = {
    "LoRA, averaged": {"ema_decay": 0.9},
    "DoRA, dropout, text encoder for one step": {
        "adapter": "dora",
        "dropout": 0.25,
        "text_encoder_lr": 1e-2,
        "text_encoder_until": 0.2,
    },
    "orthogonal": {"lora_init": "orthogonal"},
    "schedule-free": {"optimizer": "adamw-schedule-free", "lr_schedule": "constant"},
}
LATER: dict[str, Any] = {"preview_every": 4, "preview_prompts": PROMPTS[0], "preview_count": 1, "checkpoint_every": 0}


def order_of(listener: Recorder) -> list[str]:
    names = {Step: "step", Preview: "preview"}
    return [f"{names[type(event)]} {event.step}" for event in listener.events if type(event) in names]


@pytest.mark.parametrize("variant", mostly_slow(list(BEGINNINGS), "DoRA, dropout, text encoder for one step"))
def test_the_base_is_shown_once_steps_have_run(variant: str, world: World, tmp_path: Path) -> None:
    """As it would have been before them, to the bit; and nothing of what is trained depends on when."""
    changes = SHOWN | LATER | BEGINNINGS[variant]
    later = world.train(tmp_path / "later", late := Recorder(), **changes)
    first = world.train(tmp_path / "first", early := Recorder(), **changes, base_preview="before-first-step")
    steps = [f"step {step}" for step in (1, 2, 3, 4, 5)]
    assert order_of(late) == [*steps[:3], "preview 0", steps[3], "preview 4", steps[4], "preview 5"]
    assert order_of(early) == ["preview 0", *steps[:4], "preview 4", steps[4], "preview 5"]
    assert previews_in(later.run) == previews_in(first.run)
    assert_same_metrics(later.run, first.run)
    assert_same_end(later, first)
    assert scores_in(later.run)[0]["drift (CLIP)"] == pytest.approx(0, abs=1e-6)


def test_a_stop_in_the_late_previews_of_the_base_keeps_what_was_trained(world: World, tmp_path: Path) -> None:
    """And not the weights that are shown; the run goes on with these previews."""
    changes = SHOWN | LATER | BEGINNINGS["LoRA, averaged"]
    straight = world.train(tmp_path / "straight", **changes)
    with pytest.raises(CancelledError):
        world.train(tmp_path / "stopped", StopAt(3, lambda event: event == Phase("preview", 1, 2)), **changes)
    [run] = runs_in(tmp_path / "stopped")
    assert newest_step(run) == 3
    assert RunFolder(run).measurements().scores == {}
    result = world.train(tmp_path / "stopped", listener := Recorder(), **changes)
    assert order_of(listener) == ["preview 0", "step 4", "preview 4", "step 5", "preview 5"]
    assert_same_end(result, straight)
    assert previews_in(result.run) == previews_in(straight.run)


def test_a_run_that_was_stopped_before_the_base_was_shown_shows_it(world: World, tmp_path: Path) -> None:
    changes = SHOWN | LATER | {"score_clip": ""}
    with pytest.raises(CancelledError):
        world.train(tmp_path / "stopped", StopAt(1, lambda event: isinstance(event, Step)), **changes)
    [run] = runs_in(tmp_path / "stopped")
    assert 1 <= newest_step(run) < 3
    result = world.train(tmp_path / "stopped", listener := Recorder(), **changes)
    assert "preview 0" in order_of(listener)
    straight = world.train(tmp_path / "straight", **changes)
    assert previews_in(result.run) == previews_in(straight.run)


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ({"steps": 2}, ["step 1", "step 2", "preview 0", "preview 2"]),
        ({"steps": 2, "base_preview": "off"}, ["step 1", "step 2", "preview 2"]),
        ({"steps": 1, "adapter": "full", "learning_rate": 1e-3}, ["preview 0", "step 1", "preview 1"]),
    ],
    ids=str,
)
def test_when_the_base_is_shown(changes: dict[str, Any], order: list[str], world: World, tmp_path: Path) -> None:
    world.train(tmp_path, listener := Recorder(), **SHOWN | LATER | {"score_clip": ""} | changes)
    assert order_of(listener) == order


def test_scores_need_the_base_whatever_is_shown(world: World, tmp_path: Path) -> None:
    previews = previews_of(world, tmp_path, base_preview="off")
    assert previews.base_step == 2
    assert previews_of(world, tmp_path, preview_every=0, score_clip="", early_stop=0).base_step is None


STEPS = [Step(step, 3, 0.5 * step, 1e-4, 2.0, 1.0, 9) for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        (b"", 3),
        (b'{"step": 3, "lo', 3),
        (b'{"step": 2, "loss": 1.0, "learning_rate": 1e-4, "rate": 2.0, "memory": 9}', 3),  # all but the line's end
        (b'{"step": 3, "loss": 7.0}\n{"step": 4, "scores": {"CLIP-I": 9.0}}\n', 3),
        (b'\x00\xff\xfe\n[1, 2]\nnull\n\n{"loss": 1.0}\n{"step": "2"}\n', 3),
    ],
)
def test_metrics_are_kept_up_to_where_a_run_goes_on(tail: bytes, kept: int, tmp_path: Path) -> None:
    path, listener = tmp_path / "metrics.jsonl", Recorder()
    assert read_metrics(path) == []
    events = [*STEPS[:2], Preview(2, [(tmp_path / "ü.png", "ein Hund\u2028 ü")], {"CLIP-I": 0.25})]
    recorded = RecordedListener(listener, path, 0)
    for event in events:
        recorded.report(event)
    lines = read_metrics(path)  # a process that is killed closes nothing
    recorded.close()
    assert listener.events == events
    assert lines[0] == {"step": 1, "loss": 0.5, "learning_rate": 1e-4, "rate": 2.0, "memory": 9}
    assert lines[2] == {"step": 2, "scores": {"CLIP-I": 0.25}, "pictures": [["ü.png", "ein Hund\u2028 ü"]]}
    path.write_bytes(path.read_bytes() + tail)
    recorded = RecordedListener(listener, path, 2)
    recorded.report(STEPS[2])
    recorded.close()
    assert read_metrics(path)[:3] == lines
    assert [line["step"] for line in metrics_in(tmp_path)] == [1, 2, 2, *[2] * (kept - 3), 3]


def test_a_full_disk_is_named_by_the_metrics(tmp_path: Path) -> None:
    """Once: closing what could not be written says nothing more."""
    recorded = RecordedListener(Recorder(), tmp_path / "metrics.jsonl", 0)
    with file_size_limit(100):
        recorded.report(STEPS[0])
        with pytest.raises(StorageError, match=r"metrics\.jsonl can't be written") as caught:
            recorded.report(STEPS[1])
        recorded.close()
    assert "the run will resume" in caught.value.remedy


@pytest.mark.slow
def test_previews_can_be_asked_for_or_changed_in_the_middle_of_a_run(
    shown: MadeOnce[TrainResult], world: World, tmp_path: Path
) -> None:
    """They are compared with what the base draws in the same way, whatever it drew before."""
    with pytest.raises(CancelledError):
        world.train(
            tmp_path, Recorder(stop_after=len(world.subject) + 1), **SHOWN | {"preview_every": 0, "score_clip": ""}
        )
    others = {"preview_seed": 1}
    for stop, changes in (
        (StopAt(0, shown_already), {"score_clip": ""}),
        (StopAt(3, shown_already), others),
        (None, {}),
    ):
        try:
            result = world.train(tmp_path, stop, **SHOWN | changes | {"base_preview": "before-first-step"})
        except CancelledError:
            assert stop is not None
    assert_same_end(result, shown[PLAIN])
    expected = scores_in(shown[PLAIN].run)
    found = scores_in(result.run)
    assert list(found) == [2, 4, 5]
    assert found[2] == {}
    assert found[4] != expected[4]
    assert found[5] == pytest.approx(expected[5], abs=1e-4)


@pytest.mark.slow
def test_the_class_drifts_from_the_base_and_not_from_an_adapter_to_start_from(world: World, tmp_path: Path) -> None:
    """Before the first step such a run generates other pictures than the base does."""
    changes: dict[str, Any] = {**SHOWN, "steps": 1, "preview_prompts": PROMPTS[0]}
    first = world.train(tmp_path / "first", **changes, learning_rate=0.1)
    start = StartingPoint(first.adapter)
    second = world.train(tmp_path / "second", starting_point=start, **changes)

    def base_pictures(run: Path) -> list[np.ndarray[Any, Any]]:
        return [pixels(path) for path in sorted((run / "previews" / "base").glob("*/*.png"))]

    of_base, of_start = (pixels(preview(result.run, 0, "class-00-00.png")) for result in (first, second))
    assert np.abs(of_base - of_start).max() > 2
    for ours, theirs in zip(base_pictures(second.run), base_pictures(first.run), strict=True):
        assert np.abs(ours - theirs).max() <= 1  # rounding, since a LoRA of zeros computes in another order
    drifts = [fidelity_and_drift(scores_in(result.run)[0])[1] for result in (first, second)]
    assert drifts[0] == pytest.approx(0, abs=1e-6)
    assert drifts[1] > 1e-4


def test_class_pictures_of_the_base_are_drawn_by_the_base_and_the_runs_schedule(world: World, tmp_path: Path) -> None:
    """Without step 0 they are made now: an untrained model shows no drift, one that starts elsewhere does."""
    changes: dict[str, Any] = {**SHOWN, "preview_prompts": PROMPTS[0], "preview_count": 1}
    settings = TrainSettings(**changes, resolution=64, zero_terminal_snr=True)

    def drift(step: int, change: float, *, starts_as_base: bool) -> float:
        run = RunFolder(tmp_path / f"{step}-{change}-{starts_as_base}")
        cpu = torch.device("cpu")
        previews = Previews(world.base, world.subject, settings, run, cpu, starts_as_base=starts_as_base)
        model = build_on_device(world.base, cpu, "fp32")
        model.objective = model.objective.with_settings(settings)
        previews.encode(model, (), Recorder())
        text = previews.joined(encode_captions(model, ["first"], cpu, ()))
        with torch.no_grad():
            for parameter in model.denoiser.conv_out.parameters():
                parameter.data = parameter * (1 - change)
        scores = previews.generate(
            step, model, lambda rows: {name: encoded[rows] for name, encoded in text.items()}, Recorder()
        )
        return fidelity_and_drift(scores)[1]

    assert drift(2, 0.0, starts_as_base=True) == pytest.approx(0, abs=1e-6)
    assert drift(0, 0.0, starts_as_base=False) == pytest.approx(0, abs=1e-6)
    assert drift(0, 0.5, starts_as_base=False) > 1e-4


@pytest.mark.slow
def test_a_run_stops_early_at_its_best_step(falling: Path, world: World, tmp_path: Path) -> None:
    """Where two previews showed the subject no better than that of step 2; its weights are those of a straight run."""
    straight = world.train(tmp_path, **SHOWN | FALLING | {"keep_checkpoints": 100})
    marks = scores_in(straight.run)
    assert marks[2]["CLIP-I"] > max(marks[step]["CLIP-I"] for step in (4, 6, 8, 10)) + 0.01
    assert min(marks[step]["drift (CLIP)"] for step in (4, 6, 8, 10)) > marks[2]["drift (CLIP)"] + 0.01
    [run] = runs_in(falling)
    assert scores_in(run) == {step: pytest.approx(marks[step], abs=1e-4) for step in (0, 2, 4, 6)}
    assert RunFolder(run).steps() == [2, 6]
    best = straight.run / "step-00000002" / "adapter.safetensors"
    assert differing(run / "step-00000002" / "adapter.safetensors", best) == []
    [file] = (falling / "loras").glob("*.safetensors")
    assert differing(file, best) == []
    assert read_adapter(file).metadata["ss_steps"] == "2"
    assert straight.step == 10


def test_a_run_that_stopped_early_is_finished(falling: Path, world: World, tmp_path: Path) -> None:
    shutil.copytree(falling, tmp_path / "copy")
    listener = Recorder()
    result = world.train(tmp_path / "copy", listener, **SHOWN | FALLING, early_stop=2)
    assert (result.step, result.started_from, listener.losses) == (2, 2, [])
    assert [path.read_bytes() for path in (tmp_path / "copy" / "loras").glob("*.safetensors")] == [
        path.read_bytes() for path in (falling / "loras").glob("*.safetensors")
    ]
    assert any("finished" in note for note in listener.notes)


@pytest.mark.slow
def test_other_previews_begin_early_stop_anew(falling: Path, world: World, tmp_path: Path) -> None:
    """With the same previews that patience runs out at step 8."""
    shutil.copytree(falling, tmp_path / "copy")
    changes: dict[str, Any] = {**SHOWN, **FALLING, "early_stop": 3, "preview_seed": 5}
    result = world.train(tmp_path / "copy", listener := Recorder(), **changes)
    assert (result.step, result.started_from) == (10, 6)
    assert sum("early stop only compares new ones" in note for note in listener.notes) == 1
    digests = RunFolder(result.run).measurements().scored_as
    assert len({digests[step] for step in (0, 2, 4, 6)}) == len({digests[step] for step in (8, 10)}) == 1
    assert digests[8] != digests[6]


SCORED = {"score_clip": "openai/clip", "preview_every": 2, "early_stop": 2, "steps": 8}
SCORES = {step: {"CLIP-I": fidelity, "drift (CLIP)": step / 10} for step, fidelity in ((2, 0.9), (4, 0.5), (6, 0.6))}


def previews_of(world: World, run: Path, **changes: Any) -> Previews:
    """Of a run that has a checkpoint of each step that was scored."""
    for step in SCORES:
        (run / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
    settings = TrainSettings(**SCORED | changes)
    return Previews(world.base, world.subject, settings, RunFolder(run), torch.device("cpu"))


def test_scores_of_other_previews_are_not_compared(world: World, tmp_path: Path) -> None:
    """Other prompts from step 3 on: no step of theirs is worse than step 2, of which they say nothing."""
    former = previews_of(world, tmp_path)
    later = previews_of(world, tmp_path, preview_prompts="sks dog in the snow")
    mixed = Measurements(SCORES, [], {2: former.conditions, 4: later.conditions, 6: later.conditions})
    alike = Measurements(SCORES, [], dict.fromkeys(SCORES, former.conditions))
    of_version_04 = Measurements(SCORES)
    assert [(later.best(found), later.stopped_at(found)) for found in (mixed, alike, of_version_04)] == [
        (6, None),
        (2, 2),  # as it was decided then
        (2, 2),
    ]


@pytest.mark.parametrize(
    ("changes", "is_other"),
    [
        ({"preview_every": 1, "early_stop": 1, "steps": 9, "learning_rate": 1.0}, False),
        ({"preview_prompts": "sks dog in the snow"}, True),
        ({"preview_count": 2}, True),
        ({"preview_steps": 9}, True),
        ({"preview_guidance": 2.0}, True),
        ({"preview_seed": 5}, True),
        ({"token": "rraj"}, True),
        ({"score_clip": "openai/another"}, True),
        ({"score_dino": "facebook/dino"}, True),
    ],
    ids=str,
)
def test_what_scores_depend_on(changes: dict[str, Any], is_other: bool, world: World, tmp_path: Path) -> None:
    before, after = previews_of(world, tmp_path), previews_of(world, tmp_path, **changes)
    assert (before.conditions != after.conditions) == is_other


@pytest.mark.parametrize(("patience", "stop", "given"), mostly_slow([(3, 8, 2), (0, 10, 10)], (3, 8, 2)))
def test_more_patience_goes_on(
    patience: int, stop: int, given: int, falling: Path, world: World, tmp_path: Path
) -> None:
    """And the former patience finds its best step again if that was kept, else all steps."""
    shutil.copytree(falling, tmp_path / "copy")
    before = next((tmp_path / "copy" / "loras").glob("*.safetensors")).read_bytes()
    listener = Recorder()
    result = world.train(tmp_path / "copy", listener, **SHOWN | FALLING, early_stop=patience)
    assert (result.step, result.started_from) == (given, 6)
    assert [event.step for event in listener.events if isinstance(event, Step)] == list(range(7, stop + 1))
    assert [line["step"] for line in metrics_in(result.run) if "loss" in line] == list(range(1, stop + 1))
    again = world.train(tmp_path / "copy", Recorder(), **SHOWN | FALLING, early_stop=2)
    assert (again.step, again.run) == (given, result.run)
    if given == 2:
        assert again.path.read_bytes() == before


@pytest.mark.slow
def test_patience_that_runs_out_with_the_steps(falling: Path, world: World, tmp_path: Path) -> None:
    """The best step is given the first time and every time; also to a run that was not asked to stop, if it is kept."""
    changes = SHOWN | FALLING | {"steps": 6}
    for keep_adapters, given in ((True, 2), (False, 6)):
        folder = tmp_path / str(keep_adapters)
        whole = world.train(folder, **changes | {"keep_adapters": keep_adapters})
        assert (whole.step, RunFolder(whole.run).steps()) == (6, [6])
        listener = Recorder()
        late = world.train(folder, listener, early_stop=2, **changes)
        assert (late.step, late.started_from, listener.losses) == (given, given, [])
        expected = whole.path if given == 6 else next((falling / "loras").glob("*.safetensors"))
        assert differing(late.path, expected) == []


@pytest.mark.slow
def test_all_weights_stop_early_too(world: World, tmp_path: Path) -> None:
    full = {"adapter": "full", "learning_rate": 1e-2, "text_encoder_lr": 1e-2, "preview_every": 1, "early_stop": 1}
    result = world.train(tmp_path, **SHOWN | FALLING | full | {"steps": 2})
    marks = scores_in(result.run)
    assert marks[1]["CLIP-I"] > marks[2]["CLIP-I"] + 0.01
    assert (result.step, RunFolder(result.run).steps()) == (1, [1, 2])
    assert result.checkpoint is not None
    weights = load_file(result.run / "step-00000001" / "weights.safetensors")
    base = open_base(result.checkpoint, TOKENIZER)
    for name, parameter in base.family.build(base).denoiser.named_parameters():
        assert torch.equal(parameter, weights[f"unet.{name}"])
    again = world.train(tmp_path, **SHOWN | FALLING | full | {"steps": 2})
    assert (again.step, again.path, again.checkpoint) == (1, result.path, result.checkpoint)


@pytest.mark.parametrize("keep_adapters", mostly_slow([True, False], True))
def test_the_adapters_of_old_checkpoints_are_kept(
    keep_adapters: bool, shown: MadeOnce[TrainResult], world: World, tmp_path: Path
) -> None:
    changes = {"steps": 5, "checkpoint_every": 1, "keep_checkpoints": 2, "keep_adapters": keep_adapters}
    run = RunFolder(world.train(tmp_path, **changes).run)
    assert run.steps() == [4, 5]
    expected = RunFolder(shown[PLAIN].run).adapters()
    found = run.adapters()
    assert list(expected) == [1, 2, 3, 4, 5]
    assert list(found) == ([1, 2, 3, 4, 5] if keep_adapters else [4, 5])
    for step, path in found.items():
        assert differing(path, expected[step]) == []
        adapter = run.trained(step).adapter
        assert adapter is not None
        assert adapter.metadata["ss_steps"] == str(step)
        assert not run.has(9)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"score_clip": SCORER}, ("preview_every",)),
        ({"score_dino": "facebook/dino-vits16"}, ("preview_every",)),
        ({"early_stop": 3}, ("preview_every",)),
        ({"preview_every": 10, "early_stop": 3}, ("score_clip", "score_dino")),
        ({"preview_every": -1}, ("preview_every",)),
        ({"preview_count": 0}, ("preview_count",)),
        ({"preview_steps": 0}, ("preview_steps",)),
        ({"preview_seed": -1}, ("preview_seed",)),
        ({"early_stop": -1}, ("early_stop",)),
    ],
    ids=str,
)
def test_settings_that_can_not_be(values: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as caught:
        TrainSettings.checked(values)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"preview_prompts": "a photo of a dog"}, SettingsError, ("'a photo of a dog'", "'sks'")),
        ({"preview_prompts": f"{PROMPTS[0]}|a dog"}, SettingsError, ("'a dog'", "'sks'")),
        ({"token": "ohwx"}, SettingsError, ("ohwx",)),
        ({"token": ""}, SettingsError, ("rare word",)),
        ({"score_clip": "/nowhere/clip"}, WeightsError, ("/nowhere/clip", "preprocessor_config.json")),
        ({"score_clip": " "}, SettingsError, ("CLIP",)),
    ],
    ids=str,
)
def test_what_can_not_be_scored_is_named_before_any_step(
    changes: dict[str, Any], error: type[TrainerError], words: tuple[str, ...], world: World, tmp_path: Path
) -> None:
    listener = Recorder()
    with pytest.raises(error) as caught:
        world.train(tmp_path, listener, **SHOWN | changes)
    for word in words:
        assert word in str(caught.value)
    assert not [event for event in listener.events if isinstance(event, Phase | Preview | Step)]


def test_the_first_picture_s_caption_may_lack_the_rare_word_without_scores(world: World, tmp_path: Path) -> None:
    """A preview needs no rare word, a score does."""
    plain = replace(world, subject=[replace(one, caption="a photo of a dog") for one in world.subject])
    changes = SHOWN | {"steps": 1, "preview_prompts": "", "preview_count": 1}
    with pytest.raises(SettingsError, match="does not contain the rare word"):
        plain.train(tmp_path, **changes)
    result = plain.train(tmp_path, **changes | {"score_clip": ""})
    assert list(previews_in(result.run)) == [f"previews/step-0000000{step}/subject-00-00.png" for step in (0, 1)]
