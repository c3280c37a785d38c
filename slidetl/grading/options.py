"""Options of grading; imports no torch, to keep the help of ``slidetl grade`` fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slidetl.errors import UsageError
from slidetl.slides.spacing import check_given
from slidetl.tiles.grid import TileSpec


@dataclass(frozen=True)
class GradeOptions:
    """Options of grading: the computation, and the output files.

    Attributes:
        output: folder for results.csv, and for each slide a map (PNG) and the result (JSON); for a CT series
            a table of its patches (CSV) instead of the map.
        report: write into ``output`` also a page for each slide or series (self-contained HTML), a map of a
            slide for QuPath (GeoJSON), and index.html over all.
        mpp_override: spacing of level 0, micrometres per pixel, of slides without one in the manifest or
            their metadata; fills gaps only.
        mpp_replace: spacing of level 0, micrometres per pixel, instead of the metadata's, of all slides
            without mpp in a manifest.
        mpp_tolerance: relative difference of spacing, 0..0.5; a pyramid level within it is read as it is; by
            default as in the model's training.
        channels: channels of slides with several other than RGB, by number from 0 or name, separated by
            commas: one, or three as red, green and blue; by default as in the model's training.
        force: also grade slides with too little tissue, or unlike those of the training.
        batch_size: tiles per forward pass; by default 16 on a CPU (more cost memory and gain nothing), else
            256, and fewer if the GPU has too little memory.
        precision: number format of the backbone's forward pass; auto is float32 on a CPU, and on a GPU
            that computes in bfloat16, that if the model file was compared with its checkpoint in it on a GPU,
            by the export. On a GPU float32 is float32, without TF32.
        devices: number of GPUs to share the slides, one process each; on a CPU, processes.
        profile: print tiles per second with everything on, and of the network alone.

    Raises:
        UsageError: a report without a folder, a batch without tiles, or an impossible spacing.
    """

    output: Path | None = None
    report: bool = False
    mpp_override: float | None = None
    mpp_replace: float | None = None
    mpp_tolerance: float | None = None
    channels: str = ""
    force: bool = False
    batch_size: int | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    devices: int = 1
    profile: bool = False

    def __post_init__(self) -> None:
        check_given("--mpp-override", self.mpp_override)
        check_given("--mpp-replace", self.mpp_replace)
        tolerance = 0.0 if self.mpp_tolerance is None else self.mpp_tolerance
        TileSpec(1.0, mpp_tolerance=tolerance, channels=self.channels)  # raises if they are invalid
        if self.report and self.output is None:
            raise UsageError("--report needs --output, the folder for the pages")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size must be at least 1, not {self.batch_size}")
        if self.devices < 1:
            raise UsageError(f"--devices must be at least 1, not {self.devices}")
