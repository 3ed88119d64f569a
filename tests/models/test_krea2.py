"""Krea 2: as a host lends it, as a folder of diffusers and as three files, beside diffusers' own pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.39")
pytest.importorskip("transformers", minversion="4.57")

import diffusers
from checkpoints import sd15_state_dict
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from flux2_checkpoints import Flux2Shape, flux2_weights, in_float8
from krea2_checkpoints import SYSTEM, Krea2Shape, krea2_folder, krea2_weights
from lent_models import below
from pack.trainer.cli.inspect import inspect
from pack.trainer.core.devices import to_device
from pack.trainer.core.errors import SettingsError, TrainerError, UnsupportedModelError, WeightsError
from pack.trainer.models.families.base import BaseWeights, DiffusionModel, joined_rows
from pack.trainer.models.open import HostTensors, open_base
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import StartingPoint
from pack.trainer.training.memory.plan import MemorySaving, Planner
from pack.trainer.training.preflight import require_trainable
from safetensors.torch import save_file
from torch import Tensor
from transformer_adapters import normal
from worlds import paths_in
from zimage_checkpoints import zimage_weights

SIGHT = {"visual.patch_embed.proj.bias": torch.ones(4)}  # of what looks at pictures, which is not read
PROMPTS = ["a photo of sks dog", "", "ein Hündchen <|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return krea2_folder(tmp_path_factory.mktemp("krea2") / "krea 2 raw ü")


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionModel:
    base = open_base(folder)
    return base.family.build(base)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    """diffusers' own, which counts the tokens of the template by those of the real tokenizer."""
    loaded = diffusers.Krea2Pipeline.from_pretrained(folder)
    loaded.prompt_template_encode_start_idx = len(loaded.tokenizer(SYSTEM).input_ids)
    suffix = loaded.prompt_template_encode_suffix
    loaded.prompt_template_encode_num_suffix_tokens = len(loaded.tokenizer(suffix).input_ids)
    return loaded


def lent(folder: Path, **changes: Any) -> HostTensors:
    from transformers import AutoTokenizer

    weights = krea2_weights()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    host = HostTensors(
        weights.denoiser, weights.vae, {"qwen3vl": {**weights.text, **SIGHT}}, {"qwen3vl": tokenizer}, "raw"
    )
    return replace(host, **changes)


def test_a_folder_and_a_host_give_the_same_model(folder: Path) -> None:
    base = open_base(lent(folder))
    assert (base.family.title, base.prediction.type) == ("Krea 2", "flow")
    assert base.fingerprint == open_base(folder).fingerprint


def test_a_hosts_tensors_are_borrowed(folder: Path) -> None:
    """Nothing is copied, and nothing is left over."""
    host = lent(folder)
    base = open_base(host)
    model = base.family.build(base)
    text = {name: tensor for name, tensor in host.text_encoders["qwen3vl"].items() if "layers.35." not in name}
    for name in ("model.norm.weight", *SIGHT):
        del text[name]  # of what is not read
    networks = (
        (model.denoiser, host.denoiser),
        (model.text_encoders["text_encoder"], text),
        (model.vae, host.vae),
    )
    for network, tensors in networks:
        stored = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
        assert stored == {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}


def test_the_names_of_a_folder_lead_there_and_back(folder: Path) -> None:
    base = open_base(folder)
    written = base.family.layout.tensors_of_folder(base.denoiser.tensors)
    assert (
        written.keys() == diffusers.Krea2Transformer2DModel.from_pretrained(folder / "transformer").state_dict().keys()
    )


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (6, 10)])
@pytest.mark.parametrize("timestep", [1.0, 437.5, 1000.0])
def test_it_predicts_as_diffusers_does(
    model: DiffusionModel, pipeline: Any, size: tuple[int, int], timestep: float
) -> None:
    """Two samples with prompts of different lengths; what stands behind a prompt's end is not read."""
    noisy, timesteps = normal(2, 16, *size), torch.tensor([timestep, 500.0])
    text, lengths = normal(2, 60, 480, seed=1), torch.tensor([40, 7])
    output = pipeline.transformer(
        pipeline._pack_latents(noisy, 2, 16, *size),
        text.unflatten(-1, (12, 40)),
        timesteps / 1000,
        pipeline.prepare_position_ids(60, size[0] // 2, size[1] // 2, torch.device("cpu")),
        encoder_attention_mask=torch.arange(60) < lengths[:, None],
        return_dict=False,
    )[0]
    expected = pipeline._unpack_latents(output, 8 * size[0], 8 * size[1])[:, :, 0]
    found = model.predict(noisy, timesteps, {"text": text, "lengths": lengths})
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_sample_is_predicted_alike_alone_and_beside_a_longer_prompt(model: DiffusionModel) -> None:
    noisy, timesteps = normal(2, 16, 4, 6), torch.tensor([300.0, 700.0])
    rows = model.encode_prompts(["a dog", "a very long description of a dog " * 4])
    both = model.predict(noisy, timesteps, rows)
    alone = model.predict(noisy[:1], timesteps[:1], model.encode_prompts(["a dog"]))
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 4), (4, 7), (9, 5)])
def test_sides_of_half_a_token_are_filled_up_as_comfyui_does(model: DiffusionModel, size: tuple[int, int]) -> None:
    height, width = size
    noisy, timesteps, rows = normal(1, 16, *size), torch.tensor([500.0]), model.encode_prompts(["a dog"])
    whole = torch.nn.functional.pad(noisy, (0, width % 2, 0, height % 2), mode="circular")
    expected = model.predict(whole, timesteps, rows)[:, :, :height, :width]
    torch.testing.assert_close(model.predict(noisy, timesteps, rows), expected, rtol=0, atol=0)


