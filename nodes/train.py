"""Train LoRA, and its further settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..trainer.core.errors import SettingsError, suggest
from ..trainer.core.prompts import common_words
from ..trainer.settings.base import filled_prompts
from ..trainer.settings.data import DataSettings
from ..trainer.settings.objective import ObjectiveSettings
from ..trainer.settings.optimizer import OptimizerSettings
from ..trainer.settings.preservation import PreservationSettings
from ..trainer.settings.preview import PreviewSettings
from ..trainer.settings.train import TrainSettings
from . import host, host_models
from .api import io
from .base import Node
from .host_progress import TrainingListener
from .lora import as_adapter, as_wire
from .priors import PriorsValue
from .subject import SubjectValue
from .widgets import CATEGORY, PRIORS, SETTINGS, SUBJECT, strength_input, widget

_ON_THE_NODE = (
    "name",
    "steps",
    "learning_rate",
    "text_encoder_lr",
    "adapter",
    "rank",
    "targets",
    "resolution",
    "seed",
)
_WIRED = ("start_from",)
_PREVIEW = "preview_every"
_PRESET = "preset"
_NEWEST = (
    "timestep_sampling",
    "timestep_shift",
    "gradient_checkpointing_interval",
    "swap_blocks",
    "compile",
    "fused_backward_pass",
    "gallery_files",
    "thumbnail",
    "base_preview",
)
_NEWER = (  # last: saved workflows hold the values of widgets by their place
    *(name for name in PreviewSettings.model_fields if name not in (_PREVIEW, *_NEWEST)),
    "keep_adapters",
    *DataSettings.model_fields,
    *(name for name in ObjectiveSettings.model_fields if name not in _NEWEST),
    "log_with",
    *OptimizerSettings.model_fields,
    "fit",
    "base_quantization",
    "lr_cycles",
    "lr_power",
    "rank_schedule",
    "min_rank",
    "rank_power",
    "lora_init",
    "token_vectors",
    "token_lr",
    "token_until",
    "token_start",
    *PreservationSettings.model_fields,
    *_NEWEST,
)
_ELSEWHERE = {*_ON_THE_NODE, *_WIRED, *_NEWER, _PREVIEW, _PRESET}
_FURTHER = (*(name for name in TrainSettings.model_fields if name not in _ELSEWHERE), *_NEWER)
_COMMON = frozenset(  # not folded away
    {
        "aspect_buckets",
        "base_quantization",
        "batch_size",
        "caption_dropout",
        "checkpoint_every",
        "early_stop",
        "ema_decay",
        "fit",
        "flip",
        "gradient_accumulation",
        "gradient_checkpointing",
        "keep_checkpoints",
        "log_with",
        "loss_weighting",
        "lr_schedule",
        "lr_warmup_steps",
        "optimizer",
        "precision",
        "preview_prompts",
        "prior",
        "prior_weight",
        "score_clip",
        "score_dino",
        "text_encoder_2_lr",
        "token",
        "validation_pictures",
    }
)
_LORA_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "adapter": {  # "full" is Fine-tune Checkpoint's
        "options": ["lora", "dora", "loha", "lokr", "oft", "boft"],
        "tooltip": str(TrainSettings.model_fields["adapter"].description).partition(" full:")[0],
    },
}
_FINE_TUNING_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "name": {"tooltip": "Name of the checkpoint and LoRA files, without the extension."},
    "learning_rate": {"default": 2e-6},
    "rank": {"default": 64, "tooltip": "Rank of the LoRA extracted from the result."},
    "targets": {"tooltip": "Layers of the extracted LoRA. The training itself changes all weights.", "default": "all"},
}


class TrainingSettings(Node):
    """Everything that Train LoRA does not show itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothTrainingSettings",
            display_name="Training Settings (DreamBooth)",
            category=CATEGORY,
            description="All other training settings: batch size, schedule, optimiser, precision, checkpoints and "
            "more. Train LoRA also works without this node.",
            search_aliases=["optimizer", "learning rate schedule", "gradient checkpointing", "batch size"],
            inputs=[
                widget(TrainSettings, name, advanced=None if name in _COMMON else True, optional=True)
                for name in _FURTHER
            ],
            outputs=[SETTINGS.Output(display_name="settings", tooltip="For Train LoRA or Fine-tune Checkpoint.")],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        """Pass the values on; Train LoRA checks them together with its own."""
        unset = {name: None for name in ("alpha", "conv_alpha") if not values.get(name)}
        return io.NodeOutput(MappingProxyType(values | unset))


