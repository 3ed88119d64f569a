"""Captions by BLIP (Li et al. 2022, "BLIP: Bootstrapping Language-Image Pre-training"), written as text files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..core.devices import explained_memory_errors, pick_device, to_device
from ..core.errors import PicturesError, SettingsError, WeightsError, suggest
from ..core.events import Listener, Note, Phase, stop_if_asked
from ..core.files import require_writable, write_atomic
from ..core.prompts import article
from ..models.hub import explained_opening, model_type, pillow_processor, source_title
from ..settings.caption import CaptionCommand, CaptionSettings
from .captions import Captions, stem_of
from .decoding import decode
from .folder import select_pictures
from .images import Picture
from .tree import TreeFile, UnreadableFileError, opened_tree

BATCH = 8  # pictures per forward pass
_WHAT_TO_LOWER = f"{suggest('beams')}, or compute on the CPU"


@dataclass(frozen=True)
class Captioner:
    """A BLIP model that describes images.

    Attributes:
        name: Folder or hub name.
        network: transformers' BlipForConditionalGeneration, in float32.
        processor: Images → pixels, the model's own.
        tokenizer: Text ↔ tokens, the model's own.
    """

    name: str
    network: Any
    processor: Any
    tokenizer: Any

    @torch.no_grad()
    def describe(self, images: Sequence[Image.Image], text: str = "", *, beams: int, max_tokens: int) -> list[str]:
        """A caption of each image, by greedy or beam search, without sampling.

        Args:
            images: RGB, of any size.
            text: The beginning of each caption; part of the result.
            beams: Number of beams of beam search; 1 is greedy.
            max_tokens: Of the longest caption, not counting `text`.

        Raises:
            OutOfMemoryError: A batch does not fit.
            SettingsError: `text` is too long for the model.
        """
        with explained_memory_errors(_WHAT_TO_LOWER):
            return [
                caption
                for start in range(0, len(images), BATCH)
                for caption in self._describe_batch(images[start : start + BATCH], text, beams, max_tokens)
            ]

    def _describe_batch(self, images: Sequence[Image.Image], text: str, beams: int, max_tokens: int) -> list[str]:
        device = next(self.network.parameters()).device
        inputs = {"pixel_values": self.processor(list(images), return_tensors="pt")["pixel_values"].to(device)}
        free_tokens = int(self.network.config.text_config.max_position_embeddings) - 1
        if text.strip():
            prompts = [" ".join(text.split())] * len(images)
            inputs |= self.tokenizer(prompts, return_tensors="pt", return_token_type_ids=False).to(device)
            free_tokens -= inputs["input_ids"].shape[1]
        if free_tokens < 1:
            raise SettingsError(f"text is too long for {self.name}: {text[:40]} …", "Use only a few words.")
        sequences = self.network.generate(
            **inputs, num_beams=beams, do_sample=False, max_new_tokens=min(max_tokens, free_tokens)
        )
        captions = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in sequences)
        return [" ".join(caption.split()) for caption in captions]


def open_captioner(source: str, device: torch.device, *, download: bool = False) -> Captioner:
    """Open a BLIP model.

    Args:
        source: A folder as transformers writes it, or a hub name.
        device: Where it computes.
        download: Whether a hub name may be fetched; otherwise only what the hub's cache holds is used.

    Raises:
        WeightsError: It does not exist, or is not a BLIP captioning model.
    """
    import transformers

    local_files_only = not download
    files = "config.json, model.safetensors, preprocessor_config.json and the tokenizer's files"
    with explained_opening("caption model", source, files, "models/BLIP"):
        model_type(source, ("blip",), download=download)
        network, loading_info = transformers.BlipForConditionalGeneration.from_pretrained(
            source, local_files_only=local_files_only, output_loading_info=True
        )
        processor = pillow_processor("BlipImageProcessor").from_pretrained(source, local_files_only=local_files_only)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
    missing = sorted(name for name in loading_info["missing_keys"] if ".layer" in name)  # not tied or computed ones
    if missing:  # a BLIP for retrieval; transformers would write captions with random weights
        raise WeightsError(
            f"{source} lacks the tensor {missing[0]} ({len(missing)} are missing), so it can't generate captions.",
            "Use a BLIP captioning model, such as Salesforce/blip-image-captioning-base.",
        )
    with explained_memory_errors(_WHAT_TO_LOWER):
        to_device(network, device, torch.float32)
    return Captioner(source_title(source), network.eval(), processor, tokenizer)


def apply_template(caption: str, settings: CaptionSettings) -> str:
    """BLIP's caption with the subject's words: "a dog on a sofa" → "a sks dog on a sofa".

    The rare word replaces {token} in the template; else it goes before the class noun in the caption; else it and the
    class noun go in front. A caption that already has it is left alone.
    """
    caption = " ".join(re.sub("[|{}]", " ", caption).split())  # these mean something else in a prompt
    token = " ".join(settings.token.split())
    noun = " ".join(settings.class_noun.split())
    if token and "{token}" not in settings.template:
        caption = _with_token(caption, token, noun)
    values = {"caption": caption, "token": token, "class": noun}
    filled = re.sub(r"\{(\w+)\}", lambda placeholder: values[placeholder[1]], settings.template)
    return " ".join(filled.split()).rstrip(" ,")  # of a caption without words


def _with_token(caption: str, token: str, noun: str) -> str:
    """The caption with the rare word before the class noun, or with both in front."""
    if _as_word(token).search(caption):
        return caption
    match = re.search(rf"(\b(?:a|an)\s+)?{_as_word(noun).pattern}", caption, re.IGNORECASE) if noun else None
    if match is None:
        subject = f"{token} {noun}".strip()
        return f"{subject}, {caption}" if caption else subject
    found_article = match[1] or ""
    found_noun = match[0][len(found_article) :]
    new_article = f"{article(token)} " if found_article else ""
    return f"{caption[: match.start()]}{new_article}{token} {found_noun}{caption[match.end() :]}"


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
        listener: Gets the progress and warnings of what is left out; may stop the work.

    Raises:
        CancelledError: The listener asked to stop.
        OutOfMemoryError: A batch does not fit.
        SettingsError: The text is too long for the model.
    """
    for start in range(0, len(pictures), BATCH):
        listener.report(Phase("captions", start, len(pictures)))
        stop_if_asked(listener)
        opened = list(_open_pictures(pictures[start : start + BATCH], listener))
        captions = captioner.describe(
            [image for _, image in opened], settings.text, beams=settings.beams, max_tokens=settings.max_tokens
        )
        for (picture, _), caption in zip(opened, captions, strict=True):
            yield picture, apply_template(caption, settings)
    listener.report(Phase("captions", len(pictures), len(pictures)))


