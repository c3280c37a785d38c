"""Trains in two processes and in one: ``python -m tests.models.ddp_trainings FILE`` saves the weights."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slidetl.models.backbones import Backbone
from slidetl.models.spec import BackboneSpec
from slidetl.training.grader import SlideGrader
from tests.contracts.strategy import fit
from tests.models.test_transfer import DDP, DDP_WITHOUT_NORM
from tests.small import small_spec


class PlainDescent(SlideGrader):
    """Without Adam, which makes a whole step of the rounding where a gradient is nearly zero."""

    def configure_optimizers(self) -> Any:
        super().configure_optimizers()
        return torch.optim.SGD(
            self.transfer.parameter_groups(self.network, self.lr, self.weight_decay), momentum=0.9
        )


def weights(grader: SlideGrader) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in grader.state_dict().items()}


if __name__ == "__main__":
    # A training in the process that started this one leaves it behind; with it, Lightning seeds the
    # processes of a group anew when they start, and a random start is another than in one process.
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.set_num_threads(1)
    states = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = BackboneSpec("cbr_tiny_published_nobn", f"{folder}/weights.pth")
        torch.manual_seed(2)
        torch.save(Backbone(plain).net.state_dict(), plain.pretrained)
        runs = {name: (strategy, small_spec()) for name, strategy in DDP.items()}
        runs |= {name: (strategy, plain) for name, strategy in DDP_WITHOUT_NORM.items()}
        for kind, options in (
            ("together", {"devices": 2, "strategy": "ddp_fork"}),
            ("alone", {"devices": 1}),
        ):
            for name, (strategy, spec) in runs.items():
                torch.manual_seed(0)
                grader = PlainDescent(spec, transfer=strategy, lr=0.02)
                strategy.start(grader.network.backbone)
                states[f"{name}/start"] = weights(grader)
                root = Path(folder) / kind / name.replace(" ", "-")
                states[f"{name}/{kind}"] = weights(fit(grader, root, **options))
    torch.save(states, sys.argv[1])
