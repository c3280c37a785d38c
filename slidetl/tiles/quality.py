"""Quality of tiles: pen, folds, air and fat from the thumbnail; focus from the pixels of every tile."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from slidetl.tiles.tissue import TissueMask, glass_rgb, is_dark_ground, is_stained, optical_density

# Ink is laid on in one film: over clear places its density (length of the optical density over the channels)
# varies within a window this wide, micrometres, by at most this share of it. Stained tissue varies by more.
_FILM_UM = 80.0
_FILM_SPREAD = 0.06
# Black ink: channels that differ by at most this share.
_BLACK_SPREAD = 0.3
# Least density of a film, by its colour: blue and red are colours of stains, too, and paler there.
_FILM_DENSITY = {"black": 0.8, "green": 0.4, "blue": 0.7, "red": 0.8}
# Pixels touching such a film, and so dense, are its continuation over tissue, which mixes their colours.
_INK_ON_TISSUE = 0.85
# A film shows over so many square micrometres; a stroke is a quarter of a millimetre wide, and as long.
_FILM_UM2 = 100.0**2
_STROKE_UM2 = 250.0**2

# Blue and green ink take more red light away than green, by this factor; tissue in H&E or Sirius red takes at
# most 0.85 times as much, averaged over a few nuclei (docs/design/quality.md).
_COOL = 1.2
_COOL_UM = 16.0  # averaged over so much, a nucleus and a fringe of colour are gone
_COOL_UM2 = 60.0**2  # the least piece of such ink
_COOL_DENSITY = 0.15
# Reach of ink over tissue from there, followed by its colour.
_COOL_REACH_UM = 200.0
# If the stain itself is blue or green (trichrome, haematoxylin alone), this colour is no evidence: at least
# so much of the stained area must be warm, and so much of the cool area may be scattered in small pieces.
_WARM_SHARE = 0.5
_SCATTERED_SHARE = 0.2

# Two layers absorb twice. In units of the density above which a tenth of the tissue lies: too dense for flat
# tissue, and dense enough for the rest of the fold beside it.
_FOLD_CORE = 1.3
_FOLD_REST = 1.15
# A fold is wider and longer than a nucleus or a vessel full of blood.
_FOLD_UM2 = 120.0**2

# Rows processed at a time, to bound memory.
_BAND_ROWS = 512

# Detail and structure, micrometres: resolved by a scanner in focus, and surviving its defocus.
_DETAIL_UM = 1.0
_STRUCTURE_FACTOR = 4
# Mean square difference of grey levels from noise and compression, without any structure.
_NOISE_POWER = 4.0


def measure_quality(
    thumbnail_rgb: NDArray[np.uint8],
    mpp: float,
    tissue_mask: NDArray[np.bool_],
    background_rgb: tuple[int, int, int],
) -> dict[str, TissueMask]:
    """Detects pen marks, folds and air on the thumbnail of a slide.

    *Pen*: blue, green, black and red ink. Colour detects blue and green ink on slides with a stain of neither
    colour (H&E, Sirius red), over tissue as well. Other ink is a film, dense, even, and of its own colour
    beside the tissue; from there a stroke is followed over tissue by density alone, since the colours mix.
    This misses ink paler than stains of its colour (density below 0.7 for blue, 0.8 for red), and strokes
    over nothing but tissue unless their colour still shows. A fold wider than 200 micrometres through solid
    collagen can pass for ink of the collagen's colour (blue on Masson's trichrome, red on Sirius red). See
    docs/design/quality.md.

    *Folds*: tissue denser than this slide's flat tissue. Doubled pale tissue is not, so this finds about 70 %
    of the tissue in a fold. The adaptive threshold follows Kothari et al. 2013 (IEEE JBHI 17:813); density
    replaces their saturation minus intensity, to hold for any stain.

    *Air*: areas within the tissue as clear as glass. Dark grounds get empty masks.

    ``tools/bench_quality.py`` prints the share of ink and folds found, by stain, and of false alarms.

    Args:
        thumbnail_rgb: ``[h, w, 3] uint8``, the whole slide.
        mpp: its spacing, micrometres per pixel.
        tissue_mask: ``[h, w] bool``, its tissue including air, from
            :func:`~slidetl.tiles.tissue.find_tissue`.
        background_rgb: colour of unscanned glass, 0..255.

    Returns:
        A mask ``[h, w] bool`` each: ``pen``; ``fold``, doubled tissue; ``air`` (alveoli, vessels, fat,
        tears).
    """
    # Imported here: `slidetl --help` need not pay this half second.
    from scipy import ndimage

    if is_dark_ground(thumbnail_rgb) or not tissue_mask.any():
        return {name: TissueMask(np.zeros(tissue_mask.shape, bool), mpp) for name in ("pen", "fold", "air")}
    glass = glass_rgb(thumbnail_rgb, background_rgb)
    is_dense = is_stained(optical_density(thumbnail_rgb, glass))
    # Nuclei and noise are smaller than pen marks and folds.
    smooth = ndimage.uniform_filter(thumbnail_rgb, (3, 3, 1))
    density = optical_density(smooth, glass)

    pen = np.zeros(tissue_mask.shape, bool)
    for film, stroke in _inks(smooth, glass, density, mpp):
        pen |= _touched(_pieces(stroke, _STROKE_UM2, mpp), _pieces(film, _FILM_UM2, mpp))
    pen |= _cool_ink(thumbnail_rgb, glass, mpp)
    # A stroke fades at its edge, its colour mixed with the ground.
    pen = ndimage.binary_dilation(pen, np.ones((3, 3)), iterations=max(1, round(32 / mpp)))

    flat = density[is_dense & tissue_mask & ~pen]
    fold = np.zeros_like(pen)
    if flat.size:
        relative = density / np.percentile(flat, 90)
        relative[~tissue_mask | pen] = 0
        core = _pieces(relative > _FOLD_CORE, _FOLD_UM2, mpp)
        fold = ndimage.binary_propagation(core, np.ones((3, 3)), mask=relative > _FOLD_REST)
        # Smoothing has mixed its edge with the flat tissue, or the air, beside it.
        fold = np.asarray(ndimage.binary_dilation(fold, np.ones((3, 3))) & tissue_mask & ~pen)
    air = tissue_mask & ~is_dense & ~pen
    return {name: TissueMask(mask, mpp) for name, mask in (("pen", pen), ("fold", fold), ("air", air))}


def focus_of(rgb: NDArray[np.uint8], mpp: float) -> float:
    """Measures sharpness: 0.1 to 0.6 in focus, below 0.08 when blurred by 2 micrometres, on any stain.

    Brenner's gradient (Brenner et al. 1976, J Histochem Cytochem 24:100), the mean square difference of
    pixels 1 micrometre (at least a pixel) apart, divided by the same at four times this step: blur removes
    fine differences before coarse ones. The quotient does not depend on the strength of the stain; tiles
    without structure are near 0, since noise is discounted. Compare tiles of one spacing only: a pixel above
    1 micrometre hides slight blur.

    Args:
        rgb: ``[h, w, 3] uint8``.
        mpp: its spacing, micrometres per pixel.

    Returns:
        0 or more; 0 for a tile less than 8 steps wide.
    """
    step = max(1, round(_DETAIL_UM / mpp))
    if min(rgb.shape[:2]) < 2 * _STRUCTURE_FACTOR * step:
        return 0.0
    # Channel by channel: a mean over the last axis takes five times as long.
    grey = (rgb[..., 0].astype(np.float32) + rgb[..., 1] + rgb[..., 2]) / np.float32(3)
    detail = max(_power(grey, step) - _NOISE_POWER, 0.0)
    return detail / (_power(grey, _STRUCTURE_FACTOR * step) + _NOISE_POWER)


def _power(grey: NDArray[np.float32], step: int) -> float:
    """Computes the mean square difference of pixels ``step`` apart, over both axes."""
    down = grey[step:] - grey[:-step]
    right = grey[:, step:] - grey[:, :-step]
    return float((np.vdot(down, down) / down.size + np.vdot(right, right) / right.size) / 2)


def _cool_ink(rgb: NDArray[np.uint8], glass: NDArray[np.float64], mpp: float) -> NDArray[np.bool_]:
    """Marks blue and green ink by its colour, if the stain of the slide has neither.

    It compares the optical densities of red and green light: their quotient does not depend on the thickness
    of the ink or the tissue, and ink over tissue lies between both.
    """
    from scipy import ndimage

    width = max(3, round(_COOL_UM / mpp))
    smooth = ndimage.uniform_filter(rgb, (width, width, 1))
    density = optical_density(smooth, glass)
    is_dense = is_stained(density)
    table = np.log10((glass + 1) / (np.arange(256.0)[:, None] + 1)).clip(0).astype(np.float32)
    quotient = (table[:, :1] / (table[:, 1] + np.float32(1e-6)))[smooth[..., 0], smooth[..., 1]]
    is_warm, is_cool = is_dense & (quotient < 1), is_dense & (quotient > _COOL)
    nothing = np.zeros_like(is_dense)
    if not is_cool.any() or is_warm.sum() < _WARM_SHARE * is_dense.sum():
        return nothing
    ink = _pieces(is_cool & (density > _COOL_DENSITY), _COOL_UM2, mpp)
    square = np.ones((3, 3))
    scattered = is_cool & ~ndimage.binary_dilation(ink, square, iterations=2)
    if not ink.any() or scattered.sum() > _SCATTERED_SHARE * is_cool.sum():
        return nothing
    reach = ink | (is_dense & (quotient > (np.median(quotient[is_warm]) + _COOL) / 2))
    return np.asarray(
        ndimage.binary_dilation(ink, square, iterations=max(1, round(_COOL_REACH_UM / mpp)), mask=reach)
    )


def _inks(
    rgb: NDArray[np.uint8], glass: NDArray[np.float64], density: NDArray[np.float32], mpp: float
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Yields for each ink the mask of its film, and the same with possible rests of a stroke."""
    from scipy import ndimage

    table = np.log10((glass + 1) / (np.arange(256.0)[:, None] + 1)).clip(0).astype(np.float32)
    width = max(3, round(_FILM_UM / mpp))
    coloured = {name: np.zeros(density.shape, bool) for name in _FILM_DENSITY}
    is_even = np.zeros(density.shape, bool)
    for top in range(0, len(rgb), _BAND_ROWS):
        rows = slice(top, top + _BAND_ROWS)
        for name, mask in _colours(table, rgb[rows]).items():
            coloured[name][rows] = mask
        around = density[max(top - width, 0) : top + _BAND_ROWS + width]
        mean = ndimage.uniform_filter(around, width)
        variance = ndimage.uniform_filter(around * around, width) - mean * mean
        inner = slice(min(top, width), min(top, width) + _BAND_ROWS)
        is_even[rows] = (variance < (_FILM_SPREAD * mean) ** 2)[inner][: len(is_even[rows])]
    for name, mask in coloured.items():
        film = mask & (density > _FILM_DENSITY[name])
        yield film & is_even, film | (density > _INK_ON_TISSUE)


