"""Adapters of Z-Image: names of every program, joined projections, and files that diffusers loads as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.36")
pytest.importorskip("transformers", minversion="4.51")

from adapter_maths import added, error, tensors_of
from diffusers import ZImagePipeline
from helpers import ROOT
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.diffusers_format import write_diffusers
from pack.trainer.adapters.kohya import parse_adapter, read_adapter, write_adapter
from pack.trainer.adapters.layers import FullLayer, LoraLayer
from pack.trainer.adapters.module_paths import ModulePath, block_order, module_path
from pack.trainer.adapters.names import adapter_names, family_of, modules_by_name, named_weights
from pack.trainer.cli.inspect import inspect
from pack.trainer.core.errors import AdapterError
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.models.families.zimage import FAMILY
from pack.trainer.models.families.zimage_network import make_transformer
from pack.trainer.models.open import open_base
from safetensors.torch import load_file
from torch import Tensor, nn
from transformer_adapters import (
    KOHYA,
    PEFT,
    dotted,
    linears,
    lora,
    normal,
    random_adapter,
    underscored,
    with_file,
)
from zimage_checkpoints import Z_IMAGE, zimage_folder, zimage_on_meta, zimage_weights

WIDTH = 384
QKV = "diffusion_model.layers.0.attention.qkv"
PARTS = [f"lora_unet_layers_0_attention_to_{letter}" for letter in "qkv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zimage_folder(tmp_path_factory.mktemp("zimage") / "z image")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseWeights:
    return open_base(folder)


@pytest.fixture(scope="module")
def model(base: BaseWeights) -> DiffusionModel:
    return base.family.build(base)


# Names


def test_every_layer_has_a_name_that_leads_back(model: DiffusionModel) -> None:
    names = {path.path: name for path, name in adapter_names(model).items() if path.component == "unet"}
    by_name = modules_by_name(model)
    assert names.keys() == linears(model).keys()
    for path, module in linears(model).items():
        assert names[path] == f"lora_unet_{path.replace('.', '_')}"
        assert module_path(names[path]) == ModulePath("unet", path)
        assert by_name[names[path]] is module


def test_the_modules_of_the_published_model_are_those_that_musubi_tuner_trains() -> None:
    """Names and shapes, from kohya's own program."""
    config = FAMILY.complete(FAMILY.layout.denoiser_config(zimage_on_meta(Z_IMAGE).denoiser))
    with torch.device("meta"):
        network = make_transformer(**config)
    found = {
        f"lora_unet_{path.replace('.', '_')}": [[4, module.in_features], [module.out_features, 4]]
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(FAMILY.targets["attention-mlp"], path)
    }
    assert found == json.loads((ROOT / "tests" / "golden" / "musubi_zimage_keys.json").read_text(encoding="utf-8"))


def in_original(path: str) -> str:
    """What ComfyUI calls a module of the network that it has for itself."""
    return path.replace("to_out.0", "out").replace("all_final_layer.2-1", "final_layer")


