"""Metadata of adapter files: kohya's `ss_*`, Stability's `modelspec.*`, and the whole configuration of the run."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from ..core.prompts import PromptWords
from ..models.families.base import Family, Prediction
from ..settings.adapter import ROTATIONS
from ..settings.sharing import CONFIG_KEY, shareable
from ..settings.train import TrainSettings
from .kohya import Adapter
from .layers import Layer

FINGERPRINT_KEY = "dreambooth.fingerprint"
MERGE_KEY = "dreambooth.merge"
WORD_KEY = "dreambooth.word"  # of an embedding file: the word in the captions that it was learned for
FORM_KEY = "dreambooth.form"  # how a run's result is written: precision, alone or combined


@dataclass(frozen=True)
class RunFacts:
    """What the metadata contains in addition to the settings.

    Attributes:
        family: The base model's family.
        base_title: The base model's name.
        base_fingerprint: Digest of its weights.
        run_fingerprint: Digest of everything on which the adapter depends.
        captions: Caption of every subject picture.
        repeats: How often each subject picture is used in an epoch.
        class_pictures: Class prompt → number of its pictures.
        precision: Precision of the base model while training.
        started_at: Unix time.
        prediction: What the model predicts.
        clip_skip: The text encoder layer that is used; 0: the family's default.
        start: The adapter that the run continued to train; its kind, rank and alpha replace the settings'.
        processes: Number of processes that share every step.
        words: Rare word and class noun of each subject.
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
    words: Sequence[PromptWords] = ()


def training_metadata(settings: TrainSettings, facts: RunFacts, step: int) -> dict[str, str]:
    """Metadata of an adapter after `step` steps; every value is a string."""
    network = _network(settings, facts.start)
    kohya = {
        "ss_output_name": settings.name,
        "ss_base_model_version": facts.family.base_version(facts.prediction),
        "ss_sd_model_name": facts.base_title,
        "ss_v2": facts.family.kohya_v2,
        "ss_network_module": "networks.lora" if network.kind in ("lora", "full") else "lycoris.kohya",
        "ss_network_dim": network.rank,
        "ss_network_alpha": network.alpha,
        "ss_network_args": json.dumps(_network_args(settings, network.kind, facts.start)),
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
            {_folder_name(settings.name, repeats): subset for repeats, subset in _subsets(facts).items()}
        ),
        "ss_reg_dataset_dirs": json.dumps(
            {prompt: {"n_repeats": 1, "img_count": count} for prompt, count in facts.class_pictures.items()}
        ),
        "ss_tag_frequency": json.dumps({settings.name: _tags(facts.captions)}),
        "ss_bucket_info": json.dumps(_buckets(settings, facts)),
    }
    modelspec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{facts.family.architecture(facts.prediction)}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": settings.name,
        "modelspec.resolution": f"{settings.resolution}x{settings.resolution}",
        "modelspec.date": _now(),
        "modelspec.trigger_phrase": _trigger_phrase(facts.captions, facts.words),
        "modelspec.prediction_type": {"v_prediction": "v"}.get(facts.prediction.type, facts.prediction.type),
    }
    own = {
        CONFIG_KEY: json.dumps(_configuration(settings, facts), sort_keys=True),
        FINGERPRINT_KEY: facts.run_fingerprint,
        FORM_KEY: _form(settings),
    }
    return {key: str(value) for key, value in (kohya | modelspec | own).items()}


@dataclass(frozen=True)
class _Network:
    """What kohya's metadata state of the trained network: the setting's name of its kind, rank and alpha."""

    kind: str
    rank: int
    alpha: float


def _network(settings: TrainSettings, start: Adapter | None) -> _Network:
    """That of the settings; of an adapter that was trained further, its own, with its most common rank and alpha."""
    if start is not None:
        ranks_and_alphas = Counter((layer.rank, layer.alpha) for layer in start.layers.values())
        [((rank, alpha), _)] = ranks_and_alphas.most_common(1)
        return _Network(start.kind.lower(), rank, alpha)
    alpha = float(settings.rank) if settings.adapter == "full" else settings.scale * settings.rank
    if settings.adapter in ROTATIONS:
        alpha = 0.0
    factor = _file_rank_factor(settings, start)
    return _Network(settings.adapter, factor * settings.rank, factor * alpha)


def _file_rank_factor(settings: TrainSettings, start: Adapter | None) -> int:
    """How many times a layer's rank, and its alpha, its file has: what an orthogonal start subtracts is in it."""
    return 2 if settings.lora_init == "orthogonal" and start is None else 1


def _trigger_phrase(captions: Sequence[str], words: Sequence[PromptWords]) -> str:
    """The trigger words of the subjects, such as "sks dog", if captions contain them.

    Of subjects without a class noun, the captions that several pictures share, which are their prompts; if there are
    none, their rare words, or else the first caption.
    """

    def in_captions(phrases: Iterable[str]) -> list[str]:
        return [*dict.fromkeys(phrase for phrase in phrases if any(phrase in caption for caption in captions))]

    named = in_captions(f"{subject.token} {subject.class_noun}" for subject in words if subject.class_noun)
    counts = Counter(captions)
    common = [caption for caption, count in counts.items() if count > 1]
    rare = in_captions(subject.token for subject in words if subject.token)
    return ", ".join(named or common or rare or list(counts)[:1])


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


