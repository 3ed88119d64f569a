"""Adapters of flow-matching models merged, resized, extracted, fused, inspected: sums of deltas, whoever wrote them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.37")
pytest.importorskip("transformers", minversion="4.51")

import anima_checkpoints
import diffusers
from adapter_maths import error, merged
from anima_checkpoints import anima_folder
from diffusers import Flux2KleinPipeline, ZImagePipeline
from flux2_checkpoints import flux2_folder
from helpers import Recorder
from krea2_checkpoints import can_be_made, krea2_folder
from merge_worlds import deltas, random_adapter, same, saved, weights_of
from pack.trainer.adapters.diffusers_format import diffusers_state_dict, write_diffusers
from pack.trainer.adapters.kohya import Adapter, parse_adapter, read_adapter
from pack.trainer.adapters.layers import LoraLayer
from pack.trainer.adapters.names import family_of
from pack.trainer.cli.inspect import facts_as_text, inspect
from pack.trainer.cli.merge import run_extract, run_fuse, run_merge, run_resize
from pack.trainer.core.errors import AdapterError
from pack.trainer.merging.merge import WeightedAdapter, merge, resize
from pack.trainer.merging.profile import profile_adapter
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.open import open_base
from pack.trainer.settings.merge import (
    ExtractCommand,
    FuseCommand,
    MergeCommand,
    MergeSettings,
    ResizeCommand,
    TruncationSettings,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from zimage_checkpoints import zimage_folder, zimage_weights

DENOISER = "^lora_unet_(?!txtfusion_projector$)"  # that has one output, and so no rank above 1


@dataclass(frozen=True)
class Kin:
    """A family.

    Attributes:
        make_folder: writes a small model.
        pipeline: of diffusers.
        title: of the family in messages about adapters.
        full_title: of the family.
        blocks: pattern of the names of modules in blocks.
        metadata: what states it in a file.
        shown: blocks of the small model, as people see them.
        same: how many modules its own files call as diffusers does; None: all.
    """

    make_folder: Callable[[Path], Path]
    pipeline: Any
    title: str
    full_title: str
    blocks: str
    metadata: dict[str, str]
    shown: list[str]
    same: int | None

    def load(self, folder: Path) -> Any:
        """The pipeline with all of its networks."""
        pipeline = self.pipeline.from_pretrained(str(folder))
        if hasattr(pipeline, "load_components"):
            pipeline.load_components()
        return pipeline


KINS = {
    "flux2": Kin(
        flux2_folder,
        Flux2KleinPipeline,
        "FLUX.2",
        "FLUX.2 klein",
        "^lora_unet_(double|single)_blocks_",
        {"ss_base_model_version": "flux_2_klein", "modelspec.architecture": "Flux.2-klein/lora"},
        ["double 0", "double 1", "single 0", "single 1", "other"],
        same=0,
    ),
    "zimage": Kin(
        zimage_folder,
        ZImagePipeline,
        "Z-Image",
        "Z-Image",
        "^lora_unet_layers_",
        {"ss_base_model_version": "z_image", "modelspec.architecture": "Z-Image/lora"},
        [f"{kind} {number}" for kind in ("layer", "noise-refiner", "context-refiner") for number in (0, 1)] + ["other"],
        same=None,
    ),
    "krea2": Kin(
        krea2_folder,
        getattr(diffusers, "Krea2Pipeline", None),  # newer than the others
        "Krea 2",
        "Krea 2",
        "^lora_unet_blocks_",
        {"ss_base_model_version": "krea2", "modelspec.architecture": "Krea-2/lora"},
        ["block 0", "block 1", "other"],
        same=2,
    ),
    "anima": Kin(
        anima_folder,
        getattr(diffusers, "AnimaModularPipeline", None),
        "Anima",
        "Anima",
        "^lora_unet_blocks_",
        {"ss_base_model_version": "anima", "modelspec.architecture": "anima-preview/lora"},
        ["block 0", "block 1", "other"],
        same=2 * 10 + 1,  # those of the conditioner
    ),
}


@pytest.fixture(scope="module", params=KINS)
def kin(request: pytest.FixtureRequest) -> Kin:
    if request.param == "krea2" and not can_be_made():
        pytest.skip("needs diffusers 0.39 and transformers 4.57")
    if request.param == "anima" and not anima_checkpoints.can_be_made():
        pytest.skip("needs diffusers 0.39")
    return KINS[request.param]


@pytest.fixture(scope="module")
def folder(kin: Kin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kin.make_folder(tmp_path_factory.mktemp("flow") / "base")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseWeights:
    return open_base(folder)


@pytest.fixture(scope="module")
def weights(base: BaseWeights) -> dict[str, Tensor]:
    return weights_of(base)


def summed(first: dict[str, Tensor], second: dict[str, Tensor], strengths: tuple[float, float]) -> dict[str, Tensor]:
    names = first.keys() | second.keys()
    zero = torch.zeros(())
    return {
        name: strengths[0] * first.get(name, zero) + strengths[1] * second.get(name, zero) for name in sorted(names)
    }


# Merging


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr", "OFT", "full difference"])
def test_the_sum_of_two_adds_what_the_two_add(
    kind: str, kin: Kin, base: BaseWeights, weights: dict[str, Tensor]
) -> None:
    """One is of blocks alone, the other of all modules."""
    first, second = random_adapter(base, kind, kin.blocks, seed=1), random_adapter(base, "LoRA", DENOISER, seed=2)
    result = merged((first, 0.7), (second, -0.5), weights=weights).adapter
    expected = summed(deltas(first, weights), deltas(second, weights), (0.7, -0.5))
    assert same(deltas(result, weights), expected) < 1e-5
    assert family_of(result) == kin.title


@pytest.mark.parametrize("method", ["svd", "orthogonal", "ties", "dare"])
def test_every_way_of_merging_takes_them(method: str, base: BaseWeights, weights: dict[str, Tensor]) -> None:
    adapters = [random_adapter(base, "LoRA", DENOISER, seed=seed) for seed in (1, 2)]
    result = merged(*adapters, weights=weights, method=method).adapter
    assert result.layers.keys() == adapters[0].layers.keys()
    assert all(torch.isfinite(layer.delta()).all() for layer in result.layers.values())


def test_files_of_two_programs_are_one_sum(kin: Kin, base: BaseWeights, weights: dict[str, Tensor]) -> None:
    """The second with query, key and value apart, and with diffusers' last norm."""
    first, second = (random_adapter(base, "LoRA", DENOISER, seed=seed) for seed in (1, 2))
    theirs = parse_adapter(diffusers_state_dict(second, torch.float32))
    shared = theirs.layers.keys() & second.layers.keys()
    assert len(shared) == (len(second.layers) if kin.same is None else kin.same)
    result = merged(first, theirs).adapter
    expected = summed(deltas(first, weights), deltas(second, weights), (1.0, 1.0))
    assert same(deltas(result, weights), expected) < 1e-5


