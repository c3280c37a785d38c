from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from slidetl.errors import UsageError
from slidetl.models import heads
from slidetl.models.heads import CrossEntropy
from slidetl.models.targets import (
    Targets,
    balanced_weights,
    bootstrapped_grades,
    one_hot_grades,
    reader_grades,
    smoothed_grades,
)


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


def test_targets_are_the_grades_unless_told_otherwise() -> None:
    grades, nobody = torch.tensor([1, -1, 0]), torch.empty(3, 0, dtype=torch.int64)
    believed = torch.full((3, 2), 0.5)
    assert torch.equal(Targets()(grades, nobody, believed, 1.0), one_hot_grades(grades, 2))


def test_readers_stand_in_for_the_grade_where_there_are_any() -> None:
    grades = torch.tensor([1, 2, -1])
    readers = torch.tensor([[0, 1], [-1, -1], [2, 2]])
    target = Targets(readers=True)(grades, readers, torch.full((3, 3), 1 / 3), 0.0)
    torch.testing.assert_close(target, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
    smoothed = Targets(readers=True, smoothing=0.2)(grades, readers, torch.full((3, 3), 1 / 3), 0.0)
    torch.testing.assert_close(smoothed, smoothed_grades(target, 0.2))


@pytest.mark.parametrize(("kind", "beta"), [("soft", 0.95), ("hard", 0.8)])
def test_bootstrapping_begins_after_the_warm_up(kind: Literal["soft", "hard"], beta: float) -> None:
    grades, nobody = torch.tensor([0, -1]), torch.empty(2, 0, dtype=torch.int64)
    believed = torch.tensor([[0.4, 0.6], [0.4, 0.6]])
    targets = Targets(bootstrap=kind, bootstrap_after=0.3)
    plain = one_hot_grades(grades, 2)
    assert torch.equal(targets(grades, nobody, believed, 0.29), plain)
    expected = bootstrapped_grades(plain, believed, beta, kind == "hard")
    assert torch.equal(targets(grades, nobody, believed, 0.3), expected)
    assert not torch.equal(expected, plain)
    mine = Targets(bootstrap=kind, beta=0.5, bootstrap_after=0)(grades, nobody, believed, 0.0)
    assert torch.equal(mine, bootstrapped_grades(plain, believed, 0.5, kind == "hard"))


@pytest.mark.parametrize("name", ["smoothing", "beta", "bootstrap_after"])
def test_targets_are_checked(name: str) -> None:
    values: dict[str, Any] = {name: 1.5}
    with pytest.raises(UsageError, match=rf"targets\.{name} must be from 0 to 1, not 1\.5"):
        Targets(**values)


def test_balanced_weights_give_each_grade_the_same_total() -> None:
    weights = balanced_weights([6, 3, 0, 1])
    torch.testing.assert_close(weights * torch.tensor([6, 3, 0, 1]), torch.tensor([10, 10, 0, 10]) / 3)
    head, grades = CrossEntropy(2, 3), torch.tensor([0, 0, 0, 2])
    logits = torch.randn(4, 3)
    balanced = head.loss(logits, grades, class_weight=balanced_weights([3, 0, 1]))
    each = head.loss(logits[:3], grades[:3]), head.loss(logits[3:], grades[3:])
    torch.testing.assert_close(balanced, (each[0] + each[1]) / 2)


def test_balance_does_not_depend_on_the_size_of_batches() -> None:
    """Divided by the weights of a batch of one, every grade weighs the same as without balance."""
    torch.manual_seed(0)
    head, grades = CrossEntropy(2, 3), torch.tensor([0, 0, 0, 2, 0, 0])
    weights, embeddings = balanced_weights([5, 0, 1]), torch.randn(6, 2)

    def gradient(size: int) -> torch.Tensor:
        head.zero_grad()
        for rows in torch.arange(6).split(size):
            loss = head.loss(head(embeddings[rows]), grades[rows], class_weight=weights)
            (loss * len(rows) / 6).backward()
        assert isinstance(head.classes.weight, torch.nn.Parameter)
        found = head.classes.weight.grad
        assert found is not None
        return found.clone()

    for size in (1, 2):
        torch.testing.assert_close(gradient(size), gradient(6))


@pytest.mark.parametrize(
    "name", ["CumulativeLink", "Coral", "Corn", "RegressionWithThresholds", "CrossEntropy"]
)
def test_a_loss_reads_no_scalar_from_its_device(name: str) -> None:
    """On a GPU each would wait for all work so far; a meta tensor has none to read."""
    head = getattr(heads, name)(8, 5).to("meta")
    logits = head(torch.empty(4, 8, device="meta"))
    grades, readers = (torch.empty(shape, dtype=torch.long, device="meta") for shape in ((4,), (4, 2)))
    targets = Targets(smoothing=0.1, readers=True, bootstrap="hard", bootstrap_after=0)
    for target in (grades, targets(grades, readers, head.probabilities(logits.detach()), 1.0)):
        head.loss(logits, target).backward(retain_graph=True)
    assert all(weight.grad is not None for weight in head.parameters())
