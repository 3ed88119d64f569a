"""Whatever a document tells people to type works: settings are taken, programs run from start to end at smoke size.

A command that no entry of `COMMANDS` knows fails here. An entry runs the command with less of everything, names the
test that runs it already, or says why it can't run here.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import make_webui_hosts
import pytest
from browser import find_browser
from comfy_host import find_comfyui
from documented import Command, documented_commands, flags_in, run_by_make, surroundings
from helpers import HANGS, ROOT
from pack.trainer.__main__ import parse
from pack.trainer.cli.demo import BASES
from pack.trainer.cli.flags import settings_from
from PIL import Image
from setting_values import KINDS, REQUIRED

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make: install it")


@dataclass(frozen=True)
class Ran:
    """A command that has ended well.

    Attributes:
        out: The folder that took `OUT`'s place.
        tree: The copy of the pack in which it ran.
        printed: Standard output.
    """

    out: Path
    tree: Path
    printed: str

    def json(self, name: str) -> dict[str, Any]:
        loaded = json.loads((self.out / name).read_text(encoding="utf-8"))
        assert isinstance(loaded, dict)
        return loaded

    def rows(self, name: str) -> list[str]:
        """The first cells of a table in Markdown, without its head."""
        lines = (self.out / name).read_text(encoding="utf-8").splitlines()
        return [line.split("|")[1].strip() for line in lines if line.startswith("| ")]

    def names(self) -> set[str]:
        """Every file in the folder."""
        return {path.relative_to(self.out).as_posix() for path in self.out.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Smoke:
    """A command that runs here, in a copy of the pack.

    Attributes:
        words: With less of everything; `OUT` is a folder for what it writes.
        check: Looks at what it has printed and written.
        left_out: Documented flags that it does not get, each with the reason.
        prepare: Writes what it reads into the folder.
        status: With which it ends.
        marks: What it needs.
    """

    words: str
    check: Callable[[Ran], None]
    left_out: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None
    status: int = 0
    marks: tuple[pytest.MarkDecorator, ...] = ()


@dataclass(frozen=True)
class RunBy:
    """A command that another test runs: file::name, and what the file must say."""

    test: str
    says: str


@dataclass(frozen=True)
class NotHere:
    """A command that can't run in a test."""

    reason: str


def printed(*patterns: str) -> Callable[[Ran], None]:
    def check(ran: Ran) -> None:
        for pattern in patterns:
            assert re.search(pattern, ran.printed, re.MULTILINE), ran.printed

    return check


def check_everyday_tests(ran: Ran) -> None:
    assert "test_mutants.py::test_faults_are_put" in ran.printed
    assert "test_mutants.py::test_most_faults" not in ran.printed


def check_demo(ran: Ran) -> None:
    folder = ran.tree / "demo" / "output"
    assert ran.printed.splitlines()[-2:] == ["demo/output/sks-dog.safetensors", "demo/output/contact-sheet.png"]
    assert (folder / "sks-dog.safetensors").is_file()
    with Image.open(folder / "contact-sheet.png") as sheet:
        assert sheet.width > sheet.height > 4 * 64


def check_demo_of_klein(ran: Ran) -> None:
    folder = ran.tree / "demo" / "output"
    assert ran.printed.splitlines()[-2:] == ["demo/output/sks-dog-klein.safetensors", "demo/output/contact-sheet.png"]
    assert (folder / "sks-dog-klein.safetensors").is_file()
    with Image.open(folder / "contact-sheet.png") as sheet:
        assert sheet.width > sheet.height > 4 * 64


def check_bench(ran: Ran) -> None:
    assert re.search(r"^step of the recipe +[\d.]+ s +bare [\d.]+ s +ratio [\d.]+$", ran.printed, re.MULTILINE)
    facts = ran.json("bench.json")
    asked = {"resolution": 64, "rank": 2, "targets": "attention-mlp", "gradient_checkpointing": True, "size": "sdxl"}
    assert facts.items() >= asked.items()
    assert {"ratio", "first_step", "peak", "steps_per_second"} <= set(facts)


