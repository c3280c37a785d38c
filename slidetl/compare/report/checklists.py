"""Answers two reporting checklists, TRIPOD+AI and CLAIM, as far as a comparison knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources

import numpy as np

from slidetl.compare.aggregate import PLACES, Part
from slidetl.compare.report.document import Document, Section
from slidetl.compare.report.view import NAMES, View
from slidetl.compare.table import NONE, Table, format_cell, format_range
from slidetl.version import VERSION

_COLUMNS = ("Item", "Asks for", "From this comparison", "For you to answer")


def checklists_of(view: View, say: Callable[..., str]) -> Document:
    """Fills ``templates/checklists.txt``; its first lines describe its form.

    Args:
        view: the comparison.
        say: renders a template, with more values by name.
    """
    sections: list[tuple[str, str, str, list[tuple[str, ...]]]] = []
    source = (resources.files(__package__) / "templates" / "checklists.txt").read_text(encoding="utf-8")
    values = _values(view)
    for line in re.sub(r"\n +", " ", re.sub(r"{#.*?#}", "", source, flags=re.S)).splitlines():
        if line.startswith("## "):
            anchor, _, heading = line.removeprefix("## ").partition(" | ")
            sections.append((anchor, heading, "", []))
        elif line.startswith("@source "):
            sections[-1] = (*sections[-1][:2], line.removeprefix("@source "), [])
        elif line:
            fields = re.split(r"\|(?![^{]*}})", line)  # the pipe of a filter is within braces
            sections[-1][3].append(tuple(say(field, **values) or NONE for field in fields))
    return Document(
        "Reporting checklists: TRIPOD+AI and CLAIM",
        (),
        (
            "What the comparison knows is filled in, beside the report and its sections; the rest is for the "
            "authors. A filled item is no proof that it is adequate.",
        ),
        tuple(
            Section(anchor, heading, (Table(_COLUMNS, rows, words=(1, 2, 3), title=about),))
            for anchor, heading, about, rows in sections
        ),
    )


def _values(view: View) -> dict[str, str]:
    """Words that several items share."""
    result, protocol, comparison = view.result, view.protocol, view.comparison
    if protocol.given_split:
        parts = "the split of the manifest"
    elif protocol.leave_one_site_out:
        parts = "leaving out one site at a time"
    else:
        n_folds = len(result.fold_sizes) // protocol.repeats
        parts = f"{n_folds} folds, disjoint in patients and stratified by grade"
    if protocol.repeats > 1:
        parts += f", {protocol.repeats} times"
    counts = np.bincount(result.true, minlength=len(comparison.grades))
    train, test = zip(*result.fold_sizes, strict=True)
    alike = ", or slides that look alike," if comparison.near_duplicates else ""
    metric = comparison.primary.metric
    choices = "hyper-parameters of networks were fixed"
    if protocol.is_nested:
        choices = (
            "listed choices were made in inner folds of each training part, by the ranked probability score"
        )
    if view.own_choices:
        choices += f"; in folds of the training part's patients: {', '.join(view.own_choices)}"
    all_slides, trained, tested, outside = (
        result.parts[part] for part in ("all", "train", "test", "external")
    )
    sources = _counted(all_slides)
    if tested.slides < all_slides.slides:  # else each slide is tested once
        sources += f": {_counted(trained)} to train on, {_counted(tested)} to test"
    if outside.slides:
        sources += f", {_counted(outside)}, for evaluation alone"
    site = protocol.external_site
    updates = []
    if any(arm.untempered is not None for arm in result.arms):
        updates.append(("one temperature from the inner folds", "the table of temperatures"))
    if site and any(found.recalibrated for found in view.external):
        updates.append((f"recalibrated on {site}", "that of the external site"))
    pairs = (*([result.primary] if result.primary else []), *result.differences)
    robust = ["the score over draws of tiles"] * any(arm.repeatability is not None for arm in result.arms)
    robust += [f"metrics by {place}" for place in PLACES if result.places[place]]
    return {
        "choices": choices,
        "updating": "; ".join(what for what, _ in updates) or "none",
        "updated": ", and ".join(where for _, where in updates) or "none",
        "over_folds": "yes" if any(pair.corrected_t for pair in pairs) else "",
        "robustness": "; ".join(robust),
        "places": " and ".join(place for place in PLACES if result.places[place]),
        "sources": sources,
        "prepared": ", ".join(result.prepared),
        "version": VERSION,
        "parts": parts,
        "audited": f"a patient or a slide's content on both sides{alike} would have stopped the run",
        "grades": ", ".join(
            f"{name}: {count}" for name, count in zip(comparison.grades, counts, strict=True)
        ),
        "sizes": f"{format_range(train)} slides to train on and {format_range(test)} to test in each fold",
        "reached": "; ".join(
            f"{arm.arm} {NAMES[metric]} {format_cell(arm.metrics[metric], view.form)}" for arm in view.arms
        ),
    }


def _counted(part: Part) -> str:
    """Counts the slides, patients and sites of a part, in words."""
    sites = f" at {len(part.sites)} site{'s' * (len(part.sites) > 1)}" if part.sites else ""
    return f"{part.slides} slides of {part.patients} patients{sites}"
