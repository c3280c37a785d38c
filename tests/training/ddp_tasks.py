"""Trains further heads in two processes and one: ``python -m tests.training.ddp_tasks FILE`` keeps them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from slidetl.data.datasets import Bag
from slidetl.data.tasks import Task
from slidetl.models.transfer import WarmRestart
from slidetl.tiles.grid import TileSpec
from slidetl.training.grader import SlideGrader
from tests.small import small_spec

TILE_PX = 32  # the least that the small backbone takes
TASKS = [
    Task("second", "second", ("a", "b", "c"), weight=0.5),
    Task("nests", "nests", ("no", "yes"), weight=2.0, of_tiles=True, ordinal=False),
]


class HalfLabelled(pl.LightningDataModule):
    """Eight bags of two tiles, four to a global batch; every other bag has no further label.

    Of two processes, the second has only such.
    """

    tile_spec = TileSpec(mpp=4, tile_size_px=TILE_PX)

    def bags(self) -> list[Bag]:
        generator = torch.Generator().manual_seed(5)
        shape = (2, 3, TILE_PX, TILE_PX)
        return [
            {
                "tiles": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
                "mask": torch.ones(2, dtype=torch.bool),
                "grade": torch.tensor(number % 5),
                "readers": torch.tensor([number % 5]),
                "labels": {
                    "second": torch.tensor(-1 if number % 2 else number // 2 % 3),
                    "nests": torch.tensor([-1, -1] if number % 2 else [number // 2 % 2, -1]),
                },
            }
            for number in range(8)
        ]

    def train_dataloader(self) -> DataLoader[Bag]:
        rank, size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(self.bags()[rank::size], batch_size=4 // size)  # type: ignore[arg-type]


class PlainDescent(SlideGrader):
    """Without Adam, which makes a whole step of the rounding where a gradient is nearly zero."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameter_groups(self.lr), momentum=0.9)


def train(root: Path, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    grader = PlainDescent(small_spec(), transfer=WarmRestart(), lr=0.02, tasks=TASKS)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_epochs=2,
        default_root_dir=root,
        **options,
    )
    trainer.fit(grader, HalfLabelled())
    return {name: value.clone() for name, value in grader.state_dict().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        states = {
            "together": train(Path(folder), devices=2, strategy="ddp_fork"),
            "alone": train(Path(folder), devices=1),
        }
    torch.save(states, sys.argv[1])
