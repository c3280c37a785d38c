"""Builds slides of known grade from a folder of labelled tiles: pyramids, and their manifest.

    python tools/make_collage.py TILES OUT --target CLASS [--external OTHER_TILES] [--redraw K]

TILES and OTHER_TILES have a folder of square tiles of one size for each class, TILES/CLASS/*.jpg or *.png. A
slide is a mosaic of tiles, each grade in turn: grades 0, 1, ... have an exact share of tiles of the target
class, 0, 10, 20, 30 and 40 % by default. The shares of the other classes are a Dirichlet draw. No tile, nor a
copy of one, is in training and in test slides. External slides are made of OTHER_TILES alone. Each slide
counts as a patient: nothing here shows how patients differ.

OUT gets slides/*.tif, tiles.csv (the tile at each place of each slide) and, last, manifest.csv with a split
(train, test) and a site (home, external).
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from slidetl.cli.progress import Progress
from slidetl.data.manifest import read_manifest
from slidetl.errors import SlidetlError, UsageError
from slidetl.evaluation.leakage import near_duplicates
from slidetl.files import write_csv
from slidetl.synthetic.pyramid import BAND_PX, write_pyramid

HOME, EXTERNAL = "home", "external"
MOST_PX = 1 << 31  # of all tiles together: they are held in memory, three bytes each


@dataclass(frozen=True)
class Collage:
    """The slides to build.

    Attributes:
        target: the class with the exact share.
        shares: of the target's tiles by grade, 0..1.
        train, test, external: numbers of slides; grades take turns.
        tiles: of a slide.
        train_tiles, test_tiles: tiles of each class to build training and test slides from.
        concentration: of the Dirichlet distribution of the other classes.
        redraw: number of the draw; another one splits the tiles and builds all slides afresh.
        mpp: micrometres per pixel, written into the slides.
        jpeg_quality: of the slides, 1..100.
    """

    target: str
    shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)
    train: int = 100
    test: int = 300
    external: int = 300
    tiles: int = 40
    train_tiles: int = 400
    test_tiles: int = 200
    concentration: float = 1.0
    redraw: int = 0
    mpp: float = 1.0
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        counts = (self.train, self.test, self.tiles, self.train_tiles, self.test_tiles)
        if min(counts) < 1 or min(self.external, self.redraw) < 0:
            raise UsageError(
                f"expected at least one slide and tile of each part, and a redraw from 0, not {self}"
            )
        if not (0 < self.mpp < math.inf and 0 < self.concentration < math.inf):
            raise UsageError(
                f"expected --mpp and --concentration above 0, not {self.mpp}, {self.concentration}"
            )
        if not 1 <= self.jpeg_quality <= 100:
            raise UsageError(f"--jpeg-quality must be from 1 to 100, not {self.jpeg_quality}")
        if len(self.shares) < 2 or sorted(set(self.shares)) != list(self.shares):
            raise UsageError(f"--shares must be at least two numbers, each above the last, not {self.shares}")
        for share in self.shares:
            if not 0 <= share <= 1 or abs(share * self.tiles - round(share * self.tiles)) > 1e-9:
                raise UsageError(
                    f"a share of {share:g} of {self.tiles} tiles is no whole number of tiles from 0 to "
                    f"{self.tiles}; change --shares or --tiles-per-slide"
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a slide, all of them filled; as square as possible."""
        rows = next(n for n in range(math.isqrt(self.tiles), 0, -1) if self.tiles % n == 0)
        return rows, self.tiles // rows


@dataclass(frozen=True, eq=False)
class Tiles:
    """Labelled tiles in memory.

    Attributes:
        names: ``[n]`` paths below the folder.
        labels: ``[n]`` numbers of their classes.
        classes: names.
        pixels: ``[n, side, side, 3] uint8``.
    """

    names: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class DrawnSlide:
    """A slide: its grade, and the numbers of its tiles by place, row by row."""

    grade: int
    tiles: NDArray[np.int64]


def read_tiles(folder: Path) -> Tiles:
    """Reads a folder of labelled tiles.

    Raises:
        UsageError: there are fewer than two classes, or tiles differ in size, or are not square, or not RGB.
    """
    classes = read_manifest(folder, images=True).labels if folder.is_dir() else ()
    if len(classes) < 2:
        raise UsageError(
            f"{folder}: expected a folder of tiles for each of two classes or more, CLASS/*.jpg or *.png"
        )
    found = read_manifest(folder, classes, images=True)
    pixels = None
    for number, row in enumerate(found.rows):
        try:
            with Image.open(row.path, formats=("PNG", "JPEG", "BMP", "TIFF")) as picture:
                mode, size = picture.mode, picture.size
                tile = np.asarray(picture) if mode == "RGB" else None
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UsageError(f"{row.path}: not a picture, or damaged: {error}") from error
        if tile is None or size[0] != size[1]:
            raise UsageError(
                f"{row.path}: expected a square RGB tile, found {size[0]} x {size[1]} px in {mode}"
            )
        if pixels is None:
            if len(found.rows) * size[0] ** 2 > MOST_PX:
                raise UsageError(
                    f"{folder}: {len(found.rows)} tiles of {size[0]} px do not fit into memory; use fewer"
                )
            pixels = np.empty((len(found.rows), *tile.shape), np.uint8)
        if tile.shape != pixels.shape[1:]:
            raise UsageError(
                f"{row.path}: expected {pixels.shape[1]} px like the first tile, found {size[0]} px"
            )
        pixels[number] = tile
    assert pixels is not None
    labels = np.array([row.grade for row in found.rows], np.int64)
    names = tuple(os.path.relpath(row.path, folder.absolute()) for row in found.rows)
    return Tiles(names, labels, classes, pixels)


