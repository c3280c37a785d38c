"""One picture per slide for people to look at: its tissue, the tiles kept, and those left out and why."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidetl.tiles.tissue import TissueMask

KEPT = "kept"
COLOURS: dict[str, tuple[int, int, int]] = {
    KEPT: (20, 130, 40),
    "pen": (30, 80, 220),
    "fold": (220, 40, 40),
    "air": (230, 150, 0),
    "out of focus": (150, 40, 180),
    "unreadable": (0, 0, 0),
}
"""Colour of tiles by what became of them, RGB 0..255. Tiles without tissue are not drawn."""

_OTHER = (90, 90, 90)
_OUTLINE = (0, 170, 190)
_LONGEST_PX = 2000
_SHORTEST_PX = 600
_TINT = 0.35
_ROW_PX = 22


def draw_preview(
    path: Path,
    thumbnail: NDArray[np.uint8],
    tissue_mask: TissueMask,
    kept_level0: NDArray[np.int32],
    left_out_level0: Mapping[str, NDArray[np.int32]],
    extent_level0: tuple[float, float],
    mpp_level0: tuple[float, float],
    title: str,
) -> None:
    """Draws the thumbnail with the outline of the tissue, the grid of kept tiles, and what was left out.

    Args:
        path: the PNG; its folder is made, and a picture that is there is replaced at once.
        thumbnail: ``[h, w, 3] uint8``, the whole slide.
        tissue_mask: in the frame of the thumbnail.
        kept_level0: ``[N, 2] int32``, upper-left corners ``(x, y)`` of the tiles kept, level-0 pixels.
        left_out_level0: the same for the tiles left out, by reason (a key of :data:`COLOURS`, or another).
        extent_level0: size of a tile ``(x, y)``, level-0 pixels.
        mpp_level0: spacing of level 0 along x and y, micrometres per pixel.
        title: the first line of the legend.

    Raises:
        OSError: the picture cannot be written.
    """
    from PIL import Image, ImageDraw

    height, width = thumbnail.shape[:2]
    zoom = min(_LONGEST_PX / max(height, width), max(1.0, _SHORTEST_PX / max(height, width)))
    size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    picture = Image.fromarray(thumbnail).resize(size, Image.Resampling.BOX)
    scale = np.asarray(mpp_level0) / tissue_mask.mpp * zoom
    tile = np.asarray(extent_level0) * scale

    tint = picture.copy()
    groups = {KEPT: kept_level0, **left_out_level0}
    boxes = {
        reason: [(x, y, x + tile[0], y + tile[1]) for x, y in (origins.reshape(-1, 2) * scale).tolist()]
        for reason, origins in groups.items()
    }
    brush = ImageDraw.Draw(tint)
    for reason, places in boxes.items():
        if reason != KEPT:
            for place in places:
                brush.rectangle(place, fill=COLOURS.get(reason, _OTHER))
    picture = Image.blend(picture, tint, _TINT)
    brush = ImageDraw.Draw(picture)
    for reason, places in boxes.items():
        for place in places:
            brush.rectangle(place, outline=COLOURS.get(reason, _OTHER))

    mask = np.asarray(Image.fromarray(tissue_mask.mask).resize(size, Image.Resampling.NEAREST))
    pixels = np.array(picture)
    pixels[_outline(mask)] = _OUTLINE
    legend = [(_OUTLINE, "outline of the tissue")]
    legend += [(COLOURS.get(r, _OTHER), f"{r}: {len(places)} tiles") for r, places in boxes.items()]
    sheet = Image.new("RGB", (max(size[0], 340), size[1] + _ROW_PX * (len(legend) + 1) + 8), "white")
    sheet.paste(Image.fromarray(pixels), (0, 0))
    brush = ImageDraw.Draw(sheet)
    # Pillow's own font has no letters beyond Latin-1, and raises at them.
    plain = title.encode("latin-1", "replace").decode("latin-1")
    brush.text((6, size[1] + 6), plain, fill="black", font_size=14)
    for number, (colour, text) in enumerate(legend, start=1):
        top = size[1] + 6 + number * _ROW_PX
        brush.rectangle((6, top + 2, 20, top + 15), fill=colour)
        brush.text((28, top), text, fill="black", font_size=14)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    sheet.save(temporary, format="PNG")
    temporary.replace(path)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of the mask with a neighbour outside it, two pixels wide."""
    inner = np.pad(mask, 2)
    for _ in range(2):
        smaller = inner.copy()
        for axis in (0, 1):
            for shift in (-1, 1):
                smaller &= np.roll(inner, shift, axis)
        inner = smaller
    return mask & ~inner[2:-2, 2:-2]
