"""What the pack's pages ask ComfyUI's server: every answer, what is refused, and requests of strangers."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from bare_host import bare_host
from comfy_host import ComfyServer
from helpers import ROOT
from hostile_requests import BODIES, FOREIGN, IN_DOG, RUNS, TARGETS, assert_harmless, hostile_requests
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sites import OWN, Site, make_site, noisy


@pytest.fixture(scope="module", params=["bare", pytest.param("ComfyUI", marks=pytest.mark.comfy)])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """On a bare server every day, and in ComfyUI."""
    if request.param == "bare":
        empty_site = make_site(tmp_path_factory.mktemp("routes ü"))
        with bare_host(empty_site.base_dir) as url:
            yield replace(empty_site, url=url)
    else:
        comfy: ComfyServer = request.getfixturevalue("comfy")
        made = make_site(comfy.base_dir)
        yield replace(made, url=comfy.url)
        made.remove()


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_runs_are_the_shelf_s(prefix: str, site: Site) -> None:
    base, name = f"{prefix}/dreambooth/runs", quote(site.run)

    def same(target: str, wanted: Any) -> None:
        reply = site.ask(base + target)
        assert reply.status == 200
        mine = reply.json if target else [entry for entry in reply.json if entry["id"] == site.run]
        assert mine == json.loads(json.dumps(wanted))

    summary, details = site.shelf.summary(site.run), site.shelf.details(site.run)
    preview = site.file_url(summary["preview"])
    same("", [summary | {"preview": preview}])
    with_urls = {
        "preview": preview,
        "previews": {
            step: [site.file_url(f"previews/step-{step:08d}/{name}") for name in names]
            for step, names in details["previews"].items()
        },
        "subject": [site.file_url("subject/00.jpg")],
        "workflow": site.file_url("workflow.json"),
        "folder": f"output/dreambooth/runs/{site.run}",
        "adapters": [
            entry | {"url": site.file_url(entry["file"]), "name": f"my dog ü-{entry['step']:06d}.safetensors"}
            for entry in details["adapters"]
        ],
    }
    same(f"/{name}", details | with_urls)
    for after in ("", "?after=-1", "?after=1", "?after=99"):
        same(f"/{name}/curve{after}", site.shelf.curve(site.run, int(after[7:] or -1)))


@pytest.mark.parametrize("site", ["bare"], indirect=True)
def test_a_run_in_training_says_so_everywhere(site: Site) -> None:
    live = importlib.import_module("pack.nodes.live")
    target = f"/runs/{quote(site.run)}"
    before = [site.get(target)["state"], *(run["state"] for run in site.get("/runs") if run["id"] == site.run)]
    assert "running" not in before
    live.update("7", run=site.run, state="training")
    try:
        assert site.get(target)["state"] == "running"
        assert [run["state"] for run in site.get("/runs") if run["id"] == site.run] == ["running"]
        refused = site.ask(f"/dreambooth{target}", "DELETE", **OWN)
        assert refused.status == 404
        assert "is training" in refused.json["problem"]
        assert site.folder.is_dir()
    finally:
        live.forget("7")
    assert [site.get(target)["state"]] * 2 == before


def test_every_file_that_is_shown_is_sent_as_it_is(site: Site) -> None:
    """And all others are not, though they are there."""
    sent = set()
    for path in site.folder.rglob("*"):
        relative = path.relative_to(site.folder).as_posix()
        reply = site.ask(f"/dreambooth/runs/{quote(site.run)}/files/{quote(relative)}")
        if reply.status == 200:
            assert reply.content == path.read_bytes()
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            sent.add(relative)
        else:
            assert reply.status == 404
            assert reply.json["remedy"]
    details = site.shelf.details(site.run)
    pictures = {f"previews/step-{step:08d}/{name}" for step, names in details["previews"].items() for name in names}
    adapters = {entry["file"] for entry in details["adapters"]}
    assert sent == pictures | adapters | {"run.json", "workflow.json", "metrics.jsonl", "subject/00.jpg"}
    assert len(pictures) == 6


def names_in_types(interface: str) -> tuple[set[str], set[str]]:
    """The required and the optional names of an interface in the pages' types."""
    text = (ROOT / "web" / "types" / "answers.d.ts").read_text(encoding="utf-8")
    [(base, body)] = re.findall(rf"interface {interface} (?:extends (\w+) )?\{{\n(.*?)\n\}}", text, re.DOTALL)
    names = re.findall(r"^  (\w+)(\??):", body, re.MULTILINE)
    required, optional = names_in_types(base) if base else (set(), set())
    return required | {name for name, mark in names if not mark}, optional | {name for name, mark in names if mark}


