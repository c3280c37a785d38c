from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from slidetl.cli import main
from slidetl.errors import CheckpointError, UsageError
from slidetl.training.best import COMPLETE, NOTHING_LEFT, BestCheckpoint
from slidetl.training.checkpoint import check_resumable, find_checkpoint, load_grader, read_checkpoint


def save(path: Path, hyper_parameters: Any, **others: Any) -> Path:
    torch.save({"hyper_parameters": hyper_parameters, "state_dict": {}, **others}, path)
    return path


EVIL = {"class_path": "evilmod.Head"}
ATTACKS: dict[str, dict[Any, Any]] = {
    "class": {"head": EVIL},
    "bare name": {"head": "evilmod.Head"},
    "file": {"head": "slidetl.yaml"},
    "dotted key": {"head.class_path": "evilmod.Head"},
    "appending key": {"head+": EVIL},
    "nested": {"head": {"class_path": "slidetl.models.heads.CumulativeLink", "init_args": {"x": EVIL}}},
    "list": {"head": {"class_path": "slidetl.models.heads.CumulativeLink", "init_args": {"x": [EVIL]}}},
    "text": {
        "head": {"class_path": "slidetl.models.heads.CumulativeLink", "init_args": {"x": "evilmod.Head"}}
    },
    "dict_kwargs": {
        "head": {"class_path": "slidetl.models.heads.CumulativeLink", "dict_kwargs": {"x": EVIL}}
    },
    "look-alike": {"head": {"class_path": "slidetlevil.Head"}},
    "path": {"head": {"class_path": "slidetl./../evilmod.Head"}},
    "class of the module": {"_class_path": "evilmod.Head"},
    "grades": {"grades": [EVIL]},
    "many grades": {"grades": [str(grade) for grade in range(100_000)]},
    "schedule": {"schedule": EVIL},
    "targets": {"targets": EVIL},
    "value of a target": {"targets": {"smoothing": EVIL}},
    "task": {"tasks": [EVIL]},
    "value of a task": {"tasks": [{"name": "a", "column": "a", "grades": [EVIL]}]},
    "tasks in a file": {"tasks": "slidetl.yaml"},
    "number": {1: EVIL},
}


@pytest.fixture
def evil_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evilmod.py").write_text("raise SystemExit('foreign code ran')")
    (tmp_path / "slidetl.yaml").write_text("class_path: evilmod.Head\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.usefixtures("evil_module")
def test_no_foreign_code_runs(attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "c.ckpt", ATTACKS[attack])
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    for command in (
        ["export", str(path), "--output", str(tmp_path / "m.pt")],
        ["test", "--data.manifest=m", "--data.cache=c", f"--ckpt_path={path}"],
        ["fit", "--data.manifest=m", "--data.cache=c", f"--ckpt_path={path}"],
    ):
        assert main(command) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert "evilmod" not in sys.modules


@pytest.mark.usefixtures("evil_module")
@pytest.mark.parametrize("key", ["hparams", "module_arguments"])
def test_keys_of_old_lightning_versions_are_not_read(key: str, tmp_path: Path) -> None:
    path = save(tmp_path / "c.ckpt", {}, **{key: {"head": EVIL}})
    assert main(["export", str(path), "--output", str(tmp_path / "m.pt")]) == 2
    assert "evilmod" not in sys.modules


def test_allowed_names_pass(tmp_path: Path) -> None:
    arguments = {"width": 3, "kind": "gelu", "sizes": [1, "two"]}
    path = save(tmp_path / "c.ckpt", {"head": {"class_path": "mylab.heads.Head", "init_args": arguments}})
    for allow in (["mylab"], ["mylab.heads"], ["mylab.heads.Head"]):
        assert read_checkpoint(path, allow)["state_dict"] == {}
    for refused in ([], ["mylab.head"]):
        with pytest.raises(
            CheckpointError, match=r"neither slidetl's nor allowed.*--allow mylab\.heads\.Head"
        ):
            read_checkpoint(path, refused)


@pytest.mark.parametrize("content", [EVIL, [EVIL], {"width": 3}])
def test_an_allowed_class_takes_plain_arguments_alone(content: object, tmp_path: Path) -> None:
    head = {"class_path": "mylab.heads.Head", "init_args": {"x": content}}
    with pytest.raises(CheckpointError, match="expected plain values, or lists of them, as init_args"):
        read_checkpoint(save(tmp_path / "c.ckpt", {"head": head}), ["mylab"])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


def test_pickled_objects_are_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "c.ckpt", Evil())
    with pytest.raises(
        CheckpointError, match="not loaded, damaged or holds more than plain values and tensors"
    ):
        read_checkpoint(tmp_path / "c.ckpt")
    assert capsys.readouterr().out == ""


