"""Subject: the pictures to learn from, and the prompts for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..trainer.core.errors import PicturesError
from ..trainer.core.prompts import PromptWords, article, split_prompts, without_token
from ..trainer.data.folder import AnnotationOptions, CaptionSource, MaskSource
from ..trainer.settings.data import PictureSettings
from . import host
from .api import io
from .base import Node
from .host_progress import NodeListener
from .widgets import CATEGORY, SUBJECT, as_setting, widget


@dataclass(frozen=True)
class SubjectValue:
    """What a DREAMBOOTH_SUBJECT wire carries.

    Attributes:
        pictures: The engine's `Picture`s, checked.
        instance_prompt: Caption of pictures without their own.
        class_prompt: The same without the rare word.
        token: The rare word.
        class_prompts: Class prompts of all chained subjects, in their order: one for each, also if they are the same.
        words: What {token} and {class} stand for with each of the chained subjects.
    """

    pictures: tuple[Any, ...]
    instance_prompt: str
    class_prompt: str
    token: str
    class_prompts: tuple[str, ...]
    words: tuple[PromptWords, ...] = ()


class Subject(Node):
    """Loads the subject's pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        return io.Schema(
            node_id="DreamBoothSubject",
            display_name="Subject (DreamBooth)",
            category=CATEGORY,
            description="Loads the pictures of one subject and the words for it in prompts. Chain several to train "
            "them in one run.",
            search_aliases=["training images", "dataset", "load images", "dreambooth", "instance images"],
            inputs=[
                as_setting(
                    "images",
                    io.Combo.Input(
                        "folder",
                        options=host.subject_folders(),
                        tooltip="Folder or zip file in ComfyUI's input folder with 3 to 20 pictures. A text file of "
                        "the same name holds a picture's own caption. Press R to refresh the list.",
                    ),
                ),
                io.String.Input(
                    "token",
                    default="sks",
                    tooltip="Rare word for the subject that the model does not know yet, such as sks.",
                ),
                io.String.Input("class_noun", default="dog", tooltip="What the subject is: dog, backpack, man, toy …"),
                as_setting(
                    "instance_prompt",
                    io.String.Input(
                        "caption",
                        default="a photo of {token} {class}",
                        tooltip="Caption of the pictures; {token} and {class} stand for the words above. Separate "
                        "several with '|' to have one picked at random for each sample.",
                        advanced=True,
                    ),
                ),
                io.Image.Input("images", optional=True, tooltip="Pictures from other nodes, used instead of a folder."),
                SUBJECT.Input(
                    "subject", optional=True, tooltip="Another Subject node, to learn several subjects in one run."
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="Captions for the connected images, one per line, for example from Caption Images.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Masks for the connected images, white where the subject is. Load Image's masks are the "
                    "other way round: put InvertMask in between.",
                ),
                widget(PictureSettings, "captions", id="captions_from", optional=True),
                widget(PictureSettings, "masks", id="masks_from", optional=True),
                widget(PictureSettings, "repeats", optional=True),
            ],
            outputs=[
                SUBJECT.Output(display_name="subject", tooltip="For Train LoRA and Class Priors."),
                io.String.Output(display_name="instance_prompt", tooltip="Prompt that calls for the subject."),
                io.String.Output(display_name="class_prompt", tooltip="The same prompt without the rare word."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str = "", **_: Any) -> str:
        """A text that changes with the folder's files."""
        if folder in ("", host.NO_FOLDER):
            return ""
        return host.folder_stamp(host.input_path(folder))

    @classmethod
    def execute(
        cls,
        folder: str,
        token: str,
        class_noun: str,
        caption: str,
        images: Any = None,
        subject: SubjectValue | None = None,
        captions: str = "",
        mask: Any = None,
        captions_from: CaptionSource = "files",
        masks_from: MaskSource = "files",
        repeats: int = 1,
    ) -> io.NodeOutput:
        """Read and check the pictures."""
        from ..trainer.data.images import load_pictures

        connected = folder == host.NO_FOLDER
        if connected and images is None:
            raise PicturesError("No pictures were chosen.", "Choose a folder, or connect pictures to 'images'.")
        if not connected and (captions.strip() or mask is not None):
            raise PicturesError(
                "Captions or masks are connected, but the pictures come from a folder.",
                "Connect pictures to 'images' and choose no folder, or put text files and masks into the folder.",
            )
        options = AnnotationOptions(
            captions=captions_from, masks=masks_from, repeats=repeats, token=token, class_noun=class_noun
        )
        prompts = [" ".join(prompt.split()) for prompt in options.prompts(caption, "The caption")]
        pictures = load_pictures(
            list(images) if connected else host.input_path(folder),
            " | ".join(prompts),
            NodeListener(cls),
            options,
            captions=[line for line in captions.splitlines() if line.strip()],
            masks=[] if mask is None else list(mask),
        )
        class_prompt = _class_prompt((split_prompts(caption) or [""])[0], token, class_noun)
        chained_pictures = subject.pictures if subject else ()
        chained_class_prompts = subject.class_prompts if subject else ()
        value = SubjectValue(
            pictures=(*chained_pictures, *pictures),
            instance_prompt=prompts[0] if prompts else "",
            class_prompt=class_prompt,
            token=token.strip(),
            class_prompts=(*chained_class_prompts, class_prompt),
            words=(*(subject.words if subject else ()), PromptWords(token.strip(), class_noun.strip())),
        )
        return io.NodeOutput(value, value.instance_prompt, value.class_prompt)


def _class_prompt(caption: str, token: str, class_noun: str) -> str:
    """The caption without the rare word, with the article that the noun wants: a photo of a dog."""
    noun = class_noun.strip()
    usual_start = "{token} {class}"
    if caption.startswith(usual_start):
        caption = f"{article(noun)} {noun}{caption.removeprefix(usual_start)}"
    prompt = without_token(caption.replace("{class}", noun), "{token}")
    return " ".join(without_token(prompt.replace("{token}", ""), token).split())
