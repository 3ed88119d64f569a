"""Converting, fusing, extracting and resizing, beside what diffusers loads and what plain arithmetic gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_maths import adapter_of, tensors_of
from cases import mostly_slow
from checkpoints import SDXL_SHAPES, sdxl_state_dict
from checkpoints_folders import diffusers_folder
from helpers import DEMO, MadeOnce, Recorder
from merge_worlds import (
    ATTENTION,
    FAMILIES,
    STATED,
    TEXT,
    UNET_ALL,
    UNET_LINEAR,
    XL,
    both,
    checkpoint,
    deltas,
    demo_base,
    merged_model,
    parameters,
    predicts,
    random_adapter,
    same,
    saved,
    state_dict,
    weights_of,
)
from pack.trainer.adapters.diffusers_format import diffusers_state_dict, to_kohya_format, write_diffusers
from pack.trainer.adapters.kohya import Adapter, file_hashes, read_adapter, read_header
from pack.trainer.adapters.layers import LoraLayer
from pack.trainer.adapters.names import named_weights
from pack.trainer.cli.merge import run_convert, run_extract, run_fuse, run_resize
from pack.trainer.core.devices import DTYPES
from pack.trainer.core.errors import AdapterError, CancelledError, SettingsError, TrainerError
from pack.trainer.merging.extract import extract_between
from pack.trainer.merging.fuse import fuse
from pack.trainer.merging.merge import WeightedAdapter, resize
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from pack.trainer.settings.merge import (
    ConvertCommand,
    ExtractCommand,
    ExtractSettings,
    FuseCommand,
    ResizeCommand,
    TruncationSettings,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick")

TOKENIZER = DEMO / "base" / "tokenizer"
XL_SIZE: dict[str, dict[str, Any]] = {"sdxl": {"size": XL}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Single-file checkpoints."""
    return MadeOnce(lambda family: checkpoint(tmp_path_factory.mktemp("files"), family))


@pytest.fixture(scope="module")
def bases(files: Mapping[str, Path]) -> Mapping[str, BaseWeights]:
    return MadeOnce(lambda family: open_base(files[family]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders in diffusers' layout."""

    def made(family: str) -> Path:
        if family == "sd15":
            return DEMO / "base"
        return diffusers_folder(tmp_path_factory.mktemp("folders") / family, family, **XL_SIZE.get(family, {}))

    return MadeOnce(made)


# Converting


def sample(base: BaseWeights, kind: str, conv_rank: int = 3) -> Adapter:
    """Adapters as people share them, with alphas that are no ranks and ranks that differ."""
    text = random_adapter(base, "DoRA" if "DoRA" in kind else "LoRA", TEXT, seed=2, rank=4, alpha=1.5)
    if kind in ("LoRA", "DoRA"):
        return both(random_adapter(base, kind, UNET_LINEAR), text)
    if kind == "DoRA of the text":
        return both(random_adapter(base, "LoRA", ATTENTION), text)
    unet = random_adapter(base, kind.removesuffix(" of all"), UNET_ALL, rank=4, conv_rank=conv_rank, alpha=0.5)
    return both(unet, text)


def loaded_by_diffusers(folder: Path, file: Path) -> dict[str, Tensor]:
    """The weights of a pipeline of diffusers that fused a file into them."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    names = ["unet", *(name for name in ("text_encoder", "text_encoder_2") if getattr(pipeline, name, None))]
    pipeline.fuse_lora(components=names)
    pipeline.unload_lora_weights()
    return {
        f"{component}.{name}": tensor.detach()
        for component in names
        for name, tensor in getattr(pipeline, component).named_parameters()
    }


LOADED = [(family, kind) for family in FAMILIES for kind in ("LoRA of all", "DoRA of all")]
LOADED += [("sd15", "LoRA"), ("sd2", "DoRA"), ("sdxl", "DoRA of the text")]


@pytest.mark.parametrize(("family", "kind"), mostly_slow(LOADED, ("sd2", "DoRA of all")))
def test_diffusers_loads_a_converted_file(family: str, kind: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Every module, and with the same effect as ours: nothing is missing, unexpected, or scaled otherwise."""
    base = open_base(folders[family])
    reads_header = version("diffusers") >= "0.34"  # else it takes alpha for the same everywhere where ranks differ
    adapter = sample(base, kind, 3 if reads_header else 4)
    file = saved(replace(adapter, metadata=STATED[family]), tmp_path / "kohya.safetensors")
    output = tmp_path / "diffusers.safetensors"
    run_convert(ConvertCommand(lora=file, format="diffusers", output=output, save_precision="fp32"), Recorder())
    theirs = loaded_by_diffusers(folders[family], output)
    ours = parameters(merged_model(replace_dtype(base), (adapter, 1.0)))
    assert same(theirs, ours) < 1e-4  # rounding, of which DoRA's division by lengths makes the most
    before = parameters(replace_dtype(base).family.build(replace_dtype(base)))
    changed = [name for name, tensor in theirs.items() if not torch.equal(tensor, before[name])]
    assert len(changed) == len(adapter.layers)


def replace_dtype(base: BaseWeights) -> BaseWeights:
    """The model in float32."""

    def single(part: Any) -> Any:
        return replace(part, tensors={name: tensor.float() for name, tensor in part.tensors.items()})

    return replace(base, denoiser=single(base.denoiser), text_encoders=[single(one) for one in base.text_encoders])


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "sd2"))
@pytest.mark.parametrize("kind", ["LoRA of all", "DoRA of all"])
def test_there_and_back_adds_the_same(family: str, kind: str, bases: Mapping[str, BaseWeights], tmp_path: Path) -> None:
    """And the modules have the names that they had."""
    adapter = sample(bases[family], kind)
    first = saved(replace(adapter, metadata=STATED[family]), tmp_path / "first.safetensors")
    path: Path = first
    for style in ("diffusers", "kohya"):
        command = ConvertCommand(lora=path, format=style, output=tmp_path / "out.safetensors", save_precision="fp32")
        path, told = run_convert(command, Recorder())
        assert f"{len(adapter.layers)} modules" in told
        assert style in told
    assert path.name == "out-2.safetensors"
    back = read_adapter(path)
    weights = weights_of(bases[family])
    assert same(deltas(back, weights), deltas(adapter, weights)) < 1e-5
    assert {name: layer.rank for name, layer in back.layers.items()} == {
        name: layer.rank for name, layer in adapter.layers.items()
    }
    assert {key: back.metadata[key] for key in STATED[family]} == STATED[family]
    assert (
        {name: tuple(layer.down.shape[2:]) for name, layer in back.layers.items()}
        == {  # type: ignore[attr-defined]
            name: tuple(weights[name].shape[2:]) for name in back.layers
        }
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_converted_files_have_the_precision_that_was_asked_for(
    style: str, precision: str, bases: Mapping[str, BaseWeights], tmp_path: Path
) -> None:
    adapter = sample(bases["sd15"], "DoRA")
    source, output = saved(adapter, tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    run_convert(ConvertCommand(lora=source, format=style, output=output, save_precision=precision), Recorder())
    tensors = load_file(output)
    magnitudes = ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight", "alpha")
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith(magnitudes)} == {DTYPES[precision]}
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(magnitudes)} == {torch.float32}
    weights = weights_of(bases["sd15"])
    limit = {"fp16": 5e-3, "bf16": 3e-2, "fp32": 1e-5}[precision]
    assert same(deltas(read_adapter(output), weights), deltas(adapter, weights)) < limit


