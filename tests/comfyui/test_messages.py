"""What a training sends to open pages, and what later pages are told of it, in a real ComfyUI."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
from comfy_graphs import graph, node
from comfy_host import ComfyServer, PromptFailed, PromptInterrupted
from comfy_page import Message, Page
from pack.trainer.training.runs.index import RunIndex
from PIL import Image
from raw_http import Reply
from sites import OWN, Asked, noisy

pytestmark = pytest.mark.comfy
TRAINED: dict[str, Any] = {"steps": 30, "preview_every": 10, "settings": ["more", 0]}


def training(**changes: Any) -> dict[str, dict[str, Any]]:
    """Thirty small steps with previews."""
    more = node("DreamBoothTrainingSettings", preview_steps=1, preview_count=1, checkpoint_every=10)
    return graph(**TRAINED | changes) | {"more": more}


@pytest.fixture(scope="module")
def asked(comfy: ComfyServer) -> Asked:
    return Asked(comfy.url, RunIndex(comfy.base_dir / "output" / "dreambooth" / "runs"))


@dataclass(frozen=True)
class Heard:
    """A training that a page listened to."""

    messages: list[Message]
    told: list[dict[str, Any]]
    run: str
    refused: Reply


@pytest.fixture(scope="module")
def heard(comfy: ComfyServer, asked: Asked) -> Heard:
    with Page(comfy, "page") as page:
        job = comfy.queue(training(name="heard"), client_id="page")
        run = page.wait_for("dreambooth", state="training").content["run"]
        refused = asked.ask(f"/dreambooth/runs/{run}", "DELETE", b"{}", **OWN)
        comfy.wait(job)
        page.wait_for("dreambooth", state="done")
        return Heard(page.of_node("train"), page.told("train"), run, refused)


def points_of(told: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {
        name: [value for message in told for value in message.get("points", {}).get(name, [])]
        for name in ("steps", "losses", "rates")
    }


def test_messages_give_every_step_once_and_are_the_curve(heard: Heard, asked: Asked) -> None:
    """So do those up to any message, and what the server is asked for after it."""
    curve = asked.get(f"/runs/{heard.run}/curve")
    assert curve["steps"] == [*range(1, 31)]
    for number in range(len(heard.told) + 1):
        steps = points_of(heard.told[:number])["steps"]
        rest = asked.get(f"/runs/{heard.run}/curve?after={max(steps, default=-1)}")
        assert steps + rest["steps"] == curve["steps"]
    for name, values in points_of(heard.told).items():
        assert values == pytest.approx(curve[name], rel=1e-5)
    assert sum("points" in told for told in heard.told) > 2


def test_messages_tell_states_in_their_order(heard: Heard, asked: Asked) -> None:
    states = [told["state"] for told in heard.told]
    changes = [state for state, before in zip(states, [None, *states]) if state != before]
    assert (changes[0], changes[-1]) == ("starting", "done")
    assert {*changes[changes.index("training") :]} == {"training", "preview", "done"}
    assert all(told["name"] == "heard" for told in heard.told)
    opened = next(told for told in heard.told if "run" in told)
    assert (opened["run"], opened["step"], opened["steps"], opened["state"]) == (heard.run, 0, 30, "starting")
    assert heard.told[-1]["step"] == 30


def test_messages_name_pictures_that_are_there(heard: Heard, asked: Asked) -> None:
    previews = [told["preview"] for told in heard.told if "preview" in told]
    assert [preview["step"] for preview in previews] == [0, 10, 20, 30]
    for preview in previews:
        [url] = preview["pictures"]
        assert f"/previews/step-{preview['step']:08d}/" in url
        reply = asked.ask(url)
        assert Image.open(io.BytesIO(reply.content)).size == (64, 64)
    details = asked.get(f"/runs/{heard.run}")
    names = [url.rpartition("/")[2] for url in details["subject"]]
    assert names == [f"0{number}.jpg" for number in range(5)]
    for name in names:
        assert Image.open(asked.shelf.root / heard.run / "subject" / name).format == "JPEG"


def test_a_run_in_training_is_not_deleted(heard: Heard, asked: Asked) -> None:
    assert 400 <= heard.refused.status < 500
    assert "is training" in heard.refused.json["problem"]
    assert asked.shelf.summary(heard.run)["state"] == "done"
    assert heard.run in {run["id"] for run in asked.get("/runs")}


def test_notes_are_shown_on_their_node(server: ComfyServer) -> None:
    """Pictures that can't be read, one warning each; the log has them all (not all are sent, see test_listeners.py)."""
    folder = server.base_dir / "input" / "bad"
    folder.mkdir()
    noisy((64, 64), 0).save(folder / "good.png")
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(b"no picture")
    subject = node("DreamBoothSubject", folder="bad", token="sks", class_noun="dog", caption="a {token} {class}")
    shown = node("PreviewAny", source=["subject", 1])
    with Page(server, "notes") as page:
        server.wait(server.queue({"subject": subject, "shown": shown}, client_id="notes"))
        page.wait_for("executing", node=None)
        messages = page.of_node("subject")
    assert sum(message.kind == "binary 3" for message in messages) > 2
    assert server.log().count(".png is skipped") >= 40
    shutil.rmtree(folder)


def test_a_stopped_run_is_told_to_its_last_step(server: ComfyServer, asked: Asked) -> None:
    """And no page need be open: later ones learn of it."""
    prompt = training(name="stopped", steps=100_000, preview_every=0)
    with Page(server, "page") as page:
        job = server.queue(prompt, client_id="page")
        run = page.wait_for("dreambooth", state="training").content["run"]
        assert asked.get(f"/runs/{run}")["state"] == "running"
        assert next(entry["state"] for entry in asked.get("/runs") if entry["id"] == run) == "running"
        server.interrupt()
        with pytest.raises(PromptInterrupted):
            server.wait(job)
        page.wait_for("dreambooth", state="stopped")
        steps = points_of(page.told("train"))["steps"]
    details = asked.get(f"/runs/{run}")
    assert details["state"] == "stopped"
    assert steps == [*range(1, details["step"] + 1)] == asked.get(f"/runs/{run}/curve")["steps"]
    prompt["train"]["inputs"]["steps"] = details["step"] + 2
    server.wait(server.queue(prompt))
    facts = asked.get("/nodes")["train"]
    assert (facts["state"], facts["step"], facts["run"]) == ("done", details["step"] + 2, run)
    assert asked.get(f"/runs/{run}")["state"] == "done"
    assert asked.ask(f"/dreambooth/runs/{run}", "DELETE", b"{}", **OWN).status == 200


@pytest.mark.parametrize(
    ("changes", "further"), [({"rank": 512}, {}), ({}, {"score_clip": "a" * 300})], ids=["rank", "model"]
)
def test_a_failed_run_says_so_on_its_node(
    changes: dict[str, Any], further: dict[str, Any], server: ComfyServer, asked: Asked
) -> None:
    """Also one that fails before it is begun."""
    prompt = training(name="failed", **changes)
    prompt["more"]["inputs"] |= further
    with pytest.raises(PromptFailed) as failure:
        server.wait(server.queue(prompt))
    facts = asked.get("/nodes")["train"]
    assert (facts["state"], facts["name"]) == ("failed", "failed")
    assert facts["problem"].split(": ")[-1] in failure.value.exception_message
