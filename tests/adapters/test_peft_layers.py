"""Every kind of adapter: how it starts, what it is in its file, what of it is trained; and which layers get one."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from helpers import remembered
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import read_adapter, write_adapter
from pack.trainer.adapters.layers import LokrLayer, LoraLayer
from pack.trainer.adapters.names import UNET, adaptable_modules, modules_by_name
from pack.trainer.adapters.targets import choose_targets
from pack.trainer.core.errors import SettingsError
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import TrainableAdapter
from pydantic import ValidationError
from safetensors.torch import load_file
from worlds import (
    BOTH_TEXTS,
    COMMON,
    KINDS,
    TEXT,
    World,
    distances,
    lent_tensors,
    make_world,
    make_xl_world,
    perturb,
    predicted,
)

pytestmark = pytest.mark.usefixtures("quick")

Worlds = dict[str, World]
TEXTS: dict[str, dict[str, Any]] = {"SD 1": TEXT, "SDXL": BOTH_TEXTS}
LATENT, TIMESTEP = (2, 4, 8, 8), 300


@pytest.fixture(scope="module")
def worlds(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    folder = tmp_path_factory.mktemp("worlds")
    return {"SD 1": make_world(tiny_checkpoint, folder / "one"), "SDXL": make_xl_world(folder / "two")}


def settings_of(kind: str, family: str = "SD 1", **values: Any) -> TrainSettings:
    return TrainSettings(**{**COMMON, **KINDS[kind], **TEXTS[family], **values})


@remembered
def built(base: BaseWeights) -> DiffusionModel:
    """A model to look at."""
    return base.family.build(base)


def injected(base: BaseWeights, settings: TrainSettings) -> tuple[DiffusionModel, TrainableAdapter]:
    model = base.family.build(base)
    return model, TrainableAdapter(model, settings)


# A kind in the model and in its file


CASES = [(kind, family) for family in TEXTS for kind in KINDS]


@pytest.mark.parametrize(("kind", "family"), mostly_slow(CASES, *CASES[: len(KINDS)], ("LoKr of 4", "SDXL")))
def test_a_file_is_the_adapter_that_was_trained(kind: str, family: str, worlds: Worlds, tmp_path: Path) -> None:
    """From a start that changes nothing to a file that, merged into a fresh model, predicts as PEFT's layers do."""
    base = worlds[family].base
    lent = {name: tensor.clone() for name, tensor in lent_tensors(base).items()}
    plain = predicted(built(base))
    model, adapter = injected(base, settings_of(kind, family))
    assert max(distances(predicted(model), plain).values()) < 1e-6
    perturb(adapter)
    trained = predicted(model)
    assert min(distances(trained, plain).values()) > 1e-3

    write_adapter(tmp_path / "dog.safetensors", adapter.adapter(), torch.float32)
    read = read_adapter(tmp_path / "dog.safetensors")
    plain_loras = dict.fromkeys(("LoCon", "rsLoRA", "T-LoRA", "Ortho-LoRA"), "LoRA")
    assert read.kind == {**plain_loras, "LoKr of 4": "LoKr"}.get(kind, kind)
    fresh = base.family.build(base)
    merge_into(fresh, read, 1.0)
    assert max(distances(predicted(fresh), trained).values()) < 1e-4
    assert {name for name, tensor in lent_tensors(base).items() if not torch.equal(tensor, lent[name])} == set()


