"""The penalties against closed forms, finite differences and NumPy."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from slidetl.errors import UsageError
from slidetl.models.aggregators import MeanPooling
from slidetl.models.backbones import Backbone
from slidetl.models.heads import CumulativeLink
from slidetl.models.network import GradingNetwork
from slidetl.models.penalties import (
    Reference,
    Seen,
    activation_distance,
    channel_attention,
    ramp,
    recorded,
    squared_distance,
)
from slidetl.models.transfer import SharedActivations, SharedBoth, SharedWeights
from tests.small import small_spec


def two_layers(seed: int, norm: bool = False) -> Backbone:
    """A backbone of two linear layers on the mean colour of a tile, or with a batch norm between."""
    torch.manual_seed(seed)
    backbone = Backbone(small_spec())
    middle = nn.BatchNorm1d(4) if norm else nn.Tanh()
    backbone.net = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4), middle, nn.Dropout(0.5), nn.Linear(4, 2)
    )
    backbone.num_features = 2
    return backbone


def make_network(backbone: Backbone) -> GradingNetwork:
    return GradingNetwork(backbone, MeanPooling(2), CumulativeLink(2, 5))


def tiles_and_mask(n_slides: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tiles = torch.randint(0, 256, (n_slides, 3, 3, 8, 8), dtype=torch.uint8, generator=generator)
    mask = torch.ones(n_slides, 3, dtype=torch.bool)
    mask[0, 2] = False
    return tiles, mask


def activation_penalty(strategy: SharedActivations, network: GradingNetwork, reference: Reference) -> Tensor:
    return activation_penalty_of(strategy, network, reference, *tiles_and_mask())


def activation_penalty_of(
    strategy: SharedActivations, network: GradingNetwork, reference: Reference, tiles: Tensor, mask: Tensor
) -> Tensor:
    with recorded(network.backbone, strategy.watched(network.backbone)) as activations:
        network.embed(tiles)
    return strategy.penalties(network, reference, Seen(tiles, mask, activations), 0.0)["activations"]


@pytest.mark.parametrize("parameters", ["kernels", "all"])
def test_l2_sp_in_the_loss_is_the_closed_form_and_so_is_its_gradient(parameters: str) -> None:
    network, reference = make_network(two_layers(0)), Reference(two_layers(1))
    strategy = SharedWeights(alpha=0.3, beta=0.2, decoupled=False, parameters=parameters)  # type: ignore[arg-type]
    tiles, mask = tiles_and_mask()
    found = strategy.penalties(network, reference, Seen(tiles, mask, {}), 0.0)
    total = 0.0
    for name, value in two_layers(0).net.named_parameters():
        if parameters == "all" or name.endswith("weight"):
            there = two_layers(1).net.get_parameter(name)
            total += float(((value.detach().numpy() - there.detach().numpy()) ** 2).sum())
    assert found["weights"].item() == pytest.approx(0.3 / 2 * total, rel=1e-6)
    score = next(parameter for parameter in network.head.parameters() if parameter.ndim > 1).detach()
    assert found["new_layers"].item() == pytest.approx(0.2 / 2 * score.square().sum().item(), rel=1e-6)
    found["weights"].backward()
    for name, value in network.backbone.net.named_parameters():
        if parameters == "all" or name.endswith("weight"):
            assert value.grad is not None
            torch.testing.assert_close(value.grad, 0.3 * (value.detach() - reference.weights[name]))
        else:
            assert value.grad is None


def test_decoupled_l2_sp_is_the_closed_form_with_the_rate_of_each_group() -> None:
    network, reference = make_network(two_layers(0)), Reference(two_layers(1))
    strategy = SharedWeights(alpha=2.0, alpha_end=4.0, parameters="all", backbone_lr_scale=0.5)
    groups = strategy.parameter_groups(network, lr=0.1, weight_decay=0.3)
    groups[0]["lr"] *= 0.5  # as a schedule does
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    found = strategy.after_step(network, reference, groups, progress=0.5)
    total = 0.0
    for name, value in network.named_parameters():
        if not name.startswith("backbone"):
            assert torch.equal(value, before[name])
            continue
        apart = before[name] - reference.weights[name.removeprefix("backbone.net.")]
        assert rates[id(value)] == pytest.approx(0.025 if value.ndim > 1 else 0.05)
        torch.testing.assert_close(value.detach(), before[name] - rates[id(value)] * 3.0 * apart)
        total += float(apart.square().sum())
    assert found["weights"].item() == pytest.approx(3.0 / 2 * total, rel=1e-5)


def test_a_pull_stronger_than_the_distance_lands_on_the_pretrained_weights() -> None:
    network, reference = make_network(two_layers(0)), Reference(two_layers(1))
    strategy = SharedWeights(alpha=1e4, parameters="all", backbone_lr_scale=1.0)
    strategy.after_step(network, reference, strategy.parameter_groups(network, 1.0, 0.0), 0.0)
    for name, value in network.backbone.net.named_parameters():
        torch.testing.assert_close(value.detach(), reference.weights[name], atol=1e-6, rtol=1e-6)


def test_activation_penalty_is_the_closed_form() -> None:
    network, reference = make_network(two_layers(0)), Reference(two_layers(1))
    strategy = SharedActivations(layers=("2", "5"), weight=0.7)
    strategy.set_training_mode(network.backbone)
    found = activation_penalty(strategy, network, reference)
    tiles, mask = tiles_and_mask()

    def layers(backbone: Backbone) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
        mean, std = (value.double().flatten().numpy() for value in (backbone.mean, backbone.std))
        x = (tiles.double().numpy().mean((3, 4)) / 255 - mean) / std  # [B, N, 3]
        w2, b2, w5, b5 = (value.detach().double().numpy() for value in backbone.net.parameters())
        hidden = x @ w2.T + b2
        return [hidden, np.tanh(hidden) @ w5.T + b5]

    expected = 0.0
    for here, there in zip(layers(two_layers(0)), layers(two_layers(1)), strict=True):
        by_tile = ((here - there) ** 2).mean(2)
        expected += np.mean([by_tile[slide][mask[slide].numpy()].mean() for slide in range(2)])
    assert found.item() == pytest.approx(0.7 * expected, rel=1e-5)


def test_penalties_of_half_precision_are_computed_in_single() -> None:
    # 1001 is no number of bfloat16, and neither is the square of 1 + 1/128.
    ones, zeros = (make(1001, dtype=torch.bfloat16) for make in (torch.ones, torch.zeros))
    distance = squared_distance([ones], [zeros])
    assert distance.dtype == torch.float32 and distance.item() == 1001
    activation = torch.full((1, 4, 2, 2), 1 + 1 / 128, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, dtype=torch.bool)
    found = activation_distance(
        {"a": activation}, {"a": torch.zeros_like(activation)}, mask, {}, two_layers(0)
    )
    assert found.dtype == torch.float32 and found.item() == (1 + 1 / 128) ** 2


def test_activation_penalty_agrees_with_finite_differences() -> None:
    network = make_network(two_layers(0)).double()
    reference = Reference(two_layers(1)).double()
    strategy = SharedActivations(layers=("2", "5"))
    strategy.set_training_mode(network.backbone)
    activation_penalty(strategy, network, reference).backward()
    step = 1e-6
    for parameter in network.backbone.net.parameters():
        assert parameter.grad is not None
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for index in range(0, flat.numel(), 3):
            values = []
            for sign in (1, -1):
                flat[index] += sign * step
                values.append(activation_penalty(strategy, network, reference).item())
                flat[index] -= sign * step
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(
                gradient[index].item(), rel=1e-4, abs=1e-6
            )


def test_what_padding_holds_does_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    here, there = (torch.randn(6, 5, 4, 4, generator=generator) for _ in range(2))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    attention = {"l": torch.softmax(torch.randn(5, generator=generator), 0)}
    found = activation_distance({"l": here}, {"l": there}, mask, attention, two_layers(0))
    by_tile = ((here - there) ** 2).mean((2, 3)) @ attention["l"]
    assert found.item() == pytest.approx(((by_tile[:2].mean() + by_tile[3:].mean()) / 2).item(), rel=1e-6)
    here[2] = float("nan")
    assert (
        activation_distance({"l": here}, {"l": there}, mask, attention, two_layers(0)).item() == found.item()
    )


@pytest.mark.parametrize("shape", [(6, 5), (6, 7, 5), (6, 5, 4, 4), (6, 4, 4, 5)])
def test_equal_attention_is_the_plain_mean_for_vectors_tokens_and_images(shape: tuple[int, ...]) -> None:
    here, there = torch.randn(shape), torch.randn(shape)
    mask = torch.ones(2, 3, dtype=torch.bool)
    plain = activation_distance({"l": here}, {"l": there}, mask, {}, two_layers(0))
    alike = activation_distance({"l": here}, {"l": there}, mask, {"l": torch.full((5,), 0.2)}, two_layers(0))
    assert plain.item() == pytest.approx((here - there).square().mean().item(), rel=1e-5)
    assert alike.item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_equal_weights_cost_exactly_nothing_whatever_norm_and_dropout_do(batch_statistics: bool) -> None:
    backbone = two_layers(0, norm=True)
    backbone.net(torch.randn(64, 3, 8, 8))  # statistics that differ from those of the batch
    reference = Reference(copy.deepcopy(backbone))
    kept = {name: value.clone() for name, value in reference.weights.items()}
    network = make_network(backbone).train()
    strategy = SharedBoth(layers=("2", "3", "5"), batch_statistics=batch_statistics, decoupled=False)
    strategy.set_training_mode(network.backbone)
    tiles, mask = tiles_and_mask()
    with recorded(network.backbone, strategy.watched(network.backbone)) as activations:
        network.embed(tiles)
    found = strategy.penalties(network, reference, Seen(tiles, mask, activations), 0.0)
    assert found["activations"].item() == found["weights"].item() == 0
    assert reference.weights.keys() == kept.keys() and len(kept) == 9  # two kernels, three vectors, norm
    for name, value in reference.weights.items():
        assert torch.equal(value, kept[name]), name
    moved = not torch.equal(backbone.net.state_dict()["3.running_mean"], kept["3.running_mean"])
    assert moved == batch_statistics


def test_channels_of_maps_that_have_them_last_are_weighed() -> None:
    """Maps of Swin are ``[N, H, W, C]``: the rows of the image had been weighed."""
    backbones = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        backbone = Backbone(small_spec())
        swin: dict[str, Any] = {
            "img_size": 32,
            "embed_dim": 8,  # as many as rows: only the network tells
            "depths": (1, 1),
            "num_heads": (1, 2),
            "window_size": 4,
        }
        backbone.net, backbone.num_features = SwinTransformer(num_classes=0, **swin), 16
        backbones.append(backbone)
    reference = Reference(backbones[0])
    network = GradingNetwork(backbones[1], MeanPooling(16), CumulativeLink(16, 5))
    tiles = torch.randint(0, 256, (1, 2, 3, 32, 32), dtype=torch.uint8)
    mask = torch.ones(1, 2, dtype=torch.bool)
    strategy = SharedActivations(layers=("layers.0", "layers.1"))
    weights = channel_attention(reference, network, strategy.layers, [(tiles, mask, torch.tensor([1]))], 1)
    assert {layer: len(value) for layer, value in weights.items()} == {"layers.0": 8, "layers.1": 16}
    kept: list[Tensor] = []
    for of in (network.backbone, reference.backbone):
        of.eval().net.get_submodule("layers.0").register_forward_hook(
            lambda module, inputs, output: kept.append(output)
        )
    reference.attention = {"layers.0": torch.eye(8)[3]}
    with torch.no_grad():
        found = activation_penalty_of(
            SharedActivations(layers=("layers.0",)), network, reference, tiles, mask
        )
    assert kept[0].shape == (2, 8, 8, 8)
    expected = (kept[0] - kept[1])[..., 3].square().mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_reference_is_nowhere_but_moves_along() -> None:
    reference = Reference(two_layers(0))
    assert not list(reference.parameters()) and not reference.state_dict()
    assert len(reference.weights) == 4 and not any(
        value.requires_grad for value in reference.weights.values()
    )
    reference.attention = {"2": torch.ones(4) / 4}
    moved = reference.to("meta")
    assert {value.device.type for value in [*moved.weights.values(), *moved.attention.values()]} == {"meta"}
    holder = nn.Module()
    holder.reference = Reference(two_layers(0))
    assert not holder.state_dict()
    holder.load_state_dict({})


def test_attention_is_the_softmax_of_what_silencing_a_channel_costs() -> None:
    backbone = two_layers(0)
    with torch.no_grad():
        backbone.net.get_parameter("5.weight")[:, 0] *= 20  # the first channel carries the answer
        backbone.net.get_parameter("5.weight")[:, 3] = 0  # the last one is never read
    reference, network = Reference(backbone), make_network(two_layers(1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tiles = torch.zeros(8, 3, 3, 8, 8, dtype=torch.uint8)
    grades = torch.arange(8) % 5
    for slide in range(8):
        tiles[slide] = torch.randint(
            40 * int(grades[slide]), 40 * int(grades[slide]) + 60, (3, 3, 8, 8), generator=generator
        )
    batches = [(tiles, torch.ones(8, 3, dtype=torch.bool), grades)]
    weights = channel_attention(reference, network, ["2", "5"], batches)
    assert {layer: len(value) for layer, value in weights.items()} == {"2": 4, "5": 2}
    for value in weights.values():
        assert value.sum().item() == pytest.approx(1, rel=1e-5)
    assert weights["2"].argmax() == 0
    # Channel 3 is not read: silencing it costs nothing, so the ratio of weights tells the cost of another.
    rises = (weights["2"] / weights["2"][3]).log()
    aggregator, head = copy.deepcopy(network.aggregator), copy.deepcopy(network.head)
    lower, upper = (
        nn.Sequential(*list(reference.backbone.net.children())[part]) for part in (slice(3), slice(3, None))
    )
    x = lower((tiles.flatten(0, 1) / 255 - reference.backbone.mean) / reference.backbone.std)

    def embed(hidden: Tensor) -> Tensor:
        out: Tensor = upper(hidden)
        return out.view(8, 3, 2)

    optimizer = torch.optim.Adam([*head.parameters()], lr=1e-2)
    mask = batches[0][1]
    for _ in range(100):
        optimizer.zero_grad()
        head.loss(head(aggregator(embed(x), mask).embedding), grades).backward()
        optimizer.step()
    silent = x.clone()
    silent[:, 0] = 0
    with torch.no_grad():
        losses = [head.loss(head(aggregator(embed(h), mask).embedding), grades) for h in (silent, x)]
    assert rises[0].item() == pytest.approx((losses[0] - losses[1]).item(), rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_weight_goes_from_here_to_there() -> None:
    assert ramp(3.0, None, "cosine", 0.7) == 3.0
    assert [ramp(1.0, 3.0, "linear", progress) for progress in (0, 0.25, 1, 1.5)] == [1.0, 1.5, 3.0, 3.0]
    assert ramp(1.0, 0.0, "cosine", 0.25) == pytest.approx(0.5 + math.cos(math.pi / 4) / 2)


def test_a_layer_that_is_never_called_is_refused() -> None:
    backbone = two_layers(0)
    backbone.net.add_module("unused", nn.Linear(1, 1))
    backbone.net.forward = lambda x: x.mean((2, 3))
    message = "layer 'unused' of mobilenetv3_small_050 is never called as a whole"
    with pytest.raises(UsageError, match=message), recorded(backbone, ["unused"]):
        backbone(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
