"""How much memory of a CUDA device a training will take, before it begins; and what to do if that is too much.

Weights and optimiser states are counted. What a step keeps between its forward and its backward pass is measured: the
run's own networks, with its own adapter, go through a step on the meta device, which has shapes and no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.kohya import Adapter
from ...adapters.names import networks
from ...core.devices import DTYPES, to_device
from ...models.families.base import BaseWeights, Component, Conditioning, DiffusionModel
from ...models.nf4 import Nf4Linear
from ...settings.optimizer import OPTIMIZERS
from ...settings.train import TrainSettings
from ..optimizers import enable_gradient_checkpointing
from ..trainable import Trainable, make_trainable
from .meter import CudaEmulation, LiveBytes

GB = 2**30
CONTEXT = GB // 2  # what CUDA itself takes of a card, beside what is planned
_WORKSPACES, _SLACK = GB // 4, 0.05  # of cuBLAS and cuDNN; share that the allocator can't use
_GRANULE = 512  # bytes; CUDA's allocator rounds up to it
_META = torch.device("meta")
_ONE_BY_ONE = ("adafactor", "adamw-8bit", "adamw-8bit-paged")  # optimisers that make no temporary of all tensors
_SMALL_8BIT, _BLOCK_8BIT, _SMALL_PAGED = 4096, 256, 100_000  # of bitsandbytes, in numbers of a tensor


@dataclass(frozen=True)
class MemorySaving:
    """What saves memory without changing what is learned, but for rounding.

    Attributes:
        checkpointing: Whether activations are computed again in the backward pass.
        split: Into how many parts every batch is cut; there are as many times more passes a step. A sample is drawn for
            its place in the whole step, so that they stay the same.
    """

    checkpointing: bool
    split: int = 1

    def applied(self, settings: TrainSettings) -> TrainSettings:
        """The settings to compute with; those that were given stay in the run's fingerprint and file."""
        changes = {
            "gradient_checkpointing": self.checkpointing,
            "batch_size": settings.batch_size // self.split,
            "gradient_accumulation": settings.gradient_accumulation * self.split,
        }
        return settings.model_copy(update=changes)

    def described(self, settings: TrainSettings) -> str:
        """What is different from the settings, such as "gradient checkpointing"; "" if nothing is."""
        parts = ["gradient checkpointing"] if self.checkpointing and not settings.gradient_checkpointing else []
        if self.split > 1:
            parts.append(f"batches of {settings.batch_size} computed in {self.split} parts")
        return ", ".join(parts)


def memory_savings(settings: TrainSettings) -> list[MemorySaving]:
    """What can be tried, fastest first: as set, gradient checkpointing, then smaller and smaller parts of a batch.

    With dropout a batch is not cut, since what is dropped depends on the pass.
    """
    found = list(dict.fromkeys([MemorySaving(settings.gradient_checkpointing), MemorySaving(True)]))
    size = 1 if settings.dropout else settings.batch_size
    return found + [MemorySaving(True, split) for split in range(2, size + 1) if size % split == 0]


@dataclass(frozen=True)
class MemoryNeed:
    """Memory of the device in bytes.

    Attributes:
        base: The UNet and trained text encoders, as far as they are frozen.
        trained: What is trained, its gradients, the optimiser's state and the averaged weights.
        activations: What a step holds beside these at its peak.
        encoding: The most that is there while captions, and after them pictures, are encoded, before the first step.
        previews: The autoencoder and what it holds while a preview is drawn, beside base and trained; 0 without them.
    """

    base: int
    trained: int
    activations: int
    encoding: int = 0
    previews: int = 0

    @property
    def peak(self) -> int:
        """The most that tensors take at once."""
        return max(self.base + self.trained + max(self.activations, self.previews), self.encoding)

    @property
    def total(self) -> int:
        """The peak and a margin: workspaces, and what the allocator can't use. CUDA's own 0.5 GB is not in it."""
        return round(self.peak * (1 + _SLACK)) + _WORKSPACES


