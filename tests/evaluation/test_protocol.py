from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetl.errors import UsageError
from slidetl.evaluation.comparison import chance_p
from slidetl.evaluation.protocol import (
    Case,
    Fold,
    InnerFold,
    Protocol,
    audit_folds,
    canonical_sha256,
    check_permutations,
    folds_to_json,
    permute_grades,
    plan_folds,
    splits_sha256,
    subsample,
)


def cohort(n_slides: int = 100, n_patients: int = 60, n_grades: int = 5, n_sites: int = 3) -> list[Case]:
    """Patients of one site and one grade each, slides dealt out in turn."""
    return [
        Case(
            f"slide-{number:03d}",
            f"patient-{number % n_patients:03d}",
            number % n_patients % n_grades,
            f"site-{number % n_patients % n_sites}",
        )
        for number in range(n_slides)
    ]


@st.composite
def cohorts(draw: st.DrawFn) -> list[Case]:
    n_grades = draw(st.integers(2, 4))
    cases = []
    for patient in range(draw(st.integers(8 * n_grades, 40))):
        for slide in range(draw(st.integers(1, 3))):
            cases.append(Case(f"s{patient}-{slide}", f"p{patient}", patient % n_grades))
    return cases


@settings(max_examples=40)  # an example plans dozens of folds
@given(cases=cohorts(), seed=st.integers(0, 1000), repeats=st.integers(1, 2), k=st.integers(2, 4))
def test_folds_are_disjoint_by_patient_and_cover_every_slide_once(
    cases: list[Case], seed: int, repeats: int, k: int
) -> None:
    n_grades = 1 + max(case.grade for case in cases)
    folds = plan_folds(cases, Protocol(repeats, k, 2, seed), n_grades)
    patient = {case.slide_id: case.patient_id for case in cases}
    grade = {case.slide_id: case.grade for case in cases}
    assert len(folds) == repeats * k
    for repeat in range(repeats):
        tested = [slide for fold in folds if fold.repeat == repeat for slide in fold.test]
        assert sorted(tested) == sorted(patient)
    for fold in folds:
        assert sorted((*fold.train, *fold.test)) == sorted(patient)
        assert not {patient[s] for s in fold.train} & {patient[s] for s in fold.test}
        assert {grade[s] for s in fold.train} == set(range(n_grades))
        held_out = [slide for inner in fold.inner for slide in inner.validation]
        assert sorted(held_out) == list(fold.train)
        for inner in fold.inner:
            assert sorted((*inner.train, *inner.validation)) == list(fold.train)
            assert not {patient[s] for s in inner.train} & {patient[s] for s in inner.validation}
    audit_folds(folds, cases, {slide: slide for slide in patient})


def test_the_mix_of_grades_is_about_the_same_in_each_test_part() -> None:
    cases = cohort(100, 100)
    grade = {case.slide_id: case.grade for case in cases}
    for fold in plan_folds(cases, Protocol(3, 5, 3), 5):
        counts = Counter(grade[slide] for slide in fold.test)
        assert {counts[g] for g in range(5)} <= {3, 4, 5}


def test_splits_depend_on_seed_and_repeat_but_not_on_the_order_of_slides() -> None:
    cases = cohort()
    shuffled = random.Random(0).sample(cases, len(cases))
    folds = plan_folds(cases, Protocol(2, 5, 3, seed=1), 5)
    assert plan_folds(shuffled, Protocol(2, 5, 3, seed=1), 5) == folds
    first, second = ({fold.test for fold in folds if fold.repeat == repeat} for repeat in (0, 1))
    assert first.isdisjoint(second)
    assert splits_sha256(folds) != splits_sha256(plan_folds(cases, Protocol(2, 5, 3, seed=2), 5))
    assert len({fold.seed for fold in folds}) == len(folds)


def test_the_hash_is_of_the_canonical_form() -> None:
    # printf '{"a":[1,2.5],"b":"\\u00e9"}' | sha256sum
    expected = "60d4fe7d84d09285a774fa6c850ed0e739e0153890529471751ae4df4e1df886"
    one, other = {"b": "é", "a": [1, 2.5]}, {"a": [1, 2.5], "b": "é"}
    assert canonical_sha256(one) == canonical_sha256(other) == expected
    assert canonical_sha256({"a": [2.5, 1], "b": "é"}) != canonical_sha256(one)
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_sha256(float("nan"))


def test_a_fold_on_disk_has_the_same_hash() -> None:
    folds = plan_folds(cohort(), Protocol(), 5)
    assert canonical_sha256(folds_to_json(folds)) == splits_sha256(folds)


