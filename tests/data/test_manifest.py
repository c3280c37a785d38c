from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetl.data.manifest import read_manifest, stain_kind
from slidetl.data.tasks import Task
from slidetl.errors import ManifestError
from slidetl.files import write_csv
from slidetl.text import spelling


def write(folder: Path, text: str, slides: str = "a.svs b.svs c.svs d.svs") -> Path:
    for name in slides.split():
        (folder / name).touch()
    path = folder / "manifest.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_every_column(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "\ufeffslide_id,path,patient_id,grade,site,scanner,stain,block,mpp,split,grade_reader2,grade_reader1\n"
        "S 1,a.svs,P1,4,lab,x,he,B2,0.5,train,3,4\n"
        f"S2,{tmp_path}/b.svs,P2,,,,,,,test,,\n",
    )
    first, second = read_manifest(path, 5).rows
    assert (first.slide_id, first.path, first.patient_id, first.grade) == ("S_1", tmp_path / "a.svs", "P1", 4)
    assert (first.site, first.scanner, first.stain, first.block) == ("lab", "x", "he", "B2")
    assert (first.mpp, first.split, first.reader_grades) == (0.5, "train", (4, 3))
    assert first.readers == (1, 2)
    assert (second.path, second.grade, second.mpp) == (tmp_path / "b.svs", None, None)
    assert second.reader_grades == (None, None)


def test_reports_all_faults_together_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "slide_id,path,patient_id,grade,mpp,split\n"
        "one,a.svs,P1,0,,train\n"
        "ONE,b.svs,P2,5,,val\n"
        "two,s3://bucket/x.svs,P1,1,-1,test\n"
        "three,a.svs,,x,,\n"
        "four,c.svs,P4\n",
    )
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, 5)
    message = str(caught.value)
    for part in (
        "line 3: slide_id 'ONE' is already on line 2",
        "line 3: grade must be a whole number from 0 to 4 (empty: not graded), found '5'",
        "line 4: path must name a file that this machine sees, found 's3://bucket/x.svs'",
        "line 4: mpp must be a positive number of micrometres per pixel, found '-1'",
        "line 4: patient 'P1' is in split 'test' here and in 'train' on line 2",
        "line 5: the same file as on line 2",
        "line 5: patient_id is empty",
        "line 5: grade must be",
        "line 5: split is empty, though other lines have one",
        "line 6: expected 6 cells as in the header, found 3",
    ):
        assert part in message
    lines = [int(line.split()[1].rstrip(":")) for line in message.splitlines()[1:]]
    assert lines == sorted(lines)


def test_grade_range_follows_the_scale(tmp_path: Path) -> None:
    path = write(tmp_path, "slide_id,path,patient_id,grade\na,a.svs,P,8\n")
    assert read_manifest(path, 9).rows[0].grade == 8
    assert read_manifest(path).rows[0].grade == 8
    with pytest.raises(ManifestError, match="from 0 to 6"):
        read_manifest(path, 7)


FROM_ONE = ("1", "2", "3", "4", "5")


@pytest.mark.parametrize(
    ("scale", "cells", "read"),
    [
        (FROM_ONE, ["0", "1", "4", ""], [0, 1, 4, None]),
        (FROM_ONE, ["index 1", "Index 4", "NA"], [1, 4, None]),
        (FROM_ONE, ["", "NA"], [None, None]),
        (("0", "1", "2", "3", "4"), ["1", "4"], [1, 4]),
        (("grade 1", "grade 2", "grade 3"), ["1", "2"], [1, 2]),
        (("10", "20", "30"), ["1", "2"], [1, 2]),
        (5, ["1", "4"], [1, 4]),
    ],
)
def test_numbers_in_a_column_are_indices(
    scale: tuple[str, ...] | int, cells: list[str], read: list[int | None], tmp_path: Path
) -> None:
    path = write(tmp_path, "slide_id,path,patient_id,grade\n")
    with path.open("a") as file:
        file.writelines(f"{n},{n}.svs,{n},{cell}\n" for n, cell in enumerate(cells))
    tasks = [Task("second", "grade", scale)] if isinstance(scale, tuple) else []
    found = read_manifest(path, scale, tasks=tasks).rows
    assert [row.grade for row in found] == read
    assert [row.labels for row in found] == [(grade,) * len(tasks) for grade in read]


