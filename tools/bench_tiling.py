"""How fast a slide becomes tiles: slidetl beside a plain OpenSlide loop and other libraries, in one run.

Two works, both on one drawn slide of JPEG tiles (256 px, 4:2:0) at 0.25 and 1.0 um per pixel, whose tissue
leaves a margin of glass:

* *aligned*: tiles of 256 px at 0.25 um per pixel, which coincide with the slide's own;
* *typical*: tiles of 224 px at 0.5 um per pixel.

All engines get the same list of tiles and store them as JPEG, slidetl in its cache, the others in a file
each. Every measurement is a process of its own. Tile work is from the first read to the last commit (fsync
included for slidetl); the whole process adds start-up and, for slidetl, finding the tissue.

With ``--memory``, ``slidetl tile`` runs instead, with two workers on two slides of 100,000 x 100,000 pixels,
and the memory of all its processes together is watched.

    python tools/bench_tiling.py --peers-python PEERS/bin/python --output docs/evidence/tiling.md
    python tools/bench_tiling.py --memory --output docs/evidence/tiling-memory.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

JPEG_TILE_PX = 256
LEVEL_FACTOR = 4
FINEST_MPP = 0.25
TEXTURE_PX = 2048
QUALITY = 90
HUGE_PX = 100_000


@dataclass(frozen=True)
class Work:
    """Tiles of ``side_px`` at ``mpp``, each read from ``read_px`` of level 0."""

    side_px: int
    mpp: float

    @property
    def read_px(self) -> int:
        """Side of what is read, level-0 pixels."""
        return round(self.side_px * self.mpp / FINEST_MPP)


WORKS = {"aligned": Work(256, 0.25), "typical": Work(224, 0.5)}
Tiles = list[list[int]]


# --- The slide


def tissue_colour(seed: int) -> tuple[int, int, int]:
    """A colour for each seed, 28 in a row without a repetition: even random weights tell them apart."""
    return 215 - 15 * (seed % 4), 150 - 10 * (seed % 7), 190 - 12 * (seed % 5)


def draw_texture(side_px: int, seed: int = 0) -> NDArray[np.uint8]:
    """A texture that repeats without a seam, about as hard to compress as stained tissue."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    image = np.zeros((side_px, side_px, 3), np.float32) + np.array(tissue_colour(seed), np.float32)
    for width_px, depth in ((64, 15), (16, 12), (4, 12), (1.2, 15)):
        noise = ndimage.gaussian_filter(
            rng.standard_normal((side_px, side_px)).astype(np.float32), width_px, mode="wrap"
        )
        image += (noise / noise.std() * depth)[..., None] * np.array([0.8, 1, 0.6], np.float32)
    return np.asarray(np.clip(image, 0, 255), dtype=np.uint8)


