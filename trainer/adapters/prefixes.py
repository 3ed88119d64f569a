"""Prefixes of module names in adapter files, such as "lora_unet_" and "lora_te1_": they show the network."""

from __future__ import annotations

import re

from ..models import families
from ..models.families.base import Family

UNET = "unet"
DENOISER_FOLDERS = ("unet", "transformer")
KOHYA_UNET_PREFIX = "lora_unet_"
_TEXT_ENCODER = "text_encoder"
_NUMBERED = re.compile(r"^lora_te(\d?)_")  # also the encoders of families that can't be trained


def component_of_folder(folder: str) -> str:
    """The component whose folder in diffusers' layout has that name: the denoiser of any family is "unet"."""
    return UNET if folder in DENOISER_FOLDERS else folder


def text_encoder_names() -> list[str]:
    """Component names of the text encoders of all families, each once."""
    return list(dict.fromkeys(spec.name for family in families.FAMILIES for spec in family.text_encoders))


def family_prefix(family: Family, component: str) -> str:
    """What the names of a network's modules begin with in the family's own files.

    Args:
        family: The family.
        component: "unet", "text_encoder" or "text_encoder_2"; one that the family lacks has its neutral prefix.
    """
    prefixes = {spec.name: spec.adapter_prefix for spec in family.text_encoders}
    return prefixes.get(component) or neutral_prefix(component)


def neutral_prefix(component: str) -> str:
    """What the names of a network's modules begin with where the family is not known: the first has no number."""
    if component == UNET:
        return KOHYA_UNET_PREFIX
    number = component.removeprefix(_TEXT_ENCODER).removeprefix("_")
    return f"lora_te{number}_"


def possible_prefixes(family: Family, component: str) -> list[str]:
    """Everything with which any program's file may begin the names of a network's modules, each once."""
    prefixes = [neutral_prefix(component), family_prefix(family, component)]
    if component == _TEXT_ENCODER:
        prefixes.append("lora_te1_")  # diffusers' converter calls it the first even where there is but one
    return list(dict.fromkeys(prefixes))


def split_prefix(name: str) -> tuple[str, str]:
    """The network that a module belongs to, and the rest of its name; the UNet if the prefix is not known."""
    prefixes = {spec.adapter_prefix: spec.name for family in families.FAMILIES for spec in family.text_encoders}
    for prefix in sorted(prefixes, key=len, reverse=True):
        if name.startswith(prefix):
            return prefixes[prefix], name.removeprefix(prefix)
    numbered = _NUMBERED.match(name)
    if numbered is None:
        return UNET, name.removeprefix(KOHYA_UNET_PREFIX)
    number = numbered[1]
    component = _TEXT_ENCODER if number in ("", "1") else f"{_TEXT_ENCODER}_{number}"
    return component, name[numbered.end() :]


def component_of(name: str) -> str:
    """The network that a module belongs to: "unet", "text_encoder" or "text_encoder_2"."""
    return split_prefix(name)[0]


def is_kohya_name(name: str) -> bool:
    """Whether a name begins as kohya's names of modules do."""
    return name.startswith(KOHYA_UNET_PREFIX) or component_of(name) != UNET
