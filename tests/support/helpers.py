"""What the tests share: the smallest real model, and a listener that remembers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from checkpoints import SD1Shape

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
CPU_HAS_HALF = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
HALF = "bf16" if CPU_HAS_HALF else "fp32"
"""Half precision, for large matrices where it is not what is tested: without support it is thirty times slower."""

HANGS = 600.0  # seconds after which something must hang; on an idle machine nothing takes a twentieth of it
# As small as SD 1.x gets with two levels, both with attention; text encoder and tokenizer of the demo's vocabulary.
TINY = SD1Shape(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(0, 1),
    context_dim=64,
    clip_layers=2,
    clip_mlp=128,
    vocab_size=234,
    max_tokens=32,
    vae_channels=32,
    vae_channel_mult=(1, 1, 2, 2),
    vae_res_blocks=1,
)

Given = TypeVar("Given")
Made = TypeVar("Made")


class MadeOnce(dict[str, Made]):
    """What tests share by name, made when the first of them asks for it."""

    def __init__(self, make: Callable[[str], Made]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> Made:
        self[name] = made = self._make(name)
        return made


def remembered(function: Callable[[Given], Made]) -> Callable[[Given], Made]:
    """The function, which gives its last few results again for the very same object; nobody may change them."""
    known: deque[tuple[Given, Made]] = deque(maxlen=8)

    def call(given: Given) -> Made:
        for before, made in known:
            if before is given:
                return made
        known.append((given, function(given)))
        return known[-1][1]

    return call


class Recorder:
    """A listener that keeps every event, and can be told to stop after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[Any] = []
        self.stop_after = stop_after
        self.steps_seen = 0

    def report(self, event: Any) -> None:
        self.events.append(event)

    def should_stop(self) -> bool:
        """Asked once after every step by the recipe (and between pictures by other work)."""
        self.steps_seen += 1
        return self.stop_after is not None and self.steps_seen >= self.stop_after

    @property
    def losses(self) -> list[float]:
        return [event.loss for event in self.events if hasattr(event, "loss")]

    @property
    def warnings(self) -> list[str]:
        return [event.text for event in self.events if getattr(event, "warning", False)]

    @property
    def notes(self) -> list[str]:
        return [event.text for event in self.events if hasattr(event, "text")]