class Planner:
    """Measures what a run needs. Holds networks without memory; takes a few seconds for each kind of base."""

    def __init__(
        self,
        base: BaseWeights,
        settings: TrainSettings,
        precision: str,
        start: Adapter | None,
        priors: bool,
        device: torch.device = _META,
    ) -> None:
        """Take what is planned.

        Args:
            base: The base model; its tensors' shapes and types alone are looked at.
            settings: What is trained and how.
            precision: "fp32", "bf16" or "fp16".
            start: An adapter to go on from.
            priors: Whether there are class pictures.
            device: Where to measure; on another than "meta" all is computed for real, with the same counting.
        """
        self._device = device
        if device == _META:
            base = _on_meta(base)
        self._base = base
        self._settings, self._dtype, self._start, self._priors = settings, DTYPES[precision], start, priors
        self._built: dict[str, _Built] = {}
        self._steps: dict[tuple[str, MemorySaving], int] = {}
        self._seen: dict[Hashable, Any] = {}

    def need(
        self, saving: MemorySaving, *, quantization: str | None = None, optimizer: str | None = None
    ) -> MemoryNeed:
        """Measure one way to train.

        Args:
            saving: What is saved.
            quantization: Another value of base_quantization than the settings'.
            optimizer: Another optimiser than the settings'.
        """
        quantization = quantization or self._settings.base_quantization
        built = self._model(quantization)
        if (quantization, saving) not in self._steps:
            self._steps[quantization, saving] = self._step(built, saving)
        parameters = built.trainee.parameters()
        optimizer = optimizer or self._settings.optimizer
        weights = 4 * sum(one.numel() for one in parameters)
        averaged = weights if self._settings.ema_decay else 0
        state = sum(state_bytes(optimizer, one.shape) for one in parameters)
        updating = weights + (0 if optimizer in _ONE_BY_ONE else weights)  # gradients, and a temporary for every tensor
        return MemoryNeed(
            base=_held(networks(built.model).values()) - weights,
            trained=weights + weights + state + averaged,
            activations=max(self._steps[quantization, saving], updating) - weights,
            encoding=built.encoding,
            previews=built.previews,
        )

    def _model(self, quantization: str) -> _Built:
        if quantization not in self._built:
            settings = self._settings.model_copy(update={"base_quantization": quantization})
            with self._device:
                self._built[quantization] = _build(self._base, settings, self._dtype, self._start, self._device)
        return self._built[quantization]

    def _step(self, built: _Built, saving: MemorySaving) -> int:
        """Peak of what a step makes, gradients among it, in bytes."""
        model, parameters = built.model, built.trainee.parameters()
        settings = saving.applied(self._settings)
        rows = settings.batch_size * (2 if self._priors else 1)
        _recompute(model, settings.gradient_checkpointing)
        for network in networks(model).values():
            network.train()
        for parameter in parameters:  # earlier passes of the step have left theirs
            parameter.grad = torch.zeros_like(parameter) if settings.gradient_accumulation > 1 else None
        side = settings.resolution // built.downscale
        with self._device:
            text = {name: one.expand(rows, *one.shape[1:]).contiguous() for name, one in built.text.items()}
            text["size"] = torch.zeros(rows, 6)
            noisy = torch.zeros((rows, model.unet.config.in_channels, side, side), dtype=self._dtype)
            timesteps = torch.zeros(rows, dtype=torch.int64)
        cuda = CudaEmulation(None if self._dtype == torch.float32 else self._dtype)
        known = [one for network in networks(model).values() for one in _tensors(network)]
        gradients = [one.grad for one in parameters if one.grad is not None]
        live = LiveBytes(self._device.type, [*known, *gradients], _GRANULE, self._seen)
        with live:
            with cuda:
                for name in settings.text_encoder_rates:
                    text |= model.encode_tokens(name, text[f"ids{name.removeprefix('text_encoder')}"])
                prediction = model.predict(noisy, timesteps, text)
                loss = (prediction.float() - torch.zeros_like(prediction, dtype=torch.float32)).pow(2).mean()
            del prediction, text
            cuda.backward(loss)
        peak = live.peak + sum(one.nbytes for one in gradients)
        for parameter in parameters:
            parameter.grad = None
        return peak


@dataclass(frozen=True)
class _Built:
    """Networks as the recipe prepares them, on the meta device.

    Attributes:
        model: Without autoencoder, and without the text encoders that are not trained.
        trainee: What is trained in it.
        text: What the captions' rows are on the device, for one sample.
        downscale: Side of a picture / side of its latents.
        encoding: See `MemoryNeed`.
        previews: See `MemoryNeed`.
    """

    model: DiffusionModel
    trainee: Trainable
    text: Conditioning
    downscale: int
    encoding: int
    previews: int


