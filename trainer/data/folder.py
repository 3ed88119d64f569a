"""The pictures of a folder or zip file, with their captions, masks and repeats.

`opened_tree` presents both in the same way, and only names decide what a file is. So a folder and a zip file of it give
the same result.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from ..core.errors import PicturesError, suggest
from ..core.events import Listener, Note, SilentListener
from ..core.prompts import PromptError, PromptWords, parse_prompts, split_prompts, without_token
from ..core.text import listed
from .captions import Captions, NameIndex, is_metadata, read_captions, stem_of, words_of_name
from .tree import FileTree, TreeFile, UnreadableFileError, opened_tree, shown_name

CaptionSource = Literal["files", "file-names", "prompt"]
MaskSource = Literal["files", "alpha", "off"]
_RAW_ENDINGS = {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"}  # of cameras
_FOREIGN_ENDINGS = {".heic", ".heif", ".avif", ".jxl", ".svg", *_RAW_ENDINGS}
_REPEATED = re.compile(r"(\d{1,3})_(.*\S)")  # kohya's folders: "10_sks dog"; longer numbers are years and dates
_KOHYAS_CLASS_FOLDER = "reg"
_FEW_PICTURES = 3  # fewer are hardly a subject's
_MASK_ENDINGS = ("-masklabel", "_mask", ".mask")
_MASK_FOLDER = "masks"


@dataclass(frozen=True)
class AnnotationOptions:
    """Where the captions and masks of a subject's pictures come from, and how often the pictures are repeated.

    Attributes:
        captions: "files": from text files of the same name, metadata.jsonl or metadata.csv; "file-names": the pictures'
            names; "prompt": the prompt for all.
        masks: "files": from files next to the pictures; "alpha": from these or the pictures' transparency; "off".
        repeats: How often a picture is used in an epoch.
        token: The value of {token} in captions; None: there is no such setting.
        class_noun: The value of {class}, likewise.
        keep_templates: Whether {token} and {class} stay as they are, for captions that are only shown.
        class_prompt: What the pictures show, without the rare word; empty: the captions without {token}.
    """

    captions: CaptionSource = "files"
    masks: MaskSource = "files"
    repeats: int = 1
    token: str | None = None
    class_noun: str | None = None
    keep_templates: bool = False
    class_prompt: str = ""

    def prompts(self, text: str, subject: str) -> list[str]:
        """The captions in a text, each on one line.

        Args:
            text: See `parse_prompts`.
            subject: What the text is, for the error: "The prompt".

        Raises:
            PicturesError: A template in it is unknown, or has no value.
        """
        try:
            prompts = (
                split_prompts(text)
                if self.keep_templates
                else parse_prompts(text, PromptWords(self.token, self.class_noun))
            )
        except PromptError as error:
            raise PicturesError(f"{subject} {error.problem}.", error.remedy) from error
        return prompts

    def class_captions(self, captions: Sequence[str]) -> tuple[str, ...]:
        """What a picture with those captions shows to a model that doesn't know the subject; empty if unknown."""
        if self.class_prompt.strip():
            return tuple(split_prompts(self.class_prompt))
        token = (self.token or "").strip()
        shown = dict.fromkeys(without_token(caption, token) for caption in captions)
        return () if any(caption in shown for caption in captions) else tuple(shown)


@dataclass(frozen=True)
class PictureFile:
    """A picture file.

    Attributes:
        name: Its name, relative to the folder or zip file, with slashes.
        digest: Hexadecimal SHA-256 of its content.
        read: Reads its content. Raises PicturesError if it is missing or has changed since.
        captions: Its own captions, or those of its folder; empty if it has none.
        mask: Its mask's content; None without.
        repeats: How often it is used in an epoch.
    """

    name: str
    digest: str
    read: Callable[[], bytes]
    captions: tuple[str, ...]
    mask: bytes | None
    repeats: int


@dataclass(frozen=True)
class PictureSelection:
    """Which files of a folder or zip file are a subject's pictures.

    Attributes:
        pictures: The picture files, ordered by name.
        mask_of: Picture → its mask.
        folders: The folders that the pictures lie in.
        beside: The other files in these, and in folders without pictures in these.
        metadata: The metadata files in these and in the folders above them.
    """

    pictures: list[TreeFile]
    mask_of: Mapping[str, TreeFile]
    folders: list[str]
    beside: list[TreeFile]
    metadata: list[TreeFile]

    def captions(self, listener: Listener) -> Captions:
        """The captions of the pictures in files; see `read_captions`."""
        return read_captions([file.name for file in self.pictures], self.beside, self.metadata, listener)


