from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slidetl.errors import FileHeldError, OutputError, SlideReadError, UsageError
from slidetl.files import (
    check_safetensors,
    check_stored,
    check_writable,
    fsync_path,
    full_disk,
    paced,
    partial_path,
    postponed,
    read_packed_array,
    read_yaml,
    replaced,
    write_csv,
    write_whole,
)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_whole(path, "one\n")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_file_before_and_is_told_by_its_path(tmp_path: Path, number: int) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "before")
    said = r"a\.txt: cannot be written: the disk is full; make room"
    with pytest.raises(OutputError, match=said), replaced(path) as file:
        file.write(b"half")
        raise OSError(number, os.strerror(number))
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def share(monkeypatch: pytest.MonkeyPatch, answer: Callable[[int, bool], int]) -> None:
    """Makes fsync fail as on a share, by the number that ``answer`` gives to a mode and read-only access."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        is_read_only = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if number := answer(os.fstat(descriptor).st_mode, is_read_only):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EIO])
def test_a_share_need_not_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    share(monkeypatch, lambda mode, _: number if stat.S_ISDIR(mode) else 0)
    write_whole(tmp_path / "a", "whole")
    assert (tmp_path / "a").read_text() == "whole"


def test_a_share_need_not_sync_what_was_opened_for_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share(monkeypatch, lambda mode, reads: errno.EACCES if stat.S_ISREG(mode) and reads else 0)
    write_whole(tmp_path / "a", "whole")
    assert (tmp_path / "a").read_text() == "whole"


@pytest.mark.parametrize(
    ("kind", "number"),
    [(stat.S_ISREG, errno.EIO), (stat.S_ISREG, errno.EINVAL), (stat.S_ISDIR, errno.ENOSPC)],
)
def test_a_file_that_is_not_durable_and_a_full_disk_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[int], bool], number: int
) -> None:
    share(monkeypatch, lambda mode, _: number if kind(mode) else 0)
    with pytest.raises(OutputError, match="cannot be written"):
        write_whole(tmp_path / "a", "lost")


def test_a_file_that_may_only_be_read_is_synced(tmp_path: Path) -> None:
    program = tmp_path / "sleep"
    shutil.copy(shutil.which("sleep") or "", program)
    with subprocess.Popen([program, "60"]) as running:
        with pytest.raises(OSError):  # it runs
            program.open("r+b")
        fsync_path(program)
        running.kill()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EBUSY, errno.ETXTBSY])
def test_a_table_that_is_open_in_a_spreadsheet_is_told_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "a.csv"

    def replace(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OutputError, match="cannot be written") as error:  # nothing is there to be open
        write_whole(path, "new")
    assert not isinstance(error.value, FileHeldError)
    path.write_text("before")
    said = r"a\.csv: cannot be replaced \(.*\); is it open in another program\? Close it there"
    with pytest.raises(FileHeldError, match=f"{said}$"):
        write_whole(path, "new")
    with pytest.warns(UserWarning, match=f"{said}; this run tries again$"), postponed():
        write_whole(path, "new")
    with postponed():  # told once
        write_whole(path, "new")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_table_that_grows_is_written_a_tenth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, duration, written = 0.0, 0.01, list[float]()

    def write() -> None:
        nonlocal clock
        written.append(clock)
        clock += duration

    monkeypatch.setattr("slidetl.files.time", SimpleNamespace(monotonic=lambda: clock))
    write_if_due = paced(write)
    for _ in range(50):
        write_if_due()
        clock += 0.1
    assert written == pytest.approx([0, 1.01, 2.02, 3.03, 4.04])
    duration = 2  # by now the table is long
    before = len(written)
    for _ in range(1000):
        write_if_due()
        clock += 0.1
    assert len(written) - before == 5


def test_a_full_disk_is_known_behind_other_errors() -> None:
    try:
        try:
            raise OSError(errno.EDQUOT, "quota")
        except OSError as error:
            raise OutputError("a: cannot be written") from error
    except OutputError as error:
        found = full_disk(error)
    assert found is not None and found.errno == errno.EDQUOT
    assert full_disk(OutputError("b")) is None


def test_a_result_that_could_not_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "a")
    with pytest.raises(OutputError, match="expected the name of a file to write, not of a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for place in ("file", "file/new/new", "gone", "new/" + "n" * 300):
        with pytest.raises(OutputError, match="a: cannot be written"):
            check_writable(tmp_path / place / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "gone"}


def test_the_check_of_a_result_makes_and_removes_no_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "new" / "deep" / "a", Path("new/deep/a"), Path("a")):
        check_writable(path)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    check_writable(tmp_path / "new" / "deep" / "a")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


def test_an_error_of_a_slide_is_handed_on(tmp_path: Path) -> None:
    with pytest.raises(SlideReadError, match="torn"), replaced(tmp_path / "a"):
        raise SlideReadError("torn")
    assert not list(tmp_path.iterdir())


def test_no_link_is_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "a"
    victim.write_text("mine")
    path.symlink_to(victim)
    partial_path(path).symlink_to(victim)
    write_whole(path, "new")
    assert victim.read_text() == "mine" and path.read_text() == "new" and not path.is_symlink()


def test_a_table_runs_no_formula(tmp_path: Path) -> None:
    row = {"name": "=cmd|calc", "n": -1.5, "none": None, "nan": float("nan"), "text": "a\x1b[2J\r\n\u202eb"}
    write_csv(tmp_path / "a.csv", list(row), [row])
    assert (tmp_path / "a.csv").read_text() == "name,n,none,nan,text\n'=cmd|calc,-1.5,,,a\\x1b[2J  \\u202eb\n"


def packed(path: Path, name: str, header: bytes, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, header + content)
    return path


def npy_header(shape: tuple[int, ...], **others: Any) -> bytes:
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape, **others}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "header",
    [
        npy_header((10**12,)),
        npy_header((-1,)),
        npy_header((2**62, 2**62)),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31),
        b"\x93NUMPY\x09\x00" + struct.pack("<H", 2) + b"{}",
        b"no array",
    ],
)
def test_an_array_is_measured_before_it_is_read(tmp_path: Path, header: bytes) -> None:
    path = packed(tmp_path / "a.npz", "a.npy", header, b"\0" * 64)
    with zipfile.ZipFile(path) as archive, pytest.raises(ValueError):
        read_packed_array(archive, "a", 2**20)


def test_an_array_of_the_right_size_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.arange(6).reshape(2, 3))
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert read_packed_array(archive, "a", 48).tolist() == [[0, 1, 2], [3, 4, 5]]
        with pytest.raises(ValueError, match="more than 47"):
            read_packed_array(archive, "a", 47)
        with pytest.raises(KeyError):
            read_packed_array(archive, "b", 47)


def test_packed_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="packed"):
        check_stored(packed(tmp_path / "a.pth", "a/data/0", b"", b"\0" * 2**20))


@pytest.mark.parametrize("length", [0, 1, 9 * 2**20, 2**63 - 1])
def test_the_header_of_safetensors_has_a_limit(tmp_path: Path, length: int) -> None:
    (tmp_path / "a").write_bytes(struct.pack("<Q", length) + json.dumps({}).encode().ljust(10 * 2**20))
    with pytest.raises(ValueError, match=f"its header has {length} bytes, expected 2 to"):
        check_safetensors(tmp_path / "a")
    (tmp_path / "b").write_bytes(struct.pack("<Q", 100) + b"{}")
    with pytest.raises(ValueError, match="within the file of 10"):
        check_safetensors(tmp_path / "b")


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\x00"])
def test_a_yaml_without_named_values_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"x\.yaml: expected [^\n]*$"):
        read_yaml(path, "a comparison", "arms and more")
    path.write_text("é: 1", encoding="utf-8")
    assert read_yaml(path, "a comparison", "arms and more") == {"é": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "base: {model: {lr: 0.3}}\narms: {}\nbase: {trainer: {}}",
            "'base' is on line 1 and again on line 3",
        ),
        ("arms:\n  - warm: 1\n    'warm': 2", "'warm' is on line 2 and again on line 3"),
        ("sites: {a: 1, a: 2}", "'a' is on line 1 and again on line 1"),
        ("a: &b {c: 1, d: [*b]}\n<<: *b\nc: 2\nc: 3", "'c' is on line 3 and again on line 4"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(text: str, said: str, tmp_path: Path) -> None:
    """Before, the first block was dropped without a word."""
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=rf"x\.yaml: {said}, and only one of them would count"):
        read_yaml(path, "a comparison", "arms and more")


def test_merged_keys_may_be_there_again(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1}\nb: &b {y: 2, x: 0}\nc: {<<: *a, <<: *b, x: 3}\n1: x\n'1': x")
    assert read_yaml(path, "a comparison", "arms and more")["c"] == {"x": 3, "y": 2}
