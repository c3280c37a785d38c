"""Draws seeded lung slides of known grade, per slide and per place.

A :class:`SyntheticSlide` is a pure function of physical coordinates, so any rectangle of it can be drawn
alone and a slide of any size streams to disk in bands. ``docs/design/synthetic-slides.md`` describes the
drawing, the signs of the grade and the signs to be avoided; in one sentence: every lesion looks alike in
size, colour, density and loss of alveoli, and only the oriented fibres of the fibrotic ones (against the
round cells of the inflamed ones) show the fibrotic share of the section.

Coordinates are micrometres from the slide's upper-left corner; amounts of dye are optical densities.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import UsageError

GRADES = 5
SHARE_PER_GRADE = 0.12
"""By default, grade k stands for a fibrotic share of the section around k times this."""

TRUTH_CELL_UM = 64.0
"""Side of a cell of the truth arrays, micrometres."""

Array = NDArray[np.floating[Any]]  # float32 but for coordinates

_BLOCK_PX = 256  # drawn at once: larger or smaller blocks take half as long again (caches, overheads)
_PLAN_UM = 32.0  # greatest spacing of the fields over the whole slide
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


def grade_of_share(fibrotic_share: float, share_per_grade: float = SHARE_PER_GRADE) -> int:
    """Returns the grade, 0 to 4, of a slide with this fibrotic share of its section, 0..1.

    The borders lie halfway between the multiples of ``share_per_grade`` (0..1): by default at 6, 18, 30 and
    42 per cent.
    """
    return min(GRADES - 1, math.floor(fibrotic_share / share_per_grade + 0.5))


@dataclass(frozen=True)
class SiteAppearance:
    """The effect of one hospital's laboratory and scanner on every one of its slides.

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
        """Draws the appearance of site number ``site`` (from 0) under ``seed``."""
        rng = np.random.default_rng([seed, 0x517E, site])
        return cls(
            white_rgb=_triple(243.0 + rng.uniform(-6, 6, 3)),
            dye_gain=_triple(np.exp(rng.normal(0, 0.10, 3))),
            hue_shift=_triple(1 + rng.normal(0, 0.06, 3)),
            blur=float(rng.uniform(0.03, 0.15)),
            grain=float(rng.uniform(0.8, 2.0)),
            jpeg_quality=int(rng.integers(84, 94)),
        )


def _triple(values: Array) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


