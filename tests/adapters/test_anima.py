"""Adapters of Anima: names of every program, of which diffusers' are also those of other families, and files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.39")

from anima_checkpoints import ANIMA, OUTSIDE, anima_folder, anima_on_meta, anima_weights
from diffusers import AnimaModularPipeline
from helpers import ROOT
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.diffusers_format import write_diffusers
from pack.trainer.adapters.kohya import parse_adapter, read_adapter, write_adapter
from pack.trainer.adapters.module_paths import ModulePath, module_path
from pack.trainer.adapters.names import adapter_names, family_of, modules_by_name, with_kohya_names
from pack.trainer.core.errors import AdapterError
from pack.trainer.models.families.anima import FAMILY
from pack.trainer.models.families.anima_network import make_transformer
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.models.open import open_base
from safetensors.torch import load_file
from torch import Tensor, nn
from transformer_adapters import KOHYA, PEFT, dotted, linears, lora, normal, random_adapter, underscored, with_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return anima_folder(tmp_path_factory.mktemp("anima") / "anima base")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseWeights:
    return open_base(folder)


@pytest.fixture(scope="module")
def model(base: BaseWeights) -> DiffusionModel:
    return base.family.build(base)


@pytest.fixture(scope="module")
def originals(model: DiffusionModel) -> dict[str, str]:
    """Path of a Linear in the network → its name in the published files, by the numbers of its weight."""
    published = {name: tensor for name, tensor in anima_weights().denoiser.items() if tensor.ndim == 2}
    found = {
        path: name.removesuffix(".weight")
        for path, module in linears(model).items()
        for name, tensor in published.items()
        if torch.equal(module.weight, tensor)
    }
    assert len(found) == len(linears(model)) == len(published) - 1  # all but the embeddings of T5's tokens
    return found


def in_diffusers(path: str) -> str:
    first, dot, rest = path.partition(".")
    return f"{OUTSIDE.get(first, first)}{dot}{rest}"


# Names


def test_every_layer_has_the_name_of_the_published_files(model: DiffusionModel, originals: dict[str, str]) -> None:
    names = {path.path: name for path, name in adapter_names(model).items() if path.component == "unet"}
    by_name = modules_by_name(model)
    assert names == {path: f"lora_unet_{name.replace('.', '_')}" for path, name in originals.items()}
    for path, module in linears(model).items():
        if path != "head_linear":  # whose name is that of other families, too, where no other layer tells
            assert module_path(names[path]) == ModulePath("unet", path)
        assert by_name[names[path]] is module


def test_the_modules_of_the_published_model_are_those_that_kohya_trains() -> None:
    """Names and shapes, from kohya's own program: the target attention-mlp, and all blocks of what reads prompts."""
    config = FAMILY.complete(FAMILY.layout.denoiser_config(anima_on_meta(ANIMA).denoiser))
    with torch.device("meta"):
        network = make_transformer(**config)
    modules = {path: module for path, module in network.named_modules() if isinstance(module, nn.Linear)}
    names = FAMILY.layout.original_names(modules, config)
    assert len(names) == len(modules)
    pattern = rf"{FAMILY.targets['attention-mlp']}|llm_adapter\.blocks\..*"
    found = {
        f"lora_unet_{names[path].replace('.', '_')}": [[4, module.in_features], [module.out_features, 4]]
        for path, module in modules.items()
        if re.fullmatch(pattern, path)
    }
    assert found == json.loads((ROOT / "tests" / "golden" / "kohya_anima_keys.json").read_text(encoding="utf-8"))


