"""Merging adapters of all kinds by identities: sums, one adapter alone, strengths, kernels, reports and refusals."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_maths import (
    CONV_NAME,
    DTYPES,
    NAME,
    NEEDING_WEIGHTS,
    PLAIN,
    WEIGHTS,
    Shape,
    adapter_of,
    added,
    error,
    kinds_for,
    merged,
    random_weight,
    settings,
    single,
    tensors_of,
    total,
)
from helpers import Recorder
from pack.trainer.adapters.kohya import Adapter, read_adapter, write_adapter
from pack.trainer.adapters.layers import FullLayer, LoraLayer
from pack.trainer.core.errors import AdapterError, CancelledError, SettingsError, TrainerError
from pack.trainer.merging.deltas import Delta
from pack.trainer.merging.merge import MergeResult, WeightedAdapter, merge
from pack.trainer.settings.merge import MergeCommand, MergeSettings, parse_block_weights
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

REDUCING = ("svd", "ties", "dare", "dare-ties", "prune")
DENSE = ("ties", "dare", "dare-ties", "prune")
CASES = [pytest.param(kind, weight, id=f"{kind}, {weight}") for weight in WEIGHTS for kind in kinds_for(weight)]
TEXT = "lora_te1_text_model_encoder_layers_3_mlp_fc1"
BLOCKS = "lora_unet_mid_block_attentions_0_transformer_blocks"
SD1_TEXT = TEXT.replace("te1", "te")


def dtypes_for(kind: str) -> tuple[torch.dtype, ...]:
    """Programs write fp8 files of the kinds that don't depend on weights."""
    return DTYPES[:3] if kind in NEEDING_WEIGHTS else DTYPES


def lora(out: int, inside: int, rank: int, seed: int, *kernel: int) -> dict[str, Tensor]:
    return tensors_of("LoRA", (out, inside, *kernel), seed, rank)


def sole(result: MergeResult, shape: Shape, name: str = NAME) -> Tensor:
    """What a result's module adds, by its equation."""
    return added(result.adapter.layers[name], shape)


def as_plain(method: str) -> dict[str, Any]:
    """A method with the settings that make it a sum, or TIES' average."""
    return {"method": method} | ({"density": 1.0} if method in DENSE else {})


# One adapter


@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_the_sum_of_one_adapter_is_its_very_tensors(kind: str, weight: str) -> None:
    """DoRA and OFT, too, and without a base model."""
    for dtype in dtypes_for(kind):
        adapter = single(kind, WEIGHTS[weight], dtype=dtype)
        result = merged(adapter).adapter
        assert set(result.layers) == {NAME}
        before, after = adapter.layers[NAME], result.layers[NAME]
        assert (after.kind, after.alpha, after.rank) == (before.kind, before.alpha, before.rank)
        assert {name: id(one) for name, one in after.tensors().items()} == {
            name: id(one) for name, one in before.tensors().items()
        }


@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_one_adapter_by_any_method_stays_what_it_is(kind: str, weight: str) -> None:
    """At density 1 and without a limit of rank."""
    shape = WEIGHTS[weight]
    base = random_weight(shape)
    for dtype, method in itertools.product(dtypes_for(kind), (*REDUCING, "orthogonal")):
        adapter = single(kind, shape, dtype=dtype)
        result = merged(adapter, weights={NAME: base}, **as_plain(method))
        after = result.adapter.layers[NAME]
        assert error(added(after, shape, base), added(adapter.layers[NAME], shape, base)) < 1e-5
        assert method == "orthogonal" or after.kind == "LoRA"
        assert method == "orthogonal" or after.shape == shape


@pytest.mark.parametrize("strength", [-1.5, 0.0, 0.3])
@pytest.mark.parametrize(("kind", "weight"), CASES)
def test_one_adapter_is_scaled(kind: str, weight: str, strength: float) -> None:
    """Those that are proportional to a number of their own stay of their kind; alpha 0 means the rank elsewhere."""
    shape = WEIGHTS[weight]
    base = random_weight(shape)
    adapter = single(kind, shape)
    after = merged((adapter, strength), weights={NAME: base}).adapter.layers[NAME]
    expected = strength * added(adapter.layers[NAME], shape, base)
    assert (added(after, shape, base) - expected).norm() <= 1e-6 * max(expected.norm(), 1e-30)
    assert after.alpha
    if kind not in NEEDING_WEIGHTS and strength:
        assert after.kind == adapter.layers[NAME].kind
        assert after.rank == adapter.layers[NAME].rank


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_not_written_to(dtype: torch.dtype) -> None:
    adapters = [single(kind, WEIGHTS["linear"], n, dtype=dtype) for n, kind in enumerate(PLAIN)]
    before = [{part: t.clone() for part, t in one.layers[NAME].tensors().items()} for one in adapters]
    for method in ("sum", "orthogonal", *REDUCING):
        merged(*((one, 0.7) for one in adapters), **as_plain(method))
    for one, tensors in zip(adapters, before, strict=True):
        for part, tensor in one.layers[NAME].tensors().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor.float(), tensors[part].float())


# Sums


PAIRS = [
    pytest.param(*pair, weight, id=f"{' + '.join(pair)}, {weight}")
    for weight in WEIGHTS
    for pair in itertools.combinations_with_replacement(kinds_for(weight), 2)
]


