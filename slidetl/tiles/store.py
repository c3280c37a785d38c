"""A slide's tiles on disk: layout and fast random reading. See docs/design/cache.md.

The folder is a zarr v3 group with metadata for zarr; this module reads and writes the tiles themselves, by
zarr's sharding specification, since a shard must be committed at once and a tile be found fast.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from slidetl.errors import CacheCorruptError, CacheMismatchError, CacheMissingError, UsageError
from slidetl.files import is_full
from slidetl.slides.decoding import map_in_order
from slidetl.slides.turn import ViewerFrame
from slidetl.tiles.codec import TileCodec, decode_zstd, tile_codec
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.tissue import TissueMask
from slidetl.version import VERSION
from slidetl.volumes.frame import Triple, VolumeFrame

# Raised whenever the same slide and TileSpec would give other tiles, or the same tiles in another layout.
FORMAT_VERSION = 4

# 256 tiles are 5 to 10 MB: few files, little lost when a run is killed, and little held in memory.
TILES_PER_SHARD = 256

MISSING = 2**64 - 1  # in a shard's index: no such chunk (zarr sharding specification)
INDEX_BYTES = TILES_PER_SHARD * 16 + 4

# Remedy for damage found on opening a cache; damaged tiles show only when read, and --overwrite would keep
# them.
_TILE_AGAIN = "mend it with 'slidetl cache verify --repair', or tile the slide again with --overwrite"
_REPAIR = "mend it with 'slidetl cache verify --repair'"

_SHARED = "users who share a cache need a folder of their group, and umask 002 when they tile"

# Its bytes are as written, so they were copied from a slide with damage there.
_LEAVE_OUT = "so is the slide; leave out such tiles with 'slidetl cache verify --decode --repair'"

# Shards kept open by a process: a tile then takes one call, and 1,000 slides need no 1,000 files.
_OPEN_SHARDS = 64

# Largest plausible size of a small array: features of 400,000 tiles, 2,560 numbers each.
_MAX_ARRAY_BYTES = 2 * 2**30

# Fields of the header that are written if they differ from their default.
_OPTIONAL = frozenset(
    [
        *("tiles_without_data", "imported", "tiles_outside_regions", "regions", "corner_level0"),
        *("orientation", "frame", "location_mm"),
    ]
)

FEATURES = "features"  # the part of a group stored after the rest, with its own seals
_SEAL = re.compile(rb'"crc32c": "([0-9a-f]{8})"')


@dataclass(frozen=True)
class CacheHeader:
    """Slide-level metadata of a cache; stored as the attributes of the group.

    Attributes:
        slide_id: the name of the slide's cache.
        fingerprint: SHA-256 of the slide's content, :func:`slidetl.slides.base.fingerprint_of`.
        vendor: of the scanner, as the reader calls it.
        size_level0: width and height of the slide, level-0 pixels.
        mpp_level0: spacing of level 0 along x and y, micrometres per pixel.
        mpp_read: spacing of the tiles along x and y, within ``spec.mpp_tolerance`` of ``spec.mpp``.
        extent_level0: size of a tile ``(x, y)``, level-0 pixels.
        spec: specification of the tiles.
        tiles_without_tissue: places on the grid left out for having too little tissue.
        tiles_without_data: of these, places on areas without data.
        tiles_pen, tiles_fold, tiles_air, tiles_out_of_focus: tiles with tissue left out for their quality.
        tiles_unreadable: tiles left out because the slide is damaged there.
        imported: the tool behind imported features, whose tiles are not here; empty for a tiled slide. Sizes
            and spacings are then 0 if its file does not state them, and tissue is NaN.
        tiles_outside_regions: tiles with tissue left out for lying outside the regions.
        regions: digest of the regions that the tiles lie in, :attr:`slidetl.tiles.regions.Regions.digest`;
            empty if the whole slide was tiled.
        corner_level0: of the scanned area, :class:`slidetl.slides.base.SlideInfo`; None if not recorded.
        orientation: as applied to the slide; None if not recorded.
        frame: the grid that patches of a CT series are cut from, at ``spec.spacing_mm``; None for a slide.
            Sizes and spacings of level 0 are then those of the series along x and y, 1000 um per millimetre.
        location_mm: patient coordinates of the centre of the only patch, if one was asked for.
        software: release that wrote it; empty before it is written.
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
    tiles_without_data: int = 0
    tiles_pen: int = 0
    tiles_fold: int = 0
    tiles_air: int = 0
    tiles_out_of_focus: int = 0
    tiles_unreadable: int = 0
    imported: str = ""
    tiles_outside_regions: int = 0
    regions: str = ""
    corner_level0: tuple[int, int] | None = None
    orientation: int | None = None
    frame: VolumeFrame | None = None
    location_mm: Triple | None = None
    software: str = field(default="", compare=False)

    @property
    def viewer(self) -> ViewerFrame:
        """The frame of the slide in other programs.

        Raises:
            CacheMismatchError: it was made before the frame was recorded.
        """
        if self.corner_level0 is None or self.orientation is None:
            raise CacheMismatchError(
                f"the cache of {self.slide_id} does not record how QuPath shows the slide; tile it again "
                "with --overwrite"
            )
        return ViewerFrame(self.size_level0, self.corner_level0, self.orientation)

    def to_attributes(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        about = {"format_version": FORMAT_VERSION, "software": f"slidetl {VERSION}"}
        values: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"spec": self.spec.to_dict()}))
        del values["software"]
        for name in _OPTIONAL:  # caches from before have none of them, and keep their bytes
            if getattr(self, name) == self.__dataclass_fields__[name].default:
                del values[name]
        return about | values

    def identity(self) -> dict[str, Any]:
        """Returns the values required to be equal to resume a build: all but the software's release."""
        return {name: value for name, value in self.to_attributes().items() if name != "software"}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Self:
        """Inverts :meth:`to_attributes`."""
        fields = cls.__dataclass_fields__
        names = [name for name in fields if name in attributes or name not in _OPTIONAL]
        values = {name: attributes[name] for name in names}
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        if values.get("frame") is not None:
            values["frame"] = VolumeFrame(**values["frame"])
        return cls(**{**values, "spec": TileSpec.from_dict(attributes["spec"])})


