"""Time and peak memory of the similarity measures at full size.

    python tools/bench_similarity.py --rows 100000 --columns 2048 --measures svcca linear_cka

Two float32 arrays of noise in memory; each measure in a process of its own, with one permutation. The last
result is in ``bench_similarity.txt``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import time

import numpy as np

from slidetl.analysis.similarity import linear_cka, pwcca, rbf_cka, svcca

MEASURES = {"svcca": svcca, "pwcca": pwcca, "linear_cka": linear_cka, "rbf_cka": rbf_cka}


def measure(name: str, rows: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((rows, columns), dtype=np.float32) for _ in range(2))
    started = time.perf_counter()
    found = MEASURES[name](x, y, permutations=1)  # type: ignore[operator]
    seconds = time.perf_counter() - started
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{name:<12}{rows:>9}{columns:>9}{seconds:>10.1f}{gib:>10.2f}{found.value:>10.4f}{found.noise_floor:>10.4f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    options = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    print(f"{versions}, {os.cpu_count()} CPUs, threads: {threads}")
    print(
        f"{'measure':<12}{'rows':>9}{'columns':>9}{'seconds':>10}{'peak GiB':>10}{'value':>10}{'floor':>10}"
    )
    for name in options.measures:
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(name, options.rows, options.columns)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
