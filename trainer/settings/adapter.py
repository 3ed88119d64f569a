"""The settings of what is trained: kind of adapter, layers, ranks, text encoders."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from ..core.errors import suggest
from .base import Needs, Settings, TidyPath, setting

_PIVOTAL = "Pivotal tuning"
AdapterKind = Literal["lora", "dora", "loha", "lokr", "oft", "boft", "full"]
ROTATIONS = ("oft", "boft")
_ONLY_FOR_ADAPTERS = (
    "include",
    "exclude",
    "block_ranks",
    "max_norm",
    "start_from",
    "dropout",
    "rank_stabilized",
    "base_quantization",
    "token_vectors",
)
_ONLY_FOR_LORA = ("rank_schedule", "lora_init")


@dataclass(frozen=True)
class BlockRank:
    """The rank of the modules whose names match a pattern.

    Attributes:
        pattern: Searched for in the module's name.
        rank: 0: no adapter.
        alpha: None: equal to the rank.
    """

    pattern: re.Pattern[str]
    rank: int
    alpha: float | None


class AdapterSettings(Settings):
    """What is trained."""

    adapter: AdapterKind = setting(
        "lora",
        "Kind of adapter to train. lora: low-rank matrices, the usual choice (LoCon with targets 'all'). dora: LoRA "
        "with separately trained magnitudes; closer to full fine-tuning, slower. loha: Hadamard product of two "
        "low-rank matrices. lokr: Kronecker product, the smallest file. oft: rotates each layer's outputs in blocks. "
        "boft: the same with overlapping (butterfly) blocks. full: no adapter; all weights are trained (Stable "
        "Diffusion 1.x only) and saved as a checkpoint, with a LoRA extracted from it.",
        group="Adapter",
    )
    rank: int = setting(
        16,
        "Rank of the adapter, which sets its capacity and file size. 4 to 32 are typical for one subject. For oft "
        "and boft it is the maximum block size: each layer uses the largest block that divides its outputs evenly.",
        group="Adapter",
        ge=1,
        le=1024,
    )
    alpha: float | None = setting(
        None,
        "LoRA alpha: the adapter's output is scaled by alpha / rank. If unset, it equals the rank.",
        group="Adapter",
        gt=0.0,
    )
    rank_stabilized: bool = setting(
        False,
        "rsLoRA: scale by alpha / √rank instead of alpha / rank. Worth trying at ranks of 64 and above.",
        group="Adapter",
        advanced=True,
    )
    targets: Literal["attention", "attention-mlp", "all", "b-lora-content", "b-lora-style", "none"] = setting(
        "attention-mlp",
        "Which layers of the model get an adapter. attention: the attention projections (diffusers' choice). "
        "attention-mlp: every linear layer and 1×1 convolution in the attention blocks (kohya's choice). all: also "
        "the residual blocks and resamplers (LoCon). b-lora-content, b-lora-style: a single SDXL block each "
        "(B-LoRA). none: only the layers named in 'include'.",
        group="Adapter",
    )
    conv_rank: int = setting(
        0,
        "Rank of 3×3 convolutions (kohya's conv_dim), which targets 'all' includes. 0: same as rank.",
        group="Adapter",
        advanced=True,
        ge=0,
        le=1024,
    )
    conv_alpha: float | None = setting(
        None,
        "Alpha of 3×3 convolutions (kohya's conv_alpha). If unset, it equals their rank.",
        group="Adapter",
        advanced=True,
        gt=0.0,
    )
    include: str = setting(
        "",
        "Additional layers to train: regular expressions, separated by spaces, that match anywhere in diffusers' "
        r"layer names, such as ^conv_in$ or mid_block\..*to_v.",
        group="Adapter",
        advanced=True,
    )
    exclude: str = setting(
        "",
        r"Layers to leave out: regular expressions, separated by spaces, such as down_blocks\.0 or ff\.net.",
        group="Adapter",
        advanced=True,
    )
    block_ranks: str = setting(
        "",
        "Different ranks for parts of the model: PATTERN=RANK or PATTERN=RANK:ALPHA, separated by spaces, such as "
        r"down_blocks=4 mid_block=32:16 ff\.net=8. The last match wins; rank 0 leaves those layers without an adapter.",
        group="Adapter",
        advanced=True,
    )
    lokr_factor: int = setting(
        -1,
        "Size of the smaller factor in LoKr's Kronecker product. -1: split as evenly as possible, which gives the "
        "smallest file.",
        group="Adapter",
        advanced=True,
        ge=-1,
        le=256,
    )
    dropout: float = setting(
        0.0,
        "Fraction of the adapter's inputs dropped at each step, against overfitting. 0.1 to 0.3 are typical; 0: off.",
        group="Adapter",
        advanced=True,
        step=0.01,
        ge=0.0,
        lt=1.0,
    )
    max_norm: float = setting(
        0.0,
        "Maximum norm of each layer's weight change (kohya's scale_weight_norms); for oft and boft, of each "
        "rotation's generator Q. Stops single layers from growing out of proportion. 1 is typical; 0: no limit.",
        group="Adapter",
        advanced=True,
        ge=0.0,
    )
    start_from: TidyPath | None = setting(
        None,
        "Adapter file to continue training from. Its kind, layers, ranks and alphas are kept.",
        group="Adapter",
        advanced=True,
        path=True,
    )
    combine: bool = setting(
        False,
        "Two-stage training: save one standalone file that includes the adapters applied to the base model. Off: the "
        "file holds only what was newly learned and is loaded together with them.",
        group="Adapter",
        advanced=True,
        affects_result=False,
    )
    rank_schedule: Literal["constant", "timestep"] = setting(
        "constant",
        "How many of a LoRA's rank components are active at each timestep. constant: all of them. timestep: fewer at "
        "high noise (T-LoRA), since noisy timesteps overfit first; for a subject with only one or a few pictures. "
        "Previews and saved files use all components at every timestep.",
        group="Adapter",
        advanced=True,
        neutral=("constant",),
    )
    min_rank: int = setting(
        0,
        "T-LoRA: number of rank components active at the noisiest timestep. 0: half of each layer's rank, as in the "
        "paper.",
        group="Adapter",
        advanced=True,
        ge=0,
        le=1024,
        needs=Needs("rank_schedule", ("timestep",)),
        neutral=(),
    )
    rank_power: float = setting(
        1.0,
        "T-LoRA: exponent of the rank schedule. 1: the rank grows evenly as the noise falls; above 1: later; below "
        "1: sooner.",
        group="Adapter",
        advanced=True,
        gt=0.0,
        le=10.0,
        needs=Needs("rank_schedule", ("timestep",)),
        neutral=(),
    )
    lora_init: Literal["default", "orthogonal"] = setting(
        "default",
        "How LoRA weights are initialised. default: one factor random, the other zero. orthogonal: orthonormal "
        "components whose initial product is subtracted (Ortho-LoRA, made for T-LoRA); the saved file has twice the "
        "rank.",
        group="Adapter",
        advanced=True,
        neutral=("default",),
    )
    base_quantization: Literal["none", "nf4"] = setting(
        "none",
        "Quantise the linear layers of the frozen UNet or transformer. nf4: 4 bits (QLoRA, needs bitsandbytes); "
        "saves memory on small cards, but is slower and changes the result slightly. The adapter itself is an "
        "ordinary one.",
        group="Memory",
        advanced=True,
    )
    text_encoder_lr: float = setting(
        0.0,
        "Learning rate of the text encoder (of SDXL's first one, CLIP-L). Training it helps with faces and unusual "
        "words. 5e-6 to 5e-5 are typical; 0: not trained.",
        group="Text encoders",
        step=0.000001,
        ge=0.0,
        le=1.0,
    )
    text_encoder_2_lr: float = setting(
        0.0,
        "Learning rate of SDXL's second text encoder, CLIP-G. 0: not trained.",
        group="Text encoders",
        advanced=True,
        step=0.000001,
        ge=0.0,
        le=1.0,
    )
    text_encoder_until: float = setting(
        1.0,
        "Fraction of the steps after which the text encoders are frozen and removed from GPU memory. 1: trained to "
        "the end.",
        group="Text encoders",
        advanced=True,
        step=0.05,
        gt=0.0,
        le=1.0,
    )

    token_vectors: int = setting(
        0,
        "Pivotal tuning: also learn this many embedding vectors for the rare word (textual inversion), which replace "
        "it in every prompt. 1 to 4 are typical; 0: off. They are saved in the adapter file and in an embedding file "
        "of their own: after a run named dog with the word sks, write embedding:dog-sks in ComfyUI prompts.",
        unit="vectors",
        group=_PIVOTAL,
        ge=0,
        le=64,
        neutral=(0,),
    )
    token_lr: float = setting(
        5e-4,
        "Learning rate of the rare word's embedding vectors.",
        group=_PIVOTAL,
        advanced=True,
        step=0.0001,
        gt=0.0,
        le=1.0,
        needs=Needs("token_vectors"),
        neutral=(),
    )
    token_until: float = setting(
        0.5,
        "The pivot: fraction of the steps after which the rare word's vectors are frozen and only the adapter is "
        "trained. Until then the text encoders run at every step.",
        group=_PIVOTAL,
        advanced=True,
        step=0.05,
        gt=0.0,
        le=1.0,
        needs=Needs("token_vectors"),
        neutral=(),
    )
    token_start: str = setting(
        "",
        "Words whose embeddings the rare word's vectors start from. Empty: the class noun or, without one, the rare "
        "word itself.",
        group=_PIVOTAL,
        advanced=True,
        needs=Needs("token_vectors"),
        neutral=(),
    )

    @field_validator("include", "exclude")
    @classmethod
    def _patterns_compile(cls, text: str) -> str:
        for pattern in text.split():
            _compiled(pattern)
        return text

    @field_validator("block_ranks")
    @classmethod
    def _block_ranks_parse(cls, text: str) -> str:
        _parse_block_ranks(text)
        return text

    @model_validator(mode="after")
    def _settings_suit_the_kind(self) -> Self:
        kind = self.adapter
        if kind == "full":
            for name in _ONLY_FOR_ADAPTERS:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{suggest(name)} is for adapters, but {suggest('adapter')} is 'full': "
                        f"unset {suggest(name)} or choose {suggest('adapter', 'lora')}"
                    )
        self._require_lora()
        if kind in ("loha", "lokr", *ROTATIONS) and (self.dropout or self.rank_stabilized):
            raise ValueError(
                f"{suggest('dropout')} and {suggest('rank_stabilized')} are only for lora and dora, but "
                f"{suggest('adapter')} is '{kind}': unset them"
            )
        alphas = [self.alpha, self.conv_alpha, *(block.alpha for block in self.ranks_by_block)]
        if kind in ROTATIONS and any(alpha is not None for alpha in alphas):
            raise ValueError(
                f"{kind.upper()} is not scaled by an alpha: unset {suggest('alpha')}, {suggest('conv_alpha')} and the "
                f"alphas in {suggest('block_ranks')}, and limit the rotation with {suggest('max_norm')}"
            )
        if kind == "lokr" and any(alpha is not None for alpha in alphas):
            raise ValueError(
                f"LoKr is not scaled by an alpha: unset {suggest('alpha')}, {suggest('conv_alpha')} and the alphas in "
                f"{suggest('block_ranks')}, and control the strength with {suggest('learning_rate')}"
            )
        if self.lokr_factor == 0:
            raise ValueError(f"{suggest('lokr_factor')} is 0: choose -1 (as even as possible), or 1 or more")
        if self.lokr_factor != -1 and kind != "lokr":
            raise ValueError(
                f"{suggest('lokr_factor')} is for LoKr, but {suggest('adapter')} is '{kind}': unset it or choose "
                f"{suggest('adapter', 'lokr')}"
            )
        if self.combine and kind not in ("lora", "full"):
            raise ValueError(
                f"{suggest('combine')} adds up adapters, which is only exact for LoRA, but {suggest('adapter')} is "
                f"'{kind}': choose {suggest('adapter', 'lora')}, or set {suggest('combine', False)} and use both files"
            )
        return self

    def _require_lora(self) -> None:
        """Refuse what only a LoRA can be, and what its orthogonal start can't be with."""
        for name in _ONLY_FOR_LORA:
            default = type(self).model_fields[name].default
            if self.adapter != "lora" and getattr(self, name) != default:
                raise ValueError(
                    f"{suggest(name)} is for LoRA, but {suggest('adapter')} is '{self.adapter}': set "
                    f"{suggest(name, default)} or choose {suggest('adapter', 'lora')}"
                )
        if self.lora_init == "orthogonal" and self.max_norm:
            raise ValueError(
                f"{suggest('max_norm')} scales factors whose product is the weight's change, but with "
                f"{suggest('lora_init', 'orthogonal')} the change is a difference of two products: set "
                f"{suggest('max_norm', 0)} or {suggest('lora_init', 'default')}"
            )

    @model_validator(mode="after")
    def _settings_suit_the_targets(self) -> Self:
        if self.targets == "none" and not self.include.strip():
            raise ValueError(
                f"{suggest('targets')} is 'none' and {suggest('include')} names no layers either: "
                f"set {suggest('include')} or choose other {suggest('targets')}"
            )
        if (self.conv_rank or self.conv_alpha) and self.targets != "all" and not self.include.strip():
            raise ValueError(
                f"{suggest('conv_rank')} and {suggest('conv_alpha')} are for convolutions, but {suggest('targets')} "
                f"'{self.targets}' has none: choose {suggest('targets', 'all')} or unset them"
            )
        if self.text_encoder_until < 1 and not self.text_encoder_rates:
            raise ValueError(
                f"{suggest('text_encoder_until')} ends the training of text encoders, but none is trained: "
                f"set {suggest('text_encoder_lr')} or set {suggest('text_encoder_until', 1)}"
            )
        return self

    @property
    def scale(self) -> float:
        """Factor of the adapter's output: alpha / rank, or alpha / √rank if rank-stabilised."""
        alpha = float(self.rank if self.alpha is None else self.alpha)
        return alpha / math.sqrt(self.rank) if self.rank_stabilized else alpha / self.rank

    @property
    def text_encoder_rates(self) -> dict[str, float]:
        """Component name of each text encoder that is trained → its learning rate."""
        rates = {"text_encoder": self.text_encoder_lr, "text_encoder_2": self.text_encoder_2_lr}
        return {component: rate for component, rate in rates.items() if rate}

    def text_encoders_in_steps(self, encoders: Iterable[str]) -> list[str]:
        """Those of a model's text encoders that run in every step: they are trained, or the rare word's vectors are.

        Args:
            encoders: Component names of all.
        """
        return [name for name in encoders if self.token_vectors or name in self.text_encoder_rates]

    @property
    def include_patterns(self) -> list[re.Pattern[str]]:
        """`include`, compiled."""
        return [_compiled(pattern) for pattern in self.include.split()]

    @property
    def exclude_patterns(self) -> list[re.Pattern[str]]:
        """`exclude`, compiled."""
        return [_compiled(pattern) for pattern in self.exclude.split()]

    @property
    def ranks_by_block(self) -> list[BlockRank]:
        """`block_ranks`, parsed."""
        return _parse_block_ranks(self.block_ranks)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"'{pattern}' is not a valid regular expression ({error}); put \\ before a dot or bracket"
        ) from None


def _parse_block_ranks(text: str) -> list[BlockRank]:
    ranks = []
    for entry in text.split():
        match = re.fullmatch(r"(.+)=(\d{1,4})(?::(\d+(?:\.\d+)?))?", entry)
        alpha = float(match[3]) if match and match[3] else None
        if not match or alpha == 0:
            raise ValueError(f"'{entry}' is not PATTERN=RANK or PATTERN=RANK:ALPHA, such as mid_block=32:16")
        ranks.append(BlockRank(pattern=_compiled(match[1]), rank=int(match[2]), alpha=alpha))
    return ranks