def is_picture(name: str) -> bool:
    """Whether a file has a picture's file extension, even of a format that can't be read."""
    ending = PurePosixPath(name).suffix.lower()
    return ending in _FOREIGN_ENDINGS or ending in Image.registered_extensions()


def find_picture_files(
    path: Path, options: AnnotationOptions, prompt: str, listener: Listener
) -> tuple[list[PictureFile], list[str]]:
    """The picture files of a folder or zip file, ordered by name, and why others can't be read.

    Args:
        path: The folder or zip file; see `select_pictures`.
        options: Where captions and masks come from.
        prompt: What replaces an empty caption, for messages.
        listener: Gets warnings about files that were skipped or look wrong.

    Raises:
        PicturesError: The path does not exist or can't be read, contains no pictures, or a caption can't be used.
    """
    with opened_tree(path) as tree:
        selection = select_pictures(tree, listener)
        captions = selection.captions(listener) if options.captions == "files" else Captions()
        _report_kohyas_name(tree, selection, options, listener)
        _report_counters(selection, options, listener)
        return _read_pictures(tree, selection, captions, options, prompt, listener)


def picture_names(folder: Path) -> list[str]:
    """Names of the pictures in a folder, without its masks, as `PictureFile.name`; none of them is opened."""
    try:
        with opened_tree(folder) as tree:
            return [file.name for file in select_pictures(tree, SilentListener()).pictures]
    except PicturesError:
        return []


def select_pictures(tree: FileTree, listener: Listener) -> PictureSelection:
    """Find a subject's pictures among the files of a folder or zip file.

    The deepest folder that contains all pictures is searched. If three or more are directly in it, these are
    the subject's; else those in folders named as for kohya's trainer (repeats, underscore, caption); else all.

    Args:
        tree: The files.
        listener: Gets warnings about pictures that are left out.

    Raises:
        PicturesError: There are no pictures.
    """
    for sentence in tree.left_out:
        listener.report(Note(sentence, warning=True))
    counts = Counter(_folder_of(name) for name in tree.files if is_picture(name))
    with_pictures = {folder: counts[folder] for folder in sorted(counts) if not _is_mask_folder(folder, counts)}
    if not with_pictures:
        raise PicturesError(f"{tree.location} contains no pictures.", "Put 3 to 20 pictures of the subject into it.")
    folders = _chosen_folders(tree, with_pictures, listener)
    inside = {*folders, *(folder for folder in counts if _is_mask_folder(folder, folders))}
    image_names = [name for name in tree.files if is_picture(name) and _folder_of(name) in inside]
    mask_of, masks = _find_masks(image_names)
    unused = sorted(masks - set(mask_of.values()))
    if unused:
        verb = "is" if len(unused) == 1 else "are"
        text = f"{listed(unused)} {verb} named like a mask, but no picture uses it; it is ignored."
        if len(unused) > 1:
            text = f"{listed(unused)} {verb} named like masks, but no pictures use them; they are ignored."
        listener.report(Note(text, warning=True, picture=unused[0] if len(unused) == 1 else ""))
    return PictureSelection(
        pictures=[tree.files[name] for name in image_names if name not in masks],
        mask_of={picture: tree.files[mask] for picture, mask in mask_of.items()},
        folders=folders,
        beside=[file for name, file in tree.files.items() if _lies_beside(name, folders, with_pictures)],
        metadata=[
            file
            for name, file in tree.files.items()
            if is_metadata(name) and any(_is_within(folder, _folder_of(name)) for folder in folders)
        ],
    )


def _folder_of(name: str) -> str:
    """The folder that a file lies in; empty at the top."""
    return name.rpartition("/")[0]


def _is_within(folder: str, other: str) -> bool:
    """Whether a folder is another one, or lies in it."""
    return not other or folder == other or folder.startswith(f"{other}/")


def _is_mask_folder(folder: str, with_pictures: Collection[str]) -> bool:
    """Whether a folder of pictures holds the masks of the pictures beside it."""
    return PurePosixPath(folder).name.lower() == _MASK_FOLDER and _folder_of(folder) in with_pictures


