"""Parsing of adapter keys: what each tensor of an adapter file is, whatever program wrote it.

A key is the name of a module (prefixes, then its path, with dots or underscores) and the tensor's part in the layer.
Both come from closed lists of words: anything else is refused, naming the family or type if it is recognised, else the
key. A path of known words that no model has is read; `warn_of_strange_modules` reports it.

| written by | a module is named |
|---|---|
| kohya's sd-scripts, OneTrainer | lora_unet_down_blocks_0_…, oft_unet_…, lora_te_…, lora_te1_…, lora_te2_… |
| LyCORIS's own wrapper, SimpleTuner | lycoris_down_blocks_0_… |
| diffusers, SimpleTuner | unet.down_blocks.0.…, text_encoder.…, text_encoder_2.… |
| diffusers up to 0.15, up to 0.19 | down_blocks.0.….processor.to_q_lora…, text_encoder.….self_attn.to_q_lora… |
| PEFT | base_model.model.down_blocks.0.…, of a text encoder base_model.model.text_model.… |
| OneTrainer (OMI) | unet.input_blocks.1.…, clip_l.text_model.…, clip_g.text_model.… |
| ComfyUI, ai-toolkit | diffusion_model.input_blocks.1.…, text_encoders.clip_l.transformer.text_model.… |
| diffusers, for transformers | transformer.transformer_blocks.0.…, of Anima's conditioner text_conditioner.blocks.0.… |
| OneTrainer, for transformers | lora_transformer_transformer_blocks_0_… |

Each with the levels that torch.compile (`_orig_mod`) and data-parallel training (`module`) put in between. An
embedding that was trained together with it (OneTrainer's and Automatic1111's `bundle_emb.`) is kept unchanged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import AdapterError
from ..models import anima_names, families, krea2_names
from ..models.clip_names import with_text_tower
from ..models.transformers import is_transformer_module, vocabulary_of
from .foreign import foreign_family, foreign_kind
from .layers import DORA_SCALE
from .module_paths import (
    dotted,
    has_known_words,
    is_known_module,
    layers_per_block,
    module_name,
    module_path,
    underscored,
)
from .peft_config import PEFT_PREFIX, refuse_unread_parts
from .prefixes import KOHYA_UNET_PREFIX, UNET, possible_prefixes

logger = logging.getLogger("dreambooth_lora")

PEFT_MAGNITUDE = "lora_magnitude_vector"
PEFT_BIAS = "lora_B.bias"  # of PEFT's lora_bias; times the layer's scale it is added to the module's bias
_LYCORIS = r"hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)"
_PLAIN = rf"{DORA_SCALE}|oft_blocks|rescale|diff|alpha|diff_b|w_norm|b_norm"
_NAME = r"(?:\.(?P<name>(?!(?:weight|bias)$)[^.]+))?"  # of the adapter, as PEFT holds it in memory
_PARTS = tuple(
    re.compile(rf"^(?P<stem>.+?){part}$")
    for part in (
        r"\.(?P<part>lora_(?:down|up|mid)\.weight)",
        rf"\.lora_(?P<letter>[AB]){_NAME}\.weight",
        r"(?:\.lora|\.lora_linear_layer|_lora)\.(?P<side>down|up)\.weight",
        rf"\.(?P<part>{_LYCORIS}){_NAME}",
        rf"\.(?P<part>{_PLAIN})(?:\.default)?",
        rf"\.(?P<part>{PEFT_MAGNITUDE}){_NAME}(?:\.weight)?",
        rf"\.(?P<bias>lora_B){_NAME}\.bias",
    )
)
_SIDES = {"A": "down", "B": "up"}
_SAME_PARTS = {
    "w_norm": "diff",
    "b_norm": "diff_b",
    PEFT_BIAS: "diff_b",
    PEFT_MAGNITUDE: DORA_SCALE,
}  # under another name
# Modules of transformers as diffusers calls them, from their first part on
_IN_DIFFUSERS = re.compile(
    r"(?<![a-z])(?:transformer_blocks|text_fusion|time_mod_proj|txt_in|time_embed|patch_embed|norm_out)(?:[._].+)?$"
)
# Parts of a layer whose rows are the module's outputs, or a factor of their number; and those whose columns its inputs
_OF_OUTPUTS = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a", "diff")
_OF_INPUTS = ("lora_down.weight", "hada_w1_b", "lokr_w1", "lokr_w1_b", "lokr_w2", "lokr_w2_b", "diff")
_CONDITIONER = f"{anima_names.CONDITIONER_IN_DIFFUSERS}."
_WRAPPERS = (PEFT_PREFIX, "_orig_mod.", "module.")
_WRAPPERS_INSIDE = re.compile(r"(^|_)(?:_orig_mod|module)_")
_EMBEDDING = "bundle_emb."
_REMEDY_KINDS = "Use a LoRA, LoCon, DoRA, LoHa, LoKr or OFT file, or one with full weight differences."


@dataclass(frozen=True)
class TensorKey:
    """A tensor's key, parsed.

    Attributes:
        module: Kohya's name of the module.
        part: What follows it in a kohya file, such as "lora_down.weight"; or `PEFT_MAGNITUDE`, or `PEFT_BIAS`.
        path: The module's dotted path in a file of diffusers or PEFT, else its name.
        stem: The module's name in the file.
        adapter_name: The adapter's name in the key; "" without one.
        is_known_module: Whether some model has this module; else only the words of its path are known.
    """

    module: str
    part: str
    path: str
    stem: str
    adapter_name: str = ""
    is_known_module: bool = True


def is_embedding(key: str) -> bool:
    """Whether a tensor is part of a bundled embedding, "bundle_emb.<name>.<part>"."""
    return key.startswith(_EMBEDDING)


def embedding_key(name: str, part: str) -> str:
    """The key of a part of a bundled embedding; with no part, the common prefix of its keys."""
    return f"{_EMBEDDING}{name}.{part}"


def embedding_names(keys: Iterable[str]) -> list[str]:
    """The names of the embeddings with these keys, each once."""
    return sorted({key.removeprefix(_EMBEDDING).partition(".")[0] for key in keys if is_embedding(key)})


def parse_keys(keys: Collection[str], shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, TensorKey]:
    """Parse the keys of an adapter's tensors, except those of bundled embeddings.

    Args:
        keys: As in the file.
        shapes: Key → shape, as far as known; it helps to name a family that can't be read.

    Returns:
        Key → the parsed key, in alphabetical order, since safetensors does not keep the order in a file.

    Raises:
        AdapterError: A key is of another family, of an unsupported type, or unknown; there is no LoRA, or there are
            several.
    """
    prefixes = _Prefixes.of_all_families(_renaming(keys, shapes or {}))
    parsed: dict[str, TensorKey] = {}
    parts_of_unknown: list[str] = []
    unknown: list[str] = []
    for key in sorted(keys):
        if is_embedding(key):
            continue
        parts = _split(key)
        known = parts and prefixes.parse(*parts)
        if known:
            parsed[key] = known
        else:
            (parts_of_unknown if parts else unknown).append(key)
    parts_of_unknown += _keys_of_like_families(parsed, shapes or {})
    if parts_of_unknown or unknown:
        _refuse(parts_of_unknown, unknown, shapes or {}, has_layers=bool(parsed))
    if not parsed:
        raise _no_lora(f"only embeddings ({', '.join(embedding_names(keys))})" if keys else "no tensors")
    names = sorted({key.adapter_name for key in parsed.values()} - {""})
    if len(names) > 1:
        raise AdapterError(
            f"The file contains several adapters: {', '.join(names)}.", "Save each to its own file and choose one."
        )
    return parsed


def _renaming(keys: Collection[str], shapes: Mapping[str, Sequence[int]]) -> Callable[[str], str]:
    """What turns the paths of a file into those of the networks here: some of diffusers' are several families'.

    Args:
        keys: Of all tensors.
        shapes: Key → shape, as far as known.
    """
    sides: dict[str, list[int]] = {}  # projection of keys → its numbers of outputs and inputs
    is_krea2 = is_anima = False
    for key in keys:
        parts = _split(key)
        match = _IN_DIFFUSERS.search(parts[0]) if parts else None
        if parts is None or match is None:
            continue
        path = dotted(underscored(match[0]))
        is_krea2 = is_krea2 or krea2_names.is_diffusers_name(path)
        is_inside = re.search(r"\d", parts[0][: match.start()])  # of a level of a UNet, which has such blocks, too
        is_anima = is_anima or (not is_inside and anima_names.is_diffusers_name(path))
        shape = shapes.get(key, ())
        if re.search(r"\d[._]attn[._]to_k$", match[0]) and len(shape) > 1:
            sizes = sides.setdefault(match[0], [1, 1])
            if parts[1] in _OF_OUTPUTS:
                sizes[0] *= shape[0]
            if parts[1] in _OF_INPUTS:
                sizes[1] *= shape[1]
    if is_anima:
        return anima_names.path_from_diffusers
    has_fewer_heads = any(1 < outputs < inputs for outputs, inputs in sides.values())
    return krea2_names.path_from_diffusers if is_krea2 or has_fewer_heads else str


def _keys_of_like_families(parsed: Mapping[str, TensorKey], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Keys of modules that are called as those of a transformer here, but have the shapes of another family."""
    sides: dict[str, dict[str, int]] = {}  # path → "outputs" and "inputs"
    keys: dict[str, str] = {}
    for key, tensor in parsed.items():
        path = module_path(tensor.module)
        shape = shapes.get(key, ())
        if path.component != UNET or not is_transformer_module(path.path) or len(shape) < 2:
            continue
        keys.setdefault(path.path, key)
        if tensor.part == "lora_up.weight":
            sides.setdefault(path.path, {})["outputs"] = shape[0]
        elif tensor.part == "lora_down.weight":
            sides.setdefault(path.path, {})["inputs"] = shape[1]
    return [
        keys[path]
        for path, found in sides.items()
        if len(found) == 2 and (vocabulary := vocabulary_of(path)) and not vocabulary.fits(path, **found)
    ]


