from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from slidetl.data.manifest import read_manifest
from slidetl.grading.batch import FAILED, GRADED, GradeRow, write_results
from slidetl.library.model_card import METADATA
from slidetl.studio.jobs import Step
from slidetl.studio.presets import tile_steps
from slidetl.studio.project import Project
from slidetl.studio.results import judge
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import USED, Ledger, LedgerRow, file_state
from slidetl.training.predictions import SlidePrediction, write_predictions
from tests.library.test_model_card import CARD
from tests.studio.conftest import Client, cells_of

PAGES = ("slides", "labels", "train", "model", "grade")


def project_of(client: Client) -> Project:
    return Project(client.studio.root, client.studio.home, "lung")


def tiled(client: Client) -> None:
    """Notes the slides as tiled, as the command does."""
    lung, rows = project_of(client), []
    for name in "abc":
        path = client.root / "study" / f"{name}.svs"
        size, modified = file_state(path) or (0, 0.0)
        rows.append(LedgerRow(name, str(path), USED, tiles=9, bytes=size, modified=modified))
    lung.cache.mkdir(exist_ok=True)
    Ledger(lung.cache / "ledger.csv").record(rows)


def test_the_server_never_loads_torch() -> None:
    program = (
        "import sys\nimport slidetl.studio.command, slidetl.studio.app, slidetl.studio.results\n"
        "sys.exit(str({'torch', 'pytorch_lightning', 'timm'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_before_there_is_anything(page: str, client: Client) -> None:
    client.post("/projects", name="lung", grades="0, 1")
    answer = client.http.get(f"/p/lung/{page}")
    assert answer.status_code == 200 and 'aria-current="page"' in answer.text


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_with_slides(page: str, project: Client) -> None:
    assert project.http.get(f"/p/lung/{page}").status_code == 200


def test_a_fault_stands_beside_its_row_and_stops_nothing_that_was_typed(project: Client) -> None:
    fields = {"grade:0": "mild", "grade:1": "9", "patient_id:1": "P2", "site:2": "north"}
    page = project.label(fields)
    assert "Rows with a fault: 1" in page and page.count('class="wrong"') == 1
    assert "found &#39;9&#39;" in page and 'value="9"' in page and 'value="P2"' in page
    lung = project_of(project)
    assert [row["grade"] for row in lung.check().rows] == ["mild", "9", ""]
    # Commands keep the labels of before.
    with lung.manifest.open(newline="") as file:
        assert [row["grade"] for row in csv.DictReader(file)] == ["", "", ""]
    status, said = project.refused("/p/lung/train", preset="ridge", network="x")
    assert status == 400 and "Before training" in said
    assert "no fault found" in project.label({"grade:1": "severe"})
    with lung.manifest.open(newline="") as file:
        assert [row["grade"] for row in csv.DictReader(file)] == ["1", "2", ""]


def test_patients_spelled_twice_and_patients_unknown_are_doubts(project: Client) -> None:
    assert "Each slide counts as a patient of its own" in project.http.get("/p/lung/labels").text
    page = project.label({"patient_id:0": "P7", "patient_id:1": "p 7", "patient_id:2": "P8"})
    assert "spelled twice" in page and "as a patient of its own" not in page


def test_a_table_of_a_spreadsheet_gives_labels(project: Client) -> None:
    table = "\ufeffSlide ID;Patient-ID;Grade;Site\r\na.svs;P1;severe;north\r\nb;P2;0;\r\nz;P3;1;\r\n".encode()
    assert project.bring(table)[0] == 201
    page = project.http.get("/p/lung/labels").text
    assert "numbers of the table were read as grades: 0 = none, 1 = mild, 2 = severe" in page
    assert "1 lines of the table are of no slide of this project: z (4)" in page
    rows = project_of(project).check().rows
    assert [(row["patient_id"], row["grade"], row["site"]) for row in rows] == [
        ("P1", "severe", "north"),
        ("P2", "none", ""),
        ("c", "", ""),
    ]
    status, said = project.bring(b"PK\x03\x04 a workbook")
    assert status == 400 and "save the table as CSV" in said


def test_labels_stay_when_slides_are_added(project: Client) -> None:
    project.label({"grade:1": "mild", "patient_id:1": "P2"})
    (project.root / "study" / "aa.svs").write_bytes(b"no slide")
    project.post("/p/lung/folder", folder="study")
    rows = {row["slide_id"]: row for row in project_of(project).check().rows}
    assert len(rows) == 4 and (rows["b"]["patient_id"], rows["b"]["grade"]) == ("P2", "mild")


def test_the_page_says_what_tiling_leaves_out(project: Client) -> None:
    page = project.http.get("/p/lung/slides").text
    assert "less than a quarter of tissue are left out; pen, folds and blur are kept" in page
    words = tile_steps(project_of(project))[0].words
    assert not {"--max-pen", "--max-fold", "--min-focus", "--min-tissue"} & set(words)
    spec = TileSpec(mpp=1.0)
    assert (spec.min_tissue, spec.max_pen, spec.max_fold, spec.min_focus) == (0.25, 1, 1, 0)


def graded(client: Client) -> list[str]:
    return [row["grade"] for row in project_of(client).check().rows]


def numbers(client: Client) -> list[str]:
    with project_of(client).manifest.open(newline="") as file:
        return [row["grade"] for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "names",
    ["1, 2, 3", "0, 1, 2", "2, 1, 0", "none, mild, severe", "I, II, III", "1+, 2+, 3+", "+, ++, +++",
     "a, A, =A1", "NA, low, high", "0, 1, severe", "0.5, 1.0, 2", "'x, x, ='x"],
)  # fmt: skip
def test_a_cell_has_one_meaning(names: str, project: Client) -> None:
    project.post("/projects", name="other", grades=names)
    lung, grades = project_of(project), names.split(", ")
    about = json.loads((lung.folder / "project.json").read_text())
    (lung.folder / "project.json").write_text(json.dumps({**about, "grades": grades}))
    page = project.label({f"grade:{index}": name for index, name in enumerate(grades)})
    assert "no fault found" in page
    assert (graded(project), numbers(project)) == (grades, ["0", "1", "2"])
    before = lung.labels.read_bytes(), lung.manifest.read_bytes()
    for _ in range(2):
        project.label({})
        assert (lung.labels.read_bytes(), lung.manifest.read_bytes()) == before
        assert project.bring(project.http.get("/p/lung/labels.csv").content)[0] == 201
        assert (lung.labels.read_bytes(), lung.manifest.read_bytes()) == before


def test_labels_of_an_older_studio_keep_their_grades(project: Client) -> None:
    """Grades were numbers from 0 in ``labels.csv``, faulty ones as typed, and it had no column ``aside``."""
    lung = project_of(project)
    about = json.loads((lung.folder / "project.json").read_text())
    for names in (["1", "2", "3", "4"], ["F0", "F1", "F2", "F3"], ["none", "mild", "moderate", "severe"]):
        (lung.folder / "project.json").write_text(json.dumps(about | {"grades": names}))
        cells = zip("abc", ["1", "3.0", "9"], strict=True)
        table = "".join(f"{name},{project.root}/study/{name}.svs,P,{grade}\n" for name, grade in cells)
        lung.labels.write_text(f"slide_id,path,patient_id,grade\n{table}")
        for _ in range(2):
            assert graded(project) == [names[1], names[3], "9"]
            project.post("/p/lung/folder", folder="study")  # it is saved in today's form


def test_a_number_names_a_grade_only_where_it_can_mean_one(project: Client) -> None:
    assert "0 = none, 1 = mild" in project.http.get("/p/lung/labels").text
    project.label({"grade:0": "1.0", "grade:1": " SEVERE", "grade:2": "NA"})
    assert (graded(project), numbers(project)) == (["mild", "severe", "NA"], ["1", "2", ""])
    folder = project_of(project).folder
    about = json.loads((folder / "project.json").read_text())
    (folder / "project.json").write_text(json.dumps({**about, "grades": ["1+", "2+", "3+"]}))
    page = project.label({"grade:0": "1", "grade:1": "3 +", "grade:2": "0"})
    assert "Rows with a fault: 2" in page and "0 = 1+" not in page
    assert "grade must be one of 1+, 2+, 3+ (empty: not graded), found &#39;0&#39;" in page
    assert graded(project) == ["1", "3+", "0"]


def test_a_page_left_open_writes_to_no_other_slide(project: Client) -> None:
    left = project.grid()
    for name in ("a0", "0a"):
        (project.root / "study" / f"{name}.svs").write_bytes(b"no slide")
    project.post("/p/lung/folder", folder="study")
    project.post("/p/lung/labels", **project.typed({"grade:1": "mild", "patient_id:1": "P2"}, left))
    rows = project_of(project).check().rows
    assert [row["slide_id"] for row in rows if row["grade"] or row["patient_id"] == "P2"] == ["b"]
    # Another folder with slides of the same names.
    (project.root / "else").mkdir()
    (project.root / "else" / "a.svs").write_bytes(b"no slide")
    project.post("/p/lung/folder", folder="else")
    typed = project.typed({"grade:0": "severe", "patient_id:0": "P<9>"}, left)
    status, said = project.refused("/p/lung/labels", **typed)
    assert status == 409 and "slides of this project have changed" in said and graded(project) == [""]
    assert "Typed for slides that are not here now: P&lt;9&gt;, severe<" in said


def test_a_page_left_open_undoes_no_work_of_another(project: Client) -> None:
    left = project.grid()
    project.label({"grade:0": "mild", "patient_id:0": "P1"})
    project.post("/p/lung/labels", **project.typed({"grade:1": "severe"}, left))
    assert graded(project) == ["mild", "severe", ""]
    typed = project.typed({"grade:0": "none", "site:0": "north", "grade:2": "'&<"}, left)
    status, said = project.refused("/p/lung/labels", **typed)
    assert status == 409 and "someone else has changed a since" in said
    assert graded(project) == ["mild", "severe", ""]
    # What was typed is there still, with the other's work; to save it again is a decision.
    assert said.count('class="wrong"') == 1 and "someone else has typed: P1, mild." in said
    again = cells_of(said)
    cells = [text for name, text in again.items() if not name.startswith("was:")]
    assert cells == ["a", "none", "north", "b", "severe", "", "c", "'&<", ""]
    assert "Rows with a fault: 1" in project.post("/p/lung/labels", **again)
    assert graded(project) == ["none", "severe", "'&<"]
    status, said = project.refused(
        "/p/lung/labels", **project.typed({"grade:1": "x" * 201, "site:2": "south"})
    )
    assert status == 400 and "at most 200 letters" in said and 'value="south"' in said


def test_two_pages_may_type_the_same(project: Client) -> None:
    left = project.grid()
    project.label({"grade:0": "mild", "patient_id:0": "P1"})
    project.post("/p/lung/labels", **project.typed({"grade:0": "mild", "patient_id:0": "P1"}, left))


def test_a_patient_named_like_a_formula_is_that_patient_to_the_commands(project: Client) -> None:
    project.label({"patient_id:0": "-A", "site:0": "=1", "patient_id:1": "'s-H"})
    assert project_of(project).manifest.read_text().count("'") == 3
    first, second, _ = read_manifest(project_of(project).manifest).rows
    assert (first.patient_id, first.site, second.patient_id) == ("-A", "=1", "'s-H")


def test_labels_outlive_their_slides(project: Client) -> None:
    project.label({"grade:0": "mild", "patient_id:1": "P2", "site:2": "north"})
    lung, elsewhere = project_of(project), project.root / "else"
    before = lung.labels.read_bytes(), lung.manifest.read_bytes()
    elsewhere.mkdir()
    (elsewhere / "a.svs").write_bytes(b"no slide")
    page = project.post("/p/lung/folder", folder="else")
    assert "Labels of 3 slides that are not there now are kept aside" in page and "a, b, c" in page
    assert graded(project) == [""]  # of the same name, but another slide
    page = project.http.get("/p/lung/labels").text
    assert "Labels of 3 slides" in page and "labels.csv?aside=1" in page
    assert "../../study/a.svs" in project.http.get("/p/lung/labels.csv?aside=1").text
    assert "study" not in project.http.get("/p/lung/labels.csv").text
    project.label({"grade:0": "severe"})
    project.post("/p/lung/folder", folder="study")
    assert [row["grade"] for row in project_of(project).check().rows] == ["mild", "", ""]
    assert lung.manifest.read_bytes() == before[1] and lung.check().aside == 1
    # A slide is away while the slides are tiled again, and comes back.
    (project.root / "study" / "a.svs").rename(project.root / "a.svs")
    page = project.post("/p/lung/tile")
    assert "Labels of 1 slides that are not there now are kept aside" in page
    (project.root / "a.svs").rename(project.root / "study" / "a.svs")
    project.post("/p/lung/folder", folder="study")
    assert lung.manifest.read_bytes() == before[1]


def test_tiles_of_another_file_are_no_slides_of_this_folder(project: Client) -> None:
    tiled(project)
    project.label({"grade:0": "mild"})
    assert project.http.get("/p/lung/slides").text.count("/thumbnail/") == 3
    # Moved, with its time: the same slides. Then others of the same names.
    (project.root / "study").rename(project.root / "archive")
    project.post("/p/lung/folder", folder="archive")
    assert "3 of 3 slides are ready" in project.http.get("/p/lung/slides").text
    (project.root / "other").mkdir()
    for name in "ab":
        (project.root / "other" / f"{name}.svs").write_bytes(b"not it")
    project.post("/p/lung/folder", folder="other")
    project.label({"grade:0": "mild"})
    page = project.http.get("/p/lung/slides").text
    assert "0 of 2 slides are ready, 2 with a problem." in page and "of another file of this name" in page
    assert "/thumbnail/" not in page and "/previews/" not in page
    assert project.http.get("/p/lung/thumbnail/a.jpg").status_code == 404
    assert "Before training" in project.refused("/p/lung/train", preset="ridge")[1]


def test_labels_of_slides_that_moved_are_brought(project: Client) -> None:
    project.label({"grade:0": "mild", "patient_id:1": "P2"})
    (project.root / "study").rename(project.root / "archive")
    project.post("/p/lung/folder", folder="archive")
    assert graded(project) == ["", "", ""]
    assert project.bring(project.http.get("/p/lung/labels.csv?aside=1").content)[0] == 201
    assert graded(project) == ["mild", "", ""]
    assert project_of(project).check().rows[1]["patient_id"] == "P2"


def test_labels_outlive_a_root_that_is_mounted_elsewhere(
    project: Client, opened: Callable[..., Client], tmp_path: Path
) -> None:
    project.label({"grade:0": "mild", "patient_id:1": "P2"})
    before = project_of(project).manifest.read_bytes()
    project.studio.queue.close()
    project.root.rename(tmp_path / "elsewhere")
    (tmp_path / "root").symlink_to(tmp_path / "elsewhere")
    moved = opened()
    assert moved.root == tmp_path / "elsewhere"
    moved.post("/p/lung/tile")
    lung = project_of(moved)
    assert lung.check().is_valid and graded(moved) == ["mild", "", ""]
    assert lung.manifest.read_bytes() == before
    assert read_manifest(lung.manifest).rows[0].path == moved.root / "study" / "a.svs"


def test_a_table_that_contradicts_itself_is_refused_whole(project: Client) -> None:
    status, said = project.bring("slide_id,patient_id,grade\na.svs,P1,0\nb,P3,1\na,P1,2\nc,P4\n")
    assert status == 400 and "lines 2 and 4 are both of a, and differ" in said
    assert "line 5 has 2 cells, expected 3" in said and graded(project) == ["", "", ""]
    assert project.bring("slide_id,grade\na.svs,0\na,none\n")[0] == 201  # they say the same
    (project.root / "study" / "x").mkdir()
    (project.root / "study" / "x" / "a.svs").write_bytes(b"no slide")
    project.post("/p/lung/folder", folder="study")
    status, said = project.bring("slide_id,grade\na.svs,0\n")
    assert status == 400 and "line 2: a.svs may be any of" in said


def test_a_table_labels_no_slide_of_a_like_name(project: Client) -> None:
    assert project.bring("slide_id,patient_id,grade\nb.2,P9,2\nc.SVS,P3,1\n")[0] == 201
    page = project.http.get("/p/lung/labels").text
    assert "b.2 (2)" in page and graded(project) == ["", "", "mild"]


@pytest.mark.parametrize("name", ["/data/other/b.svs", "other/b", r"D:\slides\b.SVS"])
def test_a_table_may_have_paths(name: str, project: Client) -> None:
    assert project.bring(f"slide_id,grade\n{name},mild\n")[0] == 201
    assert graded(project) == ["", "mild", ""]


def test_what_a_table_does_not_give_or_takes_away_is_said(project: Client) -> None:
    project.label({"grade:0": "mild", "grade:1": "severe"})
    project.bring("slide_id,grade,Case,grade_reader1\na,,17,2\nb,severe,18,1\n")
    page = project.http.get("/p/lung/labels").text
    assert "columns of the table that are not taken: Case, grade_reader1" in page
    assert "1 slides have lost a label, since it is empty in the table: a" in page
    assert "of no slide" not in page and "read as grades" not in page
    status, said = project.bring(f"slide_id,patient_id\na,{'9' * 201}\n")
    assert status == 400 and "at most 200 letters" in said


def test_what_is_said_of_a_table_waits_for_a_page_of_its_project(project: Client) -> None:
    project.post("/projects", name="other", grades="0, 1")
    project.label({"grade:0": "mild"})
    project.bring("slide_id,grade\na,\n")
    lost = "1 slides have lost a label"
    for path in ("/p/lung/jobs?kinds=train&watch=", "/", "/p/other/labels", "/p/lung/none", "/p/none/labels"):
        assert lost not in project.http.get(path).text, path
    assert lost in project.http.get("/p/lung/train").text
    assert lost not in project.http.get("/p/lung/labels").text


def test_the_commands_of_every_preset_are_shown(project: Client) -> None:
    page = project.http.get("/p/lung/train").text
    for said in (
        "slidetl fit-features manifest.csv --cache cache",
        "slidetl fit --config runs/warm-1/training.yaml",
        "slidetl compare --config runs/compare-1/comparison.yaml",
        "slidetl.models.transfer.SharedBoth",
    ):
        assert said in page


def test_a_job_is_queued_once_and_no_more_than_twenty(project: Client) -> None:
    project.post("/p/lung/tile")
    assert project.refused("/p/lung/tile")[0] == 409
    queue = project.studio.queue
    assert queue.jobs()[0].steps[0].words[:4] == ("tile", "manifest.csv", "--cache", "cache")
    step = queue.jobs()[0].steps
    for number in range(19):
        queue.add("train", "lung", f"r{number}", step, project.root)
    assert project.refused("/p/lung/pull", name="m", **{"from": "models"})[0] == 429


def test_a_job_of_a_project_that_is_gone_can_be_stopped(project: Client) -> None:
    project.post("/projects", name="old", grades="0, 1")
    queue, root = project.studio.queue, project.root
    job = queue.add("train", "old", "ridge-1", (), root / "studio" / "old")
    record = root / "studio" / ".jobs" / job.id / "job.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "state": "running"}))
    project.post("/p/lung/tile")
    assert "behind Training ridge-1 of project old" in project.http.get("/p/lung/slides").text
    assert project.refused(f"/p/lung/jobs/{job.id}/stop", page="slides")[0] == 404
    (root / "studio" / "old").rename(root / "old")
    assert "Training ridge-1 of project old, which is gone" in project.http.get("/p/lung/slides").text
    project.post(f"/p/lung/jobs/{job.id}/stop", page="slides")
    assert queue.find(job.id).state == "stopping"
    queue.trouble = "the disk is full"
    assert "cannot be looked after now: the disk is full" in project.http.get("/p/lung/slides").text


def test_a_name_is_given_once(project: Client) -> None:
    tiled(project)
    project.label({"grade:0": "mild"})
    queue, lung = project.studio.queue, project_of(project).folder

    def trained() -> str:
        project.post("/p/lung/train", preset="ridge")
        return queue.jobs()[0].target

    assert trained() == "ridge-1"
    queue.stop(queue.jobs()[0].id)
    shutil.rmtree(lung / "runs")
    assert trained() == "ridge-2"  # there is a job of that name
    (lung / "models").mkdir()
    (lung / "models" / "ridge-3.pt").write_bytes(b"")
    assert trained() == "ridge-4"


def test_a_new_project_has_no_jobs_of_one_of_its_name(project: Client) -> None:
    project.post("/p/lung/tile")
    queue, place = project.studio.queue, project.root / "studio" / "lung"
    job = queue.jobs()[0]
    project.post("/p/lung/folder", folder="study")  # keeps its id
    assert "Stop Tiles" in project.http.get("/p/lung/slides").text
    shutil.rmtree(place)
    project.post("/projects", name="lung", grades="0, 1")
    project.post("/p/lung/folder", folder="study")
    page = project.http.get("/p/lung/slides").text
    assert "Tiles of project lung, which is gone" in page
    project.post("/p/lung/tile")  # it is another
    queue._turn()
    assert queue.find(job.id).state == "failed" and "its project is gone" in queue.find(job.id).reason
    assert not (place / "cache").exists()
    assert "which is gone" not in project.http.get("/p/lung/slides").text


@pytest.mark.parametrize(
    "place",
    ["", "/etc", "../x", "file:///x", "http://elsewhere.example", "simplecache::s3://b/x", "s3://b/../c"],
)
def test_a_library_is_below_the_root_or_a_bucket(place: str, project: Client) -> None:
    assert project.refused("/p/lung/pull", name="m", **{"from": place})[0] in (400, 403)
    assert not project.studio.queue.jobs()


def test_a_model_is_published_and_taken_by_the_commands(project: Client) -> None:
    models = project.root / "studio" / "lung" / "models"
    models.mkdir()
    (models / "ridge-1.pt").write_bytes(b"")
    about = {"description": "--trust", "intended_use": ""}
    project.post("/p/lung/publish", model="ridge-1", to="shared", name="lung-1", **about)
    project.post("/p/lung/pull", name="lung-2", **{"from": "s3://hospital/models"})
    pulled, published = project.studio.queue.jobs()
    assert published.steps[0].words == (
        *("zoo", "publish", "models/ridge-1.pt", "--to", str(project.root / "shared"), "--name", "lung-1"),
        "--description=--trust",
    )
    assert pulled.steps[0].words == ("zoo", "pull", "lung-2", "--from", "s3://hospital/models")


def test_a_project_needs_a_name_and_grades(client: Client) -> None:
    for fields in (
        {"name": "../x", "grades": "0,1"},
        {"name": ".jobs", "grades": "0,1"},
        {"name": "a", "grades": "0"},
        {"name": "a", "grades": "x,x"},
        {"name": "a", "grades": "0,1", "mpp": "-1"},
        {"name": "a", "grades": "0,1", "mpp": "nan"},
        {"name": "a", "grades": "0,1", "tile_size": "x"},
        {"name": "a", "grades": "0,1", "tile_size": "1,024"},
    ):
        assert client.refused("/projects", **fields)[0] == 400
    assert client.http.get("/p/none/slides").status_code == 404


def test_another_studio_on_the_same_folder_is_refused(client: Client, opened: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="another studio works on this folder"):
        opened()


def test_every_text_is_used(client: Client) -> None:
    from slidetl.studio import texts

    folder = Path(texts.__file__).parent
    source = "\n".join(path.read_text() for path in (*folder.glob("*.py"), *folder.glob("templates/*.html")))
    source = source.replace(Path(texts.__file__).read_text(), "")
    built = ("nav.", "labels.", "train.", "jobs.", "grade.")  # names put together in a template
    named = set(re.findall(r"[\"'](\w+\.\w+)[\"']", source))
    unused = [name for name in texts.TEXTS if name not in named and not name.startswith(built)]
    assert not unused


def write_verdict(client: Client, *more: dict[str, str], **primary: str) -> str:
    """Writes the results of a comparison, and returns its page."""
    lung = project_of(client)
    folder = lung.folder / "runs" / "compare-1"
    if not folder.exists():
        folder.mkdir(parents=True)
        client.studio.queue.add("train", "lung", "compare-1", (), lung.folder)
    row = {"section": "primary", "arm": "warm", "against": "ridge", "metric": "qwk", **primary}
    columns = ("section", "arm", "train_slides", "against", "metric", "estimate", "low", "high", "p")
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows((row, *more))
    return client.http.get("/p/lung/model?run=compare-1").text


def test_the_verdict_is_that_of_the_sign_flips(project: Client) -> None:
    page = write_verdict(project, estimate="0.1", low="0.001", high="0.2", p="0.07")
    assert "No difference is shown" in page and "warm is better." not in page
    assert "p = 0.070" in page and "+0.00 to +0.20" in page and "Declared" not in page
    page = write_verdict(project, estimate="-0.1", low="-0.2", high="0.01", p="0.03")
    assert "ridge is better." in page
    assert "warm is better." in write_verdict(project, metric="rps", estimate="-0.1", p="0.03")
    assert "p &lt; 0.001 by the test" in write_verdict(project, estimate="0.1", p="0.0001")
    for p in ("", "1", "0.01"):  # undefined, by itself or on most resamples
        page = write_verdict(project, p=p)
        assert "cannot be computed" in page and "No difference is shown" not in page
        assert "is better." not in page


def test_no_arm_is_better_than_one_that_died(project: Client) -> None:
    died = {"section": "training", "metric": "learned_nothing", "estimate": "1"}
    page = write_verdict(project, died | {"arm": "warm"}, estimate="-0.8", low="-0.9", high="-0.7", p="0.001")
    assert "same probabilities: warm." in page and "No finding" in page and "ridge is better." not in page
    smaller = died | {"arm": "ridge", "train_slides": "20"}
    page = write_verdict(project, smaller, died | {"arm": "shared"}, estimate="-0.8", p="0.001")
    assert "same probabilities: shared." in page and "ridge is better." in page


def test_slides_without_a_grade_are_named(project: Client) -> None:
    folder = project_of(project).folder / "runs" / "ridge-1"
    rows = [
        SlidePrediction(f"s{n}", f"p{n}", n % 3, tuple(float(k == n % 3) for k in range(3)), 10)
        for n in range(12)
    ]
    lost = SlidePrediction("s12", "p12", 1, (), 0, reason="no tiles")
    folder.mkdir(parents=True)
    write_predictions(folder / "predictions.csv", [*rows, lost])
    project.studio.queue.add("train", "lung", "ridge-1", (), project_of(project).folder)
    page = project.http.get("/p/lung/model?run=ridge-1").text
    assert "12 of 12 test slides" in page and "Of 1 more test slides the model gives no grade" in page
    assert "in no number here: s12" in page


@pytest.mark.parametrize("preset", ["ridge", "warm", "compare"])
def test_a_training_keeps_the_labels_of_its_moment(preset: str, project: Client) -> None:
    tiled(project)
    project.label({"grade:0": "mild", "grade:1": "severe", "patient_id:0": "P1"})
    project.post("/p/lung/train", preset=preset)
    lung = project_of(project)
    before = read_manifest(lung.manifest).rows
    words = project.studio.queue.jobs()[0].steps[-1].words
    config = lung.folder / words[2] if words[1] == "--config" else None
    text = config.read_text() if config else " ".join(words)
    place = re.search(r"\S+manifest\.csv", text)
    assert place is not None
    manifest = lung.folder / place[0]
    project.label({"grade:0": "none", "patient_id:1": "P1"})
    kept = read_manifest(manifest).rows
    said = [(row.slide_id, row.patient_id, row.grade) for row in kept]
    assert said == [("a", "P1", 1), ("b", "b", 2), ("c", "c", None)]
    assert [row.path.resolve() for row in kept] == [row.path.resolve() for row in before]
    # The command that the page shows is to be run on the present labels.
    assert "fit-features manifest.csv" in project.http.get("/p/lung/train").text


def write_run(client: Client, run: str, patients: int = 12) -> None:
    """Writes the test part of a training, as the commands do: first the project's slides, then others."""
    lung = project_of(client)
    kept = {row["slide_id"]: row for row in lung.check().rows}
    grades = [n % 3 for n in range(patients)]
    names = [*"abc", *(f"s{n}" for n in range(3, patients))]
    rows = [
        SlidePrediction(
            name,
            kept.get(name, {}).get("patient_id", name),
            grade,
            tuple(float(k == grade) for k in range(3)),
            10,
        )
        for name, grade in zip(names, grades, strict=True)
    ]
    folder = lung.folder / "runs" / run
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "ridge.ckpt").write_bytes(b"")
    write_predictions(folder / "predictions.csv", rows)


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("change", [{"patient_id:1": "a"}, {"grade:2": "none"}])
def test_results_of_other_labels_say_so_and_are_no_evidence(
    change: dict[str, str], has_manifest: bool, project: Client
) -> None:
    tiled(project)
    project.label({"grade:0": "none", "grade:1": "mild", "grade:2": "severe", "patient_id:2": "'=c"})
    project.post("/p/lung/train", preset="ridge")
    write_run(project, "ridge-1")
    if not has_manifest:  # of an older studio
        (project_of(project).folder / "runs" / "ridge-1" / "manifest.csv").unlink()
    page = "/p/lung/model?run=ridge-1"
    assert "another patient or grade" not in project.http.get(page).text
    project.post("/p/lung/export", run="ridge-1")
    assert "--evidence" in project.studio.queue.jobs()[0].steps[0].words
    project.studio.queue.stop(project.studio.queue.jobs()[0].id)
    project.label(change)
    text = project.http.get(page).text
    slide = "bc"["grade:2" in change]
    assert f"1 slides have another patient or grade now than in this training: {slide}." in text
    assert "12 of 12 test slides" in text and "carries no evidence" in text
    project.post("/p/lung/export", run="ridge-1")
    assert "--evidence" not in project.studio.queue.jobs()[0].steps[0].words