@pytest.mark.parametrize("alpha", [0.5, 4.0])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha"])
def test_alpha_scales_what_is_trained_as_it_scales_the_file(kind: str, alpha: float, worlds: Worlds) -> None:
    base = worlds["SD 1"].base
    settings = TrainSettings(**{**COMMON, "adapter": kind, "alpha": alpha, "text_encoder_lr": 1e-2})
    model, adapter = injected(base, settings)
    perturb(adapter)
    fresh = base.family.build(base)
    merge_into(fresh, adapter.adapter(), 1.0)
    assert max(distances(predicted(fresh), predicted(model)).values()) < 1e-4


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"  # 32 → 32
CONV = "lora_unet_down_blocks_1_resnets_0_conv1"  # 3×3, 32 → 64
FC1 = "lora_te_text_model_encoder_layers_1_mlp_fc1"  # 64 → 128
PARTS: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "LoCon": {
        Q: {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4)},
        CONV: {"lora_down.weight": (2, 32, 3, 3), "lora_up.weight": (64, 2, 1, 1)},
        FC1: {"lora_down.weight": (4, 64), "lora_up.weight": (128, 4)},
    },
    "DoRA": {
        Q: {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2), "dora_scale": (32, 1)},
        CONV: {"lora_down.weight": (2, 32, 3, 3), "lora_up.weight": (64, 2, 1, 1), "dora_scale": (64, 1, 1, 1)},
        FC1: {"lora_down.weight": (2, 64), "lora_up.weight": (128, 2), "dora_scale": (128, 1)},
    },
    "Ortho-LoRA": {
        Q: {"lora_down.weight": (8, 32), "lora_up.weight": (32, 8)},
        CONV: {"lora_down.weight": (6, 32, 3, 3), "lora_up.weight": (64, 6, 1, 1)},
        FC1: {"lora_down.weight": (8, 64), "lora_up.weight": (128, 8)},
    },
    "LoHa": {
        Q: {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)},
        CONV: {"hada_w1_a": (64, 2), "hada_w1_b": (2, 288), "hada_w2_a": (64, 2), "hada_w2_b": (2, 288)},
        FC1: {"hada_w1_a": (128, 2), "hada_w1_b": (2, 64), "hada_w2_a": (128, 2), "hada_w2_b": (2, 64)},
    },
    "LoKr": {
        Q: {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
        CONV: {"lokr_w1": (8, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 72)},
        FC1: {"lokr_w1": (8, 8), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 8)},
    },
    "LoKr of 4": {
        Q: {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
        CONV: {"lokr_w1": (4, 4), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 72)},
        FC1: {"lokr_w1": (4, 4), "lokr_w2_a": (32, 2), "lokr_w2_b": (2, 16)},
    },
    "OFT": {Q: {"oft_blocks": (8, 4, 4)}, CONV: {"oft_blocks": (8, 8, 8)}, FC1: {"oft_blocks": (32, 4, 4)}},
    "BOFT": {Q: {"oft_blocks": (4, 8, 4, 4)}, CONV: {"oft_blocks": (4, 8, 8, 8)}, FC1: {"oft_blocks": (6, 32, 4, 4)}},
}
ALPHAS = {"LoCon": {Q: 4.0, CONV: 1.0, FC1: 4.0}, "LoKr": dict.fromkeys((Q, CONV, FC1), 2.0)}
ALPHAS |= {"LoKr of 4": ALPHAS["LoKr"], "Ortho-LoRA": {Q: 6.0, CONV: 6.0, FC1: 6.0}}
ALPHAS |= dict.fromkeys(("OFT", "BOFT"), dict.fromkeys((Q, CONV, FC1), 0.0))  # no limit


@pytest.mark.parametrize("kind", PARTS)
def test_files_have_the_names_of_kohya_and_lycoris(kind: str, worlds: Worlds, tmp_path: Path) -> None:
    _, adapter = injected(worlds["SD 1"].base, settings_of(kind))
    write_adapter(tmp_path / "dog.safetensors", adapter.adapter(), torch.float16)
    tensors = load_file(tmp_path / "dog.safetensors")
    for name, parts in PARTS[kind].items():
        found = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        assert float(found.pop("alpha")) == ALPHAS.get(kind, {}).get(name, 1.0)
        assert {part: tuple(tensor.shape) for part, tensor in found.items()} == parts
    assert {key.split(".", 1)[1] for key in tensors} == {part for one in PARTS[kind].values() for part in one} | {
        "alpha"
    }


def test_rank_stabilised_alphas_are_written_for_programs_that_divide_by_the_rank(worlds: Worlds) -> None:
    _, adapter = injected(worlds["SD 1"].base, settings_of("rsLoRA"))
    for layer in adapter.adapter().layers.values():
        assert layer.alpha / layer.rank == pytest.approx(3.0 / math.sqrt(4))


