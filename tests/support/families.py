"""A small model of every family, to do the same with each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anima_checkpoints
import krea2_checkpoints
import pytest
from anima_checkpoints import anima_folder
from checkpoints import sd15_checkpoint, sdxl_checkpoint
from flux2_checkpoints import flux2_folder
from helpers import TINY, Recorder
from krea2_checkpoints import krea2_folder
from pack.trainer.data.folder import AnnotationOptions
from pack.trainer.data.images import load_pictures
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from worlds import PROMPT, TOKENIZER, World, noisy_pictures
from zimage_checkpoints import zimage_folder

FAMILY_WORLDS: dict[str, Callable[[Path], BaseWeights]] = {
    "sd1": lambda path: open_base(sd15_checkpoint(path / "sd.safetensors", size=TINY), TOKENIZER),
    "sdxl": lambda path: open_base(sdxl_checkpoint(path / "xl.safetensors", size="tiny"), TOKENIZER),
    "flux2": lambda path: open_base(flux2_folder(path / "base")),
    "zimage": lambda path: open_base(zimage_folder(path / "base")),
    "krea2": lambda path: open_base(krea2_folder(path / "base")),
    "anima": lambda path: open_base(anima_folder(path / "base")),
}
"""Name → makes its base in a folder."""
_CAN_BE_MADE = {"krea2": krea2_checkpoints.can_be_made, "anima": anima_checkpoints.can_be_made}


def family_world(name: str, folder: Path) -> World:
    """A small model of a family, and three pictures; skips the test where libraries are too old for it."""
    if name in _CAN_BE_MADE and not _CAN_BE_MADE[name]():
        pytest.skip("needs newer libraries")
    pictures = noisy_pictures(folder / "subject", 3, 0)
    subject = load_pictures(pictures, PROMPT, Recorder(), AnnotationOptions(token="sks"))
    return World(FAMILY_WORLDS[name](folder), subject)
