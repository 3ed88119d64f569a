"""Several processes share every step of a run: they learn what one would, stop and go on together, and one of them
writes. Real processes, as a launcher starts them, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HANGS, ROOT, Recorder
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.cli.train import run_train
from pack.trainer.core import distributed
from pack.trainer.core.devices import pick_device
from pack.trainer.core.distributed import ProcessGroup, accelerate_state_kept, tensor_groups
from pack.trainer.core.errors import SettingsError
from pack.trainer.dreambooth import TrainResult
from pack.trainer.settings.train import TrainCommand
from pack.trainer.training.runs.folder import run_fingerprint
from pack.trainer.training.runs.metrics import read_metrics
from safetensors import safe_open
from safetensors.torch import load_file
from shell import flags_of
from worlds import differing, newest_step, noisy_pictures, runs_in

pytestmark = pytest.mark.usefixtures("heard_signals", "quick")

WITHOUT_END = 1_000_000  # steps, so that a stop is in time on a machine of any speed
SETTINGS: dict[str, Any] = {
    "name": "dög 1",
    "rank": 4,
    "rank_schedule": "timestep",  # the mask of a sample goes with it to its process
    "min_rank": 1,
    "lora_init": "orthogonal",
    "targets": "attention",
    "resolution": 64,
    "learning_rate": 1e-3,
    "save_precision": "fp32",
    "checkpoint_every": 3,
    "gradient_accumulation": 2,
    "max_grad_norm": 0.01,  # below the gradients' norm, so that it counts
    "text_encoder_lr": 1e-3,
    "token_vectors": 2,
    "token_lr": 1e-3,
    "token_until": 1.0,  # so that a longer run goes on from a shorter one
    "flip": True,
    "prior_weight": 0.5,
    "class_prompt": "a photo of a dog",
    "instance_prompt": "a photo of sks dog",
    "validation_pictures": 1,
    "preview_every": WITHOUT_END,  # those of step 0 and of the last one
    "preview_steps": 1,
    "device": "cpu",
}


# Several trainings one after the other; below a folder of that name the disk is slow.
SCRIPT = """import sys, time
from trainer.__main__ import main
from trainer.training.runs.folder import RunFolder
save = RunFolder.save
def save_slowly(run, *given, **named):
    if "slow" in run.path.parts:
        time.sleep(2)
    return save(run, *given, **named)
