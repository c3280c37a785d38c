from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from coral_pytorch.losses import coral_loss, corn_loss
from scipy.special import expit

from slidetl.errors import UsageError
from slidetl.models.heads import (
    Coral,
    Corn,
    CrossEntropy,
    CumulativeLink,
    Head,
    NormalGrade,
    RegressionWithThresholds,
)

HEADS: tuple[type[Head], ...] = (
    CumulativeLink,
    Coral,
    Corn,
    RegressionWithThresholds,
    NormalGrade,
    CrossEntropy,
)
every_head = pytest.mark.parametrize("make", HEADS)


@every_head
def test_one_grade_is_nothing_to_tell(make: type[Head]) -> None:
    with pytest.raises(UsageError, match="at least two grades apart, not 1"):
        make(3, 1)


@every_head
@pytest.mark.parametrize("n_grades", [2, 5, 9])
def test_probabilities_sum_to_one_and_expect_a_grade(make: type[Head], n_grades: int) -> None:
    torch.manual_seed(0)
    head = make(3, n_grades)
    logits = head(10 * torch.randn(20, 3))
    probabilities = head.probabilities(logits)
    assert probabilities.shape == (20, n_grades) and (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(20))
    expected = [sum(k * p for k, p in enumerate(row)) for row in probabilities.tolist()]
    torch.testing.assert_close(head.expected_grade(logits), torch.tensor(expected))


@every_head
def test_slides_without_a_grade_do_not_count(make: type[Head]) -> None:
    torch.manual_seed(0)
    head = make(3, 5)
    logits = head(torch.randn(4, 3))
    loss = head.loss(logits, torch.tensor([2, -1, 0, -1]))
    torch.testing.assert_close(loss, head.loss(logits[[0, 2]], torch.tensor([2, 0])))
    nothing = head.loss(logits, torch.full((4,), -1))
    nothing.backward()
    assert nothing.item() == 0
    assert all(value.grad is not None and not value.grad.any() for value in head.parameters())


@every_head
def test_weights_are_repetitions(make: type[Head]) -> None:
    torch.manual_seed(0)
    head = make(3, 5)
    logits, grades = head(torch.randn(3, 3)), torch.tensor([0, 3, 4])
    repeated = head.loss(logits[[0, 0, 1, 2, 2, 2]], grades[[0, 0, 1, 2, 2, 2]])
    torch.testing.assert_close(head.loss(logits, grades, weight=torch.tensor([2, 1, 3])), repeated)
    by_class = torch.tensor([2.0, 9.0, 9.0, 1.0, 3.0]) / 2  # of mean 1 over the three
    torch.testing.assert_close(head.loss(logits, grades, class_weight=by_class), repeated)


@every_head
def test_a_soft_target_is_the_mean_over_the_grades(make: type[Head]) -> None:
    torch.manual_seed(0)
    head = make(3, 5)
    logits = head(torch.randn(2, 3))
    target = torch.tensor([[0.0, 0.25, 0.75, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    hard = [head.loss(logits[row : row + 1], torch.tensor([k])) for row, k in [(0, 1), (0, 2), (1, 4)]]
    torch.testing.assert_close(head.loss(logits, target), (0.25 * hard[0] + 0.75 * hard[1] + hard[2]) / 2)


@every_head
def test_learns_its_way_to_the_right_grades(make: type[Head]) -> None:
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 200)[:, None]
    grades = torch.bucketize(x[:, 0], torch.tensor([-1.8, -0.6, 0.6, 1.8]))
    head = make(1, 5)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(600):
        optimizer.zero_grad()
        head.loss(head(x), grades).backward()
        optimizer.step()
    assert (head.probabilities(head(x)).argmax(1) == grades).float().mean() > 0.95


@every_head
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_scripted_computes_the_same(make: type[Head]) -> None:
    class Graded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = make(3, 5)

        def forward(self, embedding: torch.Tensor) -> torch.Tensor:
            probabilities: torch.Tensor = self.head.probabilities(self.head(embedding))
            return probabilities

    head, x = Graded(), torch.randn(6, 3)
    torch.testing.assert_close(torch.jit.script(head)(x), head(x))


def test_coral_agrees_with_its_authors() -> None:
    torch.manual_seed(0)
    head, grades = Coral(4, 5), torch.randint(0, 5, (12,))
    logits = head(3 * torch.randn(12, 4))
    levels = (grades[:, None] > torch.arange(4)).float()
    torch.testing.assert_close(head.loss(logits, grades), coral_loss(logits, levels))


def test_coral_stays_a_distribution_where_its_biases_are_out_of_order() -> None:
    head = Coral(2, 4)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.0, 2.0, -1.0]))
    probabilities = head.probabilities(head(torch.zeros(1, 2)))[0]
    torch.testing.assert_close(probabilities, torch.tensor([0.5, 0.0, 0.5 - expit(-1), expit(-1)]).float())


def test_corn_agrees_with_its_authors() -> None:
    torch.manual_seed(0)
    head, grades = Corn(4, 5), torch.randint(0, 5, (12,))
    logits = head(3 * torch.randn(12, 4))
    asked = sum(min(grade + 1, 4) for grade in grades.tolist())  # theirs is the mean over these
    torch.testing.assert_close(head.loss(logits, grades), corn_loss(logits, grades, 5) * asked / 12)


