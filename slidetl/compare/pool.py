"""Computes many jobs at a time, in processes of this machine or on the workers of a Dask scheduler."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from slidetl.compare.plan import Job
from slidetl.compare.records import JobResult, read_result, write_result
from slidetl.errors import OutputError, SlidetlError, UsageError, describe_failure
from slidetl.files import describe_full, full_disk
from slidetl.processes import see_one_card
from slidetl.text import format_warning
from slidetl.tiles.lock import slide_lock

# Imported once, by the server that forks the processes: it takes seconds.
_PRELOADED = [
    *("slidetl.compare.train_arm", "slidetl.compare.fixed_arms", "timm", "cv2", "sklearn.linear_model"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
]


@dataclass(frozen=True)
class Workplace:
    """The place and means of computing jobs; they change no result.

    Attributes:
        folder: of the results.
        threads: of each job.
        allow: names outside slidetl that a configuration may import.
        readers: cores of each job for reading tiles for a GPU; None for all of the machine.
        card: number of the GPU of a job whose configuration names none; None for the first.
    """

    folder: Path
    threads: int = 1
    allow: tuple[str, ...] = ()
    readers: int | None = None
    card: int | None = None


def run_job(job: Job, place: Workplace) -> None:
    """Computes a job, unless it is done; its folder appears whole or not at all.

    Raises:
        SlidetlError: the arm cannot be fitted, or its data or weights have changed; the message says why.
    """
    with slide_lock(place.folder, job.key):  # another machine may be at it
        if read_result(place.folder, job) is not None:
            return
        building = place.folder / ".building" / job.key
        building.mkdir(parents=True, exist_ok=True)
        job.check()
        started = time.monotonic()
        result = replace(_compute(job, place, building), seconds=round(time.monotonic() - started, 3))
        job.check()  # what was read in between is what the key names
        write_result(job, result, building, place.folder / job.key)
        shutil.rmtree(building)


def run_here(
    jobs: Iterable[tuple[Job, Workplace]], processes: int, cards: int = 0
) -> Iterator[tuple[Job, str]]:
    """Computes jobs on this machine, each in its own process, so that none can end another.

    Args:
        jobs: each with its place; the next is taken when a process is free.
        processes: at a time.
        cards: GPUs of this machine, which the processes share out.

    Yields:
        Each finished job, with the reason of its failure; empty for success.

    Raises:
        OutputError: the disk is full: no other job could keep its result. What runs is finished before.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    waiting = iter(jobs)
    running: dict[int, tuple[ForkServerProcess, Job, Connection, int]] = {}
    free = list(range(processes))
    full: OutputError | None = None
    try:
        while True:
            for job, place in islice(waiting, 0 if full else processes - len(running)):
                ours, theirs = context.Pipe(duplex=False)
                number = free.pop(0)
                there = replace(place, card=number % cards) if cards > 1 else place
                process = context.Process(target=_run_in_process, args=(job, there, theirs))
                process.start()
                theirs.close()
                running[process.sentinel] = (process, job, ours, number)
            if not running:
                if full is not None:
                    raise full
                return
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                process, job, ours, number = running.pop(sentinel)
                process.join()
                free.append(number)
                reason = _reason(process, ours)
                if isinstance(reason, OutputError):
                    full = reason
                yield job, str(reason)
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.join()


def run_on_cluster(jobs: Sequence[Job], place: Workplace, scheduler: str) -> Iterator[tuple[Job, str]]:
    """Computes jobs on the workers of a Dask scheduler, which see all folders under the same paths.

    A job of a worker that dies goes to another, and resumes after the last whole training. The scheduler's
    address is such as ``tcp://HOST:8786``. Yields as :func:`run_here`.

    Raises:
        UsageError: Dask is not installed, or the scheduler does not answer.
        CacheError: the scheduler went away.
        OutputError: the disk is full.
    """
    from slidetl.tiles.cluster import connect, finished

    with connect(scheduler) as client:
        work = partial(_run_on_worker, place=place)
        for job, found in finished(client, work, jobs, lambda job: job.label):
            if isinstance(found, OutputError):
                raise found  # the end of the connection takes back what no worker has begun
            yield job, found


def _compute(job: Job, place: Workplace, folder: Path) -> JobResult:
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped] # it ships none

    with threadpool_limits(place.threads):
        if "fit" in job.recipe:  # imported here: reading results needs no torch
            from slidetl.compare.train_arm import train_job

            if place.card is not None and job.recipe["fit"]["trainer"].get("devices") in (None, "auto", 1):
                see_one_card(place.card)
            return train_job(job, folder, place.threads, place.allow, place.readers)
        from slidetl.compare.fixed_arms import grade_by_baseline, grade_by_features

        if "classical" in job.recipe:
            return grade_by_features(job)
        if "baseline" in job.recipe:
            return grade_by_baseline(job)
    raise UsageError(f"a job is a fit, classical or a baseline, not {sorted(job.recipe)}")


def _run_in_process(job: Job, place: Workplace, reply: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print; the table is the parent's
    warnings.formatwarning = format_warning
    reply.send(_run(job, place))


def _run_on_worker(job: Job, place: Workplace) -> str | OutputError:
    if not job.cache.is_dir():
        return f"{socket.gethostname()} does not see {job.cache}; all workers must share its file system"
    return _run(job, place)


def _run(job: Job, place: Workplace) -> str | OutputError:
    """Computes a job, and returns the reason of its failure; a full disk, as an error, concerns all jobs."""
    failure = place.folder / ".failed" / f"{job.key}.txt"
    try:
        run_job(job, place)
    except Exception as error:  # no error of one job may end the others; all of it is kept
        with contextlib.suppress(OSError):  # the reason counts more
            failure.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(traceback.format_exc(), encoding="utf-8")
        if (full := full_disk(error)) is not None:
            return OutputError(
                str(error)
                if isinstance(error, SlidetlError)
                else f"{full.filename or place.folder}: {describe_full(full)}"
            )
        reason = describe_failure(error, "use fewer --jobs, or lower bag_size, batch_size and chunk_size")
        if not isinstance(error, SlidetlError):
            reason += f" (all of it is in {failure})"
        return " ".join(reason.split())
    failure.unlink(missing_ok=True)
    return ""


def _end_with_parent() -> None:
    """Ends this process with its parent: a comparison that was killed leaves nothing running for hours."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _reason(process: ForkServerProcess, reply: Connection) -> str | OutputError:
    with reply:
        if reply.poll():
            try:
                found: str | OutputError = reply.recv()
                return found
            except EOFError:
                pass
    return f"its process ended with code {process.exitcode}; if memory is short, use fewer --jobs"
