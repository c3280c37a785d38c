from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from slidetl.errors import UsageError
from slidetl.federation.weights import SiteUpdate, Weights, find_fault, shown, travelling

NETWORK: Weights = {
    "conv.weight": np.ones((2, 3), np.float32),
    "bn.weight": np.ones(2, np.float32),
    "bn.bias": np.zeros(2, np.float32),
    "bn.running_mean": np.zeros(2, np.float32),
    "bn.running_var": np.ones(2, np.float32),
    "bn.num_batches_tracked": np.array(7, np.int64),
    "norm.weight": np.ones(2, np.float32),
}


def test_batch_normalisation_stays_as_a_whole_and_layer_normalisation_travels() -> None:
    assert set(travelling(NETWORK, "all-but-normalisation")) == {"conv.weight", "norm.weight"}
    assert set(travelling(NETWORK, "all")) == set(NETWORK)


def test_fedbn_without_batch_normalisation_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a network with batch normalisation"):
        travelling({"norm.weight": np.ones(2)}, "all-but-normalisation")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conv.weight": None}, "1 missing entries, such as conv.weight"),
        ({"b\nd": np.ones(1)}, "1 foreign entries, such as b d"),
        ({10**5000: np.ones(1)}, "1 foreign entries, such as int"),
        (
            {"conv.weight": np.ones((3, 2), np.float32)},
            r"conv.weight is float32 \[3, 2\], expected float32 \[2, 3",
        ),
        ({"conv.weight": np.ones((2, 3))}, "conv.weight is float64"),
        ({"bn.num_batches_tracked": np.array(7.0)}, "is float64"),
        ({"conv.weight": [[1.0] * 3] * 2}, "conv.weight is no array"),
        ({"conv.weight": np.full((2, 3), np.nan, np.float32)}, "conv.weight has values that are not finite"),
        ({"conv.weight": np.full((2, 3), np.inf, np.float32)}, "not finite"),
        ({"bn.running_var": np.array([1, -1e-6], np.float32)}, "bn.running_var has negative variances"),
    ],
)
def test_an_update_that_does_not_fit_has_a_reason(changes: dict[Any, Any], reason: str) -> None:
    weights = {name: value for name, value in {**NETWORK, **changes}.items() if value is not None}
    found = find_fault(SiteUpdate("site", weights, 5), NETWORK)
    assert found is not None
    assert re.search(reason, found)


@pytest.mark.parametrize("examples", [0, -3, True, 5.0, float("nan"), "many", 10**5000], ids=shown)
def test_examples_are_a_whole_number_above_0(examples: Any) -> None:
    assert "expected a whole number above 0" in (
        find_fault(SiteUpdate("site", NETWORK, examples), NETWORK) or ""
    )


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"train_loss": float("nan")}, "train_loss is no finite number .*: nan"),
        ({"accuracy": 1e308}, "accuracy is no finite number from 0 to 1: float"),
        ({"rps": -0.1}, "rps is no finite number from 0 to 1: -0.1"),
        ({"mae": 10**5000}, "mae is no finite number .*: int"),
        ({"loss": 1e308}, "loss is no finite number"),
        ({"epsilon": True}, "epsilon is no finite number"),
        ({"epsilon": np.ones(2)}, "epsilon is no finite number .*: ndarray"),
        ({b"x": 1.0}, "metric 'bytes' is not one of accuracy, epsilon"),
        ({str(number): 1.0 for number in range(200_000)}, "metric '0' is not one of"),
        ([1.0], "metrics has another form"),
    ],
)
def test_metrics_are_known_and_within_bounds(metrics: Any, reason: str) -> None:
    assert find_fault(SiteUpdate("site", NETWORK, 5, {"train_loss": 3.4e38, "epsilon": 0}), NETWORK) is None
    assert re.search(reason, find_fault(SiteUpdate("site", NETWORK, 5, metrics), NETWORK) or "")