def test_answers_have_the_names_that_the_pages_types_have(site: Site) -> None:
    details = site.get(f"/runs/{quote(site.run)}")
    folders = site.get("/folders")
    curve = site.get(f"/runs/{quote(site.run)}/curve")
    answers = {
        "RunSummary": next(run for run in site.get("/runs") if run["id"] == site.run),
        "RunDetails": details,
        "Points": curve,
        "ScorePoint": curve["scores"][0],
        "Folders": folders,
        "PictureFolder": folders["folders"][0],
        "PictureReport": site.get("/folders/pictures?folder=cat.zip"),
    }
    for interface, answer in answers.items():
        required, optional = names_in_types(interface)
        assert required <= set(answer) <= required | optional, interface


def urls_in(value: Any) -> Iterator[str]:
    """Every text in an answer that is a URL of the pack."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from urls_in(inner)
    elif isinstance(value, str) and value.startswith("/dreambooth/"):
        yield value


def test_every_url_in_an_answer_can_be_fetched(site: Site) -> None:
    """Pages take what they show from the answers alone."""
    details = site.get(f"/runs/{quote(site.run)}")
    urls = {*urls_in(details), *urls_in([entry for entry in site.get("/runs") if entry["id"] == site.run])}
    urls |= {*urls_in(site.get(f"/folders/pictures?folder={quote('dog ü')}"))}
    urls |= {*urls_in(site.get("/folders/pictures?folder=cat.zip"))}
    assert len(urls) == 6 + 3 + 1 + 1 + 5  # previews, adapters, subject, workflow, thumbnails
    for url in urls:
        for prefix in ("", "/api"):
            assert site.ask(prefix + url).status == 200, url


def remove_all_of(site: Site, file: str) -> None:
    """A file with what lies beside it."""
    for path in site.loras.glob(f"{Path(file).stem}.*"):
        path.unlink()


def test_a_checkpoint_is_copied_under_a_free_name(site: Site) -> None:
    before = {*site.loras.iterdir()}
    for step, file in ((1, "my dog ü-000001"), (3, "my dog ü-000003"), (1, "my dog ü-000001-2")):
        reply = site.use(json.dumps({"step": step}).encode())
        assert (reply.status, reply.json) == (200, {"file": f"{file}.safetensors"})
        entry = site.shelf.details(site.run)["adapters"][step - 1]
        assert (site.loras / f"{file}.safetensors").read_bytes() == (site.folder / entry["file"]).read_bytes()
        cards = {".json", ".metadata.json"} | ({".preview.png"} if step > 1 else set())
        assert {path.name for path in site.loras.glob(f"{file}.*")} == {
            f"{file}{end}" for end in {*cards, ".safetensors"}
        }, "no sample is older than step 2"
    made = {*site.loras.iterdir()} - before
    assert len(made) == 3 + 4 + 3
    for path in made:
        path.unlink()


def test_a_copy_stays_in_the_folder_whatever_a_record_says(site: Site) -> None:
    """Runs may come from others; Train LoRA would have refused that name."""
    shutil.copytree(site.folder, site.shelf.root / "foreign")
    record = site.shelf.root / "foreign" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"name": "../../secret/x"}))
    reply = site.ask("/dreambooth/runs/foreign/use", "POST", b'{"step": 3}', **OWN)
    assert (reply.status, reply.json) == (200, {"file": "foreign-000003.safetensors"})
    remove_all_of(site, "foreign-000003.safetensors")
    shutil.rmtree(site.shelf.root / "foreign")


def test_deleting_removes_that_run_alone(site: Site) -> None:
    before = site.kept()
    shutil.copytree(site.folder, site.shelf.root / "old ü")
    (site.shelf.root / "old ü" / "subject" / "01.jpg").symlink_to(site.base_dir / "secret" / "run.json")
    assert {"old ü", site.run} <= {run["id"] for run in site.get("/runs")}
    target = f"/dreambooth/runs/{quote('old ü')}"
    assert site.ask(target, "DELETE", b"{}", **OWN).status == 200
    assert site.kept() == before
    assert site.ask(target, "DELETE", b"{}", **OWN).status == 404
    runs = {run["id"] for run in site.get("/runs")}
    assert site.run in runs
    assert not {"old ü", "linked"} & runs


def test_folders_are_listed_with_counts(site: Site) -> None:
    answer = site.get("/folders")
    assert answer["no_folder"] == "(connected images)"
    counts = {entry["name"]: entry["count"] for entry in answer["folders"]}
    archives = {entry["name"] for entry in answer["folders"] if entry["archive"]}
    wanted = {"dog ü": 5, "dog ü/inside": 0, "empty": 0, "cat.zip": None, "evil.zip": None}
    assert counts.items() >= wanted.items()
    assert {"cat.zip", "evil.zip"} <= archives


def test_pictures_are_reported_as_a_run_would_find_them(site: Site) -> None:
    report = site.get(f"/folders/pictures?folder={quote('dog ü')}")
    sizes = {"0.png": (640, 320), "1.png": (100, 400), "2.png": (50, 40), "twice.png": (100, 400)}
    assert report["pictures"] == [
        {
            "name": name,
            "caption": "a sks dog" if name == "0.png" else "",
            "width": width,
            "height": height,
            "thumbnail": f"/dreambooth/folders/thumbnail?folder=dog+%C3%BC&picture={name}",
        }
        for name, (width, height) in sizes.items()
    ]
    assert report["problem"] is None
    assert len(report["warnings"]) == 2
    assert "damaged.jpg" in report["warnings"][0]["text"]
    assert "twice.png is the same picture as 1.png" in report["warnings"][1]["text"]
    assert [warning["picture"] for warning in report["warnings"]] == ["damaged.jpg", "twice.png"]
    assert [one["name"] for one in site.get("/folders/pictures?folder=cat.zip")["pictures"]] == ["2.png"]


def test_a_folder_without_pictures_says_why(site: Site) -> None:
    report = site.get("/folders/pictures?folder=empty")
    assert (report["pictures"], report["warnings"]) == ([], [])
    assert "contains no pictures" in report["problem"]


def test_no_name_in_a_zip_file_leads_out_of_it(site: Site) -> None:
    """Nothing is unpacked, so the picture may be shown; but not by the path that the zip file gives it."""
    [picture] = site.get("/folders/pictures?folder=evil.zip")["pictures"]
    assert picture["name"] == "models/loras/2.png"
    assert not (site.loras / "2.png").exists()


def test_a_report_changes_with_its_folder(site: Site) -> None:
    folder = site.base_dir / "input" / "new"
    folder.mkdir()
    noisy((40, 50), 1).save(folder / "a.png")
    [first] = site.get("/folders/pictures?folder=new")["pictures"]
    thumbnail = site.ask("/dreambooth/folders/thumbnail?folder=new&picture=a.png").content
    noisy((60, 50), 2).save(folder / "a.png")
    noisy((60, 50), 3).save(folder / "b.png")
    assert [one["width"] for one in site.get("/folders/pictures?folder=new")["pictures"]] == [60, 60]
    assert first["width"] == 40
    assert site.ask("/dreambooth/folders/thumbnail?folder=new&picture=a.png").content != thumbnail
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("folder", "name", "size"),
    [
        ("dog ü", "0.png", (192, 96)),
        ("dog ü", "1.png", (48, 192)),
        ("dog ü", "2.png", (50, 40)),
        ("cat.zip", "2.png", (50, 40)),
    ],
)
def test_thumbnails_are_small_jpegs(folder: str, name: str, size: tuple[int, int], site: Site) -> None:
    reply = site.ask(f"/dreambooth/folders/thumbnail?folder={quote(folder)}&picture={name}")
    image = Image.open(io.BytesIO(reply.content))
    assert (reply.status, reply.headers["Content-Type"]) == (200, "image/jpeg")
    assert (image.format, image.size) == ("JPEG", size)


def named(site: Site, target: str) -> str:
    return "/dreambooth" + target.replace("{run}", quote(site.run))


def test_malformed_targets_are_errors_of_who_asks(site: Site) -> None:
    """Never the server's own, and nothing of what lies outside is told."""
    wrong = []
    for target in TARGETS:
        for prefix in ("", "/api"):
            reply = site.ask(prefix + named(site, target))
            if not 400 <= reply.status < 500 or len(reply.content) > 2000:
                wrong.append((prefix, target[:100], reply.status, reply.content[:200]))
    assert wrong == []


