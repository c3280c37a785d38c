from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from slidetl.data.datamodule import SlideDataModule
from slidetl.data.datasets import BagDataset, ChunkDataset
from slidetl.data.manifest import read_manifest
from slidetl.data.study import read_study
from slidetl.data.tasks import LabelledPoints, Task, check_tasks, read_points
from slidetl.errors import ManifestError, UsageError
from slidetl.synthetic.section import grade_of_share
from tests.conftest import Study
from tests.data.test_datamodule import rewrite

ISHAK = Task("ishak", "ishak", ("0", "1", "2", "3", "4", "5", "6"))
NESTS = Task("nests", "nests", ("no", "yes"), of_tiles=True, ordinal=False)


def points(*rows: tuple[float, float, int]) -> LabelledPoints:
    table = np.array(rows, float).reshape(-1, 3)
    return LabelledPoints(table[:, :2], table[:, 2])


def test_a_tile_has_the_commonest_label_of_its_points() -> None:
    origins = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.int32)
    places = points((1, 1, 2), (2, 2, 0), (9.9, 9.9, 2), (10, 0, 1), (10, 9, 3), (19.9, 10, 4), (20, 10, 0))
    assert places.of_tiles(origins, (10.0, 10.0)).tolist() == [2, 1, pytest.approx(np.nan, nan_ok=True), 4]
    assert np.isnan(points().of_tiles(origins, (10.0, 10.0))).all()


@given(st.floats(1.5, 40), st.integers(2, 9))
def test_a_table_of_the_tiles_corners_labels_each_tile(extent: float, n: int) -> None:
    steps = np.rint(np.arange(n) * extent).astype(np.int32)  # as the tiler rounds them
    origins = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    labels = np.arange(n * n, dtype=float)
    found = LabelledPoints(origins.astype(float), labels).of_tiles(origins, (extent, extent))
    assert found.tolist() == labels.tolist()


@given(
    hnp.arrays(np.int32, st.tuples(st.integers(0, 30), st.just(2)), elements=st.integers(-9, 60)),
    hnp.arrays(
        float, st.tuples(st.integers(0, 40), st.just(2)), elements=st.integers(-30, 200).map((0.5).__mul__)
    ),
    st.tuples(st.floats(0.5, 40), st.floats(0.5, 40)),
    st.integers(0, 2**32 - 1),
)
def test_tiles_at_any_places_are_labelled_as_by_comparing_every_point_with_every_tile(
    origins: NDArray[np.int32], xy: NDArray[np.float64], extent: tuple[float, float], seed: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, 3, len(xy)).astype(float)
    votes = np.zeros((len(origins), 3))
    for tile, origin in enumerate(origins):
        inside = ((origin <= xy) & (xy < origin + np.floor(extent))).all(1)
        votes[tile] = np.bincount(labels[inside].astype(int), minlength=3)
    expected = np.where(votes.any(1), votes.argmax(1), np.nan)
    np.testing.assert_array_equal(LabelledPoints(xy, labels).of_tiles(origins, extent), expected)


def test_points_are_compared_with_near_tiles_only() -> None:
    """Each with every tile took 20 seconds."""
    steps = np.arange(320, dtype=np.int32) * 10
    origins = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    labels = np.tile([0.0, 1.0], 2500)
    start = time.process_time()
    found = LabelledPoints(origins[:5000].astype(float), labels).of_tiles(origins, (10.0, 10.0))
    assert time.process_time() - start < 5
    assert found[:5000].tolist() == labels.tolist()


