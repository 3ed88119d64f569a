"""The commands that merge and change adapters from end to end: words in, files, reports and exit codes out."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_maths import adapter_of
from helpers import ROOT
from merge_worlds import (
    ATTENTION,
    STATED,
    checkpoint,
    deltas,
    merged_model,
    parameters,
    random_adapter,
    same,
    saved,
    weights_of,
)
from pack.trainer.adapters.kohya import Adapter, read_adapter, read_header
from pack.trainer.cli.merge import _weighted_adapters
from pack.trainer.core.devices import DTYPES
from pack.trainer.core.errors import SettingsError
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from pack.trainer.settings.base import Settings
from pack.trainer.settings.merge import (
    ConvertCommand,
    ExtractCommand,
    FuseCommand,
    LearnedMergeCommand,
    MergeCommand,
    ResizeCommand,
)
from PIL import Image
from safetensors.torch import load_file, save, save_file
from shell import Shell
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick")

COMMANDS: dict[str, type[Settings]] = {
    "merge": MergeCommand,
    "learned-merge": LearnedMergeCommand,
    "resize": ResizeCommand,
    "extract": ExtractCommand,
    "convert": ConvertCommand,
    "fuse": FuseCommand,
}
POSITIONAL = {"merge": "loras", "learned-merge": "loras", "resize": "lora", "convert": "lora"}
UNET_NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN_NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT_NAME = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, a tuned one, and adapters "dog" and "größe 1" of three modules, and more."""
    folder = tmp_path_factory.mktemp("models")
    base = open_base(checkpoint(folder, "sd15"))
    pattern = f"^({UNET_NAME}|{DOWN_NAME}|{TEXT_NAME})$"
    stated = STATED["sd15"] | {"ss_sd_model_name": "sd15", "modelspec.resolution": "512x512"}
    for seed, (title, phrase) in enumerate({"dog": "a photo of sks dog", "größe 1": "pixel art"}.items()):
        adapter = random_adapter(base, pattern=pattern, seed=seed, metadata=stated)
        told = {**adapter.metadata, "modelspec.trigger_phrase": phrase, "ss_network_dim": "3"}
        saved(Adapter(adapter.layers, told), folder / f"{title}.safetensors")
    saved(random_adapter(base, "DoRA", ATTENTION), folder / "dora.safetensors")
    saved(random_adapter(base, "LoHa", ATTENTION), folder / "loha.safetensors")
    tensors = load_file(folder / "sd15.safetensors")
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    tensors[key] += torch.outer(torch.arange(64.0), torch.ones(64)) / 1000
    save_file(tensors, folder / "tuned.safetensors")
    return folder


@pytest.fixture(scope="module")
def base(models: Path) -> BaseWeights:
    return open_base(models / "sd15.safetensors")


@pytest.fixture(scope="module")
def weights(base: BaseWeights) -> dict[str, Tensor]:
    return weights_of(base)


def close(result: Path, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], limit: float = 1e-5) -> None:
    assert same(deltas(read_adapter(result), weights), expected) < limit


