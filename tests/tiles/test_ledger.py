from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetl.errors import CacheError
from slidetl.text import csv_cell
from slidetl.tiles.ledger import EXCLUDED, FAILED, USED, Ledger, LedgerRow, summarise_notes


def row(slide_id: str, status: str = USED, **more: object) -> LedgerRow:
    return LedgerRow(slide_id, f"/slides/{slide_id}.svs", status, **more)  # type: ignore[arg-type]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv")
    assert ledger.rows() == []
    full = LedgerRow(
        "S1",
        '/a b/ä,".svs',
        USED,
        "",
        tiles=12,
        tiles_without_tissue=3,
        tiles_pen=4,
        tiles_unreadable=1,
        mpp_x=0.499,
        mpp_y=0.5,
        vendor="aperio",
        width=10,
        height=20,
        fingerprint="ab",
        seconds=1.25,
        host="host",
        finished_at="2026-01-01",
    )
    ledger.record([full, row("S2", FAILED, reason="damaged")])
    assert ledger.rows() == [full, row("S2", FAILED, reason="damaged")]


def test_rows_are_replaced_in_place_and_others_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv")
    ledger.record([row("S1"), row("S2", FAILED), row("S3")])
    Ledger(tmp_path / "ledger.csv").record([row("S2", EXCLUDED), row("S4")])
    assert [(r.slide_id, r.status) for r in ledger.rows()] == [
        ("S1", USED),
        ("S2", EXCLUDED),
        ("S3", USED),
        ("S4", USED),
    ]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_no_cell_runs_in_a_spreadsheet_or_breaks_a_line(text: str) -> None:
    cells = row("S", reason=text).to_cells()
    assert cells["reason"] == csv_cell(text)
    assert len(cells["reason"].splitlines()) <= 1
    if text.isprintable():
        assert LedgerRow.from_cells(cells).reason == text


def test_a_formula_as_a_file_name_is_defused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv")
    ledger.record([LedgerRow("S", " =cmd|'/c calc'!A0\n.svs", FAILED)])
    with (tmp_path / "ledger.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["path"] == "' =cmd|'/c calc'!A0 .svs"
    assert ledger.rows()[0].path == " =cmd|'/c calc'!A0 .svs"


def test_a_file_name_that_is_no_utf8_does_not_stop_the_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv")
    ledger.record([LedgerRow("S", b"/slides/\xff.svs".decode(errors="surrogateescape"), FAILED)])
    assert ledger.rows()[0].path == "/slides/\\udcff.svs"


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    path.write_text("slide_id,colour\nS1,blue\n")
    with pytest.raises(CacheError, match="not a row of a ledger"):
        Ledger(path).record([row("S2")])
    assert path.read_text() == "slide_id,colour\nS1,blue\n"


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="the ledger cannot be written"):
        Ledger(tmp_path / "file" / "ledger.csv").record([row("S1")])


def test_notes_of_many_slides_are_few_lines() -> None:
    rows = [LedgerRow(f"s{n}", "p", USED, note="a; b", mpp_level0=0.25) for n in range(9)]
    rows += [LedgerRow(f"t{n}", "p", USED, note=f"c{n}", tiles=5, tiles_unreadable=1) for n in range(40)]
    lines = summarise_notes(rows)
    assert lines[0].startswith("40 slides: ")
    assert "tried again by the next run: t0 (1 of 6), t1 (1 of 6)" in lines[0]
    assert lines[1] == "9 slides: a: s0, s1, s2, s3, s4, ..." and lines[2].startswith("9 slides: b: ")
    assert len(lines) == 13 and lines[-1] == "31 more, in the column note of ledger.csv"
