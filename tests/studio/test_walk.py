"""The whole way of a pathologist, in a browser."""

from __future__ import annotations

import csv
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium
from tests.studio.served import Visit, draw_slides, served


def labelled(visit: Visit, root: Path, mistake: bool) -> None:
    """Types patient, grade and site of every slide into the grid."""
    with (root / "study" / "manifest.csv").open(newline="") as file:
        known = {row["slide_id"]: row for row in csv.DictReader(file)}
    page = visit.page
    for row in page.locator("table.grid tbody tr").all():
        slide = known[row.locator("th").inner_text().split("\n")[0]]
        for column in ("patient_id", "grade", "site"):
            row.locator(f"input.{column}").fill(slide[column])
    if mistake:
        page.get_by_label("Grade of slide-03").fill("7")
    page.get_by_role("button", name="Save the labels").click()


def made_project(visit: Visit, address: str, name: str, tile: str = "128") -> None:
    """From the printed address to a project with a folder of slides."""
    page = visit.page
    page.goto(address)
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("Detail").fill("2")
    page.get_by_label("Side of a tile").fill(tile)
    page.get_by_role("button", name="Create the project").click()
    page.get_by_role("link", name="study").click()
    page.get_by_role("link", name="slides", exact=True).click()
    page.get_by_role("button", name="Use this folder").click()
    page.get_by_text("24 slides found.").wait_for()


@pytest.mark.slow  # tiles, embeds, fits, exports and grades 24 slides
def test_from_a_folder_of_slides_to_the_pages_of_new_ones(tmp_path: Path) -> None:
    root = tmp_path / "root"
    draw_slides(root / "study")
    with chromium() as browser, served(root, tmp_path / "home") as server:
        visit = Visit(browser, server)
        page = visit.page
        made_project(visit, server.start(), "lung")

        visit.go("Labels")
        labelled(visit, root, mistake=True)
        assert "Rows with a fault: 1." in page.get_by_role("alert").first.inner_text()
        wrong = page.locator("tr.wrong")
        assert "slide-03" in wrong.inner_text() and "found '7'" in wrong.inner_text()
        visit.picture("labels")
        wrong.get_by_label("Grade of slide-03").fill("3")
        page.get_by_role("button", name="Save the labels").click()
        page.get_by_text("Saved: no fault found.").wait_for()

        visit.go("Slides")
        page.get_by_role("button", name="Cut the slides into tiles").click()
        page.locator(".job.running, .job.done").first.wait_for()
        visit.wait_for_jobs()
        page.reload()
        assert "24 of 24 slides are ready" in page.locator("main").inner_text()
        pictures = page.locator(".card img")
        assert pictures.count() == 24
        pictures.first.scroll_into_view_if_needed()
        pictures.first.evaluate("picture => picture.decode()")  # ends when it is loaded, or fails
        page.evaluate("scrollTo(0, 0)")
        visit.picture("slides")

        visit.go("Train")
        shown = page.locator("pre", has_text="slidetl embed").first.text_content() or ""
        assert "fit-features manifest.csv" in shown
        page.get_by_role("button", name="Add to the queue").click()
        page.get_by_text("ridge-1 is in the queue.").wait_for()
        page.locator(".job.running").wait_for()
        visit.wait_for_jobs()

        visit.go("Model")
        said = page.locator("main").inner_text()
        assert (
            re.search(r"\d of 6 test slides have exactly your grade", said) and "The test part has 6" in said
        )
        visit.picture("model")
        page.get_by_role("button", name="Export this model").click()
        visit.wait_for_jobs()
        page.get_by_text("Exported as ridge-1.pt").wait_for()

        visit.go("Labels")
        patient = page.get_by_label("Patient of slide-03")
        before = patient.input_value()
        for text in ("another", before):
            patient.fill(text)
            page.get_by_role("button", name="Save the labels").click()
            page.get_by_text("Saved: no fault found.").wait_for()
            visit.go("Model")
            doubt = page.get_by_text(
                "1 slides have another patient or grade now than in this training: slide-03"
            )
            assert doubt.is_visible() == (text != before)
            visit.picture(f"model-{text}")
            visit.go("Labels")

        visit.go("Grade")
        page.get_by_role("link", name="study").click()
        page.get_by_role("link", name="new").click()
        page.get_by_label("All slides of this folder").check()
        page.get_by_role("button", name="Grade", exact=True).click()
        page.locator(".job.running, .job.done").first.wait_for()
        visit.wait_for_jobs()
        page.reload()
        assert page.locator("table.results tbody tr").count() == 2
        visit.picture("grade")
        table = json.loads((root / "studio" / "lung" / "grades" / "grades-1" / "slide-24.json").read_text())
        row = page.locator("table.results tr", has_text="slide-24")
        assert row.locator("td").first.inner_text() == table["grade_name"]
        with page.expect_popup() as opened:
            page.get_by_role("link", name="Page of slide-25.tiff").click()
        opened.value.get_by_role("heading", level=1).wait_for()
        opened.value.wait_for_function("document.querySelector('#viewer canvas') !== null")
        with page.expect_download() as got:
            page.get_by_role("link", name="QuPath file of slide-24.tiff").click()
        assert json.loads(Path(got.value.path()).read_text())["features"]
        assert not visit.complaints


