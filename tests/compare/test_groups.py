"""Two groups of slides, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, wilcoxon

from slidetl.compare.config import Arm, Comparison, Groups, Primary
from slidetl.compare.groups import members_of, shift_between
from slidetl.data.manifest import ManifestRow
from slidetl.errors import UsageError
from slidetl.evaluation.comparison import Unit

COMPARISON = Comparison(
    manifest="manifest.csv",
    cache="cache",
    arms={"prior": Arm(baseline="prior"), "site": Arm(baseline="site")},
    primary=Primary("prior", "site"),
    groups=Groups("block", "before", "after"),
)


def row(slide: str, patient: str, block: str) -> ManifestRow:
    return ManifestRow(2, slide, Path("none.tiff"), patient, grade=0, block=block)


def test_slides_are_told_apart_by_their_column() -> None:
    rows = [row("a", "p", "before"), row("b", "p", "after"), row("c", "q", "other"), row("d", "q", "")]
    assert members_of(COMPARISON, rows).tolist() == [0, 1, -1, -1]
    assert members_of(replace(COMPARISON, groups=None), rows).tolist() == [-1] * 4


def test_a_group_without_slides_is_said() -> None:
    with pytest.raises(UsageError, match="no slide has 'after' as its block; there are before, other"):
        members_of(COMPARISON, [row("a", "p", "before"), row("b", "q", "other")])


def test_a_group_spelled_twice_is_refused() -> None:
    rows = [row("a", "p", "before"), row("b", "p", "after"), row("c", "q", "Before ")]
    with pytest.raises(
        UsageError, match="'Before ', the block of some slides, may be 'before', spelled twice"
    ):
        members_of(COMPARISON, rows)


def test_a_group_is_not_compared_with_itself() -> None:
    with pytest.raises(UsageError, match="'x' is compared with itself"):
        Groups("site", "x", "x")


def test_patients_in_both_groups_are_compared_with_themselves() -> None:
    patients = np.array(list("aabbccd"))
    members = np.array([0, 1, 0, 1, 0, 1, 1])
    scores = np.array([3.0, 2.0, 2.5, 2.0, 4.0, 2.5, 9.0])  # d has nothing before
    found = shift_between(scores, members, patients, "mean")
    assert found is not None
    assert found.paired
    assert (found.n_first, found.shift.estimate) == (3, -1.0)
    assert found.p == wilcoxon([-1.0, -0.5, -1.5]).pvalue


def test_different_patients_are_compared_by_the_means_of_their_slides() -> None:
    patients = np.array(list("aabcdef"))
    members = np.array([0, 0, 0, 1, 1, 1, -1])
    scores = np.array([1.0, 2.0, 1.0, 3.0, 2.5, 4.0, 0.0])
    found = shift_between(scores, members, patients, "mean")
    assert found is not None
    assert not found.paired
    assert (found.n_first, found.n_second) == (2, 3)
    assert found.shift.estimate == pytest.approx(1.75)  # of 1, 1.5, 1.5, 2, 2.5 and 3
    assert found.p == mannwhitneyu([3.0, 2.5, 4.0], [1.5, 1.0]).pvalue
    assert found.superiority == 1


@pytest.mark.parametrize(
    ("unit", "scores"), [("worst", [2.0, 1.0, 3.0, 2.5, 4.0]), ("slide", [1.5, 1.0, 3.0, 2.5, 4.0])]
)
def test_a_patient_is_one_score_as_the_unit_says(unit: Unit, scores: list[float]) -> None:
    found = shift_between(
        np.array([1.0, 2.0, 1.0, 3.0, 2.5, 4.0]), np.array([0, 0, 0, 1, 1, 1]), np.array(list("aabcde")), unit
    )
    assert found is not None
    assert found.p == mannwhitneyu(scores[2:], scores[:2]).pvalue
    assert found.shift.estimate == np.median(np.subtract.outer(scores[2:], scores[:2]))


@pytest.mark.parametrize("members", [[0, 0, 0, 1], [0, 1, -1, -1], [0, 0, -1, -1]])
def test_a_single_patient_is_no_group(members: list[int]) -> None:
    assert shift_between(np.arange(4.0), np.array(members), np.array(list("abcd")), "mean") is None
