"""Plans a repeated nested cross-validation of a hundred slides without leaks.

Folds are planned before anything is fitted, are the same for all arms of a comparison, and can be hashed. The
test part of a fold is predicted once; choices are made in inner folds of its training part.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slidetl.errors import UsageError
from slidetl.evaluation.comparison import Unit
from slidetl.evaluation.folds import stratified_folds
from slidetl.text import distinct, spelled_twice

UNITS: tuple[Unit, ...] = ("worst", "mean", "slide")


@dataclass(frozen=True)
class Protocol:
    """The splits of a comparison, and the unit of a result.

    Attributes:
        repeats: R, how often the whole cross-validation is done, with other seeds, and other folds unless
            these are sites or the given split.
        outer_folds: K, each with its test part; ignored for sites or the given split.
        inner_folds: folds of each training part, for choices; 0: nothing is chosen ("not nested").
        seed: of all folds, and through them of all trainings.
        unit: how several slides of a patient become one result.
        leave_one_site_out: each test part is one site. A grade missing at the other sites is then a warning.
        given_split: the manifest's ``split`` column instead: trained on ``train`` and ``val``, tested once
            per repeat on ``test``; ``val`` is the one inner fold.
        external_site: site of slides to grade by the model of each fold, and to report apart; no fold trains
            or tests on them. Empty for none.
    """

    repeats: int = 1
    outer_folds: int = 5
    inner_folds: int = 3
    seed: int = 0
    unit: Unit = "worst"
    leave_one_site_out: bool = False
    given_split: bool = False
    external_site: str = ""

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.outer_folds < 2 or self.inner_folds < 0 or self.inner_folds == 1:
            raise UsageError(
                "protocol: expected repeats >= 1, outer_folds >= 2 and inner_folds of 0 (not nested) or at "
                f"least 2, not {self.repeats}, {self.outer_folds}, {self.inner_folds}"
            )
        if self.seed < 0:
            raise UsageError(f"protocol: seed must be at least 0, not {self.seed}")
        if self.unit not in UNITS:
            raise UsageError(f"protocol: unit must be one of {', '.join(UNITS)}, not {self.unit!r}")
        if self.leave_one_site_out and self.given_split:
            raise UsageError("protocol: leave_one_site_out and given_split exclude each other; choose one")
        if self.leave_one_site_out and self.external_site:
            raise UsageError("protocol: leave_one_site_out and external_site exclude each other; choose one")

    @property
    def is_nested(self) -> bool:
        """True if choices are made in inner folds."""
        return self.inner_folds > 0

    @property
    def repeats_folds(self) -> bool:
        """True if all repeats have the same outer folds."""
        return self.leave_one_site_out or self.given_split


@dataclass(frozen=True)
class Case:
    """A slide in a protocol.

    Attributes:
        slide_id, patient_id: from the manifest.
        grade: 0..K-1.
        site: empty if unknown.
        split: ``train``, ``val``, ``test``, or empty.
    """

    slide_id: str
    patient_id: str
    grade: int
    site: str = ""
    split: str = ""


@dataclass(frozen=True)
class InnerFold:
    """A training part cut in two once more; both are slide identifiers, sorted."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """One training and one test part.

    Attributes:
        repeat: 0..R-1.
        name: of the fold within its repeat: its number, its site, or ``test``.
        seed: of everything random in this fold, the same for every arm.
        train: slide identifiers, sorted.
        test: slide identifiers, sorted.
        inner: folds of ``train``; empty without choices.
        external: slides of the external site, graded beside ``test``, sorted.
    """

    repeat: int
    name: str
    seed: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    inner: tuple[InnerFold, ...] = ()
    external: tuple[str, ...] = ()


def plan_folds(cases: Sequence[Case], protocol: Protocol, n_grades: int) -> tuple[Fold, ...]:
    """Plans all folds of a comparison.

    Folds come from :func:`~slidetl.evaluation.folds.stratified_folds`: no patient is on two sides, and the
    mix of grades is about the same everywhere. The order of the cases does not matter.

    Args:
        cases: the graded slides.
        protocol: the way to split them.
        n_grades: K of the scale; each training part must have all of them.

    Raises:
        UsageError: a training part lacks a grade, a part is empty, there are too few patients, or the
            manifest has no such split or sites, or one site spelled twice; the message names the remedy.
    """
    cases = sorted(cases, key=lambda case: case.slide_id)
    strange = [case.slide_id for case in cases if not 0 <= case.grade < n_grades]
    if strange:
        raise UsageError(f"grades must be from 0 to {n_grades - 1}; slide {strange[0]!r} has another")
    site, external = protocol.external_site, tuple[str, ...]()
    if site or protocol.leave_one_site_out:
        _check_sites(cases, site)
    if site:
        external = _ids(case for case in cases if case.site == site)
        if not external:
            found = ", ".join(sorted({case.site or "''" for case in cases}))
            raise UsageError(f"protocol.external_site: no slide is of site {site!r}; there are {found}")
        cases = [case for case in cases if case.site != site]
    folds = []
    for repeat in range(protocol.repeats):
        for number, (name, train, test) in enumerate(_outer(cases, protocol, repeat)):
            where = f"repeat {repeat}, fold {name}"
            for part, members in (("training", train), ("test", test)):
                if not members:
                    raise UsageError(f"{where}: the {part} part is empty; ask for fewer folds")
            _check_grades(train, n_grades, where, protocol, inner=False)
            seed = _seed(protocol.seed, repeat, number)
            inner = tuple(_inner(train, protocol, seed))
            for fold in inner:
                chosen = set(fold.train)
                kept = [case for case in train if case.slide_id in chosen]
                _check_grades(kept, n_grades, f"{where}, an inner fold", protocol, inner=True)
            folds.append(Fold(repeat, name, seed, _ids(train), _ids(test), inner, external))
    return tuple(folds)


def subsample(
    fold: Fold, cases: Iterable[Case], n_slides: int, n_grades: int, subset: int = 0, subsets: int = 1
) -> Fold:
    """Returns the fold with fewer slides to train on, for the curve of accuracy against their number.

    Patients are taken in a random order, first those with a grade not yet there, until the part has
    ``n_slides``; the last patient may be cut. Smaller parts lie within larger ones. Of several ``subsets`` of
    a training part each has its own order and seed, and counts as a repeat. There are no inner folds:
    hyper-parameters are fixed, or come from the whole part.

    Raises:
        UsageError: the training part has fewer slides, or ``n_slides`` cannot hold each grade.
    """
    if not n_grades <= n_slides <= len(fold.train):
        raise UsageError(
            f"expected a training part of {n_grades} to {len(fold.train)} slides, not {n_slides}; "
            "change 'sizes.slides'"
        )
    members = set(fold.train)
    slides = _slides_of_patients(case for case in cases if case.slide_id in members)
    patients = sorted(slides)
    seed = _seed(fold.seed, subset) if subset else fold.seed
    order = [patients[index] for index in np.random.default_rng(seed).permutation(len(patients))]
    first, seen = [], set[int]()
    for patient in order:
        if not {case.grade for case in slides[patient]} <= seen:
            first.append(patient)
            seen |= {case.grade for case in slides[patient]}
    taken = [case for patient in dict.fromkeys([*first, *order]) for case in slides[patient]][:n_slides]
    if {case.grade for case in taken} != seen:
        raise UsageError(f"{n_slides} slides do not hold all {len(seen)} grades; raise 'sizes.slides'")
    return Fold(
        fold.repeat * subsets + subset, fold.name, seed, _ids(taken), fold.test, external=fold.external
    )


def permute_grades(cases: Iterable[Case], protocol: Protocol, seed: int) -> dict[str, int]:
    """Permutes grades over the patients, for a test against chance.

    A patient gives all its grades, in the order of its slides, to another one with as many slides: under the
    null hypothesis those are exchangeable. Where the protocol's parts are sites or the given split, no grade
    crosses between them: parts may have other shares of the grades, and without these the null would be
    another one (permutation within strata; Good, Permutation Tests, 2nd ed. 2000). The only patient with so
    many slides, of such parts, keeps its own. Returns the grade of each slide.
    """
    slides = _slides_of_patients(cases)
    rng = np.random.default_rng(seed)
    grades = {}
    for patients in _exchangeable(slides, protocol):
        for patient, giver in zip(patients, rng.permutation(patients).tolist(), strict=True):
            for case, given in zip(slides[patient], slides[giver], strict=True):
                grades[case.slide_id] = given.grade
    return grades


def check_permutations(cases: Iterable[Case], protocol: Protocol, n: int) -> None:
    """Checks that permuted grades differ from the grades themselves, for a test against chance.

    A permutation that changes no grade is as good as the labels, whatever an arm has learned. All different
    labelings are equally likely; with ten of them for each of ``n`` permutations, the labels are among these
    in at most a tenth of studies.

    Raises:
        UsageError: there are fewer labelings; the message tells how many patients can get other grades.
    """
    slides = _slides_of_patients(cases)
    labelings, movable = 1, 0
    for patients in _exchangeable(slides, protocol):
        same = Counter(tuple(case.grade for case in slides[patient]) for patient in patients)
        labelings *= math.factorial(len(patients)) // math.prod(map(math.factorial, same.values()))
        movable += len(patients) if len(same) > 1 else 0
    if labelings < 10 * n:
        raise UsageError(
            f"permutations: grades go to patients with as many slides{_within(protocol)}, so {movable} of "
            f"{len(slides)} patients can get other grades, in {labelings} different ways; expected at least "
            f"{10 * n} ways for {n} permutations, which would often be the labels themselves: leave "
            "'permutations' out, or take fewer of them or a protocol with larger parts"
        )


def folds_to_json(folds: Iterable[Fold]) -> list[dict[str, Any]]:
    """Converts folds to plain JSON values; without external slides these are not named."""
    values = [asdict(fold) for fold in folds]
    for fold in values:
        if not fold["external"]:
            del fold["external"]
    return list(json.loads(json.dumps(values)))


def canonical_sha256(value: object) -> str:
    """Hashes a JSON value by SHA-256 in its canonical form: sorted keys, no spaces, ASCII, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def splits_sha256(folds: Iterable[Fold]) -> str:
    """Hashes the parts of all folds: equal for equal splits, on any machine."""
    return canonical_sha256(folds_to_json(folds))


