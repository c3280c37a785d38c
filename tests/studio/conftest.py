from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from slidetl.studio.app import Studio, create_app, open_studio
from slidetl.studio.guard import Guard

ORIGIN = "http://127.0.0.1:8765"


@dataclass
class Client:
    """A browser without scripts, let in; and the studio that it talks to."""

    http: TestClient
    studio: Studio
    guard: Guard

    @property
    def root(self) -> Path:
        return self.studio.root.folder

    @property
    def csrf(self) -> str:
        found = re.search(r'name="csrf" content="([^"]+)"', self.http.get("/").text)
        assert found is not None
        return found[1]

    def post(self, path: str, **fields: str) -> str:
        """Sends a form, follows, and returns the page; it must have worked."""
        answer = self.http.post(path, data={"csrf": self.csrf, **fields}, headers={"Origin": ORIGIN})
        assert answer.status_code == 200, answer.text
        return answer.text

    def refused(self, path: str, **fields: str) -> tuple[int, str]:
        """Sends a form that must be refused."""
        answer = self.http.post(path, data={"csrf": self.csrf, **fields}, headers={"Origin": ORIGIN})
        assert answer.status_code >= 400, answer.text
        return answer.status_code, answer.text

    def grid(self) -> dict[str, str]:
        """Reads the fields of the page Labels, as a browser would send them."""
        return cells_of(self.http.get("/p/lung/labels").text)

    def typed(self, cells: Mapping[str, str], shown: Mapping[str, str] = {}) -> dict[str, str]:
        """Changes cells of the page Labels, by column and number of their row: ``grade:0``."""
        shown = shown or self.grid()
        keys = list(dict.fromkeys(name.partition(":")[2] for name in shown))
        places = ((*name.split(":"), text) for name, text in cells.items())
        return {**shown, **{f"{column}:{keys[int(row)]}": text for column, row, text in places}}

    def label(self, cells: Mapping[str, str]) -> str:
        """Types into cells of the page Labels, and saves it."""
        return self.post("/p/lung/labels", **self.typed(cells))

    def bring(self, table: str | bytes) -> tuple[int, str]:
        """Sends a table of labels."""
        content = table.encode() if isinstance(table, str) else table
        headers = {"Origin": ORIGIN, "X-CSRF-Token": self.csrf}
        answer = self.http.put("/p/lung/table", content=content, headers=headers)
        return answer.status_code, answer.text


def cells_of(page: str) -> dict[str, str]:
    """Reads the cells of a page Labels."""
    found = re.findall(r'<input [^>]*?name="(\w+:\w+)" value="([^"]*)"', page)
    return {name: unescape(value) for name, value in found}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Opens a studio on ``tmp_path/root``; its queue runs nothing."""
    made: list[Studio] = []

    def start(let_in: bool = True, upload_gb: float = 5.0, password: str = "") -> Client:
        (tmp_path / "root").mkdir(exist_ok=True)
        studio = open_studio(tmp_path / "root", upload_gb)
        made.append(studio)
        app = create_app(studio)
        guard = Guard(app, (ORIGIN, "http://localhost:8765"), password)
        app.state.guard = guard
        http = TestClient(guard, base_url=ORIGIN)
        if let_in:
            assert http.get(f"/?token={guard.token}").status_code == 200
        return Client(http, studio, guard)

    yield start
    for studio in made:
        studio.queue.close()


@pytest.fixture
def client(opened: Callable[..., Client]) -> Client:
    return opened()


@pytest.fixture
def project(client: Client) -> Client:
    """A project ``lung`` with three files that are named as slides."""
    folder = client.root / "study"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.svs").write_bytes(b"no slide")
    client.post("/projects", name="lung", grades="none, mild, severe")
    client.post("/p/lung/folder", folder="study")
    return client
