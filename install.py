"""What ComfyUI Manager (and Automatic1111) run after cloning: checks the packages, and repairs one thing. Never fails.

The Manager has already installed requirements.txt line by line, each line without regard to the others: with an older
transformers the newest diffusers may need a huggingface-hub that transformers forbids. Then a compatible diffusers is
installed instead, with the host's own packages pinned as they are. PyTorch belongs to the host and is never touched.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

OUR_PACKAGES = ("diffusers", "peft", "accelerate")
HOST_PACKAGES = ("transformers", "tokenizers", "huggingface-hub", "safetensors", "numpy", "torch")
_PREFIX = "[DreamBooth LoRA]"


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
        messages.append("PyTorch is missing: it comes with ComfyUI; run this with ComfyUI's own Python.")
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
    print(f"{_PREFIX} {', '.join(names)} {verb} not fit this ComfyUI's packages; installing a compatible version.")
    if subprocess.run([sys.executable, "-m", "pip", *arguments], check=False).returncode:
        print(f"{_PREFIX} That failed. By hand: {sys.executable} -m pip {' '.join(arguments)}")


def main() -> None:
    """Repair what can be repaired, and print what is missing."""
    requirements = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8")
    replace_incompatible_packages(requirements)
    messages = missing_requirements(requirements)
    for message in messages:
        print(f"{_PREFIX} {message}")
    if not messages:
        print(f"{_PREFIX} Ready: restart ComfyUI and look for 'DreamBooth' among the nodes and templates.")


if __name__ == "__main__":
    main()
