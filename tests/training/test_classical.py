from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import cohen_kappa_score

from slidetl.cli import main
from slidetl.data.manifest import read_manifest
from slidetl.data.splits import split_patients
from slidetl.errors import CacheMismatchError, CacheMissingError, UsageError
from slidetl.evaluation.calibration import judged_probabilities
from slidetl.evaluation.classical import ClassicalModel, fit_grader, pool_tiles
from slidetl.publish.model_file import load_model
from slidetl.tiles.features import FeatureSource, read_features, write_features
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.training import classical
from slidetl.training.checkpoint import load_grader
from slidetl.training.classical import fit_pooled
from slidetl.training.options import FeatureStudy
from slidetl.training.predictions import read_predictions
from tests.conftest import Study
from tests.small import SMALL, small_embed, small_weights

WEIGHTS = "a" * 64


@pytest.fixture
def stored(study: Study, tmp_path: Path) -> Study:
    """The study with made-up features: 'told' has the grade in its tiles, 'noise' has not."""
    shutil.copytree(study.cache, tmp_path / "cache")
    rng = np.random.default_rng(0)
    for row in read_manifest(study.manifest).rows:
        cache = SlideCache.open(cache_path(tmp_path / "cache", row.slide_id))
        noise = rng.normal(size=(len(cache), 6)).astype(np.float16)
        told = noise.copy()
        told[:, 2] += 3 * (row.grade or 0)
        sources = [FeatureSource("net", "", WEIGHTS, (0, 0, 0), (1, 1, 1))] * 2
        write_features(
            cache, dict(zip(("told", "noise"), zip(sources, (told, noise), strict=True), strict=True))
        )
    return Study(study.manifest, tmp_path / "cache")


def words(stored: Study, output: Path, *more: str) -> list[str]:
    return [
        "fit-features",
        str(stored.manifest),
        "--cache",
        str(stored.cache),
        "--output",
        str(output),
        "--test-fraction",
        "0.34",
        *more,
    ]


