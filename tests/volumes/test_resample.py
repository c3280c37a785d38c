"""Resampling: ramps stay, fine patterns do not alias, and SimpleITK agrees where it does the same."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from slidetl.volumes.resample import axis_weights, resample
from slidetl.volumes.volume import Volume
from tests.volumes.phantom import frame

spacings = st.floats(0.4, 3.0)


@given(st.tuples(spacings, spacings, spacings), st.floats(0.5, 4.0), st.tuples(*[st.floats(-8, 8)] * 3))
def test_a_ramp_stays_the_ramp(
    spacing: tuple[float, float, float], wanted: float, slope: tuple[float, float, float]
) -> None:
    about = frame((20, 18, 16), spacing, (3.0, -7.0, 11.0))

    def ramp(z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.rint(100 + slope[0] * x + slope[1] * y + slope[2] * z)

    def coordinates(of: object) -> list[np.ndarray]:
        index = np.indices(of.size_voxel[::-1])  # type: ignore[attr-defined]
        points = of.to_patient_mm(np.moveaxis(index[::-1], 0, -1))  # type: ignore[attr-defined]
        return [points[..., 2], points[..., 1], points[..., 0]]

    found = resample(Volume(ramp(*coordinates(about)).astype(np.int16), about), wanted)
    z, y, x = coordinates(found.frame)
    # Within the reach of the filter of the border, the outermost value counts instead of the ramp.
    margin = [2 * max(wanted, s) for s in spacing]
    low, high = about.to_patient_mm((0, 0, 0)), about.to_patient_mm(np.array(about.size_voxel) - 1)
    is_inner = np.ones(x.shape, bool)
    for values, m, a, b in zip((x, y, z), margin, low, high, strict=True):
        is_inner &= (values >= a + m) & (values <= b - m)
    assert np.abs(found.hu - ramp(z, y, x))[is_inner].max(initial=0) <= 1.51  # three roundings


def test_simpleitk_interpolates_the_same_towards_a_finer_spacing() -> None:
    rng = np.random.default_rng(0)
    about = frame((12, 10, 8), (0.9, 1.1, 2.5), (1.0, 2.0, 3.0))
    volume = Volume(rng.integers(-1000, 1000, about.size_voxel[::-1], dtype=np.int16), about)
    found = resample(volume, 0.8)
    image = sitk.GetImageFromArray(volume.hu.astype(np.float64))
    image.SetSpacing(about.spacing_mm)
    image.SetOrigin(about.origin_mm)
    to = found.frame
    other = sitk.Resample(
        image,
        to.size_voxel,
        sitk.Transform(),
        sitk.sitkLinear,
        to.origin_mm,
        to.spacing_mm,
        to.direction,
        -9999.0,
    )
    theirs = sitk.GetArrayFromImage(other)
    is_inside = theirs > -9999
    assert is_inside.mean() > 0.7
    assert np.abs(theirs - found.hu)[is_inside].max() <= 0.51


def test_a_pattern_finer_than_the_new_spacing_is_averaged_and_not_folded() -> None:
    hu = np.where(np.indices((24, 24, 24)).sum(0) % 2, 1000, -1000).astype(np.int16)
    found = resample(Volume(hu, frame((24, 24, 24))), 2.5).hu[2:-2, 2:-2, 2:-2]
    assert np.abs(found).max() < 20


def test_equal_spacing_keeps_each_value() -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7), dtype=np.int16)
    assert np.array_equal(resample(Volume(hu, frame((7, 6, 5))), 1.0).hu, hu)


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.2, 2.0, 3.7])
def test_weights_add_up_and_widen_with_the_spacing(scale: float) -> None:
    weights = axis_weights(100, 1.0, round(100 / scale), scale).toarray()
    assert np.allclose(weights.sum(1), 1) and (weights >= 0).all()
    middle = weights[len(weights) // 2]
    centre = (len(weights) // 2 + 0.5) * scale - 0.5
    places = np.arange(100)
    assert (middle * places).sum() == pytest.approx(centre, abs=1e-4)
    if scale > 1:  # the variance of a triangle of this width
        assert (middle * (places - centre) ** 2).sum() == pytest.approx(scale**2 / 6, abs=0.2)
