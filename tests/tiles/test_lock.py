from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from slidetl.errors import CacheError, OutputError
from slidetl.tiles.lock import STALE_S, LeaseLostError, dead_leases, machine_id, only_process, slide_lock
from tests.conftest import Picture, PyramidTiff

BEAT, STALE = 0.05, 0.6

# Makes a process see file systems as some shares are: a call that they lack fails.
WITHOUT = """
import errno, fcntl, os
def fail(*_, **__):
    raise OSError(errno.{error}, os.strerror(errno.{error}))
{call} = fail
"""
SHARES = [
    pytest.param(WITHOUT.format(call=call, error=error), id=f"{call}-{error}")
    for call, errors in (("os.link", ("EPERM", "ENOTSUP")), ("fcntl.flock", ("ENOLCK", "ENOTSUP", "EPERM")))
    for error in errors
]

# Takes the lock, says so, and then does as it is told on its standard input: "check", or to give it back.
OWNER = """
import sys
from pathlib import Path
from slidetl.errors import CacheError
from slidetl.tiles.lock import LeaseLostError, slide_lock
machine = sys.argv[2] or None
with slide_lock(Path(sys.argv[1]), "S1", machine=machine, heartbeat_s=0.05, stale_s=0.6) as lock:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            lock.check()
            print("ours", flush=True)
        except LeaseLostError as error:
            print("lost:", error, flush=True)
"""


class Clock:
    """The time as the lock sees it: it passes only while the lock waits."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waited_s = 0.0
        self.on_wait: Callable[[], object] = lambda: None
        monkeypatch.setattr("slidetl.tiles.lock.time", self)

    def clock_gettime(self, _: int) -> float:
        return self.waited_s

    def sleep(self, seconds: float) -> None:
        self.waited_s += seconds
        self.on_wait()


class Owner:
    """A process that holds the lock of slide S1, on this machine or as if on another."""

    def __init__(self, cache: Path, machine: str = "", share: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", share + OWNER, str(cache), machine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.says("held")

    def says(self, expected: str) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(expected), line

    def check(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("check\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def owners() -> Iterator[list[Owner]]:
    started: list[Owner] = []
    yield started
    for owner in started:
        owner.kill()


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / ".locks").iterdir())


def test_it_leaves_nothing_but_the_file_that_is_locked(tmp_path: Path) -> None:
    with slide_lock(tmp_path, "S1") as lock:
        lock.check()
        assert files(tmp_path) == ["S1.lease", "S1.lock"]
        about = json.loads((tmp_path / ".locks" / "S1.lease").read_bytes())
        assert (about["pid"], about["machine"]) == (os.getpid(), machine_id())
        assert dead_leases(tmp_path) == ()
    assert files(tmp_path) == ["S1.lock"]
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]


def test_it_is_given_back_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), slide_lock(tmp_path, "S1"):
        _ = 1 / 0
    assert files(tmp_path) == ["S1.lock"]


def test_a_second_waits_for_the_first_and_others_do_not(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with slide_lock(tmp_path, "S1"):
            order.append("second")

    thread = threading.Thread(target=second)
    said = f"S1 is held by process {os.getpid()} on {socket.gethostname()}; waiting until it ends$"
    with pytest.warns(UserWarning, match=said), slide_lock(tmp_path, "S1"):
        thread.start()
        with slide_lock(tmp_path, "S2"):
            order.append("other slide")
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["other slide", "first", "second"]


def test_of_a_killed_owner_on_this_machine_it_is_free_at_once(
    tmp_path: Path, owners: list[Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    owners.append(Owner(tmp_path))
    owners[0].kill()
    assert files(tmp_path) == ["S1.lease", "S1.lock"]
    assert dead_leases(tmp_path) == ("S1",)
    clock = Clock(monkeypatch)
    with slide_lock(tmp_path, "S1") as lock:
        assert clock.waited_s == 0
        lock.check()
    assert files(tmp_path) == ["S1.lock"]


def lease_of_another_machine(cache: Path, beat: int = 1) -> Path:
    path = cache / ".locks" / "S1.lease"
    path.parent.mkdir(exist_ok=True)
    about = {"owner": "stranger", "machine": "elsewhere", "host": "far", "pid": 7, "beat": f"{beat:012}"}
    path.write_text(json.dumps(about) + "\n")
    return path


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{"])
def test_a_lease_of_another_machine_is_taken_over_once_it_stood_still(
    tmp_path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lease_of_another_machine(tmp_path)
    assert dead_leases(tmp_path) == ()
    if content is not None:
        path.write_bytes(content)  # as a power cut may leave it
    os.utime(path, (0, 0))  # an old file, or a clock that is wrong, says nothing
    clock = Clock(monkeypatch)
    holder = "a process" if content is not None else "process 7 on far"
    said = f"^S1 is held by {holder}; waiting until it ends, or has been silent for 60 s$"
    with pytest.warns(UserWarning, match=said), slide_lock(tmp_path, "S1") as lock:  # timings of real use
        assert STALE_S < clock.waited_s <= STALE_S + 1
        lock.check()
    assert files(tmp_path) == ["S1.lock"]


def test_a_lease_that_is_renewed_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lease_of_another_machine(tmp_path)
    clock = Clock(monkeypatch)

    def beat() -> None:
        if clock.waited_s < 3 * STALE_S:
            lease_of_another_machine(tmp_path, beat=1 + int(clock.waited_s))
        else:
            path.unlink()

    clock.on_wait = beat
    with pytest.warns(UserWarning) as said, slide_lock(tmp_path, "S1"):
        assert len(said) == 1
        assert 3 * STALE_S <= clock.waited_s <= 3 * STALE_S + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:S1 is held")
def test_an_owner_that_was_stopped_finds_out_before_it_commits(tmp_path: Path, owners: list[Owner]) -> None:
    owner = Owner(tmp_path, machine="elsewhere")
    owners.append(owner)
    owner.check()
    owner.says("ours")
    owner.process.send_signal(signal.SIGSTOP)
    # As on another machine, to which the kernel lock is not carried: another file of that name.
    (tmp_path / ".locks" / "S1.lock").rename(tmp_path / ".locks" / "S1.lock.elsewhere")
    with slide_lock(tmp_path, "S1", heartbeat_s=BEAT, stale_s=STALE) as lock:
        owner.process.send_signal(signal.SIGCONT)
        owner.check()
        owner.says("lost:")
        time.sleep(4 * BEAT)  # its heartbeat goes on, into a file that no longer counts
        lock.check()
        # Giving up what it lost does no harm either.
        owner.process.communicate()
        lock.check()
    assert [name for name in files(tmp_path) if "lease" in name] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:S1 is held")
def test_one_that_beats_across_machines_is_not_robbed(tmp_path: Path, owners: list[Owner]) -> None:
    owner = Owner(tmp_path, machine="elsewhere")
    owners.append(owner)
    (tmp_path / ".locks" / "S1.lock").rename(tmp_path / ".locks" / "S1.lock.elsewhere")
    held = threading.Event()

    def wait() -> None:
        with slide_lock(tmp_path, "S1", heartbeat_s=BEAT, stale_s=STALE):
            held.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not held.wait(3 * STALE)
    owner.check()
    owner.says("ours")
    owner.process.communicate()  # it ends, and gives back
    assert held.wait(60)
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("share", ["", *SHARES])
def test_of_many_that_wait_one_takes_over_at_a_time(tmp_path: Path, share: str) -> None:
    lease_of_another_machine(tmp_path)
    script = """