def test_a_small_alpha_costs_no_precision(tmp_path: Path) -> None:
    """Alpha 1 of rank 128 is common; diffusers' format holds the scale in a matrix, whose numbers become small."""
    source = torch.Generator().manual_seed(1)
    down, up = torch.randn(128, 64, generator=source) * 0.1, torch.randn(64, 128, generator=source) * 1e-3
    adapter = Adapter({"lora_unet_mid_block_attentions_0_proj_in": LoraLayer(down, up, 1.0)})
    lora, output = saved(adapter, tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    for style in ("kohya", "diffusers"):
        run_convert(ConvertCommand(lora=lora, format=style, output=output, save_precision="fp16"), Recorder())
        [layer] = read_adapter(output).layers.values()
        expected = up @ down / 128
        assert float((layer.delta() - expected).norm() / expected.norm()) < 6e-4, style
        output = tmp_path / "out2.safetensors"


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "sd2"))
def test_names_of_diffusers_are_those_of_the_modules(family: str, bases: Mapping[str, BaseWeights]) -> None:
    base = bases[family]
    found = diffusers_state_dict(sample(base, "LoRA of all"), torch.float32)
    model = base.family.build(base)
    networks = {"unet": model.denoiser, **model.text_encoders}
    for name, tensor in found.items():
        component, _, path = name.rpartition(".lora_")[0].partition(".")
        network = networks[component]
        bare = path if component == "unet" or hasattr(network, "text_model") else path.removeprefix("text_model.")
        weight = network.get_submodule(bare).weight
        assert tensor.ndim == weight.ndim, name
        side = 1 if ".lora_A." in name else 0
        assert tensor.shape[side] == weight.shape[side], name