def test_a_patient_of_the_training_part_counts_too(project: Client) -> None:
    tiled(project)
    project.label({"grade:0": "none", "grade:1": "mild"})
    project.post("/p/lung/train", preset="compare")
    write_verdict(project, estimate="0.1", p="0.5")
    assert "now than in this training" not in project.http.get("/p/lung/model").text
    project.label({"patient_id:0": "b", "patient_id:2": "b"})  # c had no grade, and was not trained on
    assert "1 slides have another patient or grade now" in project.http.get("/p/lung/model").text


def test_sets_of_grades_have_the_names_of_the_model(project: Client) -> None:
    lung = project_of(project)
    model, output = lung.folder / "models" / "m.pt", lung.folder / "grades" / "grades-1"

    def export(*grades: str) -> None:
        model.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(model, "w") as archive:
            archive.writestr(f"m/extra/{METADATA}", replace(CARD, grades=grades).to_json())

    results: list[dict[str, Any]] = [
        {"slide": f"/x/{name}.svs", "grade": grade, "grade_name": str(grade + 1), "grade_set": grade_set,
         "probabilities": [0.2, 0.6, 0.2], "tiles_unreadable": lost, "novelty": novelty, "notes": notes,
         "mpp_level0": mpp}
        for name, grade, grade_set, lost, novelty, notes, mpp in (
            ("a", 1, [1, 2], 3, 0.83, ["<b>no spacing"], 0.25),
            ("b", 0, [0, 0], 0, None, [], 0.25),
            ("c", 2, None, 0, 1.004, [], 4.0),
        )
    ]  # fmt: skip
    export("1", "2", "3")
    project.studio.queue.add("grade", "lung", "grades-1", (Step(("grade", "models/m.pt")),), lung.folder)
    graded = [GradeRow(Path(one["slide"]), GRADED, one) for one in results]
    failed = GradeRow(Path("/x/d.svs"), FAILED, {}, "is away")
    of_one_name = GradeRow(Path("/y/a.svs"), FAILED, {}, "is away too")
    write_results(output / "results.csv", [*graded, failed, of_one_name], 3)
    earlier = {**results[0], "slide": "/x/d.svs"}
    for one in (*results, earlier):
        (output / f"{Path(one['slide']).stem}.json").write_text(json.dumps(one))

    def rows() -> list[str]:
        page = project.http.get("/p/lung/grade").text
        return re.findall(r"<tr>(.*?)</tr>", page.partition('class="results"')[2], re.DOTALL)[1:]

    a, b, c, d, other = rows()
    assert "x/a.svs" in a and "y/a.svs" in other and "x/b.svs" not in b
    assert "is away" in d and "no spacing" not in d and "novelty" not in d
    assert "<b>2</b>" in a and "<td>2 to 3</td>" in a and "<td>1</td>" in b and "<td>–</td>" in c
    assert "&lt;b&gt;no spacing" in a and "3 tiles could not be read" in a and "novelty 0.83" in a
    assert "doubt" not in b and "novelty" not in b and "novelty 1.004" in c
    assert "4 um per pixel is far from the median" in c
    export("none", "mild", "severe")  # another model under its name
    assert "see its page" in rows()[0] and "mild" not in rows()[0]


def test_a_perfect_test_part_is_no_certainty(tmp_path: Path) -> None:
    rows = [SlidePrediction(f"s{n}", f"p{n}", n % 2, (1.0 - n % 2, float(n % 2)), 10, "") for n in range(20)]
    write_predictions(tmp_path / "predictions.csv", rows)
    judged = judge(tmp_path, 2, 0.1)
    assert judged is not None and judged.qwk is not None
    exact = binomtest(20, 20).proportion_ci(0.95, "exact")
    assert (judged.accuracy.low, judged.accuracy.high) == pytest.approx((exact.low, exact.high))
    write_predictions(tmp_path / "predictions.csv", rows[:1])
    alone = judge(tmp_path, 2, 0.1)
    assert alone is not None and alone.qwk is None and alone.accuracy.low < 0.1
