"""Pick Best Checkpoint: generates with every checkpoint of a run, scores the pictures, and gives the best adapter."""

from __future__ import annotations

from typing import Any

from ..trainer.core.prompts import common_words
from ..trainer.settings.base import filled_prompts
from ..trainer.settings.evaluate import CompareSettings
from ..trainer.settings.train import TrainSettings
from . import host
from .api import io, ui
from .base import Node
from .host_progress import NodeListener
from .lora import as_wire
from .merge import as_image
from .score import clip_input, dino_input, download_input, open_feature_extractors
from .subject import SubjectValue
from .widgets import CATEGORY, SUBJECT, widget

_SHOWN = ("prompts", "schedulers", "steps", "count", "guidance", "size", "picture_seed", "picture_batch_size")
_PROMPTS = "{subject} in the snow\n{subject} on the beach\n{subject} on a cobblestone street"


class PickBestCheckpoint(Node):
    """Scores every checkpoint of a run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to ComfyUI."""
        options: dict[str, dict[str, Any]] = {
            "prompts": {
                "multiline": True,
                "default": _PROMPTS,
                "tooltip": "One prompt per line. {subject} stands for the caption of the subject's pictures.",
            },
            "guidance": {"advanced": True},
            "picture_seed": {"advanced": True},
            "schedulers": {"advanced": True},
        }
        return io.Schema(
            node_id="DreamBoothPickBest",
            display_name="Pick Best Checkpoint (DreamBooth)",
            category=CATEGORY,
            description="Generates pictures with every checkpoint of a run and with the base model, measures subject "
            "fidelity, prompt following and class drift, and outputs the adapter of the best step. Generated pictures "
            "are kept and reused.",
            search_aliases=["best epoch", "choose checkpoint", "overfitting", "evaluate lora", "compare checkpoints"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that the run was trained on, without its adapter."),
                io.Clip.Input("clip", tooltip="Its text encoders."),
                io.Vae.Input("vae", tooltip="Its VAE."),
                SUBJECT.Input("subject", tooltip="The pictures that the run was trained on, or others of the subject."),
                io.String.Input(
                    "run",
                    default="",
                    tooltip="Train LoRA's output 'run', or the name of a folder in output/dreambooth/runs.",
                ),
                *(widget(CompareSettings, name, **options.get(name, {})) for name in _SHOWN),
                clip_input(),
                dino_input(""),
                download_input(),
                widget(TrainSettings, "precision"),
            ],
            outputs=[
                io.LoraModel.Output(display_name="lora", tooltip="Adapter of the best step."),
                io.Int.Output(display_name="step", tooltip="The best step."),
                io.Image.Output(display_name="plot", tooltip="Subject fidelity against prompt following and drift."),
                io.Image.Output(display_name="sheet", tooltip="The first picture of each prompt at each step."),
                io.String.Output(display_name="table", tooltip="All metrics as Markdown."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run: str = "", **_: Any) -> str:
        """A text that changes with the run's checkpoints."""
        from ..trainer.training.runs.folder import RunFolder

        if not isinstance(run, str) or not run.strip():
            return ""
        return repr(list(RunFolder(host.run_path(run)).adapters()))

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
        """Generate, score, choose."""
        import torch

        from ..trainer.core.devices import pick_device, pick_precision
        from ..trainer.evaluation.comparison import base_candidate, checkpoint_candidates, compare_candidates
        from ..trainer.evaluation.comparison_report import as_contact_sheet, as_markdown, as_plot, write_report
        from ..trainer.evaluation.evaluator import Evaluator
        from ..trainer.evaluation.generator import CachedGenerator, sample_configs
        from ..trainer.training.runs.folder import RunFolder

        prompts = values["prompts"].replace("{subject}", subject.instance_prompt)
        values["prompts"] = filled_prompts("prompts", prompts, common_words(subject.words))
        settings = CompareSettings.checked({**values, "token": subject.token})
        run_folder = RunFolder.existing(host.run_path(run))
        candidates = checkpoint_candidates(run_folder.adapters(), run_folder.name)
        listener = NodeListener(cls)
        device = pick_device(host.device_name())
        with host.training_mode(), torch.no_grad():
            feature_extractors = open_feature_extractors(clip_model, dino_model, download=download)
            evaluator = Evaluator(feature_extractors, subject.pictures, settings.prompt_list, settings.token, listener)
            base = host.borrow_base(model, clip, vae)
            cache_folder = host.work_folder() / "pictures"
            generator = CachedGenerator(base, cache_folder, device, pick_precision(precision, device), listener)
            comparison = compare_candidates(
                generator, evaluator, [base_candidate(), *candidates], sample_configs(settings)
            )
        write_report(comparison, host.work_folder() / "scores" / run_folder.path.name)
        best = comparison.best.candidate if comparison.best else candidates[-1]
        [(adapter, _)] = best.load()
        text = as_markdown(comparison)
        plot_image = as_image(as_plot(comparison))
        preview = ui.PreviewImage(plot_image, cls=cls).as_dict()
        return io.NodeOutput(
            as_wire(adapter),
            best.step,
            plot_image,
            as_image(as_contact_sheet(comparison)),
            text,
            ui={**preview, "text": [text]},
        )
