"""What an adapter file says of itself: kohya's `ss_*`, Stability's `modelspec.*`, and the whole run configuration."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from ..models.families.base import Family, Prediction
from ..settings.sharing import shareable
from ..settings.train import TrainSettings
from .kohya import Adapter
from .layers import Layer

CONFIG_KEY = "dreambooth.config"
FINGERPRINT_KEY = "dreambooth.fingerprint"
MERGE_KEY = "dreambooth.merge"
FORM_KEY = "dreambooth.form"  # how a run's result is written: precision, alone or combined


@dataclass(frozen=True)
class RunFacts:
    """What the metadata tells beside the settings.

    Attributes:
        family: The base model's family.
        base_title: The base model's name.
        base_fingerprint: Digest of its weights.
        run_fingerprint: Digest of everything on which the adapter depends.
        captions: Caption of every subject picture.
        repeats: How often every subject picture is taken in an epoch.
        class_pictures: Class prompt → number of its pictures.
        precision: Precision of the base model while training.
        started_at: Unix time.
        prediction: What the model predicts.
        clip_skip: Layer of the text encoders that is read; 0: the family's.
        start: The adapter that the run went on with; its kind, rank and alpha replace the settings'.
        processes: How many share every step.
    """

    family: Family
    base_title: str
    base_fingerprint: str
    run_fingerprint: str
    captions: Sequence[str]
    repeats: Sequence[int]
    class_pictures: Mapping[str, int]
    precision: str
    started_at: float
    prediction: Prediction
    clip_skip: int
    start: Adapter | None = None
    processes: int = 1


def training_metadata(settings: TrainSettings, facts: RunFacts, step: int) -> dict[str, str]:
    """Metadata of an adapter after `step` steps; every value is a string."""
    name, kind, rank, alpha = settings.name, *_shape(settings, facts.start)
    words = Counter(facts.captions)
    common = [caption for caption, count in words.items() if count > 1]  # the prompts of one subject or several
    trigger = ", ".join(common or list(words)[:1])
    kohya = {
        "ss_output_name": name,
        "ss_base_model_version": facts.family.base_version(facts.prediction),
        "ss_sd_model_name": facts.base_title,
        "ss_v2": facts.family.kohya_v2,
        "ss_network_module": "networks.lora" if kind in ("lora", "full") else "lycoris.kohya",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(_network_args(settings, kind)),
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": time.time(),
        "ss_steps": step,
        "ss_max_train_steps": settings.steps,
        "ss_learning_rate": settings.learning_rate,
        "ss_unet_lr": settings.learning_rate,
        "ss_text_encoder_lr": ", ".join(map(str, settings.text_encoder_rates.values())) or "0.0",
        "ss_optimizer": settings.optimizer_title(settings.weight_decay),
        "ss_lr_scheduler": settings.lr_schedule,
        "ss_lr_warmup_steps": settings.lr_warmup_steps,
        "ss_max_grad_norm": settings.max_grad_norm,
        "ss_seed": settings.seed,
        "ss_mixed_precision": {"fp32": "no"}.get(facts.precision, facts.precision),
        "ss_prior_loss_weight": settings.prior_weight,
        "ss_resolution": f"({settings.resolution}, {settings.resolution})",
        "ss_num_train_images": sum(facts.repeats),
        "ss_num_reg_images": sum(facts.class_pictures.values()),
        "ss_total_batch_size": settings.batch_size * settings.gradient_accumulation * facts.processes,
        "ss_batch_size_per_device": settings.batch_size,
        "ss_gradient_accumulation_steps": settings.gradient_accumulation,
        "ss_gradient_checkpointing": settings.gradient_checkpointing,
        "ss_flip_aug": settings.flip,
        "ss_clip_skip": facts.clip_skip or "None",
        **_objective(settings),
        "ss_enable_bucket": settings.aspect_buckets,
        "ss_shuffle_caption": settings.shuffle_tags,
        "ss_keep_tokens": settings.keep_tags if settings.shuffle_tags else 0,
        "ss_caption_dropout_rate": settings.caption_dropout,
        "ss_datasets": json.dumps([_dataset(settings, facts)]),
        "ss_dataset_dirs": json.dumps(
            {f"{count}_{name}" if count > 1 else name: one for count, one in _by_repeats(facts).items()}
        ),
        "ss_reg_dataset_dirs": json.dumps(
            {prompt: {"n_repeats": 1, "img_count": count} for prompt, count in facts.class_pictures.items()}
        ),
        "ss_tag_frequency": json.dumps({name: _tags(facts.captions)}),
        "ss_bucket_info": json.dumps(_buckets(settings, facts)),
    }
    modelspec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{facts.family.architecture(facts.prediction)}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{settings.resolution}x{settings.resolution}",
        "modelspec.date": _now(),
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": {"v_prediction": "v"}.get(facts.prediction.type, facts.prediction.type),
    }
    own = {
        CONFIG_KEY: json.dumps(_configuration(settings, facts), sort_keys=True),
        FINGERPRINT_KEY: facts.run_fingerprint,
        FORM_KEY: _form(settings),
    }
    return {key: str(value) for key, value in (kohya | modelspec | own).items()}


def _shape(settings: TrainSettings, start: Adapter | None) -> tuple[str, int, float]:
    """Kind, rank and alpha of what is trained; of an adapter that was gone on with, its commonest."""
    if start is None:
        alpha = float(settings.rank) if settings.adapter == "full" else settings.scale * settings.rank
        return settings.adapter, settings.rank, alpha
    [(rank, alpha)] = [key for key, _ in Counter((one.rank, one.alpha) for one in start.layers.values()).most_common(1)]
    return start.kind.lower(), rank, alpha


def _configuration(settings: TrainSettings, facts: RunFacts) -> dict[str, object]:
    """What a run can be repeated with, but for pictures and models, whose paths are private."""
    configuration = shareable(settings) | {
        "base_fingerprint": facts.base_fingerprint,
        "class_prompt": " | ".join(facts.class_pictures),
        "captions": list(facts.captions),
    }
    if facts.processes > 1:
        configuration["processes"] = facts.processes
    return configuration


def _network_args(settings: TrainSettings, kind: str) -> dict[str, object]:
    """What kohya and LyCORIS call network_args, as far as it is set; its values are strings there."""
    found = {
        "algo": {"lora": "", "full": "", "dora": "lora"}.get(kind, kind),
        "dora_wd": "True" if kind == "dora" else "",
        "targets": settings.targets,
        "conv_dim": settings.targets == "all" and str(settings.conv_rank or settings.rank),
        "conv_alpha": settings.conv_alpha and str(settings.conv_alpha),
        "factor": str(settings.lokr_factor) if kind == "lokr" else "",
        "dropout": settings.dropout and str(settings.dropout),
        "scale_weight_norms": settings.max_norm and str(settings.max_norm),
        "block_ranks": settings.block_ranks,
        "include": settings.include,
        "exclude": settings.exclude,
        "loraplus_lr_ratio": settings.lora_plus_ratio and str(settings.lora_plus_ratio),
        "rank_stabilized": "True" if settings.rank_stabilized else "",
    }
    return {name: value for name, value in found.items() if value}


def _form(settings: TrainSettings) -> str:
    """What of an adapter file does not follow from the run: precision, combined or alone, what was extracted."""
    parts: list[str] = [settings.save_precision]
    if settings.combine:
        parts.append("combined")
    if settings.adapter == "full":
        parts += [f"rank {settings.rank}", settings.targets]
    return ", ".join(parts)


def _dataset(settings: TrainSettings, facts: RunFacts) -> dict[str, object]:
    """The run's pictures as kohya lists them."""
    side, count = settings.resolution, sum(facts.repeats)
    return {
        "is_dreambooth": True,
        "batch_size_per_device": settings.batch_size,
        "num_train_images": count,
        "num_reg_images": sum(facts.class_pictures.values()),
        "resolution": [side, side],
        "enable_bucket": settings.aspect_buckets,
        "bucket_info": _buckets(settings, facts),
        "subsets": [
            {"img_count": one["img_count"], "num_repeats": repeats, "flip_aug": settings.flip, "is_reg": False}
            for repeats, one in _by_repeats(facts).items()
        ],
    }