@torch.no_grad()
def test_in_half_precision_neither_timesteps_nor_the_scales_of_norms_are_rounded(folder: Path) -> None:
    """Scales are counted from one: in bfloat16, small ones would vanish when it is added."""
    base = open_base(folder)
    model = base.family.build(base)
    model.denoiser.to(torch.bfloat16)
    noisy, rows = normal(1, 16, 4, 4).bfloat16(), model.encode_prompts(["a dog"])
    first, second = (model.predict(noisy, torch.tensor([timestep]), rows) for timestep in (901.0, 902.0))
    assert not torch.equal(first, second)
    norm = model.denoiser.blocks[0].norm1
    norm.weight.fill_(1e-3)
    hidden = normal(1, 3, 256)
    expected = torch.nn.functional.rms_norm(hidden, (256,), eps=1e-5) * (1 + norm.weight.float())
    torch.testing.assert_close(norm(hidden), expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_latents_are_those_of_diffusers(model: DiffusionModel, pipeline: Any) -> None:
    pixels = normal(1, 3, 64, 96).clamp(-1, 1)
    mean, std = model.family.latents.encode(model.vae, pixels)
    posterior = pipeline.vae.encode(pixels[:, :, None]).latent_dist
    centre, scale = (
        torch.tensor(pipeline.vae.config[name]).view(1, 16, 1, 1) for name in ("latents_mean", "latents_std")
    )
    torch.testing.assert_close(mean, (posterior.mean[:, :, 0] - centre) / scale)
    torch.testing.assert_close(std, posterior.std[:, :, 0] / scale)
    assert model.family.latents.shape(model.vae, 64, 96) == mean.shape[1:] == (16, 8, 12)
    assert model.family.latents.granularity(model.vae.config) == 8
    decoded = model.family.latents.decode(model.vae, mean)
    expected = pipeline.vae.decode(posterior.mean, return_dict=False)[0][:, :, 0]
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4)


def test_its_autoencoder_is_cast_and_moved(folder: Path) -> None:
    """Convolutions of videos have no channels-last layout of four dimensions."""
    base = open_base(folder)
    halved = {name: tensor.bfloat16() for name, tensor in base.vae.tensors.items()}
    model = base.family.build(replace(base, vae=replace(base.vae, tensors=halved)))
    to_device(model.vae, torch.device("cpu"), torch.float32)
    assert {parameter.dtype for parameter in model.vae.parameters()} == {torch.float32}
    to_device(model.vae, torch.device("meta"), torch.float32)
    settings = TrainSettings(resolution=64, rank=1)
    lent_base = replace(base, vae=replace(base.vae, tensors=halved))
    need = Planner(lent_base, settings, precision="bf16", start=None, priors=False).need(
        MemorySaving(checkpointing=True)
    )
    assert need.total > 0


@torch.no_grad()
def test_prompts_are_encoded_as_by_diffusers(model: DiffusionModel, pipeline: Any) -> None:
    """It pads in the middle of the template; the tokens that are read are the same."""
    expected, mask = pipeline.encode_prompt(list(PROMPTS), device=torch.device("cpu"), max_sequence_length=100)
    found = model.encode_prompts(PROMPTS)
    assert found["lengths"].tolist() == mask.sum(dim=1).tolist()
    assert found["text"].shape == (3, int(found["lengths"].max()), 12 * 40)
    for rows, is_read, text in zip(expected, mask, found["text"], strict=True):
        read = rows[is_read].flatten(1)
        torch.testing.assert_close(text[: len(read)], read, rtol=0, atol=1e-4)
        assert not text[len(read) :].any()


