"""The job at work, with a stand-in for the engine: followed to its end, by whichever host is there."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from helpers import HANGS
from pack.trainer.core.errors import BusyError
from pack.webui.jobs import TRAIN, Job
from PIL import Image

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the engine's place is taken by a script of a shell")


def processes_of(program: Path) -> list[psutil.Process]:
    """The processes of a program that this one began."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if str(program) in process.cmdline():
                found.append(process)
    return found


def end_all(program: Path) -> None:
    """Kill the processes of a program; returns once they are gone."""
    for process in processes_of(program):
        with contextlib.suppress(psutil.Error):
            process.kill()
    until(lambda: not processes_of(program))


@pytest.fixture
def engine(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """In the engine's place: it trains until it is told to stop, or until this function is called.

    While there is a file "lingers", its process does not end after its last word. None outlives the test.
    """
    program, go, lingers = tmp_path / "engine", tmp_path / "go", tmp_path / "lingers"
    run = json.dumps({"at": 1.0, "event": "run", "path": str(made.parent / "runs" / "dög-1"), "step": 0, "steps": 9})
    ends = {state: json.dumps({"at": 2.0, "event": "end", "state": state}) for state in ("done", "stopped")}
    program.write_text(
        f"""#!/bin/sh
        while [ $# -gt 1 ]; do
            case "$1" in --events) events="$2";; --stop-file) stop="$2";; esac
            shift
        done
        echo '{run}' > "$events"
        until [ -e "$stop" ] || [ -e "{go}" ]; do sleep 0.01; kill -0 {os.getpid()} || exit; done
        if [ -e "$stop" ]; then
            echo '{ends["stopped"]}' >> "$events"
            while [ -e "{lingers}" ]; do sleep 0.01; done
            exit 130
        fi
        echo "{made}"
        echo '{ends["done"]}' >> "$events"
        """,
        encoding="utf-8",
    )
    program.chmod(0o755)
    monkeypatch.setattr("pack.webui.environment.python", lambda: program)
    yield go.touch
    end_all(program)


def inside(name: str) -> Any:
    """One of the host's modules."""
    return importlib.import_module(f"modules.{name}")


def until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + HANGS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def state(job: Job) -> str:
    return str(job.progress().facts["state"])


def is_idle(queue: ModuleType, job: Job) -> bool:
    return not queue.is_at_work(job) and not job.is_alive()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "models" / "Lora").iterdir())


def test_no_engine_outlives_its_test(engine: Callable[[], None], tmp_path: Path) -> None:
    program = tmp_path / "engine"
    left = subprocess.Popen([program, "--events", str(tmp_path / "events"), "--stop-file", str(tmp_path / "stop")])
    until(lambda: (tmp_path / "events").exists())
    assert [process.pid for process in processes_of(program)] == [left.pid]
    end_all(program)
    assert left.wait() != 0
    assert not processes_of(program)


CARD = ["dög.json", "dög.metadata.json", "dög.preview.png", "dög.safetensors"]


