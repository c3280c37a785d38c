from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from slidetl.processes import begin

PARENT = """
import multiprocessing, os, sys, time
from slidetl.processes import begin
child = multiprocessing.get_context("spawn").Process(target=begin, args=(os.getpid(), "time", "sleep", 600))
if __name__ == "__main__":
    child.start()
    print(child.pid, flush=True)
    time.sleep(600)
"""


def is_running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_process_of_a_pool_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while b"spawn_main" not in Path(f"/proc/{child}/cmdline").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert is_running(child)
        parent.send_signal(signal.SIGKILL)
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_work_begins_by_its_name(tmp_path: Path) -> None:
    begin(os.getppid(), "os", "mkdir", tmp_path / "done")
    assert (tmp_path / "done").is_dir()
