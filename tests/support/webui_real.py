"""A real Automatic1111, Forge or one of their kin with the pack in it: its own program, a folder of our own."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints import SHAPES, SD1Shape, sd15_checkpoint
from helpers import HANGS, ROOT
from pack.webui.tokenizers import made_tokenizer
from raw_http import ask
from webui_host import OWN, WebUI, text_of

_ARGUMENTS = "--skip-prepare-environment --skip-torch-cuda-test"
_ON_THE_CPU = {True: "--always-cpu", False: "--use-cpu all --no-half"}  # of Forge and its kin, of Automatic1111
_ENVIRONMENT = {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
_ENVIRONMENT |= {"GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "*"}
DRAWN = {"seed": 1, "steps": 4, "cfg": 3.0}  # with Euler
SIDE = 128  # pixels
_NEEDED = ("Lora", "sd_forge_lora")  # of the extensions that come with the host
_BACKENDS = ("backend", "ldm_patched")  # of Forge and its kin, who read a model's sizes from its tensors
_MERGES = "bpe_simple_vocab_16e6.txt.gz"


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


def is_forge(webui: Path) -> bool:
    """Whether it is Forge or one of its kin, not Automatic1111 itself."""
    return any((webui / name).is_dir() for name in _BACKENDS)


def make_real_folder(folder: Path, webui: Path) -> Path:
    """Its data: the pack, a slim checkpoint, and no more of what comes with it than LoRAs need."""
    for name in ("extensions", "models/Lora"):
        (folder / name).mkdir(parents=True)
    checkpoint = folder / "models" / "Stable-diffusion" / "slim-sd15.safetensors"
    if is_forge(webui):
        sd15_checkpoint(checkpoint)
    else:  # it finds a LoRA's layers by names that they have only where each level has two blocks
        shape = replace(SHAPES["slim"], num_res_blocks=2)
        sd15_checkpoint(checkpoint, size=shape)
        _write_config(checkpoint.with_suffix(".yaml"), shape, webui, folder / "clip")
    (folder / "extensions" / "dreambooth-lora").symlink_to(ROOT, target_is_directory=True)
    others = [path.name for path in (webui / "extensions-builtin").iterdir() if path.name not in _NEEDED]
    options = {"disabled_extensions": others, "skip_early_cond": -1}  # at 0, Forge Classic's first step has no CFG
    options |= {"emphasis": "No norm"}  # not "Original", which divides by an encoded prompt's mean: here 0, or nearly
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def _write_config(path: Path, shape: SD1Shape, webui: Path, clip: Path) -> None:
    """What Automatic1111 has to be told of a slim checkpoint: its UNet's sizes, and where there is a CLIP.

    It would download CLIP's tokenizer and sizes; `clip` gets both, of the merges that the host's OpenCLIP brings.
    """
    import yaml

    model = yaml.safe_load((webui / "configs" / "v1-inference.yaml").read_text(encoding="utf-8"))
    params = model["model"]["params"]
    params["unet_config"]["params"] |= {
        "channel_mult": list(shape.channel_mult),
        "num_res_blocks": shape.num_res_blocks,
        "attention_resolutions": [2**level for level in shape.attention_levels],
    }
    params["cond_stage_config"]["params"] = {"version": str(clip)}
    path.write_text(yaml.safe_dump(model), encoding="utf-8")
    find = "import importlib.util; print(*importlib.util.find_spec('open_clip').submodule_search_locations)"
    found = subprocess.run([find_python(webui), "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    made_tokenizer(Path(found) / _MERGES, clip)
    config = {"model_max_length": shape.max_tokens}  # no more: its transformers knows tokens by other fields
    (clip / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    sizes = {
        "hidden_size": shape.context_dim,
        "projection_dim": shape.context_dim,
        "intermediate_size": shape.clip_mlp,
        "num_hidden_layers": shape.clip_layers,
        "num_attention_heads": 12,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_tokens,
    }
    (clip / "config.json").write_text(json.dumps({"model_type": "clip_text_model"} | sizes), encoding="utf-8")


class RealWebUI(WebUI):
    """A real web UI on the CPU; WEBUI_ARGS are its arguments instead of those that it needs for that."""

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
        arguments = os.environ.get("WEBUI_ARGS", f"{_ARGUMENTS} {_ON_THE_CPU[is_forge(webui)]}")
        command = [str(python), "launch.py", *shlex.split(arguments), "--api"]
        command += ["--port", str(port), "--data-dir", str(self.folder)]
        for folder in (self.folder, webui):  # what the page loads from there
            command += ["--gradio-allowed-path", str(folder)]
        with open(self.folder / "log.txt", "ab") as log:
            self._log_before = log.tell()
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
        """Asked only once it has started: a request before that keeps Automatic1111 from adding its API."""
        if b"Startup time:" not in (self.folder / "log.txt").read_bytes()[self._log_before :]:
            return False
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
