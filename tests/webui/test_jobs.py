"""Jobs: what is known of them, whoever began them, and however they ended."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import HANGS
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.__main__ import COMMANDS, Command
from pack.trainer.core.errors import BusyError, SettingsError, StorageError
from pack.trainer.core.toml import read_toml
from pack.webui.jobs import TRAIN, Job, Jobs, Progress
from pack.webui.toml_text import toml_text

STEP = {"event": "step", "step": 3, "steps": 9, "rate": 2.0, "seconds_left": 3.0, "memory": 7}


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jöbs")


def line(**facts: Any) -> bytes:
    return json.dumps({"at": 1.0} | facts).encode() + b"\n"


def engine(tmp_path: Path, script: str) -> Path:
    """A program in the engine's place: "$6" is the event file, "$8" the stop file."""
    if os.name == "nt":
        pytest.skip("a script of a shell")
    program = tmp_path / "engine"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


def ended(job: Job) -> Job:
    deadline = time.monotonic() + HANGS
    while job.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return job


# Progress


def test_progress_is_read_as_it_is_written(tmp_path: Path) -> None:
    """Whole lines only, each once."""
    path = tmp_path / "events.jsonl"
    progress = Progress()
    progress.read(path)
    assert progress.facts == {}
    path.write_bytes(line(event="run", path=str(tmp_path / "dög-1"), step=0, steps=9) + line(**STEP)[:20])
    progress.read(path)
    assert progress.facts == {"at": 1.0, "run": "dög-1", "step": 0, "steps": 9}
    with open(path, "ab") as file:
        file.write(line(**STEP)[20:] + line(event="preview") + line(event="validation"))
    progress.read(path)
    progress.read(path)
    assert progress.facts["state"] == "training"
    assert progress.facts.items() >= {name: STEP[name] for name in STEP if name != "event"}.items()
    assert progress.measured == 2, "each is counted once"


def test_progress_of_a_job_that_was_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(line(**STEP) + line(event="note", text="Short.", warning=True) + line(event="preview"))
    progress = Progress()
    progress.read(path)
    assert progress.notes == [("Short.", True)]
    path.unlink()
    progress.read(path)
    assert progress.facts["step"] == 3, "the last that is known"
    path.with_suffix(".new").write_bytes(line(event="phase", name="encoding pictures", done=1, total=3) * 9)
    path.with_suffix(".new").rename(path)
    progress.read(path)
    assert progress.facts == {"at": 1.0, "state": "encoding pictures", "done": 1, "total": 3}
    assert (progress.measured, progress.notes) == (0, [])
    path.write_bytes(line(event="end", state="done"))  # the same file, cut
    progress.read(path)
    assert progress.facts == {"at": 1.0, "state": "done"}


