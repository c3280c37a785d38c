from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slidetl.compare.config import Classical, Comparison, read_comparison, with_values
from slidetl.compare.train_arm import check_recipes
from slidetl.errors import UsageError
from slidetl.evaluation.protocol import Protocol
from slidetl.models.backbones import Backbone
from slidetl.models.spec import BackboneSpec
from slidetl.training.configured import build_grader, parse_training
from tests.contracts.strategy import fit

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "compare").glob("*.yaml"))

PLAIN = """
manifest: m.csv
cache: c
protocol: {outer_folds: 4, inner_folds: 2, unit: mean}
primary: {arm: warm, against: scratch}
base:
  data: {bag_size: 8}
  model: {lr: 1.0e-3, transfer: {class_path: A, init_args: {x: 1, y: 2}}}
arms:
  scratch: {fit: {model: {transfer: {class_path: B}}}}
  warm:
    fit: {model: {transfer: {init_args: {x: 3}}}, trainer: {max_epochs: 2}}
    choices: {model.lr: [1.0e-3, 1.0e-2], data.bag_size: [4, 8]}
  ridge: {classical: {features: [r]}}
  prior: {baseline: prior}
"""


def read(text: str, tmp_path: Path) -> Comparison:
    path = tmp_path / "compare.yaml"
    path.write_text(text)
    return read_comparison(path)


def test_arms_are_the_base_and_what_differs(tmp_path: Path) -> None:
    comparison = read(PLAIN, tmp_path)
    assert comparison.protocol == Protocol(outer_folds=4, inner_folds=2, unit="mean")
    assert comparison.fit_config("warm") == {
        "data": {"bag_size": 8},
        "model": {"lr": 1e-3, "transfer": {"class_path": "A", "init_args": {"x": 3, "y": 2}}},
        "trainer": {"max_epochs": 2},
    }
    # The arguments of one class are not those of another.
    assert comparison.fit_config("scratch")["model"]["transfer"] == {"class_path": "B"}
    assert comparison.arms["ridge"].classical == Classical(["r"])


def test_a_preset_is_written_out(tmp_path: Path) -> None:
    text = PLAIN.replace("lr: 1.0e-3,", "lr: 1.0e-3, backbone: {preset: uni2-h, pretrained: w.bin},")
    backbone = read(text, tmp_path).fit_config("warm")["model"]["backbone"]
    assert backbone["name"] == "hf-hub:MahmoodLab/UNI2-h" and backbone["gated_mlp"] is True
    assert (backbone["pretrained"], backbone["preset"]) == ("w.bin", "")


