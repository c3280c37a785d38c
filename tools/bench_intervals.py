"""How often the intervals hold the truth, and what difference a study of so many patients can show.

    python tools/bench_intervals.py > docs/evidence/intervals.md

Simulated studies, so the truth is known. Their model is that of slidetl.evaluation.power, written once more
here: a patient has a grade, an arm puts each of its slides at that grade plus a normal error, and rounds to
the scale. Of the error's variance .7 is common to both arms and .3 to the slides of a patient.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import shlex
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, norm

from slidetl.evaluation.bootstrap import Metric, bca_interval, resampled_metric, share_interval
from slidetl.evaluation.calibration import calibration_null
from slidetl.evaluation.comparison import chance_p, sign_flip_test
from slidetl.evaluation.conformal import fit_grade_sets, referral_rule, risk_coverage
from slidetl.evaluation.metrics import accuracy, auroc_metric, by_repeat, difference, qwk
from slidetl.evaluation.power import StudyDesign, power_table
from slidetl.evaluation.protocol import Case, Fold, Protocol, permute_grades, plan_folds

GRADES = 5
COMMON_TO_ARMS, COMMON_TO_SLIDES = 0.7, 0.3
ACCURACIES = (0.58, 0.66)  # of the two arms whose intervals are judged
PATIENTS = (20, 60)
FEW_PATIENTS = (2, 3, 4, 5, 10)
RARE = (1, 2, 3, 5)  # patients above a grade, of 40
SLIDES_A_PATIENT = 5 / 3
PROMISING = 0.8  # accuracy of the arm whose promises are judged
RISK, REFERRAL_RISK = 0.1, 0.3
NEW_PATIENTS = 20_000
BETTER = (0.66, 0.8)  # accuracies of the better arm, for two margins of equivalence
SHARES = (0.8, 0.9, 0.97)
REPEATS = (2, 3, 5)
TRAININGS = 400  # whose mean QWK is the truth
PERMUTATIONS = 39  # with which p can be .05 exactly
NOISE_COLUMNS = 8
SEED_SD = 0.4  # grades by which another training of an arm reads everything higher or lower


@dataclass(frozen=True, eq=False)
class Studied:
    """One study: ``[N]`` patients and grades, ``[2, N]`` what two arms say before rounding, and after it."""

    patients: NDArray[np.int64]
    true: NDArray[np.int64]
    scores: NDArray[np.float64]
    graded: NDArray[np.int64]


def deviation_of(accuracy: float) -> float:
    """Of the normal error, in grades, that gives an accuracy on grades that are equally likely."""

    def excess(deviation: float) -> float:
        within = norm.cdf(0.5 / deviation)
        return float(((GRADES - 2) * (2 * within - 1) + 2 * within) / GRADES - accuracy)

    return float(brentq(excess, 1e-2, 1e3))


def study(rng: np.random.Generator, n_patients: int, deviations: Sequence[float]) -> Studied:
    """Draws patients, their slides, and what two arms make of them."""
    patients = np.sort(np.arange(round(n_patients * SLIDES_A_PATIENT)) % n_patients)
    true = rng.integers(GRADES, size=n_patients)[patients]

    def error() -> NDArray[np.float64]:
        of_patient = rng.standard_normal(n_patients)[patients]
        own = rng.standard_normal(len(patients))
        return np.asarray(COMMON_TO_SLIDES**0.5 * of_patient + (1 - COMMON_TO_SLIDES) ** 0.5 * own)

    common = error()
    errors = [COMMON_TO_ARMS**0.5 * common + (1 - COMMON_TO_ARMS) ** 0.5 * error() for _ in deviations]
    scores = np.stack([true + sd * z for sd, z in zip(deviations, errors, strict=True)])
    return Studied(patients, true, scores, np.clip(np.rint(scores), 0, GRADES - 1).astype(np.int64))


def probabilities_of(scores: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    """``[N, K]`` of each true grade, given where the arm put the slide: calibrated, by Bayes' rule."""
    densities = norm.pdf(scores[:, None], np.arange(GRADES), deviation)
    return np.asarray(densities / densities.sum(axis=1, keepdims=True))


