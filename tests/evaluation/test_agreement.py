from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score

from slidetl.errors import UsageError
from slidetl.evaluation.agreement import (
    consensus_grades,
    model_against_readers,
    reader_agreement,
    reader_ceiling,
)
from slidetl.evaluation.comparison import Unit
from slidetl.evaluation.metrics import qwk


def read(true: NDArray[np.int64], sd: float, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.clip(np.rint(true + sd * rng.normal(size=len(true))), 0, 4).astype(np.int64)


def test_readers_are_compared_on_what_both_graded() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 5, 60)
    readings = np.stack([read(true, sd, rng) for sd in (0.4, 0.4, 1.0)], 1)
    readings[:20, 0] = -1
    patients = np.arange(60) // 2
    first, second, third = reader_agreement(readings, patients, 5)
    assert [(pair.first, pair.second) for pair in (first, second, third)] == [(0, 1), (0, 2), (1, 2)]
    assert (first.n, first.n_patients) == (40, 20)
    assert (third.n, third.n_patients) == (60, 30)
    a, b = readings[20:, 0], readings[20:, 1]
    assert first.accuracy.estimate == pytest.approx((a == b).mean())
    assert first.kappa.estimate == pytest.approx(cohen_kappa_score(a, b))
    assert first.qwk.estimate == pytest.approx(qwk(a, b, 5))
    assert first.qwk.low < first.qwk.estimate < first.qwk.high
    assert first.qwk.estimate > third.qwk.estimate


def test_a_pair_without_slides_in_common_is_left_out() -> None:
    readings = np.array([[0, -1, 1], [1, -1, 2], [-1, 2, 3], [-1, 3, 3]])
    pairs = reader_agreement(readings, range(4), 5)
    assert [(pair.first, pair.second) for pair in pairs] == [(0, 2), (1, 2)]


def test_agreement_that_is_undefined_is_left_out() -> None:
    """Two readers who gave one and the same grade to all: kappa tells nothing."""
    readings = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 2], [1, 1, 3]])
    pairs = reader_agreement(readings, range(4), 5)
    assert [(pair.first, pair.second) for pair in pairs] == [(0, 2), (1, 2)]
    against = model_against_readers([1, 1, 1, 1], readings, range(4), 5)
    assert [row.reader for row in against] == [2]


def test_consensus_is_the_median_and_the_higher_of_two() -> None:
    readings = [[1, 2, -1], [1, 1, 4], [3, -1, -1], [-1, -1, -1], [0, 3, -1], [2, 2, 3]]
    assert consensus_grades(readings).tolist() == [2, 1, 3, -1, 2, 2]


def test_the_model_takes_a_readers_place() -> None:
    rng = np.random.default_rng(1)
    true = rng.integers(0, 5, 120)
    readings = np.stack([read(true, 0.5, rng) for _ in range(2)], 1)
    good, poor = (np.stack([read(true, sd, rng) for _ in range(3)]) for sd in (0.1, 2.0))
    patients = np.arange(120) // 2
    for predicted, sign in ((good, 1), (poor, -1)):
        against = model_against_readers(predicted, readings, patients, 5, n_draws=500)
        assert [row.reader for row in against] == [0, 1, None]
        row = against[0]
        assert row.peer_qwk is not None and row.qwk_less_peers is not None
        by_hand = np.mean([qwk(readings[:, 0], repeat, 5) for repeat in predicted])
        assert row.model.qwk.estimate == pytest.approx(by_hand)
        between = qwk(readings[:, 0], readings[:, 1], 5)
        assert row.peer_qwk.estimate == pytest.approx(between)
        assert row.qwk_less_peers.estimate == pytest.approx(by_hand - between)
        assert sign * row.qwk_less_peers.estimate > 0
        assert against[-1].peer_qwk is None and against[-1].model.n == 120
    assert against[0].qwk_less_peers is not None and against[0].qwk_less_peers.high < 0


