"""Opening transformers models: from a folder, from the hub's local cache or, if allowed, from the hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..core.errors import CancelledError, TrainerError, WeightsError, suggest

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@contextlib.contextmanager
def explained_opening(description: str, source: str, files: str, folder: str) -> Iterator[None]:
    """Turn errors of transformers' `from_pretrained` into `WeightsError`s with a remedy.

    Args:
        description: What is opened, such as "feature model".
        source: A folder or a hub name.
        files: The files that the folder must contain, for the message.
        folder: Where such folders are usually put, for the message.

    Raises:
        WeightsError: It does not exist, or can't be read.
    """
    try:
        yield
    except (TrainerError, CancelledError, RuntimeError, MemoryError):
        raise
    except Exception as error:  # transformers raises anything for files of another shape
        raise WeightsError(
            f"The {description} {source} can't be opened: {error}".split("\n")[0].rstrip(".") + ".",
            f"Put {files} into a folder such as {folder}/{Path(source).name} and use that, or use a hub name with "
            f"{suggest('download', True)}, where that setting exists.",
        ) from error


def model_type(source: str, known: Collection[str], *, download: bool) -> str:
    """The type of a model by its config.json: transformers' `model_type`.

    Raises:
        WeightsError: It is not one of `known`.
        OSError: It does not exist.
    """
    import transformers

    if os.path.isfile(source):
        raise OSError("it is a file, not a folder")
    if not os.path.isdir(source) and not _HUB_NAME.fullmatch(source):
        raise OSError("the folder does not exist")
    name = str(transformers.AutoConfig.from_pretrained(source, local_files_only=not download).model_type)
    if name not in known:
        wanted = "one of: " if len(known) > 1 else "a model of type "
        raise WeightsError(f"{source} is a {name} model.", f"Use {wanted}{', '.join(known)}.")
    return name


def pillow_processor(name: str) -> Any:
    """The image processor of that name which works on Pillow images; transformers 5 names it differently."""
    import transformers

    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def source_title(source: str) -> str:
    """The name of a model in results: its folder's name, or its hub name."""
    return Path(source).name if Path(source).is_dir() else source
