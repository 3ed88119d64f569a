"""The bridge to ComfyUI, continued: the paths of feature models, their tokenizer, and caption models."""

from __future__ import annotations

from pathlib import Path


def feature_model(name: str) -> str:
    """The path of a feature model, or of each part of "vision file + text file".

    A folder in models/feature_models, else a file in models/clip_vision or models/text_encoders, else the name itself.
    """
    import folder_paths

    def path_of(part: str) -> str:
        folder = Path(folder_paths.models_dir, "feature_models", part)
        if part and folder.is_dir():
            return str(folder)
        files = (folder_paths.get_full_path(kind, part) for kind in ("clip_vision", "text_encoders"))
        return next((file for file in files if file), part)

    path = path_of(name)
    if path != name:
        return path
    return " + ".join(path_of(part.strip()) for part in name.split(" + "))


def caption_model(name: str) -> str:
    """The path of a BLIP model: a folder in models/BLIP or models/blip, by its whole or its last name, else the name.

    So Salesforce/blip-image-captioning-base is also found as models/BLIP/blip-image-captioning-base.
    """
    import folder_paths

    for part in (name, Path(name).name):
        for kind in ("BLIP", "blip"):
            folder = Path(folder_paths.models_dir, kind, part)
            if part and (folder / "config.json").is_file():
                return str(folder)
    return name


def clip_tokenizer() -> Path:
    """The folder of ComfyUI's own CLIP tokenizer."""
    import comfy.sd1_clip

    return Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"
