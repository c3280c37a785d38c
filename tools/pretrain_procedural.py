"""Pre-trains the bundled backbone on images that are drawn, not photographed.

Every image shows one of ``len(CLASSES)`` kinds of texture, fractal or shape. Many kinds differ in one
graded property alone (orientation coherence, spatial frequency, density, regularity, the shape of the
element, the share of the frame that a texture covers), since those are what tells tissue architecture
apart. Colour is drawn independently of the kind, so it cannot give the label away.

The idea that labelled procedural images can replace photographs is Kataoka et al., "Pre-training without
Natural Images" (ACCV 2020), who classify iterated function systems; here fractals are one family of many
and the labels are named properties instead of random parameters.

    python tools/pretrain_procedural.py --output DIR             # draw, train, export; resumes what DIR holds
    python tools/pretrain_procedural.py --probe DIR --weights FILE  # linear probe on folders of images
    python tools/pretrain_procedural.py --sheet FILE.png         # one drawn image of every class
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

TOOL_VERSION = "1"
ARCHITECTURE = "mobilenetv3_small_050"
# timm's default for this architecture, so that nothing needs to treat these weights specially.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
IMAGE_SIZE_PX = 96
# Training sees random crops of this size. Objects that must be seen whole stay inside the part that every
# crop holds: the central 2 * 80 - 96 = 64 pixels.
CROP_SIZE_PX = 80
WHOLE_SIZE_PX = 2 * CROP_SIZE_PX - IMAGE_SIZE_PX
# Held-out images are numbered from here; training would need 2**40 drawn images to reach them.
HELDOUT_START = 2**40

Field = NDArray[np.floating[Any]]  # [size, size], 0..1: what is drawn before it gets colours
Image = NDArray[np.uint8]  # [size, size, 3], RGB
Draw = Callable[[np.random.Generator, int], Field]

# ---------------------------------------------------------------------------------------------------------
# Noise, the stuff of most textures
# ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _frequencies(size: int) -> tuple[Field, Field]:
    """Vertical and horizontal frequency of every coefficient of ``rfft2``, in cycles per pixel."""
    fy = np.fft.fftfreq(size).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(size).astype(np.float32)[None, :]
    return np.broadcast_to(fy, (size, fx.size)), np.broadcast_to(fx, (size, fx.size))


def _filtered_noise(rng: np.random.Generator, size: int, amplitude: NDArray[Any]) -> Field:
    """White noise with the given amplitude spectrum: zero mean, unit standard deviation."""
    spectrum = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32)) * amplitude
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, s=(size, size)).astype(np.float32)
    return noise / max(float(noise.std()), 1e-6)


def _power_noise(rng: np.random.Generator, size: int, exponent: float) -> Field:
    """Noise whose power falls as frequency to the minus ``exponent``."""
    fy, fx = _frequencies(size)
    return _filtered_noise(rng, size, (fx**2 + fy**2 + 0.25 / size**2) ** np.float32(-exponent / 4))


def _band_noise(rng: np.random.Generator, size: int, period_px: float) -> Field:
    """Noise of one spatial period, without a direction."""
    fy, fx = _frequencies(size)
    radius = np.sqrt(fx**2 + fy**2) + np.float32(1e-6)
    amplitude = np.exp(-0.5 * (np.log(radius * period_px) / 0.22) ** 2)
    return _filtered_noise(rng, size, amplitude)


def _unit(values: NDArray[Any]) -> Field:
    """Zero-mean, unit-deviation values as a field: two and a half deviations span 0..1."""
    return np.clip(0.5 + 0.2 * values, 0, 1).astype(np.float32)


def _step(values: NDArray[Any], sharpness: float) -> Field:
    """A soft threshold at 0."""
    return np.clip(0.5 + sharpness * values, 0, 1).astype(np.float32)


def _plane(rng: np.random.Generator, size: int) -> tuple[Field, Field]:
    """Coordinates in pixels in a frame that is turned and shifted at random."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32) - np.float32(size / 2)
    u = x * math.cos(angle) + y * math.sin(angle) + rng.uniform(-size, size)
    v = y * math.cos(angle) - x * math.sin(angle) + rng.uniform(-size, size)
    return u.astype(np.float32), v.astype(np.float32)


def _polar(rng: np.random.Generator, size: int) -> tuple[Field, Field]:
    """Radius in pixels and angle about a centre near the middle."""
    y, x = np.mgrid[:size, :size].astype(np.float32) - np.float32(size / 2)
    x += np.float32(rng.uniform(-size / 6, size / 6))
    y += np.float32(rng.uniform(-size / 6, size / 6))
    return np.hypot(x, y), np.arctan2(y, x)


def power_noise(rng: np.random.Generator, size: int, exponent: float) -> Field:
    return _unit(_power_noise(rng, size, exponent + rng.uniform(-0.2, 0.2)))


def threshold_noise(rng: np.random.Generator, size: int, period_px: float, level: float) -> Field:
    """Labyrinths (level 0) and spots (level about 1), as reaction and diffusion leave them."""
    noise = _band_noise(rng, size, period_px * rng.uniform(0.85, 1.18))
    return _step(noise - level, rng.uniform(1.5, 5))


def coast(rng: np.random.Generator, size: int, exponent: float) -> Field:
    """Land and sea: the exponent sets how ragged the shore is."""
    return _step(_power_noise(rng, size, exponent) - rng.uniform(-0.4, 0.4), rng.uniform(3, 8))


def ridged(rng: np.random.Generator, size: int) -> Field:
    total = np.zeros((size, size), np.float32)
    for octave in range(3):
        total += np.abs(_band_noise(rng, size, rng.uniform(26, 34) / 2**octave)) / 2**octave
    veins: Field = np.clip(1.1 - 0.75 * total, 0, 1)
    return veins


# ---------------------------------------------------------------------------------------------------------
# Waves, tilings and warps
# ---------------------------------------------------------------------------------------------------------


def _profile(rng: np.random.Generator, phase: NDArray[Any]) -> Field:
    """A wave of the given phase (radians): a sine, a square or something between, of any duty cycle."""
    return _step(np.sin(phase) + rng.uniform(-0.35, 0.35), rng.choice([0.5, 0.9, 2.5]))


