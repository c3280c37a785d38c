"""Geometry of volumes: any position and direction, there and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from slidetl.errors import VolumeError
from slidetl.volumes.frame import VolumeFrame
from slidetl.volumes.series import turned
from slidetl.volumes.volume import Volume
from tests.volumes.phantom import frame

numbers = st.floats(-500, 500)
spacings = st.floats(0.2, 6.0)


@st.composite
def frames(draw: st.DrawFn) -> VolumeFrame:
    """Any frame: turned by any rotation, and mirrored along some axes."""
    turn = Rotation.from_euler("xyz", [draw(st.floats(-np.pi, np.pi)) for _ in range(3)])
    signs = [draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)]
    size = tuple(draw(st.integers(1, 5)) for _ in range(3))
    spacing = tuple(draw(spacings) for _ in range(3))
    origin = tuple(draw(numbers) for _ in range(3))
    matrix = turn.as_matrix() * signs
    return VolumeFrame(size, spacing, origin, tuple(matrix.ravel().tolist()))  # type: ignore[arg-type]


@given(frames(), st.tuples(numbers, numbers, numbers))
def test_patient_coordinates_round_trip_for_any_direction(
    about: VolumeFrame, point: tuple[float, float, float]
) -> None:
    assert np.allclose(about.to_patient_mm(about.to_voxel(point)), point, atol=1e-6)
    assert np.allclose(about.to_patient_mm((0, 0, 0)), about.origin_mm)
    step = about.to_patient_mm((0, 1, 0)) - about.origin_mm
    assert np.allclose(step, about.matrix[:, 1] * about.spacing_mm[1])


@given(frames(), st.integers(0, 2**32 - 1))
def test_a_turned_volume_has_each_value_at_its_place(about: VolumeFrame, seed: int) -> None:
    rng = np.random.default_rng(seed)
    volume = Volume(rng.integers(-1000, 1000, about.size_voxel[::-1], dtype=np.int16), about)
    found = turned(volume)
    index = rng.integers(0, about.size_voxel)
    x, y, z = np.rint(found.frame.to_voxel(about.to_patient_mm(index))).astype(int)
    assert found.hu[z, y, x] == volume.hu[tuple(index[::-1])]
    assert sorted(found.hu.ravel()) == sorted(volume.hu.ravel())
    # No other order and direction of the axes is nearer to left, back and head.
    assert (np.diag(found.direction) >= -1e-9).all()
    assert np.trace(found.direction) >= np.abs(volume.direction).max(0).min()


@given(frames(), spacings)
def test_another_spacing_keeps_the_corner(about: VolumeFrame, spacing: float) -> None:
    other = about.at_spacing(spacing)
    assert np.allclose(other.to_patient_mm((-0.5, -0.5, -0.5)), about.to_patient_mm((-0.5, -0.5, -0.5)))
    assert np.all(np.abs(np.subtract(other.extent_mm, about.extent_mm)) <= max(spacing / 2, spacing) + 1e-9)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (((0, 1, 1), (1, 1, 1), (0, 0, 0), np.eye(3)), "positive sizes and spacings"),
        (((1, 1, 1), (1, -1, 1), (0, 0, 0), np.eye(3)), "positive sizes and spacings"),
        (((1, 1, 1), (1, 1, 1), (0, 0, np.nan), np.eye(3)), "origin_mm must be 3 finite numbers"),
        (((1, 1, 1), (1, 1, 1), (0, 0, 0), np.eye(3) * 1.1), "unit vectors at right angles"),
    ],
)
def test_a_senseless_frame_is_refused(values: tuple[object, ...], says: str) -> None:
    size, spacing, origin, matrix = values
    with pytest.raises(VolumeError, match=says):
        VolumeFrame(size, spacing, origin, tuple(np.asarray(matrix).ravel()))  # type: ignore[arg-type]


def test_a_volume_must_fit_its_frame() -> None:
    with pytest.raises(VolumeError, match="needs int16 numbers"):
        Volume(np.zeros((2, 3, 4), np.int16), frame((2, 3, 4)))
    assert frame((4, 3, 2)).is_inside((3.4, 0, 0)) and not frame((4, 3, 2)).is_inside((3.6, 0, 0))
