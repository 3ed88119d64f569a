"""What runs in the web UI: one job at a time, while the host waits; and its result comes home once, with its card."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_nodes import adapter_of
from helpers import HANGS
from pack.trainer.adapters.kohya import write_adapter
from pack.trainer.core.errors import BusyError, SettingsError, StorageError
from pack.webui import cards, environment, host, queue
from pack.webui.jobs import Job
from PIL import Image
from web_ui import WebUi


@pytest.fixture(autouse=True)
def alone(web_ui: WebUi) -> Iterator[None]:
    yield
    wait()


def wait() -> None:
    deadline = time.monotonic() + HANGS
    while queue._followed is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def failing() -> Job:
    """A job that the engine refuses at once."""
    return queue.jobs().make("merge", "mixed", {"loras": [], "density": 7, "output": "x.safetensors"})


def finished(web_ui: WebUi, **settings: Any) -> Job:
    """A training that is done, whose result nobody has brought home."""
    run = web_ui.data / "runs" / "dog-1"
    preview = run / "previews" / "step-00000004" / "subject-00-00.png"
    preview.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(preview)
    (run / "run.json").write_text(json.dumps({"fingerprint": "f", "name": "dog", "settings": settings}))
    adapter = adapter_of(1.0)
    adapter.metadata["modelspec.architecture"] = "stable-diffusion-v1/lora"
    adapter.metadata["modelspec.title"] = "dog"
    adapter.metadata["modelspec.trigger_phrase"] = "a photo of sks dog"
    write_adapter(web_ui.data / "dog.safetensors", adapter, torch.float32)
    job = queue.jobs().make("train", "dog", {})
    events = [{"event": "run", "path": str(run), "step": 0, "steps": 4}, {"event": "end", "state": "done"}]
    (job.folder / "events.jsonl").write_text("".join(json.dumps({"at": 1.0, **event}) + "\n" for event in events))
    (job.folder / "output.txt").write_text(f"{web_ui.data / 'dog.safetensors'}\n")
    job.note(pid=999_999_999, born_at=1.0)
    return job


def card_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))


# Running


def test_a_merge_leaves_the_host_s_model_alone(web_ui: WebUi) -> None:
    job = failing()
    queue.submit(job)
    assert queue.is_at_work(job)
    wait()
    assert job.progress().facts["state"] == "failed"
    assert web_ui.asked == []


def test_a_training_has_the_card_and_the_queue_of_the_host(web_ui: WebUi) -> None:
    """It waits until the host generates nothing; the host waits until it has ended."""
    job = queue.jobs().make("train", "dog", {"steps": -1})
    with web_ui.queue_lock:
        queue.submit(job)
        time.sleep(0.1)
        assert (job.progress().facts["state"], web_ui.asked) == ("waiting", [])
    wait()
    assert job.progress().facts["state"] == "failed"
    assert web_ui.asked == ["cache freed", "state begins: dreambooth", "state ends"]
    assert web_ui.queue_lock.acquire(blocking=False)


def test_a_loaded_model_leaves_and_automatic1111_gets_it_back(
    web_ui: WebUi,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models: Any = sys.modules["modules.sd_models"]
    models.model_data.sd_model = "model"
    monkeypatch.setattr(
        models, "send_model_to_device", lambda model: web_ui.asked.append(f"{model} back"), raising=False
    )
    with host.given_back(lambda: "one line", lambda: True):
        assert web_ui.asked == ["model unloaded", "cache freed", "state begins: dreambooth"]
    assert web_ui.asked[3:] == ["state ends", "model back"]


def test_a_job_that_was_stopped_while_it_waited_never_begins(web_ui: WebUi) -> None:
    job = queue.jobs().make("train", "dog", {"steps": -1})
    with web_ui.queue_lock:
        queue.submit(job)
        job.stop()
    wait()
    assert job.progress().facts["state"] == "stopped"
    assert job.log() == ""


def test_a_second_one_is_refused_while_one_waits(web_ui: WebUi) -> None:
    job = queue.jobs().make("train", "dog", {"steps": -1})
    with web_ui.queue_lock:
        queue.submit(job)
        with pytest.raises(BusyError, match="'dog' is still at work"):
            queue.submit(failing())
        with pytest.raises(BusyError):
            queue.require_ready()
    wait()
    queue.require_ready()


def test_without_packages_nothing_begins(web_ui: WebUi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.install, "missing_requirements", lambda _: ["peft is missing"])
    monkeypatch.setattr(environment.install, "is_ready", lambda _: False)
    with pytest.raises(SettingsError, match="peft is missing"):
        queue.submit(failing())
    monkeypatch.setattr(environment.install, "is_ready", lambda _: True)
    assert environment.python() == environment.install.environment_python()


# Bringing home


def test_what_ended_meanwhile_comes_home_once(web_ui: WebUi) -> None:
    words = {"instance_prompt": "a photo of {token} {class}", "token": "ohwx", "class_noun": "cat"}
    job = finished(web_ui, **words)
    for _ in range(2):
        queue.attach()
        assert sorted(path.name for path in web_ui.loras.iterdir()) == [
            "dog.json",
            "dog.preview.png",
            "dog.safetensors",
        ]
    assert job.record["card"] == "dog.safetensors"
    assert (web_ui.loras / "dog.safetensors").read_bytes() == (web_ui.data / "dog.safetensors").read_bytes()
    assert card_of(web_ui.loras / "dog.safetensors") == {
        "description": "dog",
        "sd version": "SD1",
        "activation text": "ohwx cat",
        "preferred weight": 0.9,
        "negative text": "",
        "notes": "",
    }
    assert Image.open(web_ui.loras / "dog.preview.png").getpixel((0, 0)) == (255, 0, 0)
    assert web_ui.asked == ["networks listed"]


def test_a_training_that_went_on_comes_home_again(web_ui: WebUi) -> None:
    job = finished(web_ui)
    queue.attach()
    events = (job.folder / "events.jsonl").read_bytes()
    job.enqueue()
    (job.folder / "events.jsonl").write_bytes(events)
    job.note(pid=999_999_999, born_at=1.0)
    queue.attach()
    assert job.record["card"] == "dog-2.safetensors"


def test_a_name_that_is_taken_gets_a_number(web_ui: WebUi) -> None:
    (web_ui.loras / "dog.safetensors").write_text("another")
    job = finished(web_ui)
    queue.attach()
    assert job.record["card"] == "dog-2.safetensors"
    assert (web_ui.loras / "dog.safetensors").read_text() == "another"
    assert card_of(web_ui.loras / "dog-2.safetensors")["activation text"] == "a photo of sks dog"


def test_a_result_that_is_gone_is_told_and_the_host_starts(web_ui: WebUi) -> None:
    job = finished(web_ui)
    (web_ui.data / "dog.safetensors").unlink()
    queue.attach()
    assert "its file is gone" in job.record["failed"][0]
    with pytest.raises(StorageError):
        cards.deliver(job)


@pytest.mark.parametrize(
    ("architecture", "version"),
    [
        ("stable-diffusion-v1/lora", "SD1"),
        ("stable-diffusion-v2-768-v/lora", "SD2"),
        ("stable-diffusion-xl-v1-base/lora", "SDXL"),
        ("flux-1-dev/lora", "Unknown"),
        ("", "Unknown"),
    ],
)
def test_a_card_says_the_version_as_the_browser_calls_it(architecture: str, version: str, tmp_path: Path) -> None:
    adapter = adapter_of(1.0)
    adapter.metadata["modelspec.architecture"] = architecture
    path = tmp_path / "x.safetensors"
    write_adapter(path, adapter, torch.float32)
    cards.write_card(path)
    assert card_of(path)["sd version"] == version
    assert not path.with_suffix(".preview.png").exists()


def test_a_job_that_waited_for_a_host_that_died_does_not_begin(web_ui: WebUi) -> None:
    """One that waits for this one does: Reload UI attaches, too."""
    lost, ours = (queue.jobs().make("train", name, {}) for name in ("lost", "ours"))
    for job in (lost, ours):
        job.enqueue()
    lost.note(host=-1)
    queue.attach()
    assert [job.progress().facts["state"] for job in (lost, ours)] == ["stopped", "waiting"]


def test_the_same_training_is_shown_with_what_is_known_of_it(web_ui: WebUi) -> None:
    assert queue.shown() is None
    first = finished(web_ui)
    shown = queue.shown()
    assert shown is not None
    assert shown.folder == first.folder
    assert queue.shown() is shown
    second = queue.jobs().make("train", "cat", {})
    queue.jobs().make("merge", "mixed", {})
    shown = queue.shown()
    assert shown is not None
    assert shown.folder == second.folder