def grating(rng: np.random.Generator, size: int, period_px: float) -> Field:
    u, _ = _plane(rng, size)
    return _profile(rng, u * (2 * math.pi / (period_px * rng.uniform(0.85, 1.18))))


def chirp(rng: np.random.Generator, size: int) -> Field:
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32) - np.float32(size / 2)
    along = (x * math.cos(angle) + y * math.sin(angle)) / size + 0.7  # 0..1.4
    return _profile(rng, 2 * math.pi * rng.uniform(5, 8) * along**2 + rng.uniform(0, 6))


def rings(rng: np.random.Generator, size: int, period_px: float) -> Field:
    radius, _ = _polar(rng, size)
    return _profile(rng, radius * (2 * math.pi / (period_px * rng.uniform(0.85, 1.18))) + rng.uniform(0, 6))


def spokes(rng: np.random.Generator, size: int, twist: float) -> Field:
    """Sectors about a centre; with ``twist``, a spiral."""
    radius, angle = _polar(rng, size)
    turn = rng.choice([-1, 1]) * twist * rng.uniform(0.8, 1.2) * radius
    return _profile(rng, rng.integers(5, 13) * angle + turn + rng.uniform(0, 6))


def chevron(rng: np.random.Generator, size: int) -> Field:
    u, v = _plane(rng, size)
    length = rng.uniform(12, 24)
    zigzag = np.abs((v / length) % 2 - 1) * length
    return _profile(rng, (u + zigzag) * (2 * math.pi / rng.uniform(7, 14)))


def waves(rng: np.random.Generator, size: int, period_px: float, directions: int) -> Field:
    """Plane waves in evenly spread directions: 2 give a plaid, 3 a hexagonal lattice, 5 a quasicrystal."""
    u, v = _plane(rng, size)
    k = 2 * math.pi / (period_px * rng.uniform(0.85, 1.18))
    total = np.zeros((size, size), np.float32)
    for i in range(directions):
        angle = math.pi * i / directions
        phase = rng.uniform(0, 2 * math.pi) if directions != 3 else 0.0  # three phases change the motif
        total += np.cos(k * (u * math.cos(angle) + v * math.sin(angle)) + phase)
    return _step(total / math.sqrt(directions), rng.uniform(0.35, 1.0))


def checkerboard(rng: np.random.Generator, size: int, side_px: float, warp_px: float = 0.0) -> Field:
    u, v = _plane(rng, size)
    if warp_px:
        u = u + warp_px * _power_noise(rng, size, 4)
        v = v + warp_px * _power_noise(rng, size, 4)
    side = side_px * rng.uniform(0.85, 1.18)
    return _step(np.sin(u * (math.pi / side)) * np.sin(v * (math.pi / side)), 6)


def bricks(rng: np.random.Generator, size: int) -> Field:
    u, v = _plane(rng, size)
    height = rng.uniform(8, 15)
    width, joint = height * rng.uniform(1.6, 2.6), rng.uniform(1.2, 2.4)
    row = np.floor(v / height)
    column = np.floor(u / width + 0.5 * (row % 2))
    gap = np.minimum((v / height - row) * height, ((u / width + 0.5 * (row % 2)) - column) * width)
    tone = np.sin(12.9898 * row + 78.233 * column) * rng.uniform(0, 0.25)  # bricks differ a little
    return np.where(gap < joint, 0.05, 0.75 + tone).astype(np.float32)


def weave(rng: np.random.Generator, size: int) -> Field:
    """Bands that pass over and under one another."""
    u, v = _plane(rng, size)
    side = rng.uniform(10, 20)
    over = (np.floor(u / side) + np.floor(v / side)) % 2 == 0
    strands = rng.integers(2, 4) * 2 * math.pi / side
    return _unit(2.2 * np.where(over, np.sin(u * strands), np.sin(v * strands)) * rng.uniform(0.6, 1))


def truchet(rng: np.random.Generator, size: int, arcs: bool) -> Field:
    """Square tiles turned at random, each with two quarter circles or with a diagonal."""
    u, v = _plane(rng, size)
    side, width = rng.uniform(11, 19), rng.uniform(1.2, 2.6)
    column, row = np.floor(u / side).astype(np.int64), np.floor(v / side).astype(np.int64)
    turned = rng.integers(0, 2, (64, 64), dtype=np.int64)[row % 64, column % 64] == 1
    x, y = u - column * side, v - row * side
    x = np.where(turned, side - x, x)
    if arcs:
        distance = np.minimum(
            np.abs(np.hypot(x, y) - side / 2), np.abs(np.hypot(side - x, side - y) - side / 2)
        )
    else:
        distance = np.abs(x - y) / math.sqrt(2)
    return _step(width - distance, 0.6)


def marble(rng: np.random.Generator, size: int, turbulence: float) -> Field:
    """Stripes whose phase is stirred by smooth noise."""
    u, _ = _plane(rng, size)
    stir = turbulence * rng.uniform(0.85, 1.18) * _power_noise(rng, size, 3)
    return _profile(rng, u * (2 * math.pi / rng.uniform(9, 18)) + stir)


def wood(rng: np.random.Generator, size: int) -> Field:
    radius, _ = _polar(rng, size)
    stir = rng.uniform(1.5, 3) * _power_noise(rng, size, 3.5)
    return _profile(rng, radius * (2 * math.pi / rng.uniform(8, 16)) + stir)


# ---------------------------------------------------------------------------------------------------------
# Elements: many small marks, told apart by form, number, arrangement and orientation
# ---------------------------------------------------------------------------------------------------------

_SHIFT = 4  # cv2 draws at 1/16 pixel


def _fixed(points: NDArray[Any]) -> NDArray[np.int32]:
    return np.round(points * (1 << _SHIFT)).astype(np.int32)


def _regular(corners: int) -> NDArray[np.float64]:
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


_CROSS_ARMS = np.array([[[-1.0, 0.0], [1.0, 0.0]], [[0.0, -1.0], [0.0, 1.0]]])
_POLYGONS = {"triangle": _regular(3) * 1.25, "square": _regular(4) * 1.15}


