"""Confines tiles to annotated regions, and labels tiles by the class of their annotation."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import AnnotationError, UsageError, refuse_unused
from slidetl.slides.turn import ViewerFrame
from slidetl.text import listed
from slidetl.tiles.annotations import Annotation, Annotations, base_name, is_annotation_file, read_annotations
from slidetl.tiles.identifier import clash_key, safe_slide_id
from slidetl.tiles.polygons import Layer, Polygon, coverage
from slidetl.tiles.tissue import area_means, mask_size

# QuPath's class for what must not be used.
IGNORED = "Ignore*"
# Annotations may reach beyond the slide by this share of its longer side: brushes do at its border.
_BEYOND = 0.01
_NAMED = 5

Missing = Literal["refuse", "skip", "whole"]


@dataclass(frozen=True)
class RegionOptions:
    """Annotated regions that tiles must lie in.

    Attributes:
        folder: folder of annotations, a file per slide with the name of its identifier or file: GeoJSON of
            QuPath (.geojson, .json), XML of ASAP or ImageScope, also with .gz.
        include: classes whose annotations are regions; all by default, those without a class, too.
        exclude: classes cut out of the regions.
        share: least share of a tile inside the regions, above 0, up to 1; 0.25 is that of --min-tissue.
        missing: treatment of slides without a file of annotations: refuse to start, skip them, or tile them
            whole.

    Raises:
        UsageError: a value is out of range, or of no use; the message names it.
    """

    folder: Path | None = field(default=None, metadata={"option": "regions"})
    include: tuple[str, ...] = field(default=(), metadata={"option": "regions-include"})
    exclude: tuple[str, ...] = field(default=(IGNORED,), metadata={"option": "regions-exclude"})
    share: float = field(default=0.25, metadata={"option": "regions-share"})
    missing: Missing = field(default="refuse", metadata={"option": "regions-missing"})

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"--regions-share must be above 0, up to 1, not {self.share}")
        if self.folder is None:
            refuse_unused(RegionOptions, vars(self), "without --regions DIR")
        if both := _keys(self.include) & _keys(self.exclude) - _keys([IGNORED]):
            raise UsageError(f"--regions-include and --regions-exclude both name {', '.join(sorted(both))}")


@dataclass(frozen=True)
class RegionSource:
    """The annotations of one slide.

    Attributes:
        path: their file; None if the slide has none.
        options: the choice among them.
    """

    path: Path | None
    options: RegionOptions

    def digest(self, viewer: ViewerFrame, vendor: str) -> str:
        """Returns the digest of the regions in a slide; empty if it is tiled whole."""
        return "" if self.path is None else read_regions(self.path, self.options, viewer, vendor).digest


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of one slide.

    Attributes:
        path: the file they come from.
        layers: polygons, level-0 pixels; a tile may lie in several.
        without: polygons cut out of all of them.
        share: least share of a tile inside.
        notes: doubts about them, one line each.
    """

    path: Path
    layers: tuple[Layer, ...]
    without: tuple[Layer, ...]
    share: float
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the areas used and of the least share, in any order; hexadecimal."""
        groups = [[*_digests(b"+", areas), *_digests(b"-", holes)] for areas, holes in self.layers]
        groups += [[*_digests(b"-", areas), *_digests(b"0", holes)] for areas, holes in self.without]
        if len(self.layers) > 1 or any(layer.holes for layer in self.without):  # which hole is in which layer
            groups = [[hashlib.sha256(" ".join(sorted(group)).encode()).hexdigest()] for group in groups]
        parts = [one for group in groups for one in group]
        return hashlib.sha256(f"{self.share!r} {' '.join(sorted(parts))}".encode()).hexdigest()

    def cover(
        self, size_px: tuple[int, int], mpp: float, mpp_level0: tuple[float, float]
    ) -> NDArray[np.float32]:
        """Computes the share inside of each pixel of a thumbnail, ``[h, w]``, at ``mpp``.

        Raises:
            AnnotationError: the edges are too many for a bounded time.
        """
        return _cover(self.path, self.layers, self.without, size_px, mpp, mpp_level0)


def find_regions(options: RegionOptions, slides: Sequence[tuple[str, Path]]) -> dict[str, RegionSource]:
    """Finds the file of annotations of each slide.

    Args:
        options: with a folder.
        slides: identifier and file of each.

    Returns:
        By identifier; none if there is no folder.

    Raises:
        UsageError: the folder is missing, a slide has no file and ``missing`` is ``refuse``, or files and
            slides do not pair off.
    """
    folder = options.folder
    if folder is None:
        return {}
    if not folder.is_dir():
        raise UsageError(f"--regions {folder}: no such folder")
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.absolute().iterdir()):
        if is_annotation_file(path) and not path.name.startswith("."):
            files[_name_key(base_name(path))].append(path)
    found: dict[str, list[Path]] = {}
    owners: dict[Path, list[str]] = defaultdict(list)
    for slide_id, slide in slides:
        names = (slide_id, slide.name, slide.stem, slide.stem.removesuffix(".ome"))
        found[slide_id] = [
            path for key in {_name_key(name): None for name in names} for path in files.get(key, ())
        ]
        for path in found[slide_id]:
            owners[path].append(slide_id)
    for slide_id, paths in found.items():
        if len(paths) > 1:
            names_found = ", ".join(path.name for path in paths)
            raise UsageError(
                f"--regions {folder}: several files for slide {slide_id}: {names_found}; keep one"
            )
    for path, slide_ids in owners.items():
        if len(slide_ids) > 1:
            raise UsageError(
                f"--regions {folder}: {path.name} fits the slides {', '.join(slide_ids)}; name it by the "
                "identifier of its slide, and let no other slide have a file of this name"
            )
    without = [slide_id for slide_id, paths in found.items() if not paths]
    if without and options.missing == "refuse":
        unused = [path.name for paths in files.values() for path in paths if path not in owners]
        raise UsageError(
            f"--regions {folder}: {len(without)} of {len(slides)} slides have no file of annotations: "
            + listed(without, _NAMED)
            + (f" (files without a slide: {listed(unused, _NAMED)})" if unused else "")
            + "; --regions-missing skip leaves them out, whole tiles all of them"
        )
    return {slide_id: RegionSource(paths[0] if paths else None, options) for slide_id, paths in found.items()}


def read_regions(path: Path, options: RegionOptions, viewer: ViewerFrame, vendor: str) -> Regions:
    """Reads the regions of a slide.

    Args:
        path: the file of annotations.
        options: the choice among them.
        viewer: the frame of the slide in other programs.
        vendor: of the slide, as its reader calls it.

    Raises:
        AnnotationError: it cannot be read, none of its areas is chosen, or it reaches beyond the slide.
    """
    read = read_annotations(path)
    include, exclude = _keys(options.include), _keys(options.exclude) - _keys(options.include)
    chosen = [area for area in read.areas if not include or _key(area.class_name) in include]
    chosen = [area for area in chosen if _key(area.class_name) not in exclude]
    cut = [area for area in read.areas if _key(area.class_name) in exclude]
    if all(area.is_negative for area in chosen):
        wanted = f"of class {' or '.join(options.include)}" if include else "that may be a region"
        raise AnnotationError(f"{path}: no area {wanted}; it has {read.describe()}")
    known = _keys(area.class_name for area in read.areas)
    asked = [name for name in (*options.include, *options.exclude) if name != IGNORED]
    notes = [f"no region of class {name}" for name in asked if _key(name) not in known]
    if read.others:
        notes.append("points, lines, cells or detections among the annotations are no regions")
    if read.program == "QuPath" and viewer != ViewerFrame(viewer.size_level0):
        notes.append(
            "regions are placed as QuPath shows the slide, cropped to the scanned area and not turned"
        )
    layers, without = (_layers(_in_level0(read, areas, viewer, vendor)) for areas in (chosen, cut))
    return Regions(path, layers, without, options.share, tuple(notes))


def label_tiles(
    path: Path,
    classes: Sequence[str],
    least_share: float,
    viewer: ViewerFrame,
    vendor: str,
    origins_level0: NDArray[np.int32],
    extent_level0: tuple[float, float],
    mpp_level0: tuple[float, float],
    mpp: float,
) -> tuple[NDArray[np.int64], frozenset[str]]:
    """Labels tiles by the class of the annotations that cover the largest share of them.

    Args:
        path: the file of annotations; areas of class ``Ignore*`` are cut out of the others.
        classes: names of the K classes; case is ignored.
        least_share: of a tile to be labelled, above 0, up to 1.
        viewer: the frame of the slide in other programs.
        vendor: of the slide, as its reader calls it.
        origins_level0: ``[N, 2]`` upper-left corners ``(x, y)``, level-0 pixels.
        extent_level0: size of each tile ``(x, y)``, level-0 pixels.
        mpp_level0: spacing of level 0 along x and y, micrometres per pixel.
        mpp: spacing at which shares are computed, micrometres per pixel.

    Returns:
        ``[N]``, 0..K-1, the first of equal shares, -1 for no label; and the names of other classes.

    Raises:
        AnnotationError: it cannot be read, or reaches beyond the slide.
    """
    read = read_annotations(path)
    size_px = mask_size(viewer.size_level0, mpp_level0, mpp)
    known = _keys(classes)
    ignored = [area for area in read.areas if _key(area.class_name) in _keys([IGNORED]) - known]
    unlabelled = _layers(_in_level0(read, ignored, viewer, vendor))
    shares = np.zeros((len(classes), len(origins_level0)), np.float32)
    for number, name in enumerate(classes):
        areas = [area for area in read.areas if _key(area.class_name) == _key(name)]
        if layers := _layers(_in_level0(read, areas, viewer, vendor)):
            covered = _cover(path, layers, unlabelled, size_px, mpp, mpp_level0)
            shares[number] = area_means(covered, mpp, origins_level0, extent_level0, mpp_level0)
    labels = np.where(shares.max(0) >= least_share - 1e-6, shares.argmax(0), -1).astype(np.int64)
    return labels, frozenset(
        area.class_name for area in read.areas if _key(area.class_name) not in known | _keys([IGNORED, ""])
    )


def _cover(
    path: Path,
    layers: Sequence[Layer],
    without: Sequence[Layer],
    size_px: tuple[int, int],
    mpp: float,
    mpp_level0: tuple[float, float],
) -> NDArray[np.float32]:
    try:
        return coverage(layers, without, size_px, (mpp_level0[0] / mpp, mpp_level0[1] / mpp))
    except AnnotationError as error:
        raise AnnotationError(f"{path}: {error}") from error


def _layers(areas: Sequence[Annotation]) -> tuple[Layer, ...]:
    """Sorts areas into layers: of each class with negative areas, which cut it alone, and of all others."""
    own = {_key(area.class_name) for area in areas if area.is_negative}
    layers: dict[str | None, tuple[list[Polygon], list[Polygon]]] = defaultdict(lambda: ([], []))
    for area in areas:
        key = _key(area.class_name)
        layers[key if key in own else None][area.is_negative].append(area.polygon)
    return tuple(Layer(*layer) for layer in layers.values() if layer[0])


def _digests(kind: bytes, polygons: Sequence[Polygon]) -> Iterator[str]:
    for polygon in polygons:
        one = hashlib.sha256(kind)
        for ring in polygon:
            one.update(len(ring).to_bytes(8, "little") + ring.astype("<f8").tobytes())
        yield one.hexdigest()


def _in_level0(
    read: Annotations, areas: Sequence[Annotation], viewer: ViewerFrame, vendor: str
) -> list[Annotation]:
    """Places areas in level 0 of their slide."""
    if read.program == "ImageScope" and vendor == "leica":
        raise AnnotationError(
            f"{read.path}: ImageScope turns and crops Leica slides, its places are not known; use QuPath's"
        )
    placed = [
        Annotation(
            area.class_name,
            tuple(viewer.to_level0(ring, read.program == "QuPath") for ring in area.polygon),
            area.is_negative,
        )
        for area in areas
    ]
    if placed:
        points = np.concatenate([ring for area in placed for ring in area.polygon])
        size, margin = np.array(viewer.size_level0), _BEYOND * max(viewer.size_level0)
        beyond = (points < -margin) | (points > size + margin)
        if beyond.any():
            x, y = points[beyond.any(1)][0]
            raise AnnotationError(
                f"{read.path}: annotations reach to ({x:.0f}, {y:.0f}), the slide has {size[0]} x {size[1]} "
                "pixels at level 0: they are of another slide, or not in its level-0 pixels"
                + (" from the corner of the scanned area" if any(viewer.corner_level0) else "")
            )
    return placed


def _key(class_name: str) -> str:
    return class_name.strip().casefold()


def _keys(class_names: Iterable[str]) -> set[str]:
    return set(map(_key, class_names))


def _name_key(name: str) -> str:
    return clash_key(safe_slide_id(name) or name)
