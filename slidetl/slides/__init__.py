"""Slides: something readable at a physical spacing. :func:`open_slide` picks the reader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slidetl.errors import SlideOpenError
from slidetl.slides.base import Slide, SlideInfo
from slidetl.slides.spacing import Pair

if TYPE_CHECKING:
    from slidetl.slides.openslide import OpenSlideSlide
    from slidetl.slides.raster import RasterSlide

__all__ = ["Slide", "SlideInfo", "open_slide"]


def open_slide(
    path: str | Path,
    mpp_override: float | None = None,
    icc: bool = False,
    *,
    mpp_replace: float | Pair | None = None,
    channels: str = "",
) -> Slide:
    """Opens a slide of any format that OpenSlide reads, or an image. Use it as a context manager.

    Args:
        path: the slide; of several files, the one that the vendor's software would open. Or a PNG, JPEG,
            TIFF, OME-TIFF, or an image in an ``.npz`` (:mod:`slidetl.slides.npz`).
        mpp_override: micrometres per level-0 pixel along both axes, of a slide that says none.
        icc: convert colours to sRGB by the slide's ICC profile, if it has one.
        mpp_replace: the same, or that along x and y, instead of what the file says.
        channels: which planes of a TIFF are read that holds several and does not say which are red, green and
            blue: numbers from 0 or names, one or three, separated by commas.

    Raises:
        SlideOpenError: the file is missing, or not a slide that can be read.
        SpacingError: neither the file nor the caller gives a spacing that a microscope can have.
    """
    # Imported here: the library costs a tenth of a second, which `slidetl --help` need not pay.
    from slidetl.slides.raster import RasterSlide, is_raster

    path = Path(path)
    given = (path, mpp_override, mpp_replace)
    slide: RasterSlide | OpenSlideSlide
    if is_raster(path):
        slide = RasterSlide(*given, channels)
    else:
        from slidetl.slides.openslide import OpenSlideSlide

        try:
            slide = OpenSlideSlide(*given)
        except SlideOpenError as error:
            # What else is wrong (a file that was cut off) is wrong for every reader.
            if "Unsupported TIFF compression" not in str(error):
                raise
            try:
                slide = RasterSlide(*given, channels)
            except SlideOpenError as other:
                why = str(other).removeprefix(f"{path}: ")
                raise SlideOpenError(f"{error}; the TIFF reader says: {why}") from error
    profile = slide.colour_profile if icc else None
    if profile is None:
        return slide
    from slidetl.slides.colour import SrgbSlide

    return SrgbSlide(slide, profile)
