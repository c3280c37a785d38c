"""Sharing out jobs among processes and cards."""

from __future__ import annotations

import errno
import os
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slidetl.compare import pool, train_arm
from slidetl.compare.config import read_comparison
from slidetl.compare.plan import Job
from slidetl.compare.pool import Workplace, run_here
from slidetl.compare.run import cards_for, plan_comparison
from slidetl.compare.train_arm import _Fit
from slidetl.errors import OutputError
from tests.compare.test_run import SCRATCH, configuration, planned
from tests.conftest import Study


def report_card(job: Job, place: Workplace, reply: Connection) -> None:
    reply.send(str(place.card))


@pytest.mark.parametrize(
    ("processes", "cards", "taken"), [(2, 2, {"0", "1"}), (1, 2, {"0"}), (3, 2, {"0", "1"}), (2, 1, {"None"})]
)
def test_cards_are_shared_out_among_the_processes(
    processes: int, cards: int, taken: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_run_in_process", report_card)
    jobs: list[Any] = [(number, Workplace(tmp_path)) for number in range(5)]
    found = list(run_here(jobs, processes, cards))
    numbers: list[Any] = [job for job, _ in found]
    assert sorted(numbers) == [0, 1, 2, 3, 4]
    assert {card for _, card in found} == taken


def compute_on_full_disk(job: Job, place: Workplace, reply: Connection) -> None:
    """Computes a job in a process in which every file is on a full disk, but that of job 1."""

    def refuse(*given: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(given[0]))

    if job.key != "1":
        Path.write_text = refuse  # type: ignore[method-assign, assignment]
    pool.run_job = refuse if job.key != "1" else lambda *_: None
    pool._run_in_process(job, place, reply)


def test_a_full_disk_ends_the_jobs_after_those_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_run_in_process", compute_on_full_disk)
    jobs: list[Any] = [(SimpleNamespace(key=str(n), label=str(n)), Workplace(tmp_path)) for n in range(9)]
    found: dict[str, str] = {}
    with pytest.raises(OutputError, match="the disk is full; make room and run again"):
        for job, reason in run_here(jobs, 2):
            found[job.key] = reason
    assert "the disk is full" in found.pop("0")
    assert found.pop("1") == "" and len(found) < 2  # the one that took the place of job 1, if that was first


@pytest.mark.parametrize(("trainer", "sees"), [({}, "7"), ({"devices": 1}, "7"), ({"devices": [0]}, "4,7")])
def test_a_training_sees_its_card_unless_it_names_one(
    trainer: dict[str, Any], sees: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    seen: list[Any] = []
    monkeypatch.setattr(
        train_arm, "train_job", lambda *given: seen.append((os.environ["CUDA_VISIBLE_DEVICES"], given[4]))
    )
    job: Any = SimpleNamespace(recipe={"fit": {"trainer": trainer}})
    pool._compute(job, Workplace(tmp_path, readers=3, card=1), tmp_path)
    assert seen == [(sees, 3)]


def test_readers_for_a_card_share_the_cores_of_their_job(study: Study, tmp_path: Path) -> None:
    _, job = planned(study, tmp_path, {"fit": SCRATCH})
    fit = _Fit(job, tmp_path / "it", {}, job.fold.train, job.fold.test, (), readers=5)
    assert fit._built[1].cores == 5


@pytest.mark.parametrize(("accelerator", "cards"), [("cpu", 0), ("auto", 3)])
def test_cards_count_if_an_arm_trains_on_one(
    accelerator: str, cards: int, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    arms = {
        "scratch": {"fit": {**SCRATCH, "trainer": {"accelerator": accelerator}}},
        "prior": {"baseline": "prior"},
    }
    comparison = read_comparison(configuration(study, tmp_path, arms=arms))
    assert cards_for(plan_comparison(comparison)) == cards
    assert cards_for(plan_comparison(comparison, ("prior",))) == 0
