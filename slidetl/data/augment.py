"""Augmentation of tiles, by albumentations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Augmentation:
    """What may change in a tile without changing its grade.

    Hue is left alone on purpose: in trichrome and Sirius red the hue *is* the collagen.

    Attributes:
        flips: the eight symmetries of the square; tissue has no upright position.
        brightness: greatest relative change of brightness, 0..1.
        contrast: greatest relative change of contrast, 0..1.
        saturation: greatest relative change of saturation, 0..1; the strength of a stain varies.
    """

    flips: bool = True
    brightness: float = 0.15
    contrast: float = 0.15
    saturation: float = 0.15

    def __call__(self, tiles: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """Augments each tile by itself.

        Args:
            tiles: ``[N, S, S, 3] uint8``.
            seed: the same seed gives the same result.
        """
        self._pipeline.set_random_seed(seed)
        return np.stack([self._pipeline(image=tile)["image"] for tile in tiles])

    @cached_property
    def _pipeline(self) -> Any:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask its server for news
        import albumentations

        steps: list[Any] = []
        if self.flips:
            steps.append(albumentations.D4(p=1))
        if self.brightness or self.contrast or self.saturation:
            steps.append(
                albumentations.ColorJitter(
                    brightness=(1 - self.brightness, 1 + self.brightness),
                    contrast=(1 - self.contrast, 1 + self.contrast),
                    saturation=(1 - self.saturation, 1 + self.saturation),
                    hue=(0, 0),
                    p=0.8,
                )
            )
        return albumentations.Compose(steps)