def audit_folds(
    folds: Iterable[Fold],
    cases: Iterable[Case],
    fingerprints: Mapping[str, str],
    near_duplicates: Iterable[tuple[str, str, float]] = (),
) -> None:
    """Checks that no patient, content or near-duplicate is on both sides of a fold, inner ones included.

    Args:
        folds: to be checked.
        cases: of all slides in them.
        fingerprints: SHA-256 of each slide's content.
        near_duplicates: pairs of slides that look alike, and their correlation.

    Raises:
        UsageError: one of them is on both sides; the message names the first.
    """
    patient = {case.slide_id: case.patient_id for case in cases}
    pairs = list(near_duplicates)
    for fold in folds:
        sides = [("test", fold.train, fold.test), ("external", fold.train, fold.external)]
        sides += [("validation", inner.train, inner.validation) for inner in fold.inner]
        for other, train, test in sides:
            where = f"repeat {fold.repeat}, fold {fold.name}: training and {other} part"
            shared = {patient[slide] for slide in train} & {patient[slide] for slide in test}
            if shared:
                raise UsageError(f"{where} share patient {min(shared)!r}; a patient belongs to one side")
            content = {fingerprints[slide]: slide for slide in train}
            for slide in test:
                if fingerprints[slide] in content:
                    raise UsageError(
                        f"{where} hold the same slide as {content[fingerprints[slide]]!r} and {slide!r}; "
                        "remove one from the manifest, or give both one patient_id"
                    )
            trained, tested = set(train), set(test)
            for one, two, likeness in pairs:
                if (one in trained and two in tested) or (two in trained and one in tested):
                    raise UsageError(
                        f"{where} hold slides that look alike, {one!r} and {two!r} (correlation "
                        f"{likeness:.3f}); remove one, or give both one patient_id"
                    )


