"""Draws a slide from afar, from its cache alone."""

from __future__ import annotations

import numpy as np

from slidetl.tiles.preview import OUTLINE, outline
from slidetl.tiles.pyramid import encode_view
from slidetl.tiles.store import SlideCache

_LONGEST_PX = 360


def draw_thumbnail(cache: SlideCache) -> bytes:
    """Draws the thumbnail with the outline of its tissue, as a JPEG."""
    from PIL import Image

    picture = Image.fromarray(cache.thumbnail)
    zoom = _LONGEST_PX / max(picture.size)
    size = (max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom)))
    pixels = np.array(picture.resize(size, Image.Resampling.BOX if zoom < 1 else Image.Resampling.BILINEAR))
    mask = Image.fromarray(cache.tissue_mask.mask).resize(size, Image.Resampling.NEAREST)
    pixels[outline(np.asarray(mask))] = OUTLINE
    return encode_view(pixels, 85)
