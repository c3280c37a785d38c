from __future__ import annotations

from pathlib import Path

import pytest

from slidetl.errors import SlideOpenError
from slidetl.slides import open_slide
from slidetl.slides.unread import UNREAD


@pytest.mark.parametrize("suffix", [".isyntax", ".VSI", ".kfb", ".sdpc"])
def test_formats_that_are_not_read_name_a_converter(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"\0" * 1000)
    with pytest.raises(SlideOpenError, match=r"is not read: convert it by"):
        open_slide(tmp_path / f"a{suffix}")


def test_a_zarr_that_is_no_image_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(SlideOpenError, match="without the multiscales of an OME-Zarr is not read"):
        open_slide(tmp_path / "a.zarr")


def test_the_reference_lists_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "slides.md").read_text()
    for suffix in UNREAD:
        assert f"`{suffix}`" in page
