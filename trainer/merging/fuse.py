"""Adapters added to a whole model, which keeps its file's layout."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..adapters.apply import apply_to_base
from ..adapters.kohya import Adapter, read_header
from ..core.errors import AdapterError
from ..core.files import folder_written_atomically
from ..models.clip_names import names_as_in
from ..models.families.base import BaseWeights, Component
from ..models.families.ldm import UNET_PREFIX
from ..models.open import open_base, open_tensors
from ..models.single_file import write_tensors
from ..models.state_dicts import read_component, read_single_file


def fuse(source: Path, adapters: Sequence[tuple[Adapter, float]], output: Path) -> None:
    """Write a model with adapters added to its weights; every tensor that they don't change stays as it is.

    Args:
        source: A checkpoint file, or a folder in diffusers' layout.
        adapters: Each with its strength.
        output: The new file, or the new folder.

    Raises:
        WeightsError: The model can't be read.
        AdapterError: An adapter does not fit the model.
        StorageError: The result can't be written.
    """
    if source.is_dir():
        if output.resolve().is_relative_to(source.resolve()):
            raise AdapterError(f"{output} is inside the model's own folder.", "Choose an output folder elsewhere.")
        base = open_base(source)
        _write_folder(source, base, apply_to_base(base, adapters), output)
        return
    tensors = {name: tensor.contiguous() for name, tensor in read_single_file(source).items()}
    base = open_tensors(tensors, source)
    fused = dict(tensors)
    prefixes = (UNET_PREFIX, *(start for kind in base.family.text_encoders for start in kind.file_prefixes))
    places = _Places({name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)})
    for old, new in _components(base, apply_to_base(base, adapters)):
        for name, tensor in _changed(old, new).items():
            key = places.key_of(old.tensors[name])
            if fused[key] is tensors[key]:
                fused[key] = tensors[key].clone()
            places.view(fused[key], key, old.tensors[name]).copy_(tensor)
    stated = read_header(source)[1] if source.suffix.lower() == ".safetensors" else {}
    write_tensors(output, fused, {**stated, "format": "pt"})


def _components(old: BaseWeights, new: BaseWeights) -> list[tuple[Component, Component]]:
    return [(old.unet, new.unet), *zip(old.text_encoders, new.text_encoders, strict=True)]


def _changed(old: Component, new: Component) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in new.tensors.items() if tensor is not old.tensors[name]}


class _Places:
    """Which of a file's tensors a part of a network is a view of: fused projections hold several."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._keys: dict[int, list[str]] = {}
        for key, tensor in tensors.items():
            self._keys.setdefault(tensor.untyped_storage().data_ptr(), []).append(key)

    def key_of(self, part: Tensor) -> str:
        """The tensor that holds a part."""
        for key in self._keys.get(part.untyped_storage().data_ptr(), []):
            start = part.storage_offset() - self._tensors[key].storage_offset()
            if 0 <= start <= self._tensors[key].numel() - part.numel():
                return key
        raise AdapterError(
            f"A weight of the shape {tuple(part.shape)} is not in the file as it is in the model.",
            "Use another version of the model, such as the original checkpoint.",
        )

    def view(self, whole: Tensor, key: str, part: Tensor) -> Tensor:
        """The part of a copy of a file's tensor that corresponds to a part of the tensor itself."""
        return whole.as_strided(part.size(), part.stride(), part.storage_offset() - self._tensors[key].storage_offset())


def _write_folder(source: Path, old: BaseWeights, new: BaseWeights, output: Path) -> None:
    """Copy the folder, with the weights of the changed networks in one new file each."""
    names = ["unet", *(kind.name for kind in new.family.text_encoders)]
    found = {name: _changed(before, after) for name, (before, after) in zip(names, _components(old, new), strict=True)}
    changed = {name: tensors for name, tensors in found.items() if tensors}

    def without_weights(folder: str, entries: list[str]) -> list[str]:
        weights = (".safetensors", ".bin", ".msgpack", ".index.json")
        return [one for one in entries if Path(folder).name in changed and one.endswith(weights)]

    with folder_written_atomically(output) as temporary:
        shutil.copytree(source, temporary, ignore=without_weights, dirs_exist_ok=True)
        for name, tensors in changed.items():
            stem = "diffusion_pytorch_model" if name == "unet" else "model"
            whole = read_component(source / name, stem)
            whole |= names_as_in(whole, tensors)
            write_tensors(temporary / name / f"{stem}.safetensors", whole, {"format": "pt"})
