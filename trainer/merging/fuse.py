"""Adapters added to a whole model, which keeps its file's layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..adapters.apply import apply_to_base
from ..adapters.kohya import Adapter
from ..core.errors import AdapterError
from ..core.files import write_folder
from ..core.tensor_files import read_header
from ..models.clip_names import names_as_in
from ..models.families.base import BaseWeights, Component
from ..models.families.ldm import UNET_PREFIX
from ..models.open import open_base, open_tensors
from ..models.single_file import write_tensors
from ..models.state_dicts import is_pickled, read_component, read_single_file


def fuse(source: Path, adapters: Sequence[tuple[Adapter, float]], output: Path) -> Path:
    """Write a model with adapters added to its weights; every tensor that they don't change stays as it is.

    Args:
        source: A checkpoint file, or a folder in diffusers' layout.
        adapters: Each with its strength.
        output: The new file, or the new folder. If it exists the first free name is taken.

    Returns:
        What was written.

    Raises:
        WeightsError: The model can't be read.
        AdapterError: An adapter does not fit the model.
        NotFiniteError: The strengths make weights that are not finite.
        StorageError: The result can't be written.
    """
    if os.path.isdir(source):
        if output.resolve().is_relative_to(source.resolve()):
            raise AdapterError(f"{output} is inside the model's own folder.", "Choose an output folder elsewhere.")
        base = open_base(source)
        return _write_folder(source, base, apply_to_base(base, adapters), output)
    tensors = {name: tensor.contiguous() for name, tensor in read_single_file(source).items()}
    base = open_tensors(tensors, source)
    fused = dict(tensors)
    prefixes = (UNET_PREFIX, *(prefix for kind in base.family.text_encoders for prefix in kind.file_prefixes))
    views = _FileViews({name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)})
    for before, after in _component_pairs(base, apply_to_base(base, adapters)):
        for name, tensor in _changed_tensors(before, after).items():
            original = before.tensors[name]
            key = views.key_of(original)
            if fused[key] is tensors[key]:
                fused[key] = tensors[key].clone()
            views.view_into(fused[key], key, original).copy_(tensor)
    metadata = {} if is_pickled(source) else read_header(source).metadata
    unchanged = [name for name, tensor in fused.items() if tensor is tensors[name]]
    return write_tensors(output, fused, {**metadata, "format": "pt"}, copied=unchanged, replace=False)


def _component_pairs(before: BaseWeights, after: BaseWeights) -> list[tuple[Component, Component]]:
    """The UNet and the text encoders, each without and with the adapters."""
    return [(before.unet, after.unet), *zip(before.text_encoders, after.text_encoders, strict=True)]


def _changed_tensors(before: Component, after: Component) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in after.tensors.items() if tensor is not before.tensors[name]}


class _FileViews:
    """Which of a file's tensors a network's weight is a view of: a fused projection holds several weights."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._keys: dict[int, list[str]] = {}
        for key, tensor in tensors.items():
            self._keys.setdefault(tensor.untyped_storage().data_ptr(), []).append(key)

    def key_of(self, weight: Tensor) -> str:
        """The key of the file's tensor that holds a weight.

        Raises:
            AdapterError: There is none.
        """
        for key in self._keys.get(weight.untyped_storage().data_ptr(), []):
            tensor = self._tensors[key]
            start = weight.storage_offset() - tensor.storage_offset()
            if 0 <= start <= tensor.numel() - weight.numel():
                return key
        raise AdapterError(
            f"A weight of the shape {tuple(weight.shape)} is not in the file as it is in the model.",
            "Use another version of the model, such as the original checkpoint.",
        )

    def view_into(self, copy: Tensor, key: str, weight: Tensor) -> Tensor:
        """The part of a copy of a file's tensor that a weight is in the tensor itself."""
        start = weight.storage_offset() - self._tensors[key].storage_offset()
        return copy.as_strided(weight.size(), weight.stride(), start)


def _write_folder(source: Path, before: BaseWeights, after: BaseWeights, output: Path) -> Path:
    """Copy the folder, with the weights of each changed network in one new file."""
    names = ["unet", *(kind.name for kind in after.family.text_encoders)]
    changed: dict[str, dict[str, Tensor]] = {}
    for name, (component_before, component_after) in zip(names, _component_pairs(before, after), strict=True):
        tensors = _changed_tensors(component_before, component_after)
        if tensors:
            changed[name] = tensors

    def weight_files(folder: str, entries: list[str]) -> list[str]:
        suffixes = (".safetensors", ".bin", ".msgpack", ".index.json")
        return [entry for entry in entries if Path(folder).name in changed and entry.endswith(suffixes)]

    def write(temporary: Path) -> None:
        shutil.copytree(source, temporary, ignore=weight_files, dirs_exist_ok=True)
        for name, tensors in changed.items():
            stem = "diffusion_pytorch_model" if name == "unet" else "model"
            whole = read_component(source / name, stem)
            unchanged = whole.keys() - names_as_in(whole, tensors).keys()
            whole |= names_as_in(whole, tensors)
            write_tensors(temporary / name / f"{stem}.safetensors", whole, {"format": "pt"}, copied=unchanged)

    return write_folder(output, write)