def _network_args(settings: TrainSettings, kind: str, start: Adapter | None) -> dict[str, object]:
    """Kohya's and LyCORIS's network_args, as far as they are set; the values are strings there."""
    factor = _file_rank_factor(settings, start)
    by_timestep = settings.rank_schedule == "timestep"
    arguments = {
        "algo": {"lora": "", "full": "", "dora": "lora", "oft": "diag-oft"}.get(kind, kind),
        "dora_wd": "True" if kind == "dora" else "",
        "targets": settings.targets,
        "conv_dim": settings.targets == "all" and str(factor * (settings.conv_rank or settings.rank)),
        "conv_alpha": settings.conv_alpha and str(factor * settings.conv_alpha),
        "factor": str(settings.lokr_factor) if kind == "lokr" else "",
        "dropout": settings.dropout and str(settings.dropout),
        "scale_weight_norms": settings.max_norm and str(settings.max_norm),
        "block_ranks": settings.block_ranks,
        "include": settings.include,
        "exclude": settings.exclude,
        "loraplus_lr_ratio": settings.lora_plus_ratio and str(settings.lora_plus_ratio),
        "rank_stabilized": "True" if settings.rank_stabilized else "",
        "rank_schedule": settings.rank_schedule if by_timestep else "",
        "min_rank": str(settings.min_rank) if by_timestep else "",
        "rank_power": str(settings.rank_power) if by_timestep else "",
        "lora_init": settings.lora_init if factor > 1 else "",
    }
    return {name: value for name, value in arguments.items() if value}


def _form(settings: TrainSettings) -> str:
    """What of an adapter file the run does not determine: its precision, whether it is combined, what is extracted."""
    parts: list[str] = [settings.save_precision]
    if settings.combine:
        parts.append("combined")
    if settings.adapter == "full":
        parts += [f"rank {settings.rank}", settings.targets]
    return ", ".join(parts)


def _dataset(settings: TrainSettings, facts: RunFacts) -> dict[str, object]:
    """The run's pictures as kohya lists them."""
    return {
        "is_dreambooth": True,
        "batch_size_per_device": settings.batch_size,
        "num_train_images": sum(facts.repeats),
        "num_reg_images": sum(facts.class_pictures.values()),
        "resolution": [settings.resolution, settings.resolution],
        "enable_bucket": settings.aspect_buckets,
        "bucket_info": _buckets(settings, facts),
        "subsets": [
            {"img_count": subset["img_count"], "num_repeats": repeats, "flip_aug": settings.flip, "is_reg": False}
            for repeats, subset in _subsets(facts).items()
        ],
    }


def _buckets(settings: TrainSettings, facts: RunFacts) -> dict[str, object] | None:
    """The single bucket of a run without aspect buckets; None with them, since the facts don't contain them."""
    if settings.aspect_buckets:
        return None
    return {"buckets": {"0": {"resolution": [settings.resolution] * 2, "count": sum(facts.repeats)}}}


def _folder_name(name: str, repeats: int) -> str:
    """As kohya's folders are named, repeats first."""
    return f"{repeats}_{name}" if repeats > 1 else name


def _subsets(facts: RunFacts) -> dict[int, dict[str, int]]:
    """Repeats → kohya's entry for the pictures that have as many."""
    return {
        repeats: {"n_repeats": repeats, "img_count": pictures} for repeats, pictures in Counter(facts.repeats).items()
    }


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


_KEYS_OF_BASE = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.prediction_type")


def without_run_keys(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata without the keys that identify a run's own result, for a file that was changed."""
    return {key: value for key, value in metadata.items() if key not in (FINGERPRINT_KEY, FORM_KEY)}


def derived_metadata(sources: Sequence[Adapter], titles: Sequence[str], layers: Mapping[str, Layer]) -> dict[str, str]:
    """Metadata of an adapter that was computed from others.

    Args:
        sources: The others. The result has the base-model entries of the first; of a single one, it has
            everything.
        titles: Their names.
        layers: The result's layers.
    """
    all_metadata = [source.metadata for source in sources]
    kept = without_run_keys(all_metadata[0]) if len(all_metadata) == 1 else {}
    base_model = {
        key: next((metadata[key] for metadata in all_metadata if metadata.get(key)), "") for key in _KEYS_OF_BASE
    }
    resolutions = {metadata.get("modelspec.resolution", "") for metadata in all_metadata} - {""}
    phrases = dict.fromkeys(metadata.get("modelspec.trigger_phrase", "") for metadata in all_metadata)
    models = dict.fromkeys(metadata.get("ss_sd_model_name", "") for metadata in all_metadata)
    ranks = {layer.rank for layer in layers.values()}
    alphas = {layer.alpha for layer in layers.values()}
    plain = all(layer.kind == "LoRA" for layer in layers.values())
    derived = {
        **base_model,
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": ranks.pop() if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic",
        "ss_sd_model_name": ", ".join(filter(None, models)),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": kept.get("modelspec.title", " + ".join(titles)),
        "modelspec.resolution": resolutions.pop() if len(resolutions) == 1 else "",
        "modelspec.date": _now(),
        "modelspec.trigger_phrase": ", ".join(filter(None, phrases)),
        "modelspec.merged_from": ", ".join(titles),
    }
    return kept | {key: str(value) for key, value in derived.items() if value != ""}


def _now() -> str:
    return datetime.now(timezone.utc).replace(microsecond=0).isoformat()


def metadata_summary(metadata: Mapping[str, str]) -> dict[str, str]:
    """The most useful entries of an adapter's metadata: label → value, without empty ones."""
    keys_by_label = {
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
    summary = {}
    for label, keys in keys_by_label.items():
        values = [metadata[key] for key in keys if metadata.get(key)]
        if values:
            summary[label] = values[0]
    return summary
