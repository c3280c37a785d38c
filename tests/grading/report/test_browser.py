"""The pages in a real browser, from a file, without a network."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Dialog, FloatRect, Request
from playwright.sync_api import Page as BrowserPage

from slidetl.grading.explain import relative_attention
from slidetl.grading.grade import SlideGrade
from slidetl.grading.report.index import IndexEntry, write_index
from slidetl.grading.report.maps import colour_table
from slidetl.grading.report.slide import write_slide_report
from slidetl.library.model_card import ModelCard
from slidetl.tiles.grid import TileSpec
from tests.browser import chromium
from tests.conftest import Picture, PyramidTiff
from tests.grading.report.conftest import Graded, grade_of
from tests.grading.report.test_slide import HOSTILE

DESKTOP, PHONE = (1280, 800), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@dataclass
class Opened:
    """A page that is open, and everything that it complained of or asked for."""

    page: BrowserPage
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def settle(self) -> None:
        """Waits until the view stands still."""
        self.page.evaluate("window.stillFor = 0")
        self.page.wait_for_function(
            """() => {
              const now = JSON.stringify([document.getElementById("overlay").toDataURL().length,
                                          document.getElementById("scale-bar").style.width]);
              const still = window.before === now ? window.stillFor + 1 : 0;
              window.before = now; window.stillFor = still;
              return still > 4;
            }""",
            polling=60,
        )

    def px_per_um(self) -> float:
        """Width of a micrometre on the screen once the view stands still, from the scale bar."""
        self.settle()
        length, unit = self.page.locator("#scale-bar").inner_text().split()
        return self.box("#scale-bar")["width"] / (float(length) * {"µm": 1, "mm": 1000}[unit])

    def overlay(self) -> Picture:
        """What is laid over the slide, ``[height, width, 4]``, screen pixels."""
        uri = self.page.locator("#overlay").evaluate("canvas => canvas.toDataURL()")
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
            return np.asarray(picture.convert("RGBA"))

    def shot(self, selector: str) -> Picture:
        """An element as it is seen, ``[height, width, 3]``."""
        with Image.open(io.BytesIO(self.page.locator(selector).screenshot())) as picture:
            return np.asarray(picture.convert("RGB"))

    def box(self, selector: str) -> FloatRect:
        found = self.page.locator(selector).bounding_box()
        assert found is not None
        return found


Open = Callable[..., Opened]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """``open_page(path, size=DESKTOP)``; at the end of the test nothing may have been complained of."""
    opened: list[Opened] = []

    def open_it(path: Path, size: tuple[int, int] = DESKTOP) -> Opened:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce", has_touch=size == PHONE
        )
        found = Opened(context.new_page())
        opened.append(found)

        def console(message: ConsoleMessage) -> None:
            found.complaints.append(message.text)

        def failed(error: Any) -> None:
            found.complaints.append(str(error))

        def dialog(shown: Dialog) -> None:
            found.complaints.append(shown.message)
            shown.dismiss()

        def request(asked: Request) -> None:
            found.requests.append(asked.url)

        found.page.on("console", console)
        found.page.on("pageerror", failed)
        found.page.on("dialog", dialog)
        found.page.on("request", request)
        found.page.goto(path.as_uri())
        if path.name != "index.html":
            found.page.wait_for_selector("body[data-ready]")
            found.settle()
        return found

    yield open_it
    for found in opened:
        assert found.complaints == []
        strangers = [url for url in found.requests if not url.startswith(("file://", "data:"))]
        files = [url for url in found.requests if url.startswith("file://")]
        assert strangers == [] and len(files) == 1
        found.page.context.close()


@pytest.fixture
def result(graded: Graded) -> SlideGrade:
    return graded(HOSTILE)


@pytest.fixture
def report(result: SlideGrade, card: ModelCard, tmp_path: Path) -> Path:
    return write_slide_report(result, card, tmp_path / "out", "s1")


def slide_on_screen(opened: Opened, result: SlideGrade) -> tuple[float, float, float]:
    """Where the whole slide lies in the stage when all is shown: left, top, pixels per level-0 pixel."""
    stage = opened.page.locator("#viewer").evaluate("e => [e.clientWidth, e.clientHeight]")
    size = result.plan.info.size_level0
    scale = min(stage[0] / size[0], stage[1] / size[1])
    return (stage[0] - size[0] * scale) / 2, (stage[1] - size[1] * scale) / 2, scale


@pytest.mark.slow
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_map_lies_where_the_tiles_are(
    report: Path, result: SlideGrade, open_page: Open, size: tuple[int, int]
) -> None:
    opened = open_page(report, size)
    left, top, scale = slide_on_screen(opened, result)
    overlay = opened.overlay()
    extent = result.plan.extent_level0[0]
    seen = np.zeros(overlay.shape[:2], bool)
    seen_colours = []
    for x, y in result.origins_level0.tolist():
        columns = slice(round(left + x * scale) + 2, round(left + (x + extent) * scale) - 2)
        rows = slice(round(top + y * scale) + 2, round(top + (y + extent) * scale) - 2)
        tile = overlay[rows, columns]
        assert tile.size and np.ptp(tile.reshape(-1, 4), axis=0).max() <= 2  # one colour all over
        seen_colours.append(tile[0, 0, :3].tolist())
        seen[max(0, rows.start - 4) : rows.stop + 4, max(0, columns.start - 4) : columns.stop + 4] = True
    assert (overlay[~seen] == 0).all()  # and nothing anywhere else
    # Blue lowers, red raises, through white.
    expected = colour_table("RdBu_r")[result.explanation.shades].astype(int)
    np.testing.assert_allclose(seen_colours, expected, atol=3)
    assert (expected[result.explanation.relative.argmax()] @ [1, 0, -1]) > 50


@pytest.mark.slow
def test_the_slide_is_seen(report: Path, result: SlideGrade, slide_picture: Picture, open_page: Open) -> None:
    opened = open_page(report)
    opened.page.check("input[name=map][value='']", force=True)
    opened.settle()
    assert opened.overlay().max() == 0
    left, top, scale = slide_on_screen(opened, result)
    stage = opened.shot("#viewer")
    width, height = (round(size * scale) for size in result.plan.info.size_level0)
    shown = stage[round(top) : round(top) + height, round(left) : round(left) + width]
    expected = np.asarray(Image.fromarray(slide_picture).resize(shown.shape[1::-1], Image.Resampling.BOX))
    # The buttons and the scale bar lie over the slide.
    inner = (slice(60, -60), slice(80, -80))
    correlation = np.corrcoef(shown[inner].mean(2).ravel(), expected[inner].mean(2).ravel())[0, 1]
    assert correlation > 0.9


@pytest.mark.slow
def test_two_fingers_zoom(report: Path, open_page: Open) -> None:
    opened = open_page(report, PHONE)
    home = opened.px_per_um()
    opened.page.locator("#viewer").scroll_into_view_if_needed()
    stage = opened.box("#viewer")
    x, y = stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2
    hand = opened.page.context.new_cdp_session(opened.page)

    def touch(kind: str, *offsets: float) -> None:
        points = [{"x": x + offset, "y": y, "id": finger} for finger, offset in enumerate(offsets)]
        hand.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", -30, 30)
    for offset in (40, 50, 60):
        touch("touchMove", -offset, offset)
        opened.page.evaluate("() => new Promise(requestAnimationFrame)")
    touch("touchEnd")
    assert opened.px_per_um() == pytest.approx(2 * home, rel=0.2)


@pytest.mark.slow
def test_zoom_by_wheel_buttons_and_keys(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    page = opened.page
    home = opened.px_per_um()
    page.click("#zoom-in")
    assert opened.px_per_um() == pytest.approx(2 * home, rel=0.05)
    page.click("#zoom-out")
    assert opened.px_per_um() == pytest.approx(home, rel=0.05)
    box = opened.box("#viewer")
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, -240)
    wheeled = opened.px_per_um()
    assert wheeled > 1.15 * home
    page.locator(".openseadragon-canvas").first.focus()
    page.keyboard.press("+")
    assert opened.px_per_um() > 1.05 * wheeled
    page.click("#zoom-home")
    assert opened.px_per_um() == pytest.approx(home, rel=0.05)


@pytest.mark.slow
def test_dragging_moves_the_slide(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    opened.page.click("#zoom-in")
    opened.settle()
    before = opened.overlay()[:, :, 3] > 0
    box = opened.box("#viewer")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    opened.page.mouse.move(x, y)
    opened.page.mouse.down()
    opened.page.mouse.move(x + 40, y + 20, steps=4)
    opened.page.wait_for_timeout(150)  # let go while it moves, the slide would glide on
    opened.page.mouse.up()
    opened.settle()
    after = opened.overlay()[:, :, 3] > 0
    assert (after[60:-60, 80:-80] == before[40:-80, 40:-120]).mean() > 0.97


@pytest.mark.slow
def test_the_slider_changes_the_opacity_of_the_map(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    for percent in (0, 30, 100):
        opened.page.fill("#opacity", str(percent))
        assert opened.overlay()[:, :, 3].max() == pytest.approx(2.55 * percent, abs=1.5)


@pytest.mark.slow
def test_another_map_is_another_picture_with_its_legend(report: Path, open_page: Open) -> None:
    opened = open_page(report)
    contribution = opened.overlay()
    legend = opened.page.locator(".legend:visible")
    assert legend.inner_text().startswith(
        "How much each tile raises (red) or lowers (blue) the slide's latent score (log-odds), "
    )
    assert "log-odds × tiles" in legend.inner_text()
    opened.page.get_by_text("Attention", exact=True).click()
    attention = opened.overlay()
    assert (attention[:, :, 3] == contribution[:, :, 3]).all() and (attention != contribution).any()
    assert "How much each tile counted" in opened.page.locator(".legend:visible").inner_text()


@pytest.mark.slow
def test_a_tile_leads_to_its_place_and_says_its_value(
    report: Path, result: SlideGrade, open_page: Open
) -> None:
    opened = open_page(report)
    relative = relative_attention(result.attention)
    assert relative is not None
    contributions = result.explanation.relative
    first = opened.page.locator("button.tile").first
    shown = f"{contributions.max():+.2f} · {relative[contributions.argmax()]:.2f}×"
    assert shown in first.inner_text()
    first.click()
    x, y = first.evaluate("tile => tile.getAttribute('aria-label').match(/\\d+/g)")
    like = opened.page.locator("#like code")
    assert like.inner_text().endswith(f"--manifest MANIFEST --tile s1@{x},{y} --output similar")
    opened.settle()
    overlay = opened.overlay()
    is_mark = (overlay[:, :, 2] > 180) & (overlay[:, :, 0] < 40) & (overlay[:, :, 3] == 255)
    rows, columns = np.nonzero(is_mark)
    height, width = is_mark.shape
    assert (rows.min() + rows.max()) / 2 == pytest.approx(height / 2, abs=3)
    assert (columns.min() + columns.max()) / 2 == pytest.approx(width / 2, abs=3)
    box = opened.box("#viewer")
    opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert (
        f"Contribution: {contributions.max():.2f} log-odds × tiles"
        in opened.page.locator("#readout").inner_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_layout(report: Path, open_page: Open, size: tuple[int, int]) -> None:
    opened = open_page(report, size)
    parts = {
        name: opened.box(name)
        for name in ("#slide", "#summary", "#tiles", "#quality", "#model", "header", "footer")
    }
    for name, box in parts.items():
        assert box["x"] >= 0 and box["x"] + box["width"] <= size[0], name
        for other, there in parts.items():
            apart = (
                box["x"] + box["width"] <= there["x"]
                or there["x"] + there["width"] <= box["x"]
                or box["y"] + box["height"] <= there["y"]
                or there["y"] + there["height"] <= box["y"]
            )
            assert name == other or apart, (name, other)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= size[0]
    stage = opened.box("#stage")
    assert stage["width"] > 0.6 * size[0] if size == DESKTOP else stage["width"] > 0.85 * size[0]
    assert stage["height"] >= 320
    top = min(parts["#slide"]["y"], parts["#summary"]["y"])
    assert top < 160 and parts["#summary"]["y"] < size[1] / 2  # the grade is seen at once
    if size == DESKTOP:
        assert stage["y"] + stage["height"] <= size[1]  # and the whole slide with it
    for name in ("#stage", "#summary", "#tiles"):
        assert opened.shot(name).std() > 10, name  # not blank


@pytest.mark.slow
def test_a_script_that_is_not_ours_is_not_run(report: Path, open_page: Open, tmp_path: Path) -> None:
    text = report.read_text()
    spoilt = tmp_path / "out" / "spoilt.html"
    spoilt.write_text(text.replace("</main>", "<script>document.title = 'run'</script></main>"))
    opened = open_page(spoilt)
    assert opened.page.title() == f"{HOSTILE}.tiff: grade moderate"
    complaints, opened.complaints[:] = opened.complaints[:], []
    assert len(complaints) == 1 and "Content Security Policy" in complaints[0]


@pytest.mark.slow
def test_detail_is_laid_in_where_the_page_is_coarser(
    pyramid_tiff: PyramidTiff, card: ModelCard, open_page: Open, tmp_path: Path
) -> None:
    """The most attended tile keeps its finest grain, which the page's pyramid has averaged away."""
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 40, (1100, 1400, 1)) + np.array([190, 110, 160])
    path = pyramid_tiff(np.clip(grain, 0, 250).astype(np.uint8), mpp=0.5)
    result = grade_of(path, TileSpec(0.5, 128, min_tissue=0.5))
    opened = open_page(write_slide_report(result, card, tmp_path, "coarse", budget_bytes=1))
    opened.page.locator("button.tile").first.click()
    opened.page.check("input[name=map][value='']", force=True)
    opened.settle()
    stage = opened.shot("#viewer").mean(2)
    height, width = stage.shape
    side = height // 8  # a tile is a third of the height
    rows = slice(height // 2 - side, height // 2 + side)
    tile = stage[rows, width // 2 - side : width // 2 + side]
    beside = stage[rows, width // 2 + 2 * side : width // 2 + 3 * side]
    assert tile.std() > 2 * beside.std()


@pytest.mark.slow
def test_the_index_is_sorted_by_a_click(
    result: SlideGrade, tmp_path: Path, card: ModelCard, open_page: Open
) -> None:
    graded = {
        name: dataclasses.replace(result, expected_grade=score)
        for name, score in (("b", 10.0), ("a", 9.0), ("c", 0.5))
    }
    report = write_slide_report(graded["b"], card, tmp_path, "s1")
    rows = [IndexEntry(Path(f"{name}.svs"), "s1", one.to_dict()) for name, one in graded.items()]
    rows.append(IndexEntry(Path(f"{HOSTILE}.svs"), "failed", {}, "not a slide"))
    opened = open_page(write_index(report.parent, rows, card), PHONE)

    def order() -> list[str]:
        return [cell.strip() for cell in opened.page.locator("tbody th").all_inner_texts()]

    failed = f"{HOSTILE}.svs"
    assert order() == [failed, "a.svs", "b.svs", "c.svs"]
    opened.page.get_by_role("button", name="Score").click()
    assert order() == ["c.svs", "a.svs", "b.svs", failed]  # as numbers
    opened.page.get_by_role("button", name="Score").click()
    assert order() == ["b.svs", "a.svs", "c.svs", failed]
    opened.page.get_by_role("button", name="Slide").click()
    assert order() == [failed, "a.svs", "b.svs", "c.svs"]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    with opened.page.expect_navigation():
        opened.page.get_by_role("link", name="b.svs").click()
    assert opened.page.url == report.as_uri()
    opened.requests.pop()  # it was asked for
    opened.requests[:] = [url for url in opened.requests if url != report.as_uri()]
