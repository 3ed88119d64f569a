"""Z-Image is opened from a folder, from files and from a host alike, borrows its weights, and computes as diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.36")
pytest.importorskip("transformers", minversion="4.51")

import diffusers
from checkpoints import sd15_state_dict
from flux2_checkpoints import Flux2Shape, flux2_weights, in_float8
from lent_models import below
from pack.trainer.cli.inspect import inspect
from pack.trainer.core.errors import SettingsError, TrainerError, UnsupportedModelError, WeightsError
from pack.trainer.models.families.base import BaseWeights, DiffusionModel
from pack.trainer.models.open import HostTensors, open_base
from pack.trainer.settings.train import TrainSettings
from pack.trainer.training.adapter import StartingPoint
from pack.trainer.training.preflight import require_trainable
from safetensors.torch import save_file
from torch import Tensor
from worlds import paths_in
from zimage_checkpoints import CHAT_TEMPLATE, ZImageShape, zimage_folder, zimage_weights

PROMPTS = ["a photo of sks dog", "", "ein Hündchen <|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zimage_folder(tmp_path_factory.mktemp("zimage") / "z image ü")


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionModel:
    base = open_base(folder)
    return base.family.build(base)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    loaded = diffusers.ZImagePipeline.from_pretrained(folder)
    loaded.tokenizer.chat_template = CHAT_TEMPLATE
    return loaded


def lent(folder: Path, **changes: Any) -> HostTensors:
    from transformers import AutoTokenizer

    weights = zimage_weights()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    host = HostTensors(weights.denoiser, weights.vae, {"qwen3": weights.text}, {"qwen3": tokenizer}, "z_image")
    return replace(host, **changes)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_folder_and_a_host_give_the_same_model(folder: Path) -> None:
    base = open_base(lent(folder))
    assert (base.family.title, base.prediction.type) == ("Z-Image", "flow")
    assert base.fingerprint == open_base(folder).fingerprint


def test_a_hosts_tensors_are_borrowed(folder: Path) -> None:
    """Nothing is copied, and nothing is left over: query, key and value are views of the host's one tensor."""
    host = lent(folder)
    base = open_base(host)
    model = base.family.build(base)
    text = {name: tensor for name, tensor in host.text_encoders["qwen3"].items() if "layers.35." not in name}
    del text["model.norm.weight"]  # of what is not read
    networks = (
        (model.denoiser, host.denoiser),
        (model.text_encoders["text_encoder"], text),
        (model.vae, host.vae),
    )
    for network, tensors in networks:
        stored = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
        assert stored == {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (6, 10)])
