"""OME-Zarr: the first image of a group in the layout of OME-NGFF 0.4 (zarr 2) or 0.5 (zarr 3).

https://ngff.openmicroscopy.org/0.5/ gives ``multiscales``, ``omero`` and the transformations. The files are
untrusted: only known codecs decode (zarr 2 would also unpickle), and no path or link leads out of the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import SlideOpenError
from slidetl.slides.base import WHOLE_BYTES, file_digest, is_left_behind
from slidetl.slides.depth import full_of, sample_windows, to_8_bits
from slidetl.slides.levels import is_same_picture
from slidetl.slides.ome import choose_channels, note_of_others, rgb_planes
from slidetl.slides.spacing import Pair
from slidetl.slides.turn import ReadPixels

_METADATA = ("zarr.json", ".zattrs", ".zgroup", ".zarray")
_MAX_JSON_BYTES = 4 * 2**20
_MAX_LEVELS = 64
_MAX_CHANNELS = 256
_MAX_CHUNK_BYTES = 2**28  # is decoded at once, all its channels
_KEPT_BYTES = 48 * 2**20  # of decoded chunks, shared by neighbours
_MAX_PIECES = 2**26  # of a level
_PIECE = re.compile(r"(c[./])?[0-9]+([./][0-9]+)*")  # the file of a chunk or shard, in its array
_SAMPLED_FILES = 64  # of a larger image, for its fingerprint

# Of zarr 2 (numcodecs) and zarr 3. Not among them: pickle, JSON, msgpack, and whatever is installed.
_CODECS = frozenset(
    "blosc bz2 bytes crc32c gzip lz4 lzma sharding_indexed transpose zlib zstd".split()  # noqa: SIM905
)
_UM_PER_UNIT = {  # UDUNITS-2 names of NGFF's lengths
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
}


@dataclass(frozen=True)
class NgffImage:
    """The first image of an OME-Zarr.

    Attributes:
        fingerprint: of its content.
        sizes_px: width and height of every level, finest first.
        readers: of every level.
        mpp: its spacing; None if it has none with a unit.
        notes: on its pixels.
    """

    fingerprint: str
    sizes_px: list[tuple[int, int]]
    readers: list[ReadPixels]
    mpp: Pair | None
    notes: tuple[str, ...]


def is_ngff(path: Path) -> bool:
    """Tells if a folder is an OME-Zarr image, or a series of them; tile caches are not."""
    try:
        about = _ome(path) if path.is_dir() else {}
    except (SlideOpenError, OSError, ValueError):
        return False
    return any(key in about for key in ("multiscales", "bioformats2raw.layout", "plate"))


def metadata_file(path: Path) -> Path:
    """Returns the file of an OME-Zarr with its description; it changes when the image is written again."""
    return next((path / name for name in _METADATA if (path / name).is_file()), path)


def read_ngff(path: Path, channels: str) -> NgffImage:
    """Reads the description of an OME-Zarr.

    Args:
        path: the folder.
        channels: planes to read, :func:`slidetl.slides.ome.choose_channels`.

    Raises:
        SlideOpenError: it is damaged, has depth or time, or leaves the choice of channels open; without the
            path.
        ValueError: a value in it is none that NGFF allows.
    """
    fingerprint = _fingerprint(path)
    about, notes = _ome(path), list[str]()
    if "plate" in about:
        raise SlideOpenError("a plate of many images; name the folder of one field")
    if "multiscales" not in about and "bioformats2raw.layout" in about:
        others = sorted(other for other in path.iterdir() if other.name.isdecimal() and other.name != "0")
        path = path / "0"
        about = _ome(path)
        notes += note_of_others([_size(one) for one in (path, *others)], "name the folder of the one meant")
    if "image-label" in about:
        raise SlideOpenError("labels, not an image")
    scales = about.get("multiscales")
    if not isinstance(scales, list) or not scales or not isinstance(scales[0], dict):
        raise SlideOpenError("expected the multiscales of OME-Zarr 0.4 or 0.5, found none")
    sets, axes = scales[0].get("datasets"), _axes(scales[0].get("axes"))
    if not isinstance(sets, list) or not 1 <= len(sets) <= _MAX_LEVELS:
        raise SlideOpenError(f"expected 1 to {_MAX_LEVELS} levels in its multiscales")
    nodes = [_node(path, entry) for entry in sets]
    arrays = [_array(node) for node in nodes]
    first = arrays[0]
    for array in arrays:
        if array.ndim != len(axes) or array.dtype != first.dtype:
            raise SlideOpenError(
                f"a level has {array.ndim} axes of {array.dtype}, expected {len(axes)} as named"
            )
    counts = dict(zip(axes, first.shape, strict=True))
    deep = {axis: counts.get(axis, 1) for axis in "zt"}
    if set(deep.values()) != {1}:
        raise SlideOpenError(
            f"expected one plane, found {deep['z']} in depth and {deep['t']} in time; write the one that is "
            "meant to a folder of its own"
        )
    chosen = _channels(channels, about.get("omero"), counts.get("c", 1))
    every = (_Level(node, array, axes, chosen) for node, array in zip(nodes, arrays, strict=True))
    levels = list(_pyramid(every))
    notes += _note_of_absent(levels)
    full = 255.0
    if first.dtype != np.uint8:
        full, note = levels[-1].full_scale()
        notes.append(note)
    return NgffImage(
        fingerprint=fingerprint,
        sizes_px=[level.size_px for level in levels],
        readers=[partial(level.rgb, full) for level in levels],
        mpp=_spacing(scales[0], axes),
        notes=tuple(notes),
    )


def _ome(path: Path) -> dict[str, Any]:
    """Reads the attributes of a group, those of OME in 0.5."""
    node = _json(path / "zarr.json")
    about = node.get("attributes") if node else _json(path / ".zattrs")
    about = about if isinstance(about, dict) else {}
    inner = about.get("ome")
    return inner if isinstance(inner, dict) else about


def _size(path: Path) -> tuple[int, int]:
    """Reads width and height of the finest level of one of several images."""
    try:
        node = _node(path, _ome(path)["multiscales"][0]["datasets"][0])
        height, width = (_json(node / "zarr.json") or _json(node / ".zarray"))["shape"][-2:]
        return int(width), int(height)
    except (LookupError, TypeError, ValueError) as error:
        raise SlideOpenError(
            f"picture {path.name} in it has no sizes, and may be the slide; copy it again"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    """Reads a metadata document; empty if there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return {}
    if len(data) > _MAX_JSON_BYTES:
        raise SlideOpenError(f"{path.name} has more than {_MAX_JSON_BYTES >> 20} MiB")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SlideOpenError(f"{path.name} is damaged: {error}") from error
    return values if isinstance(values, dict) else {}


