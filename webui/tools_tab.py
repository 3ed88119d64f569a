"""The tab's tools: what makes LoRAs and models of others, and the best checkpoint of a run; jobs of the engine."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..install import ROOT
from ..trainer.core.errors import SettingsError, TrainerError, worded
from ..trainer.training.runs.index import RunIndex
from . import environment, host, queue
from .jobs import ENDED, FUSE, Job, engine_environment, require_file_name
from .messages import as_html, error_message, failure, saying_errors
from .widgets import element_id, given, settings_of, widget
from .wording import wording

MERGE, LEARNED_MERGE, RESIZE, EXTRACT, COMPARE = "merge", "learned-merge", "resize", "extract", "compare"
_MERGE_SETTINGS = ("method", "rank", "density", "protected")
_LEARNED_MERGE_SETTINGS = ("subject_prompt", "style_prompt", "steps", "resolution")
_RESIZE_SETTINGS = ("rank", "ratio")
_EXTRACT_SETTINGS = ("rank", "conv_rank")
_COMPARE_SETTINGS = ("prompts", "clip", "dino", "count", "steps")
_SECONDS_BETWEEN_LOOKS = 0.5
_LONGEST_INSPECTION = 600  # seconds
_Lists = list[tuple[Any, Callable[[], list[str]]]]  # widgets, each with what reads its choices


def build(page: Any) -> None:
    """The tools' widgets, in the tab that is being built, `page`; whoever comes to it finds lists of what there is."""
    lists: _Lists = []
    with gr.Tabs(elem_id=element_id("tool")) as tools:
        with gr.Tab("Merge"):
            _build_merge(lists)
        with gr.Tab("Learned merge"):
            _build_learned_merge(lists)
        with gr.Tab("Resize"):
            _build_resize(lists)
        with gr.Tab("Extract"):
            _build_extract(lists)
        with gr.Tab("Fuse"):
            _build_fuse(lists)
        with gr.Tab("Inspect"):
            lora = _loras_widget(lists, "inspect_lora")
            start = _start("Inspect", "inspect")
            start.click(_inspect, inputs=[lora], outputs=[_result_widget("inspect")], show_progress="hidden")
        with gr.Tab("Pick the best checkpoint"):
            _build_compare(lists)
    for tabs in (page, tools):
        tabs.select(
            lambda: _read_anew(lists), inputs=[], outputs=[listed for listed, _ in lists], show_progress="hidden"
        )


def _build_merge(lists: _Lists) -> None:
    loras = _loras_widget(lists, "merge_loras", label="LoRAs", multiselect=True)
    strengths = _strengths_widget("merge_strengths")
    name = gr.Textbox(label="Name of the merged LoRA", max_lines=1, elem_id=element_id("merge_name"))
    settings = _widgets(MERGE, _MERGE_SETTINGS)
    start = _start("Merge", "merge")
    outputs = [_result_widget("merge"), gr.Image(label="Report", elem_id=element_id("merge_report"))]
    start.click(_merge, inputs=[loras, strengths, name, *settings], outputs=outputs, show_progress="hidden")


def _build_learned_merge(lists: _Lists) -> None:
    subject = _loras_widget(lists, "learned_merge_subject", label="Subject LoRA")
    style = _loras_widget(lists, "learned_merge_style", label="Style LoRA")
    base = _bases_widget(lists, "learned_merge_base", "Base model")
    name = gr.Textbox(label="Name of the merged LoRA", max_lines=1, elem_id=element_id("learned_merge_name"))
    settings = _widgets(LEARNED_MERGE, _LEARNED_MERGE_SETTINGS)
    start = _start("Merge", "learned_merge")
    outputs = [_result_widget("learned_merge"), gr.Image(label="Report", elem_id=element_id("learned_merge_report"))]
    start.click(_learned_merge, inputs=[subject, style, base, name, *settings], outputs=outputs, show_progress="hidden")


def _build_extract(lists: _Lists) -> None:
    tuned = _bases_widget(lists, "extract_tuned", "Fine-tuned model")
    base = _bases_widget(lists, "extract_base", "Model it was fine-tuned from")
    name = gr.Textbox(label="Name of the LoRA", max_lines=1, elem_id=element_id("extract_name"))
    settings = _widgets(EXTRACT, _EXTRACT_SETTINGS)
    start = _start("Extract", "extract")
    outputs = [_result_widget("extract")]
    start.click(_extract, inputs=[tuned, base, name, *settings], outputs=outputs, show_progress="hidden")


