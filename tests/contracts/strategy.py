"""What every transfer strategy must do, whatever its name."""

from __future__ import annotations

import torch

from slidetl.models.aggregators import GatedAttention
from slidetl.models.backbones import Backbone, BackboneSpec
from slidetl.models.heads import CumulativeLink
from slidetl.models.network import GradingNetwork
from slidetl.models.transfer import TransferStrategy


class StrategyContract:
    """Subclass it and set ``strategy``."""

    strategy: TransferStrategy

    def network(self) -> GradingNetwork:
        torch.manual_seed(0)
        backbone = Backbone(BackboneSpec())
        features = backbone.num_features
        return GradingNetwork(backbone, GatedAttention(features), CumulativeLink(features, 5))

    def test_every_trained_parameter_is_in_one_group(self) -> None:
        network = self.network()
        self.strategy.start(network.backbone)
        groups = self.strategy.parameter_groups(network, lr=0.1, weight_decay=0.01)
        grouped = [id(parameter) for group in groups for parameter in group["params"]]
        trained = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
        assert sorted(grouped) == sorted(trained)
        for group in groups:
            assert group["params"] and group["lr"] > 0
            decayed = {parameter.ndim > 1 for parameter in group["params"]}
            assert decayed == {group["weight_decay"] > 0}
        new = {
            id(parameter) for part in (network.aggregator, network.head) for parameter in part.parameters()
        }
        assert all(group["lr"] == 0.1 for group in groups if id(group["params"][0]) in new)

    def test_a_step_changes_what_is_trained_and_nothing_else(self) -> None:
        network = self.network()
        self.strategy.start(network.backbone)
        network.train()
        self.strategy.set_training_mode(network.backbone)
        optimizer = torch.optim.AdamW(self.strategy.parameter_groups(network, lr=0.01, weight_decay=0.01))
        before = {name: value.clone() for name, value in network.named_parameters()}
        tiles = torch.randint(0, 256, (2, 3, 3, 48, 48), dtype=torch.uint8)
        logits, _ = network(tiles, torch.ones(2, 3, dtype=torch.bool))
        network.head.loss(logits, torch.tensor([0, 4])).backward()
        optimizer.step()
        for name, value in network.named_parameters():
            assert value.isfinite().all()
            assert torch.equal(value, before[name]) != value.requires_grad, name
