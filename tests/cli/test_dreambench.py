"""A DreamBench learns every subject, draws it by its prompts and scores it, and goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import mostly_slow
from helpers import DEMO, Recorder
from pack.trainer.__main__ import main
from pack.trainer.adapters.apply import merge_into
from pack.trainer.adapters.kohya import read_adapter, write_adapter
from pack.trainer.cli.dreambench import PUBLISHED, BenchSubject, dreambench, read_subjects
from pack.trainer.core.errors import CancelledError, SettingsError, StorageError
from pack.trainer.core.events import Note, Phase, Step
from pack.trainer.data.image_cache import generated_picture
from pack.trainer.data.images import Picture, load_pictures
from pack.trainer.evaluation.evaluator import Evaluator
from pack.trainer.evaluation.feature_extractors import FeatureExtractors
from pack.trainer.models.open import open_base
from pack.trainer.models.sampling import GenerationConfig, build_on_device, generate
from pack.trainer.settings.evaluate import DreamBenchCommand
from worlds import differing, noisy_pictures

pytestmark = pytest.mark.usefixtures("quick")

CPU = torch.device("cpu")
# The layout of the published file, with other words.
TEXT = """Classes

subject_name,class
my_cup,cup
puppy,dog
red_bear,stuffed animal
kitten,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on a chair'.format(unique_token, class_token),
'a green {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} on a chair'.format(unique_token, class_token),
'a {0} {1} in a blue coat'.format(unique_token, class_token)
]
"""
THINGS, LIVE = ["a {0} {1} on a chair", "a green {0} {1}"], ["a {0} {1} on a chair", "a {0} {1} in a blue coat"]
DRAWN = {
    "my_cup": ["a sks cup on a chair", "a green sks cup"],
    "puppy": ["a sks dog on a chair", "a sks dog in a blue coat"],
}
CLASSES = {"my_cup": ["a cup on a chair", "a green cup"], "puppy": ["a dog on a chair", "a dog in a blue coat"]}
HOW: dict[str, Any] = {
    "clip": str(DEMO / "scorer"),
    "device": "cpu",
    "steps": 3,
    "checkpoint_every": 0,
    "learning_rate": 1e-2,
    "rank": 2,
    "targets": "attention",
    "resolution": 32,
    "save_precision": "fp32",
    "prior_count": 2,
    "prior_steps": 2,
    "prior_scheduler": "pndm",
    "prior_guidance": 2.0,
    "count": 2,
    "picture_steps": 2,
    "picture_batch_size": 1,
    "picture_seed": 5,
    "guidance": 3.0,
}


def data_set(folder: Path, text: str = TEXT, subjects: Sequence[str] = ("my_cup", "puppy", "unlisted")) -> Path:
    for number, name in enumerate(subjects):
        noisy_pictures(folder / name, 3, 10 * number)
    (folder / "prompts_and_classes.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thing and a live subject; two more have no folder, and one folder is no subject's."""
    return data_set(tmp_path_factory.mktemp("data set ü"))


def words(base: Path, data: Path, output: Path, **changes: Any) -> list[str]:
    given = {"base": base, "data": data, "output_dir": output, **HOW, **changes}
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not True]
    return [
        "dreambench",
        *(word for pair in flags for word in pair),
        *(f"--{n}" for n, v in given.items() if v is True),
    ]


@pytest.fixture(scope="module")
def benched(tiny_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the whole command, with drift. Read-only by convention."""
    output = tmp_path_factory.mktemp("benched")
    assert main(words(tiny_checkpoint, data, output, drift=True)) == 0
    return output


@pytest.fixture(scope="module")
def extractors() -> FeatureExtractors:
    return FeatureExtractors.open(HOW["clip"], "", CPU)


def run(
    base: Path, data: Path, output: Path, extractors: FeatureExtractors, listener: Recorder, **changes: Any
) -> dict[str, Path]:
    """The same without the command line, so that it can be stopped."""
    settings = DreamBenchCommand.checked({"base": base, "data": data, "output_dir": output, **HOW, **changes})
    return dreambench(open_base(base), settings, extractors, listener)


def rows_of(folder: Path) -> dict[str, list[str]]:
    """Title → cells of the table, the head among them."""
    text = (folder / "table.md").read_text(encoding="utf-8")
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert {len(row) for row in cells} == {len(cells[0])}
    return {row[0]: row[1:] for row in cells}


def facts_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "table.json").read_text(encoding="utf-8"), parse_constant=lambda word: 1 / 0)
    assert isinstance(found, dict)
    return found


def stamps(root: Path, pattern: str = "*.png") -> dict[Path, tuple[int, int]]:
    """Every such file with what would change if it were written again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(root.rglob(pattern))}


