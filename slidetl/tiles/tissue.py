"""Finds the tissue of a slide: a low-resolution image in, a mask out. No file, no slide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slidetl.slides.opencv import opencv
from slidetl.tiles.grid import TileSpec

# Greatest width of a mask pixel, least number of mask pixels across a tile, greatest side of a mask.
_MASK_MPP = 16.0
_PIXELS_PER_TILE = 4
_MAX_SIDE_PX = 4096

# A human alveolus is about 200 um wide (Ochs 2004), an inflated one up to 300, more from corner to corner.
# Air up to that width between septa belongs to the lung; a fleck smaller than one alveolus is dust.
_AIR_UM = 360.0
_FLECK_UM = 200.0
# In a field of view not much wider than an alveolus, pieces with this share of the area are no dust.
_FLECK_SHARE = 0.1

# Range of the threshold on optical density: below is the unevenness of clean glass, above is no longer
# pale.
_DENSITY_RANGE = (0.04, 0.14)
# The same for light on a dark ground, as a share of full scale.
_LIGHT_RANGE = (0.02, 0.14)

# Fill is grey within so many grey levels; black up to this one, in pieces of so many pixels or more.
_GREY_CHROMA = 2
_BLACK = 8
_BLACK_LEAST_PX = 4
_GREYER_GLASS = 250

# Scanned glass is at least this share of unscanned glass in brightness, and nearly grey (in grey levels).
_GLASS_SHARE = 0.76
_GLASS_CHROMA = 10
# Glass counts only if it covers so much of the image.
_GLASS_LEAST = 0.05


@dataclass(frozen=True, eq=False)
class TissueMask:
    """A mask over a slide: its tissue, or another part.

    Attributes:
        mask: ``[h, w] bool``; its upper-left corner is the slide's.
        mpp: width of a mask pixel, micrometres.
    """

    mask: NDArray[np.bool_]
    mpp: float

    def fraction(
        self,
        origins_level0: NDArray[np.int32],
        extent_level0: tuple[float, float],
        mpp_level0: tuple[float, float],
    ) -> NDArray[np.float32]:
        """Computes the share of tissue in each tile: the exact mean of the mask over the tile's area.

        Args:
            origins_level0: ``[N, 2]`` upper-left corners ``(x, y)``, level-0 pixels.
            extent_level0: size of every tile ``(x, y)``, level-0 pixels.
            mpp_level0: spacing of level 0 along x and y, micrometres per pixel.

        Returns:
            ``[N] float32``, 0..1. Areas outside the mask count as no tissue.
        """
        return area_means(self.mask, self.mpp, origins_level0, extent_level0, mpp_level0)


def area_means(
    values: NDArray[np.bool_] | NDArray[np.float32],
    mpp: float,
    origins_level0: NDArray[np.int32],
    extent_level0: tuple[float, float],
    mpp_level0: tuple[float, float],
) -> NDArray[np.float32]:
    """Computes the exact mean of an image ``[h, w]`` of shares, 0..1, at ``mpp`` over the area of each tile.

    The other arguments, and the result, are those of :meth:`TissueMask.fraction`.
    """
    kind = np.int32 if values.dtype == bool else np.float64
    integral = np.zeros((values.shape[0] + 1, values.shape[1] + 1), kind)
    integral[1:, 1:] = values.cumsum(0, dtype=kind).cumsum(1, dtype=kind)
    scale = np.asarray(mpp_level0) / mpp
    low = origins_level0 * scale
    high = (origins_level0 + np.asarray(extent_level0)) * scale
    inside = (
        _interpolate(integral, high[:, 0], high[:, 1])
        - _interpolate(integral, low[:, 0], high[:, 1])
        - _interpolate(integral, high[:, 0], low[:, 1])
        + _interpolate(integral, low[:, 0], low[:, 1])
    )
    area = extent_level0[0] * scale[0] * extent_level0[1] * scale[1]
    return np.asarray(np.clip(inside / area, 0, 1), dtype=np.float32)


def thumbnail_mpp(size_level0: tuple[int, int], mpp_level0: tuple[float, float], spec: TileSpec) -> float:
    """Chooses the spacing of the image for the search for tissue, micrometres per pixel.

    16, or finer for tiles of at least 4 pixels; coarser for an image of at most 4096 pixels a side, or if the
    slide itself is coarser.
    """
    wanted = min(_MASK_MPP, spec.tile_size_px * spec.mpp / _PIXELS_PER_TILE)
    largest = max(size * mpp for size, mpp in zip(size_level0, mpp_level0, strict=True))
    return max(wanted, largest / _MAX_SIDE_PX, *mpp_level0)


def mask_size(size_level0: tuple[int, int], mpp_level0: tuple[float, float], mpp: float) -> tuple[int, int]:
    """Computes width and height of an image of a whole slide at a spacing, micrometres per pixel."""
    # The allowance keeps an exactly fitting size from growing by one when the product rounds.
    width, height = (math.ceil(s * m / mpp - 1e-6) for s, m in zip(size_level0, mpp_level0, strict=True))
    return width, height


def blank_fill(
    thumbnail_rgb: NDArray[np.uint8],
    mpp: float,
    background_rgb: tuple[int, int, int],
    missing: Callable[[], NDArray[np.bool_] | None] = lambda: None,
) -> tuple[NDArray[np.uint8], tuple[int, int, int], NDArray[np.bool_]]:
    """Finds areas without data, and paints those similar to tissue like the empty ground.

    They are unscanned or missing in the file, by the reader's account, or without variation, as converters
    fill unscanned areas: black, grey, or of another colour from a corner of the image on. Clean glass stays,
    and so does the black ground of fluorescence: its signal fades into it, while fill ends abruptly.

    Args:
        thumbnail_rgb: ``[h, w, 3] uint8``, the whole slide.
        mpp: its spacing, micrometres per pixel.
        background_rgb: colour of unscanned areas, 0..255.
        missing: returns the unscanned areas, as :meth:`slidetl.slides.base.Slide.missing`; called if needed.

    Returns:
        The image for the search for tissue, the given one if there is no fill to paint; the colour of its
        empty ground, 0..255; and the areas without data, ``[h, w] bool``.
    """
    cv2 = opencv()
    square = np.ones((3, 3), np.uint8)
    red, green, blue = cv2.split(thumbnail_rgb)
    brightest, darkest = (np.asarray(f(f(red, green), blue)) for f in (np.maximum, np.minimum))
    is_bright = min(background_rgb) > 128
    is_background = np.zeros(red.shape, bool)
    if is_bright:
        pairs = zip((red, green, blue), background_rgb, strict=True)
        is_background = np.logical_and.reduce([channel == value for channel, value in pairs])
    chroma = brightest - darkest
    is_grey = ~is_background & (chroma <= _GREY_CHROMA)
    is_even = cv2.dilate(brightest, square) - cv2.erode(brightest, square) <= 1
    # The level of clean glass, about as in `glass_rgb`; scanned glass is seldom even.
    is_glass = ~is_background & (chroma <= _GLASS_CHROMA) & (brightest >= _GLASS_SHARE * 255)
    is_scanned = is_glass & ~(is_grey & is_even)
    is_glass = is_scanned if is_scanned.mean() > _GLASS_LEAST / 5 else is_glass
    above = np.cumsum(np.bincount(brightest[is_glass], minlength=256)[::-1])[::-1]
    glass = int(np.flatnonzero(above >= 0.1 * above[0])[-1]) if above[0] else 255
    pale = (glass + 1) * 10 ** (-_DENSITY_RANGE[0] / math.sqrt(3)) - 1
    is_dense = brightest < pale
    fleck_px = (_FLECK_UM / mpp) ** 2
    painted = _large(is_grey & is_even & (brightest <= _BLACK), _BLACK_LEAST_PX)
    painted |= _large(is_grey & is_even & is_dense & (brightest > _BLACK), fleck_px)
    # Of another colour: exactly one, from a corner of the image on, as nothing real is.
    same = np.all(cv2.dilate(thumbnail_rgb, square) == cv2.erode(thumbnail_rgb, square), axis=2)
    painted |= _from_corners(same & ~is_grey & ~is_background & (thumbnail_rgb.mean(2) < pale), fleck_px)
    # Their edge, and the pixels mixing it with its neighbours.
    painted = cv2.dilate(painted.view(np.uint8), square, iterations=2).view(bool) & ~is_background
    if not painted.any() and not is_background.any():
        return thumbnail_rgb, background_rgb, painted
    rest = ~(painted | is_background)
    if painted.any() and is_dark_ground(thumbnail_rgb):
        ring = rest & cv2.dilate(painted.view(np.uint8), square, iterations=2).view(bool)
        if not ring.any() or np.median(brightest[ring]) < 128 or np.median(darkest[rest]) < 64:
            painted[:] = False
            rest = ~is_background
    if rest.any() and np.median(brightest[rest]) < 64:
        painted, ground = is_background, (0, 0, 0)
    else:
        ground = background_rgb if is_bright else (255, 255, 255)
    if painted.any():
        thumbnail_rgb = thumbnail_rgb.copy()
        thumbnail_rgb[painted] = ground
    without_data = painted.copy()
    if is_background.any():
        not_there = missing()
        if not_there is not None:
            without_data |= not_there & is_background
        # Even white is fill, too, if glass is less white.
        if glass <= _GREYER_GLASS and is_glass.mean() >= _GLASS_LEAST:
            without_data |= _large(is_background & is_even, fleck_px)
    return thumbnail_rgb, ground, without_data


def _from_corners(is_flat: NDArray[np.bool_], least_px: float) -> NDArray[np.bool_]:
    """Keeps the pieces of so many pixels or more with a corner of the image; none if all of it is one."""
    corners = is_flat[[0, 0, -1, -1], [0, -1, 0, -1]]
    if not corners.any() or is_flat.all():
        return np.zeros_like(is_flat)
    _, labels = opencv().connectedComponents(is_flat.view(np.uint8))
    numbers = np.unique(labels[[0, 0, -1, -1], [0, -1, 0, -1]][corners])
    return _large(np.isin(labels, numbers), least_px)


def _large(is_flat: NDArray[np.bool_], least_px: float) -> NDArray[np.bool_]:
    """Keeps the pieces of so many pixels or more, or of a tenth of the image."""
    if not is_flat.any():
        return is_flat
    cv2 = opencv()
    _, labels, about, _ = cv2.connectedComponentsWithStats(is_flat.view(np.uint8))
    least = min(least_px, max(_FLECK_SHARE * is_flat.size, _BLACK_LEAST_PX))
    is_kept = about[:, cv2.CC_STAT_AREA] >= least
    is_kept[0] = False
    return np.asarray(is_kept[labels])


def find_tissue(
    thumbnail_rgb: NDArray[np.uint8], mpp: float, background_rgb: tuple[int, int, int]
) -> TissueMask:
    """Separates tissue from glass by optical density, for any stain.

    It compares the optical density of each pixel against the slide's own glass with Otsu's threshold (1979)
    on the logarithm of the density, kept within bounds so as not to split an image without glass or without
    tissue. Air spaces up to 360 um across are closed, since lung is mostly air; flecks smaller than an
    alveolus are dropped. On a dark ground (fluorescence) light replaces density.

    Args:
        thumbnail_rgb: ``[h, w, 3] uint8``.
        mpp: its spacing, micrometres per pixel.
        background_rgb: colour of unscanned glass, 0..255.

    Returns:
        The mask, ``[h, w]``, at ``mpp``.
    """
    # Imported here: `slidetl --help` need not pay this half second.
    from scipy import ndimage

    if is_dark_ground(thumbnail_rgb):
        signal = _light(thumbnail_rgb)
        # The last pixels may cover some of the area beyond the slide, which is bright.
        signal[-1] = signal[max(len(signal) - 2, 0)]
        signal[:, -1] = signal[:, max(signal.shape[1] - 2, 0)]
        mask = signal > _threshold(signal, _LIGHT_RANGE)
    else:
        mask = is_stained(optical_density(thumbnail_rgb, glass_rgb(thumbnail_rgb, background_rgb)))
    # Closing air spaces would join lone pixels of noise to a web; pixels of a septum have neighbours.
    mask &= ndimage.uniform_filter(mask.astype(np.float32), size=3) > 2.5 / 9
    mask = _close(mask, round(_AIR_UM / 2 / mpp))

    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    is_kept = areas >= min(math.pi / 4 * (_FLECK_UM / mpp) ** 2, _FLECK_SHARE * mask.size)
    is_kept[0] = False
    return TissueMask(is_kept[labels], mpp)


def is_dark_ground(thumbnail_rgb: NDArray[np.uint8]) -> bool:
    """Tells if the tissue shines on a dark ground (fluorescence), instead of absorbing light."""
    return bool(np.median(thumbnail_rgb.max(axis=2)) < 64)


def is_stained(density: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Marks the pixels of a whole slide denser than glass, by the threshold of :func:`find_tissue`."""
    return density > _threshold(density, _DENSITY_RANGE)