def test_a_training_part_without_a_grade_is_refused_with_the_remedy() -> None:
    cases = [*cohort(40, 40, 4), Case("rare", "rare", 4)]
    with pytest.raises(
        UsageError, match=r"repeat 0, fold \d: no training slide has grade 4.*add such slides"
    ):
        plan_folds(cases, Protocol(1, 4, 0), 5)
    # Two patients: the outer folds are fine, an inner one cannot be.
    with pytest.raises(UsageError, match=r"an inner fold: no training slide has grade 4.*inner_folds"):
        plan_folds([*cases, Case("rare2", "rare2", 4)], Protocol(1, 4, 2), 5)


def test_one_site_is_left_out_and_a_grade_that_only_it_has_is_a_warning() -> None:
    cases = cohort(90, 90)
    folds = plan_folds(cases, Protocol(1, 5, 2, leave_one_site_out=True), 5)
    site = {case.slide_id: case.site for case in cases}
    assert [fold.name for fold in folds] == ["site-0", "site-1", "site-2"]
    for fold in folds:
        assert {site[slide] for slide in fold.test} == {fold.name}
        assert fold.name not in {site[slide] for slide in fold.train}
    only = [replace(case, grade=4 if case.site == "site-1" else case.grade % 4) for case in cases]
    with pytest.warns(UserWarning, match="fold site-1: no training slide has grade 4"):
        plan_folds(only, Protocol(1, 5, 0, leave_one_site_out=True), 5)
    with pytest.raises(UsageError, match="at least two sites"):
        plan_folds([replace(case, site="") for case in cases], Protocol(leave_one_site_out=True), 5)


@pytest.mark.parametrize("other", ["Site-0", "site\u20130", "site-00"])
@pytest.mark.parametrize(
    "protocol", [Protocol(leave_one_site_out=True), Protocol(outer_folds=2, external_site="site-0")]
)
def test_a_site_spelled_twice_is_not_put_on_both_sides(protocol: Protocol, other: str) -> None:
    cases = [*cohort(60, 60), Case("x", "x", 0, other)]
    with pytest.raises(
        UsageError, match=rf"sites '{other}' and 'site-0' may be one|sites 'site-0' and '{other}'"
    ):
        plan_folds(cases, protocol, 5)
    for external in ("", "site-1"):  # no part depends on the two
        assert plan_folds(cases, Protocol(outer_folds=2, external_site=external), 5)


def test_a_patient_at_two_sites_is_not_trained_on_when_either_is_tested() -> None:
    cases = [*cohort(60, 60, 2, 3), Case("a", "both", 0, "site-0"), Case("b", "both", 1, "site-1")]
    folds = plan_folds(cases, Protocol(1, 5, 0, leave_one_site_out=True), 2)
    trained = {fold.name: {"a", "b"} & set(fold.train) for fold in folds}
    assert trained == {"site-0": set(), "site-1": set(), "site-2": {"a", "b"}}
    assert [slide for fold in folds for slide in fold.test if slide in "ab"] == ["a", "b"]