def test_the_table_holds_every_subject_and_what_was_published(benched: Path) -> None:
    rows, facts = rows_of(benched), facts_of(benched)
    measures = ["CLIP-I", "CLIP-T", "drift (CLIP)"]
    real = "real pictures, each left out of its own"
    assert list(rows) == ["subject", "my_cup (cup)", "puppy (dog)", "mean", real, *PUBLISHED]
    assert rows["subject"] == measures
    assert list(facts["subjects"]) == list(facts["real"]) == ["my_cup", "puppy"]
    for title, name in (("my_cup (cup)", "my_cup"), ("puppy (dog)", "puppy")):
        assert rows[title] == [f"{facts['subjects'][name][measure]:.3f}" for measure in measures]
    for measure, cell in zip(measures, rows["mean"], strict=True):
        mean = sum(facts["subjects"][name][measure] for name in ("my_cup", "puppy")) / 2
        assert facts["mean"][measure] == pytest.approx(mean)
        assert cell == f"{mean:.3f}"
    assert rows[real] == [f"{sum(marks['CLIP-I'] for marks in facts['real'].values()) / 2:.3f}", "–", "–"]
    assert rows["real pictures, as published"] == ["0.885", "–", "–"]
    assert rows["DreamBooth on Stable Diffusion, as published"] == ["0.803", "0.305", "–"]
    assert facts["models"] == {"CLIP": "scorer"}
    assert "CLIP: scorer." in (benched / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", mostly_slow(["my_cup", "puppy"], "puppy"))
def test_marks_are_those_of_the_files_own_pictures(
    name: str, benched: Path, data: Path, tiny_checkpoint: Path, extractors: FeatureExtractors
) -> None:
    """Things are drawn by the prompts for objects, live subjects by theirs; with and without the adapter file."""
    base = open_base(tiny_checkpoint)
    plain, taught = (build_on_device(base, CPU, "fp32") for _ in range(2))
    merge_into(taught, read_adapter(benched / f"{name}.safetensors"), 1.0)

    def drawn(model: Any, prompts: Sequence[str]) -> list[Picture]:
        how = GenerationConfig(width=32, height=32, scheduler="ddim", steps=2, guidance=3.0)
        return [
            generated_picture("x.png", prompt, generate(model, prompt, [seed], how)[0])
            for prompt in prompts
            for seed in (5, 6)
        ]

    references = load_pictures(data / name, "", Recorder())
    evaluation = Evaluator(extractors, references, DRAWN[name], "sks", Recorder())
    assert evaluation.class_prompts == CLASSES[name]
    expected = evaluation.compute_metrics(
        drawn(taught, DRAWN[name]), drawn(plain, CLASSES[name]), drawn(taught, CLASSES[name])
    )
    assert facts_of(benched)["subjects"][name] == pytest.approx(expected, abs=1e-4)
    assert facts_of(benched)["real"][name] == pytest.approx(evaluation.reference_metrics())
    assert expected["drift (CLIP)"] > 1e-5


def prompts_in(folder: Path) -> list[str]:
    return sorted(json.loads(path.read_text())["prompt"] for path in folder.glob("*/settings.json"))


def test_runs_have_their_own_captions_and_class_pictures(benched: Path) -> None:
    assert prompts_in(benched / "class-pictures") == ["a photo of a cup", "a photo of a dog"]
    assert len(list((benched / "class-pictures").glob("*/*.png"))) == 4
    for path in (benched / "class-pictures").glob("*/settings.json"):
        wanted = {"scheduler": "pndm", "steps": 2, "guidance": 2.0, "resolution": 32}
        assert json.loads(path.read_text()).items() >= wanted.items()
    prompts = [prompt for name in DRAWN for prompt in DRAWN[name] + CLASSES[name] * 2]
    assert prompts_in(benched / "pictures") == sorted(prompts)
    for name, noun in (("my_cup", "cup"), ("puppy", "dog")):
        metadata = read_adapter(benched / f"{name}.safetensors").metadata
        assert f"a photo of sks {noun}" in json.dumps(dict(metadata))
        assert metadata["ss_steps"] == "3"
        assert len(list((benched / "runs").glob(f"{name}-*"))) == 1


def test_without_drift_no_class_is_drawn(benched: Path, tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(benched, output, ignore=shutil.ignore_patterns("pictures"))
    assert main(words(tiny_checkpoint, data, output)) == 0
    rows = rows_of(output)
    assert rows["subject"] == ["CLIP-I", "CLIP-T"]
    for title, row in rows_of(benched).items():
        assert rows[title] == row[:2]
    assert prompts_in(output / "pictures") == sorted(DRAWN["my_cup"] + DRAWN["puppy"])


def test_the_same_call_does_nothing_twice(
    benched: Path, tiny_checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stamps(benched) | stamps(benched, "*.safetensors")
    table = (benched / "table.md").read_text(encoding="utf-8")
    assert main(words(tiny_checkpoint, data, benched, drift=True)) == 0
    captured = capsys.readouterr()
    assert stamps(benched) | stamps(benched, "*.safetensors") == before
    assert captured.err.count("already finished") == 2
    assert captured.out.startswith(table)
    assert captured.out.splitlines()[-2:] == [str(benched / "table.md"), str(benched / "table.json")]


class StopWhen(Recorder):
    """Asks to stop as soon as the events match."""

    def __init__(self, matches: Callable[[list[Any]], bool]) -> None:
        super().__init__()
        self._matches = matches

    def should_stop(self) -> bool:
        return self._matches(self.events)


def at_subject(number: int, event: Any) -> Callable[[list[Any]], bool]:
    """Whether that subject is at work and told of that event, or was told of a step in training."""

    def matches(events: list[Any]) -> bool:
        began = [place for place, one in enumerate(events) if isinstance(one, Note) and f", {number} of 2" in one.text]
        told = events[began[0] :] if began else []
        return any(one == event or (isinstance(one, Step) and one.step == event) for one in told)

    return matches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "event", "trained"),
    [
        (1, 1, [1, 2]),  # a step is told one step late
        (1, Phase("scoring", 0, 15), [1, 2, 3]),
        (2, Phase("class pictures", 0, 2), [1, 2, 3]),
        (2, Phase("puppy, class", 3, 4), [1, 2, 3, 1, 2, 3]),
    ],
    ids=str,
)
def test_an_interrupted_bench_goes_on(
    number: int,
    event: Any,
    trained: list[int],
    benched: Path,
    tiny_checkpoint: Path,
    data: Path,
    extractors: FeatureExtractors,
    tmp_path: Path,
) -> None:
    """No step is trained twice, no picture drawn twice, and the table is that of the whole run."""
    first, second = StopWhen(at_subject(number, event)), Recorder()
    fresh = FeatureExtractors(extractors.models["CLIP"])
    with pytest.raises(CancelledError):
        run(tiny_checkpoint, data, tmp_path, fresh, first, drift=True)
    before = stamps(tmp_path)
    assert [one.step for one in first.events if isinstance(one, Step)] == trained
    assert (tmp_path / "table.md").exists() == (number == 2)
    run(tiny_checkpoint, data, tmp_path, fresh, second, drift=True)
    steps = [one.step for one in (*first.events, *second.events) if isinstance(one, Step)]
    assert steps == [1, 2, 3, 1, 2, 3]
    assert stamps(tmp_path).items() >= before.items()
    ours, theirs = ({path.relative_to(root) for path in stamps(root)} for root in (tmp_path, benched))
    assert ours == theirs
    for name in DRAWN:
        assert differing(tmp_path / f"{name}.safetensors", benched / f"{name}.safetensors") == []
        for part in ("subjects", "real"):
            expected = pytest.approx(facts_of(benched)[part][name], abs=1e-4)
            assert facts_of(tmp_path)[part][name] == expected
    assert rows_of(tmp_path) == rows_of(benched)


def test_one_subject_gone_on_from_an_adapter(
    benched: Path, tiny_checkpoint: Path, data: Path, extractors: FeatureExtractors, tmp_path: Path
) -> None:
    """At a rate that moves nothing the adapter stays the one that it started from, and so do its marks."""
    start = tmp_path / "start.safetensors"
    write_adapter(start, read_adapter(benched / "puppy.safetensors"), torch.float32)
    changes = {"start_from": start, "learning_rate": 1e-30, "weight_decay": 0.0, "steps": 1, "prior_count": 0}
    run(tiny_checkpoint, data, tmp_path / "out", extractors, Recorder(), subjects="puppy", **changes)
    assert list(facts_of(tmp_path / "out")["subjects"]) == ["puppy"]
    assert differing(tmp_path / "out" / "puppy.safetensors", start) == []
    assert rows_of(tmp_path / "out")["puppy (dog)"] == rows_of(benched)["puppy (dog)"][:2]
    assert not (tmp_path / "out" / "class-pictures").exists()


@pytest.mark.parametrize(
    ("folders", "live", "only", "expected"),
    [
        (["my_cup", "puppy"], ["dog"], [], [("my_cup", "cup", THINGS), ("puppy", "dog", LIVE)]),
        (["puppy", "my_cup"], ["dog"], [], [("my_cup", "cup", THINGS), ("puppy", "dog", LIVE)]),
        (
            ["my_cup", "puppy", "kitten"],
            ["cat"],
            ["kitten", "puppy"],
            [("puppy", "dog", THINGS), ("kitten", "cat", LIVE)],
        ),
        (["my_cup", "references"], [], [], [("my_cup", "cup", THINGS)]),
        (["red_bear"], ["animal"], [], [("red_bear", "stuffed animal", THINGS)]),
        (["red_bear"], ["stuffed animal"], [], [("red_bear", "stuffed animal", LIVE)]),
    ],
)
def test_subjects_of_a_data_set(
    folders: list[str],
    live: list[str],
    only: list[str],
    expected: list[tuple[str, str, list[str]]],
    tmp_path: Path,
) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    marked = "\ufeff" + TEXT[TEXT.index("my_cup") :]
    for text in (TEXT, TEXT.replace("\n", "\r\n"), marked, TEXT.replace(",cup\n", ",cup \n")):
        (tmp_path / "prompts_and_classes.txt").write_bytes(text.encode())
        assert read_subjects(tmp_path, live, only) == [BenchSubject(*one) for one in expected]


def test_words_go_into_the_prompts() -> None:
    subject = BenchSubject("x", "stuffed animal", ["a {0} {1}, {1}", "a {2} {0}"])
    assert subject.prompts_with("sks") == ["a sks stuffed animal, stuffed animal", "a {2} sks"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "names no subject that has a folder beside it"),
        (bytes(range(256)), "names no subject that has a folder beside it"),
        (TEXT.replace("my_cup", "your_cup").encode(), "names no subject that has a folder beside it"),
        (b"Classes\n\nmy_cup,cup\n", "names no prompts for a cup"),
        (TEXT.replace(".format(", ".put(").encode(), "names no prompts for a cup"),
        (TEXT[: TEXT.index("Live")].replace(",cup", ",dog").encode(), "names no prompts for a dog"),
    ],
)
def test_a_file_that_is_not_the_data_sets_is_named(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "my_cup").mkdir()
    (tmp_path / "prompts_and_classes.txt").write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_subjects(tmp_path, ["dog"])
    assert problem in caught.value.problem
    assert "object prompts" in caught.value.remedy