@pytest.mark.parametrize("column", ["grade", "grade_reader2", "second"])
def test_numbers_that_may_be_names_are_refused(column: str, tmp_path: Path) -> None:
    """Before, all grades of a hospital without a 5, written by their names 1 to 4, were one too high."""
    path, columns = tmp_path / "m.csv", ("slide_id", "path", "patient_id", "grade", "grade_reader2", "second")
    cells = ("index 3", "1", "4")
    rows = [{"slide_id": n, "path": n, "patient_id": n, column: cell} for n, cell in enumerate(cells)]
    write_csv(path, columns, rows)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, FROM_ONE, tasks=[Task("second", "second", FROM_ONE)])
    assert [line for line, _ in caught.value.faults] == [3, 4]
    assert (
        f"line 3: {column} 1 may be the name of a grade, or the index of grade '2', as no 0 shows that the "
        "column has indices; write 'index 0' for the name, 'index 1' for the index"
    ) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("slide_id,path,patient_id,grade\n", "no slides"),
        ("slide_id,path,grade\na,a.svs,1\n", "missing column patient_id"),
        (
            "slide_id path patient_id grade\na a.svs P 1\n",
            "missing column slide_id, path, .*; found slide_id path",
        ),
        ("# cohort\nslide_id,path,patient_id,grade\n", "line 1: missing column .*; found # cohort"),
        ("slide_id,path,patient_id,grade,grade\na,a.svs,P,1,1\n", "more than once"),
        ("slide_id,path,patient_id,grade\n../,a.svs,P,1\n", "slide_id must have letters or digits"),
        ('slide_id,path,patient_id,grade\na,a.svs,P,1\n\nb,"b.svs,P,1\nc,c.svs,P,1\n', "line 4: .*quotes"),
    ],
)
def test_unusable_files_say_why(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        read_manifest(write(tmp_path, text))


def test_what_cannot_be_a_path_is_a_fault_among_others(tmp_path: Path) -> None:
    lines = [f"one,{'a' * 300}.svs,P1,1", "two,a\0.svs,P2,1", "three,,P3,1", "four,a.svs,P4,x"]
    path = write(tmp_path, "\n".join(["slide_id,path,patient_id,grade", *lines]))
    with pytest.raises(ManifestError, match="3 faults") as caught:
        read_manifest(path)
    for part in (
        r"line 3: path must name a file that this machine sees, found 'a\x00.svs'",
        "line 4: path must",
        "line 5: grade",
    ):
        assert part in str(caught.value)


def test_a_file_that_is_missing_costs_its_slide_alone(tmp_path: Path) -> None:
    paths = ["gone.svs", "sub\\b.svs", "~/c.svs", "D:\\s\\d.svs"]
    lines = [f"s{number},{path},P,1" for number, path in enumerate(paths)]
    rows = read_manifest(write(tmp_path, "\n".join([HEADER, *lines]))).rows
    assert [row.path for row in rows] == [
        tmp_path / "gone.svs",
        tmp_path / "sub" / "b.svs",
        Path.home() / "c.svs",
        tmp_path / "D:" / "s" / "d.svs",
    ]


def test_lines_are_counted_where_a_row_begins(tmp_path: Path) -> None:
    path = write(tmp_path, 'slide_id,path,patient_id,grade\na,a.svs,"P\n1",1\nb,b.svs,P2,x\n')
    with pytest.raises(ManifestError, match="line 4: grade"):
        read_manifest(path)
    path.write_text('slide_id,path,patient_id,grade\na,a.svs,"P\n1",x\n')
    with pytest.raises(ManifestError, match="line 2: grade"):
        read_manifest(path)


HEADER = "slide_id,path,patient_id,grade"


@pytest.mark.parametrize(
    "content",
    [
        f"{HEADER}\na,a.svs,Müller,2\n".encode("utf-16"),
        f"{HEADER}\na,a.svs,Müller,2\n".encode("utf-16-le"),
        f"{HEADER}\na,a.svs,Müller,2\n".encode("utf-16-be"),
        f"{HEADER}\na,a.svs,Müller,2\n".encode("utf-32"),
        f"{HEADER}\r\na,a.svs,Müller,2\r\n".encode("utf-8-sig"),
        f"{HEADER}\ra,a.svs,Müller,2\r".encode(),
        f"{HEADER};mpp\na,a.svs,Müller,2;\n".replace(",", ";").encode(),
        f"{HEADER}\na,a.svs,Müller,2\n".replace(",", "\t").encode(),
        f"{HEADER}\na,a.svs,Müller,2\n".replace(",", "|").encode(),
        f"sep=;\n{HEADER}\na,a.svs,Müller,2\n".replace(",", ";").encode(),
        f"{HEADER},,\na,a.svs,Müller,2,,\n,,,,,\n\n".encode(),
        f"{HEADER}\na,a.svs,Müller,2,,\n".encode(),
        f",{HEADER}\n0,a,a.svs,Müller,2\n".encode(),  # the index of pandas
        b'"Slide ID";" PATH";"patient-id";"Grade"\n"a";"a.svs";"M\xc3\xbcller";"2"\n',
        f"{HEADER}\na,a.svs,Müller,2.0\n".encode(),
        f'{HEADER}\na,a.svs,Müller,"2,0"\n'.encode(),
    ],
)
def test_tables_as_spreadsheets_export_them(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, "")
    path.write_bytes(content)
    (row,) = read_manifest(path, 5).rows
    assert (row.slide_id, row.path, row.patient_id, row.grade) == ("a", tmp_path / "a.svs", "Müller", 2)


@pytest.mark.filterwarnings("ignore:.*not UTF-8", "ignore:.*unknown column", "ignore:.*differ")
@given(
    start=st.sampled_from(
        [b"", HEADER.encode() + b"\n", b"sep=;\n", b"\xff\xfe", b"\xff\xfe\0\0", b"\xef\xbb\xbf"]
    ),
    rest=st.binary(max_size=60),
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32"]),
    text=st.text(alphabet='a,;\t\n\r"0.5Fé\0|', max_size=60),
)
def test_any_file_is_read_or_refused_as_a_manifest(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, rest: bytes, encoding: str, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    for data in (start + rest, f"{HEADER}\n{text}".encode(encoding), start + text.encode(encoding)):
        path.write_bytes(data)
        try:
            rows = read_manifest(path, 5).rows
        except ManifestError:
            continue
        assert all(row.slide_id and row.patient_id and row.grade in (None, 0, 1, 2, 3, 4) for row in rows)


def test_windows_1252_is_read_and_said(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(f"{HEADER}\na,a.svs,Müller,1\n".encode("cp1252"))
    with pytest.warns(UserWarning, match=r"m\.csv: not UTF-8, read as Windows-1252 \('Müller'\)"):
        assert read_manifest(path).rows[0].patient_id == "Müller"
    path.write_bytes(f"{HEADER}\na,a.svs,\x81,1\n".encode("latin-1"))
    with pytest.raises(ManifestError, match="UTF-8"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"PK\x03\x04", r"workbook \(\.xlsx"),
        (b"\xd0\xcf\x11\xe0", r"\.xls"),
        (b"\x1f\x8b", "gzip"),
        (b"%PDF-1", "PDF"),
    ],
)
def test_a_workbook_is_to_be_saved_as_csv(tmp_path: Path, start: bytes, said: str) -> None:
    (tmp_path / "m.xlsx").write_bytes(start + bytes(60))
    with pytest.raises(ManifestError, match=rf"expected a CSV, found .*{said}.*save .* as CSV"):
        read_manifest(tmp_path / "m.xlsx")


def test_cells_without_a_value(tmp_path: Path) -> None:
    path = write(tmp_path, f'{HEADER},mpp,site\na,a.svs,P,NA,nan,#N/A\nb,b.svs,P,,"0,25",x\n')
    first, second = read_manifest(path, 5).rows
    assert (first.grade, first.mpp, first.site) == (None, None, "")
    assert (second.grade, second.mpp, second.site) == (None, 0.25, "x")
    for patient, said in (
        ("NA", "patient_id is empty \\('NA'\\)"),
        ("#N/A", "patient_id is empty \\('#N/A'\\)"),
        ("#NV", "patient_id is empty \\('#NV'\\)"),
        ("1.2E+11", "rounded by a spread"),
        ("1.23e+15", "rounded by a spread"),
    ):
        path.write_text(f"{HEADER}\na,a.svs,{patient},1\n")
        with pytest.raises(ManifestError, match=said):
            read_manifest(path)


@pytest.mark.parametrize(
    "error",
    [
        *("#REF!", "#DIV/0!", "#BEZUG!", "#\u00dcBERLAUF!", "#\u00a1REF!", "#\u00bfNOMBRE?", "#DZIEL/0!"),
        *("#NEN\u00cd_K_DISPOZICI", "#\u0418\u041c\u042f?", "#HI\u00c1NYZIK", "#YOK", "Err:502", "########"),
    ],
)
def test_an_error_value_of_a_spreadsheet_is_no_text(tmp_path: Path, error: str) -> None:
    for column in ("slide_id", "path", "patient_id", "site", "scanner", "stain", "block"):
        cells = dict.fromkeys([*HEADER.split(","), "site", "scanner", "stain", "block"], "1")
        path = write(tmp_path, "\n".join([",".join(cells), ",".join((cells | {column: error}).values())]))
        with pytest.raises(ManifestError) as caught:
            read_manifest(path)
        said = f"line 2: {column} {error!r} is an error value of a spreadsheet; correct it there"
        assert said in str(caught.value)
        assert "1 fault in" in str(caught.value) or (column, error) == ("slide_id", "########")


def test_missing_values_of_several_languages_and_names_that_begin_with_a_hash(tmp_path: Path) -> None:
    names = ["#NV", "#N/D", "#N/D!", "#N/B", "#I/T", "#\u041d/\u0414", "#12", "#P7", "# A", "#B", "#LM", "#"]
    lines = [f"s{n},{n}.svs,{n if n < 6 else name},,{name}" for n, name in enumerate(names)]
    rows = read_manifest(write(tmp_path, "\n".join([f"{HEADER},site", *lines]))).rows
    assert [row.site for row in rows] == [""] * 6 + names[6:]
    assert [row.patient_id for row in rows[6:]] == names[6:]
    for column in ("slide_id", "path"):  # an identifier is made of it, and a file might have the name
        path = write(tmp_path, f"{HEADER}\n{'#NV,a.svs' if column == 'slide_id' else 'a,#NV'},P,\n")
        with pytest.raises(ManifestError, match=f"{column} '#NV' is an error value"):
            read_manifest(path)


@pytest.mark.parametrize(
    ("separator", "read", "doubtful"),
    [
        (",", {"950": 950, '"0,253"': 0.253, '"1,5"': 1.5, "12345": 12345}, '"1,050"'),
        (",", {"1.050": 1.05, "3.450": 3.45}, '"1,050"'),
        (",", {"950": 950, "0.125": 0.125, "1.250": 1.25}, '"1,050"'),
        (",", {"950": 950, "1.250": 1.25, "12345": 12345}, '"1,050"'),
        (";", {"950": 950, "0.253": 0.253, "1.5": 1.5}, "1.050"),
        (";", {"1,050": 1.05, "3,450": 3.45}, "1.050"),
        ("\t", {"950": 950, "0,253": 0.253, "1,050": 1.05}, "-1,050"),
        ("\t", {"950": 950, "0.253": 0.253, "1.050": 1.05}, "-1,050"),
        ("\t", {"950": 950, "1.0500": 1.05, "1.250": 1.25}, "1.050"),
        ("|", {"950": 950, "12.5": 12.5, "3.450": 3.45}, "1.050"),
    ],
)
def test_a_number_that_may_have_thousands_is_refused(
    tmp_path: Path, separator: str, read: dict[str, float], doubtful: str
) -> None:
    task = Task("diameter", "diameter_mm", numeric=True)

    def table(numbers: Iterable[str]) -> Path:
        lines = [f"s{n},{n}.svs,P,,{number}" for n, number in enumerate(numbers)]
        rows = [line.split(",", 4) for line in (f"{HEADER},diameter_mm", *lines)]
        return write(tmp_path, "\n".join(map(separator.join, rows)))

    def numbers(*cells: str) -> list[object]:
        return [row.labels[0] for row in read_manifest(table(cells), tasks=[task]).rows]

    assert numbers(*read) == list(read.values())
    number = -1.05 if "-" in doubtful else 1.05
    mark, other = ",." if "," in doubtful else ".,"
    for digits in ("0_253", "12_5", "1234_567", "1_0e3"):  # the mark is decimal, here and so in its column
        quote = '"' if separator == "," else ""
        decimal, contrary = (f"{quote}{digits.replace('_', one)}{quote}" for one in (mark, other))
        assert numbers(doubtful, decimal)[0] == number
        for rest in ([], ["950"], [contrary], [decimal, contrary]):
            said = r"line 2: diameter_mm '.*' may be -?1050 or -?1\.05; export"
            with pytest.raises(ManifestError, match=said):
                numbers(doubtful, *rest)


@pytest.mark.parametrize(
    ("separator", "cells", "doubtful"),
    [
        ("\t", ("950", "1.050", "3.450"), "1.050"),  # German Excel's "Text (tab delimited)"
        ("|", ("1.050", "3.450"), "1.050"),
        (",", ("950", "1.050", "3.450"), "1.050"),
        (";", ("950", "1,050", "3,450"), "1,050"),
        (",", ("0,253", "12345", "1.050"), "1.050"),
        (";", ("0.253", "12345", "1,050"), "1,050"),
        ("\t", ("0,253", "12345", "1.050"), "1.050"),
    ],
)
def test_a_mark_that_the_column_contradicts_is_refused_in_a_table_of_any_separator(
    tmp_path: Path, separator: str, cells: tuple[str, ...], doubtful: str
) -> None:
    header = [*HEADER.split(","), "diameter_mm"]
    rows = [header, *([f"s{n}", f"{n}.svs", "P", "", cell] for n, cell in enumerate(cells))]
    path = tmp_path / "manifest.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    task = Task("diameter", "diameter_mm", numeric=True)
    said = rf"diameter_mm '{doubtful}' may be 1050 or 1\.05; .*, or write {doubtful}0 if it has decimals"
    with pytest.raises(ManifestError, match=said):
        read_manifest(path, tasks=[task])


def test_a_mark_of_text_before_a_formula_is_no_part_of_it(tmp_path: Path) -> None:
    row = {"slide_id": "a", "path": "=a.svs", "patient_id": "-A", "grade": 1, "site": "'s-H"}
    write_csv(tmp_path / "m.csv", list(row), [row])
    (found,) = read_manifest(tmp_path / "m.csv").rows
    assert (found.path.name, found.patient_id, found.site) == ("=a.svs", "-A", "'s-H")


def test_text_that_a_spreadsheet_kept_as_a_formula_is_that_text(tmp_path: Path) -> None:
    path = write(tmp_path, f'{HEADER},split\na,a.svs,"=""0012""",1,train\nb,b.svs,="0013",1,train\n')
    assert [row.patient_id for row in read_manifest(path).rows] == ["0012", "0013"]
    path.write_text(f'{HEADER},split\na,a.svs,"=""0012""",1,train\nb,b.svs,0012,1,test\n')
    with pytest.raises(ManifestError, match="'0012' is in split 'test' here and in 'train' on line 2"):
        read_manifest(path)


@pytest.mark.parametrize("grade", ["F3", "Grade 3", "2.5", "-1", "3+", "1e0", "III", "5"])
def test_a_grade_is_a_number_or_refused(tmp_path: Path, grade: str) -> None:
    with pytest.raises(ManifestError, match=rf"found '{re.escape(grade)}'"):
        read_manifest(write(tmp_path, f"{HEADER}\na,a.svs,P,{grade}\n"), 5)


def test_ten_thousand_equal_faults_are_one_line(tmp_path: Path) -> None:
    lines = [f"s{n},s{n}.svs,P{n},F3" for n in range(10_000)]
    path = write(tmp_path, "\n".join([HEADER, *lines, "s1,s1.svs,P1,1"]))
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, 5)
    assert str(caught.value).splitlines()[1:] == [
        "  lines 2, 3, 4, ... (10000 in all): grade must be a whole number from 0 to 4 (empty: not graded), "
        "found 'F3'",
        "  line 10002: slide_id 's1' is already on line 3",
        "  line 10002: the same file as on line 3",
    ]


