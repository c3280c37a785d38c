"""Time, memory and agreement of mean shift against scikit-learn's, in one run.

    python tools/bench_clusters.py --points 100000 --columns 64 --output tools/bench_clusters.txt

Clusters of unequal size and density are drawn. All sides have the same seeds and bandwidth (Gaussian:
a third), and each runs in a process of its own. scikit-learn moves one seed after the other: its time grows
with --seeds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def draw(
    points: int, columns: int, clusters: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draws clusters: the largest has 20 times the points of the smallest, the widest twice the width."""
    rng = np.random.default_rng(seed)
    shares = np.geomspace(1, 1 / 20, clusters)
    truth = rng.choice(clusters, points, p=shares / shares.sum())
    width = rng.permutation(np.linspace(0.7, 1.4, clusters))
    centres = 2.5 * rng.standard_normal((clusters, columns))
    rows = centres[truth] + width[truth, None] * rng.standard_normal((points, columns))
    return rows.astype(np.float32), truth


def cluster(connection: Connection, side: str, options: argparse.Namespace, bandwidth: float) -> None:
    points, _ = draw(options.points, options.columns, options.clusters, options.seed)
    seeds = points[np.random.default_rng(options.seed).permutation(len(points))[: options.seeds]]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: Any
    if side == "scikit-learn":
        from sklearn.cluster import MeanShift

        started, processor = time.perf_counter(), time.process_time()
        found = MeanShift(bandwidth=bandwidth, seeds=seeds, n_jobs=options.jobs).fit(points)
        labels, centres = found.labels_, found.cluster_centers_
    else:
        import torch

        from slidetl.analysis.clusters import mean_shift

        near = int(side.split("=")[1]) if "=" in side else None
        kernel: Any = "gaussian" if side == "gaussian" else "flat"
        device = torch.device("cuda" if side == "GPU" else "cpu")
        if kernel == "gaussian":
            bandwidth /= 3  # the edge of the flat kernel is three standard deviations
        started, processor = time.perf_counter(), time.process_time()
        found = mean_shift(points, bandwidth, kernel=kernel, seeds=seeds, neighbours=near, device=device)
        labels, centres = found.labels, found.centres
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    connection.send((labels, len(centres), seconds, processor, peak / 2**20, (peak - before) / 2**20))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=20, help="drawn")
    parser.add_argument("--seeds", type=int, default=200, help="points that climb, the same on all sides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes of scikit-learn, over seeds")
    parser.add_argument("--sides", nargs="+", default=["scikit-learn", "flat", "gaussian", "k=512", "k=16"])
    parser.add_argument("--output", type=Path, help="text file to write the table to")
    options = parser.parse_args(arguments)

    from sklearn.metrics import adjusted_rand_score

    from slidetl.analysis.clusters import bandwidth_of

    points, truth = draw(options.points, options.columns, options.clusters, options.seed)
    bandwidth = bandwidth_of(points, max(2, options.points // 100))
    lines = [
        f"{options.points} points of {options.columns} columns, {options.clusters} clusters drawn, "
        f"{options.seeds} seeds, bandwidth {bandwidth:.3f}",
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, load "
        f"{os.getloadavg()[0]:.1f} at the start; "
        f"numpy {np.__version__}",
        f"{'side':<14}{'seconds':>10}{'processor s':>13}{'times':>8}{'peak GiB':>10}{'grown GiB':>11}"
        f"{'clusters':>10}{'Rand drawn':>12}{'Rand first':>12}",
    ]
    print("\n".join(lines), flush=True)
    first: tuple[NDArray[np.int64], float] | None = None
    context = multiprocessing.get_context("spawn")
    for side in options.sides:
        ours, theirs = context.Pipe()
        process = context.Process(target=cluster, args=(theirs, side, options, bandwidth))
        process.start()
        theirs.close()
        labels, count, seconds, processor, peak, grown = ours.recv()
        process.join()
        first = first or (labels, seconds)
        line = (
            f"{side:<14}{seconds:>10.2f}{processor:>13.2f}{first[1] / seconds:>8.1f}"
            f"{peak:>10.2f}{grown:>11.2f}"
            f"{count:>10}{adjusted_rand_score(truth, labels):>12.4f}"
            f"{adjusted_rand_score(first[0], labels):>12.4f}"
        )
        print(line, flush=True)
        lines.append(line)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
