"""Model families: the interface between the recipe and the models it trains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...core.errors import TrainerError, UnsupportedModelError, WeightsError
from ..latents import LatentFormat
from ..objective import Objective
from ..stored_weights import PackedWeight

_INCOMPLETE = "Use a complete, unchanged checkpoint of this family; if it was downloaded, download it again."

CHOSEN = "your setting prediction_type"  # `Prediction.source` where the user chose the type

Conditioning = dict[str, Tensor]
"""Inputs of a denoiser beside latents and timesteps: named tensors, batch first."""


def joined_rows(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of several conditionings, concatenated, on the device of the first.

    Conditionings padded to their own longest prompt are padded to the longest of all: embeddings with zeros,
    tokens with -1, as `encode_prompts` and `tokenize` do.
    """
    joined = {}
    for name, first in parts[0].items():
        rows = [part[name].to(first.device) for part in parts]
        if first.ndim > 1:
            longest = max(tensor.shape[1] for tensor in rows)
            value = -1 if name.startswith("ids") else 0
            rows = [
                torch.nn.functional.pad(
                    tensor, (0, 0) * (tensor.ndim - 2) + (0, longest - tensor.shape[1]), value=value
                )
                for tensor in rows
            ]
        joined[name] = torch.cat(rows)
    return joined


@dataclass(frozen=True)
class Component:
    """Tensors of one network by the names of diffusers or transformers, and their configuration.

    Attributes:
        tensors: Name → tensor; may be borrowed, memory-mapped or on any device. Never written to.
        config: Keyword arguments for the network's class.
        file_names: Name → the tensor's name in the file it came from, where that differs; for messages.
        scales: Name of a weight in float8 → what it is multiplied with, ().
        packed: Name of a weight in a host's own format → the weight; in `tensors` it is on the meta device.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    file_names: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)


@dataclass(frozen=True)
class TextEncoderSpec:
    """One text encoder of a family: where its weights are found, and which of its outputs the denoiser reads.

    Attributes:
        name: The component's name and folder in diffusers, "text_encoder" or "text_encoder_2".
        short_name: Its usual short name: "clip_l", "clip_h", "clip_g" or "qwen3".
        file_prefixes: The prefixes of its tensors' names in a single file, the usual one first.
        adapter_prefix: The prefix of its modules' names in a kohya file.
        hidden_act: Activation of its MLPs.
        pads_with_end: Whether prompts are padded with the end token; else with token 0.
        layer: Which hidden state is read, counted from the end: 1 is the last, 2 the one before it. Of a language
            model the last one that is read, counted from the start.
        normed: Whether the final layer norm is applied to that hidden state.
        pooled: Whether the projected embedding of the end token is read as well.
        unused_layers: Number of layers at the end that an original file holds and no model reads; they are left out.
        published_layers: Number of layers of the published encoder, with the unused ones; 0 where none is unused.
        is_language_model: Whether it is a large language model in place of a CLIP.
        max_tokens: The number of tokens that prompts are padded to; 0: as in the network's configuration.
        reads_padding: Whether the denoiser attends to a prompt's padding; else it gets each prompt's length.
        target_tokenizer: Folder in diffusers' layout of another tokenizer, whose tokens are read beside the hidden
            states; "": none is.
        unread_tokens: Number of tokens before a prompt, with the published tokenizer, that are encoded but not used.
    """

    name: str
    short_name: str
    file_prefixes: tuple[str, ...]
    adapter_prefix: str
    hidden_act: str
    pads_with_end: bool
    layer: int
    normed: bool
    pooled: bool = False
    unused_layers: int = 0
    published_layers: int = 0
    is_language_model: bool = False
    max_tokens: int = 0
    reads_padding: bool = True
    unread_tokens: int = 0
    target_tokenizer: str = ""

    @property
    def number(self) -> str:
        """Suffix of the names that belong to it: "" or "_2"."""
        return self.name.removeprefix("text_encoder")

    @property
    def tokenizer(self) -> str:
        """Folder of its tokenizer in diffusers' layout."""
        return f"tokenizer{self.number}"


def token_ids_key(text_encoder: str) -> str:
    """The name of a text encoder's token ids in a conditioning: "text_encoder_2" → "ids_2"."""
    return f"ids{text_encoder.removeprefix('text_encoder')}"


@dataclass(frozen=True)
class LearnedWord:
    """A word with its own vectors instead of its tokens' embeddings: textual inversion (Gal et al. 2022).

    Attributes:
        word: As in prompts; may be several tokens, or several words.
        vectors: Text encoder's component → the word's input embeddings, (vectors, width), on any device.
    """

    word: str
    vectors: Mapping[str, Tensor]


