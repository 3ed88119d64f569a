"""What the pack's pages ask a web UI, in the real gradio of Automatic1111 and of Forge: answers, logins, strangers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from hostile_requests import BODIES, FOREIGN, RUNS, TARGETS, assert_harmless, hostile_requests
from hypothesis import given
from hypothesis import strategies as st
from raw_http import Reply, ask
from sites import OWN, WebUISite, make_webui_site
from webui_host import USER, WebUI

ROUTES = {
    ("GET", "/dreambooth/job"),
    ("POST", "/dreambooth/job/stop"),
    ("GET", "/dreambooth/runs"),
    ("GET", "/dreambooth/runs/{run}"),
    ("GET", "/dreambooth/runs/{run}/curve"),
    ("GET", "/dreambooth/runs/{run}/files/{file:path}"),
    ("POST", "/dreambooth/runs/{run}/use"),
    ("POST", "/dreambooth/runs/{run}/resume"),
    ("DELETE", "/dreambooth/runs/{run}"),
}


@pytest.fixture(scope="module")
def site(webui: WebUI) -> Iterator[WebUISite]:
    """The web UI with a finished run."""
    made = make_webui_site(webui.folder, webui.url)
    yield made
    made.remove()
    webui.tidy()


# Login


def targets(webui: WebUI) -> list[tuple[str, str]]:
    """Every route of the pack, asked for a run that there is none of."""
    routes = {(method, path) for method, path in webui.facts()["routes"] if method != "HEAD"}
    assert routes == ROUTES
    return [
        (method, path.replace("{run}", "nothing").replace("{file:path}", "run.json")) for method, path in sorted(routes)
    ]


def test_without_a_login_nothing_is_told(webui: WebUI, site: WebUISite) -> None:
    """Routes that are added to gradio's application don't ask for it by themselves."""
    before = site.kept()
    for method, target in targets(webui):
        reply = ask(webui.locked_url, target, method, b'{"step": 3}', **OWN)
        assert reply.status == 401, (method, target)
        forged = ask(webui.locked_url, target, method, b"{}", **OWN, Cookie="access-token=x; access-token-unsecure=x")
        assert forged.status == 401, (method, target)
    for target in (f"/dreambooth/runs/{quote(site.run)}", site.file_url("run.json")):
        assert ask(webui.locked_url, target).status == 401
    assert site.kept() == before


def test_who_logged_in_may_do_all(webui: WebUI, site: WebUISite) -> None:
    body = f"username={USER[0]}&password={USER[1]}".encode()
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert ask(webui.locked_url, "/login", "POST", body + b"x", **form).status == 400
    login = ask(webui.locked_url, "/login", "POST", body, **form)
    assert login.status == 200
    cookie = "; ".join(value.partition(";")[0] for value in login.headers.get_all("set-cookie"))
    statuses = {
        (method, target): ask(webui.locked_url, target, method, b'{"step": 3}', **OWN, Cookie=cookie).status
        for method, target in targets(webui)
    }
    for (method, target), status in statuses.items():
        assert status == (404 if "nothing" in target else 200), (method, target)
    reply = ask(webui.locked_url, f"/dreambooth/runs/{quote(site.run)}", Cookie=cookie)
    assert (reply.status, reply.json["id"]) == (200, site.run)
    foreign = ask(webui.locked_url, "/dreambooth/job/stop", "POST", b"{}", Cookie=cookie)
    assert foreign.status == 403, "a cookie is sent along by foreign pages, too"


# Answers


def test_runs_are_those_of_the_folder(site: WebUISite) -> None:
    name = quote(site.run)
    summary, details = site.shelf.summary(site.run), site.shelf.details(site.run)
    preview = site.file_url(summary["preview"])
    as_json = json.loads(json.dumps(summary | {"preview": preview}))
    assert [run for run in site.get("/runs") if run["id"] == site.run] == [as_json]
    wanted = details | {
        "preview": preview,
        "previews": {
            step: [site.file_url(f"previews/step-{step:08d}/{file}") for file in files]
            for step, files in details["previews"].items()
        },
        "subject": [site.file_url("subject/00.jpg")],
        "workflow": site.file_url("workflow.json"),
        "folder": str(site.folder),
        "resumable": False,
        "adapters": [
            entry | {"url": site.file_url(entry["file"]), "name": f"my dog ü-{entry['step']:06d}.safetensors"}
            for entry in details["adapters"]
        ],
    }
    assert site.get(f"/runs/{name}") == json.loads(json.dumps(wanted))
    for after in (-1, 1, 99):
        points = site.get(f"/runs/{name}/curve?after={after}")
        assert points == json.loads(json.dumps(site.shelf.curve(site.run, after)))
    assert site.ask(f"/dreambooth/runs/{name}/curve?after=x").status == 400


def test_files_that_are_shown_are_sent_as_they_are(site: WebUISite) -> None:
    """And all others are not, though they are there."""
    sent = set()
    for path in site.folder.rglob("*"):
        relative = path.relative_to(site.folder).as_posix()
        reply = site.ask(site.file_url(quote(relative)))
        if reply.status == 200:
            assert reply is not None
            assert reply.content == path.read_bytes()
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            sent.add(relative)
        else:
            assert reply.status == 404
    details = site.shelf.details(site.run)
    pictures = {f"previews/step-{step:08d}/{name}" for step, names in details["previews"].items() for name in names}
    adapters = {entry["file"] for entry in details["adapters"]}
    assert sent == pictures | adapters | {"run.json", "workflow.json", "metrics.jsonl", "subject/00.jpg"}


def test_a_checkpoint_is_used_with_a_card_under_a_free_name(webui: WebUI, site: WebUISite) -> None:
    before = {*site.loras.iterdir()}
    for step, name in ((1, "my dog ü-000001"), (3, "my dog ü-000003"), (1, "my dog ü-000001-2")):
        reply = site.use(json.dumps({"step": step}).encode())
        assert (reply.status, reply.json) == (200, {"file": f"{name}.safetensors"})
        entry = site.shelf.details(site.run)["adapters"][step - 1]
        assert (site.loras / f"{name}.safetensors").read_bytes() == (site.folder / entry["file"]).read_bytes()
        card = json.loads((site.loras / f"{name}.json").read_text(encoding="utf-8"))
        assert (card["sd version"], card["preferred weight"]) == ("SD1", 1.0)
        assert (site.loras / f"{name}.preview.png").read_bytes()[:4] == b"\x89PNG"
        facts = webui.facts()
        assert name in facts["networks"], "the list was read anew"
        assert facts["lora_hash"] is None, "the next picture is drawn with it"
        assert not any(facts["in_weights"])
    for path in {*site.loras.iterdir()} - before:
        path.unlink()


def test_a_checkpoint_that_is_damaged_is_told(site: WebUISite) -> None:
    """Such as one that a full disk cut short."""
    entry = site.folder / site.shelf.details(site.run)["adapters"][0]["file"]
    content = entry.read_bytes()
    entry.write_bytes(content[:20])
    try:
        reply = site.use(b'{"step": 1}')
    finally:
        entry.write_bytes(content)
        for path in site.loras.iterdir():
            path.unlink()
    assert reply.status == 404
    assert "is not a complete LoRA file" in reply.json["problem"]


def test_deleting_removes_that_run_alone(site: WebUISite) -> None:
    before = site.kept()
    shutil.copytree(site.folder, site.shelf.root / "old ü")
    (site.shelf.root / "old ü" / "subject" / "01.jpg").symlink_to(site.base_dir / "secret" / "run.json")
    target = f"/dreambooth/runs/{quote('old ü')}"
    assert site.ask(target, "DELETE", b"{}", **OWN).status == 200
    assert site.kept() == before
    assert site.ask(target, "DELETE", b"{}", **OWN).status == 404


# The job


@pytest.fixture
def job(webui: WebUI, site: WebUISite) -> Iterator[Path]:
    """The folder of a job that trained the run and was stopped."""
    folder = webui.data / "jobs" / "my dog ü"
    folder.mkdir(parents=True)
    record = {"kind": "train", "name": "my dog ü", "made_at": 5.0, "queued_at": 6.0, "pid": 2**30, "born_at": 7.0}
    (folder / "job.json").write_text(json.dumps(record | {"words": "sks dog"}), encoding="utf-8")
    (folder / "job.toml").write_text("steps = -1\n")
    step = {"step": 3, "steps": 3, "rate": 2.0, "seconds_left": 0.0, "memory": 4096, "loss": 1, "learning_rate": 1}
    lines = [
        {"event": "run", "path": str(site.folder), "step": 0, "steps": 3},
        {"event": "phase", "name": "encoding pictures", "done": 1, "total": 3},
        {"event": "note", "text": "Fine.", "warning": False},
        {"event": "note", "text": "Give ⟦steps=4⟧.", "warning": True},
        {"event": "note", "text": "d\udcff.png is small.", "warning": True},
        {"event": "preview", "step": 3, "pictures": [], "scores": {}},
        {"event": "step"} | step,
        {"event": "end", "state": "stopped"},
    ]
    text = "".join(json.dumps({"at": 10.0 + number} | line) + "\n" for number, line in enumerate(lines))
    (folder / "events.jsonl").write_text(text, encoding="utf-8")
    yield folder
    shutil.rmtree(folder)


def rewrite(job: Path, **facts: Any) -> None:
    path = job / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | facts), encoding="utf-8")


def test_the_job_is_told_with_its_curve(site: WebUISite, job: Path) -> None:
    assert site.get("/job") == {
        "node": "webui",
        "at": 17.0,
        "state": "stopped",
        "name": "my dog ü",
        "kind": "train",
        "run": site.run,
        "step": 3,
        "steps": 3,
        "done": 1,
        "total": 3,
        "rate": 2.0,
        "seconds_left": 0.0,
        "memory": 4096,
        "measured": 1,
        "warnings": ["Give Steps = 4.", "d\udcff.png is small."],
        "card": "",
        "words": "sks dog",
        "weight": 1.0,
        "points": json.loads(json.dumps(site.shelf.curve(site.run, -1))),
    }
    assert site.get("/job?after=2")["points"]["steps"] == [3]
    assert "points" not in site.get("/job?after=3"), "nothing is read for a page that has seen all"
    assert site.get(f"/runs/{quote(site.run)}")["resumable"] is True


def test_a_process_that_died_is_told_with_the_way_out(site: WebUISite, job: Path) -> None:
    lines = (job / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (job / "events.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    (job / "log.txt").write_text("loading\nKilled\n")
    facts = site.get("/job")
    assert facts["state"] == "failed"
    assert "Killed" in facts["problem"]
    assert "Resume" in facts["remedy"]
    assert str(job / "log.txt") in facts["remedy"]


def test_a_run_in_training_says_so(site: WebUISite, job: Path) -> None:
    target = f"/runs/{quote(site.run)}"
    assert site.get(target)["state"] != "running"
    this = psutil.Process()
    rewrite(job, pid=os.getpid(), born_at=this.create_time())
    assert site.get(target)["state"] == "running"
    assert [run["state"] for run in site.get("/runs") if run["id"] == site.run] == ["running"]
    reply = site.ask(f"/dreambooth{target}/resume", "POST", b"{}", **OWN)
    assert reply.status == 409, "one job runs at a time"
    assert "still running" in reply.json["problem"]
    assert site.ask("/dreambooth/job/stop", "POST", b"{}", **OWN).status == 200
    assert (job / "stop").exists()
    (job / "stop").unlink()
    rewrite(job, born_at=this.create_time() + 100)
    assert site.get(target)["state"] != "running", "another process has the number now"


def test_a_run_of_nobody_can_not_be_resumed(site: WebUISite) -> None:
    reply = site.ask(f"/dreambooth/runs/{quote(site.run)}/resume", "POST", b"{}", **OWN)
    assert reply.status == 404
    assert reply.json["remedy"]


# Strangers


def named(site: WebUISite, target: str) -> str:
    return "/dreambooth" + target.replace("{run}", quote(site.run))


def reply_to(site: WebUISite, *request: Any, **headers: str) -> Reply | None:
    """The answer; None if the connection was cut off, since so long a line is no request."""
    try:
        return site.ask(*request, **headers)
    except ConnectionError:
        return None


def refused(site: WebUISite, reply: Reply | None) -> bool:
    """Whether a request is an error of who asks, or is sent on to the same path without a slash at its end."""
    if reply is None:
        return True
    sent_on = reply.status == 307 and reply.headers["Location"].startswith(f"{site.url}/dreambooth/")
    return sent_on or 400 <= reply.status < 500


def test_malformed_targets_are_errors_of_who_asks(site: WebUISite) -> None:
    """Never the server's own, and nothing of what lies outside is told."""
    wrong = []
    for target in TARGETS:
        reply = reply_to(site, named(site, target))
        if target.endswith("/run.json%0a"):  # a line's end at the end of a path is left out before the route sees it
            assert reply is not None
            assert reply.content == (site.folder / "run.json").read_bytes()
        elif not refused(site, reply) or (reply and len(reply.content) > 2000):
            wrong.append((target[:100], reply))
    assert not wrong, "\n".join(map(repr, wrong))


