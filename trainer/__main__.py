"""The command line: `python -m trainer COMMAND`; `--help` lists the commands."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

try:
    from .cli.completion import SHELLS, completion_script
    from .cli.console import PatientConsole, as_json, show_error
    from .cli.flags import add_flag, add_flags, choices_of, flag_wording, given_flags, settings_from, with_dashes
    from .cli.info import LIBRARIES, install_remedy
    from .cli.parser import PROGRAM, CommandParser
    from .cli.terminal import Terminal
    from .cli.watching import Watched
    from .core.errors import CancelledError, TrainerError, Wording, plain, suggest, worded
    from .core.events import Note
    from .core.garbage import own_process
    from .settings.base import Settings
    from .settings.caption import CaptionCommand
    from .settings.evaluate import CompareCommand, DreamBenchCommand, ScoreCommand
    from .settings.merge import (
        ConvertCommand,
        ExtractCommand,
        FuseCommand,
        LearnedMergeCommand,
        MergeCommand,
        ResizeCommand,
    )
    from .settings.train import GenerateCommand, PlanCommand, PriorsCommand, TrainCommand, TrainSettings
except ImportError as import_error:  # pydantic is missing, or a host has version 1 of it
    if __name__ != "__main__":
        raise
    from .cli.info import main_without_settings

    sys.exit(main_without_settings(sys.argv[1:], import_error))


@dataclass(frozen=True)
class Command:
    """A command that takes settings.

    Attributes:
        name: As it is typed.
        settings: What it takes.
        run: Does the work and prints the results; gets the settings, and the terminal that shows the work.
        help: One line for --help.
        positional: The setting that is given without a flag; "": the settings file is.
        continues: Whether the same command goes on where it was stopped.
        first_flags: The settings that --help shows unless it is asked for all; empty: there are few, and it shows all.
        example: How people begin with it; for a command with `first_flags`.
    """

    name: str
    settings: type[Settings]
    run: Callable[[Any, Terminal], None]
    help: str
    positional: str = ""
    continues: bool = False
    first_flags: tuple[str, ...] = ()
    example: str = ""

    def advice(self, settings: Settings) -> str:
        """How to go on after the command was stopped; empty if it begins anew."""
        if not self.continues or getattr(settings, "overwrite", False):
            return ""
        if getattr(settings, "resume", "auto") == "never":
            return (
                f" To continue, run the same command with {suggest('resume', 'auto')}; with "
                f"{suggest('resume', 'never')} it starts over."
            )
        return " Run the same command again to continue."


class StoppedError(Exception):
    """The user stopped a command; the text says how to go on."""


def _train(settings: TrainCommand, terminal: Terminal) -> None:
    from .cli.train import run_train

    with terminal:
        result = run_train(settings, terminal)
    if not terminal.quiet:
        print(result.path)


def _plan(settings: PlanCommand, terminal: Terminal) -> None:
    from .cli.plan import run_plan

    print(worded(run_plan(settings), terminal.wording))


def _priors(settings: PriorsCommand, terminal: Terminal) -> None:
    from .cli.train import run_priors

    with terminal:
        folders = run_priors(settings, terminal)
    print(*folders, sep="\n")


def _generate(settings: GenerateCommand, terminal: Terminal) -> None:
    from .cli.train import run_generate

    with terminal:
        paths = run_generate(settings, terminal)
    for path in paths:
        print(path)


def _caption(settings: CaptionCommand, terminal: Terminal) -> None:
    from .data.captioning import caption_folder

    with terminal:
        captions = caption_folder(settings, terminal)
    for name, caption in captions.items():
        print(f"{name}: {caption}")


def _writes_one_file(function: str) -> Callable[[Any, Terminal], None]:
    """Runs the function of `cli.merge` of that name, then prints its report and the path of the file."""

    def run(settings: Settings, terminal: Terminal) -> None:
        from .cli import merge

        with terminal:
            path, report = getattr(merge, function)(settings, terminal)
        print(report, file=sys.stderr)
        print(path)

    return run


def _score(settings: ScoreCommand, terminal: Terminal) -> None:
    from .cli.evaluate import run_score

    with terminal:
        table = run_score(settings, terminal)
    print(table.as_text())


def _compare(settings: CompareCommand, terminal: Terminal) -> None:
    from .cli.evaluate import run_compare
    from .evaluation.comparison_report import as_markdown

    with terminal:
        comparison, files = run_compare(settings, terminal)
    print(as_markdown(comparison))
    if comparison.best:
        print(comparison.best.candidate.path)
    for path in files.values():
        print(path)


def _dreambench(settings: DreamBenchCommand, terminal: Terminal) -> None:
    from .cli.evaluate import run_dreambench

    with terminal:
        files = run_dreambench(settings, terminal)
    print(files["table.md"].read_text(encoding="utf-8"))
    for path in files.values():
        print(path)


_DEMO_FAMILIES = ("sd1", "flux2")
FIRST_RUN = (
    "base",
    "images",
    "instance_prompt",
    "class_noun",
    "preset",
    "name",
    "steps",
    "learning_rate",
    "rank",
    "resolution",
    "preview_every",
    "output_dir",
    "fit",
    "resume",
)
"""The settings that people give in their first training."""

COMMANDS = (
    Command(
        "train",
        TrainCommand,
        _train,
        "Train a LoRA on pictures of a subject.",
        continues=True,
        first_flags=FIRST_RUN,
        example='train --base sdxl.safetensors --images photos --instance-prompt "a photo of sks dog" '
        "--class-noun dog --preset animal --name my-dog",
    ),
    Command(
        "plan",
        PlanCommand,
        _plan,
        "Report how much GPU memory a training run needs and what would fit; trains nothing and needs no GPU.",
        first_flags=(
            "base",
            "memory",
            "resolution",
            "rank",
            "adapter",
            "batch_size",
            "optimizer",
            "precision",
            "base_quantization",
            "text_encoder",
            "vae",
            "device",
        ),
        example="plan --base sdxl.safetensors --resolution 1024 --memory 12",
    ),
    Command(
        "priors",
        PriorsCommand,
        _priors,
        "Generate class pictures with the base model.",
        continues=True,
        first_flags=("base", "class_prompt", "prior_count", "resolution", "prior_seed", "output_dir"),
        example='priors --base sdxl.safetensors --class-prompt "a photo of a dog" --prior-count 200 --resolution 1024',
    ),
    Command(
        "generate",
        GenerateCommand,
        _generate,
        "Generate pictures with a base model and adapters.",
        first_flags=(
            "base",
            "lora",
            "prompt",
            "negative_prompt",
            "size",
            "count",
            "steps",
            "guidance",
            "seed",
            "output",
        ),
        example='generate --base sdxl.safetensors --lora output/my-dog.safetensors --prompt "a photo of sks dog '
        'on a beach" --size 1024',
    ),
    Command("caption", CaptionCommand, _caption, "Caption pictures with BLIP.", "images", continues=True),
    Command(
        "merge",
        MergeCommand,
        _writes_one_file("run_merge"),
        "Merge adapters into one; with one adapter, scale it.",
        "loras",
        first_flags=("output", "method", "rank", "density", "base", "report"),
        example="merge subject.safetensors style.safetensors:0.8 --output both.safetensors",
    ),
    Command(
        "learned-merge",
        LearnedMergeCommand,
        _writes_one_file("run_learned_merge"),
        "Merge a subject and a style with learned coefficients (ZipLoRA).",
        "loras",
        first_flags=("base", "subject_prompt", "style_prompt", "output", "steps", "resolution", "report"),
        example="learned-merge subject.safetensors style.safetensors --base sdxl.safetensors --subject-prompt "
        '"a photo of sks dog" --style-prompt "a picture in abc style" --resolution 1024 --output both.safetensors',
    ),
    Command(
        "resize",
        ResizeCommand,
        _writes_one_file("run_resize"),
        "Resize an adapter of any kind to another rank, as a LoRA.",
        "lora",
    ),
    Command(
        "extract", ExtractCommand, _writes_one_file("run_extract"), "Extract a LoRA from a model and its base model."
    ),
    Command(
        "convert",
        ConvertCommand,
        _writes_one_file("run_convert"),
        "Save an adapter with other layer names or in another precision.",
        "lora",
    ),
    Command("fuse", FuseCommand, _writes_one_file("run_fuse"), "Add adapters to a model and save it as a new one."),
    Command("score", ScoreCommand, _score, "Score pictures: CLIP-T, CLIP-I, DINO, diversity.", "pictures"),
    Command(
        "compare",
        CompareCommand,
        _compare,
        "Generate and score pictures with checkpoints and adapters side by side, and report which one to keep.",
        "runs",
        continues=True,
        first_flags=(
            "base",
            "subject",
            "prompts",
            "token",
            "clip",
            "dino",
            "download",
            "checkpoints",
            "size",
            "count",
            "output_dir",
        ),
        example="compare output/runs/my-dog-0123456789ab --base sdxl.safetensors --subject photos --prompts "
        '"a photo of sks dog on a beach | a painting of sks dog" --clip openai/clip-vit-base-patch32 --download '
        "--size 1024",
    ),
    Command(
        "dreambench",
        DreamBenchCommand,
        _dreambench,
        "Train on every subject of the DreamBooth dataset, generate pictures and score them.",
        continues=True,
        first_flags=(
            "base",
            "data",
            "subjects",
            "preset",
            "steps",
            "prior_count",
            "clip",
            "dino",
            "download",
            "count",
            "output_dir",
        ),
        example="dreambench --base sdxl.safetensors --data dreambooth/dataset --preset object "
        "--clip openai/clip-vit-base-patch32 --dino facebook/dino-vits16 --download",
    ),
)


def _inspect(arguments: argparse.Namespace) -> None:
    from .cli.inspect import facts_as_text, inspect

    facts = inspect(arguments.file, blocks=arguments.blocks)
    print(as_json(facts) if arguments.json else facts_as_text(facts))


def _new(arguments: argparse.Namespace) -> None:
    from .cli.new import write_settings_file

    path = write_settings_file(arguments.file, given_flags(arguments, TrainCommand), FIRST_RUN)
    sys.stderr.write(f"Edit it, then run: {PROGRAM} train {shlex.quote(str(path))}\n")
    print(path)


def _info(arguments: argparse.Namespace) -> None:
    from .cli.info import as_text, collect

    facts = collect()
    print(as_json(facts) if arguments.json else as_text(facts))


def _completion(arguments: argparse.Namespace) -> None:
    choices = {
        command.name: {name: choices_of(command.settings, name) for name in command.settings.model_fields}
        for command in COMMANDS
    }
    print(completion_script(arguments.shell, _parser(), choices))


def _demo(arguments: argparse.Namespace) -> None:
    from .cli.demo import run_demo

    with Terminal() as terminal:
        paths = run_demo(arguments.output_dir, terminal, arguments.family)
    for path in paths:
        print(path)


def _runs(command: Command, wording: Wording) -> Callable[[argparse.Namespace], None]:
    def run(arguments: argparse.Namespace) -> None:
        settings: Settings | None = None
        try:
            with Watched(arguments.events, arguments.stop_file) as watched:
                settings = settings_from(arguments, command.settings)
                terminal = Terminal(wording, watched)
                if not isinstance(settings, TrainSettings):  # those of a training depend on its preset and its pictures
                    for text in settings.effect_notes():
                        terminal.report(Note(text, warning=True))
                command.run(settings, terminal)
        except (CancelledError, KeyboardInterrupt) as stop:
            advice = worded(command.advice(settings), wording) if settings else ""
            raise StoppedError(f"Stopped.{advice}") from stop

    return run


def _parser() -> CommandParser:
    parser = CommandParser(
        prog=PROGRAM,
        description="Teach a diffusion model a new subject.",
        epilog=f"To begin: {PROGRAM} new my-dog.toml --preset animal. Help on a command: {PROGRAM} COMMAND --help.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, run: Callable[[argparse.Namespace], None], wording: Wording, usage: str = "") -> Any:
        whole_usage = f"{PROGRAM} {name} {usage}" if usage else None
        subparser = commands.add_parser(name, help=text, description=text, usage=whole_usage)
        subparser.set_defaults(run=run, wording=wording, parser=subparser)
        return subparser

    for command in COMMANDS:
        wording = flag_wording(command.settings, command.positional)
        subparser = add(command.name, command.help, _runs(command, wording), wording, usage_of(command))
        add_flags(subparser, command.settings, command.positional)
        _add_watching(subparser)
        if command.first_flags:
            subparser.use_short_help(command.first_flags, f"{PROGRAM} {command.example}")
    new = add(
        "new",
        "Write a commented settings file to start from; then complete it and run train NAME.toml.",
        _new,
        flag_wording(TrainCommand),
        "NAME.toml [--setting VALUE ...]",
    )
    new.add_argument(
        "file", type=Path, metavar="NAME.toml", help="the file to write; an existing file is not overwritten"
    )
    for name in FIRST_RUN:
        action = add_flag(new, TrainCommand, name)
        action.help = str(action.help).replace("[required]", "[default: left to fill in]")
    inspect = add("inspect", "Describe an adapter or model file.", _inspect, plain)
    inspect.add_argument("file", type=Path, metavar="FILE")
    inspect.add_argument("--blocks", action="store_true", help="also report how much an adapter changes each block")
    inspect.add_argument("--json", action="store_true", help="machine-readable output")
    info = add("info", "Report versions, devices and free disk space, to paste into an issue.", _info, plain)
    info.add_argument("--json", action="store_true", help="machine-readable output")
    demo = add("demo", "Train on the small bundled dataset and make a contact sheet.", _demo, plain)
    demo.add_argument(
        "--output-dir",
        type=Path,
        default=Path("demo/output"),
        metavar="PATH",
        help="folder to write to [default: demo/output]",
    )
    demo.add_argument(
        "--family", choices=_DEMO_FAMILIES, default="sd1", help="model family of the small base model [default: sd1]"
    )
    completion = add(
        "completion", "Print a script with which a shell completes commands and flags.", _completion, plain
    )
    completion.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")
    return parser


def usage_of(command: Command) -> str:
    """What follows a command's name, in a line."""
    if not command.positional:
        return "[RUN.toml] [--setting VALUE ...]"
    is_list = get_origin(command.settings.model_fields[command.positional].annotation) is tuple
    return f"{'FILE[:STRENGTH] ...' if is_list else 'FILE'} [--setting VALUE ...]"


