from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slidetl.training.means import EpochMeans


class Process:
    """One of several, as far as a checkpoint's figures are concerned."""

    def __init__(self, rank: int, size: int) -> None:
        strategy = SimpleNamespace(reduce=lambda sums, reduce_op: sums)
        self.trainer = SimpleNamespace(
            global_rank=rank, world_size=size, is_global_zero=rank == 0, strategy=strategy
        )
        self.device = torch.device("cpu")

    def all_gather(self, sums: torch.Tensor) -> torch.Tensor:
        return sums


def means(rank: int = 0, size: int = 1) -> EpochMeans:
    module: Any = Process(rank, size)
    return EpochMeans(module)


def test_means_are_weighted_by_slides_and_begin_anew() -> None:
    figures = means()
    figures.add({"loss": torch.tensor(1.0), "penalty": torch.tensor(4.0)}, 3)
    figures.add({"loss": torch.tensor(5.0)}, 1)
    assert {name: value.item() for name, value in figures.take().items()} == {"loss": 2.0, "penalty": 4.0}
    assert figures.take() == {} == figures.state_dict()


def test_a_figure_of_no_slide_is_left_out() -> None:
    figures = means()
    figures.add({"loss": torch.tensor(1.0)}, 2)
    figures.add({"task": torch.tensor(0.0)}, 0)
    assert figures.take().keys() == {"loss"}


def test_each_process_goes_on_with_its_own_sums() -> None:
    state = {"names": ["loss"], "sums": torch.tensor([[[6.0, 3.0]], [[2.0, 1.0]]])}
    for rank, expected in ((0, 2.0), (1, 2.0)):
        figures = means(rank, size=2)
        figures.load_state_dict(state)
        assert figures.take()["loss"].item() == expected
    alone = means()
    alone.load_state_dict(state)
    alone.add({"loss": torch.tensor(12.0)}, 1)
    assert alone.take()["loss"].item() == pytest.approx((6 + 2 + 12) / 5)
    idle = means(rank=2, size=3)
    idle.load_state_dict(state)
    assert idle.take() == {}
