from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetl.slides.area import average_areas, pixel_edges


def exact_mean(line: list[int], low: Fraction, high: Fraction) -> Fraction:
    total = Fraction(0)
    for place, value in enumerate(line):
        total += value * max(Fraction(0), min(high, Fraction(place + 1)) - max(low, Fraction(place)))
    return total / (high - low)


@given(
    st.lists(st.integers(0, 255), min_size=12, max_size=40),
    st.fractions(Fraction(1), Fraction(5), max_denominator=50),
    st.fractions(Fraction(0), Fraction(3), max_denominator=50),
)
def test_every_pixel_is_the_mean_of_its_area(line: list[int], step: Fraction, start: Fraction) -> None:
    count = int((len(line) - start) / step)
    source = np.repeat(np.array(line, np.uint8)[:, None, None], 3, axis=2)
    across = pixel_edges(0.0, 1.0, 0, 1)
    along = pixel_edges(float(start), float(step), 0, count)
    wanted = [float(exact_mean(line, start + i * step, start + (i + 1) * step)) for i in range(count)]
    for image in (
        average_areas(source, across, along)[:, 0, 0],
        average_areas(source.swapaxes(0, 1), along, across)[0, :, 0],
    ):
        assert np.abs(image - np.array(wanted)).max(initial=0) <= 0.5 + 1e-3


def test_whole_steps_are_block_means() -> None:
    source = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = average_areas(source, pixel_edges(0, 4, 0, 15), pixel_edges(0, 5, 0, 8))
    means = source.reshape(8, 5, 15, 4, 3).mean(axis=(1, 3))
    assert np.array_equal(image, np.floor(means + 0.5))


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("step", [1.0, 1.4142, 1.9786, 7.3, 63.99])
def test_a_constant_image_stays_constant(value: int, step: float) -> None:
    source = np.full((700, 700, 3), value, np.uint8)
    edges = pixel_edges(0.37, step, 0, 10)
    assert (average_areas(source, edges, edges) == value).all()


@pytest.mark.parametrize("phase", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("step", [1.5, 1.9786, 3.2])
def test_a_grating_is_not_shifted(step: float, phase: float) -> None:
    period = 32.0
    centres = np.arange(1024) + 0.5
    wave = 127.5 + 100 * np.cos(2 * np.pi * centres / period)
    source = np.repeat(np.round(wave).astype(np.uint8)[None, :, None], 3, axis=2)
    count = int((1024 - phase) / step)
    image = average_areas(source, pixel_edges(phase, step, 0, count), pixel_edges(0, 1, 0, 1))
    middles = phase + (np.arange(count) + 0.5) * step
    turned = (image[0, :, 0] - 127.5) * np.exp(-2j * np.pi * middles / period)
    whole = int(count * step // period * period / step)
    shift_px = np.angle(turned[:whole].mean()) * period / (2 * np.pi)
    assert abs(shift_px) < 0.02


def test_bands_join_without_a_seam() -> None:
    source = np.random.default_rng(1).integers(0, 256, (90, 80, 3), dtype=np.uint8)
    across = pixel_edges(3.3, 1.9786, 0, 30)
    whole = average_areas(source, across, pixel_edges(1.7, 1.9786, 0, 40))
    parts = [average_areas(source, across, pixel_edges(1.7, 1.9786, y, y + 10)) for y in (0, 10, 20, 30)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_edges_that_only_rounding_keeps_from_a_pixel_are_on_it() -> None:
    assert pixel_edges(0.1 + 0.2 - 0.3, 1 / 0.1 - 8, 0, 3).tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("step", [(16, 16), (17, 17), (17, 1), (33, 64)])
def test_wide_whole_steps_do_not_overflow(step: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    source = rng.integers(200, 256, (2 * step[1], 3 * step[0], 3), dtype=np.uint8)
    source[: step[1], : step[0]] = 255
    image = average_areas(source, pixel_edges(0, step[0], 0, 3), pixel_edges(0, step[1], 0, 2))
    means = source.astype(float).reshape(2, step[1], 3, step[0], 3).mean(axis=(1, 3))
    assert np.array_equal(image, np.floor(means + 0.5))
