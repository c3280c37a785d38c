"""What every Slide must do: inherit from SlideContract and give the fixtures below."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from slidetl.errors import SpacingError
from slidetl.slides.base import Slide

Picture = NDArray[np.uint8]


class SlideContract:
    """The slide must show ``picture`` at ``mpp`` at level 0, without loss, on glass of ``glass_rgb``."""

    @pytest.fixture
    def picture(self) -> Picture:
        """``[h, w, 3]``, at least 300 on both sides; both divisible by 4."""
        raise NotImplementedError

    @pytest.fixture
    def slide(self, picture: Picture) -> Slide:
        raise NotImplementedError

    mpp = 0.5
    glass_rgb = (255, 255, 255)

    def test_describes_itself(self, slide: Slide, picture: Picture) -> None:
        info = slide.info
        assert info.size_level0 == (picture.shape[1], picture.shape[0])
        assert info.mpp_level0 == pytest.approx((self.mpp, self.mpp))
        assert info.background_rgb == self.glass_rgb
        assert len(info.fingerprint) == 64
        assert list(info.mpp_levels) == sorted(info.mpp_levels)

    def test_its_own_spacing_is_read_untouched(self, slide: Slide, picture: Picture) -> None:
        tile = slide.read((17, 30), (101, 64), self.mpp)
        assert tile.dtype == np.uint8
        assert np.array_equal(tile, picture[30:94, 17:118])
        near = slide.read((17, 30), (101, 64), 1.02 * self.mpp, 0.03)  # within the tolerance
        assert np.array_equal(near, tile)

    def test_half_and_quarter_are_block_means(self, slide: Slide, picture: Picture) -> None:
        for factor in (2, 4):
            tile = slide.read((16, 32), (40, 50), factor * self.mpp)
            blocks = picture[32 : 32 + 50 * factor, 16 : 16 + 40 * factor]
            means = blocks.reshape(50, factor, 40, factor, 3).mean(axis=(1, 3))
            # A level of the pyramid was itself rounded once.
            assert np.abs(tile - means).max() <= 1.01

    def test_a_part_equals_the_same_part_of_the_whole(self, slide: Slide) -> None:
        whole = slide.read((0, 0), (60, 50), 3 * self.mpp)
        part = slide.read((30, 60), (20, 15), 3 * self.mpp)
        assert np.array_equal(part, whole[20:35, 10:30])

    def test_beyond_the_border_is_glass(self, slide: Slide, picture: Picture) -> None:
        height, width = picture.shape[:2]
        tile = slide.read((width - 10, height - 6), (20, 20), self.mpp)
        assert np.array_equal(tile[:6, :10], picture[-6:, -10:])
        assert (tile[6:] == self.glass_rgb).all()
        assert (tile[:, 10:] == self.glass_rgb).all()
        tile = slide.read((-4, -3), (20, 20), self.mpp)
        assert np.array_equal(tile[3:, 4:], picture[:17, :16])
        assert (tile[:3] == self.glass_rgb).all()
        assert (slide.read((-500, 5 * height), (8, 8), 2 * self.mpp) == self.glass_rgb).all()

    def test_nothing_of_it_is_missing(self, slide: Slide, picture: Picture) -> None:
        height, width = picture.shape[0] // 2, picture.shape[1] // 2
        missing = slide.missing((width, height), 2 * self.mpp)
        if missing is not None:
            assert missing.dtype == np.bool_ and missing.shape == (height, width) and not missing.any()

    def test_spacing_is_what_was_asked_or_that_of_a_level(self, slide: Slide) -> None:
        assert slide.mpp_read(1.3 * self.mpp) == (1.3 * self.mpp, 1.3 * self.mpp)
        assert slide.mpp_read(1.005 * self.mpp) == slide.info.mpp_level0
        assert slide.mpp_read(1.005 * self.mpp, 0.001) == (1.005 * self.mpp, 1.005 * self.mpp)

    def test_it_is_never_enlarged(self, slide: Slide) -> None:
        with pytest.raises(SpacingError, match=f"{self.mpp:g} um per pixel.*{0.9 * self.mpp:g} asked for"):
            slide.mpp_read(0.9 * self.mpp)
        with pytest.raises(SpacingError):
            slide.read((0, 0), (8, 8), 0.9 * self.mpp)

    def test_closing_twice_is_harmless(self, slide: Slide) -> None:
        with slide as same:
            assert same is slide
        slide.close()
