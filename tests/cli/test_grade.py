from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetl.grading.batch import output_names


def test_slides_of_one_name_get_names_of_their_own() -> None:
    paths = [Path(name) for name in ("p/x.svs", "d/a/x.svs", "e/a/x.svs", "f/a/X.svs", "p/y.svs", "p/x.svs")]
    paths += [Path("患者1.svs"), Path("q/café.svs"), Path("q/cafe\u0301.svs")]
    assert output_names(paths) == {
        Path("p/x.svs"): "x",
        Path("d/a/x.svs"): "a_x.svs",
        Path("e/a/x.svs"): "a_x.svs_2",
        Path("f/a/X.svs"): "a_X.svs_3",
        Path("p/y.svs"): "y",
        Path("患者1.svs"): "患者1",
        Path("q/café.svs"): "café",
        Path("q/cafe\u0301.svs"): "q_café.svs",
    }


@pytest.mark.slow
@given(st.lists(st.text(alphabet="aA_2./ é-", min_size=1, max_size=8).map(Path), max_size=12))
def test_no_slide_overwrites_another(paths: list[Path]) -> None:
    names = output_names(paths)
    assert set(names) == set(paths)
    assert len({name.lower() for name in names.values()}) == len(names)
    assert all(name and "/" not in name and not name.startswith(".") for name in names.values())
