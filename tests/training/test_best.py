from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from slidetl.training.best import BestCheckpoint, _step_of

QUIET = (
    "ignore:.*dirpath has changed",
    "ignore:.*does not have many workers",
    "ignore:.*exists and is not empty",
)
pytestmark = pytest.mark.filterwarnings(*QUIET, "ignore:.*smaller than the logging interval")


class Ones(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(1)


class Scored(pl.LightningModule):
    """Whose score in each epoch is known beforehand."""

    def __init__(self, scores: list[float], losses: list[float] | None = None) -> None:
        super().__init__()
        self.scores, self.losses = scores, losses
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch).sum()
        return loss

    def validation_step(self, batch: torch.Tensor) -> None:
        self.log("score", self.scores[self.current_epoch])
        if self.losses:
            self.log("val/loss", self.losses[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path,
    scores: list[float],
    epochs: int,
    ckpt_path: Path | None = None,
    losses: list[float] | None = None,
    **options: Any,
) -> BestCheckpoint:
    best = BestCheckpoint(folder, **{"monitor": "score", "mode": "max", "filename": "best", **options})
    last = pl.callbacks.ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[best, last],
    )
    data = DataLoader(Ones())
    torch.manual_seed(0)
    trainer.fit(Scored(scores, losses), data, data, ckpt_path=ckpt_path, weights_only=True)
    return best


@pytest.mark.parametrize("scores", [[0.1, 0.9, 0.3, 0.5], [0.1, 0.3, 0.2, 0.9], [0.9, 0.1, 0.9, 0.2]])
def test_the_best_is_that_of_the_whole_training(tmp_path: Path, scores: list[float]) -> None:
    whole = fit(tmp_path / "whole", scores, 4)
    fit(tmp_path / "a", scores, 2)
    resumed = fit(tmp_path / "b", scores, 4, tmp_path / "a" / "last.ckpt")
    assert Path(resumed.best_model_path) == tmp_path / "b" / "best.ckpt"
    here, there = (torch.load(best.best_model_path, weights_only=True) for best in (whole, resumed))
    assert here["epoch"] == there["epoch"] == scores.index(max(scores))
    assert torch.equal(here["state_dict"]["layer.weight"], there["state_dict"]["layer.weight"])
    assert whole.best_model_score == resumed.best_model_score == torch.tensor(max(scores))
    assert (tmp_path / "a" / "best.ckpt").is_file()
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"best.ckpt", "last.ckpt"}
    again = fit(tmp_path / "c", [*scores, 0.4], 5, tmp_path / "b" / "last.ckpt")  # and once more
    assert torch.load(again.best_model_path, weights_only=True)["epoch"] == scores.index(max(scores))


@pytest.mark.parametrize("gone", [True, False])
def test_a_best_that_is_gone_is_said_to_be(tmp_path: Path, gone: bool) -> None:
    assert _step_of(str(tmp_path / ("x" * 300) / "best.ckpt")) == float("inf")  # no plain "not found"
    scores = [0.5, 0.4, 0.9, 0.3]
    fit(tmp_path / "a", scores, 2)
    (tmp_path / "a" / "last.ckpt").rename(tmp_path / "then.ckpt")
    if gone:
        (tmp_path / "a" / "best.ckpt").unlink()
    else:  # it went on in its own folder, and found a better one
        fit(tmp_path / "a", scores, 3, tmp_path / "then.ckpt")
    with pytest.warns(UserWarning, match="the best is counted from here on"):
        resumed = fit(tmp_path / "b", [*scores[:2], 0.2, 0.1], 4, tmp_path / "then.ckpt")
    assert resumed.best_model_score == torch.tensor(0.2)


def test_an_undefined_score_is_never_the_best(tmp_path: Path) -> None:
    nan = float("nan")
    best = fit(tmp_path, [nan, -0.2, nan, 0.1, nan], 5)
    assert best.best_model_score == pytest.approx(0.1)
    state = torch.load(best.best_model_path, weights_only=True)
    assert state["epoch"] == 3


@pytest.mark.parametrize("score", [float("nan"), 0.0])
def test_equal_and_undefined_scores_are_told_apart_by_the_loss(tmp_path: Path, score: float) -> None:
    """Validation of one grade, and predictions of one grade: the first epoch was kept."""
    losses = [3.0, 2.0, float("nan"), 1.0, 1.5]
    best = fit(tmp_path / "whole", [score] * 5, 5, losses=losses)
    assert torch.load(best.best_model_path, weights_only=True)["epoch"] == 3
    fit(tmp_path / "a", [score] * 5, 2, losses=losses)
    worse = [*losses[:2], 2.5, 2.5, 2.5]
    resumed = fit(tmp_path / "b", [score] * 5, 5, tmp_path / "a" / "last.ckpt", worse)
    assert torch.load(resumed.best_model_path, weights_only=True)["epoch"] == 1
    late = fit(tmp_path / "late", [score] * 3, 3, losses=[float("nan"), 2.0, 3.0])
    assert torch.load(late.best_model_path, weights_only=True)["epoch"] == 1 and late.has_judged
    lowest = fit(tmp_path / "min", [score] * 5, 5, losses=losses, mode="min")
    assert torch.load(lowest.best_model_path, weights_only=True)["epoch"] == 3


def test_of_several_checkpoints_the_best_has_the_least_loss(tmp_path: Path) -> None:
    best = fit(tmp_path, [0.5] * 4, 4, losses=[3.0, 1.0, 2.0, 4.0], filename="{epoch}", save_top_k=2)
    assert Path(best.best_model_path).name == "epoch=1.ckpt"
    assert {path.name for path in tmp_path.glob("epoch*")} == {"epoch=1.ckpt", "epoch=2.ckpt"}
