"""Adapters of FLUX.2 klein: names of every program, projections in three parts or in one, and diffusers' own loader."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.37")
pytest.importorskip("transformers", minversion="4.51")

from adapter_maths import added, error, tensors_of
from diffusers import Flux2KleinPipeline
from flux2_checkpoints import KLEIN_4B, flux2_folder, flux2_on_meta, flux2_weights
from helpers import ROOT
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.diffusers_format import diffusers_state_dict, write_diffusers
from pack.trainer.adapters.kohya import Adapter, parse_adapter, read_adapter, write_adapter
from pack.trainer.adapters.layers import FullLayer, LoraLayer
from pack.trainer.adapters.module_paths import ModulePath, module_path
from pack.trainer.adapters.names import adapter_names, family_of, modules_by_name
from pack.trainer.core.errors import AdapterError
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.models.families.flux2 import FAMILY
from pack.trainer.models.families.flux2_network import make_transformer
from pack.trainer.models.open import open_base
from safetensors.torch import save_file
from torch import Tensor, nn
from transformer_adapters import KOHYA, PEFT, dotted, linears, lora, random_adapter, underscored

WIDTH = 128
PARTS = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
THREE = [f"transformer.transformer_blocks.0.{part}" for part in PARTS["attn.to_qkv"]]
JOINED = "lora_unet_transformer_blocks_0_attn_to_qkv"
LAST_NORM = "lora_unet_final_layer_adaLN_modulation_1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux2_folder(tmp_path_factory.mktemp("flux2") / "klein base")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseWeights:
    return open_base(folder)


@pytest.fixture(scope="module")
def model(base: BaseWeights) -> DiffusionModel:
    return base.family.build(base)


@pytest.fixture(scope="module")
def originals(model: DiffusionModel) -> dict[str, str]:
    """Path of a Linear in the network → its name in the published files, by the numbers of its weight."""
    published = {name: tensor for name, tensor in flux2_weights().denoiser.items() if tensor.ndim == 2}
    found = {
        path: name.removesuffix(".weight")
        for path, module in linears(model).items()
        for name, tensor in published.items()
        if torch.equal(module.weight, tensor)
    }
    assert len(found) == len(published) == len(linears(model))
    return found


def test_every_layer_has_the_name_of_the_published_files(model: DiffusionModel, originals: dict[str, str]) -> None:
    """Which leads back to it."""
    names = {path.path: name for path, name in adapter_names(model).items() if path.component == "unet"}
    assert names == {path: f"lora_unet_{name.replace('.', '_')}" for path, name in originals.items()}
    by_name = modules_by_name(model)
    for path, module in linears(model).items():
        assert module_path(names[path]) == ModulePath("unet", path)
        assert by_name[names[path]] is module


def diffusers_paths(path: str) -> list[str]:
    """The one or three modules of diffusers that one of the network is."""
    block, _, rest = path.partition(".attn.")
    if f"attn.{rest}" in PARTS and not block.startswith("single"):
        return [f"{block}.{part}" for part in PARTS[f"attn.{rest}"]]
    return [path.replace("norm_out.projection", "norm_out.linear")]


# stem of a module's keys by its path; whether that is the path in diffusers or in the published files
FORMS: dict[str, tuple[Callable[[str], str], bool, tuple[str, str]]] = {
    "kohya": (underscored("lora_unet_"), False, KOHYA),
    "kohya, paths of diffusers": (underscored("lora_unet_"), True, KOHYA),
    "ai-toolkit": (dotted("diffusion_model."), False, PEFT),
    "diffusers": (dotted("transformer."), True, PEFT),
    "diffusers, without a prefix": (dotted(""), True, PEFT),
    "PEFT": (dotted("base_model.model."), True, PEFT),
    "PEFT, published names": (dotted("base_model.model."), False, PEFT),
    "OneTrainer": (underscored("lora_transformer_"), True, KOHYA),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_names_of_every_program_are_read(form: str, base: BaseWeights, originals: dict[str, str]) -> None:
    """Each layer changes its own module, and nothing else is changed."""
    stem, splits, suffixes = FORMS[form]
    model, plain = base.family.build(base), base.family.build(base)
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for number, (path, module) in enumerate(linears(model).items()):
        own_paths = diffusers_paths(path) if splits else [originals[path]]
        deltas = []
        for part, own_path in enumerate(own_paths):
            down, up = lora(len(module.weight) // len(own_paths), module.in_features, 10 * number + part)
            tensors |= {stem(own_path) + suffixes[0]: down, stem(own_path) + suffixes[1]: up}
            if suffixes == KOHYA:
                tensors[f"{stem(own_path)}.alpha"] = torch.tensor(2.0)
            deltas.append(up @ down * (2 / 3 if suffixes == KOHYA else 1.0))
        delta = torch.cat(deltas)
        swapped = splits and path == "norm_out.projection"
        expected[path] = torch.cat(delta.chunk(2)[::-1]) if swapped else delta
    adapter = parse_adapter(tensors)
    assert family_of(adapter) == "FLUX.2"
    merge_into(model, adapter, 1.0)
    for path, module in linears(model).items():
        torch.testing.assert_close(module.weight - linears(plain)[path].weight, expected[path], rtol=0, atol=1e-5)
    for name, parameter in model.denoiser.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, plain.denoiser.get_parameter(name))


# Projections in three parts


def thirds(kinds: Mapping[int, str], ranks: tuple[int, int, int] = (1, 2, 4)) -> dict[str, Tensor]:
    """Tensors of query (0), key (1) and value (2), as kinds of `adapter_maths` have them, of different alphas."""
    tensors = {}
    for number, kind in kinds.items():
        for part, tensor in tensors_of(kind, (WIDTH, WIDTH), number, ranks[number]).items():
            value = torch.tensor(0.5 + number) if part == "alpha" and "OFT" not in kind else tensor
            tensors[f"{THREE[number]}.{part}"] = value
    return tensors


def three_deltas(tensors: Mapping[str, Tensor], weight: Tensor | None = None) -> Tensor:
    """What query, key and value add, each alone by its equation; zeros for one that is not there."""
    deltas = []
    for number, stem in enumerate(THREE):
        name = "lora_unet_mid_block_attentions_0_proj_in"  # of a module that nothing is joined with
        own = {f"{name}{key.removeprefix(stem)}": one for key, one in tensors.items() if key.startswith(f"{stem}.")}
        rows = None if weight is None else weight[number * WIDTH : (number + 1) * WIDTH]
        delta = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        deltas.append(added(parse_adapter(own).layers[name], (WIDTH, WIDTH), rows) if own else delta)
    return torch.cat(deltas)


@pytest.mark.parametrize("present", [set(some) for n in (1, 2, 3) for some in itertools.combinations(range(3), n)])
def test_a_lora_in_three_parts_adds_what_the_three_add(present: set[int]) -> None:
    """Of different ranks and alphas, and where some are missing."""
    tensors = thirds(dict.fromkeys(present, "LoRA"))
    [(name, layer)] = parse_adapter(tensors).layers.items()
    assert name == JOINED
    assert isinstance(layer, LoraLayer)
    assert layer.rank == sum((1, 2, 4)[number] for number in present)
    assert error(added(layer, (3 * WIDTH, WIDTH)), three_deltas(tensors)) < 1e-6


def test_parts_of_one_inner_factor_share_it() -> None:
    """As a file of this pack comes back from diffusers' format: the rank stays what it was."""
    tensors = thirds(dict.fromkeys(range(3), "LoRA"), ranks=(2, 2, 2))
    for stem in THREE:
        tensors[f"{stem}.lora_down.weight"] = tensors[f"{THREE[0]}.lora_down.weight"]
        tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    [layer] = parse_adapter(tensors).layers.values()
    assert (layer.rank, layer.alpha) == (2, 3.0)
    assert error(added(layer, (3 * WIDTH, WIDTH)), three_deltas(tensors)) < 1e-6


