"""Formats tables of values and their cells as text, Markdown and CSV."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from slidetl.evaluation.bootstrap import Interval
from slidetl.text import with_digits

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Rows of values, named by their first cell.

    Attributes:
        columns: headings; a pair is a heading and the format of its numbers (``.2f`` if there is none, ``p``
            for p-values).
        rows: cells: text, numbers, intervals, or None for no value.
        strong: first cells of the rows to stress.
        words: numbers of the columns of text, besides the first one.
        title: a sentence that names the content.
        note: sentences that explain how to read the table.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """

    columns: tuple[str | tuple[str, str], ...]
    rows: Sequence[tuple[Any, ...]]
    strong: tuple[str, ...] = ()
    words: tuple[int, ...] = ()
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        odd = [row for row in self.rows if len(row) != len(self.columns)]
        if odd:
            raise ValueError(f"expected {len(self.columns)} cells for {self.headings}, found {odd[0]}")

    @property
    def headings(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(column if isinstance(column, str) else column[0] for column in self.columns)

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """Rows as text."""
        forms = [".2f" if isinstance(column, str) else column[1] for column in self.columns]
        return [
            tuple(format_cell(cell, form) for cell, form in zip(row, forms, strict=True)) for row in self.rows
        ]

    @property
    def caption(self) -> str:
        """Title and note."""
        return f"{self.title} {self.note}".rstrip()

    @property
    def as_line(self) -> str:
        """One line of text, instead of a plot of the rows."""
        by_name: dict[str, list[str]] = {}
        for name, *cells in self.cells:
            by_name.setdefault(name, []).append(", ".join(cells))
        rows = "; ".join(f"{name}: {' | '.join(cells)}" for name, cells in by_name.items())
        return f"{self.headings[0]}: {', '.join(self.headings[1:])}. {rows}."


def format_cell(cell: Any, form: str = ".2f") -> str:
    """Formats a value of a table; ``form`` is a format specification, or ``p`` for a p-value."""
    if cell is None:
        return NONE
    if isinstance(cell, str | Integral):
        return str(cell)
    if isinstance(cell, Interval):
        return format_interval(cell, form)
    if form == "p" and not math.isnan(cell):
        return f"{cell:.3f}" if cell >= 0.0005 else "< 0.001"
    if form == "p":
        return "undefined"
    return format_number(cell, form)


def format_number(value: float, form: str = ".2f") -> str:
    """Formats a number; zero has no minus sign, and NaN is ``undefined``.

    A number with a plus or minus (a difference) gets more digits while it would be shown as zero.
    """
    if math.isnan(value):
        return "undefined"
    form = _with_digits(form, [value])
    sign, digits = ("+", form[1:]) if form[0] == "+" else ("", form)
    return f"{value:{sign}z{digits}}".replace("-", "\N{MINUS SIGN}")


def format_interval(interval: Interval, form: str = ".2f") -> str:
    """Formats an estimate with its bounds; none if all resamples agree, which is no certainty."""
    if interval.is_point:
        return f"{format_number(interval.estimate, form)} (no interval)"
    form = _with_digits(form, [interval.estimate, interval.low, interval.high])
    estimate, low, high = (
        format_number(value, form) for value in (interval.estimate, interval.low, interval.high)
    )
    return f"{estimate} [{low}, {high}]"


def _with_digits(form: str, values: Sequence[float]) -> str:
    """Returns a format with digits enough to show the sign of differences, six at most."""
    return with_digits(form, 0, *values, most=6) if form[0] == "+" else form


def format_p(value: float) -> str:
    """Formats a p-value within a sentence: ``p = 0.023``, ``p < 0.001``, ``p undefined``."""
    text = format_cell(value, "p")
    return f"p = {text}" if text[0].isdigit() else f"p {text}"


def format_percent(share: float) -> str:
    """Formats a share as a whole number of percent, with a no-break space."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def format_range(values: Iterable[float], form: str = "") -> str:
    """Formats the least and the greatest value, or the only one; always both with a format."""
    values = list(values)
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high and not form else f"{low} to {high}"


def table_as_text(table: Table) -> str:
    """Aligns a table for a terminal, below its title."""
    rows = [table.headings, *table.cells]
    widths = [max(len(row[place]) for row in rows) for place in range(len(table.columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if place in (0, *table.words) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([table.title, *lines])


def table_as_markdown(table: Table) -> str:
    """Formats a table as a pipe table, without its caption."""
    rule = ["---" if number in (0, *table.words) else "---:" for number in range(len(table.columns))]
    rows = [[*map(escape_markdown, table.headings)], rule]
    for row in table.cells:
        cells = map(escape_markdown, row)
        rows.append([f"**{cell}**" for cell in cells] if row[0] in table.strong else [*cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def escape_markdown(text: str) -> str:
    """Joins a text into one line, and escapes Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