def test_progress_leaves_out_what_is_damaged(tmp_path: Path) -> None:
    """As a power cut leaves it."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(line(**STEP) + b"\0" * 40 + b"\n" + b'{"at": 1.0, "ev\n' + b"\xff\n" + line(event="preview"))
    progress = Progress()
    progress.read(path)
    assert (progress.facts["step"], progress.measured) == (3, 1)


def test_the_end_says_why(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(line(**STEP) + line(event="end", state="failed", problem="No.", remedy="Give ⟦steps=4⟧."))
    progress = Progress()
    progress.read(path)
    assert progress.facts["state"] == "failed"
    assert (progress.facts["problem"], progress.facts["remedy"]) == ("No.", "Give ⟦steps=4⟧.")


# Jobs


def test_a_job_is_made_in_a_folder_of_its_own(jobs: Jobs) -> None:
    first = jobs.make(TRAIN, "dög", {"steps": 3, "name": "dög"}, words="sks dog")
    second = jobs.make(TRAIN, "dög", {"steps": 4})
    assert [first.folder.name, second.folder.name] == ["dög", "dög-2"]
    assert read_toml(first.folder / "job.toml") == {"steps": 3, "name": "dög"}
    assert first.settings() == {"steps": 3, "name": "dög"}
    assert first.record.items() >= {"kind": "train", "name": "dög", "words": "sks dog"}.items()
    assert [job.folder for job in jobs.all()] == [second.folder, first.folder], "the newest first"
    assert first.progress().facts["state"] == "waiting"
    assert jobs.running() is None


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "a\\b", "a:b", "a*", "a?", 'a"', "<a", "a>", "a|", "a\n", "a."]
)
def test_a_name_that_is_no_file_name(name: str, jobs: Jobs) -> None:
    with pytest.raises(SettingsError, match=r"is not a valid file name|The name is empty"):
        jobs.make(TRAIN, name, {})
    assert not jobs.root.exists()


def test_a_folder_that_can_not_be_written(jobs: Jobs) -> None:
    jobs.root.write_text("a file")
    with pytest.raises(StorageError, match="jöbs"):
        jobs.make(TRAIN, "dog", {})
    assert jobs.all() == []


def test_a_process_with_the_number_of_another(jobs: Jobs) -> None:
    """Numbers are given again; a process is known by its birth, too."""
    job = jobs.make(TRAIN, "dog", {})
    this = psutil.Process()
    job.note(pid=this.pid, born_at=this.create_time() + 0.5)
    assert job.is_alive()
    assert jobs.running() is not None
    with pytest.raises(BusyError, match="'dog' is still running"):
        jobs.require_idle()
    job.note(born_at=this.create_time() - 60)
    assert not job.is_alive()
    jobs.require_idle()


@pytest.mark.parametrize(
    "facts", [{}, {"pid": None}, {"pid": "x", "born_at": 1}, {"pid": 2**40, "born_at": 1}, {"pid": -1}]
)
def test_no_process(facts: dict[str, Any], jobs: Jobs) -> None:
    job = jobs.make(TRAIN, "dog", {})
    job.note(**facts)
    assert not job.is_alive()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"\0" * 9])
def test_a_record_that_is_damaged(content: bytes, jobs: Jobs) -> None:
    """Is a job that never began, and hides no other."""
    damaged = jobs.make(TRAIN, "damaged", {})
    other = jobs.make(TRAIN, "other", {})
    (damaged.folder / "job.json").write_bytes(content)
    assert [job.folder for job in jobs.all()] == [other.folder, damaged.folder]
    assert damaged.record == {}
    assert (damaged.kind, damaged.name, damaged.is_alive()) == (TRAIN, "", False)
    assert damaged.progress().facts["state"] == "waiting"
    assert jobs.running() is None


def test_a_job_that_was_stopped_before_it_began(jobs: Jobs) -> None:
    job = jobs.make(TRAIN, "dog", {})
    assert not job.is_to_stop()
    job.stop()
    assert job.is_to_stop()
    assert job.progress().facts["state"] == "stopped"
    job.enqueue()
    assert not job.is_to_stop()
    assert job.progress().facts["state"] == "waiting"


def test_a_job_runs_in_a_process_that_is_known_elsewhere(jobs: Jobs, tmp_path: Path) -> None:
    """Whoever opens the folder sees it running, and can stop it."""
    end = json.dumps({"at": 2.0, "event": "end", "state": "stopped"})
    script = f"""echo "$@" > "{tmp_path}/words"
        until [ -e "$8" ]; do sleep 0.01; done
        echo '{end}' >> "$6"
        echo hello; echo trouble >&2"""
    job = jobs.make(TRAIN, "dög", {"steps": 3})
    jobs.start(job, engine(tmp_path, script))
    elsewhere = Job(job.folder)
    assert elsewhere.is_alive()
    assert job.progress().facts["state"] == "starting"
    assert elsewhere.progress().facts["state"] == "starting"
    with pytest.raises(BusyError):
        jobs.start(jobs.make(TRAIN, "second", {}), tmp_path / "engine")
    elsewhere.stop()
    ended(job)
    assert not elsewhere.is_alive()
    assert elsewhere.progress().facts["state"] == "stopped"
    assert job.output() == ["hello"]
    assert job.log() == "trouble\n"
    names = {name: str(job.folder / name) for name in ("job.toml", "events.jsonl", "stop")}
    words = f"-m trainer train {names['job.toml']} --events {names['events.jsonl']} --stop-file {names['stop']}"
    assert (tmp_path / "words").read_text(encoding="utf-8").strip() == words


def test_other_commands_get_their_settings_as_a_configuration(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.make("merge", "both", {"method": "ties"})
    jobs.start(job, engine(tmp_path, f'echo "$3 $4 $5" > "{tmp_path}/words"'))
    ended(job)
    assert (tmp_path / "words").read_text(encoding="utf-8").strip() == f"merge --config {job.folder / 'job.toml'}"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_gets_its_settings_where_it_takes_them(command: Command, jobs: Jobs) -> None:
    if command.name == "dreambench":  # which no job runs
        return
    words = jobs.make(command.name, "x", {})._settings_words(Path("job.toml"))
    assert words == (["--config", "job.toml"] if command.positional else ["job.toml"])


def test_a_process_that_died_without_a_word(jobs: Jobs, tmp_path: Path) -> None:
    """The last line of its log is the problem; after a new start it is forgotten."""
    job = jobs.make(TRAIN, "dog", {})
    jobs.start(
        job,
        engine(tmp_path, f"echo '{json.dumps({'at': 1.0} | STEP)}' > \"$6\"; echo one >&2; echo two >&2; kill -9 $$"),
    )
    for one in (ended(job), Job(job.folder)):
        facts = one.progress().facts
        assert facts["state"] == "failed"
        assert facts["problem"].endswith("The last line of its log: two")
        assert facts["step"] == 3, "how far it was"
        assert str(job.folder / "log.txt") in facts["remedy"]
    job.enqueue()
    assert job.progress().facts["state"] == "waiting"
    assert "problem" not in job.progress().facts
    jobs.start(job, engine(tmp_path, "kill -9 $$"))
    (job.folder / "log.txt").unlink()
    assert "(empty)" in ended(job).progress().facts["problem"]


def test_a_program_that_is_not_there(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.make(TRAIN, "dog", {})
    with pytest.raises(StorageError):
        jobs.start(job, tmp_path / "nowhere")
    assert not job.is_alive()
    jobs.start(job, engine(tmp_path, "exit 0"))
    ended(job)


def test_the_host_s_variables_do_not_reach_the_engine(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above all not its path of modules; and what is written is UTF-8."""
    monkeypatch.setenv("PYTHONPATH", "/host")
    monkeypatch.setenv("PYTHONHOME", "/host")
    monkeypatch.setenv("HF_HOME", "/kept")
    job = jobs.make(TRAIN, "dog", {})
    jobs.start(job, engine(tmp_path, 'echo "${PYTHONPATH-none} ${PYTHONHOME-none} $HF_HOME $PYTHONUTF8"'))
    ended(job)
    assert job.output() == ["none none /kept 1"]


