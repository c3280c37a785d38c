"""Measures colour and stain of slides, independent of any structure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from slidetl.data.manifest import stain_kind
from slidetl.tiles.store import SlideCache

# Optical density by channel (red, green, blue) of two stains, that of collagen first. Haematoxylin and eosin:
# the normalised vectors of Ruifrok and Johnston, "Quantification of histochemical staining by color
# deconvolution", Anal. Quant. Cytol. Histol. 2001. Masson's methyl blue and ponceau fuchsin: those of
# Landini's ImageJ plugin. Sirius red and picric acid: after the dyes' absorption, near 530 and 360 nm.
_STAINS = {
    "he": ((0.07, 0.99, 0.11), (0.65, 0.70, 0.29)),
    "trichrome": ((0.80, 0.59, 0.11), (0.10, 0.74, 0.67)),
    "sirius": ((0.10, 0.85, 0.52), (0.05, 0.20, 0.98)),
}
_COLLAGEN_DENSITY = 0.15  # least density of its stain in a pixel of collagen


def colour_features(caches: Iterable[SlideCache]) -> NDArray[np.float64]:
    """Measures mean colour and area of tissue of each slide, from its thumbnail.

    Returns:
        ``[n, 4]``: mean red, green and blue of the tissue, 0..255, and its area in mm2. A slide without
        tissue has the colour of the whole thumbnail.
    """
    rows = []
    for cache in caches:
        thumbnail, tissue = cache.thumbnail, cache.tissue_mask
        colour = thumbnail[tissue.mask] if tissue.mask.any() else thumbnail.reshape(-1, 3)
        rows.append([*colour.mean(0), tissue.mask.sum() * (tissue.mpp / 1000) ** 2])
    return np.array(rows)


def collagen_features(caches: Iterable[SlideCache], stains: Iterable[str]) -> NDArray[np.float64]:
    """Measures the collagen of each slide, from its thumbnail, by colour deconvolution.

    Each pixel's optical density is decomposed into two stains and a remainder at right angles to both
    (Ruifrok and Johnston 2001). In haematoxylin and eosin collagen shares the eosin with everything else
    pink, so the measure is poor there; in trichrome and Sirius red it is the usual one.

    Args:
        caches: the slides.
        stains: of each, as in the manifest; an unknown one counts as haematoxylin and eosin.

    Returns:
        ``[n, 3]``: collagen's share of the tissue, 0..1; its area in mm2; mean density of its stain over the
        tissue.
    """
    rows = []
    for cache, stain in zip(caches, stains, strict=True):
        tissue = cache.tissue_mask
        inside = tissue.mask if tissue.mask.any() else np.ones_like(tissue.mask)
        density = collagen_density(cache.thumbnail[inside], stain)
        share = float((density > _COLLAGEN_DENSITY).mean())
        area = share * float(tissue.mask.sum()) * (tissue.mpp / 1000) ** 2
        rows.append([share, area, float(density.mean())])
    return np.array(rows)


def collagen_density(rgb: NDArray[np.uint8], stain: str) -> NDArray[np.float64]:
    """Computes the optical density ``[n]`` of collagen's stain in pixels ``[n, 3] uint8``.

    1 dims the light to a tenth. An unknown stain counts as haematoxylin and eosin.
    """
    collagen, other = (np.array(vector) for vector in _STAINS[stain_kind(stain) or "he"])
    basis = np.stack([collagen, other, np.cross(collagen, other)])
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    absorbed = -np.log10((rgb.astype(np.float64) + 1) / 256)
    return np.asarray(np.linalg.solve(basis.T, absorbed.T)[0])