@dataclass(frozen=True)
class SyntheticSlide:
    """All values that determine the pixels of one slide.

    Attributes:
        fibrotic_share: share of the section's area, 0..0.55.
        seed: of everything about the slide except its site.
        appearance: of the site of staining and scanning.
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


# Random fields: functions of (seed, coordinates) alone.


def _ramp(distance_um: Array, width_um: float) -> Array:
    """Draws an antialiased edge: 0 outside, 1 inside distance 0, linear over ``width_um``."""
    return np.asarray(np.clip(distance_um * (1 / width_um) + 0.5, 0, 1))


def _hash01(seed: int, row: NDArray[np.int64], column: NDArray[np.int64]) -> Array:
    """Hashes integer lattice points (arrays that broadcast) to uniform numbers in [0, 1)."""
    value = row.astype(np.uint32) * np.uint32(0x9E3779B1) ^ column.astype(np.uint32) * np.uint32(0x85EBCA77)
    value = value ^ np.uint32(seed & 0xFFFFFFFF)
    for factor in (0x7FEB352D, 0x846CA68B):  # two rounds of a multiply-xorshift mixer
        value = (value ^ (value >> np.uint32(16))) * np.uint32(factor)
    value = value ^ (value >> np.uint32(15))
    return (value >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def _interpolate(nodes: Array, row: Array, column: Array) -> Array:
    """Interpolates ``nodes [..., R, C]`` bilinearly at fractional rows ``[h]`` and columns ``[w]``."""
    top = np.clip(row.astype(np.intp), 0, nodes.shape[-2] - 2)
    left = np.clip(column.astype(np.intp), 0, nodes.shape[-1] - 2)
    down = np.clip(row - top, 0, 1).astype(np.float32)[:, None]
    right = np.clip(column - left, 0, 1).astype(np.float32)
    nodes = nodes[..., left[0] : left[-1] + 2]  # both ascend, and nodes may span a whole slide
    left = left - left[0]
    upper = np.take(nodes, top, axis=-2)
    strip = upper + (np.take(nodes, top + 1, axis=-2) - upper) * down
    slope = np.diff(strip, axis=-1)
    values: Array = np.take(slope, left, axis=-1)
    values *= right
    values += np.take(strip, left, axis=-1)
    return values


def _on_lattice(field: Callable[[Array, Array], Array], step_um: float, y: Array, x: Array) -> Array:
    """Draws ``field(y, x)`` on a lattice of ``step_um``, fixed to the slide, and interpolates."""
    if y[1] - y[0] >= step_um:
        return field(y, x)
    first_row, first_column = math.floor(y[0] / step_um), math.floor(x[0] / step_um)
    rows = np.arange(first_row, math.floor(y[-1] / step_um) + 2)
    columns = np.arange(first_column, math.floor(x[-1] / step_um) + 2)
    return _interpolate(
        field(rows * step_um, columns * step_um), y / step_um - first_row, x / step_um - first_column
    )


def _noise(seed: int, wavelength_um: float, y: Array, x: Array) -> Array:
    """Draws smooth noise in [-1, 1] of about the given wavelength, ``[len(y), len(x)]``."""
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
    """Measures the distance to the wall between the cells of a jittered lattice, micrometres.

    The difference of the distances to the two nearest cell centres (Worley 1996, F2 - F1), halved.
    ``y`` and ``x`` are two-dimensional, for warping.
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
    return (np.sqrt(second) - np.sqrt(nearest)) * 0.5


# Swatches: periodic textures made once per process and sampled anywhere.


