"""A learned merge of a subject and a style (ZipLoRA, Shah et al. 2023, arXiv 2311.13600).

Each adapter gets a coefficient for every input of every layer, trained so that the merged model predicts as the subject
adapter does on subject prompts and as the style adapter does on style prompts, while inputs that both use are
penalised. A coefficient scales a column of ΔW, which can be merged into a LoRA's `down`: the result is an ordinary
file.

Differences from the paper: no pictures are needed, since each adapter generates latents of what it was trained on;
every layer of an adapter takes part, convolutions by their input channels; and the subject is matched at high noise,
where form is decided, the style at low noise (compare Ouyang et al. 2025, K-LoRA, who let the two take turns while
sampling).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..adapters.apply import apply_to_base
from ..adapters.embeddings import learn_bundled
from ..adapters.kohya import Adapter
from ..adapters.module_paths import module_path
from ..adapters.names import Adaptable, modules_by_name, named_weights
from ..adapters.prefixes import UNET, component_of
from ..core.devices import DTYPES, explained_memory_errors, pick_precision, release, reset_peak_memory, to_device
from ..core.distributed import accelerate_state_kept, make_accelerator
from ..core.errors import AdapterError, CancelledError, DivergedError, suggest
from ..core.events import Listener, Phase, stop_if_asked
from ..core.prompts import split_prompts
from ..core.seeding import generator
from ..core.throughput import Throughput
from ..models.blocks import enable_gradient_checkpointing
from ..models.families.base import BaseWeights, Conditioning, DiffusionModel, as_ordinary
from ..models.sampling import GenerationConfig, denoise, starting_noise
from ..settings.merge import LearnedMergeSettings, MergeSettings
from .deltas import Delta, to_delta
from .merge import MergeResult, WeightedAdapter, merge, require_layers_fit, with_common_names

_MEMORY_REMEDY = (
    f"{suggest('resolution')}, set {suggest('gradient_checkpointing', True)}, "
    f"or choose {suggest('precision', 'bf16')} or {suggest('precision', 'fp16')}"
)
_SUM = MergeSettings(method="sum")


class ZipLoraLayer(nn.Module):
    """A Linear or convolution with deltas on top, each with a coefficient for every input (channel).

    Attributes:
        base: The layer; its weights are not trained.
        coefficients: (in,) for each delta, float32, trained.
        applied_alone: Index of the one delta that is applied, without its coefficients; None for all with theirs.
    """

    def __init__(self, base: Adaptable, deltas: Mapping[int, Delta]) -> None:
        """Put deltas on a layer.

        Args:
            base: Linear or Conv2d.
            deltas: Index of the adapter → what it adds, its strength included.
        """
        super().__init__()
        weight = base.weight
        self.base = base
        self.applied_alone: int | None = None
        self._factors = {
            index: _as_kernels(delta, weight.shape, weight.device, weight.dtype) for index, delta in deltas.items()
        }
        self.coefficients = nn.ParameterDict(
            {str(index): nn.Parameter(torch.ones(weight.shape[1], device=weight.device)) for index in deltas}
        )

    def forward(self, inputs: Tensor, *args: object) -> Tensor:
        """The layer's output for inputs (batch, tokens, in) or (batch, in, height, width)."""
        output: Tensor = self.base(inputs)
        for index, kernels in self._factors.items():
            if self.applied_alone is None:
                coefficients = self.coefficients[str(index)].to(inputs.dtype)
                if not isinstance(self.base, nn.Linear):
                    coefficients = coefficients[:, None, None]
                output = output + self._delta_output(inputs * coefficients, kernels)
            elif self.applied_alone == index:
                output = output + self._delta_output(inputs, kernels)
        return output

    def _delta_output(self, inputs: Tensor, kernels: Sequence[Tensor]) -> Tensor:
        if isinstance(self.base, nn.Linear):
            for kernel in kernels:
                inputs = nn.functional.linear(inputs, kernel)
            return inputs
        first, *others = kernels
        base = self.base
        outputs = nn.functional.conv2d(inputs, first, None, base.stride, base.padding, base.dilation, base.groups)
        for kernel in others:
            outputs = nn.functional.conv2d(outputs, kernel)
        return outputs

    def overlap(self) -> Tensor:
        """Mean over inputs of |mᵢ · mⱼ|, summed over pairs of deltas; 0-D."""
        pairs = itertools.combinations(self.coefficients.values(), 2)
        overlaps = [(first * second).abs().mean() for first, second in pairs]
        return torch.stack(overlaps).sum() if overlaps else torch.zeros((), device=self.base.weight.device)


