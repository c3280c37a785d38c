"""Rules by which the tiles of a bag are drawn from a slide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError


class Sampling:
    """Base of the ways to draw. Tiles are drawn without replacement, and none is out of reach.

    Attributes:
        attends_every: after how many epochs the model looks at all tiles of the training slides again; 0
            where its attention is not asked for.
    """

    attends_every = 0

    def weights(
        self, tissue: NDArray[np.float32], attention: NDArray[np.float32] | None
    ) -> NDArray[np.float64] | None:
        """Returns the probability of each tile.

        Args:
            tissue: ``[N]``, share of each tile that is tissue, 0..1.
            attention: ``[N]``, what the model last gave to each tile, not negative; None where it has not
                looked yet.

        Returns:
            ``[N]``, above 0, of sum 1; None where all are alike.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(Sampling):
    """Each tile as likely as any other."""

    def weights(
        self, tissue: NDArray[np.float32], attention: NDArray[np.float32] | None
    ) -> NDArray[np.float64] | None:
        """Returns None: all tiles are equally likely."""
        return None


@dataclass(frozen=True)
class TissueWeighted(Sampling):
    """Each tile in proportion to its tissue: fewer tiles from the edges.

    Attributes:
        power: of the share of tissue; 0 is uniform, above 1 leaves more of the edges out.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 10:
            raise UsageError(f"sampling.power must be from 0 to 10, not {self.power}")

    def weights(
        self, tissue: NDArray[np.float32], attention: NDArray[np.float32] | None
    ) -> NDArray[np.float64] | None:
        """Weighs tiles by ``tissue ** power``; a tile without any counts as one with a hundredth."""
        weights = np.maximum(tissue, 0.01).astype(np.float64) ** self.power
        return np.asarray(weights / weights.sum())


@dataclass(frozen=True)
class AttentionGuided(Sampling):
    """A share of the bag where the model looked last, the rest anywhere.

    Before an epoch the model looks at every tile of the training slides once: at stored features, where
    ``data.features`` names some, which is quick, else through the backbone, which costs as much as an
    evaluation of them. The first epoch is uniform.

    Attributes:
        share: of the draws that follow the attention, 0 to below 1.
        every_n_epochs: how often the model looks.
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
        """The epochs between two looks: :attr:`every_n_epochs`."""
        return self.every_n_epochs

    def weights(
        self, tissue: NDArray[np.float32], attention: NDArray[np.float32] | None
    ) -> NDArray[np.float64] | None:
        """The mixture of both."""
        if attention is None or not attention.any():
            return None
        seen = attention.astype(np.float64)
        return np.asarray(self.share * seen / seen.sum() + (1 - self.share) / len(seen))