def test_sdxl_has_the_names_of_the_original_code(worlds: Worlds) -> None:
    _, adapter = injected(worlds["SDXL"].base, settings_of("LoCon", "SDXL"))
    for name in (
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k",
        "lora_unet_middle_block_0_in_layers_2",
        "lora_unet_output_blocks_0_1_proj_in",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_2_mlp_fc2",
    ):
        assert name in adapter.layers


# Precision and gradients


STEPPED = ["LoCon", "DoRA", "LoHa", "LoKr", "OFT", "BOFT", "T-LoRA", "Ortho-LoRA"]


@pytest.mark.parametrize("kind", mostly_slow(STEPPED, "LoCon"))
def test_a_bf16_step_trains_float32_parameters(kind: str, worlds: Worlds, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        changes = {**KINDS[kind], **TEXT, "precision": precision}
        recipe = worlds["SD 1"].recipe(tmp_path / precision, **changes)
        recipe.open_run()
        recipe.prepare()
        before = [parameter.detach().clone() for parameter in recipe.session.trainable.parameters()]
        losses[precision] = float(recipe.train_step(1.0))
        losses[precision] += float(recipe.train_step(1.0))
        assert {parameter.dtype for parameter in recipe.session.trainable.parameters()} == {torch.float32}
        unmoved = [torch.equal(*pair) for pair in zip(before, recipe.session.trainable.parameters(), strict=True)]
        assert not any(unmoved)
        networks = (recipe.session.model.denoiser, *recipe.session.model.text_encoders.values())
        frozen = {
            parameter.dtype
            for network in networks
            for name, parameter in network.named_parameters()
            if not parameter.requires_grad and ".initial_" not in name  # what the adapter itself was at the start
        }
        assert frozen == {torch.bfloat16 if precision == "bf16" else torch.float32}
        recipe.clean_up()
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


READ = [("LoRA", "SD 1"), ("DoRA", "SD 1"), ("LoHa", "SD 1"), ("LoKr", "SD 1"), ("LoCon", "SDXL"), ("BOFT", "SD 1")]


@pytest.mark.parametrize(("kind", "family"), mostly_slow(CASES, *READ))
def test_gradients_reach_all_that_is_read(kind: str, family: str, worlds: Worlds) -> None:
    """SDXL reads the first text encoder's last layer but one, so the last gets none; the second is read to its end."""
    base = worlds[family].base
    model, adapter = injected(base, settings_of(kind, family))
    perturb(adapter)
    ids = model.tokenize(["a photo of sks dog", "a red ball"])
    said = {"size": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    for encoder in model.text_encoders:
        said |= model.encode_tokens(encoder, ids[f"ids{encoder.removeprefix('text_encoder')}"])
    noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(5))
    model.predict(noise, torch.tensor([TIMESTEP] * 2), said).square().mean().backward()
    for name, layer in adapter.layers.items():
        unread = family == "SDXL" and name.startswith("lora_te1_text_model_encoder_layers_2_")
        for part, parameter in layer.parameters.items():
            if unread:
                assert parameter.grad is None, (name, part)
            else:
                assert parameter.grad is not None, (name, part)
                assert parameter.grad.isfinite().all(), (name, part)
                assert parameter.grad.any(), (name, part)
    trained = {id(parameter) for parameter in adapter.parameters()}
    for network in (model.denoiser, *model.text_encoders.values()):
        assert all(id(p) in trained or (p.grad is None and not p.requires_grad) for p in network.parameters())


# Dropout and the limit of the norm


@pytest.mark.parametrize("kind", mostly_slow(["LoRA", "DoRA"], "LoRA"))
def test_dropout_changes_the_course_and_is_repeatable(kind: str, worlds: Worlds, tmp_path: Path) -> None:
    with_it, again, without = (
        worlds["SD 1"].train(tmp_path / str(number), **{**KINDS[kind], **TEXT, "dropout": dropout, "steps": 2})
        for number, dropout in enumerate((0.3, 0.3, 0.0))
    )
    ours, same, others = (load_file(result.path) for result in (with_it, again, without))
    assert all(torch.equal(tensor, same[name]) for name, tensor in ours.items())
    moved = [name for name, tensor in ours.items() if not torch.equal(tensor, others[name])]
    assert {name.split(".")[0] for name in moved} == {name.split(".")[0] for name in ours}


@pytest.mark.parametrize("kind", mostly_slow(["rsLoRA", "DoRA", "LoHa", "LoKr"], "rsLoRA", "LoHa"))
def test_no_change_is_ever_longer_than_its_limit(kind: str, worlds: Worlds, tmp_path: Path) -> None:
    limit = 0.3
    recipe = worlds["SD 1"].recipe(tmp_path, **{**KINDS[kind], **TEXT, "max_norm": limit, "learning_rate": 0.1})
    recipe.open_run()
    recipe.prepare()
    reached = 0
    for _ in range(3):
        recipe.train_step(1.0)
        saved = recipe.session.trainable.saved({}).adapter
        assert saved is not None
        for name, layer in saved.layers.items():
            if isinstance(layer, LoraLayer):
                layer = LoraLayer(layer.down, layer.up, layer.alpha)
            norm = float(torch.linalg.vector_norm(layer.delta()))
            assert norm <= limit * (1 + 1e-5), name
            reached += norm > limit * (1 - 1e-3)
    assert reached > 0
    recipe.clean_up()


@pytest.mark.parametrize("kind", ["OFT", "BOFT"])
def test_no_rotation_is_ever_wider_than_its_limit(kind: str, worlds: Worlds) -> None:
    """The norm of Q over all blocks, which is LyCORIS's; a rotation within it stays as it is."""
    _, adapter = injected(worlds["SD 1"].base, settings_of(kind, max_norm=0.5))
    perturb(adapter, 0.02)
    before = {name: layer.parameters["oft_blocks"].detach().clone() for name, layer in adapter.layers.items()}
    adapter.after_update([UNET])
    reached = 0
    for name, layer in adapter.layers.items():
        blocks = layer.parameters["oft_blocks"].detach()
        if layer.target.component != UNET:
            assert torch.equal(blocks, before[name])
            continue
        norm = float((before[name] - before[name].mT).norm())
        torch.testing.assert_close(blocks, before[name] * min(1, 0.5 / norm))
        reached += norm > 0.5
    assert 0 < reached < len(adapter.layers)


@pytest.mark.parametrize("kind", ["OFT", "BOFT"])
def test_a_rotation_changes_nothing_at_first_and_no_length_later(kind: str, worlds: Worlds) -> None:
    """To the bit at first; each column of a weight keeps its length, whatever is learned."""
    base = worlds["SD 1"].base
    model, adapter = injected(base, settings_of(kind))
    plain = predicted(built(base))
    assert all(torch.equal(value, plain[name]) for name, value in predicted(model).items())
    perturb(adapter, 0.3)
    modules = modules_by_name(built(base))
    for name, layer in adapter.adapter().layers.items():
        weight = modules[name].weight.detach()
        turned = weight + layer.delta(weight)
        torch.testing.assert_close(turned.norm(dim=0), weight.norm(dim=0))
        assert layer.delta(weight).norm() > 0.3 * weight.norm()


# Which layers


def chosen(base: BaseWeights, **values: Any) -> dict[str, tuple[int, float]]:
    """Component and path → rank and alpha of the adapters that the settings ask for."""
    targets = choose_targets(built(base), TrainSettings(**{**COMMON, **values}))
    return {f"{target.component} {target.path}": (target.rank, target.alpha) for target in targets}


def layers_of(base: BaseWeights, component: str = UNET) -> set[str]:
    return {f"{component} {path}" for path in adaptable_modules(built(base))[component]}


PRESETS = {
    "attention": r"\.attn[12]\.to_",
    "attention-mlp": r"\.attentions\.",
    "all": r"\.(attentions|resnets|downsamplers|upsamplers)\.",
}


@pytest.mark.parametrize("family", TEXTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str, family: str, worlds: Worlds) -> None:
    base = worlds[family].base
    layers = layers_of(base)
    assert set(chosen(base, targets=preset)) == {path for path in layers if re.search(PRESETS[preset], path)}
    texts = {path for kind in base.family.text_encoders for path in layers_of(base, kind.name)}
    expected = {path for path in texts if preset != "attention" or ".self_attn." in path} - {
        "text_encoder_2 text_projection"
    }
    assert set(chosen(base, targets=preset, **TEXTS[family])) - layers == expected


@pytest.mark.parametrize(("preset", "block"), [("b-lora-content", 0), ("b-lora-style", 1)])
def test_b_lora_is_one_block_of_sdxl(preset: str, block: int, worlds: Worlds) -> None:
    base = worlds["SDXL"].base
    found = chosen(base, targets=preset)
    attention = chosen(base, targets="attention")
    assert found == {path: one for path, one in attention.items() if f"up_blocks.0.attentions.{block}." in path}
    assert len(found) == 16
    with pytest.raises(SettingsError, match=preset) as caught:
        chosen(worlds["SD 1"].base, targets=preset)
    assert "attention-mlp" in caught.value.remedy
    assert "XL" in caught.value.remedy


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"targets": "none", "include": r"mid_block\..*to_v"}, r"mid_block\..*to_v"),
        ({"include": r"^conv_in$ time_emb_proj"}, r" conv_in$|time_emb_proj|\.attn[12]\.to_"),
        ({"exclude": r"attn2 ^up_blocks"}, r" (?!up_blocks).*\.attn1\.to_"),
        ({"targets": "none", "include": "resnets", "exclude": r"conv\d"}, r"resnets\.\d\.(time|conv_short)"),
        ({"include": "conv_out", "exclude": "."}, None),
    ],
    ids=str,
)
def test_include_and_exclude(values: dict[str, Any], expected: str | None, worlds: Worlds) -> None:
    base = worlds["SD 1"].base
    if expected is None:
        with pytest.raises(SettingsError, match="none"):
            chosen(base, **values)
    else:
        assert set(chosen(base, **values)) == {path for path in layers_of(base) if re.search(expected, path)}


