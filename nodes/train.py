"""Train LoRA, and its further settings."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from comfy_api.latest import io

from ..trainer.config import TrainSettings
from . import host
from .lora import LoraTensors
from .priors import PriorsValue
from .subject import SubjectValue
from .widgets import CATEGORY, PRIORS, SETTINGS, SUBJECT, widget

_ON_THE_NODE = ("name", "steps", "learning_rate", "rank", "targets", "resolution", "seed")
_FURTHER = tuple(name for name in TrainSettings.model_fields if name not in _ON_THE_NODE)


class TrainingSettings(io.ComfyNode):
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
            inputs=[widget(TrainSettings, name, advanced=None) for name in _FURTHER],
            outputs=[SETTINGS.Output(display_name="settings")],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        """Check the values alone; Train LoRA checks them together with its own."""
        if not values.get("alpha"):
            values["alpha"] = None
        return io.NodeOutput(MappingProxyType(values))


class TrainLora(io.ComfyNode):
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
                io.Model.Input("model", tooltip="Base model, from any loader; LoRAs applied before are trained upon."),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.Vae.Input("vae", tooltip="The model's VAE, which turns pictures into latents."),
                SUBJECT.Input("subject", tooltip="The pictures to learn from."),
                PRIORS.Input("priors", optional=True, tooltip="Class pictures that keep the class as it is."),
                io.Image.Input("class_images", optional=True, tooltip="Class pictures of your own, instead of priors."),
                SETTINGS.Input("settings", optional=True, tooltip="Everything else."),
                *(widget(TrainSettings, name) for name in _ON_THE_NODE),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the new adapter."),
                io.Clip.Output(display_name="clip"),
                io.LoraModel.Output(display_name="lora"),
                io.String.Output(display_name="path", tooltip="The adapter file."),
            ],
            hidden=[io.Hidden.unique_id],
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
        """Train and apply the adapter."""
        from ..trainer.dreambooth import train
        from ..trainer.pictures import load_pictures

        checked = TrainSettings.checked({**(settings or {}), **values})
        listener = host.NodeListener(cls.hidden.unique_id)
        class_pictures = list(priors.pictures) if priors else []
        if class_images is not None:
            class_pictures += load_pictures(list(class_images), subject.class_prompt, listener)
        with host.training_mode():
            result = train(
                host.borrow_base(model, clip, vae),
                subject.pictures,
                class_pictures,
                checked,
                host.loras_folder(),
                host.work_folder() / "runs",
                host.device_name(),
                listener,
            )
        adapter = LoraTensors(result.adapter.state_dict(), result.adapter.metadata)
        trained_model, trained_clip = host.apply_adapter(model, clip, adapter, 1.0, 1.0)
        return io.NodeOutput(trained_model, trained_clip, adapter, str(result.path), ui={"text": [str(result.path)]})
