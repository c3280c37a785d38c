"""Augmentation of tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError
from slidetl.slides.opencv import opencv

_JITTERED = 0.8  # share of the tiles whose colours change
_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True)
class Augmentation:
    """Changes of a tile that leave its grade as it is.

    Hue is left alone on purpose: in trichrome and Sirius red the hue *is* the collagen. The changes of colour
    are those of torchvision's and albumentations' ``ColorJitter``, always in the order below and clipped once
    at the end: so they are one affine map of a pixel, which makes them several times faster.

    Attributes:
        flips: the eight symmetries of the square; tissue has no upright position.
        brightness: greatest relative change of brightness, 0..1.
        contrast: greatest relative change of contrast about the tile's mean grey, 0..1.
        saturation: greatest relative change of saturation, 0..1; the strength of a stain varies.
    """

    flips: bool = True
    brightness: float = 0.15
    contrast: float = 0.15
    saturation: float = 0.15

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"augmentation.{name} must be from 0 to below 1, not {getattr(self, name)}")

    def __call__(self, tiles: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """Augments each tile by itself.

        Args:
            tiles: ``[N, S, S, 3] uint8``.
            seed: the same seed gives the same result.
        """
        out = np.empty_like(tiles)
        for tile, change, target in zip(tiles, self.draw(len(tiles), seed), out, strict=True):
            self.apply(tile, change, target)
        return out

    def draw(self, n: int, seed: int) -> NDArray[np.float64]:
        """Draws the changes of ``n`` tiles, for :meth:`apply`.

        Returns:
            ``[n, 4]``: the symmetry, 0..7, then the factors of brightness, contrast and saturation.
        """
        rng = np.random.default_rng(seed)
        symmetries = rng.integers(8, size=n) if self.flips else np.zeros(n)
        greatest = np.array([self.brightness, self.contrast, self.saturation])
        factors = 1 + rng.uniform(-1, 1, (n, 3)) * greatest
        factors[rng.random(n) >= _JITTERED] = 1
        return np.column_stack([symmetries, factors])

    def apply(self, tile: NDArray[np.uint8], change: NDArray[np.float64], out: NDArray[np.uint8]) -> None:
        """Writes a tile ``[S, S, 3] uint8``, changed as :meth:`draw` said, into another; threads may."""
        cv2 = opencv()
        symmetry, (brightness, contrast, saturation) = int(change[0]), change[1:]
        if symmetry & 4:
            tile = cv2.transpose(tile)
        if symmetry & 3:
            tile = cv2.flip(tile, (symmetry & 3) - 2)
        if (change[1:] == 1).all():
            out[:] = tile
            return
        grey = _GREY @ cv2.mean(tile)[:3]
        matrix = np.empty((3, 4))
        matrix[:, :3] = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * _GREY)
        matrix[:, 3] = brightness * (1 - contrast) * grey
        cv2.transform(tile, matrix, dst=out)
