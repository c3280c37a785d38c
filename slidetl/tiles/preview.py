"""Draws one picture per slide: its tissue, the tiles kept, and those left out with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidetl.files import replaced
from slidetl.tiles.patches import PatchPlan
from slidetl.tiles.plan import TilePlan

KEPT = "kept"
COLOURS: dict[str, tuple[int, int, int]] = {
    KEPT: (20, 130, 40),
    "outside regions": (200, 200, 60),
    "pen": (30, 80, 220),
    "fold": (220, 40, 40),
    "air": (230, 150, 0),
    "out of focus": (150, 40, 180),
    "unreadable": (0, 0, 0),
}
"""Colour of tiles by outcome, RGB 0..255. Tiles without tissue are not drawn."""

_OTHER = (90, 90, 90)
OUTLINE = (0, 170, 190)
_REGIONS = (230, 0, 200)
_LONGEST_PX = 2000
_SHORTEST_PX = 600
_TINT = 0.35
_ROW_PX = 22


def draw_preview(path: Path, plan: TilePlan, title: str) -> None:
    """Draws the thumbnail with the outline of the tissue, the grid of kept tiles, and those left out.

    Args:
        path: the PNG; its folder is created, and an existing picture is replaced atomically.
        plan: tiles kept and left out; reasons without a key in :data:`COLOURS` are grey.
        title: the first line of the legend.

    Raises:
        OSError: the picture cannot be written.
    """
    from PIL import Image, ImageDraw

    height, width = plan.thumbnail.shape[:2]
    zoom = min(_LONGEST_PX / max(height, width), max(1.0, _SHORTEST_PX / max(height, width)))
    size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    picture = Image.fromarray(plan.thumbnail).resize(size, Image.Resampling.BOX)
    scale = np.asarray(plan.info.mpp_level0) / plan.tissue_mask.mpp * zoom
    tile = np.asarray(plan.extent_level0) * scale

    tint = picture.copy()
    groups = {KEPT: plan.origins_level0, **plan.left_out_level0}
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

    pixels = np.array(picture)
    legend = [(OUTLINE, "outline of the tissue")]
    outlined = [(OUTLINE, plan.tissue_mask.mask)]
    if plan.regions is not None:
        legend.append((_REGIONS, "outline of the regions"))
        outlined.append((_REGIONS, plan.regions >= 0.5))
    for colour, mask in outlined:
        shown = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        pixels[outline(shown)] = colour
    legend += [(COLOURS.get(r, _OTHER), f"{r}: {len(places)} tiles") for r, places in boxes.items()]
    _save(path, pixels, title, legend)


def draw_patches(path: Path, plan: PatchPlan, title: str) -> None:
    """Draws the axial, coronal and sagittal plane through the middle of the patches, as radiologists see it.

    The patient's right is on the left side, front and head are up. Each plane has the outline of the mask and
    the patches that it cuts.

    Args:
        path: the PNG; its folder is created, and an existing picture is replaced atomically.
        plan: the patches.
        title: the first line of the legend.

    Raises:
        OSError: the picture cannot be written.
    """
    from PIL import Image, ImageDraw

    hu, side = plan.volume.hu, plan.spec.tile_size_px
    low, high = plan.spec.window_hu
    ratio = plan.spec.spacing_mm / plan.overview.spacing_mm[0]
    first = plan.origins_voxel[:, ::-1]  # (z, y, x), as the arrays
    middle = (first.min(0) + first.max(0) + side) // 2 if len(plan) else np.array(hu.shape) // 2
    middle = np.clip(middle, 0, np.array(hu.shape) - 1)
    zoom = max(1, round(_SHORTEST_PX / max(hu.shape)))
    panels = []
    for axis in range(3):
        cut = np.take(hu, middle[axis], axis).astype(np.float32)
        grey = np.clip((cut - low) / (high - low) * 255, 0, 255).astype(np.uint8)
        size = (cut.shape[1] * zoom, cut.shape[0] * zoom)
        pixels = np.array(Image.fromarray(grey).resize(size, Image.Resampling.NEAREST).convert("RGB"))
        # The plane of the overview at the same place, on the grid of the picture.
        at = [
            np.minimum(((np.arange(n) + 0.5) * ratio).astype(int), m - 1)
            for n, m in zip(hu.shape, plan.mask.shape, strict=True)
        ]
        others = [n for n in range(3) if n != axis]
        mask = np.take(plan.mask, at[axis][middle[axis]], axis)[np.ix_(at[others[0]], at[others[1]])]
        if not mask.all():
            pixels[outline(np.kron(mask, np.ones((zoom, zoom), bool)))] = OUTLINE
        picture = Image.fromarray(pixels)
        brush = ImageDraw.Draw(picture)
        is_cut = (first[:, axis] <= middle[axis]) & (middle[axis] < first[:, axis] + side)
        for down, right in np.unique(first[is_cut][:, others], axis=0).tolist():
            brush.rectangle(
                [right * zoom, down * zoom, (right + side) * zoom - 1, (down + side) * zoom - 1],
                outline=COLOURS[KEPT],
            )
        panels.append(np.asarray(picture)[:: 1 if axis == 0 else -1])  # head up
    height = max(panel.shape[0] for panel in panels)
    padded = [np.pad(panel, ((0, height - len(panel)), (0, 8), (0, 0))) for panel in panels]
    legend = [
        (
            COLOURS[KEPT],
            f"patches kept: {len(plan)}, with too little {plan.spec.mask}: {plan.patches_without_mask}",
        )
    ]
    if plan.spec.mask != "none":
        legend.insert(0, (OUTLINE, f"outline of the {plan.spec.mask}"))
    _save(path, np.concatenate(padded, axis=1), title, legend)


def _save(
    path: Path, pixels: NDArray[np.uint8], title: str, legend: Sequence[tuple[tuple[int, int, int], str]]
) -> None:
    """Writes a picture with its title and legend below."""
    from PIL import Image, ImageDraw

    height, width = pixels.shape[:2]
    sheet = Image.new("RGB", (max(width, 340), height + _ROW_PX * (len(legend) + 1) + 8), "white")
    sheet.paste(Image.fromarray(pixels), (0, 0))
    brush = ImageDraw.Draw(sheet)
    # Pillow's own font has no letters beyond Latin-1, and raises at them.
    plain = title.encode("latin-1", "replace").decode("latin-1")
    brush.text((6, height + 6), plain, fill="black", font_size=14)
    for number, (colour, text) in enumerate(legend, start=1):
        top = height + 6 + number * _ROW_PX
        brush.rectangle((6, top + 2, 20, top + 15), fill=colour)
        brush.text((28, top), text, fill="black", font_size=14)

    with replaced(path) as file:
        sheet.save(file, format="PNG")


def outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Finds the border of the mask, two pixels wide."""
    inner = np.pad(mask, 2)
    for _ in range(2):
        smaller = inner.copy()
        for axis in (0, 1):
            for shift in (-1, 1):
                smaller &= np.roll(inner, shift, axis)
        inner = smaller
    return mask & ~inner[2:-2, 2:-2]
