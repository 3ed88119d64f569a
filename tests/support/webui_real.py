"""A real Forge, or one of its kin, with the pack in it: its own program and environment, a folder of our own."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from checkpoints import sd15_checkpoint
from helpers import HANGS, ROOT
from raw_http import ask
from webui_host import OWN, WebUI, text_of

_ARGUMENTS = "--skip-prepare-environment --skip-torch-cuda-test --always-cpu"
_ENVIRONMENT = {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
_ENVIRONMENT |= {"GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "*"}
DRAWN = {"seed": 1, "steps": 4, "cfg": 3.0}  # with Euler
SIDE = 128  # pixels
_NEEDED = ("Lora", "sd_forge_lora")  # of the extensions that come with the host


def find_webui() -> Path | None:
    """The folder that WEBUI_PATH names; None where there is none."""
    named = os.environ.get("WEBUI_PATH")
    folder = Path(named).expanduser() if named else None
    return folder if folder is not None and (folder / "launch.py").is_file() else None


def find_python(webui: Path) -> Path:
    """The interpreter of its virtual environment, or the one that WEBUI_PYTHON names."""
    named = os.environ.get("WEBUI_PYTHON")
    if named:
        return Path(named).expanduser()
    return next(path for path in (webui / "venv/bin/python", webui / "venv/Scripts/python.exe") if path.is_file())


def make_real_folder(folder: Path, webui: Path) -> Path:
    """Its data: the pack, a slim checkpoint, and no more of what comes with it than LoRAs need."""
    for name in ("extensions", "models/Lora"):
        (folder / name).mkdir(parents=True)
    sd15_checkpoint(folder / "models" / "Stable-diffusion" / "slim-sd15.safetensors")
    (folder / "extensions" / "dreambooth-lora").symlink_to(ROOT, target_is_directory=True)
    others = [path.name for path in (webui / "extensions-builtin").iterdir() if path.name not in _NEEDED]
    options = {"disabled_extensions": others, "skip_early_cond": -1}  # at 0, Forge Classic's first step has no CFG
    (folder / "config.json").write_text(json.dumps(options))
    return folder


class RealWebUI(WebUI):
    """A real web UI on the CPU; WEBUI_ARGS are its arguments instead of those that Forge needs for that."""

    def start(self) -> None:
        """Run `install.py`, as it does at every start, and start it; returns once its page and the pack answer."""
        webui = find_webui()
        assert webui is not None
        python = find_python(webui)
        self._configuration = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, **_ENVIRONMENT}
        for name in ("PYTHONPATH", "COVERAGE_PROCESS_START"):
            environment.pop(name, None)
        command = [str(python), "launch.py", *shlex.split(os.environ.get("WEBUI_ARGS", _ARGUMENTS)), "--api"]
        command += ["--port", str(port), "--data-dir", str(self.folder)]
        for folder in (self.folder, webui):  # what the page loads from there
            command += ["--gradio-allowed-path", str(folder)]
        with open(self.folder / "log.txt", "ab") as log:
            installer = [str(python), str(ROOT / "install.py")]
            hosts = environment | {"PYTHONPATH": str(webui)}
            subprocess.run(installer, cwd=webui, env=hosts, stdout=log, stderr=log, timeout=HANGS, check=True)
            self._process = subprocess.Popen(command, cwd=webui, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + HANGS
        while not self._answers():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            return ask(self.url, "/dreambooth/job").status == 200 and ask(self.url, "/config").status == 200
        except OSError:
            return False

    def resume(self, run: str) -> None:
        """Press Resume until the host has let go of the run that was stopped."""
        deadline = time.monotonic() + HANGS
        while True:
            reply = self.ask(f"/dreambooth{run}/resume", "POST", b"{}", **OWN)
            if reply.status == 200:
                return
            assert reply.status == 409, reply.content
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def train(self, **settings: Any) -> Path:
        """Train a LoRA to its end, once the host has let go of what ran before; the file among its LoRAs."""
        deadline = time.monotonic() + HANGS
        while True:
            [message] = self.call("start", **settings)
            if text_of(message).startswith("Training started."):
                break
            assert "still running" in text_of(message), text_of(message)
            assert time.monotonic() < deadline
            time.sleep(0.2)
        return self.loras / self.wait_for_job("done")["card"]

    def draw(self, prompt: str) -> Any:
        """What txt2img makes of a prompt: pixels of 0 … 255."""
        import base64
        import io

        import numpy as np
        from PIL import Image

        wanted = {"prompt": prompt, "seed": DRAWN["seed"], "steps": DRAWN["steps"], "cfg_scale": DRAWN["cfg"]}
        wanted |= {"sampler_name": "Euler", "width": SIDE, "height": SIDE}
        body = json.dumps(wanted).encode()
        reply = self.ask("/sdapi/v1/txt2img", "POST", body, **{"Content-Type": "application/json"})
        assert reply.status == 200, (reply.content[:2000], self.log())
        picture = Image.open(io.BytesIO(base64.b64decode(reply.json["images"][0])))
        return np.asarray(picture.convert("RGB"), dtype=int)
