from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tools.set_address import with_absolute_links, with_urls

ROOT = Path(__file__).parents[2]
ADDRESS = "https://example.org/group/slidetl"


def test_every_link_of_the_page_becomes_the_address_of_a_file_that_is_there() -> None:
    page = with_absolute_links((ROOT / "README.md").read_text(encoding="utf-8"), ADDRESS)
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert len(links) > 10
    for link in links:
        kind, path = re.fullmatch(rf"{ADDRESS}/(blob|raw)/main/(\S+)", link).groups()  # type: ignore[union-attr]
        assert (ROOT / path).exists(), link
        assert (kind == "raw") == (Path(path).suffix in {".png", ".svg"}), link


def test_a_second_address_replaces_the_first() -> None:
    for name, change in (("README.md", with_absolute_links), ("pyproject.toml", with_urls)):
        text = (ROOT / name).read_text(encoding="utf-8")
        moved = change(change(text, "https://example.org/old"), ADDRESS)
        assert moved == change(text, ADDRESS)
        assert moved != text


def test_foreign_links_and_anchors_stay() -> None:
    page = "[a](https://example.org) [b](#limits) [c](mailto:x@example.org) ![p](a/b.png)"
    assert with_absolute_links(page, ADDRESS) == page.replace("a/b.png", f"{ADDRESS}/raw/main/a/b.png")


def test_the_metadata_gain_the_addresses_and_keep_the_rest() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    before, after = tomllib.loads(text), tomllib.loads(with_urls(text, ADDRESS))
    urls = after["project"].pop("urls")
    assert urls["Repository"] == ADDRESS
    assert all(url.startswith(ADDRESS) for url in urls.values())
    before["project"].pop("urls", None)
    assert after == before
