"""The registered experiment in small: real slides, tiles, embeddings and jobs, without training."""

from __future__ import annotations

import csv
import importlib
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.stats import t as student
from scipy.stats import ttest_1samp
from sklearn.metrics import cohen_kappa_score

from slidetl.compare.config import read_comparison
from slidetl.compare.records import CurvePoint, JobResult, read_result, write_result
from slidetl.evaluation.comparison import patient_results
from slidetl.training.predictions import SlidePrediction

ROOT = Path(__file__).parents[2]
SMALL = ["--train", "20", "--test", "10", "--external-slides", "25", "--tiles-per-slide", "10"]
SMALL += ["--train-tiles", "14", "--test-tiles", "10", "--target", "b"]


tool: Any = importlib.import_module("tools.run_registered")


def draw_tiles(folder: Path, seed: int) -> Path:
    """Draws tiles of 112 px, of three classes: a colour each, with smooth noise of their own."""
    rng = np.random.default_rng(seed)
    for name, colour in {"a": (200, 60, 60), "b": (60, 200, 60), "c": (60, 60, 200)}.items():
        (folder / name).mkdir(parents=True)
        for number in range(24):
            coarse = rng.integers(0, 256, (8, 8), np.uint8)
            noise = np.asarray(Image.fromarray(coarse).resize((112, 112), Image.Resampling.BICUBIC), float)
            tile = np.clip(np.array(colour) + (noise[..., None] - 128) * 0.4, 0, 255).astype(np.uint8)
            Image.fromarray(tile).save(folder / name / f"{number:02d}.png")
    return folder