def named_error(error: TrainerError, *words: str) -> None:
    assert all(word in error.problem for word in words), error.problem
    assert error.remedy.strip()


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "OFT", "full difference", "Tucker"])
def test_what_diffusers_has_no_format_for_is_refused_by_name(
    kind: str, bases: Mapping[str, BaseWeights], tmp_path: Path
) -> None:
    pattern = r"^lora_unet_.*conv1$" if kind == "Tucker" else ATTENTION
    adapter = random_adapter(bases["sd15"], kind, pattern)
    source, output = saved(adapter, tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    with pytest.raises(AdapterError) as raised:
        run_convert(ConvertCommand(lora=source, format="diffusers", output=output), Recorder())
    named_error(raised.value, next(iter(sorted(adapter.layers))).split("_")[1], "LoRA" if kind == "Tucker" else kind)
    assert not output.exists()


def test_what_is_partly_a_dora_is_refused_by_name(bases: Mapping[str, BaseWeights], tmp_path: Path) -> None:
    """PEFT has DoRA for a whole network or not at all, and would make up the missing lengths."""
    base = bases["sd15"]
    mixed = both(random_adapter(base, "DoRA", "attn1_to_q$"), random_adapter(base, "LoRA", "attn1_to_k$"))
    source, output = saved(mixed, tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    with pytest.raises(AdapterError) as raised:
        run_convert(ConvertCommand(lora=source, format="diffusers", output=output), Recorder())
    named_error(raised.value, "DoRA", "attn1_to_q", "attn1_to_k")
    assert not output.exists()


def test_biases_are_refused_by_name(bases: Mapping[str, BaseWeights], tmp_path: Path) -> None:
    name = "lora_unet_conv_in.diff_b"
    adapter = replace(random_adapter(bases["sd15"]), vectors={name: torch.ones(32)})
    source, output = saved(adapter, tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    with pytest.raises(AdapterError) as raised:
        run_convert(ConvertCommand(lora=source, format="diffusers", output=output), Recorder())
    named_error(raised.value, name)
    run_convert(ConvertCommand(lora=source, format="kohya", output=output), Recorder())
    assert torch.equal(read_adapter(output).vectors[name].float(), torch.ones(32))


def test_hashes_of_a_converted_file_are_its_own(bases: Mapping[str, BaseWeights], tmp_path: Path) -> None:
    """A hash in the header that is of another file misleads whoever looks it up."""
    source = saved(replace(random_adapter(bases["sd15"]), metadata={"ss_seed": "7"}), tmp_path / "in.safetensors")
    for style in ("kohya", "diffusers"):
        output = tmp_path / f"{style}.safetensors"
        run_convert(ConvertCommand(lora=source, format=style, output=output, save_precision="fp16"), Recorder())
        _, metadata = read_header(output)
        assert metadata["ss_seed"] == "7"
        expected = file_hashes(load_file(output), metadata)
        for key, value in zip(("sshs_model_hash", "sshs_legacy_hash"), expected, strict=True):
            assert metadata.get(key, value) == value, f"{style}: {key}"
        assert metadata.get("modelspec.hash_sha256", f"0x{expected[0]}") == f"0x{expected[0]}"


@pytest.mark.parametrize("where", ["file", "folder", "file alone"])
def test_a_peft_folder_becomes_a_kohya_file(where: str, bases: Mapping[str, BaseWeights], tmp_path: Path) -> None:
    """PEFT's alpha stands in its configuration; in a kohya file it stands beside the tensors."""
    adapter = random_adapter(bases["sd15"], pattern=ATTENTION, alpha=3.0)
    named = diffusers_state_dict(adapter, torch.float32)
    scaled = {
        f"base_model.model.{name.removeprefix('unet.')}": tensor / (3.0 / 3) if ".lora_B." in name else tensor
        for name, tensor in named.items()
    }
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(scaled, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}', encoding="utf-8")
    doubled = where != "file alone"  # which does not tell its alpha
    source = folder if where == "folder" else folder / "adapter_model.safetensors"
    if not doubled:
        (folder / "adapter_config.json").unlink()
    output = tmp_path / "out.safetensors"
    run_convert(ConvertCommand(lora=source, output=output, save_precision="fp32"), Recorder())
    weights = weights_of(bases["sd15"])
    expected = {name: tensor * (2 if doubled else 1) for name, tensor in deltas(adapter, weights).items()}
    assert same(deltas(read_adapter(output), weights), expected) < 1e-5


# Fusing


def vectors_of(base: BaseWeights) -> dict[str, Tensor]:
    """Changes of a bias and of the weight and bias of a norm, in the UNet and in a text encoder."""
    text = "lora_te1" if base.family.original_names else "lora_te"
    names = named_weights(base.family.build(base), biases=True)
    layer = next(name for name in names if "encoder_layers_0_layer_norm1" in name and not name.endswith(".bias"))
    assert layer.startswith(text)
    bias = next(name for name in names if "encoder_layers_0_self_attn_q_proj.bias" in name)
    norm = "lora_unet_out_0" if base.family.original_names else "lora_unet_conv_norm_out"
    return {
        f"{layer}.diff": torch.full(names[layer].shape, 0.2),
        f"{bias.removesuffix('.bias')}.diff_b": torch.full(names[bias].shape, -0.3),
        f"{norm}.diff": torch.full(names[norm].shape, 0.5),
        f"{norm}.diff_b": torch.full(names[norm].shape, 0.4),
    }


FUSED = {
    "LoRA of all": lambda base: random_adapter(base, "LoRA", r"^lora_"),
    "DoRA": lambda base: both(random_adapter(base, "DoRA", ATTENTION), random_adapter(base, "DoRA", TEXT)),
    "LoKr": lambda base: random_adapter(base, "LoKr", r"^lora_(unet.*conv1|unet.*attn|te.*self_attn)"),
    "OFT": lambda base: random_adapter(base, "OFT", r"^lora_(unet.*attn1|te.*mlp)"),
    "biases and norms": lambda base: replace(
        random_adapter(base, "LoRA", ATTENTION + "|self_attn_v_proj$"), vectors=vectors_of(base)
    ),
}


def assert_fused(source: dict[str, Tensor], result: dict[str, Tensor], changed: int) -> None:
    """The same names, types and shapes; that many tensors differ, all others are equal to the bit."""
    assert set(result) == set(source)
    assert {name: (one.dtype, one.shape) for name, one in result.items()} == {
        name: (one.dtype, one.shape) for name, one in source.items()
    }
    assert sum(not torch.equal(result[name], tensor) for name, tensor in source.items()) == changed


def touched(adapter: Adapter, base: BaseWeights, *, file: bool) -> int:
    """How many tensors an adapter changes; OpenCLIP's file holds queries, keys and values in one."""
    names = {f"{name}.weight" for name in adapter.layers}
    names |= {f"{k.rpartition('.')[0]}.{'bias' if k.endswith('_b') else 'weight'}" for k in adapter.vectors}
    open_clip = {"Stable Diffusion 1.x": "none", "Stable Diffusion 2.x": "lora_te_", "Stable Diffusion XL": "lora_te2_"}
    prefix = open_clip[base.family.title]
    if file:
        for part in "qkv":
            found = {name for name in names if name.startswith(prefix) and f"self_attn_{part}_proj" in name}
            names = names - found | {name.replace(f"self_attn_{part}_proj", "self_attn_in_proj") for name in found}
    return len(names)


FUSED_CASES = [(family, kind) for family in FAMILIES for kind in ("LoRA of all", "biases and norms")]
FUSED_CASES += [("sd15", "OFT"), ("sd2", "LoKr"), ("sd2", "DoRA"), ("sdxl", "DoRA")]


@pytest.mark.parametrize(
    ("family", "kind"), mostly_slow(FUSED_CASES, ("sd2", "LoKr"), ("sd2", "biases and norms"), ("sd15", "OFT"))
)
def test_a_fused_file_is_the_base_with_the_adapter(
    family: str, kind: str, files: Mapping[str, Path], bases: Mapping[str, BaseWeights], tmp_path: Path
) -> None:
    base = bases[family]
    adapter = FUSED[kind](base)
    output = tmp_path / "fused.safetensors"
    fuse(files[family], [(adapter, 0.8)], output)
    source, result = load_file(files[family]), load_file(output)
    assert_fused(source, result, touched(adapter, base, file=True))
    fused, expected = open_base(output, TOKENIZER), merged_model(base, (adapter, 0.8))
    assert same(parameters(fused.family.build(fused)), parameters(expected)) == 0
    drawn = predicts(expected)
    torch.testing.assert_close(predicts(fused.family.build(fused)), drawn, rtol=1e-4, atol=1e-4)
    assert (drawn - predicts(base.family.build(base))).abs().max() > 1e-2


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "sd2"))
def test_each_half_of_a_half_precision_file_keeps_its_type(family: str, tmp_path: Path) -> None:
    """As shared files mix them: a UNet in 16 bit beside text encoders in 32; two adapters at once."""
    tensors = state_dict(family)
    mixed = {name: one.half() if name.startswith("model.diffusion_model.") else one for name, one in tensors.items()}
    mixed["step"] = torch.tensor(7)
    path = tmp_path / "mixed.safetensors"
    save_file(mixed, path)
    base = open_base(path, TOKENIZER)
    first, second = random_adapter(base, pattern=r"^lora_"), random_adapter(base, "LoHa", ATTENTION, seed=3)
    output = tmp_path / "fused.safetensors"
    fuse(path, [(first, 0.5), (second, -1.0)], output)
    assert_fused(mixed, load_file(output), touched(first, base, file=True))
    fused, expected = open_base(output, TOKENIZER), merged_model(base, (first, 0.5), (second, -1.0))
    assert same(parameters(fused.family.build(fused)), parameters(expected)) == 0


@pytest.mark.parametrize("wrapped", mostly_slow([True, False], True), ids=["state_dict", "bare"])
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "sd2"))
def test_an_old_checkpoint_is_fused_too(family: str, wrapped: bool, tmp_path: Path) -> None:
    """As `.ckpt`, in 16 bit."""
    tensors = state_dict(family, dtype=torch.float16)
    path, output = tmp_path / "old.ckpt", tmp_path / "fused.safetensors"
    torch.save({"state_dict": tensors, "epoch": 3} if wrapped else tensors, path)
    before = path.read_bytes()
    base = open_base(path, TOKENIZER)
    adapter = random_adapter(base, pattern=r"^lora_")
    fuse(path, [(adapter, 1.0)], output)
    assert_fused(tensors, load_file(output), touched(adapter, base, file=True))
    fused = open_base(output, TOKENIZER)
    assert same(parameters(fused.family.build(fused)), parameters(merged_model(base, (adapter, 1.0)))) == 0
    assert path.read_bytes() == before


