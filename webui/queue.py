"""What runs now: one job, followed by a thread that keeps the host's own generation waiting and delivers the result."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..trainer.core.errors import BusyError, TrainerError
from ..trainer.core.locks import FolderLock
from ..trainer.training.gallery import AS_TRAINED
from . import cards, environment, host
from .jobs import ENDED, FUSE, TRAIN, Job, Jobs

logger = logging.getLogger("dreambooth_lora")
_ON_THE_CARD = (TRAIN, "learned-merge", "compare")  # commands for which the host's model has to go
_MAKING_LORAS = (TRAIN, "merge", "learned-merge", "resize", "extract")
_SECONDS_BETWEEN_LOOKS = 0.5
_LONGEST_ENDING = 10.0  # seconds that a new job waits for the process of one that has said its last word
_lock = threading.Lock()
_followed: Job | None = None
_newest: Job | None = None  # training that was shown while none was at work


def jobs() -> Jobs:
    """The host's jobs."""
    return Jobs(host.data_folder() / "jobs")


def shown() -> Job | None:
    """The training that the panel shows: the one at work, or else the newest one."""
    global _newest
    if _followed is not None and _followed.kind == TRAIN:
        return _followed
    newest = next((job for job in jobs().all() if job.kind == TRAIN), None)
    if newest is None or _newest is None or newest.folder != _newest.folder:
        _newest = newest  # else the one that knows its events already
    return _newest


def job_of(run: str) -> Job | None:
    """The newest job that trained a run."""
    return next((job for job in jobs().all() if job.kind == TRAIN and job.run == run), None)


def is_at_work(job: Job) -> bool:
    """Whether a job runs or waits, or its result is being delivered."""
    return _followed is job


def require_ready() -> Path:
    """Refuse while a job is at work or waits, and where none can run; one that is just ending is waited for.

    Returns:
        The interpreter that a job would run in.

    Raises:
        BusyError: One is.
        SettingsError: Packages are missing.
    """
    _await_end()
    return _require_idle()


def _await_end() -> None:
    deadline = time.monotonic() + _LONGEST_ENDING
    while _is_ending() and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _is_ending() -> bool:
    """Whether the job at work has said how it ended, and its process or its delivery still takes a moment."""
    job = _followed or jobs().running()
    return job is not None and job.progress().facts["state"] in ENDED


def _require_idle() -> Path:
    if _followed is not None:
        raise BusyError(f"'{_followed.name}' is still running.", "Wait until it is done, or press Stop.")
    jobs().require_idle()
    return environment.python()


def submit(job: Job) -> None:
    """Have a job run, once the host generates nothing; returns at once.

    Raises:
        BusyError: Another one is at work, or waits.
        SettingsError: Packages are missing.
        StorageError: The job's folder can't be written.
    """
    global _followed
    _await_end()  # before the lock, which the thread that follows the other job needs for its end
    with _lock:
        python = _require_idle()
        job.enqueue()
        _followed = job
    _in_thread(lambda: _run(job, python))


def attach() -> None:
    """Take up a job that an earlier process of the host began, and bring home what ended meanwhile.

    A job that waited for that process to draw does not begin any more.
    """
    global _followed
    with _lock:
        if _followed is not None:
            return
        running = jobs().running()
        _followed = running
    if running is not None:
        logger.info("DreamBooth LoRA: '%s' is still running; reconnecting to it.", running.name)
        _in_thread(lambda: _run(running, None))
    for job in jobs().all():
        if job is not running and not job.is_alive():
            try:
                if job.waits_in_vain:
                    job.stop()
                _bring_home(job)
            except TrainerError as error:
                job.note(card="", failed=list(error.unworded))
                logger.error("DreamBooth LoRA: %s", error)


def _in_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="dreambooth-lora", daemon=True).start()


def _run(job: Job, python: Path | None) -> None:
    """Follow a job to its end.

    Args:
        job: The job.
        python: The interpreter that runs it; None: it runs already.
    """
    global _followed
    try:
        is_wanted = functools.partial(_is_wanted, job, python)
        with host.given_back(lambda: _line(job), is_wanted) if job.kind in _ON_THE_CARD else contextlib.nullcontext():
            if python is not None and is_wanted():
                jobs().start(job, python)
            while job.is_alive():
                _keep_run(job)
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            _keep_run(job)
        _bring_home(job)
    except TrainerError as error:
        job.note(failed=list(error.unworded))
        logger.error("DreamBooth LoRA: %s", error)
    except Exception as error:
        job.note(failed=[f"{type(error).__name__}: {error}", ""])
        logger.exception("DreamBooth LoRA: lost track of the job")
    finally:
        with _lock:
            _followed = None


def _is_wanted(job: Job, python: Path | None) -> bool:
    """Whether a job runs already, or still is to."""
    return python is None or not job.is_to_stop()


def _keep_run(job: Job) -> None:
    """Write down which run a job trains, so that nobody has to read all its events for that."""
    if "run" not in job.record and job.run:
        job.note(run=job.run)


def _bring_home(job: Job) -> None:
    """Put what a job made where the host looks for it, once, with its card."""
    lock = FolderLock(job.folder)
    if lock.acquire():  # else the thread that followed it before Reload UI, or another window, is at it
        try:
            _put_into_host(job)
        finally:
            lock.release()


def _put_into_host(job: Job) -> None:
    is_home = job.record.get("card") is not None
    if is_home or job.kind not in (*_MAKING_LORAS, FUSE) or job.progress().facts["state"] != "done":
        return
    if job.kind == FUSE:  # which wrote a model beside its base
        host.refresh_bases()
        job.note(card="")
        return
    weight = AS_TRAINED
    if job.kind == TRAIN:
        card, weight = cards.deliver(job)
    else:  # which wrote into the host's folder itself
        card = cards.made_by(job)
        cards.write_card(card, words=cards.joined_words(map(Path, job.record.get("sources", []))))
    job.note(card=card.name, weight=weight)
    host.forget_loras()


def _line(job: Job) -> str:
    """One line on what a job does, for whoever waits for the host."""
    facts = job.progress().facts
    if facts["state"] in ENDED:
        return f"DreamBooth: {facts['state']}"
    if "steps" in facts:
        return f"DreamBooth: training '{job.name}', step {facts.get('step', 0)} of {facts['steps']}"
    return f"DreamBooth: {facts['state']}"
