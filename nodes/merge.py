"""Merge adapters: by a method, with learned coefficients, or one scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from ..trainer.settings.merge import LearnedMergeSettings, MergeSettings, MethodName
from . import host
from .api import io
from .base import Node
from .host_progress import NodeListener
from .lora import as_adapter, as_wire
from .widgets import CATEGORY, strength_input, widget

_MOST_ADAPTERS = 20
# Settings of methods, in this order on the node: saved workflows hold the values by their place.
_METHOD_SETTINGS = ("density", "protected", "seed", "rank", "energy", "conv_rank", "ratio")
_FOLDED_AWAY = ("conv_rank", "ratio")
_DEFAULT_STRENGTHS = "1.0, 1.0"
_SHOWN = (  # by Learned Merge
    "subject_prompt",
    "style_prompt",
    "steps",
    "learning_rate",
    "resolution",
    "seed",
    "overlap_weight",
    "split",
    "pictures",
    "sampling_steps",
    "guidance",
    "precision",
    "gradient_checkpointing",
)
_EXAMPLE_PROMPTS = {
    "subject_prompt": {"default": "a photo of sks dog"},
    "style_prompt": {"default": "pixel art, a house | pixel art, a red car"},
}


def base_inputs() -> list[io.Input]:
    """The base model, for the types of adapters that need it."""
    tooltip = "Only needed for DoRA and OFT, whose weight change depends on the base model."
    return [
        io.Model.Input("model", optional=True, tooltip=tooltip),
        io.Clip.Input("clip", optional=True, tooltip=tooltip),
    ]


def report_outputs() -> list[io.Output]:
    """The outputs that show how much is kept of each adapter."""
    return [
        io.String.Output(display_name="report", tooltip="How much of each adapter is kept, by block, and warnings."),
        io.Image.Output(display_name="heat_map", tooltip="The report as a picture."),
    ]


def as_image(picture: Any) -> Any:
    """A PIL picture as IMAGE, (1, height, width, 3) in [0, 1]."""
    from ..trainer.data.images import to_pixels

    return (to_pixels(picture).permute(1, 2, 0)[None] + 1) / 2


def merged_output(merged: Any) -> io.NodeOutput:
    """Adapter, report and heat map of the engine's `Merged`; the report is shown on the node, too."""
    text = merged.report.as_text()
    return io.NodeOutput(as_wire(merged.adapter), text, as_image(merged.report.heat_map()), ui={"text": [text]})


def _title(lora: Any, number: int) -> str:
    """What reports call an adapter, such as "1: my-dog"."""
    metadata = getattr(lora, "metadata", {})
    return f"{number}: {metadata.get('modelspec.title') or metadata.get('ss_output_name') or 'adapter'}"


def _method_option(method: str) -> io.DynamicCombo.Option:
    """A merge method with the settings that it uses."""
    used = MergeSettings.model_construct(method=method).used_settings
    inputs = [
        widget(MergeSettings, name, advanced=name in _FOLDED_AWAY or None) for name in _METHOD_SETTINGS if name in used
    ]
    return io.DynamicCombo.Option(method, inputs)