def coverage(n_studies: int, n_draws: int, seed: int) -> Iterable[tuple[int, list[str]]]:
    """Shares of intervals that hold the truth, BCa and percentile, by number of patients."""
    deviations = [deviation_of(reached) for reached in ACCURACIES]
    whole = study(np.random.default_rng(seed), 400_000, deviations)
    truth = [float(metric(np.ones(len(whole.true)))) for metric in _metrics(whole)]
    for n_patients in PATIENTS:
        rng = np.random.default_rng((seed, n_patients))
        held, exact = np.zeros((len(truth), 2)), 0
        for number in range(n_studies):
            one = study(rng, n_patients, deviations)
            for place, (metric, value) in enumerate(zip(_metrics(one), truth, strict=True)):
                bca = bca_interval(metric, one.patients, n_draws=n_draws, seed=number)
                drawn = resampled_metric(metric, one.patients, n_draws=n_draws, seed=number)
                low, high = np.nanquantile(drawn, [0.025, 0.975])
                held[place] += bca.low <= value <= bca.high, low <= value <= high
            share = share_interval(one.graded[0] == one.true, one.patients)
            exact += share.low <= truth[1] <= share.high
        cells = [f"{bca:.3f} / {percentile:.3f}" for bca, percentile in held / n_studies]
        cells[1] += f" / {exact / n_studies:.3f}"
        yield n_patients, cells


def _metrics(one: Studied) -> list[Metric]:
    kappas = [partial(qwk, one.true, graded, GRADES) for graded in one.graded]
    shares = [partial(accuracy, one.true, graded) for graded in one.graded]
    return [kappas[0], shares[0], difference(kappas[1], kappas[0]), difference(shares[1], shares[0])]


def few_patients(n_studies: int, n_draws: int, seed: int) -> Iterable[tuple[str, str]]:
    """Shares of percentile intervals of QWK that hold the truth, by number of patients."""
    deviations = [deviation_of(ACCURACIES[0])] * 2
    whole = study(np.random.default_rng(seed), 400_000, deviations)
    truth = float(_metrics(whole)[0](np.ones(len(whole.true))))
    for n_patients in FEW_PATIENTS:
        rng, held = np.random.default_rng((seed, n_patients)), list[bool]()
        while len(held) < n_studies:
            one = one_each(rng, n_patients, deviations)
            held += _holds(_metrics(one)[0], one.patients, truth, n_draws, len(held))
        yield str(n_patients), f"{np.mean(held):.3f}"


def rare_grades(n_studies: int, n_draws: int, seed: int) -> Iterable[tuple[str, str]]:
    """Shares of percentile intervals of an AUROC of .86 that hold it, by the number of positives among 40."""
    shift = 2**0.5 * float(norm.ppf(0.86))  # of the positives, in standard deviations
    for n_positive in RARE:
        rng, held = np.random.default_rng((seed, n_positive)), list[bool]()
        positive = np.arange(40) < n_positive
        while len(held) < n_studies:
            metric = auroc_metric(positive, rng.standard_normal(40) + shift * positive)
            held += _holds(metric, np.arange(40), 0.86, n_draws, len(held))
        yield str(n_positive), f"{np.mean(held):.3f}"


def _holds(
    metric: Metric, patients: NDArray[np.int64], truth: float, n_draws: int, seed: int
) -> tuple[bool, ...]:
    """Tells if the percentile interval holds the truth; empty where there is none, or a point."""
    drawn = resampled_metric(metric, patients, n_draws=n_draws, seed=seed)
    defined = drawn[~np.isnan(drawn)]
    if 2 * len(defined) < n_draws:
        return ()
    low, high = np.quantile(defined, [0.025, 0.975])
    return (bool(low <= truth <= high),) if high - low > 1e-12 else ()


