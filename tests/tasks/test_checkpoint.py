from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slidetl.errors import CheckpointError
from slidetl.tasks.checkpoint import read_checkpoint


def save(path: Path, **hyper_parameters: Any) -> Path:
    torch.save({"hyper_parameters": hyper_parameters, "state_dict": {}}, path)
    return path


@pytest.mark.parametrize(
    "hyper_parameters",
    [
        {"transfer": {"class_path": "os.system"}},
        {"head": "subprocess.run"},
        {
            "aggregator": {
                "class_path": "slidetl.models.aggregators.MeanPooling",
                "init_args": {"x": [{"class_path": "evil.A"}]},
            }
        },
        {"_instantiator": "evil.build"},
        {"_class_path": "slidetlevil.Grader"},
    ],
)
def test_foreign_names_are_refused(tmp_path: Path, hyper_parameters: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"neither slidetl's nor allowed; if you trust it, add --allow"):
        read_checkpoint(save(tmp_path / "c.ckpt", **hyper_parameters))


def test_allowed_names_pass(tmp_path: Path) -> None:
    path = save(tmp_path / "c.ckpt", head={"class_path": "mylab.heads.Head"})
    for allow in (["mylab"], ["mylab.heads"], ["mylab.heads.Head"]):
        assert read_checkpoint(path, allow)["state_dict"] == {}
    with pytest.raises(CheckpointError, match="mylab"):
        read_checkpoint(path, ["mylab.head"])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


def test_pickled_objects_are_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"hyper_parameters": Evil(), "state_dict": {}}, tmp_path / "c.ckpt")
    with pytest.raises(CheckpointError, match="not loaded, holds more than plain values and tensors"):
        read_checkpoint(tmp_path / "c.ckpt")
    assert capsys.readouterr().out == ""


def test_other_files_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match="not loaded"):
        read_checkpoint(tmp_path / "text.ckpt")
    torch.save({"weights": 1}, tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match="expected a checkpoint of 'slidetl fit'"):
        read_checkpoint(tmp_path / "w.ckpt")
