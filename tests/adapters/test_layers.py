"""What each kind of layer adds to a weight, against its equation in numpy and against PEFT; and the files of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_maths import added
from layer_worlds import assert_close, leaves_out_the_scale, randomise
from numpy.typing import NDArray
from pack.trainer.adapters.kohya import Adapter, LoraLayer, parse_adapter, read_adapter, write_adapter
from pack.trainer.adapters.layers import FullLayer, LokrLayer, fits, make_layer
from pack.trainer.adapters.layers.base import balanced
from pack.trainer.adapters.layers.oft import block_size, butterfly_factors, rotation_delta, rotations_less_identity
from pack.trainer.adapters.module_paths import module_name
from pack.trainer.cli.inspect import inspect
from pack.trainer.core.errors import AdapterError
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

Array = NDArray[np.float64]
Parts = dict[str, Tensor]
A, B, C, D, RANK, ALPHA = 3, 4, 2, 5, 2, 3.0  # a weight of (A·B, C·D)
WEIGHTS = {"linear": (A * B, C * D), "conv 1×1": (A * B, C * D, 1, 1), "conv 3×3": (A * B, C * D, 3, 3)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def shapes_of(variant: str, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes that files have, by part."""
    out, inside, *kernel = weight
    area = int(np.prod(kernel))
    ones = [1] * len(kernel)
    match variant:
        case "LoRA":
            return {"lora_down.weight": (RANK, inside, *kernel), "lora_up.weight": (out, RANK, *ones)}
        case "LoRA, Tucker":
            outer = {"lora_down.weight": (RANK, inside, *ones), "lora_up.weight": (out, RANK, *ones)}
            return outer | {"lora_mid.weight": (RANK, RANK, *kernel)}
        case "LoHa":
            first, second = (out, RANK), (RANK, inside * area)
            return {"hada_w1_a": first, "hada_w1_b": second, "hada_w2_a": first, "hada_w2_b": second}
        case "LoHa, Tucker":
            first, second, core = (RANK, out), (RANK, inside), (RANK, RANK, *kernel)
            halves = {"hada_w1_a": first, "hada_w1_b": second, "hada_w2_a": first, "hada_w2_b": second}
            return halves | {"hada_t1": core, "hada_t2": core}
        case "LoKr":
            return {"lokr_w1": (A, C), "lokr_w2_a": (B, RANK), "lokr_w2_b": (RANK, D * area)}
        case "LoKr, both factorised":
            small = {"lokr_w1_a": (A, RANK), "lokr_w1_b": (RANK, C)}
            return small | {"lokr_w2_a": (B, RANK), "lokr_w2_b": (RANK, D * area)}
        case "LoKr, Tucker":
            outer = {"lokr_w1": (A, C), "lokr_w2_a": (RANK, B), "lokr_w2_b": (RANK, D)}
            return outer | {"lokr_t2": (RANK, RANK, *kernel)}
        case "LoKr, the small one factorised":
            return {"lokr_w1_a": (A, RANK), "lokr_w1_b": (RANK, C), "lokr_w2": (B, D, *kernel)}
        case "LoKr, whole":
            return {"lokr_w1": (A, C), "lokr_w2": (B, D, *kernel)}
    raise AssertionError(variant)


VARIANTS = [
    "LoRA",
    "LoRA, Tucker",
    "LoHa",
    "LoHa, Tucker",
    "LoKr",
    "LoKr, both factorised",
    "LoKr, Tucker",
    "LoKr, the small one factorised",
    "LoKr, whole",
]
CASES = [
    pytest.param(variant, weight, id=f"{variant}, {name}")
    for variant in VARIANTS
    for name, weight in WEIGHTS.items()
    if "Tucker" not in variant or len(weight) == 4
]


