"""Full fine-tuning: what is trained, the checkpoint that comes out, and the LoRA that is extracted from it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from checkpoints import sd15_checkpoint
from helpers import DEMO, TINY, Recorder
from pack.trainer.adapters.apply import apply_to_base, merge_into
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.adapters.names import UNET, adaptable_modules
from pack.trainer.cli.train import run_train
from pack.trainer.core.errors import SettingsError
from pack.trainer.dreambooth import DreamBooth, TrainResult
from pack.trainer.merging.deltas import nearest_lora
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from pack.trainer.models.single_file import original_state_dict, write_single_file
from pack.trainer.settings.train import TrainCommand
from pack.trainer.training.adapter import StartingPoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from worlds import (
    COMMON,
    PROMPT,
    TEXT,
    TOKENIZER,
    World,
    conditioned,
    distances,
    lent_tensors,
    noisy_pictures,
    predicted,
)

pytestmark = pytest.mark.usefixtures("quick")

FULL: dict[str, Any] = {"adapter": "full", "learning_rate": 1e-3, "steps": 2, "targets": "all"}
UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"  # a count from 0, in older files alone


Trained = tuple[DreamBooth, TrainResult, dict[str, Tensor]]


@pytest.fixture(scope="module", params=mostly_slow(["UNet", "UNet and text encoder"], "UNet and text encoder"))
def trained(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run with its model, and the base's tensors as they were before."""
    before = {name: tensor.clone() for name, tensor in lent_tensors(world.base).items()}
    texts = TEXT if request.param != "UNet" else {}
    recipe = world.recipe(tmp_path_factory.mktemp("trained"), **FULL, **texts)
    return recipe, recipe.run(), before


def trains_text(recipe: DreamBooth) -> bool:
    return bool(recipe.settings.text_encoder_rates)


def opened(result: TrainResult) -> BaseWeights:
    """The checkpoint as a base model, beside a tokenizer."""
    assert result.checkpoint is not None
    return open_base(result.checkpoint, TOKENIZER)


# The weights


def test_borrowed_tensors_are_never_written_to(trained: Trained, world: World) -> None:
    recipe, _, before = trained
    now = lent_tensors(world.base)
    assert [name for name, tensor in before.items() if not torch.equal(tensor, now[name])] == []
    lent = {tensor.untyped_storage().data_ptr() for tensor in now.values()}
    for parameter in recipe.session.trainable.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.untyped_storage().data_ptr() not in lent


def test_all_weights_that_are_asked_for_are_trained(trained: Trained, world: World) -> None:
    recipe, result, _ = trained
    weights = load_file(result.run / "step-00000002" / "weights.safetensors")
    texts = dict(world.base.text_encoders[0].tensors) if trains_text(recipe) else {}
    assert len(weights) == len(world.base.denoiser.tensors) + len(texts)
    base = world.base.family.build(world.base)
    networks = {UNET: base.denoiser, **base.text_encoders}
    for name, tensor in weights.items():
        component, _, inner = name.partition(".")
        moved = not torch.equal(tensor, networks[component].get_parameter(inner))
        assert moved, name
        assert float((tensor - networks[component].get_parameter(inner)).detach().abs().max()) < 0.1


# The checkpoint


def test_the_checkpoint_predicts_as_the_trained_weights(trained: Trained, world: World) -> None:
    recipe, result, _ = trained
    assert result.checkpoint is not None
    base = opened(result)
    assert base.fingerprint != world.base.fingerprint
    found, start = predicted(base.family.build(base)), predicted(world.base.family.build(world.base))
    said = None if trains_text(recipe) else {name: value for name, value in start.items() if name != "prediction"}
    assert max(distances(found, predicted(recipe.session.model, said)).values()) < 1e-5
    assert distances(found, start)["prediction"] > 1e-2