import sys, time
from pathlib import Path
from slidetl.errors import CacheError
from slidetl.tiles.lock import slide_lock
cache = Path(sys.argv[1])
# As on a machine of its own: kernel locks on the former file do not count for this one.
(cache / ".locks" / "S1.lock").unlink(missing_ok=True)
with slide_lock(cache, "S1", machine=sys.argv[2], heartbeat_s=0.05, stale_s=0.6) as lock:
    (cache / "busy").mkdir()  # fails if another is at it
    time.sleep(0.1)
    lock.check()
    (cache / "busy").rmdir()
"""
    started = [
        subprocess.Popen([sys.executable, "-c", share + script, str(tmp_path), f"m{n}"]) for n in range(4)
    ]
    assert [process.wait(120) for process in started] == [0, 0, 0, 0]
    assert [name for name in files(tmp_path) if "lease" in name] == []


def test_a_lease_that_cannot_be_read_back_is_lost(tmp_path: Path) -> None:
    with slide_lock(tmp_path, "S1") as lock:
        (tmp_path / ".locks" / "S1.lease").unlink()
        with pytest.raises(LeaseLostError, match=r"cannot be renewed.*run again to continue"):
            lock.check()


@pytest.mark.parametrize("share", SHARES)
def test_a_slide_is_tiled_on_any_share(
    pyramid_tiff: PyramidTiff, tissue_picture: Callable[..., Picture], tmp_path: Path, share: str
) -> None:
    slide = pyramid_tiff(tissue_picture(256), mpp=1.0)
    script = """
