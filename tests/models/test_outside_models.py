"""Base models from outside: configurations, indices and weights of any shape are opened or named, never a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import sd15_state_dict
from helpers import DEMO, TINY
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.core.errors import TrainerError, WeightsError
from pack.trainer.models.open import open_base
from pack.trainer.models.state_dicts import read_component, read_single_file
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("quick")

UNET, TEXT, VAE = "unet/config.json", "text_encoder/config.json", "vae/config.json"
SCHEDULER, INDEX, VOCABULARY = "scheduler/scheduler_config.json", "model_index.json", "tokenizer/vocab.json"
WEIGHTS = "diffusion_pytorch_model"


def linked(source: str, target: str) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)


def copy_of_demo(folder: Path) -> Path:
    """The demo's base model as a folder of links."""
    return shutil.copytree(DEMO / "base", folder, copy_function=linked)


def put(folder: Path, file: str, content: Any) -> None:
    """Replace a file of a copy: by bytes, or by what becomes JSON."""
    path = folder / file
    path.unlink()
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def edited(folder: Path, file: str, changes: dict[str, Any]) -> None:
    put(folder, file, {**json.loads((folder / file).read_bytes()), **changes})


@pytest.mark.parametrize("file", [INDEX, UNET, TEXT, VAE, SCHEDULER])
@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b"{", b"", b"[" * 100_000], ids=lambda text: text[:4])
def test_json_of_another_shape_is_named(file: str, content: bytes, tmp_path: Path) -> None:
    folder = copy_of_demo(tmp_path / "model")
    put(folder, file, content)
    with pytest.raises(WeightsError) as caught:
        open_base(folder)
    assert str(folder / file) in caught.value.problem
    assert caught.value.remedy


OTHER_VALUES: list[tuple[str, dict[str, Any], str]] = [
    (UNET, {"block_out_channels": 32}, "block_out_channels"),
    (UNET, {"block_out_channels": ["a"]}, "block_out_channels"),
    (UNET, {"in_channels": [4]}, "in_channels"),
    (UNET, {"layers_per_block": [1, 1]}, "layers_per_block"),
    (UNET, {"cross_attention_dim": {}}, "cross_attention_dim"),
    (UNET, {"addition_embed_type": ["text"]}, "addition_embed_type"),
    (UNET, {"class_embed_type": 3}, "class_embed_type"),
    (UNET, {"_class_name": 3}, "3"),
    (UNET, {"attention_head_dim": "eight"}, ""),
    (UNET, {"attention_head_dim": 0}, ""),
    (UNET, {"norm_num_groups": 0}, ""),
    (UNET, {"norm_num_groups": 7}, ""),
    (UNET, {"act_fn": 3}, ""),
    (UNET, {"down_block_types": ["Nonsense", "Nonsense"]}, ""),
    (UNET, {"block_out_channels": []}, ""),
    (UNET, {"block_out_channels": [-32, -64]}, ""),
    (TEXT, {"num_hidden_layers": "two"}, "num_hidden_layers"),
    (TEXT, {"max_position_embeddings": None}, "max_position_embeddings"),
    (TEXT, {"hidden_size": 0}, ""),
    (TEXT, {"hidden_act": "nonsense"}, ""),
    (VAE, {"block_out_channels": None}, "block_out_channels"),
    (VAE, {"scaling_factor": "0.18"}, "scaling_factor"),
    (VAE, {"norm_num_groups": "x"}, ""),
    (SCHEDULER, {"prediction_type": 3}, "prediction_type"),
    (SCHEDULER, {"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr"),
    (SCHEDULER, {"num_train_timesteps": "x"}, "scheduler"),
    (SCHEDULER, {"num_train_timesteps": -5}, "scheduler"),
    (SCHEDULER, {"beta_schedule": "nonsense"}, "scheduler"),
    (SCHEDULER, {"beta_end": None}, "scheduler"),
    (SCHEDULER, {"beta_start": -3.0, "beta_schedule": "linear"}, "scheduler"),
    (SCHEDULER, {"trained_betas": [5.0, 7.0]}, "scheduler"),
    (SCHEDULER, {"trained_betas": "x"}, "scheduler"),
    (INDEX, {"unet": None, "_class_name": 3}, ""),
]


@pytest.mark.parametrize(("file", "changes", "word"), OTHER_VALUES, ids=lambda value: str(value)[:50])
def test_values_that_make_no_model_are_named(file: str, changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    folder = copy_of_demo(tmp_path / "model")
    edited(folder, file, changes)
    if file == INDEX:
        open_base(folder)  # it is not needed
        return
    with pytest.raises(WeightsError) as caught:
        open_base(folder)
    assert word in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings"])
def test_a_missing_value_is_named(key: str, tmp_path: Path) -> None:
    folder = copy_of_demo(tmp_path / "model")
    values = json.loads((folder / TEXT).read_bytes())
    del values[key]
    put(folder, TEXT, values)
    with pytest.raises(WeightsError, match=f"{key} is missing"):
        open_base(folder)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 2000) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data(), value=JSON_VALUES)