def test_the_host_waits_and_gets_the_result(
    queue: ModuleType, bare_webui: Path, made: Path, engine: Callable[[], None]
) -> None:
    networks = importlib.import_module("networks")
    call_queue = inside("call_queue")
    devices = inside("devices")
    sd_models = inside("sd_models")
    shared = inside("shared")

    job = queue.jobs().make(TRAIN, "dög", {})
    with call_queue.queue_lock:  # a picture is drawn
        queue.submit(job)
        time.sleep(0.05)
        assert (state(job), sd_models.calls, devices.calls, shared.state.jobs) == ("waiting", [], [], [])
        with pytest.raises(BusyError, match="'dög' is still running"):
            queue.submit(queue.jobs().make(TRAIN, "first", {}))
        with pytest.raises(BusyError):
            queue.require_ready()
    until(lambda: job.run)
    assert queue.shown() is job
    assert queue.is_at_work(job)
    assert not call_queue.queue_lock.acquire(blocking=False), "the host draws nothing meanwhile"
    assert (sd_models.calls, len(devices.calls), shared.state.job) == (["unload"], 1, "dreambooth")
    with pytest.raises(BusyError, match="'dög' is still running"):
        queue.submit(queue.jobs().make(TRAIN, "second", {}))
    with pytest.raises(BusyError):
        queue.require_ready()
    networks.load_lora_state_dict(str(made))
    kind = inside("processing").StableDiffusionProcessingTxt2Img
    encoded = [kind.cached_c, kind.cached_uc, kind.cached_hr_c, kind.cached_hr_uc]
    for kept in encoded:
        kept[:] = ["a photo of sks dog", torch.ones(1)]
    engine()
    until(lambda: is_idle(queue, job))
    assert state(job) == "done"
    assert names(bare_webui) == CARD
    assert (bare_webui / "models" / "Lora" / "dög.safetensors").read_bytes() == made.read_bytes()
    with Image.open(bare_webui / "models" / "Lora" / "dög.preview.png") as sample:
        assert sample.getpixel((0, 0)) == (1, 2, 3)
    assert job.record.items() >= {"card": "dög.safetensors", "run": "dög-1"}.items()
    assert "dög" in networks.available_networks
    assert networks.load_lora_state_dict.cache_info().currsize == 0, "its weights are read anew"
    assert encoded == [[None, None]] * 4, "its prompts are encoded anew, perhaps by another text encoder"
    assert sd_models.model_data.sd_model.current_lora_hash is None
    assert (sd_models.calls, shared.state.job) == (["unload", "load"], "")
    assert call_queue.queue_lock.acquire(blocking=False)


