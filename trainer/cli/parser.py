"""The parser of a command line: help in two lengths, and errors that name what was probably meant."""

from __future__ import annotations

import argparse
import copy
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from .console import show_error

PROGRAM = "python -m trainer"
ALL = "all"
_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!al)\. ")
_NO_VALUE = re.compile(r"argument (?:-h/)?(\S+): expected (?:one|at least one) argument")


def first_sentence(text: str) -> str:
    """The first sentence of a help text."""
    sentence = _SENTENCE.split(text, maxsplit=1)[0]
    return sentence if sentence.endswith(".") else f"{sentence}."


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known name that is most similar to a word, whatever the case of its letters; "" if none is."""
    by_lower = {name.lower(): name for name in known}
    similar = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[similar[0]] if similar else ""


def group_key(title: str) -> str:
    """A group of flags as it is typed after `--help`: "Class pictures" is `class-pictures`."""
    return title.lower().replace(" ", "-").replace("_", "-")


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors have a problem and a remedy, and whose help may be short.

    Attributes:
        first_flags: Destinations of the flags that the short help shows, in order; empty: there is no short help.
        example: A command line with which people begin; "": none.
    """

    def __init__(self, **options: Any) -> None:
        """See `argparse.ArgumentParser`."""
        super().__init__(**{**options, "add_help": False, "allow_abbrev": False})
        self.first_flags: tuple[str, ...] = ()
        self.example = ""
        self._help = self.add_argument("-h", "--help", action=_Help, nargs=0, help="show this help")

    def use_short_help(self, first_flags: Sequence[str], example: str) -> None:
        """Show only some flags, and an example, unless more are asked for."""
        self.first_flags = tuple(first_flags)
        self.example = example
        self._help.nargs = "?"
        self._help.metavar = "all|GROUP"
        self._help.help = "show help: all flags, or a group of them"

    def commands(self) -> dict[str, CommandParser]:
        """The parsers of its commands, by name."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}

    def option_strings(self) -> list[str]:
        """Every flag."""
        return [option for action in self._actions for option in action.option_strings]

    def flag_groups(self) -> Mapping[str, argparse._ArgumentGroup]:
        """The groups of flags that have a title of their own, as typed after `--help`."""
        return {group_key(group.title): group for group in self._action_groups[2:] if group.title}

    def help_of(self, topic: str | None) -> str:
        """The help.

        Args:
            topic: None: the short one, if there is one; "all"; or a group.

        Raises:
            KeyError: There is no such group.
        """
        if not self.first_flags or topic == ALL:
            return self.format_help()
        formatter = self._get_formatter()
        if topic is None:
            formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
            formatter.add_text(self.description)
            formatter.start_section("Settings to begin with")
            formatter.add_arguments(self._first_actions())
        else:
            group = self.flag_groups()[topic]
            formatter.start_section(group.title)
            formatter.add_arguments(group._group_actions)
        formatter.end_section()
        return formatter.format_help() + (self._epilogue() if topic is None else "")

    def _first_actions(self) -> list[argparse.Action]:
        """The settings file or what is given without a flag, and the first flags, each with a single sentence."""
        by_name = {action.dest: action for action in self._actions}
        names = [action.dest for action in self._get_positional_actions()]
        names += [name for name in self.first_flags if name not in names]
        actions = [copy.copy(by_name[name]) for name in names]
        for action in actions:
            text, bracket, default = (action.help or "").rpartition(" [")
            action.help = first_sentence(text) + bracket + default if text else action.help
        return actions

    def _epilogue(self) -> str:
        shown = {action.dest for action in self._first_actions()}
        more = len({action.dest for action in self._actions} - shown - {"help"})
        groups = textwrap.fill(", ".join(self.flag_groups()), width=76, break_on_hyphens=False)
        return (
            f"\nExample:\n  {self.example}\n\n{more} more flags: {self.prog} --help all\n"
            f"Those of one group: {self.prog} --help GROUP. The groups:\n{textwrap.indent(groups, '  ')}\n"
        )

    def error(self, message: str) -> NoReturn:
        """Show an error of argparse's and end the program with status 2."""
        without_value = _NO_VALUE.match(message)
        if without_value:
            option = without_value[1].split("/")[-1]
            action = next((each for each in self._actions if option in each.option_strings), None)
            name = action.metavar if action is not None and isinstance(action.metavar, str) else "VALUE"
            self.fail(f"{option} has no value.", f"Write it after the flag: {option} {name}.")
        missing = "the following arguments are required: "
        if message.startswith(missing):
            names = message.removeprefix(missing)
            verb = "are" if "," in names else "is"
            self.fail(
                f"{names} {verb} missing.",
                f"Type {self.prog} {names.replace(',', '')}; {self.prog} --help explains it.",
            )
        self.fail(f"{message[:1].upper()}{message[1:]}.", f"{self.prog} --help shows how it is used.")

    def fail(self, problem: str, remedy: str) -> NoReturn:
        """Show an error and end the program with status 2."""
        show_error(problem, remedy)
        self.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Called by argparse for what has a choice of values, which commands have, too."""
        if action.choices is None or value in action.choices:
            return
        is_command = isinstance(action, argparse._SubParsersAction)
        choices = [str(choice) for choice in action.choices]
        meant = nearest(str(value), choices)
        name = action.option_strings[-1] if action.option_strings else action.metavar
        if is_command:
            problem = f"There is no command '{value}'."
            remedy = f"Did you mean {self.prog} {meant}?" if meant else f"{self.prog} --help lists the commands."
        else:
            problem = f"{name} can't be '{value}'."
            remedy = f"Did you mean {meant}?" if meant else f"Choose one of: {', '.join(choices)}."
        self.fail(problem, remedy)

    def refuse(self, unknown: Sequence[str], others: Mapping[str, CommandParser]) -> NoReturn:
        """Refuse words that this command does not take.

        Args:
            unknown: The words.
            others: All commands by name; some may know the flag.
        """
        word = unknown[0]
        if not word.startswith("-"):
            self.fail(
                f"{self.prog} takes no further argument '{word}'.",
                "If it belongs to the text before it, put the whole text in quotes.",
            )
        name = word.partition("=")[0]
        meant = similar_flag(word, self)
        having = [command for command, each in others.items() if name in each.option_strings()]
        help_words = "--help all" if self.first_flags else "--help"
        remedy = f"{self.prog} {help_words} lists the flags."
        if meant:
            remedy = f"Did you mean {meant}?"
        elif having:
            remedy = f"It is a flag of: {', '.join(having)}."
        self.fail(f"{self.prog} has no flag {name}.", remedy)


def similar_flag(word: str, parser: CommandParser) -> str:
    """The flag of a command that was probably meant by one that it does not have; "" if none is similar."""
    return nearest(word.partition("=")[0], parser.option_strings(), cutoff=0.7)


class _Help(argparse.Action):
    """`--help`, `--help all`, `--help GROUP`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Print the help and end the program."""
        assert isinstance(parser, CommandParser)
        topics = [ALL, *parser.flag_groups()]
        topic = group_key(values) if values else None
        if topic is not None and topic not in topics:
            meant = nearest(topic, topics) or next((each for each in topics if each.startswith(topic)), "")
            remedy = f"Did you mean {parser.prog} --help {meant}?" if meant else f"Choose one of: {', '.join(topics)}."
            parser.fail(f"There is no help on '{values}'.", remedy)
        sys.stdout.write(parser.help_of(topic))
        parser.exit()
