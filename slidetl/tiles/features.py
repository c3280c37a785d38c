"""Stored embeddings: one row for each tile of a slide's cache, in the cache's own order.

The slide's group holds them as ``features/<name>``, a zarr array ``[N, D] float16`` in one chunk (zstd with a
crc32c against flipped bytes). Tiling the slide again deletes them together with their tiles.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import (
    CacheCorruptError,
    CacheError,
    CacheMismatchError,
    CacheMissingError,
    SlidetlError,
    UsageError,
)
from slidetl.files import fsync_path, is_sha256
from slidetl.tiles.lock import kernel_lock, refuse_links, slide_lock
from slidetl.tiles.store import (
    FEATURES,
    SlideCache,
    describe_write_error,
    read_array,
    read_sealed,
    seal_node,
)

_GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
_AGAIN = "make it with 'slidetl embed'"
NOT_STATED = "not stated"  # by the file of another tool


@dataclass(frozen=True)
class FeatureSource:
    """The network and precision of embeddings; stored as the attributes of their array.

    Attributes:
        backbone: timm's name of the network.
        block: the module with the output averaged over space; empty for the network's own embedding.
        weights_sha256: of all its weights, :func:`slidetl.models.backbones.weights_sha256`.
        mean: by channel, of pixel values in 0..1, subtracted before the network.
        std: by channel, divides the difference.
        pooling: of a transformer's tokens; ``weights_sha256`` covers it too.
        record: of the study behind a checkpoint's weights, the name of its file in ``records`` of the cache
            (:func:`slidetl.data.record.stored_record`); empty for other weights.
        precision: ``float32`` or ``bfloat16``, of the network; :data:`NOT_STATED` for imported features,
            with an empty hash and no mean and std. Not part of the identity: the two agree to
            about two digits, and several machines may embed one cohort.
        architecture: of a network of the hub or a folder, the SHA-256 of its configuration
            (:func:`slidetl.models.backbones.architecture_sha256`); empty for timm's own, and in older caches.
    """

    backbone: str
    block: str
    weights_sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str = "float32"
    pooling: str = "default"
    record: str = ""
    architecture: str = ""

    def to_attributes(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Self:
        """Inverts :meth:`to_attributes`."""
        defaults = {"pooling": "default", "record": "", "architecture": ""}  # older caches do not have them
        values: dict[str, Any] = {name: {**defaults, **attributes}[name] for name in cls.__dataclass_fields__}
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    @property
    def identity(self) -> str:
        """The hash of the weights, or for imported features the name of their network."""
        return self.weights_sha256 or f"imported: {self.backbone}"

    @property
    def short_identity(self) -> str:
        """The beginning of the hash, for messages; of imported features all of :attr:`identity`."""
        return f"{self.weights_sha256[:12]}..." if self.weights_sha256 else self.identity

    def same_network(self, other: Self) -> bool:
        """Returns True if both are of one network and block, at any precision."""
        is_equal = (self.block, self.identity) == (other.block, other.identity)
        return is_equal and self.may_be(other.backbone, other.architecture)

    def may_be(self, backbone: str, architecture: str) -> bool:
        """Returns False for another architecture: equal weights may have other activations.

        Names of the hub and of folders tell nothing without a hash, nor do timm's tags of weights.
        """
        if self.architecture and architecture:
            return self.architecture == architecture
        if ":" in self.backbone + backbone:
            return True
        return self.backbone.partition(".")[0] == backbone.partition(".")[0]


def record_path(cache_dir: Path, sha256: str) -> Path:
    """Returns the place of the record that :attr:`FeatureSource.record` names.

    Raises:
        CacheCorruptError: it is no SHA-256.
    """
    if not is_sha256(sha256):  # it may come from the file of another
        raise CacheCorruptError(f"expected the SHA-256 of a record, found {sha256!r:.100}")
    return cache_dir / "records" / f"{sha256}.json"


def feature_name(backbone: str, block: str = "") -> str:
    """Names stored embeddings: ``<backbone>``, or ``<backbone>.<block>``.

    Raises:
        UsageError: it cannot be the name of a folder.
    """
    name = f"{backbone}.{block}" if block else backbone
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,149}", name):
        raise UsageError(
            f"features are named by letters, digits, '.', '_' and '-', at most 150 of them, not {name!r}"
        )
    return name


def list_features(cache: SlideCache) -> tuple[str, ...]:
    """Lists the names of a slide's stored features."""
    return tuple(sorted(path.parent.name for path in (cache.path / FEATURES).glob("*/zarr.json")))


