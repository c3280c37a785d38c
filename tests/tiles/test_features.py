from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from slidetl.errors import CacheCorruptError, CacheError, CacheMismatchError, CacheMissingError, UsageError
from slidetl.tiles.features import (
    FeatureSource,
    check_writable,
    common_source,
    feature_name,
    list_features,
    read_features,
    read_source,
    write_features,
)
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.lock import slide_lock
from slidetl.tiles.run import tile_slides
from slidetl.tiles.store import SlideCache, cache_path, describe_write_error, seal_node
from slidetl.tiles.tile import SlideSource
from slidetl.tiles.verify import verify_cache
from tests.cli.test_tile import Draw
from tests.conftest import PyramidTiff
from tests.tiles.test_lock import another_user, lock_as_nfs

SOURCE = FeatureSource("resnet18", "", "a" * 64, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
BLOCK = FeatureSource("resnet18", "layer3", "a" * 64, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bfloat16")


@pytest.fixture
def cache(pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path) -> SlideCache:
    slide = pyramid_tiff(tissue_picture(512))
    tile_slides([SlideSource("s", slide)], tmp_path / "cache", TileSpec(1.0, 32), workers=0)
    return SlideCache.open(cache_path(tmp_path / "cache", "s"))


def values(rows: int, columns: int = 7) -> NDArray[np.float16]:
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float16)


def test_what_was_written_is_read_by_us_and_by_zarr(cache: SlideCache) -> None:
    last, block = values(len(cache)), values(len(cache), 3)
    write_features(cache, {"resnet18": (SOURCE, last), "resnet18.layer3": (BLOCK, block)})
    assert list_features(cache) == ("resnet18", "resnet18.layer3")
    np.testing.assert_array_equal(read_features(cache, "resnet18", "a" * 64), last)
    np.testing.assert_array_equal(read_features(cache, "resnet18.layer3"), block)
    assert read_source(cache, "resnet18") == SOURCE and read_source(cache, "resnet18.layer3") == BLOCK
    group = zarr.open_group(cache.path, mode="r")
    by_zarr = group["features/resnet18.layer3"]
    assert isinstance(by_zarr, zarr.Array)
    np.testing.assert_array_equal(by_zarr[:], block)
    assert by_zarr.dtype == np.float16 and by_zarr.attrs["weights_sha256"] == "a" * 64
    features = group["features"]
    assert isinstance(features, zarr.Group)
    assert sorted(features.array_keys()) == ["resnet18", "resnet18.layer3"]
    older = {name: value for name, value in SOURCE.to_attributes().items() if name != "pooling"}
    assert FeatureSource.from_attributes(older) == SOURCE  # of a cache of slidetl 0.1
    # Tiles and all else are read as before.
    assert SlideCache.open(cache.path).read([0]).shape == (1, 32, 32, 3)


def test_reading_does_not_start_zarr_or_torch(cache: SlideCache) -> None:
    write_features(cache, {"resnet18": (SOURCE, values(len(cache)))})
    script = (
        "import sys; from pathlib import Path; from slidetl.tiles.features import read_features;"
        "from slidetl.tiles.store import SlideCache;"
        f"n = len(read_features(SlideCache.open(Path({str(cache.path)!r})), 'resnet18'));"
        "assert 'torch' not in sys.modules; print(n)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(cache)


def test_equal_features_give_equal_bytes_and_replace_each_other(cache: SlideCache) -> None:
    def files() -> dict[str, bytes]:
        folder = cache.path / "features"
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    write_features(cache, {"resnet18": (SOURCE, values(len(cache)))})
    first = files()
    write_features(cache, {"resnet18": (SOURCE, values(len(cache), 2))})
    assert read_features(cache, "resnet18").shape[1] == 2
    write_features(cache, {"resnet18": (SOURCE, values(len(cache)))})
    assert files() == first
    assert not any((cache.path.parent / ".building-features").iterdir())


def test_features_that_are_not_these_are_refused(cache: SlideCache) -> None:
    with pytest.raises(CacheMissingError, match=r"there are: none; make it with 'slidetl embed'"):
        read_features(cache, "resnet18")
    write_features(cache, {"resnet18": (SOURCE, values(len(cache)))})
    with pytest.raises(CacheMissingError, match="there are: resnet18"):
        read_features(cache, "resnet50")
    for wanted in ({"weights_sha256": "b" * 64}, {"identity": "b" * 64}):
        with pytest.raises(
            CacheMismatchError, match=r"made by weights aaaaaaaaaaaa\.\.\., wanted bbb.*--overwrite"
        ):
            read_features(cache, "resnet18", **wanted)
    with pytest.raises(CacheMismatchError, match=r"aaaaaaaaaaaa\.\.\., wanted imported ones;"):
        read_features(cache, "resnet18", weights_sha256="")
    about = cache.path / "features" / "resnet18" / "zarr.json"
    about.write_text(about.read_text().replace(f'"tiles": {len(cache)}', '"tiles": 1'))
    with pytest.raises(CacheCorruptError, match="checksum"):
        read_features(cache, "resnet18")
    seal_node(about.parent)
    with pytest.raises(CacheMismatchError, match=f"of 1 tiles, the cache has {len(cache)}"):
        read_features(cache, "resnet18")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("", "features of another slide than s"),
        ("zarr.json", "features of another slide"),
        ("c", "of other features"),
    ],
)
def test_features_of_two_slides_in_each_others_place_are_found(
    cache: SlideCache, pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path, part: str, said: str
) -> None:
    """Both slides have as many tiles, at the same places."""
    slide = pyramid_tiff(tissue_picture(512, 1), name="other")
    tile_slides([SlideSource("t", slide)], tmp_path / "cache", cache.spec, workers=0)
    other = SlideCache.open(cache_path(tmp_path / "cache", "t"))
    for one, seed in ((cache, 0), (other, 1)):
        rows = np.random.default_rng(seed).normal(size=(len(one), 7)).astype(np.float16)
        write_features(one, {"resnet18": (SOURCE, rows)})
    mine, theirs = (one.path / "features" / "resnet18" / part for one in (cache, other))
    mine.rename(tmp_path / "kept")
    theirs.rename(mine)
    (tmp_path / "kept").rename(theirs)
    with pytest.raises((CacheMismatchError, CacheCorruptError), match=said):
        read_features(cache, "resnet18")
    (finding,) = verify_cache(cache.path).findings
    assert finding.file == "features/resnet18" and "run 'slidetl embed' again" in finding.what


