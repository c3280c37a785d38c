"""Turns the choices of a page into commands, and the configurations that they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from slidetl.files import write_whole
from slidetl.models.spec import BackboneSpec
from slidetl.publish.evidence import LEAST_PATIENTS
from slidetl.studio.jobs import Step
from slidetl.studio.paths import Refused
from slidetl.studio.project import Project
from slidetl.studio.texts import say

PRESETS = ("ridge", "warm", "shared", "compare")
_FRACTIONS = {"val_fraction": 0.15, "test_fraction": 0.25}
_NETWORK = BackboneSpec()  # weights of ImageNet come with slidetl


def tile_steps(project: Project) -> tuple[Step, ...]:
    """Returns the command that tiles a project's slides."""
    settings = project.settings
    words = ("tile", "manifest.csv", "--cache", "cache", "--mpp", f"{settings.mpp:g}", "--tile-size")
    more = (str(settings.tile_size_px), "--grades", str(len(settings.grades)), "--preview")
    return (Step((*words, *more), fine=(0, 1)),)


def train_steps(
    project: Project, preset: str, run: str, epochs: int, manifest: str = "manifest.csv"
) -> tuple[Step, ...]:
    """Returns the commands of a preset; a job has a manifest of its own, as the project's may change.

    Raises:
        Refused: an unknown preset, or an impossible number of epochs.
    """
    if preset not in PRESETS or not 1 <= epochs <= 1000:
        raise Refused(say("train.bad"))
    folder, grades = f"runs/{run}", project.settings.grades
    embed = Step(("embed", "cache", "--backbone", _NETWORK.name, "--pretrained", _NETWORK.pretrained))
    if preset == "ridge":
        words = ("fit-features", manifest, "--cache", "cache", "--features", _NETWORK.name)
        more = ("--output", folder, "--pretrained", _NETWORK.pretrained, "--test-fraction")
        return embed, Step((*words, *more, str(_FRACTIONS["test_fraction"]), "--grades", *grades))
    if preset == "compare":
        config = f"{folder}/comparison.yaml"
        return embed, Step(("compare", "--config", config, "--output", folder, "--jobs", "1"))
    fit = Step(("fit", "--config", f"{folder}/training.yaml"))
    return fit, Step(("test", "--config", f"{folder}/training.yaml"))


def train_files(
    project: Project, preset: str, run: str, epochs: int, manifest: str = "manifest.csv"
) -> dict[str, str]:
    """Returns the configurations that :func:`train_steps` name, as YAML by file name."""
    if preset == "compare":
        return {"comparison.yaml": _yaml(_comparison(project, epochs, manifest))}
    if preset == "ridge":
        return {}
    values = {
        "seed_everything": 0,
        "data": {
            "manifest": manifest,
            "cache": "cache",
            "grades": list(project.settings.grades),
            **_DATA,
            **_FRACTIONS,
        },
        "model": {**_model(), "transfer": _TRANSFER[preset]},
        "trainer": {"default_root_dir": f"runs/{run}", "max_epochs": epochs, "enable_progress_bar": False},
        "early_stopping": {"patience": max(5, epochs // 2)},
    }
    return {"training.yaml": _yaml(values)}


def write_files(project: Project, run: str, files: dict[str, str]) -> None:
    """Writes configurations into the folder of a run."""
    for name, text in files.items():
        write_whole(project.folder / "runs" / run / name, text)


def export_steps(run: str, folder: Path, patients: int, licence: str) -> tuple[Step, ...]:
    """Returns the command that exports a run, with its test part as evidence if it is large enough.

    The command finds the best checkpoint, and refuses a training that has not ended.

    Args:
        run: its name.
        folder: of the run.
        patients: of its test part.
        licence: of the weights; may be empty.

    Raises:
        Refused: the run has no checkpoint.
    """
    ridge = folder / "checkpoints" / "ridge.ckpt"
    if not ridge.is_file() and not any(folder.glob("logs/version_*/checkpoints/last.ckpt")):
        raise Refused(say("model.no_checkpoint"))
    found = ridge if ridge.is_file() else folder
    table = predictions_of(folder)
    words = ["export", str(found.relative_to(folder.parents[1])), "--output", f"models/{run}.pt"]
    if table is not None and patients >= LEAST_PATIENTS:
        words += ["--evidence", str(table.relative_to(folder.parents[1]))]
    return (Step((*words, *([f"--licence={licence}"] if licence else []))),)


def predictions_of(folder: Path) -> Path | None:
    """Finds the predictions of a run; None before they are there."""
    places = (folder / "test" / "predictions.csv", folder / "predictions.csv")
    return next((path for path in places if path.is_file()), None)


def relabelled(project: Project, run: str) -> list[str]:
    """Names slides of a run whose patient or grade has changed since it was queued."""
    folder = project.folder / "runs" / run
    manifest = folder / "manifest.csv"  # a run of an older studio has none
    table = manifest if manifest.is_file() else predictions_of(folder)
    return project.relabelled(table) if table is not None else []


_DATA = {"bag_size": 32, "batch_size": 4, "num_workers": 0}
_TRANSFER: dict[str, dict[str, Any]] = {
    "warm": {
        "class_path": "slidetl.models.transfer.WarmRestart",
        "init_args": {"backbone_lr_scale": 0.3, "head_first_epochs": 2},
    },
    "shared": {
        "class_path": "slidetl.models.transfer.SharedBoth",
        "init_args": {"backbone_lr_scale": 0.3, "alpha": 10.0, "weight": 1.0},
    },
}


def _model() -> dict[str, Any]:
    return {"backbone": {"name": _NETWORK.name, "pretrained": _NETWORK.pretrained}, "lr": 2.0e-3}


def _comparison(project: Project, epochs: int, manifest: str) -> dict[str, Any]:
    fits = {name: {"fit": {"model": {"transfer": transfer}}} for name, transfer in _TRANSFER.items()}
    return {
        "manifest": manifest,
        "cache": "cache",
        "grades": list(project.settings.grades),
        "protocol": {"repeats": 1, "outer_folds": 5, "inner_folds": 0, "seed": 0, "unit": "worst"},
        "primary": {"arm": "warm", "against": "ridge", "metric": "qwk"},
        "base": {"data": _DATA, "model": _model(), "trainer": {"max_epochs": epochs}},
        "arms": {
            "ridge": {"classical": {"features": [_NETWORK.name], "model": "ridge", "pool": "mean"}},
            **fits,
            "prior": {"baseline": "prior"},
        },
    }


def _yaml(values: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    return text
