"""Anima: as a host lends it, as a folder of diffusers and as three files, beside diffusers' own networks."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.39")

import diffusers
from anima_checkpoints import (
    AnimaFiles,
    AnimaShape,
    anima_files,
    anima_folder,
    anima_weights,
    write_target_tokenizer,
)
from checkpoints import sd15_state_dict
from flux2_checkpoints import Flux2Shape, flux2_weights, in_float8
from lent_models import below
from pack.trainer.adapters.apply import apply_to_base
from pack.trainer.adapters.kohya import parse_adapter
from pack.trainer.cli.inspect import inspect
from pack.trainer.core.errors import SettingsError, TrainerError, UnsupportedModelError, WeightsError
from pack.trainer.models.families.base import BaseWeights, DiffusionModel, joined_rows
from pack.trainer.models.open import HostTensors, open_base
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import StartingPoint
from pack.trainer.training.preflight import require_trainable
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_adapters import PEFT, lora, normal
from worlds import paths_in
from zimage_checkpoints import zimage_weights

PROMPTS = ["a photo of sks dog", "an old house", "ein hund"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return anima_folder(tmp_path_factory.mktemp("anima") / "anima base ü")


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionModel:
    base = open_base(folder)
    return base.family.build(base)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    """diffusers' own."""
    loaded = diffusers.AnimaModularPipeline.from_pretrained(str(folder))
    loaded.load_components()
    return loaded


def lent(folder: Path, **changes: Any) -> HostTensors:
    from transformers import AutoTokenizer

    weights = anima_weights()
    tokenizers = {
        "qwen3": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "t5_tokenizer": AutoTokenizer.from_pretrained(folder / "t5_tokenizer"),
    }
    host = HostTensors(weights.denoiser, weights.vae, {"qwen3": weights.text}, tokenizers, "base")
    return replace(host, **changes)


def test_a_folder_and_a_host_give_the_same_model(folder: Path) -> None:
    base = open_base(lent(folder))
    assert (base.family.title, base.prediction.type) == ("Anima", "flow")
    assert base.fingerprint == open_base(folder).fingerprint


def test_a_hosts_tensors_are_borrowed(folder: Path) -> None:
    """Nothing is copied, and nothing is left over: the last norm of the language model is read, too."""
    host = lent(folder)
    base = open_base(host)
    model = base.family.build(base)
    networks = (
        (model.denoiser, host.denoiser),
        (model.text_encoders["text_encoder"], host.text_encoders["qwen3"]),
        (model.vae, host.vae),
    )
    for network, tensors in networks:
        stored = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
        assert stored == {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}


def test_the_names_of_a_folder_lead_there_and_back(folder: Path) -> None:
    base = open_base(folder)
    written = base.family.layout.tensors_of_folder(base.denoiser.tensors)
    transformer = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    conditioner = load_file(folder / "text_conditioner" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == {*transformer, *(f"llm_adapter.{name}" for name in conditioner)}


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (6, 10)])
@pytest.mark.parametrize("timestep", [1.0, 437.5, 1000.0])
def test_it_predicts_as_diffusers_does(
    model: DiffusionModel,
    pipeline: Any,
    size: tuple[int, int],
    timestep: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resize = SimpleNamespace(resize=lambda mask, size, interpolation: mask)  # torchvision's, of a mask of that size
    functions = SimpleNamespace(functional=resize, InterpolationMode=SimpleNamespace(NEAREST=None))
    monkeypatch.setattr("diffusers.models.transformers.transformer_cosmos.transforms", functions, raising=False)
    noisy, timesteps, text = normal(2, 16, *size), torch.tensor([timestep, 500.0]), normal(2, 512, 32, seed=1)
    expected = pipeline.transformer(
        hidden_states=noisy.unsqueeze(2),
        timestep=timesteps / 1000,
        encoder_hidden_states=text,
        padding_mask=torch.zeros(1, 1, *size),
        return_dict=False,
    )[0].squeeze(2)
    found = model.predict(noisy, timesteps, {"text": text})
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 4), (4, 7), (9, 5)])
def test_sides_of_half_a_token_are_filled_up_as_comfyui_does(model: DiffusionModel, size: tuple[int, int]) -> None:
    height, width = size
    noisy, timesteps, rows = normal(1, 16, *size), torch.tensor([500.0]), model.encode_prompts(["a dog"])
    whole = torch.nn.functional.pad(noisy, (0, width % 2, 0, height % 2), mode="circular")
    expected = model.predict(whole, timesteps, rows)[:, :, :height, :width]
    torch.testing.assert_close(model.predict(noisy, timesteps, rows), expected, rtol=0, atol=0)


