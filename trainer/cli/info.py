"""What the command info reports: versions, devices, free disk space; nothing private, fit to be pasted into an issue.

Imports the standard library alone, so that it also works, and says so, where a library is missing or broken.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]
LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "pydantic",
    "numpy",
    "PIL",
    "psutil",
    "tqdm",
    "typing_extensions",
    "tomli",
    "matplotlib",
)
"""PyTorch, which the host brings, and what `requirements.txt` names, as they are imported."""
_REPORTED = LIBRARIES[:8]
_OPTIONAL = ("bitsandbytes", "triton")
_DISTRIBUTIONS = {"PIL": "Pillow"}
_LABELLED = ("commit", "problem", "CUDA", "ROCm", "compute_capability", "auto")
_MISSING = "not installed"
_GB = 2**30
_QUOTED_PATH = re.compile(r"""(["'])(?:[A-Za-z]:)?[\\/~.]*[\\/].*?\1""")
_BARE_PATHS = re.compile(r"(?:[A-Za-z]:)?[\w.~-]*[\\/](?:.*[\\/])?[^\s\"',;]*")  # up to the last: spaces may be in them
Facts = dict[str, Any]


def collect() -> Facts:
    """Everything; plain values, ready for JSON. Nothing raises: what can't be found out is reported as such."""
    torch_problem = _import_problem("torch")
    return {
        "pack": _or_problem(_pack),
        "python": _or_problem(_python),
        "system": _or_problem(_system),
        "libraries": {name: _library(name, torch_problem) for name in (*_REPORTED, *_OPTIONAL)},
        "pytorch": {"problem": torch_problem} if torch_problem else _or_problem(_pytorch),
        "devices": [] if torch_problem else _devices(),
        "disk": _or_problem(_disk),
    }


def as_text(facts: Facts) -> str:
    """The facts of `collect` as lines."""
    lines = [f"{name}: {_line(facts[name])}" for name in ("pack", "python", "system", "disk", "pytorch")]
    lines.append("libraries:")
    lines += [f"  {name}: {text}" for name, text in facts["libraries"].items()]
    lines.append("devices:" if facts["devices"] else "devices: unknown without PyTorch")
    lines += [f"  {_line(device)}" for device in facts["devices"]]
    return "\n".join(lines)


def _line(facts: Facts) -> str:
    """Facts on a line: names of what is a number or a list, and values alone of what is a text."""
    parts = []
    for name, value in facts.items():
        label = name.replace("_", " ")
        if name.endswith("_gb"):
            parts.append(f"{value:.1f} GB {label.removesuffix(' gb')}")
        elif isinstance(value, list):
            parts.append(f"{label} {'/'.join(value)}")
        elif isinstance(value, bool):
            parts.append(f"{label}: {'yes' if value else 'no'}")
        elif isinstance(value, int):
            parts.append(f"{value} {label}")
        else:
            parts.append(f"{label} {value}" if name in _LABELLED else str(value))
    return ", ".join(parts)


def _or_problem(find: Callable[[], Facts]) -> Facts:
    """What a function finds, or why it finds nothing."""
    try:
        with _silence():
            return find()
    except Exception as error:
        return {"problem": _described(error)}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """While libraries are imported and asked, what they print, with the paths in it, is not shown."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _described(error: BaseException) -> str:
    """An error on a line, without the paths and the name of the user."""
    kind = type(error).__name__
    text = " ".join(str(error).split())
    text = _BARE_PATHS.sub("PATH", _QUOTED_PATH.sub("PATH", text))
    private = []
    for find in (getpass.getuser, lambda: Path.home().name):
        with contextlib.suppress(Exception):  # a service may have neither
            private.append(find())
    if any(word and re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in private):
        return kind
    return f"{kind}: {text[:200]}" if text else kind


def _import_problem(name: str) -> str:
    """Why a library can't be imported; "" if it can."""
    try:
        with _silence():
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        return _MISSING if (error.name or "") == name else _described(error)
    except (Exception, SystemExit) as error:  # whatever a broken library raises
        return _described(error)
    return ""


def _library(name: str, torch_problem: str) -> str:
    """The version of a library, and what is wrong with it, if anything."""
    try:
        version = importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if name == "bitsandbytes":
        problem = "" if not version or torch_problem else _bitsandbytes_problem()
    elif name == "torch":
        problem = torch_problem
    else:
        problem = _import_problem(name)
    if not version and (problem == _MISSING or name == "bitsandbytes"):
        return _MISSING
    needed = _lower_bounds().get(_DISTRIBUTIONS.get(name, name), "")
    too_old = f", older than {needed}, which the pack needs" if version and _numbers(version) < _numbers(needed) else ""
    broken = f", can't be imported ({problem})" if problem else ""
    return f"{version or 'version unknown'}{too_old}{broken}"


def _lower_bounds() -> dict[str, str]:
    """Name of a library → the oldest version that the pack works with."""
    try:
        text = (PACK / "requirements.txt").read_text(encoding="utf-8")
    except OSError:
        return {}
    return dict(re.findall(r"(?m)^([\w-]+)>=([\d.]+)", text))


def _numbers(version: str) -> list[int]:
    """The numbers that a version begins with."""
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in match[0].split(".")] if match else []