def test_unknown_column_is_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path, "slide_id,path,patient_id,grade,colour\na,a.svs,P,1,red\n")
    with pytest.warns(UserWarning, match="unknown column colour is ignored"):
        assert len(read_manifest(path)) == 1


def test_neither_file_nor_folder(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="found neither"):
        read_manifest(tmp_path / "nothing.csv")


def test_folder_lists_slides_and_makes_clashing_names_unique(tmp_path: Path) -> None:
    for name in ("x/one.svs", "y/one.svs", "y/two.v2.ndpi", "two.svs", "notes.txt", ".hidden.svs", "two.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rows = read_manifest(tmp_path).rows
    assert {row.slide_id: str(row.path.relative_to(tmp_path)) for row in rows} == {
        "x_one": "x/one.svs",
        "y_one": "y/one.svs",
        "two.v2": "y/two.v2.ndpi",
        "two.svs": "two.svs",
        "two.tif": "two.tif",
    }
    assert all(row.grade is None and row.patient_id == row.slide_id for row in rows)


def test_folder_without_slides(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ManifestError, match="no slides in this folder"):
        read_manifest(tmp_path)


def test_instances_of_a_dicom_slide_count_once(test_data: Path) -> None:
    names = [row.path.name for row in read_manifest(test_data / "slides").rows]
    assert "openslide-python-boxes_0.dcm" in names
    assert "openslide-python-boxes_1.dcm" not in names
    assert "gcp-camelyon-jpeg.dcm" in names


def images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_folders_of_images_are_labels(tmp_path: Path) -> None:
    images(tmp_path, "b/1.png", "a/1.JPG", "a/deep/2.jpeg", "c/3.bmp", "a/notes.txt", "a/.4.png")
    manifest = read_manifest(tmp_path, "cab")
    assert manifest.labels == ("a", "b", "c")
    assert {row.slide_id: row.grade for row in manifest.rows} == {"a_1": 1, "2": 1, "b_1": 2, "3": 0}
    assert all(row.patient_id == row.slide_id and not row.split for row in manifest.rows)
    with pytest.raises(ManifestError, match=r"3 labels, the scale has 2 grades.*--grades 3"):
        read_manifest(tmp_path, 2)


def test_labels_without_a_scale_are_their_numbers_and_words_are_no_grades(tmp_path: Path) -> None:
    images(tmp_path, *(f"{n}/{n}.png" for n in (10, 9, 2, "mild", "none")))
    manifest = read_manifest(tmp_path)
    assert manifest.labels == ("2", "9", "10", "mild", "none")
    grades = {row.slide_id: row.grade for row in manifest.rows}
    assert grades == {"2": 2, "9": 9, "10": 10, "mild": None, "none": None}
    # As many as a number of grades, some beyond them: their places are not known.
    assert {row.grade for row in read_manifest(tmp_path, 5).rows} == {2, None}


def test_labels_are_the_grades_of_their_names(tmp_path: Path) -> None:
    images(tmp_path, *(f"{n}/{n}.png" for n in "0124"))
    scale = ("0", "1", "2", "3", "4")
    manifest = read_manifest(tmp_path, scale)
    assert [row.grade for row in manifest.rows] == [0, 1, 2, 4] and manifest.labels == ("0", "1", "2", "4")
    for other in (("4", "3", "2", "1", "0"), ("none", "4", "2", "1", "0")):
        assert [other[row.grade or 0] for row in read_manifest(tmp_path, other).rows] == ["0", "1", "2", "4"]
    # Numbers on a scale of words, as many: by their values.
    words = read_manifest(tmp_path, ("none", "mild", "moderate", "severe"))
    assert [row.grade for row in words.rows] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("labels", "scale"),
    [
        (["None", "MILD", "Severe"], ["none", "mild", "severe"]),
        (
            ["gering", "ma\u0308\u00dfig", "stark"],
            ["gering", "m\u00e4\u00dfig", "stark"],
        ),  # as macOS writes it
        (["03", "01", "00"], ["0", "1", "2", "3"]),
        (["invalid", "valid"], ["valid", "invalid"]),
        (["test", "training"], ["training", "test"]),
    ],
)
def test_the_spelling_of_a_label_moves_no_grade(tmp_path: Path, labels: list[str], scale: list[str]) -> None:
    images(tmp_path, *(f"{name}/{name}.png" for name in labels))
    manifest = read_manifest(tmp_path, scale)
    found = {row.path.parent.name: scale[row.grade or 0] for row in manifest.rows}
    assert {name: spelling(name) for name in labels} == {a: spelling(b) for a, b in found.items()}


