"""How much CUDA memory a training run will take, before it starts; and what to do if that is too much.

Weights and optimiser states are counted. What a step keeps between its forward and its backward pass is measured: the
run's own networks, with its own adapter, run a step on the meta device, which has shapes but no memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.kohya import Adapter
from ...adapters.names import networks
from ...core.devices import DTYPES, to_device
from ...core.errors import suggest
from ...core.prompts import PromptWords
from ...models.block_swap import swapped_blocks, swapped_bytes
from ...models.blocks import blocks_of, disable_gradient_checkpointing, enable_gradient_checkpointing
from ...models.families.base import BaseWeights, Component, Conditioning, DiffusionModel, token_ids_key
from ...models.nf4 import Nf4Linear
from ...settings.optimizer import OPTIMIZERS
from ...settings.train import TrainSettings
from ..optimizers import usual_rate
from ..trainable import Trainable, make_trainable
from ..words import TrainedWords
from .meter import CudaEmulation, LiveBytes

GB = 2**30
CUDA_CONTEXT = GB // 2  # bytes that CUDA itself takes of a card, beside what is planned
_WORKSPACES = GB // 4  # bytes of cuBLAS and cuDNN
_FRAGMENTATION = 0.05  # share of the peak that the allocator can't use
_ALLOCATOR_BLOCK = 512  # bytes; CUDA's allocator rounds up to a multiple
_META = torch.device("meta")
# the others make temporaries of all tensors; adamw's kernel is a fused one on CUDA
_UPDATES_IN_PLACE = ("adamw", "adafactor", "adamw-8bit", "adamw-8bit-paged")
_FLOAT32_BYTES = 4

_ORDINALS = {4: "fourth", 2: "second"}  # intervals of gradient checkpointing that are tried
_SWAPPED_SHARES = (0.25, 0.5, 0.75, 1.0)  # of all blocks

# of bitsandbytes, in numbers
_MIN_SIZE_8BIT = 4096  # smaller tensors have states in float32
_BLOCK_SIZE_8BIT = 256  # numbers that share a scale
_MIN_SIZE_PAGED = 100_000  # smaller tensors have states that are not paged


@dataclass(frozen=True)
class MemorySaving:
    """Ways to save memory that change the result only by rounding.

    Attributes:
        checkpointing: One in this many blocks recomputes its activations in the backward pass; 0: none does.
        split: The number of parts that every batch is split into; a step has that many times more passes. A sample
            depends on its index in the whole step, so the samples stay the same.
        swap: The number of blocks that stay in system memory; at least that of the settings.
    """

    checkpointing: int
    split: int = 1
    swap: int = 0

    def applied(self, settings: TrainSettings) -> TrainSettings:
        """The settings to compute with; the fingerprint and the file keep those that were given."""
        changes = {
            "gradient_checkpointing": self.checkpointing > 0,
            "gradient_checkpointing_interval": self.checkpointing or settings.gradient_checkpointing_interval,
            "batch_size": settings.batch_size // self.split,
            "gradient_accumulation": settings.gradient_accumulation * self.split,
            "swap_blocks": max(self.swap, settings.swap_blocks),
        }
        return settings.model_copy(update=changes)

    def described(self, settings: TrainSettings) -> str:
        """What differs from the settings, such as "gradient checkpointing"; "" if nothing does."""
        changes = []
        if self.checkpointing != settings.checkpointing_interval:
            changes.append(checkpointing_title(self.checkpointing))
        if self.split > 1:
            changes.append(f"batches of {settings.batch_size} in {self.split} micro-batches")
        if self.swap > settings.swap_blocks:
            changes.append(f"{self.swap} blocks swapped")
        return ", ".join(changes)


def checkpointing_title(interval: int) -> str:
    """Gradient checkpointing of one in `interval` blocks, in words."""
    return (
        "gradient checkpointing"
        if interval == 1
        else f"gradient checkpointing of every {_ORDINALS.get(interval, f'{interval}th')} block"
    )


def memory_savings(settings: TrainSettings, blocks: int = 0) -> list[MemorySaving]:
    """The options, fastest first.

    First as set, then gradient checkpointing of some blocks, then of all; then smaller and smaller parts of a batch;
    then more and more swapped blocks. With dropout, batches are not split, since what is dropped depends on the pass.

    Args:
        settings: Of the run.
        blocks: The number of blocks that can be swapped.
    """
    as_set = settings.checkpointing_interval
    intervals = [interval for interval in (*_ORDINALS, 1) if not as_set or interval < as_set]
    whole_batch = [MemorySaving(interval, swap=settings.swap_blocks) for interval in (as_set, *intervals)]
    max_split = 1 if settings.dropout else settings.batch_size
    splits = [split for split in range(2, max_split + 1) if max_split % split == 0]
    parts = [MemorySaving(1, split, settings.swap_blocks) for split in splits]
    swaps = [math.ceil(blocks * share) for share in _SWAPPED_SHARES]
    swapped = [MemorySaving(1, max_split, count) for count in dict.fromkeys(swaps) if count > settings.swap_blocks]
    return list(dict.fromkeys([*whole_batch, *parts, *swapped]))


@dataclass(frozen=True)
class MemoryNeed:
    """Memory of the device in bytes.

    Attributes:
        base: The frozen weights of the UNet and of the text encoders that run in every step.
        trained: The trained weights, their gradients and averages, and the optimiser's state.
        activations: The most that a step holds in addition to these.
        encoding: The most that is held while captions, and then pictures, are encoded, before the first step.
        previews: The autoencoder and what it holds while it decodes a preview, in addition to base and trained; 0
            without previews.
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
        """The peak and a margin for workspaces and fragmentation, without `CUDA_CONTEXT`."""
        return round(self.peak * (1 + _FRAGMENTATION)) + _WORKSPACES


