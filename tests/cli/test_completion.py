"""What shells complete with the scripts of the command completion."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import HANGS
from pack.trainer.__main__ import COMMANDS, main
from pack.trainer.cli.completion import SHELLS
from pack.trainer.settings.train import TrainCommand

PRESETS = {"none", "object", "animal", "person", "style"}
_BASH_CALL = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_trainer_python "${{COMP_WORDS[0]}}" "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""

_ZSH_CALL = r"""
zmodload zsh/zpty
zpty inner zsh -f -i
zpty -w inner "TERM=dumb; autoload -Uz compinit; compinit -u -D; source ${(q)1}; print rea''dy"
zpty -r -m inner shown '*ready*'
zpty -w -n inner $2
zpty -r -m inner shown "*$3*"
print -r -- $shown
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script for each shell."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert main(["completion", shell]) == 0
        (folder / shell).write_text(output.getvalue(), encoding="utf-8")
    return folder


@pytest.fixture
def script(scripts: Path) -> Callable[[str], Path]:
    """The script for a shell; what needs a shell that is not installed is skipped."""

    def of(shell: str) -> Path:
        if shutil.which(shell) is None:
            pytest.skip(f"no {shell}: install it")
        return scripts / shell

    return of


def shell_output(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def in_bash(script: Path, *words: str) -> set[str]:
    typed = " ".join(shlex.quote(word) for word in words)
    code = _BASH_CALL.format(script=shlex.quote(str(script)), words=typed)
    return set(shell_output("bash", "--norc", "--noprofile", "-c", code).split())


def in_fish(script: Path, line: str) -> set[str]:
    code = f"source {shlex.quote(str(script))}; complete -C {shlex.quote(line)}"
    return {row.partition("\t")[0] for row in shell_output("fish", "--no-config", "-c", code).splitlines()}


def in_zsh(script: Path, line: str, awaited: str) -> str:
    """What an interactive zsh shows after a tab, up to what is awaited; only such a one completes."""
    return shell_output("zsh", "-f", "-c", _ZSH_CALL, "zsh", str(script), f"{line}\t", awaited)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_can_read_its_script(shell: str, script: Callable[[str], Path]) -> None:
    shell_output(shell, "-n", str(script(shell)))


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_holds_every_flag_of_every_command(shell: str, scripts: Path) -> None:
    text = (scripts / shell).read_text(encoding="utf-8")
    for command in COMMANDS:
        assert command.name in text
    option = "-l {}" if shell == "fish" else "--{}"
    for name in TrainCommand.model_fields:
        if name != "subject":
            assert option.format(name.replace("_", "-")) in text


@pytest.mark.skipif(os.name == "nt", reason="the bash of Windows has paths of its own")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["python", "-m", "trainer", "tr"], {"train"}),
        (["python3", "-W", "ignore", "-u", "-m", "trainer", "comp"], {"compare", "completion"}),
        ([".venv/bin/python", "-m", "trainer", "--"], {"--help"}),
        (["python", "-m", "trainer", "train", "--pres"], {"--preset"}),
        (["python", "-m", "trainer", "train", "--no-fl"], {"--no-flip"}),
        (["python", "-m", "trainer", "train", "--preset", ""], PRESETS),
        (["python", "-m", "trainer", "train", "--preset", "=", "a"], {"animal"}),
        (["python", "-m", "trainer", "train", "--preset", "="], PRESETS),
        (["python", "-m", "trainer", "train", "--help", "mem"], {"memory"}),
        (["python", "-m", "trainer", "train", "run.to"], set()),  # then bash completes file names
        (["python", "-m", "trainer", "completion", ""], set(SHELLS)),
        (["python", "-m", "trainers", "tr"], set()),
        (["python", "train"], set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash(words: list[str], offered: set[str], script: Callable[[str], Path]) -> None:
    assert in_bash(script("bash"), *words) == offered


@pytest.mark.skipif(os.name == "nt", reason="the bash of Windows has paths of its own")
def test_bash_asks_what_completed_python_before(script: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "bash"
    other = "_other() { COMPREPLY=(other); }; complete -F _other python"
    path.write_text(f"{other}\n{script('bash').read_text(encoding='utf-8')}", encoding="utf-8")
    assert in_bash(path, "python", "-m", "http.ser") == {"other"}
    assert in_bash(path, "python", "-m", "trainer", "tr") == {"train"}
    assert in_bash(path, "python3", "-m", "http.ser") == set()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("python -m trainer tr", {"train"}),
        ("python3 -W ignore -m trainer comp", {"compare", "completion"}),
        ("python -m trainer train --pres", {"--preset"}),
        ("python -m trainer train --preset ", PRESETS),
        ("python -m trainer train --preset=a", {"--preset=animal"}),
        ("python -m trainer train --help mem", {"memory"}),
        ("python -m trainer completion ", set(SHELLS)),
    ],
)
def test_fish(line: str, offered: set[str], script: Callable[[str], Path]) -> None:
    assert in_fish(script("fish"), line) == offered


def test_fish_offers_nothing_for_another_module(script: Callable[[str], Path]) -> None:
    assert "train" not in in_fish(script("fish"), "python -m trainers tr")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "awaited"),
    [
        ("python -m trainer tra", "trainer train "),
        ("python3 -W ignore -m trainer conv", "trainer convert "),
        ("python -m trainer train --pres", "--preset="),
        ("python -m trainer train --preset a", "--preset animal "),
        ("python -m trainer train --help mem", "--help memory "),
        ("python -m trainer completion z", "completion zsh "),
    ],
)
def test_zsh(line: str, awaited: str, script: Callable[[str], Path]) -> None:
    assert awaited in in_zsh(script("zsh"), line, awaited)
