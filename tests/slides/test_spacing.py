from __future__ import annotations

import math
from pathlib import Path

import pytest

from slidetl.errors import SpacingError, UsageError
from slidetl.slides.spacing import check_given, cohort_notes, request_note, settle_spacing

SLIDE = Path("slide.svs")


def test_overriding_fills_gaps_and_replacing_replaces() -> None:
    own = (0.25, 0.25)
    assert settle_spacing(SLIDE, None, 0.5, None) == ((0.5, 0.5), ())
    mpp, notes = settle_spacing(SLIDE, own, 0.5, None)
    assert mpp == own and "is kept" in notes[0] and "--mpp-replace" in notes[0]
    mpp, notes = settle_spacing(SLIDE, own, None, 0.5)
    assert mpp == (0.5, 0.5) and notes == ("the spacing given, 0.5 um per pixel, replaces the file's own",)
    mpp, notes = settle_spacing(SLIDE, own, 0.6, (0.3, 0.31))
    assert mpp == (0.3, 0.31) and "replaces" in notes[0]
    assert settle_spacing(SLIDE, own, 0.2501, None)[1] == settle_spacing(SLIDE, own, None, 0.2501)[1] == ()


@pytest.mark.parametrize("stated", [1e-4, 1e6, 0.0, math.inf])
def test_what_cannot_be_is_no_spacing(stated: float) -> None:
    with pytest.raises(SpacingError, match=r"--mpp-override or in the manifest.*which cannot be"):
        settle_spacing(SLIDE, (stated, stated), None, None)
    assert settle_spacing(SLIDE, (stated, stated), 0.5, None) == ((0.5, 0.5), ())


@pytest.mark.parametrize("given", [0.0, -1.0, 1e-4, 1e6, math.nan, math.inf])
def test_a_spacing_given_has_bounds(given: float) -> None:
    with pytest.raises(UsageError, match=r"--mpp-replace must be from 0\.01 to 100,000"):
        check_given("--mpp-replace", given)
    for options in ((given, None), (None, given), (None, (0.5, given))):
        with pytest.raises(SpacingError, match=r"must be from 0\.01 to 100,000"):
            settle_spacing(SLIDE, None, *options)


@pytest.mark.parametrize(
    ("mpp", "power", "is_doubtful"),
    [
        # Aperio, Hamamatsu, Ventana, MIRAX 20x, Zeiss 20x, an overview.
        *[(0.2525, 40, False), (0.2268, 40, False), (0.2325, 40, False), (0.2325, 20, False)],
        *[(0.22, 20, False), (8.0, 1.25, False)],
        *[(0.025, 40, True), (0.2325, 10, True), (2.5, 40, True), (0.5, 40, True), (0.05, 20, True)],
        *[(0.25, None, False), (0.025, None, True), (352.8, None, True), (250, 40, True)],
    ],
)
def test_spacing_against_the_objective(mpp: float, power: float | None, is_doubtful: bool) -> None:
    _, notes = settle_spacing(SLIDE, (mpp, mpp), None, None, power)
    assert len(notes) == is_doubtful
    assert all("--mpp-replace" in note and ";" not in note for note in notes)


def test_spacing_against_the_cohort_and_the_request() -> None:
    assert not cohort_notes({}) and not cohort_notes({"a": 0.25, "b": 0.25, "c": 1.0, "failed": 0.0})
    # What is a printer's has a note of its own, and no part in the median.
    found = cohort_notes({"a": 0.25, "b": 0.25, "fine": 0.025, "coarse": 2.5, "72 dpi": 352.8})
    assert found.keys() == {"fine", "coarse"}
    assert all("far from the median of 0.25" in note and "--mpp-replace" in note for note in found.values())
    assert request_note(4.0, 0.25) is None
    assert "--mpp 20 is 20 times the slide's own or more" in (request_note(20, 0.5) or "")


def test_pixels_far_from_square_are_said() -> None:
    assert settle_spacing(SLIDE, (0.25, 0.27), None, None)[1] == ()
    assert "far from square" in settle_spacing(SLIDE, (0.25, 2.5), None, None)[1][0]
