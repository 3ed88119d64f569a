"""Adapters in a model: how they start, how they are trained in other precisions, and how they are merged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Recorder
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import Adapter, LoraLayer, parse_adapter
from pack.trainer.adapters.targets import choose_targets, require_family_fits
from pack.trainer.core.errors import AdapterError, SettingsError
from pack.trainer.models.families import FAMILIES
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.models.open import open_base
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import TrainableAdapter
from torch import Tensor, nn
from worlds import World

UNET_MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"  # 64 → 32
XL_MODULE = "lora_unet_input_blocks_7_1_transformer_blocks_5_attn1_to_q"  # which only SDXL has
PUBLISHED_UNET_MODULE = "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_k"
PUBLISHED_TEXT_MODULE = "lora_te_text_model_encoder_layers_11_mlp_fc1"
TEXT_MODULE = "lora_te_text_model_encoder_layers_0_mlp_fc1"  # 64 → 128
DOWN, UP = "lora_down.weight", "lora_up.weight"


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> BaseWeights:
    return open_base(tiny_checkpoint)


def layer(in_features: int, out_features: int, *, rank: int = 3, alpha: float = 2.0, seed: int = 0) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn((rank, in_features), generator=generator)
    return LoraLayer(down, torch.randn((out_features, rank), generator=generator), alpha)


def weights_of(model: DiffusionModel) -> dict[str, Tensor]:
    networks = {"unet": model.denoiser, "vae": model.vae, **model.text_encoders}
    return {f"{part}.{name}": p for part, network in networks.items() for name, p in network.named_parameters()}


def predicted(model: DiffusionModel) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn((1, 4, 8, 8), generator=generator)
    with torch.no_grad():
        return model.predict(latents, torch.tensor([300]), {"text": torch.randn((1, 32, 64), generator=generator)})


# The start


@pytest.mark.parametrize("targets", ["attention", "attention-mlp"])
def test_the_start_is_pefts_and_changes_nothing(targets: Any, base: BaseWeights) -> None:
    """`down` is Kaiming-uniform with a = √5, which is uniform in ±1/√fan_in; `up` is zero."""
    model = base.family.build(base)
    before = predicted(model)
    lora = TrainableAdapter(model, TrainSettings(rank=16, targets=targets))
    assert torch.equal(predicted(model), before)
    for name, started in lora.layers.items():
        assert set(started.parameters) == {DOWN, UP}
        down = started.parameters[DOWN].detach()
        bound = 1 / math.sqrt(down[0].numel())
        assert float(down.abs().max()) <= bound, name
        assert float(down.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15), name
        assert not started.parameters[UP].any()
        assert (started.target.rank, started.target.alpha) == (16, 16)


def test_the_start_depends_on_seed_and_module_alone(base: BaseWeights) -> None:
    def starts(**values: Any) -> dict[str, Tensor]:
        torch.manual_seed(len(values))
        lora = TrainableAdapter(base.family.build(base), TrainSettings(rank=4, **values))
        return {name: started.parameters[DOWN].detach() for name, started in lora.layers.items()}

    first, again, few, other = starts(), starts(alpha=9.0), starts(targets="attention"), starts(seed=2**64 - 1)
    assert len(few) < len(first)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], few[name]) for name in few)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert len({started.sum().item() for started in first.values()}) == len(first)


def test_only_the_adapter_is_trained(base: BaseWeights) -> None:
    model = base.family.build(base)
    lora = TrainableAdapter(model, TrainSettings(rank=4))
    trained = {id(p) for p in lora.parameters()}
    assert {id(p) for p in model.denoiser.parameters() if p.requires_grad} == trained
    assert len(trained) == 2 * len(lora.layers)
    assert list(lora.layers) == sorted(lora.layers)
    first = next(iter(lora.layers.values()))
    assert lora.parameters()[0] is first.parameters[DOWN]
    assert lora.parameters()[1] is first.parameters[UP]
    assert {name: len(group) for name, group in lora.groups().items()} == {"unet": len(trained)}


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_a_saved_state_is_a_copy_and_comes_back(alpha: float | None, base: BaseWeights) -> None:
    settings = TrainSettings(rank=4, alpha=alpha, targets="attention")
    lora = TrainableAdapter(base.family.build(base), settings)
    saved = lora.adapter()
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(1.0)
    assert all(not part.up.any() for part in saved.layers.values())
    assert {part.alpha for part in saved.layers.values()} == {alpha or 4.0}
    lora.load(saved)
    assert all(torch.equal(lora.layers[name].parameters[DOWN], part.down) for name, part in saved.layers.items())
    with pytest.raises(AdapterError):
        lora.load(Adapter(dict(list(saved.layers.items())[1:])))


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_seen(spoilt: float, base: BaseWeights) -> None:
    lora = TrainableAdapter(base.family.build(base), TrainSettings(rank=4))
    assert lora.is_finite()
    with torch.no_grad():
        lora.parameters()[-1][0, 0] = spoilt
    assert not lora.is_finite()


def test_a_rank_above_the_smallest_layer_is_refused(base: BaseWeights) -> None:
    model = base.family.build(base)
    assert {target.rank for target in choose_targets(model, TrainSettings(rank=32))} == {32}
    with pytest.raises(SettingsError) as caught:
        choose_targets(model, TrainSettings(rank=33))
    assert "33" in caught.value.problem
    assert "32" in caught.value.remedy


def test_lokr_takes_any_rank(base: BaseWeights) -> None:
    """It has no rank above a size: its factors are whole then."""
    settings = TrainSettings(adapter="lokr", rank=33)
    lora = TrainableAdapter(base.family.build(base), settings)
    assert {frozenset(started.parameters) for started in lora.layers.values()} == {frozenset({"lokr_w1", "lokr_w2"})}


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_dropout_is_in_every_layer(share: float, base: BaseWeights) -> None:
    model = base.family.build(base)
    lora = TrainableAdapter(model, TrainSettings(rank=4, dropout=share, text_encoder_lr=1e-4))
    networks = (model.denoiser, *model.text_encoders.values())
    shares = [
        module.p
        for network in networks
        for name, module in network.named_modules()
        if "lora_dropout" in name and isinstance(module, nn.Dropout)
    ]
    assert shares == ([share] * len(lora.layers) if share else [])


# Which layers, of which rank


@pytest.mark.parametrize(
    ("family", "values", "told", "remedy"),
    [
        ("Stable Diffusion 1.x", {"text_encoder_2_lr": 1e-5}, "text_encoder_2_lr", "Set text_encoder_2_lr = 0"),
        ("Stable Diffusion 2.x", {"text_encoder_2_lr": 1e-5}, "text_encoder_2_lr", "Set text_encoder_2_lr = 0"),
        ("Stable Diffusion 1.x", {"targets": "b-lora-style"}, "b-lora-style", "attention, attention-mlp, all"),
        ("Stable Diffusion 2.x", {"targets": "b-lora-content"}, "b-lora-content", "Stable Diffusion XL"),
        ("Stable Diffusion 2.x", {"adapter": "full"}, "adapter = full", "lora, dora, loha, lokr, oft or boft"),
        ("Stable Diffusion XL", {"adapter": "full"}, "adapter = full", "Stable Diffusion 1.x"),
    ],
)
def test_settings_of_another_family_are_refused(family: str, values: dict[str, Any], told: str, remedy: str) -> None:
    [chosen] = [one for one in FAMILIES if one.title == family]
    with pytest.raises(SettingsError) as caught:
        require_family_fits(chosen, TrainSettings(**values))
    assert told in caught.value.problem
    assert family in caught.value.problem
    assert remedy in caught.value.remedy


def chosen(base: BaseWeights, **values: Any) -> dict[str, tuple[int, float]]:
    """Path → rank and alpha."""
    targets = choose_targets(base.family.build(base), TrainSettings(**{"rank": 8, **values}))
    return {target.path: (target.rank, target.alpha) for target in targets}


def test_presets_contain_each_other(base: BaseWeights) -> None:
    attention, mlp, everything = (set(chosen(base, targets=name)) for name in ("attention", "attention-mlp", "all"))
    assert attention < mlp < everything
    assert all(".attn1.to_" in path or ".attn2.to_" in path for path in attention)
    assert {path.rpartition(".")[2] for path in everything - mlp} == {
        "conv",
        "conv1",
        "conv2",
        "conv_shortcut",
        "time_emb_proj",
    }


def test_include_and_exclude(base: BaseWeights) -> None:
    plain = set(chosen(base))
    assert set(chosen(base, include="^conv_in$ ^time_embedding", block_ranks="conv_in=4")) - plain == {
        "conv_in",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    }
    assert set(chosen(base, targets="none", include=r"mid_block\..*to_v$")) == {
        f"mid_block.attentions.0.transformer_blocks.0.attn{number}.to_v" for number in (1, 2)
    }
    assert "conv_out" not in plain
    left = set(chosen(base, exclude=r"down_blocks ff\.net"))
    assert left == {path for path in plain if "down_blocks" not in path and "ff.net" not in path}


def test_the_first_convolution_takes_a_usual_rank(base: BaseWeights) -> None:
    """It has 4 input channels, but 36 inputs; it is what the help of `include` names first."""
    assert chosen(base, targets="none", include="^conv_in$", rank=16) == {"conv_in": (16, 16.0)}


def test_ranks_of_convolutions_and_blocks(base: BaseWeights) -> None:
    found = chosen(base, targets="all", alpha=4.0, conv_rank=2, block_ranks=r"mid_block=16 mid_block\.res=3:1.5 up_=0")
    assert not any(path.startswith("up_blocks") for path in found)
    assert found["down_blocks.0.resnets.0.conv1"] == (2, 2.0)
    assert found["down_blocks.0.resnets.0.time_emb_proj"] == (8, 4.0)
    assert found["down_blocks.1.resnets.0.conv_shortcut"] == (8, 4.0)  # 1×1
    assert found["mid_block.attentions.0.proj_in"] == (16, 16.0)
    assert found["mid_block.resnets.0.conv1"] == (3, 1.5)  # the last that is found counts
    alone = chosen(base, targets="all", conv_alpha=1.0)
    assert alone["down_blocks.0.resnets.0.conv1"] == (8, 1.0)
    assert alone["mid_block.attentions.0.proj_in"] == (8, 8.0)


def test_rank_stabilisation_stands_in_alpha(base: BaseWeights) -> None:
    """Every program scales by alpha / rank, so that alpha · √rank gives alpha / √rank."""
    assert set(chosen(base, rank=16, alpha=2.0, rank_stabilized=True).values()) == {(16, 8.0)}


def test_text_encoders_follow_the_preset(base: BaseWeights) -> None:
    for targets, count in (("attention", 8), ("attention-mlp", 12), ("all", 12)):
        found = chosen(base, targets=targets, text_encoder_lr=1e-5)
        assert len([path for path in found if path.startswith("text_model.")]) == count
        assert set(chosen(base, targets=targets)) == {path for path in found if not path.startswith("text_model.")}


# Precision


@pytest.mark.parametrize("targets", ["attention", "attention-mlp"])
def test_bf16_keeps_the_adapter_in_float32(targets: Any, base: BaseWeights) -> None:
    model = base.family.build(base)
    nn.Module.to(model.denoiser, torch.bfloat16)
    lora = TrainableAdapter(model, TrainSettings(rank=4, targets=targets))
    assert {p.dtype for p in lora.parameters()} == {torch.float32}
    assert {p.dtype for p in model.denoiser.parameters() if not p.requires_grad} == {torch.bfloat16}
    exact = TrainableAdapter(base.family.build(base), TrainSettings(rank=4, targets=targets))
    assert all(
        torch.equal(exact.layers[name].parameters[DOWN], part.parameters[DOWN]) for name, part in lora.layers.items()
    )


@pytest.mark.slow
def test_a_bf16_run_trains_on_a_private_copy(world: World, tmp_path: Path) -> None:
    before = {name: (p.data_ptr(), p.clone()) for name, p in world.base.denoiser.tensors.items()}
    results, losses = {}, {}
    for precision in ("fp32", "bf16"):
        listener = Recorder()
        results[precision] = world.train(tmp_path, listener, precision=precision, learning_rate=1e-3)
        losses[precision] = listener.losses
        assert len(listener.losses) == 4
        assert all(math.isfinite(loss) for loss in listener.losses)
        layers = results[precision].adapter.layers.values()
        assert {tensor.dtype for part in layers for tensor in part.tensors().values()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)
    assert losses["bf16"] != losses["fp32"]
    assert results["bf16"].run != results["fp32"].run
    for name, (place, value) in before.items():
        assert world.base.denoiser.tensors[name].data_ptr() == place
        assert world.base.denoiser.tensors[name].dtype == torch.float32
        assert torch.equal(world.base.denoiser.tensors[name], value)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_what_is_private_and_what_is_borrowed_in_training(
    precision: Any, dtype: torch.dtype, world: World, tmp_path: Path
) -> None:
    recipe = world.prepared(tmp_path, precision=precision)
    frozen = [p for p in recipe.session.model.denoiser.parameters() if not p.requires_grad]
    lent = {p.untyped_storage().data_ptr() for p in world.base.denoiser.tensors.values()}
    borrowed = [p.untyped_storage().data_ptr() in lent for p in frozen]
    assert {p.dtype for p in frozen} == {dtype}
    assert all(borrowed) if precision == "fp32" else not any(borrowed)
    assert {p.dtype for p in recipe.session.trainable.parameters()} == {torch.float32}
    state = recipe.train_step(1.0)
    assert torch.isfinite(state)
    moments = [entry["exp_avg"].dtype for entry in recipe.session.optimizer.state_dict()["state"].values()]
    assert set(moments) == {torch.float32}


# Merging


def full_adapter(base: BaseWeights, **values: Any) -> Adapter:
    """Random numbers in every layer that a preset adapts."""
    lora = TrainableAdapter(base.family.build(base), TrainSettings(rank=4, **values))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in lora.layers.values():
            part.parameters[UP].copy_(0.1 * torch.randn(part.parameters[UP].shape, generator=generator))
    return lora.adapter()


def test_merging_is_linear_in_the_strength(base: BaseWeights) -> None:
    adapter = full_adapter(base, alpha=2.0)
    plain = weights_of(base.family.build(base))
    none, whole, there_and_back, halves = (base.family.build(base) for _ in range(4))
    merge_into(none, adapter, 0.0)
    merge_into(whole, adapter, 1.0)
    for strength in (1.0, -1.0):
        merge_into(there_and_back, adapter, strength)
    for strength in (0.25, 0.75):
        merge_into(halves, adapter, strength)
    changed = 0
    merged = (weights_of(model) for model in (none, whole, there_and_back, halves))
    unchanged, at_once, undone, in_parts = merged
    for name, weight in plain.items():
        assert torch.equal(unchanged[name], weight)
        torch.testing.assert_close(undone[name], weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(in_parts[name], at_once[name], rtol=0, atol=1e-6)
        changed += not torch.equal(at_once[name], weight)
    assert changed == len(adapter.layers)


def test_merging_equals_the_adapter_beside_the_model(base: BaseWeights) -> None:
    adapter = full_adapter(base, alpha=2.0)
    merged, beside = base.family.build(base), base.family.build(base)
    TrainableAdapter(beside, TrainSettings(rank=4, alpha=2.0)).load(adapter)
    merge_into(merged, adapter, 1.0)
    assert (predicted(merged) - predicted(base.family.build(base))).abs().max() > 0.01
    torch.testing.assert_close(predicted(merged), predicted(beside), rtol=0, atol=1e-4)


def test_merged_adapters_add_up(base: BaseWeights) -> None:
    first, second = (Adapter({UNET_MODULE: layer(64, 32, seed=seed)}) for seed in (1, 2))
    orders = []
    for adapters in ((first, second), (second, first)):
        model = base.family.build(base)
        for adapter in adapters:
            merge_into(model, adapter, 0.5)
        orders.append(weights_of(model))
    for name, weight in orders[0].items():
        torch.testing.assert_close(weight, orders[1][name], rtol=0, atol=1e-6)


def test_only_touched_weights_are_copied(base: BaseWeights) -> None:
    model = base.family.build(base)
    places = {name: weight.data_ptr() for name, weight in weights_of(model).items()}
    lent = {
        name: tensor.clone() for part in (base.denoiser, base.text_encoders[0]) for name, tensor in part.tensors.items()
    }
    merge_into(model, Adapter({UNET_MODULE: layer(64, 32), TEXT_MODULE: layer(64, 128)}), 1.0)
    moved = {name for name, weight in weights_of(model).items() if weight.data_ptr() != places[name]}
    assert len(moved) == 2
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight" in moved
    for part in (base.denoiser, base.text_encoders[0]):
        assert all(torch.equal(tensor, lent[name]) for name, tensor in part.tensors.items())


def test_merged_weights_keep_their_dtype(base: BaseWeights) -> None:
    model = base.family.build(base)
    nn.Module.to(model.denoiser, torch.bfloat16)
    merge_into(model, Adapter({UNET_MODULE: layer(64, 32)}), 1.0)
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.denoiser.parameters())


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        (Adapter({XL_MODULE: layer(64, 32)}, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}), "xl"),
        (Adapter({"lora_unet_nowhere": layer(64, 32)}), "lora_unet_nowhere"),
        (Adapter({UNET_MODULE: layer(64, 32), XL_MODULE: layer(64, 32)}), XL_MODULE),
        (Adapter({UNET_MODULE: layer(64, 32), "lora_te2_" + TEXT_MODULE[8:]: layer(64, 128)}), "lora_te2_"),
        (Adapter({UNET_MODULE: layer(64, 32), PUBLISHED_TEXT_MODULE: layer(64, 128)}), "no counterpart"),
        (Adapter({UNET_MODULE: layer(65, 32)}), UNET_MODULE),
        (Adapter({UNET_MODULE: layer(32, 64)}), UNET_MODULE),  # as many numbers, but turned
        (Adapter({UNET_MODULE: layer(128, 16)}), UNET_MODULE),
    ],
    ids=[
        "another family",
        "no such module",
        "a module of another family",
        "another family's text encoder",
        "a part of which there is nothing",
        "another size",
        "transposed",
        "as many numbers",
    ],
)
def test_adapters_that_do_not_fit_are_refused(adapter: Adapter, told: str, base: BaseWeights) -> None:
    model = base.family.build(base)
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    with pytest.raises(AdapterError, match=told):
        merge_into(model, adapter, 1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_a_refused_adapter_leaves_no_half_merged_model(base: BaseWeights) -> None:
    model = base.family.build(base)
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    with pytest.raises(AdapterError, match=TEXT_MODULE):
        merge_into(model, Adapter({UNET_MODULE: layer(64, 32), TEXT_MODULE: layer(65, 128)}), 1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_modules_that_a_smaller_model_lacks_are_told(base: BaseWeights, caplog: pytest.LogCaptureFixture) -> None:
    """The base has fewer levels and layers than the published models of its family, for which adapters are made."""
    model = base.family.build(base)
    names = (UNET_MODULE, PUBLISHED_UNET_MODULE, TEXT_MODULE, PUBLISHED_TEXT_MODULE)
    text = [layer(64, 128) if "te_" in name else layer(64, 32) for name in names]
    merge_into(model, Adapter(dict(zip(names, text, strict=True))), 1.0)
    assert "2 of the adapter's 4" in caplog.text
    assert PUBLISHED_TEXT_MODULE in caplog.text


def test_a_single_text_encoder_may_be_called_the_first(base: BaseWeights) -> None:
    """diffusers' converter writes lora_te1_ also where there is one text encoder alone."""
    one, other = base.family.build(base), base.family.build(base)
    merge_into(one, Adapter({TEXT_MODULE: layer(64, 128)}), 1.0)
    merge_into(other, Adapter({TEXT_MODULE.replace("lora_te_", "lora_te1_"): layer(64, 128)}), 1.0)
    assert all(torch.equal(weight, weights_of(one)[name]) for name, weight in weights_of(other).items())


