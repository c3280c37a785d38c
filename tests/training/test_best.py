from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from slidetl.data.datasets import EpochBatches, EpochSampler
from slidetl.data.resuming import ResumableLoader
from slidetl.errors import UsageError
from slidetl.training.best import COMPLETE, BestCheckpoint, LastCheckpoint, fits, requeued

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


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_run_that_was_moved_keeps_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    """Before, its best was gone, or was that of another training in its place, at the score of its own."""
    monkeypatch.chdir(tmp_path)
    scores = [0.1, 0.5, 0.3, 0.2]
    fit(Path("a"), scores, 3)
    Path("a").rename("moved")
    if is_replaced:
        fit(Path("a"), [0.6, 0.4, 0.4], 3)
    resumed = fit(Path("b"), scores, 4, Path("moved/last.ckpt"))
    best = torch.load(resumed.best_model_path, weights_only=True)
    assert (Path(resumed.best_model_path).parent, best["epoch"]) == (tmp_path / "b", 1)
    assert resumed.best_model_score == torch.tensor(0.5)


@pytest.mark.parametrize("place", ["a", "b"])
def test_the_best_of_another_training_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    scores = [0.5, 0.4, 0.1]
    fit(Path("a"), scores, 2)
    Path("a/last.ckpt").rename("then.ckpt")
    Path("a").rename("moved")
    fit(Path("a"), [0.6, 0.2], 2)
    with pytest.warns(UserWarning, match="the best is counted from here on"):
        resumed = fit(Path(place), scores, 3, Path("then.ckpt"))
    assert resumed.best_model_score == torch.tensor(0.1)
    assert torch.load(resumed.best_model_path, weights_only=True)["epoch"] == 2


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


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: tuple[int, int]) -> int:
        epoch, number = index
        return 100 * epoch + number


class Counted(Scored):
    """Whose batches are known afterwards."""

    def __init__(self) -> None:
        super().__init__([0.5] * 9)
        self.seen: list[int] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.seen += batch.tolist()
        return super().training_step(torch.ones(1))


class Ended(pl.Callback):
    """Stops a training within an epoch, as ``max_time`` does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


class Signalled(pl.Callback):
    """Saves a checkpoint for a requeued job, as SIGUSR1 does; the cluster then refuses to queue the job."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))


def train(
    root: Path,
    *loggers: CSVLogger,
    resumed: Path | None = None,
    end: int = 0,
    signal: int = 0,
    **options: Any,
) -> list[int]:
    """Returns what the training saw."""
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=root,
        logger=loggers or CSVLogger(root, name="logs"),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[
            Ended(end),
            Signalled(signal),
            LastCheckpoint(filename="last", enable_version_counter=False),
        ],
        **{"max_epochs": 1, **options},
    )
    model, data = Counted(), ResumableLoader(Numbers(), EpochBatches(EpochSampler(10, seed=0), 1))
    trainer.fit(model, data, DataLoader(Ones()), ckpt_path=resumed, weights_only=True)
    return model.seen


def last_of(root: Path, version: int) -> Path:
    return root / "logs" / f"version_{version}" / "checkpoints" / "last.ckpt"


def test_a_run_of_several_spellings_is_one(tmp_path: Path) -> None:
    """Before, its first fit was refused as beside an earlier one."""
    (tmp_path / "a").mkdir()
    train(tmp_path / "a" / ".." / "run")
    train(tmp_path / "run")
    root = tmp_path / "run"
    assert list(fits(root)) == [(last_of(root, 1), True), (last_of(root, 0), True)]


def test_checkpoints_elsewhere_are_refused_beside_earlier_ones_alone(tmp_path: Path) -> None:
    """A logger of the fit itself has made ``logs/version_0`` before it looks there."""
    root = tmp_path / "run"
    loggers = CSVLogger(tmp_path / "elsewhere", name="x"), CSVLogger(root, name="logs")
    train(root, *loggers)
    assert (root / "logs" / "version_0").is_dir()
    train(root)
    with pytest.raises(UsageError, match="would take those of an earlier fit"):
        train(root, *loggers)


def test_a_training_that_only_lacks_its_mark_is_complete_once_resumed(tmp_path: Path) -> None:
    root = tmp_path / "run"
    train(root)
    last_of(root, 0).with_name(COMPLETE).unlink()  # as in fits of older versions
    assert next(fits(root)) == (last_of(root, 0), False)
    assert train(root, resumed=last_of(root, 0)) == []
    assert list(fits(root)) == [(last_of(root, 0), True)]
    moved = root.rename(tmp_path / "moved")
    assert list(fits(moved)) == [(last_of(moved, 0), True)]
    train(root, end=3)
    last_of(root, 0).with_name(COMPLETE).unlink()
    assert train(root, resumed=last_of(moved, 0)) == []  # of another run
    assert next(fits(root)) == (last_of(root, 0), False)


def test_a_complete_training_removes_what_it_went_on_from_alone(tmp_path: Path) -> None:
    """Before, the only checkpoint of another training in the folder, too."""
    root = tmp_path / "run"
    left = [root / f"hpc_ckpt_{number}.ckpt" for number in (8, 9, 10)]
    for version, path in enumerate(left[1:]):
        train(root, end=3)
        shutil.copy(last_of(root, version), path)
    left[0].mkdir()  # cannot be removed
    train(root)
    assert all(path.exists() for path in left)
    last_of(root, 2).with_name(COMPLETE).unlink()
    with pytest.warns(UserWarning, match=r"remove .*hpc_ckpt_8\.ckpt, or a later job would"):
        train(root, resumed=left[1])
    assert [path.exists() for path in left] == [True, False, True]
    assert next(fits(root)) == (last_of(root, 3), True)


def test_a_complete_training_removes_what_it_left_for_a_job_that_was_not_queued(tmp_path: Path) -> None:
    """Before, it stayed, and the next fit in the folder went on from it or was refused."""
    root = tmp_path / "run"
    train(root, end=3)
    other = root / "hpc_ckpt_1.ckpt"
    shutil.copy(last_of(root, 0), other)
    train(root, signal=5)
    assert requeued(root) == [other]
    train(root, resumed=last_of(root, 0), end=6)
    assert requeued(root) == []
    shutil.copy(last_of(root, 0), other)
    train(root, resumed=last_of(root, 2))  # which was resumed itself
    assert requeued(root) == []


@pytest.mark.parametrize("options", [{"max_steps": 13}, {"end": 13}, {"end": 3}])
@pytest.mark.parametrize("interval", [1.0, 3])
def test_an_epoch_that_was_cut_goes_on(tmp_path: Path, options: dict[str, Any], interval: float) -> None:
    """Before, its other batches were left out, and the training was complete without them."""
    more: dict[str, Any] = {"max_epochs": 3, "val_check_interval": interval}
    whole = train(tmp_path / "whole", **more)
    cut = train(tmp_path / "cut", **more, **options)
    assert cut == whole[: next(iter(options.values()))]
    limits: list[dict[str, Any]] = [{}, {"max_steps": 25}]
    for limit in limits:
        rest = train(tmp_path / "cut", resumed=last_of(tmp_path / "cut", 0), **more, **limit)
        assert cut + rest == whole[: limit.get("max_steps")]
