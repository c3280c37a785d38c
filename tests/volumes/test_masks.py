"""Body and lungs of phantoms with known parts."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from slidetl.volumes.masks import find_body, find_lungs
from slidetl.volumes.resample import resample
from slidetl.volumes.volume import Volume
from tests.volumes.phantom import chest, ellipsoid, frame


def dice(one: NDArray[np.bool_], two: NDArray[np.bool_]) -> float:
    return float(2 * (one & two).sum() / (one.sum() + two.sum()))


@pytest.mark.parametrize("spacing", [4.0, 5.0])
def test_body_and_lungs_of_a_chest_are_found(spacing: float) -> None:
    volume, parts = chest((spacing, spacing, spacing))
    assert dice(find_body(volume.hu, spacing), parts["body"]) > 0.97
    lungs = find_lungs(volume.hu, spacing)
    assert dice(lungs, parts["lungs"]) > 0.95
    assert lungs[parts["nodule"]].all()  # a nodule within belongs to the lung
    large = ellipsoid(volume.frame, (-60, -10, 0), (22, 22, 22))
    vessel = ellipsoid(volume.frame, (-40, -10, 0), (30, 5, 5))  # it leads out of the lung
    hu = np.where(large | vessel, 50, volume.hu).astype(np.int16)
    assert find_lungs(hu, spacing)[large].all()
    ml = lungs.sum() * spacing**3 / 1000
    assert ml == pytest.approx(parts["lungs"].sum() * spacing**3 / 1000, rel=0.06)
    assert not (find_body(volume.hu, spacing)[:, int(volume.hu.shape[1] * 0.93) :]).any()  # the table


def test_bowel_gas_and_the_air_around_are_no_lung() -> None:
    volume, parts = chest()
    hu = resample(volume, 4.0).hu
    small = np.zeros(hu.shape, bool)
    small[2:5, 28:32, 38:42] = True
    hu[small] = -950
    lungs = find_lungs(hu, 4.0)
    assert not lungs[small].any() and not lungs[:, 0].any()
    del parts


def test_without_lungs_there_is_no_lung_mask_and_without_a_body_none_of_it() -> None:
    flesh = np.full((20, 20, 20), -1000, np.int16)
    flesh[3:17, 3:17, 3:17] = 40
    flesh[9:11, 9:11, 9:11] = -900  # a bubble
    assert find_body(flesh, 4.0)[9, 9, 9] and not find_lungs(flesh, 4.0).any()
    air = Volume(np.full((6, 6, 6), -1000, np.int16), frame((6, 6, 6)))
    assert not find_body(air.hu, 4.0).any() and not find_lungs(air.hu, 4.0).any()
    assert find_body(np.full((4, 4, 4), 40, np.int16), 4.0).all()
