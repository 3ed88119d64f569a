"""Settings that hold a path are marked, whatever their type, and it is read in one way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from make_settings_page import COMMANDS
from pack.trainer.__main__ import parse
from pack.trainer.cli.flags import settings_from
from pack.trainer.core.errors import SettingsError
from pack.trainer.settings.base import Settings, field_extra
from pack.trainer.settings.data import SubjectTable
from pack.trainer.settings.merge import MergeCommand
from pack.trainer.settings.train import TrainCommand

KINDS: dict[str, type[Settings]] = {**COMMANDS, "subject": SubjectTable}
FIELDS = [(command, name) for command, kind in KINDS.items() for name in kind.model_fields]
TEXTS = {
    "base_lora",
    "embedding",
    "clip",
    "dino",
    "lora",
    "loras",
    "model",
    "runs",
    "score_clip",
    "score_dino",
}
"""Texts that may be a path: FILE:STRENGTH, or a folder in place of a hub name."""


def parts_of(annotation: Any) -> set[Any]:
    return {annotation}.union(*(parts_of(part) for part in get_args(annotation)))


@pytest.mark.parametrize(("command", "name"), FIELDS)
def test_every_path_is_marked(command: str, name: str) -> None:
    is_path = Path in parts_of(KINDS[command].model_fields[name].annotation)
    assert field_extra(KINDS[command], name)["path"] == (is_path or name in TEXTS)


WORK = {"base": "model.safetensors", "images": "dog"}


@pytest.mark.parametrize("text", ["$DOGS/rex", "${DOGS}/rex", "%DOGS%/rex", "x/$DOGS"])
@pytest.mark.parametrize("name", ["images", "output_dir", "score_clip", "base_lora"])
def test_a_variable_that_only_a_shell_replaces_is_refused(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name would be made, or looked for in vain."""
    monkeypatch.setenv("DOGS", "/home/jane/dogs")
    values = {**WORK, "preview_every": 1, name: [text] if name == "base_lora" else text}
    with pytest.raises(SettingsError) as caught:
        TrainCommand.checked(values)
    meant = re.sub(r"\$DOGS|\$\{DOGS\}|%DOGS%", "/home/jane/dogs", text)
    assert f"environment variables are not expanded; write {meant}" in caught.value.problem
    assert name in caught.value.problem


def test_a_dollar_is_a_character_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOGS", "/home/jane/dogs")
    (tmp_path / "$DOGS").mkdir()
    for text in ("$100 dogs", "pri$e", "100%", "$NO_SUCH_VARIABLE/x", str(tmp_path / "$DOGS")):
        assert TrainCommand.checked({**WORK, "images": text}).images == Path(text)


@pytest.mark.parametrize(
    ("kind", "values", "name"),
    [
        (TrainCommand, {**WORK, "base_lora": ["~/x.safetensors:0.5"]}, "base_lora"),
        (TrainCommand, {**WORK, "preview_every": 1, "score_dino": "~/x.safetensors:0.5"}, "score_dino"),
        (MergeCommand, {"loras": ["~/x.safetensors:0.5"], "output": "y.safetensors"}, "loras"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_home_folder_is_found_in_texts_too(
    kind: type[Settings], values: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    monkeypatch.setenv("USERPROFILE", "/home/jane")
    chosen = getattr(kind.checked(values), name)
    assert (chosen if isinstance(chosen, str) else chosen[0]) == "/home/jane/x.safetensors:0.5"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a settings file, pictures and an adapter, and another from which the command runs."""
    folder = tmp_path / "project"
    (folder / "dog").mkdir(parents=True)
    (folder / "style.safetensors").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def from_file(project: Path, text: str, *flags: str) -> TrainCommand:
    (project / "run.toml").write_text(text, encoding="utf-8")
    return settings_from(parse(["train", str(project / "run.toml"), *flags]), TrainCommand)


def test_paths_in_a_settings_file_count_from_the_current_folder(project: Path) -> None:
    Path("dog").mkdir()
    chosen = from_file(project, 'base = "model.safetensors"\nimages = "dog"\noutput_dir = "out"\n')
    assert (chosen.images, chosen.output_dir) == (Path("dog"), Path("out"))


@pytest.mark.parametrize(
    "text",
    [
        'images = "dog"\n',
        'images = "./dog"\n',
        'images = "y"\nbase_lora = ["style.safetensors:0.8"]\n',
        'images = "y"\nbase_lora = ["style.safetensors:0.8:-1"]\n',
        'images = "y"\nstart_from = "style.safetensors"\n',
        '[[subject]]\nimages = "dog"\n',
    ],
)
def test_one_that_leads_somewhere_from_the_file_alone_is_refused(project: Path, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        from_file(project, f'base = "model.safetensors"\n{text}')
    assert str(Path.cwd()) in caught.value.problem
    assert str(project) in caught.value.remedy
    meant = caught.value.remedy.split("'")[1]
    assert Path(meant).exists()


def test_the_remedy_works(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f'base = "model.safetensors"\nimages = "{(project / "dog").as_posix()}"\n'
    assert from_file(project, text).images == project / "dog"
    monkeypatch.chdir(project)
    assert from_file(project, 'base = "model.safetensors"\nimages = "dog"\n').images == Path("dog")


def test_a_flag_wins_before_paths_are_looked_for(project: Path) -> None:
    assert from_file(project, 'base = "x"\nimages = "dog"\n', "--images=cat").images == Path("cat")