def read_source(cache: SlideCache, name: str) -> FeatureSource:
    """Reads the network behind the embeddings of a name.

    Raises:
        CacheMissingError: there are none; the message lists the others.
        CacheMismatchError: they are of another slide, or of other tiles than the cache's.
        CacheCorruptError: their metadata cannot be understood.
    """
    node = cache.path / FEATURES / feature_name(name)
    try:
        attributes = read_sealed(node)["attributes"]
        tiles, is_complete = attributes["tiles"], attributes["complete"]
        source = FeatureSource.from_attributes(attributes)
    except CacheMissingError as error:
        have = ", ".join(list_features(cache)) or "none"
        raise CacheMissingError(f"{node}: no such features, there are: {have}; {_AGAIN}") from error
    except (CacheCorruptError, KeyError, TypeError) as error:
        raise CacheCorruptError(f"{node}: damaged, {_AGAIN} --overwrite: {error}") from error
    if is_complete is not True or tiles != len(cache):
        raise CacheMismatchError(
            f"{node}: features of {tiles} tiles, the cache has {len(cache)}; {_AGAIN} --overwrite"
        )
    if not are_of(attributes, cache.places_sha256):
        cache.check_unchanged()
        raise CacheMismatchError(
            f"{node}: features of another slide than {cache.slide_id}, or of other tiles; "
            f"{_AGAIN} --overwrite"
        )
    return source


def are_of(attributes: Mapping[str, Any], places_sha256: str) -> bool:
    """Tells features of the same tiles from others by their attributes; those of older caches do not say."""
    return bool(attributes.get("places_sha256", places_sha256) == places_sha256)


def have_own_values(node: Path, attributes: Mapping[str, Any]) -> bool:
    """Tells if the values of features are those that their attributes were written for, if these say so.

    Raises:
        CacheCorruptError: their file is missing.
    """
    return "values_crc32c" not in attributes or attributes["values_crc32c"] == _stored_crc(node)


def common_source(name: str, caches: Sequence[SlideCache]) -> FeatureSource:
    """Returns the network behind the stored features of one or more slides, with its record if any has one.

    Raises:
        CacheMismatchError: the features of one slide are of another network.
        CacheError: as :func:`read_source`.
    """
    first = read_source(caches[0], name)
    for cache in caches:
        source = read_source(cache, name)
        if not source.same_network(first):
            raise CacheMismatchError(
                f"features {name!r} of {cache.slide_id} are of another network or other weights "
                f"({source.backbone}, {source.short_identity}) than those of {caches[0].slide_id} "
                f"({first.backbone}, {first.short_identity}); run 'slidetl embed --overwrite' for all"
            )
        first = first if first.record else source
    return first


def feature_width(cache: SlideCache, name: str) -> int:
    """Reads the length D of a slide's stored embeddings, without their values."""
    return int(read_sealed(cache.path / FEATURES / feature_name(name))["shape"][1])


def feature_checksum(cache: SlideCache, name: str) -> str:
    """Reads the stored checksum of a slide's embeddings, without their values; hexadecimal.

    Raises:
        CacheCorruptError: their file is missing.
    """
    return _stored_crc(cache.path / FEATURES / feature_name(name))


def _stored_crc(node: Path) -> str:
    chunk = node / "c" / "0" / "0"
    try:
        with chunk.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            return file.read().hex()
    except OSError as error:
        raise CacheCorruptError(f"{chunk}: {error.strerror}, {_AGAIN} --overwrite") from error


def read_features(
    cache: SlideCache, name: str, weights_sha256: str | None = None, *, identity: str | None = None
) -> NDArray[np.float16]:
    """Reads the embeddings of all tiles of a slide, without zarr.

    Args:
        cache: the slide's cache.
        name: of the features, :func:`feature_name`.
        weights_sha256: of the network required, empty for imported features; None takes any.
        identity: :attr:`FeatureSource.identity` of the network required, imported or not; None takes any.

    Returns:
        ``[N, D] float16``, a row for each tile, in the order of the cache.

    Raises:
        CacheMissingError: there are none of this name.
        CacheMismatchError: they are of another network, or of other tiles, as the slide was tiled again.
        CacheCorruptError: they fail their checksum.
    """
    source = read_source(cache, name)
    node = cache.path / FEATURES / name
    for found, wanted in ((source.weights_sha256, weights_sha256), (source.identity, identity)):
        if wanted is not None and found != wanted:
            raise CacheMismatchError(
                f"{node}: made by weights {source.short_identity}, wanted {wanted or 'imported ones':.100}; "
                "store them under another --name, or replace them with --overwrite"
            )
    try:
        values: NDArray[np.float16] = read_array(node)
        if not have_own_values(node, read_sealed(node)["attributes"]):
            raise CacheCorruptError("the values are of other features")
    except (CacheCorruptError, CacheMissingError) as error:
        raise CacheCorruptError(f"{node}: damaged, {_AGAIN} --overwrite: {error}") from error
    if values.dtype != np.float16 or values.ndim != 2 or len(values) != len(cache):
        raise CacheCorruptError(
            f"{node}: expected [{len(cache)}, D] float16, found {values.shape} {values.dtype}; "
            f"{_AGAIN} --overwrite"
        )
    cache.check_unchanged()
    return values


