# ruff: noqa: F811  # the fixtures of the reports' pages are used here too
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slidetl.cli import main
from tests.conftest import Study
from tests.grading.report.test_browser import Open, browser, open_page  # noqa: F401  # fixtures


@pytest.mark.slow
def test_the_atlas_shows_any_slide_with_its_clusters_and_leads_to_a_tile(
    patterned: Study, tmp_path: Path, open_page: Open
) -> None:
    words = ["atlas", "cluster", str(patterned.cache), "--features", "told", "--output", str(tmp_path)]
    words += ["--manifest", str(patterned.manifest), "--method", "k-means", "--clusters", "4"]
    assert main([*words, "--slides", "slide-00", "slide-05", "slide-07"]) == 0
    opened = open_page(tmp_path / "atlas.html")
    whole = opened.overlay()
    assert whole[..., 3].any()
    opened.page.select_option("#choose-slide", label="slide-05")
    opened.settle()
    other = opened.overlay()
    assert not np.array_equal(whole, other)
    opened.page.select_option("#choose-category", label="1")
    opened.settle()
    one = opened.overlay()
    assert 0 < (one[..., 3] > 0).sum() < (other[..., 3] > 0).sum()
    tile = opened.page.locator("button.tile[data-slide='2']").first
    tile.click()
    opened.settle()
    assert (
        opened.page.locator("#choose-slide").evaluate("chooser => chooser.selectedOptions[0].text")
        == "slide-07"
    )
    command = opened.page.locator("#like code").inner_text()
    assert command.startswith(f"slidetl atlas similar {patterned.cache} --features told --manifest ")
    shown = command.split("--tile ")[1].split()[0]
    assert shown.startswith("slide-07@")
    # The frame of the chosen tile is in the middle of the view.
    height, width = opened.overlay().shape[:2]
    frame = (opened.overlay()[..., :3] == (11, 87, 208)).all(2).nonzero()
    assert abs(frame[1].mean() - width / 2) < 0.05 * width
    assert abs(frame[0].mean() - height / 2) < 0.05 * height


def test_similar_tiles_are_shown_without_a_script(patterned: Study, tmp_path: Path, open_page: Open) -> None:
    output = tmp_path / "index.html"  # no viewer to wait for
    words = ["atlas", "similar", str(patterned.cache), "--features", "told", "--output", str(tmp_path)]
    assert main([*words, "--tile", "slide-00@256,256", "--count", "4"]) == 0
    (tmp_path / "similar.html").rename(output)
    opened = open_page(output)
    assert opened.page.locator(".hit").count() == 1 + 4 + 1
    broken = opened.page.locator("img").evaluate_all("all => all.filter(i => !i.naturalWidth).length")
    assert broken == 0
