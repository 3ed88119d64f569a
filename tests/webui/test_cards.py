"""What the Extra Networks browser shows of a file: picture, words, weight and version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.trainer.core.errors import StorageError
from pack.trainer.training.runs.layout import RunLayout, preview_name
from pack.webui import cards
from pack.webui.jobs import TRAIN, Jobs
from safetensors.torch import save_file

SETTINGS = {"instance_prompt": "a photo of {token} {class}", "token": "sks", "class_noun": "dog"}


def lora(path: Path, **metadata: str) -> Path:
    save_file({"weight": torch.ones(2)}, path, {f"modelspec.{name}": text for name, text in metadata.items()} or None)
    return path


def run_of(folder: Path, settings: dict[str, Any]) -> RunLayout:
    run = RunLayout(folder / "runs" / "dog-1")
    for step in (5, 100):
        sample = run.preview_path(step) / preview_name("subject", 0, 0)
        sample.parent.mkdir(parents=True)
        sample.write_bytes(f"sample of {step}".encode())
    (run.path / "run.json").write_text(json.dumps({"fingerprint": "5e", "name": "dog", "settings": settings}))
    return run


def card_of(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def test_a_card_is_called_after_its_file(tmp_path: Path) -> None:
    """Which may have a point in its name."""
    architecture = "stable-diffusion-xl-v1-base/lora"
    path = lora(tmp_path / "dög.v1.safetensors", architecture=architecture, title="dög", trigger_phrase="sks dög")
    cards.write_card(path)
    assert card_of(path) == {
        "description": "dög",
        "sd version": "SDXL",
        "activation text": "sks dög",
        "preferred weight": 0.9,
        "negative text": "",
        "notes": "",
    }
    assert [one.name for one in tmp_path.iterdir() if one != path] == ["dög.v1.json"], "without a run no picture"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "sks dog"),
        ({"class_noun": ""}, "sks"),
        ({"instance_prompt": "a photo of my dog"}, "of the file"),
        ({"instance_prompt": None}, "of the file"),
    ],
)
def test_the_words_are_those_of_the_subject(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = lora(tmp_path / "dog.safetensors", trigger_phrase="of the file")
    cards.write_card(path, run_of(tmp_path, SETTINGS | changes))
    assert card_of(path)["activation text"] == words
    assert path.with_suffix(".preview.png").read_bytes() == b"sample of 100", "the newest sample"


def test_a_file_without_metadata(tmp_path: Path) -> None:
    path = lora(tmp_path / "dog.safetensors")
    cards.write_card(path)
    assert (card_of(path)["sd version"], card_of(path)["activation text"]) == ("Unknown", "")


def test_a_file_that_is_there_is_not_replaced(bare_webui: Path, tmp_path: Path) -> None:
    """The free name is the card's, too; the user's own card stays."""
    loras = bare_webui / "models" / "Lora"
    (loras / "dog.safetensors").write_text("the user's")
    (loras / "dog.json").write_text("the user's")
    job = Jobs(tmp_path / "jobs").make(TRAIN, "dog", {})
    made = lora(tmp_path / "dog.safetensors", architecture="stable-diffusion-v1/lora")
    (job.folder / "output.txt").write_text(f"something else\n{made}\n", encoding="utf-8")
    path = cards.deliver(job)
    assert path == loras / "dog-2.safetensors"
    assert path.read_bytes() == made.read_bytes()
    assert card_of(path)["sd version"] == "SD1"
    assert (loras / "dog.safetensors").read_text() == (loras / "dog.json").read_text() == "the user's"


def test_a_file_that_is_no_lora(tmp_path: Path) -> None:
    """Such as a checkpoint of a run that a full disk cut short."""
    path = tmp_path / "dog.safetensors"
    path.write_bytes(b"\x08" + b"\0" * 20)
    with pytest.raises(StorageError, match=r"dog\.safetensors"):
        cards.write_card(path)