def test_choices_are_tried_in_every_combination(tmp_path: Path) -> None:
    comparison = read(PLAIN, tmp_path)
    trials = comparison.trials("warm")
    assert [tuple(trial.values()) for trial in trials] == [(1e-3, 4), (1e-3, 8), (1e-2, 4), (1e-2, 8)]
    assert comparison.trials("scratch") == [{}]
    base = comparison.fit_config("warm")
    changed = with_values(base, trials[2])
    assert (changed["model"]["lr"], changed["data"]["bag_size"]) == (1e-2, 4)
    assert base["data"]["bag_size"] == 8


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{arm: warm", "{arm: wram", "no arm 'wram'; there are scratch, warm, ridge, prior"),
        ("against: scratch", "against: warm", "compared with itself"),
        ("outer_folds: 4", "outer_folds: 1", "outer_folds >= 2"),
        ("outer_folds: 4", "outre_folds: 4", "outre_folds"),
        ("unit: mean", "unit: meen", "unit"),
        ("inner_folds: 2", "inner_folds: 0", "'warm' has choices, but protocol.inner_folds is 0"),
        ("baseline: prior", "baseline: pryor", "baseline"),
        ("{baseline: prior}", "{}", "exactly|one of fit, classical and baseline"),
        ("{baseline: prior}", "{baseline: prior, classical: {features: [r]}}", "one of fit, classical and"),
        ("  data: {bag_size: 8}", "  date: {bag_size: 8}", "base: expected model, data, trainer, found date"),
        ("model.lr: [1.0e-3, 1.0e-2]", "lr: [1.0e-3]", "a name such as model.lr"),
        ("features: [r]", "features: []", "expected stored features"),
        ("{baseline: prior}", "{class_path: antigravity.X}", "Importing 'antigravity.X' is not allowed"),
        ("  prior: {", "  a prior: {", "letters, digits"),
        ("cache: c", "cache: [", "expected the YAML of a comparison"),
        ("cache: c", "cache: c\nreferral_risks: [0.1, 1]", "referral_risks must lie between 0 and 1, not 1"),
        ("cache: c", "cache: c\nsizes: {subsets: 0}", "sizes.subsets must be at least 1, not 0"),
        ("against: scratch", "against: scratch, margin: 0", "primary.margin must be a number above 0, not 0"),
        ("choices: {", "choices: {trainer.max_epochs: [9, null], ", "must be at least 1, not None"),
        ("max_epochs: 2", "max_epochs: -1", "max_epochs must be at least 1, not -1"),
    ],
)
def test_what_cannot_be_meant_is_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in PLAIN
    with pytest.raises(UsageError, match=message) as caught:
        read(PLAIN.replace(old, new), tmp_path)
    assert "\n" not in str(caught.value)


RESERVED = (
    *("data.manifest", "data.cache", "data.grades", "data.seed", "model.grades"),
    "trainer.check_val_every_n_epoch",
)


@pytest.mark.parametrize("name", [*RESERVED, "data.tasks", "model.tasks"])
def test_what_the_comparison_sets_is_refused(name: str, tmp_path: Path) -> None:
    part, _, key = name.partition(".")
    why = "is set by the comparison itself" if name in RESERVED else "would not be learned"
    for old, new in (
        ("  data: {bag_size: 8}\n  model: {", f"  {part}: {{{key}: 1}}\n  # "),
        ("model: {transfer: {init_args: {x: 3}}}, trainer: {max_epochs: 2}", f"{part}: {{{key}: 1}}"),
        ("choices: {", f"choices: {{{name}: [1, 2, 3], "),
        ("choices: {", f"choices: {{{name}.some: [1, 2, 3], "),
    ):
        assert old in PLAIN
        with pytest.raises(UsageError, match=rf"arm '(scratch|warm)': {name} {why}; leave it out"):
            read(PLAIN.replace(old, new), tmp_path)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("model.lrr: [1.0e-3]", "lrr"),
        ("model.lr: [1.0e-3, fast]", "fast"),
        ("trainer.max_epochs: [10, ten]", r"trainer\.max_epochs"),
        ("trainer.devices: [2]", r"not trainer\.devices 2"),
        ("trainer.logger: [true]", r"trainer\.logger is set by the command itself"),
        ("model.backbone.preset: [uni2-h, uni3-h]", "uni3-h"),
    ],
)
def test_every_trial_is_checked_before_the_first_job(choices: str, message: str, tmp_path: Path) -> None:
    arms = f"{{warm: {{fit: {{}}, choices: {{{choices}}}}}, prior: {{baseline: prior}}}}"
    text = "manifest: m.csv\ncache: c\nprotocol: {inner_folds: 2}\nprimary: {arm: warm, against: prior}\n"
    comparison = read(f"{text}arms: {arms}", tmp_path)
    with pytest.raises(UsageError, match=rf"^arm 'warm': .*{message}"):
        check_recipes(recipes(comparison))


STORED = "{fit: {data: {features: own, bag_size: 0}}}"


