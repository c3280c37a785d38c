"""Slides that look alike: the same section scanned twice, cropped, moved, or copied under another name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError

# Two scans of one section in one frame correlate above this. Small round pictures (eyes at 28 px) do so by
# chance, one pair in 5,000; pictures of tissue do not: docs/design/compare.md.
ALIKE = 0.95

# Least shared detail of two scans moved or cropped: 100 slides and 100 tiles, cut by up to a tenth on each
# side, all reach it; unrelated slides do not reach half of it: docs/design/compare.md.
SHARED_DETAIL = 0.65

_SIDE_PX = 32
_BLOCK = 512  # rows of the correlation at once: 512 x 2,000 x 8 symmetries are 65 MB
_ENOUGH = 20  # with fewer pictures the mean is too much like each of them
_SMALLEST_PX = 64  # smaller pictures lack detail
_LEAST_DETAIL = 0.2  # of a picture's standard deviation; tissue has 0.27 to 0.6, smooth blobs less than 0.2
_SIDE_CELLS = 64  # of the median picture, for registration
_SPECTRA_ALIKE = 0.6  # least likeness of spectra of registered pairs
_MOST_PAIRS = 100_000  # registered pairs, the most alike ones: seconds


def near_duplicates(
    thumbnails: Iterable[NDArray[np.uint8]], mpp: Sequence[float] | None = None, threshold: float = ALIKE
) -> list[tuple[int, int, float]]:
    """Finds pairs of pictures that show the same: turned or mirrored, stained otherwise, moved or cropped.

    In one frame each is reduced to 32 x 32 grey pixels, without brightness and contrast, and without the mean
    of the study's pictures (a round field of view, say) if there are enough of them, since it would make all
    of them alike. Correlated pairs are found.

    Pairs in different frames share detail: the highest cross-correlation of their band-passed grey values
    over all shifts, at one scale. Only pairs with like magnitudes of their spectra, which no shift changes,
    are registered. Pictures below 64 px, and pictures without detail, are found in one frame only.

    Args:
        thumbnails: ``[h, w, 3] uint8`` each, of any size. They are read twice, one after another, since
            those of a thousand slides are 6 GB.
        mpp: spacing of each, micrometres per pixel; by default equal for all.
        threshold: least correlation in one frame, above 0 and up to 1, over the best of the eight symmetries
            of the square.

    Returns:
        ``(i, j, correlation)`` with ``i < j``, most alike first.

    Raises:
        UsageError: ``threshold`` is out of range, or spacings do not fit.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"the least correlation must be above 0 and up to 1, not {threshold}")
    small, squares, sizes = [], [], []
    for thumbnail in thumbnails:
        small.append(_grey(thumbnail, (_SIDE_PX, _SIDE_PX)))
        squares.append(_grey(thumbnail, (_SIDE_CELLS, _SIDE_CELLS)))
        sizes.append(thumbnail.shape[:2])
    spacings = np.ones(len(small)) if mpp is None else np.asarray(mpp, np.float64)
    if spacings.shape != (len(small),) or not (spacings > 0).all():
        raise UsageError("expected a spacing above 0 for each thumbnail")
    if len(small) < 2:
        return []
    found = {(i, j): likeness for i, j, likeness in _in_one_frame(np.stack(small), threshold)}
    for i, j, likeness in _moved(thumbnails, squares, np.array(sizes), spacings):
        found.setdefault((i, j), likeness)
    pairs = [(i, j, likeness) for (i, j), likeness in found.items()]
    return sorted(pairs, key=lambda pair: (-pair[2], pair))


def _in_one_frame(grey: NDArray[np.float32], threshold: float) -> list[tuple[int, int, float]]:
    grey = _normalised(grey).reshape(grey.shape)
    if len(grey) >= _ENOUGH:
        grey = grey - _symmetric_mean(grey)
    return [(i, j, likeness) for i, j, likeness, _ in _alike(grey, threshold)]


