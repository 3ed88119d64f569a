"""Class Priors: pictures of the class by the base model itself, for prior preservation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..trainer.core.prompts import common_words
from ..trainer.settings.base import filled_prompts
from ..trainer.settings.train import PriorSettings, TrainSettings
from . import host
from .api import io
from .base import Node
from .host_progress import NodeListener
from .subject import SubjectValue
from .widgets import CATEGORY, PRIORS, SUBJECT, widget

_SHOWN = 16  # pictures of the output `images`
_NEWER = ("guidance_start", "guidance_end")  # last: saved workflows hold the values of widgets by their place


@dataclass(frozen=True)
class PriorsValue:
    """What a DREAMBOOTH_PRIORS wire carries: the engine's `Picture`s, captioned with the class prompt."""

    pictures: tuple[Any, ...]


class ClassPriors(Node):
    """Generates class pictures, or takes those that exist for the same settings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothClassPriors",
            display_name="Class Priors (DreamBooth)",
            category=CATEGORY,
            description="Generates pictures of the class with the base model. Trained alongside your subject, they "
            "keep other dogs from turning into yours. They are kept on disk and reused.",
            search_aliases=["prior preservation", "regularization images", "class images", "reg images"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, without your subject."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Its VAE, which decodes latents into pictures."),
                SUBJECT.Input(
                    "subject",
                    optional=True,
                    tooltip="Supplies the prompt unless you type one. Chained subjects supply one each.",
                ),
                widget(PriorSettings, "class_prompt", id="prompt", advanced=None),
                widget(PriorSettings, "prior_count", id="count", default=100, min=1),
                widget(TrainSettings, "resolution"),
                widget(PriorSettings, "prior_scheduler", id="scheduler"),
                widget(PriorSettings, "prior_steps", id="steps"),
                widget(PriorSettings, "prior_guidance", id="guidance"),
                widget(PriorSettings, "prior_seed", id="seed"),
                widget(PriorSettings, "prior_batch_size", id="batch_size"),
                widget(TrainSettings, "precision"),
                *(widget(PriorSettings, f"prior_{name}", id=name, optional=True) for name in _NEWER),
            ],
            outputs=[
                PRIORS.Output(display_name="priors", tooltip="For Train LoRA or Fine-tune Checkpoint."),
                io.Image.Output(display_name="images", tooltip=f"The first {_SHOWN} of them, for a look."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        prompt: str,
        resolution: int,
        precision: str,
        subject: SubjectValue | None = None,
        **values: Any,
    ) -> io.NodeOutput:
        """Generate the missing pictures."""
        import torch

        from ..trainer.core.devices import pick_device, pick_precision
        from ..trainer.data.class_images import by_prompt, generate_class_images
        from ..trainer.data.images import to_pixels

        prompts = list(subject.class_prompts if subject else [""])
        if prompt.strip():
            prompts = [filled_prompts("class_prompt", prompt, common_words(subject.words if subject else ()))]
        common = {f"prior_{name}": value for name, value in values.items() if not _is_left_open(name, value)}
        settings = by_prompt([PriorSettings.checked(common | {"class_prompt": prompt}) for prompt in prompts])
        device = pick_device(host.device_name())
        listener = NodeListener(cls)
        pictures: list[Any] = []
        with host.training_mode(), torch.no_grad():
            base = host.borrow_base(model, clip, vae)
            for prior_settings in settings:
                pictures += generate_class_images(
                    base,
                    prior_settings,
                    resolution=resolution,
                    root=host.work_folder() / "class-pictures",
                    device=device,
                    precision=pick_precision(precision, device),
                    listener=listener,
                )
        shown = torch.stack([to_pixels(picture.open()) for picture in pictures[:_SHOWN]])
        return io.NodeOutput(PriorsValue(tuple(pictures)), (shown.permute(0, 2, 3, 1) + 1) / 2)


def _is_left_open(name: str, value: Any) -> bool:
    """Whether a widget is one that graphs of earlier versions lack, which the page then fills with its default."""
    return name in _NEWER and bool(value == PriorSettings.model_fields[f"prior_{name}"].default)