@pytest.mark.parametrize(("one", "other", "weight"), PAIRS)
def test_the_sum_of_two_adds_what_both_add(one: str, other: str, weight: str) -> None:
    """Of every pair of kinds, and of mixed types."""
    shape = WEIGHTS[weight]
    base = random_weight(shape)
    for place, dtype in enumerate(dtypes_for(one)):
        types = dtypes_for(other)
        a = single(one, shape, 1, rank=2, dtype=dtype)
        b = single(other, shape, 2, rank=3, dtype=types[(place + len(one)) % len(types)])
        result = merged((a, 0.8), (b, -1.3), weights={NAME: base})
        expected = total([added(adapter.layers[NAME], shape, base) for adapter in (a, b)], (0.8, -1.3))
        rounding = 1e-6 * expected.norm()
        if {one, other} & set(NEEDING_WEIGHTS):
            rounding += 1e-6 * base.norm()  # from which their change is a difference
        assert (sole(result, shape) - expected).norm() <= rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [(1, 7, 4), (16, 2, 9)])
def test_three_adapters_of_unequal_ranks(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also where the ranks add up to more than the weight has."""
    shape = WEIGHTS["linear"]
    adapters = [single("LoRA", shape, n, rank, dtype) for n, rank in enumerate(ranks)]
    strengths = (0.5, -2.0, 1.25)
    result = merged(*zip(adapters, strengths, strict=True))
    expected = total([added(one.layers[NAME], shape) for one in adapters], strengths)
    assert error(sole(result, shape), expected) < 1e-6
    layer = result.adapter.layers[NAME]
    assert (layer.kind, layer.rank, layer.alpha) == ("LoRA", sum(ranks), sum(ranks))


def test_many_adapters_of_many_types_in_one() -> None:
    shape = WEIGHTS["conv 3×3"]
    kinds = [kind for kind in kinds_for("conv 3×3") if kind not in NEEDING_WEIGHTS][:7]
    adapters = [single(kind, shape, n, 1 + n % 3, DTYPES[n % 4]) for n, kind in enumerate(kinds)]
    strengths = [(-1) ** n * (1 + n / 10) for n in range(len(kinds))]
    result = merged(*zip(adapters, strengths, strict=True))
    expected = total([added(one.layers[NAME], shape) for one in adapters], strengths)
    assert error(sole(result, shape), expected) < 1e-6


def test_modules_of_one_adapter_only_stay_its_own() -> None:
    shape = WEIGHTS["linear"]
    names = [f"lora_unet_mid_block_attentions_0_transformer_blocks_{n}_attn1_to_q" for n in range(3)]
    a = adapter_of({names[0]: lora(12, 20, 2, 1), names[1]: lora(12, 20, 4, 2)})
    b = adapter_of({names[1]: lora(12, 20, 3, 3), names[2]: tensors_of("LoHa", shape, 4)})
    result = merged((a, 1.0), (b, 0.5)).adapter
    assert list(result.layers) == names
    assert all(
        tensor is a.layers[names[0]].tensors()[part] for part, tensor in result.layers[names[0]].tensors().items()
    )
    assert result.layers[names[1]].rank == 7
    assert result.layers[names[2]].kind == "LoHa"
    assert error(added(result.layers[names[2]], shape), 0.5 * added(b.layers[names[2]], shape)) < 1e-6
    both = added(a.layers[names[1]], shape) + 0.5 * added(b.layers[names[1]], shape)
    assert error(added(result.layers[names[1]], shape), both) < 1e-6


# Strengths of parts of the model


BY_PART = (
    "lora_unet_input_blocks_4_1_proj_in",
    "lora_unet_input_blocks_7_1_transformer_blocks_0_attn2_to_v",
    "lora_unet_output_blocks_5_1_proj_out",
    TEXT,
    "lora_te2_text_model_encoder_layers_5_self_attn_q_proj",
)


def by_part() -> Adapter:
    """An SDXL's: down 1, down 2, up 1 and both text encoders."""
    return adapter_of({name: lora(6, 5, 2, n) for n, name in enumerate(BY_PART)})


@pytest.mark.parametrize(
    ("blocks", "factors"),
    [
        ("", (1, 1, 1, 1, 1)),
        ("down_blocks=0.5", (0.5, 0.5, 1, 1, 1)),
        (r"down_blocks\.2=0.5", (1, 0.5, 1, 1, 1)),
        ("down_blocks=0.5 attn2=3 proj=0", (0, 3, 0, 1, 0)),
        ("attn2=3 down_blocks=0.5", (0.5, 0.5, 1, 1, 1)),
        ("^text_encoder=-1 layers=2", (1, 1, 1, 2, 2)),
        (r"text_encoder\.=0.25", (1, 1, 1, 0.25, 1)),
        ("mid_block|up_blocks=1e-1", (1, 1, 0.1, 1, 1)),
        ("attn(?=2)=2 layers[.]3=-0.5", (1, 2, 1, -0.5, 1)),
    ],
)
def test_strengths_of_text_encoders_and_blocks(blocks: str, factors: tuple[float, ...]) -> None:
    """The last pattern that is found in a place counts, on top of the strength of the UNet or the text encoders."""
    adapter = by_part()
    part = WeightedAdapter(adapter, "A", 0.8, -0.4, parse_block_weights(blocks))
    result = merge([part], settings("sum")).adapter
    for name, factor in zip(BY_PART, factors, strict=True):
        layer = adapter.layers[name]
        strength = factor * (0.8 if "unet" in name else -0.4)
        difference = added(result.layers[name], (6, 5)) - strength * added(layer, (6, 5))
        assert difference.norm() <= 1e-6 * added(layer, (6, 5)).norm()


def test_each_adapter_has_block_weights_of_its_own() -> None:
    a, b = by_part(), by_part()
    parts = [
        WeightedAdapter(a, "A", 1.0, 1.0, parse_block_weights("down_blocks=0.5")),
        WeightedAdapter(b, "B", 2.0, 3.0),
    ]
    result = merge(parts, settings("svd", rank=0)).adapter
    for name, factor in {"lora_unet_input_blocks_4_1_proj_in": 2.5, TEXT: 4.0}.items():
        assert error(added(result.layers[name], (6, 5)), factor * added(a.layers[name], (6, 5))) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_biases_and_norms_are_summed_with_their_weights(dtype: torch.dtype) -> None:
    def adapter(seed: int, *names: str) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        vectors = {name: torch.randn(12, generator=generator).to(dtype) for name in names}
        return Adapter({NAME: LoraLayer(torch.ones(1, 20), torch.ones(12, 1), 1.0)}, {}, vectors)

    bias, norm, text = f"{NAME}.diff_b", "lora_unet_conv_norm_out.diff", f"{SD1_TEXT}.diff_b"
    a, b = adapter(1, bias, norm), adapter(2, bias, text)
    blocks = parse_block_weights("mid_block=0.5")
    parts = [WeightedAdapter(a, "A", 0.8, 9.0, blocks), WeightedAdapter(b, "B", -2.0, 0.3)]
    for method in ("sum", "svd", "orthogonal"):
        found = merge(parts, settings(method)).adapter.vectors
        assert set(found) == {bias, norm, text}
        expected = {
            bias: 0.4 * a.vectors[bias].double() - 2 * b.vectors[bias].double(),
            norm: 0.8 * a.vectors[norm].double(),
            text: 0.3 * b.vectors[text].double(),
        }
        for name, vector in expected.items():
            torch.testing.assert_close(found[name].double(), vector, rtol=1e-6, atol=1e-6)


# Kernels that files leave out


POINT: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "4-D": lambda seed: lora(12, 18, 2, seed, 1, 1),
    "2-D": lambda seed: lora(12, 18, 3, seed),
    "full difference": lambda seed: tensors_of("full difference", (12, 18, 1, 1), seed),
    "flat LoHa": lambda seed: tensors_of("LoHa", (12, 18), seed),
}


