"""Pick Best Checkpoint: draws with every checkpoint of a run, scores the pictures, and gives the best adapter."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..trainer.settings.evaluate import CompareSettings
from ..trainer.settings.train import TrainSettings
from . import host
from .base import Node
from .host_progress import NodeListener
from .lora import as_wire
from .merge import as_image
from .score import clip_input, dino_input, download_input, open_judges
from .subject import SubjectValue
from .widgets import CATEGORY, SUBJECT, widget

_SHOWN = ("prompts", "schedulers", "steps", "count", "guidance", "size", "picture_seed", "picture_batch_size")
_PROMPTS = "{subject} in the snow\n{subject} on the beach\n{subject} on a cobblestone street"


class PickBestCheckpoint(Node):
    """Scores every checkpoint of a run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        changes: dict[str, dict[str, Any]] = {
            "prompts": {
                "multiline": True,
                "default": _PROMPTS,
                "tooltip": "A line for each prompt. {subject} stands for the caption of the subject's pictures.",
            },
            "guidance": {"advanced": True},
            "picture_seed": {"advanced": True},
            "schedulers": {"advanced": True},
        }
        return io.Schema(
            node_id="DreamBoothPickBest",
            display_name="Pick Best Checkpoint (DreamBooth)",
            category=CATEGORY,
            description="Draws with every checkpoint of a run and with the base, measures likeness, prompt following "
            "and drift of the class, and gives the adapter of the best step. Drawn pictures are kept.",
            search_aliases=["best epoch", "choose checkpoint", "overfitting", "evaluate lora", "compare checkpoints"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that the run was trained on, without its adapter."),
                io.Clip.Input("clip", tooltip="Its text encoders."),
                io.Vae.Input("vae", tooltip="Its VAE."),
                SUBJECT.Input("subject", tooltip="The pictures that the run learned from, or others of the subject."),
                io.String.Input(
                    "run",
                    default="",
                    tooltip="From Train LoRA's output 'run', or the name of a folder in output/dreambooth/runs.",
                ),
                *(widget(CompareSettings, name, **changes.get(name, {})) for name in _SHOWN),
                clip_input(),
                dino_input(""),
                download_input(),
                widget(TrainSettings, "precision"),
            ],
            outputs=[
                io.LoraModel.Output(display_name="lora", tooltip="The adapter of the best step."),
                io.Int.Output(display_name="step", tooltip="The best step."),
                io.Image.Output(display_name="plot", tooltip="Fidelity against prompt following and drift."),
                io.Image.Output(display_name="sheet", tooltip="The first picture of every prompt, step by step."),
                io.String.Output(display_name="table", tooltip="All measures, as Markdown."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run: str = "", **_: Any) -> str:
        """Changes when the run has other checkpoints."""
        from ..trainer.training.runs.checkpoint import RunFolder

        return repr(list(RunFolder(host.run_path(run)).adapters())) if isinstance(run, str) and run.strip() else ""

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        subject: SubjectValue,
        run: str,
        clip_model: str,
        dino_model: str,
        download: bool,
        precision: str,
        **values: Any,
    ) -> io.NodeOutput:
        """Draw, score, choose."""
        import torch

        from ..trainer.core.devices import pick_device, pick_precision
        from ..trainer.core.prompts import split_prompts
        from ..trainer.evaluation.comparison import base_alone, checkpoints, compare
        from ..trainer.evaluation.comparison_report import as_markdown, plot, sheet, write_report
        from ..trainer.evaluation.evaluator import Evaluation
        from ..trainer.evaluation.generator import CachedGenerator, drawings
        from ..trainer.training.runs.checkpoint import RunFolder

        values["prompts"] = values["prompts"].replace("{subject}", subject.instance_prompt)
        settings = CompareSettings.checked({**values, "token": subject.token})
        folder = RunFolder.existing(host.run_path(run))
        found = checkpoints(folder.adapters(), folder.name)
        listener, device = NodeListener(cls.hidden.unique_id), pick_device(host.device_name())
        with host.training_mode(), torch.no_grad():
            judges = open_judges(clip_model, dino_model, download)
            evaluation = Evaluation(judges, subject.pictures, split_prompts(settings.prompts), settings.token, listener)
            base = host.borrow_base(model, clip, vae)
            place = host.work_folder() / "pictures"
            studio = CachedGenerator(base, place, device, pick_precision(precision, device), listener)  # type: ignore[arg-type]
            comparison = compare(studio, evaluation, [base_alone(), *found], drawings(settings))
        write_report(comparison, host.work_folder() / "scores" / folder.path.name)
        best = comparison.best.contender if comparison.best else found[-1]
        images, text = [as_image(plot(comparison)), as_image(sheet(comparison))], as_markdown(comparison)
        preview = ui.PreviewImage(images[0], cls=cls).as_dict()
        [(adapter, _)] = best.load()
        return io.NodeOutput(as_wire(adapter), best.step, *images, text, ui={**preview, "text": [text]})
