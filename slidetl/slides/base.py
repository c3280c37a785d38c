"""What a slide is to the rest of slidetl: something readable at a physical spacing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SlideInfo:
    """What is known of a slide without reading its pixels.

    Attributes:
        path: the file (of several files, the one that was named).
        fingerprint: SHA-256 over the content of the slide, hexadecimal; it identifies the slide
            wherever the file lies.
        vendor: as the reader calls it, e.g. ``aperio``.
        size_level0: width and height, level-0 pixels.
        mpp_level0: spacing along x and y, micrometres per level-0 pixel.
        mpp_levels: nominal spacing of every pyramid level, finest first; for messages only.
        background_rgb: colour of glass that was not scanned, 0..255.
        objective_power: nominal magnification, where the file says so.
    """

    path: Path
    fingerprint: str
    vendor: str
    size_level0: tuple[int, int]
    mpp_level0: tuple[float, float]
    mpp_levels: tuple[float, ...]
    background_rgb: tuple[int, int, int]
    objective_power: float | None


class Slide(Protocol):
    """A slide that is open. Not shared between processes or threads: each opens its own."""

    @property
    def info(self) -> SlideInfo: ...

    def mpp_read(self, mpp: float, mpp_tolerance: float = 0.01) -> tuple[float, float]:
        """The spacing ``(x, y)`` of the pixels that :meth:`read` returns for ``mpp``.

        It is ``mpp`` itself, or that of a pyramid level which lies within the relative tolerance
        and is then read as it is.

        Raises:
            SpacingError: the slide is coarser than ``mpp``; it is never enlarged.
        """
        ...

    def read(
        self,
        origin_level0: tuple[int, int],
        size_px: tuple[int, int],
        mpp: float,
        mpp_tolerance: float = 0.01,
    ) -> NDArray[np.uint8]:
        """Reads a rectangle at a physical spacing, averaging areas when it is reduced.

        Args:
            origin_level0: upper-left corner ``(x, y)``, level-0 pixels.
            size_px: width and height of the result, pixels of :meth:`mpp_read` micrometres.
            mpp: spacing of the result, micrometres per pixel.
            mpp_tolerance: relative difference within which a level is read as it is.

        Returns:
            ``[height, width, 3] uint8`` RGB. What lies outside the slide, or was not scanned, has
            its background colour.

        Raises:
            SlideReadError: the region is damaged.
            SpacingError: the slide is coarser than ``mpp``.
        """
        ...

    def close(self) -> None:
        """Releases the file. Closing twice is harmless."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...
