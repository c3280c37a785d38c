from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
import pytest
from numpy.typing import NDArray

from slidetl.synthetic.pyramid import BAND_PX, write_pyramid


def smooth_image(width: int, height: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    planes = [120 + 100 * np.sin(x / 90), 120 + 100 * np.cos(y / 70), 60 + (x + y) * 120 / (width + height)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def bands(image: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    for top in range(0, len(image), BAND_PX):
        yield image[top : top + BAND_PX]


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (1111, 2050), (2051, 700)])
def test_openslide_reads_what_was_written(tmp_path: Path, width: int, height: int) -> None:
    image = smooth_image(width, height)
    write_pyramid(tmp_path / "a.tiff", (width, height), 0.73, bands(image), 95)
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.73, rel=1e-6)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.73, rel=1e-6)
        assert slide.properties["openslide.level[0].tile-width"] == "256"
        sizes = [(width, height)]
        while min(sizes[-1]) // 4 >= 128:
            sizes.append((sizes[-1][0] // 4, sizes[-1][1] // 4))
        assert len(sizes) > 1
        assert list(slide.level_dimensions) == sizes
        expected = image.astype(float)
        for level, (w, h) in enumerate(sizes):
            if level:
                expected = expected[: h * 4, : w * 4].reshape(h, 4, w, 4, 3).mean(axis=(1, 3))
            read = np.asarray(slide.read_region((0, 0), level, (w, h)).convert("RGB")).astype(float)
            assert np.abs(read - expected).mean() < 1.5
            assert np.abs(read - expected).max() < 16


def test_equal_pixels_give_equal_bytes_wherever_they_lie(tmp_path: Path) -> None:
    image = smooth_image(700, 600)
    for name in ("a.tiff", "another-name.tiff"):
        write_pyramid(tmp_path / name, (700, 600), 0.5, bands(image), 90)
    assert (tmp_path / "a.tiff").read_bytes() == (tmp_path / "another-name.tiff").read_bytes()


def test_memory_is_that_of_bands_not_of_the_slide(tmp_path: Path) -> None:
    width, height = 4096, 16 * BAND_PX
    band = smooth_image(width, BAND_PX)
    tracemalloc.start()
    try:
        write_pyramid(tmp_path / "a.tiff", (width, height), 0.5, (band for _ in range(16)), 80)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * band.nbytes  # the slide is sixteen bands