def write_slide(path: Path, side_px: int, seed: int = 0) -> None:
    """A slide whose tissue is a texture encoded once and repeated: quick to write at any size."""
    import imagecodecs
    import tifffile

    def encoded(image: NDArray[np.uint8]) -> list[list[bytes]]:
        return [
            [
                bytes(
                    imagecodecs.jpeg8_encode(
                        np.ascontiguousarray(image[y : y + JPEG_TILE_PX, x : x + JPEG_TILE_PX]),
                        80,
                        colorspace="rgb",
                        outcolorspace="ycbcr",
                        subsampling="420",
                    )
                )
                for x in range(0, image.shape[1], JPEG_TILE_PX)
            ]
            for y in range(0, image.shape[0], JPEG_TILE_PX)
        ]

    def level(image: NDArray[np.uint8], side: int, margin: int) -> Iterator[bytes]:
        tissue = encoded(image)
        ((glass,),) = encoded(np.full((JPEG_TILE_PX, JPEG_TILE_PX, 3), 255, np.uint8))
        count = -(-side // JPEG_TILE_PX)
        for row in range(count):
            for column in range(count):
                is_tissue = margin <= min(row, column) and max(row, column) < count - margin
                yield tissue[row % len(tissue)][column % len(tissue)] if is_tissue else glass

    texture = draw_texture(TEXTURE_PX, seed)
    reduced = texture.reshape(TEXTURE_PX // LEVEL_FACTOR, LEVEL_FACTOR, -1, LEVEL_FACTOR, 3).mean(axis=(1, 3))
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for factor, image in ((1, texture), (LEVEL_FACTOR, reduced.astype(np.uint8))):
            per_cm = 1e4 / (FINEST_MPP * factor)
            file.write(
                level(image, side_px // factor, 8 // factor),
                shape=(side_px // factor, side_px // factor, 3),
                dtype=np.uint8,
                tile=(JPEG_TILE_PX, JPEG_TILE_PX),
                photometric="ycbcr",
                compression="jpeg",
                subsampling=(2, 2),
                subfiletype=int(factor > 1),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
            )


# --- Engines: each stores all the tiles in a folder and returns the seconds of tile work


def slidetl_engine(threads: int, general: bool = False) -> Callable[[Path, Work, Tiles, Path], float]:
    def run(path: Path, work: Work, tiles: Tiles, folder: Path) -> float:
        from dataclasses import replace

        from slidetl.slides import openslide as reader
        from slidetl.tiles.grid import TileSpec
        from slidetl.tiles.plan import plan_tiles
        from slidetl.tiles.tile import write_tiles

        if general:
            setattr(reader, "_PLAIN_TIFF", ())  # noqa: B010 # as if it were of a format that only OpenSlide reads
        with reader.OpenSlideSlide(path) as slide:
            plan = plan_tiles(slide, TileSpec(mpp=work.mpp, tile_size_px=work.side_px, jpeg_quality=QUALITY))
            count = len(tiles) or len(plan)
            plan = replace(
                plan,
                origins_level0=plan.origins_level0[:count],
                tissue_fraction=plan.tissue_fraction[:count],
                quality={name: values[:count] for name, values in plan.quality.items()},
            )
            start = time.perf_counter()
            cache = write_tiles(slide, plan, folder, "slide", threads)
            seconds = time.perf_counter() - start
            assert len(cache) == count
            return seconds

    return run


def openslide_engine(path: Path, work: Work, tiles: Tiles, folder: Path) -> float:
    import openslide
    from PIL import Image

    start = time.perf_counter()
    with openslide.OpenSlide(path) as slide:
        for number, (x, y) in enumerate(tiles):
            image = slide.read_region((x, y), 0, (work.read_px, work.read_px)).convert("RGB")
            if work.read_px != work.side_px:
                image = image.resize((work.side_px, work.side_px), Image.Resampling.BOX)
            image.save(folder / f"{number}.jpg", quality=QUALITY)
    return time.perf_counter() - start


def pyvips_engine(path: Path, work: Work, tiles: Tiles, folder: Path) -> float:
    import pyvips

    start = time.perf_counter()
    slide = pyvips.Image.new_from_file(str(path), access="random")
    slide = slide.extract_band(0, n=3)
    region = pyvips.Region.new(slide)
    for number, (x, y) in enumerate(tiles):
        data = region.fetch(x, y, work.read_px, work.read_px)
        image = pyvips.Image.new_from_memory(data, work.read_px, work.read_px, 3, "uchar")
        if work.read_px != work.side_px:
            image = image.shrink(work.read_px / work.side_px, work.read_px / work.side_px)
        image.jpegsave(str(folder / f"{number}.jpg"), Q=QUALITY)
    return time.perf_counter() - start


def cucim_engine(path: Path, work: Work, tiles: Tiles, folder: Path) -> float:
    from cucim import CuImage
    from PIL import Image

    start = time.perf_counter()
    slide = CuImage(str(path))
    size = (work.read_px, work.read_px)
    for number, (x, y) in enumerate(tiles):
        pixels = np.asarray(slide.read_region((x, y), size, level=0, device="cpu"))
        image = Image.fromarray(pixels[..., :3])
        if work.read_px != work.side_px:
            image = image.resize((work.side_px, work.side_px), Image.Resampling.BOX)
        image.save(folder / f"{number}.jpg", quality=QUALITY)
    return time.perf_counter() - start


def tiatoolbox_engine(path: Path, work: Work, tiles: Tiles, folder: Path) -> float:
    from PIL import Image
    from tiatoolbox.wsicore.wsireader import WSIReader

    start = time.perf_counter()
    slide = WSIReader.open(path)
    size = (work.side_px, work.side_px)
    for number, (x, y) in enumerate(tiles):
        pixels = slide.read_rect((x, y), size, resolution=work.mpp, units="mpp")
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=QUALITY)
    return time.perf_counter() - start


def dlup_engine(path: Path, work: Work, tiles: Tiles, folder: Path) -> float:
    from dlup import SlideImage
    from PIL import Image

    start = time.perf_counter()
    with SlideImage.from_file_path(path) as slide:
        scaling = FINEST_MPP / work.mpp
        size = (work.side_px, work.side_px)
        for number, (x, y) in enumerate(tiles):
            region = slide.read_region((round(x * scaling), round(y * scaling)), scaling, size)
            pixels = region.to_numpy() if hasattr(region, "to_numpy") else np.asarray(region)
            Image.fromarray(pixels[..., :3]).save(folder / f"{number}.jpg", quality=QUALITY)
    return time.perf_counter() - start


def lazyslide_engine(path: Path, work: Work, tiles: Tiles, folder: Path) -> float:
    from PIL import Image
    from wsidata import open_wsi

    start = time.perf_counter()
    reader = open_wsi(str(path)).reader
    for number, (x, y) in enumerate(tiles):
        image = Image.fromarray(
            np.asarray(reader.get_region(x, y, work.read_px, work.read_px, level=0))[..., :3]
        )
        if work.read_px != work.side_px:
            image = image.resize((work.side_px, work.side_px), Image.Resampling.BOX)
        image.save(folder / f"{number}.jpg", quality=QUALITY)
    return time.perf_counter() - start


LOOP = "OpenSlide loop"
OURS: dict[str, Callable[[Path, Work, Tiles, Path], float]] = {
    "slidetl": slidetl_engine(2),
    "slidetl, one thread": slidetl_engine(1),
    "slidetl, general path": slidetl_engine(2, general=True),
    LOOP: openslide_engine,
}
PEERS: dict[str, tuple[str, Callable[[Path, Work, Tiles, Path], float]]] = {
    "pyvips": ("pyvips", pyvips_engine),
    "cuCIM, CPU, and Pillow": ("cucim", cucim_engine),
    "tiatoolbox": ("tiatoolbox", tiatoolbox_engine),
    "dlup": ("dlup", dlup_engine),
    "LazySlide": ("wsidata", lazyslide_engine),
}
ENGINES = {**OURS, **{name: engine for name, (_, engine) in PEERS.items()}}


# --- Measuring


def peak_mib() -> float:
    """Most memory that this process and its children held, each at its own peak."""
    peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(peaks) / 1024


def measure_here(engine: str, work: str, slide: Path, tiles: Path, folder: Path) -> None:
    """What the process of one measurement does; prints a line of JSON."""
    wanted: Tiles = json.loads(tiles.read_text())
    seconds = ENGINES[engine](slide, WORKS[work], wanted, folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    print(
        json.dumps(
            {
                "tiles": len(wanted),
                "seconds": seconds,
                "mib": peak_mib(),
                "bytes": sum(path.stat().st_size for path in files),
                "files": len(files),
            }
        )
    )


def measure(python: str, engine: str, work: str, slide: Path, tiles: Path, scratch: Path) -> dict[str, Any]:
    """One measurement in a process of its own."""
    folder = scratch / "out"
    folder.mkdir()
    os.sync()  # or it would pay for what its predecessor left to be written
    arguments = [str(a) for a in (engine, work, slide, tiles, folder)]
    start = time.perf_counter()
    done = subprocess.run(
        [python, str(Path(__file__).resolve()), "--one", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    whole = time.perf_counter() - start
    shutil.rmtree(folder)
    if done.returncode:
        raise SystemExit(f"{engine}, {work}: {done.stderr.strip()}")
    return {**json.loads(done.stdout.splitlines()[-1]), "whole": whole}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=32768, help="width of the slide, pixels")
    parser.add_argument(
        "--tiles", type=int, default=4096, help="tiles for each peer; ours and the loop alike"
    )
    parser.add_argument("--images", type=int, default=1200, help="small images, of one tile each")
    parser.add_argument("--runs", type=int, default=3, help="of which the median is printed")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--engines", nargs="*", help="only these")
    parser.add_argument("--works", nargs="*", default=list(WORKS), help="only these")
    parser.add_argument("--memory", action="store_true", help="watch memory on a huge slide instead")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        engine, work, *paths = options.one
        measure_here(engine, work, *(Path(p) for p in paths))
        return
    with tempfile.TemporaryDirectory() as scratch:
        lines = memory(Path(scratch)) if options.memory else run(options, Path(scratch))
    text = "\n".join(lines)
    print(text)
    if options.output:
        options.output.write_text(text.rstrip() + "\n")


def run(options: argparse.Namespace, scratch: Path) -> list[str]:
    slide = scratch / "slide.tiff"
    write_slide(slide, options.side)
    lines = about(options, slide)
    for work in options.works:
        lines += table(options, scratch, slide, work)
    return lines + reading(scratch, slide) + images(options, scratch)


def reading(scratch: Path, slide: Path) -> list[str]:
    """Reading the typical tiles back at random, by ``tools/bench_reading.py``."""
    work, folder, cache = WORKS["typical"], scratch / "slides", scratch / "cache"
    folder.mkdir()
    (folder / slide.name).hardlink_to(slide)
    slidetl_tile(folder, cache, f"--mpp={work.mpp}", f"--tile-size={work.side_px}")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("bench_reading.py")), str(cache)],
        capture_output=True,
        text=True,
        check=True,
    )
    shutil.rmtree(cache)
    return [
        "## reading back",
        "",
        "Each row is compared with decoding the same JPEGs from memory in the same kind of process; the last "
        "column is the median over turns of the ratio within a turn.",
        "",
        "```",
        *done.stdout.splitlines(),
        "```",
        "",
    ]


def slidetl_tile(folder: Path, cache: Path, *options: str) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "slidetl", "tile", str(folder), f"--cache={cache}", "--workers=2"),
            *options,
        ],
        capture_output=True,
        check=True,
    )


