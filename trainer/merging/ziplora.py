"""A learned merge of a subject and a style (ZipLoRA, Shah et al. 2023, arXiv 2311.13600).

Each adapter gets a coefficient for every input of every layer, trained so that the merged model predicts as the subject
adapter does on subject prompts and as the style adapter does on style prompts, while inputs that both use are
penalised. A coefficient scales a column of ΔW, which a LoRA's `down` takes up: the result is an ordinary file.

Differences from the paper: no pictures are needed, each adapter draws what it was taught itself; every layer that an
adapter has takes part, convolutions by their input channels; and the subject is matched at high noise, where form is
decided, the style at low noise (compare Ouyang et al. 2025, K-LoRA, who let the two take turns while sampling).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..adapters.apply import apply_to_base
from ..adapters.kohya import Adapter
from ..adapters.names import Adaptable, module_path, modules_by_name, named_weights
from ..adapters.prefixes import UNET, component_of
from ..core.devices import DTYPES, explained_memory_errors, pick_precision, release, reset_peak_memory, to_device
from ..core.distributed import accelerate_state_kept, make_accelerator
from ..core.errors import AdapterError, CancelledError, DivergedError
from ..core.events import Listener, Phase, stop_if_asked
from ..core.prompts import split_prompts
from ..core.seeding import generator
from ..core.throughput import Throughput
from ..models.families.base import BaseWeights, Conditioning, DiffusionModel, as_ordinary
from ..models.sampling import GenerationConfig, denoise, starting_noise
from ..settings.merge import LearnedMergeSettings, MergeSettings
from .deltas import Delta, to_delta
from .merge import Merged, WeightedAdapter, aligned, merge, require_layers_fit

_LOWER = "resolution, turn gradient_checkpointing on, or choose bf16 or fp16"
_SUM = MergeSettings(method="sum")


class ZippedLayer(nn.Module):
    """A Linear or convolution with changes on top, each with a coefficient for every input (channel).

    Attributes:
        base: The layer; its weights are not trained.
        coefficients: (in,) for each change, float32, trained.
        only: Index of the change that is applied alone and without its coefficients; None for all with theirs.
    """

    def __init__(self, base: Adaptable, changes: Mapping[int, Delta]) -> None:
        """Put changes on a layer.

        Args:
            base: Linear or Conv2d.
            changes: Index of the adapter → what it adds, its strength included.
        """
        super().__init__()
        weight = base.weight
        self.base = base
        self.only: int | None = None
        self._factors = {
            index: _as_kernels(change, weight.shape, weight.device, weight.dtype) for index, change in changes.items()
        }
        self.coefficients = nn.ParameterDict(
            {str(index): nn.Parameter(torch.ones(weight.shape[1], device=weight.device)) for index in changes}
        )

    def forward(self, inputs: Tensor, *args: object) -> Tensor:
        """The layer's output for inputs (batch, tokens, in) or (batch, in, height, width)."""
        output: Tensor = self.base(inputs)
        for index, kernels in self._factors.items():
            if self.only is None:
                scale = self.coefficients[str(index)].to(inputs.dtype)
                linear = isinstance(self.base, nn.Linear)
                output = output + self._changed(inputs * (scale if linear else scale[:, None, None]), kernels)
            elif self.only == index:
                output = output + self._changed(inputs, kernels)
        return output

    def _changed(self, inputs: Tensor, kernels: Sequence[Tensor]) -> Tensor:
        if isinstance(self.base, nn.Linear):
            for kernel in kernels:
                inputs = nn.functional.linear(inputs, kernel)
            return inputs
        first, *others = kernels
        base = self.base
        inputs = nn.functional.conv2d(inputs, first, None, base.stride, base.padding, base.dilation, base.groups)
        for kernel in others:
            inputs = nn.functional.conv2d(inputs, kernel)
        return inputs

    def overlap(self) -> Tensor:
        """Mean over inputs of |mᵢ · mⱼ|, summed over pairs of changes; 0-D."""
        pairs = itertools.combinations(self.coefficients.values(), 2)
        found = [(first * second).abs().mean() for first, second in pairs]
        return torch.stack(found).sum() if found else torch.zeros((), device=self.base.weight.device)


