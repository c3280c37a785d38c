"""Progress on a terminal and in a log."""

from __future__ import annotations

import pytest

from slidetl.cli.progress import Progress


def test_a_log_has_a_line_for_each_item(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tiles", rate=True) as progress:
        progress.start(10)
        progress.advance(4)
        progress.show("S1: [embedded]")
        progress.advance(6)
        progress.show("S2: failed")
    assert capsys.readouterr().err == "[4/10] S1: [embedded]\n[10/10] S2: failed\n"


def test_a_terminal_has_a_bar_with_the_latest_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich then writes as to a terminal
    monkeypatch.setenv("COLUMNS", "100")
    with Progress("slides", 2) as progress:
        assert progress.is_terminal
        progress.advance()
        progress.show("S1: [used]")
    shown = capsys.readouterr().err
    assert "1/2" in shown and "S1: [used]" in shown
