"""Verifies every byte of a cache, and repairs damaged tiles.

A group's metadata document seals itself and lists the checksums of all other files
(:func:`slidetl.tiles.store.sealed`), each tile has its own crc32c, and a shard must consist of its tiles and
its index and nothing else. Features are stored later, and seal themselves.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from slidetl.errors import (
    CacheCorruptError,
    CacheMismatchError,
    CacheMissingError,
    SlideReadError,
)
from slidetl.files import fsync_path
from slidetl.slides import Slide, open_slide
from slidetl.slides.decoding import map_in_order
from slidetl.tiles.codec import TileCodec, tile_codec
from slidetl.tiles.cut import check_unreadable, encode_tile, encode_tiles
from slidetl.tiles.features import are_of, have_own_values
from slidetl.tiles.ledger import LedgerRow
from slidetl.tiles.lock import slide_lock
from slidetl.tiles.patches import PatchPlan, plan_patches
from slidetl.tiles.plan import TilePlan, plan_tiles
from slidetl.tiles.store import (
    FEATURES,
    INDEX_BYTES,
    MISSING,
    TILES_PER_SHARD,
    CacheHeader,
    Shard,
    building_path,
    file_digest,
    origin_name,
    places_sha256,
    read_array,
    read_header,
    read_json,
    read_sealed,
    shard_name,
    shard_path,
)
from slidetl.tiles.writer import CacheWriter
from slidetl.volumes import open_series

_FAILS = "it fails its checksum"
_OF_EACH_TILE = ("origin_level0", "origin_voxel", "tissue_fraction")  # what a plan is known by
_EMBED = "run 'slidetl embed' again"
_FEATURES_FAIL = f"these features fail their checksum; {_EMBED}"


@dataclass(frozen=True)
class Finding:
    """A defect of a cache.

    Attributes:
        file: its place, relative to the group.
        what: one line.
        tiles: the numbers of the tiles lost by it; empty if none is, or all are.
    """

    file: str
    what: str
    tiles: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class Verification:
    """The result of checking one slide's cache.

    Attributes:
        path: the group.
        header: read from the group, or from the copy in it; None if neither can be read.
        tiles: expected number; 0 if unknown.
        bytes: number read.
        findings: the defects.
    """

    path: Path
    header: CacheHeader | None
    tiles: int
    bytes: int
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        """True if every byte is as written."""
        return not self.findings


def verify_cache(
    path: Path, row: LedgerRow | None = None, decode: bool = False, threads: int = 1
) -> Verification:
    """Reads a slide's cache completely and finds changed bytes.

    Args:
        path: the group, ``<cache>/<slide_id>.zarr``.
        row: of the slide in the ledger; its fingerprint must equal the cache's.
        decode: also decode every tile. A tile copied from a slide with damage in its compressed data passes
            all checksums, and still cannot be read.
        threads: parallel decodings.

    Raises:
        CacheMissingError: there is no such folder.
        CacheMismatchError: it is in another version of the format.
    """
    if not path.is_dir():
        raise CacheMissingError(f"{path}: no tile cache here; make it with 'slidetl tile'")
    findings: list[Finding] = []
    header, listed = _read_root(path, findings)
    if header is not None:
        if f"{header.slide_id}.zarr" != path.name:
            findings.append(Finding("zarr.json", f"foreign slide: these are tiles of {header.slide_id}"))
        if row is not None and row.fingerprint and row.fingerprint != header.fingerprint:
            made_from = f"made from {header.fingerprint[:12]}, the ledger's slide is {row.fingerprint[:12]}"
            findings.append(Finding("zarr.json", f"foreign slide: {made_from}"))
    files = {str(p.relative_to(path)) for p in path.rglob("*") if not p.is_dir() or p.is_symlink()}
    size = sum((path / name).lstat().st_size for name in files)
    tiles = _count_tiles(path)
    core = {name for name in files if Path(name).parts[0] != FEATURES} - {"zarr.json"}
    for name in sorted(core):
        findings.extend(_check_file(path, name, listed, tiles))
    for name in sorted(set(listed or ()) - core):
        findings.append(Finding(name, "missing", _tiles_of(name, tiles)))
    findings.extend(_check_features(path, files - core - {"zarr.json"}, header))
    if decode and header is not None and not header.imported:
        damaged = {tile for finding in findings for tile in finding.tiles}
        sound = [tile for tile in range(tiles) if tile not in damaged]
        findings.extend(_check_pixels(path, header, sound, threads))
    return Verification(path, header, tiles, size, tuple(findings))


def repair_cache(found: Verification, slide_path: Path) -> Verification:
    """Repairs the damaged parts of a cache, byte for byte, from its slide, and verifies the result.

    The group is built beside the old one, with copies of sound tiles, and replaces it atomically, without
    damaged features. If the slide can no longer give a tile, it is left out and counted, as when tiling, and
    all features are dropped.

    Raises:
        CacheMismatchError: the slide is another one.
        CacheCorruptError: both copies of the cache's description are damaged.
        SlideError: the slide cannot be read, or more than a tenth of its tiles cannot.
    """
    path, header = found.path, found.header
    if header is None:
        raise CacheCorruptError(
            f"{path}: both copies of its description are damaged; tile the slide again with --overwrite"
        )
    if header.imported:
        raise CacheCorruptError(
            f"{path}: its features were imported; remove this folder, and run 'slidetl features import' again"
        )
    slide_id = path.name.removesuffix(".zarr")
    with slide_lock(path.parent, slide_id) as lock, _planned(found, header, slide_path) as (plan, encode):
        if _read_root(path, [])[0] != header:
            raise CacheMismatchError(f"{path}: tiled again since it was verified; run again")
        kept = _kept_in_plan(found, header, plan)
        damaged = {tile for finding in found.findings for tile in finding.tiles}
        tile_of = {wanted: tile for tile, wanted in enumerate(kept) if tile not in damaged}
        # Tiles unreadable when the cache was made are left out of it again.
        left_out = set(range(len(plan))) - set(kept)
        with CacheWriter(path.parent, replace(header, tiles_unreadable=0), plan, lock.check) as writer:
            numbers = range(writer.next_tile, len(plan))
            made = encode([n for n in numbers if n not in tile_of and n not in left_out])
            for number in numbers:
                if number in left_out:
                    writer.add(number, None)
                elif number in tile_of:
                    writer.add(number, _payload(path, tile_of[number]))
                else:
                    payload, error = next(made)
                    writer.add(number, payload)
                    if error is not None:
                        check_unreadable(plan, writer.unreadable, error)
            if writer.unreadable == len(left_out):
                _keep_sound_features(found, building_path(path.parent, slide_id) / "group")
            writer.finish()
    return verify_cache(path)


def _read_root(path: Path, findings: list[Finding]) -> tuple[CacheHeader | None, dict[str, str] | None]:
    """Reads the group's metadata and its list of checksums; each is None if it cannot be trusted."""
    try:
        attributes = read_sealed(path)["attributes"]
        return CacheHeader.from_attributes(attributes), dict(attributes["checksums"])
    except (CacheCorruptError, CacheMissingError, KeyError, TypeError) as error:
        _refuse_other_format(path)
        findings.append(Finding("zarr.json", "missing" if isinstance(error, CacheMissingError) else _FAILS))
    try:
        return CacheHeader.from_attributes(read_sealed(path / "tiles")["attributes"]), None
    except (CacheCorruptError, CacheMissingError, KeyError, TypeError):
        return None, None


