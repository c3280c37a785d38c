"""Seeded lung slides whose grade, per slide and per place, is known.

A :class:`SyntheticSlide` is drawn as a pure function of physical coordinates, so any rectangle of it
can be drawn alone and a slide of any size streams to disk in bands. What is drawn, what carries the
grade and what must not is told in ``docs/design/synthetic-slides.md``; in one sentence: every lesion
looks alike in size, colour, density and loss of alveoli, and only the oriented fibres of the fibrotic
ones (against the round cells of the inflamed ones) tell which share of the section is fibrotic.

Coordinates are micrometres from the slide's upper-left corner; amounts of dye are optical densities.
"""

from __future__ import annotations

import csv
import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError

GRADES = 5
SHARE_PER_GRADE = 0.12
"""Grade k stands for a fibrotic share of the section around ``k * SHARE_PER_GRADE``."""

TRUTH_CELL_UM = 64.0
"""Side of a cell of the truth arrays, micrometres."""

Array = NDArray[np.float32]

_TILE_PX = 256
_LEVEL_FACTOR = 4
_BLOCK_PX = 512  # drawn at once: a few dozen float32 planes of it stay within the CPU's caches
_PLAN_UM = 32.0  # spacing of the fields that need to be known over the whole slide
_FINE_UM = 2.0  # everything but round nuclei is drawn at this spacing at the finest
_ALVEOLI_UM = 4.0
_PERIOD_UM = 1024.0  # of the texture swatches
_PLEURA_COSINE = 0.3  # the pleura covers this sector of the outline
_FIBRE_CONTRAST = 0.85  # the knob: swing of the lesions' matrix around its mean, as optical density

# Optical density per unit of dye over red, green, blue, rows: nuclear stain, cytoplasm, collagen. The
# first row and the eosin follow Ruifrok & Johnston 2001 in direction; the rest is matched by eye.
_DYES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "he": ((0.66, 0.72, 0.32), (0.08, 0.46, 0.20), (0.09, 0.43, 0.19)),
    "trichrome": ((0.70, 0.72, 0.42), (0.12, 0.52, 0.40), (0.56, 0.32, 0.10)),
    "sirius": ((0.34, 0.40, 0.42), (0.03, 0.09, 0.34), (0.06, 0.58, 0.44)),
}
STAINS = tuple(_DYES)


def grade_of_share(fibrotic_share: float) -> int:
    """The grade, 0 to 4, of a slide of whose section ``fibrotic_share`` (0..1) is fibrotic.

    The borders lie at 6, 18, 30 and 42 per cent.
    """
    return min(GRADES - 1, math.floor(fibrotic_share / SHARE_PER_GRADE + 0.5))


@dataclass(frozen=True)
class SiteAppearance:
    """What one hospital's laboratory and scanner do to every one of its slides.

    Attributes:
        white_rgb: colour of bare glass, 0..255.
        dye_gain: relative strength of the nuclear, cytoplasm and collagen dye.
        hue_shift: relative change of the dyes' optical density over red, green, blue.
        blur: weight of each neighbouring pixel in the scanner's blur, 0..0.25.
        grain: standard deviation of the sensor's noise, grey levels.
        jpeg_quality: 1..100.
    """

    white_rgb: tuple[float, float, float]
    dye_gain: tuple[float, float, float]
    hue_shift: tuple[float, float, float]
    blur: float
    grain: float
    jpeg_quality: int

    @classmethod
    def of(cls, site: int, seed: int) -> SiteAppearance:
        """The appearance of site number ``site`` (from 0) under ``seed``."""
        rng = np.random.default_rng([seed, 0x517E, site])
        white = 243.0 + rng.uniform(-6, 6, 3)
        gain = np.exp(rng.normal(0, 0.10, 3))
        hue = 1 + rng.normal(0, 0.06, 3)
        return cls(
            white_rgb=(float(white[0]), float(white[1]), float(white[2])),
            dye_gain=(float(gain[0]), float(gain[1]), float(gain[2])),
            hue_shift=(float(hue[0]), float(hue[1]), float(hue[2])),
            blur=float(rng.uniform(0.03, 0.15)),
            grain=float(rng.uniform(0.8, 2.0)),
            jpeg_quality=int(rng.integers(84, 94)),
        )