def test_a_reader_of_disagreements_alone_leaves_the_others_as_they_are() -> None:
    """Each peer is compared on what both read, and the mean is over peers."""
    rng = np.random.default_rng(1)
    true = rng.integers(0, 5, 120)
    first, second, third = (read(true, 0.6, rng) for _ in range(3))
    predicted, patients = read(true, 0.8, rng), np.arange(120)
    differ = first != second
    (before, *_) = model_against_readers(predicted, np.stack([first, second], 1), patients, 5, n_draws=200)
    readings = np.stack([first, second, np.where(differ, third, -1)], 1)
    after, _, adjudicator, _ = model_against_readers(predicted, readings, patients, 5, n_draws=200)
    assert before.qwk_less_peers is not None and before.n_shared == after.n_shared == 120
    gains = [
        qwk(first[both], predicted[both], 5) - qwk(first[both], peer[both], 5)
        for both, peer in ((slice(None), second), (differ, third))
    ]
    assert before.qwk_less_peers.estimate == pytest.approx(gains[0])
    assert after.qwk_less_peers is not None and after.peer_qwk is not None
    assert after.qwk_less_peers.estimate == pytest.approx(np.mean(gains))
    peers = [qwk(first, second, 5), qwk(first[differ], third[differ], 5)]
    assert after.peer_qwk.estimate == pytest.approx(np.mean(peers))
    assert adjudicator.n_shared == differ.sum() and adjudicator.n_shared == adjudicator.model.n
    # Of two who never met, neither has a peer; a third who met one of them counts for that one alone.
    apart = np.stack([np.where(differ, first, -1), np.where(differ, -1, second)], 1)
    assert [row.peer_qwk for row in model_against_readers(predicted, apart, patients, 5)] == [None] * 3


def test_a_single_reader_has_no_peers() -> None:
    against = model_against_readers([0, 1, 2, 3], [[0], [1], [2], [4]], range(4), 5)
    assert [(row.reader, row.peer_qwk) for row in against] == [(0, None), (None, None)]


def test_readers_who_gave_one_grade_leave_the_kappas_of_the_ceiling_undefined() -> None:
    ceiling = reader_ceiling([2] * 20, [2] * 20, np.arange(20), 5, n_draws=5)
    assert ceiling.accuracy == ceiling.consensus_accuracy == ceiling.together_accuracy == 1
    assert ceiling.interval.is_point  # which is no certainty
    assert np.isnan([ceiling.qwk, ceiling.consensus_qwk, ceiling.together_qwk]).all()