def _readable_families() -> str:
    return families.joined_titles(families.FAMILIES)


def _no_lora(content: str) -> AdapterError:
    return AdapterError(
        f"The file contains no LoRA: it has {content}.", "Choose an adapter file (LoRA) in safetensors format."
    )


def _refuse(with_part: list[str], others: list[str], shapes: Mapping[str, Sequence[int]], *, has_layers: bool) -> None:
    """Refuse keys that are not known.

    Args:
        with_part: Those that end as keys of layers do.
        others: The others.
        shapes: Key → shape.
        has_layers: Whether other keys of the file are known.

    Raises:
        AdapterError: Always.
    """
    kind = foreign_kind([*with_part, *others])
    family = foreign_family([*with_part, *others] if with_part or kind else [], shapes)
    if family:
        title, key = family
        raise AdapterError(
            f"The adapter was made for {title}, which is not supported: it has the tensor {key}.",
            f"Use an adapter for one of: {_readable_families()}.",
        )
    if kind:
        title, key = kind
        raise AdapterError(f"The adapter's type, {title}, is not supported: it has the tensor {key}.", _REMEDY_KINDS)
    refuse_unread_parts([*with_part, *others])
    if not has_layers and not with_part:
        raise _no_lora(f"tensors such as {others[0]}")
    keys = sorted([*with_part, *others])
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    raise AdapterError(
        f"The adapter has an unknown tensor: {keys[0]}{more}. Ignoring it would change the adapter's effect.",
        f"Use an adapter for one of: {_readable_families()}, saved with kohya's or diffusers' tensor names.",
    )