def _lies_beside(name: str, folders: Collection[str], with_pictures: Collection[str]) -> bool:
    """Whether a file lies in one of these folders, or in a folder without pictures in one of them."""
    folder = _folder_of(name)
    if folder in folders:
        return True
    is_apart = folder in with_pictures or _is_mask_folder(folder, folders)
    return bool(folder) and _folder_of(folder) in folders and not is_apart


def _chosen_folders(tree: FileTree, counts: Mapping[str, int], listener: Listener) -> list[str]:
    """The folders whose pictures are the subject's; of the others the listener hears.

    Args:
        tree: The files.
        counts: Folder → number of its pictures.
        listener: Gets warnings.
    """
    top = posixpath.commonpath(list(counts))
    repeated = [folder for folder in counts if _REPEATED.fullmatch(PurePosixPath(folder).name)]
    of_class = [folder for folder in repeated if _KOHYAS_CLASS_FOLDER in _folder_of(folder).lower().split("/")]
    unwanted = {*of_class, *(folder for folder in repeated if not int(PurePosixPath(folder).name.partition("_")[0]))}
    if counts.get(top, 0) >= _FEW_PICTURES or len(counts) == 1:
        chosen = [top]
    else:
        others = [folder for folder in counts if folder not in unwanted]
        chosen = [folder for folder in repeated if folder not in unwanted] or others or list(counts)
    left_out = [folder for folder in counts if folder not in chosen]
    where = listed([folder or f"{tree.title} itself" for folder in chosen])
    if left_out:
        pictures = listed([f"{folder or f'{tree.title} itself'} ({counts[folder]})" for folder in left_out])
        text = f"The pictures in {pictures} are ignored; only those in {where} are used."
        if any(folder in left_out for folder in of_class):
            text += f" For class pictures, use {suggest('class_images')}."
        listener.report(Note(text, warning=True))
    elif len(chosen) > 1 and chosen[0] not in repeated:
        text = f"The pictures in {where} are all used as pictures of one subject."
        listener.report(Note(text, warning=True))
    return chosen


