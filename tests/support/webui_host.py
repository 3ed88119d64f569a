"""Runs a small web UI with the pack in it: the real gradio of Automatic1111 or of Forge, over a fake of the rest."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import DEMO, HANGS, ROOT
from make_webui_hosts import FOLDER, host_python, is_made
from raw_http import Reply, ask

LAUNCH = ROOT / "tests" / "support" / "fake_webui" / "launch.py"
OWN = {"X-DreamBooth": "1", "Content-Type": "application/json"}
USER = ("sks", "dog")
_ENVIRONMENT = {
    "PYTHONUTF8": "1",
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "NO_PROXY": "*",
}
_TOKENIZERS = {
    "gradio3": "ldm_patched/modules/sd1_tokenizer",
    "gradio4": "backend/huggingface/runwayml/stable-diffusion-v1-5/tokenizer",
}
_OTHER = {"gradio3": "a_other", "gradio4": "z_other"}  # loaded before the pack, and after it
_LINES_OF_LOG = 12


def why_not(kind: str) -> str:
    """Why this web UI can't run here; "" if it can."""
    if is_made(kind):
        return ""
    return f"no environment with {kind}: python tools/make_webui_hosts.py makes it in {FOLDER}"


def make_folder(folder: Path, kind: str, checkpoint: Path) -> Path:
    """A web UI's folder with a checkpoint, the pack, and another extension that has a `trainer` of its own."""
    for name in ("extensions", "models/Lora", "models/Stable-diffusion"):
        (folder / name).mkdir(parents=True)
    (folder / "script.js").write_text("globalThis.switch_to_txt2img = () => { globalThis.went_to_txt2img = true; };\n")
    shutil.copytree(DEMO / "base" / "tokenizer", folder / _TOKENIZERS[kind])
    (folder / "models" / "Stable-diffusion" / "tiny.safetensors").symlink_to(checkpoint)
    (folder / "extensions" / "dreambooth-lora").symlink_to(ROOT, target_is_directory=True)
    other = folder / "extensions" / _OTHER[kind]
    (other / "scripts").mkdir(parents=True)
    (other / "trainer").mkdir()
    (other / "trainer" / "__init__.py").write_text("WHOSE = 'other'\n")
    (other / "trainer" / "late.py").write_text("WHOSE = 'other'\n")
    (other / "scripts" / "other.py").write_text(
        "import trainer\n"
        "from modules import script_callbacks\n"
        "assert trainer.WHOSE == 'other'\n"
        "def started(demo, app):\n"
        "    import trainer.late\n"
        "script_callbacks.on_app_started(started)\n"
    )
    return folder


