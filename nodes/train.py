"""Train LoRA, and its further settings."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from comfy_api.latest import io

from ..trainer.settings.data import DataSettings
from ..trainer.settings.objective import ObjectiveSettings
from ..trainer.settings.optimizer import OptimizerSettings
from ..trainer.settings.preview import PreviewSettings
from ..trainer.settings.train import TrainSettings
from . import host, host_models
from .base import Node
from .host_progress import TrainingListener
from .lora import as_adapter, as_wire
from .priors import PriorsValue
from .subject import SubjectValue
from .widgets import CATEGORY, PRIORS, SETTINGS, SUBJECT, widget

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
_PREVIEW, _PRESET = "preview_every", "preset"
_NEWER = (  # last: saved workflows hold widget values by place
    *(name for name in PreviewSettings.model_fields if name != _PREVIEW),
    "keep_adapters",
    *DataSettings.model_fields,
    *ObjectiveSettings.model_fields,
    "log_with",
    *OptimizerSettings.model_fields,
    "fit",
    "base_quantization",
)
_ELSEWHERE = {*_ON_THE_NODE, *_WIRED, *_NEWER, _PREVIEW, _PRESET}
_FURTHER = (*(name for name in TrainSettings.model_fields if name not in _ELSEWHERE), *_NEWER)
_COMMON = (  # not folded away
    *("text_encoder_2_lr", "batch_size", "gradient_accumulation", "prior_weight", "flip", "lr_schedule"),
    *("lr_warmup_steps", "precision", "gradient_checkpointing", "checkpoint_every", "keep_checkpoints"),
    *("preview_prompts", "token", "score_clip", "score_dino", "early_stop", "aspect_buckets", "caption_dropout"),
    *("validation_pictures", "loss_weighting", "log_with", "optimizer", "ema_decay", "fit", "base_quantization"),
)
_FINE_TUNING: Mapping[str, Mapping[str, Any]] = {
    "learning_rate": {"default": 2e-6},
    "rank": {"default": 64, "tooltip": "Rank of the extracted LoRA."},
    "targets": {"tooltip": "Layers of the extracted LoRA; all weights are trained.", "default": "all"},
}
_ADAPTERS = ["lora", "dora", "loha", "lokr"]  # all weights are trained by Fine-tune Checkpoint


class TrainingSettings(Node):
    """Everything that Train LoRA does not show itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothTrainingSettings",
            display_name="Training Settings (DreamBooth)",
            category=CATEGORY,
            description="Batch size, schedule, precision, checkpoints and so on. Train LoRA works without this node.",
            search_aliases=["optimizer", "learning rate schedule", "gradient checkpointing", "batch size"],
            inputs=[
                widget(TrainSettings, name, advanced=None if name in _COMMON else True, optional=True)
                for name in _FURTHER
            ],
            outputs=[SETTINGS.Output(display_name="settings")],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        """Check the values alone; Train LoRA checks them together with its own."""
        unset = {name: None for name in ("alpha", "conv_alpha") if not values.get(name)}
        return io.NodeOutput(MappingProxyType(values | unset))


def _sources(model: str) -> list[io.Input]:
    """What training starts from: the model, described by `model`, and the pictures."""
    return [
        io.Model.Input("model", tooltip=model),
        io.Clip.Input("clip", tooltip="The model's text encoders."),
        io.Vae.Input("vae", tooltip="The model's VAE, which turns pictures into latents."),
        SUBJECT.Input("subject", tooltip="The pictures to learn from."),
        PRIORS.Input("priors", optional=True, tooltip="Class pictures that keep the class as it is."),
        io.Image.Input("class_images", optional=True, tooltip="Class pictures of your own, instead of priors."),
    ]


def _preview_input() -> io.Input:
    """How often the node shows sample pictures; graphs that were saved before have none."""
    return widget(TrainSettings, _PREVIEW, default=100, optional=True)


