"""Runs a real ComfyUI for tests: finds one, starts it with the pack installed, talks to it over HTTP with urllib."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACK = Path(__file__).absolute().parents[2]
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"  # which the templates load
FOLDERS = ("custom_nodes", "input", "output", "user", "models/checkpoints", "models/loras")
# No downloads; and threads that wait must not spin, or ComfyUI runs many times slower while the CPU is shared.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# How long to wait for what must happen, before something is taken to be wrong: longer than any machine takes.
PATIENCE_S = 900.0

Prompt = Mapping[str, Mapping[str, Any]]  # ComfyUI's API format: node id → {"class_type": …, "inputs": {…}}


class ServerFailed(RuntimeError):
    """ComfyUI did not start, or died; the message ends with its log's last lines."""


class PromptRejected(RuntimeError):
    """A prompt, or one of its output nodes, is not valid; `node_errors` says why, by node id."""

    def __init__(self, reply: Mapping[str, Any]) -> None:
        super().__init__(json.dumps(reply, indent=1))
        self.node_errors: dict[str, Any] = reply.get("node_errors") or {}


class PromptFailed(RuntimeError):
    """A node raised an exception. The attributes are those of ComfyUI's ``execution_error`` message."""

    def __init__(self, details: Mapping[str, Any]) -> None:
        self.node_id: str = details["node_id"]
        self.node_type: str = details["node_type"]
        self.exception_type: str = details.get("exception_type", "")
        self.exception_message: str = details.get("exception_message", "")
        self.traceback: str = "".join(details.get("traceback", []))
        reason = f"{self.exception_type}: {self.exception_message}\n{self.traceback}"
        super().__init__(f"node {self.node_id} ({self.node_type}): {reason}")


class PromptInterrupted(PromptFailed):
    """The prompt was interrupted while `node_id` ran."""


def find_comfyui() -> Path | None:
    """Returns the ComfyUI folder to test in, or None where there is none.

    It is the one that the environment variable COMFYUI_PATH names; if that is not set, ~/comfy/ComfyUI (where comfy-cli
    installs it), or else the one in whose custom_nodes folder this pack lies.
    """
    named = os.environ.get("COMFYUI_PATH")
    candidates = [Path(named).expanduser()] if named else [Path.home() / "comfy" / "ComfyUI", PACK.parent.parent]
    return next((path for path in candidates if (path / "main.py").is_file() and (path / "comfy").is_dir()), None)


def find_python(comfyui: Path) -> Path:
    """Returns the interpreter which has ComfyUI's requirements.

    It is COMFYUI_PYTHON, or that of a virtual environment beside or inside ComfyUI, or the one that runs this code.
    """
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        return Path(named).expanduser()
    folders = (comfyui.parent / "venv", comfyui / "venv", comfyui / ".venv")
    candidates = [folder / python for folder in folders for python in ("bin/python", "Scripts/python.exe")]
    return next((path for path in candidates if path.is_file()), Path(sys.executable))


