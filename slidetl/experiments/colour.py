"""What can be told from a slide without looking at any structure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from slidetl.cache.store import SlideCache


def colour_features(caches: Iterable[SlideCache]) -> NDArray[np.float64]:
    """Mean colour and amount of tissue of each slide, from its thumbnail.

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
