"""The lists of pages that readers of the Markdown follow."""

from __future__ import annotations

from pathlib import Path

import pytest

_DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("folder", ["design", "evidence", "howto", "reference"])
def test_an_index_links_every_page_of_its_folder(folder: str) -> None:
    index = (_DOCS / folder / "index.md").read_text(encoding="utf-8")
    pages = {page.name for page in (_DOCS / folder).glob("*.md")} - {"index.md", "command-line.md"}
    assert pages and {page for page in pages if f"]({page})" not in index.replace("\n", " ")} == set()
