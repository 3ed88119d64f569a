"""What the command completion prints: a script with which bash, zsh or fish completes commands, flags and values.

The scripts are whole: a shell that uses one runs no program at a key press. They add `-m trainer` to what the shell
completes for `python` and leave everything else of it as it is, which no library for argparse does.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .parser import ALL, PROGRAM, CommandParser, first_sentence

Choices = Mapping[str, Mapping[str, Sequence[Any]]]
"""Command → setting → the values that it can have, if it is a choice."""
_TAKES_PATH = re.compile(r"PATH|FILE|\.toml|\.TOML")


@dataclass(frozen=True)
class _Flag:
    """A flag of a command.

    Attributes:
        names: Its spellings, such as `--flip` and `--no-flip`.
        help: One sentence.
        takes_value: Whether a word follows it.
        values: The words that may follow it, if they are known.
        is_path: Whether a path follows it.
        is_repeatable: Whether it may be given several times.
    """

    names: Sequence[str]
    help: str
    takes_value: bool
    values: Sequence[str]
    is_path: bool
    is_repeatable: bool


@dataclass(frozen=True)
class _Command:
    """A command.

    Attributes:
        name: As it is typed.
        help: One sentence.
        flags: Its flags.
        words: What may be given without a flag, if that is known.
        takes_files: Whether files are given without a flag.
    """

    name: str
    help: str
    flags: Sequence[_Flag]
    words: Sequence[str]
    takes_files: bool


def completion_script(shell: str, parser: CommandParser, choices: Choices) -> str:
    """The script for a shell.

    Args:
        shell: One of `SHELLS`.
        parser: The parser of the whole command line.
        choices: What its flags don't show of the settings.
    """
    commands = [_command(name, each, choices.get(name, {})) for name, each in parser.commands().items()]
    return _WRITERS[shell](commands)


def _command(name: str, parser: CommandParser, choices: Mapping[str, Sequence[Any]]) -> _Command:
    flags, words, takes_files = [], [], False
    for action in parser._actions:
        values = [str(value) for value in choices.get(action.dest) or action.choices or ()]
        if not action.option_strings:
            words += values
            takes_files = takes_files or not values
            continue
        if action.dest == "help":
            values = [ALL, *parser.flag_groups()] if parser.first_flags else []
        flags.append(
            _Flag(
                names=action.option_strings,
                help=first_sentence((action.help or "").split(" [")[0].replace("%%", "%")),
                takes_value=action.nargs is None or bool(values),
                values=values,
                is_path=bool(_TAKES_PATH.search(str(action.metavar))),
                is_repeatable=isinstance(action, argparse._AppendAction),
            )
        )
    return _Command(name, parser.description or "", flags, words, takes_files)


def _bash(commands: Sequence[_Command]) -> str:
    """Where nothing is offered, bash itself completes file names."""
    cases, values = [], []
    for command in commands:
        names = [name for flag in command.flags for name in flag.names]
        cases.append(f"        {command.name}) flags='{' '.join(names)}' words='{' '.join(command.words)}' ;;")
        for flag in command.flags:
            if flag.takes_value:
                pattern = "|".join(f"{command.name}:{name}" for name in flag.names)
                values.append(f"        {pattern}) values='{' '.join(flag.values)}' ;;")
    script = _BASH.replace("@COMMANDS@", " ".join(command.name for command in commands))
    return script.replace("@CASES@", "\n".join(cases)).replace("@VALUES@", "\n".join(values))


def _zsh(commands: Sequence[_Command]) -> str:
    names = [f"    {_quoted(f'{each.name}:{each.help}')}" for each in commands]
    cases = []
    for command in commands:
        specs = []
        for flag in command.flags:
            for name in flag.names:
                others = " ".join(other for other in flag.names if not flag.is_repeatable)
                start = "*" if flag.is_repeatable else f"({others})"
                value = ""
                if flag.takes_value:
                    colons = "::" if flag.names[-1] == "--help" else ":"
                    offered = "_files" if flag.is_path else " "
                    value = f"{colons}value:" + (f"({' '.join(flag.values)})" if flag.values else offered)
                equals = "=" if flag.takes_value and name.startswith("--") else ""
                specs.append(_quoted(f"{start}{name}{equals}[{_bracketed(flag.help)}]{value}"))
        if command.words:
            specs.append(_quoted(f"*:word:({' '.join(command.words)})"))
        elif command.takes_files:
            specs.append(_quoted("*:file:_files"))
        lines = " \\\n        ".join(specs)
        cases.append(f"    {command.name})\n      _arguments -S \\\n        {lines} ;;")
    return _ZSH.replace("@COMMANDS@", "\n".join(names)).replace("@CASES@", "\n".join(cases))


def _bracketed(text: str) -> str:
    """A text inside the brackets of a specification for `_arguments`."""
    return re.sub(r"([\\\[\]:])", r"\\\1", text)


def _fish(commands: Sequence[_Command]) -> str:
    lines = []

    def add(condition: str, rest: str) -> None:
        lines.append(f"complete -c python -c python3 -n {_quoted(condition)} {rest}")

    for command in commands:
        add("__trainer_is", f"-f -a {command.name} -d {_quoted(command.help)}")
    for command in commands:
        condition = f"__trainer_is {command.name}"
        if command.words:
            add(condition, f"-f -a {_quoted(' '.join(command.words))}")
        for flag in command.flags:
            for name in flag.names:
                option = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                value = ""
                if flag.takes_value and flag.values:
                    value = f" -x -a {_quoted(' '.join(flag.values))}"
                elif flag.takes_value:
                    value = " -r -F" if flag.is_path else " -x"
                add(condition, f"{option}{value} -d {_quoted(flag.help)}")
    return _FISH.replace("@LINES@", "\n".join(lines))


def _quoted(text: str) -> str:
    """A text in single quotes, for zsh and fish."""
    return "'" + text.replace("'", "'\\''") + "'"


_HEAD = (
    f"# Completes `{PROGRAM}`, and leaves the rest of Python's completion as it is. Write it again after an update.\n"
)
_BASH = (
    _HEAD
    + r"""