@torch.no_grad()
def test_rows_of_different_lengths_are_joined(model: DiffusionModel) -> None:
    """As if they had been encoded together: embeddings and tokens."""
    prompts = ["a dog", "a dog on a beach at noon"]
    for one_by_one, together in (
        ([model.encode_prompts([prompt]) for prompt in prompts], model.encode_prompts(prompts)),
        ([model.tokenize([prompt]) for prompt in prompts], model.tokenize(prompts)),
    ):
        joined = joined_rows(one_by_one)
        assert joined.keys() == together.keys()
        for name, rows in joined.items():
            torch.testing.assert_close(rows, together[name], rtol=0, atol=1e-4)


def test_a_prompt_is_too_long_beyond_512_tokens(model: DiffusionModel) -> None:
    """Those of the template behind its unread beginning included."""
    frame = int(model.encode_prompts([""])["lengths"])
    assert not model.overlong("x" * (512 - frame))
    assert model.overlong("x" * (513 - frame))
    assert model.encode_prompts(["x" * 600])["lengths"].tolist() == [512]


@pytest.mark.parametrize("size", [(16, 32, 32), (16, 128, 128), (16, 160, 160)])
def test_noise_is_shifted_by_the_size_of_the_picture(
    model: DiffusionModel, pipeline: Any, size: tuple[int, int, int]
) -> None:
    """As diffusers' pipeline samples: 1.6 at 256², 2.5 at 1024², 3.2 at 1280²."""
    tokens = size[1] * size[2] // 4
    mu = calculate_shift(tokens, 256, 6400, 0.5, 1.15)
    pipeline.scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=mu)
    scheduler = model.objective.make_scheduler("euler", 2, size, torch.device("cpu"))
    torch.testing.assert_close(scheduler.timesteps, pipeline.scheduler.timesteps.float())
    settings = TrainSettings()
    median = model.objective.timestep_at(0.5, settings, size)
    assert median == pytest.approx(float(pipeline.scheduler.timesteps[1]))