def _refuse_other_format(path: Path) -> None:
    """Refuses an older cache, which has no seal and is not damaged."""
    with contextlib.suppress(CacheCorruptError, CacheMissingError):
        attributes = read_json(path).get("attributes")
        if isinstance(attributes, dict) and "crc32c" not in attributes:
            read_header(path)


def _count_tiles(path: Path) -> int:
    for node in ("tiles", "origin_level0", "origin_voxel"):
        with contextlib.suppress(CacheCorruptError, CacheMissingError, KeyError, TypeError, IndexError):
            return int(read_json(path / node)["shape"][0])
    return 0


def _check_file(path: Path, name: str, listed: dict[str, str] | None, tiles: int) -> Iterator[Finding]:
    if not (path / name).is_file() or (path / name).is_symlink():
        yield Finding(name, "not a plain file", _tiles_of(name, tiles))
    elif listed is not None and name not in listed:
        yield Finding(name, "not part of the cache")
    elif name.startswith("tiles/c/"):
        yield from _check_shard(path, name, None if listed is None else listed[name], tiles)
    elif listed is not None:
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            yield Finding(name, f"cannot be read: {error.strerror}")
        else:
            if file_digest(content) != listed[name]:
                yield Finding(name, _FAILS)


def _check_shard(path: Path, name: str, expected: str | None, tiles: int) -> Iterator[Finding]:
    every = _tiles_of(name, tiles)
    try:
        shard = Shard(path / name)
        chunks = [(place, *entry) for place, entry in enumerate(shard.index) if entry[0] != MISSING]
        end = 0
        for _, offset, length in chunks:
            if offset != end or length < 4:
                yield Finding(name, "its tiles do not lie one after the other", every)
                return
            end += length
        if end + INDEX_BYTES != shard.size:
            yield Finding(name, "it has bytes that belong to no tile", every)
            return
        damaged = False
        for place in shard.damaged():
            damaged = True
            tile = every[0] + place if every else place
            yield Finding(name, f"tile {tile} fails its checksum", (tile,))
        if not damaged and expected is not None and shard.digest() != expected:
            yield Finding(name, "sound, but not the shard that was written here", every)
    except CacheCorruptError:
        yield Finding(name, "its index fails its checksum", every)
    except OSError as error:
        yield Finding(name, f"cannot be read: {error.strerror}", every)