FORMS: dict[str, tuple[Callable[[str], str], tuple[str, str]]] = {
    "musubi-tuner": (underscored("lora_unet_"), KOHYA),
    "ai-toolkit": (dotted("diffusion_model."), PEFT),
    "diffusers": (dotted("transformer."), PEFT),
    "diffusers, without a prefix": (dotted(""), PEFT),
    "PEFT": (dotted("base_model.model."), PEFT),
    "OneTrainer": (underscored("lora_transformer_"), KOHYA),
    "ComfyUI, but for joined projections": (lambda path: f"diffusion_model.{in_original(path)}", PEFT),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_names_of_every_program_are_read(form: str, base: BaseWeights) -> None:
    """Each layer of a block changes its own module, and nothing else is changed."""
    stem, suffixes = FORMS[form]
    model, plain = base.family.build(base), base.family.build(base)
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for number, (path, module) in enumerate(linears(model).items()):
        if not re.fullmatch(FAMILY.targets["all"], path) or path.startswith("t_embedder"):
            continue
        down, up = lora(*module.weight.shape, number)
        tensors |= {stem(path) + suffixes[0]: down, stem(path) + suffixes[1]: up}
        if suffixes == KOHYA:
            tensors[f"{stem(path)}.alpha"] = torch.tensor(2.0)
        expected[path] = up @ down * (2 / 3 if suffixes == KOHYA else 1.0)
    adapter = parse_adapter(tensors)
    assert family_of(adapter) == "Z-Image"
    merge_into(model, adapter, 1.0)
    for path, module in linears(model).items():
        change = module.weight - linears(plain)[path].weight
        torch.testing.assert_close(change, expected.get(path, torch.zeros(())).expand_as(change), rtol=0, atol=1e-5)


def test_the_last_layer_is_not_taken_for_that_of_flux(base: BaseWeights, model: DiffusionModel, tmp_path: Path) -> None:
    """ComfyUI calls it as FLUX.2's is called; converted and in a file it has its own name."""
    stems = {f"diffusion_model.{stem}": stem for stem in ("final_layer.linear", "final_layer.adaLN_modulation.1")}
    shapes = {"final_layer.linear": (64, WIDTH), "final_layer.adaLN_modulation.1": (WIDTH, 256)}
    tensors: dict[str, Tensor] = {}
    for stem, shape in {**{s: shapes[o] for s, o in stems.items()}, f"{QKV}": (3 * WIDTH, WIDTH)}.items():
        down, up = lora(*shape, 0)
        tensors |= {f"{stem}{PEFT[0]}": down, f"{stem}{PEFT[1]}": up}
    adapter = parse_adapter(tensors)
    last = {"lora_unet_all_final_layer_2-1_linear", "lora_unet_all_final_layer_2-1_adaLN_modulation_1"}
    assert adapter.layers.keys() == {*last, *PARTS}
    for write in (write_adapter, write_diffusers):
        file = write(tmp_path / f"{write.__name__}.safetensors", adapter, torch.float32)
        assert not [key for key in load_file(file) if "proj_out" in key or "norm_out" in key]
        assert read_adapter(file).layers.keys() == adapter.layers.keys()


def test_blocks_have_words_for_people_in_the_order_of_the_pass() -> None:
    names = [f"lora_unet_{block}_1_feed_forward_w1" for block in ("noise_refiner", "layers", "context_refiner")]
    blocks = [module_path(name).block for name in names]
    assert blocks == ["noise-refiner 1", "layer 1", "context-refiner 1"]
    assert sorted([*blocks, "other"], key=block_order)[-1] == "other"


# Joined projections


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "full difference"])
def test_a_joined_projection_becomes_three_that_add_the_same(kind: str) -> None:
    parts = tensors_of(kind, (3 * WIDTH, WIDTH))
    weight = torch.randn((3 * WIDTH, WIDTH), generator=torch.Generator().manual_seed(9))
    name = "lora_unet_mid_block_attentions_0_proj_in"  # of a module that is not split
    [whole] = parse_adapter({f"{name}.{part}": tensor for part, tensor in parts.items()}).layers.values()
    layers = parse_adapter({f"{QKV}.{part}": tensor for part, tensor in parts.items()}).layers
    assert sorted(layers) == sorted(PARTS)
    rows = weight.chunk(3)
    found = torch.cat([added(layers[part], (WIDTH, WIDTH), own) for part, own in zip(PARTS, rows, strict=True)])
    assert error(found, added(whole, (3 * WIDTH, WIDTH), weight)) < 1e-6
    expected = {"LoRA": LoraLayer, "DoRA": LoraLayer, "LoHa": FullLayer, "full difference": FullLayer}[kind]
    assert all(isinstance(layer, expected) for layer in layers.values())


def test_a_split_adapter_can_be_written_and_inspected(tmp_path: Path) -> None:
    """No tensor of a file shares memory with another, in its own precision neither; the hashes are the file's."""
    tensors: dict[str, Tensor] = {}
    for number in (1, 10):  # whose order depends on the form of the names
        down, up = lora(3 * WIDTH, WIDTH, number)
        stem = f"diffusion_model.layers.{number}.attention.qkv"
        tensors |= {f"{stem}{PEFT[0]}": down, f"{stem}{PEFT[1]}": up}
    file = write_adapter(tmp_path / "dog.safetensors", parse_adapter(tensors), torch.float32)
    facts = inspect(file)
    assert facts["modules"]["unet"]["count"] == 6
    assert facts["modules"]["unet"]["attention_to_q"] == 2
    assert facts["hashes"]["sshs_model_hash"] == facts["metadata"]["sshs_model_hash"]