@pytest.mark.slow
def test_embeddings_that_a_model_can_not_hold_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state_dict("sd15"), path)
    adapter = random_adapter(open_base(path, TOKENIZER), pattern=r"mid_block.*attn1_to_q$")
    adapter = replace(adapter, embeddings={"bundle_emb.sks.string_to_param.*": torch.ones(1, 768)})
    fuse(path, [(adapter, 1.0)], tmp_path / "fused.safetensors")
    assert "Embeddings can't be fused into a model; these are left out: sks" in caplog.text


@pytest.mark.slow
def test_tensors_that_share_memory_in_an_old_checkpoint(tmp_path: Path) -> None:
    """A copy by another name that comes first in the file stays as it is."""
    tensors = state_dict("sd15")
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    row = torch.cat([tensors[name].flatten(), torch.zeros(50)])
    whole = {"model_ema.copy": row[: tensors[name].numel()].view_as(tensors[name])} | tensors
    whole[name] = row[: tensors[name].numel()].view_as(tensors[name])
    path, output = tmp_path / "old.ckpt", tmp_path / "fused.safetensors"
    torch.save(whole, path)
    base = open_base(path, TOKENIZER)
    adapter = random_adapter(base, pattern=r"mid_block.*attn1_to_q$")
    fuse(path, [(adapter, 1.0)], output)
    result = load_file(output)
    assert torch.equal(result["model_ema.copy"], whole["model_ema.copy"])
    fused = open_base(output, TOKENIZER)
    assert same(parameters(fused.family.build(fused)), parameters(merged_model(base, (adapter, 1.0)))) == 0


