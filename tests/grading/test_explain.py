from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from slidetl.grading.explain import Explanation, explain_by_occlusion, find_voxels, telling_tiles


def grid(columns: int, rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Columns and rows ``[N, 2]`` of the tiles of a rectangle, row by row."""
    return np.stack(np.divmod(np.arange(columns * rows), columns)[::-1], axis=1)


def graded(
    embeddings: Tensor, expected_grade: Callable[[Tensor], float]
) -> Callable[[list[NDArray[np.int64]]], NDArray[np.float64]]:
    """Grades all embeddings of a slide, then selections of them."""
    return lambda selections: np.array(
        [expected_grade(embeddings), *(expected_grade(embeddings[kept]) for kept in selections)]
    )


def test_few_tiles_are_left_out_one_by_one() -> None:
    embeddings = torch.tensor([[0.0], [1.0], [5.0], [3.0]])
    found = explain_by_occlusion(graded(embeddings, lambda rest: float(rest.max())), grid(2, 2))
    np.testing.assert_allclose(found.contributions, [0, 0, 2, 0])
    assert (found.score, found.baseline, found.unit) == (5, None, "grades")


def test_neighbours_are_left_out_together() -> None:
    places = grid(32, 16)  # 8 x 4 groups of 4 x 4 would be too few; 3 x 3 give 66, so 4 x 4
    embeddings = torch.zeros(len(places), 1)
    is_lesion = (places[:, 0] // 4 == 2) & (places[:, 1] // 4 == 1)
    embeddings[torch.from_numpy(is_lesion)] = 4.0
    sizes = []

    def expected_grade(rest: torch.Tensor) -> float:
        sizes.append(len(rest))
        return float(rest.max())

    found = explain_by_occlusion(graded(embeddings, expected_grade), places)
    assert sizes == [512] + [496] * 32
    np.testing.assert_allclose(found.contributions, np.where(is_lesion, 4 / 16, 0))
    assert found.relative.max() == pytest.approx(4 / 16 * 512)


def test_a_single_tile_has_no_rest() -> None:
    found = explain_by_occlusion(graded(torch.ones(1, 3), lambda rest: float(rest.mean())), grid(1, 1))
    assert found.contributions.tolist() == [0] and found.score == 1


def test_sums_tell_how_the_score_comes_about() -> None:
    explanation = Explanation(np.array([0.5, -0.25, 0.125], np.float32), "log-odds", 1.5, 1.125)
    assert explanation.to_dict() == {
        "method": "additive",
        "unit": "log-odds",
        "score": 1.5,
        "baseline": 1.125,
        "raised": 0.625,
        "lowered": -0.25,
    }
    # Times three they are 1.5, -0.75 and 0.375; the colours reach to 1.47.
    assert explanation.shades.tolist() == [255, 62, 160]


class _Looks(torch.nn.Module):
    """Embeds a patch by the density within a cube of it."""

    def __init__(self, at: tuple[int, int, int]) -> None:
        super().__init__()
        self.at = at  # (x, y, z) of the first voxel

    def forward(self, hu: Tensor) -> Tensor:
        x, y, z = self.at
        return (hu[:, 0, z : z + 4, y : y + 4, x : x + 4].mean((1, 2, 3)) / 1000 + 1).unsqueeze(1)


def test_the_voxels_that_a_grade_reacts_to_are_found() -> None:
    patches = np.random.default_rng(0).integers(-900, 100, (3, 16, 16, 16)).astype(np.int16)
    looks = _Looks((9, 2, 5))
    with torch.inference_mode():
        embeddings = torch.cat([looks(torch.from_numpy(patch)[None, None].float()) for patch in patches])
    found = find_voxels(lambda rows: rows.sum(), looks, embeddings, dict(enumerate(patches)), 4)
    assert list(found) == [0, 1, 2]
    assert all(place.tolist() == [11, 4, 7] for place in found.values())


def test_a_grade_that_reacts_to_no_voxel_of_a_patch_shows_its_centre() -> None:
    patches = np.full((2, 8, 8, 8), -500, np.int16)
    patches[1] = 0
    looks = _Looks((0, 0, 0))
    embeddings = torch.cat([looks(torch.from_numpy(patch)[None, None].float()) for patch in patches])
    found = find_voxels(lambda rows: rows.max(), looks, embeddings, dict(enumerate(patches)), 3)
    assert found[0].tolist() == [4, 4, 4]  # the other patch decides
    assert found[1].tolist() == [1, 1, 1] and embeddings.grad is None


pairs = st.tuples(st.floats(-5, 5, width=32), st.floats(0, 1, width=32))


@given(st.lists(pairs, min_size=1, max_size=40), st.integers(1, 10))
def test_tiles_are_shown_by_what_they_do_to_the_score(tiles: list[tuple[float, float]], count: int) -> None:
    contributions, attention = np.array(tiles, np.float32).T
    kinds = telling_tiles(contributions, attention, count)
    shown = {heading: [tiles[n][0] for n in kind] for heading, kind in kinds.items()}
    falling = sorted((value for value, _ in tiles), reverse=True)
    raising, lowering = [v for v in falling if v > 0][:count], [v for v in falling[::-1] if v < 0][:count]
    expected = {" that raise the score most": raising, " that lower the score most": lowering}
    assert shown == (
        {heading: values for heading, values in expected.items() if values} or {"": [0] * len(tiles[:count])}
    )


def test_of_equal_tiles_those_of_most_attention_are_shown() -> None:
    attention = np.array([0.1, 0.4, 0.2, 0.3], np.float32)
    assert telling_tiles(np.zeros(4, np.float32), attention, 3) == {"": [1, 3, 2]}
    assert telling_tiles(np.full(4, -2, np.float32), attention, 2) == {" that lower the score most": [1, 3]}