def test_a_dora_in_three_parts_adds_what_the_three_add() -> None:
    weight = torch.randn((3 * WIDTH, WIDTH), generator=torch.Generator().manual_seed(9))
    tensors = thirds(dict.fromkeys(range(3), "DoRA"))
    [layer] = parse_adapter(tensors).layers.values()
    assert layer.kind == "DoRA"
    assert error(added(layer, (3 * WIDTH, WIDTH), weight), three_deltas(tensors, weight)) < 1e-6
    assert error(layer.delta(weight), three_deltas(tensors, weight)) < 1e-5


@pytest.mark.parametrize(
    "kinds",
    [
        {0: "LoHa", 1: "LoHa", 2: "LoHa"},
        {0: "LoHa", 2: "LoHa"},
        {0: "LoRA", 1: "LoHa", 2: "full difference"},
        {1: "full difference"},
    ],
    ids=str,
)
def test_other_kinds_in_three_parts_become_a_full_difference(kinds: dict[int, str]) -> None:
    tensors = thirds(kinds)
    [layer] = parse_adapter(tensors).layers.values()
    assert isinstance(layer, FullLayer)
    assert error(added(layer, (3 * WIDTH, WIDTH)), three_deltas(tensors)) < 1e-6


def test_lokr_in_three_parts_becomes_a_full_difference() -> None:
    tensors = {}
    source = torch.Generator().manual_seed(0)
    for stem in THREE:
        tensors[f"{stem}.lokr_w1"] = torch.randn((4, 4), generator=source)
        tensors[f"{stem}.lokr_w2"] = torch.randn((WIDTH // 4, WIDTH // 4), generator=source)
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    [layer] = parse_adapter(tensors).layers.values()
    assert isinstance(layer, FullLayer)
    expected = [torch.kron(tensors[f"{stem}.lokr_w1"], tensors[f"{stem}.lokr_w2"]) for stem in THREE]
    assert error(layer.delta(), torch.cat(expected)) < 1e-6


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ({0: "DoRA", 1: "DoRA"}, "a DoRA without value"),
        ({1: "DoRA", 0: "LoRA", 2: "DoRA"}, "a DoRA without query"),
        (dict.fromkeys(range(3), "DoRA, per input"), "magnitudes of its inputs"),
        (dict.fromkeys(range(3), "LoHa with DoRA"), "a DoRA of a type that can't be joined"),
        (dict.fromkeys(range(3), "OFT"), "can't be in one layer"),
    ],
    ids=str,
)
def test_parts_that_are_no_layer_together_are_refused(kinds: dict[int, str], words: str) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        parse_adapter(thirds(kinds))
    assert "to_qkv" in str(caught.value)