def _axes(found: Any) -> str:
    """Returns the letters of the axes, of t, c, z, y and x."""
    names = [axis.get("name") if isinstance(axis, dict) else axis for axis in found or ()]
    axes = "".join(str(name) for name in names)
    if not re.fullmatch(r"t?c?z?yx", axes):
        raise SlideOpenError(
            f"expected axes of t, c, z, y and x in this order, found {axes[:20] or 'none'}; convert it to 0.5"
        )
    return axes


def _node(path: Path, entry: Any) -> Path:
    """Returns the folder of a level."""
    name = entry.get("path") if isinstance(entry, dict) else None
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or not all(re.fullmatch(r"[^\\:\0]+", p) and not is_left_behind(p) for p in parts):
        raise SlideOpenError(f"expected the path of a level in its folder, found {name!r:.80}")
    return path.joinpath(*parts)


def _array(node: Path) -> Any:
    """Opens the array of a level, once its codecs are known to be harmless."""
    import zarr

    about = _json(node / "zarr.json") or _json(node / ".zarray")
    _check_codecs(about)
    array: Any = zarr.open_array(zarr.storage.LocalStore(node, read_only=True), mode="r")
    if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16) or 0 in array.shape:
        raise SlideOpenError(f"expected pixels of 8 or 16 bits without sign, found {array.dtype}; convert it")
    if math.prod(array.chunks) * array.dtype.itemsize > _MAX_CHUNK_BYTES:
        raise SlideOpenError(f"its pixels are stored in pieces of {array.chunks}, too large to decode")
    return array


def _note_of_absent(levels: list[_Level]) -> list[str]:
    """Notes pieces without a file, which a sparse image leaves out of all its levels.

    Raises:
        SlideOpenError: the next finer level shows something there, so the piece was lost.
    """
    for finer, level in pairwise(levels):
        scale = [f / s for f, s in zip(finer.size_px, level.size_px, strict=True)]
        for plane, row, column in np.argwhere(~level.there).tolist():
            places = zip((column, row), level.piece_px, level.size_px, strict=True)
            ends = ((at * side, min((at + 1) * side, size)) for at, side, size in places)
            x, y = ((math.ceil(a * s), math.floor(b * s)) for (a, b), s in zip(ends, scale, strict=True))
            if finer.shows(plane, x, y):
                raise SlideOpenError(
                    f"a piece of level {level.name} (row {row}, column {column}) is not in its folder, and "
                    f"level {finer.name} shows something there; copy it again"
                )
    there, count = levels[0].count_pieces()
    if there == count:
        return []
    return [
        f"{count - there} of {count} pieces of level 0 are not in its folder, and count as blank (right for "
        "a sparse image, else copy it again)"
    ]


