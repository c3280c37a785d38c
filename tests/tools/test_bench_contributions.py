from __future__ import annotations

import numpy as np
import pytest
import torch

from slidetl.models.aggregators import MaxPooling, MeanPooling, Pooling
from slidetl.models.heads import CumulativeLink
from slidetl.models.network import GradingNetwork
from tools import bench_contributions as tool


def test_a_tile_has_the_collagen_of_its_cells() -> None:
    truth = np.arange(24, dtype=np.float16).reshape(4, 6)
    # Two cells of 64 um a side; the second begins a tenth of a cell late and ends as late.
    origins_um = np.array([[0.0, 0.0], [64.0 * 2.1, 64.0]])
    found = tool.drawn_collagen(truth, origins_um, 128.0)
    assert found.tolist() == [truth[:2, :2].mean(), truth[1:3, 2:4].mean()]


@pytest.mark.parametrize("aggregator", [MeanPooling, MaxPooling])
def test_a_head_that_reads_the_lesion_finds_it(aggregator: type[Pooling]) -> None:
    """The first feature of a tile is its lesion; a maximum sees some of it, through occlusion."""
    rng = np.random.default_rng(0)
    slides = []
    for grade in range(5):
        collagen = (np.arange(64) < 6 * grade).astype(float)
        embeddings = np.stack([collagen + rng.normal(0, 0.1, 64), rng.normal(size=64)], 1).astype(np.float32)
        places = np.stack(np.divmod(np.arange(64), 8)[::-1], axis=1)
        slides.append(tool.Slide("slide", grade, torch.from_numpy(embeddings), places, collagen))
    torch.manual_seed(0)
    head = CumulativeLink(2, 5)
    network = GradingNetwork(torch.nn.Identity(), aggregator(2), head)  # type: ignore[arg-type]
    before = head.first.item()
    tool.train(network, slides, 1)
    assert head.first.item() != before
    with torch.no_grad():
        head.score.weight.copy_(torch.tensor([[8.0, 0.0]]))
    _, found = tool.areas(network, slides)
    assert [len(areas) for areas in found.values()] == [4, 4, 4]  # grade 0 has no lesion to find
    # One tile holds the maximum, whose occlusion is seen; the rest are ties.
    least = 0.99 if aggregator is MeanPooling else 0.51
    assert min(found["contribution"]) > least
    assert tool.spread([0.5, 0.7]) == "0.600 ± 0.141 [0.500, 0.700]"


def test_slides_without_both_kinds_of_tiles_have_no_area() -> None:
    slide = tool.Slide("slide", 0, torch.zeros(50, 2), np.zeros((50, 2), np.int64), np.zeros(50))
    assert not slide.has_both
