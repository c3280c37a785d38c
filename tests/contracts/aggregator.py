"""What every aggregator must do, whatever its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from slidetl.models.aggregators import Aggregated, Pooling

N_FEATURES = 12


class AggregatorContract:
    """Subclass it and set ``make``: length of an embedding -> aggregator."""

    make: Callable[[int], Pooling]

    def aggregator(self, features: int = N_FEATURES) -> Pooling:
        torch.manual_seed(0)
        return type(self).make(features).eval()

    def bag(
        self, n_tiles: int, batch: int = 1, features: int = N_FEATURES
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(n_tiles)
        embeddings = torch.randn(batch, n_tiles, features, generator=generator)
        return embeddings, torch.ones(batch, n_tiles, dtype=torch.bool)

    def test_shapes_and_attention_sums_to_one(self) -> None:
        aggregator = self.aggregator()
        out: Aggregated = aggregator(*self.bag(7, batch=3))
        assert out.embedding.shape == (3, aggregator.out_features)
        assert out.attention.shape[0] == 3 and out.attention.shape[2] == 7
        assert (out.attention >= 0).all()
        torch.testing.assert_close(out.attention.sum(2), torch.ones_like(out.attention.sum(2)))

    def test_contributions_where_there_are_some_add_up_to_the_embedding(self) -> None:
        out: Aggregated = self.aggregator()(*self.bag(7, batch=3))
        if out.contributions is not None:
            torch.testing.assert_close(out.contributions.sum(1), out.embedding)

    def test_order_does_not_matter(self) -> None:
        embeddings, mask = self.bag(9)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
        here, there = self.aggregator()(embeddings, mask), self.aggregator()(embeddings[:, order], mask)
        torch.testing.assert_close(here.embedding, there.embedding)
        torch.testing.assert_close(here.attention[..., order], there.attention)

    def test_padding_does_not_count_whatever_it_holds(self) -> None:
        embeddings, mask = self.bag(6)
        longer = torch.cat([mask, torch.zeros(1, 4, dtype=torch.bool)], 1)
        aggregator = self.aggregator()
        here = aggregator(embeddings.requires_grad_(), mask)
        here.embedding.square().sum().backward()
        gradients = [value.grad.clone() for value in aggregator.parameters() if value.grad is not None]
        for filling in (float("nan"), float("inf"), 1e6, -1e6):
            aggregator.zero_grad()
            padded = torch.cat([embeddings.detach(), torch.full((1, 4, N_FEATURES), filling)], 1)
            padded.requires_grad_()
            there = aggregator(padded, longer)
            torch.testing.assert_close(here.embedding, there.embedding)
            torch.testing.assert_close(here.attention, there.attention[..., :6])
            assert not there.attention[..., 6:].any()
            there.embedding.square().sum().backward()
            assert padded.grad is not None and not padded.grad[:, 6:].any()
            again = [value.grad for value in aggregator.parameters() if value.grad is not None]
            torch.testing.assert_close(gradients, again)

    def test_a_slide_does_not_depend_on_its_batch(self) -> None:
        embeddings, mask = self.bag(5, batch=4)
        mask[1, 2:], mask[3, 1:] = False, False
        aggregator = self.aggregator()
        together = aggregator(embeddings, mask)
        for row, count in enumerate(mask.sum(1).tolist()):
            alone = aggregator(embeddings[row : row + 1, :count], mask[row : row + 1, :count])
            torch.testing.assert_close(together.embedding[row], alone.embedding[0])
            torch.testing.assert_close(together.attention[row, :, :count], alone.attention[0])

    def test_one_tile_and_very_many(self) -> None:
        for n_tiles in (1, 100_000):
            out = self.aggregator()(*self.bag(n_tiles))
            assert out.embedding.isfinite().all()
            sums = out.attention.sum(2)
            torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-3, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("whole", [False, True])
    def test_gradients_are_finite_in_half_precision(self, dtype: torch.dtype, whole: bool) -> None:
        embeddings, mask = self.bag(8)
        aggregator, embeddings = self.aggregator(), embeddings * 50
        if whole:  # the module and its input; otherwise autocast picks what runs in half
            aggregator, embeddings = aggregator.to(dtype), embeddings.to(dtype)
        embeddings.requires_grad_()
        with torch.autocast("cpu", dtype, enabled=not whole):
            out = aggregator(embeddings, mask)
        assert out.embedding.dtype == out.attention.dtype == torch.float32
        out.embedding.square().sum().backward()
        assert embeddings.grad is not None and embeddings.grad.isfinite().all() and embeddings.grad.any()
        assert all(
            value.grad is not None and value.grad.isfinite().all() for value in aggregator.parameters()
        )

    @pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
    # Some score so many tiles in parts, others pool so many features in parts.
    @pytest.mark.parametrize(("tiles", "features"), [(6, N_FEATURES), (9000, N_FEATURES), (50, 300)])
    def test_scripted_computes_the_same(self, tiles: int, features: int) -> None:
        embeddings, mask = self.bag(tiles, batch=2, features=features)
        mask[1, 4:] = False
        aggregator = self.aggregator(features)
        here, there = aggregator(embeddings, mask), torch.jit.script(aggregator)(embeddings, mask)
        torch.testing.assert_close(here.embedding, there.embedding)
        torch.testing.assert_close(here.attention, there.attention)