@pytest.mark.slow
def test_a_padded_tensor_in_an_old_checkpoint(tmp_path: Path) -> None:
    """Rows with gaps between them: a view that a program cut out of something wider and saved."""
    tensors = state_dict("sd15")
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    wide = torch.zeros(tensors[name].shape[0], tensors[name].shape[1] + 5)
    wide[:, : tensors[name].shape[1]] = tensors[name]
    tensors[name] = wide[:, : tensors[name].shape[1]]
    path, output = tmp_path / "old.ckpt", tmp_path / "fused.safetensors"
    torch.save(tensors, path)
    base = open_base(path, TOKENIZER)
    adapter = random_adapter(base, pattern=r"mid_block.*attn1_to_q$")
    fuse(path, [(adapter, 1.0)], output)
    fused = open_base(output, TOKENIZER)
    assert same(parameters(fused.family.build(fused)), parameters(merged_model(base, (adapter, 1.0)))) == 0


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "sd2"))
def test_a_fused_folder_is_the_base_with_the_adapter(family: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Configurations, tokenizers, scheduler and autoencoder come along; diffusers opens it, too."""
    from diffusers import DiffusionPipeline

    source, output = folders[family], tmp_path / "fused"
    base = open_base(source)
    adapter = FUSED["biases and norms"](base)
    fuse(source, [(adapter, 0.8)], output)

    def listed(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".safetensors"}

    assert listed(output) == listed(source)
    fused, expected = open_base(output), merged_model(base, (adapter, 0.8))
    assert same(parameters(fused.family.build(fused)), parameters(expected)) == 0
    torch.testing.assert_close(predicts(fused.family.build(fused)), predicts(expected), rtol=1e-4, atol=1e-4)
    assert {path.name: path.read_bytes() for path in (output / "vae").iterdir()} == {
        path.name: path.read_bytes() for path in (source / "vae").iterdir()
    }
    pipeline = DiffusionPipeline.from_pretrained(output)
    fresh = merged_model(base, (adapter, 0.8))
    for component, network in {"unet": fresh.denoiser, **fresh.text_encoders}.items():
        theirs = dict(getattr(pipeline, component).named_parameters())
        assert same(theirs, dict(network.named_parameters())) == 0
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if (source / component).is_dir():
            [before], [after] = (sorted((root / component).glob("*.safetensors")) for root in (source, output))
            assert set(load_file(after)) == set(load_file(before)), component
            assert after.name == before.name


def test_a_folder_of_shards_becomes_one_file(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """And the index goes, which would send readers to files that are not there."""
    import shutil

    source = tmp_path / "source"
    shutil.copytree(folders["sd2"], source)
    whole = source / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    parts = {1: names[::2], 2: names[1::2]}
    places = {}
    for number, part in parts.items():
        shard = whole.with_name(f"{whole.stem}-0000{number}-of-00002.safetensors")
        save_file({n: tensors[n] for n in part}, shard)
        places |= dict.fromkeys(part, shard.name)
    index = json.dumps({"metadata": {}, "weight_map": places})
    whole.with_suffix(".safetensors.index.json").write_text(index, encoding="utf-8")
    base = open_base(source)
    adapter = random_adapter(base, pattern=ATTENTION)
    fuse(source, [(adapter, 1.0)], tmp_path / "fused")
    assert [path.name for path in (tmp_path / "fused" / "unet").iterdir() if path.suffix != ".json"] == [whole.name]
    assert not (tmp_path / "fused" / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    fused = open_base(tmp_path / "fused")
    assert same(parameters(fused.family.build(fused)), parameters(merged_model(base, (adapter, 1.0)))) == 0
    assert (tmp_path / "fused" / "text_encoder" / "model.safetensors").exists()


@pytest.mark.slow
def test_existing_results_are_kept(files: Mapping[str, Path], bases: Mapping[str, BaseWeights], tmp_path: Path) -> None:
    """Files and folders alike."""
    lora = saved(random_adapter(bases["sd15"], pattern=ATTENTION), tmp_path / "a.safetensors")
    taken = tmp_path / "fused.safetensors"
    taken.write_bytes(b"mine")
    command = FuseCommand(base=files["sd15"], lora=(f"{lora}:0.5",), output=taken)
    assert [run_fuse(command, Recorder())[0].name for _ in range(2)] == ["fused-2.safetensors", "fused-3.safetensors"]
    assert taken.read_bytes() == b"mine"
    demo = saved(random_adapter(demo_base(), pattern="mid_block.*" + ATTENTION), tmp_path / "b.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "note").write_text("mine", encoding="utf-8")
    path, _ = run_fuse(FuseCommand(base=DEMO / "base", lora=(str(demo),), output=folder), Recorder())
    assert path.name == "folder-2"
    assert [one.name for one in folder.iterdir()] == ["note"]
    assert (path / "model_index.json").exists()


def test_a_folder_is_not_copied_into_itself(folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would go on until the disk is full."""
    import shutil

    source = folders["sd2"]
    lora = saved(random_adapter(open_base(source), pattern=ATTENTION), source.parent / "self.safetensors")

    def copied(start: Path, target: Path, **_: object) -> None:
        assert not Path(target).resolve().is_relative_to(Path(start).resolve()), "endless copy"

    monkeypatch.setattr(shutil, "copytree", copied)
    with pytest.raises(TrainerError):
        run_fuse(FuseCommand(base=source, lora=(str(lora),), output=source / "fused"), Recorder())


def test_an_adapter_of_another_family_is_refused_and_nothing_written(
    files: Mapping[str, Path], bases: Mapping[str, BaseWeights], tmp_path: Path
) -> None:
    stated: list[dict[str, str]] = [{}, STATED["sdxl"]]
    for metadata in stated:
        adapter = replace(random_adapter(bases["sdxl"], pattern=ATTENTION), metadata=metadata)
        with pytest.raises(AdapterError) as raised:
            fuse(files["sd15"], [(adapter, 1.0)], tmp_path / "fused.safetensors")
        named_error(raised.value, "Stable Diffusion 1.x" if metadata else "the model's")
    assert list(tmp_path.iterdir()) == []


# Extracting


def tuned_state(family: str, adapter: Adapter, base: BaseWeights, folder: Path, source: Path) -> Path:
    output = folder / f"tuned-{family}.safetensors"
    fuse(source, [(adapter, 1.0)], output)
    return output


def extracted(base: Path, tuned: Path, output: Path, **values: Any) -> tuple[Adapter, str]:
    given = {"device": "cpu", "save_precision": "fp32", **values}
    path, told = run_extract(ExtractCommand(base=base, tuned=tuned, output=output, **given), Recorder())
    return read_adapter(path), told


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "sd2"))
def test_a_known_change_is_extracted(
    family: str, files: Mapping[str, Path], bases: Mapping[str, BaseWeights], tmp_path: Path
) -> None:
    """Of exactly the layers that it was made of; ranks find themselves but for rounding of the sum W + Δ."""
    base = bases[family]
    adapter = both(random_adapter(base, pattern=UNET_ALL + ".*", rank=3), random_adapter(base, pattern=TEXT, rank=2))
    tuned = tuned_state(family, adapter, base, tmp_path, files[family])
    found, told = extracted(files[family], tuned, tmp_path / "found.safetensors", rank=0, energy=1 - 1e-9)
    weights = weights_of(base)
    assert set(found.layers) == set(adapter.layers)
    assert same(deltas(found, weights), deltas(adapter, weights)) < 1e-4
    ranks = {name: min(layer.rank, *weights[name].flatten(1).shape) for name, layer in adapter.layers.items()}
    assert {name: layer.rank for name, layer in found.layers.items()} == ranks
    assert {layer.kind for layer in found.layers.values()} == {"LoRA"}
    assert all(layer.alpha == layer.rank for layer in found.layers.values())
    assert found.metadata["ss_base_model_version"] == STATED[family]["ss_base_model_version"]
    assert found.metadata["modelspec.architecture"] == STATED[family]["modelspec.architecture"]
    assert f"{len(adapter.layers)} modules" in told
    assert torch.allclose(
        predicts(merged_model(base, (found, 1.0))), predicts(merged_model(base, (adapter, 1.0))), atol=1e-4
    )


