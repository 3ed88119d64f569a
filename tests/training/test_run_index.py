"""The folder of all runs, as pages see it: how each ended, its curve and files, and no name that leads out."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Recorder
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.core.errors import CancelledError, DivergedError, SettingsError, StorageError, TrainerError, suggest
from pack.trainer.core.events import Preview, RunOpened, Step
from pack.trainer.dreambooth import TrainResult
from pack.trainer.training.runs.folder import RunFolder
from pack.trainer.training.runs.index import RunIndex
from pack.trainer.training.runs.metrics import RecordedListener, last_lines, read_metrics
from run_trees import SHOWN, file_size_limit, tree
from safetensors.torch import load_file, save_file
from worlds import World

pytestmark = pytest.mark.usefixtures("quick")

RECORDS = [b"", b'{"name": "do', b"[]", b"{}", b"null", b"\xff\x00"]


@dataclass(frozen=True)
class Runs:
    """A shelf, with a run for every way to end, and what was told of the finished one."""

    shelf: RunIndex
    done: str
    stopped: str
    diverged: str
    full: str
    listener: Recorder
    errors: dict[str, TrainerError]


def diverge(world: World, folder: Path, run: str, **changes: Any) -> DivergedError:
    """Go on with a run whose encoded pictures are NaN, as an encoder leaves them that overflows."""
    path = folder / "runs" / run / "cache.safetensors"
    tensors = load_file(path)
    tensors["instance.mean.0"] *= torch.nan
    save_file(tensors, path)
    with pytest.raises(DivergedError) as caught:
        world.train(folder, **changes)
    return caught.value


def fill_disk(world: World, folder: Path, run: str, **changes: Any) -> StorageError:
    """Go on with a run while the system refuses to write a whole adapter."""
    size = (folder / "runs" / run / "step-00000002" / "adapter.safetensors").stat().st_size
    with file_size_limit(size - 100), pytest.raises(StorageError) as caught:
        world.train(folder, **changes)
    return caught.value


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, listener = tmp_path_factory.mktemp("ends ü"), Recorder()
    found, errors = [world.train(folder, listener, **SHOWN).run.name], {}
    for seed, (end, go_on) in enumerate({"stopped": None, "diverged": diverge, "full": fill_disk}.items(), start=1):
        changes = {"seed": seed, "steps": 4, "name": end}
        with pytest.raises(CancelledError):
            world.train(folder, Recorder(stop_after=len(world.subject) + 2), **changes)
        [run] = (folder / "runs").glob(f"{end}-*")
        found.append(run.name)
        if go_on:
            errors[run.name] = go_on(world, folder, run.name, **changes)
    return Runs(RunIndex(folder / "runs"), *found, listener, errors)


@pytest.fixture
def copy(runs: Runs, tmp_path: Path) -> RunIndex:
    """The same runs, to be changed, with secrets beside their folder."""
    shutil.copytree(runs.shelf.root, tmp_path / "runs")
    shutil.copytree(runs.shelf.root / runs.done, tmp_path / "secret")
    for name in ("run.json", "metrics.jsonl", "00.jpg"):
        (tmp_path / name).write_text('{"step": 1, "name": "secret"}')
    return RunIndex(tmp_path / "runs")


def end_lines(shelf: RunIndex, name: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(shelf.run(name).metrics_path) if "state" in line]


def test_a_run_tells_how_it_ended(runs: Runs) -> None:
    """In its summary as on the disk, with the words of the error that its caller got."""
    wanted: dict[str, dict[str, Any]] = {runs.done: {"state": "done", "step": 3, "steps": 3}}
    wanted[runs.stopped] = {"state": "stopped", "step": 2, "steps": 4}
    for name, error in runs.errors.items():
        problem, remedy = error.unworded
        wanted[name] = {"state": "failed", "problem": problem, "remedy": remedy, "step": 2, "steps": 4}
    wanted[runs.full]["step"] = 4  # done, but not saved
    assert len(wanted) == 4
    for name, facts in wanted.items():
        summary = runs.shelf.summary(name)
        assert summary.items() >= (facts | {"id": name, "base": "tiny"}).items()
        assert ("problem" in summary) == (name in runs.errors)
        [line] = end_lines(runs.shelf, name)
        assert line == {key: value for key, value in facts.items() if key != "steps"}
        assert read_metrics(runs.shelf.run(name).metrics_path)[-1] == line
        assert summary["loss"] == pytest.approx(runs.shelf.curve(name)["losses"][-1], rel=1e-5)
        assert summary["started_at"] <= summary["changed_at"]


def test_a_summary_shows_the_newest_preview(runs: Runs) -> None:
    assert runs.shelf.summary(runs.done)["preview"] == "previews/step-00000003/subject-00-00.png"
    assert runs.shelf.summary(runs.stopped)["preview"] is None


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (None, {"state": "done"}),
        (CancelledError(2, 3), {"state": "stopped"}),
        (KeyboardInterrupt(), {"state": "stopped"}),
        (StorageError("No room.", "Make some."), {"state": "failed", "problem": "No room.", "remedy": "Make some."}),
        (
            SettingsError("It is low.", f"Raise {suggest('rank', 8)}."),
            {"state": "failed", "problem": "It is low.", "remedy": f"Raise {suggest('rank', 8)}."},
        ),
        (RuntimeError("ü"), {"state": "failed", "problem": "RuntimeError: ü", "remedy": ""}),
    ],
    ids=repr,
)
def test_the_last_line_is_the_end(error: BaseException | None, end: dict[str, Any], tmp_path: Path) -> None:
    """Whatever ends a run; and the next run of the folder begins without it."""
    path, step = tmp_path / "metrics.jsonl", Step(2, 3, 0.5, 1e-4, 2.0, 1.0, 9)
    try:
        with RecordedListener(Recorder(), path, 0) as recorded:
            recorded.report(step)
            if error:
                raise error
    except BaseException as caught:
        assert caught is error  # noqa: PT017
    first, *rest = read_metrics(path)
    assert rest == [{"step": 2, **end}]
    RecordedListener(Recorder(), path, 2).close()
    assert read_metrics(path) == [first]


def test_a_run_that_fails_before_its_first_step_says_so(runs: Runs, world: World, tmp_path: Path) -> None:
    run = runs.stopped
    shutil.copytree(runs.shelf.root / run, tmp_path / "runs" / run)
    error = diverge(world, tmp_path, run, seed=1, steps=4, name="stopped")
    problem, remedy = error.unworded
    assert end_lines(RunIndex(tmp_path / "runs"), run) == [
        {"step": 2, "state": "failed", "problem": problem, "remedy": remedy}
    ]


def test_a_run_that_goes_on_drops_its_old_end(runs: Runs, world: World, tmp_path: Path) -> None:
    """Already while it trains."""
    shelf = RunIndex(tmp_path / "runs")
    shutil.copytree(runs.shelf.root / runs.stopped, shelf.root / runs.stopped)
    seen: list[int] = []

    class Looks(Recorder):
        def report(self, event: Any) -> None:
            super().report(event)
            seen.append(len(end_lines(shelf, runs.stopped)))

    listener = Looks()
    world.train(tmp_path, listener, seed=1, steps=4, name="stopped")
    assert listener.events[0] == RunOpened(shelf.root / runs.stopped, 2, 4)
    assert seen == [1] + [0] * (len(seen) - 1)
    assert end_lines(shelf, runs.stopped) == [{"step": 4, "state": "done"}]
    assert shelf.curve(runs.stopped)["steps"] == [1, 2, 3, 4]
    assert shelf.summary(runs.stopped)["state"] == "done"


def test_a_run_without_an_end_is_stopped_or_done(copy: RunIndex, runs: Runs) -> None:
    """One that was killed, and one of the time before ends were written."""
    for name, state in ((runs.diverged, "stopped"), (runs.done, "done")):
        path = copy.run(name).metrics_path
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1])[:-20])
        summary = copy.summary(name)
        assert (summary["state"], summary["step"]) == (state, max(copy.run(name).steps()))
        assert "problem" not in summary


def test_more_steps_than_a_run_began_with_are_wanted_once_they_are_done(
    copy: RunIndex, runs: Runs, world: World
) -> None:
    with pytest.raises(CancelledError):
        world.train(copy.root.parent, Recorder(stop_after=2), **SHOWN | {"steps": 8, "preview_every": 0})
    summary = copy.summary(runs.done)
    assert (summary["state"], summary["step"]) == ("stopped", 5)
    assert summary["steps"] >= 5


def test_a_run_says_where_it_is_before_anything_else(runs: Runs, world: World) -> None:
    folder = runs.shelf.root / runs.done
    assert runs.listener.events[0] == RunOpened(folder, 0, 3)
    again = Recorder()
    result: TrainResult = world.train(runs.shelf.root.parent, again, **SHOWN)
    assert result.started_from == 3
    assert again.events[0] == RunOpened(folder, 3, 3)
    assert [type(event) for event in again.events].count(RunOpened) == 1


def test_a_curve_is_what_the_listener_was_told(runs: Runs) -> None:
    steps = [event for event in runs.listener.events if isinstance(event, Step)]
    curve = runs.shelf.curve(runs.done)
    assert curve["steps"] == [1, 2, 3]
    assert curve["losses"] == pytest.approx([event.loss for event in steps], rel=1e-5)
    assert curve["rates"] == pytest.approx([event.learning_rate for event in steps], rel=1e-5)
    assert curve["scores"] == []  # nothing judged


def test_a_curve_goes_on_after_any_step(copy: RunIndex, runs: Runs) -> None:
    """What was fetched and what is fetched after it are all of it, each step and score once."""
    path = copy.run(runs.done).metrics_path
    recorded = RecordedListener(Recorder(), path, 3)
    for step in range(4, 9):
        recorded.report(Step(step, 8, 1 / step, 1e-4, 2.0, 1.0, 9))
        recorded.report(Preview(step, [], {"CLIP-I": 0.1 * step}))
    recorded.close()
    whole = copy.curve(runs.done)
    assert whole["steps"] == [*range(1, 9)]
    assert [line["step"] for line in whole["scores"]] == [*range(4, 9)]
    for after in range(-1, 10):
        rest = copy.curve(runs.done, after)
        begun = {name: [*whole[name][: len(whole[name]) - len(rest[name])], *rest[name]] for name in whole}
        assert begun == whole
        assert rest["steps"] == [step for step in whole["steps"] if step > after]
        assert rest["scores"] == [line for line in whole["scores"] if line["step"] > after]


def test_of_a_long_curve_only_the_end_is_read(copy: RunIndex, runs: Runs) -> None:
    """A page asks every second for what came since. All of it is found, however much was measured meanwhile."""
    path = copy.run(runs.done).metrics_path
    recorded = RecordedListener(Recorder(), path, 3)
    for step in range(4, 1500):
        recorded.report(Step(step, 1500, 1 / step, 1e-4, 2.0, 1.0, 9))
        if step % 100 == 0:
            recorded.report(
                Preview(step, [], {"CLIP-I": 1 / step, "filler": 1 / 3} | {f"DINO-{n}": 0.5 for n in range(99)})
            )
    recorded.close()
    assert path.stat().st_size > 100_000
    whole = copy.curve(runs.done)
    content = path.read_bytes()
    path.write_bytes(json.dumps({"step": 9999, "scores": {"far away": 1.0}}).encode() + b"\n" + content)
    for after in (1498, 1400, 1399, 1100):
        rest = copy.curve(runs.done, after)
        assert rest["steps"] == [step for step in whole["steps"] if step > after]
        assert rest["scores"] == [line for line in whole["scores"] if line["step"] > after], "and not what lies before"
    assert copy.curve(runs.done, 2)["steps"] == whole["steps"][2:]


def test_what_is_no_number_is_nothing_to_a_browser(copy: RunIndex, runs: Runs) -> None:
    """JSON has no NaN: a page could read nothing at all."""
    recorded = RecordedListener(Recorder(), copy.run(runs.done).metrics_path, 3)
    recorded.report(Step(4, 5, float("nan"), float("inf"), 2.0, 1.0, 9))
    recorded.report(Preview(4, [], {"CLIP-I": float("nan"), "CLIP-T": 0.25}))
    recorded.close()
    curve = copy.curve(runs.done, 3)
    assert (curve["losses"], curve["rates"]) == ([None], [None])
    assert curve["scores"] == [{"step": 4, "scores": {"CLIP-I": None, "CLIP-T": 0.25}}]
    json.dumps([curve, copy.summary(runs.done), copy.details(runs.done)], allow_nan=False)


def test_details_are_all_that_a_page_shows(copy: RunIndex, runs: Runs) -> None:
    folder = copy.root / runs.done
    assert copy.details(runs.done)["workflow"] is False
    (folder / "workflow.json").write_text("{}")
    (folder / "subject").mkdir()
    (folder / "subject" / "00.jpg").write_bytes(b"a picture")
    details = copy.details(runs.done)
    assert copy.summary(runs.done).items() <= details.items()
    assert details["settings"] == json.loads((folder / "run.json").read_text())["settings"]
    files = ["adapters/step-00000001", "adapters/step-00000002", "step-00000003/adapter"]
    assert details["adapters"] == [
        {"step": step, "file": f"{file}.safetensors", "bytes": (folder / f"{file}.safetensors").stat().st_size}
        for step, file in enumerate(files, start=1)
    ]
    pictures = ["subject-00-00.png", "subject-00-01.png"]
    assert details["previews"] == {step: pictures for step in (0, 2, 3)}
    assert (details["subject"], details["workflow"]) == (["00.jpg"], True)
    assert details["bytes"] == sum(len(content) for content in tree(folder).values())


def test_the_newest_run_comes_first(copy: RunIndex, runs: Runs) -> None:
    order = [runs.full, runs.done, runs.diverged, runs.stopped]
    for age, name in enumerate(order):
        for path in (copy.root / name, *(copy.root / name).glob("*.json*")):
            os.utime(path, (1e9 - age, 1e9 - age))
    assert copy.names() == order
    (copy.root / runs.stopped / "metrics.jsonl").touch()
    assert copy.names() == [runs.stopped, *order[:-1]]
    (copy.root / "no run").mkdir()
    (copy.root / "link").symlink_to(copy.root.parent / "secret", target_is_directory=True)
    assert copy.names() == [runs.stopped, *order[:-1]]
    assert RunIndex(copy.root / "nothing").names() == []


@pytest.mark.parametrize("record", RECORDS)
def test_a_run_with_a_damaged_record_is_shown_and_can_be_removed(record: bytes, copy: RunIndex, runs: Runs) -> None:
    (copy.root / runs.stopped / "run.json").write_bytes(record)
    assert copy.summary(runs.stopped)["name"] == runs.stopped
    assert copy.details(runs.stopped)["settings"] == {}
    assert len(copy.names()) == 4
    copy.delete(runs.stopped)
    assert len(copy.names()) == 3


@pytest.mark.slow
def test_a_page_may_look_at_any_moment(copy: RunIndex, runs: Runs) -> None:
    """While checkpoints come and go beside it."""
    failures: list[Exception] = []
    ended, seen = threading.Event(), set()

    def look() -> None:
        while not ended.is_set():
            try:
                details = copy.details(runs.done)
                json.dumps([details, copy.curve(runs.done)], allow_nan=False)
                seen.add(details["step"])
            except Exception as error:
                failures.append(error)

    run = RunFolder(copy.run(runs.done).path)
    state, thread = run.load(3), threading.Thread(target=look)
    thread.start()
    try:
        for step in range(4, 45):
            run.save(replace(state, step=step), keep=1)
    finally:
        ended.set()
        thread.join()
    assert failures == []
    assert len(seen) > 2


def shown_files(shelf: RunIndex, name: str) -> set[str]:
    found = set()
    folder = shelf.root / name
    for path in folder.rglob("*"):
        relative = path.relative_to(folder).as_posix()
        try:
            assert shelf.file(name, relative) == path
        except SettingsError:
            continue
        found.add(relative)
    return found


def test_exactly_these_files_are_shown(copy: RunIndex, runs: Runs) -> None:
    folder = copy.root / runs.done
    for name in ("workflow.json", "subject/00.jpg", "subject/notes.txt", "subject/.00.jpg", "subject/000.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    for name in ("subject/٠١.jpg", "subject/０１.jpg", "previews/notes.png", "adapters/other.safetensors", "run.JSON"):
        (folder / name).write_bytes(b"x")
    (folder / "subject" / "01.jpg").mkdir()
    steps = [0, 2, 3]
    pictures = [f"previews/step-0000000{step}/subject-00-0{number}.png" for step in steps for number in (0, 1)]
    adapters = ["adapters/step-00000001", "adapters/step-00000002", "step-00000003/adapter"]
    wanted = {"run.json", "workflow.json", "metrics.jsonl", "subject/00.jpg"}
    assert shown_files(copy, runs.done) == wanted | {*pictures} | {f"{name}.safetensors" for name in adapters}
    assert (folder / "cache.safetensors").is_file()
    assert (folder / "step-00000003" / "optimizer.safetensors").is_file()


NAMES: dict[str, Callable[[Path, str], str]] = {
    "nothing": lambda root, run: "",
    "blank": lambda root, run: " ",
    "the folder itself": lambda root, run: ".",
    "above": lambda root, run: "..",
    "beside": lambda root, run: "../secret",
    "around": lambda root, run: f"../runs/{run}",
    "through a run": lambda root, run: f"{run}/../../secret",
    "itself, longer": lambda root, run: f"{run}/.",
    "trailing slash": lambda root, run: f"{run}/",
    "absolute": lambda root, run: str(root.parent / "secret"),
    "absolute, within": lambda root, run: str(root / run),
    "backslash": lambda root, run: "..\\secret",
    "UNC": lambda root, run: "\\\\server\\share",
    "drive": lambda root, run: "C:",
    "stream": lambda root, run: f"{run}::$DATA",
    "NUL byte": lambda root, run: f"{run}\0",
    "NUL byte before an ending": lambda root, run: f"{run}\0.jpg",
    "line end": lambda root, run: f"{run}\n",
    "percent": lambda root, run: "%2e%2e%2fsecret",
    "percent, twice": lambda root, run: "%252e%252e%252fsecret",
    "U+2215": lambda root, run: "..∕secret",
    "U+2044": lambda root, run: "..⁄secret",
    "U+FF0F": lambda root, run: "..／secret",
    "U+FF0E": lambda root, run: "．．/secret",
    "U+FF0E alone": lambda root, run: "．．",
    "U+2024": lambda root, run: "․․",
    "surrogate": lambda root, run: "\ud800",
    "bytes that are no UTF-8": lambda root, run: "\udcff",
    "home": lambda root, run: "~",
    "variable": lambda root, run: "$HOME",
    "pattern": lambda root, run: "*",
    "long": lambda root, run: "a" * 256,
    "long in bytes": lambda root, run: "ü" * 128,
    "very long": lambda root, run: "a" * 100_000,
    "deep": lambda root, run: "../" * 5000,
    "device": lambda root, run: "CON",
    "device with ending": lambda root, run: "nul.json",
    "device path": lambda root, run: "/dev/zero",
    "link": lambda root, run: "link",
}


def assert_refused(shelf: RunIndex, name: str) -> None:
    for action in (shelf.run, shelf.summary, shelf.details, shelf.curve, shelf.delete):
        with pytest.raises(SettingsError) as caught:
            action(name)
        assert len(str(caught.value)) < 300
    with pytest.raises(SettingsError):
        shelf.file(name, "run.json")


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_that_is_no_run_s_is_refused(kind: str, copy: RunIndex, runs: Runs) -> None:
    """And nothing is touched anywhere."""
    (copy.root / "link").symlink_to(copy.root.parent / "secret", target_is_directory=True)
    (copy.root / "run.json").write_text("{}")
    before = tree(copy.root.parent)
    assert_refused(copy, NAMES[kind](copy.root, runs.done))
    assert tree(copy.root.parent) == before


FILES: dict[str, Callable[[Path, str], str]] = {
    **NAMES,
    "another run": lambda root, run: f"../{run}/run.json",
    "two above": lambda root, run: "../../run.json",
    "beside": lambda root, run: "../../secret/run.json",
    "around": lambda root, run: "subject/../run.json",
    "absolute": lambda root, run: str(root.parent / "run.json"),
    "absolute, within": lambda root, run: str(root / run / "run.json"),
    "backslash": lambda root, run: "subject\\00.jpg",
    "doubled slash": lambda root, run: "subject//00.jpg",
    "dot": lambda root, run: "./run.json",
    "trailing slash": lambda root, run: "run.json/",
    "trailing dot": lambda root, run: "run.json.",
    "upper case": lambda root, run: "RUN.JSON",
    "NUL byte": lambda root, run: "run.json\0",
    "line end": lambda root, run: "run.json\n",
    "stream": lambda root, run: "run.json::$DATA",
    "percent": lambda root, run: "subject%2f00.jpg",
    "U+2215": lambda root, run: "subject∕00.jpg",
    "U+FF0E": lambda root, run: "．．/run.json",
    "folder": lambda root, run: "subject",
    "device": lambda root, run: "subject/CON.jpg",
    "device path": lambda root, run: "/dev/null",
    "state": lambda root, run: "step-00000003/state.json",
    "cache": lambda root, run: "cache.safetensors",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_name_that_is_no_shown_file_s_is_refused(kind: str, copy: RunIndex, runs: Runs) -> None:
    (copy.root / runs.done / "subject").mkdir()
    (copy.root / runs.done / "subject" / "00.jpg").write_bytes(b"x")
    with pytest.raises(SettingsError) as caught:
        copy.file(runs.done, FILES[kind](copy.root, runs.done))
    assert len(str(caught.value)) < 300


def lead_out(folder: Path, secret: Path) -> list[str]:
    """Put links into a run's folder that lead out of it; the files behind them."""
    (folder / "subject").mkdir()
    (folder / "subject" / "00.jpg").symlink_to(secret / "run.json")
    (folder / "subject" / "01.jpg").symlink_to("../../../00.jpg")
    (folder / "workflow.json").symlink_to(secret / "run.json")
    (folder / "previews" / "step-00000001").symlink_to(secret / "previews" / "step-00000002")
    (folder / "step-00000009").symlink_to(secret / "step-00000003", target_is_directory=True)
    shutil.rmtree(folder / "adapters")
    (folder / "adapters").symlink_to(secret / "adapters", target_is_directory=True)
    found = ["subject/00.jpg", "subject/01.jpg", "workflow.json", "previews/step-00000001/subject-00-00.png"]
    return [*found, "step-00000009/adapter.safetensors", "adapters/step-00000001.safetensors"]