def _buckets(settings: TrainSettings, facts: RunFacts) -> dict[str, object] | None:
    """The one bucket of a run without aspect buckets; how many pictures are in which is not known here else."""
    if settings.aspect_buckets:
        return None
    return {"buckets": {"0": {"resolution": [settings.resolution] * 2, "count": sum(facts.repeats)}}}


def _by_repeats(facts: RunFacts) -> dict[int, dict[str, int]]:
    """Repeats → what kohya says of the pictures that have so many."""
    return {count: {"n_repeats": count, "img_count": pictures} for count, pictures in Counter(facts.repeats).items()}


def _objective(settings: TrainSettings) -> dict[str, object]:
    """Noise and loss under kohya's names; "None" where kohya has it."""
    weighting = settings.loss_weighting
    return {
        "ss_noise_offset": settings.noise_offset or "None",
        "ss_multires_noise_iterations": settings.multires_noise_iterations or "None",
        "ss_multires_noise_discount": settings.multires_noise_discount,
        "ss_ip_noise_gamma": settings.input_perturbation or "None",
        "ss_zero_terminal_snr": settings.zero_terminal_snr,
        "ss_min_snr_gamma": settings.min_snr_gamma if weighting == "min-snr" else "None",
        "ss_debiased_estimation": weighting == "debiased",
        "ss_loss_type": {"mse": "l2"}.get(settings.loss, "huber"),
        "ss_huber_schedule": {"huber-snr": "snr"}.get(settings.loss, "constant"),
        "ss_huber_c": settings.huber_c,
    }


