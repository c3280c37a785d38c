"""The experiment on phantoms: its statistics, its steps and its page, without a training."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from slidetl.evaluation.metrics import auroc
from slidetl.files import write_csv

tool: Any = importlib.import_module("tools.run_volumes")


def graded(seed: int, gap: float, n: int = 40) -> Any:
    """Draws patients of both grades, and scores that tell them apart by some standard deviations."""
    rng = np.random.default_rng(seed)
    true = np.arange(n) % 2
    scores = 1 / (1 + np.exp(-rng.normal(gap * (true - 0.5), 1)))
    return tool.Graded(tuple(f"p{number:03}" for number in range(n)), true, scores)


def write_graded(path: Path, one: Any, first: int = 0) -> None:
    rows = [
        {"slide_id": name, "patient_id": name, "grade": grade, "probability_1": score}
        for name, grade, score in zip(one.patients, one.true, one.scores, strict=True)
    ]
    write_csv(path, list(rows[0]), rows[first:][::-1])  # in another order


def test_metrics_are_means_over_redraws() -> None:
    redraws = [graded(0, 2.0), graded(1, 1.0, n=30)]
    expected = np.mean([auroc(one.true == 1, one.scores) for one in redraws])
    found = tool.estimate(redraws, "AUROC")
    assert found.estimate == pytest.approx(expected) and found.low < expected < found.high
    loss = tool.estimate(redraws, "log loss").estimate
    by_hand = [-np.log(np.where(one.true == 1, one.scores, 1 - one.scores)).mean() for one in redraws]
    assert loss == pytest.approx(np.mean(by_hand))


def test_a_difference_is_paired_by_patients() -> None:
    good, bad = [graded(0, 3.0), graded(1, 3.0)], [graded(2, 0.0), graded(3, 0.0)]
    found = tool.estimate(good, "AUROC", bad)
    assert found.low > 0.2 and tool.flips_p(good, bad) < 0.01
    same = tool.estimate(good, "AUROC", good)
    assert (same.estimate, same.low, same.high) == (0, 0, 0) and tool.flips_p(good, good) == 1


def test_arms_are_read_by_patient_and_must_have_the_same(tmp_path: Path) -> None:
    one = graded(0, 1.0)
    write_graded(tmp_path / "local-trees/predictions.csv", one)
    write_graded(tmp_path / "scratch-max/test/predictions.csv", one)
    found = tool.graded_by(tmp_path)
    assert set(found) == {"local-trees", "scratch-max"}
    assert found["local-trees"].patients == one.patients
    assert np.allclose(found["local-trees"].scores, one.scores)
    write_graded(tmp_path / "baselines/prior.csv", one, first=1)
    with pytest.raises(tool.UsageError, match="different patients"):
        tool.graded_by(tmp_path)


def test_the_page_tells_what_was_not_run() -> None:
    redraws = {
        1: {"local-trees": graded(0, 2.0), "scratch-max": graded(1, 0.0)},
        2: {"prior": graded(2, 0.0)},
    }
    page = tool.write_page(redraws, "COMMAND")
    assert "AUROC of local-trees minus scratch-max, 1 of 3 redraws: **+0." in page
    assert "40 test patients, 20 of grade 1" in page.replace("\n", " ")
    assert "Nothing here is claimed of real scans" in page
    assert (
        "| local-warm | source labels, then end to end on patients, maximum | 0 | not run | not run |  |"
        in page
    )
    assert "| prior | not run | 0." in page  # by redraw
    assert "**Not run in every redraw: local-trees, local-warm" in page
    assert "**not run yet**" in tool.write_page({1: {}}, "COMMAND")


def test_only_the_registered_redraws_decide() -> None:
    clear, none = tool.Interval(0.2, 0.1, 0.3, 0.95), tool.Interval(0.2, -0.1, 0.3, 0.95)
    assert "Not decided, with 2 of 3 redraws." in tool.verdict(clear, [1, 3])
    assert "local labels help" in tool.verdict(clear, [1, 2, 3])
    assert "not shown" in tool.verdict(none, [1, 2, 3])
    for others in ([7, 8, 9], [1, 2, 3, 4, 5, 6], [0, 1, 2]):
        names = ", ".join(map(str, others))
        told = f"**Not decided, with redraws {names}, not the registered 1, 2, 3.**"
        assert told in tool.verdict(clear, others)
        pair = {"local-trees": graded(0, 3.0), "scratch-max": graded(1, 0.0)}
        page = " ".join(tool.write_page(dict.fromkeys(others, pair), "COMMAND").split())
        assert (
            told in page
            and f"scratch-max, redraws {names}, not the" in page
            and "By the registered rule" not in page
        )


def test_an_undefined_difference_is_no_finding_and_a_point_no_interval() -> None:
    """All test patients are of grade 0; then an arm that tells all of them apart."""
    one = graded(0, 1.0)
    lone = tool.Graded(one.patients, np.zeros(40, int), one.scores)
    redraws = {number: {"local-trees": lone, "scratch-max": lone} for number in (1, 2, 3)}
    page = " ".join(tool.write_page(redraws, "COMMAND").split())
    assert "**undefined**, the test could not be computed; 120 test patients, 0 of grade 1." in page
    assert "The registered rule cannot be applied" in page and "not shown" not in page
    perfect = tool.Graded(one.patients, one.true, one.true.astype(float))
    assert tool.as_text(tool.estimate([perfect], "AUROC")) == "1.00 (no interval)"


def test_trainings_differ_in_what_their_names_say(tmp_path: Path) -> None:
    def read(*arguments: object) -> dict[str, dict[str, Any]]:
        config: dict[str, dict[str, Any]] = yaml.safe_load(tool.fit_config(tmp_path, *arguments).read_text())
        return config

    scratch, warm = read("scratch-max", 3, "max"), read("local-warm", 3, "max", "best.ckpt")
    assert warm["model"].pop("backbone") == {"name": tool.NETWORK, "pretrained": "best.ckpt"}
    assert scratch["model"].pop("backbone") == {"name": tool.NETWORK}
    starts = [config["model"].pop("transfer")["class_path"] for config in (scratch, warm)]
    assert [start.rsplit(".", 1)[1] for start in starts] == ["Scratch", "WarmRestart"]
    assert [config["trainer"].pop("default_root_dir") for config in (scratch, warm)] == [
        str(tmp_path / "scratch-max"),
        str(tmp_path / "local-warm"),
    ]
    assert scratch == warm
    source = read("source", 3, "max")
    assert source["data"]["manifest"] == str(tmp_path / "nodules.csv")
    assert [task["name"] for task in source["model"]["tasks"]] == ["malignancy", "diameter"]


def test_the_clock_ends_it_before_a_step(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert tool.main(["--output", str(tmp_path / "out"), "--page", str(page), "--hours", "0"]) == 0
    assert "**not run yet**" in page.read_text() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", ["", " --first 4", " --redraws 2", " --first 7 --redraws 1"])
def test_the_page_names_the_command_of_its_redraws(options: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    words = ["--output", str(tmp_path / "out"), "--page", str(page), "--hours", "0", *options.split()]
    assert tool.main(words) == 0
    assert f" --page docs/evidence/volumes.md{options}`" in " ".join(page.read_text().split())
