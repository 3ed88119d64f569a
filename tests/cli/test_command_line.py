"""The command line from end to end, on the smallest real model."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import HANGS, ROOT
from pack.trainer.__main__ import main
from pack.trainer.cli.train import parse_strength
from pack.trainer.core.errors import SettingsError
from pack.trainer.settings.train import GenerateCommand, PriorsCommand, TrainCommand, field_extra
from PIL import Image
from safetensors.torch import load_file
from shell import Shell
from worlds import noisy_pictures

COMMANDS = {"train": TrainCommand, "priors": PriorsCommand, "generate": GenerateCommand}
TRAIN_FLAGS = [
    "--base",
    "--images",
    "--instance-prompt",
    "--class-prompt",
    "--prior-count",
    "--name",
    "--output-dir",
    "--steps",
    "--learning-rate",
    "--rank",
    "--alpha",
    "--resolution",
    "--batch-size",
    "--gradient-accumulation",
    "--precision",
    "--seed",
    "--checkpoint-every",
    "--keep-checkpoints",
    "--resume",
    "--adapter",
    "--targets",
    "--conv-rank",
    "--block-ranks",
    "--start-from",
    "--base-lora",
    "--combine",
    "--text-encoder-lr",
    "--text-encoder-2-lr",
    "--vae",
    "--prediction-type",
    "--clip-skip",
]


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def train_words(tiny_checkpoint: Path, picture_folder: Callable[..., Path], tmp_path: Path) -> list[str]:
    words = ["train", "--device", "cpu", "--resolution", "64", "--rank", "2", "--steps", "2", "--name", "dog"]
    folders = {"--base": tiny_checkpoint, "--images": picture_folder(), "--output-dir": tmp_path / "out"}
    return [*words, *(str(word) for pair in folders.items() for word in pair)]


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words of a training that has ended, without the output folder, and this folder; to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["train", "--device", "cpu", "--resolution", "64", "--rank", "2", "--steps", "2", "--name", "dog"]
    words += ["--learning-rate", "0.1", "--save-precision", "fp32", "--base", str(tiny_checkpoint)]
    words += ["--images", str(noisy_pictures(folder / "pictures", 3, 0))]
    assert main([*words, "--output-dir", str(folder / "out")]) == 0
    return words, folder / "out"


def draw_words(base: Path, output: Path) -> list[str]:
    words = ["generate", "--device", "cpu", "--prompt", "a photo of sks dog", "--size", "64x96", "--steps", "2"]
    return [*words, "--base", str(base), "--output", str(output)]


@pytest.mark.slow
def test_a_picture_is_replaced_whole_or_not_at_all(
    run: Shell, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "dog.PNG"
    output.write_bytes(b"an older picture")

    def save_half(self: Image.Image, path: Path, format: str) -> None:
        assert format == "PNG"
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save_half)
    assert run(*draw_words(tiny_checkpoint, output)) == 1
    assert "No space left on the disk" in run.errors
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["dog.PNG"]
    assert output.read_bytes() == b"an older picture"


@pytest.mark.slow
def test_train_generate_inspect(run: Shell, train_words: list[str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    more = ["--class-prompt", "a dog", "--prior-count", "1", "--prior-steps", "1", "--learning-rate", "0.1"]
    assert run(*train_words, *more) == 0, run.errors
    adapter = tmp_path / "out" / "dog.safetensors"
    assert run.lines == [str(adapter)]
    assert "warning" not in run.errors
    assert len(list((tmp_path / "out" / "class-pictures").glob("*/*.png"))) == 1
    assert len(list((tmp_path / "out" / "runs").glob("dog-*/step-00000002"))) == 1

    drawn: dict[str, bytes] = {}
    for name, lora in {"plain": [], "half": [f"{adapter}:0.5"], "whole": [adapter], "off": [f"{adapter}:0"]}.items():
        output = tmp_path / f"{name}.png"
        assert run(*draw_words(tiny_checkpoint, output), *(word for file in lora for word in ("--lora", file))) == 0
        assert run.lines == [str(output)]
        with Image.open(output) as image:
            assert image.size == (64, 96)
            drawn[name] = image.tobytes()
    assert drawn["plain"] == drawn["off"]
    assert len(set(drawn.values())) == 3

    assert run("inspect", adapter) == 0
    assert "LoRA" in run.output
    assert "a photo of sks dog" in run.output
    assert run("inspect", adapter, "--json") == 0
    facts = json.loads(run.output)
    assert (facts["kind"], facts["rank"], facts["alpha"]) == ("LoRA", [2], [2.0])
    assert facts["metadata"]["ss_steps"] == "2"
    assert run("inspect", tiny_checkpoint, "--json") == 0
    assert json.loads(run.output)["family"] == "Stable Diffusion 1.x"


@pytest.mark.slow
def test_a_learned_word_is_drawn_from_either_file(
    run: Shell, train_words: list[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    more = ["--token-vectors", "2", "--token-lr", "0.1", "--learning-rate", "1e-9", "--class-noun", "dog"]
    assert run(*train_words, *more) == 0, run.errors
    embedding = tmp_path / "out" / "embeddings" / "dog-sks.safetensors"
    assert f"Embedding of 'sks' (embedding:dog-sks in ComfyUI): {embedding}" in run.errors
    drawn: dict[str, bytes] = {}
    words = {
        "plain": [],
        "adapter": ["--lora", tmp_path / "out" / "dog.safetensors"],
        "embedding": ["--embedding", embedding, "--prompt", "a photo of dog-sks dog"],
    }
    for name, more in words.items():
        output = tmp_path / f"{name}.png"
        assert run(*draw_words(tiny_checkpoint, output), *more) == 0, run.errors
        drawn[name] = Image.open(output).tobytes()
    assert drawn["plain"] != drawn["adapter"]
    differences = [abs(a - b) for a, b in zip(drawn["adapter"], drawn["embedding"], strict=True)]
    assert max(differences) <= 1
    assert run("inspect", tmp_path / "out" / "dog.safetensors") == 0
    assert "sks" in run.output


@pytest.mark.slow
def test_full_fine_tuning_writes_a_checkpoint_and_an_adapter(
    run: Shell, train_words: list[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    words = [*train_words, "--adapter", "full", "--learning-rate", "1e-5", "--save-precision", "fp32"]
    assert run(*words) == 0, run.errors
    files = set((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 2
    adapter = Path(run.lines[-1])
    assert adapter in files
    [checkpoint] = files - {adapter}
    assert run("inspect", adapter, "--json") == 0
    assert json.loads(run.output)["kind"] == "LoRA"
    assert run("inspect", checkpoint, "--json") == 0
    assert json.loads(run.output)["family"] == "Stable Diffusion 1.x"
    assert set(load_file(checkpoint)) >= {n for n in load_file(tiny_checkpoint) if not n.endswith("position_ids")}
    before = {path: path.stat().st_mtime_ns for path in files}
    assert run(*words) == 0
    assert Path(run.lines[-1]) == adapter
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")} == before


def test_two_half_adapters_are_one_whole(
    run: Shell, trained: tuple[list[str], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    adapter = trained[1] / "dog.safetensors"
    for name, words in {"once": ["--lora", adapter], "twice": ["--lora", f"{adapter}:0.5"] * 2}.items():
        assert run(*draw_words(tiny_checkpoint, tmp_path / f"{name}.png"), *words) == 0
    once, twice = (Image.open(tmp_path / f"{name}.png").tobytes() for name in ("once", "twice"))
    assert max(abs(one - other) for one, other in zip(once, twice, strict=True)) <= 1


def test_same_seed_same_file(run: Shell, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in {"one": 5, "two": 5, "three": 6}.items():
        assert run(*draw_words(tiny_checkpoint, tmp_path / f"{name}.png"), "--seed", seed) == 0
    one, two, three = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_several_pictures_are_numbered_by_seed(run: Shell, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert run(*draw_words(tiny_checkpoint, tmp_path / "new" / "dog.webp"), "--count", 2, "--seed", 4) == 0
    assert run.lines == [str(tmp_path / "new" / name) for name in ("dog-000.webp", "dog-001.webp")]
    assert run(*draw_words(tiny_checkpoint, tmp_path / "new" / "alone.webp"), "--seed", 5) == 0
    files = [(tmp_path / "new" / name).read_bytes() for name in ("dog-001.webp", "alone.webp")]
    assert files[0] == files[1]


def test_priors(run: Shell, tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = ["priors", "--base", tiny_checkpoint, "--device", "cpu", "--class-prompt", "a dog", "--prior-steps", 1]
    words += ["--resolution", 64, "--output-dir", tmp_path]
    assert run(*words, "--prior-count", 2) == 0
    [folder] = run.lines
    assert Path(folder).parent == tmp_path / "class-pictures"
    assert sorted(path.name for path in Path(folder).glob("*.png")) == ["00000.png", "00001.png"]
    assert run(*words, "--prior-count", 3) == 0
    assert run.lines == [folder]
    assert len(list(Path(folder).glob("*.png"))) == 3


def test_training_takes_the_class_pictures_that_priors_made(
    run: Shell, train_words: list[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    words = ["--class-prompt", "a dog", "--prior-steps", "1", "--prior-count", "2"]
    place = ["--base", tiny_checkpoint, "--device", "cpu", "--resolution", "64", "--output-dir", tmp_path / "out"]
    assert run("priors", *place, *words) == 0
    folder = Path(run.lines[0])
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(*train_words, *words) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*") if path.is_file()} == before


def test_new_settings_reach_the_run(run: Shell, train_words: list[str], tmp_path: Path) -> None:
    """Adapter kind, layers, ranks and text encoder, given as flags, as the file tells it."""
    words = [
        "--adapter",
        "dora",
        "--targets",
        "attention",
        "--include",
        "^conv_in$",
        "--block-ranks",
        "mid_block=3:1.5",
    ]
    words += ["--exclude", "up_blocks", "--text-encoder-lr", "1e-3", "--text-encoder-until", "0.5", "--max-norm", "1"]
    assert run(*train_words, *words, "--dropout", "0.1", "--clip-skip", "2") == 0, run.errors
    assert "text encoders are frozen after step 1" in run.errors
    assert run("inspect", run.lines[-1], "--json") == 0
    facts = json.loads(run.output)
    assert facts["kind"] == "DoRA"
    assert facts["rank"] == [2, 3]
    assert facts["alpha"] == [1.5, 2.0]
    assert set(facts["modules"]) == {"unet", "text_encoder"}
    metadata = facts["metadata"]
    assert metadata["ss_clip_skip"] == "2"
    assert metadata["ss_text_encoder_lr"] == "0.001"
    assert metadata["ss_network_module"] == "lycoris.kohya"
    told = {"dora_wd": "True", "block_ranks": "mid_block=3:1.5", "exclude": "up_blocks", "include": "^conv_in$"}
    assert json.loads(metadata["ss_network_args"]).items() >= told.items()


@pytest.mark.slow
def test_training_on_top_of_adapters(run: Shell, train_words: list[str], tmp_path: Path) -> None:
    """A style first, then the subject on top of it: alone, combined with it, and gone on with."""
    fast = ["--learning-rate", "0.05", "--save-precision", "fp32"]
    assert run(*train_words, *fast, "--name", "style") == 0
    style = run.lines[-1]
    on_top = [*train_words, *fast, "--base-lora", f"{style}:0.5"]
    facts = {}
    for name, words in {
        "alone": [*on_top, "--name", "alone"],
        "both": [*on_top, "--name", "both", "--combine"],
        "more": [*train_words, *fast, "--name", "more", "--start-from", style, "--seed", "1"],
    }.items():
        assert run(*words) == 0, run.errors
        assert run.lines == [str(tmp_path / "out" / f"{name}.safetensors")]
        assert run("inspect", run.lines[-1], "--json") == 0
        facts[name] = json.loads(run.output)
    assert [facts[name]["rank"] for name in ("alone", "both", "more")] == [[2], [4], [2]]
    assert len({facts[name]["hashes"]["sshs_model_hash"] for name in facts}) == 3
    runs = [path.name.rpartition("-")[2] for path in (tmp_path / "out" / "runs").iterdir()]
    assert len(runs) == 3, "combining is only another form of the same run"


def test_settings_file(run: Shell, train_words: list[str], tmp_path: Path) -> None:
    flags = dict(zip(train_words[1::2], train_words[2::2], strict=True))
    lines = [f"{name[2:]} = {value if value.isdecimal() else json.dumps(value)}\n" for name, value in flags.items()]
    (tmp_path / "run.toml").write_text("".join(lines), encoding="utf-8")
    assert run("train", tmp_path / "run.toml", "--steps", "1", "--name", "cat") == 0, run.errors
    assert run.lines == [str(tmp_path / "out" / "cat.safetensors")]
    assert len(list((tmp_path / "out" / "runs").glob("cat-*/step-00000001"))) == 1


def test_finished_run_is_not_trained_twice(run: Shell, trained: tuple[list[str], Path], tmp_path: Path) -> None:
    words, folder = trained
    adapter = Path(shutil.copytree(folder, tmp_path / "out")) / "dog.safetensors"
    content = adapter.read_bytes()
    assert run(*words, "--output-dir", tmp_path / "out") == 0
    assert "already finished" in run.errors
    assert run.lines == [str(adapter)]
    assert adapter.read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cat", "cat [v1]"])
def test_adapters_of_one_name_stand_side_by_side(run: Shell, train_words: list[str], tmp_path: Path, name: str) -> None:
    files = []
    for seed in (1, 2, 2, 1):
        assert run(*train_words, "--name", name, "--steps", "1", "--seed", seed) == 0
        files += [Path(line).name for line in run.lines]
    first, second = f"{name}.safetensors", f"{name}-2.safetensors"
    assert files == [first, second, second, first]
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {first, second}


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ([], 2, "COMMAND"),
        (["trian"], 2, "train"),
        (["train", "--stepss", "3"], 2, "--stepss"),
        (["train", "--ste", "3"], 2, "--ste"),
        (["train", "run.toml", "second.toml"], 2, "second.toml"),
        (["train"], 1, "base"),
        (["train", "no-such-file.toml"], 1, "no-such-file.toml"),
        (["train", "--base", "no-such-model", "--images", "no-such-folder"], 1, "no-such-folder"),
        (["generate", "--base", "no-such-model", "--prompt", "a dog"], 1, "no-such-model"),
        (["priors", "--base", "no-such-model", "--class-prompt", "a dog"], 1, "--prior-count"),
        (["inspect"], 2, "FILE"),
        (["inspect", "no-such-file"], 1, "no-such-file"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_exit_status_of_mistakes(
    run: Shell, words: list[str], status: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == status
    assert told in run.errors
    assert not run.output
    assert "Traceback" not in run.errors
    if status == 1:
        assert run.errors.startswith("error: ")
        assert "\nfix: " in run.errors
        assert len(run.errors.splitlines()) == 2
    assert not list(tmp_path.iterdir())


def test_inspect_of_another_file(run: Shell, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert run("inspect", tmp_path / "notes.txt") == 1
    assert "notes.txt" in run.errors


def test_help_lists_the_commands(run: Shell) -> None:
    assert run("--help") == 0
    assert all(name in run.output for name in ("train", "priors", "generate", "inspect", "demo"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag_with_unit_and_default(run: Shell, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks inside an entry
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(command, "--help", "all") == 0
    entries = re.findall(r"^  (?:-\w, )?(--[a-z0-9-]+)(.*(?:\n {8}.*)*)", run.output, re.MULTILINE)
    lines = {name: " ".join(text.split()) for name, text in entries}
    kind = COMMANDS[command]
    assert "--subject" not in lines  # tables, in settings files alone
    for name, field in kind.model_fields.items():
        if name == "subject":
            continue
        line = lines[f"--{name.replace('_', '-')}"]
        assert field.description
        assert field.description in line
        assert field_extra(kind, name)["unit"] in line
        required, default = field.is_required(), field.default
        assert ("required" if required else f"default: {'none' if default in (None, '', ()) else default}") in line
    assert "RUN.toml" in run.output
    if command == "train":
        assert set(TRAIN_FLAGS) <= set(lines)


@pytest.mark.parametrize("command", ["inspect", "demo"])
def test_help_of_the_small_commands(run: Shell, command: str) -> None:
    assert run(command, "--help") == 0
    assert {"inspect": "--json", "demo": "--output-dir"}[command] in run.output


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("dog.safetensors", "dog.safetensors", 1.0),
        ("dog.safetensors:0.8", "dog.safetensors", 0.8),
        ("dog.safetensors:-1", "dog.safetensors", -1.0),
        ("my loras/Hündin.safetensors:2", "my loras/Hündin.safetensors", 2.0),
        ("C:\\loras\\dog.safetensors", "C:\\loras\\dog.safetensors", 1.0),
        ("C:\\loras\\dog.safetensors:0.5", "C:\\loras\\dog.safetensors", 0.5),
    ],
)
def test_strength(text: str, path: str, strength: float) -> None:
    assert parse_strength(text) == (Path(path), strength)


def test_a_colon_in_a_file_name_is_no_strength(tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("Windows has no such names")
    (tmp_path / "dog:0.5").touch()
    assert parse_strength(str(tmp_path / "dog:0.5")) == (tmp_path / "dog:0.5", 1.0)


@pytest.mark.parametrize("strength", ["", "much", "nan", "inf"])
def test_a_strength_that_is_no_number(strength: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_strength(f"dog.safetensors:{strength}")
    assert f"dog.safetensors:{strength}" in caught.value.problem
    assert "0.8" in caught.value.remedy


class Program:
    """A command in a process of its own, whose messages are read as they come."""

    def __init__(self, *words: object) -> None:
        self.errors = ""
        self._seen = threading.Condition()
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, "bufsize": 0}
        self.process = subprocess.Popen([sys.executable, "-m", "trainer", *map(str, words)], **options)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for chunk in iter(lambda: self.process.stderr.read(4096), b""):
            with self._seen:
                self.errors += chunk.decode(errors="replace")
                self._seen.notify_all()

    def wait_for(self, text: str) -> None:
        with self._seen:
            assert self._seen.wait_for(lambda: text in self.errors, timeout=HANGS), self.errors

    def end(self) -> tuple[int, str]:
        status = self.process.wait(timeout=HANGS)
        self._reader.join()
        assert self.process.stdout is not None
        return status, self.process.stdout.read().decode()


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def begin(*words: object) -> Program:
        programs.append(Program(*words))
        return programs[-1]

    yield begin
    for program in programs:
        program.process.kill()
        program.process.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("heard_signals")
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_keeps_the_work_and_the_same_command_goes_on(
    run: Shell, start: Callable[..., Program], train_words: list[str], tmp_path: Path
) -> None:
    program = start(*train_words, "--steps", 1_000_000, "--checkpoint-every", 0)
    program.wait_for("loss")
    program.process.send_signal(signal.SIGINT)
    status, output = program.end()
    assert status == 130, program.errors
    assert not output
    assert "Traceback" not in program.errors
    assert "Run the same command again" in program.errors
    assert not list((tmp_path / "out").glob("*.safetensors"))
    [checkpoint] = (tmp_path / "out" / "runs").glob("dog-*/step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert step >= 1
    assert {path.name for path in checkpoint.iterdir()} >= {"adapter.safetensors", "optimizer.safetensors"}
    assert run("inspect", checkpoint / "adapter.safetensors", "--json") == 0
    assert json.loads(run.output)["metadata"]["ss_steps"] == str(step)

    assert run(*train_words, "--steps", step + 1) == 0
    assert f"Resuming from step {step}" in run.errors
    assert run.lines == [str(tmp_path / "out" / "dog.safetensors")]


def test_the_file_tells_no_local_paths(trained: tuple[list[str], Path]) -> None:
    """An adapter is made to be shared: no path stands in it, and of the base model its title alone."""
    content = (trained[1] / "dog.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert str(trained[1].parent).encode() not in content[8 : 8 + length]
    assert b"tiny.safetensors" not in content[8 : 8 + length]
    assert b'"ss_sd_model_name":"tiny"' in content[8 : 8 + length]