def _interpolate(
    integral: NDArray[np.int32] | NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Reads an integral image at fractional places: it is bilinear between its nodes, so this is exact."""
    rows, columns = integral.shape
    x, y = np.clip(x, 0, columns - 1), np.clip(y, 0, rows - 1)
    column = np.minimum(x.astype(np.intp), columns - 2)
    row = np.minimum(y.astype(np.intp), rows - 2)
    u, v = x - column, y - row
    upper = integral[row, column] * (1 - u) + integral[row, column + 1] * u
    lower = integral[row + 1, column] * (1 - u) + integral[row + 1, column + 1] * u
    return np.asarray(upper * (1 - v) + lower * v)


def glass_rgb(rgb: NDArray[np.uint8], background_rgb: tuple[int, int, int]) -> NDArray[np.float64]:
    """Finds the colour of clean glass on this slide: scanned glass is seldom the white of the metadata.

    It is the brightest of the colours nearly grey and nearly as bright as the unscanned background, except
    the background itself (it fills unscanned areas, and would hide the scanned glass beside them).
    """
    background = np.asarray(background_rgb)
    chroma = rgb.max(axis=2).astype(np.int16) - rgb.min(axis=2)
    is_glass = (rgb >= _GLASS_SHARE * background).all(axis=2) & (chroma <= _GLASS_CHROMA)
    is_glass &= (rgb != background).any(axis=2)
    if is_glass.mean() < _GLASS_LEAST:
        return background.astype(np.float64)
    glass = rgb[is_glass]
    brightness = glass.sum(axis=1, dtype=np.int32)
    return np.asarray(np.median(glass[brightness >= np.percentile(brightness, 90)], axis=0))


def optical_density(rgb: NDArray[np.uint8], glass: NDArray[np.float64]) -> NDArray[np.float32]:
    """Computes optical density against glass, its length over the channels; 0 if brighter than glass."""
    table = np.log10((glass + 1) / (np.arange(256.0)[:, None] + 1)).clip(0) ** 2
    squares = table.astype(np.float32)
    return np.asarray(np.sqrt(sum(squares[:, channel][rgb[..., channel]] for channel in range(3))))


def _light(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Computes the light above the dark ground, as a share of full scale."""
    brightest = rgb.max(axis=2)
    ground = np.percentile(brightest, 5)
    return np.asarray((brightest - np.float32(ground)).clip(0) / np.float32(255))


def _threshold(signal: NDArray[np.float32], bounds: tuple[float, float]) -> float:
    """Computes Otsu's threshold on the logarithm of a signal, within bounds.

    On a linear scale the best cut lies between pale tissue and stained tissue, many times denser, instead of
    beside the glass.
    """
    low, high = bounds[0] / 4, 2.0
    counts, edges = np.histogram(
        np.log(signal.clip(low, high)), bins=256, range=(math.log(low), math.log(high))
    )
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    moment = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment[:-1] / below - (moment[-1] - moment[:-1]) / above) ** 2
    if not np.any(between > 0):
        return bounds[1]
    best = float(np.exp(edges[1:-1][int(np.nanargmax(between))]))
    return min(max(best, bounds[0]), bounds[1])


def _close(mask: NDArray[np.bool_], radius_px: int) -> NDArray[np.bool_]:
    """Closes by an octagon, as if the image lay on an endless empty plane: its border adds no tissue.

    A square alone reaches half as far again along the diagonals, and leaves boxes around scatter beside the
    tissue.
    """
    from scipy import ndimage

    # These shares make the octagon regular.
    diamond = round(radius_px * (2 - math.sqrt(2)))
    square = 2 * (radius_px - diamond) + 1
    padded = np.pad(mask, radius_px)
    cross = ndimage.generate_binary_structure(2, 1)
    if diamond:
        padded = ndimage.binary_dilation(padded, cross, iterations=diamond)
    closed = ndimage.maximum_filter(padded.view(np.uint8), square)
    closed = ndimage.minimum_filter(closed, square, mode="constant").astype(bool)
    if diamond:
        closed = ndimage.binary_erosion(closed, cross, iterations=diamond)
    height, width = mask.shape
    return np.asarray(closed[radius_px : radius_px + height, radius_px : radius_px + width])
