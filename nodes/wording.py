"""How the nodes word a setting that the engine names in an error or a note (`trainer.core.errors.suggest`).

A widget of the node at hand is called by its name, another node's by both names. What no node has, since ComfyUI or the
graph decides it, has a phrase in `_IN_THE_GRAPH`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from ..trainer.core.errors import Wording, plain
from .api import io
from .widgets import PRIORS, SETTINGS, SUBJECT, setting_of

_TITLE_SUFFIX = " (DreamBooth)"
_SUPPLIES = (SETTINGS.io_type, SUBJECT.io_type, PRIORS.io_type)  # wires from nodes that hold settings
_SAMPLING = {"epsilon": "eps"}  # prediction types that ModelSamplingDiscrete calls otherwise

_IN_THE_GRAPH: Mapping[str, str] = {
    "base": "the input model",
    "vae": "the connected VAE",
    "tokenizer": "the tokenizer of the connected CLIP",
    "text_encoder": "the connected CLIP",
    "prediction_type": "sampling{value} on a ModelSamplingDiscrete node before the training",
    "clip_skip": "stop_at_clip_layer{value} on a CLIP Set Last Layer node before the training",
    "device": "the device that ComfyUI runs on",
    "output": "ComfyUI's output folder",
    "output_dir": "ComfyUI's output folder",
    "runs": "the input 'run' of Pick Best Checkpoint",
    "checkpoints": "the input 'run' of Pick Best Checkpoint",
    "tuned": "the model that is connected to Extract LoRA",
    "prompt": "the prompt in the graph",
    "negative_prompt": "the negative prompt in the graph",
    "scheduler": "the sampler in the graph",
}
_COMMAND_LINE_ONLY = frozenset(
    {
        "biases",
        "data",
        "drift",
        "embedding",
        "format",
        "live",
        "max_tokens",
        "memory",
        "overwrite",
        "picture_steps",
        "report",
        "subjects",
        "with_base",
    }
)


def wording_of(node: type[io.ComfyNode] | None) -> Wording:
    """How errors and notes of a node word settings.

    Args:
        node: The node's class, or the clone of it that ComfyUI runs; None for a page that belongs to no node.
    """
    return functools.partial(_word, node=node)


def is_worded(setting: str) -> bool:
    """Whether the nodes have words for a setting."""
    return setting in _IN_THE_GRAPH or setting in _COMMAND_LINE_ONLY or any(_nodes_with(setting, None))


def _word(setting: str, value: str | None, node: type[io.ComfyNode] | None) -> str:
    """Such as "resume = never", or "resume = never (on Training Settings)" if `node` has no such widget."""
    if setting == "clip_skip" and value is not None:  # counted from the last layer, which ComfyUI calls -1
        if value == "0":
            return "the CLIP without a CLIP Set Last Layer node"
        value = f"-{value}"
    if setting in _IN_THE_GRAPH:
        shown_value = f" = {_SAMPLING.get(value, value)}" if value is not None else ""
        return _IN_THE_GRAPH[setting].format(value=shown_value)
    value = value.lower() if value in ("True", "False") else value  # as a widget shows it
    if setting in _COMMAND_LINE_ONLY:
        return f"{plain(setting, value)} (on the command line)"
    for candidate in _nodes_with(setting, node):
        widget = _inputs(candidate)[setting]
        has_value = hasattr(widget, "default") or isinstance(widget, io.DynamicCombo.Input)
        text = plain(widget.id, value) if has_value else f"the input {widget.id}"
        return text if node and issubclass(node, candidate) else f"{text} (on {_title(candidate)})"
    return plain(setting, value)


def _nodes_with(setting: str, node: type[io.ComfyNode] | None) -> Iterator[type[io.ComfyNode]]:
    """The nodes with an input for a setting: `node` itself, then those that supply it, then all others."""
    from . import NODES, TrainLora

    this = [candidate for candidate in NODES if node and issubclass(node, candidate)]
    wires = _input_types(this[0]) if this else frozenset(_SUPPLIES)
    suppliers = [
        candidate for wire in _SUPPLIES if wire in wires for candidate in NODES if wire in _output_types(candidate)
    ]
    for candidate in dict.fromkeys([*this, *suppliers, TrainLora, *NODES]):
        if setting in _inputs(candidate):
            yield candidate


@functools.cache
def _inputs(node: type[io.ComfyNode]) -> dict[str, io.Input]:
    """Setting → the node's input for it. An input that was made for no setting counts as the one of its own name."""
    inputs = [inner for outer in node.define_schema().inputs for inner in outer.get_all()]
    others = {each.id: each for each in inputs if setting_of(each) is None}
    return others | {setting: each for each in inputs if (setting := setting_of(each))}


@functools.cache
def _input_types(node: type[io.ComfyNode]) -> frozenset[str]:
    return frozenset(each.get_io_type() for each in node.define_schema().inputs)


@functools.cache
def _output_types(node: type[io.ComfyNode]) -> frozenset[str]:
    return frozenset(each.get_io_type() for each in node.define_schema().outputs)


@functools.cache
def _title(node: type[io.ComfyNode]) -> str:
    return str(node.define_schema().display_name).removesuffix(_TITLE_SUFFIX)
