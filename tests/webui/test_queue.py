"""What ended comes home once, with its card; and what can't begin. None of this needs a process."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from pack.trainer.core.errors import SettingsError, StorageError
from pack.webui import cards, environment
from pack.webui.jobs import TRAIN, Job
from PIL import Image


@pytest.fixture
def ended(queue: ModuleType, made: Path) -> Job:
    """A training that is done, whose result nobody has brought home."""
    job: Job = queue.jobs().make(TRAIN, "dög", {})
    run = made.parent / "runs" / "dög-1"
    events = [{"event": "run", "path": str(run), "step": 0, "steps": 4}, {"event": "end", "state": "done"}]
    (job.folder / "events.jsonl").write_text("".join(json.dumps({"at": 1.0, **event}) + "\n" for event in events))
    (job.folder / "output.txt").write_text(f"{made}\n", encoding="utf-8")
    job.note(pid=999_999_999, born_at=1.0)
    return job


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "models" / "Lora").iterdir())


def test_what_ended_meanwhile_comes_home_once(queue: ModuleType, bare_webui: Path, made: Path, ended: Job) -> None:
    networks = importlib.import_module("networks")
    loras = bare_webui / "models" / "Lora"
    for _ in range(2):
        queue.attach()
        assert names(bare_webui) == ["dög.json", "dög.metadata.json", "dög.preview.png", "dög.safetensors"]
    assert ended.record["card"] == "dög.safetensors"
    assert (loras / "dög.safetensors").read_bytes() == made.read_bytes()
    with Image.open(loras / "dög.preview.png") as sample:
        assert sample.getpixel((0, 0)) == (1, 2, 3)
    card = json.loads((loras / "dög.json").read_text(encoding="utf-8"))
    assert card["activation text"] == "sks dog", "the words of its run, not those of its file"
    assert [*networks.available_networks] == ["dög"]


def test_a_training_that_went_on_comes_home_again(queue: ModuleType, ended: Job) -> None:
    queue.attach()
    events = (ended.folder / "events.jsonl").read_bytes()
    ended.enqueue()
    (ended.folder / "events.jsonl").write_bytes(events)
    ended.note(pid=999_999_999, born_at=1.0)
    queue.attach()
    assert ended.record["card"] == "dög-2.safetensors"


def test_a_result_that_is_gone_is_told_and_the_host_starts(queue: ModuleType, made: Path, ended: Job) -> None:
    made.unlink()
    queue.attach()
    assert "its file no longer exists" in ended.record["failed"][0]
    with pytest.raises(StorageError):
        cards.deliver(ended)


def test_a_job_that_waited_for_a_host_that_died_does_not_begin(queue: ModuleType) -> None:
    """One that waits for this one does: Reload UI attaches, too."""
    lost, ours = (queue.jobs().make(TRAIN, name, {}) for name in ("lost", "ours"))
    for job in (lost, ours):
        job.enqueue()
    lost.note(host=-1)
    queue.attach()
    assert [job.progress().facts["state"] for job in (lost, ours)] == ["stopped", "waiting"]


def test_the_same_training_is_shown_with_what_is_known_of_it(queue: ModuleType) -> None:
    assert queue.shown() is None
    first = queue.jobs().make(TRAIN, "dög", {})
    shown = queue.shown()
    assert shown.folder == first.folder
    assert queue.shown() is shown
    second = queue.jobs().make(TRAIN, "cat", {})
    queue.jobs().make("merge", "mixed", {})
    assert queue.shown().folder == second.folder


def test_without_packages_nothing_begins(queue: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.install, "missing_requirements", lambda _: ["peft is missing"])
    monkeypatch.setattr(environment.install, "is_ready", lambda _: False)
    job = queue.jobs().make("merge", "mixed", {})
    with pytest.raises(SettingsError, match="peft is missing"):
        queue.submit(job)
    assert not queue.is_at_work(job)
    monkeypatch.setattr(environment.install, "is_ready", lambda _: True)
    assert environment.python() == environment.install.environment_python()


@pytest.mark.slow
def test_what_the_engine_refuses_has_failed(queue: ModuleType) -> None:
    """In the real one, everywhere."""
    job = queue.jobs().make("merge", "mixed", {"loras": [], "density": 7, "output": "x.safetensors"})
    job.start(environment.python())
    assert job._process is not None
    assert job._process.wait() != 0
    facts = job.progress().facts
    assert facts["state"] == "failed"
    assert "density" in facts["problem"]