def test_labels_need_not_be_splits(tmp_path: Path) -> None:
    assert read_manifest(images(tmp_path, "valid/1.png", "invalid/2.png")).labels == ("invalid", "valid")


@pytest.mark.parametrize(
    ("labels", "scale"),
    [
        (["0", "1", "2", "3", "unclear"], ["0", "1", "2", "3", "4"]),
        (["1", "2", "3", "4", "5"], ["0", "1", "2", "3", "4"]),
        (["a", "b"], ["0", "1", "2"]),
        (["a", "b"], ["x", "y"]),
        (["grade 1", "grade 10", "grade 2"], ["1", "2", "10"]),
        (["1", "2", "3"], ["grade 3", "grade 2", "grade 1"]),
        (["01", "1"], ["none", "mild"]),
        (["Mild", "mild"], ["none", "mild"]),
        (["mild", "none"], ["none", "Mild", "MILD"]),
    ],
)
def test_labels_that_are_not_the_grades_are_refused(
    tmp_path: Path, labels: list[str], scale: list[str]
) -> None:
    images(tmp_path, *(f"{name}/{name}.png" for name in labels))
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path, scale)
    assert f"the labels {labels}, the grades are {scale}; rename the folders" in str(caught.value)


@pytest.mark.parametrize("name", ["valid", "Validation", "Test", "testing"])
def test_splits_of_another_spelling_are_no_labels(tmp_path: Path, name: str) -> None:
    images(tmp_path, "train/a/1.png", "train/b/2.png", f"{name}/a/3.png")
    with pytest.raises(ManifestError, match=r"which are splits; name these train, val, test"):
        read_manifest(tmp_path)


