"""Figures of an experiment, each as SVG and PNG. Colours are told apart without colour vision, too.

Every ``draw_*`` takes results as they are, writes ``NAME.svg`` and ``NAME.png`` into a folder, and returns
the drawing with a text that says its numbers. Equal results give equal files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slidetl.compare.report.html import Drawing
from slidetl.evaluation.bootstrap import Interval
from slidetl.evaluation.calibration import ReliabilityBin
from slidetl.evaluation.conformal import RiskCoverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color universal design" (2008), without yellow, which is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", (0, (5, 1.5)), (0, (1, 1)))
_GREY = "#7A828B"
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
    "svg.fonttype": "path",  # the same on every machine, whatever fonts it has
    "svg.hashsalt": "slidetl",
    "text.parse_math": False,  # a dollar in a name is a dollar
}


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, the same in every figure."""

    colour: str
    marker: str
    line: Any


def looks_of(arms: Sequence[str], trivial: Sequence[str] = ()) -> dict[str, Look]:
    """A look for each arm; the trivial ones are grey.

    Args:
        arms: all of them, those that matter most first.
        trivial: those that anything must beat.
    """
    serious = [arm for arm in arms if arm not in trivial]
    looks = {
        arm: Look(
            _COLOURS[number % len(_COLOURS)],
            _MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)],
            _LINES[number // len(_COLOURS) % len(_LINES)],
        )
        for number, arm in enumerate(serious)
    }
    plain = [arm for arm in arms if arm in trivial]
    return looks | {
        arm: Look(_GREY, _MARKERS[number % len(_MARKERS)], _LINES[2]) for number, arm in enumerate(plain)
    }


@dataclass(frozen=True)
class ForestRow:
    """An arm in the forest plot.

    Attributes:
        arm: its name.
        figure: with its interval.
        by_repeat: the figure of each repeat alone.
        difference: from the arm that all are compared against, paired; None for that one itself.
        trivial: whether it is one that anything must beat.
    """

    arm: str
    figure: Interval
    by_repeat: Sequence[float]
    difference: Interval | None
    trivial: bool


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """A figure in the course of the trainings of an arm.

    Attributes:
        epochs: ``[E]`` done.
        seconds: ``[E]`` of training until then, averaged over the trainings.
        values: of each figure, ``[trainings, E]``.
    """

    epochs: NDArray[np.int64]
    seconds: NDArray[np.float64]
    values: Mapping[str, NDArray[np.float64]]


def draw_forest(
    folder: Path, rows: Sequence[ForestRow], name: str, against: str, ceiling: float | None, declared: bool
) -> Drawing:
    """Arms with their intervals, and their paired differences.

    Args:
        folder: for the files.
        rows: from top to bottom.
        name: of the figure.
        against: the arm that all are compared against.
        ceiling: of the figure, by the readers' noise; None where it is not known.
        declared: whether the first row is that of the primary comparison.
    """
    looks = looks_of([row.arm for row in rows], [row.arm for row in rows if row.trivial])
    places = -np.arange(len(rows), dtype=np.float64)
    with _sheet(folder, "forest", 8.6, 1.3 + 0.34 * len(rows)) as (figure, drawn):
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1))
        for place, row in zip(places, rows, strict=True):
            look = looks[row.arm]
            _whisker(left, place, row.figure, look, row.trivial)
            if len(row.by_repeat) > 1:
                left.plot(row.by_repeat, [place - 0.22] * len(row.by_repeat), "|", color=look.colour, ms=5)
            _numbers(left, place, spoken(row.figure))
            if row.difference is not None:
                _whisker(right, place, row.difference, look, row.trivial)
                _numbers(right, place, spoken(row.difference, signed=True))
        for axes in (left, right):
            axes.grid(axis="x")
            if declared:
                axes.axhspan(-0.5, 0.5, color="#EAF3F9", zorder=0)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set_ylim(places[-1] - 0.6, 0.6)
            axes.locator_params(axis="x", nbins=5)
        right.axvline(0, color="black", linewidth=0.9)
        if ceiling is not None:
            left.axvline(ceiling, color="black", linewidth=0.9, linestyle=(0, (4, 3)))
            left.annotate(
                "readers' ceiling",
                (ceiling, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-3, 1),
                textcoords="offset points",
                fontsize=7,
                ha="right",
                va="bottom",
            )
        left.set_yticks(places, [f"{row.arm} (trivial)" if row.trivial else row.arm for row in rows])
        for label, row in zip(left.get_yticklabels(), rows, strict=True):
            label.set_color(_GREY if row.trivial else "black")
        if declared:
            left.get_yticklabels()[0].set_fontweight("bold")
        left.set_xlabel(name)
        right.set_xlabel(f"difference in {name}, arm minus {against}")
    said = [
        f"{row.arm} {spoken(row.figure)}"
        + (f", minus {against} {spoken(row.difference, True)}" if row.difference is not None else "")
        for row in rows
    ]
    limit = "" if ceiling is None else f" The readers' noise leaves {ceiling:.2f} to be reached."
    return Drawing(
        drawn,
        f"Forest plot of {name}. {'; '.join(said)}.{limit}",
        f"{name} of each arm (left) and its paired difference from {against} (right), with "
        f"{percent(rows[0].figure.level)} intervals over patients."
        + (" The shaded row is the primary comparison." if declared else "")
        + " Open grey marks are the trivial arms, which anything must beat."
        + (" Small ticks are single repeats." if len(rows[0].by_repeat) > 1 else "")
        + ("" if ceiling is None else " Dashed: all that the readers' noise leaves to be reached."),
    )