def _bitsandbytes_problem() -> str:
    """Why bitsandbytes can't be used; its plain import may download something, so the pack has its own."""
    try:
        with _silence():
            from ..models.nf4 import load_bitsandbytes

            load_bitsandbytes()
    except Exception as error:
        return _described(error.__cause__ or error)
    return ""


def _pack() -> Facts:
    text = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'(?m)^version = "([^"]+)"', text)
    facts: Facts = {"version": version[1] if version else "unknown"}
    if commit := _commit():
        facts["commit"] = commit
    return facts | {"place": folder_kind(PACK)}


def _commit() -> str:
    """The commit of a clone, with "+" if files differ from it; "" if there is no git, or no clone."""
    if not (PACK / ".git").exists():
        return ""
    try:
        words = ["git", "-C", str(PACK), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def folder_kind(pack: Path) -> str:
    """What kind of place the pack is installed in, without its path."""
    host = {"custom_nodes": "custom_nodes of a ComfyUI", "extensions": "extensions of a web UI"}.get(pack.parent.name)
    clone = "a clone" if (pack / ".git").exists() else ""
    return ", ".join(part for part in (host, clone) if part) or "a folder without git"


def _python() -> Facts:
    executable = Path(sys.executable)
    if any(part.lower() in ("python_embeded", "python_embedded") for part in executable.parts):
        environment = "the embedded Python of a portable ComfyUI"
    elif sys.prefix != sys.base_prefix:
        environment = "a virtual environment"
    elif os.environ.get("CONDA_PREFIX"):
        environment = "a conda environment"
    else:
        environment = "no virtual environment"
    return {"version": platform.python_version(), "place": environment}


def _system() -> Facts:
    facts: Facts = {"name": platform.system(), "release": platform.release(), "machine": platform.machine()}
    with contextlib.suppress(OSError):  # what is no Linux has no such file
        facts["distribution"] = platform.freedesktop_os_release().get("PRETTY_NAME", "unknown distribution")
    facts["cores"] = os.cpu_count() or 0
    with contextlib.suppress(Exception):
        import psutil

        memory = psutil.virtual_memory()
        facts["memory_gb"] = _in_gb(memory.total)
        facts["free_memory_gb"] = _in_gb(memory.available)
    return facts


def _in_gb(size: int) -> float:
    return round(size / _GB, 1)


def _pytorch() -> Facts:
    import torch

    facts: Facts = {}
    if torch.version.cuda:
        facts["CUDA"] = torch.version.cuda
    if hip := getattr(torch.version, "hip", None):
        facts["ROCm"] = hip
    facts["GPU_available"] = torch.cuda.is_available() or torch.backends.mps.is_available()
    facts["threads"] = torch.get_num_threads()
    return facts


def _devices() -> list[Facts]:
    """The devices that PyTorch can use, each with its name, memory and precisions."""
    devices = [_or_problem(lambda: _device("cpu", platform.processor() or platform.machine()))]
    try:
        import torch

        with _silence():
            for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
                devices.append(_or_problem(lambda index=index: _cuda_device(index)))  # type: ignore[misc]
            if torch.backends.mps.is_available():
                devices.append(_or_problem(lambda: _device("mps", "Apple GPU")))
    except Exception as error:
        devices.append({"problem": _described(error)})
    return devices


def _cuda_device(index: int) -> Facts:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    facts = _device(f"cuda:{index}", properties.name)
    facts["memory_gb"] = _in_gb(total)
    facts["free_memory_gb"] = _in_gb(free)
    facts["compute_capability"] = f"{properties.major}.{properties.minor}"
    return facts


def _device(device: str, name: str) -> Facts:
    """What every device has; "auto" is the precision that a training takes by itself."""
    import torch

    from ..core.devices import pick_precision
    from ..core.errors import TrainerError

    supported = []
    for precision in ("fp32", "bf16", "fp16"):
        with contextlib.suppress(TrainerError):
            supported.append(pick_precision(precision, torch.device(device)))
    auto = pick_precision("auto", torch.device(device))
    return {"device": device, "name": name, "precisions": supported, "auto": auto}


def _disk() -> Facts:
    """Free space where the commands write by default: the folder `output` in the current one."""
    folder = Path("output").absolute()
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return {"free_gb": _in_gb(usage.free), "total_gb": _in_gb(usage.total), "place": "on the disk where runs are saved"}


def install_remedy() -> str:
    """What to do about a library that is missing."""
    return "Install what the pack needs: python -m pip install -r requirements.txt, with the Python that runs it."


def main_without_settings(words: Sequence[str], error: ImportError) -> int:
    """The command line where the settings can't be imported: info alone; returns the exit status.

    Args:
        words: Those of the command line.
        error: Why they can't.
    """
    if list(words[:1]) == ["info"]:
        facts = collect()
        sys.stdout.write((json.dumps(facts, indent=1) if "--json" in words else as_text(facts)) + "\n")
        return 0
    from .console import show_error

    show_error(f"A library that the commands need can't be used: {error}.", install_remedy())
    return 1
