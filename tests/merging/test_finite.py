"""Nothing that is not finite is written or trained upon: strengths, files and models that lead there are named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from merge_worlds import checkpoint, demo_base, random_adapter, saved, weights_of
from pack.trainer.adapters.apply import apply_to_base
from pack.trainer.adapters.kohya import Adapter
from pack.trainer.adapters.layers import FullLayer, LoraLayer
from pack.trainer.core.errors import NotFiniteError
from pack.trainer.merging.extract import extract_between
from pack.trainer.merging.fuse import fuse
from pack.trainer.merging.merge import WeightedAdapter, merge
from pack.trainer.merging.methods import METHODS
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from pack.trainer.models.single_file import write_single_file
from pack.trainer.settings.merge import ExtractSettings, MergeSettings
from safetensors.torch import load_file, save_file
from shell import Shell

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
"""A module that the tiny model and the demo's have."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("base"), "sd15", dtype=torch.float16)


@pytest.fixture(scope="module")
def base(file: Path) -> BaseWeights:
    return open_base(file)


def test_fusing_too_strongly_writes_nothing(file: Path, base: BaseWeights, tmp_path: Path) -> None:
    adapter = random_adapter(base, pattern=f"^{NAME}$")
    with pytest.raises(NotFiniteError) as caught:
        fuse(file, [(adapter, 1e7)], tmp_path / "out.safetensors")
    for word in (NAME, "1e+07", "float16"):
        assert word in caught.value.problem
    assert "strength" in caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_fusing_too_strongly_into_a_folder_writes_nothing(tmp_path: Path) -> None:
    from helpers import DEMO

    adapter = random_adapter(demo_base(), pattern=f"^{NAME}$")
    with pytest.raises(NotFiniteError, match=NAME):
        fuse(DEMO / "base", [(adapter, 1e7)], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_says_so(file: Path, base: BaseWeights, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Shell(capsys)
    lora = saved(random_adapter(base, pattern=f"^{NAME}$"), tmp_path / "a.safetensors")
    assert run("fuse", "--base", file, "--lora", f"{lora}:1e7", "--output", tmp_path / "out.safetensors") == 1
    assert NAME in run.errors
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_adapter_below_is_checked_before_training(base: BaseWeights) -> None:
    """As training on top of adapters and generating with them apply them."""
    adapter = random_adapter(base, pattern=f"^{NAME}$")
    with pytest.raises(NotFiniteError, match=NAME):
        apply_to_base(base, [(adapter, -1e7)])
    adapter = Adapter({}, {}, {f"{NAME.replace('to_q', 'to_out_0')}.diff_b": torch.ones(64) * 1e5})
    with pytest.raises(NotFiniteError, match="diff_b"):
        apply_to_base(base, [(adapter, 1.0)])


def test_what_a_model_had_before_is_copied(file: Path, base: BaseWeights, tmp_path: Path) -> None:
    """A tensor that no adapter changes stays as it is, whatever it holds."""
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("out.2.bias"))
    tensors[key][0] = math.inf
    save_file(tensors, tmp_path / "odd.safetensors")
    fuse(tmp_path / "odd.safetensors", [(random_adapter(base, pattern=f"^{NAME}$"), 1.0)], tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")[key], tensors[key])


EXACT = ("sum", "orthogonal")


@pytest.mark.parametrize(
    ("method", "limits"),
    [*((name, {}) for name in METHODS), *((name, {"rank": 2}) for name in METHODS if name not in EXACT)],
)
def test_merging_too_strongly_is_named(method: str, limits: dict[str, int]) -> None:
    source = torch.Generator().manual_seed(0)
    layers = [
        LoraLayer(torch.randn((2, 8), generator=source), torch.randn((8, 2), generator=source) * 1e3, 2.0)
        for _ in range(2)
    ]
    adapters = [WeightedAdapter(Adapter({NAME: layer}), title, 3e37) for title, layer in zip("ab", layers, strict=True)]
    with pytest.raises(NotFiniteError, match=NAME) as caught:
        merge(adapters, MergeSettings(method=method, **limits))
    assert "strength" in caught.value.remedy


@pytest.mark.parametrize("strength", ["1e38", "1e200", "-1e300"])
def test_scaling_too_strongly_writes_nothing(strength: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Shell(capsys)
    layers = {NAME: LoraLayer(torch.ones(2, 8), torch.ones(8, 2), 200.0), f"{NAME}_2": FullLayer(torch.ones(8, 8) * 50)}
    lora = saved(Adapter(layers), tmp_path / "a.safetensors")
    assert run("merge", f"{lora}:{strength}", "--output", tmp_path / "out.safetensors") == 1
    assert NAME in run.errors
    assert "Traceback" not in run.errors
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("biases", [False, True])
def test_a_model_with_numbers_that_are_not_finite_is_named(bad: float, biases: bool, base: BaseWeights) -> None:
    weights = weights_of(base)
    tuned = {name: weight + 0.01 for name, weight in weights.items()}
    tuned[NAME] = tuned[NAME].clone()
    tuned[NAME][0, 0] = bad
    with pytest.raises(NotFiniteError, match=NAME):
        extract_between(weights, tuned, ExtractSettings(rank=2, biases=biases))


def test_a_checkpoint_that_a_type_cant_hold_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"first.weight": torch.ones(2), "second.weight": torch.tensor([1.0, 1e5])}
    with pytest.raises(NotFiniteError, match=r"second\.weight") as caught:
        write_single_file(path, tensors, {}, torch.float16)
    assert "save_precision = bf16" in caught.value.remedy
    assert not list(tmp_path.iterdir())
    write_single_file(path, tensors, {}, torch.bfloat16)
    assert load_file(path)["second.weight"].tolist() == torch.tensor([1.0, 1e5]).to(torch.bfloat16).tolist()