def _check_codecs(about: Mapping[str, Any]) -> None:
    """Refuses codecs other than plain compressors; zarr 2 names them by ``id``, zarr 3 by ``name``."""
    if not about:
        raise SlideOpenError("an array of a level is missing")
    waiting: list[Any] = [about.get(key) for key in ("codecs", "compressor", "filters")]
    while waiting:
        codec = waiting.pop()
        if isinstance(codec, list):
            waiting += codec
        elif isinstance(codec, dict):
            name = str(codec.get("id", codec.get("name")))
            if name not in _CODECS:
                raise SlideOpenError(f"compressed by {name[:40]!r}, which is not read; convert it to zstd")
            inner = codec.get("configuration")
            if isinstance(inner, dict):
                waiting += [inner.get("codecs"), inner.get("index_codecs")]
        elif codec is not None:
            raise SlideOpenError(f"a codec is {codec!r:.40}")


def _channels(wanted: str, omero: Any, count: int) -> tuple[int, ...]:
    """Chooses the planes as for OME-TIFF, by the names and colours of ``omero``."""
    if count > _MAX_CHANNELS:
        raise SlideOpenError(f"expected at most {_MAX_CHANNELS} channels, found {count}")
    listed = omero.get("channels") if isinstance(omero, dict) else None
    known = [channel for channel in listed or () if isinstance(channel, dict)]
    known = known if len(known) == count else [{}] * count
    # Converters number the channels that have no name.
    labels = [str(channel.get("label", "")).strip()[:80] for channel in known]
    names = tuple("" if re.fullmatch(r"(channel)?[ _:]*\d*", label, re.I) else label for label in labels)
    colours = [_colour(channel.get("color")) for channel in known]
    return choose_channels(wanted, names, rgb_planes(names, colours))


def _colour(text: Any) -> int | None:
    found = re.fullmatch(r"#?([0-9a-fA-F]{6})", text) if isinstance(text, str) else None
    return int(found[1], 16) if found else None


def _pyramid(levels: Iterable[_Level]) -> Iterator[_Level]:
    """Yields the finest level, and the smaller ones of the same picture."""
    first, *coarser = levels
    yield (last := first)
    for level in coarser:
        if level.size_px[0] < last.size_px[0] and is_same_picture(first.size_px, level.size_px):
            yield (last := level)


def _spacing(scales: Mapping[str, Any], axes: str) -> Pair | None:
    """Reads the spacing of the finest level, if its axes have units of length."""
    factors = np.ones(len(axes))
    for transforms in (
        scales["datasets"][0].get("coordinateTransformations"),
        scales.get("coordinateTransformations"),
    ):
        for transform in transforms if isinstance(transforms, list) else ():
            if isinstance(transform, dict) and transform.get("type") == "scale":
                factors = factors * np.asarray(transform["scale"], np.float64)
    spacing = []
    for axis in "xy":
        place = axes.index(axis)
        about = scales["axes"][place]
        unit = _UM_PER_UNIT.get(str(about.get("unit"))) if isinstance(about, dict) else None
        if unit is None or not factors[place] > 0:
            return None
        spacing.append(float(factors[place]) * unit)
    return spacing[0], spacing[1]


