from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slidetl.tiles.identifier import clash_key, safe_slide_id


@given(st.text(max_size=300))
@example("con." + "x" * 146)
@example("e\u200b\u0301" * 60)
def test_identifiers_are_single_safe_names(name: str) -> None:
    safe = safe_slide_id(name)
    assert safe == safe_slide_id(safe) == unicodedata.normalize("NFC", safe)
    assert not set(safe) & set('/\\:*?"<>|') and not safe.startswith((".", "-")) and not safe.endswith(".")
    assert len(safe.encode()) <= 150 and safe.isprintable() and " " not in safe


@pytest.mark.parametrize(
    ("name", "identifier"),
    [
        *((name, name) for name in ("患者1", "患者", "Пациент-А", "슬라이드", "हिन्दी", "a.b-c_d", "con1")),
        ("slide 1 (copy)", "slide_1_copy_"),
        ("cafe\u0301", "caf\u00e9"),
        (unicodedata.normalize("NFD", "슬라이드"), "슬라이드"),
        ("../../x", "_.._x"),
        ("a\u202eb", "a_b"),  # would show what follows in reverse
        ("con", "_con"),
        ("NUL.tar", "_NUL.tar"),
        ("COM¹", "_COM¹"),
        ("dot.", "dot"),
        ("!?", ""),
        ("\u0301", ""),
        ("\udcff1", "_1"),  # a byte that is no UTF-8
    ],
)
def test_letters_of_every_script_stay(name: str, identifier: str) -> None:
    assert safe_slide_id(name) == identifier


def test_long_names_stay_apart() -> None:
    one, two = (safe_slide_id("患" * 100 + end) for end in "ab")
    assert one != two and one.startswith("患" * 40) and len(one.encode()) <= 150


def test_names_that_a_file_system_takes_for_one_have_one_key() -> None:
    assert clash_key("Пациент-А") == clash_key("пациент-а")
    assert clash_key("Straße") == clash_key("STRASSE")
    assert clash_key("患者1") != clash_key("患者2")
