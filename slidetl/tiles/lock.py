"""One writer per slide: a kernel lock on one machine, a lease with a heartbeat between machines.

The kernel lock (``flock``) dies with its owner, so that on one machine a killed run blocks nobody. File
systems that machines share may not carry it across, hence the lease: a small file that names its owner and
holds a counter, raised every few seconds. Who waits watches whether the counter stands still, by its own
clock: the clocks of two machines are never compared.

Taking over and renewing cannot both succeed. The owner renews *within the file it created* and then looks
whether that file still lies under the lease's name; who takes over renames the file away and then looks
whether it was renewed. Whichever comes first, the other sees it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from slidetl.errors import CacheError

HEARTBEAT_S = 10.0
STALE_S = 60.0  # the counter stood still for so long: its owner is gone

# A file system without flock says one of these.
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class LeaseLostError(CacheError):
    """Another machine took a slide over while this process was stopped; what it was at must not be stored."""


@dataclass(frozen=True)
class LeaseInfo:
    """Who holds, or held, a slide.

    Attributes:
        slide_id: the slide.
        host: the machine's name, for people.
        pid: its process.
        is_dead: whether it is certain that nobody holds it any more: its process was on this machine, and the
            kernel lock is free. False says nothing.
    """

    slide_id: str
    host: str
    pid: int
    is_dead: bool


def machine_id() -> str:
    """Names this boot of this machine, the span in which a kernel lock means anything."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class SlideLock:
    """The right to write one slide, as :func:`slide_lock` gives it."""

    def __init__(self, lease: Path, machine: str, heartbeat_s: float, stale_s: float) -> None:
        self._lease = lease
        self._machine = machine
        self._heartbeat_s = heartbeat_s
        self._stale_s = stale_s
        self._token = secrets.token_hex(8)
        self._beats = 0
        self._beaten_at = 0.0
        self._file: IO[bytes] | None = None
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True, name="slidetl-lease")

    def check(self) -> None:
        """To be called before each commit.

        Raises:
            LeaseLostError: another machine has taken the slide over, or the lease cannot be renewed.
        """
        try:
            # A younger heartbeat than this nobody can have taken for stale.
            if _now() - self._beaten_at > self._stale_s / 2:
                self._beat()
            is_ours = _token_of(self._lease.read_bytes()) == self._token
        except OSError as error:
            raise self._lost(f"it cannot be renewed ({error.strerror})") from error
        if not is_ours:
            raise self._lost("another process has it")

    def _lost(self, why: str) -> LeaseLostError:
        return LeaseLostError(
            f"{self._lease}: the lease on this slide was lost: {why}; this happens to a process that stood "
            f"still for over {self._stale_s:.0f} s. Nothing is spoilt; run again to continue"
        )

    def _acquire(self, has_kernel_lock: bool) -> None:
        mine = self._lease.with_name(f"{self._lease.name}.{self._token}")
        self._file = mine.open("xb", buffering=0)
        try:
            self._beat()
            seen, since = b"", _now()
            while True:
                try:
                    os.link(mine, self._lease)
                    break
                except FileExistsError:
                    pass
                try:
                    content = self._lease.read_bytes()
                except FileNotFoundError:
                    continue  # given back this moment
                if content != seen:
                    seen, since = content, _now()
                # Whoever was on this machine has lost the kernel lock that is ours now, so it is gone.
                is_dead = has_kernel_lock and _parsed(content).get("machine") == self._machine
                if is_dead or _now() - since > self._stale_s:
                    self._take_away(content, any_beat=is_dead)
                else:
                    self._beat_when_due()
                    time.sleep(min(1.0, self._heartbeat_s / 4))
        except BaseException:  # whatever it was, an open file would go on holding the kernel's lock
            self._file.close()
            raise
        finally:
            mine.unlink()
        self._beat_when_due()
        self._thread.start()

    def _release(self) -> None:
        self._stop.set()
        self._thread.join()
        assert self._file is not None  # from _acquire
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            content = self._lease.read_bytes()
            if _token_of(content) == self._token:
                self._take_away(content, any_beat=True)

    def _take_away(self, content: bytes, any_beat: bool) -> None:
        """Removes a lease if it still is the one that was read; else it is put back."""
        aside = self._lease.with_name(f"{self._lease.name}.{self._token}.old")
        try:
            self._lease.rename(aside)
        except FileNotFoundError:
            return  # another was faster
        now = aside.read_bytes()
        if now != content and not (any_beat and _token_of(now) == _token_of(content)):
            # If a third has come in between, the owner of this lease finds out at its next check.
            with contextlib.suppress(FileExistsError):
                os.link(aside, self._lease)
        aside.unlink()

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            # If it fails for long, check() says so to whoever wants to commit.
            with contextlib.suppress(OSError):
                self._beat()

    def _beat_when_due(self) -> None:
        if _now() - self._beaten_at > self._heartbeat_s:
            self._beat()

    def _beat(self) -> None:
        assert self._file is not None  # from _acquire
        with self._guard:
            self._beats += 1
            started = _now()
            about = {"owner": self._token, "machine": self._machine, "host": socket.gethostname()}
            line = json.dumps({**about, "pid": os.getpid(), "beat": f"{self._beats:012}"}) + "\n"
            # In place: if the file was renamed away, the new lease is unharmed. The length stays the same.
            os.pwrite(self._file.fileno(), line.encode(), 0)
            # To close a file sends it to its server (NFS, SMB), where other machines see it. The disk is not
            # waited for: no lease outlives its machine.
            os.close(os.dup(self._file.fileno()))
            self._beaten_at = started