import sys
from pathlib import Path
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.run import tile_slides
from slidetl.tiles.tile import SlideSource
(row,) = tile_slides([SlideSource("S1", Path(sys.argv[2]))], Path(sys.argv[1]), TileSpec(1.0, 32), workers=0)
print(row.status, row.reason)
"""
    done = subprocess.run(
        [sys.executable, "-c", share + script, tmp_path, slide], capture_output=True, text=True
    )
    assert done.stdout.split() == ["used"], done.stdout + done.stderr
    assert files(tmp_path) == ["S1.lock", "ledger.csv.lock"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:S1 is held")
def test_without_kernel_locks_a_killed_owner_here_is_waited_for_as_one_elsewhere(
    tmp_path: Path, owners: list[Owner]
) -> None:
    owner = Owner(tmp_path, share=WITHOUT.format(call="fcntl.flock", error="ENOLCK"))
    owners.append(owner)
    held = threading.Event()

    def wait() -> None:  # with a kernel lock, which says nothing of an owner that could not take one
        with slide_lock(tmp_path, "S1", heartbeat_s=BEAT, stale_s=STALE):
            held.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not held.wait(3 * STALE)
    assert dead_leases(tmp_path) == ()
    owner.check()
    owner.says("ours")
    owner.kill()
    assert held.wait(STALE + 5)
    thread.join()


@pytest.mark.parametrize(
    "place",
    [
        *(".locks", ".locks/a.lock", ".locks/a.lease", ".building", ".building/a", ".building/a/group"),
        *(
            ".building/a/group/tiles/zarr.json",
            ".building-features/a",
            "a.zarr",
            "a.zarr/features",
            "previews",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "file", "dangling", "fifo"])
def test_nothing_is_followed_within_a_cache(place: str, kind: str, tmp_path: Path) -> None:
    victim, cache = tmp_path / "victim", tmp_path / "cache"
    (victim / "thesis").mkdir(parents=True)
    (victim / "thesis" / "chapter").write_text("ten years")
    (cache / place).parent.mkdir(parents=True)
    if kind == "fifo":
        os.mkfifo(cache / place)
    else:
        targets = {"folder": victim, "file": victim / "thesis" / "chapter", "dangling": tmp_path / "gone"}
        (cache / place).symlink_to(targets[kind])
    with (
        pytest.raises(CacheError, match=re.escape(f"{place}: a link or a special file")),
        slide_lock(cache, "a"),
    ):
        raise AssertionError("the lock was given")
    assert [path.name for path in victim.rglob("*")] == ["thesis", "chapter"]
    assert (victim / "thesis" / "chapter").read_text() == "ten years" and not (tmp_path / "gone").exists()


def test_a_cache_that_is_a_link_itself_is_the_users_choice(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    with slide_lock(tmp_path / "cache", "a"):
        assert (tmp_path / "disk" / ".locks" / "a.lease").exists()


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Takes the rights of another user, if the tests are run by root, who may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("folder_mode", "lock_mode", "said"),
    [
        (0o777, 0o444, ""),
        (0o777, 0o000, r"Permission denied: its owner must let other users lock it, by 'chmod a\+w'$"),
        (0o555, 0o444, "Permission denied$"),
    ],
)
def test_the_lock_file_of_another_user_serves_in_a_folder_of_both(
    folder_mode: int, lock_mode: int, said: str
) -> None:
    busy = CacheError("busy")
    with tempfile.TemporaryDirectory() as name:  # unlike tmp_path, below folders that any user may enter
        folder, lock = Path(name), Path(name) / ".lock"
        lock.touch()
        lock.chmod(lock_mode)
        folder.chmod(folder_mode)
        with another_user():
            if not said:
                with only_process(folder, busy), pytest.raises(CacheError, match="busy"):
                    only_process(folder, busy).__enter__()
            else:
                with pytest.raises(OutputError, match=f"^{lock}: cannot be written: {said}"):
                    only_process(folder, busy).__enter__()
        folder.chmod(0o700)


def test_a_file_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("private")
    (tmp_path / "labels.csv").chmod(0o600)
    (tmp_path / ".lock").hardlink_to(tmp_path / "labels.csv")
    with only_process(tmp_path, CacheError("busy")):
        assert (tmp_path / "labels.csv").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "labels.csv").read_text() == "private"


def lock_as_nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS turns an exclusive flock into a lock of fcntl, which needs a file that is open for writing."""

    def of_nfs(file: IO[bytes], operation: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", of_nfs)


def test_users_of_a_folder_on_nfs_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = CacheError("busy")
    lock_as_nfs(monkeypatch)
    with tempfile.TemporaryDirectory() as name:
        folder, lock = Path(name), Path(name) / ".lock"
        folder.chmod(0o777)
        umask = os.umask(0o022)
        try:
            with only_process(folder, busy):
                assert lock.stat().st_mode & 0o777 == 0o666
                with another_user(), pytest.raises(CacheError, match="busy"):
                    only_process(folder, busy).__enter__()
        finally:
            os.umask(umask)
        lock.chmod(0o444)  # by another program
        with (
            another_user(),
            pytest.raises(OutputError, match=rf"{lock}: .*denied: its owner .* 'chmod a\+w'"),
        ):
            only_process(folder, busy).__enter__()