def test_features_of_an_older_cache_do_not_say_of_which_tiles_they_are(cache: SlideCache) -> None:
    write_features(cache, {"resnet18": (SOURCE, values(len(cache)))})
    node = cache.path / "features" / "resnet18"
    about = json.loads((node / "zarr.json").read_text())
    del about["attributes"]["places_sha256"], about["attributes"]["values_crc32c"]
    (node / "zarr.json").write_text(json.dumps(about))
    seal_node(node)
    np.testing.assert_array_equal(read_features(cache, "resnet18"), values(len(cache)))
    assert verify_cache(cache.path).is_sound


@pytest.mark.parametrize("place", [10, -1])
def test_a_flipped_byte_is_found(cache: SlideCache, place: int) -> None:
    write_features(cache, {"resnet18": (SOURCE, values(len(cache)))})
    chunk = cache.path / "features" / "resnet18" / "c" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[place] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(CacheCorruptError, match="damaged, make it with 'slidetl embed' --overwrite"):
        read_features(cache, "resnet18")
    chunk.unlink()
    with pytest.raises(CacheCorruptError, match="damaged"):
        read_features(cache, "resnet18")


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((3, 2), np.float16), "must be"),
        (np.zeros((48, 2), np.float32), "float32"),
        (np.full((48, 2), np.inf, np.float16), "tile 0 of s are not finite in float16"),
    ],
)
def test_what_is_no_row_for_each_tile_is_not_stored(
    cache: SlideCache, array: NDArray[np.float16], says: str
) -> None:
    assert len(cache) == 48
    with pytest.raises(UsageError, match=says):
        write_features(cache, {"resnet18": (SOURCE, array)})
    assert list_features(cache) == ()


def test_a_slide_tiled_anew_in_the_meantime_is_refused(
    cache: SlideCache, pyramid_tiff: PyramidTiff, tissue_picture: Draw
) -> None:
    slide = pyramid_tiff(tissue_picture(512))
    # As many tiles as before, and others.
    tile_slides(
        [SlideSource("s", slide)], cache.path.parent, TileSpec(1.0, 32, jpeg_quality=50), 0, overwrite=True
    )
    with pytest.raises(CacheMismatchError, match="tiled again"):
        write_features(cache, {"resnet18": (SOURCE, values(len(cache)))})
    write_features(SlideCache.open(cache.path), {"resnet18": (SOURCE, values(len(cache)))})
    with pytest.raises(CacheMismatchError, match="tiled again"):
        read_features(cache, "resnet18")


def test_verification_takes_features_for_its_own_and_finds_damage_in_them(cache: SlideCache) -> None:
    write_features(cache, {"resnet18": (SOURCE, values(len(cache))), "other": (BLOCK, values(len(cache)))})
    assert verify_cache(cache.path).is_sound
    about = cache.path / "features" / "other" / "zarr.json"
    about.write_text(about.read_text().replace("layer3", "layer4"))
    (finding,) = verify_cache(cache.path).findings
    assert finding.file == "features/other"


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 151, "-x"])
def test_names_that_are_no_folder_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="features are named by"):
        feature_name(name)


def test_blocks_have_names_of_their_own() -> None:
    assert feature_name("resnet18", "layer3") == "resnet18.layer3"
    assert feature_name("mobilenetv2_100") == "mobilenetv2_100"


