from __future__ import annotations

from pathlib import Path

import pytest

from slidetl.errors import UsageError
from slidetl.library.trust import check_record, is_trusted, record_path, trust

SHA = "0123456789abcdef" * 4


def test_only_what_was_recorded_is_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path / "new"))
    assert not is_trusted(SHA)
    check_record()
    trust(SHA, "model\nof 2026.pt")
    trust(SHA, "once more")
    assert is_trusted(SHA) and not is_trusted(SHA[:-1] + "0")
    assert record_path().read_text() == f"{SHA}  model of 2026.pt\n"


def test_what_is_no_hash_is_not_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="SHA-256"):
        trust("abc\n" + SHA, "x")
    assert not record_path().exists()


def test_a_list_that_cannot_be_written_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIDETL_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(UsageError, match="SLIDETL_HOME"):
        trust(SHA, "x")
    with pytest.raises(UsageError, match="SLIDETL_HOME"):
        check_record()