def _colours(table: NDArray[np.float32], rgb: NDArray[np.uint8]) -> dict[str, NDArray[np.bool_]]:
    """Marks pixels of the colour of each ink, at any density, by the direction of their optical density."""
    red, green, blue = (table[:, channel][rgb[..., channel]] for channel in range(3))
    highest, lowest = (pick(pick(red, green), blue) for pick in (np.maximum, np.minimum))
    is_black = highest - lowest < _BLACK_SPREAD * highest
    return {
        "black": is_black,
        "green": (red > 1.25 * green) & (blue > 1.1 * green) & ~is_black,
        "blue": (red > 1.2 * green) & (green > 1.05 * blue) & ~is_black,
        "red": (green > 3 * red) & (blue > 0.45 * green),
    }


def _touched(mask: NDArray[np.bool_], seeds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keeps the connected parts of a mask with a seed."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    is_touched = np.zeros(count + 1, bool)
    is_touched[labels[seeds]] = True
    is_touched[0] = False
    return np.asarray(is_touched[labels])


def _pieces(mask: NDArray[np.bool_], least_um2: float, mpp: float) -> NDArray[np.bool_]:
    """Keeps the parts of a mask larger than a line or a speck."""
    from scipy import ndimage

    solid = ndimage.binary_opening(mask, np.ones((2, 2)))
    labels, count = ndimage.label(solid, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    is_kept = areas >= max(4, math.ceil(least_um2 / mpp**2))
    is_kept[0] = False
    return np.asarray(is_kept[labels])