def shares(n_draws: int, seed: int) -> Iterable[tuple[str, ...]]:
    """Coverage of a share of patients, by every possible number of hits and its probability: no chance."""
    for n_patients in PATIENTS:
        for share in SHARES:
            held = np.zeros(2)
            for hits in range(n_patients + 1):
                right = np.arange(n_patients) < hits
                metric = partial(accuracy, np.ones(n_patients, int), right.astype(int))
                bca = bca_interval(metric, range(n_patients), n_draws=n_draws, seed=seed)
                exact = share_interval(right, range(n_patients))
                inside = [one.low <= share <= one.high for one in (bca, exact)]
                held += binom.pmf(hits, n_patients, share) * np.array(inside)
            yield str(n_patients), str(share), *(f"{value:.3f}" for value in held)


def findings(n_studies: int, n_draws: int, seed: int) -> Iterable[tuple[str, ...]]:
    """How often a difference of QWK is found between two equal arms, by number of patients."""
    deviations = [deviation_of(ACCURACIES[0])] * 2
    for n_patients in PATIENTS:
        rng, found = np.random.default_rng((seed, n_patients)), np.zeros(2)
        for number in range(n_studies):
            one = one_each(rng, n_patients, deviations)
            interval = bca_interval(_metrics(one)[2], one.patients, n_draws=n_draws, seed=number)
            second, first = one.graded
            test = sign_flip_test(qwk_of_five, one.true, first, second, one.patients, n_flips=n_draws)
            found += not interval.low <= 0 <= interval.high, test.p <= 0.05
        yield str(n_patients), *(f"{value:.3f}" for value in found / n_studies)


def permuted_labels(n_studies: int, seed: int, n_patients: int = 60) -> tuple[float, float]:
    """How often noise is found to grade better than chance, with folds of the labels kept or planned anew."""
    cases = [Case(f"{number:03}", f"{number:03}", number % GRADES) for number in range(n_patients)]
    found = np.zeros(2)
    for number in range(n_studies):
        rng = np.random.default_rng((seed, number))
        noise = np.c_[rng.standard_normal((n_patients, NOISE_COLUMNS)), np.ones(n_patients)]
        protocol = Protocol(inner_folds=0, seed=number)
        labels = [
            permute_grades(cases, protocol, int(draw)) for draw in rng.integers(2**31, size=PERMUTATIONS)
        ]
        known = {case.slide_id: case.grade for case in cases}
        folds = plan_folds(cases, protocol, GRADES)
        kept, anew = [qwk_by_ridge(noise, known, folds)], list[float]()
        for grades in labels:
            kept.append(qwk_by_ridge(noise, grades, folds))
            again = [replace(case, grade=grades[case.slide_id]) for case in cases]
            anew.append(qwk_by_ridge(noise, grades, plan_folds(again, protocol, GRADES)))
        found += chance_p(kept[0], kept[1:]) <= 0.05, chance_p(kept[0], anew) <= 0.05
    of_kept, of_anew = (found / n_studies).tolist()
    return of_kept, of_anew


def qwk_by_ridge(columns: NDArray[np.float64], grades: Mapping[str, int], folds: Sequence[Fold]) -> float:
    """QWK of what a ridge regression says of the test parts, a slide named by its row."""
    true: list[int] = []
    said: list[NDArray[np.int64]] = []
    for fold in folds:
        train, test = ([int(name) for name in part] for part in (fold.train, fold.test))
        rows = columns[train]
        known = np.array([grades[name] for name in fold.train], float)
        weights = np.linalg.solve(rows.T @ rows + np.eye(rows.shape[1]), rows.T @ known)
        said.append(np.clip(np.rint(columns[test] @ weights), 0, GRADES - 1).astype(int))
        true.extend(grades[name] for name in fold.test)
    return float(qwk(np.array(true), np.concatenate(said), GRADES))


