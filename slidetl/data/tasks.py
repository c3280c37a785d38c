"""What a network may learn beside the grade: further scales, of slides or of single tiles."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import ManifestError, UsageError

TABLE_COLUMNS = ("x_level0", "y_level0", "label")


@dataclass(frozen=True)
class Task:
    """A further scale that is learned on the same backbone, from a column of the manifest.

    A row without a label is fine: it says nothing about this task.

    Attributes:
        name: in the logs and the names of files; letters, digits, ``-`` and ``_``.
        column: of the manifest. It holds an index 0..K-1 or nothing; for tiles, an index holds for all tiles
            of the slide, and a path (absolute or relative to the manifest) names a table of labels. With
            ``grade``, images in folders have it too.
        grades: names of the scale's K grades, lowest first, or of its classes.
        weight: of this loss beside that of the grade, which has weight 1.
        of_tiles: whether the labels are of single tiles.
        ordinal: whether the grades have an order. Otherwise they are classes.
    """

    name: str
    column: str
    grades: tuple[str, ...]
    weight: float = 1.0
    of_tiles: bool = False
    ordinal: bool = True

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name, re.ASCII):
            raise UsageError(
                f"the name of a task has only letters, digits, - and _; {self.name!r} has others"
            )
        if len(self.grades) < 2 or len(set(self.grades)) < len(self.grades):
            raise UsageError(
                f"task {self.name}: expected at least two different grades, found {list(self.grades)}"
            )
        if not self.weight > 0:
            raise UsageError(f"task {self.name}: the weight must be above 0, not {self.weight}")


def check_tasks(tasks: Sequence[Task]) -> None:
    """Checks that no two tasks have the same name.

    Raises:
        UsageError: two have.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UsageError(f"each task needs a name of its own, found {', '.join(names)}")


@dataclass(frozen=True)
class LabelledPoints:
    """Places of one slide whose label is known.

    Attributes:
        xy_level0: ``[P, 2]`` level-0 pixels.
        labels: ``[P] int64``, from 0.
    """

    xy_level0: NDArray[np.float64]
    labels: NDArray[np.int64]

    def of_tiles(
        self, origin_level0: NDArray[np.integer], extent_level0: tuple[float, float]
    ) -> NDArray[np.int64]:
        """The label of each tile: the commonest among the points in it, the lowest of equally common ones.

        The upper and left edges belong to a tile, so its upper-left corner is a point in it.

        Args:
            origin_level0: ``[N, 2]`` upper-left corners ``(x, y)`` of the tiles, level-0 pixels.
            extent_level0: size ``(x, y)`` of each tile, level-0 pixels.

        Returns:
            ``[N] int64``, -1 for a tile without a point.
        """
        n_labels = int(self.labels.max(initial=-1)) + 1
        votes = np.zeros((len(origin_level0), n_labels), np.int64)
        # Corners are rounded to pixels. With a whole size, a corner does not lie in the tile before it.
        end = origin_level0 + np.floor(extent_level0)
        for point, label in zip(self.xy_level0, self.labels, strict=True):
            inside = (origin_level0 <= point).all(1) & (point < end).all(1)
            votes[inside, label] += 1
        found = votes.argmax(1) if n_labels else np.zeros(len(votes), np.int64)
        return np.where(votes.any(1), found, -1)


def read_points(path: Path, n_labels: int) -> LabelledPoints:
    """Reads a table of labels: a CSV with ``x_level0``, ``y_level0`` and ``label``, one line per place.

    Args:
        path: the table of one slide.
        n_labels: a label is a whole number from 0 to this, exclusive.

    Raises:
        ManifestError: it is no such table; the message has the line.
    """
    points, labels = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in TABLE_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ManifestError(f"{path}: missing column {', '.join(missing)}")
            for row in reader:
                try:
                    point = float(row["x_level0"]), float(row["y_level0"])
                    label = int(row["label"])
                except (TypeError, ValueError):
                    point, label = (np.nan, np.nan), -1
                if not (np.isfinite(point).all() and 0 <= label < n_labels):
                    raise ManifestError(
                        f"{path}, line {reader.line_num}: expected two numbers of pixels and a label from 0 "
                        f"to {n_labels - 1}, found {', '.join(str(row[name]) for name in TABLE_COLUMNS)}"
                    )
                points.append(point)
                labels.append(label)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: expected a CSV of tile labels in UTF-8: {error}") from error
    return LabelledPoints(np.array(points, np.float64).reshape(-1, 2), np.array(labels, np.int64))
