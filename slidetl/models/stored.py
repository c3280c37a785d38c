"""A stand-in for the network behind stored features, of which nothing but their length is known."""

import re

from torch import Tensor, nn

from slidetl.errors import UsageError, WeightsError

PREFIX = "stored_"


class StoredFeatures(nn.Module):
    """Embeds nothing: a training on it takes stored features, ``data.features`` with ``data.bag_size: 0``.

    Args:
        name: ``stored_D`` with the length D of the features, e.g. ``stored_1024``.

    Raises:
        WeightsError: the name has no length from 1 to 65,536.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        found = re.fullmatch(rf"{PREFIX}(\d{{1,5}})", name)
        if found is None or not 1 <= int(found[1]) <= 65_536:
            raise WeightsError(f"backbone {name!r}: expected the length of the features, e.g. stored_1024")
        self.head_hidden_size = int(found[1])
        self.pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def forward(self, tiles: Tensor) -> Tensor:
        """Raises a UsageError: there is no network to embed a tile."""
        raise UsageError(NO_NETWORK)


NO_NETWORK = (
    "the backbone 'stored_D' stands for stored features and embeds no tile: train with data.bag_size 0, and "
    "to grade slides train with the network itself, on features that 'slidetl embed' stored"
)
