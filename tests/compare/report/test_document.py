"""A document as HTML, as Markdown and as text."""

from __future__ import annotations

import re
from pathlib import Path

from slidetl.compare.report.document import Document, Plot, Section, as_text, write_html, write_markdown
from slidetl.compare.table import Table

HOSTILE = "</p><script>alert(1)</script>"


def test_text_tables_and_plots_come_in_order_and_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    table = Table(("Name", "n"), [("one", 1), ("two", 2)], ("two",), (1,), "Counts.")
    plot = Plot(tmp_path / "a.svg", table, "Two dots", "Dots.")
    sections = Section("a", "First", ("words", plot, table)), Section("b", "Second", (table, plot))
    write_html(tmp_path / "page.html", Document("A title", ("beware",), ("the answer",), sections))
    page = (tmp_path / "page.html").read_text()
    found = re.findall(r"beware|the answer|>words<|Figure \d|(?<=<b>)Table \d", page)
    assert found == ["beware", "the answer", ">words<", "Figure 1", "Table 1", "Table 2", "Figure 2"]
    assert page.count('<tr class="strong"><th scope="row">two</th><td class="words">2</td></tr>') == 2
    assert page.count('alt="Two dots. Name: n. one: 1; two: 2."') == 2
    assert '<a href="#b">Second</a>' in page


def test_every_text_is_escaped(tmp_path: Path) -> None:
    table = Table((HOSTILE,), [(HOSTILE,)], title=HOSTILE)
    section = Section("a", HOSTILE, (HOSTILE, table))
    write_html(tmp_path / "page.html", Document(HOSTILE, (HOSTILE,), (HOSTILE,), (section,)))
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 10  # title twice, notice, summary, contents, heading, and the rest


def test_markdown_says_the_same_and_lets_no_text_be_more_than_text(tmp_path: Path) -> None:
    table = Table(("Name", "n|m"), [("*one*", 1), ("two\nlines", 2)], ("two\nlines",), title="Counts.")
    plot = Plot(tmp_path / "figures" / "a.svg", Table(("a", "b"), [("x", 1)]), "Two dots", "Dots.")
    section = Section("a", "First", ("words", plot, table, "<b>[x](y)"))
    write_markdown(tmp_path / "page.md", Document("A_title", ("beware",), ("the answer",), (section,)))
    assert (tmp_path / "page.md").read_text().split("\n") == [
        *("# A\\_title", "", "> beware", "", "the answer", "", "## First", "", "words", ""),
        *("![Two dots. a: b. x: 1.](figures/a.png)", "", "Dots.", "", "Counts.", ""),
        *("| Name | n\\|m |", "| --- | ---: |", "| \\*one\\* | 1 |", "| **two lines** | **2** |", ""),
        *("\\<b\\>\\[x\\](y)", ""),
    ]


def test_a_terminal_gets_aligned_columns() -> None:
    table = Table(("Name", "n"), [("one", 1.0), ("fifteen", 15.25)], title="Counts.")
    assert as_text(["words", table]).splitlines() == [
        *("words", "", "Counts.", "Name         n", "one       1.00", "fifteen  15.25")
    ]
