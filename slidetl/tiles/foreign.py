"""Reads feature files of other tools: HDF5 of TRIDENT, CLAM and STAMP, and slidetl's own exports.

The files are untrusted: shapes are bounded before anything is read, and no link leads out of a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import CacheCorruptError, UsageError, needs_extra
from slidetl.text import listed, one_line
from slidetl.tiles.exchange import NEEDS_FORMATS, OURS
from slidetl.tiles.features import NOT_STATED, FeatureSource
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.store import CacheHeader

SUFFIXES = (".h5", ".hdf5")

_MOST_BYTES = 2 * 2**30  # of stored float16, as for the features of a cache
_MOST_ROWS = 4_000_000
_MOST_COLUMNS = 65_536
_MOST_CHUNK_BYTES = 2**28  # is unpacked whole, however small its dataset
_READ_TOGETHER = 4096  # rows
_MOST_ATTRIBUTE_BYTES = 2**16

# Errors of h5py on damaged files.
_DAMAGE = (OSError, KeyError, ValueError, TypeError, RuntimeError, IndexError, AttributeError)


@dataclass(frozen=True, eq=False)
class ForeignFeatures:
    """The features of a slide in the file of another tool; a number is 0 where the file does not state it.

    Attributes:
        tool: ``trident``, ``clam``, ``stamp``, or ``slidetl`` for its own exports.
        values: ``[N, D] float16``.
        coords: ``[N, 2] float64``, upper-left corners ``(x, y)``: level-0 pixels, of STAMP micrometres.
        backbone: the tool's name of the network, or :data:`~slidetl.tiles.features.NOT_STATED`.
        tile_size_px: side of a tile, pixels of the tile.
        stride_px: distance of neighbouring tiles.
        extent_level0: side of a tile, level-0 pixels.
        magnification: nominal, of the tiles.
        mpp: spacing of the tiles, micrometres per pixel.
        size_level0: width and height of the slide, level-0 pixels.
        header: of the cache that slidetl exported.
        source: of the features that slidetl exported.
    """

    tool: str
    values: NDArray[np.float16]
    coords: NDArray[np.float64]
    backbone: str = NOT_STATED
    tile_size_px: int = 0
    stride_px: int = 0
    extent_level0: float = 0.0
    magnification: float = 0.0
    mpp: float = 0.0
    size_level0: tuple[int, int] = (0, 0)
    header: CacheHeader | None = None
    source: FeatureSource | None = None

    @property
    def spec(self) -> TileSpec:
        """The tiles as far as the file states them; equal specifications may be mixed in a study."""
        if self.header is not None:
            return self.header.spec
        power = f" {self.magnification:g}x" if self.magnification else ""
        return TileSpec(self.mpp, self.tile_size_px, self.stride_px, foreign=f"{self.tool}{power}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of values and places, which a copy under another name shares."""
        return hashlib.sha256(self.values.tobytes() + self.coords.tobytes()).hexdigest()

    @property
    def duplicates(self) -> int:
        """Number of tiles at the place of an earlier one."""
        return len(self.coords) - len(np.unique(self.coords, axis=0))