def test_classical_graders_load_no_torch() -> None:
    program = (
        "import sys\nimport slidetl.training.classical\n"
        "loaded = {'torch', 'pytorch_lightning', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("made", [True, False], ids=["made", "imported"])
def test_features_of_another_network_in_the_middle_are_refused(
    stored: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    caches = [SlideCache.open(path) for path in sorted(stored.cache.glob("*.zarr"))]

    def store(network: str) -> None:
        source = FeatureSource(network, "", network * 64 if made else "", (0, 0, 0), (1, 1, 1))
        for cache in caches:
            write_features(cache, {"told": (source, read_features(cache, "told"))})

    store("a")
    steps = iter(("a", "b"))
    monkeypatch.setattr(classical, "show_stage", lambda *_: store(next(steps)))  # before each slide
    study = FeatureStudy(stored.manifest, stored.cache, ("told",), test_fraction=0.34)
    with pytest.raises(CacheMismatchError, match="store them under another --name"):
        fit_pooled(study, tmp_path / "out")
    assert not list(steps) and not (tmp_path / "out").exists()


def test_results_that_cannot_be_written_are_not_computed(
    stored: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("in the way, as a folder of someone else")
    (tmp_path / "labels.csv").write_text("slide_id,x_level0,y_level0,label\n")
    read: list[object] = []
    monkeypatch.setattr(classical, "read_features", lambda *of, **_: read.append(of))
    command = words(stored, tmp_path / "out", "--features", "told")
    for more in ([], [f"--tile-labels={tmp_path / 'labels.csv'}"]):
        assert main([*command, *more]) == 2
        assert "predictions.csv: cannot be written" in capsys.readouterr().err.splitlines()[-1]
    assert not read


@pytest.mark.parametrize("model", ["ridge", "ordinal", "logistic", "trees"])
def test_grades_the_test_part_of_the_common_split(
    stored: Study, tmp_path: Path, model: ClassicalModel, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    more = ["--features", "told", "noise", "--model", model, "--seed", "3"]
    assert main(words(stored, output, *more)) == 0
    rows = read_manifest(stored.manifest).rows
    split = split_patients(rows, val_fraction=0.15, test_fraction=0.34, seed=3)
    predictions = read_predictions(output / "predictions.csv")
    assert [row.slide_id for row in predictions] == sorted(name for name in split if split[name] == "test")
    by_id = {row.slide_id: row for row in rows}
    for row in predictions:
        assert (row.grade, row.patient_id) == (by_id[row.slide_id].grade, by_id[row.slide_id].patient_id)
        assert sum(row.probabilities) == pytest.approx(1, abs=1e-5) and len(row.probabilities) == 5
        assert row.tiles == len(SlideCache.open(cache_path(stored.cache, row.slide_id)))
    figures = json.loads((output / "metrics.json").read_text())
    assert figures["n"] == len(predictions) and figures["grades"] == ["0", "1", "2", "3", "4"]
    assert figures["not_graded"] == []
    hits = [row.grade == row.predicted_grade for row in predictions]
    assert figures["accuracy"] == pytest.approx(np.mean(hits))
    true, predicted = ([getattr(row, name) for row in predictions] for name in ("grade", "predicted_grade"))
    kappa = cohen_kappa_score(true, predicted, labels=range(5), weights="quadratic")
    assert figures["qwk"] == pytest.approx(kappa)
    # On a dozen slides a model that knows no order does less, and a tree finds nothing to split.
    if model != "trees":
        assert kappa >= {"ridge": 0.8, "ordinal": 0.8, "logistic": 0.4}[model]
    caches = {name: SlideCache.open(cache_path(stored.cache, name)) for name in by_id}
    pooled = {
        name: np.hstack([read_features(cache, kind).astype(float).mean(axis=0) for kind in ("told", "noise")])
        for name, cache in caches.items()
    }
    trained = sorted(
        set(split) - {row.slide_id for row in predictions}, key=lambda name: split[name] == "val"
    )
    grader = fit_grader(
        model,
        [pooled[name] for name in trained],
        np.array([by_id[name].grade for name in trained], int),
        [by_id[name].patient_id for name in trained],
        5,
        seed=3,
    )
    expected = grader.probabilities(np.stack([pooled[row.slide_id] for row in predictions]))
    np.testing.assert_allclose([row.probabilities for row in predictions], expected, atol=1e-6)
    judged = judged_probabilities(true, [row.probabilities for row in predictions])
    assert figures | json.loads(json.dumps(judged)) == figures
    assert (output / "confusion.png").stat().st_size > 1000
    assert (output / "model.npz").exists() == (model != "trees")
    assert f"accuracy {figures['accuracy']:.3f}" in capsys.readouterr().out


def test_the_saved_model_gives_the_predictions(stored: Study, tmp_path: Path) -> None:
    assert main(words(stored, tmp_path / "out", "--features", "told", "--pool", "both")) == 0
    with np.load(tmp_path / "out" / "model.npz", allow_pickle=False) as file:
        saved = dict(file)
    assert saved["model"] == "ridge"
    for row in read_predictions(tmp_path / "out" / "predictions.csv"):
        features = read_features(SlideCache.open(cache_path(stored.cache, row.slide_id)), "told")
        scaled = (pool_tiles(features, "both") - saved["centre"]) / saved["scale"]
        distance = np.arange(len(saved["grades"])) - scaled @ saved["coefficients"] - saved["intercepts"]
        found = np.zeros(saved["n_grades"])
        found[saved["grades"]] = softmax(-(distance**2) / (2 * saved["sigma"] ** 2))
        np.testing.assert_allclose(found, row.probabilities, atol=1e-6)
    # Another model in the same folder does not leave that of the first beside its figures.
    assert main(words(stored, tmp_path / "out", "--features", "told", "--model", "trees")) == 0
    assert not (tmp_path / "out" / "model.npz").exists()


def test_several_features_are_joined(stored: Study, tmp_path: Path) -> None:
    for names, qwk in [(("noise",), (-1, 0.6)), (("noise", "told"), (0.8, 1))]:
        study = FeatureStudy(stored.manifest, stored.cache, names, test_fraction=0.34)
        assert qwk[0] <= fit_pooled(study, tmp_path / "out").metrics.qwk <= qwk[1]
        with np.load(tmp_path / "out" / "model.npz") as model:
            assert model["centre"].shape == (6 * len(names),)


def test_the_manifest_is_recorded_for_a_reader_in_another_folder(
    stored: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stored.manifest.parent)
    fit_pooled(FeatureStudy(Path(stored.manifest.name), stored.cache, ("told",)), tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert figures["manifest"] == str(stored.manifest)


def test_the_test_part_has_no_say(stored: Study, tmp_path: Path) -> None:
    """Whatever the grades of the test part are, the model is the same."""
    names = ("told", "noise")
    fit_pooled(FeatureStudy(stored.manifest, stored.cache, names), tmp_path / "a")
    tested = {row.slide_id for row in read_predictions(tmp_path / "a" / "predictions.csv")}
    with stored.manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    graded = {row.slide_id: row for row in read_manifest(stored.manifest).rows}
    split = split_patients(list(graded.values()), val_fraction=0.15, test_fraction=0.25, seed=0)
    manifest = tmp_path / "changed.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "split"])
        writer.writeheader()
        for row in rows:
            grade = 4 - int(row["grade"]) if row["slide_id"] in tested else row["grade"]
            path = str(graded[row["slide_id"]].path)
            writer.writerow({**row, "path": path, "grade": grade, "split": split[row["slide_id"]]})
    fit_pooled(FeatureStudy(manifest, stored.cache, names), tmp_path / "b")
    first, second = (np.load(tmp_path / run / "model.npz") for run in "ab")
    np.testing.assert_array_equal(first["coefficients"], second["coefficients"])
    assert first["sigma"] == second["sigma"]


def test_features_of_two_networks_are_not_mixed(stored: Study, tmp_path: Path) -> None:
    cache = SlideCache.open(cache_path(stored.cache, "slide-03"))
    other = FeatureSource("net", "", "b" * 64, (0, 0, 0), (1, 1, 1))
    write_features(cache, {"told": (other, read_features(cache, "told"))})
    with pytest.raises(
        CacheMismatchError,
        match=r"'told' of slide-03 are of another network or other weights \(net, b+\.\.\.\)",
    ):
        fit_pooled(FeatureStudy(stored.manifest, stored.cache, ("told",)), tmp_path / "out")
    with pytest.raises(CacheMissingError, match="there are: noise, told"):
        fit_pooled(FeatureStudy(stored.manifest, stored.cache, ("resnet18",)), tmp_path / "out")
    six = FeatureStudy(stored.manifest, stored.cache, ("noise",), tuple("012345"))
    with pytest.raises(UsageError, match="no training slide has grade 5; add some"):
        fit_pooled(six, tmp_path / "out")
    with pytest.raises(UsageError, match="--model must be one of ridge"):
        fit_pooled(FeatureStudy(stored.manifest, stored.cache, ("noise",)), tmp_path / "out", "forest")  # type: ignore[arg-type] # as from YAML


@pytest.fixture
def labels(stored: Study, tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """Tile labels: the grade of the slide, and every fifth tile 'ignore'; some lines may be replaced."""

    def write(changes: dict[str, str]) -> Path:
        lines = ["slide_id,x_level0,y_level0,label"]
        for row in read_manifest(stored.manifest).rows:
            cache = SlideCache.open(cache_path(stored.cache, row.slide_id))
            told = read_features(cache, "told").copy()
            told[::5, 0] += 30
            source = FeatureSource("net", "", WEIGHTS, (0, 0, 0), (1, 1, 1))
            write_features(cache, {"labelled": (source, told)})
            for tile, (x, y) in enumerate(cache.origins_level0.tolist()):
                lines.append(f"{row.slide_id},{x},{y},{row.grade if tile % 5 else 'ignore'}")
        path = tmp_path / "labels.csv"
        text = "\n".join(lines) + "\n"
        for old, new in changes.items():
            text = text.replace(old, new, 1)
        path.write_text(text)
        return path

    return write


def test_a_tile_classifier_grades_slides(
    stored: Study, tmp_path: Path, labels: Callable[[dict[str, str]], Path]
) -> None:
    more = ["--features", "labelled", "--tile-labels", str(labels({}))]
    (tmp_path / "out").mkdir()
    for name in ("model.npz", "config.yaml"):
        (tmp_path / "out" / name).touch()
    assert main(words(stored, tmp_path / "out", *more)) == 0
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert not (tmp_path / "out" / "model.npz").exists()
    assert (tmp_path / "out" / "config.yaml").is_file(), "without a checkpoint it is someone else's"
    assert figures["qwk"] > 0.8
    assert len(read_predictions(tmp_path / "out" / "predictions.csv")) == figures["n"]


def test_tiles_of_one_slide_are_held_at_a_time(
    stored: Study,
    tmp_path: Path,
    labels: Callable[[dict[str, str]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = labels({})
    held, most = weakref.WeakValueDictionary[int, Any](), 0
    read = classical._features

    def features(*of: Any) -> Any:
        nonlocal most
        values = read(*of)
        held[id(values)] = values
        most = max(most, len(held))
        return values

    monkeypatch.setattr(classical, "_features", features)
    assert main(words(stored, tmp_path / "out", "--features", "labelled", "--tile-labels", str(path))) == 0
    assert 1 <= most <= 2


def test_labels_of_tiles_that_are_not_there_are_refused(
    stored: Study,
    tmp_path: Path,
    labels: Callable[[dict[str, str]], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = labels({})
    header = path.read_text().splitlines()[0]
    path.write_text(header + "\n" + "".join(f"slide-{n:02},-7,-7,1\n" for n in range(20)))
    assert main(words(stored, tmp_path / "out", "--features", "labelled", "--tile-labels", str(path))) == 2
    assert "none of the 1 points of slide-" in (said := capsys.readouterr().err)
    assert "lies in a tile of the cache, first (-7.0, -7.0); expected level-0 pixels" in said


@pytest.mark.slow  # embeds the study
def test_a_ridge_becomes_a_file_that_grades_slides(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path / "home"))
    stored, output, name = Study(study.manifest, tmp_path / "cache"), tmp_path / "out", SMALL
    shutil.copytree(study.cache, stored.cache)
    assert main(["embed", str(stored.cache), *small_embed()]) == 0
    fit = words(stored, output, "--features", name, "--pretrained", str(small_weights()))
    assert main(fit) == 0
    ridge = output / "checkpoints" / "ridge.ckpt"
    assert main(["export", str(ridge), "--output", str(tmp_path / "model.pt")]) == 0
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.card.score_unit == "grades" and loaded.card.training is not None
    predictions = read_predictions(output / "predictions.csv")
    for row in predictions[:2]:
        cache = SlideCache.open(cache_path(stored.cache, row.slide_id))
        tiles = torch.from_numpy(cache.read(range(len(cache))).transpose(0, 3, 1, 2).copy())
        with torch.inference_mode():
            grades = loaded.network.grade(loaded.network.embed(tiles))
        np.testing.assert_allclose(grades[0].numpy(), row.probabilities, atol=2e-3)
    # Those it was trained on are recorded, and its own predictions are taken as evidence.
    record = load_grader(ridge).record
    assert record is not None
    assert {slide.slide_id for slide in record.slides if slide.part == "test"} == {
        row.slide_id for row in predictions
    }
    assert main(["test", *study.options(tmp_path / "again"), f"--ckpt_path={ridge}"]) == 0
    again = read_predictions(tmp_path / "again" / "test" / "predictions.csv")
    assert [row.slide_id for row in again] == [row.slide_id for row in predictions]
    np.testing.assert_allclose(
        [row.probabilities for row in again], [row.probabilities for row in predictions], atol=2e-3
    )
    capsys.readouterr()
    for wrong in (["--pool", "max"], ["--model", "ordinal"]):
        assert main([*fit, *wrong]) == 2
        assert "--pretrained takes --model ridge" in capsys.readouterr().err
    assert ridge.is_file()
    assert main([*fit[: fit.index("--pretrained")], "--model", "ordinal"]) == 0
    left = {path.name for path in output.rglob("*") if path.is_file()}
    assert left == {"predictions.csv", "metrics.json", "confusion.png", "model.npz"}


def test_a_ridge_of_other_weights_is_refused(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.cache, tmp_path / "cache")
    rng = np.random.default_rng(0)
    for row in read_manifest(study.manifest).rows:
        cache = SlideCache.open(cache_path(tmp_path / "cache", row.slide_id))
        source = FeatureSource(SMALL, "", WEIGHTS, (0, 0, 0), (1, 1, 1))
        write_features(cache, {"f": (source, rng.normal(size=(len(cache), 6)).astype(np.float16))})
    with pytest.raises(CacheMismatchError, match="of other weights than --pretrained "):
        fit_pooled(
            FeatureStudy(study.manifest, tmp_path / "cache", ("f",)),
            tmp_path / "out",
            pretrained=str(small_weights()),
        )
    assert not (tmp_path / "out").exists()