@dataclass
class WebUI:
    """A web UI; a context manager while it runs.

    Attributes:
        kind: "gradio3" or "gradio4".
        folder: Its folder, of `make_folder`.
        url: Its address.
        locked_url: The same, where one has to log in.
    """

    kind: str
    folder: Path
    url: str = ""
    locked_url: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _configuration: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> WebUI:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it; returns once it answers."""
        address = self.folder / "address.txt"
        address.unlink(missing_ok=True)
        self._configuration = {}
        command = [str(host_python(self.kind)), str(LAUNCH), "--engine", sys.executable, "--auth", ":".join(USER)]
        environment = {**os.environ, **_ENVIRONMENT, "FAKE_WEBUI": str(self.folder)}
        for name in ("PYTHONPATH", "COVERAGE_PROCESS_START"):
            environment.pop(name, None)
        with open(self.folder / "log.txt", "ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + HANGS
        while not address.exists():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)
        self.url, self.locked_url = address.read_text(encoding="utf-8").split()

    def kill(self) -> None:
        """End it at once, as `kill -9` does."""
        assert self._process is not None
        self._process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        self._process.wait()

    def log(self) -> str:
        """The last lines of what it wrote."""
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LINES_OF_LOG:])

    @property
    def data(self) -> Path:
        return self.folder / "dreambooth"

    @property
    def loras(self) -> Path:
        return self.folder / "models" / "Lora"

    def ask(self, target: str, method: str = "GET", body: bytes = b"", **headers: str) -> Reply:
        return ask(self.url, target, method, body, **headers)

    def get(self, target: str) -> Any:
        reply = self.ask(target)
        assert reply.status == 200, (target, reply.content)
        return reply.json

    def post(self, target: str, body: Any = None, method: str = "POST") -> Any:
        """What the pack's own page sends."""
        reply = self.ask(f"/dreambooth{target}", method, json.dumps(body or {}).encode(), **OWN)
        assert reply.status == 200, (target, reply.content)
        return reply.json

    def facts(self) -> Any:
        """What happened inside."""
        return self.get("/fake/facts")

    def job(self) -> Any:
        return self.get("/dreambooth/job")

    def wait_for_job(self, *states: str, **facts: int) -> Any:
        """Wait until the job is in one of these states, and its numbers are at least these."""
        deadline = time.monotonic() + HANGS
        while True:
            job = self.job()
            if job.get("state") in states and all(job.get(name, -1) >= least for name, least in facts.items()):
                return job
            assert job.get("state") != "failed", (job, self.log())
            assert time.monotonic() < deadline, (job, self.log())
            time.sleep(0.05)

    def shorten(self, name: str, steps: int) -> Path:
        """Let a training that was stopped end after so many steps, as no widget can; the run is the same.

        Returns:
            The file with its settings.
        """
        from pack.trainer.core.toml import read_toml
        from pack.webui.toml_text import toml_text

        path = self.data / "jobs" / name / "job.toml"
        path.write_text(toml_text(read_toml(path) | {"steps": steps}), encoding="utf-8")
        return path

    def tidy(self) -> None:
        """Take away what trainings left; one that goes on, after a test that failed, is stopped."""
        if self.facts()["followed"]:
            self.post("/job/stop")
        self.wait_for_idle()
        shutil.rmtree(self.data, ignore_errors=True)
        for path in self.loras.iterdir():
            path.unlink()

    def wait_for_idle(self) -> None:
        """Wait until nothing is followed any more: what was made is delivered, and another job may begin."""
        deadline = time.monotonic() + HANGS
        while self.facts()["followed"]:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    # The page

    @property
    def configuration(self) -> dict[str, Any]:
        """What gradio tells the page: components, layout, and what is called when."""
        if not self._configuration:
            self._configuration = self.get("/config")
        return self._configuration

    def components(self) -> dict[str, dict[str, Any]]:
        """Element id → component."""
        found = {}
        for component in self.configuration["components"]:
            name = component["props"].get("elem_id")
            if name:
                found[name] = component
        return found

    def call(self, element: str, event: str = "click", /, *, page: str = "a page", **values: Any) -> Any:
        """Do what the page does on an event: the outputs; the last ones, if they change meanwhile.

        Args:
            element: Id of the element, without "dreambooth_".
            event: Its event.
            page: In which of several pages, which gradio knows by the choices that their lists were given.
            values: What is in widgets, by id without "dreambooth_"; the others hold what they begin with.
        """
        by_id = {component["id"]: component for component in self.configuration["components"]}
        index, dependency = self._dependency(self.components()[f"dreambooth_{element}"]["id"], event)
        data, left = [], dict(values)
        for number in dependency["inputs"]:
            properties = by_id[number]["props"]
            name = (properties.get("elem_id") or "").removeprefix("dreambooth_")
            data.append(left.pop(name) if name in left else properties.get("value"))
        assert not left, f"no inputs of {element}: {left}"
        body = {"fn_index": index, "data": data, "session_hash": page, "event_id": uuid.uuid4().hex}
        shown: list[Any] = []
        while True:
            reply = self.ask("/run/predict", "POST", json.dumps(body).encode(), **{"Content-Type": "application/json"})
            assert reply.status == 200, (reply.status, reply.content, self.log())
            is_last = not reply.json["is_generating"]
            if shown and is_last and self.kind == "gradio3":  # where that says nothing
                return shown[-1]
            shown.append(reply.json["data"])  # of gradio 4 what differs, and at last all of it
            if is_last:
                return shown[-1]

    def outputs(self, element: str, event: str = "click") -> list[str]:
        """The ids, without "dreambooth_", of the elements that an event changes, in order."""
        by_id = {component["id"]: component for component in self.configuration["components"]}
        _, dependency = self._dependency(self.components()[f"dreambooth_{element}"]["id"], event)
        return [by_id[id]["props"]["elem_id"].removeprefix("dreambooth_") for id in dependency["outputs"]]

    def _dependency(self, component: int, event: str) -> tuple[int, Mapping[str, Any]]:
        for index, dependency in enumerate(self.configuration["dependencies"]):
            targets = dependency["targets"]  # of gradio 3 the components alone
            trigger = dependency.get("trigger")
            if [component, event] in [[target, trigger] if isinstance(target, int) else target for target in targets]:
                return dependency.get("id", index), dependency
        raise AssertionError(f"nothing happens on {event} of {component}")

    def upload(self, *files: Path) -> list[dict[str, Any]]:
        """Upload files, as the field for pictures does; its value then."""
        boundary = uuid.uuid4().hex
        body = b"".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n'
            f"Content-Type: application/octet-stream\r\n\r\n".encode()
            + file.read_bytes()
            + b"\r\n"
            for file in files
        )
        content_type = f"multipart/form-data; boundary={boundary}"
        reply = self.ask("/upload", "POST", body + f"--{boundary}--\r\n".encode(), **{"Content-Type": content_type})
        assert reply.status == 200, reply.content
        if self.kind == "gradio3":
            return [
                {"name": path, "orig_name": file.name, "size": file.stat().st_size, "is_file": True, "data": None}
                for path, file in zip(reply.json, files)
            ]
        return [
            {"path": path, "orig_name": file.name, "size": file.stat().st_size, "meta": {"_type": "gradio.FileData"}}
            for path, file in zip(reply.json, files)
        ]


def text_of(markup: str) -> str:
    """What a reader sees of HTML."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())
