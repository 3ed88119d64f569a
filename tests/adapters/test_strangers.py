"""Adapter files of strangers: read under the names of the program that wrote them, or refused by name.

One module has one name here, whatever it is called in a file; what no model of the families has is never made one.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import sd2_state_dict, sd15_state_dict, sdxl_state_dict
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from lent_models import lent
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.diffusers_format import diffusers_state_dict
from pack.trainer.adapters.keys import parse_keys
from pack.trainer.adapters.kohya import Adapter, LoraLayer, parse_adapter, read_adapter, write_adapter
from pack.trainer.adapters.module_paths import dotted, module_path, underscored
from pack.trainer.adapters.names import name_in_family, named_weights
from pack.trainer.cli.inspect import describe_adapter, inspect
from pack.trainer.core.errors import AdapterError, SettingsError
from pack.trainer.merging.merge import WeightedAdapter, merge, resize
from pack.trainer.models.families import FAMILIES
from pack.trainer.models.families.base import DiffusionModel, Family
from pack.trainer.models.open import open_base
from pack.trainer.settings.merge import MergeSettings, TruncationSettings
from pack.trainer.training.export import combined
from safetensors.torch import load_file, save_file
from torch import Tensor

StateDict = Callable[[str], dict[str, Tensor]]
GOLDEN = {
    family: json.loads((ROOT / "tests" / "golden" / f"kohya_{name}_conv_keys.json").read_text(encoding="utf-8"))
    for family, name in (("sd1", "sd15"), ("sd2", "sd2"), ("sdxl", "sdxl"))
}
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
ORIGINAL = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
FC1 = "text_model.encoder.layers.0.mlp.fc1"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"


def kohya(name: str) -> str:
    return f"lora_unet_{underscored(name)}"


KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
OLD = ("_lora.down.weight", "_lora.up.weight")  # diffusers' attention processors


def lora(stem: str, seed: int = 0, form: tuple[str, str] = KOHYA) -> dict[str, Tensor]:
    """The two matrices of a module, which all of these tests give 6 inputs and 5 outputs."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{stem}{form[0]}": torch.randn((2, 6), generator=generator),
        f"{stem}{form[1]}": torch.randn((5, 2), generator=generator),
    }


def delta(adapter: Adapter, name: str) -> Tensor:
    return adapter.layers[name].delta()


# Names

