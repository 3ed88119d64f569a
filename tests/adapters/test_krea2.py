"""Adapters of Krea 2: names of every program, of which diffusers' are also those of other families, and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.39")
pytest.importorskip("transformers", minversion="4.57")

from diffusers import Krea2Pipeline
from helpers import ROOT
from krea2_checkpoints import KREA_2, OUTSIDE, krea2_folder, krea2_on_meta, krea2_weights
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.diffusers_format import write_diffusers
from pack.trainer.adapters.kohya import parse_adapter, read_adapter, write_adapter
from pack.trainer.adapters.module_paths import ModulePath, module_path
from pack.trainer.adapters.names import adapter_names, family_of, modules_by_name
from pack.trainer.core.errors import AdapterError
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.models.families.krea2 import FAMILY
from pack.trainer.models.families.krea2_network import make_transformer
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return krea2_folder(tmp_path_factory.mktemp("krea2") / "krea 2 raw")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseWeights:
    return open_base(folder)


@pytest.fixture(scope="module")
def model(base: BaseWeights) -> DiffusionModel:
    return base.family.build(base)


@pytest.fixture(scope="module")
def originals(model: DiffusionModel) -> dict[str, str]:
    """Path of a Linear in the network → its name in the published files, by the numbers of its weight."""
    published = {name: tensor for name, tensor in krea2_weights().denoiser.items() if tensor.ndim == 2}
    found = {
        path: name.removesuffix(".weight")
        for path, module in linears(model).items()
        for name, tensor in published.items()
        if torch.equal(module.weight, tensor)
    }
    assert len(found) == len(linears(model)) == len(published) - 1  # all but the modulation of the last layer
    return found


def in_diffusers(path: str) -> str:
    first, dot, rest = path.partition(".")
    return f"{OUTSIDE[first]}{dot}{rest}"


# Names


def test_every_layer_has_the_name_of_the_published_files(model: DiffusionModel, originals: dict[str, str]) -> None:
    names = {path.path: name for path, name in adapter_names(model).items() if path.component == "unet"}
    by_name = modules_by_name(model)
    assert names == {path: f"lora_unet_{name.replace('.', '_')}" for path, name in originals.items()}
    for path, module in linears(model).items():
        assert module_path(names[path]) == ModulePath("unet", path)
        assert by_name[names[path]] is module


def test_the_modules_of_the_published_model_are_those_that_musubi_tuner_trains() -> None:
    """Names and shapes, from kohya's own program."""
    config = FAMILY.complete(FAMILY.layout.denoiser_config(krea2_on_meta(KREA_2).denoiser))
    with torch.device("meta"):
        network = make_transformer(**config)
    modules = {path: module for path, module in network.named_modules() if isinstance(module, nn.Linear)}
    names = FAMILY.layout.original_names(modules, config)
    found = {
        f"lora_unet_{names[path].replace('.', '_')}": [[4, module.in_features], [module.out_features, 4]]
        for path, module in modules.items()
    }
    assert found == json.loads((ROOT / "tests" / "golden" / "musubi_krea2_keys.json").read_text(encoding="utf-8"))


