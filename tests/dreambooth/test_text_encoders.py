"""Text encoders: which layer is read, what of them is trained, and the file that holds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from checkpoints import OPEN_CLIP_PREFIX, SD2_SHAPES, sd2_checkpoint, sdxl_checkpoint
from checkpoints_folders import diffusers_folder
from diffusers import DiffusionPipeline
from helpers import DEMO, Recorder
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import read_adapter
from pack.trainer.core.errors import SettingsError
from pack.trainer.dreambooth import TrainResult
from pack.trainer.models.families.base import BaseWeights
from pack.trainer.models.families.clip import ClipTextEncoder, text_component
from pack.trainer.models.families.sd2 import FAMILY as SD2
from pack.trainer.models.open import open_base
from torch import Tensor, nn
from transformers import CLIPTokenizer
from worlds import TOKENIZER, World, assert_same_end

pytestmark = pytest.mark.usefixtures("quick")

PROMPTS = ["photo of sks dog", "red fish in the snow"]
USUAL = {"sd1": 1, "sd2": 2, "sdxl": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {"sd1": DEMO / "base"} | {family: diffusers_folder(root / family, family) for family in ("sd2", "sdxl")}


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    return {
        "sd1": tiny_checkpoint,
        "sd2": sd2_checkpoint(root / "sd2.safetensors", size="tiny"),
        "sdxl": sdxl_checkpoint(root / "sdxl.safetensors", size="tiny"),
    }


# Which layer is read


@torch.no_grad()
def hidden_states(encoder: Any, tokenizer: Any, pad: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """All hidden states of a text encoder of transformers, and its final layer norm's idea of the last."""
    length = encoder.config.max_position_embeddings
    rows = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    output = encoder(ids, output_hidden_states=True)
    pooled = output.text_embeds if hasattr(output, "text_embeds") else output[0]
    return output.hidden_states, pooled


def text_of(base: BaseWeights) -> dict[str, Tensor]:
    model = base.family.build(base)
    for encoder in model.text_encoders.values():
        encoder.float()
    with torch.no_grad():
        return model.encode_prompts(PROMPTS)


SKIPS = {"sd1": (0, 1, 2, 3), "sd2": (0, 2, 3), "sdxl": (0, 1, 2, 3)}


@pytest.mark.parametrize(
    ("family", "clip_skip"),
    mostly_slow([(family, skip) for family in SKIPS for skip in SKIPS[family]], ("sd1", 2), ("sd2", 0), ("sdxl", 3)),
)
def test_clip_skip_counts_from_the_end(family: str, clip_skip: int, folders: dict[str, Path]) -> None:
    """SD 1 and 2 apply the final layer norm to it, SDXL does not; SD 2's folders lack the last layer."""
    pipe = DiffusionPipeline.from_pretrained(folders[family], local_files_only=True).to(torch.float32)
    ours = text_of(open_base(folders[family], clip_skip=clip_skip))
    layer = (clip_skip or USUAL[family]) - (family == "sd2")
    end = pipe.tokenizer.eos_token_id
    states, last = hidden_states(pipe.text_encoder, pipe.tokenizer, 0 if family == "sd2" else end)
    expected = states[-layer]
    if family != "sdxl":
        inner = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
        expected = inner.final_layer_norm(expected)
        assert layer != 1 or torch.equal(expected, last)
    # how sums are rounded depends on the threads; another layer is a hundred times farther away
    torch.testing.assert_close(ours["text"], expected.detach(), rtol=0, atol=1e-4)
    assert (states[-layer] - states[-layer - 1]).abs().max() > 0.01
    if family == "sdxl":
        states, pooled = hidden_states(pipe.text_encoder_2, pipe.tokenizer_2, 0)
        torch.testing.assert_close(ours["text_2"], states[-layer], rtol=0, atol=1e-4)
        torch.testing.assert_close(ours["pooled_2"], pooled, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", mostly_slow(USUAL, "sd2"))
def test_the_usual_layer_is_no_choice(family: str, folders: dict[str, Path], files: dict[str, Path]) -> None:
    unusual = 2 if family == "sd1" else 3
    for path in (folders[family], files[family]):
        plain, usual, other = (open_base(path, TOKENIZER, clip_skip=skip) for skip in (0, USUAL[family], unusual))
        assert (plain.clip_skip, usual.clip_skip, other.clip_skip) == (0, 0, unusual)
        assert plain.fingerprint == usual.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("family", "clip_skip", "there_are"),
    [("sd1", 3, "1 to 2"), ("sd2", 1, "2 to 3"), ("sd2", 4, "2 to 3"), ("sdxl", 4, "1 to 3")],
)
def test_a_layer_that_does_not_exist_is_refused(
    family: str, clip_skip: int, there_are: str, files: dict[str, Path]
) -> None:
    with pytest.raises(SettingsError, match=f"clip_skip {clip_skip} is out of range") as refusal:
        open_base(files[family], TOKENIZER, clip_skip=clip_skip)
    assert there_are in refusal.value.remedy


@pytest.mark.parametrize("there", [24, 23])
def test_sd2s_last_layer_may_be_missing(there: int) -> None:
    """diffusers' script that writes single files leaves out the layer that nobody reads; 23 are read in any case."""
    entries = SD2_SHAPES["full"].text_encoders()[OPEN_CLIP_PREFIX]
    tensors = {name: torch.empty(dims, device="meta") for name, dims in entries if there == 24 or ".23." not in name}
    [kind] = SD2.text_encoders
    component = text_component(tensors, kind)
    assert component.config["num_hidden_layers"] == 23
    encoder = ClipTextEncoder(kind, component, CLIPTokenizer.from_pretrained(TOKENIZER), clip_skip=0)
    assert len(encoder.network.state_dict()) == 23 * 16 + 4


