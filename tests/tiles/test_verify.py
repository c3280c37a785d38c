from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from slidetl.errors import CacheCorruptError, CacheMismatchError, CacheMissingError
from slidetl.slides import open_slide
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import FAILED, USED, Ledger, LedgerRow
from slidetl.tiles.plan import plan_tiles
from slidetl.tiles.run import tile_slides
from slidetl.tiles.store import SlideCache, cache_path, seal_node
from slidetl.tiles.tile import SlideSource, write_tiles
from slidetl.tiles.verify import repair_cache, verify_cache
from tests.conftest import Picture, PyramidTiff
from tests.slides.jpeg_tiff import write_jpeg_tiff
from tests.tiles.conftest import damaged, tree

Draw = Callable[..., Picture]
Tiled = tuple[Path, SlideSource, LedgerRow]


@pytest.fixture(scope="module", params=["jpeg", "zstd"])
def sound(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tissue_picture: Draw
) -> Tiled:
    """A cache of three shards, the last not full."""
    folder = tmp_path_factory.mktemp("sound")
    slide = folder / "slide.tiff"
    with tifffile.TiffWriter(slide) as file:
        file.write(
            tissue_picture(1024),
            tile=(256, 256),
            photometric="rgb",
            compression="deflate",
            resolution=(2e4, 2e4),
            resolutionunit="CENTIMETER",
            software="test",
        )
    source = SlideSource("S1", slide)
    spec = TileSpec(mpp=0.5, tile_size_px=32, codec=request.param)
    (row,) = tile_slides([source], folder / "cache", spec, workers=0)
    assert row.status == USED and row.tiles > 600
    return cache_path(folder / "cache", "S1"), source, row


@pytest.fixture
def tiled(sound: Tiled, tmp_path: Path) -> Tiled:
    path, source, row = sound
    return Path(shutil.copytree(path, tmp_path / path.name)), source, row


