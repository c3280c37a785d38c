from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from slidetl.data.manifest import read_manifest
from slidetl.errors import ManifestError, SlideOpenError, SlideReadError, SpacingError
from slidetl.slides import open_slide
from slidetl.slides.base import Slide
from slidetl.slides.ngff import is_ngff
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import file_state
from slidetl.tiles.run import tile_slides
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.tiles.tile import SlideSource
from tests.conftest import block_means
from tests.contracts.slide import Picture, SlideContract
from tests.slides.test_raster import noise

COLOURS = [{"label": "", "color": colour} for colour in ("FF0000", "00FF00", "0000FF")]


def write(
    path: Path,
    levels: list[NDArray[Any]],
    axes: str = "cyx",
    version: str = "0.5",
    spacing: tuple[float, str | None] = (0.5, "micrometer"),
    channels: list[dict[str, str]] | None = COLOURS,
    **options: Any,
) -> Path:
    """Writes levels as an OME-Zarr, as ``ome-zarr-py`` lays it out."""
    is_old = version == "0.4"
    root = zarr.open_group(path, mode="w", zarr_format=2 if is_old else 3)
    options = {"chunks": (*(1,) * (levels[0].ndim - 2), 96, 128), **options}
    for number, level in enumerate(levels):
        root.create_array(str(number), data=level, **options)
    kinds = {"t": "time", "c": "channel"}
    unit = {"unit": spacing[1]} if spacing[1] else {}
    listed = [
        {"name": axis, "type": kinds.get(axis, "space"), **(unit if axis in "yx" else {})} for axis in axes
    ]
    sets = [
        {
            "path": str(number),
            "coordinateTransformations": [
                {
                    "type": "scale",
                    "scale": [
                        spacing[0] * levels[0].shape[-1] / level.shape[-1] if axis in "yx" else 1.0
                        for axis in axes
                    ],
                }
            ],
        }
        for number, level in enumerate(levels)
    ]
    about: dict[str, Any] = {"multiscales": [{"axes": listed, "datasets": sets, "name": "slide"}]}
    if is_old:
        about["multiscales"][0]["version"] = version
    if channels is not None:
        about["omero"] = {"channels": channels}
    root.attrs.update(about if is_old else {"ome": {"version": version, **about}})
    return path


