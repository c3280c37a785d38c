"""Planes through a CT volume: the place, the box and the sides, as a radiologist expects them."""

from __future__ import annotations

import numpy as np

from slidetl.grading.report.planes import Plane, planes_at
from slidetl.volumes.frame import VolumeFrame
from slidetl.volumes.volume import Volume

WINDOW = (-1000.0, 400.0)
SIDE = 8
FIRST_MM, POINT_MM = np.array([20, 5, 4]), np.array([23, 8, 9])


def planes() -> tuple[Plane, Plane, Plane]:
    """Cuts a volume of air with a bright place, flesh at the patient's right and front, and a grey top."""
    frame = VolumeFrame((40, 30, 20), (1, 1, 1), (0, 0, 0), tuple(np.eye(3).ravel()))
    hu = np.full((20, 30, 40), -1000, np.int16)
    hu[POINT_MM[2], POINT_MM[1], POINT_MM[0]] = 400
    hu[:, :2, :2] = -300
    hu[-1] = 100
    return planes_at(Volume(hu, frame), POINT_MM, FIRST_MM, SIDE, WINDOW)


def test_the_sides_are_a_radiologists() -> None:
    axial, coronal, sagittal = planes()
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
    axial = planes()[0]
    picture = axial.marked(400)  # ten times as large
    coloured = (picture != picture[..., :1]).any(axis=2)
    assert picture.shape == (300, 400, 3)
    assert coloured[49:51, 200:280].all() and coloured[129:131, 200:280].all()
    assert coloured[50:130, 199:201].all() and coloured[50:130, 279:281].all()
    assert not coloured[52:128, 202:278].any()
    assert coloured[85, :200].all() and coloured[85, 282:].all() and coloured[:50, 235].all()
    assert axial.within_box().shape == (SIDE, SIDE) and axial.within_box()[3, 3] == 255


def test_a_cube_beyond_the_volume_is_black_there() -> None:
    plane = Plane("axial", "RLAP", np.full((6, 5), 9, np.uint8), (-2, 3, 2, 7), (0, 5))
    face = plane.within_box()
    assert face.tolist() == [[0, 0, 9, 9]] * 3 + [[0, 0, 0, 0]]
    assert plane.marked(12).shape == (12, 10, 3)
