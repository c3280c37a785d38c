from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slidetl.errors import UsageError
from slidetl.training.schedules import Constant, OneCycle, Triangular, Triangular2, rate_for_batch


def test_rises_to_its_peak_and_falls_to_a_hundredth() -> None:
    cycle = OneCycle(warmup_fraction=0.1)
    rates = [cycle.rate(step / 10, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[10] == max(rates) == pytest.approx(1)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.505)
    assert rates[100] == cycle.rate(15, 10) == pytest.approx(0.01)


def test_one_cycle_needs_an_end() -> None:
    with pytest.raises(UsageError, match=r"set trainer\.max_epochs"):
        OneCycle().rate(0.0, math.inf)
    assert Triangular().rate(0.0, math.inf) == 0.25
    assert Constant().rate(3.0, math.inf) == 1


def smith(step: int, half: int, base: float, halve: bool) -> float:
    """The formula as the paper prints it, with a peak of 1."""
    cycle = math.floor(1 + step / (2 * half))
    x = abs(step / half - 2 * cycle + 1)
    return base + (1 - base) * max(0.0, 1 - x) / (2.0 ** min(cycle - 1, 1000) if halve else 1)


@given(st.integers(0, 10_000), st.integers(1, 500), st.floats(0, 1))
def test_triangles_follow_the_formula_of_the_paper(step: int, half: int, base: float) -> None:
    assert Triangular(half, base).rate(step, 1) == pytest.approx(smith(step, half, base, False))
    assert Triangular2(half, base).rate(step, 1) == pytest.approx(smith(step, half, base, True))


@pytest.mark.parametrize(
    ("mode", "schedule"), [("triangular", Triangular(0.7)), ("triangular2", Triangular2(0.7))]
)
def test_triangles_agree_with_torch(mode: Literal["triangular", "triangular2"], schedule: Triangular) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CyclicLR(
        optimizer, 0.25, 1.0, step_size_up=7, mode=mode, cycle_momentum=False
    )
    for step in range(40):
        assert theirs.get_last_lr()[0] == pytest.approx(schedule.rate(step / 10, 4))
        optimizer.step()
        theirs.step()


@given(st.floats(0.01, 20), st.floats(0.1, 7))
def test_no_schedule_jumps(half: float, warmup: float) -> None:
    for schedule in (Triangular(half), Triangular2(half), OneCycle(warmup / 8)):
        rates = [schedule.rate(epoch * half / 100, 8 * half) for epoch in range(801)]
        assert max(abs(after - before) for before, after in pairwise(rates)) < 0.1
        assert all(0 < rate <= 1 + 1e-12 for rate in rates)


def test_rate_grows_with_the_global_batch() -> None:
    assert rate_for_batch(1e-3, 4, devices=1, accumulation=1, bags=4) == 1e-3
    assert rate_for_batch(1e-3, 4, devices=2, accumulation=3, bags=2) == pytest.approx(3e-3)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one bag"):
        rate_for_batch(1e-3, 4, devices=0, accumulation=1, bags=4)
    with pytest.raises(UsageError, match=r"not 0, 0\.25"):
        Triangular(0)
    with pytest.raises(UsageError, match="between 0 and 1, not 1"):
        OneCycle(1)
