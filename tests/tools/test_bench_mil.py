from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

tool: Any = importlib.import_module("tools.bench_mil")


def toy_set(path: Path) -> tuple[Path, NDArray[np.uint8]]:
    """Twenty bags; a positive one holds an instance far out along the first feature."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(20) * 3, rng.integers(1, 6, 20))  # identifiers need not be 0, 1, ...
    features = rng.normal(size=(len(owners), 5))
    labels = (np.arange(20) % 2).astype(np.uint8)
    for bag in range(1, 20, 2):
        features[np.flatnonzero(owners == 3 * bag)[0], 0] += 30
    shuffled = rng.permutation(len(owners))
    np.savez(path, toy_X=features[shuffled], toy_bag=owners[shuffled], toy_bag_label=labels)
    return path, labels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Attention", "MaxPooling", "MultiHopAttention"])
def test_a_plain_rule_is_learned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tool.RATES, "toy", tool.Rates(lr=0.01))
    path, labels = toy_set(tmp_path / "toy.npz")
    (bags,) = tool.read_bags(path)
    folds = tool.fold_numbers(bags.labels, 0)[None]
    probabilities = tool.out_of_fold(bags, tool.AGGREGATORS[name], folds, epochs=8, seed=0)
    assert ((probabilities[0] > 0.5) == labels).mean() > 0.85


@pytest.mark.parametrize("name", list(tool.AGGREGATORS))
def test_every_aggregator_can_be_trained_in_a_batch_of_networks(name: str, tmp_path: Path) -> None:
    (bags,) = tool.read_bags(toy_set(tmp_path / "toy.npz")[0])
    folds = tool.fold_numbers(bags.labels, 0)[None]
    before, after = (
        tool.out_of_fold(bags, tool.AGGREGATORS[name], folds, epochs=epochs, seed=0) for epochs in (0, 1)
    )
    assert np.isfinite(after).all() and (before != after).all()


@pytest.mark.slow
def test_a_held_out_bag_leaves_no_trace(tmp_path: Path) -> None:
    path, _ = toy_set(tmp_path / "toy.npz")
    (bags,) = tool.read_bags(path)
    folds = np.stack([tool.fold_numbers(bags.labels, seed) for seed in (0, 1)])
    make = tool.AGGREGATORS["Attention"]
    before = tool.out_of_fold(bags, make, folds, epochs=2, seed=0)
    flipped = bags.labels.copy()
    flipped[7] = 1 - flipped[7]
    changed = tool.Bags(bags.name, bags.instances, flipped)
    after = tool.out_of_fold(changed, make, folds, epochs=2, seed=0)
    np.testing.assert_array_equal(before[:, 7], after[:, 7])
    others = (folds != folds[:, 7:8]).nonzero()
    assert (before[others] != after[others]).all()


def test_one_network_trained_alone_is_the_same(tmp_path: Path) -> None:
    # Against torch's own optimiser, on a net without dropout.
    values = {"w": torch.randn(2, 3, 4), "b": torch.randn(2, 4)}
    weight, bias = (torch.nn.Parameter(values[name][0].clone()) for name in "wb")
    momenta = {name: torch.zeros_like(value) for name, value in values.items()}
    rates = tool.Rates(lr=0.1, l2=0.01, momentum=0.9)
    groups: list[dict[str, Any]] = [{"params": [weight], "weight_decay": 0.02}, {"params": [bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    untouched = values["w"][1].clone()
    for _ in range(4):
        gradients = {name: torch.randn_like(value) for name, value in values.items()}
        weight.grad, bias.grad = gradients["w"][0].clone(), gradients["b"][0].clone()
        optimizer.step()
        tool.descend(values, momenta, gradients, torch.tensor([1.0, 0.0]), rates, 0)
    torch.testing.assert_close(values["w"][0], weight.detach())
    torch.testing.assert_close(values["b"][0], bias.detach())
    assert torch.equal(values["w"][1], untouched)


def test_bags_of_digits_alternate_and_hold_nines_as_labelled() -> None:
    digits = np.random.default_rng(0).integers(0, 10, 5000)
    bags, labels = tool.draw_bags(digits, 400, np.random.default_rng(1))
    assert labels.tolist() == [1, 0] * 200
    assert [bool((digits[bag] == 9).any()) for bag in bags] == labels.astype(bool).tolist()
    lengths = np.array([len(bag) for bag in bags])
    assert abs(lengths.mean() - 9.7) < 0.4 and 1.5 < lengths.std() < 2.5 and lengths.min() >= 1


@pytest.mark.slow
def test_digits_are_told_apart(test_data: Path) -> None:
    images, digits = tool.read_digits(test_data / "mnist")
    assert images.shape == (10_000, 1, 28, 28) and np.bincount(digits).min() > 800
    area = tool.mnist_auc(images, digits, tool.AGGREGATORS["GatedAttention"], 30, 2, 0, n_test_bags=60)
    assert 0.5 < area < 1


def test_musk_has_no_column_of_labels(test_data: Path) -> None:
    sets = {bags.name: bags for bags in tool.read_bags(test_data / "mil" / "musk.npz")}
    assert {name: (len(bags.labels), bags.labels.sum()) for name, bags in sets.items()} == {
        "musk1": (92, 47),
        "musk2": (102, 39),
    }
    for bags in sets.values():
        instances = torch.cat(bags.instances).numpy()
        assert instances.shape[1] == 166
        owner = np.repeat(bags.labels, [len(bag) for bag in bags.instances])
        assert max(abs(np.corrcoef(column, owner)[0, 1]) for column in instances.T if column.std()) < 0.6


def test_table_says_what_holds_and_what_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gap, low, high = tool.difference([0.88, 0.90], (0.892, 0.04))
    # t(0.975, 1) = 12.706; the standard error of two figures .02 apart is .01.
    half = np.hypot(12.706 * 0.01, 1.96 * 0.04)
    assert (gap, low, high) == pytest.approx((-0.002, -0.002 - half, -0.002 + half), abs=1e-4)
    results = {
        ("mnist100", "MeanPooling"): [0.7, 0.9],
        ("mnist50", "Chowder"): [0.6],
        ("musk1", "MeanPooling"): [0.9],
        ("musk1", "Attention"): [0.5, 0.51, 0.505],
    }
    text = tool.report(results, 50, 20)
    assert "| **no** |" in text and "Not reproduced: Attention on musk1 (below by 0.387)." in text
    assert "| 0.841 ± 0.023 | -0.041 | too few repetitions |" in text
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| m")]
    assert rows == ["| musk1", "| musk1", "| mnist50", "| mnist100"]
    path, _ = toy_set(tmp_path / "toy.npz")
    arguments = ["--npz", str(path), "--aggregators", "MeanPooling", "--epochs", "1"]
    output = ["--output", str(tmp_path / "mil.md")]
    assert tool.main([*arguments, *output, "--repeats", "2"]) == 0
    kept = (tmp_path / "mil.csv").read_text()
    assert len(kept.splitlines()) == 3 and "| toy | MeanPooling | 2 |" in (tmp_path / "mil.md").read_text()
    assert tool.main([*arguments, *output, "--repeats", "3"]) == 0  # goes on where it was
    assert (tmp_path / "mil.csv").read_text().startswith(
        kept
    ) and "toy MeanPooling" in capsys.readouterr().out
    with pytest.raises(ValueError, match="run for 1 epochs, not 2"):
        tool.main([*arguments[:-1], "2", *output])
