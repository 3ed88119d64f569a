"""Jobs: processes of the engine, each with a folder that says all about it.

A job's folder holds `job.toml` (the command's settings), `job.json` (what is run, and by which process), `events.jsonl`
(what happens, see `trainer/cli/watching.py`), `output.txt` and `log.txt` (what the process writes), and `stop` once it
is to stop. So a job outlives the page and the host, and another host process takes it up where this one left it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ..trainer.core.errors import BusyError, SettingsError
from ..trainer.core.files import explained_os_errors, numbered, write_atomic
from ..trainer.core.locks import FolderLock
from ..trainer.core.toml import read_toml
from .toml_text import toml_text

TRAIN, FUSE = "train", "fuse"
ENDED = ("done", "stopped", "failed")
_ROOT = Path(__file__).resolve().parents[1]
_SETTINGS = "job.toml"
_RECORD = "job.json"
_EVENTS = "events.jsonl"
_OUTPUT = "output.txt"
_LOG = "log.txt"
_STOP = "stop"
_TAKING_A_FILE = (TRAIN, "plan", "priors", "generate", "extract", FUSE)  # others take it by a flag
_SAME_PROCESS = 2.0  # seconds by which a process's time of birth may differ between two looks
_LAST_WORDS = 2000  # characters of the log that are shown of a process that died


@dataclass
class Progress:
    """What the events of a job say so far.

    Attributes:
        facts: As pages know them (`NodeFacts` in `web/types/answers.d.ts`).
        measured: How many previews and validations there were.
        notes: What the user was told, the newest last, each not worded yet, with whether it is a warning.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    measured: int = 0
    notes: list[tuple[str, bool]] = field(default_factory=list)
    _offset: int = 0
    _identity: tuple[int, int] = (0, 0)

    def read(self, path: Path) -> None:
        """Take in the lines that came since; everything, if the file was begun anew."""
        try:
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                identity = (stat.st_dev, stat.st_ino)
                if identity != self._identity or stat.st_size < self._offset:
                    self._begin_anew()
                    self._identity = identity
                file.seek(self._offset)
                content = file.read()
        except OSError:
            self._identity = (0, 0)  # a new file may get the old one's number
            return
        whole, newline, _ = content.rpartition(b"\n")  # a line may be half written
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                self._take(json.loads(line))

    def _begin_anew(self) -> None:
        self.facts = {}
        self.measured = 0
        self.notes = []
        self._offset = 0

    def _take(self, line: Mapping[str, Any]) -> None:
        event = line.get("event")
        facts = self.facts
        facts["at"] = line["at"]
        if event == "run":
            facts |= {"run": Path(line["path"]).name, "step": line["step"], "steps": line["steps"]}
        elif event == "phase":
            facts |= {"state": line["name"], "done": line["done"], "total": line["total"]}
        elif event == "step":
            names = ("step", "steps", "rate", "seconds_left", "memory")
            facts |= {"state": "training"} | {name: line[name] for name in names}
        elif event in ("preview", "validation"):
            self.measured += 1
        elif event == "note":
            self.notes.append((line["text"], line["warning"]))
        elif event == "end":
            facts |= {name: line[name] for name in ("state", "problem", "remedy") if name in line}


