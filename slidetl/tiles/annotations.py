"""Reads annotated areas: GeoJSON of QuPath, XML of ASAP, XML of Aperio ImageScope."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import AnnotationError
from slidetl.files import parse_xml
from slidetl.tiles.polygons import Polygon

SUFFIXES = (".geojson", ".json", ".xml")
PACKED = ".gz"

# Read whole, unpacked; a pathologist's annotations have some megabytes.
_MOST_BYTES = 256 * 2**20
# Objects of QuPath that nobody drew as an area to choose.
# By their type, or before version 0.3 by what they have as an identifier.
_NO_REGIONS = frozenset(["cell", "detection", "tmacore", "tma_core", "root"])
_NO_REGIONS |= {"pathcellobject", "pathdetectionobject", "tmacoreobject", "pathrootobject"}
_ELLIPSE_CORNERS = 128


@dataclass(frozen=True, eq=False)
class Annotation:
    """One annotated area.

    Attributes:
        class_name: its class; empty if it has none.
        polygon: its rings, level-0 pixels in the frame of the program that drew it.
        is_negative: cut out of the areas of its class.
    """

    class_name: str
    polygon: Polygon
    is_negative: bool = False


@dataclass(frozen=True, eq=False)
class Annotations:
    """The areas in a file.

    Attributes:
        path: the file.
        program: that drew them: ``QuPath``, ``ASAP`` or ``ImageScope``.
        areas: in the order of the file.
        others: number of objects that are no areas, by their kind.
    """

    path: Path
    program: str
    areas: tuple[Annotation, ...]
    others: Counter[str]

    def describe(self) -> str:
        """Describes the classes in one line, with the number of their areas."""
        counts = Counter(area.class_name or "without a class" for area in self.areas)
        found = [f"{name} ({count})" for name, count in counts.most_common(10)]
        found += [f"and {count} of type {kind}, which are no regions" for kind, count in self.others.items()]
        return ", ".join(found) or "nothing"


def is_annotation_file(path: Path) -> bool:
    """Tells by its name if a file may hold annotations."""
    return path.name.lower().removesuffix(PACKED).endswith(SUFFIXES)


def base_name(path: Path) -> str:
    """Returns the name of a file without the endings of annotations."""
    name = path.name
    for suffix in ((PACKED,), SUFFIXES):
        name = next((name[: -len(end)] for end in suffix if name.lower().endswith(end)), name)
    return name


def read_annotations(path: Path) -> Annotations:
    """Reads the annotated areas of a slide, of a file that ends in :data:`SUFFIXES`, also with ``.gz``.

    Of GeoJSON: polygons of a ``FeatureCollection``, a list of features, a feature or a geometry, with the
    classification of QuPath as their class; children of objects, too. Cells, detections and cores of tissue
    microarrays are counted, and left out. Of ASAP: polygons, rectangles and splines (by their points), the
    group being the class. Of ImageScope: polygons, rectangles and ellipses, the layer's name (or
    description) being the class; regions marked as negative are cut out of their layer.

    Raises:
        AnnotationError: the file is missing, damaged, too large, or none of these.
    """
    try:
        data = _read(path)
        if path.name.lower().removesuffix(PACKED).endswith(".xml"):
            return _read_xml(path, data)
        others: Counter[str] = Counter()
        areas = tuple(_geojson_areas(json.loads(data), others))
        return Annotations(path, "QuPath", areas, others)
    except AnnotationError:
        raise
    except RecursionError as error:
        raise AnnotationError(f"{path}: its JSON is nested too deeply for annotations") from error
    except (OSError, EOFError, zlib.error) as error:
        raise AnnotationError(f"{path}: cannot be read: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise AnnotationError(
            f"{path}: expected annotations as GeoJSON of QuPath, or XML of ASAP or ImageScope: {error}"
        ) from error


def _read(path: Path) -> bytes:
    with gzip.open(path) if path.name.lower().endswith(PACKED) else path.open("rb") as file:
        data = bytes(file.read(_MOST_BYTES + 1))
    if len(data) > _MOST_BYTES:
        raise AnnotationError(f"{path}: larger than {_MOST_BYTES // 2**20} MiB; export annotations alone")
    return data


def _geojson_areas(root: Any, others: Counter[str]) -> Iterator[Annotation]:
    if isinstance(root, dict) and "type" not in root:
        raise ValueError("its JSON has no 'type'")
    waiting: list[tuple[Any, str]] = [(root, "")]
    while waiting:
        node, class_name = waiting.pop()
        if isinstance(node, list):
            waiting += [(child, class_name) for child in reversed(node)]
            continue
        kind = node["type"]
        if kind == "FeatureCollection":
            waiting.append((node["features"], ""))
        elif kind == "GeometryCollection":
            waiting.append((node["geometries"], class_name))
        elif kind == "Feature":
            properties = node.get("properties") or {}
            waiting.append((properties.get("childObjects", properties.get("children")) or [], ""))
            object_type = str(properties.get("objectType", properties.get("object_type", node.get("id"))))
            if object_type.lower() in _NO_REGIONS:
                others[object_type] += 1
            elif node.get("geometry") is None:
                others["object without a geometry"] += 1
            else:
                waiting.append((node["geometry"], _class_name(properties.get("classification"))))
        elif kind in ("Polygon", "MultiPolygon"):
            for rings in [node["coordinates"]] if kind == "Polygon" else node["coordinates"]:
                if rings:
                    yield Annotation(class_name, tuple(_ring(ring) for ring in rings))
        else:
            others[str(kind)] += 1


def _class_name(classification: Any) -> str:
    """Returns the name of a class as QuPath shows it, that of a derived class with colons."""
    if classification is None:
        return ""
    if isinstance(classification, str):
        return classification.strip()
    names = classification.get("names") or [classification.get("name") or ""]
    return ": ".join(str(name).strip() for name in names)


def _ring(points: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    ring = np.asarray(points, np.float64)
    if ring.ndim != 2 or ring.shape[1] < 2:
        raise ValueError(f"a ring of a polygon must be a list of points (x, y), found {str(points)[:60]}")
    if not np.isfinite(ring).all():
        raise ValueError("a coordinate is not a finite number")
    return ring[:, :2]


def _read_xml(path: Path, data: bytes) -> Annotations:
    root = parse_xml(data)
    others: Counter[str] = Counter()
    if root.tag == "ASAP_Annotations":
        return Annotations(path, "ASAP", tuple(_asap_areas(root, others)), others)
    if root.tag == "Annotations":
        return Annotations(path, "ImageScope", tuple(_aperio_areas(root, others)), others)
    raise ValueError(f"its XML is <{root.tag}>, not <ASAP_Annotations> or <Annotations>")


def _asap_areas(root: ElementTree.Element, others: Counter[str]) -> Iterator[Annotation]:
    for element in root.iter("Annotation"):
        kind, group = element.get("Type", ""), element.get("PartOfGroup", "").strip()
        if kind not in ("Polygon", "Rectangle", "Spline"):
            others[kind] += 1
            continue
        points = sorted(element.iter("Coordinate"), key=lambda point: float(point.get("Order", "0")))
        yield Annotation("" if group == "None" else group, (_points(points),))


def _aperio_areas(root: ElementTree.Element, others: Counter[str]) -> Iterator[Annotation]:
    for layer in root.iter("Annotation"):
        described = [
            attribute.get("Value", "").strip()
            for attribute in layer.iterfind("Attributes/Attribute")
            if attribute.get("Name") == "Description"
        ]
        name = layer.get("Name", "").strip() or "".join(described)
        for region in layer.iter("Region"):
            kind, vertices = region.get("Type", "0"), list(region.iter("Vertex"))
            ring = _points(vertices) if vertices else np.zeros((0, 2))
            if kind in ("1", "2") and len(ring) == 2:  # the corners of the rectangle around it
                ring = _rectangle(ring) if kind == "1" else _ellipse(ring)
            if kind not in ("0", "1", "2") or len(ring) < 3:
                others[f"{kind} (ImageScope)"] += 1
                continue
            yield Annotation(name, (ring,), region.get("NegativeROA", "0").strip() == "1")


def _points(elements: Sequence[ElementTree.Element]) -> NDArray[np.float64]:
    # ASAP writes the decimal comma of the machine that it runs on.
    return _ring([[float(e.attrib[axis].replace(",", ".")) for axis in "XY"] for e in elements])


def _rectangle(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    (x0, y0), (x1, y1) = corners
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _ellipse(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    turn = np.arange(_ELLIPSE_CORNERS) * (2 * math.pi / _ELLIPSE_CORNERS)
    circle = np.stack([np.cos(turn), np.sin(turn)], 1)
    return np.asarray(corners.mean(0) + circle * np.ptp(corners, 0) / 2)
