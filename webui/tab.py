"""The tab: its widgets, and what pressing them does. What moves (curve, samples, runs) is drawn by `javascript/`."""

from __future__ import annotations

import base64
import functools
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..pages.pictures import checked_pictures
from ..pages.thumbnails import as_thumbnail
from ..trainer.core.errors import PicturesError, TrainerError, worded
from ..trainer.core.events import Note
from ..trainer.core.files import require_writable, write_file, write_folder
from ..trainer.data.images import Picture
from . import host, queue, tools_tab
from .jobs import TRAIN, require_file_name
from .messages import as_html, error_message, saying_errors
from .training_settings import GIVEN_OTHERWISE, PREVIEW_EVERY, prompts_of, refill
from .widgets import element_id, given, settings_of, widget
from .wording import label, wording

_SHOWN_FIRST = ("class_noun", "token", "base", "preset", "name", "steps", "resolution", "prior_count")
_HELP = (Path(__file__).parent / "help.md").read_text(encoding="utf-8")
_LARGEST_REPORT = 24  # pictures that the report shows


def build() -> gr.Blocks:
    """The tab's blocks."""
    with gr.Blocks(analytics_enabled=False) as blocks, gr.Tabs():
        with gr.Tab("Train", elem_id="dreambooth_train"):
            fields = _build_training()
        with gr.Tab("Runs", elem_id="dreambooth_runs"):
            gr.HTML("<div id='dreambooth-runs-panel'></div>")
            asked = gr.Textbox(
                visible=False, elem_id=element_id("settings_of")
            )  # javascript/ writes a run's id into it
            asked.input(functools.partial(_refilled, list(fields)), inputs=[asked], outputs=[asked, *fields.values()])
        with gr.Tab("Tools", elem_id="dreambooth_tools") as tools:
            tools_tab.build(tools)
        with gr.Tab("Help", elem_id="dreambooth_help"):
            gr.Markdown(_HELP)
    for block in blocks.blocks.values():
        block.do_not_save_to_config = True  # by their labels, of which several tools have the same ("Rank")
    return blocks


def _build_training() -> dict[str, Any]:
    """The page of a training; its widgets by name, those that settings go into and the message about them."""
    with gr.Row():
        with gr.Column(scale=1):
            upload = gr.File(
                label="Pictures",
                file_count="multiple",
                file_types=["image", ".txt", ".caption", ".zip"],
                elem_id=element_id("images"),
            )
            folder = gr.Textbox(
                label="Folder",
                placeholder="or the path of a folder or zip file on this computer",
                elem_id=element_id("folder"),
            )
            report = gr.HTML(elem_id=element_id("report"))
            widgets: dict[str, Any] = {}
            for names in (
                ("class_noun", "token"),
                ("base",),
                ("preset", "name"),
                ("steps", "resolution", "prior_count"),
            ):
                with gr.Row():
                    for name in names:
                        widgets[name] = _base_widget() if name == "base" else _training_widget(name)
                    if "base" in names:
                        refresh = gr.Button("⟳", elem_id=element_id("refresh"), scale=0, min_width=40)
            train = gr.Button("Train", variant="primary", elem_id=element_id("start"))
            message = gr.HTML(elem_id=element_id("message"))
            for group, names in _folded().items():
                with gr.Accordion(group, open=False):
                    for name in names:
                        widgets[name] = _training_widget(name)
        with gr.Column(scale=1):
            gr.HTML("<div id='dreambooth-training-panel'></div>")
    for source in (upload, folder):
        source.change(_report, inputs=[upload, folder], outputs=[report])
    refresh.click(_refreshed_bases, inputs=[], outputs=[widgets["base"]])
    names = list(widgets)
    train.click(
        functools.partial(_train, names),
        inputs=[upload, folder, *widgets.values()],
        outputs=[message],
        show_progress="hidden",
    )
    return {"images": upload, "folder": folder, "message": message} | widgets


def _refilled(names: Sequence[str], run: str) -> list[Any]:
    """Put the settings of a run into the fields; an empty text for the one that asked, and a change for each."""
    if not run:
        return [gr.update()] * (1 + len(names))
    try:
        found = refill(run)
    except (TrainerError, ValueError) as error:
        return ["", *(error_message(error) if name == "message" else gr.update() for name in names)]
    notes = "".join(f"<li>{as_html(note)}</li>" for note in found.notes)
    message = f"<p>These are the settings of '{as_html(found.values['name'])}'.</p><ul>{notes}</ul>"
    values = found.values | {"images": None, "folder": found.folder, "message": message}
    return ["", *(gr.update(value=values[name]) if name in values else gr.update() for name in names)]