@pytest.mark.slow
def test_energy_one_keeps_everything(
    files: Mapping[str, Path], bases: Mapping[str, BaseWeights], tmp_path: Path
) -> None:
    base = bases["sd15"]
    adapter = random_adapter(base, "full difference", r"^lora_unet_.*(attn|conv1)")
    tuned = tuned_state("sd15", adapter, base, tmp_path, files["sd15"])
    weights = weights_of(base)
    found, _ = extracted(files["sd15"], tuned, tmp_path / "found.safetensors", rank=0)
    assert same(deltas(found, weights), deltas(adapter, weights)) < 1e-5
    limited, _ = extracted(files["sd15"], tuned, tmp_path / "limited.safetensors", rank=4, conv_rank=2)
    for name, layer in limited.layers.items():
        large = weights[name].ndim == 4 and weights[name].shape[-1] == 3
        rank = 2 if large else 4
        change = deltas(adapter, weights)[name].flatten(1).double().numpy()
        left_out = np.linalg.svd(change, compute_uv=False)[rank:]
        assert layer.rank == rank
        error = np.linalg.norm(layer.delta().flatten(1).double().numpy() - change)
        assert error == pytest.approx(np.linalg.norm(left_out), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_file_and_a_folder_are_the_same_model(family: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    """A LoRA is extracted from a tuned folder and the base's file, and the other way round."""
    from checkpoints import sd2_state_dict

    tensors = sd2_state_dict("tiny") if family == "sd2" else sdxl_state_dict(XL)
    file = tmp_path / "base.safetensors"
    save_file(tensors, file)
    base = open_base(file, TOKENIZER)
    adapter = both(random_adapter(base, pattern=UNET_LINEAR), random_adapter(base, pattern=TEXT))
    fuse(folders[family], [(adapter, 1.0)], tmp_path / "tuned")
    fuse(file, [(adapter, 1.0)], tmp_path / "tuned.safetensors")
    weights = weights_of(base)
    for first, second in ((file, tmp_path / "tuned"), (folders[family], tmp_path / "tuned.safetensors")):
        found, _ = extracted(first, second, tmp_path / "found.safetensors", rank=8)
        assert set(found.layers) == set(adapter.layers)
        assert same(deltas(found, weights), deltas(adapter, weights)) < 1e-4
    with pytest.raises(AdapterError, match="do not differ"):
        extracted(file, folders[family], tmp_path / "found.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "biases"), [(torch.float16, True), (torch.bfloat16, False)], ids=str)
def test_the_rounding_to_another_type_is_no_change(dtype: torch.dtype, biases: bool, tmp_path: Path) -> None:
    """Only what was tuned is extracted from a 32 bit base and a 16 bit model, and the other way round."""
    tensors = state_dict("sd15")
    change = torch.randn(64, 64, generator=torch.Generator().manual_seed(4)) * 0.03
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    tuned = {**tensors, key: tensors[key] + change}
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"

    def plain(given: dict[str, Tensor], to: torch.dtype) -> dict[str, Tensor]:
        return {name: one.to(to) if one.is_floating_point() else one for name, one in given.items()}

    for first, second in ((torch.float32, dtype), (dtype, torch.float32)):
        save_file(plain(tensors, first), tmp_path / "base.safetensors")
        save_file(plain(tuned, second), tmp_path / "tuned.safetensors")
        save_file(plain(tensors, second), tmp_path / "same.safetensors")
        found, _ = extracted(
            tmp_path / "base.safetensors",
            tmp_path / "tuned.safetensors",
            tmp_path / "found.safetensors",
            rank=0,
            biases=biases,
        )
        assert set(found.layers) == {name}
        assert found.vectors == {}
        assert float((found.layers[name].delta() - change).norm() / change.norm()) < 0.1
        with pytest.raises(AdapterError, match="do not differ"):
            extracted(tmp_path / "base.safetensors", tmp_path / "same.safetensors", tmp_path / "none.safetensors")


@pytest.mark.parametrize("biases", [False, True])
def test_rounding_of_numbers_too_small_for_half_precision_is_no_change(biases: bool) -> None:
    """Below 6e-5 half precision has steps of 6e-8: the rounding is larger than a share of the number."""
    source = torch.Generator().manual_seed(3)
    weights = {
        "lora_unet_a": torch.randn(16, 16, generator=source),
        "lora_unet_b": torch.randn(16, 16, generator=source) * 1e-6,
        "lora_unet_c.bias": torch.randn(16, generator=source) * 1e-6,
        "lora_unet_d": torch.randn(16, generator=source) * 1e-6,
    }
    tuned = {name: tensor.half() for name, tensor in weights.items()}
    tuned["lora_unet_a"] = (weights["lora_unet_a"] * 1.5).half()
    found = extract_between(weights, tuned, ExtractSettings(biases=biases)).adapter
    assert set(found.layers) == {"lora_unet_a"}
    assert found.vectors == {}


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "sd2"))
def test_biases_and_norms_are_extracted_if_asked_for(
    family: str, files: Mapping[str, Path], bases: Mapping[str, BaseWeights], tmp_path: Path
) -> None:
    base = bases[family]
    assert_biases_come_back(base, files[family], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "tiny-koala1b"])
