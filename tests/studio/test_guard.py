"""Attacks on the studio."""

from __future__ import annotations

import asyncio
import csv
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from slidetl.errors import UsageError
from slidetl.studio.guard import COOKIE, LOOPBACK, is_password, read_password, write_password
from slidetl.studio.paths import Refused, Root
from tests.studio.conftest import ORIGIN, Client


def test_without_the_token_nothing_is_shown(opened: Callable[..., Client]) -> None:
    client = opened(let_in=False)
    for path in ("/", "/p/lung/slides", "/?token=", "/?token=x", "/p/lung/file/project.json", "/docs"):
        answer = client.http.get(path)
        assert answer.status_code == 401 and "slidetl" not in answer.text, path
    assert client.http.get("/static/studio.css").status_code == 200  # of the login


def test_the_token_works_once_and_becomes_a_cookie(opened: Callable[..., Client]) -> None:
    client = opened(let_in=False)
    token = client.guard.token
    answer = client.http.get(f"/?token={token}", follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and token.lower() not in cookie
    assert client.http.get("/").status_code == 200
    other = TestClient(client.guard, base_url=ORIGIN)
    assert other.get(f"/?token={token}").status_code == 401
    assert other.get("/?token=").status_code == 401
    other.cookies.set(COOKIE, "guessed")
    assert other.get("/").status_code == 401


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8765", "127.0.0.1:9", "127.0.0.1", "127.0.0.1:8765.evil.example", ""],
)
def test_a_foreign_host_is_refused(host: str, client: Client) -> None:
    assert client.http.get("/", headers={"Host": host}).status_code == 421
    assert client.http.get("/", headers={"Host": "localhost:8765"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {},
        {"Origin": "https://127.0.0.1:8765"},
        {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"},
        {"Origin": ORIGIN, "Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_change_from_a_foreign_page_is_refused(headers: dict[str, str], client: Client) -> None:
    form = {"csrf": client.csrf, "name": "lung", "grades": "0,1"}
    assert client.http.post("/projects", data=form, headers=headers).status_code == 403
    headers = {"X-CSRF-Token": client.csrf, **headers}
    assert client.http.put("/p/lung/upload/a.svs", content=b"", headers=headers).status_code == 403
    assert not (client.root / "studio" / "lung").exists()


def test_a_change_needs_the_token_of_its_session(project: Client) -> None:
    headers = {"Origin": ORIGIN}
    for path, csrf in (("/projects", ""), ("/projects", "x"), ("/p/lung/tile", ""), ("/p/lung/export", "é")):
        assert project.http.post(path, data={"csrf": csrf}, headers=headers).status_code == 403
    for path in ("/p/lung/upload/d.svs", "/p/lung/table"):
        assert project.http.put(path, content=b"", headers=headers).status_code == 403
    assert project.http.get("/p/lung/tile").status_code == 405, "nothing is changed by a link"
    assert not project.studio.queue.jobs()


def test_every_answer_forbids_what_is_not_ours(project: Client) -> None:
    for path in (
        "/",
        "/p/lung/slides",
        "/static/studio.js",
        "/p/lung/labels.csv",
        "/nowhere",
        "/p/lung/jobs",
    ):
        headers = project.http.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
        assert "frame-ancestors 'none'" in policy and headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store" and headers["referrer-policy"] == "same-origin"


@pytest.mark.parametrize("folder", ["..", "/", "/etc", "study/../..", "out", "study/deep", "\0", "a" * 5000])
def test_a_folder_out_of_the_root_is_refused(folder: str, project: Client, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.svs").write_bytes(b"")
    (project.root / "out").symlink_to(tmp_path / "secret")
    (project.root / "study" / "deep").symlink_to("../../secret")
    status, said = project.refused("/p/lung/folder", folder=folder)
    assert status in (400, 403) and "x.svs" not in said
    for page in ("slides", "grade"):
        answer = project.http.get(f"/p/lung/{page}", params={"folder": folder})
        assert answer.status_code in (400, 403, 404), page
        assert "x.svs" not in answer.text


def test_a_link_out_of_the_root_is_left_out(project: Client, tmp_path: Path) -> None:
    (tmp_path / "secret.svs").write_bytes(b"")
    (project.root / "study" / "d.svs").symlink_to(tmp_path / "secret.svs")
    page = project.post("/p/lung/folder", folder="study")
    assert "3 slides found." in page and "1 slides are left out: they are links" in page
    assert ">d.svs<" not in project.http.get("/p/lung/grade?folder=study").text
    status, _ = project.refused("/p/lung/grade", slide="study/d.svs", model="m")
    assert status in (403, 404)


@pytest.mark.parametrize("slide", ["manifest.csv", "study", ".", "list.svs.txt"])
def test_only_slides_are_graded(slide: str, project: Client) -> None:
    """A table or a folder could lead the command out of the root."""
    models = project.root / "studio" / "lung" / "models"
    models.mkdir()
    (models / "m.pt").write_bytes(b"")
    (project.root / "manifest.csv").write_text("slide_id,path,patient_id,grade\na,/etc/passwd,a,\n")
    (project.root / "list.svs.txt").write_text("")
    status, said = project.refused("/p/lung/grade", slide=slide, model=str(models / "m.pt"))
    assert status == 400 and "only slides can be graded" in said
    assert not project.studio.queue.jobs()
    project.post("/p/lung/grade", slide="study/a.svs", model=str(models / "m.pt"))
    words = project.studio.queue.jobs()[0].steps[0].words
    assert words[:3] == ("grade", "models/m.pt", str(project.root / "study" / "a.svs"))


def test_no_field_becomes_an_option(project: Client) -> None:
    assert project.refused("/projects", name="b", grades="0, --output=/x")[0] == 400
    run = project.root / "studio" / "lung" / "runs" / "r" / "checkpoints"
    run.mkdir(parents=True)
    (run / "ridge.ckpt").write_bytes(b"")
    project.post("/p/lung/export", run="r", licence="--allow os")
    assert project.studio.queue.jobs()[0].steps[0].words[-1] == "--licence=--allow os"


def test_the_command_finds_the_best_checkpoint_of_a_run(project: Client) -> None:
    """It refuses a training that has not ended."""
    assert project.refused("/p/lung/export", run="r")[0] == 404
    kept = project.root / "studio" / "lung" / "runs" / "r" / "logs" / "version_0" / "checkpoints"
    kept.mkdir(parents=True)
    assert "has no model to export" in project.refused("/p/lung/export", run="r")[1]
    (kept / "last.ckpt").touch()
    project.post("/p/lung/export", run="r")
    assert project.studio.queue.jobs()[0].steps[0].words[:2] == ("export", "runs/r")


def test_a_manifest_that_was_changed_to_lead_out_is_a_fault(project: Client) -> None:
    labels = project.root / "studio" / "lung" / "labels.csv"
    labels.write_text(labels.read_text().replace("../../study/a.svs", "/etc/passwd"))
    assert "lies outside of the studio" in project.http.get("/p/lung/labels").text
    assert project.refused("/p/lung/train", preset="ridge")[0] == 400


@pytest.mark.parametrize(
    "path",
    [
        "project.json",
        "manifest.csv",
        "../../study/a.svs",
        "..%2f..%2fstudy%2fa.svs",
        "%2fetc%2fpasswd",
        "cache/previews/../../project.json",
        "grades/g/link.html",
        "grades/g/secret.json",
        "runs/r/config.yaml",
    ],
)
def test_only_results_are_served(path: str, project: Client, tmp_path: Path) -> None:
    folder = project.root / "studio" / "lung" / "grades" / "g"
    folder.mkdir(parents=True)
    (folder / "secret.json").write_text("{}")
    (tmp_path / "secret.html").write_text("secret")
    (folder / "link.html").symlink_to(tmp_path / "secret.html")
    assert project.http.get(f"/p/lung/file/{path}").status_code in (403, 404)


def test_a_report_is_shut_in(project: Client) -> None:
    folder = project.root / "studio" / "lung" / "grades" / "g"
    folder.mkdir(parents=True)
    (folder / "a.html").write_text("<script>fetch('/')</script>")
    policy = project.http.get("/p/lung/file/grades/g/a.html").headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts") and "allow-same-origin" not in policy
    assert "connect-src" not in policy and "default-src 'none'" in policy


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>.svs", '"><img src=x onerror=alert(1)>.svs', "{{7*7}}.svs"]
)
def test_names_of_slides_are_text(name: str, project: Client) -> None:
    folder = project.root / "strange"
    folder.mkdir()
    try:
        (folder / name).write_bytes(b"")
    except OSError:
        folder = folder / "<b>x<"
        folder.mkdir()
        (folder / "<b>.svs").write_bytes(b"")
    project.post("/p/lung/folder", folder="strange")
    project.label({"patient_id:0": "<script>alert(2)</script>", "site:0": "<i>{{7*7}}"})
    for page in ("slides", "slides?folder=strange", "labels", "grade?folder=strange", "train"):
        text = project.http.get(f"/p/lung/{page}").text
        for foreign in ("<script>alert", "<img src=x", "<i>", "<b>x", ">49<"):
            assert foreign not in text, page


def test_a_log_and_a_reason_are_text(project: Client) -> None:
    project.post("/p/lung/tile")
    job = project.studio.queue.jobs()[0]
    folder = project.root / "studio" / ".jobs" / job.id
    values = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(
        json.dumps({**values, "state": "failed", "reason": "<script>1</script>"})
    )
    (folder / "log.txt").write_text("<script>1</script>")
    assert "<script>1" not in project.http.get("/p/lung/slides").text
    assert project.http.get(f"/p/lung/jobs/{job.id}/log").headers["content-type"].startswith("text/plain")
    for wrong in ("../../lung", "000009-tile", "x"):
        assert project.http.get(f"/p/lung/jobs/{wrong}/log").status_code == 404


def test_names_that_are_no_text_are_left_out(project: Client) -> None:
    latin = os.fsdecode(b"\xe9t\xe9")
    for folder in (project.root, project.root / "study"):
        (folder / f"{latin}.svs").write_bytes(b"")
        (folder / latin).mkdir()
    (project.root / "linked").symlink_to(project.root / latin)
    for page in ("grade", "slides?folder=", "grade?folder=study"):
        answer = project.http.get(f"/p/lung/{page}")
        assert answer.status_code == 200 and "2 names here are not UTF-8" in answer.text, page
        assert "\\udce9" not in answer.text
    assert project.http.get("/p/lung/grade?folder=linked").status_code == 400
    page = project.post("/p/lung/folder", folder="study")
    assert "3 slides found." in page and "1 slides are left out: their names" in page
    (project.root / "study" / f"{latin}.svs").unlink()
    (project.root / "study" / f"{latin}.svs").symlink_to("nowhere")
    (project.root / "study" / f"{latin}.txt").symlink_to("nowhere")
    assert "links to nothing" in project.post("/p/lung/folder", folder="study")
    with pytest.raises(Refused, match="must be UTF-8"):
        Root(project.root / latin)


@pytest.mark.parametrize("other", ['prefs={"theme":"dark"}', "a[b]=1", "x", '"=;;a=é'])
def test_a_cookie_of_another_program_shuts_nobody_out(other: str, client: Client) -> None:
    key = client.http.cookies["slidetl_studio"]
    client.http.cookies.clear()
    for cookies in (f"{other}; slidetl_studio={key}", f"slidetl_studio={key}; {other}"):
        assert client.http.get("/", headers={b"Cookie": cookies.encode()}).status_code == 200
    wrong = f"{other}; slidetl_studio=x{key}".encode()
    assert client.http.get("/", headers={b"Cookie": wrong}).status_code == 401


def test_no_cell_of_a_downloaded_table_is_a_formula(project: Client) -> None:
    formulas = ["=cmd|' /C calc'!A0", "+1+1", "@SUM(A1)", " -2+3", "\t=1"]
    for index, text in enumerate(formulas[:3]):
        project.label({f"patient_id:{index}": text, f"site:{index}": formulas[-1 - index % 2]})
    answer = project.http.get("/p/lung/labels.csv")
    assert answer.headers["content-disposition"].startswith("attachment")
    rows = list(csv.DictReader(answer.text.splitlines()))
    assert len(rows) == 3
    for row in rows:
        for column in ("patient_id", "site"):
            assert row[column].startswith("'"), row
    # Saved again, nothing is added to it.
    project.label({"grade:0": "mild"})
    again = list(csv.DictReader(project.http.get("/p/lung/labels.csv").text.splitlines()))
    assert [row["patient_id"] for row in again] == [row["patient_id"] for row in rows]


async def put(
    client: Client, path: str, headers: dict[str, str], chunk: bytes, count: int
) -> tuple[int, int]:
    """Uploads chunk by chunk; returns the status, and how many chunks were read."""
    read = 0
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": chunk, "more_body": read < count}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    cookie = "; ".join(f"{name}={value}" for name, value in client.http.cookies.items())
    given = {
        "host": "127.0.0.1:8765",
        "origin": ORIGIN,
        "cookie": cookie,
        "x-csrf-token": client.csrf,
        **headers,
    }
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "PUT",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8765),
    }
    await client.guard(scope, receive, send)
    return statuses[0], read


def test_ten_gigabytes_are_refused_before_they_are_read(project: Client) -> None:
    length = {"content-length": str(10 * 10**9)}
    status, read = asyncio.run(put(project, "/p/lung/upload/big.svs", length, b"x" * 2**16, 10))
    assert (status, read) == (413, 0)


def test_an_upload_without_a_length_is_refused_at_the_limit(opened: Callable[..., Client]) -> None:
    client = opened(upload_gb=0.001)  # 1 MB
    client.post("/projects", name="lung", grades="0, 1")
    status, read = asyncio.run(put(client, "/p/lung/upload/big.svs", {}, b"x" * 2**16, 200_000))
    assert (status, read) == (413, 16)
    assert not list((client.root / "studio" / "lung" / "slides").iterdir())
    status, read = asyncio.run(put(client, "/p/lung/table", {}, b"x" * 2**20, 200_000))
    assert (status, read) == (413, 5)


def test_an_upload_arrives_whole_or_not_at_all(project: Client) -> None:
    folder = project.root / "studio" / "lung" / "slides"
    status, _ = asyncio.run(put(project, "/p/lung/upload/d.svs", {"content-length": "6"}, b"abc", 2))
    assert status == 201 and (folder / "d.svs").read_bytes() == b"abcabc"
    assert asyncio.run(put(project, "/p/lung/upload/d.svs", {}, b"other", 1))[0] == 409
    assert asyncio.run(put(project, "/p/lung/upload/e.svs", {"content-length": "9"}, b"cut", 1))[0] == 400
    assert [path.name for path in folder.iterdir()] == ["d.svs"]


@pytest.mark.parametrize("has_links", [True, False])
def test_of_two_uploads_of_one_name_the_first_whole_one_stays(
    has_links: bool, project: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise PermissionError(errno.EPERM, "no hard links on this share")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)

    async def both() -> list[tuple[int, int]]:
        sent = ((b"a" * 1000, 40), (b"b" * 1000, 9))
        one, two = (put(project, "/p/lung/upload/d.svs", {}, chunk, count) for chunk, count in sent)
        return list(await asyncio.gather(one, two))

    statuses = [status for status, _ in asyncio.run(both())]
    assert sorted(statuses) == [201, 409]
    folder = project.root / "studio" / "lung" / "slides"
    whole = (b"a" * 40_000, b"b" * 9_000)[statuses.index(201)]
    assert (folder / "d.svs").read_bytes() == whole and len(list(folder.iterdir())) == 1


def test_what_a_killed_studio_had_taken_of_an_upload_is_removed(
    project: Client, opened: Callable[..., Client]
) -> None:
    folder = project.root / "studio" / "lung" / "slides"
    folder.mkdir()
    for name in (".d.svs.0123456789abcdef.partial", "e.svs"):
        (folder / name).write_bytes(b"x")
    project.studio.queue.close()
    opened()
    assert [path.name for path in folder.iterdir()] == ["e.svs"]


@pytest.mark.parametrize(
    "name", ["x.sh", ".x.svs", "..%2fx.svs", "a%00.svs", "x", "<b>.svs", "a" * 130 + ".svs", "x.svs%0a"]
)
def test_only_slides_with_plain_names_are_uploaded(name: str, project: Client) -> None:
    headers = {"Origin": ORIGIN, "X-CSRF-Token": project.csrf}
    assert project.http.put(f"/p/lung/upload/{name}", content=b"x", headers=headers).status_code in (400, 404)
    folder = project.root / "studio" / "lung" / "slides"
    assert not folder.exists() or not list(folder.iterdir())


def test_a_form_without_end_is_refused(project: Client) -> None:
    form = {"csrf": project.csrf, "patient_id:0": "x" * 5_000_000}
    answer = project.http.post("/p/lung/labels", data=form, headers={"Origin": ORIGIN})
    assert answer.status_code == 413
    many = "&".join(f"a{n}=1" for n in range(40_000))
    answer = project.http.post("/p/lung/labels", content=many, headers={"Origin": ORIGIN})
    assert answer.status_code == 400


@pytest.mark.slow
def test_a_password_lets_in_and_nothing_else_does(opened: Callable[..., Client], tmp_path: Path) -> None:
    path = tmp_path / "password"
    write_password(path, "correct horse battery")
    assert "correct" not in path.read_text() and path.stat().st_mode & 0o077 == 0
    client = opened(let_in=False, password=read_password(path))
    http = client.http
    assert not client.guard.token
    assert http.get("/", follow_redirects=False).headers["location"] == "/login"
    assert http.get("/?token=", follow_redirects=False).status_code == 303
    assert "password" in http.get("/login").text
    headers = {"Origin": ORIGIN}
    assert http.post("/login", data={"password": "correct horse batterY"}, headers=headers).status_code == 403
    assert http.post("/login", data={"password": "correct horse battery"}).status_code == 403
    assert http.get("/", follow_redirects=False).status_code == 303
    # What a script asks for has no login page as its answer: an upload would pass for done.
    asked = http.get("/p/lung/jobs", headers={"HX-Request": "true"}, follow_redirects=False)
    brought = http.put("/p/lung/table", headers={"Origin": ORIGIN}, follow_redirects=False)
    assert (asked.status_code, brought.status_code) == (401, 401) and "not signed in" in brought.text
    answer = http.post("/login", data={"password": "correct horse battery"}, headers=headers)
    assert answer.status_code == 200 and "New project" in answer.text


def test_a_password_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "password"
    with pytest.raises(UsageError, match="at least 12 letters"):
        write_password(path, "short")
    with pytest.raises(UsageError, match="--new-password"):
        read_password(path)
    path.write_text("{}")
    with pytest.raises(UsageError, match="--new-password"):
        read_password(path)
    write_password(path, "correct horse battery")
    assert is_password("correct horse battery", read_password(path))
    path.chmod(0o644)
    with pytest.raises(UsageError, match="others may read it"):
        read_password(path)


@pytest.mark.parametrize(
    "words",
    [
        ["--host", "0.0.0.0"],
        ["--host", "studio.hospital.example"],
        ["--public-url", "https://studio.hospital.example"],
        ["--host", "0.0.0.0", "--password-file", "password"],
    ],
)
def test_other_machines_need_a_password(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from slidetl.cli import main

    assert main(["studio", "--root", str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert "--password-file" in said and "TLS" in said
    assert "127.0.0.1" in LOOPBACK
