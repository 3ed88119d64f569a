"""SD 1, SD 2 and SDXL with its relatives: kohya's names at real size, and one model by three doors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import mostly_slow
from checkpoints import (
    OPEN_CLIP_PREFIX,
    SD2_SHAPES,
    SDXL_CLIP_PREFIX,
    SDXL_OPEN_CLIP_PREFIX,
    SDXL_SHAPES,
    SHAPES,
    UNET_PREFIX,
    SDXLShape,
    Shape,
    parameter_shapes,
    sd2_checkpoint,
    sd2_state_dict,
    sdxl_checkpoint,
    sdxl_state_dict,
)
from checkpoints_folders import diffusers_folder
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from helpers import ROOT, MadeOnce
from lent_models import TOKENIZER, below, lent
from pack.trainer.adapters.names import adapter_names, modules_by_name
from pack.trainer.adapters.targets import choose_targets
from pack.trainer.core.errors import UnsupportedModelError, WeightsError
from pack.trainer.models import open as weights
from pack.trainer.models.families.base import BaseWeights, DiffusionModel, Prediction
from pack.trainer.models.families.ldm import unet_config
from pack.trainer.models.open import open_base
from pack.trainer.models.sampling import GenerationConfig, generate
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import TrainableAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick")

FULL: dict[str, Shape] = {"sd15": SHAPES["full"], "sd2": SD2_SHAPES["full"], "sdxl": SDXL_SHAPES["full"]}
RELATIVES = ["tiny-ssd1b", "tiny-vega", "tiny-koala700m", "tiny-koala1b"]
PROMPTS = ["photo of sks dog", "red fish in the snow"]


# Kohya's names and shapes, at real size


@pytest.fixture(scope="module")
def full() -> Mapping[str, BaseWeights]:
    """Every family at full size, on the meta device, whose tensors have no values to take a digest of."""

    def opened(family: str) -> BaseWeights:
        tensors = {entry: torch.empty(dims, device="meta") for entry, dims in parameter_shapes(FULL[family])}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights, "fingerprint", lambda facts, *parts: "meta")
            return open_base(lent(tensors, Prediction()))

    return MadeOnce(opened)


@pytest.fixture(scope="module")
def models(full: Mapping[str, BaseWeights]) -> Mapping[str, DiffusionModel]:
    """The same, built; to look at."""
    return MadeOnce(lambda family: full[family].family.build(full[family]))


def everything_trained(model: DiffusionModel, **options: Any) -> TrainSettings:
    rates = {f"{name}_lr": 1e-4 for name in model.text_encoders}
    return TrainSettings(rank=4, **options, **rates)


def golden(name: str) -> dict[str, list[list[int]]]:
    """Kohya's list; SD 2 has Linear layers where kohya builds 1×1 convolutions from a single file."""
    listed = json.loads((ROOT / f"tests/golden/kohya_{name}_keys.json").read_text())
    if name.startswith("sd2"):
        for layer, shapes in listed.items():
            if layer.endswith(("_proj_in", "_proj_out")) and layer.startswith("lora_unet_"):
                assert [shape[2:] for shape in shapes] == [[1, 1], [1, 1]]
                listed[layer] = [shape[:2] for shape in shapes]
    return listed


COUNTS: list[tuple[str, bool, int, dict[str, int]]] = [
    ("sd15", False, 192, {"lora_te_": 72}),
    ("sd15", True, 278, {"lora_te_": 72}),
    ("sd2", False, 192, {"lora_te_": 138}),
    ("sd2", True, 278, {"lora_te_": 138}),
    ("sdxl", False, 722, {"lora_te1_": 72, "lora_te2_": 192}),
    ("sdxl", True, 788, {"lora_te1_": 72, "lora_te2_": 192}),
]


@pytest.mark.parametrize(("family", "conv", "unet", "text"), mostly_slow(COUNTS, COUNTS[0], COUNTS[1], COUNTS[5]))
def test_names_and_ranks_are_kohyas(
    family: str, conv: bool, unet: int, text: dict[str, int], models: Mapping[str, DiffusionModel]
) -> None:
    options: dict[str, Any] = {"targets": "all", "conv_rank": 2} if conv else {"targets": "attention-mlp"}
    chosen = choose_targets(models[family], everything_trained(models[family], **options))
    expected = golden(f"{family}_conv" if conv else family)
    assert {target.name: target.rank for target in chosen} == {name: down[0] for name, (down, _) in expected.items()}
    counts = {prefix: sum(target.name.startswith(prefix) for target in chosen) for prefix in ("lora_unet_", *text)}
    assert counts == {"lora_unet_": unet, **text}
    assert sum(counts.values()) == len(chosen)


@pytest.mark.parametrize("family", mostly_slow(FULL, "sd15"))
def test_shapes_are_kohyas(family: str, full: Mapping[str, BaseWeights]) -> None:
    model = full[family].family.build(full[family])
    adapter = TrainableAdapter(model, everything_trained(model, targets="all", conv_rank=2))
    sides = [f"lora_{side}.weight" for side in ("down", "up")]
    ours = {name: [list(layer.saved_shape(side)) for side in sides] for name, layer in adapter.layers.items()}
    assert ours == golden(f"{family}_conv")
    shorter = golden(family)
    assert shorter == {name: ours[name] for name in shorter}