def _as_kernels(delta: Delta, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The factors of a delta as weights of layers one after the other."""
    up = as_ordinary(delta.up.to(device, dtype))
    if delta.down is None:
        return [up.reshape(shape)]
    down = as_ordinary(delta.down.to(device, dtype))
    return [down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *[1] * (len(shape) - 2))]


def learned_merge(
    base: BaseWeights,
    subject: WeightedAdapter,
    style: WeightedAdapter,
    settings: LearnedMergeSettings,
    device: torch.device,
    listener: Listener,
) -> MergeResult:
    """Merge a subject and a style adapter.

    Args:
        base: The base model of both; its tensors are borrowed and never written to.
        subject: The subject's adapter.
        style: The style's adapter.
        settings: Prompts and training.
        device: Where to train.
        listener: Gets the progress; may stop the work.

    Raises:
        AdapterError: The adapters don't fit the base or each other, or have no UNet layers in common.
        CancelledError: The listener asked to stop.
        DivergedError: The loss became NaN or infinite.
        OutOfMemoryError: Out of memory; the remedy names the settings to lower.
    """
    with accelerate_state_kept(), explained_memory_errors(_MEMORY_REMEDY):
        try:
            return _ZipLoraTrainer(base, [subject, style], settings, device, listener).run()
        finally:
            release(device)


@dataclass(frozen=True)
class _PromptEmbeddings:
    """The conditioning of one adapter's prompts, a row each.

    Attributes:
        alone: From text encoders with this adapter alone.
        empty: Likewise, of the empty prompt, repeated.
        merged: From text encoders with all adapters.
    """

    alone: Conditioning
    empty: Conditioning
    merged: Conditioning


def _row(conditioning: Conditioning, row: int) -> Conditioning:
    return {name: rows[row : row + 1] for name, rows in conditioning.items()}


class _ZipLoraTrainer:
    """One learned merge: generate latents, train coefficients, merge."""

    def __init__(
        self,
        base: BaseWeights,
        adapters: Sequence[WeightedAdapter],
        settings: LearnedMergeSettings,
        device: torch.device,
        listener: Listener,
    ) -> None:
        self.base = base
        self.adapters, _ = with_common_names(adapters)
        self.settings = settings
        self.device = device
        self.listener = listener
        self.precision = pick_precision(settings.precision, device)
        self.prompts = [split_prompts(settings.subject_prompt), split_prompts(settings.style_prompt)]
        self.weights: dict[str, Tensor] = {}
        self.layers: dict[str, ZipLoraLayer] = {}

    def run(self) -> MergeResult:
        """Encode the prompts, put the deltas in, generate latents with each adapter, train the coefficients, merge."""
        reset_peak_memory(self.device)
        model = self.base.family.build(self.base)
        self.weights = named_weights(model)
        require_layers_fit(self.adapters, self.weights)
        embeddings = self._encode_all_prompts()
        model.text_encoders.clear()
        side = self.settings.resolution
        latents_shape = self.base.family.latents.shape(model.vae, side, side)
        del model.vae
        to_device(model.denoiser, self.device, DTYPES[self.precision])
        self.layers = self._insert_layers(model)
        latents = self._generate_latents(model, embeddings, latents_shape)
        self._train(model, embeddings, latents)
        columns = {
            name: [coefficients.detach().cpu() for coefficients in layer.coefficients.values()]
            for name, layer in self.layers.items()
        }
        return merge(self.adapters, _SUM, weights=self.weights, listener=self.listener, columns=columns)

    def _encode_all_prompts(self) -> list[_PromptEmbeddings]:
        """The embeddings of each adapter's prompts."""
        merged_model = self._model_with_text_adapters(self.adapters)
        embeddings = []
        for weighted, prompts in zip(self.adapters, self.prompts, strict=True):
            model = self._model_with_text_adapters([weighted])
            empty = self._encode(model, [""])
            embeddings.append(
                _PromptEmbeddings(
                    alone=self._encode(model, prompts),
                    empty={name: rows.expand(len(prompts), *rows.shape[1:]) for name, rows in empty.items()},
                    merged=self._encode(merged_model, prompts),
                )
            )
        return embeddings

    def _model_with_text_adapters(self, adapters: Sequence[WeightedAdapter]) -> DiffusionModel:
        """A model with the adapters in its text encoders, which are in float32."""
        scaled = []
        for weighted in adapters:
            text_part = self._text_part(weighted)
            if text_part.adapter.layers or text_part.adapter.vectors:
                scaled.append((merge([text_part], _SUM, self.weights).adapter, 1.0))
        model = self.base.family.build(apply_to_base(self.base, scaled))
        for weighted in adapters:
            learn_bundled(model, weighted.adapter.embeddings)
        for encoder in model.text_encoders.values():
            to_device(encoder, self.device, model.text_dtype)
        return model

    def _text_part(self, weighted: WeightedAdapter) -> WeightedAdapter:
        """What of an adapter takes part when prompts are encoded; perhaps nothing."""
        adapter = weighted.adapter
        layers = {name: layer for name, layer in adapter.layers.items() if self._reads_prompts(name)}
        vectors = {key: vector for key, vector in adapter.vectors.items() if self._reads_prompts(key)}
        paths = [str(module_path(name)) for name in layers]
        blocks = [block for block in weighted.blocks if any(block.pattern.search(path) for path in paths)]
        return replace(weighted, adapter=Adapter(layers, adapter.metadata, vectors), blocks=blocks)

    def _reads_prompts(self, name: str) -> bool:
        """Whether a module, by its kohya name or a key that begins with it, does its work when prompts are encoded."""
        early = self.base.family.prompt_modules
        return component_of(name) != UNET or bool(early and re.match(early, module_path(name).path))

    @torch.no_grad()
    def _encode(self, model: DiffusionModel, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of prompts from a model's text encoders, on the device."""
        embeddings = {name: rows.to(self.device) for name, rows in model.encode_prompts(prompts).items()}
        side = float(self.settings.resolution)
        size = torch.tensor([[side, side, 0, 0, side, side]], device=self.device)
        return embeddings | {"size": size.expand(len(prompts), -1)}

    def _insert_layers(self, model: DiffusionModel) -> dict[str, ZipLoraLayer]:
        """Replace the UNet's layers that an adapter changes; their names in the file → the new ones."""
        modules = modules_by_name(model)
        paths = {id(module): path for path, module in model.denoiser.named_modules()}
        names = {
            name for weighted in self.adapters for name in weighted.adapter.layers if not self._reads_prompts(name)
        }
        layers = {}
        for name in sorted(names):
            module = modules[name]
            weight = self.weights[name]
            deltas = {
                index: to_delta(weighted.adapter.layers[name], weight.shape, weight).times(
                    weighted.module_strength(name)
                )
                for index, weighted in enumerate(self.adapters)
                if name in weighted.adapter.layers
            }
            layers[name] = ZipLoraLayer(module, deltas)
            parent, _, child = paths[id(module)].rpartition(".")
            setattr(model.denoiser.get_submodule(parent), child, layers[name])
        if not any(len(layer.coefficients) > 1 for layer in layers.values()):
            raise AdapterError(
                "The adapters have no UNet layers in common, so there is nothing to learn.",
                f"Merge them with {suggest('method', 'sum')} instead.",
            )
        return layers

    def _apply_alone(self, index: int | None) -> None:
        """Let one adapter alone act, or all with their coefficients."""
        for layer in self.layers.values():
            layer.applied_alone = index

    def _generate_latents(
        self, model: DiffusionModel, embeddings: Sequence[_PromptEmbeddings], shape: tuple[int, int, int]
    ) -> list[Tensor]:
        """Latents of that shape from each adapter alone, on its prompts in turn: (pictures, *shape) each."""
        settings = self.settings
        config = GenerationConfig(
            width=settings.resolution,
            height=settings.resolution,
            steps=settings.sampling_steps,
            guidance=settings.guidance,
        )
        total = len(embeddings) * settings.pictures
        by_adapter = []
        for index, adapter_embeddings in enumerate(embeddings):
            self._apply_alone(index)
            latents = []
            for number in range(settings.pictures):
                self.listener.report(Phase("generating", index * settings.pictures + number, total))
                stop_if_asked(self.listener)
                row = number % len(self.prompts[index])
                latents.append(
                    denoise(
                        model,
                        starting_noise([settings.seed + number], shape),
                        prompt=_row(adapter_embeddings.alone, row),
                        negative=_row(adapter_embeddings.empty, row),
                        config=config,
                        listener=self.listener,
                    )
                )
            by_adapter.append(torch.cat(latents))
        self.listener.report(Phase("generating", total, total))
        return by_adapter

    def _train(self, model: DiffusionModel, embeddings: Sequence[_PromptEmbeddings], latents: Sequence[Tensor]) -> None:
        settings = self.settings
        if settings.gradient_checkpointing:
            enable_gradient_checkpointing(model.denoiser)
        coefficients = [parameter for layer in self.layers.values() for parameter in layer.coefficients.values()]
        accelerator = make_accelerator(self.device, self.precision, 1)
        model.objective = model.objective.to(self.device)
        optimizer = torch.optim.AdamW(coefficients, lr=settings.learning_rate, weight_decay=0.0)
        model.denoiser, optimizer = accelerator.prepare(model.denoiser.train(), optimizer)
        throughput = Throughput(settings.steps, 0, self.device)
        for step in range(settings.steps):
            losses = [
                self._loss(model, index, step, embeddings[index], latents[index]) for index in range(len(self.adapters))
            ]
            overlap = torch.stack([layer.overlap() for layer in self.layers.values()]).mean()
            loss = torch.stack(losses).sum() + settings.overlap_weight * overlap
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = float(loss.detach())
            if not torch.isfinite(loss):
                raise DivergedError(
                    f"The loss became {value} at step {step + 1}.",
                    f"Lower {suggest('learning_rate')}, or choose {suggest('precision', 'fp32')}.",
                )
            self.listener.report(throughput.event(step + 1, value, settings.learning_rate))
            if self.listener.should_stop():
                raise CancelledError(step + 1, settings.steps)
        accelerator.free_memory()

    def _loss(
        self, model: DiffusionModel, index: int, step: int, embeddings: _PromptEmbeddings, latents: Tensor
    ) -> Tensor:
        """How far the merged prediction is from that of one adapter alone, on one of its own latents, 0-D."""
        source = generator(self.settings.seed, "zip", index, step)
        row = int(torch.randint(len(latents), (), generator=source))
        first, end = self._timestep_range(index, model.objective.timesteps)
        timesteps = torch.randint(first, end, (1,), generator=source).to(self.device)
        noise = torch.randn(latents[:1].shape, generator=source).to(self.device)
        noisy = model.objective.add_noise(latents[row : row + 1], noise, timesteps).to(DTYPES[self.precision])
        prompt = row % len(self.prompts[index])
        self._apply_alone(index)
        with torch.no_grad():
            target = model.predict(noisy, timesteps, _row(embeddings.alone, prompt)).float()
        self._apply_alone(None)
        prediction = model.predict(noisy, timesteps, _row(embeddings.merged, prompt)).float()
        return nn.functional.mse_loss(prediction, target)

    def _timestep_range(self, index: int, timesteps: int) -> tuple[int, int]:
        """The first timestep, and the end of those, at which an adapter's predictions are matched."""
        split = round(self.settings.split * timesteps)
        if not split:
            return 0, timesteps
        return (split, timesteps) if index == 0 else (0, split)
