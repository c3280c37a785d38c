"""Tasks: label scales of slides or single tiles, learned beside the grade."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.data.spreadsheet import is_error, read_table
from slidetl.errors import ManifestError, UsageError
from slidetl.tiles.identifier import safe_slide_id

TABLE_COLUMNS = ("x_level0", "y_level0", "label")
IGNORE = "ignore"  # label of tiles without effect on the grade of their slide


@dataclass(frozen=True)
class Task:
    """A label scale, or a number, to learn beside the grade, from a column of the manifest.

    Attributes:
        name: name in logs and file names; letters, digits, ``-`` and ``_``.
        column: column of the manifest, with an index 0..K-1 or nothing; for tiles, an index applies to all
            tiles of the slide, and a path (absolute or relative to the manifest) names a table of labels,
            :func:`read_points`, or annotations of QuPath, ASAP or ImageScope with the names in ``grades`` as
            classes, :func:`slidetl.tiles.regions.label_tiles`. The column ``grade`` also exists for images in
            folders.
        grades: names of the scale's K grades, lowest first, or of its classes; none with ``numeric``.
        weight: weight of this loss; the grade has weight 1.
        of_tiles: True for labels of single tiles.
        ordinal: True for ordered grades, False for classes.
        least_share: least share of a tile inside annotations of its class, above 0, up to 1.
        readers: True to train on the shares of several readers for each grade, from the columns
            ``COLUMN_reader1``, ``COLUMN_reader2``, ...; a slide without any takes its label.
        numeric: True for a number per slide, such as a diameter in millimetres: the loss is half the squared
            error, standardised by mean and standard deviation of the training part.
    """

    name: str
    column: str
    grades: tuple[str, ...] = ()
    weight: float = 1.0
    of_tiles: bool = False
    ordinal: bool = True
    least_share: float = 0.5
    readers: bool = False
    numeric: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name, re.ASCII):
            raise UsageError(
                f"the name of a task has only letters, digits, - and _; {self.name!r} has others"
            )
        if (self.readers or self.numeric) and (self.of_tiles or self.readers == self.numeric):
            raise UsageError(f"task {self.name}: of_tiles, readers and numeric exclude each other")
        if self.numeric and self.grades:
            raise UsageError(f"task {self.name}: a number has no grades, found {list(self.grades)}")
        if not self.numeric and (len(self.grades) < 2 or len(set(self.grades)) < len(self.grades)):
            raise UsageError(
                f"task {self.name}: expected at least two different grades, found {list(self.grades)}"
            )
        if not self.weight > 0:
            raise UsageError(f"task {self.name}: the weight must be above 0, not {self.weight}")
        if not 0 < self.least_share <= 1:
            raise UsageError(
                f"task {self.name}: least_share must be above 0, up to 1, not {self.least_share}"
            )

    def is_label(self, values: ArrayLike) -> NDArray[np.bool_]:
        """Tells labels from the values that stand for none: NaN of a number, below 0 of a grade."""
        return np.isfinite(values) if self.numeric else np.asarray(values) >= 0


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raises a UsageError if two tasks have the same name."""
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UsageError(f"each task needs a name of its own, found {', '.join(names)}")


@dataclass(frozen=True)
class LabelledPoints:
    """Labelled points of one slide.

    Attributes:
        xy_level0: ``[P, 2]`` level-0 pixels.
        labels: ``[P] float64``, infinity for :data:`IGNORE`.
    """

    xy_level0: NDArray[np.float64]
    labels: NDArray[np.float64]

    def of_tiles(
        self, origin_level0: NDArray[np.integer], extent_level0: tuple[float, float]
    ) -> NDArray[np.float64]:
        """Labels each tile by the commonest label of its points, the lowest in a tie.

        The upper and left edges belong to a tile, so its upper-left corner lies in it.

        Args:
            origin_level0: ``[N, 2]`` upper-left corners ``(x, y)`` of the tiles, level-0 pixels.
            extent_level0: size ``(x, y)`` of each tile, level-0 pixels.

        Returns:
            ``[N] float64``, NaN for a tile without a point.
        """
        known, votes_for = np.unique(self.labels, return_inverse=True)
        votes = np.zeros((len(origin_level0), len(known)), np.int64)
        # Corners are rounded to pixels; a whole size keeps a corner out of the neighbouring tile.
        end = origin_level0 + np.floor(extent_level0)
        order = np.argsort(origin_level0[:, 0], kind="stable")  # tiles of one size: their ends too
        x, y = self.xy_level0.T
        first = np.searchsorted(end[order, 0], x, side="right").tolist()
        stop = np.searchsorted(origin_level0[order, 0], x, side="right").tolist()
        for point, label in enumerate(votes_for.tolist()):
            near = order[first[point] : stop[point]]
            inside = (origin_level0[near, 1] <= y[point]) & (y[point] < end[near, 1])
            votes[near[inside], label] += 1
        if not len(known):
            return np.full(len(votes), np.nan)
        return np.where(votes.any(1), known[votes.argmax(1)], np.nan)


def read_points(path: Path, n_labels: int | None = None) -> dict[str, LabelledPoints]:
    """Reads a table of labels: a CSV with ``x_level0``, ``y_level0`` and ``label``, one line for each point.

    A column ``slide_id`` names the slide of each line; without it, the table is of one slide.

    Args:
        path: the table.
        n_labels: number K of labels, each a whole number 0..K-1; None accepts any finite number, and
            :data:`IGNORE`.

    Returns:
        The points of each slide by its identifier, empty without a column ``slide_id``.

    Raises:
        ManifestError: it is no such table; the message names the line.
    """
    expected = "a number or 'ignore'" if n_labels is None else f"a label from 0 to {n_labels - 1}"
    found: dict[str, list[tuple[float, float, float]]] = {}
    try:
        table = read_table(path, TABLE_COLUMNS, ["slide_id"])
    except OSError as error:
        raise ManifestError(f"{path}: expected a CSV of tile labels: {error}") from error
    unclear = {name: table.unclear_numbers(name) for name in TABLE_COLUMNS}
    for line, cells in table.rows:
        try:
            row = dict(zip(table.header, cells, strict=True))
            point = float(row["x_level0"]), float(row["y_level0"])
            label = _number(row["label"], n_labels)
            slide_id = row.get("slide_id", "")
            if not np.isfinite(point).all():
                raise ValueError("not finite")
            if "slide_id" in row and not slide_id:
                raise ValueError("slide_id is empty; give it in each line, also of cells merged before")
            if is_error(slide_id):
                raise ValueError("slide_id is an error value of a spreadsheet")
            if any(row[name] in unclear[name] for name in TABLE_COLUMNS):
                raise ValueError(
                    "1.050 may be 1050; export numbers without a separator of thousands, or write 1.0500"
                )
        except ValueError as error:
            raise ManifestError(
                f"{path}, line {line}: expected two numbers of level-0 pixels and "
                f"{expected}, found {', '.join(cells)} ({error})"
            ) from error
        found.setdefault(safe_slide_id(slide_id) or slide_id, []).append((*point, label))
    tables = {slide_id: np.array(rows, np.float64) for slide_id, rows in found.items()}
    return {slide_id: LabelledPoints(table[:, :2], table[:, 2]) for slide_id, table in tables.items()}


def _number(text: str, n_labels: int | None) -> float:
    if n_labels is None and text == IGNORE:
        return np.inf
    value = float(text) if n_labels is None else int(text)
    if not np.isfinite(value) or (n_labels is not None and not 0 <= value < n_labels):
        raise ValueError(f"label {text!r}")
    return value