def equivalence(n_studies: int, n_draws: int, seed: int) -> Iterable[tuple[str, ...]]:
    """How often arms that differ by the margin are called equivalent, by number of patients and margin."""
    for n_patients, better in itertools.product(PATIENTS, BETTER):
        rng, within, margin = np.random.default_rng((seed, n_patients)), np.zeros(2), 0.0
        deviations = [deviation_of(reached) for reached in (ACCURACIES[0], better)]
        whole = one_each(rng, 400_000, deviations)
        margin = float(_metrics(whole)[2](np.ones((1, len(whole.true))))[0])
        for number in range(n_studies):
            one = one_each(rng, n_patients, deviations)
            for place, level in enumerate((0.9, 0.95)):
                found = bca_interval(
                    _metrics(one)[2], one.patients, n_draws=n_draws, seed=number, level=level
                )
                within[place] += -margin < found.low and found.high < margin
        yield str(n_patients), f"{margin:.3f}", *(f"{value:.3f}" for value in within / n_studies)


def one_each(rng: np.random.Generator, n_patients: int, deviations: Sequence[float]) -> Studied:
    """Draws patients with a single slide each."""
    true = rng.integers(GRADES, size=n_patients)
    common = rng.standard_normal(n_patients)
    own = rng.standard_normal((len(deviations), n_patients))
    errors = COMMON_TO_ARMS**0.5 * common + (1 - COMMON_TO_ARMS) ** 0.5 * own
    scores = true + np.array(deviations)[:, None] * errors
    graded = np.clip(np.rint(scores), 0, GRADES - 1).astype(np.int64)
    return Studied(np.arange(n_patients), true, scores, graded)