def test_links_that_lead_out_are_refused(copy: RunIndex, runs: Runs) -> None:
    folder, secret = copy.root / runs.done, copy.root.parent / "secret"
    for relative in lead_out(folder, secret):
        assert (folder / relative).is_file()
        with pytest.raises(SettingsError):
            copy.file(runs.done, relative)
    assert copy.file(runs.done, "run.json") == folder / "run.json"


def test_runs_may_lie_behind_a_link(copy: RunIndex, runs: Runs) -> None:
    """The user's own, to a larger disk."""
    (copy.root.parent / "other").symlink_to(copy.root, target_is_directory=True)
    linked = RunIndex(copy.root.parent / "other")
    assert linked.names() == copy.names()
    assert linked.file(runs.done, "run.json").read_bytes() == copy.file(runs.done, "run.json").read_bytes()


def test_deleting_removes_that_run_and_nothing_else(copy: RunIndex, runs: Runs) -> None:
    """Also if links inside lead out: what is behind them stays."""
    place, name = copy.root.parent, runs.done
    lead_out(copy.root / name, place / "secret")
    (copy.root / name / "run.json").chmod(0o444)
    before = tree(place)
    copy.delete(name)
    assert tree(place) == {path: found for path, found in before.items() if not path.startswith(f"runs/{name}/")}
    assert sorted(path.name for path in copy.root.iterdir()) == sorted({*runs.shelf.names()} - {name})
    assert_refused(copy, name)


