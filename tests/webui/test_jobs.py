"""Jobs: what their folders say, while they run and afterwards, to whatever process asks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import HANGS
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.core.errors import BusyError, SettingsError
from pack.trainer.core.toml import read_toml
from pack.webui.jobs import Job, Jobs, Progress, engine_environment
from pack.webui.toml_text import toml_text


def line(event: str, at: float = 1.0, **facts: Any) -> str:
    return json.dumps({"at": at, "event": event, **facts}) + "\n"


RUN = line("run", path="/x/runs/dog-1", step=2, steps=9)
STEP = line("step", 3.0, step=3, steps=9, loss=0.5, learning_rate=1e-4, rate=2.0, seconds_left=3.0, memory=7)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jöbs")


@pytest.fixture
def sleeper() -> Any:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield process
    process.kill()
    process.wait()


# What its events say


def test_events_become_facts(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    progress = Progress()
    progress.read(path)
    assert progress.facts == {}
    said = [
        (line("phase", name="encoding", done=1, total=4), {"state": "encoding", "done": 1, "total": 4, "at": 1.0}),
        (RUN, {"run": "dog-1", "step": 2, "steps": 9}),
        (STEP, {"state": "training", "step": 3, "rate": 2.0, "seconds_left": 3.0, "memory": 7, "at": 3.0}),
        (line("end", 4.0, state="failed", problem="P", remedy="R"), {"state": "failed", "problem": "P", "remedy": "R"}),
    ]
    for text, facts in said:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
        progress.read(path)
        assert progress.facts.items() >= facts.items()


def test_previews_and_notes_are_counted_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(
        line("preview", step=1)
        + line("note", text="a", warning=True)
        + line("validation", step=1)
        + line("note", text="b", warning=False)
    )
    progress = Progress()
    progress.read(path)
    assert (progress.measured, progress.notes) == (2, [("a", True), ("b", False)])


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    progress = Progress()
    for size in range(1, len(STEP) + 1):
        path.write_text(STEP[:size])
        progress.read(path)
        assert ("step" in progress.facts) == (size == len(STEP))


def test_a_file_that_was_begun_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(RUN + STEP + line("preview", step=1))
    progress = Progress()
    progress.read(path)
    path.unlink()
    path.write_text(line("phase", name="encoding", done=0, total=4))
    progress.read(path)
    assert (progress.facts, progress.measured) == ({"at": 1.0, "state": "encoding", "done": 0, "total": 4}, 0)


# What its folder says


def test_a_job_waits_then_says_what_its_process_says(jobs: Jobs, sleeper: Any) -> None:
    job = jobs.make("train", "dog", {"steps": 3}, words="sks dog")
    assert read_toml(job.folder / "job.toml") == job.settings() == {"steps": 3}
    assert (job.kind, job.name, job.record["words"]) == ("train", "dog", "sks dog")
    assert job.progress().facts["state"] == "waiting"
    job.note(pid=sleeper.pid, born_at=psutil.Process(sleeper.pid).create_time())
    other = Job(job.folder)  # of another process of the host
    assert other.is_alive()
    assert other.progress().facts["state"] == "starting"
    (job.folder / "events.jsonl").write_text(RUN + STEP)
    assert other.progress().facts.items() >= {"state": "training", "run": "dog-1", "name": "dog", "step": 3}.items()
    assert other.run == "dog-1"


def test_a_process_of_the_same_number_is_not_the_job_s(jobs: Jobs, sleeper: Any) -> None:
    job = jobs.make("train", "dog", {})
    job.note(pid=sleeper.pid, born_at=psutil.Process(sleeper.pid).create_time() - 100)
    assert not job.is_alive()
    assert jobs.running() is None


def test_a_process_that_died_without_a_word_has_failed(jobs: Jobs) -> None:
    job = jobs.make("train", "dog", {})
    (job.folder / "events.jsonl").write_text(RUN + STEP)
    (job.folder / "log.txt").write_text("first\nKilled: out of memory\n")
    job.note(pid=999_999_999, born_at=1.0)
    facts = job.progress().facts
    assert facts["state"] == "failed"
    assert "Killed: out of memory" in facts["problem"]
    assert str(job.folder / "log.txt") in facts["remedy"]


def test_an_end_that_was_said_counts(jobs: Jobs) -> None:
    for state in ("done", "stopped", "failed"):
        job = jobs.make("train", "dog", {})
        (job.folder / "events.jsonl").write_text(RUN + line("end", state=state))
        job.note(pid=999_999_999, born_at=1.0)
        assert job.progress().facts["state"] == state


def test_a_job_can_be_stopped_before_it_began_and_run_again(jobs: Jobs) -> None:
    job = jobs.make("train", "dog", {})
    job.stop()
    assert job.progress().facts["state"] == "stopped"
    assert job.is_to_stop()
    job.enqueue()
    assert job.progress().facts["state"] == "waiting"
    assert not job.is_to_stop()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": "x"}', '{"pid": 1}', '{"pid": -1, "born_at": 2}'])
def test_a_damaged_record_is_no_process(content: str, jobs: Jobs) -> None:
    job = jobs.make("train", "dog", {})
    (job.folder / "job.json").write_text(content)
    assert not job.is_alive()
    assert job.progress().facts["state"] in ("waiting", "failed")


def test_one_runs_at_a_time(jobs: Jobs, sleeper: Any, tmp_path: Path) -> None:
    first = jobs.make("train", "dog", {})
    first.note(pid=sleeper.pid, born_at=psutil.Process(sleeper.pid).create_time())
    second = jobs.make("train", "dog", {})
    assert [job.folder.name for job in jobs.all()] == ["dog-2", "dog"]
    assert jobs.running().folder == first.folder  # type: ignore[union-attr]
    with pytest.raises(BusyError, match="'dog' is still at work"):
        jobs.start(second, Path(sys.executable))
    assert second.record["pid"] is None if "pid" in second.record else True


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", "a\\b", "a:b", "dog.", "a\nb"])
def test_a_name_that_is_no_file_name_is_refused(name: str, jobs: Jobs) -> None:
    with pytest.raises(SettingsError):
        jobs.make("train", name, {})


# Its process


def test_the_engine_reads_a_job_s_settings_and_says_what_is_wrong(jobs: Jobs) -> None:
    job = jobs.make("merge", "mixed", {"loras": ["gone ü.safetensors:1"], "output": "x.safetensors", "density": 7})
    jobs.start(job, Path(sys.executable))
    deadline = time.monotonic() + HANGS
    while job.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    facts = Job(job.folder).progress().facts
    assert facts["state"] == "failed"
    assert "density" in facts["problem"]
    assert "density" in job.log()
    assert job.output() == []


def test_the_engine_s_imports_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/another/extension")
    assert "PYTHONPATH" not in engine_environment()
    assert engine_environment()["PYTHONUTF8"] == "1"


# Its settings

NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.one_of(TEXTS, st.integers(-(2**63), 2**63 - 1), st.booleans(), st.floats(allow_nan=False), st.lists(TEXTS))


@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_settings_are_read_as_they_were_written(values: dict[str, Any]) -> None:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    assert tomllib.loads(toml_text(values | {"left_out_": None})) == values
