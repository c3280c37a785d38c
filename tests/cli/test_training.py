from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from slidetl.cli import main
from slidetl.cli.training import GradingCLI
from slidetl.data.augment import Augmentation
from slidetl.data.record import StudyRecord, config_sha256, read_record
from slidetl.errors import UsageError
from slidetl.models.heads import CumulativeLink
from slidetl.training.best import COMPLETE
from slidetl.training.checkpoint import find_checkpoint, read_checkpoint
from slidetl.training.grader import SlideGrader
from slidetl.training.predictions import read_predictions, write_predictions
from tests.conftest import Study


def best(trained: Path) -> Path:
    return trained / "logs" / "version_0" / "checkpoints" / "best.ckpt"


def recorded(trained: Path) -> StudyRecord:
    record = read_record(read_checkpoint(best(trained)))
    assert record is not None
    return record


def changed(study: Study, target: Path, change: Callable[[dict[str, str]], dict[str, str] | None]) -> Study:
    """The study with rows changed, or left out."""
    with study.manifest.open(newline="") as file:
        rows = [
            change({**row, "path": str(study.manifest.parent / row["path"])}) for row in csv.DictReader(file)
        ]
    kept = [row for row in rows if row]
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(kept[0]))
        writer.writeheader()
        writer.writerows(kept)
    return Study(target, study.cache)