def _open_pictures(pictures: Sequence[Picture], listener: Listener) -> Iterator[tuple[Picture, Image.Image]]:
    for picture in pictures:
        try:
            yield picture, picture.open()
        except ValueError as error:
            listener.report(Note(f"{picture.name} is skipped: {error}.", warning=True, picture=picture.name))


def caption_folder(settings: CaptionCommand, listener: Listener) -> dict[str, str]:
    """Write a text file next to every picture of a folder.

    Args:
        settings: Folder, model and words.
        listener: Gets the progress and warnings of skipped pictures; may stop the work; written captions are kept.

    Returns:
        File name of each captioned picture → its caption.

    Raises:
        PicturesError: The folder is missing, a zip file, or contains no pictures.
        StorageError: It can't be written.
        WeightsError: The model can't be opened, or is not a BLIP.
        CancelledError: The listener asked to stop.
    """
    targets = _pictures_to_caption(settings.images, settings.overwrite, listener)
    if not targets:
        return {}
    for folder in dict.fromkeys(target.parent for _, target in targets):
        require_writable(folder, 4096 * len(targets))
    captioner = open_captioner(settings.model, pick_device(settings.device), download=settings.download)
    pictures = [Picture(file.name, caption="", digest="", open=partial(_decode_file, file)) for file, _ in targets]
    target_of = {file.name: target for file, target in targets}
    written: dict[str, str] = {}
    for picture, caption in caption_pictures(captioner, pictures, settings, listener):
        if not caption:
            text = f"{picture.name} gets no caption: the model generated none."
            listener.report(Note(text, warning=True, picture=picture.name))
            continue
        write_atomic(target_of[picture.name], f"{caption}\n".encode())
        written[picture.name] = caption
    return written


def _decode_file(file: TreeFile) -> Image.Image:
    try:
        return decode(file.read())
    except UnreadableFileError as error:
        raise ValueError(str(error)) from error


def _pictures_to_caption(folder: Path, overwrite: bool, listener: Listener) -> list[tuple[TreeFile, Path]]:
    """The pictures of a folder that get a caption, each with the text file that it goes into.

    Raises:
        PicturesError: The folder is missing, a file, unreadable, or holds no pictures; or a caption can't be read.
    """
    with opened_tree(folder) as tree:
        if tree.is_archive:
            raise PicturesError(f"{folder} is a file.", "Use a folder; if this is a zip file, unpack it first.")
        selection = select_pictures(tree, listener)
        captions = selection.captions(listener)
    first_of: dict[str, TreeFile] = {}
    for file in selection.pictures:
        first = first_of.setdefault(unicodedata.normalize("NFC", stem_of(file.name)).casefold(), file)
        if first != file:
            text = f"{file.name} is skipped: its caption would overwrite that of {first.name}. Rename one of the two."
            listener.report(Note(text, warning=True, picture=file.name))
    pictures = list(first_of.values())
    captioned = {*captions.own, *captions.unreadable}
    to_caption = [file for file in pictures if overwrite or file.name not in captioned]
    if len(to_caption) < len(pictures):
        text = f"{len(pictures) - len(to_caption)} of {len(pictures)} pictures already have captions, which are kept."
        listener.report(Note(text))
    return [(file, _text_file(file, captions)) for file in to_caption]


def _text_file(picture: TreeFile, captions: Captions) -> Path:
    """The file that a picture's caption goes into: the one that is read first, or a new one of the same name."""
    path = captions.text_files.get(picture.name, picture).path
    assert path is not None  # nothing is written into a zip file
    return path.with_suffix(path.suffix if picture.name in captions.text_files else ".txt")
