"""What is shown never ends a run: characters that the console lacks, a reader that has left, no console at all."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from pack.trainer.__main__ import main
from pack.trainer.cli.console import PatientConsole
from safetensors.torch import save_file

NAME = "犬 Hündin 😀"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A small LoRA whose path no single-byte encoding has."""
    path = tmp_path / f"{NAME}.safetensors"
    module = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{module}.lora_down.weight": torch.ones(2, 4), f"{module}.lora_up.weight": torch.ones(4, 2)}
    save_file({**tensors, f"{module}.alpha": torch.tensor(2.0)}, path, {"ss_tag_frequency": NAME})
    return path


class Stream(io.TextIOWrapper):
    """A text stream of some encoding whose bytes stay at hand."""

    def __init__(self, encoding: str, raw: io.BufferedIOBase | None = None) -> None:
        self.raw_bytes = raw or io.BytesIO()
        super().__init__(self.raw_bytes, encoding, "strict", write_through=True)  # type: ignore[arg-type]

    @property
    def shown(self) -> str:
        assert isinstance(self.raw_bytes, io.BytesIO)
        return self.raw_bytes.getvalue().decode(self.encoding)


class Broken(io.BytesIO):
    """Takes nothing."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, content: Any) -> int:
        raise self.error


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Any], None]:
    def use(output: Any, errors: Any) -> None:
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "stderr", errors)

    return use


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932", "utf-8", "utf-16"])
def test_characters_that_the_console_lacks_are_escaped(
    encoding: str, adapter: Path, streams: Callable[[Any, Any], None]
) -> None:
    output, errors = Stream(encoding), Stream(encoding)
    streams(output, errors)
    assert main(["convert", str(adapter), "--output", str(adapter.with_name(f"{NAME} 2.safetensors"))]) == 0
    [line] = output.shown.split("\n")[:-1]
    shown = line.encode("ascii", "backslashreplace").decode()
    assert shown == str(adapter.with_name(f"{NAME} 2.safetensors")).encode("ascii", "backslashreplace").decode()
    assert (NAME in output.shown) == (encoding in ("utf-8", "utf-16"))
    assert (output.errors, errors.errors) == ("strict", "strict")  # they are left as they were
    assert sys.stdout is output


def test_an_error_is_shown_as_well(streams: Callable[[Any, Any], None]) -> None:
    output, errors = Stream("ascii"), Stream("ascii")
    streams(output, errors)
    assert main(["inspect", f"{NAME}.safetensors"]) == 1
    assert "\\u72ac H\\xfcndin" in errors.shown
    assert "\nfix: " in errors.shown


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_stays_json(encoding: str, adapter: Path, streams: Callable[[Any, Any], None]) -> None:
    output = Stream(encoding)
    streams(output, Stream(encoding))
    assert main(["inspect", str(adapter), "--json"]) == 0
    assert json.loads(output.shown)["metadata"]["ss_tag_frequency"] == NAME


def test_bytes_of_a_name_that_is_not_utf_8_stay_what_they_are(streams: Callable[[Any, Any], None]) -> None:
    output = Stream("utf-8")
    streams(output, Stream("utf-8"))
    with PatientConsole():
        sys.stdout.write("caf\udce9.png \ud800\n")
    assert output.raw_bytes.getvalue() == b"caf\xe9.png \\ud800\n"  # type: ignore[attr-defined]


def test_there_may_be_no_console(adapter: Path, streams: Callable[[Any, Any], None]) -> None:
    """As under pythonw."""
    streams(None, None)
    assert main(["inspect", str(adapter)]) == 0
    assert main(["inspect", "no-such-file"]) == 1
    assert main(["convert", str(adapter), "--output", str(adapter.with_name("2.safetensors"))]) == 0
    assert (sys.stdout, sys.stderr) == (None, None)


def test_the_terminal_may_be_closed(adapter: Path, streams: Callable[[Any, Any], None]) -> None:
    output = Stream("utf-8")
    streams(output, Stream("utf-8", Broken(OSError(5, "Input/output error"))))
    assert main(["convert", str(adapter), "--output", str(adapter.with_name("2.safetensors"))]) == 0
    assert output.shown.rstrip() == str(adapter.with_name("2.safetensors"))
    closed = Stream("utf-8")
    closed.close()
    streams(closed, closed)
    assert main(["convert", str(adapter), "--output", str(adapter.with_name("3.safetensors"))]) == 1
    assert adapter.with_name("3.safetensors").is_file()


def test_a_reader_that_has_enough_is_no_error(adapter: Path, streams: Callable[[Any, Any], None]) -> None:
    errors = Stream("utf-8")
    streams(Stream("utf-8", Broken(BrokenPipeError(32, "Broken pipe"))), errors)
    assert main(["inspect", str(adapter)]) == 0
    assert errors.shown == ""


def test_output_that_a_full_disk_does_not_take_is_one(adapter: Path, streams: Callable[[Any, Any], None]) -> None:
    errors = Stream("utf-8")
    streams(Stream("utf-8", Broken(OSError(28, "No space left on device"))), errors)
    assert main(["inspect", str(adapter)]) == 1
    assert "No space left on device" in errors.shown
    assert errors.shown.startswith("error: ")


PROGRAM = [sys.executable, "-m", "trainer"]


def environment(**values: str) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_"))}, **values}


TERMINALS = {
    "Windows' code page": environment(PYTHONUTF8="0", PYTHONIOENCODING="cp1252"),
    "C locale": environment(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C"),
}


@pytest.mark.slow  # starts processes and trains
@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_training_ends_well_on_any_console(
    terminal: str, tiny_checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["train", "--base", tiny_checkpoint, "--images", picture_folder(), "--steps", "1", "--resolution", "64"]
    words += ["--output-dir", tmp_path / NAME, "--rank", "2", "--device", "cpu"]
    if terminal == "C locale" and not sys.prefix.isascii():
        pytest.skip("torch can't be imported from such a path in this locale")
    done = subprocess.run([*PROGRAM, *words], capture_output=True, cwd=ROOT, env=TERMINALS[terminal], check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    path = tmp_path / NAME / "my-subject.safetensors"
    assert path.is_file()
    assert done.stdout.strip() in (
        str(path).encode(),
        str(path).encode("cp1252", "backslashreplace"),
        str(path).encode("ascii", "backslashreplace"),
    )


@pytest.mark.slow  # starts a process
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere words are always text")
def test_words_that_the_terminal_gives_as_bytes_are_refused(tmp_path: Path) -> None:
    words = ["train", "--base", "x", "--images", "y", "--name", NAME]
    done = subprocess.run([*PROGRAM, *words], capture_output=True, cwd=ROOT, env=TERMINALS["C locale"], check=False)
    assert done.returncode == 1
    assert b"--name: contains bytes that are not valid text" in done.stderr
    assert b"LC_ALL=C.UTF-8" in done.stderr


@pytest.mark.slow  # starts processes and trains
@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize("tail", ["2>&1 | head -c 1", ">&- 2>&-", "2>/dev/full"])
def test_a_training_ends_well_when_nobody_reads(
    tail: str, tiny_checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    words = f"--base '{tiny_checkpoint}' --images '{picture_folder()}' --output-dir '{tmp_path / 'out'}' --device cpu"
    shell = f"set -o pipefail; '{sys.executable}' -m trainer train {words} --steps 2 --resolution 64 --rank 2 {tail}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr + done.stdout
    assert b"Exception ignored" not in done.stderr + done.stdout
    assert (tmp_path / "out" / "my-subject.safetensors").is_file()


@pytest.mark.slow  # starts a process
@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_a_long_list_may_be_cut_off() -> None:
    shell = f"set -o pipefail; '{sys.executable}' -m trainer train --help | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