def test_options_of_tiles_in_the_base_are_for_the_arms_that_read_tiles(tmp_path: Path) -> None:
    """An arm of its own with them would be the same without: ``slidetl fit`` refuses it too."""
    own = "{fit: {data: {features: own, bag_size: 0, augmentation: {flips: false}}}"
    text = "manifest: m.csv\ncache: c\nprotocol: {inner_folds: 2}\nprimary: {arm: a, against: b}\n"
    base = "base: {data: {augmentation: {brightness: 0.05}}}\n"
    for arm, is_refused in (
        (STORED, False),
        (f"{own}}}", True),
        (f"{own}, choices: {{data.bag_size: [0, 16]}}}}", False),
        (f"{STORED[:-1]}, choices: {{data.augmentation.flips: [true, false]}}}}", True),
        (f"{STORED[:-1]}, choices: {{data.sampling: [null]}}}}", False),
    ):
        arms = f"arms: {{a: {arm}, b: {{baseline: prior}}}}\n"
        if is_refused:
            with pytest.raises(UsageError, match=r"arm 'a': data\.augmentation would have no effect with"):
                read(text + base + arms, tmp_path)
        else:
            check_recipes(recipes(read(text + base + arms, tmp_path)))


def recipes(comparison: Comparison) -> dict[str, dict[str, Any]]:
    return {
        name: {"fit": comparison.fit_config(name), "trials": comparison.trials(name)}
        for name, arm in comparison.arms.items()
        if arm.fit is not None
    }


def test_the_hash_is_of_all_that_is_run_and_of_no_path(tmp_path: Path) -> None:
    comparison = read(PLAIN, tmp_path)
    for old, new in (
        ("cache: c", "cache: d"),
        ("cache: c", "cache: c\nregistered: x.md"),
        ("cache: c", "cache: c\ntile_draws: 8"),
    ):
        assert read(PLAIN.replace(old, new), tmp_path).sha256 == comparison.sha256, new
    for old, new in (
        ("lr: 1.0e-3,", "lr: 2.0e-3,"),
        ("[1.0e-3, 1.0e-2]", "[1.0e-3, 1.0e-1]"),
        ("outer_folds: 4", "outer_folds: 5"),
        ("class_path: B", "class_path: C"),
        ("cache: c", "cache: c\ntile_draws: 9"),
        ("features: [r]", "features: [s]"),
    ):
        assert read(PLAIN.replace(old, new), tmp_path).sha256 != comparison.sha256, new


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected the YAML of a comparison"):
        read_comparison(tmp_path / "none.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_ships_can_be_read(path: Path) -> None:
    comparison = read_comparison(path)
    assert comparison.primary.arm in recipes(comparison)
    check_recipes(recipes(comparison))  # it raises what 'slidetl fit' would


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*have no `val_dataloader`")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_arm_that_ships_can_be_trained(path: Path, tmp_path: Path) -> None:
    """It names layers of its network, among others; its weights are drawn, as those named may not be here."""
    for recipe in recipes(read_comparison(path)).values():
        config = recipe["fit"]
        backbone = config["model"]["backbone"]
        weights = tmp_path / f"{backbone['name']}.pth"
        if not weights.exists():
            torch.save(Backbone(BackboneSpec(backbone["name"])).net.state_dict(), weights)
        backbone["pretrained"] = str(weights)
        grader, _ = build_grader(parse_training(config, tuple("01234"), 0))
        fit(grader, tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[], enable_checkpointing=False)
        assert torch.isfinite(grader.trainer.callback_metrics["train/loss"])


def test_the_founding_experiment_is_there_as_it_was_registered() -> None:
    assert {path.stem for path in CONFIGS} >= {"fibrosis", "fibrosis_quick"}
    founding = read_comparison(next(path for path in CONFIGS if path.stem == "fibrosis"))
    registered = Path(__file__).parents[2] / str(founding.registered)
    assert founding.sha256 in registered.read_text(encoding="utf-8")
    for arm in ("warm", "shared-weights", "shared-activations"):
        assert founding.fit_config(arm)["model"]["transfer"]["init_args"]["batch_statistics"]
