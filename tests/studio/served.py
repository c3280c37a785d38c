"""A studio in a process of its own, and a browser that notes what goes wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page

from slidetl.synthetic.cohort import SyntheticCohort, write_cohort


class Server:
    """``slidetl studio`` as a user starts it."""

    def __init__(self, root: Path, home: Path) -> None:
        self._words = [sys.executable, "-m", "slidetl", "studio", "--root", str(root), "--port", "0"]
        self._env = {**os.environ, "SLIDETL_HOME": str(home), "OMP_NUM_THREADS": "1"}
        self.address = ""
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Starts it, and returns the address that it prints."""
        self._process = subprocess.Popen(self._words, stdout=subprocess.PIPE, text=True, env=self._env)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.match(r"open (http://127\.0\.0\.1:\d+)/(\?token=\S+)", line):
                self.address = found[1]
                return f"{found[1]}/{found[2]}"
        raise AssertionError("the studio did not start")

    def end(self) -> None:
        """Ends it as Ctrl-C does."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None


@contextmanager
def served(root: Path, home: Path) -> Iterator[Server]:
    server = Server(root, home)
    try:
        yield server
    finally:
        server.end()


class Visit:
    """A browser's page; complaints and requests to elsewhere are noted."""

    def __init__(self, browser: Browser, server: Server) -> None:
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.page: Page = context.new_page()
        self.page.set_default_timeout(60_000)
        self.complaints: list[str] = []
        self._server = server
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._asked)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.text} {message.location}")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((f"{self._server.address}/", "data:", "blob:")):
            self.complaints.append(f"asked for {request.url}")

    def picture(self, name: str) -> None:
        """Keeps a picture of the page, where SLIDETL_STUDIO_PICTURES names a folder."""
        if folder := os.environ.get("SLIDETL_STUDIO_PICTURES"):
            self.page.wait_for_load_state("networkidle")
            self.page.screenshot(path=f"{folder}/{name}.png", full_page=True)

    def go(self, page: str) -> None:
        """Opens one of the five pages by its tab."""
        self.page.get_by_role("navigation").get_by_role("link", name=page).click()

    def wait_for_jobs(self, seconds: float = 240) -> None:
        """Waits until no job is active; the page reloads itself then."""
        until = time.monotonic() + seconds
        while self.page.locator(".job.running, .job.waiting, .job.stopping").count():
            assert time.monotonic() < until, self.page.locator("#jobs").inner_text()
            self.page.wait_for_timeout(300)
        failed = self.page.locator(".job.failed")
        assert not failed.count(), failed.all_inner_texts()


def draw_slides(folder: Path) -> None:
    """Draws 24 slides into ``slides`` and two into ``new``, with their manifest above."""
    cohort = SyntheticCohort(slides=26, patients=26, sites=2, size_px=768, mpp=2.0, stain="he", seed=1)
    write_cohort(cohort, folder, workers=2)
    (folder / "new").mkdir()
    for name in ("slide-24.tiff", "slide-25.tiff"):
        (folder / "slides" / name).rename(folder / "new" / name)
