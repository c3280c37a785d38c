"""Writes one slide's cache; :mod:`slidetl.tiles.store` reads it. See docs/design/cache.md for the layout."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from slidetl.errors import CacheCorruptError, UsageError
from slidetl.files import fsync_path, write_whole
from slidetl.tiles.codec import ZSTD_LEVEL, encode_zstd, tile_codec
from slidetl.tiles.patches import PatchPlan
from slidetl.tiles.plan import TilePlan
from slidetl.tiles.store import (
    FEATURES,
    MISSING,
    TILES_PER_SHARD,
    CacheHeader,
    Shard,
    SlideCache,
    building_path,
    cache_path,
    checksum,
    file_digest,
    sealed,
    shard_digest,
    shard_name,
)

# Least interval between notes of the progress. Each waits for the disk, and would delay the copying of tiles
# more than all else; a killed run may lose the work of this interval.
_NOTE_SECONDS = 0.5

_SYNCED_TOGETHER = 16


class CacheWriter:
    """Writes one slide's cache, shard by shard, so a killed run loses next to nothing.

    The group grows in ``<cache>/.building/<slide_id>/group`` and is renamed to its place when complete.
    ``progress.json`` beside it records the progress, the slide and the parameters: partial work for others is
    deleted. The caller holds :func:`slide_lock`.

    A separate thread commits shards, so the next tiles are read while the disk works. Leaving the context
    ends all writing and notes the progress.

    Args:
        cache_dir: the folder of all caches.
        header: metadata of the slide; ``tiles_unreadable`` is counted here.
        plan: all the tiles wanted, readable or not; at least one.
        check: called before every commit; it raises if this writer no longer holds the slide.
    """

    def __init__(
        self,
        cache_dir: Path,
        header: CacheHeader,
        plan: TilePlan | PatchPlan,
        check: Callable[[], object] | None = None,
    ) -> None:
        self._header = header
        self._plan = plan
        self._check = check or (lambda: None)
        self._target = cache_path(cache_dir, header.slide_id)
        self._building = building_path(cache_dir, header.slide_id)
        self._group = self._building / "group"
        self._pending: list[bytes] = []
        self._unreadable: list[int] = []
        self._next = 0
        self._shards = 0
        self._committer = ThreadPoolExecutor(1)
        self._commit: Future[None] | None = None
        self._syncer = ThreadPoolExecutor(_SYNCED_TOGETHER)
        self._syncing: list[Future[None]] = []
        # A single shard is made again faster than its thirty files and folders are made durable one by one.
        # After a power cut, the seal tells if it is complete (`slidetl.tiles.store.is_intact`).
        self._is_small = len(plan) <= TILES_PER_SHARD
        self._digests: dict[str, str] = {}
        self._unnoted: dict[str, Any] | None = None
        self._noted_s = -math.inf
        self._resume()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._committer.shutdown()
        # If the slide or the disk is lost, another error is already on its way.
        with contextlib.suppress(OSError):
            self._note()
        self._syncer.shutdown()

    @property
    def next_tile(self) -> int:
        """The first of the tiles wanted still to be added."""
        return self._next

    @property
    def unreadable(self) -> int:
        """Number of unreadable tiles so far."""
        return len(self._unreadable)

    def add(self, tile: int, payload: bytes | None) -> None:
        """Adds the next tile.

        Args:
            tile: its number among the tiles wanted; it must be :attr:`next_tile`.
            payload: its bytes from :class:`~slidetl.tiles.codec.TileCodec`; None if unreadable.

        Raises:
            UsageError: tiles come out of order.
            OSError: an earlier shard could not be written.
        """
        if tile != self._next:
            raise UsageError(f"tile {self._next} was to be added next, not {tile}")
        self._next += 1
        if payload is None:
            self._unreadable.append(tile)
        else:
            self._pending.append(payload)
            if len(self._pending) == TILES_PER_SHARD:
                self._commit_shard()

    def finish(self) -> SlideCache:
        """Writes pending tiles and all metadata, then puts the cache in its place.

        Raises:
            UsageError: not all tiles were added.
        """
        if self._next != len(self._plan):
            raise UsageError(f"{self._next} of {len(self._plan)} tiles were added")
        self._committed()
        self._committer.shutdown()
        if self._pending:
            self._write_shard(self._shards, self._pending, None)
        self._unnoted = None  # the group is whole before anyone could read the note
        self._write_metadata()
        if not self._is_small:
            self._sync_group()
        self._check()
        if self._target.exists():
            self._target.rename(self._building / "old")
        self._group.rename(self._target)
        if not self._is_small:
            fsync_path(self._target.parent)
        shutil.rmtree(self._building)
        return SlideCache.open(self._target, self._header.spec)

    def _identity(self) -> dict[str, Any]:
        """Returns the values required to be equal to resume a build."""
        plan = google_crc32c.value(self._plan.identity)
        return {**self._header.identity(), "tiles_wanted": len(self._plan), "plan": plan}

    def _resume(self) -> None:
        try:
            progress = json.loads((self._building / "progress.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            progress = {}
        shards = (progress.get("next_tile", 0) - len(progress.get("unreadable", ()))) // TILES_PER_SHARD
        try:
            names = map(shard_name, range(shards))
            digests = {name: Shard(self._group / name).digest() for name in names}
        except (FileNotFoundError, CacheCorruptError):
            digests = None  # after a power cut the note may be there and a shard not
        if progress.get("identity") == self._identity() and digests is not None:
            self._next, self._unreadable, self._shards = progress["next_tile"], progress["unreadable"], shards
            self._digests = digests
        elif self._building.exists():
            shutil.rmtree(self._building)
        self._group.mkdir(parents=True, exist_ok=True)

    def _commit_shard(self) -> None:
        """Starts the commit of the pending tiles after the previous one: at most two shards are in memory."""
        self._committed()
        progress = {
            "identity": self._identity(),
            "next_tile": self._next,
            "unreadable": self._unreadable.copy(),
        }
        self._commit = self._committer.submit(self._write_shard, self._shards, self._pending, progress)
        self._pending = []
        self._shards += 1

    def _committed(self) -> None:
        """Waits for the present shard, and raises its error."""
        if self._commit is not None:
            self._commit.result()

    def _write_shard(self, shard: int, payloads: list[bytes], progress: dict[str, Any] | None) -> None:
        """Writes a shard, without a temporary name, since it is not trusted before it is noted."""
        self._check()
        path = self._group / shard_name(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        parts, self._digests[shard_name(shard)] = pack_shard(payloads)
        _write(path, parts)
        if self._is_small:
            return
        # The disk writes these while the next tiles are read.
        self._sync(path, *list(path.parents)[:3])
        self._unnoted = progress
        if time.monotonic() - self._noted_s >= _NOTE_SECONDS:
            self._note()

    def _note(self) -> None:
        """Notes the progress once the shards are durable: a kill between the two costs their repetition."""
        if self._unnoted is None:
            return
        self._check()
        self._synced()
        note = json.dumps(self._unnoted).encode()
        write_whole(self._building / "progress.json", note)
        self._unnoted = None
        self._noted_s = time.monotonic()

    def _sync(self, *paths: Path) -> None:
        """Starts to make files and folders durable, several at a time, to share the disk's work."""
        self._syncing += [self._syncer.submit(fsync_path, path) for path in paths]

    def _synced(self) -> None:
        """Waits for them, and raises their errors."""
        for done in self._syncing:
            done.result()
        self._syncing = []

    def _sync_group(self) -> None:
        """Makes all of the group durable."""
        shards = self._group / "tiles" / "c"
        self._sync(self._group, shards)
        for node in self._group.iterdir():
            self._sync(node, *(path for path in node.rglob("*") if shards not in (path, *path.parents)))
        self._synced()

    def _write_metadata(self) -> None:
        """Writes all but the shards, by zarr's specification; the document with the seal comes last."""
        # A run killed in here left some of it.
        for entry in self._group.iterdir():
            if entry.name not in ("tiles", FEATURES):  # those of a cache under repair
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

        is_readable = np.ones(len(self._plan), bool)
        is_readable[self._unreadable] = False
        self._digests |= write_arrays(self._group, self._plan.arrays(is_readable))
        attributes = {**self._header.to_attributes(), "tiles_unreadable": len(self._unreadable)}
        tiles = sealed(_tiles_document(int(is_readable.sum()), self._header, attributes))
        (self._group / "tiles").mkdir(exist_ok=True)
        (self._group / "tiles" / "zarr.json").write_bytes(tiles)
        self._digests["tiles/zarr.json"] = file_digest(tiles)
        write_seal(self._group, attributes, self._digests)


