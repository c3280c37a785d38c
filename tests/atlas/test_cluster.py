from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from slidetl.atlas.cluster import Pattern, find_patterns, store_clusters
from slidetl.atlas.cluster_page import _bounds, _say_grade, _say_site, _sheet
from slidetl.atlas.collection import Collection, open_collection
from slidetl.atlas.options import ClusterOptions, Selection
from slidetl.cli import main
from slidetl.errors import UsageError
from slidetl.evaluation.bootstrap import Interval
from slidetl.evaluation.classical import pool_tiles
from slidetl.evaluation.composition import SiteShare, grade_correlation, site_share
from slidetl.tiles.features import read_features
from tests.atlas.conftest import patterns
from tests.conftest import Study
from tests.small import small_embed


@pytest.mark.parametrize(
    "options",
    [
        ClusterOptions("mean-shift", components=6, bandwidth=0.6),
        ClusterOptions("k-means", components=6, clusters=4),
        ClusterOptions("hdbscan", components=6),
    ],
)
def test_each_method_finds_the_drawn_patterns(collection: Collection, options: ClusterOptions) -> None:
    atlas = find_patterns(collection, options)
    assert adjusted_rand_score(patterns(collection), atlas.clusters.labels) > 0.95
    np.testing.assert_allclose(atlas.composition.sum(1) + 0, 1, atol=0.05)
    sizes = [pattern.tiles for pattern in atlas.patterns]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) + atlas.unclustered == len(collection)


def test_the_pattern_that_grows_with_the_grade_is_told_from_the_others(collection: Collection) -> None:
    atlas = find_patterns(collection, ClusterOptions(bandwidth=0.6, components=6))
    drawn = patterns(collection)
    severe = int(np.bincount(atlas.clusters.labels[drawn == 3]).argmax())
    for number, pattern in enumerate(atlas.patterns):
        assert isinstance(pattern.grade, Interval)
        if number == severe:
            assert pattern.grade.low > 0.8
            assert pattern.by_grade[4] > pattern.by_grade[1] > pattern.by_grade[0] == 0
        else:
            assert pattern.grade.low < 0.3
    assert atlas.confounding is not None


def test_few_patients_find_nothing_and_a_point_is_no_interval() -> None:
    def said(n: int) -> list[str]:
        """The sentences of a pattern of n patients at each of two sites, all of it at A and of grade 1."""
        shares, second, who = [0.3] * n + [0.0] * n, [1] * n + [0] * n, range(2 * n)
        site = site_share(shares, ["A"] * n + ["B"] * n, who, n_draws=200)
        pattern = Pattern(1, 1.0, n, n, site, grade_correlation(shares, second, who, n_draws=200), {}, {})
        found = [_say_site(pattern), _say_grade(pattern)]
        return [f"{each['stands_out']} {each['text']}" for each in found if each is not None]

    site, grade = said(2)
    assert site.startswith("False Most at A: 100% of it") and "too few patients" in site
    assert grade.startswith("False Rank correlation with the grade +1.00; too few patients")
    site, grade = said(5)
    assert site.startswith("True Most at A: 100% (no interval) of it")  # told by its p
    assert _bounds("share", Interval(1.0, 1 - 1e-16, 1.0, 0.95)) == {"share": 1.0}  # but for rounding
    assert grade == "False Rank correlation with the grade +1.00 (no interval)."


def test_a_site_stands_out_by_its_p_and_not_by_the_interval_of_the_greatest() -> None:
    share = Interval(0.4, 0.3, 0.5, 0.95)
    patterns = [Pattern(1, 1.0, 9, 9, SiteShare("A", share, 0.125, p), None, {}, {}) for p in (0.2, 0.01)]
    alike, differs = (_say_site(pattern) for pattern in patterns)
    assert alike is not None and differs is not None
    assert not alike["stands_out"] and alike["text"].endswith("12% if sites are alike (p 0.200).")
    assert differs["stands_out"] and "(p 0.010). It differs between sites" in differs["text"]


def test_an_approximate_run_is_checked_against_an_exact_one(collection: Collection) -> None:
    few = find_patterns(collection, ClusterOptions(bandwidth=0.6, components=6, neighbours=3, least=2))
    assert few.check is not None
    assert few.check.exact == 4
    assert few.check.cut > 0.9
    assert find_patterns(collection, ClusterOptions(bandwidth=0.6)).check is None


def test_contact_sheets_mix_patients_as_the_cluster_does(collection: Collection) -> None:
    slide = collection.slide_of
    labels = np.where((slide == 0) | ((slide == 1) & (np.arange(len(slide)) % 3 == 0)), 0, 1)
    tiles = _sheet(collection, labels, 0, np.random.default_rng(0))
    assert len(set(tiles)) == 12
    share = (slide[labels == 0] == 0).mean()
    assert (slide[tiles] == 0).mean() == pytest.approx(share, abs=1 / 12)
    assert (
        len(_sheet(collection, np.where(np.arange(len(slide)) < 5, 0, 1), 0, np.random.default_rng(0))) == 5
    )