@pytest.mark.parametrize("sd", [0.3, 0.6, 0.9])
def test_the_ceiling_is_what_the_truth_reaches(sd: float) -> None:
    """On 20,000 slides whose readers err as the model says, against the grades that they were drawn from."""
    rng = np.random.default_rng(2)
    true = rng.choice(5, 20_000, p=[0.3, 0.2, 0.2, 0.1, 0.2])
    first, second = read(true, sd, rng), read(true, sd, rng)
    ceiling = reader_ceiling(first, second, np.arange(20_000) // 200, 5, n_draws=20)
    assert ceiling.reader_sd == pytest.approx(sd, abs=0.03)
    assert ceiling.accuracy == pytest.approx((first == true).mean(), abs=0.015)
    assert ceiling.qwk == pytest.approx(qwk(true, first, 5), abs=0.01)
    consensus = consensus_grades(np.stack([first, second], 1))
    assert ceiling.consensus_accuracy == pytest.approx((consensus == true).mean(), abs=0.015)
    assert ceiling.consensus_qwk == pytest.approx(qwk(true, consensus, 5), abs=0.01)
    assert ceiling.qwk_by_attenuation == pytest.approx(ceiling.qwk, abs=0.01)
    together = read(true, sd / np.sqrt(2), rng)  # the mean of two errors, before it is rounded
    assert ceiling.together_accuracy == pytest.approx((together == true).mean(), abs=0.015)
    assert ceiling.together_qwk == pytest.approx(qwk(true, together, 5), abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["worst", "mean"])
@pytest.mark.parametrize("alike", [False, True])
def test_the_ceiling_of_patients_is_what_the_truth_of_their_slides_reaches(unit: Unit, alike: bool) -> None:
    """Slides of a patient of grades of their own, or all within one grade."""
    rng = np.random.default_rng(4)
    patients = np.sort(rng.integers(0, 6_000, 12_000))
    own = rng.choice(5, 12_000, p=[0.3, 0.2, 0.2, 0.1, 0.2])
    true = np.clip(own[patients] + rng.integers(-1, 2, 12_000), 0, 4) if alike else own
    first, second = read(true, 0.5, rng), read(true, 0.5, rng)
    ceiling = reader_ceiling(first, second, patients, 5, unit=unit, n_draws=2)

    def of_patients(grades: NDArray[np.int64]) -> NDArray[np.int64]:
        make = np.max if unit == "worst" else np.mean
        mine = np.split(grades, np.flatnonzero(np.diff(patients)) + 1)
        return np.array([int(np.floor(make(of) + 0.5)) for of in mine])

    truth = of_patients(true)
    for judged, accuracy, kappa in (
        (of_patients(first), ceiling.accuracy, ceiling.qwk),
        (
            of_patients(consensus_grades(np.stack([first, second], 1))),
            ceiling.consensus_accuracy,
            ceiling.consensus_qwk,
        ),
    ):
        assert accuracy == pytest.approx((truth == judged).mean(), abs=0.03 if alike else 0.015)
        assert kappa == pytest.approx(qwk(truth, judged, 5), abs=0.015)


@pytest.mark.slow
def test_the_interval_of_the_ceiling_covers_it() -> None:
    rng = np.random.default_rng(3)
    population = rng.integers(0, 5, 100_000)
    truth = (read(population, 0.4, rng) == population).mean()
    covered = 0
    for study in range(25):
        true = rng.integers(0, 5, 60)[np.arange(100) % 60]
        ceiling = reader_ceiling(
            read(true, 0.4, rng),
            read(true, 0.4, rng),
            np.arange(100) % 60,
            5,
            level=0.9,
            n_draws=40,
            seed=study,
        )
        covered += ceiling.low <= truth <= ceiling.high
        assert ceiling.low <= ceiling.accuracy <= ceiling.high
    assert covered >= 18


def test_readers_who_never_differ_leave_no_ceiling() -> None:
    grades = np.arange(40) % 5
    ceiling = reader_ceiling(grades, grades, range(40), 5, n_draws=10)
    assert ceiling.accuracy == pytest.approx(1) and ceiling.qwk == pytest.approx(1)
    assert ceiling.at_bound and ceiling.reader_sd == 0.02
    rough = reader_ceiling(grades, np.minimum(grades + 1, 4), range(40), 5, n_draws=10)
    assert not rough.at_bound
    opposite = reader_ceiling(grades, 4 - grades, range(40), 5, n_draws=10)
    assert opposite.qwk_by_attenuation is None and opposite.accuracy < 0.5


@pytest.mark.parametrize(("n_patients", "is_point"), [(2, True), (4, True), (5, False)])
def test_few_patients_leave_the_ceiling_without_an_interval(n_patients: int, is_point: bool) -> None:
    patients, second = np.repeat(np.arange(n_patients), 3), np.arange(3 * n_patients) % 5
    first = np.where(np.arange(3 * n_patients) % 7, second, (second + 1) % 5)  # every seventh differs
    ceiling = reader_ceiling(first, second, patients, 5, n_draws=50)
    assert ceiling.accuracy < 1 and ceiling.interval.is_point == is_point


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(UsageError, match="from 0 to 4, or below 0"):
        reader_agreement([[0, 5], [1, 1]], [0, 1], 5)
    with pytest.raises(UsageError, match="expected readings"):
        reader_agreement([[0, 1], [1, 1]], [0], 5)
    with pytest.raises(UsageError, match="slides of two patients that both"):
        reader_ceiling([0, 1, -1], [0, -1, 1], [0, 1, 2], 5)
    with pytest.raises(UsageError, match="two patients that were read"):
        model_against_readers([0, 1], [[-1], [-1]], [0, 1], 5)
    with pytest.raises(UsageError, match="of 2 slides"):
        model_against_readers([0, 1, 2], [[0], [1]], [0, 1], 5)