def read_foreign(path: Path) -> ForeignFeatures:
    """Reads the features of a slide from an HDF5 file of another tool.

    TRIDENT and CLAM write ``features`` and ``coords``, STAMP ``feats`` and ``coords``; older files have a
    leading axis of one. See docs/howto/formats.md for the attributes.

    Raises:
        CacheCorruptError: the file is damaged, or holds no features of tiles; the message names the fault.
        UsageError: h5py is not installed, or it is a file of PyTorch.
    """
    if path.suffix.lower() in (".pt", ".pth", ".pkl", ".pickle"):
        raise UsageError(
            f"{path}: pickles can run code, and are not read; give the .h5 of the tool (CLAM: h5_files "
            "beside pt_files; TRIDENT: --saveas h5), which has the coordinates too"
        )
    with needs_extra(*NEEDS_FORMATS):
        import h5py
    try:
        with h5py.File(path, "r", locking=False) as file:  # shares without locks refuse them
            return _read(file)
    except CacheCorruptError as error:
        raise CacheCorruptError(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise CacheCorruptError(
            f"{path}: not an HDF5 file of features that can be read: {one_line(str(error))[:200]}"
        ) from error


def _read(file: Any) -> ForeignFeatures:
    names = [name for name in ("features", "feats") if name in file]
    if not names or "coords" not in file:
        found = listed(sorted(map(str, file)), 8) or "nothing"
        raise CacheCorruptError(f"expected features (STAMP: feats) and coords of tiles, found {found}")
    stored, places = _dataset(file, names[0]), _dataset(file, "coords")
    root, about = _attributes(file), _attributes(places)
    kind = str(root.get("feat_type", "tile"))
    shape, at = _shape(stored), _shape(places)
    if kind != "tile" or len(shape) != 2:
        what = f"of a {kind}" if kind != "tile" else f"of shape {list(stored.shape)}"
        raise CacheCorruptError(
            f"expected features of tiles [N, D], found one {what}; those of a slide encoder are not read"
        )
    if not shape[0]:
        raise CacheCorruptError("it has no tiles")
    if at != (shape[0], 2):
        raise CacheCorruptError(f"expected coords [{shape[0]}, 2], found {list(places.shape)}")
    if stored.dtype.kind != "f" or places.dtype.kind not in "uif":
        raise CacheCorruptError(
            f"expected numbers, found features of {stored.dtype} and coords of {places.dtype}"
        )
    if shape[0] > _MOST_ROWS or shape[1] > _MOST_COLUMNS or 2 * math.prod(shape) > _MOST_BYTES:
        raise CacheCorruptError(f"features {list(shape)} are more than the {_MOST_BYTES >> 30} GiB read here")
    values, coords = _values(stored, shape), _coords(places, at)
    if OURS in root:
        return _ours(values, coords, root[OURS])
    if names[0] == "feats":
        return _stamp(values, coords, root)
    return _trident(values, coords, about, _attributes(stored))


def _dataset(file: Any, name: str) -> Any:
    """Returns a dataset with its values in this file."""
    import h5py

    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise CacheCorruptError(f"{name} is a link, which is not followed; copy the values into the file")
    found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise CacheCorruptError(f"expected an array {name}, found a group")
    if found.is_virtual or found.external:
        raise CacheCorruptError(f"the values of {name} are in other files, which are not read; copy them in")
    if found.chunks and math.prod(found.chunks) * found.dtype.itemsize > _MOST_CHUNK_BYTES:
        raise CacheCorruptError(f"{name} is stored in pieces of {list(found.chunks)}, too large to unpack")
    _check_packed(found, name)
    return found


def _check_packed(dataset: Any, name: str) -> None:
    """Refuses pieces that unpack to more than their shape: HDF5 would take any memory for them."""
    import h5py

    plan = dataset.id.get_create_plist()
    filters = [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]
    shuffle, deflate, checksum = h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32
    if [one for one in filters if one != checksum] not in ([], [shuffle], [deflate], [shuffle, deflate]):
        raise CacheCorruptError(
            f"{name} is packed in a way that is not read; unpack it with 'h5repack -f NONE', or use gzip"
        )
    if deflate not in filters:
        return
    most = math.prod(dataset.chunks) * dataset.id.get_type().get_size() + 4 * len(filters)  # with checksums
    pieces = list[Any]()
    dataset.id.chunk_iter(pieces.append)
    for piece in pieces:
        is_plain = piece.filter_mask >> filters.index(deflate) & 1
        size = piece.size if is_plain else 0
        if not is_plain:
            with contextlib.suppress(zlib.error):  # told by HDF5
                _, packed = dataset.id.read_direct_chunk(piece.chunk_offset)
                size = len(zlib.decompressobj().decompress(packed, most + 1))
        if size > most:
            raise CacheCorruptError(
                f"a piece of {name} unpacks to more than its {list(dataset.chunks)} values"
            )


def _shape(dataset: Any) -> tuple[int, ...]:
    """Returns a shape without a leading axis of one before rows and columns."""
    shape = tuple(dataset.shape or ())
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _values(dataset: Any, shape: tuple[int, ...]) -> NDArray[np.float16]:
    values = np.empty(shape, np.float16)
    for start in range(0, len(values), _READ_TOGETHER):
        stop = min(start + _READ_TOGETHER, len(values))
        part = dataset[0, start:stop] if len(dataset.shape) == 3 else dataset[start:stop]
        with np.errstate(over="ignore"):
            values[start:stop] = part
        bad = ~np.isfinite(values[start:stop]).all(axis=1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise CacheCorruptError(
                f"features of row {start + row} are not finite, or beyond 65,504, the range of float16"
                if np.isfinite(part[row]).all()
                else f"features of row {start + row} are not finite"
            )
    return values


def _coords(dataset: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    coords = np.asarray(dataset[()], np.float64).reshape(shape)
    bad = ~(np.isfinite(coords) & (np.abs(coords) < 2**31)).all(axis=1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise CacheCorruptError(f"coords of row {row} are no place on a slide: {coords[row].tolist()}")
    return coords


def _attributes(node: Any) -> dict[str, Any]:
    """Reads the attributes that are numbers, texts or pairs of numbers."""
    found: dict[str, Any] = {}
    for name in node.attrs:
        about = node.attrs.get_id(name)
        if about.get_storage_size() > _MOST_ATTRIBUTE_BYTES or math.prod(about.shape or ()) > 2:
            continue
        value = node.attrs[name]
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, np.generic | np.ndarray):
            value = value.tolist()
        found[str(name)] = value
    return found


def _number(attributes: Mapping[str, Any], name: str) -> float:
    """Returns a positive number, 0 if there is none."""
    try:
        value = float(attributes.get(name, 0))
    except (TypeError, ValueError):
        return 0.0
    return value if math.isfinite(value) and 0 < value < 1e7 else 0.0


def _text(attributes: Mapping[str, Any], *names: str) -> str:
    found = next((attributes[name] for name in names if isinstance(attributes.get(name), str)), "")
    return one_line(str(found)).strip()[:100] or NOT_STATED


def _trident(
    values: NDArray[np.float16], coords: NDArray[np.float64], about: Mapping[str, Any], of: Mapping[str, Any]
) -> ForeignFeatures:
    """Describes a file of TRIDENT (``coords_to_h5``) or CLAM (``save_hdf5``, mostly without attributes)."""
    power, size = _number(about, "target_magnification"), round(_number(about, "patch_size"))
    extent = _number(about, "patch_size_level0")
    downsample = about.get("downsample")
    if not extent and isinstance(downsample, list) and downsample and downsample[0] == downsample[-1]:
        extent = size * _number({"downsample": downsample[0]}, "downsample")
    overlap = round(_number(about, "overlap"))
    return ForeignFeatures(
        tool="trident" if power else "clam",
        values=values,
        coords=coords,
        backbone=_text(of, "encoder"),
        tile_size_px=size,
        stride_px=size - overlap if 0 <= overlap < size else size,
        extent_level0=extent,
        magnification=power,
        size_level0=(round(_number(about, "level0_width")), round(_number(about, "level0_height"))),
    )


def _stamp(
    values: NDArray[np.float16], coords: NDArray[np.float64], root: Mapping[str, Any]
) -> ForeignFeatures:
    """Describes a file of STAMP 2 (``stamp.preprocessing.extract_``)."""
    if root.get("unit") != "um":
        raise CacheCorruptError(
            f"expected STAMP's coords in micrometres (unit: um), found {root.get('unit', NOT_STATED)!r}; "
            "extract the features with STAMP 2"
        )
    size, side_um = round(_number(root, "tile_size_px")), _number(root, "tile_size_um")
    return ForeignFeatures(
        tool="stamp",
        values=values,
        coords=coords,
        backbone=_text(root, "extractor"),
        tile_size_px=size,
        stride_px=size,
        mpp=side_um / size if size else 0.0,
    )


def _ours(values: NDArray[np.float16], coords: NDArray[np.float64], text: str) -> ForeignFeatures:
    """Describes a file of :func:`~slidetl.tiles.exchange.export_features`."""
    try:
        about = json.loads(text)
        header = CacheHeader.from_attributes(about["header"])
        source = FeatureSource.from_attributes(about["features"])
        pairs = (header.size_level0, header.mpp_level0, header.mpp_read, header.extent_level0)
        if not all(len(pair) == 2 and all(0 <= value < 1e7 for value in pair) for pair in pairs):
            raise ValueError(f"sizes or spacings out of range: {pairs}")
        spec = header.spec
        if not all(isinstance(size, int) for size in (spec.tile_size_px, spec.stride_px)):
            raise ValueError(f"tiles of {spec.tile_size_px} pixels")
        texts = [header.fingerprint, header.vendor, spec.foreign, spec.channels]
        texts += [source.backbone, source.block, source.weights_sha256, source.precision]
        if not all(isinstance(text, str) for text in texts) or len(header.fingerprint) != 64:
            raise ValueError("expected text, and a fingerprint of 64 digits")
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise CacheCorruptError(f"its description by slidetl cannot be understood: {error}") from error
    return ForeignFeatures("slidetl", values, coords, backbone=source.backbone, header=header, source=source)
