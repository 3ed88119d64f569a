"""What ComfyUI Manager runs after cloning, and Automatic1111 and Forge at every start. Never fails.

In ComfyUI it checks the packages, and repairs one thing. The Manager has already installed requirements.txt line by
line, each line without regard to the others: with an older transformers the newest diffusers may need a
huggingface-hub that transformers forbids. Then a compatible diffusers is installed instead, with the host's own
packages pinned as they are. PyTorch belongs to the host and is never touched.

In a web UI, which pins its packages and breaks with others, nothing of the host is changed. If they don't do for the
pack, it gets an environment of its own in `venv/`: what it needs lies there, and the rest, above all PyTorch, is the
host's. It is made once, and again when the host's Python or PyTorch or the pack's requirements change.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / "venv"
OUR_PACKAGES = ("diffusers", "peft", "accelerate")
HOST_PACKAGES = ("transformers", "tokenizers", "huggingface-hub", "safetensors", "numpy", "torch")
_PREFIX = "[DreamBooth LoRA]"
_STAMP = "dreambooth_lora.json"
_ALLOW = "Give the web UI's user write permission there, or free some space on that disk,"


def version_numbers(text: str) -> tuple[int, ...]:
    """A version's leading numbers: "4.46.0.dev1" → (4, 46, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def missing_requirements(requirements: str) -> list[str]:
    """Packages that are missing or too old, each as a line with the remedy; empty if all is well.

    Args:
        requirements: Content of requirements.txt: lower bounds, with an optional marker after a semicolon.
    """
    messages = []
    for line in requirements.splitlines():
        requirement, _, marker = line.partition(";")
        name, _, bound = requirement.strip().partition(">=")
        if not name or (marker and sys.version_info >= (3, 11)):
            continue
        try:
            installed = version(name)
        except PackageNotFoundError:
            messages.append(f"{name} is missing: pip install '{requirement.strip()}'")
            continue
        if version_numbers(installed) < version_numbers(bound):
            messages.append(f"{name} {installed} is older than {bound}: pip install -U '{requirement.strip()}'")
    try:
        version("torch")
    except PackageNotFoundError:
        messages.append("PyTorch is missing. It comes with ComfyUI: run this with ComfyUI's own Python.")
    return messages


def incompatible_packages(names: tuple[str, ...] = OUR_PACKAGES) -> list[str]:
    """Those of the packages that need another version of a host's package than the installed one."""
    from packaging.requirements import Requirement

    incompatible = []
    for name in names:
        try:
            for requirement in map(Requirement, requires(name) or ()):
                applies = requirement.marker is None or requirement.marker.evaluate()
                if requirement.name not in HOST_PACKAGES or not applies:
                    continue
                if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                    incompatible.append(name)
                    break
        except PackageNotFoundError:  # `missing_requirements` reports it
            continue
    return incompatible


def pip_arguments(names: list[str], requirements: str) -> list[str]:
    """The arguments for pip that replace these packages by versions compatible with the host's, which stay."""
    bounds = [line.strip() for line in requirements.splitlines() if line.partition(">=")[0].strip() in names]
    pins = []
    for name in HOST_PACKAGES:
        try:
            pins.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return ["install", *bounds, *pins]


def replace_incompatible_packages(requirements: str) -> None:
    """Let pip choose compatible versions; if that fails, print how to do it by hand."""
    try:
        names = incompatible_packages()
    except ImportError:  # without `packaging` nothing can be compared
        return
    if not names:
        return
    arguments = pip_arguments(names, requirements)
    verb = "does" if len(names) == 1 else "do"
    print(f"{_PREFIX} {', '.join(names)} {verb} not match this ComfyUI's packages; installing a compatible version.")
    if subprocess.run([sys.executable, "-m", "pip", *arguments], check=False).returncode:
        print(f"{_PREFIX} That failed. To install manually: {sys.executable} -m pip {' '.join(arguments)}")


def is_in_web_ui(folder: Path) -> bool:
    """Whether a folder is that of Automatic1111, Forge or one of their kin, who run this in their own folder."""
    return (folder / "launch.py").is_file() and (folder / "modules").is_dir()


