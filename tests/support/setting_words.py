"""Settings by name, and what the nodes call them."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator

import pack.trainer.settings
from helpers import ROOT
from pack.trainer.settings.base import Settings

TEXTS = {  # (node, setting, value) → how it is worded there
    ("TrainLora", "rank", "8"): "rank = 8",
    ("TrainLora", "resume", "never"): "resume = never (on Training Settings)",
    ("FineTuneCheckpoint", "resume", "never"): "resume = never (on Training Settings)",
    ("TrainingSettings", "resume", "never"): "resume = never",
    ("TrainLora", "gradient_checkpointing", "True"): "gradient_checkpointing = true (on Training Settings)",
    ("TrainLora", "batch_size", None): "batch_size (on Training Settings)",
    ("TrainLora", "prior_count", "100"): "count = 100 (on Class Priors)",
    ("TrainLora", "class_noun", None): "class_noun (on Subject)",
    ("TrainLora", "images", None): "folder (on Subject)",
    ("TrainLora", "base_lora", None): "the input base_lora",
    ("TrainLora", "download", "True"): "download = true (on CLIP Score)",
    ("TrainLora", "token", None): "token (on Training Settings)",
    ("Subject", "token", None): "token",
    ("Subject", "masks", "off"): "masks_from = off",
    ("ClassPriors", "prior_batch_size", "1"): "batch_size = 1",
    ("ClassPriors", "class_prompt", "a photo of a dog"): "prompt = a photo of a dog",
    ("SaveLora", "save_precision", "fp32"): "precision = fp32",
    ("ClipScore", "clip", None): "clip_model",
    ("PickBestCheckpoint", "clip", None): "clip_model",
    ("MergeLoras", "method", "svd"): "method = svd",
    ("MergeLoras", "density", None): "density",
    (
        "TrainLora",
        "prediction_type",
        "epsilon",
    ): "sampling = eps on a ModelSamplingDiscrete node before the training",
    ("TrainLora", "prediction_type", None): "sampling on a ModelSamplingDiscrete node before the training",
    ("TrainLora", "vae", None): "the connected VAE",
    ("TrainLora", "base", None): "the input model",
    ("TrainLora", "clip_skip", None): "stop_at_clip_layer on a CLIP Set Last Layer node before the training",
    ("TrainLora", "clip_skip", "2"): "stop_at_clip_layer = -2 on a CLIP Set Last Layer node before the training",
    ("TrainLora", "clip_skip", "0"): "the CLIP without a CLIP Set Last Layer node",
    (None, "resume", "never"): "resume = never (on Training Settings)",
}


def suggested_names() -> Iterator[str]:
    """The settings that the sources of the engine and the nodes suggest by name."""
    for folder in ("trainer", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            if "suggest(" not in source:
                continue
            for call in ast.walk(ast.parse(source)):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "suggest":
                    [name, *_] = call.args
                    if isinstance(name, ast.Constant):
                        yield name.value


def settings_names() -> Iterator[str]:
    """Every setting: where a suggestion's name is computed, it is one of them."""
    modules = pkgutil.iter_modules(pack.trainer.settings.__path__)
    for module in [importlib.import_module(f"pack.trainer.settings.{module.name}") for module in modules]:
        for each in vars(module).values():
            if isinstance(each, type) and issubclass(each, Settings):
                yield from each.model_fields