def check_writable(cache: SlideCache) -> None:
    """Checks, before long work, that this user may store features of a slide.

    Raises:
        CacheError: a folder or file cannot be written, or a link is in the way.
    """
    cache_dir, slide_id = cache.path.parent, cache.path.stem
    locks, building = cache_dir / ".locks", cache_dir / ".building-features"
    for path in (cache_dir, locks, building, cache.path, cache.path / FEATURES):
        if path.exists() and not os.access(path, os.W_OK):
            if os.statvfs(path).f_flag & os.ST_RDONLY:
                raise CacheError(f"{path}: its disk is mounted read-only here; use a copy of the cache")
            error = PermissionError(errno.EACCES, "this user may not write there", str(path))
            raise CacheError(describe_write_error(error, cache_dir))
    refuse_links(cache_dir, slide_id)
    lock = locks / f"{slide_id}.lock"
    if lock.exists():
        try:
            with kernel_lock(lock, wait=False):  # that of another user serves too, if it can be locked
                pass
        except BlockingIOError:
            pass  # the slide is being written
        except OSError as error:
            raise CacheError(describe_write_error(error, cache_dir)) from error


def write_features(
    cache: SlideCache, arrays: Mapping[str, tuple[FeatureSource, NDArray[np.float16]]]
) -> None:
    """Stores embeddings of a slide; each array appears complete or not at all, and replaces one of its name.

    Args:
        cache: the slide's cache, opened before its tiles were read.
        arrays: by name, their network, and ``[N, D] float16``.

    Raises:
        CacheMismatchError: the slide was tiled again since ``cache`` was opened.
        UsageError: not a row for each tile, or values not finite in float16.
        CacheError: the slide's folder cannot be written, the disk is full, or a link is in the way.
    """
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    for name, (_, values) in arrays.items():
        if values.ndim != 2 or values.dtype != np.float16 or len(values) != len(cache):
            raise UsageError(
                f"features {feature_name(name)!r} of {cache.slide_id} must be [{len(cache)}, D] float16, "
                f"not {values.shape} {values.dtype}"
            )
        if not np.isfinite(values).all():
            tile = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise UsageError(
                f"features {name!r} of tile {tile} of {cache.slide_id} are not finite in float16; "
                "choose another block or other weights"
            )
    cache_dir = cache.path.parent
    # Beside the groups, not within '.building', since a slide may have any name there.
    building = cache_dir / ".building-features" / cache.path.stem
    try:
        with slide_lock(cache_dir, cache.path.stem):
            cache.check_unchanged()
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            for name, (source, values) in arrays.items():
                zarr.create_array(
                    building / name,
                    data=np.ascontiguousarray(values),
                    chunks=values.shape,
                    compressors=(ZstdCodec(level=3), Crc32cCodec()),
                    attributes={
                        **source.to_attributes(),
                        "tiles": len(values),
                        "places_sha256": cache.places_sha256,
                        "complete": True,
                    },
                    dimension_names=("tile", "feature"),
                    config={"write_empty_chunks": True},
                )
                seal_node(building / name, values_crc32c=_stored_crc(building / name))
                _sync(building / name)
            folder = cache.path / FEATURES
            if not (folder / "zarr.json").exists():
                (building / "zarr.json").write_text(json.dumps(_GROUP))
                seal_node(building)
                _sync(building)
                folder.mkdir(exist_ok=True)
                (building / "zarr.json").rename(folder / "zarr.json")
            for name in arrays:
                if (folder / name).exists():
                    (folder / name).rename(building / f"{name}.old")
                (building / name).rename(folder / name)
            _sync(folder, deep=False)
            shutil.rmtree(building)
    except SlidetlError:
        raise
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)  # frees space on the full disk
        raise CacheError(describe_write_error(error, cache_dir)) from error


def _sync(folder: Path, deep: bool = True) -> None:
    """Makes a folder durable; else a power cut may leave a name without its content."""
    for path in (*folder.rglob("*"), folder) if deep else (folder,):
        fsync_path(path)
