"""Caption Images: captions by BLIP, with the subject's rare word in them."""

from __future__ import annotations

from typing import Any

from ..trainer.settings.caption import CaptionSettings
from . import host, host_models
from .api import io
from .base import Node
from .host_progress import NodeListener
from .widgets import CATEGORY, widget


class CaptionImages(Node):
    """Writes captions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothCaptionImages",
            display_name="Caption Images (DreamBooth)",
            category=CATEGORY,
            description="Captions each picture with BLIP and puts your subject's rare word in. Captions separate the "
            "subject from everything else in its pictures.",
            search_aliases=["blip", "caption", "tag", "describe", "interrogate", "image to text"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures to caption."),
                io.String.Input(
                    "model",
                    default="Salesforce/blip-image-captioning-base",
                    tooltip="BLIP model: a folder in models/BLIP (config.json, model.safetensors, "
                    "preprocessor_config.json and the tokenizer's files), a path, or a Hugging Face model ID.",
                ),
                widget(CaptionSettings, "token", default="sks"),
                widget(CaptionSettings, "class_noun", default="dog"),
                widget(CaptionSettings, "text"),
                widget(CaptionSettings, "template", advanced=True),
                widget(CaptionSettings, "beams", advanced=True),
                io.Boolean.Input(
                    "download", default=False, tooltip="Download the model from Hugging Face if it isn't there yet."
                ),
            ],
            outputs=[
                io.String.Output(display_name="captions", tooltip="One caption per line, in the order of the pictures.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Any, model: str, download: bool, **values: Any) -> io.NodeOutput:
        """Caption the pictures."""
        import torch

        from ..trainer.core.events import SilentListener
        from ..trainer.data.captioning import caption_pictures, open_captioner
        from ..trainer.data.images import load_pictures

        settings = CaptionSettings.checked(values)
        pictures = load_pictures(list(images), "", SilentListener())  # of one size: all are good, or none
        device = torch.device(host.device_name())
        with host.interruptible():
            captioner = open_captioner(host_models.caption_model(model.strip()), device, download=download)
            captioned = list(caption_pictures(captioner, pictures, settings, NodeListener(cls)))
        text = "\n".join(caption for _, caption in captioned)
        return io.NodeOutput(text, ui={"text": [text]})