def test_a_table_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("label,x_level0,y_level0,by\n1,10,20.5,anna\n0,3,4,ben\n")
    found = read_points(path, 2)[""]
    assert found.xy_level0.tolist() == [[10, 20.5], [3, 4]] and found.labels.tolist() == [1, 0]
    for row in ("2,1,1", "-1,1,1", "1,nan,1", "1,x,1", "1,1"):
        path.write_text(f"label,x_level0,y_level0\n0,1,1\n{row}\n")
        with pytest.raises(
            ManifestError, match=r"labels\.csv, line 3: expected two numbers of level-0 pixels"
        ):
            read_points(path, 2)
    path.write_text("label,x,y\n")
    with pytest.raises(ManifestError, match="missing column x_level0, y_level0"):
        read_points(path, 2)
    with pytest.raises(ManifestError, match="expected a CSV of tile labels"):
        read_points(tmp_path / "none.csv", 2)


def test_a_table_may_hold_the_slides_of_a_study(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    header = "slide_id,x_level0,y_level0,label\n"
    path.write_text(f"{header}a,0,0,ignore\nb,1,2,0.5\na,3,3,2\n")
    found = read_points(path)
    assert {slide: points.labels.tolist() for slide, points in found.items()} == {
        "a": [np.inf, 2],
        "b": [0.5],
    }
    for label in ("vessel", "nan", "inf", ""):
        path.write_text(f"{header}a,0,0,{label}\n")
        with pytest.raises(ManifestError, match=r"line 2: .* level-0 pixels and a number or 'ignore', found"):
            read_points(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("#NV;0;0;1", "slide_id is an error value"),
        ("a;1.050;0;1", "1.050 may be 1050"),
        ("a\t1.050\t0\t1", "1.050 may be 1050"),
        ("a,0,3.450,1\na,0,950,1", "1.050 may be 1050"),
        ("a;0;0;2.500", "1050"),
        (";0;0;1", "slide_id is empty; give it in each line"),
    ],
)
def test_a_table_with_errors_or_thousands_of_a_spreadsheet_is_refused(
    tmp_path: Path, row: str, said: str
) -> None:
    path = tmp_path / "labels.csv"
    separator = next(mark for mark in ";\t," if mark in row)
    path.write_text("slide_id;x_level0;y_level0;label\n".replace(";", separator) + f"{row}\n")
    with pytest.raises(ManifestError, match=f"line 2: expected two numbers .*{said}"):
        read_points(path)
    path.write_text("slide_id;x_level0;y_level0;label\nA;1.050;0;2.500\nA;0.253;0;2.5\n")
    assert read_points(path)["A"].labels.tolist() == [2.5, 2.5]


def test_the_lines_of_a_slide_are_its_own_labels(study: Study, tmp_path: Path) -> None:
    one, two, *_ = read_study(study.manifest, study.cache).slides
    table = tmp_path / "labels.csv"
    lines = [
        f"{s.row.slide_id},{x},{y},{label}"
        for s, label in ((one, 0), (two, 1))
        for x, y in s.cache.origins_level0
    ]
    table.write_text("\n".join(["slide_id,x_level0,y_level0,label", *lines]) + "\n")
    path = rewrite(study, tmp_path / "m.csv", nests=["labels.csv"] * 20)
    first, second, third, *_ = read_study(path, study.cache, tasks=[NESTS]).slides
    labels = [np.unique(slide.labels["nests"]).tolist() for slide in (first, second, third)]
    assert labels == [[0], [1], [-1]]