def test_a_data_set_without_its_file_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(StorageError, match=r"prompts_and_classes\.txt"):
            read_subjects(folder, [])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": "{folder}"}, ["{folder}/prompts_and_classes.txt"]),
        ({"data": "{nothing}"}, ["{nothing}"]),
        ({"subjects": "my_cup horse"}, ["{data} has no subject horse", "Choose from: my_cup, puppy, kitten"]),
        ({"subjects": "red_bear"}, ["{data} has no subject red_bear", "Choose from"]),
        ({"subjects": "kitten"}, ["{data}/kitten contains no pictures", "3 to 20"]),
        ({}, ["{data}/kitten contains no pictures", "3 to 20"]),
        ({"data": "{plain}"}, ["'a green cup' does not contain the rare word 'sks'", "token"]),
        ({"token": " "}, ["does not contain the rare word", "token"]),
        ({"clip": ""}, ["neither --clip nor --dino", "openai/clip-vit-base-patch32"]),
        ({"clip": "nobody/nothing"}, ["nobody/nothing", "preprocessor_config.json"]),
        ({"base": "{nothing}"}, ["{nothing}"]),
        ({"scheduler": "heun"}, ["scheduler", "'ddim', 'pndm'"]),
        ({"picture_steps": 0}, ["--picture-steps"]),
        ({"prior_count": -1}, ["--prior-count"]),
        ({"steps": "many"}, ["steps", "many"]),
        ({"preview_every": 1, "preview_prompts": "a sks dog"}, ["--preview-prompts", "leave it empty"]),
        ({"combine": True}, ["combine", "set --no-combine"]),
        ({"start_from": "{nothing}"}, ["{nothing}"]),
        ({"subjects": "my_cup", "include": "^nowhere$"}, ["nowhere"]),
        ({"subjects": "my_cup", "output_dir": "{file}"}, ["{file} is a file"]),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_made(
    changes: dict[str, Any], told: list[str], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = data_set(tmp_path / "data")
    (given / "kitten").mkdir()
    plain = data_set(tmp_path / "plain", TEXT.replace("a green {0} {1}", "a green {1}"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    names = {name: tmp_path / name for name in ("folder", "nothing", "file")} | {"data": given, "plain": plain}
    values = {name: one.format(**names) if isinstance(one, str) else one for name, one in changes.items()}
    places = values.pop("base", tiny_checkpoint), values.pop("data", given), values.pop("output_dir", tmp_path / "out")
    assert main(words(*places, **values)) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert "Traceback" not in captured.err
    assert captured.err.startswith("error: ") or "\nerror: " in captured.err
    assert captured.err.count("error: ") == captured.err.count("\nfix: ") == 1
    for text in told:
        assert text.format(**names) in captured.err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
