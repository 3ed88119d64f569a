"""Load, apply and save adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..trainer.settings.train import TrainSettings
from . import host
from .api import io
from .base import Node
from .widgets import CATEGORY, strength_input, widget


class LoraTensors(dict[str, Any]):
    """What this pack puts on a LORA_MODEL wire: a dict of tensors as ComfyUI's own nodes use it, plus the metadata."""

    def __init__(self, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        """Hold the tensors under the keys of this pack's files, and the file's metadata."""
        super().__init__(tensors)
        self.metadata = dict(metadata)


def as_adapter(lora: Mapping[str, Any]) -> Any:
    """The engine's `Adapter` of what a LORA_MODEL wire carries."""
    from ..trainer.adapters.kohya import parse_adapter

    return parse_adapter(lora, getattr(lora, "metadata", {}))


def as_wire(adapter: Any) -> LoraTensors:
    """What a LORA_MODEL wire carries of the engine's `Adapter`: its tensors as they stand in its file."""
    from ..trainer.adapters.file_keys import in_file

    return LoraTensors(in_file(adapter.state_dict()), adapter.metadata)


class LoadLoraFile(Node):
    """Reads an adapter file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothLoadLora",
            display_name="Load LoRA File (DreamBooth)",
            category=CATEGORY,
            description="Loads an adapter file in the naming of kohya, diffusers or PEFT, to apply, merge, inspect or "
            "convert it.",
            search_aliases=["load lora", "open lora", "lora file"],
            inputs=[
                io.Combo.Input("file", options=host.lora_names(), tooltip="File in one of ComfyUI's LoRA folders.")
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="lora", tooltip="The adapter, for Apply LoRA and ComfyUI's own LoRA nodes."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str = "", **_: Any) -> str:
        """A text that changes with the file."""
        status = host.lora_path(file).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        """Read the file; the output's tensors have the names that this pack's own files have."""
        from ..trainer.adapters.kohya import read_adapter

        path = host.lora_path(file)
        adapter = read_adapter(path)
        metadata = {"ss_output_name": path.stem, **adapter.metadata}  # so that reports have a name for it
        return io.NodeOutput(as_wire(replace(adapter, metadata=metadata)))


class ApplyLora(Node):
    """Puts an adapter on a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothApplyLora",
            display_name="Apply LoRA (DreamBooth)",
            category=CATEGORY,
            description="Applies an adapter to a model, as Load LoRA does. Refuses adapters made for another model "
            "family.",
            search_aliases=["use lora", "lora strength"],
            inputs=[
                io.Model.Input("model", tooltip="Model to apply the adapter to."),
                io.Clip.Input("clip", optional=True, tooltip="Its text encoder, for adapters that also change it."),
                io.LoraModel.Input("lora", tooltip="Adapter from Train LoRA or Load LoRA File."),
                strength_input(
                    "strength_model",
                    "Strength on the UNet or transformer. 1 is as trained; 0.6 to 0.8 often looks more natural.",
                ),
                strength_input("strength_clip", "Strength on the text encoder. 1 is as trained."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the adapter applied."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder with the adapter applied."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, lora: Any, strength_model: float, strength_clip: float, clip: Any = None
    ) -> io.NodeOutput:
        """Apply."""
        return io.NodeOutput(*host.apply_adapter(model, clip, lora, strength_model, strength_clip))


class SaveLora(Node):
    """Writes an adapter file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothSaveLora",
            display_name="Save LoRA (DreamBooth)",
            category=CATEGORY,
            description="Saves an adapter as a LoRA file in ComfyUI's LoRA folder. An existing file is never "
            "overwritten.",
            search_aliases=["export lora", "write lora"],
            is_output_node=True,
            inputs=[
                io.LoraModel.Input("lora", tooltip="Adapter to save."),
                widget(TrainSettings, "name"),
                widget(TrainSettings, "save_precision", id="precision", advanced=None),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Path of the adapter file.")],
        )

    @classmethod
    def execute(cls, lora: Mapping[str, Any], name: str, precision: str) -> io.NodeOutput:
        """Write under the first free name."""
        from ..trainer.adapters.kohya import write_adapter
        from ..trainer.adapters.metadata import FINGERPRINT_KEY
        from ..trainer.core.devices import DTYPES
        from ..trainer.training.gallery import is_wanted, write_gallery
        from ..trainer.training.runs.index import RunIndex

        name = TrainSettings.checked({"name": name}).name
        wanted = host.loras_folder() / f"{name}.safetensors"
        adapter = as_adapter(lora)
        path = write_adapter(wanted, adapter, DTYPES[precision], replace=False)
        run = RunIndex(host.runs_folder()).with_fingerprint(adapter.metadata.get(FINGERPRINT_KEY, ""))
        if run is not None and is_wanted(run):
            write_gallery(path, run)
        return io.NodeOutput(str(path), ui={"text": [str(path)]})
