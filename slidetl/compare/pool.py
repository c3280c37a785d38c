"""Many units at a time: a process for each on this machine, or a task for each on the workers of Dask."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from slidetl.compare.records import Job
from slidetl.compare.unit import run_unit
from slidetl.errors import CacheError, SlidetlError, UsageError, describe_failure

# What a unit needs is imported once, by the server that the processes are forked from: it takes seconds.
_PRELOADED = [
    "slidetl.compare.train_arm",
    "slidetl.compare.fixed_arms",
    *(
        "timm",
        "cv2",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "sklearn.linear_model",
    ),
]


def run_here(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, str]]:
    """Computes units on this machine, each in a process of its own, so that none can end another.

    Args:
        jobs: the units, in the order in which they are begun.
        processes: how many at a time.

    Yields:
        Each as it is done, with the reason for which it failed; empty if it did not.

    Raises:
        UsageError: ``processes`` is less than 1.
    """
    if processes < 1:
        raise UsageError(f"--jobs must be at least 1, not {processes}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    waiting = deque(jobs)
    running: dict[int, tuple[ForkServerProcess, Job, Connection]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.popleft()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_run_in_process, args=(job, theirs))
                process.start()
                theirs.close()
                running[process.sentinel] = (process, job, ours)
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                process, job, ours = running.pop(sentinel)
                process.join()
                yield job, _reason(process, ours)
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.join()


def run_on_cluster(jobs: Sequence[Job], scheduler: str) -> Iterator[tuple[Job, str]]:
    """Computes units on the workers of a Dask scheduler, who see all folders under the same paths.

    A worker that dies gives its unit to another, which goes on after the last whole training. Other arguments
    and what it yields as :func:`run_here`.

    Args:
        jobs: the units.
        scheduler: its address, such as ``tcp://HOST:8786``.

    Raises:
        UsageError: Dask is not installed, or the scheduler does not answer.
        CacheError: the scheduler went away.
    """
    from slidetl.tiles.cluster import connect

    with connect(scheduler) as client:
        import distributed

        futures = {client.submit(_run_on_worker, job, pure=False): job for job in jobs}
        for future in distributed.as_completed(futures, loop=client.loop):  # type: ignore[no-untyped-call]
            job = futures[future]
            if future.status == "finished":
                yield job, future.result()
            elif future.status == "error":
                error = future.exception()
                yield job, f"on the cluster: {type(error).__name__}: {error}"
            else:
                raise CacheError(
                    f"the scheduler went away before {job.unit.label} was done; what was done is kept: start "
                    "it and its workers anew, and run the same command again"
                )
            future.release()


def _run_in_process(job: Job, reply: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print; the table is the parent's
    reply.send(_run(job))


def _run_on_worker(job: Job) -> str:
    if not job.cache.is_dir():
        return f"{socket.gethostname()} does not see {job.cache}; all workers must share its file system"
    return _run(job)


def _run(job: Job) -> str:
    """Computes a unit, and returns why it failed."""
    failure = job.folder / ".failed" / f"{job.unit.key}.txt"
    try:
        run_unit(job)
    except Exception as error:  # whatever ends one unit must not end the others; all of it is kept
        reason = describe_failure(error, "use fewer --jobs, or lower bag_size and batch_size")
        if not isinstance(error, SlidetlError):
            reason += f" (all of it is in {failure})"
    else:
        failure.unlink(missing_ok=True)
        return ""
    failure.parent.mkdir(parents=True, exist_ok=True)
    Path(failure).write_text(traceback.format_exc(), encoding="utf-8")
    return " ".join(reason.split())


def _end_with_parent() -> None:
    """A comparison that was killed leaves no process behind that goes on for hours."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _reason(process: ForkServerProcess, reply: Connection) -> str:
    with reply:
        if reply.poll():
            try:
                return str(reply.recv())
            except EOFError:
                pass
    return f"its process ended with code {process.exitcode} (-9: killed, for want of memory perhaps)"