def images(options: argparse.Namespace, scratch: Path) -> list[str]:
    """``slidetl tile`` on small labelled images, as public patch data sets come: each a cache of one tile."""
    from PIL import Image

    folder = scratch / "images"
    texture = draw_texture(TEXTURE_PX)
    rng = np.random.default_rng(0)
    for number in range(options.images):
        x, y = rng.integers(0, TEXTURE_PX - 224, 2).tolist()
        path = folder / f"label{number % 5}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(texture[y : y + 224, x : x + 224]).save(path, quality=QUALITY)
    rates = []
    for _ in range(options.runs):
        os.sync()
        start = time.perf_counter()
        slidetl_tile(folder, scratch / "cache", "--mpp=0.5", "--mpp-override=0.5", "--min-tissue=0")
        rates.append(options.images / (time.perf_counter() - start))
        shutil.rmtree(scratch / "cache")
    return [
        f"## images: {options.images} of 224 px, each a slide of one tile",
        "",
        f"`slidetl tile` with two workers: {statistics.median(rates):.0f} images/s, whole process, until all "
        "is durable.",
        "",
    ]


def memory(scratch: Path) -> list[str]:
    """``slidetl tile`` on two huge slides in two workers: the most that all its processes hold at a time."""
    slides = scratch / "slides"
    slides.mkdir()
    write_slide(slides / "a.tiff", HUGE_PX)
    (slides / "b.tiff").hardlink_to(slides / "a.tiff")
    lines = [
        f"# Memory on slides of {HUGE_PX} x {HUGE_PX} px",
        "",
        f"`tools/bench_tiling.py --memory`, {date.today().isoformat()}: `slidetl tile --workers 2` on two "
        f"slides of {(slides / 'a.tiff').stat().st_size / 1e9:.1f} GB; the resident memory of all its "
        "processes added up, shared pages counted in each, sampled ten times a second.",
        "",
        "| | peak MiB | tiles |",
        "|---|---|---|",
    ]
    for name, work in WORKS.items():
        cache = scratch / "cache"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "slidetl", "tile", str(slides), f"--cache={cache}", "--workers=2"),
                *(f"--mpp={work.mpp}", f"--tile-size={work.side_px}"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, tree_mib(process.pid))
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"{name}: slidetl tile ended with {process.returncode}")
        from slidetl.tiles.ledger import Ledger

        tiles = sum(row.tiles for row in Ledger(cache / "ledger.csv").rows())
        lines.append(f"| {name} | {peak:.0f} | {tiles} |")
        shutil.rmtree(cache)
    return lines


