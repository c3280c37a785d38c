from __future__ import annotations

import csv
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slidetl.atlas.collection import Collection, open_collection
from slidetl.atlas.options import Selection, SimilarOptions
from slidetl.atlas.similar import find_similar
from slidetl.cli import main
from slidetl.errors import CacheCorruptError, CacheMismatchError, CacheMissingError, UsageError, WeightsError
from slidetl.tiles.features import read_features, write_features
from slidetl.training.embed import embed_cache
from slidetl.training.options import EmbedOptions
from tests.atlas.conftest import patterns
from tests.conftest import Study
from tests.small import small_spec, small_weights


def name_of(collection: Collection, tile: int) -> str:
    slide, number = collection.place(tile)
    x, y = slide.cache.origins_level0[number].tolist()
    return f"{slide.row.slide_id}@{x},{y}"


def test_hits_have_the_pattern_of_other_patients_and_few_of_a_slide(collection: Collection) -> None:
    truth = patterns(collection)
    for tile in (0, len(collection) // 2, len(collection) - 1):
        found = find_similar(collection, SimilarOptions((name_of(collection, tile),), count=10, most_each=2))
        assert found.examples == (tile,)
        assert (truth[found.hits] == truth[tile]).all()
        slides = collection.slide_of[found.hits]
        assert np.bincount(slides).max() <= 2
        own = collection.slide_of[tile]
        assert collection.patients[own] not in collection.patients[slides]
        assert found.left_out == (collection.patients[own],)
        assert (np.diff(found.distances) >= 0).all()
        assert found.distances[-1] < found.quantiles[2]
        assert 1 <= found.random_rank <= found.searched


def test_features_of_another_network_in_the_middle_are_refused(patterned: Study, tmp_path: Path) -> None:
    shutil.copytree(patterned.cache, tmp_path / "cache")
    collection = open_collection(Selection(tmp_path / "cache", "told", patterned.manifest))
    read = iter(collection)
    first = next(read)
    options = SimilarOptions((name_of(collection, len(first)),))  # of the second slide
    cache = collection.slides[1].cache
    other = replace(collection.source, weights_sha256="b" * 64)
    write_features(cache, {"told": (other, read_features(cache, "told"))})
    with pytest.raises(CacheMismatchError, match="store them under another --name"):
        next(read)
    with pytest.raises(CacheMismatchError, match="store them under another --name"):
        find_similar(collection, options)


def test_the_same_patient_is_searched_on_request_but_never_the_example(collection: Collection) -> None:
    options = SimilarOptions((name_of(collection, 0),), count=10**6, most_each=10**6, same_patient=True)
    found = find_similar(collection, options)
    assert sorted(found.hits.tolist()) == list(range(1, len(collection)))


def test_concepts_add_and_subtract(collection: Collection) -> None:
    truth = patterns(collection)
    first = [int(np.flatnonzero(truth == pattern)[0]) for pattern in range(3)]
    names = [name_of(collection, tile) for tile in first]
    both = find_similar(collection, SimilarOptions((names[0], names[1]), count=20))
    assert set(truth[both.hits].tolist()) == {0, 1}
    less = find_similar(collection, SimilarOptions((names[0], names[1]), (names[1],), count=20))
    assert set(truth[less.hits].tolist()) == {0}


def test_a_point_within_a_tile_names_it_and_others_are_refused(collection: Collection) -> None:
    slide, _ = collection.place(0)
    x, y = slide.cache.origins_level0[0].tolist()
    slide_id = slide.row.slide_id
    assert collection.find(f"{slide_id}@{x},{y}") == 0
    assert collection.find(f"{slide_id}@{x + slide.cache.extent_level0[0] - 0.5:.1f}, {y + 1}") == 0
    with pytest.raises(UsageError, match=r"no tile of .* the nearest is"):
        collection.find(f"{slide_id}@-900,-900")
    with pytest.raises(UsageError, match="no slide 'nobody' here; there are"):
        collection.find("nobody@1,2")
    for name in ("nobody", f"{slide_id}@1", f"{slide_id}@a,b", "@1,2"):
        with pytest.raises(UsageError, match="must be SLIDE@x,y"):
            collection.find(name)


def test_one_patient_only_is_refused(collection: Collection) -> None:
    slides = tuple(
        slide for slide in collection.slides if slide.row.slide_id == collection.slides[0].row.slide_id
    )
    one = Collection(slides, collection.features, collection.source, True)
    with pytest.raises(UsageError, match=r"no tile is left to search.*--same-patient"):
        find_similar(one, SimilarOptions((name_of(one, 0),)))


def test_missing_features_name_those_that_exist_and_nan_is_refused(
    patterned: Study, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CacheMissingError, match="there are: told"):
        open_collection(Selection(patterned.cache, "untold", patterned.manifest))
    with pytest.raises(UsageError, match="not in the manifest"):
        open_collection(Selection(patterned.cache, "told", patterned.manifest, ("nobody",)))
    rows = next(iter(collection))
    rows[3, 1] = np.nan
    monkeypatch.setattr("slidetl.atlas.collection.read_features", lambda *_, **__: rows)
    with pytest.raises(CacheCorruptError, match="those of tile 3 are not finite"):
        next(iter(collection))


def test_a_picture_of_a_tile_finds_that_tile_and_other_weights_are_refused(
    study: Study, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(study.cache, folder)
    ids = tuple(sorted(path.stem for path in folder.glob("*.zarr"))[:2])
    embed_cache(folder, small_spec(), EmbedOptions(slides=ids, device="cpu"))
    collection = open_collection(Selection(folder, "mobilenetv3_small_050", None, ids))
    slide, number = collection.place(len(collection) - 2)
    Image.fromarray(slide.cache.read([number])[0]).save(tmp_path / "tile.png")
    found = find_similar(
        collection, SimilarOptions(image=tmp_path / "tile.png", pretrained=str(small_weights()), count=1)
    )
    assert found.hits.tolist() == [len(collection) - 2]
    assert found.distances[0] < 1e-3
    Image.fromarray(slide.cache.read([number])[0][:40]).save(tmp_path / "small.png")
    with pytest.raises(UsageError, match="expected at least 64"):
        find_similar(
            collection, SimilarOptions(image=tmp_path / "small.png", pretrained=str(small_weights()))
        )


def test_a_picture_for_another_network_is_refused(collection: Collection, tmp_path: Path) -> None:
    source = type(collection.source)("mobilenetv3_small_050", "", "b" * 64, (0, 0, 0), (1, 1, 1))
    other = Collection(collection.slides, collection.features, source, True)
    Image.new("RGB", (80, 80), "pink").save(tmp_path / "picture.png")
    with pytest.raises(WeightsError, match=r"with weights bbbbbbbbbbbb.* has"):
        find_similar(other, SimilarOptions(image=tmp_path / "picture.png", pretrained=str(small_weights())))


def test_the_command_writes_a_page_and_a_table(
    patterned: Study,
    collection: Collection,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "similar"
    words = ["atlas", "similar", str(patterned.cache), "--features", "told", "--output", str(output)]
    tile = name_of(collection, 5)
    monkeypatch.setattr("slidetl.cli.atlas._MANY", len(collection))
    assert main([*words, "--manifest", str(patterned.manifest), "--tile", tile, "--count", "4"]) == 0
    page = (output / "similar.html").read_text()
    assert page.count("data:image/jpeg") == 2 * (1 + 4 + 1)
    assert f"--tile {tile} --output similar" in page
    with (output / "similar.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert all(row["site"] and row["patient"] for row in rows)
    out, err = capsys.readouterr()
    assert "random tile ranks" in out
    assert "--index" not in err
    monkeypatch.setattr("slidetl.cli.atlas._MANY", len(collection) - 1)
    assert main([*words, "--tile", tile]) == 0
    assert "--index FILE keeps an index" in capsys.readouterr().err
    assert "patients are not known" in (output / "similar.html").read_text()
    assert main([*words]) == 2


def test_an_index_is_kept_and_answers_as_the_exact_search(
    patterned: Study, collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    torch.ones(64, 64) @ torch.ones(64, 64)  # its OpenMP runs beside that of faiss
    file, output, told = tmp_path / "tiles.index", tmp_path / "similar", ""
    words = ["atlas", "similar", str(patterned.cache), "--features", "told", "--output", str(output)]
    words += ["--manifest", str(patterned.manifest), "--tile", name_of(collection, 5), "--count", "4"]
    for built in (True, False):
        assert main([*words, "--index", str(file)]) == 0
        out, err = capsys.readouterr()
        assert ("building the index" in err) is built
        assert re.search(r"it found \d+\.\d% of the exact 4 nearest tiles of other patients", out)
        told = told or out
        assert out == told
    assert "An index was searched" in (output / "similar.html").read_text()
    with (output / "similar.csv").open() as lines:
        by_index = list(csv.DictReader(lines))
    found = find_similar(collection, SimilarOptions((name_of(collection, 5),), count=4, index=file))
    exact = find_similar(collection, SimilarOptions((name_of(collection, 5),), count=4))
    assert [float(row["distance"]) for row in by_index] == pytest.approx(found.distances.tolist(), abs=1e-6)
    assert (found.distances >= exact.distances - 1e-6).all()
    patient = collection.patients[collection.slide_of]
    assert patient[5] not in patient[found.hits]
    assert found.random_distance == pytest.approx(exact.random_distance, abs=1e-6)
    assert found.quantiles == pytest.approx(exact.quantiles, abs=0.02)


def test_more_than_an_index_can_fill_is_searched_exactly(collection: Collection, tmp_path: Path) -> None:
    many = SimilarOptions((name_of(collection, 0),), count=10**6, most_each=1, index=tmp_path / "i")
    found = find_similar(collection, many)
    exact = find_similar(collection, replace(many, index=None))
    assert found.recall == ""
    assert found.hits.tolist() == exact.hits.tolist()


def test_the_identity_of_a_collection_tells_other_features_and_slides(
    patterned: Study, collection: Collection, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(patterned.cache, folder)
    copy = open_collection(Selection(folder, "told", patterned.manifest))
    assert copy.identity == collection.identity
    fewer = Collection(copy.slides[:-1], "told", copy.source, True)
    turned = Collection(copy.slides[::-1], "told", copy.source, True)
    slide = copy.slides[2].cache
    rows = read_features(slide, "told")
    rows[1, 0] += np.float16(0.01)
    write_features(slide, {"told": (copy.source, rows)})
    other = open_collection(Selection(folder, "told", patterned.manifest))
    assert len({c.identity for c in (collection, fewer, turned, other)}) == 4
