from __future__ import annotations

import errno
import fcntl
import getpass
import json
import os
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slidetl import doctor, processor
from slidetl.cli import main


def test_the_page_names_what_is_here_and_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    values = {(check["topic"], check["name"]): check["value"] for check in found["checks"]}
    assert found["fails"] == 0
    for topic, name in (
        ("packages", "numpy"),
        ("readers", "OpenSlide"),
        ("GPU", "torch"),
        ("memory", "memory"),
    ):
        assert values[topic, name][0].isdigit()
    folder = f"folder {tmp_path}"
    assert values[folder, "locks (flock)"] == values[folder, "atomic rename"] == "works"
    assert list(tmp_path.iterdir()) == []  # its attempts are removed
    text = json.dumps(found).replace(str(tmp_path), "")
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text and f"/{getpass.getuser()}/" not in text


def test_a_folder_that_is_not_there_fails_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["doctor", str(tmp_path / "gone")]) == 1
    page = capfd.readouterr().out
    assert f"will fail\n  folder ~{os.sep}gone, folder: make it, or mount it" in page


def test_it_survives_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torch" or "catalogue" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    checks = {(check.topic, check.name): check for check in doctor.examine()}
    assert checks["GPU", "torch"].state == "fails"
    assert checks["weights", "on this machine"].value.startswith("not known: ")
    assert checks["readers", "OpenSlide"].state == ""


def test_a_broken_part_costs_its_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError(f"{Path.home()}/x: no such library")

    monkeypatch.setattr(doctor, "_readers", broken)
    checks = {(check.topic, check.name): check for check in doctor.examine()}
    assert checks["readers", "examination"].value == "RuntimeError: ~/x: no such library"
    assert ("memory", "memory") in checks


def test_a_share_without_locks_is_slow_and_one_without_renames_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    checks = {check.name: check for check in doctor._folder(tmp_path)}
    assert (checks["locks (flock)"].state, checks["atomic rename"].state) == ("slow", "fails")
    assert "waits 60 s" in checks["locks (flock)"].advice
    assert checks["hard links"].value == "works"


@pytest.mark.parametrize(
    ("fails_on", "folder", "file"), [(stat.S_ISDIR, "slow", ""), (stat.S_ISREG, "", "fails")]
)
def test_a_share_that_cannot_sync_is_told_as_results_are_synced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails_on: Callable[[int], bool],
    folder: str,
    file: str,
) -> None:
    def fsync(descriptor: int) -> None:
        if fails_on(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    states = {check.name: check.state for check in doctor._folder(tmp_path)}
    assert (states["sync of a folder"], states["sync of a file opened again"]) == (folder, file)
    assert states["hard links"] == "" and ("sync to disk" in states) == (file == "")


def test_a_home_where_no_model_can_be_trusted_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {check.name: check for check in doctor._system()}
    assert (checks["SLIDETL_HOME"].value, checks["SLIDETL_HOME"].state) == ("can be written", "")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path / "file"))
    checks = {check.name: check for check in doctor._system()}
    assert checks["SLIDETL_HOME"].state == "fails" and "set SLIDETL_HOME" in checks["SLIDETL_HOME"].advice


def test_the_limits_of_a_container_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CONTROL_GROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (cores,) = [check for check in doctor._system() if check.name == "processor cores"]
    assert (cores.state, "a container may use 0.5" in cores.value) == ("slow", True)
    (memory, *_) = doctor._memory()
    assert (memory.state, "a container may use 1.0 GiB" in memory.value) == ("slow", True)
