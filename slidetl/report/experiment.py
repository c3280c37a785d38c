"""The page of an experiment: text, figures and tables in sections, all in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slidetl.report.page import data_uri, write_page


@dataclass(frozen=True)
class Drawing:
    """A figure on disk.

    Attributes:
        path: its SVG; a PNG of the same name lies beside it.
        alt: what it shows, with its numbers, for who cannot see it.
        caption: for who can.
    """

    path: Path
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The figure as its own address."""
        return data_uri("svg+xml", self.path.read_bytes())


@dataclass(frozen=True)
class Table:
    """A table, its first column naming the rows.

    Attributes:
        caption: what it holds, and how to read it.
        columns: headings.
        rows: cells, as text.
        strong: numbers of the rows that matter most.
        words: numbers of the columns that hold words rather than figures.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: tuple[int, ...] = ()
    words: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        odd = [row for row in self.rows if len(row) != len(self.columns)]
        if odd:
            raise ValueError(f"expected {len(self.columns)} cells for {self.columns}, found {odd[0]}")


Part = str | Drawing | Table


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: its address within the page.
        heading: what it is called.
        parts: paragraphs, drawings and tables, in order.
    """

    anchor: str
    heading: str
    parts: tuple[Part, ...]


def write_experiment(
    path: Path, title: str, notices: Sequence[str], summary: Sequence[str], sections: Sequence[Section]
) -> None:
    """Writes the page, whole or not at all; every text is escaped.

    Args:
        path: the page.
        title: of the page.
        notices: what a reader must know before anything else, such as that something is missing.
        summary: paragraphs: the answer.
        sections: in order, each listed in the contents.

    Raises:
        OSError: a drawing cannot be read, or the page not be written.
    """
    kinds = {str: "text", Drawing: "drawing", Table: "table"}
    write_page(
        path,
        "experiment.html",
        "experiment.css",
        (),
        title=title,
        notices=notices,
        summary=summary,
        sections=[
            (section.anchor, section.heading, [(kinds[type(part)], part) for part in section.parts])
            for section in sections
        ],
    )