@pytest.mark.parametrize("method", ["sum", "orthogonal", *REDUCING])
@pytest.mark.parametrize("kinds", list(itertools.permutations(POINT, 2)), ids=" beside ".join)
def test_a_kernel_of_one_may_be_left_out(kinds: tuple[str, str], method: str) -> None:
    a, b = (adapter_of({NAME: POINT[kind](n)}) for n, kind in enumerate(kinds))
    result = merged(a, b, **as_plain(method))
    shape = (12, 18, 1, 1) if {"4-D", "full difference"} & set(kinds) else (12, 18)
    assert result.adapter.layers[NAME].shape == shape
    changes = [added(one.layers[NAME], (12, 18)) for one in (a, b)]
    if method in ("sum", "svd", "dare", "prune"):
        assert error(sole(result, (12, 18)), changes[0] + changes[1]) < (1e-6 if method == "sum" else 1e-5)


FLAT_KINDS = ("LoHa", "LoKr", "LoKr, both factorised")


@pytest.mark.parametrize("kind", FLAT_KINDS)
@pytest.mark.parametrize("order", [1, -1])
def test_a_flat_kernel_beside_one_that_is_known(kind: str, order: int) -> None:
    shape = WEIGHTS["conv 3×3"]
    pair = [single(kind, shape, 1), single("LoRA", shape, 2)][::order]
    for method in ("sum", "svd"):
        result = merged(*pair, method=method)
        assert result.adapter.layers[NAME].shape == shape
        assert error(sole(result, shape), total([added(one.layers[NAME], shape) for one in pair], (1, 1))) < 1e-5


CONV_NAMES = [
    CONV_NAME,
    "lora_unet_up_blocks_1_resnets_2_conv2",
    "lora_unet_down_blocks_0_downsamplers_0_conv",
    "lora_unet_up_blocks_1_upsamplers_0_conv",
    "lora_unet_input_blocks_4_0_in_layers_2",
    "lora_unet_output_blocks_5_0_out_layers_3",
    "lora_unet_conv_out",
    "lora_unet_conv_in",
]


