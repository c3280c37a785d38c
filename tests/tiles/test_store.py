from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from slidetl.errors import CacheCorruptError, CacheMismatchError, CacheMissingError, UsageError
from slidetl.slides import SlideInfo
from slidetl.tiles.codec import JpegCodec, tile_codec
from slidetl.tiles.grid import Codec, TileSpec
from slidetl.tiles.plan import TilePlan
from slidetl.tiles.store import (
    FORMAT_VERSION,
    TILES_PER_SHARD,
    CacheHeader,
    SlideCache,
    cache_path,
    discard,
    is_intact,
    is_small,
    shard_path,
)
from slidetl.tiles.tissue import TissueMask
from slidetl.tiles.writer import CacheWriter, pack_shard
from tests.tiles.conftest import tree

SIZE = 16


def header(codec: Codec = "jpeg", slide_id: str = "S1") -> CacheHeader:
    return CacheHeader(
        slide_id=slide_id,
        fingerprint="ab" * 32,
        vendor="test",
        size_level0=(4000, 3000),
        mpp_level0=(0.25, 0.26),
        mpp_read=(0.5, 0.5),
        extent_level0=(32.0, 31.5),
        spec=TileSpec(mpp=0.5, tile_size_px=SIZE, codec=codec),
        tiles_without_tissue=7,
    )