def test_folders_of_splits_hold_folders_of_labels(tmp_path: Path) -> None:
    images(tmp_path, "train/a/1.png", "train/b/2.png", "test/a/3.png")
    rows = {row.slide_id: (row.split, row.grade) for row in read_manifest(tmp_path, "ab").rows}
    assert rows == {"1": ("train", 0), "2": ("train", 1), "3": ("test", 0)}


def test_images_beside_the_folders_leave_all_without_labels(tmp_path: Path) -> None:
    manifest = read_manifest(images(tmp_path, "1.png", "a/2.png"))
    assert [row.grade for row in manifest.rows] == [None, None] and manifest.labels == ()


def test_slides_come_first_unless_images_are_asked_for(tmp_path: Path) -> None:
    images(tmp_path, "a/1.png", "a/2.tif", "b/3.png")
    with pytest.warns(UserWarning, match=r"not read here \(2: \.png 2\)"):
        assert [row.slide_id for row in read_manifest(tmp_path).rows] == ["2"]
    assert [row.slide_id for row in read_manifest(tmp_path, images=True).rows] == ["1", "2", "3"]
    with pytest.raises(ManifestError, match="no images in this folder"):
        read_manifest(images(tmp_path / "a" / "empty", "x.txt"), images=True)


def test_arrays_bring_labels_and_splits(tmp_path: Path) -> None:
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(
        tmp_path / "set.npz",
        train_images=pixels,
        train_labels=np.array([[2], [0], [1]], np.uint8),
        test_images=pixels[:1],
        test_labels=np.array([1]),
    )
    rows = read_manifest(tmp_path / "set.npz", 3).rows
    assert [(row.slide_id, row.grade, row.split) for row in rows] == [
        ("set_train_0", 2, "train"),
        ("set_train_1", 0, "train"),
        ("set_train_2", 1, "train"),
        ("set_test_0", 1, "test"),
    ]
    assert rows[1].path == tmp_path / "set.npz#train" / "1"
    with pytest.raises(ManifestError, match="3 labels, the scale has 2 grades"):
        read_manifest(tmp_path / "set.npz", 2)
    table = tmp_path / "manifest.csv"
    table.write_text("slide_id,path,patient_id,grade\na,set.npz#train/2,P,1\n")
    assert read_manifest(table).rows[0].path == tmp_path / "set.npz#train" / "2"


