"""The queue, with real processes of our own commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slidetl.files import partial_path
from slidetl.studio.jobs import Job, JobQueue, Step, _Process, _resumed
from tests.conftest import PATIENCE_S

QUICK = Step(("backbones", "--help"))
SLEEPS = """import signal, time
signal.signal(signal.SIGINT, signal.{how})
print(flush=True)
time.sleep(600)
"""


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    queue = JobQueue(tmp_path / "jobs")
    yield queue
    queue.close()


def until(queue: JobQueue, job: Job, done: Callable[[Job], bool]) -> Job:
    """Turns the queue by hand until a job is as wanted."""
    end = time.monotonic() + PATIENCE_S
    while not done(found := queue.find(job.id)):
        assert time.monotonic() < end, found
        queue._turn()
        time.sleep(0.05)
    return found


def is_over(job: Job) -> bool:
    return not job.is_active


@pytest.mark.slow
def test_one_job_at_a_time_in_order(queue: JobQueue, tmp_path: Path) -> None:
    bad = Step(("cache", "info", "none"))
    first = queue.add("tile", "a", "", (QUICK, QUICK), tmp_path)
    second = queue.add("train", "b", "r", (bad, QUICK), tmp_path)
    queue._turn()
    assert (queue.find(first.id).state, queue.find(second.id).state) == ("running", "waiting")
    done = until(queue, first, is_over)
    assert (done.state, done.exit_code, done.step) == ("done", 0, 1)
    failed = until(queue, second, is_over)
    assert (failed.state, failed.exit_code, failed.step) == ("failed", 2, 0)
    assert "none" in failed.reason and "\n" not in failed.reason
    assert "$ slidetl cache info none" in queue.log(failed)
    assert [job.id for job in queue.jobs()] == [second.id, first.id]
    assert [job.id for job in queue.jobs("a")] == [first.id]


def pretend(queue: JobQueue, folder: Path, how: str) -> tuple[Job, subprocess.Popen[bytes]]:
    """A job with a process of ours: one that ends by SIGINT, or one that does not."""
    job = queue.add("train", "a", "r", (QUICK,), folder)
    command = [sys.executable, "-c", SLEEPS.format(how=how)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    with child.stdout as said:
        assert said.readline() == b"\n"  # the signal has its handler
    place = folder / "jobs" / job.id
    process = _Process.of(child.pid)
    assert process is not None
    (place / "process.json").write_text(json.dumps(vars(process)))
    values = json.loads((place / "job.json").read_text())
    (place / "job.json").write_text(json.dumps({**values, "state": "running"}))
    return job, child


def test_a_job_that_cannot_start_holds_up_no_other(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "jobs")
    gone = queue.add("tile", "gone", "", (QUICK,), tmp_path / "gone")
    torn = queue.add("publish", "a", "m", (Step(("zoo", "a\0b")),), tmp_path)
    strange = queue.add("grade", "a", "g", (Step(("grade", os.fsdecode(b"m\xe9.pt"))),), tmp_path)
    last = queue.add("tile", "a", "", (QUICK,), tmp_path)
    queue.start()
    end = time.monotonic() + PATIENCE_S
    while queue.find(last.id).is_active and time.monotonic() < end:
        time.sleep(0.1)
    queue.close()
    states = [queue.find(job.id).state for job in (gone, torn, strange, last)]
    assert states == ["failed", "failed", "failed", "done"] and not queue.trouble
    assert "could not be started" in queue.find(gone.id).reason and "gone" in queue.find(gone.id).reason
    assert "null byte" in queue.find(torn.id).reason
    assert "$ slidetl grade m\\udce9.pt" in queue.log(strange)


def test_jobs_wait_for_a_machine_short_of_something(queue: JobQueue, tmp_path: Path) -> None:
    job = queue.add("tile", "a", "", (QUICK, QUICK), tmp_path)
    log = tmp_path / "jobs" / job.id / "log.txt"
    for step in (0, 1):
        log.unlink(missing_ok=True)
        log.symlink_to("/dev/full")
        end = time.monotonic() + PATIENCE_S
        with pytest.raises(OSError, match="No space left"):
            while time.monotonic() < end:
                queue._turn()
                time.sleep(0.05)
        assert (queue.find(job.id).state, queue.find(job.id).step) == ("waiting", step)
        log.unlink()
        queue._turn()
        assert (queue.find(job.id).state, queue.find(job.id).step) == ("running", step)
    assert until(queue, job, is_over).state == "done"


@pytest.mark.parametrize("blocked", ["process.json", "job.json"])
def test_a_job_without_a_record_runs_on_as_no_process(
    blocked: str, queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queue.add("train", "a", "r", (Step(("studio", "--root", str(tmp_path))),), tmp_path)
    second = queue.add("train", "a", "s", (QUICK,), tmp_path)
    started: list[int] = []
    identify = _Process.of

    def of(pid: int) -> _Process | None:  # the command runs by now; the disk fills
        started.append(pid)
        partial_path(tmp_path / "jobs" / job.id / blocked).mkdir(exist_ok=True)
        return identify(pid)

    monkeypatch.setattr(_Process, "of", of)
    queue._turn()
    assert len(started) == 1 and identify(started[0]) is None
    failed = queue.find(job.id)
    assert failed.state == "failed" and "cannot be written" in failed.reason
    queue._turn()
    assert queue.find(job.id).state == "failed" and queue.find(second.id).state == "running"
    monkeypatch.undo()
    assert until(queue, second, is_over).state == "done"


def test_what_goes_wrong_ends_no_watch(queue: JobQueue, tmp_path: Path) -> None:
    job = queue.add("tile", "a", "", (QUICK,), tmp_path)
    record = tmp_path / "jobs" / job.id / "job.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps({**values, "state": "running", "step": 5}))  # there is one
    (record.parent / "process.json").write_text(json.dumps({"pid": 0, "started": 0, "boot": ""}))
    queue.start()
    end = time.monotonic() + PATIENCE_S
    while not queue.trouble and time.monotonic() < end:
        time.sleep(0.05)
    assert "out of range" in queue.trouble
    record.write_text(json.dumps({**values, "state": "running"}))
    while (queue.find(job.id).is_active or queue.trouble) and time.monotonic() < end:
        time.sleep(0.05)
    assert "ended from outside" in queue.find(job.id).reason and not queue.trouble


def test_a_folder_without_a_record_stops_no_later_job(queue: JobQueue, tmp_path: Path) -> None:
    (tmp_path / "jobs" / "000001-tile").mkdir()
    assert queue.add("tile", "a", "", (QUICK,), tmp_path).id == "000002-tile"


@pytest.mark.slow
def test_stop_asks_first_and_forces_later(
    queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slidetl.studio.jobs._TERM_S", 0.2)
    job, child = pretend(queue, tmp_path, "SIG_IGN")
    queue.stop(job.id)
    assert queue.find(job.id).state == "stopping" and child.poll() is None
    assert until(queue, job, is_over).state == "stopped"
    assert child.wait(10) == -signal.SIGTERM


@pytest.mark.slow
def test_stop_leaves_another_process_of_the_same_pid_alone(queue: JobQueue, tmp_path: Path) -> None:
    job, child = pretend(queue, tmp_path, "SIG_DFL")
    place = tmp_path / "jobs" / job.id / "process.json"
    for wrong in ({"started": 1}, {"boot": "another"}):
        place.write_text(json.dumps({**json.loads(place.read_text()), **wrong}))
        queue.stop(job.id)
        time.sleep(0.2)
        assert child.poll() is None
    assert not until(queue, job, is_over).is_active
    child.kill()
    child.wait()


@pytest.mark.slow
def test_another_server_finds_the_jobs(tmp_path: Path) -> None:
    first = JobQueue(tmp_path / "jobs")
    running, child = pretend(first, tmp_path, "SIG_DFL")
    waiting = first.add("tile", "a", "", (QUICK,), tmp_path)
    first.close()
    second = JobQueue(tmp_path / "jobs")
    second._turn()
    assert (second.find(running.id).state, second.find(waiting.id).state) == ("running", "waiting")
    # Ended while no server looked: the status file has the exit code.
    child.kill()
    child.wait()
    status = tmp_path / "jobs" / running.id / "status-0.json"
    status.write_text(json.dumps({"state": "done", "exit_code": 0}))
    assert until(second, running, is_over).state == "done"
    assert until(second, waiting, is_over).state == "done"
    second.close()


@pytest.mark.slow
def test_a_reason_is_of_the_last_command(queue: JobQueue, tmp_path: Path) -> None:
    job = queue.add("train", "a", "r", (Step(("cache", "info", "none")),), tmp_path)
    assert "none" in until(queue, job, is_over).reason
    queue.resume(job.id)
    queue._turn()
    process = queue._process(queue.find(job.id))
    assert process is not None
    process.signal_group(signal.SIGKILL)
    assert "ended from outside" in until(queue, job, is_over).reason


@pytest.mark.slow
def test_a_process_killed_from_outside_says_so_and_resumes(queue: JobQueue, tmp_path: Path) -> None:
    job, child = pretend(queue, tmp_path, "SIG_DFL")
    child.kill()
    child.wait()
    failed = until(queue, job, is_over)
    assert failed.state == "failed" and "ended from outside" in failed.reason
    queue.resume(job.id)
    assert until(queue, job, is_over).state == "done"


def test_a_training_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    plain = ("fit", "--config", "runs/r/training.yaml")
    words: tuple[str, ...] = plain
    assert _resumed(words, tmp_path) == plain
    for version in (0, 1):
        last = tmp_path / "runs" / "r" / "logs" / f"version_{version}" / "checkpoints" / "last.ckpt"
        last.parent.mkdir(parents=True)
        last.write_bytes(b"")
        os.utime(last, (version, version))
        words = _resumed(words, tmp_path)
        assert words == (*plain, "--ckpt_path", str(last.relative_to(tmp_path)))
    assert _resumed(("grade", "m"), tmp_path) == ("grade", "m", "--resume")
    assert _resumed(("tile", "m"), tmp_path) == ("tile", "m")