def copies(*sets: Tiles) -> list[tuple[int, int]]:
    """Finds pairs of tiles that show the same, turned or not, numbered through all sets."""
    small = [
        np.asarray(Image.fromarray(tile).resize((32, 32), Image.Resampling.BOX))
        for tiles in sets
        for tile in tiles.pixels
    ]
    return [(one, other) for one, other, _ in near_duplicates(small)]


def split_tiles(
    tiles: Tiles, alike: Sequence[tuple[int, int]], collage: Collage, rng: np.random.Generator
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Splits the tiles of each class at random into those of training and of test slides.

    Tiles with a copy all go to the training slides, so that no picture is on both sides.

    Raises:
        UsageError: a class has too few tiles.
    """
    copied = np.zeros(len(tiles.names), bool)
    copied[[number for pair in alike for number in pair]] = True
    train, test = [], []
    for label, name in enumerate(tiles.classes):
        members = rng.permutation(np.flatnonzero(tiles.labels == label))
        members = np.concatenate([members[copied[members]], members[~copied[members]]])
        needed = collage.train_tiles + collage.test_tiles
        if len(members) < needed or copied[members[collage.train_tiles :]].any():
            raise UsageError(
                f"class {name!r} has {len(members)} tiles, {copied[members].sum()} of them copies of others; "
                f"expected {needed}, at most {collage.train_tiles} of them copies: lower --train-tiles or "
                "--test-tiles"
            )
        train.append(members[: collage.train_tiles])
        test.append(members[collage.train_tiles : needed])
    return train, test


def draw_slides(
    pools: Sequence[NDArray[np.int64]], target: int, n_slides: int, collage: Collage, rng: np.random.Generator
) -> list[DrawnSlide]:
    """Draws the tiles of slides from the pools of the classes; none is twice in a slide.

    Raises:
        UsageError: a pool may not suffice for a slide.
    """
    if n_slides and min(len(pool) for pool in pools) < collage.tiles:
        raise UsageError(
            f"a class has {min(len(pool) for pool in pools)} tiles to build slides of {collage.tiles} tiles "
            "from, which may all be of one class; add tiles, or lower --tiles-per-slide"
        )
    slides = []
    for number in range(n_slides):
        grade = number % len(collage.shares)
        counts = np.zeros(len(pools), np.int64)
        counts[target] = round(collage.shares[grade] * collage.tiles)
        others = [label for label in range(len(pools)) if label != target]
        mix = rng.dirichlet([collage.concentration] * len(others))
        counts[others] = rng.multinomial(collage.tiles - counts[target], mix)
        drawn = [rng.choice(pool, count, replace=False) for pool, count in zip(pools, counts, strict=True)]
        slides.append(DrawnSlide(grade, rng.permutation(np.concatenate(drawn))))
    return slides


def bands(slide: DrawnSlide, tiles: Tiles, collage: Collage) -> Iterator[NDArray[np.uint8]]:
    """Yields the pixels of a slide in bands, as the writer of pyramids takes them."""
    rows, columns = collage.grid
    side = tiles.pixels.shape[1]
    mosaic = tiles.pixels[slide.tiles].reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    whole = np.ascontiguousarray(mosaic).reshape(rows * side, columns * side, 3)
    for top in range(0, len(whole), BAND_PX):
        yield whole[top : top + BAND_PX]


def make_collage(home: Path, external: Path | None, out: Path, collage: Collage) -> int:
    """Builds all slides and writes them, ``tiles.csv`` and, last, ``manifest.csv`` into an empty folder.

    Args:
        home: tiles of training and test slides.
        external: tiles of the external slides; None for no such slides.
        out: the folder.
        collage: the slides.

    Returns:
        The number of slides.

    Raises:
        UsageError: the folder is not empty, or the tiles do not suffice.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder; name another one, or remove it")
    sets = [read_tiles(folder) for folder in (home, external) if folder is not None]
    tiles = sets[0]
    if collage.target not in tiles.classes:
        raise UsageError(
            f"--target: there is no class {collage.target!r} in {home}; there are {', '.join(tiles.classes)}"
        )
    if len(sets) > 1 and (sets[1].classes, sets[1].pixels.shape[1]) != (tiles.classes, tiles.pixels.shape[1]):
        raise UsageError(
            f"{external}: expected classes and size of {home}, {', '.join(tiles.classes)}, found others"
        )
    rng = np.random.default_rng([collage.redraw, len(collage.shares)])
    target, n_home = tiles.classes.index(collage.target), len(tiles.names)
    alike = copies(*sets)
    train, test = split_tiles(tiles, [pair for pair in alike if max(pair) < n_home], collage, rng)
    parts = [
        ("train", HOME, tiles, draw_slides(train, target, collage.train, collage, rng)),
        ("test", HOME, tiles, draw_slides(test, target, collage.test, collage, rng)),
    ]
    if len(sets) > 1:
        known = {other - n_home for one, other in alike if one < n_home <= other}
        kept = np.array([number not in known for number in range(len(sets[1].names))])
        pools = [np.flatnonzero((sets[1].labels == label) & kept) for label in range(len(tiles.classes))]
        parts.append(("test", EXTERNAL, sets[1], draw_slides(pools, target, collage.external, collage, rng)))
    (out / "slides").mkdir(parents=True, exist_ok=True)
    rows, columns = collage.grid
    size = (columns * tiles.pixels.shape[1], rows * tiles.pixels.shape[1])
    manifest: list[dict[str, object]] = []
    with (
        (out / "tiles.csv").open("w", newline="", encoding="utf-8") as file,
        Progress("slides", sum(len(p[3]) for p in parts)) as bar,
    ):
        places = csv.writer(file, lineterminator="\n")
        places.writerow(["slide_id", "place", "class", "tile"])
        for split, site, source, slides in parts:
            for number, slide in enumerate(slides):
                name = f"{EXTERNAL if site == EXTERNAL else split}-{number:04d}"
                path = out / "slides" / f"{name}.tif"
                write_pyramid(path, size, collage.mpp, bands(slide, source, collage), collage.jpeg_quality)
                for place, tile in enumerate(slide.tiles.tolist()):
                    places.writerow([name, place, source.classes[source.labels[tile]], source.names[tile]])
                about = {
                    "slide_id": name,
                    "path": f"slides/{path.name}",
                    "patient_id": name,
                    "grade": slide.grade,
                }
                manifest.append({**about, "site": site, "split": split})
                bar.advance()
    write_csv(out / "manifest.csv", list(manifest[0]), manifest)
    return len(manifest)


def main(arguments: Sequence[str] | None = None) -> int:
    default = Collage("")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("tiles", type=Path, help="folder of tiles, CLASS/*.jpg or *.png, square, of one size")
    parser.add_argument("out", type=Path, help="new folder for slides/, tiles.csv and manifest.csv")
    parser.add_argument(
        "--external", type=Path, metavar="FOLDER", help="tiles of another source, for external slides"
    )
    parser.add_argument(
        "--target", required=True, metavar="CLASS", help="class with the share that is the grade"
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=default.shares,
        metavar="X",
        help="share of the target's tiles by grade, lowest first, 0..1 (default: 0 0.1 0.2 0.3 0.4)",
    )
    for name, about in (
        ("train", "training slides"),
        ("test", "test slides"),
        ("external-slides", "external slides, with --external"),
        ("tiles-per-slide", "tiles of a slide"),
        ("train-tiles", "tiles of each class to build training slides from"),
        ("test-tiles", "tiles of each class to build test slides from"),
        ("redraw", "number of the draw, from 0; another one splits the tiles and builds all slides afresh"),
        ("jpeg-quality", "of the slides, 1..100"),
    ):
        field = {"external-slides": "external", "tiles-per-slide": "tiles"}.get(name, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}",
            type=int,
            default=getattr(default, field),
            metavar="N",
            help=f"{about} (default: %(default)s)",
        )
    parser.add_argument(
        "--concentration",
        type=float,
        default=1.0,
        metavar="X",
        help="of the Dirichlet draw of the other classes, above 0 (default: 1)",
    )
    parser.add_argument(
        "--mpp",
        type=float,
        default=1.0,
        metavar="X",
        help="spacing of the tiles, micrometres per pixel; nominal if it is not known (default: 1)",
    )
    given = parser.parse_args(arguments)
    try:
        collage = Collage(
            given.target,
            *(tuple(given.shares), given.train, given.test, given.external_slides, given.tiles_per_slide),
            *(
                given.train_tiles,
                given.test_tiles,
                given.concentration,
                given.redraw,
                given.mpp,
                given.jpeg_quality,
            ),
        )
        n_slides = make_collage(given.tiles, given.external, given.out, collage)
    except SlidetlError as error:
        print(f"make_collage: {error}", file=sys.stderr)
        return 1
    print(f"{n_slides} slides of {collage.tiles} tiles: {given.out / 'manifest.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