@dataclass(frozen=True, eq=False)
class SlideCache:
    """The finished tiles of one slide, or the patches of one CT series, for random access.

    It can be pickled, and used after a fork or a spawn; each process keeps its latest shards open.

    Attributes:
        path: the folder, ``<cache>/<slide_id>.zarr``.
        header: slide-level metadata; its fields are properties here as well.
        tissue_fraction: ``[N] float32``, share of tissue in each tile, 0..1; in a patch, of ``spec.mask``.
    """

    path: Path
    header: CacheHeader
    _origins: NDArray[np.int32] = field(repr=False)
    tissue_fraction: NDArray[np.float32]
    _codec: TileCodec = field(repr=False)
    _opening: _Opening = field(default_factory=lambda: _Opening(""), repr=False)

    @classmethod
    def open(cls, path: str | Path, spec: TileSpec | None = None) -> Self:
        """Opens a finished cache.

        Args:
            path: the folder.
            spec: the specification required; None takes any.

        Raises:
            CacheMissingError: there is no cache, or it was never finished.
            CacheMismatchError: it was made in another format, or by another ``spec``.
            CacheCorruptError: its metadata fail their checksum.
        """
        path = Path(path)
        opening = _Opening(_seal_of(path))  # first: what replaces the rest meanwhile has another seal
        header = read_header(path)
        if spec is not None and header.spec != spec:
            raise CacheMismatchError(f"{path}: {describe_difference(header.spec, spec)}")
        origins, fraction = (read_array(path / n) for n in (origin_name(header.spec), "tissue_fraction"))
        return cls(path, header, origins, fraction, tile_codec(header.spec), opening)

    def __len__(self) -> int:
        return len(self._origins)

    @property
    def origins_level0(self) -> NDArray[np.int32]:
        """Upper-left corners ``[N, 2] int32``, ``(x, y)`` of each tile, level-0 pixels.

        Raises:
            CacheMismatchError: it has the patches of a CT series.
        """
        self._check_slide()
        return self._origins

    @property
    def origins_voxel(self) -> NDArray[np.int32]:
        """First voxels ``[N, 3] int32``, ``(x, y, z)`` of each patch, voxels of :attr:`frame`.

        A patch may begin before the volume and end after it; it is padded with the window's lower limit.

        Raises:
            CacheMismatchError: it has the tiles of a slide.
        """
        self.frame  # noqa: B018 # raises
        return self._origins

    @property
    def frame(self) -> VolumeFrame:
        """The grid of the patches in patient coordinates.

        Raises:
            CacheMismatchError: it has the tiles of a slide.
        """
        if self.header.frame is None:
            raise CacheMismatchError(f"{self.path}: it has the tiles of a slide, not patches of a CT series")
        return self.header.frame

    @property
    def centres_mm(self) -> NDArray[np.float64]:
        """Centres of the patches ``[N, 3]``, patient coordinates (LPS).

        Raises:
            CacheMismatchError: it has the tiles of a slide.
        """
        return self.frame.to_patient_mm(self.origins_voxel + (self.spec.tile_size_px - 1) / 2)

    @property
    def overview_hu(self) -> NDArray[np.int16]:
        """The whole series, ``[z, y, x] int16`` Hounsfield units, read at each access.

        Its grid is ``frame.at_spacing(overview_mm)``.

        Raises:
            CacheMismatchError: it has the tiles of a slide.
        """
        self.frame  # noqa: B018 # raises
        return self._array("overview")

    @property
    def overview_mask(self) -> NDArray[np.bool_]:
        """The lungs or the body by ``spec.mask``, ``[z, y, x] bool`` on the grid of :attr:`overview_hu`.

        Raises:
            CacheMismatchError: it has the tiles of a slide.
        """
        self.frame  # noqa: B018 # raises
        return self._array("mask")

    @property
    def overview_mm(self) -> float:
        """Spacing of :attr:`overview_hu`, millimetres per voxel.

        Raises:
            CacheMismatchError: it has the tiles of a slide.
        """
        self.frame  # noqa: B018 # raises
        return float(self._attributes("overview")["spacing_mm"])

    def _check_slide(self) -> None:
        if self.header.frame is not None:
            raise CacheMismatchError(
                f"{self.path}: it has the patches of a CT series, which has no level 0 and no thumbnail"
            )

    @property
    def slide_id(self) -> str:
        """The name of the slide's cache."""
        return self.header.slide_id

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the slide's content."""
        return self.header.fingerprint

    @property
    def spec(self) -> TileSpec:
        """The specification of the tiles."""
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
        """Size of a tile ``(x, y)``, level-0 pixels.

        Raises:
            CacheMismatchError: the features were imported from a file that does not state it.
        """
        if not all(self.header.extent_level0):
            raise CacheMismatchError(
                f"{self.path}: its features were imported ({self.header.imported}) without the size of a "
                "tile, so nothing can be placed on them; import a file that states it"
            )
        return self.header.extent_level0

    @property
    def places_sha256(self) -> str:
        """SHA-256 of the header and of the place of every tile; it changes if the slide is cut elsewhere."""
        return places_sha256(self.header, self._origins)

    @property
    def thumbnail(self) -> NDArray[np.uint8]:
        """The whole slide, ``[h, w, 3] uint8``, read from disk at each access.

        Raises:
            CacheMismatchError: it has the patches of a CT series, or imported features.
        """
        self._check_slide()
        self.check_tiles()
        return self._array("thumbnail")

    @property
    def thumbnail_mpp(self) -> float:
        """Spacing of :attr:`thumbnail`, micrometres per pixel."""
        self._check_slide()
        return float(self._attributes("thumbnail")["mpp"])

    @property
    def tissue_mask(self) -> TissueMask:
        """The tissue, in the frame of :attr:`thumbnail`."""
        self._check_slide()
        self.check_tiles()
        return TissueMask(self._array("tissue_mask"), float(self._attributes("tissue_mask")["mpp"]))

    @property
    def areas_unreadable(self) -> int:
        """Number of areas that could not be read when the tiles were chosen, and count as tissue."""
        self._check_slide()
        return int(self._attributes("tissue_mask").get("areas_unreadable", 0))

    @property
    def quality(self) -> dict[str, NDArray[np.float32]]:
        """``[N] float32`` each, read at each access: see :attr:`slidetl.tiles.plan.TilePlan.quality`."""
        names = ("pen", "fold", "air", "focus")
        return {name: self._array(name) for name in names if (self.path / name).is_dir()}

    def _array(self, name: str) -> NDArray[Any]:
        values = read_array(self.path / name)
        self.check_unchanged()
        return values

    def _attributes(self, name: str) -> dict[str, Any]:
        attributes: dict[str, Any] = read_json(self.path / name)["attributes"]
        self.check_unchanged()
        return attributes

    def check_unchanged(self) -> None:
        """Raises a CacheMismatchError if the slide was tiled again since the cache was opened."""
        self._opening.check(self.path)

    def check_tiles(self) -> None:
        """Raises a CacheMismatchError for imported features: the tiles behind them are not here."""
        if self.header.imported:
            raise CacheMismatchError(
                f"{self.path}: it has features imported from {self.header.imported}, and no tiles; tile the "
                "slide into another folder for what needs its tiles or its thumbnail"
            )

    def read(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Reads tiles in the given order; tiles may repeat.

        Returns:
            ``[n, S, S, 3] uint8`` RGB; of a CT series ``[n, S, S, S] int16`` Hounsfield units, axes z, y, x.

        Raises:
            IndexError: there is no such tile.
            CacheMismatchError: the features were imported, without tiles; or the slide was tiled again since
                the cache was opened.
            CacheCorruptError: a tile fails its checksum; the message names it.
            CacheMissingError: a file of the cache is gone.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(wanted):
            self.check_tiles()
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(
                f"{self.path}: tiles are numbered 0 to {len(self) - 1}, asked for {wanted.tolist()}"
            )
        if len(wanted) == 1:
            return self._read_tile(int(wanted[0]))[None]
        tiles = np.empty((len(wanted), *self.spec.tile_shape), self.spec.dtype)
        # Shard by shard, so each is opened once, at any number of shards.
        for place in np.argsort(wanted, kind="stable").tolist():
            self._read_tile(int(wanted[place]), tiles[place])
        return tiles

    def _read_tile(self, tile: int, into: NDArray[Any] | None = None) -> NDArray[Any]:
        number, place = divmod(tile, TILES_PER_SHARD)
        try:
            shard = _open_shard(self._opening, self.path, number)
        except FileNotFoundError as error:
            self.check_unchanged()
            raise CacheMissingError(f"{error.filename}: the shard is missing; {_REPAIR}") from error
        remedy = _REPAIR
        try:
            chunk = shard.chunk(place)
            remedy = _LEAVE_OUT
            return self._codec.decode(chunk, into)
        except CacheCorruptError as error:
            raise CacheCorruptError(
                f"{shard.path}: tile {tile} of {self.slide_id} is damaged ({error}); {remedy}"
            ) from error


def places_sha256(header: CacheHeader, origins: NDArray[np.int32]) -> str:
    """Computes :attr:`SlideCache.places_sha256` of the corners of all tiles."""
    about = json.dumps(header.identity(), sort_keys=True).encode()
    return hashlib.sha256(about + origins.tobytes()).hexdigest()


def cache_parts(
    cache: SlideCache, size: int, threads: int = 1
) -> Generator[tuple[int, NDArray[Any]], None, None]:
    """Yields the tiles of a cache in order, at most ``size`` at a time, and the number of the first.

    Each part is as :meth:`SlideCache.read` returns it.

    Raises:
        CacheError: a tile is damaged, or a file is gone.
    """

    def read(start: int) -> tuple[int, NDArray[Any]]:
        return start, cache.read(np.arange(start, min(start + size, len(cache))))

    yield from map_in_order(read, range(0, len(cache), size), threads)


class _Opening:
    """Marks one opening of a cache in one process, so files opened for another are not used for it.

    Its header and places of tiles are those of then, and its files are opened later, by path: ``seal`` tells
    if they are still of the same group. A repair that changes no byte keeps it.
    """

    def __init__(self, seal: str) -> None:
        self.seal = seal

    def check(self, group: Path) -> None:
        """Raises a CacheMismatchError if another group is in its place; call it after reading from there."""
        try:
            is_same = _seal_of(group) == self.seal
        except CacheMissingError:
            is_same = False
        if not is_same:
            raise CacheMismatchError(
                f"{group}: tiled again, or removed, since it was opened; what was read before is of the "
                "former tiles: run again"
            )


class Shard:
    """An open shard and its index. Reads have no position, so threads and forks may share it.

    Attributes:
        path: the file.
        descriptor: for ``os.pread``.
        size: bytes.
        index: (offset, length) of each chunk with its crc32c; offset :data:`MISSING` for none.

    Raises:
        FileNotFoundError: there is no such file.
        CacheCorruptError: the index fails its checksum.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.descriptor).st_size
        try:
            packed = checked(os.pread(self.descriptor, INDEX_BYTES, max(self.size - INDEX_BYTES, 0)))
            index = np.frombuffer(packed, "<u8").reshape(TILES_PER_SHARD, 2)
            offsets, lengths = index[index[:, 0] != MISSING].T
            # Reading allocates memory by the index, so check it first.
            if len(lengths) and (lengths.max() > self.size or (offsets > self.size - lengths).any()):
                raise CacheCorruptError(f"it names tiles beyond the {self.size} bytes of the file")
        except (CacheCorruptError, ValueError) as error:
            raise CacheCorruptError(f"{path}: the shard's index is damaged ({error}); {_REPAIR}") from error
        self.index: list[tuple[int, int]] = [(offset, length) for offset, length in index.tolist()]

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def digest(self) -> str:
        """Computes the digest of :func:`shard_digest`."""
        ends = [offset + length for offset, length in self.index if offset != MISSING]
        crcs = [os.pread(self.descriptor, 4, end - 4) for end in ends]
        return shard_digest(crcs, os.pread(self.descriptor, INDEX_BYTES, self.size - INDEX_BYTES))

    def chunk(self, place: int) -> bytes:
        """Reads the bytes of one tile and compares them with their crc32c.

        Raises:
            CacheCorruptError: they differ, or there is no such tile.
        """
        offset, length = self.index[place]
        if offset == MISSING:
            raise CacheCorruptError("it is not in its shard's index")
        return checked(os.pread(self.descriptor, length, offset))

    def damaged(self) -> Iterator[int]:
        """Reads all tiles and yields the places of those with a wrong checksum."""
        for place, (offset, _) in enumerate(self.index):
            if offset != MISSING:
                try:
                    self.chunk(place)
                except CacheCorruptError:
                    yield place


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(opening: _Opening, group: Path, number: int) -> Shard:
    shard = Shard(shard_path(group, number))
    opening.check(group)
    return shard


open_cache = SlideCache.open  # a public name of the package


def cache_path(cache_dir: Path, slide_id: str) -> Path:
    """Returns the folder of a slide's tiles."""
    return cache_dir / f"{slide_id}.zarr"


def preview_path(cache_dir: Path, slide_id: str) -> Path:
    """Returns the picture of a slide's tiles by ``--preview``."""
    return cache_dir / "previews" / f"{slide_id}.png"


def origin_name(spec: TileSpec) -> str:
    """Names the array with the places of tiles."""
    return "origin_voxel" if spec.is_volume else "origin_level0"


def groups(cache_dir: Path) -> list[Path]:
    """Lists the groups in a cache folder, by name.

    Raises:
        CacheMissingError: there is no such folder.
    """
    if not cache_dir.is_dir():
        raise CacheMissingError(f"{cache_dir}: no such folder; make a cache with 'slidetl tile'")
    return sorted(path for path in cache_dir.glob("*.zarr") if path.is_dir())


def discard(cache_dir: Path, slide_id: str, finished: bool = False) -> None:
    """Removes the partial cache of a slide, on request the finished one too; the caller holds its lock."""
    building = building_path(cache_dir, slide_id)
    if finished and cache_path(cache_dir, slide_id).exists():
        # Renamed first: a kill must not leave half a cache under the name of a complete one.
        building.mkdir(parents=True, exist_ok=True)
        cache_path(cache_dir, slide_id).rename(building / "discarded")
    if building.exists():
        shutil.rmtree(building)


def read_header(path: Path) -> CacheHeader:
    """Reads the slide-level metadata of a finished cache.

    Raises:
        CacheMissingError: there is no cache, or it was never finished.
        CacheMismatchError: another version of the format.
        CacheCorruptError: the metadata cannot be understood, or fail their checksum.
    """
    try:
        attributes = read_json(path).get("attributes", {})
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
        header = CacheHeader.from_attributes(attributes)
    except (AttributeError, KeyError, TypeError, UsageError) as error:
        raise CacheCorruptError(
            f"{path / 'zarr.json'}: not the attributes of a tile cache ({error!r}); {_TILE_AGAIN}"
        ) from error
    read_sealed(path)
    return header


def describe_difference(cached: TileSpec, wanted: TileSpec) -> str:
    """Describes the difference of two specifications for an error message."""
    now, then = asdict(wanted), asdict(cached)
    differences = [f"{name} {then[name]} (wanted: {now[name]})" for name in now if now[name] != then[name]]
    return f"the cache was made with {', '.join(differences)}"


def checksum(data: bytes) -> bytes:
    """Computes the crc32c of zarr's codec of this name, 4 bytes, little-endian."""
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def checked(data: bytes) -> bytes:
    """Removes the crc32c at the end of bytes once it agrees."""
    content, stored = data[:-4], data[-4:]
    computed = checksum(content)
    if computed != stored:
        raise CacheCorruptError(
            f"crc32c is {computed.hex()}, stored is {stored.hex()}, over {len(content)} bytes"
        )
    return content


def building_path(cache_dir: Path, slide_id: str) -> Path:
    """Returns the folder of a slide's cache while it grows."""
    return cache_dir / ".building" / slide_id


def shard_path(group: Path, shard: int) -> Path:
    """Returns the file of a shard in a slide's group."""
    return group / shard_name(shard)


def shard_name(shard: int) -> str:
    """Names a shard's file in the group."""
    return f"tiles/c/{shard}/0/0/0"


def _seal_of(group: Path) -> str:
    """Reads the seal of a group, which differs for any other content, without checking it."""
    try:
        with (group / "zarr.json").open("rb") as file:
            found = _SEAL.search(file.read(1024))  # it stands in front
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheMissingError(f"{group}: no tile cache here; make it with 'slidetl tile'") from error
    return found[1].decode() if found else ""


def seal_node(node: Path, **attributes: str) -> None:
    """Seals the metadata of an array or group added to a finished cache, such as features.

    ``attributes`` are added to its own.
    """
    about = read_json(node)
    about["attributes"] |= attributes
    (node / "zarr.json").write_bytes(sealed(about))


def read_sealed(node: Path) -> dict[str, Any]:
    """Reads a sealed metadata document.

    Raises:
        CacheMissingError: there is none.
        CacheCorruptError: it is damaged, or has no seal.
    """
    about = read_json(node)
    data = (node / "zarr.json").read_bytes()
    seals = _SEAL.findall(data)
    if not seals:
        raise CacheCorruptError(f"{node / 'zarr.json'}: it has no checksum; {_TILE_AGAIN}")
    if _crc_of_document(data) != seals[0].decode():
        raise CacheCorruptError(f"{node / 'zarr.json'}: it fails its checksum; {_TILE_AGAIN}")
    return about


def file_digest(content: bytes) -> str:
    """Computes the digest of a file other than a shard, as listed by the seal of a group.

    Not crc32c: over data ending with their own crc32c, such as zarr's chunks, it is the same for all.
    """
    return f"{zlib.crc32(content):08x}"


def shard_digest(crcs: Sequence[bytes], index: bytes) -> str:
    """Computes the digest of a shard, as listed by the seal of a group: other tiles give another digest.

    It covers the crc32c of each chunk (4 bytes), and the index.
    """
    return checksum(b"".join((*crcs, index))).hex()


def is_small(group: Path) -> bool:
    """Tells if a group has a single shard; the writer does not wait for the disk for those.

    Raises:
        CacheMissingError: there is no such group.
        CacheCorruptError: its seal is damaged.
    """
    return shard_name(1) not in read_sealed(group)["attributes"]["checksums"]


def is_intact(group: Path) -> bool:
    """Reads a complete finished group, except features, and compares every byte with its seal."""
    try:
        listed = read_sealed(group)["attributes"]["checksums"]
        for name, digest in listed.items():
            if name.startswith("tiles/c/"):
                shard = Shard(group / name)
                if shard.digest() != digest or any(shard.damaged()):
                    return False
            elif file_digest((group / name).read_bytes()) != digest:
                return False
    except (CacheCorruptError, CacheMissingError, KeyError, TypeError, OSError):
        return False
    return True


def sealed(document: Mapping[str, Any]) -> bytes:
    """Makes a metadata document of zarr with a crc32c of itself in its attributes."""
    attributes = {name: value for name, value in document["attributes"].items() if name != "crc32c"}
    # In front, so no attribute of this name can be taken for it.
    document = {**document, "attributes": {"crc32c": "00000000", **attributes}}
    data = json.dumps(document, indent=2).encode()
    return _SEAL.sub(f'"crc32c": "{_crc_of_document(data)}"'.encode(), data, count=1)


def _crc_of_document(data: bytes) -> str:
    return checksum(_SEAL.sub(b'"crc32c": "00000000"', data, count=1)).hex()


def read_json(node: Path) -> dict[str, Any]:
    """Reads the metadata document of a group or array.

    Raises:
        CacheMissingError: there is none.
        CacheCorruptError: it is no JSON object.
    """
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


def read_array(node: Path) -> NDArray[Any]:
    """Reads one of the small arrays, of a single chunk each, without starting zarr in every worker.

    Raises:
        CacheMissingError: a file of it is gone.
        CacheCorruptError: it fails its checksum.
    """
    about = read_json(node)
    try:
        shape, dtype = about["shape"], np.dtype(about["data_type"]).newbyteorder("<")
        chunk = node.joinpath("c", *("0" for _ in shape))
        size = math.prod(shape) * dtype.itemsize
        if not 0 <= size <= _MAX_ARRAY_BYTES:
            raise CacheCorruptError(f"{shape} {dtype} would be {size} bytes, more than {_MAX_ARRAY_BYTES}")
        content = decode_zstd(checked(chunk.read_bytes()), size)
        return np.frombuffer(content, dtype).reshape(shape).copy()  # a buffer of bytes is read-only
    except FileNotFoundError as error:
        raise CacheMissingError(f"{chunk}: no such file; {_TILE_AGAIN}") from error
    except (CacheCorruptError, KeyError, TypeError, ValueError) as error:
        raise CacheCorruptError(f"{node}: the array is damaged ({error}); {_TILE_AGAIN}") from error


def describe_write_error(error: Exception, folder: Path) -> str:
    """Describes the error of a write below a folder in one line.

    It has the remedy if the disk is full, or if this user may not write there.
    """
    if not is_full(error):
        path = getattr(error, "filename", None)
        if isinstance(error, PermissionError) and path and Path(path).is_relative_to(folder):
            return f"{path}: {error.strerror}; {_SHARED}"
        return str(error)
    free = shutil.disk_usage(folder).free / 2**20
    return (
        f"{folder}: the disk is full ({free:.1f} MiB free, a shard takes some 10); make space and run again: "
        "what was written is kept, and continued"
    )