def test_equal_weights_of_another_architecture_are_another_network() -> None:
    clip = replace(SOURCE, backbone="vit_base_patch16_clip_224")
    assert not clip.same_network(replace(clip, backbone="vit_base_patch16_clip_quickgelu_224"))
    assert clip.same_network(replace(clip, backbone="vit_base_patch16_clip_224.openai"))
    folder, hub = (replace(SOURCE, backbone=name) for name in ("local-dir:/models/a", "hf-hub:lab/a"))
    assert not replace(folder, architecture="a").same_network(replace(folder, architecture="b"))
    assert replace(folder, architecture="a").same_network(replace(hub, architecture="a"))
    # Caches of an earlier version have the name alone.
    assert folder.same_network(replace(hub, architecture="a")) and clip.same_network(hub)
    attributes = clip.to_attributes()
    del attributes["architecture"]
    assert FeatureSource.from_attributes(attributes) == clip


def test_slides_of_two_architectures_have_no_common_network(cache: SlideCache) -> None:
    write_features(cache, {"told": (SOURCE, values(len(cache)))})
    other = shutil.copytree(cache.path, cache.path.with_name("other.zarr"))
    of_other = SlideCache.open(other)
    write_features(of_other, {"told": (replace(SOURCE, backbone="resnet18d"), values(len(cache)))})
    with pytest.raises(CacheMismatchError, match=r"another network or other weights \(resnet18d, aaaa"):
        common_source("told", [cache, of_other])


def test_a_write_that_was_killed_leaves_nothing_in_the_way(cache: SlideCache) -> None:
    left = cache.path.parent / ".building-features" / "s" / "resnet18"
    left.mkdir(parents=True)
    (left / "zarr.json").write_text("{")
    write_features(cache, {"resnet18": (SOURCE, values(len(cache)))})
    assert read_features(cache, "resnet18").shape == (len(cache), 7)
    assert not any((cache.path.parent / ".building-features").iterdir())


@pytest.mark.parametrize("place", [".", ".locks", "s.zarr", "s.zarr/features"])
def test_a_cache_of_another_user_is_refused_with_the_remedy(
    cache: SlideCache, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    write_features(cache, {"resnet18": (SOURCE, values(len(cache)))})
    check_writable(cache)
    closed = cache.path.parent / place
    access = os.access

    def refuse(path: Path, mode: int) -> bool:
        return path != closed and access(path, mode)

    monkeypatch.setattr(os, "access", refuse)
    with pytest.raises(CacheError) as error:
        check_writable(cache)
    assert str(error.value).startswith(f"{closed}: this user may not write there; users who share a cache")


@pytest.mark.parametrize(
    ("mode", "on_nfs", "serves"), [(0o444, False, True), (0o444, True, False), (0o000, False, False)]
)
def test_the_lock_of_another_user_is_in_the_way_only_if_it_cannot_be_locked(
    cache: SlideCache, monkeypatch: pytest.MonkeyPatch, mode: int, on_nfs: bool, serves: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:  # unlike tmp_path, below folders that any user may enter
        shared = Path(shutil.copytree(cache.path.parent, Path(name) / "cache"))
        for path in (Path(name), shared, *shared.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        lock = shared / ".locks" / "s.lock"
        lock.chmod(mode)
        copy = SlideCache.open(cache_path(shared, "s"))
        if on_nfs:
            lock_as_nfs(monkeypatch)
        with another_user():
            if serves:
                check_writable(copy)
                write_features(copy, {"resnet18": (SOURCE, values(len(cache)))})
            else:
                with pytest.raises(
                    CacheError, match=rf"{lock}: Permission denied: its owner .* 'chmod a\+w'"
                ):
                    check_writable(copy)


def test_a_slide_that_is_being_written_can_be_embedded_after_that(cache: SlideCache) -> None:
    with slide_lock(cache.path.parent, "s"):
        check_writable(cache)


def test_a_special_file_in_the_way_is_told_before_long_work(cache: SlideCache) -> None:
    lock = cache.path.parent / ".locks" / "s.lock"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(CacheError, match=r"s\.lock: a link or a special file"):
        check_writable(cache)


def test_a_cache_that_is_mounted_read_only_is_refused_as_such(
    cache: SlideCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY | os.ST_NOSUID))
    with pytest.raises(CacheError, match=r"its disk is mounted read-only here; use a copy"):
        check_writable(cache)


def test_a_place_that_cannot_be_written_is_an_error_of_its_slide(cache: SlideCache) -> None:
    (cache.path.parent / ".building-features").write_text("in the way")
    with pytest.raises(CacheError, match="Not a directory"):
        write_features(cache, {"resnet18": (SOURCE, values(len(cache)))})
    assert list_features(cache) == ()


def test_the_remedy_of_a_shared_cache_is_told_of_the_cache_alone(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        return describe_write_error(PermissionError(errno.EACCES, "Permission denied", str(path)), tmp_path)

    lock = tmp_path / ".locks" / "s1.lock"
    assert said(lock).startswith(f"{lock}: Permission denied; users who share a cache need")
    assert said(Path("/elsewhere/s1.svs")) == "[Errno 13] Permission denied: '/elsewhere/s1.svs'"
