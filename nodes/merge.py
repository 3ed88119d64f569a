"""Merge adapters: by a method, with learned coefficients, or one scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io

from ..trainer.settings.merge import LearnedMergeSettings, MergeSettings
from . import host
from .base import Node
from .host_progress import NodeListener
from .lora import as_adapter, as_wire
from .widgets import CATEGORY, widget

_MOST = 20
_STRENGTH = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}
_SIZE = ("rank", "energy", "conv_rank", "ratio")
_OPTIONS = {
    "sum": (),
    "svd": _SIZE,
    "ties": ("density", *_SIZE),
    "dare": ("density", "seed", *_SIZE),
    "dare-ties": ("density", "seed", *_SIZE),
    "prune": ("density", *_SIZE),
    "orthogonal": ("protected",),
}


def base_inputs() -> list[io.Input]:
    """The base model, for the kinds of adapters that need it."""
    why = "For DoRA and OFT, whose change depends on the model that they were made for."
    return [
        io.Model.Input("model", optional=True, tooltip=why),
        io.Clip.Input("clip", optional=True, tooltip=why),
    ]


def report_outputs() -> list[io.Output]:
    """The outputs that tell what was kept."""
    return [
        io.String.Output(display_name="report", tooltip="What is kept of each adapter, by block, and warnings."),
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
    stated = getattr(lora, "metadata", {})
    return f"{number}: {stated.get('modelspec.title') or stated.get('ss_output_name') or 'adapter'}"


class MergeLoras(Node):
    """Merges any number of adapters into one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        options = [
            io.DynamicCombo.Option(
                method, [widget(MergeSettings, name, advanced=name in ("conv_rank", "ratio") or None) for name in names]
            )
            for method, names in _OPTIONS.items()
        ]
        template = io.Autogrow.TemplatePrefix(io.LoraModel.Input("lora"), prefix="lora_", min=1, max=_MOST)
        return io.Schema(
            node_id="DreamBoothMergeLoras",
            display_name="Merge LoRAs (DreamBooth)",
            category=CATEGORY,
            description="Makes one adapter of several: exactly their sum, or one that keeps them out of each other's "
            "way. Connect one, and the next input appears.",
            search_aliases=["combine loras", "merge lora", "add loras", "ties", "dare", "svd merge"],
            inputs=[
                io.Autogrow.Input("loras", template=template, tooltip="Adapters of any kind, of the same family."),
                io.String.Input(
                    "strengths",
                    default="1.0, 1.0",
                    tooltip="A number for each adapter, in order; two with a colon for UNet and text encoder, such as "
                    "1.0, 0.7:0.5. What is not given is 1. Negative: subtracted.",
                ),
                io.DynamicCombo.Input(
                    "method", options=options, tooltip=MergeSettings.model_fields["method"].description
                ),
                *base_inputs(),
            ],
            outputs=[io.LoraModel.Output(display_name="lora"), *report_outputs()],
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
        parts = [
            WeightedAdapter(as_adapter(lora), _title(lora, number), *pair)
            for number, (lora, pair) in enumerate(
                zip(connected, read_strengths(strengths, len(connected)), strict=True), start=1
            )
        ]
        with host.interruptible():
            merged = merge(
                parts,
                settings,
                host.lent_weights(model, clip),
                torch.device(host.algebra_device()),
                NodeListener(cls.hidden.unique_id),
            )
        return merged_output(merged)


def read_strengths(text: str, count: int) -> list[tuple[float, float]]:
    """Strengths for UNet and text encoder of `count` adapters, from "1.0, 0.7:0.5".

    Raises:
        SettingsError: It is no such list, or too long.
    """
    from ..trainer.core.errors import SettingsError

    entries = [entry.strip() for entry in text.replace("\n", ",").split(",") if entry.strip()]
    default = "1.0, 1.0"
    if len(entries) > count and text.strip() != default:
        raise SettingsError(
            f"strengths names {len(entries)} numbers for {count} adapters.", "Give one number for each adapter."
        )
    found = []
    for entry in entries[:count]:
        try:
            numbers = [float(number) for number in entry.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or not all(map(math.isfinite, numbers)):
            raise SettingsError(f"strengths: '{entry}' is no number.", "Write numbers, such as 1.0, 0.7 or 0.7:0.5.")
        found.append((numbers[0], numbers[-1]))
    return found + [(1.0, 1.0)] * (count - len(found))


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
                io.LoraModel.Input("lora", tooltip="The adapter."),
                io.Float.Input("strength_model", tooltip="Factor of its part for the UNet.", **_STRENGTH),
                io.Float.Input("strength_clip", tooltip="Factor of its part for the text encoder.", **_STRENGTH),
                io.String.Input(
                    "block_weights",
                    default="",
                    multiline=True,
                    tooltip="Further factors of parts of the model: PATTERN=FACTOR, separated by blanks, such as "
                    "down_blocks=0.5 mid_block=0 attn1=0.8; the last that is found in a layer's place counts.",
                ),
                *base_inputs(),
            ],
            outputs=[io.LoraModel.Output(display_name="lora")],
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
        from ..trainer.settings.merge import read_block_weights

        try:
            blocks = read_block_weights(block_weights)
        except ValueError as error:
            raise SettingsError(f"block_weights: {error}.", "Write PATTERN=FACTOR, separated by blanks.") from None
        part = WeightedAdapter(as_adapter(lora), _title(lora, 1), strength_model, strength_clip, blocks)
        merged = merge([part], MergeSettings(), host.lent_weights(model, clip))
        return io.NodeOutput(as_wire(merged.adapter))


class LearnedMerge(Node):
    """Merges a subject and a style with learned coefficients."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        shown = (
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
        texts = {"subject_prompt": "a photo of sks dog", "style_prompt": "pixel art, a house | pixel art, a red car"}
        return io.Schema(
            node_id="DreamBoothLearnedMerge",
            display_name="Learned Merge (DreamBooth)",
            category=CATEGORY,
            description="Makes one adapter of a subject's and a style's, so that each keeps to its own inputs: trains "
            "a coefficient for every column of both (ZipLoRA). Takes about as long as 400 training steps.",
            search_aliases=["ziplora", "merge subject and style", "combine loras"],
            inputs=[
                io.Model.Input("model", tooltip="The base model of both adapters, without them."),
                io.Clip.Input("clip", tooltip="Its text encoders."),
                io.Vae.Input("vae", tooltip="Its VAE."),
                io.LoraModel.Input("subject_lora", tooltip="The subject's adapter."),
                io.LoraModel.Input("style_lora", tooltip="The style's adapter."),
                *(
                    widget(LearnedMergeSettings, name, **({"default": texts[name]} if name in texts else {}))
                    for name in shown
                ),
                io.Float.Input("subject_strength", tooltip="Strength of the subject; 1 is as trained.", **_STRENGTH),
                io.Float.Input("style_strength", tooltip="Strength of the style; 1 is as trained.", **_STRENGTH),
            ],
            outputs=[io.LoraModel.Output(display_name="lora"), *report_outputs()],
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
        given = ((subject_lora, subject_strength), (style_lora, style_strength))
        parts: Sequence[Any] = [
            WeightedAdapter(as_adapter(lora), _title(lora, number), strength, strength)
            for number, (lora, strength) in enumerate(given, start=1)
        ]
        with host.training_mode():
            base = host.borrow_base(model, clip, vae)
            listener = NodeListener(cls.hidden.unique_id)
            merged = learned_merge(base, *parts, settings, pick_device(host.device_name()), listener)
        return merged_output(merged)
