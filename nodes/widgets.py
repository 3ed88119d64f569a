"""Node inputs from settings: type, range, default and tooltip as the setting defines them."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from comfy_api.latest import io

from ..trainer.settings.base import Settings, field_extra

CATEGORY = "DreamBooth LoRA"
SUBJECT = io.Custom("DREAMBOOTH_SUBJECT")
PRIORS = io.Custom("DREAMBOOTH_PRIORS")
SETTINGS = io.Custom("DREAMBOOTH_SETTINGS")
_FLOAT_STEPS = {
    "learning_rate": 0.000001,
    "text_encoder_lr": 0.000001,
    "text_encoder_2_lr": 0.000001,
    "weight_decay": 0.001,
    "dropout": 0.01,
    "text_encoder_until": 0.05,
    "overlap_weight": 0.001,
    "energy": 0.01,
    "protected": 0.01,
    "density": 0.05,
    "split": 0.05,
    "mask_background": 0.05,
    "caption_dropout": 0.01,
    "huber_c": 0.01,
    "noise_offset": 0.01,
    "multires_noise_discount": 0.05,
    "input_perturbation": 0.01,
}


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
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    optional_number = field.default is None and float in kinds
    options: dict[str, Any] = {
        "default": 0.0 if optional_number else field.default,
        "tooltip": f"{field.description}{f' In {unit}.' if unit else ''}{' 0: not set.' if optional_number else ''}",
        "advanced": extra["advanced"] or None,
    }
    options |= changes
    if get_origin(field.annotation) is Literal:
        return io.Combo.Input(id or name, **({"options": [str(kind) for kind in kinds]} | options))
    if field.annotation is bool:
        return io.Boolean.Input(id or name, **options)
    if field.annotation is int:
        # without this, the frontend would draw a new seed after every run, and so train anew every time
        options.setdefault("control_after_generate", False)
        return io.Int.Input(id or name, **(_range(field.metadata) | options))
    if field.annotation is float or optional_number:
        limits = {"max": 1024.0} | _range(field.metadata) | {"step": _FLOAT_STEPS.get(name, 0.1)}
        return io.Float.Input(id or name, **(limits | ({"min": 0.0} if optional_number else {}) | options))
    return io.String.Input(id or name, **options)


def _range(metadata: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for constraint in metadata:
        for attribute, option in (("ge", "min"), ("gt", "min"), ("le", "max"), ("multiple_of", "step")):
            if getattr(constraint, attribute, None) is not None:
                found[option] = getattr(constraint, attribute)
    return found