@pytest.mark.parametrize(
    ("family", "unet", "text"),
    mostly_slow([("sd15", 128, 48), ("sd2", 128, 92), ("sdxl", 560, 48 + 128)], ("sd15", 128, 48)),
)
def test_the_attention_preset_is_diffusers(
    family: str, unet: int, text: int, models: Mapping[str, DiffusionModel]
) -> None:
    """diffusers' scripts adapt the four projections of every attention, in the UNet and in text encoders."""
    model = models[family]
    chosen = choose_targets(model, everything_trained(model, targets="attention"))
    ending = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    paths = [path for network in (model.denoiser, *model.text_encoders.values()) for path, _ in network.named_modules()]
    assert len({(target.component, target.path) for target in chosen}) == unet + text
    assert sum(target.component == "unet" for target in chosen) == unet
    assert sum(path.endswith(ending) for path in paths) == len(chosen)


@pytest.mark.parametrize(("preset", "block"), [("b-lora-content", 0), ("b-lora-style", 1)])
def test_b_lora_is_one_block(preset: str, block: int, models: Mapping[str, DiffusionModel]) -> None:
    chosen = choose_targets(models["sdxl"], TrainSettings(rank=4, targets=preset))  # type: ignore[arg-type]
    assert len(chosen) == 10 * 8
    assert {target.path.split(".transformer_blocks")[0] for target in chosen} == {f"up_blocks.0.attentions.{block}"}
    assert all(target.name.startswith(f"lora_unet_output_blocks_{block}_1_transformer_blocks_") for target in chosen)


@pytest.mark.parametrize("size", ["sd2", "tiny", *RELATIVES])
def test_every_module_is_known_by_its_name_in_the_original(size: str) -> None:
    """Every Linear layer and convolution, told by its weight; SDXL's adapter files name it so, too."""
    tensors = sd2_state_dict("tiny") if size == "sd2" else sdxl_state_dict(size)
    base = open_base(lent(tensors))
    model = base.family.build(base)
    unet = {name: tensor for name, tensor in below(tensors, UNET_PREFIX).items() if tensor.ndim in (2, 4)}
    expected = {"lora_unet_" + name.removesuffix(".weight").replace(".", "_"): unet[name] for name in unet}
    known = modules_by_name(model)
    assert all(torch.equal(known[name].weight, tensor) for name, tensor in expected.items())
    if size != "sd2":
        names = adapter_names(model)
        assert sorted(names[path] for path in names if path.component == "unet") == sorted(expected)


# Configurations from shapes

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
XL: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PUBLISHED: dict[str, tuple[Shape, dict[str, Any], int]] = {
    "stable-diffusion-2-1": (
        SD2_SHAPES["full"],
        {
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
            "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
            "layers_per_block": 2,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        865,
    ),
    "stable-diffusion-xl-base-1.0": (
        SDXL_SHAPES["full"],
        XL | {"transformer_layers_per_block": [1, 2, 10], "mid_block_type": "UNetMidBlock2DCrossAttn"},
        2567,
    ),
    "SSD-1B": (
        SDXL_SHAPES["ssd1b"],
        XL
        | {
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
        1331,
    ),
    "Segmind-Vega": (
        SDXL_SHAPES["vega"],
        XL
        | {
            "transformer_layers_per_block": [1, [1, 1], [2, 2]],
            "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
        745,
    ),
    "koala-700m": (
        SDXL_SHAPES["koala700m"],
        XL | {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5], "mid_block_type": None},
        782,
    ),
    "koala-1b": (
        SDXL_SHAPES["koala1b"],
        XL
        | {
            "layers_per_block": 1,
            "transformer_layers_per_block": [1, 2, 6],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
        },
        1161,
    ),
}


def described(config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """The shapes of a UNet's weights, and the heads of its attention layers."""
    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
    heads = {path: module.heads for path, module in network.named_modules() if hasattr(module, "heads")}
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}, heads


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configuration_is_found(name: str) -> None:
    shape, published, millions = PUBLISHED[name]
    tensors = {entry: torch.empty(dims, device="meta") for entry, dims in parameter_shapes(shape)}
    found = unet_config(below(tensors, UNET_PREFIX))
    family = weights.identify(found)
    assert family.title == ("Stable Diffusion XL" if isinstance(shape, SDXLShape) else "Stable Diffusion 2.x")
    completed = family.complete(found)
    for key, value in published.items():
        if "layers_per_block" not in key or key == "layers_per_block":
            given = completed.get(key, "UNetMidBlock2DCrossAttn" if key == "mid_block_type" else None)
            assert list(given) == value if isinstance(value, list) else given == value
    ours, theirs = described(completed), described(published)
    assert ours == theirs
    assert sum(np.prod(dims) for dims in ours[0].values()) // 1_000_000 == millions


# One model, three doors


def everything(base: BaseWeights) -> dict[str, Tensor]:
    """What a model computes from fixed inputs: text, noise predictions and latents."""
    model = base.family.build(base)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand((1, 3, 64, 64), generator=generator) * 2 - 1
    latents = torch.randn((2, 4, 8, 8), generator=generator)
    with torch.no_grad():
        text = model.encode_prompts(PROMPTS)
        sizes = torch.tensor([[96.0, 64, 0, 0, 64, 64], [64, 64, 0, 0, 64, 64]])
        return {
            **text,
            "prediction": model.predict(latents, torch.tensor([30, 800]), text | {"size": sizes}),
            "latents": model.vae.encode(pixels).latent_dist.mean * model.vae.config.scaling_factor,
            "picture": model.vae.decode(latents).sample,
            "schedule": model.objective.alphas_cumprod,
        }


DOORS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Path]]] = {
    "sd2": (lambda path: sd2_checkpoint(path, size="tiny"), lambda path: diffusers_folder(path, "sd2")),
    **{
        f"sdxl {size}": (
            lambda path, size=size: sdxl_checkpoint(path, size=size),
            lambda path, size=size: diffusers_folder(path, "sdxl", size=size),
        )
        for size in ("tiny", *RELATIVES)
    },
    "sdxl v": (
        lambda path: sdxl_checkpoint(path, size="tiny", v_pred=True),
        lambda path: diffusers_folder(path, "sdxl", velocity=True),
    ),
    "sdxl v ztsnr": (
        lambda path: sdxl_checkpoint(path, size="tiny", v_pred=True, ztsnr=True),
        lambda path: diffusers_folder(path, "sdxl", velocity=True, ztsnr=True),
    ),
}