NAMES = {
    "kohya": (kohya(TO_Q), kohya(TO_Q)),
    "kohya, original": (kohya(ORIGINAL), kohya(ORIGINAL)),
    "kohya's OFT script": (f"oft_unet_{underscored(TO_Q)}", kohya(TO_Q)),
    "kohya, one text encoder": (f"lora_te_{underscored(FC1)}", f"lora_te_{underscored(FC1)}"),
    "kohya, first text encoder": (f"lora_te1_{underscored(FC1)}", f"lora_te1_{underscored(FC1)}"),
    "kohya, second text encoder": (f"lora_te2_{underscored(FC1)}", f"lora_te2_{underscored(FC1)}"),
    "kohya with transformers 5": ("lora_te1_encoder_layers_0_mlp_fc1", f"lora_te1_{underscored(FC1)}"),
    "LyCORIS's wrapper": (f"lycoris_{underscored(TO_Q)}", kohya(TO_Q)),
    "LyCORIS's wrapper, a text encoder": (f"lycoris_{underscored(FC1)}", f"lora_te_{underscored(FC1)}"),
    "LyCORIS's wrapper, compiled": (f"lycoris__orig_mod_{underscored(TO_Q)}", kohya(TO_Q)),
    "kohya, a compiled block": (
        "lora_unet_down_blocks_0__orig_mod_attentions_0_transformer_blocks_0_attn1_to_q",
        kohya(TO_Q),
    ),
    "OneTrainer in memory": (f"lora_unet.{TO_Q}", kohya(TO_Q)),
    "OneTrainer, OMI": (f"unet.{ORIGINAL}", kohya(ORIGINAL)),
    "OneTrainer, OMI, CLIP-L": (f"clip_l.{FC1}", f"lora_te_{underscored(FC1)}"),
    "OneTrainer, OMI, CLIP-G": (f"clip_g.{FC1}", f"lora_te2_{underscored(FC1)}"),
    "OneTrainer, OMI, CLIP-H": (f"clip_h.{FC1}", f"lora_te_{underscored(FC1)}"),
    "diffusers": (f"unet.{TO_Q}", kohya(TO_Q)),
    "diffusers, text encoder": (f"text_encoder.{FC1}", f"lora_te_{underscored(FC1)}"),
    "diffusers, second text encoder": (f"text_encoder_2.{FC1}", f"lora_te2_{underscored(FC1)}"),
    "diffusers, projection": ("text_encoder_2.text_projection", "lora_te2_text_projection"),
    "diffusers, compiled": (f"unet._orig_mod.{TO_Q}", kohya(TO_Q)),
    "diffusers, a compiled block": (f"unet.down_blocks.0._orig_mod.{TO_Q.partition('.0.')[2]}", kohya(TO_Q)),
    "diffusers, data-parallel": (f"unet.module.{TO_Q}", kohya(TO_Q)),
    "diffusers, data-parallel and compiled": (f"module._orig_mod.unet.{TO_Q}", kohya(TO_Q)),
    "PEFT": (f"base_model.model.{TO_Q}", kohya(TO_Q)),
    "PEFT, text encoder": (f"base_model.model.{FC1}", f"lora_te_{underscored(FC1)}"),
    "PEFT, of a network by name": (f"unet.base_model.model.{TO_Q}", kohya(TO_Q)),
    "PEFT, compiled": (f"base_model.model._orig_mod.{TO_Q}", kohya(TO_Q)),
    "ComfyUI": (f"diffusion_model.{ORIGINAL}", kohya(ORIGINAL)),
    "ComfyUI, whole model": (f"model.diffusion_model.{ORIGINAL}", kohya(ORIGINAL)),
    "ComfyUI's extraction, CLIP-L": (f"text_encoders.clip_l.transformer.{FC1}", f"lora_te_{underscored(FC1)}"),
    "ComfyUI's extraction, CLIP-G": (f"text_encoders.clip_g.transformer.{FC1}", f"lora_te2_{underscored(FC1)}"),
}
FORMS = {
    "kohya": KOHYA,
    "PEFT": PEFT,
    "PEFT in memory": (".lora_A.default.weight", ".lora_B.default.weight"),
    "PEFT, an adapter with a name": (".lora_A.my_dog.weight", ".lora_B.my_dog.weight"),
    "diffusers 0.2x": (".lora.down.weight", ".lora.up.weight"),
    "diffusers 0.2x, text": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


@pytest.mark.parametrize("program", NAMES)
def test_a_module_is_read_whatever_it_is_called(program: str, caplog: pytest.LogCaptureFixture) -> None:
    theirs, ours = NAMES[program]
    expected = delta(parse_adapter(lora(ours)), ours)
    for form in FORMS.values():
        adapter = parse_adapter(lora(theirs, form=form))
        assert list(adapter.layers) == [ours]
        assert torch.equal(delta(adapter, ours), expected)
    assert caplog.text == ""


@pytest.mark.parametrize("suffix", ["hada_w1_a", "lokr_w1", "oft_blocks", "diff", "dora_scale", "alpha", "w_norm"])
@pytest.mark.parametrize("program", NAMES)
def test_every_kind_has_the_names_of_every_program(program: str, suffix: str) -> None:
    theirs, ours = NAMES[program]
    [key] = parse_keys([f"{theirs}.{suffix}"]).values()
    assert (key.module, key.part) == (ours, suffix)


@pytest.mark.parametrize("letter", ["q", "k", "v", "out"])
def test_text_encoders_of_diffusers_up_to_0_19(letter: str) -> None:
    """Their attention was named as the UNet's is: https://github.com/huggingface/diffusers/pull/2918."""
    layer = "text_encoder.text_model.encoder.layers.3.self_attn"
    name = f"lora_te_text_model_encoder_layers_3_self_attn_{letter}_proj"
    for stem in (f"{layer}.to_{letter}", f"{layer}.processor.to_{letter}", f"{layer}.{letter}_proj"):
        adapter = parse_adapter(lora(stem, form=OLD))
        assert list(adapter.layers) == [name]
        assert torch.equal(delta(adapter, name), delta(parse_adapter(lora(name)), name))


def test_unets_of_diffusers_up_to_0_19() -> None:
    block, _, _ = TO_Q.rpartition(".")
    for prefix, letter in itertools.product(("unet.", ""), ("to_q", "to_k", "to_v", "to_out")):
        [name] = parse_adapter(lora(f"{prefix}{block}.processor.{letter}", form=OLD)).layers
        assert name == kohya(f"{block}.{letter}" + (".0" if letter == "to_out" else ""))


# One naming rule


def module_names(family: str) -> list[str]:
    """Names of all modules of a published model of a family, as kohya's files have them."""
    names = list(GOLDEN[family])
    original = family == "sdxl"
    outer = ["input_blocks.0.0", "out.0", "out.2", "time_embed.0", "label_emb.0.2"]
    outer = outer if original else ["conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1"]
    norms = ["input_blocks.5.1.norm", "middle_block.2.out_layers.0", "output_blocks.4.0.in_layers.0"]
    norms = norms if original else ["down_blocks.1.attentions.0.norm", "mid_block.resnets.1.norm2"]
    block = "middle_block.1" if original else "mid_block.attentions.0"
    names += [kohya(path) for path in (*outer, *norms, *(f"{block}.transformer_blocks.0.norm{n}" for n in (1, 2, 3)))]
    for text in ("lora_te1_", "lora_te2_") if original else ("lora_te_",):
        inner = ("final_layer_norm", "encoder_layers_7_layer_norm1", "encoder_layers_11_layer_norm2")
        names += [f"{text}text_projection", *(f"{text}text_model_{name}" for name in inner)]
    return names


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.name in GOLDEN], ids=lambda family: family.name
)
def test_kohyas_name_leads_to_diffusers_and_back(family: Family) -> None:
    """For every module, norms and projections included: one rule, in one place."""
    names = module_names(family.name)
    paths = [str(module_path(name)) for name in names]
    assert len(set(paths)) == len(names)
    keys = parse_keys([f"{path}.lora_A.weight" for path in paths])
    assert all(key.is_known_module for key in keys.values())
    back = [name_in_family(keys[f"{path}.lora_A.weight"].module, family) for path in paths]
    assert back == names
    for name in names:
        rest = name.split("_", 2)[2]
        assert underscored(dotted(rest)) == rest


