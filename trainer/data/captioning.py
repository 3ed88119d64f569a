"""Captions by BLIP (Li et al. 2022, "BLIP: Bootstrapping Language-Image Pre-training"), written beside the pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..core.devices import explained_memory_errors, pick_device, to_device
from ..core.errors import PicturesError, SettingsError, WeightsError
from ..core.events import Listener, Note, Phase, stop_if_asked
from ..core.files import require_writable, write_atomic
from ..core.prompts import article
from ..models.hub import explained_opening, model_type, pillow_processor, title_of
from ..settings.caption import CaptionCommand, CaptionSettings
from .folder import picture_names
from .images import Picture, decode

BATCH = 8  # pictures per forward pass
_LOWER = "beams, or compute on the CPU"


@dataclass(frozen=True)
class Captioner:
    """A BLIP model that says what pictures show.

    Attributes:
        name: Folder or hub name.
        network: transformers' BlipForConditionalGeneration, in float32.
        processor: Pictures → pixels, the model's own.
        tokenizer: Words ↔ tokens, the model's own.
    """

    name: str
    network: Any
    processor: Any
    tokenizer: Any

    @torch.no_grad()
    def describe(self, pictures: Sequence[Image.Image], text: str = "", *, beams: int, max_tokens: int) -> list[str]:
        """What each picture shows, in BLIP's words; nothing is drawn at random.

        Args:
            pictures: RGB, of any size.
            text: How captions begin; they contain it.
            beams: Captions that are followed side by side; 1 is greedy.
            max_tokens: Of the longest caption, beside `text`.

        Raises:
            OutOfMemoryError: The memory does not suffice.
            SettingsError: `text` is longer than the model reads.
        """
        with explained_memory_errors(_LOWER):
            return [
                words
                for start in range(0, len(pictures), BATCH)
                for words in self._describe(pictures[start : start + BATCH], text, beams, max_tokens)
            ]

    def _describe(self, pictures: Sequence[Image.Image], text: str, beams: int, max_tokens: int) -> list[str]:
        device = next(self.network.parameters()).device
        inputs = {"pixel_values": self.processor(list(pictures), return_tensors="pt")["pixel_values"].to(device)}
        room = int(self.network.config.text_config.max_position_embeddings) - 1
        if text.strip():
            given = [" ".join(text.split())] * len(pictures)
            inputs |= self.tokenizer(given, return_tensors="pt", return_token_type_ids=False).to(device)
            room -= inputs["input_ids"].shape[1]
        if room < 1:
            raise SettingsError(f"text is longer than {self.name} reads: {text[:40]} …", "Give a few words only.")
        longest = min(max_tokens, room)
        found = self.network.generate(**inputs, num_beams=beams, do_sample=False, max_new_tokens=longest)
        return [" ".join(self.tokenizer.decode(one, skip_special_tokens=True).split()) for one in found]


def open_captioner(source: str, device: torch.device, *, download: bool = False) -> Captioner:
    """Open a BLIP model.

    Args:
        source: A folder as transformers writes it, or a hub name.
        device: Where it computes.
        download: Whether a hub name may be fetched; otherwise only what the hub's cache holds is used.

    Raises:
        WeightsError: It is not there, or no BLIP.
    """
    import transformers

    local = not download
    files = "config.json, model.safetensors, preprocessor_config.json and the tokenizer's files"
    with explained_opening("caption model", source, files, "models/BLIP"):
        model_type(source, ("blip",), download=download)
        network, loaded = transformers.BlipForConditionalGeneration.from_pretrained(
            source, local_files_only=local, output_loading_info=True
        )
        processor = pillow_processor("BlipImageProcessor").from_pretrained(source, local_files_only=local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
    missing = sorted(name for name in loaded["missing_keys"] if ".layer" in name)  # not tied or computed ones
    if missing:  # of a BLIP that compares; transformers would caption by random weights
        raise WeightsError(
            f"{source} has no {missing[0]} ({len(missing)} tensors are missing), so it can't write captions.",
            "Give a BLIP for captions, such as Salesforce/blip-image-captioning-base.",
        )
    with explained_memory_errors(_LOWER):
        to_device(network, device, torch.float32)
    return Captioner(title_of(source), network.eval(), processor, tokenizer)


def apply_template(caption: str, settings: CaptionSettings) -> str:
    """BLIP's words with the subject's: "a dog on a sofa" → "a sks dog on a sofa".

    The rare word stands where the template says {token}; else before the class noun in the caption; else it and the
    class noun stand in front. A caption that has it already keeps it.
    """
    token, noun = (" ".join(words.split()) for words in (settings.token, settings.class_noun))
    if token and "{token}" not in settings.template:
        caption = _with_token(caption, token, noun)
    filled = {"caption": caption, "token": token, "class": noun}
    made = " ".join(re.sub(r"\{(\w+)\}", lambda to_device: filled[to_device[1]], settings.template).split())
    return made.rstrip(" ,")  # of a caption without words


def _with_token(caption: str, token: str, noun: str) -> str:
    if _as_word(token).search(caption):
        return caption
    found = re.search(rf"(\b(?:a|an)\s+)?{_as_word(noun).pattern}", caption, re.IGNORECASE) if noun else None
    if found is None:
        return ", ".join(part for part in (" ".join((token, noun)).strip(), caption) if part)
    before = f"{article(token)} " if found[1] else ""
    return f"{caption[: found.start()]}{before}{token} {found[0][len(found[1] or '') :]}{caption[found.end() :]}"


def _as_word(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)


def caption_pictures(
    captioner: Captioner, pictures: Sequence[Picture], settings: CaptionSettings, listener: Listener
) -> Iterator[tuple[Picture, str]]:
    """Captions one after the other; pictures that can't be opened are left out.

    Args:
        captioner: The model.
        pictures: Opened when their turn comes.
        settings: Words and search.
        listener: Told of the progress and of what is left out; may stop the work.

    Raises:
        CancelledError: The listener asked to stop.
        OutOfMemoryError: The memory does not suffice.
        SettingsError: The text is longer than the model reads.
    """
    for start in range(0, len(pictures), BATCH):
        listener.report(Phase("captions", start, len(pictures)))
        stop_if_asked(listener)
        opened = list(_opened(pictures[start : start + BATCH], listener))
        images = [image for _, image in opened]
        found = captioner.describe(images, settings.text, beams=settings.beams, max_tokens=settings.max_tokens)
        for (picture, _), words in zip(opened, found, strict=True):
            yield picture, apply_template(words, settings)
    listener.report(Phase("captions", len(pictures), len(pictures)))


def _opened(pictures: Sequence[Picture], listener: Listener) -> Iterator[tuple[Picture, Image.Image]]:
    for picture in pictures:
        try:
            yield picture, picture.open()
        except ValueError as error:
            listener.report(Note(f"{picture.name} is left out: {error}.", warning=True))


def caption_folder(settings: CaptionCommand, listener: Listener) -> dict[str, str]:
    """Write a text file beside every picture of a folder.

    Args:
        settings: Folder, model and words.
        listener: Told of the progress and of what is left out; may stop the work, what is written remains.

    Returns:
        File name of each captioned picture → its caption.

    Raises:
        PicturesError: The folder is missing, a zip file, or holds no pictures.
        StorageError: It can't be written.
        WeightsError: The model can't be opened, or is no BLIP.
        CancelledError: The listener asked to stop.
    """
    files = _to_caption(settings.images, settings.overwrite, listener)
    if not files:
        return {}
    require_writable(settings.images, 4096 * len(files))
    captioner = open_captioner(settings.model, pick_device(settings.device), download=settings.download)
    pictures = [Picture(file.name, "", "", partial(_decoded, file)) for file in files]
    done: dict[str, str] = {}
    for picture, caption in caption_pictures(captioner, pictures, settings, listener):
        if not caption:
            listener.report(Note(f"{picture.name} gets no caption: the model has no words for it.", warning=True))
            continue
        write_atomic((settings.images / picture.name).with_suffix(".txt"), f"{caption}\n".encode())
        done[picture.name] = caption
    return done


def _decoded(file: Path) -> Image.Image:
    try:
        return decode(file.read_bytes())
    except OSError as error:
        raise ValueError(f"it can't be read ({error.strerror})") from error


def _to_caption(folder: Path, overwrite: bool, listener: Listener) -> list[Path]:
    """The pictures of a folder that get a caption."""
    if os.path.isfile(folder):
        raise PicturesError(f"{folder} is a file.", "Give a folder; unpack a zip file first, and give its folder.")
    if not os.path.isdir(folder):
        raise PicturesError(f"The picture folder {folder} does not exist.", "Check the path for a typing error.")
    try:
        pictures = [folder / name for name in picture_names(folder)]
    except OSError as error:
        raise PicturesError(f"{folder} can't be read: {error.strerror}.", "Check that you may read it.") from error
    if not pictures:
        raise PicturesError(f"The folder {folder} holds no pictures.", "Put pictures into it, or give another folder.")
    first: dict[Path, Path] = {}
    for file in pictures:
        shared = first.setdefault(file.with_suffix(".txt"), file)
        if shared != file:
            text = f"{file.name} is left out: its caption would stand where that of {shared.name} does. Rename one."
            listener.report(Note(text, warning=True))
    wanted = [file for text, file in first.items() if overwrite or not os.path.lexists(text)]
    if len(wanted) < len(first):
        kept = len(first) - len(wanted)
        listener.report(Note(f"{kept} of {len(first)} pictures have captions already; they stay."))
    return wanted
