"""Weights in eight bits or less, as ComfyUI lends them: borrowed, trained on, and refused where they can't be read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import UNET_PREFIX, sd15_state_dict
from helpers import TINY, Recorder
from lent_models import lent
from pack.trainer.adapters.apply import apply_to_base
from pack.trainer.adapters.kohya import Adapter, LoraLayer
from pack.trainer.adapters.names import named_weights
from pack.trainer.core.devices import to_device
from pack.trainer.core.errors import AdapterError, WeightsError
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.dreambooth import train
from pack.trainer.merging.fuse import fuse
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.nf4 import Nf4Linear, quantize
from pack.trainer.models.open import HostTensors, open_base
from pack.trainer.models.stored_weights import Fp8Linear, PackedLinear, PackedWeight, StoredLinear
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import TrainableAdapter
from pack.trainer.training.memory.plan import MemorySaving, Planner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from worlds import COMMON, PROMPT, noisy_pictures, paths_in

pytestmark = pytest.mark.usefixtures("quick")
CPU = torch.device("cpu")
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def described(kind: str) -> Tensor:
    """How ComfyUI's files say that a weight is quantised."""
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


def in_eight_bits(
    tensors: Mapping[str, Tensor], kind: str = "float8_e4m3fn"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A UNet with the Linear layers of its transformers in eight bits, as ComfyUI holds it; and what they stand for."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "transformer_blocks" not in name or tensor.ndim != 2:
            stored[name] = meant[name] = tensor
            continue
        scale = tensor.abs().max() / torch.finfo(FORMATS[kind]).max
        module = name.removesuffix(".weight")
        stored[name] = (tensor / scale).to(FORMATS[kind])
        stored[f"{module}.weight_scale"] = scale
        stored[f"{module}.comfy_quant"] = described(kind)
        meant[name] = stored[name].float() * scale
    return stored, meant


def unpacked(stored: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    numbers, scale = stored
    assert numbers.shape == shape
    return (numbers.float() * scale).to(dtype)


def packed_by_rows(tensors: Mapping[str, Tensor]) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
    """The same layers as a host packs them itself, each row with a scale; and what they stand for."""
    packed: dict[str, PackedWeight] = {}
    meant = dict(tensors)
    for name, tensor in tensors.items():
        if "transformer_blocks" in name and tensor.ndim == 2:
            scale = tensor.abs().amax(dim=1, keepdim=True) / 127
            numbers = (tensor / scale).round().to(torch.int8)
            packed[name] = PackedWeight((len(tensor), tensor.shape[1]), (numbers, scale), unpacked)
            meant[name] = numbers.float() * scale
    return packed, meant


FORMS = (*FORMATS, "packed")


def stored_as(form: str, host: HostTensors) -> tuple[HostTensors, dict[str, Tensor]]:
    """The host with weights in that form; and what they stand for."""
    if form != "packed":
        stored, meant = in_eight_bits(host.denoiser, form)
        return replace(host, denoiser=stored), meant
    packed, meant = packed_by_rows(host.denoiser)
    rest = {name: tensor for name, tensor in host.denoiser.items() if name not in packed}
    return replace(host, denoiser=rest, packed=packed), meant


def numbers_in(host: HostTensors) -> set[int]:
    """Where the numbers begin that are stored in one byte each."""
    plain = [tensor for tensor in host.denoiser.values() if tensor.dtype in FORMATS.values()]
    return {tensor.data_ptr() for tensor in (*plain, *(weight.stored[0] for weight in host.packed.values()))}


def pictures_in(folder: Path) -> list[Picture]:
    return load_pictures(noisy_pictures(folder / "pictures", 2, 0), PROMPT, Recorder())


@pytest.fixture(scope="module")
def host() -> HostTensors:
    return lent(sd15_state_dict(TINY))


@pytest.mark.parametrize("form", FORMS)
def test_it_predicts_what_its_weights_stand_for(host: HostTensors, form: str) -> None:
    stored, meant = stored_as(form, host)
    bases = [open_base(given) for given in (stored, replace(host, denoiser=meant))]
    models = [base.family.build(base) for base in bases]
    layers = [module for module in models[0].denoiser.modules() if isinstance(module, StoredLinear)]
    assert {buffer.data_ptr() for layer in layers for buffer in layer.buffers()} == numbers_in(stored)
    assert layers
    noisy, text = torch.randn(2, 4, 8, 8), torch.randn(2, 32, 64)
    found, expected = (model.predict(noisy, torch.tensor([5, 900]), {"text": text}) for model in models)
    assert torch.equal(found, expected)
    weights, other_weights = (named_weights(model) for model in models)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_the_scale_is_part_of_the_fingerprint(host: HostTensors) -> None:
    stored, _ = in_eight_bits(host.denoiser)
    doubled = {name: tensor * 2 if name.endswith("weight_scale") else tensor for name, tensor in stored.items()}
    bases = [open_base(replace(host, denoiser=tensors)) for tensors in (stored, doubled)]
    assert bases[0].fingerprint != bases[1].fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dequantised_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(70, 96).to(torch.float8_e4m3fn)
    bias = nn.Parameter(torch.randn(70).to(dtype), requires_grad=False)
    layer = Fp8Linear(weight, torch.tensor(0.37), bias, torch.float32).to(dtype)
    assert layer.packed.dtype == torch.float8_e4m3fn
    x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
    again = x.detach().clone().requires_grad_()
    output = layer(x)
    reference = F.linear(again, weight.to(dtype) * torch.tensor(0.37).to(dtype), bias)
    assert torch.equal(output, reference)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    reference.backward(upstream)
    assert torch.equal(x.grad, again.grad)


@pytest.mark.parametrize("form", ["float8_e4m3fn", "packed"])
@pytest.mark.parametrize("settings", [{}, {"adapter": "dora"}, {"gradient_checkpointing": True}], ids=str)
def test_a_run_learns_as_on_the_dequantised_weights(
    host: HostTensors, tmp_path: Path, settings: dict[str, Any], form: str
) -> None:
    stored, meant = stored_as(form, host)
    adapters = []
    for name, lent_weights in (("stored", stored), ("meant", replace(host, denoiser=meant))):
        folder = tmp_path / name
        pictures = pictures_in(folder)
        base = open_base(lent_weights)
        given = TrainSettings(**{**COMMON, "steps": 2, "resume": "never", **settings})
        adapters.append(train(base, pictures, [], given, paths=paths_in(folder), device="cpu").adapter)
    found, expected = (adapter.state_dict() for adapter in adapters)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)  # DoRA's norms in another order


@pytest.mark.parametrize("form", ["float8_e4m3fn", "packed"])
def test_all_weights_are_trained_as_ordinary_ones(host: HostTensors, tmp_path: Path, form: str) -> None:
    base = open_base(stored_as(form, host)[0])
    given = TrainSettings(**{**COMMON, "adapter": "full", "steps": 1, "resume": "never"})
    result = train(base, pictures_in(tmp_path), [], given, paths=paths_in(tmp_path), device="cpu")
    assert any("attn1_to_q" in name for name in result.adapter.layers)


@pytest.mark.parametrize("form", ["float8_e4m3fn", "packed"])
def test_an_adapter_makes_the_weights_that_it_changes_ordinary(host: HostTensors, form: str) -> None:
    stored, meant = stored_as(form, host)
    bases: list[BaseWeights] = []
    for lent_weights in (stored, replace(host, denoiser=meant)):
        base = open_base(lent_weights)
        adapter = TrainableAdapter(base.family.build(base), TrainSettings(rank=2, targets="attention")).adapter()
        bases.append(apply_to_base(base, [(adapter, 1.0)]))
    changed, expected = (base.family.build(base) for base in bases)
    kept = {name for name, module in changed.denoiser.named_modules() if isinstance(module, StoredLinear)}
    assert kept
    assert not any("attn1.to_q" in name for name in kept)
    weights, other_weights = named_weights(changed), named_weights(expected)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_it_is_moved_where_the_rest_of_the_network_is_already() -> None:
    """As a host leaves a network that it has loaded in part."""
    layer = Fp8Linear(torch.randn(8, 8).to(torch.float8_e4m3fn), torch.tensor(2.0), None, torch.float32)
    network = nn.Sequential(layer, nn.LayerNorm(8, device="meta"))
    to_device(network, torch.device("meta"), torch.float32)
    assert layer.packed.is_meta
    assert layer.packed.dtype == torch.float8_e4m3fn


def test_what_a_host_packs_is_moved_and_planned_with_the_network(host: HostTensors) -> None:
    """Its numbers keep their type, and count as many bytes as they take."""
    weight = PackedWeight((8, 6), (torch.ones(8, 6, dtype=torch.int8), torch.ones(8, 1)), unpacked)
    network = nn.Sequential(PackedLinear(weight, None, torch.float32), nn.LayerNorm(8))
    assert torch.equal(network[0](torch.ones(1, 6)), torch.full((1, 8), 6.0))
    to_device(network, torch.device("cpu"), torch.bfloat16)
    assert network[0].weight.dtype == torch.bfloat16
    to_device(network, torch.device("meta"), torch.bfloat16)
    assert [(buffer.device.type, buffer.dtype) for buffer in network[0].buffers()] == [("meta", torch.int8)]
    assert network[0](torch.ones(1, 6, device="meta")).is_meta
    stored, _ = stored_as("packed", host)
    needs = {}
    for name, given in (("packed", stored), ("plain", host)):
        planner = Planner(open_base(given), TrainSettings(resolution=64), precision="fp32", start=None, priors=False)
        needs[name] = planner.need(MemorySaving(checkpointing=False))
    numbers = sum(weight.stored[0].numel() for weight in stored.packed.values())
    assert needs["plain"].base - needs["packed"].base == 3 * numbers  # of four bytes each


def test_the_rows_of_a_joined_weight_are_views(host: HostTensors) -> None:
    numbers = torch.arange(24, dtype=torch.int8).reshape(6, 4)
    scale = torch.arange(6.0)[:, None]
    whole = PackedWeight((6, 4), (numbers, scale, torch.ones(())), lambda s, _, dtype: s[0].to(dtype) * s[1])
    parts = [whole.part(number, 3) for number in range(3)]
    assert torch.equal(torch.cat([part.weight(torch.float32) for part in parts]), whole.weight(torch.float32))
    assert all(part.shape == (2, 4) for part in parts)
    assert all(part.stored[0].untyped_storage().data_ptr() == numbers.data_ptr() for part in parts)
    with pytest.raises(WeightsError, match="split into 3"):
        replace(whole, stored=(numbers, torch.ones(128, 4))).part(0, 3)


def test_adapters_are_fused_into_plain_weights_and_not_into_scaled_ones(tmp_path: Path) -> None:
    whole = sd15_state_dict(TINY)
    unet = {name: tensor for name, tensor in whole.items() if name.startswith(UNET_PREFIX)}
    stored, _ = in_eight_bits(unet)
    plain = {name: tensor.to(torch.float8_e4m3fn) if "attn1.to_q" in name else tensor for name, tensor in unet.items()}
    for name, part in (("plain", plain), ("scaled", stored)):
        save_file(whole | part, tmp_path / f"{name}.safetensors")
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    adapter = Adapter({layer: LoraLayer(torch.ones(2, 32), torch.ones(32, 2), 2.0)})
    fused = fuse(tmp_path / "plain.safetensors", [(adapter, 1.0)], tmp_path / "fused.safetensors")
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    changed = load_file(fused)[key]
    assert changed.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(changed.float(), plain[key].float() + 2.0, rtol=0.07, atol=0)  # 3 bits of mantissa
    with pytest.raises(AdapterError, match="quantised with scales"):
        fuse(tmp_path / "scaled.safetensors", [(adapter, 1.0)], tmp_path / "never.safetensors")


@pytest.mark.parametrize("form", ["float8_e4m3fn", "packed"])
def test_four_bits_take_their_place(host: HostTensors, form: str) -> None:
    pytest.importorskip("bitsandbytes")
    base = open_base(stored_as(form, host)[0])
    network = base.family.build(base).denoiser
    quantize(network, CPU, torch.float32)
    assert not any(isinstance(module, StoredLinear) for module in network.modules())
    assert any(isinstance(module, Nf4Linear) for module in network.modules())


UNREADABLE: dict[str, tuple[dict[str, Tensor], str]] = {
    "nvfp4": ({"comfy_quant": described("nvfp4")}, "quantised as nvfp4"),
    "no format": ({"comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)}, "an unknown format"),
    "scales of blocks": ({"weight_scale": torch.ones(4, 4)}, r"scales of shape \(4, 4\)"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_other_formats_are_refused_by_name(host: HostTensors, what: str) -> None:
    stored, _ = in_eight_bits(host.denoiser)
    module = next(name for name in stored if name.endswith(".comfy_quant")).removesuffix(".comfy_quant")
    changes, words = UNREADABLE[what]
    odd = stored | {f"{module}.{part}": tensor for part, tensor in changes.items()}
    with pytest.raises(WeightsError, match=words):
        open_base(replace(host, denoiser=odd))


def test_a_scaled_convolution_is_refused(host: HostTensors) -> None:
    name = "input_blocks.0.0.weight"
    stored = host.denoiser[name].to(torch.float8_e4m3fn)
    odd = {**host.denoiser, name: stored, "input_blocks.0.0.weight_scale": torch.ones(())}
    with pytest.raises(WeightsError, match=r"input_blocks\.0\.0\.weight has a scale"):
        open_base(replace(host, denoiser=odd))