def test_the_command_writes_what_applies_as_the_two(kin: Kin, base: BaseWeights, folder: Path, tmp_path: Path) -> None:
    first, second = random_adapter(base, "LoRA", kin.blocks, seed=1), random_adapter(base, "DoRA", kin.blocks, seed=2)
    files = [str(saved(one, tmp_path / f"{number}.safetensors")) for number, one in enumerate((first, second))]
    values: dict[str, Any] = {"output": tmp_path / "sum.safetensors", "save_precision": "fp32", "device": "cpu"}
    path, _ = run_merge(MergeCommand(loras=tuple(files), base=folder, **values), Recorder())
    weights = weights_of(base)
    expected = summed(deltas(first, weights), deltas(second, weights), (1.0, 1.0))
    assert same(deltas(read_adapter(path), weights), expected) < 1e-5


def test_other_families_are_no_partners(kin: Kin, base: BaseWeights) -> None:
    source = torch.Generator().manual_seed(0)
    stem = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    stranger = Adapter({stem: LoraLayer(torch.randn(2, 768, generator=source), torch.randn(320, 2), 2.0)})
    both = [WeightedAdapter(random_adapter(base, "LoRA", kin.blocks), "ours"), WeightedAdapter(stranger, "theirs")]
    with pytest.raises(AdapterError, match=re.escape(kin.title)):
        merge(both, MergeSettings())


# Resizing


