"""Draws ink and folds on synthetic slides, and prints how much of them slidetl finds, by stain.

Example::

    python tools/bench_quality.py
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from slidetl.synthetic.section import STAINS, LungSection, SiteAppearance, SyntheticSlide
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

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slides", type=int, default=6, help="of each stain")
    options = parser.parse_args(words)
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