@pytest.mark.parametrize("state_dict", [sd15_state_dict, sd2_state_dict, sdxl_state_dict])
def test_what_a_model_calls_its_modules_is_read(state_dict: StateDict) -> None:
    """Whatever can be trained can be read again, without a word."""
    base = open_base(lent(state_dict("tiny")))
    names = named_weights(base.family.build(base), biases=True)
    keys = parse_keys([f"{name.removesuffix('.bias')}.{'diff_b' if '.bias' in name else 'diff'}" for name in names])
    assert {key.module for key in keys.values()} == {name.removesuffix(".bias") for name in names}
    assert all(key.is_known_module for key in keys.values())


@given(st.sampled_from(sorted(GOLDEN)), st.data())
def test_a_name_that_is_not_on_the_list_is_refused_by_its_key(family: str, data: st.DataObject) -> None:
    """Any module's name with one word changed to one that no model has."""
    name = data.draw(st.sampled_from(module_names(family)))
    words = str(module_path(name)).split(".")
    place = data.draw(st.integers(1, len(words) - 1))
    words[place] = data.draw(st.sampled_from(["attn3", "to_z", "foo", "down_block", "layers_", "-1", "1x", "norm_q"]))
    key = f"{'.'.join(words)}.lora_A.weight"
    with pytest.raises(AdapterError) as caught:
        parse_keys([key, f"unet.{TO_Q}.lora_A.weight"])
    assert key in caught.value.problem


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_x!!!!!!!!.lora_down.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q_.lora_down.weight",
        "lora_te_text_model_encoder_layers_0_self_attn_to_q.lora_down.weight.x",
        "lora_te4_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "unet.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoder.mid_block.attentions.0.proj_in.lora_A.weight",
        "vae.decoder.mid_block.attentions.0.to_q.lora_A.weight",
        "mid.lora_A.weight",
        "0.lora_A.weight",
        f"{kohya(TO_Q)}.lora_down.bias",
        f"{kohya(TO_Q)}.weight",
        "position_ids",
    ],
)
def test_a_tensor_that_is_not_known_is_named(key: str, tmp_path: Path) -> None:
    tensors = lora(kohya(TO_Q)) | {key: torch.ones(2, 2)}
    save_file(tensors, tmp_path / "dog.safetensors")
    for read in (lambda: parse_adapter(tensors), lambda: read_adapter(tmp_path / "dog.safetensors")):
        with pytest.raises(AdapterError) as caught:
            read()
        assert key in caught.value.problem
        assert "Stable Diffusion" in caught.value.remedy


