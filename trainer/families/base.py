"""What a model family is: the contract between the recipe and the models it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..objective import Objective

_INCOMPLETE = "Use a complete, unchanged checkpoint of this family; if it was downloaded, download it again."

Conditioning = dict[str, Tensor]
"""What a denoiser is told beside latents and timesteps: named tensors, batch first."""


@dataclass(frozen=True)
class Component:
    """Tensors of one network under diffusers'/transformers' names, and the configuration they fit.

    Attributes:
        tensors: Name → tensor; may be borrowed, memory-mapped or on any device. Never written to.
        config: Keyword arguments for the network's class.
        file_names: Name → the tensor's name in the file it came from, where that differs; for messages.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    file_names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseWeights:
    """A base model, opened but not built.

    Attributes:
        family: The family it belongs to.
        unet: The denoiser.
        vae: The autoencoder.
        text_encoders: Text encoders in the family's order.
        tokenizers: Hugging Face tokenizers, one for each text encoder.
        scheduler: The noise schedule's configuration as diffusers writes it; empty where unknown.
        prediction_type: What the denoiser predicts, in diffusers' words.
        title: Name for people, e.g. the file's.
        fingerprint: Hexadecimal digest of the weights.
    """

    family: Family
    unet: Component
    vae: Component
    text_encoders: Sequence[Component]
    tokenizers: Sequence[Any]
    scheduler: Mapping[str, Any]
    prediction_type: str
    title: str
    fingerprint: str


class DiffusionModel(Protocol):
    """A built model: networks that may share storage with a host's, and what is known about them.

    Attributes:
        family: Its family.
        unet: The denoiser, a diffusers `UNet2DConditionModel`.
        vae: The autoencoder, a diffusers `AutoencoderKL`.
        text_encoders: Component name ("text_encoder") → text encoder.
        objective: Noise schedule and prediction type.
    """

    family: Family
    unet: Any
    vae: Any
    text_encoders: dict[str, nn.Module]
    objective: Objective

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts; every tensor has one row a prompt, on the text encoder's device."""

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the denoiser: latents (batch, channels, height, width), timesteps (batch,) → same shape as latents."""

    def overlong(self, prompt: str) -> bool:
        """Whether the text encoder would cut the prompt."""


class Family(Protocol):
    """A family of models: what is true of all of its members.

    Attributes:
        title: Name for people.
        architecture: Value of `modelspec.architecture` without the `/lora`.
        base_version: Value of `ss_base_model_version`.
        targets: Preset name → regular expression of the denoiser's modules that get an adapter.
        scaling_factor: What the autoencoder's latents are multiplied with.
        text_prefixes: Where a single file keeps each text encoder.
        text_folders: Where a folder in diffusers' layout keeps each text encoder and, in the same order, tokenizer.
    """

    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def architecture(self) -> str: ...  # noqa: D102
    @property
    def base_version(self) -> str: ...  # noqa: D102
    @property
    def targets(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def scaling_factor(self) -> float: ...  # noqa: D102
    @property
    def text_prefixes(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def text_folders(self) -> Sequence[tuple[str, str]]: ...  # noqa: D102

    def claims(self, unet_config: Mapping[str, Any]) -> bool:
        """Whether a denoiser of this configuration (diffusers' keys) belongs to the family."""

    def complete(self, unet_config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration inferred from shapes, with what shapes do not show."""

    def text_components(self, tensors: Sequence[Mapping[str, Tensor]]) -> list[Component]:
        """The text encoders from their tensors as a single file or a host names them, without a prefix.

        Raises:
            WeightsError: They are no text encoders of this family.
        """

    def build(self, weights: BaseWeights) -> DiffusionModel:
        """Build the networks around the tensors, without a copy."""


def on_meta(make: Callable[..., nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """Build a network without memory for its weights.

    Raises:
        WeightsError: No such network can be built.
    """
    try:
        with torch.device("meta"):
            return make(**config)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise WeightsError(f"The base model's shape is not known: {error}.", _INCOMPLETE) from error


def build_around(network: nn.Module, component: Component) -> nn.Module:
    """Put a component's tensors into a network built on the meta device; the network shares their storage.

    Args:
        network: Built under `torch.device("meta")`.
        component: Every parameter and persistent buffer of the network, and nothing else. Each is wrapped anew,
            so that a later change of the network's device or dtype leaves the given tensors alone.

    Raises:
        WeightsError: A tensor is missing, unknown, or of another shape than the network's.
    """
    expected = network.state_dict()
    kind = type(network).__name__
    for name in component.tensors:
        if name not in expected:
            shown = component.file_names.get(name, name)
            raise WeightsError(f"The base model's {kind} has a tensor that is not known: {shown}.", _INCOMPLETE)
    borrowed = {}
    for name, place in expected.items():
        tensor = component.tensors.get(name)
        if tensor is None:
            raise WeightsError(f"The base model's {kind} lacks the tensor {name}.", _INCOMPLETE)
        if tensor.shape != place.shape:
            name = component.file_names.get(name, name)
            shapes = f"{tuple(tensor.shape)} instead of {tuple(place.shape)}"
            raise WeightsError(
                f"The base model's {kind} has a tensor of another shape: {name} is {shapes}.", _INCOMPLETE
            )
        borrowed[name] = as_ordinary(tensor)
    network.load_state_dict(borrowed, assign=True, strict=True)
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta and name == "position_ids":
                device = next(network.parameters()).device
                positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
                module.register_buffer(name, positions, persistent=False)
    return network.requires_grad_(False).eval()


def as_ordinary(tensor: Tensor) -> Tensor:
    """A tensor over the same storage that autograd accepts, also if `tensor` was made in inference mode."""
    if not tensor.is_inference():
        return tensor.detach()
    ordinary = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    with torch.no_grad():
        ordinary.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return ordinary