_trainer_python() {
    local i=1 command='' flags='' words='' values='' takes_value=''
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} before=_trainer_before_${1##*/}
    while (( i < COMP_CWORD )) && [[ ${COMP_WORDS[i]} != -m ]] &&
        [[ ${COMP_WORDS[i]} == -* || ${COMP_WORDS[i-1]} == -[WX] ]]; do (( i++ )); done
    if (( i + 1 >= COMP_CWORD )) || [[ ${COMP_WORDS[i]} != -m || ${COMP_WORDS[i+1]} != trainer ]]; then
        [[ -n ${!before} ]] && "${!before}" "$@"
        return
    fi
    if (( i + 2 == COMP_CWORD )); then
        COMPREPLY=($(compgen -W '--help @COMMANDS@' -- "$current"))
        return
    fi
    command=${COMP_WORDS[i+2]}
    if [[ $current == = ]]; then current=''; elif [[ $previous == = ]]; then previous=${COMP_WORDS[COMP_CWORD-2]}; fi
    case $command in
@CASES@
    esac
    takes_value=yes
    case $command:$previous in
@VALUES@
        *) takes_value='' values=$words ;;
    esac
    if [[ -z $takes_value && $current == -* ]]; then values=$flags; fi
    COMPREPLY=($(compgen -W "$values" -- "$current"))
}

for _trainer_name in python python3; do
    if declare -F _comp_load >/dev/null; then
        _comp_load "$_trainer_name" >/dev/null 2>&1
    elif declare -F _completion_loader >/dev/null; then
        _completion_loader "$_trainer_name" >/dev/null 2>&1
    fi
    _trainer_pattern=' -F ([^ ]+)'
    if [[ $(complete -p "$_trainer_name" 2>/dev/null) =~ $_trainer_pattern ]] &&
        [[ ${BASH_REMATCH[1]} != _trainer_python ]]; then
        printf -v "_trainer_before_$_trainer_name" %s "${BASH_REMATCH[1]}"
    fi
    complete -o bashdefault -o default -F _trainer_python "$_trainer_name"
done
unset _trainer_name _trainer_pattern"""
)
_ZSH = (
    _HEAD
    + r"""
_trainer() {
  local -a commands=(
@COMMANDS@
  )
  if (( CURRENT == 2 )); then
    _describe -t commands command commands
    return
  fi
  shift words
  (( CURRENT-- ))
  case $words[1] in
@CASES@
  esac
}

_trainer_python() {
  local -i i=2
  while (( i < CURRENT )) && [[ $words[i] != -m ]] && [[ $words[i] == -* || $words[i-1] == -[WX] ]]; do (( i++ )); done
  if (( i + 1 < CURRENT )) && [[ $words[i] == -m && $words[i+1] == trainer ]]; then
    shift i words
    (( CURRENT -= i ))
    _trainer
  else
    ${_trainer_before[$service]:-_default} "$@"
  fi
}

if (( ! $+functions[compdef] )); then
  autoload -Uz compinit
  compinit
fi
typeset -gA _trainer_before
() {
  local name
  for name in python python3; do
    [[ $_comps[$name] != _trainer_python ]] && _trainer_before[$name]=$_comps[$name]
  done
}
compdef _trainer_python python python3"""
)
_FISH = (
    _HEAD
    + r"""
function __trainer_is --description 'Whether this is python -m trainer with the given command, or with none yet'
    set -l words (commandline -opc)
    set -e words[1]
    while set -q words[1]; and test "$words[1]" != -m; and string match -q -- '-*' $words[1]
        contains -- $words[1] -W -X; and set -e words[2]
        set -e words[1]
    end
    test "$words[1]" = -m; and test "$words[2]" = trainer; or return 1
    if set -q argv[1]
        test "$words[3]" = "$argv[1]"
    else
        not set -q words[3]
    end
end

@LINES@"""
)
_WRITERS: Mapping[str, Callable[[Sequence[_Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
SHELLS = tuple(_WRITERS)
"""The shells that there is a script for."""