def _as_kernels(change: Delta, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The factors of a change as weights of layers one after the other."""
    up = as_ordinary(change.up.to(device, dtype))
    if change.down is None:
        return [up.reshape(shape)]
    down = as_ordinary(change.down.to(device, dtype))
    return [down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *[1] * (len(shape) - 2))]


def learned_merge(
    base: BaseWeights,
    subject: WeightedAdapter,
    style: WeightedAdapter,
    settings: LearnedMergeSettings,
    device: torch.device,
    listener: Listener,
) -> Merged:
    """Merge a subject and a style adapter.

    Args:
        base: The base model of both; its tensors are borrowed and never written to.
        subject: The subject's adapter.
        style: The style's adapter.
        settings: Prompts and training.
        device: Where to train.
        listener: Told of the progress; may stop the work.

    Raises:
        AdapterError: The adapters don't fit the base or each other, or have no layer of the UNet in common.
        CancelledError: The listener asked to stop.
        DivergedError: The loss became NaN or infinite.
        OutOfMemoryError: The memory does not suffice; says what to lower.
    """
    with accelerate_state_kept(), explained_memory_errors(_LOWER):
        try:
            return _LearnedMerge(base, [subject, style], settings, device, listener).run()
        finally:
            release(device)


@dataclass(frozen=True)
class _Text:
    """The prompts of one adapter, a row each.

    Attributes:
        own: As text encoders with its own part say them.
        empty: The empty prompt likewise, as often.
        merged: As text encoders with all adapters' parts say them.
    """

    own: Conditioning
    empty: Conditioning
    merged: Conditioning


def _row(conditioning: Conditioning, row: int) -> Conditioning:
    return {name: rows[row : row + 1] for name, rows in conditioning.items()}


class _LearnedMerge:
    """One learned merge: draw, train, merge."""

    def __init__(
        self,
        base: BaseWeights,
        parts: Sequence[WeightedAdapter],
        settings: LearnedMergeSettings,
        device: torch.device,
        listener: Listener,
    ) -> None:
        self.base, self.settings, self.device, self.listener = base, settings, device, listener
        self.parts, _ = aligned(parts)
        self.precision = pick_precision(settings.precision, device)
        self.prompts = [split_prompts(settings.subject_prompt), split_prompts(settings.style_prompt)]

    def run(self) -> Merged:
        """Encode the prompts, put the changes in, let each adapter draw, train the coefficients, merge."""
        reset_peak_memory(self.device)
        model = self.base.family.build(self.base)
        self.weights = named_weights(model)
        require_layers_fit(self.parts, self.weights)
        texts = self._encode()
        model.text_encoders.clear()
        del model.vae
        to_device(model.unet, self.device, DTYPES[self.precision])
        self.layers = self._put_in(model)
        latents = self._draw(model, texts)
        self._train(model, texts, latents)
        columns = {
            name: [one.detach().cpu() for one in layer.coefficients.values()] for name, layer in self.layers.items()
        }
        return merge(self.parts, _SUM, self.weights, None, self.listener, columns=columns)

    def _encode(self) -> list[_Text]:
        """The prompts of each adapter."""
        merged = self._text_model(self.parts)
        found = []
        for part, prompts in zip(self.parts, self.prompts, strict=True):
            own = self._text_model([part])
            empty = {name: rows.expand(len(prompts), *rows.shape[1:]) for name, rows in self._said(own, [""]).items()}
            found.append(_Text(self._said(own, prompts), empty, self._said(merged, prompts)))
        return found

    def _text_model(self, parts: Sequence[WeightedAdapter]) -> DiffusionModel:
        """A model whose text encoders have the adapters' parts for them, in float32."""
        changed = []
        for part in parts:
            layers = {name: layer for name, layer in part.adapter.layers.items() if component_of(name) != UNET}
            vectors = {name: one for name, one in part.adapter.vectors.items() if component_of(name) != UNET}
            if layers or vectors:
                places = [str(module_path(name)) for name in layers]
                blocks = [one for one in part.blocks if any(map(one.pattern.search, places))]
                adapter = Adapter(layers, part.adapter.metadata, vectors)
                one = merge([replace(part, adapter=adapter, blocks=blocks)], _SUM, self.weights)
                changed.append((one.adapter, 1.0))
        model = self.base.family.build(apply_to_base(self.base, changed))
        for encoder in model.text_encoders.values():
            to_device(encoder, self.device, torch.float32)
        return model

    @torch.no_grad()
    def _said(self, model: DiffusionModel, prompts: Sequence[str]) -> Conditioning:
        """What a model's text encoders say of prompts."""
        side = float(self.settings.resolution)
        size = torch.tensor([[side, side, 0, 0, side, side]], device=self.device).expand(len(prompts), -1)
        return {name: rows.to(self.device) for name, rows in model.encode_prompts(prompts).items()} | {"size": size}

    def _put_in(self, model: DiffusionModel) -> dict[str, ZippedLayer]:
        """Replace the UNet's layers that an adapter changes; their names in the file → the new ones."""
        by_name = modules_by_name(model)
        places = {id(module): path for path, module in model.unet.named_modules()}
        found = {}
        for name in sorted({name for part in self.parts for name in part.adapter.layers if component_of(name) == UNET}):
            module, weight = by_name[name], self.weights[name]
            changes = {
                index: to_delta(part.adapter.layers[name], weight.shape, weight).times(part.weight(name))
                for index, part in enumerate(self.parts)
                if name in part.adapter.layers
            }
            found[name] = ZippedLayer(module, changes)
            parent, _, child = places[id(module)].rpartition(".")
            setattr(model.unet.get_submodule(parent), child, found[name])
        if not any(len(layer.coefficients) > 1 for layer in found.values()):
            raise AdapterError(
                "The adapters have no layer of the UNet in common, so there is nothing to learn.",
                "Merge them by the method sum.",
            )
        return found

    def _apply_only(self, index: int | None) -> None:
        for layer in self.layers.values():
            layer.only = index

    def _draw(self, model: DiffusionModel, texts: Sequence[_Text]) -> list[Tensor]:
        """Latents that each adapter draws by itself, on its prompts in turn: (pictures, channels, height, width)."""
        settings, side = self.settings, self.settings.resolution // _factor(self.base)
        channels = int(model.unet.config.in_channels)
        config = GenerationConfig(
            width=settings.resolution,
            height=settings.resolution,
            steps=settings.sampling_steps,
            guidance=settings.guidance,
        )
        found = []
        for index, text in enumerate(texts):
            self._apply_only(index)
            drawn = []
            for number in range(settings.pictures):
                self.listener.report(Phase("drawing", index * settings.pictures + number, 2 * settings.pictures))
                stop_if_asked(self.listener)
                row = number % len(self.prompts[index])
                noise = starting_noise([settings.seed + number], (channels, side, side))
                drawn.append(
                    denoise(
                        model,
                        noise,
                        _row(text.own, row),
                        _row(text.empty, row),
                        config,
                        self.listener,
                    )
                )
            found.append(torch.cat(drawn))
        self.listener.report(Phase("drawing", 2 * settings.pictures, 2 * settings.pictures))
        return found

    def _train(self, model: DiffusionModel, texts: Sequence[_Text], latents: Sequence[Tensor]) -> None:
        settings = self.settings
        if settings.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
        coefficients = [one for layer in self.layers.values() for one in layer.coefficients.values()]
        accelerator = make_accelerator(self.device, self.precision, 1)
        model.objective = model.objective.to(self.device)
        optimizer = torch.optim.AdamW(coefficients, lr=settings.learning_rate, weight_decay=0.0)
        model.unet, optimizer = accelerator.prepare(model.unet.train(), optimizer)
        pace = Throughput(settings.steps, 0, self.device)
        for step in range(settings.steps):
            losses = [self._loss(model, index, step, texts[index], latents[index]) for index in range(len(self.parts))]
            overlap = torch.stack([layer.overlap() for layer in self.layers.values()]).mean()
            loss = torch.stack(losses).sum() + settings.overlap_weight * overlap
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = float(loss.detach())
            if not torch.isfinite(loss):
                raise DivergedError(
                    f"The loss became {value} in step {step + 1}.", "Lower learning_rate, or choose precision fp32."
                )
            self.listener.report(pace.event(step + 1, value, settings.learning_rate))
            if self.listener.should_stop():
                raise CancelledError(step + 1, settings.steps)
        accelerator.free_memory()

    def _loss(
        self,
        model: DiffusionModel,
        index: int,
        step: int,
        text: _Text,
        latents: Tensor,
    ) -> Tensor:
        """How far the merged prediction is from that of one adapter alone, on one of its own latents, 0-D."""
        source = generator(self.settings.seed, "zip", index, step)
        row = int(torch.randint(len(latents), (), generator=source))
        lowest, end = self._noise_levels(index, model.objective.timesteps)
        timesteps = torch.randint(lowest, end, (1,), generator=source).to(self.device)
        noise = torch.randn(latents[:1].shape, generator=source).to(self.device)
        noisy = model.objective.add_noise(latents[row : row + 1], noise, timesteps).to(DTYPES[self.precision])
        prompt = row % len(self.prompts[index])
        self._apply_only(index)
        with torch.no_grad():
            wanted = model.predict(noisy, timesteps, _row(text.own, prompt)).float()
        self._apply_only(None)
        return nn.functional.mse_loss(model.predict(noisy, timesteps, _row(text.merged, prompt)).float(), wanted)

    def _noise_levels(self, index: int, timesteps: int) -> tuple[int, int]:
        """The timesteps, from and to, at which an adapter's predictions are matched."""
        split = round(self.settings.split * timesteps)
        if not split:
            return 0, timesteps
        return (split, timesteps) if index == 0 else (0, split)


def _factor(base: BaseWeights) -> int:
    """How many pixels a latent's side stands for."""
    return int(2 ** (len(base.vae.config["block_out_channels"]) - 1))
