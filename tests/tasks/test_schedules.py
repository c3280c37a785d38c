from __future__ import annotations

import pytest

from slidetl.tasks.schedules import one_cycle


def test_rises_to_its_peak_and_falls_to_a_hundredth() -> None:
    rates = [one_cycle(step / 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[10] == max(rates) == pytest.approx(1)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.505)
    assert rates[100] == one_cycle(1.5, 0.1) == pytest.approx(0.01)