def test_a_rank_stabilised_layer_has_the_root_of_its_own_rank(worlds: Worlds) -> None:
    """alpha / √rank as programs read it that divide by the rank, whatever the rank comes from."""
    values = {"targets": "all", "alpha": 3.0, "conv_rank": 5, "conv_alpha": 2.0, "rank_stabilized": True}
    found = chosen(worlds["SD 1"].base, **values, block_ranks=r"down_blocks=4:6 mid_block=3")
    assert {(rank, round(alpha, 4)) for rank, alpha in found.values()} == {
        (2, round(3 * 2**0.5, 4)),
        (3, round(3 * 3**0.5, 4)),
        (4, 12.0),
        (5, round(2 * 5**0.5, 4)),
    }


@pytest.mark.parametrize(
    ("kind", "rank", "sizes"),
    [
        ("oft", 4, {4}),
        ("oft", 24, {16}),
        ("oft", 1024, {32, 64, 128, 256, 512}),  # the outputs
        ("boft", 15, {8}),
    ],
)
def test_the_rank_of_a_rotation_is_the_size_of_its_blocks_at_most(
    kind: str, rank: int, sizes: set[int], worlds: Worlds
) -> None:
    found = chosen(worlds["SD 1"].base, adapter=kind, rank=rank, targets="all", include="^conv_in$", **TEXT)
    assert {rank for rank, _ in found.values()} == sizes
    assert {alpha for _, alpha in found.values()} == {0.0}


