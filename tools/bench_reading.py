"""How fast tiles are read back at random, as a share of decoding the same bytes from memory.

    python tools/bench_reading.py CACHE

CACHE is a folder that ``slidetl tile`` wrote. The ways take turns on the same random tiles, batch by batch,
and all of it several times; the medians are printed. The pages of the file are in memory, as they are from
the second epoch on: what is measured is the work per tile, not the disk.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import zarr
from torch.utils.data import DataLoader, Dataset

from slidetl.tiles.codec import tile_codec
from slidetl.tiles.store import TILES_PER_SHARD, Shard, SlideCache, checked, groups, shard_path


class _Tiles(Dataset[torch.Tensor]):
    """Batches of random tiles of one cache."""

    def __init__(self, cache: SlideCache, batches: list[list[int]]) -> None:
        self.cache = cache
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> torch.Tensor:
        # Reduced to one number, so that passing pixels between processes is not measured.
        tiles = self.cache.read(self.batches[index])
        return torch.tensor([len(tiles), int(tiles[-1, 0, 0, 0])])


class _Memory(_Tiles):
    """The same, decoded from memory."""

    def __init__(self, cache: SlideCache, payloads: dict[int, bytes], batches: list[list[int]]) -> None:
        super().__init__(cache, batches)
        self.payloads = payloads

    def __getitem__(self, index: int) -> torch.Tensor:
        decode = tile_codec(self.cache.spec).decode
        tiles = [decode(self.payloads[tile]) for tile in self.batches[index]]
        return torch.tensor([len(tiles), int(tiles[-1][0, 0, 0])])


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cache", type=Path, help="folder of a cache; its slide with most tiles is read")
    parser.add_argument("--tiles", type=int, default=1024, help="random tiles in a turn (1024)")
    parser.add_argument("--repeats", type=int, default=9, help="turns (9)")
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader (2)")
    options = parser.parse_args(args)
    cache = max((SlideCache.open(path) for path in groups(options.cache)), key=len)
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, len(cache), options.tiles).tolist()
    payloads = {tile: _payload(cache, tile) for tile in sorted(set(numbers))}
    batches = [numbers[n : n + 64] for n in range(0, len(numbers), 64)]
    array = zarr.open_group(cache.path, mode="r")["tiles"]
    assert isinstance(array, zarr.Array)
    decode = tile_codec(cache.spec).decode

    here: dict[str, Callable[[list[int]], object]] = {
        "decoded from memory": lambda batch: [decode(payloads[tile]) for tile in batch],
        "SlideCache, single tiles": lambda batch: [cache.read([tile]) for tile in batch],
        "SlideCache, batches of 64": cache.read,
        "zarr, single tiles": lambda batch: [array[tile] for tile in batch],
        "zarr, oindex, batches of 64": lambda batch: array.oindex[np.array(batch)],
    }
    loaders = dict(_loaders(cache, payloads, batches, options.workers))
    for loader in loaders.values():
        _epoch(loader)  # starts the workers
    rates: dict[str, list[float]] = {}
    for repeat in range(options.repeats):
        seconds = dict.fromkeys(here, 0.0)
        counts = dict.fromkeys(here, 0)
        for number, batch in enumerate(batches):
            for name, read in here.items():
                if name.startswith("zarr") and number != repeat % len(batches):
                    continue  # it takes long
                started = time.perf_counter()
                read(batch)
                seconds[name] += time.perf_counter() - started
                counts[name] += len(batch)
        for name, count in counts.items():
            rates.setdefault(name, []).append(count / seconds[name])
        for name, loader in loaders.items():
            started = time.perf_counter()
            count = _epoch(loader)
            rates.setdefault(name, []).append(count / (time.perf_counter() - started))
    size = sum(map(len, payloads.values())) / len(payloads) / 1e3
    print(
        f"{cache.spec.tile_size_px} px, {cache.spec.codec}, {size:.1f} kB a tile, {len(cache)} tiles, "
        f"{options.tiles} at random, median of {options.repeats} turns"
    )
    print(f"{'':34}{'tiles/s':>9}{'of memory':>11}")
    for name, values in rates.items():
        # Turn by turn, so that a neighbour on the machine who comes and goes counts little.
        base = rates[_base(name)]
        share = statistics.median(v / b for v, b in zip(values, base, strict=True))
        print(f"{name:34}{statistics.median(values):9.0f}{share:11.1%}")
    return 0


def _base(name: str) -> str:
    method = next((word for word in ("fork", "spawn") if word in name), "")
    return f"memory, DataLoader after {method}" if method else "decoded from memory"


def _loaders(
    cache: SlideCache, payloads: dict[int, bytes], batches: list[list[int]], workers: int
) -> Iterator[tuple[str, DataLoader[torch.Tensor]]]:
    # Long epochs, so that starting and ending one weighs little.
    many = batches * 4
    for method in ("fork", "spawn"):
        for name, data in (("memory", _Memory(cache, payloads, many)), ("SlideCache", _Tiles(cache, many))):
            loader = DataLoader(
                data,
                batch_size=None,
                num_workers=workers,
                multiprocessing_context=method,
                persistent_workers=True,
            )
            yield f"{name}, DataLoader after {method}", loader


def _epoch(loader: DataLoader[torch.Tensor]) -> int:
    return sum(int(count) for count, _ in loader)


def _payload(cache: SlideCache, tile: int) -> bytes:
    number, place = divmod(tile, TILES_PER_SHARD)
    shard = Shard(shard_path(cache.path, number))
    offset, length = shard.index[place]
    with shard.path.open("rb") as file:
        file.seek(offset)
        return checked(file.read(length))


if __name__ == "__main__":
    sys.exit(main())
