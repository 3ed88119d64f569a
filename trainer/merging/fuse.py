"""Adapters added to a whole model, which keeps its file's layout."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.apply import apply_to_base
from ..adapters.keys import embedding_names
from ..adapters.kohya import Adapter
from ..adapters.prefixes import UNET
from ..core.errors import AdapterError
from ..core.files import write_folder
from ..core.tensor_files import read_header
from ..models.anima_names import CONDITIONER, CONDITIONER_IN_DIFFUSERS
from ..models.clip_names import names_as_in
from ..models.families.base import BaseWeights
from ..models.families.ldm import UNET_PREFIX
from ..models.open import open_base, open_tensors
from ..models.single_file import write_tensors
from ..models.state_dicts import is_pickled, read_component, read_single_file

logger = logging.getLogger("dreambooth_lora")


def fuse(source: Path, adapters: Sequence[tuple[Adapter, float]], output: Path) -> Path:
    """Write a model with adapters added to its weights; all other tensors are copied unchanged.

    Args:
        source: A checkpoint file, or a folder in diffusers format.
        adapters: Each with its strength.
        output: The new file, or the new folder. If it exists, the first free name is used.

    Returns:
        What was written.

    Raises:
        WeightsError: The model can't be read.
        AdapterError: An adapter does not fit the model, or all of them together change nothing.
        NotFiniteError: The strengths make weights NaN or infinite.
        StorageError: The result can't be written.
    """
    embeddings = [name for adapter, _ in adapters for name in embedding_names(adapter.embeddings)]
    if embeddings:
        logger.warning(
            "Embeddings can't be fused into a model; these are left out: %s", ", ".join(sorted({*embeddings}))
        )
        adapters = [(replace(adapter, embeddings={}), strength) for adapter, strength in adapters]
    if not any(strength for _, strength in adapters):
        raise AdapterError("Every adapter has strength 0, so nothing would be added.", "Use a strength such as 1.")
    if os.path.isdir(source):
        if output.resolve().is_relative_to(source.resolve()):
            raise AdapterError(f"{output} is inside the model's own folder.", "Choose an output folder elsewhere.")
        base = open_base(source)
        changed_networks = _changed_by_component(base, apply_to_base(base, adapters))
        if UNET in changed_networks:
            layout = base.family.layout
            for name, tensor in layout.tensors_of_folder(changed_networks.pop(UNET)).items():
                part, _, rest = name.partition(".")
                is_network = part == CONDITIONER  # of its own, in diffusers
                network = CONDITIONER_IN_DIFFUSERS if is_network else layout.folder
                changed_networks.setdefault(network, {})[rest if is_network else name] = tensor
        return _write_folder(source, changed_networks, output)
    tensors = {name: tensor.contiguous() for name, tensor in read_single_file(source).items()}
    base = open_tensors(tensors, source)
    if base.denoiser.scales:
        raise AdapterError(
            f"{source.name} is quantised with scales, so adapters can't be fused into it.",
            "Fuse into a bf16 or fp16 version of the model.",
        )
    fused = dict(tensors)
    prefixes = (UNET_PREFIX, *(prefix for kind in base.family.text_encoders for prefix in kind.file_prefixes))
    views = _FileViews({name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)})
    components = {UNET: base.denoiser}
    components |= {kind.name: part for kind, part in zip(base.family.text_encoders, base.text_encoders, strict=True)}
    for component, changed in _changed_by_component(base, apply_to_base(base, adapters)).items():
        for name, tensor in changed.items():
            original = components[component].tensors[name]
            key = views.key_of(original)
            if fused[key] is tensors[key]:
                fused[key] = tensors[key].clone()
            views.view_into(fused[key], key, original).copy_(tensor)
    metadata = {} if is_pickled(source) else read_header(source).metadata
    unchanged = [name for name, tensor in fused.items() if tensor is tensors[name]]
    return write_tensors(output, fused, {**metadata, "format": "pt"}, copied=unchanged, replace=False)


def _changed_by_component(before: BaseWeights, after: BaseWeights) -> dict[str, dict[str, Tensor]]:
    """The networks that adapters changed, by their folders' names, each with its changed tensors.

    Raises:
        AdapterError: There are none.
    """
    names = [UNET, *(kind.name for kind in after.family.text_encoders)]
    pairs = zip([before.denoiser, *before.text_encoders], [after.denoiser, *after.text_encoders], strict=True)
    changed = {}
    for name, (component_before, component_after) in zip(names, pairs, strict=True):
        tensors = {}
        for key, tensor in component_after.tensors.items():
            original = component_before.tensors[key]
            rounded = tensor.to(original.dtype)
            if tensor is not original and not torch.equal(rounded, original):
                tensors[key] = rounded
        if tensors:
            changed[name] = tensors
    if not changed:
        raise AdapterError(
            "The adapters do not change the model: what they add is zero, or is lost to rounding.",
            "Use a higher strength, or a trained adapter.",
        )
    return changed


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
            f"A weight of shape {tuple(weight.shape)} is stored differently in the file and in the model.",
            "Use another version of the model, such as the original checkpoint.",
        )

    def view_into(self, copy: Tensor, key: str, weight: Tensor) -> Tensor:
        """The part of a copy of a file's tensor that a weight is in the tensor itself."""
        start = weight.storage_offset() - self._tensors[key].storage_offset()
        return copy.as_strided(weight.size(), weight.stride(), start)


def _write_folder(source: Path, changed: Mapping[str, Mapping[str, Tensor]], output: Path) -> Path:
    """Copy the folder, with the weights of each changed network in one new file.

    Args:
        source: A folder in diffusers' layout.
        changed: Folder of a network → the tensors that are others now, under diffusers' names.
        output: The new folder.
    """

    def weight_files(folder: str, entries: list[str]) -> list[str]:
        suffixes = (".safetensors", ".bin", ".msgpack", ".index.json")
        return [entry for entry in entries if Path(folder).name in changed and entry.endswith(suffixes)]

    def write(temporary: Path) -> None:
        shutil.copytree(source, temporary, ignore=weight_files, dirs_exist_ok=True)
        for name, tensors in changed.items():
            stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
            whole = read_component(source / name, stem)
            unchanged = whole.keys() - names_as_in(whole, tensors).keys()
            whole |= names_as_in(whole, tensors)
            write_tensors(temporary / name / f"{stem}.safetensors", whole, {"format": "pt"}, copied=unchanged)

    return write_folder(output, write)
