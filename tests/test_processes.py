from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from slidetl.processes import see_one_card, start_child

PARENT = """
import time
from slidetl.processes import start_child
def work(connection):
    time.sleep(600)
if __name__ == "__main__":
    print(start_child(work).process.pid, flush=True)
    time.sleep(600)
"""


def is_running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
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


def warn(connection: Connection) -> None:
    warnings.simplefilter("default")
    warnings.warn("S1 is held", stacklevel=1)


def test_a_warning_of_a_child_is_a_line_as_of_its_parent(capfd: pytest.CaptureFixture[str]) -> None:
    start_child(warn).process.join()
    assert capfd.readouterr().err == "slidetl: warning: S1 is held\n"


@pytest.mark.parametrize(("visible", "left"), [(None, "1"), ("4,7", "7")])
def test_one_card_is_left_of_those_that_a_process_sees(
    visible: str | None, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    see_one_card(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
