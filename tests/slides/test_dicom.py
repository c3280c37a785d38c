from __future__ import annotations

from pathlib import Path

import pytest

from slidetl.slides.dicom import series_instance_uid


def element(group: int, number: int, uid: bytes) -> bytes:
    uid += b"\0" * (len(uid) % 2)
    tag = group.to_bytes(2, "little") + number.to_bytes(2, "little")
    return tag + b"UI" + len(uid).to_bytes(2, "little") + uid


STUDY = element(0x20, 0x0D, b"1.2.3")


@pytest.mark.parametrize(
    ("content", "uid"),
    [
        (STUDY + element(0x20, 0x0E, b"1.2.3.4"), "1.2.3.4"),
        (STUDY + element(0x20, 0x0E, b"1.2.3.45"), "1.2.3.45"),
        # A reference to another series comes before the file's own, its group being lower.
        (element(0x20, 0x0E, b"9.9") + STUDY + element(0x20, 0x0E, b"1.2.3.4"), "1.2.3.4"),
        (element(0x20, 0x0E, b"9.9"), None),
        (b"no DICOM", None),
        (b"", None),
    ],
)
def test_finds_the_series_of_the_file_itself(tmp_path: Path, content: bytes, uid: str | None) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(b"\0" * 128 + b"DICM" + content + element(0x28, 0x02, b"1"))
    assert series_instance_uid(path) == uid


def test_says_what_openslide_says(test_data: Path) -> None:
    import openslide

    paths = sorted((test_data / "slides").glob("*.dcm"))
    assert len(paths) >= 3
    for path in paths:
        with openslide.OpenSlide(path) as slide:
            assert series_instance_uid(path) == slide.properties["dicom.SeriesInstanceUID"]