# What is trained

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("sd1", {"text_encoder_lr": 1e-3}),
    "sd2": ("sd2", {"text_encoder_lr": 1e-3}),
    "sdxl": ("sdxl", {"text_encoder_lr": 1e-3, "text_encoder_2_lr": 3e-3}),
}
SETTINGS: dict[str, Any] = {"rank": 4, "learning_rate": 1e-3, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def worlds(tiny_world: World, xl: World, files: dict[str, Path]) -> dict[str, World]:
    return {"sd1": tiny_world, "sd2": replace(tiny_world, base=open_base(files["sd2"], TOKENIZER)), "sdxl": xl}


def layers_at(result: TrainResult, step: int, start: str) -> dict[str, Tensor]:
    adapter = read_adapter(result.run / f"step-{step:08d}" / "adapter.safetensors")
    return {
        f"{name}.{part}": tensor
        for name, layer in adapter.layers.items()
        if name.startswith(start)
        for part, tensor in layer.tensors().items()
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", mostly_slow(CASES, "sd1"))
def test_text_encoders_stay_as_they_are_after_their_time(name: str, worlds: dict[str, World], tmp_path: Path) -> None:
    family, rates = CASES[name]
    listener = Recorder()
    result = worlds[family].train(tmp_path, listener, **SETTINGS, **rates, text_encoder_until=0.5)
    prefixes = {f"lora_te{number}_" for number in (("1", "2") if family == "sdxl" else ("",))}
    for prefix in prefixes:
        at = [layers_at(result, step, prefix) for step in (1, 2, 3, 4)]
        assert at[0]
        assert not same(at[0], at[1])
        assert same(at[1], at[2])
        assert same(at[2], at[3])
    assert not same(layers_at(result, 3, "lora_unet_"), layers_at(result, 4, "lora_unet_"))
    assert sum("text encoders are frozen after step 2" in note for note in listener.notes) == 1
    assert {layer.split("text_model")[0] for layer in result.adapter.layers if "_te" in layer[:7]} == prefixes


@pytest.mark.parametrize("name", mostly_slow(CASES, "sd1"))
def test_gradient_checkpointing_changes_nothing(name: str, worlds: dict[str, World], tmp_path: Path) -> None:
    """What is computed again is dropped again."""
    family, rates = CASES[name]
    changes = {**SETTINGS, **rates, "dropout": 0.3, "steps": 1}
    plain = worlds[family].train(tmp_path / "plain", first := Recorder(), **changes)
    saving = worlds[family].train(tmp_path / "saving", second := Recorder(), **changes, gradient_checkpointing=True)
    assert first.losses == second.losses
    assert_same_end(saving, plain)


def test_each_text_encoder_has_its_own_rate(xl: World, tmp_path: Path) -> None:
    """AdamW's first step moves every number by its rate, wherever the gradient is not nothing."""
    rates = {**CASES["sdxl"][1], "learning_rate": 5e-4}
    result = xl.train(tmp_path, **{**SETTINGS, **rates, "steps": 1, "weight_decay": 0.0})
    for prefix, rate in (("lora_unet_", 5e-4), ("lora_te1_", 1e-3), ("lora_te2_", 3e-3)):
        ups = [tensor for name, tensor in layers_at(result, 1, prefix).items() if name.endswith("lora_up.weight")]
        assert max(up.abs().max().item() for up in ups) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_text_encoder_that_the_family_lacks_is_named(family: str, worlds: dict[str, World], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="text_encoder_2_lr") as refusal:
        worlds[family].train(tmp_path, text_encoder_2_lr=1e-4)
    assert "text_encoder_lr" in refusal.value.remedy


# The file


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_diffusers_reads_the_file(name: str, folders: dict[str, Path], tiny_world: World, tmp_path: Path) -> None:
    family, rates = CASES[name]
    base = open_base(folders[family])
    changes = {**SETTINGS, **rates, "learning_rate": 0.03, "targets": "attention-mlp"}
    result = replace(tiny_world, base=base).train(tmp_path, **changes)
    model = base.family.build(base)
    for network in (model.denoiser, model.vae, *model.text_encoders.values()):
        nn.Module.float(network)
    before = computed(model)
    merge_into(model, read_adapter(result.path), 1.0)
    pipe = DiffusionPipeline.from_pretrained(folders[family], local_files_only=True).to(torch.float32)
    pipe.load_lora_weights(result.path.parent, weight_name=result.path.name)
    after = computed(model)
    theirs = diffusers_computed(pipe)
    for part, ours in after.items():
        assert (ours - before[part]).abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs[part], rtol=0, atol=1e-4)


SIZES = torch.tensor([[96.0, 64, 0, 0, 64, 64]] * 2)


@torch.no_grad()
def computed(model: Any) -> dict[str, Tensor]:
    text = model.encode_prompts(PROMPTS)
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    return {**text, "prediction": model.predict(latents, torch.tensor([30, 800]), text | {"size": SIZES})}


@torch.no_grad()
def diffusers_computed(pipe: Any) -> dict[str, Tensor]:
    encoded = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    text, added = {"text": encoded[0]}, None
    if hasattr(pipe, "text_encoder_2"):
        width = pipe.text_encoder.config.hidden_size
        text = {"text": encoded[0][..., :width], "text_2": encoded[0][..., width:], "pooled_2": encoded[2]}
        added = {"text_embeds": encoded[2], "time_ids": SIZES}
    output = pipe.unet(latents, torch.tensor([30, 800]), encoded[0], added_cond_kwargs=added).sample
    return {**text, "prediction": output}
