"""What ComfyUI Manager (and Automatic1111) run after cloning: checks and advice, and one thing mended. Never fails.

The Manager has already installed requirements.txt line by line, each line without regard to the others: beside an older
transformers the newest diffusers may want a huggingface-hub that transformers forbids. Then a diffusers that fits is
installed instead, with the host's own packages held as they are. PyTorch belongs to the host and is never touched.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

OURS = ("diffusers", "peft", "accelerate")
HOSTS = ("transformers", "tokenizers", "huggingface-hub", "safetensors", "numpy", "torch")


def numbers(text: str) -> tuple[int, ...]:
    """A version's leading numbers: "4.46.0.dev1" → (4, 46, 0)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def advice(requirements: str) -> list[str]:
    """What is missing or too old, one line each; empty if all is well.

    Args:
        requirements: Content of requirements.txt: lower bounds, with an optional marker behind a semicolon.
    """
    lines = []
    for line in requirements.splitlines():
        requirement, _, marker = line.partition(";")
        name, _, bound = requirement.strip().partition(">=")
        if not name or (marker and sys.version_info >= (3, 11)):
            continue
        try:
            installed = version(name)
        except PackageNotFoundError:
            lines.append(f"{name} is missing: pip install '{requirement.strip()}'")
            continue
        if numbers(installed) < numbers(bound):
            lines.append(f"{name} {installed} is older than {bound}: pip install -U '{requirement.strip()}'")
    try:
        version("torch")
    except PackageNotFoundError:
        lines.append("PyTorch is missing: it comes with ComfyUI; run this with ComfyUI's own Python.")
    return lines


def misfits(names: tuple[str, ...] = OURS) -> list[str]:
    """Those of the packages that want another version of a host's package than is installed."""
    from packaging.requirements import Requirement

    found = []
    for name in names:
        try:
            wanted = [Requirement(text) for text in requires(name) or ()]
            wanted = [one for one in wanted if one.name in HOSTS and (one.marker is None or one.marker.evaluate())]
            if not all(one.specifier.contains(version(one.name), prereleases=True) for one in wanted):
                found.append(name)
        except PackageNotFoundError:  # `advice` tells
            continue
    return found


def mending(names: list[str], requirements: str) -> list[str]:
    """The arguments for pip that replace these packages by versions that fit the host's, which stay as they are."""
    bounds = [line.strip() for line in requirements.splitlines() if line.partition(">=")[0].strip() in names]
    held = []
    for name in HOSTS:
        try:
            held.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return ["install", *bounds, *held]


def mend(requirements: str) -> None:
    """Let pip choose anew what does not fit; what it can't mend is told."""
    try:
        names = misfits()
    except ImportError:  # without `packaging` nothing can be compared
        return
    if not names:
        return
    arguments = mending(names, requirements)
    print(f"[DreamBooth LoRA] {', '.join(names)} does not fit this ComfyUI's packages; taking a version that does.")
    if subprocess.run([sys.executable, "-m", "pip", *arguments], check=False).returncode:
        print(f"[DreamBooth LoRA] that failed. By hand: {sys.executable} -m pip {' '.join(arguments)}")


def main() -> None:
    """Mend, and print the advice."""
    requirements = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8")
    mend(requirements)
    found = advice(requirements)
    for line in found:
        print(f"[DreamBooth LoRA] {line}")
    if not found:
        print("[DreamBooth LoRA] ready: restart ComfyUI and look for 'DreamBooth' among the nodes and templates.")


if __name__ == "__main__":
    main()