def random_parts(variant: str, weight: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Parts:
    generator = torch.Generator().manual_seed(len(variant))
    shapes = shapes_of(variant, weight)
    return {part: torch.randn(shape, generator=generator).to(dtype) for part, shape in shapes.items()}


def random_weight(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def with_dora(parts: Parts, shape: tuple[int, ...], form: str) -> Parts:
    """Add a dora_scale per output or per input, of the parts' type."""
    if form == "plain":
        return parts
    size = (shape[0], *[1] * (len(shape) - 1)) if form == "per output" else (1, shape[1], *[1] * (len(shape) - 2))
    scale = 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(2))
    return parts | {"dora_scale": scale.to(next(iter(parts.values())).dtype)}


def equation(variant: str, parts: Mapping[str, Tensor], weight: Tensor) -> Array:
    """The change as the papers write it, in double precision."""
    p = {name: tensor.double().numpy() for name, tensor in parts.items()}
    shape = weight.shape
    scale = ALPHA / RANK

    def tucker(core: Array, outer: Array, inner: Array) -> Array:
        return np.einsum("xykl,xo,yi->oikl", core, outer, inner)

    def kron(small: Array, large: Array) -> Array:
        whole = np.einsum("ac,bdk->abcdk", small, large.reshape(B, D, -1))
        return whole.reshape(shape)

    match variant:
        case "LoRA":
            return scale * np.einsum(
                "or,ri->oi", p["lora_up.weight"].reshape(-1, RANK), p["lora_down.weight"].reshape(RANK, -1)
            ).reshape(shape)
        case "LoRA, Tucker":
            return scale * tucker(
                p["lora_mid.weight"], p["lora_up.weight"][:, :, 0, 0].T, p["lora_down.weight"][:, :, 0, 0]
            )
        case "LoHa":
            return scale * (p["hada_w1_a"] @ p["hada_w1_b"] * (p["hada_w2_a"] @ p["hada_w2_b"])).reshape(shape)
        case "LoHa, Tucker":
            first = tucker(p["hada_t1"], p["hada_w1_a"], p["hada_w1_b"])
            return scale * first * tucker(p["hada_t2"], p["hada_w2_a"], p["hada_w2_b"])
        case "LoKr":
            return scale * kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"])
        case "LoKr, both factorised":
            return scale * kron(p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2_a"] @ p["lokr_w2_b"])
        case "LoKr, Tucker":
            return scale * kron(p["lokr_w1"], tucker(p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"]))
        case "LoKr, the small one factorised":
            return scale * kron(p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2"])
        case "LoKr, whole":
            return kron(p["lokr_w1"], p["lokr_w2"])
    raise AssertionError(variant)


def decomposed(plain: Array, weight: Tensor, scale: Tensor) -> Array:
    before = weight.double().numpy()
    after = before + plain
    axes = tuple(axis for axis, length in enumerate(scale.shape) if length == 1)
    return scale.double().numpy() * after / np.sqrt((after**2).sum(axis=axes, keepdims=True)) - before


# Arithmetic


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "per output", "per input"])
@pytest.mark.parametrize(("variant", "shape"), CASES)
def test_a_layer_adds_what_its_equation_says(
    variant: str, shape: tuple[int, ...], form: str, dtype: torch.dtype
) -> None:
    parts = with_dora(random_parts(variant, shape, dtype), shape, form)
    weight = random_weight(shape).to(dtype)
    layer = make_layer("m", parts, ALPHA)
    expected = equation(variant, parts, weight)
    assert np.prod(layer.shape) == expected.size
    assert layer.shape in {shape, (shape[0], expected[0].size)}
    if form == "plain":
        assert layer.delta().shape == layer.shape
    else:
        expected = decomposed(expected, weight, parts["dora_scale"])
        assert layer.delta(weight).shape == shape
    assert_close(layer.delta(weight), expected)


@pytest.mark.parametrize(("variant", "shape"), CASES)
@pytest.mark.parametrize("form", ["plain", "per output"])
def test_a_layer_whose_outer_factor_is_zero_adds_nothing(variant: str, shape: tuple[int, ...], form: str) -> None:
    weight = random_weight(shape)
    parts = random_parts(variant, shape)
    first = next(part for part in parts if part in ("lora_up.weight", "hada_w2_a", "lokr_w1", "lokr_w1_a"))
    parts[first] = torch.zeros_like(parts[first])
    if form != "plain":
        parts["dora_scale"] = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (len(shape) - 1))
    assert make_layer("m", parts, ALPHA).delta(weight).abs().max() < 1e-6


@pytest.mark.parametrize(("variant", "shape"), CASES)
def test_a_dora_gives_every_output_its_length(variant: str, shape: tuple[int, ...]) -> None:
    weight = random_weight(shape)
    parts = with_dora(random_parts(variant, shape), shape, "per output")
    changed = weight + make_layer("m", parts, ALPHA).delta(weight)
    torch.testing.assert_close(changed.flatten(1).norm(dim=1), parts["dora_scale"].flatten(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=list(WEIGHTS))
def test_a_loha_is_the_product_of_two_loras(shape: tuple[int, ...]) -> None:
    parts = random_parts("LoHa", shape)
    loras = [LoraLayer(parts[f"hada_w{n}_b"], parts[f"hada_w{n}_a"], RANK).delta() for n in (1, 2)]
    assert_close(make_layer("m", parts, None).delta(), loras[0] * loras[1])


def test_a_lokr_is_a_kronecker_product() -> None:
    parts = random_parts("LoKr", WEIGHTS["linear"])
    expected = torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
    assert_close(make_layer("m", parts, None).delta(), expected)


@pytest.mark.parametrize("large", [(5, 4), (4, 5), (5, 1), (1, 5), (2, 2, 3, 3), (9, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("small", [(3, 2), (2, 3), (1, 4), (4, 1), (2, 2)], ids=str)
def test_whole_factors_of_a_lokr_are_of_the_smaller_sides_rank(small: tuple[int, int], large: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(6)
    tensors = [torch.randn(shape, generator=generator) for shape in (small, large)]
    layer = make_layer("m", dict(zip(("lokr_w1", "lokr_w2"), tensors, strict=True)), None)
    factors = layer.factors()
    assert factors is not None
    up, down = factors
    assert up.shape[1] == len(down) == min(small) * min(large[0], int(np.prod(large[1:])))
    expected = torch.kron(tensors[0].reshape(*small, *[1] * (len(large) - 2)), tensors[1])
    assert_close((up @ down.flatten(1)).reshape(expected.shape), expected)
    assert_close(layer.delta(), expected)


@pytest.mark.parametrize(("shape", "rank"), [((3, 10), 3), ((12, 10), 10), ((1, 4), 1), ((40, 2, 3, 3), 18)])
def test_a_full_difference_has_no_scale_and_the_highest_rank(shape: tuple[int, ...], rank: int) -> None:
    layer = make_layer("m", {"diff": torch.ones(shape)}, None)
    assert (layer.kind, layer.alpha, layer.rank, layer.shape) == ("full difference", 1.0, rank, shape)
    assert torch.equal(layer.delta(), torch.ones(shape))


@pytest.mark.parametrize("alpha", [None, 0.5, 8.0])
def test_whole_factors_have_no_scale(alpha: float | None) -> None:
    parts = random_parts("LoKr, whole", WEIGHTS["linear"])
    layer = make_layer("m", parts, alpha)
    assert isinstance(layer, LokrLayer)
    assert layer.is_whole
    assert_close(layer.delta(), torch.kron(parts["lokr_w1"], parts["lokr_w2"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_an_alpha_the_scale_is_one(variant: str) -> None:
    layer = make_layer("m", random_parts(variant, WEIGHTS["conv 3×3"]), None)
    assert layer.alpha == layer.rank == (1 if variant == "LoKr, whole" else RANK)


@pytest.mark.parametrize("form", ["per output", "per input"])
def test_a_dora_needs_the_weight_that_it_changes(form: str) -> None:
    shape = WEIGHTS["linear"]
    layer = make_layer("m", with_dora(random_parts("LoRA", shape), shape, form), ALPHA)
    with pytest.raises(AdapterError, match="no weight was given"):
        layer.delta()
    with pytest.raises(AdapterError, match=r"\(12, 10\).*\(12, 11\)"):
        layer.delta(torch.ones(12, 11))
    with pytest.raises(AdapterError, match=r"\(12, 10\).*\(24, 5\)"):  # of as many numbers
        layer.delta(torch.ones(24, 5))


@pytest.mark.parametrize(
    ("variant", "shape", "size"),
    [("LoRA", (A * B, C * D), (A * B,)), ("LoHa", (A * B, 1, 3, 3), (1, 1, 1, 1))],
    ids=["without the second axis", "of one input with a kernel"],
)
def test_a_dora_scale_of_few_numbers(variant: str, shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    parts, weight = random_parts(variant, shape), random_weight(shape)
    scale = torch.full(size, 1.5)
    expected = decomposed(equation(variant, parts, weight), weight, scale.reshape(-1, *[1] * (len(shape) - 1)))
    assert_close(make_layer("m", parts | {"dora_scale": scale}, ALPHA).delta(weight), expected)


@pytest.mark.parametrize(
    ("layer", "weight", "expected"),
    [
        ((12, 10), (12, 10), True),
        ((12, 10), (10, 12), False),
        ((12, 10), (12, 10, 1, 1), True),
        ((12, 10, 1, 1), (12, 10), True),
        ((12, 10), (12, 10, 3, 3), False),
        ((12, 10, 2, 2), (12, 10), False),
        ((12, 10, 3, 3), (12, 10, 3, 3), True),
        ((12, 10, 3, 3), (12, 10, 5, 3), False),
        ((12, 10, 3, 3), (12, 10, 3, 5), False),
        ((12, 90), (12, 10, 3, 3), True),
        ((12, 10, 3, 3), (12, 90), False),
    ],
    ids=str,
)
def test_which_weights_a_layer_fits(layer: tuple[int, ...], weight: tuple[int, ...], expected: bool) -> None:
    assert fits(FullLayer(torch.zeros(layer)), weight) == expected


def test_a_rotation_fits_weights_of_its_outputs() -> None:
    layer = make_layer("m", {"oft_blocks": torch.zeros(3, 4, 4)}, None)
    assert fits(layer, (12, 10))
    assert not fits(layer, (10, 12))


def test_balanced_factors_are_of_similar_norms_and_the_same_product() -> None:
    """Row by row, and also where float32 can't hold the squares."""
    generator = torch.Generator().manual_seed(4)
    sizes = 2.0 ** torch.tensor([-90, -3, 0, 5, 90])
    up, down = torch.randn(6, 5, generator=generator) / sizes, torch.randn(5, 8, generator=generator) * sizes[:, None]
    found_up, found_down = balanced(up, down)
    ratios = found_down.double().norm(dim=1) / found_up.double().norm(dim=0)
    assert ((ratios >= 0.5) & (ratios <= 2)).all()
    torch.testing.assert_close(found_up @ found_down, (up / sizes.reciprocal()) @ (down / sizes[:, None]))


@pytest.mark.parametrize("zero", ["up", "down"])
def test_a_factor_of_zeros_leaves_the_other_as_it_is(zero: str) -> None:
    factors = {"up": torch.full((3, 2), 5.0), "down": torch.full((2, 4), 7.0)}
    factors[zero] = torch.zeros_like(factors[zero])
    for found, given in zip(balanced(**factors), factors.values(), strict=True):
        assert torch.equal(found, given)


@pytest.mark.parametrize("blocks", [(1, 3, 4, 4), (2, 2, 4, 4), (4, 8, 2, 2)], ids=str)
def test_rotations_may_have_any_number_of_butterfly_factors(blocks: tuple[int, ...]) -> None:
    outputs = blocks[1] * blocks[2]
    tensors = {"oft_blocks": torch.randn(blocks, generator=torch.Generator().manual_seed(3))}
    layer = make_layer("m", tensors, None)
    weight = random_weight((outputs, 5))
    assert (layer.kind, layer.rank, layer.shape) == ("BOFT", blocks[2], (outputs,))
    assert_close(layer.delta(weight), added(layer, (outputs, 5), weight))


@pytest.mark.parametrize(
    ("outputs", "largest", "oft", "boft"),
    [
        (320, 16, 16, 10),
        (640, 24, 20, 20),
        (768, 16, 16, 12),
        (1280, 9, 8, 0),
        (320, 1024, 320, 320),
        (4, 16, 4, 4),
        (15, 14, 5, 0),
        (7, 6, 0, 0),
        (320, 1, 0, 0),
    ],
)
def test_the_largest_block_that_outputs_can_be_divided_into(outputs: int, largest: int, oft: int, boft: int) -> None:
    """Blocks of a BOFT are even and as many as a power of two."""
    assert [block_size(outputs, largest, butterfly=butterfly) for butterfly in (False, True)] == [oft, boft]


@pytest.mark.parametrize(("outputs", "size", "factors"), [(320, 10, 6), (1280, 20, 7), (32, 32, 1), (64, 32, 2)])
def test_a_boft_has_factors_until_every_output_met_every_other(outputs: int, size: int, factors: int) -> None:
    assert butterfly_factors(outputs, size) == factors
    generator = torch.Generator().manual_seed(4)
    blocks = torch.randn(factors, outputs // size, size, size, generator=generator)
    assert rotation_delta(rotations_less_identity(blocks), torch.eye(outputs)).all()
    assert factors == 1 or not rotation_delta(rotations_less_identity(blocks[:-1]), torch.eye(outputs)).all()


CONV = "lora_unet_mid_block_resnets_0_conv1"
FC1 = "lora_te2_text_model_encoder_layers_0_mlp_fc1"


# PEFT


class Block(nn.Module):
    """Three modules to adapt, with sizes that LoKr splits into (6, 8) and (5, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(40, 48)
        self.conv_shortcut = nn.Conv2d(40, 48, 1)
        self.conv1 = nn.Conv2d(40, 48, 3)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid_block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.mid_block.conv1(x) + self.mid_block.proj(x.movedim(1, -1)).movedim(-1, 1)


TARGETS = ["proj", "conv_shortcut", "conv1"]
PEFT_CONFIGS: dict[str, Any] = {
    "LoRA": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "DoRA": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True),
    "DoRA, rank-stabilised": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True, use_rslora=True),
    "LoHa": LoHaConfig(r=4, alpha=6, target_modules=TARGETS),
    "LoHa, patterns": LoHaConfig(
        r=4, alpha=6, target_modules=TARGETS, rank_pattern={"conv1": 2}, alpha_pattern={"conv1": 5}
    ),
    "LoHa, Tucker": LoHaConfig(r=4, alpha=6, target_modules=TARGETS, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=2, alpha=2, target_modules=TARGETS),
    "LoKr, scaled": LoKrConfig(r=2, alpha=5, target_modules=TARGETS),
    "LoKr, both factorised": LoKrConfig(r=2, alpha=2, target_modules=TARGETS, decompose_both=True),
    "LoKr, Tucker": LoKrConfig(r=2, alpha=2, target_modules=TARGETS, use_effective_conv2d=True),
    "LoKr, whole": LoKrConfig(r=16, alpha=16, target_modules=TARGETS),
    "LoKr, whole and scaled": LoKrConfig(
        r=16, alpha=4, target_modules=TARGETS, rank_pattern={"conv1": 8}, alpha_pattern={"proj": 3}
    ),
}


def merged_changes(network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """PEFT's weight before merging and what merging adds to it, by path."""
    found = {}
    for path, module in network.named_modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            before = module.base_layer.weight.detach().clone()
            module.merge()
            found[path.removeprefix("base_model.model.")] = before, module.base_layer.weight.detach() - before
            module.unmerge()
    return found


@pytest.mark.parametrize("config", PEFT_CONFIGS)
def test_folders_of_peft_mean_what_peft_adds(config: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = get_peft_model(Network(), PEFT_CONFIGS[config])
    randomise(network)
    if "scaled" in config and leaves_out_the_scale(network):
        pytest.skip("this PEFT scales no LoKr")
    network.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.kind == config.split(",")[0]
    assert set(adapter.layers) == {f"lora_unet_mid_block_{name}" for name in TARGETS}
    write_adapter(tmp_path / "kohya.safetensors", adapter, torch.float32)
    again = read_adapter(tmp_path / "kohya.safetensors")
    for path, (weight, change) in merged_changes(network).items():
        for one in (adapter, again):
            assert_close(one.layers[module_name("unet", path)].delta(weight), change)


@pytest.mark.parametrize("config", ["DoRA", "LoHa", "LoKr", "LoKr, Tucker", "LoKr, both factorised"])
def test_layers_made_of_peft_parameters_add_what_peft_adds(config: str) -> None:
    """As a trainer sees them: injected, without names of a file."""
    torch.manual_seed(0)
    network = inject_adapter_in_model(PEFT_CONFIGS[config], Network())
    randomise(network)
    for path, (weight, change) in merged_changes(network).items():
        module = network.get_submodule(path)
        if config == "DoRA":
            magnitude = module.lora_magnitude_vector["default"].weight
            parts = {
                "lora_down.weight": module.lora_A["default"].weight,
                "lora_up.weight": module.lora_B["default"].weight,
                "dora_scale": magnitude.reshape(-1, *[1] * (weight.ndim - 1)),
            }
        else:
            names = [name for name in module.adapter_layer_names if "default" in getattr(module, name)]
            parts = {name: getattr(module, name)["default"] for name in names}
        alpha = (module.lora_alpha if config == "DoRA" else module.alpha)["default"]
        delta = make_layer(path, parts, alpha).delta(weight)
        assert not delta.requires_grad
        assert_close(delta, change)
        if config != "DoRA":
            assert_close(delta, module.get_delta_weight("default").detach())


# Files


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "per output", "per input"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_read(variant: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    shape = WEIGHTS["conv 3×3"]
    parts = with_dora(random_parts(variant, shape, dtype), shape, form)
    layer = make_layer("m", parts, ALPHA)
    assert {part: id(tensor) for part, tensor in layer.tensors().items()} == {p: id(t) for p, t in parts.items()}
    write_adapter(tmp_path / "adapter.safetensors", Adapter({CONV: layer}), dtype)
    back = read_adapter(tmp_path / "adapter.safetensors").layers[CONV]
    assert (back.kind, back.alpha, back.rank, back.shape) == (layer.kind, ALPHA, layer.rank, layer.shape)
    assert {part for part in back.tensors() if part != "dora_scale"} == set(shapes_of(variant, shape))
    for part, tensor in back.tensors().items():
        assert tensor.dtype == (torch.float32 if part == "dora_scale" else dtype)
        assert torch.equal(tensor, parts[part].to(tensor.dtype))


def test_the_scale_of_a_dora_is_never_halved() -> None:
    """It is as large as the weights, so that half precision would hide a small change."""
    shape = WEIGHTS["linear"]
    layer = make_layer("m", with_dora(random_parts("LoRA", shape), shape, "per output"), ALPHA)
    written = Adapter({"lora_unet_m": layer}).state_dict(torch.float16)
    assert {name.partition(".")[2]: tensor.dtype for name, tensor in written.items()} == {
        "lora_down.weight": torch.float16,
        "lora_up.weight": torch.float16,
        "dora_scale": torch.float32,
        "alpha": torch.float32,
    }


PATH = "mid_block.attentions.0.proj_in"
NAME = "lora_unet_mid_block_attentions_0_proj_in"
NAMINGS = {
    "kohya": f"{NAME}.",
    "LyCORIS alone": f"lycoris_{PATH.replace('.', '_')}.",
    "diffusers": f"unet.{PATH}.",
    "PEFT": f"base_model.model.{PATH}.",
    "ComfyUI": f"diffusion_model.{PATH}.",
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("form", ["plain", "per output"])
@pytest.mark.parametrize("variant", ["LoHa", "LoKr, both factorised", "LoKr, whole"])
def test_every_naming_means_the_same(variant: str, form: str, naming: str) -> None:
    shape = WEIGHTS["linear"]
    parts = with_dora(random_parts(variant, shape), shape, form) | {"alpha": torch.tensor(ALPHA)}
    adapter = parse_adapter({NAMINGS[naming] + part: tensor for part, tensor in parts.items()})
    assert list(adapter.layers) == [NAME]
    found = {**adapter.layers[NAME].tensors(), "alpha": torch.tensor(adapter.layers[NAME].alpha)}
    assert all(torch.equal(found[part], tensor) for part, tensor in parts.items())


@pytest.mark.parametrize("ending", ["", ".weight", ".default", ".default.weight"])
@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=list(WEIGHTS))
def test_magnitudes_of_peft_are_read_under_all_their_names(ending: str, shape: tuple[int, ...]) -> None:
    parts = random_parts("LoRA", shape)
    magnitude = torch.rand(shape[0])
    tensors = {
        f"unet.{PATH}.lora_A.weight": parts["lora_down.weight"],
        f"unet.{PATH}.lora_B.weight": parts["lora_up.weight"],
        f"unet.{PATH}.lora_magnitude_vector{ending}": magnitude if len(shape) == 2 else magnitude.reshape(1, -1, 1, 1),
    }
    adapter = parse_adapter(tensors)
    assert adapter.kind == "DoRA"
    scale = adapter.layers[NAME].tensors()["dora_scale"]
    assert scale.shape == (shape[0], *[1] * (len(shape) - 1))
    assert torch.equal(scale.flatten(), magnitude)


@pytest.mark.parametrize("level", ["text_model.", ""])
@pytest.mark.parametrize(("component", "prefix"), [("unet", "unet"), ("text_encoder", "te"), ("text_encoder_2", "te2")])
def test_every_component_has_its_prefix_and_its_alpha(component: str, prefix: str, level: str) -> None:
    """As diffusers' pipelines with two text encoders write them, with all alphas in the header."""
    path = "mid_block.proj_in" if component == "unet" else f"{level}encoder.layers.0.mlp.fc1"
    header = {f"{part}.lora_alpha": n for n, part in enumerate(("unet", "text_encoder", "text_encoder_2"), start=1)}
    header |= {f"{component}.alpha_pattern": {"proj_in": 7.5, "fc1": 7.5}}
    tensors = {f"{component}.{path}.{half}.weight": torch.ones(2, 2) for half in ("lora_A", "lora_B")}
    [(name, layer)] = parse_adapter(tensors, {"lora_adapter_metadata": json.dumps(header)}).layers.items()
    text = "lora_%s_text_model_encoder_layers_0_mlp_fc1"
    assert name == ("lora_unet_mid_block_proj_in" if component == "unet" else text % prefix)
    assert layer.alpha == 7.5
    del header[f"{component}.alpha_pattern"]
    [layer] = parse_adapter(tensors, {"lora_adapter_metadata": json.dumps(header)}).layers.values()
    assert layer.alpha == header[f"{component}.lora_alpha"]


@pytest.mark.parametrize(
    ("variants", "kind", "shown"),
    [
        (["LoRA"], "LoRA", "LoCon"),
        (["LoRA, Tucker"], "LoRA", "LoCon"),
        (["LoHa"], "LoHa", "LoHa"),
        (["LoKr, whole"], "LoKr", "LoKr"),
        (["LoHa", "LoRA", "LoRA"], "LoRA, LoHa", "LoCon, LoHa"),
    ],
)
def test_inspection_tells_the_kind(variants: list[str], kind: str, shown: str, tmp_path: Path) -> None:
    shape = WEIGHTS["conv 3×3"]
    names = [f"lora_unet_mid_block_resnets_{n}_conv1" for n in range(len(variants))]
    layers = {name: make_layer("m", random_parts(v, shape), ALPHA) for name, v in zip(names, variants, strict=True)}
    assert Adapter(layers).kind == kind
    write_adapter(tmp_path / "adapter.safetensors", Adapter(layers), torch.float16)
    facts = inspect(tmp_path / "adapter.safetensors")
    assert (facts["kind"], facts["dtype"], facts["alpha"]) == (shown, ["float16"], [ALPHA])
    assert facts["rank"] == [1 if "whole" in variants[0] else RANK]


def test_inspection_of_linear_loras_and_doras(tmp_path: Path) -> None:
    shape = WEIGHTS["linear"]
    plain = make_layer("m", random_parts("LoRA", shape), ALPHA)
    dora = make_layer("m", with_dora(random_parts("LoRA", shape), shape, "per output"), ALPHA)
    for layer, kind in ((plain, "LoRA"), (dora, "DoRA")):
        write_adapter(
            tmp_path / "adapter.safetensors",
            Adapter({FC1: layer}),
            torch.bfloat16,
        )
        facts = inspect(tmp_path / "adapter.safetensors")
        assert (facts["kind"], facts["dtype"]) == (kind, ["bfloat16"])
        assert facts["modules"] == {"text_encoder_2": {"count": 1, "mlp_fc1": 1}}


# Refusals


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_missing_tensor_is_named(variant: str, tmp_path: Path) -> None:
    parts = random_parts(variant, WEIGHTS["conv 3×3"])
    for lost in parts:
        if lost in ("lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2"):
            continue
        save_file({f"{NAME}.{part}": parts[part] for part in parts if part != lost}, tmp_path / "a.safetensors")
        with pytest.raises(AdapterError) as caught:
            read_adapter(tmp_path / "a.safetensors")
        assert "a.safetensors" in caught.value.problem
        assert f"{variant.split(',')[0]} {NAME} lacks its {lost}" in caught.value.problem


def spoilt(variant: str, part: str, tensor: Tensor) -> Parts:
    return random_parts(variant, WEIGHTS["conv 3×3"]) | {part: tensor}


DAMAGED = {
    "ranks": (spoilt("LoRA", "lora_up.weight", torch.ones(12, 3, 1, 1)), "lora_up.weight (12, 3, 1, 1)"),
    "an up with a kernel": (spoilt("LoRA", "lora_up.weight", torch.ones(12, 2, 3, 3)), "(12, 2, 3, 3)"),
    "a number": (spoilt("LoRA", "lora_down.weight", torch.ones(())), "lora_down.weight ()"),
    "a core": (spoilt("LoRA, Tucker", "lora_mid.weight", torch.ones(3, 2, 3, 3)), "lora_mid.weight (3, 2, 3, 3)"),
    "a core of two ranks": (spoilt("LoRA, Tucker", "lora_mid.weight", torch.ones(2, 3, 3, 3)), "(2, 3, 3, 3)"),
    "an up beside a core": (spoilt("LoRA, Tucker", "lora_up.weight", torch.ones(12, 3, 1, 1)), "(12, 3, 1, 1)"),
    "an inner factor beside a core": (spoilt("LoHa, Tucker", "hada_w1_b", torch.ones(2, 10, 1, 1)), "(2, 10, 1, 1)"),
    "an outer factor beside a core": (spoilt("LoHa, Tucker", "hada_w2_a", torch.ones(2, 12, 1, 1)), "(2, 12, 1, 1)"),
    "a core beside a kernel": (spoilt("LoRA", "lora_mid.weight", torch.ones(2, 2, 3, 3)), "(2, 10, 3, 3)"),
    "two shapes": (spoilt("LoHa", "hada_w2_a", torch.ones(11, 2)), "hada_w2_a (11, 2)"),
    "one core of two": (spoilt("LoHa", "hada_t1", torch.ones(2, 2, 3, 3)), "hada_t1"),
    "ranks of a LoKr": (spoilt("LoKr", "lokr_w2_b", torch.ones(3, 45)), "lokr_w2_b (3, 45)"),
    "a small factor with a kernel": (spoilt("LoKr", "lokr_w1", torch.ones(A, C, 1, 1)), "lokr_w1 (3, 2, 1, 1)"),
    "a small outer factor with a kernel": (
        spoilt("LoKr, both factorised", "lokr_w1_a", torch.ones(A, RANK, 1, 1)),
        "lokr_w1_a (3, 2, 1, 1)",
    ),
    "a small inner factor with a kernel": (
        spoilt("LoKr, both factorised", "lokr_w1_b", torch.ones(RANK, C, 1, 1)),
        "lokr_w1_b (2, 2, 1, 1)",
    ),
    "a vector": (spoilt("LoKr, whole", "lokr_w2", torch.ones(3)), "lokr_w2 (3,)"),
    "no rank": (
        {"lora_down.weight": torch.ones(0, 10), "lora_up.weight": torch.ones(12, 0)},
        "lora_down.weight (0, 10)",
    ),
    "an empty dora_scale": (spoilt("LoRA", "dora_scale", torch.ones(1, 0)), "dora_scale (1, 0)"),
    "two kinds": (spoilt("LoHa", "lora_up.weight", torch.ones(2, 2)), "also has"),
    "a dora_scale": (spoilt("LoRA", "dora_scale", torch.ones(11, 1, 1, 1)), "dora_scale (11, 1, 1, 1)"),
    "a dora_scale per input": (spoilt("LoRA", "dora_scale", torch.ones(1, 11, 1, 1)), "dora_scale (1, 11, 1, 1)"),
    "a dora_scale of a divisor": (spoilt("LoRA", "dora_scale", torch.ones(5, 1, 1, 1)), "dora_scale (5, 1, 1, 1)"),
    "a dora_scale of one number": (spoilt("LoRA", "dora_scale", torch.ones(1)), "dora_scale (1,)"),
    "a dora_scale that is a number": (spoilt("LoRA", "dora_scale", torch.ones(())), "dora_scale ()"),
    "NaN or infinite": (spoilt("LoHa", "hada_w1_b", torch.full((2, 90), torch.nan)), "finite"),
    "a dora_scale that is not finite": (spoilt("LoRA", "dora_scale", torch.full((12, 1, 1, 1), torch.inf)), "finite"),
    "an alpha that is not finite": (spoilt("LoKr", "alpha", torch.tensor(torch.nan)), "finite"),
    "rotations in a matrix": ({"oft_blocks": torch.ones(4, 4)}, "oft_blocks (4, 4), but they should be square blocks"),
    "rotations of five axes": (
        {"oft_blocks": torch.ones(1, 2, 3, 4, 4)},
        "(1, 2, 3, 4, 4), but they should be square",
    ),
    "rotations that are no squares": (
        {"oft_blocks": torch.ones(2, 3, 4)},
        "(2, 3, 4), but they should be square blocks",
    ),
    "butterfly factors of odd sizes": ({"oft_blocks": torch.ones(2, 2, 3, 3)}, "which are not butterfly factors"),
    "butterfly factors of a half": ({"oft_blocks": torch.ones(2, 3, 4, 4)}, "which are not butterfly factors"),
    "a rescale": ({"oft_blocks": torch.ones(2, 4, 4), "rescale": torch.ones(7, 1)}, "rescale (7, 1), which don't fit"),
    "a rescale alone": ({"rescale": torch.ones(12, 1)}, f"the OFT {NAME} lacks its oft_blocks"),
    "a dora_scale alone": ({"dora_scale": torch.ones(12, 1)}, f"the LoRA {NAME} lacks its lora_down.weight"),
    "an alpha alone": ({"alpha": torch.tensor(2.0)}, f"the LoRA {NAME} lacks its lora_down.weight"),
    "many alphas": (spoilt("LoKr", "alpha", torch.ones(3)), "alpha"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_layer_is_refused(case: str) -> None:
    parts, told = DAMAGED[case]
    with pytest.raises(AdapterError) as caught:
        parse_adapter({f"{NAME}.{part}": tensor for part, tensor in parts.items()})
    assert NAME in caught.value.problem
    assert told in caught.value.problem


def test_an_alpha_of_the_metadata_that_is_not_finite_is_refused() -> None:
    tensors = {f"unet.{PATH}.{half}.weight": torch.ones(2, 2) for half in ("lora_A", "lora_B")}
    with pytest.raises(AdapterError, match="alpha"):
        parse_adapter(tensors, {"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'})


def test_layers_are_frozen_and_can_be_replaced() -> None:
    layer = make_layer("m", random_parts("LoKr", WEIGHTS["linear"]), ALPHA)
    assert_close(replace(layer, alpha=2 * ALPHA).delta(), 2 * layer.delta())
    with pytest.raises(AttributeError):
        layer.alpha = 1.0  # type: ignore[misc]