def _find_masks(names: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """Picture → its mask: x.jpg → x-masklabel.png, x_mask.png, x.mask.png or masks/x.png; and all that are masks.

    What lies in a folder of masks beside pictures, or ends with -masklabel, is a mask also where no picture goes with
    it: nobody wants to train on it.
    """
    by_stem = NameIndex((stem_of(name), name) for name in names)
    mask_stems = {name: _mask_stems(name) for name in names}
    folders = {_folder_of(name) for name in names}
    masks = {
        name
        for name in names
        if _is_mask_folder(_folder_of(name), folders) or _ends_like_a_mask(name, _MASK_ENDINGS[:1])
    }
    masks |= {mask for stems in mask_stems.values() for stem in stems for mask in by_stem.all(stem)}
    mask_of = {}
    for name, stems in mask_stems.items():
        candidates = [mask for stem in stems for mask in by_stem.all(stem)]
        if candidates and name not in masks:
            mask_of[name] = candidates[0]
    return mask_of, masks


def _mask_stems(name: str) -> list[str]:
    """Names, without ending, that the mask of a picture may have; the first that exists is taken."""
    stem = PurePosixPath(stem_of(name))
    return [*(f"{stem}{ending}" for ending in _MASK_ENDINGS), str(stem.parent / _MASK_FOLDER / stem.name)]


def _ends_like_a_mask(name: str, endings: Sequence[str]) -> bool:
    return stem_of(name).lower().endswith(tuple(endings))


def _read_pictures(
    tree: FileTree,
    selection: PictureSelection,
    captions: Captions,
    options: AnnotationOptions,
    prompt: str,
    listener: Listener,
) -> tuple[list[PictureFile], list[str]]:
    """Read every picture once, with its caption and mask; the content of a zip file's is kept."""
    pictures = []
    problems = []
    several_lines: list[str] = []
    for file in selection.pictures:
        name = file.name
        try:
            if name in captions.unreadable:
                raise UnreadableFileError(captions.unreadable[name])
            content = file.read()
            mask = selection.mask_of[name].read() if name in selection.mask_of and options.masks != "off" else None
        except UnreadableFileError as error:
            problems.append(f"{name}: {error}")
            listener.report(Note(f"{name} is skipped: {error}.", warning=True, picture=name))
            continue
        own_captions = _captions_of(file, tree, captions, options)
        if name in captions.empty:
            text = f"{captions.empty[name]} is empty; '{[*own_captions, prompt][0]}' is used instead."
            listener.report(Note(text, warning=True, picture=name))
        if name in captions.own and len(captions.own[name].text.splitlines()) > 1 and len(own_captions) > 1:
            several_lines.append(captions.own[name].source)
        digest = hashlib.sha256(content).hexdigest()
        pictures.append(
            PictureFile(
                name=name,
                digest=digest,
                read=partial(bytes, content) if tree.is_archive else partial(_read_again, file, digest),
                captions=own_captions,
                mask=mask,
                repeats=options.repeats * _folder_repeats(name, tree),
            )
        )
    if several_lines:
        text = f"{listed(several_lines)}: each line is a separate caption, and each sample uses one of them."
        listener.report(Note(text))
    return pictures, problems


def _read_again(file: TreeFile, digest: str) -> bytes:
    """The content of a file that was read before.

    Raises:
        PicturesError: It is gone, can't be read, or is another.
    """
    shown = shown_name(str(file.path))
    try:
        content = file.read()
    except UnreadableFileError as error:
        raise PicturesError(
            f"{shown} was readable when the pictures were checked, but now {error}.",
            "Restore it and don't change the pictures until training ends, or start again without it.",
        ) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise PicturesError(
            f"{shown} has changed since the pictures were checked.",
            "Start again, and don't change the pictures until training ends.",
        )
    return content


def _captions_of(file: TreeFile, tree: FileTree, captions: Captions, options: AnnotationOptions) -> tuple[str, ...]:
    """The captions of a picture by its files, its name or its folder's name; empty if it has none.

    Raises:
        PicturesError: One of them can't be used.
    """
    if options.captions == "prompt":
        return ()
    if options.captions == "file-names":
        _require_text(PurePosixPath(file.raw_name).name)
        text, subject = words_of_name(file.name)[0], f"The name {file.name}"
    elif own := captions.own.get(file.name):
        text, subject = own.text, f"The caption of {file.name} in {own.source}"
    elif folder := _repeated_folder(file.name, tree):
        _require_text(PurePosixPath(_folder_of(file.raw_name)).name or tree.raw_title)
        text, subject = folder[2], f"The name of the folder {folder[0]}"
    else:
        return ()
    return tuple(" ".join(prompt.split()) for prompt in options.prompts(text, subject))


def _require_text(name: str) -> None:
    """Check that a name can be a caption.

    Raises:
        PicturesError: It holds bytes that are no text.
    """
    shown = shown_name(name)
    if shown != name:
        raise PicturesError(
            f"The name {shown} contains bytes that are not valid text, so it can't be used as a caption.",
            f"Rename it, or use the prompt as the caption of every picture: {suggest('captions', 'prompt')}.",
        )


def _folder_repeats(name: str, tree: FileTree) -> int:
    """How often a picture is repeated by its folder's name: 10 for "10_sks dog/1.png"; 0 counts as 1."""
    folder = _repeated_folder(name, tree)
    return (int(folder[1]) or 1) if folder else 1


def _repeated_folder(name: str, tree: FileTree) -> re.Match[str] | None:
    """Repeats and caption in the name of a picture's folder, if it is one of kohya's; also of the whole tree's."""
    return _REPEATED.fullmatch(PurePosixPath(_folder_of(name)).name or tree.title)


def _report_kohyas_name(
    tree: FileTree, selection: PictureSelection, options: AnnotationOptions, listener: Listener
) -> None:
    """Say so if the name of the given folder itself is read as kohya's trainer reads it."""
    match = _REPEATED.fullmatch(tree.title)
    if match and "" in selection.folders:
        caption = f", with the caption '{match[2]}'" if options.captions == "files" else ""
        listener.report(
            Note(f"The name of {tree.title} means that its pictures are repeated {int(match[1]) or 1} times{caption}.")
        )


def _report_counters(selection: PictureSelection, options: AnnotationOptions, listener: Listener) -> None:
    """Say so if numbers at the end of names are left out of captions."""
    if options.captions != "file-names":
        return
    counted = [file.name for file in selection.pictures if words_of_name(file.name)[1]]
    if counted:
        words, number = words_of_name(counted[0])
        text = f"Counters in file names are left out of captions: {counted[0]} becomes '{words}', without {number}."
        listener.report(Note(text))
