"""The settings of every command, and the least that each of them wants."""

from __future__ import annotations

from typing import Any

from pack.trainer.__main__ import COMMANDS
from pack.trainer.settings.base import Settings

KINDS: dict[str, type[Settings]] = {command.name: command.settings for command in COMMANDS}
"""Command → its settings."""

REQUIRED: dict[str, dict[str, Any]] = {
    "train": {"base": "x", "images": "x"},
    "plan": {"base": "x"},
    "priors": {"base": "x", "class_prompt": "a dog", "prior_count": 1},
    "generate": {"base": "x", "prompt": "a dog"},
    "caption": {"images": "x", "model": "x"},
    "merge": {"loras": ["a", "b"], "output": "x.safetensors"},
    "learned-merge": {
        "base": "x",
        "loras": ["a", "b"],
        "output": "x.safetensors",
        "subject_prompt": "sks dog",
        "style_prompt": "pixel art",
    },
    "resize": {"lora": "x", "output": "x.safetensors"},
    "extract": {"tuned": "x", "base": "y", "output": "x.safetensors"},
    "convert": {"lora": "x", "output": "x.safetensors"},
    "fuse": {"base": "x", "lora": ["x"], "output": "x.safetensors"},
    "score": {"pictures": "x", "subject": "x", "dino": "x"},
    "compare": {"base": "x", "runs": ["x"], "prompts": "sks dog", "subject": "x", "clip": "x"},
    "dreambench": {"base": "x", "data": "x", "clip": "x"},
}
"""Command → values with which its settings are whole."""