class _Level:
    """One level, read chunk by chunk; its pieces are files, of a chunk or a shard each."""

    def __init__(self, node: Path, array: Any, axes: str, channels: tuple[int, ...]) -> None:
        self._node, self._array, self._axes, self._channels = node, array, axes, channels
        self._kept: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()
        self.name = node.name
        self.size_px = (int(array.shape[-1]), int(array.shape[-2]))
        self._sides: tuple[int, ...] = array.shards or array.chunks
        self.piece_px = (self._sides[-1], self._sides[-2])

    @cached_property
    def _files(self) -> NDArray[np.bool_]:
        """Marks the pieces with a file, along all axes."""
        counts = [-(-length // side) for length, side in zip(self._array.shape, self._sides, strict=True)]
        if math.prod(counts) > _MAX_PIECES:
            raise SlideOpenError(f"expected at most {_MAX_PIECES} pieces, level {self.name} has more")
        files = np.zeros(counts, bool)
        for folder, _, names in os.walk(self._node):
            inner = Path(folder).relative_to(self._node)
            for file in (f"{inner.as_posix()}/{name}".removeprefix("./") for name in names):
                place = tuple(map(int, re.findall("[0-9]+", file))) if _PIECE.fullmatch(file) else ()
                if len(place) == len(counts) and all(np.less(place, counts)):
                    files[place] = True
        return files

    def count_pieces(self) -> tuple[int, int]:
        """Counts the pieces with a file, and all."""
        return int(self._files.sum()), self._files.size

    @cached_property
    def there(self) -> NDArray[np.bool_]:
        """The pieces of the chosen planes with a file, ``[planes, rows, columns]``."""
        at = self._axes.find("c")
        places = (
            tuple(channel // self._sides[at] if axis == "c" else 0 for axis in self._axes[:-2])
            for channel in self._channels
        )
        return np.stack([self._files[place] for place in places])

    def shows(self, plane: int, x: tuple[int, int], y: tuple[int, int]) -> bool:
        """Tells if one of its pieces is not blank on average, within the range from ``x[0]`` to ``x[1]``."""
        fill = float(self._array.fill_value or 0)
        (across, down), there = self.piece_px, self.there[plane]
        for row in range(y[0] // down, -(-y[1] // down)):
            for column in range(x[0] // across, -(-x[1] // across)):
                left, right = max(x[0], column * across), min(x[1], (column + 1) * across)
                top, bottom = max(y[0], row * down), min(y[1], (row + 1) * down)
                if there[row, column] and left < right and top < bottom:
                    pixels = self._read(left, top, right - left, bottom - top)[plane]
                    if abs(pixels.mean(dtype=np.float64) - fill) > 1:
                        return True
        return False

    def rgb(self, full: float, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Reads a rectangle as ``[height, width, 3]``; ``full`` is the value of white."""
        planes = self._read(x, y, width, height)
        if planes.dtype != np.uint8:
            planes = to_8_bits(planes, full)
        return np.ascontiguousarray(np.moveaxis(np.broadcast_to(planes, (3, height, width)), 0, 2))

    def full_scale(self) -> tuple[float, str]:
        """Finds the value of white, as for TIFFs of 16 bits, and a note of it."""
        return full_of([self._read(*window) for window in sample_windows(self.size_px)])

    def _read(self, x: int, y: int, width: int, height: int) -> NDArray[Any]:
        """Reads the chosen planes of a rectangle, ``[planes, height, width]``."""
        planes = np.empty((len(self._channels), height, width), self._array.dtype.newbyteorder("="))
        down, across = self._array.chunks[-2:]
        for row in range(y // down, (y + height - 1) // down + 1):
            for column in range(x // across, (x + width - 1) // across + 1):
                chunk = self._chunk(row, column)
                top, left = row * down, column * across
                rows = slice(max(top, y), min(top + chunk.shape[1], y + height))
                columns = slice(max(left, x), min(left + chunk.shape[2], x + width))
                planes[:, rows.start - y : rows.stop - y, columns.start - x : columns.stop - x] = chunk[
                    :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
                ]
        return planes

    def _chunk(self, row: int, column: int) -> NDArray[Any]:
        key = row, column
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        down, across = self._array.chunks[-2:]
        window = (slice(row * down, (row + 1) * down), slice(column * across, (column + 1) * across))
        at = self._axes.find("c")
        if at >= 0 and self._array.chunks[at] > 1:  # decoded together
            place = [slice(None) if axis == "c" else 0 for axis in self._axes[:-2]]
            chunk = np.asarray(self._array[(*place, *window)])[list(self._channels)]
        else:
            places = (
                [channel if axis == "c" else 0 for axis in self._axes[:-2]] for channel in self._channels
            )
            chunk = np.stack([np.asarray(self._array[(*place, *window)]) for place in places])
        self._kept[key] = chunk
        while len(self._kept) > 1 and sum(part.nbytes for part in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return chunk


def _fingerprint(path: Path) -> str:
    """Identifies an image by the names and sizes of its files, and the content of all or some of them.

    Raises:
        SlideOpenError: it has links or pipes; nothing outside the folder is read.
    """
    files = []
    for folder, folders, names in os.walk(path):
        for name in (*folders, *names):
            about = Path(folder, name).lstat()
            if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
                raise SlideOpenError(f"{name} in it is a link or a pipe; nothing outside the folder is read")
            place = Path(folder, name).relative_to(path)
            if stat.S_ISREG(about.st_mode) and not any(map(is_left_behind, place.parts)):
                files.append((str(place), about.st_size))
    files.sort()
    every = len(files) <= _SAMPLED_FILES or sum(size for _, size in files) <= WHOLE_BYTES
    described = [file for file in files if Path(file[0]).name in _METADATA]
    others = [file for file in files if Path(file[0]).name not in _METADATA]
    step = 1.0 if every else max(1.0, len(others) / _SAMPLED_FILES)
    sampled = [others[int(number * step)] for number in range(int(len(others) / step))]
    digest = hashlib.sha256()
    for name, size in files:
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    for name, _ in (*described, *sampled):
        digest.update(file_digest(path / name).encode())
    return digest.hexdigest()
