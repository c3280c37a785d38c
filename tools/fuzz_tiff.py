"""Mutated TIFF files through the tiler: an error, or exactly OpenSlide's pixels for the same bytes.

Every file goes through the real path (``open_slide``, ``plan_tiles``, ``encode_tiles``) in another process:
a crash, a hang or too much memory there is a finding, and the run goes on with the next file.

    python tools/fuzz_tiff.py --files 2000 --seed 0
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SECONDS_PER_FILE = 20.0
MEMORY_BYTES = 10**9

Mutation = Callable[[bytearray, np.random.Generator], bytearray]


def seeds() -> dict[str, bytes]:
    """Small slides of every structure that the fast path knows, as bytes."""
    import tifffile

    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 230, (24, 28, 3)).astype(np.uint8)
    picture = np.repeat(np.repeat(coarse, 16, axis=0), 16, axis=1)  # 384 x 448
    files: dict[str, bytes] = {}
    for name, photometric, subsampling, is_big in (
        ("rgb", "rgb", None, False),
        ("444", "ycbcr", (1, 1), False),
        ("420", "ycbcr", (2, 2), False),
        ("422", "ycbcr", (2, 1), False),
        ("bigtiff", "ycbcr", (2, 2), True),
    ):
        buffer = BytesIO()
        with tifffile.TiffWriter(buffer, bigtiff=is_big) as writer:
            for factor in (1, 2):
                writer.write(
                    picture[::factor, ::factor],
                    tile=(64, 64),
                    photometric=photometric,
                    subsampling=subsampling,
                    compression="jpeg",
                    compressionargs={"level": 85},
                    subfiletype=0 if factor == 1 else 1,
                    resolution=(1e4 / (0.5 * factor), 1e4 / (0.5 * factor)),
                    resolutionunit="CENTIMETER",
                )
        files[name] = buffer.getvalue()
    return files


def flip(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A few bytes anywhere."""
    for at in rng.integers(0, len(data), rng.integers(1, 9)):
        data[at] = int(rng.integers(256))
    return data