def _build_fuse(lists: _Lists) -> None:
    base = _bases_widget(lists, "fuse_base", "Base model")
    loras = _loras_widget(lists, "fuse_loras", label="LoRAs", multiselect=True)
    strengths = _strengths_widget("fuse_strengths")
    name = gr.Textbox(label="Name of the new model", max_lines=1, elem_id=element_id("fuse_name"))
    start = _start("Fuse", "fuse")
    outputs = [_result_widget("fuse")]
    start.click(_fuse, inputs=[base, loras, strengths, name], outputs=outputs, show_progress="hidden")


def _build_resize(lists: _Lists) -> None:
    lora = _loras_widget(lists, "resize_lora")
    name = gr.Textbox(label="Name of the resized LoRA", max_lines=1, elem_id=element_id("resize_name"))
    settings = _widgets(RESIZE, _RESIZE_SETTINGS)
    start = _start("Resize", "resize")
    start.click(_resize, inputs=[lora, name, *settings], outputs=[_result_widget("resize")], show_progress="hidden")


def _build_compare(lists: _Lists) -> None:
    run = _listed(lists, _run_names, "compare_run", label="Run")
    settings = _widgets(COMPARE, _COMPARE_SETTINGS)
    start = _start("Compare", "compare")
    outputs = [_result_widget("compare"), gr.Image(label="Best checkpoint", elem_id=element_id("compare_plot"))]
    start.click(_compare, inputs=[run, *settings], outputs=outputs, show_progress="hidden")


def _start(text: str, id: str) -> Any:
    return gr.Button(text, variant="primary", elem_id=element_id(f"{id}_start"))


def _result_widget(id: str) -> Any:
    return gr.HTML(elem_id=element_id(f"{id}_result"))


def _widgets(command: str, names: Sequence[str]) -> list[Any]:
    return [widget(settings_of(command)[name], prefix=f"{command.replace('-', '_')}_") for name in names]


def _strengths_widget(id: str) -> Any:
    return gr.Textbox(
        label="Strengths",
        info="One per LoRA, separated by commas: 1, 0.8. Two with a colon for UNet and text encoder: 1:0.5. Empty: 1.",
        max_lines=1,
        elem_id=element_id(id),
    )


def _loras_widget(lists: _Lists, id: str, **options: Any) -> Any:
    return _listed(lists, _lora_names, id, **{"label": "LoRA"} | options)


def _bases_widget(lists: _Lists, id: str, label: str) -> Any:
    return _listed(lists, host.bases, id, host.refresh_bases, label=label)


def _listed(
    lists: _Lists,
    choices: Callable[[], list[str]],
    id: str,
    found: Callable[[], list[str]] | None = None,
    **options: Any,
) -> Any:
    """A list, which is added to `lists`, with a button that reads it anew, in another way if there is one."""
    with gr.Row():
        listed = gr.Dropdown(choices=choices(), elem_id=element_id(id), scale=4, **options)
        refresh = gr.Button("⟳", elem_id=element_id(f"{id}_refresh"), scale=0, min_width=40)
    refresh.click(lambda: gr.update(choices=(found or choices)()), inputs=[], outputs=[listed])
    lists.append((listed, choices))
    return listed


def _read_anew(lists: _Lists) -> list[Any]:
    """A change for each list; what several of them show is looked for once."""
    found = {choices: choices() for choices in {choices for _, choices in lists}}
    return [gr.update(choices=found[choices]) for _, choices in lists]


def _lora_names() -> list[str]:
    return [*_loras()]


def _run_names() -> list[str]:
    return [*filter(_is_text, _runs().names())]


def _loras() -> dict[str, Path]:
    """The host's LoRA files by name, as a prompt names them."""
    files = sorted(host.loras_folder().rglob("*.safetensors"))
    named = {file.relative_to(host.loras_folder()).with_suffix("").as_posix(): file for file in files}
    return {name: file for name, file in named.items() if _is_text(name)}  # gradio can send no others to the page


