"""Slides: something readable at a physical spacing. :func:`open_slide` picks the reader."""

from __future__ import annotations

from pathlib import Path

from slidetl.slides.base import Slide, SlideInfo

__all__ = ["Slide", "SlideInfo", "open_slide"]


def open_slide(path: str | Path, mpp_override: float | None = None) -> Slide:
    """Opens a slide of any format that OpenSlide reads. Use it as a context manager.

    Args:
        path: the slide; of several files, the one that the vendor's software would open.
        mpp_override: micrometres per level-0 pixel along both axes, instead of what the file says.

    Raises:
        SlideOpenError: the file is missing, or not a slide that can be read.
        SpacingError: the file gives no physical spacing, and there is no ``mpp_override``.
    """
    # Imported here: the library costs a tenth of a second, which `slidetl --help` need not pay.
    from slidetl.slides.openslide import OpenSlideSlide

    return OpenSlideSlide(Path(path), mpp_override)
