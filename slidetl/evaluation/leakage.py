"""Slides that look alike: the same section scanned twice in one frame, or copied under another name.

What was cropped or moved by some per cent is not found by its looks: docs/design/compare.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError

# Two scans of one section correlate above this. Small round pictures (eyes at 28 px) do so by chance, one
# pair in 5,000; those of tissue do not: docs/design/compare.md.
ALIKE = 0.95

_SIDE_PX = 32
_BLOCK = 512  # rows of the correlation at once: 512 x 2,000 x 8 symmetries are 65 MB


def near_duplicates(
    thumbnails: Sequence[NDArray[np.uint8]], threshold: float = ALIKE
) -> list[tuple[int, int, float]]:
    """Finds pairs of pictures that show the same thing, turned or mirrored or stained otherwise.

    Each is reduced to 32 x 32 grey pixels, brightness and contrast taken out. What all of the study's
    pictures have in common (a round field of view, say) is taken out too, where there are enough of them,
    since it would make all of them alike.

    Args:
        thumbnails: ``[h, w, 3] uint8`` each, of any size.
        threshold: least correlation, -1..1, over the best of the eight symmetries of the square.

    Returns:
        ``(i, j, correlation)`` with ``i < j``, most alike first.

    Raises:
        UsageError: ``threshold`` is not above 0 and up to 1.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"the least correlation must be above 0 and up to 1, not {threshold}")
    if len(thumbnails) < 2:
        return []
    grey = np.stack([_grey(thumbnail) for thumbnail in thumbnails])
    grey = _normalised(grey).reshape(grey.shape)
    if len(grey) >= 20:  # of fewer, the mean is too much like each of them
        grey = grey - _symmetric_mean(grey)
    flat = _normalised(grey)
    turned = [_normalised(_turn(grey, symmetry)) for symmetry in range(8)]
    found: list[tuple[int, int, float]] = []
    for start in range(0, len(flat), _BLOCK):
        block = flat[start : start + _BLOCK]
        best = np.max([block @ other.T for other in turned], axis=0)  # [block, n]
        for row, column in np.argwhere(best >= threshold):
            if start + row < column:
                found.append((int(start + row), int(column), float(best[row, column])))
    return sorted(found, key=lambda pair: -pair[2])


def _grey(thumbnail: NDArray[np.uint8]) -> NDArray[np.float32]:
    from PIL import Image

    picture = Image.fromarray(thumbnail).convert("L")
    return np.asarray(picture.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BOX), np.float32)


def _turn(pictures: NDArray[np.float32], symmetry: int) -> NDArray[np.float32]:
    turned = np.rot90(pictures, symmetry % 4, axes=(1, 2))
    return turned[:, :, ::-1] if symmetry >= 4 else turned


def _symmetric_mean(pictures: NDArray[np.float32]) -> NDArray[Any]:
    """The mean picture, the same for each of its symmetries, so that taking it out commutes with them."""
    mean = pictures.mean(0, keepdims=True)
    return np.asarray(np.mean([_turn(mean, symmetry) for symmetry in range(8)], axis=0))


def _normalised(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = pictures.reshape(len(pictures), -1)
    flat = flat - flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    # A picture of one colour is like nothing, not like every other one.
    return np.asarray(np.divide(flat, length, out=np.zeros_like(flat), where=length > 1e-3))
