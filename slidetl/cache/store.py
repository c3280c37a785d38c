"""A slide's tiles on disk: layout and fast random reading. See docs/design/cache.md.

The folder is a zarr v3 group that zarr writes the metadata of and opens; the tiles themselves are written and
read here, by zarr's sharding specification, since a shard must be committed at once and a tile be found fast.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

import slidetl
from slidetl.cache.codec import TileCodec, decode_zstd, tile_codec
from slidetl.errors import CacheCorruptError, CacheMismatchError, CacheMissingError, UsageError
from slidetl.grid import TileSpec
from slidetl.tissue import TissueMask

# Raised whenever the same slide and TileSpec would give other tiles, or the same tiles in another layout.
FORMAT_VERSION = 1

# 256 tiles are 5 to 10 MB: few files, little lost when a run is killed, and little held in memory.
TILES_PER_SHARD = 256

MISSING = 2**64 - 1  # in a shard's index: no such chunk (zarr sharding specification)
_INDEX_BYTES = TILES_PER_SHARD * 16 + 4

# What to do about damage that shows when a cache is opened; damaged tiles show only when they are read, and
# --overwrite would keep them.
_TILE_AGAIN = "tile the slide again with --overwrite"


@dataclass(frozen=True)
class CacheHeader:
    """What is said of all the tiles of a slide together; stored as the attributes of the group.

    Attributes:
        slide_id: the name under which the slide is cached.
        fingerprint: SHA-256 of the slide's content, :func:`slidetl.slides.base.fingerprint_of`.
        vendor: of the scanner, as the reader calls it.
        size_level0: width and height of the slide, level-0 pixels.
        mpp_level0: spacing of level 0 along x and y, micrometres per pixel.
        mpp_read: spacing of the tiles along x and y, within ``spec.mpp_tolerance`` of ``spec.mpp``.
        extent_level0: size of a tile ``(x, y)``, level-0 pixels.
        spec: how the tiles were made.
        tiles_without_tissue: places on the grid left out for having too little tissue.
        tiles_unreadable: tiles left out because the slide is damaged there.
    """

    slide_id: str
    fingerprint: str
    vendor: str
    size_level0: tuple[int, int]
    mpp_level0: tuple[float, float]
    mpp_read: tuple[float, float]
    extent_level0: tuple[float, float]
    spec: TileSpec
    tiles_without_tissue: int = 0
    tiles_unreadable: int = 0

    def to_attributes(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return {
            "format_version": FORMAT_VERSION,
            "software": f"slidetl {slidetl.__version__}",
            **values,
            "spec": self.spec.to_dict(),
        }

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_attributes`."""
        values = {name: attributes[name] for name in cls.__dataclass_fields__}
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**{**values, "spec": TileSpec.from_dict(attributes["spec"])})