def planes(picture: Picture) -> Picture:
    return np.moveaxis(picture, 2, 0)


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the description of a group, or of its first level."""
    about = json.loads(path.read_text())
    edit(about)
    path.write_text(json.dumps(about))


class NgffContract(SlideContract):
    @pytest.fixture
    def picture(self) -> Picture:
        return noise(320, 360)


class TestVersion5(NgffContract):
    @pytest.fixture
    def slide(self, picture: Picture, tmp_path: Path) -> Iterator[Slide]:
        path = write(tmp_path / "a.ome.zarr", [planes(p) for p in (picture, block_means(picture, 2))])
        with open_slide(path) as slide:
            assert len(slide.info.mpp_levels) == 2 and slide.info.vendor == "ome-zarr"
            yield slide


class TestVersion4(NgffContract):
    @pytest.fixture
    def slide(self, picture: Picture, tmp_path: Path) -> Iterator[Slide]:
        path = tmp_path / "a.zarr"
        five = planes(picture)[None, :, None]
        names = [{"label": name, "color": "FFFFFF"} for name in ("Blue", "Green", "Red")]
        write(path, [five[:, ::-1]], "tczyx", "0.4", (500.0, "nanometer"), names)
        with open_slide(path) as slide:
            yield slide


class TestGreyInShards(NgffContract):
    @pytest.fixture
    def picture(self) -> Picture:
        return np.repeat(noise(320, 360)[..., :1], 3, axis=2)

    @pytest.fixture
    def slide(self, picture: Picture, tmp_path: Path) -> Iterator[Slide]:
        options: dict[str, Any] = {"chunks": (64, 64), "shards": (192, 256)}
        with open_slide(
            write(tmp_path / "a.zarr", [picture[..., 0]], "yx", channels=None, **options)
        ) as slide:
            yield slide


def test_channels_without_names_of_colours_are_chosen(tmp_path: Path) -> None:
    picture = noise(200, 300)
    stains = [
        {"label": name, "color": c["color"]} for name, c in zip(("DAPI", "CD3", "CD8"), COLOURS, strict=True)
    ]
    path = write(tmp_path / "a.zarr", [planes(picture)], channels=stains)
    with pytest.raises(SlideOpenError, match=r"found 3 channels \(0 DAPI, 1 CD3, 2 CD8\); choose"):
        open_slide(path)
    with open_slide(path, channels="CD8,0,1") as slide:
        assert np.array_equal(slide.read((0, 0), (300, 200), 0.5), picture[..., [2, 0, 1]])
    path = write(tmp_path / "b.zarr", [planes(picture)], channels=None, chunks=(3, 64, 64))
    with open_slide(path, channels="1") as slide:
        assert np.array_equal(slide.read((0, 0), (300, 200), 0.5), picture[..., [1, 1, 1]])


def test_sixteen_bits_of_either_byte_order_are_scaled(tmp_path: Path) -> None:
    picture = noise(200, 300)
    deep = (planes(picture).astype(np.uint16) * 257).astype(">u2")
    with open_slide(write(tmp_path / "a.zarr", [deep], version="0.4")) as slide:
        assert np.array_equal(slide.read((0, 0), (300, 200), 0.5), picture)
        assert slide.info.notes == ("samples of 16 bits hold 16, and are scaled to 8",)


@pytest.mark.parametrize("spacing", [(0.5, None), (1.0, "pixel"), (0.0, "micrometer"), (-1.0, "micrometer")])
def test_a_scale_without_a_length_is_no_spacing(tmp_path: Path, spacing: tuple[float, str | None]) -> None:
    path = write(tmp_path / "a.zarr", [planes(noise(200, 300))], spacing=spacing)
    with pytest.raises(SpacingError, match="does not say how many micrometres"):
        open_slide(path)
    with open_slide(path, 0.3) as slide:
        assert slide.info.mpp_level0 == (0.3, 0.3)


def test_the_scale_of_all_levels_counts_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", [planes(noise(200, 300))])

    def double(about: dict[str, Any]) -> None:
        more = [{"type": "scale", "scale": [1, 2, 2]}]
        about["attributes"]["ome"]["multiscales"][0]["coordinateTransformations"] = more

    change(path / "zarr.json", double)
    with open_slide(path) as slide:
        assert slide.info.mpp_level0 == (1.0, 1.0)


def test_the_first_of_several_pictures_is_read(tmp_path: Path) -> None:
    picture = noise(200, 300)
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    write(tmp_path / "a.zarr" / "0", [planes(picture)], version="0.4")
    write(tmp_path / "a.zarr" / "1", [planes(picture[:50, :60])], version="0.4")
    write(tmp_path / "a.zarr" / "2", [planes(picture[:150])], version="0.4")
    with open_slide(tmp_path / "a.zarr") as slide:
        assert np.array_equal(slide.read((0, 0), (300, 200), 0.5), picture)
        assert slide.info.notes == ("of 2 pictures in it the first alone is read",)
    (tmp_path / "a.zarr" / "0").rename(tmp_path / "a.zarr" / "3")
    (tmp_path / "a.zarr" / "1").rename(tmp_path / "a.zarr" / "0")
    says = "one of 60 x 50 pixels before one of 300 x 200; name the folder of the one meant"
    with pytest.raises(SlideOpenError, match=says):
        open_slide(tmp_path / "a.zarr")
    with open_slide(tmp_path / "a.zarr" / "3") as slide:
        assert slide.info.size_level0 == (300, 200)
    (tmp_path / "a.zarr" / "3" / "0" / ".zarray").unlink()
    with pytest.raises(SlideOpenError, match="picture 3 in it has no sizes, and may be the slide"):
        open_slide(tmp_path / "a.zarr")


def test_depth_and_time_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", [np.zeros((2, 1, 3, 200, 300), np.uint8)], "tczyx")
    with pytest.raises(SlideOpenError, match="found 3 in depth and 2 in time"):
        open_slide(path)


def _path(value: object) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        def edit(about: dict[str, Any]) -> None:
            about["attributes"]["ome"]["multiscales"][0]["datasets"][0]["path"] = value

        change(path / "zarr.json", edit)

    return spoil


def _codec(path: Path) -> None:
    change(path / "0" / "zarr.json", lambda about: about["codecs"].append({"name": "numcodecs.pickle"}))


def _link(path: Path) -> None:
    chunk = next(p for p in (path / "0" / "c").rglob("*") if p.is_file())
    chunk.unlink()
    chunk.symlink_to("/etc/hostname")


def _pipe(path: Path) -> None:
    os.mkfifo(path / "0" / "c" / "pipe")


def _piece(path: Path) -> None:
    def edit(about: dict[str, Any]) -> None:
        about["chunk_grid"]["configuration"]["chunk_shape"] = [1, 10**6, 10**6]

    change(path / "0" / "zarr.json", edit)


def _kind(path: Path) -> None:
    change(path / "0" / "zarr.json", lambda about: about.update(data_type="float32", fill_value=0.0))


def _axes(path: Path) -> None:
    def edit(about: dict[str, Any]) -> None:
        about["attributes"]["ome"]["multiscales"][0]["axes"].reverse()

    change(path / "zarr.json", edit)


def _nothing(path: Path) -> None:
    change(path / "zarr.json", lambda about: about["attributes"]["ome"].update(multiscales=[]))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_path("../b.zarr/0"), "path of a level in its folder"),
        (_path("/etc"), "path of a level in its folder"),
        (_path(7), "path of a level in its folder"),
        (_path("9"), "an array of a level is missing"),
        (_codec, "compressed by 'numcodecs.pickle', which is not read"),
        (_link, "is a link or a pipe"),
        (_pipe, "is a link or a pipe"),
        (_piece, "too large to decode"),
        (_kind, "pixels of 8 or 16 bits"),
        (_axes, "expected axes of t, c, z, y and x"),
        (_nothing, "expected the multiscales"),
    ],
)
def test_a_hostile_or_damaged_description_is_one_line(
    tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    path = write(tmp_path / "a.zarr", [planes(noise(200, 300))])
    spoil(path)
    with pytest.raises(SlideOpenError, match=said) as failure:
        open_slide(path)
    assert str(failure.value).startswith(f"{path}: ") and "\n" not in str(failure.value)


def test_pickles_of_zarr_2_are_not_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", [planes(noise(200, 300))], version="0.4")
    change(path / "0" / ".zarray", lambda about: about.update(filters=[{"id": "pickle", "protocol": 5}]))
    with pytest.raises(SlideOpenError, match="compressed by 'pickle'"):
        open_slide(path)


def test_a_damaged_chunk_costs_its_tile(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", [planes(noise(200, 300))])
    chunk = next(p for p in sorted((path / "0" / "c").rglob("*")) if p.is_file())
    chunk.write_bytes(b"\0" * 40)
    with open_slide(path) as slide:
        with pytest.raises(SlideReadError, match="cannot be read"):
            slide.read((0, 0), (32, 32), 0.5)
        assert slide.read((200, 120), (32, 32), 0.5).shape == (32, 32, 3)


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    picture = noise(200, 300)
    paths = [
        write(tmp_path / f"{n}.zarr", [planes(p)]) for n, p in enumerate((picture, picture, picture[::-1]))
    ]
    one, two, other = (open_slide(path).info.fingerprint for path in paths)
    assert one == two != other
    (paths[1] / "0" / ".AppleDouble").mkdir()
    for name in (".DS_Store", "0/._c", "0/.AppleDouble/zarr.json", "Thumbs.db", "0/desktop.ini"):
        (paths[1] / name).write_bytes(b"x")
    assert open_slide(paths[1]).info.fingerprint == one
    (paths[1] / "labels.xml").write_bytes(b"x")
    assert open_slide(paths[1]).info.fingerprint != one


def test_a_folder_of_them_is_listed_and_a_cache_is_not(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.ome.zarr", [planes(noise(256, 320))])
    (row,) = read_manifest(tmp_path / "in").rows
    assert row.slide_id == "a.ome" and file_state(row.path) is not None
    assert read_manifest(tmp_path / "in" / "a.ome.zarr").rows == (row,)
    (done,) = tile_slides(
        [SlideSource("a", row.path)], tmp_path / "cache", TileSpec(1.0, 32, min_tissue=0), workers=0
    )
    assert (done.status, done.vendor) == ("used", "ome-zarr")
    group = cache_path(tmp_path / "cache", "a")
    assert len(SlideCache.open(group)) == 20 and not is_ngff(group)
    group.rename(tmp_path / "in" / "b.zarr")  # even away from its ledger
    with pytest.warns(UserWarning, match=r"left out files in formats that are not read here \(1: .zarr 1\)"):
        assert read_manifest(tmp_path / "in").rows == (row,)
    (tmp_path / "none").mkdir()
    (tmp_path / "in" / "b.zarr").rename(tmp_path / "none" / "b.zarr")
    with pytest.raises(ManifestError, match="no slides in this folder"):
        read_manifest(tmp_path / "none")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("options", [{}, {"chunks": (3, 32, 32), "shards": (3, 96, 128)}])
def test_pieces_that_are_not_there_are_noted(tmp_path: Path, version: str, options: dict[str, Any]) -> None:
    if version == "0.4" and options:
        options = {"chunks": (3, 96, 128)}  # without shards
    path = write(tmp_path / "a.zarr", [planes(noise(288, 256))], version=version, **options)
    (path / "0" / ".DS_Store").touch()
    with open_slide(path) as slide:
        assert slide.info.notes == ()
    pieces = sorted(p for p in (path / "0").rglob("*") if p.is_file() and p.name[0].isdecimal())
    for piece in pieces[:2]:
        piece.unlink()
    with open_slide(path) as slide:
        assert slide.info.notes == (
            f"2 of {len(pieces)} pieces of level 0 are not in its folder, and count as blank (right for a "
            "sparse image, else copy it again)",
        )


def pyramid(path: Path, picture: Picture, version: str = "0.5", **options: Any) -> Path:
    levels = [planes(block_means(picture, factor)) for factor in (1, 2, 4)]
    return write(path, levels, version=version, chunks=(1, 32, 32), **options)


def piece(path: Path, level: int, *place: int, version: str = "0.5") -> Path:
    return (
        path
        / str(level)
        / ("c/" if version == "0.5" else "")
        / ("/" if version == "0.5" else ".").join(map(str, place))
    )


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("level", [1, 2])
def test_a_piece_lost_from_a_coarser_level_is_refused(tmp_path: Path, version: str, level: int) -> None:
    path = pyramid(tmp_path / "a.zarr", noise(256, 256), version)
    piece(path, level, 2, 1, 1, version=version).unlink()
    says = f"a piece of level {level} .row 1, column 1. is not in its folder, and level {level - 1} shows"
    with pytest.raises(SlideOpenError, match=says):
        open_slide(path)


def test_holes_that_all_levels_share_are_noted(tmp_path: Path) -> None:
    picture = noise(256, 256)
    picture[128:, 128:] = 0
    picture[200, 200] = 1  # and vanishes in the next level
    path = pyramid(tmp_path / "a.zarr", picture)
    assert not piece(path, 1, 0, 3, 3).exists() and piece(path, 0, 0, 6, 6).exists()
    with open_slide(path) as slide:
        (note,) = slide.info.notes
        assert note.startswith("45 of 192 pieces of level 0 are not in its folder")
        assert not slide.read((128, 128), (64, 64), 1.0).any()


def test_pieces_may_be_named_with_points(tmp_path: Path) -> None:
    path = pyramid(
        tmp_path / "a.zarr", noise(64, 64), chunk_key_encoding={"name": "default", "separator": "."}
    )
    assert (path / "0" / "c.0.1.1").exists()
    with open_slide(path) as slide:
        assert slide.info.notes == ()
