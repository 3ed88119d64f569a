"""FLUX.2 klein is opened from a folder and from a host alike, borrows its weights, and computes as diffusers does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.37")
pytest.importorskip("transformers", minversion="4.51")

import diffusers
from checkpoints import sd15_state_dict
from flux2_checkpoints import Flux2Shape, flux2_folder, flux2_weights, in_float8
from lent_models import below
from pack.trainer.core.devices import to_device
from pack.trainer.core.errors import SettingsError, TrainerError, UnsupportedModelError, WeightsError
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.models.open import HostTensors, open_base
from pack.trainer.models.sampling import GenerationConfig, generate
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import StartingPoint
from pack.trainer.training.preflight import require_trainable
from safetensors.torch import save_file
from torch import Tensor
from worlds import paths_in

PROMPTS = ["a photo of sks dog", "", "ein Hündchen <|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux2_folder(tmp_path_factory.mktemp("flux2") / "klein base ü")


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionModel:
    base = open_base(folder)
    return base.family.build(base)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return diffusers.Flux2KleinPipeline.from_pretrained(folder)


def lent(folder: Path, *, norms: str = "weight", **changes: Any) -> HostTensors:
    from transformers import AutoTokenizer

    weights = flux2_weights(norms=norms)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    host = HostTensors(weights.denoiser, weights.vae, {"qwen3": weights.text}, {"qwen3": tokenizer}, "klein base")
    return replace(host, **changes)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norms", ["scale", "weight"])
def test_a_folder_and_a_host_give_the_same_model(folder: Path, norms: str) -> None:
    base = open_base(lent(folder, norms=norms))
    assert (base.family.title, base.prediction.type) == ("FLUX.2 klein", "flow")
    assert base.fingerprint == open_base(folder).fingerprint


def test_a_hosts_tensors_are_borrowed(folder: Path) -> None:
    """All of the denoiser, the autoencoder and the text encoder: nothing is copied, and nothing is left over."""
    host = lent(folder)
    base = open_base(host)
    model = base.family.build(base)
    text = {name: tensor for name, tensor in host.text_encoders["qwen3"].items() if "layers.27." not in name}
    del text["model.norm.weight"]  # of what is not read
    for network, tensors in ((model.denoiser, host.denoiser), (model.text_encoders["text_encoder"], text)):
        stored = {parameter.data_ptr() for parameter in network.parameters()}
        assert stored == {tensor.data_ptr() for tensor in tensors.values()}
    stored = {tensor.data_ptr() for tensor in model.vae.state_dict().values()}
    assert {tensor.data_ptr() for tensor in host.vae.values()} == stored


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (6, 3)])
@pytest.mark.parametrize("timestep", [1.0, 437.5, 1000.0])
def test_it_predicts_as_diffusers_does(
    model: DiffusionModel, pipeline: Any, size: tuple[int, int], timestep: float
) -> None:
    noisy, text = normal(2, 128, *size), normal(2, 512, 96, seed=1)
    timesteps = torch.tensor([timestep, 500.0])
    places = pipeline._prepare_latent_ids(noisy)
    tokens = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy),
        encoder_hidden_states=text,
        timestep=timesteps / 1000,
        img_ids=places,
        txt_ids=pipeline._prepare_text_ids(text),
        return_dict=False,
    )[0]
    expected = pipeline._unpack_latents_with_ids(tokens, places)
    torch.testing.assert_close(model.predict(noisy, timesteps, {"text": text}), expected, rtol=0, atol=1e-5)


def test_pictures_of_no_whole_tokens_are_refused(model: DiffusionModel) -> None:
    with pytest.raises(SettingsError, match="multiples of 16") as caught:
        generate(model, "a dog", [0], GenerationConfig(width=64, height=72, steps=1))
    assert "64 × 64" in caught.value.remedy


@torch.no_grad()
def test_timesteps_are_not_rounded_in_half_precision(folder: Path) -> None:
    """diffusers rounds 901 and 902 of 1000 to the same bfloat16 number; ComfyUI does not."""
    base = open_base(folder)
    model = base.family.build(base)
    model.denoiser.to(torch.bfloat16)
    noisy, text = normal(1, 128, 4, 4).bfloat16(), normal(1, 512, 96, seed=1)
    first, second = (model.predict(noisy, torch.tensor([timestep]), {"text": text}) for timestep in (901.0, 902.0))
    assert not torch.equal(first, second)


@torch.no_grad()
def test_latents_are_those_of_diffusers(model: DiffusionModel, pipeline: Any) -> None:
    pixels = normal(1, 3, 64, 96).clamp(-1, 1)
    mean, std = model.family.latents.encode(model.vae, pixels)
    posterior = pipeline.vae.encode(pixels).latent_dist
    statistics = pipeline.vae.bn.running_mean, torch.sqrt(pipeline.vae.bn.running_var + 1e-4)
    centre, deviation = (numbers.view(1, -1, 1, 1) for numbers in statistics)
    torch.testing.assert_close(mean, (pipeline._patchify_latents(posterior.mean) - centre) / deviation)
    torch.testing.assert_close(std, pipeline._patchify_latents(posterior.std) / deviation)
    assert model.family.latents.shape(model.vae, 64, 96) == mean.shape[1:] == (128, 4, 6)
    decoded = model.family.latents.decode(model.vae, mean)
    torch.testing.assert_close(decoded, pipeline.vae.decode(posterior.mean, return_dict=False)[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_prompts_are_encoded_as_by_the_whole_language_model(model: DiffusionModel, pipeline: Any) -> None:
    """Its chat template with an empty thought, hidden states after 9, 18 and 27 of its layers, 512 tokens."""
    texts = [f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n" for p in PROMPTS]
    tokens = pipeline.tokenizer(texts, padding="max_length", max_length=512, return_tensors="pt")
    states = pipeline.text_encoder(**tokens, output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer] for layer in (9, 18, 27)], dim=-1)
    found = model.encode_prompts(PROMPTS)["text"]
    assert found.shape == (3, 512, 96)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_language_model_encodes_in_the_type_of_its_weights(folder: Path) -> None:
    """Its rotary frequencies stay in float32 and are no part of what is cast."""
    host = lent(folder)
    halves = {name: tensor.bfloat16() for name, tensor in host.text_encoders["qwen3"].items()}
    base = open_base(replace(host, text_encoders={"qwen3": halves}))
    model = base.family.build(base)
    assert model.text_dtype == torch.bfloat16
    encoder = model.text_encoders["text_encoder"]
    to_device(encoder, torch.device("cpu"), model.text_dtype)
    assert encoder.rotary_emb.inv_freq.dtype == torch.float32  # type: ignore[union-attr]
    assert {parameter.data_ptr() for parameter in encoder.parameters()} <= {half.data_ptr() for half in halves.values()}
    whole = open_base(host)
    expected = whole.family.build(whole).encode_prompts(["a photo of sks dog"])["text"]
    found = model.encode_prompts(["a photo of sks dog"])["text"].float()
    assert (
        torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99
    )  # 27 layers in half precision


def test_a_prompt_is_too_long_beyond_512_tokens(model: DiffusionModel) -> None:
    frame = len(model.tokenize([""])["ids"][0][model.tokenize([""])["ids"][0] >= 0])
    assert not model.overlong("x" * (512 - frame))
    assert model.overlong("x" * (513 - frame))
    assert model.tokenize(["x" * 600])["ids"].shape == (1, 512)


def without(tensors: Any, name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


UNUSABLE: dict[str, tuple[Callable[[HostTensors], HostTensors], str]] = {
    "a VAE of Stable Diffusion": (
        lambda host: replace(host, vae=below(sd15_state_dict(), "first_stage_model.")),
        "not the FLUX.2 VAE",
    ),
    "a tensor too many": (
        lambda host: replace(host, denoiser={**host.denoiser, "double_blocks.0.img_mod.lin.weight": torch.ones(1)}),
        "double_blocks.0.img_mod.lin.weight",
    ),
    "a tensor missing": (
        lambda host: replace(host, denoiser=without(host.denoiser, "single_blocks.1.linear2.weight")),
        "lacks the tensor single_transformer_blocks.1.attn.to_out.weight",
    ),
    "a text encoder of few layers": (
        lambda host: replace(host, text_encoders={"qwen3": flux2_weights(Flux2Shape(text_layers=12)).text}),
        "12 layers",
    ),
    "a text encoder of another size": (
        lambda host: replace(host, text_encoders={"qwen3": flux2_weights(Flux2Shape(text_width=64)).text}),
        "Qwen 3 8B|another size",
    ),
    "FLUX.2 dev": (
        lambda host: replace(host, denoiser=flux2_weights(Flux2Shape(guidance=True)).denoiser),
        "FLUX.2 dev",
    ),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_what_is_no_klein_is_named(folder: Path, what: str) -> None:
    change, words = UNUSABLE[what]
    with pytest.raises(TrainerError, match=words):
        open_base(change(lent(folder)))


@pytest.mark.parametrize(("option", "value"), [("clip_skip", 2), ("prediction_type", "epsilon")])
def test_settings_of_stable_diffusion_are_refused_at_once(folder: Path, option: str, value: object) -> None:
    with pytest.raises(SettingsError, match=r"FLUX\.2 klein"):
        open_base(folder, **{option: value})


@pytest.mark.parametrize(
    "given",
    [{"text_encoder_lr": 1e-5}, {"token_vectors": 1, "token": "sks"}, {"zero_terminal_snr": True}, {"adapter": "full"}],
    ids=lambda given: min(given),
)
def test_what_is_not_trained_is_refused_before_the_run(folder: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    settings = TrainSettings(**{"targets": "attention", "alpha": None, **given})
    with pytest.raises(SettingsError):
        require_trainable(open_base(folder), settings, paths_in(tmp_path), StartingPoint())


@pytest.mark.parametrize(
    ("title", "base"), [("flux-2-klein-4b-fp8", "FLUX.2 klein base 4B"), ("FLUX.2-klein-9B", "FLUX.2 klein base 9B")]
)
def test_distilled_models_are_not_trained(folder: Path, tmp_path: Path, title: str, base: str) -> None:
    distilled = replace(open_base(folder), title=title, is_distilled=None)
    with pytest.raises(UnsupportedModelError, match="distilled") as caught:
        require_trainable(distilled, TrainSettings(), paths_in(tmp_path), StartingPoint())
    assert base in caught.value.remedy
    assert "'base'" in caught.value.remedy


def test_what_a_folder_says_of_distillation_counts_more_than_its_name(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "e7b7dc27")
    index = json.loads((copy / "model_index.json").read_text(encoding="utf-8"))
    (copy / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="e7b7dc27 is distilled"):
        require_trainable(open_base(copy), TrainSettings(), paths_in(tmp_path), StartingPoint())
    base = replace(open_base(folder), title="flux-2-klein-4b")
    assert base.is_distilled is False
    require_trainable(base, TrainSettings(), paths_in(tmp_path), StartingPoint())


@pytest.mark.parametrize("title", ["flux-2-klein-base-4b", "FLUX.2-klein-base-9B", "mymodel"])
def test_base_models_are_trained(folder: Path, tmp_path: Path, title: str) -> None:
    require_trainable(replace(open_base(folder), title=title), TrainSettings(), paths_in(tmp_path), StartingPoint())


def test_an_older_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "Flux2Transformer2DModel", None)
    monkeypatch.setattr(diffusers, "__version__", "0.31.0")
    with pytest.raises(UnsupportedModelError, match=r"klein needs diffusers 0\.37 or newer; 0\.31\.0 is installed"):
        open_base(folder)


@pytest.fixture(scope="module")
def parts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in three files, as ComfyUI's loaders take them, and the folder of the tokenizer."""
    place = tmp_path_factory.mktemp("parts ü")
    weights = flux2_weights()
    files = {"base": weights.denoiser, "vae": weights.vae, "text_encoder": weights.text}
    for name, tensors in files.items():
        save_file(dict(tensors), place / f"{name}.safetensors")
    shutil.copytree(folder / "tokenizer", place / "tokenizer")
    return {name: place / f"{name}.safetensors" for name in files}


