"""Preservation by the base itself, from the command line: no class pictures are made, and the notes say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import DEMO, Recorder
from pack.trainer.cli.train import run_train
from pack.trainer.core.errors import SettingsError
from pack.trainer.settings.train import TrainCommand


def values(tiny_checkpoint: Path, pictures: Path, output: Path, **changes: Any) -> dict[str, Any]:
    common = {"base": tiny_checkpoint, "tokenizer": DEMO / "base" / "tokenizer", "images": pictures, "rank": 2}
    return {**common, "output_dir": output, "steps": 2, "resolution": 64, "device": "cpu", "prior": "model", **changes}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"class_prompt": "a photo of a dog", "prior_count": 4, "prior_steps": 1}])
def test_no_class_pictures_are_made(
    changes: dict[str, Any], tiny_checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    listener = Recorder()
    settings = TrainCommand.checked(values(tiny_checkpoint, picture_folder(3), tmp_path, **changes))
    result = run_train(settings, listener)
    assert result.step == 2
    assert not (tmp_path / "class-pictures").exists()
    assert any("prior_count" in note for note in listener.notes) == bool(changes)


def test_a_preset_asks_for_no_class_pictures(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from pack.trainer.models.open import open_base
    from pack.trainer.training.presets import apply_preset

    base = open_base(tiny_checkpoint, DEMO / "base" / "tokenizer")
    given = {"preset": "animal", "class_prompt": "a photo of a dog"}
    for prior, count in (("auto", 200), ("model", 0)):
        settings = TrainCommand.checked(values(tiny_checkpoint, tmp_path, tmp_path, **given, prior=prior))
        assert apply_preset(settings, base.family, Recorder()).prior_count == count


@pytest.mark.parametrize("tables", [False, True])
def test_class_pictures_that_are_not_asked_for_are_missed(tables: bool, tmp_path: Path) -> None:
    subject = {"subject": [{"images": tmp_path}]} if tables else {"images": tmp_path}
    with pytest.raises(SettingsError, match="class-pictures"):
        TrainCommand.checked({"base": tmp_path, "prior": "class-pictures", **subject})
    asked = {"prior_count": 3} if tables else {"prior_count": 3, "class_prompt": "a dog"}
    if tables:
        subject = {"subject": [{"images": tmp_path, "class_prompt": "a dog"}]}
    TrainCommand.checked({"base": tmp_path, "prior": "class-pictures", **subject, **asked})


@pytest.mark.slow
def test_a_class_prompt_says_what_captions_without_the_rare_word_show(
    tiny_checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    wanted = values(tiny_checkpoint, picture_folder(3), tmp_path, instance_prompt="rex on a chair")
    with pytest.raises(SettingsError, match="does not contain the rare word"):
        run_train(TrainCommand.checked(wanted), Recorder())
    result = run_train(TrainCommand.checked({**wanted, "class_prompt": "a photo of a dog"}), Recorder())
    assert result.step == 2
