"""Metadata of files, of whatever settings: every entry in kohya's, Stability's and PEFT's words, without a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.trainer.adapters.diffusers_format import write_diffusers
from pack.trainer.adapters.kohya import Adapter
from pack.trainer.adapters.layers import LohaLayer, LoraLayer
from pack.trainer.adapters.metadata import RunFacts, derived_metadata, metadata_summary, training_metadata
from pack.trainer.core.tensor_files import read_header
from pack.trainer.models.families import FAMILIES
from pack.trainer.models.families.base import Prediction
from pack.trainer.settings.train import TrainSettings

SD2 = next(family for family in FAMILIES if family.title.startswith("Stable Diffusion 2"))
DOG, CAT = "a photo of sks dog, grass", "a rraj cat"


def facts(**changes: Any) -> RunFacts:
    given: dict[str, Any] = {
        "family": SD2,
        "base_title": "base",
        "base_fingerprint": "of the base",
        "run_fingerprint": "of the run",
        "captions": [DOG, DOG, CAT],
        "repeats": [1, 1, 4],
        "class_pictures": {"a dog": 3, "a cat": 2},
        "precision": "bf16",
        "started_at": 12.5,
        "prediction": Prediction("v_prediction"),
        "clip_skip": 0,
    }
    return RunFacts(**given | changes)


def metadata_of(values: dict[str, Any] | None = None, step: int = 7, **changes: Any) -> dict[str, str]:
    return training_metadata(TrainSettings.checked(values or {}), facts(**changes), step)


def test_what_a_run_learned_from() -> None:
    found = metadata_of({"name": "both", "batch_size": 3, "gradient_accumulation": 2, "flip": True}, processes=4)
    told = {
        "ss_num_train_images": "6",
        "ss_num_reg_images": "5",
        "ss_total_batch_size": "24",
        "ss_batch_size_per_device": "3",
        "ss_steps": "7",
        "ss_max_train_steps": "800",
        "ss_base_model_version": "sd_v2_v",
        "ss_v2": "True",
        "ss_mixed_precision": "bf16",
        "ss_clip_skip": "None",
        "ss_text_encoder_lr": "0.0",
        "ss_training_started_at": "12.5",
        "ss_flip_aug": "True",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.prediction_type": "v",
        "modelspec.trigger_phrase": DOG,
        "dreambooth.fingerprint": "of the run",
        "dreambooth.form": "fp16",
    }
    assert {key: found[key] for key in told} == told
    assert json.loads(found["ss_dataset_dirs"]) == {
        "both": {"n_repeats": 1, "img_count": 2},
        "4_both": {"n_repeats": 4, "img_count": 1},
    }
    assert json.loads(found["ss_reg_dataset_dirs"]) == {
        "a dog": {"n_repeats": 1, "img_count": 3},
        "a cat": {"n_repeats": 1, "img_count": 2},
    }
    assert json.loads(found["ss_tag_frequency"]) == {"both": {"a photo of sks dog": 2, "grass": 2, "a rraj cat": 1}}
    [dataset] = json.loads(found["ss_datasets"])
    assert (dataset["num_train_images"], dataset["num_reg_images"], dataset["batch_size_per_device"]) == (6, 5, 3)
    assert [(one["img_count"], one["num_repeats"], one["flip_aug"]) for one in dataset["subsets"]] == [
        (2, 1, True),
        (1, 4, True),
    ]
    own = json.loads(next(value for value in found.values() if "of the base" in value))
    assert (own["class_prompt"], own["captions"], own["processes"]) == ("a dog | a cat", [DOG, DOG, CAT], 4)


@pytest.mark.parametrize(
    ("captions", "phrase"),
    [
        ([DOG, CAT, DOG, CAT], f"{DOG}, {CAT}"),
        ([DOG, CAT, CAT], CAT),
        ([DOG, CAT, "third"], DOG),
    ],
)
def test_the_trigger_phrase_is_what_pictures_share(captions: list[str], phrase: str) -> None:
    assert metadata_of(captions=captions, repeats=[1] * len(captions))["modelspec.trigger_phrase"] == phrase


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, {"ss_min_snr_gamma": "None", "ss_debiased_estimation": "False", "ss_noise_offset": "None"}),
        ({"loss_weighting": "min-snr", "min_snr_gamma": 4.0}, {"ss_min_snr_gamma": "4.0"}),
        ({"loss_weighting": "debiased"}, {"ss_debiased_estimation": "True", "ss_min_snr_gamma": "None"}),
        ({"loss": "mse"}, {"ss_loss_type": "l2", "ss_huber_schedule": "constant"}),
        ({"loss": "huber"}, {"ss_loss_type": "huber", "ss_huber_schedule": "constant"}),
        ({"loss": "huber-snr"}, {"ss_loss_type": "huber", "ss_huber_schedule": "snr"}),
        ({"noise_offset": 0.05, "input_perturbation": 0.1}, {"ss_noise_offset": "0.05", "ss_ip_noise_gamma": "0.1"}),
        ({"keep_tags": 2}, {"ss_keep_tokens": "0", "ss_shuffle_caption": "False"}),
        ({"keep_tags": 2, "shuffle_tags": True}, {"ss_keep_tokens": "2", "ss_shuffle_caption": "True"}),
        ({"aspect_buckets": True}, {"ss_enable_bucket": "True", "ss_bucket_info": "null"}),
        ({"text_encoder_lr": 2e-5, "text_encoder_2_lr": 1e-5}, {"ss_text_encoder_lr": "2e-05, 1e-05"}),
        ({"rank": 4, "alpha": 2.0}, {"ss_network_dim": "4", "ss_network_alpha": "2.0"}),
        ({"rank": 4, "alpha": 2.0, "rank_stabilized": True}, {"ss_network_alpha": "4.0"}),
        ({"adapter": "full", "rank": 4, "alpha": 2.0, "targets": "attention"}, {"ss_network_alpha": "4.0"}),
        ({"adapter": "full", "rank": 4, "targets": "attention"}, {"dreambooth.form": "fp16, rank 4, attention"}),
        ({"save_precision": "bf16"}, {"dreambooth.form": "bf16"}),
        ({"adapter": "full"}, {"ss_network_module": "networks.lora"}),
        ({"adapter": "lokr"}, {"ss_network_module": "lycoris.kohya"}),
        ({"adapter": "oft", "rank": 8}, {"ss_network_module": "lycoris.kohya", "ss_network_dim": "8"}),
        ({"adapter": "boft"}, {"ss_network_module": "lycoris.kohya", "ss_network_alpha": "0.0"}),
    ],
    ids=str,
)
def test_settings_in_other_programs_words(values: dict[str, Any], told: dict[str, str]) -> None:
    found = metadata_of(values)
    assert {key: found[key] for key in told} == told


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"targets": "attention"}, {"targets": "attention"}),
        ({"targets": "attention", "adapter": "dora"}, {"targets": "attention", "algo": "lora", "dora_wd": "True"}),
        ({"targets": "attention", "adapter": "full"}, {"targets": "attention"}),
        ({"targets": "all", "rank": 4}, {"targets": "all", "conv_dim": "4"}),
        (
            {"targets": "all", "rank": 4, "conv_rank": 2, "conv_alpha": 1.5},
            {"targets": "all", "conv_dim": "2", "conv_alpha": "1.5"},
        ),
        (
            {"targets": "attention", "adapter": "lokr", "lokr_factor": 8},
            {"targets": "attention", "algo": "lokr", "factor": "8"},
        ),
        ({"targets": "attention", "adapter": "oft"}, {"targets": "attention", "algo": "diag-oft"}),
        (
            {"targets": "attention", "adapter": "boft", "max_norm": 0.5},
            {"targets": "attention", "algo": "boft", "scale_weight_norms": "0.5"},
        ),
        (
            {"targets": "attention", "dropout": 0.25, "max_norm": 1.5, "rank_stabilized": True},
            {"targets": "attention", "dropout": "0.25", "scale_weight_norms": "1.5", "rank_stabilized": "True"},
        ),
    ],
    ids=str,
)
def test_network_args_name_what_is_set(values: dict[str, Any], told: dict[str, str]) -> None:
    assert json.loads(metadata_of(values)["ss_network_args"]) == told


def loha(rank: int, alpha: float) -> LohaLayer:
    down, up = torch.ones(rank, 8), torch.ones(8, rank)
    return LohaLayer(w1_a=up, w1_b=down, w2_a=up, w2_b=down, alpha=alpha)


def test_an_adapter_that_was_trained_further_has_its_own_kind_rank_and_alpha() -> None:
    start = Adapter({"a": loha(4, 3.0), "b": loha(2, 1.0), "c": loha(2, 1.0)})
    found = metadata_of({"rank": 8, "alpha": 5.0}, start=start)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "1.0")
    assert found["ss_network_module"] == "lycoris.kohya"
    assert json.loads(found["ss_network_args"])["algo"] == "loha"


def lora(rank: int, alpha: float) -> LoraLayer:
    return LoraLayer(down=torch.ones(rank, 8), up=torch.ones(8, rank), alpha=alpha)


def test_what_was_computed_from_two_says_what_they_share() -> None:
    first = Adapter({}, {"ss_v2": "", "modelspec.resolution": "512x512", "ss_sd_model_name": "one", "ss_steps": "9"})
    second = Adapter({}, {"ss_v2": "True", "ss_sd_model_name": "two", "modelspec.trigger_phrase": "pixel art"})
    found = derived_metadata([first, second], ["dog", "style"], {"a": lora(4, 4.0), "b": lora(2, 4.0)})
    told = {
        "ss_v2": "True",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "4.0",
        "ss_sd_model_name": "one, two",
        "modelspec.title": "dog + style",
        "modelspec.resolution": "512x512",
        "modelspec.trigger_phrase": "pixel art",
        "modelspec.merged_from": "dog, style",
    }
    assert {key: found[key] for key in told} == told
    assert "ss_steps" not in found
    other = Adapter({}, {"modelspec.resolution": "768x768"})
    assert "modelspec.resolution" not in derived_metadata([first, other], ["dog", "style"], {"a": loha(2, 1.0)})
    assert derived_metadata([first, other], ["a", "b"], {"a": loha(2, 1.0)})["ss_network_module"] == "lycoris.kohya"


def test_the_summary_prefers_what_people_read() -> None:
    given = {"ss_output_name": "file", "modelspec.title": "Dog", "ss_steps": "9", "modelspec.date": ""}
    given |= {"ss_resolution": "(512, 512)", "ss_sd_model_name": "base"}
    told = {"title": "Dog", "base model": "base", "steps": "9", "resolution": "(512, 512)"}
    assert metadata_summary(given) == told


def test_the_header_for_diffusers_has_the_ranks_of_every_network(tmp_path: Path) -> None:
    """Alpha is each module's own rank; only the network that has magnitudes is DoRA; the old file's hashes go."""
    unet = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    layers = {f"{unet}q": lora(4, 2.0), f"{unet}k": lora(4, 2.0), f"{unet}v": lora(2, 1.0), text: lora(3, 3.0)}
    layers |= {name: replace(layers[name], dora_scale=torch.ones(8, 1)) for name in layers if name != text}
    stated = {"sshs_model_hash": "1", "sshs_legacy_hash": "2", "modelspec.hash_sha256": "3", "modelspec.title": "Dog"}
    path = write_diffusers(tmp_path / "out.safetensors", Adapter(layers, stated), torch.float32)
    metadata = read_header(path).metadata
    assert metadata["modelspec.title"] == "Dog"
    assert not stated.keys() & metadata.keys() - {"modelspec.title"}
    found = json.loads(metadata["lora_adapter_metadata"])
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1.to_"
    assert {key: value for key, value in found.items() if key.startswith("unet.")} == {
        "unet.r": 4,
        "unet.lora_alpha": 4,
        "unet.rank_pattern": {f"{attention}v": 2},
        "unet.alpha_pattern": {f"{attention}v": 2},
        "unet.target_modules": [f"{attention}{letter}" for letter in "kqv"],
        "unet.use_dora": True,
    }
    assert (found["text_encoder.r"], found["text_encoder.use_dora"]) == (3, False)
    assert (found["text_encoder.rank_pattern"], found["text_encoder.alpha_pattern"]) == ({}, {})