def _build(
    base: BaseWeights, settings: TrainSettings, dtype: torch.dtype, start: Adapter | None, device: torch.device
) -> _Built:
    model = base.family.build(base)
    text: Conditioning = {}
    frozen: list[nn.Module] = []
    for name, encoder in list(model.text_encoders.items()):
        any_encoder: Any = encoder
        ids = torch.zeros((1, any_encoder.config.max_position_embeddings), dtype=torch.int64)
        text[f"ids{name.removeprefix('text_encoder')}"] = ids
        if name not in settings.text_encoder_rates:
            frozen.append(to_device(encoder, device, torch.float32))
            with torch.no_grad():
                text |= {part: rows.to(dtype) for part, rows in model.encode_tokens(name, ids).items()}
            del model.text_encoders[name]
    vae: Any = to_device(model.vae, device, torch.float32)
    del model.vae
    downscale, side = 2 ** (len(vae.config.block_out_channels) - 1), settings.resolution
    encoding = max(_held(frozen), _held([vae]) + _drawing(vae, vae.encode, (1, 3, side, side)))
    previews = 0
    if settings.preview_every:
        latents = (1, vae.config.latent_channels, side // downscale, side // downscale)
        previews = _held([vae]) + _drawing(vae, vae.decode, latents)
    return _Built(model, make_trainable(model, settings, device, dtype, start), text, downscale, encoding, previews)


def _drawing(network: nn.Module, work: Callable[[Tensor], Any], shape: Sequence[int]) -> int:
    """Peak of what `work` makes of a float32 tensor of that shape, without gradients, in bytes."""
    known = _tensors(network)
    live = LiveBytes(known[0].device.type, known, _GRANULE)
    with torch.no_grad(), CudaEmulation(None), live:
        work(torch.zeros(tuple(shape), device=known[0].device))
    return live.peak


def _recompute(model: DiffusionModel, on: bool) -> None:
    (model.unet.enable_gradient_checkpointing if on else model.unet.disable_gradient_checkpointing)()
    for encoder in model.text_encoders.values():
        any_encoder: Any = encoder
        if on:
            enable_gradient_checkpointing(encoder)
        else:  # the name changes with version 6 of transformers
            disable = getattr(encoder, "activation_checkpointing_disable", None)
            (disable or any_encoder.gradient_checkpointing_disable)()


def _on_meta(base: BaseWeights) -> BaseWeights:
    """A base model of the same shapes and types, without memory."""

    def emptied(part: Component) -> Component:
        tensors = {name: torch.empty(one.shape, dtype=one.dtype, device=_META) for name, one in part.tensors.items()}
        return replace(part, tensors=tensors)

    encoders = [emptied(part) for part in base.text_encoders]
    return replace(base, unet=emptied(base.unet), vae=emptied(base.vae), text_encoders=encoders)


def _tensors(network: nn.Module) -> list[Tensor]:
    packed = [module.packed for module in network.modules() if isinstance(module, Nf4Linear)]
    return [*network.parameters(), *network.buffers(), *packed]


def _held(parts: Iterable[nn.Module]) -> int:
    """Bytes of networks' weights."""
    found = 0
    for network in parts:
        found += sum(one.nbytes for one in [*network.parameters(), *network.buffers()])
        found += sum(module.quantized_bytes for module in network.modules() if isinstance(module, Nf4Linear))
    return found


def state_bytes(optimizer: str, shape: Sequence[int]) -> int:
    """Bytes that an optimiser keeps on the device of a trained float32 tensor, beside weight and gradient.

    Args:
        optimizer: Its name in the settings.
        shape: The tensor's.
    """
    numbers = math.prod(shape)
    if optimizer == "adafactor":  # rows' and columns' means (Shazeer & Stern 2018)
        return 4 * (math.prod(shape[:-1]) + math.prod([*shape[:-2], shape[-1]])) if len(shape) > 1 else 4 * numbers
    if not optimizer.startswith("adamw-8bit"):
        return round(OPTIMIZERS[optimizer].bytes_per_number * numbers)
    if numbers < _SMALL_8BIT:
        return 8 * numbers
    if optimizer == "adamw-8bit-paged" and numbers >= _SMALL_PAGED:
        return 0  # the driver moves it between the memories
    return 2 * (numbers + 4 * -(-numbers // _BLOCK_8BIT))


def lent_bytes(base: BaseWeights, settings: TrainSettings, precision: str, device: torch.device) -> int:
    """Bytes of the base that lie on the device already as they are needed, so that they need no more room."""
    if settings.base_quantization != "none" or settings.adapter == "full":
        return 0
    there = (device, torch.device(device.type, device.index or 0))
    unet = base.unet.tensors.values()
    return sum(one.nbytes for one in unet if one.device in there and one.dtype == DTYPES[precision])


@dataclass(frozen=True)
class PlanOption:
    """A way to train and what it needs."""

    saving: MemorySaving
    need: MemoryNeed


@dataclass(frozen=True)
class Plan:
    """What was chosen.

    Attributes:
        measured: The ways that were measured, fastest first; the last one is chosen.
        memory: Bytes that can be used.
    """

    measured: Sequence[PlanOption]
    memory: int

    @property
    def chosen(self) -> PlanOption:
        """The first that fits, or the smallest."""
        return self.measured[-1] if self.fits else min(self.measured, key=lambda one: one.need.total)

    @property
    def fits(self) -> bool:
        """Whether what is chosen fits."""
        return self.measured[-1].need.total <= self.memory


def make_plan(planner: Planner, settings: TrainSettings, memory: int) -> Plan:
    """Measure one way after the other until one fits.

    Args:
        planner: Of the run.
        settings: Of the run.
        memory: Bytes that can be used, without what CUDA itself takes.
    """
    measured = []
    for saving in memory_savings(settings):
        measured.append(PlanOption(saving, planner.need(saving)))
        if measured[-1].need.total <= memory:
            break
    return Plan(measured, memory)


def remedies(settings: TrainSettings) -> str:
    """What else would save memory; it changes what is learned, so that it is the user's to choose."""
    found = ["lower resolution"]
    if settings.base_quantization == "none" and settings.adapter != "full":
        found.append("set base_quantization to nf4")
    if not settings.optimizer.startswith("adamw-8bit"):
        found.append("set optimizer to adamw-8bit")
    return " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found).capitalize()
