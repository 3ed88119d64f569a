"""Of ComfyUI's interface for nodes what the nodes use: schemas and inputs that hold what they are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class NodeOutput:
    """What a node gives, as ComfyUI's class of this name holds it."""

    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args = args
        self.ui = ui


class _Input:
    """An input without a widget."""

    io_type = ""

    def __init__(self, id: str, *, optional: bool = False, tooltip: str | None = None) -> None:
        self.id = id
        self.optional = optional
        self.tooltip = tooltip

    def get_all(self) -> list[Any]:
        return [self]

    def get_io_type(self) -> str:
        return self.io_type


class _Widget(_Input):
    """An input with a widget: its default and its other options."""

    def __init__(
        self, id: str, *, default: Any = None, optional: bool = False, tooltip: str | None = None, **options: Any
    ) -> None:
        super().__init__(id, optional=optional, tooltip=tooltip)
        self.default = default
        self.options = options


class _DynamicCombo(_Input):
    """A choice, each option with inputs of its own."""

    def __init__(self, id: str, *, options: list[Any], tooltip: str | None = None) -> None:
        super().__init__(id, tooltip=tooltip)
        self.options = options

    def get_all(self) -> list[Any]:
        return [self, *(inner for option in self.options for inner in option.inputs)]


class _Autogrow(_Input):
    """Inputs of a kind, as many as are connected."""

    def __init__(self, id: str, *, template: Any, tooltip: str | None = None) -> None:
        super().__init__(id, tooltip=tooltip)
        self.template = template


class _Output:
    io_type = ""

    def __init__(self, *, display_name: str | None = None, tooltip: str | None = None) -> None:
        self.display_name = display_name
        self.tooltip = tooltip

    def get_io_type(self) -> str:
        return self.io_type


class Schema:
    """A node's description, as ComfyUI's class of this name holds it."""

    def __init__(
        self,
        *,
        node_id: str,
        display_name: str,
        category: str,
        description: str,
        search_aliases: list[str],
        inputs: list[Any],
        outputs: list[Any],
        hidden: list[str] | None = None,
        is_output_node: bool = False,
    ) -> None:
        self.node_id = node_id
        self.display_name = display_name
        self.category = category
        self.description = description
        self.search_aliases = search_aliases
        self.inputs = inputs
        self.outputs = outputs
        self.hidden = hidden or []
        self.is_output_node = is_output_node


def _type(io_type: str, kind: type[_Input] = _Input) -> Any:
    return SimpleNamespace(
        io_type=io_type,
        Input=type(f"{io_type} input", (kind,), {"io_type": io_type}),
        Output=type(f"{io_type} output", (_Output,), {"io_type": io_type}),
    )


def _prefixed(input: Any, prefix: str, min: int, max: int) -> Any:
    return SimpleNamespace(type=input.io_type, names=f"{prefix}{min - 1}..{max - 1}", min=min)


def _option(key: str, inputs: list[Any]) -> Any:
    return SimpleNamespace(key=key, inputs=inputs)


IO = SimpleNamespace(
    ComfyNode=type("ComfyNode", (), {}),
    NodeOutput=NodeOutput,
    Schema=Schema,
    Custom=_type,
    Hidden=SimpleNamespace(unique_id="UNIQUE_ID", extra_pnginfo="EXTRA_PNGINFO"),
    Model=_type("MODEL"),
    Clip=_type("CLIP"),
    Vae=_type("VAE"),
    Image=_type("IMAGE"),
    Mask=_type("MASK"),
    LoraModel=_type("LORA_MODEL"),
    String=_type("STRING", _Widget),
    Int=_type("INT", _Widget),
    Float=_type("FLOAT", _Widget),
    Boolean=_type("BOOLEAN", _Widget),
    Combo=_type("COMBO", _Widget),
    DynamicCombo=SimpleNamespace(**vars(_type("COMFY_DYNAMICCOMBO_V3", _DynamicCombo)), Option=_option),
    Autogrow=SimpleNamespace(**vars(_type("COMFY_AUTOGROW_V3", _Autogrow)), TemplatePrefix=_prefixed),
)


class _PreviewImage:
    def __init__(self, image: Any, cls: Any = None) -> None:
        self.image = image

    def as_dict(self) -> dict[str, Any]:
        return {"images": self.image}


UI = SimpleNamespace(PreviewImage=_PreviewImage)