class Planner:
    """Measures what a run needs, with networks that use no memory; takes seconds for each quantisation of the base."""

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
            base: The base model; only the shapes and types of its tensors matter.
            settings: What is trained and how.
            precision: "fp32", "bf16" or "fp16".
            start: An adapter to go on from.
            priors: Whether there are class pictures.
            device: Where to measure; on another than "meta" all is computed for real, with the same counting.
        """
        self._base = _on_meta(base) if device == _META else base
        self._settings = settings
        self._dtype = DTYPES[precision]
        self._start = start
        self._priors = priors
        self._device = device
        self._prepared: dict[str, _PreparedModel] = {}  # by base_quantization
        self._step_peaks: dict[tuple[str, MemorySaving], int] = {}
        self._result_cache: dict[Hashable, Any] = {}

    @functools.cached_property
    def blocks(self) -> int:
        """The number of blocks that can be swapped."""
        if self._settings.adapter == "full":
            return 0
        return len(blocks_of(self._prepare(self._settings.base_quantization).model.denoiser))

    def need(
        self, saving: MemorySaving, *, quantization: str | None = None, optimizer: str | None = None
    ) -> MemoryNeed:
        """Measure one option.

        Args:
            saving: The option.
            quantization: A base_quantization other than the settings'.
            optimizer: An optimiser other than the settings'.
        """
        quantization = quantization or self._settings.base_quantization
        optimizer = optimizer or self._settings.optimizer
        prepared = self._prepare(quantization)
        parameters = prepared.trainable.parameters()

        weights = _FLOAT32_BYTES * sum(parameter.numel() for parameter in parameters)
        gradients = 0 if self._settings.fused_backward_pass else weights
        untrained = weights if self._settings.adapter == "full" and self._settings.needs_base else 0
        averages = weights if self._settings.ema_decay else 0
        states = sum(state_bytes(optimizer, parameter.shape) for parameter in parameters)
        update_temporaries = 0 if optimizer in _UPDATES_IN_PLACE else weights

        step = replace(saving, swap=0)  # which changes nothing of what is allocated
        if (quantization, step) not in self._step_peaks:
            self._step_peaks[quantization, step] = self._measure_step(prepared, step)
        inside = {id(parameter) for network in networks(prepared.model).values() for parameter in network.parameters()}
        trained_inside = sum(parameter.nbytes for parameter in parameters if id(parameter) in inside)
        step_peak = max(self._step_peaks[quantization, step], gradients + update_temporaries)
        swapped = swapped_bytes(swapped_blocks(prepared.model.denoiser, saving.swap))
        return MemoryNeed(
            base=_weight_bytes(networks(prepared.model).values()) - trained_inside + untrained - swapped,
            trained=weights + gradients + states + averages,
            activations=step_peak - gradients,
            encoding=prepared.encoding,
            previews=prepared.previews,
        )

    def _prepare(self, quantization: str) -> _PreparedModel:
        if quantization not in self._prepared:
            settings = self._settings.model_copy(update={"base_quantization": quantization})
            with self._device:
                self._prepared[quantization] = _prepare_model(
                    self._base, settings, dtype=self._dtype, start=self._start, device=self._device
                )
        return self._prepared[quantization]

    def _measure_step(self, prepared: _PreparedModel, saving: MemorySaving) -> int:
        """The most that a step's forward and backward pass allocate, its gradients included, in bytes."""
        settings = saving.applied(self._settings)
        model = prepared.model
        parameters = prepared.trainable.parameters()
        for network in networks(model).values():
            network.train()
            if settings.checkpointing_interval:
                enable_gradient_checkpointing(network, settings.checkpointing_interval)
            else:
                disable_gradient_checkpointing(network)
        for parameter in parameters:  # earlier passes of the step have left their gradients
            parameter.grad = torch.zeros_like(parameter) if settings.gradient_accumulation > 1 else None
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]

        samples = settings.batch_size * (2 if self._priors else 1)
        with self._device:
            text = {
                name: tensor.expand(samples, *tensor.shape[1:]).contiguous() for name, tensor in prepared.text.items()
            }
            text["size"] = torch.zeros(samples, 6)
            noisy = torch.zeros((samples, *prepared.latents_shape), dtype=self._dtype)
            timestep = model.objective.timestep_at(0.5, settings, prepared.latents_shape)
            timesteps = torch.full((samples,), timestep)

        weights = [tensor for network in networks(model).values() for tensor in _stored_tensors(network)]
        live = LiveBytes(
            self._device.type,
            exclude=[*weights, *parameters, *gradients],
            block_size=_ALLOCATOR_BLOCK,
            result_cache=self._result_cache,
        )
        cuda = CudaEmulation(autocast=None if self._dtype == torch.float32 else self._dtype)
        with live:
            with cuda:
                for encoder in model.text_encoders:
                    text |= model.encode_tokens(encoder, text[token_ids_key(encoder)])
                prediction = model.predict(noisy, timesteps, text)
                loss = (prediction.float() - torch.zeros_like(prediction, dtype=torch.float32)).pow(2).mean()
            del prediction, text
            if settings.fused_backward_pass and settings.gradient_accumulation == 1:
                with _freed_gradients(parameters):
                    cuda.backward(loss)
            else:
                cuda.backward(loss)
        peak = live.peak + sum(gradient.nbytes for gradient in gradients)
        for parameter in parameters:
            parameter.grad = None
        return peak