def test_a_loaded_model_finds_new_embeddings(queue: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forge looks for them only while it loads a model."""
    looked: list[str] = []
    database = SimpleNamespace(embedding_dirs={}, load_textual_inversion_embeddings=lambda: looked.append("again"))
    engine = SimpleNamespace(embeddings=database)
    monkeypatch.setattr(inside("sd_models").model_data.sd_model, "text_processing_engine", engine, raising=False)
    queue.host.forget_loras()
    assert looked == ["again"]


def test_layers_take_new_weights_of_a_known_name(queue: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Automatic1111 changes a layer's weights only where the names and strengths differ from those that are in it."""
    names = (("dög", 1.0, 1.0, None),)
    changed, plain = (SimpleNamespace(network_current_names=of) for of in (names, ()))
    other = SimpleNamespace()
    layers = [changed, plain, other]
    monkeypatch.setattr(inside("sd_models").model_data.sd_model, "modules", lambda: iter(layers), raising=False)
    queue.host.forget_loras()
    assert changed.network_current_names not in ((), names), "neither as if it held its own weights, nor the new ones"
    assert plain.network_current_names == (), "such a layer has no weights of its own to take back"
    assert not vars(other)


@pytest.mark.parametrize("model", [None, "a model"])
@pytest.mark.parametrize("gives_back", [True, False], ids=["Automatic1111", "Forge"])
def test_the_host_s_model_leaves_the_card_and_comes_back(
    model: str | None, gives_back: bool, queue: ModuleType, engine: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one is loaded; Forge loads it again by itself."""
    done: list[str] = []
    sd_models, shared = inside("sd_models"), inside("shared")
    sd_models.model_data.sd_model = model
    monkeypatch.setattr(sd_models, "unload_model_weights", lambda: done.append("unload"))
    monkeypatch.setattr(inside("devices"), "torch_gc", lambda: done.append("free"))
    monkeypatch.setattr(shared.state, "begin", lambda job: done.append(job))
    monkeypatch.setattr(shared.state, "end", lambda: done.append("end"))
    if gives_back:
        monkeypatch.setattr(sd_models, "send_model_to_device", lambda model: done.append(f"{model} back"))
    else:
        monkeypatch.delattr(sd_models, "send_model_to_device")
    job = queue.jobs().make("compare", "dög", {})
    queue.submit(job)
    until(job.is_alive)
    engine()
    until(lambda: is_idle(queue, job))
    unloaded = ["unload"] if model else []
    assert done == [*unloaded, "free", "dreambooth", "end", *(["a model back"] if model and gives_back else [])]
    assert job.record.get("card") is None, "it makes no LoRA"


def test_a_merge_leaves_the_host_s_model_alone(
    queue: ModuleType, bare_webui: Path, made: Path, engine: Callable[[], None]
) -> None:
    """And writes its file itself: what is missing is the card."""
    job = queue.jobs().make("merge", "mixed", {})
    queue.submit(job)
    assert queue.is_at_work(job)
    until(job.is_alive)
    assert inside("call_queue").queue_lock.acquire(blocking=False), "the host draws meanwhile"
    engine()
    until(lambda: is_idle(queue, job))
    assert (inside("sd_models").calls, inside("devices").calls, inside("shared").state.jobs) == ([], [], [])
    assert (state(job), job.record["card"], names(bare_webui)) == ("done", made.name, [])
    assert made.with_suffix(".json").is_file()


def test_stopped_and_resumed(queue: ModuleType, bare_webui: Path, engine: Callable[[], None]) -> None:
    job = queue.jobs().make(TRAIN, "dög", {})
    queue.submit(job)
    until(lambda: job.run)
    job.stop()
    until(lambda: is_idle(queue, job))
    assert (state(job), names(bare_webui)) == ("stopped", [])
    queue.submit(job)
    assert state(job) in ("waiting", "starting")
    until(job.is_alive)
    engine()
    until(lambda: is_idle(queue, job))
    assert (state(job), names(bare_webui)) == ("done", CARD)


def test_resumed_while_its_process_ends(
    queue: ModuleType, bare_webui: Path, tmp_path: Path, engine: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads that it stopped may press Resume at once; a process that does not end is told."""
    lingers = tmp_path / "lingers"
    lingers.touch()
    job = queue.jobs().make(TRAIN, "dög", {})
    queue.submit(job)
    until(lambda: job.run and job.record.get("pid"))
    with pytest.raises(BusyError):  # at once
        queue.require_ready()
    job.stop()
    until(lambda: state(job) == "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(queue, "_LONGEST_ENDING", 0.02)
        with pytest.raises(BusyError, match="'dög' is still running"):
            queue.submit(job)
    threading.Timer(0.05, lingers.unlink).start()
    monkeypatch.setattr(queue, "_LONGEST_ENDING", HANGS)
    queue.submit(job)
    until(job.is_alive)
    engine()
    until(lambda: is_idle(queue, job))
    assert (state(job), names(bare_webui)) == ("done", CARD)


def test_stopped_while_it_waits(queue: ModuleType, bare_webui: Path, engine: Callable[[], None]) -> None:
    """It never begins, and the host keeps its model, which would take long to load again."""
    job = queue.jobs().make(TRAIN, "dög", {})
    with inside("call_queue").queue_lock:
        queue.submit(job)
        job.stop()
    until(lambda: is_idle(queue, job))
    assert (state(job), job.log()) == ("stopped", "")
    assert (inside("sd_models").calls, inside("devices").calls, inside("shared").state.jobs) == ([], [], [])


@pytest.mark.parametrize("output", ["", "nothing here\n", "/gone/both.safetensors\n"])
def test_a_merge_whose_file_is_gone(output: str, queue: ModuleType, bare_webui: Path) -> None:
    """Is told when the host starts, and holds up no other job."""
    jobs = [queue.jobs().make(kind, kind, {}) for kind in ("resize", "merge")]
    for job in jobs:
        (job.folder / "events.jsonl").write_text(json.dumps({"at": 1.0, "event": "end", "state": "done"}) + "\n")
        (job.folder / "output.txt").write_text(output)
        job.note(pid=2**30, born_at=1.0)
    queue.attach()
    assert [job.record["failed"] for job in jobs] == [
        [f"'{kind}' is done, but its file no longer exists.", f"Run it again: {kind} does not change any LoRA."]
        for kind in ("resize", "merge")
    ]


def restarted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as another process of the host has it."""
    monkeypatch.delitem(sys.modules, "pack.webui.queue")
    module = importlib.import_module("pack.webui.queue")
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 0.01)
    return module


def test_a_running_job_is_taken_up(
    queue: ModuleType, bare_webui: Path, engine: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    call_queue = inside("call_queue")

    environment = importlib.import_module("pack.webui.environment")
    begun = queue.jobs().make(TRAIN, "dög", {})
    begun.start(environment.python())  # by a host that is gone
    until(lambda: begun.run)
    queue.attach()
    until(lambda: not call_queue.queue_lock.acquire(blocking=False) or call_queue.queue_lock.release())
    taken = queue.shown()
    assert taken.folder == begun.folder
    queue.attach()  # Reload UI
    assert queue.shown() is taken, "one follows it"
    with pytest.raises(BusyError):
        queue.require_ready()
    engine()
    until(lambda: not begun.is_alive())
    until(lambda: is_idle(queue, taken))
    assert names(bare_webui) == CARD
    restarted(monkeypatch).attach()
    assert names(bare_webui) == CARD, "delivered once"


def test_after_reload_ui_two_follow_it_and_one_delivers(
    queue: ModuleType, bare_webui: Path, engine: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host loads the pack anew, and the thread that followed the job before goes on."""
    cards = importlib.import_module("pack.webui.cards")
    deliver = cards.deliver

    def slowly(job: Job) -> Path:
        time.sleep(0.1)
        return deliver(job)

    monkeypatch.setattr(cards, "deliver", slowly)
    job = queue.jobs().make(TRAIN, "dög", {})
    queue.submit(job)
    until(lambda: job.run and job.record.get("pid"))
    reloaded = restarted(monkeypatch)
    reloaded.attach()
    assert reloaded.shown().folder == job.folder
    with pytest.raises(BusyError):
        reloaded.require_ready()
    engine()
    until(lambda: is_idle(queue, job) and reloaded._followed is None)
    assert names(bare_webui) == CARD


def test_a_result_that_can_not_be_delivered(queue: ModuleType, bare_webui: Path, engine: Callable[[], None]) -> None:
    """Is told, holds up nobody else, and comes home once it can."""
    environment = importlib.import_module("pack.webui.environment")
    engine()
    jobs = [queue.jobs().make(TRAIN, name, {}) for name in ("first", "second")]
    for job in jobs:
        job.start(environment.python())
        until(lambda job=job: not job.is_alive())
    loras = bare_webui / "models" / "Lora"
    loras.rmdir()
    loras.write_text("a file")
    queue.attach()
    for job in jobs:
        problem, _ = job.record["failed"]
        assert "Lora" in problem
    queue.require_ready()
    loras.unlink()
    queue.submit(jobs[0])
    until(lambda: is_idle(queue, jobs[0]))
    assert names(bare_webui) == CARD
    assert jobs[0].record["failed"] is None


def test_a_job_whose_program_is_not_there(
    queue: ModuleType, bare_webui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_queue = inside("call_queue")
    shared = inside("shared")

    monkeypatch.setattr("pack.webui.environment.python", lambda: tmp_path / "nowhere")
    job = queue.jobs().make(TRAIN, "dög", {})
    queue.submit(job)
    until(lambda: not queue.is_at_work(job))
    assert "nowhere" in job.record["failed"][0] or "dög" in job.record["failed"][0]
    assert shared.state.job == ""
    assert call_queue.queue_lock.acquire(blocking=False)
    queue.require_ready()


def test_a_process_that_dies(queue: ModuleType, bare_webui: Path, engine: Callable[[], None]) -> None:
    job = queue.jobs().make(TRAIN, "dög", {})
    queue.submit(job)
    until(lambda: job.run and job.record.get("pid"))
    os.kill(job.record["pid"], 9)
    until(lambda: is_idle(queue, job))
    assert (state(job), names(bare_webui)) == ("failed", [])