def test_ranks_of_blocks(worlds: Worlds) -> None:
    """The last pattern counts; 0 leaves a layer out; a rank alone has an alpha of its own."""
    base = worlds["SD 1"].base
    values = {"targets": "all", "conv_rank": 5, "conv_alpha": 2.0, "alpha": 1.0, **TEXT}
    usual = chosen(base, **values)
    found = chosen(
        base, **values, block_ranks=r"down_blocks=4 mid_block=0 down_blocks\.0=3:1.5 self_attn=1 resnets=0:1"
    )
    for path, (rank, alpha) in usual.items():
        conv = "samplers" in path
        wanted: tuple[int, float] | None = (5, 2.0) if conv else (2, 1.0)
        if "down_blocks" in path:
            wanted = (3, 1.5) if "down_blocks.0" in path else (4, 4.0)
        wanted = (1, 1.0) if "self_attn" in path else wanted
        assert found.get(path) == (None if "mid_block" in path or "resnets" in path else wanted), path
        assert (rank, alpha) == ((5, 2.0) if conv or re.search(r"resnets.*conv\d", path) else (2, 1.0)), path
    model, adapter = injected(base, TrainSettings(**{**COMMON, **TEXT, "block_ranks": "down_blocks=3:1 self_attn=5"}))
    perturb(adapter)
    fresh = base.family.build(base)
    merge_into(fresh, adapter.adapter(), 1.0)
    assert {layer.rank for layer in adapter.adapter().layers.values()} == {2, 3, 5}
    assert max(distances(predicted(fresh), predicted(model)).values()) < 1e-4


