"""The bridge to ComfyUI, continued: embeddings of learned words, which prompts call as embedding:NAME."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("dreambooth_lora")


def embeddings_folder() -> Path:
    """Where embedding files are written: the first of ComfyUI's embedding folders."""
    import folder_paths

    return Path(folder_paths.get_folder_paths("embeddings")[0])


def with_words(clip: Any, embeddings: Mapping[str, Any]) -> Any:
    """A CLIP whose prompts may call the words that an adapter bundles: embedding:WORD.

    ComfyUI takes embeddings from files alone, so each word becomes one in its folder for temporary files.

    Args:
        clip: A CLIP; it stays as it is.
        embeddings: As the engine's `Adapter.embeddings` has them.
    """
    from ..trainer.adapters.embeddings import prompt_name
    from ..trainer.adapters.keys import embedding_key, embedding_names

    folders = []
    for word in embedding_names(embeddings):
        name = prompt_name(word)
        start = embedding_key(word, "")
        folder = _folder_with(name, {key: tensor for key, tensor in embeddings.items() if key.startswith(start)})
        if _is_taken(clip, name, folder):
            logger.warning(
                "embedding:%s refers to an existing embedding of the same name, not to the adapter's.",
                name,
            )
        else:
            folders.append(str(folder))
    if not folders:
        return clip
    taught = clip.clone()
    taught.tokenizer = copy.copy(clip.tokenizer)
    for part, tokenizer in _tokenizers(clip).items():
        own = copy.copy(tokenizer)
        own.embedding_directory = [*_directories(tokenizer), *folders]
        setattr(taught.tokenizer, part, own)
    return taught


def _folder_with(name: str, tensors: Mapping[str, Any]) -> Path:
    """A folder of temporary files with nothing in it but a file of these tensors, named by its content."""
    import folder_paths
    from safetensors.torch import save

    from ..trainer.core.files import write_atomic

    content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = Path(folder_paths.get_temp_directory(), "dreambooth-embeddings", digest, f"{name}.safetensors")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    return path.parent


def _is_taken(clip: Any, name: str, own: Path) -> bool:
    """Whether a prompt of the CLIP calls another embedding by that name."""
    from comfy.sd1_clip import expand_directory_list

    directories = {directory for tokenizer in _tokenizers(clip).values() for directory in _directories(tokenizer)}
    return any(
        Path(directory, f"{name}{ending}").is_file()
        for directory in expand_directory_list(sorted(directories))
        for ending in ("", ".safetensors", ".pt", ".bin")
        if Path(directory) != own
    )


def _tokenizers(clip: Any) -> dict[str, Any]:
    """The tokenizers of a CLIP's text encoders, by their attributes' names."""
    return {name: part for name, part in vars(clip.tokenizer).items() if hasattr(part, "embedding_directory")}


def _directories(tokenizer: Any) -> list[str]:
    """The folders in which a tokenizer looks for embeddings."""
    directories = tokenizer.embedding_directory or []
    return [directories] if isinstance(directories, str) else list(directories)
