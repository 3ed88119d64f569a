"""Who watches a run: its own metrics file, and TensorBoard or Weights & Biases, by accelerate's trackers.

Nothing goes to a tracker before the user chose one in the setting `log_with`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from ...core.errors import SettingsError
from ...core.events import Event, Listener, Note, Preview, Step, Validation
from ...settings.sharing import shareable
from ...settings.train import TrainSettings
from .folder import RunFolder
from .metrics import VALIDATION_LOSS, RecordedListener

PROJECT = "dreambooth-lora"
_TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}
_PATIENCE = 60.0  # seconds
_NOT_SENT = ("offline", "disabled", "dryrun")  # values of WANDB_MODE that need no account


def require_tracker(log_with: str) -> None:
    """Check that a tracker is installed and, if it sends to a server, that it knows an account.

    Args:
        log_with: "none", "tensorboard" or "wandb".

    Raises:
        SettingsError: It is not.
    """
    if log_with == "none":
        return
    title = _TITLES[log_with]
    if importlib.util.find_spec(log_with) is None:
        raise SettingsError(
            f"log_with is '{log_with}', but {title} is not installed.",
            f'Install it with "{sys.executable}" -m pip install {log_with}, or set log_with to none.',
        )
    if log_with == "wandb" and not _may_begin():
        raise SettingsError(
            f"log_with is '{log_with}', but {title} knows no API key.",
            f'Log in with "{sys.executable}" -m wandb login, or set the environment variable WANDB_MODE=offline, which '
            "keeps the log on this machine.",
        )


def _may_begin() -> bool:
    """Whether W&B begins without asking for a key on the terminal, where nobody may be."""
    import wandb

    if os.environ.get("WANDB_MODE", "").lower() in _NOT_SENT or os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(Exception):  # what it is called differs by version; then W&B itself decides
        if wandb.setup().settings.mode in _NOT_SENT:
            return True
        try:
            return bool(wandb.login(prompt=False, verify=False))
        except TypeError:  # before it had these words
            return bool(wandb.api.api_key)
    return True


@contextlib.contextmanager
def watched(listener: Listener, run: RunFolder, settings: TrainSettings, after: int) -> Iterator[Listener]:
    """A listener that tells everything to the run's metrics file and to the tracker, if one is chosen.

    Args:
        listener: Told of everything, too.
        run: The run; all is written into its folder.
        settings: They are the tracker's configuration.
        after: Steps that count; what is logged beyond is another course of the run.

    Raises:
        StorageError: The metrics file can't be written.
        SettingsError: The tracker can't begin.
    """
    with RecordedListener(listener, run.metrics_path, after) as recorded:
        if settings.log_with == "none":
            yield recorded
            return
        with TrackedListener(recorded, _TITLES[settings.log_with], lambda: _begun(run, settings, after)) as told:
            yield told


class TrackedListener:
    """Tells a tracker of steps, scores and previews, and everything to another listener.

    A tracker that fails while the run is training is given up with a warning: no log is worth a run.
    """

    def __init__(self, listener: Listener, title: str, begin: Callable[[], Any]) -> None:
        """Begin to track.

        Args:
            listener: Told of everything first.
            title: The tracker's name for people.
            begin: Gives one of accelerate's trackers.

        Raises:
            SettingsError: It can't begin.
        """
        self._listener, self._title = listener, title
        try:
            self._tracker = begin()
        except Exception as error:
            raise SettingsError(
                f"{title} can't begin: {type(error).__name__}: {error}.",
                "See to it, or set log_with to none. Weights & Biases needs no server with WANDB_MODE=offline.",
            ) from error

    def __enter__(self) -> TrackedListener:
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the log; a server that can't be reached is not waited for, since the run is done without it."""
        ending = threading.Thread(target=self._attempt, args=(lambda tracker: tracker.finish(),), daemon=True)
        ending.start()
        ending.join(_PATIENCE)
        if ending.is_alive():
            text = f"{self._title} is still busy with the log; what it has not sent lies in the run's folder, in logs/."
            self._listener.report(Note(text, warning=True))

    def report(self, event: Event) -> None:
        """Pass everything on; log steps and previews."""
        self._listener.report(event)
        if isinstance(event, Step):
            facts = {"loss": event.loss, "learning_rate": event.learning_rate, "steps_per_second": event.rate}
            self._attempt(lambda tracker: tracker.log(facts | {"memory_bytes": event.memory}, step=event.step))
        elif isinstance(event, Preview):
            self._attempt(lambda tracker: _log_preview(tracker, event))
        elif isinstance(event, Validation):
            self._attempt(lambda tracker: tracker.log({VALIDATION_LOSS: event.loss}, step=event.step))

    def should_stop(self) -> bool:
        """Whether the other listener asks to stop."""
        return self._listener.should_stop()

    def _attempt(self, act: Callable[[Any], None]) -> None:
        if self._tracker is None:
            return
        try:
            act(self._tracker)
        except Exception as error:
            self._tracker = None
            self._listener.report(
                Note(
                    f"{self._title} failed and is left out from now on: {type(error).__name__}: {error}. The training "
                    "goes on; metrics.jsonl in the run's folder holds everything.",
                    warning=True,
                )
            )


def _log_preview(tracker: Any, event: Preview) -> None:
    if event.scores:
        tracker.log({f"scores/{name}": value for name, value in event.scores.items()}, step=event.step)
    by_prompt: dict[str, list[Any]] = {}
    for path, prompt in event.pictures:
        with Image.open(path) as picture:
            by_prompt.setdefault(f"previews/{prompt}", []).append(np.asarray(picture.convert("RGB")))
    pictures = {prompt: np.stack(found) for prompt, found in by_prompt.items()}
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images(pictures, step=event.step, **layout)


def _begun(run: RunFolder, settings: TrainSettings, after: int) -> Any:
    """One of accelerate's trackers, which knows the run's configuration and goes on with the log that is there."""
    from accelerate.state import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState(cpu=True)  # the trackers ask for one; the recipe then makes its own, on its device
    tensorboard = settings.log_with == "tensorboard"
    if tensorboard:
        tracker = TensorBoardTracker("logs", run.path, purge_step=after + 1)
    else:
        tracker = WandBTracker(PROJECT, **_wandb_options(run))
    if hasattr(tracker, "start"):  # in older versions it has started by now
        tracker.start()
    if not (tensorboard and after):  # which would show another run for each time
        tracker.store_init_configuration(_configuration(run, settings))
    return tracker


def _wandb_options(run: RunFolder) -> dict[str, Any]:
    """Of `wandb.init`: an id that is always the run's own, and nothing watched but what is logged here."""
    import wandb

    record = run.record
    folder = run.path / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    own = hashlib.sha256(f"{record.get('fingerprint')} {run.started_at}".encode()).hexdigest()[:16]
    quiet = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
    return {"id": own, "resume": "allow", "name": run.path.name, "dir": str(folder), "settings": quiet}


def _configuration(run: RunFolder, settings: TrainSettings) -> dict[str, Any]:
    """The run's settings that may be shared, as values that every tracker takes, and the name of its base model."""
    configuration: dict[str, Any] = {"base": run.record.get("settings", {}).get("base", "")}
    for name, value in shareable(settings).items():
        if value is None:
            value = ""
        configuration[name] = json.dumps(value) if isinstance(value, list) else value
    return configuration
