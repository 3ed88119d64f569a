"""Files in half precision add what the adapter adds: nothing becomes infinite, and nothing is lost but digits."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from adapter_maths import CONV_NAME, NAME, PLAIN, TUCKER, WEIGHTS, shapes_of
from cases import product_of
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.adapters.casting import cast_layer
from pack.trainer.adapters.diffusers_format import write_diffusers
from pack.trainer.adapters.kohya import Adapter, parse_adapter, read_adapter, write_adapter
from pack.trainer.adapters.layers import FullLayer, LoraLayer, OftLayer
from pack.trainer.core.errors import NotFiniteError
from safetensors.torch import load_file
from torch import Tensor

RANK = 2
LOW_RANK = [kind for kind in (*PLAIN, *TUCKER) if kind != "full difference"]
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6}


def lora(down: float, up: float, alpha: float = 2.0) -> Adapter:
    """A LoRA whose factors have about the given size."""
    source = torch.Generator().manual_seed(0)
    layer = LoraLayer(
        torch.randn((RANK, 20), generator=source) * down, torch.randn((12, RANK), generator=source) * up, alpha
    )
    return Adapter({NAME: layer})


def exact(adapter: Adapter, name: str = NAME) -> Tensor:
    """What a LoRA adds, in double precision."""
    layer = adapter.layers[name]
    assert isinstance(layer, LoraLayer)
    return layer.up.double().flatten(1) @ layer.down.double().flatten(1) * (layer.alpha / layer.rank)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative, of double numbers: float32 can't hold the squares of small ones."""
    expected = expected.double()
    return float((actual.double().reshape(expected.shape) - expected).norm() / expected.norm())


# (down, up, alpha): as kohya-ss/sd-scripts issue 93 and a diffusers pull request (5316) had them, and beyond
SIZES = {
    "usual": (0.1, 0.1, 2.0),
    "barely trained": (0.1, 1e-5, 2.0),
    "a rate of 1e-8": (30.0, 2e-8, 2.0),
    "lost and infinite": (1e-9, 1e6, 2.0),
    "the other way round": (1e7, 1e-9, 2.0),
    "both small": (1e-7, 1e-7, 2.0),
    "both small, a large alpha": (1e-6, 1e-6, 1e10),
    "both large, a small alpha": (1e6, 1e6, 1e-12),
    "both large": (1e6, 1e6, 2.0),
}


@product_of(size=SIZES, dtype=list(TOLERANCES))
def test_a_lora_keeps_what_it_adds(size: tuple[float, float, float], dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = lora(*size)
    write_adapter(tmp_path / "a.safetensors", adapter, dtype)
    tensors = load_file(tmp_path / "a.safetensors")
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())
    back = read_adapter(tmp_path / "a.safetensors")
    assert distance(exact(back), exact(adapter)) < TOLERANCES[dtype]