def opened(parts: dict[str, Path], **changes: Path) -> BaseWeights:
    given = {**parts, **changes}
    return open_base(given["base"], vae=given.get("vae"), text_encoder=given.get("text_encoder"))


def test_three_files_are_the_model_of_the_folder(parts: dict[str, Path], folder: Path) -> None:
    expected = open_base(folder)
    assert opened(parts).fingerprint == expected.fingerprint
    others = {"vae": folder / "vae", "text_encoder": folder / "text_encoder"}
    assert opened(parts, **others).fingerprint == expected.fingerprint


def test_a_checkpoint_of_all_networks_is_the_model_of_the_folder(folder: Path, tmp_path: Path) -> None:
    """With Qwen's tokenizer, not CLIP's, which a single file has otherwise."""
    weights = flux2_weights()
    prefixes = {
        "model.diffusion_model.": weights.denoiser,
        "vae.": weights.vae,
        "text_encoders.qwen3_4b.transformer.": weights.text,
    }
    tensors = {f"{prefix}{name}": tensor for prefix, part in prefixes.items() for name, tensor in part.items()}
    save_file(tensors, tmp_path / "klein base.safetensors")
    base = open_base(tmp_path / "klein base.safetensors", folder / "tokenizer")
    expected = open_base(folder)
    assert base.fingerprint == expected.fingerprint
    models = [one.family.build(one) for one in (base, expected)]
    ids, expected_ids = (model.tokenize(PROMPTS)["ids"] for model in models)
    assert torch.equal(ids, expected_ids)


