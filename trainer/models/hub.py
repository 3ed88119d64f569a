"""Opening what transformers writes: from a folder, from the hub's local cache, or, if asked, from the hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..core.errors import WeightsError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@contextlib.contextmanager
def explained_opening(what: str, source: str, files: str, folder: str) -> Iterator[None]:
    """Turn errors of transformers' `from_pretrained` into `WeightsError`s that say what to do.

    Args:
        what: What is opened, such as "feature model".
        source: A folder or a hub name.
        files: The files that must be there.
        folder: Where such folders are put.

    Raises:
        WeightsError: It is not there, or can't be read.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"The {what} {source} can't be opened: {error}".split("\n")[0].rstrip(".") + ".",
            f"Put {files} into a folder, such as {folder}/{Path(source).name}, and give that; or a hub name with "
            "--download.",
        ) from error


def model_type(source: str, known: Collection[str], *, download: bool) -> str:
    """What kind of model is there, by its config.json: transformers' `model_type`.

    Raises:
        WeightsError: It is none of `known`.
        OSError: It is not there.
    """
    import transformers

    if os.path.isfile(source):
        raise OSError("it is a file, not a folder")
    if not os.path.isdir(source) and not _HUB_NAME.fullmatch(source):
        raise OSError("there is no such folder")
    kind = str(transformers.AutoConfig.from_pretrained(source, local_files_only=not download).model_type)
    if kind not in known:
        one = "one of: " if len(known) > 1 else "a model of the kind "
        raise WeightsError(f"{source} is a {kind} model.", f"Give {one}{', '.join(known)}.")
    return kind


def pillow_processor(name: str) -> Any:
    """The image processor of that name that works on Pillow pictures; transformers 5 has it under a name of its own."""
    import transformers

    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def title_of(source: str) -> str:
    """What results call a model: a folder's name, or the hub name."""
    return Path(source).name if Path(source).is_dir() else source