def _tags(captions: Sequence[str]) -> dict[str, int]:
    return dict(Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip()))


_SHARED = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.prediction_type")


def without_run_keys(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a changed file, which is no longer the one that a run would find again."""
    return {key: value for key, value in metadata.items() if key not in (FINGERPRINT_KEY, FORM_KEY)}


def derived_metadata(sources: Sequence[Adapter], titles: Sequence[str], layers: Mapping[str, Layer]) -> dict[str, str]:
    """Metadata of an adapter that was computed from others.

    Args:
        sources: The others; what the first of them says of the family is said of the result, and all that a single one
            says.
        titles: Their names.
        layers: The result's layers.
    """
    stated = [source.metadata for source in sources]
    own = without_run_keys(stated[0]) if len(stated) == 1 else {}
    shared = {key: next((one[key] for one in stated if one.get(key)), "") for key in _SHARED}
    resolutions = {one["modelspec.resolution"] for one in stated if one.get("modelspec.resolution")}
    phrases = dict.fromkeys(one.get("modelspec.trigger_phrase", "") for one in stated)
    models = dict.fromkeys(one.get("ss_sd_model_name", "") for one in stated)
    ranks, alphas = {layer.rank for layer in layers.values()}, {layer.alpha for layer in layers.values()}
    plain = all(layer.kind == "LoRA" for layer in layers.values())
    found = {
        **shared,
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
        "ss_sd_model_name": ", ".join(filter(None, models)),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": own.get("modelspec.title", " + ".join(titles)),
        "modelspec.resolution": resolutions.pop() if len(resolutions) == 1 else "",
        "modelspec.date": _now(),
        "modelspec.trigger_phrase": ", ".join(filter(None, phrases)),
        "modelspec.merged_from": ", ".join(titles),
    }
    return own | {key: str(value) for key, value in found.items() if value != ""}


def _now() -> str:
    return datetime.now(timezone.utc).replace(microsecond=0).isoformat()


def metadata_summary(metadata: Mapping[str, str]) -> dict[str, str]:
    """The few lines of an adapter's metadata that a person asks for first; only what is there."""
    wanted = {
        "title": ("modelspec.title", "ss_output_name"),
        "base model": ("ss_sd_model_name",),
        "family": ("modelspec.architecture", "ss_base_model_version"),
        "trigger phrase": ("modelspec.trigger_phrase",),
        "steps": ("ss_steps",),
        "resolution": ("modelspec.resolution", "ss_resolution"),
        "merged from": ("modelspec.merged_from",),
        "made": ("modelspec.date",),
        "model hash": ("sshs_model_hash",),
        "legacy hash": ("sshs_legacy_hash",),
    }
    found = {label: next((metadata[key] for key in keys if metadata.get(key)), "") for label, keys in wanted.items()}
    return {label: value for label, value in found.items() if value}
