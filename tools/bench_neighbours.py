"""Time and memory of an exact search over features that are mapped into memory.

    python tools/bench_neighbours.py --rows 1000000 --columns 1280

Writes float16 rows into a temporary file, more than --queries times, and searches them by their cosine. The
process's own memory is told from pages of the file, which the kernel drops when it needs them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from slidetl.analysis.neighbours import best_of, cosines

_BLOCK = 10_000


def own_memory_mib() -> float:
    """Memory of the process that belongs to no file, MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=1280)
    parser.add_argument("--queries", type=int, default=1, help="searched together")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    block = rng.standard_normal((_BLOCK, options.columns), dtype=np.float32)
    with tempfile.NamedTemporaryFile() as file:
        for start in range(0, options.rows, _BLOCK):
            part = (block * (1 + start / options.rows) + rng.standard_normal(options.columns)).astype(
                np.float16
            )
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
    assert hits == np.sort(wanted).tolist()  # each finds itself
    print(
        f"{options.rows} x {options.columns} float16, {options.rows * options.columns * 2 / 2**30:.2f} GiB; "
        f"{options.queries} queries: {seconds:.1f} s, {processor:.1f} s of processor time; own memory "
        f"{before:.0f} MiB before, {peak:.0f} MiB at most; {len(os.sched_getaffinity(0))} cores, load "
        f"{os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
