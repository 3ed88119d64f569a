"""What the nodes send to pages while the engine works: few messages whatever happens, by a clock of the test's own."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from bare_host import host_modules
from hypothesis import given
from hypothesis import strategies as st
from pack.trainer.core.errors import SettingsError, suggest
from pack.trainer.core.events import Event, Note, Phase, Preview, RunOpened, Step, Validation

MOST_A_SECOND = 10


class Node:
    """A node that listens to the engine, and what it sends to an open page: when, by what way, and what."""

    def __init__(self, progress: Any, listener: str) -> None:
        self.now = 1000.0
        self.sent: list[tuple[float, str, Any]] = []
        progress.time = SimpleNamespace(monotonic=lambda: self.now)
        instance = importlib.import_module("server").PromptServer.instance
        instance.sockets = {"page": None}
        instance.send_sync = lambda kind, message: self.sent.append((self.now, kind, message))
        instance.send_progress_text = lambda text, node: self.sent.append((self.now, "text", text))
        execution = SimpleNamespace(set_progress=lambda **facts: self.sent.append((self.now, "progress", facts)))
        importlib.import_module("pack.nodes.api").ComfyAPISync = lambda: SimpleNamespace(execution=execution)
        node = SimpleNamespace(hidden=SimpleNamespace(unique_id="1"))
        further = ("dog", [], None) if listener == "TrainingListener" else ()
        self.listener = getattr(progress, listener)(node, *further)

    def report(self, events: Sequence[tuple[float, Event]]) -> None:
        """Report events, each some seconds after the one before."""
        for seconds, event in events:
            self.now += seconds
            self.listener.report(event)

    def busiest_second(self) -> int:
        times = [at for at, _, _ in self.sent]
        return max(sum(start <= at < start + 1 for at in times) for start in [*times, self.now])

    def told(self, name: str) -> list[Any]:
        """What the pack's own messages say of something."""
        return [message[name] for _, kind, message in self.sent if kind == "dreambooth" and name in message]