def rewritten(trained: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The checkpoint with something changed."""
    checkpoint = torch.load(best(trained), weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, target)
    return target


def run(command: str, study: Study, root: Path, checkpoint: Path, *options: str) -> tuple[int, set[str]]:
    """The exit code of a command, and the slides that it graded."""
    code = main([command, *study.options(root), f"--ckpt_path={checkpoint}", *options])
    table = root / command / "predictions.csv"
    return code, {row.slide_id for row in read_predictions(table)} if table.is_file() else set()


def part(record: StudyRecord, name: str) -> list[str]:
    return [slide.slide_id for slide in record.slides if slide.part == name]


def test_a_checkpoint_records_the_study(study: Study, trained: Path) -> None:
    record = recorded(trained)
    tested = {row.slide_id: row for row in read_predictions(trained / "test" / "predictions.csv")}
    assert set(part(record, "test")) == tested.keys()
    assert len(record.slides) == 20 and len(part(record, "train")) == 10
    assert re.fullmatch(r"[0-9a-f]{64}", record.config_sha256)
    for slide in record.slides:
        if slide.part == "test":
            row = tested[slide.slide_id]
            assert (row.patient_id, row.fingerprint) == (slide.patient_id, slide.fingerprint)
    with study.manifest.open(newline="") as file:
        grades = {row["slide_id"]: row["grade"] for row in csv.DictReader(file)}
    lines = [f"{one.slide_id},{one.patient_id},{grades[one.slide_id]},{one.part}" for one in record.slides]
    metrics = json.loads((trained / "test" / "metrics.json").read_text())
    assert metrics["manifest"] == str(study.manifest)
    table = best(trained).parents[1].joinpath("split.csv").read_text().splitlines()
    assert table == ["slide_id,patient_id,grade,part", *lines]


@pytest.mark.slow
def test_a_test_never_tests_what_was_trained_on(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The split by seed moves patients when slides are added, taken away or graded otherwise."""
    record = recorded(trained)
    left_out = part(record, "train")[:2]
    fewer = changed(study, tmp_path / "f.csv", lambda row: None if row["slide_id"] in left_out else row)
    for command in ("test", "validate"):
        code, graded = run(command, fewer, tmp_path / "refused", best(trained))
        assert code == 2 and not graded
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"2 gone: {left_out[0]}, {left_out[1]}" in line and "--data.split_from manifest" in line
    code, graded = run("test", fewer, tmp_path / "m", best(trained), "--data.split_from=manifest")
    assert code == 0 and graded == set(part(record, "test"))
    regraded = changed(
        study, tmp_path / "g.csv", lambda row: {**row, "grade": "0" if row["grade"] == "1" else "1"}
    )
    code, graded = run("test", regraded, tmp_path / "r", best(trained))
    assert code == 0 and graded == set(part(record, "test"))
    everyone = changed(study, tmp_path / "e.csv", lambda row: {**row, "split": "test"})
    code, _ = run("test", everyone, tmp_path / "e", best(trained), "--data.split_from=manifest")
    assert code == 2 and "trained or chosen on 15 of the slides" in capsys.readouterr().err
    code, _ = run("fit", fewer, tmp_path / "fit", best(trained), "--data.split_from=manifest")
    line = capsys.readouterr().err
    assert code == 2 and "2 gone" in line and "or start a new training" in line


@pytest.mark.slow
def test_a_fit_that_tells_no_slides_apart_fails_and_names_the_remedies(
    study: Study,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A warm restart had died on real tissue: one grade for all slides, and exit code 0."""
    seeing = CumulativeLink.forward
    monkeypatch.setattr(CumulativeLink, "forward", lambda self, embedding: seeing(self, embedding * 0))
    with pytest.warns(UserWarning, match="slides of the val part get the same probabilities"):
        code = main(["fit", *study.options(tmp_path), "--trainer.max_epochs=1"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "after every epoch" in line and "batch_statistics" in line
    assert best(tmp_path).is_file()
    done = best(tmp_path).with_name("last.ckpt")
    words = [*study.options(tmp_path), "--trainer.max_epochs=1", f"--ckpt_path={done}"]
    assert main(["fit", *words]) == 2 and "after every epoch" in capsys.readouterr().err


@pytest.mark.slow
def test_strangers_are_tested_whole(
    study: Study, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def forget(checkpoint: dict[str, Any]) -> None:
        for slide in checkpoint["record"]["slides"]:
            slide[1:3] = [f"other-{slide[1]}", f"other-{slide[2]}"]

    unknown = rewritten(trained, tmp_path / "c.ckpt", forget)
    code, graded = run("test", study, tmp_path, unknown)
    assert code == 0 and len(graded) == 20
    assert "none of these 20 slides is in the checkpoint's record: an external cohort" in caplog.text
    caplog.clear()
    run("test", study, tmp_path / "own", best(trained))
    assert "left out: 15 of 20 slides (train 10, val 5)" in caplog.text


@pytest.mark.slow
def test_predict_says_whom_the_checkpoint_has_seen(
    study: Study,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    code, graded = run("predict", study, tmp_path, best(trained))
    assert code == 0 and len(graded) == 20
    assert "trained or chosen on 15 of these 20 slides" in caplog.text
    words = [
        "export",
        str(best(trained)),
        "--output",
        str(tmp_path / "m.pt"),
        "--no-training-data",
        "--evidence",
    ]
    assert main([*words, str(tmp_path / "predict" / "predictions.csv")]) == 2
    assert "trained or chosen on 15 of these slides" in capsys.readouterr().err
    assert not (tmp_path / "m.pt").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*temperature of 17 slides:UserWarning")  # two epochs teach little
def test_grades_corrected_since_the_test_are_no_evidence(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tested = read_predictions(trained / "test" / "predictions.csv")
    assert len(tested) == 5
    others = [  # to make ten patients; of another cohort, and one has a name of the study
        replace(tested[0], slide_id=name, patient_id=f"stranger-{n}", fingerprint="ab" * 32, grade=n % 5)
        for n, name in enumerate((recorded(trained).used[0].slide_id, *map(str, range(11))))
    ]
    write_predictions(tmp_path / "kept.csv", [*tested, *others])
    one = tested[0]
    assert one.grade is not None
    corrected = f"{(one.grade + 1) % 5}"
    table = changed(
        study,
        tmp_path / "m.csv",
        lambda row: {**row, "grade": corrected} if row["slide_id"] == one.slide_id else row,
    )
    values = yaml.safe_load((best(trained).parent.parent / "config.yaml").read_text())
    values["data"]["manifest"] = str(table.manifest)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    words = ["export", str(best(trained)), "--output", str(tmp_path / "m.pt")]
    words += ["--evidence", str(tmp_path / "kept.csv")]
    assert main([*words, "--config", str(tmp_path / "config.yaml")]) == 2
    said = f"1 of another grade: {one.slide_id} ({corrected}, was {one.grade});"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "m.pt").exists()
    assert main(words) == 0


@pytest.mark.slow
def test_a_second_stage_keeps_the_parts_of_the_first(
    study: Study,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By another seed, patients of the first training would be tested."""
    first = recorded(trained)
    options = [*study.options(tmp_path), f"--model.backbone.pretrained={best(trained)}"]
    with pytest.warns(UserWarning, match="of 20 slides take the part that their patient had in the training"):
        assert main(["fit", *options, "--trainer.max_epochs=1", "--data.seed=1"]) == 0
    assert main(["test", *options]) == 0
    second = recorded(tmp_path)
    assert {one: part(second, one) for one in ("train", "val", "test")} == {
        one: part(first, one) for one in ("train", "val", "test")
    }
    assert second.before == first.used and len(first.used) == 15
    everyone = changed(study, tmp_path / "e.csv", lambda row: {**row, "split": "test"})
    stage_three = rewritten(
        tmp_path, tmp_path / "three.ckpt", lambda checkpoint: checkpoint["record"].update(slides=[])
    )
    code, _ = run("test", everyone, tmp_path / "x", stage_three, "--data.split_from=external")
    assert code == 2 and "trained or chosen on 15 of the slides" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "of", "options", "message"),
    [
        ("test", "val", (), "the initial weights were trained or chosen on 1 of the slides of the test part"),
        ("val", "train", (), "the initial weights were trained or chosen on 1 of the slides of the val part"),
        (
            "test",
            "train",
            ("SharedWeights", "--model.transfer.start_from=random"),
            "the initial weights were",
        ),
        ("test", "train", ("Scratch",), ""),
    ],
)
def test_a_second_stage_tests_nobody_of_the_first(
    to: str,
    of: str,
    options: tuple[str, ...],
    message: str,
    study: Study,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    part_of = {slide.slide_id: slide.part for slide in recorded(trained).slides}
    part_of[part(recorded(trained), of)[-1]] = to
    moved = changed(study, tmp_path / "m.csv", lambda row: {**row, "split": part_of[row["slide_id"]]})
    words = [*moved.options(tmp_path), f"--model.backbone.pretrained={best(trained)}"]
    words += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--data.every_grade=false"]
    if options:
        words += [f"--model.transfer=slidetl.models.transfer.{options[0]}", *options[1:]]
    assert main(["fit", *words]) == (2 if message else 0)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_training_keeps_its_data_and_seed(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--trainer.max_epochs=3", "--data.num_workers=1", "--data.chunk_size=64")
    others = ("--data.bag_size=4", "--seed_everything=3")
    assert run("fit", study, tmp_path / "a", best(trained), *more, *others)[0] == 2
    assert (
        "was trained with data.bag_size 8, the configuration says 4; seed_everything 0, the configuration "
        "says 3; use the configuration of that training"
    ) in capsys.readouterr().err
    assert run("fit", study, tmp_path / "b", best(trained), *more)[0] == 0
    last = best(tmp_path / "b").with_name("last.ckpt")
    assert run("fit", study, tmp_path / "b", last, *more)[0] == 0  # no epoch is left
    assert (tmp_path / "b" / "logs" / "version_1").is_dir()
    assert find_checkpoint(tmp_path / "b") == best(tmp_path / "b")


def test_a_resumed_training_knows_a_best_epoch_of_weights_alone(study: Study, tmp_path: Path) -> None:
    """Before, it was said to be gone, and the best of the other epochs was kept."""
    options = ("--checkpoint.save_weights_only=true", "--trainer.limit_train_batches=1")
    words = ["fit", *study.options(tmp_path), *options]
    assert main([*words, "--trainer.max_epochs=1"]) == 0
    first, last = best(tmp_path), best(tmp_path).with_name("last.ckpt")
    kept, resumed = (torch.load(path, weights_only=True) for path in (first, last))
    kept["metrics"]["val/rps"] = 0.0  # no other epoch is better
    state = next(found for found in resumed["callbacks"].values() if found.get("monitor"))
    score = torch.zeros(())
    state.update(best_k_models={str(first): score}, best_model_score=score, kth_value=score)
    torch.save(resumed, last)
    more = [*words, "--trainer.max_epochs=2", f"--ckpt_path={last}"]
    for is_other in (False, True):
        kept["metrics"]["val/rps"] += 0.1 * is_other
        torch.save(kept, first)
        with pytest.warns(UserWarning, match="of this training") if is_other else nullcontext():
            assert main(more) == 0  # warnings are errors
        assert torch.load(find_checkpoint(tmp_path), weights_only=True)["epoch"] == is_other


@pytest.mark.slow
def test_a_resumed_training_keeps_its_processes(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, rates and penalties went on at another place of the schedule."""
    four = rewritten(trained, tmp_path / "4.ckpt", lambda found: found["step"].update(processes=4))
    more = "--trainer.max_epochs=3"
    for checkpoint, accumulated, then in ((four, 1, "4 as"), (best(trained), 2, "1 as")):
        options = (more, f"--trainer.accumulate_grad_batches={accumulated}")
        assert run("fit", study, tmp_path / "a", checkpoint, *options)[0] == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"was trained with {then} trainer.devices x num_nodes" in said
        assert f"this training has 1 as trainer.devices x num_nodes and {accumulated} as" in said
    two = rewritten(trained, tmp_path / "2.ckpt", lambda found: found["step"].update(processes=2))
    as_many = (more, "--trainer.accumulate_grad_batches=2")
    assert run("fit", study, tmp_path / "two", two, *as_many)[0] == 0
    within = torch.load(two, weights_only=True)
    within["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
    torch.save(within, two)
    assert run("fit", study, tmp_path / "within", two, *as_many)[0] == 2
    assert "it would go on at another place of its epoch" in capsys.readouterr().err
    older = rewritten(trained, tmp_path / "older.ckpt", lambda found: found.pop("step"))
    assert run("fit", study, tmp_path / "b", older, more)[0] == 0
    wrong = rewritten(trained, tmp_path / "wrong.ckpt", lambda found: found.update(step={"processes": 1}))
    assert run("fit", study, tmp_path / "c", wrong, more)[0] == 2
    assert "has no 'accumulate_grad_batches'" in capsys.readouterr().err


def test_the_batches_of_a_step_are_those_of_the_configuration(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], lab: list[str]
) -> None:
    """Before, a schedule ended at another step than its training, which could not be resumed."""
    callback = "--trainer.callbacks+="
    scheduler = f"{callback}pytorch_lightning.callbacks.GradientAccumulationScheduler"
    scheduled = [*study.options(tmp_path / "scheduled"), scheduler, "--trainer.callbacks.scheduling={0: 2}"]
    assert main(["fit", *scheduled]) == 2
    assert "set trainer.accumulate_grad_batches" in capsys.readouterr().err.splitlines()[-1]
    words = ["fit", *study.options(tmp_path), *lab, f"{callback}poollab.Accumulated"]
    words += ["--trainer.limit_train_batches=2"]
    assert main([*words, "--trainer.max_epochs=1"]) == 0
    last = best(tmp_path).with_name("last.ckpt")
    kept = torch.load(last, weights_only=True)
    assert (kept["global_step"], kept["step"]["accumulate_grad_batches"]) == (1, 1)
    assert main([*words, "--trainer.max_epochs=2", f"--ckpt_path={last}"]) == 0


@pytest.mark.slow
def test_a_training_of_an_older_version_is_resumed_by_its_configuration(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((best(trained).parents[1] / "config.yaml").read_text())
    for added in ("pooling", "preset"):
        del config["model"]["backbone"][added]
    config["data"]["augmentation"] = asdict(Augmentation())

    def age(checkpoint: dict[str, Any]) -> None:
        checkpoint["record"]["config"] = config_sha256(config)
        del checkpoint["options"]

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    older = rewritten(trained, tmp_path / "run" / "checkpoints" / "last.ckpt", age)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    more = ("--trainer.max_epochs=3", "--data.chunk_size=64")
    assert run("fit", study, tmp_path / "a", older, *more, "--data.bag_size=4")[0] == 2
    assert "was trained with data.bag_size 8, the configuration says 4" in capsys.readouterr().err
    assert run("fit", study, tmp_path / "b", older, *more)[0] == 0
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.warns(UserWarning, match="nothing shows that data and seed are those of its training"):
        assert run("fit", study, tmp_path / "c", older, *more)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["test", "fit", "predict"])
def test_a_checkpoint_of_an_older_version(
    command: str, study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = rewritten(trained, tmp_path / "older.ckpt", lambda checkpoint: checkpoint.pop("record"))
    code, graded = run(command, study, tmp_path, older)
    if command == "predict":
        assert code == 0 and len(graded) == 20
    else:
        assert code == 2 and "of an older version, without a record" in capsys.readouterr().err


def test_a_checkpoint_without_progress_is_one_line(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = rewritten(trained, tmp_path / "bare.ckpt", lambda checkpoint: checkpoint.update(loops={}))
    assert run("fit", study, tmp_path, bare)[0] == 2
    assert "no training can resume from it, it lacks the progress of its loops" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_that_are_not_finite_grade_nothing(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        name = next(name for name, value in weights.items() if value.ndim == 4)
        weights[name] = weights[name] * float("nan")

    nan = rewritten(trained, tmp_path / "nan.ckpt", diverge)
    for command in ("test", "predict"):
        assert run(command, study, tmp_path, nan) == (2, set())
        assert "has values that are not finite" in capsys.readouterr().err
    assert main(["export", str(nan), "--output", str(tmp_path / "m.pt"), "--no-training-data"]) == 2
    assert "has values that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "model: {lr: 0.5}\ntrainer: {}\nmodel: {tasks: []}",
            "'model' is on line 1 and again on line 3, and",
        ),
        (
            "data: {tasks: [{name: site, column: site, grades: [a, b]}]}",
            'linked "data.tasks" must be given via "model.tasks"',
        ),
        ("model.grades: [F0, F1]", 'linked "model.grades" must be given via "data.grades"'),
    ],
)
def test_nothing_in_a_configuration_is_dropped(
    command: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    words = ["--data.manifest=m.csv", f"--data.cache={tmp_path}", f"--trainer.default_root_dir={tmp_path}"]
    assert main([command, "--config", str(tmp_path / "c.yaml"), *words]) == 2
    assert f"c.yaml: {said}" in capsys.readouterr().err


def test_the_network_of_another_fit_in_the_folder_is_not_tested(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, whatever model a configuration named, the latest network of the folder was tested."""
    root = tmp_path / "run"
    shutil.copytree(trained, root)
    shutil.copytree(root / "logs" / "version_0", root / "logs" / "version_1")
    latest = root / "logs" / "version_1" / "checkpoints" / "best.ckpt"
    (tmp_path / "c.yaml").write_text(
        "model: {lr: 0.5, transfer: {class_path: slidetl.models.transfer.Scratch}}"
    )
    words = study.options(root)
    said = f"{latest}, of the latest fit in this folder, was trained with model."
    for command in ("test", "predict"):
        assert main([command, "--config", str(tmp_path / "c.yaml"), *words]) == 2
        assert (
            f"{said}transfer.class_path slidetl.models.transfer.WarmRestart, the configuration says "
            "slidetl.models.transfer.Scratch; model.lr 0.001, the configuration says 0.5; "
            "name the checkpoint of another fit by --ckpt_path"
        ) in capsys.readouterr().err
    words = [word for word in words if not word.startswith("--model.backbone")]
    assert main(["test", *words, "--model.backbone.preset=kaiko-s16"]) == 2
    assert (
        f"{said}backbone.name mobilenetv3_small_050, the configuration says hf-hub:"
        in capsys.readouterr().err
    )
    named = [*study.options(tmp_path), f"--ckpt_path={best(trained)}"]
    assert main(["validate", "--config", str(tmp_path / "c.yaml"), *named]) == 0
    assert main(["validate", "--config", str(latest.parents[1] / "config.yaml")]) == 0


def test_the_only_fit_of_a_folder_is_tested_whatever_options_of_it_replaced_those_of_a_file(
    study: Study, trained: Path, tmp_path: Path
) -> None:
    """Before, the shipped file of a fit with ``--model.backbone.pretrained`` could not test it."""
    words = [word for word in study.options(trained) if not word.startswith("--model.backbone")]
    (tmp_path / "c.yaml").write_text(
        "model: {lr: 0.5, backbone: {preset: kaiko-s16, pretrained: source.ckpt}}"
    )
    said = (
        "best.ckpt, of the only fit in this folder, was trained with model.backbone.name mobilenetv3_.*, "
        "the configuration says hf-hub:1aurent/.*; model.backbone.pretrained .*, the configuration says "
        "source.ckpt; .*; model.lr 0.001, the configuration says 0.5; the options of its training are taken"
    )
    with pytest.warns(UserWarning, match=said):
        assert main(["validate", "--config", str(tmp_path / "c.yaml"), *words]) == 0


def test_an_epoch_is_chosen_by_a_proper_score(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = next(
        state
        for state in torch.load(best(trained), weights_only=True)["callbacks"].values()
        if state.get("monitor")
    )
    assert state["monitor"] == "val/rps"
    stopping = "--trainer.callbacks+=pytorch_lightning.callbacks.EarlyStopping"
    for words, said in (
        (["--checkpoint.monitor=val/qwk"], "val/qwk is better when higher; set checkpoint.mode max"),
        (["--checkpoint.monitor=val/auroc_above_2"], "better when higher; set checkpoint.mode max"),
        (["--checkpoint.mode=max"], "val/rps is better when lower; set checkpoint.mode min"),
        (["--early_stopping.mode=max"], "val/rps is better when lower; set early_stopping.mode min"),
        (
            [stopping, "--trainer.callbacks.monitor=val/accuracy"],
            "val/accuracy is better when higher; set early_stopping.mode max",
        ),
        # Before, a traceback after the first epoch.
        (["--early_stopping.monitor=val/rsp"], "early_stopping.monitor must be one of val/accuracy, "),
        (["--checkpoint.monitor=val/auroc_above_4", "--checkpoint.mode=max"], "val/auroc_above_3, not val/"),
        (["--trainer.limit_val_batches=0"], "early_stopping.monitor val/rps needs the validation, which"),
    ):
        assert main(["fit", *study.options(tmp_path), *words]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "steps", "validated"),
    [
        (["--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2"], 9, [5, 8]),
        (["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=8"], 3, [2]),
        (["--trainer.max_steps=5"], 5, [2, 4]),
        (["--trainer.max_steps=2"], 2, [1]),  # before, a traceback
    ],
)
def test_the_end_of_a_training_is_validated(
    study: Study, tmp_path: Path, words: list[str], steps: int, validated: list[int]
) -> None:
    assert main(["fit", *study.options(tmp_path), *words]) == 0
    last = best(tmp_path).with_name("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == steps
    with best(tmp_path).parents[1].joinpath("metrics.csv").open(newline="") as file:
        scores = {int(row["step"]): float(row["val/rps"]) for row in csv.DictReader(file) if row["val/rps"]}
    assert list(scores) == validated  # steps from 0
    chosen = torch.load(find_checkpoint(tmp_path), weights_only=True)
    assert chosen["global_step"] - 1 == min(scores, key=scores.__getitem__)


def test_a_training_without_a_checkpoint_of_its_own_fails(
    study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, it was marked as complete, and a test took the network of an earlier fit."""
    root = tmp_path / "run"
    shutil.copytree(trained, root)
    for words, said in (
        (["--trainer.max_time=00:00:00:00"], "after 0 steps and has kept no checkpoint; raise trainer.max_t"),
        (
            ["--trainer.limit_train_batches=0"],
            "after 0 steps and has kept no checkpoint; raise trainer.max_t",
        ),
        (
            ["--trainer.max_epochs=1", "--last_checkpoint.every_n_epochs=2"],
            "after 3 steps and has kept no checkpoint; see the options last_checkpoint",
        ),
    ):
        assert main(["fit", *study.options(root), *words]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
        assert main(["test", *study.options(root)]) == 2
        assert "the latest fit has not ended its first epoch" in capsys.readouterr().err
    for words in (["--trainer.logger=false"], [f"--last_checkpoint.dirpath={tmp_path / 'elsewhere'}"]):
        assert main(["fit", *study.options(root), *words]) == 2
        assert "would take those of an earlier fit" in capsys.readouterr().err
    elsewhere = [*study.options(tmp_path / "new"), "--trainer.logger=false", "--trainer.max_epochs=1"]
    assert main(["fit", *elsewhere]) == 0


def test_a_fit_beside_an_unfinished_one_says_how_to_resume(
    study: Study, trained: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(trained, root)
    last = best(root).with_name("last.ckpt")
    last.with_name(COMPLETE).unlink()
    words = ["fit", *study.options(root), "--trainer.limit_train_batches=1", "--trainer.max_epochs=1"]
    with pytest.warns(UserWarning, match=f"--ckpt_path {re.escape(str(last))} resumes it, and this one"):
        assert main(words) == 0
    latest = Path(str(last).replace("version_0", "version_1"))
    latest.with_name(COMPLETE).unlink()
    assert main([*words, f"--ckpt_path={latest}"]) == 0  # warnings are errors
    assert find_checkpoint(root) == latest.with_name("best.ckpt")
    assert main(words) == 0


@pytest.mark.parametrize("command", ["test", "predict"])
def test_results_that_cannot_be_written_are_not_computed(
    command: str,
    study: Study,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / command).write_text("in the way, as a folder of someone else")
    graded: list[object] = []
    monkeypatch.setattr(SlideGrader, f"{command}_step", lambda *batch: graded.append(batch))
    assert main([command, *study.options(tmp_path), f"--ckpt_path={best(trained)}"]) == 2
    assert "predictions.csv: cannot be written" in capsys.readouterr().err.splitlines()[-1]
    assert not graded


def test_two_fits_begun_together_have_a_folder_each(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the second wrote over the checkpoints of the first, and both ended with exit code 0."""
    words = ["fit", *study.options(tmp_path)]

    def meet(cli: GradingCLI) -> None:
        found.append([logger.version for logger in cli.trainer.loggers])
        if len(found) == 1:
            assert main(words) == 2
        raise UsageError("before the first file")

    found: list[list[Any]] = []
    monkeypatch.setattr(GradingCLI, "before_fit", meet)
    assert main(words) == 2
    assert found == [[0, 0], [1, 1]]
    assert not list(tmp_path.glob("logs/*"))  # no fit that a test would wait for


def test_a_metric_of_an_own_callback_may_be_monitored(study: Study, tmp_path: Path, lab: list[str]) -> None:
    own = [*lab, "--trainer.callbacks+=poollab.Kept", "--checkpoint.monitor=val/kept"]
    assert main(["fit", *study.options(tmp_path), *own, "--trainer.max_epochs=1"]) == 0
    assert find_checkpoint(tmp_path) == best(tmp_path)


def test_a_slurm_job_that_lightning_refuses_is_one_line(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert main(["fit", *study.options(tmp_path)]) == 2
    assert "You set `--ntasks=8` in your SLURM bash script" in capsys.readouterr().err.splitlines()[-1]


SLURM_JOB = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "fit", "SLURM_PROCID": "0"}
SLURM_JOB |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_RESTART_COUNT": "0"}


def test_a_requeued_job_goes_on_from_its_checkpoint_as_from_any_other(
    study: Study,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before, Lightning took the file by itself: with another configuration, and in a new training too."""
    root = tmp_path / "run"
    shutil.copytree(trained, root)
    for number in (9, 10):  # Lightning counts on from the last
        shutil.copy(best(trained).with_name("last.ckpt"), root / f"hpc_ckpt_{number}.ckpt")
    left, named = root / "hpc_ckpt_10.ckpt", best(root)
    for name, value in SLURM_JOB.items():
        monkeypatch.setenv(name, value)

    def resumed(*options: str) -> str:
        assert main(["fit", *study.options(root), "--data.bag_size=4", *options]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    said = "was trained with data.bag_size 8, the configuration says 4"
    assert f"{left} {said}" in resumed()
    assert f"{named} {said}" in resumed(f"--ckpt_path={named}")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert f"{left} {said}" in resumed(f"--ckpt_path={named}")
    os.utime(named, (time.time() + 60,) * 2)
    assert f"{named} {said}" in resumed(f"--ckpt_path={named}")
    assert main(["fit", *study.options(root), "--trainer.max_epochs=3"]) == 0
    with (root / "logs" / "version_1" / "metrics.csv").open(newline="") as file:
        assert {row["epoch"] for row in csv.DictReader(file)} - {""} == {"2"}
    assert not list(root.glob("hpc_ckpt_*"))
    # Before, a test with this file took the checkpoint that was resumed.
    assert yaml.safe_load((root / "logs" / "version_1" / "config.yaml").read_text())["ckpt_path"] is None


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_is_named_on_the_command_line_alone(
    command: str, study: Study, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((best(trained).parents[1] / "config.yaml").read_text())
    config["ckpt_path"] = str(best(trained))  # as resumed fits wrote
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = [f"--config={tmp_path / 'config.yaml'}", *study.options(tmp_path / "none")]
    assert main([command, *words]) == 2
    assert f"--ckpt_path {best(trained)}, or --ckpt_path null to " in capsys.readouterr().err
    words.append("--data.manifest=none.csv")
    for null in ([*words, "--ckpt_path=null"], ["--ckpt_path=null", *words]):
        assert main([command, *null]) == 2
        said = "none.csv: " if command == "fit" else "no checkpoint of 'slidetl fit' below"
        assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("of_file", [None, "other.ckpt"])
def test_a_file_after_the_checkpoint_does_not_replace_it(
    command: str, of_file: str | None, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, another network was tested, or a training began anew, without a word."""
    config = yaml.safe_load((best(trained).parents[1] / "config.yaml").read_text())
    config["trainer"]["default_root_dir"] = str(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "ckpt_path": of_file}))
    words = ["--ckpt_path", "named.ckpt", "--config", str(tmp_path / "config.yaml")]
    for ordered in (words, words[2:] + words[:2]):
        assert main([command, *ordered]) == 2
        assert "named.ckpt: " in capsys.readouterr().err.splitlines()[-1]


LAB = """
from pytorch_lightning import Callback
from torch import Tensor

from slidetl.models.aggregators import Aggregated, MeanPooling


class Named(MeanPooling):
    def __init__(self, in_features: int, kind: str = "gelu", sizes: list[int] = [1, 2]) -> None:
        super().__init__(in_features)


class Starred(Named):
    def forward(self, *bag: Tensor) -> Aggregated:
        return super().forward(*bag)


class Kept(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/kept", 1.0, batch_size=1)


class Accumulated(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        trainer.accumulate_grad_batches = 2


class Nested(MeanPooling):
    def __init__(self, in_features: int, sizes: dict[str, int] = {"a": 1}) -> None:
        super().__init__(in_features)
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "poollab.py").write_text(LAB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "poollab", raising=False)
    return ["--allow", "poollab"]


def test_a_network_with_an_own_aggregator_is_tested_and_exported(
    study: Study, tmp_path: Path, lab: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """After the training, its texts were taken for names of classes in every command."""
    root, model = tmp_path / "run", tmp_path / "m.pt"
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--data.chunk_size=8"]
    words = [*study.options(root), *lab]
    export = ["export", str(root), "--output", str(model), "--no-training-data", *lab]
    assert main(["fit", *words, *few, "--model.aggregator=poollab.Named"]) == 0  # warnings are errors
    assert main(["test", *words]) == 0
    assert main(export) == 0 and model.is_file()
    model.unlink()
    with pytest.warns(UserWarning, match="'slidetl export' cannot write this network"):
        assert main(["fit", *words, *few, "--model.aggregator=poollab.Starred"]) == 0
    capsys.readouterr()
    assert main(export) == 2 and not model.exists()
    assert "can't take variable number of arguments" in capsys.readouterr().err.splitlines()[-1]


def test_a_network_that_no_checkpoint_brings_back_is_not_trained(
    study: Study, tmp_path: Path, lab: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *study.options(tmp_path / "run"), *lab, "--model.aggregator=poollab.Nested"]) == 2
    assert (
        "no checkpoint of this training could be read: expected plain values, or lists of them, as init_args "
        "of aggregator, found 'sizes': {'a': 1}"
    ) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_metric_that_the_part_leaves_undefined_is_one_line(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def give_part(row: dict[str, str]) -> dict[str, str]:
        return {**row, "split": "val" if row["grade"] == "0" else "train"}

    two = changed(study, tmp_path / "m.csv", give_part)
    words = [*two.options(tmp_path), "--trainer.max_epochs=1", "--data.every_grade=false"]
    words += ["--early_stopping.monitor=val/auroc_above_0", "--early_stopping.mode=max"]
    assert main(["fit", *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "conditioned on metric `val/auroc_above_0` which is not available" in said and "`val/rps`" in said


def test_a_validation_that_is_never_finite_chooses_no_epoch(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the first epoch was kept, and the exit code was 0."""
    found = CumulativeLink.probabilities
    calls: list[int] = []

    def overflow(self: CumulativeLink, logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        return found(self, logits * (float("nan") if calls[-1] % 5 == 0 else 1))  # one of five slides

    monkeypatch.setattr(CumulativeLink, "probabilities", overflow)
    with pytest.warns(UserWarning, match=r"1 slides of the val part are not graded \(slide-"):
        assert main(["fit", *study.options(tmp_path), "--trainer.max_epochs=2"]) == 2
    assert len(calls) == 10
    assert "after no epoch was val/rps a number" in capsys.readouterr().err.splitlines()[-1]


def test_metrics_count_the_slides_that_are_not_graded(trained: Path) -> None:
    assert json.loads((trained / "test" / "metrics.json").read_text())["not_graded"] == []


def test_a_training_keeps_its_progress(trained: Path) -> None:
    found = json.loads((trained / "status.json").read_text())
    assert (found["stage"], found["done"], found["total"], found["unit"]) == ("training", 2, 2, "epochs")
    assert (found["command"], found["state"], found["exit_code"]) == ("fit", "done", 0)
    assert {"train/loss", "val/rps"} <= found["metrics"].keys()


@pytest.mark.slow  # a training of a transformer
def test_a_preset_is_recorded_as_its_fields_and_its_tiles_are_compared(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--model.transfer=slidetl.models.transfer.Scratch",
        "--trainer.limit_val_batches=1",
        "--trainer.limit_train_batches=1",
    ]
    of_study = [word for word in study.options(tmp_path) if not word.startswith("--model.backbone")]
    words = ["fit", *of_study, *options, "--trainer.max_epochs=1", "--data.bag_size=1"]
    assert main([*words, "--model.backbone.preset=h0-mini"]) == 2
    assert "(patches of 14 px) takes no tiles of 64 px; cut tiles of 56 or 70 px" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="kaiko-s16 was trained on tiles of 224 px, these have 64"):
        assert main([*words, "--model.backbone.preset=kaiko-s16"]) == 0
    (last,) = tmp_path.glob("logs/version_*/checkpoints/last.ckpt")
    backbone = read_checkpoint(last)["hyper_parameters"]["backbone"]
    assert backbone["name"].startswith("hf-hub:1aurent/vit_small_patch16_224.kaiko")
    assert (backbone["pretrained"], backbone["pooling"], backbone["preset"]) == ("hub", "token", "")


def parsed_trainer(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the options ``trainer`` that a command takes."""

    def stop(cli: GradingCLI) -> None:
        found.append(cli.config[cli.config.subcommand].trainer)
        raise UsageError("parsed")

    found: list[Any] = []
    monkeypatch.setattr(GradingCLI, "_parse_ckpt_path", stop)
    assert main([*words, "--data.manifest=m.csv", "--data.cache=cache"]) == 2
    (trainer,) = found
    return trainer


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_command_takes_one_device_unless_told_otherwise(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's default takes every GPU of a machine, with so many times the slides per step."""
    assert parsed_trainer([command], monkeypatch).devices == 1
    assert parsed_trainer([command, "--trainer.devices=2"], monkeypatch).devices == "2"
    for started in ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE"):  # by srun and torchrun
        with monkeypatch.context() as patch:
            patch.setenv(started, "4")
            assert parsed_trainer([command], patch).devices == "auto"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # srun --ntasks=1 torchrun --nproc-per-node=4
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parsed_trainer([command], monkeypatch).devices == "auto"


def test_processes_of_torchrun_do_not_train_each_for_itself(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["fit", *study.options(tmp_path), "--trainer.devices=1"]) == 2
    assert "torchrun started 4 processes, and each would do all" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "precision"),
    [
        (["fit"], "bf16-mixed"),
        (["fit", "--trainer.accelerator=cpu"], "32-true"),
        (["fit", "--trainer.accelerator=cpu", "--trainer.precision=bf16-mixed"], "bf16-mixed"),
        (["test"], "bf16-mixed"),
        (["test", "--trainer.precision=32-true"], "32-true"),
        (["test", "--precision=float32"], "32-true"),
        (["test", "--trainer.accelerator=cpu"], "32-true"),
        (["predict", "--trainer.accelerator=cpu", "--trainer.precision=bf16-mixed"], "32-true"),
        (["validate", "--trainer.accelerator=cpu", "--precision=bfloat16"], "bf16-mixed"),
    ],
)
def test_the_precision_is_that_of_the_device(
    words: list[str], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slidetl.training.configured.has_bfloat16", lambda _: True)
    assert parsed_trainer(words, monkeypatch).precision == precision


@pytest.mark.parametrize(
    ("words", "on_old_gpu", "on_cpu"),
    [
        (["fit"], "32-true", "32-true"),
        (["test"], "32-true", "32-true"),
        (["test", "--trainer.precision=16-mixed"], "16-mixed", "32-true"),
        (["test", "--trainer.precision=bf16-mixed"], "bf16-mixed", "32-true"),
        (["test", "--trainer.precision=16-mixed", "--trainer.accelerator=cpu"], "32-true", "32-true"),
        (["test", "--trainer.precision=16-mixed", "--precision=float32"], "32-true", "32-true"),
    ],
)
def test_a_gpu_without_bfloat16_computes_in_the_precision_that_is_named(
    words: list[str], on_old_gpu: str, on_cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slidetl.training.configured.has_bfloat16", lambda _: False)
    for has_gpu, precision in ((True, on_old_gpu), (False, on_cpu)):
        monkeypatch.setattr("torch.cuda.is_available", lambda found=has_gpu: found)
        assert parsed_trainer(words, monkeypatch).precision == precision


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_training_is_not_done(
    study: Study, tmp_path: Path, sign: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning ends a training on SIGTERM with exit code 0, and on Ctrl-C with 1."""
    words = [*study.options(tmp_path), "--data.num_workers=1", "--trainer.max_epochs=1000"]
    words += ["--early_stopping.patience=1000", f"--status={tmp_path / 'status.json'}"]
    with subprocess.Popen(
        [sys.executable, "-m", "slidetl", "fit", *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    ) as process:
        last, deadline = best(tmp_path).with_name("last.ckpt"), time.monotonic() + 240
        try:
            while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            os.killpg(process.pid, sign)  # as a scheduler does: the workers of the loader, too
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    code = 128 + sign
    assert process.returncode == code, said
    assert said.splitlines()[-1] == f"slidetl: interrupted; resume with --ckpt_path {last}"
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["exit_code"]) == ("interrupted", code)
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "m.pt"), "--no-training-data"]) == 2
    assert "the latest fit is not marked as complete" in capsys.readouterr().err
    assert main(["test", *study.options(tmp_path)]) == 2
    assert f"resume it with --ckpt_path {last}" in capsys.readouterr().err
