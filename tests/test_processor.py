from __future__ import annotations

import gc
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from slidetl import processor
from slidetl.cli import main
from slidetl.processor import postpone_collection

_SIZE = 64 << 20
# Takes 64 MiB, fills them and gives them back; prints how many bytes more the process then holds than before.
_TURNOVER = f"""
import ctypes, sys
from pathlib import Path
from slidetl.processor import hand_back_memory, prepare_for_networks
if sys.argv[1] == "prepared":
    prepare_for_networks()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * {resource.getpagesize()}
before = resident()
taken = libc.malloc({_SIZE})
ctypes.memset(taken, 1, {_SIZE})
libc.free(taken)
if sys.argv[2:]:
    hand_back_memory()
print(resident() - before)
"""


def kept_bytes(*how: str, **environment: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _TURNOVER, *how],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_is_kept_until_it_is_handed_back_unless_the_environment_says_otherwise() -> None:
    assert kept_bytes("prepared") > 0.9 * _SIZE
    assert kept_bytes("ordinary") < 0.1 * _SIZE
    assert kept_bytes("prepared", "handed back") < 0.1 * _SIZE
    assert kept_bytes("prepared", MALLOC_MMAP_THRESHOLD_="131072") < 0.1 * _SIZE


@pytest.mark.parametrize(("command", "is_prepared"), [("grade", True), ("fit", True), ("tile", False)])
def test_only_commands_that_run_a_network_are_prepared(
    command: str, is_prepared: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is restored, then
    monkeypatch.delenv("GOMP_SPINCOUNT")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert ("GOMP_SPINCOUNT" in os.environ) == is_prepared


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_postponed_and_then_as_it_was(enabled: bool) -> None:
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(ImportError), postpone_collection():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_what_a_command_built_is_left_out_of_collections_until_the_end() -> None:
    program = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count()))
from slidetl.processor import postpone_collection
built = []
for of_a_command in (False, True, True):
    with postpone_collection(of_a_command):
        built += [[] for _ in range(1000)]
    print(gc.get_freeze_count())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    library, first, second, end = map(int, done.stdout.split())
    assert library == 0 and first > 1000 and second == first and end == 0


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000", 4),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("6400000 100000", 4),
        ("?", 4),
        (None, 4),
    ],
)
def test_a_container_has_as_many_cores_as_it_may_use(
    limit: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(processor, "CONTROL_GROUP", tmp_path)
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert processor.usable_cores() == cores