def _add_watching(subparser: argparse.ArgumentParser) -> None:
    """The flags for another program that runs a command."""
    group = subparser.add_argument_group("For programs")
    group.add_argument("--events", type=Path, metavar="FILE", help="write events to FILE, one JSON object per line")
    group.add_argument("--stop-file", type=Path, metavar="FILE", help="stop at the next safe point once FILE exists")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command and its flags, in which underscores count as dashes, as in a settings file.

    Raises:
        SystemExit: They can't be read; usage and error were shown.
    """
    parser = _parser()
    arguments, unknown = parser.parse_known_args([with_dashes(word) for word in words])
    if unknown:
        arguments.parser.refuse(unknown, parser.commands())
    return arguments


def main(words: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 an error was shown, 130 stopped by the user."""
    with PatientConsole() as console:
        status = _run(sys.argv[1:] if words is None else words)
        if status == 0 and (reason := console.lost_output()):
            show_error(f"The output can't be written: {reason}.", "Free some disk space, or don't redirect the output.")
            status = 1
    return status


def _run(words: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    arguments = parse(words)
    try:
        arguments.run(arguments)
    except TrainerError as error:
        show_error(error.problem_in(arguments.wording), error.remedy_in(arguments.wording))
        return 1
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in LIBRARIES:
            raise
        show_error(f"The library {library} is not installed.", install_remedy())
        return 1
    except (StoppedError, CancelledError, KeyboardInterrupt) as stop:
        text = str(stop) if isinstance(stop, StoppedError) else "Stopped."
        print(text, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    with own_process():
        exit_status = main()
    sys.exit(exit_status)
