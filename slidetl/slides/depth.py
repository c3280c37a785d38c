"""Samples of more than 8 bits: the value of white, and their reduction to 8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Windows across and down, and their side, to find the scale.
_SAMPLES_ACROSS = 8
_SAMPLE_PX = 256
# White glass is at least this share of the full scale of the camera's depth.
_NEAR_FULL = 0.75


def sample_windows(size_px: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yields windows ``(x, y, width, height)`` spread over a picture, to find its scale."""
    side = min(_SAMPLE_PX, size_px[0]), min(_SAMPLE_PX, size_px[1])
    xs, ys = (
        np.unique(np.linspace(0, length - part, _SAMPLES_ACROSS).astype(int)).tolist()
        for length, part in zip(size_px, side, strict=True)
    )
    return ((x, y, *side) for y in ys for x in xs)


def full_of(parts: list[NDArray[Any]]) -> tuple[float, str]:
    """Returns the white value among samples of 16 bits, and a note of it.

    It is the full scale of a camera's depth, or the 99.9th percentile (without hot pixels) if far below.
    """
    highest = max(float(np.percentile(part, 99.9)) for part in parts)
    bits = next(bits for bits in (8, 10, 12, 14, 16) if highest < 2**bits)
    if highest >= _NEAR_FULL * (2**bits - 1) or highest < 1:
        return 2.0**bits - 1, f"samples of 16 bits hold {bits}, and are scaled to 8"
    return highest, f"samples of 16 bits go up to {highest:.0f}, and are scaled to 8 bits"


def to_8_bits(samples: NDArray[Any], full: NDArray[np.float32] | float) -> NDArray[np.uint8]:
    """Scales samples to 8 bits; ``full`` is the value of white, of all or of each in the last axis."""
    scale = np.float32(255) / np.asarray(full, np.float32)
    return np.asarray((samples * scale + np.float32(0.5)).clip(0, 255).astype(np.uint8))
