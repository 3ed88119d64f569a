"""The nodes of the pack, in the order in which they are wired."""

from __future__ import annotations

from .api import ComfyExtension, io
from .caption import CaptionImages
from .lora import ApplyLora, LoadLoraFile, SaveLora
from .lora_tools import ExtractLora, InspectLora, ResizeLora
from .merge import LearnedMerge, MergeLoras, ScaleLora
from .pick import PickBestCheckpoint
from .priors import ClassPriors
from .score import ClipScore, SubjectScore
from .score_table import ScoreTable
from .subject import Subject
from .train import FineTuneCheckpoint, TrainingSettings, TrainLora

NODES: list[type[io.ComfyNode]] = [
    Subject,
    ClassPriors,
    TrainLora,
    TrainingSettings,
    FineTuneCheckpoint,
    LoadLoraFile,
    ApplyLora,
    SaveLora,
    MergeLoras,
    LearnedMerge,
    ScaleLora,
    ResizeLora,
    ExtractLora,
    InspectLora,
    ClipScore,
    SubjectScore,
    ScoreTable,
    PickBestCheckpoint,
    CaptionImages,
]


class _Extension(ComfyExtension):
    async def on_load(self) -> None:
        from . import host_routes

        host_routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def extension() -> ComfyExtension:
    """The extension that ComfyUI asks for."""
    return _Extension()
