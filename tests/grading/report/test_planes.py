"""Planes through a CT volume: the place, the box and the sides, however the volume is stored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from slidetl.grading.report.planes import Plane, nearest_axes, planes_at
from slidetl.volumes.frame import VolumeFrame
from slidetl.volumes.volume import Volume

SIZES = np.array([40, 30, 20])  # of the patient, voxels of 1 mm along x, y, z
WINDOW = (-1000.0, 400.0)
SIDE = 8
FIRST_MM, POINT_MM = np.array([20, 5, 4]), np.array([23, 8, 9])


def stored(order: tuple[int, ...], signs: tuple[int, ...]) -> tuple[Volume, np.ndarray, np.ndarray]:
    """Stores one patient with axes in some order and sense; returns place and cube in its voxels, too."""
    matrix = np.zeros((3, 3))
    matrix[order, range(3)] = signs
    sizes = SIZES[list(order)]
    # The voxel axis k runs along the patient's axis order[k]; patient coordinates begin at 0.
    origin = np.zeros(3)
    origin[list(order)] = np.where(np.array(signs) < 0, sizes - 1, 0)
    size = (int(sizes[0]), int(sizes[1]), int(sizes[2]))
    frame = VolumeFrame(size, (1, 1, 1), tuple(origin), tuple(matrix.ravel()))  # type: ignore[arg-type]
    z, y, x = np.indices(size[::-1])
    at = frame.to_patient_mm(np.stack([x, y, z], axis=-1))
    hu = np.full(size[::-1], -1000, np.int16)
    hu[(np.abs(at - POINT_MM) < 0.5).all(axis=-1)] = 400
    hu[(at[..., 0] < 2) & (at[..., 1] < 2)] = -300  # the patient's right and front, all along
    hu[at[..., 2] > SIZES[2] - 1.5] = 100  # the top slice
    corners = frame.to_voxel([FIRST_MM, FIRST_MM + SIDE - 1])
    return Volume(hu, frame), frame.to_voxel(POINT_MM), corners.min(axis=0)


ORIENTATIONS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS[::5])
def test_planes_do_not_depend_on_storage(order: tuple[int, ...], signs: tuple[int, ...]) -> None:
    expected = planes_at(*stored((0, 1, 2), (1, 1, 1)), SIDE, WINDOW)
    for found, plane in zip(planes_at(*stored(order, signs), SIDE, WINDOW), expected, strict=True):
        assert (found.pixels == plane.pixels).all()
        assert (found.box_px, found.point_px) == (plane.box_px, plane.point_px)


def test_the_sides_are_a_radiologists() -> None:
    axial, coronal, sagittal = planes_at(*stored((0, 1, 2), (1, 1, 1)), SIDE, WINDOW)
    assert [plane.pixels.shape for plane in (axial, coronal, sagittal)] == [(30, 40), (20, 40), (20, 30)]
    assert (axial.name, axial.sides) == ("axial", "RLAP")
    assert axial.pixels[0, 0] > 0 and axial.pixels[-1, -1] == 0
    assert coronal.sides == "RLHF"
    assert (coronal.pixels[0] > 0).all()  # the head is at the top
    assert sagittal.sides == "APHF"
    assert (sagittal.pixels[0] > 0).all()
    for plane, point in ((axial, (23, 8)), (coronal, (23, 19 - 9)), (sagittal, (8, 19 - 9))):
        assert list(plane.point_px) == list(point)
        assert plane.pixels[point[1], point[0]] == 255
    assert list(axial.box_px) == [20, 5, 28, 13]
    assert list(coronal.box_px) == [20, 8, 28, 16]  # z 4 to 12 of 20, from above
    assert list(sagittal.box_px) == [5, 8, 13, 16]


def test_the_mark_leaves_the_inside_of_the_box_as_it_is() -> None:
    axial = planes_at(*stored((0, 1, 2), (1, 1, 1)), SIDE, WINDOW)[0]
    picture = axial.marked()
    coloured = (picture != picture[..., :1]).any(axis=2)
    assert coloured[5, 20:28].all() and coloured[12, 20:28].all()
    assert coloured[5:13, 20].all() and coloured[5:13, 27].all()
    assert not coloured[6:12, 21:27].any()
    assert coloured[8, :20].all() and coloured[8, 28:].all() and coloured[:5, 23].all()
    assert axial.within_box().shape == (SIDE, SIDE) and axial.within_box()[3, 3] == 255


def test_a_cube_beyond_the_volume_is_black_there() -> None:
    plane = Plane("axial", "RLAP", np.full((6, 5), 9, np.uint8), (-2, 3, 2, 7), (0, 5))
    face = plane.within_box()
    assert face.tolist() == [[0, 0, 9, 9]] * 3 + [[0, 0, 0, 0]]
    assert plane.marked().shape == (6, 5, 3)


def test_tilted_axes_count_as_the_nearest() -> None:
    tilt = np.deg2rad(20)
    turn = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    frame = VolumeFrame((4, 4, 4), (1, 1, 1), (0, 0, 0), tuple((turn * [1, -1, 1]).ravel()))
    axes, flips = nearest_axes(frame)
    assert axes.tolist() == [0, 1, 2] and flips.tolist() == [False, True, False]
