from __future__ import annotations

import pytest
import torch

from slidetl.errors import UsageError
from slidetl.models.heads import CrossEntropy
from slidetl.models.labels import bootstrapped_grades, one_hot_grades, reader_grades, smoothed_grades


def test_no_grade_is_a_row_of_zeros() -> None:
    expected = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(one_hot_grades(torch.tensor([2, -1, 0]), 3), expected)
    with pytest.raises(UsageError, match=r"expected grades 0\.\.2, found 3"):
        one_hot_grades(torch.tensor([3]), 3)


def test_smoothing_goes_to_the_neighbours() -> None:
    target = one_hot_grades(torch.tensor([0, 2, 4, -1]), 5)
    expected = torch.tensor(
        [
            [0.8, 0.2, 0.0, 0.0, 0.0],
            [0.0, 0.1, 0.8, 0.1, 0.0],
            [0.0, 0.0, 0.0, 0.2, 0.8],
            [0.0, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    torch.testing.assert_close(smoothed_grades(target, 0.2), expected)
    two = smoothed_grades(torch.tensor([[1.0, 0.0]]), 0.3)
    torch.testing.assert_close(two, torch.tensor([[0.7, 0.3]]))
    spread = torch.rand(6, 5).softmax(1)
    torch.testing.assert_close(smoothed_grades(spread, 0.5).sum(1), torch.ones(6))
    with pytest.raises(UsageError, match="not 2"):
        smoothed_grades(target, 2)


def test_readers_vote() -> None:
    votes = torch.tensor([[1, 1, 2], [0, -1, 2], [-1, -1, -1]])
    expected = torch.tensor([[0.0, 2 / 3, 1 / 3], [0.5, 0.0, 0.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(reader_grades(votes, 3), expected)


@pytest.mark.parametrize(("beta", "hard"), [(0.95, False), (0.8, True)])
def test_bootstrapping_follows_reed(beta: float, hard: bool) -> None:
    torch.manual_seed(0)
    head, grades = CrossEntropy(3, 4), torch.tensor([0, 3, 1])
    x = torch.randn(3, 3)
    logits = head(x)
    target = bootstrapped_grades(one_hot_grades(grades, 4), head.probabilities(logits), beta, hard)
    loss = head.loss(logits, target)
    loss.backward()
    # By hand, with the target a constant: dloss/dlogits = q - target.
    q = logits.detach().double().softmax(1)
    believed = torch.nn.functional.one_hot(q.argmax(1), 4).double() if hard else q
    mixed = beta * torch.nn.functional.one_hot(grades, 4).double() + (1 - beta) * believed
    torch.testing.assert_close(loss.double(), -(mixed * q.log()).sum(1).mean(), atol=1e-6, rtol=1e-5)
    gradient = (q - mixed).T @ x.double() / 3
    assert head.classes.weight.grad is not None
    torch.testing.assert_close(head.classes.weight.grad.double(), gradient, atol=1e-6, rtol=1e-5)


def test_bootstrapping_invents_no_grade() -> None:
    target = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    mixed = bootstrapped_grades(target, torch.tensor([[0.5, 0.5], [0.5, 0.5]]), 0.8)
    torch.testing.assert_close(mixed, torch.tensor([[0.0, 0.0], [0.9, 0.1]]))
    with pytest.raises(UsageError, match="not -1"):
        bootstrapped_grades(target, target, -1)
