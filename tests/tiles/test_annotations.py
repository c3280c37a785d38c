from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slidetl.errors import AnnotationError
from slidetl.tiles.annotations import Annotations, is_annotation_file, read_annotations

SQUARE = [[0, 0], [8, 0], [8, 8], [0, 8], [0, 0]]
HOLE = [[2, 2], [4, 2], [4, 4], [2, 2]]


def feature(
    *rings: Any, name: str | None = None, kind: str | None = "annotation", **more: Any
) -> dict[str, Any]:
    """An object as QuPath 0.6 exports it."""
    properties: dict[str, Any] = more
    if kind is not None:
        properties["objectType"] = kind
    if name is not None:
        properties["classification"] = {"name": name, "color": [200, 0, 0]}
    geometry = {"type": "Polygon", "coordinates": list(rings)}
    return {"type": "Feature", "id": "a", "geometry": geometry, "properties": properties}


def read(tmp_path: Path, content: Any, name: str = "S1.geojson") -> Annotations:
    path = tmp_path / name
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return read_annotations(path)


def classes(found: Annotations) -> list[tuple[str, int]]:
    return [(area.class_name, len(area.polygon)) for area in found.areas]


@pytest.mark.parametrize("name", ["S1.geojson", "S1.json", "S1.geojson.gz", "S1.GeoJSON"])
def test_what_qupath_exports(tmp_path: Path, name: str) -> None:
    features = [feature(SQUARE, HOLE, name="Tumor"), feature(SQUARE)]
    for content in ({"type": "FeatureCollection", "features": features}, features):
        found = read(tmp_path, content, name)
        assert classes(found) == [("Tumor", 2), ("", 1)]
        assert found.areas[0].polygon[1].tolist() == HOLE
    assert classes(read(tmp_path, features[0], name)) == [("Tumor", 2)]


def test_other_forms_of_geojson(tmp_path: Path) -> None:
    many = {
        "type": "MultiPolygon",
        "coordinates": [[SQUARE, HOLE], [SQUARE]],
        "plane": {"c": -1, "z": 0, "t": 0},
    }
    line = {"type": "LineString", "coordinates": SQUARE}
    both = {"type": "GeometryCollection", "geometries": [many, line]}
    assert classes(read(tmp_path, many)) == [("", 2), ("", 1)]
    found = read(tmp_path, {**feature(SQUARE, name="Stroma"), "geometry": both})
    assert classes(found) == [("Stroma", 2), ("Stroma", 1)] and found.others == {"LineString": 1}
    # A hierarchy, derived classes, a class as text, and QuPath 0.2.
    child = feature(SQUARE, name="Inner", childObjects=[feature(SQUARE, name="Innermost")])
    names = {
        name for name, _ in classes(read(tmp_path, [feature(SQUARE, name="Outer", childObjects=[child])]))
    }
    assert names == {"Outer", "Inner", "Innermost"}
    derived = feature(SQUARE, classification={"names": ["Tumor", "Positive"]})
    assert classes(read(tmp_path, derived)) == [("Tumor: Positive", 1)]
    assert classes(read(tmp_path, feature(SQUARE, classification=" Tumor "))) == [("Tumor", 1)]
    old = {**feature(SQUARE, kind=None), "id": "PathCellObject"}
    assert read(tmp_path, [old]).others == {"PathCellObject": 1}


def test_cells_and_cores_are_no_regions(tmp_path: Path) -> None:
    kinds = ["annotation", "tile", "cell", "detection", "tmaCore", "root", None]
    found = read(tmp_path, [feature(SQUARE, name=kind, kind=kind) for kind in kinds])
    assert [area.class_name for area in found.areas] == ["annotation", "tile", ""]
    assert found.others == {"cell": 1, "detection": 1, "tmaCore": 1, "root": 1}
    assert "and 1 of type cell, which are no regions" in found.describe()


def test_asap(tmp_path: Path) -> None:
    def one(kind: str, group: str, points: list[tuple[int, str, str]]) -> str:
        inside = "".join(f'<Coordinate Order="{n}" X="{x}" Y="{y}" />' for n, x, y in points)
        return (
            f'<Annotation Name="a" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58">'
            f"<Coordinates>{inside}</Coordinates></Annotation>"
        )

    ring = [(2, "8,5", "8"), (0, "0", "0"), (1, "8", "0"), (10, "0", "8.25")]
    text = '<?xml version="1.0"?><ASAP_Annotations><Annotations>'
    text += one("Polygon", "Tumor", ring) + one("Spline", "None", ring) + one("Dot", "Tumor", ring[:1])
    text += "</Annotations><AnnotationGroups><Group Name='Tumor' PartOfGroup='None'/></AnnotationGroups>"
    found = read(tmp_path, f"{text}</ASAP_Annotations>".encode(), "S1.xml")
    assert found.program == "ASAP" and classes(found) == [("Tumor", 1), ("", 1)]
    assert found.areas[0].polygon[0].tolist() == [[0, 0], [8, 0], [8.5, 8], [0, 8.25]]
    assert found.others == {"Dot": 1}