@contextlib.contextmanager
def slide_lock(
    cache_dir: Path,
    slide_id: str,
    *,
    machine: str | None = None,
    heartbeat_s: float = HEARTBEAT_S,
    stale_s: float = STALE_S,
) -> Iterator[SlideLock]:
    """Keeps other processes, here and elsewhere, from writing the same slide; waits while one does.

    On one machine it is free the moment its owner dies. Of an owner on another machine that died or stopped,
    it is taken over after ``stale_s``. Where the file system carries kernel locks between machines (NFS 4),
    the server has to drop that of a dead machine first.

    Args:
        cache_dir: the folder of all caches; made if it is not there.
        slide_id: the slide.
        machine: names the machine; by default :func:`machine_id`.
        heartbeat_s: how often the lease is renewed, seconds.
        stale_s: how long it must have stood still to be taken over, seconds; the same on all machines.

    Yields:
        The lock, whose :meth:`SlideLock.check` belongs before each commit.
    """
    locks = cache_dir / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    # The file stays: to unlink it would let two processes hold locks on two files of one name.
    with (locks / f"{slide_id}.lock").open("ab") as file:
        has_kernel_lock = _flock(file)
        lock = SlideLock(locks / f"{slide_id}.lease", machine or machine_id(), heartbeat_s, stale_s)
        lock._acquire(has_kernel_lock)
        try:
            yield lock
        finally:
            lock._release()


def leases(cache_dir: Path) -> list[LeaseInfo]:
    """Who holds slides of a cache, by the files that say so; a killed run leaves its own."""
    found = []
    for path in sorted((cache_dir / ".locks").glob("*.lease")):
        try:
            about = _parsed(path.read_bytes())
        except FileNotFoundError:
            continue  # given back this moment
        slide_id = path.name.removesuffix(".lease")
        is_here = about.get("machine") == machine_id()
        is_dead = is_here and _is_free(path.with_name(f"{slide_id}.lock"))
        found.append(LeaseInfo(slide_id, str(about.get("host", "?")), int(about.get("pid", 0)), is_dead))
    return found


def _flock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return False
        raise
    return True


def _is_free(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _now() -> float:
    # Unlike time.monotonic it also counts while the machine sleeps.
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError:
        return {}  # after a power cut it may be empty; it goes stale like any other
    return values if isinstance(values, dict) else {}


def _token_of(content: bytes) -> str:
    return str(_parsed(content).get("owner", ""))
