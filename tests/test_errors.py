from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from slidetl.cli import main
from slidetl.errors import UsageError, describe_failure, is_gpu_full, is_out_of_memory


def raised(work: object) -> BaseException:
    assert callable(work)
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_want_of_memory_is_known_whoever_says_it() -> None:
    errors = [
        raised(lambda: np.zeros(2**60, np.uint8)),
        raised(lambda: torch.empty(2**60, dtype=torch.uint8)),
        raised(lambda: bytearray(2**62)),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ..."),
    ]
    assert all(map(is_out_of_memory, errors))
    assert [error for error in errors if is_gpu_full(error)] == errors[4:8]
    ended = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    assert not is_out_of_memory(ended)
    ended.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert is_out_of_memory(ended)
    for other in (
        ValueError("memory"),
        OSError(errno.ENOENT, "no"),
        UsageError("not enough memory on the card"),
    ):
        assert not is_out_of_memory(other)


def test_a_failure_is_one_line_with_what_to_do() -> None:
    memory = describe_failure(raised(lambda: torch.empty(2**60, dtype=torch.uint8)), "use fewer --workers")
    assert memory.startswith("out of memory: use fewer --workers (") and "\n" not in memory
    assert describe_failure(MemoryError(), "lower --jobs") == "out of memory: lower --jobs"
    assert describe_failure(KeyError("a\nb"), "") == r"KeyError: 'a\nb'"
    assert describe_failure(UsageError("one\ntwo"), "") == "one two"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("fit", "--data.bag_size"),
        ("fit", "--data.chunk_size"),
        ("test", "--data.chunk_size"),
        ("predict", "--data.chunk_size"),
    ],
)
def test_want_of_memory_ends_a_command_with_one_line(
    command: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slidetl.cli.training.run", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    assert main([command]) == 2
    err = capsys.readouterr().err
    assert err.startswith("slidetl: error: out of memory: lower") and option in err and err.count("\n") == 1
    with pytest.raises(RuntimeError, match="allocate"):
        main([command, "--debug"])