def test_parts_beside_the_whole_are_refused() -> None:
    tensors = thirds({0: "LoRA"})
    down, up = lora(3 * WIDTH, WIDTH, 0)
    whole = "transformer.transformer_blocks.0.attn.to_qkv"
    tensors |= {f"{whole}{PEFT[0]}": down, f"{whole}{PEFT[1]}": up}
    with pytest.raises(AdapterError, match=r"of which it is a part"):
        parse_adapter(tensors)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "full difference"])
def test_diffusers_last_norm_has_its_halves_the_other_way_round(kind: str) -> None:
    shape = (2 * WIDTH, WIDTH)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    parts = tensors_of(kind, shape)
    [theirs] = parse_adapter(
        {f"transformer.norm_out.linear.{part}": one for part, one in parts.items()}
    ).layers.values()
    [ours] = parse_adapter({f"{LAST_NORM}.{part}": one for part, one in parts.items()}).layers.values()
    swapped = torch.cat(weight.chunk(2)[::-1])
    expected = torch.cat(added(ours, shape, swapped).chunk(2)[::-1])
    assert error(added(theirs, shape, weight), expected) < 1e-6


# diffusers' format


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_what_is_written_for_diffusers_is_read_as_the_same(kind: str, model: DiffusionModel) -> None:
    adapter = random_adapter(model, kind)
    tensors = diffusers_state_dict(adapter, torch.float32)
    assert all(key.startswith("transformer.") for key in tensors)
    assert not any("qkv." in key or "norm_out.projection" in key for key in tensors)
    modules = modules_by_name(model)
    before = {id(modules[name]): layer for name, layer in adapter.layers.items()}
    after = {id(modules[name]): layer for name, layer in parse_adapter(tensors).layers.items()}
    assert before.keys() == after.keys()
    for name in adapter.layers:
        weight = modules[name].weight.detach()
        ours, theirs = before[id(modules[name])], after[id(modules[name])]
        assert ours.rank == theirs.rank
        assert error(theirs.delta(weight), ours.delta(weight)) < 1e-5


@torch.no_grad()
def predicted(model: DiffusionModel) -> Tensor:
    noisy, text = inputs()
    return model.predict(noisy, torch.tensor([400.0]), {"text": text})


@torch.no_grad()
def predicted_by_diffusers(pipeline: Any) -> Tensor:
    noisy, text = inputs()
    places = pipeline._prepare_latent_ids(noisy)
    tokens = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy),
        encoder_hidden_states=text,
        timestep=torch.tensor([0.4]),
        img_ids=places,
        txt_ids=pipeline._prepare_text_ids(text),
        return_dict=False,
    )[0]
    unpacked: Tensor = pipeline._unpack_latents_with_ids(tokens, places)
    return unpacked


def inputs() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(3)
    return torch.randn((1, 128, 4, 6), generator=source), torch.randn((1, 512, 96), generator=source)


def with_file(base: BaseWeights, file: Path) -> DiffusionModel:
    model = base.family.build(base)
    merge_into(model, read_adapter(file), 1.0)
    return model


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_diffusers_loads_a_converted_file(
    kind: str, folder: Path, base: BaseWeights, model: DiffusionModel, tmp_path: Path
) -> None:
    own = write_adapter(tmp_path / "kohya.safetensors", random_adapter(model, kind), torch.float32)
    converted = write_diffusers(tmp_path / "diffusers.safetensors", read_adapter(own), torch.float32)
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    plain = predicted_by_diffusers(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name=converted.name)
    theirs = predicted_by_diffusers(pipeline)
    assert (theirs - plain).abs().max() > 0.1
    for file in (own, converted):
        torch.testing.assert_close(predicted(with_file(base, file)), theirs, rtol=0, atol=1e-5)


