from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.accelerators import CPUAccelerator

from slidetl.errors import UsageError
from slidetl.training.configured import build_trainer, default_precision, parse_training


def configured(**trainer: Any) -> Any:
    return parse_training({"model": {}, "data": {}, "trainer": trainer}, ("0", "1"), 0).trainer


@pytest.mark.parametrize(
    "several", [{"devices": 2}, {"devices": "0,1"}, {"devices": [0, 1]}, {"devices": -1}, {"num_nodes": 2}]
)
def test_several_devices_are_refused(several: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"one device for each of many trainings, not trainer\.devices"):
        configured(**several)


@pytest.mark.parametrize(
    "name",
    [
        *("default_root_dir", "callbacks", "num_sanity_val_steps", "use_distributed_sampler", "logger"),
        *("enable_checkpointing", "enable_progress_bar", "enable_model_summary"),
    ],
)
def test_what_the_command_sets_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"^trainer\.{name} is set by the command itself; leave it out"):
        configured(**{name: False})


def test_one_card_may_be_named() -> None:
    assert configured(devices=[1]).devices == [1]
    assert configured(devices="1,").devices == "1,"
    assert configured(devices=1).devices == 1
    assert configured(devices="auto").devices == configured().devices == "auto"


@pytest.mark.parametrize("options", [{}, {"devices": "auto"}])
def test_a_trainer_takes_one_device_of_several(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CPUAccelerator, "auto_device_count", staticmethod(lambda: 2))
    trainer = build_trainer({"accelerator": "cpu", **options}, tmp_path, [])
    assert (trainer.num_devices, trainer.world_size) == (1, 1)


def test_a_training_is_one_process_in_a_job_of_several_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning refused it: every training of a comparison failed."""
    monkeypatch.setenv("SLURM_NTASKS", "8")
    trainer = build_trainer({"accelerator": "cpu"}, tmp_path, [])
    assert (trainer.num_devices, trainer.world_size, trainer.global_rank) == (1, 1, 0)


def test_the_precision_is_that_of_the_card_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    second = torch.device("cuda", 1)
    monkeypatch.setattr("slidetl.training.configured.has_bfloat16", lambda card: card == second)
    for named, precision in (([1], "bf16-mixed"), ("1,", "bf16-mixed"), ([0, 1], "32-true"), (1, "32-true")):
        assert default_precision("auto", named) == precision
    assert default_precision("cpu", [1]) == "32-true"
    default_precision("auto", "0,first")  # Lightning refuses it in a line
