"""Names of modules: kohya's lists of UNets, every program's naming of one module, and what names and shapes tell."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from adapter_maths import added, error, lora_named, merged
from cases import mostly_slow
from helpers import ROOT
from pack.trainer.adapters.kohya import Adapter, parse_adapter
from pack.trainer.adapters.module_paths import ModulePath, block_order, module_path
from pack.trainer.adapters.names import family_of, kohya_name, with_kohya_names
from pack.trainer.core.errors import AdapterError
from pack.trainer.merging.merge import WeightedAdapter, merge
from pack.trainer.models.families import FAMILIES
from pack.trainer.settings.merge import MergeSettings
from torch import Tensor

GOLDEN = sorted((ROOT / "tests" / "golden").glob("kohya_sd*_keys.json"))
XL = ROOT / "tests" / "golden" / "kohya_sdxl_conv_keys.json"
SD1 = ROOT / "tests" / "golden" / "kohya_sd15_conv_keys.json"
SHAPE = (4, 3)


def names_in(path: Path) -> list[str]:
    found: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return list(found)


def golden(path: Path, seed: int = 0) -> Adapter:
    """An adapter with every module that kohya's program trains, tiny."""
    return Adapter({name: lora_named(number + seed).layers["m"] for number, name in enumerate(names_in(path))})


def tensors_named(adapter: Adapter, form: str) -> dict[str, Tensor]:
    """The tensors as another program names them."""
    found = {}
    for name, layer in adapter.layers.items():
        place = module_path(name)
        start = {
            "diffusers": f"{place}",
            "PEFT": f"base_model.model.{place.path}" if place.component == "unet" else f"{place}",
            "ComfyUI": f"diffusion_model.{place.path}",
        }[form]
        down, up = ("lora_down", "lora_up") if form == "ComfyUI" else ("lora_A", "lora_B")
        tensors = layer.tensors()
        found[f"{start}.{down}.weight"] = tensors["lora_down.weight"]
        found[f"{start}.{up}.weight"] = tensors["lora_up.weight"]
        if form == "ComfyUI":
            found[f"{start}.alpha"] = torch.tensor(layer.alpha)
    return found


# Places


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_place_of_a_name_has_that_name(path: Path) -> None:
    family = next(one for one in FAMILIES if one.name == ("sdxl" if "sdxl" in path.stem else "sd1"))
    names = names_in(path)
    places = [module_path(name) for name in names]
    assert [kohya_name(place, family) for place in places] == names
    assert len(set(places)) == len(names)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_blocks_are_known_and_sorted(path: Path) -> None:
    """No module of a UNet's blocks is counted as one outside of them."""
    blocks = {module_path(name).block for name in names_in(path)}
    levels = 3 if "sdxl" in path.stem else 4
    unet = {"mid", *(f"{side} {level}" for side in ("down", "up") for level in range(levels))}
    if "conv" not in path.stem:
        unet -= {"down 0", "up 2"} if "sdxl" in path.stem else {"down 3", "up 0"}
    text = {"text", "text 2"} if "sdxl" in path.stem else {"text"}
    assert blocks - {"other"} == unet | text
    ordered = sorted(blocks, key=block_order)
    assert [block.split()[0] for block in ordered] == sorted(
        (block.split()[0] for block in ordered), key=["text", "down", "mid", "up", "other"].index
    )


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("lora_unet_conv_in", "unet.conv_in"),
        ("lora_unet_input_blocks_0_0", "unet.conv_in"),
        ("lora_unet_time_embed_2", "unet.time_embedding.linear_2"),
        ("lora_unet_label_emb_0_0", "unet.add_embedding.linear_1"),
        ("lora_unet_out_2", "unet.conv_out"),
        ("lora_unet_input_blocks_3_0_op", "unet.down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_output_blocks_2_2_conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_2_1_conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_input_blocks_4_0_emb_layers_1", "unet.down_blocks.1.resnets.0.time_emb_proj"),
        ("lora_unet_output_blocks_8_0_skip_connection", "unet.up_blocks.2.resnets.2.conv_shortcut"),
        ("lora_unet_middle_block_2_out_layers_3", "unet.mid_block.resnets.1.conv2"),
        (
            "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
            "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
        ),
        (
            "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
        ),
    ],
)
def test_places_by_name(name: str, place: str) -> None:
    assert str(module_path(name)) == place