def environment_python(folder: Path = ENVIRONMENT) -> Path:
    """The interpreter of an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment_stamp(requirements: str) -> dict[str, str]:
    """What an environment is made for: another host's Python or PyTorch, or other requirements, need another one."""
    digest = hashlib.sha256(requirements.encode()).hexdigest()
    python = platform.python_version()
    return {"python": python, "torch": _torch_version(), "host": sys.prefix, "requirements": digest}


def is_ready(requirements: str, folder: Path = ENVIRONMENT) -> bool:
    """Whether there is an environment, made for this host and these requirements."""
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == environment_stamp(requirements)) and environment_python(folder).exists()


def make_environment(requirements: str, folder: Path = ENVIRONMENT) -> str:
    """Make an environment over the host's packages.

    Args:
        requirements: Content of requirements.txt.
        folder: Where it is made; what is there is removed first.

    Returns:
        "" or, if it can't be made, one line that says why and what to do.
    """
    meanwhile = "The web UI itself still works; only training does not."
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)  # what is wrong with the folder is no fault of Python's
        made = _run(sys.executable, "-m", "venv", str(folder))
        if made.returncode or not environment_python(folder).exists():
            shutil.rmtree(folder, ignore_errors=True)
            remedy = f"{_ALLOW} and restart."
            if re.search("No module named|ensurepip", made.stdout + made.stderr):
                remedy = "Install Python's 'venv' (on Debian and Ubuntu: apt install python3-venv) and restart."
            where = f"in {folder} with {sys.executable}"
            return (
                f"The extension's Python environment can't be created {where}: {_last_line(made)} {remedy} {meanwhile}"
            )
        _lend_packages(folder)
        constraint = folder / "host.txt"
        torch = _torch_version()
        constraint.write_text(f"torch=={torch}\n" if torch else "", encoding="utf-8")
        bounds = [line for line in requirements.splitlines() if line.strip()]
        python = str(environment_python(folder))
        pip = _run(python, "-m", "pip", "install", "--disable-pip-version-check", "-c", str(constraint), *bounds)
        if pip.returncode:
            return f"The packages for training can't be installed: {_last_line(pip)} Restart to try again. {meanwhile}"
        stamp = json.dumps(environment_stamp(requirements))
        (folder / _STAMP).write_text(stamp, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        problem = f"The extension's Python environment can't be created in {folder}: {reason}."
        return f"{problem} {_ALLOW} and restart. {meanwhile}"
    return ""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        command, check=False, capture_output=True, text=True, encoding="utf-8", errors="replace", env=environment
    )


def _last_line(process: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (process.stdout + process.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    text = (errors or lines or ["no reason was given"])[-1].strip()[:300]
    return text if text.endswith(".") else f"{text}."


def _torch_version() -> str:
    """The host's PyTorch; "" if it has none."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def _lend_packages(folder: Path) -> None:
    """Let an environment see this one's packages, after its own."""
    scheme = {"base": str(folder), "platbase": str(folder)}
    purelib = Path(sysconfig.get_path("purelib", "nt" if os.name == "nt" else "posix_prefix", scheme))
    lent = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (purelib / "dreambooth_lora_host.pth").write_text("\n".join(lent) + "\n", encoding="utf-8")


def install_in_web_ui(requirements: str) -> None:
    """See that a web UI's packages, or an environment of the pack's own, do for training; say it in one line."""
    missing = missing_requirements(requirements)
    if not missing:
        print(f"{_PREFIX} Ready: the tab 'DreamBooth LoRA' trains with the web UI's own packages.")
        return
    if not is_ready(requirements):
        print(
            f"{_PREFIX} Creating a Python environment for training in {ENVIRONMENT}, once; the web UI's own is not "
            "changed."
        )
        failure = make_environment(requirements)
        if failure:
            print(f"{_PREFIX} {failure}")
            return
    print(f"{_PREFIX} Ready: the tab 'DreamBooth LoRA' trains with its own packages.")


def main() -> None:
    """Repair what can be repaired, and print what is missing."""
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    if is_in_web_ui(Path.cwd()):
        install_in_web_ui(requirements)
        return
    replace_incompatible_packages(requirements)
    messages = missing_requirements(requirements)
    for message in messages:
        print(f"{_PREFIX} {message}")
    if not messages:
        print(f"{_PREFIX} Ready: restart ComfyUI and look for 'DreamBooth' among the nodes and templates.")


if __name__ == "__main__":
    main()