def test_resizing_is_the_nearest_of_that_rank(base: BaseWeights, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Ranks above what diffusers' three parts need become small again."""
    adapter = random_adapter(base, "LoRA", DENOISER, rank=4)
    result = resize(WeightedAdapter(adapter, "A"), TruncationSettings(rank=2)).adapter
    for name, delta in deltas(adapter, weights).items():
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        layer = result.layers[name]
        assert layer.rank == 2
        assert error(layer.delta(), (left[:, :2] * values[:2]) @ right[:2]) < 1e-5
    file = saved(adapter, tmp_path / "in.safetensors")
    command = ResizeCommand(lora=file, output=tmp_path / "out.safetensors", rank=2, save_precision="fp32", device="cpu")
    path, _ = run_resize(command, Recorder())
    assert same(deltas(read_adapter(path), weights), deltas(result, weights)) < 1e-5


# Extracting and fusing


def transformer_of(kin: Kin, folder: Path) -> dict[str, Tensor]:
    """As diffusers loads it."""
    tensors: dict[str, Tensor] = kin.load(folder).transformer.state_dict()
    return tensors


@pytest.fixture(scope="module")
def tuned(kin: Kin, base: BaseWeights, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with `random_adapter` of all modules in its weights, saved by diffusers."""
    path = tmp_path_factory.mktemp("tuned")
    adapter = random_adapter(base, "LoRA", DENOISER)
    file = write_diffusers(path / "lora.safetensors", adapter, torch.float32)
    pipeline = kin.load(folder)
    pipeline.load_lora_weights(str(path), weight_name=file.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(str(path / "model"))
    return path / "model"


def test_what_was_tuned_is_extracted(
    kin: Kin, base: BaseWeights, weights: dict[str, Tensor], folder: Path, tuned: Path, tmp_path: Path
) -> None:
    output = tmp_path / "extracted.safetensors"
    values: dict[str, Any] = {"output": output, "save_precision": "fp32", "device": "cpu", "rank": 3}
    path, _ = run_extract(ExtractCommand(tuned=tuned, base=folder, **values), Recorder())
    extracted = read_adapter(path)
    assert same(deltas(extracted, weights), deltas(random_adapter(base, "LoRA", DENOISER), weights)) < 1e-4
    assert {layer.rank for layer in extracted.layers.values()} == {3}
    assert family_of(extracted) == kin.title


def test_a_fused_folder_is_that_of_diffusers(
    kin: Kin, base: BaseWeights, folder: Path, tuned: Path, tmp_path: Path
) -> None:
    file = saved(random_adapter(base, "LoRA", DENOISER), tmp_path / "lora.safetensors")
    fused, _ = run_fuse(FuseCommand(base=folder, lora=(str(file),), output=tmp_path / "fused"), Recorder())
    assert sorted(path.name for path in fused.iterdir()) == sorted(path.name for path in folder.iterdir())
    assert same(transformer_of(kin, fused), transformer_of(kin, tuned)) < 1e-6
    assert same(transformer_of(kin, fused), transformer_of(kin, folder)) > 1e-3


# Inspecting


@pytest.mark.parametrize("is_stated", [False, True])
def test_the_family_is_shown(is_stated: bool, kin: Kin, base: BaseWeights, tmp_path: Path) -> None:
    adapter = random_adapter(base, "LoRA", DENOISER, metadata=kin.metadata if is_stated else None)
    assert family_of(adapter) == kin.title
    facts = inspect(saved(adapter, tmp_path / "lora.safetensors"), blocks=True)
    assert facts["kind"] == "LoRA"
    assert facts["modules"]["unet"]["count"] == len(adapter.layers)
    assert list(facts["blocks"]) == kin.shown
    assert facts["blocks"] == profile_adapter(adapter)
    assert kin.shown[1] in facts_as_text(facts)


def test_the_base_model_is_shown(kin: Kin, folder: Path) -> None:
    assert inspect(folder)["family"] == kin.full_title


def test_a_fused_file_has_the_adapter_in_its_joined_projections(tmp_path: Path) -> None:
    """A whole checkpoint of Z-Image, whose three projections are views of one tensor of the file."""
    weights = zimage_weights()
    prefixes = {
        "model.diffusion_model.": weights.denoiser,
        "vae.": weights.vae,
        "text_encoders.qwen3_4b.transformer.": weights.text,
    }
    tensors = {f"{prefix}{name}": tensor for prefix, part in prefixes.items() for name, tensor in part.items()}
    save_file(tensors, tmp_path / "z image.safetensors")
    down, up = torch.randn((2, 384)), torch.randn((384, 2))
    layer = LoraLayer(down, up, 2.0)
    lora = saved(Adapter({"lora_unet_layers_1_attention_to_k": layer}), tmp_path / "lora.safetensors")
    command = FuseCommand(
        base=tmp_path / "z image.safetensors", lora=(str(lora),), output=tmp_path / "fused.safetensors"
    )
    fused, _ = run_fuse(command, Recorder())
    found = load_file(fused)
    changed = {name for name, tensor in tensors.items() if not torch.equal(found[name], tensor)}
    name = "model.diffusion_model.layers.1.attention.qkv.weight"
    assert changed == {name}
    assert found.keys() == tensors.keys()
    change = found[name] - tensors[name]
    torch.testing.assert_close(change[384:768], up @ down, rtol=0, atol=1e-4)
    assert not change[:384].any()
    assert not change[768:].any()