def test_arrays_that_are_no_labelled_images_say_why(tmp_path: Path) -> None:
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x": pixels}, "expected train_images and train_labels"),
        ({"train_images": pixels}, "train_labels"),
        ({"train_images": pixels, "train_labels": np.zeros(2, int)}, "each of 3 images"),
        ({"train_images": pixels, "train_labels": np.zeros((3, 14), int)}, "one whole number for each"),
        ({"train_images": pixels, "train_labels": np.zeros(3)}, "one whole number for each"),
        ({"train_images": pixels, "train_labels": np.array([0, -1, 0])}, "from 0 up, found -1"),
        ({"train_images": pixels[:0], "train_labels": np.zeros(0, int)}, "no images"),
    ]
    for arrays, says in cases:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ManifestError, match=says):
            read_manifest(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_text("not an archive")
    with pytest.raises(ManifestError, match=r"not an \.npz"):
        read_manifest(tmp_path / "a.npz")


def test_public_patch_sets_are_read(test_data: Path) -> None:
    crc = read_manifest(test_data / "patches" / "crc5", ("AC", "H", "S", "T", "V"))
    assert len(crc) == 1200
    assert [sum(row.grade == k for row in crc.rows) for k in range(5)] == [240] * 5
    retina = read_manifest(test_data / "ordinal" / "retinamnist.npz", 5)
    counts = {s: sum(row.split == s for row in retina.rows) for s in ("train", "val", "test")}
    assert counts == {"train": 1080, "val": 120, "test": 400}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12", "12.0"),
        ("P7", "p7"),
        ("0042", "42"),
        ("'0042", "0042"),
        ("P007", "P7"),
        ("Müller", "Mu\u0308ller"),
        ("A 1", "A\u00a01"),
        ("A1", "A 1"),
        ("P-1", "P\u20131"),
        ("42", "\uff14\uff12"),
        ("P1", "P1\u200b"),
    ],
)
def test_spellings_of_one_patient_are_told(one: str, other: str, tmp_path: Path) -> None:
    text = f"slide_id,path,patient_id,grade\ns1,a.svs,{one},1\ns2,b.svs,{other},2\ns3,c.svs,{other},2\n"
    path = write(tmp_path, text)
    with pytest.warns(UserWarning, match="may be one, spelled twice") as told:
        rows = read_manifest(path).rows
    assert len(told) == 1
    show = ascii if one == "Müller" else repr
    assert f"{show(one)} (line 2) and {show(other)} (line 3)" in str(told[0].message)
    assert rows[0].patient_id != rows[1].patient_id == rows[2].patient_id  # nobody is joined


