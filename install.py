"""What ComfyUI Manager (and Automatic1111) run after cloning: checks and advice. Installs nothing, never fails.

The Manager has already installed requirements.txt line by line. PyTorch belongs to the host and is never touched.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


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


def main() -> None:
    """Print the advice."""
    found = advice((Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8"))
    for line in found:
        print(f"[DreamBooth LoRA] {line}")
    if not found:
        print("[DreamBooth LoRA] ready: restart ComfyUI and look for 'DreamBooth' among the nodes and templates.")


if __name__ == "__main__":
    main()