def _outer(cases: list[Case], protocol: Protocol, repeat: int) -> list[tuple[str, list[Case], list[Case]]]:
    """Returns name, training and test part of each fold of a repeat."""
    if protocol.given_split:
        if any(not case.split for case in cases):
            raise UsageError("protocol.given_split: a slide has no 'split'; fill that column of the manifest")
        test = [case for case in cases if case.split == "test"]
        return [("test", [case for case in cases if case.split != "test"], test)]
    parts = []
    if protocol.leave_one_site_out:
        sites = sorted({case.site for case in cases})
        if len(sites) < 2 or "" in sites:
            raise UsageError(
                f"protocol.leave_one_site_out: expected at least two sites and one for each slide, found "
                f"{sites}; fill the manifest's 'site'"
            )
        for site in sites:
            test = [case for case in cases if case.site == site]
            patients = {case.patient_id for case in test}
            parts.append((site, [case for case in cases if case.patient_id not in patients], test))
        return parts
    seed = _seed(protocol.seed, repeat)
    for number, test in enumerate(_stratified(cases, protocol.outer_folds, seed, "outer_folds")):
        inside = {case.slide_id for case in test}
        parts.append((str(number), [case for case in cases if case.slide_id not in inside], test))
    return parts


def _check_sites(cases: Iterable[Case], external: str) -> None:
    """Refuses two spellings of a site on both sides of a fold: of the external one, without it of any."""
    for pair in spelled_twice(case.site for case in cases):
        if external and external not in pair:
            continue
        one, two = distinct(*pair)
        raise UsageError(
            f"protocol: sites {one} and {two} may be one, spelled twice, and would be trained and tested on; "
            "give it one name in the manifest's 'site', or two that differ in more than spelling"
        )