@pytest.mark.parametrize("kind", ["OFT", "LoHa with DoRA"])
def test_what_can_not_be_split_is_named(kind: str) -> None:
    parts = tensors_of(kind, (3 * WIDTH, WIDTH))
    with pytest.raises(AdapterError, match="lora_unet_layers_0_attention_qkv"):
        parse_adapter({f"{QKV}.{part}": tensor for part, tensor in parts.items()})


def test_parts_beside_the_whole_are_refused() -> None:
    tensors: dict[str, Tensor] = {}
    for stem, outputs in ((QKV, 3 * WIDTH), ("diffusion_model.layers.0.attention.to_k", WIDTH)):
        down, up = lora(outputs, WIDTH, 0)
        tensors |= {f"{stem}{PEFT[0]}": down, f"{stem}{PEFT[1]}": up}
    with pytest.raises(AdapterError, match="of which it is a part"):
        parse_adapter(tensors)


def test_lumina_is_refused_by_name() -> None:
    """It has modules of the same names, but fewer keys than queries."""
    down, up = lora(3840, 2304, 0)
    with pytest.raises(AdapterError, match="made for Lumina"):
        parse_adapter({f"{QKV}{PEFT[0]}": down, f"{QKV}{PEFT[1]}": up})


# Files


@torch.no_grad()
def predicted(model: DiffusionModel) -> Tensor:
    rows = {"text": normal(1, 40, 32, seed=1), "lengths": torch.tensor([40])}
    return model.predict(normal(1, 16, 4, 6), torch.tensor([400.0]), rows)


@torch.no_grad()
def predicted_by_diffusers(pipeline: Any) -> Tensor:
    noisy, text = normal(1, 16, 4, 6), normal(1, 40, 32, seed=1)
    [output] = pipeline.transformer([noisy[0][:, None]], torch.tensor([0.6]), [text[0]], return_dict=False)[0]
    return -output[None, :, 0]


def test_files_have_the_keys_that_programs_share(model: DiffusionModel, tmp_path: Path) -> None:
    adapter = random_adapter(model)
    file = write_adapter(tmp_path / "dog.safetensors", adapter, torch.float32)
    paths = {path for path in linears(model)}
    parts = (*PEFT, ".alpha")
    assert load_file(file).keys() == {f"diffusion_model.{path}{part}" for path in paths for part in parts}
    assert read_adapter(file).layers.keys() == adapter.layers.keys()


@pytest.mark.parametrize(("form", "kind"), [("own", "LoRA"), ("converted", "LoRA"), ("converted", "DoRA")])
def test_diffusers_loads_files(
    form: str, kind: str, folder: Path, base: BaseWeights, model: DiffusionModel, tmp_path: Path
) -> None:
    """Also this pack's own, but for DoRAs, of which diffusers reads only its own form."""
    write = write_adapter if form == "own" else write_diffusers
    file = write(tmp_path / "dog.safetensors", random_adapter(model, kind), torch.float32)
    pipeline = ZImagePipeline.from_pretrained(folder)
    plain = predicted_by_diffusers(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    theirs = predicted_by_diffusers(pipeline)
    assert (theirs - plain).abs().max() > 0.1
    torch.testing.assert_close(predicted(with_file(base, file)), theirs, rtol=0, atol=1e-5)


def test_a_file_of_diffusers_is_read(folder: Path, base: BaseWeights, tmp_path: Path) -> None:
    """As its training example saves it."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = ZImagePipeline.from_pretrained(folder)
    transformer = pipeline.transformer
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=source))
    ZImagePipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    [file] = tmp_path.iterdir()
    theirs = predicted_by_diffusers(pipeline)
    assert (theirs - predicted(base.family.build(base))).abs().max() > 0.05
    torch.testing.assert_close(predicted(with_file(base, file)), theirs, rtol=0, atol=1e-5)


def test_a_files_joined_tensor_is_the_networks_three(model: DiffusionModel) -> None:
    weights, published = named_weights(model), zimage_weights().denoiser
    joined = torch.cat([weights[part] for part in PARTS])
    assert torch.equal(joined, published["layers.0.attention.qkv.weight"])
