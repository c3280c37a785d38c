"""One writer per slide: a kernel lock on one machine, a lease with a heartbeat between machines.

The kernel lock (``flock``) dies with its owner, so a killed run blocks nobody on its machine. Shared file
systems may lack it or not carry it across machines, hence the lease: a small file with its owner and a
counter, raised every few seconds. Waiting processes watch the counter by their own clock: no clocks of two
machines are compared.

Takeover and renewal cannot both succeed. The owner renews *within the file it created* and then checks if
this file still has the lease's name; a successor renames the file away and then checks if it was renewed. The
later of the two sees the earlier. This needs exclusive creation and renaming, no hard links or ``flock``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from slidetl.errors import CacheError, OutputError, SlidetlError
from slidetl.files import describe_full
from slidetl.text import one_line

HEARTBEAT_S = 10.0
STALE_S = 60.0  # no renewal for so long: its owner is dead


class LeaseLostError(CacheError):
    """Another machine took over the slide while this process stood still; its work must not be stored."""


def machine_id() -> str:
    """Names this boot of this machine, the scope of a kernel lock."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class SlideLock:
    """The right to write one slide, given by :func:`slide_lock`."""

    def __init__(
        self, lease: Path, machine: str, has_kernel_lock: bool, heartbeat_s: float, stale_s: float
    ) -> None:
        self._lease = lease
        self._has_kernel_lock = has_kernel_lock
        self._heartbeat_s = heartbeat_s
        self._stale_s = stale_s
        self._about: dict[str, Any] = {
            "owner": secrets.token_hex(8),
            "machine": machine,
            "has_kernel_lock": has_kernel_lock,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._beats = 0
        self._beaten_at = 0.0
        self._file: IO[bytes] | None = None
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True, name="slidetl-lease")

    def check(self) -> None:
        """Checks before a commit if this process still holds the slide.

        Raises:
            LeaseLostError: another machine has taken the slide over, or the lease cannot be renewed.
        """
        try:
            # A younger heartbeat cannot have been taken for stale.
            if _now() - self._beaten_at > self._stale_s / 2:
                self._beat()
            is_ours = self._is_ours(self._lease.read_bytes())
        except OSError as error:
            raise self._lost(f"it cannot be renewed ({error.strerror})") from error
        if not is_ours:
            raise self._lost("another process has it")

    def _lost(self, why: str) -> LeaseLostError:
        return LeaseLostError(
            f"{self._lease}: the lease on this slide was lost: {why}; this happens to a process that stood "
            f"still for over {self._stale_s:.0f} s. Nothing is spoilt; run again to continue"
        )

    def _is_ours(self, content: bytes) -> bool:
        return bool(_parsed(content).get("owner") == self._about["owner"])

    def _acquire(self) -> None:
        seen, since, waits = b"", _now(), False
        while self._file is None:
            try:
                self._file = self._lease.open("xb", buffering=0)
                break
            except FileExistsError:
                pass
            try:
                content = self._lease.read_bytes()
            except FileNotFoundError:
                continue  # released this moment
            if content != seen:
                seen, since = content, _now()
            about = _parsed(content)
            # An owner on this machine lost the kernel lock, now ours, so it is dead.
            is_dead = self._has_kernel_lock and (
                about.get("machine") == self._about["machine"] and about.get("has_kernel_lock") is True
            )
            if is_dead or _now() - since > self._stale_s:
                self._take_away(content, any_beat=is_dead)
            else:
                if not waits:
                    _warn_of_wait(self._lease, about, f"ends, or has been silent for {self._stale_s:g} s")
                waits = True
                time.sleep(min(1.0, self._heartbeat_s / 4))
        try:
            self._beat()
            self._thread.start()
        except BaseException:  # an open file would keep the kernel's lock, a lease of ours the slide
            self._file.close()
            self._lease.unlink(missing_ok=True)
            raise

    def _release(self) -> None:
        self._stop.set()
        self._thread.join()
        assert self._file is not None  # from _acquire
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            content = self._lease.read_bytes()
            if self._is_ours(content):
                self._take_away(content, any_beat=True)

    def _take_away(self, content: bytes, any_beat: bool) -> None:
        """Removes a lease if it is unchanged since it was read; else puts it back."""
        aside = self._lease.with_name(f"{self._lease.name}.{self._about['owner']}.old")
        try:
            self._lease.rename(aside)
        except FileNotFoundError:
            return  # another was faster
        now = aside.read_bytes()
        if now == content or (any_beat and _parsed(now).get("owner") == _parsed(content).get("owner")):
            aside.unlink()
        else:
            # A third process with a new lease in between has stored nothing yet; its next check fails.
            aside.rename(self._lease)

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            # check() reports lasting failure before a commit.
            with contextlib.suppress(OSError):
                self._beat()

    def _beat(self) -> None:
        assert self._file is not None  # from _acquire
        with self._guard:
            self._beats += 1
            started = _now()
            line = json.dumps({**self._about, "beat": f"{self._beats:012}"}) + "\n"
            # In place: if the file was renamed away, the new lease is unharmed. The length stays the same.
            os.pwrite(self._file.fileno(), line.encode(), 0)
            # Closing a file sends it to its server (NFS, SMB), visible to other machines. No fsync: no lease
            # outlives its machine.
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

    On one machine the lock is free as soon as its owner dies. A dead or stopped owner on another machine is
    superseded after ``stale_s``, and so is one here without kernel locks. If the file system carries those
    between machines (NFS 4), the server has to drop the lock of a dead machine first.

    Args:
        cache_dir: the folder of all caches; created if missing.
        slide_id: the slide.
        machine: names the machine; by default :func:`machine_id`.
        heartbeat_s: interval of the renewals of the lease, seconds.
        stale_s: time without renewal before a takeover, seconds; the same on all machines.

    Yields:
        The lock; call :meth:`SlideLock.check` before each commit.

    Raises:
        CacheError: a link is in the way of this slide's files.
    """
    refuse_links(cache_dir, slide_id)
    locks = cache_dir / ".locks"
    path, lease = locks / f"{slide_id}.lock", locks / f"{slide_id}.lease"
    with contextlib.ExitStack() as held:
        try:
            is_locked = held.enter_context(kernel_lock(path, wait=False))
        except BlockingIOError:
            _warn_of_wait(lease, _read(lease), "ends")
            is_locked = held.enter_context(kernel_lock(path))
        lock = SlideLock(lease, machine or machine_id(), is_locked, heartbeat_s, stale_s)
        lock._acquire()
        try:
            yield lock
        finally:
            lock._release()


def _warn_of_wait(lease: Path, about: dict[str, Any], until: str) -> None:
    holder = f"process {about['pid']} on {about['host']}" if {"pid", "host"} <= about.keys() else "a process"
    warnings.warn(one_line(f"{lease.stem} is held by {holder}; waiting until it {until}"), stacklevel=3)


def _read(lease: Path) -> dict[str, Any]:
    try:
        return _parsed(lease.read_bytes())
    except OSError:  # taken or released this moment
        return {}


def refuse_links(cache_dir: Path, slide_id: str) -> None:
    """Refuses links and special files among the paths written for a slide of a shared cache.

    Anyone with write access could plant them, and so make us write or delete elsewhere.

    Raises:
        CacheError: there is one.
    """
    group = cache_dir / f"{slide_id}.zarr"
    growing = [cache_dir / name / slide_id for name in (".building", ".building-features")]
    locks = [cache_dir / ".locks" / f"{slide_id}.{kind}" for kind in ("lock", "lease")]
    places = [group, group / "features", cache_dir / "previews", *growing, *locks]
    inside = (path for place in growing if not place.is_symlink() for path in place.rglob("*"))
    for path in (*(place.parent for place in (*growing, *locks)), *places, *inside):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            mode = path.lstat().st_mode
            if path != cache_dir and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise CacheError(
                    f"{path}: a link or a special file, which is not followed within a cache; remove it, if "
                    "nobody needs it"
                )


def dead_leases(cache_dir: Path) -> tuple[str, ...]:
    """Lists the slides with a dead holder: it ran on this machine and lost its kernel lock."""
    found = []
    for path in sorted((cache_dir / ".locks").glob("*.lease")):
        about = _read(path)
        is_here = about.get("machine") == machine_id() and about.get("has_kernel_lock") is True
        if is_here and _is_free(path.with_suffix(".lock")):
            found.append(path.name.removesuffix(".lease"))
    return tuple(found)


@contextlib.contextmanager
def kernel_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the kernel's lock on a file, made with its folder; waits while another process has it.

    Yields:
        False if the file system has no such locks: the block then runs without one.

    Raises:
        BlockingIOError: another process has it, and ``wait`` is False.
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file stays: after an unlink, two processes could hold locks on two files of one name.
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    appending = flags | os.O_WRONLY | os.O_APPEND | os.O_CREAT
    denied: PermissionError | None = None
    try:
        try:
            descriptor = os.open(path, appending | os.O_EXCL, 0o666)
            with contextlib.suppress(OSError):  # a file system without modes
                os.fchmod(descriptor, 0o666)  # whatever the umask: NFS locks only what a user may write
        except FileExistsError:  # it may be anyone's: its mode stays
            descriptor = os.open(path, appending, 0o666)
    except PermissionError as error:
        # Another user's file serves too, for reading, in a folder that both may write to.
        if not (path.exists() and os.access(path.parent, os.W_OK, effective_ids=True)):
            raise
        why = f"{error.strerror}: its owner must let other users lock it, by 'chmod a+w'"
        denied = PermissionError(error.errno, why, str(path))
        try:
            descriptor = os.open(path, os.O_RDONLY | flags)
        except PermissionError as unreadable:
            raise denied from unreadable
    with os.fdopen(descriptor, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except BlockingIOError:
            raise
        except OSError as error:
            if denied is not None and error.errno == errno.EBADF:  # NFS, as the file is open for reading
                raise denied from error
            # File systems without locks say so by many numbers: ENOLCK, ENOSYS, ENOTSUP, EINVAL, EPERM.
            is_locked = False
        yield is_locked


@contextlib.contextmanager
def only_process(folder: Path, busy: SlidetlError) -> Iterator[None]:
    """Keeps other processes out of a folder, made if missing, while the context is open or this one lives.

    Raises:
        SlidetlError: ``busy``, as another process has it.
        OutputError: nothing can be written there.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(kernel_lock(folder / ".lock", wait=False))
        except BlockingIOError as error:
            raise busy from error
        except OSError as error:
            raise OutputError(
                f"{error.filename or folder}: cannot be written: {describe_full(error)}"
            ) from error
        yield


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