@pytest.mark.slow  # trains for some seconds, twice
def test_a_training_is_stopped_and_resumed_by_a_restarted_server(tmp_path: Path) -> None:
    root = tmp_path / "root"
    draw_slides(root / "study")
    with chromium() as browser, served(root, tmp_path / "home") as server:
        visit = Visit(browser, server)
        page = visit.page
        made_project(visit, server.start(), "lung", tile="64")
        visit.go("Labels")
        labelled(visit, root, mistake=False)
        visit.go("Slides")
        page.get_by_role("button", name="Cut the slides into tiles").click()
        page.locator(".job").first.wait_for()
        visit.wait_for_jobs()

        visit.go("Train")
        page.get_by_text("Warm restart").first.click()
        page.get_by_text("More", exact=True).click()
        page.get_by_label("Rounds through the slides").fill("500")
        page.get_by_role("button", name="Add to the queue").click()
        last = (
            root / "studio" / "lung" / "runs" / "warm-1" / "logs" / "version_0" / "checkpoints" / "last.ckpt"
        )
        until = time.monotonic() + 400
        while not last.exists():
            assert time.monotonic() < until
            page.wait_for_timeout(300)
        page.locator("#curve canvas").wait_for()
        page.locator(".metrics", has_text="val/rps").wait_for()
        visit.picture("train")

        # The server ends; the training goes on, and the next server finds it.
        page.goto("about:blank")  # it would ask the server that is gone
        server.end()
        page.goto(server.start())
        page.get_by_role("link", name="lung").click()
        visit.go("Train")
        assert page.locator(".job.running").count() == 1
        page.get_by_role("button", name="Stop Training warm-1").click()
        page.locator(".job.stopped").wait_for()
        visit.go("Labels")  # it goes on with the labels that it has
        page.get_by_label("Patient of slide-03").fill("another")
        page.get_by_role("button", name="Save the labels").click()
        page.get_by_text("Saved: no fault found.").wait_for()
        visit.go("Train")
        epochs = int(re.search(r"(\d+) of 500", page.locator("body").inner_text() + " 0 of 500")[1])  # type: ignore[index]
        page.get_by_role("button", name="Resume Training warm-1").click()
        page.locator(".job.running", has_text="of 500 epochs").wait_for()
        done = int(re.search(r"(\d+) of 500", page.locator(".job.running").inner_text())[1])  # type: ignore[index]
        assert done >= max(1, epochs), "it goes on, and does not begin again"
        page.get_by_role("button", name="Stop Training warm-1").click()
        page.locator(".job.stopped").wait_for()
        assert not visit.complaints


def test_what_was_typed_outlives_a_refused_save_and_a_session(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "study").mkdir(parents=True)
    for name in "abc":
        (root / "study" / f"{name}.svs").write_bytes(b"no slide")
    with chromium() as browser, served(root, tmp_path / "home") as server:
        visit = Visit(browser, server)
        page = visit.page
        page.goto(server.start())
        page.get_by_label("Name", exact=True).fill("lung")
        page.get_by_role("button", name="Create the project").click()
        page.get_by_role("link", name="study").click()
        page.get_by_role("button", name="Use this folder").click()
        visit.go("Labels")

        def typed() -> list[str]:
            return [page.get_by_label(f"Grade of {name}").input_value() for name in "abc"]

        other = page.context.new_page()
        other.goto(page.url)
        other.get_by_label("Grade of a").fill("1")
        other.get_by_role("button", name="Save the labels").click()
        for name, grade in zip("abc", "234", strict=True):
            page.get_by_label(f"Grade of {name}").fill(grade)
        page.get_by_role("button", name="Save the labels").click()
        page.get_by_text("someone else has changed a since").wait_for()
        assert "someone else has typed: a, 1." in page.locator("tr.wrong").inner_text()
        assert typed() == ["2", "3", "4"]
        visit.picture("clash")

        cookies: list[Any] = page.context.cookies()
        page.context.clear_cookies()  # as after twelve hours
        page.get_by_label("Grade of c").fill("0")
        page.get_by_role("button", name="Save the labels").click()
        page.get_by_text("Open the address that the studio printed").wait_for()
        page.context.add_cookies(cookies)
        page.goto(f"{server.address}/p/lung/labels")
        page.get_by_text("What you typed was not saved.").wait_for()
        assert typed() == ["2", "3", "0"]
        visit.picture("restored")
        page.get_by_role("button", name="Save the labels").click()
        page.get_by_text("Saved: no fault found.").wait_for()
        page.reload()
        assert typed() == ["2", "3", "0"] and page.get_by_text("was not saved").is_hidden()

        # A page that is left open says that it has no connection, and no longer once it has.
        lost = page.get_by_text("No connection to the studio")
        for cut, mend in (
            (page.context.clear_cookies, lambda: page.context.add_cookies(cookies)),
            (lambda: page.context.set_offline(True), lambda: page.context.set_offline(False)),
        ):
            visit.go("Slides")
            page.get_by_role("button", name=re.compile("Cut the slides|tile again")).click()
            page.locator(".job.waiting, .job.running").first.wait_for()
            cut()
            lost.wait_for()
            visit.picture("lost")
            mend()
            lost.wait_for(state="detached")
            visit.wait_for_jobs()