def test_corn_multiplies_its_answers() -> None:
    head = Corn(2, 3)
    yes = torch.sigmoid(torch.tensor([0.3, -0.8])).tolist()
    expected = torch.tensor([[1 - yes[0], yes[0] * (1 - yes[1]), yes[0] * yes[1]]])
    torch.testing.assert_close(head.probabilities(torch.tensor([[0.3, -0.8]])), expected)


def test_regression_is_moved_by_the_squared_error_alone() -> None:
    torch.manual_seed(0)
    head, x = RegressionWithThresholds(3, 5), torch.randn(6, 3)
    grades = torch.arange(6) % 5
    head.loss(head(x), grades).backward()
    residual = (x @ head.score.weight.T + head.score.bias)[:, 0] - grades
    torch.testing.assert_close(head.score.weight.grad, residual @ x[None] / 6)
    assert head.first.grad is not None and head.first.grad.any()


def test_regression_starts_by_rounding() -> None:
    head = RegressionWithThresholds(1, 5)
    with torch.no_grad():
        head.score.weight.fill_(1.0)
        head.score.bias.fill_(0.0)
        scores = torch.tensor([[-3.0], [0.4], [0.6], [2.0], [3.4], [9.0]])
        assert head.probabilities(head(scores)).argmax(1).tolist() == [0, 0, 1, 2, 3, 4]
        probability = head.probabilities(head(scores))[3, 2].item()
    assert probability == pytest.approx(1 / (1 + math.exp(-1.5)) - 1 / (1 + math.exp(1.5)), abs=1e-6)


def test_cross_entropy_is_torchs() -> None:
    torch.manual_seed(0)
    head, grades = CrossEntropy(4, 5), torch.tensor([0, 4, 2, -1])
    logits, weights = head(torch.randn(4, 4)), torch.rand(5)
    weights /= weights[grades[:3]].mean()  # torch divides by it
    expected = torch.nn.functional.cross_entropy(logits, grades, weight=weights, ignore_index=-1)
    torch.testing.assert_close(head.loss(logits, grades, class_weight=weights), expected)


@pytest.mark.parametrize("n_grades", [2, 5, 9])
def test_probabilities_follow_the_closed_form(n_grades: int) -> None:
    torch.manual_seed(0)
    head = CumulativeLink(3, n_grades)
    x = torch.randn(6, 3)
    logits = head(x)
    probabilities = head.probabilities(logits).detach().double().numpy()
    score = (x @ head.score.weight.T).detach().double().numpy()  # [6, 1]
    gaps = np.log1p(np.exp(head.gaps.detach().double().numpy()))
    thresholds = head.first.item() + np.concatenate([[0.0], np.cumsum(gaps)])
    at_most = np.concatenate([expit(thresholds - score), np.ones((6, 1))], 1)
    expected = np.diff(np.concatenate([np.zeros((6, 1)), at_most], 1), axis=1)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("n_grades", [2, 5, 9])
def test_starts_with_every_grade_within_reach(n_grades: int) -> None:
    head = CumulativeLink(1, n_grades)
    with torch.no_grad():
        head.score.weight.fill_(1.0)
        probabilities = head.probabilities(head(torch.linspace(-20, 20, 400)[:, None]))
    assert set(probabilities.argmax(1).tolist()) == set(range(n_grades))
    torch.testing.assert_close(probabilities, probabilities.flip(0, 1), atol=1e-5, rtol=0)


def test_loss_is_the_mean_negative_log_likelihood() -> None:
    torch.manual_seed(1)
    head = CumulativeLink(4, 5)
    logits, grades = head(torch.randn(10, 4)), torch.arange(10) % 5
    chosen = head.probabilities(logits)[torch.arange(10), grades]
    torch.testing.assert_close(head.loss(logits, grades), -chosen.log().mean())


def test_loss_and_gradient_stay_finite_where_the_score_is_absurd() -> None:
    head = CumulativeLink(1, 5)
    with torch.no_grad():
        head.score.weight.fill_(1.0)
    for value in (-500.0, 500.0):
        for grade in range(5):
            head.zero_grad()
            loss = head.loss(head(torch.tensor([[value]])), torch.tensor([grade]))
            loss.backward()
            assert loss.isfinite()
            assert all(
                parameter.grad is not None and parameter.grad.isfinite().all()
                for parameter in head.parameters()
            )
    wrong = head.loss(head(torch.tensor([[500.0]])), torch.tensor([0]))
    head.zero_grad()
    wrong.backward()
    assert head.score.weight.grad is not None and head.score.weight.grad.abs().item() > 1


def test_thresholds_stay_ordered_whatever_training_does() -> None:
    head = CumulativeLink(2, 5)
    with torch.no_grad():
        head.gaps.copy_(torch.tensor([-40.0, 3.0, -2.0]))
    logits = head(torch.zeros(1, 2))[0]
    assert (logits.diff() <= 0).all()
    assert (head.probabilities(logits[None]) >= 0).all()


@pytest.mark.parametrize("make", [CumulativeLink, RegressionWithThresholds])
def test_thresholds_that_meet_leave_the_loss_finite(
    make: type[CumulativeLink] | type[RegressionWithThresholds],
) -> None:
    head = make(2, 5)
    with torch.no_grad():
        head.gaps.fill_(-200.0)  # softplus is 0: grades 1 to 3 have a probability of 0
    loss = head.loss(head(torch.randn(4, 2)), torch.tensor([0, 1, 3, 4]))
    loss.backward()
    assert 1 < loss.item() < 50
    assert all(value.grad is None or value.grad.isfinite().all() for value in head.parameters())
