"""Runs jobs one after the other: commands of slidetl, each in a process group; all state is on disk.

A job's folder has ``job.json`` (its commands and state), ``process.json`` (pid and start time of the running
command), ``status-N.json`` (``--status`` of each command) and ``log.txt``. A restarted server reads them and
goes on.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from slidetl.errors import OutputError
from slidetl.files import write_whole
from slidetl.studio.paths import Refused
from slidetl.text import one_line
from slidetl.tiles.lock import machine_id

WAITING, RUNNING, STOPPING = "waiting", "running", "stopping"
DONE, FAILED, STOPPED = "done", "failed", "stopped"
ACTIVE = (WAITING, RUNNING, STOPPING)

MOST_WAITING = 20
_ID = re.compile(r"\d{6}-[a-z]+")
_TAIL_BYTES = 16_000
_PROMPT = "$ slidetl "  # before each command in a log
# Seconds after SIGINT until SIGTERM, and until SIGKILL: a training writes its checkpoint first.
_TERM_S, _KILL_S = 20.0, 30.0
# Errors of a machine short of disk, memory or open files, or of a share that is away: of no one job.
_PASSING = frozenset(
    [
        *(errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN),
        *(errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE),
    ]
)


@dataclass(frozen=True)
class Step:
    """One command of a job.

    Attributes:
        words: after ``slidetl``.
        fine: exit codes to go on after; 1 of ``tile`` and ``grade`` means that some slides failed.
    """

    words: tuple[str, ...]
    fine: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
        id: its folder's name.
        kind: tile, train, export, publish, pull or grade.
        project: name of its project.
        project_id: random id of its project, as another may get its name; empty for that of an older studio.
        target: the run, model or result that it makes.
        steps: its commands, in order.
        folder: working folder of the commands.
        state: waiting, running, stopping, done, failed or stopped.
        step: index of the command at work, or of the last one.
        exit_code: of the last command; None if unknown.
        reason: of a failure, in one line.
        stopping_since: time of the first signal, seconds since 1970; 0 without.
    """

    id: str
    kind: str
    project: str
    target: str
    steps: tuple[Step, ...]
    folder: str
    state: str = WAITING
    step: int = 0
    exit_code: int | None = None
    reason: str = ""
    stopping_since: float = 0.0
    project_id: str = ""

    @property
    def is_active(self) -> bool:
        """True while it waits or runs."""
        return self.state in ACTIVE


@dataclass(frozen=True)
class _Process:
    """A process, told apart from a later one of the same pid."""

    pid: int
    started: int  # clock ticks since boot
    boot: str

    @classmethod
    def of(cls, pid: int) -> _Process | None:
        """Identifies a living process; None for a dead one or a zombie."""
        try:
            # The name, in parentheses, may have blanks and parentheses itself.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            boot = machine_id()
        except (OSError, ValueError):
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]), boot)

    @property
    def is_alive(self) -> bool:
        return _Process.of(self.pid) == self

    def signal_group(self, number: int) -> None:
        """Signals its group, unless it is gone: the pid may be another's by now."""
        if self.is_alive:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)


def project_id(folder: Path) -> str:
    """Reads the random id of the project in a folder; empty for one of an older studio, or for none.

    Raises:
        OSError: its share is away.
    """
    try:
        return str(json.loads((folder / "project.json").read_text(encoding="utf-8")).get("id", ""))
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError, AttributeError):
        return ""


