from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetl.text import csv_cell, cut_names, plain_cell, short_names, with_digits


@given(st.text(st.characters() | st.sampled_from(" '=+-@1"), max_size=6).filter(str.isprintable))
def test_a_cell_is_no_formula_and_reads_back(text: str) -> None:
    cell = csv_cell(text)
    assert plain_cell(cell) == text
    if cell.lstrip().startswith(("=", "+", "-", "@")):
        float(cell)  # a number is none


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("'=1+1", "=1+1"),
        ("' =1+1", " =1+1"),
        ("'-5", "-5"),  # in ledgers of earlier versions, and so are the next two
        ("''s-Hertogenbosch", "'s-Hertogenbosch"),
        (" =1+1", " =1+1"),
        ("'s-Hertogenbosch", "'s-Hertogenbosch"),  # in their other tables
    ],
)
def test_cells_of_earlier_versions_read_back(cell: str, text: str) -> None:
    assert plain_cell(cell) == text


@pytest.mark.parametrize(
    ("form", "limit", "value", "said"),
    [
        (".3g", 1, 1.4, "1.4"),
        (".3g", 1, 1.004, "1.004"),
        (".2f", 1, 1.004, "1.004"),
        (".2f", 1, 0.99996, "0.99996"),
        (".2f", 1, 1.0000001, "1.0000001"),
        (".2f", 1, 1.0, "1.00"),
        (".3g", 0.5004, 0.4996, "0.4996"),
        ("+.2f", 0, -0.0004, "-0.0004"),
    ],
)
def test_a_value_does_not_look_like_a_limit_that_it_is_not(
    form: str, limit: float, value: float, said: str
) -> None:
    assert format(value, with_digits(form, limit, value)) == said


def test_paths_of_one_name_are_shortened_to_what_tells_them_apart() -> None:
    paths = ["/s/a/S1.png", "/s/b/S1.png", "/s/b/S2.png", "P1/ct/SE1", "P2/ct/SE1", "imagenet", "/s/b/S2.png"]
    short = ["a/S1.png", "b/S1.png", "S2.png", "P1/ct/SE1", "P2/ct/SE1", "imagenet"]
    assert short_names(paths) == dict(zip(paths, short, strict=False))
    assert short_names(map(Path, paths)) == dict(zip(map(Path, paths), short, strict=False))
    assert short_names(["a.svs", "./a.svs", "/a.svs", ""]) == {
        "a.svs": "a.svs",
        "./a.svs": "a.svs",
        "/a.svs": "/a.svs",
        "": ".",
    }


@pytest.mark.parametrize(
    ("names", "most", "short"),
    [
        (["none", "moderate"], 8, ["none", "moderate"]),
        (["ISUP group 1", "ISUP group 2"], 8, ["ISU…up 1", "ISU…up 2"]),
        (["warm-shared-all-of-it", "warm-thawed-all-of-it"], 8, ["warm-s…t", "warm-t…t"]),
        (["12345", "abcde"], 4, ["1…45", "a…de"]),
        (["abcdefgh", "xbcdefgh", "abcdxfgh"], 3, ["a…efgh", "x…efgh", "a…xfgh"]),  # no three letters do
        (["ab", "ab"], 2, ["ab"]),
        ([], 8, []),
    ],
)
def test_shortened_names_stay_different(names: list[str], most: int, short: list[str]) -> None:
    assert cut_names(names, most) == dict(zip(dict.fromkeys(names), short, strict=True))


@given(st.lists(st.text("ab", max_size=12), unique=True), st.integers(1, 12))
def test_any_names_are_shortened_to_as_many(names: list[str], most: int) -> None:
    short = cut_names(names, most)
    assert list(short) == names and len(set(short.values())) == len(names)
    assert all(short[name] == name for name in names if len(name) <= most)