def tree_mib(pid: int) -> float:
    """Resident memory of a process and all below it, now."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0.0  # it has just ended
    return pages * os.sysconf("SC_PAGESIZE") / 2**20 + sum(tree_mib(int(child)) for child in children)


def about(options: argparse.Namespace, slide: Path) -> list[str]:
    from importlib.metadata import version

    names = ("numpy", "openslide-python", "openslide-bin", "simplejpeg", "imagecodecs", "pillow")
    peers = subprocess.run(
        [options.peers_python, "-m", "pip", "list", "--format=freeze"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    theirs = [
        p
        for p in peers
        if p.split("==")[0].lower().split("-")[0] in ("pyvips", "cucim", "dlup", "tiatoolbox", "lazyslide")
    ]
    versions = ", ".join(
        [f"{name} {version(name)}" for name in names] + [p.replace("==", " ") for p in theirs]
    )
    machine = f"{processor()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    size = f"{options.side} x {options.side} px, {slide.stat().st_size / 1e6:.0f} MB"
    return [
        "# From a slide to tiles: how fast",
        "",
        f"`tools/bench_tiling.py`, {date.today().isoformat()}, {machine}, {versions}.",
        "",
        f"A drawn slide of {size}, JPEG tiles of {JPEG_TILE_PX} px, 4:2:0, at {FINEST_MPP} and "
        f"{FINEST_MPP * LEVEL_FACTOR} um per pixel. All engines store the same tiles; medians of "
        f"{options.runs} runs, each a process of its own. Tile work is from the first read to the last "
        "commit, fsync included for slidetl alone; the whole process adds start-up and, for slidetl, finding "
        "the tissue. slidetl copies the aligned tiles, and decodes for the typical ones; its general path is "
        "what it "
        "does for formats that only OpenSlide reads, shown on the same slide.",
        "",
    ]


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def wanted_tiles(slide: Path, work: Work, count: int) -> Tiles:
    from slidetl.slides import open_slide
    from slidetl.tiles.grid import TileSpec
    from slidetl.tiles.plan import plan_tiles

    with open_slide(slide) as opened:
        plan = plan_tiles(opened, TileSpec(mpp=work.mpp, tile_size_px=work.side_px))
    tiles: Tiles = plan.origins_level0[:count].tolist()
    return tiles


def table(options: argparse.Namespace, scratch: Path, slide: Path, work: str) -> list[str]:
    tiles = wanted_tiles(slide, WORKS[work], options.tiles)
    listed = scratch / "tiles.json"
    listed.write_text(json.dumps(tiles))
    results: dict[str, dict[str, float] | None] = {}
    for engine in options.engines or ENGINES:
        python = sys.executable
        if engine in PEERS:
            python = options.peers_python
            found = subprocess.run(
                [python, "-c", f"import {PEERS[engine][0]}"], capture_output=True, check=False
            )
            if found.returncode:
                results[engine] = None
                continue
        runs = [measure(python, engine, work, slide, listed, scratch) for _ in range(options.runs)]
        results[engine] = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        print(
            work, engine, [f"{len(tiles) / one['seconds']:.0f}" for one in runs], "tiles/s", file=sys.stderr
        )
    loop = results.get(LOOP)
    lines = [
        f"## {work}: {len(tiles)} tiles of {WORKS[work].side_px} px at {WORKS[work].mpp} um per pixel",
        "",
        "| | tiles/s, tile work | against the loop | tiles/s, whole process | peak MiB | MB stored | files |",
        "|---|---|---|---|---|---|---|",
    ]
    for engine, result in results.items():
        if result is None:
            lines.append(f"| {engine} | not installed | | | | | |")
            continue
        rate = len(tiles) / result["seconds"]
        ratio = f"{rate * loop['seconds'] / len(tiles):.1f} x" if loop else ""
        lines.append(
            f"| {engine} | {rate:.0f} | {ratio} | {len(tiles) / result['whole']:.0f} | {result['mib']:.0f} "
            f"| {result['bytes'] / 1e6:.0f} | {result['files']:.0f} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