def test_biases_of_smaller_sdxls_are_extracted(size: str, tmp_path: Path) -> None:
    """Some have one residual block a level where SDXL has two, which the names of the original code count."""
    path = tmp_path / "base.safetensors"
    save_file(sdxl_state_dict(size), path)
    assert_biases_come_back(open_base(path, TOKENIZER), path, tmp_path)


def assert_biases_come_back(base: BaseWeights, file: Path, folder: Path) -> None:
    """All biases and norms changed, each differently: extracted, they make the base the tuned model."""
    tensors = load_file(file)
    source = torch.Generator().manual_seed(8)
    tuned = {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=source)
        if tensor.is_floating_point() and tensor.ndim == 1 and tensor.numel() and "first_stage" not in name
        else tensor
        for name, tensor in tensors.items()
    }
    key = next(name for name in tensors if name.endswith("attn1.to_q.weight"))
    tuned[key] = tuned[key] + 0.1
    save_file(tuned, folder / "tuned.safetensors")
    with_them, _ = extracted(file, folder / "tuned.safetensors", folder / "b.safetensors", biases=True)
    without, _ = extracted(file, folder / "tuned.safetensors", folder / "n.safetensors")
    assert without.vectors == {}
    assert len(without.layers) == len(with_them.layers) == 1
    target = open_base(folder / "tuned.safetensors", TOKENIZER)
    expected = parameters(target.family.build(target))
    assert same(parameters(merged_model(base, (with_them, 1.0))), expected) < 1e-5


@pytest.mark.slow
def test_models_that_cannot_be_compared_are_named(files: Mapping[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    with pytest.raises(SettingsError) as raised:
        extracted(files["sd15"], files["sdxl"], output)
    named_error(raised.value, "Stable Diffusion 1.x", "Stable Diffusion XL", "sdxl.safetensors", "sd15.safetensors")
    with pytest.raises(AdapterError) as equal:
        extracted(files["sd15"], files["sd15"], output)
    named_error(equal.value, "do not differ")
    other = tmp_path / "other.safetensors"
    save_file(sdxl_state_dict("tiny"), other)
    with pytest.raises(AdapterError) as shape:
        extracted(files["sdxl"], other, output)
    named_error(shape.value, "different layers", "lora_")
    assert not output.exists()


def test_extraction_can_be_stopped_and_tells_its_progress() -> None:
    weights = {f"lora_unet_{n}": torch.randn(4, 4) for n in range(40)}
    tuned = {name: tensor + 1 for name, tensor in weights.items()}
    with pytest.raises(CancelledError):
        extract_between(weights, tuned, ExtractSettings(), listener=Recorder(stop_after=2))
    listener = Recorder()
    extract_between(weights, tuned, ExtractSettings(), listener=listener)
    assert [(event.done, event.total) for event in listener.events] == [(0, 40), (16, 40), (32, 40), (40, 40)]


# Resizing


def spectrum(layer: LoraLayer) -> np.ndarray[Any, Any]:
    return np.linalg.svd(layer.delta().flatten(1).double().numpy(), compute_uv=False)


def expected_rank(values: np.ndarray[Any, Any], rank: int, energy: float, ratio: float) -> int:
    """By the definitions in the help texts."""
    count = int((values > values[0] * 1e-6).sum())
    if energy < 1:
        shares = np.cumsum(values**2) / np.sum(values**2)
        count = min(count, int(np.argmax(shares >= energy)) + 1)
    if ratio:
        count = min(count, int((values[0] / values[:count] <= ratio).sum()))
    return min(count, rank or count)


@pytest.mark.parametrize(
    "limits",
    [
        {"rank": 3},
        {"rank": 0},
        {"rank": 5, "conv_rank": 2},
        {"rank": 0, "conv_rank": 1},
        {"rank": 0, "energy": 0.7},
        {"rank": 4, "energy": 0.95},
        {"rank": 0, "ratio": 1.5},
        {"rank": 6, "ratio": 3.0, "energy": 0.9, "conv_rank": 3},
    ],
    ids=str,
)
def test_resizing_is_the_truncated_decomposition(limits: dict[str, Any]) -> None:
    shapes = {
        "lora_unet_mid_block_attentions_0_proj_in": (12, 20),
        "lora_unet_down_blocks_0_resnets_0_conv1": (12, 20, 3, 3),
        "lora_unet_down_blocks_0_resnets_0_conv_shortcut": (12, 20, 1, 1),
    }
    adapter = adapter_of({name: tensors_of("LoRA", shape, 3, rank=8) for name, shape in shapes.items()})
    result = resize(WeightedAdapter(adapter, "a"), TruncationSettings.checked(limits)).adapter
    asked = {"rank": 32, "energy": 1.0, "ratio": 0.0, **limits}
    for name, shape in shapes.items():
        before, after = adapter.layers[name], result.layers[name]
        assert isinstance(before, LoraLayer)
        assert isinstance(after, LoraLayer)
        conv = len(shape) == 4 and shape[-1] == 3
        rank = (conv and limits.get("conv_rank")) or asked["rank"]
        left, values, right = np.linalg.svd(before.delta().flatten(1).double().numpy(), full_matrices=False)
        count = expected_rank(values, rank, asked["energy"], asked["ratio"])
        assert after.rank == count
        assert after.alpha == count
        assert after.shape == shape
        nearest = (left[:, :count] * values[:count]) @ right[:count]
        assert np.linalg.norm(after.delta().flatten(1).numpy() - nearest) < 1e-5 * np.linalg.norm(nearest)
        np.testing.assert_allclose(spectrum(after)[:count], values[:count], rtol=1e-4)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "Tucker", "full difference", "OFT", "DoRA"])
