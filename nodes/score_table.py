"""Score Table: the pictures of several settings side by side, with their scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io, ui

from . import host
from .base import Node
from .host_progress import NodeListener
from .merge import as_image
from .score import clip_input, dino_input, download_input, open_judges
from .subject import SubjectValue
from .widgets import CATEGORY, SUBJECT

_MOST = 20


class ScoreTable(Node):
    """Prompts by settings, with thumbnails and numbers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        template = io.Autogrow.TemplatePrefix(io.Image.Input("images"), prefix="images_", min=1, max=_MOST)
        return io.Schema(
            node_id="DreamBoothScoreTable",
            display_name="Score Table (DreamBooth)",
            category=CATEGORY,
            description="The pictures of several settings side by side, a row for each, a column for each prompt, with "
            "their scores. Connect one, and the next input appears. Also written as CSV and JSON.",
            search_aliases=["compare", "xy plot", "grid", "evaluate", "benchmark", "clip score table"],
            is_output_node=True,
            inputs=[
                io.Autogrow.Input(
                    "settings",
                    template=template,
                    tooltip="The pictures of one setting each: with and without the adapter, other steps, samplers …",
                ),
                io.String.Input(
                    "titles",
                    multiline=True,
                    default="base\nwith LoRA",
                    tooltip="A line for each setting, in the order of the inputs.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="A line for each prompt. Every setting has the same number of pictures of each, in this "
                    "order. Leave the rare word out: CLIP does not know it.",
                ),
                SUBJECT.Input("subject", optional=True, tooltip="The real pictures, for CLIP-I and DINO."),
                clip_input(),
                dino_input(""),
                download_input(),
                io.String.Input(
                    "name", default="scores", tooltip="The files: output/dreambooth/scores/NAME.csv, .json and .png."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="table", tooltip="Thumbnails and numbers."),
                io.String.Output(display_name="csv", tooltip="A line for every picture."),
                io.String.Output(display_name="json", tooltip="Everything."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        settings: Mapping[str, Any],
        titles: str,
        prompts: str,
        clip_model: str,
        dino_model: str,
        download: bool,
        name: str,
        subject: SubjectValue | None = None,
    ) -> io.NodeOutput:
        """Score, and write the table."""
        from ..trainer.core.files import free_path, write_atomic
        from ..trainer.data.image_cache import as_png
        from ..trainer.data.images import load_pictures
        from ..trainer.evaluation.score_table import score_grid
        from ..trainer.settings.train import TrainSettings

        name = TrainSettings.checked({"name": name}).name
        listener = NodeListener(cls.hidden.unique_id)
        connected = [images for images in settings.values() if images is not None]
        shown = {
            title: load_pictures(list(images), "", listener)
            for title, images in zip(_titles(titles, len(connected)), connected, strict=True)
        }
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        with host.interruptible():
            judges = open_judges(clip_model, dino_model if subject else "", download)
            grid = score_grid(shown, lines, subject.pictures if subject else [], judges, listener)
        sheet, folder = grid.sheet(), host.work_folder() / "scores"
        table, facts = grid.as_csv(), json.dumps(grid.as_json(), indent=1, ensure_ascii=False)
        for ending, content in ((".csv", table.encode()), (".json", facts.encode()), (".png", as_png(sheet))):
            write_atomic(free_path(folder / f"{name}{ending}"), content)
        image = as_image(sheet)
        preview = ui.PreviewImage(image, cls=cls).as_dict()
        return io.NodeOutput(image, table, facts, ui={**preview, "text": [grid.as_text()]})


def _titles(text: str, count: int) -> list[str]:
    """A title for each of `count` settings; those that are not given, or given twice, are told apart by a number."""
    lines = [line.strip() for line in text.splitlines() if line.strip()][:count]
    lines += [f"setting {number + 1}" for number in range(len(lines), count)]
    seen: dict[str, int] = {}
    titles = []
    for line in lines:
        seen[line] = seen.get(line, 0) + 1
        titles.append(line if seen[line] == 1 else f"{line} ({seen[line]})")
    return titles