def _turn(points: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    cos, sin = math.cos(angle), math.sin(angle)
    turned: NDArray[np.float64] = points @ np.array([[cos, sin], [-sin, cos]])
    return turned


def _mark(
    canvas: NDArray[np.uint8], form: str, centre: NDArray[Any], radius: float, angle: float, tone: int
) -> None:
    """Draws one element in place: disc, ring, cross, segment, triangle or square."""
    if form in ("disc", "ring"):
        thickness = -1 if form == "disc" else 1 + (radius > 5)
        x, y = _fixed(centre).tolist()
        cv2.circle(canvas, (x, y), int(radius * (1 << _SHIFT)), tone, thickness, cv2.LINE_AA, _SHIFT)
    elif form == "cross":
        arms = _fixed(centre + 1.2 * radius * _turn(_CROSS_ARMS.reshape(4, 2), angle)).reshape(2, 2, 2)
        cv2.polylines(canvas, list(arms), False, tone, 1 + (radius > 4), cv2.LINE_AA, _SHIFT)
    elif form == "segment":
        ends = _fixed(centre + 1.6 * radius * _turn(_CROSS_ARMS[0], angle))
        cv2.polylines(canvas, [ends], False, tone, 1 + (radius > 4), cv2.LINE_AA, _SHIFT)
    else:
        corners = _fixed(centre + radius * _turn(_POLYGONS[form], angle))
        cv2.fillConvexPoly(canvas, corners, tone, cv2.LINE_AA, _SHIFT)


def _field(canvas: NDArray[Any]) -> Field:
    return canvas.astype(np.float32) / np.float32(255)


def elements(rng: np.random.Generator, size: int, form: str, count: int) -> Field:
    """``count`` marks at independent places, each turned at random."""
    canvas = np.zeros((size, size), np.uint8)
    count = int(count * rng.uniform(0.8, 1.25))
    radius, spread = rng.uniform(2.6, 5.5), rng.uniform(0.05, 0.25)
    for centre in rng.uniform(0, size, (count, 2)):
        scale = radius * max(0.5, 1 + spread * rng.standard_normal())
        _mark(canvas, form, centre, scale, rng.uniform(0, 2 * math.pi), int(rng.integers(150, 256)))
    return _field(canvas)


def segments(rng: np.random.Generator, size: int, spread_deg: float | None, count: int) -> Field:
    """Straight strokes whose directions deviate by ``spread_deg`` from a common one (None: any)."""
    canvas = np.zeros((size, size), np.uint8)
    count = int(count * rng.uniform(0.8, 1.25))
    base, half = rng.uniform(0, math.pi), rng.uniform(5, 12)
    angles = (
        rng.uniform(0, math.pi, count)
        if spread_deg is None
        else base + np.radians(spread_deg * rng.uniform(0.8, 1.25)) * rng.standard_normal(count)
    )
    _strokes(rng, canvas, rng.uniform(0, size, (count, 2)), angles, half)
    return _field(canvas)


def _strokes(
    rng: np.random.Generator,
    canvas: NDArray[np.uint8],
    centres: NDArray[Any],
    angles: NDArray[Any],
    half: float,
) -> None:
    arms = np.stack([np.cos(angles), np.sin(angles)], 1) * half * rng.uniform(0.7, 1.3, (len(angles), 1))
    ends = _fixed(np.stack([centres - arms, centres + arms], 1))
    tones = rng.integers(140, 256, 4).tolist()  # four tones suffice, and let cv2 draw a quarter at once
    thickness = int(rng.integers(1, 3))
    for i, tone in enumerate(tones):
        cv2.polylines(canvas, list(ends[i::4]), False, tone, thickness, cv2.LINE_AA, _SHIFT)


def hatch(rng: np.random.Generator, size: int) -> Field:
    """Strokes in two directions at right angles."""
    canvas = np.zeros((size, size), np.uint8)
    count = int(rng.integers(40, 90))
    angles = rng.uniform(0, math.pi) + 0.5 * math.pi * rng.integers(0, 2, count)
    angles = angles + 0.06 * rng.standard_normal(count)
    _strokes(rng, canvas, rng.uniform(0, size, (count, 2)), angles, rng.uniform(5, 12))
    return _field(canvas)


def arrangement(rng: np.random.Generator, size: int, kind: str) -> Field:
    """One form of mark in a square or hexagonal lattice, a jittered one, rows, or clusters."""
    pitch, reach = rng.uniform(9, 15), size
    steps = np.arange(-reach, reach, pitch)
    x, y = (axis.ravel() for axis in np.meshgrid(steps, steps))
    if kind == "hexagonal":
        x, y = x + 0.5 * pitch * (np.round(y / pitch) % 2), y * math.sqrt(0.75)
    elif kind == "jittered":
        x, y = x + rng.uniform(-0.3, 0.3, x.size) * pitch, y + rng.uniform(-0.3, 0.3, x.size) * pitch
    elif kind == "rows":
        x, y = rng.uniform(-reach, reach, x.size), y * rng.uniform(1.1, 1.4)
    centres = _turn(np.stack([x, y], 1), rng.uniform(0, math.pi)) + size / 2
    centres += rng.uniform(-pitch / 2, pitch / 2, 2)
    if kind == "clustered":
        seeds = rng.uniform(0, size, (int(rng.integers(4, 8)), 2))
        centres = np.repeat(seeds, int(rng.integers(8, 13)), axis=0)
        centres = centres + rng.normal(0, rng.uniform(4.5, 7), centres.shape)
    centres = centres[((centres > -4) & (centres < size + 4)).all(axis=1)]
    form = str(rng.choice(["disc", "ring", "cross", "segment", "triangle", "square"]))
    radius, angle = pitch * rng.uniform(0.2, 0.32), rng.uniform(0, math.pi)
    canvas = np.zeros((size, size), np.uint8)
    for centre in centres:
        _mark(canvas, form, centre, radius, angle, int(rng.integers(190, 256)))
    return _field(canvas)


# ---------------------------------------------------------------------------------------------------------
# Shares: two textures in one frame; the label is how much of it the first one covers, or in how many pieces
# ---------------------------------------------------------------------------------------------------------


def _covering(rng: np.random.Generator, size: int, share: float, period_px: float) -> Field:
    noise = cv2.GaussianBlur(_band_noise(rng, size, period_px), (0, 0), 2)
    return _step(noise - np.quantile(noise, 1 - share), 4)


def textured_share(rng: np.random.Generator, size: int, share: float) -> Field:
    """Some texture covers ``share`` of the frame, evenness the rest."""
    mask = _covering(rng, size, share + rng.uniform(-0.05, 0.05), rng.uniform(36, 70))
    kind = rng.integers(0, 3)
    if kind == 0:
        texture = segments(rng, size, None if rng.random() < 0.5 else 10.0, 90)
    elif kind == 1:
        texture = grating(rng, size, 6.0)
    else:
        texture = elements(rng, size, str(rng.choice(["disc", "ring", "cross"])), 80)
    return (rng.uniform(0.3, 0.7) * (1 - mask) + mask * texture).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------
# Fractals
# ---------------------------------------------------------------------------------------------------------


def julia(rng: np.random.Generator, size: int, degree: int, folded: bool = False) -> Field:
    """Escape times of z -> z^degree + c, c near the edge of the connected ones (folded: burning ship)."""
    u = math.tau * rng.random()
    z0 = (1 / degree) ** (1 / (degree - 1)) * np.exp(1j * u)
    c = np.complex64((z0 - z0**degree) * rng.uniform(1.02, 1.25))
    x, y = _plane(rng, size)
    scale = rng.uniform(2.0, 3.0) / size
    z = ((x - x.mean()) * scale + 1j * (y - y.mean()) * scale).astype(np.complex64)
    if folded:
        c = np.complex64(rng.uniform(-1.7, -0.9) + 1j * rng.uniform(-0.6, -0.05))
    escape = np.zeros((size, size), np.float32)
    for _ in range(22):
        if folded:
            z = (np.abs(z.real) + 1j * np.abs(z.imag)).astype(np.complex64)
        z = z**2 + c if degree == 2 else z * z * z + c
        squared = z.real**2 + z.imag**2
        escape += squared < 16
        z[squared > 16] = 16  # stays far outside, without overflow
    low, high = np.quantile(escape, [0.02, 0.98])
    spread = np.clip((escape - low) / max(float(high - low), 1.0), 0, 1).astype(np.float32)
    brightened: Field = spread ** np.float32(0.7)
    return brightened


def newton(rng: np.random.Generator, size: int) -> Field:
    """Basins of Newton's method on z^n = 1."""
    degree = int(rng.integers(3, 6))
    x, y = _plane(rng, size)
    scale = rng.uniform(1.0, 3.0) / size
    offset = 0.4 * (rng.standard_normal() + 1j * rng.standard_normal())
    z = ((x - x.mean()) * scale + 1j * (y - y.mean()) * scale + offset).astype(np.complex64)
    for _ in range(9):
        power = z ** (degree - 1)
        z = z - (z * power - 1) / (degree * power + np.complex64(1e-4))
    turns: Field = ((np.angle(z) / (2 * math.pi)) % 1).astype(np.float32)
    return turns


def _maps(*rows: tuple[float, ...]) -> NDArray[np.float32]:
    """Affine maps as rows a, b, c, d, e, f: x' = ax + by + e, y' = cx + dy + f."""
    return np.array(rows, np.float32)


_CARPET = [(1 / 3, 0, 0, 1 / 3, i / 3, j / 3) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
_SYSTEMS = {
    "gasket": _maps((0.5, 0, 0, 0.5, 0, 0), (0.5, 0, 0, 0.5, 0.5, 0), (0.5, 0, 0, 0.5, 0.25, 0.433)),
    "carpet": _maps(*_CARPET),
    "dragon": _maps((0.5, -0.5, 0.5, 0.5, 0, 0), (-0.5, -0.5, 0.5, -0.5, 1, 0)),
    "curve": _maps(
        (1 / 3, 0, 0, 1 / 3, 0, 0),
        (1 / 6, -0.2887, 0.2887, 1 / 6, 1 / 3, 0),
        (1 / 6, 0.2887, -0.2887, 1 / 6, 0.5, 0.2887),
        (1 / 3, 0, 0, 1 / 3, 2 / 3, 0),
    ),
}


def attractor(rng: np.random.Generator, size: int, system: str) -> Field:
    """The chaos game: a named system under a random affine view, or random maps with a flame's variation.

    "affine" and "sine" follow the parametrisation of Draves and Reckase, "The Fractal Flame Algorithm"
    (2003), without its colouring.
    """
    if system in _SYSTEMS:
        maps = _SYSTEMS[system]
    else:
        count = int(rng.integers(2, 5))
        maps = np.empty((count, 6), np.float32)
        for row in maps:
            turn, lean = rng.uniform(0, 2 * math.pi, 2)
            a, b = rng.uniform(0.35, 0.85), rng.uniform(0.25, 0.8)
            row[:4] = a * math.cos(turn), -b * math.sin(lean), a * math.sin(turn), b * math.cos(lean)
            row[4:] = rng.uniform(-1, 1, 2)
    points = rng.random((2, 900), dtype=np.float32)
    kept = []
    for step in range(26):
        m = maps[rng.integers(0, len(maps), points.shape[1])].T
        points = np.stack([m[0] * points[0] + m[1] * points[1], m[2] * points[0] + m[3] * points[1]]) + m[4:]
        if system == "sine":
            points = np.sin(1.6 * points)
        if step >= 10:
            kept.append(points)
    cloud = np.nan_to_num(np.concatenate(kept, axis=1))
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin, shear = math.cos(angle), math.sin(angle), rng.uniform(-0.25, 0.25)
    cloud = (
        np.array([[cos, -sin], [sin, cos]], np.float32) @ np.array([[1, shear], [0, 1]], np.float32) @ cloud
    )
    low, high = np.quantile(cloud, [0.01, 0.99], axis=1, keepdims=True)
    extent = max(float((high - low).max()), 1e-3)
    place = (cloud - (low + high) / 2) * (rng.uniform(0.65, 1.0) * size / extent) + size / 2
    place = place[:, ((place >= 0) & (place < size)).all(axis=0)].astype(np.int64)
    density = np.bincount(place[1] * size + place[0], minlength=size * size).reshape(size, size)
    field = cv2.GaussianBlur(density.astype(np.float32), (0, 0), rng.uniform(0.6, 1.0))
    brightest = max(float(np.quantile(field, 0.99)), 0.3)
    tones: Field = np.clip(np.log1p(3 * field) / np.log1p(3 * brightest), 0, 1)
    return tones


# ---------------------------------------------------------------------------------------------------------
# Shapes, glyphs, counts: seen whole
# ---------------------------------------------------------------------------------------------------------


def _star(points: int, inner: float) -> NDArray[np.float64]:
    star = _regular(2 * points)
    star[1::2] *= inner
    return star


_PLUS = np.array(
    [
        [1, 3],
        [1, 1],
        [3, 1],
        [3, -1],
        [1, -1],
        [1, -3],
        [-1, -3],
        [-1, -1],
        [-3, -1],
        [-3, 1],
        [-1, 1],
        [-1, 3],
    ]
)
_HALF = np.stack([np.cos(np.linspace(0, np.pi, 24)), np.sin(np.linspace(0, np.pi, 24)) - 0.4], 1)
_OUTLINES: dict[str, NDArray[np.float64]] = {
    "triangle": _regular(3),
    "square": _regular(4),
    "pentagon": _regular(5),
    "ellipse": _regular(40) * [1.0, 0.6],
    "half": _HALF,
    "star4": _star(4, 0.4),
    "star5": _star(5, 0.45),
    "star8": _star(8, 0.6),
    "plus": _PLUS / 3.0,
}
# Strokes between the points of a 3 x 5 lattice (x 0..2, y 0..4): signs like letters.
_GLYPHS: dict[str, list[list[tuple[int, int]]]] = {
    "tee": [[(0, 0), (2, 0)], [(1, 0), (1, 4)]],
    "comb": [[(2, 0), (0, 0), (0, 4), (2, 4)], [(0, 2), (2, 2)]],
    "ladder": [[(0, 0), (0, 4)], [(2, 0), (2, 4)], [(0, 2), (2, 2)]],
    "zed": [[(0, 0), (2, 0), (0, 4), (2, 4)]],
    "fork": [[(0, 0), (1, 2), (2, 0)], [(1, 2), (1, 4)]],
    "angle": [[(0, 0), (0, 4), (2, 4)]],
}


def _backdrop(rng: np.random.Generator, size: int, mask: Field) -> Field:
    """A figure on a ground, either of which may have a texture that means nothing."""
    ground, figure = (
        rng.uniform(0.0, 0.16) * _power_noise(rng, size, rng.uniform(0.5, 3.5)) for _ in range(2)
    )
    scene: Field = np.clip(0.2 + ground + mask * (0.6 + figure - ground), 0, 1).astype(np.float32)
    return scene


def shape(rng: np.random.Generator, size: int, name: str) -> Field:
    """One shape, filled or in outline, squeezed a little."""
    canvas = np.zeros((size, size), np.uint8)
    radius = rng.uniform(14, WHOLE_SIZE_PX / 2 - 2)
    free = WHOLE_SIZE_PX / 2 - radius
    outline = _turn(_OUTLINES[name], rng.uniform(0, 2 * math.pi)) * [1.0, rng.uniform(0.8, 1.0)]
    outline = _turn(outline, rng.uniform(0, 2 * math.pi)) * radius + size / 2 + rng.uniform(-free, free, 2)
    if rng.random() < 0.6:
        cv2.fillPoly(canvas, [_fixed(outline)], 255, cv2.LINE_AA, _SHIFT)
    else:
        thickness = int(rng.integers(2, 5))
        cv2.polylines(canvas, [_fixed(outline)], True, 255, thickness, cv2.LINE_AA, _SHIFT)
    return _backdrop(rng, size, _field(canvas))


def glyph(rng: np.random.Generator, size: int, name: str) -> Field:
    canvas = np.zeros((size, size), np.uint8)
    height = rng.uniform(30, 54)
    angle, lean = rng.uniform(0, 2 * math.pi), rng.uniform(-0.25, 0.25)
    thickness, free = int(rng.integers(2, 7)), WHOLE_SIZE_PX / 2 - height / 2 - 4
    centre = size / 2 + rng.uniform(-free, free, 2)
    for stroke in _GLYPHS[name]:
        points = (np.array(stroke, float) - [1, 2]) / 4 * height @ np.array([[1.2, 0], [lean, 1]])
        cv2.polylines(
            canvas, [_fixed(centre + _turn(points, angle))], False, 255, thickness, cv2.LINE_AA, _SHIFT
        )
    return _backdrop(rng, size, _field(canvas))


def count(rng: np.random.Generator, size: int, number: int) -> Field:
    """``number`` separate marks of mixed form and size."""
    canvas = np.zeros((size, size), np.uint8)
    cells = rng.permutation(9)[:number]  # in a 3 x 3 grid none overlap
    pitch = WHOLE_SIZE_PX / 3
    for cell in cells:
        radius = rng.uniform(4, 7.2)
        slack = pitch / 2 - radius
        centre = size / 2 + (np.array(divmod(int(cell), 3)) - 1) * pitch + rng.uniform(-slack, slack, 2)
        form = str(rng.choice(["disc", "triangle", "square", "cross"]))
        _mark(canvas, form, centre, radius, rng.uniform(0, 2 * math.pi), int(rng.integers(190, 256)))
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(0, 360), 0.95)
    return _backdrop(rng, size, _field(cv2.warpAffine(canvas, turn, (size, size))))


# ---------------------------------------------------------------------------------------------------------
# The classes
# ---------------------------------------------------------------------------------------------------------

_SCALES_PX = {"fine": 5.0, "medium": 10.5, "coarse": 22.0}  # periods; each is jittered by a sixth
_COHERENCE_DEG = {"parallel": 3.0, "combed": 14.0, "ruffled": 32.0, "tangled": None}


def _classes() -> dict[str, Draw]:
    part = functools.partial
    drawn: dict[str, Draw] = {}
    for exponent in (0.8, 1.8, 2.8, 3.8):
        drawn[f"noise-{exponent}"] = part(power_noise, exponent=exponent)
    for name, period in _SCALES_PX.items():
        drawn[f"grating-{name}"] = part(grating, period_px=period)
    for name, period in {"fine": 7.0, "coarse": 16.0}.items():
        drawn[f"labyrinth-{name}"] = part(threshold_noise, period_px=period, level=0.0)
        drawn[f"spots-{name}"] = part(threshold_noise, period_px=period, level=1.1)
        drawn[f"rings-{name}"] = part(rings, period_px=period)
        drawn[f"plaid-{name}"] = part(waves, period_px=period, directions=2)
        drawn[f"checkerboard-{name}"] = part(checkerboard, side_px=period)
    drawn["lattice-wave"] = part(waves, period_px=11.0, directions=3)
    drawn["quasicrystal"] = part(waves, period_px=11.0, directions=5)
    drawn["checkerboard-warped"] = part(checkerboard, side_px=9.0, warp_px=5.0)
    drawn["coast-ragged"] = part(coast, exponent=2.2)
    drawn["coast-smooth"] = part(coast, exponent=4.0)
    drawn |= {"ridged": ridged, "chirp": chirp, "chevron": chevron, "bricks": bricks, "weave": weave}
    drawn["spokes"] = part(spokes, twist=0.0)
    drawn["spiral"] = part(spokes, twist=0.25)
    drawn["truchet-arcs"] = part(truchet, arcs=True)
    drawn["truchet-diagonals"] = part(truchet, arcs=False)
    for name, turbulence in {"calm": 0.6, "stirred": 1.7, "wild": 4.5}.items():
        drawn[f"marble-{name}"] = part(marble, turbulence=turbulence)
    drawn["wood"] = wood
    for form in ("disc", "ring", "cross", "triangle", "square"):
        drawn[f"marks-{form}-sparse"] = part(elements, form=form, count=16)
        drawn[f"marks-{form}-dense"] = part(elements, form=form, count=64)
    for name, spread in _COHERENCE_DEG.items():
        drawn[f"segments-{name}-sparse"] = part(segments, spread_deg=spread, count=24)
        drawn[f"segments-{name}-dense"] = part(segments, spread_deg=spread, count=96)
    drawn["segments-crossed"] = hatch
    for kind in ("square", "hexagonal", "jittered", "rows", "clustered"):
        drawn[f"arranged-{kind}"] = part(arrangement, kind=kind)
    for share in (15, 38, 62, 85):
        drawn[f"textured-{share}"] = part(textured_share, share=share / 100)
    drawn["julia-2"] = part(julia, degree=2)
    drawn["julia-3"] = part(julia, degree=3)
    drawn["julia-folded"] = part(julia, degree=2, folded=True)
    drawn["newton"] = newton
    for system in (*_SYSTEMS, "affine", "sine"):
        drawn[f"attractor-{system}"] = part(attractor, system=system)
    for name in _OUTLINES:
        drawn[f"shape-{name}"] = part(shape, name=name)
    for name in _GLYPHS:
        drawn[f"glyph-{name}"] = part(glyph, name=name)
    for number in (2, 3, 5, 8):
        drawn[f"count-{number}"] = part(count, number=number)
    return drawn


CLASSES: dict[str, Draw] = _classes()
_DRAWS = tuple(CLASSES.values())

# ---------------------------------------------------------------------------------------------------------
# Colour and degradation, the same for every class
# ---------------------------------------------------------------------------------------------------------


def _palette(rng: np.random.Generator) -> NDArray[np.float32]:
    """Colours of the field's 256 levels, [256, 3]: from one random colour through a second to a third."""
    while True:
        ends = rng.uniform(0, 255, (2, 3))
        ends += rng.uniform(0, 0.9) * (ends.mean(axis=1, keepdims=True) - ends)  # from vivid to nearly grey
        if np.linalg.norm(ends[0] - ends[1]) > 55:  # else nothing could be seen
            break
    middle = ends.mean(axis=0) + rng.normal(0, 25, 3)
    at = rng.uniform(0.35, 0.65)
    knots = np.stack([ends[0], middle, ends[1]])
    levels = np.linspace(0, 1, 256)
    return np.stack([np.interp(levels, [0, at, 1], knots[:, c]) for c in range(3)], 1).astype(np.float32)


def _colour(rng: np.random.Generator, field: Field) -> Image:
    """Random palette, uneven light, blur, noise and JPEG, none of which depends on the class."""
    size = field.shape[0]
    if rng.random() < 0.4:
        field = np.clip(field + rng.uniform(0.02, 0.1) * _power_noise(rng, size, rng.uniform(1, 4)), 0, 1)
    image = _palette(rng)[(field * 255).astype(np.uint8)]
    if rng.random() < 0.5:
        u, _ = _plane(rng, size)
        image *= (1 + rng.uniform(0, 0.4) * (u - u.mean()) / size)[:, :, None]
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9)).astype(np.float32, copy=False)
    if rng.random() < 0.5:
        image += rng.uniform(1, 12) * rng.standard_normal(image.shape, dtype=np.float32)
    pixels: Image = np.clip(image, 0, 255).astype(np.uint8)
    if rng.random() < 0.4:
        quality = int(rng.integers(35, 95))
        _, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        pixels = np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), np.uint8)
    return pixels


