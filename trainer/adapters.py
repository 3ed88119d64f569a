"""Adapters on a built model: injected with PEFT for training, read back, or merged into weights for generation."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .config import TrainSettings
from .errors import AdapterError, SettingsError
from .families.base import BaseWeights, DiffusionModel, Family
from .kohya import PREFIXES, Adapter, LoraLayer, module_name
from .original_names import diffusers_name
from .randomness import generator

logger = logging.getLogger("dreambooth_lora")

_PEFT_NAME = "subject"
_KNOWN_VERSIONS = ("sd_v1", "sd_v2", "sdxl", "sd3", "flux")


@dataclass(frozen=True)
class TrainedLayer:
    """The trained tensors of one module: the parameters themselves, float32."""

    down: nn.Parameter
    up: nn.Parameter
    alpha: float


class TrainedLora:
    """A LoRA being trained: PEFT layers inside a model's UNet, seen under kohya's names."""

    def __init__(self, model: DiffusionModel, settings: TrainSettings) -> None:
        """Inject the adapter.

        The start depends on the seed and each module's name alone: `down` is Kaiming-uniform as PEFT's default
        (a = √5), `up` is zero, so that the model predicts at first as without an adapter.
        """
        from peft import LoraConfig, inject_adapter_in_model

        alpha = settings.scale * settings.rank
        targets = model.family.targets[settings.targets]
        config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=True)
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(config, model.unet, adapter_name=_PEFT_NAME)
        self.layers: dict[str, TrainedLayer] = {}
        for path, module in model.unet.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            down, up = module.lora_A[_PEFT_NAME], module.lora_B[_PEFT_NAME]
            for part in (down, up):
                part.to(torch.float32, memory_format=torch.contiguous_format)
                part.requires_grad_(True)
            name = module_name("unet", path)
            start = torch.empty(down.weight.shape)
            bound = math.sqrt(6 / ((1 + 5) * start[0].numel()))
            start.uniform_(-bound, bound, generator=generator(settings.seed, "start", name))
            with torch.no_grad():
                down.weight.copy_(start)
                up.weight.zero_()
            self.layers[name] = TrainedLayer(down.weight, up.weight, alpha)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in an order that depends on the module names alone."""
        return [p for name in sorted(self.layers) for p in (self.layers[name].down, self.layers[name].up)]

    def adapter(self, metadata: Mapping[str, str] | None = None) -> Adapter:
        """A copy of the current state on the CPU, float32."""
        layers = {
            name: LoraLayer(layer.down.detach().cpu().clone(), layer.up.detach().cpu().clone(), layer.alpha)
            for name, layer in self.layers.items()
        }
        return Adapter(layers, metadata or {})

    def load(self, adapter: Adapter) -> None:
        """Set the parameters to a saved state of the same run.

        Raises:
            AdapterError: Its modules or shapes differ.
        """
        if set(adapter.layers) != set(self.layers):
            raise AdapterError(
                "The checkpoint adapts other modules than this run.", "Start anew with --resume never or another name."
            )
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.down.copy_(adapter.layers[name].down)
                layer.up.copy_(adapter.layers[name].up)

    def is_finite(self) -> bool:
        """Whether every trained number is finite."""
        return all(bool(torch.isfinite(p.detach().cpu()).all()) for p in self.parameters())


def require_rank_fits(base: BaseWeights, settings: TrainSettings) -> None:
    """Check, before anything is built, that no adapted layer is smaller than the rank.

    Raises:
        SettingsError: Names the smallest layer and its size.
    """
    targets = re.compile(base.family.targets[settings.targets])
    sizes = {
        name.removesuffix(".weight"): min(tensor.shape[:2])
        for name, tensor in base.unet.tensors.items()
        if name.endswith(".weight") and targets.fullmatch(name.removesuffix(".weight"))
    }
    smallest = min(sizes, key=lambda path: sizes[path])
    if settings.rank > sizes[smallest]:
        raise SettingsError(
            f"rank {settings.rank} is above the size of the layer {smallest} ({sizes[smallest]}).",
            f"Set the rank to at most {sizes[smallest]}; 4 to 32 are usual.",
        )