class Job:
    """One job.

    Attributes:
        folder: Its folder.
    """

    def __init__(self, folder: Path) -> None:
        """Take a folder with a job."""
        self.folder = folder
        self._progress = Progress()
        self._reading = threading.Lock()  # pages and the thread that follows it ask at the same time
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What `job.json` holds: "kind", "name", "made_at" (Unix time); once it was started "pid" and its "born_at"."""
        try:
            content = json.loads((self.folder / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def note(self, **facts: Any) -> None:
        """Add facts to the record."""
        content = json.dumps(self.record | facts, indent=1, ensure_ascii=False)
        write_atomic(self.folder / _RECORD, content.encode())

    @property
    def kind(self) -> str:
        """The command of the engine that it runs."""
        return str(self.record.get("kind", TRAIN))

    @property
    def name(self) -> str:
        """What it makes."""
        return str(self.record.get("name", ""))

    @property
    def run(self) -> str | None:
        """The id of the run that it trains, once that is known."""
        return self.record.get("run") or self.progress().facts.get("run")

    def settings(self) -> dict[str, Any]:
        """The command's settings.

        Raises:
            SettingsError: Their file is damaged.
        """
        return read_toml(self.folder / _SETTINGS)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace the command's settings.

        Raises:
            StorageError: They can't be written.
        """
        write_atomic(self.folder / _SETTINGS, toml_text(settings).encode())

    @property
    def waits_in_vain(self) -> bool:
        """Whether it waits for a process of the host that is none of this one."""
        return self.record.get("host") != os.getpid() and self.progress().facts["state"] == "waiting"

    def is_alive(self) -> bool:
        """Whether its process runs."""
        if self._process is not None:
            return self._process.poll() is None
        record = self.record
        try:
            process = psutil.Process(int(record["pid"]))
            is_same = abs(process.create_time() - float(record["born_at"])) < _SAME_PROCESS
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        except (KeyError, TypeError, ValueError, psutil.Error):
            return False

    def enqueue(self) -> None:
        """Forget how it ended, before it is run again.

        Raises:
            StorageError: Its folder can't be written.
        """
        with explained_os_errors(self.folder):
            for name in (_STOP, _EVENTS):
                (self.folder / name).unlink(missing_ok=True)
        self._process = None
        self._progress = Progress()
        self.note(pid=None, failed=None, card=None, queued_at=time.time(), host=os.getpid())

    def start(self, python: Path) -> None:
        """Run it, or run it again, in a process that outlives this one.

        Args:
            python: The interpreter.

        Raises:
            StorageError: The process can't be started.
        """
        paths = {name: self.folder / name for name in (_SETTINGS, _EVENTS, _OUTPUT, _LOG, _STOP)}
        command = [str(python), "-m", "trainer", self.kind, *self._settings_words(paths[_SETTINGS])]
        command += ["--events", str(paths[_EVENTS]), "--stop-file", str(paths[_STOP])]
        with explained_os_errors(self.folder), open(paths[_OUTPUT], "wb") as output, open(paths[_LOG], "ab") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": log}
            self._process = subprocess.Popen(command, cwd=_ROOT, env=engine_environment(), **streams, **_alone())
        born_at = time.time()
        with contextlib.suppress(psutil.Error):
            born_at = psutil.Process(self._process.pid).create_time()
        self.note(pid=self._process.pid, born_at=born_at)

    def _settings_words(self, path: Path) -> list[str]:
        return [str(path)] if self.kind in _TAKING_A_FILE else ["--config", str(path)]

    def stop(self) -> None:
        """Have it stop at the next safe moment; one that was not started yet is not started any more."""
        with explained_os_errors(self.folder):
            (self.folder / _STOP).touch()

    def is_to_stop(self) -> bool:
        """Whether it was told to stop since it was started, or before it was."""
        return (self.folder / _STOP).exists()

    def progress(self) -> Progress:
        """What is known of it now.

        "state" is "waiting" until it is started, "starting" until it says something, what its events say meanwhile, and
        then "done", "stopped" or "failed"; a process that ended without a word has failed. "at" is later in each state
        than in the one before: pages leave out what is not newer than what they know.
        """
        alive = self.is_alive()
        with self._reading:
            self._progress.read(self.folder / _EVENTS)
            known = Progress(dict(self._progress.facts), self._progress.measured, list(self._progress.notes))
        facts = {"node": "webui", "at": 0.0, "state": "starting", "name": self.name, "kind": self.kind} | known.facts
        record = self.record
        if record.get("pid") is None:
            facts["state"] = "stopped" if self.is_to_stop() else "waiting"
            facts["at"] = max(facts["at"], self._told_to_stop_at())
        elif not alive and facts["state"] not in ENDED:
            facts |= {"state": "failed", **self._death()}
            facts["at"] = math.nextafter(facts["at"], math.inf)
        facts["at"] = max(facts["at"], float(record.get("queued_at", 0.0)))
        return Progress(facts, known.measured, known.notes)

    def _told_to_stop_at(self) -> float:
        """When the stop file appeared, as a Unix time; 0.0 if there is none."""
        try:
            return (self.folder / _STOP).stat().st_mtime
        except OSError:
            return 0.0

    def _death(self) -> dict[str, str]:
        """Problem and remedy of a process that ended without saying why."""
        try:
            words = (self.folder / _LOG).read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:]
        except OSError:
            words = ""
        last = words.strip().splitlines()[-1:] or ["(empty)"]
        return {
            "problem": f"The process ended unexpectedly. The last line of its log: {last[0][:300]}",
            "remedy": f"It was killed, perhaps because the system ran out of memory, or the computer was shut down. "
            f"Press Resume to continue from what was saved. The full log is {self.folder / _LOG}.",
        }

    def output(self) -> list[str]:
        """The lines that the command gave as its result."""
        try:
            return (self.folder / _OUTPUT).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []

    def log(self) -> str:
        """What the process wrote beside its result."""
        try:
            return (self.folder / _LOG).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


