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
    adds_tiles_up = False  # and so has contributions

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

    @pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
    def test_a_slide_without_tiles_has_no_embedding(self) -> None:
        aggregator = self.aggregator()
        embeddings, mask = self.bag(7, batch=2)
        mask[1] = False
        for pool in (aggregator, torch.jit.script(aggregator)):
            found = pool(embeddings, mask).embedding
            assert found[1].isnan().all()
            torch.testing.assert_close(found[:1], aggregator(embeddings[:1], mask[:1]).embedding)

    @pytest.mark.parametrize("n_tiles", [1, 7, 20_000])
    def test_contributions_sum_to_the_embedding_less_its_baseline(self, n_tiles: int) -> None:
        aggregator = self.aggregator()
        embeddings, mask = self.bag(n_tiles, batch=2)
        mask[1, 1 + n_tiles // 2 :] = False
        out: Aggregated = aggregator(embeddings, mask)
        assert (out.contributions is not None) is self.adds_tiles_up
        if out.contributions is None:
            return
        assert out.contributions.shape == (2, n_tiles, aggregator.out_features)
        assert not out.contributions.requires_grad and not out.contributions[~mask].any()
        for row, is_tile in enumerate(mask):
            tiles = embeddings[row, is_tile]
            # The value of a tile is the embedding of a slide of that tile; attention then is one.
            values = aggregator(tiles.unsqueeze(1), torch.ones(len(tiles), 1, dtype=torch.bool)).embedding
            expected = out.embedding[row] - values.mean(0)
            torch.testing.assert_close(out.contributions[row].sum(0), expected, atol=1e-5, rtol=0)
            each = out.attention[row, :, is_tile].mean(0).unsqueeze(1) * (values - values.mean(0))
            torch.testing.assert_close(out.contributions[row, is_tile], each, atol=1e-6, rtol=1e-4)

    def test_order_does_not_matter(self) -> None:
        embeddings, mask = self.bag(9)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
        here, there = self.aggregator()(embeddings, mask), self.aggregator()(embeddings[:, order], mask)
        torch.testing.assert_close(here.embedding, there.embedding)
        torch.testing.assert_close(here.attention[..., order], there.attention)
        if here.contributions is not None:
            torch.testing.assert_close(here.contributions[:, order], there.contributions)

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
            if here.contributions is not None:
                torch.testing.assert_close(here.contributions, there.contributions[:, :6])
                assert not there.contributions[:, 6:].any()
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
        assert there.contributions is None  # left to the network, which takes tiles in parts
        torch.testing.assert_close(here.embedding, there.embedding)
        torch.testing.assert_close(here.attention, there.attention)
