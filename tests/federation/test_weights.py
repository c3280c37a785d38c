from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from slidetl.errors import UsageError
from slidetl.federation.weights import SiteUpdate, Weights, find_fault, travelling

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
def test_an_update_that_does_not_fit_has_a_reason(changes: dict[str, Any], reason: str) -> None:
    weights = {name: value for name, value in {**NETWORK, **changes}.items() if value is not None}
    found = find_fault(SiteUpdate("site", weights, 5), NETWORK)
    assert found is not None
    assert re.search(reason, found)


@pytest.mark.parametrize("examples", [0, -3, True, 5.0, float("nan"), "many"])
def test_examples_are_a_whole_number_above_0(examples: Any) -> None:
    assert "expected a whole number above 0" in (
        find_fault(SiteUpdate("site", NETWORK, examples), NETWORK) or ""
    )


def test_metrics_are_finite() -> None:
    assert find_fault(SiteUpdate("site", NETWORK, 5, {"qwk": 0.5}), NETWORK) is None
    assert find_fault(SiteUpdate("site", NETWORK, 5, {"qwk": float("nan")}), NETWORK) is not None
