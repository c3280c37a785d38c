"""Aggregators: the embeddings of a slide's tiles -> one embedding of the slide.

All compute in float32 from the scores on, at any precision of the tiles, and ignore padding, even NaN.
"""

from typing import NamedTuple, Optional, Protocol

import torch
from torch import Tensor, nn

from slidetl.errors import UsageError

# Named here, since TorchScript would parse the comment inside a function as a type comment.
is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined] # torch does not list it


class Aggregated(NamedTuple):
    """The result of pooling a bag.

    Attributes:
        embedding: ``[B, D']``, one vector per slide.
        attention: ``[B, H, N]``, weight of each tile per head or hop; sums to one over the tiles of a
            slide, zero for padding. If tiles are chosen and not weighted, it is the tile's share of the
            gradient of the embedding's sum, without a gradient of its own.
        contributions: ``[B, N, D']``, each tile's share in an embedding computed as the sum over the tiles
            of attention (mean over heads or hops) times value: the attention times the difference between
            the tile's value and the plain mean of the values. They sum to the embedding less its baseline,
            the embedding if all tiles counted alike; zero for padding, without a gradient. None for other
            aggregators, and in an exported file, since
            :meth:`~slidetl.models.network.GradingNetwork.explain` takes tiles in parts there.
    """

    embedding: Tensor
    attention: Tensor
    contributions: Optional[Tensor]  # noqa: UP045 (TorchScript reads the annotation)


class Aggregator(Protocol):
    """Pools the embeddings of a slide's tiles, in any order and number.

    Attributes:
        out_features: length D' of the slide's embedding.
    """

    out_features: int

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """Pools bags of embeddings.

        Args:
            embeddings: ``[B, N, D]`` float.
            mask: ``[B, N]`` bool, False for padding; at least one True in each row.
        """
        ...


