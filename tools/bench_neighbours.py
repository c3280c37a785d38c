"""Time and memory of an exact search over features that are mapped into memory, and of an index.

    python tools/bench_neighbours.py --rows 1000000 --columns 1280

Writes float16 rows into a temporary file and searches them by their cosine: 24 hits, at most 3 of each
thousand rows. Rows are drawn around a thousand centres in 32 dimensions, turned into all columns. The
process's own memory is told from pages of the file, which the kernel drops when it needs them. With --index
an index is built and kept as 'slidetl atlas similar --index' does it; a search by it leaves out the two
thousand rows of its "patient".
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidetl.analysis.index import open_index
from slidetl.analysis.neighbours import best_of, concept, cosines

_BLOCK = 10_000


def own_memory_mib() -> float:
    """Memory of the process that belongs to no file, MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def bench_index(
    rows: NDArray[np.float16],
    queries: NDArray[np.float32],
    wanted: NDArray[np.int64],
    group: NDArray[np.int64],
    path: Path,
) -> None:
    """Builds an index of rows, reads it again, and searches it once for each of ``wanted``."""
    times = []

    def mark() -> None:
        times.append((time.perf_counter(), time.process_time()))

    mark()
    open_index(path, "", [rows], group, group // 2, 3, lambda _: None)
    mark()
    index = open_index(path, "", [rows], group, group // 2, 3, lambda _: None)
    mark()
    for row, query in zip(wanted, queries, strict=True):
        index.best(concept(query[None]), group, group // 2 != group[row] // 2, 24, 3)
    mark()
    (build, build_cpu), (read, read_cpu), (search, search_cpu) = (
        (b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(times)
    )
    recalls = ", ".join(f"{index.recalls[k - 1]:.3f}" for k in (1, 24, 100))
    each = 1000 / len(wanted)
    print(
        f"index of {path.stat().st_size / 2**20:.0f} MiB: built in {build:.1f} s ({build_cpu:.1f} of "
        f"processor time), checked and read in {read:.2f} s ({read_cpu:.2f}), a query {search * each:.1f} ms "
        f"({search_cpu * each:.1f}); recall at 1, 24 and 100 over {index.checked} rows: {recalls}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=1280)
    parser.add_argument("--queries", type=int, default=1, help="searched together")
    parser.add_argument("--index", action="store_true", help="also build an index")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, 32), dtype=np.float32)
    turn = rng.standard_normal((32, options.columns), dtype=np.float32) / 32**0.5
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "rows").open("xb") as file:
        for start in range(0, options.rows, _BLOCK):
            near = 0.5 * rng.standard_normal((_BLOCK, 32), dtype=np.float32)
            noise = 0.1 * rng.standard_normal((_BLOCK, options.columns), dtype=np.float32)
            part = ((centres[rng.integers(0, 1000, _BLOCK)] + near) @ turn + noise).astype(np.float16)
            file.write(part[: options.rows - start].tobytes())
        file.flush()
        del part
        rows = np.memmap(file.name, np.float16, "r", shape=(options.rows, options.columns))
        wanted = rng.choice(options.rows, options.queries, replace=False)
        queries = rows[np.sort(wanted)].astype(np.float32)
        before, peak, is_done = own_memory_mib(), 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not is_done.wait(0.02):
                peak = max(peak, own_memory_mib())

        watcher = threading.Thread(target=watch)
        watcher.start()
        started, processor = time.perf_counter(), time.process_time()
        similarity = cosines(queries, [rows])
        is_allowed = np.ones(options.rows, bool)
        group = np.arange(options.rows) // 1000
        hits = [best_of(row, group, is_allowed, 24, 3)[0] for row in similarity]
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
        is_done.set()
        watcher.join()
        if options.index:
            bench_index(rows, queries, np.sort(wanted), group, Path(folder) / "index")
    assert hits == np.sort(wanted).tolist()  # each finds itself
    print(
        f"{options.rows} x {options.columns} float16, {options.rows * options.columns * 2 / 2**30:.2f} GiB; "
        f"{options.queries} queries: {seconds:.1f} s, {processor:.1f} s of processor time; own memory "
        f"{before:.0f} MiB before, {peak:.0f} MiB at most; {len(os.sched_getaffinity(0))} cores, load "
        f"{os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