def pictures(count: int) -> NDArray[np.uint8]:
    """Tiles that differ; number 3 is black, which a store of sparse arrays might leave out."""
    rng = np.random.default_rng(0)
    tiles = np.kron(rng.integers(0, 256, (count, 2, 2, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    tiles[3] = 0
    return tiles


def writer(
    cache: Path,
    count: int,
    about: CacheHeader | None = None,
    check: Callable[[], object] | None = None,
) -> CacheWriter:
    rng = np.random.default_rng(1)
    thumbnail = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    about = about or header()
    plan = TilePlan(
        spec=about.spec,
        info=SlideInfo(Path("s"), "ab" * 32, "test", (4000, 3000), (0.25, 0.26), (0.25,), (255,) * 3, None),
        mpp_read=about.mpp_read,
        origins_level0=np.arange(2 * count, dtype=np.int32).reshape(count, 2),
        extent_level0=about.extent_level0,
        tissue_fraction=np.linspace(0.25, 1, count, dtype=np.float32),
        tiles_without_tissue=7,
        thumbnail=thumbnail,
        tissue_mask=TissueMask(thumbnail[..., 0] > 100, 25.0),
        quality={"pen": np.zeros(count, np.float32)},
        left_out_level0={},
    )
    return CacheWriter(cache, about, plan, check)


def write(cache: Path, count: int, codec: Codec = "jpeg", unreadable: tuple[int, ...] = ()) -> SlideCache:
    about = header(codec)
    into = writer(cache, count, about)
    encode = tile_codec(about.spec).encode
    tiles = pictures(count)
    for tile in range(into.next_tile, count):
        into.add(tile, None if tile in unreadable else encode(tiles[tile]))
    return into.finish()


@pytest.mark.parametrize("count", [5, TILES_PER_SHARD, 600])
def test_shards_are_byte_for_byte_what_zarr_writes(tmp_path: Path, count: int) -> None:
    cache = write(tmp_path, count)
    by_zarr = zarr.create_array(
        tmp_path / "by_zarr",
        shape=(count, SIZE, SIZE, 3),
        dtype="uint8",
        chunks=(1, SIZE, SIZE, 3),
        shards=(TILES_PER_SHARD, SIZE, SIZE, 3),
        serializer=JpegCodec(90),
        compressors=(Crc32cCodec(),),
        config={"write_empty_chunks": True},
    )
    by_zarr[:] = pictures(count)
    assert tree(cache.path / "tiles" / "c") == tree(tmp_path / "by_zarr" / "c")


@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
def test_metadata_are_what_zarr_writes(tmp_path: Path, codec: Codec) -> None:
    cache = write(tmp_path, 300, codec)
    group = zarr.open_group(cache.path, mode="r")
    serializer, compressors = tile_codec(cache.spec).zarr_codecs()
    for name, ours in group.arrays():
        is_tiles = name == "tiles"
        zarr.create_array(
            tmp_path / name,
            shape=ours.shape,
            dtype=ours.dtype,
            chunks=(1, *ours.shape[1:]) if is_tiles else ours.shape,
            shards=(TILES_PER_SHARD, *ours.shape[1:]) if is_tiles else None,
            serializer=serializer if is_tiles else "auto",
            compressors=(*compressors, Crc32cCodec()) if is_tiles else (ZstdCodec(level=3), Crc32cCodec()),
            attributes=ours.attrs.asdict(),
            dimension_names=("tile", "y", "x", "channel") if is_tiles else None,
        )
        by_zarr = (tmp_path / name / "zarr.json").read_text()
        assert json.loads((cache.path / name / "zarr.json").read_text()) == json.loads(by_zarr), name


@pytest.mark.parametrize("codec", ["jpeg", "zstd"])
def test_zarr_opens_the_group_and_agrees(tmp_path: Path, codec: Codec) -> None:
    cache = write(tmp_path, 300, codec)
    group = zarr.open_group(cache.path, mode="r")
    assert group.attrs["complete"] is True
    tiles = group["tiles"]
    assert isinstance(tiles, zarr.Array)
    assert np.array_equal(np.asarray(tiles[:]), cache.read(range(300)))
    arrays: dict[str, NDArray[Any]] = {
        "origin_level0": cache.origins_level0,
        "tissue_fraction": cache.tissue_fraction,
        "thumbnail": cache.thumbnail,
        "tissue_mask": cache.tissue_mask.mask,
    }
    for name, ours in arrays.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert array.dtype == ours.dtype
        assert np.array_equal(np.asarray(array[...]), ours)


def test_what_went_in_comes_out(tmp_path: Path) -> None:
    cache = write(tmp_path, 300, "zstd")
    assert len(cache) == 300
    assert cache.header == header("zstd")
    assert (cache.slide_id, cache.fingerprint) == ("S1", "ab" * 32)
    assert cache.spec == TileSpec(mpp=0.5, tile_size_px=SIZE, codec="zstd")
    assert (cache.size_level0, cache.mpp_level0, cache.mpp_read) == ((4000, 3000), (0.25, 0.26), (0.5, 0.5))
    assert cache.extent_level0 == (32.0, 31.5)
    assert cache.thumbnail.shape == (30, 40, 3)
    assert cache.thumbnail_mpp == cache.tissue_mask.mpp == 25.0
    assert np.array_equal(cache.read([299, 3, 3, 0]), pictures(300)[[299, 3, 3, 0]])
    assert cache.read(np.array([], int)).shape == (0, SIZE, SIZE, 3)
    for wrong in ([300], [-1]):
        with pytest.raises(IndexError, match="numbered 0 to 299"):
            cache.read(wrong)


def test_unreadable_tiles_are_left_out_and_counted(tmp_path: Path) -> None:
    cache = write(tmp_path, 300, "zstd", unreadable=(0, 17, 299))
    kept = [n for n in range(300) if n not in (0, 17, 299)]
    assert cache.header.tiles_unreadable == 3
    assert np.array_equal(cache.origins_level0[:, 0], 2 * np.array(kept))
    assert np.array_equal(cache.read(range(297)), pictures(300)[kept])


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    assert tree(write(tmp_path / "a", 300).path) == tree(write(tmp_path / "b", 300).path)


@pytest.mark.parametrize("unreadable", [(), (5, 270)])
def test_a_stopped_writer_continues_from_its_last_whole_shard(
    tmp_path: Path, unreadable: tuple[int, ...]
) -> None:
    encode = tile_codec(header().spec).encode
    tiles = pictures(600)
    with writer(tmp_path / "a", 600) as first:
        for tile in range(590):
            first.add(tile, None if tile in unreadable else encode(tiles[tile]))
    assert not cache_path(tmp_path / "a", "S1").exists()
    again = writer(tmp_path / "a", 600)
    assert again.next_tile == 2 * TILES_PER_SHARD + len(unreadable)
    assert again.unreadable == len(unreadable)
    for tile in range(again.next_tile, 600):
        again.add(tile, encode(tiles[tile]))
    assert tree(again.finish().path) == tree(write(tmp_path / "b", 600, unreadable=unreadable).path)
    assert list((tmp_path / "a" / ".building").iterdir()) == []


def test_what_was_begun_for_others_is_not_continued(tmp_path: Path) -> None:
    with writer(tmp_path, 300) as first:
        for tile in range(300):
            first.add(tile, b"x")
    assert writer(tmp_path, 300).next_tile == 256
    assert writer(tmp_path, 299).next_tile == 0  # another plan
    assert writer(tmp_path, 300).next_tile == 0  # and the former is gone


def test_a_note_without_its_shard_is_not_believed(tmp_path: Path) -> None:
    with writer(tmp_path, 300) as first:
        for tile in range(300):
            first.add(tile, b"x")
    next((tmp_path / ".building").rglob("c/0/0/0/0")).unlink()
    assert writer(tmp_path, 300).next_tile == 0


def test_tiles_come_in_order_and_all_of_them(tmp_path: Path) -> None:
    into = writer(tmp_path, 3)
    with pytest.raises(UsageError, match="tile 0 was to be added next, not 1"):
        into.add(1, b"x")
    into.add(0, b"x")
    with pytest.raises(UsageError, match="1 of 3 tiles were added"):
        into.finish()


def test_another_cache_is_replaced_at_once_or_discarded(tmp_path: Path) -> None:
    write(tmp_path, 5)
    assert len(write(tmp_path, 6)) == 6
    discard(tmp_path, "S1")
    assert len(SlideCache.open(cache_path(tmp_path, "S1"))) == 6
    discard(tmp_path, "S1", finished=True)
    with pytest.raises(CacheMissingError):
        SlideCache.open(cache_path(tmp_path, "S1"))


def test_an_open_cache_reads_no_tile_that_replaced_its_own(tmp_path: Path) -> None:
    opened = write(tmp_path, 600)
    first = opened.read([0])
    in_worker = pickle.loads(pickle.dumps(opened))
    write(tmp_path, 600)  # byte for byte, as a repair does
    np.testing.assert_array_equal(in_worker.read([0, 300]), opened.read([0, 300]))
    write(tmp_path, 600, unreadable=(2,))  # other tiles under the same numbers
    np.testing.assert_array_equal(opened.read([0]), first)  # from its own shard, still open
    for cache in (opened, pickle.loads(pickle.dumps(opened))):
        with pytest.raises(CacheMismatchError, match="tiled again, or removed, since it was opened"):
            cache.read([599])
    for name in ("thumbnail", "thumbnail_mpp", "tissue_mask", "areas_unreadable"):
        with pytest.raises(CacheMismatchError, match="run again"):
            getattr(opened, name)
    write(tmp_path, 5)  # fewer, so that the shard is not there
    with pytest.raises(CacheMismatchError, match="run again"):
        in_worker.read([599])
    discard(tmp_path, "S1", finished=True)
    with pytest.raises(CacheMismatchError, match="removed"):
        in_worker.read([599])


def test_only_a_finished_cache_of_the_right_kind_opens(tmp_path: Path) -> None:
    with pytest.raises(CacheMissingError, match="slidetl tile"):
        SlideCache.open(tmp_path / "none.zarr")
    cache = write(tmp_path, 5)
    with pytest.raises(CacheMismatchError, match=r"made with mpp 0.5 \(wanted: 1.0\)"):
        SlideCache.open(cache.path, TileSpec(mpp=1.0, tile_size_px=SIZE))

    about = json.loads((cache.path / "zarr.json").read_text())
    about["attributes"]["format_version"] = 99
    (cache.path / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(CacheMismatchError, match="format 99"):
        SlideCache.open(cache.path)
    del about["attributes"]["complete"]
    (cache.path / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(CacheMissingError, match="never finished"):
        SlideCache.open(cache.path)


@pytest.mark.parametrize(
    ("node", "content", "says"),
    [
        (".", "{", "not JSON"),
        (".", "[]", "expected a JSON object"),
        (".", '{"attributes": []}', "not the attributes of a tile cache"),
        (".", '{"attributes": {"complete": true}}', "not the attributes .*format_version"),
        (".", '{"attributes": {"complete": true, "format_version": 4}}', "not the attributes .*slide_id"),
        ("origin_level0", "{", "not JSON"),
        ("origin_level0", "{}", "array is damaged .*shape"),
        ("origin_level0", '{"shape": [7, 2], "data_type": "int32"}', "array is damaged"),
        ("tissue_fraction", '{"shape": [5], "data_type": "what"}', "array is damaged"),
    ],
)
def test_damaged_metadata_say_so_and_what_to_do(tmp_path: Path, node: str, content: str, says: str) -> None:
    cache = write(tmp_path, 5)
    (cache.path / node / "zarr.json").write_text(content)
    with pytest.raises(CacheCorruptError, match=f"{says}.*--overwrite"):
        SlideCache.open(cache.path)


def test_attributes_that_are_no_specification_are_corrupt(tmp_path: Path) -> None:
    cache = write(tmp_path, 5)
    about = json.loads((cache.path / "zarr.json").read_text())
    about["attributes"]["spec"]["mpp"] = -1.0
    (cache.path / "zarr.json").write_text(json.dumps(about))
    with pytest.raises(CacheCorruptError, match=r"not the attributes .*mpp must"):
        SlideCache.open(cache.path)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_found_and_its_tile_named(tmp_path: Path) -> None:
    cache = write(tmp_path, 300)
    shard = cache.path / "tiles" / "c" / "0" / "0" / "0" / "0"
    second = len(tile_codec(cache.spec).encode(pictures(300)[0])) + 4
    flip(shard, second + 10)
    fresh = SlideCache.open(cache.path)
    with pytest.raises(CacheCorruptError, match="tile 1 of S1 is damaged"):
        fresh.read([0, 1, 2])
    assert len(fresh.read([0, 2, 299])) == 3
    flip(shard, -1)
    with pytest.raises(CacheCorruptError, match="index is damaged"):
        SlideCache.open(cache.path).read([0])
    shard.unlink()
    with pytest.raises(CacheMissingError, match="shard is missing"):
        SlideCache.open(cache.path).read([0])


def test_a_description_that_fails_its_checksum_is_not_believed(tmp_path: Path) -> None:
    cache = write(tmp_path, 5)
    document = cache.path / "zarr.json"
    document.write_text(
        document.read_text().replace('"tiles_without_tissue": 7', '"tiles_without_tissue": 8')
    )
    with pytest.raises(CacheCorruptError, match="fails its checksum"):
        SlideCache.open(cache.path)


def test_any_file_that_a_power_cut_tore_is_found(tmp_path: Path) -> None:
    cache = write(tmp_path, 5)
    assert is_small(cache.path) and is_intact(cache.path)
    assert not is_small(write(tmp_path / "large", 300).path)
    for name, content in tree(cache.path).items():
        for torn in (b"", bytes(len(content)), content[: len(content) // 2], None):
            if torn is None:
                (cache.path / name).unlink()
            else:
                (cache.path / name).write_bytes(torn)
            assert not is_intact(cache.path), name
        (cache.path / name).write_bytes(content)
    assert is_intact(cache.path)


def test_an_array_of_another_slide_is_found(tmp_path: Path) -> None:
    cache = write(tmp_path, 5)
    other = write(tmp_path / "other", 5, unreadable=(2,))
    chunk = "origin_level0/c/0/0"
    (cache.path / chunk).write_bytes((other.path / chunk).read_bytes())
    assert not is_intact(cache.path)


@pytest.mark.parametrize("name", ["origin_level0", "tissue_fraction"])
def test_a_flipped_byte_in_the_small_arrays_is_found(tmp_path: Path, name: str) -> None:
    cache = write(tmp_path, 5)
    flip(next(p for p in (cache.path / name / "c").rglob("*") if p.is_file()), 20)
    with pytest.raises(CacheCorruptError, match=name):
        SlideCache.open(cache.path)


def test_a_shard_ends_with_its_index_and_missing_places_say_so() -> None:
    parts, _ = pack_shard([b"one", b"three"])
    shard = b"".join(parts)
    assert shard[:3] == b"one" and shard[7:12] == b"three"
    assert int.from_bytes(shard[3:7], "little") == google_crc32c.value(b"one")
    index = np.frombuffer(shard[-4 - 16 * TILES_PER_SHARD : -4], "<u8").reshape(-1, 2)
    assert index[:2].tolist() == [[0, 7], [7, 9]]
    assert (index[2:] == 2**64 - 1).all()


def read_into(results: multiprocessing.Queue[bytes], cache: SlideCache) -> None:
    results.put(cache.read([299, 0, 256]).tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_reads_in_other_processes(tmp_path: Path, method: str) -> None:
    cache = write(tmp_path, 300)
    here = cache.read([299, 0, 256])
    context = multiprocessing.get_context(method)
    results: multiprocessing.Queue[bytes] = context.Queue()
    start: Callable[..., multiprocessing.Process] = context.Process  # type: ignore[attr-defined]
    process = start(target=read_into, args=(results, pickle.loads(pickle.dumps(cache))))
    process.start()
    assert results.get(timeout=120) == here.tobytes()
    process.join()


def test_another_release_of_the_software_continues_what_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writer(tmp_path, 300) as first:
        for tile in range(300):
            first.add(tile, b"x")
    monkeypatch.setattr("slidetl.tiles.store.VERSION", "99.0")
    assert "99.0" in str(header().to_attributes()) and "99.0" not in str(header().identity())
    assert writer(tmp_path, 300).next_tile == 256
    assert writer(tmp_path, 300, header(codec="zstd")).next_tile == 0


@pytest.mark.slow
def test_few_files_stay_open_however_many_slides_are_read(tmp_path: Path) -> None:
    caches = [write(tmp_path / str(number), 300) for number in range(60)]
    for cache in caches:
        assert len(cache.read([0, 299])) == 2
    assert len(list(Path("/proc/self/fd").iterdir())) < 64 + 60
    write(tmp_path / "0", 280)
    again = SlideCache.open(caches[0].path)
    assert len(again) == 280 and len(again.read([279])) == 1


def test_what_was_begun_in_another_format_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writer(tmp_path, 300) as first:
        for tile in range(300):
            first.add(tile, b"x")
    monkeypatch.setattr("slidetl.tiles.store.FORMAT_VERSION", FORMAT_VERSION + 1)
    assert writer(tmp_path, 300).next_tile == 0


def test_a_shard_of_another_slide_is_found(tmp_path: Path) -> None:
    cache = write(tmp_path, 5)
    shard = shard_path(cache.path, 0)
    parts, _ = pack_shard([tile_codec(header().spec).encode(tile) for tile in pictures(5)[::-1]])
    shard.write_bytes(b"".join(parts))
    assert len(SlideCache.open(cache.path).read(range(5))) == 5  # each tile is sound by itself
    assert not is_intact(cache.path)


class LostError(Exception):
    """What a check raises in these tests."""


def test_no_shard_is_written_for_a_slide_that_was_lost(tmp_path: Path) -> None:
    def check() -> None:
        raise LostError

    with pytest.raises(LostError), writer(tmp_path, 300, check=check) as into:
        for tile in range(300):
            into.add(tile, b"x")
        into.finish()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("count", [5, 300])
def test_no_cache_is_placed_for_a_slide_that_was_lost(tmp_path: Path, count: int) -> None:
    group = tmp_path / ".building" / "S1" / "group"

    def check() -> None:
        if (group / "zarr.json").exists():  # it is whole
            raise LostError

    into = writer(tmp_path, count, check=check)
    for tile in range(count):
        into.add(tile, b"x")
    with pytest.raises(LostError):
        into.finish()
    assert not cache_path(tmp_path, "S1").exists()


def test_progress_is_noted_only_once_its_shards_are_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails to take a shard: with a note, the next run would trust it."""
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if "/tiles/c/1/" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("slidetl.tiles.writer._NOTE_SECONDS", 0)
    with pytest.raises(OSError, match="Input/output error"), writer(tmp_path, 600) as into:
        for tile in range(600):
            into.add(tile, b"x")
        into.finish()
    assert shard_path(tmp_path / ".building" / "S1" / "group", 1).exists()
    monkeypatch.undo()
    assert writer(tmp_path, 600).next_tile == TILES_PER_SHARD