class MergeLoras(Node):
    """Merges any number of adapters into one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        lora = io.LoraModel.Input("lora")
        template = io.Autogrow.TemplatePrefix(lora, prefix="lora_", min=1, max=_MOST_ADAPTERS)
        return io.Schema(
            node_id="DreamBoothMergeLoras",
            display_name="Merge LoRAs (DreamBooth)",
            category=CATEGORY,
            description="Merges several adapters into one: their exact sum, or with less interference between them. "
            "Connect one and the next input appears.",
            search_aliases=["combine loras", "merge lora", "add loras", "ties", "dare", "svd merge"],
            inputs=[
                io.Autogrow.Input(
                    "loras", template=template, tooltip="Adapters of any kind, for the same model family."
                ),
                io.String.Input(
                    "strengths",
                    default=_DEFAULT_STRENGTHS,
                    tooltip="One number per adapter, in order; two with a colon for UNet and text encoder, such as "
                    "1.0, 0.7:0.5. Missing ones are 1; negative ones subtract.",
                ),
                io.DynamicCombo.Input(
                    "method",
                    options=[_method_option(method) for method in get_args(MethodName)],
                    tooltip=MergeSettings.model_fields["method"].description,
                ),
                *base_inputs(),
            ],
            outputs=[io.LoraModel.Output(display_name="lora", tooltip="The merged adapter."), *report_outputs()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, loras: Mapping[str, Any], strengths: str, method: Mapping[str, Any], model: Any = None, clip: Any = None
    ) -> io.NodeOutput:
        """Merge."""
        import torch

        from ..trainer.merging.merge import WeightedAdapter, merge

        settings = MergeSettings.checked(method)
        connected = [lora for lora in loras.values() if lora is not None]
        pairs = zip(connected, read_strengths(strengths, len(connected)), strict=True)
        adapters = [
            WeightedAdapter(as_adapter(lora), _title(lora, number), strength_unet, strength_text_encoder)
            for number, (lora, (strength_unet, strength_text_encoder)) in enumerate(pairs, start=1)
        ]
        with host.interruptible():
            merged = merge(
                adapters,
                settings,
                host.lent_weights(model, clip),
                torch.device(host.algebra_device()),
                NodeListener(cls),
            )
        return merged_output(merged)


def read_strengths(text: str, count: int) -> list[tuple[float, float]]:
    """Strengths for UNet and text encoder of `count` adapters, from "1.0, 0.7:0.5".

    Raises:
        SettingsError: It is not such a list, or too long.
    """
    from ..trainer.core.errors import SettingsError

    entries = [entry.strip() for entry in text.replace("\n", ",").split(",") if entry.strip()]
    if len(entries) > count and text.strip() != _DEFAULT_STRENGTHS:
        raise SettingsError(
            f"strengths has {len(entries)} numbers for {count} adapters.", "Enter one number for each adapter."
        )
    strengths = []
    for entry in entries[:count]:
        try:
            numbers = [float(number) for number in entry.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or not all(map(math.isfinite, numbers)):
            raise SettingsError(f"strengths: '{entry}' is not a number.", "Write numbers, such as 1.0, 0.7 or 0.7:0.5.")
        strengths.append((numbers[0], numbers[-1]))
    return strengths + [(1.0, 1.0)] * (count - len(strengths))


class ScaleLora(Node):
    """Scales an adapter, or parts of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothScaleLora",
            display_name="Scale LoRA (DreamBooth)",
            category=CATEGORY,
            description="Makes an adapter stronger or weaker, as a whole or block by block.",
            search_aliases=["lora block weight", "lora strength", "lbw"],
            inputs=[
                io.LoraModel.Input("lora", tooltip="Adapter to scale."),
                strength_input("strength_model", "Factor for its UNet or transformer layers."),
                strength_input("strength_clip", "Factor for its text encoder layers."),
                io.String.Input(
                    "block_weights",
                    default="",
                    multiline=True,
                    tooltip="Additional factors for parts of the model: PATTERN=FACTOR, separated by spaces, such as "
                    "down_blocks=0.5 mid_block=0 attn1=0.8. The last match in a layer's path wins.",
                ),
                *base_inputs(),
            ],
            outputs=[io.LoraModel.Output(display_name="lora", tooltip="The scaled adapter.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        lora: Any,
        strength_model: float,
        strength_clip: float,
        block_weights: str,
        model: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        """Scale."""
        from ..trainer.core.errors import SettingsError
        from ..trainer.merging.merge import WeightedAdapter, merge
        from ..trainer.settings.merge import parse_block_weights

        try:
            blocks = parse_block_weights(block_weights)
        except ValueError as error:
            raise SettingsError(f"block_weights: {error}.", "Write PATTERN=FACTOR, separated by spaces.") from None
        adapter = WeightedAdapter(as_adapter(lora), _title(lora, 1), strength_model, strength_clip, blocks)
        merged = merge([adapter], MergeSettings(), host.lent_weights(model, clip))
        return io.NodeOutput(as_wire(merged.adapter))


class LearnedMerge(Node):
    """Merges a subject and a style with learned coefficients."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothLearnedMerge",
            display_name="Learned Merge (DreamBooth)",
            category=CATEGORY,
            description="Merges a subject's and a style's adapter so that they interfere less, by training a "
            "coefficient for every column of both (ZipLoRA). Takes about as long as 400 training steps.",
            search_aliases=["ziplora", "merge subject and style", "combine loras"],
            inputs=[
                io.Model.Input("model", tooltip="Base model of both adapters, without them."),
                io.Clip.Input("clip", tooltip="Its text encoders."),
                io.Vae.Input("vae", tooltip="Its VAE."),
                io.LoraModel.Input("subject_lora", tooltip="The subject's adapter."),
                io.LoraModel.Input("style_lora", tooltip="The style's adapter."),
                *(widget(LearnedMergeSettings, name, **_EXAMPLE_PROMPTS.get(name, {})) for name in _SHOWN),
                strength_input("subject_strength", "Strength of the subject's adapter. 1 is as trained."),
                strength_input("style_strength", "Strength of the style's adapter. 1 is as trained."),
            ],
            outputs=[io.LoraModel.Output(display_name="lora", tooltip="The merged adapter."), *report_outputs()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        subject_lora: Any,
        style_lora: Any,
        subject_strength: float,
        style_strength: float,
        **values: Any,
    ) -> io.NodeOutput:
        """Train the coefficients and merge."""
        from ..trainer.core.devices import pick_device
        from ..trainer.merging.merge import WeightedAdapter
        from ..trainer.merging.ziplora import learned_merge

        settings = LearnedMergeSettings.checked(values)
        subject = WeightedAdapter(as_adapter(subject_lora), _title(subject_lora, 1), subject_strength, subject_strength)
        style = WeightedAdapter(as_adapter(style_lora), _title(style_lora, 2), style_strength, style_strength)
        device = pick_device(host.device_name())
        with host.training_mode():
            base = host.borrow_base(model, clip, vae)
            merged = learned_merge(base, subject, style, settings, device, NodeListener(cls))
        return merged_output(merged)