def merge_into(model: DiffusionModel, adapter: Adapter, strength: float) -> None:
    """Add an adapter to a model's weights; the touched weights become private copies, all others stay as they are.

    Args:
        model: A built model; its UNet and text encoders are changed.
        adapter: What to add.
        strength: Factor; 1 is as trained.

    Raises:
        AdapterError: The adapter was made for another family, or none of its modules fits.
    """
    _require_family(model.family, adapter.metadata)
    modules = _adaptable_modules(model)
    found = {name: modules.get(_current_name(name, model)) for name in adapter.layers}
    unknown = [name for name, module in found.items() if module is None]
    if len(unknown) == len(found):
        raise AdapterError(
            f"None of the adapter's {len(unknown)} modules exists in this {model.family.title} model, "
            f"e.g. {unknown[0]}.",
            "Use an adapter that was made for the base model's family.",
        )
    if unknown:
        logger.warning(
            "%d of the adapter's %d modules don't exist in this model and are left out, e.g. %s",
            len(unknown),
            len(found),
            unknown[0],
        )
    fitting = [(name, module) for name, module in found.items() if module is not None]
    for name, module in fitting:  # all are looked at before the first is changed
        _require_shape(name, adapter.layers[name], module)
    for name, module in fitting:
        weight = module.weight
        delta = adapter.layers[name].delta().to(weight.device).reshape(weight.shape)
        changed = weight.detach().float() + strength * delta
        module.weight = nn.Parameter(changed.to(weight.dtype), requires_grad=False)


def _require_family(family: Family, metadata: Mapping[str, str]) -> None:
    """Refuse an adapter that says it was made for another family, in Stability's words or in kohya's."""
    architecture = metadata.get("modelspec.architecture", "").split("/")[0]
    version = metadata.get("ss_base_model_version", "")
    foreign_version = version.startswith(_KNOWN_VERSIONS) and version != family.base_version
    if (architecture and architecture != family.architecture) or (not architecture and foreign_version):
        raise AdapterError(
            f"The adapter was made for {architecture or version}, but the base model is {family.title}.",
            "Use a base model of the adapter's family, or an adapter of the base model's family.",
        )


def _current_name(name: str, model: DiffusionModel) -> str:
    """The module's kohya name in diffusers' words, if it is in the original layout's."""
    if name.startswith("lora_te1_") and len(model.text_encoders) == 1:  # as diffusers' converter writes
        return PREFIXES["text_encoder"] + name.removeprefix("lora_te1_")
    prefix = PREFIXES["unet"]
    if not name.startswith(prefix):
        return name
    return prefix + diffusers_name(name.removeprefix(prefix), int(model.unet.config.layers_per_block))


def _require_shape(name: str, layer: LoraLayer, module: nn.Linear | nn.Conv2d) -> None:
    out, *inside = layer.up.shape[0], *layer.down.shape[1:]
    if layer.mid is not None:
        inside = [layer.down.shape[1], *layer.mid.shape[2:]]
    shape = (out, *inside)
    plain = [tuple(one[:2]) + tuple(side for side in one[2:] if side != 1) for one in (shape, module.weight.shape)]
    if plain[0] != plain[1]:
        raise AdapterError(
            f"The adapter's module {name} has the shape {shape}, the model's {tuple(module.weight.shape)}.",
            "Use an adapter that was made for a model of this shape.",
        )


def _adaptable_modules(model: DiffusionModel) -> dict[str, nn.Linear | nn.Conv2d]:
    networks = {"unet": model.unet, **model.text_encoders}
    return {
        module_name(component, path): module
        for component, network in networks.items()
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