@pytest.mark.parametrize("xl", [False, True], ids=["SD 1", "SDXL"])
@pytest.mark.parametrize("name", CONV_NAMES)
def test_a_flat_kernel_is_known_by_the_name_of_its_convolution(name: str, xl: bool) -> None:
    shape = WEIGHTS["conv 3×3"]
    family = {"modelspec.architecture": "stable-diffusion-xl-v1-base" if xl else "stable-diffusion-v1"}
    a, b = (adapter_of({name: tensors_of(kind, shape, n)}, family) for n, kind in enumerate(("LoHa", "LoKr")))
    result = merged((a, 0.5), b, method="svd")
    [layer] = result.adapter.layers.values()
    assert layer.shape == shape
    expected = total([added(one.layers[name], shape) for one in (a, b)], (0.5, 1.0))
    assert error(added(layer, shape), expected) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut",
        "lora_unet_down_blocks_1_resnets_0_time_emb_proj",
        NAME,
        SD1_TEXT,
    ],
)
def test_what_is_no_convolution_with_a_kernel_gets_none(name: str) -> None:
    adapter = adapter_of({name: tensors_of("LoHa", (12, 18), 1)})
    [layer] = merged(adapter, method="svd").adapter.layers.values()
    assert math.prod(layer.shape[2:]) == 1


def test_the_kernel_is_asked_of_the_weight_if_no_adapter_tells() -> None:
    shape = (12, 20, 5, 3)
    adapter = single("LoHa", shape, 1)
    layer = merged(adapter, weights={NAME: random_weight(shape)}, method="svd").adapter.layers[NAME]
    assert layer.shape == shape
    assert error(added(layer, shape), added(adapter.layers[NAME], shape)) < 1e-5


# What is written


@pytest.mark.parametrize("method", ["sum", "svd", "orthogonal", "dare"])
def test_a_result_is_a_file_that_says_what_it_is(method: str, tmp_path: Path) -> None:
    kinds = ("LoRA", "LoHa", "full difference")
    a, b, c = (adapter_of({CONV_NAME: tensors_of(kind, WEIGHTS["conv 3×3"], n)}) for n, kind in enumerate(kinds))
    parts = [
        WeightedAdapter(a, "first", 0.5, 0.25, parse_block_weights("conv1=2")),
        WeightedAdapter(b, "second"),
        WeightedAdapter(c, "third"),
    ]
    result = merge(parts, settings(method)).adapter
    write_adapter(tmp_path / "merged.safetensors", result, torch.float32)
    back = read_adapter(tmp_path / "merged.safetensors")
    shape = WEIGHTS["conv 3×3"]
    assert error(added(back.layers[CONV_NAME], shape), added(result.layers[CONV_NAME], shape)) < 1e-6
    told = json.loads(back.metadata["dreambooth.merge"])
    assert told["method"] == method
    assert [one["title"] for one in told["inputs"]] == ["first", "second", "third"]
    assert told["inputs"][0]["strength"] == 0.5
    assert told["inputs"][0]["text_strength"] == 0.25
    assert told["inputs"][0]["blocks"] == {"conv1": 2.0}
    assert ("seed" in told, "density" in told, "rank" in told) == {
        "dare": (True, True, True),
        "svd": (False, False, True),
    }.get(method, (False, False, False))
    assert "protected" not in told or method == "orthogonal"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_halved_file_is_as_exact_as_its_type(dtype: torch.dtype, tmp_path: Path) -> None:
    shape = WEIGHTS["linear"]
    a, b = (single("LoRA", shape, n, 4) for n in (1, 2))
    for method in ("sum", "svd"):
        write_adapter(tmp_path / "merged.safetensors", merged(a, b, method=method).adapter, dtype)
        back = read_adapter(tmp_path / "merged.safetensors").layers[NAME]
        expected = added(a.layers[NAME], shape) + added(b.layers[NAME], shape)
        assert error(added(back, shape), expected) < 2 * torch.finfo(dtype).eps


def test_a_halved_sum_of_adapters_with_a_small_alpha_is_exact() -> None:
    """kohya's default alpha is 1, so that `up` times the scale would leave fp16's range of normal numbers."""
    shape = (40, 64)
    generator = torch.Generator().manual_seed(1)
    adapters = [
        Adapter({NAME: LoraLayer(*(factor.half() for factor in factors), 1.0)})
        for factors in (
            (torch.randn(128, 64, generator=generator), 1e-3 * torch.randn(40, 128, generator=generator))
            for _ in range(2)
        )
    ]
    result = merged(*((one, 0.5) for one in adapters)).adapter
    parts = {name: tensor.half() for name, tensor in result.layers[NAME].tensors().items()}
    back = LoraLayer(parts["lora_down.weight"], parts["lora_up.weight"], result.layers[NAME].alpha)
    expected = total([added(one.layers[NAME], shape) for one in adapters], (0.5, 0.5))
    assert error(added(back, shape), expected) < torch.finfo(torch.float16).eps


def test_a_merge_can_be_undone_by_subtraction() -> None:
    shape = WEIGHTS["linear"]
    a, b, c = (single("LoRA", shape, n) for n in (1, 2, 3))
    whole = merged((a, 0.7), (b, 1.0), (c, -0.2)).adapter
    left = merged(whole, (b, -1.0), (c, 0.2), method="svd").adapter.layers[NAME]
    assert error(added(left, shape), 0.7 * added(a.layers[NAME], shape)) < 1e-5


# The report


def inputs_of(weight: str, kinds: tuple[str, ...]) -> list[Adapter]:
    return [single(kind, WEIGHTS[weight], n, 3) for n, kind in enumerate(kinds)]


TRIOS = [
    ("linear", ("LoRA", "LoHa", "LoKr")),
    ("linear", ("LoRA", "LoRA", "full difference")),
    ("conv 3×3", ("LoRA", "LoRA, Tucker", "LoHa")),
]


