"""Time and peak memory of the similarity measures at full size.

    python tools/bench_similarity.py --rows 100000 --columns 2048 --output tools/bench_similarity.txt

Two float32 arrays of noise in memory; each measure in a process of its own, with one permutation. A measure's
figures are added to the output when it is done, so that a long run can be made in pieces.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import time
from pathlib import Path

import numpy as np

from slidetl.analysis.similarity import linear_cka, pwcca, rbf_cka, svcca

MEASURES = {"svcca": svcca, "pwcca": pwcca, "linear_cka": linear_cka, "rbf_cka": rbf_cka}
TITLES = ("measure", "rows", "columns", "seconds", "processor s", "arrays GiB", "peak GiB", "value", "floor")


def measure(name: str, rows: int, columns: int, output: Path | None) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((rows, columns), dtype=np.float32) for _ in range(2))
    clock, processor = time.perf_counter(), time.process_time()
    found = MEASURES[name](x, y, permutations=1)  # type: ignore[operator]
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    arrays = (x.nbytes + y.nbytes) / 2**30
    say(
        f"{name:<12}{rows:>12}{columns:>12}{clock:>12.0f}{processor:>12.0f}{arrays:>12.2f}{peak:>12.2f}"
        f"{found.value:>12.5f}{found.noise_floor:>12.5f}",
        output,
    )


def say(line: str, output: Path | None) -> None:
    print(line, flush=True)
    if output:
        with output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=100_000, help="tiles")
    parser.add_argument("--columns", type=int, default=2048, help="length of an embedding, of both arrays")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="which")
    parser.add_argument("--output", type=Path, help="text file to add the figures to")
    options = parser.parse_args()
    if not (options.output and options.output.exists()):
        threads = os.environ.get("OMP_NUM_THREADS", "all")
        say(
            f"Python {platform.python_version()}, NumPy {np.__version__}, {os.cpu_count()} CPUs, "
            f"threads: {threads}; on a machine shared with other work the seconds are upper bounds",
            options.output,
        )
        say(f"{TITLES[0]:<12}" + "".join(f"{title:>12}" for title in TITLES[1:]), options.output)
    for name in options.measures:
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(name, options.rows, options.columns, options.output)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name}: its process ended with {process.exitcode}")


if __name__ == "__main__":
    main()
