"""Draws the plots of a comparison as SVG and PNG, in colours for all kinds of colour vision.

Equal results give equal files. Titles and notes are in ``templates/report.txt``.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slidetl.analysis.similarity import merge_layers
from slidetl.compare.report.document import Plot
from slidetl.compare.report.tables import by_layer, forest
from slidetl.compare.report.view import GREY, NAMES, Look, View
from slidetl.compare.table import Table
from slidetl.evaluation.bootstrap import Interval
from slidetl.files import replaced
from slidetl.text import cut_names, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # lies in matplotlib itself
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": False,
    "grid.color": "#DDE1E5",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 2.8,  # long enough for two dashes
    "svg.fonttype": "path",  # the same on machines with other fonts
    "svg.hashsalt": "slidetl",
    "text.parse_math": False,  # a dollar in a name is a dollar
}


def draw_all(view: View, tables: Mapping[str, Table], folder: Path) -> dict[str, Plot]:
    """Draws every plot with values, as ``NAME.svg`` and ``NAME.png``; the tables are its text alternatives.

    Returns:
        Plots by their names.

    Raises:
        OSError: a file cannot be written.
    """
    plots = [_forest(view, folder), _confusion(view, folder), _reliability(view, folder)]
    plots.append(_referral(view, tables["wrong_grades"], folder))
    if view.curves:
        plots.append(_learning(view, tables["epochs_first"], folder))
    if tables["sizes"].rows:
        plots.append(_sizes(view, tables["sizes"], folder))
    for name, label in (("drift", "||w − w0|| / ||w0||"), ("similarity", "linear CKA, before and after")):
        if tables[name].rows:
            plots.append(_layers(view, name, label, tables[name], folder))
    return {plot.path.stem: plot for plot in plots}


def _forest(view: View, folder: Path) -> Plot:
    """Draws arms with their intervals, and their paired differences."""
    table, declared = forest(view), view.result.primary is not None
    repeats = [arm.by_repeat[view.comparison.primary.metric] for arm in view.arms]
    places = -np.arange(len(table.rows), dtype=np.float64)
    with _sheet(folder, "forest", 8.6, 1.3 + 0.34 * len(table.rows)) as (figure, path):
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1))
        for place, row, cells, by_repeat in zip(places, table.rows, table.cells, repeats, strict=True):
            look = view.looks[row[0]]
            if len(by_repeat) > 1:
                left.plot(by_repeat, [place - 0.22] * len(by_repeat), "|", color=look.colour, ms=5)
            for axes, interval, text in zip((left, right), row[1:], cells[1:], strict=True):
                if interval is not None:
                    _whisker(axes, place, interval, look, hollow=row[0] in view.trivial)
                    # to the right of the axes, so that no whisker runs into it
                    at = axes.get_yaxis_transform()
                    axes.text(1.02, place, text, transform=at, va="center", fontsize=7.5)
        for axes in (left, right):
            axes.grid(axis="x")
            if declared:
                axes.axhspan(-0.5, 0.5, color="#EAF3F9", zorder=0)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set_ylim(places[-1] - 0.6, 0.6)
            axes.locator_params(axis="x", nbins=5)
        right.axvline(0, color="black", linewidth=0.9)
        if view.limit is not None:
            left.axvline(view.limit, color="black", linewidth=0.9, linestyle=(0, (4, 3)))
            where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            where |= {"xytext": (-3, 1), "ha": "right", "va": "bottom"}
            left.annotate("readers' ceiling", (view.limit, 1), fontsize=7, **where)
        arms = [row[0] for row in table.rows]
        left.set_yticks(places, [f"{arm} (trivial)" if arm in view.trivial else arm for arm in arms])
        for label, arm in zip(left.get_yticklabels(), arms, strict=True):
            label.set_color(GREY if arm in view.trivial else "black")
        if declared:
            left.get_yticklabels()[0].set_fontweight("bold")
        left.set_xlabel(table.headings[1])
        right.set_xlabel(table.headings[2])
    return Plot(path, table)


def _confusion(view: View, folder: Path) -> Plot:
    """Draws confusion matrices, true by predicted, one for each arm."""
    grades, rows = view.comparison.grades, []
    names = list(map(one_line, grades))
    short = [cut_names(names, 8)[name] for name in names]
    turned = 0 if max(map(len, short)) < 4 else 90
    side, margin = 1.75 + 0.06 * len(grades), (0.7, 0.85 if turned else 0.55)
    arms = [arm.arm for arm in view.arms]
    with _panels(folder, "confusion", arms, (side, side + 0.25), margin) as (figure, path, panels):
        for panel, arm in zip(panels, view.arms, strict=True):
            rows += [(arm.arm, grade, *row) for grade, row in zip(grades, arm.confusion, strict=True)]
            shares = arm.confusion / np.maximum(arm.confusion.sum(axis=1, keepdims=True), 1)
            panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            for (row, column), count in np.ndenumerate(arm.confusion):
                if count:
                    colour = "white" if shares[row, column] > 0.55 else "black"
                    panel.text(column, row, str(count), ha="center", va="center", fontsize=7.5, color=colour)
            panel.set_xticks(range(len(grades)), short, fontsize=7.5, rotation=turned)
            panel.set_yticks(range(len(grades)), short, fontsize=7.5)
            panel.tick_params(length=0)
            for spine in panel.spines.values():
                spine.set_visible(True)
                spine.set_color("#C9CED4")
        figure.supxlabel("predicted grade", fontsize=9)
        figure.supylabel("true grade", fontsize=9)
    return Plot(path, Table(("Arm", "true grade", *(f"predicted {grade}" for grade in grades)), rows))


def _learning(view: View, table: Table, folder: Path) -> Plot:
    """Draws learning curves against epochs and against time; the range of the declared arms is shaded."""
    curves, primary = view.curves, view.comparison.primary
    metrics = {view.learned[0]: NAMES[view.learned[0]], "rps": "RPS (lower is better)"}
    longest = max(curve.seconds[-1] for curve in curves.values())
    unit, divisor = ("minutes", 60) if longest > 300 else ("seconds", 1)
    columns, legend_height = _legend_size(view, curves, 8.6)
    height = 0.75 + 2.35 * len(metrics) + legend_height
    with _sheet(folder, "learning", 8.6, height) as (figure, path):
        panels = figure.subplots(len(metrics), 2, sharey="row", sharex="col", squeeze=False)
        for row, (key, title) in zip(panels, metrics.items(), strict=True):
            for arm, curve in curves.items():
                lines, shaded = curve.values[key], arm in (primary.arm, primary.against)
                for axes, x in zip(row, (curve.epochs, curve.seconds / divisor), strict=True):
                    if shaded and len(lines) > 1:
                        band, colour = (lines.min(axis=0), lines.max(axis=0)), view.looks[arm].colour
                        axes.fill_between(x, *band, color=colour, alpha=0.13, lw=0)
                        if len(x) == 1:
                            axes.vlines(x, *band, color=colour, alpha=0.4)
                    axes.plot(x, lines.mean(axis=0), zorder=2 + shaded, **_style(view, arm, 4, 1.6))
            row[0].set_ylabel(title)
            for axes in row:
                axes.grid(axis="y")
        panels[-1, 0].set_xlabel("epochs of training")
        panels[-1, 1].set_xlabel(f"{unit} of training")
        last = max(int(curve.epochs[-1]) for curve in curves.values())
        for axes, end in zip(panels[-1], (last, longest / divisor), strict=True):
            axes.set_xlim(0, 1.05 * end)  # single points would lie on the edge
        _legend(figure, panels[0, 0], "outside lower center", columns)
    return Plot(path, table)


def _reliability(view: View, folder: Path) -> Plot:
    """Draws a reliability diagram for each arm, with bars of the range of a calibrated model."""
    most, rows = max(point.n for arm in view.serious for point in arm.bins), []
    arms = [arm.arm for arm in view.serious]
    with _panels(folder, "reliability", arms, (1.95, 2.15), (0.6, 0.5)) as (figure, path, panels):
        for panel, arm in zip(panels, view.serious, strict=True):
            rows += [(arm.arm, point.confidence, point.accuracy, point.n) for point in arm.bins]
            x, y, low, high, n = np.array(
                [(point.confidence, point.accuracy, point.low, point.high, point.n) for point in arm.bins]
            ).T
            panel.plot([0, 1], [0, 1], color="#C9CED4", linewidth=1, zorder=1)
            panel.vlines(x, low, high, color="#9CC3DC", linewidth=5, zorder=2)
            colours = np.where((low <= y) & (y <= high), "#0072B2", "#D55E00").tolist()
            size = 12 + 60 * n / most
            panel.scatter(x, y, s=size, c=colours, edgecolors="white", linewidths=0.6, zorder=3)
            panel.set(xlim=(0, 1.02), ylim=(-0.03, 1.03), aspect="equal")
            panel.set_xticks([0, 0.5, 1])
            panel.set_yticks([0, 0.5, 1])
        figure.supxlabel("probability of the predicted grade", fontsize=9)
        figure.supylabel("share graded right", fontsize=9)
    return Plot(path, Table(("Arm", "probability", "share graded right", view.units), rows))


def _sizes(view: View, table: Table, folder: Path) -> Plot:
    """Draws metrics against the number of training slides, a panel each."""
    arms = list(dict.fromkeys(row[0] for row in table.rows))
    width = 0.006 * max(row[1] for row in table.rows)
    columns, legend_height = _legend_size(view, arms, 8.6)
    with _sheet(folder, "sizes", 8.6, 3.13 + legend_height) as (figure, path):
        panels = figure.subplots(1, len(table.columns) - 2, squeeze=False)[0]
        for column, axes in enumerate(panels, 2):
            for number, arm in enumerate(arms):
                rows = [row for row in table.rows if row[0] == arm]
                x = np.array([row[1] for row in rows]) + (number - (len(arms) - 1) / 2) * 2 * width
                y, low, high = np.array(
                    [(row[column].estimate, row[column].low, row[column].high) for row in rows]
                ).T
                errors = np.maximum([y - low, high - y], 0)  # a BCa interval need not hold its estimate
                axes.errorbar(x, y, yerr=errors, elinewidth=1, **_style(view, arm, 5, 1.5))
            axes.set(xlabel="training slides", title=table.headings[column])
            axes.set_xlim(0, 1.05 * axes.get_xlim()[1])  # no point on the edge
            axes.grid(axis="y")
        _legend(figure, panels[0], "outside lower center", columns)
    return Plot(path, table)


def _layers(view: View, name: str, label: str, table: Table, folder: Path) -> Plot:
    """Draws a value of each layer of the trained networks."""
    layers = by_layer(view, name)
    names = merge_layers(layers.values())
    width = min(11.0, max(6.0, 2.5 + 0.17 * len(names)))
    columns, legend_height = _legend_size(view, layers, width)
    with _sheet(folder, name, width, 3.53 + legend_height) as (figure, path):
        axes = figure.add_subplot()
        for arm, found in layers.items():
            x = np.array([names.index(layer) for layer in found])
            low, mean, high = np.array([(min(v), np.mean(v), max(v)) for v in found.values()]).T
            axes.fill_between(x, low, high, color=view.looks[arm].colour, alpha=0.12, linewidth=0)
            axes.plot(x, mean, **_style(view, arm, 3.5, 1.3))
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6 if len(names) > 24 else 7)
        axes.set(ylabel=label, xlim=(-0.6, len(names) - 0.4))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(axis="y")
        _legend(figure, axes, "outside upper center", columns)
    return Plot(path, table)


def _referral(view: View, table: Table, folder: Path) -> Plot:
    """Draws risk against coverage when the least sure results go to a human; the first arm with its bound."""
    with _sheet(folder, "referral", 6.6, 3.6) as (figure, path):
        axes = figure.add_subplot(xlabel=f"share of {view.unit}s that the model grades itself")
        axes.set_ylabel("share of these graded wrong")
        for arm in view.serious:
            coverage, risk, upper = np.array([(p.coverage, p.risk, p.upper) for p in arm.referral.points]).T
            axes.plot(coverage, risk, **_style(view, arm.arm, 3.5, 1.4))
            if arm is view.serious[0]:
                colour, label = view.looks[arm.arm].colour, f"{_names(view)[arm.arm]}, bound"
                axes.plot(coverage, upper, ":", color=colour, linewidth=1.6, label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.grid()
        _legend(figure, axes, "outside right upper", 1)
    return Plot(path, table)


@contextmanager
def _sheet(folder: Path, name: str, width: float, height: float) -> Iterator[tuple[Figure, Path]]:
    """Yields an empty figure, size in inches, with the path of its SVG, and writes it in the end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path = folder / f"{name}.svg"
    with rc_context(_STYLE), warnings.catch_warnings():
        # A letter of a name outside the font is a box here, and correct in the table.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, path
        with replaced(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
        with replaced(path.with_suffix(".png")) as file:
            figure.savefig(file, dpi=160, format="png", metadata={"Software": None})


@contextmanager
def _panels(
    folder: Path, name: str, arms: Iterable[str], size: tuple[float, float], margin: tuple[float, float]
) -> Iterator[tuple[Figure, Path, list[Axes]]]:
    """Yields a sheet with a panel for each arm, at most four in a row, in inches."""
    arms = list(arms)
    columns = min(4, len(arms))
    lines = -(-len(arms) // columns)
    width, height = margin[0] + columns * size[0], margin[1] + lines * size[1]
    with _sheet(folder, name, width, height) as (figure, path):
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for panel, title in zip(panels, cut_names(arms, 22).values(), strict=False):
            panel.set_title(title, fontsize=8.5)
        yield figure, path, list(panels[: len(arms)])
        for number in range(len(arms), len(panels)):
            panels[number].set_visible(False)
            panels[number - columns].tick_params(labelbottom=True)  # the one above gets the labels


def _names(view: View) -> dict[str, str]:
    """Shortens the names of all arms for legends."""
    return cut_names(view.looks, 28)


def _style(view: View, arm: str, size: float, width: float) -> dict[str, Any]:
    look = view.looks[arm]
    line = {"linestyle": look.line, "linewidth": width, "label": _names(view)[arm]}
    return {"color": look.colour, "marker": look.marker, "markersize": size, **line}


def _legend_size(view: View, arms: Collection[str], width: float) -> tuple[int, float]:
    """Returns the columns and the height of a legend of arms in a figure of this width, in inches."""
    longest = max(len(_names(view)[arm]) for arm in arms)
    columns = max(1, min(4, int(width / (0.6 + 0.065 * longest)), len(arms)))
    return columns, 0.17 * -(-len(arms) // columns)


def _legend(figure: Figure, axes: Axes, place: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc=place, ncols=columns, fontsize=8)


def _whisker(axes: Axes, place: float, interval: Interval, look: Look, *, hollow: bool) -> None:
    axes.plot([interval.low, interval.high], [place, place], color=look.colour, linewidth=1.6)
    marker, face = ("D", "white") if hollow else (look.marker, look.colour)
    axes.plot(interval.estimate, place, marker=marker, color=look.colour, mfc=face, markersize=5.5)