def write_arrays(group: Path, arrays: Mapping[str, tuple[NDArray[Any], Mapping[str, Any]]]) -> dict[str, str]:
    """Writes small arrays of a group, of one chunk each.

    Args:
        group: the folder.
        arrays: values and attributes by name.

    Returns:
        The digest of each file written, by its name in the group.
    """
    digests = {}

    def put(name: str, content: bytes) -> None:
        path = group / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digests[name] = file_digest(content)

    for name, (values, about) in arrays.items():
        put(f"{name}/zarr.json", json.dumps(_array_document(values, about), indent=2).encode())
        chunk = encode_zstd(values.astype(values.dtype.newbyteorder("<")).tobytes())
        put("/".join((name, "c", *"0" * values.ndim)), chunk + checksum(chunk))
    return digests


def write_seal(group: Path, attributes: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Writes the metadata of a group with the digests of its files, the last step to complete it."""
    about = {**attributes, "complete": True, "checksums": dict(sorted(digests.items()))}
    document = {"attributes": about, "zarr_format": 3, "node_type": "group"}
    (group / "zarr.json").write_bytes(sealed(document))


def _tiles_document(count: int, header: CacheHeader, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the metadata of the tiles as zarr writes them."""
    tile = list(header.spec.tile_shape)
    serializer, compressors = tile_codec(header.spec).zarr_codecs()
    sharding = {
        "chunk_shape": [1, *tile],
        "codecs": [serializer.to_dict(), *(codec.to_dict() for codec in compressors), _CRC32C],
        "index_codecs": [_LITTLE_ENDIAN, _CRC32C],
        "index_location": "end",
    }
    codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    names = ["tile", "z", "y", "x"] if header.spec.is_volume else ["tile", "y", "x", "channel"]
    dtype = header.spec.dtype.name
    return _document(
        [count, *tile], dtype, [TILES_PER_SHARD, *tile], codecs, attributes, dimension_names=names
    )


def _array_document(values: NDArray[Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the metadata of an array in one chunk as zarr writes them."""
    zstd = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
    codecs = [_LITTLE_ENDIAN if values.dtype.itemsize > 1 else {"name": "bytes"}, zstd, _CRC32C]
    return _document(list(values.shape), values.dtype.name, list(values.shape), codecs, attributes)


_CRC32C = {"name": "crc32c"}
_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}


def _document(
    shape: list[int],
    dtype: str,
    chunk_shape: list[int],
    codecs: list[dict[str, Any]],
    attributes: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    return {
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": np.dtype(dtype).type().item(),
        "codecs": codecs,
        "attributes": dict(attributes),
        **more,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def pack_shard(payloads: Sequence[bytes]) -> tuple[list[bytes], str]:
    """Packs a shard by zarr's sharding specification: chunks with their crc32c, then the index with its own.

    Returns:
        The shard in parts, and its digest (:func:`slidetl.tiles.store.shard_digest`).
    """
    index = np.full((TILES_PER_SHARD, 2), MISSING, "<u8")
    parts: list[bytes] = []
    offset = 0
    for place, payload in enumerate(payloads):
        index[place] = offset, len(payload) + 4
        offset += len(payload) + 4
        parts += (payload, checksum(payload))
    packed = index.tobytes()
    packed += checksum(packed)
    return [*parts, packed], shard_digest(parts[1::2], packed)


def _write(path: Path, parts: Sequence[bytes]) -> None:
    """Writes a file without joining its parts first, which would cost as much as the write."""
    with path.open("wb", buffering=0) as file:
        written = os.writev(file.fileno(), parts)
        rest = memoryview(b"".join(parts))[written:] if written < sum(map(len, parts)) else b""
        while rest:
            rest = rest[file.write(rest) :]  # says why, if it is the disk that is full