def test_imagescope(tmp_path: Path) -> None:
    def region(kind: int, points: list[tuple[float, float]], negative: int = 0) -> str:
        inside = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points)
        return f'<Region Id="1" Type="{kind}" NegativeROA="{negative}"><Vertices>{inside}</Vertices></Region>'

    triangle = [(0.0, 0.0), (8.0, 0.0), (0.0, 8.0)]
    described = '<Attributes><Attribute Id="0" Name="Description" Value="Stroma"/></Attributes>'
    text = '<Annotations MicronsPerPixel="0.25"><Annotation Id="1" Name="Tumor" Type="4">'
    text += f"<Regions>{region(0, triangle)}{region(0, triangle, 1)}{region(4, triangle[:2])}</Regions>"
    text += "</Annotation>"
    text += f'<Annotation Id="2" Name="" Type="4">{described}<Regions>{region(1, [(2, 2), (6, 8)])}'
    text += f"{region(2, [(0, 0), (40, 20)])}</Regions></Annotation></Annotations>"
    found = read(tmp_path, text.encode("utf-16"), "S1.xml")
    assert found.program == "ImageScope"
    assert [(a.class_name, a.is_negative) for a in found.areas] == [
        *(("Tumor", False), ("Tumor", True), ("Stroma", False), ("Stroma", False)),
    ]
    assert found.areas[2].polygon[0].tolist() == [[2, 2], [6, 2], [6, 8], [2, 8]]
    ellipse = (found.areas[3].polygon[0] - [20, 10]) / [20, 10]
    assert np.allclose((ellipse**2).sum(1), 1)
    assert found.others == {"4 (ImageScope)": 1}


BOMB = "<!DOCTYPE a [<!ENTITY b 'bbbbbbbbbb'><!ENTITY c '&b;&b;&b;'>]><Annotations>&c;</Annotations>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("S1.geojson", b"", "expected annotations as GeoJSON of QuPath, or XML"),
        ("S1.geojson", b'{"a": 1}', "no 'type'"),
        ("S1.geojson", b"3", "expected annotations"),
        ("S1.geojson", b"\xff\xfe\x00", "expected annotations"),
        ("S1.geojson", b"[" * 100_000, "nested too deeply"),
        ("S1.geojson", json.dumps(feature([[0, 0], [1, float("nan")], [1, 1]])).encode(), "not a finite"),
        ("S1.geojson", json.dumps(feature([[0, 0], [1, 1e999], [1, 1]])).encode(), "not a finite"),
        ("S1.geojson", json.dumps(feature([[0, 0], [1, 10**400], [1, 1]])).encode(), "expected annotations"),
        ("S1.geojson", json.dumps(feature([0, 1, 2])).encode(), "a list of points"),
        ("S1.geojson", json.dumps(feature([[0, 0], [1], [1, 1]])).encode(), "expected annotations"),
        ("S1.geojson", json.dumps(feature("abc")).encode(), "expected annotations"),
        ("S1.geojson", json.dumps({"type": "Feature", "geometry": 4}).encode(), "expected annotations"),
        ("S1.geojson", json.dumps({**feature(SQUARE), "properties": []}).encode(), None),
        ("S1.geojson", json.dumps(feature(SQUARE, classification=[1])).encode(), "expected annotations"),
        ("S1.xml", BOMB.encode(), "document type"),
        ("S1.xml", BOMB.encode("utf-16"), "document type"),
        ("S1.xml", b"<a", "XML is damaged"),
        ("S1.xml", b"<Annotations>" + b"<a>" * 50_000 + b"</a>" * 50_000, "XML is damaged"),
        ("S1.xml", b"<a/>", "its XML is <a>, not"),
        ("S1.xml", b"<ASAP_Annotations><Annotation Type='Polygon'/></ASAP_Annotations>", "a list of points"),
        ("S1.geojson.gz", None, "cannot be read"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, name: str, content: bytes | None, message: str | None) -> None:
    if content is None:
        (tmp_path / name).write_bytes(b"plain")
        with pytest.raises(AnnotationError, match=message):
            read_annotations(tmp_path / name)
    elif message is None:
        assert len(read(tmp_path, content, name).areas) == 1
    else:
        with pytest.raises(AnnotationError, match=message) as caught:
            read(tmp_path, content, name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_a_file_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slidetl.tiles.annotations._MOST_BYTES", 1000)
    with pytest.raises(AnnotationError, match="larger than 0 MiB"):
        read(tmp_path, b" " * 100_000, "S1.geojson.gz")
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_annotations(tmp_path / "none.geojson")


def test_names_of_files() -> None:
    names = ["a.geojson", "a.svs.JSON", "a.xml.gz", "a.csv", "geojson", "a.gz"]
    assert [is_annotation_file(Path(name)) for name in names] == [True, True, True, False, False, False]