@dataclass(frozen=True)
class SyntheticSlide:
    """Everything that decides the pixels of one slide.

    Attributes:
        fibrotic_share: share of the section's area that is fibrotic, 0..0.55.
        seed: of everything about the slide except its site.
        appearance: of the site where it was stained and scanned.
        stain: ``he``, ``trichrome`` or ``sirius``.
        size_px: width and height, pixels of level 0; each at least 512.
        mpp: micrometres per pixel of level 0, 0.1 to 8.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    fibrotic_share: float
    seed: int
    appearance: SiteAppearance
    stain: str
    size_px: tuple[int, int]
    mpp: float

    def __post_init__(self) -> None:
        if not 0 <= self.fibrotic_share <= 0.55:
            raise UsageError(f"fibrotic share must be from 0 to 0.55, not {self.fibrotic_share}")
        if self.stain not in STAINS:
            raise UsageError(f"stain must be one of {', '.join(STAINS)}, not {self.stain!r}")
        if min(self.size_px) < 512:
            raise UsageError(
                f"a synthetic slide must be at least 512 pixels wide and high, not {self.size_px}"
            )
        if not 0.1 <= self.mpp <= 8:
            raise UsageError(f"mpp of a synthetic slide must be from 0.1 to 8 micrometres, not {self.mpp}")

    @property
    def grade(self) -> int:
        """The grade that the fibrotic share means."""
        return grade_of_share(self.fibrotic_share)


# --------------------------------------------------------------------------------------------------
# Random fields. All are functions of (seed, coordinates) alone.


def _ramp(distance_um: Array, width_um: float) -> Array:
    """0 outside, 1 inside an edge at distance 0, linear over ``width_um``: an antialiased edge."""
    return np.clip(distance_um * np.float32(1 / width_um) + np.float32(0.5), 0, 1)


def _hash01(seed: int, row: NDArray[np.int64], column: NDArray[np.int64]) -> Array:
    """Uniform numbers in [0, 1) for integer lattice points (arrays that broadcast)."""
    value = row.astype(np.uint32) * np.uint32(0x9E3779B1) ^ column.astype(np.uint32) * np.uint32(0x85EBCA77)
    value = value ^ np.uint32(seed & 0xFFFFFFFF)
    for factor in (0x7FEB352D, 0x846CA68B):  # two rounds of a multiply-xorshift mixer
        value = (value ^ (value >> np.uint32(16))) * np.uint32(factor)
    value = value ^ (value >> np.uint32(15))
    return (value >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def _interpolate(nodes: Array, row: NDArray[np.float64], column: NDArray[np.float64]) -> Array:
    """Bilinear values of ``nodes [..., R, C]`` at fractional rows ``[h]`` and columns ``[w]``."""
    top = np.clip(row.astype(np.intp), 0, nodes.shape[-2] - 2)
    left = np.clip(column.astype(np.intp), 0, nodes.shape[-1] - 2)
    down = np.clip(row - top, 0, 1).astype(np.float32)[:, None]
    right = np.clip(column - left, 0, 1).astype(np.float32)
    upper = np.take(nodes, top, axis=-2)
    strip = upper + (np.take(nodes, top + 1, axis=-2) - upper) * down
    slope = np.diff(strip, axis=-1)
    values: Array = np.take(slope, left, axis=-1)
    values *= right
    values += np.take(strip, left, axis=-1)
    return values


def _on_lattice(
    field: Callable[[NDArray[np.float64], NDArray[np.float64]], Array],
    step_um: float,
    y: NDArray[np.float64],
    x: NDArray[np.float64],
) -> Array:
    """``field(y, x)`` drawn on a lattice of ``step_um`` that is fixed to the slide, and interpolated."""
    if y[1] - y[0] >= step_um:
        return field(y, x)
    first_row, first_column = math.floor(y[0] / step_um), math.floor(x[0] / step_um)
    rows = np.arange(first_row, math.floor(y[-1] / step_um) + 2)
    columns = np.arange(first_column, math.floor(x[-1] / step_um) + 2)
    return _interpolate(
        field(rows * step_um, columns * step_um), y / step_um - first_row, x / step_um - first_column
    )


def _noise(seed: int, wavelength_um: float, y: NDArray[np.float64], x: NDArray[np.float64]) -> Array:
    """Smooth noise in [-1, 1] of about the given wavelength, ``[len(y), len(x)]``."""
    step = wavelength_um / 2
    row, column = np.floor(y / step), np.floor(x / step)
    lattice = _hash01(
        seed,
        np.arange(int(row[0]), int(row[-1]) + 2)[:, None],
        np.arange(int(column[0]), int(column[-1]) + 2)[None, :],
    )
    down, right = y / step - row, x / step - column
    down, right = down * down * (3 - 2 * down), right * right * (3 - 2 * right)
    return _interpolate(lattice * 2 - 1, row - row[0] + down, column - column[0] + right)


def _wall_distance(seed: int, pitch_um: float, y: Array, x: Array) -> Array:
    """Distance to the wall between the cells of a jittered lattice, micrometres.

    The difference of the distances to the two nearest cell centres (Worley 1996, F2 - F1), halved.
    ``y`` and ``x`` are two-dimensional, so that they can be warped.
    """
    row, column = np.floor(y / pitch_um).astype(np.int64), np.floor(x / pitch_um).astype(np.int64)
    rows = np.arange(row.min() - 1, row.max() + 2)
    columns = np.arange(column.min() - 1, column.max() + 2)
    jitter_y = _hash01(seed, rows[:, None], columns[None, :])
    jitter_x = _hash01(seed ^ 0x5BD1E995, rows[:, None], columns[None, :])
    centre_y = ((rows[:, None] + 0.1 + 0.8 * jitter_y) * pitch_um).astype(np.float32).ravel()
    centre_x = ((columns[None, :] + 0.1 + 0.8 * jitter_x) * pitch_um).astype(np.float32).ravel()
    home = (row - rows[0]) * len(columns) + (column - columns[0])
    nearest = np.full(y.shape, np.inf, np.float32)
    second = nearest.copy()
    for step_y in (-1, 0, 1):
        for step_x in (-1, 0, 1):
            cell = home + (step_y * len(columns) + step_x)
            distance = (np.take(centre_y, cell) - y) ** 2 + (np.take(centre_x, cell) - x) ** 2
            np.minimum(second, np.maximum(nearest, distance), out=second)
            np.minimum(nearest, distance, out=nearest)
    return (np.sqrt(second) - np.sqrt(nearest)) * np.float32(0.5)


# --------------------------------------------------------------------------------------------------
# Swatches: periodic textures made once per process and sampled anywhere.


def _cells(
    rng: np.random.Generator, spacing_um: float, pitch_um: tuple[float, float], radius_um: tuple[float, float]
) -> tuple[Array, Array]:
    """Scattered elliptical nuclei, periodic: their coverage of each pixel, and their rank, both 0..1.

    Showing only those ranked below some density thins them out evenly. Sizes are ``(y, x)``.
    """
    size = round(_PERIOD_UM / spacing_um)
    counts = [round(_PERIOD_UM / pitch) for pitch in pitch_um]
    grid = np.stack(np.meshgrid(*[np.arange(count) for count in counts], indexing="ij"), -1).reshape(-1, 2)
    centre = (grid + 0.5 + rng.uniform(-0.42, 0.42, grid.shape)) / np.array(counts) * size
    radius = np.array(radius_um) / spacing_um * rng.uniform(0.8, 1.2, (len(grid), 1))
    tilt = rng.normal(0, 0.12, len(grid))
    reach = math.ceil(max(radius_um) * 1.2 / spacing_um) + 1
    offset = np.arange(-reach, reach + 1)
    dy = (np.floor(centre[:, 0])[:, None] + offset - centre[:, :1])[:, :, None]
    dx = (np.floor(centre[:, 1])[:, None] + offset - centre[:, 1:])[:, None, :]
    along, across = dx + dy * tilt[:, None, None], dy - dx * tilt[:, None, None]
    reduced = np.hypot(across / radius[:, 0, None, None], along / radius[:, 1, None, None])
    coverage = np.clip((1 - reduced) * radius.min(axis=1)[:, None, None] + 0.5, 0, 1).astype(np.float32)
    cell, row, column = np.nonzero(coverage)
    at = (
        (np.floor(centre[cell, 0]).astype(int) + row - reach) % size,
        (np.floor(centre[cell, 1]).astype(int) + column - reach) % size,
    )
    shown, rank = np.zeros((size, size), np.float32), np.ones((size, size), np.float32)
    shown[at] = coverage[cell, row, column]
    rank[at] = ((rng.permutation(len(grid)) + 0.5) / len(grid)).astype(np.float32)[cell]
    return shown, rank


def _rank_covering(coverage: float, shown: Array, rank: Array) -> float:
    """The rank below which nuclei must be shown to cover the given share of the area."""
    edges = np.linspace(0, 1, 65)
    covered, _ = np.histogram(rank, bins=edges, weights=shown)
    return float(np.interp(coverage, np.concatenate([[0], np.cumsum(covered)]) / shown.size, edges))


@functools.lru_cache(maxsize=2)
def _round_nuclei(spacing_um: float) -> tuple[Array, Array]:
    """Coverage and rank of round nuclei, about 6 micrometres wide."""
    return _cells(np.random.default_rng(11), spacing_um, (9.5, 9.5), (3.1, 3.1))


@functools.lru_cache(maxsize=1)
def _matrix_swatch() -> Array:
    """Textures of the lesions' matrix at 2 micrometres, ``[size * size, 4]``, fibres along x.

    Channels: wavy fibres and isotropic clumps, both uniform in [0, 1] (so that their mean colours
    agree whatever the stain does to them), coverage and rank of spindle nuclei.
    """
    rng = np.random.default_rng(12)
    size = round(_PERIOD_UM / _FINE_UM)
    frequency = np.fft.fftfreq(size, _FINE_UM)
    along, across = frequency[None, :], frequency[:, None]
    radius = np.hypot(along, across)

    def filtered(gain: NDArray[np.float64]) -> NDArray[np.float64]:
        image = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * gain).real
        return image / image.std()

    def band(value: NDArray[np.float64], centre_um: float) -> NDArray[np.float64]:
        return np.exp(-(((np.abs(value) - 1 / centre_um) * centre_um * 2.5) ** 2))

    fibres = sum(
        weight * filtered(band(across, width_um) * np.exp(-((along * length_um) ** 2)))
        for weight, width_um, length_um in ((1.0, 24.0, 160.0), (0.7, 12.0, 90.0))
    )
    clumps = sum(weight * filtered(band(radius, width_um)) for weight, width_um in ((1.0, 24.0), (0.7, 12.0)))
    shown, rank = _cells(rng, _FINE_UM, (8.0, 22.0), (2.2, 7.5))
    # A wave of about 90 micrometres that bends the fibres and what lies among them alike.
    wave = filtered(np.exp(-(((along * 90) - 1) ** 2) * 4 - (across * 120) ** 2)) * 5.0
    row = (np.arange(size)[:, None] + np.round(wave / _FINE_UM).astype(int)) % size
    column = np.arange(size)[None, :]

    def uniform(image: NDArray[np.float64]) -> NDArray[np.float64]:
        order = np.empty(image.size)
        order[np.argsort(image, axis=None, kind="stable")] = (np.arange(image.size) + 0.5) / image.size
        return order.reshape(image.shape)

    planes = [uniform(fibres)[row, column], uniform(clumps), shown[row, column], rank[row, column]]
    return np.stack(planes, axis=-1).reshape(-1, len(planes)).astype(np.float32)


def _sample_matrix(along_um: Array, across_um: Array) -> Array:
    """The matrix swatch at fibre coordinates of any shape: ``[..., 4]``."""
    size = round(_PERIOD_UM / _FINE_UM)
    # The offset keeps the coordinates positive, where truncation rounds down.
    column = (along_um * np.float32(1 / _FINE_UM) + np.float32(64 * size)).astype(np.int32) % size
    row = (across_um * np.float32(1 / _FINE_UM) + np.float32(64 * size)).astype(np.int32) % size
    return np.take(_matrix_swatch(), row * size + column, axis=0)


@functools.lru_cache(maxsize=1)
def _grain() -> Array:
    return np.random.default_rng(13).standard_normal((509, 509)).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# The section.


@dataclass(frozen=True)
class _Tube:
    """A vessel or bronchus, cut across; lengths in micrometres."""

    y: float
    x: float
    lumen: float
    lining: float  # epithelium; 0 for a vessel
    muscle: float
    collagen: float
    blood: float  # 0..1, how full of red cells
    slant: float  # radians, of the longer axis of its cut

    @property
    def reach(self) -> float:
        return self.lumen + self.lining + self.muscle + self.collagen

    def within(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> tuple[slice, slice] | None:
        """The rows and columns that it can reach, if any."""
        rows = slice(*np.searchsorted(y, [self.y - self.reach, self.y + self.reach]).tolist())
        columns = slice(*np.searchsorted(x, [self.x - self.reach, self.x + self.reach]).tolist())
        return (rows, columns) if rows.stop > rows.start and columns.stop > columns.start else None

    def polar(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> tuple[Array, Array]:
        """Distance from its middle, stretched to make its cut oval, and the angle around it."""
        dy, dx = (y[:, None] - self.y).astype(np.float32), (x[None, :] - self.x).astype(np.float32)
        angle = np.arctan2(dy, dx)
        stretch = np.float32(1.12) + np.float32(0.12) * np.cos(2 * (angle - np.float32(self.slant)))
        return np.hypot(dy, dx) * stretch, angle


@dataclass(frozen=True)
class _Regions:
    """Which tissue lies where, each ``[h, w]`` in 0..1."""

    section: Array
    lesion: Array
    fibrotic: Array
    cystic: Array
    depth: Array  # 0 at a lesion's border, 1 at its core
    in_pleura: NDArray[np.bool_]
    edge_um: Array  # distance from the section's outline, positive inside


class LungSection:
    """A slide laid out and ready to be drawn, in any rectangle and any order.

    Args:
        slide: what is to be drawn.
    """

    def __init__(self, slide: SyntheticSlide) -> None:
        self.slide = slide
        rng = np.random.default_rng([slide.seed, 0x1046])
        self._salt = int(rng.integers(1 << 32))
        self._extent_um = (slide.size_px[1] * slide.mpp, slide.size_px[0] * slide.mpp)

        # Drawn independently of the fibrotic share, all of it before the share is first used.
        gains = np.exp(rng.normal(0, [0.14, 0.14, 0.14])) * np.exp(rng.normal(0, 0.08))
        self._dyes = (
            np.array(_DYES[slide.stain])
            * (np.array(slide.appearance.dye_gain) * gains)[:, None]
            * np.array(slide.appearance.hue_shift)
        )
        self._alveolus_um = float(rng.uniform(170, 250))  # inflation
        self._septum_um = float(rng.uniform(5.0, 8.0))
        self._cellularity = float(np.exp(rng.normal(0, 0.25)))
        self._oedema = float(rng.uniform(-0.6, 0.5))
        self._atelectasis = float(rng.uniform(-0.6, 0.3))
        self._cystic = float(rng.uniform(0.15, 0.40))  # share of the lesions that is honeycombed
        # Round cells and spindle cells cover the same share of a lesion, so that colour is no hint.
        coverage = float(rng.uniform(0.14, 0.20))
        self._round_rank = _rank_covering(coverage, *_round_nuclei(self._nuclei_spacing_um))
        self._spindle_rank = _rank_covering(coverage, *np.moveaxis(_matrix_swatch()[:, 2:], -1, 0))
        self._hyalinity = float(rng.uniform(0.80, 1.08))  # collagen dye that an inflamed lesion takes up
        self._fibre_angle = float(rng.uniform(0, math.pi))
        self._lesion_share = float(rng.uniform(0.58, 0.68))
        self._outline = (
            float(rng.uniform(0.80, 0.88)),
            rng.normal(0, 0.035, 6),
            rng.uniform(0, 2 * math.pi, 6),
        )
        collagen_load = float(np.exp(rng.normal(0, 0.35)))
        self._pleura_um = 55 * collagen_load
        self._pleura_angle = float(rng.uniform(-math.pi, math.pi))
        self._tubes = self._lay_tubes(rng, collagen_load)
        self._plan = self._lay_lesions()

    def _polar(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> tuple[Array, Array]:
        """Distance from the outline (positive inside, micrometres) and the angle around the centre."""
        half_y, half_x = self._extent_um[0] / 2, self._extent_um[1] / 2
        dy, dx = (y / half_y - 1)[:, None], (x / half_x - 1)[None, :]
        angle = np.arctan2(dy, dx)
        radius, ripple, phase = self._outline
        border = radius + sum(
            ripple[k] * np.cos((k + 1) * angle + phase[k]) / math.sqrt(k + 1) for k in range(len(ripple))
        )
        distance = (np.minimum(border, 0.96) - np.hypot(dy, dx)) * min(half_y, half_x)
        return distance.astype(np.float32), angle.astype(np.float32)

    def _lay_tubes(self, rng: np.random.Generator, collagen_load: float) -> list[_Tube]:
        height, width = self._extent_um
        tubes = []
        for per_mm2, least, most, is_airway in ((0.3, 110, 320, True), (1.3, 25, 130, False)):
            for _ in range(rng.poisson(per_mm2 * height * width / 1e6)):
                y, x, lumen = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(least, most)
                tube = _Tube(
                    y=float(y),
                    x=float(x),
                    lumen=float(lumen),
                    lining=22.0 if is_airway else 0.0,
                    muscle=float(12 if is_airway else 8 + 0.22 * lumen),
                    collagen=float(collagen_load * (14 + (0.12 if is_airway else 0.25) * lumen)),
                    blood=0.0 if is_airway else float(rng.choice([0.0, 0.5, 0.9])),
                    slant=float(rng.uniform(0, math.pi)),
                )
                distance, _ = self._polar(np.array([y]), np.array([x]))
                apart = all(math.hypot(y - t.y, x - t.x) > tube.reach + t.reach for t in tubes)
                if apart and distance[0, 0] > tube.reach + self._pleura_um:
                    tubes.append(tube)
        return tubes

    def _lay_lesions(self) -> Array:
        """Fields over the whole slide, ``[5, rows, columns]`` at 32 micrometres.

        Ranks of the lesions, of the fibrotic among them, and of the cystic among them: positive
        inside, 0 at the border; a rank is a share of area, so the shares come out as asked. Then the
        distance from the outline, micrometres, and the cosine of the angle from the pleura's middle.
        """
        rows = np.arange(math.ceil(self._extent_um[0] / _PLAN_UM) + 2) * _PLAN_UM
        columns = np.arange(math.ceil(self._extent_um[1] / _PLAN_UM) + 2) * _PLAN_UM
        distance, angle = self._polar(rows, columns)
        in_section = distance > 0
        free = in_section & ~self._in_anatomy(
            rows, columns, distance, np.cos(angle - np.float32(self._pleura_angle))
        )
        if not free.any():
            free = in_section

        def focal(salt: int, *octaves_um: float) -> Array:
            total = np.zeros(free.shape, np.float32)
            for k, wavelength in enumerate(octaves_um):
                total += _noise(self._salt + salt + k, wavelength, rows, columns) * np.float32(0.6**k)
            return total

        def rank(field: Array, among: NDArray[np.bool_]) -> Array:
            ordered = np.sort(field[among])
            return np.interp(field, ordered, np.linspace(0, 1, len(ordered))).astype(np.float32)

        wanted = min(self._lesion_share * in_section.sum() / free.sum(), 0.98)
        lesion = (rank(focal(101, 1500, 600, 250), free) - (1 - wanted)) / wanted
        within = free & (lesion > 0)
        fibrotic_of_lesion = self.slide.fibrotic_share / self._lesion_share
        fibrotic = rank(focal(111, 1100, 450), within) - (1 - fibrotic_of_lesion)
        cystic = rank(focal(121, 900, 400), within) - (1 - self._cystic)
        return np.stack([lesion, fibrotic, cystic, distance, np.cos(angle - self._pleura_angle)]).astype(
            np.float32
        )

    def _in_anatomy(
        self, y: NDArray[np.float64], x: NDArray[np.float64], distance: Array, pleural: Array
    ) -> NDArray[np.bool_]:
        inside = (distance < self._pleura_um) & (pleural > _PLEURA_COSINE)
        for tube in self._tubes:
            if part := tube.within(y, x):
                inside[part] |= tube.polar(y[part[0]], x[part[1]])[0] < tube.reach
        return inside

    def _regions(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> _Regions | None:
        """The tissue at rows ``y`` and columns ``x``; None where there is only glass."""
        lesion_rank, fibrotic_rank, cystic_rank, distance, pleural = _interpolate(
            self._plan, y / _PLAN_UM, x / _PLAN_UM
        )
        if distance.max() < -20:
            return None
        distance = distance + np.float32(14) * _noise(self._salt + 1, 110, y, x)
        section = _ramp(distance, max(_FINE_UM, y[1] - y[0]))
        anatomy = self._in_anatomy(y, x, distance, pleural).astype(np.float32) * section
        ragged = _noise(self._salt + 2, 140, y, x)
        free = section - anatomy
        lesion = np.clip((lesion_rank + 0.05 * ragged) * np.float32(25) + 0.5, 0, 1) * free
        fibrotic = np.clip((fibrotic_rank - 0.03 * ragged) * np.float32(40) + 0.5, 0, 1) * lesion
        if self.slide.fibrotic_share == 0:
            fibrotic = np.zeros_like(fibrotic)
        cystic = np.clip(cystic_rank * 25 + 0.5, 0, 1) * lesion
        depth = np.clip(lesion_rank, 0, 1)
        in_pleura = (distance < self._pleura_um) & (pleural > _PLEURA_COSINE)
        return _Regions(section, lesion, fibrotic, cystic, depth, in_pleura, distance)

    def _alveoli(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> Array:
        """Distances to alveolar and to cyst walls (far the larger), ``[2, h, w]``, micrometres."""
        warp_y = y[:, None].astype(np.float32) + np.float32(30) * _noise(self._salt + 3, 260, y, x)
        warp_x = x[None, :].astype(np.float32) + np.float32(30) * _noise(self._salt + 4, 260, y, x)
        alveoli = _wall_distance(self._salt + 5, self._alveolus_um, warp_y, warp_x)
        return np.stack([alveoli, _wall_distance(self._salt + 6, 420, warp_y, warp_x)])

    def _fibre_coordinates(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> Array:
        """Along and across the fibres, ``[2, h, w]``, micrometres: two interwoven sets of bundles."""
        swirl_y = y[:, None].astype(np.float32) + np.float32(80) * _noise(self._salt + 7, 640, y, x)
        swirl_x = x[None, :].astype(np.float32) + np.float32(80) * _noise(self._salt + 8, 640, y, x)
        layers = []
        for angle in (self._fibre_angle, self._fibre_angle + 1.2):
            sine, cosine = np.float32(math.sin(angle)), np.float32(math.cos(angle))
            layers.append(np.stack([swirl_x * cosine + swirl_y * sine, swirl_y * cosine - swirl_x * sine]))
        return np.where(_noise(self._salt + 9, 420, y, x) > 0, layers[0], layers[1])

    def _dye(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> Array:
        """Amounts over rows ``y`` and columns ``x``, ``[4, h, w]``.

        Nuclear dye of everything but round nuclei, cytoplasm dye, collagen dye, and the share of
        round nuclei to show (their rank).
        """
        regions = self._regions(y, x)
        if regions is None:
            return np.zeros((4, len(y), len(x)), np.float32)
        edge = max(_FINE_UM, y[1] - y[0])
        section, lesion, fibrotic = regions.section, regions.lesion, regions.fibrotic
        inflamed = lesion - fibrotic
        texture = _sample_matrix(*self._fibre_coordinates(y, x))
        fibres, clumps, spindle, spindle_rank = np.moveaxis(texture, -1, 0)
        walls, cyst_walls = _on_lattice(self._alveoli, _ALVEOLI_UM, y, x)
        patchy = _noise(self._salt + 10, 500, y, x)

        # Architecture, blind to what kind of lesion it is: septa thicken, then the airspaces are gone.
        collapse = np.clip(_noise(self._salt + 11, 900, y, x) + np.float32(self._atelectasis), 0, 1)
        septum = np.float32(self._septum_um) * (1 + 2 * collapse + 5 * lesion * regions.depth)
        filled = np.clip((regions.depth - 0.12 + 0.10 * patchy) * 15, 0, 1) * lesion
        body = np.maximum(_ramp(septum - walls, edge), filled)
        body *= 1 - regions.cystic * _ramp(cyst_walls - (32 + 14 * patchy), edge)

        matrix_fibrotic = np.float32(0.75) + np.float32(_FIBRE_CONTRAST) * (fibres - np.float32(0.5))
        matrix_inflamed = np.float32(0.75) + np.float32(_FIBRE_CONTRAST) * (clumps - np.float32(0.5))
        hyaline = np.float32(0.85 * self._hyalinity)
        collagen = fibrotic * matrix_fibrotic * np.float32(0.85) + inflamed * matrix_inflamed * hyaline
        matrix = fibrotic * matrix_fibrotic + inflamed * matrix_inflamed
        healthy = 1 - lesion
        cytoplasm = (
            matrix - collagen + healthy * (np.float32(0.62) + np.float32(0.3) * (clumps - np.float32(0.5)))
        )
        nuclear = fibrotic * spindle * (spindle_rank < np.float32(self._spindle_rank))
        inflammation = self._cellularity * (np.float32(0.25) + np.float32(0.15) * patchy)
        crowding = healthy * inflammation + inflamed * np.float32(self._round_rank)
        planes = np.stack([nuclear, cytoplasm, collagen, crowding])
        planes *= body * section
        oedema = np.clip(_noise(self._salt + 12, 1200, y, x) + np.float32(self._oedema), 0, 1)
        planes[1] += np.float32(0.30) * oedema * (1 - body) * section
        self._draw_anatomy(planes, regions, y, x, edge)
        return planes

    @property
    def _nuclei_spacing_um(self) -> float:
        return min(max(self.slide.mpp, 0.5), 4.0)

    def _draw_anatomy(
        self,
        planes: Array,
        regions: _Regions,
        y: NDArray[np.float64],
        x: NDArray[np.float64],
        edge: float,
    ) -> None:
        """Vessels, bronchi and pleura with their normal collagen, over ``planes`` in place."""
        pleura = regions.in_pleura & (regions.edge_um > -edge)
        if pleura.any():
            _, angle = self._polar(y, x)
            fibres = _sample_matrix(angle * np.float32(min(self._extent_um) / 2), regions.edge_um)[..., 0]
            planes[:, pleura] = 0
            planes[2] += (
                pleura * regions.section * (np.float32(0.6) + np.float32(0.6) * (fibres - np.float32(0.5)))
            )
            planes[3] += pleura * regions.section * np.float32(0.04)
        for tube in self._tubes:
            part = tube.within(y, x)
            if part is None:
                continue
            radius, angle = tube.polar(y[part[0]], x[part[1]])
            outside = radius - np.float32(tube.lumen)
            fibres = _sample_matrix(angle * np.float32(tube.lumen), outside)[..., 0]
            inside = radius < tube.reach
            wall = _ramp(outside, edge)
            lining = (
                _ramp(np.float32(tube.lining) - outside, edge) * wall if tube.lining else np.zeros_like(wall)
            )
            muscle_end = np.float32(tube.lining + tube.muscle)
            muscle = _ramp(muscle_end - outside, edge) * wall - lining
            collagen = wall - lining - muscle
            lumen = 1 - wall
            drawn = np.stack(
                [
                    0.25 * lining,
                    0.6 * lining + 0.9 * muscle + tube.blood * lumen,
                    collagen * (np.float32(0.75) + np.float32(0.6) * (fibres - np.float32(0.5))),
                    0.40 * lining + 0.10 * muscle + 0.06 * collagen,
                ]
            )
            under = planes[(slice(None), *part)]
            under[...] = np.where(inside, drawn, under)

    def draw(self, origin_px: tuple[int, int], size_px: tuple[int, int]) -> NDArray[np.uint8]:
        """Draws a rectangle.

        Args:
            origin_px: upper-left corner ``(x, y)``, level-0 pixels.
            size_px: width and height, pixels.

        Returns:
            ``[height, width, 3] uint8`` RGB, as the scanner would see it before compression.
        """
        image = np.empty((size_px[1], size_px[0], 3), np.uint8)
        for top in range(0, size_px[1], _BLOCK_PX):
            for left in range(0, size_px[0], _BLOCK_PX):
                part = image[top : top + _BLOCK_PX, left : left + _BLOCK_PX]
                self._draw_block(origin_px[1] + top, origin_px[0] + left, part)
        return image

    def _draw_block(self, top: int, left: int, block: NDArray[np.uint8]) -> None:
        site, mpp = self.slide.appearance, self.slide.mpp
        rows = np.arange(top - 1, top + block.shape[0] + 1)  # one pixel more all around, for the blur
        columns = np.arange(left - 1, left + block.shape[1] + 1)
        y, x = (rows + 0.5) * mpp, (columns + 0.5) * mpp
        grain = np.take(np.take(_grain(), rows[1:-1] % 509, axis=0), columns[1:-1] % 509, axis=1)
        grain = grain * np.float32(site.grain) + np.float32(0.5)  # 0.5: truncation then rounds
        planes = _on_lattice(self._dye, _FINE_UM, y, x) if self._touches(y, x) else None
        if planes is not None:
            shown, rank = (_at(swatch, y, x) for swatch in _round_nuclei(self._nuclei_spacing_um))
            planes[0] += shown * (rank < planes[3])
        for channel in range(3):
            if planes is None:
                light: Array = np.full(grain.shape, site.white_rgb[channel], np.float32)
            else:
                light = planes[0] * np.float32(self._dyes[0, channel] * -math.log(10))
                light += planes[1] * np.float32(self._dyes[1, channel] * -math.log(10))
                light += planes[2] * np.float32(self._dyes[2, channel] * -math.log(10))
                np.exp(light, out=light)
                light *= np.float32(site.white_rgb[channel])
                light = _blurred(light, site.blur)
            light += grain
            block[..., channel] = np.clip(light, 0, 255, out=light)

    def _touches(self, y: NDArray[np.float64], x: NDArray[np.float64]) -> bool:
        """Whether the rectangle can hold tissue; looked up on a few points with room to spare."""
        probe_y, probe_x = np.linspace(y[0], y[-1], 5), np.linspace(x[0], x[-1], 5)
        reach = math.hypot(probe_y[1] - probe_y[0], probe_x[1] - probe_x[0])
        return bool(self._polar(probe_y, probe_x)[0].max() > -(2 * reach + 40))

    def truth(self) -> dict[str, NDArray[np.float16]]:
        """What is where, on cells of 64 micrometres from the upper-left corner.

        Returns:
            ``collagen_fraction`` (pathological alone), ``lesion_fraction`` and ``tissue_fraction``
            (the section, its airspaces included): shares of each cell's area, 0..1,
            ``[rows, columns] float16``.
        """
        rows, columns = (math.ceil(extent / TRUTH_CELL_UM) for extent in self._extent_um)
        step = TRUTH_CELL_UM / 4
        x = (np.arange(columns * 4) + 0.5) * step
        found = np.zeros((3, rows, columns), np.float16)
        for row in range(rows):
            y = (row * 4 + np.arange(4) + 0.5) * step
            regions = self._regions(y, x)
            if regions is not None:
                fields = np.stack([regions.fibrotic, regions.lesion, regions.section])
                found[:, row] = fields.reshape(3, 4, columns, 4).mean(axis=(1, 3))
        return dict(zip(("collagen_fraction", "lesion_fraction", "tissue_fraction"), found, strict=True))


def _at(swatch: Array, y: NDArray[np.float64], x: NDArray[np.float64]) -> Array:
    """A periodic swatch at the pixels nearest to rows ``y`` and columns ``x``."""
    scale = len(swatch) / _PERIOD_UM
    row, column = (np.floor(c * scale).astype(np.intp) % len(swatch) for c in (y, x))
    return np.take(np.take(swatch, row, axis=0), column, axis=1)


def _blurred(image: Array, weight: float) -> Array:
    """A three-pixel blur along each axis; one pixel is lost on every side."""
    centre, side = np.float32(1 - 2 * weight), np.float32(weight)
    tall = image[:, 1:-1] * centre + (image[:, :-2] + image[:, 2:]) * side
    blurred: Array = tall[1:-1] * centre + (tall[:-2] + tall[2:]) * side
    return blurred


# --------------------------------------------------------------------------------------------------
# One slide on disk.


@dataclass(frozen=True)
class ColourSummary:
    """What colour and area alone say of a slide: the baseline that must not solve the grading.

    Attributes:
        mean_rgb: mean colour of what is stained, 0..255.
        stained_share: share of the slide that is stained, 0..1.
    """

    mean_rgb: tuple[float, float, float]
    stained_share: float


def write_slide(slide: SyntheticSlide, slide_path: Path, truth_path: Path) -> ColourSummary:
    """Draws a slide band by band into a tiled JPEG pyramid, and its truth beside it.

    Level 0 streams straight into the file; the coarser levels, each a quarter as wide as the last,
    wait in a temporary file. Memory is that of a band of 512 rows. Equal slides give equal bytes.

    Args:
        slide: what is drawn.
        slide_path: the TIFF to write.
        truth_path: the ``.npz`` to write: the arrays of :meth:`LungSection.truth` and ``cell_um``.
    """
    import tifffile

    section = LungSection(slide)
    width, height = slide.size_px
    quality = slide.appearance.jpeg_quality
    colour = _ColourSum(slide.appearance.white_rgb)
    levels: list[_CoarseLevel] = []
    with tempfile.TemporaryFile() as spool:
        size = (width // _LEVEL_FACTOR, height // _LEVEL_FACTOR)
        while min(size) >= 128:
            levels.append(_CoarseLevel(size, quality, spool))
            size = (size[0] // _LEVEL_FACTOR, size[1] // _LEVEL_FACTOR)

        def finest() -> Iterator[bytes]:
            for top in range(0, height, _BLOCK_PX):
                band = section.draw((0, top), (width, min(_BLOCK_PX, height - top)))
                colour.add(band)
                rows = band
                for level in levels:
                    rows = level.push(rows)
                yield from _jpeg_tiles(band, quality)

        with tifffile.TiffWriter(slide_path, bigtiff=width * height > 1 << 31) as file:
            for number in range(len(levels) + 1):
                level_size = levels[number - 1].size_px if number else slide.size_px
                spacing_um = slide.mpp * _LEVEL_FACTOR**number
                file.write(
                    levels[number - 1].tiles() if number else finest(),
                    shape=(level_size[1], level_size[0], 3),
                    dtype=np.uint8,
                    tile=(_TILE_PX, _TILE_PX),
                    photometric="ycbcr",
                    compression="jpeg",
                    subsampling=(2, 2),
                    subfiletype=1 if number else 0,
                    resolution=(1e4 / spacing_um, 1e4 / spacing_um),
                    resolutionunit="CENTIMETER",
                    software="slidetl",
                    metadata=None,  # no description: nothing in the file may tell the grade
                )
    np.savez_compressed(truth_path, cell_um=np.float64(TRUTH_CELL_UM), **section.truth())
    return colour.summary(width * height)


def _jpeg_tiles(rows: NDArray[np.uint8], quality: int) -> Iterator[bytes]:
    """The JPEG tiles of whole rows of pixels, row by row; the last ones are filled by their edge."""
    import imagecodecs

    padding = [(0, -rows.shape[0] % _TILE_PX), (0, -rows.shape[1] % _TILE_PX), (0, 0)]
    padded = np.pad(rows, padding, mode="edge")
    for top in range(0, padded.shape[0], _TILE_PX):
        for left in range(0, padded.shape[1], _TILE_PX):
            tile = np.ascontiguousarray(padded[top : top + _TILE_PX, left : left + _TILE_PX])
            # Everything that has a default is stated, so that another version gives the same bytes.
            yield imagecodecs.jpeg8_encode(
                tile, quality, colorspace="rgb", outcolorspace="ycbcr", subsampling="420", optimize=False
            )


class _CoarseLevel:
    """A reduced level that grows by rows; its encoded tiles wait in a shared spool file."""

    def __init__(self, size_px: tuple[int, int], quality: int, spool: BinaryIO) -> None:
        self.size_px = size_px
        self._quality = quality
        self._spool = spool
        self._unreduced: NDArray[np.uint8] | None = None
        self._unencoded = np.empty((0, size_px[0], 3), np.uint8)
        self._places: list[tuple[int, int]] = []

    def push(self, finer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Takes the next rows of the finer level and returns the rows of this one that they complete."""
        if self._unreduced is not None:
            finer = np.concatenate([self._unreduced, finer])
        count, width = len(finer) // _LEVEL_FACTOR, self.size_px[0]
        self._unreduced = finer[count * _LEVEL_FACTOR :]
        whole = finer[: count * _LEVEL_FACTOR, : width * _LEVEL_FACTOR]
        total = np.zeros((count, width, 3), np.uint16)
        for row in range(_LEVEL_FACTOR):
            for column in range(_LEVEL_FACTOR):
                total += whole[row::_LEVEL_FACTOR, column::_LEVEL_FACTOR]
        area = _LEVEL_FACTOR**2
        rows = ((total + area // 2) // area).astype(np.uint8)
        self._unencoded = np.concatenate([self._unencoded, rows])
        self._encode(len(self._unencoded) // _TILE_PX * _TILE_PX)
        return rows

    def _encode(self, count: int) -> None:
        for tile in _jpeg_tiles(self._unencoded[:count], self._quality):
            self._places.append((self._spool.tell(), len(tile)))
            self._spool.write(tile)
        self._unencoded = self._unencoded[count:]

    def tiles(self) -> Iterator[bytes]:
        """All tiles in order, once every row has been pushed."""
        self._spool.seek(0, 2)
        self._encode(len(self._unencoded))
        for offset, length in self._places:
            self._spool.seek(offset)
            yield self._spool.read(length)


class _ColourSum:
    """Sums the colour of what is visibly darker than glass, over bands."""

    def __init__(self, white_rgb: tuple[float, float, float]) -> None:
        self._darker_than = np.floor(np.array(white_rgb) - 24).astype(np.uint8)
        self._pixels = 0
        self._rgb = np.zeros(3)

    def add(self, band: NDArray[np.uint8]) -> None:
        stained = np.zeros(band.shape[:2], bool)
        for channel in range(3):
            stained |= band[..., channel] < self._darker_than[channel]
        self._pixels += int(stained.sum())
        self._rgb += [float(band[..., channel][stained].sum(dtype=np.float64)) for channel in range(3)]

    def summary(self, slide_pixels: int) -> ColourSummary:
        red, green, blue = (self._rgb / max(1, self._pixels)).tolist()
        return ColourSummary((red, green, blue), self._pixels / slide_pixels)


# --------------------------------------------------------------------------------------------------
# A cohort.


@dataclass(frozen=True)
class CohortSlide:
    """A slide with its row of the manifest.

    Attributes:
        slide_id: names its files.
        patient_id: all slides of a patient come from one site and differ by at most one grade.
        site: where it was stained and scanned.
        readers: grades 0 to 4 that two noisy readers gave it.
        slide: how it is drawn; ``slide.grade`` is the truth.
    """

    slide_id: str
    patient_id: str
    site: str
    readers: tuple[int, int]
    slide: SyntheticSlide


@dataclass(frozen=True)
class SyntheticCohort:
    """Slides of known grade from several patients and sites.

    Attributes:
        slides: how many.
        patients: of how many patients, at most ``slides``.
        sites: from how many sites, at most ``patients``.
        size_px: width and height of each slide, pixels of level 0; at least 512.
        mpp: micrometres per pixel of level 0, 0.1 to 8.
        stain: ``he``, ``trichrome`` or ``sirius``.
        seed: of everything.
        reader_sd: standard deviation of each reader's error, grades.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    slides: int = 60
    patients: int = 48
    sites: int = 3
    size_px: int = 4096
    mpp: float = 0.5
    stain: str = "he"
    seed: int = 0
    reader_sd: float = 0.4

    def __post_init__(self) -> None:
        if self.slides < 1:
            raise UsageError(f"a cohort needs at least 1 slide, not {self.slides}")
        if not 1 <= self.patients <= self.slides:
            raise UsageError(
                f"{self.patients} patients need at least as many slides, and there must be at least 1 "
                f"patient; there are {self.slides} slides"
            )
        if not 1 <= self.sites <= self.patients:
            raise UsageError(
                f"{self.sites} sites need at least as many patients, and there must be at least 1 site; "
                f"there are {self.patients} patients"
            )
        if self.seed < 0:
            raise UsageError(f"seed must not be negative, and is {self.seed}")
        if not (math.isfinite(self.reader_sd) and self.reader_sd >= 0):
            raise UsageError(f"reader sd must be a number of grades from 0, not {self.reader_sd}")
        # The rest is what a slide checks; better now than in the middle of the work.
        SyntheticSlide(0.0, 0, SiteAppearance.of(0, 0), self.stain, (self.size_px, self.size_px), self.mpp)

    def plan(self) -> list[CohortSlide]:
        """The slides, in the order of the manifest; a pure function of the cohort's values.

        Grades are as balanced as the patients allow, overall and at each site.
        """
        rng = np.random.default_rng([self.seed, 0xC0407])
        appearances = [SiteAppearance.of(site, self.seed) for site in range(self.sites)]
        # Walking grades and sites in step visits every pair, once the shift has undone common factors.
        cycle = math.lcm(GRADES, self.sites)
        pairs = [(k % GRADES, (k + k // cycle) % self.sites) for k in range(self.patients)]
        patients = [pairs[k] for k in rng.permutation(self.patients)]
        leaning = rng.uniform(-1, 1, self.patients)  # a patient's place within the grade
        neighbour = [
            g + (1 if g == 0 else -1 if g == GRADES - 1 else int(rng.choice([-1, 1]))) for g, _ in patients
        ]
        counts = np.bincount([grade for grade, _ in patients], minlength=GRADES)
        grades: list[tuple[int, int]] = [(k, grade) for k, (grade, _) in enumerate(patients)]
        for extra in range(self.slides - self.patients):
            k = extra % self.patients
            own, other = patients[k][0], neighbour[k]
            grade = other if counts[other] < counts[own] or (counts[other] == counts[own] and k % 2) else own
            counts[grade] += 1
            grades.append((k, grade))
        digits = len(str(self.slides - 1))
        planned = []
        for number, (k, grade) in enumerate(sorted(grades, key=lambda pair: pair[0])):
            within = 0.2 * leaning[k] + rng.uniform(-0.15, 0.15)  # stays clear of the borders between grades
            severity = max(0.0, grade + within)
            read = np.clip(np.rint(severity + rng.normal(0, self.reader_sd, 2)), 0, GRADES - 1).astype(int)
            site = patients[k][1]
            slide = SyntheticSlide(
                fibrotic_share=float(severity * SHARE_PER_GRADE),
                seed=int(rng.integers(1 << 32)),
                appearance=appearances[site],
                stain=self.stain,
                size_px=(self.size_px, self.size_px),
                mpp=self.mpp,
            )
            planned.append(
                CohortSlide(
                    slide_id=f"slide-{number:0{digits}d}",
                    patient_id=f"patient-{k:0{digits}d}",
                    site=f"site-{site}",
                    readers=(int(read[0]), int(read[1])),
                    slide=slide,
                )
            )
        return planned


def write_cohort(
    cohort: SyntheticCohort,
    out: Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ColourSummary]:
    """Writes ``slides/*.tiff``, ``truth/*.npz`` and, last, ``manifest.csv`` into a folder.

    Args:
        cohort: what to write.
        out: the folder; made where there is none.
        workers: processes that draw; the bytes do not depend on them.
        overwrite: whether to replace an earlier cohort in ``out``.
        progress: called with the number of slides done and of all slides.

    Returns:
        Colour and stained area of each slide, in the order of the manifest and of
        :meth:`SyntheticCohort.plan`.

    Raises:
        UsageError: ``out`` is not empty and ``overwrite`` is off, or ``workers`` is less than 1.
    """
    if workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; a folder is needed for the slides")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UsageError(f"{out} is not empty; name another folder, or allow overwriting")
        for stale in [out / "manifest.csv", *out.glob("slides/slide-*.tiff"), *out.glob("truth/slide-*.npz")]:
            stale.unlink(missing_ok=True)
    (out / "slides").mkdir(parents=True, exist_ok=True)
    (out / "truth").mkdir(exist_ok=True)
    planned = cohort.plan()
    jobs = [
        (entry.slide, out / "slides" / f"{entry.slide_id}.tiff", out / "truth" / f"{entry.slide_id}.npz")
        for entry in planned
    ]
    summaries: dict[int, ColourSummary] = {}
    if workers == 1:
        for number, job in enumerate(jobs):
            summaries[number] = write_slide(*job)
            progress(len(summaries), len(jobs))
    else:
        # Fresh processes: forking one that holds threads (as OpenMP's or a progress bar's) may hang.
        with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
            futures = {pool.submit(write_slide, *job): number for number, job in enumerate(jobs)}
            for future in as_completed(futures):
                summaries[futures[future]] = future.result()
                progress(len(summaries), len(jobs))
    _write_manifest(planned, out / "manifest.csv")
    return [summaries[number] for number in range(len(jobs))]


def _write_manifest(planned: list[CohortSlide], path: Path) -> None:
    columns = "slide_id path patient_id grade site scanner stain grade_reader1 grade_reader2".split()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for entry in planned:
            writer.writerow(
                [
                    entry.slide_id,
                    f"slides/{entry.slide_id}.tiff",
                    entry.patient_id,
                    entry.slide.grade,
                    entry.site,
                    entry.site.replace("site", "scanner"),
                    entry.slide.stain,
                    *entry.readers,
                ]
            )