def _split(key: str) -> tuple[str, str, str] | None:
    """The stem of a key, its part in kohya's naming, and the adapter's name; None if it has no known part."""
    for pattern in _PARTS:
        match = pattern.match(key)
        if match:
            groups = match.groupdict()
            side = groups.get("side") or _SIDES.get(groups.get("letter") or "")
            part = f"lora_{side}.weight" if side else PEFT_BIAS if groups.get("bias") else groups["part"]
            return groups["stem"], part, groups.get("name") or ""
    return None


@dataclass(frozen=True)
class _Prefixes:
    """What the names of a network's modules begin with.

    Attributes:
        of_names: Prefix before a path with underscores → network; "" if the path itself decides.
        of_paths: Prefix before a dotted path → network.
        renaming: Turns the denoiser's dotted paths of the file into those of the lists.
    """

    of_names: Mapping[str, str]
    of_paths: Mapping[str, str]
    renaming: Callable[[str], str] = str

    @classmethod
    def of_all_families(cls, renaming: Callable[[str], str]) -> _Prefixes:
        """Those of the networks of all families, longer ones first."""
        of_names = {KOHYA_UNET_PREFIX: UNET, "lora_transformer_": UNET, "oft_unet_": UNET, "lycoris_": ""}
        of_paths = {"unet.": UNET, "transformer.": UNET, "diffusion_model.": UNET, "model.diffusion_model.": UNET}
        for family in families.FAMILIES:
            for encoder in family.text_encoders:
                of_names |= dict.fromkeys(possible_prefixes(family, encoder.name), encoder.name)
                short = encoder.short_name
                for prefix in (encoder.name, short, f"text_encoders.{short}.transformer"):
                    of_paths[f"{prefix}."] = encoder.name
        of_paths |= {f"{prefix[:-1]}.": component for prefix, component in of_names.items()}
        return cls(_longest_first(of_names), _longest_first(of_paths), renaming)

    def parse(self, stem: str, part: str, adapter_name: str) -> TensorKey | None:
        """Parse a key; None if its module is not on the list."""
        if stem.startswith(_CONDITIONER):
            stem = f"transformer.{anima_names.CONDITIONER}.{stem.removeprefix(_CONDITIONER)}"
        for prefix, component in self.of_names.items():
            if stem.startswith(prefix) and "." not in stem:
                rest = _WRAPPERS_INSIDE.sub(r"\1", stem.removeprefix(prefix))
                place = self._known(component, dotted(rest))
                if place is None:
                    return None
                keeps_prefix = component and prefix not in ("oft_unet_", "lora_transformer_")
                name = prefix + underscored(place[1]) if keeps_prefix else module_name(*place)
                return TensorKey(name, part, name, stem, adapter_name, is_known_module(*place))
        component, path = self._split_dotted(stem)
        place = self._known(component, path)
        if place is None:
            return None
        path = _as_known(place[0], path)
        return TensorKey(module_name(*place), part, path, stem, adapter_name, is_known_module(*place))

    def _known(self, component: str, path: str) -> tuple[str, str] | None:
        """See `_known`."""
        return _known(component, self.renaming(path) if component in ("", UNET) else path)

    def _split_dotted(self, stem: str) -> tuple[str, str]:
        """The network that a dotted path begins with, "" if it names none, and the rest without wrappers."""
        path = stem
        component = ""
        while True:
            wrapper = next((prefix for prefix in _WRAPPERS if path.startswith(prefix)), None)
            network = None if component else next((prefix for prefix in self.of_paths if path.startswith(prefix)), None)
            if network:
                component = self.of_paths[network]
            elif not wrapper:
                return component, path.replace("._orig_mod.", ".").replace("._orig_mod", "")
            path = path.removeprefix(network or wrapper or "")


