"""Targets, weights of grades and schedules as a training uses them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from slidetl.data.datamodule import SlideDataModule
from slidetl.data.datasets import Bag
from slidetl.errors import UsageError
from slidetl.models.targets import Targets
from slidetl.models.transfer import SharedActivations, SharedWeights, WarmRestart
from slidetl.training.grader import SlideGrader
from slidetl.training.schedules import Triangular2
from tests.conftest import Study
from tests.contracts.strategy import fit
from tests.data.test_datamodule import rewrite
from tests.small import small_spec

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*have no `val_dataloader`", "ignore:The dirpath"
)


class Noted(SlideGrader):
    """Notes the rates and the losses of each step, and what the losses should be."""

    def note(self) -> None:
        torch.manual_seed(0)
        self.rates: list[float] = []
        self.losses: list[tuple[float, float]] = []
        self.expected_weight: Tensor | None = None

    def training_step(self, batch: Bag, batch_idx: int) -> Tensor:
        logits, _ = self.network(batch["tiles"], batch["mask"])
        grades = batch["grade"]
        head = self.network.head
        target = self.targets(
            grades, batch["readers"], head.probabilities(logits).detach(), self.global_step / 4
        )
        expected = head.loss(logits, target, class_weight=self.expected_weight)
        loss = super().training_step(batch, batch_idx)
        self.losses.append((loss.item(), expected.item()))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.rates.append(self.trainer.optimizers[0].param_groups[-1]["lr"])


def make_grader(**options: Any) -> Noted:
    torch.manual_seed(0)
    grader = Noted(small_spec(), transfer=WarmRestart(), **options)
    grader.note()
    return grader


@pytest.mark.slow
def test_a_resumed_training_has_the_rates_and_targets_of_then(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "lr": 0.01,
        "schedule": Triangular2(half_cycle_epochs=0.75),
        "targets": Targets(smoothing=0.1, bootstrap="soft", beta=0.5, bootstrap_after=0.5),
    }
    at_once, resumed = make_grader(**options), make_grader(**options)
    fit(at_once, tmp_path)
    fit(resumed, tmp_path / "resumed", ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, value in at_once.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    # Two steps in an epoch; up and down within three steps.
    expected = [0.01 * options["schedule"].rate(step / 2, 2) for step in range(4)]
    assert at_once.rates == pytest.approx(expected)
    assert resumed.rates == at_once.rates[2:] and resumed.losses == at_once.losses[2:]
    for loss, by_hand in at_once.losses:
        assert loss == pytest.approx(by_hand)


def short(root: Path, max_steps: int = 2) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=root,
        limit_val_batches=0,
        max_epochs=-1,
        max_steps=max_steps,
        accumulate_grad_batches=2,
    )


def test_rare_grades_weigh_more_and_the_rate_follows_the_batch(
    study: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grades = [0] * 8 + [1] * 6 + [2] * 6
    splits = ["val"] + ["train"] * 19
    columns = {"grade": [str(grade) for grade in grades], "split": splits}
    path = rewrite(study, tmp_path / "m.csv", grade_reader1=[""] * 20, grade_reader2=[""] * 20, **columns)
    data = SlideDataModule(
        str(path), str(study.cache), ["a", "b", "c"], bag_size=2, batch_size=3, num_workers=0
    )
    grader = make_grader(grades=["a", "b", "c"], balance=True, lr=0.01, lr_scale_with_batch=True)
    counts = Counter(grades[1:])
    grader.expected_weight = torch.tensor([19 / 3 / counts[grade] for grade in range(3)])
    short(tmp_path).fit(grader, data)
    assert len(grader.losses) == 4
    for loss, by_hand in grader.losses:
        assert loss == pytest.approx(by_hand)
    # The weights go to a GPU with the network, once, and not into a checkpoint.
    assert "_class_weight" not in grader.state_dict()
    assert dict(grader.named_buffers())["_class_weight"].tolist() == grader.expected_weight.tolist()
    # Three slides in a batch, two batches in a step; the peak is meant for four.
    assert max(grader.rates) <= 0.01 * 6 / 4 and grader.peak_lr == pytest.approx(0.015)
    assert "learning rate 0.015: model.lr 0.01 is meant for 4 slides per step, and there are 6" in caplog.text


def test_readers_who_said_nothing_are_missed(study: Study, tmp_path: Path) -> None:
    nothing = [""] * 20
    path = rewrite(study, tmp_path / "m.csv", grade_reader1=nothing, grade_reader2=nothing)
    data = SlideDataModule(str(path), str(study.cache), bag_size=2, num_workers=0)
    with pytest.raises(UsageError, match="no training slide has any; give the manifest the columns"):
        short(tmp_path).fit(make_grader(targets=Targets(readers=True)), data)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"transfer": SharedWeights(alpha_end=1.0)}, r"model\.transfer\.alpha_end would"),
        ({"transfer": SharedActivations(weight_end=1.0)}, r"model\.transfer\.weight_end would"),
        ({"targets": Targets(bootstrap="soft")}, r"model\.targets\.bootstrap_after would"),
    ],
)
def test_what_follows_the_progress_needs_a_planned_end(
    study: Study, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    """Without one, progress stayed at 0, and a ramp or bootstrapping never began."""
    data = SlideDataModule(str(study.manifest), str(study.cache), bag_size=2, num_workers=0)
    grader = SlideGrader(small_spec(), schedule=Triangular2(half_cycle_epochs=0.75), **options)
    with pytest.raises(UsageError, match=named):
        short(tmp_path, max_steps=-1).fit(grader, data)