def check_cards(ran: Ran) -> None:
    figures = ran.json("cards.json")
    assert figures["device"] == "planned"
    assert list(figures["families"]) == ["sd15 64", "flux2 64"]
    small = {way: found["planned"] for way, found in figures["families"]["sd15 64"].items()}
    assert small["all blocks swapped"] < small["half of the blocks swapped"] < small["every block recomputed"]
    assert "every block recomputed, fp8 base" in figures["families"]["flux2 64"]


def check_kinds(ran: Ran) -> None:
    assert ran.names() == {"kinds.json", "kinds.md", "kinds.png", "two-stage.json", "two-stage.png"}
    assert "LoRA attention" in ran.rows("kinds.md")
    assert "fidelity, combined" in ran.json("two-stage.json")


def check_kinds_of_klein(ran: Ran) -> None:
    assert ran.names() == {"kinds-flux2.json", "kinds-flux2.md", "kinds-flux2.png"}
    assert "LoRA attention" in ran.rows("kinds-flux2.md")


def check_merging(ran: Ran) -> None:
    assert ran.names() == {"merging.json", "merging.md", "merging.png"}
    assert set(ran.json("merging.json")) == set(ran.rows("merging.md")) - {""}
    assert {"sum", "svd 16", "ties", "dare", "orthogonal"} <= set(ran.rows("merging.md"))


def check_picking(ran: Ran) -> None:
    assert ran.names() == {"checkpoints.png", "picking.json", "picking.md", "picking.png"}
    assert {"base", "with priors", "without"} <= set(ran.rows("picking.md"))


def write_figures(out: Path) -> None:
    """Of two runs, for which the worse checkpoint was picked."""
    of_both = {"steps": [0, 100, 200], "CLIP-T": [0.3, 0.3, 0.3], "truth": [0.5, 0.6, 0.7]}
    faithful = {"CLIP-I": [0.5, 0.7, 0.9], "drift (CLIP)": [0.0, 0.1, 0.1], "picked": 100}
    drifting = {"CLIP-I": [0.5, 0.9, 0.9], "drift (CLIP)": [0.0, 0.1, 0.3], "picked": 200}
    figures = {"with priors": [of_both | faithful], "without": [of_both | drifting]}
    (out / "picking.json").write_text(json.dumps(figures), encoding="utf-8")


def check_picking_again(ran: Ran) -> None:
    assert ran.names() == {"picking.json", "picking.md", "picking.png"}
    picked = {name: [run["picked"] for run in runs] for name, runs in ran.json("picking.json").items()}
    assert picked == {"with priors": [200], "without": [100]}


LEARNING = ROOT / "benchmarks" / "results" / "learning"


def check_learning(ran: Ran) -> None:
    names = {name for name in ran.names() if not name.startswith("work/")}
    assert names == {
        "judge.json",
        "judge.safetensors",
        "base/dog-0.json",
        "truth/dog-0.json",
        "none/dog-0.json",
        "class-pictures/dog-0.json",
    }
    # two steps of a forward and a backward each, and the forward that looks at the prediction type
    assert ran.json("none/dog-0.json")["passes"] == 2 * 3 + 1
    # twice as many samples, and two class pictures of one step with guidance
    assert ran.json("class-pictures/dog-0.json")["passes"] == 2 * 2 * 3 + 1 + 2 * 2
    assert [point["step"] for point in ran.json("none/dog-0.json")["curve"]] == [2]
    assert "kohya, its guide: left out. Give --kohya CHECKOUT." not in ran.printed  # it was not asked for


def check_learning_search(ran: Ran) -> None:
    assert sorted(ran.rows("search/table.md")) == ["---", "learning_rate 0.0004", "the recipe", "trial"]
    assert {"search/the recipe/cat-0.json", "search/learning_rate 0.0004/robot-0.json"} <= ran.names()