def test_any_value_of_a_configuration_is_used_or_named(
    data: st.DataObject, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = copy_of_demo(tmp_path_factory.mktemp("any") / "model")
    file = data.draw(st.sampled_from([UNET, TEXT, VAE, SCHEDULER, INDEX]))
    key = data.draw(st.sampled_from(sorted(json.loads((folder / file).read_bytes()))))
    edited(folder, file, {key: value})
    try:
        open_base(folder)
    except TrainerError as error:
        assert error.remedy  # noqa: PT017
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("content", [b"[]", b"null", b"junk", b'{"a": "b"}', b'{"a": []}', b"\xff\xfe"])
def test_a_tokenizer_of_another_shape_is_named(content: bytes, tmp_path: Path) -> None:
    folder = copy_of_demo(tmp_path / "model")
    put(folder, VOCABULARY, content)
    try:
        open_base(folder)
    except WeightsError as error:
        assert "tokenizer" in error.problem  # noqa: PT017


# Shards


def sharded(folder: Path, *, index: Any = None) -> Path:
    """Two shards of two tensors each, with their index."""
    folder.mkdir()
    names = [f"{WEIGHTS}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({f"{letter}{number}": torch.full((2,), float(number)) for letter in "ab"}, folder / name)
    places = {f"{letter}{number}": name for number, name in enumerate(names) for letter in "ab"}
    content = {"metadata": {"total_size": 32}, "weight_map": places} if index is None else index(places)
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "unet")
    save_file({"old": torch.ones(1)}, folder / f"{WEIGHTS}-00003-of-00003.safetensors")  # of another download
    tensors = read_component(folder, WEIGHTS)
    assert {name: float(tensor[0]) for name, tensor in tensors.items()} == {"a0": 0, "b0": 0, "a1": 1, "b1": 1}


def test_shards_without_an_index_are_read_if_all_are_there(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "unet")
    (folder / f"{WEIGHTS}.safetensors.index.json").unlink()
    assert set(read_component(folder, WEIGHTS)) == {"a0", "b0", "a1", "b1"}
    (folder / f"{WEIGHTS}-00001-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="lacks some of the files that belong to"):
        read_component(folder, WEIGHTS)


LIES: dict[str, Any] = {
    "empty": lambda places: {},
    "a list": lambda places: [],
    "a map that is a list": lambda places: {"weight_map": list(places)},
    "places that are numbers": lambda places: {"weight_map": dict.fromkeys(places, 1)},
    "a file that is not there": lambda places: {"weight_map": {**places, "a0": "other.safetensors"}},
    "a file outside": lambda places: {"weight_map": {**places, "a0": "../unet/secret.safetensors"}},
    "a tensor that is not there": lambda places: {"weight_map": {**places, "c": places["a0"]}},
}


@pytest.mark.parametrize("case", LIES)
def test_an_index_that_lies_is_named(case: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "unet", index=LIES[case])
    with pytest.raises(WeightsError, match=r"index\.json") as caught:
        read_component(folder, WEIGHTS)
    assert caught.value.remedy


# Weights


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int32, torch.int8], ids=str)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_weights_of_other_types_are_named(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if form == "file":
        tensors = sd15_state_dict(TINY)
        name = "model.diffusion_model.out.2.weight"
        source = tmp_path / "model.safetensors"
        save_file({**tensors, name: tensors[name].to(dtype)}, source)
    else:
        source = copy_of_demo(tmp_path / "model")
        weights = source / "unet" / f"{WEIGHTS}.safetensors"
        tensors = load_file(weights)
        weights.unlink()
        save_file({**tensors, "conv_out.weight": tensors["conv_out.weight"].to(dtype)}, weights)
    with pytest.raises(WeightsError) as caught:
        open_base(source, DEMO / "base" / "tokenizer")
    assert str(dtype) in caught.value.problem


@pytest.mark.parametrize("name", ["input_blocks.0.0.weight", "out.2.weight", "input_blocks.1.1.proj_in.weight"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (2, 3, 4, 5, 6)], ids=str)
def test_tensors_of_impossible_shapes_are_named(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = sd15_state_dict(TINY) | {f"model.diffusion_model.{name}": torch.zeros(shape)}
    source = tmp_path / "model.safetensors"
    save_file(tensors, source)
    with pytest.raises(WeightsError):
        open_base(source, DEMO / "base" / "tokenizer")


class _Other:
    pass


@pytest.mark.parametrize(
    "content",
    [
        [],
        3,
        {"state_dict": []},
        {"state_dict": {1: torch.ones(1), ("a",): torch.ones(1)}},
        {1: torch.ones(1)},
        {"a": torch.ones(2).to_sparse()},
        {"a": torch.empty(2, device="meta")},
        {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
        {"state_dict": {"state_dict": {}}},
        _Other(),
    ],
    ids=lambda value: str(type(value).__name__),
)
@pytest.mark.filterwarnings("ignore")
def test_pickles_of_other_shapes_are_named(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=r"model\.ckpt"):
        open_base(path)


@given(position=st.integers(0, 3000), replaced=st.binary(max_size=6), cut=st.integers(0, 6))
def test_any_damage_of_a_pickle_is_named_or_harmless(
    position: int, replaced: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("pickle") / "model.ckpt"
    torch.save({"state_dict": {"a": torch.ones(4), "b": torch.ones(2, 2)}, "epoch": 3}, path)
    content = path.read_bytes()
    path.write_bytes(content[:position] + replaced + content[position + cut :])
    try:
        assert all(isinstance(tensor, torch.Tensor) for tensor in read_single_file(path).values())
    except WeightsError as error:
        assert "model.ckpt" in error.problem  # noqa: PT017


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    """They can't be memory-mapped."""
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.arange(3)}}, path, _use_new_zipfile_serialization=False)
    assert read_single_file(path)["a"].tolist() == [0, 1, 2]
