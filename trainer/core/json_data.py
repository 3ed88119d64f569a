"""JSON from outside: decoded from any of its encodings, and validated before use."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

_SHOWN = 60  # characters of a wrong value that a message shows

ShapeT = TypeVar("ShapeT")

OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def parse_json(content: str | bytes, shape: TypeAdapter[ShapeT]) -> ShapeT:
    """The value of a JSON text, if it has the shape that is expected.

    Args:
        content: Text, or bytes in UTF-8, UTF-16 or UTF-32, with a byte-order mark or without.
        shape: What the value must be.

    Raises:
        ValueError: It is not valid JSON, or has another shape; names the key and its value.
    """
    if isinstance(content, str):
        content = content.removeprefix("\ufeff")
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not valid JSON ({error})") from None
    return checked_shape(value, shape)


def checked_shape(value: Any, shape: TypeAdapter[ShapeT]) -> ShapeT:
    """A value of JSON, if it has the shape that is expected.

    Raises:
        ValueError: It has another shape; names the key and its value.
    """
    try:
        return shape.validate_python(value)
    except ValidationError as error:
        raise ValueError(_first_mismatch(error)) from None


def _first_mismatch(error: ValidationError) -> str:
    """The first thing that has another shape, as a part of a sentence."""
    details = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(part) for part in details["loc"] if part != "[key]")
    if details["type"] == "missing":
        return f"{key} is missing"
    if details["type"] in ("dict_type", "model_type"):
        details["msg"] = "should be an object"
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    try:
        given = json.dumps(details["input"], ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        given = f"a {type(details['input']).__name__}"
    shown = given if len(given) <= _SHOWN else f"{given[:_SHOWN]}…"
    return f"{key or 'its content'} {message}, but is {shown}"