class ComfyServer:
    """A ComfyUI process on the CPU, as a context manager: up and answering inside, dead after it.

    Args:
        base_dir: folder for its models, input, output and custom nodes, made if need be: nothing of the user's
            installation is read or written. It stays: give it to a second server to test a restart.
        pack: the custom-node pack to install, by a link (or a copy where links are forbidden).
        pack_name: its folder name in custom_nodes.
        extra_args: more arguments for main.py.
        env: environment variables on top of this process's own and of `ENVIRONMENT`.

    Attributes:
        url: ``http://127.0.0.1:<port>``.
        log_path: file with everything that the process prints, anew at each start.
        log_start: where in it `log` begins, in characters.
    """

    process: subprocess.Popen[bytes]

    def __init__(
        self,
        base_dir: Path,
        *,
        pack: Path = PACK,
        pack_name: str = "dreambooth-lora",
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.base_dir = base_dir.absolute()
        self.log_path = self.base_dir / "comfyui.log"
        self.url = ""
        self.log_start = 0
        self._pack, self._pack_name, self._extra_args = pack, pack_name, extra_args
        self._env = {**os.environ, **ENVIRONMENT, **(env or {})}
        # A proxy from the environment must not stand between us and our own machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> ComfyServer:
        comfyui = find_comfyui()
        if comfyui is None:
            raise ServerFailed("there is no ComfyUI: set COMFYUI_PATH to its folder")
        for folder in FOLDERS:
            (self.base_dir / folder).mkdir(parents=True, exist_ok=True)
        _install(self._pack, self.base_dir / "custom_nodes" / self._pack_name)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [str(find_python(comfyui)), "main.py", "--cpu", "--disable-api-nodes", "--port", str(port)]
        command += ["--base-directory", str(self.base_dir), "--database-url", "sqlite:///:memory:", *self._extra_args]
        with self.log_path.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=comfyui, env=self._env, stdout=output, stderr=output)
        try:
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self._check_alive()
            with contextlib.suppress(OSError):
                self._request("/system_stats")
                return
            time.sleep(0.1)
        raise ServerFailed(f"ComfyUI did not answer within {PATIENCE_S:.0f} s\n{self.log()[-4000:]}")

    def _check_alive(self) -> None:
        if self.process.poll() is not None:
            raise ServerFailed(f"ComfyUI ended with code {self.process.returncode}\n{self.log()[-4000:]}")

    def queue(self, prompt: Prompt, client_id: str = "tests") -> str:
        """Queues a prompt and returns its id; raises `PromptRejected` if any of its output nodes is not valid."""
        try:
            reply = json.loads(self._request("/prompt", {"prompt": prompt, "client_id": client_id}))
        except urllib.error.HTTPError as error:
            raise PromptRejected(json.loads(error.read())) from error
        if reply["node_errors"]:
            raise PromptRejected(reply)
        return reply["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = PATIENCE_S) -> dict[str, Any]:
        """Waits until a queued prompt is done, for at most `timeout` seconds, and returns its history entry.

        The entry's ``["outputs"][node id]`` holds what an output node shows, ``["images"]`` for example.

        Raises:
            PromptInterrupted: the prompt was interrupted while it ran.
            PromptFailed: a node raised an exception.
            ServerFailed: the process died.
            TimeoutError: the prompt is still running or waiting.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._check_alive()
            entry = None
            with contextlib.suppress(OSError):  # if the process has just died, the next turn says so
                entry = json.loads(self._request(f"/history/{prompt_id}")).get(prompt_id)
            if entry is not None:
                for event, details in entry["status"]["messages"]:
                    if event == "execution_interrupted":
                        raise PromptInterrupted(details)
                    if event == "execution_error":
                        raise PromptFailed(details)
                return entry
            time.sleep(0.1)
        self.interrupt()  # else it goes on beside the tests that follow
        raise TimeoutError(f"prompt {prompt_id} is not done after {timeout:.0f} s\n{self.log()[-4000:]}")

    def interrupt(self) -> None:
        """Asks the running prompt to stop; does nothing if none runs."""
        self._request("/interrupt", {})

    def empty_queue(self) -> None:
        """Drops what waits, stops what runs, and returns when nothing does."""
        self._request("/queue", {"clear": True})
        deadline = time.monotonic() + PATIENCE_S
        while json.loads(self._request("/queue"))["queue_running"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"a prompt does not end\n{self.log()[-4000:]}")
            self.interrupt()
            time.sleep(0.1)

    def object_info(self) -> dict[str, Any]:
        """Returns the description of every node, by node id."""
        return json.loads(self._request("/object_info"))

    def free(self) -> None:
        """Lets ComfyUI unload its models and forget cached outputs.

        It does so once the prompt at hand is done, so one that does next to nothing comes in between.
        """
        self._request("/free", {"unload_models": True, "free_memory": True})
        nothing = {"class_type": "PrimitiveString", "inputs": {"value": uuid.uuid4().hex}}
        shown = {"class_type": "PreviewAny", "inputs": {"source": ["nothing", 0]}}
        self.wait(self.queue({"nothing": nothing, "shown": shown}))

    def view(self, image: Mapping[str, str]) -> bytes:
        """Returns the file behind an entry of a history's ``images`` list: {"filename", "subfolder", "type"}."""
        return self._request("/view?" + urllib.parse.urlencode(image))

    def get(self, path: str) -> bytes:
        """Returns what ComfyUI answers to a GET request."""
        return self._request(path)

    def log(self) -> str:
        """Returns what the process has printed from `log_start` on, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self._printed()[self.log_start :])

    def begin_log(self) -> None:
        """Lets `log` leave out what was printed up to now."""
        self.log_start = len(self._printed())

    def _printed(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def rss(self) -> int:
        """Returns the process's resident memory in bytes, mapped files included (Linux only)."""
        return _process_status_bytes(self.process.pid, "VmRSS")

    def peak_rss(self) -> int:
        """Returns the largest `rss` since the start or the last `reset_peak_rss`, in bytes (Linux only)."""
        return _process_status_bytes(self.process.pid, "VmHWM")

    def reset_peak_rss(self) -> None:
        """Makes `peak_rss` start anew, for example once the models are loaded (Linux only)."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=PATIENCE_S) as response:
            return response.read()


def _process_status_bytes(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _install(pack: Path, target: Path) -> None:
    if target.is_symlink() or target.exists():
        return
    try:
        target.symlink_to(pack.absolute(), target_is_directory=True)
    except OSError:  # Windows without the right to make links
        shutil.copytree(pack, target, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