def test_changes_of_norms_and_biases_are_read_and_applied(base: BaseWeights) -> None:
    """ComfyUI's own trainer and LyCORIS write them, each under its own names."""
    name = "diffusion_model.input_blocks.1.1"
    tensors = {
        f"{name}.proj_in.lora_down.weight": torch.ones(2, 32),
        f"{name}.proj_in.lora_up.weight": torch.zeros(32, 2),
        "diffusion_model.out.0.diff": torch.full((32,), 0.25),
        f"{name}.proj_in.diff_b": torch.full((32,), 0.5),
        "lora_unet_conv_norm_out.b_norm": torch.full((32,), 2.0),
    }
    plain, changed = base.family.build(base), base.family.build(base)
    merge_into(changed, parse_adapter(tensors), 2.0)
    before, after = dict(plain.denoiser.named_parameters()), dict(changed.denoiser.named_parameters())
    expected = {
        "conv_norm_out.weight": 0.5,
        "conv_norm_out.bias": 4.0,
        "down_blocks.0.attentions.0.proj_in.bias": 1.0,
    }
    for parameter, difference in expected.items():
        torch.testing.assert_close(after[parameter].float(), before[parameter].float() + difference, atol=2e-3, rtol=0)
    for parameter in before.keys() - expected.keys():
        assert torch.equal(before[parameter], after[parameter])
    again = parse_adapter(parse_adapter(tensors).state_dict(torch.float16))
    assert {key: float(vector[0]) for key, vector in again.vectors.items()} == {
        "lora_unet_out_0.diff": 0.25,
        "lora_unet_input_blocks_1_1_proj_in.diff_b": 0.5,
        "lora_unet_conv_norm_out.diff_b": 2.0,
    }


@pytest.mark.parametrize("key", ["lora_unet_nowhere.diff_b", "lora_unet_conv_out.diff_b", f"{UNET_MODULE}.diff_b"])
def test_a_change_of_a_bias_that_is_not_there_is_refused(key: str, base: BaseWeights) -> None:
    """There is no such module, its bias has another size, or it has none."""
    adapter = Adapter({UNET_MODULE: layer(64, 32)}, vectors={key: torch.ones(5)})
    with pytest.raises(AdapterError, match=key.removesuffix(".diff_b")):
        merge_into(base.family.build(base), adapter, 1.0)