def _check_pixels(path: Path, header: CacheHeader, tiles: list[int], threads: int) -> Iterator[Finding]:
    codec = tile_codec(header.spec)

    def is_readable(tile: int) -> bool:
        return _is_readable(codec, _payload(path, tile), header.spec.tile_shape)

    for tile, is_sound in zip(tiles, map_in_order(is_readable, tiles, threads), strict=True):
        if not is_sound:
            name = shard_name(tile // TILES_PER_SHARD)
            yield Finding(name, f"tile {tile} cannot be decoded: the slide is damaged there", (tile,))


def _is_readable(codec: TileCodec, payload: bytes, shape: tuple[int, ...]) -> bool:
    try:
        return codec.decode(payload).shape == shape
    except CacheCorruptError:
        return False


def _tiles_of(name: str, tiles: int) -> tuple[int, ...]:
    """Lists the tiles of a shard by its file; none for other files."""
    parts = Path(name).parts
    if len(parts) != 6 or parts[:2] != ("tiles", "c") or not parts[2].isdecimal():
        return ()
    first = int(parts[2]) * TILES_PER_SHARD
    return tuple(range(first, min(first + TILES_PER_SHARD, tiles or first + TILES_PER_SHARD)))


def _check_features(path: Path, files: set[str], header: CacheHeader | None) -> Iterator[Finding]:
    """Checks each array of features: a sealed description, of these tiles, and one chunk with its crc32c."""
    known = set()
    places = None
    if header is not None:
        with contextlib.suppress(CacheCorruptError, CacheMissingError):
            places = places_sha256(header, read_array(path / origin_name(header.spec)))
    for name in sorted(files):
        if Path(name).name != "zarr.json":
            continue
        known.add(name)
        node = (path / name).parent
        try:
            about = read_sealed(node)
            if about.get("node_type") == "array":
                chunk = node.joinpath("c", *("0" for _ in about["shape"]))
                known.add(str(chunk.relative_to(path)))
                read_array(node)
                attributes, name = about["attributes"], str(node.relative_to(path))
                if places is not None and not are_of(attributes, places):
                    yield Finding(name, f"features of another slide, or of other tiles; {_EMBED}")
                elif not have_own_values(node, attributes):
                    yield Finding(name, f"its values are of other features; {_EMBED}")
        except (CacheCorruptError, CacheMissingError, KeyError, TypeError):
            name = str(node.relative_to(path))
            known.update(file for file in files if file.startswith(f"{name}/") and name != FEATURES)
            yield Finding(name, _FEATURES_FAIL)
    for name in sorted(files - known):
        yield Finding(name, "not part of the cache")


def _keep_sound_features(found: Verification, group: Path) -> None:
    """Keeps sound features, since a repair of the tiles changes no pixel."""
    source = found.path / FEATURES
    shutil.rmtree(group / FEATURES, ignore_errors=True)  # a run killed in here left some of them
    if not source.is_dir():
        return
    damaged = {Path(finding.file) for finding in found.findings}
    (group / FEATURES).mkdir(parents=True)
    if Path(FEATURES) not in damaged:
        _link_or_copy(source / "zarr.json", group / FEATURES / "zarr.json")
    for node in sorted(source.iterdir()):
        if node.is_dir() and not any(p.is_relative_to(node.relative_to(found.path)) for p in damaged):
            shutil.copytree(node, group / FEATURES / node.name, copy_function=_link_or_copy)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # many shares have no hard links
        shutil.copy2(source, target)
        fsync_path(Path(target))


_Made = Iterator[tuple[bytes | None, SlideReadError | None]]


@contextlib.contextmanager
def _planned(
    found: Verification, header: CacheHeader, slide_path: Path
) -> Iterator[tuple[TilePlan | PatchPlan, Callable[[list[int]], _Made]]]:
    """Opens the slide of a cache, at the spacing of the cache, and plans its tiles as before."""

    def check_same(fingerprint: str) -> None:
        if fingerprint != header.fingerprint:
            raise CacheMismatchError(
                f"{slide_path}: not the slide that the cache of {header.slide_id} was made from; "
                "name the right one with --slides, or tile again with --overwrite"
            )

    spec, mpp = header.spec, header.mpp_level0
    if spec.is_volume:
        series = open_series(slide_path)
        check_same(series.fingerprint)
        patches = plan_patches(series, spec, header.location_mm)
        encode = tile_codec(spec).encode
        yield patches, lambda numbers: ((encode(patches.patch(n)), None) for n in numbers)
        return
    with open_slide(slide_path, icc=spec.icc, mpp_replace=mpp, channels=spec.channels) as slide:
        check_same(slide.info.fingerprint)
        plan = plan_tiles(slide, spec)
        if header.regions:
            plan = _confined(found, header, plan)
        yield plan, lambda numbers: _encoded(slide, plan, numbers)


def _confined(found: Verification, header: CacheHeader, plan: TilePlan) -> TilePlan:
    """Confines the plan of a whole slide to the tiles of a cache made of regions, which are not stored."""
    again = "tile the slide again with --regions and --overwrite"
    if header.tiles_unreadable:
        raise CacheCorruptError(
            f"{found.path}: tiles within its regions were left out as unreadable; {again}"
        )
    try:
        origins = read_array(found.path / "origin_level0")
    except (CacheCorruptError, CacheMissingError) as error:
        raise CacheCorruptError(
            f"{found.path}: the places of its tiles in regions are damaged; {again}"
        ) from error
    wanted = set(map(tuple, origins.tolist()))
    is_kept = np.array([tuple(origin) in wanted for origin in plan.origins_level0.tolist()], bool)
    if not np.array_equal(plan.origins_level0[is_kept], origins):
        raise CacheMismatchError(f"{found.path}: this slidetl selects other tiles; {again}")
    return replace(
        plan,
        origins_level0=plan.origins_level0[is_kept],
        tissue_fraction=plan.tissue_fraction[is_kept],
        quality={name: values[is_kept] for name, values in plan.quality.items()},
    )


def _kept_in_plan(found: Verification, header: CacheHeader, plan: TilePlan | PatchPlan) -> list[int]:
    """Finds the number in the plan of each tile of the cache.

    Raises:
        CacheMismatchError: the plan has other tiles: this slidetl, or reads that failed then, selected them.
        CacheCorruptError: tiles were left out, and their places are damaged.
    """
    again = "tile the slide again with --overwrite"
    differ = CacheMismatchError(f"{found.path}: this slidetl selects other tiles; {again}")
    damaged = {Path(finding.file).parts[0] for finding in found.findings}
    stored = {}
    for name, (values, _) in plan.arrays(np.ones(len(plan), bool)).items():
        if name in _OF_EACH_TILE and name not in damaged:
            with contextlib.suppress(CacheCorruptError, CacheMissingError):
                stored[name] = values, read_array(found.path / name)
    if not header.tiles_unreadable:
        is_same = all(np.array_equal(*pair) for pair in stored.values())
        if not (is_same if stored else found.tiles == len(plan)):
            raise differ
        return list(range(len(plan)))
    if "origin_level0" not in stored:
        raise CacheCorruptError(
            f"{found.path}: tiles were left out, and the list of which is damaged; {again}"
        )
    planned, origins = (list(map(tuple, array.tolist())) for array in stored["origin_level0"])
    number_of = {origin: number for number, origin in enumerate(planned)}
    kept = [number_of.get(origin, -1) for origin in origins]
    if -1 in kept or len(plan) - len(kept) > header.tiles_unreadable:
        raise differ
    return kept


def _encoded(slide: Slide, plan: TilePlan, numbers: list[int]) -> _Made:
    """Encodes tiles of a plan as before; neighbours share reads, so the plan stays complete.

    Yields:
        The bytes of a tile, or the error if it cannot be read.
    """
    codec = tile_codec(plan.spec)
    tiles: Iterator[tuple[int, bytes | None]] = iter(())
    at = -1
    for number in numbers:
        if at < 0 or number - at > TILES_PER_SHARD:
            tiles = encode_tiles(slide, plan, number)
        at = number
        payload = next(payload for tile, payload in tiles if tile == number)
        if payload is not None and _is_readable(codec, payload, plan.spec.tile_shape):
            yield payload, None
            continue
        try:
            yield encode_tile(slide, plan, number), None
        except SlideReadError as error:
            yield None, error


def _payload(path: Path, tile: int) -> bytes:
    number, place = divmod(tile, TILES_PER_SHARD)
    return Shard(shard_path(path, number)).chunk(place)
