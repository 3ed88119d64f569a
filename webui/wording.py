"""How the tab words a setting that the engine names in an error or a note (`trainer.core.errors.suggest`)."""

from __future__ import annotations

from ..trainer.core.errors import plain

_IN_THE_TAB = {
    "images": "Pictures",
    "base": "Base model",
    "token": "Word",
    "class_noun": "Class",
    "preset": "Preset",
    "name": "Name",
    "steps": "Steps",
    "resolution": "Resolution",
    "prior_count": "Class pictures",
    "output": "the web UI's LoRA folder",
    "output_dir": "the web UI's data folder",
}
_SPELLED = {  # words of settings' names that are written otherwise
    "clip": "CLIP",
    "dco": "DCO",
    "dino": "DINO",
    "ema": "EMA",
    "lokr": "LoKr",
    "lora": "LoRA",
    "loras": "LoRAs",
    "lr": "LR",
    "snr": "SNR",
    "vae": "VAE",
}


def label(setting: str) -> str:
    """What a setting's widget is called: "Steps", or the setting's own name in words, such as "EMA decay"."""
    return _IN_THE_TAB.get(setting) or " ".join(_SPELLED.get(word, word) for word in setting.split("_"))


def title(setting: str) -> str:
    """What stands above a setting's widget."""
    text = label(setting)
    return text[0].upper() + text[1:]


def wording(setting: str, value: str | None) -> str:
    """A setting in a sentence, as the tab calls it, with the value that would help."""
    return plain(label(setting), value)