def _part(case: Case, protocol: Protocol) -> str:
    """Returns the part of the data, fixed by the manifest, with a case; empty if the protocol has none."""
    if protocol.given_split:
        return case.split
    return case.site if protocol.leave_one_site_out else ""


def _within(protocol: Protocol) -> str:
    if protocol.given_split:
        return " in the same part of the given split"
    return " at the same site" if protocol.leave_one_site_out else ""


def _exchangeable(slides: Mapping[str, Sequence[Case]], protocol: Protocol) -> list[list[str]]:
    """Groups the patients that may exchange their grades."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for patient in sorted(slides):
        alike[tuple(_part(case, protocol) for case in slides[patient])].append(patient)
    return list(alike.values())


def _inner(train: list[Case], protocol: Protocol, seed: int) -> list[InnerFold]:
    if not protocol.is_nested:
        return []
    given = [case for case in train if case.split == "val"] if protocol.given_split else []
    held_out = [given] if given else _stratified(train, protocol.inner_folds, seed, "inner_folds")
    return [InnerFold(_ids(set(train) - set(validation)), _ids(validation)) for validation in held_out]


def _stratified(cases: list[Case], n_folds: int, seed: int, option: str) -> list[list[Case]]:
    patients = [case.patient_id for case in cases]
    commonest = max(Counter(case.grade for case in cases).values(), default=0)
    if min(len(set(patients)), commonest) < n_folds:
        raise UsageError(
            f"{len(cases)} slides of {len(set(patients))} patients are too few for {n_folds} folds; lower "
            f"protocol.{option}"
        )
    # A grade with fewer slides than folds cannot be in each test part; training parts are checked.
    folds = stratified_folds([case.grade for case in cases], patients, n_folds, seed)
    parts = [[cases[index] for index in fold] for fold in folds]
    if not all(parts):
        raise UsageError(f"a fold is empty; lower protocol.{option} or choose another protocol.seed")
    return parts


def _check_grades(train: Iterable[Case], n_grades: int, where: str, protocol: Protocol, inner: bool) -> None:
    missing = sorted(set(range(n_grades)) - {case.grade for case in train})
    if not missing:
        return
    names = ", ".join(map(str, missing))
    if protocol.leave_one_site_out:
        warnings.warn(f"{where}: no training slide has grade {names}; it cannot be predicted", stacklevel=3)
        return
    remedy = "lower protocol.inner_folds" if inner else "ask for fewer folds"
    raise UsageError(
        f"{where}: no training slide has grade {names}, so it could not be learned; add such slides (of "
        f"other patients), {remedy}, choose another protocol.seed, or give 'grades' a scale without it"
    )


def _slides_of_patients(cases: Iterable[Case]) -> dict[str, list[Case]]:
    slides: dict[str, list[Case]] = defaultdict(list)
    for case in sorted(cases, key=lambda case: case.slide_id):
        slides[case.patient_id].append(case)
    return slides


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] % 2**31)


def _ids(cases: Iterable[Case]) -> tuple[str, ...]:
    return tuple(sorted(case.slide_id for case in cases))
