"""Where a run is logged: its own metrics file, and TensorBoard or Weights & Biases by accelerate's trackers.

Nothing goes to a tracker unless the user chose one in the setting `log_with`.
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

from ...core.errors import SettingsError, suggest
from ...core.events import Event, Listener, Note, Preview, Step, Validation
from ...settings.sharing import shareable
from ...settings.train import TrainSettings
from .folder import RunFolder
from .metrics import VALIDATION_LOSS, RecordedListener

PROJECT = "dreambooth-lora"
_LOGS = "logs"
_TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}
_FINISH_TIMEOUT = 60.0  # seconds
_UNRECORDED = ("disable_meta", "disable_stats", "disable_machine_info")  # command line with its paths, user, machine
_OFFLINE_MODES = ("offline", "disabled", "dryrun")  # values of WANDB_MODE that need no account


def require_tracker(log_with: str) -> None:
    """Check that a tracker is installed and, if it sends to a server, that it has an account.

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
            f"{suggest('log_with')} is '{log_with}', but {title} is not installed.",
            f'Install it with "{sys.executable}" -m pip install {log_with}, or set {suggest("log_with", "none")}.',
        )
    if log_with == "wandb" and not _wandb_can_start():
        raise SettingsError(
            f"{suggest('log_with')} is '{log_with}', but {title} has no API key.",
            f'Log in with "{sys.executable}" -m wandb login, or set the environment variable WANDB_MODE=offline, which '
            "keeps the log on this computer.",
        )


def _wandb_can_start() -> bool:
    """Whether W&B starts without asking for a key on the terminal, which nobody may be looking at."""
    import wandb

    if os.environ.get("WANDB_MODE", "").lower() in _OFFLINE_MODES or os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(Exception):  # names differ from version to version; then W&B itself decides
        if wandb.setup().settings.mode in _OFFLINE_MODES:
            return True
        try:
            return bool(wandb.login(prompt=False, verify=False))
        except TypeError:  # versions without these arguments
            return bool(wandb.api.api_key)
    return True


@contextlib.contextmanager
def logging_listener(
    listener: Listener, run: RunFolder, settings: TrainSettings, base_title: str, after: int
) -> Iterator[Listener]:
    """A listener that writes everything into the run's metrics file and to the tracker, if one is chosen.

    Args:
        listener: Gets every event, too.
        run: The run; everything is written into its folder.
        settings: Those that may be shared become the tracker's configuration.
        base_title: Name of the base model, likewise.
        after: Steps that are done.

    Raises:
        StorageError: The metrics file can't be written.
        SettingsError: The tracker can't start.
    """
    reached = max(run.steps(), default=0)
    with RecordedListener(listener, run.metrics_path, after, reached) as recorded:
        if settings.log_with == "none":
            yield recorded
            return
        logged = max(after, reached) if (run.path / _LOGS).is_dir() else after
        title = _TITLES[settings.log_with]
        with TrackedListener(
            recorded, title, lambda: _start_tracker(run, settings, base_title, logged), logged
        ) as tracked:
            yield tracked