def _moved(
    thumbnails: Iterable[NDArray[np.uint8]],
    squares: Sequence[NDArray[np.float32]],
    sizes: NDArray[np.int64],
    mpp: NDArray[np.float64],
) -> list[tuple[int, int, float]]:
    """Finds pairs with shared detail under some shift and symmetry, at one scale.

    Takes the thumbnails, each reduced to a square of grey cells, their heights and widths ``[n, 2]``, and
    their spacings ``[n]``.
    """
    import cv2
    from scipy import fft

    kept = np.flatnonzero(sizes.min(axis=1) >= _SMALLEST_PX).tolist()
    if len(kept) < 2:
        return []
    sides = (sizes.max(axis=1) * mpp)[kept]
    cell = max(float(np.median(sides)) / _SIDE_CELLS, float(sides.max()) / (2 * _SIDE_CELLS))  # micrometres
    shared = None
    if len(kept) >= _ENOUGH:
        shared = _symmetric_mean(_standardised(np.stack([squares[number] for number in kept])))[0]
    cells = np.maximum(4, np.rint(sizes * mpp[:, None] / cell)).astype(np.int64)[kept]
    detail = np.zeros((len(kept), cells.max(), cells.max()), np.float32)
    large = (thumbnail for thumbnail in thumbnails if min(thumbnail.shape[:2]) >= _SMALLEST_PX)
    for number, (thumbnail, (height, width)) in enumerate(zip(large, cells.tolist(), strict=True)):
        picture = _standardised(_grey(thumbnail, (width, height))[None])[0]
        if shared is not None:
            picture -= cv2.resize(shared, (width, height), interpolation=cv2.INTER_LINEAR)
        band = cv2.GaussianBlur(picture, (0, 0), 0.7) - cv2.GaussianBlur(picture, (0, 0), 3)
        length = float(np.linalg.norm(band))
        if length > _LEAST_DETAIL * np.sqrt(band.size):
            detail[number, :height, :width] = band / length
    side = fft.next_fast_len(2 * detail.shape[1], real=True)

    # No shift and no half turn changes the magnitudes of a spectrum.
    low = side // 10  # every second frequency, up to a fifth of them
    middle = slice(side // 2 - 2 * low, side // 2 + 2 * low + 1, 2)
    magnitudes = np.empty((len(detail), 2 * low + 1, 2 * low + 1), np.float32)
    for number, picture in enumerate(detail):
        whole = np.fft.fftshift(np.log(np.abs(fft.fft2(picture, s=(side, side))) + 1e-3)).astype(np.float32)
        magnitudes[number] = cv2.GaussianBlur(whole, (0, 0), 2)[middle, middle]
    least = -1.0
    if len(detail) >= _ENOUGH:
        magnitudes, least = magnitudes - _symmetric_mean(magnitudes), _SPECTRA_ALIKE
    candidates = sorted(_alike(magnitudes, least), key=lambda pair: -pair[2])[:_MOST_PAIRS]

    found = []
    spectra = [fft.rfft2(picture, s=(side, side)) for picture in detail]
    for i, j, _, symmetry in candidates:
        symmetries = range(8) if least < 0 else (symmetry, symmetry // 4 * 4 + (symmetry + 2) % 4)
        likeness = 0.0
        for each in symmetries:
            turned = fft.rfft2(_turn(detail[j : j + 1], each)[0], s=(side, side))
            likeness = max(likeness, float(fft.irfft2(spectra[i] * turned.conj(), s=(side, side)).max()))
        if likeness >= SHARED_DETAIL:
            found.append((kept[i], kept[j], likeness))
    return found


def _alike(pictures: NDArray[np.float32], threshold: float) -> list[tuple[int, int, float, int]]:
    """Finds correlated pairs of ``[n, s, s]``: ``(i, j, correlation, symmetry of j)`` with ``i < j``."""
    flat = _normalised(pictures)
    turned = [_normalised(_turn(pictures, symmetry)) for symmetry in range(8)]
    found: list[tuple[int, int, float, int]] = []
    for start in range(0, len(flat), _BLOCK):
        block = flat[start : start + _BLOCK]
        each = np.stack([block @ other.T for other in turned])  # [8, block, n]
        best = each.max(axis=0)
        for row, column in np.argwhere(best >= threshold):
            if start + row < column:
                symmetry = int(each[:, row, column].argmax())
                found.append((int(start + row), int(column), float(best[row, column]), symmetry))
    return found


def _grey(thumbnail: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.float32]:
    """Converts to grey; ``size`` is width and height, in pixels."""
    from PIL import Image

    picture = Image.fromarray(thumbnail).convert("L")
    return np.asarray(picture.resize(size, Image.Resampling.BOX), np.float32)


def _turn(pictures: NDArray[np.float32], symmetry: int) -> NDArray[np.float32]:
    turned = np.rot90(pictures, symmetry % 4, axes=(1, 2))
    return turned[:, :, ::-1] if symmetry >= 4 else turned


def _symmetric_mean(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the mean picture over all symmetries, so that its removal commutes with them."""
    mean = pictures.mean(0, keepdims=True)
    return np.asarray(np.mean([_turn(mean, symmetry) for symmetry in range(8)], axis=0))


def _standardised(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Removes brightness and contrast of each; a uniform picture becomes 0."""
    return _normalised(pictures).reshape(pictures.shape) * np.float32(np.sqrt(pictures[0].size))


def _normalised(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = pictures.reshape(len(pictures), -1)
    flat = flat - flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    # A uniform picture is like nothing, not like every other one.
    return np.asarray(np.divide(flat, length, out=np.zeros_like(flat), where=length > 1e-3))
