"""The parts of a merge one by one: strengths, limits, scaled layers, needed weights, warnings and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from adapter_maths import (
    CONV_NAME,
    NAME,
    NEEDING_WEIGHTS,
    WEIGHTS,
    Shape,
    adapter_of,
    added,
    error,
    merged,
    random_weight,
    settings,
    single,
    tensors_of,
)
from pack.trainer.adapters.kohya import Adapter
from pack.trainer.adapters.layers import FullLayer, Layer, LoraLayer
from pack.trainer.core.errors import AdapterError, SettingsError
from pack.trainer.merging.deltas import Truncation, to_delta
from pack.trainer.merging.merge import (
    CPU,
    WeightedAdapter,
    layer_to_device,
    merge,
    merged_embeddings,
    require_layers_fit,
    resize,
    scale_layer,
    truncation_for,
    weight_if_needed,
)
from pack.trainer.settings.merge import MergeSettings, parse_block_weights

TEXT = "lora_te_text_model_encoder_layers_3_mlp_fc1"
OTHER = NAME.replace("proj_in", "proj_out")
SHAPE = WEIGHTS["linear"]


def layer_of(kind: str, shape: Shape = SHAPE) -> Layer:
    return single(kind, shape).layers[NAME]


def parts_of(layer: Layer) -> dict[str, int]:
    """Which tensors a layer has."""
    return {part: id(tensor) for part, tensor in layer.tensors().items()}


# Strengths


def test_an_adapter_counts_once_unless_told_otherwise() -> None:
    adapter = adapter_of({name: tensors_of("LoRA", SHAPE) for name in (NAME, TEXT)})
    found = merge([WeightedAdapter(adapter, "A")], settings()).adapter.layers
    assert found[NAME] is adapter.layers[NAME]
    assert found[TEXT] is adapter.layers[TEXT]


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "LoKr, the small one factorised"])
def test_a_layer_is_scaled_by_its_alpha(kind: str) -> None:
    layer = layer_of(kind)
    found = scale_layer(layer, 0.25)
    assert found is not None
    assert found.alpha == layer.alpha / 4
    assert parts_of(found) == parts_of(layer)
    assert scale_layer(layer, 1.0) is layer


@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=list(WEIGHTS))
@pytest.mark.parametrize("kind", ["LoRA", "LoHa, Tucker", "DoRA", "full difference"])
def test_nothing_of_a_layer_is_a_lora_of_rank_one(kind: str, shape: Shape) -> None:
    if "Tucker" in kind and len(shape) == 2:
        return
    found = scale_layer(layer_of(kind, shape), 0.0)
    assert found is not None
    assert (found.kind, found.rank, found.alpha, found.shape) == ("LoRA", 1, 1.0, shape)
    assert not found.delta().any()


@pytest.mark.parametrize(("kind", "alpha"), [("OFT", 0.05), ("BOFT", 1.0)])
def test_nothing_of_a_rotation_is_one_that_turns_nothing(kind: str, alpha: float) -> None:
    """With a limit, whose absence some programs read as another."""
    layer = layer_of(kind)
    found = scale_layer(layer, 0.0)
    assert found is not None
    assert (found.kind, found.alpha, found.shape) == (kind, pytest.approx(alpha), layer.shape)
    assert not found.delta(random_weight(SHAPE)).any()


@pytest.mark.parametrize("kind", NEEDING_WEIGHTS)
def test_what_depends_on_the_weight_is_left_out_without_it(kind: str) -> None:
    found = merged((single(kind, SHAPE), 0.0)).adapter.layers[NAME]
    assert not found.delta(random_weight(SHAPE)).any()


# Limits


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((40, 30), 8),
        ((40, 30, 1, 1), 8),
        ((40, 30, 3, 3), 4),
        ((40, 30, 2, 2), 4),
        ((40, 30, 3, 1), 4),
        ((40, 30, 1, 2), 4),
    ],
    ids=str,
)
def test_the_limits_of_a_weight(shape: Shape, rank: int) -> None:
    limits = MergeSettings.checked({"method": "svd", "rank": 8, "conv_rank": 4, "energy": 0.9, "ratio": 5})
    assert truncation_for(limits, shape) == Truncation(rank, energy=0.9, ratio=5)
    one = MergeSettings.checked({"method": "svd", "rank": 8})
    assert truncation_for(one, shape) == Truncation(8)
    none = MergeSettings.checked({"method": "svd", "rank": 0})
    assert truncation_for(none, shape) == Truncation()


def test_resizing_makes_a_lora_of_the_rank() -> None:
    adapter = single("LoHa", SHAPE, rank=3)
    found = resize(WeightedAdapter(adapter, "A"), MergeSettings.checked({"method": "ties", "rank": 2}))
    assert found.report.method == "svd"
    assert (found.adapter.layers[NAME].kind, found.adapter.layers[NAME].rank) == ("LoRA", 2)


# Deltas and weights


@pytest.mark.parametrize("kind", ["LoRA", "LoRA, Tucker", "LoHa, Tucker", "LoKr, whole", "full difference"])
def test_a_delta_has_the_shape_of_its_layer_or_the_one_that_is_given(kind: str) -> None:
    shape = WEIGHTS["conv 3×3"]
    layer = layer_of(kind, shape)
    for delta in (to_delta(layer), to_delta(layer, shape)):
        assert delta.shape == shape
        assert error(delta.dense(), added(layer, shape)) < 1e-6
    flat = layer_of("LoHa", shape)
    assert to_delta(flat).shape == (12, 180)
    assert to_delta(flat, shape).shape == shape


def test_a_weight_is_read_where_it_is_needed() -> None:
    weights = {NAME: random_weight(SHAPE), CONV_NAME: random_weight(WEIGHTS["conv 3×3"])}
    lora, loha, dora = (layer_of(kind) for kind in ("LoRA", "LoHa", "DoRA"))
    assert weight_if_needed(NAME, [lora, lora], weights) is None
    assert weight_if_needed(NAME, [lora, loha], weights) is weights[NAME]
    assert weight_if_needed(NAME, [lora, dora], weights) is weights[NAME]
    assert weight_if_needed(CONV_NAME, [lora], weights) is weights[CONV_NAME]
    assert weight_if_needed(CONV_NAME, [lora], {}) is None


def test_a_layer_moves_where_it_is_not() -> None:
    layer = layer_of("LoHa with DoRA")
    assert layer_to_device(layer, CPU) is layer
    there = layer_to_device(layer, torch.device("meta"))
    assert all(tensor.is_meta for tensor in there.tensors().values())
    assert (there.kind, there.alpha, there.shape) == (layer.kind, layer.alpha, layer.shape)


def test_the_module_whose_weight_is_missing_is_named() -> None:
    """Whatever stands before it: layers that need none, and one that stays as it is."""
    shared = adapter_of({NAME: tensors_of("LoRA", SHAPE)})
    for kind in ("LoRA", "DoRA"):
        adapter = adapter_of({TEXT: tensors_of(kind, SHAPE), NAME: tensors_of("DoRA", SHAPE)})
        assert list(adapter.layers) == [TEXT, NAME]
        with pytest.raises(AdapterError) as refused:
            merged(shared, adapter)
        assert refused.value.problem.startswith("B is of type DoRA")
        assert f"none was given for {NAME}." in refused.value.problem
        merged(shared, adapter, weights={NAME: random_weight(SHAPE)})


def test_a_layer_without_its_weight_is_named() -> None:
    adapter = adapter_of({NAME: tensors_of("LoRA", SHAPE), OTHER: tensors_of("LoRA", SHAPE)})
    parts = [WeightedAdapter(adapter, "dog")]
    weight = random_weight(SHAPE)
    require_layers_fit(parts, {NAME: weight, OTHER: weight})
    with pytest.raises(AdapterError, match=rf"dog changes {OTHER} of shape \(12, 20\), .* does not have\."):
        require_layers_fit(parts, {NAME: weight})
    with pytest.raises(AdapterError, match=rf"dog changes {OTHER} .* has with shape \(20, 12\)\."):
        require_layers_fit(parts, {NAME: weight, OTHER: weight.T})


# Coefficients of inputs


@pytest.mark.parametrize("count", [1, 2])
def test_learned_coefficients_scale_the_inputs_of_each(count: int) -> None:
    """Whatever the method, and also where one adapter alone has the module."""
    generator = torch.Generator().manual_seed(1)
    adapters = [single("LoRA", SHAPE, seed) for seed in range(count)]
    columns = [torch.randn(SHAPE[1], generator=generator) for _ in range(count)]
    strengths = (0.5, -2.0)[:count]
    parts = [WeightedAdapter(one, title, s) for one, title, s in zip(adapters, "AB", strengths, strict=False)]
    result = merge(parts, settings("sum"), columns={NAME: columns})
    scaled = [s * added(one.layers[NAME], SHAPE) for one, s in zip(adapters, strengths, strict=True)]
    expected = sum((one * column.double() for one, column in zip(scaled, columns, strict=True)), torch.zeros(SHAPE))
    assert error(added(result.adapter.layers[NAME], SHAPE), expected) < 1e-6
    assert result.report.method == "learned"
    assert json.loads(result.adapter.metadata["dreambooth.merge"])["method"] == "learned"
    [module] = result.report.modules
    missing = sum(scaled, torch.zeros(SHAPE)) - expected
    for index, one in enumerate(scaled):
        assert module.kept[index] == pytest.approx(1 - float((missing * one).sum() / one.square().sum()), abs=1e-4)


def test_a_sum_is_known_to_lose_nothing() -> None:
    [module] = merged(single("LoRA", SHAPE, 1), (single("LoRA", SHAPE, 2), 0.3)).report.modules
    assert module.kept == {0: 1.0, 1: 1.0}


# Families and bases


def test_the_first_two_modules_of_adapters_that_have_none_in_common_are_named() -> None:
    names = [f"lora_unet_mid_block_attentions_0_transformer_blocks_{n}_attn1_to_q" for n in range(3)]
    adapters = [adapter_of({name: tensors_of("LoRA", SHAPE)}) for name in names]
    with pytest.raises(AdapterError, match=f"they change {names[0]} and {names[1]}, for example"):
        merged(*adapters)


def test_adapters_whose_words_differ_may_leave_out_the_kernel() -> None:
    """A LoHa of a convolution is flat; that is no other shape."""
    words = [{"ss_base_model_version": version} for version in ("sd_v1", "sdxl_1.0")]
    shape = WEIGHTS["conv 3×3"]
    name = "lora_unet_mid_block_resnets_0_conv1"
    a, b = (
        adapter_of({name: tensors_of(kind, shape)}, told) for kind, told in zip(("LoHa", "LoRA"), words, strict=True)
    )
    for pair in ((a, b), (b, a)):
        [layer] = merged(*pair).adapter.layers.values()
        assert layer.shape == shape


@pytest.mark.parametrize(
    ("names", "told"),
    [(("one", "two"), ["one", "two"]), (("one", None), []), (("one", ""), []), (("one", "None"), []), (("a", "a"), [])],
    ids=str,
)
def test_bases_that_are_named_and_differ_are_warned_of(names: tuple[str | None, ...], told: list[str]) -> None:
    adapters = [
        adapter_of({NAME: tensors_of("LoRA", SHAPE, seed)}, {} if name is None else {"ss_sd_model_name": name})
        for seed, name in enumerate(names)
    ]
    warnings = [text for text in merged(*adapters).report.warnings if "base models" in text]
    assert [f"({', '.join(told)})" in text for text in warnings] == [True] * bool(told)


# Strengths of parts that are not there


@pytest.mark.parametrize(("strengths", "warned"), [((0.0, 1.0), False), ((1.0, 0.0), True), ((0.0, 0.0), True)])
def test_an_adapter_of_biases_has_the_strength_of_its_part(strengths: tuple[float, float], warned: bool) -> None:
    adapter = Adapter({}, vectors={f"{TEXT}.diff_b": torch.ones(12)})
    result = merge([WeightedAdapter(adapter, "A", *strengths)], settings())
    assert any("strength 0" in text for text in result.report.warnings) == warned
    assert torch.equal(result.adapter.vectors[f"{TEXT}.diff_b"], torch.full((12,), strengths[1]))


def test_block_weights_of_biases_alone_are_checked_against_an_example() -> None:
    adapter = Adapter({}, vectors={f"{NAME}.diff_b": torch.ones(12)})
    merge([WeightedAdapter(adapter, "A", blocks=parse_block_weights("^unet.mid_block=0.5"))], settings())
    with pytest.raises(SettingsError, match="matches no modules"):
        merge([WeightedAdapter(adapter, "A", blocks=parse_block_weights("^up_blocks=0.5"))], settings())


def test_the_first_and_the_last_module_are_examples_of_a_pattern() -> None:
    names = [f"lora_unet_mid_block_attentions_0_transformer_blocks_{n}_attn1_to_q" for n in range(4)]
    adapter = adapter_of({name: tensors_of("LoRA", SHAPE) for name in names})
    with pytest.raises(SettingsError) as refused:
        merge([WeightedAdapter(adapter, "A", blocks=parse_block_weights("nowhere=0.5"))], settings())
    path = "unet.mid_block.attentions.0.transformer_blocks.%d.attn1.to_q"
    assert f"{path % 0} or {path % 3}." in refused.value.remedy


# What is written


def test_where_a_merge_comes_from_is_told_in_order() -> None:
    hashed = adapter_of({NAME: tensors_of("LoRA", SHAPE, 1)}, {"sshs_model_hash": "abc"})
    result = merged(hashed, (single("LoRA", SHAPE, 2), 0.5), method="svd", rank=3)
    text = result.adapter.metadata["dreambooth.merge"]
    told = json.loads(text)
    assert text == json.dumps(told, sort_keys=True)
    common: dict[str, Any] = {"blocks": {}}
    assert told["inputs"] == [
        {"title": "A", "hash": "abc", "strength": 1.0, "text_strength": 1.0, **common},
        {"title": "B", "hash": "", "strength": 0.5, "text_strength": 0.5, **common},
    ]
    assert told["rank"] == 3


def test_embeddings_are_kept_unless_they_differ() -> None:
    def adapter(tensor: torch.Tensor) -> Adapter:
        return Adapter({NAME: FullLayer(torch.ones(2, 2))}, embeddings={"bundle_emb.sks.clip_l": tensor})

    one = adapter(torch.ones(1, 8))
    assert merged_embeddings([one, adapter(torch.ones(1, 8))]).keys() == {"bundle_emb.sks.clip_l"}
    for other in (torch.zeros(1, 8), torch.ones(2, 8), torch.ones(8)):
        with pytest.raises(AdapterError, match=r"bundle_emb\.sks\.clip_l"):
            merged_embeddings([one, adapter(other)])


def test_a_merge_is_made_of_layers_of_float32_on_the_cpu() -> None:
    result = merged(single("LoRA", SHAPE, 1, dtype=torch.float16), single("LoRA", SHAPE, 2, dtype=torch.bfloat16))
    layer = result.adapter.layers[NAME]
    assert isinstance(layer, LoraLayer)
    assert {(tensor.dtype, tensor.device.type) for tensor in layer.tensors().values()} == {(torch.float32, "cpu")}
