"""The page of an experiment, whatever the experiment is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slidetl.compare.report.html import Drawing, Section, Table, write_experiment, write_markdown

HOSTILE = "</p><script>alert(1)</script>"


def test_text_tables_and_drawings_come_in_order_and_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    drawing = Drawing(tmp_path / "a.svg", "two dots", "Dots.")
    rows = (("one", "1"), ("two", "2"))
    table = Table("Counts.", ("Name", "n"), rows, strong=(1,), words=(1,))
    sections = [Section("a", "First", ("words", drawing, table)), Section("b", "Second", (table, drawing))]
    write_experiment(tmp_path / "page.html", "A title", ["beware"], ["the answer"], sections)
    page = (tmp_path / "page.html").read_text()
    found = re.findall(r"beware|the answer|>words<|Figure \d|(?<=<b>)Table \d", page)
    assert found == ["beware", "the answer", ">words<", "Figure 1", "Table 1", "Table 2", "Figure 2"]
    assert page.count('<tr class="strong"><th scope="row">two</th><td class="words">2</td></tr>') == 2
    assert page.count('alt="two dots"') == 2
    assert '<a href="#b">Second</a>' in page


def test_every_text_is_escaped(tmp_path: Path) -> None:
    table = Table(HOSTILE, (HOSTILE,), ((HOSTILE,),))
    section = Section("a", HOSTILE, (HOSTILE, table))
    write_experiment(tmp_path / "page.html", HOSTILE, [HOSTILE], [HOSTILE], [section])
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 10  # title twice, notice, summary, contents, heading, and the rest


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match=r"expected 2 cells for \('a', 'b'\), found \('1',\)"):
        Table("", ("a", "b"), (("1",),))


def test_markdown_says_the_same_and_lets_no_text_be_more_than_text(tmp_path: Path) -> None:
    drawing = Drawing(tmp_path / "figures" / "a.svg", "two dots", "Dots.")
    table = Table("Counts.", ("Name", "n|m"), (("*one*", "1"), ("two\nlines", "2")), strong=(1,))
    sections = [Section("a", "First", ("words", drawing, table, "<b>[x](y)"))]
    write_markdown(tmp_path / "page.md", "A_title", ["beware"], ["the answer"], sections)
    assert (tmp_path / "page.md").read_text().split("\n") == [
        *("# A\\_title", "", "> beware", "", "the answer", "", "## First", "", "words", ""),
        *("![two dots](figures/a.png)", "", "Dots.", "", "Counts.", ""),
        *("| Name | n\\|m |", "| --- | ---: |", "| \\*one\\* | 1 |", "| **two lines** | **2** |", ""),
        *("\\<b\\>\\[x\\](y)", ""),
    ]
