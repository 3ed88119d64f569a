"""The command line: `python -m trainer COMMAND`; `--help` lists the commands."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from .cli.flags import add_flags, settings_from
from .cli.terminal import Terminal
from .core.errors import CancelledError, TrainerError
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
from .settings.train import GenerateSettings, PlanCommand, PriorsCommand, TrainCommand

_TOOLS: tuple[tuple[str, type[Settings], str, str], ...] = (
    ("merge", MergeCommand, "loras", "Merge adapters into one; with one adapter, scale it."),
    ("learned-merge", LearnedMergeCommand, "loras", "Merge a subject and a style with learned coefficients (ZipLoRA)."),
    ("resize", ResizeCommand, "lora", "Bring an adapter of any kind to another rank, as a LoRA."),
    ("extract", ExtractCommand, "", "Extract a LoRA from a model and its base."),
    ("convert", ConvertCommand, "lora", "Write an adapter under other names or in another precision."),
    ("fuse", FuseCommand, "", "Add adapters to a model and write it as a new one."),
)


def _train(arguments: argparse.Namespace) -> None:
    settings = settings_from(arguments, TrainCommand)
    from .cli.train import run_train

    with Terminal() as terminal:
        result = run_train(settings, terminal)
    if not terminal.quiet:
        print(result.path)


def _plan(arguments: argparse.Namespace) -> None:
    settings = settings_from(arguments, PlanCommand)
    from .cli.plan import run_plan

    print(run_plan(settings))


def _priors(arguments: argparse.Namespace) -> None:
    settings = settings_from(arguments, PriorsCommand)
    from .cli.train import run_priors

    with Terminal() as terminal:
        folder = run_priors(settings, terminal)
    print(folder)


def _generate(arguments: argparse.Namespace) -> None:
    settings = settings_from(arguments, GenerateSettings)
    from .cli.train import run_generate

    with Terminal() as terminal:
        paths = run_generate(settings, terminal)
    for path in paths:
        print(path)


def _caption(arguments: argparse.Namespace) -> None:
    settings = settings_from(arguments, CaptionCommand)
    from .data.captioning import caption_folder

    with Terminal() as terminal:
        captions = caption_folder(settings, terminal)
    for name, caption in captions.items():
        print(f"{name}: {caption}")


def _tool(settings: type[Settings], name: str) -> Callable[[argparse.Namespace], None]:
    """What a command that writes one file does: `merge_commands.run_<name>`, then the report and the file's path."""

    def run(arguments: argparse.Namespace) -> None:
        checked = settings_from(arguments, settings)
        from .cli import merge as merge_commands

        with Terminal() as terminal:
            path, report = getattr(merge_commands, f"run_{name}")(checked, terminal)
        print(report, file=sys.stderr)
        print(path)

    return run


def _score(arguments: argparse.Namespace) -> None:
    settings = settings_from(arguments, ScoreCommand)
    from .cli.evaluate import run_score

    with Terminal() as terminal:
        table = run_score(settings, terminal)
    print(table.as_text())


def _compare(arguments: argparse.Namespace) -> None:
    settings = settings_from(arguments, CompareCommand)
    from .cli.evaluate import run_compare
    from .evaluation.comparison_report import as_markdown

    with Terminal() as terminal:
        comparison, files = run_compare(settings, terminal)
    print(as_markdown(comparison))
    if comparison.best:
        print(comparison.best.contender.path)
    for path in files.values():
        print(path)


def _dreambench(arguments: argparse.Namespace) -> None:
    settings = settings_from(arguments, DreamBenchCommand)
    from .cli.evaluate import run_dreambench

    with Terminal() as terminal:
        files = run_dreambench(settings, terminal)
    print(files["table.md"].read_text(encoding="utf-8"))
    for path in files.values():
        print(path)


def _inspect(arguments: argparse.Namespace) -> None:
    from .cli.inspect import as_text, inspect

    facts = inspect(arguments.file, blocks=arguments.blocks)
    print(json.dumps(facts, indent=1, ensure_ascii=False) if arguments.json else as_text(facts))


def _demo(arguments: argparse.Namespace) -> None:
    from .cli.demo import run_demo

    with Terminal() as terminal:
        paths = run_demo(arguments.output_dir, terminal)
    for path in paths:
        print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Teach a diffusion model a new subject.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    add_flags(command("train", _train, "Train a LoRA on pictures of a subject."), TrainCommand)
    text = "Say how much GPU memory a training needs and what would fit; trains nothing, needs no GPU."
    add_flags(command("plan", _plan, text), PlanCommand)
    add_flags(command("priors", _priors, "Make class pictures with the base model."), PriorsCommand)
    add_flags(command("generate", _generate, "Draw pictures with a base model and adapters."), GenerateSettings)
    add_flags(command("caption", _caption, "Caption pictures with BLIP."), CaptionCommand, "images")
    for name, settings, positional, text in _TOOLS:
        add_flags(command(name, _tool(settings, name.replace("-", "_")), text), settings, positional)
    add_flags(command("score", _score, "Score pictures: CLIP-T, CLIP-I, DINO, diversity."), ScoreCommand, "pictures")
    text = "Draw and score checkpoints and adapters side by side, and say which to keep."
    add_flags(command("compare", _compare, text), CompareCommand, "runs")
    text = "Train, draw and score every subject of the DreamBooth data set."
    add_flags(command("dreambench", _dreambench, text), DreamBenchCommand)
    sub = command("inspect", _inspect, "Say what an adapter or model file is.")
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("--blocks", action="store_true", help="also where an adapter works, block by block")
    sub.add_argument("--json", action="store_true", help="machine-readable output")
    sub = command("demo", _demo, "Train on the small embedded world and draw a contact sheet.")
    sub.add_argument(
        "--output-dir", type=Path, default=Path("demo/output"), metavar="PATH", help="[default: demo/output]"
    )
    return parser


def main(words: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 an error was told, 130 stopped by the user."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    arguments = _parser().parse_args(words)
    try:
        arguments.run(arguments)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (CancelledError, KeyboardInterrupt):
        print("Stopped. Run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