@contextlib.contextmanager
def _freed_gradients(parameters: Iterable[Any]) -> Iterator[None]:
    """Inside the block gradients are freed as they are complete, as `FusedBackward` does once it has used them."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(free) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _PreparedModel:
    """A model as the recipe prepares it for training, on the planner's device.

    Attributes:
        model: Without autoencoder, and of the text encoders with those alone that run in every step.
        trainable: What is trained in it.
        text: The conditioning on the caption of one sample.
        latents_shape: Of one sample, (channels, height, width).
        encoding: See `MemoryNeed`.
        previews: See `MemoryNeed`.
    """

    model: DiffusionModel
    trainable: Trainable
    text: Conditioning
    latents_shape: tuple[int, int, int]
    encoding: int
    previews: int


def _prepare_model(
    base: BaseWeights, settings: TrainSettings, *, dtype: torch.dtype, start: Adapter | None, device: torch.device
) -> _PreparedModel:
    """Build a model, measure what encoding and previews need, and put in what is trained."""
    model = base.family.build(base)
    words = None
    if settings.token_vectors:  # which word it is makes no difference
        learned = PromptWords(f"{settings.token} to plan".replace(".", " "))
        words = TrainedWords(model, settings, [learned], None)
    in_steps = settings.text_encoders_in_steps(model.text_encoders)
    text = {part: tensor.to(dtype) for part, tensor in model.zero_conditioning().items()}
    is_known = bool(text)
    frozen_encoders: list[nn.Module] = []
    for name, encoder in list(model.text_encoders.items()):
        ids = torch.zeros((1, model.max_tokens(name)), dtype=torch.int64)
        text[token_ids_key(name)] = ids
        if name not in in_steps:
            frozen_encoders.append(to_device(encoder, device, model.text_dtype))
            if not is_known:
                with torch.no_grad():
                    text |= {part: tensor.to(dtype) for part, tensor in model.encode_tokens(name, ids).items()}
            del model.text_encoders[name]

    vae: Any = to_device(model.vae, device, torch.float32)
    del model.vae
    vae_bytes = _weight_bytes([vae])
    side = settings.resolution
    latents_shape = base.family.latents.shape(vae, side, side)
    encode = functools.partial(base.family.latents.encode, vae)
    encoding = max(_weight_bytes(frozen_encoders), vae_bytes + _forward_peak(vae, encode, (1, 3, side, side)))
    previews = 0
    if settings.preview_every:
        decode = functools.partial(base.family.latents.decode, vae)
        previews = vae_bytes + _forward_peak(vae, decode, (1, *latents_shape))
    return _PreparedModel(
        model=model,
        trainable=make_trainable(model, settings, device, dtype, start, words),
        text=text,
        latents_shape=latents_shape,
        encoding=encoding,
        previews=previews,
    )


def _forward_peak(network: nn.Module, forward: Callable[[Tensor], Any], shape: Sequence[int]) -> int:
    """The most that `forward` allocates for a float32 tensor of that shape, without gradients, in bytes."""
    weights = _stored_tensors(network)
    device = weights[0].device
    live = LiveBytes(device.type, exclude=weights, block_size=_ALLOCATOR_BLOCK)
    with torch.no_grad(), CudaEmulation(autocast=None), live:
        forward(torch.zeros(tuple(shape), device=device))
    return live.peak


def _on_meta(base: BaseWeights) -> BaseWeights:
    """A base model of the same shapes and types, without memory."""

    def without_memory(component: Component) -> Component:
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device=_META)
            for name, tensor in component.tensors.items()
        }
        scales = {name: torch.empty((), device=_META) for name in component.scales}
        packed = {name: weight.to(_META) for name, weight in component.packed.items()}
        return replace(component, tensors=tensors, scales=scales, packed=packed)

    return replace(
        base,
        denoiser=without_memory(base.denoiser),
        vae=without_memory(base.vae),
        text_encoders=[without_memory(encoder) for encoder in base.text_encoders],
    )


def _stored_tensors(network: nn.Module) -> list[Tensor]:
    """A network's parameters and buffers, and the packed weights of its quantised layers."""
    packed = [module.packed for module in network.modules() if isinstance(module, Nf4Linear)]
    return [*network.parameters(), *network.buffers(), *packed]