def _is_text(name: str) -> bool:
    """Whether a file's name is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lora(name: str | None) -> Path:
    """The file of a LoRA.

    Raises:
        SettingsError: None was chosen, or it is gone.
    """
    files = _loras()
    if name not in files:
        raise SettingsError(
            f"There is no LoRA '{name}'." if name else "No LoRA is chosen.", "Choose one; ⟳ refreshes the list."
        )
    return files[name]


def _runs() -> RunIndex:
    return RunIndex(host.data_folder() / "runs")


def _merge(chosen: Sequence[str] | None, strengths: str, name: str, *values: Any) -> Iterator[tuple[str, str | None]]:
    """Merge LoRAs; what is shown meanwhile and at the end: text, and a picture of the report."""
    try:
        numbers = _strengths(chosen, strengths)
        files = [_lora(lora) for lora in chosen or ()]
        if len(files) < 2:
            raise SettingsError("Fewer than two LoRAs are chosen.", "Choose two or more.")
        loras = _weighted(files, numbers)
        settings = given(MERGE, _MERGE_SETTINGS, values) | {"loras": loras, "output": str(_output(name))}
        job = _made(MERGE, name, settings, files, report="report.png")
        for text in _followed(job):
            yield text, None
        yield _result(job), _picture(job, "report.png")
    except (TrainerError, ValueError) as error:
        yield error_message(error), None


def _learned_merge(
    subject: str | None, style: str | None, base: str | None, name: str, *values: Any
) -> Iterator[tuple[str, str | None]]:
    """Merge a subject and a style with learned coefficients; what is shown meanwhile and at the end, as of a merge."""
    try:
        files = [_lora(subject), _lora(style)]
        settings = given(LEARNED_MERGE, _LEARNED_MERGE_SETTINGS, values)
        settings |= {"loras": _weighted(files, ["1", "1"]), "output": str(_output(name))}
        settings |= {"base": str(host.base_file(base or ""))}
        tokenizer = host.tokenizer()
        settings |= {"tokenizer": str(tokenizer)} if tokenizer else {}
        job = _made(LEARNED_MERGE, name, settings, files, report="report.png")
        for text in _followed(job):
            yield text, None
        yield _result(job), _picture(job, "report.png")
    except (TrainerError, ValueError) as error:
        yield error_message(error), None


def _extract(tuned: str | None, base: str | None, name: str, *values: Any) -> Iterator[str]:
    """Extract a LoRA from a fine-tuned model; what is shown meanwhile and at the end."""
    try:
        settings = given(EXTRACT, _EXTRACT_SETTINGS, values) | {"output": str(_output(name))}
        settings |= {"tuned": str(host.base_file(tuned or "")), "base": str(host.base_file(base or ""))}
        job = _made(EXTRACT, name, settings)
        yield from _followed(job)
        yield _result(job)
    except (TrainerError, ValueError) as error:
        yield error_message(error)


def _fuse(base: str | None, chosen: Sequence[str] | None, strengths: str, name: str) -> Iterator[str]:
    """Add LoRAs to a model, and save it beside it as another one; what is shown meanwhile and at the end."""
    try:
        if not chosen:
            raise SettingsError("No LoRA is chosen.", "Choose one or more.")
        loras = _weighted([_lora(lora) for lora in chosen], _strengths(chosen, strengths))
        named = _output(name).name
        file = host.base_file(base or "")
        output = file.with_name(named)
        job = _made(FUSE, name, {"base": str(file), "lora": loras, "output": str(output)})
        yield from _followed(job)
        yield _result(job)
    except (TrainerError, ValueError) as error:
        yield error_message(error)


def _resize(lora: str | None, name: str, *values: Any) -> Iterator[str]:
    """Resize a LoRA; what is shown meanwhile and at the end."""
    try:
        file = _lora(lora)
        settings = given(RESIZE, _RESIZE_SETTINGS, values) | {"lora": str(file), "output": str(_output(name))}
        job = _made(RESIZE, name, settings, [file])
        yield from _followed(job)
        yield _result(job)
    except (TrainerError, ValueError) as error:
        yield error_message(error)


def _compare(run: str | None, *values: Any) -> Iterator[tuple[str, str | None]]:
    """Compare the checkpoints of a run; what is shown meanwhile and at the end: text, and the plot with the best."""
    try:
        if not run:
            raise SettingsError("No run is chosen.", "Choose one; ⟳ refreshes the list.")
        folder = _runs().run(run)
        begun = queue.job_of(run)
        if begun is None:
            raise SettingsError(
                f"The settings of '{run}' were not found.", "Choose a run that was started in this tab."
            )
        known = begun.settings()
        settings = {key: known[key] for key in ("base", "tokenizer", "vae", "token") if key in known}
        settings |= {"runs": [str(folder.path)], "subject": known["images"]}
        job = _made(COMPARE, run, settings | given(COMPARE, _COMPARE_SETTINGS, values), output_dir="comparison")
        for text in _followed(job):
            yield text, None
        yield _result(job), _picture(job, "comparison/best.png")
    except (TrainerError, ValueError) as error:
        yield error_message(error), None


@saying_errors
def _inspect(lora: str | None) -> str:
    """What a LoRA is, as text."""
    command = [str(environment.python()), "-m", "trainer", "inspect", str(_lora(lora))]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=engine_environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=_LONGEST_INSPECTION,
        check=False,
    )
    return f"<pre>{as_html(done.stdout or done.stderr)}</pre>"


def _weighted(files: Sequence[Path], strengths: Sequence[str]) -> list[str]:
    """LoRA files with their strengths, as the engine reads them."""
    return [f"{file}:{strength}" for file, strength in zip(files, strengths)]


def _strengths(chosen: Sequence[str] | None, text: str) -> list[str]:
    """A strength for each LoRA; 1 if none are given.

    Raises:
        SettingsError: They are not numbers, or not as many.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not parts:
        return ["1"] * len(chosen or ())
    if len(parts) != len(chosen or ()):
        raise SettingsError(
            f"There are {len(parts)} strengths for {len(chosen or ())} LoRAs.", "Enter one for each, in the same order."
        )
    for part in parts:
        for number in part.split(":"):
            try:
                float(number)
            except ValueError:
                raise SettingsError(f"The strength '{part}' is not a number.", "Write 0.8, or 1:0.5.") from None
    return parts