@pytest.mark.parametrize(("weight", "kinds"), TRIOS)
def test_the_sum_keeps_everything(weight: str, kinds: tuple[str, ...]) -> None:
    strengths = (0.5, -1.0, 2.0)
    adapters = inputs_of(weight, kinds)
    [module] = merged(*zip(adapters, strengths, strict=True)).report.modules
    assert module.name == NAME
    assert module.kept == pytest.approx({0: 1.0, 1: 1.0, 2: 1.0}, abs=1e-5)
    assert module.lost == pytest.approx(0.0, abs=1e-5)
    changes = [added(one.layers[NAME], WEIGHTS[weight]) for one in adapters]
    for index, strength in enumerate(strengths):
        assert module.energy[index] == pytest.approx(float((strength * changes[index]).square().sum()), rel=1e-5)


@pytest.mark.parametrize(("weight", "kinds"), TRIOS)
@pytest.mark.parametrize("method", ["sum", "svd", "orthogonal", "prune"])
def test_the_overlap_is_the_cosine(weight: str, kinds: tuple[str, ...], method: str) -> None:
    """Of the weighted changes, before they are merged."""
    adapters = inputs_of(weight, kinds)
    [module] = merged(*zip(adapters, (0.5, -1.0, 2.0), strict=True), method=method).report.modules
    changes = [s * added(one.layers[NAME], WEIGHTS[weight]) for one, s in zip(adapters, (0.5, -1, 2), strict=True)]
    assert set(module.overlap) == {(0, 1), (0, 2), (1, 2)}
    for (i, j), cosine in module.overlap.items():
        expected = float((changes[i] * changes[j]).sum() / (changes[i].norm() * changes[j].norm()))
        assert cosine == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize(("weight", "kinds"), TRIOS)
def test_what_svd_loses_is_shared_among_the_inputs(weight: str, kinds: tuple[str, ...], rank: int) -> None:
    """Σ (1 − keptᵢ) ‖Δᵢ‖² = ‖S − M‖², since S − M and M are orthogonal."""
    shape = WEIGHTS[weight]
    strengths = (1.0, -0.5, 0.75)
    adapters = inputs_of(weight, kinds)
    result = merged(*zip(adapters, strengths, strict=True), method="svd", rank=rank)
    [module] = result.report.modules
    whole = total([added(one.layers[NAME], shape) for one in adapters], strengths)
    missing = float((whole - sole(result, shape)).square().sum())
    shared = sum((1 - module.kept[index]) * module.energy[index] for index in range(3))
    assert shared == pytest.approx(missing, rel=1e-3, abs=1e-5 * float(whole.square().sum()))
    assert module.lost == pytest.approx(missing / float(whole.square().sum()), abs=1e-5)
    assert module.rank == result.adapter.layers[NAME].rank == rank


@pytest.mark.parametrize("method", ["orthogonal", *DENSE])
def test_what_is_kept_is_as_defined(method: str) -> None:
    """keptᵢ = 1 − ⟨S − M, Δᵢ⟩ / ‖Δᵢ‖² whatever the method."""
    shape = WEIGHTS["linear"]
    a, b = (single("LoRA", shape, n) for n in (1, 2))
    result = merged(a, (b, -0.6), method=method)
    [module] = result.report.modules
    changes = [added(a.layers[NAME], shape), -0.6 * added(b.layers[NAME], shape)]
    missing = changes[0] + changes[1] - sole(result, shape)
    for index, change in enumerate(changes):
        expected = 1 - float((missing * change).sum() / change.square().sum())
        assert module.kept[index] == pytest.approx(expected, abs=1e-4)
    lost = float(missing.square().sum() / (changes[0] + changes[1]).square().sum())
    assert module.lost == pytest.approx(lost, abs=1e-4)


def reported(method: str = "svd", **values: Any) -> MergeResult:
    """A merge of two adapters with modules in common and modules of their own."""
    a = by_part()
    b = adapter_of({name: lora(6, 5, 3, 7 + n) for n, name in enumerate([*list(a.layers)[:3], "lora_unet_conv_out"])})
    parts = [WeightedAdapter(a, "dog & cat", 1.0, 0.0), WeightedAdapter(b, "<style> ö", 0.5)]
    return merge(parts, settings(method, **values))


@pytest.mark.parametrize("method", ["sum", "svd", "orthogonal", "ties"])
def test_reports_are_text_json_and_a_picture(method: str) -> None:
    """Also where a strength is zero and where an adapter lacks modules."""
    report = reported(method).report
    told = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert (told["inputs"], told["method"]) == (["dog & cat", "<style> ö"], method)
    assert len(told["modules"]) == 6
    assert list(told["blocks"]) == ["text", "text 2", "down 1", "down 2", "up 1", "other"]
    assert told["blocks"]["other"]["kept: dog & cat"] is None
    text = report.as_text()
    assert text.splitlines()[0].startswith(f"dog & cat + <style> ö: {method}, 6 modules")
    assert all(re.search(rf"^{block} ", text, re.M) for block in told["blocks"])
    assert "nan" not in text
    picture = report.heat_map()
    assert isinstance(picture, Image.Image)
    assert picture.mode == "RGB"
    assert min(picture.size) > 50


