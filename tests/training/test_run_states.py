"""Whatever happens to a run's folder, in any order: no state is ever lost, and none is other than it should be.

A machine of Hypothesis trains, stops, kills, prunes, goes on, deletes, damages, renames, copies and moves runs, lets
disks be full and processes meet. What it goes by is a straight run, of which every state is known.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import hypothesis
import pytest
import torch
from helpers import Recorder
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from pack.trainer.core import files
from pack.trainer.core.errors import BusyError, CancelledError, StorageError
from pack.trainer.core.events import Preview, RunOpened, Step, Validation
from pack.trainer.core.locks import FolderLock
from pack.trainer.dreambooth import TrainResult
from pack.trainer.training.runs.folder import RunFolder
from pack.trainer.training.runs.index import RunIndex
from pack.trainer.training.runs.metrics import read_metrics
from run_trees import tree
from safetensors.torch import load_file
from small_runs import CHANGES, CREATION, SmallWorld, before_operation
from torch import Tensor
from worlds import World, make_world, steps_in

pytestmark = pytest.mark.usefixtures("quick")

SHORT, LONG = 3, 5
STATE_FILES = ["adapter.safetensors", "live.safetensors", "optimizer.safetensors", "state.json"]
# Every operation on the disk, and every report, is a moment; a run has some 150.
MOMENTS = st.integers(0, 160)
# A failure is seven rules at most, which can be read; to make it smaller takes many minutes.
GENERATE_ONLY = [hypothesis.Phase.generate]
NUMBERS = st.integers(0, 9)  # chooses one of what there is
SETTINGS = st.fixed_dictionaries(
    {
        "steps": st.sampled_from([LONG, SHORT]),
        "checkpoint_every": st.sampled_from([1, 2, 0]),
        "keep_checkpoints": st.sampled_from([2, 1, 9]),
        "keep_adapters": st.booleans(),
        "resume": st.sampled_from(["auto", "auto", "auto", "never"]),
    }
)


Raised = TypeVar("Raised", bound=BaseException)


class Home(Protocol):
    """A machine on which runs are trained."""

    def train(self, folder: Path, listener: Any = None, **changes: Any) -> TrainResult:
        """A whole run, with its files below `folder`."""


@dataclass(frozen=True)
class ChangedWorld:
    """Where real runs with these settings start from."""

    world: World
    changes: dict[str, Any]

    def train(self, folder: Path, listener: Any = None, **changes: Any) -> TrainResult:
        """A whole run, with its files below `folder`."""
        return self.world.train(folder, listener, **{**self.changes, **changes})


class KilledError(BaseException):
    """The process is gone: whatever it does on its way out is undone."""


@dataclass(frozen=True)
class Straight:
    """A run that nothing happened to.

    Attributes:
        states: Step → file → its tensors, and what is in state.json.
        losses: Step → loss and learning rate.
        scores: Step → scores of its previews.
        validated: Step → loss on the held-out pictures.
    """

    states: dict[int, dict[str, Any]]
    losses: dict[int, tuple[float, float]]
    scores: dict[int, dict[str, float]]
    validated: dict[int, float]


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds, without what was measured."""
    tensors: dict[str, Any] = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    state = json.loads((folder / "state.json").read_text())
    return tensors | {"state.json": {key: value for key, value in state.items() if key != "measurements"}}