def test_modules_of_known_words_that_no_model_has_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Of a network that somebody made up; such names may be read by what wrote them."""
    adapter = parse_adapter(lora("base_model.model.mid_block.to_q", form=PEFT))
    assert list(adapter.layers) == ["lora_unet_mid_block_to_q"]
    assert "lora_unet_mid_block_to_q" in caplog.text


# Other families and kinds

FOREIGN = {
    "transformer.single_transformer_blocks.0.attn.to_k": "Flux",
    "transformer.transformer_blocks.0.attn.add_q_proj": "Flux",
    "transformer.transformer_blocks.0.ff_context.net.2": "Flux",
    "diffusion_model.double_blocks.0.img_attn.qkv": "Flux",
    "diffusion_model.single_blocks.0.linear1": "Flux",
    "lora_transformer_single_transformer_blocks_0_attn_to_k": "Flux",
    "lora_transformer_transformer_blocks_0_attn_to_k": "Flux",
    "lora_unet_double_blocks_0_img_attn_qkv": "Flux",
    "lora_unet_single_blocks_0_modulation_lin": "Flux",
    "lycoris_single_transformer_blocks_0_attn_to_k": "Flux",
    "transformer.double_blocks.0.img_attn.qkv.0": "Flux",
    "diffusion_model.distilled_guidance_layer.layers.0.in_layer": "Chroma",
    "lora_unet_joint_blocks_0_x_block_attn_proj": "Stable Diffusion 3",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "Stable Diffusion 3",
    "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q": "Stable Diffusion 3",
    "diffusion_model.blocks.0.cross_attn.k_img": "Wan",
    "diffusion_model.blocks.0.self_attn.q": "Wan",
    "diffusion_model.blocks.0.ffn.0": "Wan",
    "lora_unet_blocks_0_self_attn_q": "Wan",
    "lora_unet__blocks_0_cross_attn_k": "Wan",
    "diffusion_model.layers.0.adaLN_modulation.1": "Lumina",
    "transformer.layers.0.attention.to_q": "relative of Z-Image",
    "diffusion_model.layers.0.attention.qkv": "relative of Z-Image, such as Lumina",
    "diffusion_model.layers.0.feed_forward.w1": "relative of Z-Image, such as Lumina",
    "diffusion_model.noise_refiner.0.attention.out": "relative of Z-Image, such as Lumina",
    "transformer.layers.0.attn.to_q": "Lumina",
    "transformer.transformer_blocks.0.img_mlp.net.0.proj": "Qwen-Image",
    "diffusion_model.transformer_blocks.0.txt_mod.1": "Qwen-Image",
    "transformer.double_blocks.0.img_attn_qkv": "HunyuanVideo",
    "diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn_qkv": "HunyuanVideo",
    "base_model.model.blocks.0.attn1.Wqkv": "HunyuanDiT",
    "diffusion_model.blocks.0.cross_attn.q_linear": "PixArt",
    "lora_prior_unet_down_blocks_0_2_attention_attn_to_q": "Stable Cascade",
    "diffusion_model.down_blocks.0.2.attention.attn.out_proj": "Stable Cascade",
    "diffusion_model.double_layers.0.attn.w1q": "AuraFlow",
    "transformer.joint_transformer_blocks.0.attn.to_q": "AuraFlow",
    "diffusion_model.blocks.block0.blocks.0.block.attn.to_q.0": "Cosmos",
    "diffusion_model.blocks.0.self_attn.q_proj": "Cosmos",
    "transformer.double_stream_blocks.0.block.attn1.to_q": "HiDream",
    "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q": "AnimateDiff",
    "unet.down_blocks.1.attentions.0.temporal_transformer_blocks.0.attn1.to_q": "Stable Video Diffusion",
    "unet.down_blocks.1.attentions.0.add_k_proj": "Kandinsky",
    "transformer.transformer_blocks.0.attn1.to_q": "diffusion transformer",
}
WIDTHS = {
    ("transformer.transformer_blocks.0.attn.to_q", 3072): "Flux, Chroma or Qwen-Image",
    ("transformer.transformer_blocks.0.attn.to_q", 1536): "Stable Diffusion 3",
    ("diffusion_model.layers.0.attention.qkv", 2304): "Lumina,",
    ("transformer.transformer_blocks.0.attn1.to_q", 1152): "PixArt or Sana",
    ("transformer.transformer_blocks.0.attn1.to_q", 2048): "LTX-Video",
}


@pytest.mark.parametrize("stem", FOREIGN)
def test_other_families_are_refused_by_name(stem: str) -> None:
    for form in (KOHYA, PEFT):
        tensors = lora(stem, form=form) | {f"{stem}.alpha": torch.tensor(1.0)} | lora(f"lora_te1_{underscored(FC1)}")
        with pytest.raises(AdapterError) as caught:
            parse_adapter(tensors)
        assert f"made for {FOREIGN[stem]}" in caught.value.problem.replace("for a ", "for ")
        assert stem in caught.value.problem


def test_files_of_other_families_are_refused_by_name(tmp_path: Path) -> None:
    save_file(lora("transformer.single_transformer_blocks.0.attn.to_k"), tmp_path / "dog.safetensors")
    with pytest.raises(AdapterError, match=r"dog\.safetensors: .*Flux") as caught:
        read_adapter(tmp_path / "dog.safetensors")
    assert "Stable Diffusion XL" in caught.value.remedy


@pytest.mark.parametrize(("stem", "width"), WIDTHS)
def test_a_width_tells_families_of_like_names(stem: str, width: int) -> None:
    with pytest.raises(AdapterError) as caught:
        parse_adapter({f"{stem}.lora_A.weight": torch.ones(2, width), f"{stem}.lora_B.weight": torch.ones(4, 2)})
    assert f"made for {WIDTHS[stem, width]}" in caught.value.problem


@pytest.mark.parametrize("width", [1152, 2048, 2240])  # of PixArt, LTX-Video and Sana
def test_transformers_that_attend_to_prompts_of_their_own_width_are_not_animas(width: int) -> None:
    """diffusers calls their attention as Anima's, whose prompts are half as wide as its tokens."""
    tensors: dict[str, Tensor] = {}
    for attention in ("attn1", "attn2"):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            stem = f"transformer.transformer_blocks.0.{attention}.{part}"
            tensors |= {f"{stem}.lora_A.weight": torch.ones(2, width), f"{stem}.lora_B.weight": torch.ones(width, 2)}
    with pytest.raises(AdapterError, match="made for") as caught:
        parse_adapter(tensors)
    assert "Anima" not in caught.value.problem


