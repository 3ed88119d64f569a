"""Base weights through one door: borrowed without a copy, understood from their shapes, and never written to."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from checkpoints import (
    CLIP_PREFIX,
    SHAPES,
    UNET_PREFIX,
    VAE_PREFIX,
    Entry,
    clip_shapes,
    sd15_checkpoint,
    sd15_state_dict,
    unet_shapes,
    vae_shapes,
)
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from helpers import DEMO, TINY, Recorder
from pack.trainer.adapters.kohya import Adapter, LoraLayer, write_adapter
from pack.trainer.core.errors import SettingsError, TrainerError, WeightsError
from pack.trainer.data.images import load_pictures
from pack.trainer.dreambooth import train
from pack.trainer.models.families import identify
from pack.trainer.models.families.base import CHOSEN, BaseWeights, DiffusionModel, Prediction
from pack.trainer.models.families.clip import text_component
from pack.trainer.models.families.ldm import unet_component, unet_config, vae_component, with_prefix
from pack.trainer.models.open import HostTensors, open_base
from pack.trainer.models.tokenizer import load_tokenizer
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.runs.folder import RunPaths
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SD15_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SLIM_UNET = SD15_UNET | {
    "block_out_channels": (320, 640),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.18215,
}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}


def on_meta(entries: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    entry: Entry
    for entry in entries:
        found[entry[0]] = torch.empty(entry[1], device="meta")
    return found


def host_tensors(weights: Mapping[str, Tensor]) -> HostTensors:
    """A checkpoint's tensors as a host lends them."""
    return HostTensors(
        denoiser=with_prefix(weights, UNET_PREFIX),
        vae=with_prefix(weights, VAE_PREFIX),
        text_encoders={"clip_l": with_prefix(weights, CLIP_PREFIX)},
        tokenizers={"clip_l": load_tokenizer(DEMO / "base" / "tokenizer")},
        title="lent",
    )


def digest(weights: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in weights.items()}


def networks(model: DiffusionModel) -> dict[str, nn.Module]:
    return {"unet": model.denoiser, "vae": model.vae, **model.text_encoders}


def built(source: Path | HostTensors) -> DiffusionModel:
    base = open_base(source)
    return base.family.build(base)


def in_float32(model: DiffusionModel) -> DiffusionModel:
    for network in networks(model).values():
        nn.Module.float(network)
    return model


