"""Heads: a slide's embedding -> logits -> probabilities of the grades."""

import torch
from torch import Tensor, nn
from torch.nn import functional

_GAP = 3.0  # between neighbouring thresholds at the start, in units of the logistic's scale


class Head(nn.Module):
    """Base of the heads; each has these three methods and is made from D' and K."""

    def forward(self, embedding: Tensor) -> Tensor:
        """``[B, D']`` -> logits, whose length is the head's own affair."""
        raise NotImplementedError

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits -> probabilities ``[B, K]``, which sum to one."""
        raise NotImplementedError

    def loss(self, logits: Tensor, grades: Tensor) -> Tensor:
        """Logits and grades ``[B]`` int64 -> the mean loss, a scalar."""
        raise NotImplementedError


class CumulativeLink(Head):
    """Proportional odds: one score per slide, and ordered thresholds that cut it into K grades.

    McCullagh, "Regression models for ordinal data", JRSS B 1980: ``P(grade <= k) =
    sigmoid(threshold_k - score)``. Thresholds are kept in order by construction: the first is free,
    the gaps between them are softplus of free parameters. A logit is ``score - threshold_k``, that of
    ``grade > k``.

    Args:
        in_features: length D' of a slide's embedding.
        n_grades: K, at least 2.
    """

    def __init__(self, in_features: int, n_grades: int) -> None:
        super().__init__()
        self.n_grades = n_grades
        self.score = nn.Linear(in_features, 1, bias=False)  # the first threshold is the bias
        # Wide enough apart that each grade is somewhere the most probable one. From closer thresholds the
        # middle grades are never predicted until training has moved the thresholds, which is slow.
        self.first = nn.Parameter(torch.tensor([-_GAP * (n_grades - 2) / 2]))  # [1]
        self.gaps = nn.Parameter(torch.full((n_grades - 2,), _GAP).expm1().log())  # [K-2]

    def forward(self, embedding: Tensor) -> Tensor:
        """``[B, D']`` -> logits ``[B, K-1]`` of ``grade > k``, decreasing along the last axis."""
        thresholds = torch.cat([self.first, self.first + functional.softplus(self.gaps).cumsum(0)])  # [K-1]
        score: Tensor = self.score(embedding)
        return score - thresholds

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits ``[B, K-1]`` -> probabilities ``[B, K]``, which sum to one."""
        above = torch.sigmoid(logits)  # P(grade > k)
        one = torch.ones_like(above[:, :1])
        bounds = torch.cat([one, above, torch.zeros_like(one)], dim=1)  # [B, K+1]
        return bounds[:, :-1] - bounds[:, 1:]

    def loss(self, logits: Tensor, grades: Tensor) -> Tensor:
        """Mean negative log-likelihood.

        Args:
            logits: ``[B, K-1]``.
            grades: ``[B]`` int64, 0..K-1.

        Returns:
            A scalar. It stays finite, with a gradient, however wrong a confident score is:
            ``log(sigmoid(a) - sigmoid(b)) = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a))``.
        """
        far = torch.full_like(logits[:, :1], 1e4)  # sigmoid is exactly 1 there, and its gradient 0
        bounds = torch.cat([far, logits, -far], dim=1)  # [B, K+1]
        upper = bounds.gather(1, grades[:, None]).squeeze(1)
        lower = bounds.gather(1, grades[:, None] + 1).squeeze(1)
        log_likelihood = (
            functional.logsigmoid(upper)
            + functional.logsigmoid(-lower)
            + torch.log(-torch.expm1(torch.clamp(lower - upper, max=-1e-6)))
        )
        return -log_likelihood.mean()
