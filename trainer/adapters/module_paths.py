"""Paths of modules, whatever program named them, and the names in kohya's files that are derived from them.

A name is a prefix that shows the network, and a dotted path with underscores for its dots: `underscored` and `dotted`
are the only places where one becomes the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from ..models import zimage_names
from ..models.clip_names import has_words_of_text_encoder, is_text_module, with_text_tower
from ..models.ldm_names import diffusers_name, has_words_of_unet, is_unet_module
from ..models.transformers import BLOCKS, UNDERSCORED_WORDS, is_transformer_module, network_path
from .prefixes import UNET, neutral_prefix, split_prefix

_UNET_WORDS = (  # parts of paths that hold underscores themselves, longer ones first
    "transformer_blocks|final_layer_norm|skip_connection|text_projection|time_embedding|"
    "output_blocks|add_embedding|conv_norm_out|conv_shortcut|time_emb_proj|input_blocks|"
    "middle_block|down_blocks|layer_norm1|layer_norm2|out_layers|emb_layers|time_embed|"
    "text_model|up_blocks|mid_block|in_layers|label_emb|self_attn|linear_1|linear_2|conv_out|"
    "proj_out|out_proj|conv_in|proj_in|to_out|q_proj|k_proj|v_proj|to_q|to_k|to_v"
)
_WORDS = "|".join(sorted({*_UNET_WORDS.split("|"), *UNDERSCORED_WORDS}, key=lambda word: (-len(word), word)))
_WORD = re.compile(rf"(?<![a-z0-9])({_WORDS})(?![a-z0-9])")
_ONE_LAYER_PER_BLOCK = re.compile(r"^lora_unet_(input_blocks_(3_1|2_0_op|4_0_op)(_|$)|output_blocks_(1|3)_[12]_conv$)")
_BLOCK_KINDS = ("text", "down", "mid", "up", *BLOCKS.values(), "other")


@dataclass(frozen=True)
class ModulePath:
    """The path of a module, whatever program named it.

    Attributes:
        component: "unet", "text_encoder" or "text_encoder_2".
        path: Dotted path in the network, which is diffusers' (but see `flux2_names`) or transformers'; in text encoders
            with "text_model.".
    """

    component: str
    path: str

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"

    @property
    def block(self) -> str:
        """The block: "down 0", "mid", "double 0", "layer 3", "text", "text 2" …; "other" outside of blocks."""
        if self.component != UNET:
            return self.component.replace("_encoder", "").replace("_", " ")
        first, _, rest = self.path.partition(".")
        if first in BLOCKS:
            return f"{BLOCKS[first]} {rest.partition('.')[0]}"
        level = re.search(r"(?:(down|up)_blocks|mid_block)(?:\.(\d+))?", self.path)
        if level is None:
            return "other"
        return f"{level[1]} {level[2]}" if level[1] else "mid"


def block_order(block: str) -> tuple[int, str]:
    """A key that sorts blocks in the order of the forward pass."""
    kind, _, number = block.partition(" ")
    return _BLOCK_KINDS.index(kind), number.zfill(2)


def has_known_words(component: str, path: str) -> bool:
    """Whether a path has only words of the supported families: the closed list.

    Args:
        component: "unet", or a text encoder's name.
        path: Dotted path in diffusers, the original code or transformers, the latter with the text tower.
    """
    if component != UNET:
        return has_words_of_text_encoder(path)
    return has_words_of_unet(path) or is_transformer_module(path)


def is_known_module(component: str, path: str) -> bool:
    """Whether models of the supported families have such a module; arguments as of `has_known_words`."""
    if component != UNET:
        return is_text_module(path)
    return is_unet_module(path) or is_transformer_module(path)


def canonical_path(component: str, path: str) -> str:
    """A path or parameter's name with the level "text_model." that transformers 5 dropped from some text encoders."""
    return path if component == UNET else with_text_tower(path)


def module_name(component: str, path: str) -> str:
    """Kohya's name of a module where the family is not known.

    Args:
        component: "unet", "text_encoder" or "text_encoder_2".
        path: The module's dotted path in diffusers or transformers (with or without "text_model.").
    """
    return neutral_prefix(component) + underscored(canonical_path(component, path))


def module_path(name: str, layers_per_block: int = 2) -> ModulePath:
    """The path of a module by its kohya name, which may be made of the original code's or diffusers' path.

    Args:
        name: Such as "lora_unet_input_blocks_4_1_proj_in" or "lora_te_text_model_encoder_layers_0_mlp_fc1".
        layers_per_block: Residual layers per level of the UNet, which the original code's numbers depend on.
    """
    component, rest = split_prefix(name)
    path = dotted(rest)
    if component == UNET:
        path = diffusers_name(path, layers_per_block) or network_path(path) or path
    return ModulePath(component, path)


def own_name(name: str, others: Iterable[str]) -> str:
    """A module's kohya name, which is not confused with a similar name of another family.

    Args:
        name: As in a file, such as "lora_unet_final_layer_linear".
        others: Names of all modules in the file: those in blocks show the family.
    """
    component, rest = split_prefix(name)
    path = zimage_names.fixed_path(dotted(rest)) if component == UNET else None
    if path is None or not any(zimage_names.is_in_block(dotted(split_prefix(other)[1])) for other in others):
        return name
    return module_name(UNET, path)


def layers_per_block(names: Iterable[str]) -> int:
    """Residual layers per level of the UNet whose modules have these names: one in some smaller SDXLs, else two."""
    return 1 if any(_ONE_LAYER_PER_BLOCK.match(name) for name in names) else 2


def underscored(path: str) -> str:
    """A dotted path in the form of kohya's names."""
    return path.replace(".", "_")


@lru_cache(maxsize=8192)
def dotted(underscored_path: str) -> str:
    """The inverse of `underscored` for modules of the closed list: words that contain underscores are known."""
    protected = _WORD.sub(lambda match: match[1].replace("_", "\0"), underscored_path)
    return protected.replace("_", ".").replace("\0", "_")
