from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from slidetl.analysis import index as module
from slidetl.analysis.index import Index, build_index, open_index
from slidetl.analysis.neighbours import best_of, concept, cosines
from slidetl.errors import CacheCorruptError, OutputError, UsageError

GROUP = np.repeat(np.arange(40), 100)
OWNER = GROUP // 2


def clustered(seed: int = 0) -> NDArray[np.float16]:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((60, 32))
    return (centres[rng.integers(0, 60, 4000)] + 0.6 * rng.standard_normal((4000, 32))).astype(np.float16)


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float16]:
    return clustered()


@pytest.fixture(scope="module")
def built(rows: NDArray[np.float16]) -> Index:
    return build_index([rows[:1500], rows[1500:]], GROUP, OWNER, 3)


def test_the_recall_it_tells_is_that_of_other_queries(rows: NDArray[np.float16], built: Index) -> None:
    queries = np.arange(7, 4000, 40)
    similarity = cosines(rows[queries], [rows])
    shares = []
    for row, exact in zip(queries, similarity, strict=True):
        is_allowed = OWNER[row] != OWNER
        found = built.best(concept(rows[[row]]), GROUP, is_allowed, 12, 3)
        wanted = best_of(exact, GROUP, is_allowed, 12, 3)
        assert len(found) == len(np.unique(found)) == 12
        assert is_allowed[found].all()
        assert np.bincount(GROUP[found]).max() <= 3
        shares.append(np.isin(found, wanted).mean())
    assert 0.8 < np.mean(shares) < 1
    assert built.recalls[11] == pytest.approx(np.mean(shares), abs=0.06)
    assert built.checked == 64


def test_a_place_that_cannot_be_written_is_said_before_the_index_is_built(
    rows: NDArray[np.float16], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    with pytest.raises(OutputError, match="cannot be written"):
        open_index(tmp_path / "file" / "i", "a", [rows], GROUP, OWNER, 3, said.append)
    assert not said


def test_an_answer_that_few_groups_fill_is_left_to_the_caller(built: Index) -> None:
    direction = np.zeros(32, np.float32)
    direction[0] = 1
    is_allowed = GROUP < 3
    assert len(built.best(direction, GROUP, is_allowed, 12, 3)) < 12
    assert not len(built.best(direction, GROUP, GROUP > 50, 12, 3))


def test_a_sample_tells_the_quantiles(rows: NDArray[np.float16], built: Index) -> None:
    direction = concept(rows[:1])
    is_allowed = OWNER != 0
    exact = cosines(direction[None], [rows])[0][is_allowed]
    told = built.sample(direction, is_allowed, 0)
    assert len(told) == len(exact)
    np.testing.assert_allclose(np.sort(told), np.sort(exact), atol=0.03)


def test_it_is_kept_rebuilt_for_other_rows_and_refused_if_damaged(
    tmp_path: Path, rows: NDArray[np.float16], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "tiles.index"
    said: list[str] = []

    def opened(identity: str, values: NDArray[Any] = rows) -> Index:
        return open_index(path, identity, [values], GROUP, OWNER, 3, said.append)

    first = opened("a")
    with monkeypatch.context() as patch:
        patch.delattr(module, "build_index")
        again = opened("a")
    assert len(said) == 1
    assert again.recalls == first.recalls
    direction, everything = concept(rows[:3]), np.ones(4000, bool)
    hits = [index.best(direction, GROUP, everything, 9).tolist() for index in (first, again)]
    assert hits[0] == hits[1]
    other = opened("b", clustered(1))
    assert "other slides or features" in said[1]
    assert other.best(direction, GROUP, everything, 9).tolist() != hits[0]
    assert sorted(file.name for file in path.parent.iterdir()) == ["tiles.index", "tiles.index.slidetl.json"]

    content, about = path.read_bytes(), path.with_name("tiles.index.slidetl.json")
    record = json.loads(about.read_text())
    path.write_bytes(content[:-100] + bytes(100))
    with pytest.raises(
        CacheCorruptError, match=r"not the file that tiles.index.slidetl.json is about.*remove it"
    ):
        opened("b")
    path.write_bytes(content)
    wrongs: list[Any] = [[], {}, {**record, "recalls": [1.5]}, {**record, "checked": 1e999}]
    for wrong in wrongs:
        about.write_text(json.dumps(wrong))
        with pytest.raises(CacheCorruptError, match="remove it and"):
            opened("b")
    about.unlink()
    with pytest.raises(CacheCorruptError, match="name another file"):
        opened("b")
    assert path.read_bytes() == content


def test_one_owner_other_rows_and_a_missing_package_are_refused(
    rows: NDArray[np.float16], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="at least two patients"):
        build_index([rows], GROUP, np.zeros(4000, int), 3)
    with pytest.raises(UsageError, match="expected 4000 rows to index, found 3000"):
        build_index([rows[:3000]], GROUP, OWNER, 3)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match=r"pip install 'slidetl\[atlas\]'"):
        build_index([rows], GROUP, OWNER, 3)
