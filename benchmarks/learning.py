"""Learning from few pictures: trains every way, and the peers, on the demo's world, and compares them with its truth.

    python benchmarks/learning.py run [--ways none class-pictures] [--subjects dog mug] [--seeds 0 1 2]
    python benchmarks/learning.py run --diffusers FOLDER --diffusers-python FILE --kohya FOLDER --kohya-python FILE
    python benchmarks/learning.py table [--page docs/learning.md]    # from what has run, as Markdown and CSV
    python benchmarks/learning.py sheet [--sheet docs/learning.jpg]    # pictures of what has run
    python benchmarks/learning.py search [--seeds 0 1] [--keep 3]    # for a better recipe
    python benchmarks/learning.py run --smoke --out FOLDER    # only tries it out

Every way, subject and seed is a job of one core with a result of its own in --out; those that are there, made with the
same settings, are skipped, so that `run` and `search` go on where they were interrupted. A subject is five pictures;
the word is "sks". Reported, as mean and spread over the seeds of the means over the subjects:
    fidelity     CLIP-I (the demo's scorer) between pictures of the subject in three places where no training
                 picture shows it, and what the world's program draws there; "recognised" is the share that a judge,
                 trained on drawings, takes for this thing in this coat
    prompt       CLIP-T, and the share of pictures in which the judge sees the place that was asked for
    drift        1 - CLIP-I between the base's and the tuned model's pictures of the class without the word, from the
                 same noise; "plain" is the share of them that the judge still takes for plain things of the class,
                 "taken" that which it takes for the subject; "others" is the drift of other things
    diversity    1 - CLIP-I among the pictures of a prompt
    passes       of the UNet in all: a forward of one latent is 1, with its backward 3, class pictures included
    seconds      of one core (CPU time), class pictures included, without imports
The search changes one setting of the default recipe at a time, judges it on the dog and the mug, joins the best
changes, and tries those and the recipe on the cat and the robot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
sys.dont_write_bytecode = True

import torch  # noqa: E402
from learning_score import DEMO, SMOKE, Effort, Scorer, objective  # noqa: E402
from learning_tables import (  # noqa: E402
    JUDGE_FILE,
    JUDGE_WEIGHTS,
    RECIPE_TITLE,
    SEARCH_TABLE,
    SUBJECT_NAMES,
    as_csv,
    as_page,
    contact_sheet_of,
    load_results,
    missing_jobs,
    put_into_page,
    search_table,
)
from learning_ways import (  # noqa: E402
    CLASS_PICTURES,
    PEERS,
    RECIPE,
    SEARCHED_FROM,
    UNNAMED,
    WAYS,
    PeerJob,
    checkpoints_of,
    diffusers_command,
    filled,
    joint_changes,
    kohya_command,
    single_changes,
)
from peer_runner import PassCounter  # noqa: E402
from PIL import Image  # noqa: E402
from subjects import SUBJECTS  # noqa: E402

from trainer.adapters.kohya import read_adapter  # noqa: E402
from trainer.cli.train import run_priors, run_train  # noqa: E402
from trainer.core.errors import TrainerError  # noqa: E402
from trainer.core.events import SilentListener  # noqa: E402
from trainer.core.garbage import own_process  # noqa: E402
from trainer.data.images import Picture  # noqa: E402
from trainer.models.open import open_base  # noqa: E402
from trainer.settings.train import PriorsCommand, PriorSettings, TrainCommand  # noqa: E402
from trainer.training.runs.folder import RunFolder  # noqa: E402

BASE, TRUTH = "base", "truth"
TUNED_ON, JUDGED_ON = ("dog", "mug"), ("cat", "robot")
RESULTS = ROOT / "benchmarks" / "results" / "learning"


@dataclass
class Cost:
    """What something took.

    Attributes:
        passes: Of the UNet.
        seconds: By the clock.
        cpu_seconds: Of all threads.
    """

    passes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.passes + other.passes, self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


@dataclass(frozen=True)
class Peer:
    """A checkout of another project.

    Attributes:
        folder: Of the script.
        python: The interpreter that has what it needs.
    """

    folder: Path
    python: Path


@dataclass(frozen=True)
class Job:
    """One way, subject and seed, with the settings of the way."""

    way: str
    subject: str
    seed: int
    settings: dict[str, Any]


class Bench:
    """Runs jobs and keeps their results.

    Attributes:
        out: Folder of the results, and of the judge that all of them share.
        work: Folder for adapters, class pictures and generated pictures; can be deleted.
    """

    def __init__(self, out: Path, effort: Effort, peers: dict[str, Peer]) -> None:
        self.out = out
        self.work = out / "work"
        self.effort = effort
        self.peers = peers
        self._base = open_base(DEMO / "base")
        self._counter = PassCounter()
        from diffusers import UNet2DConditionModel

        self._counter.watch(UNet2DConditionModel)
        self._scorer = Scorer(self._base, self.work, out / JUDGE_WEIGHTS, effort)
        accuracy = self._scorer.judge.accuracy
        write_json(out / JUDGE_FILE, {name: round(accuracy[name], 4) for name in sorted(accuracy)})

    def run_all(self, jobs: Sequence[Job], folder: Path, report: Callable[[str], None]) -> None:
        """Run the jobs that have no result with the same settings; one that can't run is reported and left out."""
        for job in jobs:
            file = folder / job.way / f"{job.subject}-{job.seed}.json"
            if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["settings"] == job.settings:
                continue
            title = f"{job.way}, {job.subject}, seed {job.seed}"
            try:
                result = self.run(job, file)
            except (TrainerError, subprocess.CalledProcessError) as error:
                report(f"{title}: left out. {error}")
                continue
            write_json(file, result)
            report(f"{title}: {json.dumps(result['curve'][-1])}")

    def run(self, job: Job, file: Path) -> dict[str, Any]:
        """Train and score; returns the result."""
        subject = SUBJECTS[job.subject]
        facts: dict[str, Any] = {"way": job.way, "subject": job.subject, "seed": job.seed, "settings": job.settings}
        if job.way == TRUTH:
            return {**facts, "curve": [{"step": 0, **self._scorer.truth_metrics(subject)}]}
        prior_cost = Cost()
        if job.way == BASE:
            checkpoints: dict[int, Path | None] = {0: None}
            cost = Cost()
        else:
            scratch = self._fresh(job)
            if job.way in self.peers_ways():
                checkpoints, cost, prior_cost = self._train_peer(job, scratch)
            else:
                checkpoints, cost, prior_cost = self._train(job, scratch)
        curve = []
        last = max(checkpoints)
        for step, path in checkpoints.items():
            adapters = [(read_adapter(path), 1.0)] if path else []
            count = self.effort.final if step == last else self.effort.curve
            metrics, shown = self._scorer.score(subject, adapters, count, others=step == last)
            curve.append({"step": step, **metrics})
        save_strip(self.work / "strips" / file.relative_to(self.out).with_suffix(".png"), shown)
        total = cost + prior_cost
        costs = {
            "passes": total.passes,
            "passes_of_class_pictures": prior_cost.passes,
            "cpu_seconds": round(total.cpu_seconds, 1),
            "seconds": round(total.seconds, 1),
        }
        return {**facts, **costs, "curve": curve}

    def peers_ways(self) -> list[str]:
        """The ways of the peers that are here."""
        return [way for way, peer_way in PEERS.items() if peer_way.project in self.peers]

    def _fresh(self, job: Job) -> Path:
        folder = self.work / "runs" / f"{job.way}-{job.subject}-{job.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _images(self, name: str) -> Path:
        folder = self.work / "subjects" / name
        SUBJECTS[name].write(folder)
        return folder

    def _train(self, job: Job, scratch: Path) -> tuple[dict[int, Path | None], Cost, Cost]:
        thing = SUBJECTS[job.subject].thing
        values = filled({**UNNAMED, **RECIPE, **job.settings}, thing)
        values["steps"] = min(values["steps"], self.effort.steps)
        values["checkpoint_every"] = min(values["checkpoint_every"], self.effort.steps)
        if values.get("prior_count"):
            values["prior_count"] = min(values["prior_count"], self.effort.class_pictures)
            values["prior_steps"] = min(values["prior_steps"], self.effort.prior_steps)
        common = {"base": DEMO / "base", "output_dir": scratch, "device": "cpu"}
        settings = TrainCommand.checked(
            {**values, **common, "images": self._images(job.subject), "seed": job.seed, "name": "lora"}
        )
        prior_cost = Cost()
        if settings.prior_count:
            folder, prior_cost = self._class_pictures(values)
            shutil.copytree(folder / "class-pictures", scratch / "class-pictures")
        with self._measured() as cost:
            result = run_train(settings, SilentListener())
        return {**RunFolder(result.run).adapters(), result.step: result.path}, cost, prior_cost

    def _class_pictures(self, values: dict[str, Any]) -> tuple[Path, Cost]:
        """An output folder with class pictures, generated once, and what that cost."""
        priors = {name: values[name] for name in PriorSettings.model_fields if name in values}
        key = "-".join(str(value).replace(" ", "_") for value in priors.values())
        folder = self.work / "priors" / key
        ledger = folder / "cost.json"
        if not ledger.is_file():
            command = PriorsCommand.checked(
                {**priors, "resolution": 64, "base": DEMO / "base", "output_dir": folder, "device": "cpu"}
            )
            with self._measured() as cost:
                run_priors(command, SilentListener())
            write_json(ledger, vars(cost))
        return folder, Cost(**json.loads(ledger.read_text(encoding="utf-8")))

    def _train_peer(self, job: Job, scratch: Path) -> tuple[dict[int, Path | None], Cost, Cost]:
        way = PEERS[job.way]
        thing = SUBJECTS[job.subject].thing
        class_images = None
        prior_cost = Cost()
        if way.class_pictures:
            values = filled({**UNNAMED, **CLASS_PICTURES}, thing)
            values["prior_count"] = min(values["prior_count"], self.effort.class_pictures)
            values["prior_steps"] = min(values["prior_steps"], self.effort.prior_steps)
            folder, prior_cost = self._class_pictures(values)
            class_images = scratch / "given class pictures"
            class_images.mkdir()
            for number, picture in enumerate(sorted(folder.rglob("*.png"))):
                shutil.copy(picture, class_images / f"{number:03d}.png")
        peer = self.peers[way.project]
        steps = min(way.steps, self.effort.steps)
        peer_job = PeerJob(
            way=way,
            base=DEMO / "base",
            images=self._images(job.subject),
            class_images=class_images,
            thing=thing,
            seed=job.seed,
            out=scratch,
            steps=steps,
            every=max(1, steps // 4),
        )
        command = (diffusers_command if way.project == "diffusers" else kohya_command)(peer_job, peer.folder)
        report = scratch / "report.json"
        runner = [str(peer.python), str(ROOT / "benchmarks" / "peer_runner.py")]
        with (scratch / "log.txt").open("w", encoding="utf-8") as log:
            subprocess.run(
                [*runner, str(report), str(DEMO / "base" / "unet" / "config.json"), *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
        checkpoints: dict[int, Path | None] = {**checkpoints_of(peer_job)}
        return checkpoints, Cost(**json.loads(report.read_text(encoding="utf-8"))), prior_cost

    @contextlib.contextmanager
    def _measured(self) -> Iterator[Cost]:
        cost = Cost()
        passes, began, used = self._counter.passes, time.perf_counter(), time.process_time()
        yield cost
        cost.passes = self._counter.passes - passes
        cost.seconds = time.perf_counter() - began
        cost.cpu_seconds = time.process_time() - used


def write_json(file: Path, value: Any) -> None:
    """Write a small JSON file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def save_strip(file: Path, pictures: Sequence[Picture]) -> None:
    """Pictures side by side, for the contact sheet."""
    strip = Image.new("RGB", (64 * len(pictures), 64))
    for number, picture in enumerate(pictures):
        strip.paste(picture.open(), (64 * number, 0))
    file.parent.mkdir(parents=True, exist_ok=True)
    strip.save(file)


def jobs_of(ways: Sequence[str], subjects: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Jobs of ways: seed by seed, so that a run that is cut short has all ways with as many seeds."""
    jobs = [Job(way, subject, 0, {}) for way in (BASE, TRUTH) for subject in subjects]
    for seed in seeds:
        for way in ways:
            settings = {**RECIPE, **WAYS[way]} if way in WAYS else dict(PEERS[way].options)
            jobs += [Job(way, subject, seed, settings) for subject in subjects]
    return jobs


def run(arguments: argparse.Namespace) -> None:
    """Train and score what is missing."""
    bench = Bench(arguments.out, arguments.effort, peers_in(arguments))
    ways = arguments.ways or [*WAYS, *bench.peers_ways()]
    for way in PEERS:
        if way not in bench.peers_ways() and way in (arguments.ways or PEERS):
            print(f"{way}: left out. Give --{PEERS[way].project} CHECKOUT.", flush=True)
    ways = [way for way in ways if way in WAYS or way in bench.peers_ways()]
    bench.run_all(jobs_of(ways, arguments.subjects, arguments.seeds), arguments.out, report)


def peers_in(arguments: argparse.Namespace) -> dict[str, Peer]:
    """The checkouts that were given."""
    given = {
        "diffusers": (arguments.diffusers, arguments.diffusers_python),
        "kohya": (arguments.kohya, arguments.kohya_python),
    }
    return {name: Peer(folder, python.absolute()) for name, (folder, python) in given.items() if folder is not None}


def search(arguments: argparse.Namespace) -> None:
    """Try changes of the recipe on two subjects, and the best of them, alone and together, on two others."""
    bench = Bench(arguments.out, arguments.effort, {})
    folder = arguments.out / "search"
    singles = dict(list(single_changes().items())[: arguments.trials])

    def try_all(trials: dict[str, dict[str, Any]], subjects: Sequence[str]) -> None:
        for seed in arguments.seeds:
            for way, changes in trials.items():
                settings = {**SEARCHED_FROM, **changes}
                bench.run_all([Job(way, subject, seed, settings) for subject in subjects], folder, report)

    def best_of(trials: dict[str, dict[str, Any]]) -> list[str]:
        results = load_results(folder)
        return sorted(trials, key=lambda way: -mean_objective(results, way, TUNED_ON))

    try_all({RECIPE_TITLE: {}, **singles}, TUNED_ON)
    joint = joint_changes(best_of(singles))
    try_all(joint, TUNED_ON)
    trials = {**singles, **joint}
    kept = {way: trials[way] for way in best_of(trials)[: arguments.keep]}
    try_all({RECIPE_TITLE: {}, **kept}, JUDGED_ON)
    text = search_table(load_results(folder), TUNED_ON, JUDGED_ON, objective)
    (folder / SEARCH_TABLE).write_text(text, encoding="utf-8")
    print(text)


def mean_objective(results: Sequence[dict[str, Any]], way: str, subjects: Sequence[str]) -> float:
    """Of a trial at its end; 0 if it could not run."""
    values = [
        objective(result["curve"][-1]) for result in results if result["way"] == way and result["subject"] in subjects
    ]
    return sum(values) / len(values) if values else 0.0


def table(arguments: argparse.Namespace) -> None:
    """Tables from the results: table.md and table.csv beside them, and into a page."""
    results = load_results(arguments.out)
    text = as_page(results, arguments.out)
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    (arguments.out / "table.csv").write_text(as_csv(results), encoding="utf-8")
    if arguments.page:
        put_into_page(arguments.page, text)
    print(text)
    for line in missing_jobs(results, [*WAYS, *PEERS]):
        print(f"missing: {line}")


def sheet(arguments: argparse.Namespace) -> None:
    """A contact sheet of each subject, beneath one another."""
    arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet_of(arguments.out, arguments.ways or [*WAYS, *PEERS]).save(arguments.sheet, quality=85)


def report(line: str) -> None:
    """Say what has been done."""
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in (("run", run), ("table", table), ("sheet", sheet), ("search", search)):
        of_command = commands.add_parser(name, help=command.__doc__)
        of_command.set_defaults(command=command)
        of_command.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
        if name in ("run", "search"):
            of_command.add_argument("--smoke", dest="effort", action="store_const", const=SMOKE, default=Effort())
        if name in ("run", "sheet"):
            of_command.add_argument("--ways", nargs="+", choices=[*WAYS, *PEERS], help="default: all")
        if name == "run":
            of_command.add_argument("--subjects", nargs="+", choices=SUBJECT_NAMES, default=SUBJECT_NAMES)
            of_command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
            python = Path(sys.executable)
            of_command.add_argument("--diffusers", type=Path, help="folder of diffusers' script")
            of_command.add_argument("--diffusers-python", type=Path, default=python, help="its interpreter")
            of_command.add_argument("--kohya", type=Path, help="folder of kohya's scripts")
            of_command.add_argument("--kohya-python", type=Path, default=python, help="their interpreter")
        if name == "table":
            of_command.add_argument("--page", type=Path, help="page with the markers between which the tables go")
        if name == "sheet":
            of_command.add_argument("--sheet", type=Path, default=ROOT / "docs" / "learning.jpg")
        if name == "search":
            of_command.add_argument("--trials", type=int, help="try only the first of the single changes")
            of_command.add_argument("--keep", type=int, default=3, help="trials that are tried on the other subjects")
            of_command.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.command(arguments)


if __name__ == "__main__":
    with own_process():
        main()
