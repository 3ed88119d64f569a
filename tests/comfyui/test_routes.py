"""What the pack's pages ask ComfyUI's server: every answer, what is refused, and the messages of a training."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import shutil
import socket
import struct
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from checkpoints import sd15_checkpoint
from comfy_graphs import CHECKPOINT, graph, node
from comfy_host import ComfyServer, PromptFailed, PromptInterrupted, find_comfyui
from helpers import DEMO, ROOT
from pack.trainer.training.runs.index import RunIndex
from PIL import Image
from run_trees import SHOWN, tree
from worlds import World, make_world

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.usefixtures("quick"),
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI: set COMFYUI_PATH, or install it in ~/comfy/ComfyUI"),
]
OWN = {"X-DreamBooth": "1", "Content-Type": "application/json"}  # what the pack's pages send
KEPT = ("input", "output", "models", "secret")  # where nothing may change unasked


@dataclass(frozen=True)
class Reply:
    status: int
    content: bytes
    headers: http.client.HTTPMessage

    @property
    def json(self) -> Any:
        def refuse(word: str) -> None:
            raise ValueError(f"{word} is no JSON")

        return json.loads(self.content, parse_constant=refuse)


@dataclass(frozen=True)
class Site:
    """A running ComfyUI with a finished run, and pictures."""

    server: ComfyServer
    shelf: RunIndex
    run: str

    @property
    def folder(self) -> Path:
        return self.shelf.root / self.run

    def ask(self, target: str, method: str = "GET", body: bytes = b"", **headers: str) -> Reply:
        """Send a request as it stands: nothing of the target is quoted or put in order."""
        place = urlsplit(self.server.url)
        lines = {"Host": place.netloc, "Connection": "close", "Content-Length": str(len(body))} | headers
        head = f"{method} {target} HTTP/1.1\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in lines.items() if value
        )
        with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
            connection.sendall(head.encode("latin-1") + b"\r\n" + body)
            response = http.client.HTTPResponse(connection, method=method)
            response.begin()
            return Reply(response.status, response.read(), response.headers)

    def get(self, target: str) -> Any:
        reply = self.ask(f"/dreambooth{target}")
        assert reply.status == 200, reply.content
        return reply.json

    def use(self, body: bytes, **headers: str) -> Reply:
        return self.ask(f"/dreambooth/runs/{quote(self.run)}/use", "POST", body, **OWN | headers)

    def file_url(self, relative: str) -> str:
        return f"/dreambooth/runs/{quote(self.run)}/files/{quote(relative)}"

    def kept(self) -> dict[str, dict[str, bytes | str]]:
        return {name: tree(self.server.base_dir / name) for name in KEPT}


def noisy(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def fill_input(folder: Path, secret: Path) -> None:
    dog = folder / "dog ü"
    dog.mkdir(parents=True)
    for number, size in enumerate(((640, 320), (100, 400), (50, 40))):
        noisy(size, number).save(dog / f"{number}.png")
    (dog / "0.txt").write_text("a sks dog", encoding="utf-8")
    shutil.copy(dog / "1.png", dog / "twice.png")
    (dog / "damaged.jpg").write_bytes(b"no picture")
    (dog / "inside").mkdir()
    (folder / "empty").mkdir()
    with zipfile.ZipFile(folder / "cat.zip", "w") as archive:
        archive.write(dog / "2.png", "2.png")
    with zipfile.ZipFile(folder / "evil.zip", "w") as archive:
        archive.write(dog / "2.png", "../../models/loras/2.png")
    (secret / "pictures").mkdir()
    shutil.copy(dog / "0.png", secret / "pictures")
    (folder / "linked").symlink_to(secret / "pictures", target_is_directory=True)


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_checkpoint, tmp_path_factory.mktemp("routes") / "subject")


@pytest.fixture(scope="module")
def site(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    base_dir = tmp_path_factory.mktemp("comfy routes ü")
    runs = base_dir / "output" / "dreambooth"
    run = world.train(runs, name="my dog ü", **SHOWN).run
    shutil.rmtree(runs / "loras")
    (run / "workflow.json").write_text('{"nodes": []}')
    (run / "subject").mkdir()
    noisy((64, 64), 0).save(run / "subject" / "00.jpg")
    shutil.copytree(run, base_dir / "secret")
    (run.parent / "linked").symlink_to(base_dir / "secret", target_is_directory=True)
    fill_input(base_dir / "input", base_dir / "secret")
    with ComfyServer(base_dir, pack=ROOT, pack_name="dreambooth-lora") as server:
        yield Site(server, RunIndex(runs / "runs"), run.name)


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_runs_are_the_shelf_s(prefix: str, site: Site) -> None:
    base, name = f"{prefix}/dreambooth/runs", quote(site.run)

    def same(target: str, wanted: Any) -> None:
        reply = site.ask(base + target)
        assert (reply.status, reply.json) == (200, json.loads(json.dumps(wanted)))

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
    urls = {*urls_in(details), *urls_in(site.get("/runs"))}
    urls |= {*urls_in(site.get(f"/folders/pictures?folder={quote('dog ü')}"))}
    urls |= {*urls_in(site.get("/folders/pictures?folder=cat.zip"))}
    assert len(urls) == 6 + 3 + 1 + 1 + 5  # previews, adapters, subject, workflow, thumbnails
    for url in urls:
        for prefix in ("", "/api"):
            assert site.ask(prefix + url).status == 200, url


def test_a_checkpoint_is_copied_under_a_free_name(site: Site) -> None:
    loras = site.server.base_dir / "models" / "loras"
    for step, file in ((1, "my dog ü-000001"), (3, "my dog ü-000003"), (1, "my dog ü-000001-2")):
        reply = site.use(json.dumps({"step": step}).encode())
        assert (reply.status, reply.json) == (200, {"file": f"{file}.safetensors"})
        entry = site.shelf.details(site.run)["adapters"][step - 1]
        assert (loras / f"{file}.safetensors").read_bytes() == (site.folder / entry["file"]).read_bytes()
    assert len(list(loras.iterdir())) == 3
    for path in loras.iterdir():
        path.unlink()


def test_a_copy_stays_in_the_folder_whatever_a_record_says(site: Site) -> None:
    """Runs may come from others; Train LoRA would have refused that name."""
    shutil.copytree(site.folder, site.shelf.root / "foreign")
    record = site.shelf.root / "foreign" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"name": "../../secret/x"}))
    reply = site.ask("/dreambooth/runs/foreign/use", "POST", b'{"step": 3}', **OWN)
    assert (reply.status, reply.json) == (200, {"file": "foreign-000003.safetensors"})
    (site.server.base_dir / "models" / "loras" / "foreign-000003.safetensors").unlink()
    shutil.rmtree(site.shelf.root / "foreign")


def test_deleting_removes_that_run_alone(site: Site) -> None:
    before = site.kept()
    shutil.copytree(site.folder, site.shelf.root / "old ü")
    (site.shelf.root / "old ü" / "subject" / "01.jpg").symlink_to(site.server.base_dir / "secret" / "run.json")
    assert len(site.get("/runs")) == 2
    target = f"/dreambooth/runs/{quote('old ü')}"
    assert site.ask(target, "DELETE", b"{}", **OWN).status == 200
    assert site.kept() == before
    assert site.ask(target, "DELETE", b"{}", **OWN).status == 404
    assert [run["id"] for run in site.get("/runs")] == [site.run]


def test_folders_are_listed_with_counts(site: Site) -> None:
    answer = site.get("/folders")
    assert answer["no_folder"] == "(connected images)"
    counts = {entry["name"]: entry["count"] for entry in answer["folders"]}
    archives = {entry["name"] for entry in answer["folders"] if entry["archive"]}
    wanted = {"dog ü": 5, "dog ü/inside": 0, "empty": 0, "cat.zip": None, "evil.zip": None}
    assert counts.items() >= wanted.items()
    assert counts.keys() - wanted.keys() <= {"linked", "3d"}  # the latter is ComfyUI's own
    assert archives == {"cat.zip", "evil.zip"}


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
    assert "holds no pictures" in report["problem"]


def test_no_name_in_a_zip_file_leads_out_of_it(site: Site) -> None:
    """Nothing is unpacked, so the picture may be shown; but not by the path that the zip file gives it."""
    [picture] = site.get("/folders/pictures?folder=evil.zip")["pictures"]
    assert picture["name"] == "models/loras/2.png"
    assert not (site.server.base_dir / "models" / "loras" / "2.png").exists()


def test_a_report_changes_with_its_folder(site: Site) -> None:
    folder = site.server.base_dir / "input" / "new"
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


# Targets below /dreambooth; {run} is the quoted name of a run that is there. Each is another way out.
RUNS = [
    "..", "%2e%2e", ".", "%2e", "%", "%zz", "..%2f..%2fsecret", "%2e%2e%2f%2e%2e%2fsecret", "..%5c..%5csecret",
    "..%252f..%252fsecret", "%2fetc", "%2f", "%5c", "%c0%ae%c0%ae%c0%af..%c0%afsecret", "%e0%80%ae%e0%80%ae",
    "..%u2215secret", "..%e2%88%95secret", "%ef%bc%8e%ef%bc%8e", "%ef%bc%8e%ef%bc%8e%ef%bc%8fsecret", "%00",
    "{run}%00", "{run}%0a", "{run}%20", "{run}.", "{run}%2f", "{run}%2f.", "{run}%2f..%2f{run}", "{run};x", "C:%5c",
    "{run}::$DATA", "CON", "nul.json", "%2fdev%2fzero", "linked", "*", "~", "%ed%a0%80", "%ff",
]  # fmt: skip
RUNS += ["", "a" * 300, "a" * 7000, "a" * 100_000, "%61" * 2000, "%c3%bc" * 1000]
FILES = [
    "..", "..%2frun.json", "%2e%2e/%2e%2e/%2e%2e/secret/run.json", "../../../../secret/run.json", "/etc/passwd",
    "%2fetc%2fpasswd", "../{run}/run.json", "./run.json", "run.json/", "run.json%00", "run.json%0a", "run.json%20",
    "RUN.JSON", "run.json::$DATA", "subject%5c00.jpg", "subject%252f00.jpg", "subject/%c0%ae%c0%ae/run.json",
    "subject", "subject/00.jpg/..", "subject//00.jpg", "cache.safetensors", "subject/%ef%bc%90%ef%bc%90.jpg",
    "step-00000003/state.json", "step-00000003%2foptimizer.safetensors", "%ff",
]  # fmt: skip
FILES += ["", "a" * 300, "a" * 7000, "a" * 100_000]
FOLDERS = [
    "?folder", "?folder=", "?folder=.", "?folder=..", "?folder=%2e%2e%2fsecret%2fpictures",
    "?folder=../secret/pictures", "?folder=dog%20%c3%bc/..", "?folder=dog%20%c3%bc%00", "?folder=%00", "?folder=/etc",
    "?folder=/", "?folder=/dev/zero", "?folder=linked", "?folder=linked/.", "?folder=nowhere", "?folder=..%5csecret",
    "?folder=%c0%ae%c0%ae%c0%afsecret", "?folder=%ed%a0%80", "?folder=%ff", "?folder=..%e2%88%95secret", "?folder=~",
    "?folder=C:%5c",
]  # fmt: skip
FOLDERS += ["", "?folder=" + "a" * 300, "?folder=" + "a/" * 3000, "?folder=" + "a" * 100_000]
IN_DOG = "?folder=dog%20%c3%bc"
TARGETS = [
    *(f"/runs/{name}{rest}" for name in RUNS for rest in ("", "/curve", "/files/run.json") if name or rest),
    *(f"/runs/{{run}}/files/{name}" for name in FILES),
    *(f"/runs/{{run}}/curve?after={value}" for value in ("", "x", "1.5", "1e3", "%00", "[]", "9" * 5000, "null")),
    *(f"/folders/pictures{query}" for query in FOLDERS),
    *(f"/folders/thumbnail{query}&picture=0.png" for query in FOLDERS if query),
    *(f"/folders/thumbnail{IN_DOG}{rest}" for rest in ("", "&picture", "&picture=", f"&picture={'a' * 5000}")),
    *(f"/folders/thumbnail{IN_DOG}&picture={name}" for name in ("../dog%20%c3%bc/0.png", "damaged.jpg", "0.txt")),
    *("/nothing", "/..", "/../dreambooth/nothing", "/runs/{run}/nothing", "/folders/../folders/pictures"),
]


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


BODIES: dict[str, tuple[bytes, dict[str, str]]] = {
    name: (body, {})
    for name, body in {
        "nothing": b"",
        "half": b'{"step": 3',
        "list": b"[3]",
        "null": b"null",
        "number": b"3",
        "text": b'"step"',
        "no step": b"{}",
        "step null": b'{"step": null}',
        "step list": b'{"step": [3]}',
        "step object": b'{"step": {}}',
        "step text": b'{"step": "3"}',
        "step fraction": b'{"step": 3.5}',
        "step true": b'{"step": true}',
        "step infinite": b'{"step": 1e999}',
        "step NaN": b'{"step": NaN}',
        "step negative": b'{"step": -3}',
        "step not there": b'{"step": 4}',
        "step huge": b'{"step": 1' + b"0" * 400 + b"}",
        "step longer than Python reads": b'{"step": 1' + b"0" * 5000 + b"}",
        "no UTF-8": b"\xff\xfe\x00",
        "deep": b"[" * 60_000,
        "form": b"step=3",
    }.items()
}
BODIES |= {
    "unknown charset": (b'{"step": 3}', {"Content-Type": "application/json; charset=nonsense"}),
    "charset that is no text": (b'{"step": 3}', {"Content-Type": "application/json; charset=base64"}),
    "long": (b'{"step": 3, "more": "' + b"x" * 100_000 + b'"}', {}),
    "said to be very long": (b"", {"Content-Length": str(10**12)}),
    "long, in chunks": (
        b'B\r\n{"step": 3}\r\n186A0\r\n' + b" " * 100_000 + b"\r\n0\r\n\r\n",
        {"Transfer-Encoding": "chunked", "Content-Length": ""},
    ),
    "no length": (b"", {"Content-Length": "x"}),
}


@pytest.mark.parametrize("kind", BODIES)
def test_malformed_bodies_are_errors_of_who_asks(kind: str, site: Site) -> None:
    before = site.kept()
    body, headers = BODIES[kind]
    reply = site.use(body, **headers)
    assert 400 <= reply.status < 500, reply.content
    assert len(reply.content) < 2000
    assert site.kept() == before


FOREIGN: dict[str, dict[str, str]] = {
    "no header": {"Content-Type": "application/json"},
    "another value": OWN | {"X-DreamBooth": "0"},
    "form": {"Content-Type": "application/x-www-form-urlencoded"},
    "file form": {"Content-Type": "multipart/form-data; boundary=x"},
    "plain text": {"Content-Type": "text/plain"},
    "foreign origin": OWN | {"Origin": "https://example.com"},
    "foreign origin, no header": {"Origin": "https://example.com"},
    "origin of a file": OWN | {"Origin": "null"},
    "origin on another port": OWN | {"Origin": "http://127.0.0.1:1"},
    "cross-site": OWN | {"Sec-Fetch-Site": "cross-site"},
}


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
    reply = site.use(b'{"step": 2}', Origin=site.server.url, **{"Sec-Fetch-Site": "same-origin"})
    assert reply.status == 200
    (site.server.base_dir / "models" / "loras" / reply.json["file"]).unlink()


@dataclass(frozen=True)
class Message:
    at: float  # when it came
    kind: str
    content: Any


class Page:
    """An open page of ComfyUI: keeps what the server sends it."""

    def __init__(self, server: ComfyServer, client_id: str) -> None:
        place = urlsplit(server.url)
        self.messages: list[Message] = []
        self._socket = socket.create_connection((place.hostname, place.port))
        key = base64.b64encode(os.urandom(16)).decode()
        head = f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: {place.netloc}\r\nUpgrade: websocket\r\n"
        head += f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        self._socket.sendall(head.encode())
        self._stream = self._socket.makefile("rb")
        assert b" 101 " in self._stream.readline()
        while self._stream.readline().strip():
            pass
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _listen(self) -> None:
        """Frames of a server are not masked; none of ComfyUI's is a part of a message."""
        while len(start := self._stream.read(2)) == 2:
            size = start[1]
            if size > 125:
                size = int.from_bytes(self._stream.read(2 if size == 126 else 8), "big")
            content, now = self._stream.read(size), time.monotonic()
            if start[0] == 0x81:
                message = json.loads(content)
                self.messages.append(Message(now, message["type"], message["data"]))
            elif start[0] == 0x82:
                self.messages.append(Message(now, f"binary {struct.unpack('>I', content[:4])[0]}", content[4:]))

    def wait_for(self, kind: str, **facts: Any) -> Message:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for message in list(self.messages):
                if message.kind == kind and message.content.items() >= facts.items():
                    return message
            time.sleep(0.02)
        raise TimeoutError(f"no {kind} with {facts}")

    def of_node(self, name: str) -> list[Message]:
        """What is sent because of that node."""
        mine = {"progress_state": lambda data: data["nodes"].get(name, {}).get("state") == "running"}
        mine |= {"dreambooth": lambda data: data["node"] == name}
        mine |= {"binary 3": lambda data: data[4:].startswith(name.encode())}
        return [one for one in self.messages if one.kind in mine and mine[one.kind](one.content)]

    def told(self, name: str) -> list[dict[str, Any]]:
        return [one.content for one in self.of_node(name) if one.kind == "dreambooth"]


