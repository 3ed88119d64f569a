"""The files of an adapter: a single one from any program, or a folder from PEFT or diffusers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..core.errors import AdapterError, WeightsError
from ..core.tensor_files import read_header, read_tensors
from ..models.state_dicts import is_pickled, read_single_file
from .peft_config import PEFT_PREFIX, PeftConfig, parse_config
from .prefixes import DENOISER_FOLDERS, text_encoder_names

_CONFIG_FILE = "adapter_config.json"
_PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_DIFFUSERS_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


@dataclass(frozen=True)
class AdapterFile:
    """A file of an adapter.

    Attributes:
        path: The file.
        config: PEFT's configuration in the same folder; None without one.
        component: The folder of the network that all of its modules belong to; "" if its tensor names show it.
    """

    path: Path
    config: PeftConfig | None = None
    component: str = ""

    def names(self) -> list[str] | None:
        """The names of its tensors, as in `read`, without reading the tensors; None where that is not possible.

        Raises:
            ValueError: It is not a complete safetensors file.
            OSError: It can't be read.
        """
        if is_pickled(self.path):
            return None
        return [self._full_name(name) for name in read_header(self.path).entries]

    def read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Its tensors and its metadata.

        Raises:
            AdapterError: It is a pickle that is damaged or contains more than plain tensors.
            ValueError: It is not a complete safetensors file.
            OSError: It can't be read.
        """
        tensors: Mapping[str, Tensor]
        if is_pickled(self.path):
            try:
                tensors, metadata = read_single_file(self.path, mapped=False), {}
            except WeightsError as error:
                raise AdapterError(*error.unworded) from error
        else:
            tensors, metadata = read_tensors(self.path), read_header(self.path).metadata
        return {self._full_name(name): tensor for name, tensor in tensors.items()}, metadata

    def _full_name(self, name: str) -> str:
        return f"{self.component}.{name.removeprefix(PEFT_PREFIX)}" if self.component else name


def find_files(path: Path) -> list[AdapterFile]:
    """The files of an adapter.

    Args:
        path: A file; or a folder as PEFT or diffusers writes it, or with such a folder of PEFT for each network.

    Raises:
        AdapterError: The folder contains no adapter; the remedy names a subfolder that does.
        OSError: It does not exist, or can't be read.
    """
    if not os.path.exists(path):
        raise FileNotFoundError("it does not exist")
    if not path.is_dir():
        return [_single_file(path)]
    for name in _PEFT_FILES:
        if (path / name).is_file():
            return [_file_of_peft(path / name)]
    for name in _DIFFUSERS_FILES:
        if (path / name).is_file():
            return [AdapterFile(path / name)]
    files = [
        _file_of_peft(path / component / name, component)
        for component in (*DENOISER_FOLDERS, *text_encoder_names())
        for name in _PEFT_FILES
        if (path / component / name).is_file()
    ]
    if files:
        return list({file.component: file for file in reversed(files)}.values())  # of two forms the first
    inner = [folder.parent for folder in sorted(path.glob(f"*/{_CONFIG_FILE}"))]
    remedy = f"Use {inner[0]}." if inner else "Use the adapter's file."
    raise AdapterError(
        f"The folder {path} can't be read: it contains no adapter ({_PEFT_FILES[0]} or {_DIFFUSERS_FILES[0]}).", remedy
    )


def _single_file(path: Path) -> AdapterFile:
    """A file, with PEFT's configuration if it is one of PEFT's and the configuration lies beside it."""
    if path.name in _PEFT_FILES and (path.parent / _CONFIG_FILE).is_file():
        return _file_of_peft(path)
    return AdapterFile(path)


def _file_of_peft(path: Path, component: str = "") -> AdapterFile:
    """A file in a folder of PEFT.

    Raises:
        AdapterError: The configuration is missing or can't be read: the adapter's scale stands there.
    """
    config = path.parent / _CONFIG_FILE
    if not config.is_file():
        raise AdapterError(
            f"{path.parent} contains {path.name} but no {_CONFIG_FILE}, which stores the adapter's scale.",
            f"Copy the same adapter's {_CONFIG_FILE} into that folder.",
        )
    return AdapterFile(path, parse_config(config.read_bytes(), str(config)), component)