def write_learning_results(out: Path) -> None:
    """What is committed, and a page to fill."""
    shutil.copytree(LEARNING, out, ignore=shutil.ignore_patterns("work"), dirs_exist_ok=True)
    (out / "page.md").write_text("<!-- results -->\n<!-- /results -->\n", encoding="utf-8")


def check_learning_table(ran: Ran) -> None:
    assert (ran.out / "table.csv").read_text(encoding="utf-8").startswith("way,subject,seed,step,clip_i,")
    table = (ran.out / "table.md").read_text(encoding="utf-8")
    assert (ran.out / "page.md").read_text(encoding="utf-8") == f"<!-- results -->\n\n{table}\n<!-- /results -->\n"


def write_learning_strips(out: Path) -> None:
    for way in ("base", "none"):
        strip = out / "work" / "strips" / way / "dog-0.png"
        strip.parent.mkdir(parents=True)
        Image.new("RGB", (9 * 64, 64), "red").save(strip)


def check_learning_sheet(ran: Ran) -> None:
    with Image.open(ran.out / "sheet.png") as sheet:
        assert sheet.height > 2 * 64
        assert sheet.width > 9 * 64


def check_depth(ran: Ran) -> None:
    parts = ("subjects", "style", "masks", "presets")
    assert ran.names() == {f"depth-{part}.{kind}" for part in parts for kind in ("md", "png")}
    assert {"without masks", "with masks"} <= set(ran.rows("depth-masks.md"))
    presets = {path.name.split("-sd")[0] for path in (ROOT / "trainer" / "training" / "presets").glob("*-sd1.toml")}
    assert presets
    assert presets <= set(ran.rows("depth-presets.md"))


def check_score_speed(ran: Ran) -> None:
    facts = json.loads(ran.printed)
    assert facts.items() >= {"pictures": 6, "side": 64}.items()
    assert set(facts) >= {"scoring", "bare", "ratio"}


def check_base(ran: Ran) -> None:
    pictures = {"samples.png", "samples-flux2.png", "style", "subject"}
    assert {path.name for path in ran.out.iterdir()} == {*pictures, "base", "flux2", "scorer", "work"}
    for folder in ("subject", "style"):
        for path in (ROOT / "demo" / folder).iterdir():
            assert (ran.out / folder / path.name).is_file()
    assert {path.name for path in (ran.out / "base").iterdir()} == {p.name for p in (ROOT / "demo" / "base").iterdir()}
    parts = {"scheduler", "text_encoder", "tokenizer", "transformer", "vae", "model_index.json"}
    assert {path.name for path in (ran.out / "flux2").iterdir()} == parts


def check_settings_page(ran: Ran) -> None:
    assert (ran.out / "settings.md").read_bytes() == (ROOT / "docs" / "settings.md").read_bytes()


def check_webui_settings(ran: Ran) -> None:
    assert (ran.out / "settings.json").read_bytes() == (ROOT / "webui" / "settings.json").read_bytes()


def check_webui_hosts(ran: Ran) -> None:
    assert all(make_webui_hosts.is_made(name) for name in make_webui_hosts.GRADIOS) or "It can't be made" in ran.printed


def check_version(ran: Ran) -> None:
    """The same files as of a version that was."""

    def names(folder: Path) -> set[str]:
        paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return {re.sub(r"[0-9a-f]{12,}", "HASH", path) for path in paths}

    assert names(ran.out / "9.9.9") == names(ROOT / "tests" / "golden" / "versions" / "0.4.0")


def check_locales(ran: Ran) -> None:
    written = (ran.out / "en" / "nodeDefs.json").read_bytes()
    assert written == (ROOT / "locales" / "en" / "nodeDefs.json").read_bytes()


def check_translated_texts(ran: Ran) -> None:
    written = (ran.out / "texts.json").read_bytes()
    assert written == (ROOT / "tests" / "golden" / "translated_texts.json").read_bytes()