def test_the_given_split_is_used_once_with_its_val_as_the_inner_fold() -> None:
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    cases = [replace(case, split=splits[i % 10]) for i, case in enumerate(cohort(100, 100, 2))]
    (fold,) = plan_folds(cases, Protocol(given_split=True), 2)
    of = {part: sorted(c.slide_id for c in cases if c.split == part) for part in ("train", "val", "test")}
    assert list(fold.test) == of["test"]
    assert sorted((*of["train"], *of["val"])) == list(fold.train)
    assert fold.inner == (InnerFold(tuple(of["train"]), tuple(of["val"])),)
    (plain,) = plan_folds(cases, Protocol(given_split=True, inner_folds=0), 2)
    assert plain.inner == ()
    with pytest.raises(UsageError, match="a slide has no 'split'"):
        plan_folds(cohort(), Protocol(given_split=True), 5)


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(UsageError, match="6 slides of 3 patients are too few for 4 folds; lower"):
        plan_folds(cohort(6, 3, 2), Protocol(1, 4, 0), 2)
    with pytest.raises(UsageError, match="slide 'slide-004' has another"):
        plan_folds(cohort(), Protocol(), 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repeats": 0}, "repeats >= 1"),
        ({"outer_folds": 1}, "outer_folds >= 2"),
        ({"inner_folds": 1}, "at least 2"),
        ({"seed": -1}, "seed must be"),
        ({"unit": "best"}, "unit must be one of worst, mean, slide"),
        ({"given_split": True, "leave_one_site_out": True}, "exclude each other"),
    ],
)
def test_a_protocol_that_cannot_be_meant(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Protocol(**values)  # type: ignore[arg-type]


def handmade(train: tuple[str, ...], test: tuple[str, ...], inner: tuple[InnerFold, ...] = ()) -> list[Fold]:
    return [Fold(0, "0", 0, train, test, inner)]


CASES = [Case("a", "P1", 0), Case("b", "P1", 1), Case("c", "P2", 0), Case("d", "P3", 1)]
CONTENT = {"a": "1", "b": "2", "c": "3", "d": "4"}


def test_the_audit_finds_a_patient_on_both_sides() -> None:
    with pytest.raises(UsageError, match="repeat 0, fold 0: training and test part share patient 'P1'"):
        audit_folds(handmade(("a", "c"), ("b", "d")), CASES, CONTENT)
    inner = (InnerFold(("a",), ("b",)),)
    with pytest.raises(UsageError, match="training and validation part share patient 'P1'"):
        audit_folds(handmade(("a", "b"), ("c", "d"), inner), CASES, CONTENT)


def test_the_audit_finds_one_slide_under_two_names() -> None:
    with pytest.raises(UsageError, match=re.escape("the same slide as 'a' and 'd'; remove one")):
        audit_folds(handmade(("a", "b"), ("c", "d")), CASES, {**CONTENT, "d": "1"})


@pytest.mark.parametrize("pair", [("b", "c"), ("c", "b")])
def test_the_audit_finds_slides_that_look_alike(pair: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match=r"look alike, '.' and '.' \(correlation 0.970\); remove one"):
        audit_folds(handmade(("a", "b"), ("c", "d")), CASES, CONTENT, [(*pair, 0.97)])
    audit_folds(handmade(("a", "b"), ("c", "d")), CASES, CONTENT, [("a", "b", 0.99), ("c", "d", 0.99)])


INNER = (InnerFold(("a", "b"), ("c",)),)  # choices are made on "c" by networks trained on "a" and "b"


def test_the_audit_finds_one_slide_under_two_names_in_an_inner_fold() -> None:
    folds = handmade(("a", "b", "c"), ("d",), INNER)
    audit_folds(folds, CASES, CONTENT)
    with pytest.raises(UsageError, match="training and validation part hold the same slide as 'b' and 'c'"):
        audit_folds(folds, CASES, {**CONTENT, "c": CONTENT["b"]})


@pytest.mark.parametrize("pair", [("b", "c"), ("c", "b")])
def test_the_audit_finds_slides_that_look_alike_in_an_inner_fold(pair: tuple[str, str]) -> None:
    folds = handmade(("a", "b", "c"), ("d",), INNER)
    with pytest.raises(UsageError, match=r"training and validation part hold slides that look alike, '[bc]'"):
        audit_folds(folds, CASES, CONTENT, [(*pair, 0.97)])
    audit_folds(folds, CASES, CONTENT, [("a", "b", 0.99)])


@pytest.mark.slow
@settings(max_examples=25)
@given(n=st.integers(10, 60), seed=st.integers(0, 50))
def test_a_smaller_training_part_lies_within_larger_ones_and_has_every_grade(n: int, seed: int) -> None:
    cases = cohort()
    grade = {case.slide_id: case.grade for case in cases}
    fold = plan_folds(cases, Protocol(1, 5, 2, seed), 5)[0]
    small, large = subsample(fold, cases, n, 5), subsample(fold, cases, n + 10, 5)
    assert len(small.train) == n
    assert set(small.train) <= set(large.train) <= set(fold.train)
    assert {grade[slide] for slide in small.train} == set(range(5))
    assert (small.test, small.seed, small.inner) == (fold.test, fold.seed, ())


def test_a_training_part_cannot_grow() -> None:
    fold = plan_folds(cohort(), Protocol(), 5)[0]
    with pytest.raises(UsageError, match=r"expected a training part of 5 to \d+ slides, not 101"):
        subsample(fold, cohort(), 101, 5)


def test_a_training_part_too_small_for_a_patient_of_each_grade_is_refused() -> None:
    cases = [Case(f"{patient}-{slide}", f"{patient}", patient) for patient in range(2) for slide in range(5)]
    (fold,) = handmade(tuple(case.slide_id for case in cases), ("x",))
    with pytest.raises(UsageError, match=r"3 slides do not hold all 2 grades; raise 'sizes\.slides'"):
        subsample(fold, cases, 3, 2)
    assert len(subsample(fold, cases, 6, 2).train) == 6


def test_permuted_grades_stay_together_by_patient() -> None:
    cases = [Case(f"{patient}-{slide}", f"{patient}", patient) for patient in range(20) for slide in "ab"]
    cases.append(Case("alone", "alone", 3))
    grades = permute_grades(cases, Protocol(), 0)
    assert grades["alone"] == 3  # the only patient with one slide
    assert sorted(grades.values()) == sorted(case.grade for case in cases)
    assert all(grades[f"{patient}-a"] == grades[f"{patient}-b"] for patient in range(20))
    assert sum(grades[case.slide_id] == case.grade for case in cases) < 10
    assert permute_grades(cases, Protocol(), 0) == grades
    assert permute_grades(cases, Protocol(), 1) != grades


@pytest.mark.parametrize(
    "protocol",
    [Protocol(repeats=2, given_split=True), Protocol(leave_one_site_out=True, inner_folds=0)],
    ids=["given_split", "leave_one_site_out"],
)
def test_permuted_grades_stay_in_the_parts_that_the_manifest_fixes(protocol: Protocol) -> None:
    parts = [("north", "train"), ("north", "val"), ("south", "test")]
    cases = [
        Case(f"{n:02}-{slide}", f"{n:02}", (n // 3 + n % 3) % (2 + n % 3), *parts[n % 3])
        for n in range(60)
        for slide in range(1 + n % 2)
    ]
    name = "split" if protocol.given_split else "site"

    def shares(grades: Mapping[str, int]) -> Counter[tuple[str, int]]:
        return Counter((getattr(case, name), grades[case.slide_id]) for case in cases)

    own = {case.slide_id: case.grade for case in cases}
    for seed in range(5):
        grades = permute_grades(cases, protocol, seed)
        assert shares(grades) == shares(own) != shares(permute_grades(cases, Protocol(), seed))
        assert sum(grades[slide] != own[slide] for slide in own) > 20


def test_permutations_that_are_often_the_labels_are_refused() -> None:
    """Three sites of four patients, with one to four slides, and with one; of grades 0, 0, 1, 1."""

    def cases(most: int) -> list[Case]:
        return [
            Case(f"{site}-{n}-{slide}", f"{site}-{n}", n // 2, f"site {site}", "train")
            for site in range(3)
            for n in range(4)
            for slide in range(1 + n % most)
        ]

    protocol = Protocol(leave_one_site_out=True)
    own = {case.slide_id: case.grade for case in cases(4)}
    assert all(permute_grades(cases(4), protocol, seed) == own for seed in range(19))
    with pytest.raises(
        UsageError, match=r"at the same site, so 0 of 12 patients .* in 1 different ways; .* 190"
    ):
        check_permutations(cases(4), protocol, 19)
    check_permutations(cases(1), protocol, 21)  # 6 ways at each site
    with pytest.raises(UsageError, match=r"so 12 of 12 patients .* in 216 different ways; .* 220"):
        check_permutations(cases(1), protocol, 22)
    check_permutations(cases(1), Protocol(), 92)  # 924 ways, six of twelve
    with pytest.raises(UsageError, match=r"with as many slides in the same part of the given split, so 12"):
        check_permutations(cases(1), Protocol(given_split=True), 93)


@pytest.mark.parametrize("protocol", [Protocol(given_split=True), Protocol(leave_one_site_out=True)])
def test_parts_of_other_shares_of_the_grades_give_no_significance_against_chance(protocol: Protocol) -> None:
    """Of arms that know nothing of a slide: the commonest training grade, and a guess by chance."""
    found = np.zeros(2)
    for study in range(200):
        rng = np.random.default_rng(study)
        train, test = rng.choice(3, 60, p=[0.5, 0.3, 0.2]), rng.choice(3, 30, p=[0.8, 0.15, 0.05])
        cases = [Case(f"{n:02}", f"{n:02}", int(grade), "north", "train") for n, grade in enumerate(train)]
        cases += [Case(f"t{n:02}", f"t{n:02}", int(grade), "south", "test") for n, grade in enumerate(test)]
        tested = [case.slide_id for case in cases if case.split == "test"]
        guesses = rng.choice(3, 30, p=[0.8, 0.1, 0.1])

        def right(grades: Mapping[str, int]) -> tuple[float, float]:
            truth = np.array([grades[slide] for slide in tested])  # noqa: B023
            (commonest, _), *_ = Counter(grades[c.slide_id] for c in cases[:60]).most_common()  # noqa: B023
            return float(np.mean(truth == commonest)), float(np.mean(truth == guesses))  # noqa: B023

        observed = right({case.slide_id: case.grade for case in cases})
        null = np.array([right(permute_grades(cases, protocol, draw)) for draw in range(39)])
        found += [chance_p(of_arm, of_null) <= 0.05 for of_arm, of_null in zip(observed, null.T, strict=True)]
    constant, guessing = found / 200
    assert constant == 0 and guessing < 0.09  # .05 has a standard error of .015