@given(
    kind=st.sampled_from(LOW_RANK),
    exponents=st.lists(st.integers(-18, 10), min_size=6, max_size=6),
    alpha=st.integers(-40, 20),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_every_kind_keeps_what_it_adds(kind: str, exponents: list[int], alpha: int, dtype: torch.dtype) -> None:
    """Whatever sizes its factors have."""
    weight = WEIGHTS["conv 3×3" if "Tucker" in kind else "linear"]
    source = torch.Generator().manual_seed(1)
    tensors = {
        f"{NAME}.{suffix}": torch.randn(shape, generator=source) * 2.0**exponent
        for (suffix, shape), exponent in zip(shapes_of(kind, weight, RANK).items(), exponents, strict=False)
    }
    adapter = parse_adapter(tensors | {f"{NAME}.alpha": torch.tensor(2.0**alpha)})
    back = parse_adapter(adapter.state_dict(dtype))
    assert distance(back.layers[NAME].delta() * 2.0**40, adapter.layers[NAME].delta() * 2.0**40) < 3 * TOLERANCES[dtype]


def test_ranks_of_different_sizes_are_all_kept() -> None:
    """One rank has a tiny column and a huge row, another the reverse; both add as much."""
    source = torch.Generator().manual_seed(2)
    scales = torch.tensor([1e-9, 1e9])
    down, up = torch.randn((2, 20), generator=source), torch.randn((12, 2), generator=source)
    layer = LoraLayer(down / scales[:, None], up * scales, 2.0)
    cast = cast_layer(NAME, layer, torch.float16)
    assert cast.up.dtype == cast.down.dtype == torch.float16
    assert distance(cast.up.double() @ cast.down.double(), up.double() @ down.double()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_a_type_holds_is_only_rounded(dtype: torch.dtype) -> None:
    adapter = lora(0.1, 0.02, 1.5)
    layer, cast = adapter.layers[NAME], cast_layer(NAME, adapter.layers[NAME], dtype)
    assert isinstance(layer, LoraLayer)
    assert isinstance(cast, LoraLayer)
    assert cast.alpha == 1.5
    assert torch.equal(cast.down, layer.down.to(dtype))
    assert torch.equal(cast.up, layer.up.to(dtype))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_diffusers_format_keeps_what_a_lora_adds(size: tuple[float, float, float], tmp_path: Path) -> None:
    """It has no alpha beside the tensors, so only the factors can hold the scale."""
    adapter = lora(*size)
    path = tmp_path / "a.safetensors"
    if "both large" in next(name for name, value in SIZES.items() if value == size) and size[2] == 2.0:
        with pytest.raises(NotFiniteError, match=NAME):
            write_diffusers(path, adapter, torch.float16)
        assert not path.exists()
        return
    write_diffusers(path, adapter, torch.float16)
    up, down = (next(t for name, t in load_file(path).items() if part in name) for part in ("lora_B", "lora_A"))
    assert distance(up.double() @ down.double(), exact(adapter)) < 2e-3


@pytest.mark.parametrize("alpha", [0.0, -0.0, 1e-44, 1e-60])
def test_an_alpha_of_zero_is_a_factor_of_zeros(alpha: float) -> None:
    """kohya's scripts and LyCORIS read an alpha of 0 as the rank."""
    cast = cast_layer(NAME, lora(1.0, 1.0, alpha).layers[NAME], torch.float32)
    assert isinstance(cast, LoraLayer)
    assert cast.alpha == RANK
    assert not cast.delta().any()


@pytest.mark.parametrize("alpha", [math.inf, math.nan, 1e60])
def test_an_alpha_that_is_no_number_is_not_written(alpha: float) -> None:
    with pytest.raises(NotFiniteError, match=f"{NAME} has an alpha"):
        cast_layer(NAME, lora(1.0, 1.0, alpha).layers[NAME], torch.float32)


def test_a_small_difference_stays_in_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There is no second factor that could take its size."""
    diff = torch.randn((12, 20), generator=torch.Generator().manual_seed(3)) * 1e-8
    blocks = torch.randn((3, 4, 4), generator=torch.Generator().manual_seed(3)) * 1e-7
    adapter = Adapter(
        {NAME: FullLayer(diff), CONV_NAME: OftLayer(blocks, 0.0)}, {}, {f"{NAME}.diff_b": torch.full((12,), 1e-9)}
    )
    with caplog.at_level(logging.WARNING):
        write_adapter(tmp_path / "a.safetensors", adapter, torch.float16)
    tensors = load_file(tmp_path / "a.safetensors")
    assert torch.equal(tensors[f"{NAME}.diff"], diff)
    assert torch.equal(tensors[f"{CONV_NAME}.oft_blocks"], blocks)
    assert torch.equal(tensors[f"{NAME}.diff_b"], torch.full((12,), 1e-9))
    assert "3 tensors were kept in float32" in caplog.text


@pytest.mark.parametrize(
    ("layers", "vectors"),
    [
        ({NAME: FullLayer(torch.full((12, 20), 1e5))}, {}),
        ({NAME: FullLayer(torch.ones((12, 20)))}, {f"{NAME}.diff_b": torch.full((12,), -1e6)}),
        ({NAME: LoraLayer(torch.full((2, 20), math.inf), torch.ones((12, 2)), 2.0)}, {}),
        ({NAME: LoraLayer(torch.ones((2, 20)), torch.full((12, 2), math.nan), 2.0)}, {}),
        ({NAME: LoraLayer(torch.ones((2, 20)), torch.ones((12, 2)), 2.0, None, torch.full((12, 1), math.nan))}, {}),
        ({NAME: OftLayer(torch.full((3, 4, 4), math.inf), 0.0)}, {}),
    ],
)
def test_what_cant_be_held_is_not_written(
    layers: dict[str, FullLayer], vectors: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(NotFiniteError, match=NAME) as caught:
        write_adapter(tmp_path / "a.safetensors", Adapter(layers, {}, vectors), torch.float16)
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_a_large_difference_is_written_in_other_types(tmp_path: Path) -> None:
    """Which the remedy names."""
    adapter = Adapter({NAME: FullLayer(torch.full((12, 20), 2.0**17))})
    with pytest.raises(NotFiniteError) as caught:
        write_adapter(tmp_path / "a.safetensors", adapter, torch.float16)
    assert "save_precision = bf16" in caught.value.remedy
    for dtype in (torch.bfloat16, torch.float32):
        write_adapter(tmp_path / "a.safetensors", adapter, dtype)
        layer = read_adapter(tmp_path / "a.safetensors").layers[NAME]
        assert isinstance(layer, FullLayer)
        assert float(layer.diff.max()) == 2.0**17


def test_magnitudes_stay_in_float32() -> None:
    scale = torch.rand((12, 1)) + 1
    layer = LoraLayer(torch.ones(2, 20) * 1e-9, torch.ones(12, 2) * 1e5, 2.0, dora_scale=scale)
    cast = cast_layer(NAME, layer, torch.float16)
    assert cast.dora_scale is not None
    assert torch.equal(cast.dora_scale, scale)
    assert cast.up.dtype == torch.float16
