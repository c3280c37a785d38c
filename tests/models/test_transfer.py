from __future__ import annotations

import pytest
import torch
from torch import nn

from slidetl.models.backbones import find_weights, weights_sha256
from slidetl.models.transfer import Scratch, WarmRestart
from tests.contracts.strategy import StrategyContract


def batch_norms(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


class TestScratch(StrategyContract):
    strategy = Scratch()

    def test_starts_at_random(self) -> None:
        network = self.network()
        before = weights_sha256(network)
        self.strategy.start(network.backbone)
        assert weights_sha256(network) == before

    def test_learns_batch_statistics(self) -> None:
        network = self.network().train()
        self.strategy.set_training_mode(network.backbone)
        assert all(part.training for part in batch_norms(network))


class TestWarmRestart(StrategyContract):
    strategy = WarmRestart()

    def test_starts_from_the_pretrained_weights(self) -> None:
        network = self.network()
        self.strategy.start(network.backbone)
        weights, _ = find_weights(network.backbone.spec)
        state = network.backbone.net.state_dict()
        assert all(torch.equal(state[key], value) for key, value in weights.items())

    def test_keeps_stored_statistics_unless_told(self) -> None:
        network = self.network().train()
        self.strategy.set_training_mode(network.backbone)
        norms = batch_norms(network)
        assert norms and not any(part.training for part in norms)
        assert all(part.weight.requires_grad for part in norms)
        network.train()
        WarmRestart(batch_statistics=True).set_training_mode(network.backbone)
        assert all(part.training for part in norms)

    def test_backbone_learns_at_its_own_rate(self) -> None:
        network = self.network()
        groups = WarmRestart(backbone_lr_scale=0.25).parameter_groups(network, lr=0.4, weight_decay=0.0)
        backbone = {id(parameter) for parameter in network.backbone.parameters()}
        rates = {id(parameter) in backbone: group["lr"] for group in groups for parameter in group["params"]}
        assert rates == {True: pytest.approx(0.1), False: 0.4}