# One module under several names


LISTED = {"SDXL": XL, "SD 1": SD1}
FORMS = [(family, form) for family in LISTED for form in ("diffusers", "PEFT", "ComfyUI")]


@pytest.mark.parametrize(("family", "form"), mostly_slow(FORMS, *FORMS[-3:], ("SDXL", "ComfyUI")))
def test_modules_of_other_programs_are_merged_with_those_of_kohya(family: str, form: str) -> None:
    """In either order, into one module each, under kohya's name."""
    a, b = golden(LISTED[family]), golden(LISTED[family], 5000)
    if form == "ComfyUI":  # which names only the UNet so
        b = Adapter({name: layer for name, layer in b.layers.items() if name.startswith("lora_unet_")})
    renamed = parse_adapter(tensors_named(b, form))
    assert len(renamed.layers) == len(b.layers)
    for pair in ((a, renamed), (renamed, a)):
        result = merged(*pair)
        assert set(result.adapter.layers) == set(a.layers)
        assert not result.report.warnings
        for name, layer in result.adapter.layers.items():
            both = added(a.layers[name], SHAPE) + (added(b.layers[name], SHAPE) if name in b.layers else 0.0)
            assert error(added(layer, SHAPE), both) < 1e-5


def test_an_sd1_in_the_names_of_the_original_code_is_merged_with_kohyas() -> None:
    a = golden(SD1)
    names = {
        "lora_unet_down_blocks_1_attentions_0_proj_in": "diffusion_model.input_blocks.4.1.proj_in",
        "lora_unet_up_blocks_1_upsamplers_0_conv": "diffusion_model.output_blocks.5.2.conv",
        "lora_unet_mid_block_resnets_1_conv1": "diffusion_model.middle_block.2.in_layers.2",
    }
    b = lora_named(1).layers["m"]
    tensors = {f"{theirs}.{part}": tensor for theirs in names.values() for part, tensor in b.tensors().items()}
    result = merged(a, parse_adapter(tensors)).adapter
    assert set(result.layers) == set(a.layers)
    for name in names:
        assert error(added(result.layers[name], SHAPE), added(a.layers[name], SHAPE) + added(b, SHAPE)) < 1e-5


@pytest.mark.parametrize("xl", [False, True], ids=["SD 1", "SDXL"])
def test_the_first_text_encoder_has_two_prefixes(xl: bool) -> None:
    path = "text_model_encoder_layers_3_mlp_fc1"
    unet = "lora_unet_input_blocks_4_1_proj_in" if xl else "lora_unet_down_blocks_1_attentions_0_proj_in"
    family = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora" if xl else "stable-diffusion-v1/lora"}
    a, b = (
        Adapter({f"{prefix}_{path}": lora_named(n).layers["m"], unet: lora_named(n).layers["m"]}, family)
        for n, prefix in enumerate(("lora_te", "lora_te1"))
    )
    result = merged(a, b).adapter
    name = f"lora_te1_{path}" if xl else f"lora_te_{path}"
    assert set(result.layers) == {unet, name}
    both = sum((added(lora_named(n).layers["m"], SHAPE) for n in (0, 1)), torch.zeros(SHAPE).double())
    assert error(added(result.layers[name], SHAPE), both) < 1e-5


