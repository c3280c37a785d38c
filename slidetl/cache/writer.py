"""Writing one slide's cache, shard by shard: a killed run continues, and nothing half-written is trusted.

See docs/design/cache.md for the layout, and :mod:`slidetl.cache.store` for reading.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from slidetl.cache.codec import tile_codec
from slidetl.cache.store import (
    MISSING,
    TILES_PER_SHARD,
    CacheHeader,
    SlideCache,
    building_path,
    cache_path,
    checksum,
    shard_path,
)
from slidetl.errors import UsageError
from slidetl.tissue import TissueMask


class CacheWriter:
    """Writes one slide's cache, shard by shard, so that a killed run loses at most one shard.

    The group grows in ``<cache>/.building/<slide_id>/group`` and is renamed to its place when it is whole.
    ``progress.json`` beside it says how far it came, and for which slide and parameters: what was begun for
    others is thrown away. The caller holds :func:`slide_lock`.

    Args:
        cache_dir: the folder of all caches.
        header: of the slide; ``tiles_unreadable`` is counted here.
        origins_level0: ``[N, 2] int32``, all the tiles wanted, readable or not.
        tissue_fraction: ``[N] float32``.
        thumbnail: ``[h, w, 3] uint8``.
        tissue_mask: its mask, and the spacing of both.
    """

    def __init__(
        self,
        cache_dir: Path,
        header: CacheHeader,
        origins_level0: NDArray[np.int32],
        tissue_fraction: NDArray[np.float32],
        thumbnail: NDArray[np.uint8],
        tissue_mask: TissueMask,
    ) -> None:
        self._header = header
        self._origins = origins_level0
        self._fraction = tissue_fraction
        self._thumbnail = thumbnail
        self._mask = tissue_mask
        self._target = cache_path(cache_dir, header.slide_id)
        self._building = building_path(cache_dir, header.slide_id)
        self._group = self._building / "group"
        self._pending: list[bytes] = []
        self._unreadable: list[int] = []
        self._next = 0
        self._shards = 0
        self._resume()

    @property
    def next_tile(self) -> int:
        """The first of the tiles wanted that is still to be added."""
        return self._next

    @property
    def unreadable(self) -> int:
        """How many tiles could not be read so far."""
        return len(self._unreadable)

    def add(self, tile: int, payload: bytes | None) -> None:
        """Adds the next tile.

        Args:
            tile: its number among the tiles wanted; it must be :attr:`next_tile`.
            payload: its bytes as :class:`~slidetl.cache.codec.TileCodec` makes them; None if unreadable.

        Raises:
            UsageError: tiles come out of order.
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
        """Writes what is pending and all metadata, then puts the cache in its place.

        Raises:
            UsageError: not all tiles were added.
        """
        if self._next != len(self._origins):
            raise UsageError(f"{self._next} of {len(self._origins)} tiles were added")
        if self._pending:
            self._commit_shard()
        self._write_metadata()
        _fsync_tree(self._group)
        old = self._building / "old"
        if self._target.exists():
            self._target.rename(old)
        self._group.rename(self._target)
        _fsync(self._target.parent)
        shutil.rmtree(self._building)
        return SlideCache.open(self._target, self._header.spec)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for tiles that were begun to be continued."""
        plan = google_crc32c.value(self._origins.tobytes() + self._fraction.tobytes())
        return {**self._header.to_attributes(), "tiles_wanted": len(self._origins), "plan": plan}

    def _resume(self) -> None:
        try:
            progress = json.loads((self._building / "progress.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            progress = {}
        shards = (progress.get("next_tile", 0) - len(progress.get("unreadable", ()))) // TILES_PER_SHARD
        # After a power cut the note may be there and a shard's folder not.
        is_there = all(shard_path(self._group, shard).is_file() for shard in range(shards))
        if progress.get("identity") == self._identity() and is_there:
            self._next, self._unreadable, self._shards = progress["next_tile"], progress["unreadable"], shards
        elif self._building.exists():
            shutil.rmtree(self._building)
        self._group.mkdir(parents=True, exist_ok=True)

    def _commit_shard(self) -> None:
        """A shard first, then the note that it is there: a kill between the two costs only its repetition."""
        path = shard_path(self._group, self._shards)
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, pack_shard(self._pending), self._building / "shard.tmp")
        is_whole = len(self._pending) == TILES_PER_SHARD
        self._pending = []
        self._shards += 1
        if is_whole:
            progress = {
                "identity": self._identity(),
                "next_tile": self._next,
                "unreadable": self._unreadable,
            }
            _replace(
                self._building / "progress.json",
                json.dumps(progress).encode(),
                self._building / "progress.tmp",
            )

    def _write_metadata(self) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec, ZstdCodec

        # A run killed in here left some of it.
        for entry in self._group.iterdir():
            if entry.name == "tiles":
                (entry / "zarr.json").unlink(missing_ok=True)
            elif entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

        is_readable = np.ones(len(self._origins), bool)
        is_readable[self._unreadable] = False
        count, size = int(is_readable.sum()), self._header.spec.tile_size_px
        serializer, compressors = tile_codec(self._header.spec).zarr_codecs()
        attributes = {**self._header.to_attributes(), "tiles_unreadable": len(self._unreadable)}
        group = zarr.create_group(self._group, attributes=attributes)
        group.create_array(
            "tiles",
            shape=(count, size, size, 3),
            dtype="uint8",
            chunks=(1, size, size, 3),
            shards=(TILES_PER_SHARD, size, size, 3),
            serializer=serializer,
            compressors=(*compressors, Crc32cCodec()),
            fill_value=0,
            dimension_names=("tile", "y", "x", "channel"),
            config={"write_empty_chunks": True},
        )
        spacing = {"mpp": self._mask.mpp}
        arrays: dict[str, tuple[NDArray[Any], dict[str, Any]]] = {
            "origin_level0": (self._origins[is_readable], {}),
            "tissue_fraction": (self._fraction[is_readable], {}),
            "thumbnail": (self._thumbnail, spacing),
            "tissue_mask": (self._mask.mask, spacing),
        }
        for name, (values, about) in arrays.items():
            group.create_array(
                name,
                data=np.ascontiguousarray(values),
                chunks=values.shape,
                compressors=(ZstdCodec(level=3), Crc32cCodec()),
                attributes=about,
                config={"write_empty_chunks": True},
            )
        group.attrs["complete"] = True


def pack_shard(payloads: Sequence[bytes]) -> bytes:
    """A shard by zarr's sharding specification: chunks with their crc32c, then the index with its own.

    Args:
        payloads: at most ``TILES_PER_SHARD`` encoded tiles, in order.
    """
    index = np.full((TILES_PER_SHARD, 2), MISSING, "<u8")
    parts: list[bytes] = []
    offset = 0
    for place, payload in enumerate(payloads):
        chunk = payload + checksum(payload)
        index[place] = offset, len(chunk)
        offset += len(chunk)
        parts.append(chunk)
    packed = index.tobytes()
    return b"".join((*parts, packed, checksum(packed)))


def _replace(path: Path, data: bytes, temporary: Path) -> None:
    """Writes a file so that after a crash it has all of the new content, or none."""
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(folder: Path) -> None:
    for entry in sorted(folder.rglob("*"), reverse=True):
        _fsync(entry)
    _fsync(folder)
