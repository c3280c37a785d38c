from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetl.grading.batch import output_names
from slidetl.tiles.identifier import clash_key


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


def test_names_replace_neither_results_of_another_slide_nor_a_slide(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, slide in (("x", tmp_path / "a" / "x.svs"), ("y", tmp_path / "b" / "y.svs")):
        (out / f"{name}.json").write_text(json.dumps({"slide": str(slide)}))
    (out / "z.json").write_text('{"annotations": "of another program"}')
    (out / "u.json").write_text(json.dumps({"slide": "u.svs"}))  # of an earlier version, in any folder
    (out / "v.geojson").write_text("{}")
    (out / "w.html").write_text("<title>of somebody else</title>")
    (out / "t.png").write_bytes(b"\x89PNG of somebody else")
    paths = [tmp_path / "b" / f"{name}.svs" for name in "xyzuvwt"]
    with pytest.warns(UserWarning, match=r"files of 6 slides are named otherwise.*b/x.svs is b_x.svs.json"):
        names = output_names(paths, out)
    assert list(names.values()) == ["b_x.svs", "y", *(f"b_{name}.svs" for name in "zuvwt")]
    (tmp_path / "link").symlink_to(out)
    with pytest.warns(UserWarning, match="named otherwise"):
        assert output_names([tmp_path / "link" / "p.png"], out) == {tmp_path / "link" / "p.png": "link_p.png"}


def test_many_slides_of_one_name_are_named_in_passing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / str(number) / "a" / "x.svs" for number in range(300)]
    asked: list[str] = []

    def key(name: str) -> str:
        asked.append(name)
        return clash_key(name)

    monkeypatch.setattr("slidetl.grading.batch.clash_key", key)
    names = output_names(paths)
    assert list(names.values())[:3] == ["x", "a_x.svs", "a_x.svs_2"] and len(set(names.values())) == 300
    assert len(asked) < 20 * len(paths)
    few = paths[:20]  # results of an earlier run keep their names in any order
    for path in few:
        path.parent.mkdir(parents=True)
        path.touch()
        (tmp_path / f"{names[path]}.json").write_text(json.dumps({"slide": str(path)}))
    with pytest.warns(UserWarning, match="named otherwise"):
        assert output_names(few[::-1], tmp_path) == {path: names[path] for path in few}


@pytest.mark.slow
@given(st.lists(st.text(alphabet="aA_2./ é-", min_size=1, max_size=8).map(Path), max_size=12))
def test_no_slide_overwrites_another(paths: list[Path]) -> None:
    names = output_names(paths)
    assert set(names) == set(paths)
    assert len({name.lower() for name in names.values()}) == len(names)
    assert all(name and "/" not in name and not name.startswith(".") for name in names.values())