@dataclass(frozen=True)
class Jobs:
    """All jobs in one folder; one runs at a time.

    Attributes:
        root: The folder; need not exist.
    """

    root: Path

    def all(self) -> list[Job]:
        """The jobs, the newest first."""
        jobs = [Job(path.parent) for path in self.root.glob(f"*/{_RECORD}")]
        return sorted(jobs, key=lambda job: (float(job.record.get("made_at", 0.0)), job.folder.name), reverse=True)

    def running(self) -> Job | None:
        """The one whose process runs; None if none does."""
        return next((job for job in self.all() if job.is_alive()), None)

    def make(self, kind: str, name: str, settings: Mapping[str, Any], **facts: Any) -> Job:
        """A new job, not started yet.

        Args:
            kind: A command of the engine that takes settings.
            name: What it makes; part of its folder's name.
            settings: The command's, as a settings file has them.
            facts: More for its record.

        Raises:
            SettingsError: The name can't be a folder's, or a setting's text is no UTF-8.
            StorageError: Its folder can't be written.
        """
        require_file_name(name)
        content = toml_text(settings).encode()
        with explained_os_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        for folder in numbered(self.root / name):
            with explained_os_errors(folder):
                try:
                    folder.mkdir()
                except FileExistsError:
                    continue
            break
        job = Job(folder)
        write_atomic(job.folder / _SETTINGS, content)
        job.note(kind=kind, name=name, made_at=time.time(), queued_at=time.time(), **facts)
        return job

    def start(self, job: Job, python: Path) -> None:
        """Start a job, unless another runs.

        Raises:
            BusyError: Another one runs.
            StorageError: It can't be started.
        """
        with self.alone():
            self.require_idle()
            job.start(python)

    def require_idle(self) -> None:
        """Refuse while a job runs.

        Raises:
            BusyError: One does.
        """
        running = self.running()
        if running is not None:
            raise BusyError(
                f"'{running.name}' is still running.",
                "Wait until it is done, or press Stop; only one job can run at a time.",
            )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """For this process alone, of several that share the folder.

        Raises:
            BusyError: Another process is starting a job.
        """
        lock = FolderLock(self.root)
        if not lock.acquire():
            raise lock.refusal("Another window is starting a job", "Try again in a moment.")
        try:
            yield
        finally:
            lock.release()


def engine_environment() -> dict[str, str]:
    """The host's environment variables, but for those that would change what the engine imports, or how it writes.

    Progress bars stay out of what it writes, where they would be one long line; the events tell the progress.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return environment | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}


def _alone() -> dict[str, Any]:
    """Options for a process that neither ends with this one nor gets its signals."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}  # type: ignore[attr-defined,unused-ignore]
    return {"start_new_session": True}


def require_file_name(name: str) -> None:
    """Refuse a name that can't be a folder's; the engine checks the rest.

    Raises:
        SettingsError: It can't.
    """
    if not name or name.strip(" .") != name or any(character in '/\\:*?"<>|' or character < " " for character in name):
        raise SettingsError(
            f"'{name}' is not a valid file name." if name else "The name is empty.",
            "Enter a name of letters, digits, '-' and '_'; it becomes the name of the LoRA file.",
        )