def test_a_file_of_diffusers_is_read(folder: Path, base: BaseWeights, tmp_path: Path) -> None:
    """As its training example saves it: query, key and value apart, each with a LoRA of its own.

    The alphas are in the configuration in the file's metadata alone.
    """
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    transformer = pipeline.transformer
    paths = [path for path, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(
        r=3,
        lora_alpha=2,
        target_modules=paths,
        rank_pattern={"attn.to_k": 2, "norm_out.linear": 4},
        alpha_pattern={"transformer_blocks.1.attn.to_q": 5},
    )
    transformer.add_adapter(config)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=source))
    Flux2KleinPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    [file] = tmp_path.iterdir()
    theirs = predicted_by_diffusers(pipeline)
    assert (theirs - predicted(base.family.build(base))).abs().max() > 0.1
    torch.testing.assert_close(predicted(with_file(base, file)), theirs, rtol=0, atol=1e-5)


# FLUX.1

FLUX1 = {
    "modulation of its own": ("lora_unet_double_blocks_0_img_mod_lin", 18432, 3072),
    "a wider MLP, kohya": ("lora_unet_double_blocks_0_img_mlp_0", 12288, 3072),
    "a narrower single block, kohya": ("lora_unet_single_blocks_0_linear1", 21504, 3072),
    "the end of a single block, kohya": ("lora_unet_single_blocks_0_linear2", 3072, 15360),
    "more double blocks, kohya": ("lora_unet_double_blocks_18_img_attn_qkv", 9216, 3072),
    "a wider MLP, ai-toolkit": ("diffusion_model.double_blocks.0.txt_mlp.0", 12288, 3072),
    "an MLP of diffusers": ("transformer.transformer_blocks.0.ff_context.net.0.proj", 12288, 3072),
    "a single block of diffusers": ("transformer.single_transformer_blocks.0.attn.to_q", 3072, 3072),
    "more double blocks, diffusers": ("transformer.transformer_blocks.18.attn.to_q", 3072, 3072),
    "a single block of OneTrainer": ("lora_transformer_single_transformer_blocks_0_proj_mlp", 12288, 3072),
}


@pytest.mark.parametrize("what", FLUX1)
def test_flux_1_is_refused_by_name(what: str) -> None:
    """Beside an attention that could be of either."""
    stem, outputs, inputs = FLUX1[what]
    tensors: dict[str, Tensor] = {}
    for name, out, width in ((stem, outputs, inputs), ("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072)):
        down, up = lora(out, width, 0, rank=1)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    with pytest.raises(AdapterError, match=r"was made for Flux, .*which is not supported"):
        parse_adapter(tensors)


def test_a_dora_of_inputs_on_a_joined_projection_has_no_form_in_diffusers() -> None:
    layer = LoraLayer(torch.ones(2, 128), torch.ones(384, 2), 2.0, dora_scale=torch.ones(1, 128))
    with pytest.raises(AdapterError, match="magnitude for each input"):
        diffusers_state_dict(Adapter({"lora_unet_double_blocks_0_img_attn_qkv": layer}), torch.float32)


def test_a_folder_of_peft_for_the_transformer_is_read_with_its_scale(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    module = "base_model.model.single_transformer_blocks.0.attn.to_out"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 512), f"{module}.lora_B.weight": torch.ones(128, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["to_out"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in (tmp_path, folder):
        [layer] = read_adapter(path).layers.values()
        assert (layer.rank, layer.alpha) == (2, 8.0)


def test_the_modules_of_the_published_model_are_those_that_musubi_tuner_trains() -> None:
    """Names and shapes, from kohya's own program."""
    weights = flux2_on_meta(KLEIN_4B)
    config = FAMILY.complete(FAMILY.layout.denoiser_config(weights.denoiser))
    with torch.device("meta"):
        network = make_transformer(**config)
    names = FAMILY.layout.original_names([path for path, _ in network.named_modules()], config)
    found = {
        f"lora_unet_{names[path].replace('.', '_')}": [[4, module.in_features], [module.out_features, 4]]
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(FAMILY.targets["attention-mlp"], path)
    }
    golden = ROOT / "tests" / "golden" / "musubi_flux2_keys.json"
    assert found == json.loads(golden.read_text(encoding="utf-8"))