def test_other_files_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match="not loaded"):
        read_checkpoint(tmp_path / "text.ckpt")
    (tmp_path / "empty.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"empty\.ckpt: not loaded.* the file is empty"):
        read_checkpoint(tmp_path / "empty.ckpt")
    bare = save(tmp_path / "bare.ckpt", {})
    read_checkpoint(bare)
    with pytest.raises(
        CheckpointError, match=r"no training can resume from it, it lacks epoch, global_step, loops"
    ):
        read_checkpoint(bare, resumable=True)
    torch.save({"weights": 1}, tmp_path / "w.ckpt")
    for path in (tmp_path / "w.ckpt", save(tmp_path / "l.ckpt", [1])):
        with pytest.raises(CheckpointError, match="expected a checkpoint of 'slidetl fit'"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    "others",
    [
        {"state_dict": [1]},
        {"state_dict": {1: torch.zeros(1)}},
        {"state_dict": {"a": torch.tensor(float("nan"))}},
        {"callbacks": []},
        {"callbacks": {"a": 1}},
        {"callbacks": {"ModelCheckpoint": {"best_k_models": ["a"]}}},
        {"callbacks": {"ModelCheckpoint": {"best_k_models": {"run/../../thesis": torch.tensor(9.0)}}}},
        {"callbacks": {"ModelCheckpoint": {"kth_best_model_path": "/run/checkpoints/../../thesis"}}},
        {"callbacks": {"ModelCheckpoint": {"best_model_path": 1}}},
    ],
)
def test_the_rest_of_a_checkpoint_is_checked(others: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"c\.ckpt: "):
        read_checkpoint(save(tmp_path / "c.ckpt", {}, **others))
    paths = {"best_model_path": "../runs/best.ckpt", "last_model_path": ""}
    read_checkpoint(save(tmp_path / "c.ckpt", {}, callbacks={"ModelCheckpoint": paths}))


def test_a_training_goes_on_only_with_its_progress() -> None:
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    whole: dict[str, Any] = {
        "epoch": 1,
        "global_step": 2,
        "optimizer_states": [],
        "lr_schedulers": [],
        "loops": {"fit_loop": trainer.fit_loop.state_dict()},
    }
    check_resumable(whole, trainer)
    for key, wrong in (("loops", {}), ("loops", {"fit_loop": {}}), ("epoch", "x"), ("optimizer_states", {})):
        with pytest.raises(CheckpointError, match="no training can go on from it: its '"):
            check_resumable({**whole, key: wrong}, trainer)
    with pytest.raises(CheckpointError, match="the checkpoint has no 'epoch'"):
        check_resumable({}, trainer)


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_refused_in_no_memory(tmp_path: Path) -> None:
    values = {"backbone": {"name": "vit_giant_patch14_dinov2"}}  # 4.5 GB
    with pytest.raises(
        CheckpointError, match=r"c\.ckpt: no network can be built from it: its weights are of"
    ):
        load_grader(save(tmp_path / "c.ckpt", values))


def test_a_checkpoint_does_not_ask_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="a checkpoint downloads nothing"):
        load_grader(save(tmp_path / "c.ckpt", {"backbone": {"name": "hf-hub:evil/model"}}))


def test_a_runs_folder_stands_for_the_best_checkpoint_of_its_latest_fit(tmp_path: Path) -> None:
    def fit(version: int, best: str) -> Path:
        folder = tmp_path / "logs" / f"version_{version}" / "checkpoints"
        folder.mkdir(parents=True)
        with pytest.raises(UsageError, match=f"version_{version}: the latest fit has not ended its first"):
            find_checkpoint(tmp_path)
        callbacks = {"best": {"best_model_path": f"elsewhere/{best}", "monitor": "val/loss"}}
        last = save(folder / "last.ckpt", {}, callbacks=callbacks, epoch=1)
        with pytest.raises(UsageError, match=f"interrupted after epoch 2, .* --ckpt_path {last}, or name"):
            find_checkpoint(tmp_path)
        (folder / COMPLETE).touch()
        return folder / best

    with pytest.raises(UsageError, match="no checkpoint of 'slidetl fit' below"):
        find_checkpoint(tmp_path)
    for version in (2, 10):
        best = fit(version, f"best-v{version}.ckpt")
        with pytest.raises(UsageError, match=f"{best.name}: the best checkpoint of that fit is gone"):
            find_checkpoint(tmp_path)
        save(best, {})
        assert find_checkpoint(tmp_path) == best
    without = tmp_path / "logs" / "version_11" / "checkpoints"  # resumed with no epoch left
    without.mkdir(parents=True)
    (without / COMPLETE).write_text(NOTHING_LEFT)
    assert find_checkpoint(tmp_path) == find_checkpoint(best) == best
    (best.parent / COMPLETE).unlink()
    with pytest.raises(UsageError, match="version_10: the latest fit is not marked as complete"):
        find_checkpoint(tmp_path)
    (without / COMPLETE).write_text(f"{NOTHING_LEFT}../../version_10/checkpoints/last.ckpt\n")
    assert find_checkpoint(tmp_path) == best
    (without / COMPLETE).write_text("")  # its checkpoint is gone
    with pytest.raises(UsageError, match=r"version_11: the latest fit has .*, or its last\.ckpt is gone"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("options", "path", "chosen"),
    [
        ({"monitor": "val/rps"}, "elsewhere/best.ckpt", "best.ckpt"),
        ({"monitor": "val/rps", "save_top_k": 0}, "", "last.ckpt"),
        ({}, "elsewhere/best.ckpt", "last.ckpt"),
    ],
)
def test_a_users_own_checkpoints_are_not_taken_for_the_best(
    options: dict[str, Any], path: str, chosen: str, tmp_path: Path
) -> None:
    folder = tmp_path / "logs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    own, best = ModelCheckpoint(monitor="val/loss"), BestCheckpoint(**options)
    states = {
        own.state_key: {"best_model_path": "elsewhere/own.ckpt", "monitor": "val/loss"},
        best.state_key: {**best.state_dict(), "best_model_path": path},
    }
    save(folder / "last.ckpt", {}, callbacks=states)
    for name in ("own.ckpt", "best.ckpt", COMPLETE):
        (folder / name).touch()
    assert find_checkpoint(tmp_path) == folder / chosen
