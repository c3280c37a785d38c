"""The page of an experiment: text, figures and tables in sections, as HTML in one file and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slidetl.page import data_uri, write_page, write_whole


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
        __package__,
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


def write_markdown(
    path: Path, title: str, notices: Sequence[str], summary: Sequence[str], sections: Sequence[Section]
) -> None:
    """Writes the same for a repository or a paper: drawings are links to their PNG beside the file.

    Args:
        path: the file; drawings lie in its folder or below.
        title: of the page.
        notices: what a reader must know before anything else.
        summary: paragraphs: the answer.
        sections: in order.

    Raises:
        OSError: the file cannot be written.
    """
    blocks = [f"# {_plain(title)}", *(f"> {_plain(text)}" for text in notices), *map(_plain, summary)]
    for section in sections:
        blocks.append(f"## {_plain(section.heading)}")
        for part in section.parts:
            if isinstance(part, Drawing):
                at = part.path.with_suffix(".png").relative_to(path.parent).as_posix()
                blocks += [f"![{_plain(part.alt)}]({at})", _plain(part.caption)]
            elif isinstance(part, Table):
                blocks += [_plain(part.caption), "\n".join(_rows(part))]
            else:
                blocks.append(_plain(part))
    write_whole(path, "\n\n".join(blocks) + "\n")


def _rows(table: Table) -> list[str]:
    rule = ["---" if number in (0, *table.words) else "---:" for number in range(len(table.columns))]
    rows = [[*map(_plain, table.columns)], rule]
    for number, row in enumerate(table.rows):
        rows.append([f"**{_plain(cell)}**" if number in table.strong else _plain(cell) for cell in row])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _plain(text: str) -> str:
    """A text in one line that means nothing to Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