def test_one_adapter_that_tells_its_family_names_the_modules_of_all() -> None:
    """Also those of an adapter that could be of any."""
    tells = lora_named(1, "lora_te2_text_model_encoder_layers_0_mlp_fc1", "lora_unet_input_blocks_4_1_proj_in")
    silent = lora_named(2, "lora_unet_down_blocks_1_attentions_0_proj_in")
    assert family_of(silent) is None
    for pair in ((tells, silent), (silent, tells)):
        assert set(merged(*pair).adapter.layers) == set(tells.layers)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_one_adapter_keeps_its_names(path: Path) -> None:
    adapter = golden(path)
    assert set(merged(adapter).adapter.layers) == set(adapter.layers)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["lora_te1_text_model_encoder_layers_0_mlp_fc1"], id="an SDXL's first text encoder"),
        pytest.param(
            ["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_input_blocks_3_0_op"],
            id="an SDXL without cross attention",
        ),
    ],
)
def test_names_stay_as_they_were_where_no_other_is_needed(names: list[str]) -> None:
    """What was read by a program under these names must be read by it again."""
    adapter = lora_named(1, *names)
    for inputs in ((adapter,), (adapter, lora_named(2, *names))):
        assert set(merged(*inputs).adapter.layers) == set(names)


def test_vectors_are_named_as_their_modules() -> None:
    tells = lora_named(1, "lora_te2_text_model_encoder_layers_0_mlp_fc1")
    adapter = Adapter(tells.layers, {}, {"lora_unet_down_blocks_1_resnets_0_conv1.diff_b": torch.ones(3)})
    [named] = with_kohya_names([adapter])
    assert set(named.vectors) == {"lora_unet_input_blocks_4_0_in_layers_2.diff_b"}


def test_two_names_of_one_module_in_one_file_are_not_lost_in_silence() -> None:
    """Their sum, or an error, but not one of the two."""
    names = ["lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"]
    family = {"modelspec.architecture": "stable-diffusion-v1/lora"}
    layers = [lora_named(n).layers["m"] for n in (1, 2)]
    adapter = Adapter(dict(zip(names, layers, strict=True)), family)
    with contextlib.suppress(AdapterError):
        result = merge([WeightedAdapter(adapter, "A")], MergeSettings()).adapter
        whole = sum((added(layer, SHAPE) for layer in result.layers.values()), torch.zeros(SHAPE).double())
        assert error(whole, added(layers[0], SHAPE) + added(layers[1], SHAPE)) < 1e-5


# Families


def wide(name: str, width: int) -> Adapter:
    tensors = {"lora_down.weight": torch.ones(1, width), "lora_up.weight": torch.ones(8, 1)}
    return parse_adapter({f"{name}.{part}": tensor for part, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("adapter", "family"),
    [
        (wide("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768), "SD 1"),
        (wide("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v", 1024), "SD 2"),
        (wide("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048), "SDXL"),
        (wide("lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k", 2048), "SDXL"),
        (wide("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280), "SDXL"),
        (wide("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k", 768), None),
        (wide("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 64), None),
    ],
)
def test_modules_tell_the_family(adapter: Adapter, family: str | None) -> None:
    assert family_of(adapter) == family


@pytest.mark.parametrize(
    ("key", "value", "family"),
    [
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora", "SDXL"),
        ("modelspec.architecture", "stable-diffusion-v1/lora", "SD 1"),
        ("modelspec.architecture", "stable-diffusion-v2-768-v/lora", "SD 2"),
        ("modelspec.architecture", "stable-diffusion-v2/lora", "SD 2"),
        ("modelspec.architecture", "flux-1-dev/lora", None),
        ("ss_base_model_version", "sdxl_base_v1-0", "SDXL"),
        ("ss_base_model_version", "sdxl_1.0", "SDXL"),
        ("ss_base_model_version", "sdxl_", "SDXL"),
        ("ss_base_model_version", "sd_v1", "SD 1"),
        ("ss_base_model_version", "sd_v1_v", "SD 1"),
        ("ss_base_model_version", "sd_v2_768_v", "SD 2"),
        ("ss_base_model_version", "unheard of", None),
    ],
)
def test_metadata_tell_the_family_where_modules_don_t(key: str, value: str, family: str | None) -> None:
    assert family_of(Adapter(lora_named(1, "lora_unet_conv_in").layers, {key: value})) == family
    shown = wide("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 1024)
    assert family_of(Adapter(shown.layers, {key: value})) == "SD 2"


def test_a_place_is_told_as_a_path() -> None:
    place = ModulePath("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1")
    assert (str(place), place.block) == ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text 2")
    assert ModulePath("unet", "conv_in").block == "other"