def alone(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return deltas(read_adapter(path), weights)


# Merging


@pytest.mark.parametrize(
    ("words", "unet", "text"),
    [
        ("", 1.0, 1.0),
        (":0.8", 0.8, 0.8),
        (":0.8:0.5", 0.8, 0.5),
        (":-1", -1.0, -1.0),
        (":-1:0", -1.0, 0.0),
        (":0:-.5", 0.0, -0.5),
        (":.5:2", 0.5, 2.0),
        (":1e-1", 0.1, 0.1),
        (":1e-1:2e0", 0.1, 2.0),
        (":+0.5:+2", 0.5, 2.0),
    ],
)
def test_strengths(
    words: str, unet: float, text: float, run: Shell, models: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    dog, other, output = models / "dog.safetensors", models / "größe 1.safetensors", tmp_path / "out.safetensors"
    assert run("merge", f"{dog}{words}", other, "--output", output, "--save-precision", "fp32") == 0, run.errors
    assert run.lines == [str(output)]
    first, second = alone(dog, weights), alone(other, weights)
    expected = {name: (text if "_te_" in name else unet) * first[name] + second[name] for name in first}
    close(output, expected, weights)
    assert "3 modules" in run.errors
    assert "dog + größe 1" in run.errors


@pytest.mark.parametrize(
    "name", ["a: b.safetensors", "1:2.safetensors", "C:\\adapters\\dog.safetensors", "ä ö:ß 0.5:0.5", "x:0.5"]
)
@pytest.mark.skipif(os.name == "nt", reason="a colon is no part of a name there")
def test_paths_with_colons(name: str, run: Shell, models: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """A file of that very name is meant, and numbers behind it are strengths."""
    odd, output = tmp_path / name, tmp_path / "out.safetensors"
    odd.write_bytes((models / "dog.safetensors").read_bytes())
    whole = alone(models / "dog.safetensors", weights)
    for words, unet, text in (("", 1.0, 1.0), (":0.25", 0.25, 0.25), (":2:3", 2.0, 3.0)):
        assert run("merge", f"{odd}{words}", "--output", output, "--save-precision", "fp32") == 0, run.errors
        expected = {name: (text if "_te_" in name else unet) * one for name, one in whole.items()}
        close(Path(run.lines[0]), expected, weights)


def test_a_windows_path_is_not_split(run: Shell, tmp_path: Path) -> None:
    """What is missing is told with the whole path."""
    for words in ("C:\\dog.safetensors", "C:/dog.safetensors:0.5", "C:/dog.safetensors:0.5:1"):
        assert run("merge", words, "--output", tmp_path / "out.safetensors") == 1
        assert words.split(":0.5")[0] in run.errors
        assert "Traceback" not in run.errors


def test_a_home_folder(
    run: Shell, models: Path, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(models))
    monkeypatch.setenv("USERPROFILE", str(models))
    output = tmp_path / "out.safetensors"
    assert run("merge", "~/dog.safetensors:0.5:0.5", "--output", output, "--save-precision", "fp32") == 0, run.errors
    close(output, {n: 0.5 * one for n, one in alone(models / "dog.safetensors", weights).items()}, weights)


def test_block_weights_belong_to_the_adapters_in_turn(
    run: Shell, models: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    dog, other, output = models / "dog.safetensors", models / "größe 1.safetensors", tmp_path / "out.safetensors"
    blocks = ["--block-weights", "down_blocks=0.5 mid_block=0", "--block-weights", "text_encoder=2 mid=-1"]
    assert run("merge", dog, f"{other}:0.5", *blocks, "--output", output, "--save-precision", "fp32") == 0, run.errors
    first, second = alone(dog, weights), alone(other, weights)
    factors = {DOWN_NAME: (0.5, 0.5), UNET_NAME: (0.0, -0.5), TEXT_NAME: (1.0, 1.0)}
    close(output, {n: a * first[n] + b * second[n] for n, (a, b) in factors.items()}, weights)
    assert run("merge", dog, *blocks, "--output", output) == 1
    assert "--block-weights is given 2 times for 1 adapters" in run.errors
    told = json.loads(read_header(output)[1]["dreambooth.merge"])
    assert [part["blocks"] for part in told["inputs"]] == [
        {"down_blocks": 0.5, "mid_block": 0.0},
        {"text_encoder": 2.0, "mid": -1.0},
    ]


@pytest.mark.parametrize("method", ["svd", "ties", "dare", "dare-ties", "prune", "orthogonal"])
def test_every_method(method: str, run: Shell, models: Path, tmp_path: Path) -> None:
    files = [models / "dog.safetensors", models / "größe 1.safetensors"]
    output = tmp_path / "out.safetensors"
    size = [] if method == "orthogonal" else ["--rank", "4", "--conv-rank", "2"]
    density = ["--density", "0.3"] if method not in ("svd", "orthogonal") else []
    assert run("merge", *files, "--method", method, *size, *density, "--output", output) == 0, run.errors
    ranks = {layer.rank for layer in read_adapter(output).layers.values()}
    assert max(ranks) <= (6 if method == "orthogonal" else 4)
    told = json.loads(read_header(output)[1]["dreambooth.merge"])
    assert told["method"] == method
    assert told.get("density") == (0.3 if density else None)
    assert ("seed" in told) == method.startswith("dare")


def test_a_kind_that_needs_the_base_is_merged_with_it(
    run: Shell, models: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    dora = models / "dora.safetensors"
    words = ["merge", f"{dora}:0.5", "--output", tmp_path / "out.safetensors", "--save-precision", "fp32"]
    assert run(*words) == 1
    assert run(*words, "--base", models / "sd15.safetensors") == 0, run.errors
    expected = {name: 0.5 * delta for name, delta in alone(dora, weights).items()}
    close(Path(run.lines[-1]), expected, weights)


def test_reports(run: Shell, models: Path, tmp_path: Path) -> None:
    words = ["merge", models / "dog.safetensors", models / "größe 1.safetensors", "--method", "svd", "--rank", "2"]
    told = tmp_path / "new folder" / "Bericht ä.json"
    assert run(*words, "--output", tmp_path / "a.safetensors", "--report", told) == 0, run.errors
    report = json.loads(told.read_text(encoding="utf-8"))
    assert report["inputs"] == ["dog", "größe 1"]
    assert {row["module"] for row in report["modules"]} == {UNET_NAME, DOWN_NAME, TEXT_NAME}
    assert set(report["blocks"]) == {"down 0", "mid", "text"}
    assert all(0 < row["kept"]["dog"] < 1.5 and 0 < row["lost"] < 1 for row in report["modules"])
    assert run(*words, "--output", tmp_path / "b.safetensors", "--report", tmp_path / "map.PNG") == 0, run.errors
    with Image.open(tmp_path / "map.PNG") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100
    assert "down 0" in run.errors


def test_results_that_exist_are_kept(run: Shell, models: Path, tmp_path: Path) -> None:
    dog, output = models / "dog.safetensors", tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    for number in (2, 3):
        for words in (["merge", dog], ["resize", dog], ["convert", dog]):
            assert run(*words, "--output", output.with_stem(words[0])) == 0, run.errors
        assert run("merge", dog, "--output", output) == 0
        assert run.lines == [str(tmp_path / f"out-{number}.safetensors")]
    assert output.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.glob("resize*")) == ["resize-2.safetensors", "resize.safetensors"]


def test_an_input_may_be_named_as_the_output(run: Shell, models: Path, tmp_path: Path) -> None:
    source = tmp_path / "dog.safetensors"
    source.write_bytes((models / "dog.safetensors").read_bytes())
    assert run("merge", f"{source}:0.5", "--output", source) == 0, run.errors
    assert run.lines == [str(tmp_path / "dog-2.safetensors")]
    assert source.read_bytes() == (models / "dog.safetensors").read_bytes()


@pytest.mark.parametrize(
    "stems",
    [["dog", "dog", "dog"], ["dog", "dog", "dog#2"], ["dog#2", "dog", "dog"], ["a#1", "a#1"], ["a#2", "a", "a"]],
    ids=str,
)
def test_adapters_of_one_name_stay_apart(stems: list[str], models: Path, tmp_path: Path) -> None:
    """Reports and metadata tell them by their titles."""
    for number, stem in enumerate(stems):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"{stem}.safetensors").write_bytes((models / "dog.safetensors").read_bytes())
    texts = [str(tmp_path / str(number) / f"{stem}.safetensors") for number, stem in enumerate(stems)]
    titles = [part.title for part in _weighted_adapters(texts, ())]
    assert len(set(titles)) == len(titles), titles


# Metadata


def kohya_hashes(path: Path) -> tuple[str, str]:
    """What kohya's `precalculate_safetensors_hashes` gives: of the file saved with its ss_ metadata alone."""
    _, metadata = read_header(path)
    content = save(load_file(path), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = int.from_bytes(content[:8], "little") + 8
    return hashlib.sha256(content[start:]).hexdigest(), hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("command", ["merge", "resize", "convert", "extract", "learned-merge"])
def test_files_say_what_they_are(command: str, run: Shell, models: Path, tmp_path: Path) -> None:
    dog, other, output = models / "dog.safetensors", models / "größe 1.safetensors", tmp_path / "out.safetensors"
    words: dict[str, list[object]] = {
        "merge": [dog, f"{other}:0.5:0.25"],
        "resize": [dog, "--rank", "2"],
        "convert": [dog],
        "extract": ["--base", models / "sd15.safetensors", "--tuned", models / "tuned.safetensors"],
        "learned-merge": [dog, other, "--base", models / "sd15.safetensors", *LEARNED],
    }
    assert run(command, *words[command], "--output", output) == 0, run.errors
    _, found = read_header(output)
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == kohya_hashes(output)
    assert found["modelspec.hash_sha256"] == f"0x{found['sshs_model_hash']}"
    assert found["ss_base_model_version"] == "sd_v1"
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["ss_sd_model_name"] == "sd15"
    ranks = {layer.rank for layer in read_adapter(output).layers.values()}
    if command != "convert":
        assert found["ss_network_module"] == "networks.lora"
        assert found["ss_network_dim"] == (str(ranks.pop()) if len(ranks) == 1 else "Dynamic")
        assert found["modelspec.title"]
    phrase, sources = "a photo of sks dog", "dog"
    if command in ("merge", "learned-merge"):
        phrase, sources = f"{phrase}, pixel art", "dog, größe 1"
    if command in ("merge", "resize", "learned-merge"):
        assert found["modelspec.merged_from"] == sources
        told = json.loads(found["dreambooth.merge"])
        assert [part["title"] for part in told["inputs"]] == sources.split(", ")
        assert told["inputs"][0]["hash"] == read_header(dog)[1]["sshs_model_hash"]
        assert told["method"] == {"merge": "sum", "resize": "svd", "learned-merge": "learned"}[command]
    if command == "merge":
        assert (told["inputs"][1]["strength"], told["inputs"][1]["text_strength"]) == (0.5, 0.25)
    if command == "extract":
        assert found["modelspec.merged_from"] == "tuned"
    else:
        assert found["modelspec.trigger_phrase"] == phrase
    precision = "fp32" if command == "learned-merge" else "fp16"
    assert {tensor.dtype for tensor in load_file(output).values() if tensor.ndim} == {DTYPES[precision]}
    assert all(str(models) not in value for value in found.values())
    assert run("inspect", output) == 0
    assert "LoRA" in run.output
    assert run("inspect", output, "--json") == 0
    assert json.loads(run.output)["hashes"]["sshs_model_hash"] == found["sshs_model_hash"]


@pytest.mark.parametrize("command", ["merge", "resize", "convert", "extract"])
def test_files_have_the_precision_that_is_asked_for(command: str, run: Shell, models: Path, tmp_path: Path) -> None:
    words: dict[str, list[object]] = {
        "extract": ["--base", models / "sd15.safetensors", "--tuned", models / "tuned.safetensors"]
    }
    given = words.get(command, [models / "dog.safetensors"])
    assert run(command, *given, "--output", tmp_path / "out.safetensors", "--save-precision", "bf16") == 0, run.errors
    tensors = load_file(tmp_path / "out.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.ndim} == {torch.bfloat16}


# The other commands

LEARNED = [
    *(
        "--subject-prompt",
        "a photo of sks dog",
        "--style-prompt",
        "pixel art|a house",
        "--steps",
        "2",
        "--device",
        "cpu",
    ),
    *("--pictures", "2", "--sampling-steps", "1", "--resolution", "64", "--save-precision", "fp32"),
]


@pytest.mark.slow
def test_learned_merge(run: Shell, models: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    dog, other, output = models / "dog.safetensors", models / "größe 1.safetensors", tmp_path / "out.safetensors"
    words = ["learned-merge", f"{dog}:0.5:2", other, "--base", models / "sd15.safetensors", "--output", output]
    report = tmp_path / "report.json"
    assert run(*words, *LEARNED, "--learning-rate", "1e-8", "--report", report) == 0, run.errors
    assert run.lines == [str(output)]
    first, second = alone(dog, weights), alone(other, weights)
    expected = {name: (2 if "_te_" in name else 0.5) * one + second[name] for name, one in first.items()}
    close(output, expected, weights)
    assert json.loads(report.read_text(encoding="utf-8"))["method"] == "learned"
    assert "learned, 3 modules" in run.errors
    assert "training" in run.errors
    assert run(*words, *LEARNED, "--precision", "bf16") == 0, run.errors
    assert run.lines == [str(tmp_path / "out-2.safetensors")]


def test_resize(run: Shell, models: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    loha = models / "loha.safetensors"
    assert run("resize", loha, "--rank", "0", "--output", output, "--save-precision", "fp32") == 0, run.errors
    close(output, alone(loha, weights), weights, 1e-4)
    assert read_adapter(output).kind == "LoRA"
    base = ["--base", models / "sd15.safetensors"]
    dora = models / "dora.safetensors"
    assert run("resize", dora, "--rank", "0", "--output", output, "--save-precision", "fp32", *base) == 0, run.errors
    close(Path(run.lines[0]), alone(dora, weights), weights, 1e-4)


def test_extract(run: Shell, models: Path, tmp_path: Path) -> None:
    output, config = tmp_path / "out.safetensors", tmp_path / "run.toml"
    names = {key: str(models / f"{stem}.safetensors") for key, stem in {"base": "sd15", "tuned": "tuned"}.items()}
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**names, "output": str(output)}.items()]
    config.write_text("\n".join([*lines, "save-precision = 'fp32'", "rank = 4", ""]), encoding="utf-8")
    assert run("extract", config) == 0, run.errors
    [(name, layer)] = read_adapter(output).layers.items()
    expected = torch.outer(torch.arange(64.0), torch.ones(64)) / 1000
    assert name == UNET_NAME
    assert layer.rank == 1 or layer.rank == 4
    torch.testing.assert_close(layer.delta(), expected, rtol=0, atol=1e-5)


def test_extract_takes_biases_of_both_models_if_asked(run: Shell, models: Path, tmp_path: Path) -> None:
    tensors = load_file(models / "tuned.safetensors")
    tensors["model.diffusion_model.out.2.bias"] += torch.arange(4.0)
    save_file(tensors, tmp_path / "tuned.safetensors")
    words = ["extract", "--base", models / "sd15.safetensors", "--tuned", tmp_path / "tuned.safetensors"]
    words += ["--output", tmp_path / "out.safetensors", "--save-precision", "fp32"]
    assert run(*words, "--biases") == 0, run.errors
    [(key, vector)] = read_adapter(tmp_path / "out.safetensors").vectors.items()
    assert key == "lora_unet_conv_out.diff_b"
    torch.testing.assert_close(vector, torch.arange(4.0), rtol=0, atol=1e-6)
    assert run(*words) == 0, run.errors
    assert not read_adapter(Path(run.lines[-1])).vectors


def test_fuse(run: Shell, models: Path, base: BaseWeights, tmp_path: Path) -> None:
    dog, other, output = models / "dog.safetensors", models / "größe 1.safetensors", tmp_path / "fused.safetensors"
    words = ["fuse", "--base", models / "sd15.safetensors", "--lora", f"{dog}:0.5", "--lora", f"{other}:-1"]
    assert run(*words, "--output", output) == 0, run.errors
    assert run.lines == [str(output)]
    assert "2 adapters added to sd15.safetensors" in run.errors
    expected = merged_model(base, (read_adapter(dog), 0.5), (read_adapter(other), -1.0))
    fused = open_base(output, models / "tokenizer")
    assert same(parameters(fused.family.build(fused)), parameters(expected)) == 0
    assert run("inspect", output, "--json") == 0
    assert json.loads(run.output)["family"] == "Stable Diffusion 1.x"


def test_a_merge_by_settings_file_where_flags_win(
    run: Shell, models: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    files = [f"{models / 'dog.safetensors'}:0.5", str(models / "größe 1.safetensors")]
    output, config = tmp_path / "aus gabe.safetensors", tmp_path / "ein stellung.toml"
    config.write_text(
        f"loras = {json.dumps(files, ensure_ascii=False)}\noutput = {json.dumps(str(output))}\n"
        "block-weights = ['mid_block=0']\nmethod = 'svd'\nrank = 1\nsave_precision = 'fp32'\n",
        encoding="utf-8",
    )
    assert run("merge", "--config", config, "--rank", "0") == 0, run.errors
    first, second = (alone(models / f"{stem}.safetensors", weights) for stem in ("dog", "größe 1"))
    expected = {n: (0 if "mid_block" in n else 0.5) * one + second[n] for n, one in first.items()}
    close(output, expected, weights, 1e-4)
    assert run("merge", models / "dog.safetensors", "--config", config) == 0, run.errors
    assert {layer.rank for layer in read_adapter(Path(run.lines[0])).layers.values()} == {1}
    assert "dog: svd" in run.errors


def test_flags_may_stand_before_the_files(run: Shell, models: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    files = [models / "dog.safetensors", models / "größe 1.safetensors"]
    assert run("merge", "--output", output, "--method", "sum", *files) == 0, run.errors
    assert "dog + größe 1" in run.errors
    assert run("resize", "--output", output, "--rank", "1", files[0]) == 0, run.errors
    assert run("convert", "--output", output, files[0]) == 0, run.errors


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_every_setting(command: str, run: Shell) -> None:
    assert run(command, "--help", "all") == 0
    text = re.sub(r"\s+", " ", run.output)
    for name in COMMANDS[command].model_fields:
        assert ("FILE" if name == POSITIONAL.get(command) else "--" + name.replace("_", "-")) in text
    assert "[required]" in text
    assert "%%" not in text
    assert run("--help") == 0
    assert command in run.output


@pytest.mark.slow
def test_the_program_itself(models: Path, tmp_path: Path) -> None:
    """In a process of its own: the result's path alone on standard output, all else on standard error."""
    output = tmp_path / "out.safetensors"
    words = [sys.executable, "-m", "trainer", "merge", str(models / "größe 1.safetensors") + ":0.5:0.25"]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(
        [*words, "--output", str(output)], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n"
    assert "größe 1: sum, 3 modules" in done.stderr


# Bad input


BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "merge: nothing": (["merge", "--output", "O"], ("loras",)),
    "merge: a missing file": (["merge", "none.safetensors", "--output", "O"], ("none.safetensors", "can't be read")),
    "merge: a missing file with strengths": (
        ["merge", "none.safetensors:0.5:1", "--output", "O"],
        ("none.safetensors",),
    ),
    "merge: a strength that is none": (["merge", "DOG:much", "--output", "O"], ("much", "FILE")),
    "merge: a strength that is not finite": (["merge", "DOG:nan", "--output", "O"], ("nan",)),
    "merge: a text strength that is not finite": (["merge", "DOG:1:inf", "--output", "O"], ("inf",)),
    "merge: a very long name": (["merge", "x" * 5000, "--output", "O"], ("can't be read",)),
    "merge: a folder": (["merge", "FOLDER", "--output", "O"], ("can't be read",)),
    "merge: a checkpoint": (["merge", "BASE", "--output", "O"], ("sd15.safetensors", "no LoRA")),
    "merge: not a number inside": (["merge", "NAN", "--output", "O"], ("nan.safetensors", "NaN or infinite")),
    "merge: a text file": (["merge", "TEXT", "--output", "O"], ("note.safetensors", "can't be read")),
    "merge: an empty file": (["merge", "EMPTY", "--output", "O"], ("empty.safetensors", "can't be read")),
    "merge: no output": (["merge", "DOG"], ("output is required",)),
    "merge: another ending": (["merge", "DOG", "--output", "out.pt"], ("output", ".safetensors")),
    "merge: a report of another ending": (["merge", "DOG", "--output", "O", "--report", "r.txt"], ("report", ".json")),
    "merge: a negative rank": (["merge", "DOG", "--output", "O", "--method", "svd", "--rank", "-1"], ("rank",)),
    "merge: a rank that is no number": (["merge", "DOG", "--output", "O", "--method", "svd", "--rank", "x"], ("rank",)),
    "merge: an unknown method": (["merge", "DOG", "--output", "O", "--method", "avg"], ("method", "svd", "avg")),
    "merge: an energy above 1": (["merge", "DOG", "--output", "O", "--method", "svd", "--energy", "2"], ("energy",)),
    "merge: a rank of a sum": (["merge", "DOG", "--output", "O", "--rank", "4"], ("rank", "sum", "svd")),
    "merge: a density of a svd": (
        ["merge", "DOG", "--output", "O", "--method", "svd", "--density", ".5"],
        ("density",),
    ),
    "merge: block weights of nothing": (
        ["merge", "DOG", "--output", "O", "--block-weights", "dwon=1"],
        ("dwon", "dog"),
    ),
    "merge: block weights without a number": (["merge", "DOG", "--output", "O", "--block-weights", "down"], ("down",)),
    "merge: a DoRA without its base": (["merge", "DORA:0.5", "DOG", "--output", "O"], ("dora", "DoRA")),
    "merge: a missing base": (["merge", "DOG", "--output", "O", "--base", "none.ckpt"], ("none.ckpt",)),
    "merge: a base that is none": (["merge", "DOG", "--output", "O", "--base", "DOG"], ("adapter", "not a base model")),
    "merge: an unknown device": (["merge", "DOG", "--output", "O", "--device", "gpu"], ("device",)),
    "merge: a missing settings file": (["merge", "--config", "none.toml"], ("none.toml",)),
    "merge: an output below a file": (["merge", "DOG", "--output", "DOG/out.safetensors"], ("is a file",)),
    "learned-merge: one adapter": (["learned-merge", "DOG", "--base", "BASE", "--output", "O", *LEARNED], ("two", "1")),
    "learned-merge: three": (
        ["learned-merge", *["DOG"] * 3, "--base", "BASE", "--output", "O", *LEARNED],
        ("two", "3"),
    ),
    "learned-merge: empty prompts": (
        ["learned-merge", "DOG", "DOG", "--base", "BASE", "--output", "O", *LEARNED, "--style-prompt", " | "],
        ("--style-prompt", "empty"),
    ),
    "learned-merge: no prompt": (
        ["learned-merge", "DOG", "DOG", "--base", "BASE", "--output", "O", "--subject-prompt", "a"],
        ("--style-prompt", "required"),
    ),
    "learned-merge: no base": (["learned-merge", "DOG", "DOG", "--output", "O", *LEARNED], ("base",)),
    "learned-merge: no steps": (
        ["learned-merge", "DOG", "DOG", "--base", "BASE", "--output", "O", *LEARNED, "--steps", "0"],
        ("steps",),
    ),
    "learned-merge: a split above the noise": (
        ["learned-merge", "DOG", "DOG", "--base", "BASE", "--output", "O", *LEARNED, "--split", "1"],
        ("split",),
    ),
    "resize: nothing": (["resize", "--output", "O"], ("lora", "required")),
    "resize: a ratio below 1": (["resize", "DOG", "--output", "O", "--ratio", "0.5"], ("ratio", "1 or more")),
    "resize: a rank of a typing error": (["resize", "DOG", "--output", "O", "--rank", "99999"], ("rank",)),
    "resize: a DoRA without its base": (["resize", "DORA", "--output", "O"], ("dora", "DoRA")),
    "extract: one model": (["extract", "--base", "BASE", "--output", "O"], ("tuned", "required")),
    "extract: equal models": (["extract", "--base", "BASE", "--tuned", "BASE", "--output", "O"], ("do not differ",)),
    "extract: an adapter": (
        ["extract", "--base", "BASE", "--tuned", "DOG", "--output", "O"],
        ("adapter", "not a base model"),
    ),
    "extract: a missing model": (["extract", "--base", "none", "--tuned", "BASE", "--output", "O"], ("none",)),
    "convert: an unknown format": (["convert", "DOG", "--output", "O", "--format", "civitai"], ("format", "kohya")),
    "convert: a LoHa": (["convert", "LOHA", "--output", "O", "--format", "diffusers"], ("LoHa",)),
    "convert: another ending": (["convert", "DOG", "--output", "x.bin"], ("output", ".safetensors")),
    "fuse: no adapter": (["fuse", "--base", "BASE", "--output", "O"], ("lora", "nothing to add")),
    "fuse: another ending": (["fuse", "--base", "BASE", "--lora", "DOG", "--output", "x.ckpt"], (".safetensors",)),
    "fuse: a missing model": (["fuse", "--base", "none.ckpt", "--lora", "DOG", "--output", "O"], ("none.ckpt",)),
    "fuse: an adapter as the model": (
        ["fuse", "--base", "DOG", "--lora", "DOG", "--output", "O"],
        ("adapter", "not a base"),
    ),
    "fuse: a model as the adapter": (["fuse", "--base", "BASE", "--lora", "BASE", "--output", "O"], ("no LoRA",)),
    "inspect: a missing file": (["inspect", "none.safetensors"], ("none.safetensors", "does not exist")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(
    case: str, run: Shell, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, what is wrong and what to do, and no file."""
    monkeypatch.chdir(tmp_path)
    inputs = tmp_path / "in"
    inputs.mkdir()
    places = {title.upper(): models / f"{title}.safetensors" for title in ("dog", "dora", "loha")}
    places |= {"BASE": models / "sd15.safetensors", "FOLDER": inputs, "O": tmp_path / "out.safetensors"}
    places |= {title: inputs / f"{name}.safetensors" for title, name in (("NAN", "nan"), ("TEXT", "note"))}
    places["EMPTY"] = inputs / "empty.safetensors"
    places["EMPTY"].write_bytes(b"")
    places["TEXT"].write_text("no tensors here", encoding="utf-8")
    damaged = "lora_unet_mid_block_attentions_0_proj_in"
    bad = {f"{damaged}.lora_down.weight": torch.ones(1, 4), f"{damaged}.lora_up.weight": torch.full((4, 1), torch.nan)}
    save_file(bad, places["NAN"])

    def placed(word: str) -> str:
        start = re.match(r"[A-Z]+", word)
        return str(places[start[0]]) + word[start.end() :] if start and start[0] in places else word

    words, told = BAD[case]
    assert run(*(placed(word) for word in words)) == 1, run.errors
    assert run.output == ""
    assert re.search("^error: ", run.errors, re.MULTILINE), run.errors
    assert "\nfix: " in run.errors
    for word in told:
        assert word in run.errors, run.errors
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "nan.safetensors",
        "note.safetensors",
        "empty.safetensors",
    }


def test_another_family_is_named(run: Shell, models: Path, tmp_path: Path) -> None:
    shapes = {"lora_down.weight": torch.ones(1, 2048), "lora_up.weight": torch.ones(640, 1)}
    place = "lora_unet_output_blocks_0_1_transformer_blocks_0_attn2_to_k"
    foreign = saved(adapter_of({place: shapes}, STATED["sdxl"]), tmp_path / "xl.safetensors")
    output = tmp_path / "out.safetensors"
    assert run("merge", models / "dog.safetensors", foreign, "--output", output) == 1
    assert "dog is for SD 1, xl is for SDXL" in run.errors
    words = ["--base", models / "sd15.safetensors", "--output", output]
    assert run("learned-merge", foreign, foreign, *words, *LEARNED) == 1
    assert place in run.errors
    assert run("fuse", "--lora", foreign, *words) == 1
    assert "stable-diffusion-xl" in run.errors
    assert not output.exists()


def test_unknown_flags_end_with_2(run: Shell, models: Path) -> None:
    for words in (["merge", "--alpha", "1"], ["fuse", "dog", "cat"], ["extract", "--loras", "x"], ["remix"]):
        assert run(*words) == 2
        assert run.errors.startswith("error: ")
        assert "\nfix: " in run.errors


def test_a_settings_file_with_a_name_that_is_none(run: Shell, models: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("lora = ['a']\n", encoding="utf-8")
    assert run("merge", "--config", config, models / "dog.safetensors", "--output", tmp_path / "o.safetensors") == 1
    assert "lora" in run.errors
    assert "loras" in run.errors


def test_a_stopped_command_ends_with_130(
    run: Shell, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pack.trainer.cli.terminal import Terminal

    monkeypatch.setattr(Terminal, "should_stop", lambda _: True)
    output = tmp_path / "out.safetensors"
    dog = models / "dog.safetensors"
    for words in (["merge", dog], ["resize", dog], ["learned-merge", dog, dog, "--base", models / "sd15.safetensors"]):
        more = LEARNED if words[0] == "learned-merge" else []
        assert run(*words, "--output", output, *more) == 130
        assert "Stopped" in run.errors
    assert list(tmp_path.iterdir()) == []


def test_commands_refuse_without_the_command_line_too() -> None:
    with pytest.raises(SettingsError, match="loras"):
        MergeCommand.checked({"loras": "dog.safetensors", "output": "o.safetensors"})
    values: dict[str, Any] = {"loras": ("a", "b"), "output": "o.safetensors", "base": "x"}
    prompts = {"subject_prompt": "a", "style_prompt": "b"}
    assert LearnedMergeCommand.checked({**values, **prompts}).split == 0.6
    with pytest.raises(SettingsError, match="style_prompt"):
        LearnedMergeCommand.checked({**values, **prompts, "style_prompt": ""})
