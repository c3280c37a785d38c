"""Rules for drawing the tiles of a bag from a slide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError


class Sampling:
    """Base of the rules. Tiles are drawn without replacement, each with a probability above 0.

    Attributes:
        attends_every: epochs between updates of the attention of all training tiles; 0 without attention.
    """

    attends_every = 0

    def weights(
        self, tissue: NDArray[np.float32], attention: NDArray[np.float32] | None
    ) -> NDArray[np.float64] | None:
        """Returns the probability of each tile.

        Args:
            tissue: ``[N]``, share of tissue in each tile, 0..1.
            attention: ``[N]``, the model's latest attention, not negative; None before the first update.

        Returns:
            ``[N]``, above 0, of sum 1; None for equal probabilities.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(Sampling):
    """Equal probabilities of all tiles."""

    def weights(
        self, tissue: NDArray[np.float32], attention: NDArray[np.float32] | None
    ) -> NDArray[np.float64] | None:
        """Returns None: all tiles are equally likely."""
        return None


@dataclass(frozen=True)
class TissueWeighted(Sampling):
    """Probabilities in proportion to tissue: fewer tiles from the edges.

    Attributes:
        power: power of the share of tissue; 0 is uniform, above 1 draws even fewer edge tiles.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 10:
            raise UsageError(f"sampling.power must be from 0 to 10, not {self.power}")

    def weights(
        self, tissue: NDArray[np.float32], attention: NDArray[np.float32] | None
    ) -> NDArray[np.float64] | None:
        """Weights tiles by ``tissue ** power``, with a share of at least 0.01 per tile."""
        weights = np.maximum(tissue, 0.01).astype(np.float64) ** self.power
        return np.asarray(weights / weights.sum())


@dataclass(frozen=True)
class AttentionGuided(Sampling):
    """A share of the bag drawn by the model's latest attention, the rest uniformly.

    Before an epoch the model computes the attention of every training tile: quickly from the stored features
    of ``data.features``, else through the backbone at the cost of an evaluation. The first epoch is uniform.

    Attributes:
        share: share of the draws by attention, 0 to below 1.
        every_n_epochs: epochs between updates of the attention.
    """

    share: float = 0.5
    every_n_epochs: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1 or self.every_n_epochs < 1:
            raise UsageError(
                "sampling.share must be from 0 to below 1 and sampling.every_n_epochs at least 1, "
                f"not {self.share}, {self.every_n_epochs}"
            )

    @property
    def attends_every(self) -> int:  # type: ignore[override] # a field here
        """The epochs between updates: :attr:`every_n_epochs`."""
        return self.every_n_epochs

    def weights(
        self, tissue: NDArray[np.float32], attention: NDArray[np.float32] | None
    ) -> NDArray[np.float64] | None:
        """Returns the mixture of attention and uniform probabilities."""
        if attention is None or not attention.any():
            return None
        seen = attention.astype(np.float64)
        return np.asarray(self.share * seen / seen.sum() + (1 - self.share) / len(seen))