def test_a_report_tells_pairs_ranks_and_opposites() -> None:
    """Of three adapters of one module each pair has its own cosine; the column of overlap has no sign."""
    first, second, third = (
        torch.eye(4),
        torch.diag(torch.tensor([1.0, -1, -1, -1])),
        torch.diag(torch.tensor([1.0, 0, 0, 0])),
    )
    three = [adapter_of({NAME: {"diff": delta}}) for delta in (first, second, third)]
    report = merged(*three).report
    assert report.modules[0].overlap == pytest.approx({(0, 1): -0.5, (0, 2): 0.5, (1, 2): 0.5}, abs=1e-6)
    assert [text.split(" overlap")[0] for text in report.warnings] == ["A and B", "A and C", "B and C"]
    [columns] = merged(three[0], three[1]).report.by_block().values()
    assert columns["overlap"] == pytest.approx(0.5, abs=1e-6)
    ranks = adapter_of({f"{BLOCKS}_{n}_attn1_to_q": lora(6, 5, 2 + n, n) for n in range(3)})
    assert merged(ranks).report.as_text().splitlines()[0].endswith("3 modules, rank 2 to 4")


def test_the_cosine_of_a_warning_is_that_of_all_modules_in_common() -> None:
    """⟨a, b⟩ / (‖a‖ ‖b‖) of the two modules together, not a mean; a module of one of them alone does not count."""
    names = [f"{BLOCKS}_{n}_attn1_to_q" for n in range(3)]
    one, other = torch.eye(2), torch.diag(torch.tensor([1.0, -1.0]))
    a = adapter_of({names[0]: {"diff": 3 * one}, names[1]: {"diff": one}, names[2]: {"diff": 9 * one}})
    b = adapter_of({names[0]: {"diff": 2 * one}, names[1]: {"diff": 4 * other}})
    [warning] = merged(a, b).report.warnings
    assert f"cosine {12 / (20 * 40) ** 0.5:.2f}" in warning
    assert "reinforce each other" in warning


def test_an_adapter_of_strength_zero_overlaps_with_nothing() -> None:
    a, b = (single("LoRA", WEIGHTS["linear"], n) for n in (1, 2))
    for method in ("sum", "svd"):
        report = merged(a, (b, 0.0), method=method).report
        assert report.modules[0].overlap[0, 1] == pytest.approx(0.0, abs=1e-6)
        assert report.modules[0].kept[0] == pytest.approx(1.0, abs=1e-5)
        [warning] = report.warnings
        assert "strength 0" in warning


def test_strong_overlap_is_warned_of() -> None:
    a, b = (single("LoRA", WEIGHTS["linear"], n) for n in (1, 2))
    near = merged(a, (b, 0.05)).adapter
    [warning] = merged(a, near).report.warnings
    assert "A and B" in warning
    assert "reinforce" in warning
    [warning] = merged(a, (near, -1.0)).report.warnings
    assert "cancel" in warning
    assert not merged(*(single("LoRA", (64, 64), n, 2) for n in range(3))).report.warnings


def test_different_bases_are_warned_of() -> None:
    a, b = (adapter_of({NAME: lora(6, 5, 2, n)}, {"ss_sd_model_name": name}) for n, name in enumerate(("one", "two")))
    assert any("one" in text and "two" in text for text in merged(a, b).report.warnings)
    assert not any("base" in text for text in merged(a, a).report.warnings)


