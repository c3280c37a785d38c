"""Heads: a slide's embedding -> logits -> probabilities of the grades."""

from typing import ClassVar, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional

from slidetl.errors import UsageError
from slidetl.models.targets import one_hot_grades

_GAP = 3.0  # between neighbouring thresholds at the start, in units of the logistic's scale


class Head(nn.Module):
    """Base of the heads; they implement ``forward``, ``probabilities`` and ``grade_losses``.

    Args:
        in_features: length D' of a slide's embedding.
        n_grades: K, at least 2.

    Attributes:
        score_unit: unit of the score of :meth:`explain`; empty for a head without one.
    """

    score_unit: ClassVar[str] = ""

    def __init__(self, in_features: int, n_grades: int) -> None:
        super().__init__()
        if n_grades < 2:
            raise UsageError(f"a head tells at least two grades apart, not {n_grades}")
        self.n_grades = n_grades

    def forward(self, embedding: Tensor) -> Tensor:
        """Computes logits ``[B, L]`` of embeddings ``[B, D']``; each head has its own L."""
        raise NotImplementedError

    def probabilities(self, logits: Tensor) -> Tensor:
        """Computes probabilities ``[B, K]`` from logits; each row sums to one."""
        raise NotImplementedError

    def grade_losses(self, logits: Tensor) -> Tensor:
        """Computes the loss ``[B, K]`` of each slide if its grade were 0, ..., K-1, from logits."""
        raise NotImplementedError

    def explain(self, embedding: Tensor, contributions: Tensor) -> Optional[tuple[Tensor, Tensor]]:  # noqa: UP045 (TorchScript reads it)
        """Projects an embedding and its tiles' contributions on the score of the slide.

        Args:
            embedding: ``[B, D']``.
            contributions: ``[B, N, D']``, of :class:`~slidetl.models.aggregators.Aggregated`.

        Returns:
            The slide's score ``[B]`` and each tile's contribution to it, ``[B, N]``, in ``score_unit``; None
            for a head without a score.
        """
        return None

    def expected_grade(self, logits: Tensor) -> Tensor:
        """Computes the mean ``[B]`` of the grades, 0..K-1, weighted by their probabilities, from logits."""
        probabilities = self.probabilities(logits)
        grades = torch.arange(probabilities.shape[1], dtype=probabilities.dtype, device=logits.device)
        return (probabilities * grades).sum(1)

    def loss(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        class_weight: Tensor | None = None,
    ) -> Tensor:
        """Computes the weighted mean loss, a scalar.

        Args:
            logits: as :meth:`forward` returns them.
            target: grades ``[B]`` int64, below 0 for none; or probabilities ``[B, K]``
                (:mod:`slidetl.models.targets`), a row of zeros for none. The loss is linear in them.
            weight: ``[B]`` of the slides, not negative.
            class_weight: ``[K]`` of the grades, not negative, of mean 1 over the training slides
                (:func:`~slidetl.models.targets.balanced_weights`): it does not count in the mean, or small
                batches would undo it.

        Returns:
            The mean over the slides with a grade; 0, with a gradient of 0, if there are none.
        """
        summed, total = self.summed_loss(logits, target, weight, class_weight)
        return summed / torch.where(total > 0, total, torch.ones_like(total))

    def summed_loss(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        class_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes the weighted sum and its divisor for the loss, both to add up over processes."""
        losses = self.grade_losses(logits)
        if not target.is_floating_point():
            target = one_hot_grades(target, self.n_grades)
        weights = target.to(losses.dtype)
        if weight is not None:
            weights = weights * weight.to(losses.dtype).unsqueeze(1)
        total = weights.sum()
        if class_weight is not None:
            weights = weights * class_weight.to(losses.dtype)
        return (weights * losses).sum(), total


class _ScoreHead(Head):
    """Base of the heads with one linear score per slide, cut into grades."""

    score_unit = "log-odds"

    def __init__(self, in_features: int, n_grades: int, bias: bool = False) -> None:
        super().__init__(in_features, n_grades)
        self.score = nn.Linear(in_features, 1, bias=bias)

    def explain(self, embedding: Tensor, contributions: Tensor) -> Optional[tuple[Tensor, Tensor]]:  # noqa: UP045 (TorchScript reads it)
        """Projects as :meth:`Head.explain`."""
        return self.score(embedding).squeeze(1), contributions @ self.score.weight[0]


class CumulativeLink(_ScoreHead):
    """Proportional odds: one score per slide, cut into K grades by ordered thresholds.

    McCullagh, "Regression models for ordinal data", JRSS B 1980: ``P(grade <= k) =
    sigmoid(threshold_k - score)``. Thresholds are ordered by construction: the first is free, the gaps are
    softplus of free parameters. The logit of ``grade > k`` is ``score - threshold_k``.
    """

    def __init__(self, in_features: int, n_grades: int) -> None:
        super().__init__(in_features, n_grades)  # the first threshold replaces a bias
        # At this distance each grade is the most probable one somewhere. Closer thresholds never predict the
        # middle grades until training, slowly, moves them apart.
        self.first = nn.Parameter(torch.tensor([-_GAP * (n_grades - 2) / 2]))  # [1]
        self.gaps = nn.Parameter(torch.full((n_grades - 2,), _GAP).expm1().log())  # [K-2]

    def forward(self, embedding: Tensor) -> Tensor:
        """Computes logits ``[B, K-1]`` of ``grade > k``, decreasing along the last axis."""
        score: Tensor = self.score(embedding)
        return score - _ordered(self.first, self.gaps)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Computes probabilities ``[B, K]``; each row sums to one."""
        return _differences(torch.sigmoid(logits))

    def grade_losses(self, logits: Tensor) -> Tensor:
        """Computes the negative log-likelihood ``[B, K]`` of each grade."""
        return _cumulative_losses(logits)


class Coral(_ScoreHead):
    """Asks K-1 binary questions "is the grade above k?" with a shared score and separate biases.

    CORAL: Cao, Mirjalili and Raschka, "Rank consistent ordinal regression for neural networks", Pattern
    Recognition Letters 2020. Departures: biases start three apart, like the thresholds of
    :class:`CumulativeLink`; and probabilities come from the running minimum of the answers, since biases are
    ordered only after training has converged.
    """

    def __init__(self, in_features: int, n_grades: int) -> None:
        super().__init__(in_features, n_grades)
        self.bias = nn.Parameter(_GAP * ((n_grades - 2) / 2 - torch.arange(n_grades - 1.0)))  # [K-1]

    def forward(self, embedding: Tensor) -> Tensor:
        """Computes logits ``[B, K-1]`` of ``grade > k``."""
        score: Tensor = self.score(embedding)
        return score + self.bias

    def probabilities(self, logits: Tensor) -> Tensor:
        """Computes probabilities ``[B, K]``; each row sums to one."""
        falling = [logits[:, 0]]  # the running minimum; ONNX has no cummin
        for threshold in range(1, logits.shape[1]):
            falling.append(torch.minimum(falling[-1], logits[:, threshold]))
        return _differences(torch.sigmoid(torch.stack(falling, dim=1)))

    def grade_losses(self, logits: Tensor) -> Tensor:
        """Sums the K-1 cross-entropies for each grade, ``[B, K]``."""
        yes, no = functional.softplus(-logits), functional.softplus(logits)  # [B, K-1]
        zero = torch.zeros_like(logits[:, :1])
        below = torch.cat([zero, yes.cumsum(1)], dim=1)  # questions before the grade: the answer is yes
        above = torch.cat([no.flip(1).cumsum(1).flip(1), zero], dim=1)
        return below + above


class Corn(Head):
    """Asks K-1 questions "is the grade above k, if above k-1?", each with its own weights.

    CORN: Shi, Cao and Raschka, "Deep neural networks for rank-consistent ordinal regression based on
    conditional probabilities", 2021. Departure: cross-entropies are summed over the questions of a slide and
    averaged over slides, so a slide's share does not depend on its batch; the paper divides by the number
    of questions in the batch.
    """

    def __init__(self, in_features: int, n_grades: int) -> None:
        super().__init__(in_features, n_grades)
        self.questions = nn.Linear(in_features, n_grades - 1)

    def forward(self, embedding: Tensor) -> Tensor:
        """Computes logits ``[B, K-1]`` of ``grade > k``, given ``grade > k-1``."""
        logits: Tensor = self.questions(embedding)
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """Computes probabilities ``[B, K]``; each row sums to one."""
        # The product of the conditional probabilities; ONNX has no cumprod.
        return _differences(functional.logsigmoid(logits).cumsum(1).exp())

    def grade_losses(self, logits: Tensor) -> Tensor:
        """Sums the cross-entropies of the questions for each grade, ``[B, K]``."""
        yes, no = functional.softplus(-logits), functional.softplus(logits)  # [B, K-1]
        zero = torch.zeros_like(logits[:, :1])
        # All questions up to the grade are answered yes, the next no, and the rest not asked.
        return torch.cat([zero, yes.cumsum(1)], dim=1) + torch.cat([no, zero], dim=1)


class RegressionWithThresholds(_ScoreHead):
    """Regresses the grade as a number, and fits thresholds to cut it into grades.

    Only the squared error moves the score. Thresholds and their slope are fitted to the detached score by
    the likelihood of a cumulative link, as if tuned after training, on the training slides alone.
    """

    score_unit = "grades"

    def __init__(self, in_features: int, n_grades: int) -> None:
        super().__init__(in_features, n_grades, bias=True)
        nn.init.constant_(self.score.bias, (n_grades - 1) / 2)
        self.first = nn.Parameter(torch.tensor([0.5]))  # [1]
        self.gaps = nn.Parameter(torch.ones(n_grades - 2).expm1().log())  # [K-2]
        self.log_slope = nn.Parameter(torch.tensor([_GAP]).log())  # [1]

    def forward(self, embedding: Tensor) -> Tensor:
        """Computes ``[B, K]``: the score in grades, then the logits of ``grade > k``."""
        score: Tensor = self.score(embedding)
        cumulative = (score.detach() - _ordered(self.first, self.gaps)) * self.log_slope.exp()
        return torch.cat([score, cumulative], dim=1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Computes probabilities ``[B, K]``; each row sums to one."""
        return _differences(torch.sigmoid(logits[:, 1:]))

    def grade_losses(self, logits: Tensor) -> Tensor:
        """Adds half the squared error and the negative log-likelihood, ``[B, K]``."""
        grades = torch.arange(self.n_grades, dtype=logits.dtype, device=logits.device)
        return (logits[:, :1] - grades).square() / 2 + _cumulative_losses(logits[:, 1:])


class NormalGrade(_ScoreHead):
    """Takes the grade as normal about a linear score, at whole numbers only, as ridge regression does.

    ``P(grade = k)`` is proportional to ``exp(-(k - score)^2 / (2 sigma^2))``, the probabilities of
    :class:`slidetl.evaluation.classical.Grader`; ``slidetl fit-features`` writes its ridge as this head.
    """

    score_unit = "grades"

    def __init__(self, in_features: int, n_grades: int) -> None:
        super().__init__(in_features, n_grades, bias=True)
        nn.init.constant_(self.score.bias, (n_grades - 1) / 2)
        self.log_sigma = nn.Parameter(torch.zeros(1))  # [1]

    def forward(self, embedding: Tensor) -> Tensor:
        """Computes logits ``[B, K]`` of the grades."""
        score: Tensor = self.score(embedding)
        grades = torch.arange(self.n_grades, dtype=score.dtype, device=score.device)
        return -(grades - score).square() / (2 * (2 * self.log_sigma).exp())

    def probabilities(self, logits: Tensor) -> Tensor:
        """Computes probabilities ``[B, K]``; each row sums to one."""
        return logits.softmax(1)

    def grade_losses(self, logits: Tensor) -> Tensor:
        """Computes the negative log-likelihood ``[B, K]`` of each grade."""
        return -logits.log_softmax(1)


class CrossEntropy(Head):
    """The grades as classes without an order: softmax and cross-entropy."""

    def __init__(self, in_features: int, n_grades: int) -> None:
        super().__init__(in_features, n_grades)
        self.classes = nn.Linear(in_features, n_grades)

    def forward(self, embedding: Tensor) -> Tensor:
        """Computes logits ``[B, K]`` of the grades."""
        logits: Tensor = self.classes(embedding)
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """Computes probabilities ``[B, K]``; each row sums to one."""
        return logits.softmax(1)

    def grade_losses(self, logits: Tensor) -> Tensor:
        """Computes the negative log-likelihood ``[B, K]`` of each grade."""
        return -logits.log_softmax(1)


class NumberHead(nn.Module):
    """Regresses a number, linear in the embedding and standardised by its training values.

    Args:
        in_features: length D' of an embedding.

    Attributes:
        mean, std: of the training values, in their unit; buffers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.number = nn.Linear(in_features, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def standardise(self, values: Tensor) -> None:
        """Takes mean and standard deviation of training values ``[n]``; the latter is 1 if they are equal."""
        self.mean.fill_(values.double().mean())
        std = values.double().std(correction=0)
        self.std.fill_(std if std > 0 else 1.0)

    def forward(self, embedding: Tensor) -> Tensor:
        """Computes standardised numbers ``[B, 1]`` of embeddings ``[B, D']``."""
        numbers: Tensor = self.number(embedding)
        return numbers

    def values(self, numbers: Tensor) -> Tensor:
        """Returns standardised numbers in their unit."""
        return numbers * self.std + self.mean

    def summed_loss(self, numbers: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sums half the squared errors, and counts them; ``target`` ``[B]`` is in its unit, NaN for none."""
        known = target.isfinite()
        error = numbers[:, 0] - (torch.where(known, target, self.mean) - self.mean) / self.std
        return (error.square() * known).sum() / 2, known.sum().to(numbers.dtype)


def _ordered(first: Tensor, gaps: Tensor) -> Tensor:
    """Returns increasing thresholds ``[K-1]`` for any parameters ``[1]`` and ``[K-2]``."""
    return torch.cat([first, first + functional.softplus(gaps).cumsum(0)])


def _differences(above: Tensor) -> Tensor:
    """Turns ``P(grade > k)`` ``[B, K-1]``, decreasing, into ``P(grade = k)`` ``[B, K]``."""
    one = torch.ones_like(above[:, :1])
    bounds = torch.cat([one, above, torch.zeros_like(one)], dim=1)  # [B, K+1]
    return bounds[:, :-1] - bounds[:, 1:]


def _cumulative_losses(logits: Tensor) -> Tensor:
    """Computes the negative log-likelihood ``[B, K]`` of each grade from logits ``[B, K-1]``.

    It stays finite, with a gradient, even for confident wrong scores:
    ``log(sigmoid(a) - sigmoid(b)) = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a))``.
    """
    far = torch.full_like(logits[:, :1], 1e4)  # sigmoid is exactly 1 there, and its gradient 0
    bounds = torch.cat([far, logits, -far], dim=1)  # [B, K+1]
    upper, lower = bounds[:, :-1], bounds[:, 1:]
    return -(
        functional.logsigmoid(upper)
        + functional.logsigmoid(-lower)
        + torch.log(-torch.expm1(torch.clamp(lower - upper, max=-1e-6)))
    )
