from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slidetl.errors import FederationError, OutputError
from slidetl.federation.records import Rounds, only_job


def test_rounds_of_another_configuration_are_none(tmp_path: Path) -> None:
    earlier, rounds = Rounds(tmp_path, "a"), Rounds(tmp_path, "b")
    network = {"weight": np.ones(2, np.float32)}
    for number in (1, 2, 3):
        earlier.write(number, network, {})
    assert earlier.latest(5) == 3 and rounds.latest(5) == 0
    for read in (rounds.read, rounds.sha256, rounds.lineage):
        with pytest.raises(FederationError, match=r"0002\.json: no such round of this configuration"):
            read(2)
    kept = rounds.write(2, network, {})
    assert kept["parent_sha256"] is None and rounds.lineage(2) == [kept["sha256"]]
    assert rounds.latest(5) == 2 and list(rounds.read(2)) == ["weight"]


def test_other_rounds_are_removed(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path / "rounds", "a")
    rounds.keep_only([])  # no folder, nothing to remove
    for number in (1, 2, 10001):
        rounds.write(number, {"weight": np.ones(2, np.float32)}, {})
    rounds.keep_only(range(1, 2))
    assert sorted(path.name for path in rounds.folder.iterdir()) == ["0001.json", "0001.safetensors"]


def test_one_job_at_a_time_has_a_folder(tmp_path: Path) -> None:
    with only_job(tmp_path / "site"):
        with (
            pytest.raises(FederationError, match="another training is at work in it"),
            only_job(tmp_path / "site"),
        ):
            pass
        with only_job(tmp_path / "other"):
            pass
    with only_job(tmp_path / "site"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), only_job(tmp_path / "file"):
        pass