def test_the_checkpoint_has_the_names_of_the_single_file(trained: Trained, tiny_checkpoint: Path) -> None:
    recipe, result, _ = trained
    assert result.checkpoint is not None
    ours, source = load_file(result.checkpoint), load_file(tiny_checkpoint)
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in source.items() if name != POSITIONS
    }
    changed = {name for name, tensor in ours.items() if not torch.equal(tensor, source[name])}
    prefixes = (UNET_PREFIX, TEXT_PREFIX) if trains_text(recipe) else (UNET_PREFIX,)
    assert changed == {name for name in ours if name.startswith(prefixes)}
    with safe_open(result.checkpoint, "pt") as file:
        told = file.metadata()
    assert told["modelspec.architecture"] == "stable-diffusion-v1"
    assert told["dreambooth.fingerprint"] == recipe.fingerprint
    assert result.adapter.metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


@pytest.mark.parametrize("size", ["tiny", TINY], ids=["one level of attention", "two levels"])
def test_unchanged_weights_go_through_bit_for_bit(size: Any, tmp_path: Path) -> None:
    source = sd15_checkpoint(tmp_path / "source.safetensors", size=size, dtype=torch.float16)
    ours = original_state_dict(open_base(source, TOKENIZER), {})
    theirs = {name: tensor for name, tensor in load_file(source).items() if name != POSITIONS}
    assert set(ours) == set(theirs)
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in diffusers' layout."""
    folder = tmp_path_factory.mktemp("folder")
    model: Any = world.base.family.build(world.base)
    model.denoiser.save_pretrained(folder / "unet")
    model.vae.save_pretrained(folder / "vae")
    model.text_encoders["text_encoder"].save_pretrained(folder / "text_encoder")
    for name in ("model_index.json", "scheduler", "tokenizer"):
        (shutil.copytree if (DEMO / "base" / name).is_dir() else shutil.copy)(DEMO / "base" / name, folder / name)
    return folder


@pytest.mark.slow
def test_a_diffusers_folder_becomes_a_single_file(folder: Path, world: World, tiny_checkpoint: Path) -> None:
    recipe = World(open_base(folder), world.subject).recipe(folder.parent, **FULL, **TEXT)
    result = recipe.run()
    assert result.checkpoint is not None
    ours, source = load_file(result.checkpoint), load_file(tiny_checkpoint)
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in source.items() if name != POSITIONS
    }
    assert all(torch.equal(tensor, source[name]) for name, tensor in ours.items() if name.startswith(VAE_PREFIX))
    found = opened(result)
    assert max(distances(predicted(found.family.build(found)), predicted(recipe.session.model)).values()) < 1e-5


def test_the_demos_base_model_has_the_layout_of_a_single_file(tmp_path: Path) -> None:
    base = open_base(DEMO / "base")
    write_single_file(tmp_path / "demo.safetensors", original_state_dict(base, {}), {}, torch.float32)
    names = set(load_file(tmp_path / "demo.safetensors"))
    assert {f"{UNET_PREFIX}input_blocks.0.0.weight", f"{VAE_PREFIX}decoder.up.0.block.0.conv1.weight"} < names
    assert all(name.startswith((UNET_PREFIX, VAE_PREFIX, f"{TEXT_PREFIX}transformer.text_model.")) for name in names)
    again = open_base(tmp_path / "demo.safetensors", TOKENIZER)
    pairs = [(again.denoiser, base.denoiser), (again.vae, base.vae), (again.text_encoders[0], base.text_encoders[0])]
    for ours, theirs in pairs:
        assert set(ours.tensors) == set(theirs.tensors)
        assert all(torch.equal(ours.tensors[name], tensor.float()) for name, tensor in theirs.tensors.items())


def test_a_model_that_a_single_file_cant_tell_is_refused(world: World, tmp_path: Path) -> None:
    """Names and shapes do not say how many heads attention has; those of the demo's base are not SD 1.x's."""
    listener = Recorder()
    with pytest.raises(SettingsError) as caught:
        World(open_base(DEMO / "base"), world.subject).train(tmp_path, listener, **{**FULL, "steps": 1})
    assert "heads" in caught.value.problem
    assert listener.losses == []


def test_the_checkpoint_has_the_precision_that_was_asked_for(trained: Trained, world: World, tmp_path: Path) -> None:
    recipe, finished, _ = trained
    shutil.copytree(finished.run, tmp_path / "runs" / finished.run.name)
    texts = TEXT if trains_text(recipe) else {}
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        result = world.train(tmp_path, **{**FULL, **texts, "save_precision": precision})
        assert result.started_from == 2
        assert result.checkpoint is not None
        assert {tensor.dtype for tensor in load_file(result.checkpoint).values()} == {dtype}
    assert len(list((tmp_path / "runs").iterdir())) == 1


