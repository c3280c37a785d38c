from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.accelerators import CPUAccelerator

from slidetl.errors import UsageError
from slidetl.training.configured import build_trainer, parse_training


def configured(**trainer: Any) -> Any:
    return parse_training({"model": {}, "data": {}, "trainer": trainer}, ("0", "1"), 0).trainer


@pytest.mark.parametrize(
    "several", [{"devices": 2}, {"devices": "0,1"}, {"devices": [0, 1]}, {"devices": -1}, {"num_nodes": 2}]
)
def test_several_devices_are_refused(several: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="one device for each of many trainings, not trainer.devices"):
        configured(**several)


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
