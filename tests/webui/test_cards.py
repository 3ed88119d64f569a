"""What the Extra Networks browser shows of a file: picture, words, weight and version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.trainer.core.errors import StorageError
from pack.trainer.training.gallery import OWN_KEY
from pack.trainer.training.runs.layout import RunLayout, preview_name
from pack.webui import cards
from pack.webui.jobs import TRAIN, Jobs
from PIL import Image
from safetensors.torch import load_file, save_file

SETTINGS = {"instance_prompt": "a photo of {token} {class}", "token": "sks", "class_noun": "dog"}


def lora(path: Path, **metadata: str) -> Path:
    save_file({"weight": torch.ones(2)}, path, {f"modelspec.{name}": text for name, text in metadata.items()} or None)
    return path


def run_of(folder: Path, settings: dict[str, Any]) -> RunLayout:
    run = RunLayout(folder / "runs" / "dog-1")
    for step in (5, 100):
        sample = run.preview_path(step) / preview_name("subject", 0, 0)
        sample.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (step, 0, 0)).save(sample)
    (run.path / "run.json").write_text(json.dumps({"fingerprint": "5e", "name": "dog", "settings": settings}))
    return run


def card_of(path: Path) -> Any:
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    del card[OWN_KEY]
    return card


def test_a_card_is_called_after_its_file(tmp_path: Path) -> None:
    """Which may have a point in its name."""
    architecture = "stable-diffusion-xl-v1-base/lora"
    path = lora(tmp_path / "dög.v1.safetensors", architecture=architecture, title="dög", trigger_phrase="sks dög")
    cards.write_card(path)
    assert card_of(path) == {
        "description": "dög",
        "sd version": "SDXL",
        "activation text": "sks dög",
        "preferred weight": 1.0,
        "negative text": "",
        "notes": "",
    }
    others = {one.name for one in tmp_path.iterdir() if one != path}
    assert others == {"dög.v1.json", "dög.v1.metadata.json"}, "without a run no picture"


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
    with Image.open(path.with_suffix(".preview.png")) as sample:
        assert sample.getpixel((0, 0)) == (100, 0, 0), "the newest sample"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": " ohwx man, studio light "}, "ohwx man, studio light"),
        ({"modelspec.trigger_phrase": "a dog that " * 10}, ""),  # a caption is no trigger
        ({"modelspec.trigger_phrase": "a photo of sks dog", "dreambooth.config": json.dumps(SETTINGS)}, "sks dog"),
        (
            {"dreambooth.config": json.dumps(SETTINGS | {"instance_prompt": "a photo of sks dog"})},
            "sks dog",
        ),
        ({"modelspec.trigger_phrase": "x", "dreambooth.config": json.dumps({"instance_prompt": "a dog"})}, "x"),
        (
            {
                "dreambooth.config": json.dumps(
                    {"subject": [SETTINGS, SETTINGS | {"token": "ohwx", "class_noun": "man"}]}
                )
            },
            "sks dog, ohwx man",
        ),
        ({"modelspec.trigger_phrase": "x", "dreambooth.config": "{"}, "x"),
        ({"modelspec.trigger_phrase": "x", "dreambooth.config": "[]"}, "x"),
    ],
)
def test_the_words_of_a_file_of_others(metadata: dict[str, str], words: str, tmp_path: Path) -> None:
    """Those that its settings call it by; or its trigger phrase, unless that is a whole caption."""
    path = tmp_path / "dog.safetensors"
    save_file({"weight": torch.ones(2)}, path, metadata)
    cards.write_card(path)
    assert card_of(path)["activation text"] == words


def test_a_run_may_want_no_card(bare_webui: Path, tmp_path: Path) -> None:
    """The words that a file bundles are put among the host's all the same, since it would not do without."""
    path = tmp_path / "dog.safetensors"
    save_file({"a": torch.ones(1), "bundle_emb.sks.string_to_param.*": torch.ones(2, 8)}, path)
    cards.write_card(path, run_of(tmp_path, SETTINGS | {"gallery_files": False}))
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == ["dog.safetensors"]
    assert (bare_webui / "embeddings" / "dog-sks.safetensors").is_file()