class TrainLora(Node):
    """Trains, goes on with an interrupted run, or returns a finished one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothTrainLora",
            display_name="Train LoRA (DreamBooth)",
            category=CATEGORY,
            description="Teaches the model your subject. Cancel at any moment: queue again and it goes on where it "
            "stopped. The adapter file lands in ComfyUI's LoRA folder.",
            search_aliases=["dreambooth", "fine-tune", "lora training", "kohya", "train lora"],
            is_output_node=True,
            inputs=[
                *_sources("Base model, from any loader; LoRAs applied before are trained upon."),
                io.LoraModel.Input(
                    "start_from", optional=True, tooltip="Adapter to go on training; its layers and ranks are kept."
                ),
                io.LoraModel.Input(
                    "base_lora",
                    optional=True,
                    tooltip="Adapter that is put on the model before training (first stage), so that the new one is "
                    "learned on top; with 'combine' in Training Settings the file holds both.",
                ),
                SETTINGS.Input("settings", optional=True, tooltip="Everything else."),
                *(
                    widget(TrainSettings, name, **({"options": _ADAPTERS} if name == "adapter" else {}))
                    for name in _ON_THE_NODE
                ),
                io.Float.Input(
                    "base_lora_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Strength of base_lora, if one is connected.",
                ),
                _preview_input(),
                widget(TrainSettings, _PRESET, optional=True),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the new adapter."),
                io.Clip.Output(display_name="clip"),
                io.LoraModel.Output(display_name="lora"),
                io.String.Output(display_name="path", tooltip="The adapter file."),
                io.String.Output(display_name="run", tooltip="The run's folder, for Pick Best Checkpoint."),
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
        from ..trainer.core.errors import SettingsError
        from ..trainer.training.adapter import StartingPoint

        checked = TrainSettings.checked({**(settings or {}), **values})
        if checked.combine and base_lora is None:
            raise SettingsError(
                "combine is on, but no base_lora is connected to combine with.",
                "Connect base_lora, or turn combine off in Training Settings.",
            )
        start = as_adapter(start_from) if start_from is not None else None
        stacked = [(as_adapter(base_lora), base_lora_strength)] if base_lora is not None else []
        lower = (model, clip)
        if stacked:
            lower = host.apply_adapter(model, clip, base_lora, base_lora_strength, base_lora_strength)
        result = run_training(
            cls.hidden, (*lower, vae), subject, priors, class_images, checked, StartingPoint(start, stacked)
        )
        adapter = as_wire(result.adapter)
        trained = host.apply_adapter(*((model, clip) if checked.combine else lower), adapter, 1.0, 1.0)
        return io.NodeOutput(*trained, adapter, str(result.path), str(result.run), ui={"text": [str(result.path)]})


class FineTuneCheckpoint(Node):
    """Trains all weights of the UNet, and of the text encoder if it has a rate: DreamBooth as first published."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothFineTune",
            display_name="Fine-tune Checkpoint (DreamBooth)",
            category=CATEGORY,
            description="Trains all weights of a Stable Diffusion 1.x model instead of an adapter. That takes 16 "
            "bytes of memory for every weight (14 GB and what the activations need), and 12 bytes of disk for each "
            "checkpoint kept (10 GB). Gives a checkpoint file, and a LoRA extracted from it.",
            search_aliases=["dreambooth", "full fine-tuning", "train checkpoint"],
            is_output_node=True,
            inputs=[
                *_sources("Stable Diffusion 1.x, from any loader; LoRAs applied before become part of it."),
                SETTINGS.Input("settings", optional=True, tooltip="Everything else."),
                *(
                    widget(TrainSettings, name, **_FINE_TUNING.get(name, {}))
                    for name in _ON_THE_NODE
                    if name != "adapter"
                ),
                _preview_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The tuned model, loaded from its file."),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
                io.LoraModel.Output(display_name="lora", tooltip="What changed, as a LoRA of the given rank."),
                io.String.Output(display_name="path", tooltip="The checkpoint file."),
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
        result = run_training(cls.hidden, (model, clip, vae), subject, priors, class_images, checked, StartingPoint())
        adapter = as_wire(result.adapter)
        tuned = host.load_checkpoint(result.checkpoint)
        return io.NodeOutput(*tuned, adapter, str(result.checkpoint), ui={"text": [str(result.checkpoint)]})


def run_training(
    hidden: Any,
    parts: tuple[Any, Any, Any],
    subject: SubjectValue,
    priors: PriorsValue | None,
    class_images: Any,
    settings: TrainSettings,
    stage: Any,
) -> Any:
    """Train on ComfyUI's MODEL, CLIP and VAE; returns the engine's `TrainResult`."""
    from ..trainer.data.image_check import check_pictures
    from ..trainer.data.images import load_pictures
    from ..trainer.dreambooth import train
    from ..trainer.training.presets import apply_preset, changed

    workflow = (hidden.extra_pnginfo or {}).get("workflow")
    listener = TrainingListener(hidden.unique_id, settings.name, subject.pictures, workflow)
    with listener.ending():
        named = {name: getattr(settings, name).strip() for name in ("score_clip", "score_dino")}
        judges = {name: host_models.feature_model(value) for name, value in named.items() if value}
        class_pictures = list(priors.pictures) if priors else []
        if class_images is not None:
            class_pictures += load_pictures(list(class_images), subject.class_prompt, listener)
        with host.training_mode():
            base = host.borrow_base(*parts)
            settings = apply_preset(settings, base.family, listener, changed(settings))
            check_pictures(subject.pictures, settings.resolution, listener)
            return train(
                base,
                subject.pictures,
                class_pictures,
                settings.model_copy(update=judges),
                host.loras_folder(),
                host.work_folder() / "runs",
                host.device_name(),
                listener,
                stage=stage,
                checkpoints_dir=host.checkpoints_folder(),
            )