def _sources(model: str) -> list[io.Input]:
    """What training starts from: the model, described by `model`, and the pictures."""
    return [
        io.Model.Input("model", tooltip=model),
        io.Clip.Input("clip", tooltip="The model's text encoders."),
        io.Vae.Input("vae", tooltip="The model's VAE, which encodes pictures into latents."),
        SUBJECT.Input("subject", tooltip="The subject to learn, from a Subject node."),
        PRIORS.Input("priors", optional=True, tooltip="Class pictures from Class Priors, which preserve the class."),
        io.Image.Input(
            "class_images",
            optional=True,
            tooltip="Your own class pictures, instead of those from Class Priors or in addition to them.",
        ),
    ]


def _preview_input() -> io.Input:
    """How often the node shows sample pictures; older saved graphs don't have it."""
    return widget(TrainSettings, _PREVIEW, default=100, optional=True)


class TrainLora(Node):
    """Trains, resumes an interrupted run, or returns a finished one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothTrainLora",
            display_name="Train LoRA (DreamBooth)",
            category=CATEGORY,
            description="Trains a LoRA that teaches the model your subject. Cancel at any time: queue it again and it "
            "resumes where it stopped. The file is saved in ComfyUI's LoRA folder.",
            search_aliases=["dreambooth", "fine-tune", "lora training", "kohya", "train lora"],
            is_output_node=True,
            inputs=[
                *_sources("Base model from any loader. LoRAs already applied to it become part of the base."),
                io.LoraModel.Input(
                    "start_from",
                    optional=True,
                    tooltip="Adapter to continue training from. Its layers and ranks are kept.",
                ),
                io.LoraModel.Input(
                    "base_lora",
                    optional=True,
                    tooltip="Adapter applied to the model before training (two-stage training); the new one is "
                    "trained on top of it. With 'combine' in Training Settings the file holds both.",
                ),
                SETTINGS.Input("settings", optional=True, tooltip="All other settings, from Training Settings."),
                *(widget(TrainSettings, name, **_LORA_OPTIONS.get(name, {})) for name in _ON_THE_NODE),
                strength_input("base_lora_strength", "Strength of base_lora, if one is connected.", advanced=True),
                _preview_input(),
                widget(TrainSettings, _PRESET, optional=True),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the new adapter applied."),
                io.Clip.Output(display_name="clip", tooltip="The text encoders with the new adapter applied."),
                io.LoraModel.Output(
                    display_name="lora", tooltip="The adapter, for Apply LoRA, Save LoRA and ComfyUI's own LoRA nodes."
                ),
                io.String.Output(display_name="path", tooltip="Path of the adapter file."),
                io.String.Output(display_name="run", tooltip="Folder of the run, for Pick Best Checkpoint."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        subject: SubjectValue,
        priors: PriorsValue | None = None,
        class_images: Any = None,
        start_from: Any = None,
        base_lora: Any = None,
        settings: Mapping[str, Any] | None = None,
        base_lora_strength: float = 1.0,
        **values: Any,
    ) -> io.NodeOutput:
        """Train and apply the adapter."""
        from ..trainer.training.adapter import StartingPoint

        checked = TrainSettings.checked({**(settings or {}), **values})
        if checked.combine and base_lora is None:
            raise SettingsError(
                f"{suggest('combine')} is on, but no base_lora is connected to combine with.",
                f"Connect base_lora, or turn {suggest('combine')} off.",
            )
        start = as_adapter(start_from) if start_from is not None else None
        stacked = []
        base_model, base_clip = model, clip
        if base_lora is not None:
            stacked = [(as_adapter(base_lora), base_lora_strength)]
            base_model, base_clip = host.apply_adapter(model, clip, base_lora, base_lora_strength, base_lora_strength)
        result = _train(
            cls,
            BaseParts(base_model, base_clip, vae),
            TrainingPictures(subject, priors, class_images),
            checked,
            StartingPoint(start, stacked),
        )
        lora = as_wire(result.adapter)
        if not checked.combine:  # else the file holds base_lora, too
            model, clip = base_model, base_clip
        trained_model, trained_clip = host.apply_adapter(model, clip, lora, 1.0, 1.0)
        path = str(result.path)
        return io.NodeOutput(trained_model, trained_clip, lora, path, str(result.run), ui={"text": [path]})


class FineTuneCheckpoint(Node):
    """Trains all weights of the UNet, and of the text encoder if it has a rate: DreamBooth as first published."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothFineTune",
            display_name="Fine-tune Checkpoint (DreamBooth)",
            category=CATEGORY,
            description="Trains all weights of a Stable Diffusion 1.x model instead of an adapter. Saves a "
            "checkpoint, and a LoRA extracted from it. Needs 16 bytes of memory per weight (14 GB, plus activations) "
            "and 12 bytes of disk per weight for each checkpoint kept (10 GB).",
            search_aliases=["dreambooth", "full fine-tuning", "train checkpoint"],
            is_output_node=True,
            inputs=[
                *_sources(
                    "Stable Diffusion 1.x from any loader. LoRAs already applied to it become part of the checkpoint."
                ),
                SETTINGS.Input("settings", optional=True, tooltip="All other settings, from Training Settings."),
                *(
                    widget(TrainSettings, name, **_FINE_TUNING_OPTIONS.get(name, {}))
                    for name in _ON_THE_NODE
                    if name != "adapter"
                ),
                _preview_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The fine-tuned model, loaded from its file."),
                io.Clip.Output(display_name="clip", tooltip="The text encoders of the fine-tuned model."),
                io.Vae.Output(display_name="vae", tooltip="The VAE of the fine-tuned model."),
                io.LoraModel.Output(display_name="lora", tooltip="The change as a LoRA of the given rank."),
                io.String.Output(display_name="path", tooltip="Path of the checkpoint file."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        subject: SubjectValue,
        priors: PriorsValue | None = None,
        class_images: Any = None,
        settings: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> io.NodeOutput:
        """Train, and load the checkpoint."""
        from ..trainer.training.adapter import StartingPoint

        checked = TrainSettings.checked({**(settings or {}), **values, "adapter": "full"})
        result = _train(
            cls,
            BaseParts(model, clip, vae),
            TrainingPictures(subject, priors, class_images),
            checked,
            StartingPoint(),
        )
        tuned_model, tuned_clip, tuned_vae = host.load_checkpoint(result.checkpoint)
        path = str(result.checkpoint)
        lora = as_wire(result.adapter)
        return io.NodeOutput(tuned_model, tuned_clip, tuned_vae, lora, path, ui={"text": [path]})


@dataclass(frozen=True)
class BaseParts:
    """ComfyUI's MODEL, CLIP and VAE, to train upon."""

    model: Any
    clip: Any
    vae: Any


@dataclass(frozen=True)
class TrainingPictures:
    """What a training node learns from: its inputs subject, priors and class_images."""

    subject: SubjectValue
    priors: PriorsValue | None
    class_images: Any


def _train(
    node: type[io.ComfyNode], parts: BaseParts, pictures: TrainingPictures, settings: TrainSettings, starting_point: Any
) -> Any:
    """Train for a node, and show it there.

    Args:
        node: The clone of its class that ComfyUI runs.
        parts: What to train upon.
        pictures: What to learn.
        settings: Checked.
        starting_point: The engine's `StartingPoint`.

    Returns:
        The engine's `TrainResult`.
    """
    from ..trainer.adapters.apply import with_bundled_words
    from ..trainer.data.image_check import check_pictures
    from ..trainer.data.images import load_pictures
    from ..trainer.dreambooth import train
    from ..trainer.training.preflight import report_settings_without_effect
    from ..trainer.training.presets import apply_preset

    subject = pictures.subject
    workflow = (node.hidden.extra_pnginfo or {}).get("workflow")
    listener = TrainingListener(node, settings.name, subject.pictures, workflow)
    with listener.ending():
        preview_prompts = filled_prompts("preview_prompts", settings.preview_prompts, common_words(subject.words))
        feature_models = {}
        for name in ("score_clip", "score_dino"):
            model = getattr(settings, name).strip()
            if model:
                feature_models[name] = host_models.feature_model(model)
        class_pictures = list(pictures.priors.pictures) if pictures.priors else []
        if pictures.class_images is not None:
            class_pictures += load_pictures(list(pictures.class_images), subject.class_prompt, listener)
        with host.training_mode():
            base = host.borrow_base(parts.model, parts.clip, parts.vae)
            base = with_bundled_words(base, [adapter for adapter, _ in starting_point.stacked])
            settings = apply_preset(settings, base.family, listener, settings.changed())
            check_pictures(subject.pictures, settings, listener)
            report_settings_without_effect(
                settings,
                subject.pictures,
                subject.class_prompts,
                has_class_pictures=bool(class_pictures),
                starts_from_adapter=starting_point.start is not None,
                listener=listener,
            )
            return train(
                base,
                subject.pictures,
                class_pictures,
                settings.model_copy(update={**feature_models, "preview_prompts": preview_prompts}),
                paths=host.run_paths(),
                device=host.device_name(),
                listener=listener,
                starting_point=starting_point,
                words=subject.words,
            )
