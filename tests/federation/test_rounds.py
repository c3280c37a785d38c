"""Tests of the schemes against plain training with torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slidetl.errors import FederationError, SlideError, UsageError
from slidetl.federation.combine import Krum, TrimmedMean
from slidetl.federation.mixing import full_graph, ring
from slidetl.federation.rounds import Round, Train, averaged, cyclic, peer_to_peer
from slidetl.federation.weights import SiteUpdate, Weights, travelling

RATE = 0.3
Data = Mapping[str, tuple[Tensor, Tensor]]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def state(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in module.state_dict().items()}


def descend(weights: Weights, images: Tensor, targets: Tensor, steps: int) -> dict[str, np.ndarray]:
    """Trains by gradient descent over the whole batch."""
    module = network()
    module.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), targets).backward()
        optimizer.step()
    return state(module)


def data_of(sizes: Mapping[str, int]) -> Data:
    generator = torch.Generator().manual_seed(0)
    return {
        site: (
            torch.randn(n, 5, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (n,), generator=generator),
        )
        for site, n in sizes.items()
    }


def pool(data: Data) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in data.values()]), torch.cat([y for _, y in data.values()])


def trainer(data: Data, steps: int = 1) -> Train:
    return lambda site, weights: SiteUpdate(
        site, descend(weights, *data[site], steps), len(data[site][0]), {"loss": 1.0}
    )


def last(rounds: Iterator[Round]) -> Round:
    return list(rounds)[-1]


def assert_same(found: Weights, expected: Weights, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("sizes", [{"a": 20, "b": 20, "c": 20}, {"a": 5, "b": 12, "c": 43}])
def test_averaged_with_one_local_step_is_pooled_gradient_descent(sizes: dict[str, int]) -> None:
    data, start = data_of(sizes), state(network())
    found = last(averaged(trainer(data), start, sizes, 20))
    pooled = descend(start, *pool(data), 20)
    assert_same(found.weights, pooled, 1e-6)
    assert max(np.abs(pooled[name] - start[name]).max() for name in start) > 0.1


def test_averaged_with_more_local_steps_is_not() -> None:
    sizes = {"a": 20, "b": 20}
    data, start = data_of(sizes), state(network())
    found = last(averaged(trainer(data, 10), start, sizes, 2)).weights
    pooled = descend(start, *pool(data), 20)
    assert max(np.abs(pooled[name] - found[name]).max() for name in start) > 1e-3


def test_cyclic_over_one_site_is_plain_training() -> None:
    data, start = data_of({"a": 20}), state(network())
    found = last(cyclic(trainer(data, 3), start, {"a": 20}, 4))
    assert_same(found.weights, descend(start, *data["a"], 12), 0)


def test_cyclic_travels_in_the_order_given() -> None:
    data, start = data_of({"a": 20, "b": 9}), state(network())
    found = last(cyclic(trainer(data), start, {"b": 9, "a": 20}, 1))
    assert_same(found.weights, descend(descend(start, *data["b"], 1), *data["a"], 1), 0)


def test_peers_of_a_full_graph_are_averaged_with_equal_weights() -> None:
    sizes = {"a": 20, "b": 20, "c": 20}
    data, start = data_of(sizes), state(network())
    mixed = last(peer_to_peer(trainer(data, 2), start, sizes, 5, full_graph(3)))
    assert_same(mixed.weights, last(averaged(trainer(data, 2), start, sizes, 5)).weights, 1e-12)


def test_peers_of_a_ring_stay_apart_and_their_mean_moves_by_the_mean_step() -> None:
    sizes = dict.fromkeys("abcde", 20)
    data, start = data_of(sizes), state(network())
    first, second = peer_to_peer(trainer(data), start, sizes, 2, ring(5))
    assert not np.allclose(second.networks["a"]["0.weight"], second.networks["c"]["0.weight"], atol=1e-6)
    steps = [descend(first.networks[site], *data[site], 1) for site in sizes]
    expected = {name: np.mean([step[name] for step in steps], axis=0) for name in start}
    assert_same(second.weights, expected, 1e-12)


def broken(data: Data, faults: Mapping[str, str]) -> Train:
    """Trains sites; those in ``faults`` drop out or send NaN."""

    def train(site: str, weights: Weights) -> SiteUpdate:
        if faults.get(site) == "dropped":
            raise SlideError("no slide\nto be read")
        update = trainer(data)(site, weights)
        if faults.get(site) == "nan":
            update.weights["2.bias"][0] = np.nan
        return update

    return train


def test_no_scheme_loses_a_round_to_a_site_that_drops_out_or_sends_nan() -> None:
    sizes = dict.fromkeys("abcd", 20)
    data, start = data_of(sizes), state(network())
    reasons = {"b": "dropped out: no slide to be read", "d": "2.bias has values that are not finite"}
    train = broken(data, {"b": "dropped", "d": "nan"})
    good = {site: sizes[site] for site in "ac"}
    found = last(averaged(train, start, sizes, 3))
    assert found.left_out == reasons
    assert set(found.metrics) == {"a", "c"}
    assert_same(found.weights, last(averaged(trainer(data), start, good, 3)).weights, 1e-12)
    travelled = last(cyclic(train, start, sizes, 3))
    assert travelled.left_out == reasons
    assert_same(travelled.weights, last(cyclic(trainer(data), start, good, 3)).weights, 0)
    mixed = last(peer_to_peer(train, start, sizes, 3, full_graph(4)))
    assert mixed.left_out == reasons
    assert_same(mixed.networks["b"], start, 0)
    assert not np.allclose(mixed.networks["a"]["2.bias"], start["2.bias"], atol=1e-3)


def test_a_round_without_a_usable_update_is_an_error_with_its_number_and_reasons() -> None:
    sizes = {"a": 20, "b": 20}
    data, start = data_of(sizes), state(network())
    train = broken(data, {"a": "dropped", "b": "nan"})
    for scheme in (
        averaged(train, start, sizes, 3),
        cyclic(train, start, sizes, 3),
        peer_to_peer(train, start, sizes, 3, ring(2)),
    ):
        with pytest.raises(FederationError, match=r"round 1\b.*no slide to be read"):
            next(scheme)


def test_a_rule_is_refused_before_any_site_trains() -> None:
    def train(site: str, weights: Weights) -> SiteUpdate:
        raise AssertionError("trained")

    with pytest.raises(UsageError, match="Krum with malicious=1 needs at least 5 sites, not 4"):
        next(averaged(train, state(network()), dict.fromkeys("abcd", 1), 1, rule=Krum(1)))


def test_a_dropped_site_spends_no_malicious_site() -> None:
    sizes = dict.fromkeys("abcde", 20)
    train = broken(data_of(sizes), {"a": "dropped"})
    with pytest.raises(FederationError, match="TrimmedMean needs 5 usable updates, and 4 of 5"):
        next(averaged(train, state(network()), sizes, 1, rule=TrimmedMean(2)))


def test_normalisation_that_stays_is_kept_by_its_site() -> None:
    """FedBN: each site has its own scale and statistics, and the rest is the same everywhere."""
    own: dict[str, dict[str, np.ndarray]] = {}

    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()

    data = {site: (x + ("ab".index(site) * 5), y) for site, (x, y) in data_of({"a": 20, "b": 20}).items()}

    def train(site: str, weights: Weights) -> SiteUpdate:
        module = build()
        arrived = {**own.get(site, state(module)), **weights}
        module.load_state_dict({name: torch.from_numpy(value) for name, value in arrived.items()})
        optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(data[site][0]), data[site][1]).backward()
            optimizer.step()
        own[site] = state(module)
        return SiteUpdate(site, travelling(own[site], "all-but-normalisation"), 20)

    start = travelling(state(build()), "all-but-normalisation")
    found = last(averaged(train, start, {"a": 20, "b": 20}, 3)).weights
    assert set(found) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert own["a"]["1.num_batches_tracked"] == own["b"]["1.num_batches_tracked"] == 15
    assert np.abs(own["a"]["1.running_mean"] - own["b"]["1.running_mean"]).min() > 0.1