def test_any_kind_becomes_a_lora(kind: str, bases: Mapping[str, BaseWeights], tmp_path: Path) -> None:
    """Without a limit of the rank it adds the same, so that diffusers can have it."""
    base = bases["sd15"]
    pattern = r"^lora_unet_.*conv1$" if kind == "Tucker" else rf"conv1$|{ATTENTION}"
    adapter = random_adapter(base, kind, pattern)
    source = saved(adapter, tmp_path / "in.safetensors")
    needs = kind in ("OFT", "DoRA")
    values = {"lora": source, "output": tmp_path / "out.safetensors", "device": "cpu", "save_precision": "fp32"}
    if needs:
        with pytest.raises(AdapterError) as raised:
            run_resize(ResizeCommand(**values, rank=0), Recorder())
        named_error(raised.value, kind, "in", "lora_unet")
        assert "--base" in raised.value.remedy_in(lambda setting, value: f"--{setting}")
        file = tmp_path / "base" / "sd15.safetensors"
        values["base"] = checkpoint(file.parent, "sd15")
    path, told = run_resize(ResizeCommand(**values, rank=0), Recorder())
    result, weights = read_adapter(path), weights_of(base)
    assert {layer.kind for layer in result.layers.values()} == {"LoRA"}
    assert same(deltas(result, weights), deltas(adapter, weights)) < 1e-4
    write_diffusers(tmp_path / "diffusers.safetensors", result, torch.float32)
    assert same(deltas(read_adapter(tmp_path / "diffusers.safetensors"), weights), deltas(adapter, weights)) < 1e-4
    assert f"{len(adapter.layers)} modules" in told


# Names of smaller SDXLs


@pytest.mark.parametrize("size", mostly_slow(["tiny-koala1b", "tiny-koala700m", "tiny-ssd1b"], "tiny-koala1b"))
def test_tools_keep_the_names_of_smaller_sdxls(size: str, tmp_path: Path) -> None:
    """The original code numbers blocks by the residual blocks a level, of which some have one and some two."""
    path = tmp_path / "base.safetensors"
    save_file(sdxl_state_dict(SDXL_SHAPES[size]), path)
    base = open_base(path, TOKENIZER)
    adapter = random_adapter(base, pattern=r"^lora_unet_(input|middle|output)")
    result = resize(WeightedAdapter(adapter, "a"), TruncationSettings(rank=0)).adapter
    assert set(result.layers) == set(adapter.layers)
    assert set(to_kohya_format(adapter).layers) == set(adapter.layers)
    weights = weights_of(base)
    assert same(deltas(result, weights), deltas(adapter, weights)) < 1e-4


@pytest.mark.parametrize("size", mostly_slow(["tiny-koala1b", "tiny-ssd1b"], "tiny-koala1b"))
@pytest.mark.parametrize("pattern", ["^lora_unet_(input|middle|output)", "^lora_unet_.*attn"], ids=["all", "attention"])
def test_names_of_diffusers_of_smaller_sdxls(size: str, pattern: str, tmp_path: Path) -> None:
    """Every tensor belongs to a module of its own shape."""
    path = tmp_path / "base.safetensors"
    save_file(sdxl_state_dict(SDXL_SHAPES[size]), path)
    base = open_base(path, TOKENIZER)
    unet = base.family.build(base).denoiser
    for name, tensor in diffusers_state_dict(random_adapter(base, pattern=pattern), torch.float32).items():
        weight = unet.get_submodule(name.removeprefix("unet.").partition(".lora_")[0]).weight
        side = 1 if ".lora_A." in name else 0
        assert tensor.shape[side] == weight.shape[side], name
