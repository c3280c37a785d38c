"""Slides: images with a physical spacing. :func:`open_slide` picks the reader."""

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
    """Opens a slide of any OpenSlide format, or an image. Use it as a context manager.

    Args:
        path: the slide; of several files, the one opened by the vendor's software, of DICOM any one or the
            folder of its series. Or a PNG, JPEG, TIFF,
            OME-TIFF, the folder of an OME-Zarr, or an image in an ``.npz`` (:mod:`slidetl.slides.npz`).
        mpp_override: micrometres per level-0 pixel along both axes, for a slide without a spacing.
        icc: convert colours to sRGB by the slide's ICC profile, if it has one.
        mpp_replace: micrometres per level-0 pixel, or those along x and y, instead of the file's.
        channels: planes to read of a TIFF with several, not known as red, green and blue: numbers from 0 or
            names, one or three, separated by commas.

    Raises:
        SlideOpenError: the file is missing, or not a readable slide.
        SpacingError: neither the file nor the caller gives a plausible spacing for a microscope.
    """
    # Imported here: `slidetl --help` need not pay this tenth of a second.
    from slidetl.slides.raster import RasterSlide, is_raster

    path = Path(path)
    given = (path, mpp_override, mpp_replace)
    slide: RasterSlide | OpenSlideSlide
    if is_raster(path):
        slide = RasterSlide(*given, channels)
    else:
        from slidetl.slides.dicom import SLIDE, first_instance, modality
        from slidetl.slides.openslide import OpenSlideSlide

        if (kind := modality(path) if path.is_dir() else "") not in ("", SLIDE):
            raise SlideOpenError(
                f"{path}: a DICOM series of modality {kind}, not a slide (SM); CT series are tiled with "
                "--spacing-mm instead of --mpp"
            )
        if path.is_dir():
            path = first_instance(path) or path
            given = (path, mpp_override, mpp_replace)
        try:
            slide = OpenSlideSlide(*given)
        except SlideOpenError as error:
            # Other defects (a truncated file) are the same for every reader.
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