def test_malformed_names_change_nothing(site: Site) -> None:
    before, wrong = site.kept(), []
    for name in [*RUNS, "nothing", "{run}/files/run.json", "{run}/curve"]:
        for method, rest in (("DELETE", ""), ("POST", "/use")):
            reply = site.ask(named(site, f"/runs/{name}{rest}"), method, b'{"step": 3}', **OWN)
            if not 400 <= reply.status < 500:
                wrong.append((method, name[:100], reply.status, reply.content[:200]))
    assert wrong == []
    assert site.kept() == before
    for method in ("PUT", "PATCH", "POST", "DELETE"):
        for target in ("/runs", "/nodes", "/folders", f"/folders/pictures{IN_DOG}"):
            assert site.ask(named(site, target), method, b"{}", **OWN).status == 405
    assert site.kept() == before


@pytest.mark.parametrize("kind", BODIES)
def test_malformed_bodies_are_errors_of_who_asks(kind: str, site: Site) -> None:
    before = site.kept()
    body, headers = BODIES[kind]
    reply = site.use(body, **headers)
    assert 400 <= reply.status < 500, reply.content
    assert len(reply.content) < 2000
    assert site.kept() == before


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_pages_change_nothing(kind: str, site: Site) -> None:
    before, target = site.kept(), f"/dreambooth/runs/{quote(site.run)}"
    for prefix in ("", "/api"):
        for method, rest in (("DELETE", ""), ("POST", "/use")):
            reply = site.ask(prefix + target + rest, method, b'{"step": 3}', **FOREIGN[kind])
            assert reply.status == 403
    assert site.kept() == before


