"""Node inputs from settings: type, range, default and tooltip as the setting defines them."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from ..trainer.settings.base import Settings, field_extra
from .api import io

CATEGORY = "DreamBooth LoRA"
SUBJECT = io.Custom("DREAMBOOTH_SUBJECT")
PRIORS = io.Custom("DREAMBOOTH_PRIORS")
SETTINGS = io.Custom("DREAMBOOTH_SETTINGS")
_HIGHEST_FLOAT = 1024.0  # of settings without a limit


def widget(settings: type[Settings], name: str, *, id: str | None = None, **changes: Any) -> io.Input:
    """The input for one setting.

    Args:
        settings: Where the setting is defined.
        name: Its name.
        id: The input's id, if another than the name.
        changes: Options that differ on the node, e.g. `default` or `advanced`.

    Returns:
        A Boolean, Combo, Int, Float or String input. An optional number shows 0 for "not set".
    """
    field = settings.model_fields[name]
    extra = field_extra(settings, name)
    unit = extra["unit"] if extra["unit"] not in (field.description or "").lower() else ""
    types = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    optional_number = field.default is None and float in types
    options: dict[str, Any] = {
        "default": 0.0 if optional_number else field.default,
        "tooltip": f"{field.description}{f' In {unit}.' if unit else ''}{' 0: unset.' if optional_number else ''}",
        "advanced": extra["advanced"] or None,
    }
    options |= changes
    input_type: Any = io.String.Input
    if get_origin(field.annotation) is Literal:
        input_type = io.Combo.Input
        options = {"options": [str(choice) for choice in types]} | options
    elif field.annotation is bool:
        input_type = io.Boolean.Input
    elif field.annotation is int:
        input_type = io.Int.Input
        # without this, the frontend would choose a new seed after every run, and so train again every time
        options = _range(field.metadata) | {"control_after_generate": False} | options
    elif field.annotation is float or optional_number:
        input_type = io.Float.Input
        limits = {"max": _HIGHEST_FLOAT} | _range(field.metadata) | {"step": extra["step"]}
        options = limits | ({"min": 0.0} if optional_number else {}) | options
    return as_setting(name, input_type(id or name, **options))


def strength_input(id: str, tooltip: str, **options: Any) -> io.Input:
    """The strength of an adapter; 1 is as trained, a negative one subtracts."""
    return io.Float.Input(id, default=1.0, min=-10.0, max=10.0, step=0.05, tooltip=tooltip, **options)


def as_setting(name: str, input: io.Input) -> io.Input:
    """The input, marked as the one for a setting of another name than its id."""
    input.setting = name
    return input


def setting_of(input: io.Input) -> str | None:
    """The setting that an input was made for; None if it was made for none."""
    return getattr(input, "setting", None)


def _range(metadata: list[Any]) -> dict[str, Any]:
    """The options of a number input for pydantic's constraints."""
    options: dict[str, Any] = {}
    for constraint in metadata:
        for attribute, option in (("ge", "min"), ("gt", "min"), ("le", "max"), ("multiple_of", "step")):
            if getattr(constraint, attribute, None) is not None:
                options[option] = getattr(constraint, attribute)
    return options
