from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch

from slidetl.federation.weights import find_fault

tool: Any = importlib.import_module("tools.run_federated_digits")
LABELS = torch.arange(10).repeat_interleave(100)


@pytest.mark.parametrize("concentration", [math.inf, 0.5])
def test_every_digit_is_dealt_once_evenly_or_skewed(concentration: float) -> None:
    parts = tool.deal(LABELS, 10, concentration, seed=0)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1000))
    most = [np.bincount(LABELS[part], minlength=10).max() / len(part) for part in parts.values()]
    assert (max(most) < 0.2) if math.isinf(concentration) else (np.median(most) > 0.3)


def trainer() -> object:
    images = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 10
    data = tool.Digits(images, labels, images, labels.numpy())
    return tool.Trainer(data, {"a": np.arange(20), "b": np.arange(20)}, 0.1, 5, seed=0)


def test_attackers_send_what_the_page_tells() -> None:
    start = tool.state_of(tool.build())
    honest = trainer()("a", start)  # type: ignore[operator]
    sent = {attack: tool.attacked(trainer(), attack, ["a"])("a", start) for attack in tool.ATTACKS}
    name = "3.bias"
    change = honest.weights[name] - start[name]
    np.testing.assert_allclose(sent["sign"].weights[name] - start[name], -change, atol=1e-6)
    flipped = sent["labels"].weights[name] - start[name]
    assert np.abs(flipped - change).max() > 1e-3
    np.testing.assert_allclose(sent["scaled"].weights[name] - start[name], 10 * flipped, atol=1e-5)
    assert sent["claim"].examples == 10**9
    np.testing.assert_array_equal(sent["claim"].weights[name], sent["labels"].weights[name])
    assert "not finite" in (find_fault(sent["NaN"], start) or "")
    untouched = tool.attacked(trainer(), "sign", ["b"])("a", start)
    np.testing.assert_array_equal(untouched.weights[name], honest.weights[name])
