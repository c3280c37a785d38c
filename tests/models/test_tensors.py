from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from slidetl.errors import WeightsError
from slidetl.models.tensors import check_finite, is_state, load_tensors, save_tensors


def test_tensors_read_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    save_tensors(tmp_path / "a.pth", {"a": shared, "b": shared[2:], "c": [1, "x"]})
    found = load_tensors(tmp_path / "a.pth")
    assert torch.equal(found["b"], shared[2:]) and found["c"] == [1, "x"]
    torch.save({"a": shared}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_tensors(tmp_path / "old.pth")["a"], shared)


def test_what_would_grow_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "stride.pth", {"a": [{"b": torch.zeros(1).expand(2 * 10**9)}]})
    with pytest.raises(ValueError, match=r"a tensor \[2000000000\] would be larger than the file"):
        load_tensors(tmp_path / "stride.pth")
    save_tensors(tmp_path / "plain.pth", {"a": torch.zeros(10**6)})
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as archive,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as copy,
    ):
        for name in archive.namelist():
            copy.writestr(name, archive.read(name))
    with pytest.raises(ValueError, match="packed"):
        load_tensors(tmp_path / "packed.pth")


def test_empty_and_torn_files_say_so_in_a_line(tmp_path: Path) -> None:
    save_tensors(tmp_path / "whole.pth", {"a": torch.zeros(1000)})
    content = (tmp_path / "whole.pth").read_bytes()
    for name, part, said in (("empty", b"", "the file is empty"), ("torn", content[:999], ".")):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(ValueError, match=said) as caught:
            load_tensors(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_unusual_tensors_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "sparse.pth", {"a": torch.eye(3).to_sparse()})
    with pytest.raises(ValueError):
        load_tensors(tmp_path / "sparse.pth")
    assert is_state({"a": torch.zeros(1)})
    assert not any(map(is_state, ({1: torch.zeros(1)}, {"a": 1}, [torch.zeros(1)])))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    check_finite({"a": torch.zeros(2), "n": torch.ones(1, dtype=torch.int64)}, "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth: b has values that are not finite"):
        check_finite({"a": torch.zeros(2), "b": torch.tensor([0.0, value])}, "a.pth")
