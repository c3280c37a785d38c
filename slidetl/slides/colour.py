"""Colour management: from the space of the scanner's ICC profile to sRGB."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from slidetl.errors import SlideOpenError, SlideReadError
from slidetl.slides.base import Slide, SlideInfo

_Result = TypeVar("_Result")


class SrgbSlide(Slide):
    """A slide converted to sRGB, otherwise the slide itself.

    The profile is applied to averaged areas: cheaper by the square of the reduction, and within a grey level
    of the other order except at hard edges.

    Args:
        slide: the slide, owned by this one from now on.
        profile: its ICC profile.

    Raises:
        SlideOpenError: the profile cannot be used; the slide is closed then.
    """

    def __init__(self, slide: Slide, profile: bytes) -> None:
        self._slide = slide
        self._profile = profile
        glass = np.array(slide.info.background_rgb, np.uint8).reshape(1, 1, 3)
        try:
            red, green, blue = to_srgb(glass, profile)[0, 0].tolist()
        except ImageCms.PyCMSError as error:
            slide.close()
            raise SlideOpenError(
                f"{slide.info.path}: its ICC profile cannot be used ({error}); tile it without --icc"
            ) from error
        self._info = replace(slide.info, background_rgb=(red, green, blue))

    @property
    def info(self) -> SlideInfo:
        """The slide's own metadata, except for the background's colour."""
        return self._info

    def mpp_read(self, mpp: float, mpp_tolerance: float = 0.01) -> tuple[float, float]:
        """Forwards to the slide; see :meth:`slidetl.slides.base.Slide.mpp_read`."""
        return self._slide.mpp_read(mpp, mpp_tolerance)

    def read(
        self,
        origin_level0: tuple[int, int],
        size_px: tuple[int, int],
        mpp: float,
        mpp_tolerance: float = 0.01,
    ) -> NDArray[np.uint8]:
        """Reads like :meth:`slidetl.slides.base.Slide.read`, in sRGB."""
        return to_srgb(self._slide.read(origin_level0, size_px, mpp, mpp_tolerance), self._profile)

    def missing(self, size_px: tuple[int, int], mpp: float) -> NDArray[np.bool_] | None:
        """Forwards to the slide; see :meth:`slidetl.slides.base.Slide.missing`."""
        return self._slide.missing(size_px, mpp)

    def map_tiles(
        self, work: Callable[[NDArray[np.uint8]], _Result], *tiles: Any, **options: Any
    ) -> Iterator[_Result | SlideReadError]:
        """Reads as fast as the slide's own; see :meth:`slidetl.slides.base.Slide.map_tiles`."""
        return self._slide.map_tiles(lambda rgb: work(to_srgb(rgb, self._profile)), *tiles, **options)

    def close(self) -> None:
        """Releases the file. Closing twice is harmless."""
        self._slide.close()


def to_srgb(rgb: NDArray[np.uint8], profile: bytes) -> NDArray[np.uint8]:
    """Converts colours from a profile's space to sRGB, by relative colorimetry: white glass stays white.

    Args:
        rgb: ``[h, w, 3] uint8``.
        profile: an ICC profile of an RGB device.

    Returns:
        ``[h, w, 3] uint8``.

    Raises:
        PIL.ImageCms.PyCMSError: the profile is damaged, or not one of an RGB device.
    """
    converted = ImageCms.applyTransform(Image.fromarray(rgb), _transform(profile))
    assert converted is not None  # None is for a conversion in place
    return np.asarray(converted)


@functools.lru_cache(maxsize=4)
def _transform(profile: bytes) -> ImageCms.ImageCmsTransform:
    """Builds a transform, which costs milliseconds; the slides of one scanner share theirs."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except OSError as error:  # Pillow's error for bytes without a profile
        raise ImageCms.PyCMSError(error) from error
    relative = ImageCms.Intent.RELATIVE_COLORIMETRIC
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB", relative)