def test_a_foreign_page_is_not_granted_the_header(site: Site) -> None:
    asked = {"Origin": "https://example.com", "Access-Control-Request-Method": "DELETE"}
    asked |= {"Access-Control-Request-Headers": "x-dreambooth"}
    reply = site.ask(f"/dreambooth/runs/{quote(site.run)}", "OPTIONS", **asked)
    assert "x-dreambooth" not in reply.headers.get("Access-Control-Allow-Headers", "").lower()
    assert not reply.headers.get("Access-Control-Allow-Origin")


def test_an_own_page_may_say_where_it_comes_from(site: Site) -> None:
    reply = site.use(b'{"step": 2}', Origin=site.url, **{"Sec-Fetch-Site": "same-origin"})
    assert reply.status == 200
    remove_all_of(site, reply.json["file"])


@pytest.mark.parametrize("site", [pytest.param("ComfyUI", marks=pytest.mark.comfy)], indirect=True)
@given(data=st.data())
def test_no_request_of_a_stranger_does_harm(site: Site, data: st.DataObject) -> None:
    for request in data.draw(st.lists(hostile_requests(site), min_size=1, max_size=20)):
        assert_harmless(site, request)


# What run.json and metrics.jsonl of a run from elsewhere may hold.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, "3", 0.5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def objects(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: VALUES for name in names})


RECORDS = objects("name", "fingerprint", "started_at") | st.builds(
    lambda record, settings: record | {"settings": settings},
    objects("name", "fingerprint", "started_at"),
    objects("steps", "base", "rank") | VALUES,
)
LINES = objects("step", "loss", "learning_rate", "scores", "validation_loss", "state", "problem", "remedy", "best")


@given(
    record=RECORDS.map(json.dumps) | VALUES.map(json.dumps) | st.text(max_size=20),
    lines=st.lists((LINES | VALUES).map(json.dumps) | st.text(max_size=20), max_size=4),
)
def test_a_damaged_run_hides_no_other(site: Site, record: str, lines: list[str]) -> None:
    folder = site.shelf.root / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_bytes(record.encode("utf-8", "surrogatepass"))
    (folder / "metrics.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    try:
        assert {"damaged", site.run} <= {run["id"] for run in site.get("/runs")}
        for target in ("", "/curve"):
            reply = site.ask(f"/dreambooth/runs/damaged{target}")
            assert reply.status == 200, reply.content
            assert isinstance(reply.json, dict)
        assert site.ask("/dreambooth/runs/damaged/use", "POST", b'{"step": 1}', **OWN).status == 404
    finally:
        shutil.rmtree(folder)