def write_config(folder: Path, registered: str) -> Path:
    """Writes the shipped configuration, with fewer resamples."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "configs/compare/collage.yaml").read_text())
    values |= {"registered": str(folder / "registered.md"), "bootstrap_draws": 100}
    values["sizes"] = {"slides": [10], "arms": ["scratch", "warm", "colour-area", "prior"]}
    for name in ("frozen-ridge", "random-ridge"):
        del values["arms"][name]  # no network: seconds
    path = folder / "collage.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    (first,) = tool.comparisons_of(read_comparison(path), [folder / f"redraw-{tool.FIRST}"])
    (folder / "registered.md").write_text(registered or first.sha256)
    return path


def run(folder: Path, config: Path, *more: str) -> int:
    words = ["--tiles", str(folder / "home"), "--external-tiles", str(folder / "other"), *more]
    places = ["--output", str(folder / "out"), "--page", str(folder / "page.md")]
    places += ["--results", str(folder / "results")]
    return int(tool.main([*words, *places, "--config", str(config), "--redraws", "1"], SMALL))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_registered_is_in_the_repository() -> None:
    configured = read_comparison(ROOT / "configs/compare/collage.yaml")
    assert configured.registered == "docs/evidence/registered.md"
    text = (ROOT / configured.registered).read_text()
    comparisons = tool.comparisons_of(
        configured, [Path(f"redraw-{tool.FIRST + number}") for number in range(tool.REDRAWS)]
    )
    assert len({comparison.protocol.seed for comparison in comparisons}) == tool.REDRAWS
    assert all(comparison.sha256 in text for comparison in comparisons)


@pytest.mark.slow
def test_the_page_has_the_metrics_of_the_arms_that_were_run_and_names_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_tiles(tmp_path / "home", 0), draw_tiles(tmp_path / "other", 1)
    monkeypatch.setattr(tool, "embed", lambda cache, weights: [])  # no arm here uses features
    config = write_config(tmp_path, "")
    assert run(tmp_path, config, "--stages", "frozen") == 0
    page = (tmp_path / "page.md").read_text()
    assert "**not run yet** (0 of 5 redraws)" in page
    assert "No trained arm has been run: scratch, warm, shared-weights" in page
    assert "| scratch | 0 of 5 | not run | not run | not run | not run |" in page

    cells = next(line for line in page.splitlines() if line.startswith("| colour-area | 1 of 5")).split("|")
    for name, cell in (("predictions", cells[3]), ("predictions_external", cells[5])):
        rows = table(tmp_path / "out" / "redraw-1" / "compare" / f"{name}.csv")
        rows = [row for row in rows if (row["arm"], row["train_slides"]) == ("colour-area", "")]
        true, predicted = ([int(row[column]) for row in rows] for column in ("grade", "predicted_grade"))
        kappa = cohen_kappa_score(true, predicted, labels=range(5), weights="quadratic")
        assert float(cell) == pytest.approx(kappa, abs=0.005)
    (comparison,) = tool.comparisons_of(read_comparison(config), [tmp_path / "out" / "redraw-1"])
    plan = tool.plan_comparison(comparison)
    capsys.readouterr()
    assert not tool.compute([plan], [tmp_path / "out" / "redraw-1"], ["frozen"], time.monotonic() + 60, 1)
    assert "0 jobs to compute" in capsys.readouterr().err


def test_the_primary_pair_is_shown_redraw_by_redraw_until_all_are_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool, "N_DRAWS", 50)
    comparison = read_comparison(ROOT / "configs/compare/collage.yaml")
    rng = np.random.default_rng(0)
    true, names = np.arange(60) % 5, np.arange(60)

    def redraw(n_wrong: int, epochs: int = 100) -> Any:
        def results(graded: Any) -> Any:
            return patient_results(true, np.eye(5)[graded], names, "slide")

        worse = true.copy()
        worse[:n_wrong] = rng.integers(0, 5, n_wrong)
        home = {("warm", None): results(true), ("scratch", None): results(worse)}
        job = SimpleNamespace(chosen={"trainer.max_epochs": epochs}, curves=[], seconds=1.0)
        return tool.Redrawn(home, home, home, {("scratch", None): job})

    fold = SimpleNamespace(train=["a"] * 100, test=["b"] * 60, external=["c"] * 3)
    plan = SimpleNamespace(comparison=comparison, folds=[fold])

    def page(*redraws: Any) -> str:
        return " ".join(tool.write_page(redraws, [plan] * len(redraws), "command").split())

    one = page(redraw(30))
    assert "1 of 5 redraws, so not yet the answer: +0." in one and "no interval over redraws" in one
    two = page(redraw(30), redraw(40))
    assert "2 of 5 redraws, so not yet the answer: **+0." in two
    assert re.search(r"\| 1 \| 1\.00 \| 0\.\d\d \| \+0\.\d\d \(0\.\d\d\) \|", two)
    assert "In 2 of 2 redraws the inner folds chose the longest schedule for scratch" in two
    assert "then an upper bound" not in page(redraw(30), redraw(40, epochs=30))
    five = page(*(redraw(20 + n) for n in range(5)))
    assert "not yet the answer" not in five and "between redraws, a standard deviation of" in five


def test_cells_of_fewer_redraws_have_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "N_DRAWS", 50)
    comparison = read_comparison(ROOT / "configs/compare/collage.yaml")
    true = np.arange(60) % 5

    def results(shift: int) -> Any:
        graded = np.clip(true + (np.arange(60) % 4 < shift), 0, 4)
        return patient_results(true, np.eye(5)[graded], np.arange(60), "slide")

    first, second = comparison.sizes.slides[:2]
    names = ("warm", "scratch", "frozen-ridge")
    home = {(name, size): results(1 + n) for n, name in enumerate(names) for size in (None, first)}
    fewer = {
        key: found for key, found in home.items() if key not in (("warm", first), ("frozen-ridge", None))
    }
    redraws = [tool.Redrawn(each, each, each, {}) for each in (home, fewer)]
    fold = SimpleNamespace(train=["a"] * 100, test=["b"] * 60, external=["c"] * 3)
    plans = [SimpleNamespace(comparison=comparison, folds=[fold])] * 2
    page = tool.write_page(redraws, plans, "command")
    of_sizes = page[page.index("## QWK by") : page.index("## QWK minus")]
    rows = {
        line.split(" | ")[0]: line.split(" | ") for line in of_sizes.splitlines() if line.startswith("| ")
    }
    assert rows["| warm"][1].endswith("(1 of 2)") and "of 2" not in rows["| scratch"][1]
    assert rows["| warm minus scratch"][1].endswith("(1 of 2)") and rows["| warm"][2] == "not run"
    against = page[page.index("## QWK minus") :]
    assert re.search(r"\| warm \| \+0\.\d\d \(1 of 2\) \|", against)
    listed = " ".join(page.split())
    assert f"scratch on {second} slides" in listed and f"warm on {first} slides" in listed


def test_a_kept_result_is_not_computed_again(tmp_path: Path) -> None:
    """On another machine, which builds the same slides and has the results alone."""
    row = SlidePrediction("s", "p", 2, (0.1, 0.2, 0.4, 0.2, 0.1), 40, site="home")
    point = CurvePoint("inner-0", 1, 10, 50, 3.0, 1.0, 0.5, 0.1 + 0.2, 0.1, float("nan"))
    result = JobResult((row,), (point,), chosen={"model.lr": 0.001, "epochs": 10}, temperature=1.3)
    job: Any = SimpleNamespace(
        key="k",
        tiles="t",
        recipe={"fit": {}},
        fold=SimpleNamespace(seed=0, train=("t",), test=("s",), external=()),
    )
    other = SimpleNamespace(**{**vars(job), "key": "colour", "recipe": {"baseline": "colour_area"}})
    plan = SimpleNamespace(jobs=(job, other))
    for name in ("k", "colour"):
        building, jobs = tmp_path / "building" / name, tmp_path / "here" / "compare" / "jobs"
        building.mkdir(parents=True)
        jobs.mkdir(parents=True, exist_ok=True)
        one: Any = job if name == "k" else other
        write_result(one, replace(result, embeddings=np.ones((2, 3), np.float32)), building, jobs / name)
    tool.keep(plan, tmp_path / "here", tmp_path / "results")
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["k.json.gz"]
    tool.restore(plan, tmp_path / "there", tmp_path / "results")
    found = read_result(tmp_path / "there" / "compare" / "jobs", job)
    assert found is not None and found.predictions == (row,) and found.chosen == result.chosen
    assert repr(found.curves) == repr((point,)) and found.embeddings.size == 0
    before = (tmp_path / "results" / "k.json.gz").read_bytes()
    tool.keep(plan, tmp_path / "there", tmp_path / "results")
    assert (tmp_path / "results" / "k.json.gz").read_bytes() == before


def test_what_is_not_registered_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, write_config(tmp_path, "another hash")) == 1
    assert "register it, commit that" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_effect_is_that_of_sklearn_and_a_constant_has_no_interval() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 5, 100)
    names = np.arange(100)

    def results(graded: Any) -> Any:
        return patient_results(true, np.eye(5)[graded], names, "slide")

    good, bad = np.clip(true + rng.integers(-1, 2, 100), 0, 4), rng.integers(0, 5, 100)
    kappas = [cohen_kappa_score(true, graded, labels=range(5), weights="quadratic") for graded in (good, bad)]
    estimate, error = tool.effect(results(good), "qwk", results(bad))
    assert estimate == pytest.approx(kappas[0] - kappas[1]) and 0.02 < error < 0.3
    constant = [tool.effect(results(np.zeros(100, int)), "qwk")] * 2
    assert tool.combined(constant) is None and tool.as_text(constant) == "0.00"
    assert tool.as_text([]) == "not run"
    # One grade for all slides of one redraw: it counts, and the interval is the t-interval of the redraws.
    mixed = tool.combined([(0.0, 0.0), (0.4, 0.03), (0.5, 0.03)])
    assert mixed.interval.estimate == pytest.approx(0.3)
    assert mixed.p == pytest.approx(ttest_1samp([0.0, 0.4, 0.5], 0).pvalue)
    assert re.fullmatch(r"0\.\d\d \[.*\]", tool.as_text([(0.5, 0.1), (0.6, 0.1)]))
    # Where the redraws agree, the errors make the interval: those of 0 do not make the others smaller.
    alike = tool.combined([(0.4, 0.0), (0.4, 0.03), (0.4, 0.03)]).interval
    assert alike.high - 0.4 == pytest.approx(student.ppf(0.975, 2) * 0.03 / 3**0.5)


def test_intervals_are_cut_at_the_range_of_the_metric() -> None:
    effects = [(0.75, 0.03), (0.54, 0.03), (0.0, 0.03)]
    assert tool.combined(effects).interval.high > 1.3
    assert re.fullmatch(r"0\.43 \[-0\.\d\d, 1\.00\]", tool.as_text(effects))
    assert re.fullmatch(r"0\.43 \[0\.00, 1\.00\]", tool.as_text(effects, least=0.0))
    assert re.fullmatch(r"\+0\.43 \[-0\.\d\d, \+1\.\d\d\]", tool.as_difference(effects))


def test_speed_is_that_of_whole_schedules_in_the_inner_folds() -> None:
    def arm(name: str, kappas: dict[int, tuple[float, float]], epochs: int) -> dict[Any, SimpleNamespace]:
        """Two trials of each length, the second of a worse rate; two inner folds and a test curve."""
        curves = []
        for number, (length, (kappa, seconds)) in enumerate(kappas.items()):
            for trial, loss in ((2 * number, 0.0), (2 * number + 1, 0.3)):
                for part, shift in (("inner-0", 0.1), ("inner-1", -0.1)):
                    value = kappa - loss + shift
                    about = {"train_loss": 1.0, "accuracy": 0.5, "qwk": value, "rps": 0.1, "log_loss": 1.0}
                    curves.append(CurvePoint(part, trial, length, 50, seconds, **about))
        curves.append(replace(curves[0], part="test", qwk=1.0))
        curves.append(replace(curves[0], trial=9, qwk=float("nan")))
        found = SimpleNamespace(curves=curves, chosen={"model.lr": 0.001, "epochs": epochs})
        return {(name, None): found, (name, 20): SimpleNamespace(curves=curves[:1], chosen={"epochs": 9})}

    scratch = arm("scratch", {10: (0.1, 5), 30: (0.4, 15), 100: (0.6, 50)}, 100)
    warm = arm("warm", {10: (0.5, 6), 30: (0.7, 18), 100: (0.8, 60)}, 30)
    one = SimpleNamespace(jobs=scratch | warm)
    comparison = read_comparison(ROOT / "configs/compare/collage.yaml")
    text, about, chosen = tool._speed([one, one], comparison)
    row = "| scratch | 0.10 after 10 (5 s), 0.40 after 30 (15 s), 0.60 after 100 (50 s) | 100 epochs, 50 s |"
    assert row in text
    assert "| 30 epochs, 18 s |" in text and about.startswith("0.60 is the best of scratch")
    assert "scratch: lr 0.001, epochs 100 (2 times). warm: lr 0.001, epochs 30 (2 times)" in chosen
    assert "Not run" in tool._speed([SimpleNamespace(jobs=warm)], comparison)[0]
