from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from slidetl.data.datasets import BagDataset
from slidetl.data.manifest import read_manifest
from slidetl.data.sampling import AttentionGuided, Sampling, TissueWeighted, Uniform
from slidetl.data.study import CachedSlide
from slidetl.errors import UsageError
from slidetl.tiles.store import SlideCache
from tests.conftest import Study

SHARES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40)


@given(SHARES, st.sampled_from([Uniform(), TissueWeighted(), TissueWeighted(3), AttentionGuided(0.9)]))
def test_no_tile_is_out_of_reach(values: list[float], sampling: Sampling) -> None:
    shares = np.array(values, np.float32)
    weights = sampling.weights(shares, shares)
    if weights is not None:
        assert weights.shape == shares.shape and (weights > 0).all()
        assert weights.sum() == pytest.approx(1)
        assert (np.diff(weights[np.argsort(shares)]) >= 0).all()


def test_weights_by_hand() -> None:
    tissue = np.array([0.25, 0.5, 0.0], np.float32)
    assert TissueWeighted().weights(tissue, None) == pytest.approx(np.array([25, 50, 1]) / 76)
    assert TissueWeighted(0).weights(tissue, None) == pytest.approx(np.full(3, 1 / 3))
    attention = np.array([0.75, 0.25, 0.0], np.float32)
    found = AttentionGuided(0.6).weights(tissue, attention)
    assert found == pytest.approx(0.6 * attention + 0.4 / 3)
    assert AttentionGuided().weights(tissue, None) is None
    assert Uniform().weights(tissue, attention) is None


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(UsageError, match=r"sampling\.power must be from 0 to 10, not -1"):
        TissueWeighted(-1)
    with pytest.raises(UsageError, match=r"sampling\.share must be from 0 to below 1"):
        AttentionGuided(1.0)
    with pytest.raises(UsageError, match=r"every_n_epochs at least 1, not 0\.5, 0"):
        AttentionGuided(every_n_epochs=0)


def bags(study: Study, sampling: Sampling) -> BagDataset:
    rows = read_manifest(study.manifest).rows[:2]
    slides = [CachedSlide(row, SlideCache.open(study.cache / f"{row.slide_id}.zarr")) for row in rows]
    return BagDataset(slides, 4, None, 0, sampling)


def drawn(dataset: BagDataset, number: int, epochs: int = 60) -> NDArray[np.int64]:
    """How often each tile of a slide was drawn."""
    every = dataset.slides[number].cache.read(np.arange(len(dataset.slides[number].cache)))
    names = {tile.tobytes(): index for index, tile in enumerate(every)}
    counts = np.zeros(len(every), np.int64)
    for epoch in range(epochs):
        tiles = dataset[(epoch, number)]["tiles"].permute(0, 2, 3, 1).contiguous().numpy()
        found = [names[tile.tobytes()] for tile in tiles]
        assert len(set(found)) == 4  # without replacement
        counts[found] += 1
    return counts


def test_bags_follow_the_attention_and_leave_nothing_out(study: Study) -> None:
    dataset = bags(study, AttentionGuided(0.8))
    before = drawn(dataset, 1)
    attention = {slide.row.slide_id: np.zeros(len(slide.cache), np.float32) for slide in dataset.slides}
    looked_at = [3, 7, 11, 20]
    for row in attention.values():
        row[looked_at] = 1
    dataset.attend(attention)
    after = drawn(dataset, 1)
    assert after[looked_at].min() > 2 * before[looked_at].max()
    assert (np.delete(after, looked_at) > 0).mean() > 0.5
    assert np.array_equal(after, drawn(dataset, 1))


def test_bags_follow_the_tissue(study: Study) -> None:
    dataset = bags(study, TissueWeighted(6))
    tissue = dataset.slides[0].cache.tissue_fraction
    counts = drawn(dataset, 0, epochs=100)
    order = np.argsort(tissue)
    assert counts[order[-10:]].sum() > 1.5 * counts[order[:10]].sum()
