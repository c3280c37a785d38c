from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from slidetl.errors import UsageError
from slidetl.models.precision import chosen_device, has_bfloat16


@pytest.mark.parametrize(("is_there", "usual"), [(True, "cuda"), (False, "cpu")])
def test_a_device_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch, is_there: bool, usual: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen_device() == chosen_device("auto", 2) == torch.device(usual)
    assert chosen_device("cpu", 9) == torch.device("cpu")
    with pytest.raises(UsageError, match="must be auto, cpu or cuda, not 'gpu'"):
        chosen_device("gpu")
    why = "--devices 3: there are 2 GPUs here" if is_there else "finds no GPU here; use --device cpu"
    with pytest.raises(UsageError, match=why):
        chosen_device("cuda", 3)


_FOR_A_WHILE = """
import os
import torch
from slidetl.models.precision import exact_float32

CHOICES = (
    "",
    "torch.backends.cuda.matmul.allow_tf32 = True",  # as in some containers
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
)
kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn

def chosen():
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        return "by the new names"

def precisions():
    return [kind.fp32_precision for kind in kinds]

for choice in CHOICES:
    if child := os.fork():  # no setting of torch brings back the state before a choice
        assert os.waitpid(child, 0)[1] == 0, choice
        continue
    exec(choice)
    before = precisions(), chosen()
    for device, within in (("cuda:0", ["ieee"] * 3), ("cpu", before[0])):
        try:
            with exact_float32(torch.device(device)):
                assert precisions() == within, (device, precisions())
                raise KeyError
        except KeyError:
            assert (precisions(), chosen()) == before, (device, precisions(), chosen(), before)
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_a_gpu_computes_in_float32_for_a_while_whatever_the_process_chose() -> None:
    done = subprocess.run([sys.executable, "-c", _FOR_A_WHILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_gpu_that_emulates_bfloat16_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = [(7, 5), (8, 0), (9, 0), (7, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index or 0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    assert [has_bfloat16(torch.device("cuda", index)) for index in range(4)] == [False, True, True, False]
    assert not has_bfloat16(torch.device("cuda")) and not has_bfloat16(torch.device("cpu"))
    assert not has_bfloat16(torch.device("cuda", len(capabilities)))  # another machine's
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not has_bfloat16(torch.device("cuda:1"))