TRAINED: dict[str, Any] = {"steps": 30, "preview_every": 10, "settings": ["more", 0]}


def training(**changes: Any) -> dict[str, dict[str, Any]]:
    """Thirty small steps with previews."""
    more = node("DreamBoothTrainingSettings", preview_steps=1, preview_count=1, checkpoint_every=10)
    return graph(**TRAINED | changes) | {"more": more}


@pytest.fixture(scope="module")
def checkpoint(site: Site) -> Iterator[Path]:
    base_dir = site.server.base_dir
    path = sd15_checkpoint(base_dir / "models" / "checkpoints" / CHECKPOINT)
    shutil.copytree(DEMO / "subject", base_dir / "input" / "dog")
    yield path
    path.unlink()


@dataclass(frozen=True)
class Heard:
    """A training that a page listened to."""

    messages: list[Message]
    told: list[dict[str, Any]]
    run: str
    refused: Reply


@pytest.fixture(scope="module")
def heard(site: Site, checkpoint: Path) -> Heard:
    with Page(site.server, "page") as page:
        job = site.server.queue(training(name="heard"), client_id="page")
        run = page.wait_for("dreambooth", state="training").content["run"]
        refused = site.ask(f"/dreambooth/runs/{run}", "DELETE", b"{}", **OWN)
        site.server.wait(job)
        page.wait_for("dreambooth", state="done")
        return Heard(page.of_node("train"), page.told("train"), run, refused)


