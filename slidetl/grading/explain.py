"""Each tile's share in the grade of its slide: exact if the network adds tiles up, else by occlusion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIVERGING = "RdBu_r"
"""Colours of contributions: blue lowers, red raises; distinct also for colour-blind people."""

_GROUPS = 64  # to leave out in turn, at most
_LEAST_REACH = 1.0  # of the colours: tiles that hardly differ look alike
_BEYOND = 98  # percent of the tiles lie within the colours
_EVEN = 1e-3  # below this range of relative attention a model weighs all tiles alike


def relative_attention(attention: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Computes attention ``[N]``, 1 for the average tile; None if the model weighs all tiles alike."""
    relative = attention * np.float32(len(attention))
    return relative if np.ptp(relative) > _EVEN else None


def ranked_tiles(contributions: NDArray[np.float32], attention: NDArray[np.float32]) -> list[int]:
    """Ranks tiles, the greatest contribution first, of equal ones the greatest attention."""
    order: list[int] = np.lexsort((-attention, -contributions)).tolist()
    return order


def telling_tiles(
    contributions: NDArray[np.float32], attention: NDArray[np.float32], count: int
) -> dict[str, list[int]]:
    """Finds the tiles to show, ``count`` of a kind at most.

    Returns:
        The numbers of the tiles that raise the score most and of those that lower it most, the most extreme
        first, by the end of a heading; no list is empty. If none does either, those of most attention.
    """
    first = ranked_tiles(contributions, attention)[:count]
    last = ranked_tiles(-contributions, attention)[:count]
    kinds = {
        " that raise the score most": [n for n in first if contributions[n] > 0],
        " that lower the score most": [n for n in last if contributions[n] < 0],
    }
    return {heading: tiles for heading, tiles in kinds.items() if tiles} or {"": first}


@dataclass(frozen=True, eq=False)
class Explanation:
    """The contributions of a slide's tiles to its score.

    Attributes:
        contributions: ``[N] float32``. With a ``baseline`` they are exact: they sum to ``score - baseline``.
            Without, each tile has an even part of the change when its group of neighbours is left out.
        unit: of score and contributions.
        score: the slide's latent score, or by occlusion its expected grade: the continuous score.
        baseline: the score if all tiles of the slide counted alike; None by occlusion.
    """

    contributions: NDArray[np.float32]
    unit: str
    score: float
    baseline: float | None

    @property
    def relative(self) -> NDArray[np.float32]:
        """``[N] float32``, the contributions times the number of tiles, comparable among slides."""
        return self.contributions * np.float32(len(self.contributions))

    @property
    def reach(self) -> float:
        """The value of :attr:`relative` at either end of the colours, with zero in their middle."""
        return max(_LEAST_REACH, float(np.percentile(np.abs(self.relative), _BEYOND)))

    @property
    def shades(self) -> NDArray[np.int64]:
        """``[N]``, 0..255, the place of each tile in the colours."""
        place = 0.5 + 0.5 * self.relative / self.reach
        return np.asarray(np.round(255 * np.clip(place, 0, 1)), np.int64)

    @property
    def score_name(self) -> str:
        """The name of the score: only by occlusion it is the one beside the grade."""
        if self.baseline is None:
            return "continuous score"
        return f"latent score ({'grades from 0' if self.unit == 'grades' else self.unit})"

    @property
    def description(self) -> str:
        """The meaning of a map of :attr:`relative`, in two sentences."""
        if self.baseline is None:
            return (
                f"How much the {self.score_name} drops (red) or rises (blue) without a group of neighbouring "
                "tiles, shared among the group, times the number of tiles. Such shares need not sum to the "
                "grade."
            )
        return (
            f"How much each tile raises (red) or lowers (blue) the slide's {self.score_name}, times the "
            f"number of tiles; 0 is the slide's average tile. The mean is the latent score, "
            f"{self.score:.2f}, less {self.baseline:.2f}, the latent score if all tiles counted alike."
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the sums as plain JSON values; ``score`` is any ``baseline`` plus ``raised + lowered``."""
        values = self.contributions.astype(np.float64)
        return {
            "method": "occlusion" if self.baseline is None else "additive",
            "unit": self.unit,
            "score": round(self.score, 5),
            "baseline": None if self.baseline is None else round(self.baseline, 5),
            "raised": round(float(values[values > 0].sum()), 5),
            "lowered": round(float(values[values < 0].sum()), 5),
        }


def explain_by_occlusion(
    expected_grades: Callable[[list[NDArray[np.int64]]], NDArray[np.float64]], places: NDArray[np.int64]
) -> Explanation:
    """Leaves out group after group of neighbouring tiles, and grades the rest.

    A tile is left out with its neighbours, since one of many tiles of the same tissue would not be missed
    (Zeiler and Fergus, "Visualizing and understanding convolutional networks", ECCV 2014, grey out a patch
    of a picture).

    Args:
        expected_grades: of the slide by all its tiles, and by each selection of their numbers ``[n]``.
        places: ``[N, 2]``, column and row of each tile; the contribution of a single tile is 0.
    """
    side = 1
    while len(np.unique(places // side, axis=0)) > _GROUPS:
        side += 1
    group = np.unique(places // side, axis=0, return_inverse=True)[1].reshape(-1)  # [N]
    n_groups = group.max() + 1 if group.any() else 0
    whole, *others = expected_grades([np.flatnonzero(group != number) for number in range(n_groups)])
    contributions = np.zeros(len(places), np.float32)
    for number, other in enumerate(others):
        is_out = group == number
        contributions[is_out] = (whole - other) / is_out.sum()
    return Explanation(contributions, "grades", float(whole), None)


def find_voxels(
    expected_grade: Callable[[Tensor], Tensor],
    embed: Callable[[Tensor], Tensor],
    embeddings: Tensor,
    patches: Mapping[int, NDArray[np.int16]],
    width_voxel: int,
) -> dict[int, NDArray[np.int64]]:
    """Finds the place in each patch to which the grade of its series reacts most.

    That is where the magnitude of the gradient of the expected grade by the voxels has the greatest mean over
    a cube (Simonyan, Vedaldi and Zisserman, "Deep inside convolutional networks", ICLR 2014 workshop).

    Args:
        expected_grade: of the embeddings ``[N, D]`` of a series, a tensor that can be differentiated.
        embed: maps patches ``[1, 1, S, S, S]`` of Hounsfield units to ``[1, D]``, likewise.
        embeddings: of all patches.
        patches: ``[S, S, S]``, axes z, y, x, by their number among all.
        width_voxel: side of the cube.

    Returns:
        The place ``(x, y, z)`` within each patch, by its number; the centre if the grade reacts to no voxel.
    """
    places = {}
    with torch.inference_mode(False), torch.enable_grad():
        rows = embeddings.clone()  # those of inference mode cannot be differentiated
        for number, patch in patches.items():
            hu = torch.as_tensor(patch, dtype=torch.float32, device=rows.device)[None, None].requires_grad_()
            own = embed(hu).to(rows.dtype)
            grade = expected_grade(torch.cat([rows[:number], own, rows[number + 1 :]]))
            (slope,) = torch.autograd.grad(grade, hu, allow_unused=True)
            side = len(patch)
            places[number] = np.full(3, side // 2, np.int64)
            if slope is not None and bool(slope.any()):
                pooled = torch.nn.functional.avg_pool3d(slope.abs(), width_voxel, 1)[0, 0]
                corner = np.unravel_index(int(pooled.argmax()), pooled.shape)
                places[number] = np.array(corner[::-1], np.int64) + width_voxel // 2
    return places
