from __future__ import annotations

import pytest
import torch

from slidetl.models.precision import exact_float32, has_bfloat16


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_convolutions_of_a_gpu_are_in_float32_for_a_while(device: str) -> None:
    assert torch.backends.cudnn.allow_tf32
    with exact_float32(torch.device(device)):
        assert torch.backends.cudnn.allow_tf32 == (device == "cpu")
    with pytest.raises(RuntimeError), exact_float32(torch.device(device)):
        raise RuntimeError
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("native", [False, True])
def test_a_gpu_that_emulates_bfloat16_has_none(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native
    )
    assert not has_bfloat16(torch.device("cuda")) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert has_bfloat16(torch.device("cuda:1")) == native
    assert not has_bfloat16(torch.device("cpu"))