RunFolder.save = save_slowly
sys.exit(max(main(words) for words in {words!r}))
"""


@dataclass(frozen=True)
class Ended:
    """A launched command that ended."""

    status: int
    output: str
    errors: str


def launched(*trained: dict[str, Any], stop_at: int | None = None) -> Ended:
    """Train in two processes, run after run; once step `stop_at` is told, the launcher gets Ctrl-C's signal."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, "-m", "trainer", "train", *flags_of(trained[0])]
    if len(trained) > 1:
        program = Path(trained[0]["output_dir"]) / "several.py"
        words = [["train", *flags_of(one)] for one in trained]
        program.write_text(SCRIPT.format(words=words), encoding="utf-8")
        command = [*launcher, str(program)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + HANGS
            while stop_at is not None and process.poll() is None and time.monotonic() < deadline:
                if any(step_told(run, stop_at) for run in runs_in(trained[0]["output_dir"])):
                    process.send_signal(signal.SIGINT)
                    break
                time.sleep(0.005)
            output, errors = process.communicate(timeout=HANGS)
        except BaseException:
            process.kill()
            raise
    return Ended(process.returncode, output, errors)


def step_told(run: Path, step: int) -> bool:
    return any(line["step"] >= step for line in read_metrics(run / "metrics.jsonl"))


@dataclass(frozen=True)
class Course:
    """A run of two processes: stopped; then, in other processes, resumed for four steps more, once more from the start
    beside it, a third time on a slow disk, and a fourth time where the leader can't write its metrics."""

    values: dict[str, Any]
    stopped: Ended
    kept: int
    steps: int
    ended: Ended

    @property
    def last(self) -> str:
        """The folder of the last checkpoint."""
        return f"step-{self.steps:08d}"


@pytest.fixture(scope="module")
def values(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("several procésses")
    places = {"base": tiny_checkpoint, "output_dir": folder / "output"}
    places |= {"images": noisy_pictures(folder / "dog", 4, 0), "class_images": noisy_pictures(folder / "class", 2, 50)}
    return SETTINGS | places


@pytest.fixture(scope="module")
def course(values: dict[str, Any]) -> Course:
    stopped = launched(values | {"steps": WITHOUT_END}, stop_at=1)
    [run] = runs_in(values["output_dir"])
    kept = newest_step(run)
    values = values | {"steps": kept + 4}
    broken = values["output_dir"] / "broken"
    (broken / "runs" / run.name / "metrics.jsonl").mkdir(parents=True)
    shutil.copy(run / "run.json", broken / "runs" / run.name)
    # without previews and held-out pictures nothing else lets the processes wait for each other
    slow = {"output_dir": values["output_dir"] / "slow", "steps": 2, "checkpoint_every": 1}
    slow |= {"preview_every": 0, "validation_pictures": 0}
    ended = launched(values, values | {"resume": "never"}, values | slow, values | {"output_dir": broken})
    return Course(values, stopped, kept, kept + 4, ended)


@pytest.fixture(scope="module")
def alone(course: Course, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """One process with all samples of a step."""
    changes = {"batch_size": 2, "output_dir": tmp_path_factory.mktemp("alone")}
    return run_train(TrainCommand.checked(course.values | changes), Recorder())


def runs_of(course: Course) -> list[Path]:
    """The folders of the resumed run and of the straight one."""
    return sorted(runs_in(course.values["output_dir"]), key=lambda run: len(run.name))


@pytest.mark.slow
def test_a_stop_is_one_for_all_and_keeps_its_step(course: Course) -> None:
    assert course.stopped.status != 0
    assert course.stopped.output == ""
    assert course.kept > 0, course.stopped.errors
    assert course.stopped.errors.count(f"step {course.kept} is saved") == 1
    assert course.stopped.errors.count("Stopping after this step") == 1
    assert "KeyboardInterrupt" not in course.stopped.errors
    assert "RuntimeError" not in course.stopped.errors


@pytest.mark.slow
def test_the_leader_alone_speaks(course: Course) -> None:
    ended = course.ended
    assert len(ended.output.splitlines()) == 3, ended.errors
    first, second, _ = ended.output.splitlines()
    assert first == second  # both runs give the same adapter, and its file is there
    assert [str(path) for path in course.values["output_dir"].glob("*.safetensors")] == [first]
    assert ended.errors.count("Adapter: ") == 3
    assert ended.errors.count(f"Resuming from step {course.kept}") == 1
    assert ended.errors.count(f"Validation loss after step {course.steps}:") == 2


@pytest.mark.slow
def test_stop_and_resume_leave_no_trace(course: Course) -> None:
    """The straight run began anew although the resumed one, with more steps, lay beside it: for all processes."""
    old, new = runs_of(course)
    assert new.name == f"{old.name}-2"
    for file in ("adapter", "factors", "optimizer"):
        name = f"{course.last}/{file}.safetensors"
        assert differing(old / name, new / name) == []


@pytest.mark.slow
def test_two_learn_what_one_would(course: Course, alone: TrainResult) -> None:
    """With the same samples in a step: class pictures, accumulation, clipping, a text encoder, a word, flips."""
    _, run = runs_of(course)
    ours, theirs = load_file(run / course.last / "adapter.safetensors"), load_file(alone.path)
    assert set(ours) == set(theirs)
    assert any(name.startswith("lora_te") for name in ours)
    assert "bundle_emb.sks.string_to_param.*" in ours
    for name, tensor in theirs.items():
        distance = torch.linalg.vector_norm(ours[name] - tensor) / torch.linalg.vector_norm(tensor)
        # gradients are summed in another order, and Adam divides by small ones: 4e-6 to 1.5e-5 from CPU to CPU
        assert float(distance) < 1e-4, name
    ours_told, theirs_told = (losses_of(one) for one in (run, alone.run))
    assert ours_told == pytest.approx(theirs_told, rel=1e-4)


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.slow
def test_every_file_is_written_once(course: Course) -> None:
    for run in runs_of(course):
        lines = read_metrics(run / "metrics.jsonl")
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, course.steps + 1))
        told = [line["step"] for line in lines if "validation_loss" in line]
        assert len(told) == len(set(told))
        assert {*range(0, course.steps, 3), course.steps} <= set(told)
        assert [line["step"] for line in lines if "scores" in line] == [0, course.steps]
        assert [line["state"] for line in lines if "state" in line] == ["done"]
        assert not list(run.rglob(".tmp-*"))


@pytest.mark.slow
def test_nobody_reads_a_checkpoint_that_is_being_written(course: Course) -> None:
    [run] = runs_in(course.values["output_dir"] / "slow")
    assert [line["state"] for line in read_metrics(run / "metrics.jsonl") if "state" in line] == ["done"]
    assert "damaged" not in course.ended.errors
    assert course.ended.output.splitlines()[2].startswith(str(course.values["output_dir"] / "slow"))


@pytest.mark.slow
def test_the_number_of_processes_is_part_of_a_run(course: Course, alone: TrainResult) -> None:
    path = course.ended.output.splitlines()[0]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    ours, theirs = (json.loads(one["dreambooth.config"]) for one in (metadata, alone.adapter.metadata))
    assert (ours["processes"], ours["batch_size"], metadata["ss_total_batch_size"]) == (2, 1, "4")
    assert ("processes" in theirs, theirs["batch_size"]) == (False, 2)
    assert metadata["ss_total_batch_size"] == alone.adapter.metadata["ss_total_batch_size"]
    assert metadata["dreambooth.fingerprint"] != alone.adapter.metadata["dreambooth.fingerprint"]


def test_the_fingerprint_counts_processes(tiny_checkpoint: Path) -> None:
    from pack.trainer.models.open import open_base
    from pack.trainer.settings.train import TrainSettings

    base = open_base(tiny_checkpoint)
    found = [run_fingerprint(base, [], [], TrainSettings(), "fp32", None, count) for count in (1, 2, 3)]
    assert len(set(found)) == 3
    assert found[0] == run_fingerprint(base, [], [], TrainSettings(), "fp32")


@pytest.mark.slow
def test_an_error_of_one_ends_all_with_its_words(course: Course) -> None:
    """The leader can't write its metrics, while the other waits for it."""
    [run] = runs_in(course.values["output_dir"] / "broken")
    assert course.ended.status != 0
    assert course.ended.errors.count(f"error: {run / 'metrics.jsonl'} can't be") == 1
    assert newest_step(run) == 0


@given(st.lists(st.integers(1, 9), min_size=1), st.integers(1, 20))
def test_gradients_travel_in_groups_of_limited_size(sizes: list[int], most: int) -> None:
    tensors = [torch.empty(size) for size in sizes]
    groups = list(tensor_groups(tensors, most))
    assert [id(one) for group in groups for one in group] == [id(one) for one in tensors]
    counts = [sum(one.numel() for one in group) for group in groups]
    assert all(count <= most or len(group) == 1 for count, group in zip(counts, groups, strict=True))
    joined = zip(counts, groups[1:], strict=False)
    assert all(count + following[0].numel() > most for count, following in joined)


def test_gradients_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """By two threads that meet in place of two processes; in more than one reduction, and not where there is none."""
    meeting, flats = threading.Barrier(2, timeout=HANGS), dict[int, torch.Tensor]()

    def all_reduce(flat: torch.Tensor) -> None:
        flats[threading.get_ident()] = flat.clone()
        meeting.wait()
        total = sum(flats.values(), start=torch.zeros(()))
        meeting.wait()
        flat.copy_(total)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "_MAX_NUMBERS_PER_REDUCTION", 7)
    shapes = [(2, 3), (4,), (5,), (1, 2)]
    teams = [[torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2)]
    for number, team in enumerate(teams):
        for place, parameter in enumerate(team):
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * number + place))
            parameter.grad = None if place == 2 else values
    expected = [None if one.grad is None else (one.grad + other.grad) / 2 for one, other in zip(*teams, strict=True)]
    losses: dict[int, torch.Tensor] = {}

    def average(number: int) -> None:
        losses[number] = ProcessGroup(number, 2).average_gradients(teams[number], torch.tensor(float(number)))

    threads = [threading.Thread(target=average, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [float(losses[number]) for number in range(2)] == [0.5, 0.5]
    for team in teams:
        for parameter, mean in zip(team, expected, strict=True):
            assert (parameter.grad is None) == (mean is None)
            assert mean is None or torch.equal(parameter.grad, mean)


def test_a_clusters_variables_alone_are_no_team(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a launcher sets LOCAL_RANK; without one there is nobody to wait for."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with accelerate_state_kept():
        team = ProcessGroup.current(cpu=True)
    assert (team.is_main_process, team.share) == (True, (0, 1))
    assert team.broadcast_from_main(lambda: 3) == 3


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_processes_don_t_share_a_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="share") as caught:
        pick_device(device)
    assert "device = auto" in caught.value.remedy


@pytest.mark.parametrize("leads", [True, False])
def test_the_main_process_makes_what_the_others_find(leads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait before the block, the main process after it; then all wait for the slowest."""
    course: list[str] = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: course.append("wait"))
    with ProcessGroup(0 if leads else 1, 2).main_process_first():
        course.append("block")
    assert course == (["block", "wait", "wait"] if leads else ["wait", "block", "wait"])
    with ProcessGroup().main_process_first():
        course.clear()
    assert not course


@pytest.mark.parametrize(("others", "any_of_them", "largest"), [(0, True, 3), (7, True, 7)])
def test_all_get_the_answer_of_all(
    others: int, any_of_them: bool, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_reduce(numbers: torch.Tensor, operation: Any) -> None:
        assert operation == torch.distributed.ReduceOp.MAX
        numbers.clamp_(min=others)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    team, cpu = ProcessGroup(1, 2), torch.device("cpu")
    assert team.largest(3, cpu) == largest
    assert team.any_process(True, cpu) is any_of_them
    assert team.any_process(False, cpu) is (others > 0)
    assert ProcessGroup().largest(3, cpu) == 3
    assert (team.share, team.is_main_process) == ((1, 2), False)
