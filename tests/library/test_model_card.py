from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slidetl.errors import ModelFileError, UsageError
from slidetl.library.model_card import Evidence, ModelCard, TrainingData
from slidetl.tiles.grid import TileSpec
from tests.library.test_fields import changed

CARD = ModelCard(
    grades=("none", "mild", "severe"),
    tile_spec=TileSpec(mpp=2, tile_size_px=96),
    backbone="resnet18",
    architecture={"name": "resnet18"},
    normalisation={"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
    versions={"slidetl": "0"},
    weights_sha256="ab",
)
FULL = replace(
    CARD,
    members=5,
    licence="CC-BY-4.0",
    training=TrainingData(40, 30, ("a", "b"), (), ("trichrome",), 3.5, "cd"),
    evidence=Evidence(12, 10, {"QWK": (0.8, 0.7, 0.9)}, 1.5, 0.9, 0.4, "ef"),
    novelty_limit=2.5,
    lineage=("12", "34"),
)


@pytest.mark.parametrize("card", [CARD, FULL])
def test_round_trip(card: ModelCard) -> None:
    assert ModelCard.from_json(card.to_json()) == card


@pytest.mark.parametrize(
    ("grades", "scale"),
    [
        (("0", "1", "2", "3", "4"), "0 to 4"),
        (("1", "2", "3", "4", "5"), "0 to 4, where 0 is grade 1 and 4 grade 5"),
        (("none", "mild", "severe"), "0 to 2, where 0 is grade none and 2 grade severe"),
    ],
)
def test_a_continuous_score_is_said_with_its_range(grades: tuple[str, ...], scale: str) -> None:
    assert replace(CARD, grades=grades).describe_score(2.047) == f"continuous score 2.05 of {scale}"


@pytest.mark.parametrize(("temperature", "coverage"), [(0, 0.9), (float("nan"), 0.9), (1, 1), (1, 0)])
def test_impossible_evidence_is_refused(temperature: float, coverage: float) -> None:
    with pytest.raises(UsageError):
        Evidence(12, 10, {}, temperature, coverage, 0.4, "ef")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tile_spec__mpp": -1}, "mpp must be a positive number"),
        ({"grades": ["only one"]}, "grades: expected at least two"),
        ({"architecture": {"name": "x", "class_path": "os.system"}}, "architecture: expected"),
        ({"architecture": {}}, "architecture: expected"),
        ({"weights_sha256": None}, "weights_sha256"),
        ({"training__slides": "many"}, "training.slides"),
    ],
)
def test_what_no_model_can_be_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFileError, match=said):
        ModelCard.from_json(changed(FULL.to_json(), **values).decode())


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"m/data/0": b"0"}, "expected one slidetl.json .* found 0"),
        ({"m/extra/slidetl.json": b" " * 300_000}, "at most 262144 bytes"),
        ({"m/extra/slidetl.json": b"\xff"}, "damaged"),
        ({"m/extra/slidetl.json": b"{}", "n/extra/slidetl.json": b"{}"}, "found 2"),
    ],
)
def test_the_card_of_a_strange_file_is_refused(parts: dict[str, bytes], said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(ModelFileError, match=said):
        ModelCard.of_file(path)


@pytest.mark.parametrize(
    ("coverage", "share"), [(0.995, "99.5 %"), (0.975, "97.5 %"), (0.29, "29 %"), (0.9999999, "99.99999 %")]
)
def test_a_promised_share_is_not_rounded_up(coverage: float, share: str) -> None:
    evidence = Evidence(12, 10, {}, 1.5, coverage, 0.4, "ef")
    promise = f"made to hold the true grade of {share} of patients like those of the evidence"
    assert replace(CARD, evidence=evidence).describe_coverage(1.0) == promise


def test_tissue_as_little_as_in_the_training_is_no_doubt() -> None:
    def doubts(least: float, tissue_mm2: float) -> tuple[str, ...]:
        training = TrainingData(12, 10, (), (), (), least, "ab")
        return replace(CARD, training=training).doubts_about(None, tissue_mm2)

    least = 39.8391
    assert not doubts(least, least) and not doubts(least, least * (1 - 1e-6))  # summed in another order
    assert not doubts(0.50004, round(0.50004, 4))  # of a stored result
    (doubt,) = doubts(least, 39.8384)
    assert doubt.startswith("too little tissue: 39.838 mm2, where ") and "39.839 mm2 or more" in doubt
    assert doubts(0.0002, 0.0001)


def test_nothing_is_promised_that_was_not_tried() -> None:
    evidence = Evidence(12, 10, {}, 1.5, 0.9, 0.4, "ef")
    one, arm = (replace(CARD, evidence=replace(evidence, arm=name)) for name in ("", "warm"))
    vote = replace(one, members=5)
    assert CARD.describe_coverage() == one.describe_coverage(1.001) == ""
    assert "not tried with this file" not in one.describe_coverage()
    assert all(card.describe_coverage().endswith("not tried with this file") for card in (arm, vote))
    assert one.describe_test() == "kept from the training"
    told = arm.describe_test()
    assert told.endswith("trained alike on other patients (arm warm of a comparison), not by this file")
    unlike = replace(arm, evidence=replace(evidence, arm="warm", is_alike=False))
    assert unlike.describe_test() == told.replace("alike ", "")
    assert vote.describe_test().startswith("graded by the single networks, each kept from the training of")
    assert vote.describe_test().endswith("and not by their vote")
