"""How fast bags of tiles come out of the training loader.

    python tools/bench_loader.py CACHE

CACHE is a folder that ``slidetl tile`` wrote. Whole epochs are timed after one that starts the workers; the
ways take turns, and the medians are printed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

from slidetl.cache.store import SlideCache, groups
from slidetl.data.augment import Augmentation
from slidetl.data.datasets import Bag, BagDataset, CachedSlide, EpochSampler, collate_bags
from slidetl.data.manifest import ManifestRow
from slidetl.data.resuming import ResumableLoader


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cache", type=Path, help="folder of a cache; each of its slides gives a bag")
    parser.add_argument("--bag-size", type=int, default=48, help="tiles in a bag (48)")
    parser.add_argument("--batch-size", type=int, default=4, help="bags in a batch (4)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="processes (0 1 2)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="in each process (1 2)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (5)")
    options = parser.parse_args(args)
    slides = [
        CachedSlide(ManifestRow(0, path.stem, path, path.stem, 0), SlideCache.open(path))
        for path in groups(options.cache)
    ]
    loaders: dict[tuple[str, int, int], ResumableLoader[Bag]] = {}
    for (name, augmentation), workers, threads in itertools.product(
        (("read", None), ("read and augment", Augmentation())), options.workers, options.threads
    ):
        loaders[name, workers, threads] = ResumableLoader(
            BagDataset(slides, options.bag_size, augmentation, seed=0, threads=threads),
            batch_size=options.batch_size,
            sampler=EpochSampler(len(slides), seed=0),
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate_bags,
        )
    rates: dict[tuple[str, int, int], list[float]] = {key: [] for key in loaders}
    per_cpu: dict[tuple[str, int, int], list[float]] = {key: [] for key in loaders}
    for repeat in range(options.repeats + 1):
        for key, loader in loaders.items():
            loader.sampler.set_epoch(repeat)
            started, computed = time.perf_counter(), time.process_time()
            tiles = sum(int(batch["mask"].sum()) for batch in loader)
            if repeat:  # the first starts the workers
                rates[key].append(tiles / (time.perf_counter() - started))
                per_cpu[key].append(tiles / (time.process_time() - computed))
    spec = slides[0].cache.spec
    print(
        f"{len(slides)} slides, bags of {options.bag_size} tiles of {spec.tile_size_px} px ({spec.codec}), "
        f"median of {options.repeats} epochs"
    )
    print(f"{'':18}{'workers':>9}{'threads':>9}{'tiles/s':>9}{'per CPU s':>11}")
    for key, values in rates.items():
        name, workers, threads = key
        # Of other processes the time is not known until they end; this one is not slowed by its neighbours.
        alone = f"{statistics.median(per_cpu[key]):11.0f}" if not workers else ""
        print(f"{name:18}{workers:9}{threads:9}{statistics.median(values):9.0f}{alone}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