def test_the_last_lines_of_a_long_file_are_its_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_lines(path) == []
    path.touch()
    assert last_lines(path) == []
    recorded = RecordedListener(Recorder(), path, 0)
    for step in range(1, 1001):
        recorded.report(Step(step, 1000, 1 / step, 1e-4, 2.0, 1.0, 9))
        if step in (1, 500, 1000):
            found, whole = last_lines(path), read_metrics(path)
            assert found == whole[-len(found) :]
            assert (found == whole) == (step == 1)
    recorded.close()
    path.write_bytes(path.read_bytes() + b'{"step": 1001, "lo')
    assert last_lines(path)[-1]["step"] == 1000


NAME_PARTS = ["..", ".", "/", "\\", "\0", "%2e%2e", "%2f", "∕", "．．", "~", "link", "secret", "runs", "run.json"]
FILE_PARTS = ["..", "/", "\\", "\0", "%2e", "∕", "secret", "run.json", "workflow.json", "subject", "00.jpg", "01.jpg"]
FILE_PARTS += ["adapters", "step-00000001.safetensors", "step-00000009", "adapter.safetensors", "cache.safetensors"]


@pytest.fixture(scope="module")
def tempting(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> RunIndex:
    """Runs with links that lead out, and a run beside their folder."""
    place = tmp_path_factory.mktemp("tempting")
    shutil.copytree(runs.shelf.root, place / "runs")
    shutil.copytree(runs.shelf.root / runs.done, place / "secret")
    (place / "runs" / "link").symlink_to(place / "secret", target_is_directory=True)
    (place / "00.jpg").touch()
    lead_out(place / "runs" / runs.done, place / "secret")
    return RunIndex(place / "runs")


def joined(parts: list[str]) -> st.SearchStrategy[str]:
    few = st.lists(st.sampled_from(parts), min_size=1, max_size=3)
    return few.map("/".join) | few.map("".join) | st.text()


@given(data=st.data())
def test_no_name_ever_leads_out(tempting: RunIndex, runs: Runs, data: st.DataObject) -> None:
    name = data.draw(joined([*NAME_PARTS, runs.done, str(tempting.root), str(tempting.root.parent)]))
    try:
        found = tempting.run(name).path
    except SettingsError:
        return
    assert found.resolve().parent == tempting.root.resolve()
    assert found.name == name


@given(data=st.data())
def test_no_file_s_name_ever_leads_out(tempting: RunIndex, runs: Runs, data: st.DataObject) -> None:
    folder = tempting.root / runs.done
    relative = data.draw(joined([*FILE_PARTS, runs.done, str(folder), str(tempting.root.parent)]))
    try:
        path = tempting.file(runs.done, relative)
    except SettingsError:
        return
    assert path.is_file()
    assert folder.resolve() in path.resolve().parents
    assert path == folder / relative