def is_equal(ours: Any, theirs: Any) -> bool:
    """Bit for bit."""
    if isinstance(theirs, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(is_equal(ours[key], value) for key, value in theirs.items())
    return bool(ours == theirs)


def steps_of(listener: Recorder) -> list[Step]:
    """The steps that were reported."""
    return [event for event in listener.events if isinstance(event, Step)]


def raised(kind: type[Raised], act: Callable[[], object]) -> Raised | None:
    """The error of that kind, if there is one."""
    try:
        act()
    except kind as error:
        return error
    return None


def without_leftovers(contents: dict[str, Any]) -> dict[str, Any]:
    """Without what killed processes left: temporary files, and the names of those that had a lock."""
    return {path: content for path, content in contents.items() if ".tmp-" not in path and Path(path).name != ".lock"}


class RunStates(RuleBasedStateMachine):
    """Runs of one fingerprint in one folder, on one machine or another."""

    def __init__(self, place: Path, homes: Sequence[Home], straight: Straight) -> None:
        super().__init__()
        self.place = place
        self.homes = homes
        self.straight = straight
        self.number_of_roots = 0
        self.number_of_names = 0
        self.home = 0
        self.root = self.new_root()
        self.root.mkdir(parents=True)
        self.exported: dict[str, bytes] = {}  # by name
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(platform, "node", lambda: f"machine {self.home}")
        files._host.cache_clear()

    def teardown(self) -> None:
        self.patch.undo()
        files._host.cache_clear()
        shutil.rmtree(self.place)

    def new_root(self) -> Path:
        self.number_of_roots += 1
        return self.place / str(self.number_of_roots)

    # What is there

    @property
    def index(self) -> RunIndex:
        return RunIndex(self.root / "runs")

    def folders(self) -> list[Path]:
        """The runs' folders, the one that goes on last."""
        runs = [RunFolder(path.parent) for path in (self.root / "runs").glob("*/run.json")]
        runs = [run for run in runs if not files.is_temporary(run.path)]
        return [run.path for run in sorted(runs, key=lambda run: (run.started_at, max(run.steps(), default=0)))]

    def state_folders(self) -> list[Path]:
        return [run / f"step-{step:08d}" for run in self.folders() for step in steps_in(run)]

    # What always holds

    def check(self) -> None:
        """Every state is that of the straight run, and what is shown of the runs is true."""
        assert sorted(self.index.names()) == sorted(path.name for path in self.folders())
        for run in self.folders():
            self.check_states(run)
            self.check_metrics(run)
            self.check_index(run)
        loras = self.root / "loras"
        assert {path.name: path.read_bytes() for path in loras.glob("*.safetensors")} == self.exported

    def check_states(self, run: Path) -> None:
        for step in steps_in(run):
            assert is_equal(read_state(run / f"step-{step:08d}"), self.straight.states[step]), (run, step)
            scores = RunFolder(run).measurements(step).scores
            assert scores.items() <= self.straight.scores.items()
            due = {scored: scored or 2 for scored in self.straight.scores}  # the base's come after step 2
            assert {scored for scored, after in due.items() if after < step and scored % 2 == 0} <= set(scores)
        for path in (run / "adapters").glob("step-*"):
            step = int(path.stem.removeprefix("step-"))
            assert is_equal(load_file(path), self.straight.states[step]["adapter.safetensors"]), path

    def check_metrics(self, run: Path) -> None:
        lines = read_metrics(run / "metrics.jsonl")
        losses = [line for line in lines if "loss" in line]
        assert [line["step"] for line in losses] == list(range(1, len(losses) + 1))
        assert len(losses) >= max(steps_in(run), default=0)
        for line in losses:
            assert (line["loss"], line["learning_rate"]) == self.straight.losses[line["step"]]
        for line in lines:
            if "validation_loss" in line:
                assert line["validation_loss"] == self.straight.validated[line["step"]]
            if "scores" in line:
                assert line["scores"] == self.straight.scores[line["step"]]

    def check_metrics_end(self, run: Path) -> None:
        """Of a run that was trained and not killed: nothing is shown of what it would have to do again."""
        assert self.index.curve(run.name)["steps"][-1:] == steps_in(run)[-1:]

    def check_index(self, run: Path) -> None:
        details = self.index.details(run.name)
        lines = read_metrics(run / "metrics.jsonl")
        assert details["step"] == max([0, *steps_in(run), *(line["step"] for line in lines)])
        assert details["bytes"] == sum(len(content) for content in tree(run).values())
        adapters = {step: f"step-{step:08d}/adapter.safetensors" for step in steps_in(run)}
        adapters = {step: file for step, file in adapters.items() if (run / file).is_file()}
        for path in (run / "adapters").glob("step-*"):
            adapters.setdefault(int(path.stem.removeprefix("step-")), f"adapters/{path.name}")
        assert {adapter["step"]: adapter["file"] for adapter in details["adapters"]} == adapters
        for adapter in details["adapters"]:
            assert self.index.file(run.name, adapter["file"]).is_file()
        curve = self.index.curve(run.name)
        assert curve["steps"] == [line["step"] for line in lines if "loss" in line]

    # What a process does

    def train(self, changes: dict[str, Any], listener: Recorder | None = None) -> TrainResult:
        """Train; what comes out is what comes out of a straight run."""
        result = self.homes[self.home].train(self.root, listener, **changes)
        assert result.step == changes["steps"]
        assert is_equal(load_file(result.path), self.straight.states[result.step]["adapter.safetensors"])
        return result

    @contextmanager
    def nothing_lost(self, changes: dict[str, Any]) -> Iterator[None]:
        """What was there before the block and is gone is what those settings prune; and new files are whole."""
        before = {run: steps_in(run) for run in self.folders()}
        adapters = {run: set(RunFolder(run).adapters()) for run in self.folders()}
        yield
        for run, steps in before.items():
            after = steps_in(run)
            for step in set(steps) - set(after):
                later = [other for other in after if step < other <= changes["steps"]]
                assert len(later) >= changes["keep_checkpoints"], (run, steps, after)
            if changes["keep_adapters"]:
                assert adapters[run] <= set(RunFolder(run).adapters())
        self.look_for_exported()

    def look_for_exported(self) -> None:
        for path in (self.root / "loras").glob("*.safetensors"):
            if path.name not in self.exported:
                contents = load_file(path)
                finals = [self.straight.states[step]["adapter.safetensors"] for step in (SHORT, LONG)]
                assert any(is_equal(contents, final) for final in finals)
                self.exported[path.name] = path.read_bytes()

    def assert_clean(self, run: Path) -> None:
        """Nothing is left of what was being written, by this process or by another that had the run."""
        places = [*run.rglob(".tmp-*"), *(self.root / "loras").glob(".tmp-*"), *(self.root / "runs").glob(".tmp-*")]
        assert [path for path in places if files._host() in path.name or run in path.parents] == []
        assert not (run / ".lock").exists()

    def killed(self, moment: int, act: Callable[[Recorder], object], *, torn: bool) -> None:
        """Let a process do something and be gone at that moment, unless it is done by then.

        Args:
            moment: How much it does.
            act: What it does.
            torn: Whether the power goes, too: half is missing of what was being written.
        """
        left = self.new_root()

        def kill(operation: str) -> None:
            shutil.copytree(self.root, left, symlinks=True)
            raise KilledError

        with contextlib.suppress(KilledError), before_operation(moment, self.root, kill) as listener:
            act(listener)
        if left.exists():
            shutil.rmtree(self.root)
            left.rename(self.root)
            if torn:
                self.tear()

    def tear(self) -> None:
        """Of unfinished files half is missing, and the end of the metrics that no state needs."""
        for path in self.root.rglob(".tmp-*"):
            for file in [path, *path.rglob("*")]:
                if file.is_file() and path.parent != self.root / "runs":  # where runs are that are being deleted
                    os.truncate(file, file.stat().st_size // 2)
        for metrics in (self.root / "runs").glob("*/metrics.jsonl"):
            *_, last = ["", *metrics.read_text().splitlines(keepends=True)]
            newest = max(steps_in(metrics.parent), default=0)
            if last.endswith("\n") and json.loads(last)["step"] > newest:
                os.truncate(metrics, metrics.stat().st_size - 5)

    # The rules

    @rule(changes=SETTINGS)
    def train_to_the_end(self, changes: dict[str, Any]) -> None:
        expected = self.folders()[-1:] if changes["resume"] == "auto" else []
        newest = max([0, *(RunFolder(run).newest(changes["steps"]) for run in expected)])
        with self.nothing_lost(changes):
            result = self.train(changes, listener := Recorder())
        assert result.started_from == newest
        assert [event.step for event in steps_of(listener)] == list(range(newest + 1, changes["steps"] + 1))
        for run in expected:
            assert RunFolder(result.run).started_at == RunFolder(run).started_at
        assert self.index.summary(result.run.name)["state"] == "done"
        if newest < changes["steps"]:
            self.check_metrics_end(result.run)
        self.assert_clean(result.run)
        self.check()

    @rule(changes=SETTINGS, after=st.integers(1, LONG))
    def stop(self, changes: dict[str, Any], after: int) -> None:
        listener = Recorder(stop_after=after)
        with self.nothing_lost(changes):
            stopped = raised(CancelledError, lambda: self.train(changes, listener))
        run, started_from = next((event.path, event.step) for event in listener.events if isinstance(event, RunOpened))
        if stopped is not None and stopped.step:
            assert started_from <= stopped.step <= started_from + after
            assert stopped.step in steps_in(run)
            self.check_metrics_end(run)
        self.assert_clean(run)
        self.check()

    @rule(changes=SETTINGS, moment=MOMENTS, torn=st.booleans())
    def kill(self, changes: dict[str, Any], moment: int, torn: bool) -> None:
        with self.nothing_lost(changes):
            self.killed(moment, lambda listener: self.train(changes, listener), torn=torn)
        self.check()

    @rule(changes=SETTINGS, moment=MOMENTS)
    def fill_the_disk(self, changes: dict[str, Any], moment: int) -> None:
        def refuse(operation: str) -> None:
            if operation in (CREATION, "os.mkdir", "os.link"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full = before_operation(moment, self.root, refuse, forever=True)
        with self.nothing_lost(changes), full as listener:
            error = raised(StorageError, lambda: self.train(changes, listener))
        assert error is None or ("No space left" in error.problem and error.remedy)
        self.check()

    @rule(changes=SETTINGS, others=SETTINGS, moment=MOMENTS)
    def train_at_once(self, changes: dict[str, Any], others: dict[str, Any], moment: int) -> None:
        def other(operation: str) -> None:
            with contextlib.suppress(BusyError):
                self.train(others)

        least = {key: min(changes[key], others[key]) for key in ("keep_checkpoints", "keep_adapters")}
        most = {"steps": max(changes["steps"], others["steps"])}
        with self.nothing_lost(least | most), before_operation(moment, self.root, other) as listener:
            result = self.train(changes, listener)
        self.assert_clean(result.run)
        self.check()

    @precondition(lambda self: self.folders())
    @rule(changes=SETTINGS, moment=MOMENTS)
    def delete_meanwhile(self, changes: dict[str, Any], moment: int) -> None:
        name = self.folders()[-1].name

        def delete(operation: str) -> None:
            with contextlib.suppress(BusyError):
                self.index.delete(name)

        with before_operation(moment, self.root, delete) as listener:
            self.train(changes, listener)
        self.look_for_exported()
        self.check()

    @precondition(lambda self: self.folders())
    @rule(changes=SETTINGS)
    def come_second(self, changes: dict[str, Any]) -> None:
        before = tree(self.root / "runs")
        locks = [FolderLock(run) for run in self.folders()]
        assert all(lock.acquire() for lock in locks)
        for act in (
            lambda: self.train(changes | {"resume": "auto"}),
            lambda: self.index.delete(self.folders()[0].name),
        ):
            with pytest.raises(BusyError) as caught:
                act()
            assert caught.value.remedy
        for lock in locks:
            lock.release()
        assert without_leftovers(tree(self.root / "runs")) == without_leftovers(before)

    @precondition(lambda self: self.folders())
    @rule(number=NUMBERS, moment=st.none() | st.integers(0, 20), torn=st.booleans())
    def delete(self, number: int, moment: int | None, torn: bool) -> None:
        run = self.folders()[number % len(self.folders())]
        before = tree(run)
        if moment is None:
            self.index.delete(run.name)
            assert not run.exists()
        else:
            self.killed(moment, lambda listener: self.index.delete(run.name), torn=torn)
        if run.exists():
            same = {"metrics.jsonl": ""} if torn else {}  # of which the end may be gone with the power
            assert without_leftovers(tree(run)) | same == without_leftovers(before) | same
        self.check()

    @precondition(lambda self: self.state_folders())
    @rule(number=NUMBERS)
    def lose_a_state(self, number: int) -> None:
        """By hand."""
        shutil.rmtree(self.state_folders()[number % len(self.state_folders())])
        self.check()

    @precondition(lambda self: self.exported)
    @rule(number=NUMBERS)
    def lose_an_adapter(self, number: int) -> None:
        """By hand."""
        name = sorted(self.exported)[number % len(self.exported)]
        (self.root / "loras" / name).unlink()
        del self.exported[name]
        self.check()

    @precondition(lambda self: any(steps_in(run) for run in self.folders()[-1:]))
    @rule(changes=SETTINGS, file=st.sampled_from(STATE_FILES), is_gone=st.booleans())
    def damage(self, changes: dict[str, Any], file: str, is_gone: bool) -> None:
        """Of the newest state; if it is needed, that is said, nothing is changed, and what is said helps."""
        changes = changes | {"resume": "auto", "steps": LONG}
        run = self.folders()[-1]
        folder = run / f"step-{max(steps_in(run)):08d}"
        if is_gone:
            (folder / file).unlink()
        else:
            os.truncate(folder / file, (folder / file).stat().st_size // 2)
        before = without_leftovers(tree(run))
        error = raised(StorageError, lambda: self.train(changes))
        if error is not None:
            assert str(folder) in error.problem
            assert "Delete that folder; the run will resume from the previous checkpoint." in error.remedy
            assert without_leftovers(tree(run)) | {"metrics.jsonl": ""} == before | {"metrics.jsonl": ""}
        self.look_for_exported()
        shutil.rmtree(folder)
        self.train_to_the_end(changes)

    @precondition(lambda self: self.folders())
    @rule(number=NUMBERS)
    def rename(self, number: int) -> None:
        run = self.folders()[number % len(self.folders())]
        self.number_of_names += 1
        run.rename(run.with_name(f"my best {self.number_of_names}"))
        self.check()

    @precondition(lambda self: self.folders())
    @rule(number=NUMBERS)
    def copy(self, number: int) -> None:
        run = self.folders()[number % len(self.folders())]
        self.number_of_names += 1
        shutil.copytree(run, run.with_name(f"backup {self.number_of_names}"))
        self.check()

    @rule()
    def go_to_another_machine(self) -> None:
        """Where nothing has the same path: neither the runs, nor the base, nor the pictures."""
        former, self.root = self.root, self.new_root()
        shutil.copytree(former, self.root)
        shutil.rmtree(former)
        self.home = 1 - self.home
        files._host.cache_clear()
        self.check()


def straight_run(home: Home, folder: Path) -> Straight:
    """A short run and a long one; the short one's states are the long one's."""
    listener = Recorder()
    short, long = (
        home.train(folder / str(steps), listener, steps=steps, checkpoint_every=1).run for steps in (SHORT, LONG)
    )
    states = {step: read_state(long / f"step-{step:08d}") for step in steps_in(long)}
    assert sorted(states) == list(range(1, LONG + 1))
    assert len({str(state["adapter.safetensors"]) for state in states.values()}) == LONG
    for step in steps_in(short):
        assert is_equal(read_state(short / f"step-{step:08d}"), states[step])
    return Straight(
        states=states,
        losses={event.step: (event.loss, event.learning_rate) for event in steps_of(listener)},
        scores={event.step: dict(event.scores) for event in listener.events if isinstance(event, Preview)},
        validated={event.step: event.loss for event in listener.events if isinstance(event, Validation)},
    )


@pytest.fixture(scope="module")
def elsewhere(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same base and pictures as `world`, in other places."""
    folder = tmp_path_factory.mktemp("elsewhere")
    return make_world(Path(shutil.copy(tiny_checkpoint, folder)), folder / "pictures")


def run_machine(homes: Sequence[Home], folder: Path, **settings: Any) -> None:
    straight = straight_run(homes[0], folder / "straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # for nothing here outlives the process
        run_state_machine_as_test(
            lambda: RunStates(folder / "machines", homes, straight),
            settings=hypothesis.settings(stateful_step_count=7, phases=GENERATE_ONLY, **settings),
        )


def test_no_state_is_lost_or_other_than_it_should_be(world: World, elsewhere: World, tmp_path: Path) -> None:
    run_machine([SmallWorld(world), SmallWorld(elsewhere)], tmp_path)


@pytest.mark.slow
def test_no_state_of_a_real_run_is_lost_or_other(world: World, elsewhere: World, tmp_path: Path) -> None:
    """With a network, a cache of encoded pictures and previews."""
    changes: dict[str, Any] = {**CHANGES, "preview_steps": 1, "preview_count": 1}
    homes = [ChangedWorld(world, changes), ChangedWorld(elsewhere, changes)]
    run_machine(homes, tmp_path, max_examples=3)  # each rule costs ten times what it costs in a small run
