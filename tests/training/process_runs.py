"""Trains, resumes and tests in some processes: ``python -m tests.training.process_runs STUDY FOLDER``.

Apart from the tests' own process, which has threads and so must not fork. What each run leaves in its folder
is compared by ``test_processes.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional

from slidetl.data.datamodule import SlideDataModule
from slidetl.data.sampling import AttentionGuided
from slidetl.models.aggregators import Aggregated, GatedAttention
from slidetl.models.transfer import FrozenFeatures, SharedWeights
from slidetl.training.grader import SlideGrader
from slidetl.training.outputs import ResultFiles
from slidetl.training.schedules import OneCycle
from tests.small import small_spec

STEPS_AN_EPOCH = 5
# In the middle of the first epoch, and of the second; what other processes add does not depend on which.
RESUMED_AT = {"alone": (2, 8), "alone with a worker": (8,), "together": (8,)}


class Forgetful(GatedAttention):
    """Leaves features out at random, so that a training depends on chance as well."""

    def forward(self, embeddings: Tensor, mask: Tensor) -> Aggregated:
        return super().forward(functional.dropout(embeddings, 0.2, self.training), mask)


def data(manifest: Path, cache: Path, **options: Any) -> SlideDataModule:
    settings = {"num_workers": 0, "sampling": AttentionGuided(), **options}
    return SlideDataModule(str(manifest), str(cache), bag_size=4, **settings)


def trainer(root: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "logger": CSVLogger(root, name="logs", version=0),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 2,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            "default_root_dir": root,
            "callbacks": [ModelCheckpoint(root, "{step}", save_top_k=-1, every_n_train_steps=2)],
            **options,
        }
    )


def fit(root: Path, module: SlideDataModule, ckpt_path: Path | None = None, **options: Any) -> None:
    torch.manual_seed(0)
    grader = SlideGrader(
        small_spec(), Forgetful, transfer=SharedWeights(alpha=0.1), lr=1e-3, schedule=OneCycle()
    )
    trainer(root, **options).fit(grader, module, ckpt_path=ckpt_path, weights_only=False)


def test(root: Path, module: SlideDataModule, **options: Any) -> None:
    torch.manual_seed(0)
    grader = SlideGrader(small_spec(), transfer=FrozenFeatures(), schedule=OneCycle())
    trainer(root, callbacks=[ResultFiles()], **options).test(grader, module, verbose=False)


def run_all(study: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    manifest, cache = folder / "manifest.csv", study / "cache"
    runs: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("alone", {}, {"batch_size": 2}),
        ("alone with a worker", {}, {"batch_size": 2, "num_workers": 1}),
        ("together", {"devices": 2, "strategy": "ddp_fork"}, {"batch_size": 1}),
    )
    for name, options, bags in runs:
        fit(folder / name, data(manifest, cache, **bags), **options)
        for step in RESUMED_AT[name]:
            checkpoint = folder / name / f"step={step}.ckpt"
            root = folder / f"{name}, resumed at {step}"
            fit(root, data(manifest, cache, **bags), checkpoint, **options)
    for processes in (1, 3):
        options = {"devices": processes, "strategy": "ddp_fork" if processes > 1 else "auto"}
        test(folder / f"tested by {processes}", data(manifest, cache), **options)
    lone = data(folder / "lone.csv", cache)
    test(folder / "lone", lone)
    test(folder / "lone, tested by 3", lone, devices=3, strategy="ddp_fork")


if __name__ == "__main__":
    from tests.training import process_runs  # checkpoints name classes by their module, which is not __main__

    process_runs.run_all(Path(sys.argv[1]), Path(sys.argv[2]))
