"""Settings files in every encoding; what is wrong in one is named by its line, with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from pack.trainer.__main__ import parse
from pack.trainer.cli.flags import settings_from
from pack.trainer.core.errors import SettingsError
from pack.trainer.core.toml import read_toml
from pack.trainer.settings.train import TrainCommand

TEXT = 'name = "Hündin 犬"\nsteps = 3\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le bom", "utf-16-be bom", "utf-32", "utf-32-be bom"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_encodings(path: Path, encoding: str, newline: str) -> None:
    """PowerShell's `>` writes UTF-16 with a mark, Windows' editor UTF-8 with one."""
    name, _, mark = encoding.partition(" ")
    path.write_bytes((("\ufeff" if mark else "") + TEXT.replace("\n", newline)).encode(name))
    assert read_toml(path) == {"name": "Hündin 犬", "steps": 3}


WRONG: list[tuple[str, bytes, str, str]] = [
    ("latin-1", 'steps = 3\nname = "Hündin"\n'.encode("latin-1"), "is not UTF-8 (line 2)", "as UTF-8"),
    ("utf-16 without a mark", TEXT.encode("utf-16-le"), "line 1", "as UTF-8"),
    ("half a utf-16", "\ufeffname".encode("utf-16-le")[:-1], "is not UTF-8 (line 1)", "as UTF-8"),
    ("backslashes", b'steps = 3\nbase = "C:\\models\\x"\n', 'line 2 is not valid TOML: Unescaped "', "single quotes"),
    (
        "backslashes again",
        b'steps = 3\nbase = "C:\\temp\\x"\n',
        'line 2 is not valid TOML: Unescaped "',
        "single quotes",
    ),
    ("text without quotes", b"steps = 3\nname = dog\n", "line 2 is not valid TOML", 'Put the text in quotes: name = "'),
    ("True", b"flip = True\n", "line 1 is not valid TOML", "Write true or false"),
    ("None", b"\n\nalpha = None\n", "line 3 is not valid TOML", "leave out settings that are not set"),
    ("no value", b"steps\n", "line 1 is not valid TOML", "one `key = value` per line"),
    ("twice", b"steps = 1\nsteps = 2\n", "line 2 is not valid TOML: Cannot overwrite a value", "`key = value`"),
    ("no end", b'steps = 1\nname = "dog', "line 2 is not valid TOML", "`key = value`"),
    ("no end of a list", b'steps = 1\nbase_lora = [\n"x"\n\n\n', "line 3 is not valid TOML", "`key = value`"),
    ("a number without end", b"seed = " + b"9" * 5000, "is not valid TOML: Exceeds the limit", "`key = value`"),
    ("lists without end", b"base_lora = " + b"[" * 20_000, "nested too deeply", "a single list"),
    ("both spellings", b"steps = 1\nlearning-rate = 1\nlearning_rate = 2\n", "sets learning_rate twice", "Remove one"),
    ("both spellings of equals", b"learning-rate = 1\nlearning_rate = 1\n", "sets learning_rate twice", "Remove one"),
    ("both in a table", b"[[subject]]\nclass-noun = ''\nclass_noun = ''\n", "sets class_noun twice", "Remove one"),
    ("a zero byte", b"steps = 1\nname = 'a\0b'\n", "line 2 is not valid TOML", "as UTF-8"),
]


@pytest.mark.parametrize(("content", "told", "remedy"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_named_with_its_line(path: Path, content: bytes, told: str, remedy: str) -> None:
    path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_toml(path)
    assert str(path) in caught.value.problem
    assert told.replace('"', "'") in caught.value.problem.replace('"', "'")
    assert remedy in caught.value.remedy
    assert len(caught.value.problem) < 600


def test_the_remedies_work(path: Path) -> None:
    path.write_text("base = 'C:\\models\\x.safetensors'\nname = \"dog\"\nflip = true\n", encoding="utf-8")
    assert read_toml(path) == {"base": "C:\\models\\x.safetensors", "name": "dog", "flip": True}


def test_a_file_that_is_not_there_and_a_folder(path: Path) -> None:
    with pytest.raises(SettingsError, match=r"The settings file .*run\.toml does not exist"):
        read_toml(path)
    path.mkdir()
    with pytest.raises(SettingsError, match=r"run\.toml can't be read"):
        read_toml(path)


@pytest.mark.parametrize(
    "words", [["--learning_rate", "0.5"], ["--learning_rate=0.5"], ["--learning-rate=0.5"]], ids=str
)
def test_underscores_count_as_dashes_in_flags_and_the_last_one_counts(words: list[str]) -> None:
    chosen = settings_from(parse(["train", "--base=x", "--images=y", "--learning-rate=1", *words]), TrainCommand)
    assert chosen.learning_rate == 0.5


def test_underscores_in_values_stay() -> None:
    chosen = settings_from(parse(["train", "--base=a_b", "--images", "c_d", "--instance_prompt=--e_f"]), TrainCommand)
    assert (chosen.base, chosen.images, chosen.instance_prompt) == (Path("a_b"), Path("c_d"), "--e_f")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--stepss", "3"], "has no flag --stepss.\nfix: Did you mean --steps?\n"),
        (["train", "--no-flipp"], "has no flag --no-flipp.\nfix: Did you mean --no-flip?\n"),
        (["merge", "a", "--methd=ties"], "has no flag --methd.\nfix: Did you mean --method?\n"),
        (["inspect", "x", "--jsn"], "has no flag --jsn.\nfix: Did you mean --json?\n"),
        (["train", "--zzzzzz"], "has no flag --zzzzzz.\nfix: python -m trainer train --help all lists the flags.\n"),
        (["generate", "--rank", "4"], "has no flag --rank.\nfix: It is a flag of: train, plan, merge,"),
        (["train", "-steps", "4"], "has no flag -steps.\nfix: Did you mean --steps?\n"),
        (
            ["train", "run.toml", "second.toml"],
            "takes no further argument 'second.toml'.\nfix: If it belongs to the text before it, ",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistyped_flag_is_named_with_the_nearest(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_every_mistyped_key_is_named_with_the_nearest() -> None:
    with pytest.raises(SettingsError) as caught:
        TrainCommand.checked({"stepss": 1, "batchsize": 2, "zzz": 3})
    assert caught.value.problem == "Unknown setting: batchsize, stepss, zzz."
    assert caught.value.remedy == "Did you mean 'batch_size'? Did you mean 'steps'?"
