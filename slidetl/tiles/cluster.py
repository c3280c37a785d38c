"""Tiles slides on many machines, one job per slide or CT series, scheduled by Dask.

All machines see the slides and the cache folder under the same paths. If a worker dies in mid-slide, another
continues from the last complete shard.
"""

from __future__ import annotations

import logging
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from slidetl.errors import CacheError, CacheMissingError, UsageError, describe_failure, needs_extra
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import FAILED, LedgerRow
from slidetl.tiles.run import Job, jobs_of, record_as_done
from slidetl.tiles.tile import SlideSource, release_series, stamped, tile_slide

if TYPE_CHECKING:
    from distributed import Client

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Longest wait for a scheduler to answer, seconds.
CONNECT_TIMEOUT = 10

# Retries after an error unrelated to the slide, such as lack of memory.
RETRIES = 2


def tile_on_cluster(
    sources: Sequence[SlideSource],
    cache_dir: Path,
    spec: TileSpec,
    scheduler: str,
    overwrite: bool = False,
    preview: bool = False,
    on_done: Callable[[LedgerRow], None] | None = None,
) -> list[LedgerRow]:
    """Tiles many slides on the workers of a Dask scheduler; on one machine, use ``tile_slides``.

    This process alone writes the ledger, as slides finish. A slide fails once four of its workers have died
    (Dask's ``distributed.scheduler.allowed-failures``), so one too large for memory cannot end a run.

    Arguments, result and errors are those of :func:`~slidetl.tiles.run.tile_slides`; ``cache_dir`` is the
    same folder on every machine, ``scheduler`` an address such as ``tcp://HOST:8786``.

    Raises:
        UsageError: Dask is not installed, or the scheduler does not answer.
        CacheError: the scheduler went away.
    """
    # Workers run in folders of their own.
    cache_dir = cache_dir.absolute()
    sources = [replace(source, path=source.path.absolute()) for source in sources]
    with connect(scheduler) as client:
        tile = partial(_tile_job, cache_dir=cache_dir, spec=spec, overwrite=overwrite, preview=preview)
        start = partial(_rows, client, sources, tile)
        return record_as_done(sources, cache_dir, spec, overwrite, start, on_done)


def connect(address: str) -> Client:
    """Connects to a Dask scheduler, and warns if it has no workers.

    Raises:
        UsageError: Dask is not installed, or no scheduler answers at the address.
    """
    found = re.fullmatch(r"(?:tcp|tls)://\[?([^\[\]]+)\]?:(\d{1,5})", address)
    if found is None:
        raise UsageError(f"--scheduler: expected an address such as tcp://HOST:8786, not {address!r}")
    with needs_extra("--scheduler needs Dask", "cluster"):
        import distributed
    # Dask reports a lost scheduler in fifty lines; the error below does so in one.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # A plain connection first: Dask retries until its timeout even if nobody listens.
        socket.create_connection((found[1], int(found[2])), CONNECT_TIMEOUT).close()
        client = distributed.Client(address, timeout=CONNECT_TIMEOUT, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--scheduler {address}: no Dask scheduler answers there ({error}); start one with "
            "'dask scheduler --no-dashboard'"
        ) from error
    if not client.scheduler_info()["workers"]:
        warnings.warn(
            f"{address} has no workers yet: start some with 'dask worker {address} --nthreads 1'",
            stacklevel=3,
        )
    return client


def finished(
    client: Client,
    work: Callable[[_Item], _Result],
    jobs: Iterable[_Item],
    name: Callable[[_Item], str],
    retries: int = 0,
) -> Iterator[tuple[_Item, _Result | str]]:
    """Yields each job as workers have done it, with its result or the reason of its failure.

    Raises:
        CacheError: the scheduler went away.
    """
    import distributed

    # Not pure: a second run must work again, not receive the results of the first.
    futures = {client.submit(work, job, pure=False, retries=retries): job for job in jobs}
    for future in distributed.as_completed(futures, loop=client.loop):  # type: ignore[no-untyped-call]
        job = futures[future]
        if future.status == "finished":
            yield job, future.result()
        elif future.status == "error":
            failure = describe_failure(future.exception(), "start workers with more, or fewer threads")
            yield job, f"on the cluster: {failure}"
        else:
            raise CacheError(
                f"the scheduler went away before {name(job)} was done; what was done is kept: start "
                "it and its workers anew, and run the same command again"
            )
        future.release()


def _rows(
    client: Client, sources: Sequence[SlideSource], tile: Callable[[Job], list[LedgerRow]]
) -> Iterator[LedgerRow]:
    for job, rows in finished(client, tile, jobs_of(sources), lambda job: job[0].slide_id, RETRIES):
        if isinstance(rows, str):
            failed = (LedgerRow(source.slide_id, str(source.path), FAILED, rows) for source in job)
            yield from (stamped(row, time.monotonic()) for row in failed)
        else:
            yield from rows


def _tile_job(job: Job, cache_dir: Path, spec: TileSpec, overwrite: bool, preview: bool) -> list[LedgerRow]:
    """Tiles the slides of a job on a worker."""
    if not cache_dir.is_dir():
        raise CacheMissingError(
            f"{socket.gethostname()} does not see {cache_dir}; the cache must be on a file system that all "
            "workers share"
        )
    rows = [tile_slide(source, cache_dir, spec, overwrite, preview=preview) for source in job]
    release_series()
    return rows
