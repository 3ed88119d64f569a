"""Score Table: the pictures of several settings side by side, with their scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from . import host
from .api import io, ui
from .base import Node
from .host_progress import NodeListener
from .merge import as_image
from .score import clip_input, dino_input, download_input, open_feature_extractors, prompt_lines
from .subject import SubjectValue
from .widgets import CATEGORY, SUBJECT

_MOST_SETTINGS = 20


class ScoreTable(Node):
    """Prompts by settings, with thumbnails and numbers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        template = io.Autogrow.TemplatePrefix(io.Image.Input("images"), prefix="images_", min=1, max=_MOST_SETTINGS)
        return io.Schema(
            node_id="DreamBoothScoreTable",
            display_name="Score Table (DreamBooth)",
            category=CATEGORY,
            description="Compares pictures of several settings: a row per setting, a column per prompt, with scores. "
            "Connect one and the next input appears. Also saved as CSV, JSON and PNG.",
            search_aliases=["compare", "xy plot", "grid", "evaluate", "benchmark", "clip score table"],
            is_output_node=True,
            inputs=[
                io.Autogrow.Input(
                    "settings",
                    template=template,
                    tooltip="Pictures of one setting per input: with and without the adapter, other steps, samplers …",
                ),
                io.String.Input(
                    "titles",
                    multiline=True,
                    default="base\nwith LoRA",
                    tooltip="One title per line, in the order of the inputs.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt per line. Every setting needs the same number of pictures for each, in this "
                    "order. Leave the rare word out: CLIP does not know it.",
                ),
                SUBJECT.Input("subject", optional=True, tooltip="Real pictures of the subject, for CLIP-I and DINO."),
                clip_input(),
                dino_input(""),
                download_input(),
                io.String.Input(
                    "name",
                    default="scores",
                    tooltip="Name of the files: output/dreambooth/scores/NAME.csv, .json and .png.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="table", tooltip="Thumbnails and scores."),
                io.String.Output(display_name="csv", tooltip="One line per picture."),
                io.String.Output(display_name="json", tooltip="Everything as JSON."),
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
        from ..trainer.core.files import write_atomic
        from ..trainer.data.image_cache import as_png
        from ..trainer.data.images import load_pictures
        from ..trainer.evaluation.score_table import score_grid
        from ..trainer.settings.train import TrainSettings

        name = TrainSettings.checked({"name": name}).name
        listener = NodeListener(cls)
        connected = [images for images in settings.values() if images is not None]
        pictures = {
            title: load_pictures(list(images), "", listener)
            for title, images in zip(_titles(titles, len(connected)), connected, strict=True)
        }
        lines = prompt_lines(prompts)
        with host.interruptible():
            feature_extractors = open_feature_extractors(clip_model, dino_model if subject else "", download=download)
            grid = score_grid(pictures, lines, subject.pictures if subject else [], feature_extractors, listener)
        sheet = grid.sheet()
        csv = grid.as_csv()
        facts = json.dumps(grid.as_json(), indent=1, ensure_ascii=False)
        folder = host.work_folder() / "scores"
        for suffix, content in ((".csv", csv.encode()), (".json", facts.encode()), (".png", as_png(sheet))):
            write_atomic(folder / f"{name}{suffix}", content, replace=False)
        image = as_image(sheet)
        preview = ui.PreviewImage(image, cls=cls).as_dict()
        return io.NodeOutput(image, csv, facts, ui={**preview, "text": [grid.as_text()]})


def _titles(text: str, count: int) -> list[str]:
    """A title for each of `count` settings; those that are missing, or given twice, get a number."""
    lines = [line.strip() for line in text.splitlines() if line.strip()][:count]
    lines += [f"setting {number + 1}" for number in range(len(lines), count)]
    counts: dict[str, int] = {}
    titles = []
    for line in lines:
        counts[line] = counts.get(line, 0) + 1
        titles.append(line if counts[line] == 1 else f"{line} ({counts[line]})")
    return titles
