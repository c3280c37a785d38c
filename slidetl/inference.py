"""A model file and a slide -> a grade, and a map that shows why. Streaming: no cache is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slidetl.cache.tiler import TilePlan, plan_tiles, stream_tiles
from slidetl.data.datasets import channels_first
from slidetl.errors import SlideOpenError
from slidetl.export import ModelFile
from slidetl.slides import open_slide


@dataclass(frozen=True, eq=False)
class SlideGrade:
    """What a model says of a slide.

    Attributes:
        slide: the file, as it was named.
        grade: the most probable grade, 0..K-1.
        grade_name: its name.
        probabilities: of the grades 0..K-1; they sum to one.
        expected_grade: their mean, 0..K-1.
        model_sha256: hash of the model file.
        plan: which tiles were wanted, with thumbnail and tissue.
        origins_level0: ``[N, 2] int32``, upper-left corners ``(x, y)`` of the tiles that were read.
        attention: ``[N] float32``, weight of each tile; they sum to one.
        tile_grades: ``[N] float32``, the grade expected if the slide had that tile alone.
    """

    slide: Path
    grade: int
    grade_name: str
    probabilities: tuple[float, ...]
    expected_grade: float
    model_sha256: str
    plan: TilePlan
    origins_level0: NDArray[np.int32]
    attention: NDArray[np.float32]
    tile_grades: NDArray[np.float32]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON values, without the map."""
        return {
            "slide": str(self.slide),
            "grade": self.grade,
            "grade_name": self.grade_name,
            "probabilities": [round(probability, 7) for probability in self.probabilities],
            "expected_grade": round(self.expected_grade, 5),
            "tiles": len(self.attention),
            "model_sha256": self.model_sha256,
        }


def grade_slide(
    model: ModelFile, path: Path, mpp_override: float | None = None, batch_size: int = 64
) -> SlideGrade:
    """Grades one slide, from its file, through the pixels that a cache would hold.

    Tiles are embedded as they are read, so that memory grows by the embeddings alone.

    Args:
        model: as :func:`slidetl.export.load_model` returns it.
        path: the slide.
        mpp_override: micrometres per level-0 pixel, for a slide whose metadata has none.
        batch_size: tiles per pass through the backbone.

    Raises:
        SlideError: the slide cannot be opened or read, has no spacing, is too coarse or has no tissue.
    """
    spec = model.card.tile_spec
    device = next(model.network.parameters()).device
    embeddings: list[torch.Tensor] = []
    origins: list[NDArray[np.int32]] = []
    with open_slide(path, mpp_override, spec.icc) as slide, torch.inference_mode():
        plan = plan_tiles(slide, spec)
        for batch in stream_tiles(slide, plan, batch_size):
            embeddings.append(model.network.embed(channels_first(batch.pixels).to(device)))
            origins.append(batch.origins_level0)
        if not embeddings:
            raise SlideOpenError(
                f"{path}: no tile of {spec.tile_size_px} px at {spec.mpp:g} um/px has at least "
                f"{spec.min_tissue:.0%} tissue; there is nothing to grade"
            )
        every = torch.cat(embeddings)
        probabilities, expected, attention = model.network.grade(every)
        tile_grades = model.network.grade_tiles(every)
    grade = int(probabilities.argmax())
    return SlideGrade(
        slide=path,
        grade=grade,
        grade_name=model.card.grades[grade],
        probabilities=tuple(probabilities.tolist()),
        expected_grade=float(expected),
        model_sha256=model.sha256,
        plan=plan,
        origins_level0=np.concatenate(origins),
        attention=attention.cpu().numpy(),
        tile_grades=tile_grades.cpu().numpy(),
    )


def draw_map(result: SlideGrade, path: Path) -> None:
    """Draws the attention and the tiles' own grades over the thumbnail, as a PNG.

    Attention is shown relative to a slide whose tiles all count alike: 1 is the average tile. A model that
    pools by the mean has no attention to show.
    """
    from matplotlib.figure import Figure

    plan = result.plan
    height, width = plan.thumbnail.shape[:2]
    relative = result.attention * len(result.attention)
    highest = len(result.probabilities) - 1.0
    panels = [("grade of each tile by itself", result.tile_grades, "viridis", (0.0, highest))]
    if np.ptp(relative) > 1e-3:
        panels.insert(0, ("attention (1: average tile)", relative, "inferno", (0.0, float(relative.max()))))
    panel_width = 5.0
    figure = Figure(
        figsize=(
            (1 + len(panels)) * panel_width,
            0.9 * panel_width * min(2.0, max(0.5, height / width)) + 0.9,
        ),
        layout="constrained",
    )
    axes = figure.subplots(1, 1 + len(panels))
    axes[0].imshow(plan.thumbnail)
    axes[0].set_title(f"{result.slide.name}: {len(result.attention)} tiles")
    for panel, (title, values, colours, (low, high)) in zip(axes[1:], panels, strict=True):
        panel.imshow(plan.thumbnail)
        grid = _on_grid(result, values)
        # The pixel centres of a picture lie at whole numbers, its border at -0.5.
        right, bottom = _thumbnail_px(result, grid.shape[1], grid.shape[0])
        shown = panel.imshow(
            grid, cmap=colours, vmin=low, vmax=high, alpha=0.6, extent=(-0.5, right, bottom, -0.5)
        )
        panel.set(title=title, xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        figure.colorbar(shown, ax=panel, fraction=0.046, pad=0.02)
    for panel in axes:
        panel.set_xticks([])
        panel.set_yticks([])
    probabilities = ", ".join(f"{probability:.2f}" for probability in result.probabilities)
    figure.suptitle(
        f"grade {result.grade_name}   (expected {result.expected_grade:.2f}; probabilities {probabilities})"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _stride_level0(result: SlideGrade) -> tuple[float, float]:
    spec, extent = result.plan.spec, result.plan.extent_level0
    share = spec.stride_px / spec.tile_size_px
    return extent[0] * share, extent[1] * share


def _on_grid(result: SlideGrade, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Values of the tiles on their grid ``[rows, columns]``, NaN where no tile was read."""
    column, row = np.round(result.origins_level0 / _stride_level0(result)).astype(int).T
    grid = np.full((row.max() + 1, column.max() + 1), np.nan)
    grid[row, column] = values
    return grid


def _thumbnail_px(result: SlideGrade, columns: int, rows: int) -> tuple[float, float]:
    """Where so many columns and rows of the grid end, in thumbnail pixels whose centres are whole."""
    height, width = result.plan.thumbnail.shape[:2]
    size_x, size_y = result.plan.info.size_level0
    stride_x, stride_y = _stride_level0(result)
    return columns * stride_x / size_x * width - 0.5, rows * stride_y / size_y * height - 0.5