@pytest.mark.parametrize("column", ["site", "scanner", "block"])
def test_spellings_of_one_site_scanner_or_block_are_told(column: str, tmp_path: Path) -> None:
    names = ("Berlin", "Köln", "berlin", "Ko\u0308ln", "Bonn")
    lines = [f"s{number},{number}.svs,p{number},1,{name}\n" for number, name in enumerate(names)]
    path = write(tmp_path, f"slide_id,path,patient_id,grade,{column}\n" + "".join(lines), "")
    with pytest.warns(UserWarning, match=f"{column}s that may be one, spelled twice") as told:
        read_manifest(path)
    assert len(told) == 1
    assert "'Berlin' (line 2) and 'berlin' (line 4); 'K\\xf6ln' (line 3) and 'Ko\\u0308ln' (line 5)" in str(
        told[0].message
    )


def test_different_patients_are_not_told_to_be_one(tmp_path: Path) -> None:
    names = ("1", "10", "100", "1.5", "1.05", "P1", "P10", "P-1", "Q1", "TCGA-A1")
    lines = [f"s{number},{number}.svs,{name},1\n" for number, name in enumerate(names)]
    read_manifest(write(tmp_path, "slide_id,path,patient_id,grade\n" + "".join(lines), ""))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("he", ["he", "HE", "H&E", "H & E", "H.E.", "Haematoxylin and eosin", "Hämatoxylin-Eosin"]),
        ("trichrome", ["trichrome", "Masson", "Masson's Trichrome", "Trichrom nach Masson", "Tricrómico"]),
        (
            "sirius",
            ["sirius", "Sirius red", "Picro-Sirius Red", "PSR", "Picrosirius, haematoxylin and eosin"],
        ),
        ("", ["", "reticulin", "Giemsa", "CD8", "the", "PAS"]),
    ],
)
def test_stains_are_known_by_their_usual_names(kind: str, names: list[str]) -> None:
    assert [stain_kind(name) for name in names] == [kind] * len(names)