KINDS = {
    "IA3": [f"base_model.model.{TO_Q}.ia3_l"],
    "IA3 ": [f"{kohya(TO_Q)}.weight", f"{kohya(TO_Q)}.on_input"],
    "GLoRA": [f"{kohya(TO_Q)}.{part}" for part in ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha")],
    "OFT as PEFT": [f"base_model.model.{TO_Q}.oft_R.weight"],
    "BOFT as PEFT": [f"base_model.model.{TO_Q}.boft_R", f"base_model.model.{TO_Q}.boft_s"],
    "VeRA": [f"base_model.model.{TO_Q}.vera_lambda_b", f"base_model.model.{TO_Q}.vera_lambda_d"],
    "sparse biases": [*lora(kohya(TO_Q)), f"{kohya(TO_Q)}.bias_indices"],
    "Custom Diffusion": [f"{TO_Q.rpartition('.')[0]}.processor.to_k_custom_diffusion.weight"],
    "cloneofsimo": ["unet:0:up", "unet:0:down"],
    "ControlNet-LLLite": ["lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight"],
    "IP-Adapter": ["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"],
    "textual inversion": ["emb_params"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name(kind: str) -> None:
    with pytest.raises(AdapterError) as caught:
        parse_adapter({key: torch.ones(2, 2) for key in KINDS[kind]})
    assert kind.strip() in caught.value.problem


@pytest.mark.parametrize("keys", [["model.diffusion_model.input_blocks.0.0.weight"], ["conv_in.weight", "x"]])
def test_what_is_no_adapter_is_told_with_what_it_holds(keys: list[str]) -> None:
    with pytest.raises(AdapterError, match="contains no LoRA") as caught:
        parse_adapter({key: torch.ones(2, 2) for key in keys})
    assert keys[0] in caught.value.problem


def test_several_adapters_in_one_file_are_named() -> None:
    tensors = lora(f"unet.{TO_Q}", form=(".lora_A.cat.weight", ".lora_B.cat.weight"))
    tensors |= lora(f"unet.{TO_Q}", form=(".lora_A.dog.weight", ".lora_B.dog.weight"))
    with pytest.raises(AdapterError, match="cat, dog"):
        parse_adapter(tensors)


# One module under several names

TWICE = {
    "kohya and diffusers": (kohya(TO_Q), f"unet.{TO_Q}"),
    "kohya and PEFT": (kohya(TO_Q), f"base_model.model.{TO_Q}"),
    "kohya and compiled": (kohya(TO_Q), f"unet._orig_mod.{TO_Q}"),
    "the original code and diffusers": (kohya(ORIGINAL), f"unet.{module_path(kohya(ORIGINAL)).path}"),
    "ComfyUI and kohya": (f"diffusion_model.{ORIGINAL}", kohya(ORIGINAL)),
    "the text encoder and the first": (f"lora_te_{underscored(FC1)}", f"lora_te1_{underscored(FC1)}"),
    "two names of a text encoder": (f"clip_l.{FC1}", f"text_encoder.{FC1}"),
    "transformers 4 and 5": (f"text_encoder.{FC1}", f"text_encoder.{FC1.removeprefix('text_model.')}"),
}


def in_every_order(tensors: Mapping[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    for keys in itertools.permutations(tensors):
        yield {key: tensors[key] for key in keys}


@pytest.mark.parametrize("case", TWICE)
def test_a_module_under_two_names_is_refused_with_both(case: str) -> None:
    """In whatever order they stand: a mix of one's `down` and the other's `up` would be neither."""
    one, other = TWICE[case]
    tensors = lora(one, 1) | lora(other, 2, PEFT if "." in other else KOHYA)
    for ordered in in_every_order(tensors):
        with pytest.raises(AdapterError) as caught:
            parse_adapter(ordered)
        assert one in caught.value.problem
        assert other in caught.value.problem


@pytest.mark.parametrize("case", TWICE)
def test_halves_under_two_names_are_no_layer(case: str) -> None:
    one, other = TWICE[case]
    down, up = lora(one, 1), lora(other, 2, PEFT if "." in other else KOHYA)
    halves = dict([next(iter(down.items())), list(up.items())[1]])
    for ordered in in_every_order(halves):
        with pytest.raises(AdapterError) as caught:
            parse_adapter(ordered)
        assert one in caught.value.problem
        assert other in caught.value.problem


@pytest.mark.parametrize("case", TWICE)
def test_a_module_under_two_names_with_the_same_numbers_is_read_once(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As converters write it that care for several programs: nothing is ambiguous."""
    one, other = TWICE[case]
    tensors = lora(one, 1) | lora(other, 1, PEFT if "." in other else KOHYA)
    expected = delta(parse_adapter(lora(kohya(TO_Q), 1)), kohya(TO_Q))
    results = {tuple(parse_adapter(ordered).layers) for ordered in in_every_order(tensors)}
    [(name,)] = results
    assert torch.equal(delta(parse_adapter(tensors), name), expected)
    assert one in caplog.text
    assert other in caplog.text


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("lora_unet_conv_norm_out.w_norm", "lora_unet_out_0.w_norm"),
        ("lora_unet_conv_norm_out.w_norm", "lora_unet_conv_norm_out.diff"),
        ("lora_unet_conv_norm_out.b_norm", "diffusion_model.out.0.diff_b"),
        (f"{kohya(TO_OUT)}.diff_b", f"unet.{TO_OUT}.diff_b"),
    ],
)
def test_norms_and_biases_under_two_names_are_refused_with_both(first: str, second: str) -> None:
    for ordered in in_every_order({first: torch.ones(4), second: torch.full((4,), 2.0)}):
        with pytest.raises(AdapterError) as caught:
            parse_adapter(ordered)
        assert first.rpartition(".")[0] in caught.value.problem
        assert second.rpartition(".")[0] in caught.value.problem
    once = parse_adapter({first: torch.ones(4), second: torch.ones(4)})
    assert [vector.tolist() for vector in once.vectors.values()] == [[1.0] * 4]


def test_a_scale_under_two_names_is_refused_with_both() -> None:
    stem = f"unet.{TO_Q}"
    tensors = lora(stem, form=PEFT)
    tensors |= {f"{stem}.dora_scale": torch.ones(5, 1), f"{stem}.lora_magnitude_vector": torch.full((5,), 2.0)}
    with pytest.raises(AdapterError, match=r"dora_scale.*lora_magnitude_vector"):
        parse_adapter(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("equal", [True, False], ids=["the same numbers", "different numbers"])
def test_no_seed_of_hashing_changes_what_is_read(equal: bool, tmp_path: Path) -> None:
    """safetensors gives a file's tensors in an order that differs from process to process."""
    tensors: dict[str, Tensor] = {}
    for number, path in enumerate([TO_Q, TO_OUT, TO_Q.replace("to_q", "to_k"), TO_Q.replace("to_q", "to_v")]):
        tensors |= lora(kohya(path), number) | lora(f"unet.{path}", number if equal else number + 50, PEFT)
    save_file(tensors, tmp_path / "dog.safetensors")
    results = set()
    for seed in range(4):
        output = tmp_path / f"out{seed}.safetensors"
        command = [
            sys.executable,
            "-m",
            "trainer",
            "convert",
            str(tmp_path / "dog.safetensors"),
            "--output",
            str(output),
        ]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        error = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        content = load_file(output) if output.exists() else {}
        numbers = tuple((name, tuple(content[name].flatten().tolist())) for name in sorted(content))
        results.add((done.returncode, tuple(error), numbers))
    [(status, error, content)] = results
    assert (status, bool(error), bool(content)) == ((0, False, True) if equal else (1, True, False))


# Words


def built(state_dict: StateDict) -> DiffusionModel:
    base = open_base(lent(state_dict("tiny")))
    return base.family.build(base)


WORDS = [
    (sdxl_state_dict, {"ss_base_model_version": "sdxl_1.0"}, False),
    (sdxl_state_dict, {"ss_base_model_version": "sdxl_"}, False),
    (sdxl_state_dict, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, False),
    (sd2_state_dict, {"modelspec.architecture": "stable-diffusion-v2/lora"}, False),
    (sd2_state_dict, {"ss_base_model_version": "sd_v2_768_v"}, False),
    (sd15_state_dict, {"ss_base_model_version": "sd_v1_v"}, False),
    (sd15_state_dict, {"ss_base_model_version": "sd_1.5"}, False),
    (sd15_state_dict, {"ss_base_model_version": "something new"}, False),
    (sd15_state_dict, {"ss_base_model_version": "sdxl_base_v1-0"}, True),
    (sd15_state_dict, {"modelspec.architecture": "flux-1-dev/lora"}, True),
    (sdxl_state_dict, {"modelspec.architecture": "stable-diffusion-v1/lora"}, True),
]


@pytest.mark.parametrize(("state_dict", "metadata", "told"), WORDS)
def test_words_about_the_family_advise_and_modules_decide(
    state_dict: StateDict, metadata: dict[str, str], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = built(state_dict)
    weights = named_weights(model)
    name = next(name for name in weights if name.endswith("attn2_to_k"))
    outputs, inputs = weights[name].shape
    layer = LoraLayer(torch.ones(1, inputs), torch.ones(outputs, 1), 1.0)
    merge_into(model, Adapter({name: layer}, metadata), 1.0)
    assert torch.allclose(named_weights(model)[name], weights[name] + 1, atol=1e-6)
    [words] = metadata.values()
    assert (words.removesuffix("/lora") in caplog.text) == told


def test_adapters_whose_words_differ_are_merged_where_their_modules_fit() -> None:
    words = [{"ss_base_model_version": "sd_v1"}, {"ss_base_model_version": "sdxl_1.0"}]
    tensors = [lora(kohya(TO_Q), seed) for seed in (1, 2)]
    parts = [
        WeightedAdapter(parse_adapter(own, metadata), title)
        for own, metadata, title in zip(tensors, words, ("dog", "cat"), strict=True)
    ]
    result = merge(parts, MergeSettings())
    [layer] = result.adapter.layers.values()
    both = sum((delta(part.adapter, kohya(TO_Q)) for part in parts), torch.zeros(5, 6))
    torch.testing.assert_close(layer.delta(), both)
    [warning] = [text for text in result.report.warnings if "famil" in text]
    assert "dog is for SD 1" in warning
    assert "cat is for SDXL" in warning


# Bundled embeddings

EMBEDDING = {"bundle_emb.sks.clip_l": torch.ones(3, 8), "bundle_emb.sks.clip_g": torch.zeros(3, 16)}


def test_bundled_embeddings_are_kept(tmp_path: Path) -> None:
    """As OneTrainer writes them (OneTrainer #485, ComfyUI #3659): through reading, merging and writing."""
    adapter = parse_adapter(lora(kohya(TO_Q)) | EMBEDDING)
    assert list(adapter.layers) == [kohya(TO_Q)]
    other = WeightedAdapter(parse_adapter(lora(kohya(TO_Q), 2)), "style")
    merged = merge([WeightedAdapter(adapter, "dog", 0.5), other], MergeSettings()).adapter
    smaller = resize(WeightedAdapter(adapter, "dog"), TruncationSettings(rank=1)).adapter
    for one in (adapter, merged, smaller):
        write_adapter(tmp_path / "dog.safetensors", one, torch.float16)
        back = read_adapter(tmp_path / "dog.safetensors").embeddings
        assert back.keys() == EMBEDDING.keys()
        assert all(torch.equal(back[key], tensor) for key, tensor in EMBEDDING.items())


def test_bundled_embeddings_that_differ_are_not_merged() -> None:
    one = parse_adapter(lora(kohya(TO_Q), 1) | EMBEDDING)
    other = parse_adapter(lora(kohya(TO_Q), 2) | {key: tensor + 1 for key, tensor in EMBEDDING.items()})
    same = parse_adapter(lora(kohya(TO_Q), 2) | EMBEDDING)
    with pytest.raises(AdapterError, match=r"bundle_emb\.sks"):
        merge([WeightedAdapter(one, "dog"), WeightedAdapter(other, "cat")], MergeSettings())
    merged = merge([WeightedAdapter(one, "dog"), WeightedAdapter(same, "cat")], MergeSettings()).adapter
    assert merged.embeddings.keys() == EMBEDDING.keys()


def test_bundled_embeddings_that_can_not_be_kept_are_told(caplog: pytest.LogCaptureFixture) -> None:
    adapter = parse_adapter(lora(kohya(TO_Q)) | EMBEDDING)
    diffusers_state_dict(adapter, torch.float32)
    assert "sks" in caplog.text
    caplog.clear()
    model = built(sd15_state_dict)
    name = next(name for name in named_weights(model) if name.endswith("attn2_to_k"))
    outputs, inputs = named_weights(model)[name].shape
    layer = LoraLayer(torch.ones(1, inputs), torch.ones(outputs, 1), 1.0)
    with caplog.at_level(logging.WARNING):
        merge_into(model, Adapter({name: layer}, embeddings=EMBEDDING), 1.0)
    assert "A bundled embedding was skipped. The embedding 'sks' has the parts clip_g, clip_l" in caplog.text


def test_a_bundled_embedding_is_inspected() -> None:
    adapter = parse_adapter(lora(kohya(TO_Q)) | EMBEDDING)
    assert describe_adapter(adapter)["embeddings"] == ["sks"]
    assert "embeddings" not in describe_adapter(replace(adapter, embeddings={}))


def test_a_file_is_inspected_by_its_own_numbers(tmp_path: Path) -> None:
    """Rank and alpha, each of its own, the hashes of the file, and the blocks only if asked for."""
    layer = LoraLayer(torch.ones(3, 4), torch.ones(4, 3), 1.5)
    other = LoraLayer(torch.ones(2, 4), torch.ones(4, 2), 8.0)
    adapter = Adapter({kohya(TO_Q): layer, kohya(TO_OUT): other}, {"ss_steps": "9", "modelspec.title": "Dog"})
    path = write_adapter(tmp_path / "dog.safetensors", adapter, torch.float32)
    facts = inspect(path)
    assert (facts["file"], facts["kind"], facts["dtype"]) == (str(path), "LoRA", ["float32"])
    assert (facts["rank"], facts["alpha"]) == ([2, 3], [1.5, 8.0])
    assert facts["modules"]["unet"]["count"] == 2
    assert (facts["summary"]["title"], facts["summary"]["steps"]) == ("Dog", "9")
    assert facts["hashes"]["sshs_model_hash"] == facts["metadata"]["sshs_model_hash"]
    assert "blocks" not in facts
    assert list(inspect(path, blocks=True)["blocks"]) == [module_path(kohya(TO_Q)).block]


def test_adapters_that_are_combined_keep_their_embeddings_and_lose_no_bias() -> None:
    first, second = (parse_adapter(lora(kohya(TO_Q), seed)) for seed in (1, 2))
    embedded = replace(first, embeddings=EMBEDDING)
    result = combined([(embedded, 0.5), (second, 1.0)])
    assert result.embeddings.keys() == EMBEDDING.keys()
    expected = 0.5 * delta(first, kohya(TO_Q)) + delta(second, kohya(TO_Q))
    torch.testing.assert_close(delta(result, kohya(TO_Q)), expected)
    key = f"{kohya(TO_OUT)}.diff_b"
    with pytest.raises(SettingsError) as caught:
        combined([(replace(first, vectors={key: torch.ones(5)}), 1.0), (second, 1.0)])
    assert key in caught.value.problem


def test_embeddings_alone_are_no_lora() -> None:
    with pytest.raises(AdapterError, match=r"no LoRA.*embeddings \(sks\)"):
        parse_adapter(EMBEDDING)
