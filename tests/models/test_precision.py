from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from slidetl.errors import UsageError
from slidetl.models.precision import chosen_device, exact_float32, has_bfloat16


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


@pytest.fixture
def tf32() -> Iterator[tuple[Any, ...]]:
    """What may compute in TF32, all of it allowed to, as in some containers."""
    kinds: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = True
    yield kinds
    for kind, allowed in zip(kinds, before, strict=True):
        kind.allow_tf32 = allowed


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_gpu_computes_in_float32_for_a_while(device: str, tf32: tuple[Any, ...]) -> None:
    with exact_float32(torch.device(device)):
        assert [kind.allow_tf32 for kind in tf32] == [device == "cpu"] * 2
    with pytest.raises(RuntimeError), exact_float32(torch.device(device)):
        raise RuntimeError
    assert all(kind.allow_tf32 for kind in tf32)


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
