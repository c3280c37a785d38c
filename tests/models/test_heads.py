from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit

from slidetl.models.heads import CumulativeLink


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


def test_learns_an_ordinal_rule() -> None:
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 200)[:, None]
    grades = torch.bucketize(x[:, 0], torch.tensor([-2.0, -0.5, 0.7, 2.2]))
    head = CumulativeLink(1, 5)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        head.loss(head(x), grades).backward()
        optimizer.step()
    assert (head.probabilities(head(x)).argmax(1) == grades).float().mean() > 0.97
