"""Every remedy that an error or a note names by a setting is tried: with it, the complaint is gone.

The table holds what provokes each complaint. Suggestions with a value are taken from the complaint itself and tried one
by one; what is said in words stands in the table. The last test holds that no call of `suggest` is left out.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from anima_checkpoints import anima_files
from checkpoints import sd15_checkpoint
from flux2_checkpoints import flux2_weights, write_tokenizer
from helpers import ROOT, TINY, Recorder, remembered
from pack.trainer.adapters.diffusers_format import write_diffusers
from pack.trainer.adapters.kohya import Adapter, LoraLayer, write_adapter
from pack.trainer.adapters.layers import make_layer
from pack.trainer.adapters.targets import require_family_fits
from pack.trainer.cli.flags import checked_settings
from pack.trainer.cli.new import write_settings_file
from pack.trainer.cli.plan import run_plan
from pack.trainer.cli.train import _given_class_pictures, _require_picture_path
from pack.trainer.core.devices import DTYPES, pick_device, pick_precision
from pack.trainer.core.errors import WeightsError
from pack.trainer.core.events import Note
from pack.trainer.core.prompts import PromptWords
from pack.trainer.data.folder import AnnotationOptions
from pack.trainer.data.image_check import check_pictures
from pack.trainer.data.images import Picture, load_pictures, split_validation
from pack.trainer.evaluation.evaluator import Evaluator
from pack.trainer.evaluation.feature_extractors import FeatureExtractors
from pack.trainer.merging.merge import WeightedAdapter, merge
from pack.trainer.merging.ziplora import learned_merge
from pack.trainer.models import nf4, tokenizer
from pack.trainer.models.families.base import BaseWeights, DiffusionModel, LearnedWord
from pack.trainer.models.families.sdxl import StableDiffusionXL
from pack.trainer.models.nf4 import require_quantizable
from pack.trainer.models.open import HostTensors, open_base
from pack.trainer.models.tokenizer import find_tokenizer
from pack.trainer.settings.base import Settings
from pack.trainer.settings.caption import CaptionCommand
from pack.trainer.settings.evaluate import CompareCommand, DreamBenchCommand, ScoreCommand
from pack.trainer.settings.merge import (
    ConvertCommand,
    FuseCommand,
    LearnedMergeCommand,
    LearnedMergeSettings,
    MergeCommand,
    MergeSettings,
)
from pack.trainer.settings.train import GenerateCommand, PlanCommand, PriorsCommand, TrainCommand, TrainSettings
from pack.trainer.training import optimizers, preflight
from pack.trainer.training.adapter import StartingPoint, planned_targets
from pack.trainer.training.memory.plan import remedies
from pack.trainer.training.optimizers import require_optimizer
from pack.trainer.training.preflight import report_settings_without_effect, require_preservable, require_trainable
from pack.trainer.training.presets import load_preset
from pack.trainer.training.runs import trackers
from pack.trainer.training.runs.folder import RunFolder
from pack.trainer.training.trainable import make_trainable
from pack.trainer.training.words import TrainedWords
from PIL import Image
from remedies import ABSENT, Bench, Call, Case, Check, Values, recorded_calls, sites, suggested
from safetensors.torch import save_file
from setting_values import KINDS, REQUIRED
from transformers import AutoTokenizer
from worlds import COMMON, PROMPT, TOKENIZER, World, paths_in

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quick")

NAMES = {kind: name for name, kind in KINDS.items()}
CASES: dict[str, Case] = {}


def add(label: str, kind: type[Settings], check: Check, values: Values, *tries: Values, **more: Any) -> None:
    assert label not in CASES, label
    CASES[label] = Case(kind, check, values, tries, **more)


def accepted(kind: type[Settings]) -> Check:
    """The settings of a command, checked as they come in."""

    def check(bench: Bench, values: Values) -> None:
        kind.checked(values)

    return check


def effective(kind: type[Settings]) -> Check:
    """The notes on settings of a command that have no effect."""

    def check(bench: Bench, values: Values) -> list[str]:
        return kind.checked(values).effect_notes()

    return check


def settings(label: str, kind: type[Settings], values: Values, *tries: Values, **more: Any) -> None:
    add(label, kind, accepted(kind), {**REQUIRED[NAMES[kind]], **values}, *tries, **more)


def notes(label: str, kind: type[Settings], values: Values, *tries: Values, **more: Any) -> None:
    add(label, kind, effective(kind), {**REQUIRED[NAMES[kind]], **values}, *tries, **more)


# Settings that contradict each other

settings("out of range", TrainCommand, {"steps": 0}, {"steps": 1})
settings("trained blocks can't be swapped", TrainCommand, {"adapter": "full", "swap_blocks": 4})
settings("clipped gradients can't be freed early", TrainCommand, {"fused_backward_pass": True, "max_grad_norm": 1.0})
settings(
    "this optimizer needs all gradients",
    TrainCommand,
    {"fused_backward_pass": True, "max_grad_norm": 0.0, "optimizer": "lion"},
    {"fused_backward_pass": ABSENT},
)
settings(
    "compiled blocks with early updates",
    TrainCommand,
    {"fused_backward_pass": True, "max_grad_norm": 0.0, "compile": "auto"},
)


def chosen(bench: Bench, values: Values) -> None:
    """The settings of a command as it reads them, which knows what a mistyped choice was meant to be."""
    checked_settings(TrainCommand, values)


add("a mistyped choice", TrainCommand, chosen, {**REQUIRED["train"], "preset": "animl"})


def begun(bench: Bench, values: Values) -> None:
    """A settings file to begin with."""
    write_settings_file(bench.folder / "new.toml", values, ["base", "images", "preset"])


add("no pictures to begin with", TrainCommand, begun, {"images": "nowhere"}, {"images": str(ROOT / "docs")})
settings("no words for a template", TrainCommand, {"instance_prompt": "a {class}"}, {"instance_prompt": "a dog"})
for _name, _value in {
    "include": "mid",
    "exclude": "mid",
    "block_ranks": "mid=4",
    "max_norm": 1.0,
    "start_from": "x",
    "dropout": 0.1,
    "rank_stabilized": True,
    "base_quantization": "nf4",
    "token_vectors": 2,
}.items():
    settings(f"full with {_name}", TrainCommand, {"adapter": "full", _name: _value}, {_name: ABSENT})
settings("full with a preset", TrainCommand, {"adapter": "full", "preset": "animal"}, {"preset": ABSENT})
settings(
    "full with LoRA+",
    TrainCommand,
    {"adapter": "full", "lora_plus_ratio": 4.0},
    {"adapter": "lora"},
    {"adapter": "lokr"},
)
settings("LoHa with dropout", TrainCommand, {"adapter": "loha", "dropout": 0.1}, {"dropout": ABSENT})
settings("LoKr, stabilised", TrainCommand, {"adapter": "lokr", "rank_stabilized": True}, {"rank_stabilized": ABSENT})
settings(
    "LoKr with alphas",
    TrainCommand,
    {"adapter": "lokr", "alpha": 1.0, "conv_alpha": 2.0, "targets": "all", "block_ranks": "mid=4:2"},
    {"alpha": ABSENT, "conv_alpha": ABSENT, "block_ranks": "mid=4", "learning_rate": 2e-4},
)
settings(
    "OFT with alphas",
    TrainCommand,
    {"adapter": "oft", "alpha": 1.0, "conv_alpha": 2.0, "targets": "all", "block_ranks": "mid=4:2"},
    {"alpha": ABSENT, "conv_alpha": ABSENT, "block_ranks": "mid=4", "max_norm": 0.5},
)
settings(
    "BOFT with LoRA+",
    TrainCommand,
    {"adapter": "boft", "lora_plus_ratio": 4.0},
    {"lora_plus_ratio": 0.0, "learning_rate": 4e-4},
)
settings("factor 0", TrainCommand, {"adapter": "lokr", "lokr_factor": 0}, {"lokr_factor": -1}, {"lokr_factor": 1})
settings("factor of a LoRA", TrainCommand, {"lokr_factor": 4}, {"lokr_factor": ABSENT})
settings("DoRA by timestep", TrainCommand, {"adapter": "dora", "rank_schedule": "timestep"})
settings("full, orthogonal", TrainCommand, {"adapter": "full", "lora_init": "orthogonal"})
settings("a limit of an orthogonal LoRA", TrainCommand, {"lora_init": "orthogonal", "max_norm": 1.0})
settings("an orthogonal LoRA with LoRA+", TrainCommand, {"lora_init": "orthogonal", "lora_plus_ratio": 4.0})
settings("DoRA combined", TrainCommand, {"adapter": "dora", "combine": True, "base_lora": ["x"]})
settings("combined with nothing", TrainCommand, {"combine": True}, {"base_lora": ["x"]})
settings("no layers", TrainCommand, {"targets": "none"}, {"include": "mid"}, {"targets": "attention"})
settings(
    "no convolutions", TrainCommand, {"conv_rank": 4, "conv_alpha": 2.0}, {"conv_rank": ABSENT, "conv_alpha": ABSENT}
)
settings("end of what never began", TrainCommand, {"text_encoder_until": 0.5}, {"text_encoder_lr": 1e-5})
settings(
    "prodigy's rate",
    TrainCommand,
    {"optimizer": "prodigy"},
    {"learning_rate": 1, "optimizer_options": "d_coef=0.5"},
)
for _rate in (1.0, 0.12345678):
    settings(
        f"prodigy's rates beside {_rate}",
        TrainCommand,
        {"optimizer": "prodigy", "learning_rate": _rate, "text_encoder_lr": 1e-5},
        {"learning_rate": 0.5, "text_encoder_lr": 0.5},
    )
settings(
    "prodigy's rate of a word",
    TrainCommand,
    {"optimizer": "prodigy", "learning_rate": 1, "token_vectors": 2},
    {"learning_rate": 0.5, "token_lr": 0.5},
)
settings("prodigy with LoRA+", TrainCommand, {"optimizer": "prodigy", "learning_rate": 1, "lora_plus_ratio": 4.0})
settings(
    "a schedule of schedule-free",
    TrainCommand,
    {"optimizer": "adamw-schedule-free", "lr_schedule": "cosine"},
    {"lr_schedule": "constant"},
    {"lr_schedule": "constant_with_warmup"},
)
settings("an average of schedule-free", TrainCommand, {"optimizer": "adamw-schedule-free", "ema_decay": 0.99})
settings(
    "a limit of schedule-free",
    TrainCommand,
    {"optimizer": "adamw-schedule-free", "max_norm": 1.0},
    {"optimizer": "adamw"},
    {"optimizer": "adafactor"},
)
settings(
    "warm-up as long as the run",
    TrainCommand,
    {"steps": 5, "lr_schedule": "cosine", "lr_warmup_steps": 5},
    {"steps": 6},
)
settings("warm-up of a constant rate", TrainCommand, {"lr_warmup_steps": 5})
settings(
    "more cycles than steps",
    TrainCommand,
    {"steps": 9, "lr_schedule": "cosine_with_restarts", "lr_cycles": 9},
    {"steps": 18},
)
settings("no timestep", TrainCommand, {"min_timestep": 500, "max_timestep": 500}, {"min_timestep": 499})
settings(
    "buckets above the resolution",
    TrainCommand,
    {"aspect_buckets": True, "bucket_step": 512},
    {"bucket_step": 64},
)
settings("scores without previews", TrainCommand, {"score_clip": "x"})
settings("early stop without previews", TrainCommand, {"early_stop": 2}, then="needs scores")
settings(
    "early stop without scores",
    TrainCommand,
    {"early_stop": 2, "preview_every": 10},
    {"score_clip": "x"},
    {"score_dino": "x"},
)
settings(
    "guidance that ends before it begins",
    PriorsCommand,
    {"prior_guidance_start": 0.9},
    {"prior_guidance_start": 0.7},
    {"prior_guidance_end": 1.0},
)
settings("class pictures without a prompt", TrainCommand, {"prior_count": 5})
settings("class pictures to make without a prompt", PriorsCommand, {"class_prompt": ""})
settings(
    "class pictures that are not there",
    TrainCommand,
    {"prior": "class-pictures"},
    {"prior_count": 100, "class_prompt": "a photo of a dog"},
    {"class_prompt": "a photo of a dog", "prior_count": 1},
    {"class_images": "x"},
)
settings("a penalty on what can't be measured", TrainCommand, {"adapter": "dora", "weight_penalty": 0.1})
settings("no class pictures to make", PriorsCommand, {"prior_count": 0})
settings(
    "class pictures of tables without a prompt",
    TrainCommand,
    {"images": ABSENT, "prior_count": 5, "subject": [{"images": "x"}]},
    {"subject": [{"images": "x", "class_prompt": "a photo of a dog"}]},
)
settings(
    "the class is the subject",
    TrainCommand,
    {"prior_count": 5, "class_prompt": "a photo of sks dog"},
    {"class_prompt": "a photo of a dog"},
)
settings(
    "pictures in a table and outside",
    TrainCommand,
    {"subject": [{"images": "x"}]},
    {"images": ABSENT, "subject": [{"images": "x"}, {"images": "y"}]},
)
settings(
    "a prompt outside of the tables",
    TrainCommand,
    {"images": ABSENT, "instance_prompt": "sks dog", "subject": [{"images": "x"}]},
    {"instance_prompt": ABSENT, "subject": [{"images": "x", "instance_prompt": "sks dog"}]},
)
settings("no pictures", TrainCommand, {"images": ABSENT}, {"images": "x"})
settings(
    "templates without a token",
    CaptionCommand,
    {"template": "{token}, {caption}"},
    {"token": "sks"},
    {"template": "{caption}"},
)
settings(
    "templates without a class",
    CaptionCommand,
    {"template": "{class}, {caption}"},
    {"class_noun": "dog"},
    {"template": "{caption}"},
)
settings("a rank of the exact method", MergeCommand, {"rank": 8}, {"rank": ABSENT})
settings("a density of the exact method", MergeCommand, {"density": 0.5}, {"density": ABSENT}, {"method": "ties"})
settings("more weights than adapters", MergeCommand, {"block_weights": ["mid=1"] * 3}, {"block_weights": ["mid=1"] * 2})
settings("three adapters to learn from", LearnedMergeCommand, {"loras": ["a", "b", "c"]}, {"loras": ["a", "b"]})
settings("nothing to fuse", FuseCommand, {"lora": []})
settings("no model for scores", ScoreCommand, {"dino": ABSENT})
settings("no pictures for DINO", ScoreCommand, {"subject": ABSENT}, {"subject": "x"})
settings(
    "nothing for CLIP",
    ScoreCommand,
    {"subject": ABSENT, "dino": ABSENT, "clip": "x"},
    {"subject": "x"},
    {"prompt": "a dog"},
)
settings(
    "one preview for all", DreamBenchCommand, {"preview_prompts": "a dog", "preview_every": 10}, {"preview_prompts": ""}
)
settings("a bench combined", DreamBenchCommand, {"combine": True})

# Settings without effect

notes("needs a choice", TrainCommand, {"lr_cycles": 5})
notes("needs one of two choices", TrainCommand, {"masks": "off", "mask_background": 0.5}, {"mask_background": 0.1})
notes("needs another than none", GenerateCommand, {"negative_prompt": "x", "guidance": 1.0}, {"guidance": 2.0})
notes("needs a switch", TrainCommand, {"keep_tags": 2})
notes(
    "an interval of no guidance",
    PriorsCommand,
    {"prior_guidance": 1.0, "prior_guidance_end": 0.5},
    {"prior_guidance": 2.0},
)
notes("needs a number", TrainCommand, {"prior_steps": 5}, {"prior_count": 5, "class_prompt": "a dog"})
notes("warm-up of no steps", TrainCommand, {"lr_schedule": "constant_with_warmup"}, {"lr_warmup_steps": 5})
notes(
    "class pictures twice",
    TrainCommand,
    {"class_images": "x", "prior_count": 5, "class_prompt": "a dog"},
    {"prior_count": 0},
    {"class_images": ABSENT},
)

# Settings that do not fit the base model


def trainable(bench: Bench, values: Values) -> None:
    """What a run checks before anything is made; `start` and `stacked` are adapters, `base` is another base model."""
    values = dict(values)
    base = values.pop("base", bench.world.base)
    stacked = [(adapter, 1.0) for adapter in values.pop("stacked", [])]
    point = StartingPoint(values.pop("start", None), stacked)
    require_trainable(base, TrainSettings(**{**COMMON, **values}), paths_in(bench.folder), point, CPU)


@remembered
def built(base: BaseWeights) -> DiffusionModel:
    """Its networks, which the choice of layers only looks at."""
    return base.family.build(base)


def targets(bench: Bench, values: Values) -> None:
    """What of that concerns the layers."""
    values = dict(values)
    start = values.pop("start", None)
    planned_targets(built(bench.world.base), TrainSettings(**{**COMMON, **values}), start)


def optimizer(bench: Bench, values: Values) -> None:
    """What of that concerns the optimiser."""
    require_optimizer(TrainSettings(**{**COMMON, **values}), CPU)


def model(label: str, values: Values, *tries: Values, check: Check = trainable, **more: Any) -> None:
    add(label, TrainCommand, check, values, *tries, **more)


TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
IN_TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
LORA = Adapter({TO_Q: LoraLayer(torch.ones(2, 32), torch.ones(32, 2), 2.0)})
LORA_WITH_TEXT = Adapter({**LORA.layers, IN_TEXT: LoraLayer(torch.ones(2, 64), torch.ones(128, 2), 2.0)})
LORA_WITH_BIAS = replace(LORA, vectors={f"{TO_Q}.diff_b": torch.ones(32)})
_HADA = {
    f"hada_{side}_{end}": torch.ones(*shape) for side in ("w1", "w2") for end, shape in (("a", (32, 2)), ("b", (2, 32)))
}
LOHA = Adapter({TO_Q: make_layer(TO_Q, _HADA, 2.0)})
DORA = Adapter({TO_Q: replace(LORA.layers[TO_Q], dora_scale=torch.ones(32, 1))})
LOKR = Adapter({TO_Q: make_layer(TO_Q, {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(16, 16)}, 2.0)})
OFT = Adapter({TO_Q: make_layer(TO_Q, {"oft_blocks": torch.ones(8, 4, 4)}, None)})

model("rescaled schedule of an epsilon model", {"zero_terminal_snr": True})
model("a shift of flow matching", {"timestep_shift": 2.0})
for _how, _adapter in {"LoHa": LOHA, "bias": LORA_WITH_BIAS}.items():
    model(f"combined with a {_how}", {"combine": True, "stacked": [_adapter]})
model("dropout from a LoHa", {"start": LOHA, "dropout": 0.1}, check=targets)
model("by timestep from a LoHa", {"start": LOHA, "rank_schedule": "timestep"}, check=targets)
model("more components than there are", {"rank": 2, "rank_schedule": "timestep", "min_rank": 3}, check=targets)
model("a penalty on an OFT", {"start": OFT, "weight_penalty": 0.1}, {"weight_penalty": 0.0}, check=targets)
model("LoRA+ from an OFT", {"start": OFT, "lora_plus_ratio": 4.0}, {"lora_plus_ratio": 0.0}, check=targets)
model("a text encoder that would stand still", {"start": LORA_WITH_TEXT}, {"text_encoder_lr": 5e-5}, check=targets)
model("a text encoder that the adapter lacks", {"start": LORA, "text_encoder_lr": 1e-5}, {"start": None}, check=targets)
model("no layer left", {"exclude": "attentions"}, {"exclude": "attn1"}, {"targets": "all"}, check=targets)
model(
    "no rank left",
    {"block_ranks": "attentions=0", "targets": "attention"},
    {"block_ranks": "attentions=2"},
    {"targets": "all"},
    check=targets,
)
model(
    "a second text encoder",
    {"text_encoder_2_lr": 1e-5},
    {"text_encoder_2_lr": 0.0, "text_encoder_lr": 1e-5},
    check=targets,
)
model(
    "B-LoRA",
    {"targets": "b-lora-style"},
    {"targets": "attention"},
    {"targets": "attention-mlp"},
    {"targets": "all"},
    check=targets,
)
model("a typing error in a pattern", {"include": "midblock"}, {"include": "mid_block"}, check=targets)
model("a rank above a layer", {"rank": 33}, {"rank": 32}, {"block_ranks": ".=32"}, check=targets)
model(
    "a rank of convolutions above a layer",
    {"targets": "all", "conv_rank": 33},
    {"conv_rank": 32},
    {"block_ranks": ".=32"},
    check=targets,
)
model(
    "a rank of a block above a layer", {"block_ranks": "mid_block=65"}, {"block_ranks": "mid_block=64"}, check=targets
)
model("blocks of 1", {"adapter": "oft", "rank": 1}, {"rank": 2}, check=targets)
model("blocks of 1 in a part", {"adapter": "boft", "block_ranks": "mid=1"}, {"block_ranks": "mid=2"}, check=targets)
model(
    "an unknown option",
    {"optimizer_options": "beta=1"},
    {"optimizer_options": "eps=1e-7", "weight_decay": 0.1},
    check=optimizer,
)
model(
    "a wrong option",
    {"optimizer_options": "eps=-1"},
    {"optimizer_options": "eps=1e-7"},
    {"optimizer_options": ""},
    check=optimizer,
)
model(
    "full fine-tuning of SDXL",
    {"adapter": "full"},
    {"adapter": "lora"},
    {"adapter": "lokr"},
    check=lambda bench, values: require_family_fits(StableDiffusionXL(), TrainSettings(**values)),
)


SKS_OF_3 = replace(LORA, embeddings={"bundle_emb.sks.string_to_param.*": torch.ones(3, 64)})


def learnable(bench: Bench, values: Values) -> None:
    """What of that concerns words that are learned; `known` is one that the base model knows already."""
    values = {"caption": "a photo of sks dog", "known": "", "start": None, "nouns": ["dog"], **values}
    caption, known, start, nouns = (values.pop(name) for name in ("caption", "known", "start", "nouns"))
    if not values["token_vectors"]:
        return
    network = bench.world.base.family.build(bench.world.base)
    network.learn([LearnedWord(known, {})] if known else [])
    words = [PromptWords(values.get("token", "sks"), noun) for noun in nouns]
    TrainedWords(network, TrainSettings(**{**COMMON, **values}), words, start).require_captioned(network, [caption])


for _label, _values, *_tries in (
    ("no word to learn", {"token": " "}, {"token": "sks"}),
    ("a word with a dot", {"token": "s.k"}, {"token": "sks"}),
    ("a word that is in no caption", {"caption": "a cat"}, {"caption": "sks"}, {"token": "cat"}, {"token_vectors": 0}),
    ("a word that is known", {"known": "SKS"}, {"token": "rraj", "caption": "rraj"}),
    ("a word of two subjects", {"nouns": ["dog", "cat"]}, {"token_start": "pet"}, {"nouns": ["dog", "dog"]}),
    ("a word of other vectors", {"start": SKS_OF_3}, {"token_vectors": 3}),
):
    model(_label, {"token_vectors": 2, **_values}, *_tries, check=learnable)


def with_other_heads(bench: Bench, values: Values) -> None:
    unet = bench.world.base.denoiser
    heads = {**unet.config, "attention_head_dim": 2 * unet.config["attention_head_dim"]}
    trainable(bench, {**values, "base": replace(bench.world.base, denoiser=replace(unet, config=heads))})


def with_large_weights(bench: Bench, values: Values) -> None:
    vae = bench.world.base.vae
    name = next(name for name in vae.tensors if name.endswith("decoder.conv_out.bias"))
    large = {**vae.tensors, name: torch.full_like(vae.tensors[name], 1e5)}
    trainable(bench, {**values, "base": replace(bench.world.base, vae=replace(vae, tensors=large))})


def with_layers_skipped(bench: Bench, values: Values) -> None:
    base = replace(bench.world.base, clip_skip=values["clip_skip"])
    base.family.build(base)


def from_lokr(bench: Bench, values: Values) -> None:
    """Of a factor that PEFT would not take by itself."""
    base = bench.world.base
    network = base.family.build(base)
    network.text_encoders.clear()
    make_trainable(network, TrainSettings(**values), CPU, torch.float32, LOKR)


model("other heads than a checkpoint file tells", {"adapter": "full", "save_precision": "fp32"}, check=with_other_heads)
model(
    "weights that fp16 can't hold",
    {"adapter": "full", "save_precision": "fp16"},
    {"save_precision": "fp32"},
    check=with_large_weights,
)
model(
    "more layers skipped than there are",
    {"clip_skip": 9},
    {"clip_skip": 1},
    {"clip_skip": 2},
    check=with_layers_skipped,
)


def klein(bench: Bench) -> HostTensors:
    """A small FLUX.2 klein as a host lends it."""
    weights = flux2_weights()
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(bench.folder / "tokenizer"))
    return HostTensors(weights.denoiser, weights.vae, {"qwen3": weights.text}, {"qwen3": tokenizer}, "klein base")


def trainable_klein(bench: Bench, values: Values) -> None:
    trainable(bench, {**values, "base": open_base(klein(bench))})


def opened_checkpoint(bench: Bench, values: Values) -> None:
    """A checkpoint, which has a text encoder."""
    checkpoint = sd15_checkpoint(bench.folder / "base.safetensors", size=TINY)
    open_base(checkpoint, TOKENIZER, text_encoder=values.get("text_encoder"))


def opened_transformer(bench: Bench, values: Values) -> None:
    """A transformer in a file of its own; `tokenizer` is found only where it is given."""
    weights = flux2_weights()
    files = {"base": weights.denoiser, "vae": weights.vae, "text_encoder": weights.text}
    for name, tensors in files.items():
        save_file(dict(tensors), bench.folder / f"{name}.safetensors")
    write_tokenizer(bench.folder / "tokens")
    bench.monkeypatch.setattr(tokenizer, "_holds_tokenizer", lambda folder: folder.name == "tokens")
    given = {
        name: bench.folder / str(values[name]) for name in ("vae", "text_encoder", "tokenizer") if values.get(name)
    }
    open_base(bench.folder / "base.safetensors", **given)


def opened_klein(bench: Bench, values: Values) -> None:
    given = {name: values[name] for name in ("clip_skip", "prediction_type") if name in values}
    open_base(klein(bench), **given)


def trainable_anima(bench: Bench, values: Values) -> None:
    """With an adapter of a layer that reads prompts, to start from or, as it is advised, as a part of the base."""
    files = anima_files(bench.folder / "anima")
    base = open_base(files.transformer, vae=files.vae, text_encoder=files.text_encoder)
    stem = "lora_unet_llm_adapter_blocks_0_mlp_2"
    adapter = Adapter({stem: LoraLayer(torch.ones(2, 128), torch.ones(32, 2), 2.0)})
    given: Values = {**values, "base": base}
    if given.pop("base_lora", None):
        given["stacked"] = [adapter]
    if given.get("start"):
        given["start"] = adapter
    trainable(bench, given)


if hasattr(diffusers, "AnimaTextConditioner"):
    model(
        "layers that read prompts",
        {"targets": "none", "include": "llm_adapter.*", "rank": 2},
        {"include": "blocks.*attn1.*"},
        check=trainable_anima,
    )
    model("an adapter of what reads prompts", {"start": True}, {"start": None, "base_lora": "x"}, check=trainable_anima)
if hasattr(diffusers, "Flux2KleinPipeline"):
    model("a language model that would be trained", {"text_encoder_lr": 1e-5}, check=trainable_klein)
    model("a side of no whole tokens", {"resolution": 72}, check=trainable_klein)
    model("buckets of no whole tokens", {"aspect_buckets": True, "bucket_step": 8}, check=trainable_klein)
    model("a word for a language model", {"token_vectors": 1, "token": "sks"}, check=trainable_klein)
    model("a layer of a language model", {"clip_skip": 2}, check=opened_klein)
    model(
        "a text encoder too many", {"text_encoder": "qwen.safetensors"}, {"text_encoder": None}, check=opened_checkpoint
    )
    model(
        "a transformer alone",
        {"tokenizer": "tokens"},
        {"vae": "vae.safetensors", "text_encoder": "text_encoder.safetensors"},
        check=opened_transformer,
    )
    model(
        "no tokenizer of a language model",
        {"vae": "vae.safetensors", "text_encoder": "text_encoder.safetensors"},
        {"tokenizer": "tokens"},
        check=opened_transformer,
    )
    model("epsilon of flow matching", {"prediction_type": "epsilon"}, check=opened_klein)
model("a LoKr of another factor", {"adapter": "lokr"}, {"lokr_factor": 2}, check=from_lokr)

# Packages and devices that are not there


def without(*packages: str) -> Check:
    def check(bench: Bench, values: Values) -> None:
        for package in packages:
            bench.monkeypatch.setitem(sys.modules, package, None)
        optimizer(bench, values)
        trackers.require_tracker(values.get("log_with", "none"))

    return check


def with_broken_steps(bench: Bench, values: Values) -> None:
    """Every optimiser beside torch's own and transformers' fails on the device."""
    if values["optimizer"] == "lion":
        module = SimpleNamespace(Lion=_FailingOptimizer)
        bench.monkeypatch.setattr(optimizers, "_import_class", lambda _: module.Lion)
    else:
        bench.monkeypatch.undo()
    optimizer(bench, values)


class _FailingOptimizer(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("no kernel image is available")


def quantizable(bench: Bench, values: Values) -> None:
    require_quantizable(values["base_quantization"], CPU)


def without_bitsandbytes(bench: Bench, values: Values) -> None:
    bench.monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantizable(bench, values)


def with_broken_bitsandbytes(bench: Bench, values: Values) -> None:
    bench.monkeypatch.setattr(nf4, "load_bitsandbytes", lambda: SimpleNamespace(functional=None))
    quantizable(bench, values)


def without_account(bench: Bench, values: Values) -> None:
    bench.monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(__spec__=True))
    bench.monkeypatch.setattr(trackers, "_wandb_can_start", lambda: False)
    trackers.require_tracker(values["log_with"])


def with_broken_tracker(bench: Bench, values: Values) -> None:
    def fails(*_: object) -> None:
        raise OSError("no server")

    bench.monkeypatch.setattr(trackers, "_start_tracker", fails)
    run = RunFolder(bench.folder)
    with trackers.logging_listener(Recorder(), run, TrainSettings(**values), "base", 0):
        pass


def device(bench: Bench, values: Values) -> None:
    pick_device(values["device"])


def one_of_several(bench: Bench, values: Values) -> None:
    bench.monkeypatch.setenv("LOCAL_RANK", "0")
    bench.monkeypatch.setenv("WORLD_SIZE", "2")
    device(bench, values)


def precision(bench: Bench, values: Values) -> None:
    pick_precision(values["precision"], CPU)


def fused_on_a_gpu(bench: Bench, values: Values) -> None:
    """On one that has half precision of both kinds."""
    bench.monkeypatch.setattr(preflight, "pick_precision", lambda wanted, _: wanted)
    preflight.require_fused_backward(TrainSettings(**values), torch.device("cuda"))


def fused_on_several(bench: Bench, values: Values) -> None:
    preflight.require_fused_backward(TrainSettings(**values), CPU, processes=2)


model("no package of the optimizer", {"optimizer": "lion"}, check=without("pytorch_optimizer.optimizer.lion"))
model(
    "an optimizer without its kernels",
    {"optimizer": "lion", "optimizer_options": ""},
    {"optimizer": "adamw", "optimizer_options": "eps=1e-7"},
    check=with_broken_steps,
)
model(
    "no package of prodigy",
    {"optimizer": "prodigy", "learning_rate": 1.0},
    {"optimizer": "adamw", "learning_rate": 1e-4},
    {"optimizer": "adafactor", "learning_rate": 1e-4},
    check=without("pytorch_optimizer.optimizer.prodigy"),
)
EARLY = {"fused_backward_pass": True, "max_grad_norm": 0.0}
model("scaled gradients can't be freed early", EARLY | {"precision": "fp16"}, check=fused_on_a_gpu)
model("averaged gradients can't be freed early", EARLY, check=fused_on_several)
model("no package for four bits", {"base_quantization": "nf4"}, check=without_bitsandbytes)
model("a broken package for four bits", {"base_quantization": "nf4"}, check=with_broken_bitsandbytes)
model("no tracker", {"log_with": "wandb"}, check=without("wandb"))
model("no account", {"log_with": "wandb"}, {"log_with": "none"}, check=without_account)
model("a tracker that can't start", {"log_with": "tensorboard"}, check=with_broken_tracker)
model("no such device", {"device": "cuda:99"}, check=device)
model("a device for several processes", {"device": "cuda:1"}, check=one_of_several)
model(
    "fp16 on the CPU",
    {"precision": "fp16"},
    *({"precision": each} for each in ("bf16", "fp32", "auto")),
    check=precision,
)

# Memory


def too_large(before: Values) -> Check:
    """Settings whose step does not fit; how much less others take, tests/training/test_memory_plan.py measures."""

    def check(bench: Bench, values: Values) -> list[str]:
        settings = TrainSettings(**values)
        return [f": {remedies(settings)}"] if values == before else []

    return check


def out_of_memory(before: Values) -> Check:
    """A run whose memory ran out."""

    def check(bench: Bench, values: Values) -> None:
        with bench.world.recipe(bench.folder, **values)._explained_memory_errors():
            if values == before:
                raise MemoryError

    return check


for _label, _values in {
    "": {},
    " in four bits": {"base_quantization": "nf4"},
    " with adafactor": {"optimizer": "adafactor"},
    " of all weights": {"adapter": "full"},
    " checkpointed": {"gradient_checkpointing": True},
}.items():
    _values = {"resolution": 128, "batch_size": 2, **_values}
    model(f"too large a step{_label}", _values, {"resolution": 64}, check=too_large(_values))
    model(f"no memory for a step{_label}", _values, {"resolution": 64}, {"batch_size": 1}, check=out_of_memory(_values))

# Presets, runs


def preset(bench: Bench, values: Values) -> None:
    settings = TrainSettings(**values)
    if settings.preset != "none":
        load_preset(settings.preset, SimpleNamespace(name="new", title="A new family"))


def run_beside(bench: Bench, values: Values) -> None:
    def opened(new: bool) -> RunFolder:
        return RunFolder.open(bench.folder / "runs", "dog", "1" * 64, {}, new=new)

    first = opened(new=False)
    try:
        opened(new=values["resume"] == "never").lock.release()
    finally:
        first.lock.release()


model(
    "no preset",
    {"preset": "animal"},
    {"preset": "none", "steps": 9, "learning_rate": 1e-4, "rank": 4, "resolution": 64},
    check=preset,
)
model("a run that is being trained", {"resume": "auto"}, check=run_beside)

# Pictures


def folder_of(bench: Bench, *names: str, size: tuple[int, int] = (64, 64)) -> Path:
    folder = bench.folder / "pictures"
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


def loaded(bench: Bench, folder: Path, values: Values) -> list[Picture]:
    options = AnnotationOptions(**{name: values[name] for name in ("captions", "masks") if name in values})
    return load_pictures(folder, PROMPT, Recorder(), options)


def with_a_foreign_caption(bench: Bench, values: Values) -> None:
    folder = folder_of(bench, "0.png")
    (folder / "0.txt").write_bytes("ein Hündchen".encode("cp1252"))
    loaded(bench, folder, values)


def with_a_name_of_bytes(bench: Bench, values: Values) -> None:
    folder = folder_of(bench, "0.png")
    (folder / "0.png").rename(os.fsdecode(os.fsencode(folder) + b"/h\xfcndin.png"))
    loaded(bench, folder, values)


def with_a_broken_mask(bench: Bench, values: Values) -> None:
    folder = folder_of(bench, "0.png")
    (folder / "0_mask.png").write_bytes(b"<html>")
    loaded(bench, folder, values)


def held_out(bench: Bench, values: Values) -> None:
    split_validation(bench.world.subject, values["validation_pictures"], 0)


def wide(bench: Bench, values: Values) -> list[str]:
    listener = Recorder()
    settings = TrainSettings(**{**COMMON, "bucket_step": 32, **values})
    check_pictures(loaded(bench, folder_of(bench, "0.png", size=(256, 80)), {}), settings, listener)
    return [text for text in unworded(listener) if "Cropping to" in text]


def class_pictures(bench: Bench, values: Values) -> None:
    given = {**REQUIRED["train"], "class_images": folder_of(bench, "0.png"), **values}
    _given_class_pictures(TrainCommand.checked(given), Recorder())


def unworded(listener: Recorder) -> list[str]:
    return [event.text for event in listener.events if isinstance(event, Note)]


model("a caption that is no text", {"captions": "files"}, check=with_a_foreign_caption)
if sys.platform == "linux":
    model("a name that is no text", {"captions": "file-names"}, check=with_a_name_of_bytes)
model("a mask that is no picture", {"masks": "files"}, check=with_a_broken_mask)
model("nothing left to learn from", {"validation_pictures": 3}, {"validation_pictures": 2}, check=held_out)
model("a wide picture", {"aspect_buckets": False}, check=wide)
model("class pictures without captions", {"class_prompt": ""}, check=class_pictures)

# What this run with these pictures has no use for


def useful(bench: Bench, values: Values) -> list[str]:
    values = dict(values)
    starts = values.get("start_from") is not None
    has_priors = values.pop("has_priors", False) or values.get("class_images") is not None
    caption = values.pop("files", PROMPT)
    pictures = [replace(each, caption=caption) for each in bench.world.subject]
    listener = Recorder()
    report_settings_without_effect(
        TrainCommand.checked({**REQUIRED["train"], **values}),
        pictures,
        [],
        has_class_pictures=has_priors,
        starts_from_adapter=starts,
        listener=listener,
    )
    return unworded(listener)


def useless(label: str, values: Values, *tries: Values) -> None:
    add(label, TrainCommand, useful, values, *tries)


useless("weight of no class pictures", {"prior_weight": 0.5}, {"prior_weight": 1.0}, {"class_images": "x"})
useless("class pictures for nothing", {"class_images": "x", "prior": "model"}, {"class_images": ABSENT})
useless("class pictures on a wire for nothing", {"has_priors": True, "prior": "none"}, {"prior": "auto"})


def preservable(bench: Bench, values: Values) -> None:
    """What a run with that preservation needs to know of its pictures."""
    settings = TrainCommand.checked({**REQUIRED["train"], "prior_count": 0, **values, "prior": "auto"})
    options = AnnotationOptions(token=settings.token, class_prompt=settings.class_prompt)
    pictures = [
        replace(each, class_captions=options.class_captions([settings.instance_prompt])) for each in bench.world.subject
    ]
    class_pictures = pictures if settings.prior_count or settings.class_images else []
    require_preservable(settings.model_copy(update={"prior": values["prior"]}), pictures, class_pictures)


add(
    "a picture of nothing that the base knows",
    TrainCommand,
    preservable,
    {"prior": "model", "instance_prompt": "rex on a chair"},
    {"instance_prompt": "a photo of sks dog"},
    {"token": "rex"},
    {"class_prompt": "a photo of a dog"},
)
add(
    "class pictures that no node gives",
    TrainCommand,
    preservable,
    {"prior": "class-pictures", "class_prompt": "a photo of a dog"},
    {"class_images": "x"},
)
useless(
    "background of no mask",
    {"mask_background": 0.5},
    {"mask_background": 0.1},
    {"masks": "off", "mask_background": 0.1},
)
useless("tags of no list", {"shuffle_tags": True}, {"shuffle_tags": False}, {"files": "sks, a, b"})
useless(
    "layers beside those of an adapter",
    {"start_from": "x", "rank": 4, "alpha": 2.0},
    {"rank": ABSENT, "alpha": ABSENT},
    {"start_from": ABSENT},
)
useless(
    "a word that no caption has", {"token": "rraj"}, {"token": "sks"}, {"files": "rraj dog"}, {"files": "{token} dog"}
)

# Adapters, merges, scores, pictures


def converted(bench: Bench, values: Values) -> None:
    write = write_diffusers if values["format"] == "diffusers" else write_adapter
    write(bench.folder / "out.safetensors", values["lora"], torch.float16, replace=False)


def written(bench: Bench, values: Values) -> None:
    large = replace(LORA, layers={}, vectors={f"{TO_Q}.diff_b": torch.full((32,), values.pop("size", 1e5))})
    write_adapter(bench.folder / "out.safetensors", large, DTYPES[values["save_precision"]], replace=False)


def merged(bench: Bench, values: Values) -> None:
    weights = {TO_Q: torch.randn(32, 32)} if values.get("base") else None
    merge([WeightedAdapter(DORA, "a", 0.5), WeightedAdapter(LORA, "b")], MergeSettings(method="sum"), weights)


def learned(bench: Bench, values: Values) -> None:
    other = {name.replace("to_q", "to_v"): layer for name, layer in LORA_WITH_TEXT.layers.items()}
    pair = [WeightedAdapter(LORA_WITH_TEXT, "a"), WeightedAdapter(Adapter(other), "b")]
    if "method" in values:
        merge(pair, MergeSettings(method=values["method"]))
        return
    prompts = {"subject_prompt": "sks dog", "style_prompt": "pixel art"}
    learned_merge(bench.world.base, *pair, LearnedMergeSettings(**prompts), CPU, Recorder())


def evaluated(bench: Bench, values: Values) -> None:
    Evaluator(FeatureExtractors(), bench.world.subject, ["a rraj dog"], values["token"], Recorder())


def tokenized(bench: Bench, values: Values) -> None:
    bench.monkeypatch.setattr(tokenizer, "_candidate_folders", lambda _: [])
    find_tokenizer(bench.folder / "model.safetensors", values["tokenizer"])


def planned(bench: Bench, values: Values) -> None:
    """Up to the model, which is not there."""
    with contextlib.suppress(WeightsError):
        run_plan(PlanCommand.checked(values))


def picture_file(bench: Bench, values: Values) -> None:
    given = values.get("output", bench.folder)
    _require_picture_path(Path(given))


add("an adapter that diffusers can't name", ConvertCommand, converted, {"format": "diffusers", "lora": LOHA})
add("biases that diffusers can't load", ConvertCommand, converted, {"format": "diffusers", "lora": LORA_WITH_BIAS})
add("numbers that fp16 can't hold", ConvertCommand, written, {"save_precision": "fp16"}, {"save_precision": "fp32"})
add("a DoRA without its base", MergeCommand, merged, {}, {"base": "x"})
add(
    "nothing in common",
    LearnedMergeCommand,
    learned,
    {},
    {"method": "sum"},
    elsewhere=frozenset({"method"}),
)
add("another rare word", CompareCommand, evaluated, {"token": "sks"}, {"token": "rraj"})
add("no tokenizer", TrainCommand, tokenized, {"tokenizer": None}, {"tokenizer": TOKENIZER})
add("no graphics card to plan for", PlanCommand, planned, {"base": "nowhere.safetensors", "device": "cpu"})
add("a folder for a picture", GenerateCommand, picture_file, {})

_MEMORY = "how much memory there is decides"
_HINT = "says where something else is given or what goes on; nothing is wrong"
_DIVERGED = "a run has to diverge"
_DAMAGED = "a checkpoint has to be exchanged for another run's"
_FLOW = "needs a model of flow matching; tried in tests/models/test_flow.py"
UNTRIED: dict[tuple[str, str], str] = {
    ("trainer/__main__.py", "advice"): _HINT,
    ("trainer/dreambooth.py", "_save_interrupted"): _HINT,
    ("trainer/dreambooth.py", "_go_on_without_preservation"): _HINT,
    ("trainer/dreambooth.py", "prepare"): _HINT,
    ("trainer/training/memory/fit.py", "plan_note"): _HINT,
    ("trainer/training/preservation.py", "unpreserved_note"): _HINT,
    ("trainer/data/folder.py", "_chosen_folders"): _HINT,
    ("trainer/evaluation/comparison.py", "checkpoint_candidates"): _HINT,
    ("trainer/cli/train.py", "run_generate"): _MEMORY,
    ("trainer/data/captioning.py", ""): _MEMORY,
    ("trainer/data/class_images.py", "_images_of_prompt"): _MEMORY,
    ("trainer/evaluation/generator.py", "generate"): _MEMORY,
    ("trainer/merging/ziplora.py", ""): _MEMORY,
    ("trainer/training/previews.py", ""): _MEMORY,
    ("trainer/core/errors.py", "of_loss"): _DIVERGED,
    ("trainer/dreambooth.py", "save_checkpoint"): _DIVERGED,
    ("trainer/merging/ziplora.py", "_train"): _DIVERGED,
    ("trainer/training/adapter.py", "_require_same_modules"): _DAMAGED,
    ("trainer/training/trainable.py", "restore"): _DAMAGED,
    ("trainer/training/words.py", "load"): _DAMAGED,
    ("trainer/core/distributed.py", "make_accelerator"): "needs a device without bf16",
    ("trainer/models/hub.py", "explained_opening"): "needs the network",
    ("trainer/training/preflight.py", "require_prediction_type"): "tried in tests/training/test_prediction_type.py",
    ("trainer/training/rank_schedule.py", "_masked"): "tried in tests/training/test_rank_schedule.py",
    ("trainer/models/flow.py", "with_settings"): _FLOW,
    ("trainer/models/flow.py", "make_scheduler"): _FLOW,
}
"""File and function of the calls of `suggest` that the table leaves out, and why."""
if not hasattr(diffusers, "Flux2KleinPipeline"):
    places = {"open": ("open_base", "_open_path", "_from_parts"), "tokenizer": ("find_language_tokenizer",)}
    needing = [(f"trainer/models/{file}.py", function) for file, functions in places.items() for function in functions]
    needing += [("trainer/adapters/targets.py", "require_family_fits")]
    needing += [("trainer/training/preflight.py", "require_trainable")]
    UNTRIED |= dict.fromkeys(needing, "needs a newer diffusers")
if sys.platform != "linux":
    UNTRIED["trainer/data/folder.py", "_require_text"] = "names are text here"


@pytest.fixture
def bench(tiny_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tiny_world, tmp_path, monkeypatch)


PROVOKED: dict[str, tuple[str, set[Call]]] = {}
"""What is complained of in each case, and the calls of `suggest` on the way; kept, so that it is provoked only once."""


def provoked(label: str, bench: Bench) -> tuple[str, set[Call]]:
    if label not in PROVOKED:
        with recorded_calls() as calls:
            complaint = CASES[label].complaint(bench)
        PROVOKED[label] = complaint, calls
    return PROVOKED[label]


@pytest.mark.parametrize("label", CASES)
def test_what_is_advised_helps(label: str, bench: Bench) -> None:
    case = CASES[label]
    complaint, _ = provoked(label, bench)
    assert complaint, "nothing is wrong"
    for name, _ in suggested(complaint):
        assert (name in case.kind.model_fields) != (name in case.elsewhere), f"{name} is no setting where this is shown"
    ways_out = list(case.ways_out(complaint))
    assert ways_out, complaint
    for changes in ways_out:
        after = case.complaint(bench, changes)
        assert not after or (case.then and case.then in after), f"{complaint}\nthen, with {changes}: {after}"


def test_no_suggestion_is_left_untried(bench: Bench) -> None:
    """Each call of `suggest` runs for a complaint of the table, or stands in `UNTRIED` with the reason."""
    calls: set[Call] = set()
    texts = []
    for number, label in enumerate(CASES):
        folder = bench.folder / str(number)
        folder.mkdir()
        with bench.monkeypatch.context() as patch:
            complaint, of_case = provoked(label, Bench(bench.world, folder, patch))
        calls |= of_case
        texts.append(complaint)
    found = sites()
    assert len(found) > 150
    everything = "\n".join(texts)
    tried = {
        site
        for site in found
        if any(site.made(call) for call in calls) or (not site.function and site.stands_in(everything))
    }
    left = [str(site) for site in found if site not in tried and (site.file, site.function) not in UNTRIED]
    assert not left, "\n".join(left)
    needless = set(UNTRIED) - {(site.file, site.function) for site in set(found) - tried}
    assert not needless
