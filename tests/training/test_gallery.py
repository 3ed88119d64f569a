"""What lies beside an adapter file is what galleries read, is a generated sample, and replaces nobody's own."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DEMO, Recorder
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.core.errors import CancelledError, StorageError
from pack.trainer.core.events import Note, Phase
from pack.trainer.core.prompts import PromptWords
from pack.trainer.dreambooth import train
from pack.trainer.evaluation.evaluator import best_index
from pack.trainer.settings.sharing import CONFIG_KEY
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training import gallery
from pack.trainer.training.gallery import (
    OWN_KEY,
    is_wanted,
    preferred_strength,
    shown_metadata,
    words_for,
    write_gallery,
)
from pack.trainer.training.runs.index import RunIndex
from pack.trainer.training.runs.layout import RunLayout, preview_name
from pack.trainer.training.strength import STRENGTHS
from PIL import Image
from safetensors.torch import save_file
from worlds import COMMON, World, paths_in

SETTINGS = {"instance_prompt": "a photo of {token} {class}", "token": "sks", "class_noun": "dög"}
METADATA = {
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.title": "rex",
    "ss_steps": "100",
    "ss_sd_model_name": "a base",
}


def lora(path: Path, **metadata: str) -> Path:
    save_file({"weight": torch.ones(2)}, path, METADATA | metadata)
    return path


def colour_of(path: Path) -> tuple[int, ...]:
    with Image.open(path) as image:
        pixel = image.convert("RGB").getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return tuple(int(value) for value in pixel)


def run_in(folder: Path, steps: tuple[int, ...] = (0, 50, 100, 150), side: int = 64, **settings: Any) -> RunLayout:
    """A run with a sample of each of these steps, whose red is the step."""
    run = RunLayout(folder / "runs" / "rex-1")
    for step in steps:
        sample = run.preview_path(step) / preview_name("subject", 0, 0)
        sample.parent.mkdir(parents=True)
        Image.new("RGB", (side, side), (step, 0, 0)).save(sample)
    record = {"fingerprint": "5e", "name": "rex", "settings": SETTINGS | settings}
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "run.json").write_text(json.dumps(record))
    return run


def beside(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir() if file.is_file() and file != path}


# As their programs read them


def read_by_a1111(path: Path) -> dict[str, Any]:
    """What Automatic1111 and Forge show: `read_user_metadata` and `find_preview`, with the types that they expect."""
    card = json.loads(Path(os.path.splitext(path)[0] + ".json").read_text(encoding="utf-8"))
    previews = [
        os.path.splitext(path)[0] + middle + extension
        for extension in (".png", ".jpg", ".jpeg", ".webp", ".gif")
        for middle in ("", ".preview")
    ]
    return {
        "description": str(card.get("description", "")),
        "version": {"SD1": "SD1", "SD2": "SD2", "SDXL": "SDXL"}.get(card.get("sd version", ""), "Unknown"),
        "prompt": f"<lora:{path.stem}:{float(card.get('preferred weight', 0.0)):g}> {card.get('activation text', '')}",
        "negative": str(card.get("negative text", "")),
        "notes": str(card.get("notes", "")),
        "preview": next((preview for preview in previews if os.path.isfile(preview)), None),
    }


def read_by_manager(path: Path) -> dict[str, Any]:
    """What ComfyUI-Lora-Manager takes over: `LoraMetadata.from_dict` and `_normalize_metadata_paths`.

    Required fields without a default must be there; what it does not know is kept and written again.
    """
    file = Path(os.path.splitext(path)[0] + ".metadata.json")
    data = json.loads(file.read_text(encoding="utf-8"))
    required = {
        "file_name": str, "model_name": str, "file_path": str, "size": int,
        "modified": float, "sha256": str, "base_model": str, "preview_url": str,
    }  # fmt: skip
    for name, kind in required.items():
        assert isinstance(data[name], kind), name
    data |= {"file_name": path.stem, "file_path": path.as_posix()}
    if data["preview_url"] and not os.path.exists(data["preview_url"]):
        extensions = (".webp", ".preview.webp", ".preview.png", ".png")
        found = next((path.with_suffix(end) for end in extensions if path.with_suffix(end).is_file()), None)
        data["preview_url"] = found.as_posix() if found else data["preview_url"]
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
    return {
        "strength": json.loads(data["usage_tips"]).get("strength"),
        "words": data["civitai"]["trainedWords"],
        **{name: data[name] for name in (*required, "notes", "from_civitai")},
    }


def test_every_program_reads_its_own(tmp_path: Path) -> None:
    """The file may have points and letters of any language in its name."""
    path = lora(tmp_path / "réx.v1.safetensors")
    run = run_in(tmp_path)
    write_gallery(path, run)
    assert beside(path) == {"réx.v1.preview.png", "réx.v1.json", "réx.v1.metadata.json"}
    assert read_by_a1111(path) == {
        "description": "rex",
        "version": "SDXL",
        "prompt": "<lora:réx.v1:1> sks dög",
        "negative": "",
        "notes": "Trained for 100 steps on a base.",
        "preview": str(path.with_suffix(".preview.png")),
    }
    assert read_by_manager(path) == {
        "strength": 1.0,
        "words": ["sks dög"],
        "file_name": "réx.v1",
        "model_name": "rex",
        "file_path": path.as_posix(),
        "size": path.stat().st_size,
        "modified": path.stat().st_mtime,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "base_model": "SDXL 1.0",
        "preview_url": path.with_suffix(".preview.png").as_posix(),
        "notes": "Trained for 100 steps on a base.",
        "from_civitai": False,
    }


@pytest.mark.parametrize(
    ("architecture", "a1111", "manager"),
    [
        ("stable-diffusion-v1/lora", "SD1", "SD 1.5"),
        ("stable-diffusion-v2-768-v/lora", "SD2", "SD 2.1"),
        ("stable-diffusion-xl-v1-base/lora", "SDXL", "SDXL 1.0"),
        ("Flux.2-klein/lora", "Unknown", "Flux.2 Klein"),
        ("Z-Image/lora", "Unknown", "ZImageBase"),
        ("Krea-2/lora", "Unknown", "Krea 2"),
        ("anima-preview/lora", "Unknown", "Anima"),
        ("", "Unknown", "Unknown"),
    ],
)
def test_families_are_called_as_programs_call_them(architecture: str, a1111: str, manager: str, tmp_path: Path) -> None:
    path = lora(tmp_path / "rex.safetensors", **{"modelspec.architecture": architecture})
    write_gallery(path)
    assert read_by_a1111(path)["version"] == a1111
    assert read_by_manager(path)["base_model"] == manager


@pytest.mark.parametrize(
    ("steps", "step", "shown"),
    [
        ((0, 50, 100, 150), "100", 100),
        ((0, 50, 150), "100", 50),  # the newest before it: a later one shows what the file has not learned
        ((0, 50, 100), "", 100),
        ((0,), "100", None),  # the base without the adapter
        ((), "100", None),
    ],
)
def test_the_sample_is_what_the_file_itself_generated(
    steps: tuple[int, ...], step: str, shown: int | None, tmp_path: Path
) -> None:
    path = lora(tmp_path / "rex.safetensors", ss_steps=step)
    write_gallery(path, run_in(tmp_path, steps))
    sample = path.with_suffix(".preview.png")
    assert (colour_of(sample)[0] if sample.exists() else None) == shown
    assert bool(read_by_manager(path)["preview_url"]) == (shown is not None)


def test_a_picture_of_the_subject_is_never_the_sample(tmp_path: Path) -> None:
    run = run_in(tmp_path, ())
    run.subject_path.mkdir()
    Image.new("RGB", (64, 64)).save(run.subject_path / "00.jpg")
    path = lora(tmp_path / "rex.safetensors")
    write_gallery(path, run)
    assert beside(path) == {"rex.json", "rex.metadata.json"}
    assert gallery.THUMBNAIL_KEY not in shown_metadata(run, 100, METADATA, hint=True, thumbnail=True)


def test_a_sample_that_a_full_disk_cut_short_is_none(tmp_path: Path) -> None:
    run = run_in(tmp_path, (100,))
    sample = run.preview_path(100) / preview_name("subject", 0, 0)
    sample.write_bytes(sample.read_bytes()[:60])
    path = lora(tmp_path / "rex.safetensors")
    write_gallery(path, run)
    assert beside(path) == {"rex.json", "rex.metadata.json"}
    assert gallery.THUMBNAIL_KEY not in shown_metadata(run, 100, METADATA, hint=False, thumbnail=True)


def test_the_thumbnail_is_small(tmp_path: Path) -> None:
    """Also of a picture of noise, which no format makes small."""
    run = run_in(tmp_path, (100,))
    noise = np.random.default_rng(0).integers(0, 256, (600, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run.preview_path(100) / preview_name("subject", 0, 0))
    shown = shown_metadata(run, 100, METADATA, hint=False, thumbnail=True)
    head, _, content = shown.pop("modelspec.thumbnail").partition(",")
    assert shown == METADATA
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
        assert (image.format, image.size) == ("JPEG", (171, 256))
    assert len(content) < 20_000


def test_the_hint_says_words_and_strength(tmp_path: Path) -> None:
    run = run_in(tmp_path, ())
    shown = shown_metadata(run, 100, METADATA, hint=True, thumbnail=True)
    assert shown["modelspec.usage_hint"] == "Put 'sks dög' into the prompt. Recommended strength: 1."
    (run.path / "strengths.json").write_text(json.dumps({"100": {"strength": 0.8}}))
    wordless = run_in(tmp_path / "other", (), token="", class_noun="", instance_prompt="")
    shutil.copy(run.path / "strengths.json", wordless.path)
    shown = shown_metadata(wordless, 100, METADATA, hint=True, thumbnail=True)
    assert shown["modelspec.usage_hint"] == "Recommended strength: 0.8."


def test_the_strength_is_that_of_its_step(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    (run.path / "strengths.json").write_text(json.dumps({"100": {"strength": 0.8, "scores": {}}, "50": {}, "7": []}))
    assert [preferred_strength(run, step) for step in (100, 50, 7, 150)] == [0.8, None, None, None]
    path = lora(tmp_path / "rex.safetensors")
    write_gallery(path, run)
    assert read_by_a1111(path)["prompt"] == "<lora:rex:0.8> sks dög"
    assert "measured fidelity" in read_by_a1111(path)["notes"]
    assert read_by_manager(path)["strength"] == 0.8
    (run.path / "strengths.json").write_text("{")
    assert preferred_strength(run, 100) is None


# Nobody's own is replaced


def test_our_own_are_brought_up_to_date(tmp_path: Path) -> None:
    path = lora(tmp_path / "rex.safetensors")
    run = run_in(tmp_path, (50,))
    write_gallery(path)
    write_gallery(path, run, "sks cat")
    assert read_by_a1111(path)["prompt"].endswith("sks cat")
    assert colour_of(path.with_suffix(".preview.png"))[0] == 50
    Image.new("RGB", (64, 64), (99, 0, 0)).save(run.preview_path(50) / preview_name("subject", 0, 0))
    before = path.with_suffix(".json").stat().st_mtime_ns
    write_gallery(path, run, "sks cat")
    assert colour_of(path.with_suffix(".preview.png"))[0] == 99
    assert path.with_suffix(".json").stat().st_mtime_ns == before, "what is unchanged is not written"


def edited_by_a1111(path: Path) -> None:
    """Its editor reads the card, changes its own keys, and writes everything back."""
    card = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(card | {"notes": "mine"}, indent=4, ensure_ascii=False), encoding="utf-8")


def edited_by_manager(path: Path) -> None:
    read_by_manager(path.with_name(path.name.removesuffix(".metadata.json") + ".safetensors"))


def replaced(path: Path) -> None:
    path.write_text("{}")


def damaged(path: Path) -> None:
    path.write_bytes(b"\xff{")


def repainted(path: Path) -> None:
    """By a program that keeps the texts of a PNG."""
    with Image.open(path) as image:
        text = image.info
        painted = Image.new("RGB", image.size, (0, 0, 9))
    from PIL.PngImagePlugin import PngInfo

    kept = PngInfo()
    kept.add_text(OWN_KEY, text[OWN_KEY])
    painted.save(path, pnginfo=kept)


@pytest.mark.parametrize(
    ("suffix", "edit"),
    [
        (".json", edited_by_a1111),
        (".json", replaced),
        (".json", damaged),
        (".metadata.json", edited_by_manager),
        (".metadata.json", replaced),
        (".preview.png", repainted),
        (".preview.png", damaged),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_what_others_wrote_or_edited_stays(suffix: str, edit: Any, tmp_path: Path) -> None:
    path = lora(tmp_path / "rex.safetensors")
    write_gallery(path, run_in(tmp_path, (50,)))
    edit(path.with_suffix(suffix))
    kept = path.with_suffix(suffix).read_bytes()
    others = {
        file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file() and file.suffix != ".safetensors"
    }
    write_gallery(path, run_in(tmp_path / "other", (100,)), "sks cat")
    assert path.with_suffix(suffix).read_bytes() == kept
    changed = {file.name for file, content in others.items() if file.read_bytes() != content}
    assert changed == beside(path) - {path.with_suffix(suffix).name}


def test_deleting_the_run_leaves_them(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    path = lora(tmp_path / "rex.safetensors")
    write_gallery(path, run)
    files = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    RunIndex(run.path.parent).delete("rex-1")
    assert not run.path.exists()
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == files
    assert len(files) == 4


def test_a_run_may_want_none(tmp_path: Path) -> None:
    assert is_wanted(run_in(tmp_path)), "of a version that did not have the setting"
    assert not is_wanted(run_in(tmp_path / "other", (), gallery_files=False))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": " ohwx man, studio light "}, "ohwx man, studio light"),
        ({"modelspec.trigger_phrase": "a dog that " * 10}, ""),  # a caption is no trigger
        ({"modelspec.trigger_phrase": "a photo of sks dög", CONFIG_KEY: json.dumps(SETTINGS)}, "sks dög"),
        ({"modelspec.trigger_phrase": "x", CONFIG_KEY: json.dumps({"instance_prompt": "a dog"})}, "x"),
        ({"modelspec.trigger_phrase": "x", CONFIG_KEY: "{"}, "x"),
        ({}, ""),
    ],
)
def test_the_words_of_a_file_without_its_run(metadata: dict[str, str], words: str) -> None:
    assert words_for(metadata) == words


def test_the_words_are_where_the_engine_writes_them() -> None:
    assert gallery.CONFIG_KEY == CONFIG_KEY


def test_a_file_that_is_no_lora(tmp_path: Path) -> None:
    """Such as a checkpoint of a run that a full disk cut short."""
    path = tmp_path / "rex.safetensors"
    path.write_bytes(b"\x08" + b"\0" * 20)
    with pytest.raises(StorageError, match=r"rex\.safetensors"):
        write_gallery(path)


# The trainer


SHOWN: dict[str, Any] = {
    "steps": 2,
    "preview_every": 1,
    "preview_prompts": "a photo of sks dog",
    "preview_steps": 1,
    "preview_guidance": 1.0,
}
SCORED = SHOWN | {"score_clip": str(DEMO / "scorer"), "preview_every": 2}
WORDS = [PromptWords("sks", "dog")]


def trained(world: World, folder: Path, listener: Any = None, **changes: Any) -> Any:
    settings = TrainSettings(**{**COMMON, **changes})
    return train(world.base, world.subject, [], settings, paths_in(folder), "cpu", listener or Recorder(), words=WORDS)


@pytest.mark.usefixtures("quick")
def test_a_training_writes_them(world: World, tmp_path: Path) -> None:
    result = trained(world, tmp_path, **SHOWN)
    assert beside(result.path) == {"dog.preview.png", "dog.json", "dog.metadata.json"}
    sample = result.run / "previews" / "step-00000002" / "subject-00-00.png"
    with Image.open(sample) as generated, Image.open(result.path.with_suffix(".preview.png")) as shown:
        assert np.array_equal(np.asarray(generated), np.asarray(shown))
    metadata = read_adapter(result.path).metadata
    assert metadata["modelspec.trigger_phrase"] == "sks dog"
    assert metadata["modelspec.usage_hint"] == "Put 'sks dog' into the prompt. Recommended strength: 1."
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert read_by_a1111(result.path)["prompt"] == "<lora:dog:1> sks dog"
    assert read_by_manager(result.path)["words"] == ["sks dog"]


@pytest.mark.usefixtures("quick")
def test_a_training_writes_none_if_none_are_wanted(world: World, tmp_path: Path) -> None:
    plain = trained(world, tmp_path / "plain", **SHOWN, gallery_files=False, thumbnail=False)
    assert not beside(plain.path)
    assert not {"modelspec.usage_hint", "modelspec.thumbnail"} & read_adapter(plain.path).metadata.keys()
    assert not is_wanted(RunLayout(plain.run))
    again = trained(world, tmp_path / "plain", **SHOWN)
    assert (again.path, again.run) == (plain.path, plain.run), "the same run, and the same file"
    assert beside(again.path) == {"dog.preview.png", "dog.json", "dog.metadata.json"}


@pytest.mark.usefixtures("quick")
def test_cards_that_can_t_be_written_cost_no_adapter(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StorageError("The disk is full.", "Free some space.")

    monkeypatch.setattr("pack.trainer.dreambooth.write_gallery", full)
    result = trained(world, tmp_path, listener := Recorder(), **SHOWN, thumbnail=False)
    assert result.path.is_file()
    assert [event.text for event in listener.events if isinstance(event, Note) and event.warning] == [
        "The gallery files could not be written next to the adapter: The disk is full."
    ]


@pytest.mark.usefixtures("quick")
def test_the_strength_is_measured_once(world: World, tmp_path: Path) -> None:
    """By the rule that picks checkpoints, and where a model scores; what is generated for it leaves no trace."""
    result = trained(world, tmp_path, listener := Recorder(), **SCORED)
    record = json.loads((result.run / "strengths.json").read_text())["2"]
    scores = [record["scores"][f"{strength:g}"] for strength in STRENGTHS]
    assert record["strength"] == STRENGTHS[best_index(scores)]
    assert len({json.dumps(metrics) for metrics in scores}) == len(STRENGTHS), "each strength generates others"
    assert scores[0]["drift (CLIP)"] < scores[-1]["drift (CLIP)"]
    assert not (result.run / "strengths").exists()
    assert read_by_manager(result.path)["strength"] == record["strength"]
    assert (
        f"Recommended strength: {record['strength']:g}." in read_adapter(result.path).metadata["modelspec.usage_hint"]
    )
    assert any(event.name == "strength 0.6" for event in listener.events if isinstance(event, Phase))
    again = trained(world, tmp_path, listener := Recorder(), **SCORED)
    assert again.path == result.path
    assert not [event for event in listener.events if isinstance(event, Phase)]


@dataclasses.dataclass
class StopsInPhase:
    """Asks to stop as soon as a phase has that name."""

    name: str
    found: bool = False

    def report(self, event: Any) -> None:
        self.found = self.found or (isinstance(event, Phase) and event.name == self.name)

    def should_stop(self) -> bool:
        return self.found


@pytest.mark.usefixtures("quick")
def test_a_stop_while_strengths_are_measured_loses_no_step(world: World, tmp_path: Path) -> None:
    with pytest.raises(CancelledError):
        trained(world, tmp_path, StopsInPhase("strength 0.8"), **SCORED)
    assert not list((tmp_path / "loras").glob("*"))
    result = trained(world, tmp_path, listener := Recorder(), **SCORED)
    assert result.started_from == 2
    assert not listener.losses
    assert "strengths" not in {path.name for path in result.run.iterdir()}
    assert preferred_strength(RunLayout(result.run), 2) is not None


@pytest.mark.usefixtures("quick")
def test_a_strength_that_can_t_be_measured_is_1(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as on a card that has room for the training alone."""

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise StorageError("Out of memory.", "Buy some.")

    monkeypatch.setattr("pack.trainer.training.strength.CachedGenerator.generate", out_of_memory)
    result = trained(world, tmp_path, listener := Recorder(), **SCORED)
    assert read_by_manager(result.path)["strength"] == 1.0
    assert any("could not be measured" in event.text for event in listener.events if isinstance(event, Note))
    assert not (result.run / "strengths.json").exists()


@pytest.mark.usefixtures("quick")
def test_no_strength_is_measured_where_the_base_has_no_room(world: World, tmp_path: Path) -> None:
    """Or where the file holds more than what was trained."""
    result = trained(world, tmp_path, listener := Recorder(), **SCORED, swap_blocks=1)
    assert read_by_manager(result.path)["strength"] == 1.0
    assert not any("strength" in event.name for event in listener.events if isinstance(event, Phase))