def test_what_is_made_of_several_has_the_words_of_each(bare_webui: Path, tmp_path: Path) -> None:
    """Those of their cards, which their owner may have written; each once."""
    sources = [
        lora(tmp_path / "dog.safetensors", trigger_phrase="of the file"),
        lora(tmp_path / "style.safetensors", trigger_phrase="pixel art"),
        lora(tmp_path / "again.safetensors", trigger_phrase="pixel art"),
        lora(tmp_path / "damaged.safetensors", trigger_phrase="1girl"),
        tmp_path / "gone.safetensors",
    ]
    sources[0].with_suffix(".json").write_text(json.dumps({"activation text": "sks dög "}), encoding="utf-8")
    sources[3].with_suffix(".json").write_text("{")
    assert cards.joined_words(sources) == "sks dög, pixel art, 1girl"
    merged = lora(bare_webui / "models" / "Lora" / "both.safetensors", trigger_phrase="a photo of sks dog, pixel art")
    cards.write_card(merged, words=cards.joined_words(sources))
    assert card_of(merged)["activation text"] == "sks dög, pixel art, 1girl"


def test_a_file_without_metadata(tmp_path: Path) -> None:
    path = lora(tmp_path / "dog.safetensors")
    cards.write_card(path)
    assert (card_of(path)["sd version"], card_of(path)["activation text"]) == ("Unknown", "")


@pytest.mark.parametrize(
    ("architecture", "version"),
    [
        ("stable-diffusion-v1/lora", "SD1"),
        ("stable-diffusion-v2-768-v/lora", "SD2"),
        ("stable-diffusion-xl-v1-base/lora", "SDXL"),
        ("flux-1-dev/lora", "Unknown"),
        ("", "Unknown"),
    ],
)
def test_the_version_is_as_the_browser_calls_it(architecture: str, version: str, tmp_path: Path) -> None:
    path = lora(tmp_path / "dog.safetensors", architecture=architecture)
    cards.write_card(path)
    assert card_of(path)["sd version"] == version


def test_a_file_that_is_there_is_not_replaced(bare_webui: Path, tmp_path: Path) -> None:
    """The free name is the card's, too; the user's own card stays."""
    loras = bare_webui / "models" / "Lora"
    (loras / "dog.safetensors").write_text("the user's")
    (loras / "dog.json").write_text("the user's")
    job = Jobs(tmp_path / "jobs").make(TRAIN, "dog", {})
    made = lora(tmp_path / "dog.safetensors", architecture="stable-diffusion-v1/lora")
    (job.folder / "output.txt").write_text(f"something else\n{made}\n", encoding="utf-8")
    path, weight = cards.deliver(job)
    assert (path, weight) == (loras / "dog-2.safetensors", 1.0)
    assert path.read_bytes() == made.read_bytes()
    assert card_of(path)["sd version"] == "SD1"
    assert (loras / "dog.safetensors").read_text() == (loras / "dog.json").read_text() == "the user's"


def test_learned_words_lie_among_the_host_s_embeddings(bare_webui: Path, tmp_path: Path) -> None:
    """Under free names, by which the card calls them; what is there already, with the same numbers, is used again."""
    embeddings = bare_webui / "embeddings"
    embeddings.mkdir(exist_ok=True)
    (embeddings / "dog-sks.safetensors").write_text("the user's")
    job = Jobs(tmp_path / "jobs").make(TRAIN, "dog", {})
    config = json.dumps({"token": "sks", "class_noun": "dog", "instance_prompt": "a {token} {class}"})
    made = tmp_path / "dog.safetensors"
    vectors = {"bundle_emb.sks.string_to_param.*": torch.ones(2, 8), "bundle_emb.my toy.clip_l": torch.zeros(1, 8)}
    save_file({"a": torch.ones(1), **vectors}, made, {"dreambooth.config": config})
    (job.folder / "output.txt").write_text(f"{made}\n", encoding="utf-8")
    path, _ = cards.deliver(job)
    names = {"dog-sks", "dog-sks-2", "dog-my-toy"}
    assert {file.stem for file in embeddings.iterdir()} == names
    assert (embeddings / "dog-sks.safetensors").read_text() == "the user's"
    assert load_file(embeddings / "dog-sks-2.safetensors")["emb_params"].shape == (2, 8)
    assert load_file(embeddings / "dog-my-toy.safetensors").keys() == {"clip_l"}
    assert card_of(path)["activation text"] == "dog-sks-2 dog"
    cards.write_card(path, words="a skse, dog-sks-2 dog, sks")
    assert card_of(path)["activation text"] == "a skse, dog-sks-2 dog, dog-sks-2"
    assert {file.stem for file in embeddings.iterdir()} == names


def test_a_file_that_is_no_lora(tmp_path: Path) -> None:
    """Such as a checkpoint of a run that a full disk cut short."""
    path = tmp_path / "dog.safetensors"
    path.write_bytes(b"\x08" + b"\0" * 20)
    with pytest.raises(StorageError, match=r"dog\.safetensors"):
        cards.write_card(path)