@torch.no_grad()
def test_in_half_precision_timesteps_and_places_are_not_rounded(folder: Path) -> None:
    base = open_base(folder)
    model = base.family.build(base)
    exact = model.encode_prompts(PROMPTS)["text"]
    model.denoiser.to(torch.bfloat16)
    assert model.denoiser.llm_adapter.rotary_emb.inv_freq.dtype == torch.float32
    rounded = model.encode_prompts(PROMPTS)["text"]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.2)  # of numbers of about 1, by eight bits in ten layers
    noisy, rows = normal(1, 16, 4, 4).bfloat16(), {"text": exact[:1]}
    first, second = (model.predict(noisy, torch.tensor([timestep]), rows) for timestep in (901.0, 902.0))
    assert not torch.equal(first, second)


# Prompts


@torch.no_grad()
def test_prompts_are_encoded_as_by_diffusers(model: DiffusionModel, pipeline: Any) -> None:
    """Which pads them to the longest, and masks; here each is read alone."""
    from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

    encoded = AnimaTextEncoderStep.encode_prompt(
        pipeline, list(PROMPTS), prepare_unconditional_embeds=False, device=CPU, dtype=torch.float32
    )
    expected = pipeline.text_conditioner(
        encoded["qwen_prompt_embeds"],
        encoded["t5_input_ids"],
        target_attention_mask=encoded["t5_attention_mask"],
        source_attention_mask=encoded["qwen_attention_mask"],
    )
    found = model.encode_prompts(PROMPTS)["text"]
    assert found.shape == (3, 512, 32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    counts = [len(pipeline.t5_tokenizer(prompt).input_ids) for prompt in PROMPTS]
    assert [int(row.any(dim=1).sum()) for row in found] == counts


@torch.no_grad()
def test_nothing_is_read_as_comfyui_reads_it(model: DiffusionModel, pipeline: Any) -> None:
    """The language model reads the token for padding, and T5's tokens are the end alone."""
    padding = torch.tensor([[pipeline.tokenizer.pad_token_id]])
    source = pipeline.text_encoder(input_ids=padding).last_hidden_state
    expected = pipeline.text_conditioner(source, torch.tensor([[1]]))
    torch.testing.assert_close(model.encode_prompts([""])["text"], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_are_joined_as_if_they_were_encoded_together(model: DiffusionModel) -> None:
    prompts = ["a dog", "a dog on a beach at noon"]
    tokens = joined_rows([model.tokenize([prompt]) for prompt in prompts])
    assert torch.equal(tokens["ids"], model.tokenize(prompts)["ids"])
    texts = [model.encode_tokens("text_encoder", ids)["text"] for ids in (tokens["ids"], tokens["ids"][:1])]
    torch.testing.assert_close(texts[0][:1], texts[1], rtol=0, atol=1e-5)
    assert model.zero_conditioning()["text"].shape == (1, 512, 32)


@torch.no_grad()
def test_a_prompt_is_too_long_beyond_512_tokens_of_either_tokenizer(model: DiffusionModel) -> None:
    assert not model.overlong("x" * 510)  # and for T5 the space before it and the end
    assert model.overlong("x" * 511)
    assert model.overlong("ü" * 300)  # two bytes each, which Qwen's tokenizer here reads one by one
    assert model.encode_prompts(["x" * 600])["text"].shape == (1, 512, 32)


@torch.no_grad()
def test_an_adapter_of_what_reads_prompts_changes_them(folder: Path) -> None:
    base = open_base(folder)
    stem = "diffusion_model.llm_adapter.blocks.0.mlp.2"
    down, up = lora(32, 128, 0)
    adapter = parse_adapter({f"{stem}{PEFT[0]}": down, f"{stem}{PEFT[1]}": 0.1 * up})
    changed = apply_to_base(base, [(adapter, 1.0)])
    before, after = (one.family.build(one).encode_prompts(["a dog"])["text"] for one in (base, changed))
    assert (before - after).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(16, 32, 32), (16, 128, 128)])