def flip_structure(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A byte of the header or of a directory, where every bit means something."""
    for start, length in _directories(bytes(data)):
        if rng.random() < 0.7:
            data[start + int(rng.integers(length))] = int(rng.integers(256))
    return data


def extreme(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A value of a directory becomes an edge case."""
    spans = list(_directories(bytes(data)))
    start, length = spans[rng.integers(len(spans))]
    value = [b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0"][rng.integers(5)]
    at = start + int(rng.integers(max(length - 4, 1)))
    data[at : at + 4] = value
    return data


def truncate(data: bytearray, rng: np.random.Generator) -> bytearray:
    """The end is missing."""
    return data[: int(rng.integers(len(data)))]


def blank(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A block of zeros, as a file system leaves behind."""
    at = int(rng.integers(len(data)))
    data[at : at + 512] = bytes(min(512, len(data) - at))
    return data


def move(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A block of the file lies elsewhere as well."""
    at, to = rng.integers(0, max(len(data) - 256, 1), 2)
    data[to : to + 256] = data[at : at + 256]
    return data


MUTATIONS: tuple[Mutation, ...] = (flip, flip_structure, extreme, truncate, blank, move)


def mutants(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Names that say how each was made, and the bytes."""
    sources = list(seeds().items())
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        name, data = sources[rng.integers(len(sources))]
        mutation = MUTATIONS[rng.integers(len(MUTATIONS))]
        yield f"{number:05d}-{name}-{mutation.__name__}", bytes(mutation(bytearray(data), rng))


def examine(path: Path) -> str:
    """Tiles one file on every fast path: ``refused``, ``equal``, or what differs."""
    from slidetl.errors import CacheCorruptError, SlideError
    from slidetl.slides import open_slide
    from slidetl.slides.openslide import OpenSlideSlide
    from slidetl.tiles.codec import tile_codec
    from slidetl.tiles.cut import encode_tiles
    from slidetl.tiles.grid import Codec, TileSpec
    from slidetl.tiles.plan import plan_tiles

    outcomes = []
    ways: list[tuple[float, int, Codec]]
    ways = [(0.5, 64, "jpeg"), (0.5, 50, "zstd"), (1.0, 64, "jpeg"), (0.8, 40, "zstd")]
    for mpp, size, codec in ways:
        spec = TileSpec(mpp=mpp, tile_size_px=size, min_tissue=0.0, codec=codec)
        is_exact = mpp != 0.8 and not (codec == "jpeg" and size != 64)
        compared = tile_codec(spec)
        try:
            with open_slide(path, None) as slide, OpenSlideSlide(path, None) as reference:
                if slide.info.size_level0[0] * slide.info.size_level0[1] > 10**8:
                    outcomes.append("refused")  # a size that only a mutation claims
                    continue
                plan = plan_tiles(slide, spec)
                for tile, payload in encode_tiles(slide, plan):
                    x, y = plan.origins_level0[tile].tolist()
                    expected = _read(reference, (x, y), spec)
                    if payload is None:
                        if expected is not None:
                            return f"mpp {mpp}, tile {tile}: OpenSlide reads what was given up"
                        continue
                    try:
                        found = compared.decode(payload)
                    except CacheCorruptError:
                        continue  # copied as it is in the file; reading it back says so
                    if expected is None:
                        return f"mpp {mpp}, tile {tile}: OpenSlide cannot read what was stored"
                    copied = compared.decode(compared.encode(expected))
                    if is_exact and _is_same(found, expected):
                        continue
                    # Not copied, but decoded and encoded again: then so is what it is compared with.
                    if is_exact and not _is_same(found, copied):
                        return f"mpp {mpp}, tile {tile}: differs by up to {_worst(found, expected)}"
                    if not is_exact and _mean(found, expected) > 3:
                        return f"mpp {mpp}, tile {tile}: differs by {_mean(found, expected):.1f} on average"
        except SlideError:
            outcomes.append("refused")
        else:
            outcomes.append("equal")
    return "refused" if set(outcomes) == {"refused"} else "equal"


def _read(slide: object, origin: tuple[int, int], spec: object) -> NDArray[np.uint8] | None:
    from slidetl.errors import SlideReadError
    from slidetl.slides.openslide import OpenSlideSlide
    from slidetl.tiles.grid import TileSpec

    assert isinstance(slide, OpenSlideSlide)
    assert isinstance(spec, TileSpec)
    try:
        return slide.read(origin, (spec.tile_size_px, spec.tile_size_px), spec.mpp, spec.mpp_tolerance)
    except SlideReadError:
        return None


def _is_same(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    return bool(np.array_equal(a, b))


def _worst(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    return int(abs(a.astype(int) - b).max())


def _mean(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(abs(a.astype(int) - b).mean())


def _directories(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the header and the directories of a TIFF lie: (start, length)."""
    import tifffile

    yield 0, 16
    with tifffile.TiffFile(BytesIO(data)) as file:
        step = 20 if file.is_bigtiff else 12
        for page in file.pages:
            assert isinstance(page, tifffile.TiffPage)
            yield page.offset, 2 + step * len(page.tags)
            for tag in page.tags:
                if tag.valueoffset and tag.count > 4:
                    yield tag.valueoffset, min(tag.count * 4, 64)


def _work(connection: Connection) -> None:
    """Examines one file after another; what OpenSlide prints is not wanted."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while True:
        try:
            path = connection.recv()
        except EOFError:
            return
        try:
            outcome = examine(path)
        except Exception as error:  # anything but an error of ours is a finding
            outcome = f"raised {type(error).__name__}: {error}"
        connection.send((outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--files", type=int, default=2000, help="mutated files")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--keep", type=Path, help="folder for the files that found something")
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    counts: Counter[str] = Counter()
    findings: list[str] = []
    peak = 0

    def start() -> tuple[multiprocessing.process.BaseProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    process, connection = start()
    with tempfile.TemporaryDirectory() as folder:
        for name, data in mutants(options.files, options.seed):
            path = Path(folder) / f"{name}.tiff"
            path.write_bytes(data)
            connection.send(path)
            outcome = ""
            # The first file also waits for the imports.
            if not connection.poll(SECONDS_PER_FILE + (20 if not counts else 0)):
                process.kill()
                outcome = f"no end after {SECONDS_PER_FILE:.0f} s"
            else:
                try:
                    outcome, memory = connection.recv()
                    peak = max(peak, memory)
                    if memory > MEMORY_BYTES:
                        outcome = f"{memory / 1e6:.0f} MB of memory"
                        process.kill()
                except EOFError:
                    process.join()
                    outcome = f"crashed with exit code {process.exitcode}"
            if outcome in ("refused", "equal"):
                counts[outcome] += 1
            else:
                counts["findings"] += 1
                findings.append(f"{name}: {outcome}")
                print(findings[-1], file=sys.stderr)
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, options.keep)
                if not process.is_alive() or outcome.startswith("no end") or "of memory" in outcome:
                    process.join()
                    process, connection = start()
            path.unlink()
    connection.close()
    process.join()
    print(
        f"{options.files} files: {counts['refused']} refused, {counts['equal']} equal to OpenSlide, "
        f"{len(findings)} findings; peak memory {peak / 1e6:.0f} MB"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