def _weight_bytes(parts: Iterable[nn.Module]) -> int:
    """Bytes that the networks' weights take."""
    size = 0
    for network in parts:
        size += sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])
        size += sum(module.quantized_bytes for module in network.modules() if isinstance(module, Nf4Linear))
    return size


def state_bytes(optimizer: str, shape: Sequence[int]) -> int:
    """Bytes of an optimiser's state on the device for a trained float32 tensor, without weight and gradient.

    Args:
        optimizer: Its name in the settings.
        shape: The tensor's.
    """
    numbers = math.prod(shape)
    if optimizer == "adafactor":  # means of rows and columns (Shazeer & Stern 2018)
        if len(shape) < 2:
            return _FLOAT32_BYTES * numbers
        rows = math.prod(shape[:-1])
        columns = math.prod([*shape[:-2], shape[-1]])
        return _FLOAT32_BYTES * (rows + columns)
    if not optimizer.startswith("adamw-8bit"):
        return round(OPTIMIZERS[optimizer].bytes_per_number * numbers)
    if numbers < _MIN_SIZE_8BIT:
        return 2 * _FLOAT32_BYTES * numbers
    if optimizer == "adamw-8bit-paged" and numbers >= _MIN_SIZE_PAGED:
        return 0  # the driver moves it between the memories
    scales = -(-numbers // _BLOCK_SIZE_8BIT)
    return 2 * (numbers + _FLOAT32_BYTES * scales)


def resident_bytes(base: BaseWeights, settings: TrainSettings, precision: str, device: torch.device) -> int:
    """Bytes of the base that are already on the device as needed, so they take no more memory."""
    if settings.base_quantization != "none" or settings.adapter == "full":
        return 0
    same_devices = (device, torch.device(device.type, device.index or 0))
    return sum(
        tensor.nbytes
        for tensor in base.denoiser.tensors.values()
        if tensor.device in same_devices and tensor.dtype == DTYPES[precision]
    )


@dataclass(frozen=True)
class PlanOption:
    """An option, and what a run then needs."""

    saving: MemorySaving
    need: MemoryNeed


@dataclass(frozen=True)
class Plan:
    """The options that were measured, and the choice between them.

    Attributes:
        measured: Fastest first; the last is what fits, if anything does.
        memory: Bytes that can be used.
    """

    measured: Sequence[PlanOption]
    memory: int

    @property
    def chosen(self) -> PlanOption:
        """The fastest that fits; if none does, the smallest."""
        return self.measured[-1] if self.fits else min(self.measured, key=lambda option: option.need.total)

    @property
    def fits(self) -> bool:
        """Whether what is chosen fits."""
        return self.measured[-1].need.total <= self.memory


def make_plan(planner: Planner, settings: TrainSettings, memory: int) -> Plan:
    """Find the fastest option that fits; a few are measured, since each takes seconds.

    Args:
        planner: Of the run.
        settings: Of the run.
        memory: Bytes that can be used, without `CUDA_CONTEXT`.
    """

    def measure(saving: MemorySaving) -> PlanOption:
        return PlanOption(saving, planner.need(saving))

    as_set, *others = memory_savings(settings, planner.blocks)
    first = measure(as_set)
    measured = [first]
    some_blocks = [saving for saving in others if saving.checkpointing > 1]
    for saving in [] if first.need.total <= memory else others[len(some_blocks) :]:
        option = measure(saving)
        if option.need.total > memory:
            measured.append(option)
            continue
        fitting = option
        for fewer in reversed(some_blocks if len(measured) == 1 else []):  # every second block, then every fourth
            faster = measure(fewer)
            if faster.need.total > memory:
                break
            fitting = faster
        measured.append(fitting)
        break
    return Plan(measured, memory)


def remedies(settings: TrainSettings) -> str:
    """What else would save memory, as an instruction; it changes the result, so the user has to choose it."""
    changes = [f"lower {suggest('resolution')}"]
    if settings.base_quantization == "none" and settings.adapter != "full":
        changes.append(f"set {suggest('base_quantization', 'nf4')}")
    if settings.optimizer_class.bytes_per_number > OPTIMIZERS["adamw-8bit"].bytes_per_number:
        changes.append(f"set {suggest('optimizer', 'adamw-8bit')}{usual_rate(settings)}")
    *others, last = changes
    return f"{', '.join(others)} or {last}".capitalize() if others else last.capitalize()
