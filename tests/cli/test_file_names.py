"""Names that can't be read or written are told, before any work where that is possible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pack.trainer.adapters.kohya import Adapter, write_adapter
from pack.trainer.adapters.layers import LoraLayer
from shell import Shell

NAME = "lora_unet_mid_block_attentions_0_proj_in"
LONG = "n" * 300


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.mark.parametrize("command", ["merge", "resize", "convert"])
@pytest.mark.parametrize("case", ["long", "long folder", "folder in the way", "file as folder"])
def test_a_name_that_cant_be_written_is_told_before_any_work(
    command: str, case: str, tmp_path: Path, run: Shell
) -> None:
    lora = tmp_path / "a.safetensors"
    write_adapter(lora, Adapter({NAME: LoraLayer(torch.ones(2, 8), torch.ones(8, 2), 2.0)}), torch.float32)
    (tmp_path / "folder.safetensors").mkdir()
    output = {
        "long": tmp_path / f"{LONG}.safetensors",
        "long folder": tmp_path / LONG / "b.safetensors",
        "folder in the way": tmp_path / "folder.safetensors",
        "file as folder": lora / "b.safetensors",
    }[case]
    words = ["--rank", "1"] if command == "resize" else []
    missing = tmp_path / "missing.safetensors"  # which would be told, too, if it were looked for first
    assert run(command, lora if case == "long" else missing, "--output", output, *words) == 1
    told = {"long": "too long", "long folder": "too long", "folder in the way": "is a folder", "file as folder": "file"}
    assert told[case] in run.errors
    assert "\nfix: " in run.errors
    assert "Traceback" not in run.errors


def test_a_long_name_of_the_input_is_told(tmp_path: Path, run: Shell) -> None:
    path = tmp_path / f"{LONG}.safetensors"
    for words in (
        ["inspect", path],
        ["convert", path, "--output", tmp_path / "o.safetensors"],
        ["fuse", "--base", path, "--lora", path, "--output", tmp_path / "o.safetensors"],
        ["extract", "--base", path, "--tuned", path, "--output", tmp_path / "o.safetensors"],
        ["merge", path, "--base", path, "--output", tmp_path / "o.safetensors"],
        ["compare", path, "--base", path, "--subject", path, "--prompts", "a", "--output-dir", tmp_path / "o"],
    ):
        assert run(*words) == 1, words
        assert run.errors.startswith("error: ") or "\nerror: " in run.errors, run.errors
        assert "Traceback" not in run.errors