def test_stored_clusters_are_features_whose_mean_is_the_composition(
    patterned: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(patterned.cache, folder)
    collection = open_collection(Selection(folder, "told", patterned.manifest))
    atlas = find_patterns(collection, ClusterOptions(bandwidth=0.6, components=6))
    store_clusters(collection, atlas.clusters, "patterns")
    for slide, shares in zip(collection.slides, atlas.composition, strict=True):
        rows = read_features(slide.cache, "patterns").astype(np.float64)
        np.testing.assert_allclose(pool_tiles(rows, "mean", 1), shares)
    with pytest.raises(UsageError, match="features of this name, of net"):
        store_clusters(collection, atlas.clusters, "told")
    words = ["fit-features", str(patterned.manifest), "--cache", str(folder), "--features", "patterns"]
    assert main([*words, "--output", str(tmp_path / "fit"), "--test-fraction", "0.34"]) == 0
    assert json.loads((tmp_path / "fit" / "metrics.json").read_text())["qwk"] > 0.7
    written: list[object] = []
    monkeypatch.setattr("slidetl.atlas.cluster.write_features", lambda cache, arrays: written.append(cache))
    store_clusters(collection, atlas.clusters, "patterns")  # replaces its own
    assert len(written) == 20


def test_what_cannot_be_written_is_said_before_the_work(
    patterned: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("the work began")

    for name in ("cluster.find_patterns", "similar.find_similar"):
        monkeypatch.setattr(f"slidetl.atlas.{name}", work)
    monkeypatch.setattr("slidetl.training.similarity.embed_layers", work)
    (tmp_path / "file").touch()
    told = [str(patterned.cache), "--features", "told", "--output"]
    below = str(tmp_path / "file" / "out")
    networks = ["--before", "pretrained", "--after", "random", *small_embed()]
    for words in (
        ["atlas", "cluster", *told, below],
        ["atlas", "similar", *told, below, "--tile", "slide-00@256,256"],
        ["similarity", *networks, "--data", str(patterned.cache), "--output", below],
    ):
        assert main(words) == 2
        assert re.search(r"out/\w+\.(html|csv): cannot be written", capsys.readouterr().err)
    words = ["atlas", "cluster", *told, str(tmp_path / "out"), "--store"]
    assert main([*words, "told"]) == 2
    assert "has features of this name, of net; choose another name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("os.access", lambda *_, **__: False)  # the tests may be run by root
    assert main([*words, "patterns"]) == 2
    assert "this user may not write there" in capsys.readouterr().err


def test_the_command_writes_one_page_tables_and_maps(
    patterned: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["atlas", "cluster", str(patterned.cache), "--features", "told", "--output", str(tmp_path)]
    words += ["--components", "6"]
    assert main([*words, "--bandwidth", "0.6", "--manifest", str(patterned.manifest)]) == 0
    assert "4 clusters" in capsys.readouterr().out
    page = (tmp_path / "atlas.html").read_text()
    assert "It grows with the grade" in page
    with (tmp_path / "clusters.csv").open() as file:
        clusters = list(csv.DictReader(file))
    with (tmp_path / "composition.csv").open() as file:
        slides = list(csv.DictReader(file))
    assert [row["cluster"] for row in clusters] == ["1", "2", "3", "4"]
    assert len(slides) == 20
    assert sum(float(slides[3][f"cluster_{n}"]) for n in range(1, 5)) == pytest.approx(1)
    maps = sorted((tmp_path / "geojson").glob("*.geojson"))
    assert len(maps) == 20
    features = json.loads(maps[0].read_text())["features"]
    assert len(features) == int(slides[0]["tiles"])
    assert features[0]["properties"]["classification"]["name"].startswith("Cluster ")
    assert main([*words, "--slides", slides[0]["slide_id"], "--method", "k-means", "--clusters", "999"]) == 2
    assert "1 to" in capsys.readouterr().err


def test_a_slide_that_is_not_at_hand_has_no_map_and_the_page_says_so(
    patterned: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slidetl.atlas.cluster_page._viewer", lambda slide: None)
    words = ["atlas", "cluster", str(patterned.cache), "--features", "told", "--output", str(tmp_path)]
    assert main([*words, "--method", "k-means", "--clusters", "4", "--slides", "slide-00", "slide-01"]) == 0
    assert "no GeoJSON for 2 slides" in capsys.readouterr().err
    page = (tmp_path / "atlas.html").read_text()
    assert "No GeoJSON for 2 slides" in page
    assert "each slide counts as a patient of its own" in page
    assert not (tmp_path / "geojson").exists()


def test_maps_of_an_earlier_clustering_are_gone_and_other_files_stay(
    patterned: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["atlas", "cluster", str(patterned.cache), "--features", "told", "--output", str(tmp_path)]
    words += ["--method", "k-means", "--clusters", "4", "--slides"]
    maps = tmp_path / "geojson"
    assert main([*words, "slide-00", "slide-01"]) == 0
    of_qupath = '{"type":"FeatureCollection","features":[{"type":"Feature"}]}'
    (maps / "mine.geojson").write_text(of_qupath)
    (maps / "notes.txt").write_text("mine")
    assert main([*words, "slide-02", "slide-01"]) == 0
    kept = {"mine.geojson", "notes.txt"}
    assert {path.name for path in maps.iterdir()} == {"slide-01.geojson", "slide-02.geojson", *kept}
    assert (maps / "mine.geojson").read_text() == of_qupath
    monkeypatch.setattr("slidetl.atlas.cluster_page._viewer", lambda slide: None)
    assert main([*words, "slide-01", "slide-02"]) == 0
    assert {path.name for path in maps.iterdir()} == kept
