from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from slidetl.errors import AnnotationError, CacheMismatchError, UsageError
from slidetl.slides.turn import ViewerFrame
from slidetl.tiles.geojson import write_tissue
from slidetl.tiles.ledger import EXCLUDED, FAILED, USED, LedgerRow
from slidetl.tiles.polygons import Layer, Polygon
from slidetl.tiles.regions import (
    RegionOptions,
    Regions,
    RegionSource,
    find_regions,
    label_tiles,
    read_regions,
)
from slidetl.tiles.run import tile_slides
from slidetl.tiles.store import SlideCache, cache_path, shard_path
from slidetl.tiles.tile import SlideSource, tile_slide
from slidetl.tiles.verify import repair_cache, verify_cache
from tests.tiles.conftest import SPEC, Draw, tree

PLAIN = ViewerFrame((1024, 1024))
Areas = dict[str | None, list[Any]]


def box(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]


def write(path: Path, areas: Areas) -> Path:
    """Writes polygons by class as QuPath does."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {"objectType": "annotation"}
            | ({} if name is None else {"classification": {"name": name}}),
        }
        for name, polygons in areas.items()
        for rings in polygons
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def read(tmp_path: Path, areas: Areas, viewer: ViewerFrame = PLAIN, **options: Any) -> Regions:
    return read_regions(write(tmp_path / "S1.geojson", areas), RegionOptions(tmp_path, **options), viewer, "")


def area(regions: Regions) -> float:
    return float(regions.cover((64, 64), 8.0, (0.5, 0.5)).sum()) * 16 * 16


TWO: Areas = {
    "Tumor": [[box(0, 0, 320, 320), box(64, 64, 64, 64)]],
    "Stroma": [[box(320, 0, 320, 320)]],
    None: [[box(0, 640, 64, 64)]],
    "Ignore*": [[box(0, 0, 64, 1024)]],
}


class TestChoice:
    def test_all_but_what_is_to_be_ignored(self, tmp_path: Path) -> None:
        with pytest.raises(AnnotationError, match="no area that may be a region; it has nothing"):
            read(tmp_path, {})
        assert area(read(tmp_path, TWO)) == 640 * 320 - 64 * 64 - 64 * 320

    def test_classes(self, tmp_path: Path) -> None:
        tumor = 320 * 320 - 64 * 64
        assert area(read(tmp_path, TWO, include=("tumor ",))) == tumor - 64 * 320
        assert area(read(tmp_path, TWO, include=("Tumor", "Stroma"), exclude=())) == tumor + 320 * 320
        assert area(read(tmp_path, TWO, exclude=("Tumor", "Ignore*"))) == 320 * 320
        assert area(read(tmp_path, TWO, include=("Ignore*",))) == 64 * 1024
        found = read(tmp_path, TWO, include=("Tumor", "Necrosis"), exclude=("Pen",))
        assert found.notes == ("no region of class Necrosis", "no region of class Pen")
        with pytest.raises(AnnotationError) as caught:
            read(tmp_path, TWO, include=("Tumour",))
        assert str(caught.value).endswith(
            "no area of class Tumour; it has Tumor (1), Stroma (1), without a class (1), Ignore* (1)"
        )

    def test_options_that_contradict_themselves(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="both name tumor"):
            RegionOptions(tmp_path, include=("Tumor",), exclude=("tumor",))
        with pytest.raises(UsageError, match="--regions-share would have no effect without --regions DIR"):
            RegionOptions(share=0.5)
        for share in (0.0, 1.1, float("nan")):
            with pytest.raises(UsageError, match="regions-share must be above 0"):
                RegionOptions(tmp_path, share=share)

    def test_the_digest_is_of_what_is_used(self, tmp_path: Path) -> None:
        before = read(tmp_path, TWO)
        assert read(tmp_path, dict(reversed(TWO.items()))).digest == before.digest
        assert read(tmp_path, TWO, include=("Tumor", "Stroma", "")).digest == before.digest
        others = [
            read(tmp_path, TWO, share=0.5),
            read(tmp_path, TWO, include=("Tumor",)),
            read(tmp_path, TWO, exclude=()),
            read(tmp_path, TWO | {None: [[box(0, 640, 64, 65)]]}),
            read(tmp_path, TWO, ViewerFrame((1024, 1024), (1, 0))),
        ]
        assert len({before.digest, *(other.digest for other in others)}) == 6


class TestFrame:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_places_in_a_viewer_and_back(self, orientation: int) -> None:
        stored = np.arange(12).reshape(3, 4)
        image = Image.fromarray(stored.astype(np.uint8))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.info["exif"] = exif.tobytes()
        shown = np.asarray(ImageOps.exif_transpose(image))
        viewer = ViewerFrame((shown.shape[1], shown.shape[0]), orientation=orientation)
        centres = np.array([(x + 0.5, y + 0.5) for y in range(3) for x in range(4)])
        level0 = viewer.to_level0(centres)
        assert [shown[int(y), int(x)] for x, y in level0] == list(range(12))
        assert np.array_equal(viewer.from_level0(level0), centres)

    def test_qupath_crops_and_others_do_not(self, tmp_path: Path) -> None:
        viewer = ViewerFrame((1024, 1024), (100, 200))
        found = read(tmp_path, {None: [[box(1, 2, 10, 10)]]}, viewer)
        assert found.layers[0].areas[0][0][0].tolist() == [101, 202]
        assert found.notes == (
            "regions are placed as QuPath shows the slide, cropped to the scanned area and not turned",
        )
        text = "".join(
            f'<Coordinate Order="{n}" X="{x}" Y="{y}"/>' for n, (x, y) in enumerate(box(1, 2, 10, 10))
        )
        path = tmp_path / "S1.xml"
        path.write_text(
            f'<ASAP_Annotations><Annotation Type="Polygon"><Coordinates>{text}</Coordinates></Annotation>'
            "</ASAP_Annotations>"
        )
        asap = read_regions(path, RegionOptions(tmp_path), viewer, "mirax")
        assert asap.layers[0].areas[0][0][0].tolist() == [1, 2] and asap.notes == ()

    def test_another_slide_is_found_out(self, tmp_path: Path) -> None:
        assert read(tmp_path, {None: [[box(-5, -5, 1034, 1034)]]}).layers  # a brush at the border
        with pytest.raises(
            AnnotationError, match=r"reach to \(5010, 10\), the slide has 1024 x 1024 pixels at"
        ):
            read(tmp_path, {None: [[box(10, 10, 5000, 10)]]})
        with pytest.raises(AnnotationError, match="from the corner of the scanned area"):
            read(tmp_path, {None: [[box(1000, 0, 24, 24)]]}, ViewerFrame((1024, 1024), (100, 0)))

    def test_imagescope_turns_leica_slides(self, tmp_path: Path) -> None:
        vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in box(0, 0, 9, 9))
        path = tmp_path / "S1.xml"
        path.write_text(f"<Annotations><Annotation><Region>{vertices}</Region></Annotation></Annotations>")
        assert read_regions(path, RegionOptions(tmp_path), PLAIN, "aperio").layers
        with pytest.raises(AnnotationError, match="ImageScope turns and crops Leica slides"):
            read_regions(path, RegionOptions(tmp_path), PLAIN, "leica")


class TestNegative:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        regions = [
            ("Tumor", box(0, 0, 320, 320), 0),
            ("Tumor", box(64, 64, 128, 128), 1),
            ("Stroma", box(64, 64, 64, 64), 0),
            ("Ignore*", box(0, 0, 64, 320), 0),
            ("Ignore*", box(0, 0, 64, 160), 1),
        ]
        text = ""
        for name, corners, negative in regions:
            vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in corners)
            text += (
                f'<Annotation Name="{name}"><Region NegativeROA="{negative}">{vertices}</Region></Annotation>'
            )
        path = tmp_path / "S1.xml"
        path.write_text(f"<Annotations>{text}</Annotations>")
        return path

    def test_it_is_cut_out_of_its_own_class_alone(self, path: Path) -> None:
        def regions(**options: Any) -> Regions:
            return read_regions(path, RegionOptions(path.parent, **options), PLAIN, "aperio")

        tumor, stroma, ignored = 320 * 320 - 128 * 128, 64 * 64, 64 * 160
        assert area(regions(exclude=())) == tumor + stroma
        assert area(regions()) == tumor + stroma - ignored
        assert area(regions(include=("Tumor",), exclude=())) == tumor
        assert area(regions(include=("Stroma",))) == stroma
        assert area(regions(include=("Stroma",), exclude=("Tumor",))) == stroma
        assert area(regions(include=("Tumor",), exclude=("Stroma",))) == tumor
        found = regions()
        assert found.digest != replace(found, layers=found.layers[:1]).digest
        assert (
            found.digest
            != replace(found, layers=(Layer(*map(_joined, zip(*found.layers, strict=True))),)).digest
        )
        assert replace(found, layers=found.layers[::-1]).digest == found.digest

    def test_labels_know_it_too(self, path: Path) -> None:
        at = np.array([[0, 0], [0, 192], [64, 64]], np.int32)
        found, _ = label_tiles(path, ["Tumor", "Stroma"], 0.5, PLAIN, "aperio", at, (64, 64), (0.5, 0.5), 8.0)
        assert found.tolist() == [0, -1, 1]


def _joined(parts: Iterable[Sequence[Polygon]]) -> list[Polygon]:
    return [one for part in parts for one in part]


class TestNames:
    SLIDES = (("case_1", Path("a/S1.svs")), ("case_2", Path("b/S2.ome.tif")))

    def find(self, folder: Path, *names: str, missing: Any = "refuse") -> dict[str, str | None]:
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).write_text("{}")
        found = find_regions(RegionOptions(folder, missing=missing), self.SLIDES)
        return {name: source.path.name if source.path else None for name, source in found.items()}

    def test_by_identifier_or_file(self, tmp_path: Path) -> None:
        for one in ("case_1.geojson", "CASE 1.json", "S1.xml", "S1.svs.geojson", "s1.geojson.gz"):
            for two in ("case_2.json", "S2.geojson", "S2.ome.geojson", "S2.ome.tif.xml.gz"):
                assert self.find(tmp_path, one, two, "S3.geojson") == {"case_1": one, "case_2": two}
        assert find_regions(RegionOptions(), self.SLIDES) == {}

    def test_a_slide_without_a_file_is_never_whole_by_itself(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError) as caught:
            self.find(tmp_path, "S1.geojson", "S02.geojson")
        assert (
            "1 of 2 slides have no file of annotations: case_2 (files without a slide: S02.geojson)"
            in str(caught.value)
        )
        for missing in ("skip", "whole"):
            assert self.find(tmp_path, "S1.geojson", missing=missing) == {
                "case_1": "S1.geojson",
                "case_2": None,
            }
        with pytest.raises(UsageError, match="no such folder"):
            find_regions(RegionOptions(tmp_path / "none"), self.SLIDES)

    def test_what_does_not_pair_off_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"several files for slide case_1: case_1\.geojson, S1\.geojson"):
            self.find(tmp_path, "S1.geojson", "case_1.geojson", "S2.geojson")
        slides = [("a", Path("a/S1.svs")), ("b", Path("b/S1.svs"))]
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "S1.json").write_text("{}")
        with pytest.raises(UsageError, match=r"S1\.json fits the slides a, b; name it by the identifier"):
            find_regions(RegionOptions(tmp_path), slides)


class TestTiling:
    @pytest.fixture
    def tiled(self, source: SlideSource, tmp_path: Path) -> Callable[..., LedgerRow]:
        """Tiles the slide within the left 320 pixels and four tiles in a corner, or other areas."""

        def run(areas: Areas | None = None, overwrite: bool = False, **options: Any) -> LedgerRow:
            if areas is None:
                areas = {"Tumor": [[box(0, 0, 320, 1024)]], "Necrosis": [[box(0, 0, 128, 128)]]}
            path = write(tmp_path / "regions" / "S1.geojson", areas)
            options = {"exclude": ("Necrosis",)} | options
            annotated = RegionSource(path, RegionOptions(path.parent, **options))
            return tile_slide(
                replace(source, regions=annotated),
                tmp_path,
                SPEC,
                overwrite,
                preview=options["exclude"] == (),
            )

        return run

    def test_only_tiles_inside_are_kept(
        self, tiled: Callable[..., LedgerRow], source: SlideSource, tmp_path: Path
    ) -> None:
        row = tiled()
        cache = SlideCache.open(cache_path(tmp_path, "S1"))
        whole = tile_slide(source, tmp_path / "whole", SPEC)
        every = SlideCache.open(cache_path(tmp_path / "whole", "S1"))
        assert (row.status, row.tiles, row.tiles_outside_regions) == (USED, 5 * 16 - 4, 192 - 76)
        assert row.tiles_without_tissue == whole.tiles_without_tissue
        assert row.regions == f"S1.geojson {cache.header.regions[:12]}"
        assert (whole.regions, whole.tiles_outside_regions) == ("", 0)
        x, y = every.origins_level0.T
        is_inside = (x < 320) & ~((x < 128) & (y < 128))
        assert np.array_equal(cache.origins_level0, every.origins_level0[is_inside])
        assert np.array_equal(cache.read(range(76)), every.read(np.flatnonzero(is_inside)))

    def test_the_least_share(self, tiled: Callable[..., LedgerRow]) -> None:
        areas: Areas = {None: [[box(0, 0, 80, 1024)]]}  # a quarter of the second column
        assert tiled(areas, share=0.25).tiles == 32
        assert tiled(areas, share=0.26, overwrite=True).tiles == 16
        assert tiled({None: [[box(0, 0, 79.9, 1024)]]}, overwrite=True).tiles == 16

    def test_an_edited_annotation_means_tiling_again(
        self, tiled: Callable[..., LedgerRow], source: SlideSource, tmp_path: Path
    ) -> None:
        first = tiled()
        before = tree(cache_path(tmp_path, "S1"))
        again = tiled()
        assert (again.status, again.tiles, again.regions) == (USED, 76, first.regions)
        edited: Areas = {"Tumor": [[box(0, 0, 256, 1024)]]}
        failed = tiled(edited)
        assert failed.status == FAILED and "made from other regions of this slide; replace" in failed.reason
        assert tree(cache_path(tmp_path, "S1")) == before
        whole = tile_slide(source, tmp_path, SPEC)
        assert whole.status == FAILED and "made from regions of this slide" in whole.reason
        assert tiled(edited, overwrite=True).tiles == 4 * 16
        assert tile_slide(source, tmp_path, SPEC, overwrite=True).tiles == 192
        assert "made from all of this slide" in tiled().reason

    def test_a_killed_run_of_other_regions_is_not_continued(
        self, tiled: Callable[..., LedgerRow], tmp_path: Path
    ) -> None:
        tiled()
        header = SlideCache.open(cache_path(tmp_path, "S1")).header
        assert header.identity() != replace(header, regions="0" * 64).identity()
        assert header.from_attributes(header.to_attributes()) == header

    def test_faults_are_the_slides(self, tiled: Callable[..., LedgerRow], tmp_path: Path) -> None:
        row = tiled({"Stroma": [[box(0, 0, 99, 99)]]}, include=("Tumor",))
        assert row.status == FAILED and "no area of class Tumor; it has Stroma (1)" in row.reason
        row = tiled({None: [[box(0, 0, 5000, 99)]]})
        assert row.status == FAILED and "reach to (5000, 0), the slide has 1024 x 1024" in row.reason
        row = tiled({None: [[box(900, 0, 100, 100)]]})  # on glass
        assert (row.status, row.tiles_outside_regions) == (EXCLUDED, 192)
        assert (
            row.reason
            == "no tile with tissue is good enough and 25% inside the regions (outside regions 192)"
        )

    def test_slides_without_a_file(self, source: SlideSource, tmp_path: Path) -> None:
        def run(missing: Any, overwrite: bool = False) -> LedgerRow:
            annotated = RegionSource(None, RegionOptions(tmp_path, missing=missing))
            return tile_slide(replace(source, regions=annotated), tmp_path, SPEC, overwrite)

        assert (run("skip").status, run("skip").reason) == (EXCLUDED, "no file of annotations")
        row = run("whole")
        assert (row.tiles, row.note) == (192, "no file of annotations, tiled whole")
        assert run("skip").status == FAILED and cache_path(tmp_path, "S1").exists()
        assert run("skip", overwrite=True).status == EXCLUDED and not cache_path(tmp_path, "S1").exists()

    def test_a_run_refuses_before_any_work(
        self, tiled: Callable[..., LedgerRow], source: SlideSource, tmp_path: Path
    ) -> None:
        tiled()
        with pytest.raises(
            CacheMismatchError, match=r"S1\.zarr: the cache was made with --regions; so are 1"
        ):
            tile_slides([source], tmp_path, SPEC, workers=0)

    def test_a_slide_that_is_gone_keeps_the_tiles_of_its_regions_only(
        self, tiled: Callable[..., LedgerRow], source: SlideSource, tmp_path: Path
    ) -> None:
        tiled()
        options = RegionOptions(tmp_path / "regions", exclude=("Necrosis",))
        annotated = replace(source, regions=RegionSource(tmp_path / "regions" / "S1.geojson", options))
        assert tile_slides([annotated], tmp_path, SPEC, workers=0)[0].tiles == 76
        source.path.rename(source.path.with_suffix(".away"))
        with pytest.warns(UserWarning, match="their tiles are kept"):
            assert tile_slides([annotated], tmp_path, SPEC, workers=0)[0].tiles == 76
        write(tmp_path / "regions" / "S1.geojson", {"Tumor": [[box(0, 0, 256, 1024)]]})
        (row,) = tile_slides([annotated], tmp_path, SPEC, workers=0, overwrite=True)
        assert row.status == FAILED and "no such file" in row.reason

    def test_damage_in_regions_is_mended(
        self, tiled: Callable[..., LedgerRow], source: SlideSource, tmp_path: Path
    ) -> None:
        tiled()
        path = cache_path(tmp_path, "S1")
        before = tree(path)
        shard = bytearray(shard_path(path, 0).read_bytes())
        shard[5] ^= 64
        shard_path(path, 0).write_bytes(shard)
        found = verify_cache(path)
        assert not found.is_sound
        assert repair_cache(found, source.path).is_sound
        assert tree(path) == before

    def test_the_preview_shows_the_regions(self, tiled: Callable[..., LedgerRow], tmp_path: Path) -> None:
        tiled(exclude=())
        with Image.open(tmp_path / "previews" / "S1.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        edge = (pixels == (230, 0, 200)).all(2)
        columns = np.flatnonzero(edge[: pixels.shape[1]].any(0))
        assert columns.max() == pytest.approx(320 / 1024 * 600, abs=12)


def test_a_turned_slide_keeps_its_tiles_through_qupath(tmp_path: Path, tissue_picture: Draw) -> None:
    """Its tissue, as QuPath shows the file, comes back as regions."""
    picture = tissue_picture(512)[:384]
    path = tmp_path / "S1.tif"
    tifffile.imwrite(
        path,
        picture,
        photometric="rgb",
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
        extratags=[(274, 3, 1, 6, True)],
        metadata=None,
    )
    row = tile_slide(SlideSource("S1", path), tmp_path / "whole", SPEC)
    assert (row.width, row.height) == (384, 512)
    cache = SlideCache.open(cache_path(tmp_path / "whole", "S1"))
    write_tissue(cache, tmp_path / "regions" / "S1.geojson")
    drawn = json.loads((tmp_path / "regions" / "S1.geojson").read_text())["features"]
    points = np.concatenate([ring for piece in drawn for ring in piece["geometry"]["coordinates"]])
    # The picture's tissue is at the left of the stored rows, up to three quarters of its width.
    assert points.min(0).tolist() == [0, 0] and points.max(0) == pytest.approx([384, 384], abs=16)
    annotated = RegionSource(tmp_path / "regions" / "S1.geojson", RegionOptions(tmp_path / "regions"))
    again = tile_slide(SlideSource("S1", path, regions=annotated), tmp_path / "cache", SPEC)
    assert (again.tiles, again.tiles_outside_regions) == (row.tiles, 0) and row.tiles == 36
    found = SlideCache.open(cache_path(tmp_path / "cache", "S1"))
    assert np.array_equal(found.origins_level0, cache.origins_level0)
    half: Areas = {
        None: [[box(0, 0, 192, 384)]]
    }  # the left half of the stored picture: the upper one, turned
    write(tmp_path / "regions" / "S1.geojson", half)
    tile_slide(SlideSource("S1", path, regions=annotated), tmp_path / "half", SPEC)
    found = SlideCache.open(cache_path(tmp_path / "half", "S1"))
    upper = cache.origins_level0[cache.origins_level0[:, 1] < 192]
    assert np.array_equal(found.origins_level0, upper) and 0 < len(upper) < len(cache)


def labels(
    path: Path, classes: tuple[str, ...], least: float = 0.5, viewer: ViewerFrame = PLAIN
) -> NDArray[np.int64]:
    origins = np.array([(x, y) for y in (0, 64, 128) for x in (0, 64, 128)], np.int32)
    return label_tiles(path, classes, least, viewer, "", origins, (64.0, 64.0), (0.5, 0.5), 4.0)[0]


def test_tiles_have_the_class_of_the_largest_share(tmp_path: Path) -> None:
    areas: Areas = {
        "Tumor": [[box(0, 0, 128, 96), box(64, 0, 64, 40)]],
        "Stroma": [[box(64, 0, 64, 32)], [box(128, 0, 64, 64)], [box(130, 2, 9, 9)]],
        "Fat": [[box(0, 128, 64, 64)]],
    }
    path = write(tmp_path / "S1.geojson", areas)
    # Above: tumour; stroma 0.5 and tumour 0.375; stroma. Below: half tumour, twice.
    assert labels(path, ("stroma", "Tumor")).tolist() == [1, 0, 0, 1, 1, -1, -1, -1, -1]
    assert labels(path, ("Stroma", "Tumor", "Fat"), 0.51).tolist() == [1, -1, 0, -1, -1, -1, 2, -1, -1]
    write(tmp_path / "S2.geojson", areas | {"Ignore*": [[box(0, 0, 40, 64)]]})
    assert labels(tmp_path / "S2.geojson", ("stroma", "Tumor")).tolist()[:4] == [-1, 0, 0, 1]
    shifted = labels(path, ("Tumor", "Fat"), viewer=ViewerFrame((1024, 1024), (64, 0)))
    assert shifted.tolist() == [-1, 0, -1, -1, 0, 0, -1, 1, -1]
    found, others = label_tiles(
        *(
            path,
            ("Tumour", "stroma"),
            0.5,
            PLAIN,
            "",
            np.zeros((1, 2), np.int32),
            (64.0, 64.0),
            (0.5, 0.5),
            4.0,
        )
    )
    assert found.tolist() == [-1] and others == {"Tumor", "Fat"}
