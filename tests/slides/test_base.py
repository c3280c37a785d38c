from __future__ import annotations

import hashlib
from pathlib import Path

from slidetl.slides.base import fingerprint_of


def test_a_small_file_is_hashed_whole_and_its_name_does_not_matter(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svs", tmp_path / "b.svs"
    first.write_bytes(b"tissue" * 1000)
    second.write_bytes(first.read_bytes())
    assert fingerprint_of([first]) == fingerprint_of([second]) == hashlib.sha256(b"tissue" * 1000).hexdigest()
    second.write_bytes(b"tissue" * 999 + b"tissuE")
    assert fingerprint_of([first]) != fingerprint_of([second])


def test_a_large_file_differs_by_size_head_middle_and_tail(tmp_path: Path) -> None:
    path = tmp_path / "large.ndpi"
    seen = set()
    size = 70 * 2**20
    for place, length in [(0, size), (size - 1, size), (35 * 2**20, size), (0, size + 1)]:
        with path.open("wb") as file:  # sparse: it costs no disk
            file.truncate(length)
            file.seek(place)
            file.write(b"x")
        seen.add(fingerprint_of([path]))
    assert len(seen) == 4


def test_of_several_files_neither_order_nor_names_matter_but_each_counts(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_text(path.name)
    whole = fingerprint_of(paths)
    assert whole == fingerprint_of(reversed(paths))
    paths[0].write_text("b")
    paths[1].write_text("a")
    assert whole == fingerprint_of(paths)
    assert whole != fingerprint_of(paths[:2])
