from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slidetl.errors import UsageError
from slidetl.tasks.schedules import one_cycle, rate_for_batch, triangular, triangular2


def test_rises_to_its_peak_and_falls_to_a_hundredth() -> None:
    rates = [one_cycle(step / 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[10] == max(rates) == pytest.approx(1)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.505)
    assert rates[100] == one_cycle(1.5, 0.1) == pytest.approx(0.01)


def smith(step: int, half: int, base: float, halve: bool) -> float:
    """The formula as the paper prints it, with a peak of 1."""
    cycle = math.floor(1 + step / (2 * half))
    x = abs(step / half - 2 * cycle + 1)
    return base + (1 - base) * max(0.0, 1 - x) / (2.0 ** min(cycle - 1, 1000) if halve else 1)


@given(st.integers(0, 10_000), st.integers(1, 500), st.floats(0, 1))
def test_triangles_follow_the_formula_of_the_paper(step: int, half: int, base: float) -> None:
    assert triangular(step, half, base) == pytest.approx(smith(step, half, base, False))
    assert triangular2(step, half, base) == pytest.approx(smith(step, half, base, True))


def test_triangles_agree_with_torch() -> None:
    modes: tuple[tuple[Literal["triangular", "triangular2"], Callable[[int, int], float]], ...] = (
        ("triangular", triangular),
        ("triangular2", triangular2),
    )
    for mode, rate in modes:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = torch.optim.lr_scheduler.CyclicLR(
            optimizer, 0.25, 1.0, step_size_up=7, mode=mode, cycle_momentum=False
        )
        for step in range(40):
            assert theirs.get_last_lr()[0] == pytest.approx(rate(step, 7))
            optimizer.step()
            theirs.step()


def test_rate_grows_with_the_global_batch() -> None:
    assert rate_for_batch(1e-3, 4, devices=1, accumulation=1, bags=4) == 1e-3
    assert rate_for_batch(1e-3, 4, devices=2, accumulation=3, bags=2) == pytest.approx(3e-3)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one bag"):
        rate_for_batch(1e-3, 4, devices=0, accumulation=1, bags=4)
    with pytest.raises(UsageError, match=r"not 0, 0\.25"):
        triangular(3, 0)