@pytest.mark.parametrize("name", mostly_slow(DOORS, "sd2", "sdxl tiny"))
def test_a_file_a_folder_and_a_host_give_the_same_model(name: str, tmp_path: Path) -> None:
    make_file, make_folder = DOORS[name]
    file = open_base(make_file(tmp_path / "model.safetensors"), TOKENIZER)
    tensors = load_file(tmp_path / "model.safetensors")
    doors = {
        "folder": open_base(make_folder(tmp_path / "model")),
        "host": open_base(lent(tensors, file.prediction)),
        "host, Hugging Face's names": open_base(lent(tensors, file.prediction, converted=True)),
    }
    expected = everything(file)
    for door, base in doors.items():
        assert base.fingerprint == file.fingerprint, door
        assert (base.prediction.type, base.family) == (file.prediction.type, file.family)
        for part, values in everything(base).items():
            torch.testing.assert_close(values, expected[part], rtol=0, atol=2e-5, msg=f"{door}: {part}")


def test_other_layouts_of_sd2s_text_encoder(tmp_path: Path) -> None:
    tensors = sd2_state_dict("tiny")
    moved = {name.replace(OPEN_CLIP_PREFIX, "conditioner.embedders.0.model."): t for name, t in tensors.items()}
    save_file(moved, tmp_path / "sgm.safetensors")
    assert open_base(tmp_path / "sgm.safetensors", TOKENIZER).fingerprint == open_base(lent(tensors)).fingerprint


@pytest.mark.parametrize(("prefix", "name"), [(SDXL_CLIP_PREFIX, "clip_l"), (SDXL_OPEN_CLIP_PREFIX, "clip_g")])
def test_a_missing_text_encoder_is_named(prefix: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({key: tensor for key, tensor in sdxl_state_dict("tiny").items() if not key.startswith(prefix)}, path)
    with pytest.raises(WeightsError, match=name):
        open_base(path, TOKENIZER)


def test_edm_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "playground.safetensors"
    save_file(sdxl_state_dict("tiny") | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, path)
    with pytest.raises(UnsupportedModelError, match="EDM"):
        open_base(path, TOKENIZER)


@pytest.mark.parametrize("name", mostly_slow(DOORS, "sd2", "sdxl tiny-koala1b"))
def test_text_and_pictures_equal_the_pipelines(name: str, tmp_path: Path) -> None:
    folder = DOORS[name][1](tmp_path / "model")
    base = open_base(folder)
    model = base.family.build(base)
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    check_text(model, pipe)
    [expected] = pipe(
        PROMPTS[1],
        negative_prompt="blue",
        guidance_scale=4.0,
        num_inference_steps=3,
        height=64,
        width=96,
        generator=torch.Generator().manual_seed(5),
    ).images
    config = GenerationConfig(width=96, height=64, negative_prompt="blue", steps=3, guidance=4.0)
    [ours] = generate(model, PROMPTS[1], [5], config)
    assert ours.size == (96, 64)
    assert np.asarray(ours).std() > 5
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1  # rounding


@torch.no_grad()
def check_text(model: DiffusionModel, pipe: Any) -> None:
    encoded = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    ours = model.encode_prompts(PROMPTS)
    text = [ours[name] for name in ("text", "text_2") if name in ours]
    torch.testing.assert_close(torch.cat(text, dim=-1), encoded[0], rtol=0, atol=1e-5)
    if "pooled_2" in ours:
        torch.testing.assert_close(ours["pooled_2"], encoded[2], rtol=0, atol=1e-5)
