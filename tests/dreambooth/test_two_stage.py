"""Training that builds upon adapters: going on from one, and training on top of a base that holds some."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from checkpoints import sd15_checkpoint
from helpers import TINY, Recorder
from pack.trainer.adapters.apply import apply_to_base, merge_into
from pack.trainer.adapters.kohya import Adapter, read_adapter, write_adapter
from pack.trainer.cli.train import run_train
from pack.trainer.core.errors import AdapterError, SettingsError
from pack.trainer.dreambooth import TrainResult
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.settings.train import TrainCommand, TrainSettings
from pack.trainer.training.adapter import StartingPoint, TrainableAdapter
from safetensors.torch import load_file
from worlds import (
    BOTH_TEXTS,
    COMMON,
    KINDS,
    PROMPT,
    TEXT,
    World,
    conditioned,
    differing,
    distances,
    lent_tensors,
    make_world,
    noisy_pictures,
    perturb,
    predicted,
)

pytestmark = pytest.mark.usefixtures("quick")

MIXED = {"block_ranks": "down_blocks=3:1.5 mid_block=0 self_attn=5", "exclude": "attn2.*to_v", "alpha": 0.5}
FIRST: dict[str, dict[str, Any]] = {
    "LoRA": {**MIXED, **TEXT},
    "LoCon": KINDS["LoCon"],
    "DoRA": {**KINDS["DoRA"], **TEXT},
    "LoHa": {**KINDS["LoHa"], **TEXT},
    "LoKr": KINDS["LoKr"],
    "LoKr, whole": {**KINDS["LoKr"], "rank": 4},
    "OFT": {**KINDS["OFT"], **TEXT},
    "BOFT": KINDS["BOFT"],
}
OTHERWISE = {"rank": 7, "alpha": 3.0, "targets": "attention-mlp", "seed": 9}
"""What a run that goes on from a file would be without it."""

Made = Callable[..., Adapter]


@pytest.fixture(scope="module")
def made(world: World) -> Made:
    """An adapter as training would leave it, each made once: made(world, rank=4)."""
    done: dict[str, Adapter] = {}

    def make(where: World = world, seed: int = 0, **changes: Any) -> Adapter:
        key = f"{where.base.fingerprint} {seed} {sorted(changes.items())}"
        if key not in done:
            settings = TrainSettings(**{**COMMON, "seed": seed, **changes})
            trained = TrainableAdapter(where.base.family.build(where.base), settings)
            perturb(trained)
            done[key] = trained.adapter()
        return done[key]

    return make


def texts_of(adapter: Adapter) -> dict[str, Any]:
    return TEXT if any(name.startswith("lora_te") for name in adapter.layers) else {}


def merged(base: BaseWeights, *adapters: tuple[Adapter, float]) -> dict[str, torch.Tensor]:
    """What a model with these adapters predicts."""
    model = base.family.build(base)
    for adapter, strength in adapters:
        merge_into(model, adapter, strength)
    return predicted(model)


def ranks_and_alphas(adapter: Adapter) -> dict[str, tuple[int, float]]:
    """Of every module; a LoKr of whole factors has no rank, and its alpha means nothing."""
    layers = adapter.layers.items()
    return {name: (layer.rank, 0.0 if getattr(layer, "is_whole", False) else layer.alpha) for name, layer in layers}


# Going on from a file


@pytest.mark.parametrize("kind", mostly_slow(FIRST, "LoRA"))
def test_going_on_takes_over_all_that_the_file_is(kind: str, world: World, made: Made, tmp_path: Path) -> None:
    """Whatever the settings say of kind, ranks, alpha and layers; and it begins where the file ends."""
    first = made(**FIRST[kind])
    stage, texts = StartingPoint(first), texts_of(first)
    changes = {**OTHERWISE, **texts, "steps": 1, **({"adapter": "lokr", "alpha": None} if kind == "LoKr" else {})}
    recipe = world.prepared(tmp_path / "prepared", starting_point=stage, **changes)
    for network in (recipe.session.model.denoiser, *recipe.session.model.text_encoders.values()):
        network.eval()
    expected = merged(world.base, (first, 1.0))
    said = None if texts else conditioned(world.base.family.build(world.base))
    assert max(distances(predicted(recipe.session.model, said), expected).values()) < 1e-4
    recipe.clean_up()

    result = world.train(tmp_path, starting_point=stage, **changes)
    assert result.adapter.kind == first.kind
    assert ranks_and_alphas(result.adapter) == ranks_and_alphas(first)
    further = merged(world.base, (result.adapter, 1.0))
    assert distances(further, expected)["prediction"] > 1e-3


@pytest.mark.parametrize("kind", mostly_slow(["LoRA", "LoHa", "BOFT"], "LoRA"))
def test_the_file_tells_the_kind_and_rank_that_were_trained(kind: str, world: World, tmp_path: Path) -> None:
    first = world.train(tmp_path / "first", **KINDS[kind], steps=1).adapter
    told = world.train(tmp_path, starting_point=StartingPoint(first), steps=1, **OTHERWISE).adapter.metadata
    keys = ("ss_network_module", "ss_network_dim", "ss_network_alpha")
    assert [told[key] for key in keys] == [first.metadata[key] for key in keys]


@pytest.mark.parametrize("factor", [{}, pytest.param({"lokr_factor": 4}, marks=pytest.mark.slow)], ids=["even", "of 4"])
def test_going_on_from_a_scaled_lokr(factor: dict[str, Any], world: World, made: Made, tmp_path: Path) -> None:
    """LyCORIS scales by alpha / rank, PEFT not in every version; the factors can hold it."""
    first = made(**KINDS["LoKr"], **factor)
    first = Adapter({name: replace(layer, alpha=0.7) for name, layer in first.layers.items()})  # type: ignore[type-var]
    recipe = world.prepared(tmp_path, starting_point=StartingPoint(first), adapter="lokr", **factor)
    recipe.session.model.denoiser.eval()
    expected = merged(world.base, (first, 1.0))
    said = {name: value for name, value in expected.items() if name != "prediction"}
    assert max(distances(predicted(recipe.session.model, said), expected).values()) < 1e-4


def command(tiny_checkpoint: Path, folder: Path, **changes: Any) -> tuple[TrainResult, Recorder]:
    """What the command line does, with the pictures in folder / "images"."""
    if not (folder / "images").exists():
        noisy_pictures(folder / "images", 3, 0)
    places = {"base": tiny_checkpoint, "images": folder / "images", "output_dir": folder / "output", "device": "cpu"}
    listener = Recorder()
    settings = TrainCommand.checked({**COMMON, "instance_prompt": PROMPT, "steps": 2, **places, **changes})
    return run_train(settings, listener), listener


@pytest.mark.slow
def test_a_start_counts_by_its_content_alone(tiny_checkpoint: Path, made: Made, tmp_path: Path) -> None:
    one, copy, other = (tmp_path / f"{name}.safetensors" for name in ("one", "copy", "other"))
    write_adapter(one, made(), torch.float32)
    shutil.copy(one, copy)
    write_adapter(other, made(seed=1), torch.float32)
    first, listener = command(tiny_checkpoint, tmp_path, start_from=one)
    assert len(listener.losses) == 2
    again, listener = command(tiny_checkpoint, tmp_path, start_from=copy)
    assert listener.losses == []
    assert (again.run, again.path) == (first.run, first.path)
    for start in ({"start_from": other}, {}):
        another, listener = command(tiny_checkpoint, tmp_path, **start)
        assert len(listener.losses) == 2
        assert another.run != first.run
    assert str(tmp_path) not in "".join(first.adapter.metadata.values())
    assert "one.safetensors" not in "".join(first.adapter.metadata.values())


def renamed(adapter: Adapter, *pairs: tuple[str, str]) -> Adapter:
    """The same under names of other programs."""
    names = {name: name for name in adapter.layers}
    for old, new in pairs:
        names = {name: shown.replace(old, new) for name, shown in names.items()}
    return Adapter({names[name]: layer for name, layer in adapter.layers.items()})


ONE_TEXT = (("lora_te_", "lora_te1_"),)
DIFFUSERS = (
    ("unet_input_blocks_3_1", "unet_down_blocks_1_attentions_0"),
    ("unet_middle_block_1", "unet_mid_block_attentions_0"),
    ("unet_output_blocks_0_1", "unet_up_blocks_0_attentions_0"),
    ("unet_output_blocks_1_1", "unet_up_blocks_0_attentions_1"),
)


@pytest.mark.slow
def test_going_on_from_files_with_names_of_other_programs(world: World, xl: World, made: Made, tmp_path: Path) -> None:
    for number, (where, pairs, texts) in enumerate(((world, ONE_TEXT, TEXT), (xl, DIFFUSERS, {}))):
        first = made(where, **texts)
        foreign = renamed(first, *pairs)
        assert not set(foreign.layers) & {name for name in first.layers if any(old in name for old, _ in pairs)}
        assert merged(where.base, (foreign, 1.0)).keys()
        ours, theirs = (
            where.train(tmp_path / f"{number}-{kind}", starting_point=StartingPoint(one), steps=1, **texts)
            for kind, one in (("ours", first), ("theirs", foreign))
        )
        assert differing(ours.path, theirs.path) == []


def of_another_shape(adapter: Adapter) -> Adapter:
    layers = dict(adapter.layers)
    name = min(layers)
    layers[name] = replace(layers[name], down=torch.ones(2, 65))  # type: ignore[type-var]
    return Adapter(layers)


Unfit = Callable[[World, World, Made], tuple[World, Adapter, dict[str, Any]]]
# What does not fit, and a word of the error.
UNFIT: dict[str, tuple[str, Unfit]] = {
    "SDXL's on SD 1": ("Stable Diffusion 1.x", lambda world, xl, made: (world, made(xl), {})),
    "SD 1's on SDXL": ("Stable Diffusion XL", lambda world, xl, made: (xl, made(), {})),
    "another shape": ("shape", lambda world, xl, made: (world, of_another_shape(made(**TEXT)), TEXT)),
    "text, but no rate": ("text_encoder_lr", lambda world, xl, made: (world, made(**TEXT), {})),
    "a rate, but no text": ("text_encoder_lr", lambda world, xl, made: (world, made(), TEXT)),
    "a second rate": ("text_encoder_2_lr", lambda world, xl, made: (world, made(**TEXT), BOTH_TEXTS)),
    "dropout for LoHa": ("dropout", lambda world, xl, made: (world, made(**KINDS["LoHa"]), {"dropout": 0.5})),
    "rank by timestep for LoHa": (
        "rank_schedule",
        lambda world, xl, made: (world, made(**KINDS["LoHa"]), {"rank_schedule": "timestep"}),
    ),
    "more than its rank": (
        "min_rank",
        lambda world, xl, made: (world, made(rank=4), {"rank": 8, "rank_schedule": "timestep", "min_rank": 5}),
    ),
    "two kinds": (
        "DoRA, LoRA",
        lambda world, xl, made: (
            world,
            Adapter({**made(adapter="dora", targets="all").layers, **made().layers}),
            {},
        ),
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_start_that_does_not_fit_is_refused(case: str, world: World, xl: World, made: Made, tmp_path: Path) -> None:
    told, unfit = UNFIT[case]
    where, start, changes = unfit(world, xl, made)
    with pytest.raises((AdapterError, SettingsError), match=told) as caught:
        where.train(tmp_path, starting_point=StartingPoint(start), **changes)
    assert caught.value.remedy


# On top of adapters


def stacked_world(world: World, *stacked: tuple[Adapter, float]) -> World:
    return replace(world, base=apply_to_base(world.base, stacked))


@pytest.mark.parametrize("family", mostly_slow(["SD 1", "SDXL"], "SD 1"))
def test_the_combined_file_is_both_stages_on_the_plain_base(
    family: str, world: World, xl: World, made: Made, tmp_path: Path
) -> None:
    """And so are the files one after the other, and the model that was trained."""
    plain, texts = (world, TEXT) if family == "SD 1" else (xl, BOTH_TEXTS)
    stacked = [(made(plain, **KINDS["LoCon"]), 0.7), (made(plain, **texts, seed=1), -0.5)]
    upper, stage = stacked_world(plain, *stacked), StartingPoint(None, stacked)
    changes: dict[str, Any] = {**texts, "rank": 3, "alpha": 1.0, "targets": "attention-mlp", "steps": 1}
    recipe = upper.recipe(tmp_path, starting_point=stage, combine=True, **changes)
    whole = recipe.run()
    trained = predicted(recipe.session.model)
    recipe.clean_up()
    assert distances(trained, merged(upper.base))["prediction"] > 1e-3
    assert max(distances(merged(plain.base, (read_adapter(whole.path), 1.0)), trained).values()) < 1e-4

    listener = Recorder()
    alone = upper.train(tmp_path, listener, starting_point=stage, **changes)
    assert listener.losses == []
    assert alone.run == whole.run
    assert alone.path != whole.path
    assert max(distances(merged(plain.base, *stacked, (read_adapter(alone.path), 1.0)), trained).values()) < 1e-4
    again = upper.train(tmp_path, listener, starting_point=stage, combine=True, **changes)
    assert (again.path, listener.losses) == (whole.path, [])


@pytest.mark.slow
def test_layers_of_two_names_are_combined_under_one(world: World, xl: World, made: Made, tmp_path: Path) -> None:
    """Other programs take the last of several entries for one weight, instead of their sum."""
    for number, (plain, pairs, texts) in enumerate(((world, ONE_TEXT, TEXT), (xl, DIFFUSERS, {}))):
        first = made(plain, **texts)
        files = []
        for kind, one in (("ours", first), ("theirs", renamed(first, *pairs))):
            upper = stacked_world(plain, (one, 1.0))
            changes = {**texts, "combine": True, "steps": 1, "starting_point": StartingPoint(None, [(one, 1.0)])}
            files.append(upper.train(tmp_path / f"{number}-{kind}", **changes).path)
        assert set(load_file(files[0])) == set(load_file(files[1]))
        assert differing(*files) == []


def test_the_lower_model_stays_as_it_is(world: World, made: Made, tmp_path: Path) -> None:
    first = made(**TEXT)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in lent_tensors(world.base).items()}
    upper = stacked_world(world, (first, 1.0))
    upper.train(tmp_path, starting_point=StartingPoint(None, [(first, 1.0)]), combine=True, steps=1, **TEXT)
    copies = 0
    for name, tensor in lent_tensors(world.base).items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1]), name
        copies += lent_tensors(upper.base)[name].data_ptr() != tensor.data_ptr()
    assert copies == len(first.layers) + sum(name.startswith("lora_te_") for name in first.layers)  # "text", "text_2"
    assert upper.base.fingerprint != world.base.fingerprint


@pytest.mark.slow
def test_the_command_line_trains_on_top(tiny_checkpoint: Path, world: World, made: Made, tmp_path: Path) -> None:
    """Class pictures, too, are drawn by the base with its adapters."""
    file = tmp_path / "style.safetensors"
    write_adapter(file, made(alpha=16.0), torch.float32)
    priors = {"class_prompt": "a photo of a dog", "prior_count": 1, "prior_steps": 1}
    upper, listener = command(tiny_checkpoint, tmp_path, base_lora=[f"{file}:0.8"], combine=True, **priors)
    assert len(listener.losses) == 2
    stacked = [(read_adapter(file), 0.8)]
    base = apply_to_base(world.base, stacked)
    assert f'"base_fingerprint": "{base.fingerprint}"' in upper.adapter.metadata["dreambooth.config"]
    [drawn] = (tmp_path / "output" / "class-pictures").glob("*/*.png")

    lower, _ = command(tiny_checkpoint, tmp_path, **priors)
    assert lower.run != upper.run
    [other] = set((tmp_path / "output" / "class-pictures").glob("*/*.png")) - {drawn}
    assert drawn.read_bytes() != other.read_bytes()

    alone, listener = command(tiny_checkpoint, tmp_path, base_lora=[f"{file}:0.8"], **priors)
    assert listener.losses == []
    assert alone.run == upper.run
    both = merged(world.base, *stacked, (alone.adapter, 1.0))
    assert max(distances(merged(world.base, (upper.adapter, 1.0)), both).values()) < 1e-4
    stronger, listener = command(tiny_checkpoint, tmp_path, base_lora=[f"{file}:0.9"], **priors)
    assert len(listener.losses) == 2
    assert stronger.run != upper.run


@pytest.mark.parametrize("adapter", ["dora", "loha", "lokr"])
def test_what_cant_be_added_up_is_not_combined(adapter: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="combine"):
        command(tiny_checkpoint, tmp_path, adapter=adapter, combine=True, base_lora=["style.safetensors"])
    with pytest.raises(SettingsError, match="base_lora"):
        command(tiny_checkpoint, tmp_path, combine=True)


@pytest.mark.parametrize("place", ["stacked", "start"])
@pytest.mark.parametrize("kind", ["DoRA", "LoKr"])
def test_adapters_that_cant_be_added_up_are_told_before_training(
    kind: str, place: str, world: World, made: Made, tmp_path: Path
) -> None:
    foreign, plain = made(**KINDS[kind]), made()
    stacked = [(foreign if place == "stacked" else plain, 1.0)]
    stage, listener = StartingPoint(foreign if place == "start" else None, stacked), Recorder()
    with pytest.raises(SettingsError, match="combine"):
        stacked_world(world, *stacked).train(tmp_path, listener, starting_point=stage, combine=True)
    assert listener.losses == []


def test_a_base_of_half_precision_holds_the_rounded_sum(made: Made, tmp_path: Path) -> None:
    half = make_world(
        sd15_checkpoint(tmp_path / "half.safetensors", size=TINY, dtype=torch.float16), tmp_path / "subject"
    )
    upper = stacked_world(half, (made(), 1.0))
    assert {tensor.dtype for tensor in upper.base.denoiser.tensors.values()} == {torch.float16}
    assert upper.base.fingerprint != half.base.fingerprint
    listener = Recorder()
    upper.train(tmp_path, listener, steps=1)
    assert len(listener.losses) == 1