def points_of(told: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {
        name: [value for message in told for value in message.get("points", {}).get(name, [])]
        for name in ("steps", "losses", "rates")
    }


def assert_at_most_ten_a_second(messages: list[Message]) -> None:
    times = [message.at for message in messages]
    busiest = max(sum(start <= time < start + 1 for time in times) for start in times)
    assert busiest <= 10, [(round(one.at - times[0], 2), one.kind) for one in messages]


def test_messages_give_every_step_once_and_are_the_curve(heard: Heard, site: Site) -> None:
    """So do those up to any message, and what the server is asked for after it."""
    curve = site.get(f"/runs/{heard.run}/curve")
    assert curve["steps"] == [*range(1, 31)]
    for number in range(len(heard.told) + 1):
        steps = points_of(heard.told[:number])["steps"]
        rest = site.get(f"/runs/{heard.run}/curve?after={max(steps, default=-1)}")
        assert steps + rest["steps"] == curve["steps"]
    for name, values in points_of(heard.told).items():
        assert values == pytest.approx(curve[name], rel=1e-5)
    assert sum("points" in told for told in heard.told) > 2


def test_messages_tell_states_in_their_order(heard: Heard, site: Site) -> None:
    states = [told["state"] for told in heard.told]
    changes = [state for state, before in zip(states, [None, *states]) if state != before]
    assert (changes[0], changes[-1]) == ("starting", "done")
    assert {*changes[changes.index("training") :]} == {"training", "preview", "done"}
    assert all(told["name"] == "heard" for told in heard.told)
    opened = next(told for told in heard.told if "run" in told)
    assert (opened["run"], opened["step"], opened["steps"], opened["state"]) == (heard.run, 0, 30, "starting")
    assert heard.told[-1]["step"] == 30


def test_messages_name_pictures_that_are_there(heard: Heard, site: Site) -> None:
    previews = [told["preview"] for told in heard.told if "preview" in told]
    assert [preview["step"] for preview in previews] == [0, 10, 20, 30]
    for preview in previews:
        [url] = preview["pictures"]
        assert f"/previews/step-{preview['step']:08d}/" in url
        reply = site.ask(url)
        assert Image.open(io.BytesIO(reply.content)).size == (64, 64)
    details = site.get(f"/runs/{heard.run}")
    names = [url.rpartition("/")[2] for url in details["subject"]]
    assert names == [f"0{number}.jpg" for number in range(5)]
    for name in names:
        assert Image.open(site.shelf.root / heard.run / "subject" / name).format == "JPEG"


def test_a_page_gets_at_most_ten_messages_a_second(heard: Heard) -> None:
    assert_at_most_ten_a_second(heard.messages)


def test_a_run_in_training_is_not_deleted(heard: Heard, site: Site) -> None:
    assert 400 <= heard.refused.status < 500
    assert "is training" in heard.refused.json["problem"]
    assert site.shelf.summary(heard.run)["state"] == "done"
    assert heard.run in {run["id"] for run in site.get("/runs")}


def test_many_notes_are_not_many_messages(site: Site) -> None:
    """Pictures that can't be read, one warning each; the log has them all."""
    folder = site.server.base_dir / "input" / "bad"
    folder.mkdir()
    noisy((64, 64), 0).save(folder / "good.png")
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(b"no picture")
    subject = node("DreamBoothSubject", folder="bad", token="sks", class_noun="dog", caption="a {token} {class}")
    shown = node("PreviewAny", source=["subject", 1])
    with Page(site.server, "notes") as page:
        site.server.wait(site.server.queue({"subject": subject, "shown": shown}, client_id="notes"))
        page.wait_for("executing", node=None)
        messages = page.of_node("subject")
    assert sum(one.kind == "binary 3" for one in messages) > 2
    assert_at_most_ten_a_second(messages)
    assert site.server.log().count(".png is left out") >= 40
    shutil.rmtree(folder)


def test_a_stopped_run_is_told_to_its_last_step(site: Site, checkpoint: Path) -> None:
    """And no page need be open: later ones learn of it."""
    prompt = training(name="stopped", seed=1, steps=400, preview_every=0)
    with Page(site.server, "page") as page:
        job = site.server.queue(prompt, client_id="page")
        run = page.wait_for("dreambooth", state="training").content["run"]
        assert site.get(f"/runs/{run}")["state"] == "running"
        assert next(entry["state"] for entry in site.get("/runs") if entry["id"] == run) == "running"
        site.server.interrupt()
        with pytest.raises(PromptInterrupted):
            site.server.wait(job)
        page.wait_for("dreambooth", state="stopped")
        steps = points_of(page.told("train"))["steps"]
    details = site.get(f"/runs/{run}")
    assert details["state"] == "stopped"
    assert steps == [*range(1, details["step"] + 1)] == site.get(f"/runs/{run}/curve")["steps"]
    prompt["train"]["inputs"]["steps"] = details["step"] + 2
    site.server.wait(site.server.queue(prompt))
    facts = site.get("/nodes")["train"]
    assert (facts["state"], facts["step"], facts["run"]) == ("done", details["step"] + 2, run)
    assert site.get(f"/runs/{run}")["state"] == "done"
    assert site.ask(f"/dreambooth/runs/{run}", "DELETE", b"{}", **OWN).status == 200


@pytest.mark.parametrize(
    ("changes", "further"), [({"rank": 512}, {}), ({}, {"score_clip": "a" * 300})], ids=["rank", "model"]
)
def test_a_failed_run_says_so_on_its_node(
    changes: dict[str, Any], further: dict[str, Any], site: Site, checkpoint: Path
) -> None:
    """Also one that fails before it is begun."""
    prompt = training(name="failed", seed=2, **changes)
    prompt["more"]["inputs"] |= further
    with pytest.raises(PromptFailed) as failure:
        site.server.wait(site.server.queue(prompt))
    facts = site.get("/nodes")["train"]
    assert (facts["state"], facts["name"]) == ("failed", "failed")
    assert facts["problem"].split(": ")[-1] in failure.value.exception_message