# Files


@pytest.mark.slow
def test_files_are_found_again_and_never_overwritten(world: World, tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoints" / "dog.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(b"somebody's model")
    first = world.train(tmp_path, **FULL)
    listener = Recorder()
    again = world.train(tmp_path, listener, **FULL)
    assert listener.losses == []
    assert (again.checkpoint, again.path, again.run) == (first.checkpoint, first.path, first.run)
    other = world.train(tmp_path, **{**FULL, "seed": 1})
    assert len({foreign, first.checkpoint, other.checkpoint}) == 3
    assert len({first.path, other.path}) == 2
    assert foreign.read_bytes() == b"somebody's model"

    assert first.checkpoint is not None
    content = load_file(first.checkpoint)
    first.checkpoint.unlink()
    exported = world.train(tmp_path, listener, **FULL)
    assert listener.losses == []
    assert exported.checkpoint is not None
    assert all(torch.equal(tensor, content[name]) for name, tensor in load_file(exported.checkpoint).items())


def command(tiny_checkpoint: Path, folder: Path, **changes: Any) -> tuple[TrainResult, Recorder]:
    images = folder / "images"
    places = {"base": tiny_checkpoint, "output_dir": folder / "output", "device": "cpu", "instance_prompt": PROMPT}
    places["images"] = images if images.exists() else noisy_pictures(images, 3, 0)
    listener = Recorder()
    return run_train(TrainCommand.checked({**COMMON, **FULL, **places, **changes}), listener), listener


@pytest.mark.slow
def test_the_command_line_writes_both_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Into one folder, so that their names must differ."""
    for steps in ([1.0, 1.0], []):
        result, listener = command(tiny_checkpoint, tmp_path)
        assert len(listener.losses) == len(steps)
        assert result.checkpoint is not None
        assert result.checkpoint != result.path
        assert len(read_adapter(result.path).layers) == len(result.adapter.layers)
        assert UNET_PREFIX + "out.2.weight" in load_file(result.checkpoint)
        assert {result.checkpoint, result.path} == set((tmp_path / "output").glob("*.safetensors"))


@pytest.mark.parametrize("changes", [{"rank": 33}, {"rank": 4, "conv_rank": 64}], ids=str)
def test_a_rank_that_cant_be_extracted_is_told_before_training(
    changes: dict[str, Any], world: World, tmp_path: Path
) -> None:
    listener = Recorder()
    with pytest.raises(SettingsError, match="rank"):
        world.train(tmp_path, listener, **{**FULL, **changes})
    assert listener.losses == []


@pytest.mark.slow
def test_full_fine_tuning_on_top_of_an_adapter(world: World, tmp_path: Path) -> None:
    """The checkpoint holds both; the extracted LoRA what was learned now, or both if asked."""
    stacked = [(world.train(tmp_path / "first", rank=4).adapter, 0.5)]
    upper, stage = World(apply_to_base(world.base, stacked), world.subject), StartingPoint(None, stacked)
    recipe = upper.recipe(tmp_path, starting_point=stage, **FULL)
    alone = recipe.run()
    found = opened(alone)
    said = conditioned(world.base.family.build(world.base))
    assert max(distances(predicted(found.family.build(found)), predicted(recipe.session.model, said)).values()) < 1e-5
    listener = Recorder()
    whole = upper.train(tmp_path, listener, starting_point=stage, **FULL, combine=True)
    assert (listener.losses, whole.run) == ([], alone.run)
    both, at_once = world.base.family.build(world.base), world.base.family.build(world.base)
    for adapter, strength in [*stacked, (alone.adapter, 1.0)]:
        merge_into(both, adapter, strength)
    merge_into(at_once, whole.adapter, 1.0)
    assert max(distances(predicted(at_once), predicted(both)).values()) < 1e-4


# Extraction


def best_error(change: Tensor, rank: int) -> float:
    """Eckart & Young: what the rank-r part of a singular value decomposition leaves."""
    values = torch.linalg.svdvals(change.double().flatten(1))
    return float(torch.linalg.vector_norm(values[rank:]))


@pytest.mark.parametrize("rank", mostly_slow([2, 32], 2))
def test_the_extracted_lora_is_the_nearest_of_its_rank(
    rank: int, trained: Trained, world: World, tmp_path: Path
) -> None:
    """At the rank of the smallest layers these come through whole."""
    recipe, result, _ = trained
    if rank != recipe.settings.rank:
        texts = TEXT if trains_text(recipe) else {}
        result = world.train(tmp_path, **{**FULL, **texts, "rank": rank})
    weights = load_file(result.run / "step-00000002" / "weights.safetensors")
    plain = adaptable_modules(world.base.family.build(world.base))
    changes: dict[str, Tensor] = {}
    for component, modules in plain.items():
        for path, module in modules.items():
            tuned = weights.get(f"{component}.{path}.weight", weights.get(f"{component}.{path[11:]}.weight"))
            if tuned is not None:
                name = {UNET: "lora_unet_", "text_encoder": "lora_te_"}[component] + path.replace(".", "_")
                changes[name] = tuned - module.weight.detach()
    assert set(result.adapter.layers) < set(changes)
    whole = 0
    for name, layer in result.adapter.layers.items():
        error = float(torch.linalg.vector_norm(layer.delta() - changes[name].reshape(layer.shape)))
        size = float(torch.linalg.vector_norm(changes[name]))
        best = best_error(changes[name], rank)
        assert error == pytest.approx(best, rel=1e-4, abs=1e-5 * size), name
        assert (layer.rank, layer.alpha) == (rank, rank)
        whole += error < 1e-5 * size
    assert (whole > 0) == (rank == 32)


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (32, 16, 3, 3), (64, 4, 3, 3), (24, 40, 1, 1)], ids=str)
def test_the_nearest_lora(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    change = torch.randn(shape, generator=generator)
    kernel, most = shape[2:], min(shape[0], math.prod(shape[1:]))
    for rank in (1, 5, most, most + 7):
        layer = nearest_lora(change, rank)
        rank = min(rank, most)
        assert layer.rank == layer.alpha == rank
        assert tuple(layer.down.shape) == (rank, shape[1], *kernel)
        assert tuple(layer.up.shape) == (shape[0], rank, *[1] * len(kernel))
        assert layer.shape == shape
        error = float(torch.linalg.vector_norm(layer.delta() - change))
        assert error == pytest.approx(best_error(change, rank), rel=1e-4, abs=1e-4)
        lengths = [
            torch.linalg.vector_norm(part.flatten(1), dim=axis) for part, axis in ((layer.down, 1), (layer.up, 0))
        ]
        torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-3, atol=1e-4)


def low_rank(generator: torch.Generator) -> Tensor:
    return torch.randn((900, 6), generator=generator) @ torch.randn((6, 1000), generator=generator)


def falling(generator: torch.Generator) -> Tensor:
    """Singular values that fall as slowly as those of fine-tuned layers, and slower."""
    left, _ = torch.linalg.qr(torch.randn((900, 900), generator=generator))
    right, _ = torch.linalg.qr(torch.randn((1000, 900), generator=generator))
    return (left * torch.arange(1, 901) ** -0.3) @ right.T


@pytest.mark.parametrize("make", [low_rank, falling])
def test_large_matrices_come_within_a_hundredth_of_the_best(make: Callable[[torch.Generator], Tensor]) -> None:
    change = make(torch.Generator().manual_seed(4))
    before = torch.get_rng_state()
    first = nearest_lora(change, 16)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(nearest_lora(change, 16).down, first.down)
    error, size = (float(torch.linalg.vector_norm(one)) for one in (first.delta() - change, change))
    assert error <= 1.01 * best_error(change, 16) + 1e-5 * size


def test_no_change_is_extracted_as_nothing() -> None:
    layer = nearest_lora(torch.zeros(40, 30), 4)
    assert layer.rank == 1  # no direction is worth keeping
    assert not layer.delta().any()
    assert torch.isfinite(layer.down).all()