def test_malformed_names_change_nothing(site: WebUISite) -> None:
    before, wrong = site.kept(), []
    for name in [*RUNS, "nothing", "{run}/files/run.json", "{run}/curve"]:
        for method, rest in (("DELETE", ""), ("POST", "/use"), ("POST", "/resume")):
            reply = reply_to(site, named(site, f"/runs/{name}{rest}"), method, b'{"step": 3}', **OWN)
            if not refused(site, reply):
                wrong.append((method, name[:100], reply))
    assert not wrong, "\n".join(map(repr, wrong))
    assert site.kept() == before


def test_malformed_bodies_are_errors_of_who_asks(site: WebUISite) -> None:
    before = site.kept()
    for kind, (body, headers) in BODIES.items():
        if "charset" in kind:  # JSON is UTF-8, whatever is said of it
            continue
        reply = site.use(body, **headers)
        assert 400 <= reply.status < 500, (kind, reply.content)
        assert len(reply.content) < 2000, kind
    assert site.kept() == before


def test_other_pages_change_nothing(site: WebUISite) -> None:
    before, target = site.kept(), f"/dreambooth/runs/{quote(site.run)}"
    for kind, headers in FOREIGN.items():
        for method, path in (
            ("DELETE", target),
            ("POST", f"{target}/use"),
            ("POST", f"{target}/resume"),
            ("POST", "/dreambooth/job/stop"),
        ):
            assert site.ask(path, method, b'{"step": 3}', **headers).status == 403, (kind, path)
    assert site.kept() == before


def test_a_foreign_page_is_not_granted_the_header(site: WebUISite) -> None:
    asked = {"Origin": "https://example.com", "Access-Control-Request-Method": "DELETE"}
    asked |= {"Access-Control-Request-Headers": "x-dreambooth"}
    reply = site.ask(f"/dreambooth/runs/{quote(site.run)}", "OPTIONS", **asked)
    assert not reply.headers.get("Access-Control-Allow-Origin")


@given(data=st.data())
def test_strangers_do_no_harm(data: st.DataObject, site: WebUISite) -> None:
    assert_harmless(site, data.draw(hostile_requests(site)))


def test_the_file_of_a_card_that_can_not_be_written_is_told(webui: WebUI, site: WebUISite) -> None:
    kept = webui.loras.rename(webui.loras.with_name("Lora there"))
    webui.loras.write_text("a file")
    try:
        reply = site.use(b'{"step": 3}')
    finally:
        webui.loras.unlink()
        kept.rename(webui.loras)
    assert reply.status == 404
    assert "Lora" in reply.json["problem"]