class JobQueue:
    """The jobs of all projects, one at a time.

    Args:
        folder: for the jobs' folders; made if missing.

    Attributes:
        trouble: why no job can be looked after now; empty if nothing is wrong.

    Raises:
        Refused: another studio works on this folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._known: dict[str, tuple[int, Job]] = {}  # by the time of their files
        self._child: subprocess.Popen[bytes] | None = None
        self.trouble = ""
        folder.mkdir(parents=True, exist_ok=True)
        self._held: IO[str] = (folder / "lock").open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._held.close()
            raise Refused(f"{folder}: another studio works on this folder; end it first") from error
        self._thread = threading.Thread(target=self._watch, name="jobs", daemon=True)

    def start(self) -> None:
        """Begins to run the jobs, those found on disk first."""
        self._thread.start()

    def close(self) -> None:
        """Ends the watch; a running job goes on, and is found by the next studio."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._held.close()

    def jobs(self, project: str | None = None, project_id: str = "") -> list[Job]:
        """Lists jobs, the latest first: all, or those of one project."""
        with self._lock:
            found = [job for name in self._names() if (job := self._read(name)) is not None]
        mine = (project, project_id)
        return [job for job in found if project is None or (job.project, job.project_id) == mine]

    def add(self, kind: str, project: str, target: str, steps: tuple[Step, ...], folder: Path) -> Job:
        """Adds a job to the end of the queue.

        Raises:
            Refused: too many wait already, or one makes the same.
        """
        with self._lock:
            active = [job for job in self.jobs() if job.is_active]
            if len(active) >= MOST_WAITING:
                raise Refused(f"{len(active)} jobs wait already; stop some, or come back later", 429)
            made_by = project_id(folder)
            same = (kind, project, target, made_by)
            if any((job.kind, job.project, job.target, job.project_id) == same for job in active):
                raise Refused("this job is in the queue already", 409)
            number = 1 + max((int(name[:6]) for name in self._names()), default=0)
            job = Job(f"{number:06d}-{kind}", kind, project, target, steps, str(folder), project_id=made_by)
            (self._folder / job.id).mkdir()
            self._write(job)
            return job

    def find(self, job_id: str) -> Job:
        """Returns a job; raises Refused if there is none."""
        job = self._read(job_id) if _ID.fullmatch(job_id) else None
        if job is None:
            raise Refused("there is no such job", 404)
        return job

    def stop(self, job_id: str) -> None:
        """Stops a job: with SIGINT, later by force; a waiting one leaves the queue."""
        with self._lock:
            job = self.find(job_id)
            if job.state == WAITING:
                self._write(replace(job, state=STOPPED))
            elif job.state == RUNNING:
                self._write(replace(job, state=STOPPING, stopping_since=time.time()))
                if (process := self._process(job)) is not None:
                    process.signal_group(signal.SIGINT)

    def resume(self, job_id: str) -> None:
        """Puts a stopped or failed job back into the queue, to go on with the command it was at."""
        with self._lock:
            job = self.find(job_id)
            if job.state not in (STOPPED, FAILED):
                raise Refused("only a stopped or failed job can be resumed", 409)
            if sum(other.is_active for other in self.jobs()) >= MOST_WAITING:
                raise Refused("too many jobs wait already", 429)
            steps = tuple(replace(step, words=_resumed(step.words, Path(job.folder))) for step in job.steps)
            self._write(
                replace(job, state=WAITING, steps=steps, exit_code=None, reason="", stopping_since=0.0)
            )

    def status(self, job: Job) -> dict[str, Any]:
        """Reads the status file of the job's command; empty before its first word."""
        try:
            found = json.loads(
                (self._folder / job.id / f"status-{job.step}.json").read_text(encoding="utf-8")
            )
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def log(self, job: Job) -> str:
        """Reads the end of the job's log."""
        try:
            with (self._folder / job.id / "log.txt").open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - _TAIL_BYTES))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def _watch(self) -> None:
        while not self._ended.wait(3.0 if self.trouble else 0.3):
            with self._lock:
                try:
                    self._turn()
                    self.trouble = ""
                except Exception as error:  # a full disk: it is tried again
                    if self.trouble != str(error):
                        logging.getLogger(__name__).exception("the jobs of the studio cannot be looked after")
                    self.trouble = str(error) or type(error).__name__

    def _turn(self) -> None:
        """Looks after the running job, or starts the next one."""
        active = [job for job in reversed(self.jobs()) if job.is_active]
        running = next((job for job in active if job.state != WAITING), None)
        if running is None:
            if active:
                self._start(active[0])
            return
        process = self._process(running)
        if process is not None and not process.is_alive:
            self._end_step(running, process)
        elif process is None:  # the server ended between two lines of _start
            self._write(replace(running, state=FAILED, reason="it was never started"))
        elif running.state == STOPPING:
            waited = time.time() - running.stopping_since
            if waited > _KILL_S:
                process.signal_group(signal.SIGKILL)
            elif waited > _TERM_S:
                process.signal_group(signal.SIGTERM)

    def _names(self) -> list[str]:
        """Lists the folders of the jobs, the latest first."""
        names = (path.name for path in self._folder.glob("*-*") if _ID.fullmatch(path.name))
        return sorted(names, reverse=True)

    def _start(self, job: Job) -> None:
        """Starts the job's command; whatever is wrong with it, the job has failed and the next one begins.

        Raises:
            OSError: the machine lacks something, for any job; this one waits.
        """
        try:
            self._launch(job)
        except Exception as error:
            cause = error.__cause__ if isinstance(error, OutputError) else error
            is_passing = isinstance(cause, OSError) and cause.errno in _PASSING
            reason = one_line(f"it could not be started: {error or type(error).__name__}")
            job = replace(job, state=WAITING) if is_passing else replace(job, state=FAILED, reason=reason)
            try:
                self._write(job)
            except OutputError:  # this server goes by it all the same
                path = self._folder / job.id / "job.json"
                self._known[job.id] = path.stat().st_mtime_ns, job
            if is_passing:
                raise

    def _launch(self, job: Job) -> None:
        if project_id(Path(job.folder)) != job.project_id:
            raise Refused("its project is gone")
        folder = self._folder / job.id
        (folder / f"status-{job.step}.json").unlink(missing_ok=True)
        (folder / "process.json").unlink(missing_ok=True)
        words = job.steps[job.step].words
        status = ("--status", str(folder / f"status-{job.step}.json"))
        with (folder / "log.txt").open("ab") as log:
            log.write(f"{_PROMPT}{' '.join(words)}\n".encode("utf-8", "backslashreplace"))
            log.flush()
            self._child = child = subprocess.Popen(
                [sys.executable, "-m", "slidetl", *words, *status],
                cwd=job.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
                start_new_session=True,  # Ctrl-C at the server does not reach it
            )
        try:
            process = _Process.of(child.pid)
            found = asdict(process) if process is not None else {"pid": child.pid, "started": 0, "boot": ""}
            write_whole(folder / "process.json", json.dumps(found))
            self._write(replace(job, state=RUNNING))
        except Exception:  # without its record it could not be stopped
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise

    def _end_step(self, job: Job, process: _Process) -> None:
        """Takes the exit code of an ended command, and ends the job or starts its next command."""
        if self._child is not None and self._child.pid == process.pid:
            code: object = self._child.wait()  # it is dead
        else:  # of an earlier server
            code = self.status(job).get("exit_code")
        code = code if isinstance(code, int) else None
        job = replace(job, exit_code=code)
        if job.state == STOPPING and code != 0:
            self._write(replace(job, state=STOPPED))
        elif code not in job.steps[job.step].fine:
            self._write(replace(job, state=FAILED, reason=self._reason(job, code)))
        elif job.step + 1 < len(job.steps):
            job = replace(job, step=job.step + 1)
            if job.state == STOPPING:
                self._write(replace(job, state=STOPPED))
            else:
                self._start(job)
        else:
            self._write(replace(job, state=DONE))

    def _reason(self, job: Job, code: int | None) -> str:
        lines: list[str] = []
        for line in filter(str.strip, self.log(job).splitlines()):
            lines = [] if line.startswith(_PROMPT) else [*lines, line]  # of the last command alone
        said = [line for line in lines if line.startswith("slidetl: error: ")]
        if said:
            return said[-1].removeprefix("slidetl: error: ")
        if code is None or code < 0:
            return "its process was ended from outside, perhaps for want of memory"
        return lines[-1] if lines else f"it ended with code {code}"

    def _process(self, job: Job) -> _Process | None:
        try:
            return _Process(**json.loads((self._folder / job.id / "process.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _read(self, job_id: str) -> Job | None:
        path = self._folder / job_id / "job.json"
        try:
            modified = path.stat().st_mtime_ns
            known = self._known.get(job_id)
            if known is not None and known[0] == modified:
                return known[1]
            values = json.loads(path.read_text(encoding="utf-8"))
            steps = tuple(Step(tuple(step["words"]), tuple(step["fine"])) for step in values.pop("steps"))
            self._known[job_id] = modified, Job(**values, steps=steps)
            return self._known[job_id][1]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _write(self, job: Job) -> None:
        write_whole(self._folder / job.id / "job.json", json.dumps(asdict(job)))


def _resumed(words: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Changes a command to go on where it was stopped; most go on by themselves."""
    if words[0] == "grade" and "--resume" not in words:
        return (*words, "--resume")
    if words[0] != "fit":
        return words
    run = folder / Path(words[words.index("--config") + 1]).parent
    found = sorted(run.glob("logs/version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    plain = words[: words.index("--ckpt_path")] if "--ckpt_path" in words else words
    return (*plain, "--ckpt_path", str(found[-1].relative_to(folder))) if found else plain