@pytest.mark.parametrize("timestep", [1.0, 437.5, 1000.0])
def test_it_predicts_as_diffusers_does(
    model: DiffusionModel, pipeline: Any, size: tuple[int, int], timestep: float
) -> None:
    """Two samples with prompts of different lengths."""
    noisy, timesteps = normal(2, 16, *size), torch.tensor([timestep, 500.0])
    text, lengths = normal(2, 512, 32, seed=1), torch.tensor([40, 7])
    outputs = pipeline.transformer(
        list(noisy.unsqueeze(2).unbind()),
        (1000 - timesteps) / 1000,
        [row[:length] for row, length in zip(text, lengths.tolist(), strict=True)],
        return_dict=False,
    )[0]
    found = model.predict(noisy, timesteps, {"text": text, "lengths": lengths})
    assert found.std() > 0.1
    torch.testing.assert_close(found, -torch.stack(outputs).squeeze(2), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_sample_is_predicted_alike_alone_and_beside_a_longer_prompt(model: DiffusionModel) -> None:
    noisy, timesteps = normal(2, 16, 4, 6), torch.tensor([300.0, 700.0])
    rows = model.encode_prompts(["a dog", "a very long description of a dog " * 4])
    both = model.predict(noisy, timesteps, rows)
    alone = model.predict(noisy[:1], timesteps[:1], {name: row[:1] for name, row in rows.items()})
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
def test_timesteps_are_not_rounded_in_half_precision(folder: Path) -> None:
    base = open_base(folder)
    model = base.family.build(base)
    model.denoiser.to(torch.bfloat16)
    noisy, rows = normal(1, 16, 4, 4).bfloat16(), model.encode_prompts(["a dog"])
    first, second = (model.predict(noisy, torch.tensor([timestep]), rows) for timestep in (901.0, 902.0))
    assert not torch.equal(first, second)


@torch.no_grad()
def test_latents_are_those_of_diffusers(model: DiffusionModel, pipeline: Any) -> None:
    pixels = normal(1, 3, 64, 96).clamp(-1, 1)
    mean, std = model.family.latents.encode(model.vae, pixels)
    posterior = pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.1159) * 0.3611)
    torch.testing.assert_close(std, posterior.std * 0.3611)
    assert model.family.latents.shape(model.vae, 64, 96) == mean.shape[1:] == (16, 8, 12)
    decoded = model.family.latents.decode(model.vae, mean)
    torch.testing.assert_close(decoded, pipeline.vae.decode(posterior.mean, return_dict=False)[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_prompts_are_encoded_as_by_diffusers(model: DiffusionModel, pipeline: Any) -> None:
    expected, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    found = model.encode_prompts(PROMPTS)
    assert found["text"].shape == (3, max(map(len, expected)), 32)
    assert found["lengths"].tolist() == [len(rows) for rows in expected]
    for rows, text in zip(expected, found["text"], strict=True):
        torch.testing.assert_close(text[: len(rows)], rows, rtol=0, atol=1e-4)
        assert not text[len(rows) :].any()


def test_a_prompt_is_too_long_beyond_512_tokens(model: DiffusionModel) -> None:
    frame = int(model.encode_prompts([""])["lengths"])
    assert not model.overlong("x" * (512 - frame))
    assert model.overlong("x" * (513 - frame))
    assert model.encode_prompts(["x" * 600])["lengths"].tolist() == [512]


def without(tensors: Any, name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


UNUSABLE: dict[str, tuple[Callable[[HostTensors], HostTensors], str]] = {
    "a VAE of Stable Diffusion": (
        lambda host: replace(host, vae=below(sd15_state_dict(), "first_stage_model.")),
        "not the Z-Image VAE",
    ),
    "a VAE of FLUX.2": (lambda host: replace(host, vae=flux2_weights().vae), "not the Z-Image VAE"),
    "no VAE": (lambda host: replace(host, vae={}), "VAE has no Stable Diffusion encoder"),
    "a tensor too many": (
        lambda host: replace(host, denoiser={**host.denoiser, "layers.0.attention.gate.weight": torch.ones(1)}),
        r"layers\.0\.attention\.gate\.weight",
    ),
    "a tensor missing": (
        lambda host: replace(host, denoiser=without(host.denoiser, "layers.1.feed_forward.w2.weight")),
        r"lacks the tensor layers\.1\.feed_forward\.w2\.weight",
    ),
    "a text encoder of few layers": (
        lambda host: replace(host, text_encoders={"qwen3": flux2_weights(Flux2Shape(text_layers=28)).text}),
        "28 layers",
    ),
    "a Qwen 3 that sees": (
        lambda host: replace(
            host, text_encoders={"qwen3": {**zimage_weights().text, "visual.patch_embed.proj.bias": torch.ones(4)}}
        ),
        "is Qwen 3 VL, but the model needs Qwen 3",
    ),
    "a text encoder of another size": (
        lambda host: replace(
            host, text_encoders={"qwen3": flux2_weights(Flux2Shape(text_width=64, text_layers=36)).text}
        ),
        "does not match the transformer",
    ),
    "Lumina 2": (
        lambda host: replace(
            host,
            denoiser={
                name.replace("adaLN_modulation.0", "adaLN_modulation.1"): tensor
                for name, tensor in host.denoiser.items()
            },
        ),
        "Lumina",
    ),
    "Z-Image Omni": (
        lambda host: replace(host, denoiser={**host.denoiser, "siglip_embedder.0.weight": torch.ones(1)}),
        "siglip_embedder",
    ),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_what_is_no_z_image_is_named(folder: Path, what: str) -> None:
    change, words = UNUSABLE[what]
    with pytest.raises(TrainerError, match=words):
        open_base(change(lent(folder)))


def test_an_unused_norm_in_the_published_file_is_left_out(folder: Path) -> None:
    host = lent(folder)
    more = replace(host, denoiser={**host.denoiser, "norm_final.weight": torch.ones(384)})
    assert open_base(more).fingerprint == open_base(host).fingerprint


@pytest.mark.parametrize(("option", "value"), [("clip_skip", 2), ("prediction_type", "epsilon")])
def test_settings_of_stable_diffusion_are_refused_at_once(folder: Path, option: str, value: object) -> None:
    with pytest.raises(SettingsError, match="Z-Image"):
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


@pytest.mark.parametrize("title", ["z_image_turbo_bf16", "Z-Image-Turbo", "zImageTurbo_turbo"])
def test_turbo_is_not_trained(folder: Path, tmp_path: Path, title: str) -> None:
    with pytest.raises(UnsupportedModelError, match="distilled") as caught:
        require_trainable(replace(open_base(folder), title=title), TrainSettings(), paths_in(tmp_path), StartingPoint())
    assert "Z-Image" in caught.value.remedy


def test_a_snapshot_of_the_hubs_cache_has_the_name_of_its_model(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Tongyi-MAI--Z-Image-Turbo" / "snapshots" / "0123abc"
    shutil.copytree(folder, snapshot)
    with pytest.raises(UnsupportedModelError, match="By its name, Z-Image-Turbo is"):
        require_trainable(open_base(snapshot), TrainSettings(), paths_in(tmp_path), StartingPoint())


def test_a_folders_shift_is_that_of_its_pictures(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "z image")
    file = copy / "scheduler" / "scheduler_config.json"
    stated = json.loads(file.read_text(encoding="utf-8"))
    for shift, sigmas in {3.0: [1, 3 / 4], 6.0: [1, 6 / 7]}.items():
        file.write_text(json.dumps({**stated, "shift": shift}), encoding="utf-8")
        base = open_base(copy)
        model = base.family.build(base)
        scheduler = model.objective.make_scheduler("euler", 2, (16, 8, 8), torch.device("cpu"))
        assert scheduler.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in sigmas])
    file.write_text(json.dumps({**stated, "shift": "six"}), encoding="utf-8")
    with pytest.raises(WeightsError, match="shift"):
        open_base(copy)


def test_a_file_is_inspected_as_a_base_model(parts: dict[str, Path]) -> None:
    assert inspect(parts["base"])["family"] == "Z-Image"


@pytest.mark.parametrize(
    "title", ["z_image_bf16", "Z-Image", "z_image_de_turbo_v1_bf16", "my-z-image-turbo-base", "mymodel"]
)
def test_base_models_are_trained(folder: Path, tmp_path: Path, title: str) -> None:
    require_trainable(replace(open_base(folder), title=title), TrainSettings(), paths_in(tmp_path), StartingPoint())


def test_an_older_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "ZImageTransformer2DModel", None)
    monkeypatch.setattr(diffusers, "__version__", "0.31.0")
    with pytest.raises(UnsupportedModelError, match=r"Z-Image needs diffusers 0\.36 or newer; 0\.31\.0 is installed"):
        open_base(folder)


@pytest.fixture(scope="module")
def parts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in three files, as ComfyUI's loaders take them, and the folder of the tokenizer."""
    place = tmp_path_factory.mktemp("parts ü")
    weights = zimage_weights()
    for name, tensors in {"base": weights.denoiser, "vae": weights.vae, "text_encoder": weights.text}.items():
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
    with pytest.raises(WeightsError, match="only the transformer of Z-Image") as caught:
        open_base(parts["base"])
    assert all(word in caught.value.remedy for word in ("vae", "text_encoder", "Load Diffusion Model"))


def test_the_file_of_a_folders_transformer_asks_for_the_folder(folder: Path) -> None:
    with pytest.raises(WeightsError, match="diffusers format"):
        open_base(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@torch.no_grad()
def test_a_transformer_in_eight_bits_is_read(parts: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    """Each of the three projections of a joined one has its scale."""
    stored = in_float8(zimage_weights().denoiser)
    file = tmp_path / "z image fp8.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}, file)
    base = opened(parts, base=file)
    joined = sum(name.endswith("qkv.weight_scale") for name in stored)
    assert joined
    assert len(base.denoiser.scales) == sum(name.endswith("weight_scale") for name in stored) + 2 * joined
    model = base.family.build(base)
    whole = open_base(folder)
    rows = model.encode_prompts(["a dog"])
    noisy, timesteps = normal(1, 16, 4, 4), torch.tensor([500.0])
    found, plain = (one.predict(noisy, timesteps, rows) for one in (model, whole.family.build(whole)))
    assert torch.nn.functional.cosine_similarity(found.flatten(), plain.flatten(), dim=0) > 0.95


def test_a_model_of_one_block_more_is_another_one(folder: Path) -> None:
    other = open_base(lent(folder, denoiser=zimage_weights(ZImageShape(layers=3)).denoiser))
    assert other.denoiser.config["n_layers"] == 3
    assert other.fingerprint != open_base(folder).fingerprint