def outputs(base: BaseWeights) -> dict[str, Tensor]:
    """What the three networks compute from fixed inputs."""
    model = in_float32(base.family.build(base))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((2, 4, 8, 8), generator=generator)
    picture = torch.rand((1, 3, 64, 64), generator=generator) * 2 - 1
    with torch.no_grad():
        text = model.encode_prompts(["a photo of sks dog", "a red cat"])
        return {
            "text": text["text"],
            "prediction": model.predict(latents, torch.tensor([5, 900]), text),
            "latents": model.vae.encode(picture).latent_dist.mean * model.vae.config.scaling_factor,
            "pixels": model.vae.decode(latents).sample,
        }


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A tiny checkpoint in memory. Not to be changed."""
    return sd15_state_dict(TINY)


@pytest.fixture(scope="module")
def diffusers_folder(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, written by diffusers' and transformers' own classes with settings written down here."""
    folder = tmp_path_factory.mktemp("diffusers layout")
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=234,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=32,
            hidden_act="quick_gelu",
            bos_token_id=232,
            eos_token_id=233,
            pad_token_id=233,
        )
    )
    fill(unet, {diffusers_unet_name(name): t for name, t in with_prefix(weights, UNET_PREFIX).items()})
    fill(vae, {diffusers_vae_name(name): t for name, t in with_prefix(weights, VAE_PREFIX).items()})
    named = {n: t for n, t in with_prefix(weights, CLIP_PREFIX).items() if not n.endswith("position_ids")}
    bare = not any(name.startswith("text_model.") for name in text.state_dict())
    fill(text, {name.removeprefix("text_model.") if bare else name: t for name, t in named.items()})
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    unet.register_to_config(sample_size=64)  # which diffusers 0.31 insists on
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(DEMO / "base" / "tokenizer", local_files_only=True),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    shutil.copytree(DEMO / "base" / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    return folder


def fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads every tensor; attention projections of a VAE lose the two sides of length one."""
    own = {n: t for n, t in network.state_dict().items() if not n.endswith("position_ids")}
    assert set(own) == set(tensors)
    network.load_state_dict({name: tensor.reshape(own[name].shape) for name, tensor in tensors.items()}, strict=False)


def diffusers_unet_name(name: str) -> str:
    """The tiny UNet's original names, by hand: two levels of one residual block each, attention in both."""
    blocks = {
        "time_embed.0.": "time_embedding.linear_1.",
        "time_embed.2.": "time_embedding.linear_2.",
        "input_blocks.0.0.": "conv_in.",
        "input_blocks.1.0.": "down_blocks.0.resnets.0.",
        "input_blocks.1.1.": "down_blocks.0.attentions.0.",
        "input_blocks.2.0.op.": "down_blocks.0.downsamplers.0.conv.",
        "input_blocks.3.0.": "down_blocks.1.resnets.0.",
        "input_blocks.3.1.": "down_blocks.1.attentions.0.",
        "middle_block.0.": "mid_block.resnets.0.",
        "middle_block.1.": "mid_block.attentions.0.",
        "middle_block.2.": "mid_block.resnets.1.",
        "output_blocks.0.0.": "up_blocks.0.resnets.0.",
        "output_blocks.0.1.": "up_blocks.0.attentions.0.",
        "output_blocks.1.0.": "up_blocks.0.resnets.1.",
        "output_blocks.1.1.": "up_blocks.0.attentions.1.",
        "output_blocks.1.2.": "up_blocks.0.upsamplers.0.",
        "output_blocks.2.0.": "up_blocks.1.resnets.0.",
        "output_blocks.2.1.": "up_blocks.1.attentions.0.",
        "output_blocks.3.0.": "up_blocks.1.resnets.1.",
        "output_blocks.3.1.": "up_blocks.1.attentions.1.",
        "out.0.": "conv_norm_out.",
        "out.2.": "conv_out.",
    }
    return _resnet(next(new + name.removeprefix(old) for old, new in blocks.items() if name.startswith(old)))


def _resnet(name: str) -> str:
    parts = {
        ".in_layers.0.": ".norm1.",
        ".in_layers.2.": ".conv1.",
        ".emb_layers.1.": ".time_emb_proj.",
        ".out_layers.0.": ".norm2.",
        ".out_layers.3.": ".conv2.",
        ".skip_connection.": ".conv_shortcut.",
        ".nin_shortcut.": ".conv_shortcut.",
    }
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def diffusers_vae_name(name: str) -> str:
    """The tiny VAE's original names, by hand: four levels of one residual block (two in the decoder)."""
    for level in range(4):
        name = name.replace(f"encoder.down.{level}.block.", f"encoder.down_blocks.{level}.resnets.")
        name = name.replace(f"encoder.down.{level}.downsample.", f"encoder.down_blocks.{level}.downsamplers.0.")
        name = name.replace(f"decoder.up.{level}.block.", f"decoder.up_blocks.{3 - level}.resnets.")
        name = name.replace(f"decoder.up.{level}.upsample.", f"decoder.up_blocks.{3 - level}.upsamplers.0.")
    others = {
        ".norm_out.": ".conv_norm_out.",
        ".mid.block_1.": ".mid_block.resnets.0.",
        ".mid.block_2.": ".mid_block.resnets.1.",
        ".mid.attn_1.norm.": ".mid_block.attentions.0.group_norm.",
        ".mid.attn_1.q.": ".mid_block.attentions.0.to_q.",
        ".mid.attn_1.k.": ".mid_block.attentions.0.to_k.",
        ".mid.attn_1.v.": ".mid_block.attentions.0.to_v.",
        ".mid.attn_1.proj_out.": ".mid_block.attentions.0.to_out.0.",
    }
    for old, new in others.items():
        name = name.replace(old, new)
    return _resnet(name)


# Borrowing


@pytest.mark.parametrize("inference", mostly_slow([False, True], True), ids=["ordinary tensors", "inference tensors"])
def test_training_leaves_lent_weights_alone(
    inference: bool, picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with torch.inference_mode(inference):
        lent = {name: tensor.clone() for name, tensor in sd15_state_dict(TINY).items()}
    assert next(iter(lent.values())).is_inference() == inference
    before, places = digest(lent), {name: tensor.data_ptr() for name, tensor in lent.items()}
    pictures = load_pictures(picture_folder(), "a photo of sks dog", Recorder())
    settings = TrainSettings(steps=2, rank=4, resolution=64, learning_rate=0.1, targets="attention-mlp")
    base = open_base(host_tensors(lent))
    result = train(base, pictures, [], settings, RunPaths(tmp_path / "loras", tmp_path / "runs"), "cpu", Recorder())
    assert max(layer.up.abs().max() for layer in result.adapter.layers.values()) > 0.01
    assert digest(lent) == before
    assert {name: tensor.data_ptr() for name, tensor in lent.items()} == places
    assert not any(tensor.requires_grad for tensor in lent.values())
    train(
        base,
        pictures,
        [],
        settings.model_copy(update={"precision": "bf16", "steps": 1}),
        RunPaths(tmp_path, tmp_path / "runs"),
        "cpu",
    )
    assert digest(lent) == before


def test_built_networks_share_the_lent_storage(weights: dict[str, Tensor]) -> None:
    base = open_base(host_tensors(weights))
    model = base.family.build(base)
    lent = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    for name, network in networks(model).items():
        used = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        assert used <= lent, name
        assert len(used) == len(list(network.parameters()))


def test_a_second_model_of_the_same_base_is_independent(weights: dict[str, Tensor]) -> None:
    base = open_base(host_tensors(weights))
    first, second = base.family.build(base), base.family.build(base)
    nn.Module.half(first.denoiser)
    assert {p.dtype for p in second.denoiser.parameters()} == {torch.float32}
    assert {t.dtype for n, t in weights.items() if not n.endswith("position_ids")} == {torch.float32}


def test_no_weight_is_left_unused(weights: dict[str, Tensor]) -> None:
    """Every tensor of the checkpoint lies in one of the networks, and every place of the networks is filled."""
    base = open_base(host_tensors(weights))
    model = base.family.build(base)
    placed = set()
    for network in networks(model).values():
        for tensor in [*network.parameters(), *network.buffers()]:
            assert not tensor.is_meta
            placed.add(tensor.untyped_storage().data_ptr())
    unused = [n for n, t in weights.items() if t.untyped_storage().data_ptr() not in placed]
    assert unused == [f"{CLIP_PREFIX}text_model.embeddings.position_ids"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("middle_block.1.transformer_blocks.0.attn1.to_q.bias", "middle_block.1.transformer_blocks.0.attn1.to_q.bias"),
        ("input_blocks.1.0.out_layers.9.weight", "input_blocks.1.0.out_layers.9.weight"),
        # the first weight of a deeper transformer, the rest of which is missing then
        ("input_blocks.1.1.transformer_blocks.1.attn1.to_q.weight", "down_blocks.0.attentions.0.transformer_blocks.1."),
    ],
)
def test_an_unknown_weight_of_the_unet_is_not_dropped_silently(
    name: str, told: str, weights: dict[str, Tensor]
) -> None:
    """It belongs to a network of another kind, which would be trained without it."""
    with pytest.raises(WeightsError) as caught:
        built(host_tensors({**weights, UNET_PREFIX + name: torch.zeros(4)}))
    assert told in caught.value.problem


@pytest.mark.parametrize(
    "name",
    [
        f"{UNET_PREFIX}input_blocks.0.0.weight",
        f"{UNET_PREFIX}out.0.bias",
        f"{UNET_PREFIX}middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        f"{UNET_PREFIX}output_blocks.1.0.in_layers.2.weight",
        f"{VAE_PREFIX}decoder.conv_out.weight",
        f"{VAE_PREFIX}encoder.down.0.block.0.conv1.weight",
        f"{CLIP_PREFIX}text_model.final_layer_norm.bias",
        f"{CLIP_PREFIX}text_model.encoder.layers.0.mlp.fc1.weight",
    ],
)
@pytest.mark.parametrize("wrong", ["missing", "of another shape"])
def test_an_incomplete_checkpoint_is_refused(name: str, wrong: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    changed = {n: t for n, t in weights.items() if n != name}
    if wrong != "missing":
        changed[name] = torch.zeros([size + 1 for size in weights[name].shape])
    with pytest.raises(TrainerError):
        built(host_tensors(changed))


# One model, many forms


@pytest.fixture(scope="module")
def single_file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single file")
    shutil.copytree(DEMO / "base" / "tokenizer", folder / "tokenizer")
    save_file(weights, folder / "model.safetensors")
    return folder / "model.safetensors"


def pickled(single_file: Path, folder: Path, content: Any) -> BaseWeights:
    path = folder / "model.ckpt"
    torch.save(content, path)
    return open_base(path, single_file.parent / "tokenizer")


@pytest.mark.slow
def test_forms_of_one_model_are_one_model(
    weights: dict[str, Tensor], single_file: Path, diffusers_folder: Path, tmp_path: Path
) -> None:
    forms = {
        "single file": open_base(single_file),
        "host's tensors": open_base(host_tensors(weights)),
        "diffusers folder": open_base(diffusers_folder),
        "pickled": pickled(single_file, tmp_path, {"state_dict": dict(weights), "epoch": 3}),
        "pickled without a level": pickled(single_file, tmp_path, dict(weights)),
    }
    assert len({base.fingerprint for base in forms.values()}) == 1
    expected = outputs(forms["single file"])
    for name, base in forms.items():
        for what, tensor in outputs(base).items():
            torch.testing.assert_close(tensor, expected[what], rtol=0, atol=1e-5, msg=f"{name}: {what}")


def test_diffusers_itself_computes_the_same(diffusers_folder: Path, single_file: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(diffusers_folder, local_files_only=True)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((2, 4, 8, 8), generator=generator)
    picture = torch.rand((1, 3, 64, 64), generator=generator) * 2 - 1
    ids = pipe.tokenizer(
        ["a photo of sks dog", "a red cat"], padding="max_length", max_length=32, return_tensors="pt"
    ).input_ids
    ours = outputs(open_base(single_file))
    with torch.no_grad():
        text = pipe.text_encoder(ids)[0]
        expected = {
            "text": text,
            "prediction": pipe.unet(latents, torch.tensor([5, 900]), text).sample,
            "latents": pipe.vae.encode(picture).latent_dist.mean * pipe.vae.config.scaling_factor,
            "pixels": pipe.vae.decode(latents).sample,
        }
    for what, tensor in expected.items():
        torch.testing.assert_close(ours[what], tensor, rtol=0, atol=1e-5, msg=what)


def test_half_precision_file_and_its_upcast_have_one_fingerprint(tmp_path: Path) -> None:
    path = sd15_checkpoint(tmp_path / "half.safetensors", size=TINY, dtype=torch.float16)
    upcast = {n: t.float() for n, t in load_file(path).items()}
    half = open_base(path, DEMO / "base" / "tokenizer")
    assert half.fingerprint == open_base(host_tensors(upcast)).fingerprint
    assert half.fingerprint != open_base(host_tensors(sd15_state_dict(TINY))).fingerprint


@pytest.mark.parametrize(
    "name",
    [
        f"{UNET_PREFIX}middle_block.1.transformer_blocks.0.attn1.to_q.weight",
        f"{VAE_PREFIX}quant_conv.bias",
        f"{CLIP_PREFIX}text_model.embeddings.token_embedding.weight",
    ],
)
def test_a_retrained_weight_changes_the_fingerprint(name: str, weights: dict[str, Tensor]) -> None:
    noise = 1e-3 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(1))
    changed = {**weights, name: weights[name] + noise}
    assert open_base(host_tensors(changed)).fingerprint != open_base(host_tensors(weights)).fingerprint


def edit(folder: Path, file: str, **changes: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("vae/config.json", {"scaling_factor": 0.5}),
        ("unet/config.json", {"attention_head_dim": 4}),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}),
        ("text_encoder/config.json", {"hidden_act": "gelu"}),
    ],
    ids=lambda value: str(value),
)
def test_settings_that_change_what_is_computed_change_the_fingerprint(
    file: str, changes: dict[str, Any], diffusers_folder: Path, tmp_path: Path
) -> None:
    """Otherwise a finished run of another model would be taken for this one's."""
    folder = shutil.copytree(diffusers_folder, tmp_path / "copy")
    edit(folder, file, **changes)
    assert open_base(folder).fingerprint != open_base(diffusers_folder).fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_end": 0.02},
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.001 * i for i in range(1, 1001)]},
        {"rescale_betas_zero_snr": True},
        {"num_train_timesteps": 500},
    ],
    ids=lambda value: next(iter(value)),
)
def test_the_folders_noise_schedule_is_used_or_refused(
    changes: dict[str, Any], diffusers_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(diffusers_folder, tmp_path / "copy")
    edit(folder, "scheduler/scheduler_config.json", **changes)
    try:
        alphas_cumprod = built(folder).objective.alphas_cumprod
    except WeightsError as error:
        assert next(iter(changes)) in str(error)  # noqa: PT017
        return
    expected = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
    torch.testing.assert_close(alphas_cumprod, expected)


def test_the_schedulers_class_does_not_matter(diffusers_folder: Path, tmp_path: Path) -> None:
    """Published SD 1.5 folders hold a PNDM scheduler; only its noise schedule counts."""
    folder = shutil.copytree(diffusers_folder, tmp_path / "copy")
    pndm = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pndm.save_pretrained(folder / "scheduler")
    first, second = open_base(folder), open_base(diffusers_folder)
    assert first.fingerprint == second.fingerprint
    schedules = [base.family.build(base).objective.alphas_cumprod for base in (first, second)]
    assert torch.equal(*schedules)


@pytest.mark.parametrize("files", [("tokenizer.json",), ("vocab.json", "merges.txt")], ids=str)
def test_tokenizer_folders_of_old_and_new_transformers(
    files: tuple[str, ...], single_file: Path, tmp_path: Path
) -> None:
    """transformers 5 saves tokenizer.json alone, older ones vocab.json and merges.txt."""
    folder = tokenizer_folder(tmp_path / "tokenizer")
    kept = {*files, "tokenizer_config.json", "special_tokens_map.json"}
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()
    assert {file.name for file in folder.iterdir()} >= set(files)
    expected = CLIPTokenizer.from_pretrained(DEMO / "base" / "tokenizer", local_files_only=True)
    prompt = "a photo of sks dog, in the snow"
    assert open_base(single_file, folder).tokenizers[0](prompt).input_ids == expected(prompt).input_ids


@pytest.mark.parametrize(
    ("changes", "kind", "zero_terminal_snr"),
    [
        ({}, "epsilon", False),
        ({"prediction_type": "v_prediction"}, "v_prediction", False),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "v_prediction", True),
    ],
    ids=["epsilon", "velocity", "velocity, zero terminal SNR"],
)
def test_a_folder_says_what_it_predicts(
    changes: dict[str, Any], kind: str, zero_terminal_snr: bool, diffusers_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(diffusers_folder, tmp_path / "copy")
    edit(folder, "scheduler/scheduler_config.json", **changes)
    base = open_base(folder)
    assert (base.prediction.type, base.prediction.zero_terminal_snr) == (kind, zero_terminal_snr)
    assert "scheduler" in base.prediction.source
    objective = base.family.build(base).objective
    assert objective.prediction_type == kind
    assert (float(objective.alphas_cumprod[-1]) < 1e-9) == zero_terminal_snr
    assert (base.fingerprint != open_base(diffusers_folder).fingerprint) == bool(changes)


def test_a_folder_that_predicts_something_else_is_refused(diffusers_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(diffusers_folder, tmp_path / "copy")
    edit(folder, "scheduler/scheduler_config.json", prediction_type="sample")
    with pytest.raises(WeightsError, match="sample") as caught:
        open_base(folder)
    assert "epsilon" in caught.value.remedy


# What the user says about a base model


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_chosen_prediction_wins(kind: Any, single_file: Path) -> None:
    base = open_base(single_file, prediction_type=kind)
    assert (base.prediction.type, base.prediction.source) == (kind, CHOSEN)
    assert base.family.build(base).objective.prediction_type == kind
    assert (base.fingerprint == open_base(single_file).fingerprint) == (kind == "epsilon")


def test_clip_skip_reads_an_earlier_layer(single_file: Path, diffusers_folder: Path) -> None:
    """As diffusers and transformers count: 1 is the last layer, which SD 1.x reads anyway."""
    last, earlier = (open_base(single_file, clip_skip=skip) for skip in (1, 2))
    assert last.fingerprint == open_base(single_file).fingerprint != earlier.fingerprint
    assert (last.clip_skip, earlier.clip_skip) == (0, 2)
    pipe = StableDiffusionPipeline.from_pretrained(diffusers_folder, local_files_only=True)
    ids = pipe.tokenizer("a red cat", padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        network = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
        expected = network.final_layer_norm(hidden)
        ours = earlier.family.build(earlier).encode_prompts(["a red cat"])["text"]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with pytest.raises(SettingsError, match="clip_skip 3") as caught:
        open_base(single_file, clip_skip=3)
    assert "1 to 2" in caught.value.remedy


@pytest.mark.parametrize("form", mostly_slow(["checkpoint", "autoencoder alone", "diffusers folder"], "checkpoint"))
def test_another_vae(form: str, weights: dict[str, Tensor], single_file: Path, tmp_path: Path) -> None:
    other = {n: t for n, t in sd15_state_dict(TINY, seed=5).items() if n.startswith(VAE_PREFIX)}
    path = tmp_path / "vae.safetensors"
    save_file({name.removeprefix("" if form == "checkpoint" else VAE_PREFIX): t for name, t in other.items()}, path)
    if form == "diffusers folder":
        donor = open_base(single_file, vae=path)
        model = donor.family.build(donor)
        model.vae.save_pretrained(tmp_path / "vae")
        path = tmp_path / "vae"
    base, plain = open_base(single_file, vae=path), open_base(single_file)
    expected = outputs(open_base(host_tensors({**weights, **other})))
    for what, tensor in outputs(base).items():
        torch.testing.assert_close(tensor, expected[what], rtol=0, atol=1e-5, msg=what)
    assert base.fingerprint != plain.fingerprint
    assert torch.equal(outputs(base)["prediction"], outputs(plain)["prediction"])
    assert not torch.equal(outputs(base)["latents"], outputs(plain)["latents"])


# Shapes tell the configuration


@pytest.mark.parametrize(
    ("size", "unet", "vae"), [("full", SD15_UNET, SD15_VAE), ("slim", SLIM_UNET, SD15_VAE)], ids=["full", "slim"]
)
def test_configuration_is_inferred_from_shapes(size: str, unet: dict[str, Any], vae: dict[str, Any]) -> None:
    """The published configurations of Stable Diffusion 1.5; the slim one has fewer levels and blocks."""
    shape = SHAPES[size]
    tensors = on_meta(unet_shapes(shape))
    config = unet_config(tensors)
    assert {name: config[name] for name in unet} == unet
    assert not config["use_linear_projection"]
    assert config["addition_embed_type"] is None
    family = identify(config)
    assert family.title == "Stable Diffusion 1.x"
    autoencoder = vae_component(on_meta(vae_shapes(shape)), 0.18215)
    assert {name: autoencoder.config[name] for name in vae} == vae
    text = text_component(on_meta(clip_shapes(shape)), family.text_encoders[0])
    assert {name: text.config[name] for name in CLIP_L} == CLIP_L


@pytest.mark.parametrize("size", ["full", "slim"])
def test_networks_of_the_inferred_configuration_are_filled(size: str) -> None:
    """Every name and shape fits, and the heads are the eight that shapes do not show."""
    shape = SHAPES[size]
    unet = on_meta(unet_shapes(shape))
    config = unet_config(unet) | {"attention_head_dim": 8}
    family = identify(config)
    parts = (
        unet_component(unet, config),
        vae_component(on_meta(vae_shapes(shape)), 0.18215),
        text_component(on_meta(clip_shapes(shape)), family.text_encoders[0]),
    )
    base = BaseWeights(family, parts[0], parts[1], [parts[2]], [None], {}, Prediction(), 0, "meta", "0")
    model = family.build(base)
    for part, network in zip(parts, networks(model).values(), strict=True):
        assert len(part.tensors) == len(list(network.parameters()))
    count = sum(parameter.numel() for parameter in model.denoiser.parameters())
    assert count == sum(math.prod(dims) for _, dims in unet_shapes(shape))
    assert count == 859_520_964 or size != "full"
    assert model.denoiser.down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads == 8
    assert model.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.heads == 8


def test_opened_single_file_has_eight_heads(weights: dict[str, Tensor]) -> None:
    assert open_base(host_tensors(weights)).denoiser.config["attention_head_dim"] == 8


# Tokenizers


def tokenizer_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(DEMO / "base" / "tokenizer", path))


@pytest.mark.parametrize(
    ("file", "tokenizer"),
    [
        ("model.safetensors", "tokenizer"),
        ("models/checkpoints/model.safetensors", "comfy/sd1_tokenizer"),
        ("models/checkpoints/deep/deeper/model.safetensors", "comfy/sd1_tokenizer"),
    ],
)
def test_the_tokenizer_is_found(file: str, tokenizer: str, single_file: Path, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(single_file, path)
    tokenizer_folder(tmp_path / tokenizer)
    ids = open_base(path).tokenizers[0]("a photo of sks dog").input_ids
    assert ids == load_tokenizer(DEMO / "base" / "tokenizer")("a photo of sks dog").input_ids


def test_a_given_tokenizer_wins(single_file: Path, tmp_path: Path) -> None:
    other = tokenizer_folder(tmp_path / "other")
    edit(other, "tokenizer_config.json", model_max_length=17)
    assert open_base(single_file, other).tokenizers[0].model_max_length == 17
    with pytest.raises(WeightsError, match="no CLIP tokenizer"):
        open_base(single_file, tmp_path)


def test_no_tokenizer_anywhere_is_told(single_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    path = Path(shutil.copy(single_file, tmp_path / "model.safetensors"))
    with pytest.raises(WeightsError) as caught:
        open_base(path)
    assert "tokenizer" in caught.value.problem
    assert "Set tokenizer to a folder" in caught.value.remedy


# Refusals


def test_pickled_code_is_not_run(single_file: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    with pytest.raises(WeightsError, match=r"model\.ckpt"):
        pickled(single_file, tmp_path, {"state_dict": {"a": Trap()}})
    assert not (tmp_path / "sprung").exists()


def test_an_adapter_is_no_base_model(tmp_path: Path) -> None:
    layer = LoraLayer(torch.zeros(2, 4), torch.zeros(4, 2), 2.0)
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, Adapter({"lora_unet_mid_block_attentions_0_proj_in": layer}), torch.float32)
    with pytest.raises(WeightsError, match="adapter"):
        open_base(path)


def test_quantised_weights_are_refused(weights: dict[str, Tensor]) -> None:
    name = "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    lent = host_tensors(weights)
    coarse = {**lent.denoiser, name: lent.denoiser[name].to(torch.int8)}
    with pytest.raises(WeightsError, match="quantised"):
        open_base(replace(lent, denoiser=coarse))