@pytest.mark.parametrize(
    ("family", "values", "told", "way_out"),
    [
        ("SD 1", {"include": "conv_nowhere"}, "conv_nowhere", "conv_in"),
        ("SD 1", {"rank": 33}, "33", "32"),
        ("SD 1", {"include": "^conv_out$", "rank": 8}, "conv_out", "block_ranks"),
        ("SD 1", {"adapter": "loha", "rank": 33}, "33", "32"),
        ("SD 1", {"adapter": "oft", "rank": 1}, "Rank 1", "at least 2"),
        ("SD 1", {"adapter": "boft", "block_ranks": "mid_block=1"}, "mid_block", "block_ranks"),
        ("SD 1", {"text_encoder_2_lr": 1e-4}, "text_encoder_2_lr", "text_encoder_lr"),
        ("SD 1", {"exclude": "attn"}, "No layers", "shorten exclude"),
        ("SD 1", {**TEXT, "exclude": "self_attn"}, "text_encoder", "shorten exclude"),
        ("SD 1", {"block_ranks": ".=0"}, "No layers", ""),
        ("SDXL", {"adapter": "full"}, "full", "Stable Diffusion 1.x"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told_with_the_way_out(
    family: str, values: dict[str, Any], told: str, way_out: str, worlds: Worlds
) -> None:
    with pytest.raises(SettingsError) as caught:
        chosen(worlds[family].base, **values)
    assert told in caught.value.problem
    assert way_out in caught.value.remedy


def test_a_lokr_may_have_any_rank(worlds: Worlds) -> None:
    """Its factors become whole where the rank is large."""
    model, adapter = injected(worlds["SD 1"].base, settings_of("LoKr", rank=1024))
    layers = adapter.adapter().layers.values()
    assert {isinstance(layer, LokrLayer) and layer.is_whole for layer in layers} == {True}
    perturb(adapter)
    fresh = worlds["SD 1"].base.family.build(worlds["SD 1"].base)
    merge_into(fresh, adapter.adapter(), 1.0)
    assert max(distances(predicted(fresh), predicted(model)).values()) < 1e-4


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"targets": "none"}, "include"),
        ({"conv_rank": 4}, "all"),
        ({"adapter": "loha", "dropout": 0.1}, "dropout"),
        ({"adapter": "lokr", "rank_stabilized": True}, "rank_stabilized"),
        ({"adapter": "oft", "dropout": 0.1}, "dropout"),
        ({"adapter": "boft", "conv_alpha": 1.0, "targets": "all"}, "conv_alpha"),
        ({"adapter": "oft", "lora_plus_ratio": 4.0}, "lora_plus_ratio"),
        ({"adapter": "oft", "combine": True}, "combine"),
        ({"adapter": "lokr", "alpha": 1.0}, "alpha"),
        ({"adapter": "lokr", "block_ranks": "mid_block=4:2"}, "block_ranks"),
        ({"lokr_factor": 4}, "lokr"),
        ({"text_encoder_until": 0.5}, "text_encoder_lr"),
        ({"block_ranks": "mid_block"}, "mid_block=32:16"),
        ({"block_ranks": "mid_block=4:0"}, "mid_block=4:0"),
        ({"include": "(attn"}, "regular expression"),
        ({"adapter": "full", "include": "conv_in"}, "include"),
        ({"adapter": "full", "max_norm": 1.0}, "max_norm"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises((SettingsError, ValidationError), match=re.escape(told)):
        TrainSettings(**{**COMMON, **values})