# stem of a module's keys by its path; whether that is the path in diffusers or in the published files
FORMS: dict[str, tuple[Callable[[str], str], bool, tuple[str, str]]] = {
    "musubi-tuner": (underscored("lora_unet_"), False, KOHYA),
    "ai-toolkit": (dotted("diffusion_model."), False, PEFT),
    "PEFT": (dotted("base_model.model."), True, PEFT),
    "diffusers": (dotted("transformer."), True, PEFT),
    "diffusers, without a prefix": (dotted(""), True, PEFT),
    "OneTrainer": (underscored("lora_transformer_"), True, KOHYA),
    "SimpleTuner": (underscored("lycoris_"), True, KOHYA),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_names_of_every_program_are_read(form: str, base: BaseWeights, originals: dict[str, str]) -> None:
    """Each layer changes its own module, and nothing else is changed."""
    stem, is_diffusers, suffixes = FORMS[form]
    model, plain = base.family.build(base), base.family.build(base)
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for number, (path, module) in enumerate(linears(model).items()):
        down, up = lora(*module.weight.shape, number)
        name = stem(in_diffusers(path) if is_diffusers else originals[path])
        tensors |= {name + suffixes[0]: down, name + suffixes[1]: up}
        if suffixes == KOHYA:
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
        expected[path] = up @ down * (2 / 3 if suffixes == KOHYA else 1.0)
    adapter = parse_adapter(tensors)
    assert family_of(adapter) == "Krea 2"
    merge_into(model, adapter, 1.0)
    for path, module in linears(model).items():
        torch.testing.assert_close(module.weight - linears(plain)[path].weight, expected[path], rtol=0, atol=1e-5)


def test_other_kinds_are_known_by_their_fewer_keys_too() -> None:
    """A LoKr's two factors tell numbers of outputs and inputs together."""
    shapes = {"to_q": ((8, 8), (32, 32)), "to_k": ((8, 8), (16, 32))}
    tensors = {
        f"transformer.transformer_blocks.1.attn.{part}.lokr_w{number}": torch.ones(shape)
        for part, of_part in shapes.items()
        for number, shape in enumerate(of_part, start=1)
    }
    assert sorted(parse_adapter(tensors).layers) == [f"lora_unet_blocks_1_attn_to_{part}" for part in "kq"]


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_attention_alone_is_known_by_its_fewer_keys(prefix: str) -> None:
    """diffusers calls its projections as FLUX's are called."""
    shapes = {"to_q": (256, 256), "to_k": (128, 256), "to_v": (128, 256), "to_out.0": (256, 256)}
    tensors: dict[str, Tensor] = {}
    for part, shape in shapes.items():
        down, up = lora(*shape, 0)
        stem = f"{prefix}transformer_blocks.1.attn.{part}"
        tensors |= {f"{stem}{PEFT[0]}": down, f"{stem}{PEFT[1]}": up}
    adapter = parse_adapter(tensors)
    assert family_of(adapter) == "Krea 2"
    parts = ("to_k", "to_out_0", "to_q", "to_v")
    assert sorted(adapter.layers) == [f"lora_unet_blocks_1_attn_{part}" for part in parts]


def test_as_many_keys_as_queries_are_not_krea_2s() -> None:
    tensors: dict[str, Tensor] = {}
    for part in ("to_q", "to_k", "to_v"):
        down, up = lora(3072, 3072, 0)
        stem = f"transformer.transformer_blocks.18.attn.{part}"
        tensors |= {f"{stem}{PEFT[0]}": down, f"{stem}{PEFT[1]}": up}
    with pytest.raises(AdapterError, match="made for Flux"):
        parse_adapter(tensors)


@pytest.mark.parametrize(
    ("name", "shape"), [("wq", (256, 128)), ("wk", (96, 256)), ("wk", (0, 256)), ("gate", (128, 256))]
)
def test_other_shapes_are_refused(name: str, shape: tuple[int, int]) -> None:
    down, up = lora(*shape, 0)
    stem = f"diffusion_model.blocks.0.attn.{name}"
    with pytest.raises(AdapterError, match="a diffusion transformer"):
        parse_adapter({f"{stem}{PEFT[0]}": down, f"{stem}{PEFT[1]}": up})


def test_blocks_are_those_of_the_model() -> None:
    down, up = lora(256, 256, 0)
    stem = "diffusion_model.blocks.28.attn.wq"
    with pytest.raises(AdapterError, match="a diffusion transformer"):
        parse_adapter({f"{stem}{PEFT[0]}": down, f"{stem}{PEFT[1]}": up})
    assert module_path("lora_unet_blocks_3_attn_wq").block == "block 3"
    assert module_path("lora_unet_txtfusion_refiner_blocks_1_mlp_up").block == "other"


# Files


@torch.no_grad()
def predicted(model: DiffusionModel) -> Tensor:
    rows = {"text": normal(1, 30, 480, seed=1), "lengths": torch.tensor([30])}
    return model.predict(normal(1, 16, 4, 6), torch.tensor([400.0]), rows)


@torch.no_grad()
def predicted_by_diffusers(pipeline: Any) -> Tensor:
    noisy, text = normal(1, 16, 4, 6), normal(1, 30, 480, seed=1)
    output = pipeline.transformer(
        pipeline._pack_latents(noisy, 1, 16, 4, 6),
        text.unflatten(-1, (12, 40)),
        torch.tensor([0.4]),
        pipeline.prepare_position_ids(30, 2, 3, torch.device("cpu")),
        return_dict=False,
    )[0]
    unpacked: Tensor = pipeline._unpack_latents(output, 32, 48)[:, :, 0]
    return unpacked


def test_files_are_kohyas(model: DiffusionModel, originals: dict[str, str], tmp_path: Path) -> None:
    adapter = random_adapter(model)
    file = write_adapter(tmp_path / "dog.safetensors", adapter, torch.float32)
    names = {f"lora_unet_{name.replace('.', '_')}" for name in originals.values()}
    assert load_file(file).keys() == {f"{name}{part}" for name in names for part in (*KOHYA, ".alpha")}
    assert read_adapter(file).layers.keys() == adapter.layers.keys()


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_diffusers_loads_a_converted_file(
    kind: str, folder: Path, base: BaseWeights, model: DiffusionModel, tmp_path: Path
) -> None:
    file = write_diffusers(tmp_path / "dog.safetensors", random_adapter(model, kind), torch.float32)
    pipeline = Krea2Pipeline.from_pretrained(folder)
    plain = predicted_by_diffusers(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    theirs = predicted_by_diffusers(pipeline)
    assert (theirs - plain).abs().max() > 0.1
    torch.testing.assert_close(predicted(with_file(base, file)), theirs, rtol=0, atol=1e-5)


def test_a_file_of_diffusers_is_read(folder: Path, base: BaseWeights, tmp_path: Path) -> None:
    """As its training example saves it, of attention alone."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = Krea2Pipeline.from_pretrained(folder)
    transformer = pipeline.transformer
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    Krea2Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    [file] = tmp_path.iterdir()
    theirs = predicted_by_diffusers(pipeline)
    assert (theirs - predicted(base.family.build(base))).abs().max() > 0.05
    torch.testing.assert_close(predicted(with_file(base, file)), theirs, rtol=0, atol=1e-5)
