"""What spoils a tile: pen marks, folds, air and fat, seen from afar; and lost focus, seen close by.

Pen, folds and air are looked for on the thumbnail that :func:`slidetl.tissue.find_tissue` works on, so they
cost next to nothing; focus takes the pixels of every tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slidetl.tissue import TissueMask, glass_rgb, is_dark_ground, is_stained, optical_density

# Ink is denser than this (length of the optical density over the channels).
_INK_DENSITY = 0.35
# A colour that makes up more of the stained area is a stain (aniline blue, light green) and no ink ...
_STAIN_SHARE = 0.2
# ... but where it is denser in red light than collagen gets.
_INK_RED_DENSITY = 0.8
# Black ink: so dense in every channel, which differ by at most this share.
_BLACK_DENSITY = 0.55
_BLACK_SPREAD = 0.3
# A stroke covers at least so much, square micrometres: a quarter of a millimetre wide, and as long.
_STROKE_UM2 = 250.0**2

# Two layers take the light away twice. In units of the density above which a tenth of the tissue lies: what
# cannot be flat, and what may be the rest of the fold beside it.
_FOLD_CORE = 1.4
_FOLD_REST = 1.15
# A fold is wider and longer than a nucleus or a vessel full of blood.
_FOLD_UM2 = 120.0**2

# Rows worked on at a time, which bounds memory.
_BAND_ROWS = 512

# Detail and structure, micrometres: what a scanner in focus resolves, and what survives its defocus.
_DETAIL_UM = 1.0
_STRUCTURE_FACTOR = 4
# Mean square difference of grey levels that noise and compression make where there is nothing to see.
_NOISE_POWER = 4.0


@dataclass(frozen=True, eq=False)
class QualityMaps:
    """What spoils a slide, seen from afar. All ``[h, w] bool``, in the frame of the thumbnail.

    Attributes:
        pen: ink on the slide.
        fold: tissue that lies double.
        air: holes within the tissue: alveoli, vessels, fat, tears.
        mpp: width of a pixel, micrometres.
    """

    pen: NDArray[np.bool_]
    fold: NDArray[np.bool_]
    air: NDArray[np.bool_]
    mpp: float

    def fractions(
        self,
        origins_level0: NDArray[np.int32],
        extent_level0: tuple[float, float],
        mpp_level0: tuple[float, float],
    ) -> dict[str, NDArray[np.float32]]:
        """The share of each tile that is spoilt, ``[N] float32`` in 0..1, by ``pen``, ``fold`` and ``air``.

        Args:
            origins_level0: ``[N, 2]`` upper-left corners ``(x, y)``, level-0 pixels.
            extent_level0: size of every tile ``(x, y)``, level-0 pixels.
            mpp_level0: spacing of level 0 along x and y, micrometres per pixel.
        """
        maps = {"pen": self.pen, "fold": self.fold, "air": self.air}
        return {
            name: TissueMask(mask, self.mpp).fraction(origins_level0, extent_level0, mpp_level0)
            for name, mask in maps.items()
        }


def measure_quality(
    thumbnail_rgb: NDArray[np.uint8],
    mpp: float,
    tissue_mask: NDArray[np.bool_],
    background_rgb: tuple[int, int, int],
) -> QualityMaps:
    """Looks for pen marks, folds and air on a slide seen from afar.

    *Pen*: blue, green and black ink, by the direction of its optical density: no histological stain is black
    or, Goldner's trichrome apart, green; and blue ink takes more red light than green, unlike haematoxylin.
    A colour that dominates the slide is taken for its stain, so pale blue ink on Masson's trichrome goes
    unseen; red ink is not told from eosin or Sirius red. *Folds*: tissue denser than flat tissue of this
    slide gets. The idea of an adaptive threshold on colour is that of Kothari et al. 2013 (IEEE JBHI 17:813);
    density takes the place of their saturation minus intensity, so that it holds for any stain. *Air*: what
    is as clear as glass within the tissue. On a dark ground nothing is measured.

    Args:
        thumbnail_rgb: ``[h, w, 3] uint8``, the whole slide.
        mpp: its spacing, micrometres per pixel.
        tissue_mask: ``[h, w] bool``, its tissue with the air in it, as
            :func:`~slidetl.tissue.find_tissue` returns.
        background_rgb: colour of glass that was not scanned, 0..255.
    """
    # Imported here: half a second that `slidetl --help` need not pay.
    from scipy import ndimage

    if is_dark_ground(thumbnail_rgb) or not tissue_mask.any():
        nothing = np.zeros(tissue_mask.shape, bool)
        return QualityMaps(nothing, nothing.copy(), nothing.copy(), mpp)
    glass = glass_rgb(thumbnail_rgb, background_rgb)
    is_dense = is_stained(optical_density(thumbnail_rgb, glass))
    # Nuclei and noise are smaller than what is looked for.
    smooth = ndimage.uniform_filter(thumbnail_rgb, (3, 3, 1))
    density = optical_density(smooth, glass)

    pen = np.zeros(tissue_mask.shape, bool)
    strokes = _inks(smooth, glass)
    stained = max(int((is_dense & tissue_mask).sum()), 1)
    for coloured, dense in (strokes["green"], strokes["blue"]):
        is_stain = (coloured & tissue_mask).sum() > _STAIN_SHARE * stained
        pen |= _pieces(dense if is_stain else coloured, _STROKE_UM2, mpp)
    pen |= _pieces(strokes["black"][0], _STROKE_UM2, mpp)
    # A stroke fades at its edge, where its colour is mixed with what lies under it.
    pen = ndimage.binary_dilation(pen, np.ones((3, 3)), iterations=max(1, round(32 / mpp)))

    flat = density[is_dense & tissue_mask & ~pen]
    fold = np.zeros_like(pen)
    if flat.size:
        relative = density / np.percentile(flat, 90)
        relative[~tissue_mask | pen] = 0
        core = _pieces(relative > _FOLD_CORE, _FOLD_UM2, mpp)
        fold = np.asarray(ndimage.binary_propagation(core, np.ones((3, 3)), mask=relative > _FOLD_REST))
    return QualityMaps(pen, fold, tissue_mask & ~is_dense & ~pen, mpp)


def focus_of(rgb: NDArray[np.uint8], mpp: float) -> float:
    """How sharp a tile is: 0.1 to 0.6 in focus, below 0.08 when blurred by 2 micrometres, on any stain.

    It is Brenner's gradient (Brenner et al. 1976, J Histochem Cytochem 24:100), the mean square difference of
    pixels a step apart, with a step of 1 micrometre (at least a pixel), divided by the same at four times
    that step: blur takes the fine differences away before the coarse ones. The quotient makes it
    independent of how strong the stain is; tiles without structure are near 0, since noise is discounted.
    Compare tiles of one spacing only: a pixel above 1 micrometre hides slight blur.

    Args:
        rgb: ``[h, w, 3] uint8``.
        mpp: its spacing, micrometres per pixel.

    Returns:
        0 or more; 0 for a tile too small to measure, less than 8 steps wide.
    """
    step = max(1, round(_DETAIL_UM / mpp))
    if min(rgb.shape[:2]) < 2 * _STRUCTURE_FACTOR * step:
        return 0.0
    # Channel by channel: a mean over the last axis takes five times as long.
    grey = (rgb[..., 0].astype(np.float32) + rgb[..., 1] + rgb[..., 2]) / np.float32(3)
    detail = max(_power(grey, step) - _NOISE_POWER, 0.0)
    return detail / (_power(grey, _STRUCTURE_FACTOR * step) + _NOISE_POWER)


def _power(grey: NDArray[np.float32], step: int) -> float:
    """Mean square difference of pixels ``step`` apart, over both axes."""
    down = grey[step:] - grey[:-step]
    right = grey[:, step:] - grey[:, :-step]
    return float((np.vdot(down, down) / down.size + np.vdot(right, right) / right.size) / 2)


def _inks(
    rgb: NDArray[np.uint8], glass: NDArray[np.float64]
) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """For each ink the pixels of its colour, and those of them too dense for a stain of that colour."""
    table = np.log10((glass + 1) / (np.arange(256.0)[:, None] + 1)).clip(0).astype(np.float32)
    found = {
        name: (np.zeros(rgb.shape[:2], bool), np.zeros(rgb.shape[:2], bool))
        for name in ("green", "blue", "black")
    }
    for top in range(0, len(rgb), _BAND_ROWS):
        rows = slice(top, top + _BAND_ROWS)
        red, green, blue = (table[:, channel][rgb[rows, :, channel]] for channel in range(3))
        is_ink = np.sqrt(red * red + green * green + blue * blue) > _INK_DENSITY
        highest, lowest = (pick(pick(red, green), blue) for pick in (np.maximum, np.minimum))
        is_black = (lowest > _BLACK_DENSITY) & (highest - lowest < _BLACK_SPREAD * highest)
        colours = {
            "green": is_ink & (red > 1.25 * green) & (blue > 1.1 * green),
            "blue": is_ink & (red > 1.2 * green) & (green > 1.05 * blue),
            "black": is_black,
        }
        for name, mask in colours.items():
            found[name][0][rows] = mask & (is_black if name == "black" else ~is_black)
            found[name][1][rows] = found[name][0][rows] & (red > _INK_RED_DENSITY)
    return found


def _pieces(mask: NDArray[np.bool_], least_um2: float, mpp: float) -> NDArray[np.bool_]:
    """What of a mask is more than a line or a speck."""
    from scipy import ndimage

    solid = ndimage.binary_opening(mask, np.ones((2, 2)))
    labels, count = ndimage.label(solid, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    is_kept = areas >= max(4, math.ceil(least_um2 / mpp**2))
    is_kept[0] = False
    return np.asarray(is_kept[labels])
