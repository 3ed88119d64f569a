"""Nothing private leaves in a file that people share: no path of any setting, and no part of one.

Every setting that can hold a path is given one below folders with telling names. What lies outside of the runs' own
folders afterwards, and what a tracker was sent, holds none of these names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import sd15_checkpoint
from helpers import DEMO, ROOT, TINY
from pack.trainer.adapters.kohya import read_adapter, write_adapter
from pack.trainer.settings import evaluate, merge, train
from pack.trainer.settings.base import Settings, field_extra
from pack.trainer.settings.sharing import CONFIG_KEY, SHARED_TEXT, shareable
from safetensors import safe_open
from shell import Shell
from worlds import noisy_pictures

SECRET = "anna-private"  # part of the name of every folder
COMMANDS = (
    train.TrainCommand,
    merge.MergeCommand,
    merge.LearnedMergeCommand,
    merge.ResizeCommand,
    merge.ExtractCommand,
    evaluate.CompareCommand,
    evaluate.DreamBenchCommand,
)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of somebody with everything that a training can name, each in a folder of its own."""
    home = tmp_path / SECRET
    (home / f"models-{SECRET}").mkdir(parents=True)
    sd15_checkpoint(home / f"models-{SECRET}" / "tiny.safetensors", size=TINY)
    shutil.copytree(DEMO / "base" / "tokenizer", home / f"tokenizer-{SECRET}")
    shutil.copytree(DEMO / "scorer", home / f"scorer-{SECRET}")
    noisy_pictures(home / f"rex-{SECRET}", 3, 0)
    noisy_pictures(home / f"dogs-{SECRET}", 2, 50)
    return home


def common(home: Path) -> list[object]:
    """Flags of every training."""
    return [
        *("--base", home / f"models-{SECRET}" / "tiny.safetensors"),
        *("--tokenizer", home / f"tokenizer-{SECRET}"),
        *("--resolution", 64, "--steps", 2, "--rank", 2, "--targets", "attention", "--device", "cpu"),
    ]


def everything(home: Path) -> list[object]:
    """Flags with a path for every setting of `train` that takes one together with the others."""
    return [
        *common(home),
        *("--images", home / f"rex-{SECRET}", "--class-images", home / f"dogs-{SECRET}"),
        *("--class-prompt", "a photo of a dog", "--log-with", "tensorboard"),
        *("--score-clip", home / f"scorer-{SECRET}", "--preview-every", 2, "--preview-steps", 1),
        *("--output-dir", home / f"out-{SECRET}"),
    ]


def shared_files(home: Path) -> Iterator[Path]:
    """The files that a command wrote, without the runs' own folders and the class pictures."""
    for path in (home / f"out-{SECRET}").rglob("*"):
        parts = path.relative_to(home / f"out-{SECRET}").parts
        if path.is_file() and not {"runs", "class-pictures", "pictures"} & set(parts):
            yield path


def assert_tells_nothing(path: Path) -> None:
    content = path.read_bytes()
    for spelling in (SECRET, SECRET.encode("utf-16-le").decode("latin-1"), SECRET.upper()):
        assert spelling.encode("latin-1") not in content, f"{path.name} tells the name of a folder"


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_trained_file_tells_no_path(home: Path, shell: Shell) -> None:
    """By flags, going on from an adapter, stacked on one, and combined with it."""
    out = home / f"out-{SECRET}"
    assert shell("train", *everything(home), "--name", "first") == 0, shell.errors
    first = out / "first.safetensors"
    further: dict[str, list[object]] = {
        "gone-on": ["--start-from", first],
        "stacked": ["--base-lora", f"{first}:0.5"],
        "combined": ["--base-lora", first, "--combine"],
    }
    for name, flags in further.items():
        assert shell("train", *everything(home), *flags, "--name", name) == 0, shell.errors
    files = {path.name: path for path in shared_files(home)}
    endings = (".safetensors", ".json", ".metadata.json", ".preview.png")
    assert set(files) == {f"{name}{ending}" for name in ("first", *further) for ending in endings}
    for path in files.values():
        assert_tells_nothing(path)
        if path.suffix == ".safetensors":
            assert "tiny" in metadata(path)["ss_sd_model_name"]


@pytest.mark.usefixtures("quick")
def test_tables_of_subjects_tell_no_path(home: Path, shell: Shell) -> None:
    """Their prompts are told, the folders of their pictures are not."""
    table = home / "run.toml"
    table.write_text(
        f"""
        name = "two"
        [[subject]]
        images = '{home / f"rex-{SECRET}"}'
        class_images = '{home / f"dogs-{SECRET}"}'
        class_prompt = "a photo of a dog"
        [[subject]]
        images = '{home / f"dogs-{SECRET}"}'
        instance_prompt = "a photo of rraj cat"
        """,
        encoding="utf-8",
    )
    assert shell("train", table, *common(home), "--output-dir", home / f"out-{SECRET}") == 0, shell.errors
    *cards, path = sorted(shared_files(home), key=lambda file: file.suffix == ".safetensors")
    assert {card.name for card in cards} == {"two.json", "two.metadata.json"}
    for file in (path, *cards):
        assert_tells_nothing(file)
    assert "rraj cat" in metadata(path)["dreambooth.config"]