def test_the_lock_of_another_window(jobs: Jobs) -> None:
    jobs.root.mkdir()
    with jobs.alone(), pytest.raises(BusyError, match="Another window is starting a job"):
        jobs.start(jobs.make(TRAIN, "dog", {}), Path(sys.executable))


# Settings as TOML

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
SCALARS = st.booleans() | NUMBERS | TEXTS
VALUES = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True),
    st.none() | SCALARS | st.lists(TEXTS, max_size=4),
    max_size=6,
)


@given(values=VALUES)
def test_settings_are_read_as_they_were_written(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_bytes(toml_text(values).encode())
    read = read_toml(path)
    wanted = {name: value for name, value in values.items() if value is not None}
    assert read == wanted
    assert {name: type(value) for name, value in read.items()} == {name: type(wanted[name]) for name in wanted}


@pytest.mark.parametrize(
    "text", ["\x7f", "\\", '"', "'''", "\n\r\t", "\0", "\u2028", "é€😀", "{token} # no comment", ""]
)
def test_texts_that_need_care(text: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(toml_text({"text": text, "texts": [text, text]}).encode())
    assert read_toml(path) == {"text": text, "texts": [text, text]}


# What pages go by


def test_each_state_is_later_than_the_one_before(jobs: Jobs) -> None:
    """Pages leave out facts that are not newer than those they know."""
    job = jobs.make(TRAIN, "dog", {})
    seen = [job.progress().facts]
    time.sleep(0.02)
    job.stop()
    seen.append(job.progress().facts)
    time.sleep(0.02)
    job.enqueue()
    seen.append(job.progress().facts)
    (job.folder / "events.jsonl").write_bytes(line(at=time.time() + 1, **STEP))
    job.note(pid=os.getpid(), born_at=psutil.Process().create_time())
    seen.append(job.progress().facts)
    job.note(pid=2**31 - 1)
    seen.append(job.progress().facts)
    assert [facts["state"] for facts in seen] == ["waiting", "stopped", "waiting", "training", "failed"]
    times = [facts["at"] for facts in seen]
    assert times == sorted({*times})
