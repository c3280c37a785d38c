"""The strategies on networks for volumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from slidetl.errors import UsageError
from slidetl.models.backbones import Backbone
from slidetl.models.network import GradingNetwork
from slidetl.models.spec import BackboneSpec
from slidetl.models.transfer import (
    FrozenFeatures,
    Scratch,
    SharedActivations,
    SharedBoth,
    SharedWeights,
    WarmRestart,
)
from tests.contracts.strategy import StrategyContract, fit, make_grader


def fill_gains(network: nn.Module) -> None:
    """Lets gradients through the last norm of each block, which timm starts at 0."""
    with torch.no_grad():
        for name, gain in network.named_parameters():
            if gain.ndim == 1 and name.endswith("weight") and not gain.any():
                gain.fill_(0.5)


class VolumeContract(StrategyContract):
    precision = "32-true"

    @pytest.fixture(autouse=True, params=["conv3d_8", "inflated_test_resnet"])
    def weights(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        torch.manual_seed(3)
        path = tmp_path_factory.mktemp("weights") / "w.pth"
        plane = Backbone(BackboneSpec(request.param).in_plane).net  # of two dimensions
        fill_gains(plane)
        torch.save(plane.state_dict(), path)
        self.backbone = BackboneSpec(request.param, str(path))


class TestScratch(VolumeContract):
    strategy = Scratch()

    def network(self) -> GradingNetwork:
        network = super().network()
        fill_gains(network.backbone)
        return network

    def test_bfloat16_on_a_cpu_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            UsageError, match=r"trainer\.precision bf16-mixed: on a CPU, .* are wrong in it; use 32"
        ):
            fit(make_grader(self.strategy, self.backbone), tmp_path, precision="bf16-mixed")


class TestWarmRestart(VolumeContract):
    strategy = WarmRestart(layer_lr_decay=0.5)


class TestSharedWeights(VolumeContract):
    strategy = SharedWeights()


class TestSharedActivations(VolumeContract):
    strategy = SharedActivations()


class TestSharedBoth(VolumeContract):
    strategy = SharedBoth(decoupled=False)


class TestFrozenFeatures(VolumeContract):
    strategy = FrozenFeatures()
    frozen = True
