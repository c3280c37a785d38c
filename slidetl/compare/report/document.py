"""Writes a report of text, plots and tables as one HTML file, as Markdown, and as plain text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from slidetl.compare.table import Table, escape_markdown, table_as_markdown, table_as_text
from slidetl.files import write_whole
from slidetl.page import data_uri, write_page


@dataclass(frozen=True)
class Plot:
    """A plot on disk.

    Attributes:
        path: its SVG; a PNG of the same name lies beside it.
        table: its values, or a summary of them.
        title: the kind of plot and its subject.
        note: explains the plot.
    """

    path: Path
    table: Table
    title: str = ""
    note: str = ""

    @property
    def alt(self) -> str:
        """Text instead of the plot, with the values of the table."""
        return f"{self.title}. {self.table.as_line}"

    @property
    def source(self) -> str:
        """Data URI of the plot."""
        return data_uri("svg+xml", self.path.read_bytes())


Part = str | Plot | Table


@dataclass(frozen=True)
class Section:
    """A section of a report.

    Attributes:
        anchor: its address within the page.
        heading: its title.
        parts: paragraphs, plots and tables, in order.
    """

    anchor: str
    heading: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: of the page.
        notices: warnings, to be read first.
        summary: paragraphs with the answer.
        sections: in order, each listed in the contents.
    """

    title: str
    notices: tuple[str, ...]
    summary: tuple[str, ...]
    sections: tuple[Section, ...]


def write_html(path: Path, document: Document) -> None:
    """Writes the page as a whole; every text is escaped.

    Raises:
        OSError: a plot cannot be read, or the page not be written.
    """
    kinds = {str: "text", Plot: "plot", Table: "table"}
    sections = [
        (section.anchor, section.heading, [(kinds[type(part)], part) for part in section.parts])
        for section in document.sections
    ]
    write_page(
        path, __package__, "experiment.html", "experiment.css", (), document=document, sections=sections
    )


def write_markdown(path: Path, document: Document) -> None:
    """Writes the report as Markdown; plots are links to their PNG, in the file's folder or below.

    Raises:
        OSError: the file cannot be written.
    """
    blocks = [f"# {escape_markdown(document.title)}"]
    blocks += [f"> {escape_markdown(text)}" for text in document.notices]
    blocks += map(escape_markdown, document.summary)
    for section in document.sections:
        blocks.append(f"## {escape_markdown(section.heading)}")
        for part in section.parts:
            if isinstance(part, Plot):
                at = part.path.with_suffix(".png").relative_to(path.parent).as_posix()
                blocks += [f"![{escape_markdown(part.alt)}]({at})", escape_markdown(part.note)]
            elif isinstance(part, Table):
                blocks += [escape_markdown(part.caption), table_as_markdown(part)]
            else:
                blocks.append(escape_markdown(part))
    write_whole(path, "\n\n".join(blocks) + "\n")


def as_text(parts: Iterable[str | Table]) -> str:
    """Formats paragraphs and tables for a terminal."""
    return "\n\n".join(table_as_text(part) if isinstance(part, Table) else part for part in parts)