def _longest_first(prefixes: Mapping[str, str]) -> dict[str, str]:
    return {prefix: prefixes[prefix] for prefix in sorted(prefixes, key=len, reverse=True)}


def _known(component: str, path: str) -> tuple[str, str] | None:
    """A network and a path in it as the lists have them; None if they have no such module.

    Args:
        component: The network; "" if only the path shows it: the UNet, or a single text encoder.
        path: Dotted path as a program wrote it.
    """
    for candidate in (component,) if component else (UNET, families.FAMILIES[0].text_encoders[0].name):
        whole = _as_known(candidate, path)
        if candidate != UNET:
            whole = with_text_tower(whole)
        if has_known_words(candidate, whole):
            return candidate, whole
    return None


def _as_known(component: str, path: str) -> str:
    """A path without what diffusers put into it up to version 0.19."""
    if component == UNET:
        return (
            path if is_transformer_module(path) else re.sub(r"\.to_out$", ".to_out.0", path.replace(".processor.", "."))
        )
    return re.sub(r"\.self_attn\.(?:processor\.)?to_(q|k|v|out)$", r".self_attn.\1_proj", path)


def warn_of_strange_modules(keys: Iterable[TensorKey]) -> None:
    """Warn of a module whose words are known, but which no model has."""
    strange = [key.module for key in keys if not key.is_known_module]
    if strange:
        logger.warning(
            "The adapter changes modules that do not exist in any of %s: %s", _readable_families(), min(strange)
        )


def without_repeats(
    keys: Mapping[str, TensorKey], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, TensorKey], list[str]]:
    """The keys, with only one name per module.

    A file may contain a module twice, with the names of two programs. It is read once if the values are the same; if
    they are not, it is unclear which are right.

    Args:
        keys: From `parse_keys`.
        tensors: All tensors of the file by their keys.

    Returns:
        The keys, and for each module that is there twice the two names, joined by "and".

    Raises:
        AdapterError: A module has two names with different values; names both.
    """
    modules: dict[object, dict[str, dict[str, str]]] = {}  # the module, and what of it → stem → part → key
    per_block = layers_per_block(key.module for key in keys.values())
    repeated: dict[str, None] = {}
    kept = dict(keys)
    for key, parsed in keys.items():
        part = _SAME_PARTS.get(parsed.part, parsed.part)
        is_vector = part == "diff_b" or (part == "diff" and tensors[key].ndim == 1)  # each is complete by itself
        changed = (module_path(parsed.module, per_block), part if is_vector else "layer")
        parts = modules.setdefault(changed, {}).setdefault(parsed.stem, {})
        first = parts.setdefault(part, key)
        if first != key:
            _require_same(first, key, [(first, key)], tensors)
            repeated[f"{first} and {key}"] = None
            del kept[key]
    for by_stem in modules.values():
        (first_stem, first_parts), *others = by_stem.items()
        for stem, parts in others:
            pairs = [(first_parts.get(part), parts.get(part)) for part in sorted({*first_parts, *parts})]
            _require_same(first_stem, stem, pairs, tensors)
            repeated[f"{first_stem} and {stem}"] = None
            for key in parts.values():
                kept.pop(key, None)
    return kept, list(repeated)


def _require_same(
    first: str, second: str, pairs: Iterable[tuple[str | None, str | None]], tensors: Mapping[str, Tensor]
) -> None:
    """Check that two names of one module have the same tensors, given as pairs of keys."""
    for one, other in pairs:
        if one is None or other is None or not _are_equal(tensors[one], tensors[other]):
            raise AdapterError(
                f"The adapter has one module under two names, with different values: {first} and {second}.",
                "Save it again with the program that trained it, which writes only one of the two.",
            )


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.double(), other.double())