class Pooling(nn.Module):
    """Base of the configurable aggregators: a configuration finds classes by base, not by protocol.

    Args:
        in_features: length D of a tile's embedding.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.out_features = in_features

    def values(self, tiles: Tensor) -> Optional[Tensor]:  # noqa: UP045 (TorchScript reads it)
        """Computes the averaged values ``[B, n, D']``, up to a constant; None for other embeddings."""
        return None


class MeanPooling(Pooling):
    """The mean over the tiles."""

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """Pools as :class:`Aggregator`; H is 1."""
        return _weighted(_present(embeddings, mask), _even(mask), mask)

    def values(self, tiles: Tensor) -> Optional[Tensor]:  # noqa: UP045
        """Returns the tiles."""
        return tiles


class MaxPooling(Pooling):
    """The greatest value of each feature ("embedding, max" of Ilse et al. 2018); ties share its gradient."""

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """Pools as :class:`Aggregator`; H is 1, each tile's share of the features."""
        pooled: list[Tensor] = []
        attention = torch.zeros(mask.shape, device=mask.device)
        for tiles in _features(_present(embeddings, mask, float("-inf"))):
            greatest = tiles.to(torch.float32).amax(1)  # [B, D]
            with torch.no_grad():
                chosen = tiles == greatest.unsqueeze(1)  # [B, N, D]
                share = (embeddings.shape[2] * chosen.sum(1)).to(torch.float32).reciprocal()  # [B, D]
                attention = attention + (chosen * share.unsqueeze(1)).sum(2)
            pooled.append(greatest)
        return Aggregated(torch.cat(pooled, 1), attention.unsqueeze(1), None)


class TopKPooling(Pooling):
    """The mean of the k greatest values of each feature, or of all values if there are fewer tiles.

    Args:
        k: number of values, at least 1 (the maximum).
    """

    def __init__(self, in_features: int, k: int = 10) -> None:
        if k < 1:
            raise UsageError(f"TopKPooling takes the k greatest values, k at least 1, not {k}")
        super().__init__(in_features)
        self.k = k

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """Pools as :class:`Aggregator`; H is 1, each tile's share of the values."""
        k = min(self.k, embeddings.shape[1])
        weights = mask.sum(1, keepdim=True) > torch.arange(k, device=mask.device)  # [B, k]
        weights = weights / weights.sum(1, keepdim=True)
        pooled: list[Tensor] = []
        attention = torch.zeros(mask.shape, device=mask.device)
        for tiles in _features(_present(embeddings, mask, float("-inf"))):
            values, chosen = tiles.to(torch.float32).topk(k, dim=1)  # [B, k, D]
            values = values.masked_fill(weights.unsqueeze(2) == 0, 0.0)
            pooled.append((values * weights.unsqueeze(2)).sum(1))
            with torch.no_grad():
                share = (weights / embeddings.shape[2]).unsqueeze(2).expand_as(values)  # [B, k, D]
                attention = attention.scatter_add(1, chosen.flatten(1), share.flatten(1))
        return Aggregated(torch.cat(pooled, 1), attention.unsqueeze(1), None)


class Chowder(Pooling):
    """A learned score per tile; the k highest and the k lowest scores are the slide's embedding.

    Courtiol et al., "Classification and disease localization in histopathology using only global labels",
    2018. Departures: the head replaces the network above the scores, and a slide with fewer than k tiles
    repeats its last one.

    Args:
        k: number of scores from each end, at least 1 (R in the paper, 5 there).
    """

    def __init__(self, in_features: int, k: int = 5) -> None:
        if k < 1:
            raise UsageError(f"Chowder takes k scores from each end, k at least 1, not {k}")
        super().__init__(in_features)
        self.out_features = 2 * k
        self.k = k
        self.score = nn.Linear(in_features, 1)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """Pools as :class:`Aggregator`; H is 1, each tile's share of the 2k scores."""
        scores = self.score(_present(embeddings, mask)).squeeze(2).to(torch.float32)  # [B, N]
        k = min(self.k, scores.shape[1])
        rank = torch.arange(self.k, device=mask.device).unsqueeze(0)  # [1, k]
        last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
        rank = torch.minimum(rank, last)  # [B, k], repeating the last tile
        top = scores.masked_fill(~mask, float("-inf")).topk(k, dim=1)[1].gather(1, rank)
        bottom = scores.masked_fill(~mask, float("inf")).topk(k, dim=1, largest=False)[1].gather(1, rank)
        chosen = torch.cat([top, bottom], dim=1)  # [B, 2k]
        embedding = scores.gather(1, chosen)
        share = torch.full(chosen.shape, 1.0 / chosen.shape[1], device=mask.device)
        attention = torch.zeros(mask.shape, device=mask.device).scatter_add(1, chosen, share)
        return Aggregated(embedding, attention.unsqueeze(1), None)


class LogSumExpPooling(Pooling):
    """A smooth maximum of each feature: ``log(mean(exp(r x))) / r``.

    Pinheiro and Collobert, "From image-level to pixel-level labeling with convolutional networks",
    CVPR 2015, equation 6. Towards r = 0 it is the mean, towards infinity the maximum.

    Args:
        sharpness: r, above 0.
    """

    def __init__(self, in_features: int, sharpness: float = 1.0) -> None:
        if not sharpness > 0:
            raise UsageError(f"the sharpness of LogSumExpPooling must be above 0, not {sharpness}")
        super().__init__(in_features)
        self.sharpness = sharpness

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """Pools as :class:`Aggregator`; H is 1, the softmax over the tiles, a mean over the features."""
        count = mask.sum(1, keepdim=True)  # [B, 1]
        pooled: list[Tensor] = []
        attention = torch.zeros(mask.shape, device=mask.device)
        for part in _features(_present(embeddings, mask, float("-inf"))):
            tiles = self.sharpness * part.to(torch.float32)
            pooled.append((tiles.logsumexp(1) - count.log()) / self.sharpness)  # [B, D]
            with torch.no_grad():
                attention = attention + tiles.softmax(1).sum(2) / embeddings.shape[2]
        return Aggregated(torch.cat(pooled, 1), attention.unsqueeze(1), None)


class Attention(Pooling):
    """The mean over the tiles, weighted by the softmax of a learned score per tile.

    Ilse, Tomczak and Welling, "Attention-based deep multiple instance learning", ICML 2018, equation 8.

    Args:
        hidden_features: length of the hidden layer (L in the paper, 128 there).
    """

    def __init__(self, in_features: int, hidden_features: int = 128) -> None:
        super().__init__(in_features)
        self.value = nn.Linear(in_features, hidden_features)
        self.score = nn.Linear(hidden_features, 1)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """Pools as :class:`Aggregator`; H is 1."""
        tiles = _present(embeddings, mask)
        scores = torch.cat([self._scores(part) for part in _parts(tiles)], 1)
        return _weighted(tiles, _softmax(scores.transpose(1, 2), mask), mask)

    def values(self, tiles: Tensor) -> Optional[Tensor]:  # noqa: UP045
        """Returns the tiles."""
        return tiles

    def _scores(self, tiles: Tensor) -> Tensor:
        scores: Tensor = self.score(torch.tanh(self.value(tiles)))  # [B, N, 1]
        return scores


class GatedAttention(Pooling):
    """:class:`Attention` with a gated hidden layer: equation 9 of the same paper.

    Args:
        hidden_features: length of the hidden layer.
    """

    def __init__(self, in_features: int, hidden_features: int = 128) -> None:
        super().__init__(in_features)
        self.value = nn.Linear(in_features, hidden_features)
        self.gate = nn.Linear(in_features, hidden_features)
        self.score = nn.Linear(hidden_features, 1)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """Pools as :class:`Aggregator`; H is 1."""
        tiles = _present(embeddings, mask)
        return _weighted(tiles, self.attention(tiles, mask), mask)

    def values(self, tiles: Tensor) -> Optional[Tensor]:  # noqa: UP045
        """Returns the tiles."""
        return tiles

    def attention(self, tiles: Tensor, mask: Tensor) -> Tensor:
        """Computes the weights ``[B, 1, N]`` of tiles with constant padding."""
        scores = torch.cat([self._scores(part) for part in _parts(tiles)], 1)
        return _softmax(scores.transpose(1, 2), mask)

    def _scores(self, tiles: Tensor) -> Tensor:
        hidden = torch.tanh(self.value(tiles)) * torch.sigmoid(self.gate(tiles))  # [B, N, L]
        scores: Tensor = self.score(hidden)  # [B, N, 1]
        return scores


class MultiHopAttention(Pooling):
    """A query attends to the tiles in several hops; each adds the values it read to the query.

    Sukhbaatar et al., "End-to-end memory networks", NeurIPS 2015, section 2.2, with the slide as memory:
    all hops share keys and values, ``query += update(read)``. Departures: the first query is learned
    instead of given, and scores are divided by the square root of their length.

    Args:
        hidden_features: length D' of query, keys, values and of the slide's embedding, the last query.
        hops: number H, at least 1.
    """

    def __init__(self, in_features: int, hidden_features: int = 128, hops: int = 3) -> None:
        if hops < 1:
            raise UsageError(f"MultiHopAttention attends at least once, not {hops} times")
        super().__init__(in_features)
        self.out_features = hidden_features
        self.hops = hops
        self.query = nn.Parameter(torch.randn(1, hidden_features))
        self.key = nn.Linear(in_features, hidden_features, bias=False)  # a bias would not change the softmax
        self.value = nn.Linear(in_features, hidden_features)
        self.update = nn.Linear(hidden_features, hidden_features, bias=False)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """Pools as :class:`Aggregator`; H is the number of hops, in their order."""
        tiles = _present(embeddings, mask)
        keys = self.key(tiles) * self.out_features**-0.5  # [B, N, L]; scaled first, so as not to overflow
        values = self.value(tiles)  # [B, N, L]
        query = self.query.unsqueeze(0).expand(tiles.shape[0], 1, self.out_features)  # [B, 1, L]
        hops: list[Tensor] = []
        for _ in range(self.hops):
            attention = _softmax(_read(query, keys.transpose(1, 2)), mask)  # [B, 1, N]
            query = query + self.update(_read(attention, values).to(self.query.dtype))
            hops.append(attention)
        weights = torch.cat(hops, dim=1)  # [B, H, N]
        return Aggregated(
            query.squeeze(1).to(torch.float32), weights, _shares(self._moves(values), weights, mask)
        )

    def values(self, tiles: Tensor) -> Optional[Tensor]:  # noqa: UP045
        """Returns each tile's step of the query, the start of the embedding."""
        return self._moves(self.value(tiles))

    def _moves(self, values: Tensor) -> Tensor:
        moves: Tensor = self.hops * self.update(values)  # the attention is a mean over hops
        return moves


class AdditiveAttention(Pooling):
    """Gated attention over tiles transformed one by one, with an exact contribution of each tile.

    Javed et al., "Additive MIL: intrinsically interpretable multiple instance learning for pathology",
    NeurIPS 2022, equation 4: the sum over the tiles of ``f(a x)``, attention times tile through a network.
    Our network has two layers with a ReLU and no biases: ``f(a x) = a f(x)``, and more tiles add no bias.
    The head above is affine and adds no interaction.

    Args:
        hidden_features: length of the hidden layers, and D'.
    """

    def __init__(self, in_features: int, hidden_features: int = 128) -> None:
        super().__init__(in_features)
        self.out_features = hidden_features
        self.attend = GatedAttention(in_features, hidden_features)
        self.first = nn.Linear(in_features, hidden_features, bias=False)
        self.second = nn.Linear(hidden_features, hidden_features, bias=False)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        """Pools as :class:`Aggregator`; H is 1."""
        tiles = _present(embeddings, mask)
        return _weighted(self._values(tiles), self.attend.attention(tiles, mask), mask)

    def values(self, tiles: Tensor) -> Optional[Tensor]:  # noqa: UP045
        """Passes the tiles through their network."""
        return self._values(tiles)

    def _values(self, tiles: Tensor) -> Tensor:
        values: Tensor = self.second(torch.relu(self.first(tiles)))  # [B, N, D']
        return values


def _present(embeddings: Tensor, mask: Tensor, padding: float = 0.0) -> Tensor:
    """Replaces padding in ``[B, N, D]`` by a constant: a zero gradient times NaN is NaN.

    A slide without tiles becomes NaN, in every aggregator, so that no finite grade comes of it.
    """
    # Without padding this saves a second copy of 100,000 tiles. On a GPU the check would synchronise.
    if is_scripting():
        if not embeddings.is_cuda and bool(mask.all()):
            return embeddings
    else:  # tracing records one branch only
        if not embeddings.is_cuda and not torch.compiler.is_compiling() and bool(mask.all()):
            return embeddings
    fill = torch.full((mask.shape[0], 1, 1), padding, dtype=embeddings.dtype, device=embeddings.device)
    fill = fill.masked_fill(~mask.any(1).reshape(-1, 1, 1), float("nan"))
    return torch.where(mask.unsqueeze(2), embeddings, fill)


def _parts(tiles: Tensor) -> list[Tensor]:
    """Splits tiles ``[B, N, D]`` in an exported file, to keep hidden layers small."""
    if is_scripting():
        return list(torch.split(tiles, 8192, 1))
    return [tiles]


def _features(tiles: Tensor) -> list[Tensor]:
    """Splits the features of ``[B, N, D]`` in an exported file, to save memory."""
    if is_scripting():
        return list(torch.split(tiles, 32, 2))
    return [tiles]


def _weighted(values: Tensor, attention: Tensor, mask: Tensor) -> Aggregated:
    """Sums the values of the tiles, ``[B, N, D']``, weighted by their attention ``[B, 1, N]``."""
    return Aggregated(_read(attention, values).squeeze(1), attention, _shares(values, attention, mask))


def _shares(values: Tensor, attention: Tensor, mask: Tensor) -> Optional[Tensor]:  # noqa: UP045
    """Computes the contributions of :class:`Aggregated` from values ``[B, N, D']``."""
    if is_scripting():  # they would take as much memory as the embeddings of a huge slide
        return None
    else:
        with torch.no_grad():
            weights = attention.mean(1).unsqueeze(2)  # [B, N, 1]
            return (values.to(torch.float32) - _read(_even(mask), values)).mul_(weights)


def _even(mask: Tensor) -> Tensor:
    """Returns equal weights ``[B, 1, N]`` of the tiles."""
    weights = mask.to(torch.float32)  # [B, N]
    return (weights / weights.sum(1, keepdim=True)).unsqueeze(1)


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Turns scores ``[B, H, N]`` into float32 weights of the tiles, zero for padding."""
    return scores.to(torch.float32).masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(2)


def _read(weights: Tensor, tiles: Tensor) -> Tensor:
    """Multiplies ``[B, H, N]`` by ``[B, N, D]`` to ``[B, H, D]``, in float32 also under autocast."""
    if is_scripting():  # the caller of an exported file controls autocast
        return weights.to(torch.float32) @ tiles.to(torch.float32)
    else:
        with torch.autocast(tiles.device.type, enabled=False):
            return weights.to(torch.float32) @ tiles.to(torch.float32)