def test_nothing_in_common_is_warned_of_within_a_family() -> None:
    a = adapter_of({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": lora(32, 768, 2, 1)})
    b = adapter_of({"lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_v": lora(32, 768, 2, 2)})
    result = merged(a, b)
    assert set(result.adapter.layers) == {*a.layers, *b.layers}
    assert any("no modules in common" in text for text in result.report.warnings)


def test_an_adapter_of_biases_alone_is_reported_too() -> None:
    adapter = adapter_of({NAME: {"diff_b": torch.arange(4.0)}})
    result = merged((adapter, 2.0))
    assert torch.equal(result.adapter.vectors[f"{NAME}.diff_b"], 2 * torch.arange(4.0))
    json.dumps(result.report.as_json(), allow_nan=False)
    assert "0 modules" in result.report.as_text()
    assert isinstance(result.report.heat_map(), Image.Image)


def test_progress_is_told_and_a_merge_can_be_stopped() -> None:
    adapter = adapter_of({f"{BLOCKS}_{n}_attn1_to_q": lora(4, 3, 1, n) for n in range(40)})
    listener = Recorder()
    merge([WeightedAdapter(adapter, "A"), WeightedAdapter(adapter, "B")], settings("sum"), listener=listener)
    assert [(one.name, one.done, one.total) for one in listener.events] == [
        ("merging", done, 40) for done in (0, 16, 32, 40)
    ]
    with pytest.raises(CancelledError):
        merge(
            [WeightedAdapter(adapter, "A"), WeightedAdapter(adapter, "B")],
            settings("sum"),
            listener=Recorder(stop_after=2),
        )


# Memory


@pytest.mark.parametrize("method", ["sum", "svd", "orthogonal"])
def test_loras_are_merged_without_a_dense_matrix(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of plain LoRAs, LoCons and Tucker LoCons, and of the largest layers of an SDXL, which take a moment."""

    def refuse(self: Delta) -> Tensor:
        raise AssertionError("a dense matrix was made")

    def adapter(seed: int) -> Adapter:
        linear = {f"{BLOCKS}_{n}_attn1_to_q": lora(48, 64, 4, seed + n) for n in range(30)}
        convs = {f"lora_unet_mid_block_resnets_{n}_conv1": lora(48, 32, 4, seed + n, 3, 3) for n in range(8)}
        tucker = {"lora_unet_mid_block_resnets_0_conv2": tensors_of("LoRA, Tucker", (48, 32, 3, 3), seed, 4)}
        return adapter_of(linear | convs | tucker | {f"{BLOCKS}_0_ff_net_0_proj": lora(10240, 5120, 2, seed)})

    monkeypatch.setattr(Delta, "dense", refuse)
    result = merged(adapter(0), (adapter(100), 0.5), method=method)
    assert {layer.kind for layer in result.adapter.layers.values()} == {"LoRA"}
    assert max(layer.rank for layer in result.adapter.layers.values()) <= 8


def test_a_flat_loha_of_a_large_convolution_stays_in_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Delta, "dense", lambda self: pytest.fail("a dense matrix was made"))
    a, b = (single("LoHa", (320, 320, 3, 3), n, 4) for n in (1, 2))
    assert merged(a, b).adapter.layers[NAME].rank == 32


# Refusals


INSTRUCTIONS = {"Specify", "Provide", "Merge", "Use", "Choose", "Change", "Check", "Download", "Write"}


@contextmanager
def refused(kind: type[TrainerError], *told: str) -> Iterator[None]:
    """An error of that type, whose problem names the thing, and whose remedy says what to do."""
    with pytest.raises(kind) as caught:
        yield
    problem, remedy = caught.value.problem, caught.value.remedy
    for text in told:
        assert text in problem, problem
    assert remedy.split()[0] in INSTRUCTIONS, remedy
    assert problem.endswith("."), problem
    assert remedy.endswith("."), remedy


def test_no_adapters_are_refused() -> None:
    with refused(SettingsError, "no adapters"):
        merge([], settings("sum"))


ATTENTION = "lora_unet_%s_attentions_0_transformer_blocks_0_attn2_to_k"
FAMILIES = {
    "SD 1": (ATTENTION % "down_blocks_1", 768),
    "SD 2": (ATTENTION % "down_blocks_1", 1024),
    "SDXL": ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048),
}


@pytest.mark.parametrize("pair", list(itertools.combinations(FAMILIES, 2)), ids=" and ".join)
def test_adapters_of_different_families_are_refused(pair: tuple[str, str]) -> None:
    adapters = [adapter_of({FAMILIES[family][0]: lora(32, FAMILIES[family][1], 2, n)}) for n, family in enumerate(pair)]
    parts = [WeightedAdapter(one, title) for one, title in zip(adapters, ("dog", "cat"), strict=True)]
    with refused(AdapterError, f"dog is for {pair[0]}", f"cat is for {pair[1]}"):
        merge(parts, settings("sum"))


def test_adapters_of_different_families_are_refused_whatever_their_titles() -> None:
    names = ("SD 1", "SDXL")
    a, b = (adapter_of({FAMILIES[one][0]: lora(32, FAMILIES[one][1], 2, 1)}) for one in names)
    with refused(AdapterError, "SD 1", "SDXL"):
        merge([WeightedAdapter(a, "dog"), WeightedAdapter(b, "dog")], settings("sum"))


def test_adapters_of_unknown_families_without_a_common_module_are_refused() -> None:
    a, b = (
        adapter_of({f"{BLOCKS}_0_attn1_to_q": lora(6, 5, 2, 1)}),
        adapter_of({f"{BLOCKS}_0_attn1_to_k": lora(6, 5, 2, 2)}),
    )
    with refused(AdapterError, f"{BLOCKS}_0_attn1_to_q", f"{BLOCKS}_0_attn1_to_k"):
        merged(a, b)


@pytest.mark.parametrize("method", ["sum", "svd", "orthogonal", *DENSE])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((12, 20), (12, 21)),
        ((12, 20), (13, 20)),
        ((12, 20), (24, 10)),
        ((12, 20, 3, 3), (12, 20, 5, 5)),
        ((12, 20, 3, 3), (12, 20)),
        ((12, 20, 2, 8), (12, 20, 4, 4)),
    ],
)
def test_shapes_that_differ_are_refused(one: Shape, other: Shape, method: str) -> None:
    a, b = adapter_of({NAME: tensors_of("LoRA", one)}), adapter_of({NAME: tensors_of("LoRA", other)})
    with refused(AdapterError, NAME, str(one), str(other)):
        merged(a, b, method=method)


@pytest.mark.parametrize("method", ["sum", "svd"])
def test_shapes_of_different_kinds_that_differ_are_refused(method: str) -> None:
    a, b = single("LoHa", (12, 20)), single("full difference", (12, 22))
    with refused(AdapterError, NAME, "(12, 20)", "(12, 22)"):
        merged(a, b, method=method)


def test_biases_that_differ_in_size_are_refused() -> None:
    a, b = (
        Adapter({NAME: LoraLayer(torch.ones(1, 20), torch.ones(12, 1), 1.0)}, {}, {f"{NAME}.diff_b": torch.ones(size)})
        for size in (12, 13)
    )
    with refused(AdapterError, f"{NAME}.diff_b"):
        merged(a, b)


@pytest.mark.parametrize("kind", NEEDING_WEIGHTS)
@pytest.mark.parametrize("other", ["DoRA", "LoRA", "OFT"])
def test_adapters_that_depend_on_weights_need_them(kind: str, other: str) -> None:
    shape = WEIGHTS["linear"]
    a, b = single(kind, shape, 1), single(other, shape, 2)
    for strengths in ((1.0, 1.0), (1.0, 0.5)):
        with refused(AdapterError, a.layers[NAME].kind, NAME, "A"):
            merged(*zip((a, b), strengths, strict=True))
    for method in REDUCING:
        with refused(AdapterError, a.layers[NAME].kind, NAME):
            merged(a, method=method)
    with refused(AdapterError, a.layers[NAME].kind, NAME):
        merged((a, 0.5))


@pytest.mark.parametrize("kind", NEEDING_WEIGHTS)
def test_a_weight_of_another_shape_is_refused(kind: str) -> None:
    a, b = single(kind, (12, 20), 1), single("LoRA", (12, 20), 2)
    for shape in ((16, 20), (12, 22)):
        with refused(AdapterError, str(shape)):
            merged(a, b, weights={NAME: random_weight(shape)})


@pytest.mark.parametrize("pattern", ["down_block$", "mid_blocks", "lora_unet", "conv_?9"])
def test_block_weights_that_fit_nothing_are_refused(pattern: str) -> None:
    parts = [
        WeightedAdapter(by_part(), "dog"),
        WeightedAdapter(by_part(), "cat", 1.0, 1.0, parse_block_weights(f"proj=1 {pattern}=0.5")),
    ]
    with refused(SettingsError, f"'{pattern}'", "cat"):
        merge(parts, settings("sum"))


@pytest.mark.parametrize("entry", ["down_blocks", "=0.5", "down_blocks=", "down=half", "down=nan", "down=inf", "(=1"])
def test_block_weights_that_are_none_are_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=re.escape(entry)):
        parse_block_weights(f"up_blocks=1 {entry}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight", "alpha", "dora_scale", "diff_b"])
def test_files_with_numbers_that_are_not_finite_are_refused(part: str, value: float, tmp_path: Path) -> None:
    parts = tensors_of("DoRA", WEIGHTS["linear"]) | {"diff_b": torch.zeros(12)}
    parts[part] = torch.full_like(parts[part], value)
    save_file({f"{NAME}.{name}": tensor for name, tensor in parts.items()}, tmp_path / "broken.safetensors")
    with refused(AdapterError, "broken.safetensors", NAME, "NaN or infinite"):
        read_adapter(tmp_path / "broken.safetensors")


def test_files_that_are_no_adapters_are_refused(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.2.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.safetensors").write_text("not a file of tensors at all")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("model.safetensors", "notes.safetensors", "empty.safetensors", "missing.safetensors"):
        with refused(AdapterError, name):
            read_adapter(tmp_path / name)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"method": "svd", "rank": -1}, "rank"),
        ({"method": "svd", "conv_rank": -4}, "conv_rank"),
        ({"method": "svd", "rank": 0, "energy": 0}, "energy"),
        ({"method": "svd", "rank": 20_000}, "rank"),
        ({"method": "svd", "energy": 1.5}, "energy"),
        ({"method": "svd", "energy": math.nan}, "energy"),
        ({"method": "svd", "ratio": 0.5}, "ratio"),
        ({"method": "magic"}, "magic"),
        ({"method": "ties", "density": 0}, "density"),
        ({"method": "dare", "density": 1.01}, "density"),
        ({"method": "orthogonal", "protected": 0}, "protected"),
        ({"method": "dare", "seed": -1}, "seed"),
        ({"method": "sum", "rank": 8}, "rank"),
        ({"method": "sum", "rank": 32}, "rank"),
        ({"method": "sum", "energy": 0.9}, "energy"),
        ({"method": "orthogonal", "conv_rank": 4}, "conv_rank"),
        ({"method": "orthogonal", "ratio": 4}, "ratio"),
        ({"method": "svd", "density": 0.5}, "density"),
        ({"method": "ties", "protected": 1}, "protected"),
        ({"strength": 1}, "strength"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        MergeSettings.checked(values)
    assert told in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize("method", ["sum", "orthogonal"])
@pytest.mark.parametrize("name", ["rank", "conv_rank", "energy", "ratio"])
def test_the_command_refuses_a_size_of_what_is_exact(name: str, method: str) -> None:
    """As the node does: nothing that was asked for is left out in silence."""
    value = 0.9 if name == "energy" else 8
    given = {"loras": ("a.safetensors",), "output": "b.safetensors", "base": "c.safetensors", "device": "cpu"}
    with pytest.raises(SettingsError, match=name):
        MergeCommand.checked({"method": method, name: value, **given})
    MergeCommand.checked({"method": "svd", name: value, **given})


def test_a_dense_change_stays_a_difference_in_a_sum() -> None:
    a, b = single("full difference", WEIGHTS["linear"]), single("LoRA", WEIGHTS["linear"])
    assert isinstance(merged(a, b).adapter.layers[NAME], FullLayer)