def _folded() -> dict[str, list[str]]:
    """Group → the settings of it that are not shown at once."""
    groups: dict[str, list[str]] = {}
    for name, setting in settings_of(TRAIN).items():
        if name not in (*_SHOWN_FIRST, *GIVEN_OTHERWISE):
            groups.setdefault(setting["group"], []).append(name)
    return groups


def _base_widget() -> Any:
    titles = host.bases()
    return gr.Dropdown(
        label=label("base"), choices=titles, value=titles[0] if titles else None, elem_id=element_id("base"), scale=4
    )


def _training_widget(name: str) -> Any:
    changes = {"value": PREVIEW_EVERY} if name == "preview_every" else {}
    return widget(settings_of(TRAIN)[name], with_help=name not in _SHOWN_FIRST, **changes)


def _refreshed_bases() -> Any:
    return gr.update(choices=host.refresh_bases())


@saying_errors
def _train(names: Sequence[str], upload: Any, folder: str, *values: Any) -> str:
    """Begin a training; what the page shows below the button."""
    queue.require_ready()
    chosen = dict(zip(names, values))
    changed = given(TRAIN, names, values)
    name = str(chosen.get("name") or "").strip()
    images = _pictures(upload, folder, name, host.data_folder() / "pictures")
    checked_pictures(images)
    base = host.base_file(str(chosen.get("base") or ""))
    require_writable(host.loras_folder(), 0)
    tokenizer = host.tokenizer()
    command = {"tokenizer": str(tokenizer)} if tokenizer else {}
    shown = {"preview_every": int(chosen.get("preview_every") or 0)} | changed
    command |= prompts_of(shown) | shown
    command |= {"name": name, "base": str(base), "images": str(images), "output_dir": str(host.data_folder())}
    words = f"{chosen.get('token') or 'sks'} {chosen.get('class_noun') or ''}".strip()
    queue.submit(queue.jobs().make(TRAIN, name, command, words=words))
    return "<p>Training started. It keeps running if you close this page.</p>"


def _pictures(upload: Any, folder: str, name: str, root: Path) -> Path:
    """The folder or zip file with the pictures; those that were uploaded are copied, each set once.

    Args:
        upload: The files that were uploaded, as gradio gives them.
        folder: What was given instead.
        name: Of the training; "": the copy is called "pictures".
        root: Where copies are made.

    Raises:
        PicturesError: There are none, both were given, or two have the same name.
        SettingsError: The name can't be a folder's.
    """
    files = [Path(getattr(file, "name", file)) for file in upload or []]
    folder = (folder or "").strip().strip('"')
    if files and folder:
        raise PicturesError("Pictures were uploaded, but a folder was also entered.", "Remove one of the two.")
    if not files and not folder:
        raise PicturesError("There are no pictures.", "Drop some on the field above, or enter their folder.")
    if folder:
        return Path(folder).expanduser()
    if name:
        require_file_name(name)
    names = Counter(file.name for file in files)
    if names.most_common(1)[0][1] > 1:
        raise PicturesError(f"Two files are called {names.most_common(1)[0][0]}.", "Rename one of them.")
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.name}\0".encode(errors="surrogateescape") + hashlib.sha256(file.read_bytes()).digest())
    kept = root / f"{name or 'pictures'}-{digest.hexdigest()[:8]}"
    if len(files) == 1 and files[0].suffix.lower() == ".zip":
        kept = kept.with_name(f"{kept.name}.zip")
        return kept if kept.is_file() else write_file(kept, lambda temporary: shutil.copyfile(files[0], temporary))
    if kept.is_dir():
        return kept
    return write_folder(kept, lambda temporary: [shutil.copyfile(file, temporary / file.name) for file in files])


def _report(upload: Any, folder: str) -> str:
    """What a run would find among the pictures."""
    if not upload and not (folder or "").strip():
        return ""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            pictures, warnings = checked_pictures(_pictures(upload, folder, "", Path(scratch)))
        except (TrainerError, ValueError) as error:
            return error_message(error)
        return _shown(pictures, warnings)


def _shown(pictures: Sequence[tuple[Picture, tuple[int, int]]], warnings: Sequence[Note]) -> str:
    """The pictures, small, and what is wrong with them."""
    shown = [
        f"<figure><img alt='{as_html(picture.name)}' src='data:image/jpeg;base64,"
        f"{base64.b64encode(as_thumbnail(picture)).decode()}'><figcaption>{as_html(picture.caption)}</figcaption></figure>"
        for picture, _ in pictures[:_LARGEST_REPORT]
    ]
    lines = [f"<li>{as_html(worded(note.text, wording))}</li>" for note in warnings]
    count = f"{len(pictures)} picture{'s' if len(pictures) != 1 else ''}"
    return f"<div class='dreambooth-report'><p>{count}</p>{''.join(shown)}<ul>{''.join(lines)}</ul></div>"
