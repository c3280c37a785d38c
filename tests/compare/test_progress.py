from __future__ import annotations

from io import StringIO

from rich.console import Console

from slidetl.compare.plan import Unit
from slidetl.compare.progress import UnitProgress
from slidetl.compare.records import UnitResult
from slidetl.evaluation.protocol import Fold


def unit(number: int) -> Unit:
    return Unit("warm", Fold(0, str(number), 0, ("a",), ("b",)), None, None, {}, f"key-{number}")


def test_nothing_is_said_of_the_time_left_before_a_unit_has_shown_it() -> None:
    written = StringIO()
    progress = UnitProgress(2, Console(file=written, width=100))
    units = [unit(number) for number in range(9)]
    progress.start([], units)
    assert "not known yet" in str(progress.table().title)
    progress.done(units[0], "", UnitResult((), seconds=600))
    progress.done(units[1], "no memory", None)
    first, failed = written.getvalue().splitlines()[1:]
    assert "[1/9]" in first and "600 s; about " in first
    assert "[2/9]" in failed and "failed: no memory" in failed


def test_a_cluster_is_as_fast_as_it_turns_out_to_be() -> None:
    """Ten units of ten minutes each within a second: a thousand workers and more, whatever was asked for."""
    progress = UnitProgress(1, Console(file=StringIO()))
    units = [unit(number) for number in range(20)]
    progress.start([], units)
    for number in range(10):
        progress.done(units[number], "", UnitResult((), seconds=600))
    assert "about 0 min left" in str(progress.table().title)