@pytest.mark.usefixtures("quick")
def test_what_a_tracker_is_sent_holds_no_path(home: Path, shell: Shell) -> None:
    assert shell("train", *everything(home), "--name", "logged") == 0, shell.errors
    events = list((home / f"out-{SECRET}" / "runs").glob("*/logs/**/*tfevents*"))
    assert events
    for path in events:
        assert_tells_nothing(path)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_merged_files_reports_and_tables_tell_no_path(home: Path, shell: Shell) -> None:
    out = home / f"out-{SECRET}"
    for name in ("first", "second"):
        assert shell("train", *everything(home), "--name", name, "--seed", len(name)) == 0, shell.errors
    pair = [out / "first.safetensors", out / "second.safetensors"]
    base = ["--base", home / f"models-{SECRET}" / "tiny.safetensors"]
    tokenizer = ["--tokenizer", home / f"tokenizer-{SECRET}"]
    scorer = ["--clip", home / f"scorer-{SECRET}"]
    report = ["--report", out / "report.png"]
    generation: list[object] = [
        *("--subject", home / f"rex-{SECRET}", "--output-dir", out, "--prompts", "a photo of sks dog"),
        *("--size", 64, "--count", 1, "--steps", 1, "--device", "cpu"),
    ]
    commands: list[list[object]] = [
        ["merge", *pair, "--method", "svd", "--rank", 2, "--output", out / "merged.safetensors", *report],
        ["resize", pair[0], "--rank", 1, "--output", out / "resized.safetensors"],
        ["convert", pair[0], "--output", out / "converted.safetensors"],
        ["fuse", *base, "--lora", pair[0], "--output", out / "fused.safetensors"],
        [
            "extract",
            "--tuned",
            out / "fused.safetensors",
            *base,
            "--rank",
            1,
            "--output",
            out / "extracted.safetensors",
        ],
        ["compare", *pair, *base, *tokenizer, *scorer, *generation],
        ["score", home / f"rex-{SECRET}", "--prompt", "a photo of a dog", *scorer, "--output", out / "scores.csv"],
        ["score", home / f"rex-{SECRET}", "--prompt", "a photo of a dog", *scorer, "--output", out / "scores.json"],
    ]
    for command in commands:
        assert shell(*command) == 0, (command[0], shell.errors)
    names = {path.suffix for path in shared_files(home)}
    assert {".safetensors", ".png", ".csv", ".json", ".md"} <= names
    for path in shared_files(home):
        if path.suffix in (".csv", ".json", ".md"):  # these name the models that scored, as their folders are called
            assert str(home) not in path.read_text(encoding="utf-8").replace("\\\\", "\\")
        else:
            assert_tells_nothing(path)


def settings_with(command: type[Settings]) -> Settings:
    """A command's settings, every field that may hold text or a path being one that would tell something."""
    told: dict[str, Any] = {}
    for name, field in command.model_fields.items():
        value = field.get_default(call_default_factory=True)
        told[name] = SECRET if value is None or not isinstance(value, bool | int | float) else value
    return command.model_construct(**told)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_only_what_is_listed_is_shared(command: type[Settings]) -> None:
    """Whatever a field's value is: only numbers, choices and the listed texts get through."""
    shared = shareable(settings_with(command))
    for name in shared:
        assert not field_extra(command, name)["path"]
    texts = {name for name, value in shared.items() if value == SECRET}
    choices = {name for name in texts if "Literal" in str(command.model_fields[name].annotation)}
    numbers = {name for name in texts if command.model_fields[name].annotation in (float | None, int | None)}
    assert texts - choices - numbers <= SHARED_TEXT


def test_no_listed_text_is_a_path() -> None:
    for command in COMMANDS:
        for name in SHARED_TEXT & set(command.model_fields):
            assert not field_extra(command, name)["path"], name


def test_a_file_of_an_older_version_is_written_without_its_paths(tmp_path: Path) -> None:
    """Up to 0.4 the configuration held them; it is kept but for these, whatever writes the file again."""
    source = read_adapter(ROOT / "tests" / "golden" / "versions" / "0.4.0" / "lora.safetensors")
    old = json.loads(source.metadata[CONFIG_KEY])
    assert {"images", "output_dir"} <= set(old)
    table = {"images": f"/home/{SECRET}/rex", "class_images": SECRET, "instance_prompt": "a photo of sks dog"}
    old |= {"score_clip": f"/home/{SECRET}/clip", "base_lora": [f"{SECRET}.safetensors"], "subject": [table]}
    changed = replace(source, metadata={**source.metadata, CONFIG_KEY: json.dumps(old)})
    write_adapter(tmp_path / "again.safetensors", changed, torch.float16)
    assert_tells_nothing(tmp_path / "again.safetensors")
    new = json.loads(metadata(tmp_path / "again.safetensors")[CONFIG_KEY])
    assert new["subject"] == [{"instance_prompt": "a photo of sks dog"}]
    assert {name: value for name, value in old.items() if name in new and name != "subject"} == {
        name: value for name, value in new.items() if name != "subject"
    }
    assert not {name for name in set(old) - set(new) if not field_extra(train.TrainCommand, name)["path"]}
