"""What every aggregator must do, whatever its name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from slidetl.models.aggregators import Aggregated, Pooling

N_FEATURES = 12


class AggregatorContract:
    """Subclass it and set ``make``: length of an embedding -> aggregator."""

    make: Callable[[int], Pooling]

    def aggregator(self) -> Pooling:
        torch.manual_seed(0)
        return type(self).make(N_FEATURES).eval()

    def bag(self, n_tiles: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(n_tiles)
        embeddings = torch.randn(batch, n_tiles, N_FEATURES, generator=generator)
        return embeddings, torch.ones(batch, n_tiles, dtype=torch.bool)

    def test_shapes_and_attention_sums_to_one(self) -> None:
        aggregator = self.aggregator()
        out: Aggregated = aggregator(*self.bag(7, batch=3))
        assert out.embedding.shape == (3, aggregator.out_features)
        assert out.attention.shape[0] == 3 and out.attention.shape[2] == 7
        torch.testing.assert_close(out.attention.sum(2), torch.ones_like(out.attention.sum(2)))

    def test_order_does_not_matter(self) -> None:
        embeddings, mask = self.bag(9)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
        here, there = self.aggregator()(embeddings, mask), self.aggregator()(embeddings[:, order], mask)
        torch.testing.assert_close(here.embedding, there.embedding)
        torch.testing.assert_close(here.attention[..., order], there.attention)

    def test_padding_does_not_count_whatever_it_holds(self) -> None:
        embeddings, mask = self.bag(6)
        padded = torch.cat([embeddings, torch.full((1, 4, N_FEATURES), float("nan"))], 1)
        longer = torch.cat([mask, torch.zeros(1, 4, dtype=torch.bool)], 1)
        here, there = self.aggregator()(embeddings, mask), self.aggregator()(padded, longer)
        torch.testing.assert_close(here.embedding, there.embedding)
        torch.testing.assert_close(here.attention, there.attention[..., :6])
        assert not there.attention[..., 6:].any()

    def test_a_slide_does_not_depend_on_its_batch(self) -> None:
        embeddings, mask = self.bag(5, batch=4)
        together = self.aggregator()(embeddings, mask).embedding
        alone = torch.cat(
            [self.aggregator()(embeddings[i : i + 1], mask[i : i + 1]).embedding for i in range(4)]
        )
        torch.testing.assert_close(together, alone)

    def test_one_tile_and_very_many(self) -> None:
        for n_tiles in (1, 100_000):
            out = self.aggregator()(*self.bag(n_tiles))
            assert out.embedding.isfinite().all()
            torch.testing.assert_close(out.attention.sum(), torch.tensor(1.0), atol=1e-3, rtol=0)

    def test_gradients_are_finite_in_bfloat16(self) -> None:
        embeddings, mask = self.bag(8)
        embeddings = (embeddings * 50).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = self.aggregator()(embeddings, mask)
        out.embedding.float().square().sum().backward()
        assert embeddings.grad is not None and embeddings.grad.isfinite().all() and embeddings.grad.any()