def draw_confusions(
    folder: Path, counts: Mapping[str, NDArray[np.int64]], grades: Sequence[str], repeats: int
) -> Drawing:
    """Confusion matrices ``[K, K]``, true by predicted, one for each arm."""
    columns = min(4, len(counts))
    lines = -(-len(counts) // columns)
    n_grades = len(grades)
    short = [grade if len(grade) <= 8 else f"{grade[:7]}…" for grade in grades]
    side = 1.75 + 0.06 * n_grades
    with _sheet(folder, "confusion", 0.7 + columns * side, 0.55 + lines * (side + 0.25)) as (figure, drawn):
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for panel, (arm, table) in zip(panels.flat, counts.items(), strict=False):
            shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
            panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            for (row, column), count in np.ndenumerate(table):
                if count:
                    colour = "white" if shares[row, column] > 0.55 else "black"
                    panel.text(column, row, str(count), ha="center", va="center", fontsize=7.5, color=colour)
            panel.set_title(_short(arm, 22), fontsize=8.5)
            panel.set_xticks(
                range(n_grades), short, fontsize=7.5, rotation=0 if max(map(len, short)) < 4 else 90
            )
            panel.set_yticks(range(n_grades), short, fontsize=7.5)
            panel.tick_params(length=0)
            for spine in panel.spines.values():
                spine.set_visible(True)
                spine.set_color("#C9CED4")
        _hide_empty(panels, len(counts))
        figure.supxlabel("predicted grade", fontsize=9)
        figure.supylabel("true grade", fontsize=9)
    said = "; ".join(
        f"{arm}: " + ", ".join(" ".join(map(str, row)) for row in table) for arm, table in counts.items()
    )
    return Drawing(
        drawn,
        f"Confusion matrices, rows true grades {', '.join(grades)}, columns predicted ones. {said}.",
        "True against predicted grades, counts of results"
        + (f" summed over {repeats} repeats" if repeats > 1 else "")
        + "; the shade is the share of the row.",
    )


def draw_learning(
    folder: Path,
    curves: Mapping[str, LearningCurve],
    looks: Mapping[str, Look],
    figures: Mapping[str, str],
    shaded: Sequence[str],
    part: str,
) -> Drawing:
    """Learning curves against epochs and against seconds of training.

    Args:
        folder: for the files.
        curves: by arm.
        looks: of the arms.
        figures: what is drawn, a row of panels each: keys of the curves' values, and their names.
        shaded: arms whose range over the trainings is shown.
        part: what was graded, in words.
    """
    with _sheet(folder, "learning", 8.6, 0.75 + 2.35 * len(figures) + 0.17 * -(-len(curves) // 4)) as (
        figure,
        drawn,
    ):
        panels = figure.subplots(len(figures), 2, sharey="row", sharex="col", squeeze=False)
        unit, divisor = (
            ("minutes", 60) if max(c.seconds[-1] for c in curves.values()) > 300 else ("seconds", 1)
        )
        for row, (key, title) in zip(panels, figures.items(), strict=True):
            for arm, curve in curves.items():
                look, lines = looks[arm], curve.values[key]
                for axes, x in zip(row, (curve.epochs, curve.seconds / divisor), strict=True):
                    if arm in shaded and len(lines) > 1:
                        axes.fill_between(
                            x, lines.min(axis=0), lines.max(axis=0), color=look.colour, alpha=0.13, lw=0
                        )
                    axes.plot(
                        x,
                        lines.mean(axis=0),
                        color=look.colour,
                        marker=look.marker,
                        markersize=4,
                        linestyle=look.line,
                        linewidth=1.6,
                        label=_short(arm, 28),
                        zorder=3 if arm in shaded else 2,
                    )
            row[0].set_ylabel(title)
            for axes in row:
                axes.grid(axis="y")
        panels[-1, 0].set_xlabel("epochs of training")
        panels[-1, 1].set_xlabel(f"{unit} of training")
        for axes in panels[-1]:
            axes.set_xlim(left=0)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
    key, title = next(iter(figures.items()))
    said = "; ".join(
        f"{arm} {curve.values[key][:, 0].mean():.2f} after {curve.epochs[0]} and "
        f"{curve.values[key][:, -1].mean():.2f} after {curve.epochs[-1]} epochs ({curve.seconds[-1]:.0f} "
        "seconds)"
        for arm, curve in curves.items()
    )
    return Drawing(
        drawn,
        f"Learning curves of {title}. {said}.",
        f"Learning curves on {part}, averaged over the trainings of an arm, against epochs (left) and "
        "against the time of training alone (right). Shaded: from the worst to the best training, of the "
        "two arms of the primary comparison.",
    )


def draw_reliability(folder: Path, bins: Mapping[str, Sequence[ReliabilityBin]], unit: str) -> Drawing:
    """Reliability diagrams with the bars within which a calibrated model would lie, one for each arm.

    Args:
        folder: for the files.
        bins: by arm.
        unit: what is graded: a ``patient`` or a ``slide``.
    """
    columns = min(4, len(bins))
    lines = -(-len(bins) // columns)
    with _sheet(folder, "reliability", 0.6 + columns * 1.95, 0.5 + lines * 2.15) as (figure, drawn):
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        most = max(point.n for points in bins.values() for point in points)
        for panel, (arm, points) in zip(panels.flat, bins.items(), strict=False):
            panel.plot([0, 1], [0, 1], color="#C9CED4", linewidth=1, zorder=1)
            x = np.array([point.confidence for point in points])
            panel.vlines(
                x,
                [point.low for point in points],
                [point.high for point in points],
                color="#9CC3DC",
                linewidth=5,
                zorder=2,
            )
            inside = [point.low <= point.accuracy <= point.high for point in points]
            panel.scatter(
                x,
                [point.accuracy for point in points],
                s=[12 + 60 * point.n / most for point in points],
                c=["#0072B2" if good else "#D55E00" for good in inside],
                edgecolors="white",
                linewidths=0.6,
                zorder=3,
            )
            panel.set(title=_short(arm, 22), xlim=(0, 1.02), ylim=(-0.03, 1.03), aspect="equal")
            panel.title.set_fontsize(8.5)
            panel.set_xticks([0, 0.5, 1])
            panel.set_yticks([0, 0.5, 1])
        _hide_empty(panels, len(bins))
        figure.supxlabel("probability of the predicted grade", fontsize=9)
        figure.supylabel("share graded right", fontsize=9)
    said = "; ".join(
        f"{arm}: "
        + ", ".join(
            f"{point.accuracy:.2f} right at {point.confidence:.2f} ({point.n} {unit}s)" for point in points
        )
        for arm, points in bins.items()
    )
    return Drawing(
        drawn,
        f"Reliability diagrams. {said}.",
        f"How often the predicted grade was right against the probability that it was given, per {unit}, "
        "first repeat. Bars: where 95\N{NO-BREAK SPACE}% of such shares would lie if the probabilities were "
        f"right, by simulation; orange points lie outside. The size of a point is the number of {unit}s; one "
        "in twenty is expected outside even of a perfect model.",
    )


def draw_sizes(
    folder: Path,
    sizes: Mapping[str, Mapping[float, Mapping[str, Interval]]],
    looks: Mapping[str, Look],
    figures: Mapping[str, str],
) -> Drawing:
    """Figures against the number of training slides.

    Args:
        folder: for the files.
        sizes: by arm and number of slides (a mean over folds, perhaps), each figure with its interval.
        looks: of the arms.
        figures: what is drawn, a panel each: keys and names.
    """
    with _sheet(folder, "sizes", 8.6, 3.3) as (figure, drawn):
        panels = figure.subplots(1, len(figures), squeeze=False)[0]
        width = 0.006 * max(max(by_size) for by_size in sizes.values())
        for axes, (key, title) in zip(panels, figures.items(), strict=True):
            for number, (arm, by_size) in enumerate(sizes.items()):
                look = looks[arm]
                x = np.array(sorted(by_size)) + (number - (len(sizes) - 1) / 2) * 2 * width
                found = [by_size[size][key] for size in sorted(by_size)]
                y = np.array([interval.estimate for interval in found])
                axes.errorbar(
                    x,
                    y,
                    yerr=_errors(found),
                    color=look.colour,
                    marker=look.marker,
                    markersize=5,
                    linestyle=look.line,
                    linewidth=1.5,
                    elinewidth=1,
                    label=_short(arm, 28),
                )
            axes.set(xlabel="training slides", title=title)
            axes.set_xlim(0, 1.05 * axes.get_xlim()[1])  # no point on the edge
            axes.grid(axis="y")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
    key = next(iter(figures))
    said = "; ".join(
        f"{arm}: " + ", ".join(f"{spoken(by_size[size][key])} on {size:.0f}" for size in sorted(by_size))
        for arm, by_size in sizes.items()
    )
    return Drawing(
        drawn,
        f"{figures[key]} against the number of training slides. {said}.",
        "Figures of arms trained on fewer slides, at fixed hyper-parameters and, where they have epochs, in "
        "as many steps as the whole training part has at most, with intervals over patients. "
        "The last point is the whole training part (its mean over folds). Points are moved sideways a "
        "little so that they do not hide each other.",
    )


def draw_layers(
    folder: Path,
    name: str,
    layers: Mapping[str, Mapping[str, Sequence[float]]],
    looks: Mapping[str, Look],
    label: str,
    caption: str,
) -> Drawing:
    """A figure of each layer of the trained networks.

    Args:
        folder: for the files.
        name: of the files.
        layers: by arm and layer, from the lowest up, a value for each training.
        looks: of the arms.
        label: of the vertical axis.
        caption: of the drawing.
    """
    names = list(dict.fromkeys(layer for found in layers.values() for layer in found))
    places = {layer: number for number, layer in enumerate(names)}
    width = min(11.0, max(6.0, 2.5 + 0.17 * len(names)))
    with _sheet(folder, name, width, 3.7) as (figure, drawn):
        axes = figure.add_subplot()
        for arm, found in layers.items():
            look = looks[arm]
            x = np.array([places[layer] for layer in found])
            means = np.array([np.mean(values) for values in found.values()])
            axes.fill_between(
                x,
                [min(values) for values in found.values()],
                [max(values) for values in found.values()],
                color=look.colour,
                alpha=0.12,
                linewidth=0,
            )
            axes.plot(
                x,
                means,
                color=look.colour,
                marker=look.marker,
                markersize=3.5,
                linestyle=look.line,
                linewidth=1.3,
                label=_short(arm, 28),
            )
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6 if len(names) > 24 else 7)
        axes.set(ylabel=label, xlim=(-0.6, len(names) - 0.4))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(axis="y")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), fontsize=8)
    said = "; ".join(
        f"{arm} {np.mean(next(iter(found.values()))):.2f} in {next(iter(found))}, "
        f"{np.mean(found[list(found)[-1]]):.2f} in {list(found)[-1]}, on average "
        f"{np.mean([np.mean(values) for values in found.values()]):.2f}"
        for arm, found in layers.items()
    )
    return Drawing(drawn, f"{label}, by layer. {said}.", caption)