def _cells(
    rng: np.random.Generator, spacing_um: float, pitch_um: tuple[float, float], radius_um: tuple[float, float]
) -> tuple[Array, Array]:
    """Scatters elliptical nuclei, periodically: their coverage of each pixel, and their rank, both 0..1.

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
    """Finds the rank of the nuclei to show, all below it, to cover the given share of the area."""
    edges = np.linspace(0, 1, 65)
    covered, _ = np.histogram(rank, bins=edges, weights=shown)
    return float(np.interp(coverage, np.concatenate([[0], np.cumsum(covered)]) / shown.size, edges))


@functools.lru_cache(maxsize=2)
def _round_nuclei(spacing_um: float) -> tuple[Array, Array]:
    """Draws coverage and rank of round nuclei, about 6 micrometres wide."""
    return _cells(np.random.default_rng(11), spacing_um, (9.5, 9.5), (3.1, 3.1))


@functools.lru_cache(maxsize=1)
def _matrix_swatch() -> Array:
    """Draws the textures of the lesions' matrix at 2 micrometres, ``[size * size, 4]``, fibres along x.

    Channels: wavy fibres and isotropic clumps, both uniform in [0, 1] (so that their mean colours
    agree in every stain), coverage and rank of spindle nuclei.
    """
    rng = np.random.default_rng(12)
    size = round(_PERIOD_UM / _FINE_UM)
    frequency = np.fft.fftfreq(size, _FINE_UM)
    along, across = frequency[None, :], frequency[:, None]
    radius = np.hypot(along, across)

    def filtered(gain: Array) -> Array:
        image = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * gain).real
        return np.asarray(image / image.std())

    def band(value: Array, centre_um: float) -> Array:
        return np.asarray(np.exp(-(((np.abs(value) - 1 / centre_um) * centre_um * 2.5) ** 2)))

    fibres, clumps = np.zeros((2, size, size))
    for weight, width_um, length_um in ((1.0, 24.0, 160.0), (0.7, 12.0, 90.0)):
        fibres += weight * filtered(band(across, width_um) * np.exp(-((along * length_um) ** 2)))
        clumps += weight * filtered(band(radius, width_um))
    shown, rank = _cells(rng, _FINE_UM, (8.0, 22.0), (2.2, 7.5))
    # A wave of about 90 micrometres bends the fibres and the nuclei among them alike.
    wave = filtered(np.exp(-(((along * 90) - 1) ** 2) * 4 - (across * 120) ** 2)) * 5.0
    row = (np.arange(size)[:, None] + np.round(wave / _FINE_UM).astype(int)) % size
    column = np.arange(size)[None, :]

    def uniform(image: Array) -> Array:
        order = np.empty(image.size)
        order[np.argsort(image, axis=None, kind="stable")] = (np.arange(image.size) + 0.5) / image.size
        return order.reshape(image.shape)

    planes = [uniform(fibres)[row, column], uniform(clumps), shown[row, column], rank[row, column]]
    return np.stack(planes, axis=-1).reshape(-1, len(planes)).astype(np.float32)


def _sample_matrix(along_um: Array, across_um: Array) -> Array:
    """Samples the matrix swatch at fibre coordinates of any shape: ``[..., 4]``."""
    size = round(_PERIOD_UM / _FINE_UM)
    # The offset keeps the coordinates positive: truncation then rounds down.
    column = (along_um * (1 / _FINE_UM) + 64 * size).astype(np.int32) % size
    row = (across_um * (1 / _FINE_UM) + 64 * size).astype(np.int32) % size
    return np.take(_matrix_swatch(), row * size + column, axis=0)


@functools.lru_cache(maxsize=1)
def _grain() -> Array:
    return np.random.default_rng(13).standard_normal((509, 509)).astype(np.float32)


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

    def within(self, y: Array, x: Array) -> tuple[slice, slice] | None:
        """Finds the rows and columns within its reach, if any."""
        if abs(2 * self.y - y[0] - y[-1]) > y[-1] - y[0] + 2 * self.reach:  # cheap, and true of most
            return None
        rows = slice(*np.searchsorted(y, [self.y - self.reach, self.y + self.reach]).tolist())
        columns = slice(*np.searchsorted(x, [self.x - self.reach, self.x + self.reach]).tolist())
        return (rows, columns) if rows.stop > rows.start and columns.stop > columns.start else None

    def polar(self, y: Array, x: Array) -> tuple[Array, Array]:
        """Computes the distance from its middle, stretched to make its cut oval, and the angle around it."""
        dy, dx = (y[:, None] - self.y).astype(np.float32), (x[None, :] - self.x).astype(np.float32)
        angle = np.arctan2(dy, dx)
        stretch = 1.12 + 0.12 * np.cos(2 * (angle - self.slant))
        return np.hypot(dy, dx) * stretch, angle


class TissueTruth(NamedTuple):
    """Shares of the area of each cell of 64 micrometres, 0..1, ``[rows, columns] float16``.

    Attributes:
        collagen_fraction: fibrotic tissue; the normal collagen of vessels, bronchi and pleura is not in it.
        lesion_fraction: fibrotic or inflamed tissue.
        tissue_fraction: the section, its airspaces included.
    """

    collagen_fraction: Array
    lesion_fraction: Array
    tissue_fraction: Array


@dataclass(frozen=True)
class _Regions:
    """The tissue of a rectangle, each ``[h, w]`` in 0..1."""

    section: Array
    lesion: Array
    fibrotic: Array
    cystic: Array
    depth: Array  # 0 at a lesion's border, 1 at its core
    in_pleura: NDArray[np.bool_]
    edge_um: Array  # distance from the section's outline, positive inside


class LungSection:
    """A slide ready to be drawn, in any rectangle and any order."""

    def __init__(self, slide: SyntheticSlide) -> None:
        self.slide = slide
        rng = np.random.default_rng([slide.seed, 0x1046])
        self._salt = int(rng.integers(1 << 32))
        self._extent_um = (slide.size_px[1] * slide.mpp, slide.size_px[0] * slide.mpp)
        self._plan_um = min(_PLAN_UM, min(self._extent_um) / 64)

        # Drawn independently of the fibrotic share, all before the share is first used.
        gains = np.exp(rng.normal(0, [0.14, 0.14, 0.14])) * np.exp(rng.normal(0, 0.08))
        self._log_light = (
            np.array(_DYES[slide.stain])
            * (np.array(slide.appearance.dye_gain) * gains)[:, None]
            * np.array(slide.appearance.hue_shift)
            * -math.log(10)  # so that the sum of dyes goes straight into exp()
        )
        self._alveolus_um = float(rng.uniform(170, 250))  # inflation
        self._septum_um = float(rng.uniform(5.0, 8.0))
        self._cellularity = float(np.exp(rng.normal(0, 0.25)))
        self._oedema = float(rng.uniform(-0.6, 0.5))
        self._atelectasis = float(rng.uniform(-0.6, 0.3))
        self._cystic = float(rng.uniform(0.15, 0.40))  # honeycombed share of the lesions
        # Round cells and spindle cells cover the same share of a lesion, so that colour is no hint.
        coverage = float(rng.uniform(0.14, 0.20))
        self._round_rank = _rank_covering(coverage, *_round_nuclei(self._nuclei_spacing_um))
        self._spindle_rank = _rank_covering(coverage, *np.moveaxis(_matrix_swatch()[:, 2:], -1, 0))
        self._hyalinity = float(rng.uniform(0.80, 1.08))  # collagen dye taken up by an inflamed lesion
        self._fibre_angle = float(rng.uniform(0, math.pi))
        self._lesion_share = float(rng.uniform(0.58, 0.68))
        radius, ripple = float(rng.uniform(0.80, 0.88)), rng.normal(0, 0.035, 6)
        self._outline = (radius, ripple, rng.uniform(0, 2 * math.pi, 6))
        collagen_load = float(np.exp(rng.normal(0, 0.35)))
        self._pleura_um = min(55 * collagen_load, min(self._extent_um) / 16)
        self._pleura_angle = float(rng.uniform(-math.pi, math.pi))
        self._tubes = self._lay_tubes(rng, collagen_load)
        self._plan = self._lay_lesions()

    def _polar(self, y: Array, x: Array) -> tuple[Array, Array]:
        """Computes the distance from the outline (positive inside, um) and the angle around the centre."""
        half_y, half_x = self._extent_um[0] / 2, self._extent_um[1] / 2
        angle = self._bearing(y, x)
        radius, ripple, phase = self._outline
        border = radius + sum(
            ripple[k] * np.cos((k + 1) * angle + phase[k]) / math.sqrt(k + 1) for k in range(len(ripple))
        )
        outward = np.hypot((y / half_y - 1)[:, None], (x / half_x - 1)[None, :])
        distance = (np.minimum(border, 0.96) - outward) * min(half_y, half_x)
        return distance.astype(np.float32), angle

    def _bearing(self, y: Array, x: Array) -> Array:
        """Computes the angle around the slide's centre, radians."""
        dy, dx = 2 * y / self._extent_um[0] - 1, 2 * x / self._extent_um[1] - 1
        return np.asarray(np.arctan2(dy.astype(np.float32)[:, None], dx.astype(np.float32)[None, :]))

    def _lay_tubes(self, rng: np.random.Generator, collagen_load: float) -> list[_Tube]:
        height, width = self._extent_um
        tubes: list[_Tube] = []
        taken = np.empty((0, 3))  # y, x, reach
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
                gaps = np.hypot(taken[:, 0] - y, taken[:, 1] - x) - taken[:, 2]
                if (gaps > tube.reach).all() and distance[0, 0] > tube.reach + self._pleura_um:
                    tubes.append(tube)
                    taken = np.vstack([taken, [y, x, tube.reach]])
        return tubes

    def _lay_lesions(self) -> Array:
        """Draws fields over the whole slide, ``[5, rows, columns]`` at ``_plan_um``.

        Ranks of the lesions, of the fibrotic among them, and of the cystic among them: positive
        inside, 0 at the border; a rank is a share of area, so the shares come out as asked. Then the
        distance from the outline, micrometres, and the cosine of the angle from the pleura's middle.
        """
        rows = np.arange(math.ceil(self._extent_um[0] / self._plan_um) + 2) * self._plan_um
        columns = np.arange(math.ceil(self._extent_um[1] / self._plan_um) + 2) * self._plan_um
        distance, angle = self._polar(rows, columns)
        in_section = distance > 0
        free = in_section & ~self._in_anatomy(rows, columns, distance, np.cos(angle - self._pleura_angle))
        if not free.any():
            free = in_section

        def focal(salt: int, *octaves_um: float) -> Array:
            total = np.zeros(free.shape, np.float32)
            for k, wavelength in enumerate(octaves_um):
                total += _noise(self._salt + salt + k, wavelength, rows, columns) * 0.6**k
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

    def _in_anatomy(self, y: Array, x: Array, distance: Array, pleural: Array) -> NDArray[np.bool_]:
        inside = (distance < self._pleura_um) & (pleural > _PLEURA_COSINE)
        for tube in self._tubes:
            if part := tube.within(y, x):
                inside[part] |= tube.polar(y[part[0]], x[part[1]])[0] < tube.reach
        return inside

    def _regions(self, y: Array, x: Array) -> _Regions | None:
        """Finds the tissue at rows ``y`` and columns ``x``; None if there is only glass."""
        lesion_rank, fibrotic_rank, cystic_rank, distance, pleural = _interpolate(
            self._plan, y / self._plan_um, x / self._plan_um
        )
        if distance.max() < -20:
            return None
        distance = distance + 14 * _noise(self._salt + 1, 110, y, x)
        section = _ramp(distance, max(_FINE_UM, float(y[1] - y[0])))
        anatomy = self._in_anatomy(y, x, distance, pleural).astype(np.float32) * section
        ragged = _noise(self._salt + 2, 140, y, x)
        free = section - anatomy
        lesion = np.clip((lesion_rank + 0.05 * ragged) * 25 + 0.5, 0, 1) * free
        fibrotic = np.clip((fibrotic_rank - 0.03 * ragged) * 40 + 0.5, 0, 1) * lesion
        if self.slide.fibrotic_share == 0:
            fibrotic = np.zeros_like(fibrotic)
        cystic = np.clip(cystic_rank * 25 + 0.5, 0, 1) * lesion
        depth = np.clip(lesion_rank, 0, 1)
        in_pleura = (distance < self._pleura_um) & (pleural > _PLEURA_COSINE)
        return _Regions(section, lesion, fibrotic, cystic, depth, in_pleura, distance)

    def _alveoli(self, y: Array, x: Array) -> Array:
        """Measures distances to alveolar and to cyst walls (far the larger), ``[2, h, w]``, micrometres."""
        warp_y = y[:, None].astype(np.float32) + 30 * _noise(self._salt + 3, 260, y, x)
        warp_x = x[None, :].astype(np.float32) + 30 * _noise(self._salt + 4, 260, y, x)
        alveoli = _wall_distance(self._salt + 5, self._alveolus_um, warp_y, warp_x)
        return np.stack([alveoli, _wall_distance(self._salt + 6, 420, warp_y, warp_x)])

    def _fibre_coordinates(self, y: Array, x: Array) -> Array:
        """Computes coordinates along and across two interwoven sets of fibres, ``[2, h, w]``, micrometres."""
        swirl_y = y[:, None].astype(np.float32) + 80 * _noise(self._salt + 7, 640, y, x)
        swirl_x = x[None, :].astype(np.float32) + 80 * _noise(self._salt + 8, 640, y, x)
        layers = []
        for angle in (self._fibre_angle, self._fibre_angle + 1.2):
            sine, cosine = math.sin(angle), math.cos(angle)
            layers.append(np.stack([swirl_x * cosine + swirl_y * sine, swirl_y * cosine - swirl_x * sine]))
        return np.where(_noise(self._salt + 9, 420, y, x) > 0, layers[0], layers[1])

    def _dye(self, y: Array, x: Array) -> Array:
        """Computes amounts over rows ``y`` and columns ``x``, ``[4, h, w]``.

        Nuclear dye without round nuclei, cytoplasm dye, collagen dye, and the share of round nuclei to
        show (their rank).
        """
        regions = self._regions(y, x)
        if regions is None:
            return np.zeros((4, len(y), len(x)), np.float32)
        edge = max(_FINE_UM, float(y[1] - y[0]))
        section, lesion, fibrotic = regions.section, regions.lesion, regions.fibrotic
        inflamed = lesion - fibrotic
        texture = _sample_matrix(*self._fibre_coordinates(y, x))
        fibres, clumps, spindle, spindle_rank = np.moveaxis(texture, -1, 0)
        walls, cyst_walls = _on_lattice(self._alveoli, _ALVEOLI_UM, y, x)
        patchy = _noise(self._salt + 10, 500, y, x)

        # Architecture, the same for all kinds of lesions: septa thicken, then the airspaces are gone.
        collapse = np.clip(_noise(self._salt + 11, 900, y, x) + self._atelectasis, 0, 1)
        septum = self._septum_um * (1 + 2 * collapse + 5 * lesion * regions.depth)
        filled = np.clip((regions.depth - 0.12 + 0.10 * patchy) * 15, 0, 1) * lesion
        body = np.maximum(_ramp(septum - walls, edge), filled)
        body *= 1 - regions.cystic * _ramp(cyst_walls - (32 + 14 * patchy), edge)

        matrix_fibrotic = 0.75 + _FIBRE_CONTRAST * (fibres - 0.5)
        matrix_inflamed = 0.75 + _FIBRE_CONTRAST * (clumps - 0.5)
        hyaline = 0.85 * self._hyalinity
        collagen = fibrotic * matrix_fibrotic * 0.85 + inflamed * matrix_inflamed * hyaline
        matrix = fibrotic * matrix_fibrotic + inflamed * matrix_inflamed
        healthy = 1 - lesion
        cytoplasm = matrix - collagen + healthy * (0.62 + 0.3 * (clumps - 0.5))
        nuclear = fibrotic * spindle * (spindle_rank < self._spindle_rank)
        inflammation = self._cellularity * (0.25 + 0.15 * patchy)
        crowding = healthy * inflammation + inflamed * self._round_rank
        planes = np.stack([nuclear, cytoplasm, collagen, crowding])
        planes *= body * section
        oedema = np.clip(_noise(self._salt + 12, 1200, y, x) + self._oedema, 0, 1)
        planes[1] += 0.30 * oedema * (1 - body) * section
        self._draw_anatomy(planes, regions, y, x, edge)
        return planes

    @property
    def _nuclei_spacing_um(self) -> float:
        return min(max(self.slide.mpp, 0.5), 4.0)

    def _draw_anatomy(self, planes: Array, regions: _Regions, y: Array, x: Array, edge: float) -> None:
        """Draws vessels, bronchi and pleura with their normal collagen, over ``planes`` in place."""
        pleura = regions.in_pleura & (regions.edge_um > -edge)
        if pleura.any():
            angle = self._bearing(y, x)
            fibres = _sample_matrix(angle * (min(self._extent_um) / 2), regions.edge_um)[..., 0]
            planes[:, pleura] = 0
            planes[2] += pleura * regions.section * (0.6 + 0.6 * (fibres - 0.5))
            planes[3] += pleura * regions.section * 0.04
        for tube in self._tubes:
            part = tube.within(y, x)
            if part is None:
                continue
            radius, angle = tube.polar(y[part[0]], x[part[1]])
            outside = radius - tube.lumen
            fibres = _sample_matrix(angle * tube.lumen, outside)[..., 0]
            inside = radius < tube.reach
            wall = _ramp(outside, edge)
            lining = _ramp(tube.lining - outside, edge) * wall if tube.lining else np.zeros_like(wall)
            muscle_end = tube.lining + tube.muscle
            muscle = _ramp(muscle_end - outside, edge) * wall - lining
            collagen = wall - lining - muscle
            lumen = 1 - wall
            cytoplasm = 0.6 * lining + 0.9 * muscle + tube.blood * lumen
            nuclei = 0.40 * lining + 0.10 * muscle + 0.06 * collagen
            drawn = np.stack([0.25 * lining, cytoplasm, collagen * (0.75 + 0.6 * (fibres - 0.5)), nuclei])
            under = planes[(slice(None), *part)]
            under[...] = np.where(inside, drawn, under)

    def draw(self, origin_px: tuple[int, int], size_px: tuple[int, int]) -> NDArray[np.uint8]:
        """Draws a rectangle.

        Args:
            origin_px: upper-left corner ``(x, y)``, level-0 pixels.
            size_px: width and height, pixels.

        Returns:
            ``[height, width, 3] uint8`` RGB, as by the scanner before compression.
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
        grain = grain * site.grain + 0.5  # 0.5: truncation then rounds
        planes = _on_lattice(self._dye, _FINE_UM, y, x) if self._touches(y, x) else None
        if planes is not None:
            shown, rank = (_nearest(swatch, y, x) for swatch in _round_nuclei(self._nuclei_spacing_um))
            planes[0] += shown * (rank < planes[3])
        for channel in range(3):
            if planes is None:
                light: Array = np.full(grain.shape, site.white_rgb[channel], np.float32)
            else:
                nuclear, cytoplasm, collagen = self._log_light[:, channel].tolist()
                light = planes[0] * nuclear
                light += planes[1] * cytoplasm
                light += planes[2] * collagen
                np.exp(light, out=light)
                light *= np.float32(site.white_rgb[channel])
                light = _blurred(light, site.blur)
            light += grain
            block[..., channel] = np.clip(light, 0, 255, out=light)

    def _touches(self, y: Array, x: Array) -> bool:
        """Tells if the rectangle can hold tissue, from a few points with room to spare."""
        probe_y, probe_x = np.linspace(y[0], y[-1], 5), np.linspace(x[0], x[-1], 5)
        reach = math.hypot(probe_y[1] - probe_y[0], probe_x[1] - probe_x[0])
        return bool(self._polar(probe_y, probe_x)[0].max() > -(2 * reach + 40))

    def truth(self) -> TissueTruth:
        """Computes the truth; none of it depends on the slide's pixels or their spacing."""
        rows, columns = (math.ceil(extent / TRUTH_CELL_UM) for extent in self._extent_um)
        x = (np.arange(columns * 4) + 0.5) * (TRUTH_CELL_UM / 4)
        cells = np.zeros((3, rows, columns), np.float16)
        for row in range(rows):
            y = (row * 4 + np.arange(4) + 0.5) * (TRUTH_CELL_UM / 4)
            regions = self._regions(y, x)
            if regions is not None:
                fields = np.stack([regions.fibrotic, regions.lesion, regions.section])
                cells[:, row] = fields.reshape(3, 4, columns, 4).mean(axis=(1, 3))
        return TissueTruth(*cells)


def _nearest(swatch: Array, y: Array, x: Array) -> Array:
    """Samples a periodic swatch at the pixels nearest to rows ``y`` and columns ``x``."""
    scale = len(swatch) / _PERIOD_UM
    row, column = (np.floor(c * scale).astype(np.intp) % len(swatch) for c in (y, x))
    return np.asarray(np.take(np.take(swatch, row, axis=0), column, axis=1))


def _blurred(image: Array, weight: float) -> Array:
    """Blurs over three pixels along each axis; one pixel is lost on every side."""
    centre = 1 - 2 * weight
    tall = image[:, 1:-1] * centre + (image[:, :-2] + image[:, 2:]) * weight
    return np.asarray(tall[1:-1] * centre + (tall[:-2] + tall[2:]) * weight)