def test_noise_is_shifted_by_three_in_sampling_and_not_in_training(
    model: DiffusionModel, pipeline: Any, size: tuple[int, int, int]
) -> None:
    pipeline.scheduler.set_timesteps(sigmas=[1.0, 0.5])
    scheduler = model.objective.make_scheduler("euler", 2, size, CPU)
    torch.testing.assert_close(scheduler.timesteps, pipeline.scheduler.timesteps.float())
    settings = TrainSettings()
    assert model.objective.timestep_at(0.5, settings, size) == pytest.approx(500)
    assert model.objective.timestep_at(0.8413447, settings, size) == pytest.approx(1000 / (1 + math.exp(-1)), rel=1e-5)


# What is refused


def without(tensors: Any, name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


UNUSABLE: dict[str, tuple[Callable[[HostTensors], HostTensors], str]] = {
    "a VAE of Stable Diffusion": (
        lambda host: replace(host, vae=below(sd15_state_dict(), "first_stage_model.")),
        "not the Wan",
    ),
    "a VAE of FLUX.1": (lambda host: replace(host, vae=zimage_weights().vae), "not the Wan"),
    "no VAE": (lambda host: replace(host, vae={}), "not the Wan"),
    "a tensor too many": (
        lambda host: replace(host, denoiser={**host.denoiser, "blocks.0.mlp.extra.weight": torch.ones(1)}),
        r"blocks\.0\.mlp\.extra\.weight",
    ),
    "a tensor of the conditioner too many": (
        lambda host: replace(host, denoiser={**host.denoiser, "llm_adapter.extra.weight": torch.ones(1)}),
        r"llm_adapter\.extra\.weight",
    ),
    "a tensor missing": (
        lambda host: replace(host, denoiser=without(host.denoiser, "blocks.1.mlp.layer2.weight")),
        r"lacks the tensor blocks\.1\.ff\.net\.2\.weight",
    ),
    "half a conditioner": (
        lambda host: replace(host, denoiser=without(host.denoiser, "llm_adapter.out_proj.weight")),
        r"lacks the tensor llm_adapter\.out_proj\.weight",
    ),
    "no conditioner: Cosmos Predict 2 itself": (
        lambda host: replace(
            host, denoiser={name: x for name, x in host.denoiser.items() if not name.startswith("llm_adapter.")}
        ),
        "Cosmos Predict 2",
    ),
    "a text encoder of few layers": (
        lambda host: replace(host, text_encoders={"qwen3": flux2_weights(Flux2Shape(text_layers=27)).text}),
        "27 layers",
    ),
    "a text encoder of another size": (
        lambda host: replace(
            host, text_encoders={"qwen3": flux2_weights(Flux2Shape(text_width=60, text_layers=28)).text}
        ),
        "does not match the transformer",
    ),
    "a Qwen 3 that sees": (
        lambda host: replace(
            host,
            text_encoders={"qwen3": {**anima_weights().text, "visual.patch_embed.proj.bias": torch.ones(4)}},
        ),
        "is Qwen 3 VL, but the model needs Qwen 3",
    ),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_what_is_no_anima_is_named(folder: Path, what: str) -> None:
    change, words = UNUSABLE[what]
    with pytest.raises(TrainerError, match=words):
        open_base(change(lent(folder)))


@pytest.mark.parametrize(("option", "value"), [("clip_skip", 2), ("prediction_type", "epsilon")])
def test_settings_of_stable_diffusion_are_refused_at_once(folder: Path, option: str, value: object) -> None:
    with pytest.raises(SettingsError, match="Anima"):
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


def test_what_reads_prompts_is_not_trained(folder: Path, tmp_path: Path) -> None:
    """Prompts are encoded before the first step: asked for by a pattern, or by an adapter to start from."""
    base = open_base(folder)
    stem = "diffusion_model.llm_adapter.blocks.0.mlp.2"
    down, up = lora(32, 128, 0)
    start = parse_adapter({f"{stem}{PEFT[0]}": down, f"{stem}{PEFT[1]}": up})
    asked = TrainSettings(targets="none", include="llm_adapter.*", rank=2)
    for settings, given, remedy in ((asked, None, "include"), (TrainSettings(), start, "base_lora")):
        with pytest.raises(SettingsError, match="encodes prompts") as caught:
            require_trainable(base, settings, paths_in(tmp_path), StartingPoint(given))
        assert remedy in caught.value.remedy
    require_trainable(base, TrainSettings(targets="all"), paths_in(tmp_path), StartingPoint())
    stacked = apply_to_base(base, [(start, 1.0)])
    require_trainable(stacked, TrainSettings(), paths_in(tmp_path), StartingPoint(stacked=[(start, 1.0)]))


@pytest.mark.parametrize("title", ["anima_turbo_bf16", "Anima-Lightning-8steps"])
def test_a_distilled_anima_is_not_trained(folder: Path, tmp_path: Path, title: str) -> None:
    base = replace(open_base(folder), title=title, is_distilled=None)
    with pytest.raises(UnsupportedModelError, match="distilled") as caught:
        require_trainable(base, TrainSettings(), paths_in(tmp_path), StartingPoint())
    assert "Anima's base model" in caught.value.remedy


@pytest.mark.parametrize("title", ["anima-base-v1.0", "anima-preview", "mymodel"])
def test_base_models_are_trained(folder: Path, tmp_path: Path, title: str) -> None:
    base = replace(open_base(folder), title=title, is_distilled=None)
    require_trainable(base, TrainSettings(), paths_in(tmp_path), StartingPoint())


def test_an_older_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "AnimaTextConditioner", None)
    monkeypatch.setattr(diffusers, "__version__", "0.37.0")
    with pytest.raises(UnsupportedModelError, match=r"Anima needs diffusers 0\.39 or newer; 0\.37\.0 is installed"):
        open_base(folder)


def test_a_folder_of_cosmos_is_named(folder: Path, tmp_path: Path) -> None:
    import json

    copy = shutil.copytree(folder, tmp_path / "mine")
    index = json.loads((copy / "modular_model_index.json").read_text(encoding="utf-8"))
    del index["text_conditioner"]
    (copy / "modular_model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="Cosmos Predict"):
        open_base(copy)


# Files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> AnimaFiles:
    return anima_files(tmp_path_factory.mktemp("files ü"))


def opened(files: AnimaFiles, **changes: Path) -> BaseWeights:
    given = replace(files, **changes)
    return open_base(given.transformer, vae=given.vae, text_encoder=given.text_encoder)


def test_three_files_are_the_model_of_the_folder(files: AnimaFiles, folder: Path) -> None:
    expected = open_base(folder)
    assert opened(files).fingerprint == expected.fingerprint
    assert opened(files, vae=folder / "vae").fingerprint == expected.fingerprint
    model, whole = (base.family.build(base) for base in (opened(files), expected))
    with torch.no_grad():
        texts = [one.encode_prompts(PROMPTS)["text"] for one in (model, whole)]
    assert torch.equal(texts[0], texts[1])


def test_a_whole_checkpoint_is_that_model(files: AnimaFiles, folder: Path, tmp_path: Path) -> None:
    weights = anima_weights()
    prefixes = {"model.diffusion_model.": weights.denoiser, "vae.": weights.vae}
    prefixes["text_encoders.qwen3_06b.transformer."] = weights.text
    tensors = {prefix + name: tensor for prefix, part in prefixes.items() for name, tensor in part.items()}
    save_file(tensors, tmp_path / "whole.safetensors")
    for name in ("tokenizer", "t5_tokenizer"):
        shutil.copytree(files.transformer.parent / name, tmp_path / name)
    base = open_base(tmp_path / "whole.safetensors")
    assert base.fingerprint == open_base(folder).fingerprint
    assert len(base.tokenizers) == 2


def test_the_other_tokenizer_is_asked_for(files: AnimaFiles, tmp_path: Path) -> None:
    """It is searched beside the text encoder, and beside the tokenizer that is given."""
    alone = tmp_path / "alone"
    alone.mkdir()
    text = shutil.copy(files.text_encoder, alone / "qwen.safetensors")
    given = {"vae": files.vae, "text_encoder": text, "tokenizer": alone / "tokenizer"}
    base = shutil.copy(files.transformer, alone / "anima.safetensors")
    shutil.copytree(files.transformer.parent / "tokenizer", alone / "tokenizer")
    with pytest.raises(WeightsError, match=r"No t5_tokenizer was found next to qwen\.safetensors") as caught:
        open_base(base, **given)
    assert "t5_tokenizer" in caught.value.remedy
    write_target_tokenizer(alone / "t5_tokenizer")
    assert open_base(base, **given).fingerprint == opened(files).fingerprint


def test_a_file_of_the_transformer_alone_asks_for_the_others(files: AnimaFiles) -> None:
    with pytest.raises(WeightsError, match="only the transformer of Anima") as caught:
        open_base(files.transformer)
    assert all(word in caught.value.remedy for word in ("vae", "text_encoder", "Load Diffusion Model"))


def test_a_file_is_inspected_as_a_base_model(files: AnimaFiles) -> None:
    assert inspect(files.transformer)["family"] == "Anima"


@torch.no_grad()
def test_a_transformer_in_eight_bits_is_read(files: AnimaFiles, folder: Path, tmp_path: Path) -> None:
    """Also what reads prompts."""
    stored = in_float8(anima_weights().denoiser)
    file = tmp_path / "anima fp8.safetensors"
    save_file({f"net.{name}": tensor for name, tensor in stored.items()}, file)
    base = opened(files, transformer=file)
    assert len(base.denoiser.scales) == sum(name.endswith("weight_scale") for name in stored) > 0
    model, whole = (one.family.build(one) for one in (base, open_base(folder)))
    noisy, timesteps = normal(1, 16, 4, 4), torch.tensor([500.0])
    found, plain = (one.predict(noisy, timesteps, one.encode_prompts(["a dog"])) for one in (model, whole))
    assert torch.nn.functional.cosine_similarity(found.flatten(), plain.flatten(), dim=0) > 0.95


@torch.no_grad()
def test_a_file_that_is_wholly_in_eight_bits_reads_prompts(files: AnimaFiles, folder: Path, tmp_path: Path) -> None:
    """Norms and embeddings, too, as ComfyUI casts a file; what reads prompts computes in sixteen bits."""
    file = tmp_path / "anima fp8.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in anima_weights().denoiser.items()}, file)
    base = opened(files, transformer=file)
    model, whole = (one.family.build(one) for one in (base, open_base(folder)))
    found, plain = (one.encode_prompts(["a dog"])["text"] for one in (model, whole))
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found[0, :6].flatten(), plain[0, :6].flatten(), dim=0) > 0.95


@torch.no_grad()
def test_types_may_differ_in_a_file(files: AnimaFiles, tmp_path: Path) -> None:
    file = tmp_path / "anima mixed.safetensors"
    weights = anima_weights().denoiser
    save_file({name: tensor.bfloat16() if tensor.ndim == 2 else tensor for name, tensor in weights.items()}, file)
    base = opened(files, transformer=file)
    assert base.family.build(base).encode_prompts(["a dog"])["text"].isfinite().all()


def test_what_is_computed_may_stand_in_a_file(files: AnimaFiles, tmp_path: Path) -> None:
    """Buffers, which kohya's full fine-tunes hold."""
    file = tmp_path / "anima tuned.safetensors"
    buffers = {f"pos_embedder.{name}": torch.ones(4) for name in ("seq", "dim_spatial_range", "dim_temporal_range")}
    save_file({f"net.{name}": tensor for name, tensor in {**anima_weights().denoiser, **buffers}.items()}, file)
    assert opened(files, transformer=file).fingerprint == opened(files).fingerprint


@torch.no_grad()
def test_in_fp16_what_blocks_add_leaves_its_range_unharmed(folder: Path) -> None:
    """As in ComfyUI, which adds in float32: the sums reach 1e6 here, and fp16 ends at 65504."""
    base = open_base(folder)
    large = {
        name: 300 * tensor if name.endswith(("attn1.to_out.0.weight", "ff.net.2.weight")) else tensor
        for name, tensor in base.denoiser.tensors.items()
    }
    large = {name: 30 * tensor if ".linear_2." in name and "norm" in name else tensor for name, tensor in large.items()}
    model = base.family.build(replace(base, denoiser=replace(base.denoiser, tensors=large)))
    sums: list[float] = []
    model.denoiser.blocks[-1].register_forward_hook(lambda _module, _inputs, output: sums.append(output.abs().max()))
    noisy, timesteps, text = normal(1, 16, 4, 4), torch.tensor([500.0]), normal(1, 512, 32, seed=1)
    exact = model.predict(noisy, timesteps, {"text": text})
    model.denoiser.half()
    found = model.predict(noisy.half(), timesteps, {"text": text})
    assert min(sums) > 65504
    assert found.isfinite().all()
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), exact.flatten(), dim=0) > 0.99


def test_a_model_of_one_block_more_is_another_one(folder: Path) -> None:
    other = open_base(lent(folder, denoiser=anima_weights(AnimaShape(layers=3)).denoiser))
    assert other.fingerprint != open_base(folder).fingerprint