def draw_referral(
    folder: Path, found: Mapping[str, RiskCoverage], looks: Mapping[str, Look], bounded: str, unit: str
) -> Drawing:
    """Risk against coverage when the least sure patients, or slides, go to a human.

    Args:
        folder: for the files.
        found: by arm.
        looks: of the arms.
        bounded: the arm whose upper bound is drawn.
        unit: what is graded: a ``patient`` or a ``slide``.
    """
    with _sheet(folder, "referral", 6.6, 3.6) as (figure, drawn):
        axes = figure.add_subplot(
            xlabel=f"share of {unit}s that the model grades itself", ylabel="share of these graded wrong"
        )
        for arm, curve in found.items():
            look = looks[arm]
            axes.plot(
                curve.coverage,
                curve.risk,
                color=look.colour,
                marker=look.marker,
                markersize=3.5,
                linestyle=look.line,
                linewidth=1.4,
                label=_short(arm, 28),
            )
            if arm == bounded:
                label = f"{_short(arm, 28)}, bound"
                axes.plot(curve.coverage, curve.upper, ":", color=look.colour, linewidth=1.6, label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.grid()
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    said = "; ".join(
        f"{arm} {curve.risk[-1]:.2f} wrong of all, {risk_at(curve, 0.5):.2f} of the surer half, area "
        f"{curve.area:.2f}"
        for arm, curve in found.items()
    )
    level = found[bounded].level if bounded in found else None
    return Drawing(
        drawn,
        f"Risk against coverage. {said}.",
        f"Wrong grades among the {unit}s that are graded when the least sure ones are left to a human; first "
        "repeat."
        + (
            ""
            if level is None
            else f" Dotted: the upper {percent(level)} bound of {bounded}, of the share of patients with a "
            "wrong grade; it holds for all coverages together."
        ),
    )


def risk_at(curve: RiskCoverage, coverage: float) -> float:
    """The risk at the least coverage on the curve that reaches the one asked for."""
    place = next(n for n, value in enumerate(curve.coverage) if value >= coverage - 1e-12)
    return curve.risk[place]


def percent(share: float) -> str:
    """A share, with the space that keeps to it."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def spoken(interval: Interval, signed: bool = False) -> str:
    """An estimate with its interval."""
    form = "{:+.2f}" if signed else "{:.2f}"
    estimate, low, high = (
        form.format(round(value, 2) + 0.0).replace("-", "−")
        for value in (interval.estimate, interval.low, interval.high)
    )
    return f"{estimate} [{low}, {high}]"


@contextmanager
def _sheet(folder: Path, name: str, width: float, height: float) -> Iterator[tuple[Figure, Path]]:
    """An empty figure, inches wide and high, that is written in the end; with the path of its SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.svg"
    with rc_context(_STYLE), warnings.catch_warnings():
        # Names come from outside; a letter that the font lacks is a box here, and itself in the table.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, path
        figure.savefig(path, metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=160, metadata={"Software": None})


def _whisker(axes: Axes, place: float, interval: Interval, look: Look, hollow: bool) -> None:
    axes.plot([interval.low, interval.high], [place, place], color=look.colour, linewidth=1.6)
    axes.plot(
        interval.estimate,
        place,
        marker="D" if hollow else look.marker,
        color=look.colour,
        markerfacecolor="white" if hollow else look.colour,
        markersize=5.5,
    )


def _numbers(axes: Axes, place: float, text: str) -> None:
    """To the right of the axes, so that no whisker runs into them."""
    axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5)


def _hide_empty(panels: NDArray[Any], used: int) -> None:
    """Hides the panels that are left over in the last row; those above them get the labels."""
    for number in range(used, panels.size):
        panels.flat[number].set_visible(False)
        panels.flat[number - panels.shape[1]].tick_params(labelbottom=True)


def _errors(intervals: Sequence[Interval]) -> NDArray[np.float64]:
    """Distances of the bounds from the estimates, ``[2, n]``; a BCa interval need not hold its estimate."""
    bounds = np.array(
        [(found.estimate - found.low, found.high - found.estimate) for found in intervals], np.float64
    )
    return np.maximum(bounds.T, 0)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