def draw_image(seed: int, index: int, size: int = IMAGE_SIZE_PX) -> tuple[Image, int]:
    """Draws one labelled image.

    Args:
        seed: Seed of the whole set.
        index: Number of the image, from 0; its class is ``index`` modulo the number of classes.
        size: Side in pixels.

    Returns:
        The image, [size, size, 3] uint8 RGB, and its label, an index into ``CLASSES``.
        Equal arguments give equal images.
    """
    label = index % len(_DRAWS)
    rng = np.random.Generator(np.random.SFC64([seed, index]))
    return _colour(rng, _DRAWS[label](rng, size)), label


def sheet(seed: int, columns: int = 12) -> Image:
    """One image of every class, row by row in the order of ``CLASSES``: [rows * 96, columns * 96, 3]."""
    rows = -(-len(CLASSES) // columns)
    page = np.full((rows * IMAGE_SIZE_PX, columns * IMAGE_SIZE_PX, 3), 255, np.uint8)
    for index in range(len(CLASSES)):
        y, x = (IMAGE_SIZE_PX * place for place in divmod(index, columns))
        page[y : y + IMAGE_SIZE_PX, x : x + IMAGE_SIZE_PX] = draw_image(seed, index)[0]
    return page


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What defines a training run; two runs with equal settings on one machine give equal weights.

    Attributes:
        seed: Seed of the images, of their order and augmentation, and of the network.
        steps: Optimiser steps in all; the learning rate's cycle spans them.
        batch: Images a step.
        pool: Images held in memory, rounded up to the same number of every class.
        refresh: Share of the pool that is drawn anew after each pass over it, 0..1.
        heldout: Images that accuracy is measured on, rounded like ``pool``; never trained on.
        peak_rate: Highest learning rate of the cycle.
        weight_decay: AdamW's decay of matrices and filters; biases and norms have none.
        smoothing: Label smoothing, 0..1.
        averaging: Decay per step of the moving average of the weights, which is what is exported.
    """

    seed: int = 0
    steps: int = 4_500
    batch: int = 256
    pool: int = 60_000
    refresh: float = 0.1
    heldout: int = 6_000
    peak_rate: float = 4e-3
    weight_decay: float = 0.03
    smoothing: float = 0.05
    averaging: float = 0.998

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "pool", "heldout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch > self.pool:
            raise ValueError(f"batch ({self.batch}) must not exceed pool ({self.pool})")
        if not 0 <= self.refresh <= 1:
            raise ValueError(f"refresh must lie in 0..1, not {self.refresh}")


def _rounded(count: int) -> int:
    return -(-count // len(CLASSES)) * len(CLASSES)


class Pool:
    """Drawn images in memory, of which a part is replaced after every pass.

    What it holds after a number of passes depends on that number alone, so a resumed run draws it again.
    """

    def __init__(self, settings: Settings, passes: int = 0) -> None:
        self._seed = settings.seed
        self.size = _rounded(settings.pool)
        self._block = round(self.size * settings.refresh)
        self.images = np.empty((self.size, IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), np.uint8)
        self.labels = np.arange(self.size) % len(CLASSES)
        drawn = passes * self._block
        for slot in range(self.size):
            replaced = drawn // self.size + (slot < drawn % self.size)
            self._draw(slot, replaced)

    def _draw(self, slot: int, replaced: int) -> None:
        self.images[slot] = draw_image(self._seed, slot + replaced * self.size)[0]

    def refresh(self, passes: int) -> None:
        """Replaces the next block, after ``passes`` passes in all (from 1)."""
        for drawn in range((passes - 1) * self._block, passes * self._block):
            self._draw(drawn % self.size, drawn // self.size + 1)

    def batches(self, rng: np.random.Generator, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in random order: augmented [batch, 3, 80, 80] float32 and labels [batch] int64."""
        order = rng.permutation(self.size)
        for start in range(0, self.size - batch + 1, batch):
            chosen = order[start : start + batch]
            yield _augmented(rng, self.images, chosen), torch.from_numpy(self.labels[chosen])


def _augmented(rng: np.random.Generator, images: NDArray[np.uint8], chosen: NDArray[np.int64]) -> Tensor:
    """Random crop, one of the square's eight symmetries, swapped channels, and colour gain and offset."""
    crops = np.empty((len(chosen), CROP_SIZE_PX, CROP_SIZE_PX, 3), np.uint8)
    corners = rng.integers(0, IMAGE_SIZE_PX - CROP_SIZE_PX + 1, (len(chosen), 2))
    symmetries = rng.integers(0, 2, (len(chosen), 3))
    for crop, index, (y, x), (flip_y, flip_x, swap) in zip(crops, chosen, corners, symmetries, strict=True):
        view = images[index, y : y + CROP_SIZE_PX, x : x + CROP_SIZE_PX]
        view = view[:: 1 - 2 * flip_y, :: 1 - 2 * flip_x]
        crop[:] = view.transpose(1, 0, 2) if swap else view
    tensor = normalised(crops)[:, torch.from_numpy(rng.permutation(3))]
    shape = (len(chosen), 3, 1, 1)
    gain = torch.from_numpy(rng.uniform(0.75, 1.25, shape).astype(np.float32))
    offset = torch.from_numpy(rng.normal(0, 0.3, shape).astype(np.float32))
    return (tensor * gain + offset).contiguous(memory_format=torch.channels_last)


def normalised(images: NDArray[np.uint8]) -> Tensor:
    """[N, H, W, 3] uint8 RGB to [N, 3, H, W] float32: divided by 255, minus ``MEAN``, over ``STD``."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (tensor / 255 - mean) / std


def rate(step: int, settings: Settings) -> float:
    """One-cycle learning rate: up along a cosine in the first tenth, down along a cosine to nearly 0."""
    rise = max(1, settings.steps // 10)
    if step < rise:
        return settings.peak_rate * (0.04 + 0.96 * (1 - math.cos(math.pi * step / rise)) / 2)
    fall = (step - rise) / max(1, settings.steps - rise)
    return settings.peak_rate * (0.001 + 0.999 * (1 + math.cos(math.pi * fall)) / 2)


def _network() -> nn.Module:
    network: nn.Module = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES))
    return network.to(memory_format=torch.channels_last)  # faster on CPU, the same numbers


def _optimizer(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.peak_rate)


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Moves the average towards the network; running statistics are averaged like weights."""
    new = network.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(new[name], 1 - decay)
        else:
            value.copy_(new[name])


@torch.inference_mode()
def _outputs(network: nn.Module, images: NDArray[np.uint8]) -> Tensor:
    network.eval()
    return torch.cat([network(normalised(images[i : i + 256])) for i in range(0, len(images), 256)])


def _heldout(settings: Settings) -> tuple[NDArray[np.uint8], Tensor]:
    """Central crops [N, 80, 80, 3] of images that are never trained on, and their labels [N]."""
    start = -(-HELDOUT_START // len(CLASSES)) * len(CLASSES)
    drawn = [draw_image(settings.seed, start + i) for i in range(_rounded(settings.heldout))]
    margin = (IMAGE_SIZE_PX - CROP_SIZE_PX) // 2
    images = np.stack([image[margin:-margin, margin:-margin] for image, _ in drawn])
    return images, torch.tensor([label for _, label in drawn])


def export(network: nn.Module, path: Path, settings: Settings, step: int, accuracy: float) -> None:
    """Writes the network without its classifier, as timm names it with ``num_classes=0``."""
    state = {
        name: value.contiguous().clone()
        for name, value in network.state_dict().items()
        if not name.startswith("classifier.")
    }
    metadata = {
        "architecture": ARCHITECTURE,
        "tool": f"tools/pretrain_procedural.py {TOOL_VERSION}",
        "pretext": "classification of procedurally drawn images",
        "classes": json.dumps(list(CLASSES)),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "settings": json.dumps(asdict(settings), sort_keys=True),
        "step": str(step),
        "heldout_accuracy": f"{accuracy:.4f}",
        "licence": "Apache-2.0",
    }
    partial = path.with_name(path.name + ".partial")
    save_file(state, partial, metadata)
    partial.replace(path)


def train(settings: Settings, output: Path, minutes: float = math.inf) -> float:
    """Trains, or goes on with what ``output`` holds, and exports the averaged weights after every pass.

    Args:
        settings: What is to be trained.
        output: Folder of ``checkpoint.pt``, ``backbone.safetensors`` and ``confusion.npy`` (held-out counts,
            [true, predicted] int64).
        minutes: Stops after the pass in which this time runs out; a later call goes on.

    Returns:
        Share of held-out images classified correctly, 0..1.

    Raises:
        ValueError: ``output`` holds the checkpoint of a run with other settings.
    """
    start = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    network, average = _network(), _network()
    average.load_state_dict(network.state_dict())
    optimizer = _optimizer(network, settings)
    step = passes = 0
    accuracy = 0.0
    checkpoint = output / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["settings"] != asdict(settings):
            raise ValueError(
                f"{checkpoint} belongs to a run with other settings: repeat them, or choose another --output"
            )
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step, passes, accuracy = saved["step"], saved["passes"], saved["accuracy"]
    if step >= settings.steps:
        return accuracy
    pool = Pool(settings, passes)
    heldout, truth = _heldout(settings)
    print(
        f"{len(CLASSES)} classes, {pool.size + len(heldout)} images drawn in {time.monotonic() - start:.0f} s"
    )
    while step < settings.steps:
        began, losses = time.monotonic(), []
        network.train()
        for images, labels in pool.batches(np.random.default_rng([settings.seed, 1, passes]), settings.batch):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, settings)
            loss = functional.cross_entropy(network(images), labels, label_smoothing=settings.smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            # A short memory at first, else the average would be of the random start.
            _follow(average, network, min(settings.averaging, (1 + step) / (10 + step)))
            losses.append(loss.detach())
            step += 1
            if step == settings.steps:
                break
        trained = time.monotonic() - began
        predicted = _outputs(average, heldout).argmax(dim=1)
        accuracy = float((predicted == truth).float().mean())
        confusion = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
        confusion.index_put_((truth, predicted), torch.tensor(1), accumulate=True)
        np.save(output / "confusion.npy", confusion.numpy())
        passes += 1
        if step < settings.steps:
            pool.refresh(passes)
        torch.save(
            {
                "settings": asdict(settings),
                "network": network.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "passes": passes,
                "accuracy": accuracy,
            },
            checkpoint.with_suffix(".partial"),
        )
        checkpoint.with_suffix(".partial").replace(checkpoint)
        export(average, output / "backbone.safetensors", settings, step, accuracy)
        print(
            f"pass {passes:3d}  step {step}/{settings.steps}  loss {torch.stack(losses).mean():.3f}"
            f"  held-out {accuracy:.4f}  {len(losses) * settings.batch / trained:.0f} images/s"
            f"  {(time.monotonic() - start) / 60:.1f} min",
            flush=True,
        )
        if time.monotonic() - start > 60 * minutes:
            break
    return accuracy


# ---------------------------------------------------------------------------------------------------------
# Does it transfer?
# ---------------------------------------------------------------------------------------------------------


def probe(folder: Path, weights: Path, size_px: int = 112, folds: int = 5) -> dict[str, tuple[float, float]]:
    """Cross-validated linear probe on frozen embeddings, with these weights and with random ones.

    Args:
        folder: One sub-folder of images for every class.
        weights: A file that ``train`` exported.
        size_px: Side that the images are resized to (area average).
        folds: Number of stratified folds.

    Returns:
        Mean and standard deviation over the folds of the accuracy, for "pretrained" and "random".
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images, labels = [], []
    for path in sorted(path for path in folder.glob("*/*") if path.is_file()):
        pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if pixels is None:
            raise ValueError(f"{path} is not an image that can be read: --probe takes folders of images only")
        small = cv2.resize(pixels, (size_px, size_px), interpolation=cv2.INTER_AREA)
        images.append(cv2.cvtColor(small, cv2.COLOR_BGR2RGB))
        labels.append(path.parent.name)
    if len(set(labels)) < 2:
        raise ValueError(f"{folder} must hold at least two folders of images; it holds {len(set(labels))}")
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(ARCHITECTURE, num_classes=0)
    stack = np.stack(images).astype(np.uint8, copy=False)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    scores = {}
    for name in ("random", "pretrained"):
        if name == "pretrained":
            network.load_state_dict(load_file(weights))
        splitter = StratifiedKFold(folds, shuffle=True, random_state=0)
        fold = cross_val_score(classifier, _outputs(network, stack).numpy(), labels, cv=splitter)
        scores[name] = (float(fold.mean()), float(fold.std()))
    return scores


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Pre-trains the bundled backbone on procedurally drawn images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--output", type=Path, metavar="DIR", help="train, and write checkpoint and weights here"
    )
    task.add_argument("--probe", type=Path, metavar="DIR", help="linear probe on class folders of images")
    task.add_argument("--sheet", type=Path, metavar="FILE", help="write one drawn image of every class (PNG)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights for --probe (.safetensors)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after the pass that exceeds this"
    )
    defaults, helps = (
        Settings(),
        {
            "seed": "seed of images, order and network",
            "steps": "optimiser steps in all",
            "batch": "images a step",
            "pool": "images held in memory (27.6 kB each)",
            "refresh": "share of the pool drawn anew after each pass, 0..1",
            "heldout": "images to measure accuracy on",
            "peak_rate": "highest learning rate of the one cycle",
            "weight_decay": "AdamW weight decay",
            "smoothing": "label smoothing, 0..1",
            "averaging": "decay per step of the weights' moving average",
        },
    )
    for name, text in helps.items():
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=text)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    try:
        if options.sheet:
            cv2.imwrite(str(options.sheet), cv2.cvtColor(sheet(options.seed), cv2.COLOR_RGB2BGR))
        elif options.probe:
            if options.weights is None:
                parser.error("--probe needs --weights FILE")
            for name, (mean, deviation) in probe(options.probe, options.weights).items():
                print(f"{name:10s} accuracy {mean:.4f} +- {deviation:.4f} (5 folds)")
        else:
            settings = Settings(**{name: getattr(options, name) for name in helps})
            print(f"held-out accuracy {train(settings, options.output, options.minutes):.4f}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