@dataclass(frozen=True, eq=False)
class SlideCache:
    """The finished tiles of one slide, to be read at random.

    It holds no open file, so it can be pickled, and used after a fork or a spawn alike.

    Attributes:
        path: the folder, ``<cache>/<slide_id>.zarr``.
        header: what is said of all tiles together; its fields are properties here as well.
        origins_level0: ``[N, 2] int32``, upper-left corner ``(x, y)`` of each tile, level-0 pixels.
        tissue_fraction: ``[N] float32``, share of each tile that is tissue, 0..1.
    """

    path: Path
    header: CacheHeader
    origins_level0: NDArray[np.int32]
    tissue_fraction: NDArray[np.float32]
    _codec: TileCodec = field(repr=False)
    _indices: dict[int, NDArray[np.uint64]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path, spec: TileSpec | None = None) -> Self:
        """Opens a finished cache.

        Args:
            path: the folder.
            spec: how the tiles must have been made; None takes them as they are.

        Raises:
            CacheMissingError: there is no cache, or it was never finished.
            CacheMismatchError: it was made in another format, or by another ``spec``.
            CacheCorruptError: its metadata fail their checksum.
        """
        path = Path(path)
        header = read_header(path)
        if spec is not None and header.spec != spec:
            raise CacheMismatchError(f"{path}: {describe_difference(header.spec, spec)}")
        return cls(
            path,
            header,
            _read_array(path / "origin_level0"),
            _read_array(path / "tissue_fraction"),
            tile_codec(header.spec),
        )

    def __len__(self) -> int:
        return len(self.origins_level0)

    @property
    def slide_id(self) -> str:
        """The name under which the slide is cached."""
        return self.header.slide_id

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the slide's content."""
        return self.header.fingerprint

    @property
    def spec(self) -> TileSpec:
        """How the tiles were made."""
        return self.header.spec

    @property
    def size_level0(self) -> tuple[int, int]:
        """Width and height of the slide, level-0 pixels."""
        return self.header.size_level0

    @property
    def mpp_level0(self) -> tuple[float, float]:
        """Spacing of level 0 along x and y, micrometres per pixel."""
        return self.header.mpp_level0

    @property
    def mpp_read(self) -> tuple[float, float]:
        """Spacing of the tiles along x and y, micrometres per pixel."""
        return self.header.mpp_read

    @property
    def extent_level0(self) -> tuple[float, float]:
        """Size of a tile ``(x, y)``, level-0 pixels."""
        return self.header.extent_level0

    @property
    def thumbnail(self) -> NDArray[np.uint8]:
        """The whole slide, ``[h, w, 3] uint8``, read anew each time."""
        return _read_array(self.path / "thumbnail")

    @property
    def thumbnail_mpp(self) -> float:
        """Spacing of :attr:`thumbnail`, micrometres per pixel."""
        return float(_read_json(self.path / "thumbnail")["attributes"]["mpp"])

    @property
    def tissue_mask(self) -> TissueMask:
        """Where there is tissue; the frame of :attr:`thumbnail`."""
        mpp = float(_read_json(self.path / "tissue_mask")["attributes"]["mpp"])
        return TissueMask(_read_array(self.path / "tissue_mask"), mpp)

    def read(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Reads tiles in the order asked for; a tile may be asked for more than once.

        Returns:
            ``[n, S, S, 3] uint8`` RGB.

        Raises:
            IndexError: there is no such tile.
            CacheCorruptError: a tile fails its checksum; the message names it.
            CacheMissingError: a file of the cache is gone.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(
                f"{self.path}: tiles are numbered 0 to {len(self) - 1}, asked for {wanted.tolist()}"
            )
        size = self.spec.tile_size_px
        tiles = np.empty((len(wanted), size, size, 3), np.uint8)
        shards = wanted // TILES_PER_SHARD
        for shard in np.unique(shards):
            with self._open_shard(int(shard)) as file:
                for place in np.flatnonzero(shards == shard):
                    tiles[place] = self._read_tile(file, int(wanted[place]))
        return tiles

    def _open_shard(self, shard: int) -> IO[bytes]:
        path = shard_path(self.path, shard)
        try:
            # Unbuffered: a tile is read by one call, at a place of its own.
            return path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise CacheMissingError(
                f"{path}: the shard is missing; delete {self.path.name} and tile the slide again"
            ) from error

    def _read_tile(self, file: IO[bytes], tile: int) -> NDArray[np.uint8]:
        shard, place = divmod(tile, TILES_PER_SHARD)
        if shard not in self._indices:
            self._indices[shard] = _read_index(file)
        offset, length = (int(n) for n in self._indices[shard][place])
        if offset == MISSING:
            raise CacheCorruptError(
                f"{file.name}: tile {tile} of {self.slide_id} is not in its shard's index"
            )
        data = os.pread(file.fileno(), length, offset)
        try:
            return self._codec.decode(_checked(data))
        except CacheCorruptError as error:
            raise CacheCorruptError(
                f"{file.name}: tile {tile} of {self.slide_id} is damaged ({error}); "
                f"delete {self.path.name} and tile the slide again"
            ) from error


def cache_path(cache_dir: Path, slide_id: str) -> Path:
    """Where the tiles of a slide lie."""
    return cache_dir / f"{slide_id}.zarr"


def discard(cache_dir: Path, slide_id: str, finished: bool = False) -> None:
    """Removes what was begun for a slide, and on request what is finished; under :func:`slide_lock`."""
    building = building_path(cache_dir, slide_id)
    if finished and cache_path(cache_dir, slide_id).exists():
        # Renamed first, so that a kill never leaves half a cache under the name of a whole one.
        building.mkdir(parents=True, exist_ok=True)
        cache_path(cache_dir, slide_id).rename(building / "discarded")
    if building.exists():
        shutil.rmtree(building)


def read_header(path: Path) -> CacheHeader:
    """Reads what a finished cache says of itself.

    Raises:
        CacheMissingError: there is no cache, or it was never finished.
        CacheMismatchError: another version of the format.
        CacheCorruptError: what it says cannot be understood.
    """
    try:
        attributes = _read_json(path).get("attributes", {})
    except CacheMissingError as error:
        raise CacheMissingError(f"{path}: no tile cache here; make it with 'slidetl tile'") from error
    try:
        if attributes.get("complete") is not True:
            raise CacheMissingError(f"{path}: the tile cache was never finished; run 'slidetl tile' again")
        if attributes["format_version"] != FORMAT_VERSION:
            raise CacheMismatchError(
                f"{path}: made in format {attributes['format_version']}, this slidetl reads "
                f"{FORMAT_VERSION}; tile into another folder, or with --overwrite"
            )
        return CacheHeader.from_attributes(attributes)
    except (AttributeError, KeyError, TypeError, UsageError) as error:
        raise CacheCorruptError(
            f"{path / 'zarr.json'}: not the attributes of a tile cache ({error!r}); {_TILE_AGAIN}"
        ) from error


def describe_difference(cached: TileSpec, wanted: TileSpec) -> str:
    """In what two specifications differ, for an error message."""
    now, then = wanted.to_dict(), cached.to_dict()
    differences = [f"{name} {then[name]} (wanted: {now[name]})" for name in now if now[name] != then[name]]
    return f"the cache was made with {', '.join(differences)}"


@contextlib.contextmanager
def slide_lock(cache_dir: Path, slide_id: str) -> Iterator[None]:
    """Keeps other processes from writing the same slide; waits while one does. It dies with its owner."""
    locks = cache_dir / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    # The file stays: to unlink it would let two processes hold locks on two files of one name.
    with (locks / f"{slide_id}.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def checksum(data: bytes) -> bytes:
    """The crc32c that zarr's codec of that name appends, 4 bytes, little-endian."""
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def _checked(data: bytes) -> bytes:
    """Bytes without the crc32c at their end, once it agrees."""
    content, stored = data[:-4], data[-4:]
    if checksum(content) != stored:
        raise CacheCorruptError(
            f"crc32c is {checksum(content).hex()}, stored is {stored.hex()}, over {len(content)} bytes"
        )
    return content


def building_path(cache_dir: Path, slide_id: str) -> Path:
    """Where a slide's cache grows until it is whole."""
    return cache_dir / ".building" / slide_id


def shard_path(group: Path, shard: int) -> Path:
    """The file of a shard in a slide's group."""
    return group / "tiles" / "c" / str(shard) / "0" / "0" / "0"


def _read_index(file: IO[bytes]) -> NDArray[np.uint64]:
    size = os.fstat(file.fileno()).st_size
    try:
        packed = _checked(os.pread(file.fileno(), _INDEX_BYTES, max(size - _INDEX_BYTES, 0)))
        return np.frombuffer(packed, "<u8").reshape(TILES_PER_SHARD, 2)
    except (CacheCorruptError, ValueError) as error:
        raise CacheCorruptError(
            f"{file.name}: the shard's index is damaged ({error}); delete the slide's cache and tile it again"
        ) from error


def _read_json(node: Path) -> dict[str, Any]:
    path = node / "zarr.json"
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheMissingError(f"{path}: no such file") from error
    except ValueError as error:
        raise CacheCorruptError(f"{path}: not JSON ({error}); {_TILE_AGAIN}") from error
    if not isinstance(values, dict):
        raise CacheCorruptError(f"{path}: expected a JSON object, found another value; {_TILE_AGAIN}")
    return values


def _read_array(node: Path) -> NDArray[Any]:
    """One of the small arrays, which are a single chunk each: no need to start zarr in every worker."""
    about = _read_json(node)
    try:
        shape, dtype = about["shape"], np.dtype(about["data_type"]).newbyteorder("<")
        chunk = node.joinpath("c", *("0" for _ in shape))
        content = decode_zstd(_checked(chunk.read_bytes()))
        return np.frombuffer(content, dtype).reshape(shape).copy()  # a buffer of bytes is read-only
    except FileNotFoundError as error:
        raise CacheMissingError(f"{chunk}: no such file; {_TILE_AGAIN}") from error
    except (CacheCorruptError, KeyError, TypeError, ValueError) as error:
        raise CacheCorruptError(f"{node}: the array is damaged ({error}); {_TILE_AGAIN}") from error