def check_workflow(ran: Ran) -> None:
    name = "train_then_generate"
    assert ran.names() == {f"example_workflows/{name}.json", f"example_workflows/{name}.jpg", "docs/graph.png"}
    ours, written = (
        json.loads((folder / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
        for folder in (ROOT, ran.out)
    )
    assert [node["type"] for node in written["nodes"]] == [node["type"] for node in ours["nodes"]]


def check_help_picture(ran: Ran) -> None:
    assert ran.names() == {"DreamBoothScaleLora.png"}
    with Image.open(ran.out / "DreamBoothScaleLora.png") as picture:
        assert picture.width > 300


def check_registry_pictures(ran: Ran) -> None:
    assert ran.names() == {"icon.png", "banner.png"}
    with Image.open(ran.out / "icon.png") as icon:
        assert icon.size == (400, 400)


def check_tutorial_pictures(ran: Ran) -> None:
    """Those that tutorials show."""
    assert ran.names() == {path.name for path in (ROOT / "docs" / "tutorials").glob("*.png")}


def check_face(ran: Ran) -> None:
    facts = ran.json("face.json")
    assert {"chart", "most messages in a second", "slower"} <= set(facts)


COMFY = (
    pytest.mark.comfy,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI: set COMFYUI_PATH, or install it in ~/comfy/ComfyUI"),
)
BROWSER = (
    *COMFY,
    pytest.mark.browser,
    pytest.mark.skipif(find_browser() is None, reason="no browser: install Chromium and playwright"),
)
NEW_DIFFUSERS = pytest.mark.skipif(not hasattr(diffusers, "Flux2KleinPipeline"), reason="needs diffusers 0.37")
NETWORK = NotHere("It installs packages from the network.")
LINT = NotHere(".ci/run runs it after the tests.")
PEER = "It needs a checkout of another project."
MERGE_COMMANDS = "tests/cli/test_merge_commands.py"
COMMAND_LINE = "tests/cli/test_command_line.py"

# The first words of commands → how they are tested. Of several that fit, the longest counts.
COMMANDS: dict[tuple[str, ...], Smoke | RunBy | NotHere] = {
    ("make demo", "python -m trainer demo"): Smoke("make demo", check_demo),
    ("make demo FAMILY=flux2",): Smoke("make demo FAMILY=flux2", check_demo_of_klein, marks=(NEW_DIFFUSERS,)),
    ("make test",): Smoke(
        'make test ARGS="-n 0 -q --collect-only tests/test_mutants.py"',
        check_everyday_tests,
    ),
    ("python -m pytest tests/dreambooth/test_gpu.py",): NotHere("It needs a CUDA device; with one, these tests run."),
    ("make test-all", "python -m pytest"): Smoke(
        'make test-all ARGS="-n 0 -q --collect-only tests/test_mutants.py"',
        printed("^tests/test_mutants.py::test_faults_are_put", "^tests/test_mutants.py::test_most_faults"),
    ),
    ("make coverage", "python -m coverage"): Smoke(
        'make coverage ARGS="-n 0 -q tests/core/test_text.py"',
        printed(
            r"^\d+ passed", r"^trainer/core/events.py .*%", "^TOTAL .*%", "total of [0-9]+ is less than fail-under=98"
        ),
        status=2,
    ),
    ("make fuzz", "python tools/fuzz.py"): Smoke(
        'make fuzz ARGS="--seconds 2 --seed 1 --corpus OUT adapter zip"',
        printed(r"^  adapter +\d+ inputs +0 findings$", r"^  zip +\d+ inputs +0 findings$"),
    ),
    ("make mutants", "python tools/mutate.py"): RunBy("tests/test_mutants.py::test_most_faults_are_seen", "--sample"),
    ("make lint", "ruff", "mypy", "python tools/lint_imports.py", "python tools/npm.py"): LINT,
    ("make bench", "python benchmarks/bench.py"): Smoke(
        'make bench ARGS="--smoke --size sdxl --resolution 64 --rank 2 --targets attention-mlp'
        ' --gradient-checkpointing --pairs 1 --precision fp32 --out OUT/bench.json"',
        check_bench,
        left_out={"--base": "Its own parts get it.", "--diffusers": PEER},
    ),
    ("make bench BENCH=merge_speed", "python benchmarks/merge_speed.py"): Smoke(
        'make bench BENCH=merge_speed ARGS="--modules 2 --rounds 1"',
        printed(r"^2 modules, rank 32,", r"^sum, ours( +[\d.e-]+){5}$", r"^svd, ours( +[\d.e-]+){5}$"),
        left_out={"--kohya": PEER, "--kohya-python": PEER, "--limit": "It limits a peer's time."},
    ),
    ("python benchmarks/kinds.py --family flux2",): Smoke(
        'python benchmarks/kinds.py --family flux2 --smoke --seeds 1 --only "LoRA attention" --out OUT --sheets OUT',
        check_kinds_of_klein,
        marks=(NEW_DIFFUSERS,),
    ),
    ("python benchmarks/kinds.py",): Smoke(
        'python benchmarks/kinds.py --smoke --seeds 1 --only "LoRA attention" --out OUT --sheets OUT', check_kinds
    ),
    ("python benchmarks/merging.py",): Smoke(
        "python benchmarks/merging.py --smoke --seeds 1 --out OUT --sheets OUT", check_merging
    ),
    ("python benchmarks/picking.py",): Smoke(
        "python benchmarks/picking.py --smoke --seeds 1 --out OUT --sheets OUT",
        check_picking,
    ),
    ("python benchmarks/picking.py --again",): Smoke(
        "python benchmarks/picking.py --again --out OUT --sheets OUT", check_picking_again, prepare=write_figures
    ),
    ("python benchmarks/depth.py",): Smoke("python benchmarks/depth.py --smoke --out OUT --sheets OUT", check_depth),
    ("python benchmarks/learning.py run",): Smoke(
        "python benchmarks/learning.py run --smoke --ways none class-pictures --subjects dog --seeds 0 --out OUT",
        check_learning,
        left_out={flag: PEER for flag in ("--diffusers", "--diffusers-python", "--kohya", "--kohya-python")},
    ),
    ("python benchmarks/learning.py table",): Smoke(
        "python benchmarks/learning.py table --out OUT --page OUT/page.md",
        check_learning_table,
        prepare=write_learning_results,
    ),
    ("python benchmarks/learning.py sheet",): Smoke(
        "python benchmarks/learning.py sheet --out OUT --sheet OUT/sheet.png",
        check_learning_sheet,
        prepare=write_learning_strips,
    ),
    ("python benchmarks/learning.py search",): Smoke(
        "python benchmarks/learning.py search --smoke --trials 1 --keep 1 --seeds 0 --out OUT", check_learning_search
    ),
    ("python benchmarks/cards.py",): Smoke(
        "python benchmarks/cards.py --plan --families sd15 flux2 --resolution 64 --out OUT/cards.json",
        check_cards,
        left_out={"--card": "It needs a CUDA device.", "--diffusers": "It needs a CUDA device."},
    ),
    ("python benchmarks/fit.py --plan --size flux2",): Smoke(
        "python benchmarks/fit.py --plan --size flux2 --resolution 64",
        printed(
            r"^flux2, bf16, 64², batch 1, rank 16; planned in", r"^checkpointing, 8-bit Adam, NF4 +[\d.]+ +[\d.]+ +"
        ),
    ),
    ("python benchmarks/fit.py --plan --size zimage",): Smoke(
        "python benchmarks/fit.py --plan --size zimage --resolution 64",
        printed(
            r"^zimage, bf16, 64², batch 1, rank 16; planned in", r"^checkpointing, 8-bit Adam, NF4 +[\d.]+ +[\d.]+ +"
        ),
    ),
    ("python benchmarks/fit.py --plan --size anima",): Smoke(
        "python benchmarks/fit.py --plan --size anima --resolution 64 --only checkpointing",
        printed(r"^anima, bf16, 64², batch 1, rank 16; planned in", r"^checkpointing, fp8 base +[\d.]+ +[\d.]+ +"),
    ),
    ("python benchmarks/fit.py --plan --size krea2",): Smoke(
        "python benchmarks/fit.py --plan --size krea2 --resolution 64 --only checkpointing",
        printed(r"^krea2, bf16, 64², batch 1, rank 16; planned in", r"^checkpointing, fp8 base +[\d.]+ +[\d.]+ +"),
    ),
    ("python benchmarks/fit.py",): Smoke(
        "python benchmarks/fit.py --plan --size sd15 --resolution 64",
        printed(
            r"^sd15, bf16, 64², batch 1, rank 16; planned in", r"^checkpointing, 8-bit Adam, NF4 +[\d.]+ +[\d.]+ +"
        ),
        left_out={"--card": "It needs a CUDA device."},
    ),
    ("python benchmarks/score_speed.py",): Smoke(
        "python benchmarks/score_speed.py --pictures 2 --side 64 --rounds 1", check_score_speed
    ),
    ("python benchmarks/face.py",): Smoke(
        "python benchmarks/face.py --steps 4 --rounds 1 --out OUT", check_face, marks=BROWSER
    ),
    ("python demo/make_base.py",): Smoke(
        "python demo/make_base.py --out OUT --effort 0.00001"
        " --stages drawings,vae,clip,unet,rare,language,transformer,flux2,pictures",
        check_base,
    ),
    ("python tools/make_settings_page.py",): Smoke(
        "python tools/make_settings_page.py --out OUT/settings.md", check_settings_page
    ),
    ("python tools/make_webui_settings.py",): Smoke(
        "python tools/make_webui_settings.py --out OUT/settings.json", check_webui_settings
    ),
    ("python tools/make_webui_hosts.py",): Smoke(
        "python tools/make_webui_hosts.py",
        check_webui_hosts,
        left_out={"--folder": "Environments elsewhere would be made from nothing."},
    ),
    ("python tools/make_version_golden.py",): Smoke(
        "python tools/make_version_golden.py 9.9.9 --pack . --output OUT", check_version
    ),
    ("python tools/make_translated_texts.py",): Smoke(
        "python tools/make_translated_texts.py --out OUT/texts.json", check_translated_texts
    ),
    ("python tools/make_locales.py",): Smoke("python tools/make_locales.py --out OUT", check_locales, marks=COMFY),
    ("python tools/make_workflows.py",): Smoke(
        "python tools/make_workflows.py train_then_generate --out OUT", check_workflow, marks=BROWSER
    ),
    ("python tools/make_help_pictures.py",): Smoke(
        "python tools/make_help_pictures.py DreamBoothScaleLora --out OUT", check_help_picture, marks=BROWSER
    ),
    ("python tools/make_tutorial_pictures.py",): Smoke(
        "python tools/make_tutorial_pictures.py --smoke --out OUT", check_tutorial_pictures
    ),
    ("python tools/make_registry_pictures.py",): Smoke(
        "python tools/make_registry_pictures.py --out OUT", check_registry_pictures
    ),
    ("python tools/make_golden.py", "python tools/make_foreign_golden.py"): NotHere(PEER),
    ("python install.py",): Smoke("python install.py", printed(r"^\[DreamBooth LoRA\] ")),
    ("pip install", "npm install"): NETWORK,
    ("accelerate launch",): NotHere("It needs two GPUs."),
    ("python -m torch.distributed.run",): RunBy(
        "tests/dreambooth/test_distributed.py::test_two_learn_what_one_would", "torch.distributed.run"
    ),
    ("python -m trainer",): RunBy(f"{COMMAND_LINE}::test_help_lists_the_commands", "--help"),
    ("python -m trainer new",): RunBy(
        "tests/cli/test_new.py::test_train_takes_the_file_once_base_and_images_are_set", "new"
    ),
    ("python -m trainer info",): RunBy("tests/cli/test_info.py::test_versions_devices_and_disk_are_reported", "info"),
    ("python -m trainer completion",): RunBy("tests/cli/test_completion.py::test_bash", "completion"),
    ("python -m trainer train",): RunBy(f"{COMMAND_LINE}::test_train_generate_inspect", "train"),
    ("python -m trainer generate",): RunBy(f"{COMMAND_LINE}::test_train_generate_inspect", "generate"),
    ("python -m trainer priors",): RunBy(f"{COMMAND_LINE}::test_priors", "priors"),
    ("python -m trainer plan",): RunBy(
        "tests/training/test_memory_plan.py::test_the_command_shows_every_way_and_what_is_picked", "plan"
    ),
    ("python -m trainer caption",): RunBy(
        "tests/data/test_captioning.py::test_the_command_prints_a_line_per_picture", "caption"
    ),
    ("python -m trainer merge",): RunBy(f"{MERGE_COMMANDS}::test_the_program_itself", "merge"),
    ("python -m trainer learned-merge",): RunBy(f"{MERGE_COMMANDS}::test_learned_merge", "learned-merge"),
    ("python -m trainer resize",): RunBy(f"{MERGE_COMMANDS}::test_resize", "resize"),
    ("python -m trainer extract",): RunBy(f"{MERGE_COMMANDS}::test_extract", "extract"),
    ("python -m trainer convert",): RunBy(f"{MERGE_COMMANDS}::test_flags_may_stand_before_the_files", "convert"),
    ("python -m trainer fuse",): RunBy(f"{MERGE_COMMANDS}::test_fuse", "fuse"),
    ("python -m trainer score",): RunBy(
        "tests/dreambooth/test_privacy.py::test_merged_files_reports_and_tables_tell_no_path", "score"
    ),
    ("python -m trainer compare",): RunBy(
        "tests/dreambooth/test_privacy.py::test_merged_files_reports_and_tables_tell_no_path", "compare"
    ),
    ("python -m trainer dreambench",): RunBy(
        "tests/cli/test_dreambench.py::test_the_table_holds_every_subject_and_what_was_published", "dreambench"
    ),
}
BY_WORDS = {words: way for heads, way in COMMANDS.items() for words in heads}
SMOKES = {heads: way for heads, way in COMMANDS.items() if isinstance(way, Smoke)}


def entry_of(command: Command) -> str:
    """The longest entry with which a command begins; "" if there is none."""
    return max((words for words in BY_WORDS if command.begins_with(words)), key=len, default="")


# Every day: what is named exists


def test_every_command_has_its_entry() -> None:
    strangers = [f"{command.where}: {command.text}" for command in documented_commands() if not entry_of(command)]
    assert strangers == [], "add them to COMMANDS, with a smaller run, the test that runs them, or a reason"


def test_every_base_of_the_demo_can_be_chosen() -> None:
    assert {parse(["demo", "--family", family]).family for family in BASES} == set(BASES)
    assert all(
        (ROOT / "demo" / folder).is_dir() and (ROOT / "demo" / file).is_file() for folder, file in BASES.values()
    )


def test_every_entry_is_needed() -> None:
    assert set(BY_WORDS) - {entry_of(command) for command in documented_commands()} == set()


@pytest.mark.parametrize("heads", SMOKES, ids=lambda heads: heads[0])
def test_documented_flags_are_tried(heads: tuple[str, ...]) -> None:
    """A run at smoke size gets every flag that documents name, or says why not."""
    smoke = SMOKES[heads]
    documented = {flag for one in documented_commands() if entry_of(one) in heads for flag in one.flags}
    expanded = run_by_make(smoke.words) if smoke.words.startswith("make ") else ()
    tried = flags_in(" ".join([smoke.words, *expanded]))
    assert documented - tried == set(smoke.left_out)


@pytest.mark.parametrize(
    "command", [one for one in documented_commands() if re.match(r"python \S+\.py", one.text)], ids=str
)
def test_programs_exist_and_know_their_flags(command: Command) -> None:
    path = ROOT / command.words[1]
    text = path.read_text(encoding="utf-8")
    if "add_arguments(" in text:
        text += (path.parent / "kinds.py").read_text(encoding="utf-8")
    assert [flag for flag in command.flags if f'"{flag}"' not in text] == [], command.where


@pytest.mark.parametrize(
    "command", [one for one in documented_commands() if " pytest tests/" in one.text or " -k " in one.text], ids=str
)
def test_tests_that_are_named_are_there(command: Command) -> None:
    words = shlex.split(" ".join(command.words))  # once more: ARGS of make holds words, too
    for word in words:
        file = ROOT / word.removeprefix("ARGS=")
        if file.suffix == ".py":
            names = re.findall(r"(?m)^ *def (test_\w+)", file.read_text(encoding="utf-8"))
            wanted = words[words.index("-k") + 1] if "-k" in words else "test_"
            assert any(wanted in name for name in names), command.where


@pytest.mark.parametrize("words", [one for one, way in BY_WORDS.items() if isinstance(way, RunBy)])
def test_the_test_that_runs_a_command_is_there(words: str) -> None:
    way = BY_WORDS[words]
    assert isinstance(way, RunBy)
    file, _, name = way.test.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert name in {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert f'"{way.says}"' in text


# Every day: what `python -m trainer` is given is taken

TRAINER = [one.text for one in documented_commands() if re.search(r"-m trainer [a-z]", one.text)]


@pytest.mark.parametrize("text", TRAINER)
def test_the_engine_takes_what_documents_say(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags and values are those of the command, and no setting is without effect."""
    monkeypatch.chdir(tmp_path)
    name, *words = shlex.split(re.sub(r"\[[^]]*\]|…", "", text.partition("-m trainer ")[2]))
    is_pattern = "…" in text or not words
    for config in [word for word in words if word.endswith(".toml") and name in REQUIRED]:
        table = (f"{key} = {json.dumps(value)}\n" for key, value in REQUIRED[name].items())
        Path(config).write_text("".join(table), encoding="utf-8")
    arguments = parse([name, *(word for word in words if not (is_pattern and word.isupper()))])
    if name in KINDS:
        if is_pattern:  # which leaves the rest to the reader
            arguments = argparse.Namespace(**{**REQUIRED[name], **vars(arguments)})
        assert settings_from(arguments, KINDS[name]).without_effect() == {}


# In earnest, at smoke size


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the pack, in which commands may write where they write by themselves; its demo learns little."""
    not_ours = shutil.ignore_patterns(".*", "__pycache__", "node_modules", "output", "results")
    copy = Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "dreambooth-lora", ignore=not_ours))
    for demo in (copy / "demo").glob("*.toml"):
        less = re.sub(r"(?m)^(steps|prior_count|prior_steps) = \d+$", r"\1 = 2", demo.read_text(encoding="utf-8"))
        demo.write_text(less, encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that make takes for a virtual environment which is ready: its Python is the one that runs the tests."""
    folder = tmp_path_factory.mktemp("venv")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    (folder / ".ready").touch()
    return folder


def run(words: str, out: Path, tree: Path, environment: Path, status: int = 0) -> Ran:
    """Run a command in the copy; nothing of the tests' own surroundings reaches it."""
    command = shlex.split(words.replace("OUT", str(out)))
    if command[0] == "make":
        command[1:1] = ["--no-print-directory", f"VENV={environment}", f"--old-file={environment / '.ready'}"]
    else:
        command[0] = sys.executable
    variables = surroundings()
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, cwd=tree, env=variables, capture_output=True, text=True, encoding="utf-8", timeout=HANGS
    )
    assert done.returncode == status, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return Ran(out, tree, done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("smoke", [pytest.param(way, id=heads[0], marks=way.marks) for heads, way in SMOKES.items()])
def test_it_runs(smoke: Smoke, tmp_path: Path, tree: Path, environment: Path) -> None:
    if smoke.prepare:
        smoke.prepare(tmp_path)
    smoke.check(run(smoke.words, tmp_path, tree, environment, smoke.status))