def without(tensors: Any, name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


UNUSABLE: dict[str, tuple[Callable[[HostTensors], HostTensors], str]] = {
    "a VAE of Stable Diffusion": (
        lambda host: replace(host, vae=below(sd15_state_dict(), "first_stage_model.")),
        "not the Wan",
    ),
    "a VAE of FLUX.1": (lambda host: replace(host, vae=zimage_weights().vae), "not the Wan"),
    "no VAE": (lambda host: replace(host, vae={}), "not the Wan"),
    "half a VAE": (
        lambda host: replace(host, vae=without(host.vae, "decoder.head.0.gamma")),
        r"lacks the tensor decoder\.norm_out\.gamma",
    ),
    "a tensor too many": (
        lambda host: replace(host, denoiser={**host.denoiser, "blocks.0.attn.extra.weight": torch.ones(1)}),
        r"blocks\.0\.attn\.extra\.weight",
    ),
    "a tensor missing": (
        lambda host: replace(host, denoiser=without(host.denoiser, "blocks.1.mlp.down.weight")),
        r"lacks the tensor blocks\.1\.ff\.down\.weight",
    ),
    "a text encoder of few layers": (
        lambda host: replace(
            host, text_encoders={"qwen3vl": {**flux2_weights(Flux2Shape(text_layers=28)).text, **SIGHT}}
        ),
        "28 layers",
    ),
    "a text encoder of another size": (
        lambda host: replace(
            host, text_encoders={"qwen3vl": {**flux2_weights(Flux2Shape(text_width=60, text_layers=36)).text, **SIGHT}}
        ),
        "does not match the transformer",
    ),
    "a Qwen 3 that sees nothing": (
        lambda host: replace(host, text_encoders={"qwen3vl": krea2_weights().text}),
        "is Qwen 3, but the model needs Qwen 3 VL",
    ),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_what_is_no_krea_2_is_named(folder: Path, what: str) -> None:
    change, words = UNUSABLE[what]
    with pytest.raises(TrainerError, match=words):
        open_base(change(lent(folder)))


@pytest.mark.parametrize("family", ["FLUX.2 klein", "Z-Image", "Stable Diffusion"])
def test_its_vae_is_refused_for_other_families(folder: Path, tmp_path: Path, family: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    vae = krea2_weights().vae
    if family == "Stable Diffusion":
        networks = sd15_state_dict()
        host = HostTensors(below(networks, "model.diffusion_model."), vae, {}, {}, "sd")
    else:
        weights = flux2_weights() if family == "FLUX.2 klein" else zimage_weights()
        host = HostTensors(weights.denoiser, vae, {"qwen3": weights.text}, {"qwen3": tokenizer}, "other")
    with pytest.raises(WeightsError, match="VAE"):
        open_base(host)


@pytest.mark.parametrize(("option", "value"), [("clip_skip", 2), ("prediction_type", "epsilon")])
def test_settings_of_stable_diffusion_are_refused_at_once(folder: Path, option: str, value: object) -> None:
    with pytest.raises(SettingsError, match="Krea 2"):
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


@pytest.mark.parametrize("title", ["krea2_turbo_bf16", "Krea-2-Turbo", "krea 2 turbo fp8", "krea2_turbo_drawings"])
def test_turbo_is_not_trained(folder: Path, tmp_path: Path, title: str) -> None:
    """By its name, where nothing else tells, as of a file."""
    base = replace(open_base(folder), title=title, is_distilled=None)
    with pytest.raises(UnsupportedModelError, match="distilled") as caught:
        require_trainable(base, TrainSettings(), paths_in(tmp_path), StartingPoint())
    assert "Krea 2 RAW" in caught.value.remedy


@pytest.mark.parametrize("title", ["krea2_raw_bf16", "Krea-2-Raw", "krea2_deturbo", "krea2_turbo_base", "mymodel"])
def test_base_models_are_trained(folder: Path, tmp_path: Path, title: str) -> None:
    base = replace(open_base(folder), title=title, is_distilled=None)
    require_trainable(base, TrainSettings(), paths_in(tmp_path), StartingPoint())


def test_a_folder_of_turbo_says_so(folder: Path, tmp_path: Path) -> None:
    import json

    copy = shutil.copytree(folder, tmp_path / "mine")
    index = json.loads((copy / "model_index.json").read_text(encoding="utf-8"))
    (copy / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="distilled"):
        require_trainable(open_base(copy), TrainSettings(), paths_in(tmp_path), StartingPoint())


def test_an_older_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "Krea2Transformer2DModel", None)
    monkeypatch.setattr(diffusers, "__version__", "0.37.0")
    with pytest.raises(UnsupportedModelError, match=r"Krea 2 needs diffusers 0\.39 or newer; 0\.37\.0 is installed"):
        open_base(folder)


@pytest.fixture(scope="module")
def parts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in three files, as ComfyUI's loaders take them, and the folder of the tokenizer.

    The text encoder is named as in Hugging Face's own file, beside what looks at pictures.
    """
    place = tmp_path_factory.mktemp("parts ü")
    weights = krea2_weights()
    text = {f"model.language_model.{name.removeprefix('model.')}": tensor for name, tensor in weights.text.items()}
    text["model.visual.patch_embed.proj.bias"] = torch.ones(4)
    for name, tensors in {"base": weights.denoiser, "vae": weights.vae, "text_encoder": text}.items():
        save_file(dict(tensors), place / f"{name}.safetensors")
    shutil.copytree(folder / "tokenizer", place / "tokenizer")
    return {name: place / f"{name}.safetensors" for name in ("base", "vae", "text_encoder")}


def opened(parts: dict[str, Path], **changes: Path) -> BaseWeights:
    given = {**parts, **changes}
    return open_base(given["base"], vae=given["vae"], text_encoder=given["text_encoder"])


def test_three_files_are_the_model_of_the_folder(parts: dict[str, Path], folder: Path) -> None:
    expected = open_base(folder)
    assert opened(parts).fingerprint == expected.fingerprint
    others = {"vae": folder / "vae", "text_encoder": folder / "text_encoder"}
    assert opened(parts, **others).fingerprint == expected.fingerprint


def test_a_file_of_the_transformer_alone_asks_for_the_others(parts: dict[str, Path]) -> None:
    with pytest.raises(WeightsError, match="only the transformer of Krea 2") as caught:
        open_base(parts["base"])
    assert all(word in caught.value.remedy for word in ("vae", "text_encoder", "Load Diffusion Model"))


def test_the_file_of_a_folders_transformer_asks_for_the_folder(folder: Path) -> None:
    with pytest.raises(WeightsError, match="diffusers format"):
        open_base(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_file_is_inspected_as_a_base_model(parts: dict[str, Path]) -> None:
    assert inspect(parts["base"])["family"] == "Krea 2"


@torch.no_grad()
def test_a_transformer_in_eight_bits_is_read(parts: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    stored = in_float8(krea2_weights().denoiser)
    file = tmp_path / "krea 2 fp8.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}, file)
    base = opened(parts, base=file)
    assert len(base.denoiser.scales) == sum(name.endswith("weight_scale") for name in stored) > 0
    model = base.family.build(base)
    whole = open_base(folder)
    rows = model.encode_prompts(["a dog"])
    noisy, timesteps = normal(1, 16, 4, 4), torch.tensor([500.0])
    found, plain = (one.predict(noisy, timesteps, rows) for one in (model, whole.family.build(whole)))
    assert torch.nn.functional.cosine_similarity(found.flatten(), plain.flatten(), dim=0) > 0.95


def test_a_model_of_one_block_more_is_another_one(folder: Path) -> None:
    other = open_base(lent(folder, denoiser=krea2_weights(Krea2Shape(layers=3)).denoiser))
    assert other.denoiser.config["num_layers"] == 3
    assert other.fingerprint != open_base(folder).fingerprint
