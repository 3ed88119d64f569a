"""Safetensors files: the one place where they are read, whatever their headers claim, and written, finite and whole.

A file is 8 bytes with the header's length, the header (JSON: name → type, shape, offsets in the data), and the data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import Tensor

from .errors import NotFiniteError, StorageError, suggest
from .json_data import OBJECT, checked_shape, parse_json

_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "C64": 64,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
}
_QUANTIZATION = re.compile(  # as ComfyUI, torchao, compressed-tensors and bitsandbytes name what belongs to a weight
    r"(^|\.)(scale_weight|weight_scale(_2|_inv)?|scale_input|input_scale|weight_zero_point|comfy_quant|scaled_fp8"
    r"|absmax|nested_absmax|quant_map|nested_quant_map|quant_state(\..*)?|SCB)$"
)
_Natural = Annotated[int, Field(ge=0)]


class TensorEntry(BaseModel):
    """The header's entry of one tensor.

    Attributes:
        dtype: Its type, such as "BF16".
        shape: Its shape.
        data_offsets: Where it begins and ends in the data, in bytes.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    dtype: str
    shape: list[_Natural]
    data_offsets: tuple[_Natural, _Natural] = Field(strict=False)


class Header(NamedTuple):
    """The header of a safetensors file.

    Attributes:
        entries: Name → the tensor's entry.
        metadata: The file's metadata.
    """

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


_ENTRIES = TypeAdapter(dict[str, TensorEntry])
_METADATA = TypeAdapter(dict[str, str] | None)


def read_header(path: Path) -> Header:
    """The header of a safetensors file; its tensors are not read.

    Raises:
        ValueError: It is not a complete safetensors file, or has a tensor of an unsupported type. Part of a sentence.
        OSError: It can't be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("it is not a safetensors file, or it is incomplete")
        content = file.read(length)
    try:
        values = parse_json(content.decode(), OBJECT)
        metadata = checked_shape(values.pop("__metadata__", None), _METADATA)
        entries = checked_shape(values, _ENTRIES)
    except ValueError as error:  # also of bytes that are no text
        raise ValueError(f"it has no valid safetensors header: {error}") from None
    _require_whole(entries, size - 8 - length)
    return Header(entries, metadata or {})


def _require_whole(entries: Mapping[str, TensorEntry], data_size: int) -> None:
    """Check that the tensors are of known types and fill the data, one after the other.

    Raises:
        ValueError: They don't.
    """
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if entry.dtype not in _BITS:
            raise ValueError(f"its tensor {name} has the unsupported type {entry.dtype}")
        if (end - begin) * 8 != math.prod(entry.shape) * _BITS[entry.dtype]:
            raise ValueError(f"its tensor {name} has {end - begin} bytes, which does not match its shape {entry.shape}")
        if begin != position:
            raise ValueError(f"its tensor {name} starts at byte {begin} of the data instead of {position}")
        position = end
    if position != data_size:
        raise ValueError(f"its tensors take {position} bytes, but the file has {data_size}: it is truncated or damaged")


def is_quantization_name(name: str) -> bool:
    """Whether a tensor of that name belongs to another one which is quantised, and can't be read without it."""
    return bool(_QUANTIZATION.search(name))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file into memory: Windows can't replace a file that is memory-mapped.

    Raises:
        ValueError: As `read_header`.
        OSError: It can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    read_header(path)
    try:
        return dict(load(path.read_bytes()))
    except (SafetensorError, KeyError) as error:  # of a type that this version of safetensors or torch lacks
        raise ValueError(f"safetensors can't read it: {error}") from None


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a safetensors file.

    Raises:
        ValueError: As `read_header`.
        OSError: It can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return dict(load_file(path))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"safetensors can't read it: {error}") from None


def cast_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in another type; all of its numbers are finite, before and after.

    Args:
        name: For the message.
        tensor: Any shape, on any device.
        dtype: A floating-point type.

    Raises:
        NotFiniteError: A number is not finite, or too large for the type.
    """
    cast = tensor.to(dtype)
    if is_finite(cast):
        return cast
    if not is_finite(tensor):
        raise NotFiniteError(
            f"{name} has NaN or infinite values.",
            "Use a lower strength or other files; nothing was written.",
        )
    largest = float(tensor.abs().max())
    remedy = "Use a lower strength or other files; nothing was written."
    if is_finite(tensor.to(torch.bfloat16)):
        remedy = f"Set {suggest('save_precision', 'bf16')} or fp32, which have a larger range, or use a lower strength."
    raise NotFiniteError(
        f"{name} has values up to {largest:.3g}, which {str(dtype).removeprefix('torch.')} can't represent.", remedy
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; integers are."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # types of 8 bits have no minimum in torch
        tensor = tensor.float()
    smallest, largest = tensor.aminmax()  # both are NaN if any number is; many times faster than isfinite
    return math.isfinite(smallest) and math.isfinite(largest)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, copied: Collection[str] = ()
) -> None:
    """Write a safetensors file straight to the disk, with the usual permissions of a new file.

    Args:
        path: The file.
        tensors: On the CPU, contiguous, no two over the same memory.
        metadata: Of the file. Invalid Unicode, as in file names of old systems, becomes question marks.
        copied: Names of tensors that are copied unchanged from another file, whose values are not checked.

    Raises:
        NotFiniteError: A tensor has a NaN or infinite value; nothing is written.
        StorageError: It can't be written. `core.files.write_file` names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if name not in copied and not is_finite(tensor):
            raise NotFiniteError(
                f"{name} has NaN or infinite values, so the file was not written.",
                "Use a lower strength or other files.",
            )
    path.touch()
    mode = path.stat().st_mode
    texts = {_unicode(key): _unicode(value) for key, value in metadata.items()}
    try:
        save_file(dict(tensors), path, texts or None)  # safetensors 0.8 writes no JSON for an empty table
    except SafetensorError as error:  # also for a full disk
        raise StorageError(
            f"The tensors can't be written: {error}.", "Free some space on the disk and start again."
        ) from error
    path.chmod(mode)  # safetensors makes files that only their owner may read


def _unicode(text: Any) -> str:
    return str(text).encode("utf-8", "replace").decode()