class TrackedListener:
    """Logs steps, scores and previews to a tracker, and passes everything on to another listener.

    A tracker that fails during training is dropped with a warning, so that the run continues.
    """

    def __init__(self, listener: Listener, title: str, start: Callable[[], Any], logged: int = 0) -> None:
        """Start to track.

        Args:
            listener: Gets every event first.
            title: The tracker's name for people.
            start: Makes one of accelerate's trackers.
            logged: Steps that the log holds already.

        Raises:
            SettingsError: The tracker can't start.
        """
        self._listener = listener
        self._title = title
        self._logged = logged
        self._newest = logged
        self._tracker: Any = None  # after a failure, too
        try:
            self._tracker = start()
        except Exception as error:
            raise SettingsError(
                f"{title} can't start: {type(error).__name__}: {error}.",
                f"Fix this, or set {suggest('log_with', 'none')}. With WANDB_MODE=offline, Weights & Biases needs no "
                "server.",
            ) from error

    def __enter__(self) -> TrackedListener:
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the log; a server that can't be reached is not waited for, since the run is done without it."""
        finishing = threading.Thread(target=self._try, args=(lambda tracker: tracker.finish(),), daemon=True)
        finishing.start()
        finishing.join(_FINISH_TIMEOUT)
        if finishing.is_alive():
            text = (
                f"{self._title} has not finished uploading the log; what it has not sent is in logs/ in the run folder."
            )
            self._listener.report(Note(text, warning=True))

    def report(self, event: Event) -> None:
        """Pass everything on; log steps and previews."""
        self._listener.report(event)
        if isinstance(event, Step):
            self._newest = max(self._newest, event.step)
        if isinstance(event, Step) and event.step > self._logged:
            values = {
                "loss": event.loss,
                "learning_rate": event.learning_rate,
                "steps_per_second": event.rate,
                "memory_bytes": event.memory,
            }
            self._try(lambda tracker: tracker.log(values, step=event.step))
        elif isinstance(event, Preview):
            self._try(lambda tracker: _log_preview(tracker, event, self._newest))
        elif isinstance(event, Validation):
            self._try(lambda tracker: tracker.log({VALIDATION_LOSS: event.loss}, step=event.step))

    def should_stop(self) -> bool:
        """Whether the other listener asks to stop."""
        return self._listener.should_stop()

    def _try(self, action: Callable[[Any], None]) -> None:
        """Do something with the tracker, or drop it if that fails."""
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:
            self._tracker = None
            text = (
                f"Logging to {self._title} failed and was stopped: {type(error).__name__}: {error}. Training "
                "continues; metrics.jsonl in the run folder has all metrics."
            )
            self._listener.report(Note(text, warning=True))


def _log_preview(tracker: Any, event: Preview, newest: int) -> None:
    """Log pictures and scores of a preview; W&B takes none before the newest step, such as the base's of step 0."""
    step = event.step if tracker.name == "tensorboard" else max(event.step, newest)
    if event.scores:
        tracker.log({f"scores/{name}": value for name, value in event.scores.items()}, step=step)
    by_prompt: dict[str, list[Any]] = {}
    for path, prompt in event.pictures:
        with Image.open(path) as picture:
            by_prompt.setdefault(f"previews/{prompt}", []).append(np.asarray(picture.convert("RGB")))
    batches = {prompt: np.stack(pictures) for prompt, pictures in by_prompt.items()}
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images(batches, step=step, **layout)


def _start_tracker(run: RunFolder, settings: TrainSettings, base_title: str, after: int) -> Any:
    """One of accelerate's trackers, which knows the run's configuration and goes on with the log that is there."""
    from accelerate.state import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState(cpu=True)  # the trackers ask for one; the recipe then makes its own, on its device
    tensorboard = settings.log_with == "tensorboard"
    if tensorboard:
        tracker = TensorBoardTracker(_LOGS, run.path, purge_step=after + 1)
    else:
        tracker = WandBTracker(PROJECT, **_wandb_options(run))
    if hasattr(tracker, "start"):  # older versions have started by now
        tracker.start()
    if not (tensorboard and after):  # which would show another run every time
        tracker.store_init_configuration(_configuration(settings, base_title))
    return tracker


def _wandb_options(run: RunFolder) -> dict[str, Any]:
    """Arguments of `wandb.init`: an id that identifies the run, and nothing recorded but what is logged here."""
    import wandb

    folder = run.path / _LOGS
    folder.mkdir(parents=True, exist_ok=True)
    run_id = hashlib.sha256(f"{run.record.get('fingerprint')} {run.started_at}".encode()).hexdigest()[:16]
    known = dir(wandb.Settings())
    quiet = {name: True for option in _UNRECORDED for name in (f"x_{option}", f"_{option}") if name in known}
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        host=PROJECT,
        **quiet,  # not this machine's name
    )
    return {"id": run_id, "resume": "allow", "name": run.path.name, "dir": str(folder), "settings": settings}


def _configuration(settings: TrainSettings, base_title: str) -> dict[str, Any]:
    """The run's settings that may be shared, as values that every tracker takes, and the name of its base model."""
    configuration: dict[str, Any] = {"base": base_title}
    for name, value in shareable(settings).items():
        if value is None:
            value = ""
        configuration[name] = json.dumps(value) if isinstance(value, list) else value
    return configuration