def qwk_of_five(
    true: NDArray[np.int64], graded: NDArray[np.int64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The kappa of five grades."""
    return qwk(true, graded, GRADES, weights)


def over_repeats(n_studies: int, n_draws: int, seed: int) -> Iterable[tuple[str, ...]]:
    """Coverage of the QWK of another training, by patients alone and with repeats, by their number."""
    deviation = deviation_of(ACCURACIES[0])

    def graded(
        rng: np.random.Generator, n_patients: int, repeats: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        true = rng.integers(GRADES, size=n_patients)
        hard, own = rng.standard_normal(n_patients), rng.standard_normal((repeats, n_patients))
        scores = true + deviation * (COMMON_TO_ARMS**0.5 * hard + (1 - COMMON_TO_ARMS) ** 0.5 * own)
        scores = scores + SEED_SD * rng.standard_normal((repeats, 1))
        return true, np.clip(np.rint(scores), 0, GRADES - 1).astype(np.int64)

    truth = float(qwk(*graded(np.random.default_rng(seed), NEW_PATIENTS, TRAININGS), GRADES))
    for repeats in REPEATS:
        rng, held = np.random.default_rng((seed, repeats)), np.zeros(2)
        for number in range(n_studies):
            true, rows = graded(rng, 60, repeats)
            metrics: list[Metric] = [partial(qwk, true, rows, GRADES), by_repeat(qwk_of_five, true, rows)]
            for place, metric in enumerate(metrics):
                found = bca_interval(metric, range(60), n_draws=n_draws, seed=number)
                held[place] += found.low <= truth <= found.high
        yield str(repeats), *(f"{value:.3f}" for value in held / n_studies)


def promises(n_studies: int, seed: int) -> Iterable[tuple[str, ...]]:
    """What new patients see of rules that one study of a calibrated model made, by number of patients."""
    deviations = [deviation_of(PROMISING)]
    new = study(np.random.default_rng(seed), NEW_PATIENTS, deviations)
    after = probabilities_of(new.scores[0], deviations[0])
    wrong_after, sure_after = after.argmax(1) != new.true, after.max(1)
    for n_patients in PATIENTS:
        rng = np.random.default_rng((seed, n_patients))
        covered, broken, ruled, nulls = [], 0, 0, []
        for number in range(n_studies):
            one = study(rng, n_patients, deviations)
            rows = probabilities_of(one.scores[0], deviations[0])
            ends = fit_grade_sets(one.true, rows, one.patients, risk=RISK).sets(after)
            missed = (new.true < ends[:, 0]) | (new.true > ends[:, 1])
            covered.append(1 - len(np.unique(new.patients[missed])) / (new.patients[-1] + 1))
            curve = risk_coverage(rows.argmax(1) != one.true, rows.max(1), one.patients)
            rule = referral_rule(curve, REFERRAL_RISK)
            if rule is not None:
                ruled += 1
                left = sure_after >= rule.confidence
                share = len(np.unique(new.patients[left & wrong_after])) / len(np.unique(new.patients[left]))
                broken += share > REFERRAL_RISK
            if number < 50:
                nulls.append(calibration_null(one.true, rows).null_mean)
        low, high = np.quantile(covered, [0.05, 0.95])
        yield (
            str(n_patients),
            f"{np.mean(covered):.3f} ± {np.std(covered) / n_studies**0.5:.3f}",
            f"{low:.2f} to {high:.2f}",
            f"{ruled / n_studies:.3f}",
            f"{broken / n_studies:.3f}",
            f"{np.mean(nulls):.3f}",
        )


def say(paragraph: str) -> None:
    """A paragraph of Markdown."""
    print(textwrap.fill(paragraph, 118) + "\n")


def begin(*titles: str) -> None:
    """The head of a table."""
    row(*titles)
    row(*["---"] * len(titles))


def row(*cells: object) -> None:
    """A line of a table, at once: a long run can be watched."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--studies", type=int, default=4000, help="simulated for each row")
    parser.add_argument("--draws", type=int, default=1000, help="resamples for each interval")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    options = parser.parse_args()
    n, draws, seed = options.studies, options.draws, options.seed
    arguments = shlex.join(["tools/bench_intervals.py", *sys.argv[1:]])
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, SciPy {scipy.__version__}"
    print(f"# Intervals and power, by simulation\n\n`python {arguments}`; {versions}, seed {seed}.\n")
    say(
        f"Every row is of {n:,} simulated studies in five grades that are equally likely, with five slides "
        "of every three patients. An arm puts a slide at its grade plus a normal error and rounds; "
        f"{COMMON_TO_ARMS} of the error's variance is common to the two arms, {COMMON_TO_SLIDES} to the "
        "slides of a patient."
    )
    print("## Coverage of 95 % intervals over patients\n")
    say(
        f"Shares of intervals that hold the truth, BCa / percentile, {draws:,} resamples each, of an arm of "
        f"accuracy {ACCURACIES[0]} (of the accuracy the exact one, too) and of its difference to one of "
        f"{ACCURACIES[1]}. The standard error of a share of .95 is {(0.95 * 0.05 / n) ** 0.5:.4f}."
    )
    begin("patients", "QWK", "accuracy", "difference of QWK", "difference of accuracy")
    for patients, cells in coverage(n, draws, seed):
        row(patients, *cells)
    print("\n## Few patients\n")
    say(
        f"Coverage of 95 % percentile intervals of the QWK of an arm of accuracy {ACCURACIES[0]}, one "
        "result a patient, and of an AUROC of .86 of one grade against those below, by its patients among "
        "40. Where the metric is undefined or the same in all resamples, a study is drawn anew. Below five "
        "patients, on either side of an AUROC, slidetl gives no interval."
    )
    begin("patients", "QWK")
    for cells_of_few in few_patients(n, draws, seed):
        row(*cells_of_few)
    print()
    begin("patients of the grade", "AUROC")
    for cells_of_rare in rare_grades(n, draws, seed):
        row(*cells_of_rare)
    print("\n## Shares near 1\n")
    say(
        "Coverage of 95 % intervals of a share of patients, summed over all numbers of hits with their "
        "probabilities, so that nothing but BCa's own draws is left to chance."
    )
    begin("patients", "true share", "BCa", "exact")
    for cells_of_share in shares(draws, seed):
        row(*cells_of_share)
    print("\n## Decisions about a difference\n")
    say(
        f"Two arms of accuracy {ACCURACIES[0]}, one result a patient: how often a difference of QWK is "
        f"found, which should be .05. The standard error of a share of .05 is {(0.05 * 0.95 / n) ** 0.5:.4f}."
    )
    begin("patients", "95 % interval excludes 0", "sign flips, p up to .05")
    for cells_of_test in findings(n, draws, seed):
        row(*cells_of_test)
    print()
    say(
        f"Arms of accuracy {ACCURACIES[0]} and {' or '.join(map(str, BETTER))}, a margin of their "
        "true difference: how often they are called equivalent. Two one-sided tests at .05 (the 90 % "
        "interval lies within the margin) should do so in at most .05 of studies, at .025 (95 %) in .025."
    )
    begin("patients", "margin", "90 % interval within it", "95 % interval within it")
    for cells_of_margin in equivalence(n, draws, seed):
        row(*cells_of_margin)
    print("\n## Permuted labels\n")
    kept, anew = permuted_labels(n, seed)
    say(
        f"60 patients, {NOISE_COLUMNS} columns of noise, a ridge regression in five folds, and the same for "
        f"{PERMUTATIONS} permutations of the labels: how often p is at most .05, which should be .05. With "
        f"the folds of the labels for all permutations: {kept:.3f}; with folds planned for each, as `slidetl "
        f"compare` does: {anew:.3f}."
    )
    print("## Repeats\n")
    say(
        "Coverage of 95 % intervals of the QWK of another training: 60 patients, one result each, graded by "
        "R trainings of one arm, each of which reads everything higher or lower by a normal error of "
        f"{SEED_SD} grades. The mean over repeats is resampled by patients alone, or by patients and repeats."
    )
    begin("repeats", "patients alone", "patients and repeats")
    for cells_of_repeats in over_repeats(n, draws, seed):
        row(*cells_of_repeats)
    print("\n## Power\n")
    say(
        "How often a study of 60 patients finds a true difference by sign flips, by the share of the error's "
        "variance that is common to the arms; with a result a patient (60), or a result a slide (100). "
        "Where accuracies are equal it is the rate of false findings. The standard error of a share of .5 is "
        f"{0.5 / n**0.5:.3f}, of .05 {(0.05 * 0.95 / n) ** 0.5:.4f}."
    )
    begin("accuracies", "QWK", "common to the arms", "results", "power by QWK", "power by accuracy")
    for shared, results in itertools.product((0.0, COMMON_TO_ARMS, 0.9), (60, 100)):
        design = StudyDesign(60, results, arm_correlation=shared, patient_correlation=COMMON_TO_SLIDES)
        for found in power_table([(0.56, 0.56), (0.56, 0.64)], design, n_studies=n, seed=seed):
            row(
                f"{found.accuracy_first} and {found.accuracy_second}",
                f"{found.qwk_first:.3f} and {found.qwk_second:.3f}",
                shared,
                results,
                f"{found.power_qwk:.3f}",
                f"{found.power_accuracy:.3f}",
            )
    print("\n## Promises to new patients\n")
    say(
        f"Rules made on one study of a calibrated model of accuracy {PROMISING}, judged on {NEW_PATIENTS:,} "
        f"new patients. Sets of grades were asked to miss {RISK:.0%} of patients: the mean over studies (± "
        f"its standard error) should be {1 - RISK:.2f} or a little more; single studies spread about it. "
        f"Slides were left to a human so that at most {REFERRAL_RISK:.0%} of the patients with a slide that "
        "is graded have a wrong grade, with 95 % confidence: at most .05 of all studies should find a rule "
        "that breaks this. Last: the expected calibration error in ten bins, which would be zero of very many"
        " slides."
    )
    begin("patients", "covered by sets", "5 to 95 % of studies", "rule found", "rule broken", "ECE")
    for cells_of_rule in promises(n, seed):
        row(*cells_of_rule)
    one = study(np.random.default_rng(seed), 60, [deviation_of(reached) for reached in ACCURACIES])
    metric = partial(qwk, one.true, np.tile(one.graded[0], (5, 1)), GRADES)
    started = time.perf_counter()
    resampled_metric(metric, one.patients, n_draws=10_000)
    seconds = time.perf_counter() - started
    print(f"\n10,000 resamples of the QWK of 100 slides in five repeats took {seconds:.2f} s.")


if __name__ == "__main__":
    main()
