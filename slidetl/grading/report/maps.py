"""Maps to lay over the slide in a page: a value and a colour per tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from slidetl.grading.explain import DIVERGING, relative_attention
from slidetl.tiles.preview import COLOURS

if TYPE_CHECKING:
    from slidetl.grading.grade import SlideGrade

# The scale of attention goes at least to so many times the average: almost even maps look even.
_LEAST_REACH = 4.0


@dataclass(frozen=True, eq=False)
class TileMap:
    """A value for each of some tiles.

    Attributes:
        name: title of the map.
        description: its meaning, in a sentence.
        unit: unit of the values, shown after them.
        origins_level0: ``[n, 2] int32``, upper-left corners ``(x, y)``, level-0 pixels.
        values: ``[n] float32``, or numbers of categories.
        shades: ``[n]`` integers, the index of each in ``colours``.
        colours: ``[256, 3] uint8``, or one per category.
        categories: their names; empty for a scale.
        ticks: places on the scale, 0..1, and their labels.
    """

    name: str
    description: str
    unit: str
    origins_level0: NDArray[np.int32]
    values: NDArray[np.float32]
    shades: NDArray[np.int64]
    colours: NDArray[np.uint8]
    categories: tuple[str, ...] = ()
    ticks: tuple[tuple[float, str], ...] = ()


def maps_of(result: SlideGrade) -> list[TileMap]:
    """Makes the maps of a graded slide, the most important first."""
    explanation = result.explanation
    ends = f"{explanation.reach:.2g}"
    maps = [
        TileMap(
            "Contribution",
            explanation.description,
            f"{explanation.unit} × tiles",
            result.origins_level0,
            explanation.relative,
            explanation.shades,
            colour_table(DIVERGING),
            ticks=((0.0, f"≤ −{ends}"), (0.5, "0"), (1.0, f"≥ {ends}")),
        )
    ]
    if (relative := relative_attention(result.attention)) is not None:
        # A logarithmic scale with the average in the middle: on a linear one a few tiles are bright and all
        # others black.
        reach = max(_LEAST_REACH, float(relative.max()))
        place = 0.5 + 0.5 * np.log(np.maximum(relative, 1 / reach)) / np.log(reach)
        maps.append(
            TileMap(
                "Attention",
                "How much each tile counted; 1 is the average tile.",
                "× the average tile",
                result.origins_level0,
                relative,
                np.asarray(np.round(255 * np.clip(place, 0, 1)), np.int64),
                colour_table("inferno"),
                ticks=((0.0, f"1/{reach:.2g}"), (0.5, "1"), (1.0, f"{reach:.2g}×")),
            )
        )
    if left_out := left_out_level0(result):
        reasons = tuple(left_out)
        numbers = np.repeat(np.arange(len(reasons)), [len(corners) for corners in left_out.values()])
        maps.append(
            TileMap(
                "Left out",
                "Tiles with tissue that were not graded, and why.",
                "",
                np.concatenate(list(left_out.values())),
                numbers.astype(np.float32),
                numbers,
                np.array([COLOURS[reason] for reason in reasons], np.uint8),
                categories=reasons,
            )
        )
    return maps


def left_out_level0(result: SlideGrade) -> dict[str, NDArray[np.int32]]:
    """Finds corners ``[n, 2]`` of ungraded tiles with tissue, by reason; none is empty."""
    wanted = result.plan.origins_level0
    is_graded = {(x, y) for x, y in result.origins_level0.tolist()}
    unreadable = [(x, y) not in is_graded for x, y in wanted.tolist()]
    found = {**result.plan.left_out_level0, "unreadable": wanted[unreadable]}
    return {reason: origins for reason, origins in found.items() if len(origins)}


def colour_table(name: str) -> NDArray[np.uint8]:
    """Returns a colour map of Matplotlib by name, ``[256, 3] uint8``."""
    from matplotlib import colormaps

    rgba = colormaps[name](np.arange(256), bytes=True)
    return np.asarray(rgba[:, :3], np.uint8)