@pytest.fixture(scope="module")
def progress(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module of the listeners, in a bare host."""
    with host_modules(tmp_path_factory.mktemp("host"), web.RouteTableDef()):
        yield importlib.import_module("pack.nodes.host_progress")


def step(number: int, steps: int = 1000) -> Step:
    return Step(number, steps, 1 / number, 1e-4, 2.0, 1.0, 9)


OFTEN = (
    st.builds(step, st.integers(1, 999))
    | st.builds(Phase, st.just("encoding pictures"), st.integers(1, 49), st.just(50))
    | st.builds(Note, st.just("0.png is skipped."), st.booleans())
)


@pytest.mark.parametrize("listener", ["NodeListener", "TrainingListener"])
@given(events=st.lists(st.tuples(st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.7]), OFTEN), max_size=200))
def test_what_happens_often_is_not_sent_often(listener: str, progress: Any, events: list[tuple[float, Event]]) -> None:
    node = Node(progress, listener)
    node.report(events)
    assert node.busiest_second() <= MOST_A_SECOND


def test_many_notes_are_not_many_messages(progress: Any) -> None:
    node = Node(progress, "NodeListener")
    node.report([(0.01, Note(f"{number}.png is skipped.", warning=True)) for number in range(300)])
    assert 2 * 3 <= len(node.sent) <= MOST_A_SECOND * 4
    assert node.busiest_second() <= MOST_A_SECOND


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.1, 0.4, 3.0])
def test_every_step_is_told_once_and_in_time(seconds: float, progress: Any) -> None:
    node = Node(progress, "TrainingListener")
    node.report([(0.0, RunOpened(Path("dog-1"), 0, 100)), *((seconds, step(number, 100)) for number in range(1, 101))])
    steps = list(itertools.chain.from_iterable(points["steps"] for points in node.told("points")))
    assert steps == [*range(1, 101)]
    assert node.told("step")[-1] == 100
    assert node.busiest_second() <= MOST_A_SECOND
    updates = [at for at, kind, message in node.sent if kind == "dreambooth" and "points" in message]
    pauses = [after - before for before, after in itertools.pairwise(updates)]
    assert max(pauses, default=0.0) <= 1.0 + seconds


def test_pictures_and_scores_are_told_at_once_with_the_steps_before(progress: Any) -> None:
    node = Node(progress, "TrainingListener")
    run = Path("runs", "dog-1")
    preview = Preview(2, [(run / "previews" / "step-00000002" / "subject-00-00.png", "a dog")], {"CLIP-I": 0.5})
    node.report(
        [(1.0, RunOpened(run, 0, 9)), (1.0, step(1)), (0.0, step(2)), (0.0, preview), (0.0, Validation(2, 0.25))]
    )
    assert node.told("points")[-1]["steps"] == [2]
    url = "/dreambooth/runs/dog-1/files/previews/step-00000002/subject-00-00.png"
    assert node.told("preview") == [{"step": 2, "pictures": [url], "scores": {"CLIP-I": 0.5}}]
    assert node.told("scores") == [{"step": 2, "scores": {"validation_loss": 0.25}}]
    assert {message["run"] for _, kind, message in node.sent if kind == "dreambooth" and "run" in message} == {"dog-1"}
    assert all(message["name"] == "dog" for _, kind, message in node.sent if kind == "dreambooth")


def test_nothing_is_sent_that_a_page_cannot_read(progress: Any) -> None:
    """JSON has no number that is not finite; a browser reads nothing of a message with one."""
    node = Node(progress, "TrainingListener")
    nan, inf = float("nan"), float("inf")
    odd = Step(1, 9, nan, inf, -inf, nan, 9)
    node.report([(1.0, odd), (1.0, Preview(1, [], {"CLIP-I": nan})), (1.0, Validation(1, inf))])
    [points] = node.told("points")
    assert points == {"steps": [1], "losses": [None], "rates": [None]}
    assert node.told("preview") == [{"step": 1, "pictures": [], "scores": {"CLIP-I": None}}]
    assert node.told("scores") == [{"step": 1, "scores": {"validation_loss": None}}]
    assert (node.told("rate")[-1], node.told("seconds_left")[-1]) == (None, None)


def test_how_a_run_ends_is_told(progress: Any) -> None:
    def facts_after(error: BaseException | None) -> dict[str, Any]:
        node = Node(progress, "TrainingListener")
        with contextlib.suppress(BaseException), node.listener.ending():
            if error:
                raise error
        _, _, message = node.sent[-1]
        return {name: message[name] for name in ("state", "problem", "remedy") if name in message}

    assert facts_after(None) == {"state": "done"}
    assert facts_after(KeyboardInterrupt()) == {"state": "stopped"}
    assert facts_after(OSError("no disk")) == {"state": "failed", "problem": "OSError: no disk", "remedy": ""}
    refused = SettingsError(f"{suggest('resume')} is wrong.", f"Set {suggest('resume', 'never')}.")
    expected = {"state": "failed", "problem": "resume is wrong.", "remedy": "Set resume = never."}
    assert facts_after(refused) == expected
    node = Node(progress, "TrainingListener")
    with pytest.raises(SettingsError), node.listener.ending():
        raise refused


def test_what_a_training_step_and_a_phase_tell(progress: Any) -> None:
    node = Node(progress, "TrainingListener")
    node.report([(1.0, Phase("encoding pictures", 0, 3)), (1.0, Step(4, 9, 0.5, 1e-4, 2.0, 2.5, 77))])
    phase, training = (message for _, kind, message in node.sent[1:] if kind == "dreambooth")
    assert (phase["state"], phase["done"], phase["total"]) == ("encoding pictures", 0, 3)
    names = ("state", "step", "steps", "rate", "seconds_left", "memory")
    assert [training[name] for name in names] == ["training", 4, 9, 2.0, 2.5, 77]
    assert training["points"] == {"steps": [4], "losses": [0.5], "rates": [1e-4]}
    bars = [facts for _, kind, facts in node.sent if kind == "progress"]
    assert [(bar["value"], bar["max_value"], bar["node_id"]) for bar in bars] == [(0, 3, "1"), (4, 9, "1")]
    kept = importlib.import_module("pack.nodes.live").snapshot()["1"]
    assert "points" not in kept
    again = Node(progress, "TrainingListener").sent[0][2]
    assert {*again} == {"state", "name", "node", "at"}, "nothing of the run before"
    assert again["state"] == "starting"


def test_a_plain_node_tells_its_progress_as_text(progress: Any) -> None:
    node = Node(progress, "NodeListener")
    node.report([(1.0, Phase("scoring", 2, 5)), (2.0, step(3, 9)), (2.0, Note(f"Set {suggest('resume', 'never')}."))])
    assert [text for _, kind, text in node.sent if kind == "text"] == [
        "scoring: 2 of 5",
        "Set resume = never.",
    ]
    assert [(bar["value"], bar["max_value"]) for _, kind, bar in node.sent if kind == "progress"] == [(2, 5), (3, 9)]
