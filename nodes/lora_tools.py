"""Resize, extract and inspect adapters."""

from __future__ import annotations

import json
from typing import Any

from ..trainer.settings.merge import ExtractSettings, TruncationSettings
from . import host
from .api import io
from .base import Node
from .host_progress import NodeListener
from .lora import as_adapter
from .merge import as_image, base_inputs, merged_output, report_outputs
from .widgets import CATEGORY, widget


class ResizeLora(Node):
    """Changes the rank of an adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothResizeLora",
            display_name="Resize LoRA (DreamBooth)",
            category=CATEGORY,
            description="Makes an adapter of any kind smaller: the closest LoRA of a given rank, or of the lowest "
            "rank that keeps a given share of each layer's energy.",
            search_aliases=["lora rank", "shrink lora", "compress lora", "convert lycoris"],
            inputs=[
                io.LoraModel.Input("lora", tooltip="Adapter of any kind."),
                *(widget(TruncationSettings, name) for name in TruncationSettings.model_fields),
                *base_inputs(),
            ],
            outputs=[
                io.LoraModel.Output(display_name="lora", tooltip="The smaller adapter, a plain LoRA."),
                *report_outputs(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, lora: Any, model: Any = None, clip: Any = None, **values: Any) -> io.NodeOutput:
        """Resize."""
        import torch

        from ..trainer.merging.merge import WeightedAdapter, resize

        settings = TruncationSettings.checked(values)
        with host.interruptible():
            resized = resize(
                WeightedAdapter(as_adapter(lora), "the adapter"),
                settings,
                host.lent_weights(model, clip),
                torch.device(host.algebra_device()),
                NodeListener(cls),
            )
        return merged_output(resized)


class ExtractLora(Node):
    """Makes a LoRA of the difference between two models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothExtractLora",
            display_name="Extract LoRA (DreamBooth)",
            category=CATEGORY,
            description="Extracts what a fine-tuned model has learned beyond its base as a LoRA.",
            search_aliases=["model difference", "checkpoint to lora", "subtract models"],
            inputs=[
                io.Model.Input("model", tooltip="The fine-tuned model."),
                io.Model.Input("base_model", tooltip="The model it was fine-tuned from."),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The fine-tuned text encoder, to extract its change as well."
                ),
                io.Clip.Input("base_clip", optional=True, tooltip="The text encoder it was fine-tuned from."),
                *(widget(ExtractSettings, name) for name in TruncationSettings.model_fields),
            ],
            outputs=[io.LoraModel.Output(display_name="lora", tooltip="The extracted LoRA."), *report_outputs()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, base_model: Any, clip: Any = None, base_clip: Any = None, **values: Any
    ) -> io.NodeOutput:
        """Extract."""
        import torch

        from ..trainer.core.errors import SettingsError
        from ..trainer.merging.extract import extract_between

        if (clip is None) != (base_clip is None):
            raise SettingsError("Only one of clip and base_clip is connected.", "Connect both or neither.")
        settings = ExtractSettings.checked(values)
        with host.interruptible():
            extracted = extract_between(
                host.lent_weights(base_model, base_clip),
                host.lent_weights(model, clip),
                settings,
                torch.device(host.algebra_device()),
                NodeListener(cls),
            )
        return merged_output(extracted)


class InspectLora(Node):
    """Describes an adapter, and where in the model it works."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothInspectLora",
            display_name="Inspect LoRA (DreamBooth)",
            category=CATEGORY,
            description="Shows what an adapter is, which blocks it acts on, how much of its rank it uses, and how "
            "much it overlaps with another one.",
            search_aliases=["lora info", "lora metadata", "lora blocks", "compare loras"],
            is_output_node=True,
            inputs=[
                io.LoraModel.Input("lora", tooltip="Adapter to inspect."),
                io.LoraModel.Input("other", optional=True, tooltip="Another adapter, to compare with."),
                *base_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The description as text."),
                io.Image.Output(display_name="heat_map", tooltip="Energy, used rank and overlap by block."),
                io.String.Output(display_name="json", tooltip="Everything as JSON, for other programs."),
            ],
        )

    @classmethod
    def execute(cls, lora: Any, other: Any = None, model: Any = None, clip: Any = None) -> io.NodeOutput:
        """Describe."""
        from ..trainer.cli.inspect import describe_adapter, facts_as_text
        from ..trainer.merging.profile import profile_adapter
        from ..trainer.merging.report import heat_map

        adapter = as_adapter(lora)
        second = None if other is None else as_adapter(other)
        table = profile_adapter(adapter, second, host.lent_weights(model, clip))
        facts = describe_adapter(adapter) | {"blocks": table}
        text = facts_as_text(facts)
        image = as_image(heat_map(facts["kind"], table))
        return io.NodeOutput(text, image, json.dumps(facts, ensure_ascii=False), ui={"text": [text]})