def flip(path: Path, place: int, with_: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= with_
    path.write_bytes(data)


def test_a_sound_cache_is_found_sound(sound: Tiled) -> None:
    path, _, row = sound
    found = verify_cache(path, row)
    assert found.is_sound
    assert found.header == SlideCache.open(path).header
    assert (found.tiles, found.bytes) == (row.tiles, sum(len(data) for data in tree(path).values()))


@pytest.mark.slow
def test_a_flip_of_any_byte_of_any_file_is_found(sound: Tiled, tmp_path: Path) -> None:
    path = Path(shutil.copytree(sound[0], tmp_path / sound[0].name))
    rng = random.Random(0)
    for name, data in tree(path).items():
        # Where they begin and end, and at random.
        for place in (0, 1, len(data) - 5, len(data) - 1, *(rng.randrange(len(data)) for _ in range(16))):
            flip(path / name, place, flipped := rng.randrange(1, 256))
            found = verify_cache(path).findings
            assert [finding.file for finding in found] == [name], (name, place, flipped)
            (path / name).write_bytes(data)
    assert verify_cache(path).is_sound


@pytest.mark.slow
def test_every_byte_of_the_groups_own_document_counts(tiled: Tiled) -> None:
    path = tiled[0]
    for name in ("zarr.json", "tiles/zarr.json"):
        data = (path / name).read_bytes()
        for place in range(0, len(data), 23):
            flip(path / name, place)
            assert name in [finding.file for finding in verify_cache(path).findings], (name, place)
            (path / name).write_bytes(data)


@pytest.mark.slow
def test_each_file_is_mended_byte_for_byte(tiled: Tiled) -> None:
    path, source, row = tiled
    before = tree(path)
    rng = random.Random(1)
    for name, data in before.items():
        flip(path / name, rng.randrange(len(data)))
        found = verify_cache(path, row)
        assert not found.is_sound
        assert repair_cache(found, source.path).is_sound
        assert tree(path) == before, name


def test_a_damaged_tile_is_named_and_only_it_is_made_again(tiled: Tiled) -> None:
    path, source, _ = tiled
    before = tree(path)
    shard = "tiles/c/1/0/0/0"
    flip(path / shard, 100)
    (finding,) = verify_cache(path).findings
    assert (finding.file, finding.tiles) == (shard, (256,))
    assert str(finding) == f"{shard}: tile 256 fails its checksum"
    assert repair_cache(verify_cache(path), source.path).is_sound
    assert tree(path) == before


def test_a_tile_that_is_damaged_in_the_slide_is_left_out_and_not_made_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(60, 200, (320, 320, 3)).astype(np.uint8)
    slide = write_jpeg_tiff(tmp_path / "slide.tiff", picture, mpp=1.0)
    data = bytearray(slide.read_bytes())
    with tifffile.TiffFile(slide) as file:
        at, count = (values[3] for values in (file.pages.first.dataoffsets, file.pages.first.databytecounts))
    data[at + count - 900 : at + count - 880] = bytes(20)  # too short to be found by a copy
    slide.write_bytes(data)
    spec = TileSpec(mpp=1.0, tile_size_px=64, min_tissue=0)
    tile_slides([SlideSource("S1", slide)], tmp_path / "cache", spec, workers=0)
    path = cache_path(tmp_path / "cache", "S1")
    found = verify_cache(path, decode=True)
    assert (found.tiles, [finding.tiles for finding in found.findings]) == (25, [(3,)])
    repaired = repair_cache(found, slide)
    assert repaired.header is not None
    assert (repaired.is_sound, repaired.tiles, repaired.header.tiles_unreadable) == (True, 24, 1)


@pytest.mark.slow
def test_lost_shards_and_files_are_named_and_made_again(tiled: Tiled) -> None:
    path, source, row = tiled
    before = tree(path)
    for name in before:
        (path / name).unlink()
        assert any(f.file == name and "missing" in f.what for f in verify_cache(path).findings)
        if name == "tiles/c/2/0/0/0":
            assert verify_cache(path).findings[0].tiles == tuple(range(512, row.tiles))
        assert repair_cache(verify_cache(path), source.path).is_sound
        assert tree(path) == before, name


def test_bytes_that_belong_to_no_tile_are_found(tiled: Tiled) -> None:
    path = tiled[0]
    shard = path / "tiles/c/0/0/0/0"
    shard.write_bytes(b"more" + shard.read_bytes())  # the index is sound, and at the end
    assert "bytes that belong to no tile" in str(verify_cache(path).findings[0])


def test_sound_shards_in_each_others_place_are_found(tiled: Tiled) -> None:
    path, source, _ = tiled
    before = tree(path)
    first, second = path / "tiles/c/0/0/0/0", path / "tiles/c/1/0/0/0"
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    found = verify_cache(path)
    assert ["not the shard that was written" in finding.what for finding in found.findings] == [True, True]
    assert repair_cache(found, source.path).is_sound
    assert tree(path) == before


def test_what_does_not_belong_there_is_found_and_removed(tiled: Tiled) -> None:
    path, source, _ = tiled
    (path / "notes.txt").write_text("hello")
    (path / "tiles" / "c" / "9").symlink_to(path / "zarr.json")
    found = verify_cache(path)
    assert [str(finding) for finding in found.findings] == [
        "notes.txt: not part of the cache",
        "tiles/c/9: not a plain file",
    ]
    assert repair_cache(found, source.path).is_sound


def test_a_foreign_slide_is_found_and_not_used_for_repair(
    tiled: Tiled, tmp_path: Path, pyramid_tiff: PyramidTiff, tissue_picture: Draw
) -> None:
    path, _, row = tiled
    other = LedgerRow("S1", row.path, USED, fingerprint="00" * 32)
    (finding,) = verify_cache(path, other).findings
    assert "foreign slide" in finding.what
    moved = path.rename(path.with_name("S2.zarr"))
    assert "foreign slide: these are tiles of S1" in str(verify_cache(moved).findings[0])
    moved.rename(path)
    flip(path / "tiles/c/0/0/0/0", 10)
    stranger = pyramid_tiff(tissue_picture(1024, 5), name="stranger")
    before = tree(path)
    with pytest.raises(CacheMismatchError, match="not the slide that the cache of S1 was made from"):
        repair_cache(verify_cache(path), stranger)
    assert tree(path) == before


def test_both_copies_of_the_description_damaged_cannot_be_mended(tiled: Tiled) -> None:
    path, source, _ = tiled
    flip(path / "zarr.json", 200)
    flip(path / "tiles/zarr.json", 200)
    found = verify_cache(path)
    assert found.header is None
    with pytest.raises(CacheCorruptError, match="tile the slide again with --overwrite"):
        repair_cache(found, source.path)


def test_a_cache_of_another_format_is_not_called_damaged(tiled: Tiled) -> None:
    path = tiled[0]
    about = json.loads((path / "zarr.json").read_text())
    about["attributes"] = {**about["attributes"], "format_version": 1}
    del about["attributes"]["crc32c"]
    (path / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(CacheMismatchError, match="made in format 1"):
        verify_cache(path)
    with pytest.raises(CacheMissingError, match="no tile cache here"):
        verify_cache(path.with_name("none.zarr"))


@pytest.mark.slow
def test_features_are_checked_and_outlive_a_repair(tiled: Tiled) -> None:
    path, source, row = tiled
    for name in ("features/sound", "features/spoilt"):
        values = np.random.default_rng(0).normal(size=(row.tiles, 8)).astype(np.float16)
        zarr.create_array(
            path / name,
            data=values,
            chunks=values.shape,
            compressors=(zarr.codecs.ZstdCodec(level=3), zarr.codecs.Crc32cCodec()),
        )
        seal_node(path / name)
    (path / "features" / "zarr.json").write_text(
        json.dumps({"attributes": {}, "zarr_format": 3, "node_type": "group"})
    )
    seal_node(path / "features")
    assert verify_cache(path).is_sound
    before = tree(path)
    for name in [name for name in before if name.startswith("features/")]:
        for place in range(0, len(before[name]), 97):
            flip(path / name, place)
            (finding,) = verify_cache(path).findings
            assert finding.file == str(Path(name.removesuffix("/c/0/0"))).removesuffix("/zarr.json")
            (path / name).write_bytes(before[name])
    flip(path / "features/spoilt/c/0/0", 50)
    flip(path / "tiles/c/0/0/0/0", 50)
    assert repair_cache(verify_cache(path), source.path).is_sound
    assert tree(path) == {n: data for n, data in before.items() if not n.startswith("features/spoilt")}


@pytest.mark.parametrize(
    ("lost", "spoilt", "more_glass"),
    [
        ([], [], 0),
        ([], [], 1),
        ([], ["origin_level0"], 0),
        ([], ["origin_level0"], 1),
        ([], ["origin_level0", "tissue_fraction"], 0),  # one more, and nothing could tell one from another
        ([9], [], 0),
        ([9], [], 1),
    ],
)
def test_a_cache_of_other_tiles_than_are_planned_is_not_mended(
    tmp_path: Path,
    pyramid_tiff: PyramidTiff,
    tissue_picture: Draw,
    lost: list[int],
    spoilt: list[str],
    more_glass: int,
) -> None:
    """As when the thumbnail could not be read completely at the time; some tiles were ``lost`` too."""
    path = damaged(pyramid_tiff(tissue_picture(512), factors=(4,), jpeg=True, tile_px=64), lost)
    spec = TileSpec(mpp=0.5, tile_size_px=64)
    with open_slide(path) as slide:
        every = plan_tiles(slide, dataclasses.replace(spec, min_tissue=0.0))
        is_tissue = every.tissue_fraction >= spec.min_tissue
        chosen = np.sort([*np.flatnonzero(is_tissue)[1:], *np.flatnonzero(~is_tissue)[:more_glass]])
        plan = dataclasses.replace(
            every,
            spec=spec,
            origins_level0=every.origins_level0[chosen],
            tissue_fraction=every.tissue_fraction[chosen],
            quality={name: values[chosen] for name, values in every.quality.items()},
        )
        written = write_tiles(slide, plan, tmp_path, "S1")
    assert written.header.tiles_unreadable == len(lost)
    cache = written.path
    flip(cache / "tiles/c/0/0/0/0", 100)
    for name in spoilt:
        flip(cache / name / "c" / "/".join("0" * (1 + (name == "origin_level0"))), 20)
    before = tree(cache)
    with pytest.raises(
        CacheMismatchError, match="selects other tiles; tile the slide again with --overwrite"
    ):
        repair_cache(verify_cache(cache), path)
    assert tree(cache) == before


@pytest.mark.slow
def test_tiles_that_were_left_out_stay_out(
    tmp_path: Path, pyramid_tiff: PyramidTiff, tissue_picture: Draw
) -> None:
    slide = damaged(pyramid_tiff(tissue_picture(1024), mpp=1.0, jpeg=True, tile_px=64), slice(5, None, 40))
    spec = TileSpec(mpp=1.0, tile_size_px=32, codec="zstd")
    (row,) = tile_slides([SlideSource("S1", slide)], tmp_path / "cache", spec, workers=0)
    assert row.status == USED and row.tiles_unreadable > 0
    path = cache_path(tmp_path / "cache", "S1")
    before = tree(path)
    flip(path / "tiles/c/0/0/0/0", 50)
    (path / "tissue_mask" / "zarr.json").unlink()
    assert repair_cache(verify_cache(path), slide).is_sound
    assert tree(path) == before
    flip(path / "origin_level0/c/0/0", 20)
    with pytest.raises(CacheCorruptError, match="the list of which is damaged"):
        repair_cache(verify_cache(path), slide)
    assert Ledger(tmp_path / "cache" / "ledger.csv").rows()[0].status != FAILED