@dataclass(frozen=True)
class AdapterMarks:
    """What shows that an adapter file was made for a family.

    Attributes:
        context_width: Width of the text embeddings that the published denoisers attend to, which is the input width of
            `attn2.to_k`; 0 where no module shows it.
        module_names: Regular expression that matches names of modules that no other family has; "" if there are none.
        architecture: What `modelspec.architecture` contains, whatever the version.
        base_version: What `ss_base_model_version` contains, whatever the version.
        shared_names: Names of modules in its files that other families also have.
    """

    context_width: int
    module_names: str
    architecture: str
    base_version: str
    shared_names: Collection[str] = ()


@dataclass(frozen=True)
class Prediction:
    """What a denoiser predicts, on which noise schedule.

    Attributes:
        type: "epsilon" or "v_prediction", as diffusers names them, or "flow".
        zero_terminal_snr: Whether the schedule is rescaled so that the last timestep is pure noise.
        source: How it is known, for messages, such as "the scheduler's configuration"; `CHOSEN` if by the user.
    """

    type: str = "epsilon"
    zero_terminal_snr: bool = False
    source: str = "the family"


class PromptEncoder(Protocol):
    """Text encoders that a host has loaded, in a family whose text encoders are not trained.

    Attributes:
        fingerprint: Hexadecimal digest of their weights.
    """

    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts: named tensors as from `DiffusionModel.encode_prompts`, on the CPU."""

    def overlong(self, prompt: str) -> bool:
        """Whether the prompt would be truncated."""


@dataclass(frozen=True)
class BaseWeights:
    """A base model, opened but not built.

    Attributes:
        family: The family it belongs to.
        denoiser: The UNet or transformer.
        vae: The autoencoder.
        text_encoders: Text encoders in the family's order.
        tokenizers: Hugging Face tokenizers, one for each text encoder; then the additional one, if there is one.
        scheduler: The noise schedule's configuration as diffusers writes it; empty where unknown.
        prediction: What the denoiser predicts.
        clip_skip: The text encoder layer that is used, counted from the end; 0: the family's default.
        title: Display name, e.g. the file's.
        fingerprint: Hexadecimal digest of the weights.
        words: Learned words of adapters that were added to it.
        prompt_encoder: Encodes prompts in the host; then there are no text encoders here.
        is_distilled: Whether the model declares few-step distillation, which training would undo; None: not stated.
    """

    family: Family
    denoiser: Component
    vae: Component
    text_encoders: Sequence[Component]
    tokenizers: Sequence[Any]
    scheduler: Mapping[str, Any]
    prediction: Prediction
    clip_skip: int
    title: str
    fingerprint: str
    words: Sequence[LearnedWord] = ()
    prompt_encoder: PromptEncoder | None = None
    is_distilled: bool | None = None


class DiffusionModel(Protocol):
    """A built model: networks that may share storage with a host's, and what is known about them.

    Conditioning has these names, "_2" being the second text encoder: "ids", "ids_2" (tokens, int64), "text", "text_2"
    (hidden states), "lengths" (tokens of each prompt, int64, where its padding is not used), "pooled_2"
    (projected embedding), and "size" (original height and width, top and left of the crop, target height and width, in
    pixels). Where a host encodes the prompts, there are no tokens, and no text encoders. Behind a language model's
    tokens stand -1; where another tokenizer's are read beside them, -2 and these come before.

    Attributes:
        family: Its family.
        denoiser: The network that predicts, of diffusers.
        vae: The autoencoder, a diffusers `AutoencoderKL`.
        text_encoders: Component name ("text_encoder") → text encoder.
        objective: Noise schedule and prediction type.
        words: The learned words.
        text_dtype: The type in which its text encoders encode: float32, or that of a language model's weights.
    """

    family: Family
    denoiser: Any
    vae: Any
    text_encoders: dict[str, nn.Module]
    objective: Objective
    words: Sequence[LearnedWord]
    text_dtype: torch.dtype

    def learn(self, words: Sequence[LearnedWord]) -> None:
        """Set the learned words: from now on these words, and no others, are encoded as their vectors.

        Their tokens in a prompt become one token per vector, numbered from -1 downwards. The vectors are read whenever
        tokens are encoded, and get gradients.
        """

    def tokenize(self, prompts: Sequence[str]) -> Conditioning:
        """Tokens of the prompts for every text encoder, truncated or padded: (prompts, tokens) each, on the CPU."""

    def max_tokens(self, encoder: str) -> int:
        """The maximum number of tokens of a text encoder, given by its component's name."""

    def token_embeddings(self, encoder: str, text: str) -> Tensor:
        """Input embeddings of a text's own tokens in a text encoder, given by its component's name: (tokens, width)."""

    def encode_tokens(self, encoder: str, ids: Tensor) -> Conditioning:
        """Embeddings of tokens by one text encoder, given by its component's name; on the encoder's device."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with all text encoders, or by the host's; every tensor has one row for each prompt."""

    def zero_conditioning(self) -> Conditioning:
        """Zeros in place of one prompt's encoding, where its shapes are known without encoding; else nothing."""

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the denoiser: latents (batch, channels, height, width), timesteps (batch,) → same shape as latents."""

    def overlong(self, prompt: str) -> bool:
        """Whether a text encoder would truncate the prompt."""

    def facts(self) -> dict[str, Any]:
        """Everything except the tensors that affects what the networks compute, for a fingerprint: JSON values."""


class Layout(Protocol):
    """How the networks of a type of model are laid out: in the original code's files, in a host, and in diffusers.

    Methods do not copy tensors, except where their docstrings say so.

    Attributes:
        folder: The denoiser's folder in diffusers' layout, also the prefix of names in its adapter files.
        network_class: The denoiser's class in diffusers.
        block_names: The prefixes of the original code's names of modules in blocks.
        block_paths: The prefixes of the network's paths of modules in blocks.
    """

    @property
    def folder(self) -> str: ...  # noqa: D102
    @property
    def network_class(self) -> str: ...  # noqa: D102
    @property
    def block_names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def block_paths(self) -> Sequence[str]: ...  # noqa: D102

    def holds(self, denoiser: Mapping[str, Tensor]) -> bool:
        """Whether tensors (original names without prefix) are those of such a denoiser."""

    def denoiser_config(self, denoiser: Mapping[str, Tensor]) -> dict[str, Any]:
        """The denoiser's configuration with diffusers' keys, by the shapes of its tensors.

        Raises:
            WeightsError: Tensors are missing.
        """

    def context_width(self, config: Mapping[str, Any]) -> int:
        """Width of a denoiser's text input for each token of a prompt, by its configuration."""

    def denoiser(self, denoiser: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
        """The denoiser by the network's names, from original names without prefix.

        Raises:
            WeightsError: A tensor is unknown.
        """

    def denoiser_of_folder(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Component:
        """The denoiser by the network's names, from diffusers' names; tensors that it joins are copies."""

    def tensors_of_folder(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the denoiser by diffusers' names, from the network's; those that it splits are copies."""

    def vae(self, tensors: Mapping[str, Tensor], scaling_factor: float) -> Component:
        """The autoencoder, from original names without prefix or from diffusers'.

        Raises:
            WeightsError: It is not one of this type.
        """

    def text_encoder(
        self, tensors: Mapping[str, Tensor], spec: TextEncoderSpec, config: Mapping[str, Any] | None = None
    ) -> Component:
        """A text encoder, with its configuration where that is known.

        Raises:
            WeightsError: It is not one of this type, or a tensor is missing.
        """

    def original_names(self, paths: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
        """The original code's name of every module of a denoiser of a configuration, by its path in the network."""

    def published_name(self, path: str, depths: Sequence[int]) -> str | None:
        """The original code's name of a module of the published models; `depths` as `Family.transformer_depths`."""

    def is_published(self, path: str, depths: Sequence[int]) -> bool:
        """Whether the published models have a module of that path in a block; see `published_name`."""


class Family(Protocol):
    """A family of models: what is true of all of its members.

    Attributes:
        name: Short name, as its presets' files are called: "sd1".
        title: Display name.
        short_title: Display name in messages about adapters: "SD 1".
        layout: How its networks are laid out.
        targets: Preset name → regular expression of the denoiser's modules that get an adapter.
        text_targets: Preset name → regular expression of the text encoders' modules, if they are trained.
        scaling_factor: Factor of the autoencoder's latents; 1 where another format decides.
        latents: How the denoiser's latents are computed from the autoencoder's.
        text_encoders: Its text encoders.
        adapter_marks: What shows that an adapter file was made for it.
        original_names: Whether adapter files name the denoiser's modules as the original code does.
        transformer_depths: For each level of the published denoisers, on the way down, the number of transformer blocks
            in its attention layers; 0 without attention. The original code's names depend on it. Of a transformer, the
            largest number of its blocks of each kind.
        kohya_v2: Value of `ss_v2`.
        trains_fully: Whether all weights can be trained and written as a checkpoint.
        prompt_modules: Regular expression that matches the beginnings of paths of the denoiser's modules that run when
            prompts are encoded, before the first step, so that they can't be trained; "": there are none.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def short_title(self) -> str: ...  # noqa: D102
    @property
    def layout(self) -> Layout: ...  # noqa: D102
    @property
    def targets(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def text_targets(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def scaling_factor(self) -> float: ...  # noqa: D102
    @property
    def latents(self) -> LatentFormat: ...  # noqa: D102
    @property
    def text_encoders(self) -> Sequence[TextEncoderSpec]: ...  # noqa: D102
    @property
    def adapter_marks(self) -> AdapterMarks: ...  # noqa: D102
    @property
    def original_names(self) -> bool: ...  # noqa: D102
    @property
    def transformer_depths(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def kohya_v2(self) -> bool: ...  # noqa: D102
    @property
    def trains_fully(self) -> bool: ...  # noqa: D102
    @property
    def prompt_modules(self) -> str: ...  # noqa: D102

    def architecture(self, prediction: Prediction) -> str:
        """Value of `modelspec.architecture` without the `/lora`."""

    def base_version(self, prediction: Prediction) -> str:
        """Value of `ss_base_model_version`."""

    def claims(self, denoiser_config: Mapping[str, Any]) -> bool:
        """Whether a denoiser of this configuration (diffusers' keys) belongs to the family."""

    def complete(self, denoiser_config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration inferred from shapes, completed by what shapes don't show."""

    def detect(self, denoiser: Mapping[str, Tensor]) -> Prediction:
        """What a denoiser (original names without prefix) predicts, by its weights alone."""

    def base_of_distilled(self, title: str) -> str | None:
        """The base of a distilled model, which training would break, by the model's name; None if it is not one."""

    def build(self, weights: BaseWeights) -> DiffusionModel:
        """Build the networks around the tensors, without a copy.

        Raises:
            WeightsError: A tensor is missing, unknown or of another shape.
        """


def newer_class(name: str, *, model: str, pipeline: str, version: str) -> Any:
    """A diffusers class that some supported versions of diffusers lack.

    Args:
        name: Of the class.
        model: For the message.
        pipeline: Name of the model's pipeline, to detect the version.
        version: Of diffusers that has it.

    Raises:
        UnsupportedModelError: The installed diffusers is older.
    """
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None or getattr(diffusers, pipeline, None) is None:
        raise UnsupportedModelError(
            f"{model} needs diffusers {version} or newer; {diffusers.__version__} is installed.", "Update diffusers."
        )
    return found


def required(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of that name.

    Raises:
        WeightsError: There is none.
    """
    if name not in tensors:
        raise WeightsError(f"The base model lacks the tensor {name}.", _INCOMPLETE)
    return tensors[name]


def count_blocks(tensors: Mapping[str, Tensor], blocks: str) -> int:
    """The number of blocks of a type, "<blocks>.<number>.", in the tensors."""
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{blocks}.")})


def on_meta(make: Callable[..., nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """Build a network without memory for its weights.

    Raises:
        WeightsError: No such network can be built.
    """
    try:
        with torch.device("meta"):
            return make(**config)
    except TrainerError:
        raise
    except Exception as error:  # the libraries raise anything for numbers that make no network
        raise WeightsError(
            f"No network can be built with the base model's tensor shapes: {error}.", _INCOMPLETE
        ) from error


def build_around(network: nn.Module, component: Component) -> nn.Module:
    """Put a component's tensors into a network built on the meta device; the network shares their storage.

    Args:
        network: Built under `torch.device("meta")`.
        component: Every parameter and persistent buffer of the network, and nothing else. The network gets its own
            tensors over the same storage, so that moving or casting it later leaves the given tensors alone.

    Raises:
        WeightsError: A tensor is missing, unknown, or of another shape than the network's.
    """
    expected = network.state_dict()
    class_name = type(network).__name__
    for name in component.tensors:
        if name not in expected:
            file_name = component.file_names.get(name, name)
            raise WeightsError(f"The base model's {class_name} has an unknown tensor: {file_name}.", _INCOMPLETE)
    borrowed = {}
    for name, meta in expected.items():
        tensor = component.tensors.get(name)
        if tensor is None:
            raise WeightsError(f"The base model's {class_name} lacks the tensor {name}.", _INCOMPLETE)
        if tensor.shape != meta.shape:
            file_name = component.file_names.get(name, name)
            shapes = f"{tuple(tensor.shape)} instead of {tuple(meta.shape)}"
            raise WeightsError(
                f"The base model's {class_name} has a tensor of the wrong shape: {file_name} is {shapes}.", _INCOMPLETE
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
    """A tensor over the same storage that autograd accepts, even if `tensor` was made in inference mode."""
    if not tensor.is_inference():
        return tensor.detach()
    ordinary = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    with torch.no_grad():
        ordinary.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return ordinary
