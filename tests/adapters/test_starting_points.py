"""Adapters that a training goes on from: what their numbers become, and which can't be gone on from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import sd15_state_dict
from helpers import DEMO, TINY
from pack.trainer.adapters.diffusers_format import write_diffusers
from pack.trainer.adapters.kohya import Adapter, parse_adapter
from pack.trainer.adapters.layers import Layer, LoraLayer, make_layer
from pack.trainer.adapters.layers.lokr import LokrLayer
from pack.trainer.adapters.names import modules_by_name
from pack.trainer.adapters.targets import fit_start_adapter, targets_of_adapter
from pack.trainer.core.errors import AdapterError
from pack.trainer.models.families.base import DiffusionModel
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import TrainableAdapter

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN_NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT_NAME = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("base") / "tiny.safetensors"
    save_file(sd15_state_dict(TINY), path)
    base = open_base(path, DEMO / "base" / "tokenizer")
    return base.family.build(base)


def width(model: DiffusionModel) -> int:
    """Inputs and outputs of the module `NAME`."""
    weight = dict(model.denoiser.named_modules())["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].weight
    return int(weight.shape[0])


@pytest.mark.parametrize("small_is_whole", [True, False])
def test_the_scale_of_a_lokr_goes_into_its_smaller_factor(small_is_whole: bool, model: DiffusionModel) -> None:
    """Alpha 3 of rank 2: training goes on from the same change, with alpha equal to the rank."""
    torch.manual_seed(0)
    size = width(model) // 4
    small = {"lokr_w1": torch.randn(4, 4)}
    if not small_is_whole:
        small = {"lokr_w1_a": torch.randn(4, 2), "lokr_w1_b": torch.randn(2, 4)}
    large = {"lokr_w2_a": torch.randn(size, 2), "lokr_w2_b": torch.randn(2, size)}
    layer = make_layer(NAME, {**small, **large}, alpha=3.0)
    fitted = fit_start_adapter(model, Adapter({NAME: layer})).layers[NAME]
    assert isinstance(fitted, LokrLayer)
    assert fitted.alpha == fitted.rank == 2
    torch.testing.assert_close(fitted.delta(), layer.delta())
    assert torch.equal(fitted.tensors()["lokr_w2_a"], large["lokr_w2_a"])


@pytest.mark.parametrize("limit", [0.0, 0.01, 1.0])
def test_the_limit_of_a_rotation_goes_into_its_blocks(limit: float, model: DiffusionModel) -> None:
    size = width(model)
    blocks = torch.randn(size // 4, 4, 4, generator=torch.Generator().manual_seed(0))
    layer = make_layer(NAME, {"oft_blocks": 0.1 * blocks}, limit)
    fitted = fit_start_adapter(model, Adapter({NAME: layer})).layers[NAME]
    assert (fitted.alpha, fitted.rank) == (0.0, 4)
    torch.testing.assert_close(fitted.delta(weight := torch.randn(size, size)), layer.delta(weight))


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"oft_blocks": torch.zeros(8, 4, 4), "rescale": torch.ones(32, 1)}, "rescale"),
        ({"oft_blocks": torch.zeros(2, 8, 4, 4)}, "2 butterfly factors"),
    ],
    ids=["rescale", "few factors"],
)
def test_rotations_of_other_forms_can_not_be_gone_on_from(
    tensors: dict[str, torch.Tensor], told: str, model: DiffusionModel
) -> None:
    name = NAME.replace("mid_block", "down_blocks_0")
    with pytest.raises(AdapterError) as refused:
        fit_start_adapter(model, Adapter({name: make_layer(name, tensors, None)}))
    assert told in refused.value.problem
    assert name in refused.value.problem


def test_every_layer_keeps_its_rank_and_alpha(model: DiffusionModel) -> None:
    """The UNet's come first, then those of the text encoders, by name."""
    layers: dict[str, Layer] = {}
    for name, rank, alpha in ((TEXT_NAME, 2, 3.0), (NAME, 4, 1.0), (DOWN_NAME, 8, 8.0)):
        outputs, inputs = modules_by_name(model)[name].weight.shape
        layers[name] = LoraLayer(down=torch.ones(rank, inputs), up=torch.ones(outputs, rank), alpha=alpha)
    targets = targets_of_adapter(model, fit_start_adapter(model, Adapter(layers)))
    assert [(one.component, one.name, one.rank, one.alpha) for one in targets] == [
        ("unet", DOWN_NAME, 8, 8.0),
        ("unet", NAME, 4, 1.0),
        ("text_encoder", TEXT_NAME, 2, 3.0),
    ]
    assert targets[1].path == "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def test_a_lokr_of_whole_factors_has_the_rank_at_which_these_are_whole(model: DiffusionModel) -> None:
    size = width(model)
    layer = LokrLayer(w1=torch.ones(2, 4), w2=torch.ones(size // 2, size // 4), alpha=6.0)
    start = fit_start_adapter(model, Adapter({NAME: layer}))
    torch.testing.assert_close(start.layers[NAME].delta(), layer.delta())
    [target] = targets_of_adapter(model, start)
    assert (target.rank, target.alpha) == (size // 2, float(size // 2))


def test_biases_can_not_be_gone_on_from(model: DiffusionModel) -> None:
    adapter = parse_adapter({f"{NAME}.diff_b": torch.ones(width(model))})
    with pytest.raises(AdapterError) as refused:
        fit_start_adapter(model, adapter)
    assert f"{NAME}.diff_b" in refused.value.problem


def test_a_state_of_other_shapes_is_refused(model: DiffusionModel) -> None:
    lora = TrainableAdapter(model, TrainSettings(rank=4, targets="attention"))
    name, layer = next(iter(lora.adapter().layers.items()))
    doubled = {
        suffix: torch.cat([tensor, tensor], dim=0 if suffix == "lora_down.weight" else 1)
        for suffix, tensor in layer.tensors().items()
    }
    other = make_layer(name, doubled, 4.0)
    saved = lora.adapter()
    with pytest.raises(AdapterError) as refused:
        lora.load(replace(saved, layers={**saved.layers, name: other}))
    assert name in refused.value.problem


def test_a_dora_with_a_magnitude_for_each_input_has_no_form_in_diffusers(tmp_path: Path) -> None:
    tensors = {
        f"{NAME}.lora_down.weight": torch.ones(1, 4),
        f"{NAME}.lora_up.weight": torch.ones(4, 1),
        f"{NAME}.dora_scale": torch.ones(1, 4),
    }
    with pytest.raises(AdapterError) as refused:
        write_diffusers(tmp_path / "x.safetensors", parse_adapter(tensors), torch.float32)
    assert "a magnitude for each input" in refused.value.problem
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"oft_blocks": torch.zeros(2, 3, 4)}, "square blocks"),
        ({"oft_blocks": torch.zeros(2, 2, 3, 3)}, "butterfly"),
        ({"oft_blocks": torch.zeros(2, 4, 4), "rescale": torch.ones(7, 1)}, "fit"),
    ],
)
def test_rotations_of_impossible_shapes(tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(AdapterError) as refused:
        make_layer(NAME, tensors, None)
    assert words in str(refused.value)
    assert NAME in str(refused.value)


def test_a_rotation_for_another_number_of_outputs() -> None:
    layer = make_layer(NAME, {"oft_blocks": torch.zeros(2, 4, 4)}, None)
    with pytest.raises(AdapterError) as refused:
        layer.delta(torch.ones(6, 6))
    assert "8 outputs" in refused.value.problem
    assert "(6, 6)" in refused.value.problem