# stem of a module's keys by its path; whether that is the path in diffusers or in the published files
FORMS: dict[str, tuple[Callable[[str], str], bool, tuple[str, str]]] = {
    "sd-scripts": (underscored("lora_unet_"), False, KOHYA),
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
        if form == "diffusers":
            name = name.replace("transformer.llm_adapter.", "text_conditioner.")
        tensors |= {name + suffixes[0]: down, name + suffixes[1]: up}
        if suffixes == KOHYA:
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
        expected[path] = up @ down * (2 / 3 if suffixes == KOHYA else 1.0)
    adapter = parse_adapter(tensors)
    assert family_of(adapter) == "Anima"
    merge_into(model, adapter, 1.0)
    for path, module in linears(model).items():
        torch.testing.assert_close(module.weight - linears(plain)[path].weight, expected[path], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("stem", "shape"),
    [
        ("diffusion_model.blocks.0.self_attn.q_proj", (2048, 2048)),
        ("transformer.transformer_blocks.0.attn2.to_k", (2048, 1024)),  # as wide as Stable Diffusion 2's prompts
        ("lora_transformer_transformer_blocks_0_attn2_to_v", (2048, 1024)),
        ("lora_unet_blocks_3_mlp_layer1", (8192, 2048)),
        ("text_conditioner.blocks.0.cross_attn.o_proj", (1024, 1024)),
    ],
)
def test_one_layer_of_the_published_size_tells_the_family(stem: str, shape: tuple[int, int]) -> None:
    down, up = lora(*shape, 0)
    part = KOHYA if stem.startswith("lora_") else PEFT
    adapter = parse_adapter({f"{stem}{part[0]}": down, f"{stem}{part[1]}": up})
    assert family_of(adapter) == "Anima"
    [name] = with_kohya_names([adapter])[0].layers
    published = FAMILY.layout.original_names([module_path(name).path], {})
    assert name == f"lora_unet_{underscored('')(next(iter(published.values())))}"


def test_norms_are_the_models_too() -> None:
    """LyCORIS trains them."""
    stem = "lora_unet_blocks_0_self_attn_q_norm"
    down, up = lora(256, 256, 0)
    other = "lora_unet_blocks_0_self_attn_q_proj"
    tensors = {f"{stem}.w_norm": torch.ones(128), f"{other}{KOHYA[0]}": down, f"{other}{KOHYA[1]}": up}
    adapter = parse_adapter(tensors)
    assert [key.rpartition(".")[0] for key in adapter.vectors] == [stem]
    assert module_path(stem).path == "blocks.0.attn1.norm_q"


def test_other_shapes_and_blocks_are_refused() -> None:
    for stem, shape in (
        ("blocks.0.self_attn.q_proj", (256, 128)),
        ("blocks.0.self_attn.q_proj", (192, 192)),
        ("blocks.0.cross_attn.k_proj", (256, 256)),
        ("blocks.28.self_attn.q_proj", (256, 256)),
    ):
        down, up = lora(*shape, 0)
        with pytest.raises(AdapterError):
            parse_adapter({f"diffusion_model.{stem}{PEFT[0]}": down, f"diffusion_model.{stem}{PEFT[1]}": up})
    assert module_path("lora_unet_blocks_3_self_attn_q_proj").block == "block 3"


# Files


@torch.no_grad()
def predicted(model: DiffusionModel) -> Tensor:
    return model.predict(normal(1, 16, 4, 6), torch.tensor([400.0]), model.encode_prompts(["a dog"]))


@torch.no_grad()
def predicted_by_diffusers(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    resize = SimpleNamespace(resize=lambda mask, size, interpolation: mask)  # torchvision's, of a mask of that size
    functions = SimpleNamespace(functional=resize, InterpolationMode=SimpleNamespace(NEAREST=None))
    monkeypatch.setattr("diffusers.models.transformers.transformer_cosmos.transforms", functions, raising=False)
    ids = torch.tensor([pipeline.tokenizer("a dog").input_ids])
    source = pipeline.text_encoder(input_ids=ids).last_hidden_state
    output: Tensor = pipeline.transformer(
        hidden_states=normal(1, 16, 4, 6).unsqueeze(2),
        timestep=torch.tensor([0.4]),
        encoder_hidden_states=pipeline.text_conditioner(
            source, torch.tensor([pipeline.t5_tokenizer("a dog").input_ids])
        ),
        padding_mask=torch.zeros(1, 1, 4, 6),
        return_dict=False,
    )[0]
    return output[:, :, 0]


def loaded(folder: Path) -> Any:
    pipeline = AnimaModularPipeline.from_pretrained(str(folder))
    pipeline.load_components()
    return pipeline


def test_files_are_kohyas(model: DiffusionModel, originals: dict[str, str], tmp_path: Path) -> None:
    adapter = random_adapter(model)
    file = write_adapter(tmp_path / "dog.safetensors", adapter, torch.float32)
    names = {f"lora_unet_{name.replace('.', '_')}" for name in originals.values()}
    assert load_file(file).keys() == {f"{name}{part}" for name in names for part in (*KOHYA, ".alpha")}
    assert read_adapter(file).layers.keys() == adapter.layers.keys()


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_diffusers_loads_a_converted_file(
    kind: str,
    folder: Path,
    base: BaseWeights,
    model: DiffusionModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also what reads prompts, which is a network of its own there."""
    file = write_diffusers(tmp_path / "dog.safetensors", random_adapter(model, kind), torch.float32)
    pipeline = loaded(folder)
    plain = predicted_by_diffusers(pipeline, monkeypatch)
    torch.testing.assert_close(predicted(model), plain, rtol=0, atol=1e-5)
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    theirs = predicted_by_diffusers(pipeline, monkeypatch)
    assert (theirs - plain).abs().max() > 0.1
    torch.testing.assert_close(predicted(with_file(base, file)), theirs, rtol=0, atol=1e-5)


def test_a_file_of_diffusers_is_read(
    folder: Path, base: BaseWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig

    pipeline = loaded(folder)
    transformer = pipeline.transformer
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    transformer.save_lora_adapter(tmp_path)
    [file] = tmp_path.iterdir()
    theirs = predicted_by_diffusers(pipeline, monkeypatch)
    assert (theirs - predicted(base.family.build(base))).abs().max() > 0.05
    torch.testing.assert_close(predicted(with_file(base, file)), theirs, rtol=0, atol=1e-5)