def test_a_table_of_many_slides_is_read_once(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = read_study(study.manifest, study.cache).slides[0]
    x, y = slide.cache.origins_level0[0]
    (tmp_path / "labels.csv").write_text(
        f"slide_id,x_level0,y_level0,label\n{slide.row.slide_id},{x},{y},1\n"
    )
    path = rewrite(study, tmp_path / "m.csv", nests=["labels.csv"] * 20)
    read = []

    def counted(path: Path, n_labels: int) -> dict[str, LabelledPoints]:
        read.append((path, n_labels))
        return read_points(path, n_labels)

    monkeypatch.setattr("slidetl.data.study.read_points", counted)
    read_study(path, study.cache, tasks=[NESTS])
    assert read == [(tmp_path / "labels.csv", 2)]


@pytest.mark.parametrize("name", ["labels.csv", "slide.geojson"])
def test_labels_of_one_slide_are_refused_for_several(study: Study, tmp_path: Path, name: str) -> None:
    (tmp_path / "labels.csv").write_text("x_level0,y_level0,label\n0,0,1\n")
    (tmp_path / "slide.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    path = rewrite(study, tmp_path / "m.csv", nests=["1", name, name, *[""] * 17])
    with pytest.raises(
        ManifestError, match=rf"{name}: its labels are of one slide, and several lines of the"
    ):
        read_study(path, study.cache, tasks=[NESTS])


def test_labels_without_effect_are_told(study: Study, tmp_path: Path) -> None:
    one, two, *_, last = (row.slide_id for row in read_manifest(study.manifest).rows)
    rows = f"{one.upper()},0,0,1\n{two}.svs,0,0,1\n{two},-70,0,1\n{last},0,0,1\n"
    (tmp_path / "labels.csv").write_text(f"slide_id,x_level0,y_level0,label\n{rows}")
    path = rewrite(study, tmp_path / "m.csv", nests=["labels.csv"] * 19 + [""])
    with pytest.warns(UserWarning) as caught:
        read_study(path, study.cache, tasks=[NESTS])
    unused, missed = (str(warning.message) for warning in caught)
    assert "labels.csv: labels of 3 slides have no effect, since no line of the manifest" in unused
    assert unused.endswith(f"takes them: {one.upper()}, {two}.svs, {last}")
    assert f"labels.csv: no point of {two} lies in a tile of the cache" in missed


def test_the_manifest_has_the_labels_of_each_task(study: Study, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("x_level0,y_level0,label\n0,0,1\n")
    nests = ["labels.csv", "1", *[""] * 18]
    path = rewrite(study, tmp_path / "m.csv", ishak=["6", *[""] * 19], nests=nests)
    readers = Task("reader1", "grade_reader1", ("0", "1", "2", "3", "4"))
    absent = Task("absent", "absent", ("0", "1"))
    rows = read_manifest(path, 5, tasks=[ISHAK, NESTS, readers, absent]).rows
    assert [row.labels for row in rows[:2]] == [
        (6, table, rows[0].reader_grades[0], None),
        (None, 1, rows[1].reader_grades[0], None),
    ]
    path = rewrite(study, tmp_path / "m.csv", ishak=["7", *[""] * 19], nests=["none.csv", *[""] * 19])
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, 5, tasks=[ISHAK, NESTS])
    assert "line 2: ishak must be a whole number from 0 to 6 (empty: no label), found '7'" in str(
        caught.value
    )
    assert "line 2: nests must be a whole number from 0 to 1 or a file of tile labels" in str(caught.value)


def test_annotations_of_qupath_label_tiles_by_class(study: Study, tmp_path: Path) -> None:
    """The upper part of a slide is of one class, the lower of an unknown one; another slide has a table."""
    first, second, *_ = read_study(study.manifest, study.cache).slides
    width, height = first.cache.size_level0
    side = first.cache.extent_level0[1]
    upper = [[0, 0], [width, 0], [width, 2 * side], [0, 2 * side]]
    below = [[0, 2 * side], [width, 2 * side], [width, height], [0, height]]
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for name, ring in (("tumor", upper), ("Necrosis", below))
    ]
    (tmp_path / "slide.geojson").write_text(json.dumps(features))
    x, y = second.cache.origins_level0[0]
    (tmp_path / "labels.csv").write_text(f"x_level0,y_level0,label\n{x},{y},0\n")
    path = rewrite(study, tmp_path / "m.csv", nests=["slide.geojson", "labels.csv", *[""] * 18])
    task = Task("nests", "nests", ("Stroma", "Tumor"), of_tiles=True, ordinal=False)
    with pytest.warns(UserWarning, match="task nests: annotations of class Necrosis are no label"):
        slide, *_ = read_study(path, study.cache, tasks=[task]).slides
    labels, y = slide.labels["nests"], slide.cache.origins_level0[:, 1]
    assert np.array_equal(labels, np.where(y < 2 * side - side / 2, 1, -1)) and {1, -1} == set(
        np.unique(labels)
    )
    with pytest.raises(UsageError, match="least_share must be above 0, up to 1, not 0"):
        Task("nests", "nests", ("0", "1"), least_share=0)


def test_what_cannot_be_a_task_is_refused() -> None:
    with pytest.raises(UsageError, match="only letters, digits, - and _; 'a b' has others"):
        Task("a b", "a", ("0", "1"))
    with pytest.raises(UsageError, match="task a: expected at least two different grades"):
        Task("a", "a", ("0", "0"))
    with pytest.raises(UsageError, match="task a: the weight must be above 0, not 0"):
        Task("a", "a", ("0", "1"), weight=0)
    with pytest.raises(UsageError, match="a name of its own, found ishak, ishak"):
        check_tasks([ISHAK, ISHAK])


def test_a_task_without_any_label_is_refused(study: Study, tmp_path: Path) -> None:
    data = SlideDataModule(str(study.manifest), str(study.cache), num_workers=0, tasks=[ISHAK])
    with pytest.raises(UsageError, match="no training slide has a label for task ishak"):
        data.setup("fit")
    data = SlideDataModule(str(study.manifest), str(study.cache), num_workers=0, tasks=[ISHAK])
    data.setup("predict")
    assert data.slides["predict"][0].labels == {"ishak": -1}


def test_labels_of_tiles_go_with_the_tiles(study: Study, tmp_path: Path) -> None:
    """A table made from the truth of a synthetic slide: each of its cells with the grade of that place."""
    names = [row.slide_id for row in read_manifest(study.manifest).rows]
    for name in names:
        with np.load(study.manifest.parent / "truth" / f"{name}.npz") as truth:
            row, column = np.nonzero(truth["tissue_fraction"] > 0.5)
            share = (truth["collagen_fraction"] / np.maximum(truth["tissue_fraction"], 1e-6))[row, column]
            centre = (np.stack([column, row], 1) + 0.5) * truth["cell_um"] / 4  # at 4 um/px
        grades = [grade_of_share(min(1.0, float(value))) for value in share]
        table = np.column_stack([centre, grades])
        np.savetxt(tmp_path / f"{name}.csv", table, "%g", ",", header="x_level0,y_level0,label", comments="")
    path = rewrite(study, tmp_path / "m.csv", places=[f"{name}.csv" for name in names])
    task = Task("places", "places", ("0", "1", "2", "3", "4"), of_tiles=True)
    data = SlideDataModule(str(path), str(study.cache), num_workers=0, tasks=[task])
    data.setup("fit")
    slide = max(data.slides["train"], key=lambda slide: slide.row.grade or 0)
    labels = slide.labels["places"]
    assert isinstance(labels, np.ndarray) and len(labels) == len(slide.cache)
    assert (labels >= 0).mean() > 0.9 and len(set(labels.tolist())) > 1
    healthy = next(slide for slide in data.slides["train"] if slide.row.grade == 0)
    assert np.mean(healthy.labels["places"]) < labels.mean()
    # By hand, for one tile.
    tile = int(np.flatnonzero(labels == labels.max())[0])
    known = read_points(tmp_path / f"{slide.row.slide_id}.csv", 5)[""]
    inside = ((known.xy_level0 // 64) == (slide.cache.origins_level0[tile] // 64)).all(1)
    assert np.bincount(known.labels[inside].astype(int)).argmax() == labels[tile]

    bag = BagDataset([slide], len(labels) + 3, None, seed=0)[(0, 0)]["labels"]["places"]
    assert bag.tolist() == [*labels.tolist(), -1, -1, -1]
    chunks = ChunkDataset([slide], 7)
    told = [np.asarray(chunks[number]["labels"]["places"]) for number in range(len(chunks))]
    assert np.concatenate(told).tolist() == labels.tolist()