def _output(name: str) -> Path:
    """The file in the host's LoRA folder that a result goes into.

    Raises:
        SettingsError: There is no name.
    """
    name = (name or "").strip()
    if not name:
        raise SettingsError("The result has no name.", "Enter one; it becomes the file name.")
    require_file_name(name)
    return host.loras_folder() / f"{name}.safetensors"


def _made(kind: str, name: str, settings: Mapping[str, Any], sources: Sequence[Path] = (), **files: str) -> Job:
    """A job whose settings also name files in its own folder, and which makes something of LoRA files."""
    queue.require_ready()
    job = queue.jobs().make(kind, name.strip(), settings, sources=[str(source) for source in sources])
    if files:
        job.write_settings(dict(settings) | {key: str(job.folder / file) for key, file in files.items()})
    return job


def _followed(job: Job) -> Iterator[str]:
    """Run a job to its end; what it does meanwhile."""
    queue.submit(job)
    while queue.is_at_work(job):
        facts = job.progress().facts
        share = f" {facts['done']} of {facts['total']}" if "total" in facts and facts["state"] not in ENDED else ""
        yield f"<p>{as_html(str(facts['state']))}{share} …</p>"
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _picture(job: Job, name: str) -> str | None:
    """The path of a picture in a job's folder, if it was made."""
    path = job.folder / name
    return str(path) if path.is_file() else None


def _result(job: Job) -> str:
    """How a job ended."""
    facts = job.progress().facts
    failed = job.record.get("failed") or [facts.get("problem", "It was stopped."), facts.get("remedy", "")]
    if facts["state"] != "done" or job.record.get("failed"):
        return failure(worded(failed[0], wording), worded(failed[1], wording))
    notes = "".join(f"<li>{as_html(worded(text, wording))}</li>" for text, _ in job.progress().notes)
    made = "<div class='dreambooth-made'></div>" if job.record.get("card") else ""  # javascript/ looks for it
    return f"{made}<ul>{notes}</ul><pre>{as_html(job.log() + chr(10).join(job.output()))}</pre>"
