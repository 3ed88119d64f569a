"""Safetensors files: every lie of a header is found, and nothing that is not finite is written."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from broken_files import BROKEN_FILES, DOWN, GOOD, UP, entry, file_of
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.core.errors import NotFiniteError, StorageError
from pack.trainer.core.files import write_file
from pack.trainer.core.tensor_files import (
    cast_finite,
    is_finite,
    is_quantization_name,
    map_tensors,
    read_header,
    read_tensors,
    save_tensors,
)
from safetensors.torch import save

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("case", BROKEN_FILES)
@pytest.mark.parametrize("read", [read_header, read_tensors, map_tensors])
def test_a_broken_file_is_a_value_error(case: str, read: object, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(BROKEN_FILES[case])
    assert callable(read)
    with pytest.raises(ValueError, match=r"^it|^its|safetensors"):
        read(path)


@pytest.mark.parametrize("read", [read_header, read_tensors, map_tensors])
def test_what_is_no_file_is_an_os_error(read: object, tmp_path: Path) -> None:
    assert callable(read)
    for path in (tmp_path, tmp_path / "none.safetensors", tmp_path / ("n" * 300)):
        with pytest.raises(OSError, match=r"."):
            read(path)


def test_a_type_is_named_with_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "scaled.safetensors"
    path.write_bytes(BROKEN_FILES["F8_E8M0"])
    with pytest.raises(ValueError, match=f"{DOWN} has the unsupported type F8_E8M0"):
        read_header(path)


def test_a_good_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(file_of({"__metadata__": {"a": "b"}, **GOOD}))
    header = read_header(path)
    assert header.metadata == {"a": "b"}
    assert {name: tuple(found.shape) for name, found in header.entries.items()} == {DOWN: (1, 4), UP: (4, 1)}
    for metadata in ({}, {"__metadata__": None}, {"__metadata__": {}}):
        path.write_bytes(file_of({**metadata, **GOOD}))
        assert read_header(path).metadata == {}
    empty = {**GOOD, "nothing": entry(shape=(0, 3), begin=32, end=32)}
    path.write_bytes(file_of(empty))
    assert set(read_header(path).entries) == set(empty)


@given(position=st.integers(0, 400), replaced=st.binary(max_size=12), cut=st.integers(0, 12))
def test_any_damage_is_named_or_harmless(
    position: int, replaced: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes are replaced, added or removed anywhere in a file."""
    tensors = {DOWN: torch.ones(1, 4), UP: torch.ones(4, 1), "half": torch.ones(3, dtype=torch.float16)}
    content = save(tensors, {"a": "b"})
    path = tmp_path_factory.mktemp("damage") / "file.safetensors"
    path.write_bytes(content[:position] + replaced + content[position + cut :])
    try:
        header = read_header(path)
        assert set(read_tensors(path)) == set(header.entries)
    except ValueError as error:
        assert str(error)  # noqa: PT017


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 33, 1000])
def test_finite(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(tensor)
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        for position in {0, size // 2, size - 1} if size else ():
            for bad in (math.inf, -math.inf, math.nan):
                spoilt = tensor.clone()
                spoilt[position] = bad
                assert not is_finite(spoilt)


def test_integers_are_finite() -> None:
    assert is_finite(torch.arange(5))
    assert is_finite(torch.tensor([True]))


@pytest.mark.parametrize(
    ("tensor", "dtype", "told"),
    [
        (torch.tensor([1.0, 70000.0]), torch.float16, "up to 7e+04, which float16 can't represent"),
        (torch.tensor([-1e39], dtype=torch.float64), torch.float32, "up to 1e+39, which float32 can't represent"),
        (torch.tensor([math.nan]), torch.float16, "NaN or infinite"),
        (torch.tensor([math.inf]), torch.bfloat16, "NaN or infinite"),
    ],
)
def test_what_a_type_cant_hold_is_named(tensor: torch.Tensor, dtype: torch.dtype, told: str) -> None:
    with pytest.raises(NotFiniteError) as caught:
        cast_finite("some.module", tensor, dtype)
    assert caught.value.problem.startswith("some.module has ")
    assert told in caught.value.problem
    assert caught.value.remedy


def test_the_largest_half_precision_number_is_held() -> None:
    assert cast_finite("m", torch.tensor([65504.0, 65519.0]), torch.float16).tolist() == [65504.0, 65504.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_that_is_not_finite_is_written(bad: float, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(NotFiniteError, match="second"):
        save_tensors(path, {"first": torch.ones(3), "second": torch.tensor([1.0, bad])}, {})
    assert not path.exists()
    save_tensors(path, {"second": torch.tensor([1.0, bad])}, {}, copied={"second"})
    assert path.exists()


def test_written_files_have_usual_permissions_and_unicode(tmp_path: Path) -> None:
    """Titles come from file names, which on old disks are no Unicode."""
    path, other = tmp_path / "file.safetensors", tmp_path / "other"
    other.touch()
    save_tensors(path, {"a": torch.ones(2)}, {"title": "größe \udcff", "k\udcff": "犬"})
    assert read_header(path).metadata == {"title": "größe ?", "k?": "犬"}
    assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes")
def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "file.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"file.safetensors: .* can't be written"):
            write_file(path, lambda temporary: save_tensors(temporary, {"a": torch.ones(1000)}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.diffusion_model.out.2.scale_weight", True),
        ("lora_unet_x.lora_down.weight_scale", True),
        ("lora_unet_x.lora_down.input_scale", True),
        ("unet.x.lora_A.weight.absmax", True),
        ("unet.x.lora_A.weight.quant_state.bitsandbytes__nf4", True),
        ("scaled_fp8", True),
        ("lora_unet_x.dora_scale", False),
        ("lora_unet_x.rescale", False),
        ("unet.x.lora_A.weight", False),
        ("logit_scale", False),
    ],
)
def test_scales_of_quantised_weights_are_known_by_name(name: str, expected: bool) -> None:
    assert is_quantization_name(name) is expected
