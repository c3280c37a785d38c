"""Augmentation of tiles, by albumentations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError


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
        pipeline = _pipeline(self)
        pipeline.set_random_seed(seed)
        return np.stack([pipeline(image=tile)["image"] for tile in tiles])


@lru_cache
def _pipeline(augmentation: Augmentation) -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask its server for news
    import albumentations

    steps: list[Any] = []
    if augmentation.flips:
        steps.append(albumentations.D4(p=1))
    changes = {
        name: (1 - getattr(augmentation, name), 1 + getattr(augmentation, name))
        for name in ("brightness", "contrast", "saturation")
    }
    if any(low < high for low, high in changes.values()):
        steps.append(albumentations.ColorJitter(**changes, hue=(0, 0), p=0.8))
    return albumentations.Compose(steps)
