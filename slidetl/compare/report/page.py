"""Writes the report of a comparison from its template, tables and plots."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from slidetl.compare.aggregate import RISK, ComparisonResult
from slidetl.compare.config import ALPHA, PLATEAU
from slidetl.compare.report.checklists import checklists_of
from slidetl.compare.report.document import Document, Part, Plot, Section, as_text, write_html, write_markdown
from slidetl.compare.report.plots import draw_all
from slidetl.compare.report.tables import tables_of
from slidetl.compare.report.view import NAMES, View
from slidetl.compare.table import Table, format_cell, format_p, format_percent, format_range
from slidetl.evaluation.conformal import REFERRAL_POINTS
from slidetl.evaluation.confounding import SiteByGrade

REPORT, CHECKLISTS, PLOTS_FOLDER = "report", "checklists", "figures"


def write_report(result: ComparisonResult, output: Path, failed: Mapping[str, str] | None = None) -> None:
    """Writes ``report`` and ``checklists`` as HTML and Markdown, and ``figures/*`` as SVG and PNG.

    Pages need no network and no other file, and name incomplete arms. Other plots, of an earlier
    report, are removed.

    Args:
        result: of :func:`~slidetl.compare.aggregate.combine`.
        output: the folder.
        failed: reasons of failed jobs, by their labels.

    Raises:
        OSError: a file cannot be written.
    """
    view, folder = View(result, failed or {}), output / PLOTS_FOLDER
    tables = tables_of(view)
    plots = draw_all(view, tables, folder)
    document = document_of(view, tables, plots)
    checklists = checklists_of(view, renderer(view, tables))
    for name, content in ((REPORT, document), (CHECKLISTS, checklists)):
        write_html(output / f"{name}.html", content)
        write_markdown(output / f"{name}.md", content)
    for old in folder.glob("*.svg"):
        if old.stem not in plots:
            old.unlink()
            old.with_suffix(".png").unlink(missing_ok=True)


def describe(result: ComparisonResult) -> str:
    """Formats the summary and the most important sections of the report for a terminal."""
    view = View(result, {})
    document = document_of(view, tables_of(view), {})
    shown = {"protocol": str, "arms": Table, "others": Table, "sizes": Table, "readers": str, "power": Table}
    parts: list[str | Table] = [*document.summary]
    for section in document.sections:
        if section.anchor in shown:
            parts += [
                part
                for part in section.parts
                if not isinstance(part, Plot) and isinstance(part, shown[section.anchor])
            ]
    return as_text([*parts, *document.notices])


def document_of(view: View, tables: Mapping[str, Table], plots: Mapping[str, Plot]) -> Document:
    """Fills ``templates/report.txt``; its first lines describe its form.

    Each block is a separate template, so that no value can begin another block.

    Args:
        view: the comparison.
        tables: of :func:`~slidetl.compare.report.tables.tables_of`; one without rows is left out.
        plots: of :func:`~slidetl.compare.report.plots.draw_all`; a missing one is left out.
    """
    say = renderer(view, tables)
    title, notices, summary = "", [], []
    sections: list[tuple[str, str, list[Part]]] = []
    source = (resources.files(__package__) / "templates" / "report.txt").read_text(encoding="utf-8")
    for block in re.split(r"\n\n+", source):
        kind, _, rest = block.partition(" ")
        if kind in ("@table", "@plot"):
            name, _, words = rest.partition(" ")
            part = tables[name] if kind == "@table" else plots.get(name)
            if part is not None and (isinstance(part, Plot) or len(part.rows)):
                about, _, note = words.partition("//")
                sections[-1][2].append(replace(part, title=say(about), note=say(note)))
        elif kind == "#":
            title = say(rest)
        elif kind == "##":
            anchor, _, heading = rest.partition(" | ")
            sections.append((anchor, say(heading), []))
        elif text := say(block.removeprefix("> ")):
            if block.startswith("> "):
                notices.append(text)
            elif sections:
                sections[-1][2].append(text)
            else:
                summary.append(text)
    return Document(
        title, tuple(notices), tuple(summary), tuple(Section(a, h, tuple(p)) for a, h, p in sections)
    )


def renderer(view: View, tables: Mapping[str, Table]) -> Callable[..., str]:
    """Returns a function that renders a template of one paragraph, with more values by name."""
    # No autoescape: the writers of a document escape, each in its own way.
    environment = Environment(undefined=StrictUndefined, autoescape=False)
    environment.filters |= {
        "cell": format_cell,
        "p": format_p,
        "percent": format_percent,
        "range": format_range,
        "association": _association,
    }
    referral_level = view.serious[0].referral.level
    held_out = "the held-out parts of the inner folds"
    values: dict[str, Any] = {
        "view": view,
        "result": view.result,
        "comparison": view.comparison,
        "protocol": view.protocol,
        "primary": view.comparison.primary,
        "alpha": ALPHA,
        "tables": tables,
        "names": NAMES,
        "level": view.arms[0].metrics[view.comparison.primary.metric].level,
        "referral_level": referral_level,
        "curve_part": held_out if view.protocol.is_nested else "the test parts, which chose nothing",
        "plateau": f"{PLATEAU:g}",
        "risk": RISK,
        # the least upper bound for so many patients, all graded right, at one of the curve's points; above it
        "least_risk": math.ceil(
            1000 * (1 - ((1 - referral_level) / REFERRAL_POINTS) ** (1 / view.n_patients))
        )
        / 1000,
    }

    def say(template: str, **more: str) -> str:
        text = environment.from_string(template).render(values, **more)
        return re.sub(r"[ \n]+", " ", text).strip(" ")

    return say


def _association(found: SiteByGrade) -> str:
    """Formats the association of site, or scanner, and grade."""
    if found.cramers_v is None or found.p is None:
        return ""
    return f"Cramér's V {found.cramers_v:.2f}, permutation {format_p(found.p)}."