def test_a_text_encoder_in_eight_bits_encodes_in_sixteen(parts: dict[str, Path], tmp_path: Path) -> None:
    text = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in flux2_weights().text.items() if tensor.ndim == 2}
    save_file({**flux2_weights().text, **text}, tmp_path / "qwen fp8.safetensors")
    shutil.copytree(parts["base"].parent / "tokenizer", tmp_path / "tokenizer")
    base = opened(parts, text_encoder=tmp_path / "qwen fp8.safetensors")
    model = base.family.build(base)
    assert model.text_dtype == torch.bfloat16
    to_device(model.text_encoders["text_encoder"], torch.device("cpu"), model.text_dtype)
    assert torch.isfinite(model.encode_prompts(["a dog"])["text"]).all()


def test_a_transformer_with_a_prefix_and_in_eight_bits_is_read(parts: dict[str, Path], tmp_path: Path) -> None:
    stored = in_float8(flux2_weights().denoiser)
    file = tmp_path / "klein base fp8.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}, file)
    base = opened(parts, base=file)
    assert len(base.denoiser.scales) == sum(name.endswith("weight_scale") for name in stored)
    base.family.build(base)


def test_a_file_of_the_transformer_alone_asks_for_the_others(parts: dict[str, Path]) -> None:
    with pytest.raises(WeightsError, match=r"only the transformer of FLUX\.2 klein") as caught:
        open_base(parts["base"])
    assert all(word in caught.value.remedy for word in ("vae", "text_encoder", "Load Diffusion Model"))
    with pytest.raises(WeightsError) as caught:
        open_base(parts["base"], vae=parts["vae"])
    assert "vae and" not in caught.value.remedy


def test_the_file_of_a_folders_transformer_asks_for_the_folder(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(WeightsError, match="diffusers format") as caught:
        open_base(file)
    assert "model_index.json" in caught.value.remedy


def test_parts_that_are_none_are_named(parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vae", "text_encoder"):
        with pytest.raises(WeightsError, match="does not exist"):
            opened(parts, **{name: tmp_path / "gone.safetensors"})
    with pytest.raises(WeightsError, match="has 0 layers"):
        opened(parts, text_encoder=parts["vae"])
    with pytest.raises(WeightsError, match=r"not the FLUX\.2"):
        opened(parts, vae=parts["text_encoder"])
    alone = shutil.copy(parts["text_encoder"], tmp_path / "alone.safetensors")
    monkeypatch.setattr("pack.trainer.models.tokenizer._holds_tokenizer", lambda folder: False)
    with pytest.raises(WeightsError, match="No tokenizer was found") as caught:
        opened(parts, text_encoder=Path(alone))
    assert "tokenizer" in caught.value.remedy


def test_a_text_encoder_is_refused_where_there_is_one(parts: dict[str, Path], folder: Path) -> None:
    with pytest.raises(SettingsError, match="text_encoder"):
        open_base(folder, text_encoder=parts["text_encoder"])
