"""Looks of arms, and points of a curve."""

from __future__ import annotations

from slidetl.compare.report.tables import risk_at
from slidetl.compare.report.view import looks_of
from slidetl.evaluation.conformal import ReferralPoint, RiskCoverage


def test_no_two_serious_arms_look_alike() -> None:
    names = [f"arm-{number}" for number in range(20)]
    looks = looks_of(names)
    assert list(looks) == names
    assert len({(look.colour, look.line) for look in looks.values()}) == 20
    assert len({(look.colour, look.marker) for look in looks.values()}) == 20


def test_trivial_arms_are_grey_and_take_no_colour_from_the_others() -> None:
    looks = looks_of(["prior", "scratch", "site"], ["prior", "site"])
    assert looks["scratch"] == looks_of(["scratch"])["scratch"]
    assert looks["prior"].colour == looks["site"].colour != looks["scratch"].colour
    assert looks["prior"].marker != looks["site"].marker


def test_the_risk_is_that_of_the_least_coverage_which_suffices() -> None:
    points = ((0.9, 0.2, 0.0, 0.5), (0.8, 0.5, 0.1, 0.6), (0.7, 1.0, 0.3, 0.7))
    curve = RiskCoverage(tuple(ReferralPoint(*point) for point in points), 0.1, 0.95)
    assert [risk_at(curve, coverage) for coverage in (0.1, 0.5, 0.51, 1.0)] == [0.0, 0.1, 0.3, 0.3]
