from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from slidetl.errors import UsageError
from slidetl.models.backbones import Backbone, weights_sha256
from slidetl.models.blocks import blocks_of, pretrained_backbone
from slidetl.models.gabor import gabor_filters
from slidetl.models.network import GradingNetwork
from slidetl.models.spec import BackboneSpec
from slidetl.models.transfer import (
    FrozenFeatures,
    GaborInit,
    LoRA,
    MeanVarInit,
    Scratch,
    SharedActivations,
    SharedBoth,
    SharedWeights,
    SlimHybrid,
    TransferStrategy,
    WarmRestart,
    WeightTransfusion,
)
from slidetl.publish.export import build_network, export_model
from slidetl.publish.model_file import load_model
from slidetl.training.drift import distances
from tests.contracts.strategy import Bags, StrategyContract, batch, is_pretrained, make_grader
from tests.small import SMALL, small_spec, small_weights


def batch_norms(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


class TestScratch(StrategyContract):
    strategy = Scratch()

    def test_starts_at_random(self) -> None:
        torch.manual_seed(0)
        fresh = Backbone(small_spec())
        assert weights_sha256(self.network().backbone) == weights_sha256(fresh)

    def test_learns_batch_statistics(self) -> None:
        assert all(part.training for part in batch_norms(self.network()))


class TestFrozenFeatures(StrategyContract):
    strategy = FrozenFeatures()
    frozen = True

    def test_backbone_stays_the_pretrained_one_in_evaluation_mode(self) -> None:
        backbone = self.network().backbone
        assert all(is_pretrained(backbone).values())
        assert not any(module.training for module in backbone.modules())


class TestLoRA(StrategyContract):
    strategy = LoRA(rank=2)

    @pytest.fixture(autouse=True)
    def transformer(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        torch.manual_seed(3)
        path = tmp_path_factory.mktemp("weights") / "w.pth"
        weights = Backbone(BackboneSpec("test_vit")).net.state_dict()
        torch.save(weights, path)
        self.backbone = BackboneSpec("test_vit", str(path))

    def moved(self) -> GradingNetwork:
        """A network after some steps, say."""
        network = self.network()
        with torch.no_grad():
            for name, parameter in network.backbone.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(std=0.1)
        return network

    def test_it_starts_as_the_pretrained_network_and_trains_few_parameters(self) -> None:
        backbone = self.network().backbone
        pretrained = pretrained_backbone(backbone).eval()
        tiles = batch()["tiles"].flatten(0, 1)
        torch.testing.assert_close(backbone(tiles), pretrained(tiles), atol=1e-6, rtol=0)
        trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
        assert trained and all(name.endswith(("lora_a", "lora_b")) for name in trained)
        assert not any(module.training for module in backbone.modules())

    def test_merged_it_computes_the_same_and_has_nothing_more(self) -> None:
        backbone = self.moved().backbone
        plain = Backbone(self.backbone).net
        tiles = batch()["tiles"].flatten(0, 1)
        drift = distances(backbone.net, dict(pretrained_backbone(backbone).net.named_parameters()))
        with torch.inference_mode():
            before = backbone(tiles)
        start = before - pretrained_backbone(backbone).eval()(tiles)
        assert start.abs().max() > 0.01
        self.strategy.merge(backbone)
        with torch.inference_mode():
            torch.testing.assert_close(backbone(tiles), before, atol=1e-5, rtol=1e-5)
        assert [type(part) for part in backbone.net.modules()] == [type(part) for part in plain.modules()]
        assert backbone.net.state_dict().keys() == plain.state_dict().keys()
        # The drift was that of the merged weights.
        anchors = dict(pretrained_backbone(backbone).net.named_parameters())
        for layer, measured in distances(backbone.net, anchors).items():
            assert drift[layer] == pytest.approx(measured, abs=1e-5)
        assert drift["blocks.0.attn.qkv"][0] > 0 == drift["blocks.0.mlp.fc1"][0]

    @pytest.mark.slow
    def test_an_exported_file_has_no_factors(self, tmp_path: Path) -> None:
        grader = make_grader(self.strategy, self.backbone).eval()
        grader.network.load_state_dict({**grader.network.state_dict(), **self.moved().state_dict()})
        tiles = batch()["tiles"][:1]
        with torch.inference_mode():
            expected = grader.network.backbone(tiles[0])
        grader.tile_spec = Bags().tile_spec
        network, card = build_network([grader])
        assert export_model(network, card, tmp_path / "m.pt")["cpu float32"] < 1e-6
        loaded = load_model(tmp_path / "m.pt").network
        assert not any("lora" in name for name in loaded.state_dict())
        with torch.inference_mode():
            torch.testing.assert_close(loaded.embed(tiles[0]), expected, atol=1e-5, rtol=1e-5)

    def test_gradients_pass_checkpoints(self) -> None:
        self.backbone = dataclasses.replace(self.backbone, gradient_checkpointing=True)
        network = self.moved()
        network.backbone.train()  # with checkpoints
        network.backbone(batch()["tiles"].flatten(0, 1)).square().mean().backward()
        assert all(p.grad is not None for p in network.backbone.parameters() if p.requires_grad)

    @pytest.mark.parametrize("name", ["resnet18", "cbr_tiny", "beit_base_patch16_224"])
    def test_other_networks_are_refused(self, name: str) -> None:
        with (
            torch.device("meta"),
            pytest.raises(UsageError, match=f"{name} has no attention layers for LoRA"),
        ):
            self.strategy.adapt(Backbone(BackboneSpec(name)))

    def test_swin_has_updates_too(self) -> None:
        with torch.device("meta"):
            backbone = Backbone(BackboneSpec("swin_tiny_patch4_window7_224"))
            self.strategy.adapt(backbone)
        factors = sum(".lora_a" in name for name, _ in backbone.named_parameters())
        assert factors == 2 * 12  # two layers of each of the twelve blocks

    def test_ranks_below_one_are_refused(self) -> None:
        with pytest.raises(UsageError, match="rank must be at least 1, not 0"):
            LoRA(rank=0)


class TestWarmRestart(StrategyContract):
    strategy = WarmRestart()

    def test_starts_from_the_pretrained_weights(self) -> None:
        assert all(is_pretrained(self.network().backbone).values())

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


class TestWarmRestartStepwise(StrategyContract):
    strategy = WarmRestart(layer_lr_decay=0.5, head_first_epochs=1, gradual_unfreezing_epochs=3)

    def test_each_block_is_slower_than_the_one_above(self) -> None:
        network = self.network()
        groups = self.strategy.parameter_groups(network, lr=1.0, weight_decay=0.0)
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        net: Any = network.backbone.net
        names = (
            "conv_stem",
            "blocks.0",
            "blocks.1",
            "blocks.2",
            "blocks.3",
            "blocks.4",
            "blocks.5",
            "conv_head",
        )
        found = [rates[id(next(net.get_submodule(name).parameters()))] for name in names]
        assert found == pytest.approx([0.1 * 0.5**height for height in range(7, -1, -1)])
        assert rates[id(net.bn1.weight)] == found[0]

    def test_blocks_join_in_from_the_top(self) -> None:
        network = self.network()
        backbone = network.backbone
        counts = []
        for epoch in range(6):
            resting = self.strategy.frozen(backbone, epoch)
            blocks = blocks_of(backbone)
            flat = [parameter for block in blocks for parameter in block]
            assert [id(p) for p in resting] == [id(p) for p in flat[: len(resting)]]
            counts.append(sum(any(block[0] is p for p in resting) for block in blocks))
        assert counts == [8, 6, 4, 2, 0, 0]

    def test_a_part_of_a_block_joins_in_whole(self) -> None:
        backbone = self.network().backbone
        blocks = blocks_of(backbone)
        strategy = WarmRestart(gradual_unfreezing_epochs=2)  # eight blocks in thirds: 2.67, 5.33, 8
        resting = [{id(p) for p in strategy.frozen(backbone, epoch)} for epoch in range(3)]
        assert [sum(id(block[0]) in rest for block in blocks) for rest in resting] == [5, 2, 0]

    def test_frozen_blocks_keep_their_statistics(self) -> None:
        network = self.network()
        strategy = WarmRestart(head_first_epochs=1, batch_statistics=True)
        for epoch in (0, 1):
            network.train()
            strategy.set_training_mode(network.backbone, epoch)
            assert {part.training for part in batch_norms(network.backbone)} == {epoch == 1}


class TestSharedWeights(StrategyContract):
    strategy = SharedWeights()

    @pytest.mark.parametrize("weight_decay", [0.0, 0.01])
    def test_beta_decays_new_kernels_whatever_the_weight_decay(self, weight_decay: float) -> None:
        network = self.network()
        groups = SharedWeights(beta=0.3).parameter_groups(network, 1e-3, weight_decay)
        new = {*network.aggregator.parameters(), *network.head.parameters()}
        for group in groups:
            for parameter in group["params"]:
                is_decayed = parameter in new and parameter.ndim > 1
                assert group["weight_decay"] == (0.3 if is_decayed else 0.0)


class TestSharedWeightsInTheLoss(StrategyContract):
    strategy = SharedWeights(decoupled=False, parameters="all", alpha=0.1, alpha_end=0.0, schedule="cosine")


class TestSharedWeightsFromRandom(StrategyContract):
    strategy = SharedWeights(start_from="random", parameters="all", alpha_end=1.0)

    def test_starts_at_random_and_is_drawn_to_the_pretrained_weights(self) -> None:
        network = self.network()
        assert not all(is_pretrained(network.backbone).values())
        assert all(part.training for part in batch_norms(network))
        reference = self.strategy.reference(network.backbone)
        assert reference is not None
        groups = self.strategy.parameter_groups(network, lr=0.02, weight_decay=0.0)
        apart = [
            self.strategy.after_step(network, reference, groups, 0.0)["weights"].item() for _ in range(3)
        ]
        assert apart[1:] == pytest.approx([apart[0] * 0.8**2, apart[0] * 0.8**4], rel=1e-4)  # 1 - lr alpha

    def test_sees_tiles_as_the_network_that_it_is_drawn_to(self, tmp_path: Path) -> None:
        path = tmp_path / "w.safetensors"
        statistics = {"mean": "[0.7, 0.58, 0.71]", "std": "[0.21, 0.23, 0.18]"}
        save_file(load_file(small_weights()), path, statistics)
        backbone = Backbone(BackboneSpec(SMALL, str(path)))
        before = weights_sha256(backbone.net)
        self.strategy.start(backbone)
        reference = self.strategy.reference(backbone)
        assert reference is not None and weights_sha256(backbone.net) == before
        assert torch.equal(backbone.mean, reference.backbone.mean) and backbone.mean[
            0, 0
        ].item() == pytest.approx(0.7)
        assert torch.equal(backbone.std, reference.backbone.std)
        assert backbone.lineage == reference.backbone.lineage != ()


class TestSharedActivations(StrategyContract):
    strategy = SharedActivations()


class TestSharedActivationsOfChosenLayers(StrategyContract):
    strategy = SharedActivations(layers=("blocks.0",), attention="delta", attention_batches=1)


class TestSharedActivationsFromRandom(StrategyContract):
    strategy = SharedActivations(start_from="random", weight=0.5, weight_end=0.1)


class TestSharedBoth(StrategyContract):
    strategy = SharedBoth(batch_statistics=True)

    def test_both_penalties_are_there(self) -> None:
        network = self.network()
        assert set(self.penalties(network)) == {"activations"}
        coupled = dataclasses.replace(self.strategy, decoupled=False)
        reference = coupled.reference(network.backbone)
        assert reference is not None
        network.backbone.requires_grad_(True)
        inner = type("Both", (TestSharedBoth,), {"strategy": coupled})()
        assert set(inner.penalties(network)) == {"activations", "weights", "new_layers"}
        assert coupled.after_step(network, reference, [], 0.0) == {}


class TestWeightTransfusion(StrategyContract):
    strategy = WeightTransfusion(up_to="blocks.2")

    def test_pretrained_below_and_random_above(self) -> None:
        backbone = self.network().backbone
        learned = {
            key: same for key, same in is_pretrained(backbone).items() if key.endswith("conv_pw.weight")
        }
        assert {key.split(".")[1] for key, same in learned.items() if same} == {"0", "1", "2"}
        assert {key.split(".")[1] for key, same in learned.items() if not same} == {"3", "4"}
        for name, module in backbone.net.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.training == name.startswith(("blocks.3", "blocks.4", "blocks.5"))

    def test_an_unknown_block_is_one_line_with_those_there_are(self) -> None:
        with pytest.raises(
            UsageError, match=r"no block 'layer2' with weights; it has conv_stem, bn1, blocks\.0"
        ):
            WeightTransfusion("layer2").start(Backbone(small_spec()))


class TestMeanVarInit(StrategyContract):
    strategy = MeanVarInit()

    def test_moments_are_those_of_the_pretrained_layers_and_the_weights_are_not(self) -> None:
        backbone = self.network().backbone
        pretrained = pretrained_backbone(backbone).net.state_dict()
        n_checked = 0
        for name, value in backbone.net.named_parameters():
            there = pretrained[name]
            assert not torch.equal(value, there)
            if value.numel() > 5000:
                n_checked += 1
                assert value.mean().item() == pytest.approx(there.mean().item(), abs=0.1 * there.std().item())
                assert value.std().item() == pytest.approx(there.std().item(), rel=0.05)
                assert abs(np.corrcoef(value.detach().flatten(), there.flatten())[0, 1]) < 0.08
        assert n_checked > 5
        assert not is_pretrained(backbone)["bn1.running_mean"]


class TestSlimHybrid(StrategyContract):
    strategy = SlimHybrid(up_to="blocks.1", width=0.5)

    def test_pretrained_below_and_narrow_above(self) -> None:
        backbone = self.network().backbone
        whole = Backbone(small_spec())
        assert backbone.num_features == whole.num_features // 2
        assert whole.description == "mobilenetv3_small_050"
        assert backbone.description == "mobilenetv3_small_050, above blocks.1 0.5 times as wide"
        here, there = backbone.net.state_dict(), whole.net.state_dict()
        same = is_pretrained(backbone)
        for key, value in here.items():
            below = not key.startswith(("blocks.2", "blocks.3", "blocks.4", "blocks.5", "conv_head"))
            assert same[key] == below or not below
            if not below and value.ndim:
                assert len(value) == round(len(there[key]) / 2)
        assert sum(value.numel() for value in here.values()) < 0.4 * sum(v.numel() for v in there.values())

    @pytest.mark.parametrize(
        ("name", "block"),
        [("resnet18", "layer2"), ("mobilenetv2_100", "blocks.2"), ("convnext_atto", "stages.1")],
    )
    def test_networks_of_convolutions_can_be_narrowed(self, name: str, block: str) -> None:
        backbone = Backbone(BackboneSpec(name))
        wide = sum(parameter.numel() for parameter in backbone.parameters())
        if name == "convnext_atto":  # its layers are scaled by parameters of the blocks themselves
            with pytest.raises(UsageError, match="cannot be narrowed"):
                SlimHybrid(block).adapt(backbone)
            return
        SlimHybrid(block, width=0.25).adapt(backbone)
        out = backbone(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
        assert out.shape == (2, backbone.num_features) == (2, {"resnet18": 128}.get(name, 320))
        assert sum(parameter.numel() for parameter in backbone.parameters()) < 0.2 * wide

    def test_a_block_whose_output_is_added_to_cannot_be_the_last(self) -> None:
        with pytest.raises(UsageError, match=r"cannot be narrowed above 'layer2\.0'"):
            SlimHybrid("layer2.0").adapt(Backbone(BackboneSpec("resnet18")))

    def test_width_1_changes_no_shape(self) -> None:
        backbone = Backbone(BackboneSpec("resnet18"))
        shapes = {key: value.shape for key, value in backbone.state_dict().items()}
        SlimHybrid("layer1", width=1.0).adapt(backbone)
        assert {key: value.shape for key, value in backbone.state_dict().items()} == shapes


class TestGaborInit(StrategyContract):
    strategy = GaborInit()

    def test_first_layer_alone_differs_from_random(self) -> None:
        torch.manual_seed(0)
        fresh = Backbone(small_spec()).net.state_dict()
        state = self.network().backbone.net.state_dict()
        assert [key for key in state if not torch.equal(state[key], fresh[key])] == ["conv_stem.weight"]
        kernel, random = state["conv_stem.weight"], fresh["conv_stem.weight"]
        assert torch.equal(kernel[:, 0], kernel[:, 2])
        torch.testing.assert_close(kernel.mean(dim=(2, 3)), torch.zeros(16, 3), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            kernel.std(dim=(1, 2, 3), correction=0), random.std(dim=(1, 2, 3), correction=0)
        )

    def test_filters_answer_to_their_own_orientation(self) -> None:
        size = 7
        filters = gabor_filters(64, size, 8)
        y, x = torch.meshgrid(torch.arange(size) - 3.0, torch.arange(size) - 3.0, indexing="ij")
        for scale in (1, 2, 3):
            wavelength = 2.5 + scale * (size - 2.5) / 3
            for direction in range(8):
                angle = np.pi * direction / 8
                grating = torch.cos(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / wavelength)
                answers = (filters[16 * scale : 16 * scale + 8] * grating).sum((1, 2))
                assert answers.argmax() == direction

    def test_kernels_too_small_for_a_wave_are_refused(self) -> None:
        backbone = Backbone(small_spec())
        backbone.net = nn.Sequential(nn.Conv2d(3, 4, 1))
        with pytest.raises(UsageError, match="no first convolution of at least 3 px"):
            GaborInit().start(backbone)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmRestart(backbone_lr_scale=0), "backbone_lr_scale must be above 0 and finite, not 0"),
        (lambda: WarmRestart(layer_lr_decay=1.5), "layer_lr_decay must be above 0 and up to 1, not 1.5"),
        (lambda: WarmRestart(head_first_epochs=-1), "must be at least 0, not -1, 0"),
        (lambda: SharedWeights(alpha=-1), "alpha must be at least 0, not -1"),
        (lambda: SharedBoth(alpha_end=float("nan")), "alpha_end must be at least 0, not nan"),
        (lambda: SharedBoth(weight=-2), "weight must be at least 0, not -2"),
        (lambda: SharedActivations(attention_batches=0), "attention_batches must be at least 1, not 0"),
        (lambda: SlimHybrid("layer1", width=0), "width must be above 0 and up to 1, not 0"),
        (lambda: GaborInit(orientations=0), "orientations must be at least 1, not 0"),
        (
            lambda: SharedActivations(layers=("nowhere",)).reference(Backbone(small_spec())),
            "mobilenetv3_small_050 has no layer 'nowhere'; it has conv_stem, bn1",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "cbr_tiny"])
def test_blocks_hold_every_parameter_once_in_order(name: str) -> None:
    backbone = Backbone(BackboneSpec(name))
    blocks = blocks_of(backbone)
    flat = [id(parameter) for block in blocks for parameter in block]
    assert sorted(flat) == sorted(id(parameter) for parameter in backbone.parameters())
    expected = {"resnet18": 9, "vit_tiny_patch16_224": 13, "cbr_tiny": 4}
    assert len(blocks) == expected.get(name, len(blocks)) and len(blocks) > 3
    assert all(any(parameter.ndim > 1 for parameter in block) for block in blocks)


# Where batch norm keeps its stored statistics, on the small network; the others on one without batch norm.
DDP: dict[str, TransferStrategy] = {
    "frozen": FrozenFeatures(),
    "stepwise": WarmRestart(layer_lr_decay=0.5, head_first_epochs=1),
    "weights": SharedWeights(alpha=10.0),
    "weights in the loss": SharedWeights(alpha=0.1, decoupled=False, parameters="all"),
    "both": SharedBoth(weight=2.0),
}
DDP_WITHOUT_NORM: dict[str, TransferStrategy] = {
    "scratch": Scratch(),
    "activations from random": SharedActivations(start_from="random"),
    "transfusion": WeightTransfusion(up_to="layers.1"),
    "mean-var": MeanVarInit(),
    "slim": SlimHybrid(up_to="layers.1"),
    "gabor": GaborInit(),
}


@pytest.fixture(scope="module")
def together_and_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights after a training in two processes and in one; apart, as they talk over a socket."""
    path = tmp_path_factory.mktemp("ddp") / "states.pt"
    command = [sys.executable, "-W", "ignore", "-m", "tests.models.ddp_trainings", str(path)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    states: dict[str, Any] = torch.load(path, weights_only=True)
    return states


@pytest.mark.parametrize("name", [*DDP, *DDP_WITHOUT_NORM])
def test_two_processes_compute_what_one_does(name: str, together_and_alone: dict[str, Any]) -> None:
    start, alone, together = (together_and_alone[f"{name}/{kind}"] for kind in ("start", "alone", "together"))
    moved = 0.0
    for key, value in alone.items():
        # A hundredth of the least that counts as moved: sums over other batches round otherwise.
        np.testing.assert_allclose(together[key], value, atol=1e-5, rtol=2e-4, err_msg=key)
        moved = max(moved, (value - start[key]).abs().max().item())
    assert moved > 1e-3
